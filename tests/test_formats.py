# SPDX-License-Identifier: Apache-2.0
"""Every format becomes the same conversation, what is the format is told from the columns, and nothing crashes."""

import copy
import json
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinkfusion import texts
from thinkfusion.conversations import Conversation, Message
from thinkfusion.formats import FORMATS, DataError, RecordOptions, detect_format, parse_row
from thinkfusion.modes import Mode

DATA = Path(__file__).parents[2] / "shared" / "data"
BOTH = (Mode.THINKING, Mode.NON_THINKING)
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "number"}}}}}]
QUESTION, REASONING, ANSWER = "2+2는? 👩‍👩‍👧 e\u0301 שלום", "2 and 2", "넷\u200d"


def user(content=QUESTION):
    return {"role": "user", "content": content}


def assistant(content=ANSWER, **fields):
    return {"role": "assistant", "content": content, **fields}


THINKING_ANSWER = assistant(reasoning_content=REASONING)
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
LOOP = [
    user("a"),
    assistant(None, tool_calls=[CALL]),
    {"role": "tool", "content": "4", "tool_call_id": "c1"},
    assistant("b"),
]


def parse(row, notes=None, **options):
    """The conversation of a row whose format is recognised."""
    found = RecordOptions(**options)
    if found.format is None:
        found = RecordOptions(**{**options, "format": detect_format(row, found, "rows")})
    return parse_row(row, found, [] if notes is None else notes)


def shown(conversation):
    """Question, reasoning, answer of the last exchange."""
    exchange = conversation.exchanges[-1]
    return exchange.user.content, exchange.steps[-1].reasoning, exchange.steps[-1].content


# --- one conversation, in every format --------------------------------------------------------------------------

INLINE = f"<think>\n{REASONING}\n</think>\n\n{ANSWER}"
SAME = {
    "messages-reasoning_content": ("messages", {"messages": [user(), THINKING_ANSWER]}),
    "messages-inline": ("messages", {"messages": [user(), assistant(INLINE)]}),
    "messages-JSON": ("messages", {"messages": json.dumps([user(), THINKING_ANSWER])}),
    "messages-parts": (
        "messages",
        {
            "messages": [
                user([{"type": "input_text", "text": QUESTION[:3]}, {"type": "text", "value": QUESTION[3:]}]),
                assistant([{"type": "thinking", "thinking": REASONING}, {"type": "output_text", "text": ANSWER}]),
            ]
        },
    ),
    "messages-parts-reasoning": (
        "messages",
        {"messages": [user([QUESTION]), assistant([{"type": "reasoning", "text": REASONING}, {"text": ANSWER}])]},
    ),
    "prompt_completion-plain": ("prompt_completion", {"prompt": QUESTION, "completion": INLINE}),
    "prompt_completion-reasoning": (
        "prompt_completion",
        {"prompt": QUESTION, "completion": ANSWER, "reasoning": REASONING},
    ),
    "prompt_completion-lists": ("prompt_completion", {"prompt": [user()], "completion": [THINKING_ANSWER]}),
    "prompt_completion-mixed": ("prompt_completion", {"prompt": [user()], "completion": INLINE}),
    "sharegpt": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": INLINE}]},
    ),
    "sharegpt-reasoning": (
        "sharegpt",
        {
            "conversations": [
                {"from": "user", "value": QUESTION},
                {"from": "assistant", "value": ANSWER, "reasoning": REASONING},
            ]
        },
    ),
    "sharegpt-roles": ("sharegpt", {"conversations": [user(), THINKING_ANSWER]}),
    "alpaca": ("alpaca", {"instruction": QUESTION, "input": "", "output": INLINE}),
    "alpaca-nulls": ("alpaca", {"instruction": QUESTION, "output": INLINE, "system": None, "history": None}),
    "columns": ("columns", {"question": QUESTION, "reasoning": REASONING, "answer": ANSWER}),
    "columns-inline": ("columns", {"question": QUESTION, "answer": INLINE}),
}


