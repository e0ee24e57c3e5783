# SPDX-License-Identifier: Apache-2.0
"""The two modes: how a prompt announces them, how a user switches, and what a reply in each must look like."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"


class Mode(str, Enum):
    """How a model replies: THINKING reasons first, NON_THINKING answers at once."""

    THINKING = "thinking"
    NON_THINKING = "non_thinking"

    def __str__(self) -> str:
        return self.value

    @classmethod
    def parse(cls, value: Mode | str | bool) -> Mode:
        """The mode that `value` names: a Mode, its name ("thinking", "non-thinking"), or a switch (True, False).

        Raises ValueError for anything else, with the values that are understood.
        """
        if isinstance(value, bool):
            return cls.THINKING if value else cls.NON_THINKING
        if isinstance(value, str):
            name = value.strip().lower().replace("-", "_").replace(" ", "_")
            if name in cls._value2member_map_:
                return cls(name)
        raise ValueError(f"unknown mode {value!r}; use 'thinking' or 'non_thinking' (or True, False).")


@dataclass(frozen=True)
class Scheme:
    """Which tokens open and close the modes. Each field is a sequence of pieces, text and control strings apart.

    The `*_prefix` fields belong to the generation prompt (never in the loss), `thinking_start` and
    `thinking_end` are written by the model (always in the loss), `history_prefix` stands before the answer of
    an earlier turn. The table of the families is in the documentation of `SCHEMES`.
    """

    name: str
    thinking_prefix: tuple[str, ...]
    thinking_start: tuple[str, ...]
    thinking_end: tuple[str, ...]
    non_thinking_prefix: tuple[str, ...]
    history_prefix: tuple[str, ...]
    tags: tuple[str, ...] = (THINK_OPEN, THINK_CLOSE)
    """The control strings of the pieces: in a reply they are markup even where a tokenizer calls them ordinary."""
    ends: tuple[str, ...] = ()
    """The tokens that end a reply, besides the tokenizer's own."""
    call_markup: str = ""
    """Control strings found in here belong to tool calls, and are part of the answer."""
    call_lead: str = ""
    """What ends the text before a tool call that is a message of its own; such a call begins with `call_start`."""
    call_start: str = ""

    @property
    def closing_token(self) -> str:
        """The token that ends a trace: the first control string of `thinking_end`."""
        return next(piece for piece in self.thinking_end if piece.strip())

    @property
    def closing(self) -> str:
        """All that ends a trace, without white space around it."""
        return "".join(self.thinking_end).strip()

    def prefix(self, mode: Mode) -> tuple[str, ...]:
        """What the generation prompt ends in, after the assistant header."""
        return self.thinking_prefix if mode is Mode.THINKING else self.non_thinking_prefix

    @property
    def history_is_non_thinking(self) -> bool:
        """Whether an earlier turn is rendered exactly as it was answered in non-thinking mode."""
        return self.history_prefix == self.non_thinking_prefix


CONTROL = Scheme(
    name="control",
    thinking_prefix=(THINK_OPEN,),
    thinking_start=(),
    thinking_end=(THINK_CLOSE,),
    non_thinking_prefix=(THINK_CLOSE,),
    history_prefix=(THINK_CLOSE,),
)
EMPTY_BLOCK = Scheme(
    name="empty-block",
    thinking_prefix=(),
    thinking_start=(THINK_OPEN, "\n"),
    thinking_end=("\n", THINK_CLOSE, "\n\n"),
    non_thinking_prefix=(THINK_OPEN, "\n\n", THINK_CLOSE, "\n\n"),
    history_prefix=(),
)
SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in (CONTROL, EMPTY_BLOCK)}
"""`control` (the default): the prompt ends in `<think>` or `</think>`, one token that differs, as in A.X K1 and
DeepSeek-V3.1. `empty-block`: nothing, or `<think>\\n\\n</think>\\n\\n`, for compatibility with Qwen3."""


def get_scheme(scheme: Scheme | str) -> Scheme:
    """The scheme called `scheme`; raises ValueError with the known names."""
    if isinstance(scheme, Scheme):
        return scheme
    if scheme not in SCHEMES:
        raise ValueError(f"unknown scheme {scheme!r}; choose one of {', '.join(SCHEMES)}.")
    return SCHEMES[scheme]


_SOFT_SWITCH = re.compile(r"(?:^|(?<=\s))/(think|no_think)\s*\Z")


def split_soft_switch(text: str) -> tuple[str, Mode | None]:
    """The text of a user or system message without a final `/think` or `/no_think`, and the mode it asks for.

    A switch is the last word of the message, on a line of its own or not; without one the text is returned
    unchanged, white space included.
    """
    # The expression looks at every word, and a message is read several times.
    found = _SOFT_SWITCH.search(text) if text.rstrip().endswith("think") else None
    if found is None:
        return text, None
    return text[: found.start()].rstrip(), Mode.THINKING if found[1] == "think" else Mode.NON_THINKING


