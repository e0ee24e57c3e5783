# SPDX-License-Identifier: Apache-2.0
"""Flip: conversations that alternate modes from turn to turn, every turn checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from thinkfusion.intervals import marked, rate
from thinkfusion.modes import Mode
from thinkfusion.obedience import other
from thinkfusion.prompts import EvaluationPrompt
from thinkfusion.replying import Asked
from thinkfusion.transcripts import PER_KIND, Failure

FLIP_TURNS = 6


def measure_flip(
    replier: Asked,
    prompts: Sequence[EvaluationPrompt],
    *,
    conversations: int = 40,
    turns: int = FLIP_TURNS,
    limit: int = PER_KIND,
) -> tuple[dict[str, Any], list[Failure]]:
    """Conversations of `turns` turns that switch at every turn by the hard switch; half of them begin with thinking.

    The history of a turn is what the model answered itself. Shares have their intervals: `share` is that of turns that
    kept their mode (`right` of `total`), `whole` that of conversations in which no turn broke (`unbroken` of
    `judged`); `starts` has the turns of both halves by number. A reply that hit the token limit broke no turn
    and is not counted, nor is a conversation of which nothing else is known.
    """
    first = [list(Mode)[index % 2] for index in range(conversations)]
    histories: list[list[dict[str, Any]]] = [[] for _ in range(conversations)]
    marks: list[list[bool | None]] = [[] for _ in range(conversations)]
    failures: list[Failure] = []
    shown: set[int] = set()  # one failure of each turn
    for turn in range(turns):
        modes = [mode if turn % 2 == 0 else other(mode) for mode in first]
        for index, history in enumerate(histories):
            question = prompts[(index * turns + turn) % len(prompts)].question
            history.append({"role": "user", "content": question})
        jobs = [replier.job(history, mode) for history, mode in zip(histories, modes, strict=True)]
        for index, reply in enumerate(replier.replies(jobs, label=f"flip, turn {turn + 1}")):
            broken = reply.format_error
            marks[index].append(not broken if reply.judged else None)
            if broken and len(failures) < limit and turn not in shown:
                shown.add(turn)
                where = f"turn {turn + 1} of {turns}, {reply.mode.value.replace('_', '-')}"
                failures.append(Failure("flip", where, tuple(histories[index]), reply))
            histories[index].append({"role": "assistant", "content": reply.answer or "…"})
    return _counted(first, marks), failures


def _counted(first: Sequence[Mode], marks: Sequence[Sequence[bool | None]]) -> dict[str, Any]:
    turns = len(marks[0])
    starts = {
        start.value: [
            {
                "mode": (start if turn % 2 == 0 else other(start)).value,
                **marked("right", [row[turn] for mode, row in zip(first, marks, strict=True) if mode is start]),
            }
            for turn in range(turns)
        ]
        for start in Mode
        if start in first
    }
    judged = [row for row in marks if False in row or None not in row]
    unbroken = [False not in row for row in judged]
    return {
        "conversations": len(marks),
        "turns": turns,
        **marked("right", [mark for row in marks for mark in row]),
        "judged": len(judged),
        "unbroken": sum(unbroken),
        **rate("whole", unbroken),
        "starts": starts,
    }
