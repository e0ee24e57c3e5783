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
from dataclasses import fields
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from shutil import disk_usage, rmtree
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from safetensors import safe_open
from safetensors.torch import save_file

from thinkfusion.digests import digest
from thinkfusion.mixture import MixtureOptions
from thinkfusion.quantising import is_quantised
from thinkfusion.shortening import ReasoningOptions

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Neither what transformers finds by "^checkpoint-(\d+)$" nor what it deletes by "checkpoint-*".
UNFINISHED = re.compile(r"unfinished-\d+")


ORDER_SETTINGS = (
    *(each.name for options in (MixtureOptions, ReasoningOptions) for each in fields(options) if each.name != "seed"),
    *("seed", "data_seed", "sequence_layout", "tokens_per_row", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "world_size", "train_sampling_strategy", "dataloader_drop_last"),
)
"""Settings that decide which rows there are and which of them a step trains on."""
STEP_SETTINGS = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "max_steps", "num_train_epochs", "optim", "weight_decay"),
    *("max_grad_norm", "bf16", "fp16", "mode_weights", "normalise_by_mode", "balance_loss_coef"),
    *("control_token_learning_rate", "control_token_weight", "end_of_turn_weight", "router_bias_update_rate"),
    "label_smoothing_factor",
)
"""Settings that may change at a resume; the log says so."""
_DIGESTS = ("names and shapes of parameters", "content of rows")


class SavingError(OSError):
    """A checkpoint could not be written; those that were there before are whole."""


# Whole or not ---------------------------------------------------------------------------------------------------------


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


def check_place(output_dir: Path, checkpoint_bytes: int) -> None:
    """Before a run begins: no checkpoint of another one is there, and two of its own fit, a new one beside the last.

    checkpoint_bytes: what one takes; 0 if none is to be written. Raises ValueError and SavingError.
    """
    other = last_checkpoint(output_dir)
    if other is not None:
        raise ValueError(
            f"output_dir: found {other}, of an earlier run, which checkpoints of this one would mix with and push out. "
            "Go on from it (--resume, or resume_from_checkpoint=True), or give another folder."
        )
    place = next(path for path in (output_dir.absolute(), *output_dir.absolute().parents) if path.exists())
    free, needed = disk_usage(place).free, 2 * checkpoint_bytes
    if free < needed:
        raise SavingError(
            f"output_dir: {output_dir} has {free / 1e9:,.2f} GB free, expected {needed / 1e9:,.2f} GB: a checkpoint "
            f"takes {checkpoint_bytes / 1e9:,.2f} GB, and a new one is written beside the last. Make room, give "
            "another folder, or leave the optimizer out (save_only_model)."
        )


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


# What a checkpoint belongs to -----------------------------------------------------------------------------------------


def describe_model(model: Any) -> dict[str, Any]:
    """Architecture and adapter: the sizes in the config, and a digest of all names and shapes of parameters."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    config = inner.config.get_text_config()
    sizes = {
        name: value
        for name, value in config.to_dict().items()
        if isinstance(value, int) and not isinstance(value, bool) and not name.endswith("token_id")
    }
    shapes = [(name, tuple(parameter.shape), parameter.requires_grad) for name, parameter in model.named_parameters()]
    found = {"architecture": type(inner).__name__, "4-bit": is_quantised(inner), **dict(sorted(sizes.items()))}
    for adapter in getattr(model, "peft_config", {}).values():
        chosen = ("peft_type", "r", "lora_alpha", "target_modules", "target_parameters", "modules_to_save")
        found["adapter"] = ", ".join(f"{name}={plain(getattr(adapter, name, None))}" for name in chosen)
    found["parameters"] = sum(math.prod(shape) for _, shape, _ in shapes)
    found["trained parameters"] = sum(math.prod(shape) for _, shape, trains in shapes if trains)
    return {**found, "names and shapes of parameters": hashlib.sha256(repr(sorted(shapes)).encode()).hexdigest()[:16]}


def describe_data(data: Any) -> dict[str, Any]:
    """The rows that are trained on: how many sequences and tokens, and a digest of all of them, in their order.

    `data` is a data set, or rows that hold it as `sequences`. A stream cannot be read ahead, and is only known to be
    one.
    """
    sequences = getattr(data, "sequences", data)
    if isinstance(sequences, IterableDataset):
        return {"rows": "a stream"}
    content, tokens = hashlib.sha256(), 0
    for table in sequences.with_format("arrow").iter(batch_size=4096):
        for name in ("input_ids", "labels", "mode", "conversation"):
            if name not in table.column_names:
                continue
            column = table.column(name).combine_chunks()
            if name in ("input_ids", "labels"):
                lengths = column.value_lengths().to_numpy(zero_copy_only=False)
                tokens += int(lengths.sum()) if name == "input_ids" else 0
                content.update(np.ascontiguousarray(lengths).data)
                column = column.flatten()
            content.update(np.ascontiguousarray(column.to_numpy(zero_copy_only=False)).data)
    return {"rows": len(sequences), "tokens": tokens, "content of rows": content.hexdigest()[:16]}


def differences(saved: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """What two descriptions say differently, in words; what only one of them knows does not count.

    A digest is named if nothing else tells the difference.
    """
    names = [name for name in saved if name in given and saved[name] != given[name]]
    telling = [name for name in names if name not in _DIGESTS] or names
    return [f"{name}: {saved[name]!r} in the checkpoint, {given[name]!r} now" for name in telling]


def plain(value: Any) -> Any:
    """A setting as JSON gives it back."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
