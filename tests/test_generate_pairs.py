# SPDX-License-Identifier: Apache-2.0
"""Paired data from prompts alone: what is kept, what is counted, and what a kill leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.taught import KOREAN, KOREAN_ANSWER, KOREAN_THOUGHT, SUM, SUM_ANSWER, SUM_THOUGHT, teach
from thinkfusion import (
    EvaluationPrompt,
    PairOptions,
    Reply,
    generate_pairs,
    load_checkpoint,
    prepare,
    read_conversations,
)
from thinkfusion import self_distillation as module
from thinkfusion.cli import main
from thinkfusion.modes import Mode

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    return teach(tmp_path_factory.mktemp("taught"))


@pytest.fixture(scope="module")
def loaded(taught):
    return load_checkpoint(taught)


def asked(question, solution=None, grader="auto"):
    return EvaluationPrompt(({"role": "user", "content": question},), solution, grader=grader)


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_right_replies_of_both_modes_become_rows_that_training_reads(taught, loaded, tmp_path, capsys, write):
    prompts = [
        {"question": f"{SUM} /think", "answer": "4"},
        {"messages": [{"role": "user", "content": KOREAN}], "answer": "7", "language": "ko"},
        {"question": SUM, "answer": "5"},
        {"question": SUM},
    ]
    path = write("\n".join(map(json.dumps, prompts)))
    output = tmp_path / "out" / "pairs.jsonl"
    command = ["generate-pairs", str(taught), str(path), "--output", str(output), "--max_new_tokens", "40"]
    assert main([*command, "--temperature", "0.1", "--attempts", "2"]) == 0
    printed = capsys.readouterr().out
    first, second = rows_of(output)
    assert first["prompt"] == [{"role": "user", "content": SUM}]
    assert first["thinking"] == {"role": "assistant", "reasoning_content": SUM_THOUGHT, "content": SUM_ANSWER}
    assert first["non_thinking"] == {"role": "assistant", "content": SUM_ANSWER}
    assert (second["thinking"]["reasoning_content"], second["non_thinking"]["content"]) == (
        KOREAN_THOUGHT,
        KOREAN_ANSWER,
    )
    assert [row["number"] for row in (first, second)] == [1, 2]
    account = json.loads((tmp_path / "out" / "pairs.account.json").read_text())["account"]
    assert (account["prompts"], account["done"], account["kept"]) == (4, 4, 2)
    assert account["rejected"] == {"no_answer": 1, "thinking: wrong": 1}
    # One attempt where it is right, all where it is not, and none that could change nothing.
    assert account["replies"] == {"thinking": {"kept its mode": 2, "wrong": 2}, "non_thinking": {"kept its mode": 2}}
    assert "4 prompts = 2 kept + 2 rejected" in printed
    assert 0 < account["share_in_model"] <= 1

    conversations, report = read_conversations(output)
    assert (report.kept, report.formats) == (2, {str(output): "paired"})
    assert set(conversations[0].exchanges[0].modes) == set(Mode)
    dataset, _ = prepare(str(output), loaded[1])
    assert len(dataset) == 4
    labels = [[token for token in row if token >= 0] for row in dataset["labels"]]
    assert f"{SUM_THOUGHT}</think>{SUM_ANSWER}<|im_end|>" in map(loaded[1].decode, labels)


class Scripted:
    """Replies that are given for each mode and question, in turn, in the place of a model's."""

    def __init__(self, monkeypatch, tokenizer, script):
        self.script, self.tokenizer, self.calls = script, tokenizer, []
        monkeypatch.setattr(module, "generate", self)

    def __call__(self, model, tokenizer, prompts, modes, sampling, **_):
        given = []
        for ids, mode in zip(prompts, modes, strict=True):
            text = tokenizer.decode(ids)
            name = next(name for name in self.script if name[0] in text and name[1] is mode)
            self.calls.append(name)
            given.append(self.script[name][(self.calls.count(name) - 1) % len(self.script[name])])
        return given


def thought(answer, kind="ok", tokens=5, reasoning="R"):
    return Reply(
        Mode.THINKING, reasoning, answer, kind, kind != "truncated", tokens, 1, (reasoning, "</think>", answer)
    )


def plain(answer, kind="ok", tokens=1):
    return Reply(Mode.NON_THINKING, "", answer, kind, kind != "truncated", 0, tokens, (answer,))


