# SPDX-License-Identifier: Apache-2.0
"""Paired data from prompts alone: the model replies in both modes, graders choose, right replies are kept.

A prompt is kept when a thinking reply kept its format and is right. The non-thinking answer is its own right one, or
else the answer part of that thinking reply, as the mixture `paired` makes it. Everything else is rejected, and counted
under one reason. Batches are drawn with seeds of their own, so that a run that was killed ends in the same file.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from thinkfusion.appending import AppendedRows, account_path
from thinkfusion.digests import weights_digest
from thinkfusion.following import follow_parent
from thinkfusion.formats import RecordOptions, parse_row
from thinkfusion.generation import Prompter, Sampling, as_read, generate
from thinkfusion.grading import judge
from thinkfusion.modes import REPLY_CLASSES, Mode, Reply
from thinkfusion.preferences import PreferenceWriter
from thinkfusion.prompts import EvaluationPrompt
from thinkfusion.reading import DataError
from thinkfusion.sampling_defaults import PRESETS, SamplingDefaults, generation_defaults

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KEEP = ("first", "shortest")
NON_THINKING_FROM = ("either", "sampled", "thinking")
_FAR = ("wrong", "truncated", *(kind for kind in REPLY_CLASSES if kind not in ("ok", "truncated")))
"""Why a prompt has no right reply, what came nearest to one first."""


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """How replies are drawn and which are kept.

    attempts: replies per prompt and mode.
    temperature, top_p, top_k: of both modes; what is None is the checkpoint's default of the mode, and Qwen3's
        published settings if it has none (greedy decoding would draw the same reply every time).
    keep: which of several right replies: "first" leaves the lengths as the model writes them, "shortest" teaches
        brevity, and prefers lucky guesses.
    non_thinking_from: "either": the mode's own right answer, else the answer part of the kept thinking reply;
        "sampled": its own only, and a prompt without one is rejected; "thinking": always the thinking one's.
    keep_ungraded: keep prompts without an answer by their format alone; else they are rejected (`no_answer`).
    construct: make preference rows whose one reply is not sampled, see `PreferenceWriter`.
    """

    attempts: int = 4
    batch_size: int = 64
    max_new_tokens: int = 512
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    keep: str = "first"
    non_thinking_from: str = "either"
    keep_ungraded: bool = False
    construct: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("keep", KEEP), ("non_thinking_from", NON_THINKING_FROM)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: {getattr(self, name)!r} is unknown; choose one of {', '.join(known)}.")
        for name in ("attempts", "batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected at least 1.")
        given: dict[str, Any] = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        SamplingDefaults(**{name: value for name, value in given.items() if value is not None})

    def sampling(self, model: PreTrainedModel) -> dict[Mode, Sampling]:
        """How each mode samples. Raises ValueError for several attempts that would all be the same."""
        stored = {**PRESETS["qwen3"], **generation_defaults(model)}
        chosen = {
            mode: Sampling.choose(stored[mode], self.max_new_tokens, self.temperature, self.top_p, self.top_k)
            for mode in Mode
        }
        for mode, sampling in chosen.items():
            if sampling.temperature == 0 and self.attempts > 1:
                raise ValueError(
                    f"attempts: found {self.attempts} at temperature 0 ({mode}), where all of them are the same reply. "
                    "Give --temperature above 0, or --attempts 1."
                )
        return chosen


class PromptResult(NamedTuple):
    """What became of one prompt: its row or the reason why there is none, its preferences, classes of its replies."""

    row: dict[str, Any] | None
    reason: str
    preferences: list[tuple[Mode, dict[str, Any] | str]]
    classes: dict[Mode, list[str]]


class PairMaker:
    """A checkpoint, asked for pairs; batches are independent of each other, so that any process may make one."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[EvaluationPrompt],
        options: PairOptions,
        *,
        preferences: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.prompts, self.options = model, tokenizer, prompts, options
        self.sampling = options.sampling(model)
        self._prompter = Prompter(tokenizer)
        self._writer = PreferenceWriter(tokenizer, construct=options.construct) if preferences else None

    @property
    def batches(self) -> int:
        return -(-len(self.prompts) // self.options.batch_size)

    def make(self, number: int) -> tuple[list[PromptResult], float]:
        """The results of one batch of prompts, in their order, and the seconds that were spent in the model."""
        start = number * self.options.batch_size
        batch = self.prompts[start : start + self.options.batch_size]
        asked = [prompt for prompt in batch if prompt.solution is not None or self.options.keep_ungraded]
        drawn, seconds = self._draw(asked, number)
        replies = iter(drawn)
        results = []
        for place, prompt in enumerate(batch, start + 1):
            given = next(replies) if prompt.solution is not None or self.options.keep_ungraded else None
            results.append(self._result(place, prompt, given))
        return results, seconds

    def _draw(self, prompts: Sequence[EvaluationPrompt], number: int) -> tuple[list[dict[Mode, list[Reply]]], float]:
        """Replies to each prompt by mode. One attempt first, and the others only where it is not the one to keep."""
        drawn: list[dict[Mode, list[Reply]]] = [{mode: [] for mode in Mode} for _ in prompts]
        lazy = self.options.keep == "first" and self._writer is None
        seconds = 0.0
        for mode in Mode:
            if mode is Mode.NON_THINKING and self.options.non_thinking_from == "thinking" and self._writer is None:
                continue
            for turn, attempts in enumerate((1, self.options.attempts - 1) if lazy else (self.options.attempts,)):
                wanting = [
                    index
                    for index, prompt in enumerate(prompts)
                    if not any(_fault(prompt, reply) is None for reply in drawn[index][mode])
                ]
                if mode is Mode.NON_THINKING:  # a prompt without a thinking reply is rejected anyway
                    wanting = [index for index in wanting if self._writer or _any_right(prompts[index], drawn[index])]
                jobs = [index for index in wanting for _ in range(attempts)]
                seconds += self._sample(prompts, jobs, mode, (number, turn), drawn)
        return drawn, seconds

    def _sample(
        self,
        prompts: Sequence[EvaluationPrompt],
        jobs: list[int],
        mode: Mode,
        place: tuple[int, int],
        drawn: list[dict[Mode, list[Reply]]],
    ) -> float:
        import torch

        ids = {index: self._prompter.prompt_ids(prompts[index].messages, mode) for index in dict.fromkeys(jobs)}
        seconds = 0.0
        for part in range(0, len(jobs), self.options.batch_size):
            own = jobs[part : part + self.options.batch_size]
            key = f"{self.options.seed} {place} {mode.value} {part}".encode()
            with torch.random.fork_rng():
                torch.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1)
                start = time.perf_counter()
                replies = generate(
                    self.model,
                    self.tokenizer,
                    [ids[index] for index in own],
                    [mode] * len(own),
                    self.sampling[mode],
                    scheme=self._prompter.scheme,
                )
                seconds += time.perf_counter() - start
            for index, reply in zip(own, replies, strict=True):
                drawn[index][mode].append(reply)
        return seconds

    def _result(self, place: int, prompt: EvaluationPrompt, given: dict[Mode, list[Reply]] | None) -> PromptResult:
        if given is None:
            return PromptResult(None, "no_answer", [(mode, "no_answer") for mode in Mode], {mode: [] for mode in Mode})
        right = {mode: [reply for reply in given[mode] if _fault(prompt, reply) is None] for mode in Mode}
        kept = {mode: self._choose(replies) for mode, replies in right.items()}
        classes = {mode: [_fault(prompt, reply) or "kept its mode" for reply in given[mode]] for mode in Mode}
        row, reason = self._row(place, prompt, kept, classes)
        preferences = [] if self._writer is None else self._writer.rows(messages_of(prompt), kept, given)
        return PromptResult(row, reason, preferences, classes)

    def _choose(self, replies: list[Reply]) -> Reply | None:
        if self.options.keep == "first":
            return replies[0] if replies else None
        return min(replies, key=lambda each: (each.reasoning_tokens or 0) + (each.answer_tokens or 0), default=None)

    def _row(
        self, place: int, prompt: EvaluationPrompt, kept: dict[Mode, Reply | None], classes: dict[Mode, list[str]]
    ) -> tuple[dict[str, Any] | None, str]:
        thinking, plain = kept[Mode.THINKING], kept[Mode.NON_THINKING]
        origin = self.options.non_thinking_from
        if thinking is None:
            return None, f"thinking: {_nearest(classes[Mode.THINKING])}"
        if origin == "sampled" and plain is None:
            return None, f"non_thinking: {_nearest(classes[Mode.NON_THINKING])}"
        own = plain if origin != "thinking" else None
        row = {
            "prompt": messages_of(prompt),
            "thinking": {"role": "assistant", "reasoning_content": thinking.reasoning, "content": thinking.answer},
            "non_thinking": {"role": "assistant", "content": thinking.answer if own is None else own.answer},
            "non_thinking_from": "thinking" if own is None else "sampled",
            "task": prompt.task,
            "language": prompt.language,
            "number": place,
        }
        try:
            parse_row(row, _AS_READ, [])
        except DataError as error:
            return None, f"unreadable: {error.reason}"
        return row, ""


