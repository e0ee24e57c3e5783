# SPDX-License-Identifier: Apache-2.0
"""Routes as a heatmap of layers × experts: a PNG, and a page with the verdict and a table of the layers.

The unit of all cells is the even share: 1× is what an expert gets where all are chosen alike. Each mode has a panel in
its own hue, and the third shows the difference in both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from thinkfusion.route_verdict import (
    BUSY,
    COLLAPSING,
    NAMES,
    UNEVEN,
    account_lines,
    counted_words,
    evenness,
    expert_numbers,
    listed,
    verdict,
)
from thinkfusion.row_report import printable
from thinkfusion.sequences import MODES

if TYPE_CHECKING:
    from thinkfusion.route_counting import CountedRoutes
    from thinkfusion.routing import LayerRoutes, RoutingReport

DEPENDENCY = (
    "matplotlib is not installed, so no PNG was drawn. Install it (pip install matplotlib, or the extra plots)."
)
DEAD, NEUTRAL = "dead", "d0"
EDGES = (0.25, 0.5, 0.75, 1.25, 2.0, 4.0, 8.0)
SHARES = ("under ¼", "¼–½", "½–¾", "¾–1¼", "1¼–2", "2–4", "4–8", "over 8")
STEPS = (0.25, 0.5, 1.0, 2.0)
DIFFERENCES = ("over 2", "1–2", "½–1", "¼–½", "under ¼", "¼–½", "½–1", "1–2", "over 2")
# From few to many, on a light and on a dark ground.
RAMPS = {
    "t": (("#e6f2f8", "#8ac4e0", "#1c7dab", "#052f45"), ("#16303d", "#1f6b8d", "#58b9e2", "#def4ff")),
    "n": (("#fcf0e0", "#f2bb74", "#c46a12", "#552600"), ("#38270f", "#8a5314", "#e9a24b", "#ffeed6")),
}
MARKS = {DEAD: ("#d1006b", "#ff4d9d"), NEUTRAL: ("#eceef2", "#262d38")}
SIDE_BY_SIDE, WIDTH, NARROW, LEFT, BOTTOM = 40, 1040, 336, 34, 30
"""Up to so many experts the panels stand side by side. Widths in pixels of a whole panel; room for its labels."""
LEAST_ROW, TALLEST_ROW, GAPS_FROM, LABEL_STEP, ABOVE = 5, 26, 9, 13, 5
TOLD_CELLS = 1500


def _mixed(first: str, second: str, share: float) -> str:
    pairs = [(int(first[at : at + 2], 16), int(second[at : at + 2], 16)) for at in (1, 3, 5)]
    return "#" + "".join(f"{round(low + (high - low) * share):02x}" for low, high in pairs)


def _along(ramp: Sequence[str], place: float) -> str:
    """The colour at `place`, from 0 to 1, of a ramp."""
    position = place * (len(ramp) - 1)
    start = min(int(position), len(ramp) - 2)
    return _mixed(ramp[start], ramp[start + 1], position - start)


def palette(dark: bool = False) -> dict[str, str]:
    """The colour of each class of cells: `t1`-`t8` and `n1`-`n8` of the modes, `d-4`-`d4`, and that of dead experts."""
    theme = int(dark)
    colours = {name: marks[theme] for name, marks in MARKS.items()}
    for hue, ramps in RAMPS.items():
        count = len(SHARES)
        colours |= {f"{hue}{level + 1}": _along(ramps[theme], level / (count - 1)) for level in range(count)}
    for step in range(1, len(STEPS) + 1):
        share = 0.25 + 0.6 * step / len(STEPS)  # not to the ends of the ramps, which meet in near black or white
        colours[f"d{step}"] = _along((MARKS[NEUTRAL][theme], *RAMPS["t"][theme][1:]), share)
        colours[f"d-{step}"] = _along((MARKS[NEUTRAL][theme], *RAMPS["n"][theme][1:]), share)
    return colours


def share_class(mode: int, multiple: float) -> str:
    """The class of a cell of a mode's panel."""
    return f"{'tn'[mode]}{1 + sum(multiple >= edge for edge in EDGES)}" if multiple else DEAD


def difference_class(difference: float) -> str:
    """The class of a cell of the third panel, by thinking minus non-thinking in even shares."""
    steps = sum(abs(difference) >= step for step in STEPS)
    return f"d{'-' if difference < 0 and steps else ''}{steps}"


