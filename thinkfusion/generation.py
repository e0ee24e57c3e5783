# SPDX-License-Identifier: Apache-2.0
"""Replying in a mode: one conversation, a batch, or a stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple

from thinkfusion.chat_templates import installed_template, scheme_of
from thinkfusion.conversations import Conversation, DataError, Message, MessageOptions
from thinkfusion.modes import (
    THINK_CLOSE,
    THINK_OPEN,
    Mode,
    Reply,
    Scheme,
    end_ids,
    get_scheme,
    reply_tags,
    split_reply,
    split_soft_switch,
)
from thinkfusion.rendering import Renderer
from thinkfusion.sampling_defaults import SamplingDefaults, generation_defaults

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]


def choose_mode(messages: Messages, mode: Mode | str | bool | None, default: Mode = Mode.THINKING) -> Mode:
    """The mode of the next reply: `mode` if given, else the latest `/think` or `/no_think`, else `default`."""
    if mode is not None:
        return Mode.parse(mode)
    for message in reversed(messages):
        if message.get("role") in ("user", "system") and isinstance(message.get("content"), str):
            asked = split_soft_switch(message["content"])[1]
            if asked is not None:
                return asked
    return default


class Prompter:
    """Makes prompts for one tokenizer; keeps what is costly to build.

    With a template of ours, texts of the messages are data: control strings in them stay ordinary text. With any
    other template, `apply_chat_template` is used with both names of the switch.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.scheme: Scheme = scheme_of(tokenizer)
        template = installed_template(tokenizer)
        self.default_mode = template.default_mode if template else Mode.THINKING
        self._renderer = Renderer(tokenizer) if template else None

    def prompt_ids(self, messages: Messages, mode: Mode, tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """The ids of the generation prompt of `mode`. Raises DataError for messages that are no conversation."""
        if not messages:
            raise DataError("empty_conversation", "messages: found none, expected at least one user message.")
        if self._renderer is None:
            switch = mode is Mode.THINKING
            prompt = self.tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                add_generation_prompt=True,
                enable_thinking=switch,
                thinking=switch,
                return_dict=True,
            )
            return list(prompt["input_ids"])
        history, pending = split_pending(messages, tools)
        return self._renderer.encode([self._renderer.prompt_segments(history, mode, pending)])[0][0]


def split_pending(
    messages: Messages, tools: Sequence[Mapping[str, Any]] | None = None
) -> tuple[Conversation, list[Message]]:
    """The finished exchanges, and the messages from the last user message on that wait for a reply.

    Raises DataError if the messages are no conversation that ends with a user message or a tool result.
    """
    # An answer is put in the place of the one that is to come, so that one reader checks all conversations.
    shown = [*messages, {"role": "assistant", "content": "…"}]
    # What a model once wrote is history, whatever strings it holds; they are encoded as text.
    options = MessageOptions(plain_control_tokens=True)
    conversation = Conversation.from_messages([as_read(message) for message in shown], tools=tools, options=options)
    last = conversation.exchanges[-1]
    history = Conversation(conversation.exchanges[:-1], conversation.system, conversation.tools)
    return history, [last.user, *last.steps[:-1]]


