# SPDX-License-Identifier: Apache-2.0
"""Every input format: how it is recognised, and how one of its rows becomes a conversation."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from thinkfusion.conversations import (
    REASONING_FIELDS,
    Conversation,
    DataError,
    Message,
    MessageOptions,
    Note,
    converse,
    read_messages,
    read_mode,
)
from thinkfusion.messages import Placed, assistant_message, one_reasoning_of, parse_call, read_message
from thinkfusion.modes import THINK_CLOSE, Mode
from thinkfusion.reading import Reading, fields_of, show
from thinkfusion.texts import check_data
from thinkfusion.tool_calls import parse_json, read_tools

__all__ = ["FORMATS", "ON_BAD_ROW", "DataError", "Note", "RecordOptions", "detect_format", "parse_row"]

ON_BAD_ROW = ("error", "skip")
MODE_COLUMNS = ("mode", "enable_thinking")
LANGUAGE_COLUMNS = ("language", "lang")
_MEDIA_COLUMNS = frozenset({"images", "videos", "audios"})

_KEY_COLUMNS = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "columns": ("question", "answer"),
    "paired": ("thinking", "non_thinking"),
}
FORMATS = tuple(_KEY_COLUMNS)


@dataclass(frozen=True, kw_only=True)
class RecordOptions(MessageOptions):
    """How rows are read.

    format: one of FORMATS; None recognises it by the columns of the first row.
    question_column, reasoning_column, answer_column: names of the columns. A row may lack its reasoning.
    answer_separator: reasoning and answer stand in one answer column, split at the last occurrence of this text.
    remove_pattern: a regular expression; what it matches is removed from reasoning and answer.
    on_bad_row: "error" stops at the first bad row, "skip" leaves bad rows out and counts them by reason.
    max_skipped: the share of skipped rows above which reading stops all the same.
    drop_duplicates: leave out a row with the prompt and the answer of an earlier one.

    The other options say what may be done to messages; see MessageOptions.
    """

    format: str | None = None
    question_column: str = "question"
    reasoning_column: str = "reasoning"
    answer_column: str = "answer"
    answer_separator: str | None = None
    remove_pattern: str | None = None
    on_bad_row: str = "error"
    max_skipped: float = 0.01
    drop_duplicates: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format is not None and self.format not in FORMATS:
            raise ValueError(f"format: {self.format!r} is unknown; choose one of {', '.join(FORMATS)}.")
        if self.on_bad_row not in ON_BAD_ROW:
            raise ValueError(f"on_bad_row: {self.on_bad_row!r} is unknown; choose one of {', '.join(ON_BAD_ROW)}.")
        if self.answer_separator == "":
            raise ValueError("answer_separator: found an empty text, expected what stands before the answer.")
        if not isinstance(self.max_skipped, (int, float)) or not 0 <= self.max_skipped <= 1:
            raise ValueError(f"max_skipped: found {self.max_skipped!r}, expected a share of the rows from 0 to 1.")
        if self.remove_pattern is not None:
            try:
                re.compile(self.remove_pattern)
            except re.error as error:
                raise ValueError(
                    f"remove_pattern: {self.remove_pattern!r} is no regular expression: {error}."
                ) from None

    @property
    def key_columns(self) -> dict[str, tuple[str, ...]]:
        """The columns by which each format is recognised."""
        return {**_KEY_COLUMNS, "columns": (self.question_column, self.answer_column)}


def detect_format(row: Mapping[str, Any], options: RecordOptions, source: str) -> str:
    """The format that the columns of a row show; raises ValueError if they show none, or more than one."""
    columns = options.key_columns
    found = [name for name, keys in columns.items() if all(key in row for key in keys)]
    if "columns" in found and columns["columns"] != _KEY_COLUMNS["columns"] and "alpaca" in found:
        # Who names the columns of an Alpaca row wants to read them as named.
        found.remove("alpaca")
    if len(found) > 1:
        # In a table of mixed rows, the columns of the other format are there and null.
        filled = [name for name in found if any(row[key] is not None for key in columns[name])]
        found = filled if len(filled) == 1 else found
    if len(found) > 1:
        shown = " and ".join(", ".join(columns[name]) for name in found)
        raise ValueError(
            f"{source}: found both {shown}, the columns of the formats {' and '.join(found)}; say which with format "
            "(--format)."
        )
    if not found:
        raise _unknown_format(row, options, source)
    if found == ["columns"] and options.answer_separator is None and options.reasoning_column not in row:
        _check_reasoning_column(row, options, source)
    return found[0]


def _unknown_format(row: Mapping[str, Any], options: RecordOptions, source: str) -> ValueError:
    known = "; ".join(f"{name}: {', '.join(map(repr, keys))}" for name, keys in options.key_columns.items())
    missing = ", ".join(repr(key) for key in options.key_columns["columns"] if key not in row)
    return ValueError(
        f"{source}: found the columns {', '.join(map(repr, row))}, which are those of no known format ({known}). "
        f"Name the columns with --question_column and --answer_column; missing: {missing}."
    )


def _check_reasoning_column(row: Mapping[str, Any], options: RecordOptions, source: str) -> None:
    if options.reasoning_column != RecordOptions.reasoning_column:
        raise ValueError(f"{source}: there is no column {options.reasoning_column!r}; found {fields_of(row)}.")


def parse_row(row: Mapping[str, Any], options: RecordOptions, notes: list[Note]) -> Conversation:
    """The conversation of one row, read in `options.format`; what was done to it is added to `notes`.

    Raises DataError, which names the field and what was found in it, for a row that is no valid conversation.
    """
    if options.format is None:
        raise ValueError("format: parse_row needs one; detect_format tells it from a row.")
    if not isinstance(row, Mapping):
        raise DataError("not_an_object", f"found {type(row).__name__}, expected an object with named fields.")
    if _MEDIA_COLUMNS & row.keys():
        _refuse_media(row)
    reading = Reading(options, notes)
    mode = _mode(row) if "mode" in row or "enable_thinking" in row or "chat_template_kwargs" in row else None
    return _READERS[options.format](_Row(row, options, reading, mode))


def _refuse_media(row: Mapping[str, Any]) -> None:
    for column in _MEDIA_COLUMNS & row.keys():
        if row[column]:
            raise DataError(
                "unsupported_modality", f"{column}: found {show(row[column])}, expected none: only text is trained on."
            )


def _mode(row: Mapping[str, Any]) -> Mode | None:
    given = {}
    for column in MODE_COLUMNS:
        if column in row:
            if row[column] is None:
                raise DataError("unknown_mode", f"{column}: found null, expected 'thinking' or 'non_thinking'.")
            given[column] = read_mode(row[column], column)
    switches = row.get("chat_template_kwargs")
    for name in ("enable_thinking", "thinking"):
        # A key that only other rows have is null here.
        value = switches.get(name) if isinstance(switches, Mapping) else None
        if value is not None:
            given[f"chat_template_kwargs.{name}"] = read_mode(value, f"chat_template_kwargs.{name}")
    if len(set(given.values())) > 1:
        raise DataError("mode_conflict", f"mode: {' and '.join(given)} say different modes. Keep one of them.")
    return next(iter(given.values()), None)


@dataclass
class _Row:
    """A row that is being read."""

    fields: Mapping[str, Any]
    options: RecordOptions
    reading: Reading
    mode: Mode | None

    def tools(self) -> tuple[dict[str, Any], ...]:
        given = self.fields.get("tools")
        return read_tools(given, self.reading) if given is not None else ()

    def text(self, column: str) -> str:
        """The text of a column that must be there."""
        value = self.fields.get(column)
        if isinstance(value, str):
            return value
        if column not in self.fields:
            raise DataError("missing_column", f"{column}: this row has no such field; found {fields_of(self.fields)}.")
        raise DataError("bad_message", f"{column}: found {show(value)}, expected text.")

    def optional_text(self, column: str) -> str:
        """The text of a column that may be absent or null."""
        return "" if self.fields.get(column) is None else self.text(column)

    def reasoning(self, but: str = "") -> str | None:
        """The reasoning that stands beside the answer, in the column of the options or one of the usual names."""
        columns = dict.fromkeys((self.options.reasoning_column, *REASONING_FIELDS))
        given = {name: self.fields[name] for name in columns if name != but and self.fields.get(name) is not None}
        return one_reasoning_of(given, "row", self.reading) if given else None

    def converse(self, placed: Sequence[Placed], tools: tuple[dict[str, Any], ...] = ()) -> Conversation:
        language = next((self.fields[name] for name in LANGUAGE_COLUMNS if name in self.fields), "")
        return converse(
            placed,
            self.reading,
            tools=tools,
            mode=self.mode,
            language=language if isinstance(language, str) else "",
        )

    def user(self, column: str, text: str) -> Placed:
        if not text.strip():
            raise DataError("no_user", f"{column}: found an empty text, expected a question.")
        check_data(column, text, self.reading)
        return Placed(Message("user", text), column)

    def answer(self, column: str, text: str, reasoning: str | None) -> Placed:
        return Placed(assistant_message(text, reasoning, column, self.reading), column)

    def system(self) -> list[Placed]:
        """The system text that stands in a column of its own, as a message."""
        text = self.optional_text("system")
        if not text:
            return []
        check_data("system", text, self.reading)
        return [Placed(Message("system", text), "system")]


def _read_messages_row(row: _Row) -> Conversation:
    if "messages" not in row.fields:
        raise DataError("empty_conversation", f"messages: missing; found the fields {fields_of(row.fields)}.")
    tools = row.tools()
    return row.converse([*row.system(), *read_messages(row.fields["messages"], "messages", row.reading)], tools)


def _read_columns(row: _Row) -> Conversation:
    options = row.options
    question, answer = row.text(options.question_column), row.text(options.answer_column)
    reasoning = None
    if options.answer_separator is not None:
        before, found, after = answer.rpartition(options.answer_separator)
        if not found:
            raise DataError(
                "missing_separator", f"{options.answer_column}: the separator {options.answer_separator!r} is missing."
            )
        reasoning, answer = before.strip(), after.strip()
    elif row.fields.get(options.reasoning_column) is not None:
        reasoning = row.text(options.reasoning_column)
    if options.remove_pattern is not None:
        answer = re.sub(options.remove_pattern, "", answer)
        reasoning = None if reasoning is None else re.sub(options.remove_pattern, "", reasoning)
    if reasoning is not None:
        reasoning = one_reasoning_of({options.reasoning_column: reasoning}, options.answer_column, row.reading)
    user = row.user(options.question_column, question)
    answered = row.answer(options.answer_column, answer, reasoning)
    return row.converse([*row.system(), user, answered], row.tools())


def _read_prompt_completion(row: _Row) -> Conversation:
    """As in TRL, what stands in the prompt is context: only answers of the completion are trained."""
    tools = row.tools()
    prompt = _prompt(row, "prompt")
    completion = row.fields.get("completion")
    if isinstance(completion, str):
        answer = [row.answer("completion", completion, row.reasoning())]
    elif completion is None:
        raise DataError("empty_answer", "completion: found no text and no message, expected an answer.")
    else:
        answer = read_messages(completion, "completion", row.reading)
    return row.converse([*prompt, *answer], tools)


def _prompt(row: _Row, column: str) -> list[Placed]:
    """The messages of a prompt, given as such or as the user's text: context that is never trained."""
    prompt = row.fields.get(column)
    if isinstance(prompt, (list, tuple)):
        turns = [*row.system(), *read_messages(prompt, column, row.reading)]
    else:
        turns = [*row.system(), row.user(column, row.text(column))]
    return [turn._replace(context=True) for turn in turns]


