# SPDX-License-Identifier: Apache-2.0
"""What a step of training keeps for its backward pass, told from a model without weights.

A forward pass on the device `meta`, where tensors have shapes and no contents, notes every tensor that is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from thinkfusion.moe import MoEDescription, bare

METHODS = ("full", "lora")
LAYOUTS = ("tree", "packed", "padded")
LOSS_CHUNK = 256
"""Tokens whose logits exist at a time: TRL computes the loss in such chunks."""
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


def kept_by_layers(model: Any, description: MoEDescription, setup: Setup) -> tuple[list[int], int, str]:
    """What `trace_layers` finds, or else a formula's figures; and why it could not be traced, empty if it was."""
    try:
        return *trace_layers(model, setup), ""
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, IndexError) as error:
        # A family's own code may fail on `meta` in any way; a rough figure with the reason beats none.
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        return _kept_by_formula(model, description, setup), 0, reason


def kept_by_adapters(model: Any, setup: Setup) -> list[tuple[int, int]]:
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


def peak_activations(config: Any, kept: Sequence[int], peaks: Sequence[int], outside: int, setup: Setup) -> int:
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
