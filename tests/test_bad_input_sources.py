# SPDX-License-Identifier: Apache-2.0
"""Bad files, rows and sources: what is promised for each case, behaviour and message. Tests carry the case's number."""

import json
import math
import re
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest

from thinkfusion.mixture import MixtureOptions, mix
from thinkfusion.reading import DataError
from thinkfusion.records import RecordOptions, iterate_conversations, prompt_overlap, read_conversations
from thinkfusion.row_report import RowReport
from thinkfusion.sources import Source, as_sources, iterate_rows

SKIP = RecordOptions(on_bad_row="skip", max_skipped=1.0)
SKIP_HINT = "Leave such rows out with on_bad_row='skip' (--on_bad_row skip)."
GOOD = b'{"question": "2+2?", "answer": "4"}\n'
CANARY = "canary-5d11ce-secret"


def row(question="2+2?", answer="4", **fields):
    return {"question": question, "answer": answer, **fields}


def stopped(source, options=None):
    with pytest.raises(DataError) as caught:
        read_conversations(source, options)
    return caught.value


def answers(conversations):
    return [conversation.exchanges[-1].steps[-1].content for conversation in conversations]


# --- 1 to 5: lines ----------------------------------------------------------------------------------------------

BAD_LINES = {
    "1 not JSON": (b'{"question": "2+2?", "answer": }', "invalid_json", "not JSON: Expecting value, at column 32"),
    "1 another quote": (b"{'question': 1}", "invalid_json", "at column 2"),
    "1 nested beyond reading": (b'{"question": ' + b"[" * 10**5 + b"}", "invalid_json", "no JSON that can be read"),
    "2 list": (b'["2+2?", "4"]', "not_an_object", "found list, expected an object with named fields"),
    "2 text": (b'"2+2?"', "not_an_object", "found str"),
    "2 null": (b"null", "not_an_object", "found NoneType"),
    "3 latin-1": ('{"question": "é"}'.encode("latin-1"), "invalid_utf8", "byte 15 of the row is not UTF-8"),
    "3 overlong": (b'{"question": "\xc0\xaf"}', "invalid_utf8", "byte 15"),
    "3 surrogate bytes": (b'{"question": "\xed\xa0\xbd"}', "invalid_utf8", "byte 15"),
    "4 high": (rb'{"question": "a\ud83d", "answer": "4"}', "invalid_unicode", "question: found a lone surrogate at"),
    "4 low": (
        rb'{"question": "2+2?", "answer": "\udc00"}',
        "invalid_unicode",
        "answer.content: found a lone surrogate",
    ),
}


