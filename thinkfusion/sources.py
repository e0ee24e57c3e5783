# SPDX-License-Identifier: Apache-2.0
"""Where rows come from: files of every kind, the Hub, and anything that yields rows; one row in memory at a time."""

from __future__ import annotations

import csv
import glob
import io
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from thinkfusion.reading import DataError

HUB_PARTS = 2
BOM = b"\xef\xbb\xbf"
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
OTHER_SUFFIXES = (".txt", ".zip", ".xz", ".bz2", ".arrow", ".xlsx", ".yaml", ".yml")
PARQUET_ROWS = 512
UNDECODED = re.compile("[\ud800-\udfff]")
"""What `surrogateescape` makes of bytes that are not UTF-8; no text that is UTF-8 holds it."""


@dataclass(frozen=True)
class Source:
    """One source of rows.

    location: a file, a wildcard pattern, a Hub id (`owner/name`, or `owner/name:subset`), or an iterable of rows.
    weight: how often each row is trained on: 2 is twice, 0.5 a random half.
    split, streaming: of a Hub id, which split is read, and whether it is read without being downloaded first.
    """

    location: str | Path | Iterable[Any]
    weight: float = 1.0
    split: str = "train"
    streaming: bool = False

    def __post_init__(self) -> None:
        weight = self.weight
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            raise ValueError(
                f"{self.name}: weight: found {weight!r}, expected a number above 0 (2 takes every row twice, 0.5 a "
                "random half). Leave the source out if none of its rows is wanted."
            )
        if isinstance(self.location, Mapping):
            raise ValueError(
                f"{self.name}: found {type(self.location).__name__} with the keys {_listed(self.location)}, expected "
                "rows. Choose one split of a data set, or put a single row into a list."
            )
        if not isinstance(self.location, (str, Path, Iterable)):
            raise ValueError(f"{self.name}: found {self.location!r}, expected a file, a Hub id or rows.")

    @property
    def name(self) -> str:
        """What errors and reports call this source: its path or id as given."""
        return str(self.location) if isinstance(self.location, (str, Path)) else "rows"


def as_sources(given: Any, split: str = "train") -> list[Source]:
    """The sources that `given` names, one for each file: a source, a path, an id, rows, or a list of the former.

    All of them are looked up before any is read. Raises FileNotFoundError for a file that is absent or a pattern that
    matches none, and ValueError for a directory or a kind of file that is not read.
    """
    several = isinstance(given, (list, tuple)) and given and all(isinstance(one, (str, Path, Source)) for one in given)
    sources = [one if isinstance(one, Source) else Source(one, split=split) for one in (given if several else [given])]
    return [part for source in sources for part in _files(source)]


def iterate_raw(source: Source) -> Iterator[tuple[int, Any]]:
    """Rows with their number from 1 (in JSON Lines and CSV: the line of the file), as cheaply as they can be had.

    A row of JSON Lines is the bytes of its line, which `parse_raw` parses, perhaps in another process; any other row
    is parsed already, or is the DataError that says why it cannot be.
    """
    for part in _files(source):
        if not isinstance(part.location, (str, Path)):
            yield from enumerate(part.location, start=1)
        elif Path(part.location).is_file():
            yield from _file_rows(Path(part.location))
        else:
            yield from _hub_rows(part)


def parse_raw(raw: Any) -> Any:
    """The row that `iterate_raw` gave; a DataError, not raised, if its line cannot be parsed."""
    return _parse(raw) if isinstance(raw, bytes) else raw


def iterate_rows(source: Any, split: str = "train") -> Iterator[tuple[int, Any]]:
    """Parsed rows with their number; a row that cannot be parsed comes as a DataError."""
    for part in as_sources(source, split):
        for number, raw in iterate_raw(part):
            yield number, parse_raw(raw)


def _files(source: Source) -> list[Source]:
    """The source itself, or one for each file that its pattern matches."""
    if not isinstance(source.location, (str, Path)):
        return [source]
    path, name = Path(source.location), source.name
    if path.is_dir():
        raise ValueError(f"{name}: this is a directory; name a file in it, or a pattern such as {name}/*.jsonl.")
    if path.is_file():
        _reader(path)
        return [source]
    if glob.has_magic(name):
        found = sorted(match for match in glob.glob(name, recursive=True) if os.path.isfile(match))
        if not found:
            raise FileNotFoundError(f"{name}: there is no such file: the pattern matches nothing.")
        return [part for match in found for part in _files(replace(source, location=match))]
    if (
        path.suffix.lower() in (*READERS, *COMPRESSED, *OTHER_SUFFIXES)
        or path.is_absolute()
        or name.startswith((".", "~"))
        or len(path.parts) > HUB_PARTS
    ):
        raise FileNotFoundError(f"{name}: there is no such file.")
    return [source]


# --- files ------------------------------------------------------------------------------------------------------


def _reader(path: Path) -> Any:
    suffix = path.suffix.lower()
    inner = Path(path.stem).suffix.lower() if suffix in COMPRESSED else suffix
    if inner not in READERS or (suffix in COMPRESSED and inner == ".parquet"):
        raise ValueError(
            f"{path}: files ending in {''.join(path.suffixes[-2:]) or path.suffix!r} are not read; use "
            f"{', '.join(READERS)}, all but the last also with .gz or .zst."
        )
    return READERS[inner]


