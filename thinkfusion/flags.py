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


FUSION_METHODS = ("linear", "task", "ties", "slerp")
FUSION_GROUPS = ("router", "experts", "shared_experts", "attention", "embeddings", "dense", "norms")


def fuse_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `thinkfusion fuse`."""
    parser.add_argument("thinking", metavar="THINKING", help="a folder: a checkpoint, or a LoRA adapter")
    parser.add_argument("non_thinking", metavar="NON_THINKING", help="one of the same base")
    parser.add_argument("--output", required=True, help="folder of the fused one")
    parser.add_argument("--ratio", type=float, help="share of the thinking model, 0 to 1 (default 0.8)")
    parser.add_argument("--sweep", metavar="BEGIN:END:STEP", help="measure these ratios, and write the best: 0:1:0.1")
    parser.add_argument("--method", choices=FUSION_METHODS, default="linear", help="how weights are merged")
    parser.add_argument("--base", help="folder of their base: for task and ties, and checked where given")
    parser.add_argument("--scale", type=float, default=1.0, help="of the change from the base: task, ties (default 1)")
    parser.add_argument("--density", type=float, default=0.2, help="share of the changes that ties keeps (default 0.2)")
    for kind in FUSION_GROUPS:
        flag = f"--{kind.replace('_', '-')}"
        parser.add_argument(flag, type=float, metavar="RATIO", help=f"a ratio of its own for {kind.replace('_', ' ')}")
    parser.add_argument(
        "--texts-from",
        choices=("thinking", "non_thinking"),
        default="thinking",
        help="whose tokenizer, template and configs are written (default thinking)",
    )
    swept = parser.add_argument_group("for --sweep")
    swept.add_argument("--samples", type=positive, default=500, help="prompts per mode and ratio (default 500)")
    swept.add_argument("--prompts", help="a file of your own prompts: prompt, question or messages; answer")
    swept.add_argument("--answer_separator", help="the answer is what follows this text, e.g. '####'")
    swept.add_argument("--batch_size", type=positive, default=128)
    swept.add_argument("--seed", type=int, default=0)
    swept.add_argument("--max_new_tokens", type=positive, default=512)


def positive(text: str) -> int:
    """A whole number of at least 1, as a flag gives it."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def not_negative(text: str) -> int:
    """A whole number of at least 0, as a flag gives it."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def plan_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL_OR_CONFIG", help="a folder, a config.json, or a Hub id")
    parser.add_argument("--method", choices=("full", "lora"), default="full", help="what trains (default full)")
    parser.add_argument("--gpus", type=positive, default=8, help="devices (default 8)")
    parser.add_argument("--gpu-memory", type=float, default=80.0, metavar="GIB", help="of each (default 80)")
    parser.add_argument("--sequence-length", type=positive, default=4096, help="tokens of a row (default 4096)")
    parser.add_argument("--layout", choices=("tree", "packed", "padded"), default="tree")
    parser.add_argument("--batch-size", type=positive, default=1, help="rows of a device at a time (default 1)")
    parser.add_argument("--lora-r", type=positive, default=16)
    parser.add_argument("--no-bf16", action="store_true", help="compute in float32")
    parser.add_argument("--no-gradient-checkpointing", action="store_true")
    parser.add_argument(
        "--strategy", choices=("ddp", "fsdp2", "deepspeed_zero3"), help="default: the simplest that fits"
    )
    parser.add_argument("--write-accelerate-config", metavar="FILE", help="write the file for accelerate launch")
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else")
    parser.add_argument("--revision", help="of a Hub id: a branch, tag or commit")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