@pytest.mark.parametrize(("name", "row"), SAME.values(), ids=SAME)
def test_every_format_gives_the_same_conversation(name, row):
    before = copy.deepcopy(row)
    assert detect_format(row, RecordOptions(), "rows") == name
    conversation = parse(row)
    assert conversation == Conversation.from_messages([user(), THINKING_ANSWER])
    assert shown(conversation) == (QUESTION, REASONING, ANSWER)
    assert row == before


PAIRED = {
    "text": {"prompt": QUESTION, "thinking": INLINE, "non_thinking": "4!"},
    "reasoning-column": {"prompt": QUESTION, "thinking": ANSWER, "reasoning": REASONING, "non_thinking": "4!"},
    "question": {"question": QUESTION, "thinking": INLINE, "non_thinking": "4!"},
    "messages": {"prompt": [user()], "thinking": THINKING_ANSWER, "non_thinking": assistant("4!")},
    "lists": {"prompt": [user()], "thinking": [THINKING_ANSWER], "non_thinking": [assistant("4!")]},
    "whole": {"thinking": [user(), THINKING_ANSWER], "non_thinking": [user(), assistant("4!")]},
    "prompt-and-whole": {
        "prompt": QUESTION,
        "thinking": [user(), THINKING_ANSWER],
        "non_thinking": [user(), assistant("4!")],
    },
    "mixed": {"prompt": QUESTION, "thinking": THINKING_ANSWER, "non_thinking": "4!"},
}


@pytest.mark.parametrize("row", PAIRED.values(), ids=PAIRED)
def test_pairs_keep_both_answers(row):
    conversation = parse(row)
    (exchange,) = conversation.exchanges
    assert shown(conversation) == (QUESTION, REASONING, ANSWER)
    assert (exchange.modes, exchange.alternative) == (BOTH, (Message("assistant", "4!"),))
    assert conversation.to_messages() == [user(), THINKING_ANSWER]
    assert conversation.to_messages(Mode.NON_THINKING) == [user(), assistant("4!")]


def test_a_pair_with_a_history_in_the_prompt_trains_the_last_answer_only():
    prompt = [{"role": "system", "content": "s"}, user("a"), assistant("b"), user()]
    conversation = parse({"prompt": prompt, "thinking": INLINE, "non_thinking": "4!", "tools": TOOLS})
    assert [exchange.modes for exchange in conversation.exchanges] == [(), BOTH]
    assert (conversation.system, conversation.tools) == ("s", tuple(TOOLS))


def test_whole_pairs_train_every_answer():
    thinking = [user("a"), assistant("b", reasoning="r"), user("c"), assistant("d"), user(), THINKING_ANSWER]
    plain = [user("a"), assistant("b"), user("c"), assistant("d"), user(), assistant("4!")]
    conversation = parse({"thinking": thinking, "non_thinking": plain})
    assert [exchange.modes for exchange in conversation.exchanges] == [BOTH, (Mode.NON_THINKING,), BOTH]
    assert [bool(exchange.alternative) for exchange in conversation.exchanges] == [False, False, True]


def test_the_prompt_of_a_pair_stays_context_with_its_reasoning():
    prompt = [user("a"), assistant("b", reasoning="r"), user()]
    conversation = parse({"prompt": prompt, "thinking": INLINE, "non_thinking": "4!"})
    assert [exchange.modes for exchange in conversation.exchanges] == [(), BOTH]


def test_earlier_exchanges_show_their_non_thinking_answer():
    conversation = parse(PAIRED["text"])
    conversation = replace(conversation, exchanges=conversation.exchanges * 2)
    assert conversation.to_messages() == [user(), assistant("4!"), user(), THINKING_ANSWER]
    assert conversation.to_messages(Mode.NON_THINKING) == [user(), assistant("4!")] * 2


