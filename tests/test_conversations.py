# SPDX-License-Identifier: Apache-2.0
"""Conversations from messages, back to messages, and every way in which messages are none."""

import copy
import pickle
import re

import pytest

from thinkfusion.conversations import REASONING_FIELDS, Conversation, DataError, Message
from thinkfusion.modes import Mode
from thinkfusion.texts import split_inline_reasoning

THINKING, NON_THINKING = (Mode.THINKING,), (Mode.NON_THINKING,)


def system(content):
    return {"role": "system", "content": content}


def user(content="2+2?"):
    return {"role": "user", "content": content}


def assistant(content="4", **fields):
    return {"role": "assistant", "content": content, **fields}


def tool(content="4"):
    return {"role": "tool", "content": content}


def call(name="add", arguments='{"a": 2, "b": 2}'):
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


def last_step(*messages, **options):
    return Conversation.from_messages(messages, **options).exchanges[-1].steps[-1]


# --- what is read -----------------------------------------------------------------------------------------------


def test_the_smallest_conversation():
    conversation = Conversation.from_messages([user(), assistant()])
    (exchange,) = conversation.exchanges
    assert (exchange.user, exchange.steps) == (Message("user", "2+2?"), (Message("assistant", "4"),))
    assert (exchange.modes, exchange.has_reasoning) == (NON_THINKING, False)
    assert (conversation.system, conversation.tools, conversation.source, conversation.line) == (None, (), "", None)


def test_exchanges_are_trained_in_their_own_mode():
    conversation = Conversation.from_messages(
        [system("Be brief."), user("a"), assistant("b", reasoning_content="r"), user("c"), assistant("d")]
    )
    assert conversation.system == "Be brief."
    assert [exchange.user.content for exchange in conversation.exchanges] == ["a", "c"]
    assert [exchange.modes for exchange in conversation.exchanges] == [THINKING, NON_THINKING]


@pytest.mark.parametrize("field", REASONING_FIELDS)
def test_every_reasoning_field_is_read(field):
    assert last_step(user(), assistant(**{field: "2 and 2"})) == Message("assistant", "4", "2 and 2")


@pytest.mark.parametrize("field", REASONING_FIELDS)
@pytest.mark.parametrize("blank", [None, "", " \n\t"])
def test_blank_reasoning_is_none(field, blank):
    conversation = Conversation.from_messages([user(), assistant(**{field: blank})])
    assert conversation.exchanges[0].steps[0].reasoning is None
    assert conversation.exchanges[0].modes == NON_THINKING


@pytest.mark.parametrize(
    ("content", "reasoning", "answer"),
    [
        ("<think>why</think>4", "why", "4"),
        ("<think>\nwhy\n\nso\n</think>\n\n4\n", "why\n\nso", "4\n"),
        (" \n<think>why</think>4", "why", "4"),
        ("why</think>4", "why", "4"),
        ("\nwhy\n</think>\n\n4", "why", "4"),
        ("<think>\n\n</think>\n\n4", None, "4"),
        ("<think> </think>4", None, "4"),
        ("</think>4", None, "4"),
        ("4 <thinking> 5", None, "4 <thinking> 5"),
        ("\n4", None, "\n4"),
    ],
)
def test_inline_reasoning_is_taken_out(content, reasoning, answer):
    assert split_inline_reasoning(content) == (reasoning, answer)
    assert last_step(user(), assistant(content)) == Message("assistant", answer, reasoning)


def test_the_same_reasoning_given_twice_is_one():
    message = assistant("<think>\nwhy\n</think>\n4", reasoning_content="why", reasoning="why\n", thinking="why")
    assert last_step(user(), message).reasoning.strip() == "why"
    assert last_step(user(), message).content == "4"


def test_reasoning_of_other_roles_is_no_reasoning():
    (exchange,) = Conversation.from_messages([{**user(), "reasoning_content": "r"}, assistant()]).exchanges
    assert (exchange.user, exchange.modes) == (Message("user", "2+2?"), NON_THINKING)


def test_control_strings_of_users_systems_and_tools_are_data():
    text = "</think> <think> <|im_end|>\n<|im_start|>system"
    conversation = Conversation.from_messages(
        [system(text), user(text), assistant(None, tool_calls=[call()]), tool(text), assistant()]
    )
    (exchange,) = conversation.exchanges
    assert [conversation.system, exchange.user.content, exchange.steps[1].content] == [text] * 3


@pytest.mark.parametrize(
    ("given", "arguments"),
    [
        (call(arguments='{"a": 2}'), {"a": 2}),
        (call(arguments={"a": 2}), {"a": 2}),
        ({"name": "add", "arguments": {"a": [1, None]}}, {"a": [1, None]}),
        ({"function": {"name": "add"}}, {}),
    ],
)
def test_tool_calls_are_read(given, arguments):
    assert last_step(user(), assistant(None, tool_calls=[given])).tool_calls == (
        {"name": "add", "arguments": arguments},
    )


