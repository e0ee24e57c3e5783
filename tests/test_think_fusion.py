# SPDX-License-Identifier: Apache-2.0
"""The whole recipe: which stages run, from what, when again, and what is told when one cannot."""

import argparse
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.test_recipes import ONE_THREAD
from thinkfusion import ThinkFusionConfig, ThinkFusionGRPOConfig
from thinkfusion.evaluate_verb import evaluate_flags
from thinkfusion.flags import fuse_flags

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "recipes"))
import stage_table  # noqa: E402
import think_fusion  # noqa: E402
from think_fusion import STAGES, Stage, StageError, files_of, read_plan  # noqa: E402

MODES = ("thinking", "non_thinking")
ROWS = {"thinking": 24, "non_thinking": 24, "overlap": 24, "rl": 16, "evaluation": 16}


def cell(value):
    return {"samples": 8, "accuracy": value, "format_error": 0.0}


def measured(error=0.25):
    return {
        "samples": 16,
        "format_error": error,
        "classes": {"ok": 12, "never_closed": 4, "truncated": 0},
        "truncated": 0.0,
        "leakage": 0.0,
        "reasoning_tokens": 3.0,
        "answer_tokens": 2.0,
        "tasks": {"dial": cell(0.5), "maximum": cell(1.0), "reversal": cell(0.0)},
    }


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Make the plan of some flags, on top of a small configuration."""

    def make(*flags, **settings):
        given = {"model": "tiny-base", "output_dir": str(tmp_path / "out"), "seeds": [0], "data": "tasks"}
        given |= {"rows": ROWS, "held_out": ["dial_ko"], "common_sft": {"max_steps": 2}, **settings}
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(given))
        monkeypatch.setattr(sys, "argv", ["think_fusion.py", "--config", str(config), *flags])
        return read_plan()

    return make


@pytest.fixture
def calls(monkeypatch):
    """Commands are noted, not run: each leaves the files that its stage would leave."""
    made = []

    def call(stage, command):
        made.append((stage.name, command))
        stage.folder.mkdir(parents=True, exist_ok=True)
        if "evaluate" in command:
            report = {"modes": {mode: measured() for mode in MODES}}
            (stage.folder / "mode_report.json").write_text(json.dumps(report))
        else:
            (stage.folder / "config.json").write_text("{}")
            (stage.folder / "fusion.json").write_text('{"ratio": 0.8}')

    monkeypatch.setattr(Stage, "call", call)
    return made


def run(plan):
    """The stages that ran, and what was said."""
    files, said = files_of(plan, 0), []
    for name in plan.chosen:
        Stage(plan, name, 0, files).run(said.append)
    return said


def models(calls, stage):
    """What the command of a stage starts from."""
    command = next(command for name, command in calls if name == stage and "evaluate" not in command)
    if stage == "merge":
        return [Path(each).name for each in command[4:6]]
    return Path(yaml.safe_load(Path(command[-1]).read_text())["model"]).name


def test_stages_follow_each_other_and_run_once(plan, calls):
    said = run(plan())
    assert [name for name, _ in calls] == [name for stage in STAGES for name in (stage, stage)]
    assert models(calls, "sft_thinking") == models(calls, "sft_non_thinking") == "tiny-base"
    assert models(calls, "merge") == ["sft_thinking", "sft_non_thinking"]
    assert (models(calls, "sft_overlap"), models(calls, "rl")) == ("merge", "sft_overlap")
    assert said[0].startswith("seed 0: sft_thinking took")
    calls.clear()
    assert all("is there" in line for line in run(plan()))
    assert calls == []


def test_what_changed_runs_again_with_all_that_follows(plan, calls):
    run(plan())
    calls.clear()
    said = run(plan(common_sft={"max_steps": 2}, merge={"ratio": 0.7}))
    assert {name for name, _ in calls} == {"merge", "sft_overlap", "rl"}
    assert "seed 0: merge runs again, since its inputs changed: settings" in said
    assert "seed 0: rl runs again, since its inputs changed: model" in said
    calls.clear()
    run(plan(merge={"ratio": 0.7}, rows={**ROWS, "rl": 32}))
    assert {name for name, _ in calls} == {"rl"}
    calls.clear()
    run(plan(merge={"ratio": 0.7}, rows={**ROWS, "rl": 32, "evaluation": 8}))
    assert {name for name, _ in calls} == set(STAGES)


def test_an_sft_that_was_stopped_goes_on_and_others_begin_anew(plan, calls, monkeypatch):
    given = plan()
    files = files_of(given, 0)
    whole = Stage.call

    def stopped(stage, command):
        whole(stage, command)
        (stage.folder / "checkpoint-2").mkdir()
        raise StageError("stopped")

    for name in ("sft_thinking", "rl"):
        stage = Stage(plan("--skip", "merge", "sft_overlap"), name, 0, files)
        monkeypatch.setattr(Stage, "call", stopped)
        with pytest.raises(StageError):
            stage.run(print)
        seen = []
        monkeypatch.setattr(
            Stage,
            "call",
            lambda stage, command, seen=seen: (
                seen.append((stage.folder / "checkpoint-2").exists()),
                whole(stage, command),
            ),
        )
        stage.run(print)
        assert seen[0] is (name == "sft_thinking")
        assert not (stage.folder / "checkpoint-2").exists()


def test_a_skipped_stage_is_left_out_of_the_chain(plan, calls):
    run(plan("--skip", "sft_thinking", "sft_non_thinking", "merge"))
    assert [name for name, _ in calls][::2] == ["sft_overlap", "rl"]
    assert (models(calls, "sft_overlap"), models(calls, "rl")) == ("tiny-base", "sft_overlap")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--stages", "merge"],
            "merge: its input is missing, the checkpoint of sft_thinking in .* Run sft_thinking first",
        ),
        (["--stages", "rl"], "rl: its input is missing, the checkpoint of sft_overlap in "),
        (["--skip", "sft_non_thinking"], "merge: its input is missing, the checkpoint of sft_non_thinking"),
    ],
)
def test_a_missing_input_is_named(plan, calls, flags, message):
    with pytest.raises(StageError, match=message):
        run(plan(*flags))


def test_a_stage_whose_weights_are_gone_is_no_input(plan, calls):
    run(plan())
    (Path(plan().output) / "seed_0" / "sft_overlap" / "config.json").unlink()
    calls.clear()
    with pytest.raises(StageError, match="rl: its input is missing, the checkpoint of sft_overlap"):
        run(plan(rl={"max_steps": 3}))
    assert calls == []


def test_a_stage_that_fails_says_where_to_look(plan):
    given = plan()
    stage = Stage(given, "rl", 0, files_of(given, 0))
    command = [sys.executable, "-c", "import sys; print('first'); sys.exit('ValueError: no good reward')"]
    with pytest.raises(StageError, match=r"rl, seed 0: failed with status 1: ValueError: no good reward\n.*rl\.log"):
        stage.call(command)
    assert "first" in (stage.place / "rl.log").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sft_both": {}}, "config: .* has sft_both, expected some of"),
        ({"model": None}, "config: .* lacks model; add it, or give it as a flag"),
        ({"held_out": ["dial"]}, "held_out: dial is unknown; choose some of running_sum_en,"),
        ({"data": {"thinking": "nowhere.jsonl"}}, "data: no file for thinking, non_thinking, overlap, rl, evaluation"),
    ],
)
def test_wrong_configurations(plan, settings, message):
    with pytest.raises(StageError, match=message):
        files_of(plan(**settings), 0)


@pytest.mark.parametrize("name", ["tiny", "qwen3_30b_a3b"])
def test_every_setting_of_a_configuration_is_a_flag_of_its_command(name, tmp_path, monkeypatch):
    config = ROOT / "recipes" / "configs" / f"think_fusion_{name}.yaml"
    data = yaml.safe_load(config.read_text())["data"]
    monkeypatch.chdir(tmp_path)
    for path in [] if data == "tasks" else data.values():
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text("{}")
    monkeypatch.setattr(sys, "argv", ["think_fusion.py", "--config", str(config)])
    given = read_plan()
    known = {
        "sft_overlap": {*ThinkFusionConfig.__dataclass_fields__, *flags_of(ROOT / "recipes" / "sft.py")},
        "rl": {*ThinkFusionGRPOConfig.__dataclass_fields__, *flags_of(ROOT / "recipes" / "rl.py")},
    }
    for stage, names in known.items():
        assert set(given.settings[stage]) <= names
    parser = argparse.ArgumentParser()
    fuse_flags(parser)
    parser.parse_args(["one", "two", "--output", "out", *think_fusion.as_flags(given.settings["merge"])])
    parser = argparse.ArgumentParser()
    evaluate_flags(parser)
    _, rest = parser.parse_known_args(["one", *think_fusion.as_flags(given.settings["evaluation"])])
    assert set(rest[::2]) <= {"--max_new_tokens", "--temperature"}
    if given.accelerate_config:
        assert (ROOT / given.accelerate_config).is_file()
    replies = given.settings["rl"]["per_device_train_batch_size"] * given.settings["rl"].get(
        "gradient_accumulation_steps", 1
    )
    assert replies % (2 * given.settings["rl"]["num_generations"]) == 0


def flags_of(script):
    return runpy.run_path(str(script))["RecipeArguments"].__dataclass_fields__


def test_embedded_rows_share_no_question_and_hold_a_task_out(plan):
    files = files_of(plan(), 0)
    rows = {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in files.items()}
    assert {name: len(each) for name, each in rows.items()} == ROWS
    asked = [row.get("question") or row["prompt"] for name in rows for row in rows[name]]
    assert len(asked) == len(set(asked))
    assert all(row["reasoning"] for name in ("thinking", "overlap") for row in rows[name])
    assert not any(row["reasoning"] for row in rows["non_thinking"])
    assert sum(row["task"] == "dial_ko" for row in rows["rl"]) == 8
    assert sum(row["task"] == "dial_ko" for row in rows["evaluation"]) == 2
    answered = [row["question"] for name in ("thinking", "non_thinking", "overlap") for row in rows[name]]
    assert not any("다이얼" in question for question in answered)
    assert any("dial" in question for question in answered)


def test_the_table_tells_the_held_out_task_apart():
    figures = stage_table.figures(measured(), ["dial"])
    assert (figures["accuracy"], figures["held_out_accuracy"], figures["tokens"]) == (0.5, 0.5, 5.0)
    assert stage_table.figures(measured(), [])["held_out_accuracy"] is None
    assert (
        stage_table.figures({**measured(), "tasks": {"dial": cell(0.75), "maximum": cell(1.0)}}, ["dial"])["accuracy"]
        == 1
    )
    rows = [
        {"stage": "rl", "seed": seed, "modes": {mode: stage_table.figures(measured(error), ["dial"]) for mode in MODES}}
        for seed, error in enumerate((0.0, 0.5))
    ]
    shown = stage_table.table(rows, STAGES)
    assert "| rl | thinking | 25.0 % [13.3, 42.1] (0.0-50.0) |" in shown
    assert shown.count("never_closed 8") == 2


def test_the_names_that_scripts_call(plan, calls, monkeypatch, capsys):
    made = plan("--push_to", "owner/name", seeds=[0, 1], seeds_at_once=2)
    monkeypatch.setattr(think_fusion, "read_plan", lambda: made)
    think_fusion.main()
    output = plan().output
    found = json.loads((output / "think_fusion.json").read_text())
    assert [(row["stage"], row["seed"]) for row in found] == [(stage, seed) for seed in (0, 1) for stage in STAGES]
    for row in found:
        assert set(row["modes"]) == set(MODES)
        for figures in row["modes"].values():
            assert {"format_error", "leakage", "accuracy", "tokens", "held_out_accuracy"} <= set(figures)
    assert (output / "think_fusion.md").read_text().strip() in capsys.readouterr().out
    assert (output / "think_fusion.png").read_bytes().startswith(b"\x89PNG")
    assert calls[-1][1][3:] == ["push", str(output / "seed_0" / "rl"), "owner/name"]


def test_paired_sft_and_rl_for_real(tmp_path):
    config = yaml.safe_load((ROOT / "recipes" / "configs" / "think_fusion_tiny.yaml").read_text())
    config |= {"rows": ROWS, "seeds": [0], "seeds_at_once": 1, "output_dir": str(tmp_path / "out")}
    config["common_sft"] |= {"max_steps": 2}
    config["rl"] |= {
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "num_generations": 2,
        "max_completion_length": 8,
        "logging_steps": 1,
    }
    config["evaluation"] = {"samples": 16, "max_new_tokens": 8}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, str(ROOT / "recipes" / "think_fusion.py"), "--config", str(tmp_path / "config.yaml")]
    command += ["--skip", "sft_thinking", "sft_non_thinking", "merge"]
    done = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out" / "think_fusion.json").read_text())
    assert [row["stage"] for row in found] == ["sft_overlap", "rl"]
    assert all(row["modes"]["thinking"]["tokens"] > 0 for row in found)
    assert (tmp_path / "out" / "seed_0" / "rl" / "model.safetensors").is_file()
    assert "reward_thinking" in (tmp_path / "out" / "seed_0" / "rl.log").read_text()
    again = subprocess.run(
        [*command, "sft_overlap", "--output_dir", str(tmp_path / "base")],
        capture_output=True,
        text=True,
        env=ONE_THREAD,
        timeout=200,
        check=False,
    )
    assert again.returncode == 1
    assert re.search(
        r"rl, seed 0: failed with status 1: ValueError: .*RL starts from a checkpoint .* both modes", again.stderr
    )
