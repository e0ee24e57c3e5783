# SPDX-License-Identifier: Apache-2.0
"""Several processes on a machine without a GPU, as `accelerate launch --num_processes N` was asked for.

accelerate 1.15 starts one process on such a machine, whatever the number, and says nothing: half of the batch that the
user counted on is missing. A recipe that calls `ensure_processes` first gets what was asked for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence


def usable_cores() -> int:
    """The cores that this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ensure_processes() -> None:
    """Replace this process by the processes that `accelerate launch` was asked for, if it started only one on a CPU.

    Does nothing where an accelerator is found, where one process was asked for, or within a distributed run. Raises
    RuntimeError, with the command to use, if the number asked for cannot be found out.
    """
    import psutil
    import torch

    if not launched_alone(os.environ) or torch.accelerator.is_available():
        return
    count = requested_processes(psutil.Process(os.getppid()).cmdline())
    if count is None:
        raise RuntimeError(
            "accelerate launched one process where more were asked for. On a CPU, use: torchrun --nproc_per_node N "
            f"{' '.join(sys.argv)}"
        )
    port = os.environ["MASTER_PORT"]
    print(f"accelerate launches one process on a CPU; starting the {count} that were asked for.", file=sys.stderr)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count), "--master_port", port]
    os.execv(sys.executable, [*command, *sys.argv])


def launched_alone(environment: Mapping[str, str]) -> bool:
    """Whether accelerate's launcher prepared for several processes, and then started this one only.

    Its sign is an address to meet at, without a number of those who meet.
    """
    prepared = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment
    return prepared and not {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"} & set(environment)


def requested_processes(command: Sequence[str]) -> int | None:
    """The number of processes in the command line of `accelerate launch`, None if it is not there."""
    for index, word in enumerate(command):
        name, _, value = word.partition("=")
        if name in ("--num_processes", "--num-processes"):
            value = value or next(iter(command[index + 1 :]), "")
            return int(value) if value.isdigit() and int(value) > 1 else None
    return None