def test_which_reply_is_kept_and_where_the_non_thinking_answer_comes_from(loaded, tmp_path, monkeypatch):
    script = {
        ("AAA", Mode.THINKING): [thought("2"), thought("1", tokens=9), thought("1", tokens=3, reasoning="S")],
        ("AAA", Mode.NON_THINKING): [plain("3")],
    }
    Scripted(monkeypatch, loaded[1], script)
    chosen = {}
    for keep in ("first", "shortest"):
        for origin in ("either", "sampled", "thinking"):
            path = tmp_path / f"{keep}_{origin}.jsonl"
            options = PairOptions(attempts=3, keep=keep, non_thinking_from=origin)
            account = generate_pairs(*loaded, [asked("AAA", "1")], path, options, progress=False)
            chosen[keep, origin] = rows_of(path), account
    assert [chosen[keep, "either"][0][0]["thinking"]["reasoning_content"] for keep in ("first", "shortest")] == [
        "R",
        "S",
    ]
    row = chosen["first", "either"][0][0]
    assert (row["non_thinking"]["content"], row["non_thinking_from"]) == ("1", "thinking")
    assert chosen["first", "sampled"][0] == []
    assert chosen["first", "sampled"][1].rejected == {"non_thinking: wrong": 1}
    assert chosen["first", "thinking"][1].replies["non_thinking"] == {}
    assert chosen["first", "thinking"][0] == [row]


def test_each_rejected_prompt_has_the_reason_that_came_nearest(loaded, tmp_path, monkeypatch):
    kinds = ["never_closed", "empty_trace", "extra_tag", "empty_answer", "truncated"]
    script = {(f"Q{kind}", Mode.THINKING): [thought("1", kind)] for kind in kinds}
    script["Qboth", Mode.THINKING] = [thought("1", "extra_tag"), thought("2")]
    script["Qspelled", Mode.THINKING] = [thought("1 <think>")]
    script |= {("Q", Mode.NON_THINKING): [plain("1 <think>")]}
    Scripted(monkeypatch, loaded[1], script)
    prompts = [asked(name, ".", grader="regex") for name, mode in script if mode is Mode.THINKING]
    prompts[5] = asked("Qboth", "1")
    prompts.append(asked("Qnone"))
    account = generate_pairs(*loaded, prompts, tmp_path / "p.jsonl", PairOptions(attempts=2), progress=False)
    assert account.rejected == {
        **{f"thinking: {kind}": 1 for kind in (*kinds, "wrong")},
        "no_answer": 1,
        "unreadable: unclosed_think": 1,
    }
    assert account.done == account.prompts == account.kept + sum(account.rejected.values()) == 8


def test_prompts_without_answers_are_kept_by_their_format_only_if_asked(loaded, tmp_path, monkeypatch):
    script = {("AAA", Mode.THINKING): [thought("any")], ("AAA", Mode.NON_THINKING): [plain("other")]}
    Scripted(monkeypatch, loaded[1], script)
    for keep, count in ((False, 0), (True, 1)):
        path = tmp_path / f"{keep}.jsonl"
        options = PairOptions(keep_ungraded=keep)
        assert generate_pairs(*loaded, [asked("AAA")], path, options, progress=False).kept == count
        assert len(rows_of(path)) == count


