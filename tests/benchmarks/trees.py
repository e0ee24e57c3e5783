# SPDX-License-Identifier: Apache-2.0
"""What fusion trees save: TRL's padded batches, packed sequences, trees, and sequences one by one, in turn.

    python tests/benchmarks/trees.py --gsm8k gsm8k_train.jsonl --json trees.json

One model, the same conversations, prepared by `prepare`; every variant is a trainer that goes over its own batches,
forward and backward (`training_step`): TRL's SFTTrainer on the expanded sequences with its default batches of 8 in
random order and its own collator, ours with `sequence_layout` "packed" and "tree" and rows of a token budget, and
TRL's with one sequence a batch, so without padding. The variants take turns, in a new order of data each round, and a
ratio is the median of the rounds' ratios: times vary on a shared machine. All of them must arrive at the same loss.
Freed memory is kept, as a GPU's allocator keeps it: given back after each large tensor, it costs page faults, a tenth
of the time of large batches. Peak memory is measured apart, each variant in a process of its own, without that.

The model is a random Qwen3-MoE with the proportions of Qwen3-30B-A3B at an eighth of its width: twice as wide in
attention as its hidden size, 8 query heads to a key head, 8 of 128 experts of 3/8 of the hidden size, and an output
layer that is to the two layers what the large vocabulary is to 48. Against its width the sequences are as long as
eight times longer ones are there, so attention has the share of conversations of about 8,000 tokens. What dominates
is in RESULTS.md; `--profile` shows it. The text is random words, which changes no time: every router is random too.

On a GPU: `--device cuda --dtype bfloat16 --preset gpu` (FlexAttention, 3.8 billion parameters, rows of 16k tokens).
"""

import argparse
import ctypes
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import psutil
import torch
import transformers
from preparation import SYLLABLES, gsm8k_rows, message_row  # the benchmark beside this one
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import SFTConfig, SFTTrainer

from thinkfusion import ThinkFusionConfig, ThinkFusionTrainer, install_chat_template, prepare
from thinkfusion.checkpointing import tiny_base_path
from thinkfusion.packing import Layout, PackedRows

VARIANTS = ("trl", "packed", "tree", "single")
"""TRL's padded batches of 8, our packed sequences, our trees, TRL's with one sequence a batch."""
TURNS = (1, 2, 4, 8, 12)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Preset:
    """A size of the model, and of the text: `scale` multiplies the lengths of messages."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int
    tokens_per_row: int
    scale: float = 1.0
    experts: int = 128
    chosen: int = 8
    conversations: int = 4


PRESETS = {
    "cpu": Preset(256, 2, 8, 1, 64, vocabulary=1024, tokens_per_row=8192),
    # An eighth of the layers of Qwen3-30B-A3B, and of its vocabulary, at its full width.
    "gpu": Preset(2048, 6, 32, 4, 128, vocabulary=19_072, tokens_per_row=16_384, scale=2.0, conversations=8),
    # For the test: everything runs, nothing is measured.
    "smoke": Preset(32, 1, 2, 1, 32, vocabulary=1024, tokens_per_row=1024, scale=0.1, experts=4, chosen=2),
}


class Shape(NamedTuple):
    """The tokens of messages, with their markup, each drawn evenly from a range.

    long: another range of reasoning, for 3 of 10 conversations.
    """

    user: tuple[int, int]
    reasoning: tuple[int, int]
    answer: tuple[int, int]
    long: tuple[int, int] | None = None


SHAPES = {
    # Of the prototype on which the figures that are asked for rest: 5,532 tokens expanded, 2,076 as trees.
    "6_turns": Shape((50, 150), (30, 100), (45, 135)),
    # Means of an exchange in 50 rows of reasoning with tools: short questions, 291 tokens of reasoning, and 184 of
    # answers, tool calls and results.
    "6_turns_as_measured": Shape((25, 75), (145, 435), (92, 276)),
    "6_turns_long_reasoning": Shape((50, 150), (300, 900), (45, 135)),
    "single_turn": Shape((30, 90), (20, 60), (45, 135), long=(600, 1000)),
}


class Writer:
    """Writes messages of random words, of a given number of tokens."""

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self.draw = random.Random(seed)
        words = {" " + "".join(self.draw.choices(SYLLABLES, k=self.draw.randint(1, 3))) for _ in range(2000)}
        self.words = sorted(words | {" a"})
        self.lengths = [len(ids) for ids in tokenizer(self.words)["input_ids"]]
        markup = "<|im_start|>user\n<|im_end|>\n", "<think>", "<|im_start|>assistant\n</think><|im_end|>\n"
        self.markup = [len(ids) for ids in tokenizer(list(markup))["input_ids"]]

    def text(self, tokens: int) -> str:
        parts = []
        while tokens > 0:
            number = self.draw.randrange(len(self.words))
            if self.lengths[number] <= tokens:
                parts.append(self.words[number])
                tokens -= self.lengths[number]
        return "".join(parts).strip()

    def conversation(self, shape: Shape, turns: int, scale: float) -> dict[str, Any]:
        messages = []
        for _ in range(turns):
            reasoning = shape.long if shape.long and self.draw.random() < 0.3 else shape.reasoning
            drawn = (self.draw.randint(*lengths) for lengths in (shape.user, reasoning, shape.answer))
            user, trace, answer = (
                self.text(max(1, round(scale * length) - markup))
                for length, markup in zip(drawn, self.markup, strict=True)
            )
            messages += message_row(user, trace, answer)["messages"]
        return {"messages": messages}

    def like_gsm8k(self) -> dict[str, Any]:
        """The lengths of GSM8K's questions and solutions, in tokens of the embedded tokenizer."""
        question, reasoning = (round(self.draw.lognormvariate(math.log(median), 0.42)) for median in (130, 152))
        return message_row(self.text(max(8, question)), self.text(max(8, reasoning)), str(self.draw.randint(1, 999)))


