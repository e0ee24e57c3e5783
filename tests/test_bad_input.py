# SPDX-License-Identifier: Apache-2.0
"""Bad rows: what is promised for each case, behaviour and message. The ids begin with the number of the case."""

import json
import re
from typing import NamedTuple

import pytest

from thinkfusion import texts
from thinkfusion.formats import DataError, RecordOptions, parse_row
from thinkfusion.modes import Mode


def system(content="s"):
    return {"role": "system", "content": content}


def user(content="2+2?"):
    return {"role": "user", "content": content}


def assistant(content="4", **fields):
    return {"role": "assistant", "content": content, **fields}


def call(name="add", arguments='{"a": 2}', call_id=None):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls):
    return assistant(None, tool_calls=list(calls))


def result(content="4", call_id=None, name=None):
    return {"role": "tool", "content": content, "tool_call_id": call_id, "name": name}


def messages(*given, **columns):
    return {"messages": list(given), **columns}


def schema(name="add", **properties):
    return {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}


ADD = schema(a={"type": "number"})
SHORT = [user(), assistant()]
LOOP = (user(), calling(call()), result())


def parse(row, notes=None, **options):
    name = "paired" if "non_thinking" in row else "messages"
    return parse_row(row, RecordOptions(**{"format": name, **options}), [] if notes is None else notes)


def read(row, **options):
    """The messages of a row, and the notes on it as (kind, reason)."""
    notes = []
    conversation = parse(row, notes, **options)
    return conversation.to_messages(), [(note.kind, note.reason) for note in notes]


# --- refused ----------------------------------------------------------------------------------------------------


class Refused(NamedTuple):
    case: str
    row: dict
    reason: str
    message: str