def test_a_pair_may_call_tools():
    row = {"prompt": "a", "thinking": [assistant(None, reasoning="r", tool_calls=[CALL])], "non_thinking": LOOP}
    exchange = parse(row).exchanges[0]
    assert [len(steps) for steps in (exchange.steps, exchange.alternative)] == [1, 3]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"thinking": ANSWER}, "missing_reasoning"),
        ({"non_thinking": INLINE}, "unexpected_reasoning"),
        ({"mode": "thinking"}, "mode_conflict"),
        ({"prompt": "2+2? /think"}, "mode_conflict"),
        ({"prompt": "2+2? /no_think"}, "mode_conflict"),
        ({"thinking": None}, "empty_answer"),
        ({"non_thinking": " "}, "empty_answer"),
        ({"prompt": None}, "no_user"),
        ({"prompt": 3}, "bad_message"),
    ],
)
def test_what_is_no_pair(change, reason):
    with pytest.raises(DataError) as caught:
        parse({"prompt": QUESTION, "thinking": INLINE, "non_thinking": "4!", **change}, format="paired")
    assert caught.value.reason == reason


def test_reasoning_of_the_non_thinking_answer_is_dropped_on_demand():
    notes = []
    row = {"prompt": "a", "thinking": INLINE, "non_thinking": "<think>r</think>b"}
    exchange = parse(row, notes, drop_reasoning=True).exchanges[0]
    assert (exchange.alternative, exchange.has_reasoning) == ((Message("assistant", "b"),), True)
    assert [(note.kind, note.reason) for note in notes] == [("altered", "dropped_reasoning")]


# --- what each format adds --------------------------------------------------------------------------------------


def test_what_stands_in_a_prompt_is_context():
    prompt = [{"role": "system", "content": "s"}, user("a"), assistant("b"), user("c")]
    conversation = parse({"prompt": prompt, "completion": [assistant("d"), user("e"), assistant("f")]})
    assert [exchange.modes for exchange in conversation.exchanges] == [(), (Mode.NON_THINKING,), (Mode.NON_THINKING,)]
    assert conversation.system == "s"


SYSTEM_ROWS = [
    {"prompt": "a", "completion": "b"},
    {"prompt": [user("a")], "completion": "b"},
    {"prompt": "a", "thinking": INLINE, "non_thinking": "b"},
    {"prompt": [user("a")], "thinking": INLINE, "non_thinking": "b"},
    {"thinking": [user(), THINKING_ANSWER], "non_thinking": [user(), assistant()]},
    {"messages": [user(), assistant()]},
    {"conversations": [user(), assistant()]},
    {"instruction": "a", "output": "b"},
    {"question": "a", "answer": "b"},
]


@pytest.mark.parametrize("row", SYSTEM_ROWS, ids=" ".join)
def test_a_system_column_is_read_in_every_format(row):
    assert [parse({**row, "system": text}).system for text in ("s", "", None)] == ["s", None, None]
    with pytest.raises(DataError, match="system: found 3, expected text"):
        parse({**row, "system": 3})


def test_a_system_column_beside_a_system_message_is_joined_and_counted():
    notes = []
    row = {"messages": [{"role": "system", "content": "t"}, user(), assistant()], "system": "s"}
    assert parse(row, notes).system == "s\n\nt"
    assert [(note.kind, note.reason) for note in notes] == [("altered", "joined_system")]


def test_a_completion_must_hold_an_answer():
    for completion, reason in (([user("c")], "no_answer"), ([], "empty_conversation"), (None, "empty_answer")):
        with pytest.raises(DataError) as caught:
            parse({"prompt": [user("a"), assistant("b")], "completion": completion})
        assert caught.value.reason == reason


def test_context_needs_no_reasoning_and_may_hold_switches():
    prompt = [user("a /think"), assistant("b"), user("c /no_think")]
    assert parse({"prompt": prompt, "completion": "d"}).exchanges[0].modes == ()
    row = {"prompt": [user("a"), assistant("b"), user("c")], "completion": INLINE, "mode": "thinking"}
    assert [exchange.modes for exchange in parse(row).exchanges] == [(), (Mode.THINKING,)]


