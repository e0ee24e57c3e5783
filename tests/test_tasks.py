# SPDX-License-Identifier: Apache-2.0
"""The embedded tasks: every figure is worked out again from the question's own digits."""

import re
from collections import Counter
from itertools import accumulate

import pytest

from thinkfusion.tasks import LANGUAGES, SPLITS, TASKS, generate_samples, grade, split_of

SEEDS = range(4)
CELLS = [(task, language) for task in TASKS for language in LANGUAGES]


def digits_of(sample):
    """What the problem is about, read from its question: the digits, or a start and its turns."""
    question = sample.question
    if sample.task == "running_sum":
        return [int(digit) for digit in re.search(r"\d{4,7}", question)[0]]
    if sample.task == "reversal":
        return [int(digit) for digit in re.search(r"\d{3,5}", question)[0]]
    if sample.task == "maximum":
        return [int(digit) for digit in re.search(r"\d(?:, \d)+", question)[0].split(", ")]
    start = re.search(r"(?:points to|Start at|눈금) (\d)", question)[1]
    return [int(start), *map(int, re.findall(r"[+-]\d", question))]


def key_of(sample):
    """The problem without its wording."""
    digits = digits_of(sample)
    if sample.task == "dial":
        return f"{digits[0]} {' '.join(f'{turn:+d}' for turn in digits[1:])}"
    return "".join(map(str, digits))


def solve(sample):
    digits = digits_of(sample)
    if sample.task in ("running_sum", "dial"):
        return str(sum(digits) % 10)
    return str(max(digits)) if sample.task == "maximum" else "".join(map(str, reversed(digits)))


def of_task(task, count=60, seed=5):
    return generate_samples(count, seed=seed, tasks=[task])


# --- drawing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_the_same_seed_gives_the_same_samples(split):
    assert generate_samples(40, seed=3, split=split) == generate_samples(40, seed=3, split=split)


def test_another_seed_or_split_gives_other_samples():
    train = {sample.question for sample in generate_samples(40, seed=3)}
    assert train != {sample.question for sample in generate_samples(40, seed=4)}
    assert train != {sample.question for sample in generate_samples(40, seed=3, split="evaluation")}


def test_no_problem_and_no_question_is_in_both_splits():
    samples = {split: [s for seed in SEEDS for s in generate_samples(240, seed=seed, split=split)] for split in SPLITS}
    train, evaluation = (samples[split] for split in SPLITS)
    assert not {sample.question for sample in train} & {sample.question for sample in evaluation}
    # Across tasks, wordings and languages: the same digits are on one side only.
    assert not {key_of(sample) for sample in train} & {key_of(sample) for sample in evaluation}
    for split in SPLITS:
        assert {split_of(key_of(sample)) for sample in samples[split]} == {split}


def test_one_problem_in_eight_is_kept_for_evaluation():
    shares = Counter(split_of(str(number)) for number in range(8000))
    assert shares["evaluation"] == pytest.approx(1000, rel=0.1)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 80, 83])
def test_samples_are_spread_evenly(count):
    samples = generate_samples(count, seed=0)
    assert len(samples) == count
    counts = Counter((sample.task, sample.language) for sample in samples)
    assert max(counts.values(), default=0) - min(counts[cell] for cell in CELLS) <= 1
    assert set(counts) <= set(CELLS)


def test_tasks_and_languages_can_be_chosen():
    samples = generate_samples(20, seed=0, tasks=["dial", "maximum"], languages=["ko"])
    assert Counter(sample.name for sample in samples) == {"dial_ko": 10, "maximum_ko": 10}


@pytest.mark.parametrize("task", TASKS)
def test_every_wording_is_used(task):
    numbers = re.compile(r"[+-]?\d(?:[\d, +-]*\d)?")
    assert len({numbers.sub("#", sample.question) for sample in of_task(task)}) == 4


@pytest.mark.parametrize("task", TASKS)
def test_the_language_is_that_of_the_sample(task):
    for sample in of_task(task):
        for text in (sample.question, sample.reasoning, sample.answer):
            assert bool(re.search("[가-힣]", text)) is (sample.language == "ko")
            assert bool(re.search("[a-z]", text)) is (sample.language == "en")
            assert not re.search("[{}]", text)


