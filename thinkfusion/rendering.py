# SPDX-License-Identifier: Apache-2.0
"""From conversations to token ids and loss masks: the only place that emits control ids.

A conversation is rendered as segments `(text, control, trained)`. Control segments become control tokens, text
segments are always encoded as ordinary text, whatever strings they hold, so that a `</think>` in a user's text can
neither open nor close anything. The contract (tested as a matrix): what precedes the first trained token is the
generation prompt, id for id; the loss covers what the model writes in that mode, its end-of-turn token included;
earlier exchanges stand as inference shows them, without their reasoning.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from thinkfusion.conversations import Conversation, DataError, Exchange, Message
from thinkfusion.dialects import TOOL_TAGS, InstalledTemplate, check_control_tokens, installed_template
from thinkfusion.modes import CONTROL, EMPTY_BLOCK, THINK_CLOSE, THINK_OPEN, Mode, Scheme, split_soft_switch
from thinkfusion.tokenising import AFTER_CONTROL, AFTER_TEXT, START, TOKEN_BYTES, TextEncoder, token_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token without loss."""


class Segment(NamedTuple):
    """A piece of a rendered conversation. `control` text is markup, never data; `trained` text is in the loss."""

    text: str
    control: bool = False
    trained: bool = False


@dataclass(frozen=True)
class Rendered:
    """One training sequence: `ids` and `trained` have equal lengths; `mode` is that of the trained answers."""

    ids: list[int]
    trained: list[bool]
    mode: Mode

    @property
    def labels(self) -> list[int]:
        """The ids where trained, -100 elsewhere."""
        return [token if trained else IGNORED for token, trained in zip(self.ids, self.trained, strict=True)]


@dataclass(frozen=True)
class Target:
    """What one training sequence shows: the exchanges up to `last`, with loss on the `trained` ones in `mode`."""

    last: int
    mode: Mode
    trained: frozenset[int]


