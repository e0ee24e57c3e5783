# SPDX-License-Identifier: Apache-2.0
"""Pairs of checkpoints: the test, the interval, the table, and what is no pair."""

import json
import random

import pytest

from thinkfusion import EvaluationPrompt, Mode, Reply, mcnemar_exact, save_report
from thinkfusion.comparing import (
    answered,
    compare,
    is_report,
    paired_difference_interval,
    paired_table,
    read_report,
)
from thinkfusion.evaluation import summarise
from thinkfusion.intervals import ratio_interval
from thinkfusion.reporting import measured_lines


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (1, 0, 1.0),
        (0, 5, 0.0625),
        (0, 6, 0.03125),
        (2, 8, 0.109375),
        (9, 21, 0.0427739),  # 2 * P(X <= 9), X of 30 coins
        (20, 35, 0.0581),
    ],
)
def test_mcnemar_exact(first, second, p):
    assert mcnemar_exact(first, second) == pytest.approx(p, abs=5e-5)
    assert mcnemar_exact(second, first) == mcnemar_exact(first, second)


def test_mcnemar_holds_for_many_pairs():
    assert mcnemar_exact(4000, 4000) == 1.0
    assert 0 <= mcnemar_exact(0, 4000) < 1e-300


def test_the_interval_of_a_difference_holds_what_it_should():
    """Of 400 drawn comparisons, about 95 % of the intervals hold the true difference."""
    draw, held = random.Random(0), 0
    for _ in range(400):
        pairs = [(draw.random() < 0.7, draw.random() < 0.6) for _ in range(120)]
        table = paired_table(pairs)
        low, high = table["difference_interval"]
        assert -1 <= low <= table["difference"] <= high <= 1
        held += low <= 0.1 <= high
    assert 0.92 <= held / 400 <= 0.98


def test_the_interval_of_bonett_and_price():
    # (b + 1) / (n + 2) = 0.2, (c + 1) / (n + 2) = 0.1 at n = 98: 0.1 ± 1.96 sqrt((0.3 - 0.01) / 100)
    low, high = paired_difference_interval(19, 9, 98)
    assert (low, high) == pytest.approx((0.1 - 0.105548, 0.1 + 0.105548), abs=1e-5)
    assert paired_difference_interval(0, 0, 0) == (-1.0, 1.0)


def test_the_ratio_of_means_has_an_interval():
    assert ratio_interval([2, 4, 6], [1, 2, 3]) == (2.0, 2.0)
    low, high = ratio_interval([1, 2, 3, 4], [2, 2, 2, 2])
    assert low < 1.25 < high
    assert high - 1.25 == pytest.approx(1.959964 * (5 / 3 / 4) ** 0.5 / 2)


PROMPTS = [EvaluationPrompt(({"role": "user", "content": f"{n}?"},), "4", grader="numeric") for n in range(4)]


def report(answers, kinds=("ok",) * 4, seed=0):
    replies = {
        mode: [Reply(mode, "", answer, kind, True, 0, 1) for answer, kind in zip(answers, kinds, strict=True)]
        for mode in Mode
    }
    return summarise(PROMPTS, replies, {"seed": seed, "max_new_tokens": 8})


def test_two_reports_are_compared_prompt_by_prompt(tmp_path):
    save_report(report("4414", ("ok", "ok", "never_closed", "truncated"), seed=1), tmp_path)
    other = read_report(str(tmp_path))
    found = compare(answered(report("4451"), "this"), other)
    table = found["modes"]["thinking"]["accuracy"]
    assert (table["both"], table["this_only"], table["other_only"], table["neither"]) == (2, 0, 1, 1)
    assert (table["difference"], table["p"], table["pairs"]) == (-0.25, 1.0, 4)
    kept = found["modes"]["non_thinking"]["format_kept"]
    assert (kept["pairs"], kept["both"], kept["this_only"]) == (3, 2, 1)  # the cut reply is in no pair
    assert found["settings"] == ["seed: 0, other 1"]
    assert found["against"] == str(tmp_path)
    shown = report("4451")
    shown.measured["comparison"] = found
    text = "\n".join(measured_lines(shown))
    assert "thinking, accuracy: -25.0 points" in text
    assert "the settings differ: seed: 0, other 1" in text


def test_other_prompts_are_refused(tmp_path):
    save_report(report("4444"), tmp_path)
    rows = (tmp_path / "replies.jsonl").read_text().splitlines()
    for kept in (rows[1:4] + rows[4:], [rows[0].replace("0?", "9?"), *rows[1:]]):
        (tmp_path / "replies.jsonl").write_text("\n".join(kept) + "\n")
        with pytest.raises(ValueError, match="Measure both with the same --prompts, --samples and --seed"):
            compare(answered(report("4444"), "this"), read_report(str(tmp_path)))


def test_what_is_no_report_is_told(tmp_path):
    assert not is_report(str(tmp_path))
    assert is_report("runs/mode_report.json")
    with pytest.raises(FileNotFoundError, match=r"mode_report\.json: there is no such file"):
        read_report(str(tmp_path))
    save_report(report("4444"), tmp_path)
    assert is_report(str(tmp_path))
    (tmp_path / "replies.jsonl").write_text('{"mode": "maybe"}\n')
    with pytest.raises(ValueError, match="found no report of thinkfusion evaluate"):
        read_report(str(tmp_path))
    (tmp_path / "replies.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"replies\.jsonl: there is no such file"):
        read_report(str(tmp_path / "mode_report.json"))
    (tmp_path / "config.json").write_text(json.dumps({}))
    assert not is_report(str(tmp_path))  # a checkpoint with its report
