# SPDX-License-Identifier: Apache-2.0
"""How fast fusing is, against copying the two checkpoints and against mergekit, and what memory it takes.

    python tests/benchmarks/fusing.py --json fusing.json [--mergekit PATH_OF_ITS_PYTHON]

A random Qwen3-MoE of about a billion parameters is written twice in bfloat16. Fusing and copying run in turn, with the
files in the page cache, each into a fresh folder; ratios are of the medians. Peak memory is that of a process that
fuses, over what it held before it began, against the largest tensor. mergekit is run, where its Python is given, on
the same merge from its own environment; the time to start it and to import its libraries is measured apart and taken
off, as is ours.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

RATIO = 0.8


def write_models(work: Path, hidden: int, layers: int, experts: int) -> None:
    """Two checkpoints of one base, a few per cent apart."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from thinkfusion import load_checkpoint

    tokenizer = load_checkpoint("tiny-base")[1]
    config = Qwen3MoeConfig(
        vocab_size=32_768,
        hidden_size=hidden,
        intermediate_size=hidden,
        moe_intermediate_size=hidden // 2,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_experts=experts,
        num_experts_per_tok=4,
    )
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    for seed, name in enumerate(("thinking", "non_thinking"), start=1):
        torch.manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.001)
        model.save_pretrained(work / name, max_shard_size="500MB")
        tokenizer.save_pretrained(work / name)


def copy(work: Path, out: Path) -> None:
    """Both checkpoints, as a program that only moves their bytes would do."""
    for name in ("thinking", "non_thinking"):
        (out / name).mkdir(parents=True)
        for path in (work / name).glob("*.safetensors"):
            # In user space, through a buffer, as any program that looks at the bytes has to.
            with path.open("rb") as source, (out / name / path.name).open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)


def fuse(work: Path, out: Path) -> None:
    from thinkfusion.fusing import FusionOptions, fuse_checkpoints

    fuse_checkpoints(work / "thinking", work / "non_thinking", out, FusionOptions(RATIO))


def timed(function: Any, work: Path, out: Path) -> float:
    begun = time.perf_counter()
    function(work, out)
    taken = time.perf_counter() - begun
    shutil.rmtree(out)
    return taken


def peak_memory(work: Path) -> int:
    """Bytes of private memory that fusing adds at its highest, in a process of its own."""
    program = (
        "import sys, pathlib; from tests.benchmarks.fusing import watch; "
        "print(watch(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])))"
    )
    root = Path(__file__).resolve().parents[2]
    ran = subprocess.run(
        [sys.executable, "-c", program, str(work), str(work / "watched")],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    shutil.rmtree(work / "watched")
    return int(ran.stdout.split()[-1])


def watch(work: Path, out: Path) -> int:
    """Fuse, and note the resident memory a hundred times a second; what was there before is taken off."""
    import psutil
    import torch

    import thinkfusion.fusing  # noqa: F401 - not a part of what is watched

    torch.ones(1000, 1000, dtype=torch.bfloat16).double().sum()
    process, highest, done = psutil.Process(), 0, threading.Event()
    before = process.memory_info().rss

    def look() -> None:
        nonlocal highest
        while not done.wait(0.01):
            highest = max(highest, process.memory_info().rss)

    thread = threading.Thread(target=look)
    thread.start()
    fuse(work, out)
    done.set()
    thread.join()
    return highest - before


def mergekit_times(python: Path, work: Path) -> tuple[float, float]:
    """Seconds of a merge by mergekit, and those of starting it and of loading its libraries."""
    (work / "merge.yaml").write_text(
        "merge_method: linear\ndtype: bfloat16\nparameters: {normalize: false}\nmodels:\n"
        + "".join(
            f"  - model: {work / name}\n    parameters: {{weight: {weight}}}\n"
            for name, weight in (("thinking", RATIO), ("non_thinking", round(1 - RATIO, 6)))
        )
    )
    load = "import torch, transformers, mergekit.merge, mergekit.config, mergekit.options"
    times = []
    for command in (
        [python, "-c", load],
        [python.with_name("mergekit-yaml"), work / "merge.yaml", work / "mergekit", "--quiet", "--trust-remote-code"],
    ):
        begun = time.perf_counter()
        ran = subprocess.run([str(each) for each in command], capture_output=True, text=True, check=False)
        times.append(time.perf_counter() - begun)
        if ran.returncode:
            raise RuntimeError(f"mergekit: {ran.stderr[-2000:]}")
    return times[1], times[0]


def largest_tensor(folder: Path) -> int:
    from thinkfusion.weight_files import StoredWeights

    with StoredWeights(folder) as weights:
        return max(tensor.end - tensor.begin for tensor in weights.tensors.values())


def equal_to_mergekit(work: Path) -> float:
    """The largest difference of the two results, as a share of a tensor's largest value."""
    from transformers import AutoModelForCausalLM

    # mergekit writes the experts of a layer as one tensor, as transformers 5 holds them.
    ours, theirs = (AutoModelForCausalLM.from_pretrained(work / name).state_dict() for name in ("ours", "mergekit"))
    worst = 0.0
    for name, one in ours.items():
        gap = (one.double() - theirs[name].double()).abs().max().item()
        worst = max(worst, gap / one.abs().max().item())
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pairs", type=int, default=5, help="how often each is timed")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--experts", type=int, default=48)
    parser.add_argument("--mergekit", type=Path, help="Python of an environment with mergekit")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_models(work, arguments.hidden, arguments.layers, arguments.experts)
        size = sum(path.stat().st_size for path in (work / "thinking").glob("*.safetensors"))
        timed(copy, work, work / "out")  # brings the files into the page cache
        timed(fuse, work, work / "out")
        times: dict[str, list[float]] = {"copy": [], "fuse": [], "mergekit": []}
        starts = []
        for _ in range(arguments.pairs):
            times["copy"].append(timed(copy, work, work / "out"))
            times["fuse"].append(timed(fuse, work, work / "out"))
            if arguments.mergekit:
                taken, start = mergekit_times(arguments.mergekit.absolute(), work)
                times["mergekit"].append(taken - start)
                starts.append(start)
        largest = largest_tensor(work / "thinking")
        found: dict[str, Any] = {
            "gigabytes_per_checkpoint": size / 1e9,
            "seconds": {name: values for name, values in times.items() if values},
            "speed_vs_copy": statistics.median(times["copy"]) / statistics.median(times["fuse"]),
            "speed_vs_mergekit": None,
            "largest_tensor_bytes": largest,
            "peak_memory_bytes": (peak := peak_memory(work)),
            "peak_memory_vs_largest_tensor": peak / largest,
        }
        if arguments.mergekit:
            found["speed_vs_mergekit"] = statistics.median(times["mergekit"]) / statistics.median(times["fuse"])
            found["seconds_mergekit_takes_to_start"] = statistics.median(starts)
            fuse(work, work / "ours")
            found["difference_to_mergekit"] = equal_to_mergekit(work)
    print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