def as_read(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message as the model reads it: text parts joined, the soft switch taken out."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, list) and all(isinstance(part, Mapping) and "text" in part for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        return message
    return {**message, "content": content if message.get("role") == "assistant" else split_soft_switch(content)[0]}


def reply(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages | str,
    *,
    mode: Mode | str | bool | None = None,
    thinking_budget: int | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    max_new_tokens: int = 1024,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    **options: Any,
) -> Reply:
    """Reply to `messages` (or to one user message, given as text), split into reasoning and answer.

    Without `mode`, the latest soft switch in the messages decides, and else the template's default.
    `thinking_budget` closes the reasoning after so many tokens (see `ThinkingBudget`). A temperature of 0 is greedy
    decoding; what is None of temperature, top_p and top_k is taken from the checkpoint's defaults of the mode, and is
    0, 1 and 0 if it has none. Other `options` are arguments of `model.generate`, such as `num_beams`. The prompt comes
    from the messages with their texts as data (see `Prompter`).

    Raises DataError if the messages are no conversation that ends with a user message or a tool result, ValueError
    for an unknown mode, a template without a switch, a bad budget, or more than one reply (see `replies`).
    """
    if options.get("num_return_sequences", 1) != 1:
        raise ValueError("num_return_sequences: reply gives one reply. Use replies([messages], …), which gives all.")
    return replies(
        model,
        tokenizer,
        [messages],
        mode=mode,
        thinking_budget=thinking_budget,
        tools=tools,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        **options,
    )[0]


def replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Messages | str],
    *,
    mode: Mode | str | bool | Sequence[Mode | str | bool | None] | None = None,
    thinking_budget: int | Sequence[int | None] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    max_new_tokens: int = 1024,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    batch_size: int = 32,
    **options: Any,
) -> list[Reply]:
    """Reply to several conversations, `batch_size` at a time in left-padded batches; in their order.

    `mode` and `thinking_budget` are for all of them, or a sequence with one for each. Everything else is as with
    `reply`. With `num_return_sequences`, the replies to one conversation follow each other. Conversations of similar
    length share a batch; modes do as well, unless they sample in different ways.

    Raises what `reply` raises, and ValueError for sequences of another length than `conversations`.
    """
    if isinstance(conversations, str):
        raise ValueError("conversations: found one text, expected a list of conversations. Use reply for one.")
    if batch_size < 1:
        raise ValueError(f"batch_size: found {batch_size}, expected at least 1.")
    modes = _for_each(mode, len(conversations), "mode")
    budgets = _for_each(thinking_budget, len(conversations), "thinking_budget")
    prompter, defaults = Prompter(tokenizer), generation_defaults(model)
    # Rows that are sampled alike can share a batch; sorted by length, little of it is padding.
    groups: dict[Sampling, list[tuple[int, Mode, list[int]]]] = {}
    for index, (given, wanted) in enumerate(zip(conversations, modes, strict=True)):
        messages = _as_messages(given)
        chosen = choose_mode(messages, wanted, prompter.default_mode)
        sampling = Sampling.choose(defaults.get(chosen), max_new_tokens, temperature, top_p, top_k)
        groups.setdefault(sampling, []).append((index, chosen, prompter.prompt_ids(messages, chosen, tools)))
    found: dict[int, list[Reply]] = {}
    copies = options.get("num_return_sequences", 1)
    for sampling, jobs in groups.items():
        jobs.sort(key=lambda job: (len(job[2]), job[0]))
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            batch_replies = generate(
                model,
                tokenizer,
                [ids for _, _, ids in batch],
                [chosen for _, chosen, _ in batch],
                sampling,
                scheme=prompter.scheme,
                thinking_budget=[budgets[index] for index, _, _ in batch],
                **options,
            )
            for place, (index, _, _) in enumerate(batch):
                found[index] = batch_replies[place * copies : (place + 1) * copies]
    return [each for index in range(len(conversations)) for each in found[index]]


def _as_messages(given: Messages | str) -> Messages:
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


def _for_each(value: Any, count: int, name: str) -> list[Any]:
    """One value for each of `count` conversations; ValueError if it is a sequence of another length."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return [value] * count
    if len(value) != count:
        raise ValueError(
            f"{name}: found {len(value)} for {count} conversations, expected one for each, or one for all."
        )
    return list(value)


class Sampling(NamedTuple):
    """How tokens are drawn: at most `max_new_tokens`, greedily at temperature 0, among all tokens at top_k 0."""

    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    @classmethod
    def choose(
        cls,
        defaults: SamplingDefaults | None,
        max_new_tokens: int,
        temperature: float | None,
        top_p: float | None,
        top_k: int | None,
    ) -> Sampling:
        """What is asked for, and for what is None the defaults, if there are any."""
        defaults = defaults or SamplingDefaults()
        return cls(
            max_new_tokens,
            defaults.temperature if temperature is None else temperature,
            defaults.top_p if top_p is None else top_p,
            defaults.top_k if top_k is None else top_k,
        )

    def options(self) -> dict[str, Any]:
        """The arguments of `generate`; every setting is given, so that the checkpoint's own do not mix in."""
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0}
        if self.temperature > 0:
            options |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        else:
            options |= {"temperature": None, "top_p": None, "top_k": None}
        return options


@contextmanager
def ready_to_generate(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, no router logits (they fail with left padding), a cache; all put back afterwards."""
    config = model.config.get_text_config()
    training, logits = model.training, getattr(config, "output_router_logits", None)
    model.eval()
    if logits is not None:
        config.output_router_logits = False
    try:
        yield
    finally:
        model.train(training)
        if logits is not None:
            config.output_router_logits = logits


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    modes: Sequence[Mode],
    sampling: Sampling,
    *,
    scheme: Scheme | str = "control",
    thinking_budget: int | Sequence[int | None] | None = None,
    **options: Any,
) -> list[Reply]:
    """Continue prompts (ids, of any lengths) in one left-padded batch; one Reply each, in their order.

    `thinking_budget` is for all prompts, or a sequence with one for each. `options` are arguments of `model.generate`
    and win over `sampling`; with `num_return_sequences`, the replies to one prompt follow each other. Without options
    and budgets, rows that have ended leave a large batch (see `generate_shrinking`). The model is left as it was found:
    training mode, gradient checkpointing and configuration.
    """
    import torch

    from thinkfusion.shrinking import can_shrink, generate_shrinking

    own = _with_budget(tokenizer, scheme, thinking_budget, options)
    arguments = sampling.options() | own

    length = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (length - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    mask = (torch.arange(length, device=model.device) >= length - lengths[:, None]).long()
    with ready_to_generate(model), torch.no_grad():
        ends = reply_ends(model, tokenizer, get_scheme(scheme))
        if not own and can_shrink(model, len(prompts)):
            written = generate_shrinking(model, ids, mask, ends, pad_token_id=pad, **arguments)
        else:
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                pad_token_id=pad,
                eos_token_id=ends,
                use_cache=True,
                **arguments,
            )
            written = out[:, length:].tolist()
    copies = arguments.get("num_return_sequences", 1)
    given = []
    for row, mode in zip(written, [mode for mode in modes for _ in range(copies)], strict=True):
        stop = next((index for index, token in enumerate(row) if token in ends), None)
        given.append(split_reply(row[:stop], mode, tokenizer=tokenizer, finished=stop is not None, scheme=scheme))
    return given


def _with_budget(
    tokenizer: PreTrainedTokenizerBase,
    scheme: Scheme | str,
    thinking_budget: int | Sequence[int | None] | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Arguments of `model.generate`, with a budget, if there is any, behind the caller's own processors."""
    budgets = thinking_budget if isinstance(thinking_budget, Sequence) else [thinking_budget]
    if all(each is None for each in budgets):
        return dict(options)
    from thinkfusion.budget import ThinkingBudget

    processors = [*(options.get("logits_processor") or []), ThinkingBudget(tokenizer, budgets, scheme=scheme)]
    return {**options, "logits_processor": processors}


def reply_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, scheme: Scheme) -> list[int]:
    """What ends a reply: the tokens of the scheme and the tokenizer, and those that the model was made with."""
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    return sorted({*end_ids(tokenizer, scheme), *(own if isinstance(own, list) else [own])} - {None})