def test_calls_of_sharegpt():
    calls = [{"name": "add", "arguments": {"a": 2}}, {"name": "add", "arguments": {"a": 3}}]
    row = {
        "system": "Be brief.",
        "tools": json.dumps(TOOLS),
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": "<think>why</think>\n" + json.dumps(calls)},
            {"from": "observation", "value": "4"},
            {"from": "observation", "value": "6"},
            {"from": "gpt", "value": "b"},
        ],
    }
    notes = []
    conversation = parse(row, notes)
    step = conversation.exchanges[0].steps[0]
    assert (step.tool_calls, step.reasoning, step.content) == (tuple(calls), "why", "")
    assert (conversation.system, conversation.tools, notes) == ("Be brief.", tuple(TOOLS), [])


def test_alpaca_with_everything():
    row = {
        "instruction": "Add.",
        "input": "2 2",
        "output": "4",
        "system": "Be brief.",
        "history": [["a", "b"], ("c", "<think>r</think>d")],
    }
    conversation = parse(row)
    assert [exchange.user.content for exchange in conversation.exchanges] == ["a", "c", "Add.\n2 2"]
    assert [exchange.modes[0].value for exchange in conversation.exchanges] == [
        "non_thinking",
        "thinking",
        "non_thinking",
    ]
    assert conversation.system == "Be brief."


@pytest.mark.parametrize(
    ("row", "reason", "place"),
    [
        ({"instruction": " ", "input": "", "output": "4"}, "no_user", "instruction: "),
        ({"instruction": "a", "output": " "}, "empty_answer", "output"),
        ({"instruction": "a", "output": None}, "bad_message", "output: found None"),
        ({"instruction": "a", "input": 3, "output": "4"}, "bad_message", "input: found 3"),
        ({"instruction": "a", "output": "4", "history": "b"}, "bad_message", "history: found 'b'"),
        ({"instruction": "a", "output": "4", "history": [["b"]]}, "bad_message", "history[0]: found ['b']"),
        ({"instruction": "a", "output": "4", "history": [["b", ""]]}, "empty_answer", "history[0][1]"),
    ],
)
def test_a_bad_row_of_alpaca_names_its_column(row, reason, place):
    with pytest.raises(DataError, match=re.escape(place)) as caught:
        parse(row)
    assert caught.value.reason == reason


@pytest.mark.parametrize("text", ["", "[]", " \n", None, [], ()])
def test_no_tools_are_no_tools(text):
    assert parse({"messages": [user(), assistant()], "tools": text}).tools == ()


