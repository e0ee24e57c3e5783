# SPDX-License-Identifier: Apache-2.0
"""The row report: totals that add up, every skipped or altered row in one JSON document, memory that stays flat."""

import json
import os
import tracemalloc
from collections import Counter

import pytest

from thinkfusion import row_report
from thinkfusion.reading import DataError, Note
from thinkfusion.row_report import SHOWN_ERRORS, RowOutcome, RowReport, printable

ENTRY = {"source": "rows.jsonl", "line": 7, "kind": "skipped", "reason": "empty_answer", "detail": "no", "excerpt": "{"}


def skipped(number=7, message="no", reason="empty_answer"):
    return DataError(reason, message, source="rows.jsonl", line=number)


@pytest.fixture
def report():
    report = RowReport(read=10, kept=9, formats={"rows.jsonl": "columns"})
    report.skip(skipped(), "{")
    report.alter("role_alias", source="rows.jsonl", line=8, detail="human → user", excerpt="한 \x1b[31m")
    report.note("control_characters")
    report.note("duplicate", 3)
    report.sequences["thinking"] += 9
    report.tokens["thinking"] += 90
    report.all_tokens = 180
    return report


def test_save_is_one_document_with_totals_and_all_rows(report, tmp_path):
    path = tmp_path / "new" / "folder" / "rows.json"
    report.save(path)
    saved = json.loads(path.read_bytes())
    altered = {"source": "rows.jsonl", "line": 8, "kind": "altered", "reason": "role_alias"}
    assert saved.pop("rows") == [ENTRY, {**altered, "detail": "human → user", "excerpt": "한 \x1b[31m"}]
    assert saved == report.to_dict()
    assert "한" in path.read_text(encoding="utf-8")
    assert os.listdir(path.parent) == ["rows.json"]


def test_the_names_that_scripts_read(report):
    found = report.to_dict()
    assert found == json.loads(json.dumps(found))
    assert (found["format"], found["rows_in"], found["rows_kept"]) == ("columns", 10, 9)
    assert (found["skipped"], found["altered"]) == ({"empty_answer": 1}, {"role_alias": 1})
    assert found["noted"] == {"control_characters": 1, "duplicate": 3}
    assert found["sequences"] == {"thinking": 9, "non_thinking": 0}
    assert found["tokens"] == {"thinking": 90, "non_thinking": 0}
    assert (found["all_tokens"], found["errors"]) == (180, ["rows.jsonl, row 7: no [empty_answer]"])


def test_formats_of_several_sources_are_told():
    report = RowReport(formats={"a": "alpaca", "b": "columns", "c": "alpaca"})
    assert (report.to_dict()["format"], report.to_dict()["formats"]["b"]) == ("alpaca, columns", "columns")
    assert RowReport().to_dict()["format"] is None


def test_saving_without_rows_and_saving_again(report, tmp_path):
    path = tmp_path / "rows.json"
    RowReport().save(path)
    assert json.loads(path.read_bytes())["rows"] == []
    report.save(path)
    report.skip(skipped(9))
    report.save(path)
    assert [entry["line"] for entry in json.loads(path.read_bytes())["rows"]] == [7, 8, 9]
    assert [entry["line"] for entry in report.entries()] == [7, 8, 9]


def test_rows_may_be_counted_while_the_report_is_read(report, monkeypatch):
    monkeypatch.setattr(row_report, "PORTION_BYTES", 1)
    entries = report.entries()
    assert next(entries) == ENTRY
    report.skip(skipped(9))
    assert next(entries)["line"] == 8
    assert [entry["line"] for entry in report.entries()] == [7, 8, 9]


