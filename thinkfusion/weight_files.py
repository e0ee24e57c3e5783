# SPDX-License-Identifier: Apache-2.0
"""The weights of a checkpoint on disk, read and written by pieces of a few MiB: never a tensor, let alone a model.

safetensors' own reader maps whole files, and its writer wants all tensors of a file at once. The format itself is
simple: the length of a header in 8 bytes, a JSON header with the place of each tensor, and the tensors.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types that can be fused."""
PIECE = 1 << 17
"""Values that are read at a time: two pieces in float64 stay in a core's cache."""
_LONGEST_HEADER = 100_000_000


def bytes_of(values: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor, (values,), for files."""
    return memoryview(values.view(torch.uint8).numpy())  # type: ignore[arg-type]


class StoredTensor(NamedTuple):
    """Where a tensor is."""

    name: str
    dtype: str
    """As safetensors calls it: BF16, F32, …"""
    shape: tuple[int, ...]
    file: str
    begin: int
    """In bytes from the beginning of the file."""
    end: int

    @property
    def numel(self) -> int:
        """Number of its values."""
        return math.prod(self.shape)


class WeightFile(NamedTuple):
    """A safetensors file: its header as it is in the file, length included, and its tensors in their order."""

    name: str
    header: bytes
    tensors: tuple[StoredTensor, ...]


def read_header(path: Path) -> WeightFile:
    """The header of a safetensors file; ValueError if the file is damaged or not all there."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"{path}: this is no safetensors file, or its beginning is damaged. Copy it again.")
        text = file.read(length)
    try:
        entries = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        tensors = [
            StoredTensor(
                name,
                entry["dtype"],
                tuple(entry["shape"]),
                path.name,
                *(8 + length + offset for offset in entry["data_offsets"]),
            )
            for name, entry in entries.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: the header cannot be read; the file is damaged. Copy it again.") from None
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    expected = max((tensor.end for tensor in tensors), default=8 + length)
    if size != expected:
        state = "cut off" if size < expected else "damaged"
        raise ValueError(f"{path}: found {size:,} bytes, expected {expected:,}; the file is {state}. Copy it again.")
    return WeightFile(path.name, start + text, tuple(tensors))


class StoredWeights:
    """The weights of a checkpoint folder, opened for reading; a context manager.

    Raises FileNotFoundError for a folder without safetensors, or with a missing shard; ValueError for a file that is
    damaged or cut off.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / INDEX
        if index.is_file():
            try:
                self.index: dict[str, Any] | None = json.loads(index.read_text(encoding="utf-8"))
                names = sorted(set(self.index["weight_map"].values()))  # type: ignore[index]
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{index}: cannot be read; the file is damaged. Copy it again.") from None
        else:
            self.index, names = None, [SINGLE]
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder}: {len(missing)} of {len(names)} weight files are missing ({', '.join(missing[:4])}). "
                "Copy the whole checkpoint."
            )
        self.files = [read_header(folder / name) for name in names]
        self.tensors = {tensor.name: tensor for file in self.files for tensor in file.tensors}
        listed = set(self.index["weight_map"]) if self.index else set(self.tensors)
        if absent := sorted(listed - set(self.tensors)):
            raise ValueError(f"{index}: names {absent[0]}, which no file holds. Copy the whole checkpoint.")
        self._handles: dict[str, int] = {}

    def __enter__(self) -> StoredWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def read(self, tensor: StoredTensor, first: int, into: torch.Tensor) -> torch.Tensor:
        """Values of a tensor from number `first` on, as many as `into`, a buffer of its dtype, still has room for."""
        count = min(len(into), tensor.numel - first)
        width = into.element_size()
        part = into[:count]
        view = bytes_of(part)
        done, start = 0, tensor.begin + first * width
        while done < len(view):
            read = os.preadv(self._handle(tensor.file), [view[done:]], start + done)
            if not read:
                raise ValueError(f"{self.folder / tensor.file}: ends within {tensor.name}; it was changed meanwhile.")
            done += read
        return part

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """A floating-point tensor in pieces of float64, (values,), in one buffer that each piece overwrites."""
        tensor = self.tensors[name]
        own = torch.empty(PIECE, dtype=FLOATS[tensor.dtype])
        wide = torch.empty(PIECE, dtype=torch.float64)
        for first in range(0, tensor.numel, PIECE):
            part = self.read(tensor, first, own)
            yield wide[: len(part)].copy_(part)

    def raw(self, name: str) -> bytes:
        """The bytes of a tensor of any type."""
        tensor = self.tensors[name]
        return os.pread(self._handle(tensor.file), tensor.end - tensor.begin, tensor.begin)

    def _handle(self, file: str) -> int:
        if file not in self._handles:
            self._handles[file] = os.open(self.folder / file, os.O_RDONLY)
        return self._handles[file]
