# SPDX-License-Identifier: Apache-2.0
"""Balance of experts: a loss for each layer, over the tokens of a whole step, and the correction biases of routers.

For a layer of E experts, f_i the share of (token, choice) pairs that went to expert i and P_i the mean affinity of the
tokens to it, affinities normalised to a sum of 1, the loss is E · Σ f_i · P_i: 1 where tokens are spread evenly, E / k
where all go to the same k experts (Switch Transformers, arXiv 2101.03961; sigmoid affinities: DeepSeek-V3, arXiv
2412.19437). It is the mean over layers, each on its own: pooled counts would take layers that each collapsed onto
another expert for balanced ones. Shares are those of all processes and of the step's batches so far (arXiv 2501.11873).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback

from thinkfusion.moe import SIGMOID, MoELayer, bare, moe_layers, watch_routes


def affinities(logits: torch.Tensor, score_function: str) -> torch.Tensor:
    """Affinities of tokens to experts, (tokens, experts), of a sum of 1, at least in float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if score_function != SIGMOID:
        return logits.softmax(-1)
    scores = logits.sigmoid()
    return scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)


def layer_balance(counts: torch.Tensor, affinity_sums: torch.Tensor, tokens: torch.Tensor | float) -> torch.Tensor:
    """The loss of one layer: choices and summed affinities of its experts, both (experts,), of so many tokens."""
    shares = counts / counts.sum().clamp(min=1)
    return counts.shape[0] * (shares * affinity_sums).sum() / tokens


