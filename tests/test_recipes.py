# SPDX-License-Identifier: Apache-2.0
"""The recipes and the command, run as users run them: in processes of their own."""

import importlib.util
import json
import math
import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from datasets import Dataset

from thinkfusion import (
    Conversation,
    ThinkFusionConfig,
    export_checkpoint,
    generate_samples,
    install_chat_template,
    load_checkpoint,
    plan_upload,
)
from thinkfusion.cli import main
from thinkfusion.digests import weights_digest
from thinkfusion.launching import launched_alone, requested_processes

from .forked import run_forked
from .two_processes import free_port

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def launch(*flags: str, processes: int = 1) -> subprocess.CompletedProcess:
    """What `accelerate launch recipes/sft.py` does."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *options(processes), *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ONE_THREAD, timeout=300, check=False)


def launch_forked(*flags: str) -> subprocess.CompletedProcess:
    """The same with one process: with the command and the environment that the launcher makes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", dict(ONE_THREAD))
        arguments = _validate_launch_command(launch_command_parser().parse_args([*options(1), *flags]))[0]
        (_, program, *given), environment = prepare_simple_launcher_cmd_env(arguments)
    return run_forked(Path(program), *given, environment=environment)


def options(processes: int) -> list[str]:
    return [
        *("--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"),
        *("--dynamo_backend", "no", "--main_process_port", str(free_port()), str(ROOT / "recipes" / "sft.py")),
    ]


def history(folder: Path) -> list[dict]:
    state = next(folder.glob("checkpoint-*/trainer_state.json"))
    return json.loads(state.read_text())["log_history"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, str]:
    """A checkpoint that the recipe's default made in a few steps, and what was printed."""
    folder = tmp_path_factory.mktemp("trained")
    flags = ["--max_steps", "4", "--train_samples", "64", "--logging_steps", "1", "--save_strategy", "steps"]
    flags += ["--save_steps", "4", "--evaluation_samples", "8", "--evaluation_max_new_tokens", "8"]
    flags += ["--per_device_train_batch_size", "16", "--warmup_steps", "0", "--evaluation_obedience", "1"]
    flags += ["--evaluation_flip", "2", "--evaluation_budgets", "4"]
    done = launch("--output_dir", str(folder), "--evaluation_steps", "2", *flags)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_default_recipe_trains_exports_and_measures(trained):
    folder, printed = trained
    assert "rows: 64 read = 64 kept + 0 skipped" in printed
    assert re.search(r"8 prompts per mode +thinking +non-thinking", printed)
    report = json.loads((folder / "mode_report.json").read_text())
    assert report["samples"] == 8
    assert report["verdict"]["headline"] in printed
    assert f"The report is a page: {folder / 'report.html'}" in printed
    assert report["verdict"]["headline"] in (folder / "report.html").read_text(encoding="utf-8")
    assert {"obedience", "flip", "budgets", "probe"} <= set(report)  # as the default's file says
    assert set(report["modes"]) == {"thinking", "non_thinking"}
    assert report["weights"] == weights_digest(folder)
    recipe = json.loads((folder / "recipe.json").read_text())
    assert (recipe["base_model"], recipe["method"], recipe["steps"]) == ("tiny-base", "full fine-tuning", 4)
    assert "Trained by full fine-tuning, 4 steps." in plan_upload(folder, "owner/name").card
    model, tokenizer = load_checkpoint(folder)
    assert model.config.vocab_size == 1088
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False).startswith("<|im_start|>")
    logs = history(folder)
    assert [record["step"] for record in logs if "eval_truncated_thinking" in record] == [2, 4]
    losses = [record["loss"] for record in logs if "loss" in record]
    assert len(losses) == 4
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("settings", "samples"),
    [([], "40"), (["--tokens_per_row", "200", "--normalise_by_mode", "true"], "41")],
    ids=["conversations", "packed rows"],
)
def test_two_processes_give_the_losses_of_one_with_twice_the_batch(tmp_path, settings, samples):
    flags = ["--max_steps", "5", "--train_samples", samples, "--logging_steps", "1", "--evaluation_samples", "0"]
    flags += ["--save_strategy", "steps", "--save_steps", "5", *settings]
    one = launch_forked("--output_dir", str(tmp_path / "one"), "--per_device_train_batch_size", "8", *flags)
    two = launch("--output_dir", str(tmp_path / "two"), "--per_device_train_batch_size", "4", *flags, processes=2)
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    assert "starting the 2 that were asked for" in two.stderr
    assert two.stdout.count(f"rows: {samples} read") == 1
    assert two.stderr.count("sequences of") == 1
    for name in ("loss", "loss_thinking", "loss_non_thinking", "tokens_thinking", "tokens_non_thinking"):
        first, second = (
            torch.tensor(
                [float(record[name]) for record in history(tmp_path / run) if name in record], dtype=torch.double
            )
            for run in ("one", "two")
        )
        assert len(first) == 5
        torch.testing.assert_close(first, second, rtol=0, atol=1e-4)


