# SPDX-License-Identifier: Apache-2.0
"""Prepared sequences on disk: an Arrow file mapped into memory, which of it is chosen, and a cache of such folders.

A folder holds `sequences.arrow`, `chosen.npy` (indices in the order of training) and, when it is kept, `report.json`
and the hashes of the prompts.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from shutil import rmtree
from types import TracebackType
from typing import TYPE_CHECKING, Any

from thinkfusion.mixture import TokenAccount
from thinkfusion.row_report import RowReport
from thinkfusion.sequences import Plan, Prepared, labels_of
from thinkfusion.sources import Source

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset, Features
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

LAYOUT = 2
"""Counts up when a folder's content changes its meaning, so that no older one is taken for a new one."""
SEQUENCES, CHOSEN, REPORT, PROMPT_KEYS = "sequences.arrow", "chosen.npy", "report.json", "prompt_keys.bin"


def features() -> Features:
    """The columns of a prepared data set.

    `mode` is an index into `sequences.MODES`; `conversation` is the same number for the sequences of one conversation.
    """
    from datasets import Features, List, Value

    lists = {"input_ids": List(Value("int32")), "labels": List(Value("int32"))}
    return Features({**lists, "mode": Value("int8"), "conversation": Value("int32")})


class SequenceFile:
    """Writes sequences as they come; nothing of them stays in memory."""

    def __init__(self, folder: Path) -> None:
        from datasets.arrow_writer import ArrowWriter

        self._features = features()
        self._writer = ArrowWriter(path=str(folder / SEQUENCES), features=self._features)
        self._rows = 0
        self._conversations = 0

    def __enter__(self) -> SequenceFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and not self._rows:
            self._writer.write_table(self._features.arrow_schema.empty_table())
        if kind is None:
            self._writer.finalize()
        self._writer.close()

    def write(self, prepared: Prepared, keep: NDArray[np.bool_] | None) -> None:
        """Append the sequences of a chunk, all or those that `keep` marks."""
        import pyarrow

        table = pyarrow.table(sequence_columns(prepared, self._conversations), schema=self._features.arrow_schema)
        self._conversations += prepared.conversations
        if keep is not None:
            table = table.filter(pyarrow.array(keep))
        if len(table):
            self._rows += len(table)
            self._writer.write_table(table)


def sequence_columns(prepared: Prepared, before: int) -> dict[str, Any]:
    """The sequences of a chunk as Arrow columns over the chunk's own bytes; `before` it were so many conversations."""
    import numpy as np
    import pyarrow

    ends = np.cumsum(np.frombuffer(prepared.length, dtype=np.int32), dtype=np.int32)
    offsets = pyarrow.array(np.concatenate([np.zeros(1, dtype=np.int32), ends]))

    def lists(data: Any) -> Any:
        values = pyarrow.Array.from_buffers(pyarrow.int32(), len(prepared.ids) // 4, [None, pyarrow.py_buffer(data)])
        return pyarrow.ListArray.from_arrays(offsets, values)

    mode = pyarrow.array(np.frombuffer(prepared.mode, dtype=np.int8))
    conversation = pyarrow.array(np.frombuffer(prepared.copy, dtype=np.int32) + np.int32(before))
    labels = lists(labels_of(prepared))
    return {"input_ids": lists(prepared.ids), "labels": labels, "mode": mode, "conversation": conversation}


def load_sequences(folder: Path) -> Dataset:
    """The data set of a folder, mapped into memory."""
    import numpy as np
    from datasets import Dataset

    dataset = Dataset.from_file(str(folder / SEQUENCES))
    chosen = np.load(folder / CHOSEN)
    if len(chosen) == len(dataset) and np.array_equal(chosen, np.arange(len(dataset))):
        return dataset
    return dataset.select(chosen)


def prepared_cache() -> Path:
    """Where prepared rows are kept: a folder of its own in the cache of the library datasets (HF_DATASETS_CACHE)."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "thinkfusion"


def cache_key(sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, plan: Plan) -> str | None:
    """What the sequences depend on, as a short name; None if a source may change without being seen to."""
    from thinkfusion import __version__

    places: list[Any] = []
    for source in sources:
        if not isinstance(source.location, (str, Path)) or not os.path.isfile(source.location):
            return None
        found = os.stat(source.location)
        path = os.path.abspath(source.location)
        places.append([path, source.name, found.st_size, found.st_mtime_ns, source.weight])
    made_from = [LAYOUT, __version__, places, repr(plan), tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:24]


def load_cached(folder: Path, report: RowReport) -> Dataset | None:
    """The data set that was kept in `folder`, with its report filled in; None if there is none."""
    if not (folder / REPORT).is_file():
        return None
    totals = report.load(folder / REPORT)
    report.prompt_keys = array("Q", (folder / PROMPT_KEYS).read_bytes())
    report.account = TokenAccount.from_dict(totals["account"])
    return load_sequences(folder)


def keep_cached(folder: Path, place: Path, report: RowReport) -> None:
    """Make `folder` the one that is kept at `place`, in one step; if another process was quicker, its own stays."""
    (folder / PROMPT_KEYS).write_bytes(report.prompt_keys.tobytes())
    report.save(folder / REPORT)
    try:
        folder.rename(place)
    except OSError:
        if not (place / REPORT).is_file():
            raise
        rmtree(folder)
