# SPDX-License-Identifier: Apache-2.0
"""The command `thinkfusion`: each verb reads its flags and calls one function."""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thinkfusion.chat_verb import chat_flags, chat_with
from thinkfusion.conversations import DataError
from thinkfusion.evaluate_verb import evaluate_checkpoint, evaluate_flags
from thinkfusion.flags import (
    FUSION_GROUPS,
    add_option_flags,
    fuse_flags,
    not_negative,
    plan_flags,
    positive,
    read_options,
)
from thinkfusion.pairs_verb import pairs_flags, write_pairs
from thinkfusion.row_report import printable
from thinkfusion.sequences import ON_LONG_ROW, Plan
from thinkfusion.sources import Source


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status. Errors a user can mend are one line on stderr, and status 1."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes an optional positional only in front of the flags, and a prompt reads best behind them.
    if options.verb == "chat" and options.prompt is None and len(rest) == 1 and not rest[0].startswith("-"):
        options.prompt = rest.pop()
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return int(options.run(options) or 0)
    except BrokenPipeError:
        # Who reads our output has seen enough; what is still buffered must not raise when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (DataError, OSError, ValueError) as error:
        # A message may quote the data, and the name of a file may be anything.
        print(f"thinkfusion {options.verb}: {printable(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="thinkfusion", description="One model, two modes, and a switch that works.")
    verbs = parser.add_subparsers(dest="verb", required=True)

    evaluate = verbs.add_parser("evaluate", help="measure both modes of a checkpoint")
    evaluate.set_defaults(run=_evaluate)
    evaluate_flags(evaluate)

    chat = verbs.add_parser("chat", help="talk to a checkpoint, switching modes as you go")
    chat.set_defaults(run=lambda options: chat_with(options, lambda name: _load(options, name)))
    chat_flags(chat)

    pairs = verbs.add_parser("generate-pairs", help="paired data from prompts: the model's own right replies")
    pairs.set_defaults(run=lambda options: write_pairs(options, lambda name: _load(options, name)))
    pairs_flags(pairs)

    push = verbs.add_parser("push", help="upload a checkpoint to the Hub, with a model card of what was measured")
    push.set_defaults(run=_push)
    _push_flags(push)

    plan = verbs.add_parser("plan", help="see what training takes of a GPU's memory, before loading anything")
    plan.set_defaults(run=_plan_memory)
    plan_flags(plan)

    fuse = verbs.add_parser("fuse", help="merge a thinking and a non-thinking checkpoint of one base")
    fuse.set_defaults(run=_fuse)
    fuse_flags(fuse)

    routes = verbs.add_parser("routes", help="see which experts the modes use: is a router collapsing?")
    routes.set_defaults(run=_routes)
    _routes_flags(routes)

    inspect = verbs.add_parser("inspect", help="see what training would learn from your rows")
    inspect.set_defaults(run=_inspect)
    _inspect_flags(inspect)
    return parser


def _push_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a folder")
    parser.add_argument("repo", help="owner/name; made if it is not there")
    parser.add_argument("--public", action="store_true", help="for everybody; by default it is private")
    parser.add_argument("--license", help="the Hub's identifier, such as apache-2.0 (default: that of the base's card)")
    parser.add_argument("--base-model", metavar="ID", help="the base's Hub id, where the checkpoint does not name it")
    parser.add_argument("--report", metavar="FILE", help="the mode report (default: the checkpoint's)")
    parser.add_argument(
        "--without-report",
        action="store_true",
        help="upload what was not measured, or has changed since; the card says so",
    )
    parser.add_argument("--message", default="Upload a model with two modes, by thinkfusion", help="of the commit")
    parser.add_argument("--dry-run", action="store_true", help="show the files and the card, and upload nothing")


def _inspect_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="a file, a pattern in quotes, or a Hub id")
    parser.add_argument("--model", default="tiny-base", help="whose tokenizer and markup (default: the embedded base)")
    parser.add_argument("--scheme", help="how a prompt announces a mode: control or empty-block")
    parser.add_argument("--dialect", help="the markup (default: the model's own)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")

    shown = parser.add_argument_group("what is shown")
    shown.add_argument("--samples", type=not_negative, default=3, help="how many rows are shown (default 3)")
    shown.add_argument("--row", type=positive, metavar="N", help="show the row of this number, skipped or not")
    shown.add_argument(
        "--tree", action="store_true", help="draw the fusion trees of these rows, and count their tokens"
    )
    shown.add_argument("--svg", metavar="FILE", help="write a picture of the first of these trees")
    shown.add_argument("--strict", action="store_true", help="end with an error at the first bad row")
    shown.add_argument("--json", action="store_true", help="print the totals as one JSON object, and nothing else")
    shown.add_argument("--html", metavar="FILE", help="write a page that shows the same")
    shown.add_argument("--report", metavar="FILE", help="write the totals and every skipped or altered row, as JSON")
    shown.add_argument(
        "--color", choices=("auto", "always", "never"), default="auto", help="auto: in a terminal, without NO_COLOR"
    )

    _reading_flags(parser)


