# SPDX-License-Identifier: Apache-2.0
"""Intervals, leakage, the counting of replies, the report's files, and the prompts it is made from."""

import json
import statistics

import pytest

from thinkfusion.conversations import DataError
from thinkfusion.evaluation import (
    EvaluationPrompt,
    leaks,
    mean_interval,
    read_prompts,
    soft_caps,
    summarise,
    task_prompts,
    wilson_interval,
)
from thinkfusion.modes import REPLY_CLASSES, Mode, Reply
from thinkfusion.reporting import mode_table, save_report
from thinkfusion.tasks import generate_samples

THINKING, NON_THINKING = Mode.THINKING, Mode.NON_THINKING


def prompt(task="sums", solution=None, language="en"):
    return EvaluationPrompt(({"role": "user", "content": "무엇?"},), solution, task, language)


def thought(answer, kind="ok", reasoning_tokens=0, answer_tokens=0):
    return Reply(THINKING, "so", answer, kind, kind != "truncated", reasoning_tokens, answer_tokens)


def said(answer, kind="ok", answer_tokens=0):
    return Reply(NON_THINKING, "", answer, kind, kind != "truncated", 0, answer_tokens)


PROMPTS = [prompt("sums", "4"), prompt("sums", "5"), prompt("words", None, "ko"), prompt("words", "7", "ko")]
REPLIES = {
    THINKING: [
        thought("The answer is 4.", "ok", 10, 4),
        thought("The answer is 5.", "never_closed", 0, 6),
        thought("wait", "truncated", 20, 0),
        thought("8", "ok", 6, 2),
    ],
    NON_THINKING: [
        said("Wait, 4", "ok", 3),  # a word of thinking aloud
        said("4", "ok", 9),  # over the cap of sums: twice the 4 tokens of the only good thinking reply
        said("hello", "ok", 4),  # at the cap of words, and so not over it
        said("hmm", "truncated", 100),
    ],
}


@pytest.fixture
def report():
    return summarise(PROMPTS, REPLIES, {"seed": 3})


# --- intervals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [
        (0, 1000, 0.0, 0.00383),
        (1000, 1000, 0.99617, 1.0),
        (50, 100, 0.4038, 0.5962),
        (1, 10, 0.01788, 0.40415),
        (9, 10, 0.59585, 0.98212),
        (0, 1, 0.0, 0.79346),
        (1, 1, 0.20654, 1.0),
    ],
)
def test_wilson_interval(successes, total, low, high):
    assert wilson_interval(successes, total) == pytest.approx((low, high), abs=1e-5 if total < 100 else 5e-5)


def test_wilson_interval_is_exact_at_its_edges():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    for total in (1, 7, 1000):
        assert wilson_interval(0, total)[0] == 0.0
        assert wilson_interval(total, total)[1] == 1.0


def test_wilson_interval_holds_the_rate_and_shrinks():
    widths = []
    for total in (8, 80, 800):
        low, high = wilson_interval(total // 4, total)
        assert 0 <= low < 0.25 < high <= 1
        widths.append(high - low)
    assert widths[0] > 2 * widths[1] > 4 * widths[2]


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ([], 0.0, 0.0),
        ([5], 5.0, 5.0),
        ([2, 2, 2], 2.0, 2.0),
        ([1, 3], 0.040036, 3.959964),
        ([0, 0, 3], -0.959964, 2.959964),
    ],
)
def test_mean_interval(values, low, high):
    assert mean_interval(values) == pytest.approx((low, high), abs=1e-6)


# --- leakage ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    """Wait, it is 4.|hmm 4|Hmmmm|Okay. 4|alternatively: 4|Let me think: 4|4 (wait)|잠깐, 4입니다.|잠깐만요, 4입니다.
흠... 4|음, 4입니다.|다시 생각하면 4입니다.|생각해 보자. 4""".replace("\n", "|").split("|"),
)
def test_thinking_aloud_leaks_in_both_modes(answer):
    assert leaks(said(answer), None)
    assert leaks(thought(answer), None)


@pytest.mark.parametrize(
    "answer",
    """The answer is 4.||await the waiter|okayed|hm|shmm|alternative|let me thinker|답은 4입니다.
