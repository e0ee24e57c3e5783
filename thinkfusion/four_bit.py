# SPDX-License-Identifier: Apache-2.0
"""A tensor that lies in memory in 4 bits a value and is to all that reads it one of its shape and precision.

bitsandbytes makes the 4 bits (NF4, in blocks with a scale each, the scales in 8 bits: QLoRA's double quantisation) and
the values that they stand for. Since nothing but the parameter changes, this does for parameters of any shape, and for
any library on top.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

QUANT_TYPE = "nf4"
BLOCK = 64
"""Values that share a scale, a byte with double quantisation."""
SCALES_BLOCK = 256
"""Scales that share a scale of their own, float32."""
CODEBOOKS = 4 * (16 + 256 + 1)
"""Bytes of a tensor's codebooks, of its values and of its scales, and of the mean of the scales."""
MOST_VALUES = 2**31 - 1
"""bitsandbytes' kernels count the values of a tensor in 32 bits."""


def packed_bytes(values: int) -> int:
    """Bytes of a tensor in 4 bits with double quantisation: its values, their scales, those of the scales."""
    scales = math.ceil(values / BLOCK)
    return scales * BLOCK // 2 + scales + 4 * math.ceil(scales / SCALES_BLOCK) + CODEBOOKS


class FourBit(torch.Tensor):
    """A frozen tensor in 4 bits: to all that reads it one of its shape and precision, whose values it makes anew.

    What is computed of it is an ordinary tensor. For the backward pass a linear layer keeps the 4 bits alone. It cannot
    be changed in place.
    """

    packed: torch.Tensor
    """Two values in a byte, (values / 2, 1); the values in their order, filled up with zeros to whole blocks."""
    state: Any
    """bitsandbytes' `QuantState`: scales, codebooks, and precision of the values, as a matrix of (blocks, 64)."""

    @staticmethod
    def __new__(cls, packed: torch.Tensor, state: Any, shape: Sequence[int]) -> FourBit:
        made: FourBit = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=state.dtype, device=packed.device
        )
        made.packed, made.state = packed, state
        return made

    @classmethod
    def of(cls, values: torch.Tensor) -> FourBit:
        from bitsandbytes.functional import quantize_4bit

        # On a CPU, bitsandbytes 0.50.2 gives rows that are no whole number of blocks back with the scales of others:
        # off by 0.25 of their size where NF4 is off by 0.09. It gets rows of one block.
        flat = values.detach().reshape(-1)
        blocks = nn.functional.pad(flat, (0, -len(flat) % BLOCK)).reshape(-1, BLOCK)
        packed, state = quantize_4bit(blocks, blocksize=BLOCK, compress_statistics=True, quant_type=QUANT_TYPE)
        return cls(packed, state, values.shape)

    @property
    def packed_bytes(self) -> int:
        state = self.state
        inner = [state.offset, state.state2.absmax, state.state2.code]
        return sum(int(tensor.nbytes) for tensor in [self.packed, state.absmax, state.code, *inner])

    def whole(self) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit

        values: torch.Tensor = dequantize_4bit(self.packed, self.state)
        return values.reshape(-1)[: self.numel()].reshape(self.shape)

    def part(self, index: int) -> torch.Tensor:
        """`self[index]`, one expert, without making the others."""
        from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

        state, each = self.state, math.prod(self.shape[1:])
        if each % BLOCK:
            return self.whole()[index]
        start = index % self.shape[0] * each
        # The scales of all experts are few, one for 64 values.
        scales = dequantize_blockwise(state.absmax, state.state2).float() + state.offset
        own = QuantState(
            absmax=scales[start // BLOCK : (start + each) // BLOCK].contiguous(),
            shape=torch.Size((each // BLOCK, BLOCK)),
            code=state.code,
            blocksize=BLOCK,
            quant_type=QUANT_TYPE,
            dtype=state.dtype,
        )
        values: torch.Tensor = dequantize_4bit(self.packed[start // 2 : (start + each) // 2], own)
        return values.reshape(self.shape[1:])

    def moved(self, device: Any, dtype: torch.dtype) -> FourBit:
        """The same 4 bits on another device, or giving values of another precision."""
        state = copy.copy(self.state)
        state.state2 = copy.copy(state.state2)
        state.to(device)
        state.dtype = dtype
        return FourBit(self.packed.to(device), state, self.shape)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FourBit({tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            return _linear(*args, **(kwargs or {}))
        # What is computed is an ordinary tensor, not one of this class.
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        aten, kwargs = torch.ops.aten, kwargs or {}
        first: Any = args[0] if args else None
        if func in (aten.detach.default, aten.alias.default):
            return cls(first.packed, first.state, first.shape)
        if func is aten._to_copy.default:
            return first.moved(kwargs.get("device") or first.device, kwargs.get("dtype") or first.dtype)
        if func is aten.select.int and isinstance(first, cls) and args[1] == 0:
            return first.part(args[2])
        if func._schema.is_mutable and isinstance(first, cls):
            if func is aten.set_.source_Tensor and first is args[1]:
                return first
            raise RuntimeError(f"{func}: a tensor in 4 bits cannot be changed in place; see dequantise.")
        args, kwargs = tree_map_only(cls, cls.whole, (args, kwargs))
        return func(*args, **kwargs)


class _Linear(torch.autograd.Function):
    """A linear layer that keeps its weight in 4 bits, (out, in), and makes the values again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: FourBit, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight, ctx.dtype = weight, inputs.dtype
        return nn.functional.linear(inputs, weight.whole(), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        return (gradient @ ctx.weight.whole().to(gradient.dtype)).to(ctx.dtype), None, None


def _linear(inputs: torch.Tensor, weight: FourBit, bias: torch.Tensor | None = None) -> Any:
    return _Linear.apply(inputs, weight, bias)  # type: ignore[no-untyped-call]
