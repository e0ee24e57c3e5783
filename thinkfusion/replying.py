# SPDX-License-Identifier: Apache-2.0
"""Replies to many prompts: in batches of like length, timed by mode, with the random state left as it was."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from thinkfusion.generation import Messages, Prompter, Sampling, generate
from thinkfusion.modes import Mode, Reply, Scheme
from thinkfusion.prompts import EvaluationPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Asked(Protocol):
    """What measurements by generation ask: a checkpoint (`Replier`), or a served model (`EndpointReplier`)."""

    @property
    def soft_switch(self) -> bool:
        """Whether `/think` and `/no_think` in a message switch."""

    def job(self, messages: Messages, mode: Mode) -> Any:
        """What asks for a reply in `mode`, by the hard switch."""

    def served(self, messages: Messages, hard: bool | None) -> Any:
        """The same as a server makes it: with `enable_thinking`, or without where `hard` is None."""

    def default_mode(self, asked: Sequence[Mapping[str, Any]]) -> Mode:
        """The mode without any switch. `asked` are user messages to find out with, where nothing says so."""

    def shown_mode(self, reply: Reply) -> Mode | None:
        """The mode that a reply is in for who reads it; None if it is in neither."""

    def replies(
        self, jobs: Sequence[Any], *, thinking_budget: int | None = None, label: str = "replies"
    ) -> list[Reply]:
        """One reply for each job, in their order."""

    def timed(
        self, jobs: Sequence[Any], *, thinking_budget: int | None = None, label: str = "replies"
    ) -> tuple[list[Reply], dict[Mode, float]]:
        """The same, and the seconds that each mode took."""


class Job(NamedTuple):
    """The ids of a generation prompt, and the mode that it announces."""

    ids: list[int]
    mode: Mode


def announced(prompt: str, scheme: Scheme) -> Mode:
    """The mode whose prefix a rendered generation prompt ends in; with the longer prefix first, as one may be empty."""
    prefixes = sorted(Mode, key=lambda mode: -len("".join(scheme.prefix(mode)).strip()))
    ended = (mode for mode in prefixes if prompt.rstrip().endswith("".join(scheme.prefix(mode)).strip()))
    return next(ended, Mode.THINKING)


def shown_mode(reply: Reply, scheme: Scheme) -> Mode | None:
    """The mode that a reply is in for who reads it; None if it is in neither.

    Where the model opens its trace itself, an empty trace or none at all is an answer at once.
    """
    if reply.kind == "ok":
        return reply.mode
    at_once = reply.kind in ("empty_trace", "never_closed") and reply.mode is Mode.THINKING
    return Mode.NON_THINKING if at_once and scheme.thinking_start and reply.answer else None


@dataclass(frozen=True)
class Replier:
    """A checkpoint and how it is asked; every measurement by generation goes through one."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    batch_size: int = 128
    seed: int = 0
    progress: bool = True

    soft_switch = True

    @cached_property
    def prompter(self) -> Prompter:
        return Prompter(self.tokenizer)

    def job(self, messages: Messages, mode: Mode) -> Job:
        return Job(self.prompter.prompt_ids(messages, mode), mode)

    def served(self, messages: Messages, hard: bool | None) -> Job:
        """The prompt as a server makes it, with both names of the switch."""
        switch = {} if hard is None else {"enable_thinking": hard, "thinking": hard}
        options = {"add_generation_prompt": True, **switch}
        ids = self.tokenizer.apply_chat_template(list(messages), return_dict=True, **options)["input_ids"]
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
        return Job(list(ids), announced(str(text), self.prompter.scheme))

    def default_mode(self, asked: Sequence[Mapping[str, Any]]) -> Mode:
        """What the template says."""
        return self.prompter.default_mode

    def shown_mode(self, reply: Reply) -> Mode | None:
        return shown_mode(reply, self.prompter.scheme)

    def replies(
        self, jobs: Sequence[Job], *, thinking_budget: int | None = None, label: str = "replies"
    ) -> list[Reply]:
        """One reply for each job, in their order. Where one batch holds them all, both modes share it."""
        batches = [self._by_length(range(len(jobs)), jobs)] if 0 < len(jobs) <= self.batch_size else self._apart(jobs)
        return self._in_batches(batches, jobs, thinking_budget, label)[0]

    def timed(
        self, jobs: Sequence[Job], *, thinking_budget: int | None = None, label: str = "replies"
    ) -> tuple[list[Reply], dict[Mode, float]]:
        """The same, and the seconds that each mode took, with batches of one mode only."""
        return self._in_batches(self._apart(jobs), jobs, thinking_budget, label)

    def _in_batches(
        self, batches: Sequence[Sequence[int]], jobs: Sequence[Job], thinking_budget: int | None, label: str
    ) -> tuple[list[Reply], dict[Mode, float]]:
        """Replies in the order of the jobs, and the seconds by the mode of each batch's first job."""
        import torch
        from tqdm.auto import tqdm

        found: dict[int, Reply] = {}
        seconds = dict.fromkeys(Mode, 0.0)
        with torch.random.fork_rng(), tqdm(total=len(jobs), desc=label, disable=not self.progress) as bar:
            torch.manual_seed(self.seed)
            for batch in batches:
                ids, modes = [jobs[index].ids for index in batch], [jobs[index].mode for index in batch]
                start = time.perf_counter()
                replies = generate(
                    self.model,
                    self.tokenizer,
                    ids,
                    modes,
                    self.sampling,
                    scheme=self.prompter.scheme,
                    thinking_budget=thinking_budget,
                )
                seconds[modes[0]] += time.perf_counter() - start
                found |= dict(zip(batch, replies, strict=True))
                bar.update(len(batch))
        return [found[index] for index in range(len(jobs))], seconds

    def _apart(self, jobs: Sequence[Job]) -> list[list[int]]:
        """Batches of similar length, since padding is computed too, and of one mode, since the lengths of replies
        differ between them."""
        batches: list[list[int]] = []
        for mode in Mode:
            own = self._by_length([index for index, job in enumerate(jobs) if job.mode is mode], jobs)
            batches += [own[start : start + self.batch_size] for start in range(0, len(own), self.batch_size)]
        return batches

    def _by_length(self, indices: Sequence[int], jobs: Sequence[Job]) -> list[int]:
        return sorted(indices, key=lambda index: (len(jobs[index].ids), index))


def reply_in_both_modes(
    replier: Asked, prompts: Sequence[EvaluationPrompt], *, thinking_budget: int | None = None
) -> tuple[dict[Mode, list[Reply]], dict[Mode, float]]:
    """Reply to every prompt in both modes, by the hard switch; also the seconds of each mode."""
    jobs = [replier.job(prompt.messages, mode) for mode in Mode for prompt in prompts]
    replies, seconds = replier.timed(jobs, thinking_budget=thinking_budget)
    count = len(prompts)
    return {mode: replies[place * count : (place + 1) * count] for place, mode in enumerate(Mode)}, seconds


def generate_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[EvaluationPrompt],
    sampling: Sampling,
    *,
    batch_size: int,
    seed: int,
    progress: bool = True,
    thinking_budget: int | None = None,
) -> dict[Mode, list[Reply]]:
    """Reply to every prompt in both modes, in the order of the prompts. The random state outside is left as it was.

    `thinking_budget` closes the reasoning after so many tokens (see `ThinkingBudget`).
    """
    replier = Replier(model, tokenizer, sampling, batch_size, seed, progress)
    return reply_in_both_modes(replier, prompts, thinking_budget=thinking_budget)[0]
