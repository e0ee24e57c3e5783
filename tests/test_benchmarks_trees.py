# SPDX-License-Identifier: Apache-2.0
"""The benchmark of trees runs, with a model too small to measure anything, and writes its figures under their names."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "benchmarks" / "trees.py"
ASKED = (
    *("trees_vs_trl_6_turns", "trees_vs_expanded_6_turns", "trees_vs_trl_single_turn"),
    *("overhead_vs_trl", "padding_gsm8k", "padding_6_turns"),
)


def test_the_benchmark_writes_every_figure_that_is_asked_for(tmp_path):
    row = {"question": "What is 2 + 2?", "answer": "Two and two.\n#### 4"}
    data, written = tmp_path / "rows.jsonl", tmp_path / "figures.json"
    data.write_text(f"{json.dumps(row)}\n" * 40)
    sizes = ("--preset", "smoke", "--threads", "1", "--rounds", "1", "--pairs", "4", "--memory_of")
    command = [sys.executable, str(SCRIPT), *sizes, "--gsm8k", str(data), "--json", str(written)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    figures = json.loads(written.read_text())
    for name in ASKED:
        assert figures[name] == figures["ratios"][name]
        assert isinstance(figures[name], float)
    tokens = figures["sets"]["6_turns"]["tokens"]
    assert tokens["tree"] < tokens["packed"] == tokens["single"] < tokens["trl"]
    assert figures["growth"]["slopes_from_4_to_12_turns"]["trees_tokens"] < 1.1
