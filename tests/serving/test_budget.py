# SPDX-License-Identifier: Apache-2.0
"""A thinking budget in servers: it closes where ours closes without a margin, and what it costs in right answers."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.serving.asking import ask
from tests.serving.conftest import AT_A_TIME
from tests.serving.reference import MOST_TOKENS
from thinkfusion.budget import ThinkingBudget
from thinkfusion.budget_curve import DEFAULT_BUDGETS, measure_budgets
from thinkfusion.generation import Sampling, generate
from thinkfusion.grading import judge
from thinkfusion.modes import THINK_CLOSE, Mode
from thinkfusion.replying import Replier

FIELDS = {"vllm": "thinking_token_budget", "llama": "thinking_budget_tokens"}
"""The fields of a request; transformers serve has none."""
EQUAL = 0.99

pytestmark = pytest.mark.parametrize("server", [(name, "demo") for name in FIELDS], indirect=True, ids=FIELDS)


def closed_at(reference, budget):
    """Our replies in thinking mode, closed at the budget and not before it."""
    prompts = [reference.prompter.prompt_ids(each.messages, Mode.THINKING) for each in reference.prompts]
    closing = [ThinkingBudget(reference.tokenizer, budget, margin=0)]
    modes = [Mode.THINKING] * len(prompts)
    sampling = Sampling(MOST_TOKENS)
    return generate(reference.model, reference.tokenizer, prompts, modes, sampling, logits_processor=closing)


def closed_alike(theirs, ours):
    """Whether reasoning was closed at the same token, and the same answer follows.

    White space is kept, since it has tokens. Of a model that closes once more in its answer, vLLM drops the tag.
    """
    reasoning, _, answer = "".join(ours.pieces).partition(THINK_CLOSE)
    plain = [text.replace(THINK_CLOSE, "").strip() for text in (theirs.answer, answer)]
    return theirs.reasoning == reasoning and plain[0] == plain[1]


def asked_with(server, reference, budget):
    field = {FIELDS[server.engine]: budget}
    with ThreadPoolExecutor(AT_A_TIME) as workers:
        replies = workers.map(
            lambda prompt: ask(server, prompt.messages, Mode.THINKING, max_tokens=MOST_TOKENS, **field),
            reference.prompts,
        )
        return list(replies)


def test_a_budget_closes_where_ours_does(server, reference, figures):
    curve, equal = [], {}
    for budget in DEFAULT_BUDGETS:
        theirs, ours = asked_with(server, reference, budget), closed_at(reference, budget)
        pairs = list(zip(theirs, ours, strict=True))
        equal[budget] = sum(closed_alike(each, own) for each, own in pairs)
        tokens = [len(reference.ids(each.reasoning)) for each in theirs]
        marks = [
            judge(each.answer, prompt.solution, prompt.grader)
            for each, prompt in zip(theirs, reference.prompts, strict=True)
        ]
        curve.append(
            {
                "budget": budget,
                "accuracy": sum(marks) / len(marks),
                "reasoning_tokens": sum(tokens) / len(tokens),
                "longest": max(tokens),
                "equal": equal[budget],
            }
        )
    figures.setdefault(server.engine, {})["budget curve"] = curve
    replier = Replier(reference.model, reference.tokenizer, Sampling(MOST_TOKENS), progress=False)
    if "ours" not in figures:
        ours_curve = measure_budgets(replier, reference.prompts, DEFAULT_BUDGETS)
        figures["ours"] = [
            {name: each[name] for name in ("budget", "accuracy", "reasoning_tokens", "within")} for each in ours_curve
        ]
    assert min(equal.values()) >= EQUAL * len(reference.prompts), equal
    assert all(each["longest"] <= each["budget"] for each in curve), curve
