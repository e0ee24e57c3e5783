# SPDX-License-Identifier: Apache-2.0
"""The command `thinkfusion`: each verb reads its flags and calls one function."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from thinkfusion.conversations import DataError
from thinkfusion.modes import Mode, split_soft_switch

DIM, PLAIN = "\033[2m", "\033[0m"


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
        options.run(options)
    except (DataError, FileNotFoundError, ValueError) as error:
        print(f"thinkfusion {options.verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="thinkfusion", description="One model, two modes, and a switch that works.")
    verbs = parser.add_subparsers(dest="verb", required=True)

    evaluate = verbs.add_parser("evaluate", help="measure both modes of a checkpoint")
    evaluate.set_defaults(run=_evaluate)
    evaluate.add_argument("checkpoint", help="a folder, or a Hub id")
    evaluate.add_argument("--samples", type=_positive, default=1000, help="prompts per mode (default 1000)")
    evaluate.add_argument("--output", help="folder for mode_report.json (default: the checkpoint's, if it is one)")
    evaluate.add_argument("--prompts", help="a file of your own prompts: prompt, question or messages; answer")
    evaluate.add_argument("--answer_separator", help="the answer is what follows this text, e.g. '####'")
    evaluate.add_argument("--batch_size", type=_positive, default=128)
    evaluate.add_argument("--seed", type=int, default=0)
    _generation_flags(evaluate, max_new_tokens=512)

    chat = verbs.add_parser("chat", help="talk to a checkpoint, switching modes as you go")
    chat.set_defaults(run=_chat)
    chat.add_argument("checkpoint", help="a folder, or a Hub id")
    chat.add_argument("prompt", nargs="?", help="ask this, print the reply and end")
    chat.add_argument("--mode", help="thinking or non_thinking (default: the template's)")
    chat.add_argument("--system", help="a system message")
    _generation_flags(chat, max_new_tokens=1024)
    return parser


def _generation_flags(parser: argparse.ArgumentParser, *, max_new_tokens: int) -> None:
    parser.add_argument("--max_new_tokens", type=_positive, default=max_new_tokens)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy decoding (default)")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the checkpoint")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _load(options: argparse.Namespace) -> tuple[Any, Any]:
    import torch
    from transformers.utils import logging

    from thinkfusion.checkpointing import load_checkpoint

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, tokenizer = load_checkpoint(options.checkpoint, trust_remote_code=options.trust_remote_code)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _evaluate(options: argparse.Namespace) -> None:
    from thinkfusion.evaluation import evaluate_modes, read_prompts
    from thinkfusion.reporting import mode_table, save_report

    prompts = None
    if options.prompts is not None:
        prompts = read_prompts(options.prompts, answer_separator=options.answer_separator, limit=options.samples)
    model, tokenizer = _load(options)
    report = evaluate_modes(
        model,
        tokenizer,
        prompts,
        samples=options.samples,
        seed=options.seed,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
    )
    output = options.output or (options.checkpoint if os.path.isdir(options.checkpoint) else ".")
    path = save_report(report, output)
    print(mode_table(report))
    print(f"Written: {path}")


def _chat(options: argparse.Namespace) -> None:
    mode = None if options.mode is None else Mode.parse(options.mode)
    model, tokenizer = _load(options)
    messages: list[dict[str, Any]] = []
    if options.system is not None:
        messages.append({"role": "system", "content": options.system})
    if options.prompt is not None:
        _say(model, tokenizer, [*messages, {"role": "user", "content": options.prompt}], mode, options)
        return
    print("End a message with /think or /no_think to switch; /think or /no_think alone switches from here on;")
    print("/new begins a new conversation; Ctrl-D ends.")
    system = list(messages)
    while True:
        try:
            text = input("\n> ")
        except EOFError:
            print()
            return
        rest, asked = split_soft_switch(text)
        if text.strip() == "/new":
            messages = list(system)
        elif asked is not None and not rest.strip():
            mode = asked
            print(f"[{mode.value.replace('_', '-')} from here on]")
        elif text.strip():
            messages.append({"role": "user", "content": text})
            answer = _say(model, tokenizer, messages, asked or mode, options)
            messages.append({"role": "assistant", "content": answer or "…"})


def _say(
    model: Any, tokenizer: Any, messages: list[dict[str, Any]], mode: Mode | None, options: argparse.Namespace
) -> str:
    """Print the reply as it comes, reasoning dimmed (in a terminal), and return its answer."""
    from thinkfusion.generation import stream_reply

    dim, plain = (DIM, PLAIN) if sys.stdout.isatty() else ("", "")
    answer, last = "", None
    for part, text in stream_reply(
        model,
        tokenizer,
        messages,
        mode=mode,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
    ):
        shown = "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")
        if part != last:
            heading = f"{dim}[thinking] " if part == "reasoning" else f"{plain}\n" if last == "reasoning" else ""
            print(heading, end="")
            last = part
        print(shown, end="", flush=True)
        answer += text if part == "answer" else ""
    print(plain)
    return answer.strip()


if __name__ == "__main__":
    sys.exit(main())
