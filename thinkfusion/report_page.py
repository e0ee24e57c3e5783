# SPDX-License-Identifier: Apache-2.0
"""A mode report as one page: the verdict first, then tables, plots and failing transcripts; nothing from elsewhere.

Every figure is read from the report by a JSON pointer (RFC 6901) that stands beside it in the page (`data-of`), so
that page and `mode_report.json` cannot differ.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from thinkfusion.evaluation import ModeReport
from thinkfusion.modes import Mode
from thinkfusion.obedience import WORDS
from thinkfusion.report_plots import Bars, Dot, Line, budget_plot, histogram, interval_plot, step_plot
from thinkfusion.route_drawing import STYLE, routes_fragment
from thinkfusion.row_report import printable
from thinkfusion.transcripts import KINDS, PER_KIND, Failure, pieces

if TYPE_CHECKING:
    from thinkfusion.route_counting import CountedRoutes

PAGE_NAME = "report.html"
NAMES = {mode.value: mode.value.replace("_", "-") for mode in Mode}
LETTERS = {Mode.THINKING.value: "t", Mode.NON_THINKING.value: "n"}
LONGEST_PIECE = 4000
ROWS = (
    ("format_error", "percent", "format error", "replies outside their mode's format, of those that ended"),
    ("truncated", "percent", "truncated", "replies that hit the token limit; not judged"),
    ("leakage", "percent", "leakage", "answers that reason aloud, or non-thinking ones twice as long as usual"),
    ("reflective_words", "mean", "reflective words", "per answer: wait, hmm, 잠깐…"),
    ("over_soft_cap", "percent", "over the soft cap", "answers twice as long as those of thinking mode"),
    ("answer_token_ratio", "ratio", "answer length ratio", "mean answer over that of the other mode"),
    ("accuracy", "percent", "accuracy", "right answers, of all prompts with a solution"),
    ("reasoning_tokens", "mean", "reasoning tokens", "mean of a reply"),
    ("answer_tokens", "mean", "answer tokens", "mean of a reply"),
)
FORMS: dict[str, Callable[[Any], str]] = {
    "percent": lambda value: f"{100 * value:.1f} %",
    "bound": lambda value: f"{100 * value:.1f}",
    "points": lambda value: f"{100 * value:+.1f}",
    "count": lambda value: f"{value:,}",
    "mean": lambda value: f"{value:.1f}",
    "ratio": lambda value: f"{value:.2f}",
    "probability": lambda value: f"{value:.3f}",
    "p": lambda value: f"{value:.2g}",
}
PAIRED = ("both", "this_only", "other_only", "neither")
ENDS = {"percent": "bound", "points": "points"}
"""How the ends of an interval are written, where not as its middle."""


class Figures:
    """Writes figures of a report, each with its pointer."""

    def __init__(self, report: dict[str, Any]) -> None:
        self.report = report

    def at(self, pointer: str) -> Any:
        """The value that a JSON pointer names; None if it is not there."""
        found: Any = self.report
        for part in pointer.strip("/").split("/"):
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list):
                found = found[int(name)] if name.isdecimal() and int(name) < len(found) else None
            else:
                found = found.get(name) if isinstance(found, dict) else None
        return found

    def one(self, pointer: str, form: str) -> str:
        value = self.at(pointer)
        if value is None:
            return '<span class="none">–</span>'
        return f'<data value="{escape(json.dumps(value))}" data-of="{escape(pointer)}">{FORMS[form](value)}</data>'

    def with_interval(self, pointer: str, form: str) -> str:
        if self.at(pointer) is None:
            return self.one(pointer, form)
        ends = (self.one(f"{pointer}_interval/{end}", ENDS.get(form, form)) for end in (0, 1))
        between = " to " if form == "points" else "–"
        return f"{self.one(pointer, form)} <small>{between.join(ends)}</small>"


def key(name: str) -> str:
    """A name as a part of a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")


