# SPDX-License-Identifier: Apache-2.0
"""Which way of training both modes keeps the switch working? One table, measured in one run.

    python recipes/ablation.py --output runs/ablation            # 3 seeds, both schemes
    python recipes/ablation.py --output runs/ablation --quick    # 1 seed, fewer tokens

The rows are those of KRAFTON's account of A.X K1 (arXiv 2601.09200), at tiny scale. Each mode has prompts of its own,
as in real data: on tasks that overlap in part, or on other tasks (`--domains apart`). `paired` answers the prompts of
the thinking rows in both modes. Every recipe gets the same base and the same number of trained tokens. What is told
apart are tasks that a mode has data for, and tasks that only the other mode has data for. The table is written as it
comes out; a run that is stopped goes on where it was.
"""

import argparse
import json
import logging
import math
import multiprocessing
import os
import shutil
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinkfusion.following import follow_parent

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

DOMAINS = {
    "apart": {"thinking": ("running_sum", "maximum"), "non_thinking": ("dial", "reversal")},
    "overlapping": {
        "thinking": ("running_sum", "dial", "maximum"),
        "non_thinking": ("dial", "maximum", "reversal"),
    },
}
"""The tasks with data in each mode; no question is in both."""
SCHEMES = ("control", "empty-block")
TRL, MERGE, MERGE_PAIRED = "trl", "merge", "merge_then_paired"
MIXTURES: dict[str, dict[str, Any]] = {
    "combined": {"mixture": "combined"},
    "ratio_1.5:1": {"mixture": "ratio", "ratio": "1.5:1"},
    "ratio_1:1": {"mixture": "ratio", "ratio": "1:1"},
    "ratio_1:1.5": {"mixture": "ratio", "ratio": "1:1.5"},
    "sequential": {"mixture": "sequential"},
    "paired": {"mixture": "paired"},
}
RECIPES = (TRL, *MIXTURES, MERGE, MERGE_PAIRED)
MODES = ("thinking", "non_thinking")
BATCH, LEARNING_RATE, MAX_NEW_TOKENS = 8, 1.5e-3, 128


@dataclass(frozen=True)
class Job:
    """One row of the table for one seed."""

    recipe: str
    scheme: str
    seed: int
    tokens: int
    """How many tokens are trained."""
    samples: int
    """Prompts per mode of the evaluation; a third of them at each ratio of a sweep."""
    domains: str
    sweep: str
    folder: str

    @property
    def result(self) -> Path:
        return Path(self.folder, "jobs", f"{self.recipe}-{self.scheme}-{self.seed}.json".replace(":", "_"))


def jobs_of(folder: Path, recipes: list[str], seeds: int, setting: dict[str, Any]) -> list[Job]:
    """TRL's template has one scheme, the empty block. Those that take longest come first."""
    return [
        Job(recipe, scheme, seed, folder=str(folder), **setting)
        for recipe in reversed(RECIPES)
        if recipe in recipes
        for seed in range(seeds)
        for scheme in (SCHEMES if recipe != TRL else SCHEMES[1:])
    ]


# Data -----------------------------------------------------------------------------------------------------------------


def rows_of(
    count: int, seed: int, modes: tuple[str, ...] = MODES, domains: str = "overlapping"
) -> list[dict[str, str]]:
    """`count` rows, in turn with reasoning and without, no question in both; or of one of these kinds."""
    from thinkfusion import generate_samples

    reasoned = generate_samples(count, seed=seed, tasks=DOMAINS[domains]["thinking"])
    taken = {one.question for one in reasoned}
    drawn = generate_samples(2 * count, seed=1000 + seed, tasks=DOMAINS[domains]["non_thinking"])
    answered = [one for one in drawn if one.question not in taken][:count]
    kinds = {
        "thinking": [{"question": one.question, "reasoning": one.reasoning, "answer": one.answer} for one in reasoned],
        "non_thinking": [{"question": one.question, "reasoning": "", "answer": one.answer} for one in answered],
    }
    mixed = [row for rows in zip(*(kinds[mode] for mode in modes), strict=True) for row in rows]
    return mixed[:count]


def trained_tokens(dataset: Any) -> int:
    return sum(sum(label != -100 for label in labels) for labels in dataset["labels"])