def _file_rows(path: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        for number, row in _reader(path)(path):
            yield number, row
    except OSError as error:
        raise ValueError(f"{path}: cannot be read after row {number}: {error.strerror or error}.") from None


def _open(path: Path) -> BinaryIO:
    kind = COMPRESSED.get(path.suffix.lower())
    if kind is None:
        return path.open("rb")
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(path.open("rb"), kind))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    with _open(path) as file:
        for line in file:
            number += 1
            # Rebound, so that a line of 100 MB is not held twice.
            line = (line.removeprefix(BOM) if number == 1 else line).rstrip(b"\r\n")  # noqa: PLW2901
            if line and not line.isspace():
                yield number, line


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    """The rows of a list; or of lines, if that is what the file really holds."""
    if _holds_lines(path):
        yield from _lines(path)
        return
    with _open(path) as file:
        data = file.read().removeprefix(BOM)
    rows = _parse(data) if data.strip() else []
    if isinstance(rows, DataError):
        raise rows.at(str(path), 1)
    if not isinstance(rows, list):
        raise ValueError(f"{path}: found {type(rows).__name__}, expected a list of rows.")
    del data
    yield from enumerate(rows, start=1)


def _holds_lines(path: Path) -> bool:
    """Whether the first line is an object and more lines follow: this is not one list, nor one object."""
    with _open(path) as file:
        lines = (line.removeprefix(BOM) for line in file)
        first = next((line for line in lines if line.strip()), b"")
        if not first.lstrip().startswith(b"{") or not isinstance(_parse(first), dict):
            return False
        return any(not line.isspace() for line in lines)


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        return DataError("invalid_utf8", f"byte {error.start + 1} of the row is not UTF-8.")
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if b"\n" in data else ""
        return DataError("invalid_json", f"not JSON: {error.msg}, at {line}column {error.colno}.")
    except (ValueError, RecursionError) as error:
        return DataError("invalid_json", f"no JSON that can be read: {error}.")


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                for row in _batch_rows(batch):
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file (after row {number}): {error}") from None


def _batch_rows(batch: Any) -> Iterable[Any]:
    try:
        rows: list[Any] = batch.to_pylist()
    except UnicodeDecodeError:
        return (_batch_row(batch, index) for index in range(batch.num_rows))
    return rows


def _batch_row(batch: Any, index: int) -> Any:
    try:
        return batch.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        return DataError("invalid_utf8", f"byte {error.start + 1} of a text of the row is not UTF-8.")


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows of text: the first names the columns, an empty cell is None. Rows are numbered by the line they begin at."""
    # The limit belongs to the whole process, and its default of 128 KiB is shorter than a long reasoning.
    csv.field_size_limit(sys.maxsize)
    tabs = ".tsv" in (suffix.lower() for suffix in path.suffixes[-2:])
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        at_end = False

        def lines() -> Iterator[str]:
            nonlocal at_end
            yield from file
            at_end = True

        # Strict: else what stands behind a closing quote would join the cell, and a quote never closed would pass.
        reader = csv.reader(lines(), delimiter="\t" if tabs else ",", strict=True)
        names: Sequence[str] = ()
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if at_end:
                    raise _open_quote(path, line, reader.line_num) from None
                if not names:
                    raise ValueError(f"{path}: the first line, which names the columns, is not CSV: {error}.") from None
                yield line, DataError("invalid_csv", f"not CSV: {error}.")
                continue
            if cells and names:
                yield line, _cells(names, cells)
            elif cells:
                names = _column_names(path, cells)


def _open_quote(path: Path, line: int, last: int) -> ValueError:
    """How many rows such a quote has swallowed cannot be known, so that none of them can be counted."""
    return ValueError(
        f"{path}, row {line}: not CSV: a quote that is opened there is never closed, so that lines {line} to {last} "
        "are one cell. Close the quote, or double it."
    )


def _column_names(path: Path, names: Sequence[str]) -> Sequence[str]:
    if UNDECODED.search("".join(names)):
        raise ValueError(f"{path}: the first line, which names the columns, is not UTF-8. Save the file as UTF-8.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path}: the first line names the column {twice[0]!r} twice. Rename one of them.")
    return names


def _cells(names: Sequence[str], cells: Sequence[str]) -> Any:
    if len(cells) != len(names):
        return DataError(
            "invalid_csv",
            f"found {len(cells)} cells, expected {len(names)} ({_listed(names)}). Put a text with commas, quotes or "
            "line breaks into double quotes.",
        )
    for name, cell in zip(names, cells, strict=True):
        if found := UNDECODED.search(cell):
            return DataError("invalid_utf8", f"{name}: character {found.start() + 1} is not UTF-8.")
    return {name: cell or None for name, cell in zip(names, cells, strict=True)}


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(repr(name) for name in names)


READERS = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}


# --- the Hub ----------------------------------------------------------------------------------------------------


def _hub_rows(source: Source) -> Iterator[tuple[int, Any]]:
    import datasets

    name, _, subset = source.name.partition(":")
    try:
        loaded = datasets.load_dataset(
            *((name, subset) if subset else (name,)),
            split=source.split,
            **({"streaming": True} if source.streaming else {}),
        )
        yield from enumerate(loaded, start=1)
    except Exception as error:
        # The Hub client has a dozen exception types, and its messages run over many lines.
        reason = next((line for line in map(str.strip, str(error).splitlines()) if line), type(error).__name__)
        raise FileNotFoundError(
            f"{source.name}: neither a file nor a data set that could be loaded from the Hub "
            f"({without_secrets(reason)}). Check the name, run `hf auth login` if it is private, or name a local "
            "file."
        ) from None


def without_secrets(text: str) -> str:
    """`text` without access tokens: an error message ends up in logs that other people read."""
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        token = os.environ.get(variable, "").strip()
        if token:
            text = text.replace(token, "***")
    return re.sub(r"\bhf_\w+|(?<=Bearer )\S+|(?<=://)[^/@\s]+(?=@)", "***", text)
