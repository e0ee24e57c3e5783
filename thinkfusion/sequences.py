# SPDX-License-Identifier: Apache-2.0
"""From a chunk of rows to training sequences: what every worker process does, and the same in all of them."""

from __future__ import annotations

import gc
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import TYPE_CHECKING, Any, NamedTuple

from thinkfusion.conversations import Conversation
from thinkfusion.formats import RecordOptions
from thinkfusion.mixture import MixtureOptions, assign_modes, copies, draw, language_of
from thinkfusion.modes import Mode
from thinkfusion.reading import DataError, Note
from thinkfusion.records import RowOutcome, read_row
from thinkfusion.rendering import IGNORED, Renderer, Target
from thinkfusion.shortening import ReasoningOptions, apply_reasoning_options, shorten_to_fit
from thinkfusion.tokenising import TOKEN_BYTES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

MODES = tuple(Mode)
"""The column `mode` of a prepared data set, and the tensor `mode` of a batch, hold indices into this."""
ON_LONG_ROW = ("error", "drop", "shorten_reasoning")
SHORTENINGS = 4


@dataclass(frozen=True)
class Plan:
    """Everything that decides what becomes of a row, beside the tokenizer.

    max_length: the longest sequence allowed, in tokens; a row with a longer one is never cut: `on_long_row` says
        what happens to it. "error": it is a bad row (`too_long`), for which `records.on_bad_row` decides; "drop": it
        is left out and counted; "shorten_reasoning": its reasoning is cut at the end of a sentence, so that
        `</think>`, the answer and the end stay, and it is dropped where that does not help.
    both_modes: whether a mode without a sequence is an error, as it is where a switch is to be learned.
    """

    records: RecordOptions = field(default_factory=RecordOptions)
    mixture: MixtureOptions = field(default_factory=MixtureOptions)
    reasoning: ReasoningOptions = field(default_factory=ReasoningOptions)
    max_length: int | None = None
    on_long_row: str = "error"
    both_modes: bool = True

    def __post_init__(self) -> None:
        if self.on_long_row not in ON_LONG_ROW:
            raise ValueError(
                f"on_long_row: {self.on_long_row!r} is unknown; choose one of {', '.join(ON_LONG_ROW)} (--on_long_row)."
            )
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length: found {self.max_length}, expected at least 1 (--max_length).")

    @property
    def chooses(self) -> bool:
        """Whether the mixture leaves out or reorders sequences, for which it must know all of them."""
        return self.needs_draws or self.mixture.mixture == "sequential"

    @property
    def needs_draws(self) -> bool:
        """Whether sequences are chosen among all of them, for which their rows are drawn."""
        caps = (self.mixture.max_rows_per_source, self.mixture.max_tokens_per_source)
        return self.mixture.mixture == "ratio" or any(cap is not None for cap in caps)


class Chunk(NamedTuple):
    """Some rows of one source, with their numbers. The first `checked` of them are compared with the template."""

    source: str
    weight: float
    records: RecordOptions
    rows: list[tuple[int, Any]]
    checked: int = 0


class Prepared(NamedTuple):
    """What became of a chunk: what happened to each row, and the sequences, one after another in flat arrays.

    outcomes, cells, draws, before: one element a row; a cell is (source, language), `before` are trained tokens by
        mode, as the row came.
    position (of the row in the chunk), copy, mode, length, trained: one element a sequence.
    ids: 32-bit integers of all sequences.
    piece_length, piece_trained: one element a piece of the sequences, by which `labels_of` tells what is trained.
    """

    outcomes: list[RowOutcome]
    cells: list[tuple[str, str]]
    draws: array[float]
    before: list[tuple[int, int]]
    position: array[int]
    copy: array[int]
    mode: bytes
    length: array[int]
    trained: array[int]
    ids: bytes
    piece_length: array[int]
    piece_trained: bytes

    @property
    def conversations(self) -> int:
        """How many conversations the sequences come from; a row that is trained twice is two."""
        return self.copy[-1] + 1 if self.copy else 0


def labels_of(prepared: Prepared) -> NDArray[np.int32]:
    """The labels of all sequences: the ids where trained, -100 elsewhere. They are not sent between processes."""
    import numpy as np

    flags = np.frombuffer(prepared.piece_trained, dtype=np.bool_)
    trained = np.repeat(flags, np.frombuffer(prepared.piece_length, dtype=np.int32))
    return np.where(trained, np.frombuffer(prepared.ids, dtype=np.int32), np.int32(IGNORED))


Pieces = list[tuple[bytes, bool]]


class _Sequence(NamedTuple):
    """A sequence as it will be stored: no token of it is ever a Python object."""

    ids: bytes
    piece_length: list[int]
    piece_trained: bytes
    trained: int

    @property
    def length(self) -> int:
        return len(self.ids) // TOKEN_BYTES


