# SPDX-License-Identifier: Apache-2.0
"""One message: what it is, and how it is read from the many ways in which data sets write it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from thinkfusion.modes import THINK_CLOSE, THINK_OPEN
from thinkfusion.reading import DataError, Reading, fields_of, show
from thinkfusion.texts import (
    OTHER_REASONING_TAGS,
    THINK_TAGS,
    check_characters,
    check_data,
    check_written,
    control_string,
    take_inline_reasoning,
)
from thinkfusion.tool_calls import as_list, parse_json, read_tool_call

ROLES = ("system", "user", "assistant", "tool")
ROLE_ALIASES = {
    **{"human": "user", "gpt": "assistant", "model": "assistant", "developer": "system"},
    **{"observation": "tool", "function": "tool"},
}
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
TEXT_PARTS = ("text", "output_text", "input_text")
REASONING_PARTS = ("reasoning", "thinking")
CALL_PARTS = ("tool_call", "function_call", "tool_use")
MEDIA = ("image", "audio", "video")

_ROLE_SET = frozenset(ROLES)
_FIRST_OF_TAGS = tuple({tag[0] for tag in OTHER_REASONING_TAGS})


@dataclass(frozen=True)
class Message:
    """One message. `reasoning` is what an assistant thought before `content`; None or text that is not blank.

    `tool_calls` holds `{"name": str, "arguments": dict}`, in the order of the calls.
    """

    role: str
    content: str = ""
    reasoning: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The message as `apply_chat_template` takes it."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [{"type": "function", "function": call} for call in self.tool_calls]
        return message


class Placed(NamedTuple):
    """A message with what only its checking needs: its place in the row, and the ids that tie results to calls.

    `call_ids` holds the ids of an assistant's calls; `answers` the call id and the name that a tool's result gives.
    `context` messages are never trained.
    """

    message: Message
    place: str
    call_ids: tuple[Any, ...] = ()
    answers: tuple[Any, Any] = (None, None)
    context: bool = False


class _Parts(NamedTuple):
    """The parts of a content: joined text, the pieces it was joined from, reasoning, calls."""

    text: str | None
    pieces: list[str]
    reasoning: str | None
    calls: list[tuple[str, Any]]


def read_message(raw: Any, place: str, reading: Reading) -> Placed:
    """One message of a row, checked; raises DataError, which names the message and the field."""
    if not isinstance(raw, Mapping):
        raise DataError("bad_message", f"{place}: found {show(raw)}, expected an object with role and content.")
    role = _role(raw, place, reading)
    content = raw.get("content")
    if type(content) is str:
        parts = None
    elif isinstance(content, (list, tuple)):
        parts = _read_parts(content, f"{place}.content", role)
        content = parts.text
    else:
        parts = None
        _check_content(raw, content, role, place)
    if role == "assistant":
        return _read_assistant(raw, content, parts, place, reading)
    if raw.get("tool_calls"):
        raise DataError("bad_message", f"{place}.tool_calls: only an assistant calls tools, found role {role!r}.")
    text = content or ""
    check_data(f"{place}.content", text, reading)
    answers = (raw.get("tool_call_id"), raw.get("name")) if role == "tool" else (None, None)
    return Placed(Message(role, text), place, (), answers)


def _role(raw: Mapping[str, Any], place: str, reading: Reading) -> str:
    role = raw.get("role")
    if not isinstance(role, str):
        if "role" not in raw:
            raise DataError("bad_message", f"{place}.role: missing; found the fields {fields_of(raw)}.")
    elif role in _ROLE_SET:
        return role
    else:
        name = role.strip().lower()
        known = ROLE_ALIASES.get(name, name)
        if known in _ROLE_SET:
            if name != role:
                reading.repaired("role_case", f"{place}.role: {show(role)} is read as {name!r}.")
            if known != name:
                reading.repaired("role_alias", f"{place}.role: {name!r} is read as {known!r}.")
            return known
    raise DataError(
        "unknown_role",
        f"{place}.role: found {show(role)}, expected one of {', '.join(ROLES)} (or {', '.join(ROLE_ALIASES)}).",
    )


def _check_content(raw: Mapping[str, Any], content: Any, role: str, place: str) -> None:
    """Refuse a content that is neither text nor, with an assistant's calls or reasoning, null."""
    if isinstance(content, str) or (content is None and role == "assistant" and len(raw) > 1):
        return
    if "content" not in raw:
        raise DataError("bad_message", f"{place}.content: missing; found the fields {fields_of(raw)}.")
    raise DataError("bad_message", f"{place}.content: found {show(content)}, expected text.")


