# SPDX-License-Identifier: Apache-2.0
"""Obedience: hard switch × soft switch × system text × turn, every combination asked as a server asks it.

The prompt is what `apply_chat_template` makes of the messages and of `enable_thinking`, so that a template of any
origin is measured, and with it who wins: the hard switch; else the latest soft switch of a user or system message;
else the template's default.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from thinkfusion.intervals import marked
from thinkfusion.modes import Mode
from thinkfusion.prompts import EvaluationPrompt
from thinkfusion.replying import Asked
from thinkfusion.transcripts import PER_KIND, Failure

HARD: tuple[bool | None, ...] = (None, True, False)
SOFT: tuple[Mode | None, ...] = (None, Mode.THINKING, Mode.NON_THINKING)
SYSTEMS = ("none", "neutral", "contradicting")
TURNS = (1, 3)
WORDS = {Mode.THINKING: "/think", Mode.NON_THINKING: "/no_think"}
NEUTRAL = "You are a helpful assistant."
OPPOSED = {
    Mode.THINKING: "Reason step by step before you answer.",
    Mode.NON_THINKING: "Answer at once, without any reasoning.",
}


def other(mode: Mode) -> Mode:
    return Mode.NON_THINKING if mode is Mode.THINKING else Mode.THINKING


@dataclass(frozen=True)
class Cell:
    """One combination. `hard` is `enable_thinking`, or None where it is not given."""

    hard: bool | None
    soft: Mode | None
    system: str
    turn: int

    def asked(self, default: Mode) -> Mode:
        """What switches and default ask for without the system text, which a contradicting one speaks against."""
        return Mode.parse(self.hard) if self.hard is not None else self.soft or default

    def expected(self, default: Mode) -> Mode:
        """The mode of the reply. A contradicting system text holds a switch, and wins where nothing else is given."""
        asked = self.asked(default)
        alone = self.hard is None and self.soft is None and self.system == "contradicting"
        return other(asked) if alone else asked

    @property
    def needs_soft_switch(self) -> bool:
        """Whether the combination means anything only where `/think` and `/no_think` are understood."""
        return self.soft is not None or (self.hard is None and self.system == "contradicting")

    def messages(self, questions: Sequence[str], answers: Sequence[str], default: Mode) -> list[dict[str, Any]]:
        """The conversation up to the question of this turn: the last of `questions`, of which there are `turn`.

        In the turn before a soft switch stands the opposite one, which the later one replaces.
        """
        found: list[dict[str, Any]] = []
        if self.system == "neutral":
            found.append({"role": "system", "content": NEUTRAL})
        elif self.system == "contradicting":
            against = other(self.asked(default))
            found.append({"role": "system", "content": f"{OPPOSED[against]} {WORDS[against]}"})
        for turn, question in enumerate(questions[: self.turn], start=1):
            switch = self.soft if turn == self.turn else other(self.soft) if self.soft and turn == 2 else None
            found.append({"role": "user", "content": f"{question} {WORDS[switch]}" if switch else question})
            if turn < self.turn:
                found.append({"role": "assistant", "content": answers[turn - 1]})
        return found


CELLS = tuple(Cell(*chosen) for chosen in product(HARD, SOFT, SYSTEMS, TURNS))


def measure_obedience(
    replier: Asked, prompts: Sequence[EvaluationPrompt], *, limit: int = PER_KIND
) -> tuple[dict[str, Any], list[Failure]]:
    """Every combination asked with every prompt (its last user message): the share that obeys, and some that do not.

    Where soft switches are not understood, the combinations that need them are left out.

    `{"prompts", "default", "obeyed", "total", "share", "share_interval", "cells"}`; the cells, in the order of CELLS,
    say what was expected. Replies that hit the token limit are in `truncated`, and in no share.
    """
    asked = [{"role": "user", "content": prompt.question} for prompt in prompts]
    default = replier.default_mode(asked)
    cells = [cell for cell in CELLS if replier.soft_switch or not cell.needs_soft_switch]
    alone = [replier.job([message], Mode.NON_THINKING) for message in asked]
    answers = [reply.answer or "…" for reply in replier.replies(alone, label="history")]
    conversations = [
        (cell, cell.messages(*_turns(asked, answers, index, cell.turn), default))
        for cell in cells
        for index in range(len(asked))
    ]
    jobs = [replier.served(messages, cell.hard) for cell, messages in conversations]
    replies = replier.replies(jobs, label="obedience")
    judged: dict[Cell, list[bool | None]] = {cell: [] for cell in cells}
    failures: dict[Cell, Failure] = {}  # the first of each combination
    for (cell, messages), reply in zip(conversations, replies, strict=True):
        wanted = cell.expected(default)
        obeys = replier.shown_mode(reply) is wanted if reply.judged else None
        judged[cell].append(obeys)
        if obeys is False and cell not in failures:
            note = f"expected: {wanted.value.replace('_', '-')} mode"
            failures[cell] = Failure("disobeyed", describe(cell), tuple(messages), reply, note)
    shown = [
        {
            "hard": cell.hard,
            "soft": cell.soft.value if cell.soft else None,
            "system": cell.system,
            "turn": cell.turn,
            "expected": cell.expected(default).value,
            **marked("obeyed", marks),
        }
        for cell, marks in judged.items()
    ]
    whole = marked("obeyed", [mark for marks in judged.values() for mark in marks])
    return {"prompts": len(prompts), "default": default.value, **whole, "cells": shown}, [*failures.values()][:limit]


def _turns(
    asked: Sequence[dict[str, str]], answers: Sequence[str], index: int, turns: int
) -> tuple[list[str], list[str]]:
    """The questions up to that of prompt `index`, and the answers to those before it: its neighbours in the list."""
    places = [(index + away) % len(asked) for away in range(1, turns)]
    return [asked[place]["content"] for place in (*places, index)], [answers[place] for place in places]


def describe(cell: Cell) -> str:
    """A cell in words: `enable_thinking=true, /no_think, contradicting system text, turn 3`."""

    def words() -> Iterator[str]:
        yield "no hard switch" if cell.hard is None else f"enable_thinking={str(cell.hard).lower()}"
        yield "no soft switch" if cell.soft is None else WORDS[cell.soft]
        yield "no system text" if cell.system == "none" else f"{cell.system} system text"
        yield f"turn {cell.turn}"

    return ", ".join(words())