OTHER = {"role": "user", "content": "x"}
THOUGHT = assistant(reasoning="r")
REFUSED = [
    Refused("09-empty", messages(), "empty_conversation", "messages: found [], expected a list of at least one"),
    Refused("09-null", {"messages": None}, "empty_conversation", "messages: found None, expected a list"),
    Refused("09-no-JSON", {"messages": "[{"}, "empty_conversation", "messages: found '[{', expected a list"),
    Refused("09-JSON-object", {"messages": "{}"}, "empty_conversation", "messages: found {}, expected a list"),
    Refused("10-text", messages(user(), "4"), "bad_message", "messages[1]: found '4', expected an object"),
    Refused("10-no-role", messages(user(), {"content": "4"}), "bad_message", "messages[1].role: missing; found the fi"),
    Refused("10-no-content", messages(user(), {"role": "assistant"}), "bad_message", "messages[1].content: missing"),
    Refused(
        "11-bot", messages(user(), OTHER | {"role": "bot"}), "unknown_role", "messages[1].role: found 'bot', expected"
    ),
    Refused("11-critic", messages(user(), OTHER | {"role": "Critic "}), "unknown_role", "[1].role: found 'Critic '"),
    Refused(
        "11-number", messages(OTHER | {"role": 3}), "unknown_role", "messages[0].role: found 3, expected one of sys"
    ),
    Refused("13-users", messages(user(), user(), assistant()), "role_order", "messages[1].role: found 'user' after '"),
    Refused("13-option", messages(user(), user(), assistant()), "role_order", "--join_messages"),
    Refused("13-assistants", messages(*SHORT, assistant()), "role_order", "--join_messages"),
    Refused("14", messages(assistant(), user(), assistant()), "role_order", "messages[0].role: found 'assistant', exp"),
    Refused("14-option", messages(assistant(), user(), assistant()), "role_order", "--drop_first_assistant"),
    Refused("15-only-user", messages(system(), user()), "no_answer", "messages[1]: no assistant message answers this"),
    Refused("15-result", messages(*LOOP), "no_answer", "messages[2]: no assistant message answers this tool message"),
    Refused("16", messages(*SHORT, system(), user(), assistant()), "system_position", "messages[2].role"),
    Refused("19-null", messages(user(), assistant(None)), "empty_answer", "messages[1].content: found None, but an as"),
    Refused("19-empty", messages(user(), assistant("")), "empty_answer", "messages[1].content: found ''"),
    Refused("19-blank", messages(user(), assistant(" \n\t")), "empty_answer", "messages[1].content: found ' \\n\\t'"),
    Refused("19-reasoning", messages(user(), assistant("<think>r</think>")), "empty_answer", "messages[1].content"),
    Refused("19-no-part", messages(user(), assistant([])), "empty_answer", "messages[1].content: found ''"),
    *(
        Refused(
            f"20-{kind}",
            messages(user([{"type": "text", "text": "a"}, {"type": kind, kind: "x"}]), assistant()),
            "unsupported_modality",
            f"messages[0].content[1].type: found '{kind}', expected text",
        )
        for kind in ("image", "image_url", "input_image", "audio", "input_audio", "video", "video_url")
    ),
    Refused("21", messages(user([{"type": "poem", "text": "a"}])), "unknown_part", "messages[0].content[0].type: fou"),
    Refused("21-expected", messages(user([{"type": None}])), "unknown_part", "expected one of text, output_text, inpu"),
    Refused("21-reasoning", messages(user([{"type": "reasoning", "text": "a"}])), "unknown_part", "of role 'user'"),
    Refused("22-number", messages(user(), assistant(4)), "bad_message", "messages[1].content: found 4, expected text"),
    Refused("22-boolean", messages(user(True), assistant()), "bad_message", "messages[0].content: found True, expecte"),
    Refused("22-part", messages(user([{"type": "text", "text": 3}])), "bad_message", "content[0].text: found 3"),
    Refused(
        "23",
        messages(user(), assistant(reasoning_content="a", thinking="b")),
        "conflicting_reasoning",
        "messages[1]: reasoning_content and thinking hold different texts",
    ),
    Refused(
        "23-part",
        messages(user(), assistant([{"type": "thinking", "thinking": "a"}, "4"], reasoning="b")),
        "conflicting_reasoning",
        "messages[1]: reasoning and content hold different texts",
    ),
    Refused(
        "24-differ",
        messages(user(), assistant("<think>a</think>4", reasoning="b")),
        "conflicting_reasoning",
        "messages[1]: the reasoning of its field and that inside <think>…</think> differ",
    ),
    Refused("26", messages(user(), assistant("<think>a")), "unclosed_think", "messages[1]: a <think> is never closed"),
    Refused("28-two", messages(user(), assistant("<think>a</think><think>b</think>4")), "multiple_think", "found 2"),
    Refused("28-nested", messages(user(), assistant("<think><think>a</think></think>4")), "multiple_think", "found 2"),
    Refused(
        "28-parts",
        messages(user(), assistant([{"type": "thinking", "text": "a"}, {"type": "thinking", "text": "b"}, "4"])),
        "multiple_think",
        "messages[1].content[1]: found a second part of reasoning",
    ),
    Refused("29", messages(user(), assistant("So: <think>a</think>4")), "late_think", "messages[1]: the think block"),
    Refused(
        "29-parts",
        messages(user(), assistant(["So:", {"type": "reasoning", "text": "a"}])),
        "late_think",
        "messages[1].content[1]: the reasoning begins after the answer",
    ),
    Refused(
        "29-after-a-call",
        messages(user(), assistant([{"type": "tool_call", "name": "add"}, {"type": "reasoning", "text": "a"}])),
        "late_think",
        "messages[1].content[1]: the reasoning begins after the answer",
    ),
    Refused(
        "10-text-after-a-call",
        messages(user(), assistant([{"type": "tool_call", "name": "add"}, "4"])),
        "bad_message",
        "messages[1].content[1]: found text after a tool call",
    ),
    Refused("38-first", messages(result(), user(), assistant()), "tool_order", "messages[0].role: found 'tool', expec"),
    *(
        Refused(
            f"32-answer-{text}",
            messages(user(), assistant(f"4{text}")),
            "control_token_in_answer",
            f"messages[1].content: found the control string {text} inside",
        )
        for text in (
            *("<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<｜end▁of▁sentence｜>"),
            *("<｜Assistant｜>", "<|start|>", "<|end|>", "<|return|>", "<|message|>", "[INST]", "[/INST]", "[e~["),
            *("<|start_of_role|>", "<|end_of_text|>", "<|begin_of_sentence|>", "</tool_call>", "]~b]", "[gMASK]"),
        )
    ),
    Refused(
        "32-reasoning", messages(user(), assistant(reasoning="a</think>")), "control_token_in_answer", "[1].reasoning"
    ),
    Refused(
        "32-beside-a-field",
        messages(user(), assistant("4</think>5", reasoning="a")),
        "control_token_in_answer",
        "messages[1].content: found the control string </think>",
    ),
    Refused(
        "32-option", messages(user(), assistant("<|im_end|>")), "control_token_in_answer", "--plain_control_tokens"
    ),
    Refused(
        "32-arguments",
        messages(user(), calling(call(arguments={"a": "<|im_end|>"}))),
        "control_token_in_answer",
        "messages[1].tool_calls[0].arguments: found the control string <|im_end|>",
    ),
    Refused("33", messages(user("2+2? /think"), assistant()), "mode_conflict", "switches to thinking with its last"),
    Refused(
        "33-mode", messages(user("/no_think"), assistant(reasoning="r"), mode=True), "mode_conflict", "non_thinking"
    ),
    Refused("34-maybe", messages(*SHORT, mode="maybe"), "unknown_mode", "mode: unknown mode 'maybe'; use"),
    Refused("34-2", messages(*SHORT, mode=2), "unknown_mode", "unknown mode 2; use 'thinking' or 'non_th"),
    Refused("34-null", messages(*SHORT, mode=None), "unknown_mode", "mode: found null, expected 'thinking'"),
    Refused("34-switch", messages(*SHORT, enable_thinking="x"), "unknown_mode", "enable_thinking: unknown"),
    Refused("35", messages(*SHORT, mode="thinking"), "missing_reasoning", "messages[1] has no reasoning"),
    Refused("36-no-JSON", messages(*SHORT, tools="[{"), "bad_tools", "tools: not JSON"),
    Refused("36-no-list", messages(*SHORT, tools="{}"), "bad_tools", "tools: found {}, expected a list"),
    Refused("36-object", messages(*SHORT, tools=ADD), "bad_tools", "tools: found {'type'"),
    Refused("36-no-name", messages(*SHORT, tools=[ADD, {"type": "function"}]), "bad_tools", "tools[1]: f"),
    Refused("36-NaN", messages(*SHORT, tools='[{"name": "a", "b": NaN}]'), "bad_tools", "NaN is no JSON"),
    *(
        Refused(
            f"37-{arguments!r:.12}",
            messages(user(), calling(call(arguments=arguments))),
            "bad_tool_arguments",
            "messages[1].tool_calls[0].arguments: ",
        )
        for arguments in ("{a", "", "[1]", "null", "NaN", '{"a": 1, "a": 2}', None, 3, {"a": float("nan")}, {1: 2})
    ),
    Refused(
        "37-part",
        messages(user(), assistant([{"type": "tool_call", "value": "{"}])),
        "bad_tool_arguments",
        "messages[1].content[0].value: not JSON",
    ),
    Refused("38-no-call", messages(*SHORT, result(), assistant()), "tool_order", "messages[2].role: found"),
    Refused("38-at-once", messages(user(), result(), assistant()), "tool_order", "found 'tool' after 'user', expected"),
    Refused("38-no-result", messages(user(), calling(call()), user(), assistant()), "tool_order", "expected tool"),
    Refused(
        "38-answer", messages(user(), calling(call()), assistant()), "tool_order", "messages[2].role: found 'assis"
    ),
    Refused(
        "38-ids",
        messages(user(), calling(call(call_id="x")), result(call_id="y"), assistant()),
        "tool_order",
        "messages[2].tool_call_id: found 'y', expected the id of a call without a result: ['x']",
    ),
    Refused(
        "38-one-id-twice",
        messages(
            user(), calling(call(call_id="x"), call(call_id="y")), result(call_id="x"), result(call_id="x"), assistant()
        ),
        "tool_order",
        "messages[3].tool_call_id: found 'x'",
    ),
    Refused(
        "38-one-result-of-two",
        messages(user(), calling(call(call_id="x"), call(call_id="y")), result(call_id="x"), assistant()),
        "tool_order",
        "messages[1].tool_calls: found 1 results for 2 calls",
    ),
    Refused("38-too-many", messages(*LOOP, result(), assistant()), "tool_order", "found 2 results for 1 calls"),
    Refused("38-name", messages(*LOOP[:2], result(name="sub"), assistant()), "tool_order", "found 'sub', expected a"),
    *(
        Refused(f"42-{name}", {"thinking": thinking, "non_thinking": plain, **columns}, "pair_mismatch", message)
        for name, columns, thinking, plain, message in (
            ("users", {}, [OTHER, THOUGHT], [user(), assistant()], "thinking and non_thinking: their prompts differ"),
            (
                "system",
                {},
                [system(), OTHER, THOUGHT],
                [OTHER, assistant()],
                "expected two answers to the same messages",
            ),
            ("history", {}, [*SHORT, OTHER, THOUGHT], [user(), assistant("5"), OTHER, assistant()], "prompts differ"),
            (
                "prompt",
                {"prompt": "x"},
                [OTHER, THOUGHT],
                [user(), assistant()],
                "non_thinking: its messages do not be",
            ),
        )
    ),
    *(
        Refused(
            f"50-{first}+{second}",
            messages(user(), assistant([first, {"type": "text", "text": second}])),
            "control_token_in_answer",
            "messages[1].content: ",
        )
        for first, second in (("a<|im_", "end|>"), ("<thi", "nk>a</think>b"), ("<think>a</thi", "nk>b"), ("[IN", "ST]"))
    ),
    Refused("50-role", messages({"role": "user<|im_end|>", "content": "a"}), "unknown_role", "found 'user<|im_end|>'"),
    Refused("50-call", messages(user(), calling(call("<|im_end|>"))), "bad_message", "name: found '<|im_end|>'"),
    Refused("50-tool", messages(*SHORT, tools=[{"name": "a b"}]), "bad_tools", "tools[0].name: found 'a b'"),
    Refused(
        "50-key", messages(user(), calling(call(arguments={"</think>": 1}))), "control_token_in_answer", "</think>"
    ),
]


