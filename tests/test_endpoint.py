# SPDX-License-Identifier: Apache-2.0
"""A served model measured over the protocol: classes, switches, faults, what is kept of a run that was cut."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.endpoint_server import asked_mode, completion, message, serving, slowly
from tests.two_processes import free_port
from thinkfusion import endpoint_replying
from thinkfusion.cli import main
from thinkfusion.endpoint import Answer, Endpoint, EndpointError, _retry_after, checked_url
from thinkfusion.endpoint_presets import PRESETS, switch_of
from thinkfusion.endpoint_reading import alike, read_answer, remarks
from thinkfusion.endpoint_replying import JOURNAL_NAME, EndpointReplier, Journal
from thinkfusion.modes import Mode, Reply

THINKING, NON_THINKING = Mode
MOST_FAULTS = 3
"""Of one question that `faults` lets fail; it has six attempts."""


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """No key of this machine, and short pauses."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(endpoint_replying, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(endpoint_replying, "_WAIT", 0.05)


@pytest.fixture
def prompts(tmp_path):
    """Twelve questions, whose answer is their last word."""
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"Repeat the word w{number}", "answer": f"w{number}"} for number in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluate(url, output, *flags, prompts=None):
    given = ["--prompts", str(prompts)] if prompts else ["--samples", "6"]
    return main(["evaluate", "--endpoint", url, "--model", "m", "--output", str(output), *given, *flags])


def report_of(output):
    return json.loads((output / "mode_report.json").read_text())


# One reply


def read(content="", mode=THINKING, preset="qwen3", **answer):
    return read_answer(Answer(content=content, **answer), mode, PRESETS[preset])


@pytest.mark.parametrize(
    ("mode", "answer", "kind", "parts"),
    [
        (THINKING, {"reasoning": "Two.", "content": "4"}, "ok", ("Two.", "4")),
        (THINKING, {"reasoning": "Two.", "content": ""}, "never_closed", ("Two.", "")),
        (THINKING, {"reasoning": "", "content": "4"}, "empty_trace", ("", "4")),
        (THINKING, {"reasoning": None, "content": "4"}, "empty_trace", ("", "4")),
        (THINKING, {"reasoning": None, "content": ""}, "empty_answer", ("", "")),
        (THINKING, {"reasoning": "Two", "content": "", "finish": "length"}, "truncated", ("Two", "")),
        (THINKING, {"reasoning": "Two.", "content": "</think>4"}, "extra_tag", ("Two.", "</think>4")),
        (THINKING, {"reasoning": None, "content": "4", "reasoning_tokens": 5}, "unseen", ("", "4")),
        (THINKING, {"reasoning": None, "content": "4", "completion_tokens": 40}, "unseen", ("", "4")),
        (THINKING, {"reasoning": None, "content": "4", "completion_tokens": 9}, "empty_trace", ("", "4")),
        (THINKING, {"problem": "500"}, "unanswered", ("", "")),
        (NON_THINKING, {"content": "4"}, "ok", ("", "4")),
        (NON_THINKING, {"content": "", "reasoning": ""}, "empty_answer", ("", "")),
        (NON_THINKING, {"reasoning": "Two.", "content": "4"}, "extra_tag", ("Two.", "4")),
        (NON_THINKING, {"content": "4", "finish": "length"}, "truncated", ("", "4")),
        # Where no parser splits them
        (THINKING, {"content": "<think>\nTwo.\n</think>\n\n4"}, "ok", ("Two.", "4")),
        (THINKING, {"content": "Two.</think>4"}, "ok", ("Two.", "4")),
        (THINKING, {"content": "<think>Two"}, "never_closed", None),
        (THINKING, {"content": "<think>Two", "finish": "length"}, "truncated", ("Two", "")),
        (NON_THINKING, {"content": "<think>Two.</think>4"}, "extra_tag", None),
    ],
)
def test_what_a_reply_was(mode, answer, kind, parts):
    reply = read(**{"content": "", **answer}, mode=mode)
    assert reply.kind == kind
    assert parts is None or tuple(reply) == parts
    assert reply.format_error == (kind not in ("ok", "truncated", "unseen", "unanswered"))


