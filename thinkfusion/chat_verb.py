# SPDX-License-Identifier: Apache-2.0
"""The verb `chat`: its flags, one prompt in one mode or both, and a conversation that switches as it goes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from thinkfusion.flags import not_negative, positive
from thinkfusion.modes import Mode, split_soft_switch

DIM, PLAIN = "\033[2m", "\033[0m"


def chat_flags(parser: argparse.ArgumentParser) -> None:
    """What is not given of the sampling is the checkpoint's default for the mode."""
    parser.add_argument("checkpoint", help="a folder, or a Hub id")
    parser.add_argument("prompt", nargs="?", help="ask this, print the reply and end")
    parser.add_argument("--mode", help="thinking, non_thinking, or both for one prompt (default: the template's)")
    parser.add_argument("--system", help="a system message")
    parser.add_argument("--thinking_budget", type=not_negative, metavar="N", help="close reasoning after N tokens")
    parser.add_argument("--max_new_tokens", type=positive, default=1024)
    parser.add_argument("--temperature", type=float, help="0 is greedy decoding (default: the checkpoint's)")
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the checkpoint")


def chat_with(options: argparse.Namespace, load: Callable[[str], tuple[Any, Any]]) -> None:
    """Talk to the checkpoint that `load` makes of its name. Raises ValueError for a mode that is not understood."""
    both = options.mode == "both"
    if both and options.prompt is None:
        raise ValueError("--mode: found both, which is for one prompt. End messages with /think or /no_think.")
    mode = None if options.mode is None or both else Mode.parse(options.mode)
    model, tokenizer = load(options.checkpoint)
    messages: list[dict[str, Any]] = []
    if options.system is not None:
        messages.append({"role": "system", "content": options.system})
    if options.prompt is not None:
        for each in Mode if both else (mode,):
            if both:
                print(f"{each}:")
            _say(model, tokenizer, [*messages, {"role": "user", "content": options.prompt}], each, options)
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
        thinking_budget=options.thinking_budget,
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
