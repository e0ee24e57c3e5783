# SPDX-License-Identifier: Apache-2.0
"""Reading rows of every format, and a report in which every row is accounted for."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from thinkfusion.conversations import DataError
from thinkfusion.modes import Mode
from thinkfusion.records import RecordOptions, RowReport, read_conversations
from thinkfusion.row_report import SHOWN_ERRORS
from thinkfusion.sources import iterate_rows

DATA = Path(__file__).parents[2] / "shared" / "data"
SKIP = RecordOptions(on_bad_row="skip", max_skipped=1.0)
ROWS = [
    {"question": "2+2?", "reasoning": "2 and 2", "answer": "4"},
    {"question": "수도는?", "reasoning": None, "answer": "서울"},
]
MESSAGES = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}]


def line(**fields):
    return json.dumps(fields, ensure_ascii=False).encode() + b"\n"


GOOD = line(question="2+2?", answer="4")


def contents(conversations):
    """Question, reasoning, answer of every conversation's only exchange."""
    exchanges = [conversation.exchanges[0] for conversation in conversations]
    return [(exchange.user.content, exchange.steps[-1].reasoning, exchange.steps[-1].content) for exchange in exchanges]


def error_of(source, options=None):
    with pytest.raises(DataError) as caught:
        read_conversations(source, options)
    return caught.value


# --- sources ----------------------------------------------------------------------------------------------------


def as_jsonl(path, rows):
    path.with_suffix(".jsonl").write_bytes(b"".join(line(**row) for row in rows))
    return path.with_suffix(".jsonl")