@pytest.mark.parametrize(("line", "reason", "fragment"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_stops_with_its_place_and_the_option(write, line, reason, fragment):
    path = write(GOOD + line + b"\n" + GOOD)
    error = stopped(path)
    assert str(error).startswith(f"{path}, row 2: ")
    assert str(error).endswith(f"{SKIP_HINT} [{reason}]")
    assert (error.reason, error.line) == (reason, 2)
    assert fragment in error.message


@pytest.mark.parametrize(("line", "reason", "fragment"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_skipped_counted_and_reported(write, tmp_path, line, reason, fragment):
    path = write(GOOD + line + b"\n" + GOOD)
    kept, report = read_conversations(path, SKIP)
    assert (len(kept), report.read, report.kept, report.skipped) == (2, 3, 2, {reason: 1})
    report.save(tmp_path / "report.json")
    (entry,) = json.loads((tmp_path / "report.json").read_bytes())["rows"]
    assert (entry["source"], entry["line"], entry["kind"], entry["reason"]) == (str(path), 2, "skipped", reason)
    assert fragment in entry["detail"]
    assert entry["excerpt"] == line[:200].decode("utf-8", "replace")


def test_1_a_file_cut_in_the_middle_of_a_line(write):
    path = write(GOOD + GOOD[:-9])
    error = stopped(path)
    assert (error.reason, error.line) == ("invalid_json", 2)
    assert "not JSON: Unterminated string starting at, at column 22." in error.message
    kept, report = read_conversations(path, SKIP)
    assert (len(kept), report.skipped) == (1, {"invalid_json": 1})


def test_1_broken_json_in_a_list_names_line_and_column(write):
    error = stopped(write('[\n{"question": "a", "answer": "4"},\n{"question" "b"}]', "rows.json"))
    assert error.reason == "invalid_json"
    assert "at line 3, column 13" in error.message


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_3_a_byte_order_mark_is_accepted(write, name):
    data = {"rows.jsonl": GOOD, "rows.json": b"[" + GOOD + b"]", "rows.csv": b"question,answer\n2+2?,4\n"}[name]
    kept, report = read_conversations(write(b"\xef\xbb\xbf" + data, name))
    assert (answers(kept), report.skipped) == (["4"], {})


def test_5_control_characters_are_kept_and_counted(write):
    path = write(GOOD + rb'{"question": "a\u0000b\u0007", "answer": "\u001b[1m4"}' + b"\n")
    kept, report = read_conversations(path)
    assert kept[1].exchanges[0].user.content == "a\0b\x07"
    assert answers(kept) == ["4", "\x1b[1m4"]
    assert report.noted["control_characters"] == 1
    assert (report.altered, report.skipped) == ({}, {})


# --- 6 to 8: files and formats ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "name"),
    [
        *((b"", "rows.jsonl"), (b"\n \r\n\n", "rows.jsonl"), (b"[]", "rows.json"), (b"", "rows.json")),
        *((b"question,answer\n", "rows.csv"), (b"", "rows.csv")),
    ],
)
def test_6_an_empty_file_is_nothing_to_train_on(write, data, name):
    path = write(data, name)
    for options in (None, SKIP):
        with pytest.raises(ValueError, match="nothing to train on") as caught:
            read_conversations(path, options)
        assert str(path) in str(caught.value)
        assert "rows: 0 read = 0 kept + 0 skipped" in str(caught.value)


def test_6_no_row_left_is_nothing_to_train_on_with_the_account(write):
    with pytest.raises(ValueError, match="nothing to train on") as caught:
        read_conversations(write(b"{\n" + GOOD.replace(b'"4"', b'""')), SKIP)
    for line in ("rows: 2 read = 0 kept + 2 skipped", "skipped 1: invalid_json", "skipped 1: empty_answer"):
        assert line in str(caught.value)


def test_7_an_unknown_format_lists_columns_and_formats():
    with pytest.raises(ValueError, match="rows: found the columns 'text', 'label'") as caught:
        read_conversations([{"text": "a", "label": 1}], SKIP)
    for name in ("messages", "prompt_completion", "sharegpt", "alpaca", "columns", "paired", "--question_column"):
        assert name in str(caught.value)


def test_8_columns_of_two_formats_are_named_and_format_decides():
    both = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], **row()}]
    with pytest.raises(ValueError, match=r"found both .*conversations.*--format") as caught:
        read_conversations(both)
    assert "question, answer" in str(caught.value)
    assert answers(read_conversations(both, RecordOptions(format="sharegpt"))[0]) == ["b"]
    assert answers(read_conversations(both, RecordOptions(format="columns"))[0]) == ["4"]


# --- 40, 41, 43, 44 ---------------------------------------------------------------------------------------------


def test_40_a_row_of_100_megabytes(write):
    """Read whole: at no time are there more than the line, its text, its value and what is checked of it."""
    size = 100_000_000
    path = write(GOOD + b'{"question": "2+2?", "answer": "' + b"x" * size + b'"}\n' + GOOD)
    tracemalloc.start()
    lengths = [len(each.exchanges[0].steps[0].content) for each in iterate_conversations(*given(path))]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lengths == [1, size, 1]
    assert peak < 7 * size


def given(source, options=None):
    return as_sources(source), options or RecordOptions(), RowReport()


def test_41_a_row_that_comes_again_is_kept_and_counted():
    rows = [row(), row(answer="5"), row(), row(reasoning="so"), row()]
    kept, report = read_conversations(rows)
    assert (len(kept), report.noted["duplicate"], report.skipped) == (5, 2, {})


def test_41_duplicates_are_dropped_when_asked_for():
    rows = [row(), row(answer="5"), row(), row(reasoning="so"), row()]
    kept, report = read_conversations(rows, RecordOptions(drop_duplicates=True))
    assert (answers(kept), report.skipped) == (["4", "5", "4"], {"duplicate": 2})
    assert [(entry["line"], entry["reason"]) for entry in report.entries()] == [(3, "duplicate"), (5, "duplicate")]
    assert report.read == report.kept + sum(report.skipped.values()) == 5