@dataclass(frozen=True)
class Panel:
    """A heatmap: for each layer its number, and the class and the value of each expert's cell."""

    title: str
    rows: tuple[tuple[int, tuple[tuple[str, float], ...]], ...]
    signed: bool = False

    @property
    def experts(self) -> int:
        return max(len(cells) for _, cells in self.rows)


def panels(report: RoutingReport) -> list[Panel]:
    """One panel for each mode that was seen, and their difference if both were."""
    made = [
        Panel(
            f"{NAMES[mode].capitalize()}: {report.tokens(mode):,} tokens",
            tuple(
                (layer.index, tuple((share_class(mode, value), value) for value in layer.multiples(mode)))
                for layer in report.layers
            ),
        )
        for mode in report.seen
    ]
    if len(report.seen) < len(MODES):
        return made
    rows = []
    for layer in report.layers:
        apart = [first - second for first, second in zip(layer.multiples(0), layer.multiples(1), strict=True)]
        rows.append((layer.index, tuple((difference_class(value), value) for value in apart)))
    return [*made, Panel("Difference: thinking minus non-thinking", tuple(rows), signed=True)]


@dataclass(frozen=True)
class Geometry:
    """Where the cells of a panel lie, in pixels from its upper left corner."""

    layers: int
    experts: int

    @property
    def side_by_side(self) -> bool:
        return self.experts <= SIDE_BY_SIDE

    @property
    def width(self) -> int:
        return NARROW if self.side_by_side else WIDTH

    @property
    def cell(self) -> tuple[float, float]:
        """Width and height; the height in whole pixels."""
        width = (self.width - LEFT) / self.experts
        return width, max(LEAST_ROW, min(TALLEST_ROW, round(width)))

    @property
    def height(self) -> int:
        return round(self.layers * self.cell[1]) + BOTTOM


def labelled(numbers: Sequence[int], size: float, room: float) -> Iterator[tuple[int, int]]:
    """Which rows or columns are named, and what: round numbers, with so much room for each; `size` of one is given."""
    steps = (unit * 10**power for power in range(5) for unit in (1, 2, 5))
    step = next(step for step in steps if step * size >= room)
    yield from ((place, number) for place, number in enumerate(numbers) if number % step == 0)


def panel_svg(panel: Panel) -> str:
    """A panel as SVG; the page around it has the rules of `STYLE`."""
    return "".join(_panel_elements(panel))


def _panel_elements(panel: Panel) -> Iterator[str]:
    layout = Geometry(len(panel.rows), panel.experts)
    width, height = layout.cell
    yield f'<svg class="panel" viewBox="0 -{ABOVE} {layout.width} {layout.height + ABOVE}" role="img">'
    yield f"<title>{escape(panel.title)}</title>"
    # In units of cells: neighbours of one class are one stroke of the path, unless cells have room for gaps.
    gap = (1 / width, 1 / height) if min(width, height) >= GAPS_FROM else (0.0, 0.0)
    yield f'<g transform="translate({LEFT} 0) scale({width:.4f} {height})">'
    paths: dict[str, list[str]] = {}
    for row, (_, cells) in enumerate(panel.rows):
        start = 0
        while start < len(cells):
            kind, stop = cells[start][0], start + 1
            while not gap[0] and stop < len(cells) and cells[stop][0] == kind:
                stop += 1
            wide, tall = _short(stop - start - gap[0]), _short(1 - gap[1])
            paths.setdefault(kind, []).append(f"M{start} {row}h{wide}v{tall}h-{wide}z")
            start = stop
    yield from (f'<path class="{kind}" d="{"".join(parts)}"/>' for kind, parts in sorted(paths.items()))
    yield from _told(panel)
    yield "</g>"
    for row, number in labelled([number for number, _ in panel.rows], height, LABEL_STEP):
        y = (row + 0.5) * height + 4
        yield f'<text x="{LEFT - 6}" y="{y:.1f}" text-anchor="end">{number}</text>'
    base = len(panel.rows) * height
    for column, _ in labelled(range(panel.experts), width, 2.2 * LABEL_STEP):
        yield f'<text x="{LEFT + (column + 0.5) * width:.1f}" y="{base + 14}" text-anchor="middle">{column}</text>'
    yield f'<text class="axis" x="{LEFT}" y="{base + 27}">expert →</text><text class="axis" x="0" y="{base + 14}">'
    yield "layer</text></svg>"


def _short(number: float) -> str:
    return f"{number:.3f}".rstrip("0").rstrip(".")


