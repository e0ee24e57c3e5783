# SPDX-License-Identifier: Apache-2.0
"""Which exchanges are trained in which mode."""

import pickle
import subprocess
import sys
from collections import Counter
from dataclasses import fields, replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkfusion.conversations import Conversation, DataError, Exchange, Message
from thinkfusion.mixture import (
    MIXTURES,
    ONE_MODE,
    MixtureOptions,
    SequenceTable,
    TokenAccount,
    assign_modes,
    both_modes_check,
    copies,
    draw,
    language_of,
    mix,
    select,
)
from thinkfusion.modes import Mode

HYBRID = [mixture for mixture in MIXTURES if mixture not in ONE_MODE]
BOTH, THINKING, NON_THINKING = tuple(Mode), (Mode.THINKING,), (Mode.NON_THINKING,)


def conversation(*reasonings, mode=None):
    """One exchange per argument: its reasoning, or None."""
    messages = []
    for reasoning in reasonings:
        messages += [
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "4", "reasoning_content": reasoning},
        ]
    return Conversation.from_messages(messages, mode=mode)


def modes_of(mixed):
    return [[exchange.modes for exchange in conversation.exchanges] for conversation in mixed]


def test_paired_gives_both_modes_to_exchanges_with_reasoning():
    mixed = mix([conversation("r", None, "s"), conversation(None)], "paired")
    assert modes_of(mixed) == [[BOTH, NON_THINKING, BOTH], [NON_THINKING]]


def test_paired_is_the_default():
    rows = [conversation("r")]
    assert mix(rows) == mix(rows, "paired")
    assert modes_of(mix(rows)) == [[BOTH]]


@pytest.mark.parametrize("mode", ["thinking", "non_thinking"])
def test_paired_uses_reasoning_whatever_the_mark(mode):
    assert modes_of(mix([conversation("r", mode=mode)])) == [[BOTH]]


def test_combined_keeps_the_own_modes():
    mixed = mix([conversation("r", None), conversation(None)], "combined")
    assert modes_of(mixed) == [[THINKING, NON_THINKING], [NON_THINKING]]


@pytest.mark.parametrize("mixture", ["paired", "combined"])
def test_only_the_modes_change(mixture):
    rows = [replace(conversation("r", None), system="Be brief.", source="a.jsonl", line=3)]
    (mixed,) = mix(rows, mixture)
    assert mixed.to_messages() == rows[0].to_messages()
    assert (mixed.source, mixed.line) == ("a.jsonl", 3)
    assert modes_of(rows) == [[THINKING, NON_THINKING]]


def test_context_stays_context():
    """An exchange without modes is context only, with reasoning or without."""
    row = conversation("r", "s")
    row = replace(row, exchanges=(replace(row.exchanges[0], modes=()), row.exchanges[1]))
    assert modes_of(mix([row], "paired")) == [[(), BOTH]]


@pytest.mark.parametrize(
    ("rows", "mixture", "message"),
    [
        ([conversation(None)], "paired", "no row is trained in thinking mode.*rows with reasoning"),
        ([conversation(None)], "combined", "no row is trained in thinking mode"),
        ([conversation("r")], "combined", "no row is trained in non_thinking mode.*'paired'"),
        ([], "paired", "no row is trained in thinking mode"),
    ],
)
def test_a_missing_mode_is_an_error(rows, mixture, message):
    with pytest.raises(ValueError, match=message):
        mix(rows, mixture)


def test_combined_throws_no_reasoning_away():
    marked = replace(conversation("r", mode="non_thinking"), source="rows.jsonl", line=7)
    with pytest.raises(DataError, match=r"rows\.jsonl, row 7: mode: .*Remove one") as caught:
        mix([conversation("r"), marked], "combined")
    assert caught.value.reason == "unexpected_reasoning"


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ("ratio", r"the mixture 'ratio'.*prepare\("),
        ("sequential", r"the mixture 'sequential'.*prepare\("),
        (MixtureOptions("ratio", ratio=0.5, ratio_unit="samples"), r"the mixture 'ratio'.*prepare\("),
        (MixtureOptions(max_rows_per_source=3), r"a cap per source.*prepare\("),
        (MixtureOptions("combined", max_tokens_per_source=3), r"a cap per source.*prepare\("),
    ],
)
def test_what_needs_sequences_points_at_prepare(mixture, message):
    with pytest.raises(ValueError, match=message):
        mix([conversation("r"), conversation(None)], mixture)