class Bench:
    """The model, the tokenizer, and where things are run and kept."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.preset = PRESETS[options.preset]
        self.clock = CLOCKS[options.clock]
        self.tokenizer = AutoTokenizer.from_pretrained(tiny_base_path())
        install_chat_template(self.tokenizer)
        self.model = random_model(self.preset, len(self.tokenizer), options)

    def prepared(self, rows: list[dict[str, Any]]) -> datasets.Dataset:
        return prepare(rows, self.tokenizer, cache_dir=self.folder / "prepared")[0]

    def conversations(self, name: str, count: int, turns: int | None = None, seed: int = 0) -> datasets.Dataset:
        writer, shape = Writer(self.tokenizer, seed), SHAPES[name]
        turns = turns or (6 if name.startswith("6") else 1)
        return self.prepared([writer.conversation(shape, turns, self.preset.scale) for _ in range(count)])

    def settings(self, **settings: Any) -> dict[str, Any]:
        cpu = self.options.device == "cpu"
        return {
            "output_dir": str(self.folder / "run"),
            "report_to": "none",
            "gradient_checkpointing": False,
            "max_length": None,
            "router_aux_loss_coef": 0.0,
            "use_cpu": cpu,
            "bf16": False,
            "dataloader_pin_memory": not cpu,
            **settings,
        }

    def trl(self, sequences: datasets.Dataset, **settings: Any) -> SFTTrainer:
        """TRL's trainer, on what `prepare` rendered: it has no labels of its own for two modes."""
        arguments = SFTConfig(dataset_kwargs={"skip_prepare_dataset": True}, **self.settings(**settings))
        columns = sequences.select_columns(["input_ids", "labels"])
        return SFTTrainer(self.model, arguments, train_dataset=columns, processing_class=self.tokenizer)

    def ours(self, sequences: datasets.Dataset, **settings: Any) -> ThinkFusionTrainer:
        arguments = ThinkFusionConfig(**self.settings(**settings))
        return ThinkFusionTrainer(self.model, arguments, train_dataset=sequences, processing_class=self.tokenizer)

    def trainer(self, variant: str, sequences: datasets.Dataset) -> SFTTrainer:
        if variant == "trl":
            return self.trl(sequences)
        if variant == "single":
            return self.trl(sequences, per_device_train_batch_size=1)
        row = {"tokens_per_row": self.preset.tokens_per_row, "per_device_train_batch_size": 1}
        return self.ours(sequences, sequence_layout=variant, **row)


def random_model(preset: Preset, vocabulary: int, options: argparse.Namespace) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=max(vocabulary, preset.vocabulary),
        hidden_size=preset.hidden,
        intermediate_size=3 * preset.hidden,
        moe_intermediate_size=preset.hidden * 3 // 8,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.key_heads,
        head_dim=preset.head_size,
        num_experts=preset.experts,
        num_experts_per_tok=preset.chosen,
        norm_topk_prob=True,
        max_position_embeddings=32_768,
        pad_token_id=0,
        eos_token_id=0,
        bos_token_id=None,
    )
    with torch.device(options.device):
        return Qwen3MoeForCausalLM(config).to(getattr(torch, options.dtype))