@pytest.mark.parametrize("four_bit", ["false", "true"])
def test_lora_by_flag_and_columns_by_name(tmp_path, four_bit):
    if four_bit == "true":
        pytest.importorskip("bitsandbytes")
    path = tmp_path / "rows.jsonl"
    rows = [
        {"q": each.question, "a": f"{each.reasoning} #### <<x>>{each.answer}"} for each in generate_samples(8, seed=0)
    ]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    flags = ["--dataset", str(path), "--question_column", "q", "--answer_column", "a", "--answer_separator", "####"]
    flags += [
        "--remove_pattern",
        "<<[^>]*>>",
        "--lora",
        "true",
        "--load_in_4bit",
        four_bit,
        "--max_steps",
        "1",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    done = launch_forked(*flags)
    assert done.returncode == 0, done.stderr
    assert "rows: 8 read = 8 kept + 0 skipped" in done.stdout
    assert "thinkfusion evaluate" in done.stdout  # there are no prompts to measure on
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    load_checkpoint(tmp_path / "out")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the launcher's end is not told")
def test_a_stopped_launcher_leaves_a_checkpoint_that_is_gone_on_from(tmp_path):
    """accelerate forwards no signal: its end is one to the training."""
    flags = ["--output_dir", str(tmp_path), "--train_samples", "64", "--logging_steps", "1"]
    flags += ["--per_device_train_batch_size", "2", "--evaluation_samples", "0"]
    options = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, str(ROOT / "recipes" / "sft.py"), *flags]
    with open(tmp_path / "log", "w+") as log:
        launcher = subprocess.Popen([*command, "--max_steps", "4000"], stdout=log, stderr=log, cwd=ROOT, env=ONE_THREAD)
        (training,) = wait_until(lambda: psutil.Process(launcher.pid).children())
        wait_until(lambda: "'loss'" in (tmp_path / "log").read_text())
        launcher.terminate()
        launcher.wait(60)
        psutil.wait_procs([training], timeout=60)
    assert not training.is_running()
    (saved,) = tmp_path.glob("checkpoint-*")
    assert f"Stopped by SIGTERM. {saved} is whole" in (tmp_path / "log").read_text()
    steps = int(saved.name.removeprefix("checkpoint-")) + 1
    done = launch_forked(*flags, "--max_steps", str(steps), "--resume", "true")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model.safetensors").is_file()
    again = launch_forked(*flags, "--max_steps", "1")
    assert again.returncode == 1
    assert f"output_dir: found {saved}, of an earlier run" in again.stderr


