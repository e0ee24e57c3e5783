# SPDX-License-Identifier: Apache-2.0
"""A model's weights in 4 bits, the experts too: what they take, how they are made so, and how it is undone.

`BitsAndBytesConfig(load_in_4bit=True)` replaces linear layers only. transformers 5 keeps all experts of a layer in one
three-dimensional parameter, which therefore stays as it is (bitsandbytes #1849): 95 % of Qwen3-30B-A3B. bitsandbytes
can put such parameters behind a parametrisation (`replace_parameter_4bit`), which does not go with peft 0.21.2:
adapters with names that end alike in all layers are left out, and others are added once more in every pass. Its
`Linear4bit` passes no gradient any more, on CPUs with AVX512-BF16, once it was evaluated.

Here the parameters become `FourBit` tensors, and modules, names and adapters stay what they are. Routers, embeddings
with the control tokens' rows, norms and biases are left in the precision they were loaded in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from thinkfusion.four_bit import BLOCK, MOST_VALUES, FourBit, packed_bytes
from thinkfusion.moe import KINDS, bare, parameter_kinds
from thinkfusion.trainable import CHOOSING

QUANTISED_KINDS = ("attention", "experts", "shared_experts", "dense")
FEWEST_ROWS = 16
"""Linear layers with a shorter side (gates of shared experts) save nothing, and decide much."""


@dataclass(frozen=True)
class Size:
    """Of a model's parameters of one kind."""

    parameters: int
    quantised: int
    """Of these, those in 4 bits."""
    quantised_bytes: int
    other_bytes: int


@dataclass(frozen=True)
class Sizes:
    """What the weights of a model take, by kind of parameter (`thinkfusion.moe.KINDS`). Adapters are not counted."""

    kinds: dict[str, Size]
    other: str
    """The precision of the rest, "bf16" or "float32"."""

    @property
    def parameters(self) -> int:
        return sum(each.parameters for each in self.kinds.values())

    @property
    def quantised(self) -> int:
        return sum(each.quantised for each in self.kinds.values())

    @property
    def quantised_bytes(self) -> int:
        return sum(each.quantised_bytes for each in self.kinds.values())

    @property
    def other_bytes(self) -> int:
        return sum(each.other_bytes for each in self.kinds.values())

    @property
    def bytes(self) -> int:
        return self.quantised_bytes + self.other_bytes

    def __str__(self) -> str:
        left = self.parameters - self.quantised
        whole = [name for name, each in self.kinds.items() if each.parameters and not each.quantised]
        packed = f"{count(self.quantised)} of {count(self.parameters)} parameters, {gigabytes(self.quantised_bytes)}"
        return (
            f"4-bit: {packed}; {self.other}: {count(left)}, {gigabytes(self.other_bytes)} "
            f"({', '.join(name.replace('_', ' ') for name in whole)})."
        )


def count(parameters: int) -> str:
    """Three digits and a unit: "30.5 B"."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("thousand", 1e3)):
        if parameters >= size:
            return f"{parameters / size:.3g} {unit}"
    return str(parameters)


def gigabytes(size: float) -> str:
    """Three digits, in GB of 10^9 bytes (or MB): "17.1 GB"."""
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"


def quantisable(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the parameters that can be in 4 bits: weights of linear layers, and experts, (experts, …, …)."""
    kinds, modules = parameter_kinds(model), dict(model.named_modules())
    # The fused kernels of state spaces read the weights of their linear layers themselves.
    fused = [name for name, module in modules.items() if "Mamba" in type(module).__name__]
    matrices, experts = [], []
    for name, parameter in model.named_parameters():
        owner, _, own = name.rpartition(".")
        if kinds[name] not in QUANTISED_KINDS or CHOOSING in name or any(owner.startswith(f"{at}.") for at in fused):
            continue
        if type(modules[owner]) is nn.Linear and own == "weight" and min(parameter.shape) >= FEWEST_ROWS:
            matrices.append(name)
        elif kinds[name] == "experts" and parameter.dim() == 3:
            experts.append(name)
    return matrices, experts


def planned_sizes(model: nn.Module, *, matrices: bool = True, experts: bool = True, bf16: bool = True) -> Sizes:
    """What a model, usually on `meta`, takes if its linear layers, and its experts, are quantised."""
    possible = quantisable(model)
    chosen = {name for names, wanted in zip(possible, (matrices, experts), strict=True) if wanted for name in names}
    found = [
        (kind, parameter.numel(), packed_bytes(parameter.numel()) if name in chosen else None)
        for name, kind in parameter_kinds(model).items()
        for parameter in [model.get_parameter(name)]
    ]
    return _sizes(found, 2 if bf16 else 4)