def test_mix_takes_options():
    rows = [placed("r", line=line) for line in range(100)]
    options = MixtureOptions(pair_fraction=0.5)
    assert mix(rows, options) == [assign_modes(row, options) for row in rows]
    assert mix(rows, options) != mix(rows)


def test_an_unknown_mixture_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match=r"'half'.*paired, combined"):
        mix([conversation("r")], "half")


def placed(*reasonings, line=1, source="data/rows.jsonl", mode=None):
    return replace(conversation(*reasonings, mode=mode), source=source, line=line)


def pre_paired(modes=BOTH):
    row = placed("r")
    other = (Message("assistant", "a given short answer"),)
    return replace(row, exchanges=(replace(row.exchanges[0], alternative=other, modes=modes),))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mixture": "half"}, r"mixture: 'half' is unknown; choose one of .*non_thinking \(--mixture\)"),
        ({"mixture": "ratio", "ratio": 0.5, "ratio_unit": "rows"}, r"ratio_unit: 'rows'.*tokens, samples"),
        ({"pair_fraction": 1.01}, r"pair_fraction: found 1.01.*--pair_fraction"),
        ({"pair_fraction": -1}, "pair_fraction: found -1"),
        ({"pair_fraction": float("nan")}, "pair_fraction: found nan"),
        ({"pair_fraction": "0.5"}, "pair_fraction: found '0.5'"),
        ({"pair_fraction": True}, "pair_fraction: found True"),
        ({"pair_fraction": 0.5, "mixture": "combined"}, "pair_fraction: found 0.5, but only.*paired"),
        ({"mixture": "ratio"}, "ratio: .*needs the share.*--ratio 1.5:1"),
        ({"ratio": 0.5}, "ratio: it has no effect on the mixture 'paired'.*--mixture ratio"),
        ({"ratio": 0.5, "mixture": "sequential"}, "ratio: it has no effect"),
        ({"ratio_unit": "samples"}, "ratio: it has no effect"),
        ({"max_rows_per_source": 0}, r"max_rows_per_source: found 0.*--max_rows_per_source"),
        ({"max_tokens_per_source": -5}, r"max_tokens_per_source: found -5.*--max_tokens_per_source"),
        ({"max_rows_per_source": 2.0}, "max_rows_per_source: found 2.0"),
        ({"max_rows_per_source": True}, "max_rows_per_source: found True"),
        ({"seed": 0.5}, "seed: found 0.5"),
        *(
            ({"mixture": "ratio", "ratio": ratio}, r"ratio: found .*--ratio 0.6.*--ratio 1.5:1")
            for ratio in [
                *(0, 1, -0.5, 1.5, float("nan"), float("inf"), True, [0.5], 1e-12, 1 - 1e-15, "1", "0", "x", ""),
                *("1:0", "0:1", "1:2:3", "a:b", "1:", ":", "-1:2", "-1:-2", "inf:1", "nan:1", "inf:inf", "1e308:1e308"),
            ]
        ),
    ],
)
def test_bad_options_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MixtureOptions(**arguments)


@pytest.mark.parametrize(
    ("given_ratio", "share"), [(0.6, 0.6), ("0.6", 0.6), ("1.5:1", 0.6), ("1 : 3", 0.25), ("2540:1", 2540 / 2541)]
)
def test_a_ratio_is_stored_as_the_share_of_thinking(given_ratio, share):
    assert MixtureOptions("ratio", ratio=given_ratio).ratio == share
    assert replace(MixtureOptions("ratio", ratio=given_ratio), seed=1).ratio == share


def test_draws_are_even_and_depend_on_seed_purpose_and_place_alone():
    rows = [placed("r", line=line) for line in range(10_000)]
    drawn = np.array([draw(0, "pair", row) for row in rows])
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = np.histogram(drawn, 20, (0, 1))[0]
    assert ((counts - 500) ** 2 / 500).sum() < 50  # chi-square, 19 degrees: 1 in 10,000
    assert draw(0, "pair", rows[0]) == draw(0, "pair", placed("other text", line=0, source="elsewhere/rows.jsonl"))
    others = (draw(1, "pair", rows[0]), draw(0, "mode", rows[0]), draw(0, "pair", rows[1]))
    assert draw(0, "pair", rows[0]) not in (*others, draw(0, "pair", replace(rows[0], source="data/others.jsonl")))
    assert abs(np.corrcoef(drawn, [draw(0, "weight", row) for row in rows])[0, 1]) < 0.05


