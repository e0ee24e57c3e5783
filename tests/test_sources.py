# SPDX-License-Identifier: Apache-2.0
"""Rows from files of every kind, patterns, the Hub and iterables, one at a time; what cannot be read is named."""

import csv
import gzip
import io
import json
import math
import os
import re
import traceback
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from thinkfusion import sources
from thinkfusion.reading import DataError
from thinkfusion.sources import Source, as_sources, iterate_raw, iterate_rows, parse_raw

ROWS = [
    {"question": "2+2?", "answer": "4", "reasoning": '2 and\n2, "so" 4'},
    {"question": "수도는? 👩‍👩‍👧", "answer": "서울\té", "reasoning": None},
    {"question": "עברית, ا", "answer": "a,b", "reasoning": " blank "},
]
CANARY = "canary-7f3a91-secret"


def as_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_list(rows):
    return json.dumps(rows, ensure_ascii=False, indent=1).encode()


def as_csv(rows, delimiter=","):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_tsv(rows):
    return as_csv(rows, "\t")


def as_parquet(rows):
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def zstd(data):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACKED = {"": bytes, ".gz": gzip.compress, ".zst": zstd}
KINDS = {".jsonl": as_lines, ".ndjson": as_lines, ".json": as_list, ".csv": as_csv, ".tsv": as_tsv}
FILES = [(kind + packed, KINDS[kind], PACKED[packed]) for kind in KINDS for packed in PACKED]
FILES += [(".parquet", as_parquet, bytes), (".JSONL", as_lines, bytes), (".Csv.GZ", as_csv, gzip.compress)]


@pytest.fixture
def write(tmp_path):
    def write(name, data):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    return write


def rows_of(location):
    return list(iterate_rows(location))


def lines_of(location):
    return [number for number, _ in iterate_rows(location)]


# --- kinds of files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "encode", "pack"), FILES, ids=[suffix for suffix, *_ in FILES])
def test_every_kind_of_file_gives_the_same_rows(write, suffix, encode, pack):
    path = write(f"my.rows{suffix}", pack(encode(ROWS)))
    assert [row for _, row in iterate_rows(path)] == ROWS
    assert [row for _, row in iterate_rows(str(path))] == ROWS


@pytest.mark.parametrize("suffix", [".txt", ".parquet.gz", ".jsonl.xz", ".gz", ""])
def test_another_kind_of_file_is_an_error_that_lists_the_known(write, suffix):
    path = write(f"rows{suffix}", "")
    with pytest.raises(
        ValueError, match=r"are not read; use \.jsonl, \.ndjson, \.json, \.csv, \.tsv, \.parquet"
    ) as caught:
        rows_of(path)
    assert str(path) in str(caught.value)


def test_a_line_of_json_lines_travels_as_bytes(write):
    source = Source(write("rows.jsonl", b"\xef\xbb\xbf" + as_lines(ROWS) + b"{]\r\n"))
    raw = list(iterate_raw(source))
    assert all(isinstance(line, bytes) and not line.endswith((b"\r", b"\n")) for _, line in raw)
    assert [parse_raw(line) for _, line in raw[:-1]] == ROWS
    assert isinstance(parse_raw(raw[-1][1]), DataError)
    assert parse_raw(ROWS[0]) is ROWS[0]


