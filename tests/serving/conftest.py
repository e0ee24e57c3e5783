# SPDX-License-Identifier: Apache-2.0
"""Servers, asked by the tests; one runs at a time. `python -m pytest tests/serving` (`make test-serving`)."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from tests.serving.asking import Asked, ask
from tests.serving.environments import ENGINES, find
from tests.serving.reference import MOST_TOKENS, Reference
from tests.serving.servers import serving
from tests.taught import (
    KOREAN,
    KOREAN_ANSWER,
    KOREAN_THOUGHT,
    SUM,
    SUM_ANSWER,
    SUM_THOUGHT,
    TOOLS,
    taught_conversations,
    teach,
)
from thinkfusion import Conversation
from thinkfusion.modes import Mode

ROOT = Path(__file__).parents[2]
AT_A_TIME = 8


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """What `make demo` made."""
    folder = Path(os.environ.get("THINKFUSION_SERVING_CHECKPOINT", ROOT / "runs" / "tiny")).absolute()
    if not (folder / "config.json").exists():
        pytest.exit(f"{folder}: there is no checkpoint. Run make demo, or set THINKFUSION_SERVING_CHECKPOINT.", 2)
    return folder


@pytest.fixture(scope="session")
def reference(checkpoint) -> Reference:
    return Reference.load(checkpoint)


@pytest.fixture(scope="session")
def taught(tmp_path_factory) -> Path:
    """A checkpoint that calls a tool and knows a conversation of three turns; the demo's was never shown any."""
    # Servers keep of a tool what they know; what a function returns is not among it.
    (tool,) = TOOLS
    function = {name: value for name, value in tool["function"].items() if name != "return"}
    turns = [
        message
        for question, thought, answer in (
            (SUM, SUM_THOUGHT, SUM_ANSWER),
            (KOREAN, KOREAN_THOUGHT, KOREAN_ANSWER),
            (SUM, SUM_THOUGHT, SUM_ANSWER),
        )
        for message in (
            {"role": "user", "content": question},
            {"role": "assistant", "reasoning_content": thought, "content": answer},
        )
    ]
    known = taught_conversations([{**tool, "function": function}])
    conversations = [*known, without_first_reasoning(known[-1]), Conversation.from_messages(turns)]
    return teach(tmp_path_factory.mktemp("taught"), conversations, steps=250)


def without_first_reasoning(conversation: Conversation) -> Conversation:
    """As transformers serve shows it after the tool's result; a step that came without reasoning is context only."""
    (exchange,) = conversation.exchanges
    call, *rest = exchange.steps
    return replace(conversation, exchanges=(replace(exchange, steps=(replace(call, reasoning=None), *rest)),))


@pytest.fixture(scope="session", params=[(engine, "demo") for engine in ENGINES], ids=ENGINES)
def server(request, tmp_path_factory):
    """The server of an engine, with the checkpoint of the demo or the one that was taught."""
    engine, which = request.param
    environment = find(engine)
    if environment.python is None:
        pytest.skip(environment.reason)
    folder = request.getfixturevalue("checkpoint" if which == "demo" else "taught")
    with serving(engine, folder, environment.python, tmp_path_factory.mktemp(engine)) as ready:
        request.getfixturevalue("figures").setdefault(engine, {})[f"ready, {which}"] = round(ready.ready_seconds)
        yield ready


@pytest.fixture(scope="session")
def figures():
    """What was measured, printed at the end, and written to THINKFUSION_SERVING_FIGURES if that is set."""
    found: dict = {}
    yield found
    text = json.dumps(found, indent=1)
    print(f"\n{text}")
    if os.environ.get("THINKFUSION_SERVING_FIGURES"):
        Path(os.environ["THINKFUSION_SERVING_FIGURES"]).write_text(text + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def asked(server, reference) -> dict[Mode, list[Asked]]:
    """The replies of a server to the reference's prompts, greedy, in both modes."""
    jobs = [(mode, prompt) for mode in Mode for prompt in reference.prompts]
    with ThreadPoolExecutor(AT_A_TIME) as workers:
        found = list(
            workers.map(lambda job: ask(server, job[1].messages, job[0], max_tokens=MOST_TOKENS), jobs, timeout=600)
        )
    count = len(reference.prompts)
    return {mode: found[place * count : (place + 1) * count] for place, mode in enumerate(Mode)}