def test_a_draw_is_the_same_for_ever():
    """A data set must not change between versions, machines or processes."""
    assert draw(0, "pair", placed("r", line=7)) == 0.514292070823481
    assert draw(3, "select", placed("r", line=7)) == 0.6437504105086473


def test_conversations_from_nowhere_are_told_by_their_texts():
    first, second = conversation("one"), conversation("two")
    assert draw(0, "pair", first) == draw(0, "pair", conversation("one"))
    assert draw(0, "pair", first) != draw(0, "pair", second)
    assert draw(0, "pair", replace(first, system="s")) != draw(0, "pair", first)


def test_a_pair_fraction_pairs_that_share_and_splits_the_rest_evenly():
    options = MixtureOptions(pair_fraction=0.4)
    rows = [placed("r", None, "s", line=line) for line in range(5000)]
    found = [modes_of([assign_modes(row, options)])[0] for row in rows]
    counts = Counter(modes[0] for modes in found)
    # Five standard deviations; all exchanges of a row go the same way.
    assert abs(counts[BOTH] - 2000) < 175
    assert abs(counts[THINKING] - 1500) < 165
    assert abs(counts[NON_THINKING] - 1500) < 165
    assert all(first == third and second == NON_THINKING for first, second, third in found)


def test_a_larger_pair_fraction_pairs_more_of_the_same_rows():
    def pairs(fraction):
        rows = [placed("r", line=line) for line in range(200)]
        options = MixtureOptions(pair_fraction=fraction)
        return {row.line for row in rows if assign_modes(row, options).exchanges[0].modes == BOTH}

    assert pairs(0) == set()
    assert pairs(0.3) < pairs(0.6) < pairs(1) == set(range(200))


def test_a_mode_with_under_a_twentieth_is_refused():
    counts = {Mode.THINKING: 96, Mode.NON_THINKING: 4}
    message = r"only 4 of 100 \(4\.0%\) are trained in non_thinking mode, expected 5% at least.*larger pair_fraction"
    with pytest.raises(ValueError, match=message):
        both_modes_check(counts)
    with pytest.raises(ValueError, match="no row is trained in thinking mode, so the switch"):
        both_modes_check({Mode.NON_THINKING: 4})
    both_modes_check({Mode.THINKING: 5, Mode.NON_THINKING: 95})


def test_mixtures_of_one_mode():
    """Reasoning can be left out, and not be made up; a closed exchange is one of thinking mode."""
    plain = placed("r", None)
    closed = replace(placed("r"), exchanges=(replace(placed("r").exchanges[0], ends_only=True, modes=THINKING),))
    for mixture, expected in (("thinking", THINKING), ("non_thinking", NON_THINKING)):
        options = MixtureOptions(mixture)
        assert assign_modes(pre_paired(THINKING), options).exchanges[0].modes == expected
        assert assign_modes(pre_paired(()), options).exchanges[0].modes == ()
        assert assign_modes(closed, options).exchanges[0].modes == (THINKING if mixture == "thinking" else ())
        with_reasoning, without = assign_modes(plain, options).exchanges
        assert with_reasoning.modes == expected
        assert without.modes == (() if mixture == "thinking" else NON_THINKING)
        assert modes_of(mix([plain], mixture))


def options_for(mixture, **others):
    return MixtureOptions(mixture, ratio=0.5 if mixture == "ratio" else None, **others)


@pytest.mark.parametrize("mixture", HYBRID)
def test_pre_paired_rows_are_trained_in_both_modes(mixture):
    assert assign_modes(pre_paired(THINKING), options_for(mixture)).exchanges[0].modes == BOTH
    assert assign_modes(pre_paired(()), options_for(mixture)).exchanges[0].modes == ()
    never = MixtureOptions(pair_fraction=0)
    assert assign_modes(pre_paired(), never).exchanges[0].modes == BOTH


