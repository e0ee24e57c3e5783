# SPDX-License-Identifier: Apache-2.0
"""Which experts tokens are routed to, by layer and by mode: is a router collapsing, do the modes use other experts?

Counted are the tokens of replies, those that are trained: each belongs to one mode, which a prompt that both modes
share does not. What is kept is a count for each layer, mode and expert, however long the sequences are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import log
from typing import Any

import torch

from thinkfusion.moe import MoELayer, bare, moe_layers, watch_routes
from thinkfusion.sequences import MODES

FEW_CHOICES = 20
"""With fewer choices an expert, were they even, what looks dead may be chance."""


@dataclass(frozen=True)
class LayerRoutes:
    """What the experts of one layer were chosen for."""

    index: int
    """The number of the decoder layer."""
    top_k: int
    counts: tuple[tuple[int, ...], ...]
    """(modes, experts): how many tokens of each of `thinkfusion.sequences.MODES` chose each expert."""

    def shares(self, mode: int) -> list[float]:
        """Each expert's share of the choices in a mode, (experts,); zeros if there were no tokens."""
        total = sum(self.counts[mode])
        return [count / total if total else 0.0 for count in self.counts[mode]]

    def multiples(self, mode: int) -> list[float]:
        """Each expert's share in multiples of an even one, (experts,): 1 if balanced, 0 if dead."""
        return [share * len(self.counts[mode]) for share in self.shares(mode)]

    def entropy(self, mode: int) -> float:
        """Utilisation entropy: 1 where all experts are chosen alike, 0 where all tokens choose the same one."""
        shares = self.shares(mode)
        return -sum(share * log(share) for share in shares if share) / log(len(shares)) if len(shares) > 1 else 1.0

    def busiest(self, mode: int) -> float:
        """The share of the tokens that chose the busiest expert: top-k over experts if even, 1 at most."""
        return max(self.shares(mode)) * self.top_k

    def used(self, mode: int) -> float:
        """How many experts, used alike, have the same entropy: all of them if balanced, top-k or fewer if collapsed."""
        return float(len(self.counts[mode]) ** self.entropy(mode))

    def dead(self, mode: int) -> int:
        """Experts that no token chose."""
        return self.counts[mode].count(0)

    def overlap(self) -> float:
        """Σ min(p, q) of the modes' shares: 1 where both use the same experts alike, 0 where they share none."""
        return float(sum(map(min, *(self.shares(mode) for mode in range(len(MODES))))))


@dataclass(frozen=True)
class RoutingReport:
    """The routes of all Mixture-of-Experts layers."""

    layers: tuple[LayerRoutes, ...]

    @property
    def seen(self) -> list[int]:
        """The modes that have tokens, as indices into `thinkfusion.sequences.MODES`."""
        return [number for number in range(len(MODES)) if any(sum(layer.counts[number]) for layer in self.layers)]

    def tokens(self, mode: int) -> int:
        """Tokens of a mode that were routed; each passes all layers."""
        return sum(self.layers[0].counts[mode]) // self.layers[0].top_k

    def choices(self, mode: int) -> float:
        """How often an expert would be chosen if all were alike, in the layer where that is least."""
        return min(sum(layer.counts[mode]) / len(layer.counts[mode]) for layer in self.layers)

    def few(self, mode: int) -> bool:
        """Whether a mode has so few tokens that what looks dead may be chance."""
        return self.choices(mode) < FEW_CHOICES

    def to_dict(self) -> dict[str, Any]:
        """Figures and counts of every layer, by mode."""
        return {
            "layers": [
                {
                    "index": layer.index,
                    "experts": len(layer.counts[0]),
                    "top_k": layer.top_k,
                    "overlap": layer.overlap(),
                    **{
                        str(mode): {
                            "tokens": sum(layer.counts[number]) // layer.top_k,
                            "entropy": layer.entropy(number),
                            "busiest": layer.busiest(number),
                            "dead": layer.dead(number),
                            "counts": list(layer.counts[number]),
                        }
                        for number, mode in enumerate(MODES)
                    },
                }
                for layer in self.layers
            ]
        }

    def figures(self) -> dict[str, float]:
        """For a log: by mode the layers' mean and least entropy, the busiest expert, dead experts; the overlap."""
        found: dict[str, float] = {}
        seen = self.seen
        for number in seen:
            entropies = [layer.entropy(number) for layer in self.layers]
            found[f"routing_entropy_{MODES[number]}"] = sum(entropies) / len(entropies)
            found[f"routing_entropy_min_{MODES[number]}"] = min(entropies)
            found[f"routing_busiest_{MODES[number]}"] = max(layer.busiest(number) for layer in self.layers)
            found[f"routing_dead_{MODES[number]}"] = sum(layer.dead(number) for layer in self.layers)
        if len(seen) == len(MODES):
            found["routing_overlap"] = sum(layer.overlap() for layer in self.layers) / len(self.layers)
        return found


class RouteCounter:
    """Counts the choices of a model's routers.

    Raises ValueError for a model without Mixture-of-Experts layers.
    """

    def __init__(self, model: Any) -> None:
        self.model = bare(model)
        self.layers: Sequence[MoELayer] = moe_layers(self.model)
        if not self.layers:
            raise ValueError(f"routing: {type(self.model).__name__} has no Mixture-of-Experts layer, so no routes.")
        self._width = max(layer.num_experts for layer in self.layers)
        self._counts: torch.Tensor | None = None

    @contextmanager
    def watch(self, modes: torch.Tensor, replies: torch.Tensor) -> Iterator[None]:
        """A forward pass; `modes`, and whether a token is of a reply, are both (batch, length)."""
        if self._counts is None:
            shape = (len(self.layers), len(MODES) * self._width)
            self._counts = torch.zeros(shape, dtype=torch.long, device=modes.device)
        counts, kept, rows = self._counts, replies.flatten().long(), modes.flatten().long() * self._width

        def count(place: int, logits: torch.Tensor, chosen: torch.Tensor) -> None:
            where = (rows[:, None] + chosen).flatten()
            counts[place].index_add_(0, where, kept.repeat_interleave(chosen.shape[1]))

        with watch_routes(self.model, self.layers, count):
            yield

    def report(self, accelerator: Any = None) -> RoutingReport | None:
        """What was counted since the last report, over all processes of `accelerator`; None if nothing was watched."""
        counts, self._counts = self._counts, None
        if counts is None:
            return None
        if accelerator is not None:
            counts = accelerator.reduce(counts, reduction="sum")
        by_mode = counts.view(len(self.layers), len(MODES), self._width).tolist()
        return RoutingReport(
            tuple(
                LayerRoutes(layer.index, layer.top_k, tuple(tuple(row[: layer.num_experts]) for row in rows))
                for layer, rows in zip(self.layers, by_mode, strict=True)
            )
        )