def measured_sizes(model: nn.Module) -> Sizes:
    """What the weights of a model take as they are, counted tensor by tensor; adapters are left out."""
    kinds = parameter_kinds(model)
    found, widths = [], []
    for name, parameter in model.named_parameters():
        if any(mark in name for mark in ("lora_", "token_adapter", "modules_to_save")):
            continue
        size = parameter.packed_bytes if isinstance(parameter, FourBit) else None
        widths += [parameter.element_size()] * (size is None and parameter.dim() > 1)
        found.append((kinds[name], parameter.numel(), size))
    return _sizes(found, max(widths, default=2))


def _sizes(found: list[tuple[str, int, int | None]], width: int) -> Sizes:
    """Of the kind, the number of values and the bytes in 4 bits (None: it is not) of each parameter."""
    kinds = {}
    for kind in KINDS:
        own = [(values, size) for each, values, size in found if each == kind]
        if own:
            kinds[kind] = Size(
                parameters=sum(values for values, _ in own),
                quantised=sum(values for values, size in own if size is not None),
                quantised_bytes=sum(size for _, size in own if size is not None),
                other_bytes=width * sum(values for values, size in own if size is None),
            )
    return Sizes(kinds, "bf16" if width == 2 else "float32")


# What is installed, tried


def why_no_matrices() -> str | None:
    """Why linear layers cannot be quantised here; None if they can."""
    return None if _bitsandbytes() else "bitsandbytes is not installed or cannot be imported"


def why_no_experts() -> str | None:
    """Why three-dimensional parameters cannot be quantised here; None if they can, which is tried on a small one."""
    if not _bitsandbytes():
        return why_no_matrices()
    values = torch.randn(2, BLOCK, BLOCK, generator=torch.Generator().manual_seed(0))
    inputs = torch.ones(1, BLOCK, requires_grad=True)
    try:
        tried = FourBit.of(values)
        (gradient,) = torch.autograd.grad(torch.matmul(inputs, tried).sum(), inputs)
        # NF4 is off by 0.09 of the spread of random numbers.
        kept = bool((tried - values).std() < 0.2 * values.std()) and bool((tried[1] == tried.whole()[1]).all())
    except (ImportError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        return f"the installed bitsandbytes cannot quantise them ({(str(error).splitlines() or [''])[0]})"
    return None if kept and bool(gradient.any()) else "the installed bitsandbytes does not give them back as they were"


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError):
        return None
    return bitsandbytes


# There and back


def quantise(model: Any, device: str | torch.device = "cpu") -> None:
    """Put the linear layers and the experts of a model into 4 bits, in place, and all of it onto `device`.

    A weight at a time, so that the device never holds the whole model. All parameters are frozen: 4-bit weights cannot
    train, and adapters are what does. Raises ValueError for a tensor that is too large for bitsandbytes.
    """
    names = [name for group in quantisable(model) for name in group]
    for name in names:
        if (size := model.get_parameter(name).numel()) > MOST_VALUES:
            raise ValueError(
                f"quantise: found {size:,} values in {name}, expected at most {MOST_VALUES:,}: bitsandbytes counts in "
                "32 bits. Train LoRA in bf16, sharded: --load_in_4bit false."
            )
    model.requires_grad_(False)
    for name in names:
        values = model.get_parameter(name).data.to(device)
        _replace(model, name, FourBit.of(values))
    model.to(torch.device(device))
    # Every process has made the same, and DistributedDataParallel would write what it sends into them.
    model._ddp_params_and_buffers_to_ignore = _Names(model)


class _Names:
    """Names of a model's 4-bit parameters at the time they are read, with and without the prefix of peft's wrapper."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __iter__(self) -> Iterator[str]:
        for name, _ in _quantised(self.model):
            yield from (name, f"base_model.model.{name}")


def _replace(model: nn.Module, name: str, values: torch.Tensor) -> None:
    """Put another parameter, frozen, into the place of one; wherever it is tied to as well."""
    old, new = model.get_parameter(name), nn.Parameter(values, requires_grad=False)
    for module in model.modules():
        for own, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[own] = new


def is_quantised(model: Any) -> bool:
    """Whether `quantise` put parameters of this model into 4 bits; adapters may be on it."""
    return any(True for _ in _quantised(bare(model)))


def _quantised(model: nn.Module) -> Iterator[tuple[str, FourBit]]:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, FourBit):
            yield name, parameter


def dequantise(model: Any) -> None:
    """Undo `quantise`, in place: the weights are those that the 4-bit model computes with; all of it is on the CPU.

    Adapters stay on it, and can then be merged without being rounded away.
    """
    for name, parameter in list(_quantised(model)):
        _replace(model, name, parameter.whole().cpu())
    model.to("cpu")