def report_page(
    report: ModeReport, *, title: str = "", limit: int = PER_KIND, routes: CountedRoutes | None = None
) -> str:
    """The page, without scripts; all text of prompts and replies is escaped, and its control characters are visible.

    `limit` is how many failing transcripts of a kind are shown; `routes` adds the page of `thinkfusion routes`.
    """
    # What a reader of the file gets, so that numbers are written alike.
    figures = Figures(json.loads(json.dumps(report.to_dict())))
    verdict = report.verdict
    sections = [
        _modes(figures),
        _tasks(figures),
        _lengths(figures),
        _obedience(figures),
        _flip(figures),
        _budgets(figures),
        _probe(figures),
        _comparison(figures),
        _harness(figures),
        _transcripts(report.failures(limit), limit),
        _routes(routes),
    ]
    template = (files("thinkfusion") / "templates" / "report.html").read_text(encoding="utf-8")
    settings = "".join(f"<li>{escape(name)}: {escape(_shown(value))}</li>" for name, value in report.settings.items())
    return Template(template).substitute(
        title=escape(_shown(title or "mode report")),
        samples=figures.one("/samples", "count"),
        level=verdict.level,
        headline=escape(verdict.headline),
        findings="".join(f"<li>{escape(line)}</li>" for line in verdict.findings),
        rule=escape(verdict.to_dict()["rule"]),
        style=STYLE if routes is not None else "",
        sections="".join(sections),
        settings=settings,
    )


