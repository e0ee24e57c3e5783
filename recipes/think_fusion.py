# SPDX-License-Identifier: Apache-2.0
"""The whole Think-Fusion recipe: SFT of each mode, merge, SFT of both modes on the same prompts, RL in both modes.

    accelerate launch recipes/think_fusion.py                                     # the embedded default
    python recipes/think_fusion.py --config my.yaml --stages merge sft_overlap    # these stages alone
    python recipes/think_fusion.py --skip rl

The recipe is that of A.X K1 (arXiv 2601.09200). Each stage is a command of its own (`recipes/sft.py`, `thinkfusion
fuse`, `recipes/rl.py`) with a folder and a log, is measured when it ends, and is not run again while its inputs stay
the same; one that was stopped goes on. After each the table of all stages is written: think_fusion.json, .md and .png.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from stage_table import MODES, draw, draw_sweeps, figures, percent, table

from thinkfusion import generate_samples, task_prompts
from thinkfusion.tasks import LANGUAGES, TASKS

RECIPES = Path(__file__).parent
DEFAULT_CONFIG = RECIPES / "configs" / "think_fusion_tiny.yaml"
EMBEDDED = "tasks"
TRACKS = ("sft_thinking", "sft_non_thinking")
STAGES = (*TRACKS, "merge", "sft_overlap", "rl")
FILES = ("thinking", "non_thinking", "overlap", "rl", "evaluation")
DATA_OF = {
    "sft_thinking": "thinking",
    "sft_non_thinking": "non_thinking",
    "merge": "evaluation",
    "sft_overlap": "overlap",
}
DATA_OF["rl"] = "rl"
MIXTURE_OF = {"sft_thinking": "thinking", "sft_non_thinking": "non_thinking", "sft_overlap": "paired"}
SETTINGS = ("model", "output_dir", "seeds", "seeds_at_once", "data", "rows", "held_out", "common_sft")
SETTINGS += ("accelerate_config", "push_to")
LAUNCHER = ("ACCELERATE_", "FSDP_", "MASTER_", "TORCHELASTIC_", "GROUP_", "ROLE_")
PROCESS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


class StageError(Exception):
    """A stage that cannot run, with what to do."""


@dataclass(frozen=True)
class Plan:
    """What is to be done, of the configuration and the flags."""

    model: str
    output: Path
    seeds: list[int]
    at_once: int
    """Seeds that run at the same time."""
    chosen: tuple[str, ...]
    """Stages that may run; the others must be there already."""
    skipped: tuple[str, ...]
    data: str | dict[str, str]
    rows: dict[str, int]
    """How many of each kind of the embedded rows are drawn."""
    held_out: list[str]
    """Tasks without a worked answer in the SFT, whose prompts RL has."""
    accelerate_config: str | None
    push_to: str | None
    """A repository of the Hub: the last stage of the first seed is uploaded there, private, with its report."""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Flags of each stage's command, and of `evaluation`."""


# The plan -------------------------------------------------------------------------------------------------------------