def _read_assistant(
    raw: Mapping[str, Any], content: str | None, parts: _Parts | None, place: str, reading: Reading
) -> Placed:
    calls: tuple[dict[str, Any], ...] = ()
    ids: tuple[Any, ...] = ()
    reasoning = None
    if len(raw) > 2 or parts is not None or content is None:
        calls, ids = _calls(raw, parts, place, reading)
        reasoning = _reasoning_field(raw, parts, place, reading)
    message = assistant_message(content, reasoning, place, reading, calls=calls, pieces=parts.pieces if parts else ())
    return Placed(message, place, ids)


def assistant_message(
    content: str | None,
    reasoning: str | None,
    place: str,
    reading: Reading,
    *,
    calls: tuple[dict[str, Any], ...] = (),
    pieces: Sequence[str] = (),
) -> Message:
    """An assistant's message from its texts: inline reasoning taken out of the content, control strings refused."""
    where = f"{place}.content"
    given, content = content, content or ""
    check_characters(where, content, reading)
    if _may_hold_tags(content, reading):
        _check_pieces(where, content, pieces)
        if not _closes_another(content, reasoning):
            inline, content = take_inline_reasoning(content, place, reading)
            reasoning = _one_reasoning(reasoning, inline, place, reading)
        check_written(where, content, reading)
    if reasoning is not None:
        check_written(f"{place}.reasoning", reasoning, reading)
    if not calls and not content.strip():
        raise DataError(
            "empty_answer",
            f"{where}: found {show(given)}, but an assistant message without tool calls needs an answer.",
        )
    return Message("assistant", content, reasoning, calls)


def _may_hold_tags(content: str, reading: Reading) -> bool:
    """Whether a close look is worth its time; most answers hold no bracket at all."""
    return (
        control_string(content) is not None
        or reading.options.reasoning_tags is not None
        or content[:64].lstrip().startswith(_FIRST_OF_TAGS)
    )


def _closes_another(content: str, reasoning: str | None) -> bool:
    """Whether a `</think>` without `<think>` cannot be the end of a reasoning, since that stands in a field."""
    if reasoning is None or THINK_OPEN in content or THINK_CLOSE not in content:
        return False
    return content.partition(THINK_CLOSE)[0].strip() != reasoning.strip()


def _check_pieces(where: str, content: str, pieces: Sequence[str]) -> None:
    """Refuse a think tag that comes about only by joining the parts of a content."""
    for tag in THINK_TAGS if len(pieces) > 1 else ():
        if content.count(tag) != sum(piece.count(tag) for piece in pieces):
            raise DataError(
                "control_token_in_answer",
                f"{where}: the parts together spell the control string {tag}, which none of them holds. Remove it.",
            )


def _one_reasoning(field: str | None, inline: str | None, place: str, reading: Reading) -> str | None:
    if field is None or inline is None:
        return inline if field is None else field
    if field.strip() != inline.strip():
        raise DataError(
            "conflicting_reasoning",
            f"{place}: the reasoning of its field and that inside <think>…</think> differ. Keep one of them.",
        )
    reading.repaired("duplicate_reasoning", f"{place}: the same reasoning in a field and inside the content.")
    return field


def _reasoning_field(raw: Mapping[str, Any], parts: _Parts | None, place: str, reading: Reading) -> str | None:
    given = {name: raw[name] for name in REASONING_FIELDS if raw.get(name) is not None}
    if parts is not None and parts.reasoning is not None:
        given["content"] = parts.reasoning
    return one_reasoning_of(given, place, reading) if given else None


def one_reasoning_of(given: Mapping[str, Any], place: str, reading: Reading) -> str | None:
    """The one text that the fields of a reasoning hold, None if all are blank."""
    texts: dict[str, str] = {}
    for name, value in given.items():
        if not isinstance(value, str):
            raise DataError("bad_message", f"{place}.{name}: found {show(value)}, expected text.")
        check_characters(f"{place}.{name}", value, reading)
        if value and not value.strip():
            reading.repaired("blank_reasoning", f"{place}.{name}: white space only, which is no reasoning.")
        elif value:
            texts.setdefault(value.strip(), value)
    if len(texts) > 1:
        raise DataError(
            "conflicting_reasoning", f"{place}: {' and '.join(given)} hold different texts. Keep one of them."
        )
    if texts and sum(bool(value.strip()) for value in given.values()) > 1:
        reading.repaired("duplicate_reasoning", f"{place}: the same reasoning in {' and '.join(given)}.")
    return next(iter(texts.values()), None)


