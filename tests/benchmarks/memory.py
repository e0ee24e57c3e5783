# SPDX-License-Identifier: Apache-2.0
"""How much memory preparing takes, at its highest, for a million generated rows.

    python tests/benchmarks/memory.py --rows 1000000 --json memory.json

The rows are written first, by another process. What is measured is the resident memory of the preparing process and
of its workers together, by psutil, four times a second: private memory, and the pages they share counted once. Pages
of mapped files are the page cache's, and left out.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

ROWS_IN_A_BLOCK = 1000


def write_rows(path: Path, count: int) -> None:
    from preparation import long_rows  # the benchmark beside this one

    block = long_rows(ROWS_IN_A_BLOCK, seed=2)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            question, reply = block[number % ROWS_IN_A_BLOCK]["messages"]
            # A number makes every row another one; the trace is cut so that a million of them fit on a disk.
            row = {
                "question": f"{number}: {question['content']}",
                "reasoning": reply["reasoning_content"][: 200 + number % 400],
                "answer": reply["content"][:80],
            }
            file.write(json.dumps(row) + "\n")


class Watch(threading.Thread):
    """Notes the highest memory of this process and its children, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest = 0
        self.done = threading.Event()

    def run(self) -> None:
        import psutil

        own = psutil.Process()
        while not self.done.wait(0.25):
            total = 0
            for process in (own, *own.children(recursive=True)):
                try:
                    found = process.memory_full_info()
                except psutil.NoSuchProcess:
                    continue
                # Proportional: a page that several processes share is counted once. Mapped files are not theirs.
                total += found.pss - sum(each.rss for each in process.memory_maps() if each.path.endswith(".arrow"))
            self.highest = max(self.highest, total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write is not None:
        write_rows(options.write, options.rows)
        return
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "rows.jsonl"
        subprocess.run([sys.executable, __file__, "--write", str(path), "--rows", str(options.rows)], check=True)

        from transformers import AutoTokenizer

        from thinkfusion import install_chat_template, prepare
        from thinkfusion.checkpointing import tiny_base_path

        tokenizer = AutoTokenizer.from_pretrained(tiny_base_path())
        install_chat_template(tokenizer)
        watch = Watch()
        watch.start()
        start = time.perf_counter()
        dataset, report = prepare(str(path), tokenizer, processes=options.processes, cache_dir=Path(name) / "cache")
        taken = time.perf_counter() - start
        watch.done.set()
        watch.join()
        figures = {
            "ratios": {"of_two_gib": watch.highest / 2**31},
            "rows": report.kept,
            "sequences": len(dataset),
            "tokens": report.all_tokens,
            "highest_bytes": watch.highest,
            "seconds": taken,
        }
    print(report)
    print(f"highest memory: {watch.highest / 2**20:,.0f} MiB; {taken:.0f} s, {report.read / taken:,.0f} rows a second")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
