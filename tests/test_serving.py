# SPDX-License-Identifier: Apache-2.0
"""A checkpoint in use: `transformers serve` in a process of its own, asked with the `openai` client; the examples."""

import importlib.util
import os
import re
import runpy
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

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
    TOOLS,
    teach,
)
from tests.two_processes import free_port
from thinkfusion import load_checkpoint, reply
from thinkfusion.cli import main

EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDED = ("fastapi", "openai", "uvicorn")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
served = pytest.mark.skipif(bool(MISSING), reason=f"transformers serve needs {', '.join(MISSING)}: install .[serving]")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return teach(tmp_path_factory.mktemp("taught"), generation_defaults="qwen3")


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    """The address of `transformers serve` with the checkpoint; its process ends with the tests."""
    port = free_port()
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(checkpoint)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = tmp_path_factory.mktemp("served") / "log"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text(errors="replace")
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"the server did not start: {log.read_text(errors='replace')}")


@pytest.fixture(scope="module")
def client(server):
    from openai import OpenAI

    with OpenAI(base_url=server, api_key="none", max_retries=0, timeout=60) as opened:
        yield opened


def ask(client, checkpoint, question, *, thinking, **settings):
    return client.chat.completions.create(
        model=str(checkpoint),
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=100,
        extra_body={"chat_template_kwargs": {"enable_thinking": thinking}},
        **settings,
    )


@served
@pytest.mark.parametrize(
    ("question", "thought", "answer"),
    [(SUM, SUM_THOUGHT, SUM_ANSWER), (KOREAN, KOREAN_THOUGHT, KOREAN_ANSWER)],
)
def test_both_modes_are_served_and_split(client, checkpoint, question, thought, answer):
    for thinking in (True, False, True):
        message = ask(client, checkpoint, question, thinking=thinking).choices[0].message
        assert getattr(message, "reasoning_content", None) == (thought if thinking else None)
        assert message.content == answer


@served
def test_both_modes_are_streamed_and_split(client, checkpoint):
    for thinking in (True, False):
        deltas = [chunk.choices[0].delta for chunk in ask(client, checkpoint, KOREAN, thinking=thinking, stream=True)]
        thoughts = [delta.reasoning_content for delta in deltas if getattr(delta, "reasoning_content", None)]
        answers = [delta.content for delta in deltas if delta.content]
        assert "".join(thoughts) == (KOREAN_THOUGHT if thinking else "")
        assert "".join(answers) == KOREAN_ANSWER
        assert len(answers) > 1
        assert len(thoughts) > 1 or not thinking


@served
def test_tool_calls_are_served_in_both_modes(client, checkpoint):
    for thinking in (True, False):
        choice = ask(client, checkpoint, CALL, thinking=thinking, tools=TOOLS).choices[0]
        (call,) = choice.message.tool_calls
        assert (call.function.name, call.function.arguments) == ("add", '{"a": 1734, "b": 58}')
        assert choice.finish_reason == "tool_calls"
        assert getattr(choice.message, "reasoning_content", None) == (CALL_THOUGHT if thinking else None)


@served
def test_the_client_of_the_examples(server, checkpoint, monkeypatch, capsys):
    flags = ["--url", server, "--temperature", "0", "--max_tokens", "60"]
    run_example(monkeypatch, "serving/serving_client.py", str(checkpoint), SUM, *flags)
    shown = capsys.readouterr().out
    assert f"enable_thinking=True\n  reasoning: {SUM_THOUGHT!r}\n  answer: {SUM_ANSWER!r}" in shown
    assert f"enable_thinking=False\n  reasoning: ''\n  answer: {SUM_ANSWER!r}" in shown
    assert f"pieces: {SUM_THOUGHT + SUM_ANSWER!r}" in shown


@served
def test_the_client_splits_what_a_server_does_not(monkeypatch):
    from types import SimpleNamespace as Made

    ask_server = runpy.run_path(str(EXAMPLES / "serving" / "serving_client.py"))["ask"]
    message = Made(content="Two.</think>It is 4.")
    completions = Made(create=lambda **request: Made(choices=[Made(message=message)]))
    unsplit = Made(chat=Made(completions=completions))
    assert ask_server(unsplit, "m", [], thinking=True) == ("Two.", "It is 4.")
    assert ask_server(unsplit, "m", [], thinking=False) == ("", "Two.</think>It is 4.")


# The examples, in this process