def _calls(
    raw: Mapping[str, Any], parts: _Parts | None, place: str, reading: Reading
) -> tuple[tuple[dict[str, Any], ...], tuple[Any, ...]]:
    """The calls of a message with their ids: in `tool_calls`, in the older `function_call`, or among its parts."""
    given = as_list(f"{place}.tool_calls", raw.get("tool_calls"), "bad_message")
    found = [(f"{place}.tool_calls[{number}]", call) for number, call in enumerate(given)]
    if raw.get("function_call"):
        found.append((f"{place}.function_call", raw["function_call"]))
    found += parts.calls if parts is not None else []
    calls = tuple(read_tool_call(where, call, reading) for where, call in found)
    return calls, tuple(call.get("id") for _, call in found)


def _read_parts(content: Sequence[Any], place: str, role: str) -> _Parts:
    pieces: list[str] = []
    reasoning = None
    calls: list[tuple[str, Any]] = []
    for index, part in enumerate(content):
        where = f"{place}[{index}]"
        kind = _part_kind(part, where)
        if kind in TEXT_PARTS:
            if calls:
                raise DataError("bad_message", f"{where}: found text after a tool call, expected it before the calls.")
            pieces.append(_part_text(part, where))
        elif role == "assistant" and kind in REASONING_PARTS:
            if pieces or calls:
                raise DataError("late_think", f"{where}: the reasoning begins after the answer.")
            if reasoning is not None:
                raise DataError("multiple_think", f"{where}: found a second part of reasoning, expected one.")
            reasoning = _part_text(part, where)
        elif role == "assistant" and kind in CALL_PARTS:
            calls.append((where, _part_call(part, where)))
        else:
            known = (*TEXT_PARTS, *(REASONING_PARTS + CALL_PARTS if role == "assistant" else ()))
            raise DataError(
                "unknown_part",
                f"{where}.type: found {show(kind)} in a message of role {role!r}, expected one of {', '.join(known)}.",
            )
    # An empty list of a user is an empty text; with an assistant, `empty_answer` tells of it.
    return _Parts("".join(pieces), pieces, reasoning, calls)


def _part_kind(part: Any, where: str) -> Any:
    if isinstance(part, str):
        return "text"
    if not isinstance(part, Mapping):
        raise DataError("bad_message", f"{where}: found {show(part)}, expected an object with type and text.")
    kind = part.get("type")
    if isinstance(kind, str) and any(name in kind.lower() for name in MEDIA):
        raise DataError(
            "unsupported_modality", f"{where}.type: found {show(kind)}, expected text: only text can be trained on."
        )
    return "text" if kind is None and isinstance(part.get("text"), str) else kind


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type")
    for key in dict.fromkeys((kind, "text", "value", "content", *REASONING_PARTS)):
        value = part.get(key)
        if value is None:
            continue
        if not isinstance(value, str):
            raise DataError("bad_message", f"{where}.{key}: found {show(value)}, expected text.")
        return value
    raise DataError("bad_message", f"{where}: found no text under text or value; found the fields {fields_of(part)}.")


def _part_call(part: Mapping[str, Any], where: str) -> Any:
    """A call given as a part: JSON text under a key of its own, or the name and arguments in the part itself."""
    if part.get("name") is not None:
        arguments = part.get("arguments", part.get("input"))
        return {"id": part.get("id"), "name": part["name"], "arguments": {} if arguments is None else arguments}
    for key in ("value", "text", "tool_call", "function_call", "function", "content"):
        value = part.get(key)
        if isinstance(value, str):
            return parse_call(value, f"{where}.{key}")
        if value is not None:
            return value
    raise DataError("bad_message", f"{where}: found no call; found the fields {fields_of(part)}.")


def parse_call(text: str, place: str) -> Any:
    """The value of a call that is given as JSON text."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError("bad_tool_arguments", f"{place}: not JSON ({error}); found {show(text)}.") from None
