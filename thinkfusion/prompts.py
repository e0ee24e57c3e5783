# SPDX-License-Identifier: Apache-2.0
"""The prompts that both modes reply to: those of the embedded tasks, or one's own from a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinkfusion.conversations import Conversation, DataError
from thinkfusion.generation import split_pending
from thinkfusion.grading import GRADERS, check_solution, grader_named
from thinkfusion.modes import split_soft_switch
from thinkfusion.records import Overlap, prompt_overlap
from thinkfusion.row_report import RowReport
from thinkfusion.sources import iterate_rows
from thinkfusion.tasks import LANGUAGES, generate_samples


@dataclass(frozen=True)
class EvaluationPrompt:
    """A prompt to reply to in both modes. Without `solution` only the format is judged, not the answer.

    `grader` is a name of `grading.GRADERS`.
    """

    messages: tuple[dict[str, Any], ...]
    solution: str | None = None
    task: str = "prompts"
    language: str = "und"
    grader: str = "auto"

    @property
    def question(self) -> str:
        """The text of the last user message, without a soft switch; white space if it has none."""
        asked = next(message for message in reversed(self.messages) if message.get("role") == "user")
        content = asked.get("content")
        if isinstance(content, list):
            content = "".join(part.get("text") or "" for part in content if isinstance(part, Mapping))
        return split_soft_switch(content if isinstance(content, str) else " ")[0]


def task_prompts(
    samples: int,
    *,
    seed: int = 0,
    tasks: Sequence[str] | None = None,
    languages: Sequence[str] = LANGUAGES,
    split: str = "evaluation",
) -> list[EvaluationPrompt]:
    """Prompts of the embedded tasks, from the problems kept for evaluation, or from those for training (`train`)."""
    drawn = generate_samples(samples, seed=seed, split=split, tasks=tasks, languages=languages)
    return [
        EvaluationPrompt(({"role": "user", "content": sample.question},), sample.solution, sample.name, sample.language)
        for sample in drawn
    ]


def read_prompts(
    path: str | Path, *, answer_separator: str | None = None, limit: int | None = None, grader: str | None = None
) -> list[EvaluationPrompt]:
    """Read prompts of one's own: rows with `prompt` (or `question`) or `messages`, and an optional `answer`.

    `task`, `language` and `grader` of a row are used if given, else `grader` (by default `auto`). With
    `answer_separator`, the answer is what stands after its last occurrence. Raises DataError for a bad row, ValueError
    for an empty file, a grader that does not exist or has no answer to judge.
    """
    if grader is not None:
        grader_named(grader)
    prompts: list[EvaluationPrompt] = []
    for line, row in iterate_rows(path):
        if limit is not None and len(prompts) == limit:
            break
        try:
            prompts.append(_prompt(row, answer_separator, Path(path).stem, grader or "auto"))
        except DataError as error:
            raise error.at(str(path), line) from None
    if not prompts:
        raise ValueError(f"{path}: there is no prompt in it.")
    if grader is not None and all(prompt.solution is None for prompt in prompts):
        raise ValueError(
            f"{path}: found no answer in any row, so {grader} has nothing to grade. Give the rows an answer."
        )
    return prompts


def _prompt(row: Any, answer_separator: str | None, task: str, grader: str) -> EvaluationPrompt:
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
    grader = grader if row.get("grader") is None else row["grader"]
    if not isinstance(grader, str) or grader not in GRADERS:
        raise DataError("unknown_grader", f"grader: found {grader!r}, expected one of {', '.join(GRADERS)}.")
    if solution is not None:
        try:
            check_solution(solution, grader)
        except ValueError as error:
            raise DataError("bad_solution", str(error)) from None
    task, language = str(row.get("task") or task), str(row.get("language") or "und")
    return EvaluationPrompt(tuple(given), solution, task, language, grader)


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
