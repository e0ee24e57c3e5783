# SPDX-License-Identifier: Apache-2.0
"""Two LoRA adapters of one base into one, by their updates.

The update of a weight is B·A; a mean of A factors with a mean of B factors is another matrix, which no one trained.
Ranks are concatenated: [w₁·B₁ w₂·B₂]·[A₁; A₂] = w₁·B₁A₁ + w₂·B₂A₂, exactly. What an adapter holds in full, such as
the rows of control tokens, is averaged.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from thinkfusion.exporting import publish, temporary_folder
from thinkfusion.fusing import RECORD, SOURCES, TEXT_FILES, check_tokenizers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_EQUAL = ("peft_type", "task_type", "base_model_name_or_path", "revision", "trainable_token_indices", "bias")
_UNKNOWN = ("rank_pattern", "alpha_pattern", "use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens")


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter, and no whole model."""
    return (Path(folder) / CONFIG).is_file()


def fuse_adapters(
    thinking: str | Path,
    non_thinking: str | Path,
    directory: str | Path,
    ratio: float = 0.8,
    *,
    texts_from: str = "thinking",
) -> Path:
    """Write the adapter whose update is `ratio` of the thinking adapter's and the rest of the other's.

    Its rank is the sum of theirs. To get full weights, load it with `load_checkpoint` and write them with
    `export_checkpoint`. Raises ValueError for adapters of different bases, kinds or control tokens, and for variants
    of LoRA whose updates are not B·A; FileNotFoundError if one is not there. Nothing is left in `directory` then.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio: found {ratio}, expected the share of the thinking adapter, 0 to 1.")
    if texts_from not in SOURCES:
        raise ValueError(f"texts_from: {texts_from!r} is unknown; choose one of {', '.join(SOURCES)}.")
    folders = [Path(thinking), Path(non_thinking)]
    configs = [_config(folder) for folder in folders]
    _check(folders, configs)
    check_tokenizers(*folders)
    weights = [load_file(folder / WEIGHTS) for folder in folders]
    for folder, each in zip(folders, weights, strict=True):
        broken = next((name for name, tensor in each.items() if not tensor.isfinite().all()), None)
        if broken:
            raise ValueError(f"{folder / WEIGHTS}: {broken} holds values that are not finite; this adapter is broken.")
    fused = _fused(folders, weights, configs, (ratio, 1 - ratio))
    rank = sum(config["r"] for config in configs)
    config = {**configs[0], "r": rank, "lora_alpha": rank, "use_rslora": False}
    for name in ("target_modules", "target_parameters", "modules_to_save"):
        found = sorted({each for one in configs for each in one.get(name) or ()})
        config[name] = found or None
    record = {"method": "adapters", "ratio": ratio, "thinking": str(thinking), "non_thinking": str(non_thinking)}
    with temporary_folder(Path(directory)) as temporary:
        save_file(fused, temporary / WEIGHTS, metadata={"format": "pt"})
        chosen = folders[SOURCES.index(texts_from)]
        for name in TEXT_FILES:
            if (chosen / name).is_file():
                shutil.copyfile(chosen / name, temporary / name)
        for name, content in ((CONFIG, config), (RECORD, record)):
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        publish(temporary, Path(directory))
    return Path(directory)


def _config(folder: Path) -> dict[str, Any]:
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: this is no adapter: {' and '.join(missing)} missing.")
    found: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if found.get("peft_type") != "LORA":
        raise ValueError(f"{folder}: found an adapter of the type {found.get('peft_type')}, expected LORA.")
    unknown = [name for name in _UNKNOWN if found.get(name)]
    patterned = [name for name in ("target_modules", "target_parameters") if isinstance(found.get(name), str)]
    if unknown or patterned:
        name = [*unknown, *patterned][0]
        raise ValueError(
            f"{folder}: {name} is {found[name]!r}; such adapters are not fused by their factors. Merge both into "
            "their base (load_checkpoint, export_checkpoint), and fuse the checkpoints."
        )
    return found


def _check(folders: list[Path], configs: list[dict[str, Any]]) -> None:
    for name in _EQUAL:
        ours, theirs = (config.get(name) for config in configs)
        if ours != theirs:
            raise ValueError(
                f"{folders[0]} and {folders[1]}: {name} is {ours!r} and {theirs!r}. Fuse adapters of one base, with "
                "the same control tokens."
            )


def _scale(config: dict[str, Any]) -> float:
    rank = config["r"]
    return float(config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _fused(
    folders: list[Path],
    weights: list[dict[str, torch.Tensor]],
    configs: list[dict[str, Any]],
    shares: tuple[float, float],
) -> dict[str, torch.Tensor]:
    fused = {}
    for name in sorted(weights[0].keys() | weights[1].keys()):
        parts = [each.get(name) for each in weights]
        known = next(part for part in parts if part is not None)
        if ".lora_A." not in name and ".lora_B." not in name:
            if None in [part if part is None else 0 for part in parts]:
                absent = folders[[part is None for part in parts].index(True)]
                raise ValueError(f"{absent}: {name} is missing, and cannot be averaged. Train both adapters alike.")
            total = sum(share * part.double() for share, part in zip(shares, parts, strict=True) if part is not None)
            fused[name] = torch.as_tensor(total).to(known.dtype)
            continue
        ranks = [config["r"] for config in configs]
        own = ranks[next(index for index, part in enumerate(parts) if part is not None)]
        first = ".lora_A." in name
        # peft keeps the factors of E experts in one matrix: A as (E, rank, in), B as (out, rank, E).
        experts = known.shape[0 if first else 1] // own
        pieces = []
        for part, rank, share, config in zip(parts, ranks, shares, configs, strict=True):
            shape = (experts, rank, known.shape[1]) if first else (known.shape[0], rank, experts)
            if part is None:  # the other adapter alone changes this weight
                pieces.append(torch.zeros(shape, dtype=known.dtype))
            elif part.numel() != math.prod(shape):
                raise ValueError(f"{name}: found shapes that differ, {list(known.shape)} and {list(part.shape)}.")
            else:
                pieces.append(part.reshape(shape) if first else (share * _scale(config) * part.reshape(shape)))
        whole = torch.cat(pieces, dim=1)
        fused[name] = (whole.reshape(-1, known.shape[1]) if first else whole.reshape(known.shape[0], -1)).contiguous()
    return fused
