# SPDX-License-Identifier: Apache-2.0
"""Which weights are these: digests of files, quick to make where files are large."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

_MIB = 1 << 20
_BLOCKS = 64


def digest(path: Path) -> str:
    """SHA-256 of a file of up to 64 MiB; of 64 blocks of 1 MiB, spread evenly from first to last, of a larger one."""
    size = path.stat().st_size
    found = hashlib.sha256()
    with path.open("rb") as file:
        for index in range(_BLOCKS if size > _BLOCKS * _MIB else math.ceil(size / _MIB)):
            file.seek(index * _MIB if size <= _BLOCKS * _MIB else (size - _MIB) * index // (_BLOCKS - 1))
            found.update(file.read(_MIB))
    return found.hexdigest()


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint, by name; of an adapter, the adapter's alone."""
    folder = Path(folder)
    adapter = folder / "adapter_model.safetensors"
    return [adapter] if adapter.is_file() else sorted(folder.glob("*.safetensors"))


def weights_digest(folder: str | Path) -> str | None:
    """A digest of the weights in a checkpoint's folder: names, sizes and contents of their files; None without any."""
    files = weight_files(folder)
    lines = [f"{path.name} {path.stat().st_size} {digest(path)}" for path in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest() if files else None