def test_41_rows_of_several_sources_are_compared(write):
    paths = [write(GOOD, "a.jsonl"), write(GOOD, "b.jsonl")]
    assert read_conversations(paths)[1].noted["duplicate"] == 1


@pytest.mark.parametrize(
    "other",
    [
        row("2+2 ?"),
        row(answer="4 "),
        row(reasoning="2 and 2"),
        row("2", answer="+2?4"),
        {"question": "2+2?", "answer": "4", "tools": [{"type": "function", "function": {"name": "add"}}]},
    ],
)
def test_41_rows_that_differ_anywhere_are_no_duplicates(other):
    assert read_conversations([row(), other])[1].noted == {}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (row(answer="4a", reasoning="b"), row(answer="4", reasoning="ab")),
        (row(reasoning="so"), row(reasoning="so", mode="non_thinking")),
    ],
    ids=["parts", "modes"],
)
def test_41_the_same_texts_in_other_parts_or_another_mode_are_no_duplicates(one, other):
    assert "duplicate" not in read_conversations([one, other])[1].noted


def test_41_a_text_that_moves_from_system_to_user_makes_another_prompt():
    def messages(system, user):
        turns = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        return {"messages": [*turns, {"role": "assistant", "content": "4"}]}

    _, report = read_conversations([messages("ab", "c"), messages("a", "bc")])
    assert len(set(report.prompt_keys)) == 2


def test_41_reasoning_of_an_earlier_exchange_tells_rows_apart():
    def messages(reasoning):
        first = {"role": "assistant", "content": "4", "reasoning_content": reasoning}
        later = [{"role": "user", "content": "3+3?"}, {"role": "assistant", "content": "6"}]
        return {"messages": [{"role": "user", "content": "2+2?"}, first, *later]}

    kept, report = read_conversations([messages("so"), messages("thus"), messages("so")])
    assert report.noted["duplicate"] == 1
    # As a prompt, they are the same: history shows no reasoning.
    assert len(set(report.prompt_keys)) == 1
    assert len(kept) == 3


def test_43_rows_of_one_mode_name_the_mode_and_the_remedy():
    plain = read_conversations([row(), row("3+3?", "6")])[0]
    with pytest.raises(ValueError, match="no row is trained in thinking mode"):
        mix(plain, "paired")
    thinking = read_conversations([row(reasoning="so")])[0]
    with pytest.raises(ValueError, match=r"no row is trained in non_thinking mode.*'paired'"):
        mix(thinking, "combined")
    assert len(mix(thinking, "paired")) == 1


@pytest.mark.parametrize("weight", [-1, 0, "much", "0", None, math.nan, math.inf, True])
def test_44_a_weight_that_is_no_positive_number(weight):
    with pytest.raises(ValueError, match=r"no-such-file\.jsonl: weight: found .*, expected a number above 0"):
        Source("no-such-file.jsonl", weight=weight)


@pytest.mark.parametrize("ratio", [0, 1, -0.5, 1.5, "0:1", "1:", "a:b", "1.5", math.nan])
def test_44_a_ratio_that_is_malformed(ratio):
    with pytest.raises(ValueError, match="ratio"):
        MixtureOptions("ratio", ratio=ratio)


# --- 46 to 48: places -------------------------------------------------------------------------------------------


def test_46_an_unknown_hub_id_is_one_line_offline(monkeypatch, tmp_path):
    import datasets
    import huggingface_hub.constants

    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(FileNotFoundError, match="thinkfusion-tests/no-such-data") as caught:
        read_conversations("thinkfusion-tests/no-such-data")
    message = str(caught.value)
    assert "\n" not in message
    assert "could be loaded from the Hub" in message
    assert "run `hf auth login` if it is private, or name a local file" in message
    assert CANARY not in message


def test_46_a_refused_token_is_not_repeated(monkeypatch):
    import datasets

    def refuse(*_, **__):
        raise PermissionError(f"401: the token {CANARY} and hf_oauth{'x' * 20} are refused\nfor https://hub")

    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(FileNotFoundError, match=r"private/data: .*401: the token \*\*\* and \*\*\* are refused"):
        read_conversations("private/data")


def test_47_a_directory_is_named(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}: this is a directory; name a file in it")):
        read_conversations(tmp_path)


def test_47_a_pattern_that_matches_nothing_is_named(tmp_path):
    pattern = str(tmp_path / "*.jsonl")
    with pytest.raises(FileNotFoundError, match=re.escape(f"{pattern}: there is no such file: the pattern matches")):
        read_conversations(pattern)


