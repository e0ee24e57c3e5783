# SPDX-License-Identifier: Apache-2.0
"""The render-and-mask contract for every family: schemes × modes × turns × system × tools × languages."""

import itertools
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from tests.families import CASES, TEXTS, TOKENS, TOOLS, bare_tokenizer, family_tokenizer, make_messages
from thinkfusion import (
    Conversation,
    DataError,
    Exchange,
    Message,
    Mode,
    install_chat_template,
    mix,
    render,
    reply,
    split_reply,
    stream_reply,
)
from thinkfusion.chat_templates import installed_template
from thinkfusion.dialects import DIALECTS
from thinkfusion.rendering import Renderer, Target

SHAPES = list(itertools.product((1, 2, 5), (False, True), (False, True)))


@cache
def renderer(name: str, scheme: str) -> Renderer:
    return Renderer(family_tokenizer(name, scheme))


def prompt_ids(tokenizer, messages, tools, mode: Mode) -> list[int]:
    options = {"tools": tools, "enable_thinking": mode is Mode.THINKING, "return_dict": True}
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)["input_ids"]


def last_exchange(conversation: Conversation, mode: Mode) -> Target:
    last = len(conversation.exchanges) - 1
    return Target(last, mode, frozenset({last}))


def render_last(name: str, scheme: str, conversation: Conversation, mode: Mode) -> tuple[list[int], list[bool]]:
    made = renderer(name, scheme)
    return made.encode([made.segments(conversation, last_exchange(conversation, mode))])[0]


