# SPDX-License-Identifier: Apache-2.0
"""What transformers replies, greedily, in float32; and whether a reply that differs is a tie of two tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from thinkfusion import task_prompts
from thinkfusion.generation import Prompter, Sampling
from thinkfusion.modes import Mode, Reply
from thinkfusion.prompts import EvaluationPrompt
from thinkfusion.replying import Replier, reply_in_both_modes

PROMPTS = 200
MOST_TOKENS = 256
END = "<|im_end|>"
TIE = 1e-4
"""Two logits that are no further apart may change places from one engine to another."""


@dataclass(frozen=True)
class Reference:
    model: Any
    tokenizer: Any
    prompts: list[EvaluationPrompt]

    @classmethod
    def load(cls, checkpoint: Path) -> Reference:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        return cls(model, AutoTokenizer.from_pretrained(checkpoint), task_prompts(PROMPTS))

    @cached_property
    def prompter(self) -> Prompter:
        return Prompter(self.tokenizer)

    @cached_property
    def replies(self) -> dict[Mode, list[Reply]]:
        replier = Replier(self.model, self.tokenizer, Sampling(MOST_TOKENS), progress=False)
        return reply_in_both_modes(replier, self.prompts)[0]

    def margin(self, index: int, mode: Mode, theirs: str) -> tuple[float, str]:
        """How far apart the two tokens are where `theirs`, the text of a reply, leaves ours; and a line about it.

        Infinite if their token is not the second best there: then it is no tie, whatever the logits are.
        """
        prompt = self.prompter.prompt_ids(self.prompts[index].messages, mode)
        ours, other = (self.ids(text + END) for text in (written(self.replies[mode][index]), theirs))
        place = next((n for n, (a, b) in enumerate(zip(ours, other, strict=False)) if a != b), -1)
        if place < 0:
            return float("inf"), f"prompt {index}, {mode.value}: the same tokens, split or ended elsewhere: {theirs!r}"
        ids = torch.tensor([[*prompt, *ours[:place]]])
        with torch.no_grad():
            logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1]
        best = logits.topk(2)
        pair = {ours[place], other[place]} == set(best.indices.tolist())
        apart = float(best.values[0] - best.values[1])
        line = f"prompt {index}, {mode.value}, token {place}: top logits {apart:.2e} apart, top two {pair}"
        return (apart if pair else float("inf")), line

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def written(reply: Reply) -> str:
    """The text of a reply as the model wrote it, up to its end."""
    return "".join(reply.pieces).strip()
