# SPDX-License-Identifier: Apache-2.0
"""Does the switch work? Replies in both modes to the same prompts, judged, with 95 % intervals."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkfusion.conversations import Conversation, DataError
from thinkfusion.generation import Prompter, Sampling, generate, split_pending
from thinkfusion.modes import REPLY_CLASSES, Mode, Reply
from thinkfusion.records import Overlap, prompt_overlap
from thinkfusion.row_report import RowReport
from thinkfusion.sources import iterate_rows
from thinkfusion.tasks import LANGUAGES, TASKS, generate_samples, grade

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Words of thinking aloud, whole words; the English ones are those of "Demystifying Hybrid Thinking"
# (arXiv 2510.12680), the Korean ones their counterparts.
REFLECTIVE_WORDS = re.compile(
    r"\b(?:wait|hmm+|okay|alternatively|let me think)\b"
    r"|(?<!\w)(?:잠깐|흠+(?!\w)|음+,|다시 생각|생각해 보자|생각해보자)",
    re.IGNORECASE,
)
SOFT_CAP_FACTOR = 2.0
"""A non-thinking answer this many times longer than the mean answer part of thinking replies counts as leakage."""


@dataclass(frozen=True)
class EvaluationPrompt:
    """A prompt to reply to in both modes. Without `solution` only the format is judged, not the answer."""

    messages: tuple[dict[str, Any], ...]
    solution: str | None = None
    task: str = "prompts"
    language: str = "und"


def task_prompts(
    samples: int, *, seed: int = 0, tasks: Sequence[str] | None = None, languages: Sequence[str] = LANGUAGES
) -> list[EvaluationPrompt]:
    """Prompts of the embedded tasks, from the problems kept for evaluation."""
    drawn = generate_samples(samples, seed=seed, split="evaluation", tasks=tasks, languages=languages)
    return [
        EvaluationPrompt(({"role": "user", "content": sample.question},), sample.solution, sample.name, sample.language)
        for sample in drawn
    ]


def read_prompts(
    path: str | Path, *, answer_separator: str | None = None, limit: int | None = None
) -> list[EvaluationPrompt]:
    """Read prompts of one's own: rows with `prompt` (or `question`) or `messages`, and an optional `answer`.

    `task` and `language` of a row are used if given. With `answer_separator`, the answer is what stands after its
    last occurrence. Raises DataError for a bad row, ValueError for an empty file.
    """
    prompts: list[EvaluationPrompt] = []
    for line, row in iterate_rows(path):
        if limit is not None and len(prompts) == limit:
            break
        try:
            prompts.append(_prompt(row, answer_separator, Path(path).stem))
        except DataError as error:
            raise error.at(str(path), line) from None
    if not prompts:
        raise ValueError(f"{path}: there is no prompt in it.")
    return prompts


def _prompt(row: Any, answer_separator: str | None, task: str) -> EvaluationPrompt:
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, dict):
        raise DataError("not_an_object", f"found {type(row).__name__}, expected an object with named fields.")
    given = row.get("messages") or row.get("prompt") or row.get("question")
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if isinstance(given, (int, float, dict)):
        raise DataError("bad_message", f"prompt: found {given!r}, expected text or a list of messages.")
    if not given:
        raise DataError("no_prompt", f"found the fields {', '.join(row)}, expected prompt, question or messages.")
    split_pending(given)
    answer = row.get("answer")
    if answer is not None and answer_separator is not None:
        _, found, answer = str(answer).rpartition(answer_separator)
        if not found:
            raise DataError("missing_separator", f"answer: the separator {answer_separator!r} is missing.")
    solution = None if answer is None else str(answer).strip()
    return EvaluationPrompt(tuple(given), solution, str(row.get("task") or task), str(row.get("language") or "und"))


def overlap_with_training(report: RowReport, prompts: Sequence[EvaluationPrompt]) -> Overlap:
    """Which of the prompts stand in the training rows, by the `report` of preparing these."""
    # Some answer makes a row of a prompt; a switch in its text decides of which mode. What can be no row is in none.
    answers = ({"content": "-"}, {"content": "-", "reasoning_content": "-"})
    asked: list[Conversation] = []
    positions = []
    for position, prompt in enumerate(prompts):
        for answer in answers:
            with suppress(DataError):
                asked.append(Conversation.from_messages([*prompt.messages, {"role": "assistant", **answer}]))
                positions.append(position)
                break
    found = prompt_overlap(report.prompt_keys, asked)
    return found._replace(evaluation=[positions[index] for index in found.evaluation], prompts=len(prompts))


def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a rate (Wilson 1927); [0, 1] when nothing was counted."""
    if total == 0:
        return 0.0, 1.0
    z, rate = 1.959964, successes / total
    middle = (rate + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total))
    # At the edges rounding leaves a residue in the last digit.
    low = 0.0 if successes == 0 else max(0.0, middle - half)
    high = 1.0 if successes == total else min(1.0, middle + half)
    return low, high


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean, by the normal approximation; a point when there are fewer than two values."""
    if not values:
        return 0.0, 0.0
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, mean
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    half = 1.959964 * deviation / math.sqrt(len(values))
    return mean - half, mean + half


def _rate(name: str, marks: Sequence[bool]) -> dict[str, Any]:
    """`{name: share, name_interval: [low, high]}`; both are None when nothing was judged."""
    if not marks:
        return {name: None, f"{name}_interval": None}
    return {name: sum(marks) / len(marks), f"{name}_interval": list(wilson_interval(sum(marks), len(marks)))}


def _mean(name: str, values: Sequence[int]) -> dict[str, Any]:
    mean = sum(values) / len(values) if values else 0.0
    low, high = mean_interval(values)
    return {name: mean, f"{name}_interval": [max(0.0, low), high]}


def leaks(reply: Reply, soft_cap: float | None) -> bool:
    """Whether reasoning leaks into an answer: a reflective word in it, or a length over the soft cap.

    The cap is for non-thinking answers, twice the mean answer of thinking replies to the same task (after TNT,
    arXiv 2601.04805); None means there is none.
    """
    if REFLECTIVE_WORDS.search(reply.answer):
        return True
    return reply.mode is Mode.NON_THINKING and soft_cap is not None and (reply.answer_tokens or 0) > soft_cap


def soft_caps(prompts: Sequence[EvaluationPrompt], replies: Sequence[Reply]) -> dict[str, float]:
    """The longest answer, in tokens, that is not yet leakage, by task; none without a good thinking reply."""
    lengths: dict[str, list[int]] = defaultdict(list)
    for prompt, reply in zip(prompts, replies, strict=True):
        if reply.mode is Mode.THINKING and reply.kind == "ok":
            lengths[prompt.task].append(reply.answer_tokens or 0)
    return {task: SOFT_CAP_FACTOR * sum(values) / len(values) for task, values in lengths.items()}


@dataclass(frozen=True)
class ModeReport:
    """The measured proof: per mode, rates and means with 95 % intervals.

    `to_dict` is what `mode_report.json` holds. `replies` keeps every reply beside its prompt, in order, so that
    a surprising figure can be looked into.
    """

    samples: int
    modes: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    prompts: tuple[EvaluationPrompt, ...]
    replies: dict[Mode, tuple[Reply, ...]]

    def to_dict(self) -> dict[str, Any]:
        return {"samples": self.samples, "settings": self.settings, "modes": self.modes}


def summarise(
    prompts: Sequence[EvaluationPrompt], replies: Mapping[Mode, Sequence[Reply]], settings: dict[str, Any]
) -> ModeReport:
    """Count replies (per mode, in the order of the prompts) into a report.

    `format_error` and `leakage` are shares of the replies that were not truncated; `truncated` is the share of those
    that were; `accuracy` is the share of right answers among all prompts with a solution.
    """
    caps = soft_caps([*prompts] * len(replies), [reply for given in replies.values() for reply in given])
    modes = {}
    for mode, given in replies.items():
        pairs = list(zip(prompts, given, strict=True))
        tasks: dict[str, list[tuple[EvaluationPrompt, Reply]]] = defaultdict(list)
        for prompt, reply in pairs:
            tasks[prompt.task].append((prompt, reply))
        finished = [(prompt, reply) for prompt, reply in pairs if reply.kind != "truncated"]
        counts = Counter(reply.kind for reply in given)
        modes[mode.value] = {
            "samples": len(pairs),
            **_rate("format_error", _format_errors(pairs)),
            **_rate("truncated", [reply.kind == "truncated" for reply in given]),
            "classes": {kind: counts[kind] for kind in REPLY_CLASSES},
            **_rate("leakage", [leaks(reply, caps.get(prompt.task)) for prompt, reply in finished]),
            **_rate("accuracy", _marks(pairs)),
            **_mean("reasoning_tokens", [reply.reasoning_tokens or 0 for reply in given]),
            **_mean("answer_tokens", [reply.answer_tokens or 0 for reply in given]),
            "tasks": {
                name: {
                    "language": rows[0][0].language,
                    "samples": len(rows),
                    **_rate("accuracy", _marks(rows)),
                    **_rate("format_error", _format_errors(rows)),
                }
                for name, rows in sorted(tasks.items(), key=lambda item: _task_order(item[0]))
            },
        }
    kept = {mode: tuple(given) for mode, given in replies.items()}
    return ModeReport(len(prompts), modes, settings, tuple(prompts), kept)


def _task_order(name: str) -> tuple[int, str]:
    known = [f"{task}_{language}" for task in TASKS for language in LANGUAGES]
    return (known.index(name) if name in known else len(known), name)


def _marks(rows: Sequence[tuple[EvaluationPrompt, Reply]]) -> list[bool]:
    return [grade(reply.answer, prompt.solution) for prompt, reply in rows if prompt.solution is not None]


def _format_errors(rows: Sequence[tuple[EvaluationPrompt, Reply]]) -> list[bool]:
    return [reply.format_error for _, reply in rows if reply.kind != "truncated"]


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
    """Reply to every prompt in both modes. The random state outside is left as it was.

    `thinking_budget` closes the reasoning after so many tokens (see `ThinkingBudget`).

    Prompts of similar length share a batch, since padding is computed too; the order of the result is that of
    the prompts.
    """
    import torch
    from tqdm.auto import tqdm

    prompter = Prompter(tokenizer)
    jobs = [
        (len(ids), mode, index, ids)
        for mode in Mode
        for index, ids in enumerate(prompter.prompt_ids(prompt.messages, mode) for prompt in prompts)
    ]
    # The modes differ in the length of their replies, so a batch holds one of them only.
    jobs.sort(key=lambda job: (list(Mode).index(job[1]), job[0], job[2]))
    batches = []
    for mode in Mode:
        own = [job for job in jobs if job[1] is mode]
        batches += [own[start : start + batch_size] for start in range(0, len(own), batch_size)]
    found: dict[Mode, dict[int, Reply]] = {mode: {} for mode in Mode}
    with torch.random.fork_rng(), tqdm(total=len(jobs), desc="replies", disable=not progress) as bar:
        torch.manual_seed(seed)
        for batch in batches:
            ids, modes = [job[3] for job in batch], [job[1] for job in batch]
            replies = generate(
                model, tokenizer, ids, modes, sampling, scheme=prompter.scheme, thinking_budget=thinking_budget
            )
            for (_, mode, index, _), reply in zip(batch, replies, strict=True):
                found[mode][index] = reply
            bar.update(len(batch))
    return {mode: [found[mode][index] for index in range(len(prompts))] for mode in Mode}


def evaluate_modes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[EvaluationPrompt] | None = None,
    *,
    samples: int = 1000,
    seed: int = 0,
    batch_size: int = 128,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    progress: bool = True,
) -> ModeReport:
    """Measure the switch: reply to the same prompts in both modes and judge format, answers, lengths and leakage.

    Without `prompts`, `samples` prompts of the embedded tasks are drawn from their evaluation split; a list of
    prompts is cut to `samples`. `max_new_tokens` bounds a reply; one that reaches it counts as `truncated`, never
    as a format error. At temperature 0 decoding is greedy; `seed` fixes the prompts and the sampling.

    Raises ValueError if there are no prompts or the tokenizer's template has no thinking switch.
    """
    chosen = list(task_prompts(samples, seed=seed) if prompts is None else prompts[:samples])
    if not chosen:
        raise ValueError("evaluate_modes: there are no prompts; give at least one, and samples of at least 1.")
    sampling = Sampling(max_new_tokens, temperature, top_p)
    replies = generate_replies(model, tokenizer, chosen, sampling, batch_size=batch_size, seed=seed, progress=progress)
    settings = {**sampling._asdict(), "seed": seed, "prompts": "tasks" if prompts is None else "given"}
    return summarise(chosen, replies, settings)
