# SPDX-License-Identifier: Apache-2.0
"""Chat in a terminal: replies stream, reasoning is shown apart and closed at a budget, the mode is switched as you go.

python examples/chat.py runs/tiny --thinking_budget 200

End a message with /think or /no_think to choose its mode; Ctrl-D ends.
"""

import argparse

from thinkfusion import load_checkpoint, stream_reply

parser = argparse.ArgumentParser()
parser.add_argument("checkpoint", nargs="?", default="runs/tiny")
parser.add_argument("--thinking_budget", type=int, help="most reasoning tokens of a reply (default: no limit)")
options = parser.parse_args()

model, tokenizer = load_checkpoint(options.checkpoint)
messages = []
while True:
    try:
        messages.append({"role": "user", "content": input("\n> ")})
    except EOFError:
        break
    # Temperature and so on are those that the checkpoint stores for the mode; greedy if it stores none.
    pieces = stream_reply(model, tokenizer, messages, thinking_budget=options.thinking_budget, max_new_tokens=1024)
    answer, shown = "", None
    for part, text in pieces:
        if part != shown:
            print(f"\n[{part}] ", end="")
            shown = part
        print(text, end="", flush=True)
        answer += text if part == "answer" else ""
    print()
    # Only the answer is kept: reasoning of earlier turns is not shown to the model.
    messages.append({"role": "assistant", "content": answer.strip() or "…"})