def _told(panel: Panel) -> Iterator[str]:
    """What the mouse is told: of each cell, or of each layer where there are many."""
    if len(panel.rows) * panel.experts <= TOLD_CELLS:
        for row, (layer, cells) in enumerate(panel.rows):
            for expert, (_, value) in enumerate(cells):
                told = f"layer {layer}, expert {expert}: {_value(panel, value)}"
                yield f'<rect class="told" x="{expert}" y="{row}" width="1" height="1"><title>{told}</title></rect>'
        return
    for row, (layer, cells) in enumerate(panel.rows):
        values = [value for _, value in cells]
        high, low = max(values), min(values)
        told = (
            f"layer {layer}: most {_value(panel, high)} (expert {values.index(high)}), least {_value(panel, low)} "
            f"(expert {values.index(low)})"
        )
        yield f'<rect class="told" x="0" y="{row}" width="{len(cells)}" height="1"><title>{told}</title></rect>'


def _value(panel: Panel, value: float) -> str:
    return f"{value:+.2f}×" if panel.signed else f"{value:.2f}×" if value else "dead"


def _legends(shown: Sequence[Panel]) -> list[tuple[str, list[tuple[str, str]]]]:
    """What the colours mean: a heading, and (class, label) from few to many."""
    kinds = {kind for panel in shown for _, cells in panel.rows for kind, _ in cells}
    legends = [
        (f"{NAMES[mode]}, × even share", [(f"{hue}{level + 1}", label) for level, label in enumerate(SHARES)])
        for mode, hue in enumerate("tn")
        if any(kind[0] == hue for kind in kinds)
    ]
    if DEAD in kinds:
        legends = [(heading, [(DEAD, "dead"), *entries]) for heading, entries in legends]
    if any(panel.signed for panel in shown):
        steps = range(-len(STEPS), len(STEPS) + 1)
        entries = [(f"d{step}", label) for step, label in zip(steps, DIFFERENCES, strict=True)]
        legends.append(("difference: non-thinking has more ← → thinking has more", entries))
    return legends


# --- on a page --------------------------------------------------------------------------------------------------


def _variables(dark: bool) -> str:
    return "".join(f"--{name}:{colour};" for name, colour in palette(dark).items())


STYLE = f"""
.routes {{ {_variables(False)} --r-ink:#1b1f27; --r-soft:#626b7a; --r-line:#dfe3ea; --r-card:#fff; --r-good:#1a7036;
  --r-warn:#8a5a00; --r-bad:#b42318; --r-good-fill:#e4f6e8; --r-warn-fill:#fdf3dc; --r-bad-fill:#fdeceb; }}
@media (prefers-color-scheme: dark) {{ .routes {{ {_variables(True)} --r-ink:#e4e8ef; --r-soft:#98a2b3;
  --r-line:#2c333f; --r-card:#191e26; --r-good:#7bd694; --r-warn:#f2c265; --r-bad:#ff8f85; --r-good-fill:#14351f;
  --r-warn-fill:#38290b; --r-bad-fill:#3f1b19; }} }}
{"".join(f".routes .{name}{{fill:var(--{name});background:var(--{name})}}" for name in palette())}
.routes .verdict {{ font-size: 1.15rem; font-weight: 600; line-height: 1.4; margin: 0 0 .6rem; padding: .8rem 1rem;
  border-radius: .6rem; }}
.routes .good {{ color: var(--r-good); background: var(--r-good-fill); }}
.routes .warning {{ color: var(--r-warn); background: var(--r-warn-fill); }}
.routes .bad {{ color: var(--r-bad); background: var(--r-bad-fill); }}
.routes .findings {{ margin: .2rem 0 1.4rem; padding: 0 0 0 1.1rem; list-style: disc; color: var(--r-ink); }}
.routes .remark {{ color: var(--r-warn); margin: .3rem 0; }}
.routes .panels {{ display: grid; gap: 1.2rem; }}
.routes .panels.beside {{ grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); }}
.routes figure {{ margin: 0; overflow-x: auto; }}
.routes figcaption {{ font-weight: 600; font-size: .9rem; margin: 0 0 .4rem; color: var(--r-ink); }}
.routes .panel {{ display: block; width: 100%; height: auto; shape-rendering: crispEdges; }}
.routes .stacked .panel {{ min-width: 46rem; }}
.routes .panel text {{ font: 10.5px system-ui, sans-serif; fill: var(--r-soft); }}
.routes .panel .axis {{ font-size: 10px; }}
.routes .told {{ fill: transparent; }} .routes .told:hover {{ fill: var(--r-ink); fill-opacity: .18; }}
.routes .scales {{ display: grid; gap: .5rem; margin: 1.2rem 0 1.6rem; font-size: .8rem; color: var(--r-soft); }}
.routes .scale {{ display: flex; flex-wrap: wrap; gap: .15rem .8rem; align-items: center; }}
.routes .scale b {{ font-weight: 600; color: var(--r-ink); flex-basis: 100%; }}
.routes .scale i {{ display: inline-block; width: 1.1rem; height: .8rem; margin-inline-end: .3rem;
  border-radius: .15rem; vertical-align: -.05rem; border: 1px solid var(--r-line); }}
.routes table {{ border-collapse: separate; border-spacing: 0; width: 100%; font-size: .85rem;
  background: var(--r-card); border: 1px solid var(--r-line); border-radius: .6rem; min-width: 40rem; }}
.routes .wide {{ overflow-x: auto; }}
.routes th, .routes td {{ padding: .35rem .8rem; text-align: end; font-variant-numeric: tabular-nums;
  white-space: nowrap; border-bottom: 1px solid var(--r-line); }}
.routes th {{ color: var(--r-soft); font-weight: 500; font-size: .78rem; }}
.routes th.mode {{ text-align: center; font-weight: 600; color: var(--r-ink); }}
.routes tbody tr:last-child td {{ border-bottom: 0; }}
.routes td small {{ color: var(--r-soft); font-weight: 400; }}
.routes td.bad, .routes td.warning {{ background: none; font-weight: 600; }}
.routes .how {{ color: var(--r-soft); font-size: .85rem; }}
"""
"""The CSS of `routes_fragment`, for a light and for a dark page; nothing outside of the class `routes` is touched."""


