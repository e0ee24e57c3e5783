# SPDX-License-Identifier: Apache-2.0
"""Servers of the three engines, started by the command files of `examples/serving/`, on the loopback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[2] / "examples" / "serving"
MODEL = "tiny"
READY_SECONDS = 300
END_SECONDS = 30
REQUEST_SECONDS = 120
COMMANDS = {"vllm": "vllm.sh", "llama": "llama_cpp.sh", "transformers": "transformers.sh"}
CONTEXT = 2048
SLOTS = 4
"""Requests that llama.cpp works on at a time."""


@dataclass(frozen=True)
class Server:
    """A server that is ready. `model` is the name that requests give; `python` runs in the engine's environment."""

    engine: str
    address: str
    model: str
    checkpoint: Path
    python: Path
    log: Path
    ready_seconds: float

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The answer, read from JSON; AssertionError with the answer's text for any other status than 200."""
        sent = json.dumps(body, ensure_ascii=False).encode()
        request = urllib.request.Request(self.address + path, sent, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.code} {error.read().decode(errors='replace')}") from None


def command(engine: str, checkpoint: Path, port: int, folder: Path) -> tuple[list[str], dict[str, str]]:
    """The command line of a float32 server, and what its environment has beside ours."""
    where = ["--host", "127.0.0.1", "--port", str(port)]
    line = [str(EXAMPLES / COMMANDS[engine]), str(checkpoint), *where]
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    if engine == "vllm":
        # A space for the cache of one GiB, no compiling: what a machine of two cores can hold.
        flags = ["--dtype", "float32", "--max-model-len", str(CONTEXT), "--enforce-eager"]
        return [*line, *flags, "--served-model-name", MODEL], {**threads, "VLLM_CPU_KVCACHE_SPACE": "1"}
    if engine == "llama":
        flags = ["--context", str(CONTEXT * SLOTS), "--slots", str(SLOTS)]
        flags += ["--threads", threads["OMP_NUM_THREADS"], "--float32"]
        return [*line, *flags], {**threads, "GGUF": str(folder / "model.gguf"), "OUTTYPE": "f32"}
    return [*line, "--device", "cpu", "--dtype", "float32"], threads


@contextmanager
def serving(engine: str, checkpoint: Path, python: Path, folder: Path) -> Iterator[Server]:
    """A server of `checkpoint`; it and its children end with the block. AssertionError with its log if none comes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line, settings = command(engine, checkpoint, port, folder)
    # The command files call their programs by name, as users do.
    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PATH": path, **settings}
    environment.pop("PYTHONPATH", None)
    log, begun = folder / f"{engine}.log", time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            line, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=folder, start_new_session=True
        )
    try:
        address = f"http://127.0.0.1:{port}"
        await_ready(f"{address}/health", process, log)
        model = str(checkpoint) if engine == "transformers" else MODEL
        yield Server(engine, address, model, checkpoint, python, log, time.monotonic() - begun)
    finally:
        end(process)


def await_ready(address: str, process: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + READY_SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            raise AssertionError(f"the server ended with {process.returncode}:\n{tail(log)}")
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise AssertionError(f"the server is not ready after {READY_SECONDS} seconds:\n{tail(log)}")


def end(process: subprocess.Popen) -> None:
    """Ends the process and its children, which share its group, and no others."""
    for asked in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, asked)
        except ProcessLookupError:
            break
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    process.wait(END_SECONDS)


def tail(log: Path, lines: int = 40) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