def test_without_a_switch_a_reply_is_in_the_mode_that_it_shows():
    assert (read("4", None, reasoning="Two.").kind, read("4", None, reasoning="Two.").mode) == ("ok", THINKING)
    assert (read("4", None).kind, read("4", None).mode) == ("ok", NON_THINKING)
    assert read("4", None, reasoning_tokens=3).kind == "unseen"
    # A server that shows traces elsewhere hides none here, whatever its usage says.
    shown = Answer(content="4", reasoning_tokens=3)
    for mode, kind in ((None, "ok"), (THINKING, "empty_trace"), (NON_THINKING, "ok")):
        assert read_answer(shown, mode, PRESETS["qwen3"], hides=False).kind == kind


def test_levels_of_effort_may_both_reason():
    for mode in Mode:
        assert read("4", mode, "gpt-oss", reasoning="Two.").kind == "ok"
        assert read("4", mode, "gpt-oss").kind == "ok"
        assert read("", mode, "gpt-oss", reasoning="Two.").kind == "never_closed"


def test_tokens_are_those_of_the_server_or_of_a_tokenizer():
    from thinkfusion.checkpointing import tiny_base_path

    told = read("four", reasoning="Two and", completion_tokens=11, reasoning_tokens=8)
    assert (told.reasoning_tokens, told.answer_tokens) == (8, 3)
    shared = read("four", reasoning="Two and two.", completion_tokens=12)
    assert (shared.reasoning_tokens, shared.answer_tokens) == (9, 3)  # 12 of 16 bytes
    silent = read("four", reasoning="Two and two.")
    assert (silent.reasoning_tokens, silent.answer_tokens) == (None, None)
    from thinkfusion.endpoint_verb import _tokenizer

    tokenizer = _tokenizer(str(tiny_base_path()))
    answer = Answer(content="293443", reasoning="12", completion_tokens=99)
    counted = read_answer(answer, THINKING, PRESETS["qwen3"], tokenizer)
    assert (counted.reasoning_tokens, counted.answer_tokens) == (2, 6)


# Switches


def test_presets_say_different_things_in_each_mode():
    assert list(PRESETS) == ["thinkfusion", "qwen3", "deepseek", "glm", "axk1", "granite", "gpt-oss"]
    for switch in PRESETS.values():
        first, second = switch.bodies.values()
        assert first != second
    assert switch_of("deepseek").bodies[THINKING] == {"chat_template_kwargs": {"thinking": True}}
    efforts = switch_of("gpt-oss", efforts="medium, low").bodies
    assert [body["reasoning_effort"] for body in efforts.values()] == ["medium", "low"]
    given = switch_of("glm", non_thinking_body='{"reasoning": {"enabled": false}}')
    assert given.bodies[NON_THINKING] == {"reasoning": {"enabled": False}}
    assert given.bodies[THINKING] == PRESETS["glm"].bodies[THINKING]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"preset": "qwen4"}, "preset: found 'qwen4', expected one of thinkfusion, qwen3"),
        ({"thinking_body": "[1]"}, "thinking_body: found '\\[1\\]', expected a JSON object"),
        ({"thinking_body": "{"}, "expected a JSON object"),
        ({"non_thinking_body": '{"model": "x"}'}, "found model, which the evaluation sets itself"),
        ({"thinking_body": "{}", "non_thinking_body": "{}"}, "say the same, {}, so nothing would switch"),
        ({"efforts": "high,low"}, "efforts: found 'high,low' with the preset thinkfusion"),
        ({"preset": "gpt-oss", "efforts": "high"}, "expected two of low, medium, high"),
        ({"preset": "gpt-oss", "efforts": "low,low"}, "so nothing would switch"),
    ],
)
def test_switches_that_are_none(given, text):
    with pytest.raises(EndpointError, match=text):
        switch_of(**given)


def replies_of(counts):
    """Replies by mode: (those that reason, all)."""
    return {
        mode: [Reply(mode, "a" * (place < some), "b", "ok") for place in range(every)]
        for mode, (some, every) in zip(Mode, counts, strict=True)
    }


