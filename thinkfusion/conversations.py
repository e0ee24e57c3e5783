# SPDX-License-Identifier: Apache-2.0
"""What a conversation is: a system text, tools, and exchanges; and how messages group into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from thinkfusion.messages import REASONING_FIELDS, ROLES, Message, Placed, read_message
from thinkfusion.modes import Mode, split_soft_switch
from thinkfusion.reading import DataError, MessageOptions, Note, Reading, show
from thinkfusion.tool_calls import parse_json, read_tools

__all__ = [
    "REASONING_FIELDS",
    "ROLES",
    "Conversation",
    "DataError",
    "Exchange",
    "Message",
    "MessageOptions",
    "Note",
    "converse",
    "read_messages",
    "read_mode",
]


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
        tools: Sequence[Mapping[str, Any]] | str | None = None,
        mode: Mode | str | bool | None = None,
        options: MessageOptions | None = None,
        notes: list[Note] | None = None,
    ) -> Conversation:
        """Build a conversation from OpenAI-style messages and check it.

        Reasoning is taken from `reasoning_content`, `reasoning`, `thinking`, a content part, or a `<think>…</think>`
        at the start of an assistant's content. An exchange is trained in thinking mode if it has reasoning and else
        in non-thinking mode, unless `mode` says otherwise for all of them. `options` say what may be repaired, and
        what was is added to `notes`.

        Raises DataError, which names the message and the field, for anything that is not a valid conversation.
        """
        reading = Reading(options or MessageOptions(), [] if notes is None else notes)
        offered = read_tools(tools, reading)
        return converse(
            read_messages(messages, "messages", reading),
            reading,
            tools=offered,
            mode=None if mode is None else read_mode(mode),
        )

    def placed(self, source: str, line: int) -> Conversation:
        """The same conversation, with the place it was read from."""
        # Written out, since `replace` takes three times as long, and this runs for every row.
        return Conversation(self.exchanges, self.system, self.tools, source, line, self.language)

    def to_messages(self, mode: Mode = Mode.THINKING) -> list[dict[str, Any]]:
        """The conversation as OpenAI-style messages, reasoning in `reasoning_content`.

        Where exchanges have two answers, the last shows that of `mode`, earlier ones the non-thinking one.
        """
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for index, exchange in enumerate(self.exchanges):
            steps = exchange.steps_in(mode if index + 1 == len(self.exchanges) else Mode.NON_THINKING)
            messages += [message.to_dict() for message in (exchange.user, *steps)]
        return messages


def read_mode(value: Any, name: str = "mode") -> Mode:
    """The mode that the field `name` of a row gives."""
    if isinstance(value, (bool, str)):
        try:
            return Mode.parse(value)
        except ValueError:
            pass
    raise DataError(
        "unknown_mode", f"{name}: unknown mode {show(value)}; use 'thinking' or 'non_thinking' (or true, false)."
    )


def read_messages(value: Any, name: str, reading: Reading) -> list[Placed]:
    """The messages in the field `name` of a row: a list, or JSON text of one."""
    if isinstance(value, str):
        value = _parsed_list(value, name, reading)
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes, bytearray)) or not value:
        raise DataError("empty_conversation", f"{name}: found {show(value)}, expected a list of at least one message.")
    return [read_message(message, f"{name}[{index}]", reading) for index, message in enumerate(value)]


def _parsed_list(text: str, name: str, reading: Reading) -> Any:
    try:
        value = parse_json(text)
    except ValueError:
        return text
    if isinstance(value, list):
        reading.repaired("parsed_json", f"{name}: a JSON text, read as the list that it holds.")
    return value


def converse(
    placed: Sequence[Placed],
    reading: Reading,
    *,
    tools: tuple[dict[str, Any], ...] = (),
    mode: Mode | None = None,
    language: str = "",
) -> Conversation:
    """Group messages into a conversation, with the repairs that the options of the reading allow."""
    start = 0
    while start < len(placed) and placed[start].message.role == "system":
        start += 1
    system = placed[0].message.content if start else None
    if start > 1:
        reading.repaired("joined_system", f"{placed[0].place}: {start} system messages are joined with blank lines.")
        system = "\n\n".join(each.message.content for each in placed[:start])
    turns = _repaired(list(placed[start:]), reading)
    spans = _spans(turns, reading)
    if mode is Mode.NON_THINKING and reading.options.drop_reasoning:
        turns = _without_reasoning(turns, reading)
    exchanges = tuple(_exchange(turns[first:end], mode) for first, end in spans)
    if not any(exchange.modes for exchange in exchanges):
        raise DataError("no_answer", f"{turns[-1].place}: no answer that could be trained follows the prompt.")
    _check_soft_switches(system, exchanges)
    return Conversation(exchanges, system, tools, language=language)


def _repaired(turns: list[Placed], reading: Reading) -> list[Placed]:
    """The turns without a question at the end that nobody answers, and with what the options allow."""
    if reading.options.drop_first_assistant:
        first = next((index for index, turn in enumerate(turns) if turn.message.role == "user"), 0)
        if first and turns[0].message.role == "assistant":
            reading.altered("dropped_first_assistant", f"{turns[0].place}: said before the first user message.")
            turns = turns[first:]
    if reading.options.join_messages:
        turns = _joined(turns, reading)
    end = len(turns)
    while end > 1 and turns[end - 1].message.role == "user":
        end -= 1
    if 1 < end < len(turns):
        reading.repaired("trailing_user", f"{turns[end].place}: a user message without an answer is left out.")
        turns = turns[:end]
    return turns


def _joined(turns: list[Placed], reading: Reading) -> list[Placed]:
    joined: list[Placed] = []
    for turn in turns:
        last = joined[-1] if joined else None
        role = turn.message.role
        if last is None or last.message.role != role or role not in ("user", "assistant") or last.message.tool_calls:
            joined.append(turn)
            continue
        if turn.message.reasoning is not None:
            raise DataError("late_think", f"{turn.place}: has reasoning, and follows an answer that it cannot join.")
        reading.altered("joined_messages", f"{turn.place}: joined to the {role} message before it with a blank line.")
        content = "\n\n".join(filter(None, (last.message.content, turn.message.content)))
        message = Message(role, content, last.message.reasoning, turn.message.tool_calls)
        joined[-1] = Placed(message, last.place, turn.call_ids, context=turn.context)
    return joined


def _without_reasoning(turns: list[Placed], reading: Reading) -> list[Placed]:
    if all(turn.message.reasoning is None for turn in turns):
        return turns
    reading.altered("dropped_reasoning", "mode: the row is marked as non-thinking, so that its reasoning is left out.")
    return [
        turn._replace(message=Message(turn.message.role, turn.message.content, None, turn.message.tool_calls))
        for turn in turns
    ]


_EXPECTED = {
    "user": ("assistant",),
    "assistant": ("user",),
    "assistant that called tools": ("tool",),
    "tool": ("tool", "assistant"),
}
_OPTIONS = {
    ("user", "user"): " Join such messages with --join_messages.",
    ("assistant", "assistant"): " Join such messages with --join_messages.",
}


def _spans(turns: Sequence[Placed], reading: Reading) -> list[tuple[int, int]]:
    """Where each exchange begins and ends; raises DataError where a role cannot follow the one before it."""
    users = [index for index, turn in enumerate(turns) if turn.message.role == "user"]
    if not users:
        raise DataError("no_user", "messages: there is no user message, and so nothing to reply to.")
    if users[0] != 0:
        first = turns[0]
        option = " Leave it out with --drop_first_assistant." if first.message.role == "assistant" else ""
        raise DataError(
            "tool_order" if first.message.role == "tool" else "role_order",
            f"{first.place}.role: found {first.message.role!r}, expected the user to begin.{option}",
        )
    previous = "user"
    calls = 0
    for index in range(1, len(turns)):
        role = turns[index].message.role
        if role not in _EXPECTED[previous]:
            raise _order_error(turns[index], previous)
        if role == "tool" and previous != "tool":
            calls = index - 1
        elif previous == "tool" and role != "tool":
            _check_results(turns[calls], turns[calls + 1 : index], reading)
        previous = "assistant that called tools" if turns[index].message.tool_calls else role
    if not previous.startswith("assistant"):
        raise DataError("no_answer", f"{turns[-1].place}: no assistant message answers this {previous} message.")
    return list(zip(users, [*users[1:], len(turns)], strict=True))


def _order_error(turn: Placed, previous: str) -> DataError:
    role = turn.message.role
    if role == "system":
        reason = "system_position"
    elif role == "tool" or previous == "assistant that called tools":
        reason = "tool_order"
    else:
        reason = "role_order"
    return DataError(
        reason,
        f"{turn.place}.role: found {role!r} after {previous!r}, expected {' or '.join(_EXPECTED[previous])}."
        + _OPTIONS.get((role, previous), ""),
    )


def _check_results(caller: Placed, results: Sequence[Placed], reading: Reading) -> None:
    """Refuse results that do not belong to the calls before them, by their ids, their names, or their number.

    One result may answer several calls at once, as some data sets write it.
    """
    calls = caller.message.tool_calls
    names = {call["name"] for call in calls}
    open_ids = [call_id for call_id in caller.call_ids if call_id is not None]
    for result in results:
        call_id, name = result.answers
        if name is not None and name not in names:
            raise DataError(
                "tool_order",
                f"{result.place}.name: found {show(name)}, expected a tool just called: {', '.join(sorted(names))}.",
            )
        if call_id is None or not caller.call_ids or caller.call_ids.count(None) == len(calls):
            continue
        if call_id not in open_ids:
            raise DataError(
                "tool_order",
                f"{result.place}.tool_call_id: found {show(call_id)}, expected the id of a call without a result: "
                f"{show(open_ids)}.",
            )
        if call_id != open_ids[0]:
            reading.noted("results_out_of_order", f"{result.place}: the results stand in another order than the calls.")
        open_ids.remove(call_id)
    if len(results) != len(calls) and (len(results) != 1 or results[0].answers[0] is not None):
        raise DataError(
            "tool_order",
            f"{caller.place}.tool_calls: found {len(results)} results for {len(calls)} calls, expected one for each "
            "(or one without an id for all).",
        )


def _exchange(turns: Sequence[Placed], mode: Mode | None) -> Exchange:
    steps = tuple(turn.message for turn in turns[1:])
    if all(turn.context for turn in turns):
        return Exchange(turns[0].message, steps)
    thinks = any(step.reasoning is not None for step in steps)
    if mode is Mode.THINKING and not thinks:
        raise DataError(
            "missing_reasoning",
            f"mode: this row is marked as thinking, but {turns[1].place} has no reasoning. Give it in "
            "reasoning_content, or mark the row as non-thinking.",
        )
    return Exchange(turns[0].message, steps, (mode or (Mode.THINKING if thinks else Mode.NON_THINKING),))


def _check_soft_switches(system: str | None, exchanges: Sequence[Exchange]) -> None:
    """Refuse a row whose text asks for one mode while its answer is of the other."""
    standing = None if system is None else _soft_switch(system)
    for exchange in exchanges:
        standing = _soft_switch(exchange.user.content) or standing
        if standing is not None and exchange.modes and exchange.modes != (standing,):
            raise DataError(
                "mode_conflict",
                f"mode: a message switches to {standing} with its last word, but the answer is "
                f"{' and '.join(exchange.modes)}. Remove the switch, or correct the mode.",
            )


def _soft_switch(text: str) -> Mode | None:
    # The search is slow, and nearly every text can do without it.
    return split_soft_switch(text)[1] if text.rstrip().endswith("think") else None
