# SPDX-License-Identifier: Apache-2.0
"""Every template renders byte for byte alike in Jinja2's sandbox, in minijinja and in @huggingface/jinja.

Servers run one of the three: transformers and vLLM the first, Rust servers the second, JavaScript ones the third. An
engine that is not installed is skipped; `make engines` and CI install them.
"""

import itertools
import json
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
from jinja2 import TemplateError

from tests.families import BOS, CASES, EOS, TEXTS, TOOLS, make_messages
from thinkfusion import chat_template
from thinkfusion.dialects import DIALECTS

NODE_MODULES = Path(os.environ.get("THINKFUSION_NODE_MODULES", ".venv/node/node_modules")).resolve()
AWKWARD = {
    "quotes": "\"double\" 'single' \\back\\slash\\ \\u003c \\\\u003c / \\/ `tick`",
    "html": "<b>&amp;</b> a < b && c > d 'x'",
    "control characters": "tab\t cr\r bell\x07 escape\x1b unit\x1f nul\x00 delete\x7f",
    "separators": "\u2028 \u2029 \u00a0 \ufeff \u200d",
    "emoji": "👩‍🔬 🇰🇷 e\u0301 שלום 한국어",
}
THANKS = [{"role": "assistant", "content": "Hi."}, {"role": "user", "content": "Thanks."}]
MODES = [{"add_generation_prompt": prompt, "enable_thinking": on} for prompt in (False, True) for on in (False, True)]
SWITCHES = [{"add_generation_prompt": True, **switch} for switch in ({}, {"thinking": "false"}, {"thinking": None})]


def conversations(parallel: bool) -> list[dict]:
    """Contexts of a template: the matrix of conversations, and texts that engines are known to disagree on."""
    found = []
    for language, turns, system, tools in itertools.product(TEXTS, (1, 2, 5), (False, True), (False, True)):
        messages = make_messages(language, turns=turns, system=system, tools=tools, parallel=parallel)
        found.append({"messages": messages, "tools": TOOLS if tools else None})
    for text in AWKWARD.values():
        call = {"name": "add", "arguments": {"a": text, text: [text, {"items": text, "keys": 1, "values": None}]}}
        tool = {"type": "function", "function": {"name": "add", "description": text, "parameters": {text: [text, 0.5]}}}
        messages = [
            {"role": "developer", "content": text},
            {"role": "user", "content": [{"type": "text", "text": text}, {"type": "text", "text": text}]},
            {"role": "assistant", "content": text, "reasoning": text, "tool_calls": [{"function": call}]},
            {"role": "tool", "content": text},
            {"role": "assistant", "content": f"<think>\n\n{text}\n\n</think>\n\n\n{text}\n"},
        ]
        found.append({"messages": messages, "tools": [tool]})
        found.append({"messages": messages[:-2], "tools": [tool]})
    for user in ("Hi /no_think", "안녕 🧮\n/think \n", "/no_think", "a/think", "", " "):
        messages = [{"role": "user", "content": user}, *THANKS]
        found += [{"messages": shown, "tools": []} for shown in (messages, messages[:1])]
    return found


