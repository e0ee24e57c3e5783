# SPDX-License-Identifier: Apache-2.0
"""Every input format: how it is recognised, and how one of its rows becomes a conversation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from thinkfusion.conversations import Conversation, DataError

FORMATS = ("messages", "prompt_completion", "sharegpt", "alpaca", "columns", "paired")
ON_BAD_ROW = ("error", "skip")


class Note(NamedTuple):
    """Something the account counts of a row that is kept: `altered` was repaired, `noted` is kept as it is."""

    kind: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class RecordOptions:
    """How rows are read. The options about rows and their messages stand in the order of the table of bad input."""

    format: str | None = None
    question_column: str = "question"
    reasoning_column: str = "reasoning"
    answer_column: str = "answer"
    answer_separator: str | None = None
    remove_pattern: str | None = None
    on_bad_row: str = "error"
    max_skipped: float = 0.01
    repair: bool = True
    join_messages: bool = False
    drop_first_assistant: bool = False
    plain_control_tokens: bool = False
    reasoning_tags: str | None = None
    drop_reasoning: bool = False
    drop_duplicates: bool = False

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


def detect_format(row: Mapping[str, Any], options: RecordOptions, source: str) -> str:
    """The format that the columns of `row` show."""
    wanted = (options.question_column, options.answer_column)
    has_columns = all(column in row for column in wanted)
    if "messages" in row and has_columns:
        raise ValueError(f"{source}: found both messages and {', '.join(wanted)}; say which with format (--format).")
    if "messages" in row:
        return "messages"
    if has_columns:
        if (
            options.answer_separator is None
            and options.reasoning_column not in row
            and options.reasoning_column != RecordOptions.reasoning_column
        ):
            raise ValueError(f"{source}: there is no column {options.reasoning_column!r}; found {', '.join(row)}.")
        return "columns"
    missing = ", ".join(repr(column) for column in wanted if column not in row)
    raise ValueError(
        f"{source}: found the columns {', '.join(map(repr, row))}, expected 'messages' or the columns of "
        f"--question_column and --answer_column; missing: {missing}."
    )


def parse_row(row: Mapping[str, Any], options: RecordOptions, notes: list[Note]) -> Conversation:
    """The conversation of one row of `options.format`; what was done to it or seen in it is added to `notes`."""
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
