# SPDX-License-Identifier: Apache-2.0
"""The switch probe: what a checkpoint would write where the modes part, by one forward pass and no generation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from thinkfusion.conversations import Conversation
from thinkfusion.intervals import mean
from thinkfusion.modes import Mode
from thinkfusion.rendering import render, scheme_of
from thinkfusion.tasks import generate_samples

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def measure_probe(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, samples: int = 64, seed: int = 0
) -> dict[str, Any]:
    """Teacher-forced probabilities on reference rows of the embedded tasks that are kept for evaluation.

    Means with intervals: `closes`, of the closing token after a whole trace; `trace_begins` and `answer_begins`, of
    the reference's first token after the prefix of thinking and of non-thinking mode. A switch that works has all
    three near those of its training data; `closes` near 0 is a trace that will never end, whatever the loss says.
    """
    import torch

    scheme = scheme_of(tokenizer)
    closing = tokenizer.convert_tokens_to_ids(scheme.closing_token)
    config, training = model.config.get_text_config(), model.training
    logits = getattr(config, "output_router_logits", None)
    found: dict[str, list[float]] = {"closes": [], "trace_begins": [], "answer_begins": []}
    model.eval()
    if logits is not None:
        config.output_router_logits = False
    try:
        for sample in generate_samples(samples, seed=seed, split="evaluation"):
            answer = {"role": "assistant", "content": sample.answer, "reasoning_content": sample.reasoning}
            row = Conversation.from_messages([{"role": "user", "content": sample.question}, answer])
            for mode in Mode:
                rendered = render(row, tokenizer, mode)
                first = rendered.trained.index(True)
                places = {"trace_begins" if mode is Mode.THINKING else "answer_begins": first}
                if mode is Mode.THINKING and closing in rendered.ids[first:]:
                    places["closes"] = rendered.ids.index(closing, first)
                with torch.no_grad():
                    scores = model(torch.tensor([rendered.ids], device=model.device)).logits[0].float()
                for name, place in places.items():
                    found[name].append(float(scores[place - 1].softmax(-1)[rendered.ids[place]]))
    finally:
        model.train(training)
        if logits is not None:
            config.output_router_logits = logits
    figures: dict[str, Any] = {"samples": samples}
    for name, values in found.items():
        figures |= mean(name, values)
    return figures