def test_47_a_missing_file_is_named(tmp_path):
    for name in (tmp_path / "missing.jsonl", "missing.parquet", "./missing", "~/missing", "some/deep/missing"):
        with pytest.raises(FileNotFoundError, match=re.escape(f"{name}: there is no such file")):
            read_conversations(name)


def test_47_an_unreadable_file_is_named(write, monkeypatch):
    path = write(GOOD)

    def refuse(*_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(path), "open", refuse)
    with pytest.raises(ValueError, match=re.escape(f"{path}: cannot be read after row 0: Permission denied.")):
        read_conversations(path)


def test_48_types_that_differ_between_files_are_read_row_by_row(tmp_path):
    """In one file content is text, in the other it is parts; one has a column that the other lacks."""
    parts = [{"type": "text", "text": "4"}]
    for name, content, more in (("a", "4", {}), ("b", parts, {"mode": "non_thinking"})):
        reply = {"role": "assistant", "content": content}
        table = pyarrow.Table.from_pylist([{"messages": [{"role": "user", "content": content}, reply], **more}])
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    kept, report = read_conversations(tmp_path / "*.parquet")
    assert (answers(kept), report.read, report.kept) == (["4", "4"], 2, 2)
    assert [set(found) for _, found in iterate_rows(tmp_path / "*.parquet")] == [{"messages"}, {"messages", "mode"}]


def test_48_types_that_differ_between_rows_of_one_file(write):
    lines = (
        {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}], "id": 1},
        {
            "messages": json.dumps([{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "5"}]),
            "id": "2",
        },
    )
    path = write("".join(json.dumps(each) + "\n" for each in lines))
    assert answers(read_conversations(path)[0]) == ["4", "5"]


# --- 53, 54 -----------------------------------------------------------------------------------------------------


def test_53_more_than_one_percent_skipped_stops_with_the_report():
    rows = [row(str(number)) for number in range(98)] + [row(answer=""), row(answer=" ")]
    with pytest.raises(
        ValueError, match=r"2 of 100 rows \(2\.0%\) would be skipped, and max_skipped allows 1\.0%"
    ) as caught:
        read_conversations(rows, RecordOptions(on_bad_row="skip"))
    assert "--max_skipped 0.03" in str(caught.value)
    assert "skipped 2: empty_answer" in str(caught.value)
    assert "rows, row 99" in str(caught.value)
    for allowed in (0.02, 0.03):
        kept, report = read_conversations(rows, RecordOptions(on_bad_row="skip", max_skipped=allowed))
        assert (len(kept), report.skipped["empty_answer"]) == (98, 2)


def test_53_one_percent_is_allowed():
    rows = [row(str(number)) for number in range(99)] + [row(answer="")]
    assert read_conversations(rows, RecordOptions(on_bad_row="skip"))[1].kept == 99


def test_54_evaluation_prompts_in_the_training_rows_are_counted_and_named():
    training = [row(), row("3+3?", "6"), row("2+2?", "four"), row("5+5?", "10")]
    _, report = read_conversations(training)
    evaluation, _ = read_conversations([row("7+7?", "14"), row("5+5?", "10"), row("2+2?", "4", reasoning="so")])
    overlap = prompt_overlap(report.prompt_keys, evaluation)
    assert overlap
    assert (overlap.evaluation, overlap.training) == ([1, 2], [0, 2, 3])
    assert str(overlap) == "2 of 3 evaluation prompts are found in 3 training rows: rows row 2, rows row 3."


def test_54_a_system_text_makes_another_prompt():
    def messages(*system):
        return {"messages": [*system, {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}

    _, report = read_conversations([messages({"role": "system", "content": "Be brief."})])
    evaluation, _ = read_conversations([messages()])
    overlap = prompt_overlap(report.prompt_keys, evaluation)
    assert not overlap
    assert (overlap.evaluation, overlap.training) == ([], [])


def test_54_many_overlapping_prompts_are_shortened():
    rows = [row(str(number)) for number in range(40)]
    _, report = read_conversations(rows)
    shown = str(prompt_overlap(report.prompt_keys, read_conversations(rows)[0]))
    assert shown.startswith("40 of 40 evaluation prompts")
    assert shown.endswith("rows row 10 and 30 more.")
