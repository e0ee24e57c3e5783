# SPDX-License-Identifier: Apache-2.0
"""Graders, and the prompts that name them."""

import json

import pytest

from thinkfusion import DataError, judge, read_prompts
from thinkfusion.grading import GRADERS, check_solution, chosen


@pytest.mark.parametrize(
    ("grader", "answer", "solution", "right"),
    [
        ("auto", "The answer is 1,200.0.", "1200", True),
        ("auto", "Paris", " paris ", True),
        ("exact", " Paris\n", "Paris", True),
        ("exact", "paris", "Paris", False),
        ("exact", "e\u0301", "\u00e9", True),
        ("exact", "4.", "4", False),
        ("numeric", "2 + 2 = 4.0", "4", True),
        ("numeric", "012", "12", True),  # auto keeps leading zeros apart
        ("auto", "012", "12", False),
        ("numeric", "four", "4", False),
        ("numeric", "4, or 5", "4", False),
        ("regex", "It is 42 km.", r"\b42\s*km\b", True),
        ("regex", "It is 142 km.", r"\b42\s*km\b", False),
        ("regex", "a" * 40 + "!", r"(a|aa)+$", False),  # takes ages, and is stopped
        ("choice", "B", "B", True),
        ("choice", "(b)", "B", True),
        ("choice", "The answer is (C).", "C", True),
        ("choice", "정답은 B입니다.", "B", True),
        ("choice", "\\boxed{D}", "D", True),
        ("choice", "A) Paris, since B is wrong", "A", True),
        ("choice", "I think a bit, then C", "C", True),
        ("choice", "A good choice would be D", "D", True),
        ("choice", "none", "B", False),
        ("choice", "Answer: A", "B", False),
    ],
)
def test_graders(grader, answer, solution, right):
    check_solution(solution, grader)
    assert judge(answer, solution, grader) is right


def test_a_choice_is_none_where_there_is_no_letter():
    assert chosen("") is None
    assert chosen("no idea at all") is None


def test_math_is_graded_by_math_verify():
    pytest.importorskip("math_verify")
    assert judge("It is $\\frac{1}{2}$.", "0.5", "math")
    assert judge("So the result is $x^2 + 2x + 1$", "$(x+1)^2$", "math")
    assert not judge("It is $\\frac{1}{3}$.", "0.5", "math")


def test_math_without_math_verify_says_what_to_install(monkeypatch):
    monkeypatch.setattr("thinkfusion.grading.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install math-verify"):
        check_solution("1", "math")


@pytest.mark.parametrize(
    ("grader", "solution", "message"),
    [
        ("numeric", "four", "expected a number"),
        ("regex", "(", "expected a regular expression"),
        ("choice", "Paris", "expected the letter of a choice"),
        ("best", "4", "found 'best', expected one of auto, exact, numeric, regex, choice, math"),
        (None, "4", "found None"),
    ],
)
def test_what_a_grader_cannot_use_is_named(grader, solution, message):
    with pytest.raises(ValueError, match=message):
        check_solution(solution, grader)


def rows(write, *made):
    return write("".join(json.dumps(row) + "\n" for row in made), "mine.jsonl")


def test_a_row_names_its_grader_and_the_others_take_the_given_one(write):
    path = rows(
        write, {"prompt": "a", "answer": "B", "grader": "choice"}, {"prompt": "b", "answer": 4}, {"prompt": "c"}
    )
    assert [prompt.grader for prompt in read_prompts(path, grader="numeric")] == ["choice", "numeric", "numeric"]
    assert [prompt.grader for prompt in read_prompts(path)] == ["choice", "auto", "auto"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "answer": "4", "grader": "best"}, "unknown_grader"),
        ({"prompt": "a", "answer": "4", "grader": ["exact"]}, "unknown_grader"),
        ({"prompt": "a", "answer": "(", "grader": "regex"}, "bad_solution"),
    ],
)
def test_a_bad_grader_or_solution_names_its_row(write, row, reason):
    with pytest.raises(DataError, match=r"mine\.jsonl, row 2: ") as caught:
        read_prompts(rows(write, {"prompt": "x", "answer": "4"}, row))
    assert caught.value.reason == reason


def test_a_grader_that_does_not_exist_is_told_before_the_file_is_read():
    with pytest.raises(ValueError, match="grader: found 'best', expected one of"):
        read_prompts("nowhere.jsonl", grader="best")


def test_a_grader_needs_an_answer(write):
    with pytest.raises(ValueError, match="found no answer in any row, so exact has nothing to grade"):
        read_prompts(rows(write, {"prompt": "x"}), grader="exact")


def test_every_grader_says_what_it_does():
    assert all(grader.meaning for grader in GRADERS.values())