def _routes_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a folder, with weights or an adapter, or a Hub id; tiny-base")
    parser.add_argument(
        "--dataset", nargs="+", metavar="SOURCE", help="files, patterns in quotes or Hub ids (default: embedded tasks)"
    )
    parser.add_argument("--samples", type=positive, default=256, help="conversations, drawn evenly (default 256)")
    parser.add_argument("--batch_size", "--batch-size", type=positive, default=8, help="sequences (default 8)")
    parser.add_argument("--output", help="folder of what is written (default: the checkpoint's, if it is one)")
    parser.add_argument("--json", action="store_true", help="print what routes.json holds, and nothing else")
    parser.add_argument("--scheme", help="where the checkpoint has no template of ours: control or empty-block")
    parser.add_argument("--dialect", help="and its markup (default: the model's own)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the checkpoint")
    _reading_flags(parser)


def _reading_flags(parser: argparse.ArgumentParser) -> None:
    """How rows are read, mixed and shortened."""
    read = parser.add_argument_group("as in training")
    read.add_argument("--weights", type=float, nargs="+", metavar="WEIGHT", help="one for each source: 2, 0.5")
    read.add_argument("--split", default="train", help="of a Hub id (default train)")
    read.add_argument("--streaming", action="store_true", help="read Hub ids without downloading them first")
    read.add_argument("--processes", type=positive, default=1, help="how many work at once (default 1)")
    read.add_argument("--max_length", type=positive, help="longest sequence allowed, in tokens")
    read.add_argument("--on_long_row", choices=ON_LONG_ROW, default="error", help="what becomes of longer ones")
    add_option_flags(read, INSPECTED)


INSPECTED = {"on_bad_row": "skip", "max_skipped": 1.0}
"""Defaults of `inspect` and `routes` that differ from those of training: what is wrong is counted."""


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _load(options: argparse.Namespace, name: str | None = None) -> tuple[Any, Any]:
    import torch

    from thinkfusion.checkpointing import load_checkpoint

    _quiet()
    name = options.checkpoint if name is None else name
    model, tokenizer = load_checkpoint(name, trust_remote_code=options.trust_remote_code)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _evaluate(options: argparse.Namespace) -> None:
    evaluate_checkpoint(options, lambda name: _load(options, name))


def _push(options: argparse.Namespace) -> None:
    """Show what would go up, and send it."""
    from thinkfusion.publishing import plan_upload, require_token, send

    if not options.dry_run:
        require_token()  # before anything is read
    upload = plan_upload(
        options.checkpoint,
        options.repo,
        report=options.report,
        without_report=options.without_report,
        license=options.license,
        base_model=options.base_model,
    )
    print(upload, flush=True)
    if options.dry_run:
        print(f"\n{upload.card}")
        return
    print(f"Uploaded: {send(upload, public=options.public, message=options.message)}")