@pytest.mark.parametrize("refused", REFUSED, ids=[refused.case for refused in REFUSED])
def test_what_is_refused(refused):
    with pytest.raises(DataError, match=re.escape(refused.message)) as caught:
        parse(refused.row)
    assert caught.value.reason == refused.reason


# --- repaired ---------------------------------------------------------------------------------------------------


class Repaired(NamedTuple):
    case: str
    row: dict
    reason: str
    messages: list


REASONED = [user(), assistant(reasoning_content="r")]
REPAIRED = [
    Repaired("09-JSON", {"messages": json.dumps(SHORT)}, "parsed_json", SHORT),
    Repaired("11-human", messages({"role": "human", "content": "2+2?"}, assistant()), "role_alias", SHORT),
    Repaired("11-gpt", messages(user(), {"role": "gpt", "content": "4"}), "role_alias", SHORT),
    Repaired("11-model", messages(user(), {"role": "model", "content": "4"}), "role_alias", SHORT),
    Repaired("11-developer", messages({"role": "developer", "content": "s"}, *SHORT), "role_alias", [system(), *SHORT]),
    *(
        Repaired(
            f"11-{alias}",
            messages(*LOOP[:2], {"role": alias, "content": "4"}, assistant()),
            "role_alias",
            [
                user(),
                assistant("", tool_calls=[{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]),
                {"role": "tool", "content": "4"},
                assistant(),
            ],
        )
        for alias in ("observation", "function")
    ),
    Repaired("12", messages(user() | {"role": " User"}, assistant() | {"role": "ASSISTANT"}), "role_case", SHORT),
    Repaired("15", messages(*SHORT, user("more")), "trailing_user", SHORT),
    Repaired("15-two", messages(*SHORT, user("more"), user("and more")), "trailing_user", SHORT),
    Repaired("17", messages(system("a"), system("b"), *SHORT), "joined_system", [system("a\n\nb"), *SHORT]),
    Repaired("24", messages(user(), assistant("<think>r</think>4", thinking="r")), "duplicate_reasoning", REASONED),
    Repaired("24-fields", messages(user(), assistant(reasoning="r", thinking="r")), "duplicate_reasoning", REASONED),
    Repaired("25-field", messages(user(), assistant(reasoning=" \n")), "blank_reasoning", SHORT),
    Repaired("25-block", messages(user(), assistant("<think>\n\n</think>\n\n4")), "blank_reasoning", SHORT),
    Repaired("27", messages(user(), assistant("r\n</think>\n\n4")), "opened_in_prompt", REASONED),
    Repaired("27-blank", messages(user(), assistant("</think>4")), "opened_in_prompt", SHORT),
]


@pytest.mark.parametrize("repaired", REPAIRED, ids=[repaired.case for repaired in REPAIRED])
def test_what_is_repaired_and_counted(repaired):
    assert read(repaired.row) == (repaired.messages, [("altered", repaired.reason)])


@pytest.mark.parametrize("repaired", REPAIRED, ids=[repaired.case for repaired in REPAIRED])
def test_repairs_can_be_turned_off(repaired):
    with pytest.raises(DataError, match=r"messages.*repairs are switched off") as caught:
        parse(repaired.row, repair=False)
    assert caught.value.reason == repaired.reason


def test_25_blank_reasoning_counts_as_non_thinking():
    (exchange,) = parse(messages(user(), assistant(reasoning="\n"))).exchanges
    assert (exchange.has_reasoning, exchange.modes) == (False, (Mode.NON_THINKING,))


# --- done on demand ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "read_as"),
    [
        (messages(user("a"), user("b"), assistant()), [user("a\n\nb"), assistant()]),
        (
            messages(user(), assistant("a", reasoning="r"), assistant("b")),
            [user(), assistant("a\n\nb", reasoning_content="r")],
        ),
        (messages(user("a"), user("b"), user("c"), assistant()), [user("a\n\nb\n\nc"), assistant()]),
    ],
)
def test_13_messages_of_one_role_are_joined_on_demand(row, read_as):
    assert read(row, join_messages=True) == (read_as, [("altered", "joined_messages")])


