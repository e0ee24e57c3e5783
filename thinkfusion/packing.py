# SPDX-License-Identifier: Apache-2.0
"""From training sequences to batches: trees of conversations, packed into rows of a token budget, without padding.

The rows of a batch are laid one after another, (1, tokens): the attention of trees keeps them apart. Ordinary
sequences are trees of one node, so that packing them falls out of the same code, on any device.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Sampler

from thinkfusion.rendering import IGNORED
from thinkfusion.sequences import MODES
from thinkfusion.trees import FusionTree, TrainingSequence, fuse_within

if TYPE_CHECKING:
    import datasets
    from numpy.typing import NDArray

LAYOUTS = ("tree", "packed", "padded")
WINDOW_TREES = 2048
"""How many trees the packing looks at together."""
OPEN_ROWS = 8
"""How many rows' tokens wait for the trees of the next window."""
CANDIDATES = 64
"""How many trees, at most, are tried together to fill a row."""
READ_SEQUENCES = 1024


@dataclass(frozen=True)
class Layout:
    """How training sequences become rows.

    kind: "tree" fuses the sequences of a conversation, "packed" leaves each alone.
    tokens_per_row: the most tokens of a row; None puts one conversation (or sequence) into each.
    non_thinking_trunk: see `trees.fuse`.
    ordered: keep the order of the sequences, for mixtures that have one.
    rows_at_once: how many rows all processes take together in one step. The number of rows is made a multiple of it,
        with empty rows if need be, so that every process has as many batches and none is seen twice or left out.
    """

    kind: str = "tree"
    tokens_per_row: int | None = None
    non_thinking_trunk: bool = True
    ordered: bool = False
    rows_at_once: int = 1

    def __post_init__(self) -> None:
        if self.kind not in LAYOUTS[:2]:
            raise ValueError(f"kind: {self.kind!r} is unknown; choose one of {', '.join(LAYOUTS[:2])}.")
        for name, value in (("tokens_per_row", self.tokens_per_row), ("rows_at_once", self.rows_at_once)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: found {value}, expected at least 1.")

    def trees(self, sequences: Sequence[TrainingSequence]) -> list[FusionTree]:
        """The trees of one conversation, several if it is longer than a row; raises ValueError as `fuse_within`."""
        return fuse_within(sequences, self.tokens_per_row, non_thinking_trunk=self.non_thinking_trunk)


@dataclass
class PackingReport:
    """What became of training sequences on their way into rows.

    split: conversations longer than a row, whose history is computed in several trees. tokens: computed in the rows;
    sequence_tokens: of the separate sequences.
    """

    sequences: int = 0
    conversations: int = 0
    split: int = 0
    trees: int = 0
    tokens: int = 0
    sequence_tokens: int = 0
    rows: int = 0
    tokens_per_row: int | None = None

    @property
    def padding(self) -> float:
        """The share of the rows' budget that is left empty; 0 without a budget."""
        if self.tokens_per_row is None or not self.rows:
            return 0.0
        return 1 - self.tokens / (self.rows * self.tokens_per_row)

    def fused(self, sequences: Sequence[TrainingSequence], layout: Layout) -> list[FusionTree]:
        """The trees of the next conversation, counted; raises ValueError as `Layout.trees`, with the place."""
        try:
            trees = layout.trees(sequences)
        except ValueError as error:
            first, count = self.sequences, len(sequences)
            place = f"{first}" if count == 1 else f"{first}:{first + count}"
            raise ValueError(f"dataset[{place}]: {error}") from None
        self.sequences += len(sequences)
        self.conversations += 1
        self.split += len(trees) > 1
        self.trees += len(trees)
        self.tokens += sum(map(len, trees))
        self.sequence_tokens += sum(len(sequence.ids) for sequence in sequences)
        return trees

    def __str__(self) -> str:
        share = self.tokens / self.sequence_tokens if self.sequence_tokens else 1.0
        text = (
            f"{self.sequences:,} sequences of {self.sequence_tokens:,} tokens are computed as {self.trees:,} trees of "
            f"{self.tokens:,} tokens ({share:.0%}), in {self.rows:,} rows"
        )
        if self.tokens_per_row is not None:
            text += f" of at most {self.tokens_per_row:,} ({self.padding:.1%} left empty)"
        if self.split:
            text += f"; {self.split:,} conversations are longer than a row and were split, their history repeated"
        return text + "."


class PackedRows(Dataset[list[FusionTree]]):
    """The rows of a data set that `prepare` made, each a list of trees; trees are made when they are asked for.

    sequences: `input_ids`, `labels`, `mode`, and `conversation`, whose equal neighbours belong together; without that
        column every sequence stands alone. report: what was packed. The length is a multiple of the layout's
        `rows_at_once`; rows beyond `report.rows` are empty.

    Raises ValueError for a sequence longer than a row.
    """

    def __init__(self, sequences: datasets.Dataset, layout: Layout) -> None:
        self.layout = layout
        self.sequences = sequences.with_format("arrow")
        self.report = PackingReport(tokens_per_row=layout.tokens_per_row)
        self._starts = _conversation_starts(sequences, layout)
        lengths: list[int] = []
        places: list[tuple[int, int]] = []
        for number, conversation in enumerate(self._conversations()):
            trees = self.report.fused(conversation, layout)
            lengths += map(len, trees)
            places += ((number, part) for part in range(len(trees)))
        self._places = np.array(places, dtype=np.int32).reshape(-1, 2)
        rows = [np.array(row, dtype=np.int32) for row in pack(lengths, layout.tokens_per_row, ordered=layout.ordered)]
        self._rows = rows
        self.report.rows = len(rows)

    def __len__(self) -> int:
        return -(-len(self._rows) // self.layout.rows_at_once) * self.layout.rows_at_once

    def __getitem__(self, index: int) -> list[FusionTree]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        if index >= len(self._rows):
            return []
        trees = []
        for number, part in self._places[self._rows[index]]:
            start, stop = self._starts[number : number + 2]
            trees.append(self.layout.trees(self._read(start, stop))[part])
        return trees

    def _conversations(self) -> Iterator[list[TrainingSequence]]:
        first = 0
        while first < len(self._starts) - 1:
            last = int(np.searchsorted(self._starts, self._starts[first] + READ_SEQUENCES, side="right")) - 1
            last = max(last, first + 1)
            begin = self._starts[first]
            read = self._read(begin, self._starts[last])
            for start, stop in zip(self._starts[first:last], self._starts[first + 1 : last + 1], strict=True):
                yield read[start - begin : stop - begin]
            first = last

    def _read(self, start: int, stop: int) -> list[TrainingSequence]:
        table = self.sequences[int(start) : int(stop)]
        ids, ends = _flat(table["input_ids"])
        labels = _flat(table["labels"])[0].copy()
        modes = table["mode"].to_numpy()
        spans = [slice(begin, end) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
        return [_sequence(ids[at], labels[at], mode) for at, mode in zip(spans, modes, strict=True)]


def _conversation_starts(sequences: datasets.Dataset, layout: Layout) -> NDArray[np.int64]:
    """Where each conversation begins among the sequences, and the end."""
    count = len(sequences)
    if layout.kind == "packed" or "conversation" not in sequences.column_names or not count:
        return np.arange(count + 1)
    numbers = sequences.with_format("arrow")["conversation"][:].to_numpy()
    return np.concatenate([[0], np.flatnonzero(numbers[1:] != numbers[:-1]) + 1, [count]])


def _flat(column: Any) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The values of a column of lists, one after another, and where each list ends."""
    lists = column.combine_chunks()
    values = lists.flatten().to_numpy(zero_copy_only=False).astype(np.int32, copy=False)
    return values, np.cumsum(lists.value_lengths().to_numpy(zero_copy_only=False))


def _sequence(ids: NDArray[np.int32], labels: NDArray[np.int32], mode: int) -> TrainingSequence:
    # Nothing stands before the first token to predict it; in a row it would be the end of another tree.
    labels[:1] = IGNORED
    return TrainingSequence(ids, labels, MODES[mode])


class StreamedRows(IterableDataset[list[FusionTree]]):
    """The same rows in their order, of a stream that `prepare` made.

    `report` is complete after the first epoch, in the process that read it. A stream of several shards may be read by
    as many workers of a DataLoader; each packs its own.
    """

    def __init__(self, sequences: datasets.IterableDataset, layout: Layout) -> None:
        self.sequences, self.layout = sequences, layout
        self.report = PackingReport(tokens_per_row=layout.tokens_per_row)

    def set_epoch(self, epoch: int) -> None:
        """Called at the beginning of every epoch, for a stream that is shuffled."""
        self.sequences.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[FusionTree]]:
        report = PackingReport(tokens_per_row=self.layout.tokens_per_row)
        waiting: dict[int, FusionTree] = {}

        def lengths() -> Iterator[int]:
            number = 0
            for conversation in self._conversations():
                for tree in report.fused(conversation, self.layout):
                    waiting[number] = tree
                    number += 1
                    yield len(tree)

        for row in pack(lengths(), self.layout.tokens_per_row, ordered=self.layout.ordered):
            report.rows += 1
            yield [waiting.pop(number) for number in row]
        self.report = report
        yield from ([] for _ in range(-report.rows % self.layout.rows_at_once))

    def _conversations(self) -> Iterator[list[TrainingSequence]]:
        def belongs(numbered: tuple[int, dict[str, Any]]) -> tuple[bool, int]:
            number, row = numbered
            together = self.layout.kind == "tree" and "conversation" in row
            return together, row["conversation"] if together else number

        for _, rows in groupby(enumerate(self.sequences), belongs):
            yield [
                _sequence(
                    np.array(row["input_ids"], dtype=np.int32), np.array(row["labels"], dtype=np.int32), row["mode"]
                )
                for _, row in rows
            ]


def pack(lengths: Iterable[int], budget: int | None, *, ordered: bool = False) -> Iterator[list[int]]:
    """Rows of the indices of `lengths` (at least 1), none above `budget`, every index in exactly one.

    They are filled as full as can be from windows of WINDOW_TREES, so that a stream is packed as a file is; what fills
    no more than OPEN_ROWS waits for the next window. With `ordered` rows are filled one after another; without a
    budget each index has its own. Raises ValueError for a length above the budget.
    """
    if budget is None:
        yield from ([index] for index, _ in enumerate(lengths))
        return
    waiting: list[tuple[int, int]] = []
    tokens = 0
    for index, length in enumerate(lengths):
        if length > budget:
            raise ValueError(f"found a length of {length:,} tokens, and a row has {budget:,} (tokens_per_row).")
        if ordered and tokens + length > budget:
            yield [number for _, number in waiting]
            waiting, tokens = [], 0
        waiting.append((length, index))
        tokens += length
        if not ordered and len(waiting) >= WINDOW_TREES and tokens > OPEN_ROWS * budget:
            yield from _filled(waiting, budget, OPEN_ROWS * budget)
            tokens = sum(length for length, _ in waiting)
    yield from [[number for _, number in waiting]] if ordered and waiting else _filled(waiting, budget, 0)


def _filled(waiting: list[tuple[int, int]], budget: int, remaining: int) -> list[list[int]]:
    """Take rows out of a window of (length, index), until no more than `remaining` tokens wait.

    The longest tree begins a row, and those that leave the least room end it. Taking the longest ones first (best fit
    decreasing) leaves 3 % empty where a row has four or five trees; this leaves a tenth of that.
    """
    waiting.sort()
    tokens = sum(length for length, _ in waiting)
    rows = []
    while tokens > remaining:
        length, index = waiting.pop()
        row, free = [index], budget - length
        while waiting and waiting[0][0] <= free:
            fitting = bisect_left(waiting, (free + 1,))
            # Some of those that fit, of all lengths, the longest first.
            places = range(fitting - 1, -1, -fitting // CANDIDATES)
            for number in _fullest([waiting[place][0] for place in places], free):
                length, index = waiting.pop(places[number])
                row.append(index)
                free -= length
        tokens -= budget - free
        rows.append(sorted(row))
    return sorted(rows)


def _fullest(lengths: Sequence[int], room: int) -> list[int]:
    """The indices whose lengths come nearest to `room` without exceeding it, the first ones where there is a choice."""
    # Bit n tells whether some of the lengths so far add up to n.
    sums, within = [1], (2 << min(room, sum(lengths))) - 1
    for length in lengths:
        sums.append((sums[-1] | sums[-1] << length) & within)
    total = sums[-1].bit_length() - 1
    chosen = []
    for index in reversed(range(len(lengths))):
        if not sums[index] >> total & 1:
            chosen.append(index)
            total -= lengths[index]
    return chosen[::-1]


class RowSampler(Sampler[int]):
    """The rows in an order drawn from the seed and the epoch, and after them the empty ones."""

    def __init__(self, rows: PackedRows, seed: int) -> None:
        self.rows, self.seed, self.epoch = rows, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Draw another order; called at the beginning of every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.rows.report.rows)
        yield from order.tolist()
        yield from range(len(order), len(self.rows))


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell the samplers within a data loader which epoch it is.

    accelerate 1.15 does not reach the one of several processes in a loader whose first batches are skipped, so that an
    epoch that is resumed there has the order of the first one (a test tells when that is mended).
    """
    inner = getattr(loader, "batch_sampler", None)
    while inner is not None:
        if hasattr(inner, "set_epoch"):
            inner.set_epoch(epoch)
        inner = getattr(inner, "batch_sampler", None) or getattr(inner, "sampler", None)


@dataclass(frozen=True)
class RowCollator:
    """Lays rows of trees one after another: a batch of (1, tokens).

    `input_ids`, `labels`, `position_ids`, `attention_mask`, and `modes` (an index into `sequences.MODES` for each
    token); `nodes` are the arguments of `tree_attention.RowLayout`. multiple: the tokens are filled up to a multiple.
    """

    pad_token_id: int
    multiple: int = 1

    def __call__(self, rows: Sequence[Sequence[FusionTree]]) -> dict[str, Any]:
        trees = [tree for row in rows for tree in row]
        tokens = sum(map(len, trees))
        padding = -tokens % self.multiple if tokens else self.multiple
        nodes, offset = [], 0
        for tree in trees:
            nodes += [
                (offset, fork, offset + start, offset + start + length)
                for start, length, fork in zip(tree.starts, tree.lengths, tree.forks, strict=True)
            ]
            offset += len(tree)
        if padding:
            nodes.append((tokens, 0, tokens, tokens + padding))

        def laid(parts: list[NDArray[Any]], value: int) -> torch.Tensor:
            row = np.concatenate([*parts, np.full(padding, value)])
            return torch.from_numpy(row.astype(np.int64))[None]

        modes = [np.repeat([MODES.index(mode) for mode in tree.modes], tree.lengths) for tree in trees]
        return {
            "input_ids": laid([tree.ids for tree in trees], self.pad_token_id),
            "labels": laid([tree.labels for tree in trees], IGNORED),
            "position_ids": laid([tree.positions for tree in trees], 0),
            "attention_mask": laid([np.ones(tokens)], 0),
            "modes": laid(modes, 0),
            "nodes": nodes,
        }


@dataclass(frozen=True)
class PaddingCollator:
    """Pads rows to the longest: `input_ids`, `labels`, `attention_mask`, `modes`, all (batch, length)."""

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)

        def padded(column: str, value: int) -> torch.Tensor:
            return torch.tensor([row[column] + [value] * (length - len(row[column])) for row in rows])

        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        return {
            "input_ids": padded("input_ids", self.pad_token_id),
            "labels": padded("labels", IGNORED),
            "attention_mask": (torch.arange(length) < lengths[:, None]).long(),
            "modes": torch.tensor([[row["mode"]] * length for row in rows]),
        }
