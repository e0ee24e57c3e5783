# SPDX-License-Identifier: Apache-2.0
"""What training takes of a device's memory, told from a configuration before anything is loaded.

The model is built on the device `meta`, where tensors have shapes and no contents. Weights, gradients and optimizer
are counted from its parameters; activations by a forward pass on `meta` that notes every tensor kept for the backward
pass.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from thinkfusion.activations import Setup, decoder_layers, kept_by_adapters, kept_by_layers, peak_activations
from thinkfusion.checkpointing import TINY_BASE, tiny_base_path
from thinkfusion.moe import MoEDescription, bare, describe_moe, meta_model
from thinkfusion.quantising import planned_sizes

STRATEGIES = ("ddp", "fsdp2", "deepspeed_zero3")
"""In the order in which they are preferred: the simplest that fits is chosen."""
GIB = 2**30
USABLE = 0.92
"""Share of a device's memory that may be planned for; the rest is the driver's, the libraries' and fragmentation."""
LIVE_PARAMETERS = 1_000_000_000
"""Parameters that ZeRO-3 keeps gathered at most (its `stage3_max_live_parameters`)."""
MOST_GPUS = 4096


@dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    """What sharding gathers for a while, and DDP's copy of the gradients."""

    @property
    def state(self) -> int:
        """Weights, gradients and optimizer."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return self.state + self.activations + self.buffers


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model, and bytes of a parameter."""

    trained: int
    frozen: int
    largest_layer: int
    """Parameters of the largest decoder layer."""
    outside: int
    """Parameters that belong to no decoder layer: embeddings, output head, last norm."""
    frozen_bytes: int
    compute_bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of one device under each strategy, and what fits."""

    description: MoEDescription
    setup: Setup
    sizes: Sizes
    memory: dict[str, Memory]
    """Of each of `STRATEGIES`."""
    untraced: str = ""
    """Why activations could not be traced on `meta` and follow from the sizes of the matrices; empty if they were."""
    four_bit_bytes: int | None = None
    """What the frozen weights take under LoRA with `load_in_4bit`; None in full fine-tuning."""
    remarks: tuple[str, ...] = ()

    def fits(self, strategy: str) -> bool:
        return self.memory[strategy].total <= USABLE * self.setup.gpu_memory * GIB

    @property
    def chosen(self) -> str | None:
        """The simplest strategy that fits; None if none does."""
        return next((each for each in STRATEGIES if self.fits(each)), None)

    def to_dict(self) -> dict[str, Any]:
        description = {key: value for key, value in self.description.to_dict().items() if key != "layers"}
        return {
            "model": {**description, "moe_layers": len(self.description.layers)},
            "setup": asdict(self.setup),
            "trained_parameters": self.sizes.trained,
            "frozen_parameters": self.sizes.frozen,
            "bytes_per_device": {
                name: {**asdict(memory), "total": memory.total, "fits": self.fits(name)}
                for name, memory in self.memory.items()
            },
            "chosen": self.chosen,
            "four_bit_bytes": self.four_bit_bytes,
            "activations_traced": not self.untraced,
            "remarks": list(self.remarks),
        }

    def __str__(self) -> str:
        setup = self.setup
        columns = ("weights", "gradients", "optimizer", "activations", "buffers", "total")
        lines = [
            str(self.description),
            "",
            f"{setup.method}, {self.sizes.trained:,} parameters trained, {setup.batch_size} x "
            f"{setup.sequence_length:,} tokens ({setup.layout}) on each of {setup.gpus} devices of "
            f"{setup.gpu_memory:g} GiB, in GiB per device:",
            f"{'':<16}" + "".join(f"{name:>12}" for name in columns),
        ]
        for name, memory in self.memory.items():
            figures = "".join(f"{getattr(memory, column) / GIB:>12.2f}" for column in columns)
            lines.append(f"{name:<16}{figures}  {'fits' if self.fits(name) else 'too large'}")
        return "\n".join([*lines, *(f"- {remark}" for remark in self.remarks)])


def read_config(name: str | Path, *, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """The configuration of a model: a checkpoint's folder, a config.json, `tiny-base` or a Hub id.

    Raises FileNotFoundError if there is none, ValueError if it is of a family that transformers does not know.
    """
    from transformers import AutoConfig

    path = tiny_base_path() if str(name) == TINY_BASE else Path(name)
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        given = _read_json(file)
        family = given.get("model_type")
        if "auto_map" in given and trust_remote_code:
            return AutoConfig.from_pretrained(str(file.parent), trust_remote_code=True)
        if not isinstance(family, str):
            raise ValueError(f"{file}: there is no model_type in it, so it is no model's configuration.")
        try:
            return AutoConfig.for_model(**given)
        except (ValueError, KeyError) as error:
            if "model identifier" not in str(error):
                raise ValueError(f"{file}: {str(error).splitlines()[0]}") from None
            raise ValueError(
                f"{file}: the family {family!r} (model_type) is unknown to the installed transformers. Update it, or "
                "pass --trust_remote_code if code comes with the checkpoint."
            ) from None
    if path.exists() or path.is_absolute() or str(name).startswith(".") or len(path.parts) != 2:
        raise FileNotFoundError(f"{name}: found no config.json; name a folder that has one, the file, or a Hub id.")
    try:
        return AutoConfig.from_pretrained(str(name), revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise FileNotFoundError(f"{name}: its configuration could not be read ({reason}).") from None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: this is not JSON ({error}).") from None
    if not isinstance(given, dict):
        raise ValueError(f"{file}: found a {type(given).__name__}, expected an object: the configuration of a model.")
    return given


def plan_memory(config: Any, setup: Setup) -> MemoryPlan:
    """The memory that training a model of this configuration takes.

    Full fine-tuning keeps weights, gradients and AdamW's two averages in float32 (16 bytes a parameter); under bf16,
    matrices are multiplied in copies of bfloat16. LoRA keeps what is frozen in bfloat16 (float32 without bf16) and its
    adapters in float32. Raises ValueError for a family without a causal language model.
    """
    model = meta_model(config)
    description = describe_moe(model)
    four_bit = planned_sizes(model, bf16=setup.bf16).bytes if setup.method == "lora" else None
    kept, outside, untraced = kept_by_layers(model, description, setup)
    peaks = [2 * own for own in kept]
    if setup.method == "lora":
        model = adapted_model(model, setup)
        extra = kept_by_adapters(model, setup)
        kept = [own + more for own, (more, _) in zip(kept, extra, strict=True)]
        peaks = [own + more for own, (_, more) in zip(peaks, extra, strict=True)]
    sizes = measure_sizes(model, setup)
    activations = peak_activations(bare(model).config.get_text_config(), kept, peaks, outside, setup)
    memory = {name: _memory(name, sizes, activations, setup.gpus) for name in STRATEGIES}
    plan = MemoryPlan(description, setup, sizes, memory, untraced, four_bit)
    return replace(plan, remarks=tuple(_remarks(plan)))


def adapted_model(model: Any, setup: Setup) -> Any:
    """The model with the adapters that `lora_config` would give it; the control tokens' few rows are left out."""
    from peft import get_peft_model

    from thinkfusion.trainable import lora_config

    return get_peft_model(model, lora_config(model, r=setup.lora_r), low_cpu_mem_usage=True)