def read_plan() -> Plan:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG)
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--model", help="the base")
    parser.add_argument("--stages", nargs="+", choices=STAGES, help="run these alone; their inputs must be there")
    parser.add_argument(
        "--skip", nargs="+", choices=STAGES, default=[], help="leave these out: the next goes on without"
    )
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--push_to", metavar="REPO", help="upload the last stage's checkpoint of the first seed there")
    flags = parser.parse_args()
    try:
        given = yaml.safe_load(flags.config.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise StageError(f"config: {flags.config} could not be read: {error}") from None
    if not isinstance(given, dict):
        raise StageError(
            f"config: {flags.config} holds no settings; begin with recipes/configs/think_fusion_tiny.yaml."
        )
    missing = [name for name in ("model", "output_dir") if not (given.get(name) or getattr(flags, name))]
    if missing:
        raise StageError(f"config: {flags.config} lacks {', '.join(missing)}; add it, or give it as a flag.")
    known = {"evaluation", *SETTINGS, *STAGES}
    unknown = sorted(set(given) - known)
    if unknown:
        raise StageError(
            f"config: {flags.config} has {', '.join(unknown)}, expected some of {', '.join(sorted(known))}."
        )
    data = given.get("data", EMBEDDED)
    if data != EMBEDDED:
        absent = [name for name in FILES if not Path(data.get(name, "")).is_file()]
        if absent:
            raise StageError(f"data: no file for {', '.join(absent)}; name one for each of {', '.join(FILES)}.")
    common = given.get("common_sft") or {}
    settings = {stage: dict(given.get(stage) or {}) for stage in (*STAGES, "evaluation")}
    settings |= {stage: {**common, **settings[stage]} for stage in MIXTURE_OF}
    return Plan(
        model=flags.model or given["model"],
        output=flags.output_dir or Path(given["output_dir"]),
        seeds=flags.seeds or list(given.get("seeds", [0])),
        at_once=int(given.get("seeds_at_once", 1)),
        chosen=tuple(stage for stage in STAGES if stage not in flags.skip and stage in (flags.stages or STAGES)),
        skipped=tuple(flags.skip),
        data=data,
        rows=given.get("rows") or {},
        held_out=list(given.get("held_out") or []),
        accelerate_config=given.get("accelerate_config"),
        push_to=flags.push_to or given.get("push_to"),
        settings=settings,
    )


# Data -----------------------------------------------------------------------------------------------------------------


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def files_of(plan: Plan, seed: int) -> dict[str, Path]:
    """The files of rows and prompts; those of the embedded tasks are written here, no question in two of them."""
    if isinstance(plan.data, dict):
        return {name: Path(plan.data[name]) for name in FILES}
    names = [f"{task}_{language}" for task in TASKS for language in LANGUAGES]
    if unknown := [name for name in plan.held_out if name not in names]:
        raise StageError(f"held_out: {', '.join(unknown)} is unknown; choose some of {', '.join(names)}.")
    answered = [name for name in names if name not in plan.held_out]
    taken: set[str] = set()

    def draw(kind: str, among: list[str], count: int) -> list[Any]:
        """`count` samples of the tasks `among`, of which no question was drawn before."""
        seed_of_kind, wanted = 100 * seed + FILES.index(kind), len(names) * count
        drawn = [one for one in generate_samples(wanted, seed=seed_of_kind) if one.name in among]
        fresh = [one for one in drawn if one.question not in taken][:count]
        taken.update(one.question for one in fresh)
        return fresh

    rows: dict[str, list[dict[str, Any]]] = {}
    for name in ("thinking", "non_thinking", "overlap"):
        rows[name] = [
            {
                "question": one.question,
                "reasoning": "" if name == "non_thinking" else one.reasoning,
                "answer": one.answer,
            }
            for one in draw(name, answered, plan.rows[name])
        ]
    # Half of the prompts of RL are of the tasks that were held out.
    held = plan.rows["rl"] // 2 if plan.held_out else 0
    drawn = [*draw("rl", answered, plan.rows["rl"] - held), *draw("rl", plan.held_out, held)]
    rows["rl"] = [
        {"prompt": one.question, "answer": one.solution, "task": one.name, "language": one.language} for one in drawn
    ]
    rows["evaluation"] = [
        {
            "prompt": one.question,
            "answer": one.solution,
            "task": one.task,
            "language": one.language,
        }
        for one in task_prompts(plan.rows["evaluation"], seed=0)
    ]
    folder = plan.output / "data" / f"seed_{seed}"
    for name, each in rows.items():
        write_rows(folder / f"{name}.jsonl", each)
    return {name: folder / f"{name}.jsonl" for name in rows}


# Stages ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One stage of one seed."""

    plan: Plan
    name: str
    seed: int
    files: dict[str, Path]

    @property
    def place(self) -> Path:
        return self.plan.output / f"seed_{self.seed}"

    @property
    def folder(self) -> Path:
        return self.place / self.name

    @property
    def record(self) -> Path:
        return self.place / f"{self.name}.json"

    def sibling(self, name: str) -> "Stage":
        return Stage(self.plan, name, self.seed, self.files)

    def models(self) -> list[str]:
        """The checkpoints that it starts from. Raises StageError for one that is not there."""
        if self.name in TRACKS:
            return [self.plan.model]
        if self.name == "merge":
            return [self._made(track) for track in TRACKS]
        before = [stage for stage in STAGES[2 : STAGES.index(self.name)] if stage not in self.plan.skipped]
        return [self._made(before[-1]) if before else self.plan.model]

    def _made(self, name: str) -> str:
        other = self.sibling(name)
        if not other.finished() or not (other.folder / "config.json").is_file():
            raise StageError(
                f"{self.name}: its input is missing, the checkpoint of {name} in {other.folder}. Run {name} first "
                f"(leave it out of --skip, or name it in --stages), or skip {self.name}."
            )
        return str(other.folder)

    def finished(self) -> dict[str, Any] | None:
        """What was noted at its end."""
        if not self.record.is_file():
            return None
        noted: dict[str, Any] = json.loads(self.record.read_text(encoding="utf-8"))
        return noted if noted.get("modes") else None

    def inputs(self) -> dict[str, str]:
        """What decides its result. A stage before it counts by when it ended, a base by its files."""

        def made(name: str) -> str:
            folder = Path(name)
            ended = self.place / f"{folder.name}.json"
            if folder.parent == self.place and ended.is_file():
                return digest(ended.read_bytes())
            files = sorted(folder.glob("*")) if folder.is_dir() else []
            return digest(repr([name, *((each.name, each.stat().st_size) for each in files)]).encode())

        settings = {"own": self.plan.settings[self.name], "evaluation": self.plan.settings["evaluation"]}
        return {
            "model": " ".join(made(name) for name in self.models()),
            "settings": digest(json.dumps(settings, sort_keys=True).encode()),
            "data": digest(self.files[DATA_OF[self.name]].read_bytes()),
            "evaluation": digest(self.files["evaluation"].read_bytes()),
        }

    def command(self) -> list[str]:
        settings = self.plan.settings[self.name]
        if self.name == "merge":
            flags = {"prompts": self.files["evaluation"], "output": self.folder, "seed": self.seed, **settings}
            return [*thinkfusion("fuse"), *self.models(), *as_flags(flags)]
        own: dict[str, Any] = {"model": self.models()[0], "output_dir": str(self.folder), "seed": self.seed}
        own["evaluation_samples"] = 0  # measured as all stages are
        if self.name == "rl":
            own |= {"prompts": str(self.files["rl"])}
        else:
            own |= {"dataset": [str(self.files[DATA_OF[self.name]])], "mixture": MIXTURE_OF[self.name], "resume": True}
        script = "rl.py" if self.name == "rl" else "sft.py"
        written = self.place / "settings" / f"{self.name}.yaml"
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(yaml.safe_dump({**settings, **own}, sort_keys=False), encoding="utf-8")
        launch = [sys.executable]
        if self.plan.accelerate_config:
            launch += ["-m", "accelerate.commands.launch", "--config_file", self.plan.accelerate_config]
        return [*launch, str(RECIPES / script), "--config", str(written)]

    def measure(self) -> list[str]:
        flags = {"prompts": self.files["evaluation"], "output": self.folder, **self.plan.settings["evaluation"]}
        return [*thinkfusion("evaluate"), str(self.folder), *as_flags(flags)]

    def call(self, command: list[str]) -> None:
        """Run a command, its output in the log. Raises StageError with its last line if it fails."""
        log = self.place / f"{self.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        given = {
            name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER) and name not in PROCESS
        }
        with log.open("a", encoding="utf-8") as output:
            done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=given, check=False)
        if done.returncode:
            lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
            kept = [stage for stage in STAGES if self.sibling(stage).finished()]
            raise StageError(
                f"{self.name}, seed {self.seed}: failed with status {done.returncode}: {lines[-1] if lines else ''}\n"
                f"All it said is in {log}. Finished stages are kept ({', '.join(kept) or 'none yet'}): mend it, and "
                "give the same command again."
            )

    def run(self, said: Callable[[str], None]) -> dict[str, Any]:
        """Run and measure it, unless that was done with the same inputs; what was noted at its end."""
        inputs, before = self.inputs(), self.finished()
        if before and before["inputs"] == inputs:
            said(f"seed {self.seed}: {self.name} is there ({before['seconds']:.0f} s)")
            return before
        begun_with = self.place / f"{self.name}.inputs.json"
        started = json.loads(begun_with.read_text()) if begun_with.is_file() else before and before["inputs"]
        if started and started != inputs:
            changed = [name for name in inputs if inputs[name] != started.get(name)]
            said(f"seed {self.seed}: {self.name} runs again, since its inputs changed: {', '.join(changed)}")
        if self.folder.exists() and (started != inputs or self.name in {"merge", "rl"}):
            shutil.rmtree(self.folder)  # an SFT with the same inputs goes on from its last checkpoint
        self.record.unlink(missing_ok=True)
        self.place.mkdir(parents=True, exist_ok=True)
        begun_with.write_text(json.dumps(inputs), encoding="utf-8")
        start = time.monotonic()
        self.call(self.command())
        for checkpoint in self.folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        self.call(self.measure())
        report = json.loads((self.folder / "mode_report.json").read_text(encoding="utf-8"))
        noted = {
            "stage": self.name,
            "seed": self.seed,
            "seconds": round(time.monotonic() - start, 1),
            "inputs": inputs,
            "modes": {mode: figures(report["modes"][mode], self.plan.held_out) for mode in MODES},
        }
        if self.name == "merge":
            noted["ratio"] = json.loads((self.folder / "fusion.json").read_text(encoding="utf-8"))["ratio"]
        write(self.record, json.dumps(noted, indent=1))
        begun_with.unlink()
        told = ", ".join(f"{mode} {percent(noted['modes'][mode]['format_error'])}" for mode in MODES)
        said(f"seed {self.seed}: {self.name} took {noted['seconds']:.0f} s; format errors {told}")
        return noted


