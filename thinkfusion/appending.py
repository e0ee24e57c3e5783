# SPDX-License-Identifier: Apache-2.0
"""Rows that are written batch by batch, and gone on with after a kill: no row lost, none twice.

The account beside the rows says how many bytes of each file are whole. It is replaced in one move, after the rows of a
batch are on the disk: what stands behind these bytes belongs to a batch that was cut off, and is dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_BLOCK = 1 << 20


class AppendedRows:
    """Files of JSON lines, and the account that says what is in them.

    settings: what decides the rows; a file that was made with other ones is not gone on with.
    Raises ValueError for files without their account, from other settings, changed since, or written by another run.
    """

    def __init__(self, files: Sequence[str | Path], settings: Mapping[str, Any], *, label: str = "output") -> None:
        self.files = [Path(file) for file in files]
        self.place = account_path(self.files[0])
        self._settings = json.loads(json.dumps(settings))
        self.files[0].parent.mkdir(parents=True, exist_ok=True)
        self.account: dict[str, Any] = self._read_account(label)
        self._digests = [hashlib.sha256() for _ in self.files]
        self._handles = [self._open(file, index) for index, file in enumerate(self.files)]

    def _read_account(self, label: str) -> dict[str, Any]:
        if not self.place.is_file():
            for file in self.files:
                if file.exists() and file.stat().st_size:
                    raise ValueError(
                        f"{label}: {file} is there, without the {self.place.name} of a run that could be gone on with. "
                        "Give another name, or remove it."
                    )
            return {}
        try:
            account = json.loads(self.place.read_text(encoding="utf-8"))
            saved, _ = account["settings"], account["files"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{self.place}: cannot be read. Give another {label}, or remove it and its rows."
            ) from None
        different = [
            f"{name} ({_shown(saved.get(name))} there, {_shown(self._settings.get(name))} now)"
            for name in sorted({*saved, *self._settings})
            if saved.get(name) != self._settings.get(name)
        ]
        if different:
            raise ValueError(
                f"{label}: {self.files[0]} was begun with other settings: {', '.join(different)}. Give another name, "
                "or the settings that it was begun with."
            )
        return dict(account)

    def _open(self, file: Path, index: int) -> Any:
        """The file, its whole part checked and the rest cut off."""
        whole: dict[str, Any] = self.account["files"][index] if self.account else {"bytes": 0, "sha256": None}
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = file.open("r+b" if file.exists() else "w+b")
        _lock(handle, file)
        left = whole["bytes"]
        while left > 0 and (block := handle.read(min(left, _BLOCK))):
            self._digests[index].update(block)
            left -= len(block)
        if left or (whole["sha256"] not in (None, self._digests[index].hexdigest())):
            raise ValueError(
                f"{file}: it is not as the run that {self.place.name} tells of has left it, so that cannot be gone on "
                "with. Give another name, or remove both."
            )
        handle.truncate(whole["bytes"])
        handle.seek(whole["bytes"])
        return handle

    def append(self, rows: Sequence[Sequence[Mapping[str, Any]]], account: Mapping[str, Any]) -> None:
        """Write the rows of one batch, a list for each file, and then the account that counts them."""
        for handle, digest, own in zip(self._handles, self._digests, rows, strict=True):
            data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in own).encode()
            handle.write(data)
            digest.update(data)
            handle.flush()
            os.fsync(handle.fileno())
        states = [
            {"name": file.name, "bytes": handle.tell(), "sha256": digest.hexdigest()}
            for file, handle, digest in zip(self.files, self._handles, self._digests, strict=True)
        ]
        self.account = {"settings": self._settings, "files": states, **account}
        temporary = self.place.with_name(self.place.name + ".tmp")
        with temporary.open("w", encoding="utf-8") as out:
            json.dump(self.account, out, indent=1, ensure_ascii=False)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(self.place)

    def close(self) -> None:
        for handle in self._handles:
            handle.close()


def account_path(rows: str | Path) -> Path:
    """Where the account of a file of rows stands: `pairs.jsonl` has `pairs.account.json`."""
    return Path(rows).with_suffix(".account.json")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _lock(handle: Any, file: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        raise ValueError(f"{file}: another run is writing it. Wait for its end, or give another name.") from None
