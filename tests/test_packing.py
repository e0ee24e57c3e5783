# SPDX-License-Identifier: Apache-2.0
"""Packing: full rows within a budget, nothing lost or doubled on the way, whatever the data and the processes."""

import json
import random
from collections import Counter
from itertools import chain, pairwise
from unittest import mock

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, LargeList, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from thinkfusion import MixtureOptions, PackedRows, PaddingCollator, RowCollator, Source, expand, packing, prepare
from thinkfusion.packing import Layout, RowSampler, StreamedRows, pack
from thinkfusion.sequences import MODES
from thinkfusion.trees import fuse

WORDS = ("the", "sum", "of", "two", "and", "three", "is", "five", "so", "it", "must", "be", "odd", "그래서", "합은")


def conversation(number: int) -> dict:
    """A raw row of one to four turns, one of which may be without reasoning."""
    draw = random.Random(number)
    messages = []
    for turn in range(1 + number % 4):
        text = " ".join(draw.choices(WORDS, k=draw.randint(3, 12)))
        messages.append({"role": "user", "content": f"{number}.{turn}: {text}"})
        reply = {"role": "assistant", "content": " ".join(draw.choices(WORDS, k=5))}
        if number % 5 != 2 or turn:
            reply["reasoning_content"] = " ".join(draw.choices(WORDS, k=draw.randint(4, 30)))
        messages.append(reply)
    return {"messages": messages}


def data_of(tokenizer, count=24, **options):
    return prepare([conversation(number) for number in range(count)], tokenizer, **options)[0]


def contents(sequences) -> Counter:
    """How often each sequence of a data set is there."""
    return Counter((tuple(each["input_ids"]), tuple(each["labels"]), MODES[each["mode"]]) for each in sequences)


def expanded(rows) -> Counter:
    """How often each sequence is in the trees of the rows."""
    found = [each for tree in chain.from_iterable(rows) for each in expand(tree)]
    return Counter((tuple(each.ids), tuple(each.labels), each.mode) for each in found)


def listed(rows) -> list:
    """Rows as lists that can be compared."""
    return [[(t.ids.tolist(), t.labels.tolist(), t.lengths, t.forks, t.modes) for t in row] for row in rows]


def numbered(count: int, lengths=(3,)) -> Dataset:
    """Sequences of one token each, repeated: that of sequence n is n + 1."""
    ids = [[number + 1] * lengths[number % len(lengths)] for number in range(count)]
    labels = [[-100, *row[1:]] for row in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "mode": [0] * count})


PAIR = Dataset.from_dict(
    {
        "input_ids": [[1, 2, 3, 8, 7, 7, 9, 4, 5], [1, 2, 3, 9, 4, 5], [1, 6]],
        "labels": [[-100] * 4 + [7, 7, 9, 4, 5], [-100] * 4 + [4, 5], [-100, 6]],
        "mode": [0, 1, 0],
        "conversation": [4, 4, 5],
    }
)
"""A conversation in both modes, and a sequence alone."""


# What fills a row.

lengths_and_budgets = st.integers(1, 300).flatmap(
    lambda budget: st.tuples(st.lists(st.integers(1, budget), max_size=80), st.just(budget))
)


@settings(max_examples=150, deadline=None)
@given(lengths_and_budgets, st.booleans(), st.integers(1, 20), st.integers(0, 3), st.integers(1, 9))
def test_every_index_is_in_one_row_and_no_row_above_the_budget(drawn, ordered, window, open_rows, candidates):
    lengths, budget = drawn
    with mock.patch.multiple(packing, WINDOW_TREES=window, OPEN_ROWS=open_rows, CANDIDATES=candidates):
        rows = list(pack(lengths, budget, ordered=ordered))
        assert rows == list(pack(iter(lengths), budget, ordered=ordered))
    assert sorted(chain.from_iterable(rows)) == list(range(len(lengths)))
    assert all(rows)
    assert all(row == sorted(row) for row in rows)
    assert all(sum(lengths[index] for index in row) <= budget for row in rows)
    if ordered:
        assert list(chain.from_iterable(rows)) == list(range(len(lengths)))
        for row, following in pairwise(rows):
            assert sum(lengths[index] for index in [*row, following[0]]) > budget