def as_json(path, rows):
    path.with_suffix(".json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return str(path.with_suffix(".json"))


def as_parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def as_dataset(path, rows):
    import datasets

    return datasets.Dataset.from_list(rows)


def as_generator(path, rows):
    return (row for row in rows)


SOURCES = pytest.mark.parametrize("make", [as_jsonl, as_json, as_parquet, as_dataset, as_generator])


@SOURCES
def test_columns_of_every_source(make, tmp_path):
    kept, report = read_conversations(make(tmp_path / "rows", ROWS))
    assert contents(kept) == [("2+2?", "2 and 2", "4"), ("수도는?", None, "서울")]
    assert [conversation.exchanges[0].modes for conversation in kept] == [(Mode.THINKING,), (Mode.NON_THINKING,)]
    assert (report.read, report.kept, report.skipped) == (2, 2, {})


@SOURCES
def test_messages_of_every_source(make, tmp_path):
    tools = [{"type": "function", "function": {"name": "add"}}]
    kept, report = read_conversations(make(tmp_path / "rows", [{"messages": MESSAGES, "tools": tools}] * 3))
    assert contents(kept) == [("2+2?", "2 and 2", "4")] * 3
    assert [conversation.tools for conversation in kept] == [tuple(tools)] * 3
    assert (report.read, report.kept) == (3, 3)


def test_where_a_row_stands_is_kept(write):
    path = write(GOOD + b"\n" + GOOD)
    kept, _ = read_conversations(path)
    assert [(conversation.source, conversation.line) for conversation in kept] == [(str(path), 1), (str(path), 3)]
    assert [conversation.line for conversation in read_conversations(ROWS)[0]] == [1, 2]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_byte_order_mark_is_accepted(write, name):
    data = GOOD if name.endswith("l") else json.dumps(ROWS).encode()
    kept, _ = read_conversations(write(b"\xef\xbb\xbf" + data, name))
    assert contents(kept)[0][0] == "2+2?"


def test_blank_lines_are_no_rows(write):
    kept, report = read_conversations(write(b"\n" + GOOD + b"  \r\n\n" + GOOD.replace(b"\n", b"\r\n") + b"\n"))
    assert (report.read, report.kept, len(kept)) == (2, 2, 2)


def test_a_byte_order_mark_on_a_blank_line_is_no_row(write):
    assert read_conversations(write(b"\xef\xbb\xbf\n" + GOOD))[1].read == 1


def test_the_last_line_needs_no_line_break(write):
    assert read_conversations(write(GOOD + GOOD.rstrip()))[1].kept == 2


def test_control_characters_and_astral_characters_are_kept(write):
    kept, _ = read_conversations(write(rb'{"question": "a\u0000\u001b[1m\ud83d\ude00", "answer": "4"}'))
    assert contents(kept)[0][0] == "a\x00\x1b[1m😀"


# --- rows that cannot be parsed ---------------------------------------------------------------------------------

UNREADABLE = [
    (b'{"question": "a", "answer": }', "invalid_json", "column 29"),
    (b'{"question": "a", "ans', "invalid_json", "column "),
    (b"question: a", "invalid_json", "column 1"),
    (b'{"question": 1' + b"0" * 5000 + b', "answer": "4"}', "invalid_json", ""),
    (b'{"question": ' + b"[" * 100_000 + b"}", "invalid_json", ""),
    (b'{"question": "\xff", "answer": "4"}', "invalid_utf8", "byte 15"),
    ('{"question": "é", "answer": "4"}'.encode("latin-1"), "invalid_utf8", "byte 15"),
    (rb'{"question": "\ud83d", "answer": "4"}', "invalid_unicode", "lone surrogate"),
    (rb'{"question": "a\udc00", "answer": "4"}', "invalid_unicode", "lone surrogate"),
    (b"[1, 2]", "not_an_object", "found list"),
    (b'"text"', "not_an_object", "found str"),
    (b"null", "not_an_object", "found NoneType"),
]
UNREADABLE_IDS = [f"{reason}-{row[:24]!r}" for row, reason, _ in UNREADABLE]


@pytest.mark.parametrize(("row", "reason", "fragment"), UNREADABLE, ids=UNREADABLE_IDS)
def test_an_unreadable_row_stops_with_its_place(write, row, reason, fragment):
    path = write(GOOD + b"\n" + row + b"\n" + GOOD)
    error = error_of(path)
    assert (error.reason, error.source, error.line) == (reason, str(path), 3)
    assert str(error).startswith(f"{path}, row 3: ")
    assert fragment in error.message


@pytest.mark.parametrize(("row", "reason", "fragment"), UNREADABLE, ids=UNREADABLE_IDS)
def test_an_unreadable_row_is_skipped_and_counted(write, row, reason, fragment):
    kept, report = read_conversations(write(GOOD + row + b"\n" + GOOD), SKIP)
    assert (report.read, report.kept, report.skipped, len(kept)) == (3, 2, {reason: 1}, 2)
    assert "row 2: " in report.errors[0]
    assert fragment in report.errors[0]


def test_invalid_json_in_lines_names_the_line_of_the_file(write):
    """The message may not say "line 1" of a row that is the third line of its file."""
    assert re.findall(r"\bline (\d+)", str(error_of(write(GOOD + GOOD + b"{]\n")))) in ([], ["3"])


def test_invalid_json_in_a_list_names_line_and_column(write):
    error = error_of(write('[{"question": "a",\n  "answer": "4"},\n  {"question" "b"}]', "rows.json"))
    assert error.reason == "invalid_json"
    assert "line 3, column 15" in error.message


def test_json_that_is_no_list_is_an_error(write):
    with pytest.raises(ValueError, match=r"rows\.json: found dict, expected a list of rows"):
        read_conversations(write('{"question": "a"}', "rows.json"))


def test_a_lone_surrogate_costs_one_row_of_a_list(write):
    rows = rb'[{"question": "a", "answer": "4"}, {"question": "\ud83d", "answer": "4"}]'
    kept, report = read_conversations(write(rows, "rows.json"), SKIP)
    assert (len(kept), report.skipped) == (1, {"invalid_unicode": 1})


def test_a_lone_surrogate_in_given_rows_is_found():
    assert error_of([{"question": "\ud83d", "answer": "4"}]).reason == "invalid_unicode"


def test_a_broken_parquet_file_is_an_error_with_its_name(write):
    with pytest.raises(ValueError, match=r"rows\.parquet: not a readable Parquet file"):
        read_conversations(write(b"no parquet", "rows.parquet"))


def test_given_rows_must_be_objects():
    error = error_of([ROWS[0], ["2+2?", "4"]])
    assert (error.reason, str(error)) == (
        "not_an_object",
        "rows, row 2: found list, expected an object with named fields. Leave such rows out with on_bad_row='skip' "
        "(--on_bad_row skip). [not_an_object]",
    )


# --- files that cannot be read ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("data", "name"), [("", "rows.jsonl"), ("\n \n\r\n", "rows.jsonl"), ("[]", "rows.json")])
def test_an_empty_file_is_nothing_to_train_on(write, data, name):
    with pytest.raises(ValueError, match=r"nothing to train on.*\n.*0 read = 0 kept \+ 0 skipped"):
        read_conversations(write(data, name))


def test_no_kept_row_is_an_error_with_the_account(write):
    with pytest.raises(ValueError, match=r"nothing to train on(.|\n)*2 read = 0 kept \+ 2 skipped(.|\n)*invalid_json"):
        read_conversations(write("{\n{\n"), SKIP)


@pytest.mark.parametrize("name", ["missing.jsonl", "missing", "missing*.jsonl"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path / name}: there is no such file")):
        read_conversations(tmp_path / name)


def test_a_missing_file_of_a_relative_path_is_no_hub_id():
    for name in ("missing.jsonl", "data/missing.parquet", "./missing", "../missing"):
        with pytest.raises(FileNotFoundError, match="there is no such file"):
            read_conversations(name)


def test_a_directory_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}: this is a directory")):
        read_conversations(tmp_path)


def test_another_suffix_is_an_error_that_lists_the_known(write):
    with pytest.raises(ValueError, match=r"'\.txt' are not read; use \.jsonl, \.ndjson, \.json, .*\.parquet"):
        read_conversations(write("a,b", "rows.txt"))


# --- the Hub ----------------------------------------------------------------------------------------------------


def test_an_unknown_hub_id_is_one_line_when_offline(monkeypatch, tmp_path):
    import datasets
    import huggingface_hub.constants

    def refuse(*_):
        raise AssertionError("the network was used")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(FileNotFoundError, match="thinkfusion-tests/no-such-data") as caught:
        read_conversations("thinkfusion-tests/no-such-data")
    assert "\n" not in str(caught.value)
    assert "the network was used" not in str(caught.value)
    assert "hf auth login" in str(caught.value)


@pytest.mark.parametrize("name", ["owner/data", "data", "owner/data-v1.1"])
def test_a_hub_id_is_loaded_by_datasets(monkeypatch, name):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda path, split: asked.append((path, split)) or ROWS)
    kept, _ = read_conversations(name, split="test")
    assert (asked, len(kept)) == ([(name, "test")], 2)


