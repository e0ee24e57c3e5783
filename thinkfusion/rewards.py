# SPDX-License-Identifier: Apache-2.0
"""Rewards of a reply, for RL: is it right, does it keep its mode's format, is a non-thinking answer brief.

A reward is any function of a prompt and a reply that returns a number, or None where it says nothing about the reply.
The first two are those of A.X K1 (arXiv 2601.09200): correctness +1 or -1, format 0 or -1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from thinkfusion.grading import check_solution, judge
from thinkfusion.modes import Mode, Reply
from thinkfusion.prompts import EvaluationPrompt

Reward = Callable[[EvaluationPrompt, Reply], "float | None"]
"""`reward(prompt, reply)`. Its `__name__` is its name in errors and logs."""

EXCERPT = 80
"""So many characters of a question or an answer are shown in an error."""


def correctness(prompt: EvaluationPrompt, reply: Reply) -> float:
    """+1 for an answer that is right by the prompt's grader, -1 for any other, and for a reply that was cut.

    Raises ValueError for a prompt without an answer.
    """
    if prompt.solution is None:
        raise ValueError("the prompt has no answer to compare with.")
    return 1.0 if reply.finished and judge(reply.answer, prompt.solution, prompt.grader) else -1.0


def format_reward(prompt: EvaluationPrompt, reply: Reply) -> float:
    """-1 for a reply that breaks its mode's format (`Reply.format_error`), else 0; a cut reply breaks none."""
    return -1.0 if reply.format_error else 0.0


def brevity(soft_caps: float | Mapping[str, float]) -> Reward:
    """A reward for non-thinking answers: 0 up to the soft cap, from there down to -1 at twice the cap, and beyond.

    soft_caps: tokens of an answer, for all prompts or by their task; `leakage.soft_caps` measures them as twice the
    mean answer of thinking replies. A task without one, and a thinking reply, get 0.

    Raises ValueError for a cap that is not above 0.
    """
    caps = dict(soft_caps) if isinstance(soft_caps, Mapping) else None
    for cap in [soft_caps] if caps is None else caps.values():
        if not isinstance(cap, (int, float)) or not 0 < cap < math.inf:
            raise ValueError(f"brevity: found a soft cap of {cap!r}, expected a number of tokens above 0.")

    def brevity(prompt: EvaluationPrompt, reply: Reply) -> float:
        cap = soft_caps if caps is None else caps.get(prompt.task)
        if reply.mode is Mode.THINKING or cap is None:
            return 0.0
        assert isinstance(cap, (int, float))
        excess = (reply.answer_tokens or 0) / cap - 1
        return -min(max(excess, 0.0), 1.0)

    return brevity


DEFAULT_REWARDS: tuple[Reward, ...] = (correctness, format_reward)


def reward_name(reward: Reward) -> str:
    """What a reward is called in errors and logs."""
    return str(getattr(reward, "__name__", type(reward).__name__))


def score(reward: Reward, prompt: EvaluationPrompt, reply: Reply) -> float | None:
    """What `reward` gives the reply, checked.

    Raises ValueError, with reward, prompt and reply named, if it raises or returns what is no finite number.
    """
    where = f"reward {reward_name(reward)}: on a {reply.mode} reply to {described(prompt)} (answer {_cut(reply.answer)}"
    where += f", {reply.kind})"
    try:
        given = reward(prompt, reply)
    except Exception as error:
        raise ValueError(
            f"{where} it raised {type(error).__name__}: {error} Mend it, or return None where it has nothing to say."
        ) from error
    if given is None:
        return None
    try:
        value = float(given)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(
            f"{where} it returned {given!r}, expected a finite number, or None where it has nothing to say. Mend it."
        )
    return value


def total_reward(
    prompt: EvaluationPrompt,
    reply: Reply,
    rewards: Sequence[Reward] = DEFAULT_REWARDS,
    weights: Sequence[float] | None = None,
) -> float | None:
    """The weighted sum of the rewards that say something about the reply; None if none of them does.

    Raises ValueError as `score`, and for weights of another number than the rewards.
    """
    if weights is not None and len(weights) != len(rewards):
        raise ValueError(f"weights: found {len(weights)} for {len(rewards)} rewards, expected one for each.")
    given = [score(reward, prompt, reply) for reward in rewards]
    said = [
        value * weight for value, weight in zip(given, weights or [1.0] * len(given), strict=True) if value is not None
    ]
    return sum(said) if said else None


def check_rewards(rewards: Sequence[Reward], prompts: Sequence[EvaluationPrompt]) -> None:
    """Raises ValueError for rewards that cannot be called or share a name, and for what `correctness` cannot judge."""
    if not rewards:
        raise ValueError("rewards: found none, expected at least one, such as thinkfusion.correctness.")
    for reward in rewards:
        if not callable(reward):
            raise ValueError(
                f"rewards: found {reward!r}, expected functions of a prompt and a reply, such as thinkfusion."
                "correctness. Wrap a reward model in such a function."
            )
    names = [reward_name(reward) for reward in rewards]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"rewards: {', '.join(twice)} is there twice, and logs could not tell them apart. Rename one.")
    if correctness not in rewards:
        return
    for number, prompt in enumerate(prompts, start=1):
        if prompt.solution is None:
            raise ValueError(
                f"reward correctness: prompt {number}, {described(prompt)}, has no answer to compare with. Give the "
                "row an answer, leave it out, or use rewards without correctness."
            )
        try:
            check_solution(prompt.solution, prompt.grader)
        except ValueError as error:
            raise ValueError(
                f"reward correctness: prompt {number}, {described(prompt)}: {error} Mend the row, or choose another "
                "grader."
            ) from None


def described(prompt: EvaluationPrompt) -> str:
    """A prompt in an error: its task and the beginning of its question."""
    return f"{_cut(prompt.question)} of {prompt.task}"


def _cut(text: str) -> str:
    return repr(text if len(text) <= EXCERPT else text[: EXCERPT - 1] + "…")
