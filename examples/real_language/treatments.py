# SPDX-License-Identifier: Apache-2.0
"""Which treatment makes the end of a text depend on the mode soonest? Side by side, in minutes, without generation.

    python examples/real_language/treatments.py --output runs/real_language/treatments

What breaks a switch is decided where a text ends: thinking mode has to close the trace there, non-thinking mode to end
the turn. So each treatment trains the same short problems for 40 steps, and every 10 steps the probabilities of both
tokens are looked at, in both modes, after held-out solutions and after answers to instructions, a kind of text that
was trained in no mode. `gap` is the difference between the modes of log P(close) - log P(end): 0 means that the mode
decides nothing, whatever P(close) is. `again` is what thinking mode writes after the same text as the answer, its trace
being closed already: P(close) there is how often a reply closes a second time. The base has one expert, so that a step
is half as long as in `compare.py`.
"""

import argparse
import gc
import json
import os
import random
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

from compare import MODES, Job
from data import DEFAULT, DataMissingError, RealData, as_conversation, draw_written, read_data
from experts import choose_experts
from make_base import BaseError, ensure_base
from trainers import FROZEN, common_settings

LONGEST_PROBLEM, LONGEST_ANSWER = 330, 400
"""Characters, so that a step is short."""
HELD_OUT, ROWS_OF_A_STEP = 16, 3
STATES = (*MODES, "again")


class Treatment(NamedTuple):
    """`written`: the share of problems whose non-thinking answer is the solution; settings of the trainer; `again`:
    the share of those whose answer after the trace is the solution again."""

    written: float
    settings: dict[str, Any]
    again: float = 0.0


TREATMENTS = {
    "closing-5-short": Treatment(0.0, {"control_token_weight": 5.0, "end_of_turn_weight": 1.0}),
    "both-5-short": Treatment(0.0, {"control_token_weight": 5.0, "end_of_turn_weight": 5.0}),
    "both-5-written": Treatment(1.0, {"control_token_weight": 5.0, "end_of_turn_weight": 5.0}),
    "both-5": Treatment(0.5, {"control_token_weight": 5.0, "end_of_turn_weight": 5.0}),
    "stays": Treatment(0.5, {"control_token_weight": 15.0, "end_of_turn_weight": 10.0}),
    "default": Treatment(0.5, {}),
    "again": Treatment(0.5, {}, 0.5),
}
"""By name; "short" answers all problems by their last line in non-thinking mode, "written" by their solution. Weights
that are given stay, those of the default fall."""


def train_rows(data: RealData, rows: int, treatment: Treatment, seed: int) -> list[Any]:
    short = [row for row in data.problems if len(row["question"] + row["reasoning"]) < LONGEST_PROBLEM]
    return [
        as_conversation([say_again(draw_written(row, seed, treatment.written), seed, treatment.again)])
        for row in short[:rows]
    ]


def say_again(row: dict[str, str], seed: int, share: float) -> dict[str, str]:
    """The problem, in that share of them with its solution again as the answer after the trace."""
    if random.Random(f"again {seed} {row['question']}").random() >= share:
        return row
    return {**row, "answer": row["reasoning"], "written": row.get("written", row["answer"])}


def endings(data: RealData) -> dict[str, list[tuple[str, str, str]]]:
    """Held-out questions, texts after which something ends, and traces that precede such a text where it is said again.

    Of problems the trace is the text, of instructions it is made by the rule of `data.trace_of`.
    """
    problems = [row for row in data.tests if len(row["question"] + row["reasoning"]) < LONGEST_PROBLEM]
    asked = [row for row in data.held_out_instructions if len(row["answer"]) < LONGEST_ANSWER]
    return {
        "gsm8k": [(row["question"], row["reasoning"], row["reasoning"]) for row in problems[:HELD_OUT]],
        "alpaca": [(row["question"], row["answer"], row["trace"]) for row in asked[:HELD_OUT]],
    }