def routes_fragment(report: RoutingReport, remarks: Sequence[str] = ()) -> str:
    """The verdict, the heatmap and a table of the layers, as HTML for a page that has the rules of `STYLE`."""
    found, shown = verdict(report), panels(report)
    beside = Geometry(len(report.layers), shown[0].experts).side_by_side
    figures = "".join(
        f"<figure><figcaption>{escape(panel.title)}</figcaption>{panel_svg(panel)}</figure>" for panel in shown
    )
    scales = "".join(
        f'<div class="scale"><b>{escape(heading)}</b>'
        + "".join(f'<span><i class="{kind}"></i>{escape(label)}</span>' for kind, label in entries)
        + "</div>"
        for heading, entries in _legends(shown)
    )
    return (
        f'<section class="routes"><p class="verdict {found.level}">{escape(found.headline)}</p>'
        f'<ul class="findings">{"".join(f"<li>{escape(text)}</li>" for text in found.findings)}</ul>'
        + "".join(f'<p class="remark">{escape(printable(text))}</p>' for text in remarks)
        + f'<div class="panels {"beside" if beside else "stacked"}">{figures}</div>'
        f'<div class="scales">{scales}</div><div class="wide">{_layer_table(report)}</div>{HOW}</section>'
    )


HOW = (
    '<p class="how">Counted are the tokens of replies. Entropy is 1 where all experts of a layer are chosen alike, 0 '
    "where all tokens choose the same one; busiest is the share of the tokens that chose the busiest expert, with the "
    "multiple of its even share; overlap is 1 where the modes choose the same experts as often, and 0 where they share "
    f"none. A layer is marked where it uses its experts as unevenly as if {UNEVEN:.0%} of them or fewer were chosen "
    f"alike (collapsing: {COLLAPSING:.0%}), an expert from {BUSY:.0f} times its even share.</p>"
)


def _layer_table(report: RoutingReport) -> str:
    both = len(report.seen) == len(MODES)
    modes = "".join(f'<th class="mode" colspan="3">{NAMES[mode]}</th>' for mode in report.seen)
    names = "<th>entropy</th><th>busiest expert</th><th>dead</th>" * len(report.seen)
    head = f"<tr><th></th>{modes}{'<th></th>' * both}</tr><tr><th>layer</th>{names}{'<th>overlap</th>' * both}</tr>"
    body = "".join(
        f"<tr><td>{layer.index}</td>{''.join(_mode_cells(layer, mode) for mode in report.seen)}"
        + (f"<td>{layer.overlap():.2f}</td>" if both else "")
        + "</tr>"
        for layer in report.layers
    )
    return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"