@pytest.mark.parametrize("mixture", ["combined", "ratio", "sequential"])
def test_other_mixtures_keep_the_own_modes(mixture):
    assigned = assign_modes(placed("r", None), options_for(mixture))
    assert modes_of([assigned]) == [[THINKING, NON_THINKING]]
    with pytest.raises(DataError, match=r"data/rows\.jsonl, row 1: mode: ") as caught:
        assign_modes(placed("r", mode="non_thinking"), options_for(mixture))
    assert caught.value.reason == "unexpected_reasoning"


@pytest.mark.parametrize("mixture", HYBRID)
def test_closed_exchanges_are_trained_in_thinking_mode_only(mixture):
    row = placed("r")
    row = replace(row, exchanges=(replace(row.exchanges[0], ends_only=True, modes=THINKING),))
    assert assign_modes(row, options_for(mixture)) == row


def test_nothing_but_the_modes_changes():
    """Every field of a row is carried over: those that exist today, and any that is added."""
    assert [each.name for each in fields(Exchange)] == ["user", "steps", "modes", "alternative", "ends_only"]
    assert len(fields(Conversation)) == 6
    row = replace(pre_paired(THINKING), system="s", tools=({"name": "f"},), language="ko")
    assigned = assign_modes(row, MixtureOptions())
    for each in fields(Conversation):
        if each.name != "exchanges":
            assert getattr(assigned, each.name) is getattr(row, each.name)
    assert assigned.exchanges == (replace(row.exchanges[0], modes=BOTH),)


@pytest.mark.parametrize(("weight", "expected"), [(1, 1000), (2, 2000), (0.5, 500), (1.25, 1250), (0.1, 100)])
def test_a_weight_is_the_mean_of_the_copies(weight, expected):
    found = [copies(placed("r", line=line), weight, MixtureOptions()) for line in range(1000)]
    assert set(found) <= {int(weight), int(weight) + (weight % 1 > 0)}
    assert abs(sum(found) - expected) < (80 if weight % 1 else 1)


def test_both_modes_check():
    both_modes_check({Mode.THINKING: 1, Mode.NON_THINKING: 5})
    with pytest.raises(ValueError, match=r"thinking mode.*rows with reasoning"):
        both_modes_check({Mode.NON_THINKING: 5})
    with pytest.raises(ValueError, match=r"non_thinking mode.*--mixture paired"):
        both_modes_check({Mode.THINKING: 1, Mode.NON_THINKING: 0})


def table_of(rows):
    """A table of (row, source, draw, [(mode, tokens), …])."""
    lines = [(row, mode, source, tokens, drawn) for row, source, drawn, made in rows for mode, tokens in made]
    row, mode, source, tokens, drawn = zip(*lines, strict=True) if lines else ((),) * 5
    return SequenceTable(
        np.array(row, np.int64),
        np.array(mode, np.int8),
        np.array(source, np.int32),
        np.array(tokens, np.int64),
        np.array(drawn, np.float64),
    )


MADE = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 50)), min_size=1, max_size=4)
# Few different draws, so that equal ones are common, as they are of copies.
ROWS = st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0.1, 0.2, 0.3, 0.7]), MADE), max_size=12).map(
    lambda rows: [(number, *row) for number, row in enumerate(rows)]
)


def chosen(rows, options):
    """The sequences that `select` keeps, as (row, number within the row); and in which modes."""
    names = [(row, number) for row, _, _, made in rows for number in range(len(made))]
    return [names[index] for index in select(table_of(rows), options, both_modes=False)]


def test_all_is_kept_in_order_by_default():
    rows = [(0, 0, 0.9, [(0, 5), (1, 3)]), (1, 1, 0.1, [(1, 9)])]
    for mixture in ("paired", "combined"):
        kept = select(table_of(rows), MixtureOptions(mixture))
        assert kept.tolist() == [0, 1, 2]
        assert kept.dtype == np.int64


def test_sequential_puts_thinking_first_and_keeps_the_order_within():
    rows = [(0, 0, 0.9, [(1, 5), (0, 3)]), (1, 1, 0.1, [(0, 9), (1, 1)]), (2, 0, 0.5, [(1, 1)])]
    assert chosen(rows, MixtureOptions("sequential")) == [(0, 1), (1, 0), (0, 0), (1, 1), (2, 0)]


