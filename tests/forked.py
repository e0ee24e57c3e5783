# SPDX-License-Identifier: Apache-2.0
"""Programs in processes of their own, forked from one that has imported what they need and did nothing else.

A process takes ten seconds and more for these imports. What it does then is what a fresh one does: no model, no random
number and no thread is there before the fork. Launchers, and what is about starting itself, are tested with fresh ones.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.preloaded"])


def run_forked(
    program: Path, *flags: str, environment: Mapping[str, str], cwd: Path = ROOT, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """What `python program flags…` does, and printed. Raises TimeoutExpired, with the process killed."""
    command = [str(program), *flags]
    with tempfile.TemporaryDirectory() as folder:
        printed = [Path(folder, name) for name in ("stdout", "stderr")]
        process = FORKS.Process(target=_run, args=(command, dict(environment), cwd, printed))
        process.start()
        process.join(timeout)
        late = process.is_alive()
        process.kill()
        process.join()
        out, err = (path.read_text() if path.exists() else "" for path in printed)
        if late:
            raise subprocess.TimeoutExpired(command, timeout, out, err)
        assert process.exitcode is not None
        return subprocess.CompletedProcess(command, process.exitcode, out, err)


def _run(command: list[str], environment: dict[str, str], cwd: Path, printed: list[Path]) -> None:
    print_into(*printed)
    take(environment)
    os.chdir(cwd)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")


def print_into(out: Path, err: Path) -> None:
    """Send this process's output and errors to files."""
    for path, number in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)


def take(environment: Mapping[str, str]) -> None:
    """Make this process's environment another one, with what torch read of it when it was imported."""
    import torch

    os.environ.clear()
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