@pytest.mark.parametrize("task", ["running_sum", "dial", "maximum"])
def test_no_answer_is_a_good_guess(task):
    solutions = Counter(sample.solution for sample in of_task(task, 1500))
    assert len(solutions) >= 9
    assert max(solutions.values()) < 0.17 * 1500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ["addition"]}, r"tasks: \['addition'\].*running_sum, dial, maximum, reversal"),
        ({"tasks": []}, "tasks: an empty list"),
        ({"languages": ["en", "fr"]}, r"languages: \['fr'\].*en, ko"),
        ({"languages": []}, "languages: an empty list"),
        ({"split": "test"}, "split: 'test'.*train, evaluation"),
    ],
)
def test_unknown_names_are_errors_that_list_the_known(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate_samples(4, seed=0, **arguments)


# --- correctness ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", TASKS)
def test_the_solution_is_right(task, split):
    for sample in generate_samples(80, seed=9, split=split, tasks=[task]):
        assert sample.solution == solve(sample), sample.question


@pytest.mark.parametrize(("task", "step"), [("running_sum", r"(\d)(\+)(\d)→(\d)"), ("dial", r"(\d)([+-])(\d)→(\d)")])
def test_the_steps_of_sums_and_dials_lead_to_the_solution(task, step):
    for sample in of_task(task):
        now, *turns = digits_of(sample)
        steps = re.findall(step, sample.reasoning)
        assert len(steps) == len(turns)
        for turn, (before, sign, amount, after) in zip(turns, steps, strict=True):
            assert (int(before), int(sign + amount)) == (now, turn)
            now = (now + turn) % 10
            assert int(after) == now
        assert sample.solution == str(now)


@pytest.mark.parametrize(("task", "end"), [("maximum", -1), ("reversal", None)])
def test_the_steps_of_maxima_and_reversals_lead_to_the_solution(task, end):
    for sample in of_task(task):
        digits = digits_of(sample)
        steps = [int(step) for step in re.search(r": ([\d, ]+)\.$", sample.reasoning)[1].split(", ")]
        assert steps == (list(accumulate(digits, max)) if task == "maximum" else digits[::-1])
        assert sample.solution == ("".join(map(str, steps)) if end is None else str(steps[end]))


@pytest.mark.parametrize("task", TASKS)
def test_the_own_answer_is_right_and_another_is_wrong(task):
    for sample in of_task(task):
        assert grade(sample.answer, sample.solution)
        wrong = sample.solution[:-1] + str((int(sample.solution[-1]) + 1) % 10)
        other = sample.answer.replace(sample.solution, wrong)
        assert other != sample.answer
        assert not grade(other, sample.solution)


# --- grading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "solution", "right"),
    [
        ("The answer is 4.", "4", True),
        ("답은 4입니다.", "4", True),
        ("4", " 4 ", True),
        ("The answer is 5.", "4", False),
        ("The answer is 14.", "4", False),
        ("Not 5 but 4.", "4", True),
        ("It is 4, not 5.", "4", False),
        ("", "4", False),
        ("I do not know.", "4", False),
        ("1,200", "1200", True),
        ("1200", "1,200", True),
        ("It costs $1,200.", "1200", True),
        ("1,234,567", "1234567", True),
        ("It is 1,200, I believe", "1200", True),
        ("1,200.0", "1200", True),
        ("0.250", "0.25", True),
        ("0.25", "25", False),
        ("18.", "18.0", True),
        ("18", "$18", True),
        ("012", "012", True),
        ("The answer is 012.", "012", True),
        ("12", "012", False),
        ("012", "12", False),
        ("00", "0", False),
        ("0", "0", True),
        ("-3", "-3", True),
        ("It falls to -3.5 degrees.", "-3.50", True),
        ("3", "-3", False),
        ("-3", "3", False),
        ("+3", "3", True),
        ("Seoul", "seoul", True),
        (" Seoul\n", "Seoul", True),
        ("In Seoul", "Seoul", False),
        ("서울", "서울", True),
        ("서울", "부산", False),
    ],
)
def test_grade(answer, solution, right):
    assert grade(answer, solution) is right


@pytest.mark.parametrize(
    "solution",
    ["4", "-4", "0.5", ".5", "1,200", "$5", "007", "1/2", "5 %", "x + 1", "1e5", "nan", "Infinity", "sNaN"],
)
def test_every_solution_is_right_about_itself(solution):
    assert grade(solution, solution)


def test_a_solution_that_only_python_calls_a_number_fails_no_reply():
    assert grade("The answer is 5.", "sNaN") is False


def test_a_list_of_digits_is_no_number():
    """Commas of thousands stand before three digits: "4,3" is the steps of a reversal, and not "43"."""
    assert not grade("From the end: 4,3", "43")
