# SPDX-License-Identifier: Apache-2.0
"""Replying: prompts by mode, batches, streams, and a model left as it was found."""

import json
import re

import pytest
import torch

from thinkfusion import (
    DataError,
    EvaluationPrompt,
    Mode,
    evaluate_modes,
    install_chat_template,
    mode_table,
    reply,
    save_report,
    stream_reply,
    task_prompts,
)
from thinkfusion.generation import Prompter, Sampling, choose_mode, generate

ASK = [{"role": "user", "content": "What is 2 + 2?"}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


@pytest.fixture
def ready(base_tokenizer, model):
    """A model whose template is installed, and its tokenizer."""
    install_chat_template(base_tokenizer, model)
    return model.eval(), base_tokenizer


def write(model, tokenizer, text: str) -> None:
    """Make the model write `text` (tags as tokens) after any prompt, by its position behind the last header."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    header = tokenizer("assistant\n", add_special_tokens=False)["input_ids"]
    forward = type(model).forward

    def scripted(self, input_ids=None, **kwargs):
        out = forward(self, input_ids=input_ids, **kwargs)
        seen = scripted.seen = (
            torch.cat([scripted.seen, input_ids], 1)
            if kwargs["past_key_values"].get_seq_length() > input_ids.shape[1]
            else input_ids
        )
        for row, tokens in enumerate(seen.tolist()):
            start = max(i for i in range(len(tokens)) if tokens[i : i + len(header)] == header) + len(header) + 1
            out.logits[row, -1] = -1e9
            out.logits[row, -1, ids[min(len(tokens) - start, len(ids) - 1)]] = 0
        return out

    scripted.seen = None
    model.forward = scripted.__get__(model)


def test_prompts_equal_the_templates(ready):
    _, tokenizer = ready
    prompter = Prompter(tokenizer)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    history = [
        {"role": "system", "content": "짧게"},
        *ASK,
        {"role": "assistant", "content": "4", "reasoning_content": "two and two"},
        {"role": "user", "content": "And 3 + 3? /no_think"},
    ]
    loop = [
        *history,
        {"role": "assistant", "content": None, "reasoning_content": "I call", "tool_calls": [call]},
        {"role": "tool", "content": "6"},
    ]
    for messages in (ASK, history, loop):
        for mode in Mode:
            expected = tokenizer.apply_chat_template(
                messages,
                tools=TOOLS,
                add_generation_prompt=True,
                enable_thinking=mode is Mode.THINKING,
                return_dict=True,
            )
            assert prompter.prompt_ids(messages, mode, TOOLS) == expected["input_ids"]


def test_control_strings_of_a_user_are_text(ready):
    _, tokenizer = ready
    ids = Prompter(tokenizer).prompt_ids([{"role": "user", "content": "a</think>b<|im_end|>"}], Mode.THINKING)
    names = tokenizer.convert_ids_to_tokens([i for i in ids if i in tokenizer.get_added_vocab().values()])
    assert names == ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<think>"]


def test_other_templates_are_used_as_they_are(base_tokenizer):
    prefix = "{% if add_generation_prompt %}:{{ '<think>' if thinking else '</think>' }}{% endif %}"
    base_tokenizer.chat_template = "{{ messages[-1].content }}" + prefix
    base_tokenizer.add_tokens(["<think>", "</think>"])
    prompter = Prompter(base_tokenizer)
    assert prompter.scheme.name == "control"
    assert base_tokenizer.decode(prompter.prompt_ids(ASK, Mode.NON_THINKING)) == "What is 2 + 2?:</think>"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "empty_conversation"),
        ([{"role": "assistant", "content": "a"}], "no_user"),
        ([*ASK, {"role": "assistant", "content": "a"}], "role_order"),
        ([{"role": "user", "content": None}], "bad_message"),
    ],
)
def test_bad_messages_are_named(ready, messages, reason):
    with pytest.raises(DataError) as caught:
        reply(*ready, messages)
    assert caught.value.reason == reason


def test_choose_mode():
    soft = [{"role": "user", "content": "a /no_think"}]
    assert choose_mode(ASK, None) is Mode.THINKING
    assert choose_mode(ASK, None, Mode.NON_THINKING) is Mode.NON_THINKING
    assert choose_mode(soft, None) is Mode.NON_THINKING
    assert choose_mode([*soft, {"role": "assistant", "content": "b /think"}, *ASK], None) is Mode.NON_THINKING
    assert choose_mode(soft, True) is Mode.THINKING
    with pytest.raises(ValueError, match="unknown mode 'on'"):
        choose_mode(ASK, "on")


@pytest.mark.parametrize(
    ("mode", "written", "parts", "kind"),
    [
        (True, "둘과 둘.</think>답은 4.<|im_end|>", ("둘과 둘.", "답은 4."), "ok"),
        (False, "답은 4.<|im_end|>", ("", "답은 4."), "ok"),
        (True, "답은 4.<|im_end|>", ("", "답은 4."), "never_closed"),
        (False, "둘.</think>답은 4.<|im_end|>", ("둘.", "답은 4."), "extra_tag"),
        (True, "둘과 둘과 둘과", ("둘과 둘과 둘과", ""), "truncated"),
    ],
)
def test_reply_and_stream_agree(ready, mode, written, parts, kind):
    model, tokenizer = ready
    write(model, tokenizer, written)
    limit = len(tokenizer(written)["input_ids"])
    given = reply(model, tokenizer, ASK, mode=mode, max_new_tokens=limit)
    assert (tuple(given), given.kind) == (parts, kind)
    assert given.reasoning_tokens == len(tokenizer(parts[0])["input_ids"])
    streamed = {"reasoning": "", "answer": ""}
    for part, text in stream_reply(model, tokenizer, ASK, mode=mode, max_new_tokens=limit):
        streamed[part] += text
    opens = {"reasoning": streamed["reasoning"], "answer": streamed["answer"]}
    if kind in ("ok", "truncated"):
        assert opens == {"reasoning": parts[0], "answer": parts[1]}
    else:
        assert "".join(opens.values()) == "".join(parts)
    assert reply(model, tokenizer, "What is 2 + 2?", mode=mode, max_new_tokens=limit) == given


def test_an_error_while_streaming_is_raised(ready):
    model, tokenizer = ready
    model.forward = None
    with pytest.raises(TypeError):
        list(stream_reply(model, tokenizer, ASK))


def test_batches_reply_as_single_prompts_do(ready):
    model, tokenizer = ready
    prompter = Prompter(tokenizer)
    texts = ["Hi", "What is the maximum of 1, 2, 3, 4?", "다음 숫자를 거꾸로 쓰세요: 123"]
    modes = [Mode.THINKING, Mode.NON_THINKING, Mode.THINKING]
    ids = [prompter.prompt_ids([{"role": "user", "content": t}], m) for t, m in zip(texts, modes, strict=True)]
    together = generate(model, tokenizer, ids, modes, Sampling(12))
    alone = [reply(model, tokenizer, t, mode=m, max_new_tokens=12) for t, m in zip(texts, modes, strict=True)]
    assert together == alone
    assert {each.kind for each in together} == {"truncated"}


def test_sampling_is_seeded_and_leaves_the_random_state(ready):
    model, tokenizer = ready
    prompts = task_prompts(4, seed=1)

    def texts(seed):
        report = evaluate_modes(
            model, tokenizer, prompts, max_new_tokens=6, temperature=1.0, seed=seed, progress=False, batch_size=3
        )
        return [each.answer + each.reasoning for replies in report.replies.values() for each in replies]

    state = torch.get_rng_state()
    first = texts(1)
    assert torch.equal(state, torch.get_rng_state())
    assert first == texts(1)
    assert first != texts(2)


def test_the_model_is_left_as_it_was(ready):
    model, tokenizer = ready
    model.train()
    model.gradient_checkpointing_enable()
    model.config.output_router_logits = True
    reply(model, tokenizer, ASK, max_new_tokens=2)
    assert model.training
    assert model.is_gradient_checkpointing
    assert model.config.output_router_logits


def test_evaluate_modes_end_to_end(ready, tmp_path):
    model, tokenizer = ready
    write(model, tokenizer, "The answer is 4.<|im_end|>")
    prompts = [
        EvaluationPrompt(tuple(ASK), "4", "sums", "en"),
        EvaluationPrompt(({"role": "user", "content": "Which is the largest of 1, 3, 2?"},), "3", "largest", "en"),
        EvaluationPrompt(({"role": "user", "content": "2 더하기 2?"},), None, "open", "ko"),
    ]
    report = evaluate_modes(model, tokenizer, prompts, max_new_tokens=20, progress=False, batch_size=2)
    thinking, plain = report.modes["thinking"], report.modes["non_thinking"]
    assert thinking["classes"]["never_closed"] == 3
    assert (thinking["format_error"], plain["format_error"]) == (1.0, 0.0)
    assert (thinking["accuracy"], plain["accuracy"]) == (0.5, 0.5)
    assert plain["reasoning_tokens"] == 0
    assert plain["tasks"]["sums"]["accuracy"] == 1.0
    assert plain["tasks"]["open"]["accuracy"] is None
    assert report.replies[Mode.NON_THINKING][0].answer == "The answer is 4."
    saved = json.loads(save_report(report, tmp_path).read_text())
    assert saved["samples"] == 3
    assert saved["modes"] == json.loads(json.dumps(report.modes))
    assert re.search(r"format error +100\.0 % \[43\.9, 100\.0\] +0\.0 % \[0\.0, 56\.1\]", mode_table(report))


def test_evaluate_modes_refuses_what_it_cannot_measure(ready, base_tokenizer):
    with pytest.raises(ValueError, match="there are no prompts"):
        evaluate_modes(*ready, [])
    base_tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ValueError, match="no thinking switch"):
        evaluate_modes(ready[0], base_tokenizer, task_prompts(1))
