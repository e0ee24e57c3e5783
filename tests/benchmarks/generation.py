# SPDX-License-Identifier: Apache-2.0
"""Replies in batches whose ended rows leave, against batches computed to their end: in turn, on one checkpoint.

    python tests/benchmarks/generation.py --model runs/tiny --json generation.json
    python tests/benchmarks/generation.py --model FOLDER --prompts questions.jsonl --temperature 0.6

The peer is one call of transformers' `generate` for each batch. Prompts are problems of the embedded tasks, or the
`question` of each row of a file; each is asked in both modes. Rounds take turns at who is first. Greedy replies are the
same but for rounding; how many are is printed.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from thinkfusion import EvaluationPrompt, Mode, load_checkpoint, shrinking, task_prompts
from thinkfusion.generation import Sampling
from thinkfusion.replying import Replier


def asked(path: Path | None, count: int) -> list[EvaluationPrompt]:
    if path is None:
        return list(task_prompts(count))
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]
    return [EvaluationPrompt([{"role": "user", "content": row["question"]}]) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=Path, help="JSONL with a field question (default: the embedded task)")
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    model, tokenizer = load_checkpoint(options.model, dtype=options.dtype)
    sampling = Sampling(options.max_new_tokens, options.temperature)
    replier = Replier(model, tokenizer, sampling, options.batch_size, 0, False)
    prompts = asked(options.prompts, options.count)
    jobs = [replier.job(prompt.messages, mode) for mode in Mode for prompt in prompts]
    assert shrinking.can_shrink(model, min(options.batch_size, len(prompts))), "this batch is generated in one call"
    ratios, seconds, equal = [], [], []
    for turn in range(options.rounds):
        found: dict[bool, tuple[float, list[Any]]] = {}
        for shrinks in (True, False) if turn % 2 == 0 else (False, True):
            shrinking.can_shrink = lambda *_, shrinks=shrinks: shrinks
            begun = time.perf_counter()
            replies = replier.replies(jobs)
            found[shrinks] = time.perf_counter() - begun, replies
        ratios.append(found[True][0] / found[False][0])
        seconds.append(found[False][0])
        equal.append(sum(ours == whole for ours, whole in zip(found[True][1], found[False][1], strict=True)))
        print(f"round {turn + 1}: {ratios[-1]:.2f} times as long as one call ({seconds[-1]:.1f} s)", flush=True)
    print(f"{statistics.median(ratios):.2f} times as long (median); {equal[0]} of {len(jobs)} replies are the same")
    if options.json is not None:
        figures = {"ratios": {"generation": statistics.median(ratios)}, "rounds": ratios, "seconds_whole": seconds}
        options.json.write_text(json.dumps({**figures, "equal": equal, "replies": len(jobs)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
