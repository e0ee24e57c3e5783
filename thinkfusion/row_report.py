# SPDX-License-Identifier: Apache-2.0
"""What became of every row: totals that add up, and each skipped or altered row by name, however many there are."""

from __future__ import annotations

import json
import os
import re
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from thinkfusion.conversations import Conversation
from thinkfusion.modes import Mode
from thinkfusion.reading import DataError, Note

SHOWN_ERRORS = 20
PORTION_BYTES = 1 << 20
ROWS = b',\n  "rows": ['
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class RowOutcome(NamedTuple):
    """What reading one row gave: a conversation or the error that refuses it. It travels between processes.

    notes: what was done to the row or seen in it. excerpt: its beginning, if it was refused or altered.
    key: hashes of the prompt and of the whole row; None if it was not read from a source.
    """

    line: int
    notes: list[Note]
    conversation: Conversation | None = None
    error: DataError | None = None
    source: str = ""
    excerpt: str = ""
    key: tuple[int, int] | None = None


def printable(text: str) -> str:
    """`text` as a terminal may show it: what would colour, move, delete or turn round other text is spelled out."""
    return UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], text)


@dataclass
class RowReport:
    """What became of the rows: read = kept + skipped.

    skipped, altered, noted: rows by reason: left out, changed, and kept as they are but worth counting.
    asked_for: how many of the skipped rows an option asked to leave out, so that they are no sign of bad data.
    formats: the format of each source.
    sequences, tokens, all_tokens: what is trained, by mode, filled in when rows are rendered: `tokens` those with
        loss, `all_tokens` those computed. `account` has them by source and language too, if there is a mixture.
    prompt_keys, row_keys: hashes of the kept rows, to find rows that come again.

    Each skipped or altered row is written to a temporary file and not held in memory; `save` writes them out.
    """

    read: int = 0
    kept: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    altered: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)
    asked_for: int = 0
    errors: list[str] = field(default_factory=list)
    formats: dict[str, str] = field(default_factory=dict)
    sequences: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    all_tokens: int = 0
    account: Any = None
    prompt_keys: array[int] = field(default_factory=lambda: array("Q"), repr=False, compare=False)
    row_keys: set[int] = field(default_factory=set, repr=False, compare=False)
    _entries: BinaryIO | None = field(default=None, repr=False, compare=False)

    def skip(self, error: DataError, excerpt: str = "", *, asked_for: bool = False) -> None:
        """Count a row that was never kept, or is kept no longer, as left out for this reason."""
        self.skipped[error.reason] += 1
        self.asked_for += asked_for
        if len(self.errors) < SHOWN_ERRORS:
            self.errors.append(_encodable(str(error)))
        self._write(
            **{"source": error.source, "line": error.line, "kind": "skipped", "reason": error.reason},
            **{"detail": error.message, "excerpt": excerpt},
        )

    def alter(self, reason: str, *, source: str, line: int | None, detail: str = "", excerpt: str = "") -> None:
        """Count a row that was changed."""
        self.altered[reason] += 1
        self._write(source=source, line=line, kind="altered", reason=reason, detail=detail, excerpt=excerpt)

    def count(self, note: Note, outcome: RowOutcome) -> None:
        """Count what was done to a kept row, or seen in it."""
        if note.kind != "altered":
            self.note(note.reason)
            return
        self.alter(note.reason, source=outcome.source, line=outcome.line, detail=note.detail, excerpt=outcome.excerpt)

    def note(self, reason: str, count: int = 1) -> None:
        """Count rows that are kept as they are."""
        self.noted[reason] += count

    def entries(self) -> Iterator[dict[str, Any]]:
        """Every skipped or altered row, in the order in which they came."""
        for line in self._entry_lines():
            yield json.loads(line)

    def check_share(self, max_skipped: float) -> None:
        """Raise ValueError if more than this share of the rows was skipped: a silent loss is worse than a stop."""
        lost = sum(self.skipped.values()) - self.asked_for
        if not lost or lost <= max_skipped * self.read:
            return
        raise ValueError(
            f"{lost:,} of {self.read:,} rows ({lost / self.read:.1%}) would be skipped, and max_skipped allows "
            f"{max_skipped:.1%}. Repair the rows, or allow it with max_skipped={_rounded_up(lost / self.read)} "
            f"(--max_skipped {_rounded_up(lost / self.read)}).\n{self}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The totals as plain JSON values; the first errors of skipped rows are under `errors`."""
        totals = {
            "format": ", ".join(dict.fromkeys(self.formats.values())) or None,
            "formats": self.formats,
            "rows_in": self.read,
            "rows_kept": self.kept,
            "skipped": dict(self.skipped),
            "altered": dict(self.altered),
            "noted": dict(self.noted),
            "asked_for": self.asked_for,
            "sequences": {mode.value: self.sequences[mode.value] for mode in Mode},
            "tokens": {mode.value: self.tokens[mode.value] for mode in Mode},
            "all_tokens": self.all_tokens,
            "errors": self.errors,
        }
        return totals if self.account is None else {**totals, "account": self.account.to_dict()}

    def save(self, path: str | Path) -> None:
        """Write the totals, and under `rows` every skipped or altered row, as one JSON document."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with partial.open("wb") as file:
                file.write(_encoded(self.to_dict(), indent=2).removesuffix(b"\n}") + ROWS)
                for number, line in enumerate(self._entry_lines()):
                    file.write((b",\n    " if number else b"\n    ") + line.rstrip(b"\n"))
                file.write(b"\n  ]\n}\n")
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def load(self, path: str | Path) -> dict[str, Any]:
        """Take over what `save` wrote, and return its totals, the token account among them. Hashes are not saved."""
        with Path(path).open("rb") as file:
            head = b"".join(_until(file, ROWS.lstrip(b",\n") + b"\n", path))
            totals: dict[str, Any] = json.loads(head.rstrip().removesuffix(b",") + b"}")
            for line in _until(file, b"  ]\n", path):
                self._write(**json.loads(line.strip().removesuffix(b",")))
        self.read, self.kept, self.asked_for = (totals[name] for name in ("rows_in", "rows_kept", "asked_for"))
        self.errors, self.formats, self.all_tokens = (totals[name] for name in ("errors", "formats", "all_tokens"))
        for name in ("skipped", "altered", "noted", "sequences", "tokens"):
            setattr(self, name, Counter(totals[name]))
        return totals

    def __str__(self) -> str:
        lines = [f"rows: {self.read:,} read = {self.kept:,} kept + {sum(self.skipped.values()):,} skipped"]
        lines += [f"  skipped {count:,}: {reason}" for reason, count in self.skipped.most_common()]
        lines += [f"    e.g. {self.errors[0]}"] if self.errors else []
        lines += [f"  altered {count:,}: {reason}" for reason, count in self.altered.most_common()]
        lines += [f"  noted {count:,}: {reason}" for reason, count in self.noted.most_common()]
        lines += [
            f"  {mode}: {self.sequences[mode]:,} sequences, {self.tokens[mode]:,} trained tokens"
            for mode in self.sequences
        ]
        return "\n".join(printable(line.replace("\n", "\\n")) for line in lines)

    def _write(self, **entry: Any) -> None:
        if self._entries is None:
            self._entries = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the report
        self._entries.write(_encoded(entry) + b"\n")

    def _entry_lines(self) -> Iterator[bytes]:
        """The lines of the temporary file, read in portions between which more may be written."""
        if self._entries is None:
            return
        position, end = 0, self._entries.tell()
        while position < end:
            self._entries.seek(position)
            lines = self._entries.readlines(PORTION_BYTES)
            self._entries.seek(0, os.SEEK_END)
            position += sum(map(len, lines))
            yield from lines


def _encoded(value: Any, indent: int | None = None) -> bytes:
    """JSON in UTF-8. What UTF-8 cannot hold, a lone surrogate, becomes the escape that JSON has for it."""
    return json.dumps(value, ensure_ascii=False, indent=indent).encode("utf-8", "backslashreplace")


def _until(file: BinaryIO, end: bytes, path: str | Path) -> Iterator[bytes]:
    """The lines before the line `end`."""
    for line in file:
        if line == end:
            return
        yield line
    raise ValueError(f"{path}: this is no row report, or it was cut.")


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _rounded_up(share: float) -> float:
    """The share in whole hundredths, so that it allows what was counted."""
    return min(1.0, (int(share * 100) + 1) / 100)
