# SPDX-License-Identifier: Apache-2.0
"""Requests a second of `thinkfusion evaluate --endpoint` beside vLLM's own benchmark client, on one server.

    python tests/benchmarks/endpoint.py --vllm .venv-serving/vllm/bin/python --checkpoint runs/tiny --json endpoint.json

The environment is that of `make test-serving`, with pandas, which the other client reads its prompts with. One vLLM
server; both clients ask it the same prompts in both modes, greedily, with as many requests at once, in turn.
Ours is a process of its own, whose time is that from its first request to its last reply, as the other reports it too,
and whose peak memory is read from the kernel. The other client asks for one mode at a time; its two times are added.
The ratio is ours over theirs, in each round and in the median.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from thinkfusion.tasks import generate_samples

BENCH = """
import sys
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args(sys.argv[1:]))
"""
OURS = """
import json, sys
from thinkfusion.cli import main
status = main(sys.argv[1:])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1], file=sys.stderr)
sys.exit(status)
"""


def start(vllm: str, checkpoint: str, log: Path, concurrency: int) -> tuple[subprocess.Popen[bytes], int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", checkpoint, "--served-model-name", "m"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--reasoning-parser", "qwen3", "--max-model-len", "1024"]
    command += ["--enforce-eager", "--max-num-seqs", str(concurrency)]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    until = time.monotonic() + 300
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return process, port
        except OSError:
            time.sleep(0.5)
    process.kill()
    raise SystemExit(f"vLLM did not start:\n{log.read_text(errors='replace')[-3000:]}")


def stop(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def theirs(options: argparse.Namespace, port: int, prompts: Path, folder: Path) -> dict[str, Any]:
    seconds, failed = 0.0, 0
    for mode in (True, False):
        result = folder / "theirs.json"
        command = [options.vllm, "-c", BENCH, "--backend", "openai-chat", "--base-url", f"http://127.0.0.1:{port}"]
        command += ["--endpoint", "/v1/chat/completions", "--model", "m", "--tokenizer", options.checkpoint]
        command += ["--dataset-name", "custom", "--dataset-path", str(prompts), "--skip-chat-template"]
        command += ["--custom-output-len", str(options.max_new_tokens), "--num-prompts", str(options.prompts)]
        command += ["--max-concurrency", str(options.concurrency), "--temperature", "0", "--disable-shuffle"]
        command += ["--extra-body", json.dumps({"chat_template_kwargs": {"enable_thinking": mode}})]
        command += ["--save-result", "--result-filename", str(result), "--disable-tqdm", "--num-warmups", "0"]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=1800)
        if done.returncode:
            raise SystemExit(f"vLLM's client failed:\n{done.stderr[-3000:]}")
        found = json.loads(result.read_text())
        seconds += found["duration"]
        failed += options.prompts - found["completed"]
    return {"seconds": seconds, "requests_per_second": 2 * options.prompts / seconds, "failed": failed}


def ours(options: argparse.Namespace, port: int, prompts: Path, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", OURS, "evaluate", "--endpoint", f"http://127.0.0.1:{port}/v1", "--model", "m"]
    command += ["--prompts", str(prompts), "--samples", str(options.prompts), "--output", str(folder / "ours")]
    command += ["--max_new_tokens", str(options.max_new_tokens), "--concurrency", str(options.concurrency)]
    command += ["--stream"] * options.stream
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise SystemExit(f"thinkfusion evaluate failed:\n{done.stderr[-3000:]}")
    report = json.loads((folder / "ours" / "mode_report.json").read_text())
    seconds = report["endpoint"]["seconds"]
    return {
        "seconds": seconds,
        "requests_per_second": report["endpoint"]["replies"] / seconds,
        "unanswered": len(report["endpoint"]["unanswered"]),
        "peak_mib": int(done.stderr.split()[-1]) / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", default=".venv-serving/vllm/bin/python", help="Python of an environment with vLLM")
    parser.add_argument("--checkpoint", default="runs/tiny")
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--stream", action="store_true", help="ours asks for streams too")
    parser.add_argument("--json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prompts = folder / "prompts.jsonl"
        rows = [
            {"prompt": sample.question, "answer": sample.solution, "output_tokens": options.max_new_tokens}
            for sample in generate_samples(options.prompts, seed=0, split="evaluation")
        ]
        prompts.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        process, port = start(options.vllm, options.checkpoint, folder / "log", options.concurrency)
        try:
            rounds = []
            for number in range(options.rounds):
                # By turns, so that neither has the warmer server.
                pair = [(ours, "ours"), (theirs, "theirs")][:: 1 if number % 2 else -1]
                found = {name: ask(options, port, prompts, folder) for ask, name in pair}
                found["ratio"] = found["ours"]["requests_per_second"] / found["theirs"]["requests_per_second"]
                print(json.dumps(found), flush=True)
                rounds.append(found)
        finally:
            stop(process)
    summary = {
        "rounds": rounds,
        "ratio": statistics.median(each["ratio"] for each in rounds),
        "peak_mib": max(each["ours"]["peak_mib"] for each in rounds),
    }
    print(f"ratio {summary['ratio']:.3f} (median of {len(rounds)}), peak memory {summary['peak_mib']:.0f} MiB")
    if options.json:
        Path(options.json).write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
