# SPDX-License-Identifier: Apache-2.0
"""A fusion tree to be looked at: what each stretch of it is, how many tokens it saves, and a picture of it."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from thinkfusion.modes import Mode
from thinkfusion.rendering import IGNORED
from thinkfusion.row_report import printable
from thinkfusion.trees import FusionTree, TrainingSequence, fuse, trunk_is_non_thinking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HEADER = "header"
"""The role of what opens an assistant's turn, until it is shown with what stands beside it."""
LETTERS = {
    "system": "s",
    "user": "u",
    "history": "h",
    "untrained": "x",
    "prefix": ">",
    "reasoning": "R",
    "answer": "A",
}
"""The roles of tokens: capitals are in the loss. `history` are earlier answers without loss, `untrained` is other
context within an answer, such as the results of tools."""


class Labelled(NamedTuple):
    """A training sequence, the role of each of its tokens, and the turns that it trains, counted from 1."""

    sequence: TrainingSequence
    roles: Sequence[str]
    turns: tuple[int, ...]


class Run(NamedTuple):
    """Neighbouring tokens of one role in one node, from its token `start` on; a text is a control token, or is not."""

    role: str
    start: int
    tokens: int
    trained: int
    texts: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class Sketch:
    """A tree and what it is made of, the trunk first: the turns that each node trains, and its runs.

    sequences: the lengths of the separate sequences. copies: how many trees of the data set are this one, where a
    source has a weight.
    """

    tree: FusionTree
    turns: tuple[tuple[int, ...], ...]
    runs: tuple[tuple[Run, ...], ...]
    sequences: tuple[int, ...]
    copies: int = 1

    def trained(self) -> dict[Mode, int]:
        """Trained tokens by mode."""
        counts = dict.fromkeys(Mode, 0)
        for node, mode in enumerate(self.tree.modes):
            counts[mode] += self.trained_in(node)
        return counts

    def trained_in(self, node: int) -> int:
        """Trained tokens of a node."""
        return sum(run.trained for run in self.runs[node])

    @property
    def ratio(self) -> float:
        """How many times as many tokens the separate sequences have."""
        return sum(self.sequences) / len(self.tree)

    def heading(self, node: int) -> str:
        """What a node is, in a few words."""
        mode = self.tree.modes[node].value.replace("_", "-")
        if node or len(self.turns) == 1:
            return f"{self.turns_of(node)}, {mode}"
        return f"trunk, {mode}" if self.turns[0] else "trunk, no loss"

    def turns_of(self, node: int) -> str:
        """The turns of a node, in words."""
        first, *others = self.turns[node]
        return f"turns {first}-{others[-1]}" if others else f"turn {first}"

    def branches(self) -> list[tuple[Run | None, list[int]]]:
        """The runs of the trunk, each with the nodes that fork within it or at its end; first those before any run."""
        forks = sorted(range(1, len(self.turns)), key=lambda node: self.tree.forks[node])
        placed: list[tuple[Run | None, list[int]]] = [(None, [node for node in forks if not self.tree.forks[node]])]
        for run in self.runs[0]:
            stop = run.start + run.tokens
            placed.append((run, [node for node in forks if run.start < self.tree.forks[node] <= stop]))
        return placed

    def to_dict(self) -> dict[str, Any]:
        """The token account as plain JSON values."""
        nodes = zip(self.turns, self.tree.modes, self.tree.forks, self.tree.lengths, strict=True)
        return {
            "copies": self.copies,
            "tokens": len(self.tree),
            "sequences": len(self.sequences),
            "sequence_tokens": sum(self.sequences),
            "ratio": round(self.ratio, 3),
            "longest_sequence": max(self.sequences),
            "trained": {mode.value: count for mode, count in self.trained().items()},
            "nodes": [
                {
                    **{"turns": list(turns), "mode": mode.value if turns else None, "fork": fork, "tokens": length},
                    "trained": self.trained_in(number),
                }
                for number, (turns, mode, fork, length) in enumerate(nodes)
            ],
        }


