# SPDX-License-Identifier: Apache-2.0
"""Failing transcripts: what was asked and written, piece by piece, with the broken place marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from thinkfusion.leakage import REFLECTIVE_WORDS, leaks, over_cap
from thinkfusion.modes import THINK_CLOSE, Mode, Reply

PER_KIND = 5
"""How many transcripts of a kind are shown."""
KINDS = {
    "never_closed": "The reasoning was never closed",
    "empty_trace": "Thinking mode without reasoning",
    "extra_tag": "A control token where the mode has none",
    "empty_answer": "No answer",
    "disobeyed": "Another mode than was asked for",
    "flip": "A turn of an alternating conversation broke",
    "leakage": "Reasoning in the answer",
    "truncated": "Cut at the token limit (counted apart)",
    "unseen": "Reasoned, but the server keeps the trace to itself (not judged)",
    "wrong_answer": "A wrong answer (the mode was kept)",
}
"""The kinds of failures in the order they are shown: classes of replies, and what was measured beside them."""


@dataclass(frozen=True)
class Failure:
    """A reply that failed: `where` names its prompt, `note` says what was expected; `cap` is the soft cap, if any."""

    kind: str
    where: str
    messages: tuple[dict[str, Any], ...]
    reply: Reply
    note: str = ""
    cap: float | None = None


class Piece(NamedTuple):
    """A text and what it is: "text", "tag" (a control token in its place), "broken", or "missing" (not written)."""

    kind: str
    text: str


def pieces(failure: Failure) -> list[Piece]:
    """What was written, with the broken place marked; what is missing stands at its place, in words."""
    reply = failure.reply
    written = list(_written(reply))
    if failure.kind == "leakage":
        written = _leaking(written, reply)
        if over_cap(reply, failure.cap):
            over = f"{reply.answer_tokens} tokens, over the cap of {failure.cap:.0f}"
            written.append(Piece("missing", over))
    missing = {
        "never_closed": f"ends without {THINK_CLOSE}",
        "empty_answer": "ends without an answer",
        "truncated": "cut here",
    }
    if reply.kind in missing:
        written.append(Piece("missing", missing[reply.kind]))
    if failure.note:
        written.append(Piece("missing", failure.note))
    return [piece for piece in written if piece.text]


def _written(reply: Reply) -> Iterator[Piece]:
    # Replies that were counted elsewhere, or read from a report, have no pieces.
    given = reply.pieces or ((reply.reasoning, THINK_CLOSE, reply.answer) if reply.reasoning else (reply.answer,))
    closed = reply.mode is not Mode.THINKING
    for place, text in enumerate(given):
        if place % 2 == 0:
            yield Piece("text", text)
        elif reply.kind == "extra_tag":
            expected = text == THINK_CLOSE and not closed
            closed = closed or text == THINK_CLOSE
            yield Piece("tag" if expected else "broken", text)
        else:
            yield Piece("broken" if reply.kind == "empty_trace" and text == THINK_CLOSE else "tag", text)


def _leaking(written: Sequence[Piece], reply: Reply) -> list[Piece]:
    """Marks the reflective words of the answer, which is what follows the last control token."""
    *before, last = written
    found = list(before)
    place = 0
    for word in REFLECTIVE_WORDS.finditer(last.text):
        found += [Piece("text", last.text[place : word.start()]), Piece("broken", word[0])]
        place = word.end()
    return [*found, Piece("text", last.text[place:])]


def failures_of(
    replies: Sequence[tuple[str, tuple[dict[str, Any], ...], Reply, float | None, str | None]], limit: int = PER_KIND
) -> list[Failure]:
    """At most `limit` failures of each kind among replies: where, messages, reply, soft cap, and the solution of a
    wrong answer."""
    found: list[Failure] = []
    counted: dict[str, int] = {}
    for where, messages, reply, cap, missed in replies:
        if reply.kind != "ok":
            kind = reply.kind
        elif leaks(reply, cap):
            kind = "leakage"
        elif missed is not None:
            kind = "wrong_answer"
        else:
            continue
        counted[kind] = counted.get(kind, 0) + 1
        if counted[kind] <= limit:
            note = f"expected: {missed}" if kind == "wrong_answer" else ""
            found.append(Failure(kind, where, messages, reply, note, cap))
    return found
