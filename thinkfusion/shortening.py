# SPDX-License-Identifier: Apache-2.0
"""Shorter reasoning: traces that end early, at the end of a sentence, with `</think>` and the answer kept.

What is never touched: answers, questions, tool calls and their results.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from thinkfusion.conversations import Conversation, DataError, Exchange, Message, Note
from thinkfusion.mixture import check_count, check_share, draw
from thinkfusion.modes import Mode

TokenEnds = Callable[[str], Sequence[int]]
"""Of a text, the character at which each of its tokens ends."""


@dataclass(frozen=True)
class ReasoningOptions:
    """What is done to the reasoning of rows that are trained in thinking mode.

    shorten_fraction, shorten_budget: this share of the rows gets its traces shortened, each to a random number of
        tokens within the budget (smallest, largest; as text "32,512"), the original answer kept. Nemotron 3 Nano does
        so with 3 %; without it a model whose budget ends goes on reasoning in the answer (Nemotron Nano 2).
    remove_fraction: this share loses its traces and is trained in non-thinking mode only. Nemotron 3 Nano: 10 %.
    close_at: traces longer than this many tokens are cut there, and only `</think>` and the end of the turn are
        trained; all else is context. A second training stage at 30,000 tokens brought over-long replies from 60 % to
        0.1 % (Hermes 4). It goes together with neither of the others.
    seed: of the draws.
    """

    shorten_fraction: float = 0.0
    shorten_budget: tuple[int, int] | str | None = None
    remove_fraction: float = 0.0
    close_at: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_share("shorten_fraction", self.shorten_fraction)
        check_share("remove_fraction", self.remove_fraction)
        check_count("seed", self.seed, smallest=0)
        if self.shorten_fraction + self.remove_fraction > 1:
            raise ValueError(
                f"shorten_fraction: {self.shorten_fraction} and remove_fraction {self.remove_fraction} are more than "
                "all rows. Lower --shorten_fraction or --remove_fraction; no row is in both."
            )
        if self.shorten_budget is not None:
            object.__setattr__(self, "shorten_budget", _budget(self.shorten_budget))
        if bool(self.shorten_fraction) != (self.shorten_budget is not None):
            raise ValueError(
                "shorten_budget: --shorten_fraction and --shorten_budget go together, e.g. --shorten_fraction 0.03 "
                "--shorten_budget 32,512."
            )
        if self.close_at is not None:
            check_count("close_at", self.close_at)
            if self.shorten_fraction or self.remove_fraction:
                raise ValueError(
                    "close_at: it trains the ends of long traces only, and goes together with neither "
                    "--shorten_fraction nor --remove_fraction."
                )

    @property
    def active(self) -> bool:
        """Whether any row can be changed at all."""
        return bool(self.shorten_fraction or self.remove_fraction or self.close_at)


def _budget(given: Any) -> tuple[int, int]:
    try:
        low, high = map(int, given.split(",")) if isinstance(given, str) else given
        check_count("shorten_budget", low)
        check_count("shorten_budget", high, smallest=low)
    except (TypeError, ValueError):
        raise ValueError(
            f"shorten_budget: found {given!r}, expected the smallest and the largest number of tokens, at least 1 "
            "(--shorten_budget 32,512)."
        ) from None
    return low, high


# `x ? a : b` is told by the space before its mark, `3.14` by what stands after its dot.
MARKS, CLOSERS = "[.!?…．।॥؟۔]", r"[\"'”’»)\]}*_」』）】》〉〕］]*"
# A variation selector belongs to the mark before it.
EAST_ASIAN_MARKS = "[。！？｡][。！？｡!?…\ufe00-\ufe0f]*"
LINE_END = r"[^\S\r\n]*[\r\n]|\s*\Z"
SENTENCE_END = re.compile(
    rf"(?<=\S){MARKS}{CLOSERS}(?=\s|\Z)|{EAST_ASIAN_MARKS}{CLOSERS}(?![!?…\ufe00-\ufe0f])|(?<=\S)(?={LINE_END})"
)
AT_LINE_END = re.compile(LINE_END)
# What a mark ends besides sentences: the number of a list item, `e.g.`, and `5!`.
NO_SENTENCE = re.compile(r"\s*\(?(?:\d{1,3}|[A-Za-z])\.|.*\b[A-Za-z]\.[A-Za-z]\.|.*\d!", re.DOTALL)
LONGEST_NO_SENTENCE = 16


def _sentence_ends(text: str, limit: int) -> list[int]:
    """Where marks and lines end, up to `limit`, rising; `_ends_sentence` has the last word on each."""
    ends = []
    for match in SENTENCE_END.finditer(text):
        if match.end() > limit:
            break
        ends.append(match.end())
    return ends


def _ends_sentence(text: str, end: int) -> bool:
    if AT_LINE_END.match(text, end):
        return True
    start = max(0, end - LONGEST_NO_SENTENCE)
    line = max(text.rfind("\n", start, end), text.rfind("\r", start, end)) + 1
    return not NO_SENTENCE.fullmatch(text, max(start, line), end)


def shorten(reasoning: str, token_ends: Sequence[int], budget: int) -> str | None:
    """The longest part from the beginning that ends with a sentence or a line and has at most `budget` tokens.

    `token_ends` holds the character at which each token of `reasoning` ends. The part is kept byte for byte, without
    white space at its end; it is all of a reasoning that fits. None if no sentence ends within the budget. Sentences
    end in the marks of English, Korean, Chinese, Japanese, Hindi and Arabic, which are not inside a number, or with
    their line.
    """
    if budget < 1:
        return None
    limit = len(reasoning) if budget >= len(token_ends) else token_ends[budget - 1]
    ends = reversed(_sentence_ends(reasoning, limit))
    return next((reasoning[:end] for end in ends if _ends_sentence(reasoning, end)), None)


def apply_reasoning_options(
    conversation: Conversation, options: ReasoningOptions, token_ends: TokenEnds, notes: list[Note]
) -> Conversation:
    """The conversation as the options want it, its modes being assigned already; a row is either drawn or untouched.

    What is done is added to `notes`: `removed_reasoning`, `shortened_reasoning`, `closed_reasoning`; and
    `no_sentence_end` for a row whose traces stay whole since nothing ends within the budget.

    Raises DataError `trace_too_short` if `close_at` leaves nothing of the conversation to train on.
    """
    if options.close_at is not None:
        return _close_at(conversation, options.close_at, token_ends, notes)
    share = options.remove_fraction + options.shorten_fraction
    if not share or not any(_thinks(exchange) for exchange in conversation.exchanges):
        return conversation
    # One draw for both, so that the shares are those of all rows and no row is in both.
    drawn = draw(options.seed, "reasoning", conversation)
    if drawn < options.remove_fraction:
        return _without_reasoning(conversation, notes)
    return _shortened(conversation, options, token_ends, notes) if drawn < share else conversation


def _thinks(exchange: Exchange) -> bool:
    return Mode.THINKING in exchange.modes and exchange.has_reasoning


def _without_reasoning(conversation: Conversation, notes: list[Note]) -> Conversation:
    """All exchanges without reasoning; of a pre-paired one the non-thinking answer is what is left."""
    exchanges = []
    for exchange in conversation.exchanges:
        steps = tuple(replace(step, reasoning=None) for step in exchange.steps_in(Mode.NON_THINKING))
        modes = (Mode.NON_THINKING,) if exchange.modes else ()
        exchanges.append(replace(exchange, steps=steps, alternative=(), modes=modes))
    removed = sum(exchange.has_reasoning for exchange in conversation.exchanges)
    notes.append(Note("altered", "removed_reasoning", f"of {removed} exchange{'s' * (removed != 1)}"))
    return replace(conversation, exchanges=tuple(exchanges))


def _shortened(
    conversation: Conversation, options: ReasoningOptions, token_ends: TokenEnds, notes: list[Note]
) -> Conversation:
    budget = options.shorten_budget
    assert isinstance(budget, tuple)
    low, high = budget
    exchanges = list(conversation.exchanges)
    done, whole = [], []
    for index, exchange in enumerate(exchanges):
        if not _thinks(exchange):
            continue
        steps = list(exchange.steps)
        for number, step in enumerate(steps):
            if step.reasoning is None:
                continue
            drawn = draw(options.seed, f"budget {index} {number}", conversation)
            tokens = low + int(drawn * (high - low + 1))
            ends = token_ends(step.reasoning)
            if len(ends) <= tokens:
                continue
            shorter = shorten(step.reasoning, ends, tokens)
            place = f"exchange {index + 1}, step {number + 1}: {tokens:,} of {len(ends):,} tokens"
            if shorter is None:
                whole.append(place)
                continue
            done.append(place)
            steps[number] = replace(step, reasoning=shorter)
        exchanges[index] = replace(exchange, steps=tuple(steps))
    if done:
        notes.append(Note("altered", "shortened_reasoning", "; ".join(done)))
    elif whole:
        notes.append(Note("noted", "no_sentence_end", "; ".join(whole)))
    return replace(conversation, exchanges=tuple(exchanges)) if done else conversation


def _close_at(conversation: Conversation, length: int, token_ends: TokenEnds, notes: list[Note]) -> Conversation:
    exchanges = []
    closed = []
    for index, exchange in enumerate(conversation.exchanges):
        steps = tuple(_cut(step, length, token_ends) for step in exchange.steps) if _thinks(exchange) else ()
        if steps and steps != exchange.steps:
            closed.append(f"exchange {index + 1}")
            exchanges.append(replace(exchange, steps=steps, modes=(Mode.THINKING,), ends_only=True))
        else:
            exchanges.append(replace(exchange, modes=()))
    if not closed:
        raise DataError(
            "trace_too_short",
            f"reasoning: no trace that is trained has more than {length:,} tokens, so that there is nothing to close "
            "there. Lower --close_at, or leave such rows out with --on_bad_row skip.",
            source=conversation.source,
            line=conversation.line,
        )
    notes.append(Note("altered", "closed_reasoning", f"at {length:,} tokens: {', '.join(closed)}"))
    return replace(conversation, exchanges=tuple(exchanges))


def _cut(step: Message, length: int, token_ends: TokenEnds) -> Message:
    if step.reasoning is None:
        return step
    ends = token_ends(step.reasoning)
    if len(ends) <= length or not step.reasoning[: ends[length - 1]].strip():
        return step
    return replace(step, reasoning=step.reasoning[: ends[length - 1]])


def shorten_to_fit(conversation: Conversation, excess: Mapping[int, int], token_ends: TokenEnds) -> Conversation | None:
    """The conversation with less reasoning, whole sentences of it, or None if that cannot make it fit.

    `excess`: by index of an exchange, the tokens that its thinking sequence has too many. Exchanges count apart, since
    the sequence of one does not show the reasoning of the others. In an exchange the longest trace is shortened first.
    """
    exchanges = list(conversation.exchanges)
    for index, tokens in excess.items():
        shorter = _fitting(exchanges[index], tokens, token_ends)
        if shorter is None:
            return None
        exchanges[index] = shorter
    return replace(conversation, exchanges=tuple(exchanges))


def _fitting(exchange: Exchange, excess: int, token_ends: TokenEnds) -> Exchange | None:
    steps = list(exchange.steps)
    ends = {number: token_ends(step.reasoning) for number, step in enumerate(steps) if step.reasoning is not None}
    for number in sorted(ends, key=lambda number: -len(ends[number])):
        if excess <= 0:
            break
        reasoning = steps[number].reasoning or ""
        budget = len(ends[number]) - excess
        shorter = shorten(reasoning, ends[number], budget) or _first_sentence(reasoning)
        # The token across the end counts as kept, since a part of it stays.
        excess -= len(ends[number]) - min(bisect_left(ends[number], len(shorter)) + 1, len(ends[number]))
        steps[number] = replace(steps[number], reasoning=shorter)
    return replace(exchange, steps=tuple(steps)) if excess <= 0 else None


def _first_sentence(text: str) -> str:
    return next(text[:end] for end in _sentence_ends(text, len(text)) if _ends_sentence(text, end))