def _plan_memory(options: argparse.Namespace) -> None:
    """Print the plan, whether anything fits or not; ValueError if a file was asked for and nothing fits."""
    _quiet()
    from thinkfusion.activations import Setup
    from thinkfusion.planning import plan_memory, read_config
    from thinkfusion.sharding import choose_sharding, config_text, write_accelerate_config

    setup = Setup(
        options.method,
        options.gpus,
        options.gpu_memory,
        options.sequence_length,
        options.layout,
        options.batch_size,
        options.lora_r,
        not options.no_bf16,
        not options.no_gradient_checkpointing,
    )
    config = read_config(options.model, trust_remote_code=options.trust_remote_code, revision=options.revision)
    plan, sharding = plan_memory(config, setup), choose_sharding(config, options.layout)
    strategy = options.strategy or plan.chosen
    launch = None if strategy is None else config_text(strategy, sharding, gpus=setup.gpus, bf16=setup.bf16)
    if options.write_accelerate_config is not None:
        if strategy is None:
            raise ValueError(f"nothing fits, so there is no configuration to write. {' '.join(plan.remarks)}")
        write_accelerate_config(options.write_accelerate_config, strategy, sharding, gpus=setup.gpus, bf16=setup.bf16)
    if options.json:
        print(json.dumps({**plan.to_dict(), "sharding": sharding.to_dict(), "accelerate_config": launch}))
    else:
        print(plan, *(f"- {remark}" for remark in sharding.remarks), sep="\n")
        print(f"experts_implementation: {sharding.experts_implementation}, ", end="")
        print(f"attn_implementation: {sharding.attn_implementation}")
        print(f"\n{launch}" if launch else "", end="")


def _fuse(options: argparse.Namespace) -> None:
    """Fuse two checkpoints or adapters at one ratio, or at the best of several."""
    if options.sweep is not None and options.ratio is not None:
        raise ValueError("sweep: it finds the ratio; leave --ratio out.")
    from thinkfusion.adapter_fusing import fuse_adapters, is_adapter
    from thinkfusion.fusing import FusionOptions, fuse_checkpoints
    from thinkfusion.sweeping import ratios_of

    _quiet()
    groups = {kind: getattr(options, kind) for kind in FUSION_GROUPS if getattr(options, kind) is not None}
    ratio = 0.8 if options.ratio is None else options.ratio
    chosen = FusionOptions(ratio, options.method, options.scale, options.density, groups)
    adapters = is_adapter(options.thinking)
    if adapters and chosen != FusionOptions(ratio):
        raise ValueError("adapters are fused linearly, at one ratio: leave the method and its settings out.")
    if options.sweep is not None:
        _fuse_best(options, ratios_of(options.sweep), chosen)
    elif adapters:
        folder = fuse_adapters(
            options.thinking, options.non_thinking, options.output, ratio, texts_from=options.texts_from
        )
        print(f"{folder}: an adapter with the ranks of both, and {ratio:g} of the thinking one's update.")
    else:
        print(
            fuse_checkpoints(
                options.thinking,
                options.non_thinking,
                options.output,
                chosen,
                base=options.base,
                texts_from=options.texts_from,
                progress=sys.stderr.isatty(),
            )
        )


def _fuse_best(options: argparse.Namespace, ratios: list[float], chosen: Any) -> None:
    import torch

    from thinkfusion.evaluation import read_prompts
    from thinkfusion.sweeping import sweep_and_fuse

    prompts = None
    if options.prompts is not None:
        prompts = read_prompts(options.prompts, answer_separator=options.answer_separator, limit=options.samples)
    found = sweep_and_fuse(
        options.thinking,
        options.non_thinking,
        options.output,
        ratios,
        chosen,
        base=options.base,
        texts_from=options.texts_from,
        device="cuda" if torch.cuda.is_available() else "cpu",
        prompts=prompts,
        samples=options.samples,
        seed=options.seed,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        progress=sys.stderr.isatty(),
    )
    print(found)
    print(f"Written: {options.output}, with sweep.json, sweep.png and mode_report.json")