def sketch(labelled: Sequence[Labelled], tokenizer: PreTrainedTokenizerBase, copies: int = 1) -> Sketch:
    """The tree of the sequences of one conversation, as training makes it.

    Raises ValueError if none has trained tokens, or for a tokenizer without our template.
    """
    sequences = [each.sequence for each in labelled]
    tree = fuse(sequences, non_thinking_trunk=trunk_is_non_thinking(tokenizer))
    of_sequence = {(each.sequence.mode, each.sequence.ids.tobytes()): each for each in labelled}
    trunk = tree.ids[: tree.lengths[0]]
    spans = list(zip(tree.starts, tree.lengths, tree.forks, tree.modes, strict=True))
    branches = [
        of_sequence[mode, np.concatenate([trunk[:fork], tree.ids[start : start + length]]).tobytes()]
        for start, length, fork, mode in spans[1:]
    ]
    main = _main(tree, labelled)
    roles = [_trunk_roles(tree, main, branches), *(each.roles[fork:] for each, fork in _forked(tree, branches))]
    spell = _Speller(tokenizer)
    runs = tuple(
        tuple(_runs(given, tree.ids[start : start + length], tree.labels[start : start + length], spell))
        for given, (start, length, _, _) in zip(roles, spans, strict=True)
    )
    turns = (() if main is None else main.turns, *(each.turns for each in branches))
    lengths = [len(each.ids) for each in sequences if each.first_trained < len(each.ids)]
    return Sketch(tree, turns, runs, tuple(lengths), copies)


def _main(tree: FusionTree, labelled: Sequence[Labelled]) -> Labelled | None:
    """The sequence that ends in the trunk, if the trunk has loss."""
    trained = np.flatnonzero(tree.labels[: tree.lengths[0]] != IGNORED)
    if not len(trained):
        return None
    ids = tree.ids[: trained[-1] + 1].tobytes()
    return next(each for each in labelled if each.sequence.mode is tree.modes[0] and each.sequence.ids.tobytes() == ids)


def _forked(tree: FusionTree, branches: Sequence[Labelled]) -> Iterator[tuple[Labelled, int]]:
    return zip(branches, tree.forks[1:], strict=True)


def _trunk_roles(tree: FusionTree, main: Labelled | None, branches: Sequence[Labelled]) -> list[str]:
    """What a token of the trunk is: in the sequence with loss on it, else in the first that forks behind it."""
    roles = [] if main is None else list(main.roles)
    for branch, fork in sorted(_forked(tree, branches), key=lambda forked: forked[1]):
        roles += branch.roles[len(roles) : fork]
    return roles


def _runs(roles: Sequence[str], ids: Any, labels: Any, spell: _Speller) -> Iterator[Run]:
    # The header of an answer belongs to the prompt before it; where a branch begins with its end, to the prefix.
    shown: list[str] = []
    for role in roles:
        shown.append(role if role != HEADER else shown[-1] if shown else "prefix")
    start = 0
    for role, run in groupby(shown):
        stop = start + sum(1 for _ in run)
        trained = int((labels[start:stop] != IGNORED).sum())
        yield Run(role, start, stop - start, trained, tuple(spell(ids[start:stop].tolist())))
        start = stop