def test_modes_that_answer_alike():
    assert alike(replies_of([(100, 100), (0, 100)])) is None
    assert alike(replies_of([(1, 1), (0, 1)])) is None  # intervals overlap, but what is there differs
    assert alike(replies_of([(3, 100), (2, 100)])) == (
        "3 of 100 replies in thinking mode reason, and 2 of 100 in non-thinking mode"
    )
    assert alike(replies_of([(100, 100), (98, 100)])) is not None
    assert alike(replies_of([(0, 100), (100, 100)])) is not None  # the wrong way round is no switch either
    hidden = {
        THINKING: [Reply(THINKING, "", "b", "unseen")] * 9,
        NON_THINKING: [Reply(NON_THINKING, "", "b", "ok")] * 9,
    }
    assert alike(hidden) is None


def test_levels_of_effort_are_compared_by_length():
    def of(lengths):
        return {
            mode: [Reply(mode, "a", "b", "ok", reasoning_tokens=length, answer_tokens=1) for length in own]
            for mode, own in zip(Mode, lengths, strict=True)
        }

    assert alike(of([[50, 60, 55, 58], [9, 8, 10, 9]]), both_reason=True) is None
    assert "tokens long on average" in alike(of([[50, 60, 5, 8], [40, 8, 30, 39]]), both_reason=True)


def test_what_cannot_be_seen_is_said():
    parsed = [Answer(reasoning="a", content="b"), Answer(content="b")]
    (line,) = remarks(replies_of([(1, 1), (0, 1)]), parsed, PRESETS["qwen3"])
    assert "never_closed or empty_answer" in line
    (line,) = remarks(replies_of([(0, 1), (0, 1)]), [Answer(content="b")], PRESETS["qwen3"])
    assert "Start the server with its reasoning parser" in line
    assert list(remarks(replies_of([(1, 1), (0, 1)]), [Answer(content="a</think>b")], PRESETS["qwen3"])) == []


# The whole way


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_is_measured_like_a_checkpoint(tmp_path, prompts, capsys, stream):
    with serving() as (fake, url):
        flags = ["--stream"] if stream else []
        assert evaluate(url, tmp_path / "out", "--max_new_tokens", "77", *flags, prompts=prompts) == 0
    report = report_of(tmp_path / "out")
    for mode in Mode:
        values = report["modes"][mode.value]
        assert values["classes"] == {
            **dict.fromkeys(("never_closed", "empty_trace", "extra_tag", "empty_answer", "truncated"), 0),
            **{"ok": 12, "unseen": 0, "unanswered": 0},
        }
        assert (values["accuracy"], values["format_error"]) == (1.0, 0.0)
        assert values["speed"]["replies_per_second"] > 0
    assert report["modes"]["thinking"]["reasoning_tokens"] == 8
    assert report["modes"]["thinking"]["answer_tokens"] == 4
    assert report["modes"]["non_thinking"]["answer_tokens"] == 12
    account = report["endpoint"]
    assert (account["url"], account["model"], account["replies"], account["faults"]) == (url, "m", 24, {})
    assert account["reasons"] == {"thinking": 12, "non_thinking": 0}
    assert account["alike"] is None
    assert (account["seconds_to_first_token"] is not None) == stream
    assert len(fake.requests) == 24
    assert {asked_mode(body) for body in fake.requests} == {True, False}
    for body in fake.requests:
        assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 77, 0.0)
        assert bool(body.get("stream")) == stream
    rows = [json.loads(line) for line in (tmp_path / "out" / "replies.jsonl").read_text().splitlines()]
    assert {row["reasoning"] for row in rows if row["mode"] == "thinking"} == {f"I read w{n}." for n in range(12)}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "of the served model" in page
    assert ("seconds to the first token" in page) == stream
    assert not (tmp_path / "out" / JOURNAL_NAME).exists()
    assert "12 prompts per mode" in capsys.readouterr().out


def test_many_at_once_and_no_more_than_asked_for(tmp_path, prompts):
    with serving(slowly(0.1)) as (fake, url):
        assert evaluate(url, tmp_path / "out", "--concurrency", "5", prompts=prompts) == 0
    assert fake.most_at_once == 5


