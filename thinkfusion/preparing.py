# SPDX-License-Identifier: Apache-2.0
"""From sources to a data set of training sequences: over several processes, through a file, or as a stream.

One pass makes the sequences, chunk by chunk, in worker processes, and writes them to an Arrow file that is mapped into
memory and never held in it. What a mixture chooses among all sequences, it chooses by a table of a few numbers per
sequence. The result is the same for any number of processes, and as a stream.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any

from thinkfusion.following import follow_parent
from thinkfusion.formats import RecordOptions
from thinkfusion.mixture import MixtureOptions, SequenceTable, TokenAccount, select
from thinkfusion.records import RowOutcome, account, check_report, open_rows
from thinkfusion.row_report import RowReport
from thinkfusion.sequences import MODES, Chunk, Plan, Prepared, SequenceMaker, labels_of
from thinkfusion.shortening import ReasoningOptions
from thinkfusion.sources import Source, as_sources
from thinkfusion.storing import CHOSEN, SequenceFile, cache_key, features, keep_cached, load_cached, load_sequences

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset, IterableDataset
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

CHUNK_ROWS = 512
CHUNK_BYTES = 2_000_000
CHECKED_ROWS = 8
WAITING_CHUNKS = 3

Data = str | Path | Source | Sequence[Any] | Iterable[Mapping[str, Any]]


def prepare(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    *,
    records: RecordOptions | None = None,
    mixture: str | MixtureOptions = "paired",
    reasoning: ReasoningOptions | None = None,
    max_length: int | None = None,
    on_long_row: str = "error",
    on_bad_row: str | None = None,
    both_modes: bool = True,
    processes: int = 1,
    streaming: bool = False,
    cache_dir: str | Path | None = None,
    report: RowReport | None = None,
) -> tuple[Dataset | IterableDataset, RowReport]:
    """Read, mix, render and tokenise: `input_ids`, `labels`, `mode` and `conversation`, one row a sequence.

    data: a file, wildcard or Hub id, a `Source` with a weight, a list of these, rows, or conversations.
    records, mixture, reasoning: how rows are read, how modes are combined, what is done to reasoning.
    max_length, on_long_row: the longest sequence allowed, in tokens, and what happens to longer ones; see `Plan`.
    on_bad_row: short for that of `records`.
    both_modes: whether a mode without a sequence is an error.
    processes: how many worker processes make the sequences; 1 works in this one. The result is the same.
    streaming: an `IterableDataset` of the same sequences in the same order, made while it is read. A mixture that
        chooses among all sequences reads its sources twice then.
    cache_dir: keep the sequences there, and take them from there when the same sources, options and tokenizer come
        again; without it they live in a temporary folder that goes with the data set. Not for rows in memory.
    report: that of reading the conversations, to be completed.

    The report accounts for every row, and `report.account` for the tokens by source, mode and language. Some rows of
    each source are compared with the chat template, id for id.

    Raises DataError for a bad row (unless such rows are skipped), ValueError for contradictory options, if nothing is
    left, if one mode is missing, or if more rows were skipped than allowed, ChildProcessError if a process was killed.
    """
    records = records or RecordOptions()
    if on_bad_row is not None:
        records = replace(records, on_bad_row=on_bad_row)
    mixture = MixtureOptions(mixture) if isinstance(mixture, str) else mixture
    plan = Plan(records, mixture, reasoning or ReasoningOptions(), max_length, on_long_row, both_modes)
    if processes < 1:
        raise ValueError(f"processes: found {processes}, expected at least 1.")
    maker = _Preparation(as_sources(data), tokenizer, plan, processes, report)
    if streaming:
        return maker.stream(), maker.report
    return maker.to_file(None if cache_dir is None else Path(cache_dir)), maker.report


def survey(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    *,
    processes: int = 1,
    watch: Callable[[Prepared, NDArray[np.bool_] | None], None],
) -> tuple[RowReport, NDArray[np.int64], list[str]]:
    """What `prepare` would make of the sources: the report, the numbers of the chosen sequences, and what stops it.

    No sequence is kept. `watch` is called with each chunk and with which of its sequences are kept, None for all.
    What `prepare` raises of the rows as a whole is returned as text. Raises what `prepare` raises of one row.
    """
    preparation = _Preparation(as_sources(data), tokenizer, plan, processes, None)
    gathered = _Gathered(plan, preparation.report, False, preparation.name)
    for prepared in preparation.prepared(preparation.report):
        watch(prepared, gathered.add(prepared))
    problems: list[str] = []
    return preparation.report, gathered.choose(problems), problems


class _Preparation:
    """One call of `prepare`."""

    def __init__(
        self,
        sources: list[Source],
        tokenizer: PreTrainedTokenizerBase,
        plan: Plan,
        processes: int,
        report: RowReport | None,
    ) -> None:
        self.sources, self.tokenizer, self.plan, self.processes = sources, tokenizer, plan, processes
        # Conversations that were read before stand in the report of their reading already.
        self.already_read = report is not None
        self.name = ", ".join(source.name for source in sources)
        self.report = report if report is not None else RowReport()
        # A tokenizer without our template is refused before anything is read.
        self.make = SequenceMaker(tokenizer, plan)

    def to_file(self, cache_dir: Path | None) -> Dataset:
        """Every sequence into an Arrow file; the data set is what the mixture chooses of it."""
        import numpy as np

        key = cache_key(self.sources, self.tokenizer, self.plan) if cache_dir is not None else None
        if cache_dir is not None and key is not None:
            found = load_cached(cache_dir / key, self.report)
            if found is not None:
                logger.info("The prepared rows are taken from %s.", cache_dir / key)
                return found
            cache_dir.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="thinkfusion-", dir=cache_dir if key is not None else None))
        try:
            gathered = _Gathered(self.plan, self.report, self.already_read, self.name)
            with SequenceFile(folder) as file:
                for prepared in self.prepared(self.report):
                    file.write(prepared, gathered.add(prepared))
            np.save(folder / CHOSEN, gathered.choose())
            if cache_dir is not None and key is not None:
                keep_cached(folder, cache_dir / key, self.report)
                folder = cache_dir / key
            dataset = load_sequences(folder)
        except BaseException:
            rmtree(folder, ignore_errors=True)
            raise
        if key is None:
            # The file is mapped into memory, and goes with the process: a data set made of this one may outlive it.
            atexit.register(rmtree, folder, ignore_errors=True)
        return dataset

    def stream(self) -> IterableDataset:
        """The same sequences, made while they are read."""
        from datasets import IterableDataset

        if any(isinstance(source.location, Iterator) for source in self.sources):
            raise ValueError(
                "streaming: found rows that can be read but once (a generator), and a stream is read once an epoch. "
                "Give a file, or an object whose rows can be read again."
            )
        return IterableDataset.from_generator(self._rows, features=features())

    def _rows(self) -> Iterator[dict[str, Any]]:
        # Only the first time through is reported: an epoch later nothing is new.
        report = RowReport() if self.report.read else self.report
        gathered = _Gathered(self.plan, report, self.already_read, self.name)
        if not self.plan.chooses:
            before = 0
            for prepared in self.prepared(report):
                yield from _rows_of(prepared, gathered.add(prepared), before)
                before += prepared.conversations
            gathered.choose()
            return
        for prepared in self.prepared(report):
            gathered.add(prepared)
        chosen = gathered.choose()
        order = (0, 1) if self.plan.mixture.mixture == "sequential" else (None,)
        for mode in order:
            yield from self._chosen_rows(chosen, mode)

    def _chosen_rows(self, chosen: NDArray[np.int64], mode: int | None) -> Iterator[dict[str, Any]]:
        """The sequences numbered `chosen`, of one mode or of both, in the order of the sources."""
        import numpy as np

        report = RowReport(read=self.report.read, kept=self.report.kept)
        again = _Gathered(self.plan, report, self.already_read, self.name)
        wanted = np.zeros(int(chosen.max()) + 1, dtype=bool)
        wanted[chosen] = True
        number = before = 0
        for prepared in self.prepared(report):
            kept = again.add(prepared)
            modes = np.frombuffer(prepared.mode, dtype=np.int8)
            present = np.ones(len(modes), dtype=bool) if kept is None else kept
            numbers = number + np.cumsum(present) - 1
            number += int(present.sum())
            inside = present & (numbers < len(wanted))
            inside[inside] = wanted[numbers[inside]]
            yield from _rows_of(prepared, inside if mode is None else inside & (modes == mode), before)
            before += prepared.conversations

    def prepared(self, report: RowReport) -> Iterator[Prepared]:
        """The sequences of every chunk, in order, whichever process made them."""
        chunks = _chunks(self.sources, self.plan.records, report)
        # The worker of a DataLoader that reads a stream may start none of its own.
        if self.processes == 1 or multiprocessing.current_process().daemon:
            yield from map(self.make, chunks)
            return
        # Forked processes share the tokenizer as it is; elsewhere each builds its own.
        method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
        with (
            _single_threaded_tokenizers(),
            ProcessPoolExecutor(
                self.processes, multiprocessing.get_context(method), _start, (self.tokenizer, self.plan)
            ) as pool,
        ):
            waiting: deque[Future[Prepared]] = deque()
            try:
                for chunk in chunks:
                    waiting.append(pool.submit(_make, chunk))
                    if len(waiting) > WAITING_CHUNKS * self.processes:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            except BrokenProcessPool:
                raise ChildProcessError(
                    f"processes: one of the {self.processes} that prepare rows was killed, most likely for want of "
                    "memory. Fewer processes take less."
                ) from None
            finally:
                for future in waiting:
                    future.cancel()


_maker: SequenceMaker | None = None


def _start(tokenizer: PreTrainedTokenizerBase, plan: Plan) -> None:
    follow_parent()
    global _maker  # noqa: PLW0603 - one per worker process, made before its first chunk
    _maker = SequenceMaker(tokenizer, plan)


def _make(chunk: Chunk) -> Prepared:
    assert _maker is not None
    return _maker(chunk)


@contextmanager
def _single_threaded_tokenizers() -> Iterator[None]:
    """Processes in place of threads: a tokenizer that used threads before a fork may wait for them forever."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _chunks(sources: Sequence[Source], records: RecordOptions, report: RowReport) -> Iterator[Chunk]:
    """The rows of all sources in chunks; each source's format is that of its first row that can be read."""
    for source in sources:
        options, numbered = open_rows(source, records, report)
        rows: list[tuple[int, Any]] = []
        size, checked = 0, CHECKED_ROWS
        for line, raw in numbered:
            rows.append((line, raw))
            size += len(raw) if isinstance(raw, bytes) else 0
            if len(rows) == CHUNK_ROWS or size > CHUNK_BYTES:
                yield Chunk(source.name, source.weight, options, rows, checked)
                rows, size, checked = [], 0, 1
        if rows:
            yield Chunk(source.name, source.weight, options, rows, checked)