def test_caps_take_rows_of_smallest_draw_whole():
    rows = [
        (0, 0, 0.9, [(0, 5), (1, 3)]),
        (1, 0, 0.1, [(0, 10), (1, 2)]),
        (2, 0, 0.5, [(0, 20), (1, 1)]),
        (3, 1, 0.8, [(0, 1), (1, 1)]),
    ]
    assert chosen(rows, MixtureOptions(max_rows_per_source=2)) == [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)]
    assert chosen(rows, MixtureOptions(max_tokens_per_source=32)) == [(1, 0), (1, 1), (3, 0), (3, 1)]
    assert chosen(rows, MixtureOptions(max_tokens_per_source=33)) == chosen(rows, MixtureOptions(max_rows_per_source=2))
    assert chosen(rows, MixtureOptions(max_rows_per_source=1, max_tokens_per_source=41)) == [
        *((1, 0), (1, 1), (3, 0), (3, 1))
    ]
    with pytest.raises(ValueError, match=r"max_tokens_per_source: found 11, but .* 12 trained tokens.*Raise"):
        chosen(rows, MixtureOptions(max_tokens_per_source=11))


@given(ROWS, st.one_of(st.none(), st.integers(1, 5)), st.one_of(st.none(), st.integers(50, 400)))
def test_caps_hold_and_leave_no_more_out_than_needed(rows, most_rows, most_tokens):
    try:
        kept = chosen(rows, MixtureOptions(max_rows_per_source=most_rows, max_tokens_per_source=most_tokens))
    except ValueError:
        assert max(sum(tokens for _, tokens in row[3]) for row in rows) > (most_tokens or 0)
        return
    assert kept == sorted(kept)
    for source in {row[1] for row in rows}:
        expected, tokens = set(), 0
        for row, _, _, made in sorted((row for row in rows if row[1] == source), key=lambda row: (row[2], row[0])):
            tokens += sum(each for _, each in made)
            if len(expected) == (most_rows or 99) or tokens > (most_tokens or 9999):
                break
            expected.add(row)
        of_source = {row[0] for row in rows if row[1] == source}
        assert {row for row, _ in kept} & of_source == expected
    whole = {row: len(made) for row, _, _, made in rows}
    assert all(count == whole[row] for row, count in Counter(row for row, _ in kept).items())


def shares(rows, kept, unit):
    """Amount by mode of the kept sequences."""
    amounts = [0, 0]
    for row, number in kept:
        mode, tokens = rows[row][3][number]
        amounts[mode] += tokens if unit == "tokens" else 1
    return amounts


@given(
    ROWS, st.sampled_from([0.1, 0.25, 0.5, 0.6, "1.5:1", "3:1", "1:7", 1 / 3]), st.sampled_from(["tokens", "samples"])
)
def test_a_ratio_is_met_within_half_a_sequence(rows, ratio, unit):
    options = MixtureOptions("ratio", ratio=ratio, ratio_unit=unit)
    modes = {mode for row in rows for mode, _ in row[3]}
    if modes != {0, 1}:
        with pytest.raises(ValueError, match="no row is trained in"):
            chosen(rows, options)
        return
    kept = chosen(rows, options)
    assert kept == sorted(kept)
    every = [(row, number) for row, _, _, made in rows for number in range(len(made))]
    before, after = shares(rows, every, unit), shares(rows, kept, unit)
    share = Fraction(options.ratio).limit_denominator(1000)
    frequent = 0 if before[0] * (1 - share) > before[1] * share else 1
    assert after[1 - frequent] == before[1 - frequent]
    target = before[1] * share / (1 - share) if frequent == 0 else before[0] * (1 - share) / share
    # No other number of sequences, in the order of their draws, comes nearer.
    candidates = sorted((rows[row][2], row, number) for row, number in every if rows[row][3][number][0] == frequent)
    ordered = [(row, number) for _, row, number in candidates]
    left = [each for each in ordered if each in set(kept)]
    assert left == ordered[: len(left)]
    assert left
    distances = [abs(shares(rows, ordered[:count], unit)[frequent] - target) for count in range(1, len(ordered) + 1)]
    assert abs(after[frequent] - target) == min(distances)