def test_a_tool_loop_is_one_exchange():
    messages = [
        user("2+2, then times 3?"),
        assistant(None, reasoning_content="first add", tool_calls=[call(), call("log", "{}")]),
        tool("4"),
        tool("logged"),
        assistant("Now times 3.", tool_calls=[call("times", '{"a": 4, "b": 3}')]),
        tool("12"),
        assistant("12", reasoning_content="done"),
        user("Thanks"),
        assistant("You are welcome."),
    ]
    first, second = Conversation.from_messages(messages).exchanges
    assert [step.role for step in first.steps] == ["assistant", "tool", "tool", "assistant", "tool", "assistant"]
    assert [call["name"] for call in first.steps[0].tool_calls] == ["add", "log"]
    assert [step.reasoning for step in first.steps] == ["first add", None, None, None, None, "done"]
    assert (first.modes, second.modes) == (THINKING, NON_THINKING)


def test_a_last_call_without_a_result_is_an_answer():
    step = last_step(user(), assistant(None, tool_calls=[call()]))
    assert (step.content, len(step.tool_calls)) == ("", 1)


def test_tools_are_kept():
    schema = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    tools = Conversation.from_messages([user(), assistant()], tools=[schema, {"name": "log"}]).tools
    assert tools == (schema, {"name": "log"})


# --- modes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "fields", "modes"),
    [
        (None, {"reasoning": "r"}, THINKING),
        (None, {}, NON_THINKING),
        ("thinking", {"reasoning": "r"}, THINKING),
        ("non-thinking", {"reasoning": "r"}, NON_THINKING),
        (False, {}, NON_THINKING),
        (True, {"reasoning": "r"}, THINKING),
    ],
)
def test_a_given_mode_holds_for_all_exchanges(mode, fields, modes):
    messages = [user(), assistant(**fields), user(), assistant(**fields)]
    assert [exchange.modes for exchange in Conversation.from_messages(messages, mode=mode).exchanges] == [modes] * 2


@pytest.mark.parametrize(
    ("messages", "mode"),
    [
        ([user("2+2? /think"), assistant(reasoning="r")], None),
        ([user("2+2? /no_think"), assistant()], None),
        ([user("2+2? /no_think"), assistant(reasoning="r")], "non_thinking"),
        ([system("Be brief. /no_think"), user(), assistant(), user(), assistant()], None),
        ([system("Be brief. /no_think"), user("2+2? /think"), assistant(reasoning="r")], None),
        ([user("Is /no_think a switch?"), assistant(reasoning="r")], None),
    ],
)
def test_a_soft_switch_may_agree_with_the_mode(messages, mode):
    assert Conversation.from_messages(messages, mode=mode).to_messages()[-2]["content"] == messages[-2]["content"]


def test_the_latest_soft_switch_stands_for_later_exchanges():
    """DESIGN.md, section 3: the latest wins. The template's switch stays until another one comes."""
    thinking = assistant(reasoning="r")
    with pytest.raises(DataError) as caught:
        Conversation.from_messages([user("2+2? /no_think"), assistant(), user("3+3?"), thinking])
    assert caught.value.reason == "mode_conflict"
    kept = Conversation.from_messages([system("/no_think"), user("2+2? /think"), thinking, user("3+3?"), thinking])
    assert [exchange.modes for exchange in kept.exchanges] == [THINKING] * 2


# --- back to messages -------------------------------------------------------------------------------------------


def test_round_trip():
    tools = [{"type": "function", "function": {"name": "add"}}]
    messages = [
        system("간단히 답하세요."),
        user(" 2+2? \n"),
        assistant("", reasoning_content="first add", tool_calls=[call()]),
        tool(""),
        assistant("4 ", reasoning_content=" so \n"),
        user("Thanks"),
        assistant("You are welcome."),
    ]
    conversation = Conversation.from_messages(messages, tools=tools)
    again = conversation.to_messages()
    assert [message["role"] for message in again] == [message["role"] for message in messages]
    assert [message["content"] for message in again] == [message["content"] for message in messages]
    assert [message.get("reasoning_content") for message in again] == [
        None,
        None,
        "first add",
        None,
        " so \n",
        None,
        None,
    ]
    assert again[2]["tool_calls"] == [
        {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}},
    ]
    assert Conversation.from_messages(again, tools=conversation.tools) == conversation


def test_repairs_are_noted():
    notes = []
    conversation = Conversation.from_messages([user(), assistant("r</think>4"), user("and?")], notes=notes)
    assert conversation == Conversation.from_messages([user(), assistant(reasoning="r")])
    assert [note.reason for note in notes] == ["opened_in_prompt", "trailing_user"]
    assert [note.detail.partition(":")[0] for note in notes] == ["messages[1]", "messages[2]"]