@settings(max_examples=100, deadline=None)
@given(lengths_and_budgets, st.integers(1, 20), st.integers(0, 3))
def test_no_more_waits_than_a_window_or_the_open_rows(drawn, window, open_rows):
    lengths, budget = drawn
    waiting = set()

    def watched():
        for index, length in enumerate(lengths):
            tokens = sum(lengths[waiter] for waiter in waiting)
            assert len(waiting) < window or tokens <= open_rows * budget
            waiting.add(index)
            yield length

    with mock.patch.multiple(packing, WINDOW_TREES=window, OPEN_ROWS=open_rows):
        for row in pack(watched(), budget):
            waiting -= set(row)
    assert not waiting


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(1, 150))
def test_a_row_ends_with_those_that_leave_least_room(lengths, room):
    chosen = packing._fullest(lengths, room)
    sums = {0}
    for length in lengths:
        sums |= {each + length for each in sums}
    assert sorted(set(chosen)) == chosen
    assert sum(lengths[index] for index in chosen) == max(each for each in sums if each <= room)


def test_rows_are_filled_to_the_last_token_and_come_in_order():
    assert list(pack([5, 4, 5, 6, 10], 10)) == [[0, 2], [1, 3], [4]]
    assert list(pack([1, 2, 9, 8, 3, 7, 10], 10)) == [[0, 2], [1, 3], [4, 5], [6]]
    lengths = np.random.default_rng(0).integers(1, 100, 2000).tolist()
    assert sorted(rows := list(pack(lengths, 500))) == rows


def test_no_row_is_chosen_from_more_than_the_candidates():
    """Trying all of a window would take a hundred times as long."""
    with mock.patch.object(packing, "_fullest", wraps=packing._fullest) as choose:
        list(pack(np.random.default_rng(0).integers(1, 300, 2000).tolist(), 1000))
    tried = [len(call.args[0]) for call in choose.call_args_list]
    assert max(tried) == packing.CANDIDATES
    assert len(tried) < 1000


def test_no_two_rows_could_have_been_one():
    draw = np.random.default_rng(3)
    lengths = draw.integers(20, 1001, 500).tolist()
    sums = sorted(sum(lengths[index] for index in row) for row in pack(lengths, 1000))
    assert sums[0] + sums[1] > 1000


@pytest.mark.parametrize("count", [1000, 7473])
@pytest.mark.parametrize(
    "lengths",
    [
        lambda draw, count: draw.integers(150, 601, count),
        lambda draw, count: np.clip(draw.lognormal(np.log(320), 0.35, count), 150, 600),
        lambda draw, count: draw.integers(900, 2501, count),
        lambda draw, count: np.clip(draw.normal(1700, 300, count), 900, 2500),
        lambda draw, count: np.clip(draw.lognormal(6, 1, count), 20, 8192),
    ],
    ids=["single turns", "single turns, skewed", "6 turns", "6 turns, bell-shaped", "of all lengths"],
)
def test_rows_of_8192_are_full(lengths, count):
    lengths = [int(length) for length in lengths(np.random.default_rng(0), count)]
    rows = len(list(pack(lengths, 8192)))
    fewest = -(-sum(lengths) // 8192)
    assert rows <= 1.003 * fewest + 1
    assert 1 - sum(lengths) / (rows * 8192) <= 0.03


def test_without_a_budget_each_index_has_a_row_at_once():
    taken = iter([5, 10**6, 1])
    rows = pack(taken, None)
    assert next(rows) == [0]
    assert list(taken) == [10**6, 1]
    assert list(pack([5, 10**6, 1], None)) == [[0], [1], [2]]
    assert list(pack([5, 10**6, 1], 10**12)) == [[0, 1, 2]]
    assert list(pack([], None)) == list(pack([], 5)) == list(pack([], 5, ordered=True)) == []


@pytest.mark.parametrize("ordered", [False, True])
def test_a_length_above_the_budget_is_refused(ordered):
    with pytest.raises(ValueError, match=r"found a length of 1,001 tokens, and a row has 1,000 \(tokens_per_row\)"):
        list(pack([4, 1000, 1001], 1000, ordered=ordered))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "padded"}, "kind: 'padded' is unknown; choose one of tree, packed"),
        ({"tokens_per_row": 0}, "tokens_per_row: found 0, expected at least 1"),
        ({"rows_at_once": 0}, "rows_at_once: found 0, expected at least 1"),
    ],
)
def test_a_layout_that_makes_no_sense_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Layout(**given)