def wait_until(found, seconds=120):
    """What a function returns as soon as that is something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.1)
    raise AssertionError("waited in vain")


def test_what_accelerate_was_asked_for_is_found_out():
    alone = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}
    assert launched_alone(alone)
    assert not launched_alone({**alone, "WORLD_SIZE": "2"})
    assert not launched_alone({"ACCELERATE_MIXED_PRECISION": "no"})
    assert not launched_alone({"MASTER_ADDR": "127.0.0.1"})
    assert requested_processes(["accelerate", "launch", "--num_processes", "3", "x.py"]) == 3
    assert requested_processes(["accelerate", "launch", "--num-processes=4", "x.py"]) == 4
    assert requested_processes(["accelerate", "launch", "--num_processes"]) is None
    assert requested_processes(["accelerate", "launch", "x.py"]) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--datasett", "x"], "--datasett"),
        (["--dataset", "missing.jsonl"], "missing.jsonl: there is no such file"),
        (["--mixture", "both"], "mixture: 'both' is unknown"),
        (["--on_overlap", "ignore"], "on_overlap: 'ignore' is unknown; choose one of warn, error, drop"),
        (["--dataset_weights", "1", "2"], "dataset_weights: found 2 for 1 data sets"),
        (["--scheme", "suffix"], "unknown scheme 'suffix'"),
        (["--model", "./nowhere"], "./nowhere: there is no such checkpoint folder"),
        (["--dataset", "pyproject.toml"], "files ending in '.toml' are not read"),
        (["--dataset", "nobody/nothing"], "neither a file nor a data set that could be loaded"),
        (["--load_in_4bit", "true"], "load_in_4bit: found lora false; weights in 4 bits cannot train"),
    ],
)
def test_bad_settings_end_in_one_clear_line(tmp_path, capsys, monkeypatch, flags, message):
    assert message in run_recipe(monkeypatch, capsys, "--output_dir", str(tmp_path), *flags)


def test_unknown_keys_of_a_config_are_errors(tmp_path, capsys, monkeypatch):
    path = tmp_path / "bad.yaml"
    path.write_text("output_dir: x\nlerning_rate: 1\n")
    assert "lerning_rate" in run_recipe(monkeypatch, capsys, "--config", str(path))


def run_recipe(monkeypatch, capsys, *flags: str) -> str:
    """Run the recipe in this process and return the message it ends with."""
    monkeypatch.setattr(sys, "argv", ["sft.py", *flags])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "recipes" / "sft.py"), run_name="__main__")
    assert caught.value.code not in (0, None)
    message = f"{caught.value.code} {capsys.readouterr().err}"
    assert "Traceback" not in message
    return message


SFT_CONFIGS = [
    path for path in sorted((ROOT / "recipes" / "configs").glob("*.yaml")) if "think_fusion" not in path.stem
]


@pytest.mark.parametrize("path", SFT_CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_understood(path, monkeypatch):
    spec = importlib.util.spec_from_file_location("sft", ROOT / "recipes" / "sft.py")
    sft = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "sft", sft)
    spec.loader.exec_module(sft)
    # A GPU's settings are parsed on any machine.
    monkeypatch.setattr(sys, "argv", ["sft.py", "--config", str(path), "--bf16", "false", "--use_cpu", "true"])
    recipe, training = sft.parse_arguments()
    assert isinstance(training, ThinkFusionConfig)
    commands = re.findall(r"accelerate launch (.*)", path.read_text())
    for command in commands:
        assert launch_command_parser().parse_args(command.split()).training_script == "recipes/sft.py"
    assert path.stem == "tiny" or len(commands) == 1
    for name, value in yaml.safe_load(path.read_text()).items():
        found = getattr(recipe, name) if hasattr(recipe, name) else getattr(training, name)
        if name == "report_to":
            assert found == []
        elif name != "bf16":
            assert found == value or str(found) == str(value), name


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
def test_gsm8k_is_read_and_rendered_whole():
    from thinkfusion import RecordOptions, prepare, read_conversations

    options = RecordOptions(answer_separator="####", remove_pattern="<<[^>]*>>")
    conversations, report = read_conversations(SHARED / "gsm8k_train.jsonl", options)
    assert (report.read, report.kept) == (7473, 7473)
    assert not any("<<" in each.exchanges[0].steps[0].reasoning for each in conversations)
    model_free = load_checkpoint("tiny-base")[1]
    install_chat_template(model_free)
    data, report = prepare(conversations[:500], model_free)
    assert isinstance(data, Dataset)
    assert len(data) == 1000


def test_evaluate_writes_the_report(trained, tmp_path, capsys):
    flags = ["--samples", "8", "--output", str(tmp_path), "--max_new_tokens", "4"]
    assert main(["evaluate", str(trained[0]), *flags]) == 0
    assert "8 prompts per mode" in capsys.readouterr().out
    assert json.loads((tmp_path / "mode_report.json").read_text())["samples"] == 8


def test_evaluate_on_prompts_of_ones_own(trained, tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "2 + 2?", "answer": "so #### 4"}\n{"question": "3 + 3?", "answer": "#### 6"}\n')
    flags = ["--prompts", str(path), "--answer_separator", "####", "--output", str(tmp_path), "--max_new_tokens", "4"]
    assert main(["evaluate", str(trained[0]), *flags]) == 0
    report = json.loads((tmp_path / "mode_report.json").read_text())
    assert report["samples"] == 2
    assert list(report["modes"]["thinking"]["tasks"]) == ["own"]


def test_evaluate_measures_what_is_asked_for_and_compares(trained, tmp_path, capsys):
    base = ["evaluate", str(trained[0]), "--samples", "4", "--max_new_tokens", "4"]
    more = ["--obedience", "1", "--flip", "2", "--budgets", "2,3", "--probe", "2", "--routes", "--transcripts", "1"]
    assert main([*base, *more, "--output", str(tmp_path / "a")]) == 0
    report = json.loads((tmp_path / "a" / "mode_report.json").read_text())
    assert len(report["obedience"]["cells"]) == 54
    assert [point["budget"] for point in report["budgets"]] == [2, 3]
    assert (report["flip"]["conversations"], report["probe"]["samples"]) == (2, 2)
    page = (tmp_path / "a" / "report.html").read_text(encoding="utf-8")
    assert 'class="routes"' in page
    assert str(tmp_path / "a" / "report.html") in capsys.readouterr().out
    # A checkpoint against its own report, and against itself: no pair differs.
    for other in (tmp_path / "a" / "mode_report.json", trained[0]):
        assert main([*base, "--against", str(other), "--output", str(tmp_path / "b")]) == 0
        table = json.loads((tmp_path / "b" / "mode_report.json").read_text())["comparison"]["modes"]["thinking"]
        assert (table["accuracy"]["pairs"], table["accuracy"]["difference"], table["accuracy"]["p"]) == (4, 0, 1)
    assert "p 1 (0 only here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompts", "{folder}/empty.jsonl"], "empty.jsonl: there is no prompt in it"),
        (["--prompts", "{folder}/mine.jsonl", "--grader", "best"], "grader: found 'best', expected one of auto, exact"),
        (["--prompts", "{folder}/bad.jsonl"], "bad.jsonl, row 1: grader: found 'best', expected one of auto, exact"),
        (["--grader", "exact"], "grader: only with --prompts"),
        (["--budgets", "8,x"], "budgets: found '8,x', expected numbers of tokens"),
        (["--against", "{folder}"], "there is no such checkpoint"),
        (["--against", "{folder}/none.json"], "none.json: there is no such file"),
    ],
)
def test_evaluate_refuses_before_anything_is_written(trained, tmp_path, capsys, flags, message):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "mine.jsonl").write_text('{"prompt": "2 + 2?", "answer": 4}\n')
    (tmp_path / "bad.jsonl").write_text('{"prompt": "2 + 2?", "answer": 4, "grader": "best"}\n')
    filled = [flag.format(folder=tmp_path) for flag in flags]
    assert main(["evaluate", str(trained[0]), "--samples", "2", "--output", str(tmp_path / "out"), *filled]) == 1
    told = capsys.readouterr().err.strip().splitlines()
    assert message in told[-1] or message == "there is no such checkpoint"
    assert told[-1].startswith("thinkfusion evaluate: ")
    assert not (tmp_path / "out").exists()


def test_chat_once_and_as_a_conversation(trained, capsys, monkeypatch):
    folder = str(trained[0])
    assert main(["chat", folder, "--mode", "non_thinking", "--max_new_tokens", "5", "What is 2 + 2?"]) == 0
    alone = capsys.readouterr().out
    assert alone.strip()
    assert "[thinking]" not in alone
    assert main(["chat", folder, "--mode", "both", "--max_new_tokens", "5", "What is 2 + 2?"]) == 0
    first, second = capsys.readouterr().out.split("non_thinking:\n")
    assert first.startswith("thinking:\n[thinking]")
    assert second.strip()
    assert "[thinking]" not in second
    asked = iter(["What is 2 + 2?", "/no_think", "What is 2 + 2?", "And? /think", "/new", ""])

    def answer(_):
        try:
            return next(asked)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)
    assert main(["chat", folder, "--max_new_tokens", "5"]) == 0
    out = capsys.readouterr().out
    assert out.count("[thinking]") == 2
    assert "[non-thinking from here on]" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "nowhere"], "nowhere: there is no such checkpoint folder"),
        (["evaluate", "{empty}"], "config.json and weights missing. The folder holds notes.txt"),
        (["evaluate", "{empty}/notes.txt"], "this is a file"),
        (["evaluate", "{trained}", "--prompts", "none.jsonl"], "none.jsonl: there is no such file"),
        (["chat", "{trained}", "--mode", "maybe", "Hi"], "unknown mode 'maybe'"),
        (["chat", "{trained}", "--mode", "both"], "found both, which is for one prompt"),
        (["chat", "tiny-base", "Hi"], "no chat template"),
    ],
)
def test_errors_are_one_line(trained, tmp_path, capsys, arguments, message):
    (tmp_path / "notes.txt").write_text("")
    filled = [each.format(empty=tmp_path, trained=trained[0]) for each in arguments]
    assert main(filled) == 1
    assert re.search(re.escape(message), capsys.readouterr().err)


def test_conversations_read_as_the_quick_start_shows():
    conversation = Conversation.from_messages(
        [
            {"role": "user", "content": "What is 2 + 2?"},
            {"role": "assistant", "content": "4", "reasoning_content": "Two and two."},
        ]
    )
    assert conversation.to_messages()[1]["reasoning_content"] == "Two and two."


def test_the_example_switches_turn_by_turn(trained, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["switch_modes.py", str(trained[0])])
    runpy.run_path(str(ROOT / "examples" / "switch_modes.py"))
    out = capsys.readouterr().out
    assert re.findall(r"\[(thinking|non_thinking)\]\n", out) == ["thinking", "non_thinking", "non_thinking", "thinking"]
    assert "reasoning: " in out.split("The same, streamed:")[1]


def test_the_ablation_trains_and_measures_its_rows(tmp_path):
    """TRL's own trainer, and the longest of the others; the next call reads what is there."""
    flags = ["--recipes", "trl", "merge_then_paired", "--tokens", "1600", "--samples", "8", "--seeds", "1"]
    flags += ["--sweep", "0.5:1:0.5"]
    command = [sys.executable, str(ROOT / "recipes" / "ablation.py"), "--output", str(tmp_path), *flags]

    def run(*more):
        return subprocess.run(
            [*command, *more], capture_output=True, text=True, env=ONE_THREAD, timeout=300, check=False
        )

    done = run("--processes", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "ablation.json").read_text())
    rows = {(row["recipe"], row["scheme"], row["seed"]): row for row in results}
    assert set(rows) == {
        ("trl", "empty-block", 0),
        *(("merge_then_paired", name, 0) for name in ("control", "empty-block")),
    }
    for row in results:
        assert 1400 <= row["trained_tokens"] <= 1800
        assert (row["ratio"] is None) == (row["recipe"] == "trl")
        for mode in ("thinking", "non_thinking"):
            assert {"format_error", "accuracy_seen", "accuracy_unseen", "tokens"} <= set(row["modes"][mode])
            assert row["modes"][mode]["tokens"] > 0
    table = (tmp_path / "ablation.md").read_text()
    assert table.count("\n| merge then paired at 0") + table.count("\n| merge then paired at 1") == 2
    assert table.strip() in done.stdout
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")
    kept = (tmp_path / "ablation.json").read_text()
    again = run()
    assert "3 rows, 3 of them there already" in again.stdout
    assert (tmp_path / "ablation.json").read_text() == kept
    other = run("--tokens", "900")
    assert other.returncode == 1
    assert "holds results of" in other.stderr