@pytest.mark.parametrize("message", ["first line\nsecond line", ""])
def test_any_failure_of_the_hub_is_one_line(monkeypatch, message):
    import datasets

    def fail(path, split):
        raise ConnectionError(message)

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(FileNotFoundError, match="owner/data") as caught:
        read_conversations("owner/data")
    assert "\n" not in str(caught.value)


# --- formats and columns ----------------------------------------------------------------------------------------


def test_messages_and_columns_at_once_need_a_format():
    row = {**ROWS[0], "messages": [{"role": "user", "content": "3+3?"}, {"role": "assistant", "content": "6"}]}
    with pytest.raises(ValueError, match=r"rows: found both messages and question, answer.*--format"):
        read_conversations([row])
    assert contents(read_conversations([row], RecordOptions(format="messages"))[0]) == [("3+3?", None, "6")]
    assert contents(read_conversations([row], RecordOptions(format="columns"))[0]) == [("2+2?", "2 and 2", "4")]


def test_unknown_columns_are_listed_with_what_is_expected():
    with pytest.raises(ValueError, match=r"'instruction', 'answer'.*'messages'.*missing: 'question'"):
        read_conversations([{"instruction": "2+2?", "answer": "4"}])


def test_columns_can_be_named():
    options = RecordOptions(question_column="instruction", reasoning_column="trace", answer_column="output")
    rows = [{"instruction": "2+2?", "trace": "so", "output": "4", "answer": "5"}]
    assert contents(read_conversations(rows, options)[0]) == [("2+2?", "so", "4")]


def test_a_reasoning_column_that_is_named_must_exist():
    with pytest.raises(ValueError, match="no column 'trace'; found question, answer"):
        read_conversations([{"question": "2+2?", "answer": "4"}], RecordOptions(reasoning_column="trace"))