def test_13_a_reasoning_is_never_joined_behind_an_answer():
    with pytest.raises(DataError, match=re.escape("messages[2]: has reasoning")) as caught:
        parse(messages(*SHORT, assistant(reasoning="r")), join_messages=True)
    assert caught.value.reason == "late_think"


def test_14_the_first_assistant_is_dropped_on_demand():
    row = messages(system(), assistant("Hello"), *SHORT)
    assert read(row, drop_first_assistant=True) == ([system(), *SHORT], [("altered", "dropped_first_assistant")])


def test_13_a_call_is_joined_to_no_later_answer():
    for option in ({"join_messages": True}, {"join_messages": True, "drop_first_assistant": True}):
        with pytest.raises(DataError) as caught:
            parse(messages(user(), calling(call()), assistant()), **option)
        assert caught.value.reason == "tool_order"


def test_14_a_result_before_the_first_user_message_is_not_dropped():
    with pytest.raises(DataError) as caught:
        parse(messages(result(), user(), assistant()), drop_first_assistant=True)
    assert caught.value.reason == "tool_order"


def test_30_other_tags_are_read_only_where_they_are_named():
    for opening, closing in (("<thinking>", "</thinking>"), ("<reasoning>", "</reasoning>"), ("◁think▷", "◁/think▷")):
        row = messages(user(), assistant(f"{opening}\nr\n{closing}\n4"))
        assert read(row) == (row["messages"], [("noted", "other_reasoning_tags")])
        assert read(row, reasoning_tags=f"{opening}, {closing}") == (REASONED, [])
        assert read(messages(*REASONED), reasoning_tags=f"{opening},{closing}") == (REASONED, [])
    row = messages(user(), assistant("<|channel|>analysis<|message|>r<|end|>4"))
    assert read(row, reasoning_tags="<|channel|>analysis<|message|>,<|end|>") == (REASONED, [])


