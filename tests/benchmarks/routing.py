# SPDX-License-Identifier: Apache-2.0
"""What watching the routes costs a training step: steps with probes, callback and log, and steps without, in turn.

    python tests/benchmarks/routing.py --json routing.json

One trainer, one model, whole steps of its own loop: the data, forward, backward, optimizer, callbacks and logs. Steps
come in pairs, with probes and without, in an order that changes; a pair's ratio is that of its two times, and what is
printed is their median, with its standard error from the quartiles. In a step with probes `routing_steps` is 1: the
counts are read, and their figures logged, at every step, which is more often than anyone needs. `--every N` reads
them every N steps with probes.

A step without probes is that of a trainer without `routing_steps`: the number of hooks on routers is counted in the
middle of a forward pass of either kind, and of a trainer of its own whose `routing_steps` is 0.
"""

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from datasets import Dataset
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainerCallback

from thinkfusion import ThinkFusionConfig, ThinkFusionTrainer, install_chat_template
from thinkfusion.callbacks import RoutingCallback
from thinkfusion.checkpointing import tiny_base_path
from thinkfusion.moe import moe_layers

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
WARM_UP = 2
"""Pairs that are not counted."""


@dataclass(frozen=True)
class Size:
    hidden: int
    layers: int
    experts: int
    top_k: int
    expert_width: int
    tokens: int
    batch: int
    pairs: int


SIZES = {
    "smoke": Size(64, 2, 4, 2, 32, 16, 2, 2),
    "small": Size(128, 4, 8, 2, 128, 128, 8, 60),
    "large": Size(512, 8, 32, 4, 192, 512, 4, 12),
}


def random_model(size: Size, vocabulary: int) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.expert_width,
        moe_intermediate_size=size.expert_width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 64,
        num_key_value_heads=max(1, size.hidden // 128),
        head_dim=64,
        num_experts=size.experts,
        num_experts_per_tok=size.top_k,
        norm_topk_prob=True,
        max_position_embeddings=2 * size.tokens,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=0,
    )
    return Qwen3MoeForCausalLM(config)


def full_rows(size: Size, count: int, vocabulary: int) -> Dataset:
    """Rows of random tokens as `prepare` makes them, all of one length, half of each mode, half of each in the loss."""
    drawn = torch.randint(1, vocabulary, (count, size.tokens), generator=torch.Generator().manual_seed(1)).tolist()
    half = size.tokens // 2
    rows = [
        {"input_ids": ids, "labels": [-100] * half + ids[half:], "mode": number % 2, "conversation": number}
        for number, ids in enumerate(drawn)
    ]
    return Dataset.from_list(rows)