def prepared(tokenizer: Any, job: Job, tokens: int, modes: tuple[str, ...] = MODES, **mixture: Any) -> Any:
    """As many rows as have about `tokens` trained tokens in this mixture, ready for training."""
    from thinkfusion import MixtureOptions, prepare

    def make(count: int) -> Any:
        options = MixtureOptions(**mixture, seed=job.seed)
        return prepare(rows_of(count, job.seed, modes, job.domains), tokenizer, mixture=options, cache_dir=None)[0]

    probe = 400
    return make(max(8, round(probe * tokens / trained_tokens(make(probe)))))


# Training -------------------------------------------------------------------------------------------------------------


def base(scheme: str) -> tuple[Any, Any]:
    from thinkfusion import install_chat_template, load_checkpoint

    model, tokenizer = load_checkpoint("tiny-base", dtype="float32")
    install_chat_template(tokenizer, model, scheme=scheme)
    return model, tokenizer


def common_settings(seed: int) -> dict[str, Any]:
    """What all recipes share, TRL's own among them."""
    return {
        "num_train_epochs": 1,
        "per_device_train_batch_size": BATCH,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 20,
        "weight_decay": 0.0,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "seed": seed,
        "save_strategy": "no",
        "logging_steps": 100,
        "report_to": "none",
        "disable_tqdm": True,
    }


def train(model: Any, tokenizer: Any, dataset: Any, job: Job, mixture: str) -> int:
    """Train in place; the tokens that were trained."""
    from thinkfusion import ThinkFusionConfig, ThinkFusionTrainer

    settings = ThinkFusionConfig(
        output_dir=str(Path(job.folder, "work", f"{job.recipe}-{job.scheme}-{job.seed}".replace(":", "_"))),
        scheme=job.scheme,
        mixture=mixture,
        ratio=0.5 if mixture == "ratio" else None,  # the rows are mixed already
        sequence_layout="padded",
        control_token_learning_rate=1e-2,
        control_token_weight=5.0,
        end_of_turn_weight=1.0,
        **common_settings(job.seed),
    )
    ThinkFusionTrainer(model, settings, train_dataset=dataset, processing_class=tokenizer).train()
    return trained_tokens(dataset)


def train_with_trl(job: Job) -> tuple[Any, Any, int]:
    """TRL's own way: Qwen3's template, which it swaps for its training variant, and the loss on assistant tokens."""
    import trl
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = base("empty-block")  # the same control tokens and rows of the embeddings
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    settings = SFTConfig(
        output_dir=str(Path(job.folder, "work", f"trl-{job.seed}")),
        assistant_only_loss=True,
        **common_settings(job.seed),
    )

    def trainer(count: int) -> Any:
        rows = []
        for row in rows_of(count, job.seed, domains=job.domains):
            reply = {"role": "assistant", "content": row["answer"]}
            reply |= {"reasoning_content": row["reasoning"]} if row["reasoning"] else {}
            rows.append(
                {
                    "messages": [{"role": "user", "content": row["question"]}, reply],
                    "chat_template_kwargs": {"enable_thinking": bool(row["reasoning"])},
                }
            )
        return SFTTrainer(model, settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)

    probe = 400
    made = trainer(round(probe * job.tokens / trained_tokens(trainer(probe).train_dataset)))
    made.train()
    return model, tokenizer, trained_tokens(made.train_dataset)