class Pass(NamedTuple):
    """What a trainer did with some of its batches; tokens are those that were computed, padding included."""

    seconds: float
    tokens: int
    largest: int
    trained: int
    loss: float


def one_step(trainer: SFTTrainer, batches: Iterator[Any], clock: Callable[[], float]) -> Pass:
    """Forward and backward over the next batch, without the optimizer, whose time depends on no layout."""
    trainer.current_gradient_accumulation_steps = 1
    start = clock()
    (batch,), items = trainer.get_batch_samples(batches, 1, trainer.args.device)
    tokens = batch["input_ids"].numel()
    # As a number, so that a device has done all before the clock is read.
    loss = float(trainer.training_step(trainer.model, batch, items) * items)
    trainer.model.zero_grad()
    return Pass(clock() - start, tokens, tokens, int(items), loss)


def one_pass(trainer: SFTTrainer, clock: Callable[[], float] = time.perf_counter, steps: int | None = None) -> Pass:
    """All batches of the trainer once, or the first of them; the loss is the mean over trained tokens."""
    loader = trainer.get_train_dataloader()
    batches = iter(loader)
    done = [one_step(trainer, batches, clock) for _ in range(min(len(loader), steps or len(loader)))]
    seconds, tokens, _, trained, loss = map(sum, zip(*done, strict=True))
    return Pass(seconds, tokens, max(each.largest for each in done), trained, loss / trained)


def rounds_of(bench: Bench, trainers: dict[str, SFTTrainer], rounds: int) -> dict[str, list[Pass]]:
    """The trainers in turn; on a GPU a whole round before compiles every shape."""
    for trainer in trainers.values():
        one_pass(trainer, steps=None if bench.options.device == "cuda" else 1)
    passes: dict[str, list[Pass]] = {name: [] for name in trainers}
    for number in range(rounds):
        for name, trainer in trainers.items():
            torch.manual_seed(number)
            passes[name].append(one_pass(trainer, bench.clock))
    return passes


def ratio(slow: list[Pass], fast: list[Pass]) -> float:
    return statistics.median(one.seconds / other.seconds for one, other in zip(slow, fast, strict=True))


def compare(bench: Bench, name: str, variants: tuple[str, ...], rounds: int, count: int) -> dict[str, Any]:
    """The variants on one set of conversations."""
    sequences = bench.conversations(name, count)
    trainers = {variant: bench.trainer(variant, sequences) for variant in variants}
    passes = rounds_of(bench, trainers, rounds)
    check_losses(passes, 1e-4 if bench.options.dtype == "float32" else 1e-2)
    tree = passes["tree"][0]
    tokens = sum(map(len, sequences["input_ids"]))
    result: dict[str, Any] = {
        "conversations": count,
        "sequences": len(sequences),
        "shape": SHAPES[name]._asdict(),
        "tokens_without_padding": tokens,
        "trained_tokens": tree.trained,
        "seconds": {each: statistics.median(one.seconds for one in passes[each]) for each in passes},
        "tokens": {each: statistics.median(one.tokens for one in passes[each]) for each in passes},
        "ratios": {each: ratio(passes[each], passes["tree"]) for each in passes},
        "rounds": {each: [round(one.seconds, 3) for one in passes[each]] for each in passes},
    }
    print(f"\n{name}: {count} conversations, {len(sequences)} sequences of {tokens:,} tokens")
    print(f"{'':8} {'tokens computed':>16} {'of trees':>9} {'seconds':>8} {'of trees':>9}")
    for each in passes:
        share = result["tokens"][each] / tree.tokens
        taken = result["seconds"][each]
        print(f"{each:8} {result['tokens'][each]:16,.0f} {share:9.2f} {taken:8.2f} {result['ratios'][each]:9.2f}")
    if "single" in passes:
        result["packed_vs_single"] = ratio(passes["single"], passes["packed"])
        print(f"packed against sequences one by one, without padding: {result['packed_vs_single']:.2f} times as fast")
    return result


def check_losses(passes: dict[str, list[Pass]], tolerance: float) -> None:
    """All variants computed the same mean loss of the same trained tokens."""
    found = [(one.trained, one.loss) for given in passes.values() for one in given]
    for trained, loss in found:
        if trained != found[0][0] or not math.isclose(loss, found[0][1], rel_tol=tolerance):
            raise AssertionError(f"the variants differ in what they train: {found}")