class Chunk(NamedTuple):
    """A piece of a streamed reply; `part` is "reasoning" or "answer"."""

    part: str
    text: str


def stream_reply(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages | str,
    *,
    mode: Mode | str | bool | None = None,
    thinking_budget: int | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    max_new_tokens: int = 1024,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    **options: Any,
) -> Iterator[Chunk]:
    """Like `reply`, but yields the reply in pieces while it is generated. Tags are taken out, by id.

    An error while generating is raised here, after the pieces that came before it. transformers streams no beam search.
    """
    import torch
    from transformers import TextIteratorStreamer

    class Parts(TextIteratorStreamer):
        """Puts tags into the queue as tuples, by id; other ids are decoded by transformers' own streamer."""

        def put(self, value: Any) -> None:
            if self.next_tokens_are_prompt or value.numel() > 1:
                super().put(value)
            elif int(value) in ends:
                self.end()
            elif int(value) in tags:
                self.end()
                self.next_tokens_are_prompt: bool = False
                self.text_queue.put((tags[int(value)],))
            else:
                super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            # The queue is closed by the thread, since a flush before a tag is not the end.
            if text:
                self.text_queue.put(text)

    messages, prompter = _as_messages(messages), Prompter(tokenizer)
    chosen = choose_mode(messages, mode, prompter.default_mode)
    ids = prompter.prompt_ids(messages, chosen, tools)
    sampling = Sampling.choose(generation_defaults(model).get(chosen), max_new_tokens, temperature, top_p, top_k)
    arguments = sampling.options() | _with_budget(tokenizer, prompter.scheme, thinking_budget, options)
    tags, ends = reply_tags(tokenizer, prompter.scheme), reply_ends(model, tokenizer, prompter.scheme)
    streamer = Parts(tokenizer, skip_prompt=True)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with ready_to_generate(model), torch.no_grad():
                inputs = torch.tensor([ids], device=model.device)
                model.generate(
                    input_ids=inputs,
                    attention_mask=torch.ones_like(inputs),
                    pad_token_id=tokenizer.pad_token_id,
                    eos_token_id=ends,
                    streamer=streamer,
                    **arguments,
                )
        except BaseException as error:
            failures.append(error)
        finally:
            streamer.text_queue.put(streamer.stop_signal)

    thread = Thread(target=work, daemon=True)
    thread.start()
    yield from _chunks(streamer, prompter.scheme, chosen)
    thread.join()
    if failures:
        raise failures[0]


def _chunks(pieces: Iterable[str | tuple[str]], scheme: Scheme, mode: Mode) -> Iterator[Chunk]:
    """Texts and tags of a reply, in their order, as its parts."""
    part = "reasoning" if mode is Mode.THINKING and scheme.thinking_prefix else "answer"
    call_start = scheme.call_lead + scheme.call_start
    header = ""  # a closing of several tokens, or the beginning of a tool call, as far as it has come
    in_call = False
    for piece in pieces:
        tag = piece[0] if isinstance(piece, tuple) else None
        text = tag or str(piece)
        if in_call:
            yield Chunk(part, text)
        elif tag in (THINK_OPEN, THINK_CLOSE):
            part = "reasoning" if tag == THINK_OPEN else "answer"
        elif header or tag == scheme.closing_token:
            header += text
            if header == scheme.closing:
                part, header = "answer", ""
            elif call_start and header.startswith(call_start):
                part, in_call = "answer", True
                yield Chunk(part, header[len(scheme.call_lead) :])
            elif not scheme.closing.startswith(header) and not call_start.startswith(header):
                header = ""
        elif tag is None:
            yield Chunk(part, text)