_SHAREGPT_ROLES = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"},
    **{"observation": "tool", "tool": "tool"},
}
"""Names that are the format's own, so that reading them changes nothing that would have to be counted."""


def _read_sharegpt(row: _Row) -> Conversation:
    turns = row.fields.get("conversations")
    if isinstance(turns, str):
        try:
            turns = parse_json(turns)
            row.reading.repaired("parsed_json", "conversations: a JSON text, read as the list that it holds.")
        except ValueError:
            pass
    if not isinstance(turns, Sequence) or isinstance(turns, (str, bytes, bytearray)) or not turns:
        raise DataError(
            "empty_conversation", f"conversations: found {show(turns)}, expected a list of at least one message."
        )
    tools = row.tools()
    placed = [
        read_message(_from_sharegpt(turn, f"conversations[{index}]"), f"conversations[{index}]", row.reading)
        for index, turn in enumerate(turns)
    ]
    return row.converse([*row.system(), *placed], tools)


def _from_sharegpt(turn: Any, place: str) -> Any:
    """A turn as a message; one that is written as a message already is left as it is."""
    if not isinstance(turn, Mapping) or "from" not in turn or turn.get("role") is not None:
        return turn
    role = turn["from"]
    if role == "function_call":
        return _sharegpt_call(turn.get("value"), place)
    known = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    message = {name: turn[name] for name in REASONING_FIELDS if turn.get(name) is not None}
    message["role"] = known
    if "value" in turn:
        message["content"] = turn["value"]
    return message