def routed(
    layer: MoELayer, logits: torch.Tensor, chosen: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choices and summed affinities of a layer's experts, both (experts,), over the tokens of `mask`, (tokens,)."""
    sums = affinities(logits, layer.score_function)
    if len(mask) != len(sums):
        raise ValueError(
            f"{layer.router}: routed {len(sums):,} tokens of a batch of {len(mask):,}, so that padding cannot be told. "
            "Set balance_loss_coef and router_bias_update_rate to 0."
        )
    weights = mask.to(sums)
    counts = torch.zeros(layer.num_experts, dtype=sums.dtype, device=sums.device)
    counts.index_add_(0, chosen.flatten(), weights.repeat_interleave(chosen.shape[1]))
    return counts, (sums * weights[:, None]).sum(0)


class Balancer:
    """Watches the routers while a model trains, for the loss and for the correction biases.

    coefficient: the weight of the loss. update_rate: how far a step moves each correction bias.

    A frozen router, LoRA's default, stays as it is; the gradient passes it, and what trains below learns hidden states
    that are routed more evenly. The choice of experts passes none.

    Raises ValueError for a model without Mixture-of-Experts layers; where biases are to be updated, for one without
    them, with coarse ones, or with an adapter, which does not hold them.
    """

    def __init__(self, model: Any, accelerator: Any, *, coefficient: float, update_rate: float) -> None:
        self.model, self.accelerator = bare(model), accelerator
        self.coefficient, self.update_rate = coefficient, update_rate
        self.layers = moe_layers(self.model)
        if not self.layers:
            raise ValueError(
                f"balance_loss_coef, router_bias_update_rate: {type(self.model).__name__} has no Mixture-of-Experts "
                "layer. Leave both at 0."
            )
        self.biases = [layer.correction_bias for layer in self.layers]
        if update_rate:
            _check_biases(model, self.biases, update_rate)
        self._sizes = [layer.num_experts for layer in self.layers]
        self._tokens: torch.Tensor | float = 0.0
        self._counts: torch.Tensor | None = None
        self._affinities: torch.Tensor | None = None
        self._seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._values: list[torch.Tensor] = []

    def begin(self, batches: list[dict[str, Any]]) -> None:
        """A step begins, of these batches; their tokens are those of `attention_mask`."""
        self._close()
        own = torch.stack([batch["attention_mask"].sum() for batch in batches]).sum().double()
        # Rows that only fill up a step have no tokens at all; their loss is 0, not 0 / 0.
        self._tokens = self.accelerator.reduce(own.to(self.accelerator.device), reduction="sum").clamp(min=1)

    @contextmanager
    def watch(self, mask: torch.Tensor) -> Iterator[None]:
        """A forward pass over one batch whose tokens are those of `mask`, (batch, length).

        Logits are kept, and no more: under gradient checkpointing the layers run again in the backward pass, which
        must compute what it did here.
        """
        self._seen = {}
        with watch_routes(self.model, self.layers, lambda place, *routes: self._seen.setdefault(place, routes)):
            yield
        each = [routed(layer, *self._seen[place], mask.flatten()) for place, layer in enumerate(self.layers)]
        self._seen = {}
        self._batch = torch.cat([sums for _, sums in each])
        counts = torch.cat([counts for counts, _ in each])
        counts = self.accelerator.reduce(counts, reduction="sum")
        self._counts = counts if self._counts is None else self._counts + counts
        sums = self._batch.detach()
        self._affinities = sums if self._affinities is None else self._affinities + sums

    def loss(self) -> torch.Tensor:
        """What the batch just watched adds to the loss: its share of the step's.

        Processes average their gradients, so that each gives its share times their number. Raises ValueError where no
        gradient could flow, under reentrant gradient checkpointing.
        """
        if not self._batch.requires_grad:
            raise ValueError(
                "balance_loss_coef: no router's logits have a gradient: nothing in front of them trains, or gradient "
                "checkpointing is reentrant (set gradient_checkpointing_kwargs to {'use_reentrant': false})."
            )
        assert self._counts is not None
        factor: float = self.coefficient * self.accelerator.num_processes
        return factor * self._mean(self._counts, self._batch)

    def _mean(self, counts: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
        split = zip(torch.split(counts, self._sizes), torch.split(sums, self._sizes), strict=True)
        return torch.stack([layer_balance(*each, self._tokens) for each in split]).mean()

    def _close(self) -> None:
        """The step's own loss, over all of its batches and processes, for the log."""
        if self._counts is not None and self._affinities is not None:
            whole = self.accelerator.reduce(self._affinities, reduction="sum")
            self._values.append(self._mean(self._counts, whole))
        self._counts = self._affinities = None

    def value(self) -> float | None:
        """The mean loss of the steps since the last call, without its coefficient; None if there were none."""
        self._close()
        values, self._values = self._values, []
        return float(torch.stack(values).mean()) if values else None

    def values(self) -> list[torch.Tensor]:
        """The losses of the steps since the last `value`, for a checkpoint."""
        self._close()
        return self._values

    def set_values(self, values: list[torch.Tensor]) -> None:
        """Go on from what `values` gave."""
        self._values = [value.to(self.accelerator.device) for value in values]

    def update_biases(self) -> None:
        """Move each correction bias up for experts that got too few tokens of the step, down for the others.

        b_i += rate · sign(mean count - count_i), arXiv 2412.19437, section 2.1.2.
        """
        if not self.update_rate or self._counts is None:
            return
        names = dict([*self.model.named_parameters(), *self.model.named_buffers()])
        with torch.no_grad():
            for name, counts in zip(self.biases, torch.split(self._counts, self._sizes), strict=True):
                bias = names[str(name)]
                bias += self.update_rate * (counts.mean() - counts).sign().reshape(bias.shape).to(bias)


def _check_biases(model: Any, biases: Sequence[str | None], rate: float) -> None:
    """Raise ValueError if correction biases cannot be updated, or what they learn would be lost."""
    where, inner = "router_bias_update_rate", bare(model)
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"{where}: an adapter does not hold the routers' biases, so that what they learn would be lost with the "
            "base model. Leave it at 0, or train without an adapter."
        )
    if not all(biases):
        raise ValueError(
            f"{where}: the routers of {type(inner).__name__} have no correction bias. Leave it at 0, and use "
            "balance_loss_coef."
        )
    tensors = dict([*inner.named_parameters(), *inner.named_buffers()])
    for name in map(str, biases):
        if torch.finfo(tensors[name].dtype).bits < 32:
            raise ValueError(
                f"{where}: {name} is kept in {str(tensors[name].dtype).removeprefix('torch.')}, where steps of {rate} "
                "are lost. Load the model with dtype='float32'."
            )


class BiasUpdate(TrainerCallback):
    """Updates the correction biases after each optimizer step."""

    def __init__(self, balancer: Balancer) -> None:
        self.balancer = balancer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.balancer.update_biases()
