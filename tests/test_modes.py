# SPDX-License-Identifier: Apache-2.0
"""Modes, schemes, soft switches, and the splitting of replies into reasoning and answer."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from thinkfusion import install_chat_template
from thinkfusion.modes import (
    CONTROL,
    EMPTY_BLOCK,
    REPLY_CLASSES,
    SCHEMES,
    Mode,
    Reply,
    get_scheme,
    split_reply,
    split_soft_switch,
)

THINKING, NON_THINKING = Mode.THINKING, Mode.NON_THINKING


@pytest.fixture(scope="module")
def tokenizer():
    """Every byte is a token: an ASCII letter is one, a Korean syllable three."""
    bytes_ = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=bytes_, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core)
    install_chat_template(made)
    return made


def encode(tokenizer, text):
    """Ids as a model writes them: control strings as control tokens."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def spell(tokenizer, text):
    """Ids of ASCII text, one ordinary token per character, control strings too."""
    return tokenizer.convert_tokens_to_ids(list(text))


# --- Mode -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "mode"),
    [
        (THINKING, THINKING),
        (NON_THINKING, NON_THINKING),
        ("thinking", THINKING),
        ("non_thinking", NON_THINKING),
        ("non-thinking", NON_THINKING),
        ("Non Thinking", NON_THINKING),
        (" THINKING\n", THINKING),
        (True, THINKING),
        (False, NON_THINKING),
    ],
)
def test_parse_understands(value, mode):
    assert Mode.parse(value) is mode


@pytest.mark.parametrize("value", ["maybe", "", "true", "think", None, 0, 1, 2, 1.0, ["thinking"]])
def test_parse_refuses_and_names_the_values_it_knows(value):
    with pytest.raises(ValueError, match=r"unknown mode .*'thinking' or 'non_thinking'") as caught:
        Mode.parse(value)
    assert repr(value) in str(caught.value)


def test_a_mode_prints_as_its_value():
    assert f"{NON_THINKING}" == "non_thinking"
    assert THINKING == "thinking"


# --- schemes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode", "prefix"),
    [
        ("control", THINKING, "<think>"),
        ("control", NON_THINKING, "</think>"),
        ("empty-block", THINKING, ""),
        ("empty-block", NON_THINKING, "<think>\n\n</think>\n\n"),
    ],
)
def test_prefix_is_that_of_the_family(name, mode, prefix):
    assert "".join(get_scheme(name).prefix(mode)) == prefix


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_tags_stand_apart_in_every_scheme(scheme):
    pieces = [*scheme.thinking_prefix, *scheme.thinking_start, *scheme.thinking_end, *scheme.non_thinking_prefix]
    assert [piece for piece in pieces if "think>" in piece and piece not in ("<think>", "</think>")] == []
    opened = scheme.thinking_prefix + scheme.thinking_start
    assert opened.count("<think>") == 1
    assert scheme.thinking_end.count("</think>") == 1


def test_only_control_renders_history_as_non_thinking():
    assert CONTROL.history_is_non_thinking
    assert not EMPTY_BLOCK.history_is_non_thinking


def test_get_scheme_takes_a_name_or_a_scheme():
    assert get_scheme("control") is CONTROL
    assert get_scheme("empty-block") is EMPTY_BLOCK
    assert get_scheme(EMPTY_BLOCK) is EMPTY_BLOCK


def test_get_scheme_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'other'.*control, empty-block"):
        get_scheme("other")


# --- soft switches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rest", "mode"),
    [
        ("Add 2 and 3 /think", "Add 2 and 3", THINKING),
        ("Add 2 and 3 /no_think", "Add 2 and 3", NON_THINKING),
        ("Add 2 and 3\n/no_think", "Add 2 and 3", NON_THINKING),
        ("Add 2 and 3.\n\n/think  \n", "Add 2 and 3.", THINKING),
        ("  Add\t/think", "  Add", THINKING),
        ("/think", "", THINKING),
        ("/no_think", "", NON_THINKING),
        ("답은?\n/no_think", "답은?", NON_THINKING),
        ("/think or not /no_think", "/think or not", NON_THINKING),
    ],
)
def test_switch_is_the_last_word(text, rest, mode):
    assert split_soft_switch(text) == (rest, mode)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  two spaces, a line \n\n",
        "what does /think do?",
        "/think about it",
        "a/think",
        "https://example.org/think",
        "/nothink",
        "/no-think",
        "/thinking",
        "/THINK",
        "/think.",
        "//think",
        "no_think",
    ],
)
def test_without_a_switch_the_text_is_unchanged(text):
    assert split_soft_switch(text) == (text, None)