def run_example(monkeypatch, name, *arguments, instead: dict[str, str] | None = None):
    """Run an example as a script, with other texts in place of some of its own."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    source = (EXAMPLES / name).read_text(encoding="utf-8")
    for own, other in (instead or {}).items():
        assert source.count(own) == 1
        source = source.replace(own, other)
    exec(compile(source, name, "exec"), {"__name__": "__main__"})


def typed(monkeypatch, *lines):
    given = iter(lines)

    def read(_=""):
        try:
            return next(given)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)


def greedy(monkeypatch, checkpoint):
    """Make `load_checkpoint` forget the sampling defaults, so that replies are those that were taught."""

    def load(name):
        model, tokenizer = load_checkpoint(name)
        del model.generation_config.thinkfusion
        return model, tokenizer

    monkeypatch.setattr("thinkfusion.load_checkpoint", load, raising=False)


def test_chat(checkpoint, monkeypatch, capsys):
    greedy(monkeypatch, checkpoint)
    typed(monkeypatch, SUM, f"{KOREAN} /no_think")
    run_example(monkeypatch, "chat.py", str(checkpoint))
    shown = capsys.readouterr().out
    assert f"[reasoning] {SUM_THOUGHT}\n[answer] {SUM_ANSWER}" in shown
    assert shown.count("[reasoning]") == 1
    typed(monkeypatch, SUM)
    run_example(monkeypatch, "chat.py", str(checkpoint), "--thinking_budget", "5")
    reasoning = capsys.readouterr().out.partition("[reasoning] ")[2].partition("\n[answer]")[0]
    assert SUM_THOUGHT.startswith(reasoning)
    assert 0 < len(reasoning) < len(SUM_THOUGHT)


def test_batch(checkpoint, monkeypatch, capsys):
    greedy(monkeypatch, checkpoint)
    asked = {"What is the sum of the digits of 293443 modulo 10?": SUM}
    asked["Which of the digits 5, 4, 6, 3, 2, 3 is the largest?"] = KOREAN
    run_example(monkeypatch, "batch.py", str(checkpoint), instead=asked)
    shown = capsys.readouterr().out.splitlines()
    tokens = len(load_checkpoint(checkpoint)[1](SUM_THOUGHT)["input_ids"])
    whole = f"{tokens} tokens of reasoning; answer: {SUM_ANSWER!r}"
    assert shown[1] == f"  [thinking, budget None] {whole}"
    assert re.fullmatch(r"  \[thinking, budget 10\] (\d|10) tokens of reasoning; answer: '.+'", shown[2])
    assert shown[3:5] == [
        f"  [non_thinking, budget None] 0 tokens of reasoning; answer: {answer!r}"
        for answer in (SUM_ANSWER, KOREAN_ANSWER)
    ]
    assert shown[-1] == f"  {whole}"


def test_tool_use_in_both_modes(checkpoint, monkeypatch, capsys):
    greedy(monkeypatch, checkpoint)
    run_example(monkeypatch, "tool_use.py", str(checkpoint), CALL)
    thinking, plain = capsys.readouterr().out.split("[non_thinking]")
    assert f"thought: {CALL_THOUGHT}" in thinking
    for part in (thinking, plain):
        assert 'call:    add({"a": 1734, "b": 58}) = 1792' in part
        assert f"answer:  {CALL_ANSWER}" in part
    assert "thought" not in plain


def test_what_generation_md_shows(checkpoint, monkeypatch):
    shown = "".join(re.findall(r"```python\n(.*?)```", (EXAMPLES / "generation.md").read_text(), re.DOTALL))
    names: dict = {}
    exec(shown.replace("runs/tiny", str(checkpoint)).replace("thinking_budget=200", "max_new_tokens=60"), names)
    assert [each.mode.value for each in names["given"]] == ["thinking", "non_thinking"]
    assert len(names["samples"]) == 3
    assert names["best"].reasoning_tokens <= 40
    assert names["ids"].shape[0] == 1


def test_the_command_chat_with_a_budget(checkpoint, capsys):
    flags = ["--mode", "thinking", "--temperature", "0", "--max_new_tokens", "60"]
    assert main(["chat", str(checkpoint), *flags, SUM]) == 0
    assert SUM_THOUGHT in capsys.readouterr().out
    assert main(["chat", str(checkpoint), *flags, "--thinking_budget", "5", SUM]) == 0
    assert SUM_THOUGHT not in capsys.readouterr().out


def test_soft_ends_come_before_hard_ones(checkpoint):
    model, tokenizer = load_checkpoint(checkpoint)
    given = reply(model, tokenizer, SUM, mode=True, temperature=0, thinking_budget=8, max_new_tokens=40)
    assert given.reasoning == "Two and two."
    assert given.reasoning_tokens == 7
