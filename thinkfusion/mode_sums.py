# SPDX-License-Identifier: Apache-2.0
"""What the trained tokens of each mode amount to: how many they are, and their losses, over batches and processes."""

from __future__ import annotations

from typing import Any

import torch

from thinkfusion.rendering import IGNORED
from thinkfusion.sequences import MODES


def counts_by_mode(modes: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Trained tokens of each mode, (modes,); both (batch, length), labels not yet shifted."""
    trained = modes[:, 1:][labels[:, 1:] != IGNORED]
    return torch.bincount(trained.flatten(), minlength=len(MODES))


class ModeSums:
    """Summed loss and trained tokens of each mode, on the device until they are asked for."""

    def __init__(self) -> None:
        self.parts: list[torch.Tensor] = []

    def add(self, modes: torch.Tensor, losses: torch.Tensor, mask: torch.Tensor) -> None:
        """Add a batch; all (batch, length).

        modes: places in `MODES`. losses: of each token, in nats (or entropies), 0 where it does not count. mask: 1
            where it counts, else 0.
        """
        per_token = torch.stack([losses.flatten(), mask.flatten()]).double()  # (2, tokens)
        self.parts.append(per_token @ torch.nn.functional.one_hot(modes.flatten(), len(MODES)).double())  # (2, modes)

    def totals(self, accelerator: Any) -> tuple[list[float], list[float]]:
        """Summed losses (nats) and trained tokens of each mode, in the order of `MODES`, over all processes."""
        own = sum(self.parts, torch.zeros(2, len(MODES), dtype=torch.double, device=accelerator.device))
        losses, counts = accelerator.reduce(own, reduction="sum").tolist()
        return losses, counts