def growth(bench: Bench, rounds: int) -> dict[str, Any]:
    """Tokens and time of a conversation, by its turns: expanded (packed, so without padding) and as a tree."""
    rows: list[dict[str, Any]] = []
    print(f"\n{'turns':>5} {'tokens expanded':>16} {'as trees':>9} {'seconds expanded':>17} {'as trees':>9}")
    for turns in TURNS:
        count = max(2, 12 // turns)
        sequences = bench.conversations("6_turns", count, turns, seed=turns)
        passes = rounds_of(bench, {each: bench.trainer(each, sequences) for each in ("packed", "tree")}, rounds)
        row: dict[str, Any] = {"turns": turns}
        for each, name in (("packed", "expanded"), ("tree", "trees")):
            row[f"{name}_tokens"] = passes[each][0].tokens / count
            row[f"{name}_seconds"] = statistics.median(one.seconds for one in passes[each]) / count
        rows.append(row)
        print(
            f"{turns:5} {row['expanded_tokens']:16,.0f} {row['trees_tokens']:9,.0f} "
            f"{row['expanded_seconds']:17.3f} {row['trees_seconds']:9.3f}"
        )
    slopes = {name: slope(rows, name) for name in rows[0] if name != "turns"}
    for name, found in slopes.items():
        print(f"{name.replace('_', ', ')}: grow as the turns to the power of {found:.2f} from 4 turns to 12")
    return {"by_turns": rows, "slopes_from_4_to_12_turns": slopes}


def slope(rows: list[dict[str, Any]], name: str) -> float:
    """The exponent of growth from 4 turns to 12: 1 is linear, 2 quadratic."""
    first, last = (next(row for row in rows if row["turns"] == turns) for turns in (4, 12))
    return math.log(last[name] / first[name]) / math.log(last["turns"] / first["turns"])


def overhead(bench: Bench, ours: SFTTrainer, theirs: SFTTrainer) -> dict[str, float]:
    """How much longer a step of ours takes than one of TRL's on the same batch, as a share; step by step in turn."""
    found: list[float] = []
    while len(found) < bench.options.pairs:
        steps = len(theirs.get_train_dataloader())
        walks = {trainer: iter(trainer.get_train_dataloader()) for trainer in (ours, theirs)}
        for _ in range(steps):
            # Which of them is first, and finds the caches as the other left them, changes.
            order = (ours, theirs) if len(found) % 2 else (theirs, ours)
            done = {trainer: one_step(trainer, walks[trainer], bench.clock) for trainer in order}
            if done[ours].trained != done[theirs].trained:
                raise AssertionError("the two trainers were given different batches.")
            found.append(done[ours].seconds / done[theirs].seconds - 1)
    found = found[2:]  # the first ones warm up
    low, middle, high = statistics.quantiles(found, n=4)
    # The standard error of a median, from the quartiles.
    return {"share": middle, "error": 1.253 * (high - low) / 1.349 / math.sqrt(len(found)), "pairs": len(found)}


def overheads(bench: Bench) -> dict[str, Any]:
    """The same padded batches; and one sequence a step, as TRL's batch of one and as our row of one."""
    sequences = bench.conversations("single_turn", 32, seed=1)
    ordered = {"train_sampling_strategy": "sequential"}
    alone = {**ordered, "per_device_train_batch_size": 1}
    pairs = {
        "padded": (bench.ours(sequences, sequence_layout="padded", **ordered), bench.trl(sequences, **ordered)),
        "row": (bench.ours(sequences.remove_columns("conversation"), **alone), bench.trl(sequences, **alone)),
    }
    found = {name: overhead(bench, *pair) for name, pair in pairs.items()}
    for name, each in found.items():
        print(
            f"overhead of our trainer, {name}: {each['share']:+.2%} a step "
            f"(± {each['error']:.2%}, {each['pairs']} pairs)"
        )
    return found


def padding(bench: Bench, name: str, sequences: datasets.Dataset) -> float:
    report = PackedRows(sequences, Layout("tree", 8192)).report
    print(f"padding, {name}: {report}")
    return report.padding


class Highest(threading.Thread):
    """The highest resident memory of this process, looked at two hundred times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest, self.done, self.process = 0, threading.Event(), psutil.Process()

    def run(self) -> None:
        while not self.done.wait(0.005):
            self.highest = max(self.highest, self.process.memory_info().rss)


def memory_of(bench: Bench, variant: str) -> dict[str, int]:
    """The highest memory of a pass of one variant, above the model's, in a process that runs nothing else."""
    sequences = bench.conversations("6_turns", bench.preset.conversations)
    trainer = bench.trainer(variant, sequences)
    if bench.options.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        largest = one_pass(trainer).largest
        return {"bytes": torch.cuda.max_memory_allocated() - before, "largest_batch_tokens": largest}
    watch = Highest()
    before = watch.process.memory_info().rss
    watch.start()
    largest = one_pass(trainer).largest
    watch.done.set()
    watch.join()
    return {"bytes": watch.highest - before, "largest_batch_tokens": largest}


def memories(options: argparse.Namespace) -> dict[str, Any]:
    print(f"\n{'':8} {'peak memory':>12} {'tokens of the largest batch':>28}")
    found = {}
    for variant in options.memory_of:
        settings = [f"--{name}={getattr(options, name)}" for name in ("device", "dtype", "preset", "threads", "clock")]
        command = [sys.executable, __file__, *settings, f"--memory={variant}"]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[variant] = json.loads(output.splitlines()[-1])
        print(f"{variant:8} {found[variant]['bytes'] / 2**20:8,.0f} MiB {found[variant]['largest_batch_tokens']:28,}")
    return found


def profile(bench: Bench) -> None:
    """Where the time of TRL's padded batches and of trees goes."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    sequences = bench.conversations("6_turns", bench.preset.conversations)
    for variant in ("trl", "tree"):
        trainer = bench.trainer(variant, sequences)
        one_pass(trainer, steps=1)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (bench.options.device == "cuda")
        with profiled(activities=activities) as found:
            one_pass(trainer)
        print(variant)
        print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=24, max_name_column_width=60))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, help="gsm8k_train.jsonl; without it rows of its lengths are generated")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu, with one thread: beside other work")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=64, help="steps of each trainer, for the overhead")
    parser.add_argument("--memory_of", nargs="*", choices=VARIANTS, default=VARIANTS, help="measure their peaks")
    parser.add_argument("--profile", action="store_true", help="print a profile of two variants, and nothing else")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--memory", choices=VARIANTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(bench: Bench) -> dict[str, Any]:
    options, count = bench.options, bench.preset.conversations
    sets = {"6_turns": compare(bench, "6_turns", VARIANTS, options.rounds, count)}
    for name, many in (("6_turns_as_measured", 3), ("6_turns_long_reasoning", 3), ("single_turn", 24)):
        sets[name] = compare(bench, name, VARIANTS[:3], options.rounds, many)
    print()
    taken = overheads(bench)
    writer = Writer(bench.tokenizer, 2)
    rows = gsm8k_rows(options.gsm8k) if options.gsm8k else [writer.like_gsm8k() for _ in range(7473)]
    source = "the file" if options.gsm8k else "generated with its lengths"
    ratios = {
        **{f"trees_vs_trl_{name}": found["ratios"]["trl"] for name, found in sets.items()},
        **{f"trees_vs_expanded_{name}": found["ratios"]["packed"] for name, found in sets.items()},
        "expanded_vs_one_by_one_6_turns": sets["6_turns"]["packed_vs_single"],
        "overhead_vs_trl": taken["padded"]["share"],
        "overhead_vs_trl_row_of_one": taken["row"]["share"],
        "padding_gsm8k": padding(bench, f"GSM8K, {source}", bench.prepared(rows)),
        "padding_6_turns": padding(bench, "6 turns", bench.conversations("6_turns", 500, seed=3)),
    }
    return {
        "ratios": ratios,
        **ratios,
        "gsm8k": source,
        "sets": sets,
        "overhead": taken,
        "growth": growth(bench, options.rounds),
        "memory": memories(options),
    }


def keep_freed_memory() -> None:
    """Tell glibc neither to map large tensors one by one nor to give memory back; other allocators are left alone."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if sys.platform == "linux" and mallopt is not None:
        for option, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            mallopt(option, value)


def main() -> None:
    options = arguments()
    if not options.memory:
        keep_freed_memory()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(options, Path(name))
        if options.memory:
            print(json.dumps(memory_of(bench, options.memory)))
            return
        parameters = sum(parameter.numel() for parameter in bench.model.parameters())
        device = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} threads"
        print(f"a Qwen3-MoE of {parameters / 1e6:,.1f} million parameters, {options.dtype}, {device}: {bench.preset}")
        if options.profile:
            profile(bench)
            return
        figures = measure(bench)
    settings = {"device": device, "dtype": options.dtype, "parameters": parameters, "preset": asdict(bench.preset)}
    for name, value in figures["ratios"].items():
        print(f"{name}: {value:.4f}" if name.startswith(("padding", "overhead")) else f"{name}: {value:.2f}")
    if options.json is not None:
        options.json.write_text(json.dumps({**figures, "settings": settings}, indent=1) + "\n")


if __name__ == "__main__":
    main()
