# SPDX-License-Identifier: Apache-2.0
"""Rows over several processes: each has as many batches, and no sequence is seen twice or left out.

What is seen is told by the first token of each tree; that of the padding is 0.
"""

import json
from pathlib import Path

import pytest
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tests.test_packing import numbered
from tests.two_processes import run_in_both
from thinkfusion import PackedRows, RowCollator
from thinkfusion.packing import Layout, RowSampler, StreamedRows, set_epoch


def seen(loader) -> list[list[int]]:
    """The first token of each tree of each batch."""
    return [[batch["input_ids"][0, at].item() for _, fork, at, _ in batch["nodes"] if not fork] for batch in loader]


def loader_of(rows, batch_size, workers=0) -> DataLoader:
    sampler = RowSampler(rows, 5) if isinstance(rows, PackedRows) else None
    return DataLoader(rows, batch_size, sampler=sampler, collate_fn=RowCollator(0), num_workers=workers)


def shares(rows, processes, batch_size, workers=0) -> list[list[list[int]]]:
    """What accelerate gives each of the processes, one after another in this one."""
    return [
        seen(
            prepare_data_loader(
                loader_of(rows, batch_size, workers),
                num_processes=processes,
                process_index=rank,
                put_on_device=False,
                dispatch_batches=False,
            )
        )
        for rank in range(processes)
    ]


def check_shares(shares, count) -> None:
    """As many batches for every process, and every sequence once among them all."""
    assert len(set(map(len, shares))) == 1
    found = sorted(token for share in shares for batch in share for token in batch if token)
    assert found == list(range(1, count + 1))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 30), st.integers(2, 4), st.integers(1, 3), st.sampled_from([None, 11]), st.booleans())
def test_processes_have_as_many_batches_and_see_every_sequence_once(count, processes, batch_size, budget, streaming):
    data = numbered(count, (3, 5, 2, 9))
    layout = Layout(tokens_per_row=budget, rows_at_once=processes * batch_size)
    rows = StreamedRows(data.to_iterable_dataset(), layout) if streaming else PackedRows(data, layout)
    check_shares(shares(rows, processes, batch_size), count)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_later_epoch_that_is_resumed_has_its_own_order(rank):
    def loader():
        made = loader_of(PackedRows(numbered(24), Layout(rows_at_once=4)), 2)
        return prepare_data_loader(
            made, num_processes=2, process_index=rank, put_on_device=False, dispatch_batches=False
        )

    epochs = []
    for epoch in (0, 3):
        whole = loader()
        whole.set_epoch(epoch)
        epochs.append(seen(whole))
    assert epochs[0] != epochs[1]
    resumed = skip_first_batches(loader(), 2)
    resumed.set_epoch(3)
    # What accelerate does not do; when this fails, `set_epoch` is no longer needed.
    assert seen(resumed) == epochs[0][2:]
    set_epoch(resumed, 3)
    assert seen(resumed) == epochs[1][2:]


@pytest.mark.parametrize("pieces", [None, 1, 3])
def test_workers_of_a_loader_double_nothing(pieces):
    """A stream of one shard is read by one worker, one of several by as many."""
    data, layout = numbered(61, (3, 5, 2, 9)), Layout(tokens_per_row=20, rows_at_once=4)
    rows = (
        PackedRows(data, layout)
        if pieces is None
        else StreamedRows(data.to_iterable_dataset(num_shards=pieces), layout)
    )
    check_shares(shares(rows, 2, 2, workers=2), 61)
    check_shares([seen(loader_of(rows, 4, workers=2))], 61)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_that_are_not_made_even_are_seen_twice(streaming):
    """Why there are empty rows: accelerate begins again where the last step is not full."""
    rows = StreamedRows(numbered(5).to_iterable_dataset(), Layout()) if streaming else PackedRows(numbered(5), Layout())
    found = [token for share in shares(rows, 2, 2) for batch in share for token in batch]
    assert len(found) == 8
    assert set(found) == set(range(1, 6))


VISITS = {
    f"{'stream of ' if streaming else ''}{count} in rows of {budget}": (count, budget, streaming)
    for streaming in (False, True)
    for count, budget in ((1, None), (5, None), (8, None), (61, 20))
}


def visit(rank: int, folder: str) -> None:
    """One of two processes: goes through the loaders that accelerate makes of ours, twice, and writes what it saw."""
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=False))
    assert (accelerator.num_processes, accelerator.process_index) == (2, rank)
    found = {name: [] for name in VISITS}
    for name, (count, budget, streaming) in VISITS.items():
        data, layout = numbered(count, (3, 5, 2, 9)), Layout(tokens_per_row=budget, rows_at_once=4)
        rows = StreamedRows(data.to_iterable_dataset(), layout) if streaming else PackedRows(data, layout)
        loader = accelerator.prepare(loader_of(rows, 2))
        for epoch in range(2):
            loader.set_epoch(epoch)
            found[name].append(seen(loader))
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    accelerator.end_training()


@pytest.fixture(scope="module")
def visits(tmp_path_factory):
    """What each process saw: by process, name, epoch and batch."""
    folder = tmp_path_factory.mktemp("visits")
    run_in_both(visit, str(folder))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", VISITS)
def test_two_processes_see_every_sequence_once_an_epoch(name, visits):
    count, _, streaming = VISITS[name]
    first, second = (list(shares) for shares in zip(*(visit[name] for visit in visits), strict=True))
    check_shares(first, count)
    check_shares(second, count)
    assert len(first[0]) == len(second[0])
    if count > 4:
        assert (first == second) == streaming
