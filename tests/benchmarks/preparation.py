# SPDX-License-Identifier: Apache-2.0
"""How fast rows become training sequences: thinkfusion and TRL's SFTTrainer, in turn, on the same rows.

    python tests/benchmarks/preparation.py --gsm8k gsm8k_train.jsonl --json preparation.json

Both read the same file of messages with the same tokenizer, in one process and one thread, and end with rows on disk.
TRL renders each row once, with its own training template and `assistant_only_loss`; thinkfusion pairs it, so that
each row becomes two sequences. A constructor of the trainer on a single row is subtracted from TRL's time. The
tokenizers remember words, TRL's as well as ours, so that the first of the rounds is slower: its ratio is printed
apart. Times vary on a shared machine: what counts are the ratios.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import torch
import transformers
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer, chat_template_utils

from thinkfusion import install_chat_template, load_checkpoint, prepare
from thinkfusion.checkpointing import tiny_base_path

SYLLABLES = ["ka", "lo", "mi", "ren", "tas", "vo", "pel", "dru", "shan", "ti", "or", "em", "il", "gre", "fen", "su"]


def gsm8k_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        reasoning, _, answer = row["answer"].rpartition("####")
        rows.append(message_row(row["question"], reasoning.strip(), answer.strip()))
    return rows


def long_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with reasoning of 200 to 1,500 words, from a vocabulary as uneven as that of a language."""
    draw = random.Random(seed)
    words = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) for _ in range(20_000)]
    weights = [1 / (rank + 10) for rank in range(len(words))]

    def text(length: int) -> str:
        parts, chosen = [], iter(draw.choices(words, weights, k=length))
        while sentence := [word for word, _ in zip(chosen, range(draw.randint(4, 24)), strict=False)]:
            parts.append(" ".join(sentence).capitalize() + draw.choice([".", ".", ".", "?", ": 3.5 = 7 / 2.", ".\n\n"]))
        return " ".join(parts).replace("\n ", "\n").strip()

    return [
        message_row(text(draw.randint(10, 60)), text(draw.randint(200, 1500)), text(draw.randint(5, 60)))
        for _ in range(count)
    ]


def message_row(question: str, reasoning: str, answer: str) -> dict[str, Any]:
    reply = {"role": "assistant", "reasoning_content": reasoning, "content": answer}
    return {"messages": [{"role": "user", "content": question}, reply]}


def write_rows(rows: list[dict[str, Any]], path: Path) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Peer:
    """TRL's preparation of a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model, self.tokenizer = load_checkpoint("tiny-base")
        # The same control tokens as ours, with TRL's own training template.
        install_chat_template(self.tokenizer, self.model)
        self.tokenizer.chat_template = chat_template_utils.qwen3_training_chat_template

    def train_rows(self, rows: datasets.Dataset) -> datasets.Dataset:
        arguments = SFTConfig(
            output_dir=str(self.folder / "trl"),
            assistant_only_loss=True,
            max_length=None,
            use_cpu=True,
            bf16=False,
            report_to="none",
        )
        trainer = SFTTrainer(self.model, arguments, train_dataset=rows, processing_class=self.tokenizer)
        return trainer.train_dataset

    def prepare(self, path: Path, cache: str) -> datasets.Dataset:
        return self.train_rows(datasets.Dataset.from_json(str(path), cache_dir=str(self.folder / cache)))


def compare_with_template(prepared: datasets.Dataset, rows: list[dict[str, Any]], tokenizer: Any) -> int:
    """Check the ids of every row, in both modes, against the chat template's; returns how many."""
    compared = 0
    for number in range(len(rows)):
        for mode, thinking in enumerate((True, False)):
            given = prepared[2 * number + mode]
            text = tokenizer.apply_chat_template(rows[number]["messages"], enable_thinking=thinking, tokenize=False)
            expected = tokenizer(text, add_special_tokens=False)["input_ids"]
            # The line break behind the last turn is not trained on, and left out.
            if given["mode"] != mode or given["input_ids"] != expected[: len(given["input_ids"])]:
                raise AssertionError(f"row {number}: the ids differ from the template's.")
            if expected[len(given["input_ids"]) :] != tokenizer("\n", add_special_tokens=False)["input_ids"]:
                raise AssertionError(f"row {number}: more than the last line break is missing.")
            compared += 1
    return compared


def measure(name: str, rows: list[dict[str, Any]], rounds: int, folder: Path, peer: Peer) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base_path())
    install_chat_template(tokenizer)
    path = write_rows(rows, folder / f"{name}.jsonl")
    one = datasets.Dataset.from_list(rows[:1])
    ours, theirs = [], []
    for turn in range(rounds):
        idle = seconds(lambda: peer.train_rows(one))
        theirs.append(seconds(lambda turn=turn: peer.prepare(path, f"trl-{name}-{turn}")) - idle)
        ours.append(seconds(lambda turn=turn: prepare(str(path), tokenizer, cache_dir=folder / f"one-{turn}")))
    prepared, _ = prepare(str(path), tokenizer, cache_dir=folder / "one-0")
    compared = compare_with_template(prepared, rows, tokenizer)
    result = {
        "rows": len(rows),
        "first_ratio": theirs[0] / ours[0],
        "trl_seconds": statistics.median(theirs),
        "thinkfusion_seconds": statistics.median(ours),
        "compared": compared,
    }
    print(
        f"{name}: {len(rows):,} rows; TRL {result['trl_seconds']:.2f} s, thinkfusion "
        f"{result['thinkfusion_seconds']:.2f} s (ratio of the first round, nothing remembered: "
        f"{result['first_ratio']:.2f}); {compared:,} sequences equal to the template's"
    )
    return result


def measure_processes(rows: list[dict[str, Any]], rounds: int, folder: Path) -> dict[str, Any]:
    """One process and two on the same rows; the processes' start is in the time."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base_path())
    install_chat_template(tokenizer)
    path = str(write_rows(rows, folder / "scaling.jsonl"))
    taken: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(rounds):
        for number, times in taken.items():
            cache = folder / f"scaling-{number}-{turn}"
            times.append(
                seconds(lambda number=number, cache=cache: prepare(path, tokenizer, processes=number, cache_dir=cache))
            )
    one, two = (statistics.median(times) for times in taken.values())
    print(f"two processes: {len(rows):,} rows; {one:.2f} s with one, {two:.2f} s with two")
    return {"rows": len(rows), "one_seconds": one, "two_seconds": two}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, help="gsm8k_train.jsonl; without it only generated rows are used")
    parser.add_argument("--long_rows", type=int, default=3000)
    parser.add_argument("--scaling_rows", type=int, default=12_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        peer = Peer(folder)
        if options.gsm8k is not None:
            figures["gsm8k"] = measure("gsm8k", gsm8k_rows(options.gsm8k), options.rounds, folder, peer)
        figures["long"] = measure("long", long_rows(options.long_rows), options.rounds, folder, peer)
        ratios = {name: each["trl_seconds"] / each["thinkfusion_seconds"] for name, each in figures.items()}
        figures["two_processes"] = measure_processes(long_rows(options.scaling_rows, 1), options.rounds, folder)
    ratios["two_processes"] = figures["two_processes"]["one_seconds"] / figures["two_processes"]["two_seconds"]
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")
    if options.json is not None:
        options.json.write_text(json.dumps({"ratios": ratios, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
