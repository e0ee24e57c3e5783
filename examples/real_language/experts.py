# SPDX-License-Identifier: Apache-2.0
"""Experts of a Mixture of Experts computed one after another: on a CPU the fastest way to train a few large ones."""

from typing import Any


def choose_experts(model: Any, device: str) -> None:
    """On a CPU one expert after another is faster than the grouped product that transformers would choose."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if device == "cpu":
        ALL_EXPERTS_FUNCTIONS.register("one_by_one", experts_one_by_one)
        model.set_experts_implementation("one_by_one")


def experts_one_by_one(self: Any, states: Any, chosen: Any, weights: Any) -> Any:
    """transformers' own loop over experts, but for its backward pass, which fills the gradients of all for each.

    self: the module with the experts' weights, (experts, out, in). states: (tokens, width); chosen, weights: (tokens,
    top-k). Returns (tokens, width).
    """
    import torch
    from torch.nn.functional import linear

    mixed = torch.zeros_like(states)
    for expert, (up, down) in enumerate(zip(self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True)):
        token, place = torch.where(chosen == expert)
        if len(token):
            found = linear(self._apply_gate(linear(states[token], up)), down)
            mixed.index_add_(0, token, (found * weights[token, place, None]).to(mixed.dtype))
    return mixed
