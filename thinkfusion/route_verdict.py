# SPDX-License-Identifier: Apache-2.0
"""Routes in words: is a router collapsing, are experts dead, do the modes use other experts? A verdict and a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import TYPE_CHECKING

from thinkfusion.row_report import printable
from thinkfusion.sequences import MODES

if TYPE_CHECKING:
    from thinkfusion.route_counting import CountedRoutes
    from thinkfusion.routing import LayerRoutes, RoutingReport

NAMES = tuple(mode.value.replace("_", "-") for mode in MODES)
UNEVEN, COLLAPSING, BUSY = 0.5, 0.25, 4.0
"""A layer is uneven if it uses its experts like this share of them or fewer; a busy expert has so many even shares."""
WORDS = ((0.9, "nearly the same experts"), (0.7, "mostly the same experts"), (0.4, "partly different experts"))
ALL_LAYERS, WORST_LAYERS, NAMED_EXPERTS, WIDTH = 16, 8, 6, 100


@dataclass(frozen=True)
class Verdict:
    """What the routes show. level: "good", "warning" (an uneven layer or a dead expert) or "bad" (a collapsing one)."""

    level: str
    headline: str
    findings: tuple[str, ...]


def verdict(report: RoutingReport) -> Verdict:
    """Is a router collapsing, are experts dead, do the modes use other experts? One line, and the details."""
    places = [(layer, mode) for layer in report.layers for mode in report.seen]
    worst, where = min(places, key=lambda place: evenness(*place))
    least = evenness(worst, where)
    bound = COLLAPSING if least <= COLLAPSING else UNEVEN
    unused = any(_unused(report, layer) for layer in report.layers)
    level = "bad" if least <= COLLAPSING else "warning" if least <= UNEVEN or unused else "good"
    faulty = sum(any(evenness(layer, mode) <= bound for mode in report.seen) for layer in report.layers)
    parts = ["no router is collapsing", _dead_words(report)]
    if faulty:
        verbs = ("collapses onto", "collapse onto") if level == "bad" else ("leans on", "lean on")
        among = f"{faulty} of {counted_words(len(report.layers), 'layer')}"
        parts[0] = f"{among} {verbs[faulty > 1]} a few experts"
    findings = [
        f"A layer uses its experts as if {_mean(layer.used(mode) for layer, mode in places):.1f} of "
        f"{expert_numbers(report)} were chosen alike; layer {worst.index} in {NAMES[where]} as if "
        f"{worst.used(where):.1f}.",
        _busiest_words(places),
        *_dead_places(report),
    ]
    if len(report.seen) == len(MODES):
        overlap = _mean(layer.overlap() for layer in report.layers)
        apart = min(report.layers, key=lambda layer: layer.overlap())
        words = next((words for least, words in WORDS if overlap >= least), "largely different experts")
        parts.append(f"the modes use {words} ({overlap:.0%} of their choices are shared)")
        findings.append(
            f"The modes share {overlap:.0%} of their choices, least in layer {apart.index} ({apart.overlap():.0%})."
        )
    else:
        parts.append(f"only {' and '.join(NAMES[mode] for mode in report.seen)} was seen")
    headline = "; ".join(parts) + "."
    if any(report.few(mode) for mode in report.seen):
        return Verdict("warning", f"Too few reply tokens for a verdict. So far {headline}", tuple(findings))
    return Verdict(level, headline[0].upper() + headline[1:], tuple(findings))


def evenness(layer: LayerRoutes, mode: int) -> float:
    """The share of a layer's experts that, used alike, would be as even; 1 for a layer without tokens."""
    return layer.used(mode) / len(layer.counts[mode]) if sum(layer.counts[mode]) else 1.0


def counted_words(count: int, name: str) -> str:
    """1 layer, 48 layers."""
    return f"{count:,} {name}{'s' * (count != 1)}"


def _mean(values: Iterable[float]) -> float:
    given = list(values)
    return sum(given) / len(given)


def expert_numbers(report: RoutingReport) -> str:
    """How many experts a layer has."""
    sizes = sorted({len(layer.counts[0]) for layer in report.layers})
    return f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]}-{sizes[-1]}"


def _unused(report: RoutingReport, layer: LayerRoutes) -> list[int]:
    """Experts without a token in any mode that was seen."""
    return [
        expert
        for expert, counts in enumerate(zip(*layer.counts, strict=True))
        if not any(counts[m] for m in report.seen)
    ]