def test_tools_and_calls_in_every_way():
    call = {"name": "add", "arguments": {"a": 2}}
    ways = [
        assistant(None, tool_calls=[{"function": call}]),
        assistant(None, tool_calls=[{"function": {**call, "arguments": '{"a": 2}'}}]),
        assistant(None, function_call=call, tool_calls=None),
        assistant([{"type": "tool_call", "value": json.dumps(call)}]),
        assistant([{"type": "tool_call", "tool_call": call}]),
        assistant([{"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 2}}]),
    ]
    for way in ways:
        conversation = parse({"messages": [user(), way], "tools": json.dumps(TOOLS)})
        assert conversation.exchanges[0].steps[0].tool_calls == (call,), way
        assert conversation.tools == tuple(TOOLS)


@pytest.mark.parametrize(
    ("fields", "mode"),
    [
        ({"mode": "Non-Thinking"}, Mode.NON_THINKING),
        ({"enable_thinking": True}, Mode.THINKING),
        ({"enable_thinking": False}, Mode.NON_THINKING),
        ({"chat_template_kwargs": {"enable_thinking": False, "thinking": None}}, Mode.NON_THINKING),
        ({"mode": "thinking", "enable_thinking": True}, Mode.THINKING),
        ({"chat_template_kwargs": None}, Mode.THINKING),
    ],
)
def test_columns_that_give_the_mode(fields, mode):
    assert parse({"messages": [user(), THINKING_ANSWER], **fields}).exchanges[0].modes == (mode,)


def test_columns_of_two_modes_are_a_conflict():
    with pytest.raises(DataError, match="mode and enable_thinking") as caught:
        parse({"messages": [user(), THINKING_ANSWER], "mode": "thinking", "enable_thinking": False})
    assert caught.value.reason == "mode_conflict"


@pytest.mark.parametrize(
    ("fields", "language"), [({"language": "ko"}, "ko"), ({"lang": "en"}, "en"), ({"lang": 3}, "")]
)
def test_a_language_is_kept(fields, language):
    assert parse({"question": "a", "answer": "b", **fields}).language == language


def test_a_row_with_images_is_no_text():
    with pytest.raises(DataError) as caught:
        parse({"question": "a", "answer": "b", "images": ["x.png"]})
    assert caught.value.reason == "unsupported_modality"
    assert parse({"question": "a", "answer": "b", "images": []}).system is None


def test_control_characters_are_kept_and_counted():
    for column in ("question", "answer", "reasoning"):
        notes = []
        row = {"question": "a", "answer": "b", "reasoning": "c", column: "\x00a\x1b[1m\x7f\t\r\n"}
        assert shown(parse(row, notes)) == (row["question"], row["reasoning"], row["answer"])
        assert [(note.kind, note.reason) for note in notes] == [("noted", "control_characters")]
    notes = []
    parse({"question": "a\tb\r\n", "answer": "b\n"}, notes)
    assert notes == []


@pytest.mark.parametrize(
    "row",
    [
        {"question": "\ud83d", "answer": "b"},
        {"question": "a", "answer": "b\udc00"},
        {"question": "a", "answer": "b", "reasoning": "\udc00"},
        {"messages": [user(), assistant(None, tool_calls=[{"name": "add", "arguments": {"a": "\ud83d"}}])]},
        {"messages": [user(), assistant()], "tools": [{"name": "add", "description": "\ud83d"}]},
        {"instruction": "a", "output": "b", "system": "\ud83d"},
    ],
)
def test_a_lone_surrogate_is_no_character_anywhere(row):
    with pytest.raises(DataError, match="lone surrogate at character") as caught:
        parse(row)
    assert caught.value.reason == "invalid_unicode"
    str(caught.value).encode()


def test_a_field_with_a_strange_name_is_shown_escaped():
    with pytest.raises(DataError) as caught:
        parse({"\ud83d\x1b": 1, 3: 4}, format="columns")
    assert caught.value.message.endswith(r"found '\ud83d\x1b', 3.")


# --- which format -----------------------------------------------------------------------------------------------


def test_a_format_can_be_named():
    row = {"instruction": "a", "output": "b", "messages": [user(), assistant()]}
    assert shown(parse(row, format="alpaca")) == ("a", None, "b")
    assert shown(parse(row, format="messages")) == (QUESTION, None, ANSWER)


def test_columns_of_another_format_that_are_null_do_not_count():
    row = {"messages": None, "prompt": None, "completion": None, "conversations": [user(), assistant()]}
    assert detect_format(row, RecordOptions(), "rows") == "sharegpt"


def test_named_columns_win_over_those_of_alpaca():
    row = {"instruction": "a", "output": "b"}
    options = RecordOptions(question_column="instruction", answer_column="output")
    assert (detect_format(row, RecordOptions(), "rows"), detect_format(row, options, "rows")) == ("alpaca", "columns")


def test_a_row_without_a_format_is_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="detect_format"):
        parse_row({"question": "a", "answer": "b"}, RecordOptions(), [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "csv"}, "format: 'csv'.*messages, prompt_completion, sharegpt, alpaca, columns, paired"),
        ({"max_skipped": 2}, "max_skipped: found 2"),
        ({"max_skipped": "1%"}, "max_skipped: found '1%'"),
        ({"reasoning_tags": "<thinking>"}, "reasoning_tags: found '<thinking>'.*'<thinking>,</thinking>'"),
        ({"reasoning_tags": "<a>,<a>"}, "reasoning_tags"),
        ({"reasoning_tags": ","}, "reasoning_tags"),
        ({"reasoning_tags": 3}, "reasoning_tags"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        RecordOptions(**options)


# --- the shared data --------------------------------------------------------------------------------------------


def shared_rows(name):
    if not DATA.is_dir():
        pytest.skip("the shared data is absent")
    text = (DATA / name).read_text(encoding="utf-8")
    return json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("name", "options", "found", "skipped"),
    [
        ("alpaca.json", {}, "alpaca", {}),
        ("glaive_toolcall.json", {}, "sharegpt", {}),
        # Two answers hold a stray </think> beside a reasoning that has a part of its own.
        ("reason_tool_use.jsonl", {}, "messages", {"control_token_in_answer": 2}),
        ("gsm8k_test.jsonl", {"answer_separator": "####"}, "columns", {}),
    ],
)
def test_the_shared_data_is_read_in_full(name, options, found, skipped):
    rows, reasons, kept = shared_rows(name), Counter(), 0
    assert detect_format(rows[0], RecordOptions(**options), name) == found
    for row in rows:
        try:
            conversation = parse(row, format=found, **options)
        except DataError as error:
            reasons[error.reason] += 1
        else:
            kept += 1
            again = Conversation.from_messages(conversation.to_messages(), tools=json.dumps(conversation.tools))
            assert again == conversation
    assert (reasons, kept) == (skipped, len(rows) - sum(skipped.values()))


# --- round trip -------------------------------------------------------------------------------------------------

# Surrogates are no characters; brackets would make control strings, which answers may not hold.
WRITTEN = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="<[]◁"), max_size=30)
ANSWERS = WRITTEN.filter(str.strip)
READ = st.one_of(WRITTEN, st.sampled_from(["<think>", "</think>a", "<|im_end|>\n<|im_start|>system", "[INST]"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(-1e9, 1e9) | WRITTEN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WRITTEN, inner, max_size=3),
    max_leaves=6,
)
CALLS = st.fixed_dictionaries({"name": st.from_regex(r"[A-Za-z0-9_.-]{1,8}", fullmatch=True)}) | st.fixed_dictionaries(
    {"name": st.just("add"), "arguments": st.dictionaries(WRITTEN, VALUES, max_size=3)}
)


@st.composite
def conversations(draw):
    messages = [{"role": "system", "content": draw(READ)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(READ) + "."})
        for _ in range(draw(st.integers(0, 2))):
            calls = draw(st.lists(CALLS, min_size=1, max_size=3))
            messages.append(assistant(draw(WRITTEN), tool_calls=calls, reasoning=draw(st.none() | ANSWERS)))
            messages += [{"role": "tool", "content": draw(READ)} for _ in calls]
        messages.append(assistant(draw(ANSWERS), reasoning_content=draw(st.none() | ANSWERS)))
    return Conversation.from_messages(messages)


@settings(max_examples=150, deadline=None)
@given(conversations())
def test_messages_of_a_conversation_give_it_again(conversation):
    messages = conversation.to_messages()
    assert Conversation.from_messages(messages) == conversation
    assert Conversation.from_messages(json.loads(json.dumps(messages))) == conversation
    for row in ({"messages": messages}, {"messages": json.dumps(messages)}, {"conversations": messages}):
        assert parse(row) == conversation


@settings(max_examples=150, deadline=None)
@given(READ.filter(str.strip), st.none() | ANSWERS, ANSWERS)
def test_texts_are_kept_to_the_byte(question, reasoning, answer):
    question += "."
    expected = (question, reasoning, answer)
    assert shown(parse({"question": question, "reasoning": reasoning, "answer": answer})) == expected
    assert shown(parse({"instruction": question, "output": answer, "reasoning": reasoning})) == expected
    assert shown(parse({"prompt": question, "completion": [assistant(answer, thinking=reasoning)]})) == expected
    parts = [{"type": "reasoning", "text": reasoning}] if reasoning else []
    row = {"messages": [user([*question]), assistant([*parts, *answer])]}
    assert shown(parse(row)) == expected


# --- fuzz -------------------------------------------------------------------------------------------------------


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value] if levels % 2 else {"a": value}
    return value