# From a prepared data set to rows.

CHOICES = {
    "paired": {},
    "pair fraction": {"mixture": MixtureOptions(pair_fraction=0.4)},
    "combined": {"mixture": "combined"},
    "ratio of tokens": {"mixture": MixtureOptions("ratio", ratio="1:2")},
    "ratio of samples": {"mixture": MixtureOptions("ratio", ratio=0.3, ratio_unit="samples")},
    "rows capped": {"mixture": MixtureOptions(max_rows_per_source=9)},
    "tokens capped": {"mixture": MixtureOptions(max_tokens_per_source=700)},
    "sequential": {"mixture": "sequential"},
}


@pytest.fixture
def sources(write):
    """Two files, of which the first is read two and a half times."""
    files = [[conversation(number) for number in part] for part in (range(16), range(16, 24))]
    text = ["".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) for rows in files]
    return [Source(str(write(text[0], "a.jsonl")), 2.5), str(write(text[1], "b.jsonl"))]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_sequence_is_in_one_tree_of_one_row_and_a_stream_gives_the_same_rows(choice, sources, tokenizer):
    options = {"mixture": "paired"} | CHOICES[choice]
    data = prepare(sources, tokenizer, **options)[0]
    stream = prepare(sources, tokenizer, **options, streaming=True)[0]
    expected = contents(data)
    assert max(expected.values()) > 1
    longest = max(map(len, data["input_ids"]))
    for kind in ("tree", "packed"):
        for budget in (None, longest, 700):
            layout = Layout(kind, budget, ordered=choice == "sequential")
            with mock.patch.multiple(packing, WINDOW_TREES=7, OPEN_ROWS=1, READ_SEQUENCES=5):
                rows = PackedRows(data, layout)
                streamed = StreamedRows(stream, layout)
                assert expanded(rows) == expected
                assert listed(streamed) == listed(rows)
            assert streamed.report == rows.report
            tokens = [sum(map(len, row)) for row in rows]
            assert budget is None or max(tokens) <= budget
            report = rows.report
            assert (report.sequences, report.rows) == (len(data), len(rows))
            assert (report.trees, report.tokens) == (sum(map(len, rows)), sum(tokens))
            assert report.sequence_tokens == sum(map(len, data["input_ids"]))
            changes = sum(before != after for before, after in pairwise(data["conversation"]))
            assert report.conversations == (len(data) if kind == "packed" else 1 + changes)
            assert report.padding == pytest.approx(0 if budget is None else 1 - sum(tokens) / (budget * len(rows)))


def test_an_ordered_mixture_stays_ordered(tokenizer):
    data = data_of(tokenizer, mixture="sequential")
    for kind in ("tree", "packed"):
        rows = PackedRows(data, Layout(kind, 700, ordered=True))
        modes = [expand(tree)[0].mode for row in rows for tree in row]
        assert modes == sorted(modes, key=MODES.index)
        assert set(modes) == set(MODES)
    order = [each for row in rows for tree in row for each in expand(tree)]
    assert [each.ids for each in order] == data["input_ids"]


def test_a_conversation_that_comes_twice_has_two_trees(tokenizer, write):
    path = write(json.dumps(conversation(3)))
    rows = PackedRows(prepare([Source(str(path), 2)], tokenizer)[0], Layout())
    assert rows.report.conversations == len(rows) == 2
    first, second = listed(rows)
    assert first == second
    assert len(expand(rows[0][0])) == 5


def test_a_tree_is_that_of_the_conversations_sequences(tokenizer):
    data = data_of(tokenizer, 5)
    rows = PackedRows(data, Layout())
    assert rows.report.conversations == len(rows) == 5
    for number, row in enumerate(rows):
        own = [each for each in data if each["conversation"] == number]
        made = [
            packing._sequence(np.array(each["input_ids"], np.int32), np.array(each["labels"], np.int32), each["mode"])
            for each in own
        ]
        assert listed([row]) == listed([[fuse(made)]])
    assert rows.report.tokens < rows.report.sequence_tokens
    other = PackedRows(data, Layout(non_thinking_trunk=False))
    assert [row[0].lengths for row in other] != [row[0].lengths for row in rows]
    assert expanded(other) == expanded(rows) == contents(data)