def test_members_of_a_compressed_file_are_all_read(write):
    data = as_lines(ROWS)
    assert len(rows_of(write("a.jsonl.gz", gzip.compress(data) + gzip.compress(data)))) == 6
    assert len(rows_of(write("a.jsonl.zst", zstd(data) + zstd(data)))) == 6


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_that_is_cut_is_named_with_its_last_row(write, suffix):
    data = PACKED[suffix](b"".join(b'{"question": "%d", "answer": "4"}\n' % (n * 7919 % 10**6) for n in range(50_000)))
    path = write(f"rows.jsonl{suffix}", data[: len(data) * 2 // 3])
    read = []
    with pytest.raises(ValueError, match=r"cannot be read after row [1-9]\d*: Truncated") as caught:
        read.extend(number for number, _ in iterate_rows(path))
    assert read
    assert f"{path}: cannot be read after row {read[-1]}: " in str(caught.value)


def test_bytes_that_are_not_compressed_are_an_error(write):
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz: cannot be read after row 0"):
        rows_of(write("rows.jsonl.gz", as_lines(ROWS)))


# --- JSON -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [b"", b"\xef\xbb\xbf", b"\n \n", b"\xef\xbb\xbf\r\n"])
def test_json_that_is_json_lines_is_read_as_lines(write, head):
    path = write("rows.json", head + as_lines(ROWS) + b"\n{]\n")
    *rows, (line, broken) = rows_of(path)
    first = head.count(b"\n") + 1
    assert rows == list(enumerate(ROWS, start=first))
    assert (line, broken.reason) == (first + 4, "invalid_json")


def test_json_that_is_one_object_is_no_list(write):
    for data in (b'{"question": "a"}', b'{\n"question": "a"\n}\n', b'{"question": "a"}\n \n', b"3"):
        with pytest.raises(ValueError, match=r"rows\.json: found (dict|int), expected a list of rows"):
            rows_of(write("rows.json", data))


def test_json_of_no_rows(write):
    assert rows_of(write("rows.json", b"")) == rows_of(write("rows.json", b" [ ] \n")) == []


# --- CSV --------------------------------------------------------------------------------------------------------


def test_csv_is_text_with_empty_cells_as_none(write):
    path = write("rows.csv", b'\xef\xbb\xbfquestion,answer,mode\r\n1+1?,2,\r\n,"",true\r\n')
    assert rows_of(path) == [
        (2, {"question": "1+1?", "answer": "2", "mode": None}),
        (3, {"question": None, "answer": None, "mode": "true"}),
    ]


def test_csv_rows_are_numbered_by_the_line_they_begin_at(write):
    path = write("rows.csv", 'question,answer\n\n"a\nb\nc",1\n\nd,2\n')
    assert rows_of(path) == [(3, {"question": "a\nb\nc", "answer": "1"}), (7, {"question": "d", "answer": "2"})]


@pytest.mark.parametrize(
    ("line", "reason", "fragment"),
    [
        (b"1,2,3", "invalid_csv", "found 3 cells, expected 2 ('question', 'answer')"),
        (b"1", "invalid_csv", "found 1 cells, expected 2"),
        (b'"1"2,3', "invalid_csv", "expected after '\"'"),
        (b"1,ab\xff", "invalid_utf8", "answer: character 3 is not UTF-8"),
        (b"1,\xed\xa0\xbd", "invalid_utf8", "answer: character 1 is not UTF-8"),
    ],
)
def test_a_bad_line_of_csv_costs_one_row(write, line, reason, fragment):
    path = write("rows.csv", b"question,answer\na,1\n" + line + b"\nb,2\n")
    (_, first), (number, error), (_, last) = rows_of(path)
    assert (first["answer"], number, error.reason, last["answer"]) == ("1", 3, reason, "2")
    assert fragment in error.message


def test_a_quote_that_is_never_closed_stops_instead_of_swallowing_rows(write):
    path = write("rows.csv", 'question,answer\na,1\nb,"2\nc,3\nd,4\n')
    with pytest.raises(ValueError, match=re.escape(f"{path}, row 3: not CSV: a quote that is opened there is never")):
        rows_of(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a,b,a\n1,2,3\n", "names the column 'a' twice"),
        (b"a,\xff\n1,2\n", "is not UTF-8"),
        (b'"a"x,b\n1,2\n', "is not CSV"),
    ],
)
def test_a_bad_head_of_csv_is_an_error(write, data, message):
    with pytest.raises(ValueError, match=message) as caught:
        rows_of(write("rows.csv", data))
    assert "rows.csv" in str(caught.value)


def test_a_cell_may_be_long(write):
    assert len(rows_of(write("rows.csv", f"a\n{'x' * 1_000_000}\n"))[0][1]["a"]) == 1_000_000


# --- Parquet ----------------------------------------------------------------------------------------------------


def test_parquet_is_numbered_over_its_batches(write, monkeypatch):
    monkeypatch.setattr(sources, "PARQUET_ROWS", 2)
    rows = [{"question": str(number), "answer": "4"} for number in range(5)]
    assert rows_of(write("rows.parquet", as_parquet(rows))) == list(enumerate(rows, start=1))


def test_bytes_in_parquet_that_are_not_utf8_cost_one_row(write):
    texts = pyarrow.array([b"a", b"\xff", b"c"]).cast(pyarrow.binary())
    broken = pyarrow.StringArray.from_buffers(3, texts.buffers()[1], texts.buffers()[2])
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"question": broken}), sink)
    first, (number, error), last = rows_of(write("rows.parquet", sink.getvalue()))
    assert (first, last) == ((1, {"question": "a"}), (3, {"question": "c"}))
    assert (number, error.reason) == (2, "invalid_utf8")