def train_and_merge(job: Job) -> tuple[Any, Any, int, float]:
    """Both modes on their own, then the best ratio by a sweep; for the last recipe then pairs, with a fifth."""
    from thinkfusion import export_checkpoint, load_checkpoint, sweep_and_fuse, task_prompts
    from thinkfusion.sweeping import ratios_of

    work = Path(job.folder, "work", f"{job.recipe}-{job.scheme}-{job.seed}")
    share = 0.5 if job.recipe == MERGE else 0.4
    spent = 0
    for mode in MODES:
        model, tokenizer = base(job.scheme)
        dataset = prepared(tokenizer, job, round(share * job.tokens), (mode,), mixture=mode)
        spent += train(model, tokenizer, dataset, job, mode)
        export_checkpoint(model, tokenizer, work / mode)
    prompts = task_prompts(max(8, job.samples // 3), seed=1000 + job.seed)
    found = sweep_and_fuse(
        work / "thinking",
        work / "non_thinking",
        work / "fused",
        ratios_of(job.sweep),
        prompts=prompts,
        samples=len(prompts),
        max_new_tokens=MAX_NEW_TOKENS,
        progress=False,
    )
    model, tokenizer = load_checkpoint(work / "fused", dtype="float32")
    if job.recipe == MERGE_PAIRED:
        dataset = prepared(tokenizer, job, job.tokens - spent, mixture="paired")
        spent += train(model, tokenizer, dataset, job, "paired")
    shutil.copyfile(work / "fused" / "sweep.json", Path(job.folder, "jobs", f"{work.name}-sweep.json"))
    shutil.rmtree(work)
    return model, tokenizer, spent, found.best


# Measuring ------------------------------------------------------------------------------------------------------------


def run(job: Job) -> dict[str, Any]:
    """Train and measure one row, and keep it."""
    import datasets
    import torch
    from transformers.utils import logging as transformers_logging

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    from thinkfusion import evaluate_modes, task_prompts

    begun = time.monotonic()
    # What trainers print is not for the one who waits for the table.
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    ratio = None
    if job.recipe == TRL:
        model, tokenizer, spent = train_with_trl(job)
    elif job.recipe in MIXTURES:
        model, tokenizer = base(job.scheme)
        dataset = prepared(tokenizer, job, job.tokens, **MIXTURES[job.recipe])
        spent = train(model, tokenizer, dataset, job, MIXTURES[job.recipe]["mixture"])
    else:
        model, tokenizer, spent, ratio = train_and_merge(job)
    prompts = task_prompts(job.samples, seed=job.seed)
    report = evaluate_modes(
        model, tokenizer, prompts, samples=len(prompts), max_new_tokens=MAX_NEW_TOKENS, progress=False
    )
    found = {
        "recipe": job.recipe,
        "scheme": job.scheme,
        "seed": job.seed,
        "trained_tokens": spent,
        "ratio": ratio,
        "seconds": round(time.monotonic() - begun, 1),
        "modes": {mode: figures(report.modes[mode], mode, job.domains) for mode in MODES},
    }
    write(job.result, json.dumps(found, indent=1))
    return found


def figures(measured: dict[str, Any], mode: str, domains: str) -> dict[str, float]:
    """Over all tasks, and over those that this mode has data for, or has none for."""
    own = DOMAINS[domains][mode]
    unseen = tuple(task for tasks in DOMAINS[domains].values() for task in tasks if task not in own)

    def mean(name: str, tasks: tuple[str, ...]) -> float:
        cells = [cell for task, cell in measured["tasks"].items() if task.rsplit("_", 1)[0] in tasks]
        known = [cell for cell in cells if cell[name] is not None]
        total = sum(cell["samples"] for cell in known)
        return sum(cell[name] * cell["samples"] for cell in known) / total if total else math.nan

    return {
        "format_error": measured["format_error"],
        "format_error_seen": mean("format_error", own),
        "format_error_unseen": mean("format_error", unseen),
        "truncated": measured["truncated"],
        "leakage": measured["leakage"],
        "accuracy_seen": mean("accuracy", own),
        "accuracy_unseen": mean("accuracy", unseen),
        "tokens": measured["reasoning_tokens"] + measured["answer_tokens"],
    }


# The table ------------------------------------------------------------------------------------------------------------

COLUMNS = {
    "format_error": "format error",
    "format_error_unseen": "of unseen tasks",
    "accuracy_seen": "accuracy, seen",
    "accuracy_unseen": "accuracy, unseen",
    "tokens": "tokens",
}


def spread(values: list[float], name: str) -> str:
    """Mean and, of several seeds, least and largest."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    if not known:
        return "-"
    scale, unit = (1, "") if name == "tokens" else (100, " %")
    mean = scale * sum(known) / len(known)
    ends = f" ({scale * min(known):.1f}-{scale * max(known):.1f})" if len(known) > 1 else ""
    return f"{mean:.1f}{unit}{ends}"


def table(results: list[dict[str, Any]]) -> str:
    """A row for each recipe and scheme; mean over the seeds, least and largest in brackets."""
    heads = [f"{title}, {mode.replace('_', '-')}" for mode in MODES for title in COLUMNS.values()]
    lines = [f"| recipe | scheme | {' | '.join(heads)} |", f"|---|---|{'---|' * len(heads)}"]
    for recipe in RECIPES:
        for scheme in SCHEMES:
            rows = [each for each in results if (each["recipe"], each["scheme"]) == (recipe, scheme)]
            if not rows:
                continue
            cells = [spread([row["modes"][mode].get(name) for row in rows], name) for mode in MODES for name in COLUMNS]
            ratios = sorted({row["ratio"] for row in rows if row["ratio"] is not None})
            told = f" at {', '.join(f'{ratio:g}' for ratio in ratios)}" if ratios else ""
            lines.append(f"| {recipe.replace('_', ' ')}{told} | {scheme} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Format errors of both modes, a dot for each seed and a bar for their mean."""
    from matplotlib.figure import Figure

    rows = [(recipe, scheme) for recipe in RECIPES for scheme in SCHEMES]
    rows = [row for row in rows if any((each["recipe"], each["scheme"]) == row for each in results)]
    figure = Figure(figsize=(10, 0.42 * len(rows) + 1.4), layout="constrained")
    for panel, mode, colour in zip(figure.subplots(1, 2, sharey=True), MODES, ("#1f77a8", "#c8641a"), strict=True):
        for place, row in enumerate(rows):
            values = [
                100 * each["modes"][mode]["format_error"]
                for each in results
                if (each["recipe"], each["scheme"]) == row and each["modes"][mode]["format_error"] is not None
            ]
            if values:
                mean = sum(values) / len(values)
                panel.barh(place, mean, color=colour, alpha=0.35, height=0.7)
                panel.plot(values, [place] * len(values), "o", color=colour, markersize=4)
                panel.annotate(f"{mean:.1f} %", (100, place), (4, -3), textcoords="offset points", fontsize=8)
        panel.set(title=f"format errors, {mode.replace('_', '-')}", xlim=(0, 100), xlabel="%")
        panel.set_yticks(range(len(rows)), [f"{recipe.replace('_', ' ')}, {scheme}" for recipe, scheme in rows])
        panel.spines[["top", "right"]].set_visible(False)
    panel.invert_yaxis()
    figure.savefig(path, dpi=140)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the table, the figure and each result")
    parser.add_argument("--quick", action="store_true", help="one seed, fewer tokens, fewer prompts")
    parser.add_argument(
        "--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="which rows (default: all)"
    )
    parser.add_argument(
        "--domains", choices=DOMAINS, default="overlapping", help="whether modes share tasks (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, help="how many (default 3; 1 with --quick)")
    parser.add_argument("--tokens", type=int, help="trained tokens of each recipe (default 100,000; 60,000)")
    parser.add_argument("--samples", type=int, help="prompts per mode (default 480; 240)")
    parser.add_argument("--sweep", default="0:1:0.1", help="ratios of the merges (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="rows at a time (default: cores)")
    options = parser.parse_args()
    seeds = options.seeds or (1 if options.quick else 3)
    tokens = options.tokens or (60_000 if options.quick else 100_000)
    samples = options.samples or (240 if options.quick else 480)
    setting = {"tokens": tokens, "samples": samples, "domains": options.domains, "sweep": options.sweep}
    jobs = jobs_of(options.output, options.recipes, seeds, setting)
    kept = options.output / "jobs" / "setting.json"
    if kept.is_file() and json.loads(kept.read_text()) != setting:
        sys.exit(
            f"{options.output}: holds results of {kept.read_text().strip()}, not of {setting}. Use another folder."
        )
    write(kept, json.dumps(setting))

    begun = time.monotonic()
    results = [json.loads(job.result.read_text()) for job in jobs if job.result.is_file()]
    waiting = [job for job in jobs if not job.result.is_file()]
    print(f"{len(jobs)} rows, {len(results)} of them there already; {tokens:,} trained tokens each.", flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, context, follow_parent, max_tasks_per_child=1) as pool:
        for done in as_completed([pool.submit(run, job) for job in waiting]):
            if done.exception():
                pool.shutdown(cancel_futures=True)  # or it would be told when all others are done
            results.append(done.result())
            row = results[-1]
            errors = " / ".join(spread([row["modes"][mode]["format_error"]], "format_error") for mode in MODES)
            print(f"{row['recipe']}, {row['scheme']}, seed {row['seed']}: format error {errors}", flush=True)
    order = {(job.recipe, job.scheme, job.seed): place for place, job in enumerate(jobs)}
    results.sort(key=lambda row: order[row["recipe"], row["scheme"], row["seed"]], reverse=True)
    write(options.output / "ablation.json", json.dumps(results, indent=1))
    write(options.output / "ablation.md", table(results))
    draw(results, options.output / "ablation.png")
    shutil.rmtree(options.output / "work", ignore_errors=True)
    print(table(results))
    print(f"Written: {options.output}/ablation.json, ablation.md, ablation.png; {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