def test_a_failed_save_leaves_the_old_report(report, tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    path.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        report.save(path)
    assert (path.read_text(), os.listdir(tmp_path)) == ("old", ["rows.json"])


def test_a_lone_surrogate_is_kept_as_the_escape_of_json(tmp_path):
    report = RowReport(read=1)
    report.skip(DataError("invalid_unicode", "found \ud83d", source="a\udc00", line=1), "\udfff")
    report.save(tmp_path / "rows.json")
    saved = json.loads((tmp_path / "rows.json").read_bytes().decode("utf-8"))
    assert [saved["rows"][0][name] for name in ("source", "detail", "excerpt")] == ["a\udc00", "found \ud83d", "\udfff"]
    assert str(report).encode("utf-8")
    assert json.dumps(report.to_dict(), ensure_ascii=False).encode("utf-8")


def test_load_takes_over_what_was_saved(report, tmp_path):
    class Account:
        def to_dict(self):
            return {"total": {"rows_after": 9}}

    report.account = Account()
    report.skip(skipped(9, 'tricky "rows": [\n  ]\n'), asked_for=True)
    report.save(tmp_path / "rows.json")
    loaded = RowReport()
    totals = loaded.load(tmp_path / "rows.json")
    assert totals["account"] == {"total": {"rows_after": 9}}
    report.account = None
    assert loaded.to_dict() == report.to_dict()
    assert list(loaded.entries()) == list(report.entries())
    loaded.skip(skipped(10))
    assert loaded.skipped["empty_answer"] == 3


@pytest.mark.parametrize("data", [b"", b"{}", b'{\n  "rows_in": 1,\n  "rows": [\n    {"line": 1}'])
def test_loading_what_is_no_report_is_an_error(tmp_path, data):
    (tmp_path / "rows.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"rows\.json: this is no row report, or it was cut"):
        RowReport().load(tmp_path / "rows.json")


def test_notes_of_a_row_are_counted_by_kind():
    report = RowReport()
    outcome = RowOutcome(3, [Note("altered", "role_case", "d"), Note("noted", "late", "")], source="s", excerpt="e")
    for note in outcome.notes:
        report.count(note, outcome)
    assert (report.altered, report.noted) == ({"role_case": 1}, {"late": 1})
    assert [list(entry.values()) for entry in report.entries()] == [["s", 3, "altered", "role_case", "d", "e"]]


def test_memory_stays_flat(tmp_path):
    """60,000 rows of 300 bytes are 18 MB on disk and nothing in memory, saved as well."""
    report = RowReport()
    report.skip(skipped(0), "x" * 200)
    tracemalloc.start()
    for number in range(60_000):
        report.read += 1
        report.skip(skipped(number), "x" * 200)
    report.save(tmp_path / "rows.json")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000
    assert (tmp_path / "rows.json").stat().st_size > 15_000_000
    assert sum(1 for _ in report.entries()) == 60_001


def test_no_file_is_written_without_a_row(monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryFile", None)
    report = RowReport(read=1, kept=1)
    report.note("duplicate")
    assert list(report.entries()) == []


# --- what is printed --------------------------------------------------------------------------------------------


def test_the_text_lists_what_happened(report):
    lines = str(report).split("\n")
    assert lines[0] == "rows: 10 read = 9 kept + 1 skipped"
    for line in (
        "  skipped 1: empty_answer",
        "    e.g. rows.jsonl, row 7: no [empty_answer]",
        "  altered 1: role_alias",
    ):
        assert line in lines
    assert "  noted 3: duplicate" in lines
    assert "  thinking: 9 sequences, 90 trained tokens" in lines


def test_only_the_first_errors_are_held():
    report = RowReport()
    for number in range(3 * SHOWN_ERRORS):
        report.skip(skipped(number))
    assert (len(report.errors), report.skipped["empty_answer"]) == (SHOWN_ERRORS, 3 * SHOWN_ERRORS)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("a\rb\x07\x00\x9b2J\x7f", r"a\rb\x07\x00\x9b2J\x7f"),
        ("abc\u202edef\u2066", r"abc\u202edef\u2066"),
        ("\ud83d", r"\ud83d"),
        ("한국어 👩‍👩‍👧 é שלום\n\tb", "한국어 👩‍👩‍👧 é שלום\n\tb"),
    ],
)
def test_what_would_steer_a_terminal_is_spelled_out(text, shown):
    assert printable(text) == shown


# --- the share of skipped rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("lost", "allowed"), [(10, 0.01), (0, 0.0), (1000, 1.0), (333, 0.34)])
def test_a_share_that_is_allowed_passes(lost, allowed):
    RowReport(read=1000, kept=1000 - lost, skipped=Counter(empty_answer=lost)).check_share(allowed)


def test_a_larger_share_stops_with_the_report_and_the_option():
    report = RowReport(read=1000, kept=989, skipped=Counter(empty_answer=10))
    report.skip(skipped())
    with pytest.raises(ValueError, match=r"11 of 1,000 rows \(1\.1%\).*max_skipped allows 1\.0%") as caught:
        report.check_share(0.01)
    assert "--max_skipped 0.02" in str(caught.value)
    assert "skipped 11: empty_answer" in str(caught.value)
    report.check_share(0.02)


def test_rows_that_an_option_left_out_are_no_loss():
    report = RowReport(read=4, kept=1)
    for _ in range(3):
        report.skip(skipped(reason="duplicate"), asked_for=True)
    report.check_share(0.0)
