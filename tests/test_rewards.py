# SPDX-License-Identifier: Apache-2.0
"""What a reply is worth: by its answer, its format and its length, and what is said of a reward that fails."""

import math

import pytest

from thinkfusion import EvaluationPrompt, Mode, brevity, correctness, format_reward, split_reply, total_reward
from thinkfusion.modes import REPLY_CLASSES, Reply
from thinkfusion.rewards import check_rewards, score

PROMPT = EvaluationPrompt(({"role": "user", "content": "What is 2 + 2?"},), "4", "sums", "en")
OPEN = EvaluationPrompt(({"role": "user", "content": "Say something."},))
CLASSES = {
    "ok": "Two and two.</think>The answer is 4.<|im_end|>",
    "never_closed": "The answer is 4.<|im_end|>",
    "empty_trace": "</think>The answer is 4.<|im_end|>",
    "extra_tag": "Two.</think>and</think>The answer is 4.<|im_end|>",
    "empty_answer": "Two and two.</think><|im_end|>",
    "truncated": "Two and two.</think>The answer is 4",
}


def reply(text: str, mode: str = "thinking") -> Reply:
    return split_reply(text, mode, finished="<|im_end|>" in text)


def answer(text: str, tokens: int, mode: Mode = Mode.NON_THINKING) -> Reply:
    return Reply(mode, "", text, "ok", answer_tokens=tokens)


def test_right_and_wrong_by_the_prompts_grader():
    assert correctness(PROMPT, reply("So.</think>The answer is 4.<|im_end|>")) == 1
    assert correctness(PROMPT, reply("So.</think>The answer is 5.<|im_end|>")) == -1
    exact = EvaluationPrompt(PROMPT.messages, "4", grader="exact")
    assert correctness(exact, reply("So.</think>The answer is 4.<|im_end|>")) == -1
    assert correctness(exact, reply("4<|im_end|>", "non_thinking")) == 1


@pytest.mark.parametrize(
    ("kind", "right", "form"),
    [
        ("ok", 1, 0),
        ("never_closed", 1, -1),
        ("empty_trace", 1, -1),
        ("extra_tag", 1, -1),
        ("empty_answer", -1, -1),
        ("truncated", -1, 0),
    ],
)
def test_rewards_by_class(kind, right, form):
    given = reply(CLASSES[kind])
    assert given.kind == kind
    assert (correctness(PROMPT, given), format_reward(PROMPT, given)) == (right, form)
    assert total_reward(PROMPT, given) == right + form


def test_every_class_has_its_reward():
    assert set(CLASSES) == set(REPLY_CLASSES)


def test_a_tag_in_a_non_thinking_answer_is_a_format_error():
    assert format_reward(PROMPT, reply("The answer is 4.<|im_end|>", "non_thinking")) == 0
    assert format_reward(PROMPT, reply("Two.</think>The answer is 4.<|im_end|>", "non_thinking")) == -1


@pytest.mark.parametrize(("tokens", "worth"), [(0, 0), (10, 0), (15, -0.5), (20, -1), (100, -1)])
def test_brevity_falls_from_the_cap_to_its_double(tokens, worth):
    assert brevity(10)(PROMPT, answer("…", tokens)) == worth
    assert brevity({"sums": 10.0})(PROMPT, answer("…", tokens)) == worth


def test_brevity_says_nothing_of_thinking_or_of_tasks_without_a_cap():
    assert brevity(10)(PROMPT, answer("…", 99, Mode.THINKING)) == 0
    assert brevity({"others": 10})(PROMPT, answer("…", 99)) == 0
    assert brevity({"others": 10}).__name__ == "brevity"


@pytest.mark.parametrize("cap", [0, -1, math.nan, {"sums": 0}, {"sums": None}])
def test_a_cap_is_a_number_of_tokens(cap):
    with pytest.raises(ValueError, match=r"brevity: found a soft cap of .* above 0"):
        brevity(cap)


def test_weights_and_rewards_that_say_nothing():
    def silent(prompt, reply):
        return None

    given = reply(CLASSES["never_closed"])
    assert total_reward(PROMPT, given, (correctness, format_reward), (2.0, 0.5)) == 1.5
    assert total_reward(PROMPT, given, (correctness, silent)) == 1
    assert total_reward(PROMPT, given, (silent,)) is None
    with pytest.raises(ValueError, match="weights: found 1 for 2 rewards"):
        total_reward(PROMPT, given, (correctness, silent), (1.0,))


@pytest.mark.parametrize("value", [math.nan, math.inf, "many", [1.0]])
def test_what_is_no_finite_number_is_named(value):
    def politeness(prompt, reply):
        return value

    with pytest.raises(ValueError, match=r"reward politeness: on a thinking reply .*2 \+ 2.* returned .* Mend it") as e:
        score(politeness, PROMPT, reply(CLASSES["ok"]))
    assert repr(value) in str(e.value)


def test_a_reward_that_raises_is_named():
    def politeness(prompt, reply):
        return {}["please"]

    with pytest.raises(ValueError, match=r"reward politeness: .*'What is 2 \+ 2\?' of sums.*KeyError: 'please'.* None"):
        score(politeness, PROMPT, reply(CLASSES["ok"]))


def test_prompts_without_answers_are_named_before_anything_is_generated():
    with pytest.raises(ValueError, match=r"reward correctness: prompt 2, 'Say something\.' of prompts, has no answer"):
        check_rewards([correctness], [PROMPT, OPEN])
    check_rewards([format_reward], [PROMPT, OPEN])
    with pytest.raises(ValueError, match="has no answer"):
        correctness(OPEN, reply(CLASSES["ok"]))
    unreadable = EvaluationPrompt(PROMPT.messages, "four", grader="numeric")
    with pytest.raises(ValueError, match=r"prompt 1, .*found 'four', expected a number"):
        check_rewards([correctness], [unreadable])


def test_rewards_are_functions_of_different_names():
    with pytest.raises(ValueError, match="rewards: found none"):
        check_rewards([], [PROMPT])
    with pytest.raises(ValueError, match=r"rewards: found 'a/model', expected functions"):
        check_rewards(["a/model"], [PROMPT])
    with pytest.raises(ValueError, match="rewards: brevity is there twice"):
        check_rewards([brevity(10), brevity(20)], [PROMPT])
