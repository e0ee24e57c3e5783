# SPDX-License-Identifier: Apache-2.0
"""Many prompts at once: left-padded batches, a mode and a thinking budget for each prompt, samples, beams.

python examples/batch.py runs/tiny
"""

import sys

import torch

from thinkfusion import load_checkpoint, replies

model, tokenizer = load_checkpoint(sys.argv[1] if len(sys.argv) > 1 else "runs/tiny")
SUM, LARGEST = (
    "What is the sum of the digits of 293443 modulo 10?",
    "Which of the digits 5, 4, 6, 3, 2, 3 is the largest?",
)

print("Each prompt in its own mode, with its own budget:")
prompts, modes, budgets = [SUM, SUM, SUM, LARGEST], [True, True, False, False], [None, 10, None, None]
for given, budget in zip(
    replies(model, tokenizer, prompts, mode=modes, thinking_budget=budgets, max_new_tokens=120), budgets, strict=True
):
    print(f"  [{given.mode}, budget {budget}] {given.reasoning_tokens} tokens of reasoning; answer: {given.answer!r}")

print("Three samples:")
torch.manual_seed(0)
for given in replies(
    model, tokenizer, [SUM], mode="thinking", temperature=0.6, top_p=0.95, num_return_sequences=3, max_new_tokens=120
):
    print(f"  {given.answer!r}")

print("The best of three beams:")
(given,) = replies(
    model, tokenizer, [SUM], mode="thinking", temperature=0, num_beams=3, thinking_budget=40, max_new_tokens=120
)
print(f"  {given.reasoning_tokens} tokens of reasoning; answer: {given.answer!r}")
