# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that survive a crash: whole or not there, without pickles, and gone on from exactly.

A checkpoint is written into a folder of another name, its manifest last, and renamed when all of it is on the disk.
The manifest names every file, with its size and digest, and the run: architecture, adapter, data, and the settings
that decide which row comes when. Older checkpoints go only after that.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import random
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Neither what transformers finds by "^checkpoint-(\d+)$" nor what it deletes by "checkpoint-*".
UNFINISHED = re.compile(r"unfinished-\d+")
_MIB = 1 << 20
_BLOCKS = 64


class SavingError(OSError):
    """A checkpoint could not be written; those that were there before are whole."""


# Whole or not ---------------------------------------------------------------------------------------------------------


def digest(path: Path) -> str:
    """SHA-256 of a file of up to 64 MiB; of 64 blocks of 1 MiB, spread evenly from first to last, of a larger one."""
    size = path.stat().st_size
    found = hashlib.sha256()
    with path.open("rb") as file:
        for index in range(_BLOCKS if size > _BLOCKS * _MIB else math.ceil(size / _MIB)):
            file.seek(index * _MIB if size <= _BLOCKS * _MIB else (size - _MIB) * index // (_BLOCKS - 1))
            found.update(file.read(_MIB))
    return found.hexdigest()


def write_manifest(folder: Path, step: int, run: Mapping[str, Any]) -> None:
    """Force the files of `folder` to the disk, and after them the manifest that tells that they are all there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    for path in files:
        _sync(path)
    manifest = {
        "manifest": 1,
        "step": step,
        "versions": {name: version(name) for name in ("thinkfusion", "transformers", "trl", "peft", "torch")},
        "run": run,
        "files": {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest(path)}
            for path in files
        },
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in (folder / MANIFEST, *(each for each in folder.rglob("*") if each.is_dir()), folder):
        _sync(path)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; ValueError if there is none that can be read."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["manifest"] != 1:
            raise ValueError
        manifest["files"].items()
    except FileNotFoundError:
        raise ValueError(f"it has no {MANIFEST}, which is written last") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"its {MANIFEST} cannot be read") from None
    return manifest


def why_incomplete(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None if it is whole: every file of its manifest, of that size and content."""
    try:
        files = read_manifest(folder)["files"]
        for name, expected in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes of {expected['bytes']:,}"
            if digest(path) != expected["sha256"]:
                return f"{name} is damaged"
    except ValueError as error:
        return str(error)
    return None


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest whole checkpoint in a folder, None if it has none; a warning names each that is left aside."""
    for folder in reversed(checkpoints(Path(output_dir))):
        reason = why_incomplete(folder)
        if reason is None:
            return str(folder)
        logger.warning("%s is left aside: %s.", folder, reason)
    return None


def checkpoints(output_dir: Path) -> list[Path]:
    """Folders with the name of a checkpoint, by their step."""
    found = output_dir.iterdir() if output_dir.is_dir() else ()
    named = [(int(match[1]), path) for path in found if (match := CHECKPOINT.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(named)]


def remove_unfinished(output_dir: Path) -> None:
    """Delete what saves that were cut off have left."""
    for path in list(output_dir.iterdir()) if output_dir.is_dir() else ():
        if UNFINISHED.fullmatch(path.name):
            logger.warning("%s was not written to its end; it is deleted.", path)
            rmtree(path, ignore_errors=True)


def put_in_place(temporary: Path, place: Path) -> None:
    """Rename a finished folder; one of the same step, which an earlier run left, makes room for it."""
    if place.exists():
        place.rename(temporary.with_name("replaced"))
    temporary.rename(place)
    _sync(place.parent)


def rotate(output_dir: Path, limit: int | None, keep: set[Path]) -> None:
    """Delete the oldest checkpoints over `limit`, none of `keep`; half a deleted one is an unfinished one."""
    if not limit or limit < 0:
        return
    there = checkpoints(output_dir)
    surplus = len(there) - max(limit, len(keep & set(there)))
    for path in [path for path in there if path not in keep][: max(surplus, 0)]:
        gone = path.with_name(f"unfinished-{path.name.removeprefix('checkpoint-')}")
        path.rename(gone)
        rmtree(gone, ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk; where folders cannot be synced, they are not."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


# States without pickles -----------------------------------------------------------------------------------------------


def save_state(path: Path, state: Any) -> None:
    """Write nested dicts, lists, tuples, numbers, strings and tensors as one safetensors file.

    Raises TypeError for anything else.
    """
    tensors: dict[str, torch.Tensor] = {}
    names: dict[int, str] = {}

    def pack(value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, torch.Tensor):
            if id(value) not in names:  # a tensor that is found twice is written once
                names[id(value)] = str(len(names))
                whole = value.untyped_storage().nbytes() == value.nbytes
                tensors[names[id(value)]] = (value if whole else value.clone()).detach().contiguous()
            return {"tensor": names[id(value)]}
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, Mapping):
            return {"dict": [[pack(key), pack(each)] for key, each in value.items()]}
        if isinstance(value, tuple):
            return {"tuple": [pack(each) for each in value]}
        if isinstance(value, list):
            return [pack(each) for each in value]
        raise TypeError(f"{path.name}: found a {type(value).__name__}, which cannot be saved without pickle.")

    structure = json.dumps(pack(state))
    save_file(tensors, path, metadata={"format": "pt", "structure": structure})


def load_state(path: Path, device: str = "cpu") -> Any:
    """What `save_state` wrote."""
    with safe_open(path, framework="pt", device=device) as file:

        def unpack(value: Any) -> Any:
            if isinstance(value, list):
                return [unpack(each) for each in value]
            if not isinstance(value, dict):
                return value
            ((kind, inside),) = value.items()
            if kind == "tensor":
                return file.get_tensor(inside)
            if kind == "dict":
                return {unpack(key): unpack(each) for key, each in inside}
            return tuple(unpack(each) for each in inside)

        return unpack(json.loads(file.metadata()["structure"]))


def random_state(all_devices: bool) -> dict[str, Any]:
    """The state of every generator that a training draws from, of this process and its accelerator (or all of them)."""
    kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.accelerator.is_available():
        module = torch.get_device_module()
        state["accelerator"] = module.get_rng_state_all() if all_devices else [module.get_rng_state()]
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Go on drawing where `random_state` was taken."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.accelerator.is_available() and "accelerator" in state:
        module = torch.get_device_module()
        if len(state["accelerator"]) > 1:
            module.set_rng_state_all(state["accelerator"])
        else:
            module.set_rng_state(state["accelerator"][0])
