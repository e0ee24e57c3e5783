# SPDX-License-Identifier: Apache-2.0
"""What the treatment of new control tokens costs a training step: steps with it, and steps without, in turn.

    python tests/benchmarks/control_tokens.py --json control_tokens.json

One trainer, one random model, whole steps of its own loop, in pairs whose order changes, as in `routing.py`. With the
treatment the rows of four tokens move by a learning rate of their own, and the closing token and the end of the turn
have their weights; without it no row does, and both weigh 1. What is printed is the median of the pairs' ratios, with
its standard error, and how long the rows are looked at once, before the training.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import torch
import transformers
from routing import CLOCKS, SIZES, WARM_UP, full_rows, random_model
from transformers import AutoTokenizer, TrainerCallback

from thinkfusion import ThinkFusionConfig, ThinkFusionTrainer, install_chat_template, training
from thinkfusion.checkpointing import tiny_base_path
from thinkfusion.control_tokens import multiply_updates, new_tokens


class Turns(TrainerCallback):
    """Switches the treatment on and off, step by step, and takes the time from one step's beginning to the next."""

    def __init__(self, trainer: ThinkFusionTrainer, clock: str) -> None:
        self.trainer, self.clock = trainer, CLOCKS[clock]
        self.treatment: Any = None
        self.on, self.began, self.updates = True, 0.0, 0
        self.seconds: list[tuple[bool, float]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = self.clock()
        if self.began:
            self.seconds.append((self.on, now - self.began))
        self.treatment = self.treatment or self.trainer.control_tokens
        step = state.global_step
        self.on = (step % 2 == 0) == (step // 2 % 2 == 0)
        plain = dict.fromkeys(("weight", "end_weight", "last_weight", "last_end_weight"), 1.0)
        self.trainer.control_tokens = self.treatment if self.on else self.treatment._replace(**plain)
        self.began = self.clock()

    def when_on(self, hook: Callable[..., None]) -> Callable[..., None]:
        """A hook of the treatment that runs in its steps only."""

        def run(*given: object) -> None:
            if self.on:
                self.updates += 1
                hook(*given)

        return run


class Hooks:
    """Stands in for an optimizer: what is registered on it can be registered on the real one in another form."""

    def register_step_pre_hook(self, hook: Callable[..., None]) -> None:
        self.before = hook

    def register_step_post_hook(self, hook: Callable[..., None]) -> None:
        self.after = hook


def measure(name: str, pairs: int | None, clock: str) -> dict[str, Any]:
    size = SIZES[name]
    pairs = pairs or size.pairs
    tokenizer = AutoTokenizer.from_pretrained(tiny_base_path())
    model = random_model(size, len(tokenizer))
    added = install_chat_template(tokenizer, model)
    begun = time.perf_counter()
    found = new_tokens(model, tokenizer, tokenizer.convert_ids_to_tokens(added), [])
    looked = time.perf_counter() - begun
    assert len(found) == len(added) == 4, found
    turns: list[Turns] = []

    def in_turns(optimizer: Any, rows: list[Any], factor: float) -> None:
        hooks = Hooks()
        multiply_updates(hooks, rows, factor)  # type: ignore[arg-type]
        optimizer.register_step_pre_hook(turns[0].when_on(hooks.before))
        optimizer.register_step_post_hook(turns[0].when_on(hooks.after))

    with tempfile.TemporaryDirectory() as folder:
        settings = ThinkFusionConfig(
            output_dir=folder,
            max_steps=2 * (pairs + WARM_UP) + 1,
            per_device_train_batch_size=size.batch,
            sequence_layout="padded",
            probe_rows=0,
            logging_steps=1000,
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
        training.multiply_updates = in_turns
        turns.append(Turns(trainer, clock))
        trainer.add_callback(turns[0])
        trainer.train()
    seconds = turns[0].seconds
    assert turns[0].updates >= len(seconds), "the rows were not moved"
    both = [dict(pair) for pair in zip(seconds[::2], seconds[1::2], strict=True)][WARM_UP:]
    ratios = [pair[True] / pair[False] for pair in both]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "median_ratio": middle,
        "error": 1.253 * (high - low) / 1.349 / math.sqrt(len(ratios)),
        "pairs": len(ratios),
        "seconds_off": statistics.median(pair[False] for pair in both),
        "seconds_looked": looked,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["small", "large"])
    parser.add_argument("--pairs", type=int, help="of steps (default: 60 of the small model, 12 of the large one)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu, with one thread: beside other work")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    found = {}
    for name in options.sizes:
        each = found[name] = measure(name, options.pairs, options.clock)
        print(
            f"{name}: with the treatment {each['median_ratio']:.4f} times as long (± {each['error']:.4f}; "
            f"{each['pairs']} pairs; a step without {each['seconds_off']:.3f} s); rows looked at once, in "
            f"{each['seconds_looked']:.3f} s",
            flush=True,
        )
    if options.json is not None:
        ratios = {f"control_tokens_{name}": each["median_ratio"] for name, each in found.items()}
        options.json.write_text(json.dumps({"ratios": ratios, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