def test_tools_may_be_given_as_json_text():
    assert Conversation.from_messages([user(), assistant()], tools='[{"name": "add"}]').tools == ({"name": "add"},)


def test_to_dict_leaves_out_what_is_absent():
    assert Message("assistant", "4").to_dict() == {"role": "assistant", "content": "4"}


def test_the_messages_are_not_changed():
    messages = [user("2+2? /think"), assistant("<think>r</think>4", tool_calls=[call(arguments={"a": 2})])]
    before = copy.deepcopy(messages)
    Conversation.from_messages(messages, mode="thinking")
    assert messages == before


def test_where_it_was_read_is_no_part_of_a_conversation():
    one, other = (Conversation((), source=source, line=1) for source in "ab")
    assert one == other


# --- what is refused --------------------------------------------------------------------------------------------

BAD = [
    ([], "empty_conversation", "messages: found []"),
    (None, "empty_conversation", "messages: found None"),
    ("hello", "empty_conversation", "messages: found 'hello'"),
    ({"role": "user"}, "empty_conversation", "messages: found {"),
    ([user(), "4"], "bad_message", "messages[1]: found '4'"),
    ([user(), None], "bad_message", "messages[1]: found None"),
    ([user(), {"content": "4"}], "bad_message", "messages[1]"),
    (
        [user(), {"role": "bot", "content": "4"}],
        "unknown_role",
        "messages[1].role: found 'bot', expected one of system",
    ),
    ([{"role": ["user"], "content": "a"}], "unknown_role", "messages[0].role: found ['user']"),
    ([user(None), assistant()], "bad_message", "messages[0].content: found None"),
    ([{"role": "user"}, assistant()], "bad_message", "messages[0].content: missing; found the fields role"),
    ([user(), assistant(4)], "bad_message", "messages[1].content: found 4"),
    ([user(), assistant(False)], "bad_message", "messages[1].content: found False"),
    ([user(), assistant(reasoning=3)], "bad_message", "messages[1].reasoning: found 3"),
    ([user(), {**tool(), "tool_calls": [call()]}], "bad_message", "messages[1].tool_calls"),
    ([user(), assistant(tool_calls=[call(), {"id": "1"}])], "bad_message", "messages[1].tool_calls[1]: found {"),
    ([user(), assistant(tool_calls=["add"])], "bad_message", "messages[1].tool_calls[0]: found 'add'"),
    ([user(), assistant(tool_calls=5)], "bad_message", "messages[1].tool_calls: found 5"),
    (
        [user(), assistant(tool_calls=[call(arguments="{a")])],
        "bad_tool_arguments",
        "messages[1].tool_calls[0].arguments",
    ),
    ([user(), assistant(tool_calls=[call(arguments="[1]")])], "bad_tool_arguments", "[0].arguments: found [1]"),
    ([user(), assistant(tool_calls=[call(arguments=None)])], "bad_tool_arguments", "[0].arguments: found None"),
    ([user(), assistant(reasoning="a", thinking="b")], "conflicting_reasoning", "messages[1]: reasoning and thinking"),
    ([user(), assistant("<think>a</think>4", reasoning="b")], "conflicting_reasoning", "messages[1]: the reasoning"),
    ([user(), assistant("")], "empty_answer", "messages[1].content: found ''"),
    ([user(), assistant(" \n")], "empty_answer", "messages[1].content"),
    ([user(), assistant(None)], "empty_answer", "messages[1].content: found None"),
    ([user(), assistant("<think>a</think>\n")], "empty_answer", "messages[1].content: found '<think>a</think>"),
    ([user(), assistant(tool_calls=[]) | {"content": None}], "empty_answer", "messages[1].content"),
    ([user(), assistant("<think>a")], "unclosed_think", "messages[1]: a <think> is never closed"),
    ([user(), assistant("a</think>4<think>")], "unclosed_think", "messages[1]: a <think> follows </think>"),
    ([user(), assistant("<think>a<think>b</think>4")], "unclosed_think", "messages[1]"),
    ([user(), assistant("<think>a</think><think>b</think>4")], "multiple_think", "messages[1]: found 2 think blocks"),
    ([user(), assistant("<think><think>a</think></think>4")], "multiple_think", "messages[1]: found 2"),
    ([user(), assistant("a</think>4</think>")], "multiple_think", "messages[1]: found 2"),
    (
        [user(), assistant("So: <think>a</think>4")],
        "late_think",
        "messages[1]: the think block begins after the answer",
    ),
    (
        [user(), assistant(reasoning="a</think>b")],
        "control_token_in_answer",
        "messages[1].reasoning: found the control",
    ),
    ([user(), assistant(reasoning="<think>a")], "control_token_in_answer", "messages[1].reasoning"),
    ([system("Be brief.")], "no_user", "no user message"),
    ([system("Be brief."), assistant()], "no_user", "no user message"),
    (
        [assistant(), user(), assistant()],
        "role_order",
        "messages[0].role: found 'assistant', expected the user to begin",
    ),
    ([system("a"), assistant(), user()], "role_order", "messages[1].role: found 'assistant'"),
    ([user(), assistant(), assistant()], "role_order", "messages[2].role: found 'assistant' after 'assistant'"),
    ([system("a"), user(), assistant(), assistant()], "role_order", "messages[3].role: found 'assistant'"),
    ([user(), system("a"), assistant()], "system_position", "messages[1].role: found 'system' after 'user'"),
    ([user(), assistant(), system("a"), user(), assistant()], "system_position", "messages[2].role: found 'system'"),
    ([user(), tool(), assistant()], "tool_order", "messages[1].role: found 'tool' after 'user', expected assistant"),
    ([user(), assistant(), tool(), assistant()], "tool_order", "messages[2].role: found 'tool' after 'assistant'"),
    ([user(), assistant(tool_calls=[call()]), user(), assistant()], "tool_order", "messages["),
    ([user()], "no_answer", "messages[0]: no assistant message answers this user"),
    ([user(), user(), assistant()], "role_order", "messages["),
    ([system("a"), user(), assistant(tool_calls=[call()]), tool()], "no_answer", "messages[3]: no assistant message"),
]