def test_obedience_flip_and_budgets(tmp_path, prompts):
    """A server with a template like ours: the hard switch, then the latest soft one, then thinking."""

    def rule(server, body, number):
        mode = asked_mode(body)
        for said in reversed(body["messages"]):
            if mode is None and said["role"] in ("user", "system"):
                word = said["content"].split()[-1]
                mode = {"/think": True, "/no_think": False}.get(word)
        text = body["messages"][-1]["content"].removesuffix(" /think").removesuffix(" /no_think")
        asked = {
            **body,
            "messages": [{"content": text}],
            "chat_template_kwargs": {"enable_thinking": mode is not False},
        }
        budget = body.get("thinking_token_budget")
        given = completion(asked)
        if budget is not None:
            given["usage"]["completion_tokens_details"]["reasoning_tokens"] = min(8, budget)
        return given

    with serving(rule) as (_, url):
        flags = ["--obedience", "2", "--flip", "4", "--budgets", "4,16", "--budget_field", "thinking_token_budget"]
        assert evaluate(url, tmp_path / "out", *flags, prompts=prompts) == 0
    report = report_of(tmp_path / "out")
    assert (report["obedience"]["obeyed"], report["obedience"]["total"]) == (108, 108)
    assert report["obedience"]["default"] == "thinking"
    assert (report["flip"]["right"], report["flip"]["total"]) == (24, 24)
    assert [point["reasoning_tokens"] for point in report["budgets"]] == [4, 8]


def test_a_default_of_non_thinking_is_found_out_and_soft_switches_left_out(tmp_path, prompts):
    def rule(server, body, number):
        mode = body.get("chat_template_kwargs", {}).get("thinking", False)
        return completion({**body, "chat_template_kwargs": {"enable_thinking": mode}})

    with serving(rule) as (_, url):
        assert evaluate(url, tmp_path / "out", "--preset", "deepseek", "--obedience", "2", prompts=prompts) == 0
    found = report_of(tmp_path / "out")["obedience"]
    assert found["default"] == "non_thinking"
    assert {cell["soft"] for cell in found["cells"]} == {None}
    assert found["obeyed"] == found["total"] == 2 * (3 * 3 * 2 - 2)


def test_a_server_without_a_switch_is_told_so(tmp_path, prompts, capsys):
    def rule(server, body, number):
        return completion({**body, "chat_template_kwargs": {"enable_thinking": True}})

    with serving(rule) as (_, url):
        assert evaluate(url, tmp_path / "out", prompts=prompts) == 0
    verdict = report_of(tmp_path / "out")["verdict"]
    assert verdict["level"] == "bad"
    assert verdict["headline"].startswith("No switch shows: both modes answer alike. 12 of 12 replies in thinking mode")
    assert verdict["headline"] in capsys.readouterr().out


def test_traces_that_a_server_keeps_are_not_called_right(tmp_path, prompts):
    def rule(server, body, number):
        given = message(body)
        hidden = {"completion_tokens": 60, "completion_tokens_details": {"reasoning_tokens": 50}}
        usage = hidden if given.pop("reasoning_content") else {"completion_tokens": 3}
        return completion(body, message=given, usage=usage)

    with serving(rule) as (_, url):
        assert evaluate(url, tmp_path / "out", prompts=prompts) == 0
    report = report_of(tmp_path / "out")
    thinking = report["modes"]["thinking"]
    assert (thinking["classes"]["unseen"], thinking["classes"]["ok"], thinking["format_error"]) == (12, 0, None)
    assert thinking["accuracy"] == 1.0
    assert report["verdict"]["headline"].startswith(
        "Not settled: most replies in thinking mode were not to be judged from outside"
    )
    assert any(
        "12 replies reasoned where the server does not show it" in line for line in report["verdict"]["findings"]
    )