def _dead_words(report: RoutingReport) -> str:
    total = sum(len(layer.counts[0]) for layer in report.layers)
    unused = sum(len(_unused(report, layer)) for layer in report.layers)
    by_mode = {mode: sum(layer.dead(mode) for layer in report.layers) for mode in report.seen}
    if unused:
        said = "is dead: no reply token chose it" if unused == 1 else "are dead: no reply token chose them"
        return f"{unused:,} of {total:,} experts {said}"
    if not any(by_mode.values()):
        return "every expert is used" + (" in both modes" if len(by_mode) == len(MODES) else "")
    without = " and ".join(f"{count:,} not in {NAMES[mode]}" for mode, count in by_mode.items() if count)
    return f"every expert is used, but {without}"


def _dead_places(report: RoutingReport) -> Iterator[str]:
    places = [f"layer {layer.index}: {listed(unused)}" for layer in report.layers if (unused := _unused(report, layer))]
    if places:
        more = len(places) - WORST_LAYERS
        yield f"Dead experts: {'; '.join(places[:WORST_LAYERS])}{f'; and {more} more layers' if more > 0 else ''}."


def listed(experts: Sequence[int]) -> str:
    """The first of them by number."""
    more = len(experts) - NAMED_EXPERTS
    return ", ".join(map(str, experts[:NAMED_EXPERTS])) + (f" and {more} more" if more > 0 else "")


def _busiest_words(places: Sequence[tuple[LayerRoutes, int]]) -> str:
    layer, mode = max(places, key=lambda place: max(place[0].multiples(place[1])))
    multiples = layer.multiples(mode)
    return (
        f"The busiest expert is {multiples.index(max(multiples))} of layer {layer.index} in {NAMES[mode]}: "
        f"{layer.busiest(mode):.0%} of the tokens choose it, {max(multiples):.1f} times its even share."
    )


def routes_table(counted: CountedRoutes) -> str:
    """The routes in plain text: what was counted, the verdict, and a line for each layer, or for the least even ones.

    busiest: the share of the tokens that chose the busiest expert, and how many times its even share that is.
    """
    report, found = counted.report, verdict(counted.report)
    layers = report.layers
    if len(layers) > ALL_LAYERS:
        least_even = sorted(layers, key=lambda layer: min(evenness(layer, mode) for mode in report.seen))
        layers = tuple(sorted(least_even[:WORST_LAYERS], key=lambda layer: layer.index))
    lines = [*account_lines(counted), "", fill(found.headline, WIDTH)]
    lines += [*(fill(f"- {finding}", WIDTH, subsequent_indent="  ") for finding in found.findings), ""]
    lines.append(f"{'':5}" + "".join(f"  {NAMES[mode]:<28}" for mode in report.seen).rstrip())
    columns = f"  {'entropy':>7}  {'busiest':>13}  {'dead':>4}"
    both = len(report.seen) == len(MODES)
    lines.append(f"{'layer':5}" + columns * len(report.seen) + ("  overlap" if both else ""))
    for layer in layers:
        cells = [
            f"  {layer.entropy(mode):7.3f}  {_busiest(layer, mode):>13}  {layer.dead(mode):>4}" for mode in report.seen
        ]
        lines.append(f"{layer.index:>5}" + "".join(cells) + (f"  {layer.overlap():7.2f}" if both else ""))
    if len(layers) < len(report.layers):
        lines.append(f"The {len(layers)} least even of {len(report.layers)} layers are shown.")
    return "\n".join([*lines, *(fill(f"- {remark}", WIDTH, subsequent_indent="  ") for remark in counted.remarks)])


def _busiest(layer: LayerRoutes, mode: int) -> str:
    return f"{layer.busiest(mode):.1%} ({max(layer.multiples(mode)):.1f}×)"


def account_lines(counted: CountedRoutes) -> list[str]:
    """What was counted: the model, what became of the rows, and the tokens."""
    report, rows = counted.report, counted.rows
    top_k = sorted({layer.top_k for layer in report.layers})
    layers = counted_words(len(report.layers), "layer")
    kind = f"{counted.family}, {layers} of {expert_numbers(report)} experts, top-{top_k[-1]}"
    skipped = sum(rows.skipped.values())
    reasons = f" ({', '.join(f'{count:,} {reason}' for reason, count in rows.skipped.most_common())})"
    altered = ", ".join(f"{count:,} {reason}" for reason, count in rows.altered.most_common())
    tokens = ", ".join(f"{report.tokens(mode):,} {name}" for mode, name in enumerate(NAMES))
    lines = [
        f"{counted.checkpoint}: {kind}" if counted.checkpoint else kind,
        f"{', '.join(counted.data)}: {rows.read:,} rows read = {rows.kept:,} kept + {skipped:,} skipped"
        + (reasons if skipped else "")
        + (f"; altered: {altered}" if altered else ""),
        f"{counted.conversations:,} of {counted_words(counted.of, 'conversation')} counted; reply tokens: {tokens}",
    ]
    return [printable(line.replace("\n", "\\n")) for line in lines]