def save_page(report: ModeReport, directory: str | Path, **options: Any) -> Path:
    """Write `report.html` into the folder of a report; takes the options of `report_page`."""
    path = Path(directory) / PAGE_NAME
    text = report_page(report, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _shown(value: Any) -> str:
    """A text as a page may show it: with control characters, and what turns text round, spelled out."""
    return printable(str(value)).encode("utf-8", "replace").decode("utf-8")


def _section(heading: str, about: str, body: str) -> str:
    return f'<section><h2>{heading}</h2><p class="about">{about}</p>{body}</section>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Cells are HTML."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _heads() -> list[str]:
    return [f'<i class="dot {LETTERS[mode]}"></i>{name}' for mode, name in NAMES.items()]


def _modes(figures: Figures) -> str:
    rows = [
        [
            f"<b>{label}</b><span>{about}</span>",
            *(figures.with_interval(f"/modes/{mode}/{name}", form) for mode in NAMES),
        ]
        for name, form, label, about in ROWS
    ]
    rows += [
        [f"<b>{label}</b><span>{about}</span>", *(figures.one(f"/modes/{mode}/speed/{name}", "mean") for mode in NAMES)]
        for name, label, about in (
            ("replies_per_second", "replies per second", _measured_on(figures)),
            ("tokens_per_second", "tokens per second", "written, prompts not counted"),
        )
        if figures.at(f"/modes/{Mode.THINKING}/speed") is not None
    ]
    waited = "/endpoint/seconds_to_first_token"
    if figures.at(waited) is not None:
        label = "<b>seconds to the first token</b><span>of a stream, with the others at once</span>"
        rows.append([label, *(figures.one(f"{waited}/{mode}", "ratio") for mode in NAMES)])
    classes = figures.at(f"/modes/{Mode.THINKING}/classes")
    counted = [
        [f"<code>{name}</code>", *(figures.one(f"/modes/{mode}/classes/{name}", "count") for mode in NAMES)]
        for name in classes
    ]
    about = "Small figures are 95 % intervals (Wilson's for shares): where the true figure lies, as far as these tell."
    return _section("The modes", about, _table(["", *_heads()], rows, "main")) + _section(
        "What the replies were", "Every reply is in one class.", _table(["class", *_heads()], counted)
    )


def _measured_on(figures: Figures) -> str:
    if figures.at("/endpoint") is None:
        return "in batches, on the machine that measured"
    return f"of the served model, at most {figures.one('/endpoint/concurrency', 'count')} requests at once"


def _dot(figures: Figures, pointer: str, kind: str, label: str) -> Dot:
    value, interval = figures.at(pointer), figures.at(f"{pointer}_interval")
    told = label
    if value is not None and interval is not None:
        told = f"{label}: {100 * value:.1f} % ({100 * interval[0]:.1f}–{100 * interval[1]:.1f})"
    return Dot(pointer, value, interval, kind, told)


def _tasks(figures: Figures) -> str:
    names = list(figures.at(f"/modes/{Mode.THINKING}/tasks"))
    rows, drawn = [], []
    for name in names:
        where = [f"/modes/{mode}/tasks/{key(name)}" for mode in NAMES]
        rows.append(
            [
                escape(_shown(name)),
                escape(_shown(figures.at(f"{where[0]}/language"))),
                figures.one(f"{where[0]}/samples", "count"),
                *(figures.with_interval(f"{each}/accuracy", "percent") for each in where),
                *(figures.with_interval(f"{each}/format_error", "percent") for each in where),
            ]
        )
        dots = [
            _dot(figures, f"{each}/accuracy", LETTERS[mode], f"{_shown(name)}, {NAMES[mode]}")
            for each, mode in zip(where, NAMES, strict=True)
        ]
        if any(dot.value is not None for dot in dots):
            drawn.append((_shown(name), dots))
    plot = f'<div class="wide">{interval_plot(drawn, "Right answers by task")}</div>' if drawn else ""
    head = ["task", "language", "prompts", *(f"{name}: right" for name in _heads())]
    table = _table([*head, *(f"{name}: format error" for name in _heads())], rows)
    return _section("By task", "Right answers in each mode, with 95 % intervals.", plot + table)


def _lengths(figures: Figures) -> str:
    tokens = figures.at("/tokens")
    if tokens is None or not any(tokens.get(mode) for mode in NAMES):
        return ""
    bins = max(len(tokens.get(mode) or ()) for mode in NAMES)
    drawn = "".join(
        f'<figure><figcaption><i class="dot {LETTERS[mode]}"></i>{name}</figcaption>'
        + histogram(
            Bars(tokens.get(mode) or [], tokens["width"], bins, LETTERS[mode], f"/tokens/{mode}"), f"Lengths, {name}"
        )
        + "</figure>"
        for mode, name in NAMES.items()
    )
    about = "Replies by their tokens, reasoning and answer together; each mode to its own height."
    return _section("How long the replies are", about, f'<div class="beside">{drawn}</div>')


def _shade(share: float | None) -> str:
    """The class of a heatmap's cell: h0 (none) to h10 (all)."""
    return "hnone" if share is None else f"h{int(10 * share + 1e-9)}"


def _heat_cell(figures: Figures, pointer: str, mode: str, done: str) -> str:
    share = figures.at(f"{pointer}/share")
    counted = f"{figures.one(f'{pointer}/{done}', 'count')}/{figures.one(f'{pointer}/total', 'count')}"
    mark = f'<i class="dot {LETTERS[mode]}"></i>'
    return (
        f'<td class="{_shade(share)}">{mark}{figures.one(f"{pointer}/share", "percent")}<small>{counted}</small></td>'
    )


def _heat(head: str, body: str) -> str:
    return f'<div class="wide"><table class="heat"><thead>{head}</thead><tbody>{body}</tbody></table></div>'


LEGEND = (
    '<p class="about">A dot is the mode that is expected: <i class="dot t"></i>thinking, <i class="dot n"></i>'
    "non-thinking. Below it: replies that kept to it, of those that ended.</p>"
)


def _obedience(figures: Figures) -> str:
    cells = figures.at("/obedience/cells")
    if cells is None:
        return ""
    columns = list(dict.fromkeys((cell["system"], cell["turn"]) for cell in cells))
    rows: dict[tuple[Any, Any], dict[tuple[str, int], int]] = {}
    for place, cell in enumerate(cells):
        rows.setdefault((cell["hard"], cell["soft"]), {})[cell["system"], cell["turn"]] = place
    systems = list(dict.fromkeys(system for system, _ in columns))
    words = {"none": "no system text", "neutral": "neutral system text", "contradicting": "contradicting system text"}
    wide = len(columns) // len(systems)
    top = "".join(f'<th colspan="{wide}">{words[system]}</th>' for system in systems)
    turns = {1: "first", 3: "third"}
    head = "".join(f"<th>{turns[turn]} turn</th>" for _, turn in columns)
    body = ""
    for (hard, soft), places in rows.items():
        switch = "not given" if hard is None else str(hard).lower()
        body += f"<tr><th>{switch}</th><th>{WORDS[Mode(soft)] if soft else 'none'}</th>"
        for column in columns:
            if column not in places:  # means nothing of a served model without soft switches
                body += "<td></td>"
                continue
            place = places[column]
            body += _heat_cell(figures, f"/obedience/cells/{place}", cells[place]["expected"], "obeyed")
        body += "</tr>"
    top = f'<tr><th colspan="2"></th>{top}</tr><tr><th>enable_thinking</th><th>soft switch</th>{head}</tr>'
    table = _heat(top, body)
    about = (
        f"{figures.one('/obedience/obeyed', 'count')} of {figures.one('/obedience/total', 'count')} replies obeyed: "
        f"{figures.with_interval('/obedience/share', 'percent')}. The hard switch wins, then the latest soft switch, "
        "then the default. A contradicting system text asks for the other mode, in words and with a soft switch, and "
        "so wins where nothing else is given; in a third turn the second message has the opposite soft switch."
    )
    return _section("Who is obeyed", about, table + LEGEND)


def _flip(figures: Figures) -> str:
    starts = figures.at("/flip/starts")
    if starts is None:
        return ""
    turns = figures.at("/flip/turns")
    head = "".join(f"<th>turn {turn + 1}</th>" for turn in range(turns))
    body = ""
    for start, row in starts.items():
        cells = (
            _heat_cell(figures, f"/flip/starts/{start}/{at}", each["mode"], "right") for at, each in enumerate(row)
        )
        body += f"<tr><th>begins {NAMES[start]}</th>{''.join(cells)}</tr>"
    table = _heat(f"<tr><th></th>{head}</tr>", body)
    about = (
        f"Conversations of {figures.one('/flip/turns', 'count')} turns that switch at every turn: "
        f"{figures.one('/flip/right', 'count')} of {figures.one('/flip/total', 'count')} turns kept their mode "
        f"({figures.with_interval('/flip/share', 'percent')}), {figures.one('/flip/unbroken', 'count')} of "
        f"{figures.one('/flip/judged', 'count')} conversations did throughout "
        f"({figures.with_interval('/flip/whole', 'percent')})."
    )
    return _section("Switching back and forth", about, table + LEGEND)


def _budgets(figures: Figures) -> str:
    points = figures.at("/budgets")
    if not points:
        return ""
    names = (("within", "percent"), ("accuracy", "percent"), ("format_error", "percent"), ("reasoning_tokens", "mean"))
    rows = [
        [
            figures.one(f"/budgets/{place}/budget", "count"),
            *(figures.with_interval(f"/budgets/{place}/{name}", form) for name, form in names),
        ]
        for place in range(len(points))
    ]
    dots = [
        (each["budget"], _dot(figures, f"/budgets/{place}/accuracy", "t", f"budget {each['budget']}"))
        for place, each in enumerate(points)
    ]
    plot = ""
    if any(dot.value is not None for _, dot in dots):
        plot = f'<div class="wide">{budget_plot(dots, "Right answers by thinking budget")}</div>'
    head = ["budget, tokens", "within it", "right answers", "format error", "reasoning tokens"]
    about = "Thinking mode with its reasoning closed after so many tokens, and right answers at each budget."
    return _section("With a thinking budget", about, plot + _table(head, rows))


PROBE = (
    ("closes", "the closing token", "after a whole reference trace", "closes after the trace", "t"),
    ("closes_inside", "the closing token, early", "inside the reference traces, mean", "closes inside it", "t dashed"),
    ("closes_again", "the closing token, again", "after a whole thinking answer", "closes again", "t dashdot"),
    ("trace_begins", "the trace's first token", "after the prefix of thinking mode", "trace begins", "t dotted"),
    ("trace_tagged", "any other control token", "in the place of that token", "trace begins tagged", "t sparse"),
    ("answer_begins", "the answer's first token", "after the prefix of non-thinking mode", "answer begins", "n"),
    ("answer_blank", "a line break or the end", "in the place of that token", "answer begins blank", "n dotted"),
    ("answer_tagged", "a control token", "in that place", "answer begins tagged", "n sparse"),
    ("answer_closes", "the closing token", "after a whole non-thinking answer", "closes after the answer", "n dashed"),
)
"""The probe's figures: what each is a probability of, and where; its line over the steps, and how that is drawn."""


def _probe(figures: Figures) -> str:
    if figures.at("/probe") is None:
        return ""
    rows = [
        [f"<b>{label}</b><span>{about}</span>", figures.with_interval(f"/probe/{name}", "probability")]
        for name, label, about, _, _ in PROBE
    ]
    about = (
        f"Probabilities on {figures.one('/probe/samples', 'count')} reference rows, by one forward pass and without "
        "generation: the early warning. Near zero for the closing token is a trace that never ends; well above zero "
        "inside traces is one that ends early, and after answers a reply that closes where its turn should end."
    )
    return _section("Switch probe", about, _table(["probability of", "mean"], rows, "main") + _probe_history(figures))


def _probe_history(figures: Figures) -> str:
    points = figures.at("/probe/history")
    if not points:
        return ""
    lines = [
        Line(
            label,
            kind,
            [
                (point["step"], Dot(f"/probe/history/{place}/{name}", point[name], None, kind, label))
                for place, point in enumerate(points)
                if point.get(name) is not None
            ],
        )
        for name, _, _, label, kind in PROBE
    ]
    drawn = step_plot([line for line in lines if line.points], "The switch probe over the steps of training")
    return f'<p class="about">While it was trained, by step:</p><div class="wide">{drawn}</div>'


def _comparison(figures: Figures) -> str:
    found = figures.at("/comparison")
    if found is None:
        return ""
    rows = []
    for mode, tables in found["modes"].items():
        for name in tables:
            where = f"/comparison/modes/{mode}/{name}"
            counts = (
                figures.one(f"{where}/{part}", "count") for part in ("both", "this_only", "other_only", "neither")
            )
            rows.append(
                [
                    f"{NAMES[mode]}, {'right answers' if name == 'accuracy' else 'format kept'}",
                    *counts,
                    figures.with_interval(f"{where}/difference", "points"),
                    figures.one(f"{where}/p", "p"),
                ]
            )
    warning = "".join(
        f'<p class="remark">The settings differ: {escape(_shown(line))}</p>' for line in found["settings"]
    )
    about = (
        f"Beside {escape(_shown(found['against']))} on the same prompts: how many of them both, one or neither got. "
        "The difference is in points, this one minus the other; p is McNemar's exact test: how often a difference this "
        "large comes by chance where there is none."
    )
    head = ["", "both", "only this", "only the other", "neither", "difference", "p"]
    return _section("Compared", about, warning + _table(head, rows))


def _harness(figures: Figures) -> str:
    found = figures.at("/harness")
    if not found:
        return ""
    rows = [
        [
            escape(_shown(task)),
            escape(_shown(metric)),
            *(figures.with_interval(f"/harness/{key(task)}/{key(metric)}/{mode}", "probability") for mode in NAMES),
        ]
        for task, metrics in found.items()
        for metric in metrics
    ]
    about = "Tasks of lm-evaluation-harness, run once in each mode."
    return _section("lm-evaluation-harness", about, _table(["task", "metric", *_heads()], rows))


def _routes(routes: CountedRoutes | None) -> str:
    if routes is None:
        return ""
    return f"<h2>Which experts the modes use</h2>{routes_fragment(routes.report, routes.remarks)}"


def _transcripts(failures: Sequence[Failure], limit: int) -> str:
    groups: dict[str, list[Failure]] = {kind: [] for kind in KINDS}
    for failure in failures:
        groups[failure.kind].append(failure)
    body = "".join(
        f"<details{'' if kind in ('truncated', 'wrong_answer') else ' open'}><summary>{escape(KINDS[kind])} "
        f"<small>{len(group)} shown</small></summary>{''.join(map(_transcript, group))}</details>"
        for kind, group in groups.items()
        if group
    )
    about = f"At most {limit} of a kind; all replies are in replies.jsonl. The broken place is marked."
    return _section("Failing transcripts", about, body or "<p>No reply failed, and none was wrong.</p>")


def _transcript(failure: Failure) -> str:
    return "".join(_transcript_parts(failure))


def _transcript_parts(failure: Failure) -> Iterator[str]:
    mode = failure.reply.mode.value
    yield f'<article><h3><i class="dot {LETTERS[mode]}"></i>{escape(_shown(failure.where))}</h3>'
    for message in failure.messages:
        content = message.get("content")
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        yield f'<p class="turn"><b>{escape(_shown(message.get("role")))}</b>{escape(_cut(_shown(text)))}</p>'
    yield '<p class="turn reply"><b>reply</b>'
    for piece in pieces(failure):
        text = escape(_cut(_shown(piece.text)))
        yield f"<mark>{text}</mark>" if piece.kind == "broken" else f'<span class="{piece.kind}">{text}</span>'
    yield "</p></article>"


def _cut(text: str) -> str:
    """Long texts lose their middle: what opens and what breaks a reply stand at its ends."""
    half = LONGEST_PIECE // 2
    left_out = len(text) - LONGEST_PIECE
    return text if left_out <= 0 else f"{text[:half]} […{left_out:,} characters…] {text[-half:]}"
