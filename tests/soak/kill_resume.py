# SPDX-License-Identifier: Apache-2.0
"""Kills a training at random moments, goes on from what is on the disk, and compares with a run never killed.

    python tests/soak/kill_resume.py --kills 20 --seed 0 --json kill_resume.json

The training is a real one, small: the embedded base checkpoint on the embedded tasks, both modes, with a checkpoint
every third step. SIGKILL comes alternately during training (after some steps, and a part of one) and during a save
(after a part of the time that saves take). Every start is a process of its own, forked from one that has only imported,
and goes on from the last whole checkpoint. When a run gets to its end before all kills are spent, another one begins,
in an empty folder. At every end, all that the last checkpoint holds as tensors, weights, optimizer, random states, is
compared with that of the run never killed. With `--processes 2`, one process is killed first, and the other up to a
tenth of a second later.

Ends with 1 if a start did not go on where it should, or an end differs: at all in one process, by more than 1e-6 in the
weights of several.
"""

import argparse
import faulthandler
import json
import os
import queue
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from tests.forked import FORKS, print_into, take

SAVE_STEPS = 3
PATIENCE = 90.0
TOLERANCE = {1: 0.0, 2: 1e-6}


# What is killed -------------------------------------------------------------------------------------------------------


def train(
    folder: Path, steps: int, lora: bool, environment: dict[str, str], printed: Path, report: Connection | None
) -> None:
    """Train to the end from the last whole checkpoint, and tell each step and save."""
    print_into(printed, printed)
    take(environment)
    from transformers import TrainerCallback

    from thinkfusion import (
        Conversation,
        ThinkFusionConfig,
        ThinkFusionTrainer,
        generate_samples,
        install_chat_template,
        lora_config,
    )
    from thinkfusion import load_checkpoint as load
    from thinkfusion.saving import last_checkpoint

    class Telling(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            tell("step", state.global_step + 1)

    class Trainer(ThinkFusionTrainer):
        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            tell("save", self.state.global_step)
            super()._save_checkpoint(*args, **kwargs)
            tell("saved", self.state.global_step)

    def tell(event: str, step: int) -> None:
        if report is not None:
            report.send({"event": event, "step": step, "time": time.monotonic()})

    faulthandler.register(signal.SIGUSR1)  # for one who waits in vain
    model, tokenizer = load("tiny-base")
    install_chat_template(tokenizer, model)
    settings = ThinkFusionConfig(
        output_dir=str(folder),
        max_steps=steps,
        save_strategy="steps",
        save_steps=SAVE_STEPS,
        save_total_limit=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        balance_loss_coef=0.01,
        logging_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = [
        Conversation.from_messages(
            [
                {"role": "user", "content": sample.question},
                {"role": "assistant", "content": sample.answer, "reasoning_content": sample.reasoning},
            ]
        )
        for sample in generate_samples(100, seed=0)
    ]
    adapter = lora_config(model, tokenizer, r=4) if lora else None
    trainer = Trainer(
        model,
        settings,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=[Telling()],
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    if report is not None:
        report.close()
    os._exit(0)  # torch's gloo aborts now and then while an interpreter ends


# Who kills ------------------------------------------------------------------------------------------------------------


class Run:
    """The processes of one start, and what the first of them tells."""

    def __init__(self, folder: Path, processes: int, steps: int, lora: bool) -> None:
        self.events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.written = tempfile.NamedTemporaryFile()  # noqa: SIM115 - as long as the processes
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.told, report = FORKS.Pipe(duplex=False)
        self.processes = []
        for rank in range(processes):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
            ranks = {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
            own = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
            environment = os.environ | own | (ranks if processes > 1 else {})
            given = (folder, steps, lora, environment, Path(self.written.name), report if rank == 0 else None)
            self.processes.append(FORKS.Process(target=train, args=given))
            self.processes[-1].start()
        report.close()  # the only one is the first process's: its end is the end of what is told
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                self.events.put(self.told.recv())
        self.events.put(None)

    def wait_for(self, wanted: str, count: int = 1) -> dict[str, Any] | None:
        """The event of this name that comes `count`-th from now; None if the training ends before."""
        while True:
            try:
                event = self.events.get(timeout=PATIENCE)
            except queue.Empty:
                raise RuntimeError(f"no step for {PATIENCE:.0f} s:\n{self.stacks()}") from None
            if event is None:
                self.events.put(None)
                return None
            count -= event["event"] == wanted
            if not count:
                return event

    def stacks(self) -> str:
        """Where each process is, and what was printed before."""
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signal.SIGUSR1)
                time.sleep(1)
            process.kill()
        return f"exit codes {codes}\n{self.printed()}"

    def printed(self) -> str:
        """The end of what the processes printed."""
        return Path(self.written.name).read_text(errors="replace")[-8000:]

    def kill(self, draw: random.Random) -> None:
        for process in draw.sample(self.processes, len(self.processes)):
            process.kill()
            if len(self.processes) > 1:
                time.sleep(draw.uniform(0, 0.1))
        for process in self.processes:
            process.join()

    def end(self) -> None:
        """Wait for the end of a training that is not killed; RuntimeError, with what it printed, if it failed."""
        for process in self.processes:
            process.join(PATIENCE)
        codes = [process.exitcode for process in self.processes]
        if any(code != 0 for code in codes):  # None: it is still there
            raise RuntimeError(f"exit codes {codes}:\n{self.printed()}")


def save_time(folder: Path, processes: int, steps: int, lora: bool) -> float:
    """Make the run never killed; the mean of the seconds that its saves took."""
    run, times = Run(folder, processes, steps, lora), []
    while (begun := run.wait_for("save")) is not None:
        done = run.wait_for("saved")
        if done is not None:
            times.append(done["time"] - begun["time"])
    run.end()
    return sum(times) / len(times)


def kill_once(run: Run, moment: str, seconds: float, draw: random.Random) -> dict[str, Any] | None:
    """Kill a started run in training or in a save; what was killed when, None if it came to its end before."""
    first = run.wait_for("step")
    if first is None:
        return None
    event: dict[str, Any] | None = first
    if moment == "save":
        event = run.wait_for("save", draw.randint(1, 2))
        time.sleep(draw.uniform(0, 1.1 * seconds))
    else:
        for _ in range(draw.randint(0, SAVE_STEPS + 1)):
            event = run.wait_for("step")
        time.sleep(draw.uniform(0, 0.2))
    if event is None:
        return None
    run.kill(draw)
    return {"moment": moment, "began_at_step": first["step"], "killed_at_step": event["step"]}


def compare(folder: Path, reference: Path, steps: int) -> dict[str, float]:
    """By file of tensors of the last checkpoint, the largest difference; infinite where something is missing."""
    import torch
    from safetensors.torch import load_file

    found = {}
    ours, theirs = (place / f"checkpoint-{steps}" for place in (folder, reference))
    for path in sorted(theirs.glob("*.safetensors")):
        if not (ours / path.name).is_file():
            found[path.name] = float("inf")
            continue
        one, other = load_file(ours / path.name), load_file(path)
        same = one.keys() == other.keys() and all(one[name].shape == other[name].shape for name in one)
        gaps = [(one[name].double() - other[name].double()).abs().max() for name in one if one[name].numel() and same]
        found[path.name] = float(torch.stack(gaps).max()) if same and gaps else (0.0 if same else float("inf"))
    return found


def soak(kills: int, seed: int, processes: int, steps: int, lora: bool, work: Path) -> dict[str, Any]:
    """Kill and go on, until all kills are spent and the run is at its end."""
    from thinkfusion.saving import last_checkpoint

    draw = random.Random(seed)
    seconds = save_time(work / "reference", processes, steps, lora)
    print(f"A run of {steps} steps, never killed, is there; its saves took {seconds:.2f} s each.")
    done: list[dict[str, Any]] = []
    ends: list[dict[str, float]] = []
    failures: list[str] = []
    folder, moments = work / "killed", ("training", "save")
    while not ends or len(done) < kills:
        last = last_checkpoint(folder)
        expected = int(Path(last).name.removeprefix("checkpoint-")) + 1 if last else 1
        run = Run(folder, processes, steps, lora)
        killed = kill_once(run, moments[len(done) % 2], seconds, draw) if len(done) < kills else None
        if killed is not None:
            left = [path.name for path in folder.glob("unfinished-*")] if folder.is_dir() else []
            done.append(killed | {"left_unfinished": left})
            print(f"kill {len(done)}: {json.dumps(done[-1])}", flush=True)
            if killed["began_at_step"] != expected:
                failures.append(f"kill {len(done)}: it began at step {killed['began_at_step']}, not at {expected}")
            continue
        if len(done) >= kills:
            while run.wait_for("saved") is not None:
                pass
        run.end()
        ends.append(compare(folder, work / "reference", steps))
        print(f"at its end; largest differences: {json.dumps(ends[-1])}", flush=True)
        shutil.rmtree(folder)
    weights = [value for end in ends for name, value in end.items() if "model" in name]
    everything = [value for end in ends for value in end.values()]
    tolerance = TOLERANCE[min(processes, 2)]
    failures += [] if max(weights) <= tolerance else [f"weights differ by {max(weights)}, allowed are {tolerance}"]
    if processes == 1 and max(everything) > 0:
        failures.append(f"optimizer or random states differ by {max(everything)}")
    return {
        "seed": seed,
        "processes": processes,
        "lora": lora,
        "steps": steps,
        "seconds_per_save": seconds,
        "kills": done,
        "killed_in_save": sum(f"unfinished-{kill['killed_at_step']}" in kill["left_unfinished"] for kill in done),
        "ends": ends,
        "largest_difference": max(weights),
        "failures": failures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="how often a process is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--processes", type=int, default=1, help="processes of a run")
    parser.add_argument("--steps", type=int, default=30, help="of a run; a checkpoint comes at every third")
    parser.add_argument("--lora", action="store_true", help="train an adapter, and not all weights")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        found = soak(arguments.kills, arguments.seed, arguments.processes, arguments.steps, arguments.lora, Path(work))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    print(
        f"{len(found['kills'])} kills, {found['killed_in_save']} of them left a half-written checkpoint; "
        f"{len(found['ends'])} runs to the end; weights differ by {found['largest_difference']} at most."
    )
    if found["failures"]:
        sys.exit("\n".join(found["failures"]))


if __name__ == "__main__":
    main()
