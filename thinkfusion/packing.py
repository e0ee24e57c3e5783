# SPDX-License-Identifier: Apache-2.0
"""From the rows of a prepared data set to padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from thinkfusion.rendering import IGNORED

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PaddingCollator:
    """Pads rows to the longest: `input_ids`, `labels`, `attention_mask` (batch, length), and `mode` (batch,)."""

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        import torch

        length = max(len(row["input_ids"]) for row in rows)

        def padded(column: str, value: int) -> torch.Tensor:
            return torch.tensor([row[column] + [value] * (length - len(row[column])) for row in rows])

        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        return {
            "input_ids": padded("input_ids", self.pad_token_id),
            "labels": padded("labels", IGNORED),
            "attention_mask": (torch.arange(length) < lengths[:, None]).long(),
            "mode": torch.tensor([row["mode"] for row in rows]),
        }