def test_30_one_warning_names_the_option(caplog):
    texts._warn_once.cache_clear()
    for _ in range(3):
        parse(messages(user(), assistant("<thinking>r</thinking>4")))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "begins with <thinking>" in caplog.text
    assert "--reasoning_tags" in caplog.text


@pytest.mark.parametrize(
    ("given", "answer", "reasoning"),
    [
        (assistant("Close it with </think>."), "Close it with </think>.", None),
        (assistant("4<|im_end|>"), "4<|im_end|>", None),
        (assistant("<think>r</think>Close it with </think>."), "Close it with </think>.", "r"),
        (assistant("Close it with </think>.", reasoning="r"), "Close it with </think>.", "r"),
        (assistant(reasoning="<think> opens"), "4", "<think> opens"),
        (assistant("See <think>a</think>b."), "See <think>a</think>b.", None),
        (assistant("<think> opens."), "<think> opens.", None),
    ],
)
def test_32_control_strings_are_plain_text_on_demand(given, answer, reasoning):
    found, notes = read(messages(user(), given), plain_control_tokens=True)
    assert (found[1]["content"], found[1].get("reasoning_content")) == (answer, reasoning)
    assert notes == [("noted", "control_token_in_answer")]


def test_35_reasoning_is_dropped_on_demand():
    row = messages(*REASONED, mode="non_thinking")
    assert read(row) == (REASONED, [])
    assert read(row, drop_reasoning=True) == (SHORT, [("altered", "dropped_reasoning")])
    assert parse(row, drop_reasoning=True).exchanges[0].modes == (Mode.NON_THINKING,)
    assert read(messages(*REASONED), drop_reasoning=True) == (REASONED, [])