@cache
def cases(name: str, scheme: str) -> list[tuple[dict, str]]:
    """Contexts, and what Jinja2 renders."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    compiled = _compile_jinja_template(source(name, scheme))
    found = []
    tokens = {"eos_token": EOS[name], **({"bos_token": BOS[name]} if name in BOS else {})}
    for context in conversations(parallel=not DIALECTS[name].calls.own_message):
        # No tools but an empty list of them: the conversations with soft switches.
        for options in SWITCHES if context["tools"] == [] else MODES:
            given = {**context, **options, **tokens}
            found.append((given, compiled.render(**given)))
    return found


def source(name: str, scheme: str) -> str:
    return chat_template(scheme, dialect=name, bos=name == "chatml")


def mismatch(context: dict, ours: str, other: str) -> str:
    place = next((i for i, (a, b) in enumerate(zip(ours, other, strict=False)) if a != b), min(len(ours), len(other)))
    return f"{context}\nat {place}: {ours[place - 40 : place + 40]!r} != {other[place - 40 : place + 40]!r}"


def minijinja_environment():
    minijinja = pytest.importorskip("minijinja", reason="minijinja is not installed: pip install minijinja")

    def raise_exception(message):
        raise ValueError(message)

    return minijinja.Environment(globals={"raise_exception": raise_exception})


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_minijinja(name, scheme):
    environment = minijinja_environment()
    environment.add_template("chat", source(name, scheme))
    for context, expected in cases(name, scheme):
        rendered = environment.render_template("chat", **context)
        assert rendered == expected, mismatch(context, expected, rendered)


def render_with_node(templates: list[str], contexts: list[tuple[int, dict]]) -> list[dict]:
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    if not (NODE_MODULES / "@huggingface" / "jinja").is_dir():
        pytest.skip("@huggingface/jinja is not installed: npm install --prefix .venv/node @huggingface/jinja")
    given = {"templates": templates, "cases": [{"template": index, "context": context} for index, context in contexts]}
    script = Path(__file__).with_name("render_with_node.mjs")
    done = subprocess.run(
        ["node", str(script), str(NODE_MODULES)],
        input=json.dumps(given),
        capture_output=True,
        encoding="utf-8",
        check=True,
        timeout=300,
    )
    return json.loads(done.stdout)


def test_huggingface_jinja():
    contexts = [(index, context) for index, case in enumerate(CASES) for context, _ in cases(*case)]
    rendered = render_with_node([source(*case) for case in CASES], contexts)
    expected = [text for case in CASES for _, text in cases(*case)]
    for (index, context), ours, theirs in zip(contexts, expected, rendered, strict=True):
        assert "error" not in theirs, (CASES[index], theirs, context)
        assert theirs["text"] == ours, (CASES[index], mismatch(context, ours, theirs["text"]))


REFUSED = [
    ({"messages": [{"role": "user", "content": "a"}], "enable_thinking": "maybe"}, "enable_thinking must be"),
    (
        {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
        "message 1: role system is not supported here",
    ),
]


def test_all_engines_refuse_alike():
    from transformers.utils.chat_template_utils import _compile_jinja_template

    template = chat_template()
    environment = minijinja_environment()
    answers = render_with_node([template], [(0, context) for context, _ in REFUSED])
    for (context, message), answer in zip(REFUSED, answers, strict=True):
        with pytest.raises(TemplateError, match=message):
            _compile_jinja_template(template).render(**context)
        with pytest.raises(Exception, match=message):
            environment.render_str(template, **context)
        assert message in answer["error"]


def three_texts(context: dict) -> list[str]:
    """What Jinja2, minijinja and @huggingface/jinja make of it with ChatML."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    template = chat_template()
    return [
        _compile_jinja_template(template).render(**context),
        minijinja_environment().render_str(template, **context),
        render_with_node([template], [(0, context)])[0]["text"],
    ]


def test_numbers_that_engines_write_differently():
    """What no template can mend: JavaScript has one kind of number, and Python writes exponents in its own way."""
    numbers = {"whole": 2.0, "small": 1e-7, "large": 2**64}
    context = {"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f", "numbers": numbers}]}
    written = [re.search('"numbers": {(.*?)}', text)[1] for text in three_texts(context)]
    assert written == [
        '"whole": 2.0, "small": 1e-07, "large": 18446744073709551616',
        '"whole": 2.0, "small": 1e-7, "large": 18446744073709551616',
        '"whole": 2, "small": 1e-7, "large": 18446744073709552000',
    ]


@pytest.mark.parametrize(
    ("space", "engines_that_switch"),
    [(" ", "all"), ("\u00a0", "all"), ("\u3000", "all"), ("\x1f", "Jinja2"), ("\x85", "not node"), ("\ufeff", "node")],
)
def test_white_space_before_a_soft_switch(space, engines_that_switch):
    """Python, Rust and JavaScript differ in what white space is: in four characters that nobody types."""
    context = {"messages": [{"role": "user", "content": f"a{space}/no_think"}], "add_generation_prompt": True}
    switched = [text.endswith("</think>") for text in three_texts(context)]
    known = {"all": [True] * 3, "Jinja2": [True, False, False], "not node": [True, True, False]}
    assert switched == known.get(engines_that_switch, [False, False, True])
