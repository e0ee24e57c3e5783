# SPDX-License-Identifier: Apache-2.0
"""Two checkpoints on the same prompts: paired tables, the difference with its interval, and McNemar's exact test."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from thinkfusion.evaluation import ModeReport
from thinkfusion.grading import judge
from thinkfusion.intervals import Z
from thinkfusion.modes import UNJUDGED, Mode
from thinkfusion.reporting import REPLIES_NAME, REPORT_NAME

SAME = ("max_new_tokens", "temperature", "top_p", "seed")
"""Settings that have to agree for a comparison to mean the checkpoints."""


class Answered(NamedTuple):
    """A reply of a report as a comparison needs it; `right` is None without a solution, `kept` without an end."""

    messages: tuple[dict[str, Any], ...]
    right: bool | None
    kept: bool | None


class Compared(NamedTuple):
    """A report to compare with: its name, settings and replies by mode, in the order of the prompts."""

    name: str
    settings: dict[str, Any]
    replies: dict[Mode, list[Answered]]


def mcnemar_exact(first_only: int, second_only: int) -> float:
    """The two-sided p-value of McNemar's exact test: of the pairs that differ, half should fall on either side.

    McNemar 1947, with the binomial distribution in place of the chi-squared one; 1 where no pair differs.
    """
    differing = first_only + second_only
    ways, tail = 1, 0
    for few in range(min(first_only, second_only) + 1):
        tail += ways
        ways = ways * (differing - few) // (few + 1)
    # In whole numbers up to here: neither side fits a float where thousands differ.
    return min(1.0, float(Fraction(2 * tail, 2**differing)))


def paired_difference_interval(first_only: int, second_only: int, pairs: int) -> tuple[float, float]:
    """The 95 % interval of the difference of two shares of the same pairs, first minus second (Bonett and Price 2012).

    Wald's interval after one pair is added to either side; [-1, 1] without pairs.
    """
    if pairs == 0:
        return -1.0, 1.0
    up, down = (first_only + 1) / (pairs + 2), (second_only + 1) / (pairs + 2)
    half = Z * math.sqrt((up + down - (up - down) ** 2) / (pairs + 2))
    return max(-1.0, up - down - half), min(1.0, up - down + half)


def paired_table(pairs: Sequence[tuple[bool, bool]]) -> dict[str, Any]:
    """How often both, one, or neither of a pair holds, `difference` (first minus second) with its interval, and `p`."""
    both, neither = sum(a and b for a, b in pairs), sum(not a and not b for a, b in pairs)
    first, second = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    return {
        "pairs": len(pairs),
        "both": both,
        "this_only": first,
        "other_only": second,
        "neither": neither,
        "difference": (first - second) / len(pairs) if pairs else None,
        "difference_interval": list(paired_difference_interval(first, second, len(pairs))) if pairs else None,
        "p": mcnemar_exact(first, second) if pairs else None,
    }


def answered(report: ModeReport, name: str) -> Compared:
    """What of a report is compared."""
    replies = {
        mode: [
            _answered(prompt.messages, prompt.solution, prompt.grader, (reply.answer, reply.kind))
            for prompt, reply in zip(report.prompts, given, strict=True)
        ]
        for mode, given in report.replies.items()
    }
    return Compared(name, report.settings, replies)


def _answered(
    messages: Sequence[dict[str, Any]], solution: str | None, grader: str, reply: tuple[str, str]
) -> Answered:
    """`reply` is its answer and its class."""
    answer, kind = reply
    right = None if solution is None or kind == "unanswered" else judge(answer, solution, grader)
    return Answered(tuple(messages), right, None if kind in UNJUDGED else kind == "ok")


def is_report(name: str) -> bool:
    """Whether `name` is a report and no checkpoint: a file of JSON, or a folder with a report and no config.json."""
    path = Path(name)
    return path.suffix == ".json" or ((path / REPORT_NAME).is_file() and not (path / "config.json").is_file())


def read_report(name: str) -> Compared:
    """Read a report that was saved: `mode_report.json` and the `replies.jsonl` beside it.

    Raises FileNotFoundError if one of them is missing, ValueError for one that is no such report.
    """
    path = Path(name) / REPORT_NAME if Path(name).is_dir() else Path(name)
    beside = path.parent / REPLIES_NAME
    for needed in (path, beside):
        if not needed.is_file():
            raise FileNotFoundError(
                f"{needed}: there is no such file; a report is {REPORT_NAME} beside {REPLIES_NAME}."
            )
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
        replies: dict[Mode, list[Answered]] = {mode: [] for mode in Mode}
        for line in beside.read_text(encoding="utf-8").split("\n"):
            if not line:
                continue
            row = json.loads(line)
            grader = row.get("grader", "auto")
            made = _answered(row["messages"], row["solution"], grader, (row["answer"], row["class"]))
            replies[Mode(row["mode"])].append(made)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: found no report of thinkfusion evaluate ({error!r}). Measure it again.") from None
    return Compared(name, settings, replies)


def compare(this: Compared, other: Compared) -> dict[str, Any]:
    """`this` against `other`, prompt by prompt: for each mode the paired tables of `accuracy` and `format_kept`.

    `settings` lists what differs, since a difference may then be that of the settings. Pairs in which a reply hit the
    token limit are in no table of `format_kept`. Raises ValueError if the prompts are not the same.
    """
    modes: dict[str, Any] = {}
    for mode in Mode:
        pairs = _same_prompts(this, other, mode)
        modes[mode.value] = {
            "accuracy": paired_table(_judged((a.right, b.right) for a, b in pairs)),
            "format_kept": paired_table(_judged((a.kept, b.kept) for a, b in pairs)),
        }
    return {"against": other.name, "settings": _differing(this.settings, other.settings), "modes": modes}


def _judged(pairs: Iterable[tuple[bool | None, bool | None]]) -> list[tuple[bool, bool]]:
    return [(a, b) for a, b in pairs if a is not None and b is not None]


def _same_prompts(this: Compared, other: Compared, mode: Mode) -> list[tuple[Answered, Answered]]:
    check_prompts(other, [each.messages for each in this.replies[mode]])
    return list(zip(this.replies[mode], other.replies[mode], strict=True))


def check_prompts(other: Compared, asked: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Raises ValueError unless `other` replied to these prompts, each a list of messages, in both modes."""
    for mode, replies in other.replies.items():
        same = sum(list(mine) == list(each.messages) for mine, each in zip(asked, replies, strict=False))
        if len(asked) != len(replies) or same < len(asked):
            raise ValueError(
                f"against: {other.name} has {len(replies)} prompts in {mode} mode, of which {same} are the same as the "
                f"{len(asked)} here, expected all. Measure both with the same --prompts, --samples and --seed."
            )


def _differing(this: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [f"{name}: {this.get(name)}, other {other.get(name)}" for name in SAME if this.get(name) != other.get(name)]
