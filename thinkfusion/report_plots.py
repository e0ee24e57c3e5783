# SPDX-License-Identifier: Apache-2.0
"""Plots of a mode report as inline SVG: intervals by task, lengths of replies, the budget curve."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Any, NamedTuple

WIDTH, LEFT, RIGHT, ROW = 640, 170, 30, 42


class Dot(NamedTuple):
    """A figure: where it stands in the report (a JSON pointer), its value and interval, and its class (t or n)."""

    pointer: str
    value: float | None
    interval: Sequence[float] | None
    kind: str
    told: str


def marked(pointer: str, value: Any) -> str:
    """The attributes that tie a mark of a plot to its figure in the report."""
    return f'data-of="{escape(pointer)}" data-value="{escape(json.dumps(value))}"'


def interval_plot(rows: Sequence[tuple[str, Sequence[Dot]]], title: str) -> str:
    """Shares from 0 to 100 %: a row of dots with whiskers for each label."""
    return "".join(_interval_plot(rows, title))


def _interval_plot(rows: Sequence[tuple[str, Sequence[Dot]]], title: str) -> Iterator[str]:
    height = ROW * len(rows) + 28
    across = _scale(0.0, 1.0)
    yield f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img"><title>{escape(title)}</title>'
    for step in range(0, 101, 25):
        x = across(step / 100)
        yield f'<line class="grid" x1="{x:.1f}" y1="4" x2="{x:.1f}" y2="{height - 24}"/>'
        yield f'<text class="tick" x="{x:.1f}" y="{height - 6}" text-anchor="middle">{step} %</text>'
    for row, (label, dots) in enumerate(rows):
        middle = ROW * (row + 0.5) + 4
        shown = label if len(label) <= 25 else f"{label[:24]}…"
        yield f'<text class="label" x="{LEFT - 14}" y="{middle + 4:.1f}" text-anchor="end">{escape(shown)}</text>'
        for place, dot in enumerate(dots):
            y = middle + 15 * (place - (len(dots) - 1) / 2)
            if dot.value is None or dot.interval is None:
                continue
            low, high = (across(end) for end in dot.interval)
            yield f'<g class="{dot.kind}" {marked(dot.pointer, dot.value)}><title>{escape(dot.told)}</title>'
            yield f'<line class="whisker" x1="{low:.1f}" y1="{y:.1f}" x2="{high:.1f}" y2="{y:.1f}"/>'
            yield f'<circle cx="{across(dot.value):.1f}" cy="{y:.1f}" r="5"/></g>'
    yield "</svg>"


def _scale(low: float, high: float) -> Callable[[float], float]:
    return lambda value: LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)


class Bars(NamedTuple):
    """A histogram: counts of bins of `width` tokens (of `bins`, with the empty ones at the end), class and pointer."""

    counts: Sequence[int]
    width: int
    bins: int
    kind: str
    pointer: str


def histogram(bars: Bars, title: str) -> str:
    """Replies by length; the tallest bar has the full height."""
    return "".join(_histogram(bars, title))


def _histogram(bars: Bars, title: str) -> Iterator[str]:
    counts, width, bins, kind, pointer = bars
    left, base, across, tall = 10.0, 112.0, WIDTH / 2 - 20, 96.0
    step, highest = across / bins, max([*counts, 1])
    yield f'<svg class="plot half" viewBox="0 0 {WIDTH // 2} 136" role="img"><title>{escape(title)}</title>'
    yield f'<line class="axis" x1="{left}" y1="{base}" x2="{left + across}" y2="{base}"/>'
    for place, count in enumerate(counts):
        high = tall * count / highest
        told = f"{place * width}–{(place + 1) * width - 1} tokens: {count:,} replies"
        x, wide = left + place * step, max(1.0, step - 1.5)
        yield f'<rect class="{kind}" x="{x:.1f}" y="{base - high:.1f}" width="{wide:.1f}" height="{high:.1f}" '
        yield f"{marked(f'{pointer}/{place}', count)}><title>{escape(told)}</title></rect>"
    for share in (0, 0.5, 1):
        place = round(share * bins)
        anchor = {0: "start", 0.5: "middle", 1: "end"}[share]
        x = left + place * step
        yield f'<text class="tick" x="{x:.1f}" y="{base + 17:.0f}" text-anchor="{anchor}">{place * width:,}</text>'
    yield "</svg>"


def budget_plot(points: Sequence[tuple[int, Dot]], title: str) -> str:
    """Accuracy by thinking budget, the budgets evenly apart, with whiskers."""
    return "".join(_budget_plot(points, title))


def _budget_plot(points: Sequence[tuple[int, Dot]], title: str) -> Iterator[str]:
    left, right, top, base = 56.0, WIDTH - 30.0, 12.0, 196.0
    step = (right - left) / max(1, len(points))
    yield f'<svg class="plot" viewBox="0 0 {WIDTH} 236" role="img"><title>{escape(title)}</title>'
    for share in range(0, 101, 25):
        y = base - (base - top) * share / 100
        yield f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>'
        yield f'<text class="tick" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{share} %</text>'
    where = []
    for place, (budget, dot) in enumerate(points):
        x = left + step * (place + 0.5)
        yield f'<text class="tick" x="{x:.1f}" y="{base + 18}" text-anchor="middle">{budget:,}</text>'
        if dot.value is not None and dot.interval is not None:
            low, high, y = (base - (base - top) * end for end in (*dot.interval, dot.value))
            where.append((x, y))
            yield f'<g class="t" {marked(dot.pointer, dot.value)}><title>{escape(dot.told)}</title>'
            yield f'<line class="whisker" x1="{x:.1f}" y1="{low:.1f}" x2="{x:.1f}" y2="{high:.1f}"/>'
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"/></g>'
    yield f'<polyline class="t" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in where)}"/>'
    yield f'<text class="tick" x="{(left + right) / 2:.0f}" y="{base + 36}" text-anchor="middle">'
    yield "thinking budget, tokens</text></svg>"


class Line(NamedTuple):
    """A probability over steps: its label, its class (t or n, and a dash), and its dots by step."""

    label: str
    kind: str
    points: Sequence[tuple[int, Dot]]


def step_plot(lines: Sequence[Line], title: str) -> str:
    """Shares from 0 to 100 % over the steps of a training, a line each, named at its side."""
    return "".join(_step_plot(lines, title))


def _step_plot(lines: Sequence[Line], title: str) -> Iterator[str]:
    left, right, top, base = 56.0, WIDTH - 190.0, 12.0, 196.0
    last = max((step for line in lines for step, _ in line.points), default=0) or 1
    yield f'<svg class="plot" viewBox="0 0 {WIDTH} 236" role="img"><title>{escape(title)}</title>'
    for step in range(0, 101, 25):
        y = base - (base - top) * step / 100
        yield f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>'
        yield f'<text class="tick" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{step} %</text>'
    for share in (0.0, 0.5, 1.0):
        x = left + (right - left) * share
        yield f'<text class="tick" x="{x:.1f}" y="{base + 18}" text-anchor="middle">{round(share * last):,}</text>'
    for place, (label, kind, points) in enumerate(lines):
        where = [
            (left + (right - left) * step / last, base - (base - top) * dot.value)
            for step, dot in points
            if dot.value is not None
        ]
        yield f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in where)}"/>'
        letter = kind.partition(" ")[0]
        for (x, y), (step, dot) in zip(where, points, strict=True):
            told = f"step {step:,}, {label}: {100 * (dot.value or 0):.1f} %"
            yield f'<g class="{letter}" {marked(dot.pointer, dot.value)}><title>{escape(told)}</title>'
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/></g>'
        y = top + 20 * place + 6
        yield f'<polyline class="{kind}" points="{right + 12:.1f},{y:.1f} {right + 34:.1f},{y:.1f}"/>'
        yield f'<text class="tick" x="{right + 40:.1f}" y="{y + 4:.1f}">{escape(label)}</text>'
    yield f'<text class="tick" x="{(left + right) / 2:.0f}" y="{base + 36}" text-anchor="middle">step</text></svg>'
