# SPDX-License-Identifier: Apache-2.0
"""The verdict on a switch: one line, by a rule that is stated beside it, and what was found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from thinkfusion.intervals import wilson_interval
from thinkfusion.modes import UNJUDGED, Mode

LIMIT = 0.02
FEWEST = 3
CUT = 0.1
RULE = (
    f"A switch works where, with 95 % confidence, at most {LIMIT:.0%} of the replies break their mode, in each mode "
    f"(the upper end of the Wilson interval); it does not where more than {LIMIT:.0%} break one with that confidence, "
    f"and at least {FEWEST} do; else more replies would have to tell. Replies that were cut at the token limit are not "
    "judged; a switch is not settled where they are most of a mode, and a verdict is "
    f"qualified where they are more than {CUT:.0%} of a mode, where non-thinking answers reason aloud in more than "
    f"{CUT:.0%}, or where more than {LIMIT:.0%} of the replies disobey a switch or break in alternating conversations, "
    "if that was measured. A served model has no switch where no difference between the modes can be told by which "
    "replies reason (the Wilson intervals overlap, and the shares are less than half apart; of effort levels, the "
    "intervals of the mean lengths overlap); where it keeps traces to itself, or did not reply, nothing is judged."
)


@dataclass(frozen=True)
class Verdict:
    """`level` is good, warning or bad."""

    level: str
    headline: str
    findings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"level": self.level, "headline": self.headline, "findings": list(self.findings), "rule": RULE}


def judged(values: dict[str, Any]) -> tuple[int, int]:
    """Broken and finished replies of a mode, from its classes."""
    classes = values["classes"]
    finished = sum(classes.values()) - sum(classes.get(kind, 0) for kind in UNJUDGED)
    return finished - classes["ok"], finished


def _named(mode: Mode) -> str:
    return mode.value.replace("_", "-")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def verdict(modes: dict[str, dict[str, Any]], measured: dict[str, Any] | None = None) -> Verdict:
    """The verdict on the modes of a report and what was measured beside them."""
    measured = measured or {}
    counts = {mode: judged(modes[mode.value]) for mode in Mode}
    intervals = {mode: wilson_interval(*counts[mode]) for mode in Mode}
    broken, finished = (sum(count[place] for count in counts.values()) for place in (0, 1))
    told = f"{broken:,} of {finished:,} replies broke their mode"
    collapsed = [mode for mode in Mode if counts[mode][0] >= FEWEST and intervals[mode][0] > LIMIT]
    findings = tuple(_findings(modes, measured, counts))
    alike = measured.get("endpoint", {}).get("alike")
    if alike:
        return Verdict("bad", f"No switch shows: both modes answer alike. {alike}; {told}.", findings)
    if collapsed:
        where = " and ".join(_named(mode) for mode in collapsed)
        return Verdict("bad", f"The switch does not work in {where} mode: {told}.", findings)
    cut = [mode for mode in Mode if 2 * counts[mode][1] < modes[mode.value]["samples"]]
    if cut:
        where = " and ".join(_named(mode) for mode in cut)
        why = [
            what
            for kind, what in (
                ("truncated", "cut at the token limit"),
                ("unseen", "not to be judged from outside"),
                ("unanswered", "not given"),
            )
            if any(modes[mode.value]["classes"].get(kind) for mode in cut)
        ]
        headline = f"Not settled: most replies in {where} mode were {' or '.join(why)}; {told}."
        return Verdict("warning", headline, findings)
    if any(interval[1] > LIMIT for interval in intervals.values()):
        return Verdict("warning", f"Not settled: {told}, too few or too near the line to tell.", findings)
    doubts = list(_doubts(modes, measured))
    if doubts:
        return Verdict("warning", f"The switch works, with a qualification: {told}, but {doubts[0]}.", findings)
    return Verdict("good", f"The switch works: {told}.", findings)


def _doubts(modes: dict[str, dict[str, Any]], measured: dict[str, Any]) -> Iterator[str]:
    for mode in Mode:
        if (modes[mode.value]["truncated"] or 0) > CUT:
            yield f"{_percent(modes[mode.value]['truncated'])} in {_named(mode)} mode were cut at the token limit"
        lost = modes[mode.value]["classes"].get("unanswered", 0)
        if lost > CUT * modes[mode.value]["samples"]:
            yield f"{lost:,} prompts in {_named(mode)} mode got no reply"
    for name, what in (("obedience", "disobeyed a switch"), ("flip", "broke in alternating conversations")):
        if name in measured and measured[name]["total"]:
            part = measured[name]
            wrong = part["total"] - part["obeyed" if name == "obedience" else "right"]
            if wilson_interval(wrong, part["total"])[0] > LIMIT:
                yield f"{wrong:,} of {part['total']:,} {what}"
    leakage = modes[Mode.NON_THINKING.value]["leakage_interval"]
    if leakage is not None and leakage[0] > CUT:
        yield f"{_percent(modes[Mode.NON_THINKING.value]['leakage'])} of the non-thinking answers reason aloud"


def _findings(
    modes: dict[str, dict[str, Any]], measured: dict[str, Any], counts: dict[Mode, tuple[int, int]]
) -> Iterator[str]:
    for mode in Mode:
        values = modes[mode.value]
        kinds = [f"{n:,} {kind}" for kind, n in values["classes"].items() if n and kind not in ("ok", *UNJUDGED)]
        cut = values["classes"]["truncated"]
        aside = [f"{values['classes'].get(kind, 0):,} {kind}" for kind in UNJUDGED[1:] if values["classes"].get(kind)]
        line = f"{_named(mode).capitalize()}: {counts[mode][0]:,} of {counts[mode][1]:,} broke the mode"
        line += f" ({', '.join(kinds)})" if kinds else ""
        line += f"; {cut:,} more were cut at the token limit" if cut else ""
        yield line + (f"; not judged: {', '.join(aside)}." if aside else ".")
    right = {mode: modes[mode.value]["accuracy"] for mode in Mode}
    if None not in right.values():
        shares = " and ".join(f"{_percent(right[mode] or 0)} {_named(mode)}" for mode in Mode)
        yield f"Right answers: {shares}."
    counted = {mode: [modes[mode.value][f"{part}_tokens"] for part in ("reasoning", "answer")] for mode in Mode}
    if all(None not in parts for parts in counted.values()):
        tokens = {mode: sum(parts) for mode, parts in counted.items()}
        yield (
            "Tokens of a reply, on average: "
            + " and ".join(f"{tokens[mode]:.1f} {_named(mode)}" for mode in Mode)
            + "."
        )
    leaking = modes[Mode.NON_THINKING.value]["leakage"]
    if leaking:
        yield f"{_percent(leaking)} of the non-thinking answers reason aloud."
    if "obedience" in measured:
        part = measured["obedience"]
        yield f"Switches: {part['obeyed']:,} of {part['total']:,} replies obeyed, in {len(part['cells'])} combinations."
    if "flip" in measured:
        part = measured["flip"]
        yield (
            f"Alternating: {part['right']:,} of {part['total']:,} turns kept their mode; {part['unbroken']:,} of "
            f"{part['judged']:,} conversations did throughout."
        )
    yield from measured.get("endpoint", {}).get("remarks", ())
