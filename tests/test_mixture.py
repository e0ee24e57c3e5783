# SPDX-License-Identifier: Apache-2.0
"""Which exchanges are trained in which mode."""

from dataclasses import replace

import pytest

from thinkfusion.conversations import Conversation, DataError
from thinkfusion.mixture import mix
from thinkfusion.modes import Mode

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


def test_an_unknown_mixture_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match=r"'half'.*paired, combined"):
        mix([conversation("r")], "half")