HOSTILE = [
    *(
        None,
        True,
        0,
        -1,
        1.5,
        float("nan"),
        float("inf"),
        10**30,
        b"bytes",
        "",
        " ",
        "\ud83d",
        "\x00\x1b[1m",
        [],
        {},
        (),
    ),
    *({1: 2}, {None: "a"}, {"role": 3}, [[]], [None], ["a", 1], {"a": float("nan")}, {b"k": "v"}, object(), {1, 2}),
    *(deep(5000), deep(5001), "[" * 5000, '{"a":' * 5000, "x" * 100_000, '{"name": "add", "arguments": "{"}', "null"),
    *("<think>", "</think>", "a</think>b</think>", "<|im_end|>", "[INST]", "<thinking>a</thinking>b", "◁think▷"),
    *("human", " GPT ", "tool", "system", "/think", "a /no_think", "maybe", '[{"role": "user"}]', Mode.THINKING),
    *({"type": "image_url"}, {"type": "text"}, {"type": ["text"], "text": 1}, {"type": "tool_call", "value": "{}"}),
]
SEEDS = [
    *(row for _, row in SAME.values()),
    *PAIRED.values(),
    {"messages": LOOP, "tools": TOOLS, "mode": "non_thinking", "chat_template_kwargs": {"enable_thinking": False}},
    {
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {}}'},
        ],
        "system": "s",
    },
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]], "language": "en"},
]