# --- replies as text --------------------------------------------------------------------------------------------

# scheme, mode, what the model wrote, whether it finished, class, reasoning, answer
REPLIES = [
    ("control", THINKING, "why</think>because", True, "ok", "why", "because"),
    ("control", THINKING, "\nwhy\n</think>\n\nbecause\n", True, "ok", "why", "because"),
    ("control", THINKING, "because", True, "never_closed", "", "because"),
    ("control", THINKING, " \n</think>because", True, "empty_trace", "", "because"),
    ("control", THINKING, "<think>why</think>because", True, "extra_tag", "why", "because"),
    ("control", THINKING, "why</think>be</think>cause", True, "extra_tag", "why", "because"),
    ("control", THINKING, "why<think>", True, "extra_tag", "", "why"),
    ("control", THINKING, "why</think> \n", True, "empty_answer", "why", ""),
    ("control", THINKING, "why", False, "truncated", "why", ""),
    ("control", THINKING, "why</think>bec", False, "truncated", "why", "bec"),
    ("control", NON_THINKING, "because", True, "ok", "", "because"),
    ("control", NON_THINKING, "</think>because", True, "extra_tag", "", "because"),
    ("control", NON_THINKING, "why</think>because", True, "extra_tag", "why", "because"),
    ("control", NON_THINKING, "<think>because", True, "extra_tag", "", "because"),
    ("control", NON_THINKING, " \n", True, "empty_answer", "", ""),
    ("control", NON_THINKING, "bec", False, "truncated", "", "bec"),
    ("empty-block", THINKING, "<think>\nwhy\n</think>\n\nbecause", True, "ok", "why", "because"),
    ("empty-block", THINKING, "\n<think>why</think>because", True, "ok", "why", "because"),
    ("empty-block", THINKING, "because", True, "never_closed", "", "because"),
    ("empty-block", THINKING, "<think>\nbecause", True, "never_closed", "", "because"),
    ("empty-block", THINKING, "<think>\n\n</think>\n\nbecause", True, "empty_trace", "", "because"),
    ("empty-block", THINKING, "hm<think>why</think>because", True, "extra_tag", "hmwhy", "because"),
    ("empty-block", THINKING, "<think><think>why</think>because", True, "extra_tag", "why", "because"),
    ("empty-block", THINKING, "<think>\nwhy\n</think>\n\n", True, "empty_answer", "why", ""),
    ("empty-block", THINKING, "<think>\nwh", False, "truncated", "wh", ""),
    ("empty-block", NON_THINKING, "because", True, "ok", "", "because"),
    ("empty-block", NON_THINKING, "<think>\n\n</think>\n\nbecause", True, "extra_tag", "", "because"),
    ("empty-block", NON_THINKING, "", True, "empty_answer", "", ""),
    ("empty-block", NON_THINKING, "bec", False, "truncated", "", "bec"),
]


@pytest.mark.parametrize("case", REPLIES, ids=[f"{case[0]}-{case[1]}-{case[2]!r}" for case in REPLIES])
def test_every_class(case):
    scheme, mode, text, finished, kind, reasoning, answer = case
    reply = split_reply(text, mode, scheme=scheme, finished=finished)
    assert reply == Reply(mode, reasoning, answer, kind, finished)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_cases_above_cover_every_class(scheme):
    seen = {mode: {case[4] for case in REPLIES if case[:2] == (scheme, mode)} for mode in Mode}
    assert seen[THINKING] == set(REPLY_CLASSES)
    assert seen[NON_THINKING] == set(REPLY_CLASSES) - {"never_closed", "empty_trace"}