def measure_sizes(model: Any, setup: Setup) -> Sizes:
    """Count the parameters of a model (or of one with adapters); tied ones once."""
    layers = decoder_layers(model)
    inside = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    total = sum(parameter.numel() for parameter in model.parameters())
    full = setup.method == "full"
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Sizes(
        trained=trained,
        frozen=total - trained,
        largest_layer=max(inside, default=0),
        outside=total - sum(inside),
        frozen_bytes=2 if setup.bf16 and not full else 4,
        compute_bytes=2 if setup.bf16 else 4,
    )


def _memory(strategy: str, sizes: Sizes, activations: int, gpus: int) -> Memory:
    """The memory of a device; sharded parts are split evenly."""
    trained, frozen = sizes.trained, sizes.frozen
    gathered = 2 * sizes.largest_layer + sizes.outside
    if strategy == "ddp":
        # Autocast keeps its copies of trained matrices until the backward pass has used them. Of several processes,
        # each has a second copy of the gradients in DDP's buckets.
        copies = sizes.compute_bytes * trained if sizes.compute_bytes == 2 else 0
        buckets = 4 * trained if gpus > 1 else 0
        weights = 4 * trained + sizes.frozen_bytes * frozen
        return Memory(weights, 4 * trained, 8 * trained, activations, copies + buckets)
    share = 1 / gpus
    if strategy == "fsdp2":
        # The layer that computes and the next one are whole, and the gradients of one.
        gathered_bytes = sizes.compute_bytes * (gathered + _trained_share(sizes, sizes.largest_layer))
        weights = math.ceil(share * (4 * trained + sizes.frozen_bytes * frozen))
        return Memory(
            weights, math.ceil(share * 4 * trained), math.ceil(share * 8 * trained), activations, gathered_bytes
        )
    # DeepSpeed holds all weights and gradients in the precision it computes in, and float32 masters of trained ones
    # in the optimizer.
    live = max(min(LIVE_PARAMETERS, trained + frozen), sizes.largest_layer)
    return Memory(
        weights=math.ceil(share * sizes.compute_bytes * (trained + frozen)),
        gradients=math.ceil(share * sizes.compute_bytes * trained),
        optimizer=math.ceil(share * 12 * trained),
        activations=activations,
        buffers=sizes.compute_bytes * (live + _trained_share(sizes, sizes.largest_layer)),
    )


