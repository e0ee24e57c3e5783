# SPDX-License-Identifier: Apache-2.0
"""Fuse a thinking and a non-thinking checkpoint, then train both modes on pairs from there, as A.X K1 was.

    python recipes/fuse.py runs/thinking runs/non_thinking --sweep 0.6:0.9:0.1 --output runs/fused \
        -- --output_dir runs/both --max_steps 200

In front of `--` are the flags of `thinkfusion fuse`; behind it those of `recipes/sft.py`, whose model is the fused one.
Without `--` nothing is trained. For several processes, fuse first, and then launch `recipes/sft.py --model runs/fused`.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from thinkfusion.cli import main as thinkfusion
from thinkfusion.flags import fuse_flags


def main() -> int:
    words = sys.argv[1:]
    place = words.index("--") if "--" in words else len(words)
    fusing, training = words[:place], words[place + 1 :]
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    fuse_flags(parser)
    output = parser.parse_args(fusing).output

    # 1. One checkpoint of two: at the ratio asked for, or at the best of a sweep, whose curve is drawn.
    if status := thinkfusion(["fuse", *fusing]):
        return status
    if place == len(words):
        return 0

    # 2. Both modes on the same prompts, from there; the recipe measures the switch in the end.
    recipe = Path(__file__).with_name("sft.py")
    print(f"Training both modes from {output}.", flush=True)
    return subprocess.run([sys.executable, str(recipe), "--model", output, *training], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
