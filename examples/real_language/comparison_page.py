# SPDX-License-Identifier: Apache-2.0
"""The comparison as JSON, as a table, and as a figure: format error by rows, and the probe against it."""

import json
import math
from pathlib import Path
from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    "trl": {"color": "#8a6bb1", "marker": "s", "markersize": 7.5, "markerfacecolor": "none"},
    "no-treatment": {"color": "#c8641a", "marker": "^", "markersize": 4.5},
    "default": {"color": "#1f77a8", "marker": "o", "markersize": 4},
}
"""How each is drawn; marks of different sizes, as recipes often lie at the same place."""
MODES = ("thinking", "non_thinking")
SETS = {"gsm8k": "GSM8K", "alpaca": "Alpaca", "flips": "flips"}
ANY = "format_error"
PROBED = {
    "trace begins · closes": ("thinking", ("trace_begins", "closes"), "probe", ANY),
    "closes": ("thinking", ("closes",), "probe", ANY),
    "trace begins": ("thinking", ("trace_begins",), "probe", ANY),
    "closes inside": ("thinking", ("closes_inside",), "probe", ANY),
    "closes again, instructions": ("thinking", ("closes_again",), "probe_instructions", "extra_tag"),
    "answer begins": ("non_thinking", ("answer_begins",), "probe", ANY),
    "answer blank, problems": ("non_thinking", ("answer_blank",), "probe", "empty_answer"),
    "answer blank, instructions": ("non_thinking", ("answer_blank",), "probe_instructions", "empty_answer"),
    "trace tagged": ("thinking", ("trace_tagged",), "probe", "extra_tag"),
    "answer tagged": ("non_thinking", ("answer_tagged",), "probe", "extra_tag"),
    "answer closes, solutions": ("non_thinking", ("answer_closes",), "probe_written", "extra_tag"),
    "answer closes, instructions": ("non_thinking", ("answer_closes",), "probe_instructions", "extra_tag"),
}
"""What is held against the replies of a mode that break, or break in one way: a probability of the probe, or a product
of two, and the rows that it is of. A reply in thinking mode has to begin as a trace does, and to close it: few rows of
the treated recipe can bring the second alone. What closes where an answer ends has to be looked for after answers of
the kind. A second tag may also come first."""
PREDICTOR = next(iter(PROBED))


def save(results: list[dict[str, Any]], folder: Path) -> str:
    """Write `comparison.json`, `comparison.md` and `comparison.png`; the table."""
    folder.mkdir(parents=True, exist_ok=True)
    written = table(results)
    for name, text in (("comparison.json", json.dumps(results, indent=1)), ("comparison.md", written)):
        part = folder / f"{name}.part"
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(folder / name)
    if results:
        draw(results, folder / "comparison.png")
    return written


def percent(values: list[float | None]) -> str:
    """The mean of seeds, with least and largest of several; a dash where nothing could be judged."""
    known = [100 * value for value in values if value is not None]
    if not known:
        return "-"
    ends = f" ({min(known):.1f}-{max(known):.1f})" if len(known) > 1 else ""
    return f"{sum(known) / len(known):.1f} %{ends}"