def test_a_conversation_longer_than_a_row_is_split(tokenizer):
    data = data_of(tokenizer)
    longest = max(map(len, data["input_ids"]))
    whole, split = PackedRows(data, Layout()), PackedRows(data, Layout(tokens_per_row=longest))
    assert split.report.split == sum(len(row[0]) > longest for row in whole) > 3
    assert split.report.trees > split.report.conversations == whole.report.trees
    assert whole.report.tokens < split.report.tokens < split.report.sequence_tokens
    assert expanded(split) == contents(data)
    assert f"; {split.report.split} conversations are longer than a row and were split" in str(split.report)


def test_the_report_says_what_became_of_the_sequences():
    rows = PackedRows(PAIR, Layout(tokens_per_row=20))
    assert str(rows.report) == (
        "3 sequences of 17 tokens are computed as 2 trees of 14 tokens (82%), in 1 rows of at most 20 (30.0% left "
        "empty)."
    )
    packed = PackedRows(PAIR, Layout("packed"))
    assert str(packed.report) == "3 sequences of 17 tokens are computed as 3 trees of 17 tokens (100%), in 3 rows."
    assert packed.report.padding == 0
    nothing = PackedRows(PAIR.select([]), Layout(tokens_per_row=20, rows_at_once=4))
    assert len(nothing) == nothing.report.padding == 0
    assert str(nothing.report).startswith(
        "0 sequences of 0 tokens are computed as 0 trees of 0 tokens (100%), in 0 rows"
    )


def test_packed_sequences_are_trees_of_one_node(tokenizer):
    data = data_of(tokenizer)
    rows = PackedRows(data, Layout("packed", 700))
    assert {tree.forks for row in rows for tree in row} == {(0,)}
    assert rows.report.trees == rows.report.conversations == len(data)
    assert rows.report.tokens == rows.report.sequence_tokens


@pytest.mark.parametrize("kind", ["tree", "packed"])
def test_a_data_set_may_be_chosen_from_and_shuffled_before(kind, tokenizer):
    data = data_of(tokenizer)
    for chosen in (data.select(range(3, 40)), data.select([5, 0, 5, 6]), data.shuffle(seed=1), data.filter(len)):
        rows = PackedRows(chosen, Layout(kind, 700))
        assert expanded(rows) == contents(chosen)
        assert listed(StreamedRows(chosen.to_iterable_dataset(), Layout(kind, 700))) == listed(rows)
    shuffled = PackedRows(data.shuffle(seed=1), Layout()).report
    assert PackedRows(data, Layout()).report.conversations < shuffled.conversations <= len(data)


def test_other_widths_of_the_columns_and_none_that_tells_conversations(tokenizer):
    data = data_of(tokenizer, 12)
    expected = listed(PackedRows(data, Layout(tokens_per_row=700)))
    wide = {"mode": Value("int64"), "conversation": Value("int64")}
    for lists in (List(Value("int64")), LargeList(Value("int32"))):
        cast = data.cast(Features({"input_ids": lists, "labels": lists, **wide}))
        assert listed(PackedRows(cast, Layout(tokens_per_row=700))) == expected
    assert listed(PackedRows(data.with_format("torch"), Layout(tokens_per_row=700))) == expected
    alone = PackedRows(data.remove_columns("conversation"), Layout(tokens_per_row=700))
    assert listed(alone) == listed(PackedRows(data, Layout("packed", 700)))
    stream = data.remove_columns("conversation").to_iterable_dataset()
    assert listed(StreamedRows(stream, Layout(tokens_per_row=700))) == listed(alone)
    tree = alone[0][0]
    assert (tree.ids.dtype, tree.labels.dtype) == (np.int32, np.int32)


def test_the_first_token_of_a_sequence_is_never_trained():
    """In a row it would be predicted from the end of another tree."""
    data = numbered(3).map(lambda row: {"labels": row["input_ids"]})
    for rows in (
        PackedRows(data, Layout(tokens_per_row=9)),
        StreamedRows(data.to_iterable_dataset(), Layout(tokens_per_row=9)),
    ):
        (row,) = rows
        assert [tree.labels.tolist() for tree in row] == [[-100, 1, 1], [-100, 2, 2], [-100, 3, 3]]
    assert data[0]["labels"] == [1, 1, 1]