def test_replies_without_usage_or_reasoning_field_are_counted(tmp_path, prompts):
    def rule(server, body, number):
        given = message(body)
        given["content"] = "<think>\n" * (given.pop("reasoning_content") is not None) + given["content"]
        if asked_mode(body):
            given["content"] = given["content"].replace("<think>\n", "<think>\nRead.\n</think>\n\n")
        reply = completion(body, message=given)
        del reply["usage"]
        return reply

    with serving(rule) as (_, url):
        assert evaluate(url, tmp_path / "out", prompts=prompts) == 0
    report = report_of(tmp_path / "out")
    assert report["endpoint"]["noted"] == {"without_usage": 24, "without_reasoning_field": 24}
    assert report["endpoint"]["tokens_from"] is None
    assert report["modes"]["thinking"]["reasoning_tokens"] is None
    assert report["modes"]["thinking"]["classes"]["ok"] == 12


def test_half_a_character_is_replaced_and_counted(tmp_path, prompts):
    def rule(server, body, number):
        return completion(body, message={**message(body), "content": "w\ud83d"})

    with serving(rule) as (_, url):
        assert evaluate(url, tmp_path / "out", prompts=prompts) == 0
    assert report_of(tmp_path / "out")["endpoint"]["noted"]["half_characters"] == 24


# Faults


