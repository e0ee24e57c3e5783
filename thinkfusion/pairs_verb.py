# SPDX-License-Identifier: Apache-2.0
"""The verb `generate-pairs`: its flags, and one run from a checkpoint and prompts to paired rows."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from thinkfusion.flags import positive

EMBEDDED = "tasks"


def pairs_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a folder, or a Hub id")
    parser.add_argument("prompts", help="a file: prompt, question or messages; answer, grader. Or tasks: the embedded")
    parser.add_argument("--output", required=True, metavar="FILE", help="the rows, as JSON lines; gone on with")
    parser.add_argument("--samples", type=positive, help="at most so many prompts (tasks: default 1000)")
    parser.add_argument("--answer_separator", help="the answer is what follows this text, e.g. '####'")
    parser.add_argument("--grader", help="of rows without their own: auto, exact, numeric, regex, choice or math")
    parser.add_argument("--keep_ungraded", action="store_true", help="keep prompts without answer by format alone")
    parser.add_argument("--attempts", type=positive, default=4, help="replies per prompt and mode (default 4)")
    parser.add_argument("--keep", default="first", help="which of several right replies: first (default) or shortest")
    parser.add_argument(
        "--non_thinking_from",
        default="either",
        help="sampled: its own right answer, else rejected; thinking: that of the thinking reply; either (default)",
    )
    parser.add_argument("--preferences", metavar="FILE", help="write preference rows too, for recipes/dpo.py")
    parser.add_argument("--construct", action="store_true", help="make a preference's reply where none was sampled")
    parser.add_argument("--batch_size", type=positive, default=64, help="replies at a time (default 64)")
    parser.add_argument("--processes", type=positive, default=1, help="batches made at a time, on a CPU (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_new_tokens", type=positive, default=512)
    parser.add_argument("--temperature", type=float, help="of both modes (default: the checkpoint's, else Qwen3's)")
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--top_k", type=int)
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the checkpoint")


def write_pairs(options: argparse.Namespace, load: Callable[[str], tuple[Any, Any]]) -> None:
    """Sample, write and print. Raises ValueError, FileNotFoundError and DataError."""
    from thinkfusion.prompts import read_prompts, task_prompts
    from thinkfusion.self_distillation import PairOptions, account_path, generate_pairs

    names = ("attempts", "batch_size", "max_new_tokens", "temperature", "top_p", "top_k", "keep", "non_thinking_from")
    chosen = PairOptions(
        **{name: getattr(options, name) for name in (*names, "keep_ungraded", "construct", "seed")},
    )
    if options.construct and options.preferences is None:
        raise ValueError("construct: only with --preferences, whose rows it completes.")
    if options.prompts == EMBEDDED:
        if options.grader is not None or options.answer_separator is not None:
            raise ValueError(
                "grader, answer_separator: only with a file of prompts; the embedded tasks have their own."
            )
        # Of the split for training: what is made is trained on.
        prompts = task_prompts(options.samples or 1000, seed=options.seed, split="train")
    else:
        prompts = read_prompts(
            options.prompts, answer_separator=options.answer_separator, limit=options.samples, grader=options.grader
        )
    model, tokenizer = load(options.checkpoint)
    account = generate_pairs(
        model,
        tokenizer,
        prompts,
        options.output,
        chosen,
        checkpoint=options.checkpoint,
        preferences=options.preferences,
        processes=options.processes,
        progress=sys.stderr.isatty(),
    )
    print(account)
    files = [options.output, *([options.preferences] if options.preferences else []), account_path(options.output)]
    print(f"Written: {', '.join(map(str, files))}")
