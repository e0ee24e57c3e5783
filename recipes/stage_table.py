# SPDX-License-Identifier: Apache-2.0
"""What `think_fusion.py` shows of its stages: the table, the figure, and the merge's sweep beside the published one."""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from thinkfusion.intervals import wilson_interval

MODES = ("thinking", "non_thinking")
COLOURS = ("#1f77a8", "#c8641a")
PUBLISHED = {0.5: 95.4, 0.6: 57.3, 0.7: 15.2, 0.8: 0.0, 0.9: 0.6, 1.0: 0.9}
"""Format errors in thinking mode, in percent of IFEval, of merges of Qwen3-30B-A3B-Base (KRAFTON's account)."""


def figures(measured: dict[str, Any], held_out: list[str]) -> dict[str, Any]:
    """A mode's figures; `accuracy` is of the tasks that the SFT has answers of, `held_out_accuracy` of the others."""

    def accuracy(held: bool) -> float | None:
        cells = [cell for task, cell in measured["tasks"].items() if (task in held_out) == held]
        cells = [cell for cell in cells if cell["accuracy"] is not None]
        total = sum(cell["samples"] for cell in cells)
        return sum(cell["accuracy"] * cell["samples"] for cell in cells) / total if total else None

    return {
        "samples": measured["samples"],
        "format_error": measured["format_error"],
        "classes": measured["classes"],
        "truncated": measured["truncated"],
        "leakage": measured["leakage"],
        "accuracy": accuracy(False),
        "held_out_accuracy": accuracy(True),
        "tokens": measured["reasoning_tokens"] + measured["answer_tokens"],
        "tasks": {
            task: {name: cell[name] for name in ("samples", "accuracy", "format_error")}
            for task, cell in measured["tasks"].items()
        },
    }


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def pooled(rows: list[dict[str, Any]], name: str) -> str:
    """The mean over the seeds; for an error also the 95 % interval of all replies together."""
    known = [row[name] for row in rows if row[name] is not None]
    if not known:
        return "-"
    mean = sum(known) / len(known)
    if name == "tokens":
        return f"{mean:.1f}"
    ends = f" ({100 * min(known):.1f}-{100 * max(known):.1f})" if len(known) > 1 else ""
    if name != "format_error":
        return percent(mean) + ends
    total = sum(row["samples"] for row in rows)
    low, high = wilson_interval(round(mean * total), total)
    return f"{percent(mean)} [{100 * low:.1f}, {100 * high:.1f}]{ends}"


def table(results: list[dict[str, Any]], order: tuple[str, ...]) -> str:
    """A row for each stage and mode: means over the seeds; least and largest in brackets."""
    columns = {
        "format_error": "format error",
        "truncated": "truncated",
        "leakage": "leakage",
        "accuracy": "accuracy",
        "held_out_accuracy": "accuracy, held out",
        "tokens": "tokens",
    }
    lines = [f"| stage | mode | {' | '.join(columns.values())} | broken |", f"|---|---|{'---|' * (len(columns) + 1)}"]
    for stage in order:
        for mode in MODES:
            rows = [each["modes"][mode] for each in results if each["stage"] == stage]
            if rows:
                cells = [pooled(rows, name) for name in columns]
                counts = {kind: sum(row["classes"].get(kind, 0) for row in rows) for kind in rows[0]["classes"]}
                kinds = [f"{kind} {n}" for kind, n in counts.items() if n and kind not in ("ok", "truncated")]
                lines.append(f"| {stage} | {mode} | {' | '.join(cells)} | {', '.join(kinds) or '-'} |")
    return "\n".join(lines)


def draw(results: list[dict[str, Any]], order: tuple[str, ...], path: Path) -> None:
    """Errors and accuracies of both modes over the stages: a line through the means, a dot for each seed."""
    names = {"format_error": "format errors", "accuracy": "accuracy", "held_out_accuracy": "accuracy, held out"}
    stages = [stage for stage in order if any(each["stage"] == stage for each in results)]
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    for panel, (name, title) in zip(figure.subplots(1, 3, sharey=True), names.items(), strict=True):
        for mode, colour in zip(MODES, COLOURS, strict=True):
            points = [
                (place, 100 * each["modes"][mode][name])
                for place, stage in enumerate(stages)
                for each in results
                if each["stage"] == stage and each["modes"][mode][name] is not None
            ]
            means = {
                place: [value for at, value in points if at == place] for place in sorted({at for at, _ in points})
            }
            panel.plot(
                list(means),
                [sum(each) / len(each) for each in means.values()],
                color=colour,
                label=mode.replace("_", "-"),
            )
            panel.plot([at for at, _ in points], [value for _, value in points], "o", color=colour, markersize=4)
        panel.set(title=f"{title}, %", ylim=(-3, 103))
        panel.set_xticks(range(len(stages)), [stage.replace("_", "\n", 1) for stage in stages], fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    panel.legend(frameon=False)
    figure.savefig(path, dpi=140)


def draw_sweeps(files: list[Path], path: Path) -> None:
    """Format errors against the share of the thinking model, of each seed's sweep.json, beside the published ones."""
    found = [json.loads(each.read_text(encoding="utf-8"))["points"] for each in files if each.is_file()]
    if not found:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    panel = figure.subplots()
    panel.plot(
        list(PUBLISHED),
        list(PUBLISHED.values()),
        "--",
        color="#888888",
        marker="s",
        markersize=4,
        label="thinking, published (Qwen3-30B-A3B, IFEval)",
    )
    for number, points in enumerate(found):
        for mode, colour in zip(MODES, COLOURS, strict=True):
            known = [(each["ratio"], each["modes"][mode]["format_error"]) for each in points]
            known = [(ratio, 100 * error) for ratio, error in known if error is not None]
            label = mode.replace("_", "-") if number == 0 else None
            panel.plot(*zip(*known, strict=True), color=colour, marker="o", markersize=3, label=label)
    panel.set(xlabel="share of the thinking model", ylabel="format errors, %", ylim=(-3, 103))
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    figure.savefig(path, dpi=140)