# --- accepted ---------------------------------------------------------------------------------------------------


def test_18_no_content_beside_calls_is_accepted():
    step = parse(messages(user(), calling(call()), result(), assistant())).exchanges[0].steps[0]
    assert (step.content, step.tool_calls) == ("", ({"name": "add", "arguments": {"a": 2}},))


@pytest.mark.parametrize("text", ["</think>", "a<|im_end|>\n<|im_start|>system\nb", "[INST]", "<｜User｜>", "<think>"])
def test_31_control_strings_that_the_model_reads_are_kept_and_counted(text):
    for row in (
        messages(system(text), *SHORT),
        messages(user(text), assistant()),
        messages(*LOOP[:2], result(text), assistant()),
        messages(*SHORT, tools=[{"name": "add", "description": text}]),
    ):
        notes = []
        conversation = parse(row, notes)
        assert [(note.kind, note.reason) for note in notes] == [("noted", "control_token_in_text")]
        assert text in [
            conversation.system,
            *(message.get("content") for message in conversation.to_messages()),
            *(tool["description"] for tool in conversation.tools),
        ]


@pytest.mark.parametrize("text", ["a < b", "x[0]", "<b>a</b>", "a<|b", "<||>", "List<thing>", "<<2+2=4>>", "[1, 2]"])
def test_31_32_other_brackets_are_ordinary(text):
    assert read(messages(user(text), assistant(text)))[1] == []


def test_33_a_switch_may_agree():
    assert parse(messages(user("2+2? /no_think"), assistant())).exchanges[0].modes == (Mode.NON_THINKING,)


def test_38_a_last_call_without_a_result_is_an_answer():
    (exchange,) = parse(messages(user(), calling(call(call_id="x")))).exchanges
    assert exchange.steps[0].tool_calls[0]["name"] == "add"


def test_38_ids_that_match_are_accepted():
    calls = calling(call(call_id="x"), call("log", "{}", call_id="y"))
    results = [result("4", "x", "add"), result("logged", "y", "log")]
    assert read(messages(user(), calls, *results, assistant()))[1] == []
    assert read(messages(user(), calls, *results[::-1], assistant()))[1] == [("noted", "results_out_of_order")]


def test_38_one_result_without_an_id_answers_all_calls():
    row = messages(user(), calling(call(), call("log", "{}")), result('["4", "logged"]'), assistant())
    assert len(parse(row).exchanges[0].steps) == 3


# --- nulls that Arrow filled ------------------------------------------------------------------------------------


def arguments_of(row, notes=None, **options):
    return parse(row, notes, **options).exchanges[0].steps[0].tool_calls[0]["arguments"]


NESTED = schema(a={"type": "object", "properties": {"b": {}}}, c={"items": {"properties": {"d": {}}}})


@pytest.mark.parametrize(
    ("tool", "given", "kept"),
    [
        (ADD, {"a": 1, "b": None}, {"a": 1}),
        (ADD, {"a": None, "b": None}, {"a": None}),
        (ADD, {"a": 1, "b": 2, "c": None}, {"a": 1, "b": 2}),
        (schema(a={}, b=None), {"a": 1, "b": None}, {"a": 1}),
        (NESTED, {"a": {"b": None, "x": None}, "c": [{"d": None, "x": None}]}, {"a": {"b": None}, "c": [{"d": None}]}),
        (NESTED["function"], {"a": {"b": 1, "x": None}}, {"a": {"b": 1}}),
    ],
)
def test_49_nulls_of_keys_that_the_tool_lacks_are_stripped(tool, given, kept):
    row = messages(user(), calling(call(arguments=given)), tools=[tool])
    notes = []
    assert arguments_of(row, notes) == kept
    assert [(note.kind, note.reason) for note in notes] == [("altered", "filled_nulls")]
    with pytest.raises(DataError, match="repairs are switched off") as caught:
        parse(row, repair=False)
    assert caught.value.reason == "filled_nulls"