@pytest.mark.parametrize(
    ("row", "reason", "fragment"),
    [
        ({"question": "2+2?"}, "missing_column", "answer: this row has no such field; found question"),
        ({"question": None, "answer": "4"}, "bad_message", "question: found None"),
        ({"question": "2+2?", "answer": 4}, "bad_message", "answer: found 4"),
        ({"question": "2+2?", "answer": "4", "reasoning": 2}, "bad_message", "reasoning: found 2"),
        ({"question": " \n", "answer": "4"}, "no_user", "question: found an empty text"),
        ({"question": "2+2?", "answer": " "}, "empty_answer", "content"),
        ({"question": "2+2?", "answer": "<think>a"}, "unclosed_think", "<think>"),
        ({"question": "2+2?", "answer": "4", "mode": "maybe"}, "unknown_mode", "'thinking' or 'non_thinking'"),
        ({"question": "2+2?", "answer": "4", "mode": 2}, "unknown_mode", "unknown mode 2"),
        ({"question": "2+2?", "answer": "4", "mode": None}, "unknown_mode", "found null"),
        ({"question": "2+2?", "answer": "4", "mode": "thinking"}, "missing_reasoning", "mode: "),
        ({"question": "2+2? /think", "answer": "4"}, "mode_conflict", "thinking"),
    ],
)
def test_a_bad_row_of_columns(row, reason, fragment):
    error = error_of([ROWS[0], row])
    assert (error.reason, error.source, error.line) == (reason, "rows", 2)
    assert fragment in error.message


@pytest.mark.parametrize(
    ("row", "reason", "fragment"),
    [
        ({"text": "a"}, "empty_conversation", "messages: missing; found the fields text"),
        ({"messages": None}, "empty_conversation", "messages: found None"),
        ({"messages": MESSAGES[:1]}, "no_answer", "messages[0]"),
        ({"messages": MESSAGES, "tools": ["add"]}, "bad_tools", "tools[0]"),
        ({"messages": MESSAGES, "mode": "maybe"}, "unknown_mode", "'maybe'"),
    ],
)
def test_a_bad_row_of_messages(row, reason, fragment):
    error = error_of([{"messages": MESSAGES}, row])
    assert (error.reason, error.line) == (reason, 2)
    assert fragment in error.message


@pytest.mark.parametrize(
    ("mode", "modes"),
    [("thinking", (Mode.THINKING,)), ("non-thinking", (Mode.NON_THINKING,)), (True, (Mode.THINKING,))],
)
def test_the_mode_column_decides(mode, modes):
    for row in ({**ROWS[0], "mode": mode}, {"messages": MESSAGES, "mode": mode}):
        assert read_conversations([row])[0][0].exchanges[0].modes == modes


# --- options ----------------------------------------------------------------------------------------------------


def test_reasoning_and_answer_are_split_at_the_last_separator():
    row = {"question": "2+2?", "answer": "2 #### and 2\n#### 4 "}
    assert contents(read_conversations([row], RecordOptions(answer_separator="####"))[0]) == [
        ("2+2?", "2 #### and 2", "4")
    ]


def test_nothing_before_the_separator_is_no_reasoning():
    kept, _ = read_conversations([{"question": "2+2?", "answer": "#### 4"}], RecordOptions(answer_separator="####"))
    assert contents(kept) == [("2+2?", None, "4")]
    assert kept[0].exchanges[0].modes == (Mode.NON_THINKING,)


def test_a_missing_separator_is_named():
    error = error_of([{"question": "2+2?", "answer": "4"}], RecordOptions(answer_separator="####"))
    assert error.reason == "missing_separator"
    assert error.message.startswith("answer: the separator '####' is missing. Leave such rows out with")


