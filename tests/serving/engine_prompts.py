# SPDX-License-Identifier: Apache-2.0
"""The ids that a server makes of a conversation."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.serving.matrix import Row
from tests.serving.servers import Server

RENDERER = Path(__file__).parent / "render_as_transformers_serve.py"


def prompt_ids(server: Server, rows: Sequence[Row]) -> list[list[int]]:
    """The ids of each row, from the server's own endpoints if it has any.

    transformers serve has none: its own code renders the rows in a process of its environment, and each count is
    compared with the one that the server itself reports for the row.
    """
    bodies = [body(server, row) for row in rows]
    if server.engine == "vllm":
        return [list(server.post("/tokenize", each)["tokens"]) for each in bodies]
    if server.engine == "llama":
        return [_llama_ids(server, each) for each in bodies]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [str(server.python), str(RENDERER), str(server.checkpoint)],
        input=json.dumps(bodies),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for each, ids in zip(bodies, found, strict=True):
        answer = server.post("/v1/chat/completions", {**each, "max_tokens": 1, "temperature": 0})
        assert answer["usage"]["prompt_tokens"] == len(ids)
    return found


def _llama_ids(server: Server, request: dict[str, Any]) -> list[int]:
    """Rendered, then tokenised as a completion is; the count is the one that the chat endpoint reports."""
    text = server.post("/apply-template", request)["prompt"]
    ids = list(server.post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"])
    answer = server.post("/v1/chat/completions", {**request, "max_tokens": 1, "temperature": 0})
    assert answer["usage"]["prompt_tokens"] == len(ids)
    return ids


def body(server: Server, row: Row) -> dict[str, Any]:
    """A request of the row. vLLM reads the reasoning of a message as `reasoning`, the others as `reasoning_content`."""
    messages = row.messages
    if server.engine == "vllm":
        messages = [
            {"reasoning" if key == "reasoning_content" else key: value for key, value in each.items()}
            for each in messages
        ]
    asked: dict[str, Any] = {"model": server.model, "messages": messages}
    asked["chat_template_kwargs"] = {"enable_thinking": row.thinking}
    return asked | ({"tools": row.tools} if row.tools else {})
