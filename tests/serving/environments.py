# SPDX-License-Identifier: Apache-2.0
"""An environment for each engine, in `.venv-serving/` of the repository: python tests/serving/environments.py [ENGINE…]

Each engine wants versions of its own, pinned in `requirements-ENGINE.txt` beside this file. An interpreter that has
the engine already is used instead if `THINKFUSION_SERVING_VLLM` (`_LLAMA`, `_TRANSFORMERS`) names it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
FOLDER = HERE.parent.parent / ".venv-serving"
ENGINES = ("vllm", "llama", "transformers")
NOT_WANTED = {"vllm": ["torchvision", "torchaudio", "torchcodec"]}
"""They come with the engine, are built for another torch, and stop it from starting; models of text need none."""
LONGEST_SECONDS = 1800


class Environment(NamedTuple):
    """The interpreter of an engine, or the reason why there is none."""

    python: Path | None
    reason: str = ""


def find(engine: str) -> Environment:
    """What is there for `engine`, without installing anything."""
    given = os.environ.get(f"THINKFUSION_SERVING_{engine.upper()}")
    if given:
        there = os.access(given, os.X_OK)
        return Environment(Path(given)) if there else Environment(None, f"{given}: there is no interpreter.")
    folder = FOLDER / engine
    failure = folder / "failed"
    if failure.exists():
        return Environment(None, failure.read_text(encoding="utf-8"))
    marker = folder / "installed"
    if not marker.exists() or marker.read_text() != digest(engine):
        return Environment(None, f"no environment for {engine}: run python tests/serving/environments.py {engine}")
    return Environment(folder / "bin" / "python")


def digest(engine: str) -> str:
    return hashlib.sha256((HERE / f"requirements-{engine}.txt").read_bytes()).hexdigest()


def install(engine: str) -> Environment:
    """Make the environment of `engine`, unless it is there. What cannot be installed is tried again at each call."""
    found = find(engine)
    if found.python is not None:
        return found
    folder = FOLDER / engine
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    steps = [[*pip, "install", "--quiet", "--requirement", str(HERE / f"requirements-{engine}.txt")]]
    if engine in NOT_WANTED:
        steps.append([*pip, "uninstall", "--quiet", "--yes", *NOT_WANTED[engine]])
    for step in steps:
        try:
            done = subprocess.run(step, capture_output=True, text=True, timeout=LONGEST_SECONDS, check=False)
            said, failed = done.stderr.strip(), done.returncode != 0
        except subprocess.TimeoutExpired:
            said, failed = f"not done after {LONGEST_SECONDS} seconds", True
        if failed:
            errors = [line for line in said.splitlines() if line.startswith("ERROR")] or said.splitlines()[-3:]
            reason = f"{engine} could not be installed: {' '.join(errors)}"
            (folder / "failed").write_text(reason, encoding="utf-8")
            return Environment(None, reason)
    (folder / "installed").write_text(digest(engine))
    return Environment(folder / "bin" / "python")


def main() -> None:
    for engine in sys.argv[1:] or ENGINES:
        if engine not in ENGINES:
            sys.exit(f"{engine}: found no such engine, expected {', '.join(ENGINES)}.")
        made = install(engine)
        print(f"{engine}: {made.python or made.reason}", flush=True)


if __name__ == "__main__":
    main()