_AS_READ = RecordOptions(format="paired")


def messages_of(prompt: EvaluationPrompt) -> list[dict[str, Any]]:
    """The messages as the model read them: without soft switches, which would contradict one mode of a pair."""
    return [dict(as_read(message)) for message in prompt.messages]


def _fault(prompt: EvaluationPrompt, reply: Reply) -> str | None:
    """Why a reply is not kept; None for one that kept its mode and, where there is an answer to judge by, is right."""
    if reply.kind != "ok":
        return reply.kind
    right = prompt.solution is None or judge(reply.answer, prompt.solution, prompt.grader)
    return None if right else "wrong"


def _any_right(prompt: EvaluationPrompt, drawn: Mapping[Mode, list[Reply]]) -> bool:
    return any(_fault(prompt, reply) is None for reply in drawn[Mode.THINKING])


def _nearest(classes: Sequence[str]) -> str:
    return min(classes, key=_FAR.index)


@dataclass(frozen=True)
class PairAccount:
    """What became of the prompts; `prompts` = `kept` + the sum of `rejected`.

    replies: how many replies of each mode ended in which class. preferences: for each mode, rows by origin, and why
    the other prompts have none. share_in_model: of the time of all processes, since the first batch.
    """

    prompts: int
    done: int
    kept: int
    rejected: dict[str, int]
    non_thinking_from: dict[str, int]
    replies: dict[str, dict[str, int]]
    preferences: dict[str, dict[str, int]]
    seconds: float
    seconds_in_model: float

    @property
    def share_in_model(self) -> float:
        return self.seconds_in_model / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "share_in_model": round(self.share_in_model, 4)}

    def __str__(self) -> str:
        lines = [f"{self.done:,} prompts = {self.kept:,} kept + {sum(self.rejected.values()):,} rejected"]
        lines += [f"  rejected, {reason}: {count:,}" for reason, count in self.rejected.items()]
        lines += [f"  kept, non-thinking answer {_FROM[name]}: {n:,}" for name, n in self.non_thinking_from.items()]
        for title, table in (("replies", self.replies), ("preferences", self.preferences)):
            for mode, counts in table.items():
                parts = ", ".join(f"{name} {count:,}" for name, count in counts.items())
                lines.append(f"{title}, {mode.replace('_', '-')}: {parts or 'none'}")
        lines.append(f"{self.seconds:,.1f} s, {self.share_in_model:.0%} of it in the model")
        return "\n".join(lines)


