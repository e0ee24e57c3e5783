# SPDX-License-Identifier: Apache-2.0
"""What a conversation is: a system text, tools, and exchanges; and the error that says what is wrong with one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from thinkfusion.modes import THINK_CLOSE, THINK_OPEN, Mode, split_soft_switch

ROLES = ("system", "user", "assistant", "tool")
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")


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


@dataclass(frozen=True)
class Exchange:
    """A user message and all that answers it: assistant steps with tool calls, tool results, the final answer.

    `modes` are the modes this exchange is trained in; empty means that it is context only.
    `alternative` holds the non-thinking steps of a pre-paired row, where they differ from `steps`.
    `ends_only` leaves all but `</think>` and the end-of-turn token out of the loss in thinking mode.
    """

    user: Message
    steps: tuple[Message, ...]
    modes: tuple[Mode, ...] = ()
    alternative: tuple[Message, ...] = ()
    ends_only: bool = False

    def steps_in(self, mode: Mode) -> tuple[Message, ...]:
        """The steps that answer in `mode`. As history, an exchange shows those of the non-thinking mode."""
        return self.alternative if mode is Mode.NON_THINKING and self.alternative else self.steps

    @property
    def has_reasoning(self) -> bool:
        return any(step.reasoning is not None for step in self.steps)


@dataclass(frozen=True)
class Conversation:
    """A valid conversation: at least one exchange, each ending with the assistant."""

    exchanges: tuple[Exchange, ...]
    system: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    source: str = field(default="", compare=False)
    line: int | None = field(default=None, compare=False)
    language: str = field(default="", compare=False)

    @classmethod
    def from_messages(
        cls,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        mode: Mode | str | bool | None = None,
    ) -> Conversation:
        """Build a conversation from OpenAI-style messages and check it.

        Reasoning is taken from `reasoning_content`, `reasoning`, `thinking`, or a `<think>…</think>` at the start of
        an assistant's content. An exchange is trained in thinking mode if it has reasoning and else in
        non-thinking mode, unless `mode` says otherwise for all of them.

        Raises DataError, which names the message and the field, for anything that is not a valid conversation.
        """
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
            raise DataError(
                "empty_conversation", f"messages: found {_show(messages)}, expected a list of at least one message."
            )
        parsed = [_message(index, message) for index, message in enumerate(messages)]
        system = None
        if parsed[0].role == "system":
            system = parsed[0].content
            parsed = parsed[1:]
        offset = len(messages) - len(parsed)
        exchanges = _exchanges(parsed, offset)
        wanted = None if mode is None else _mode(mode)
        for exchange in exchanges:
            if wanted is Mode.THINKING and not exchange.has_reasoning:
                raise DataError(
                    "missing_reasoning",
                    "mode: this row is marked as thinking, but an exchange has no reasoning. Give it in "
                    "reasoning_content, or mark the row as non-thinking.",
                )
        _check_soft_switches(system, exchanges, wanted)
        return cls(
            exchanges=tuple(replace(exchange, modes=(wanted or _own_mode(exchange),)) for exchange in exchanges),
            system=system,
            tools=tuple(_tool(index, tool) for index, tool in enumerate(_list("tools", tools, "bad_tools"))),
        )

    def to_messages(self) -> list[dict[str, Any]]:
        """The conversation as OpenAI-style messages, reasoning in `reasoning_content`."""
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for exchange in self.exchanges:
            messages += [message.to_dict() for message in (exchange.user, *exchange.steps)]
        return messages


def _own_mode(exchange: Exchange) -> Mode:
    return Mode.THINKING if exchange.has_reasoning else Mode.NON_THINKING


def _mode(value: Any) -> Mode:
    try:
        return Mode.parse(value)
    except ValueError as error:
        raise DataError("unknown_mode", f"mode: {error}") from None


def _show(value: Any) -> str:
    """A short, printable form of `value` for an error message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _message(index: int, message: Any) -> Message:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise DataError("bad_message", f"{where}: found {_show(message)}, expected an object with role and content.")
    if "role" not in message:
        raise DataError("bad_message", f"{where}.role: missing; found the fields {', '.join(map(str, message))}.")
    role = message["role"]
    if role not in ROLES:
        raise DataError("unknown_role", f"{where}.role: found {_show(role)}, expected one of {', '.join(ROLES)}.")
    content = message.get("content")
    given = _list(f"{where}.tool_calls", message.get("tool_calls"), "bad_message")
    calls = tuple(_tool_call(f"{where}.tool_calls[{number}]", call) for number, call in enumerate(given))
    if content is None and role == "assistant":
        content = ""
    if not isinstance(content, str):
        raise DataError("bad_message", f"{where}.content: found {_show(message.get('content'))}, expected text.")
    _check_unicode(f"{where}.content", content)
    if role != "assistant":
        if calls:
            raise DataError("bad_message", f"{where}.tool_calls: only an assistant calls tools, found role {role!r}.")
        return Message(role, content)
    reasoning = _reasoning_field(where, message)
    inline, content = split_inline_reasoning(content, where)
    if inline is not None and reasoning is not None and inline.strip() != reasoning.strip():
        raise DataError(
            "conflicting_reasoning",
            f"{where}: the reasoning of its field and that inside <think>…</think> differ. Keep one of them.",
        )
    reasoning = reasoning if reasoning is not None else inline
    for name, text in (("content", content), ("reasoning", reasoning or "")):
        _refuse_control_strings(f"{where}.{name}", text)
    if not content.strip() and not calls:
        raise DataError(
            "empty_answer",
            f"{where}.content: found {_show(message.get('content'))}, but an assistant message without tool calls "
            "needs an answer.",
        )
    return Message(role, content, reasoning, calls)