class Turns(TrainerCallback):
    """Switches the probes on and off, step by step, and takes the time from one step's beginning to the next."""

    def __init__(self, probes: "Probes", clock: str) -> None:
        self.probes, self.clock, self.began = probes, CLOCKS[clock], 0.0
        self.seconds: list[tuple[bool, float]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = self.clock()
        if self.began:
            self.seconds.append((self.probes.on, now - self.began))
        step = state.global_step
        # on off, off on, on off, …: which of a pair is first, and finds the caches as the other left them, changes.
        self.probes.set((step % 2 == 0) == (step // 2 % 2 == 0))
        self.began = self.clock()


class Probes:
    """The probes of a trainer, taken away and put back; and the hooks on routers, counted within a forward pass."""

    def __init__(self, trainer: ThinkFusionTrainer, every: int) -> None:
        self.trainer, self.routes, self.on = trainer, trainer._routes, trainer._routes is not None
        self.callback = next(
            (each for each in trainer.callback_handler.callbacks if isinstance(each, RoutingCallback)), None
        )
        self.every, self.watched, self.hooks = every, 0, dict[bool, int]()
        routers = [trainer.model.get_submodule(layer.router) for layer in moe_layers(trainer.model)]
        norm, forward = trainer.model.model.norm, trainer.model.model.norm.forward

        def counting(hidden: torch.Tensor) -> torch.Tensor:
            self.hooks[self.on] = sum(len(router._forward_hooks) for router in routers)
            return forward(hidden)

        norm.forward = counting

    def set(self, on: bool) -> None:
        self.on = on
        self.trainer._routes = self.routes if on else None
        self.watched += on
        # Where nothing is due, it asks for nothing.
        self.callback.every_steps = 1 if on and self.watched % self.every == 0 else 1 << 60


def trained(
    size: Size, folder: str, *, routing_steps: int, steps: int, every: int = 1, clock: str = "wall"
) -> tuple[Probes, list[tuple[bool, float]]]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base_path())
    install_chat_template(tokenizer)
    model = random_model(size, len(tokenizer))
    settings = ThinkFusionConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=size.batch,
        sequence_layout="padded",
        routing_steps=routing_steps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    rows = full_rows(size, 4 * size.batch, len(tokenizer))
    trainer = ThinkFusionTrainer(model, settings, train_dataset=rows, processing_class=tokenizer)
    trainer.remove_callback(transformers.PrinterCallback)
    probes, turns = Probes(trainer, every), None
    if routing_steps:
        turns = Turns(probes, clock)
        trainer.add_callback(turns)
    trainer.train()
    logged = [each for each in trainer.state.log_history if "routing_overlap" in each]
    expected = probes.watched // every
    if abs(len(logged) - expected) > 1:  # the end of training is one more occasion
        raise AssertionError(f"{len(logged)} reports were logged, expected {expected}.")
    return probes, turns.seconds if turns else []


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    size = SIZES[name]
    pairs = options.pairs or size.pairs
    with tempfile.TemporaryDirectory() as folder:
        # One step more, whose beginning ends the last pair.
        steps = 2 * (pairs + WARM_UP) + 1
        probes, seconds = trained(size, folder, routing_steps=1, steps=steps, every=options.every, clock=options.clock)
        without, _ = trained(size, folder, routing_steps=0, steps=1)
    ratios, by_kind = [], {True: [], False: []}
    for first, second in zip(seconds[::2], seconds[1::2], strict=True):
        pair = dict((first, second))
        ratios.append(pair[True] / pair[False])
        for on, taken in pair.items():
            by_kind[on].append(taken)
    ratios = ratios[WARM_UP:]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "median_ratio": middle,
        "error": 1.253 * (high - low) / 1.349 / math.sqrt(len(ratios)),
        "quartiles": [low, high],
        "pairs": len(ratios),
        "seconds_on": statistics.median(by_kind[True][WARM_UP:]),
        "seconds_off": statistics.median(by_kind[False][WARM_UP:]),
        "hooks_on": probes.hooks[True],
        "hooks_off": probes.hooks[False],
        "hooks_without_routing_steps": without.hooks[False],
        "size": asdict(size),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["small", "large"])
    parser.add_argument("--pairs", type=int, help="of steps (default: 60 of the small model, 12 of the large one)")
    parser.add_argument("--every", type=int, default=1, help="read and log the counts every so many steps (default 1)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu, with one thread: beside other work")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    found = {}
    for name in options.sizes:
        each = found[name] = measure(name, options)
        print(
            f"{name}: with probes {each['median_ratio']:.4f} times as long (± {each['error']:.4f}; quartiles "
            f"{each['quartiles'][0]:.4f} and {each['quartiles'][1]:.4f}; {each['pairs']} pairs; a step without "
            f"{each['seconds_off']:.3f} s); hooks on routers {each['hooks_on']} with, {each['hooks_off']} without, "
            f"{each['hooks_without_routing_steps']} where routing_steps is 0",
            flush=True,
        )
    ratios = {f"routing_{name}": each["median_ratio"] for name, each in found.items()}
    if options.json is not None:
        options.json.write_text(json.dumps({"ratios": ratios, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