def test_parquet_that_is_cut_is_an_error(write):
    data = as_parquet(ROWS)
    for broken in (b"", b"no parquet", data[: len(data) // 2], data[:8] + b"\0" * 40 + data[48:]):
        with pytest.raises(ValueError, match=r"rows\.parquet: not a readable Parquet file"):
            rows_of(write("rows.parquet", broken))


# --- memory -----------------------------------------------------------------------------------------------------


def big_lines():
    row = b'{"question": "' + b"x" * 2000 + b'", "answer": "4"}\n'
    return row * 20_000


def big_csv():
    return b"question,answer\n" + (b"x" * 2000 + b",4\n") * 20_000


def big_parquet():
    texts = ["x" * 1990 + str(number) for number in range(20_000)]
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"question": texts}), sink, compression="none", use_dictionary=False)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "make"),
    [
        *(("rows.jsonl", big_lines), ("rows.json", big_lines), ("rows.csv", big_csv), ("rows.parquet", big_parquet)),
        *(("rows.jsonl.gz", lambda: gzip.compress(big_lines(), 1)), ("rows.jsonl.zst", lambda: zstd(big_lines()))),
    ],
)
def test_no_file_is_held_in_memory(write, name, make):
    """40 MB of rows are read with less than 6 MB of Python and Arrow memory."""
    path = write(name, make())
    tracemalloc.start()
    before = pyarrow.total_allocated_bytes()
    arrow = count = 0
    for count, (_, _row) in enumerate(iterate_rows(path), start=1):  # noqa: B007
        arrow = max(arrow, pyarrow.total_allocated_bytes() - before)
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert python < 6_000_000
    assert arrow < 6_000_000


def test_closing_early_closes_the_file(write):
    rows = iterate_rows(write("rows.jsonl", as_lines(ROWS)))
    next(rows)
    rows.close()


# --- patterns and several sources -------------------------------------------------------------------------------


def test_a_pattern_is_one_source_for_each_file_in_order(write, tmp_path):
    for name in ("b.jsonl", "a.csv", "deep/c.jsonl"):
        write(name, (as_csv if name.endswith("csv") else as_lines)(ROWS[:1]))
    write("note.md", "not matched")
    found = as_sources(Source(str(tmp_path / "*.*s*"), weight=2.0))
    assert [(Path(source.name).name, source.weight) for source in found] == [("a.csv", 2.0), ("b.jsonl", 2.0)]
    found = as_sources(tmp_path / "**" / "*.jsonl")
    assert [os.path.relpath(source.name, tmp_path) for source in found] == ["b.jsonl", os.path.join("deep", "c.jsonl")]
    assert rows_of(tmp_path / "[ab].*") == [(2, ROWS[0]), (1, ROWS[0])]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(write):
    path = write("rows[1].jsonl", as_lines(ROWS))
    assert len(rows_of(path)) == 3


