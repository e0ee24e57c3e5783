# SPDX-License-Identifier: Apache-2.0
"""A thinking budget: reasoning is closed at a number of tokens, if possible where a sentence ends."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import LogitsProcessor

from thinkfusion.chat_templates import scheme_of
from thinkfusion.modes import THINK_OPEN, Scheme, get_scheme
from thinkfusion.shortening import NO_SENTENCE, SENTENCE_END

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LARGEST_MARGIN = 200
_TAIL_TOKENS = 16
"""So many tokens are read to tell whether a sentence ends."""
# Korean sentences often end without a mark; these endings are seldom the beginning of something else.
_KOREAN_END = re.compile(r"(?:니다|니까|[았었겠였했됐]다|[이한된]다|[세어아해예에네군지까]요|시오|하자|보자)\Z")
# A dot after a digit may stand inside a number.
_OPEN_NUMBER = re.compile(r"\d\.\Z")


def ends_sentence(text: str) -> bool:
    """Whether a sentence or a line ends where `text` ends.

    What follows is not known yet: a dot after a digit is taken for a decimal point, `1.` and `e.g.` end nothing.
    """
    if not text.strip():
        return False
    if text.endswith(("\n", "\r")):
        return True
    text = text.rstrip(" \t")
    if _KOREAN_END.search(text):
        return True
    # Something has to follow, or the end of the text would be the end of a line.
    marked = any(found.end() == len(text) for found in SENTENCE_END.finditer(f"{text} x"))
    line = text[max(text.rfind("\n"), text.rfind("\r")) + 1 :]
    return marked and not _OPEN_NUMBER.search(text) and not NO_SENTENCE.fullmatch(line)


def check_budget(value: object, name: str = "thinking_budget") -> None:
    """Raise ValueError if `value` is neither None (no limit) nor a number of tokens."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise ValueError(
            f"{name}: found {value!r}, expected a whole number of tokens, at least 0. Leave it out (None) for no limit."
        )


class ThinkingBudget(LogitsProcessor):
    """Closes the reasoning of each row after `budget` tokens; for `model.generate(logits_processor=[…])`.

    budget: reasoning tokens after `<think>`, 0 for none at all; None is no limit. A sequence holds one budget for each
        prompt; the beams or samples of a prompt (consecutive rows) share its budget.
    margin: from so many tokens before the budget on, the reasoning is closed where a sentence or a line ends; by
        default a fifth of the budget, at most 200.
    scheme: how reasoning begins and ends; by default that of the tokenizer's chat template.

    The closing is that of the scheme, with the line break before it where the scheme has one (which makes the
    reasoning one token longer than its budget); several tokens are written one after another. Rows that never began to
    reason, or have closed, are left alone, and a row that begins again has its budget again. All is read
    from the ids of a row at every step, so that rows may be padded, sampled, or reordered by a beam search.

    Raises ValueError for budgets or a margin that are no numbers of tokens, for a tokenizer without a switchable
    template if no `scheme` is given, and, while generating, if the rows are no multiple of the budgets.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        budget: int | Sequence[int | None] | None,
        *,
        margin: int | None = None,
        scheme: Scheme | str | None = None,
    ) -> None:
        budgets = [budget] if budget is None or isinstance(budget, (int, float, str)) else list(budget)
        if not budgets:
            raise ValueError("thinking_budget: found an empty list, expected one budget for each prompt.")
        for index, each in enumerate(budgets):
            check_budget(each, "thinking_budget" if len(budgets) == 1 else f"thinking_budget[{index}]")
        check_budget(margin, "margin")
        self.budgets = budgets
        self.margin = margin
        self._tokenizer = tokenizer
        chosen = scheme_of(tokenizer) if scheme is None else get_scheme(scheme)
        opening = THINK_OPEN if THINK_OPEN in chosen.tags else "".join(chosen.thinking_prefix)
        self._opening = _ids(tokenizer, opening)
        self._closing = _ids(tokenizer, "".join(chosen.thinking_end).rstrip())
        # Reasoning is closed by the first tag of the closing, one token or spelled out; the rest may be more than that.
        self._mark = _ids(tokenizer, chosen.closing_token)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids: (rows, length); scores: (rows, vocabulary), returned with all but a forced token at -inf."""
        rows, length = input_ids.shape
        if rows % len(self.budgets):
            raise ValueError(
                f"thinking_budget: found {len(self.budgets)} budgets for {rows} rows, expected one for each prompt."
            )
        limits = [self.budgets[row * len(self.budgets) // rows] for row in range(rows)]
        starts = self._reasoning_starts(input_ids)
        forced = {}
        for row, (start, limit) in enumerate(zip(starts, limits, strict=True)):
            if start is None or limit is None or length - start < limit - self._margin(limit):
                continue
            # As much of the row as decisions are made from: a closing, and what is read in front of it.
            first = max(start, length - len(self._closing) - _TAIL_TOKENS)
            token = self._forced(input_ids[row, first:].tolist(), first - start, limit)
            if token is not None:
                forced[row] = token
        if not forced:
            return scores
        changed = scores.clone()
        for row, token in forced.items():
            changed[row] = -torch.inf
            changed[row, token] = 0.0
        return changed

    def _margin(self, budget: int) -> int:
        return min(budget // 5, LARGEST_MARGIN) if self.margin is None else self.margin

    def _reasoning_starts(self, ids: torch.Tensor) -> list[int | None]:
        """Where the open reasoning of each row begins, behind the first opening that follows the last closing.

        A closing among the last tokens is overlooked if it may be part of one that is being written.
        """
        length = ids.shape[1]
        places = torch.arange(1, length + 1, device=ids.device)
        closed = _ends_of(ids, self._mark) & (places <= length - len(self._closing) + 1)
        last = (closed * places).amax(dim=1)
        opened = _ends_of(ids, self._opening) & (places - len(self._opening) >= last[:, None])
        first = torch.where(opened, places, length + 1).amin(dim=1)
        return [None if place > length else place for place in first.tolist()]

    def _forced(self, tail: list[int], before: int, budget: int) -> int | None:
        """The token that a row must go on with, if any.

        tail: the last tokens of its reasoning, behind `before` others.
        """
        closing, end = self._closing, len(tail)
        written = next(size for size in range(len(closing) - 1, -1, -1) if tail[end - size :] == closing[:size])
        start = end - written
        marks = _starts_of(tail, self._mark)
        if any(place + len(self._mark) <= start for place in marks):
            return None
        # Had it been closed at any of these places, what follows there would be what was written.
        stop = next((place for place in marks if place >= start), end)
        for place in range(start, stop + 1):
            if self._closes_at(tail[:place], before + place, budget):
                return closing[written]
        return None

    def _closes_at(self, tail: list[int], count: int, budget: int) -> bool:
        """Whether reasoning of `count` tokens that end in `tail` is to be closed."""
        if count >= budget:
            return True
        if count < budget - self._margin(budget) or not tail:
            return False
        return ends_sentence(self._tokenizer.decode(tail[-_TAIL_TOKENS:], skip_special_tokens=False))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _ends_of(ids: torch.Tensor, pattern: list[int]) -> torch.Tensor:
    """Where `pattern` ends in each row, (rows, length), bool."""
    windows = torch.nn.functional.pad(ids, (len(pattern) - 1, 0), value=-1).unfold(1, len(pattern), 1)
    return (windows == ids.new_tensor(pattern)).all(dim=-1)


def _starts_of(ids: list[int], pattern: list[int]) -> list[int]:
    return [place for place in range(len(ids) - len(pattern) + 1) if ids[place : place + len(pattern)] == pattern]
