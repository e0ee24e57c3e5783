# SPDX-License-Identifier: Apache-2.0
"""An inspection for people: text for a terminal, and a page of HTML that needs nothing but itself."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from thinkfusion.inspecting import KINDS, Inspection, Piece, Sample, View
from thinkfusion.modes import Mode
from thinkfusion.row_report import RowReport, printable
from thinkfusion.tree_drawing import KIND_OF, LETTERS, Run, Sketch, apart, columns, strips, svg

COLOURS = {"prompt": "2", "prefix": "1;35", "reasoning": "36", "answer": "32", "untrained": "2;3"}
"""The SGR codes of each kind of text; a control token has its colours inverted."""
INVERSE, UNDERLINED, DIM, BOLD, RED, YELLOW = "7", "4", "2", "1", "31", "33"
LONGEST_TEXT, KEPT_START, KEPT_END = 700, 450, 150
GUTTER = 2 + max(map(len, KINDS))
NARROWEST, WIDEST = 20, 110
TREE_GUTTER, TREE_FIGURES = 17, 17
CONTEXT = ("prompt", "untrained")
NEW_LINE, OPENED, CLOSED = "↵", "⟦", "⟧"
PAGE_EXAMPLES = 100
LEFT_OUT = "a good row, but the mixture leaves it out (weight, ratio or cap)."

Cell = tuple[str, str]
"""A character, and the SGR codes that it is shown with."""


def terminal_text(inspection: Inspection, *, colours: bool = False, width: int = 100) -> str:
    """The inspection as text for a terminal. Without colours control tokens stand in ⟦…⟧.

    Nothing from the data can colour, move or delete anything: what would is spelled out.
    """
    return "\n".join(_Terminal(inspection, colours=colours, width=width).lines()) + "\n"


class _Terminal:
    def __init__(self, inspection: Inspection, *, colours: bool, width: int) -> None:
        self.inspection, self.colours = inspection, colours
        self.width = max(NARROWEST, min(width, WIDEST) - GUTTER - 3)
        self.whole_width = max(NARROWEST + TREE_GUTTER + TREE_FIGURES, min(width, WIDEST))
        self.split_lookalikes = _splitter(inspection.lookalikes)

    def lines(self) -> Iterator[str]:
        inspection, report = self.inspection, self.inspection.report
        yield from (self._styled(f"{_one_line(name)}: {kind}", BOLD) for name, kind in report.formats.items())
        yield f"shown as {inspection.markup}"
        if inspection.report.account is not None:
            yield from ("", *str(report.account).split("\n"))
        yield from ("", *str(report).split("\n"))
        for entry in inspection.examples:
            yield ""
            yield from self._entry(entry)
        if inspection.advice or inspection.problems:
            yield ""
        if inspection.advice:
            yield self._styled(inspection.advice, YELLOW)
        yield from (self._styled(f"Training would stop: {_one_line(text)}", RED) for text in inspection.problems)
        if any(sample.views for sample in inspection.samples):
            yield ""
            yield from self._tree_legend() if inspection.with_trees else [self._legend()]
        for sample in inspection.samples:
            yield from self._sample(sample)

    def _styled(self, text: str, *codes: str) -> str:
        return f"\033[{';'.join(codes)}m{text}\033[0m" if self.colours and any(codes) else text

    def _entry(self, entry: dict[str, Any]) -> Iterator[str]:
        """A skipped or altered row."""
        colour = RED if entry["kind"] == "skipped" else YELLOW
        yield self._styled(f"{_place(entry['source'], entry['line'])}: {entry['kind']}, {entry['reason']}", colour)
        if entry["detail"]:
            yield f"  {_one_line(''.join(_shortened(entry['detail'])))}"
        if entry["excerpt"]:
            yield self._styled(f"  {_one_line(entry['excerpt'])}", DIM)

    def _legend(self) -> str:
        token = self._styled(" control token ", INVERSE) if self.colours else f"{OPENED}control token{CLOSED}"
        kinds = [self._styled(kind, COLOURS[kind]) for kind in KINDS]
        return "  ".join([*kinds, token, *([self._styled("text like one", UNDERLINED)] if self.colours else [])])

    def _sample(self, sample: Sample) -> Iterator[str]:
        place = _place(sample.source, sample.line)
        if sample.skipped is not None:
            yield ""
            yield from self._entry(sample.skipped)
        elif not sample.views:
            yield from ("", self._styled(f"{place}: {LEFT_OUT}", YELLOW))
        else:
            yield from ("", self._styled(place, BOLD))
            yield from (self._styled(f"  {_one_line(note)}", YELLOW) for note in _notes(sample))
        for drawn in sample.trees:
            yield from self._tree(drawn)
        for number, view in enumerate([] if self.inspection.with_trees else sample.views):
            yield from ([""] if number else [])
            yield f"  {_heading(view)}"
            for kind, pieces in _blocks(view.pieces):
                yield from self._block(kind, pieces)

    def _block(self, kind: str, pieces: Sequence[Piece]) -> Iterator[str]:
        """Pieces of one kind, with the name of the kind in front of the first line."""
        label = kind
        for line in _wrapped([cell for piece in pieces for cell in self._cells(piece)], self.width):
            runs = _runs(line)
            gutter = self._styled(f"{label:>{GUTTER}}", COLOURS[kind]) + self._styled(" │ ", DIM)
            yield (gutter + "".join(self._styled(text, style) for text, style in runs)).rstrip()
            label = ""

    def _cells(self, piece: Piece) -> Iterator[Cell]:
        colour = COLOURS[piece.kind]
        text = printable(piece.text)
        if piece.control:
            # A tab or a new line in a token would be shown as one of the text.
            text = text.replace("\n", NEW_LINE).replace("\t", "→")
            shown = text if self.colours else f"{OPENED}{text}{CLOSED}"
            yield from ((letter, f"{colour};{INVERSE}") for letter in shown)
            return
        if not self.colours:
            # In the data, the signs that mark a token here would feign one.
            text = text.replace(OPENED, "\\u27e6").replace(CLOSED, "\\u27e7")
        start, left_out, end = _shortened(text)
        yield from self._text_cells(start, colour)
        yield from ((letter, YELLOW) for letter in left_out)
        yield from self._text_cells(end, colour)

    def _text_cells(self, text: str, colour: str) -> Iterator[Cell]:
        for number, part in enumerate(self.split_lookalikes(text)):
            style = f"{colour};{UNDERLINED}" if number % 2 else colour
            for letter in part.expandtabs(4):
                if letter == "\n":
                    yield NEW_LINE, DIM
                yield letter, style

    # A tree: to scale, then the trunk from top to bottom with its branches, then its tokens.

    def _tree_legend(self) -> Iterator[str]:
        token = self._styled(" … ", INVERSE) if self.colours else f"{OPENED}…{CLOSED}"
        letters = [self._styled(f"{letter} {role}", COLOURS[_kind_of(role)]) for role, letter in LETTERS.items()]
        yield "  ".join(letters)
        yield f"capitals are in the loss; {token} is a control token of a prompt"

    def _tree(self, drawn: Sketch) -> Iterator[str]:
        if drawn.copies > 1:
            yield self._styled(f"  trained {drawn.copies} times, each in a tree of its own", YELLOW)
        yield from ("", *self._strips(drawn), "")
        yield f"{'':{self.whole_width - TREE_FIGURES}}{'tokens':>8}{'trained':>9}"
        yield from self._node_heading("  ", drawn, 0)
        yield from self._trunk(drawn)
        yield from ("", *self._account(drawn))

    def _strips(self, drawn: Sketch) -> Iterator[str]:
        kinds = {letter: COLOURS[_kind_of(role)] for role, letter in LETTERS.items()}
        names = ["trunk", *map(drawn.turns_of, range(1, len(drawn.turns)))] if len(drawn.turns) > 1 else ["tokens"]
        gutter = max(map(len, names)) + 5
        for number, (name, (start, letters)) in enumerate(
            zip(names, strips(drawn, self.whole_width - gutter), strict=True)
        ):
            fork = "└" if number else ""
            coloured = "".join(
                self._styled(text, kind) for text, kind in _runs([(each, kinds[each]) for each in letters])
            )
            yield f"  {name:{gutter - 4}}{fork:>{start + 1}}{coloured}"

    def _trunk(self, drawn: Sketch) -> Iterator[str]:
        items = [item for run, nodes in drawn.branches() for item in ([run] if run else []) + nodes]
        for number, item in enumerate(items):
            last = number == len(items) - 1
            if isinstance(item, Run):
                yield self._run_line("╵" if last else "│", item)
                continue
            yield from self._node_heading(f"  {'╰' if last else '├'}─╮ ", drawn, item)
            *runs, end = drawn.runs[item]
            line = " " if last else "│"
            yield from (self._run_line(f"{line} │", run) for run in runs)
            yield self._run_line(f"{line} ╵", end)

    def _node_heading(self, before: str, drawn: Sketch, node: int) -> Iterator[str]:
        room = self.whole_width - TREE_FIGURES - len(before)
        name, sees = drawn.heading(node), f": sees {drawn.tree.forks[node]:,} of the trunk" if node else ""
        name += sees if len(name + sees) <= room else ""
        trained = drawn.trained_in(node)
        figures = f"{drawn.tree.lengths[node]:>8,}" + (f"{trained:>9,}" if trained else "")
        yield before + self._styled(f"{name:{room}}{figures}", BOLD)

    def _run_line(self, graph: str, run: Run) -> str:
        kind = _kind_of(run.role)
        colour, room = COLOURS[kind], self.whole_width - TREE_GUTTER - TREE_FIGURES
        units = [unit for text, control in run.texts for unit in self._units(kind, text, control)]
        # What a model writes is told by its beginning and its end, what it is given by its beginning.
        cells = _fitted(units, room, both_ends=kind not in CONTEXT)
        text = "".join(self._styled(letters, style) for letters, style in _runs(cells))
        padding = " " * (room - sum(columns(letter) for letter, _ in cells))
        trained = self._styled(f"{run.trained:>9,}", colour) if run.trained else ""
        label = f"  {graph} {run.role}"
        label = f"  {graph} {self._styled(run.role, colour)}{'':{TREE_GUTTER - len(label)}}"
        return f"{label}{text}{padding}{run.tokens:>8,}{trained}"

    def _units(self, kind: str, text: str, control: bool) -> Iterator[list[Cell]]:
        """What may be left out only as a whole: a letter, or a control token."""
        if control:
            yield [*self._cells(Piece("…" if kind in CONTEXT else text, kind, control))]
            return
        yield from ([cell] for cell in self._cells(Piece(text, kind)) if cell[0] != "\n")

    def _account(self, drawn: Sketch) -> Iterator[str]:
        trained = ", ".join(f"{count:,} {mode.value.replace('_', '-')}" for mode, count in drawn.trained().items())
        yield f"  the tree has {len(drawn.tree):,} tokens; trained: {trained}"
        yield f"  {apart(drawn)}"
        if len(drawn.sequences) > 1:
            yield f"  the longest of them has {max(drawn.sequences):,}"


def _kind_of(role: str) -> str:
    return KIND_OF.get(role, role)


def _fitted(units: Sequence[Sequence[Cell]], width: int, *, both_ends: bool) -> list[Cell]:
    """The units if they fit, else their beginning, and perhaps their end, with a sign for what is left out."""
    widths = [sum(columns(letter) for letter, _ in unit) for unit in units]
    if sum(widths) <= width:
        return [cell for unit in units for cell in unit]
    end, room = len(units), max(width // 3, min(widths[-1], width // 2)) if both_ends else 0
    while room and widths[end - 1] <= room:
        end -= 1
        room -= widths[end]
    start, room = 0, width - 1 - sum(widths[end:])
    while widths[start] <= room:
        room -= widths[start]
        start += 1
    return [cell for unit in [*units[:start], [("…", YELLOW)], *units[end:]] for cell in unit]


def _splitter(lookalikes: Iterable[str]) -> Any:
    """Splits a text so that every second part is one of the strings."""
    longest_first = sorted(lookalikes, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})").split


def _shortened(text: str) -> tuple[str, str, str]:
    """The beginning of a text, what stands for its middle, and its end."""
    if len(text) <= LONGEST_TEXT:
        return text, "", ""
    left_out = len(text) - KEPT_START - KEPT_END
    return text[:KEPT_START], f" [… {left_out:,} characters left out …] ", text[-KEPT_END:]


def _one_line(text: str) -> str:
    return printable(text.replace("\n", "\\n").replace("\t", " "))


def _place(source: str, line: int | None) -> str:
    return _one_line(f"{source}, row {line}")


def _heading(view: View) -> str:
    return f"{view.mode.value.replace('_', '-')} · {view.tokens:,} tokens, {view.trained:,} trained"


def _notes(sample: Sample) -> list[str]:
    return [f"{note.kind}: {note.reason}" + (f" ({note.detail})" if note.detail else "") for note in sample.notes]


def _blocks(pieces: Sequence[Piece]) -> Iterator[tuple[str, list[Piece]]]:
    """Neighbouring pieces of one kind, together."""
    block: list[Piece] = []
    for piece in pieces:
        if block and piece.kind != block[0].kind:
            yield block[0].kind, block
            block = []
        block.append(piece)
    if block:
        yield block[0].kind, block


def _wrapped(cells: Iterable[Cell], width: int) -> Iterator[list[Cell]]:
    """Lines of at most `width` columns, broken at spaces where there are any."""
    line: list[Cell] = []
    used = 0
    for cell in cells:
        if cell[0] == "\n":
            yield line
            line, used = [], 0
            continue
        used += columns(cell[0])
        if used > width and cell[0] != NEW_LINE:
            spaces = [index for index, (letter, _) in enumerate(line) if letter == " " and index > len(line) // 2]
            cut = spaces[-1] + 1 if spaces else len(line)
            yield line[:cut]
            line = line[cut:]
            used = sum(columns(letter) for letter, _ in line) + columns(cell[0])
        line.append(cell)
    if line:
        yield line


def _runs(line: Sequence[Cell]) -> list[Cell]:
    """Neighbouring letters of one style, together."""
    runs: list[Cell] = []
    for letter, style in line:
        if runs and runs[-1][1] == style:
            runs[-1] = (runs[-1][0] + letter, style)
        else:
            runs.append((letter, style))
    return runs


# --- the page ---------------------------------------------------------------------------------------------------


def html_page(inspection: Inspection) -> str:
    """The inspection as one page without scripts and without anything from elsewhere; all data is escaped."""
    template = (files("thinkfusion") / "templates" / "inspect.html").read_text(encoding="utf-8")
    report = inspection.report
    sources = [_text(_one_line(name)) + f" <small>{_text(kind)}</small>" for name, kind in report.formats.items()]
    warnings = [("warning", f"Training would stop: {problem}") for problem in inspection.problems]
    warnings += [("advice", inspection.advice)] if inspection.advice else []
    split = _splitter(inspection.lookalikes)
    return Template(template).substitute(
        title=_text(", ".join(map(_one_line, report.formats)) or "nothing"),
        sources="".join(f"<li>{source}</li>" for source in sources),
        markup=_text(inspection.markup),
        cards="".join(_cards(report)),
        warnings="".join(f'<p class="{kind}">{_text(_one_line(text))}</p>' for kind, text in warnings),
        account=_account_table(report),
        reasons=_reasons(report),
        examples="".join(map(_example, inspection.examples[:PAGE_EXAMPLES])),
        legend="".join(f'<li><i class="{kind}"></i><b>{kind}</b> {meaning}</li>' for kind, meaning in KINDS.items()),
        samples="".join(_page_sample(sample, split) for sample in inspection.samples) or "<p>None.</p>",
    )


def _text(text: str) -> str:
    return escape(printable(text))


def _cards(report: RowReport) -> Iterator[str]:
    skipped, altered = sum(report.skipped.values()), sum(report.altered.values())
    share = f"{report.kept / report.read:.1%} of {report.read:,} rows" if report.read else "no rows"
    yield _card("rows kept", report.kept, share)
    yield _card("rows skipped", skipped, ", ".join(report.skipped) or "none", alarming=bool(skipped))
    yield _card("alterations", altered, ", ".join(report.altered) or "none")
    total = sum(report.tokens.values())
    for mode in Mode:
        tokens, sequences = report.tokens[mode.value], report.sequences[mode.value]
        name = mode.value.replace("_", "-")
        share = f"{tokens / total:.1%} of the trained, " if total else ""
        yield _card(f"{name} tokens", tokens, f"{share}{sequences:,} sequences", alarming=not tokens)


def _card(name: str, figure: int, detail: str, *, alarming: bool = False) -> str:
    kind = ' class="alarming"' if alarming else ""
    return f"<li{kind}><span>{_text(name)}</span><strong>{figure:,}</strong><small>{_text(detail)}</small></li>"


def _account_table(report: RowReport) -> str:
    if report.account is None or not report.account.cells:
        return "<p>Nothing is trained.</p>"
    account = report.account.to_dict()
    columns = ("rows_before", "rows_after", "tokens_before", "tokens_after")
    head = ("source", "mode", "language", *(name.replace("_", " ") for name in columns))
    rows = [[*(cell[name] for name in ("source", "mode", "language")), cell] for cell in account["by"]]
    rows.append(["total", "", "", account["total"]])
    lines = [
        "".join(
            f"<td>{_text(_one_line(name.replace('_', '-') if place == 1 else name))}</td>"
            for place, name in enumerate(names)
        )
        + "".join(f'<td class="number">{counts[name]:,}</td>' for name in columns)
        for *names, counts in rows
    ]
    heads = "".join(f"<th{' class=number' if place > 2 else ''}>{name}</th>" for place, name in enumerate(head))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _reasons(report: RowReport) -> str:
    counted = [
        (kind, reason, count)
        for kind, counts in (("skipped", report.skipped), ("altered", report.altered), ("noted", report.noted))
        for reason, count in counts.most_common()
    ]
    if not counted:
        return "<p>Every row is kept as it is.</p>"
    rows = "".join(
        f'<tr><td><span class="kind {kind}">{kind}</span></td><td>{_text(reason)}</td>'
        f'<td class="number">{count:,}</td><td class="number">{count / report.read:.2%}</td></tr>'
        for kind, reason, count in counted
    )
    head = '<tr><th></th><th>reason</th><th class="number">rows</th><th class="number">of all</th></tr>'
    return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"


def _example(entry: dict[str, Any]) -> str:
    excerpt = f'<pre dir="auto">{_text(entry["excerpt"])}</pre>' if entry["excerpt"] else ""
    return (
        f'<article class="entry"><h3><span class="kind {escape(entry["kind"])}">{escape(entry["kind"])}</span> '
        f"{_text(_place(entry['source'], entry['line']))} <small>{_text(entry['reason'])}</small></h3>"
        f'<p dir="auto">{_text(entry["detail"])}</p>{excerpt}</article>'
    )


def _page_sample(sample: Sample, split: Any) -> str:
    if sample.skipped is not None:
        return _example(sample.skipped)
    place = _text(_place(sample.source, sample.line))
    notes = "".join(f'<p class="note">{_text(_one_line(note))}</p>' for note in _notes(sample))
    if not sample.views:
        return f'<article class="row"><h3>{place}</h3><p class="warning">{LEFT_OUT}</p></article>'
    views = "".join(
        f"<section><h4>{_heading(view)}</h4>"
        + "".join(
            f'<div class="block {kind}"><span class="label">{kind}</span>'
            f'<div class="text">{"".join(_page_lines(pieces, split))}</div></div>'
            for kind, pieces in _blocks(view.pieces)
        )
        + "</section>"
        for view in sample.views
    )
    trees = "".join(f'<div class="wide">{svg(tree, style="")}</div>' for tree in sample.trees)
    return f'<article class="row"><h3>{place}</h3>{notes}{trees}{views}</article>'


def _page_lines(pieces: Sequence[Piece], split: Any) -> Iterator[str]:
    """Each line an element of its own, so that each is written in the direction of its own text, tokens aside."""
    line = ""
    for piece in pieces:
        if piece.control:
            line += f'<bdi class="token" dir="ltr">{_text(piece.text)}</bdi>'
            continue
        *ended, rest = piece.text.split("\n")
        for part in ended:
            yield f'<div class="ended" dir="auto">{line}{_page_text(part, split)}</div>'
            line = ""
        line += _page_text(rest, split)
    if line:
        yield f'<div dir="auto">{line}</div>'


def _page_text(text: str, split: Any) -> str:
    parts = [_text(part) for part in split(text)]
    parts[1::2] = [f'<span class="alike" title="text, not a control token">{part}</span>' for part in parts[1::2]]
    return "".join(parts)


def tree_picture(inspection: Inspection) -> str:
    """An SVG of the first tree; raises ValueError if no row that is shown has one."""
    trees = [tree for sample in inspection.samples for tree in sample.trees]
    if not trees:
        raise ValueError("no row that is shown is trained, so there is no tree to draw (--row, --samples).")
    return svg(trees[0])
