# SPDX-License-Identifier: Apache-2.0
"""A client of any OpenAI-compatible server that switches the mode with every request (`pip install openai`).

python examples/serving/serving_client.py runs/tiny --url http://localhost:8000/v1
python examples/serving/serving_client.py runs/tiny --show turns 'What is 2 + 2?' 'And 3 + 4?'
python examples/serving/serving_client.py NAME --show tools 'What is 1734 + 58? Use the tool.'

The first argument is the model's name at the server. How to start one: examples/serving/README.md.
"""

import argparse
import json
from collections.abc import Iterator

from openai import OpenAI

from thinkfusion import split_reply

# A server knows one set of defaults, so each mode's own go with the request. Here: those of Qwen3.
SAMPLING = {True: {"temperature": 0.6, "top_p": 0.95}, False: {"temperature": 0.7, "top_p": 0.8}}
QUESTION = "What is the sum of the digits of 293443 modulo 10?"
MOST_CALLS = 5
NUMBER = {"type": "integer"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {**NUMBER, "description": "the first number"},
                    "b": {**NUMBER, "description": "the second number"},
                },
                "required": ["a", "b"],
            },
        },
    }
]
FUNCTIONS = {"add": lambda a, b: a + b}


def request(model: str, messages: list[dict], *, thinking: bool, **settings) -> dict:
    """The arguments of `chat.completions.create`; `settings` win over those of the mode."""
    switch = {"chat_template_kwargs": {"enable_thinking": thinking}}
    return {"model": model, "messages": messages, "extra_body": switch, **SAMPLING[thinking], **settings}


def reasoning_of(message) -> str:
    """transformers serve, llama.cpp and SGLang call it `reasoning_content`, newer vLLM `reasoning`."""
    return getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None) or ""


def split(message, thinking: bool) -> tuple[str, str]:
    """Reasoning and answer of a reply."""
    reasoning, content = reasoning_of(message), message.content or ""
    if thinking and not reasoning and "</think>" in content:
        # The server has no reasoning parser, or was started without one.
        reasoning, content = split_reply(content, thinking)
    return reasoning.strip(), content.strip()


def ask(client: OpenAI, model: str, messages: list[dict], *, thinking: bool, **settings) -> tuple[str, str]:
    """Reasoning and answer."""
    asked = request(model, messages, thinking=thinking, **settings)
    return split(client.chat.completions.create(**asked).choices[0].message, thinking)


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


def call(name: str, arguments: str) -> str:
    """The result as the model reads it; what a model writes may be wrong, and it should be told."""
    try:
        return str(FUNCTIONS[name](**json.loads(arguments)))
    except (KeyError, TypeError, ValueError) as error:
        return f"error: {error!r}"


def use_tools(client: OpenAI, model: str, question: str, *, thinking: bool, **settings) -> Iterator[tuple[str, str]]:
    """What happens until the answer: ("reasoning", …), ("call", …), ("answer", …)."""
    messages: list[dict] = [{"role": "user", "content": question}]
    for _ in range(MOST_CALLS):
        asked = request(model, messages, thinking=thinking, tools=TOOLS, **settings)
        message = client.chat.completions.create(**asked).choices[0].message
        reasoning, answer = split(message, thinking)
        if reasoning:
            yield "reasoning", reasoning
        if not message.tool_calls:
            yield "answer", answer
            return
        # Within an exchange the model goes on from its reasoning. vLLM reads it by one name, llama.cpp by the other.
        kept = {"reasoning": reasoning, "reasoning_content": reasoning} if reasoning else {}
        calls = [each.model_dump(include={"id", "type", "function"}) for each in message.tool_calls]
        messages.append({"role": "assistant", "content": answer, "tool_calls": calls, **kept})
        for each in message.tool_calls:
            result = call(each.function.name, each.function.arguments)
            arguments = json.dumps(json.loads(each.function.arguments), ensure_ascii=False)
            yield "call", f"{each.function.name}({arguments}) = {result}"
            messages.append({"role": "tool", "tool_call_id": each.id, "content": result})


def show_modes(client: OpenAI, model: str, questions: list[str], **settings) -> None:
    """The first question in both modes, whole and streamed."""
    messages = [{"role": "user", "content": questions[0]}]
    for thinking in (True, False):
        reasoning, answer = ask(client, model, messages, thinking=thinking, **settings)
        print(f"enable_thinking={thinking}\n  reasoning: {reasoning!r}\n  answer: {answer!r}")
        pieces = list(stream(client, model, messages, thinking=thinking, **settings))
        print(f"  streamed in {len(pieces)} pieces: {''.join(text for _, text in pieces)!r}")


def show_turns(client: OpenAI, model: str, questions: list[str], **settings) -> None:
    """One conversation whose turns alternate modes. Of past turns only the answers are sent."""
    messages: list[dict] = []
    for turn, question in enumerate(questions):
        messages.append({"role": "user", "content": question})
        reasoning, answer = ask(client, model, messages, thinking=turn % 2 == 0, **settings)
        print(f"turn {turn + 1}, enable_thinking={turn % 2 == 0}\n  reasoning: {reasoning!r}\n  answer: {answer!r}")
        messages.append({"role": "assistant", "content": answer})


def show_tools(client: OpenAI, model: str, questions: list[str], **settings) -> None:
    """The first question in both modes, with a tool. The checkpoint of `make demo` was never shown one."""
    for thinking in (True, False):
        print(f"enable_thinking={thinking}")
        for kind, text in use_tools(client, model, questions[0], thinking=thinking, **settings):
            print(f"  {kind}: {text}")


SHOWN = {"modes": show_modes, "turns": show_turns, "tools": show_tools}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("questions", nargs="*", default=[QUESTION])
    parser.add_argument("--show", choices=SHOWN, default="modes")
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--temperature", type=float, help="0 is greedy decoding (default: each mode's own)")
    parser.add_argument("--max_tokens", type=int, default=1024)
    options = parser.parse_intermixed_args()
    client = OpenAI(base_url=options.url, api_key="none")
    settings = {"max_tokens": options.max_tokens}
    if options.temperature is not None:
        settings["temperature"] = options.temperature
    SHOWN[options.show](client, options.model, options.questions, **settings)


if __name__ == "__main__":
    main()
