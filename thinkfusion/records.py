# SPDX-License-Identifier: Apache-2.0
"""From files and data sets to conversations, with a report in which every row is accounted for."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from thinkfusion.conversations import Conversation, DataError

logger = logging.getLogger(__name__)

FORMATS = ("messages", "columns")
ON_BAD_ROW = ("error", "skip")
SHOWN_ERRORS = 20
FILE_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt", ".gz", ".zst", ".zip")
HUB_PARTS = 2
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class RecordOptions:
    """How rows are read.

    format: "messages" or "columns" (question, reasoning, answer); None detects it from the first row.
    question_column, reasoning_column, answer_column: names of the columns. A row may lack its reasoning.
    answer_separator: reasoning and answer stand in one answer column, split at the last occurrence of this text.
    remove_pattern: a regular expression; what it matches is removed from reasoning and answer.
    on_bad_row: "error" stops at the first bad row, "skip" leaves bad rows out and counts them by reason.
    """

    format: str | None = None
    question_column: str = "question"
    reasoning_column: str = "reasoning"
    answer_column: str = "answer"
    answer_separator: str | None = None
    remove_pattern: str | None = None
    on_bad_row: str = "error"

    def __post_init__(self) -> None:
        if self.format is not None and self.format not in FORMATS:
            raise ValueError(f"format: {self.format!r} is unknown; choose one of {', '.join(FORMATS)}.")
        if self.on_bad_row not in ON_BAD_ROW:
            raise ValueError(f"on_bad_row: {self.on_bad_row!r} is unknown; choose one of {', '.join(ON_BAD_ROW)}.")
        if self.answer_separator == "":
            raise ValueError("answer_separator: found an empty text, expected what stands before the answer.")
        if self.remove_pattern is not None:
            try:
                re.compile(self.remove_pattern)
            except re.error as error:
                raise ValueError(
                    f"remove_pattern: {self.remove_pattern!r} is no regular expression: {error}."
                ) from None


@dataclass
class RowReport:
    """What became of the rows: read = kept + skipped.

    `sequences` and `tokens` count what is trained, by mode, and are filled in when the rows are rendered: `tokens`
    those with loss, `all_tokens` those computed. `notes` counts what was done to kept rows.
    """

    read: int = 0
    kept: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    sequences: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    all_tokens: int = 0

    def skip(self, error: DataError) -> None:
        """Count a row that was kept so far, or never, as left out for this reason."""
        self.skipped[error.reason] += 1
        if len(self.errors) < SHOWN_ERRORS:
            self.errors.append(str(error))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values; the first errors of skipped rows are under `errors`."""
        return {
            "rows_in": self.read,
            "rows_kept": self.kept,
            "skipped": dict(self.skipped),
            "errors": self.errors,
            "notes": dict(self.notes),
            "sequences": dict(self.sequences),
            "tokens": dict(self.tokens),
            "all_tokens": self.all_tokens,
        }

    def __str__(self) -> str:
        lines = [f"rows: {self.read:,} read = {self.kept:,} kept + {sum(self.skipped.values()):,} skipped"]
        lines += [f"  skipped {count:,}: {reason}" for reason, count in self.skipped.most_common()]
        lines += [f"    e.g. {self.errors[0]}"] if self.errors else []
        lines += [f"  {count:,} × {note}" for note, count in self.notes.items()]
        lines += [
            f"  {mode}: {self.sequences[mode]:,} sequences, {self.tokens[mode]:,} trained tokens"
            for mode in self.sequences
        ]
        return "\n".join(lines)


def read_conversations(
    source: str | Path | Iterable[Mapping[str, Any]],
    options: RecordOptions | None = None,
    *,
    split: str = "train",
) -> tuple[list[Conversation], RowReport]:
    """Read all conversations of a file (.jsonl, .json, .parquet), a `datasets` id, or an iterable of rows.

    Raises FileNotFoundError or ValueError if the source cannot be read or its columns are not known, and DataError
    for the first bad row unless the options skip bad rows. No kept row at all is an error under either policy.
    """
    options = options or RecordOptions()
    name = str(source) if isinstance(source, (str, Path)) else "rows"
    report = RowReport()
    kept: list[Conversation] = []
    for line, row in iterate_rows(source, split):
        report.read += 1
        try:
            if isinstance(row, DataError):
                raise row
            if not isinstance(row, Mapping):
                raise DataError("not_an_object", f"found {type(row).__name__}, expected an object with named fields.")
            if options.format is None:
                options = replace(options, format=_detect_format(row, options, name))
            conversation = _conversation(row, options)
        except DataError as error:
            placed = error.at(name, line)
            if options.on_bad_row == "error":
                raise placed from None
            report.skip(placed)
            continue
        kept.append(replace(conversation, source=name, line=line))
    report.kept = len(kept)
    if not kept:
        raise ValueError(f"{name}: nothing to train on.\n{report}")
    if report.skipped:
        logger.warning("%s: %s", name, report)
    return kept, report