def look(model: Any, tokenizer: Any, texts: list[tuple[str, str, str]]) -> dict[str, float]:
    """Mean probabilities of the closing token and of the end of the turn after the texts, by mode, and after the same
    texts as answers to closed traces (`again`); that of the closing token inside of texts, in thinking mode; and the
    gap."""
    import torch

    from thinkfusion import Mode, render
    from thinkfusion.generation import Prompter
    from thinkfusion.rendering import Renderer

    prompter, renderer = Prompter(tokenizer), Renderer(tokenizer)
    ends = tokenizer.convert_tokens_to_ids(["</think>", "<|im_end|>"])
    logs: dict[str, list[list[float]]] = {state: [] for state in STATES}
    inside = []

    def scores_of(ids: list[int]) -> Any:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].float().log_softmax(-1)

    for question, text, trace in texts:
        written = tokenizer(text, add_special_tokens=False)["input_ids"]
        for mode in MODES:
            prompt = prompter.prompt_ids([{"role": "user", "content": question}], Mode.parse(mode), None)
            scores = scores_of([*prompt, *written])[len(prompt) - 1 :]
            logs[mode].append(scores[-1, ends].tolist())
            if mode == "thinking":
                inside.append(float(scores[:-1, ends[0]].exp().mean()))
        said = as_conversation([{"question": question, "reasoning": trace, "answer": text}])
        logs["again"].append(scores_of(render(said, renderer, "thinking").ids[:-1])[-1, ends].tolist())
    found = {state: torch.tensor(each, dtype=torch.float64) for state, each in logs.items()}
    odds = {state: (each[:, 0] - each[:, 1]).mean() for state, each in found.items()}
    figures = {
        f"{state}_{name}": round(float(each.exp()[:, place].mean()), 6)
        for state, each in found.items()
        for place, name in enumerate(("closes", "ends"))
    }
    figures["thinking_closes_inside"] = round(sum(inside) / len(inside), 6)
    return {**figures, "gap": round(float(odds["thinking"] - odds["non_thinking"]), 4)}


def run(name: str, data: RealData, options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Train one treatment and look every so many steps."""
    from transformers import TrainerCallback

    from thinkfusion import ThinkFusionConfig, ThinkFusionTrainer, install_chat_template, load_checkpoint

    model, tokenizer = load_checkpoint(options.output / "base", dtype="float32")
    choose_experts(model, "cpu", trained=True)
    install_chat_template(tokenizer, model)
    treatment, texts = TREATMENTS[name], endings(data)
    found: list[dict[str, Any]] = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % options.every == 0:
                model.eval()
                seen = {kind: look(model, tokenizer, each) for kind, each in texts.items()}
                model.train()
                found.append({"treatment": name, "seed": options.seed, "step": state.global_step, **seen})
                print(line(found[-1]), flush=True)

    job = Job("default", options.seed, options.rows, {"bf16": False, "device": "cpu"}, str(work), deadline=0.0)
    own = {"logging_strategy": "no", "probe_rows": 0, "per_device_train_batch_size": ROWS_OF_A_STEP}
    settings = ThinkFusionConfig(**common_settings(job) | own, **FROZEN, **treatment.settings)
    rows = train_rows(data, options.rows, treatment, options.seed)
    trainer = ThinkFusionTrainer(model, settings, train_dataset=rows, processing_class=tokenizer, callbacks=[Look()])
    trainer.train()
    return found


COLUMNS = (
    "treatment",
    "step",
    "text",
    "thinking: P(close), P(end)",
    "non-thinking: P(close), P(end)",
    "again: P(close), P(end)",
    "gap",
    "inside",
)
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def line(row: dict[str, Any]) -> str:
    lines = []
    for kind in ("gsm8k", "alpaca"):
        seen = row[kind]
        pairs = [f"{seen[f'{state}_closes']:.2f}, {seen[f'{state}_ends']:.2f}" for state in STATES]
        parts = (
            row["treatment"],
            row["step"],
            kind,
            *pairs,
            f"{seen['gap']:.2f}",
            f"{seen['thinking_closes_inside']:.4f}",
        )
        lines.append(f"| {' | '.join(map(str, parts))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the base, treatments.json and .md")
    parser.add_argument("--data", type=Path, default=DEFAULT, help="folder of the data (default: %(default)s)")
    parser.add_argument("--package", type=Path, help="the wheel that the base is made of, where there is no network")
    parser.add_argument("--treatments", nargs="+", choices=TREATMENTS, default=list(TREATMENTS), help="(default: all)")
    parser.add_argument("--rows", type=int, default=120, help="problems, three a step (default: %(default)s)")
    parser.add_argument("--every", type=int, default=10, help="steps between two looks (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: %(default)s)")
    options = parser.parse_args()
    try:
        data = read_data(options.data)
        ensure_base(options.output / "base", experts=1, top_k=1, package=options.package)
    except (BaseError, DataMissingError) as error:
        sys.exit(f"treatments: {error}")
    warnings.filterwarnings("ignore")
    path = options.output / "treatments.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    print(HEAD, flush=True)
    for name in options.treatments:
        results = [row for row in results if (row["treatment"], row["seed"]) != (name, options.seed)]
        begun, work = time.monotonic(), options.output / "work"
        shutil.rmtree(work, ignore_errors=True)
        results += run(name, data, options, work)
        gc.collect()
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text("\n".join([HEAD, *map(line, results)]) + "\n", encoding="utf-8")
        print(f"{name}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    shutil.rmtree(options.output / "work", ignore_errors=True)


if __name__ == "__main__":
    main()