def thinkfusion(verb: str) -> list[str]:
    return [sys.executable, "-m", "thinkfusion.cli", verb]


def as_flags(settings: dict[str, Any]) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def save(plan: Plan) -> list[dict[str, Any]]:
    """Write the table of all that is finished."""
    stages = [Stage(plan, name, seed, {}) for seed in plan.seeds for name in STAGES]
    results = [noted for stage in stages if (noted := stage.finished())]
    shown = [{name: value for name, value in row.items() if name != "inputs"} for row in results]
    write(plan.output / "think_fusion.json", json.dumps(shown, indent=1))
    write(plan.output / "think_fusion.md", table(results, STAGES))
    if results:
        draw(results, STAGES, plan.output / "think_fusion.png")
        sweeps = [plan.output / f"seed_{seed}" / "merge" / "sweep.json" for seed in plan.seeds]
        draw_sweeps(sweeps, plan.output / "sweep.png")
    return results


def shares_of_cores(count: int) -> list[list[int]]:
    """The cores in as many parts; none where parts of a core would be needed, or cores cannot be chosen."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return [cores[part::count] for part in range(count)] if 1 < count <= len(cores) else []


def main() -> None:
    if int(os.environ.get("RANK", "0")):
        return  # the stages start the processes that they need
    plan = read_plan()
    begun, lock, failed = time.monotonic(), threading.Lock(), []

    def said(line: str) -> None:
        with lock:
            print(line, flush=True)
            save(plan)

    # Seeds that run at the same time share the cores, since threads that wait for each other's cores stand still.
    shares = shares_of_cores(plan.at_once)

    def work(seed: int) -> None:
        with suppress(AttributeError, IndexError):
            os.sched_setaffinity(0, shares.pop())  # of this thread, and so of the commands it starts
        files = files_of(plan, seed)
        for name in plan.chosen:
            Stage(plan, name, seed, files).run(said)

    with ThreadPoolExecutor(plan.at_once) as pool:
        for done in as_completed([pool.submit(work, seed) for seed in plan.seeds]):
            error = done.exception()
            if isinstance(error, StageError):
                failed.append(str(error))
            elif error:
                raise error
    results = save(plan)
    print(table(results, STAGES))
    print(f"Written: {plan.output}/think_fusion.json, .md, .png and sweep.png; {time.monotonic() - begun:.0f} s")
    if failed:
        sys.exit("\n".join(failed))
    if plan.push_to:
        last = Stage(plan, plan.chosen[-1], plan.seeds[0], {})
        last.call([*thinkfusion("push"), str(last.folder), plan.push_to])
        print(f"Uploaded: {last.folder} to {plan.push_to}")


if __name__ == "__main__":
    try:
        main()
    except StageError as error:
        sys.exit(str(error))
