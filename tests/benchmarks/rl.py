# SPDX-License-Identifier: Apache-2.0
"""What RL in both modes costs beyond TRL's own: steps of ours and of a plain `GRPOTrainer`, by turns.

    python tests/benchmarks/rl.py --json rl.json

Two trainers in one process, each with a copy of the same random model, the same prompts (ours: every prompt in both
modes; plain: the same rendered prompts as a data set), as many generations of as many tokens, the same settings, loss
and rewards of the same work. A block of steps of one is followed by a block of the other, in an order that changes;
what is printed is the ratio of their times, ours over plain: the median over pairs of blocks, with its standard error
from the quartiles. The model is random and every reply is as long as allowed, so that both do the same work.
"""

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from datasets import Dataset
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import GRPOTrainer

from thinkfusion import (
    Mode,
    ThinkFusionGRPOConfig,
    ThinkFusionGRPOTrainer,
    correctness,
    format_reward,
    install_chat_template,
    split_reply,
    task_prompts,
)
from thinkfusion.checkpointing import tiny_base_path
from thinkfusion.sequences import MODES

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
WARM_UP = 1
"""Pairs of blocks that are not counted."""


def random_model(options: argparse.Namespace, vocabulary: int) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.hidden,
        moe_intermediate_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 32,
        num_key_value_heads=options.hidden // 32,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = Qwen3MoeForCausalLM(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight, 0.0, 0.1)
    model.set_experts_implementation("eager")
    return model


def settings(options: argparse.Namespace, folder: str) -> ThinkFusionGRPOConfig:
    return ThinkFusionGRPOConfig(
        folder,
        per_device_train_batch_size=2 * options.prompts * options.generations,
        num_generations=options.generations,
        max_completion_length=options.tokens,
        max_steps=10**6,
        logging_steps=1,
        learning_rate=1e-5,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        # No reply ends of itself, so that all are equally long.
        generation_kwargs={"min_new_tokens": options.tokens},
    )


def trainers(options: argparse.Namespace, folder: str) -> dict[str, GRPOTrainer]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base_path())
    install_chat_template(tokenizer)
    prompts = task_prompts(8 * options.prompts)
    ours = ThinkFusionGRPOTrainer(
        random_model(options, len(tokenizer)),
        settings(options, folder),
        train_dataset=prompts,
        processing_class=tokenizer,
    )
    rows = [
        {"prompt": tokenizer.decode(ours._prompt_ids[2 * place + number]), "prompt_number": place, "mode": str(mode)}
        for place in range(len(prompts))
        for number, mode in enumerate(MODES)
    ]

    # TRL's own way to write the same two rewards; the second finds the replies as the first has split them.
    split: list[Any] = []

    def right(completion_ids: Any, prompt_number: Any, mode: Any, **_: Any) -> list[float]:
        given = zip(completion_ids, mode, strict=True)
        split[:] = [split_reply(ids, Mode(each), tokenizer=tokenizer) for ids, each in given]
        return [correctness(prompts[number], reply) for number, reply in zip(prompt_number, split, strict=True)]

    def form(prompt_number: Any, **_: Any) -> list[float]:
        return [format_reward(prompts[number], reply) for number, reply in zip(prompt_number, split, strict=True)]

    plain = GRPOTrainer(
        random_model(options, len(tokenizer)),
        reward_funcs=[right, form],
        args=settings(options, folder),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    # The same prompts in the same steps: others would be padded to another length.
    plain._get_train_sampler = ThinkFusionGRPOTrainer._get_train_sampler.__get__(plain)
    return {"ours": ours, "plain": plain}


class Stop(transformers.TrainerCallback):
    """Times the steps of a block, and ends it; the first step of a block, with what starting takes, is not timed."""

    def __init__(self, steps: int, clock: str) -> None:
        self.steps, self.clock, self.began, self.seconds = steps, CLOCKS[clock], 0.0, 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == 1:
            self.began = self.clock()
        if state.global_step > self.steps:
            self.seconds = self.clock() - self.began
            control.should_training_stop = True
        return control


def measure(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        both = trainers(options, folder)
        stops = {name: Stop(options.steps, options.clock) for name in both}
        for name, trainer in both.items():
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.add_callback(stops[name])
        pairs = []
        for turn in range(options.pairs + WARM_UP):
            for name in ("ours", "plain") if turn % 2 else ("plain", "ours"):
                both[name]._step = 0
                both[name].train()
            pairs.append({name: stop.seconds / options.steps for name, stop in stops.items()})
    pairs = pairs[WARM_UP:]
    ratios = [pair["ours"] / pair["plain"] for pair in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "median_ratio": middle,
        "error": 1.253 * (high - low) / 1.349 / math.sqrt(len(ratios)),
        "quartiles": [low, high],
        "pairs": len(ratios),
        "seconds_ours": statistics.median(pair["ours"] for pair in pairs),
        "seconds_plain": statistics.median(pair["plain"] for pair in pairs),
        "options": {name: value for name, value in vars(options).items() if name != "json"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4, help="of a step, each in both modes (default 4)")
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32, help="of every reply (default 32)")
    parser.add_argument("--hidden", type=int, default=96)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2, help="of a block (default 2)")
    parser.add_argument("--pairs", type=int, default=20, help="of blocks (default 20)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu, with one thread: beside other work")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    found = measure(options)
    print(
        f"rl: ours {found['median_ratio']:.4f} times as long as a plain GRPOTrainer (± {found['error']:.4f}; quartiles "
        f"{found['quartiles'][0]:.4f} and {found['quartiles'][1]:.4f}; {found['pairs']} pairs; a step "
        f"{found['seconds_ours']:.3f} and {found['seconds_plain']:.3f} s)"
    )
    if options.json is not None:
        options.json.write_text(json.dumps({"ratios": {"rl": found["median_ratio"]}, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