def test_a_sequence_longer_than_a_row_is_refused_with_its_place():
    data = numbered(9, (3, 3, 3, 3, 1200))
    message = (
        r"^dataset\[4\]: a training sequence has 1,200 tokens, and tokens_per_row is 1,199\. Raise tokens_per_row, or "
        r"set max_length and say with on_long_row what happens to longer rows"
    )
    for kind in ("tree", "packed"):
        with pytest.raises(ValueError, match=message):
            PackedRows(data, Layout(kind, 1199))
        with pytest.raises(ValueError, match=message):
            list(StreamedRows(data.to_iterable_dataset(), Layout(kind, 1199)))
    assert PackedRows(data, Layout(tokens_per_row=1200)).report.sequences == 9
    for kind, place in (("tree", "3:5"), ("packed", "4")):
        with pytest.raises(ValueError, match=rf"^dataset\[{place}\]: a training sequence has 9 tokens"):
            PackedRows(PAIR.select([1, 1, 2, 1, 0]), Layout(kind, 8))


def test_a_sequence_that_trains_nothing_is_refused_with_its_place():
    data = numbered(3, (2, 1, 2))
    with pytest.raises(ValueError, match=r"^dataset\[1\]: sequences: found none with trained tokens"):
        PackedRows(data, Layout())


def test_empty_rows_fill_the_last_step():
    data = numbered(5)
    for at_once, length in ((1, 5), (2, 6), (4, 8), (5, 5), (7, 7)):
        rows = PackedRows(data, Layout(rows_at_once=at_once))
        assert len(rows) == length
        assert [len(row) for row in rows] == [1] * 5 + [0] * (length - 5)
        assert rows.report.rows == 5
        streamed = StreamedRows(data.to_iterable_dataset(), Layout(rows_at_once=at_once))
        assert listed(streamed) == listed(rows)
        assert streamed.report == rows.report
        for index in (-1, length, 10**9):
            with pytest.raises(IndexError, match=rf"row {index} of {length}"):
                rows[index]


def test_rows_are_the_same_every_time_and_leave_the_data_as_it_was(tokenizer):
    data = data_of(tokenizer)
    before = data.to_dict()
    layout = Layout(tokens_per_row=700)
    rows = PackedRows(data, layout)
    expected = listed(rows)
    assert listed(rows) == listed(PackedRows(data, layout)) == expected
    assert listed([rows[np.int64(2)]]) == expected[2:3]
    assert data.to_dict() == before
    streamed = StreamedRows(prepare([conversation(n) for n in range(24)], tokenizer, streaming=True)[0], layout)
    assert streamed.report.sequences == 0
    assert listed(streamed) == expected
    first = streamed.report
    assert first == rows.report
    assert listed(streamed) == expected
    assert streamed.report == first


def test_a_stream_is_packed_while_it_is_read():
    taken = []

    def sequences():
        for number in range(1000):
            taken.append(number)
            yield {"input_ids": [number] * 4, "labels": [-100] + [number] * 3, "mode": 0}

    for layout, most in ((Layout(tokens_per_row=12), 21), (Layout(), 1), (Layout(tokens_per_row=12, ordered=True), 4)):
        taken.clear()
        with mock.patch.multiple(packing, WINDOW_TREES=20, OPEN_ROWS=1):
            assert next(iter(StreamedRows(sequences(), layout)))
        # `groupby` looks one sequence ahead.
        assert len(taken) <= most + 1


def test_a_shuffled_stream_has_another_order_every_epoch():
    data = numbered(64)
    rows = StreamedRows(data.to_iterable_dataset().shuffle(seed=0, buffer_size=32), Layout(tokens_per_row=12))
    orders = []
    for epoch in (0, 1, 0):
        rows.set_epoch(epoch)
        orders.append(listed(rows))
        assert expanded(rows) == contents(data)
    assert orders[0] == orders[2] != orders[1]


# From rows to batches.


def test_the_order_of_rows_is_drawn_from_seed_and_epoch():
    rows = PackedRows(numbered(50), Layout(rows_at_once=8))

    def order(seed, epoch):
        sampler = RowSampler(rows, seed)
        sampler.set_epoch(epoch)
        drawn = list(sampler)
        assert len(sampler) == len(drawn) == 56
        assert sorted(drawn[:50]) == list(range(50))
        assert drawn[50:] == list(range(50, 56))
        assert list(sampler) == drawn
        return drawn

    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len(set(map(tuple, orders))) == 9
    assert list(range(50)) not in [drawn[:50] for drawn in orders]
    assert order(2, 1) == orders[7]
    assert list(RowSampler(rows, 2)) == order(2, 0)