def _mode_cells(layer: LayerRoutes, mode: int) -> str:
    share, multiples = evenness(layer, mode), layer.multiples(mode)
    high, dead = max(multiples), [expert for expert, count in enumerate(layer.counts[mode]) if not count]
    kind = ' class="bad"' if share <= COLLAPSING else ' class="warning"' if share <= UNEVEN else ""
    busy = ' class="warning"' if high >= BUSY else ""
    which = f" <small>({listed(dead)})</small>" if dead and len(dead) < len(multiples) else ""
    return (
        f"<td{kind}>{layer.entropy(mode):.3f}</td>"
        f"<td{busy}>{layer.busiest(mode):.1%} <small>{high:.1f}×, expert {multiples.index(high)}</small></td>"
        f"<td{' class=bad' if dead else ''}>{len(dead)}{which}</td>"
    )


def routes_page(counted: CountedRoutes) -> str:
    """One page without scripts and without anything from elsewhere; all text is escaped."""
    template = (files("thinkfusion") / "templates" / "routes.html").read_text(encoding="utf-8")
    account = account_lines(counted)
    return Template(template).substitute(
        title=escape(printable(counted.checkpoint or counted.family)),
        family=escape(printable(counted.family)),
        style=STYLE,
        fragment=routes_fragment(counted.report, counted.remarks),
        account="".join(f"<li>{escape(line)}</li>" for line in account),
    )


# --- as a picture -----------------------------------------------------------------------------------------------

SCALE, MARGIN, HEAD, CAPTION, BETWEEN, SWATCH, LEGEND_LINE = 2, 24, 62, 22, 18, 16, 36
LONGEST_NAME = 36
INK, SOFT = "#1b1f27", "#626b7a"