def stretches(trained: list[bool]) -> list[tuple[int, int]]:
    """Where the loss begins and ends."""
    edges = [i for i in range(len(trained) + 1) if (i < len(trained) and trained[i]) != (i > 0 and trained[i - 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def as_written(tokenizer, ids: list[int], start: int, end: int) -> str:
    """Decoded; SentencePiece's mark of a beginning, which stands after every control token, is no space."""
    core = tokenizer.backend_tokenizer
    if "Prepend" not in str(core.normalizer):
        return tokenizer.decode(ids[start:end])
    control, pieces = tokenizer.get_added_vocab(), tokenizer.convert_ids_to_tokens(ids)
    begins = [index for index in range(start, end) if pieces[index - 1] in control and pieces[index][0] == "▁"]
    return core.decoder.decode([pieces[i].removeprefix("▁") if i in begins else pieces[i] for i in range(start, end)])


@pytest.mark.parametrize("language", TEXTS)
@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_contract(name, scheme, mode, language):
    tokenizer, template = family_tokenizer(name, scheme), renderer(name, scheme).template
    dialect, pieces = template.dialect, template.scheme
    for turns, system, with_tools in SHAPES:
        tools = TOOLS if with_tools else None
        parallel = not dialect.calls.own_message
        messages = make_messages(language, turns=turns, system=system, tools=with_tools, parallel=parallel)
        conversation = Conversation.from_messages(messages, tools=tools)
        ids, trained = render_last(name, scheme, conversation, mode)

        # The whole is the template's rendering, id for id, where no text meets text at the edge of the loss.
        switch = mode is Mode.THINKING
        text = tokenizer.apply_chat_template(messages, tools=tools, enable_thinking=switch, tokenize=False)
        text += dialect.answer_end if dialect.ends_in_next_header else ""
        segments = renderer(name, scheme).segments(conversation, last_exchange(conversation, mode))
        assert "".join(segment.text for segment in segments) == text
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        untrained = [segment._replace(trained=False) for segment in segments]
        assert renderer(name, scheme).encode([untrained])[0][0] == whole
        exact = scheme == "control"
        assert not exact or ids == whole

        # I1, I2, I3: each stretch follows a prompt of its mode, is what the model writes, and ends in a stop token.
        last_user = max(i for i, message in enumerate(messages) if message["role"] == "user")
        steps = [i for i in range(last_user, len(messages)) if messages[i]["role"] == "assistant"]
        found = stretches(trained)
        assert len(found) == len(steps)
        for (start, end), step in zip(found, steps, strict=True):
            if exact or start == found[0][0]:
                assert ids[:start] == prompt_ids(tokenizer, messages[:step], tools, mode)
            message = messages[step]
            stop = dialect.call_end if message.get("tool_calls") else dialect.answer_end
            assert tokenizer.convert_ids_to_tokens(ids[end - 1]) == stop
            written = as_written(tokenizer, ids, start, end - 1)
            closing = "".join(pieces.thinking_end)
            if dialect.calls.own_message and message.get("tool_calls") and not message["content"]:
                closing = dialect.calls.opening
            opening = "".join(pieces.thinking_start)
            before = f"{opening}{message['reasoning_content']}{closing}" if switch else ""
            assert written.startswith(before + message["content"])
            if message.get("tool_calls"):
                names = [call["function"]["name"] for call in message["tool_calls"]]
                assert all(f"{n}" in written[len(before + message["content"]) :] for n in names)
            else:
                assert written == before + message["content"]

        # I4, I6: control ids are those of the control segments; no reasoning of an earlier exchange is shown.
        control = [token for token in ids if token in known_ids(name, scheme)]
        assert control == [tokenizer.convert_tokens_to_ids(segment.text) for segment in segments if segment.control]
        assert text.count(TEXTS[language][1]) == (len(steps) if switch else 0)


@cache
def known_ids(name: str, scheme: str) -> frozenset[int]:
    return frozenset(family_tokenizer(name, scheme).get_added_vocab().values())


letters = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
long_text = st.integers(0, 3000).map(lambda size: "가 b" * size)


def conversation_of(system: str, question: str, reasoning: str, answer: str, result: str) -> Conversation:
    """One exchange with a tool call, its texts as they are given: control strings may stand in what is written too."""
    call = {"name": "add", "arguments": {"text": result}}
    steps = (
        Message("assistant", answer, reasoning, (call,)),
        Message("tool", result),
        Message("assistant", answer, reasoning),
    )
    return Conversation((Exchange(Message("user", question), steps),), system, tuple(TOOLS))


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_control_strings_in_texts_are_ordinary_text(name, scheme):
    tokenizer = family_tokenizer(name, scheme)
    markup = ["<think>", "</think>", "<|im_end|>", *TOKENS[name], installed_template(tokenizer).dialect.assistant_open]
    texts = st.lists(letters | st.sampled_from(markup), max_size=5).map("".join) | long_text
    written_texts = texts.filter(str.strip)
    known = known_ids(name, scheme)

    @settings(max_examples=25, deadline=None)
    @given(texts, texts, written_texts, written_texts, texts, st.sampled_from(list(Mode)))
    def control_ids_do_not_depend_on_texts(system, question, reasoning, answer, result, mode):
        given = conversation_of(system, question, reasoning, answer, result)
        ids, trained = render_last(name, scheme, given, mode)
        harmless, flags = render_last(name, scheme, conversation_of("a", "a", "a", "a", "a"), mode)
        assert [(token, on) for token, on in zip(ids, trained, strict=True) if token in known] == [
            (token, on) for token, on in zip(harmless, flags, strict=True) if token in known
        ]
        # I3: what is trained last is reasoning and answer, byte for byte.
        start, end = stretches(trained)[-1]
        pieces = installed_template(tokenizer).scheme
        opening, closing = "".join(pieces.thinking_start), "".join(pieces.thinking_end)
        before = f"{opening}{reasoning}{closing}" if mode is Mode.THINKING else ""
        assert as_written(tokenizer, ids, start, end - 1) == before + answer

    control_ids_do_not_depend_on_texts()


@pytest.mark.parametrize("size", [0, 20_000])
@pytest.mark.parametrize("name", sorted(DIALECTS))
def test_empty_and_very_long_turns(name, size):
    text = "길고 long " * (size // 8)
    messages = [
        {"role": "system", "content": text},
        {"role": "user", "content": text},
        {"role": "assistant", "content": f"{text}ok", "reasoning_content": f"{text}hm"},
        {"role": "user", "content": text},
        {"role": "assistant", "content": "b", "reasoning_content": "c"},
    ]
    conversation = Conversation.from_messages(messages)
    made = renderer(name, "control")
    made.check_against_template(conversation)
    for index, mode in itertools.product((0, 1), Mode):
        target = Target(index, mode, frozenset({index}))
        ids, trained = made.encode([made.segments(conversation, target)])[0]
        prompt = prompt_ids(made.tokenizer, messages[: 2 + 2 * index], None, mode)
        assert ids[: trained.index(True)] == prompt


def test_runs_of_spaces_that_are_tokens_stay_tokens():
    """As in OLMoE's tokenizer, where they are no markup but part of how text is written."""
    tokenizer = bare_tokenizer("olmoe")
    tokenizer.add_tokens([AddedToken(" " * size, normalized=True) for size in (8, 4, 2)])
    install_chat_template(tokenizer, dialect="olmoe")
    messages = [
        {"role": "user", "content": "def f():\n    return  1"},
        {"role": "assistant", "content": "if x:\n        y", "reasoning_content": "a  b    c"},
    ]
    made = Renderer(tokenizer)
    conversation = Conversation.from_messages(messages)
    made.check_against_template(conversation)
    ids, _ = made.encode([made.segments(conversation, last_exchange(conversation, Mode.THINKING))])[0]
    assert tokenizer.convert_tokens_to_ids(" " * 8) in ids
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_each_exchange_and_mode_is_trained_once(name, scheme):
    made = renderer(name, scheme)
    dialect = made.template.dialect
    messages = make_messages("ko", turns=4, system=True, tools=True, parallel=not dialect.calls.own_message)
    conversation = mix([Conversation.from_messages(messages, tools=TOOLS)])[0]
    sequences = made.render([conversation])[0]
    # Where history is what non-thinking answers are, these share one sequence.
    shared = {"control": name not in ("gpt_oss", "ernie4_5"), "empty-block": name == "glm4_moe"}[scheme]
    assert len(sequences) == (5 if shared else 8)
    for mode in Mode:
        own = [sequence for sequence in sequences if sequence.mode is mode]
        ends = [
            made.tokenizer.convert_ids_to_tokens(sequence.ids[end - 1])
            for sequence in own
            for _, end in stretches(sequence.trained)
        ]
        assert sorted(ends) == sorted(4 * [dialect.call_end, dialect.call_end, dialect.answer_end])
    assert all(sequence.trained[-1] for sequence in sequences)
    made.check_against_template(conversation)


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_ends_only_trains_the_closing_and_the_end(name, scheme):
    made = renderer(name, scheme)
    dialect, pieces = made.template.dialect, made.scheme
    messages = make_messages("en", turns=2, system=False, tools=True, parallel=False)
    conversation = Conversation.from_messages(messages, tools=TOOLS)
    last = replace(conversation.exchanges[-1], ends_only=True)
    conversation = replace(conversation, exchanges=(*conversation.exchanges[:-1], last))
    whole = render_last(name, scheme, conversation, Mode.THINKING)
    trained = [made.tokenizer.convert_ids_to_tokens(t) for t, on in zip(*whole, strict=True) if on]
    closing = pieces.closing_token
    assert trained == [closing, dialect.call_end, closing, dialect.call_end, closing, dialect.answer_end]
    # The non-thinking answer has no such ends, and is trained whole.
    ids, flags = render_last(name, scheme, conversation, Mode.NON_THINKING)
    full = render_last(name, scheme, Conversation.from_messages(messages, tools=TOOLS), Mode.NON_THINKING)
    assert (ids, flags) == full


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_a_pair_of_answers_shows_the_non_thinking_one_as_history(name, scheme):
    made = renderer(name, scheme)
    messages = make_messages("ko", turns=2, system=True, tools=False)
    conversation = Conversation.from_messages(messages)
    first = replace(
        conversation.exchanges[0],
        alternative=(Message("assistant", "짧게 넷."),),
        modes=(Mode.THINKING, Mode.NON_THINKING),
    )
    paired = replace(conversation, exchanges=(first, replace(conversation.exchanges[1], modes=tuple(Mode))))
    made.check_against_template(paired)
    plain_messages = [*messages[:2], {"role": "assistant", "content": "짧게 넷."}, *messages[3:]]
    for mode in Mode:
        ids, _ = render_last(name, scheme, paired, mode)
        assert ids == render_last(name, scheme, Conversation.from_messages(plain_messages), mode)[0]
    own = made.encode([made.segments(paired, Target(0, Mode.THINKING, frozenset({0})))])[0][0]
    assert "답은 4입니다." in made.tokenizer.decode(own)


def test_harmony_refuses_several_calls_in_a_message():
    messages = make_messages("en", turns=1, system=False, tools=True)
    conversation = Conversation.from_messages(messages, tools=TOOLS)
    tokenizer = family_tokenizer("gpt_oss")
    for call in (lambda: Renderer(tokenizer).targets(conversation), lambda: render(conversation, tokenizer, True)):
        with pytest.raises(DataError, match="found 2 calls in one message") as caught:
            call()
        assert caught.value.reason == "parallel_tool_calls"
    with pytest.raises(Exception, match="one tool call a message"):
        tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False)


REPLIES = [
    (True, "{think}둘과 둘.{close}답은 4.{end}", ("둘과 둘.", "답은 4."), "ok"),
    (False, "답은 4.{end}", ("", "답은 4."), "ok"),
    (True, "답은 4.{end}", ("", "답은 4."), "never_closed"),
    (False, "둘.{close}답은 4.{end}", ("둘.", "답은 4."), "extra_tag"),
    (True, "{think}둘과 둘", ("둘과 둘", ""), "truncated"),
    (True, "{think}{close}4{end}", ("", "4"), "empty_trace"),
    (True, "{think}둘.{close}{end}", ("둘.", ""), "empty_answer"),
]


@pytest.mark.parametrize(("mode", "written", "parts", "kind"), REPLIES)
@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_replies_are_split_by_the_familys_own_tokens(name, scheme, mode, written, parts, kind):
    tokenizer = family_tokenizer(name, scheme)
    template = installed_template(tokenizer)
    pieces = template.scheme
    strings = {"think": "".join(pieces.thinking_start), "close": "".join(pieces.thinking_end)}
    for end in template.dialect.stops:
        text = written.format(**strings, end=end)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        reply = split_reply(ids, mode, tokenizer=tokenizer, scheme=pieces)
        assert (tuple(reply), reply.kind) == (parts, kind)
        again = split_reply(text, mode, scheme=pieces, finished="{end}" in written)
        assert (tuple(again), again.kind) == (parts, kind)


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_tool_calls_are_read_from_what_is_trained(name, scheme, mode):
    """What is trained is what `split_reply` calls right, and what transformers reads as the same calls."""
    made = renderer(name, scheme)
    tokenizer, parallel = made.tokenizer, not made.template.dialect.calls.own_message
    messages = make_messages("ko", turns=1, system=False, tools=True, parallel=parallel)
    ids, trained = render_last(name, scheme, Conversation.from_messages(messages, tools=TOOLS), mode)
    steps = [message for message in messages if message["role"] == "assistant"]
    for (start, end), message in zip(stretches(trained), steps, strict=True):
        reply = split_reply(ids[start:end], mode, tokenizer=tokenizer, scheme=made.scheme)
        assert reply.kind == "ok"
        assert reply.reasoning == (message["reasoning_content"] if mode is Mode.THINKING else "")
        assert reply.answer.startswith(message["content"])
        parsed = tokenizer.parse_response(tokenizer.decode(ids[start:end]), prefix=tokenizer.decode(ids[:start]))
        assert (parsed.get("reasoning_content") or "") == reply.reasoning
        assert (parsed.get("content") or "").strip() == message["content"]
        assert (parsed.get("tool_calls") or []) == message.get("tool_calls", [])


def write(model, prompt_length: int, ids: list[int]) -> None:
    """Make the model write `ids` after a prompt of that length, and the last of them for ever."""
    forward = type(model).forward

    def scripted(self, input_ids=None, **kwargs):
        out = forward(self, input_ids=input_ids, **kwargs)
        place = kwargs["past_key_values"].get_seq_length() - prompt_length
        out.logits[:, -1] = -1e9
        out.logits[:, -1, ids[min(place, len(ids) - 1)]] = 0
        return out

    model.forward = scripted.__get__(model)


# The families whose turns end or whose calls stand in ways of their own.
GENERATED = [case for case in CASES if case[0] in ("chatml", "deepseek_v3", "glm4_moe", "gpt_oss", "granite")]


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize(("name", "scheme"), GENERATED)
def test_what_is_trained_is_what_reply_and_stream_give(name, scheme, mode, tiny_models):
    """A model that writes what it was trained on ends by itself, call or answer, and both ways of replying agree."""
    made = renderer(name, scheme)
    tokenizer = made.tokenizer
    messages = make_messages("ko", turns=1, system=True, tools=True, parallel=False)
    ids, trained = render_last(name, scheme, Conversation.from_messages(messages, tools=TOOLS), mode)
    steps = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    model = tiny_models(seed=1).eval()
    for (start, end), step in zip(stretches(trained), steps, strict=True):
        write(model, start, [*ids[start:end], ids[start]])
        options = {"mode": mode, "tools": TOOLS, "max_new_tokens": end - start + 5}
        given = reply(model, tokenizer, messages[:step], **options)
        assert given.kind == "ok"
        assert given.reasoning == (messages[step]["reasoning_content"] if mode is Mode.THINKING else "")
        parts = {"reasoning": "", "answer": ""}
        for part, text in stream_reply(model, tokenizer, messages[:step], **options):
            parts[part] += text
        assert {part: text.strip() for part, text in parts.items()} == {
            "reasoning": given.reasoning.strip(),
            "answer": given.answer,
        }