REPLY_CLASSES = ("ok", "never_closed", "empty_trace", "extra_tag", "empty_answer", "truncated")
"""The classes of a reply. `truncated` (the token limit was hit) is no format error, and is counted apart."""
ENDPOINT_CLASSES = ("unseen", "unanswered")
"""Further classes, of a served model: a reply whose trace the server keeps to itself, and a prompt without a reply."""
UNJUDGED = ("truncated", *ENDPOINT_CLASSES)
"""The classes that say nothing of the mode: neither kept nor broken."""


@dataclass(frozen=True)
class Reply:
    """A reply, split. Unpacks as `reasoning, answer = reply`.

    `reasoning` and `answer` are text without control tokens and without outer white space; `kind` is one of
    REPLY_CLASSES; `finished` is False when the token limit cut the reply. The token counts are None when the
    reply was split from text.
    """

    mode: Mode
    reasoning: str
    answer: str
    kind: str
    finished: bool = True
    reasoning_tokens: int | None = None
    answer_tokens: int | None = None
    pieces: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """What was written, in its order: texts and control tokens by turns, beginning and ending with a text."""

    def __iter__(self) -> Iterator[str]:
        return iter((self.reasoning, self.answer))

    @property
    def format_error(self) -> bool:
        """Whether the reply broke its mode's format; a truncated reply did not."""
        return self.kind != "ok" and self.judged

    @property
    def judged(self) -> bool:
        """Whether it can be told that the reply kept or broke its mode."""
        return self.kind not in UNJUDGED


def split_reply(
    text_or_ids: str | Sequence[int],
    mode: Mode | str | bool,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    finished: bool | None = None,
    scheme: Scheme | str = CONTROL,
    end_of_turn: str = "<|im_end|>",
) -> Reply:
    """Split what a model generated after the generation prompt of `mode` into reasoning and answer.

    Given ids (and the `tokenizer` they belong to), control tokens are recognised by id, so that a `</think>`
    spelled out of ordinary tokens is text; the reply ends at the tokenizer's end-of-turn token or one of
    `scheme.ends`, and is finished if that token is there, or if `finished` says so. Given text, they are recognised
    by their strings, the reply ends at `end_of_turn` (or one of `scheme.ends`), and counts as finished unless
    `finished=False` says that a token limit cut it. Tool calls are part of the answer, with their markup.

    Never fails on what a model wrote: every reply gets exactly one class of REPLY_CLASSES, in this order:
    `extra_tag` (a control token where the mode has none), `truncated`, `never_closed`, `empty_trace`,
    `empty_answer`, `ok`.
    Where a format is broken, reasoning and answer are the best reading of it: a thinking reply without
    `</think>` is all reasoning when it was cut, and all answer when it ended by itself.

    Raises ValueError for an unknown mode or scheme, or ids without a tokenizer.
    """
    mode, scheme = Mode.parse(mode), get_scheme(scheme)
    if isinstance(text_or_ids, str):
        text, found = _until_end(text_or_ids, scheme.ends or (end_of_turn,))
        texts, tags, counts = *_split_text(text, mode, scheme), None
        done = True if finished is None else finished or found
    else:
        if tokenizer is None:
            raise ValueError("split_reply: ids need the tokenizer they belong to: pass tokenizer=….")
        texts, tags, counts, done = _split_ids(list(map(int, text_or_ids)), tokenizer, mode, scheme)
        done = done or bool(finished)
    return _read(texts, tags, counts, mode=mode, scheme=scheme, finished=done)


def _until_end(text: str, ends: Sequence[str]) -> tuple[str, bool]:
    found = re.search("|".join(map(re.escape, ends)), text)
    return (text, False) if found is None else (text[: found.start()], True)


def _split_text(text: str, mode: Mode, scheme: Scheme) -> tuple[list[str], list[str]]:
    """Texts between the tags, and the tags; a closing of several tokens counts as one `</think>`."""
    text = text.replace(scheme.closing, THINK_CLOSE, 1)
    call = ""
    before, led, rest = text.partition(scheme.call_lead + scheme.call_start) if scheme.call_start else (text, "", "")
    if led:
        # In thinking mode a call may follow the trace at once, and then closes it.
        open_trace = mode is Mode.THINKING and THINK_CLOSE not in before
        text, call = before + THINK_CLOSE * open_trace, scheme.call_start + rest
    pieces = re.split(f"({'|'.join(map(re.escape, {THINK_OPEN, THINK_CLOSE, *scheme.tags}))})", text)
    return [*pieces[:-1:2], pieces[-1] + call], pieces[1::2]


