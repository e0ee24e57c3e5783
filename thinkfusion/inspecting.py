# SPDX-License-Identifier: Apache-2.0
"""What training would learn from sources: the account of all rows, and some of them piece by piece."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import compress, islice, pairwise, zip_longest
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from thinkfusion.chat_templates import install_chat_template, installed_template, recognise_dialect
from thinkfusion.checkpointing import TINY_BASE, tiny_base_path
from thinkfusion.conversations import Conversation
from thinkfusion.modes import Mode
from thinkfusion.preparing import survey
from thinkfusion.reading import Note
from thinkfusion.records import open_rows
from thinkfusion.rendering import Rendered, Renderer, Segment, Target
from thinkfusion.row_report import RowReport
from thinkfusion.sequences import Chunk, Plan, Prepared, SequenceMaker
from thinkfusion.sources import Source, as_sources
from thinkfusion.tree_drawing import HEADER, Labelled, Sketch, sketch
from thinkfusion.trees import TrainingSequence

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

KINDS = {
    "prompt": "what the model is given",
    "prefix": "how the prompt announces the mode",
    "reasoning": "trained reasoning",
    "answer": "trained answer",
    "untrained": "context without loss, between what is trained",
}
MAX_SKIPPED = 0.01
PROGRESS_SECONDS = 0.5


class Piece(NamedTuple):
    """Text of one of KINDS. `control` text is one control token; all other text is ordinary, whatever it spells."""

    text: str
    kind: str
    control: bool = False


@dataclass(frozen=True)
class View:
    """One training sequence to be looked at, with its number of tokens and of trained ones."""

    mode: Mode
    tokens: int
    trained: int
    pieces: list[Piece]


@dataclass(frozen=True)
class Sample:
    """One row: its training sequences, or the entry of the row report that says why it has none.

    trees: what training would make of them, if asked for; several if copies of the row are trained in different modes.
    """

    source: str
    line: int
    notes: list[Note] = field(default_factory=list)
    views: list[View] = field(default_factory=list)
    skipped: dict[str, Any] | None = None
    trees: list[Sketch] = field(default_factory=list)


@dataclass(frozen=True)
class Inspection:
    """What training would make of sources.

    examples: the first skipped or altered row of each reason, unless one row is asked for.
    problems: what would stop training. samples: some rows; with_trees: whether their trees were asked for.
    lookalikes: all strings that are control tokens where they are markup, and text in the data.
    """

    report: RowReport
    markup: str
    examples: list[dict[str, Any]]
    problems: list[str]
    samples: list[Sample]
    lookalikes: tuple[str, ...]
    with_trees: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The totals of the row report, the problems, and the trees if asked for, as plain JSON values."""
        totals = {**self.report.to_dict(), "problems": self.problems}
        if self.with_trees:
            totals["trees"] = [
                {"source": sample.source, "row": sample.line, **tree.to_dict()}
                for sample in self.samples
                for tree in sample.trees
            ]
        return totals

    @property
    def advice(self) -> str:
        """What a training run needs to be told because of bad rows; empty if there are none."""
        lost = sum(self.report.skipped.values()) - self.report.asked_for
        if not lost:
            return ""
        share = -(-100 * lost // self.report.read) / 100
        more = f" --max_skipped {share}" if lost > MAX_SKIPPED * self.report.read else ""
        return f"Training stops at the first bad row, unless it is told to leave them out: --on_bad_row skip{more}"


def load_tokenizer(
    checkpoint: str = TINY_BASE,
    *,
    scheme: str | None = None,
    dialect: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id, with our template; its own stays if neither scheme nor dialect is named.

    Raises FileNotFoundError if there is none, ValueError as `install_chat_template`.
    """
    from transformers import AutoConfig, AutoTokenizer

    source = str(tiny_base_path()) if checkpoint == TINY_BASE else checkpoint
    model: Any = None
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise FileNotFoundError(
            f"{checkpoint}: no tokenizer could be loaded ({str(error).strip().splitlines()[0]}). Check the name, run "
            "`hf auth login` if it is private, or name a local folder (--model)."
        ) from None
    if installed_template(tokenizer) is None or scheme or dialect:
        # All that is asked of a model is its config; the weights would take minutes.
        with suppress(OSError, ValueError):
            model = SimpleNamespace(config=AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code))
        chosen = dialect or recognise_dialect(tokenizer, model)
        install_chat_template(tokenizer, scheme=scheme or "control", dialect=chosen)
    return tokenizer


def inspect_sources(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    *,
    samples: int = 3,
    row: int | None = None,
    processes: int = 1,
    trees: bool = False,
) -> Inspection:
    """Read all sources as training would, and look at the first rows of each, or at those of the number `row`.

    trees: make their fusion trees too.

    Raises DataError for a bad row unless the plan skips them, and ValueError if no source has a row of that number.
    """
    files = as_sources(list(sources))
    watch = _Watch(row)
    report, chosen, problems = survey(files, tokenizer, plan, processes=processes, watch=watch)
    watch.done()
    if row is not None and not watch.met:
        raise ValueError(f"there is no row {row}; rows are numbered from 1 to {watch.last_line:,} (--row).")
    places = watch.first(chosen, samples) if row is None else [(name, row) for name in watch.met]
    shown = _Shown(tokenizer, plan, {place: watch.numbers(place, chosen) for place in places}, trees=trees)
    found = {(sample.source, sample.line): sample for sample in shown.read(files)}
    if row is not None:
        found |= {(entry.source, entry.line): entry for entry in _skipped(report, row)}
    template = shown.renderer.template
    return Inspection(
        report,
        f"{template.dialect.name}, scheme {template.scheme.name}",
        _first_of_each(report) if row is None else [],
        problems,
        [found[place] for place in places],
        tuple(text for text in tokenizer.get_added_vocab() if text.strip()),
        trees,
    )


class _Watch:
    """Keeps of each sequence the row that it comes from, and tells a person in front of a terminal that it goes on."""

    def __init__(self, row: int | None) -> None:
        self.row, self.met, self.last_line = row, list[str](), 0
        self._names: dict[str, int] = {}
        self._sources: list[NDArray[np.int32]] = []
        self._lines: list[NDArray[np.int64]] = []
        self._rows, self._told = 0, time.monotonic()

    def __call__(self, prepared: Prepared, keep: NDArray[np.bool_] | None) -> None:
        import numpy as np

        name = prepared.outcomes[0].source
        lines = np.array([outcome.line for outcome in prepared.outcomes], dtype=np.int64)
        self.last_line = max(self.last_line, int(lines[-1]))
        if self.row in lines and name not in self.met:
            self.met.append(name)
        position = np.frombuffer(prepared.position, dtype=np.int32)
        position = position if keep is None else position[keep]
        number = self._names.setdefault(name, len(self._names))
        self._sources.append(np.full(len(position), number, dtype=np.int32))
        self._lines.append(lines[position])
        self._rows += len(lines)
        if sys.stderr.isatty() and time.monotonic() - self._told > PROGRESS_SECONDS:
            self._told = time.monotonic()
            print(f"\r{self._rows:,} rows", end="", file=sys.stderr, flush=True)

    def done(self) -> None:
        """End the display of progress, and make one table of all chunks."""
        import numpy as np

        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        self.source = np.concatenate([np.zeros(0, dtype=np.int32), *self._sources])
        self.line = np.concatenate([np.zeros(0, dtype=np.int64), *self._lines])

    def first(self, chosen: NDArray[np.int64], count: int) -> list[tuple[str, int]]:
        """Places of the first trained rows, evenly from all sources, source after source."""
        import numpy as np

        present = np.zeros(len(self.line), dtype=bool)
        present[chosen] = True
        of_source = []
        for name, number in self._names.items():
            lines = self.line[present & (self.source == number)]
            of_source.append([(name, line) for line in islice(dict.fromkeys(lines.tolist()), count)])
        in_turn = [place for places in zip_longest(*of_source) for place in places if place is not None]
        taken = set(in_turn[:count])
        return [place for places in of_source for place in places if place in taken]

    def numbers(self, place: tuple[str, int], chosen: NDArray[np.int64]) -> list[bool]:
        """For each sequence of a row, one copy of it after another, whether it is trained on."""
        import numpy as np

        name, line = place
        mine = np.flatnonzero((self.source == self._names[name]) & (self.line == line))
        trained: list[bool] = np.isin(mine, chosen).tolist()
        return trained


class _Shown:
    """Reads single rows again, as the pieces that are trained."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        plan: Plan,
        wanted: dict[tuple[str, int], list[bool]],
        *,
        trees: bool = False,
    ) -> None:
        self.make, self.records, self.wanted, self.trees = SequenceMaker(tokenizer, plan), plan.records, wanted, trees
        self.renderer: Renderer = self.make.renderer

    def read(self, sources: Sequence[Source]) -> Iterator[Sample]:
        """Every wanted row; a source is read no further than to the last of them."""
        remaining = set(self.wanted)
        for source in sources:
            lines = {line for name, line in remaining if name == source.name}
            remaining -= {(source.name, line) for line in lines}
            if not lines:
                continue
            options, rows = open_rows(source, self.records, RowReport())
            for line, raw in rows:
                if line in lines:
                    yield self._sample(Chunk(source.name, source.weight, options, [(line, raw)]))
                    lines.remove(line)
                if not lines:
                    break

    def _sample(self, chunk: Chunk) -> Sample:
        ((outcome, conversation),) = self.make.conversations(chunk)
        place = (chunk.source, outcome.line)
        if conversation is None:
            return Sample(*place)
        targets, rendered = self.renderer.targets(conversation), self.renderer.render([conversation])[0]
        trained = self.wanted[place]
        views = [
            View(target.mode, len(each.ids), sum(each.trained), pieces_of(self.renderer, conversation, target))
            for number, (target, each) in enumerate(zip(targets, rendered, strict=True))
            if any(trained[number :: len(targets)])
        ]
        return Sample(
            *place, outcome.notes, views, trees=self._trees(conversation, rendered, trained) if self.trees else []
        )

    def _trees(self, conversation: Conversation, rendered: Sequence[Rendered], trained: list[bool]) -> list[Sketch]:
        """The trees of a row; `trained` says of each sequence, one copy after another, whether it is trained on."""
        import numpy as np

        targets = self.renderer.targets(conversation)
        labelled = [
            Labelled(
                TrainingSequence(np.array(each.ids, dtype=np.int32), np.array(each.labels, dtype=np.int32), each.mode),
                roles_of(self.renderer, conversation, target),
                tuple(exchange + 1 for exchange in sorted(target.trained)),
            )
            for target, each in zip(targets, rendered, strict=True)
        ]
        count = len(targets)
        copies = Counter(tuple(trained[start : start + count]) for start in range(0, len(trained), count or 1))
        chosen = [(list(compress(labelled, flags)), times) for flags, times in copies.items()]
        return [
            sketch(kept, self.renderer.tokenizer, times)
            for kept, times in chosen
            if any(each.sequence.first_trained < len(each.sequence.ids) for each in kept)
        ]


def pieces_of(renderer: Renderer, conversation: Conversation, target: Target) -> list[Piece]:
    """A training sequence as pieces; what follows the last trained one is left out, as in training."""
    segments, kinds = _kinds(renderer, conversation, target)
    return _joined([Piece(part.text, kind, part.control) for part, kind in zip(segments, kinds, strict=True)])


def _kinds(renderer: Renderer, conversation: Conversation, target: Target) -> tuple[list[Segment], list[str]]:
    """The segments up to the last trained one, and which of KINDS each of them is."""
    segments = renderer.segments(conversation, target)
    last = max((index for index, segment in enumerate(segments) if segment.trained), default=len(segments) - 1)
    segments = segments[: last + 1]
    kinds = ["answer" if segment.trained else "untrained" for segment in segments]
    prefix = "".join(renderer.scheme.prefix(target.mode))
    starts = [*_answer_starts(renderer, conversation, target)]
    for start in starts:
        for index in range(start, _reasoning_end(renderer, segments, start, target.mode)):
            kinds[index] = "reasoning" if segments[index].trained else "untrained"
        for index in range(_before(segments, start, prefix), start):
            kinds[index] = "prefix"
    first = min(starts, default=0)
    kinds[:first] = ["prompt" if kind == "untrained" else kind for kind in kinds[:first]]
    return segments, kinds


def roles_of(renderer: Renderer, conversation: Conversation, target: Target) -> list[str]:
    """For each token of a training sequence its role: one of `tree_drawing.LETTERS`, or HEADER.

    Where a token lies on both sides of a border, which it does only within text of one kind of loss, it is counted to
    one of them.
    """
    segments, roles = _kinds(renderer, conversation, target)
    start = 0
    # A target that trains nothing is laid out in turns: what opens, then a user, what answers, and so on.
    for number, part in enumerate(renderer.parts(conversation, replace(target, trained=frozenset()))):
        stop, exchange = min(start + len(part), len(roles)), number // 2 - 1
        context = [index for index in range(start, stop) if roles[index] in ("prompt", "untrained")]
        for index in context:
            roles[index] = "system" if not number else "user" if number % 2 else "history"
        if number and not number % 2 and exchange in target.trained:
            _within_answer(roles, context, stop, _header_end(renderer, conversation, target.mode, exchange))
        start = stop
    ends = [index for index in range(1, len(roles)) if roles[index] != roles[index - 1]] + [len(roles)]
    tokens = [0, *(len(ids) for ids, _ in renderer.encode([segments[:end] for end in ends]))]
    counts = [stop - start for start, stop in pairwise(tokens)]
    return [roles[end - 1] for end, count in zip(ends, counts, strict=True) for _ in range(count)]


def _within_answer(roles: list[str], context: Sequence[int], stop: int, header_end: int) -> None:
    """Tell apart the context in a trained answer: its header, what stands between, and the gap before the next user."""
    inside = max((index for index in range(context[0], stop) if index not in context), default=stop) if context else 0
    for index in context:
        roles[index] = HEADER if index < header_end else "user" if index > inside else "untrained"


def _header_end(renderer: Renderer, conversation: Conversation, mode: Mode, exchange: int) -> int:
    """How many segments stand before what announces the mode to the answer of an exchange."""
    before = replace(conversation, exchanges=conversation.exchanges[:exchange])
    prompt = renderer.prompt_segments(before, mode, [conversation.exchanges[exchange].user])
    return _before(prompt, len(prompt), "".join(renderer.scheme.prefix(mode)))


def _answer_starts(renderer: Renderer, conversation: Conversation, target: Target) -> Iterator[int]:
    """How many segments stand before each trained answer: those of its generation prompt."""
    for index in sorted(target.trained):
        exchange = conversation.exchanges[index]
        before = replace(conversation, exchanges=conversation.exchanges[:index])
        steps = exchange.steps_in(target.mode)
        for number, step in enumerate(steps):
            if step.role == "assistant" and (step.reasoning is not None or target.mode is Mode.NON_THINKING):
                pending = [exchange.user, *steps[:number]]
                yield len(renderer.prompt_segments(before, target.mode, pending))


def _reasoning_end(renderer: Renderer, segments: Sequence[Segment], start: int, mode: Mode) -> int:
    """Where the reasoning that begins at `start` ends, with what closes it; a tool call may follow without that."""
    if mode is Mode.NON_THINKING:
        return start
    scheme = renderer.scheme
    return _after(segments, _after(segments, start, "".join(scheme.thinking_start)) + 1, "".join(scheme.thinking_end))


def _after(segments: Sequence[Segment], index: int, text: str) -> int:
    """The index behind the segments that spell `text` from `index` on; `index` itself if they spell something else."""
    end, spelt = index, ""
    while len(spelt) < len(text) and end < len(segments):
        spelt += segments[end].text
        end += 1
    return end if spelt == text else index


def _before(segments: Sequence[Segment], end: int, text: str) -> int:
    """The index at which the segments that spell `text` up to `end` begin."""
    index = end
    while index and len(text) > sum(len(segment.text) for segment in segments[index:end]):
        index -= 1
    return index


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces, neighbouring texts of one kind joined and empty ones left out."""
    joined: list[Piece] = []
    for piece in pieces:
        if joined and not piece.control and joined[-1][1:] == piece[1:]:
            joined[-1] = joined[-1]._replace(text=joined[-1].text + piece.text)
        elif piece.text:
            joined.append(piece)
    return joined


def _skipped(report: RowReport, row: int) -> Iterator[Sample]:
    for entry in report.entries():
        if entry["line"] == row and entry["kind"] == "skipped":
            yield Sample(entry["source"], row, skipped=entry)


def _first_of_each(report: RowReport) -> list[dict[str, Any]]:
    """The first skipped or altered row of each reason; read no further than needed."""
    wanted = len(report.skipped) + len(report.altered)
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in report.entries() if wanted else ():
        found.setdefault((entry["kind"], entry["reason"]), entry)
        if len(found) == wanted:
            break
    return sorted(found.values(), key=lambda entry: entry["kind"], reverse=True)
