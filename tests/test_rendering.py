# SPDX-License-Identifier: Apache-2.0
"""The render-and-mask contract: prompts as inference shows them, loss on what the model writes, nothing else."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from thinkfusion import Conversation, DataError, Mode, Renderer, install_chat_template, mix, render
from thinkfusion.chat_templates import scheme_of
from thinkfusion.checkpointing import tiny_base_path
from thinkfusion.conversations import MessageOptions

TEXTS = {
    "en": ("What is 2 + 2?", "Two and two.\n\nThat is four.", "It is 4."),
    "ko": ("2 더하기 2는 무엇입니까?", "둘과 둘을 더하면\n넷입니다.", "답은 4입니다."),
    "emoji": ("🧮 2️⃣➕2️⃣?\n", "  🤔…  ", "👩‍🔬 4️⃣ e\u0301 \u202bשלום\u202c"),
}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "더하기", "parameters": {"type": "object"}}}]
SCHEMES = ("control", "empty-block")


def make_messages(language: str, *, turns: int, system: bool, tools: bool) -> list[dict]:
    question, reasoning, answer = TEXTS[language]
    messages: list[dict] = [{"role": "system", "content": f"{answer} 안녕"}] if system else []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"{turn} {question}"})
        if tools:
            call = {"type": "function", "function": {"name": "add", "arguments": {"a": turn, "b": "둘"}}}
            other = {"type": "function", "function": {"name": "add", "arguments": {}}}
            calls = {"role": "assistant", "content": "", "reasoning_content": f"call {reasoning}", "tool_calls": [call]}
            both = {"role": "assistant", "content": answer, "reasoning_content": reasoning, "tool_calls": [call, other]}
            result = {"role": "tool", "content": f"{{result}} {turn}"}
            messages += [calls, result, both, result, result]
        messages.append(
            {"role": "assistant", "content": f"{turn}: {answer}", "reasoning_content": f"{turn} {reasoning}"}
        )
    return messages


@pytest.fixture(scope="module")
def tokenizers() -> dict:
    made = {}
    for scheme in SCHEMES:
        made[scheme] = AutoTokenizer.from_pretrained(tiny_base_path())
        install_chat_template(made[scheme], scheme=scheme)
    # A tokenizer that has the tool tags as tokens of their own, as Qwen's does, and one that puts a token in front.
    made["tagged"] = AutoTokenizer.from_pretrained(tiny_base_path())
    made["tagged"].add_tokens(["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"])
    install_chat_template(made["tagged"])
    return made


CASES = list(
    itertools.product(("control", "empty-block", "tagged"), Mode, (1, 2, 5), (False, True), (False, True), TEXTS)
)


@pytest.mark.parametrize(("kind", "mode", "turns", "system", "tools", "language"), CASES)
def test_contract(tokenizers, kind, mode, turns, system, tools, language):
    tokenizer = tokenizers[kind]
    messages = make_messages(language, turns=turns, system=system, tools=tools)
    offered = TOOLS if tools else None
    conversation = Conversation.from_messages(messages, tools=offered)
    rendered = render(conversation, tokenizer, mode)
    assert render(conversation, Renderer(tokenizer), mode) == rendered
    assert len(rendered.ids) == len(rendered.trained)
    assert rendered.labels == [t if on else -100 for t, on in zip(rendered.ids, rendered.trained, strict=True)]

    # The whole equals the template's rendering, up to the line break after the last turn.
    switch = mode is Mode.THINKING
    whole = tokenizer.apply_chat_template(messages, tools=offered, enable_thinking=switch, return_dict=True)
    text = tokenizer.decode(rendered.ids)
    assert text == tokenizer.decode(whole["input_ids"]).removesuffix("\n")
    if kind != "empty-block":
        # (With the empty block a line break belongs to the prompt, and tokenises apart from what follows.)
        assert rendered.ids == whole["input_ids"][: len(rendered.ids)]

    # Every trained stretch begins right after a generation prompt of its mode and ends with the end of turn.
    starts = [i for i, on in enumerate(rendered.trained) if on and not rendered.trained[i - 1]]
    steps = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    steps = [i for i in steps if i > max(j for j, m in enumerate(messages) if m["role"] == "user")]
    assert len(starts) == len(steps)
    for start, step in zip(starts, steps, strict=True):
        prompt = tokenizer.apply_chat_template(
            messages[:step], tools=offered, enable_thinking=switch, add_generation_prompt=True, return_dict=True
        )
        # Only the first prompt is free of text that is trained, and so of boundaries that tokenise apart.
        if start == starts[0] or kind != "empty-block":
            assert rendered.ids[:start] == prompt["input_ids"]
        stop = next((i for i in range(start, len(rendered.ids)) if not rendered.trained[i]), len(rendered.ids))
        assert rendered.ids[stop - 1] == tokenizer.eos_token_id
        written = tokenizer.decode(rendered.ids[start : stop - 1])
        reasoning = messages[step]["reasoning_content"]
        before = (
            ""
            if not switch
            else f"<think>\n{reasoning}\n</think>\n\n"
            if kind == "empty-block"
            else f"{reasoning}</think>"
        )
        assert written.startswith(before + messages[step]["content"])
        assert written.count("<tool_call>") == len(messages[step].get("tool_calls", []))
    # No reasoning of an earlier exchange is shown.
    assert text.count(TEXTS[language][1]) == (len(steps) if switch else 0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_exchange_and_mode_is_trained_once(tokenizers, scheme):
    conversation = Conversation.from_messages(make_messages("ko", turns=4, system=True, tools=True))
    renderer = Renderer(tokenizers[scheme])
    sequences = renderer.render(mix([conversation]))[0]
    # With the control scheme the non-thinking answers share a sequence, since history is what they are.
    assert len(sequences) == (5 if scheme == "control" else 8)
    end = tokenizers[scheme].eos_token_id
    for mode in Mode:
        own = [sequence for sequence in sequences if sequence.mode is mode]
        ends = sum(sequence.labels.count(end) for sequence in own)
        assert ends == 4 * 3  # turns × assistant steps
    assert all(sequence.trained[-1] for sequence in sequences)


def test_own_modes_are_kept(tokenizers):
    messages = make_messages("en", turns=3, system=False, tools=False)
    del messages[3]["reasoning_content"]
    conversation = Conversation.from_messages(messages)
    sequences = Renderer(tokenizers["control"]).render([conversation])[0]
    assert [sequence.mode for sequence in sequences] == [Mode.THINKING, Mode.NON_THINKING, Mode.THINKING]


def test_step_without_reasoning_is_context_only_in_thinking_mode(tokenizers):
    messages = make_messages("en", turns=1, system=False, tools=True)
    for message in messages[2:]:
        message.pop("reasoning_content", None)
    conversation = Conversation.from_messages(messages, tools=TOOLS)
    tokenizer = tokenizers["control"]
    thinking = render(conversation, tokenizer, Mode.THINKING)
    assert thinking.labels.count(tokenizer.eos_token_id) == 1
    assert render(conversation, tokenizer, Mode.NON_THINKING).labels.count(tokenizer.eos_token_id) == 3
    whole = tokenizer.apply_chat_template(messages, tools=TOOLS, enable_thinking=True, return_dict=True)
    assert thinking.ids == whole["input_ids"][: len(thinking.ids)]


CONTROL_STRINGS = ("<think>", "</think>", "<|im_end|>", "<|im_start|>system", "<|endoftext|>", "<tool_call>")
letters = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
data = st.lists(letters | st.sampled_from(CONTROL_STRINGS), min_size=1, max_size=5).map("".join)
plain = letters.filter(str.strip).filter(lambda text: "<" not in text)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(question=data, system=st.none() | data, reasoning=plain, answer=plain, mode=st.sampled_from(list(Mode)))
def test_control_strings_in_data_stay_text(tokenizers, question, system, reasoning, answer, mode):
    tokenizer = tokenizers["control"]
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages += [
        {"role": "user", "content": question + " ."},
        {"role": "assistant", "content": answer, "reasoning_content": reasoning},
    ]
    # The turn markers of other families are refused in answers; here they are text like any other.
    options = MessageOptions(plain_control_tokens=True)
    rendered = render(Conversation.from_messages(messages, mode=mode, options=options), tokenizer, mode)
    control = [token for token in rendered.ids if token in tokenizer.get_added_vocab().values()]
    turns = 3 if system is not None else 2
    names = ["<|im_start|>", "<|im_end|>"] * (turns - 1) + ["<|im_start|>"]
    names += ["<think>", "</think>"] if mode is Mode.THINKING else ["</think>"]
    assert tokenizer.convert_ids_to_tokens(control) == [*names, "<|im_end|>"]
    # What is trained decodes to reasoning, answer and stop, byte for byte.
    trained = [token for token, on in zip(rendered.ids, rendered.trained, strict=True) if on]
    written = f"{reasoning}</think>{answer}" if mode is Mode.THINKING else answer
    assert tokenizer.decode(trained) == written + "<|im_end|>"


def test_thinking_needs_reasoning(tokenizers):
    conversation = Conversation.from_messages([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    with pytest.raises(DataError, match="no reasoning") as caught:
        render(conversation, tokenizers["control"], Mode.THINKING)
    assert caught.value.reason == "missing_reasoning"
    with pytest.raises(ValueError, match="unknown mode 'maybe'"):
        render(conversation, tokenizers["control"], "maybe")


def test_a_tokenizer_without_our_template_is_refused(base_tokenizer):
    conversation = Conversation.from_messages([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    with pytest.raises(ValueError, match="install_chat_template"):
        render(conversation, base_tokenizer, Mode.NON_THINKING)


def test_a_tokenizer_that_splits_a_control_token_is_refused(tokenizer, base_tokenizer):
    other = AutoTokenizer.from_pretrained(tiny_base_path())
    other.chat_template = tokenizer.chat_template
    with pytest.raises(ValueError, match=r"splits the control token <\|im_start\|> into \d+ tokens"):
        Renderer(other)


def test_run_time_check_finds_a_changed_template(tokenizers, tokenizer):
    conversation = Conversation.from_messages(make_messages("ko", turns=2, system=True, tools=True), tools=TOOLS)
    for kind in tokenizers:
        Renderer(tokenizers[kind]).check_against_template(mix([conversation])[0])
    tokenizer.chat_template = tokenizer.chat_template.replace("user\\n", "user:\\n")
    with pytest.raises(DataError, match="differs from the chat template") as caught:
        Renderer(tokenizer).check_against_template(conversation)
    assert caught.value.reason == "template_mismatch"


def test_scheme_is_told_from_any_template(tokenizers, base_tokenizer):
    assert scheme_of(tokenizers["control"]).name == "control"
    assert scheme_of(tokenizers["empty-block"]).name == "empty-block"
    with pytest.raises(ValueError, match="no chat template"):
        scheme_of(base_tokenizer)
    base_tokenizer.chat_template = "{% if thinking %}<think>{% else %}</think>{% endif %}"
    assert scheme_of(base_tokenizer).name == "control"
    base_tokenizer.chat_template = "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    assert scheme_of(base_tokenizer).name == "empty-block"
    base_tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ValueError, match="no thinking switch"):
        scheme_of(base_tokenizer)


@pytest.mark.parametrize("kind", ["control", "empty-block"])
def test_a_soft_switch_in_a_row_is_not_shown(tokenizers, kind):
    tokenizer = tokenizers[kind]
    messages = [
        {"role": "system", "content": "짧게. /no_think"},
        {"role": "user", "content": "2 + 2?\n/no_think"},
        {"role": "assistant", "content": "4"},
    ]
    rendered = render(Conversation.from_messages(messages), tokenizer, Mode.NON_THINKING)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(rendered.ids) == whole.removesuffix("\n")
    assert "no_think" not in whole


def test_control_strings_in_tools_and_in_a_second_answer_are_not_taken_for_a_wrong_template(tokenizer):
    """A template cannot tell such strings from markup, and so there is nothing to compare."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "c"}]
    tools = [{"type": "function", "function": {"name": "f", "description": "writes <|im_end|>"}}]
    renderer = Renderer(tokenizer)
    renderer.check_against_template(Conversation.from_messages(messages, tools=tools))
    plain = Conversation.from_messages(messages)
    (exchange,) = plain.exchanges
    other = replace(exchange, alternative=(replace(exchange.steps[0], content="</think> b", reasoning=None),))
    renderer.check_against_template(replace(plain, exchanges=(replace(other, modes=tuple(Mode)),)))
