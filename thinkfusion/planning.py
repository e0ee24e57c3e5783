# SPDX-License-Identifier: Apache-2.0
"""What training takes of a device's memory, told from a configuration before anything is loaded.

The model is built on the device `meta`, where tensors have shapes and no contents. Weights, gradients and optimizer
are counted from its parameters; activations by a forward pass on `meta` that notes every tensor kept for the backward
pass.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from thinkfusion.checkpointing import TINY_BASE, tiny_base_path
from thinkfusion.moe import MoEDescription, bare, describe_moe, meta_model
from thinkfusion.quantising import planned_sizes

if TYPE_CHECKING:
    from collections.abc import Iterator

METHODS = ("full", "lora")
STRATEGIES = ("ddp", "fsdp2", "deepspeed_zero3")
"""In the order in which they are preferred: the simplest that fits is chosen."""
LAYOUTS = ("tree", "packed", "padded")
GIB = 2**30
USABLE = 0.92
"""Share of a device's memory that may be planned for; the rest is the driver's, the libraries' and fragmentation."""
LOSS_CHUNK = 256
"""Tokens whose logits exist at a time: TRL computes the loss in such chunks."""
LIVE_PARAMETERS = 1_000_000_000
"""Parameters that ZeRO-3 keeps gathered at most (its `stage3_max_live_parameters`)."""
MOST_GPUS = 4096
ATTENTION = "thinkfusion_planned"


