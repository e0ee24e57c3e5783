# SPDX-License-Identifier: Apache-2.0
"""The embedded tasks: questions with reasoning, answers and graders, in English and Korean.

Two tasks cannot be answered without working step by step (a running sum and a dial, both modulo 10, so that
a guess is right one time in ten), and two can (the largest digit, and a number written backwards). A model
with a working switch is therefore good at all four in thinking mode and at the last two in non-thinking
mode; any other pattern shows at once which mode is broken.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal

LANGUAGES = ("en", "ko")
SPLITS = ("train", "evaluation")


@dataclass(frozen=True)
class TaskSample:
    """One question of an embedded task.

    `answer` is the full sentence a reply should consist of; `solution` is the part of it that a grader
    compares ("4", "319284").
    """

    task: str
    language: str
    question: str
    reasoning: str
    answer: str
    solution: str

    @property
    def name(self) -> str:
        """Task and language in one word, the key of a mode report: `running_sum_ko`."""
        return f"{self.task}_{self.language}"


@dataclass(frozen=True)
class Problem:
    """A problem before it is worded: what identifies it, what fills the question, its trace and solution."""

    key: str
    fields: dict[str, str]
    steps: str
    solution: str


@dataclass(frozen=True)
class Task:
    """An embedded task: how problems are drawn and how they are worded per language."""

    name: str
    needs_reasoning: bool
    draw: Callable[[random.Random], Problem]
    questions: dict[str, tuple[str, ...]]
    reasoning: dict[str, str]


def _digits(rng: random.Random, low: int, high: int) -> list[int]:
    return [rng.randint(1, 9)] + [rng.randint(0, 9) for _ in range(rng.randint(low, high) - 1)]


def _join(digits: Sequence[int]) -> str:
    return "".join(map(str, digits))


def _running_sum(rng: random.Random) -> Problem:
    digits = _digits(rng, 4, 7)
    total, steps = digits[0], []
    for digit in digits[1:]:
        steps.append(f"{total}+{digit}→{(total + digit) % 10}")
        total = (total + digit) % 10
    return Problem(_join(digits), {"number": _join(digits)}, ", ".join(steps), str(total))


def _dial(rng: random.Random) -> Problem:
    position = start = rng.randint(0, 9)
    turns, steps = [], []
    for _ in range(rng.randint(3, 6)):
        amount, sign = rng.randint(1, 9), rng.choice("+-")
        after = (position + (amount if sign == "+" else -amount)) % 10
        turns.append(f"{sign}{amount}")
        steps.append(f"{position}{sign}{amount}→{after}")
        position = after
    fields = {"start": str(start), "turns": " ".join(turns)}
    return Problem(f"{start} {fields['turns']}", fields, ", ".join(steps), str(position))


def _maximum(rng: random.Random) -> Problem:
    # Every answer is equally likely, so that "9" is not a good guess.
    largest = rng.randint(1, 9)
    digits = [rng.randint(0, largest) for _ in range(rng.randint(4, 6))]
    digits[rng.randrange(len(digits))] = largest
    so_far = [max(digits[: end + 1]) for end in range(len(digits))]
    return Problem(_join(digits), {"digits": ", ".join(map(str, digits))}, ", ".join(map(str, so_far)), str(largest))


def _reversal(rng: random.Random) -> Problem:
    digits = _digits(rng, 3, 5)
    backwards = digits[::-1]
    return Problem(_join(digits), {"number": _join(digits)}, ", ".join(map(str, backwards)), _join(backwards))


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "running_sum",
            True,
            _running_sum,
            {
                "en": (
                    "Add up the digits of {number}. What is the last digit of the sum?",
                    "What is the sum of the digits of {number} modulo 10?",
                ),
                "ko": (
                    "{number}의 각 자리 숫자를 모두 더하면 합의 마지막 자리는 무엇입니까?",
                    "{number}의 자릿수 합을 10으로 나눈 나머지는 무엇입니까?",
                ),
            },
            {"en": "I add one digit after the other: {steps}.", "ko": "숫자를 하나씩 더합니다: {steps}."},
        ),
        Task(
            "dial",
            True,
            _dial,
            {
                "en": (
                    "A dial from 0 to 9 points to {start}. It turns by {turns}. Where does it point now?",
                    "Start at {start} on a dial with the digits 0 to 9 and turn it by {turns}. Which digit is reached?",
                ),
                "ko": (
                    "0부터 9까지 있는 다이얼이 눈금 {start}에 있습니다. {turns} 만큼 돌리면 어디에 있습니까?",
                    "다이얼을 눈금 {start}에서 시작하여 {turns} 만큼 돌립니다. 어떤 숫자에 도착합니까?",
                ),
            },
            {"en": "I follow the dial: {steps}.", "ko": "다이얼을 따라갑니다: {steps}."},
        ),
        Task(
            "maximum",
            False,
            _maximum,
            {
                "en": ("Which of the digits {digits} is the largest?", "What is the maximum of {digits}?"),
                "ko": (
                    "숫자 {digits} 중에서 가장 큰 것은 무엇입니까?",
                    "{digits}의 최댓값은 무엇입니까?",
                ),
            },
            {"en": "The largest so far: {steps}.", "ko": "지금까지 가장 큰 수: {steps}."},
        ),
        Task(
            "reversal",
            False,
            _reversal,
            {
                "en": ("Write {number} backwards.", "What is {number} with its digits in reverse order?"),
                "ko": ("다음 숫자를 거꾸로 쓰세요: {number}", "{number}의 숫자를 역순으로 쓰면 무엇입니까?"),
            },
            {"en": "From the end: {steps}.", "ko": "끝에서부터: {steps}."},
        ),
    )
}

ANSWERS = {"en": "The answer is {solution}.", "ko": "답은 {solution}입니다."}


def split_of(key: str) -> str:
    """The split a problem belongs to, by a checksum: one problem in eight is kept for evaluation.

    The same digits never stand in both splits, whatever the seed, the wording or the language.
    """
    return "evaluation" if zlib.crc32(key.encode()) % 8 == 0 else "train"


def generate_samples(
    count: int,
    *,
    seed: int,
    split: str = "train",
    tasks: Sequence[str] | None = None,
    languages: Sequence[str] = LANGUAGES,
) -> list[TaskSample]:
    """Draw `count` samples, spread evenly over tasks × languages in turn; the same seed gives the same samples.

    Raises ValueError for an unknown task, language or split.
    """
    names = tuple(tasks) if tasks is not None else tuple(TASKS)
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is unknown; choose one of {', '.join(SPLITS)}.")
    for field, chosen, known in (("tasks", names, TASKS), ("languages", languages, LANGUAGES)):
        unknown = [name for name in chosen if name not in known]
        if unknown or not chosen:
            raise ValueError(f"{field}: {unknown or 'an empty list'} is unknown; choose from {', '.join(known)}.")
    rng = random.Random(f"{seed}-{split}")
    cells = [(TASKS[name], language) for name in names for language in languages]
    samples = []
    for index in range(count):
        task, language = cells[index % len(cells)]
        problem = task.draw(rng)
        while split_of(problem.key) != split:
            problem = task.draw(rng)
        samples.append(
            TaskSample(
                task=task.name,
                language=language,
                question=rng.choice(task.questions[language]).format(**problem.fields),
                reasoning=task.reasoning[language].format(steps=problem.steps),
                answer=ANSWERS[language].format(solution=problem.solution),
                solution=problem.solution,
            )
        )
    return samples


# A sign counts where it does not join two things ("2-4"), a comma where three digits follow.
_NUMBER = re.compile(
    r"(?:(?<![\w.)])[-+−])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\w))?"
)


def _as_number(text: str) -> Decimal | None:
    plain = text.strip().lstrip("$").rstrip(".")
    return Decimal(plain.replace(",", "").replace("−", "-")) if _NUMBER.fullmatch(plain) else None


def grade(answer: str, solution: str) -> bool:
    """Whether `answer` states `solution`.

    A numeric solution is compared with the last number of the answer by value (so "1,200.0" equals "1200"),
    except that leading zeros count, since "012" is not a number written backwards; any other solution is
    compared with the whole answer, without regard to case and outer white space.
    """
    wanted = _as_number(solution)
    if wanted is None:
        return answer.strip().casefold() == solution.strip().casefold()
    numbers = _NUMBER.findall(answer)
    if not numbers:
        return False
    last, plain = str(numbers[-1]), solution.strip()
    if re.match(r"0\d", last) or re.match(r"0\d", plain):
        return last == plain
    return _as_number(last) == wanted
