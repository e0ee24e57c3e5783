# SPDX-License-Identifier: Apache-2.0
"""Does the switch work? Replies in both modes to the same prompts, judged, with 95 % intervals."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from thinkfusion.budget_curve import measure_budgets
from thinkfusion.flipping import measure_flip
from thinkfusion.generation import Sampling
from thinkfusion.grading import judge
from thinkfusion.intervals import mean, mean_interval, rate, ratio_interval, wilson_interval
from thinkfusion.leakage import REFLECTIVE_WORDS, SOFT_CAP_FACTOR, leaks, over_cap, soft_caps
from thinkfusion.mode_verdict import Verdict, verdict
from thinkfusion.modes import ENDPOINT_CLASSES, REPLY_CLASSES, Mode, Reply
from thinkfusion.obedience import measure_obedience
from thinkfusion.probing import measure_probe
from thinkfusion.prompts import EvaluationPrompt, overlap_with_training, read_prompts, task_prompts
from thinkfusion.replying import Asked, Replier, generate_replies, reply_in_both_modes
from thinkfusion.tasks import LANGUAGES, TASKS
from thinkfusion.transcripts import PER_KIND, Failure, failures_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "REFLECTIVE_WORDS",
    "SOFT_CAP_FACTOR",
    "EvaluationPrompt",
    "ModeReport",
    "evaluate_modes",
    "generate_replies",
    "leaks",
    "mean_interval",
    "overlap_with_training",
    "read_prompts",
    "soft_caps",
    "summarise",
    "task_prompts",
    "wilson_interval",
]


@dataclass(frozen=True)
class ModeReport:
    """The measured proof: per mode, rates and means with 95 % intervals.

    `to_dict` is what `mode_report.json` holds. `replies` keeps every reply beside its prompt, in order, so that
    a surprising figure can be looked into. `measured` has what was measured beside the modes (`obedience`, `flip`,
    `budgets`, `probe`, `comparison`, `harness`), `aside` the failing replies of these.
    """

    samples: int
    modes: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    prompts: tuple[EvaluationPrompt, ...]
    replies: dict[Mode, tuple[Reply, ...]]
    measured: dict[str, Any] = field(default_factory=dict)
    aside: tuple[Failure, ...] = ()

    @property
    def verdict(self) -> Verdict:
        return verdict(self.modes, self.measured)

    def to_dict(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "verdict": self.verdict.to_dict(),
            "settings": self.settings,
            "modes": self.modes,
            "tokens": token_histogram(self.replies),
            **self.measured,
        }

    def failures(self, limit: int = PER_KIND) -> list[Failure]:
        """At most `limit` failing replies of each kind."""
        caps = _caps(self.prompts, self.replies)
        rows = []
        for mode, replies in self.replies.items():
            for prompt, reply in zip(self.prompts, replies, strict=True):
                if reply.kind == "unanswered":
                    continue
                missed = prompt.solution if _right(prompt, reply) is False else None
                where = f"{prompt.task}, {mode.value.replace('_', '-')}"
                rows.append((where, prompt.messages, reply, caps.get(prompt.task), missed))
        return [*failures_of(rows, limit), *self.aside]


BINS = 24


def token_histogram(replies: Mapping[Mode, Sequence[Reply]]) -> dict[str, Any]:
    """Replies by length: `width` tokens a bin, and for each mode how many replies fall in each bin from 0 on.

    A bin holds lengths from `n * width` up to, but without, `(n + 1) * width`; reasoning and answer together.
    """
    lengths = {
        mode: [(reply.reasoning_tokens or 0) + (reply.answer_tokens or 0) for reply in given]
        for mode, given in replies.items()
    }
    longest = max((length for given in lengths.values() for length in given), default=0)
    width = next(size for size in _sizes() if (longest + 1) <= size * BINS)
    counts = {mode: Counter(length // width for length in given) for mode, given in lengths.items()}
    return {
        "width": width,
        **{mode.value: [counted[place] for place in range(longest // width + 1)] for mode, counted in counts.items()},
    }


def _sizes() -> Any:
    scale = 1
    while True:
        yield from (scale, 2 * scale, 5 * scale)
        scale *= 10


def summarise(
    prompts: Sequence[EvaluationPrompt],
    replies: Mapping[Mode, Sequence[Reply]],
    settings: dict[str, Any],
    *,
    seconds: Mapping[Mode, float] | None = None,
    measured: dict[str, Any] | None = None,
    aside: Sequence[Failure] = (),
) -> ModeReport:
    """Count replies (per mode, in the order of the prompts) into a report.

    `format_error` and `leakage` are shares of the replies that were not truncated; `truncated` is the share of those
    that were; `accuracy` is the share of right answers among all prompts with a solution. Of a served model, prompts
    without a reply are in none of these, and replies whose trace cannot be seen in no `format_error`; then `classes`
    has ENDPOINT_CLASSES too, and token counts may be None, where the server tells none. Parts of leakage are
    `reflective_words` (a mean per finished answer), `over_soft_cap` (the share of non-thinking ones) and
    `answer_token_ratio` (the mode's mean answer over that of the other mode, same prompts). With `seconds`, `speed`.
    """
    caps = _caps(prompts, replies)
    modes = {}
    served = "endpoint" in (measured or {})
    kinds = (*REPLY_CLASSES, *ENDPOINT_CLASSES) if served else REPLY_CLASSES
    for mode, given in replies.items():
        pairs = list(zip(prompts, given, strict=True))
        tasks: dict[str, list[tuple[EvaluationPrompt, Reply]]] = defaultdict(list)
        for prompt, reply in pairs:
            tasks[prompt.task].append((prompt, reply))
        got = [reply for reply in given if reply.kind != "unanswered"]
        finished = [(prompt, reply) for prompt, reply in pairs if reply.kind not in ("truncated", "unanswered")]
        counts = Counter(reply.kind for reply in given)
        modes[mode.value] = {
            "samples": len(pairs),
            **rate("format_error", _format_errors(pairs)),
            **rate("truncated", [reply.kind == "truncated" for reply in got]),
            "classes": {kind: counts[kind] for kind in kinds},
            **rate("leakage", [leaks(reply, caps.get(prompt.task)) for prompt, reply in finished]),
            **mean("reflective_words", [len(REFLECTIVE_WORDS.findall(reply.answer)) for _, reply in finished]),
            **_over_soft_cap(mode, finished, caps),
            **_answer_token_ratio(mode, replies),
            **rate("accuracy", _marks(pairs)),
            **_mean_tokens("reasoning_tokens", got, served=served),
            **_mean_tokens("answer_tokens", got, served=served),
            **({"speed": _speed(given, seconds[mode])} if seconds is not None else {}),
            "tasks": {
                name: {
                    "language": rows[0][0].language,
                    "samples": len(rows),
                    **rate("accuracy", _marks(rows)),
                    **rate("format_error", _format_errors(rows)),
                }
                for name, rows in sorted(tasks.items(), key=lambda item: _task_order(item[0]))
            },
        }
    kept = {mode: tuple(given) for mode, given in replies.items()}
    return ModeReport(len(prompts), modes, settings, tuple(prompts), kept, measured or {}, tuple(aside))


def _mean_tokens(name: str, replies: Sequence[Reply], *, served: bool) -> dict[str, Any]:
    """Of the replies whose tokens a server counted; a checkpoint's are all counted."""
    counts = [getattr(reply, name) for reply in replies]
    if served and None in counts:
        counts = [count for count in counts if count is not None]
        if not counts:
            return {name: None, f"{name}_interval": None}
    return mean(name, [count or 0 for count in counts])


def _caps(prompts: Sequence[EvaluationPrompt], replies: Mapping[Mode, Sequence[Reply]]) -> dict[str, float]:
    return soft_caps([*prompts] * len(replies), [reply for given in replies.values() for reply in given])


def _over_soft_cap(
    mode: Mode, finished: Sequence[tuple[EvaluationPrompt, Reply]], caps: dict[str, float]
) -> dict[str, Any]:
    if mode is Mode.THINKING:
        return {}
    return rate("over_soft_cap", [over_cap(reply, caps.get(prompt.task)) for prompt, reply in finished])


def _answer_token_ratio(mode: Mode, replies: Mapping[Mode, Sequence[Reply]]) -> dict[str, Any]:
    name = "answer_token_ratio"
    others = [given for key, given in replies.items() if key is not mode]
    lengths = [[float(reply.answer_tokens or 0) for reply in given] for given in (replies[mode], *others)]
    if len(lengths) != 2 or not sum(lengths[1]):
        return {name: None, f"{name}_interval": None}
    ratio = sum(lengths[0]) / sum(lengths[1])
    return {name: ratio, f"{name}_interval": list(ratio_interval(lengths[0], lengths[1]))}


def _speed(replies: Sequence[Reply], seconds: float) -> dict[str, float | None]:
    tokens = sum((reply.reasoning_tokens or 0) + (reply.answer_tokens or 0) for reply in replies)
    return {
        "seconds": seconds,
        "replies_per_second": len(replies) / seconds if seconds else None,
        "tokens_per_second": tokens / seconds if seconds else None,
    }


def _task_order(name: str) -> tuple[int, str]:
    known = [f"{task}_{language}" for task in TASKS for language in LANGUAGES]
    return (known.index(name) if name in known else len(known), name)


def _right(prompt: EvaluationPrompt, reply: Reply) -> bool | None:
    return None if prompt.solution is None else judge(reply.answer, prompt.solution, prompt.grader)


def _marks(rows: Sequence[tuple[EvaluationPrompt, Reply]]) -> list[bool]:
    marks = (_right(prompt, reply) for prompt, reply in rows if reply.kind != "unanswered")
    return [mark for mark in marks if mark is not None]


def _format_errors(rows: Sequence[tuple[EvaluationPrompt, Reply]]) -> list[bool]:
    return [reply.format_error for _, reply in rows if reply.judged]


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
    obedience: int = 0,
    flip: int = 0,
    budgets: Sequence[int] = (),
    budget_samples: int | None = None,
    probe: int = 0,
) -> ModeReport:
    """Measure the switch: reply to the same prompts in both modes and judge format, answers, lengths and leakage.

    Without `prompts`, `samples` prompts of the embedded tasks are drawn from their evaluation split; a list of
    prompts is cut to `samples`. `max_new_tokens` bounds a reply; one that reaches it counts as `truncated`, never
    as a format error. At temperature 0 decoding is greedy; `seed` fixes the prompts and the sampling.

    More is measured where it is asked for: `obedience` prompts for each of the 54 combinations of switches, `flip`
    conversations that alternate modes, the curve over thinking `budgets` (on the first `budget_samples` prompts, or on
    all), and `probe` rows for the switch probe.

    Raises ValueError if there are no prompts or the tokenizer's template has no thinking switch.
    """
    chosen = list(task_prompts(samples, seed=seed) if prompts is None else prompts[:samples])
    if not chosen:
        raise ValueError("evaluate_modes: there are no prompts; give at least one, and samples of at least 1.")
    replier = Replier(model, tokenizer, Sampling(max_new_tokens, temperature, top_p), batch_size, seed, progress)
    replies, seconds = reply_in_both_modes(replier, chosen)
    measured, aside = measure_further(
        replier, chosen, obedience=obedience, flip=flip, budgets=budgets, budget_samples=budget_samples
    )
    if probe:
        measured["probe"] = measure_probe(model, tokenizer, samples=probe, seed=seed)
    settings = {**replier.sampling._asdict(), "seed": seed, "prompts": "tasks" if prompts is None else "given"}
    return summarise(chosen, replies, settings, seconds=seconds, measured=measured, aside=aside)


def measure_further(
    replier: Asked,
    prompts: Sequence[EvaluationPrompt],
    *,
    obedience: int = 0,
    flip: int = 0,
    budgets: Sequence[int] = (),
    budget_samples: int | None = None,
) -> tuple[dict[str, Any], list[Failure]]:
    """What a report has beside the modes, of a checkpoint or a served model, and the replies that failed in it."""
    measured: dict[str, Any] = {}
    aside: list[Failure] = []
    if obedience:
        measured["obedience"], found = measure_obedience(replier, prompts[:obedience])
        aside += found
    if flip:
        measured["flip"], found = measure_flip(replier, prompts, conversations=flip)
        aside += found
    if budgets:
        measured["budgets"] = measure_budgets(replier, prompts[:budget_samples], budgets)
    return measured, aside
