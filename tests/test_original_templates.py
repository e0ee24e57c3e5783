# SPDX-License-Identifier: Apache-2.0
"""Our non-thinking rendering of one exchange beside the family's own template, as TRL carries it.

Outside the assistant's prefix both are the same, but for what is listed here. Each difference is an edit of the
original's text, with its reason: an edit that finds nothing to change fails, as does a difference that is not listed.
"""

import itertools
import json
import re
from collections.abc import Callable
from importlib.resources import files
from typing import NamedTuple

import pytest

from tests.families import TEXTS, family_tokenizer
from thinkfusion.dialects import DIALECTS

FUNCTION = {
    "name": "add",
    "description": "Adds <numbers> & 'more', 더하기.",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "number"}, "b": {"type": "string", "description": "another"}},
        "required": ["a"],
    },
}
TOOLS = [{"type": "function", "function": FUNCTION}]


class Edit(NamedTuple):
    """A difference: an expression for what the original has, what stands there with us, and where that is so."""

    original: str
    ours: str
    why: str
    where: Callable[[bool, bool], bool] = lambda system, tools: True


def with_tools(system: bool, tools: bool) -> bool:
    return tools


def tools_text(name: str) -> str:
    dialect, signature = DIALECTS[name], json.dumps(TOOLS[0], ensure_ascii=False)
    return dialect.tools_before + dialect.signature_open + signature + dialect.tools_after


OWN_WORDS = "how tools are announced is said in words of our own, around the same signatures"
QWEN_TOOLS = Edit(r"# Tools\n\n.*?</tool_call>(?=<\|im_end\|>)", tools_text("chatml"), OWN_WORDS, with_tools)
EDITS = {
    "qwen3": [QWEN_TOOLS],
    "qwen2_5": [
        Edit(
            r"<\|im_start\|>system\nYou are Qwen, [^<]*<\|im_end\|>\n",
            "",
            "what is trained need not be Qwen: without a system text there is no system turn",
            lambda system, tools: not system and not tools,
        ),
        Edit(
            r"(?<=system\n)You are Qwen, .*?\n\n(?=# Tools)",
            "",
            "the same, where tools open the turn",
            lambda system, tools: not system and tools,
        ),
        QWEN_TOOLS,
    ],
    "deepseekv3": [
        Edit(
            r"(?=<｜User｜>)",
            "{between}" + tools_text("deepseek_v3"),
            "the original shows no signatures, so that a model would have to guess them: ours follow the system text",
            with_tools,
        ),
    ],
    "glm4moe": [
        Edit(
            "/nothink",
            "",
            "the mode is announced by the assistant's prefix alone: text of the user's is not changed",
        ),
        Edit(r"# Tools\n\n.*?</tool_call>(?=<\|)", tools_text("glm4_moe"), OWN_WORDS, with_tools),
    ],
    "gptoss": [
        Edit(
            r"You are ChatGPT.*?Current date: .*?\n\nReasoning: medium\n\n",
            "",
            "no identity, no date (a prompt must not change by the day), no effort: the channel announces the mode",
        ),
        Edit(
            r" Channel must be included for every message\.(\nCalls to these tools.*?'functions'\.)?",
            "",
            "sentences about the channels, in our own words beside the tools",
        ),
        Edit(
            r"# Tools\n\n.*?// namespace functions",
            tools_text("gpt_oss"),
            f"{OWN_WORDS}, not TypeScript",
            with_tools,
        ),
        Edit(
            r"(<\|channel\|>analysis<\|message\|>[^<]*<\|end\|><\|start\|>assistant)?"
            r" to=functions\.add<\|channel\|>commentary json<\|message\|>",
            "<|channel|>final<|message|>{answer}<|end|><|start|>assistant"
            "<|channel|>commentary to=functions.add <|constrain|>json<|message|>",
            "a prompt without thinking has opened the final channel, and text before a call stands in it (the original "
            "shows it as analysis, or not at all); the recipient stands in the channel, so that all headers are alike",
            with_tools,
        ),
        Edit(
            r'<\|message\|>"(\{result\} 0)"<\|end\|>',
            r"<|message|>\1<|end|>",
            "a result is the tool's own text, not a JSON string of it",
            with_tools,
        ),
    ],
}
FAMILIES = {
    "qwen3": ("chatml", "empty-block"),
    "qwen2_5": ("chatml", "control"),
    "deepseekv3": ("deepseek_v3", "control"),
    "glm4moe": ("glm4_moe", "empty-block"),
    "gptoss": ("gpt_oss", "control"),
}


