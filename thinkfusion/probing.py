# SPDX-License-Identifier: Apache-2.0
"""The switch probe: what a checkpoint would write where the modes part, by one forward pass and no generation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from thinkfusion.chat_templates import installed_template, scheme_of
from thinkfusion.conversations import Conversation
from thinkfusion.formats import RecordOptions, detect_format
from thinkfusion.generation import Prompter
from thinkfusion.intervals import mean
from thinkfusion.modes import Mode, end_ids, reply_tags
from thinkfusion.records import read_row
from thinkfusion.rendering import IGNORED, Renderer, render
from thinkfusion.sequences import MODES
from thinkfusion.tasks import generate_samples

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROBED = {
    Mode.THINKING: ("closes", "closes_inside", "closes_again", "trace_begins", "trace_tagged"),
    Mode.NON_THINKING: ("answer_begins", "answer_blank", "answer_tagged", "answer_closes"),
}
"""The probabilities of each mode."""
LINE_BREAKS = ("\n", "\n\n", "\n\n\n", " \n")
"""What a reply without text begins with, if not with the end of its turn."""


class Marks(NamedTuple):
    """The tokens that the probe looks for, by id.

    closing: closes a trace. ends: end a turn. blank: what a reply without text begins with, `ends` among them. tags:
    the control tokens of a reply, but those that end it.
    """

    closing: int
    ends: frozenset[int]
    blank: frozenset[int]
    tags: frozenset[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Marks:
        """Those of a tokenizer with a switchable template; ValueError if it has none."""
        scheme = scheme_of(tokenizer)
        ends = end_ids(tokenizer, scheme)
        closing = tokenizer.convert_tokens_to_ids(scheme.closing_token)
        written = {token for text in LINE_BREAKS for token in tokenizer(text, add_special_tokens=False)["input_ids"]}
        breaks = {token for token in written if "\n" in tokenizer.decode([token])}
        tags = {*reply_tags(tokenizer, scheme), closing} - ends
        return cls(closing, frozenset(ends), frozenset(ends | breaks), frozenset(tags))


class Reference(NamedTuple):
    """A sequence to be looked at.

    first: where what the model writes begins. closing: where its trace ends. end: where its answer ends; the token
    there is not looked at. Each None if there is no such place.
    """

    ids: list[int]
    mode: Mode
    first: int
    closing: int | None
    end: int | None


def switch_probe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Iterable[Conversation | Mapping[str, Any]],
    *,
    batch_size: int = 8,
) -> dict[str, Any]:
    """What the model would write where the modes part: one teacher-forced forward pass of a row, no generation.

    pairs: conversations, or rows of any format that is read, with reasoning and answer; they should be held out. The
        last exchange of each is looked at in both modes; one without reasoning in non-thinking mode only.

    By mode, means over the rows with 95 % intervals. `thinking`: `closes`, the probability of the closing token after
    the whole reference trace; `closes_inside`, that of the same token before, mean over the places of the trace (near
    0: no trace is cut short); `closes_again`, that of the same token after the whole answer (near 0: no reply closes a
    second time); `trace_begins`, that of the first token after the prefix (where the template leaves the opening token
    to the model it is that one's, and should be near 1); `trace_tagged`, that of any other control token in its place.
    `non_thinking`: `answer_begins`, that of the answer's first token; `answer_blank`, that of a line break or an end of
    the turn in its place (near 0: hardly a reply is empty); `answer_tagged`, that of a control token in its place (near
    0: no reply begins with a tag); `answer_closes`, that of the closing token after the whole answer (near 0: answers
    end by ending the turn).
    `samples` are the rows, in all and of each mode. None where no row has such a place.

    Eight rows cost 8 % of an evaluation of 64 prompts by generation (the demo's checkpoint, one core without AVX-512).
    Works with any switchable template.

    Raises ValueError if there are no rows, or the template has no switch; DataError for a bad row.
    """
    prober = Prober(tokenizer)
    rows = (_conversation(line, row) for line, row in enumerate(pairs, start=1))
    references = [reference for row in rows for reference in prober.references(row)]
    return probe_references(model, references, prober.marks, batch_size=batch_size)


def measure_probe(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, samples: int = 64, seed: int = 0
) -> dict[str, Any]:
    """`switch_probe` on rows of the embedded tasks that are kept for evaluation, as the entry of a report."""
    return probe_entry(switch_probe(model, tokenizer, task_pairs(samples, seed=seed)))


def task_pairs(samples: int, *, seed: int = 0) -> list[Conversation]:
    """Rows of the embedded tasks with their reasoning, from those kept for evaluation."""
    return [
        Conversation.from_messages(
            [
                {"role": "user", "content": sample.question},
                {"role": "assistant", "content": sample.answer, "reasoning_content": sample.reasoning},
            ]
        )
        for sample in generate_samples(samples, seed=seed, split="evaluation")
    ]


def probe_entry(found: Mapping[str, Any]) -> dict[str, Any]:
    """What `switch_probe` found in one level, as reports and logs have it."""
    entry = {"samples": found["samples"]}
    for values in (found.get(mode.value, {}) for mode in Mode):
        entry |= {name: value for name, value in values.items() if name != "samples"}
    return entry


class Prober:
    """Makes references for one tokenizer, with a template of ours or any other that has a switch."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.scheme, self.marks = tokenizer, scheme_of(tokenizer), Marks.of(tokenizer)
        # One for all rows: making one reads the whole vocabulary.
        self._source = Renderer(tokenizer) if installed_template(tokenizer) else Prompter(tokenizer)

    def references(self, row: Conversation) -> Iterator[Reference]:
        """The last exchange in each mode that it can be rendered in."""
        for mode in Mode:
            if mode is Mode.THINKING and not row.exchanges[-1].has_reasoning:
                continue
            ids, first = self._rendered(row, mode)
            yield as_reference(ids, mode, first, self.marks)

    def _rendered(self, row: Conversation, mode: Mode) -> tuple[list[int], int]:
        if isinstance(self._source, Renderer):
            rendered = render(row, self._source, mode)
            return rendered.ids, rendered.trained.index(True)
        # A template of others is asked for the prompt alone; what follows it is the scheme's.
        step = row.exchanges[-1].steps_in(mode)[0]
        messages = row.to_messages(mode)
        prompt = messages[: len(messages) - len(row.exchanges[-1].steps_in(mode))]
        ids = self._source.prompt_ids(prompt, mode, list(row.tools) or None)
        written = step.content
        if mode is Mode.THINKING:
            start, end = "".join(self.scheme.thinking_start), "".join(self.scheme.thinking_end)
            written = start + (step.reasoning or "") + end + written
        replied = self.tokenizer(written, add_special_tokens=False)["input_ids"]
        return [*ids, *replied, *sorted(self.marks.ends)[:1]], len(ids)


def as_reference(ids: Sequence[int], mode: Mode, first: int, marks: Marks) -> Reference:
    """A reference without what follows the last place that is looked at."""
    closing = None
    if mode is Mode.THINKING and marks.closing in ids[first:]:
        closing = list(ids).index(marks.closing, first)
    begun = first if closing is None else closing + 1
    end = next((place for place in range(begun, len(ids)) if ids[place] in marks.ends), None)
    if (mode is Mode.THINKING and closing is None) or marks.closing in marks.ends:
        end = None  # there is no closing token, or it is right there
    last = max(place for place in (first, closing, end) if place is not None)
    return Reference(list(ids[: last + 1]), mode, first, closing, end)


def prepared_references(sequences: Any, marks: Marks, *, samples: int) -> list[Reference]:
    """References of the first `samples` sequences of each mode of a data set that `prepare` made, or of a stream."""
    from datasets import Dataset

    found: dict[Mode, list[Reference]] = {mode: [] for mode in Mode}
    if isinstance(sequences, Dataset):
        modes = sequences["mode"]
        places = [index for mode in range(len(MODES)) for index in _first_of(modes, mode, samples)]
        rows: Iterable[Any] = (sequences[index] for index in places)
    else:
        rows = islice(sequences, 8 * samples)
    for row in rows:
        mode = MODES[int(row["mode"])]
        labels = [int(label) for label in row["labels"]]
        first = next((index for index, label in enumerate(labels) if label != IGNORED), None)
        if first is not None and len(found[mode]) < samples:
            ids = [int(token) for token in row["input_ids"]]
            found[mode].append(as_reference(ids, mode, first, marks))
    return [reference for mode in Mode for reference in found[mode]]


def _first_of(modes: Iterable[int], mode: int, count: int) -> Iterator[int]:
    return islice((index for index, given in enumerate(modes) if given == mode), count)


def probe_references(
    model: PreTrainedModel, references: Sequence[Reference], marks: Marks, *, batch_size: int = 8
) -> dict[str, Any]:
    """The figures of `switch_probe` on references; the model is left as it was."""
    import torch

    if not references:
        raise ValueError("switch_probe: there are no rows; give at least one.")
    if batch_size < 1:
        raise ValueError(f"batch_size: found {batch_size}, expected at least 1.")
    values: dict[str, list[float]] = {name: [] for names in PROBED.values() for name in names}
    # Of similar length, since padding is computed too.
    ordered = sorted(references, key=lambda reference: len(reference.ids))
    with _evaluating(model), torch.no_grad():
        for start in range(0, len(ordered), batch_size):
            batch = ordered[start : start + batch_size]
            longest = len(batch[-1].ids)
            ids = torch.tensor([[*each.ids, *[0] * (longest - len(each.ids))] for each in batch], device=model.device)
            mask = torch.tensor([[1] * len(each.ids) + [0] * (longest - len(each.ids)) for each in batch])
            logits = model(ids, attention_mask=mask.to(model.device), use_cache=False).logits
            for reference, scores in zip(batch, logits, strict=True):
                _note(values, reference, scores, marks)
    found: dict[str, Any] = {"samples": 0}
    for mode, names in PROBED.items():
        count = sum(reference.mode is mode for reference in references)
        found["samples"] = max(found["samples"], count)
        found[mode.value] = {"samples": count}
        for name in names:
            found[mode.value] |= mean(name, values[name]) if values[name] else {name: None, f"{name}_interval": None}
    return found


def _note(values: dict[str, list[float]], reference: Reference, scores: Any, marks: Marks) -> None:
    """Add a row's probabilities; scores: (length, vocabulary). What stands at a place is told from the one before."""
    ids, first, closing, end = reference.ids, reference.first, reference.closing, reference.end
    thinking = reference.mode is Mode.THINKING
    logs = scores[first - 1 : len(ids) - 1].float().log_softmax(-1)  # (what the model writes, vocabulary)
    closes = logs[:, marks.closing].exp()
    if closing != first:
        values["trace_begins" if thinking else "answer_begins"].append(float(logs[0, ids[first]].exp()))
        tags = sorted(marks.tags - {ids[first]})
        values["trace_tagged" if thinking else "answer_tagged"].append(float(logs[0, tags].exp().sum()))
    if not thinking and ids[first] not in marks.blank:
        values["answer_blank"].append(float(logs[0, sorted(marks.blank)].exp().sum()))
    if closing is not None:
        values["closes"].append(float(closes[closing - first]))
        if closing > first:
            values["closes_inside"].append(float(closes[: closing - first].mean()))
    if end is not None:
        values["closes_again" if thinking else "answer_closes"].append(float(closes[end - first]))


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    config, training = model.config.get_text_config(), model.training
    logits = getattr(config, "output_router_logits", None)
    model.eval()
    if logits is not None:
        config.output_router_logits = False
    try:
        yield
    finally:
        model.train(training)
        if logits is not None:
            config.output_router_logits = logits


def _conversation(line: int, row: Conversation | Mapping[str, Any]) -> Conversation:
    if isinstance(row, Conversation):
        return row
    options = RecordOptions()
    options = replace(options, format=detect_format(row, options, "pairs"))
    outcome = read_row(line, row, "pairs", options)
    if outcome.conversation is None:
        assert outcome.error is not None
        raise outcome.error
    return outcome.conversation
