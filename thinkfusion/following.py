# SPDX-License-Identifier: Apache-2.0
"""Processes that end with the one that started them, and do not work or wait on for nobody."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from threading import Thread

_PR_SET_PDEATHSIG = 1


def follow_launcher() -> None:
    """Get a SIGTERM when `accelerate launch` ends: it forwards none of its own, and leaves the training behind.

    Linux tells a process of its parent's end (prctl, PR_SET_PDEATHSIG); elsewhere, and where no launcher is, this does
    nothing. torchrun forwards signals by itself.
    """
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def follow_parent() -> None:
    """End this process, one that multiprocessing started, as soon as the one that started it has ended.

    The processes of a pool end with it in order, but not if only their parent is killed: then they finish what they do,
    an hour of training into a folder that the next run works in, or wait for more for ever. The initializer of a
    pool; does nothing in a process that multiprocessing did not start. Not PR_SET_PDEATHSIG: it goes by the thread
    that started the process, which may end earlier.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        Thread(target=_end_after, args=(parent.join,), name="follow_parent", daemon=True).start()


def _end_after(join: Callable[[], None]) -> None:
    join()
    os._exit(1)  # an orderly end would wait for the queues of the one that is gone