@pytest.mark.parametrize(
    ("tools", "given", "kept"),
    [
        ([ADD], {"a": None}, {"a": None}),
        ([ADD], '{"a": 1, "b": null}', {"a": 1, "b": None}),
        ([schema("sub", a={})], {"b": None}, {"b": None}),
        ([{"name": "add"}], {"b": None}, {"b": None}),
        (None, {"b": None}, {"b": None}),
        ([ADD], {"b": "null"}, {"b": "null"}),
    ],
)
def test_49_other_nulls_are_kept(tools, given, kept):
    notes = []
    assert arguments_of(messages(user(), calling(call(arguments=given)), tools=tools), notes) == kept
    assert notes == []


def test_49_a_schema_in_json_text_keeps_its_nulls():
    tool = {"name": "add", "parameters": None}
    notes = []
    assert parse(messages(*SHORT, tools=json.dumps([tool])), notes).tools == (tool,)
    assert notes == []
    assert parse(messages(*SHORT, tools=[tool]), notes).tools == ({"name": "add"},)
    assert [(note.kind, note.reason) for note in notes] == [("altered", "filled_nulls")]


def test_49_an_arrow_table_fills_and_we_strip():
    pyarrow = pytest.importorskip("pyarrow")
    rows = [
        messages(
            user(), calling(call(name, {key: 1})), result(), assistant(), tools=[schema(name, **{key: {"type": "n"}})]
        )
        for name, key in (("add", "a"), ("sub", "b"))
    ]
    for row, given in zip(pyarrow.Table.from_pylist(rows).to_pylist(), rows, strict=True):
        assert set(row["messages"][1]["tool_calls"][0]["function"]["arguments"]) == {"a", "b"}
        notes = []
        assert parse(row, notes) == parse(given)
        assert [(note.kind, note.reason) for note in notes] == [("altered", "filled_nulls")]


# --- pieces -----------------------------------------------------------------------------------------------------


def test_50_pieces_that_make_a_control_string_are_kept_as_text_and_counted():
    row = messages(user([{"type": "text", "text": "a<|im_"}, {"type": "text", "text": "end|>"}]), assistant())
    found, notes = read(row)
    assert (found[0]["content"], notes) == ("a<|im_end|>", [("noted", "control_token_in_text")])


def test_50_a_schema_may_hold_control_strings_and_is_counted():
    tools = [schema(**{"<|im_end|>": {"type": "number"}})]
    notes = []
    assert parse(messages(*SHORT, tools=tools), notes).tools == tuple(tools)
    assert [(note.kind, note.reason) for note in notes] == [("noted", "control_token_in_text")]


def test_50_parts_without_control_strings_are_joined():
    found, notes = read(messages(user(["2+", "2?"]), assistant(["<think>r</think>", "4"])))
    assert (found, notes) == (REASONED, [])


@pytest.mark.parametrize("depth", [30, 200])
def test_tools_and_arguments_are_not_nested_without_end(depth):
    """Chat templates write JSON by recursion; a row that none could render is a bad row, not a crash."""
    nested = {}
    for _ in range(depth - 2):
        nested = {"a": nested}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": nested}}]}
    row = {
        "messages": [{"role": "user", "content": "a"}, call],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": nested if depth > 30 else {}}}],
    }
    if depth == 30:
        assert parse_row(row, RecordOptions(format="messages"), []).exchanges
        return
    with pytest.raises(DataError, match="nested more than 32 deep") as caught:
        parse_row(row, RecordOptions(format="messages"), [])
    assert caught.value.reason == "bad_tools"
    with pytest.raises(DataError, match="nested more than 32 deep") as caught:
        parse_row({**row, "tools": None}, RecordOptions(format="messages"), [])
    assert caught.value.reason == "bad_tool_arguments"