def test_several_sources_are_looked_up_before_any_is_read(write, tmp_path):
    path = write("rows.jsonl", as_lines(ROWS))
    assert [source.name for source in as_sources([path, str(path)])] == [str(path)] * 2
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl: there is no such file"):
        as_sources([path, tmp_path / "missing.jsonl"])


def test_rows_are_one_source():
    assert [source.name for source in as_sources(ROWS)] == ["rows"]
    assert rows_of(iter(ROWS)) == list(enumerate(ROWS, start=1))
    assert [parse_raw(raw) for _, raw in iterate_raw(Source(ROWS))] == ROWS


def test_a_streamed_data_set_is_read():
    import datasets

    assert rows_of(datasets.Dataset.from_list(ROWS).to_iterable_dataset()) == list(enumerate(ROWS, start=1))


def test_a_data_set_of_several_splits_is_no_source():
    import datasets

    given = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    with pytest.raises(ValueError, match=r"found DatasetDict with the keys 'train'.*Choose one split"):
        as_sources(given)


@pytest.mark.parametrize("given", [3, None, object()])
def test_what_is_no_source_is_named(given):
    with pytest.raises(ValueError, match="expected a file, a Hub id or rows"):
        as_sources(given)


@pytest.mark.parametrize("weight", [0, -1, math.nan, math.inf, "2", None, True, [1]])
def test_a_weight_is_checked_before_anything_is_read(weight):
    with pytest.raises(ValueError, match=r"missing\.jsonl: weight: found .*, expected a number above 0"):
        Source("missing.jsonl", weight=weight)


# --- the Hub ----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """Calls of `load_dataset`, and what it returns or raises."""
    import datasets

    class Hub:
        def __init__(self):
            self.calls, self.answer = [], ROWS

        def load(self, *names, **options):
            self.calls.append((names, options))
            if isinstance(self.answer, Exception):
                raise self.answer
            return self.answer

    hub = Hub()
    monkeypatch.setattr(datasets, "load_dataset", hub.load)
    return hub


def test_a_hub_id_may_name_a_subset_and_be_streamed(hub):
    for source in (
        Source("owner/data"),
        Source("owner/data:main", split="test"),
        Source("data", streaming=True),
    ):
        assert [row for _, row in iterate_raw(source)] == ROWS
    assert hub.calls == [
        (("owner/data",), {"split": "train"}),
        (("owner/data", "main"), {"split": "test"}),
        (("data",), {"split": "train", "streaming": True}),
    ]


def test_a_failure_while_streaming_is_one_line_too(hub):
    def rows():
        yield ROWS[0]
        raise ConnectionError("\n  the line broke\nhere")

    hub.answer = rows()
    read = iterate_rows(Source("owner/data", streaming=True))
    assert next(read) == (1, ROWS[0])
    with pytest.raises(FileNotFoundError, match=r"owner/data: .* \(the line broke\)"):
        next(read)


@pytest.mark.parametrize(
    "message",
    [
        f"401 for https://user:{CANARY}@host/data",
        f"403, Authorization: Bearer {CANARY}",
        f"wrong token {CANARY}!",
        "wrong token hf_abcdefCANARYabcdef",
    ],
)
def test_no_error_holds_a_token(hub, monkeypatch, message):
    monkeypatch.setenv("HF_TOKEN", CANARY if "wrong" in message else "another")
    hub.answer = ConnectionError(message)
    with pytest.raises(FileNotFoundError, match="owner/data") as caught:
        rows_of("owner/data")
    shown = "".join(traceback.format_exception(caught.type, caught.value, caught.tb, chain=True))
    assert CANARY not in shown
    assert "CANARY" not in shown
    assert "***" in str(caught.value)
