# SPDX-License-Identifier: Apache-2.0
"""Two processes that train together, as a launcher starts them: they end in time, or say where they wait."""

import faulthandler
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import torch

PROCESSES = 2


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_in_both(function: Callable[..., None], *arguments: Any, seconds: float = 90) -> None:
    """`function(rank, *arguments)` in two processes of one group. Raises what fails in one, or TimeoutError."""
    running = torch.multiprocessing.spawn(_be_one, (free_port(), seconds, function, arguments), PROCESSES, join=False)
    end = time.monotonic() + 2 * seconds
    while not running.join(max(0.0, end - time.monotonic())):
        if time.monotonic() > end:
            for process in running.processes:
                process.kill()
            raise TimeoutError(f"{function.__name__}: its processes did not end in {2 * seconds:.0f} s")


def _be_one(rank: int, port: int, seconds: float, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    # Never called off: a process may wait for ever at its end, too.
    faulthandler.dump_traceback_later(seconds, exit=True)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, OMP_NUM_THREADS="1")
    function(rank, *arguments)
