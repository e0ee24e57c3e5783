# SPDX-License-Identifier: Apache-2.0
"""Experts of a Mixture of Experts computed one after another: on a CPU the fastest way for a few large ones."""

from typing import Any

TOKENS = 64
"""Tokens of an expert that its packed weights are laid out for; any number of them can be computed."""


def choose_experts(model: Any, device: str, *, trained: bool) -> None:
    """On a CPU one expert after another is faster than the grouped product that transformers would choose.

    In float32 torch's own product packs the whole weight again in each call, most of the time where tokens are few, as
    in generating. Weights that are not `trained` any more are packed once, by oneDNN, in a second copy.
    """
    import torch
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if device != "cpu":
        return
    ALL_EXPERTS_FUNCTIONS.register("one_by_one", experts_one_by_one)
    model.set_experts_implementation("one_by_one")
    if trained or not torch.backends.mkldnn.is_available():
        return
    for module in model.modules():
        weights = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
        if all(isinstance(each, torch.Tensor) and each.dtype == torch.float32 for each in weights):
            module.packed = [[packed(expert) for expert in each] for each in weights]


def packed(weight: Any) -> Any:
    """A weight, (out, in), in the layout of oneDNN."""
    import torch

    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), TOKENS)


def product(states: Any, weight: Any) -> Any:
    """states: (tokens, in); weight: (out, in), packed or not. Returns (tokens, out)."""
    import torch

    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(states, weight, None, "none", [], "")
    return torch.nn.functional.linear(states, weight)


def experts_one_by_one(self: Any, states: Any, chosen: Any, weights: Any) -> Any:
    """transformers' own loop over experts, but for its backward pass, which fills the gradients of all for each.

    self: the module with the experts' weights, (experts, out, in). states: (tokens, width); chosen, weights: (tokens,
    top-k). Returns (tokens, width).
    """
    import torch

    ups, downs = getattr(self, "packed", None) or (self.gate_up_proj.unbind(), self.down_proj.unbind())
    mixed = torch.zeros_like(states)
    for expert, (up, down) in enumerate(zip(ups, downs, strict=True)):
        token, place = torch.where(chosen == expert)
        if len(token):
            found = product(self._apply_gate(product(states[token], up)), down)
            mixed.index_add_(0, token, (found * weights[token, place, None]).to(mixed.dtype))
    return mixed
