# SPDX-License-Identifier: Apache-2.0
"""A mode report for people and programs: a table, and `mode_report.json`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from thinkfusion.digests import weights_digest
from thinkfusion.evaluation import ModeReport
from thinkfusion.modes import Mode

REPORT_NAME = "mode_report.json"
REPLIES_NAME = "replies.jsonl"
RATES = ("format_error", "truncated", "leakage", "accuracy")
MEANS = ("reasoning_tokens", "answer_tokens")


def _cell(values: dict[str, Any], name: str) -> str:
    """A figure with its 95 % interval: percent for a rate, one decimal for a mean."""
    value, interval = values[name], values[f"{name}_interval"]
    if value is None:
        return "-"
    if name in MEANS:
        return f"{value:.1f} [{interval[0]:.1f}, {interval[1]:.1f}]"
    return f"{100 * value:.1f} % [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _table_rows(report: ModeReport) -> Iterator[tuple[str, list[str]]]:
    modes = [report.modes[mode.value] for mode in Mode]
    for name in RATES:
        yield name.replace("_", " "), [_cell(values, name) for values in modes]
        if name == "accuracy":
            for task, values in modes[0]["tasks"].items():
                if values["accuracy"] is not None:
                    yield f"  {task}", [_cell(each["tasks"][task], "accuracy") for each in modes]
    for name in MEANS:
        yield name.replace("_", " "), [_cell(values, name) for values in modes]


def mode_table(report: ModeReport) -> str:
    """The report as a table in plain text: a row per figure, a column per mode, 95 % intervals in brackets."""
    heads = [mode.value.replace("_", "-") for mode in Mode]
    rows = [(f"{report.samples:,} prompts per mode", heads), *_table_rows(report)]
    widths = [max(len(row[0]) for row in rows)] + [max(len(row[1][column]) for row in rows) for column in range(2)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.ljust(widths[n + 1]) for n, cell in enumerate(row[1]))]).rstrip()
        for row in rows
    ]
    lines.insert(1, "─" * max(map(len, lines)))
    broken = {
        mode.value: {kind: n for kind, n in report.modes[mode.value]["classes"].items() if n and kind != "ok"}
        for mode in Mode
    }
    lines += [f"{mode.replace('_', '-')}: {classes}" for mode, classes in broken.items() if classes]
    return "\n".join(lines)


def measured_lines(report: ModeReport) -> list[str]:
    """What was measured beside the modes, as lines of text: budgets, probe, comparison, harness."""
    lines = [
        f"budget {point['budget']}: {_cell(point, 'within')} within, accuracy {_cell(point, 'accuracy')}"
        for point in report.measured.get("budgets", ())
    ]
    if "probe" in report.measured:
        probe = report.measured["probe"]
        names = {
            "closes": "closing token",
            "closes_inside": "inside traces",
            "closes_again": "again",
            "trace_begins": "trace",
            "trace_tagged": "control token in its place",
            "answer_begins": "answer",
            "answer_blank": "line break or end in its place",
            "answer_tagged": "control token there",
            "answer_closes": "closing token after it",
        }
        known = ((text, probe.get(name)) for name, text in names.items())
        lines.append("probe: " + ", ".join(f"{text} {value:.3f}" for text, value in known if value is not None))
    if "comparison" in report.measured:
        lines += _comparison_lines(report.measured["comparison"])
    for task, metrics in report.measured.get("harness", {}).items():
        for metric, values in metrics.items():
            shares = ", ".join(f"{mode.value.replace('_', '-')} {values[mode.value]:.3f}" for mode in Mode)
            lines.append(f"lm-eval {task}, {metric}: {shares}")
    return lines


def _comparison_lines(comparison: dict[str, Any]) -> Iterator[str]:
    yield f"against {comparison['against']}:"
    yield from (f"  the settings differ: {line}" for line in comparison["settings"])
    for mode, tables in comparison["modes"].items():
        for name, table in tables.items():
            if table["pairs"]:
                low, high = (100 * end for end in table["difference_interval"])
                yield (
                    f"  {mode.replace('_', '-')}, {name.replace('_', ' ')}: {100 * table['difference']:+.1f} points "
                    f"[{low:+.1f}, {high:+.1f}], p {table['p']:.2g} ({table['this_only']} only here, "
                    f"{table['other_only']} only there, of {table['pairs']})"
                )


def save_report(report: ModeReport, directory: str | Path, *, checkpoint: str | Path | None = None) -> Path:
    """Write `mode_report.json`, and `replies.jsonl` with every prompt and reply; returns the report's path.

    checkpoint: the folder that was measured. A digest of its weights goes into the report as `weights`, so that the
    report cannot be taken for one of weights that came later.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / REPLIES_NAME).open("w", encoding="utf-8") as file:
        for mode, replies in report.replies.items():
            for prompt, reply in zip(report.prompts, replies, strict=True):
                row = {
                    "mode": mode.value,
                    "task": prompt.task,
                    "messages": prompt.messages,
                    "solution": prompt.solution,
                    "class": reply.kind,
                    "reasoning": reply.reasoning,
                    "answer": reply.answer,
                }
                if prompt.grader != "auto":
                    row["grader"] = prompt.grader
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    path = folder / REPORT_NAME
    measured = report.to_dict()
    weights = None if checkpoint is None else weights_digest(checkpoint)
    if weights is not None:
        measured["weights"] = weights
    path.write_text(json.dumps(measured, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return path
