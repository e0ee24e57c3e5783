# SPDX-License-Identifier: Apache-2.0
"""How much the trained tokens of each mode count in the loss.

The loss is a mean over all trained tokens of a step, whichever batches, rows and processes they lie in: long reasoning
counts more than short answers, in proportion to its tokens. Weights and normalisation change that, and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from thinkfusion.modes import Mode
from thinkfusion.sequences import MODES

if TYPE_CHECKING:
    import torch


class ModeWeights(NamedTuple):
    """The weight of each mode, in the order of `MODES`, and whether it is that of a mean or of a token.

    by_mode: False: the loss is the mean over all trained tokens, each with the weight of its mode; True: the mean of
        the modes' own means, so that with equal weights half of the loss belongs to each mode that a step has.
    """

    weights: tuple[float, ...] = (1.0, 1.0)
    by_mode: bool = False

    @classmethod
    def parse(cls, given: Mapping[str, float] | str | None, by_mode: bool = False) -> ModeWeights:
        """From a mapping of modes, or its JSON; a mode that is not named has the weight 1. Raises ValueError."""
        try:
            named = json.loads(given) if isinstance(given, str) else given or {}
        except json.JSONDecodeError:
            named = None
        if not isinstance(named, Mapping):
            raise ValueError(f'mode_weights: found {given!r}, expected weights by mode, as {{"thinking": 0.5}}.')
        weights = {Mode.parse(mode): weight for mode, weight in named.items()}
        for mode, weight in weights.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
                raise ValueError(f"mode_weights: found {weight!r} for {mode}, expected a number above 0.")
        return cls(tuple(float(weights.get(mode, 1.0)) for mode in MODES), by_mode)

    @property
    def plain(self) -> bool:
        """Whether the loss is the plain mean over trained tokens."""
        return not self.by_mode and len(set(self.weights)) == 1

    def factors(self, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a token's loss of each mode is multiplied by, (modes,), and what the sum of all is divided by, ().

        counts: the trained tokens of each mode in the whole step, (modes,).
        """
        weights = counts.new_tensor(self.weights, dtype=counts.dtype if counts.is_floating_point() else None).double()
        if self.by_mode:
            return weights / counts.clamp(min=1), (weights * (counts > 0)).sum()
        return weights, (weights * counts).sum()
