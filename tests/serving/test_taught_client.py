# SPDX-License-Identifier: Apache-2.0
"""The client of the examples at three servers: both modes, turns that alternate them, tools in both."""

import subprocess
import sys

import pytest

from tests.serving.environments import ENGINES
from tests.serving.servers import EXAMPLES
from tests.taught import (
    CALL,
    CALL_ANSWER,
    CALL_THOUGHT,
    KOREAN,
    KOREAN_ANSWER,
    KOREAN_THOUGHT,
    SUM,
    SUM_ANSWER,
    SUM_THOUGHT,
)

pytestmark = pytest.mark.parametrize("server", [(name, "taught") for name in ENGINES], indirect=True, ids=ENGINES)


def client(server, *arguments):
    line = [sys.executable, str(EXAMPLES / "serving_client.py"), server.model, *arguments]
    line += ["--url", f"{server.address}/v1", "--temperature", "0", "--max_tokens", "100"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("question", "thought", "answer"),
    [(SUM, SUM_THOUGHT, SUM_ANSWER), (KOREAN, KOREAN_THOUGHT, KOREAN_ANSWER)],
    ids=("English", "Korean"),
)
def test_both_modes(server, question, thought, answer):
    shown = client(server, question)
    assert f"enable_thinking=True\n  reasoning: {thought!r}\n  answer: {answer!r}" in shown
    assert f"enable_thinking=False\n  reasoning: ''\n  answer: {answer!r}" in shown
    assert f"pieces: {thought + answer!r}" in shown
    assert f"pieces: {answer!r}" in shown


def test_turns_that_alternate(server):
    shown = client(server, "--show", "turns", SUM, KOREAN, SUM)
    assert shown == (
        f"turn 1, enable_thinking=True\n  reasoning: {SUM_THOUGHT!r}\n  answer: {SUM_ANSWER!r}\n"
        f"turn 2, enable_thinking=False\n  reasoning: ''\n  answer: {KOREAN_ANSWER!r}\n"
        f"turn 3, enable_thinking=True\n  reasoning: {SUM_THOUGHT!r}\n  answer: {SUM_ANSWER!r}\n"
    )


def test_tools_in_both_modes(server):
    thinking, plain = client(server, "--show", "tools", CALL).split("enable_thinking=False")
    assert f"reasoning: {CALL_THOUGHT}" in thinking
    assert "reasoning" not in plain
    for part in (thinking, plain):
        assert 'call: add({"a": 1734, "b": 58}) = 1792' in part
        assert f"answer: {CALL_ANSWER}" in part
