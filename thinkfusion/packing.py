# SPDX-License-Identifier: Apache-2.0
"""From conversations to a data set of token ids, and from its rows to padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from thinkfusion.conversations import Conversation, DataError
from thinkfusion.mixture import mix
from thinkfusion.modes import Mode
from thinkfusion.records import RowReport
from thinkfusion.rendering import IGNORED, Renderer, steps_without_reasoning, trained_counts

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

MODES = tuple(Mode)
"""The column `mode` of a prepared data set, and the tensor `mode` of a batch, hold indices into this."""
CHUNK = 1024
CHECKED_ROWS = 32


def prepare(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    *,
    mixture: str = "paired",
    max_length: int | None = None,
    on_bad_row: str = "error",
    report: RowReport | None = None,
) -> tuple[Dataset, RowReport]:
    """Mix, render and tokenise conversations: a Dataset with `input_ids`, `labels` and `mode`, one row a sequence.

    `max_length` is the longest sequence allowed, in tokens. A conversation with a longer one is a bad row
    (`too_long`): it is never cut, since a cut loses `</think>`, the answer or the end. A sample of the rows is
    compared with the chat template, id for id. `report`, if given, is the one of reading them, and is completed.

    Raises DataError for a bad row (unless `on_bad_row="skip"` counts it), ValueError if nothing is left.
    """
    from datasets import Dataset

    report = report or RowReport(read=len(conversations), kept=len(conversations))
    renderer = Renderer(tokenizer)
    mixed = mix(conversations, mixture)
    for conversation in mixed[:: max(1, len(mixed) // CHECKED_ROWS)]:
        renderer.check_against_template(conversation)
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "mode": []}
    for start in range(0, len(mixed), CHUNK):
        chunk = mixed[start : start + CHUNK]
        for conversation, sequences in zip(chunk, renderer.render(chunk), strict=True):
            longest = max((len(sequence.ids) for sequence in sequences), default=0)
            if max_length is not None and longest > max_length:
                error = DataError(
                    "too_long",
                    f"the row has {longest:,} tokens, and max_length is {max_length:,}. Raise max_length, or leave "
                    "such rows out with on_bad_row='skip' (--on_bad_row skip).",
                    source=conversation.source,
                    line=conversation.line,
                )
                if on_bad_row == "error":
                    raise error
                report.skip(error)
                report.kept -= 1
                continue
            for sequence in sequences:
                columns["input_ids"].append(sequence.ids)
                columns["labels"].append(sequence.labels)
                columns["mode"].append(MODES.index(sequence.mode))
                report.sequences[sequence.mode.value] += 1
                report.all_tokens += len(sequence.ids)
            for mode, count in trained_counts(sequences).items():
                report.tokens[mode.value] += count
            untrained = steps_without_reasoning(conversation)
            if untrained:
                report.notes["step without reasoning, not trained in thinking mode"] += untrained
    if not columns["mode"]:
        raise ValueError(f"nothing to train on.\n{report}")
    return Dataset.from_dict(columns), report


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
