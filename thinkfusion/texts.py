# SPDX-License-Identifier: Apache-2.0
"""What may stand in a text: valid Unicode, control strings as data only, reasoning between tags."""

from __future__ import annotations

import logging
import re
from functools import cache

from thinkfusion.modes import THINK_CLOSE, THINK_OPEN
from thinkfusion.reading import DataError, Reading, show

logger = logging.getLogger(__name__)

THINK_TAGS = (THINK_OPEN, THINK_CLOSE)
OTHER_REASONING_TAGS = (
    *("<thinking>", "<reasoning>", "<reason>", "<thought>", "<thoughts>", "<|channel|>analysis", "<seed:think>"),
    *("◁think▷", "[THINK]"),
)
"""Tags that open the reasoning of other families; read only where `reasoning_tags` names them."""

# Turn markers of the known families. Most are written `<|name|>`, so that the form stands for them all.
_ANGLED = re.compile(
    r"<(?:/?think>|/?tool_(?:call|response)>|\|[A-Za-z_][\w-]{1,40}\|>|｜[^｜<>]{1,40}｜>|(?:start|end)_of_turn>)"
)
_BRACKETED = re.compile(r"\[(?:/?INST\]|/?SYSTEM_PROMPT\]|TOOL_CALLS\]|gMASK\]|e~\[)|\]~!?b\]|\]~!b\[")
_CONTROL_CHARACTERS = bytes([*range(9), 11, 12, *range(14, 32), 127])


def control_string(text: str) -> str | None:
    """The first control string of any known family in `text`."""
    found = _ANGLED.search(text) if "<" in text else None
    if found is None and ("[" in text or "]" in text):
        found = _BRACKETED.search(text)
    return None if found is None else found[0]


def check_characters(place: str, text: str, reading: Reading) -> None:
    """Refuse a lone surrogate (an escape like `\\ud83d` without its partner): it is no character. Note others."""
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            "invalid_unicode",
            f"{place}: found a lone surrogate at character {error.start + 1}, which is no character.",
        ) from None
    if len(data.translate(None, _CONTROL_CHARACTERS)) != len(data):
        reading.noted("control_characters", f"{place}: a NUL or another control character, kept as it is.")


def check_data(place: str, text: str, reading: Reading) -> None:
    """Check a text that the model reads: what looks like a control token in it is data, and counted."""
    check_characters(place, text, reading)
    found = control_string(text)
    if found is not None:
        reading.noted("control_token_in_text", f"{place}: {found} is kept, as plain text.")


def check_written(place: str, text: str, reading: Reading) -> None:
    """Refuse a control string in a text that the model learns to write, unless the options keep it as plain text."""
    found = control_string(text)
    if found is None:
        return
    if not reading.options.plain_control_tokens:
        raise DataError(
            "control_token_in_answer",
            f"{place}: found the control string {found} inside the text, expected none in what the model writes. "
            "Remove it, or keep such strings as plain text with --plain_control_tokens.",
        )
    reading.noted("control_token_in_answer", f"{place}: {found} is kept, as plain text.")


def split_inline_reasoning(
    content: str, where: str = "content", tags: tuple[str, ...] = THINK_TAGS
) -> tuple[str | None, str]:
    """Take a leading `<think>…</think>` out of `content`: its text (None if blank or absent), and the rest.

    An opening tag that stood in the prompt may be missing. Raises DataError `unclosed_think`, `multiple_think`
    or `late_think`; the line breaks around the tags are markup and are left out.
    """
    opening, closing = tags
    opens, closes = content.count(opening), content.count(closing)
    if not opens and not closes:
        return None, content
    if opens > closes:
        raise DataError(
            "unclosed_think",
            f"{where}: a {opening} is never closed. Add the missing {closing}, or leave the row out.",
        )
    if closes > 1:
        raise DataError(
            "multiple_think", f"{where}: found {closes} think blocks, expected one at the start of the answer."
        )
    before, _, answer = content.partition(closing)
    head, opened, trace = before.partition(opening)
    if opened and head.strip():
        raise DataError("late_think", f"{where}: the think block begins after the answer: {show(head.strip())}.")
    if not opened:
        # Either the tag stood in the prompt (head is all of it), or `<think>` follows `</think>`.
        if opening in answer:
            raise DataError("unclosed_think", f"{where}: a {opening} follows {closing} and is never closed.")
        trace = head
    return _trimmed(trace, answer)


def _trimmed(trace: str, answer: str) -> tuple[str | None, str]:
    reasoning = trace.strip("\n")
    return (reasoning if reasoning.strip() else None), answer.lstrip("\n")


def take_inline_reasoning(content: str, place: str, reading: Reading) -> tuple[str | None, str]:
    """As `split_inline_reasoning`, with the tags and the leniency of the options, and with notes."""
    tags = reading.options.reasoning_tag_pair
    if not tags:
        _warn_of_other_tags(content, place, reading)
    if not tags or not any(tag in content for tag in tags):
        tags = THINK_TAGS
    opening, closing = tags
    if opening not in content and closing not in content:
        return None, content
    if reading.options.plain_control_tokens:
        head, _, rest = content.partition(opening)
        trace, closed, answer = rest.partition(closing)
        if head.strip() or not closed:
            return None, content
        reasoning, answer = _trimmed(trace, answer)
    else:
        reasoning, answer = split_inline_reasoning(content, place, tags)
    if opening not in content:
        reading.repaired("opened_in_prompt", f"{place}: {closing} without {opening}; what precedes it is reasoning.")
    elif reasoning is None:
        reading.repaired("blank_reasoning", f"{place}: the think block is blank, which is no reasoning.")
    return reasoning, answer


def _warn_of_other_tags(content: str, place: str, reading: Reading) -> None:
    start = content[:64].lstrip()
    if start.startswith(OTHER_REASONING_TAGS):
        tag = next(tag for tag in OTHER_REASONING_TAGS if start.startswith(tag))
        reading.noted("other_reasoning_tags", f"{place}: begins with {tag}, which is read as part of the answer.")
        _warn_once(tag)


@cache
def _warn_once(tag: str) -> None:
    logger.warning(
        "An answer begins with %s, which is read as part of the answer. If it opens the reasoning, name the tags: "
        "--reasoning_tags 'OPENING,CLOSING'.",
        tag,
    )