COMMAND = [sys.executable, "-m", "thinkfusion.cli", "generate-pairs"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


class Killed:
    """Makes three batches; the process that makes the second is killed, after the first has been handed over."""

    batches, model = 3, torch.nn.Linear(1, 1)

    def make(self, number):
        if number == 1:
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        return [], float(number)


def test_a_killed_process_is_told_and_what_was_made_is_kept():
    made = []
    with pytest.raises(ChildProcessError, match=r"one of 2 was killed.*the same again, with fewer processes, goes on"):
        made.extend(module._in_order(Killed(), 0, 2))
    assert made == [([], 0.0)]


def test_a_killed_run_ends_in_the_file_of_one_never_stopped(taught, tmp_path, write, capsys):
    numbers = [{"question": SUM if n % 3 else KOREAN, "answer": "4" if n % 3 else "7"} for n in range(24)]
    prompts = write("\n".join(map(json.dumps, numbers)))
    flags = [str(taught), str(prompts), "--batch_size", "2", "--max_new_tokens", "40", "--temperature", "1.3"]
    flags += ["--attempts", "2"]
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"

    def files(path):
        return ["--output", str(path), "--preferences", str(path.with_suffix(".dpo.jsonl"))]

    assert main(["generate-pairs", *flags, *files(whole)]) == 0
    process = subprocess.Popen([*COMMAND, *flags, *files(killed)], env=ONE_THREAD, stderr=subprocess.PIPE)
    place, done = killed.with_suffix(".account.json"), 0
    until = time.monotonic() + 60
    while done < 4 and time.monotonic() < until and process.poll() is None:
        done = json.loads(place.read_text())["account"]["done"] if place.exists() else 0
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert 4 <= json.loads(place.read_text())["account"]["done"] < 24
    with killed.open("ab") as file:  # what a kill in the middle of a line leaves
        file.write(b'{"prompt": [{"role": "us')
    assert main(["generate-pairs", *flags, *files(killed), "--processes", "2"]) == 0
    assert killed.read_bytes() == whole.read_bytes()
    assert killed.with_suffix(".dpo.jsonl").read_bytes() == whole.with_suffix(".dpo.jsonl").read_bytes()
    assert len({row["number"] for row in rows_of(whole)}) == len(rows_of(whole)) > 5
    first, second = (json.loads(path.with_suffix(".account.json").read_text())["account"] for path in (whole, killed))
    for account in (first, second):
        for name in ("seconds", "seconds_in_model", "share_in_model"):
            account.pop(name)
    assert first == second
    assert first["done"] == first["kept"] + sum(first["rejected"].values()) == 24

    # Finished: nothing is sampled again; other settings, prompts, or an edited file are refused.
    before = killed.read_bytes()
    assert main(["generate-pairs", *flags, *files(killed)]) == 0
    assert killed.read_bytes() == before
    capsys.readouterr()
    assert main(["generate-pairs", *flags, *files(killed), "--seed", "3"]) == 1
    assert "was begun with other settings: seed (0 there, 3 now)" in capsys.readouterr().err
    assert main(["generate-pairs", *flags, *files(killed), "--samples", "5"]) == 1
    assert "other settings: prompts (" in capsys.readouterr().err
    killed.write_bytes(before.replace(b"prompt", b"PROMPT", 1))
    assert main(["generate-pairs", *flags, *files(killed)]) == 1
    assert "is not as the run" in capsys.readouterr().err


def test_another_checkpoint_or_run_is_refused(loaded, taught, tmp_path, monkeypatch):
    Scripted(monkeypatch, loaded[1], {("A", mode): [thought("1"), plain("1")] for mode in Mode})
    path = tmp_path / "p.jsonl"
    generate_pairs(*loaded, [asked("A", "1")], path, checkpoint=str(taught), progress=False)
    with pytest.raises(ValueError, match="other settings: checkpoint"):
        generate_pairs(*loaded, [asked("A", "1")], path, progress=False)
    rows = module.AppendedRows([tmp_path / "q.jsonl"], {})
    with pytest.raises(ValueError, match="another run is writing it"):
        module.AppendedRows([tmp_path / "q.jsonl"], {})
    rows.close()
    (tmp_path / "p.account.json").unlink()
    with pytest.raises(ValueError, match=r"p\.jsonl is there, without the p\.account\.json"):
        generate_pairs(*loaded, [asked("A", "1")], path, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "tasks", "--output", "OUT"], "there is no such checkpoint folder"),
        (["TAUGHT", "missing.jsonl", "--output", "OUT"], "missing.jsonl: there is no such file"),
        (["TAUGHT", "EMPTY", "--output", "OUT"], "there is no prompt in it"),
        (["TAUGHT", "tasks", "--output", "OUT", "--temperature", "0"], "all of them are the same reply"),
        (["TAUGHT", "tasks", "--output", "OUT", "--top_p", "2"], "top_p: found 2.0"),
        (["TAUGHT", "tasks", "--output", "OUT", "--keep", "best"], "keep: 'best' is unknown; choose one of first"),
        (["TAUGHT", "tasks", "--output", "OUT", "--construct"], "construct: only with --preferences"),
        (["TAUGHT", "tasks", "--output", "OUT", "--grader", "exact"], "only with a file of prompts"),
        (["TAUGHT", "tasks", "--output", "OUT", "--preferences", "OUT"], "is the output too"),
        (["tiny-base", "tasks", "--output", "OUT"], "no chat template"),
    ],
)
def test_bad_input_is_one_line(taught, tmp_path, capsys, write, arguments, message):
    places = {"TAUGHT": str(taught), "OUT": str(tmp_path / "o.jsonl"), "EMPTY": str(write("\n", "empty.jsonl"))}
    assert main(["generate-pairs", *(places.get(each, each) for each in arguments)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "o.jsonl").exists()