@pytest.mark.parametrize(
    ("ratio", "unit", "expected"),
    [
        ("1:1", "tokens", (30, 30)),
        ("1:1", "samples", (30, 30)),
        ("2:1", "samples", (40, 20)),
        ("1:3", "samples", (10, 30)),
        (1 / 3, "samples", (20, 40)),
    ],
)
def test_a_ratio_is_exact_where_it_can_be(ratio, unit, expected):
    thinking, non_thinking = (40, 30) if expected[0] != 20 else (50, 40)
    if ratio == "2:1":
        non_thinking = 30
    rows = [(n, 0, (n * 37 % 101) / 101, [(0 if n < thinking else 1, 7)]) for n in range(thinking + non_thinking)]
    kept = chosen(rows, MixtureOptions("ratio", ratio=ratio, ratio_unit=unit))
    assert tuple(shares(rows, kept, "samples")) == expected


def test_of_two_equally_near_cuts_the_shorter_is_taken():
    """Also where the share has no exact float: 0.1 is a little more than a tenth, and must not tip the scale."""
    rows = [(n, 0, n / 10, [(0, 2)]) for n in range(5)] + [(5, 0, 0.9, [(1, 27)])]
    assert chosen(rows, MixtureOptions("ratio", ratio=0.1)) == [(0, 0), (5, 0)]


def test_copies_of_a_row_count_one_by_one():
    """Three copies of each thinking row with one draw: the cut may fall between them, and falls where it must."""
    rows = [(3 * n + copy, 0, n / 10, [(0, 10)]) for n in range(4) for copy in range(3)]
    rows += [(12, 0, 0.05, [(1, 50)])]
    kept = chosen(rows, MixtureOptions("ratio", ratio=0.5))
    assert kept == [*((row, 0) for row in range(5)), (12, 0)]


def test_caps_come_before_the_ratio():
    rows = [(n, n % 2, n / 100, [(0, 10), (1, 2)]) for n in range(40)]
    kept = chosen(rows, MixtureOptions("ratio", ratio=0.5, max_rows_per_source=5))
    assert shares(rows, kept, "tokens") == [20, 20]
    assert {row for row, _ in kept} == set(range(10))


@given(ROWS, st.randoms(use_true_random=False), st.sampled_from(["caps", "ratio", "samples"]))
def test_the_order_of_the_table_does_not_matter(rows, random, which):
    """Sources in another order, or rows from another process: the same sequences are kept."""
    options = {
        "caps": MixtureOptions(max_rows_per_source=2, max_tokens_per_source=300),
        "ratio": MixtureOptions("ratio", ratio=0.4),
        "samples": MixtureOptions("ratio", ratio=0.4, ratio_unit="samples", max_rows_per_source=3),
    }[which]
    shuffled = random.sample(rows, len(rows))
    try:
        kept = chosen(rows, options)
    except ValueError:
        with pytest.raises(ValueError, match=r"max_tokens_per_source|no row"):
            chosen(shuffled, options)
        return
    assert set(chosen(shuffled, options)) == set(kept)


@pytest.mark.parametrize("mixture", HYBRID)
def test_select_wants_both_modes(mixture):
    for rows in ([], [(0, 0, 0.1, [(0, 5)])], [(0, 0, 0.1, [(1, 5)])]):
        with pytest.raises(ValueError, match="no row is trained in"):
            select(table_of(rows), options_for(mixture, max_rows_per_source=1))
    if mixture != "ratio":
        assert select(table_of(rows), options_for(mixture), both_modes=False).tolist() == [0]


def test_a_mode_that_a_cap_took_away_is_an_error():
    rows = [(0, 0, 0.1, [(0, 5)]), (1, 0, 0.2, [(1, 5)])]
    with pytest.raises(ValueError, match="no row is trained in non_thinking mode"):
        select(table_of(rows), MixtureOptions("combined", max_rows_per_source=1))


def account(*lines):
    made = TokenAccount()
    for source, mode, language, tokens, stage in lines:
        made.add(source, mode, language, tokens, stage=stage)
    return made


LINES = (
    ("b.jsonl", Mode.THINKING, "ko", 1200, "before"),
    ("b.jsonl", Mode.THINKING, "ko", 300, "before"),
    ("b.jsonl", "thinking", "ko", 300, "after"),
    ("a.jsonl", Mode.NON_THINKING, "latin", 7, "before"),
    ("a.jsonl", Mode.NON_THINKING, "latin", 7, "after"),
)