def _conversation(row: Mapping[str, Any], options: RecordOptions) -> Conversation:
    mode = row.get("mode")
    if "mode" in row and mode is None:
        raise DataError("unknown_mode", "mode: found null, expected 'thinking' or 'non_thinking'.")
    if options.format == "messages":
        if "messages" not in row:
            raise DataError("empty_conversation", f"messages: missing; found the fields {', '.join(row)}.")
        return Conversation.from_messages(row["messages"], tools=row.get("tools"), mode=mode)
    question, answer = (_text(row, column) for column in (options.question_column, options.answer_column))
    reasoning = None
    if options.answer_separator is not None:
        before, found, after = answer.rpartition(options.answer_separator)
        if not found:
            raise DataError(
                "missing_separator", f"{options.answer_column}: the separator {options.answer_separator!r} is missing."
            )
        reasoning, answer = before.strip(), after.strip()
    elif row.get(options.reasoning_column) is not None:
        reasoning = _text(row, options.reasoning_column)
    if options.remove_pattern is not None:
        answer = re.sub(options.remove_pattern, "", answer)
        reasoning = None if reasoning is None else re.sub(options.remove_pattern, "", reasoning)
    if not question.strip():
        raise DataError("no_user", f"{options.question_column}: found an empty text, expected a question.")
    reply = {"role": "assistant", "content": answer, "reasoning_content": reasoning or None}
    return Conversation.from_messages([{"role": "user", "content": question}, reply], mode=mode)


def _text(row: Mapping[str, Any], column: str) -> str:
    if column not in row:
        raise DataError("missing_column", f"{column}: this row has no such field; found {', '.join(row)}.")
    if not isinstance(row[column], str):
        raise DataError("bad_message", f"{column}: found {row[column]!r}, expected text.")
    return str(row[column])


def _detect_format(row: Mapping[str, Any], options: RecordOptions, name: str) -> str:
    wanted = (options.question_column, options.answer_column)
    has_columns = all(column in row for column in wanted)
    if "messages" in row and has_columns:
        raise ValueError(f"{name}: found both messages and {', '.join(wanted)}; say which with format (--format).")
    if "messages" in row:
        return "messages"
    if has_columns:
        if (
            options.answer_separator is None
            and options.reasoning_column not in row
            and options.reasoning_column != RecordOptions.reasoning_column
        ):
            raise ValueError(f"{name}: there is no column {options.reasoning_column!r}; found {', '.join(row)}.")
        return "columns"
    missing = ", ".join(repr(column) for column in wanted if column not in row)
    raise ValueError(
        f"{name}: found the columns {', '.join(map(repr, row))}, expected 'messages' or the columns of "
        f"--question_column and --answer_column; missing: {missing}."
    )


def iterate_rows(source: Any, split: str = "train") -> Iterator[tuple[int, Any]]:
    """Rows with their number from 1 (in a text file: the line); a row that cannot be parsed comes as a DataError."""
    if not isinstance(source, (str, Path)):
        yield from enumerate(source, start=1)
        return
    path = Path(source)
    if path.is_dir():
        raise ValueError(f"{source}: this is a directory; name a .jsonl, .json or .parquet file in it.")
    if path.is_file():
        readers = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}
        if path.suffix not in readers:
            raise ValueError(f"{source}: files ending in {path.suffix!r} are not read; use {', '.join(readers)}.")
        yield from readers[path.suffix](path)
    elif (
        path.suffix in FILE_SUFFIXES or path.is_absolute() or str(source).startswith(".") or len(path.parts) > HUB_PARTS
    ):
        raise FileNotFoundError(f"{source}: there is no such file.")
    else:
        yield from _hub_rows(str(source), split)


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = line.removeprefix(BOM) if number == 1 else line
            if text.strip():
                yield number, _parse(text.rstrip(b"\r\n"))


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    rows = _parse(path.read_bytes().removeprefix(BOM))
    if isinstance(rows, DataError):
        raise rows.at(str(path), 1)
    if not isinstance(rows, list):
        raise ValueError(f"{path}: found {type(rows).__name__}, expected a list of rows.")
    yield from enumerate(rows, start=1)


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        return DataError("invalid_utf8", f"byte {error.start + 1} of the row is not UTF-8.")
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if b"\n" in data else ""
        return DataError("invalid_json", f"not JSON: {error.msg}, at {line}column {error.colno}.")
    except (ValueError, RecursionError) as error:
        return DataError("invalid_json", f"no JSON that can be read: {error}.")


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from None


def _hub_rows(name: str, split: str) -> Iterator[tuple[int, Any]]:
    import datasets

    try:
        loaded = datasets.load_dataset(name, split=split)
    except Exception as error:
        # The Hub client has a dozen exception types, and its messages run over many lines.
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise FileNotFoundError(
            f"{name}: neither a file nor a data set that could be loaded from the Hub ({reason}). Check the name, "
            "run `hf auth login` if it is private, or name a local file."
        ) from None
    yield from enumerate(loaded, start=1)
