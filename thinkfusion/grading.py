# SPDX-License-Identifier: Apache-2.0
"""Graders: whether an answer is right. One is chosen for all prompts, or by a prompt of its own."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

from thinkfusion.tasks import _NUMBER, _as_number, grade

PATTERN_SECONDS = 2.0
"""A pattern that takes longer over an answer does not match it: some take longer than the sun will shine."""
MATH_DEPENDENCY = "the grader math needs math-verify. Install it (pip install math-verify, or the extra math)."


@dataclass(frozen=True)
class Grader:
    """`judge(answer, solution)` says whether the answer is right; `check(solution)` what is wrong with a solution."""

    meaning: str
    judge: Callable[[str, str], bool]
    check: Callable[[str], str | None] = lambda solution: None


def _exact(answer: str, solution: str) -> bool:
    return unicodedata.normalize("NFC", answer).strip() == unicodedata.normalize("NFC", solution).strip()


def _numeric(answer: str, solution: str) -> bool:
    numbers = _NUMBER.findall(answer)
    return bool(numbers) and _as_number(str(numbers[-1])) == _as_number(solution)


def _no_number(solution: str) -> str | None:
    return None if _as_number(solution) is not None else "expected a number"


def _pattern(answer: str, solution: str) -> bool:
    import regex

    try:
        return regex.search(solution, answer, timeout=PATTERN_SECONDS) is not None
    except TimeoutError:
        return False


def _no_pattern(solution: str) -> str | None:
    import regex

    try:
        regex.compile(solution)
    except regex.error as error:
        return f"expected a regular expression: {error}"
    return None


_LETTER = r"(?<![A-Za-z0-9'])([A-Z])(?![A-Za-z0-9'])"
_STATED = re.compile(r"(?i:answer|choice|option|답)[은는]?(?i:\s*is)?[\s:=*(\[\"'$]{0,8}" + _LETTER)
_BOXED = re.compile(r"\\boxed\{\s*\(?([A-Z])\)?\s*\}")
_FIRST = re.compile(r"\s*[*(\[]*([A-Z])(?:[)\].:,*]|\s*$)")
# "A" and "I" are words too: then what follows is a word in small letters.
_ALONE = re.compile(_LETTER + "(?! [a-z])")


def chosen(answer: str) -> str | None:
    """The letter that an answer to a multiple choice names: boxed, stated, the first, or else the last one alone."""
    plain = answer.strip().strip("().*[] ")
    if len(plain) == 1 and plain.isalpha():
        return plain.upper()
    for pattern in (_BOXED, _STATED):
        found = pattern.findall(answer)
        if found:
            return str(found[-1])
    first = _FIRST.match(answer)
    if first is not None:
        return first[1]
    alone = _ALONE.findall(answer)
    return str(alone[-1]) if alone else None


def _choice(answer: str, solution: str) -> bool:
    return chosen(answer) == solution.strip().strip("()").upper()


def _no_choice(solution: str) -> str | None:
    return None if re.fullmatch(r"\s*\(?[A-Za-z]\)?\s*", solution) else "expected the letter of a choice, such as B"


def _math(answer: str, solution: str) -> bool:
    from math_verify import parse, verify

    # Without its own time limit, which needs the main thread's signals.
    wanted, given = parse(solution, parsing_timeout=None), parse(answer, parsing_timeout=None)
    return bool(verify(wanted, given, timeout_seconds=None))


def _no_math(solution: str) -> str | None:
    return None if find_spec("math_verify") is not None else MATH_DEPENDENCY


GRADERS: dict[str, Grader] = {
    "auto": Grader("a number by value, anything else as the whole answer without regard to case", grade),
    "exact": Grader("the whole answer, character for character, but for white space around it", _exact),
    "numeric": Grader("the last number of the answer, by value", _numeric, _no_number),
    "regex": Grader("the solution is a regular expression that is found in the answer", _pattern, _no_pattern),
    "choice": Grader("the letter that the answer names", _choice, _no_choice),
    "math": Grader("the same value or expression, LaTeX included, by math-verify", _math, _no_math),
}


def grader_named(name: object) -> Grader:
    """Raises ValueError, with the names there are, for one that does not exist."""
    if not isinstance(name, str) or name not in GRADERS:
        raise ValueError(f"grader: found {name!r}, expected one of {', '.join(GRADERS)}.")
    return GRADERS[name]


def check_solution(solution: str, grader: str) -> None:
    """Raises ValueError if the grader does not exist, cannot run here, or can make nothing of the solution."""
    wrong = grader_named(grader).check(solution)
    if wrong is not None:
        raise ValueError(wrong if wrong is MATH_DEPENDENCY else f"answer: found {solution!r}, {wrong} ({grader}).")


@lru_cache(maxsize=1 << 16)
def judge(answer: str, solution: str, grader: str = "auto") -> bool:
    """Whether `answer` states `solution`, by the grader of that name. Raises ValueError for an unknown one."""
    # A report judges a reply several times: overall, by task, for the transcripts, in a comparison.
    return grader_named(grader).judge(answer, solution)
