# SPDX-License-Identifier: Apache-2.0
"""LoRA on weights in 4 bits: loading a checkpoint so that all that can be in 4 bits is, or saying what would not be.

What the installed libraries can do is tried before anything is loaded. A model whose experts would stay as they are is
refused, with the memory that it would really take.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkfusion.activations import Setup
from thinkfusion.checkpointing import load_checkpoint
from thinkfusion.moe import meta_model
from thinkfusion.planning import gpus_needed, plan_memory, read_config
from thinkfusion.quantising import (
    Sizes,
    count,
    gigabytes,
    measured_sizes,
    planned_sizes,
    quantisable,
    quantise,
    why_no_experts,
    why_no_matrices,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

EXTRA = "pip install 'thinkfusion[quantise]'"
GPU_MEMORY = 80.0
"""GiB of the devices that alternatives are told for."""
SHARDED = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
USABLE = 0.9


def load_in_4bit(
    name: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model, its linear layers and experts in 4 bits, for training with LoRA; and its tokenizer.

    The weights pass through the CPU's memory in `dtype`; `device` gets them in 4 bits, one by one. One line of the log
    says how much really is in 4 bits. See `thinkfusion.quantising` for what is not.

    Raises ValueError if the installed libraries cannot quantise the model's experts or anything at all (it names the
    memory that it would take, and what to do), for a checkpoint that is quantised already, and under FSDP or DeepSpeed;
    and what `load_checkpoint` raises.
    """
    sharded = next((variable for variable in SHARDED if os.environ.get(variable) == "true"), None)
    if sharded is not None:
        raise ValueError(
            f"load_in_4bit: found {sharded}=true, and weights in 4 bits are not sharded. Start it without FSDP and "
            "DeepSpeed (each process then has a model of its own), or leave load_in_4bit out."
        )
    # An adapter's folder has no configuration of its own; what is loaded is checked below.
    if not (Path(name) / "adapter_config.json").is_file():
        config = read_config(name, trust_remote_code=trust_remote_code, revision=revision)
        given = getattr(config, "quantization_config", None)
        if given is not None:
            method = dict(given).get("quant_method") if isinstance(given, dict) else given.quant_method
            raise ValueError(
                f"{name}: load_in_4bit: found a checkpoint that is quantised already ({method}), expected one in bf16 "
                "or float32. Name one of these."
            )
        check_4bit(meta_model(config), str(name), bf16=dtype != "float32")
    model, tokenizer = load_checkpoint(name, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code)
    check_4bit(model, str(name), bf16=dtype != "float32")
    quantise(model, device)
    logger.info("%s: %s", name, measured_sizes(model))
    return model, tokenizer


def check_4bit(model: Any, name: str, *, bf16: bool = True) -> None:
    """Raise ValueError if what can be in 4 bits of this model, usually on `meta`, cannot be with what is installed."""
    matrices, experts = quantisable(model)
    why = why_no_matrices() or (why_no_experts() if experts else None)
    if not matrices and not experts:
        raise ValueError(
            f"{name}: load_in_4bit: found no linear layer and no experts to put into 4 bits. Leave it out."
        )
    if why is None:
        return
    wanted = planned_sizes(model, bf16=bf16)
    real = planned_sizes(model, matrices=why_no_matrices() is None, experts=False, bf16=bf16)
    raise ValueError(_refusal(name, why, wanted, real, model.config))


def _refusal(name: str, why: str, wanted: Sizes, real: Sizes, config: Any) -> str:
    experts = real.kinds.get("experts")
    left = f"all {count(real.parameters)} parameters"
    if real.quantised and experts is not None:
        left = f"the experts, {count(experts.parameters)} of {count(real.parameters)} parameters,"
    return (
        f"{name}: 4 bits were asked for, {gigabytes(wanted.bytes)}; but {left} would stay in {real.other}, "
        f"{gigabytes(real.bytes)} in all: {why}. What to do: {EXTRA} (bitsandbytes 0.50.2 can)"
        f"{_sharded(config)}; or take a smaller model. Freezing experts (train_experts: false) saves their adapters, "
        "not their weights."
    )


def _sharded(config: Any) -> str:
    """How many devices LoRA in bf16 takes when it is sharded, if the model can be planned for."""
    plan = plan_memory(config, Setup("lora", gpus=1, gpu_memory=GPU_MEMORY))
    needed = gpus_needed(plan)
    if needed is None:
        return ""
    devices = f"{needed} devices" if needed > 1 else "one device"
    return (
        f"; or leave load_in_4bit out and train LoRA in bf16 with FSDP2, which takes {devices} of {GPU_MEMORY:g} GiB "
        f"for rows of {plan.setup.sequence_length:,} tokens (recipes/accelerate/fsdp2.yaml)"
    )


def place(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Put a model onto a device for generation; in 4 bits, with a remark, if it does not fit as it is."""
    size = sum(parameter.nbytes for parameter in model.parameters())
    free = _free(device)
    if free is None or size <= USABLE * free:
        model.to(device)
    else:
        logger.warning(
            "The weights take %s and %s are free: the model is put into 4 bits.", *map(gigabytes, (size, free))
        )
        quantise(model, device)
    return model


def _free(device: torch.device) -> int | None:
    """Bytes that are free on a GPU; None for any other device."""
    import torch

    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]