_FROM = {"sampled": "of its own", "thinking": "from the thinking reply"}


def _added(before: PairAccount, results: Sequence[PromptResult], seconds: float, in_model: float) -> PairAccount:
    rejected, origins = Counter(before.rejected), Counter(before.non_thinking_from)
    replies = {mode.value: Counter(before.replies[mode.value]) for mode in Mode}
    preferences = {mode: Counter(counts) for mode, counts in before.preferences.items()}
    for result in results:
        if result.row is None:
            rejected[result.reason] += 1
        else:
            origins[result.row["non_thinking_from"]] += 1
        for mode, classes in result.classes.items():
            replies[mode.value].update(classes)
        for mode, row in result.preferences if preferences else ():
            preferences[mode.value][row if isinstance(row, str) else row["origin"]] += 1
    return PairAccount(
        before.prompts,
        before.done + len(results),
        sum(origins.values()),
        dict(sorted(rejected.items())),
        dict(sorted(origins.items())),
        {mode: dict(sorted(counts.items())) for mode, counts in replies.items()},
        {mode: dict(sorted(counts.items())) for mode, counts in preferences.items()},
        before.seconds + seconds,
        before.seconds_in_model + in_model,
    )


def generate_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[EvaluationPrompt],
    output: str | Path,
    options: PairOptions | None = None,
    *,
    checkpoint: str | None = None,
    preferences: str | Path | None = None,
    processes: int = 1,
    progress: bool = True,
) -> PairAccount:
    """Write paired rows for `prompts` to `output`, which training reads as they are, and count what became of each.

    checkpoint: the folder or name that the model was loaded from. A run is gone on with from the last whole batch, and
    only with the same weights, prompts and options. preferences: a file for preference rows of the same replies.
    processes: on a CPU, how many batches are made at a time, each by a process with one thread; they share the weights,
    and the rows are the same. The account is written beside the output, as `account_path` names it.

    Raises ValueError if there are no prompts, or `output` is of another run, was changed, or is being written;
    ChildProcessError if one of several processes was killed.
    """
    options = options or PairOptions()
    if not prompts:
        raise ValueError("generate_pairs: there are no prompts; give at least one.")
    if processes > 1 and model.device.type != "cpu":
        raise ValueError(f"processes: found {processes} on {model.device}, where one does all. Raise --batch_size.")
    if preferences is not None and Path(preferences).resolve() == Path(output).resolve():
        raise ValueError(f"preferences: {preferences} is the output too. Give another name.")
    from tqdm.auto import tqdm

    maker = PairMaker(model, tokenizer, prompts, options, preferences=preferences is not None)
    settings = {
        "checkpoint": _identity(model, checkpoint),
        "prompts": hashlib.sha256(json.dumps([asdict(prompt) for prompt in prompts]).encode()).hexdigest(),
        **asdict(options),
        "sampling": {mode.value: sampling._asdict() for mode, sampling in maker.sampling.items()},
        "template": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
        "preferences": preferences is not None,
    }
    rows = AppendedRows([output, *([] if preferences is None else [preferences])], settings)
    nothing: dict[str, dict[str, int]] = {mode.value: {} for mode in Mode}
    account = PairAccount(len(prompts), 0, 0, {}, {}, nothing, nothing if preferences is not None else {}, 0.0, 0.0)
    if rows.account:
        saved = dict(rows.account["account"])
        saved.pop("share_in_model")
        account = PairAccount(**saved)
    try:
        with tqdm(total=len(prompts), initial=account.done, desc="pairs", disable=not progress) as bar:
            start = time.perf_counter()
            for results, in_model in _in_order(maker, -(-account.done // options.batch_size), processes):
                kept = [result.row for result in results if result.row is not None]
                preferred = [row for result in results for _, row in result.preferences if not isinstance(row, str)]
                written = [kept] if preferences is None else [kept, preferred]
                seconds, start = processes * (time.perf_counter() - start), time.perf_counter()
                account = _added(account, results, seconds, in_model)
                rows.append(written, {"account": account.to_dict()})
                bar.update(len(results))
                bar.set_postfix(kept=account.kept, refresh=False)
    finally:
        rows.close()
    return account


def _in_order(maker: PairMaker, first: int, processes: int) -> Iterator[tuple[list[PromptResult], float]]:
    """The batches from `first` on, in their order, whichever process made them."""
    processes = min(processes, maker.batches - first)
    if processes < 2:
        yield from map(maker.make, range(first, maker.batches))
        return
    from torch.multiprocessing import get_context

    # A forked child would hang in the thread pool of its parent; memory of the weights is shared all the same.
    maker.model.share_memory()
    # Not a Pool, which waits for ever for what a killed process was making.
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _begin, (maker,))
    try:
        yield from pool.map(_make, range(first, maker.batches))
    except BrokenProcessPool:
        raise ChildProcessError(
            f"processes: one of {processes} was killed, most likely for want of memory. The rows of whole batches are "
            "written; the same again, with fewer processes, goes on with them."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_MAKER: list[PairMaker] = []
"""The one of a process of the pool."""


def _begin(maker: PairMaker) -> None:
    import torch

    follow_parent()
    torch.set_num_threads(1)
    _MAKER[:] = [maker]


def _make(number: int) -> tuple[list[PromptResult], float]:
    return _MAKER[0].make(number)


def _identity(model: PreTrainedModel, checkpoint: str | None) -> str:
    """What tells these weights from others: the digest of their files, or the commit they were loaded from."""
    from thinkfusion.checkpointing import TINY_BASE, tiny_base_path

    if checkpoint is None:
        return type(model).__name__
    folder = tiny_base_path() if checkpoint == TINY_BASE else Path(checkpoint)
    digest = weights_digest(folder) if folder.is_dir() else None
    return digest or f"{checkpoint}@{getattr(model.config, '_commit_hash', None)}"


__all__ = ["KEEP", "NON_THINKING_FROM", "PairAccount", "PairMaker", "PairOptions", "account_path", "generate_pairs"]