def _routes(options: argparse.Namespace) -> None:
    """Count routes, write them as JSON, page and picture, and print them; the picture comes last, it may be missing."""
    plan = _plan(options)
    sources = None if options.dataset is None else _sources(options, options.dataset)
    if sources is None and options.weights is not None:
        raise ValueError("weights: only with --dataset, one for each source.")
    from thinkfusion.chat_templates import install_chat_template, installed_template
    from thinkfusion.route_counting import measure_routes
    from thinkfusion.route_drawing import routes_page, save_png
    from thinkfusion.route_verdict import routes_table
    from thinkfusion.sources import as_sources

    if sources is not None:
        as_sources(sources)  # what is not there is known before anything is loaded
    model, tokenizer = _load(options)
    installed = installed_template(tokenizer)
    if installed is None or options.scheme or options.dialect:
        scheme = options.scheme or (installed.scheme.name if installed else "control")
        install_chat_template(tokenizer, model, scheme=scheme, dialect=options.dialect)
        if installed is None and not options.json:
            print("The checkpoint has no template with a switch; it is given one, as training begins with.")
    output = Path(options.output or (options.checkpoint if os.path.isdir(options.checkpoint) else "."))
    output.mkdir(parents=True, exist_ok=True)
    counted = measure_routes(
        model,
        tokenizer,
        sources,
        plan,
        name=options.checkpoint,
        samples=options.samples,
        seed=plan.mixture.seed,
        batch_size=options.batch_size,
        processes=options.processes,
        progress=sys.stderr.isatty(),
    )
    found = json.dumps(counted.to_dict(), ensure_ascii=False)
    _write(str(output / "routes.json"), found + "\n")
    _write(str(output / "routes.html"), routes_page(counted))
    print(found if options.json else routes_table(counted))
    save_png(counted, output / "routes.png")
    if not options.json:
        print(f"Written: {output}/routes.json, routes.html, routes.png")


def _inspect(options: argparse.Namespace) -> int:
    """Print what training would learn; 1 if it would learn nothing."""
    plan, sources = _plan(options), _sources(options, options.sources)
    from thinkfusion.displaying import html_page, terminal_text, tree_picture
    from thinkfusion.inspecting import inspect_sources, load_tokenizer

    _quiet()
    tokenizer = load_tokenizer(
        options.model, scheme=options.scheme, dialect=options.dialect, trust_remote_code=options.trust_remote_code
    )
    inspection = inspect_sources(
        sources,
        tokenizer,
        plan,
        samples=options.samples,
        row=options.row,
        processes=options.processes,
        trees=options.tree or options.svg is not None,
    )
    if options.report is not None:
        inspection.report.save(options.report)
    if options.html is not None:
        _write(options.html, html_page(inspection))
    if options.svg is not None:
        _write(options.svg, tree_picture(inspection))
    if options.json:
        print(json.dumps(inspection.to_dict()))
    else:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        width = shutil.get_terminal_size((100, 24)).columns
        print(terminal_text(inspection, colours=_colours(options.color), width=width), end="", flush=True)
    return 0 if inspection.report.kept else 1


def _write(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")


def _plan(options: argparse.Namespace) -> Plan:
    """What the flags say of reading, mixing and reasoning; raises ValueError for what contradicts itself."""
    given = {**INSPECTED, **vars(options)}
    if getattr(options, "strict", False):
        given["on_bad_row"] = "error"
    return Plan(*read_options(given), options.max_length, options.on_long_row)


def _sources(options: argparse.Namespace, names: Sequence[str]) -> list[Source]:
    weights = options.weights or [1.0] * len(names)
    if len(weights) != len(names):
        raise ValueError(f"weights: found {len(weights)} for {len(names)} sources, expected one for each (--weights).")
    return [Source(name, weight, options.split, options.streaming) for name, weight in zip(names, weights, strict=True)]


def _colours(wanted: str) -> bool:
    """Whether to colour: by default in a terminal, unless NO_COLOR is set (no-color.org)."""
    if wanted != "auto":
        return wanted == "always"
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


if __name__ == "__main__":
    sys.exit(main())