def test_the_ablation_tells_tasks_of_a_mode_from_those_of_the_other():
    ablation = runpy.run_path(str(ROOT / "recipes" / "ablation.py"))
    rows = ablation["rows_of"](8, 0, domains="apart")
    assert [bool(row["reasoning"]) for row in rows] == [True, False] * 4
    shared = ablation["rows_of"](2000, 0)
    asked = [{row["question"] for row in shared if bool(row["reasoning"]) is reasoned} for reasoned in (True, False)]
    assert all(any("largest" in question for question in each) for each in asked)
    assert not asked[0] & asked[1]
    tasks = {"running_sum_en": (0.5, 10), "maximum_ko": (1.0, 30), "dial_en": (0.25, 20), "reversal_ko": (None, 20)}
    cells = {
        name: {"accuracy": value, "format_error": value, "samples": count} for name, (value, count) in tasks.items()
    }
    measured = {"tasks": cells, "reasoning_tokens": 3.0, "answer_tokens": 2.0}
    measured |= dict.fromkeys(("format_error", "truncated", "leakage"), 0.1)
    thinking, other = (ablation["figures"](measured, mode, "apart") for mode in ("thinking", "non_thinking"))
    assert (thinking["accuracy_seen"], thinking["accuracy_unseen"]) == (0.875, 0.25)
    assert (other["accuracy_seen"], other["accuracy_unseen"]) == (0.25, 0.875)
    assert thinking["tokens"] == 5.0
    # Where the domains overlap, dial and maximum are seen in both modes.
    thinking, other = (ablation["figures"](measured, mode, "overlapping") for mode in ("thinking", "non_thinking"))
    assert thinking["accuracy_seen"] == pytest.approx((0.5 * 10 + 1.0 * 30 + 0.25 * 20) / 60)
    assert thinking["format_error_unseen"] is None or math.isnan(thinking["format_error_unseen"])
    assert (other["accuracy_seen"], other["accuracy_unseen"]) == (0.7, 0.5)
    assert ablation["spread"]([0.0, 0.5], "accuracy") == "25.0 % (0.0-50.0)"


