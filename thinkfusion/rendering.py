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
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from thinkfusion.chat_templates import InstalledTemplate, check_control_tokens, installed_template
from thinkfusion.conversations import Conversation, DataError, Exchange, Message
from thinkfusion.modes import Mode, Scheme, split_soft_switch
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


_Joined = tuple[list[tuple[Any, bool]], str, int, bool]
"""Pieces (bytes, or the kind and text of what is yet to be encoded; and whether trained), and the text still open."""
_NOTHING_JOINED: _Joined = ([], "", START, False)


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
        self._dialect = template.dialect
        self._encoder = TextEncoder.of(tokenizer)
        # A server finds every token that the tokenizer knows in the markup of a template, and so do we; white space
        # is left to the text around it.
        tokens = {text: id_ for text, id_ in tokenizer.get_added_vocab().items() if text.strip()}
        self._control_bytes = {text: token_bytes(id_) for text, id_ in tokens.items()}
        longest_first = sorted(tokens, key=len, reverse=True)
        self._split_tokens = re.compile(f"({'|'.join(map(re.escape, longest_first))})").split
        self._shown: tuple[Conversation, list[list[Segment]]] | None = None
        self._markup_segments: dict[tuple[str, bool], list[Segment]] = {}

    def targets(self, conversation: Conversation) -> list[Target]:
        """The training sequences of a conversation, each (exchange, mode) of it in exactly one.

        Where history is rendered as non-thinking answers are (the control scheme of most dialects), all of these share
        one sequence; every thinking answer needs its own, since the reasoning of earlier exchanges is not shown.

        Raises DataError `parallel_tool_calls` for several calls in one step where the markup has no place for them.
        """
        self.check_calls(conversation.exchanges)
        wanted = [(index, mode) for index, exchange in enumerate(conversation.exchanges) for mode in exchange.modes]
        shared = [index for index, mode in wanted if mode is Mode.NON_THINKING]
        alone = self._dialect.answers_differ_in_history or not self.scheme.history_is_non_thinking
        if alone or len(shared) < 2:
            return [Target(index, mode, frozenset({index})) for index, mode in wanted]
        targets = [Target(index, mode, frozenset({index})) for index, mode in wanted if mode is not Mode.NON_THINKING]
        return [*targets, Target(max(shared), Mode.NON_THINKING, frozenset(shared))]

    def check_calls(self, exchanges: Iterable[Exchange]) -> None:
        """Raise DataError `parallel_tool_calls` for several calls in one step, where the markup has place for one."""
        for exchange in exchanges if self._dialect.calls.own_message else ():
            for step in (*exchange.steps, *exchange.alternative):
                if len(step.tool_calls) > 1:
                    raise DataError(
                        "parallel_tool_calls",
                        f"tool_calls: found {len(step.tool_calls)} calls in one message, but the markup "
                        f"{self._dialect.name} has one a message. Write each call and its result as messages of their "
                        "own.",
                    )

    def segments(self, conversation: Conversation, target: Target) -> list[Segment]:
        """The conversation up to the target's last exchange, neighbouring pieces not yet joined."""
        return [segment for part in self.parts(conversation, target) for segment in part]

    def parts(self, conversation: Conversation, target: Target) -> list[list[Segment]]:
        """The same in parts. Targets of one conversation share those of their history, as objects.

        A conversation of n turns has n thinking sequences, each with the history of the one before; what they share is
        made, and encoded, once.
        """
        last = conversation.exchanges[target.last]
        if len(target.trained) == 1:
            steps, ended = self._steps(last, target.mode, current=True, trained=True)
            parts = [*self._history_parts(conversation, target.last), steps]
        else:
            parts, ended = [self._opening(conversation)], False
            for index, exchange in enumerate(conversation.exchanges[: target.last + 1]):
                parts.append(self._user_of(conversation, index, ended=ended))
                current, trained = index == target.last, index in target.trained
                steps, ended = self._steps(exchange, target.mode, current=current, trained=trained)
                parts.append(steps)
        if ended:
            # The header of the next turn is what ends this one, and none follows.
            parts.append(self._markup(self._dialect.answer_end, True))
        return parts

    def _history_parts(self, conversation: Conversation, last: int) -> list[list[Segment]]:
        """What stands before the answer of the exchange `last`: its user's turn, and all before as history."""
        if self._shown is None or self._shown[0] is not conversation:
            self._shown = conversation, [[*self._opening(conversation), *self._user_of(conversation, 0)]]
        parts = self._shown[1]
        for index in range(len(parts), last + 1):
            before = conversation.exchanges[index - 1]
            history = self._steps(before, Mode.NON_THINKING, current=False, trained=False)[0]
            parts.append([*history, *self._user_of(conversation, index)])
        return parts[: last + 1]

    def _user_of(self, conversation: Conversation, index: int, *, ended: bool = False) -> list[Segment]:
        after_system = self._opens_with_system(conversation, index)
        return self._user(conversation.exchanges[index].user, after_system=after_system, ended=ended)

    def prompt_segments(self, conversation: Conversation, mode: Mode, pending: Sequence[Message]) -> list[Segment]:
        """The generation prompt of `mode` after `conversation` and the `pending` messages, that begin with a user."""
        waiting = Exchange(pending[0], tuple(pending[1:]))
        self.check_calls((*conversation.exchanges, waiting))
        segments = self._opening(conversation)
        for index, exchange in enumerate((*conversation.exchanges, waiting)):
            segments += self._user(exchange.user, after_system=self._opens_with_system(conversation, index))
            segments += self._steps(exchange, mode, current=exchange is waiting, trained=False)[0]
        header = self._assistant_open(after_tools=len(pending) > 1)
        return [*segments, *self._markup(header), *self._pieces(self.scheme.prefix(mode))]

    def _opening(self, conversation: Conversation) -> list[Segment]:
        dialect = self._dialect
        segments = [Segment(self.tokenizer.bos_token, control=True)] if self.template.bos else []
        segments += self._markup(dialect.opening)
        system = None if conversation.system is None else split_soft_switch(conversation.system)[0]
        tools_open = dialect.system_open if dialect.tools_open is None else dialect.tools_open
        tools_close = dialect.system_close if dialect.tools_close is None else dialect.tools_close
        if not conversation.tools:
            return segments + self._system(system)
        if dialect.tools_place == "inside":
            if system is not None:
                segments += [*self._markup(dialect.system_open), Segment(system + "\n\n")]
                tools_open = ""
            return [*segments, *self._markup(tools_open), *self._tools(conversation), *self._markup(tools_close)]
        turn = [*self._markup(tools_open), *self._tools(conversation), *self._markup(tools_close)]
        own = self._system(system)
        return segments + (turn + own if dialect.tools_place == "before" else own + turn)

    def _opens_with_system(self, conversation: Conversation, index: int) -> bool:
        return index == 0 and (conversation.system is not None or bool(conversation.tools))

    def _system(self, system: str | None) -> list[Segment]:
        if system is None:
            return []
        return [*self._markup(self._dialect.system_open), Segment(system), *self._markup(self._dialect.system_close)]

    def _tools(self, conversation: Conversation) -> list[Segment]:
        dialect = self._dialect
        segments = [*self._markup(dialect.tools_before)]
        for tool in conversation.tools:
            shown = tool.get("function", tool) if dialect.bare_signatures else tool
            segments += self._markup(dialect.signature_open)
            segments += [Segment(_json(shown)), *self._markup(dialect.signature_close)]
        return [*segments, *self._markup(dialect.tools_after)]

    def _user(self, message: Message, *, after_system: bool, ended: bool = False) -> list[Segment]:
        """A user's turn; `ended` puts the token that begins it into the loss, as the one that ended the turn before."""
        dialect = self._dialect
        after = dialect.user_open_after_system if after_system else None
        opened = self._markup(dialect.user_open if after is None else after, ended=ended)
        return [*opened, Segment(split_soft_switch(message.content)[0]), *self._markup(dialect.user_close)]

    def _assistant_open(self, *, after_tools: bool) -> str:
        dialect = self._dialect
        after = dialect.assistant_open_after_tools if after_tools else None
        return dialect.assistant_open if after is None else after

    def _steps(self, exchange: Exchange, mode: Mode, *, current: bool, trained: bool) -> tuple[list[Segment], bool]:
        """What answers a user, and whether the last answer is trained and still waits for the header that ends it."""
        segments: list[Segment] = []
        ended, called = False, ""
        steps = exchange.steps_in(mode if current else Mode.NON_THINKING)
        for index, step in enumerate(steps):
            if step.role == "tool":
                follows = index + 1 < len(steps) and steps[index + 1].role == "tool"
                segments += self._result(
                    step, called, first=steps[index - 1].role != "tool", last=not follows, ended=ended
                )
                ended = False
                continue
            step_segments, learns = self._step(
                step, mode, current=current, trained=trained, ends_only=exchange.ends_only
            )
            segments += [*self._markup(self._assistant_open(after_tools=index > 0)), *step_segments]
            ended = learns and self._dialect.ends_in_next_header
            called = step.tool_calls[-1]["name"] if step.tool_calls else called
        return segments, ended

    def _result(self, step: Message, called: str, *, first: bool, last: bool, ended: bool) -> list[Segment]:
        dialect = self._dialect
        segments = [*self._markup(dialect.results_open, ended=ended)] if first else []
        segments += self._markup(dialect.result_open)
        if dialect.after_result_name is not None:
            segments += [Segment(called), *self._markup(dialect.after_result_name)]
        segments += [Segment(step.content), *self._markup(dialect.result_close)]
        return [*segments, *self._markup(dialect.results_close)] if last else segments

    def _step(
        self, step: Message, mode: Mode, *, current: bool, trained: bool, ends_only: bool
    ) -> tuple[list[Segment], bool]:
        """What an assistant writes after its header, and whether the end of its turn is in the loss."""
        scheme, calls = self.scheme, self._dialect.calls
        thinks = current and mode is Mode.THINKING
        # A step that came without reasoning cannot teach a mode that reasons before every step.
        learns = trained and (not thinks or step.reasoning is not None)
        written = learns and not (thinks and ends_only)
        only_calls = calls.own_message and bool(step.tool_calls) and not step.content
        opening = calls.opening_after_text if step.content else calls.opening
        segments: list[Segment] = []
        if thinks and step.reasoning is not None:
            segments += self._pieces(scheme.thinking_prefix)
            segments += self._pieces(scheme.thinking_start, written)
            segments.append(Segment(step.reasoning, trained=written))
            segments += [] if only_calls else self._pieces(scheme.thinking_end, written)
        elif current and not thinks:
            segments += self._pieces(scheme.non_thinking_prefix)
        elif only_calls:
            # The call is the message that the header has opened.
            opening = ""
        else:
            segments += self._pieces(scheme.history_prefix)
        segments.append(Segment(step.content, trained=written))
        if step.tool_calls:
            segments += self._calls(step.tool_calls, opening, written)
        if learns and not written:
            segments = _with_closing_trained(segments, scheme.closing_token)
        return segments + self._end(called=bool(step.tool_calls), current=current, trained=learns), learns

    def _calls(self, given: Sequence[dict[str, Any]], opening: str, trained: bool) -> list[Segment]:
        calls = self._dialect.calls
        segments: list[Segment] = []
        for number, call in enumerate(given):
            name = _json(call["name"]) if calls.quoted_name else call["name"]
            segments += self._markup((calls.between if number else opening) + calls.call_open, trained)
            segments += [Segment(name, trained=trained), *self._markup(calls.after_name, trained)]
            if calls.argument is None:
                segments.append(Segment(_json(call["arguments"]), trained=trained))
            else:
                segments += self._tagged_arguments(call["arguments"], calls.argument, trained)
            segments += self._markup(calls.call_close, trained)
        return [*segments, *self._markup(calls.closing, trained)]

    def _tagged_arguments(self, given: dict[str, Any], tags: tuple[str, str, str], trained: bool) -> list[Segment]:
        segments: list[Segment] = []
        for key, value in given.items():
            text = value if isinstance(value, str) else _json(value)
            segments += [*self._markup(tags[0], trained), Segment(key, trained=trained)]
            segments += [*self._markup(tags[1], trained), Segment(text, trained=trained)]
            segments += self._markup(tags[2], trained)
        return segments

    def _end(self, *, called: bool, current: bool, trained: bool) -> list[Segment]:
        dialect = self._dialect
        if dialect.ends_in_next_header:
            return []
        end = dialect.call_end if called else dialect.answer_end if current else dialect.history_end
        return [*self._markup(end, trained), *self._markup(dialect.gap)]

    def _pieces(self, pieces: Iterable[str], trained: bool = False) -> list[Segment]:
        return self._markup("".join(pieces), trained)

    def _markup(self, text: str, trained: bool = False, *, ended: bool = False) -> list[Segment]:
        """Markup as segments: control where it is a token of the tokenizer. `ended` trains its first token."""
        if (text, trained) not in self._markup_segments:
            pieces = [piece for piece in self._split_tokens(text) if piece]
            self._markup_segments[text, trained] = [
                Segment(piece, piece in self._control_bytes, trained) for piece in pieces
            ]
        segments = self._markup_segments[text, trained]
        return [segments[0]._replace(trained=True), *segments[1:]] if ended else segments

    def encode(self, rendered: Sequence[list[Segment]]) -> list[tuple[list[int], list[bool]]]:
        """Ids and trained flags of each list of segments; all text is tokenised in one batch."""
        results = []
        for pieces in self.encode_parts([[segments] for segments in rendered]):
            ids = memoryview(b"".join([piece for piece, _ in pieces])).cast("i").tolist()
            flags = [flag for piece, trained in pieces for flag in (trained,) * (len(piece) // TOKEN_BYTES)]
            results.append((ids, flags))
        return results

    def encode_parts(self, rendered: Sequence[Sequence[list[Segment]]]) -> list[list[tuple[bytes, bool]]]:
        """For each list of parts its pieces, in order: their ids, as bytes of 32-bit integers, and whether trained.

        Neighbouring text of one kind is joined, as a template joins it before it is tokenised; it is split where the
        loss begins, because there inference splits prompt and reply. Markup that the tokenizer does not know as a
        token is text.
        """
        wanted = self._encoder.kinds()
        begun: dict[tuple[int, int], _Joined] = {}
        joined = []
        for parts in rendered:
            state = _NOTHING_JOINED
            for part in parts[:-1]:
                key = (id(state), id(part))
                if key not in begun:
                    begun[key] = self._join(state, part, wanted)
                state = begun[key]
            pieces, text, kind, trained = self._join(state, parts[-1], wanted)
            if text:
                pieces.append(((kind, text), trained))
                wanted[kind][text] = b""
            joined.append(pieces)
        self._encoder.fill(wanted)
        return [
            [(piece if piece.__class__ is bytes else wanted[piece[0]][piece[1]], trained) for piece, trained in pieces]
            for pieces in joined
        ]

    def _join(self, state: _Joined, part: list[Segment], wanted: Sequence[dict[str, bytes]]) -> _Joined:
        """What was joined so far, and one more part of it; the text that is still open ends with the part after."""
        control = self._control_bytes
        pieces, text, kind, kept = list(state[0]), *state[1:]
        for given, is_control, trained in part:
            if is_control and given in control:
                if text:
                    pieces.append(((kind, text), kept))
                    wanted[kind][text] = b""
                pieces.append((control[given], trained))
                text, kind = "", AFTER_CONTROL
            elif text and trained != kept:
                pieces.append(((kind, text), kept))
                wanted[kind][text] = b""
                text, kind, kept = given, AFTER_TEXT, trained
            else:
                text, kept = text + given, trained
        return pieces, text, kind, kept

    def token_ends(self, text: str) -> list[int]:
        """For each token of `text`, alone and as ordinary text, the character at which it ends."""
        return self._encoder.token_ends(text)

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
        texts = _json([*map(conversation.to_messages, Mode), conversation.tools])
        if any(token in texts for token in self._control_bytes):
            return
        for target in self.targets(conversation):
            shown = replace(conversation, exchanges=conversation.exchanges[: target.last + 1])
            expected = self.tokenizer.apply_chat_template(
                shown.to_messages(target.mode),
                tools=list(shown.tools) or None,
                enable_thinking=target.mode is Mode.THINKING,
                tokenize=False,
            )
            if self._dialect.ends_in_next_header:
                expected += self._dialect.answer_end
            segments = self.segments(conversation, target)
            text = "".join(segment.text for segment in segments)
            ids, _ = self.encode([[segment._replace(trained=False) for segment in segments]])[0]
            if text != expected or ids != self.tokenizer(expected, add_special_tokens=False)["input_ids"]:
                raise DataError(
                    "template_mismatch",
                    f"the rendering differs from the chat template's.\nours:     {text!r}\ntemplate: {expected!r}\n"
                    "Has the template or the tokenizer been changed since install_chat_template?",
                )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _with_closing_trained(segments: list[Segment], closing: str) -> list[Segment]:
    # The first of its kind: what precedes it is the prompt, the reasoning, and an opening tag.
    place = next(index for index, segment in enumerate(segments) if segment.control and segment.text == closing)
    return [*segments[:place], segments[place]._replace(trained=True), *segments[place + 1 :]]


def _without_tail(ids: list[int], trained: list[bool]) -> tuple[list[int], list[bool]]:
    """Cut what follows the last trained token: nothing there is learned from or looked at."""
    last = max((index for index, is_trained in enumerate(trained) if is_trained), default=len(ids) - 1)
    return ids[: last + 1], trained[: last + 1]


def render(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase | Renderer, mode: Mode | str | bool
) -> Rendered:
    """Render the last exchange of a conversation in `mode`, with what precedes it as history.

    For many rows give a Renderer of the tokenizer, which reads the vocabulary once. Returns ids and trained flags of
    equal lengths, up to and with the end-of-turn token. Raises DataError `missing_reasoning` for thinking mode without
    a reasoning to train on, ValueError for an unknown mode or a tokenizer without our template.
    """
    mode = Mode.parse(mode)
    last = len(conversation.exchanges) - 1
    if mode is Mode.THINKING and not conversation.exchanges[last].has_reasoning:
        raise DataError("missing_reasoning", "the last exchange has no reasoning to render in thinking mode.")
    renderer = tokenizer if isinstance(tokenizer, Renderer) else Renderer(tokenizer)
    renderer.check_calls(conversation.exchanges)
    segments = renderer.segments(conversation, Target(last, mode, frozenset({last})))
    return Rendered(*_without_tail(*renderer.encode([segments])[0]), mode)