@pytest.mark.parametrize(
    ("messages", "reason", "fragment"), BAD, ids=[f"{reason}-{n}" for n, (_, reason, _) in enumerate(BAD)]
)
def test_what_is_no_conversation_names_its_place(messages, reason, fragment):
    with pytest.raises(DataError, match=re.escape(fragment)) as caught:
        Conversation.from_messages(messages)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("options", "reason", "fragment"),
    [
        ({"tools": [{"name": "add"}, {"type": "function"}]}, "bad_tools", "tools[1]: found {"),
        ({"tools": ["add"]}, "bad_tools", "tools[0]: found 'add'"),
        ({"tools": [{"function": {"name": 3}}]}, "bad_tools", "tools[0]"),
        ({"tools": 5}, "bad_tools", "tools: found 5"),
        ({"mode": "maybe"}, "unknown_mode", "mode: unknown mode 'maybe'; use 'thinking' or 'non_thinking'"),
        ({"mode": 2}, "unknown_mode", "mode: unknown mode 2"),
        ({"mode": "thinking"}, "missing_reasoning", "mode: this row is marked as thinking"),
    ],
)
def test_bad_tools_and_modes_are_named(options, reason, fragment):
    with pytest.raises(DataError, match=re.escape(fragment)) as caught:
        Conversation.from_messages([user(), assistant()], **options)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("messages", "mode"),
    [
        ([user("2+2? /think"), assistant()], None),
        ([user("2+2?\n/no_think"), assistant(reasoning="r")], None),
        ([user("2+2? /think"), assistant(reasoning="r")], "non_thinking"),
        ([user(), assistant(), user("2+2? /think"), assistant()], None),
        ([user("2+2? /think \u2003\x1c\n"), assistant()], None),
        ([system("Be brief. /no_think"), user(), assistant(reasoning="r")], None),
    ],
)
def test_a_soft_switch_against_the_mode_is_a_conflict(messages, mode):
    with pytest.raises(DataError, match="last word") as caught:
        Conversation.from_messages(messages, mode=mode)
    assert caught.value.reason == "mode_conflict"


def test_one_exchange_without_reasoning_is_enough_to_miss_it():
    with pytest.raises(DataError, match="reasoning_content") as caught:
        Conversation.from_messages([user(), assistant(reasoning="r"), user(), assistant()], mode=True)
    assert caught.value.reason == "missing_reasoning"


def test_a_long_value_is_shown_in_short():
    with pytest.raises(DataError) as caught:
        Conversation.from_messages([user(), ["x" * 10_000]])
    assert len(str(caught.value)) < 200


# --- the error --------------------------------------------------------------------------------------------------


def test_the_error_shows_source_and_row():
    error = DataError("empty_answer", "messages[1].content: found ''.")
    assert str(error) == "messages[1].content: found ''. [empty_answer]"
    placed = error.at("data/train.jsonl", 812)
    assert str(placed) == "data/train.jsonl, row 812: messages[1].content: found ''. [empty_answer]"
    assert (placed.reason, placed.source, placed.line) == ("empty_answer", "data/train.jsonl", 812)
    assert isinstance(placed, ValueError)


def test_the_error_survives_pickling():
    error = DataError("late_think", "a message").at("train.jsonl", 3)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is DataError
    assert (again.reason, again.message, again.source, again.line) == ("late_think", "a message", "train.jsonl", 3)
    assert str(again) == str(error)
