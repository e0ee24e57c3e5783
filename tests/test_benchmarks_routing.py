# SPDX-License-Identifier: Apache-2.0
"""The benchmark of routing probes runs, with a model too small to measure anything, and counts the hooks."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "benchmarks" / "routing.py"


def test_the_benchmark_writes_its_ratio_and_its_hooks(tmp_path):
    written = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--sizes", "smoke", "--threads", "1", "--json", str(written)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    figures = json.loads(written.read_text())
    found = figures["smoke"]
    assert figures["ratios"] == {"routing_smoke": found["median_ratio"]}
    assert found["pairs"] == 2
    assert found["median_ratio"] > 0
    assert (found["hooks_on"], found["hooks_off"], found["hooks_without_routing_steps"]) == (2, 0, 0)
