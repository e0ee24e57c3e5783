# SPDX-License-Identifier: Apache-2.0
"""Obedience, flip, budgets and probe: what is asked, what is expected, and what is counted."""

from dataclasses import dataclass

import pytest

from thinkfusion import EvaluationPrompt, Mode, Reply, install_chat_template, split_reply
from thinkfusion.budget_curve import measure_budgets, parse_budgets
from thinkfusion.flipping import measure_flip
from thinkfusion.generation import Sampling
from thinkfusion.intervals import wilson_interval
from thinkfusion.modes import CONTROL, EMPTY_BLOCK
from thinkfusion.obedience import CELLS, Cell, describe, measure_obedience
from thinkfusion.probing import measure_probe
from thinkfusion.replying import Replier, announced, shown_mode

THINKING, NON_THINKING = Mode.THINKING, Mode.NON_THINKING
PROMPTS = [EvaluationPrompt(({"role": "user", "content": f"Question {n}?"},), str(n)) for n in range(3)]


@dataclass(frozen=True)
class Scripted(Replier):
    """Replies by `say(text of the prompt, mode, budget)`, and keeps what it was asked."""

    def replies(self, jobs, **options):
        return self.timed(jobs, **options)[0]

    def timed(self, jobs, *, thinking_budget=None, label="replies"):
        texts = [self.tokenizer.decode(job.ids) for job in jobs]
        self.asked.extend(texts)
        replies = [self.say(text, job.mode, thinking_budget) for text, job in zip(texts, jobs, strict=True)]
        return replies, dict.fromkeys(Mode, 1.0)


@pytest.fixture
def scripted(tokenizer):
    def scripted(say):
        replier = Scripted(None, tokenizer, Sampling(8), progress=False)
        object.__setattr__(replier, "say", say)
        object.__setattr__(replier, "asked", [])
        return replier

    return scripted


def good(text, mode, budget):
    return Reply(mode, "so" if mode is THINKING else "", "yes", "ok", True, 2, 1)


def cut(text, mode, budget):
    return Reply(mode, "", "", "truncated", False)


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (Cell(None, None, "none", 1), THINKING),
        (Cell(None, None, "neutral", 3), THINKING),
        (Cell(None, None, "contradicting", 1), NON_THINKING),  # nothing else is given
        (Cell(None, NON_THINKING, "none", 1), NON_THINKING),
        (Cell(None, NON_THINKING, "contradicting", 3), NON_THINKING),  # the later soft switch wins
        (Cell(True, NON_THINKING, "contradicting", 3), THINKING),  # the hard switch wins
        (Cell(False, THINKING, "contradicting", 1), NON_THINKING),
    ],
)
def test_the_expected_mode_follows_the_precedence(cell, expected):
    assert cell.expected(THINKING) is expected


def test_every_combination_is_a_cell_once():
    assert len(set(CELLS)) == len(CELLS) == 3 * 3 * 3 * 2
    assert {cell.expected(NON_THINKING) for cell in CELLS if cell.hard} == {THINKING}


def test_the_messages_of_a_third_turn():
    cell = Cell(None, THINKING, "contradicting", 3)
    messages = cell.messages(["a", "b", "c"], ["1", "2"], THINKING)
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert messages[0]["content"].endswith("without any reasoning. /no_think")
    assert [message["content"] for message in messages[1:]] == ["a", "1", "b /no_think", "2", "c /think"]
    assert describe(cell) == "no hard switch, /think, contradicting system text, turn 3"


@pytest.mark.parametrize("default", ["thinking", "non_thinking"])
def test_our_template_obeys_in_every_cell(base_tokenizer, default):
    """The template alone decides the prompt, and with a model that keeps to its prompt all is obeyed."""
    install_chat_template(base_tokenizer, default_mode=default)
    replier = Scripted(None, base_tokenizer, Sampling(8), progress=False)
    object.__setattr__(replier, "say", good)
    object.__setattr__(replier, "asked", [])
    found, failures = measure_obedience(replier, PROMPTS)
    assert (found["obeyed"], found["total"], found["truncated"]) == (54 * 3, 54 * 3, 0)
    assert (found["default"], found["share"], failures) == (default, 1.0, [])
    assert found["share_interval"] == list(wilson_interval(162, 162))
    asked = replier.asked[3:]  # after the history
    assert sum(text.endswith("</think>") for text in asked) == sum(
        3 * (cell.expected(Mode(default)) is NON_THINKING) for cell in CELLS
    )
    third = next(text for text, cell in zip(asked[::3], CELLS, strict=True) if cell.turn == 3)
    assert third.index("Question 1?") < third.index("Question 2?") < third.index("Question 0?")
    assert third.count("yes") == 2  # the model's own answers
    assert "/no_think" not in "".join(asked)


def test_a_model_that_never_thinks_disobeys_where_thinking_is_expected(scripted):
    def say(text, mode, budget):
        return split_reply("yes", mode)

    found, failures = measure_obedience(scripted(say), PROMPTS[:1], limit=4)
    for cell in found["cells"]:
        assert cell["obeyed"] == (cell["expected"] == "non_thinking"), cell
    assert found["obeyed"] == sum(cell["expected"] == "non_thinking" for cell in found["cells"])
    assert len({failure.where for failure in failures}) == 4
    assert failures[0].note == "expected: thinking mode"


