# SPDX-License-Identifier: Apache-2.0
"""Preference rows for the switch: a reply that kept its mode beside one that broke it, after the same prompt.

Broken replies that the model sampled itself teach most, since they are what it does wrong. A wrong answer in the right
format is none of them: that would teach the answer and not the mode. Nor is a truncated one, which broke nothing yet.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkfusion.generation import split_pending
from thinkfusion.modes import THINK_CLOSE, Mode, Reply, reply_tags
from thinkfusion.reading import DataError
from thinkfusion.rendering import Renderer, Segment
from thinkfusion.sources import iterate_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ORIGINS = ("sampled", "rejected_constructed", "chosen_constructed")
"""Where the two replies of a row come from: both sampled, or one made from the other mode's kept reply."""
COLUMNS = ("messages", "mode", "chosen", "rejected")


class PreferenceWriter:
    """Makes preference rows for one tokenizer, whose template `install_chat_template` made.

    A row has `prompt`, `chosen` and `rejected` as text, `prompt` being the generation prompt of `mode`, and `messages`,
    `mode`, `origin` and `broke` (the class of the rejected reply). `construct` allows to make a reply that is missing:
    rejected is then the kept reply of the other mode, put behind this mode's prefix; and a chosen non-thinking reply
    the answer part of the kept thinking one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, construct: bool = False) -> None:
        self.construct = construct
        self._renderer = Renderer(tokenizer)
        self._tags = sorted(set(reply_tags(tokenizer, self._renderer.scheme).values()), key=len, reverse=True)

    def rows(
        self,
        messages: Sequence[Mapping[str, Any]],
        kept: Mapping[Mode, Reply | None],
        given: Mapping[Mode, list[Reply]],
    ) -> list[tuple[Mode, dict[str, Any] | str]]:
        """For each mode its row, or in a word why there is none: `no_kept_reply`, `no_broken_reply`."""
        return [(mode, self._row(messages, mode, kept, given[mode])) for mode in Mode]

    def _row(
        self,
        messages: Sequence[Mapping[str, Any]],
        mode: Mode,
        kept: Mapping[Mode, Reply | None],
        replies: Iterable[Reply],
    ) -> dict[str, Any] | str:
        other = kept[Mode.NON_THINKING if mode is Mode.THINKING else Mode.THINKING]
        own, broken = kept[mode], next((each for each in replies if each.format_error and self._is_plain(each)), None)
        chosen = "" if own is None else self._text(own)
        rejected, broke, origin = "", "", "sampled"
        end = self._renderer.template.dialect.answer_end
        if broken is not None:
            rejected, broke = self._text(broken) + end * broken.finished, broken.kind
        if not chosen and broken is not None and mode is Mode.NON_THINKING and other is not None and self.construct:
            chosen, origin = other.answer, "chosen_constructed"
        elif not chosen:
            return "no_kept_reply"
        elif broken is None and other is not None and self.construct:
            rejected, origin = self._text(other) + end, "rejected_constructed"
            broke = "never_closed" if mode is Mode.THINKING else "extra_tag"
        elif broken is None:
            return "no_broken_reply"
        return {
            "prompt": "".join(segment.text for segment in self._prompt(messages, mode)),
            "chosen": chosen + end,
            "rejected": rejected,
            "messages": [dict(message) for message in messages],
            "mode": mode.value,
            "origin": origin,
            "broke": broke,
        }

    def _prompt(self, messages: Sequence[Mapping[str, Any]], mode: Mode) -> list[Segment]:
        history, pending = split_pending(messages)
        return self._renderer.prompt_segments(history, mode, pending)

    def _text(self, reply: Reply) -> str:
        """What was written, control tokens as their strings; a closing of several tokens in full."""
        closing = "".join(self._renderer.scheme.thinking_end)
        plain = self._renderer.scheme.closing == THINK_CLOSE
        return "".join(
            closing if index % 2 and piece == THINK_CLOSE and not plain else piece
            for index, piece in enumerate(reply.pieces)
        )

    def _is_plain(self, reply: Reply) -> bool:
        """Whether no text of the reply spells a control token; such a reply could not be told from its tokens."""
        return not any(tag in text for text in reply.pieces[::2] for tag in self._tags)


class PreferenceIds:
    """The `prompt_ids`, `chosen_ids` and `rejected_ids` of a row, as `DPOTrainer` collates them, for one tokenizer.

    The prompt is made anew from `messages`, whose texts are data: a `</think>` in them stays ordinary text, which it
    would not if a trainer tokenised the rendered prompt. Raises DataError for a row that has not what it needs.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._renderer = Renderer(tokenizer)
        tokens = sorted(filter(str.strip, tokenizer.get_added_vocab()), key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, tokens))})").split

    def __call__(self, row: Mapping[str, Any]) -> dict[str, list[int]]:
        missing = [name for name in COLUMNS if not row.get(name)]
        if missing:
            raise DataError("missing_column", f"{missing[0]}: missing or empty; found {', '.join(row) or 'nothing'}.")
        if row["chosen"] == row["rejected"]:
            raise DataError("same_reply", "chosen and rejected are the same: there is nothing to prefer.")
        history, pending = split_pending(row["messages"])
        prompt = self._renderer.prompt_segments(history, Mode.parse(row["mode"]), pending)
        written = [
            [Segment(text, bool(index % 2), True) for index, text in enumerate(self._split(row[name])) if text]
            for name in ("chosen", "rejected")
        ]
        (before, _), *both = self._renderer.encode([prompt, *([*prompt, *each] for each in written)])
        chosen, rejected = ([*ids[flags.index(True) :]] for ids, flags in both)
        return {"prompt_ids": before, "chosen_ids": chosen, "rejected_ids": rejected}


def read_preferences(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None
) -> list[dict[str, Any]]:
    """The rows of a preference file, with their ids, as `DPOTrainer` collates them; none is ever cut.

    Raises DataError for a row that cannot be read or is longer than `max_length`, ValueError for an empty file.
    """
    make, rows = PreferenceIds(tokenizer), []
    for line, row in iterate_rows(path):
        try:
            if isinstance(row, DataError):
                raise row
            if not isinstance(row, Mapping):
                raise DataError("not_an_object", f"found {type(row).__name__}, expected an object with named fields.")
            ids = make(row)
            length = len(ids["prompt_ids"]) + max(len(ids["chosen_ids"]), len(ids["rejected_ids"]))
            if max_length is not None and length > max_length:
                raise DataError("too_long", f"found {length:,} tokens, expected at most {max_length:,} (max_length).")
        except DataError as error:
            raise error.at(str(path), line) from None
        rows.append({**ids, "mode": Mode.parse(row["mode"]).value})
    if not rows:
        raise ValueError(
            f"{path}: there is no preference in it. A model whose switch works breaks nothing, and needs none."
        )
    return rows
