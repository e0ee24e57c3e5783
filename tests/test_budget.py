# SPDX-License-Identifier: Apache-2.0
"""The thinking budget: what it forces, in which row, and what it leaves alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.families import family_tokenizer
from thinkfusion import Mode, ThinkingBudget, install_chat_template, replies, reply, split_reply, stream_reply
from thinkfusion.budget import ends_sentence
from thinkfusion.chat_templates import scheme_of
from thinkfusion.checkpointing import tiny_base_path
from thinkfusion.generation import Prompter, Sampling, generate

WORDS = ["a", "b", " ", ".", "\n", "!", "3", "다"]


def made(scheme="control"):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base_path())
    install_chat_template(tokenizer, scheme=scheme)
    return tokenizer


TOKENIZERS = {scheme: made(scheme) for scheme in ("control", "empty-block")}
BARE = AutoTokenizer.from_pretrained(tiny_base_path())  # spells the tags out of several tokens


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def run(budget, prompts, scripts, steps):
    """What rows write whose likeliest tokens are those of `scripts`; prompts are padded on the left with 0."""
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    for step in range(steps):
        scores = torch.zeros(len(prompts), 1100)
        for row, script in enumerate(scripts):
            scores[row, script[step % len(script)]] = 1.0
        ids = torch.cat([ids, budget(ids, scores).argmax(dim=1, keepdim=True)], dim=1)
    return ids[:, length:].tolist()


def thinking_prompt(tokenizer, history=""):
    return ids_of(tokenizer, history) + Prompter(tokenizer).prompt_ids(
        [{"role": "user", "content": "a"}], Mode.THINKING
    )


@pytest.mark.parametrize(
    ("text", "ended"),
    [
        ("Two and two.", True),
        ("Is it?", True),
        ("It is four!", True),
        ('He said "yes."', True),
        ("a line\n", True),
        ("답은 4입니다.", True),
        ("답은 4입니다", True),
        ("그래서 넷이다", True),
        ("答案是四。", True),
        ("It is four. ", True),
        ("Two and", False),
        ("It is 3.", False),  # 3.14
        ("e.g.", False),
        ("1.", False),
        ("다", False),
        ("\n", False),
        ("", False),
    ],
)
def test_where_a_sentence_ends(text, ended):
    assert ends_sentence(text) is ended


def test_hard_and_soft_ends():
    tokenizer = TOKENIZERS["control"]
    close = tokenizer.convert_tokens_to_ids("</think>")
    prompt, script = thinking_prompt(tokenizer), ids_of(tokenizer, "a b" * 12)
    assert len(script) > 12
    (row,) = run(ThinkingBudget(tokenizer, 6), [prompt], [script], 10)
    assert (row[:6], row[6], row[7:]) == (script[:6], close, script[7:10])
    dot = ids_of(tokenizer, ".")
    script = [*script[:6], *dot, *script[:20]]
    (soft,) = run(ThinkingBudget(tokenizer, 10, margin=4), [prompt], [script], 12)
    assert soft.index(close) == 7
    (narrow,) = run(ThinkingBudget(tokenizer, 10, margin=2), [prompt], [script], 12)
    assert narrow.index(close) == 10
    (usual,) = run(ThinkingBudget(tokenizer, 9), [prompt], [script], 12)  # a fifth of 9 is 1, and 7 are not 8
    assert usual.index(close) == 9
    (usual,) = run(ThinkingBudget(tokenizer, 8), [prompt], [script], 12)
    assert usual.index(close) == 7
    (none,) = run(ThinkingBudget(tokenizer, 0), [prompt], [script], 3)
    assert none == [close, *script[1:3]]


@pytest.mark.parametrize("mode", list(Mode))
def test_rows_that_do_not_think_or_have_closed_are_left_alone(mode):
    tokenizer = TOKENIZERS["control"]
    script = ids_of(tokenizer, "a b a</think>b a b a b a b a b")
    prompt = Prompter(tokenizer).prompt_ids([{"role": "user", "content": "a"}], mode)
    budget = ThinkingBudget(tokenizer, 8 if mode is Mode.THINKING else 0)
    assert run(budget, [prompt], [script], 14) == [script[:14] if len(script) >= 14 else (script * 2)[:14]]
    scores = torch.rand(1, 1100)
    assert budget(torch.tensor([[*prompt, *script]]), scores) is scores


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_row_keeps_its_budget_and_is_what_it_is_alone(data):
    """Random texts with tags in them, both schemes, padded rows, histories, budgets by row, any margin."""
    name = data.draw(st.sampled_from(list(TOKENIZERS)))
    tokenizer = TOKENIZERS[name]
    pieces = st.lists(st.sampled_from([*WORDS, "</think>", "<think>", "<|im_end|>"]), min_size=1, max_size=12)
    rows = data.draw(st.integers(1, 4))
    starts = "" if name == "control" else "<think>\n"
    scripts = [ids_of(tokenizer, starts + "".join(data.draw(pieces))) for _ in range(rows)]
    histories = [data.draw(st.sampled_from(["", "a<think>b</think>c", "a</think>b"])) for _ in range(rows)]
    prompts = [thinking_prompt(tokenizer, history) for history in histories]
    budgets = [data.draw(st.none() | st.integers(0, 12)) for _ in range(rows)]
    margin = data.draw(st.none() | st.integers(0, 12))
    written = run(ThinkingBudget(tokenizer, budgets, margin=margin), prompts, scripts, 24)
    for prompt, script, budget, row in zip(prompts, scripts, budgets, written, strict=True):
        assert run(ThinkingBudget(tokenizer, budget, margin=margin), [prompt], [script], 24) == [row]
        if budget is None:
            assert row == (script * 24)[:24]
            continue
        found = split_reply(row, Mode.THINKING, tokenizer=tokenizer, scheme=name)
        if found.kind != "never_closed":  # ended before the budget was used up: all of it is the answer
            assert found.reasoning_tokens <= budget + 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([*WORDS, "<", "</", "think", ">"]), min_size=1, max_size=12), st.integers(0, 10))
def test_tags_of_several_tokens_are_written_whole(words, budget):
    script = ids_of(BARE, "".join(words))
    close = ids_of(BARE, "</think>")
    assert len(close) > 1
    prompt = ids_of(BARE, "user\na\nassistant\n<think>")
    (row,) = run(ThinkingBudget(BARE, budget, scheme="control"), [prompt], [script], 40)
    place = next(index for index in range(len(row)) if row[index : index + len(close)] == close)
    assert place <= budget
    (other,) = run(ThinkingBudget(BARE, None, scheme="control"), [prompt], [script], 40)
    # Behind its closing, a row is left alone.
    assert row[place + len(close) : 40] == other[place + len(close) : 40] or "think" in "".join(words)


def test_the_closing_of_gpt_oss_is_a_header():
    tokenizer = family_tokenizer("gpt_oss")
    prompt = Prompter(tokenizer).prompt_ids([{"role": "user", "content": "a"}], Mode.THINKING)
    script = ids_of(tokenizer, "abc" * 9)
    (row,) = run(ThinkingBudget(tokenizer, 4, margin=0), [prompt], [script], 20)
    closing = ids_of(tokenizer, scheme_of(tokenizer).closing)
    assert row[4 : 4 + len(closing)] == closing
    assert row[4 + len(closing) :] == (script * 2)[4 + len(closing) : 20]
    # A call that the model makes by itself begins with the same token, and is left alone.
    called = ids_of(tokenizer, "ab<|end|><|start|>assistant<|channel|>commentary to=functions.add")
    (row,) = run(ThinkingBudget(tokenizer, 4, margin=0), [prompt], [called], len(called))
    assert row == called


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (-1, "thinking_budget: found -1, expected a whole number of tokens, at least 0"),
        (1.5, "thinking_budget: found 1.5"),
        (True, "thinking_budget: found True"),
        ("many", "thinking_budget: found 'many'"),
        ([3, -2], r"thinking_budget\[1\]: found -2"),
        ([], "thinking_budget: found an empty list"),
    ],
)
def test_bad_budgets_are_named(budget, message):
    with pytest.raises(ValueError, match=message):
        ThinkingBudget(TOKENIZERS["control"], budget)


def test_other_mistakes_are_named():
    tokenizer = TOKENIZERS["control"]
    with pytest.raises(ValueError, match="margin: found -1"):
        ThinkingBudget(tokenizer, 4, margin=-1)
    with pytest.raises(ValueError, match="found 2 budgets for 3 rows, expected one for each prompt"):
        ThinkingBudget(tokenizer, [1, 2])(torch.zeros(3, 4, dtype=torch.long), torch.zeros(3, 9))
    with pytest.raises(ValueError, match="no chat template"):
        ThinkingBudget(BARE, 4)


# In a model's own generation


@pytest.fixture
def ready(base_tokenizer, model):
    install_chat_template(base_tokenizer, model)
    return model.eval(), base_tokenizer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 1.0, "num_return_sequences": 3},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"temperature": 1.0, "num_beams": 2},
    ],
)
def test_greedy_sampled_and_beam_replies_keep_their_budgets(ready, options):
    texts, budgets = ["Hi", "What is the maximum of 1, 2, 3, 4?", "역순"], [0, 3, 7]
    torch.manual_seed(0)
    given = replies(*ready, texts, mode=True, thinking_budget=budgets, max_new_tokens=16, **options)
    copies = options.get("num_return_sequences", 1)
    assert len(given) == 3 * copies
    for index, each in enumerate(given):
        # A random model closes nothing by itself, so the reasoning ends where it has to.
        assert each.reasoning_tokens == budgets[index // copies]
        assert each.kind in ("truncated", "empty_trace", "extra_tag", "ok")


def test_batches_with_budgets_reply_as_single_prompts_do(ready):
    texts = ["Hi", "What is the maximum of 1, 2, 3, 4?", "다음 숫자를 거꾸로 쓰세요: 123", "What?"]
    modes, budgets = [True, False, True, None], [2, 3, None, 5]
    together = replies(*ready, texts, mode=modes, thinking_budget=budgets, max_new_tokens=12, batch_size=3)
    alone = [
        reply(*ready, text, mode=mode, thinking_budget=budget, max_new_tokens=12)
        for text, mode, budget in zip(texts, modes, budgets, strict=True)
    ]
    assert together == alone
    assert [each.mode for each in together] == [Mode.THINKING, Mode.NON_THINKING, Mode.THINKING, Mode.THINKING]
    streamed = "".join(
        chunk.text
        for chunk in stream_reply(*ready, texts[0], mode=True, thinking_budget=2, max_new_tokens=12)
        if chunk.part == "reasoning"
    )
    assert streamed.strip() == alone[0].reasoning


def test_what_replies_refuses(ready):
    with pytest.raises(ValueError, match="mode: found 2 for 1 conversations, expected one for each"):
        replies(*ready, ["a"], mode=[True, False])
    with pytest.raises(ValueError, match="thinking_budget: found 1 for 2 conversations"):
        replies(*ready, ["a", "b"], thinking_budget=[3])
    with pytest.raises(ValueError, match="Use reply for one"):
        replies(*ready, "a")
    with pytest.raises(ValueError, match="batch_size: found 0"):
        replies(*ready, ["a"], batch_size=0)
    with pytest.raises(ValueError, match=r"Use replies\(\[messages\], …\)"):
        reply(*ready, "a", num_return_sequences=2)
    with pytest.raises(ValueError, match="thinking_budget: found -3"):
        reply(*ready, "a", thinking_budget=-3)
    assert replies(*ready, []) == []


def test_processors_of_the_caller_stay(ready):
    model, tokenizer = ready
    seen = []

    def watch(ids, scores):
        seen.append(ids.shape)
        return scores

    ids = Prompter(tokenizer).prompt_ids([{"role": "user", "content": "a"}], Mode.THINKING)
    (given,) = generate(
        model, tokenizer, [ids], [Mode.THINKING], Sampling(4), thinking_budget=2, logits_processor=[watch]
    )
    assert len(seen) == 4
    assert given.reasoning_tokens == 2