def test_a_batch_lays_trees_one_after_another():
    pair, alone = PackedRows(PAIR, Layout())
    batch = RowCollator(0)([pair, alone])
    assert {name: value.dtype for name, value in batch.items() if name != "nodes"} == dict.fromkeys(
        ("input_ids", "labels", "position_ids", "attention_mask", "modes"), torch.int64
    )
    nodes = batch.pop("nodes")
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[1, 2, 3, 9, 4, 5, 8, 7, 7, 9, 4, 5, 1, 6]],
        "labels": [[-100] * 4 + [4, 5, -100, 7, 7, 9, 4, 5, -100, 6]],
        "position_ids": [[0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8, 0, 1]],
        "attention_mask": [[1] * 14],
        "modes": [[1] * 6 + [0] * 8],
    }
    # Where the tree begins, what is seen of its trunk, and where the node begins and ends.
    assert nodes == [(0, 0, 0, 6), (0, 3, 6, 12), (12, 0, 12, 14)]
    assert RowCollator(0)([[*pair, *alone]])["nodes"] == nodes


@pytest.mark.parametrize("multiple", [1, 7, 8, 128])
def test_a_batch_is_filled_to_a_multiple(multiple):
    pair, alone = PackedRows(PAIR, Layout())
    batch, plain = RowCollator(33, multiple)([pair, [], alone]), RowCollator(33)([pair, alone])
    padding = -14 % multiple
    fillings = {"input_ids": 33, "labels": -100, "position_ids": 0, "attention_mask": 0, "modes": 0}
    for name, value in fillings.items():
        assert batch[name].shape == (1, 14 + padding)
        assert batch[name][0, :14].equal(plain[name][0])
        assert batch[name][0, 14:].tolist() == [value] * padding
    assert batch["nodes"] == plain["nodes"] + ([(14, 0, 14, 14 + padding)] if padding else [])


@pytest.mark.parametrize("multiple", [1, 8])
def test_empty_rows_alone_are_a_batch_without_loss(multiple):
    batch = RowCollator(33, multiple)([[], []])
    assert batch["input_ids"].tolist() == [[33] * multiple]
    assert batch["labels"].tolist() == [[-100] * multiple]
    assert batch["attention_mask"].tolist() == [[0] * multiple]
    assert batch["nodes"] == [(0, 0, 0, multiple)]


def test_nodes_cover_a_batch_and_the_batches_cover_the_data(tokenizer):
    data = data_of(tokenizer)
    rows = PackedRows(data, Layout(tokens_per_row=700, rows_at_once=3))
    trained = Counter()
    for batch in DataLoader(rows, batch_size=3, sampler=RowSampler(rows, 0), collate_fn=RowCollator(0, 16)):
        edges = [(start, stop) for _, _, start, stop in batch["nodes"]]
        assert [start for start, _ in edges] == [0, *(stop for _, stop in edges[:-1])]
        assert edges[-1][1] == batch["input_ids"].shape[1]
        positions, labels = batch["position_ids"][0], batch["labels"][0]
        for tree, fork, start, stop in batch["nodes"]:
            assert tree <= start
            assert fork <= start - tree
            assert positions[start:stop].tolist() in (list(range(fork, fork + stop - start)), [0] * (stop - start))
            assert labels[start] == -100
        trained += Counter(batch["modes"][0][labels != -100].tolist())
    expected = Counter()
    for row in data:
        expected[row["mode"]] += sum(label != -100 for label in row["labels"])
    assert trained == expected


def test_padding_is_masked_and_carries_no_loss():
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "mode": 0},
        {"input_ids": [8], "labels": [8], "mode": 1},
    ]
    batch = {name: tensor.tolist() for name, tensor in PaddingCollator(9)(rows).items()}
    assert batch == {
        "input_ids": [[5, 6, 7], [8, 9, 9]],
        "labels": [[-100, 6, 7], [8, -100, -100]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "modes": [[0, 0, 0], [1, 1, 1]],
    }