def faults(*kinds):
    """A rule that fails once at every third request, by turns, but never four times at the same question.

    Which request is the third is up to the threads: one question may meet it again and again, and run out of attempts.
    """
    failed = Counter()
    ways = {
        "500": lambda handler: handler.sent(500, b'{"error": {"message": "CUDA out of memory"}}'),
        "502": lambda handler: handler.sent(502, b"<html>bad gateway</html>", {"Content-Type": "text/html"}),
        "429": lambda handler: handler.sent(429, b"{}", {"Retry-After": "0"}),
        "cut": lambda handler: handler.cut(),
        "reset": lambda handler: handler.hung_up(),
        "html": lambda handler: handler.sent(200, b"<html>Welcome</html>", {"Content-Type": "text/html"}),
        "bytes": lambda handler: handler.sent(200, b'{"choices": "\xff\xfe"}'),
        "empty": lambda handler: handler.sent(200, b'{"choices": []}'),
        "half_stream": lambda handler: handler.cut(
            b'data: {"choices": [{"delta": {"reasoning_content": "I re"}}]}\n\n', "text/event-stream"
        ),
        "ended_stream": lambda handler: handler.sent(
            200,
            b'data: {"choices": [{"delta": {"reasoning_content": "I re"}}]}\n\n',
            {"Content-Type": "text/event-stream"},
        ),
        "stream_error": lambda handler: handler.sent(
            200, b'data: {"error": {"message": "engine died"}}\n\n', {"Content-Type": "text/event-stream"}
        ),
    }

    def rule(server, body, number):
        if number % 3 == 0 and failed[server.key(body)] < MOST_FAULTS:
            failed[server.key(body)] += 1
            return ways[kinds[number // 3 % len(kinds)]]
        return completion(body)

    return rule


@pytest.mark.parametrize(
    ("stream", "kinds", "named"),
    [
        (False, ("500", "502"), {"server_error"}),
        (False, ("429",), {"busy"}),
        (False, ("cut",), {"cut"}),
        (False, ("reset",), {"cut", "no_connection"}),
        (False, ("html", "bytes", "empty"), {"unreadable"}),
        (True, ("half_stream", "ended_stream"), {"cut"}),
        (True, ("stream_error", "500"), {"server_error"}),
    ],
)
def test_faults_lose_no_prompt(tmp_path, prompts, stream, kinds, named):
    with serving(faults(*kinds)) as (fake, url):
        flags = ["--stream"] * stream
        assert evaluate(url, tmp_path / "out", "--concurrency", "4", *flags, prompts=prompts) == 0
    report = report_of(tmp_path / "out")
    assert {report["modes"][mode.value]["classes"]["ok"] for mode in Mode} == {12}
    assert report["endpoint"]["unanswered"] == {}
    seen = report["endpoint"]["faults"]
    assert {*seen} <= named
    assert sum(seen.values()) == len(fake.requests) - 24 >= 8
    assert set(fake.answered.values()) == {1}  # what was answered is not asked again


def test_a_reply_that_takes_too_long(tmp_path, prompts):
    def rule(server, body, number):
        if number in (5, 9):
            time.sleep(1.5)
        return completion(body)

    with serving(rule) as (_, url):
        assert evaluate(url, tmp_path / "out", "--timeout", "0.5", prompts=prompts) == 0
    report = report_of(tmp_path / "out")
    assert report["endpoint"]["faults"] == {"timeout": 2}
    assert report["modes"]["thinking"]["classes"]["ok"] == 12


def test_a_prompt_that_is_refused_or_never_answered_is_counted(tmp_path, prompts, capsys):
    def rule(server, body, number):
        text = body["messages"][-1]["content"]
        if text.endswith("w3"):
            return lambda handler: handler.sent(400, b'{"error": {"message": "too long for the context"}}')
        if text.endswith("w5") and asked_mode(body):
            return lambda handler: handler.sent(500, b'{"detail": "this one kills me"}')
        return completion(body)

    with serving(rule) as (fake, url):
        flags = ["--retries", "2", "--concurrency", "2"]
        assert evaluate(url, tmp_path / "out", *flags, prompts=prompts) == 0
        report = report_of(tmp_path / "out")
        assert (
            report["modes"]["thinking"]["classes"] | {"ok": 10, "unanswered": 2}
            == report["modes"]["thinking"]["classes"]
        )
        assert report["modes"]["non_thinking"]["classes"]["unanswered"] == 1
        assert report["endpoint"]["unanswered"] == {
            "400: too long for the context": 2,
            "500: this one kills me": 1,
        }
        assert report["modes"]["thinking"]["accuracy"] == 1.0
        assert "3 requests got no reply" in capsys.readouterr().out
        # The same command asks only for these again.
        before = len(fake.requests)
        fake.rule = lambda server, body, number: completion(body)
        assert evaluate(url, tmp_path / "out", *flags, prompts=prompts) == 0
    assert len(fake.requests) - before == 3
    assert report_of(tmp_path / "out")["modes"]["thinking"]["classes"]["ok"] == 12
    assert not (tmp_path / "out" / JOURNAL_NAME).exists()


def test_a_server_that_dies_leaves_a_report_that_can_be_gone_on_with(tmp_path, prompts, capsys):
    def rule(server, body, number):
        if number > 10:
            return lambda handler: handler.hung_up()
        return completion(body)

    with serving(rule) as (fake, url):
        flags = ["--retries", "2", "--concurrency", "2"]
        assert evaluate(url, tmp_path / "out", *flags, prompts=prompts) == 1
        told = capsys.readouterr().err
        assert "no reply any more, in 3 attempts each" in told
        assert "10 of 24 replies are in the report" in told
        partial = report_of(tmp_path / "out")
        assert sum(values["classes"]["ok"] for values in partial["modes"].values()) == 10
        assert (tmp_path / "out" / "report.html").exists()
        fake.rule = lambda server, body, number: completion(body)
        assert evaluate(url, tmp_path / "out", *flags, prompts=prompts) == 0
    assert set(fake.answered.values()) == {1}
    report = report_of(tmp_path / "out")
    assert report["endpoint"]["of_an_earlier_run"] == 10
    assert {report["modes"][mode.value]["classes"]["ok"] for mode in Mode} == {12}


def test_a_run_that_is_killed_asks_nothing_twice(tmp_path, prompts):
    with serving(slowly(0.15)) as (fake, url):
        output = tmp_path / "out"
        command = [sys.executable, "-m", "thinkfusion.cli", "evaluate", "--endpoint", url, "--model", "m"]
        code = "import sys; from thinkfusion.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", code, *command[3:], "--prompts", str(prompts), "--output", str(output)]
        process = subprocess.Popen(
            [*command, "--concurrency", "2"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        journal = output / JOURNAL_NAME
        until = time.monotonic() + 60
        while time.monotonic() < until and not (journal.exists() and journal.read_bytes().count(b"\n") >= 6):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        kept = journal.read_bytes()
        whole = kept.count(b"\n")
        assert whole >= 6
        journal.write_bytes(kept + b'{"key": "half a li')
        before = len(fake.requests)
        assert subprocess.run(command, check=False, capture_output=True, timeout=120).returncode == 0
    assert len(fake.requests) - before == 24 - whole
    report = report_of(output)
    assert report["endpoint"]["of_an_earlier_run"] == whole
    assert {report["modes"][mode.value]["classes"]["ok"] for mode in Mode} == {12}
    # Time between the runs is in no speed.
    assert report["modes"]["thinking"]["speed"]["seconds"] < 12 * 0.15 + 1


def test_a_prompt_that_is_there_twice_is_asked_twice(tmp_path):
    path = tmp_path / "twice.jsonl"
    path.write_text('{"prompt": "Say one", "answer": "one"}\n' * 2)
    with serving() as (fake, url):
        assert evaluate(url, tmp_path / "out", prompts=path) == 0
    assert len(fake.requests) == 4


def refused(status, body=b"{}", headers=None):
    return lambda server, asked, number: lambda handler: handler.sent(status, body, headers)


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (
            refused(401, b'{"error": {"message": "Incorrect API key: sk-secret"}}'),
            "(401: Incorrect API key: (the key))",
        ),
        (refused(403), "wants a valid key (403"),
        (refused(404, b'{"message": "The model m does not exist."}'), "Is 'm' the server's name for the model"),
        (refused(400, b'{"detail": "enable_thinking?"}'), "400: enable_thinking?. If it is the switch"),
        (refused(200, b"<html>Hello</html>"), "found HTML, expected JSON"),
        (refused(200, b"<html>Hello</html>", {"Content-Type": "text/html"}), "Is this the address of the API"),
        (refused(200, b'{"choices": [{"message": {"content": "\xff"}}]}'), "the reply is not UTF-8"),
        (refused(200, b'{"id": 3}'), "found a reply without choices"),
        (refused(200, b'{"choices": [{"message": {"content": 4}}]}'), "found int as content, expected a text"),
        (refused(307, b"", {"Location": "http://example.org/v1/chat/completions"}), "http://example.org, which is not"),
        (refused(302, b"", {"Location": "/login"}), "redirects to http://127.0.0.1"),
        (refused(500, b""), "no reply any more, in 3 attempts each; the last fault: 500: without a message."),
    ],
)
def test_one_clear_error(tmp_path, prompts, capsys, monkeypatch, rule, text):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with serving(rule) as (fake, url):
        assert evaluate(url, tmp_path / "out", "--retries", "2", prompts=prompts) == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert text in told
    assert "sk-secret" not in told
    assert not list((tmp_path / "out").iterdir())
    assert all("example.org" not in headers["Host"] for headers in fake.headers)


def test_a_redirect_on_the_same_server_is_followed(tmp_path, prompts):
    def rule(server, body, number):
        path = server.paths.pop() if server.paths else None
        if path:
            return lambda handler: handler.sent(307, b"", {"Location": path})
        return completion(body)

    with serving(rule) as (fake, url):
        fake.paths = ["/elsewhere/chat/completions"]
        assert evaluate(url, tmp_path / "out", prompts=prompts) == 0
    assert len(fake.requests) == 25


def test_the_key_goes_to_the_server_and_nowhere_else(tmp_path, prompts, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    with serving() as (fake, url):
        assert evaluate(url, tmp_path / "out", "--transcripts", "9", prompts=prompts) == 0
    assert {headers["Authorization"] for headers in fake.headers} == {"Bearer sk-very-secret"}
    shown = capsys.readouterr()
    assert "secret" not in shown.out + shown.err
    for path in (tmp_path / "out").iterdir():
        assert b"secret" not in path.read_bytes()
    assert "secret" not in repr(Endpoint(url, "m"))


def test_nothing_listens_there(tmp_path, prompts, capsys):
    port = free_port()
    start = time.monotonic()
    assert evaluate(f"http://127.0.0.1:{port}/v1", tmp_path / "out", prompts=prompts) == 1
    assert "Is the server running" in capsys.readouterr().err
    assert time.monotonic() - start < 5
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://a/v1", "http://", "http://me:pw@a/v1", "http://a/v1?key=1", "http://a b/v1"]
)
def test_addresses_that_are_none(url):
    with pytest.raises(EndpointError, match="endpoint: "):
        checked_url(url)


def test_an_address_is_taken_as_it_may_be_given():
    for url in ("http://a:1/v1", "http://a:1/v1/", "http://a:1/v1/chat/completions", " http://a:1/v1 "):
        assert checked_url(url) == "http://a:1/v1"


def test_how_long_a_server_asks_to_wait():
    assert _retry_after(None) is None
    assert _retry_after("3") == 3
    assert _retry_after("-3") == 0
    assert _retry_after("nan") == 0
    assert _retry_after("99999") == 120
    assert _retry_after("soon") is None
    assert _retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ([], "name a checkpoint, or a served model"),
        (["tiny-base", "--model", "m"], "model: only with --endpoint"),
        (["tiny-base", "--preset", "glm"], "preset: only with --endpoint"),
        (["tiny-base", "--endpoint", "http://a/v1", "--model", "m"], "found both the checkpoint"),
        (["--endpoint", "http://a/v1"], "model: say which model"),
        (["--endpoint", "http://a/v1", "--model", "m", "--probe"], "probe: only of a checkpoint"),
        (["--endpoint", "http://a/v1", "--model", "m", "--routes"], "routes: only of a checkpoint"),
        (["--endpoint", "http://a/v1", "--model", "m", "--lm-eval", "x"], "lm-eval: only of a checkpoint"),
        (["--endpoint", "http://a/v1", "--model", "m", "--budgets", "8"], "say which field of a request takes one"),
        (["--endpoint", "http://a/v1", "--model", "m", "--timeout", "0"], "timeout: found 0"),
        (["--endpoint", "http://a/v1", "--model", "m", "--tokenizer", "nowhere"], "no tokenizer can be read"),
        (
            ["--endpoint", "http://a/v1", "--model", "m", "--preset", "gpt-oss", "--flip"],
            "both levels of effort reason",
        ),
    ],
)
def test_flags_that_do_not_go_together(tmp_path, monkeypatch, capsys, flags, text):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *flags]) == 1
    told = capsys.readouterr().err
    assert text in told
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_journal_is_left_alone(tmp_path):
    path = tmp_path / JOURNAL_NAME
    path.write_text('{"my": "notes"}\n')
    with pytest.raises(EndpointError, match="found a line that is no reply of an earlier run"):
        Journal(path)
    assert path.read_text() == '{"my": "notes"}\n'


