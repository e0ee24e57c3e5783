# SPDX-License-Identifier: Apache-2.0
"""Leakage: reasoning in an answer, by its words and by its length."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from thinkfusion.modes import Mode, Reply
from thinkfusion.prompts import EvaluationPrompt

# Words of thinking aloud, whole words; the English ones are those of "Demystifying Hybrid Thinking"
# (arXiv 2510.12680), the Korean ones their counterparts.
REFLECTIVE_WORDS = re.compile(
    r"\b(?:wait|hmm+|okay|alternatively|let me think)\b"
    r"|(?<!\w)(?:잠깐|흠+(?!\w)|음+,|다시 생각|생각해 보자|생각해보자)",
    re.IGNORECASE,
)
SOFT_CAP_FACTOR = 2.0
"""A non-thinking answer this many times longer than the mean answer part of thinking replies counts as leakage."""


def leaks(reply: Reply, soft_cap: float | None) -> bool:
    """Whether reasoning leaks into an answer: a reflective word in it, or a length over the soft cap.

    The cap is for non-thinking answers, twice the mean answer of thinking replies to the same task (after TNT,
    arXiv 2601.04805); None means there is none.
    """
    if REFLECTIVE_WORDS.search(reply.answer):
        return True
    return over_cap(reply, soft_cap)


def over_cap(reply: Reply, soft_cap: float | None) -> bool:
    """Whether a non-thinking answer is longer than the cap."""
    return reply.mode is Mode.NON_THINKING and soft_cap is not None and (reply.answer_tokens or 0) > soft_cap


def soft_caps(prompts: Sequence[EvaluationPrompt], replies: Sequence[Reply]) -> dict[str, float]:
    """The longest answer, in tokens, that is not yet leakage, by task; none without a good thinking reply."""
    lengths: dict[str, list[int]] = defaultdict(list)
    for prompt, reply in zip(prompts, replies, strict=True):
        if reply.mode is Mode.THINKING and reply.kind == "ok":
            lengths[prompt.task].append(reply.answer_tokens or 0)
    return {task: SOFT_CAP_FACTOR * sum(values) / len(values) for task, values in lengths.items()}
