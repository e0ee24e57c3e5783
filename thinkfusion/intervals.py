# SPDX-License-Identifier: Apache-2.0
"""95 % intervals of shares, means, ratios and differences, and the entries that reports hold of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Z = 1.959964
"""The normal distribution's 97.5 % point."""


def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a rate (Wilson 1927); [0, 1] when nothing was counted."""
    if total == 0:
        return 0.0, 1.0
    z, rate = Z, successes / total
    middle = (rate + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total))
    # At the edges rounding leaves a residue in the last digit.
    low = 0.0 if successes == 0 else max(0.0, middle - half)
    high = 1.0 if successes == total else min(1.0, middle + half)
    return low, high


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean, by the normal approximation; a point when there are fewer than two values."""
    if not values:
        return 0.0, 0.0
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, mean
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    half = Z * deviation / math.sqrt(len(values))
    return mean - half, mean + half


def ratio_interval(above: Sequence[float], below: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a ratio of means of pairs, by the delta method; a point for fewer than two pairs.

    Raises ZeroDivisionError where the lower mean is 0.
    """
    count = len(above)
    first, second = sum(above) / count, sum(below) / count
    ratio = first / second
    if count < 2:
        return ratio, ratio
    apart = [up - ratio * down for up, down in zip(above, below, strict=True)]
    half = Z * math.sqrt(sum(value * value for value in apart) / (count - 1) / count) / second
    return max(0.0, ratio - half), ratio + half


def rate(name: str, marks: Sequence[bool]) -> dict[str, Any]:
    """`{name: share, name_interval: [low, high]}`; both are None when nothing was judged."""
    if not marks:
        return {name: None, f"{name}_interval": None}
    return {name: sum(marks) / len(marks), f"{name}_interval": list(wilson_interval(sum(marks), len(marks)))}


def mean(name: str, values: Sequence[float]) -> dict[str, Any]:
    """`{name: mean, name_interval: [low, high]}` of values that are not negative."""
    found = sum(values) / len(values) if values else 0.0
    low, high = mean_interval(values)
    return {name: found, f"{name}_interval": [max(0.0, low), high]}


def marked(name: str, marks: Sequence[bool | None]) -> dict[str, Any]:
    """`{name: successes, total, truncated, share, share_interval}`; a mark of None hit the token limit, in no share."""
    judged = [mark for mark in marks if mark is not None]
    return {name: sum(judged), "total": len(judged), "truncated": len(marks) - len(judged), **rate("share", judged)}