class Renderer:
    """Renders conversations for one tokenizer, whose chat template `install_chat_template` made.

    Raises ValueError if the template is another one or a control token is missing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        template = installed_template(tokenizer)
        if template is None:
            raise ValueError(
                "the tokenizer's chat template was not made by thinkfusion; call "
                "install_chat_template(tokenizer, model) first."
            )
        check_control_tokens(tokenizer, template.dialect)
        self.tokenizer = tokenizer
        self.template: InstalledTemplate = template
        self.scheme: Scheme = template.scheme
        self._encoder = TextEncoder(tokenizer)
        markup = (*template.dialect.control_tokens, *TOOL_TAGS)
        self._control_ids = {text: id_ for text, id_ in tokenizer.get_added_vocab().items() if text in markup}
        if template.bos:
            self._control_ids[tokenizer.bos_token] = tokenizer.bos_token_id
        self._control_bytes = {text: token_bytes(id_) for text, id_ in self._control_ids.items()}

    def targets(self, conversation: Conversation) -> list[Target]:
        """The training sequences of a conversation, each (exchange, mode) of it in exactly one.

        With the control scheme all non-thinking answers share one sequence, since history is rendered as they
        are; every thinking answer needs its own, since the reasoning of earlier exchanges is not shown.
        """
        wanted = [(index, mode) for index, exchange in enumerate(conversation.exchanges) for mode in exchange.modes]
        shared = [index for index, mode in wanted if mode is Mode.NON_THINKING]
        if not self.scheme.history_is_non_thinking or len(shared) < 2:
            return [Target(index, mode, frozenset({index})) for index, mode in wanted]
        targets = [Target(index, mode, frozenset({index})) for index, mode in wanted if mode is not Mode.NON_THINKING]
        return [*targets, Target(max(shared), Mode.NON_THINKING, frozenset(shared))]

    def segments(self, conversation: Conversation, target: Target) -> list[Segment]:
        """The conversation up to the target's last exchange, neighbouring pieces not yet joined."""
        segments = self._opening(conversation)
        for index, exchange in enumerate(conversation.exchanges[: target.last + 1]):
            current = index == target.last
            segments += self._user(exchange.user)
            segments += self._steps(exchange, target.mode, current=current, trained=index in target.trained)
        return segments

    def prompt_segments(self, conversation: Conversation, mode: Mode, pending: Sequence[Message]) -> list[Segment]:
        """The generation prompt of `mode` after `conversation` and the `pending` messages, that begin with a user."""
        segments = self._opening(conversation)
        for exchange in conversation.exchanges:
            segments += self._user(exchange.user)
            segments += self._steps(exchange, mode, current=False, trained=False)
        segments += self._user(pending[0])
        segments += self._steps(Exchange(pending[0], tuple(pending[1:])), mode, current=True, trained=False)
        return [*segments, *self._header("assistant"), *self._pieces(self.scheme.prefix(mode))]

    def _opening(self, conversation: Conversation) -> list[Segment]:
        dialect = self.template.dialect
        segments = [Segment(self.tokenizer.bos_token, control=True)] if self.template.bos else []
        system = None if conversation.system is None else split_soft_switch(conversation.system)[0]
        if conversation.tools:
            segments += self._header("system")
            if system is not None:
                segments.append(Segment(system + "\n\n"))
            segments += self._markup(dialect.tools_before)
            segments += [Segment("\n" + json.dumps(tool, ensure_ascii=False)) for tool in conversation.tools]
            segments += [*self._markup(dialect.tools_after), *self._close()]
        elif system is not None:
            segments += [*self._header("system"), Segment(system), *self._close()]
        return segments

    def _user(self, message: Message) -> list[Segment]:
        return [*self._header("user"), Segment(split_soft_switch(message.content)[0]), *self._close()]

    def _steps(self, exchange: Exchange, mode: Mode, *, current: bool, trained: bool) -> list[Segment]:
        segments: list[Segment] = []
        for index, step in enumerate(exchange.steps):
            if step.role == "tool":
                if exchange.steps[index - 1].role != "tool":
                    segments += [Segment(self.template.dialect.turn_open, control=True), Segment("user")]
                segments += self._markup("\n<tool_response>\n")
                segments += [Segment(step.content), *self._markup("\n</tool_response>")]
                if index + 1 == len(exchange.steps) or exchange.steps[index + 1].role != "tool":
                    segments += self._close()
                continue
            segments += self._header("assistant")
            thinks = current and mode is Mode.THINKING
            if thinks and step.reasoning is not None:
                segments += self._pieces(self.scheme.thinking_prefix)
                segments += self._pieces(self.scheme.thinking_start, trained)
                segments.append(Segment(step.reasoning, trained=trained))
                segments += self._pieces(self.scheme.thinking_end, trained)
                learns = trained
            elif current and not thinks:
                segments += self._pieces(self.scheme.non_thinking_prefix)
                learns = trained
            else:
                segments += self._pieces(self.scheme.history_prefix)
                # A step that came without reasoning cannot teach a mode that reasons before every step.
                learns = trained and not thinks
            segments.append(Segment(step.content, trained=learns))
            for number, call in enumerate(step.tool_calls):
                between = "\n" if step.content or number else ""
                name = json.dumps(call["name"], ensure_ascii=False)
                arguments = json.dumps(call["arguments"], ensure_ascii=False)
                segments += self._markup(f"{between}<tool_call>\n", learns)
                segments.append(Segment(f'{{"name": {name}, "arguments": {arguments}}}', trained=learns))
                segments += self._markup("\n</tool_call>", learns)
            segments += self._close(learns)
        return segments

    def _header(self, role: str) -> list[Segment]:
        return [Segment(self.template.dialect.turn_open, control=True), Segment(f"{role}\n")]

    def _close(self, trained: bool = False) -> list[Segment]:
        return [Segment(self.template.dialect.turn_close, control=True, trained=trained), Segment("\n")]

    def _pieces(self, pieces: Iterable[str], trained: bool = False) -> list[Segment]:
        return [Segment(piece, piece in (THINK_OPEN, THINK_CLOSE), trained) for piece in pieces]

    def _markup(self, text: str, trained: bool = False) -> list[Segment]:
        """Our own markup around tools: its tags are tokens of their own where the tokenizer has them."""
        pieces = [text]
        for tag in TOOL_TAGS:
            pieces = [part for piece in pieces for part in _split_keeping(piece, tag)]
        return [Segment(piece, piece in TOOL_TAGS, trained) for piece in pieces if piece]

    def encode(self, rendered: Sequence[Iterable[Segment]]) -> list[tuple[list[int], list[bool]]]:
        """Ids and trained flags of each list of segments; all text is tokenised in one batch."""
        results = []
        for pieces in self.encode_pieces(rendered):
            ids = memoryview(b"".join([piece for piece, _ in pieces])).cast("i").tolist()
            flags = [flag for piece, trained in pieces for flag in (trained,) * (len(piece) // TOKEN_BYTES)]
            results.append((ids, flags))
        return results

    def encode_pieces(self, rendered: Sequence[Iterable[Segment]]) -> list[list[tuple[bytes, bool]]]:
        """For each list of segments its pieces, in order: their ids, as bytes of 32-bit integers, and whether trained.

        Neighbouring text of one kind is joined, as a template joins it before it is tokenised; it is split where the
        loss begins, because there inference splits prompt and reply. Markup that the tokenizer does not know as a
        token is text.
        """
        control, wanted = self._control_bytes, self._encoder.kinds()
        joined: list[list[tuple[bytes | tuple[int, str], bool]]] = []
        for segments in rendered:
            pieces: list[tuple[bytes | tuple[int, str], bool]] = []
            text, kind, kept = "", START, False
            for part, is_control, trained in segments:
                if is_control and part in control:
                    if text:
                        pieces.append(((kind, text), kept))
                        wanted[kind][text] = b""
                    pieces.append((control[part], trained))
                    text, kind = "", AFTER_CONTROL
                elif trained != kept and text:
                    pieces.append(((kind, text), kept))
                    wanted[kind][text] = b""
                    text, kind, kept = part, AFTER_TEXT, trained
                else:
                    text, kept = text + part, trained
            if text:
                pieces.append(((kind, text), kept))
                wanted[kind][text] = b""
            joined.append(pieces)
        self._encoder.fill(wanted)
        return [
            [(piece if isinstance(piece, bytes) else wanted[piece[0]][piece[1]], trained) for piece, trained in pieces]
            for pieces in joined
        ]

    def render(self, conversations: Sequence[Conversation]) -> list[list[Rendered]]:
        """All training sequences of each conversation (see `targets`)."""
        targets = [(number, target) for number, each in enumerate(conversations) for target in self.targets(each)]
        encoded = self.encode([self.segments(conversations[number], target) for number, target in targets])
        rendered: list[list[Rendered]] = [[] for _ in conversations]
        for (number, target), (ids, trained) in zip(targets, encoded, strict=True):
            rendered[number].append(Rendered(*_without_tail(ids, trained), target.mode))
        return rendered

    def check_against_template(self, conversation: Conversation) -> None:
        """Compare each sequence of a conversation with the Jinja template, which is what servers run.

        Raises DataError `template_mismatch`, showing both renderings. A conversation with control strings in its
        texts is not compared, since a template cannot tell them from markup.
        """
        markup = {*self._control_ids, *self.tokenizer.get_added_vocab()}
        if any(text in json.dumps(conversation.to_messages(), ensure_ascii=False) for text in markup):
            return
        for target in self.targets(conversation):
            shown = replace(conversation, exchanges=conversation.exchanges[: target.last + 1])
            expected = self.tokenizer.apply_chat_template(
                shown.to_messages(),
                tools=list(shown.tools) or None,
                enable_thinking=target.mode is Mode.THINKING,
                tokenize=False,
            )
            segments = self.segments(conversation, target)
            text = "".join(segment.text for segment in segments)
            ids, _ = self.encode([[segment._replace(trained=False) for segment in segments]])[0]
            if text != expected or ids != self.tokenizer(expected, add_special_tokens=False)["input_ids"]:
                raise DataError(
                    "template_mismatch",
                    f"the rendering differs from the chat template's.\nours:     {text!r}\ntemplate: {expected!r}\n"
                    "Has the template or the tokenizer been changed since install_chat_template?",
                )


def _split_keeping(text: str, separator: str) -> list[str]:
    pieces = text.split(separator)
    return [part for piece in pieces[:-1] for part in (piece, separator)] + pieces[-1:]


def _without_tail(ids: list[int], trained: list[bool]) -> tuple[list[int], list[bool]]:
    """Cut what follows the last trained token: nothing there is learned from or looked at."""
    last = max((index for index, is_trained in enumerate(trained) if is_trained), default=len(ids) - 1)
    return ids[: last + 1], trained[: last + 1]


def render(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, mode: Mode | str | bool) -> Rendered:
    """Render the last exchange of a conversation in `mode`, with what precedes it as history.

    Returns ids and trained flags of equal lengths, up to and with the end-of-turn token. Raises DataError
    `missing_reasoning` for thinking mode without a reasoning to train on, ValueError for an unknown mode or a
    tokenizer without our template.
    """
    mode = Mode.parse(mode)
    last = len(conversation.exchanges) - 1
    if mode is Mode.THINKING and not conversation.exchanges[last].has_reasoning:
        raise DataError("missing_reasoning", "the last exchange has no reasoning to render in thinking mode.")
    renderer = Renderer(tokenizer)
    segments = renderer.segments(conversation, Target(last, mode, frozenset({last})))
    return Rendered(*_without_tail(*renderer.encode([segments])[0]), mode)


def scheme_of(tokenizer: PreTrainedTokenizerBase) -> Scheme:
    """The scheme of any switchable chat template, ours or not, told from what its prompts end in.

    Raises ValueError if the template is missing or both modes have the same prompt.
    """
    template = installed_template(tokenizer)
    if template is not None:
        return template.scheme
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; call install_chat_template(tokenizer, model) first.")
    thinking, non_thinking = (_template_prompt(tokenizer, mode) for mode in (Mode.THINKING, Mode.NON_THINKING))
    if thinking == non_thinking:
        raise ValueError("the tokenizer's chat template has no thinking switch: both modes have the same prompt.")
    # Where the prompt opens the trace itself, the reply is read as with `control`: it begins inside the trace.
    return CONTROL if thinking.rstrip().endswith(THINK_OPEN) else EMPTY_BLOCK


def _template_prompt(tokenizer: PreTrainedTokenizerBase, mode: Mode) -> str:
    switch = mode is Mode.THINKING
    messages = [{"role": "user", "content": "a"}]
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=switch, thinking=switch
    )
    return str(text)


def trained_counts(rendered: Iterable[Rendered]) -> dict[Mode, int]:
    """Trained tokens by mode."""
    counts = dict.fromkeys(Mode, 0)
    for sequence in rendered:
        counts[sequence.mode] += sum(sequence.trained)
    return counts


def steps_without_reasoning(conversation: Conversation) -> int:
    """Assistant steps of thinking exchanges that came without reasoning and are therefore context only."""
    return sum(
        step.role == "assistant" and step.reasoning is None
        for exchange in conversation.exchanges
        if Mode.THINKING in exchange.modes and exchange.has_reasoning
        for step in exchange.steps
    )
