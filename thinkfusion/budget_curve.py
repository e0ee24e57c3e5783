# SPDX-License-Identifier: Apache-2.0
"""The budget curve: how many traces keep within a thinking budget, and how right the answers are at each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from thinkfusion.grading import judge
from thinkfusion.intervals import mean, rate
from thinkfusion.modes import Mode
from thinkfusion.prompts import EvaluationPrompt
from thinkfusion.replying import Asked

DEFAULT_BUDGETS = (8, 16, 32, 64, 128)


def parse_budgets(text: str) -> tuple[int, ...]:
    """`32,64,128`, in rising order; raises ValueError for anything that is no list of positive whole numbers."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ValueError(f"budgets: found {text!r}, expected numbers of tokens, such as 32,64,128.")
    return tuple(sorted({int(word) for word in words}))


def measure_budgets(
    replier: Asked, prompts: Sequence[EvaluationPrompt], budgets: Sequence[int]
) -> list[dict[str, Any]]:
    """Reply to the prompts in thinking mode at each budget.

    One entry for each: `budget`, `samples`, and with intervals `within` (the share of traces of at most that many
    tokens and the one that closes them), `accuracy`, `format_error`, `reasoning_tokens`.
    """
    jobs = [replier.job(prompt.messages, Mode.THINKING) for prompt in prompts]
    curve = []
    for budget in budgets:
        replies = replier.replies(jobs, thinking_budget=budget, label=f"budget {budget}")
        marks = [
            judge(reply.answer, prompt.solution, prompt.grader)
            for prompt, reply in zip(prompts, replies, strict=True)
            if prompt.solution is not None and reply.kind != "unanswered"
        ]
        curve.append(
            {
                "budget": budget,
                "samples": len(replies),
                **rate("within", [(reply.reasoning_tokens or 0) <= budget + 1 for reply in replies]),
                **rate("accuracy", marks),
                **rate("format_error", [reply.format_error for reply in replies if reply.judged]),
                **mean("reasoning_tokens", [reply.reasoning_tokens or 0 for reply in replies]),
            }
        )
    return curve
