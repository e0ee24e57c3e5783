# SPDX-License-Identifier: Apache-2.0
"""What a served reply was, as far as it can be told from outside.

Where a server splits replies, the tokens that a class is told by are gone. What is left is read so that nothing is
called right that may not be: two classes that look alike are counted as one of them, which is said; a reply whose
trace the server keeps to itself is `unseen`, and a prompt without a reply `unanswered`: both are in no share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from thinkfusion.endpoint import Answer
from thinkfusion.endpoint_presets import Switch
from thinkfusion.intervals import mean_interval, wilson_interval
from thinkfusion.modes import THINK_CLOSE, THINK_OPEN, Mode, Reply, split_reply

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_TAGS = (THINK_OPEN, THINK_CLOSE)
_HIDDEN_BYTES = 16
"""Every token of an answer writes a byte at least; so many more tokens than bytes were written where none can see."""
_FAR_APART = 0.5


def shows_reasoning(answer: Answer) -> bool:
    """Whether a trace, or a tag of one, is in the reply."""
    return bool(answer.reasoning) or any(tag in answer.content for tag in _TAGS)


def read_answer(
    answer: Answer, mode: Mode | None, switch: Switch, tokenizer: Tokenizer | None = None, *, hides: bool = True
) -> Reply:
    """The reply of a request in `mode`, in one of REPLY_CLASSES or ENDPOINT_CLASSES; it never fails.

    mode: None for a request without a switch, whose reply is in the mode that it shows. hides: whether the server has
    shown no trace in any reply; only then is one without a trace taken for `unseen` where its usage has more tokens.
    (vLLM 0.32 counts answers as reasoning tokens where its parser follows another switch than the template.)

    Tokens are counted by `tokenizer` if it is given, else taken from the server's usage: the reasoning's own count, or
    else the whole shared out by the length of the parts. They are None where the server tells none.
    """
    hidden = hides and _hidden(answer)
    if mode is None:
        mode = Mode.THINKING if hidden or shows_reasoning(answer) else Mode.NON_THINKING
    if answer.problem is not None:
        return Reply(mode=mode, reasoning="", answer="", kind="unanswered", finished=False)
    if not answer.reasoning and shows_reasoning(answer):
        reply = split_reply(answer.content, mode, scheme=switch.scheme, finished=answer.finished)
        return _counted(reply, answer, tokenizer)
    reasoning, text = (answer.reasoning or "").strip(), answer.content.strip()
    kind = _kind(reasoning, text, mode, finished=answer.finished, both_reason=switch.both_reason)
    if kind == "empty_trace" and hidden:
        kind = "unseen"
    reply = Reply(mode=mode, reasoning=reasoning, answer=text, kind=kind, finished=answer.finished)
    return _counted(reply, answer, tokenizer)


def _kind(reasoning: str, text: str, mode: Mode, *, finished: bool, both_reason: bool) -> str:
    if any(tag in part for part in (reasoning, text) for tag in _TAGS):
        return "extra_tag"
    if mode is Mode.NON_THINKING and reasoning and not both_reason:
        return "extra_tag"
    if not finished:
        return "truncated"
    if mode is Mode.THINKING and not reasoning and text and not both_reason:
        return "empty_trace"
    if not text:
        return "never_closed" if reasoning else "empty_answer"
    return "ok"


def _hidden(answer: Answer) -> bool:
    """Whether usage tells of a trace that the server did not send."""
    if answer.reasoning_tokens:
        return True
    return (answer.completion_tokens or 0) > len(answer.content.encode()) + _HIDDEN_BYTES


def _counted(reply: Reply, answer: Answer, tokenizer: Tokenizer | None) -> Reply:
    counts: tuple[int | None, int | None] = None, None
    if tokenizer is not None:
        first, second = (len(tokenizer.encode(part, add_special_tokens=False).ids) for part in reply)
        counts = first, second
    elif answer.completion_tokens is not None:
        thought = answer.reasoning_tokens
        if thought is None or (reply.reasoning and not thought):
            sizes = [len(part.encode()) for part in reply]
            thought = round(answer.completion_tokens * sizes[0] / (sum(sizes) or 1))
        counts = thought, max(0, answer.completion_tokens - thought)
    return Reply(
        mode=reply.mode,
        reasoning=reply.reasoning,
        answer=reply.answer,
        kind=reply.kind,
        finished=reply.finished,
        reasoning_tokens=counts[0],
        answer_tokens=counts[1],
        pieces=reply.pieces,
    )


def reasons(reply: Reply) -> bool:
    """Whether a reply reasoned, seen or unseen."""
    return bool(reply.reasoning) or reply.kind == "unseen"


def alike(replies: Mapping[Mode, Sequence[Reply]], *, both_reason: bool = False) -> str | None:
    """Why it cannot be told that anything switches, or None.

    Modes are alike where the Wilson intervals of the shares of replies that reason overlap, and the shares are less
    than a half apart; levels of effort where the intervals of the mean lengths overlap.
    """
    given = {mode: [reply for reply in replies[mode] if reply.kind != "unanswered"] for mode in Mode}
    if not all(given.values()):
        return None
    if both_reason:
        lengths = {
            mode: [
                float((reply.reasoning_tokens or 0) + (reply.answer_tokens or 0))
                if reply.answer_tokens is not None
                # Without counts, as many words.
                else float(len(f"{reply.reasoning} {reply.answer}".split()))
                for reply in own
            ]
            for mode, own in given.items()
        }
        means = [sum(own) / len(own) for own in lengths.values()]
        (low, _), (_, high) = (mean_interval(own) for own in lengths.values())
        if low > high:
            return None
        return f"Their replies are {means[0]:.1f} and {means[1]:.1f} tokens long on average"
    counts = {mode: (sum(map(reasons, own)), len(own)) for mode, own in given.items()}
    (low, _), (_, high) = (wilson_interval(*count) for count in counts.values())
    shares = [some / every for some, every in counts.values()]
    if low > high or shares[0] - shares[1] >= _FAR_APART:
        return None
    (first, all_first), (second, all_second) = counts.values()
    return (
        f"{first:,} of {all_first:,} replies in thinking mode reason, "
        f"and {second:,} of {all_second:,} in non-thinking mode"
    )


def remarks(replies: Mapping[Mode, Sequence[Reply]], answers: Sequence[Answer], switch: Switch) -> Iterator[str]:
    """What cannot be seen from outside in these replies, and how it is counted."""
    parsed = any(answer.reasoning for answer in answers)
    tagged = any(map(shows_reasoning, answers))
    if switch.both_reason:
        yield "Of levels of effort only the lengths are compared: replies of both may reason."
    elif parsed:
        yield (
            "The server splits replies, so some classes cannot be told apart from outside: reasoning without an answer "
            "(never_closed or empty_answer) counts as never_closed, an answer without reasoning (empty_trace or "
            "never_closed) as empty_trace; an extra tag is seen only where the server leaves it in a text."
        )
    elif not tagged and not any(reply.kind == "unseen" for reply in replies[Mode.THINKING]):
        yield (
            "No reply showed reasoning or a tag: a trace that the server takes away without counting it would not be "
            "seen. Start the server with its reasoning parser."
        )
    hidden = sum(reply.kind == "unseen" for own in replies.values() for reply in own)
    if hidden:
        yield f"{hidden:,} replies reasoned where the server does not show it: their mode is not judged."
