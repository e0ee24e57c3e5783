# SPDX-License-Identifier: Apache-2.0
"""Flags made of the options of reading, mixing and reasoning, so that each has the name and the type of its field."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import Field, fields
from typing import Any, get_type_hints

from thinkfusion.formats import FORMATS, RecordOptions
from thinkfusion.mixture import MIXTURES, RATIO_UNITS, MixtureOptions
from thinkfusion.shortening import ReasoningOptions

OPTIONS: tuple[Any, ...] = (RecordOptions, MixtureOptions, ReasoningOptions)
METAVARS: dict[Any, str] = {int: "N", float: "X", str: "TEXT"}
HELP = {
    "format": f"{', '.join(FORMATS)}; recognised by the columns if not given",
    "question_column": "the column of the question",
    "reasoning_column": "the column of the reasoning; a row may lack it",
    "answer_column": "the column of the answer",
    "answer_separator": "splits an answer column into reasoning and answer, at the last place it occurs: '####'",
    "remove_pattern": "a regular expression; what it matches is removed from reasoning and answer",
    "on_bad_row": "error: stop at the first bad row; skip: leave bad rows out, and count them by reason",
    "max_skipped": "the share of skipped rows above which training stops all the same",
    "drop_duplicates": "leave out rows that came before",
    "repair": "repair what has one meaning only, and count it",
    "join_messages": "join two messages of one role in a row with a blank line",
    "drop_first_assistant": "leave out what the assistant says before the first user message",
    "plain_control_tokens": "keep control strings inside answers and reasoning, as ordinary text",
    "reasoning_tags": "other marks of reasoning than <think>: '<thinking>,</thinking>'",
    "drop_reasoning": "leave out the reasoning of rows that are marked as non-thinking",
    "mixture": f"how the modes are combined: {', '.join(MIXTURES)}",
    "pair_fraction": "share of the rows with reasoning that are trained in both modes",
    "ratio": "share of thinking (0.6), or thinking : non-thinking (1.5:1)",
    "ratio_unit": f"what the ratio counts: {' or '.join(RATIO_UNITS)}",
    "max_rows_per_source": "at most so many rows of each source",
    "max_tokens_per_source": "at most so many trained tokens of each source",
    "seed": "of all draws",
    "shorten_fraction": "share of the rows whose traces are shortened",
    "shorten_budget": "least and most tokens of these: 32,512",
    "remove_fraction": "share of the rows that lose their traces",
    "close_at": "cut traces at so many tokens, and train only what closes them and the end",
}


def add_option_flags(parser: argparse._ActionsContainer, defaults: Mapping[str, Any]) -> None:
    """A flag for each field of OPTIONS; `defaults` are shown where they differ from those of the classes.

    Only flags that were given reach the namespace, so that `read_options` leaves the rest to the classes.
    """
    for each, kind in _fields():
        default = defaults.get(each.name, each.default)
        shown = HELP[each.name] + ("" if default is None or isinstance(default, bool) else f" (default {default})")
        given: dict[str, Any] = {"dest": each.name, "default": argparse.SUPPRESS, "help": shown.replace("%", "%%")}
        if kind is not bool:
            known = next((known for known in METAVARS if kind in (known, known | None)), str)
            parser.add_argument(f"--{each.name}", type=known, metavar=METAVARS[known], **given)
            continue
        given["help"] += " (default)" if default else ""
        parser.add_argument(f"--{each.name}", action="store_true", **given)
        if default:
            given["help"] = f"not --{each.name}: such a row is a bad one"
            parser.add_argument(f"--no_{each.name}", action="store_false", **given)


def read_options(given: Mapping[str, Any]) -> tuple[RecordOptions, MixtureOptions, ReasoningOptions]:
    """The options that flags say; raises ValueError, naming the flag, for what contradicts itself."""
    records, mixture, reasoning = (
        options(**{each.name: given[each.name] for each in fields(options) if each.name in given})
        for options in OPTIONS
    )
    return records, mixture, reasoning


def _fields() -> Iterator[tuple[Field[Any], Any]]:
    """Each field with its type; of those of one name, the first."""
    seen = set()
    for options in OPTIONS:
        types = get_type_hints(options)
        for each in fields(options):
            if each.name not in seen:
                seen.add(each.name)
                yield each, types[each.name]
