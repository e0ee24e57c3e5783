# SPDX-License-Identifier: Apache-2.0
"""One request to a server, whole or streamed, and its parts as the server split them."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tests.serving.servers import REQUEST_SECONDS, Server
from thinkfusion.modes import Mode


class Asked(NamedTuple):
    """The parts of a reply as they came, untouched; `order` has the parts of a stream in the order they began."""

    reasoning: str
    answer: str
    finish: str
    tokens: int | None = None
    order: tuple[str, ...] = ()

    def parts(self) -> tuple[str, str]:
        return self.reasoning.strip(), self.answer.strip()

    def written(self) -> str:
        """The text that the model wrote, put together again: reasoning that nothing follows was never closed."""
        return "</think>".join(part for part in self.parts() if part)


def request(server: Server, messages: Sequence[Mapping[str, Any]], mode: Mode, **settings: Any) -> dict[str, Any]:
    switch = {"chat_template_kwargs": {"enable_thinking": mode is Mode.THINKING}}
    return {"model": server.model, "messages": list(messages), "temperature": 0, **switch, **settings}


def ask(server: Server, messages: Sequence[Mapping[str, Any]], mode: Mode, **settings: Any) -> Asked:
    answer = server.post("/v1/chat/completions", request(server, messages, mode, **settings))
    choice = answer["choices"][0]
    message = choice["message"]
    tokens = answer["usage"]["completion_tokens"]
    return Asked(reasoning_of(message), message.get("content") or "", choice["finish_reason"], tokens)


def stream(server: Server, messages: Sequence[Mapping[str, Any]], mode: Mode, **settings: Any) -> Asked:
    body = json.dumps(request(server, messages, mode, **settings, stream=True)).encode()
    sent = urllib.request.Request(f"{server.address}/v1/chat/completions", body, {"Content-Type": "application/json"})
    parts, order, finish = {"reasoning": "", "answer": ""}, [], ""
    with urllib.request.urlopen(sent, timeout=REQUEST_SECONDS) as lines:
        for line in lines:
            if not line.startswith(b"data: {"):
                continue
            for choice in json.loads(line[len(b"data: ") :])["choices"]:
                delta = choice["delta"]
                pieces = {"reasoning": reasoning_of(delta), "answer": delta.get("content") or ""}
                for part, text in pieces.items():
                    parts[part] += text
                    if text and order[-1:] != [part]:
                        order.append(part)
                finish = choice.get("finish_reason") or finish
    return Asked(parts["reasoning"], parts["answer"], finish, order=tuple(order))


def reasoning_of(message: Mapping[str, Any]) -> str:
    return message.get("reasoning_content") or message.get("reasoning") or ""