def _list(where: str, value: Any, reason: str) -> Sequence[Any]:
    """`value` as a sequence, nothing as an empty one."""
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(reason, f"{where}: found {_show(value)}, expected a list.")
    return value


def _check_unicode(where: str, text: str) -> None:
    """Refuse a lone surrogate (an escape like `\\ud83d` without its partner): it is no character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            "invalid_unicode", f"{where}: found a lone surrogate at character {error.start + 1}, which is no character."
        ) from None


def _reasoning_field(where: str, message: Mapping[str, Any]) -> str | None:
    given = {name: message[name] for name in REASONING_FIELDS if message.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, str):
            raise DataError("bad_message", f"{where}.{name}: found {_show(value)}, expected text.")
        _check_unicode(f"{where}.{name}", value)
    texts = {value.strip(): value for value in given.values() if value.strip()}
    if len(texts) > 1:
        raise DataError(
            "conflicting_reasoning", f"{where}: {' and '.join(given)} hold different texts. Keep one of them."
        )
    return next(iter(texts.values()), None)


def split_inline_reasoning(content: str, where: str = "content") -> tuple[str | None, str]:
    """Take a leading `<think>…</think>` out of `content`: its text (None if blank or absent), and the rest.

    An opening tag that stood in the prompt may be missing. Raises DataError `unclosed_think`, `multiple_think`
    or `late_think`; the line breaks around the tags are markup and are left out.
    """
    opens, closes = content.count(THINK_OPEN), content.count(THINK_CLOSE)
    if not opens and not closes:
        return None, content
    if opens > closes:
        raise DataError(
            "unclosed_think", f"{where}: a <think> is never closed. Add the missing </think>, or leave the row out."
        )
    if closes > 1:
        raise DataError(
            "multiple_think", f"{where}: found {closes} think blocks, expected one at the start of the answer."
        )
    before, _, answer = content.partition(THINK_CLOSE)
    head, opened, trace = before.partition(THINK_OPEN)
    if opened and head.strip():
        raise DataError("late_think", f"{where}: the think block begins after the answer: {_show(head.strip())}.")
    if not opened:
        # Either the tag stood in the prompt (head is all of it), or `<think>` follows `</think>`.
        if THINK_OPEN in answer:
            raise DataError("unclosed_think", f"{where}: a <think> follows </think> and is never closed.")
        trace = head
    reasoning = trace.strip("\n")
    return (reasoning if reasoning.strip() else None), answer.lstrip("\n")


def _refuse_control_strings(where: str, text: str) -> None:
    for tag in (THINK_OPEN, THINK_CLOSE):
        if tag in text:
            raise DataError(
                "control_token_in_answer",
                f"{where}: found the control string {tag} inside the text. Remove it, or leave the row out.",
            )


def _tool_call(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError("bad_message", f"{where}: found {_show(call)}, expected a function with a name.")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError as error:
            raise DataError("bad_tool_arguments", f"{where}.arguments: not JSON ({error}).") from None
    if not isinstance(arguments, Mapping):
        raise DataError("bad_tool_arguments", f"{where}.arguments: found {_show(arguments)}, expected an object.")
    _check_unicode(f"{where}.arguments", json.dumps(arguments, ensure_ascii=False, default=str))
    return {"name": function["name"], "arguments": dict(arguments)}


def _tool(index: int, tool: Any) -> dict[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError("bad_tools", f"tools[{index}]: found {_show(tool)}, expected a function with a name.")
    return dict(tool)


_FOLLOWS = {
    "user": ("assistant",),
    "assistant": (),
    "assistant that called tools": ("tool",),
    "tool": ("tool", "assistant"),
}


def _exchanges(messages: Sequence[Message], offset: int) -> list[Exchange]:
    """Group messages into exchanges; `offset` is the index of the first one in the row, for error messages."""
    users = [index for index, message in enumerate(messages) if message.role == "user"]
    if not users:
        raise DataError("no_user", "messages: there is no user message, and so nothing to reply to.")
    if users[0] != 0:
        reason = "system_position" if messages[0].role == "system" else "role_order"
        raise DataError(reason, f"messages[{offset}].role: found {messages[0].role!r}, expected the user to begin.")
    exchanges = []
    for start, end in zip(users, [*users[1:], len(messages)], strict=True):
        previous = "user"
        for index in range(start + 1, end):
            role = messages[index].role
            if role not in _FOLLOWS[previous]:
                reason = {"system": "system_position", "tool": "tool_order"}.get(role, "role_order")
                expected = " or ".join((*_FOLLOWS[previous], "user") if previous == "assistant" else _FOLLOWS[previous])
                raise DataError(
                    reason,
                    f"messages[{offset + index}].role: found {role!r} after {previous!r}, expected {expected}.",
                )
            previous = "assistant that called tools" if messages[index].tool_calls else role
        is_last = end == len(messages)
        if previous == "assistant that called tools" and not is_last:
            raise DataError("tool_order", f"messages[{offset + end}].role: found 'user' before the tool's result.")
        if not previous.startswith("assistant"):
            raise DataError(
                "no_answer" if is_last else "role_order",
                f"messages[{offset + end - 1}]: no assistant message answers this {previous} message.",
            )
        exchanges.append(Exchange(messages[start], tuple(messages[start + 1 : end])))
    return exchanges


def _check_soft_switches(system: str | None, exchanges: Sequence[Exchange], wanted: Mode | None) -> None:
    """Refuse a row whose text asks for one mode while its answer is of the other."""
    standing = split_soft_switch(system or "")[1]
    for exchange in exchanges:
        standing = split_soft_switch(exchange.user.content)[1] or standing
        given = wanted or _own_mode(exchange)
        if standing is not None and standing is not given:
            raise DataError(
                "mode_conflict",
                f"mode: a message switches to {standing} with its last word, but the answer is {given}.",
            )