@dataclass(frozen=True)
class Setup:
    """What is to be trained, on what."""

    method: str = "full"
    gpus: int = 8
    gpu_memory: float = 80.0
    """GiB of a device."""
    sequence_length: int = 4096
    """Tokens of a row: `tokens_per_row` of the layouts tree and packed, the longest sequence of padded."""
    layout: str = "tree"
    batch_size: int = 1
    """Rows of a device at a time (`per_device_train_batch_size`)."""
    lora_r: int = 16
    bf16: bool = True
    gradient_checkpointing: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (("method", METHODS), ("layout", LAYOUTS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {getattr(self, name)!r} is unknown; choose one of {', '.join(allowed)}.")
        for name in ("gpus", "sequence_length", "batch_size", "lora_r"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected at least 1.")
        if not 0 < self.gpu_memory < math.inf:
            raise ValueError(f"gpu_memory: found {self.gpu_memory}, expected GiB above 0.")


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
    traced: bool
    """Whether activations were traced on `meta`; else they follow from the sizes of the matrices."""
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
            "activations_traced": self.traced,
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
    kept, outside, traced = _kept(model, description, setup)
    peaks = [2 * own for own in kept]
    if setup.method == "lora":
        model = adapted_model(model, setup)
        extra = _kept_by_adapters(model, setup)
        kept = [own + more for own, (more, _) in zip(kept, extra, strict=True)]
        peaks = [own + more for own, (_, more) in zip(peaks, extra, strict=True)]
    sizes = measure_sizes(model, setup)
    activations = _activations(bare(model).config.get_text_config(), kept, peaks, outside, setup)
    memory = {name: _memory(name, sizes, activations, setup.gpus) for name in STRATEGIES}
    plan = MemoryPlan(description, setup, sizes, memory, traced, four_bit)
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


def decoder_layers(model: Any) -> list[Any]:
    """The decoder layers of a model, with adapters or without; the longest list of modules nearest to the top."""
    from torch import nn

    lists = [
        (name.count("."), list(module)) for name, module in bare(model).named_modules() if type(module) is nn.ModuleList
    ]
    if not lists:
        return []
    top = min(depth for depth, _ in lists)
    return max((modules for depth, modules in lists if depth == top), key=len)


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


def _kept(model: Any, description: MoEDescription, setup: Setup) -> tuple[list[int], int, bool]:
    """What `trace_layers` finds, or else a formula's figures; and whether it was traced."""
    try:
        return *trace_layers(model, setup), True
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, IndexError):
        return _kept_by_formula(model, description, setup), 0, False


def _kept_by_adapters(model: Any, setup: Setup) -> list[tuple[int, int]]:
    """Bytes that the adapters of each decoder layer keep for its backward pass, and their most during it.

    An adapted linear layer keeps its input and the narrow product. Adapted experts (a parameter, not a module) are
    made whole: the weight with its adapter multiplied out, which the multiplication keeps. The backward pass makes
    the gradient of one of them at a time, and then drops both.
    """
    tokens, size = setup.batch_size * setup.sequence_length, 2 if setup.bf16 else 4
    kept = []
    for layer in decoder_layers(model):
        adapted = [module for module in layer.modules() if hasattr(module, "lora_A")]
        whole = [size * module.get_param().numel() for module in adapted if hasattr(module, "parameter_name")]
        narrow = sum(
            tokens * size * sum(each.weight.shape)
            for module in adapted
            if not hasattr(module, "parameter_name")
            for each in module.lora_A.values()
        )
        most = max(sum(whole) + min(whole), 2 * max(whole)) if whole else 0
        kept.append((sum(whole) + narrow, most + narrow))
    return kept


def _activations(config: Any, kept: Sequence[int], peaks: Sequence[int], outside: int, setup: Setup) -> int:
    """Bytes at the height of a step, of what each decoder layer keeps, and of its most in the backward pass.

    With gradient checkpointing, the inputs of all layers and the most of one layer. The gradients that are under way
    are taken to be as large as what a layer keeps. The loss adds a chunk's logits, their exponentials and their
    gradients, and the gradient of the last hidden states.
    """
    tokens, size = setup.batch_size * setup.sequence_length, 2 if setup.bf16 else 4
    loss = 3 * 4 * min(tokens, LOSS_CHUNK) * config.vocab_size + 4 * tokens * config.hidden_size
    under_way = max((peak - own for peak, own in zip(peaks, kept, strict=True)), default=0)
    if setup.gradient_checkpointing:
        stored = len(kept) * size * tokens * config.hidden_size + max(peaks, default=0)
    else:
        stored = sum(kept) + under_way
    return int(stored + outside + loss)


def trace_layers(model: Any, setup: Setup) -> tuple[list[int], int]:
    """Bytes that each decoder layer keeps for its backward pass, and all outside of them, parameters not counted.

    A forward pass on `meta`, in bfloat16, since grouped_mm knows no other there; float32 takes twice as much. Attention
    keeps queries, keys, values and its output, as fused kernels do.
    """
    import torch

    _compute_in(model, torch.bfloat16)
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    held: dict[int, Any] = {}  # keeps storages alive, so that no two have one address
    kept, current = [0] * len(decoder_layers(model)), -1
    outside = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal outside
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in held:
            held[storage._cdata] = storage
            if current < 0:
                outside += storage.nbytes()
            else:
                kept[current] += storage.nbytes()
        return tensor

    def enter(number: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            nonlocal current
            current = number

        return hook

    layers = decoder_layers(model)
    handles = [layer.register_forward_pre_hook(enter(number)) for number, layer in enumerate(layers)]
    handles += [layer.register_forward_hook(enter(-1)) for layer in layers]
    shape = (setup.batch_size, setup.sequence_length)
    try:
        with _planned_attention(model), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            ids = torch.zeros(shape, dtype=torch.long, device="meta")
            positions = torch.arange(shape[1], device="meta").expand(shape)
            embedded = model.get_input_embeddings()(ids).requires_grad_()
            # With a mask, transformers does not look into the positions for packed sequences.
            mask = torch.ones(shape, dtype=torch.long, device="meta")
            model.get_decoder()(inputs_embeds=embedded, attention_mask=mask, position_ids=positions, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    factor = 1 if setup.bf16 else 2
    return [factor * own for own in kept], factor * outside


def _compute_in(model: Any, dtype: Any) -> None:
    """Cast the weights to what they are multiplied in. On `meta` this moves nothing."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


@contextmanager
def _planned_attention(model: Any) -> Iterator[None]:
    """Attention that computes nothing and keeps what a fused kernel would."""
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Any, key: Any, value: Any) -> Any:
            batch, heads, length, _ = query.shape
            output = query.new_empty((batch, length, heads, value.shape[-1]))
            ctx.save_for_backward(query, key, value, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            raise AssertionError("nothing is computed on meta")

    def attend(module: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> tuple[Any, None]:
        return cast(Any, Fused).apply(query, key, value), None

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)
    given = [getattr(module, "config", None) for module in model.modules()]
    configs = list({id(config): config for config in given if isinstance(config, PretrainedConfig)}.values())
    before = [(config, config._attn_implementation) for config in configs]
    for config in configs:
        config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


def _kept_by_formula(model: Any, description: MoEDescription, setup: Setup) -> list[int]:
    """Inputs and outputs of every matrix that a token passes: for layers that do not run on `meta`."""
    share = description.top_k / description.num_experts if description.num_experts else 1.0
    kept = []
    for layer in decoder_layers(model):
        width = 0.0
        for parameter in layer.parameters():
            if parameter.dim() == 2:
                width += sum(parameter.shape)
            elif parameter.dim() == 3 and parameter.shape[0] == description.num_experts:
                width += share * parameter.shape[0] * sum(parameter.shape[1:])
        kept.append(round(width * setup.batch_size * setup.sequence_length * (2 if setup.bf16 else 4)))
    return kept


def _remarks(plan: MemoryPlan) -> Iterator[str]:
    setup, chosen = plan.setup, plan.chosen
    if plan.description.dense:
        yield "The model is dense: there is no expert to shard or to adapt."
    if not plan.traced:
        yield "The layers do not run without weights, so activations are told from the sizes of their matrices."
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
