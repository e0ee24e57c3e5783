# SPDX-License-Identifier: Apache-2.0
"""A client of any OpenAI-compatible server that switches the mode with every request (`pip install openai`).

python examples/serving_client.py runs/tiny --url http://localhost:8000/v1

The first argument is the model's name at the server. How to start one: examples/serving.md.
"""

import argparse
from collections.abc import Iterator

from openai import OpenAI

from thinkfusion import split_reply

# A server knows one set of defaults, so each mode's own go with the request. Here: those of Qwen3.
SAMPLING = {True: {"temperature": 0.6, "top_p": 0.95}, False: {"temperature": 0.7, "top_p": 0.8}}


def request(model: str, messages: list[dict], *, thinking: bool, **settings) -> dict:
    """The arguments of `chat.completions.create`; `settings` win over those of the mode."""
    switch = {"chat_template_kwargs": {"enable_thinking": thinking}}
    return {"model": model, "messages": messages, "extra_body": switch, **SAMPLING[thinking], **settings}


def reasoning_of(message) -> str:
    """transformers serve and SGLang call it `reasoning_content`, newer vLLM `reasoning`."""
    return getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None) or ""


def ask(client: OpenAI, model: str, messages: list[dict], *, thinking: bool, **settings) -> tuple[str, str]:
    """Reasoning and answer."""
    message = (
        client.chat.completions.create(**request(model, messages, thinking=thinking, **settings)).choices[0].message
    )
    reasoning, content = reasoning_of(message), message.content or ""
    if thinking and not reasoning and "</think>" in content:
        # The server has no reasoning parser, or was started without one.
        reasoning, content = split_reply(content, thinking)
    return reasoning.strip(), content.strip()


def stream(
    client: OpenAI, model: str, messages: list[dict], *, thinking: bool, **settings
) -> Iterator[tuple[str, str]]:
    """Pieces as they come: ("reasoning", text) or ("answer", text)."""
    for chunk in client.chat.completions.create(**request(model, messages, thinking=thinking, **settings), stream=True):
        if chunk.choices:
            delta = chunk.choices[0].delta
            if reasoning_of(delta):
                yield "reasoning", reasoning_of(delta)
            if delta.content:
                yield "answer", delta.content


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("question", nargs="?", default="What is the sum of the digits of 293443 modulo 10?")
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--temperature", type=float, help="0 is greedy decoding (default: each mode's own)")
    parser.add_argument("--max_tokens", type=int, default=1024)
    options = parser.parse_args()
    client = OpenAI(base_url=options.url, api_key="none")
    settings = {"max_tokens": options.max_tokens}
    if options.temperature is not None:
        settings["temperature"] = options.temperature
    messages = [{"role": "user", "content": options.question}]
    for thinking in (True, False):
        reasoning, answer = ask(client, options.model, messages, thinking=thinking, **settings)
        print(f"enable_thinking={thinking}\n  reasoning: {reasoning!r}\n  answer: {answer!r}")
        pieces = list(stream(client, options.model, messages, thinking=thinking, **settings))
        print(f"  streamed in {len(pieces)} pieces: {''.join(text for _, text in pieces)!r}")


if __name__ == "__main__":
    main()