def test_a_cut_reply_is_in_no_share(scripted):
    found, failures = measure_obedience(
        scripted(lambda text, mode, budget: Reply(mode, "", "", "truncated", False)), PROMPTS
    )
    assert (found["total"], found["truncated"], found["share"], found["share_interval"]) == (0, 162, None, None)
    assert failures == []


@pytest.mark.parametrize(
    ("prompt", "scheme", "mode"),
    [
        ("…assistant\n<think>", CONTROL, THINKING),
        ("…assistant\n</think>", CONTROL, NON_THINKING),
        ("…assistant\n", EMPTY_BLOCK, THINKING),
        ("…assistant\n<think>\n\n</think>\n\n", EMPTY_BLOCK, NON_THINKING),
    ],
)
def test_the_mode_a_prompt_announces(prompt, scheme, mode):
    assert announced(prompt, scheme) is mode


def test_a_model_that_opens_its_own_trace_may_answer_at_once():
    """As Qwen3 does where a soft switch says so: an empty block, or none."""
    for text in ("<think>\n\n</think>\n\nyes", "yes"):
        assert shown_mode(split_reply(text, "thinking", scheme="empty-block"), EMPTY_BLOCK) is NON_THINKING
        assert shown_mode(split_reply(text, "thinking"), CONTROL) is None
    assert (
        shown_mode(split_reply("<think>\nso\n</think>\n\nyes", "thinking", scheme="empty-block"), EMPTY_BLOCK)
        is THINKING
    )


def test_flip_alternates_and_checks_every_turn(scripted):
    replier = scripted(good)
    found, failures = measure_flip(replier, PROMPTS, conversations=4)
    assert (found["right"], found["total"], found["share"], failures) == (24, 24, 1.0, [])
    assert (found["unbroken"], found["judged"], found["whole"]) == (4, 4, 1.0)
    assert [turn["mode"] for turn in found["starts"]["thinking"]] == ["thinking", "non_thinking"] * 3
    assert [turn["mode"] for turn in found["starts"]["non_thinking"]] == ["non_thinking", "thinking"] * 3
    last = replier.asked[-1]
    assert last.count("yes") == 5
    assert last.count("Question") == 6


def test_flip_counts_the_turn_that_breaks(scripted):
    def say(text, mode, budget):
        broken = mode is THINKING and text.count("Question") == 3
        return split_reply("yes", mode) if broken else good(text, mode, budget)

    found, failures = measure_flip(scripted(say), PROMPTS, conversations=4)
    assert (found["right"], found["total"], found["unbroken"]) == (22, 24, 2)
    assert [turn["share"] for turn in found["starts"]["thinking"]] == [1, 1, 0, 1, 1, 1]
    assert found["starts"]["thinking"][2]["share_interval"] == list(wilson_interval(0, 2))
    assert [failure.where for failure in failures] == ["turn 3 of 6, thinking"]


def test_flip_without_an_end_tells_nothing(scripted):
    found, _ = measure_flip(scripted(cut), PROMPTS)
    assert (found["total"], found["share"], found["whole"], found["judged"]) == (0, None, None, 0)


def test_the_budget_curve(scripted):
    def say(text, mode, budget):
        right = text[text.index("Question ") + 9]
        return Reply(mode, "so", right if budget >= 16 else "9", "ok", True, budget + 1 if budget < 64 else 99, 1)

    curve = measure_budgets(scripted(say), PROMPTS, (8, 16, 64))
    assert [point["budget"] for point in curve] == [8, 16, 64]
    assert [point["accuracy"] for point in curve] == [0.0, 1.0, 1.0]
    assert [point["within"] for point in curve] == [1.0, 1.0, 0.0]
    assert curve[0]["accuracy_interval"] == list(wilson_interval(0, 3))


@pytest.mark.parametrize("text", ["", "a", "8,", "8,-1", "0", "1.5", "8;16"])
def test_bad_budgets_are_named(text):
    with pytest.raises(ValueError, match="expected numbers of tokens, such as 32,64,128"):
        parse_budgets(text)


def test_budgets_are_sorted():
    assert parse_budgets("64, 8,8") == (8, 64)


def test_the_probe_is_teacher_forced(model, tokenizer):
    """On a random model, every probability is about one in the vocabulary; the model is left as it was."""
    install_chat_template(tokenizer, model)
    model.config.output_router_logits = True
    model.train()
    found = measure_probe(model, tokenizer, samples=4)
    assert model.training
    assert model.config.output_router_logits
    vocabulary = model.config.vocab_size
    for name in ("closes", "trace_begins", "answer_begins"):
        assert 0.2 / vocabulary < found[name] < 5 / vocabulary
        low, high = found[f"{name}_interval"]
        assert low <= found[name] <= high
    model.get_output_embeddings().weight.data.zero_()
    even = measure_probe(model, tokenizer, samples=2)
    assert even["closes"] == pytest.approx(1 / model.get_output_embeddings().weight.shape[0])