def mutate(value, rng):  # noqa: PLR0911
    """A copy of `value` with one place in it changed, removed, doubled, moved or made hostile."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        action = rng.random()
        if action < 0.1:
            return {name: item for name, item in value.items() if name != key}
        if action < 0.2:
            return {**value, rng.choice(["role", "content", "tools", "mode", "thinking", 3, None]): rng.choice(HOSTILE)}
        return {**value, key: mutate(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        index = rng.randrange(len(value))
        action = rng.random()
        if action < 0.1:
            return value[:index] + value[index + 1 :]
        if action < 0.2:
            return [*value, value[index]]
        if action < 0.25:
            return rng.sample(value, len(value))
        return [*value[:index], mutate(value[index], rng), *value[index + 1 :]]
    if isinstance(value, str) and rng.random() < 0.3:
        cut = rng.randint(0, len(value))
        return value[:cut] + rng.choice([item for item in HOSTILE if isinstance(item, str)]) + value[cut:]
    return rng.choice(HOSTILE)


OPTIONS = [
    {},
    {"repair": False},
    {"join_messages": True, "drop_first_assistant": True, "drop_reasoning": True},
    {"plain_control_tokens": True, "reasoning_tags": "<thinking>,</thinking>"},
    {"answer_separator": "#", "remove_pattern": "<<.*?>>"},
]


@pytest.mark.parametrize("name", FORMATS)
def test_a_mutated_row_is_a_conversation_or_a_data_error(name):
    rng = random.Random(f"formats {name}")
    keys = set(RecordOptions().key_columns[name])
    own = [row for row in SEEDS if keys <= row.keys()]
    kept, longest, reasons = 0, 0, Counter()
    for _ in range(1500):
        # Mostly rows of the format that is named, since others fail at once.
        row = rng.choice(own if rng.random() < 0.8 else SEEDS)
        for _ in range(rng.randint(1, 3)):
            row = mutate(row, rng)
        options = RecordOptions(**{**rng.choice(OPTIONS), "format": name})
        notes = []
        try:
            conversation = parse_row(row, options, notes)
        except DataError as error:
            reasons[error.reason] += 1
            longest = max(longest, len(error.message))
            continue
        kept += 1
        assert isinstance(conversation, Conversation)
        assert any(exchange.modes for exchange in conversation.exchanges)
        json.dumps(conversation.to_messages(), allow_nan=False).encode()
        json.dumps(conversation.tools, allow_nan=False)
        assert len({note.reason for note in notes}) == len(notes)
    assert longest < 1000
    assert kept > 100
    assert len(reasons) > 8


def test_another_reasoning_tag_is_warned_of_once(caplog):
    texts._warn_once.cache_clear()
    row = {"question": "a", "answer": "<reasoning>b</reasoning>c"}
    for _ in range(3):
        parse(row)
    assert caplog.text.count("--reasoning_tags") == 1