def test_the_account_counts_before_and_after():
    assert account(*LINES).to_dict() == {
        "by": [
            {
                **{"source": "a.jsonl", "mode": "non_thinking", "language": "latin"},
                **{"rows_before": 1, "rows_after": 1, "tokens_before": 7, "tokens_after": 7},
            },
            {
                **{"source": "b.jsonl", "mode": "thinking", "language": "ko"},
                **{"rows_before": 2, "rows_after": 1, "tokens_before": 1500, "tokens_after": 300},
            },
        ],
        "total": {"rows_before": 3, "rows_after": 2, "tokens_before": 1507, "tokens_after": 307},
    }


def test_the_account_is_a_table():
    assert str(account(*LINES)).splitlines() == [
        "source   mode          language  rows before  rows after  tokens before  tokens after",
        "a.jsonl  non_thinking  latin               1           1              7             7",
        "b.jsonl  thinking      ko                  2           1          1,500           300",
        "total                                      3           2          1,507           307",
    ]


def test_the_table_is_safe_and_straight():
    text = str(account(("\x1b[31m한국.jsonl\n", Mode.THINKING, "ko", 1, "after"), *LINES))
    assert "\x1b" not in text
    lines = text.splitlines()
    assert len(lines) == 5
    (korean,) = [line for line in lines if "한국" in line]
    # Two characters of two columns each.
    assert {len(line) + 2 * (line is korean) for line in lines} == {len(lines[0])}


def test_an_empty_account():
    assert TokenAccount().to_dict()["by"] == []
    assert "total" in str(TokenAccount())


def test_an_account_refuses_unknown_stages_and_modes():
    with pytest.raises(ValueError, match="later"):
        TokenAccount().add("a", Mode.THINKING, "ko", 1, stage="later")
    with pytest.raises(ValueError, match="maybe"):
        TokenAccount().add("a", "maybe", "ko", 1)


@given(st.lists(st.sampled_from(LINES)), st.lists(st.sampled_from(LINES)))
def test_partial_accounts_add_up(first, second):
    merged, other = account(*first), pickle.loads(pickle.dumps(account(*second)))
    merged.merge(other)
    assert merged.to_dict() == account(*first, *second).to_dict()
    assert other.to_dict() == account(*second).to_dict()
    other.merge(other)
    assert other.to_dict() == account(*second, *second).to_dict()


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("How many?", "latin"),
        ("", "latin"),
        ("Où est-il ? Đây là tiếng Việt.", "latin"),
        ("Prove that α + π > 3", "latin"),
        ("이 코드를 설명해 주세요: for i in range(10): print(i)", "ko"),
        ("$x^2 + y^2 = z^2$ 을 증명하라", "ko"),
        ("한국어".encode().decode(), "ko"),
        ("漢字と仮名の文章です", "ja"),
        ("ｶﾀｶﾅ", "ja"),
        ("这是中文，没有假名。Python 很好", "zh"),
        ("这是一个很长的中文句子，其中只有一个日文字母の，所以仍然是中文，而不是日文，对吧？", "zh"),
        ("ภาษาไทย", "th"),
        ("Русский язык", "cyrillic"),
        ("مرحبا بالعالم", "arabic"),
        ("שלום עולם", "hebrew"),
        ("हिन्दी भाषा", "devanagari"),
        ("Ελληνικά", "greek"),
        ("বাংলা", "other"),
        ("😀 → 3", "other"),
        ("ＦＵＬＬ　ｗｉｄｔｈ", "latin"),
        ("\ud83d broken", "latin"),
    ],
)
def test_the_language_by_script(text, language):
    assert language_of(text) == language


def test_only_the_beginning_of_a_text_is_looked_at():
    assert language_of("가" * 2000 + "a" * 100_000) == "ko"
    assert language_of("a" * 2000 + "가" * 100_000) == "latin"


@given(st.text())
def test_any_text_has_a_language(text):
    known = {"ko", "ja", "zh", "th", "latin", "cyrillic", "arabic", "hebrew", "devanagari", "greek", "other"}
    assert language_of(text) in known


def test_the_module_stays_light():
    code = "import sys, thinkfusion.mixture, thinkfusion.shortening; print('numpy' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.strip() == "False"
