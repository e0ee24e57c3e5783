# SPDX-License-Identifier: Apache-2.0
"""The routes of a checkpoint over a data set: every reply is read as training would read it, and nothing is learned.

Both modes pass the model as they stand in the training sequences (teacher forcing), so that no generation is needed
and what is counted is what would be trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from thinkfusion.moe import bare
from thinkfusion.packing import PaddingCollator
from thinkfusion.preparing import Data, prepare
from thinkfusion.routing import RouteCounter, RoutingReport
from thinkfusion.row_report import RowReport
from thinkfusion.sequences import MODES, Plan
from thinkfusion.tasks import generate_samples

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class CountedRoutes:
    """The routes of a checkpoint, and what they were counted on.

    checkpoint, family, data: names. conversations, of: how many were counted, drawn from how many that would be
    trained. sequences: counted ones, by mode. rows: what became of the rows on their way. remarks: what a reader of the
    figures needs to know.
    """

    report: RoutingReport
    checkpoint: str
    family: str
    data: tuple[str, ...]
    conversations: int
    of: int
    sequences: tuple[int, ...]
    rows: RowReport
    remarks: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """What `routes.json` holds: the figures of a log, the layers, and the account of the rows."""
        rows = self.rows.to_dict()
        return {
            "checkpoint": self.checkpoint,
            "family": self.family,
            "data": list(self.data),
            "rows": {name: rows[name] for name in ("rows_in", "rows_kept", "skipped", "altered", "noted", "errors")},
            "conversations": {"counted": self.conversations, "of": self.of},
            "sequences": {mode.value: count for mode, count in zip(MODES, self.sequences, strict=True)},
            "tokens": {mode.value: self.report.tokens(number) for number, mode in enumerate(MODES)},
            "remarks": list(self.remarks),
            "figures": self.report.figures(),
            **self.report.to_dict(),
        }


def measure_routes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data | None = None,
    plan: Plan | None = None,
    *,
    name: str = "",
    samples: int = 256,
    seed: int = 0,
    batch_size: int = 8,
    processes: int = 1,
    progress: bool = False,
) -> CountedRoutes:
    """Prepare the rows as training does, draw some conversations of them, and count their routes in both modes.

    data: as for `prepare`; the embedded tasks, problems that are kept for evaluation, if not given.
    plan: how rows are read, mixed and shortened; its `max_length` is the model's number of positions if it has none.
    A mode without a sequence is a remark here, and no error. name: of the checkpoint. samples: conversations, with all
    their sequences.

    Raises ValueError, before any row is read, for a dense model and for one that lacks tokens of the tokenizer, and
    what `prepare` raises.
    """
    counter = RouteCounter(model)
    known = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > known:
        raise ValueError(
            f"routes: the tokenizer has {len(tokenizer):,} tokens, and the model embeddings for {known:,}. Give it the "
            "tokenizer that it was saved with."
        )
    plan = plan or Plan()
    given = embedded_rows(samples, seed) if data is None else data
    sequences, rows = prepare(
        given,
        tokenizer,
        records=plan.records,
        mixture=plan.mixture,
        reasoning=plan.reasoning,
        max_length=plan.max_length or positions(model),
        on_long_row=plan.on_long_row,
        both_modes=False,
        processes=processes,
    )
    drawn, available = draw_conversations(sequences, samples, seed)
    report = count_routes(model, tokenizer, drawn, batch_size=batch_size, counter=counter, progress=progress)
    by_mode = np.bincount(np.asarray(drawn["mode"], dtype=np.int64), minlength=len(MODES)).tolist()
    return CountedRoutes(
        report=report,
        checkpoint=name,
        family=str(getattr(model.config, "model_type", type(model).__name__)),
        data=("the embedded tasks",) if data is None else tuple(rows.formats),
        conversations=min(samples, available),
        of=available,
        sequences=tuple(by_mode),
        rows=rows,
        remarks=tuple(_remarks(report)),
    )


def embedded_rows(samples: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of the embedded tasks, of problems that no training sees."""
    drawn = generate_samples(samples, seed=seed, split="evaluation")
    return [{"question": each.question, "reasoning": each.reasoning, "answer": each.answer} for each in drawn]


def positions(model: Any) -> int | None:
    """The most tokens of a sequence that the model takes, if its configuration says so."""
    found: int | None = getattr(bare(model).config.get_text_config(), "max_position_embeddings", None)
    return found


def draw_conversations(sequences: Dataset, samples: int, seed: int) -> tuple[Dataset, int]:
    """All sequences of so many conversations, drawn evenly, in their order; and how many conversations there are."""
    numbers = np.asarray(sequences["conversation"], dtype=np.int64)
    present = np.unique(numbers)
    if len(present) <= samples:
        return sequences, len(present)
    chosen = np.random.default_rng(seed).choice(present, samples, replace=False)
    return sequences.select(np.flatnonzero(np.isin(numbers, chosen))), len(present)


def count_routes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Dataset | Sequence[dict[str, Any]],
    *,
    batch_size: int = 8,
    counter: RouteCounter | None = None,
    progress: bool = False,
) -> RoutingReport:
    """The routes of the reply tokens of prepared sequences (`input_ids`, `labels`, `mode`).

    Without gradients, in evaluation mode, which is undone. Counts are all that is kept: routers are watched by hooks,
    and the output layer is not run, so that memory grows neither with the sequences nor with the vocabulary.

    Raises ValueError for a dense model, for no sequences, and for one longer than the model's positions.
    """
    from tqdm.auto import tqdm

    inner = bare(model)
    counter = counter or RouteCounter(inner)
    lengths = [len(each["input_ids"]) for each in sequences]
    longest, limit = max(lengths, default=0), positions(inner)
    if not lengths:
        raise ValueError("routes: there is no sequence to count.")
    if limit is not None and longest > limit:
        raise ValueError(
            f"routes: a sequence has {longest:,} tokens, and the model {limit:,} positions. Prepare the rows with "
            f"max_length={limit} (--max_length {limit})."
        )
    # The longest first: what does not fit into memory is known at once. Neighbours need little padding.
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    collate, device = PaddingCollator(tokenizer.pad_token_id or 0), inner.get_input_embeddings().weight.device
    training = inner.training
    inner.eval()
    try:
        with torch.no_grad(), tqdm(total=len(order), desc="sequences", disable=not progress) as bar:
            for start in range(0, len(order), batch_size):
                rows = [sequences[index] for index in order[start : start + batch_size]]
                batch = {name: each.to(device) for name, each in collate(rows).items()}
                with counter.watch(batch["modes"], batch["labels"] >= 0):
                    # Without the head, whose logits nobody asks for.
                    inner.base_model(
                        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
                    )
                bar.update(len(rows))
    finally:
        inner.train(training)
    report = counter.report()
    assert report is not None
    return report


def _remarks(report: RoutingReport) -> list[str]:
    remarks = []
    for number, mode in enumerate(MODES):
        name, tokens = mode.value.replace("_", "-"), report.tokens(number)
        if not tokens:
            remarks.append(
                f"No row is trained in {name} mode, so there is no overlap and no difference. "
                + ("Paired rows need reasoning." if number == 0 else "With --mixture paired rows have both modes.")
            )
        elif report.few(number):
            remarks.append(
                f"{tokens:,} {name} tokens are {report.choices(number):.1f} choices an expert, were they even: dead "
                "experts and differences may be chance. Count more rows (--samples)."
            )
    return remarks