class _Speller:
    """Ids as texts, control tokens apart."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.control = {id_: text for text, id_ in tokenizer.get_added_vocab().items() if text.strip()}

    def __call__(self, ids: Sequence[int]) -> Iterator[tuple[str, bool]]:
        for control, run in groupby(ids, self.control.__contains__):
            if control:
                yield from ((self.control[id_], True) for id_ in run)
            else:
                yield self.tokenizer.decode(list(run), clean_up_tokenization_spaces=False), False


def columns(letter: str) -> int:
    """Columns of a terminal: East Asian letters and emoji take two, what joins or combines takes none."""
    if unicodedata.combining(letter) or unicodedata.category(letter) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def strips(drawn: Sketch, width: int) -> list[tuple[int, str]]:
    """The tree in letters, to scale: for each node the column in which it begins, and the most frequent roles."""
    scale = -(-max(drawn.sequences) // max(width, 1))
    strips = []
    for runs, fork in zip(drawn.runs, drawn.tree.forks, strict=True):
        roles = [LETTERS[run.role] for run in runs for _ in range(run.tokens)]
        first = scale - fork % scale
        cut = [roles[:first], *(roles[start : start + scale] for start in range(first, len(roles), scale))]
        strips.append((fork // scale, "".join(Counter(column).most_common(1)[0][0] for column in cut if column)))
    return strips


# --- the picture ------------------------------------------------------------------------------------------------

WIDTH, MARGIN, LEFT, BAR, STEP, TOP, TICKS = 960, 16, 176, 28, 44, 18, 10
LETTER, FEWEST_LETTERS, TOLD = 6.4, 3, 300
"""The width of a letter, how few of a text are worth showing, and how many are told where the mouse points."""
KIND_OF = {"system": "prompt", "user": "prompt", "history": "untrained"}
MEANINGS = {
    "prompt": "context",
    "untrained": "earlier answers, results of tools",
    "prefix": "announces the mode",
    "reasoning": "reasoning, in the loss",
    "answer": "answer, in the loss",
}
STYLE = """
.tree { background: #fff; font: 12px ui-sans-serif, Helvetica, Arial, sans-serif }
.tree text { fill: #1b1f27 } .tree .soft { fill: #57606a } .tree .name { font-size: 13px; font-weight: 600 }
.tree .line { fill: none; stroke: #8b949e; stroke-width: 1.4 } .tree .grid { stroke: #e6e9ee; stroke-width: 1 }
.tree .prompt { fill: #f2f4f7; stroke: #98a2b3 } .tree .untrained { fill: #f8f3e7; stroke: #b5a376 }
.tree .prefix { fill: #a21caf; stroke: #a21caf } .tree .reasoning { fill: #d8eefa; stroke: #0b6a8f }
.tree .answer { fill: #dcf5e3; stroke: #1a7036 }
"""
_NOT_XML = re.compile("[\ufffe\uffff]")


def svg(drawn: Sketch, *, style: str = STYLE) -> str:
    """A picture of the tree, to scale: the trunk, and under the place where it forks each branch.

    style: CSS of its own; without it the page around it has the rules for the class `tree`.
    """
    return "\n".join(_Picture(drawn).elements(style)) + "\n"


class _Picture:
    def __init__(self, drawn: Sketch) -> None:
        self.drawn = drawn
        self.scale = (WIDTH - LEFT - MARGIN) / max(drawn.sequences)
        # The latest fork comes first: so no line to a branch crosses another branch.
        rows = sorted(range(1, len(drawn.turns)), key=lambda node: -drawn.tree.forks[node])
        self.row = {node: number for number, node in enumerate([0, *rows])}

    def x(self, position: int) -> float:
        return round(LEFT + position * self.scale, 1)

    def y(self, node: int) -> int:
        return TOP + STEP * self.row[node]

    def elements(self, style: str) -> Iterator[str]:
        bottom = TOP + STEP * len(self.row)
        title = f"Fusion tree: {len(self.drawn.tree):,} tokens; {apart(self.drawn)}"
        yield f'<svg xmlns="http://www.w3.org/2000/svg" class="tree" viewBox="0 0 {WIDTH} {bottom + 66}" role="img">'
        yield f"<title>{title}</title>"
        if style:
            yield f"<style>{style}</style>"
            yield f'<rect width="{WIDTH}" height="{bottom + 66}" fill="#fff"/>'
        yield from self.axis(bottom)
        for node, fork in enumerate(self.drawn.tree.forks):
            if node:
                yield f'<path class="line" d="M{self.x(fork)} {TOP + BAR} V{self.y(node)}"/>'
        for node in self.row:
            yield from self.node(node)
        yield from self.legend(bottom + 36)
        yield f'<text class="soft" x="{MARGIN}" y="{bottom + 56}">{title}</text>'
        yield "</svg>"

    def axis(self, bottom: int) -> Iterator[str]:
        longest = max(self.drawn.sequences)
        sizes = (size * 10**power for power in range(12) for size in (1, 2, 5))
        step = next(size for size in sizes if longest <= TICKS * size)
        for position in range(0, longest + 1, step):
            x = self.x(position)
            yield f'<path class="grid" d="M{x} {TOP - 8} V{bottom - 4}"/>'
            yield f'<text class="soft" x="{x}" y="{bottom + 10}" text-anchor="middle">{position:,}</text>'
        yield f'<text class="soft" x="{MARGIN}" y="{bottom + 10}">position</text>'

    def node(self, node: int) -> Iterator[str]:
        drawn, y = self.drawn, self.y(node)
        tokens = f"{drawn.tree.lengths[node]:,} tokens, {drawn.trained_in(node):,} trained"
        yield f'<text class="name" x="{MARGIN}" y="{y + 11}">{drawn.heading(node)}</text>'
        yield f'<text class="soft" x="{MARGIN}" y="{y + 26}">{tokens}</text>'
        for run in drawn.runs[node]:
            start = drawn.tree.forks[node] + run.start
            x, width = self.x(start), round(run.tokens * self.scale, 1)
            kind = KIND_OF.get(run.role, run.role)
            told = f"{run.role}, {run.tokens:,} token{'s' * (run.tokens > 1)}: {_spelled(run)[:TOLD]}"
            yield f"<g><title>{_xml(told)}</title>"
            yield f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{BAR}" rx="2"/>'
            text = _cut("".join(text for text, control in run.texts if not control), width - 10)
            if text and run.role != "prefix":
                yield f'<text x="{x + 5:.1f}" y="{y + 18}">{_xml(text)}</text>'
            yield "</g>"

    def legend(self, y: int) -> Iterator[str]:
        shown = {KIND_OF.get(run.role, run.role) for runs in self.drawn.runs for run in runs}
        x = MARGIN
        for kind in [kind for kind in MEANINGS if kind in shown]:
            yield f'<rect class="{kind}" x="{x}" y="{y - 11}" width="14" height="14" rx="2"/>'
            yield f'<text class="soft" x="{x + 20}" y="{y}">{MEANINGS[kind]}</text>'
            x += 44 + int(LETTER * len(MEANINGS[kind]))


def apart(drawn: Sketch) -> str:
    """How many tokens the separate sequences of the tree have."""
    count, tokens = len(drawn.sequences), sum(drawn.sequences)
    if count == 1:
        return f"1 sequence, {tokens:,} tokens: nothing is shared"
    return f"{count} separate sequences have {tokens:,} tokens, {drawn.ratio:.1f} times as many"


def _spelled(run: Run) -> str:
    """Its texts, control tokens in brackets that no other text has."""
    return "".join(
        f"⟦{text}⟧" if control else text.replace("⟦", "\\u27e6").replace("⟧", "\\u27e7") for text, control in run.texts
    )


def _cut(text: str, width: float) -> str:
    """As much of a text as fits, on one line."""
    text = " ".join(printable(text[:1000]).split())
    room = int(width / LETTER)
    if sum(map(columns, text)) <= room:
        return text
    kept = ""
    for letter in text:
        if sum(map(columns, kept)) + columns(letter) >= room:
            break
        kept += letter
    return f"{kept}…" if len(kept) >= FEWEST_LETTERS else ""


def _xml(text: str) -> str:
    return escape(_NOT_XML.sub(lambda found: repr(found[0])[1:-1], printable(text)))