@pytest.mark.parametrize(
    ("text", "finished", "kind"),
    [
        ("<think>why", False, "extra_tag"),
        ("why</think>a</think>", False, "extra_tag"),
        ("", False, "truncated"),
        ("</think>", False, "truncated"),
        ("why</think>", False, "truncated"),
        ("", True, "never_closed"),
        ("</think>", True, "empty_trace"),
    ],
)
def test_the_first_class_that_fits_wins(text, finished, kind):
    assert split_reply(text, THINKING, finished=finished).kind == kind


@pytest.mark.parametrize("kind", REPLY_CLASSES)
def test_ok_and_truncated_are_no_format_errors(kind):
    assert Reply(THINKING, "", "", kind).format_error is (kind not in ("ok", "truncated"))


def test_a_reply_unpacks():
    reasoning, answer = split_reply("2+2 is 4.</think>4", "thinking")
    assert (reasoning, answer) == ("2+2 is 4.", "4")


@pytest.mark.parametrize(("mode", "parsed"), [(True, THINKING), (False, NON_THINKING), ("non-thinking", NON_THINKING)])
def test_the_mode_is_parsed(mode, parsed):
    assert split_reply("4", mode).mode is parsed


def test_text_counts_as_finished_and_has_no_token_counts():
    reply = split_reply("why</think>4", THINKING)
    assert (reply.finished, reply.reasoning_tokens, reply.answer_tokens) == (True, None, None)


def test_what_follows_the_end_of_turn_is_left_out():
    reply = split_reply("why</think>4<|im_end|>\n<|im_start|>user\n</think>", THINKING)
    assert reply == Reply(THINKING, "why", "4", "ok", True)
    assert split_reply("4</s></think>5", NON_THINKING, end_of_turn="</s>").answer == "4"


def test_a_reply_with_its_end_of_turn_was_not_cut(tokenizer):
    text = "why</think>4<|im_end|>"
    assert split_reply(text, THINKING, finished=False).kind == "ok"
    assert split_reply(encode(tokenizer, text), THINKING, tokenizer=tokenizer, finished=False).kind == "ok"


def test_a_close_tag_in_a_code_fence_is_a_tag():
    reply = split_reply("why</think>```\n</think>\n```", THINKING)
    assert (reply.kind, reply.reasoning) == ("extra_tag", "why")


def test_unknown_mode_and_scheme_are_errors():
    with pytest.raises(ValueError, match="unknown mode"):
        split_reply("4", "maybe")
    with pytest.raises(ValueError, match="unknown scheme"):
        split_reply("4", "thinking", scheme="other")


# --- replies as ids ---------------------------------------------------------------------------------------------


def test_ids_need_a_tokenizer():
    with pytest.raises(ValueError, match="tokenizer="):
        split_reply([1, 2], THINKING)


def test_ids_are_split_at_control_tokens_and_counted(tokenizer):
    ids = encode(tokenizer, "one two</think>4<|im_end|>")
    assert split_reply(ids, THINKING, tokenizer=tokenizer) == Reply(THINKING, "one two", "4", "ok", True, 7, 1)


def test_a_spelled_tag_is_text(tokenizer):
    ids = [*spell(tokenizer, "a</think>b<|im_end|>"), *encode(tokenizer, "</think>"), *spell(tokenizer, "c<think>")]
    reply = split_reply(ids, THINKING, tokenizer=tokenizer, finished=True)
    assert reply == Reply(THINKING, "a</think>b<|im_end|>", "c<think>", "ok", True, 20, 8)
    assert split_reply(ids[:20], NON_THINKING, tokenizer=tokenizer, finished=True).kind == "ok"


def test_korean_syllables_of_several_tokens_are_put_together(tokenizer):
    ids = encode(tokenizer, "하나씩 더합니다.</think>답은 4입니다.<|im_end|>")
    reply = split_reply(ids, THINKING, tokenizer=tokenizer)
    assert tuple(reply) == ("하나씩 더합니다.", "답은 4입니다.")
    assert (reply.reasoning_tokens, reply.answer_tokens) == (23, 18)