def exchange(language: str, *, system: bool, tools: bool, arguments_as_text: bool) -> list[dict]:
    question, _, answer = (text.strip() for text in TEXTS[language])
    messages = [{"role": "system", "content": "Be brief."}] if system else []
    messages.append({"role": "user", "content": question})
    if tools:
        arguments = {"a": 1, "b": answer}
        given = json.dumps(arguments, ensure_ascii=False) if arguments_as_text else arguments
        call = {"type": "function", "function": {"name": "add", "arguments": given}}
        messages.append({"role": "assistant", "content": answer, "tool_calls": [call]})
        messages.append({"role": "tool", "content": "{result} 0"})
    return [*messages, {"role": "assistant", "content": answer}]


def without_prefix(text: str, *, prompt: bool) -> str:
    """Think tags with the line breaks around them taken out, and the channel that a prompt ends in."""
    text = re.sub(r"\n?(<think>\s*)?</think>\n*|<think>\n$", "", text.replace("assistant\n", "assistant"))
    return text.removesuffix("<|channel|>final<|message|>") if prompt else text


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("language", TEXTS)
@pytest.mark.parametrize("original", EDITS)
def test_the_original_differs_only_where_said(original, language, prompt):
    name, scheme = FAMILIES[original]
    tokenizer = family_tokenizer(name, scheme)
    source = (files("trl") / "chat_templates" / f"{original}.jinja").read_text(encoding="utf-8")
    for system, tools in itertools.product((False, True), (False, True)):
        # DeepSeek's template can only show arguments that are text, GLM's only such that are not.
        messages = exchange(language, system=system, tools=tools, arguments_as_text=name == "deepseek_v3")
        shown = messages[:-1] if prompt else messages
        options = {"add_generation_prompt": prompt, "enable_thinking": False, "tokenize": False}
        theirs = tokenizer.apply_chat_template(shown, tools=TOOLS if tools else None, chat_template=source, **options)
        ours = tokenizer.apply_chat_template(shown, tools=TOOLS if tools else None, **options)
        for edit in EDITS[original]:
            if edit.where(system, tools):
                values = {"{answer}": messages[-1]["content"], "{between}": "\n\n" if system else ""}
                text = edit.ours
                for place, value in values.items():
                    text = text.replace(place, value)
                theirs, times = re.subn(edit.original, as_replacement(text), theirs, flags=re.DOTALL)
                assert times == 1, f"the original no longer has {edit.original!r}: {edit.why}"
        assert without_prefix(ours, prompt=prompt) == without_prefix(theirs, prompt=prompt)


def as_replacement(text: str) -> str | Callable[[re.Match], str]:
    """Only an edit that keeps a part of the original is a pattern; any other text is taken as it is."""
    return text if r"\1" in text else lambda _: text


# TRL carries no original of these: their turns as their own templates write them, without what we put before an answer.
# Mixtral and DeepSeek-V2 write a space before it, where the token of the mode stands with us.
TURNS = {
    "olmoe": (
        "|||IP_ADDRESS|||<|system|>\nS\n<|user|>\nQ\n<|assistant|>\nA|||IP_ADDRESS|||\n<|user|>\nR\n<|assistant|>\n"
    ),
    "mixtral": "<s> [INST] S\n\nQ [/INST]A</s> [INST] R [/INST]",
    "deepseek_v2": "<｜begin▁of▁sentence｜>S\n\nUser: Q\n\nAssistant:A<｜end▁of▁sentence｜>User: R\n\nAssistant:",
    "granite": (
        "<|start_of_role|>system<|end_of_role|>S<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>Q<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>A<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|>R<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"
    ),
    "minimax_m2": "]~!b[]~b]system\nS[e~[\n]~b]user\nQ[e~[\n]~b]ai\nA[e~[\n]~b]user\nR[e~[\n]~b]ai\n",
    "ernie4_5": "<|begin_of_sentence|>S\nUser: Q\nAssistant: A<|end_of_sentence|>User: R\nAssistant: ",
}


@pytest.mark.parametrize("name", TURNS)
def test_turns_are_written_as_the_family_writes_them(name):
    roles = ("system", "user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, "SQAR", strict=True)]
    shown = family_tokenizer(name).apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=False, tokenize=False
    )
    assert shown.replace("</think>", "") == TURNS[name]
    assert shown.count("</think>") == 2


@pytest.mark.parametrize("name", sorted(DIALECTS))
def test_tools_without_a_system_text_leave_the_first_turn_as_it_is(name):
    tokenizer = family_tokenizer(name)
    question = [{"role": "user", "content": "Q"}]
    with_tools, without = (
        tokenizer.apply_chat_template(question, tools=tools, add_generation_prompt=True, tokenize=False)
        for tools in (TOOLS, None)
    )
    assert with_tools != without
    turn = without.removeprefix(DIALECTS[name].for_tokenizer(tokenizer).opening)
    # Mixtral's first turn has been opened by what stands before it.
    assert with_tools.endswith(turn.removeprefix(" [INST] ") if name == "mixtral" else turn)
    assert with_tools.count("[INST]") == (1 if name == "mixtral" else 0)