@dataclass
class _Draft:
    """A row on its way: the conversation as it came and with its modes, and its sequences."""

    position: int
    own: Conversation
    assigned: Conversation
    copies: int
    targets: list[Target] = field(default_factory=list)
    only_counted: list[Target] = field(default_factory=list)
    sequences: list[_Sequence] = field(default_factory=list)
    own_tokens: tuple[int, int] = (0, 0)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max((sequence.length for sequence in self.sequences), default=0)


class SequenceMaker:
    """Makes the training sequences of rows, for one tokenizer and one plan.

    Raises ValueError if the tokenizer's chat template is not ours.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, plan: Plan) -> None:
        self.renderer, self.plan = Renderer(tokenizer), plan

    def __call__(self, chunk: Chunk) -> Prepared:
        """The sequences of a chunk; a row that cannot be used has its error in its outcome."""
        # A chunk makes many small objects and no cycles. Left to itself the collector would look through everything
        # that torch and transformers have loaded, again and again: half as long again.
        collecting = gc.isenabled()
        gc.disable()
        try:
            return self._made(chunk)
        finally:
            if collecting:
                gc.enable()

    def _made(self, chunk: Chunk) -> Prepared:
        return self._packed(*self._drafts(chunk))

    def conversations(self, chunk: Chunk) -> list[tuple[RowOutcome, Conversation | None]]:
        """What became of each row of a chunk, and the conversation that is trained of it: to be looked at."""
        outcomes, drafts = self._drafts(chunk)
        trained = {draft.position: draft.assigned for draft in drafts}
        return [(outcome, trained.get(position)) for position, outcome in enumerate(outcomes)]

    def _drafts(self, chunk: Chunk) -> tuple[list[RowOutcome], list[_Draft]]:
        outcomes: list[RowOutcome] = []
        drafts: list[_Draft] = []
        for position, (line, raw) in enumerate(chunk.rows):
            if isinstance(raw, Conversation):
                outcome = RowOutcome(line, [], raw, source=raw.source)
            else:
                outcome = read_row(line, raw, chunk.source, chunk.records)
            if outcome.conversation is not None:
                try:
                    drafts.append(self._draft(position, outcome, chunk))
                except DataError as error:
                    outcome = _failed(outcome, error)
            outcomes.append(outcome)
        self._render(drafts)
        fitting = []
        for draft in drafts:
            try:
                fitting.append(self._fitted(draft, outcomes[draft.position].notes))
            except DataError as error:
                outcomes[draft.position] = _failed(outcomes[draft.position], error)
        for draft in fitting[: chunk.checked]:
            self.renderer.check_against_template(draft.assigned)
        return outcomes, fitting

    def _draft(self, position: int, outcome: RowOutcome, chunk: Chunk) -> _Draft:
        own, plan = outcome.conversation, self.plan
        assert own is not None
        assigned = assign_modes(own, plan.mixture)
        shown = own
        if plan.reasoning.active:
            shown = assigned
            assigned = apply_reasoning_options(assigned, plan.reasoning, self.renderer.token_ends, outcome.notes)
        unchanged = shown is own or assigned is shown
        repeated = 1 if chunk.weight == 1 else copies(own, chunk.weight, plan.mixture)
        if not repeated:
            outcome.notes.append(Note("noted", "not_drawn", "a source of a weight below 1"))
        untrained = _steps_without_reasoning(assigned)
        if untrained:
            outcome.notes.extend([Note("noted", "untrained_step", "without reasoning, in thinking mode")] * untrained)
        draft = _Draft(position, own, assigned, repeated, self.renderer.targets(assigned))
        simple = len(own.exchanges) == 1 and set(own.exchanges[0].modes) <= set(assigned.exchanges[0].modes)
        if not unchanged or not simple:
            known = set(draft.targets) if unchanged else set()
            draft.only_counted = [target for target in self.renderer.targets(own) if target not in known]
        return draft

    def _render(self, drafts: Sequence[_Draft]) -> None:
        parts = [
            self.renderer.parts(conversation, target)
            for draft in drafts
            for conversation, targets in ((draft.assigned, draft.targets), (draft.own, draft.only_counted))
            for target in targets
        ]
        pieces = iter(self.renderer.encode_parts(parts))
        for draft in drafts:
            draft.sequences = [_joined(next(pieces)) for _ in draft.targets]
            counted = {target: _joined(next(pieces)).trained for target in draft.only_counted}
            draft.own_tokens = self._own_tokens(draft, counted)

    def _own_tokens(self, draft: _Draft, counted: dict[Target, int]) -> tuple[int, int]:
        """Trained tokens by mode if every exchange were trained in its own mode: what the row brings along."""
        made = zip(draft.targets, draft.sequences, strict=True)
        if draft.only_counted:
            own = {target: sequence.trained for target, sequence in made} | counted
            targets = self.renderer.targets(draft.own)
        else:
            modes = {mode for exchange in draft.own.exchanges for mode in exchange.modes}
            own = {target: sequence.trained for target, sequence in made if target.mode in modes}
            targets = list(own)
        totals = dict.fromkeys(MODES, 0)
        for target in targets:
            totals[target.mode] += own[target]
        thinking, non_thinking = totals.values()
        return thinking, non_thinking

    def _fitted(self, draft: _Draft, notes: list[Note]) -> _Draft:
        """The draft, its reasoning shortened if it must be and may be. Raises DataError `too_long`."""
        limit = self.plan.max_length
        if limit is None or draft.longest <= limit:
            return draft
        longest = draft.longest
        if self.plan.on_long_row == "shorten_reasoning" and self._shorten(draft, limit):
            detail = f"from {longest:,} to {draft.longest:,} tokens"
            notes.append(Note("altered", "shortened_to_fit", detail))
            return draft
        raise DataError(
            "too_long",
            f"the row has {longest:,} tokens, and max_length is {limit:,}. Raise it (and tokens_per_row), or leave "
            "such rows out with on_long_row='drop' (--on_long_row drop), or shorten them with 'shorten_reasoning'.",
        )

    def _shorten(self, draft: _Draft, limit: int) -> bool:
        """Shorten the reasoning until every sequence fits; whether that was possible."""
        for _ in range(SHORTENINGS):
            excess = {}
            for target, sequence in zip(draft.targets, draft.sequences, strict=True):
                if sequence.length > limit and target.mode is not Mode.THINKING:
                    return False
                if sequence.length > limit:
                    excess[target.last] = sequence.length - limit
            if not excess:
                return True
            shorter = shorten_to_fit(draft.assigned, excess, self.renderer.token_ends)
            if shorter is None:
                return False
            draft.assigned = shorter
            parts = [self.renderer.parts(shorter, target) for target in draft.targets]
            draft.sequences = [_joined(pieces) for pieces in self.renderer.encode_parts(parts)]
        return draft.longest <= limit

    def _packed(self, outcomes: list[RowOutcome], drafts: Sequence[_Draft]) -> Prepared:
        cells, before = [("", "")] * len(outcomes), [(0, 0)] * len(outcomes)
        draws = array("d", bytes(8 * len(outcomes)))
        position, copy, length, trained = array("i"), array("i"), array("i"), array("i")
        modes = bytearray()
        ids: list[bytes] = []
        piece_length, piece_trained = array("i"), bytearray()
        number = 0
        for draft in drafts:
            own = draft.own
            cells[draft.position] = (own.source, own.language or language_of(own.exchanges[0].user.content))
            before[draft.position] = draft.own_tokens
            if self.plan.needs_draws:
                draws[draft.position] = draw(self.plan.mixture.seed, "select", own)
            for _ in range(draft.copies):
                for target, sequence in zip(draft.targets, draft.sequences, strict=True):
                    ids.append(sequence.ids)
                    piece_length.extend(sequence.piece_length)
                    piece_trained += sequence.piece_trained
                    position.append(draft.position)
                    copy.append(number)
                    length.append(sequence.length)
                    trained.append(sequence.trained)
                    modes.append(MODES.index(target.mode))
                number += 1
        kept = [outcome._replace(conversation=None) for outcome in outcomes]
        return Prepared(
            *(kept, cells, draws, before, position, copy, bytes(modes), length, trained),
            *(b"".join(ids), piece_length, bytes(piece_trained)),
        )


def _failed(outcome: RowOutcome, error: DataError) -> RowOutcome:
    if error.line is None:
        given = outcome.conversation
        error = error.at(outcome.source, outcome.line if given is None or given.line is None else given.line)
    return outcome._replace(conversation=None, error=error)


def _steps_without_reasoning(conversation: Conversation) -> int:
    """Assistant steps of thinking exchanges that came without reasoning and are therefore context only."""
    missing = 0
    for exchange in conversation.exchanges:
        if Mode.THINKING in exchange.modes and len(exchange.steps) > 1 and exchange.has_reasoning:
            missing += sum(step.role == "assistant" and step.reasoning is None for step in exchange.steps)
    return missing


def _joined(pieces: Pieces) -> _Sequence:
    """The sequence of these pieces, without what follows the last trained one: nothing is learned from that."""
    while pieces and not pieces[-1][1]:
        pieces.pop()
    lengths = [len(ids) // TOKEN_BYTES for ids, _ in pieces]
    flags = bytes([trained for _, trained in pieces])
    learnt = sum(compress(lengths, flags))
    return _Sequence(b"".join([ids for ids, _ in pieces]), lengths, flags, learnt)