def test_white_space_inside_a_text_is_kept(tokenizer):
    text = "a ,  b .\n\n\t1 ' s"
    assert split_reply(encode(tokenizer, f" {text}\n"), NON_THINKING, tokenizer=tokenizer).answer == text


def test_ids_without_the_end_token_are_cut(tokenizer):
    reply = split_reply(encode(tokenizer, "하나")[:-1], THINKING, tokenizer=tokenizer)
    assert (reply.kind, reply.finished, reply.reasoning_tokens, reply.answer_tokens) == ("truncated", False, 5, 0)
    assert reply.reasoning.startswith("하")
    assert split_reply(encode(tokenizer, "4"), NON_THINKING, tokenizer=tokenizer, finished=True).kind == "ok"


def test_ids_after_the_end_token_are_left_out(tokenizer):
    ids = encode(tokenizer, "why</think>4<|im_end|>\n</think>")
    assert split_reply(ids, THINKING, tokenizer=tokenizer) == Reply(THINKING, "why", "4", "ok", True, 3, 1)


def test_the_opening_of_an_empty_block_scheme_is_not_counted(tokenizer):
    ids = encode(tokenizer, "<think>\nwhy\n</think>\n\n4<|im_end|>")
    reply = split_reply(ids, THINKING, tokenizer=tokenizer, scheme="empty-block")
    assert reply == Reply(THINKING, "why", "4", "ok", True, 5, 3)


def test_a_turn_token_inside_a_reply_is_not_ok(tokenizer):
    """RECIPE.md, section 7: a non-thinking reply is right when it holds no control token."""
    ids = encode(tokenizer, "4<|im_start|>user\n5<|im_end|>")
    assert split_reply(ids, NON_THINKING, tokenizer=tokenizer).kind != "ok"


def test_unknown_words_are_no_tags():
    """A tokenizer without the tags gives its unknown token for both of them."""
    core = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "[END]": 3}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    bare = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", eos_token="[END]")
    assert split_reply([1, 0, 2, 3], THINKING, tokenizer=bare).kind == "never_closed"


# --- properties -------------------------------------------------------------------------------------------------

TAGS = re.compile(r"</?think>")
texts = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "</", "think>", "/", " ", "\n", "a", "b", "답", "<|im_end|>"]),
    max_size=10,
).map("".join)
modes, schemes = st.sampled_from(list(Mode)), st.sampled_from(sorted(SCHEMES))


def is_right(body, mode, scheme):
    """RECIPE.md, section 7, for a finished reply."""
    if mode is NON_THINKING:
        return not TAGS.search(body) and bool(body.strip())
    if scheme == "empty-block":
        body = re.sub(r"\A\s*<think>", "", body)
    return TAGS.findall(body) == ["</think>"] and all(part.strip() for part in body.split("</think>"))


@settings(max_examples=300, deadline=None)
@given(texts, modes, schemes, st.sampled_from([None, True, False]))
def test_every_text_has_exactly_one_class(text, mode, scheme, finished):
    reply = split_reply(text, mode, scheme=scheme, finished=finished)
    body, end, _ = text.partition("<|im_end|>")
    assert reply.finished is bool(finished is not False or end)
    assert reply.kind in REPLY_CLASSES
    assert (reply.kind == "ok") is (reply.finished and is_right(body, mode, scheme))
    assert reply.finished or reply.kind in ("truncated", "extra_tag")
    assert (reply.reasoning, reply.answer) == (reply.reasoning.strip(), reply.answer.strip())
    letters = "".join(TAGS.sub(" ", body).split())
    assert "".join((reply.reasoning + reply.answer).split()) == letters


@settings(max_examples=100, deadline=None)
@given(text=texts, mode=modes, scheme=schemes)
def test_ids_and_text_are_read_alike(tokenizer, text, mode, scheme):
    by_text = split_reply(text, mode, scheme=scheme, finished="<|im_end|>" in text)
    by_ids = split_reply(encode(tokenizer, text), mode, tokenizer=tokenizer, scheme=scheme)
    assert (tuple(by_ids), by_ids.kind, by_ids.finished) == (tuple(by_text), by_text.kind, by_text.finished)