def test_little_memory_is_needed(tmp_path):
    """Neither torch nor transformers is loaded to ask a server."""
    with serving() as (_, url):
        code = (
            "import sys; from thinkfusion.cli import main\n"
            f"main(['evaluate', '--endpoint', '{url}', '--model', 'm', '--samples', '40', '--output', '{tmp_path}'])\n"
            "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1]\n"
            "print(*{'torch', 'transformers'} & {*sys.modules}, 'and', peak)"
        )
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
        done = subprocess.run(
            [sys.executable, "-c", code],
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
            env=environment,
        )
    assert done.returncode == 0, done.stderr
    loaded, _, kilobytes = done.stdout.splitlines()[-1].rpartition("and")
    assert not loaded.strip()
    assert int(kilobytes) < 500 * 1024


def test_the_times_of_requests_are_joined(tmp_path):
    assert endpoint_replying._covered(iter([(0, 2), (1, 3), (10, 11), (10.5, 10.6)])) == 4
    assert endpoint_replying._covered(iter([])) == 0


def test_a_reply_through_python(tmp_path):
    with serving() as (_, url):
        journal = Journal(tmp_path / JOURNAL_NAME)
        replier = EndpointReplier(Endpoint(url, "m"), switch_of("qwen3"), journal, progress=False)
        (reply,) = replier.replies([replier.job([{"role": "user", "content": "Say hello"}], THINKING)])
        journal.close(remove=True)
    assert tuple(reply) == ("I read hello.", "hello")
