# SPDX-License-Identifier: Apache-2.0
"""One conversation, the mode chosen turn by turn: by the argument, by a soft switch in the text, by default.

python examples/switch_modes.py runs/tiny
"""

import sys

from thinkfusion import load_checkpoint, reply, stream_reply

model, tokenizer = load_checkpoint(sys.argv[1] if len(sys.argv) > 1 else "runs/tiny")

turns = [
    ("What is the sum of the digits of 293443 modulo 10?", "thinking"),
    ("Which of the digits 5, 4, 6, 3, 2, 3 is the largest?", "non_thinking"),
    ("4611의 숫자를 역순으로 쓰면 무엇입니까? /no_think", None),
    ("다이얼을 눈금 0에서 시작하여 -5 -1 +6 만큼 돌립니다. 어떤 숫자에 도착합니까? /think", None),
]
for question, mode in turns:
    answered = reply(model, tokenizer, question, mode=mode, max_new_tokens=120)
    print(f"\n> {question}   [{answered.mode}]")
    if answered.reasoning:
        print(f"  thought: {answered.reasoning}")
    print(f"  answer:  {answered.answer}")

print("\nThe same, streamed:")
for part, text in stream_reply(model, tokenizer, [{"role": "user", "content": turns[0][0]}], max_new_tokens=120):
    print(f"{part}: {text!r}")