def test_a_pattern_is_removed_from_reasoning_and_answer_only():
    row = {"question": "<<1+1=2>>?", "answer": "1+1 = <<1+1=2>>2, 2+2 = <<2+2=4>>4\n#### <<4>>4"}
    options = RecordOptions(answer_separator="####", remove_pattern="<<[^>]*>>")
    assert contents(read_conversations([row], options)[0]) == [("<<1+1=2>>?", "1+1 = 2, 2+2 = 4", "4")]
    row = {"question": "2+2?", "reasoning": "so <<2+2=4>>4", "answer": "4"}
    assert contents(read_conversations([row], RecordOptions(remove_pattern="<<.*?>>"))[0]) == [("2+2?", "so 4", "4")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "alpacas"}, "format: 'alpacas'.*messages, .*columns"),
        ({"on_bad_row": "ignore"}, "on_bad_row: 'ignore'.*error, skip"),
        ({"answer_separator": ""}, "answer_separator: found an empty text"),
        ({"remove_pattern": "<<("}, r"remove_pattern: '<<\('"),
    ],
)
def test_bad_options_are_named_before_anything_is_read(options, message):
    with pytest.raises(ValueError, match=message):
        RecordOptions(**options)


# --- the report -------------------------------------------------------------------------------------------------


def test_read_is_kept_plus_skipped(write):
    bad = line(question="2+2?", answer="") + b"{\n" + line(question="2+2?") + line(question="2+2?", answer=" ")
    path = write(GOOD + bad + GOOD)
    kept, report = read_conversations(path, SKIP)
    assert len(kept) == report.kept == 2
    assert report.skipped == {"empty_answer": 2, "invalid_json": 1, "missing_column": 1}
    assert report.read == report.kept + sum(report.skipped.values())
    assert [re.search(r"row (\d)", error)[1] for error in report.errors] == ["2", "3", "4", "5"]
    assert "6 read = 2 kept + 4 skipped" in str(report)
    assert "skipped 2: empty_answer" in str(report)
    found = json.loads(json.dumps(report.to_dict()))
    assert (found["rows_in"], found["rows_kept"], found["skipped"]["empty_answer"]) == (6, 2, 2)
    assert found["errors"] == report.errors


def test_skipped_rows_are_logged(write, caplog):
    read_conversations(write(GOOD + b"{\n"), SKIP)
    assert "2 read = 1 kept + 1 skipped" in caplog.text


def test_only_the_first_errors_are_shown():
    report = RowReport()
    for row in range(3 * SHOWN_ERRORS):
        report.skip(DataError("empty_answer", "…").at("rows", row))
    assert (len(report.errors), report.skipped["empty_answer"]) == (SHOWN_ERRORS, 3 * SHOWN_ERRORS)


def test_the_error_policy_stops_at_the_first_bad_row():
    drawn = []

    def rows():
        for row in [ROWS[0], {"question": "2+2?"}, ROWS[1]]:
            drawn.append(row)
            yield row

    assert error_of(rows()).line == 2
    assert len(drawn) == 2


def test_rows_are_numbered_by_line(write):
    numbers = [number for number, _ in iterate_rows(write(b"\n" + GOOD + b"\n\n" + GOOD))]
    assert numbers == [2, 5]


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is absent")
def test_gsm8k_is_read_whole():
    options = RecordOptions(answer_separator="####", remove_pattern="<<[^>]*>>")
    kept, report = read_conversations(DATA / "gsm8k_train.jsonl", options)
    assert (report.read, report.kept, len(kept), report.skipped) == (7473, 7473, 7473, {})
    question, reasoning, answer = contents(kept[:1])[0]
    assert question.startswith("Natalia sold clips to 48 of her friends")
    assert reasoning.startswith("Natalia sold 48/2 = 24 clips in May.\n")
    assert answer == "72"
    assert all(conversation.exchanges[0].modes == (Mode.THINKING,) for conversation in kept)


def test_broken_rows_crash_nothing_and_are_all_accounted_for(tmp_path):
    """A short run of the benchmark, whose long run is 200,000 rows."""
    script = Path(__file__).parent / "benchmarks" / "fuzzing.py"
    command = [sys.executable, script, "--rows", "2000", "--processes", "1", "--json", tmp_path / "fuzzing.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "fuzzing.json").read_bytes())
    assert found["rows_in"] == found["rows_kept"] + sum(found["skipped"].values()) >= 1990
    assert found["ratios"]["accounted"] == 1
    assert found["ratios"]["crashed"] == 0
    # Mutations that nothing survives, or everything, would test nothing.
    assert 0.1 < found["ratios"]["kept"] < 0.9
    assert len(found["skipped"]) > 10