def _trained_share(sizes: Sizes, parameters: int) -> int:
    return parameters * sizes.trained // max(sizes.trained + sizes.frozen, 1)


def _remarks(plan: MemoryPlan) -> Iterator[str]:
    setup, chosen = plan.setup, plan.chosen
    if plan.description.dense:
        yield "The model is dense: there is no expert to shard or to adapt."
    if plan.untraced:
        yield (
            f"The layers do not run without weights ({plan.untraced}), so activations are told from the sizes of their "
            "matrices."
        )
    if setup.method == "lora" and not plan.description.dense:
        yield (
            "Adapters of experts are multiplied out to whole experts in each pass (peft's target_parameters); the "
            "activations contain this."
        )
    if plan.four_bit_bytes is not None:
        yield (
            f"In 4 bits (--load_in_4bit true, ddp only) the frozen weights take {plan.four_bit_bytes / GIB:.2f} GiB of "
            f"each device in place of {plan.sizes.frozen_bytes * plan.sizes.frozen / GIB:.2f}."
        )
    if chosen is not None:
        yield f"Use {chosen}: recipes/accelerate/{chosen}.yaml, or --write-accelerate-config FILE for this family."
        return
    needed = gpus_needed(plan)
    largest = f"{max(memory.total for memory in plan.memory.values()) / GIB:,.0f}"
    lowest = f"{min(memory.total for memory in plan.memory.values()) / GIB:,.0f}"
    yield f"Nothing fits: {lowest} to {largest} GiB per device, of which {setup.gpu_memory * USABLE:.0f} are usable."
    if needed is not None:
        yield f"fsdp2 fits on {needed} such devices."
    options: Sequence[tuple[bool, str]] = (
        (setup.method == "full", "--method lora"),
        (not setup.gradient_checkpointing, "gradient checkpointing"),
        (setup.sequence_length > 1024, "a shorter --sequence-length"),
        (setup.batch_size > 1, "a smaller --batch-size"),
    )
    tried = [text for possible, text in options if possible]
    if tried:
        yield f"Otherwise try {', '.join(tried)}."


def gpus_needed(plan: MemoryPlan) -> int | None:
    """The smallest power of two of devices on which FSDP2 fits; None if no number of them does."""
    gpus = 1
    while gpus <= MOST_GPUS:
        memory = _memory("fsdp2", plan.sizes, plan.memory["fsdp2"].activations, gpus)
        if memory.total <= USABLE * plan.setup.gpu_memory * GIB:
            return gpus
        gpus *= 2
    return None