def test_two_checkpoints_are_fused_and_both_modes_trained_from_there(tmp_path):
    for name, seed in (("thinking", 1), ("non_thinking", 2)):
        model, tokenizer = load_checkpoint("tiny-base")
        install_chat_template(tokenizer, model)
        torch.manual_seed(seed)
        for weight in model.parameters():
            weight.data += 0.01 * torch.randn_like(weight)
        export_checkpoint(model, tokenizer, tmp_path / name)
    inputs = [str(tmp_path / name) for name in ("thinking", "non_thinking")]
    command = [sys.executable, str(ROOT / "recipes" / "fuse.py"), *inputs, "--output", str(tmp_path / "fused")]

    def run(*flags):
        return subprocess.run(
            [*command, *flags], capture_output=True, text=True, env=ONE_THREAD, timeout=300, check=False
        )

    training = ["--output_dir", str(tmp_path / "both"), "--max_steps", "1", "--train_samples", "16"]
    done = run("--ratio", "0.7", "--", *training, "--evaluation_samples", "0")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "tensors with 0.7 of the thinking model" in done.stdout
    assert (tmp_path / "both" / "model.safetensors").is_file()
    wrong = run("--ratio", "7", "--", *training)
    assert wrong.returncode == 1
    assert "ratio: found 7" in wrong.stderr