class Picture:
    """The heatmap in pixels of a PNG: whole ones, so that every cell is as sharp as its neighbour."""

    def __init__(self, report: RoutingReport) -> None:
        self.panels = panels(report)
        self.layout = Geometry(len(report.layers), max(panel.experts for panel in self.panels))
        width, height = self.layout.cell
        self.cell = max(2, round(SCALE * width)), round(SCALE * height)
        self.legends = _legends(self.panels)
        across = len(self.panels) if self.layout.side_by_side else 1
        down = len(self.panels) // across
        self.panel_width = SCALE * LEFT + self.cell[0] * self.layout.experts
        self.panel_height = SCALE * (CAPTION + BOTTOM) + self.cell[1] * self.layout.layers
        self.legend_top = SCALE * (HEAD + BETWEEN * down) + self.panel_height * down
        # One mode alone is too narrow for its legend.
        wide = max(across * self.panel_width + SCALE * BETWEEN * (across - 1), SCALE * 760)
        self.width = wide + 2 * SCALE * MARGIN
        self.height = self.legend_top + SCALE * (LEGEND_LINE * len(self.legends) + MARGIN // 2)

    def corner(self, panel: int) -> tuple[int, int]:
        """The upper left corner of a panel's cells."""
        across, down = (panel, 0) if self.layout.side_by_side else (0, panel)
        return (
            SCALE * (MARGIN + LEFT) + across * (self.panel_width + SCALE * BETWEEN),
            SCALE * (HEAD + CAPTION) + down * (self.panel_height + SCALE * BETWEEN),
        )

    def centre(self, panel: int, layer: int, expert: int) -> tuple[int, int]:
        """The pixel in the middle of the cell of the `layer`-th layer."""
        x, y = self.corner(panel)
        return x + expert * self.cell[0] + self.cell[0] // 2, y + layer * self.cell[1] + self.cell[1] // 2


def save_png(counted: CountedRoutes, path: str | Path) -> None:
    """Draw the heatmap into a PNG; raises ValueError, which says what to install, without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(DEPENDENCY) from None
    picture, colours = Picture(counted.report), palette()
    figure = Figure(figsize=(picture.width / 100, picture.height / 100), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    draw = _Drawing(figure, picture)
    name = counted.checkpoint or counted.family
    name = name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"
    title = f"{name}: {_experts_words(counted.report)}"
    draw.text(SCALE * MARGIN, SCALE * 26, title, size=14, weight="bold")
    draw.text(SCALE * MARGIN, SCALE * 46, verdict(counted.report).headline, size=10.5, colour=SOFT)
    for number, panel in enumerate(picture.panels):
        draw.panel(number, panel, colours)
    for number, (heading, entries) in enumerate(picture.legends):
        draw.legend(picture.legend_top + SCALE * LEGEND_LINE * number, heading, entries, colours)
    figure.savefig(path, format="png", dpi=100, metadata={"Software": None})


def _experts_words(report: RoutingReport) -> str:
    layers = counted_words(len(report.layers), "layer")
    return f"which experts reply tokens choose ({layers} of {expert_numbers(report)} experts)"


class _Drawing:
    """Puts things at pixels, counted from the upper left corner."""

    def __init__(self, figure: Any, picture: Picture) -> None:
        self.figure, self.picture = figure, picture

    def text(self, x: float, y: float, text: str, *, size: float = 9, colour: str = INK, **style: Any) -> None:
        # Dollars are no formulas here, and what the font cannot draw is spelled out.
        shown = "".join(letter if ord(letter) < 0x250 or letter in "→←–×…" else ascii(letter)[1:-1] for letter in text)
        where = x / self.picture.width, 1 - y / self.picture.height
        points = size * SCALE * 72 / 100
        self.figure.text(*where, printable(shown), fontsize=points, color=colour, parse_math=False, **style)

    def box(self, x: float, y: float, width: float, height: float) -> Any:
        whole = self.picture.width, self.picture.height
        axes = self.figure.add_axes(
            (x / whole[0], 1 - (y + height) / whole[1], width / whole[0], height / whole[1]), frameon=False
        )
        axes.set_axis_off()
        return axes

    def panel(self, number: int, panel: Panel, colours: dict[str, str]) -> None:
        picture, (x, y) = self.picture, self.picture.corner(number)
        wide, tall = picture.cell
        columns, rows = picture.layout.experts, len(panel.rows)
        self.box(x, y, wide * columns, tall * rows).imshow(
            _pixels(panel, columns, picture.cell, colours), interpolation="nearest", aspect="auto"
        )
        self.text(x, y - SCALE * 8, panel.title, size=10.5, weight="bold")
        for row, layer in labelled([layer for layer, _ in panel.rows], tall / SCALE, LABEL_STEP):
            middle = y + (row + 0.5) * tall
            self.text(x - SCALE * 6, middle, str(layer), colour=SOFT, ha="right", va="center_baseline")
        base = y + rows * tall
        for column, _ in labelled(range(columns), wide / SCALE, 2.2 * LABEL_STEP):
            self.text(x + (column + 0.5) * wide, base + SCALE * 12, str(column), colour=SOFT, ha="center")
        self.text(x, base + SCALE * 25, "expert →", size=8.5, colour=SOFT)
        self.text(x - SCALE * LEFT, base + SCALE * 12, "layer", size=8.5, colour=SOFT)

    def legend(self, y: float, heading: str, entries: Sequence[tuple[str, str]], colours: dict[str, str]) -> None:
        from matplotlib.patches import Rectangle

        left = SCALE * MARGIN
        self.text(left, y + SCALE * 9, heading, colour=INK, size=9)
        axes = self.box(left, y + SCALE * 14, self.picture.width - 2 * left, SCALE * 11)
        axes.set_xlim(0, self.picture.width - 2 * left)
        axes.set_ylim(0, SCALE * 11)
        step = (SCALE * 760) / max(len(entries), 9)
        for number, (kind, label) in enumerate(entries):
            axes.add_patch(
                Rectangle((number * step, 0), SCALE * SWATCH, SCALE * 11, facecolor=colours[kind], clip_on=False)
            )
            self.text(left + number * step + SCALE * (SWATCH + 5), y + SCALE * 23, label, size=8.5, colour=SOFT)


def _pixels(panel: Panel, columns: int, cell: tuple[int, int], colours: dict[str, str]) -> Any:
    """(height, width, 3) bytes; white between cells that have the room, and where a layer has fewer experts."""
    import numpy as np

    wide, tall = cell
    gap = SCALE if min(cell) >= SCALE * GAPS_FROM else 0
    image = np.full((tall * len(panel.rows), wide * columns, 3), 255, dtype=np.uint8)
    for row, (_, cells) in enumerate(panel.rows):
        for column, (kind, _) in enumerate(cells):
            where = slice(row * tall, (row + 1) * tall - gap), slice(column * wide, (column + 1) * wide - gap)
            image[where] = [int(colours[kind][at : at + 2], 16) for at in (1, 3, 5)]
    return image
