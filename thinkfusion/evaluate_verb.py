# SPDX-License-Identifier: Apache-2.0
"""The verb `evaluate`: its flags, and one run from a checkpoint to a report."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from thinkfusion.endpoint_verb import check_flags, endpoint_flags, measure_endpoint
from thinkfusion.flags import positive

FULL = {"obedience": 20, "flip": 40, "probe": 64}
"""How much of each further measurement `--full` makes."""
FULL_BUDGETS = "8,16,32,64,128"


def evaluate_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", nargs="?", help="a folder, or a Hub id; or none, with --endpoint")
    parser.add_argument("--samples", type=positive, default=1000, help="prompts per mode (default 1000)")
    parser.add_argument("--output", help="folder for the report (default: the checkpoint's, if it is one)")
    parser.add_argument("--prompts", help="a file of your own prompts: prompt, question or messages; answer, grader")
    parser.add_argument("--answer_separator", help="the answer is what follows this text, e.g. '####'")
    parser.add_argument("--grader", help="of rows without their own: auto, exact, numeric, regex, choice or math")
    parser.add_argument("--batch_size", type=positive, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_new_tokens", type=positive, default=512)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy decoding (default)")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the checkpoint")
    more = parser.add_argument_group("measured where asked for")
    more.add_argument("--full", action="store_true", help="obedience, flip, budgets and probe in their usual sizes")
    for name, metavar, about in (
        ("obedience", "PROMPTS", "switches × system text × turn, with so many prompts each"),
        ("flip", "CONVERSATIONS", "conversations that alternate modes"),
        ("probe", "ROWS", "the switch probe"),
    ):
        more.add_argument(
            f"--{name}",
            type=positive,
            nargs="?",
            const=FULL[name],
            metavar=metavar,
            help=f"{about} ({FULL[name]} if no number is given)",
        )
    more.add_argument("--budgets", metavar="TOKENS", help="accuracy at thinking budgets, e.g. 32,64,128")
    more.add_argument("--routes", action="store_true", help="which experts the modes use, on the same page")
    more.add_argument("--against", metavar="CHECKPOINT_OR_REPORT", help="compare with it on the same prompts")
    more.add_argument("--lm-eval", metavar="TASKS", help="tasks of lm-evaluation-harness, with commas; or YAML files")
    more.add_argument("--lm-eval-limit", type=positive, metavar="N", help="at most so many rows of each task")
    more.add_argument("--transcripts", type=positive, default=5, help="failing replies shown of a kind (5)")
    endpoint_flags(parser)


def evaluate_checkpoint(options: argparse.Namespace, load: Callable[[str], tuple[Any, Any]]) -> None:
    """Measure, write and print. What can be wrong with the flags is found before anything is loaded.

    `load` gives the model and tokenizer of a name. Raises ValueError, FileNotFoundError and DataError.
    """
    from thinkfusion.budget_curve import parse_budgets
    from thinkfusion.comparing import answered, check_prompts, compare, is_report, read_report
    from thinkfusion.evaluation import evaluate_modes, read_prompts, task_prompts
    from thinkfusion.harness import harness_tasks, run_harness
    from thinkfusion.report_page import save_page
    from thinkfusion.reporting import measured_lines, mode_table, save_report

    check_flags(options)
    prompts = None
    if options.prompts is not None:
        separator = options.answer_separator
        prompts = read_prompts(
            options.prompts, answer_separator=separator, limit=options.samples, grader=options.grader
        )
    elif options.grader is not None:
        raise ValueError("grader: only with --prompts; the embedded tasks have their own.")
    sizes = {name: getattr(options, name) or (FULL[name] if options.full else 0) for name in FULL}
    given = FULL_BUDGETS if options.full and options.budgets is None else options.budgets
    if options.endpoint is not None and options.full and options.budgets is None and options.budget_field is None:
        given = None
    budgets = () if given is None else parse_budgets(given)
    tasks = options.lm_eval.split(",") if options.lm_eval else []
    if tasks:
        harness_tasks(tasks)
    asked = {
        "samples": options.samples,
        "seed": options.seed,
        "batch_size": options.batch_size,
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
    }
    other = None
    if options.against is not None and is_report(options.against):
        other = read_report(options.against)
        chosen = task_prompts(options.samples, seed=options.seed) if prompts is None else prompts
        check_prompts(other, [prompt.messages for prompt in chosen])
    elif options.against is not None:
        # First, and only its replies are kept, so that there is one model in memory at a time.
        other = answered(evaluate_modes(*load(options.against), prompts, **asked), options.against)
    further: dict[str, Any] = {"obedience": sizes["obedience"], "flip": sizes["flip"], "budgets": budgets}
    is_folder = options.checkpoint is not None and os.path.isdir(options.checkpoint)
    output = Path(options.output or (options.checkpoint if is_folder else "."))
    if options.endpoint is not None:
        report = measure_endpoint(options, prompts, output, **further)
    else:
        model, tokenizer = load(options.checkpoint)
        report = evaluate_modes(model, tokenizer, prompts, **asked, **further, probe=sizes["probe"])
    name = options.checkpoint or options.model
    if other is not None:
        report.measured["comparison"] = compare(answered(report, name), other)
    if tasks:
        report.measured["harness"] = run_harness(
            model,
            tokenizer,
            tasks,
            limit=options.lm_eval_limit,
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
            seed=options.seed,
        )
    routes = None
    if options.routes:
        from thinkfusion.route_counting import measure_routes

        routes = measure_routes(model, tokenizer, name=name, seed=options.seed)
    path = save_report(report, output, checkpoint=options.checkpoint if is_folder else None)
    page = save_page(report, output, title=name, limit=options.transcripts, routes=routes)
    print(mode_table(report), *measured_lines(report), "", *verdict_lines(report), f"Written: {path}", page, sep="\n")


def verdict_lines(report: Any) -> list[str]:
    """The verdict, and what was measured beside the modes, as lines."""
    return [report.verdict.headline, *(f"- {line}" for line in report.verdict.findings)]