def _sharegpt_call(value: Any, place: str) -> dict[str, Any]:
    """A call, or a list of calls, as JSON text; a think block may stand before it."""
    thought = ""
    if isinstance(value, str):
        before, closed, after = value.rpartition(THINK_CLOSE)
        thought = before + closed
        value = parse_call(after, f"{place}.value")
    calls = value if isinstance(value, list) else [value]
    return {"role": "assistant", "content": thought, "tool_calls": calls}


def _read_alpaca(row: _Row) -> Conversation:
    parts = (row.text("instruction"), row.optional_text("input"))
    user = row.user("instruction", "\n".join(part for part in parts if part.strip()))
    answer = row.answer("output", row.text("output"), row.reasoning())
    return row.converse([*row.system(), *_history(row), user, answer], row.tools())


def _history(row: _Row) -> list[Placed]:
    """Earlier exchanges, each a list of what the user said and what was answered."""
    history = row.fields.get("history")
    if history is None:
        return []
    if not isinstance(history, (list, tuple)):
        raise DataError("bad_message", f"history: found {show(history)}, expected a list of pairs.")
    placed = []
    for index, pair in enumerate(history):
        place = f"history[{index}]"
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DataError("bad_message", f"{place}: found {show(pair)}, expected a question and an answer.")
        placed += [row.user(f"{place}[0]", pair[0]), row.answer(f"{place}[1]", pair[1], None)]
    return placed