class _Gathered:
    """What is known of all rows and sequences so far: the report, and a few numbers per sequence."""

    def __init__(self, plan: Plan, report: RowReport, already_read: bool, name: str) -> None:
        self.plan, self.report, self.already_read, self.name = plan, report, already_read, name
        self.tokens = TokenAccount()
        self._cells: dict[tuple[str, str], int] = {}
        self._columns: list[tuple[Any, ...]] = []
        self._copies = 0

    def add(self, prepared: Prepared) -> NDArray[np.bool_] | None:
        """Count a chunk. Returns which of its sequences are kept, None for all; raises the first error met."""
        import numpy as np

        dropped = {index for index, outcome in enumerate(prepared.outcomes) if not self._counted(outcome)}
        position = np.frombuffer(prepared.position, dtype=np.int32)
        keep = ~np.isin(position, list(dropped)) if dropped else np.ones(len(position), dtype=bool)
        cells = [self._cells.setdefault(cell, len(self._cells)) for cell in prepared.cells]
        for index, (cell, tokens) in enumerate(zip(prepared.cells, prepared.before, strict=True)):
            if index not in dropped:
                for mode, count in zip(MODES, tokens, strict=True):
                    if count:
                        self.tokens.add(cell[0], mode, cell[1], count)
        copy = np.frombuffer(prepared.copy, dtype=np.int32)[keep]
        self._columns.append(
            (
                copy.astype(np.int64) + self._copies,
                np.frombuffer(prepared.mode, dtype=np.int8)[keep],
                np.array(cells, dtype=np.int32)[position[keep]],
                np.frombuffer(prepared.trained, dtype=np.int32)[keep],
                np.frombuffer(prepared.draws, dtype=np.float64)[position[keep]],
                np.frombuffer(prepared.length, dtype=np.int32)[keep],
            )
        )
        self._copies += int(copy.max()) + 1 if len(copy) else 0
        return keep if dropped else None

    def _counted(self, outcome: RowOutcome) -> bool:
        """Put a row into the report; whether it is kept."""
        error = outcome.error
        drops = error is not None and (
            error.reason == "trace_too_short" or (error.reason == "too_long" and self.plan.on_long_row != "error")
        )
        if not self.already_read:
            return account(self.report, outcome, self.plan.records, drops=drops)
        for note in outcome.notes:
            self.report.count(note, outcome)
        if error is None:
            return True
        if self.plan.records.on_bad_row == "error" and not drops:
            raise error
        self.report.skip(error, outcome.excerpt, asked_for=drops)
        self.report.kept -= 1
        return False

    def choose(self, problems: list[str] | None = None) -> NDArray[np.int64]:
        """The sequences that are trained on, in order, when all rows are counted; completes the report.

        Raises ValueError if nothing is left, if a mode is missing, or if more rows were skipped than allowed; with
        `problems` this is added to it, and the report completed as far as it can be.
        """
        import numpy as np

        self.report.account = self.tokens
        with _collected(problems):
            check_report(self.report, self.plan.records, self.name)
        columns = [np.concatenate(column) for column in zip(*self._columns, strict=True)] if self._columns else []
        if not columns or not len(columns[0]):
            if not problems:
                with _collected(problems):
                    raise ValueError(f"nothing to train on.\n{self.report}")
            return np.arange(0)
        row, mode, cell, trained, draws, length = columns
        names = list(self._cells)
        sources = {source: number for number, source in enumerate(dict.fromkeys(source for source, _ in names))}
        source = np.array([sources[name] for name, _ in names], dtype=np.int32)[cell]
        table = SequenceTable(row, mode, source, trained.astype(np.int64), draws)
        chosen = np.arange(len(row))
        with _collected(problems):
            both = self.plan.both_modes and self.plan.reasoning.close_at is None
            chosen = select(table, self.plan.mixture, both_modes=both)
        key = cell[chosen].astype(np.int64) * len(MODES) + mode[chosen]
        for number in np.unique(key):
            inside = key == number
            (name, language), which = names[number // len(MODES)], MODES[number % len(MODES)]
            tokens, sequences = int(trained[chosen][inside].sum()), int(inside.sum())
            self.tokens.add(name, which, language, tokens, stage="after", rows=sequences)
            self.report.sequences[which.value] += sequences
            self.report.tokens[which.value] += tokens
        self.report.all_tokens += int(length[chosen].astype(np.int64).sum())
        return chosen


@contextmanager
def _collected(problems: list[str] | None) -> Iterator[None]:
    """Let a ValueError pass, or add its first line to `problems`: the report that follows it is shown anyway."""
    try:
        yield
    except ValueError as error:
        if problems is None:
            raise
        problems.append(str(error).partition("\n")[0])


def _rows_of(prepared: Prepared, keep: NDArray[np.bool_] | None, before: int) -> Iterator[dict[str, Any]]:
    """The sequences of a chunk as rows of a stream; `before` it were so many conversations."""
    import numpy as np

    ends = np.cumsum(np.frombuffer(prepared.length, dtype=np.int32), dtype=np.int64)
    ids, labels = np.frombuffer(prepared.ids, dtype=np.int32), labels_of(prepared)
    for index in range(len(ends)) if keep is None else np.flatnonzero(keep):
        span = slice(ends[index - 1] if index else 0, ends[index])
        yield {
            "input_ids": ids[span].tolist(),
            "labels": labels[span].tolist(),
            "mode": prepared.mode[index],
            "conversation": before + prepared.copy[index],
        }
