# SPDX-License-Identifier: Apache-2.0
"""Is a model of `examples/real_language` the same when it is served? Its report, by each engine and by transformers.

    python examples/real_language/compare.py --output runs/real_language … --keep_models
    python tests/serving/real_language.py --checkpoint runs/real_language/models/default-0-512 --json served.json

Held-out problems and instructions, greedy, in both modes: through transformers, and through the servers of vLLM and
llama.cpp, started as the tests start them, in float32. Each figure of a server has to lie within the 95 % interval
of transformers', and every reply in its mode's class; what differs is printed, and the exit status is 1. A greedy
reply that two engines round differently at a tie becomes another text, so texts are counted, not compared.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "real_language")]

from data import DEFAULT, read_data  # noqa: E402

from tests.serving.environments import ENGINES, install  # noqa: E402
from tests.serving.servers import serving  # noqa: E402
from thinkfusion.cli import main as thinkfusion  # noqa: E402

FIGURES = ("format_error", "truncated", "reasoning_tokens", "answer_tokens")
SETS = ("gsm8k", "alpaca")


def write_prompts(folder: Path, samples: int, data: Path) -> Path:
    """Half of the prompts problems, half of them instructions."""
    found, path = read_data(data), folder / "prompts.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for name in SETS:
            for prompt in found.prompts(name, samples // 2):
                file.write(json.dumps({"messages": list(prompt.messages)}, ensure_ascii=False) + "\n")
    return path


def report(output: Path, prompts: Path, options: argparse.Namespace, *arguments: str) -> dict[str, Any]:
    """The report of one way to ask, and every reply's text beside it."""
    common = ["--prompts", str(prompts), "--samples", str(options.samples), "--seed", "0"]
    common += ["--max_new_tokens", str(options.max_new_tokens), "--output", str(output)]
    if thinkfusion(["evaluate", *arguments, *common]) != 0:
        sys.exit(f"evaluate {' '.join(arguments)}: failed.")
    return dict(json.loads((output / "mode_report.json").read_text(encoding="utf-8")))


def texts(output: Path) -> dict[tuple[str, int], str]:
    found: dict[tuple[str, int], str] = {}
    for line in (output / "replies.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        mode = row["mode"]
        found[mode, sum(key[0] == mode for key in found)] = f"{row.get('reasoning') or ''}\n{row.get('answer') or ''}"
    return found


def compared(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The figures of both, and what lies outside of our intervals."""
    shown: dict[str, Any] = {}
    outside = []
    for mode, own in ours["modes"].items():
        other = theirs["modes"][mode]
        shown[mode] = {"classes": [own["classes"], other["classes"]]}
        for name in FIGURES:
            low, high = own[f"{name}_interval"] or (None, None)
            shown[mode][name] = [own[name], other[name], [low, high]]
            if low is not None and not (other[name] is not None and low <= other[name] <= high):
                outside.append(f"{mode}, {name}: {other[name]}, outside of [{low}, {high}]")
    return shown, outside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=DEFAULT)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["vllm", "llama"])
    parser.add_argument("--samples", type=int, default=100, help="prompts per mode, half of each set (default 100)")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    checkpoint = options.checkpoint.resolve()
    results: dict[str, Any] = {}
    failed = False
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prompts = write_prompts(folder, options.samples, options.data)
        ours = report(folder / "transformers", prompts, options, str(checkpoint))
        own_texts = texts(folder / "transformers")
        for engine in options.engines:
            environment = install(engine)
            if environment.python is None:
                print(f"{engine}: skipped, {environment.reason}")
                continue
            (folder / f"{engine}-files").mkdir()
            with serving(engine, checkpoint, environment.python, folder / f"{engine}-files") as server:
                address = ["--endpoint", f"{server.address}/v1", "--model", server.model]
                theirs = report(folder / engine, prompts, options, *address, "--tokenizer", str(checkpoint))
            shown, outside = compared(ours, theirs)
            other_texts = texts(folder / engine)
            equal = sum(other_texts.get(key) == text for key, text in own_texts.items())
            results[engine] = {"figures": shown, "outside": outside, "texts_equal": equal, "texts": len(own_texts)}
            print(
                f"{engine}: {equal} of {len(own_texts)} texts equal; outside of the intervals: {outside or 'nothing'}"
            )
            failed |= bool(outside)
            options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if failed or not results else 0)


if __name__ == "__main__":
    main()