def _read_paired(row: _Row) -> Conversation:
    """Both answers to one prompt: the exchange holds the thinking one, its alternative the non-thinking one."""
    if row.mode is not None:
        raise DataError(
            "mode_conflict", "mode: the row has an answer for each mode, and names one mode. Remove that column."
        )
    tools = row.tools()
    prompt = _paired_prompt(row)
    thinking = row.converse(_paired_turns(row, "thinking", prompt), tools)
    row.mode = Mode.NON_THINKING
    plain = row.converse(_paired_turns(row, "non_thinking", prompt), tools)
    if not thinking.exchanges[-1].has_reasoning:
        raise DataError(
            "missing_reasoning",
            "thinking: the answer has no reasoning. Give it in <think>…</think>, in reasoning_content, or in a "
            "column of its own (--reasoning_column).",
        )
    if plain.exchanges[-1].has_reasoning:
        raise DataError(
            "unexpected_reasoning",
            "non_thinking: the answer has reasoning. Remove it, or have it left out with --drop_reasoning.",
        )
    return _paired(thinking, plain)


def _paired_prompt(row: _Row) -> list[Placed]:
    """The prompt beside the answers; empty where both answers are whole conversations."""
    column = next((name for name in ("prompt", row.options.question_column) if row.fields.get(name) is not None), None)
    return [] if column is None else _prompt(row, column)


def _paired_turns(row: _Row, column: str, prompt: Sequence[Placed]) -> list[Placed]:
    """The prompt and the answer of one mode, the latter a text, a message, messages, or a whole conversation."""
    value = row.fields.get(column)
    if value is None:
        raise DataError("empty_answer", f"{column}: found no text and no message, expected an answer.")
    if isinstance(value, str):
        turns = [row.answer(column, value, row.reasoning(but="thinking") if column == "thinking" else None)]
    elif isinstance(value, Mapping):
        turns = [read_message(value, column, row.reading)]
    else:
        turns = read_messages(value, column, row.reading)
    if not prompt:
        return [*row.system(), *turns]
    if turns[0].message.role not in ("system", "user"):
        return [*prompt, *turns]
    given = [_said(turn.message) for turn in turns[: len(prompt)]]
    if given != [_said(turn.message) for turn in prompt]:
        raise DataError("pair_mismatch", f"{column}: its messages do not begin with those of the prompt.")
    return [*prompt, *turns[len(prompt) :]]


def _said(message: Message) -> tuple[Any, ...]:
    return message.role, message.content, message.tool_calls


def _paired(thinking: Conversation, plain: Conversation) -> Conversation:
    """One conversation from the two, whose prompts must be the same but for reasoning of earlier answers."""
    prompts = [
        (
            whole.system,
            [_said(step) for each in whole.exchanges[:-1] for step in (each.user, *each.steps)],
            whole.exchanges[-1].user,
        )
        for whole in (thinking, plain)
    ]
    if prompts[0] != prompts[1]:
        raise DataError(
            "pair_mismatch",
            "thinking and non_thinking: their prompts differ, expected two answers to the same messages. Correct one "
            "of them, or make two rows.",
        )
    both = (Mode.THINKING, Mode.NON_THINKING)
    earlier = [
        replace(exchange, modes=both) if exchange.modes and exchange.has_reasoning else exchange
        for exchange in thinking.exchanges[:-1]
    ]
    last = replace(thinking.exchanges[-1], modes=both, alternative=plain.exchanges[-1].steps)
    return replace(thinking, exchanges=(*earlier, last))


_READERS: dict[str, Callable[[_Row], Conversation]] = {
    "messages": _read_messages_row,
    "prompt_completion": _read_prompt_completion,
    "sharegpt": _read_sharegpt,
    "alpaca": _read_alpaca,
    "columns": _read_columns,
    "paired": _read_paired,
}