음악|마음, 생각|흠집이 있습니다.|흠뻑 젖었습니다.""".replace("\n", "|").split("|"),
)
def test_parts_of_words_do_not_leak(answer):
    assert not leaks(said(answer), None)


def test_only_a_non_thinking_answer_leaks_by_its_length():
    assert leaks(said("4", answer_tokens=11), 10.0)
    assert not leaks(said("4", answer_tokens=10), 10.0)
    assert not leaks(said("4", answer_tokens=11), None)
    assert not leaks(thought("4", answer_tokens=11), 10.0)


def test_the_cap_is_twice_the_mean_of_good_thinking_answers():
    prompts = [prompt("a"), prompt("a"), prompt("a"), prompt("b"), prompt("c"), prompt("c")]
    replies = [
        thought("x", "ok", 0, 3),
        thought("x", "ok", 0, 6),
        thought("x", "never_closed", 0, 90),
        thought("x", "ok", 0, 5),
        thought("x", "truncated", 0, 5),
        said("x", "ok", 5),
    ]
    assert soft_caps(prompts, replies) == {"a": 9.0, "b": 10.0}


# --- counting ---------------------------------------------------------------------------------------------------


def test_every_figure_of_thinking_mode(report):
    found = report.modes["thinking"]
    assert found["samples"] == 4
    assert found["format_error"] == 1 / 3  # of the three that were not cut
    assert found["truncated"] == 1 / 4
    assert found["classes"] == dict.fromkeys(REPLY_CLASSES, 0) | {"ok": 2, "never_closed": 1, "truncated": 1}
    assert found["leakage"] == 0.0  # the "wait" was cut
    assert found["accuracy"] == 2 / 3  # of the three with a solution
    assert found["reasoning_tokens"] == 9.0
    assert found["answer_tokens"] == 3.0
    sums, words = found["tasks"]["sums"], found["tasks"]["words"]
    assert (sums["samples"], sums["language"], sums["accuracy"], sums["format_error"]) == (2, "en", 1.0, 0.5)
    assert (words["samples"], words["language"], words["accuracy"], words["format_error"]) == (2, "ko", 0.0, 0.0)


def test_every_figure_of_non_thinking_mode(report):
    found = report.modes["non_thinking"]
    assert found["samples"] == 4
    assert found["format_error"] == 0.0
    assert found["truncated"] == 1 / 4
    assert found["classes"] == dict.fromkeys(REPLY_CLASSES, 0) | {"ok": 3, "truncated": 1}
    assert found["leakage"] == 2 / 3
    assert found["accuracy"] == 1 / 3
    assert found["reasoning_tokens"] == 0.0
    assert found["answer_tokens"] == 29.0
    sums, words = found["tasks"]["sums"], found["tasks"]["words"]
    assert (sums["samples"], sums["accuracy"], sums["format_error"]) == (2, 0.5, 0.0)
    assert (words["samples"], words["accuracy"], words["format_error"]) == (2, 0.0, 0.0)


def test_every_interval_is_that_of_its_counts(report):
    found = report.modes["thinking"]
    for name, count, total in [("format_error", 1, 3), ("truncated", 1, 4), ("leakage", 0, 3), ("accuracy", 2, 3)]:
        assert found[f"{name}_interval"] == list(wilson_interval(count, total))
    assert found["tasks"]["sums"]["format_error_interval"] == list(wilson_interval(1, 2))
    assert found["tasks"]["words"]["accuracy_interval"] == list(wilson_interval(0, 1))
    half = 1.959964 * statistics.stdev([10, 0, 20, 6]) / 2
    assert found["reasoning_tokens_interval"] == pytest.approx([9 - half, 9 + half])


def test_every_rate_and_mean_has_an_interval(report):
    for found in report.modes.values():
        for values in (found, *found["tasks"].values()):
            figures = [name for name in values if name not in ("samples", "classes", "tasks", "language")]
            plain = {name for name in figures if not name.endswith("_interval")}
            assert {name for name in figures if name.endswith("_interval")} == {f"{name}_interval" for name in plain}
            assert plain >= {"accuracy", "format_error"}
            for name in plain:
                low, high = values[f"{name}_interval"]
                assert low <= values[name] <= high


def test_truncated_replies_are_no_denominator():
    replies = {mode: [Reply(mode, "", "", "truncated", False, 5, 0)] for mode in Mode}
    found = summarise([prompt("sums", "4")], replies, {}).modes["thinking"]
    assert (found["format_error"], found["format_error_interval"]) == (None, None)
    assert (found["leakage"], found["leakage_interval"]) == (None, None)
    assert (found["truncated"], found["accuracy"]) == (1.0, 0.0)


def test_without_solutions_there_is_no_accuracy():
    replies = {THINKING: [thought("4")], NON_THINKING: [said("4")]}
    found = summarise([prompt("sums", None)], replies, {}).modes["thinking"]
    assert (found["accuracy"], found["accuracy_interval"]) == (None, None)
    assert (found["tasks"]["sums"]["accuracy"], found["format_error"]) == (None, 0.0)


def test_embedded_tasks_come_first_in_their_order():
    names = ["zebra", "reversal_ko", "apple", "running_sum_ko", "running_sum_en"]
    replies = {THINKING: [thought("4")] * 5, NON_THINKING: [said("4")] * 5}
    found = summarise([prompt(name) for name in names], replies, {}).modes["non_thinking"]
    assert list(found["tasks"]) == ["running_sum_en", "running_sum_ko", "reversal_ko", "apple", "zebra"]


def test_the_report_keeps_what_it_counted(report):
    assert (report.samples, report.settings) == (4, {"seed": 3})
    assert report.prompts == tuple(PROMPTS)
    assert report.replies == {mode: tuple(replies) for mode, replies in REPLIES.items()}


def test_prompts_and_replies_must_match():
    with pytest.raises(ValueError, match="zip"):
        summarise(PROMPTS[:3], REPLIES, {})


# --- the table and the files ------------------------------------------------------------------------------------


def table_line(table, name):
    (line,) = [line for line in table.splitlines() if line.strip().startswith(name)]
    return line


def test_the_table_shows_the_figures(report):
    table = mode_table(report)
    head, rule, *_ = table.splitlines()
    assert head.split() == ["4", "prompts", "per", "mode", "thinking", "non-thinking"]
    assert set(rule) == {"─"}
    for name, thinking, non_thinking in [
        ("format error", "33.3 % [6.1, 79.2]", "0.0 % [0.0, 56.1]"),
        ("truncated", "25.0 % [4.6, 69.9]", "25.0 % [4.6, 69.9]"),
        ("leakage", "0.0 % [0.0, 56.1]", "66.7 % [20.8, 93.9]"),
        ("accuracy", "66.7 % [20.8, 93.9]", "33.3 % [6.1, 79.2]"),
        ("sums", "100.0 % [34.2, 100.0]", "50.0 % [9.5, 90.5]"),
        ("words", "0.0 % [0.0, 79.3]", "0.0 % [0.0, 79.3]"),
        ("reasoning tokens", "9.0 [0.8, 17.2]", "0.0 [0.0, 0.0]"),
        ("answer tokens", "3.0 [0.5, 5.5]", "29.0 [0.0, 75.5]"),
    ]:
        row = table_line(table, name)
        assert row.index(thinking) == head.index("thinking")
        assert row.rindex(non_thinking) == head.index("non-thinking")
    assert table.splitlines()[-2:] == [
        "thinking: {'never_closed': 1, 'truncated': 1}",
        "non-thinking: {'truncated': 1}",
    ]


def test_the_table_has_a_dash_for_what_was_not_judged():
    replies = {THINKING: [thought("4")], NON_THINKING: [said("4")]}
    table = mode_table(summarise([prompt("sums", None)], replies, {}))
    assert table_line(table, "accuracy").split() == ["accuracy", "-", "-"]
    assert "sums" not in table
    assert "{" not in table


def test_save_report_writes_the_report(report, tmp_path):
    path = save_report(report, tmp_path / "runs" / "one")
    assert path == tmp_path / "runs" / "one" / "mode_report.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found == report.to_dict()
    assert found["samples"] == 4
    assert set(found["modes"]) == {"thinking", "non_thinking"}
    for values in found["modes"].values():
        rates = {"format_error", "leakage", "accuracy", "reasoning_tokens", "answer_tokens"}
        assert set(values) >= rates | {f"{name}_interval" for name in rates} | {"tasks"}
        assert set(values["tasks"]) == {"sums", "words"}
        for task in values["tasks"].values():
            assert set(task) >= {"accuracy", "format_error", "samples", "language"}


def test_save_report_writes_every_reply(report, tmp_path):
    save_report(report, tmp_path)
    text = (tmp_path / "replies.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(row) for row in text.splitlines()]
    assert [(row["mode"], row["answer"], row["class"]) for row in rows] == [
        (mode.value, reply.answer, reply.kind) for mode, replies in REPLIES.items() for reply in replies
    ]
    assert rows[0] == {
        "mode": "thinking",
        "task": "sums",
        "messages": [{"role": "user", "content": "무엇?"}],
        "solution": "4",
        "class": "ok",
        "reasoning": "so",
        "answer": "The answer is 4.",
    }
    assert "무엇" in text


def test_an_empty_rate_is_null_in_json(tmp_path):
    replies = {mode: [Reply(mode, "", "", "truncated", False, 5, 0)] for mode in Mode}
    path = save_report(summarise([prompt()], replies, {}), tmp_path)
    found = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert found["modes"]["thinking"]["format_error"] is None


# --- prompts ----------------------------------------------------------------------------------------------------


@pytest.fixture
def prompts_of(tmp_path):
    def prompts_of(*rows, **options):
        path = tmp_path / "mine.jsonl"
        path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
        return read_prompts(path, **options)

    return prompts_of


def test_prompts_of_the_tasks_are_those_kept_for_evaluation():
    prompts = task_prompts(10, seed=3)
    samples = generate_samples(10, seed=3, split="evaluation")
    assert [prompt.messages for prompt in prompts] == [({"role": "user", "content": s.question},) for s in samples]
    assert [(prompt.solution, prompt.task, prompt.language) for prompt in prompts] == [
        (sample.solution, sample.name, sample.language) for sample in samples
    ]
    assert {prompt.task for prompt in task_prompts(4, tasks=["dial"], languages=["ko"])} == {"dial_ko"}


@pytest.mark.parametrize("field", ["prompt", "question"])
def test_a_prompt_is_a_text(prompts_of, field):
    (found,) = prompts_of({field: "2+2?", "answer": 4, "task": "sums", "language": "en"})
    assert found == EvaluationPrompt(({"role": "user", "content": "2+2?"},), "4", "sums", "en")


def test_a_prompt_is_a_list_of_messages(prompts_of):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "3+3?"},
    ]
    for field in ("messages", "prompt"):
        (found,) = prompts_of({field: messages})
        assert found == EvaluationPrompt(tuple(messages), None, "mine", "und")


def test_fields_of_a_prompt_may_be_null(prompts_of):
    assert prompts_of({"prompt": "2+2?", "messages": None, "answer": None, "task": None, "language": None}) == [
        EvaluationPrompt(({"role": "user", "content": "2+2?"},), None, "mine", "und")
    ]


@pytest.mark.parametrize("switch", ["/think", "/no_think"])
def test_a_prompt_may_hold_a_soft_switch(prompts_of, switch):
    """The replies are asked for in both modes by the hard switch, which wins."""
    (found,) = prompts_of({"prompt": f"2+2? {switch}"})
    assert found.messages[0]["content"] == f"2+2? {switch}"


def test_the_solution_follows_the_last_separator(prompts_of):
    (found,) = prompts_of({"question": "2+2?", "answer": "2 #### 2\n#### 4 "}, answer_separator="####")
    assert found.solution == "4"
    (found,) = prompts_of({"question": "2+2?"}, answer_separator="####")
    assert found.solution is None


def test_prompts_can_be_limited(prompts_of):
    rows = [{"prompt": str(number)} for number in range(5)]
    assert [found.messages[0]["content"] for found in prompts_of(*rows, limit=2)] == ["0", "1"]
    assert len(prompts_of(*rows, limit=9)) == len(prompts_of(*rows)) == 5


@pytest.mark.parametrize(
    ("row", "reason", "fragment"),
    [
        ("{", "invalid_json", "not JSON"),
        ("[1]", "not_an_object", "found list"),
        ({"text": "2+2?"}, "no_prompt", "found the fields text, expected prompt, question or messages"),
        ({"prompt": ""}, "no_prompt", "prompt"),
        ({"messages": []}, "no_prompt", "messages"),
        ({"prompt": 5}, "bad_message", "5"),
        ({"messages": [{"role": "bot", "content": "2+2?"}]}, "unknown_role", "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "bad_message", "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "role_order",
            ".role",
        ),
    ],
)
def test_a_bad_prompt_names_its_row(prompts_of, row, reason, fragment):
    with pytest.raises(DataError, match=r"mine\.jsonl, row 2: ") as caught:
        prompts_of({"prompt": "2+2?"}, row)
    assert caught.value.reason == reason
    assert fragment in caught.value.message


def test_a_missing_separator_is_an_error(prompts_of):
    with pytest.raises(DataError, match="separator '####' is missing") as caught:
        prompts_of({"prompt": "2+2?", "answer": "4"}, answer_separator="####")
    assert (caught.value.reason, caught.value.line) == ("missing_separator", 1)


def test_no_prompt_is_an_error(prompts_of, tmp_path):
    with pytest.raises(ValueError, match=r"mine\.jsonl: there is no prompt in it"):
        prompts_of("", " ")
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl"):
        read_prompts(tmp_path / "missing.jsonl")
