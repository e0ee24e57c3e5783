# SPDX-License-Identifier: Apache-2.0
"""Tools in both modes: the model asks for a call, the call is made, the model goes on with its result.

python examples/tool_use.py CHECKPOINT ['What is 1734 + 58? Use the tool.']

The checkpoint has to know tools; that of `make demo` was never shown one, and just answers.
"""

import json
import sys

from transformers.utils import get_json_schema

from thinkfusion import load_checkpoint, reply


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first number
        b: the second number
    """
    return a + b


FUNCTIONS = {"add": add}
TOOLS = [get_json_schema(function) for function in FUNCTIONS.values()]
MOST_CALLS = 5

model, tokenizer = load_checkpoint(sys.argv[1] if len(sys.argv) > 1 else "runs/tiny")
question = sys.argv[2] if len(sys.argv) > 2 else "What is 1734 + 58? Use the tool."


def call(function: dict) -> str:
    """The result as the model reads it; what a model writes may be wrong, and it should be told."""
    try:
        return str(FUNCTIONS[function["name"]](**function["arguments"]))
    except (KeyError, TypeError) as error:
        return f"error: {error!r}"


for mode in ("thinking", "non_thinking"):
    messages = [{"role": "user", "content": question}]
    print(f"\n[{mode}] {question}")
    for _ in range(MOST_CALLS):
        given = reply(model, tokenizer, messages, mode=mode, tools=TOOLS, thinking_budget=200, max_new_tokens=400)
        if given.reasoning:
            print(f"  thought: {given.reasoning}")
        # The answer holds calls in the markup of the family; transformers reads it by the tokenizer's template.
        prompt = tokenizer.apply_chat_template(
            messages, tools=TOOLS, add_generation_prompt=True, enable_thinking=False, tokenize=False
        )
        parsed = tokenizer.parse_response(given.answer, prefix=prompt, tools=TOOLS)
        calls = parsed.get("tool_calls") or []
        if not calls:
            print(f"  answer:  {given.answer}")
            break
        # Within an exchange the reasoning is kept: the model goes on from it when the results are there.
        content = parsed.get("content") or ""
        messages.append(
            {"role": "assistant", "content": content, "reasoning_content": given.reasoning, "tool_calls": calls}
        )
        for each in calls:
            result = call(each["function"])
            print(f"  call:    {each['function']['name']}({json.dumps(each['function']['arguments'])}) = {result}")
            messages.append({"role": "tool", "content": result})