def mean(values: list[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return format(sum(known) / len(known), form) if known else "-"


def probability(values: list[float | None]) -> str:
    """The mean; what three decimals would round to nothing by its power of ten."""
    told = mean(values, ".3f")
    return mean(values, ".0e") if told == "0.000" and any(values) else told


def seeds_of(results: list[dict[str, Any]]) -> str:
    return ", ".join(str(row["seed"]) for row in results)


def table(results: list[dict[str, Any]]) -> str:
    """A row for each number of rows, recipe, set and mode; mean over the seeds."""
    head = ("rows", "recipe", "seeds", "set", "mode", "format error", "classes", "truncated", "accuracy")
    head += ("reasoning tokens",)
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for rows, recipe, given in grouped(results):
        for name, title in SETS.items():
            for mode in MODES:
                cells = [row["sets"][name][mode] for row in given if name in row["sets"]]
                if not cells:
                    continue
                wrong: dict[str, int] = {}
                for cell in cells:
                    for kind, count in cell["classes"].items():
                        if count and kind not in ("ok", "truncated"):
                            wrong[kind] = wrong.get(kind, 0) + count
                told = ", ".join(f"{kind} {count}" for kind, count in wrong.items()) or "-"
                shares = [percent([cell[key] for cell in cells]) for key in ("format_error", "truncated", "accuracy")]
                tokens = mean([cell["reasoning_tokens"] for cell in cells], ".1f")
                seeds = seeds_of([row for row in given if name in row["sets"]])
                parts = (str(rows), recipe, seeds, title, mode.replace("_", "-"), shares[0], told, *shares[1:], tokens)
                lines.append(f"| {' | '.join(parts)} |")
    lines += ["", "Format errors are shares of the replies that finished. Of several seeds: the mean (least-greatest)."]
    probed = ("rows", "recipe", "seeds", "instructions", "closes", "closes inside", "trace begins", "answer begins")
    probed += ("answer closes, solutions", "closes again; answer closes, instructions")
    probed += ("answer blank: problems; instructions", "trace tagged; answer tagged")
    probed += ("trained tokens", "seconds", "dtype")
    lines += ["", f"| {' | '.join(probed)} |", f"|{'---|' * len(probed)}"]
    for rows, recipe, given in grouped(results):
        names = ("closes", "closes inside", "trace begins", "answer begins", "answer closes, solutions")
        parts = [probability([probed_of(row, name) for row in given]) for name in names]
        for pair in (
            ("closes again, instructions", "answer closes, instructions"),
            ("answer blank, problems", "answer blank, instructions"),
            ("trace tagged", "answer tagged"),
        ):
            parts.append("; ".join(probability([probed_of(row, name) for row in given]) for name in pair))
        parts += [mean([row[key] for row in given], ",.0f") for key in ("trained_tokens", "training_seconds")]
        parts.append(", ".join(sorted({row["dtype"] for row in given})))
        trained_how = ", ".join(sorted({row["instructions"].replace("_", "-") for row in given}))
        lines.append(f"| {' | '.join((str(rows), recipe, seeds_of(given), trained_how, *parts))} |")
    references = {round(row["reference_reasoning_tokens"], 1) for row in results}
    if references:
        told = ", ".join(f"{tokens:.1f}" for tokens in sorted(references))
        lines += ["", f"The traces of the problems' own solutions have {told} tokens on average."]
    named = ("rank correlation (Spearman)", "with replies of", "that have", *SETS.values(), "n")
    found = {
        (predictor, name): rank_correlation(scatter(results, predictor, name)) for predictor in PROBED for name in SETS
    }
    if any(value is not None for value in found.values()):
        lines += ["", f"| {' | '.join(named)} |", f"|{'---|' * len(named)}"]
        for predictor, (mode, *_, broken) in PROBED.items():
            values = [mean([found[predictor, name]], ".2f") for name in SETS]
            counts = "/".join(str(len(scatter(results, predictor, name))) for name in SETS)
            told = "any format error" if broken == ANY else f"`{broken}`"
            parts = (predictor, f"{mode.replace('_', '-')} mode", told, *values, counts)
            lines.append(f"| {' | '.join(parts)} |")
    return "\n".join(lines)


def grouped(results: list[dict[str, Any]]) -> list[tuple[int, str, list[dict[str, Any]]]]:
    """Results of all seeds by number of rows and recipe."""
    keys = [(rows, recipe) for rows in sorted({row["rows"] for row in results}) for recipe in RECIPES]
    found = [(*key, [row for row in results if (row["rows"], row["recipe"]) == key]) for key in keys]
    return [group for group in found if group[2]]


def scatter(
    results: list[dict[str, Any]], predictor: str = PREDICTOR, name: str = "gsm8k"
) -> list[tuple[float, float]]:
    """What the probe says and how many replies of a set break so, of those that finished, of each result with both."""
    mode, _, _, broken = PROBED[predictor]
    points = []
    for row in results:
        probability = probed_of(row, predictor)
        cell = row["sets"].get(name, {}).get(mode)
        if cell is None or probability is None or cell["format_error"] is None:
            continue
        finished = sum(count for kind, count in cell["classes"].items() if kind != "truncated")
        points.append((probability, cell[ANY] if broken == ANY else cell["classes"].get(broken, 0) / finished))
    return points


def probed_of(row: dict[str, Any], predictor: str) -> float | None:
    """One of `PROBED` of a result; None where it was not looked for, or the rows have no such place."""
    mode, factors, kind, _ = PROBED[predictor]
    values = [row.get(kind, {}).get(mode, {}).get(factor) for factor in factors]
    return None if None in values else math.prod(values)


def rank_correlation(points: list[tuple[float, float]]) -> float | None:
    """Spearman's, equal values at their mean rank; None for fewer than three points or where nothing differs."""
    import numpy as np

    if len(points) < 3:
        return None
    ranks = []
    for values in zip(*points, strict=True):
        given = np.array(values)
        ranks.append([(np.sum(given < value) + np.sum(given <= value) + 1) / 2 for value in given])
    if any(np.ptp(each) == 0 for each in ranks):
        return None
    return float(np.corrcoef(ranks)[0, 1])


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Format error against rows for each set and mode, and against the probe; a dot for each seed, a line of means."""
    from matplotlib.figure import Figure

    sizes = sorted({row["rows"] for row in results})
    figure = Figure(figsize=(13, 6), layout="constrained")
    panels = figure.subplots(2, 4)
    for line, mode in enumerate(MODES):
        for panel, (name, title) in zip(panels[line], SETS.items(), strict=False):
            for recipe, style in RECIPES.items():
                means = []
                for rows in sizes:
                    values = [
                        100 * row["sets"][name][mode]["format_error"]
                        for row in results
                        if (row["recipe"], row["rows"]) == (recipe, rows) and name in row["sets"]
                        if row["sets"][name][mode]["format_error"] is not None
                    ]
                    panel.plot([rows] * len(values), values, linestyle="", **style)
                    means += [(rows, sum(values) / len(values))] if values else []
                if means:
                    panel.plot(*zip(*means, strict=True), color=style["color"])
            panel.set_xscale("log", base=2)
            panel.set_xticks(sizes, [str(size) for size in sizes])
            panel.set(title=f"{title}, {mode.replace('_', '-')}", ylim=(-3, 103), xlabel="paired rows")
            panel.minorticks_off()
        panels[line][0].set_ylabel("format error, %")
    for recipe, style in RECIPES.items():
        panels[0][0].plot([], [], label=recipe, **style)
    panels[0][0].legend(frameon=False, fontsize=8)
    probe, inside = panels[0][3], panels[1][3]
    for recipe, style in RECIPES.items():
        own = [row for row in results if row["recipe"] == recipe]
        points = scatter(own)
        if points:
            found = [x for x, _ in points], [100 * y for _, y in points]
            probe.plot(*found, linestyle="", **style)
        known = [(row["rows"], row["probe"]["thinking"]["closes_inside"]) for row in own]
        given = [x for x, _ in known], [100 * (y or 0) for _, y in known]
        inside.plot(*given, linestyle="", **style)
    probe.set(title="the probe and what is generated", xlabel="P(trace begins) · P(close | trace)", ylim=(-3, 103))
    inside.set_ylim(0, max([2.0, *(1.05 * top for top in inside.get_ylim())]))
    inside.set_xscale("log", base=2)
    inside.set_xticks(sizes, [str(size) for size in sizes])
    inside.minorticks_off()
    inside.set(title="closing too early", xlabel="paired rows", ylabel="P(close) inside traces, %")
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