def reply_tags(tokenizer: Any, scheme: Scheme) -> dict[int, str]:
    """The control tokens of a reply, by id: those of the scheme, and special ones that belong to no tool call."""
    tags = {THINK_OPEN, THINK_CLOSE, *scheme.tags}
    return {
        token_id: token.content
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.content in tags
        or (token.special and token_id != tokenizer.unk_token_id and token.content not in scheme.call_markup)
    }


def end_ids(tokenizer: Any, scheme: Scheme) -> set[int]:
    """The tokens that end a reply: the tokenizer's own and those of the scheme."""
    return {tokenizer.eos_token_id, *map(tokenizer.get_added_vocab().get, scheme.ends)} - {None}


def _split_ids(
    ids: list[int], tokenizer: Any, mode: Mode, scheme: Scheme
) -> tuple[list[str], list[str], list[int], bool]:
    """Texts between the tags, the tags, tokens per text, and whether the reply ended by itself."""
    ends = end_ids(tokenizer, scheme)
    end = next((index for index, token in enumerate(ids) if token in ends), None)
    names = reply_tags(tokenizer, scheme)
    marked, call = _marked(ids[:end], tokenizer, mode, scheme)
    parts: list[list[int]] = [[]]
    found = []
    for token in marked:
        if token == _CLOSED or token in names:
            found.append(THINK_CLOSE if token == _CLOSED else names[token])
            parts.append([])
        elif token != tokenizer.unk_token_id:
            parts[-1].append(token)
    parts[-1] += call
    # Decoded at once and not token by token: a character may be spread over several tokens.
    texts = [tokenizer.decode(part, skip_special_tokens=False) if part else "" for part in parts]
    return texts, found, [len(part) for part in parts], end is not None


_CLOSED = -1
"""Stands in a list of ids for a closing of several tokens."""


def _marked(ids: list[int], tokenizer: Any, mode: Mode, scheme: Scheme) -> tuple[list[int], list[int]]:
    """The ids with a closing of several tokens as one mark, and apart from them a tool call that is its own message."""
    if scheme.closing != THINK_CLOSE:
        ids = _replace_first(ids, tokenizer(scheme.closing, add_special_tokens=False)["input_ids"])
    if not scheme.call_start:
        return ids, []
    texts = (scheme.call_lead, scheme.call_start)
    lead, start = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    place = _find(ids, lead + start)
    if place is None:
        return ids, []
    before, call = ids[:place], ids[place + len(lead) :]
    return ([*before, _CLOSED] if mode is Mode.THINKING and _CLOSED not in before else before), call


def _replace_first(ids: list[int], wanted: list[int]) -> list[int]:
    place = _find(ids, wanted)
    return ids if place is None else [*ids[:place], _CLOSED, *ids[place + len(wanted) :]]


def _find(ids: list[int], wanted: list[int]) -> int | None:
    """Where `wanted` first stands in `ids`."""
    size = len(wanted)
    return next((index for index in range(len(ids) - size + 1) if ids[index : index + size] == wanted), None)


def _read(
    texts: list[str], tags: list[str], counts: list[int] | None, *, mode: Mode, scheme: Scheme, finished: bool
) -> Reply:
    written = tuple(piece for pair in zip(texts, [*tags, ""], strict=True) for piece in pair)[:-1]
    if mode is Mode.THINKING and scheme.thinking_start and tags[:1] == [THINK_OPEN] and not texts[0].strip():
        texts, tags = texts[1:], tags[1:]
        counts = counts[1:] if counts else None
    # With every reading, what precedes `split` is reasoning and the rest is the answer.
    closes = tags.index(THINK_CLOSE) + 1 if THINK_CLOSE in tags else None
    if closes is not None:
        split = closes
    elif mode is Mode.THINKING and not finished:
        split = len(texts)
    else:
        split = 0
    reasoning, answer = "".join(texts[:split]).strip(), "".join(texts[split:]).strip()
    expected = [THINK_CLOSE] if mode is Mode.THINKING else []
    if tags and tags != expected:
        kind = "extra_tag"
    elif not finished:
        kind = "truncated"
    elif tags != expected:
        kind = "never_closed"
    elif mode is Mode.THINKING and not reasoning:
        kind = "empty_trace"
    elif not answer:
        kind = "empty_answer"
    else:
        kind = "ok"
    return Reply(
        mode=mode,
        reasoning=reasoning,
        answer=answer,
        kind=kind,
        finished=finished,
        reasoning_tokens=sum(counts[:split]) if counts is not None else None,
        answer_tokens=sum(counts[split:]) if counts is not None else None,
        pieces=written,
    )
