# SPDX-License-Identifier: Apache-2.0
"""From rows to conversations, with a report in which every row is accounted for."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from thinkfusion.conversations import Conversation
from thinkfusion.formats import RecordOptions, detect_format, parse_row
from thinkfusion.messages import Message
from thinkfusion.reading import DataError, Note
from thinkfusion.row_report import RowOutcome, RowReport
from thinkfusion.sources import Source, as_sources, iterate_raw, parse_raw

__all__ = [
    "Overlap",
    "RecordOptions",
    "RowOutcome",
    "RowReport",
    "account",
    "check_report",
    "iterate_conversations",
    "open_rows",
    "prompt_overlap",
    "read_conversations",
    "read_row",
    "row_key",
]

logger = logging.getLogger(__name__)

EXCERPT = 200
SEPARATOR = b"\xff"
"""Behind each of the texts that are hashed together: a byte that UTF-8 never has."""
HASH_BYTES = 8
SHOWN_PROMPTS = 10
SKIP_HINT = "Leave such rows out with on_bad_row='skip' (--on_bad_row skip)."

_short = reprlib.Repr()
_short.maxlevel, _short.maxdict, _short.maxlist = 3, 8, 3
_short.maxstring = _short.maxother = 60


def read_row(line: int, raw: Any, source: str, options: RecordOptions) -> RowOutcome:
    """Parse and check one row as `iterate_raw` gives it. Pure, so that any process may do it; never raises."""
    notes: list[Note] = []
    try:
        row = parse_raw(raw)
        if isinstance(row, DataError):
            raise row
        if not isinstance(row, Mapping):
            raise DataError("not_an_object", f"found {type(row).__name__}, expected an object with named fields.")
        conversation = replace(parse_row(row, options, notes), source=source, line=line)
        key = row_key(conversation)
    except DataError as error:
        return RowOutcome(line, [], error=error.at(source, line), source=source, excerpt=_excerpt(raw))
    except RecursionError:
        deep = DataError("invalid_json", "no JSON that can be read: nested too deeply.", source=source, line=line)
        return RowOutcome(line, [], error=deep, source=source, excerpt=_excerpt(raw))
    excerpt = _excerpt(raw) if any(note.kind == "altered" for note in notes) else ""
    return RowOutcome(line, notes, conversation, source=source, excerpt=excerpt, key=key)


def account(report: RowReport, outcome: RowOutcome, options: RecordOptions, *, drops: bool = False) -> bool:
    """Count a row, in the order of the rows; whether it is kept.

    A row whose prompt and answer came before is counted, or skipped under `drop_duplicates`. `drops` says that an
    option asked to leave the row out for its error. Else raises its error if bad rows are errors.
    """
    report.read += 1
    error, again = outcome.error, False
    if error is None and outcome.key is not None:
        again = outcome.key[1] in report.row_keys
        if again and options.drop_duplicates:
            error, drops = DataError("duplicate", "prompt and answer are those of an earlier row."), True
            error = error.at(outcome.source, outcome.line)
    if error is not None:
        if options.on_bad_row == "error" and not drops:
            hint = "" if "on_bad_row" in error.message or "on_long_row" in error.message else f" {SKIP_HINT}"
            raise DataError(error.reason, error.message + hint, source=error.source, line=error.line)
        report.skip(error, outcome.excerpt, asked_for=drops)
        return False
    report.kept += 1
    if outcome.key is not None:
        report.prompt_keys.append(outcome.key[0])
        report.row_keys.add(outcome.key[1])
    if again:
        report.note("duplicate")
    for note in outcome.notes:
        report.count(note, outcome)
    return True


def open_rows(
    source: Source, options: RecordOptions, report: RowReport
) -> tuple[RecordOptions, Iterator[tuple[int, Any]]]:
    """The raw rows of a source, and the options with its format: the one named, or that of the first readable row."""
    rows = iterate_raw(source)
    read: list[tuple[int, Any]] = []
    if options.format is None:
        for line, raw in rows:
            read.append((line, raw))
            row = parse_raw(raw)
            if isinstance(row, Mapping):
                options = replace(options, format=detect_format(row, options, source.name))
                break
            if options.on_bad_row == "error":
                break
    if options.format is not None:
        report.formats[source.name] = options.format
    return options, chain(read, rows)


def iterate_conversations(
    sources: Sequence[Source], options: RecordOptions, report: RowReport
) -> Iterator[Conversation]:
    """The conversations of all sources, one after another, as they are read; `report` counts what became of each row.

    Raises DataError for the first bad row unless bad rows are skipped, and ValueError at the end if more were
    skipped than `max_skipped`, or nothing was kept.
    """
    for source in sources:
        named, rows = open_rows(source, options, report)
        for line, raw in rows:
            outcome = read_row(line, raw, source.name, named)
            if account(report, outcome, named) and outcome.conversation is not None:
                yield outcome.conversation
    check_report(report, options, ", ".join(source.name for source in sources))


def check_report(report: RowReport, options: RecordOptions, name: str) -> None:
    """Raise ValueError if nothing was kept, or if more rows were skipped than `max_skipped` allows."""
    if not report.kept:
        raise ValueError(f"{name}: nothing to train on.\n{report}")
    report.check_share(options.max_skipped)


def read_conversations(
    source: str | Path | Source | Iterable[Any],
    options: RecordOptions | None = None,
    *,
    split: str = "train",
) -> tuple[list[Conversation], RowReport]:
    """Read all conversations of a file or a pattern, a Hub id, an iterable of rows, or a list of several sources.

    Raises FileNotFoundError or ValueError if a source cannot be read or its columns are not known, and DataError
    for the first bad row unless the options skip bad rows. No kept row at all is an error under either policy, and
    so are more skipped rows than `max_skipped`.
    """
    report = RowReport()
    kept = list(iterate_conversations(as_sources(source, split), options or RecordOptions(), report))
    if report.skipped or report.altered:
        logger.warning("%s", report)
    return kept, report


class Overlap(NamedTuple):
    """Evaluation prompts found in the training rows: where they stand in the one list, and in the other.

    `places` names the evaluation rows by source and number.
    """

    evaluation: list[int]
    training: list[int]
    places: list[str]
    prompts: int

    def __bool__(self) -> bool:
        return bool(self.evaluation)

    def __str__(self) -> str:
        more = len(self.places) - SHOWN_PROMPTS
        return (
            f"{len(self.evaluation):,} of {self.prompts:,} evaluation prompts are found in {len(self.training):,} "
            f"training rows: {', '.join(self.places[:SHOWN_PROMPTS])}{f' and {more:,} more' if more > 0 else ''}."
        )


def prompt_overlap(prompt_keys: Iterable[int], evaluation: Iterable[Conversation]) -> Overlap:
    """Which evaluation prompts stand in the training rows; `prompt_keys` are those of the report of reading them."""
    wanted: dict[int, list[int]] = {}
    places = []
    for position, conversation in enumerate(evaluation):
        wanted.setdefault(row_key(conversation)[0], []).append(position)
        places.append(f"{conversation.source or 'rows'} row {conversation.line or position + 1}")
    training = [(position, key) for position, key in enumerate(prompt_keys) if key in wanted]
    found = sorted(position for key in {key for _, key in training} for position in wanted[key])
    return Overlap(found, [position for position, _ in training], [places[position] for position in found], len(places))


def row_key(conversation: Conversation) -> tuple[int, int]:
    """Hashes of the prompt (system, tools, all up to the last user message) and of the row with its reasoning.

    As history, earlier exchanges show no reasoning, and so the prompt has none.
    """
    *earlier, last = conversation.exchanges
    prompt = [conversation.system or "", last.user.content]
    answer: list[str] = [*last.modes]
    if conversation.tools:
        prompt.append(repr(conversation.tools))
    for exchange in earlier:
        prompt.append(exchange.user.content)
        for step in exchange.steps:
            prompt += _texts(step)
            answer.append(step.reasoning or "")
        answer += exchange.modes
    for step in (*last.steps, *last.alternative):
        answer += (*_texts(step), step.reasoning or "")
    hashed = blake2b(digest_size=HASH_BYTES)
    for text in prompt:
        hashed.update(text.encode())
        hashed.update(SEPARATOR)
    prompt_key = hashed.digest()
    for text in answer:
        hashed.update(text.encode())
        hashed.update(SEPARATOR)
    return int.from_bytes(prompt_key, "little"), int.from_bytes(hashed.digest(), "little")


def _texts(step: Message) -> tuple[str, ...]:
    if step.tool_calls:
        return step.role, step.content, repr(step.tool_calls)
    return step.role, step.content


def _excerpt(raw: Any) -> str:
    if isinstance(raw, bytes):
        return raw[:EXCERPT].decode("utf-8", "replace")
    if isinstance(raw, DataError):
        return ""
    if isinstance(raw, Mapping):
        fields = (f"{_short.repr(key)}: {_short.repr(value)}" for key, value in islice(raw.items(), 8))
        return ", ".join(fields)[:EXCERPT]
    return _short.repr(raw)[:EXCERPT]
