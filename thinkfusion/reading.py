# SPDX-License-Identifier: Apache-2.0
"""How reading a row goes: the error that refuses it, the notes on what was done to it, the options that allow it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple


class DataError(ValueError):
    """A row that cannot be trained on: where it stands, what was found, and what to do.

    `reason` is the short name under which a row report counts it (`unclosed_think`, `empty_answer`, …).
    """

    def __init__(self, reason: str, message: str, *, source: str = "", line: int | None = None) -> None:
        self.reason, self.message, self.source, self.line = reason, message, source, line
        super().__init__(message)

    def at(self, source: str, line: int) -> DataError:
        """The same error with the place it was found at; `line` counts from 1."""
        return DataError(self.reason, self.message, source=source, line=line)

    def __str__(self) -> str:
        place = f"{self.source}, row {self.line}: " if self.line is not None else ""
        return f"{place}{self.message} [{self.reason}]"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_data_error, (self.reason, self.message, self.source, self.line)


def _rebuild_data_error(reason: str, message: str, source: str, line: int | None) -> DataError:
    return DataError(reason, message, source=source, line=line)


class Note(NamedTuple):
    """What the account counts of a row that is kept: `altered` was repaired, `noted` is kept as it is."""

    kind: str
    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class MessageOptions:
    """What may be done to messages that are not as they should be.

    repair: mend what has one meaning only, and count it; False makes such a row a bad row of the same reason.
    join_messages: join two messages in a row of the same role with a blank line.
    drop_first_assistant: leave out what the assistant says before the first user message.
    plain_control_tokens: keep control strings inside answers and reasoning, as plain text. Only a `<think>` block
        that begins the answer is then reasoning.
    reasoning_tags: other tags around the reasoning, with a comma between them: "<thinking>,</thinking>".
    drop_reasoning: leave out the reasoning of rows that are marked as non-thinking.
    """

    repair: bool = True
    join_messages: bool = False
    drop_first_assistant: bool = False
    plain_control_tokens: bool = False
    reasoning_tags: str | None = None
    drop_reasoning: bool = False

    def __post_init__(self) -> None:
        if self.reasoning_tags is None:
            return
        if not isinstance(self.reasoning_tags, str) or len(set(filter(None, self.reasoning_tag_pair))) != 2:
            raise ValueError(
                f"reasoning_tags: found {self.reasoning_tags!r}, expected two tags with a comma between them, such as "
                "'<thinking>,</thinking>'."
            )

    @cached_property
    def reasoning_tag_pair(self) -> tuple[str, ...]:
        """The tags that open and close the reasoning; nothing if none are named."""
        return tuple(tag.strip() for tag in self.reasoning_tags.split(",")) if self.reasoning_tags else ()


class Reading:
    """The row that is being read: its options, what was noted of it, and the argument schemas of its tools by name.

    A row has at most one note of each reason, since the account counts rows.
    """

    __slots__ = ("_seen", "notes", "options", "schemas")

    def __init__(self, options: MessageOptions, notes: list[Note]) -> None:
        self.options, self.notes = options, notes
        self.schemas: dict[str, Any] = {}
        self._seen: set[str] = set()

    def repaired(self, reason: str, detail: str) -> None:
        """Note a repair that is made by default; raises DataError if repairs are switched off."""
        if not self.options.repair:
            raise DataError(reason, f"{detail} It would be repaired, but repairs are switched off: use --repair.")
        self.altered(reason, detail)

    def altered(self, reason: str, detail: str) -> None:
        """Note a change that an option asked for."""
        self._add(Note("altered", reason, detail))

    def noted(self, reason: str, detail: str) -> None:
        """Note what is kept as it is."""
        self._add(Note("noted", reason, detail))

    def _add(self, note: Note) -> None:
        if note.reason not in self._seen:
            self._seen.add(note.reason)
            self.notes.append(note)


def show(value: Any) -> str:
    """A short, printable form of `value` for an error message."""
    try:
        text = repr(value[:100] if isinstance(value, (str, bytes)) else value)
    except Exception:
        # A value of any type may stand in a row, and one nested too deeply has no repr.
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}…"


def fields_of(row: Any) -> str:
    """The names of the fields of an object, for an error message."""
    names = ", ".join(name if isinstance(name, str) and name.isprintable() else show(name) for name in row)
    return names if len(names) <= 200 else f"{names[:197]}…"
