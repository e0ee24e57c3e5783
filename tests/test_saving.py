# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that survive: whole or not there, no pickles, SIGTERM, a full disk, resumes that fit and are exact."""

import copy
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path, PosixPath

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from transformers import Qwen3MoeForCausalLM, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from tests.test_training import config, conversations, logged
from thinkfusion import Conversation, ThinkFusionTrainer, digests, install_chat_template, load_checkpoint, lora_config
from thinkfusion import saving as saving_module
from thinkfusion.saving import (
    MANIFEST,
    SavingError,
    digest,
    last_checkpoint,
    load_state,
    random_state,
    save_state,
    set_random_state,
    why_incomplete,
    write_manifest,
)

ROOT = Path(__file__).parent.parent
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl")


def checkpoint(folder: Path, step: int) -> Path:
    """A small whole checkpoint."""
    made = folder / f"checkpoint-{step}"
    (made / "inner").mkdir(parents=True)
    (made / "model.safetensors").write_bytes(random.Random(step).randbytes(5000))
    (made / "inner" / "state.json").write_text("{}")
    write_manifest(made, step, {})
    return made


def trainer_in(
    folder, tiny_models, *, rows=12, lora=False, evaluated=False, callbacks=(), **settings
) -> ThinkFusionTrainer:
    model, tokenizer = tiny_models(), load_checkpoint("tiny-base")[1]
    install_chat_template(tokenizer, model)
    adapter = lora_config(model, tokenizer, r=4) if lora else None
    given = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, **settings}
    data = conversations(rows) if isinstance(rows, int) else rows
    return ThinkFusionTrainer(
        model,
        config(folder, **given),
        train_dataset=data,
        eval_dataset=data if evaluated else None,
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=list(callbacks),
    )


class At(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


# Whole or not


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def zeroed(path):
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES = {
    "its manifest.json cannot be read": lambda folder: cut(folder / MANIFEST),
    "it has no manifest.json": lambda folder: (folder / MANIFEST).unlink(),
    "inner/state.json is missing": lambda folder: (folder / "inner" / "state.json").unlink(),
    "model.safetensors has 4,999 bytes of 5,000": lambda folder: cut(folder / "model.safetensors"),
    "model.safetensors is damaged": lambda folder: zeroed(folder / "model.safetensors"),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_a_checkpoint_that_is_not_whole_is_left_aside_with_a_warning(tmp_path, caplog, reason):
    older, newest = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    assert last_checkpoint(tmp_path) == str(newest)
    assert not caplog.records
    DAMAGES[reason](newest)
    assert last_checkpoint(tmp_path) == str(older)
    assert f"{newest} is left aside: {reason}" in caplog.text


def test_without_any_whole_checkpoint_there_is_none(tmp_path):
    assert last_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "unfinished-9" / "checkpoint-9").mkdir(parents=True)
    assert last_checkpoint(tmp_path) is None


def test_large_files_are_known_by_blocks_from_first_to_last(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_MIB", 16)
    path, content = tmp_path / "large", bytearray(random.Random(0).randbytes(16 * 64 * 3 + 5))
    path.write_bytes(content)
    whole = digest(path)
    for place in (0, 16 * 96, len(content) - 1):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        assert (digest(path) != whole) == (place != 16 * 96 or _sampled(place, len(content)))
    path.write_bytes(content[:1000])
    short = digest(path)
    path.write_bytes(content[:999] + b"\0")
    assert digest(path) != short


def _sampled(place, size):
    return any(0 <= place - (size - 16) * block // 63 < 16 for block in range(64))


def test_what_is_not_finished_is_no_checkpoint_to_transformers(tmp_path):
    whole = checkpoint(tmp_path, 3)
    shutil.copytree(whole, tmp_path / "unfinished-7" / "checkpoint-7")
    assert get_last_checkpoint(str(tmp_path)) == str(whole)
    rotate_checkpoints(str(tmp_path), save_total_limit=1)
    assert (tmp_path / "unfinished-7").is_dir()
    saving_module.remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_rotation_keeps_the_newest_and_those_named(tmp_path):
    made = [checkpoint(tmp_path, step) for step in (2, 9, 10, 11)]
    saving_module.rotate(tmp_path, None, {made[3]})
    assert len(list(tmp_path.iterdir())) == 4
    saving_module.rotate(tmp_path, 2, {made[3], made[0]})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-11", "checkpoint-2"]
    saving_module.rotate(tmp_path, 1, {made[3], made[0]})
    assert len(list(tmp_path.iterdir())) == 2


# States


def test_states_come_back_as_they_were_without_pickles(tmp_path):
    twice = torch.arange(6.0)
    state = {
        0: {"step": torch.tensor(3.0), "exp": torch.randn(2, 3).to(torch.bfloat16), "view": twice[2:4]},
        "groups": [{"betas": (0.9, 0.999), "lr": 0.1 + 0.2, "params": [0, 1]}, None, True],
        "inf": float("inf"),
        "twice": [twice, twice],
        "number": np.float64(1 / 3),
        (1, "a"): "text \u2603",
    }
    save_state(tmp_path / "state.safetensors", state)
    found = load_state(tmp_path / "state.safetensors")
    assert list(found) == list(state)
    assert found["groups"] == state["groups"]
    assert isinstance(found["groups"][0]["betas"], tuple)
    assert (found["inf"], found["number"], found[(1, "a")]) == (float("inf"), 1 / 3, "text \u2603")
    for name in ("step", "exp", "view"):
        assert torch.equal(found[0][name], state[0][name])
        assert found[0][name].dtype == state[0][name].dtype
    assert torch.equal(found["twice"][0], twice)
    with pytest.raises(TypeError, match=r"state\.safetensors: found a PosixPath, which cannot be saved without pickle"):
        save_state(tmp_path / "state.safetensors", {"a": [PosixPath()]})


def test_every_generator_goes_on_where_it_was(tmp_path):
    def draws():
        return random.gauss(0, 1), np.random.standard_normal(), torch.rand(3).tolist(), np.random.rand()

    draws()
    save_state(tmp_path / "random.safetensors", random_state(all_devices=True))
    expected = draws(), draws()
    set_random_state(load_state(tmp_path / "random.safetensors"))
    assert (draws(), draws()) == expected


# Saving and going on


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_is_the_one_never_stopped(tmp_path, tiny_models, lora):
    """Between two logs and amid an epoch; every figure of the log, and every weight, to the last bit."""
    settings = {
        "lora": lora,
        "max_steps": 7,
        "logging_steps": 3,
        "save_steps": 4,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "balance_loss_coef": 0.01,
        "lr_scheduler_type": "cosine",
    }
    whole = trainer_in(tmp_path, tiny_models, **settings)
    whole.train()
    folder = tmp_path / "checkpoint-4"
    assert [path.name for pattern in PICKLES for path in folder.rglob(pattern)] == []
    assert not list(tmp_path.glob("unfinished-*"))
    shutil.rmtree(tmp_path / "checkpoint-7")
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    again = trainer_in(tmp_path, tiny_models, **settings)
    again.train(resume_from_checkpoint=True)
    timing = ("runtime", "per_second", "train_loss", "total_flos")
    histories = [
        [
            {name: value for name, value in record.items() if not name.endswith(timing)}
            for record in trainer.state.log_history
        ]
        for trainer in (whole, again)
    ]
    assert [record["step"] for record in histories[0]] == [1, 3, 6, 7]  # the switch probe, after a tenth of the steps
    assert {"tokens_thinking", "loss_non_thinking", "num_tokens", "entropy", "balance_loss"} <= set(histories[0][1])
    assert histories[0] == histories[1]
    for (name, weight), other in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(weight, other), name
    arguments = json.loads((folder / "training_args.json").read_text())
    assert arguments["learning_rate"] == 1e-2


def test_a_run_at_its_end_makes_no_step_more(tmp_path, tiny_models):
    done = trainer_in(tmp_path, tiny_models, max_steps=4)
    done.train()
    again = trainer_in(tmp_path, tiny_models, max_steps=4)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    assert all(map(torch.equal, done.model.parameters(), again.model.parameters()))
    assert [path.name for path in sorted(tmp_path.glob("checkpoint-*"))] == ["checkpoint-2", "checkpoint-4"]


def test_secrets_are_not_written(tmp_path, tiny_models):
    trainer = trainer_in(tmp_path, tiny_models, max_steps=2, hub_token="hf_canary")
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 15
    assert [path for path in written if b"hf_canary" in path.read_bytes()] == []
    assert [path.name for pattern in PICKLES for path in tmp_path.rglob(pattern)] == []


def test_limits_and_the_best_checkpoint(tmp_path, tiny_models):
    """The best one stays, and is known by its own name; older ones go, a damaged one of the same step is replaced."""
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "unfinished-1").mkdir()
    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": False}
    trainer = trainer_in(
        tmp_path, tiny_models, evaluated=True, save_total_limit=2, metric_for_best_model="loss", **settings
    )
    losses = count(1.0)  # the first evaluation is the best
    trainer.evaluate = lambda *args, **kwargs: {"eval_loss": next(losses)}
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("*-[0-9]*")) == ["checkpoint-2", "checkpoint-6"]
    assert all(why_incomplete(tmp_path / f"checkpoint-{step}") is None for step in (2, 6))
    for step in (2, 6):
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")


def test_sigterm_saves_and_ends(tmp_path, tiny_models, caplog):
    before = signal.getsignal(signal.SIGTERM)

    def twice():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    # It comes after the optimizer's third step; the fourth is saved, whatever save_strategy says.
    settings = {"save_strategy": "no", "save_total_limit": 1, "max_steps": 9, "logging_steps": 2}
    stopped = trainer_in(tmp_path, tiny_models, callbacks=[At(3, twice)], **settings)
    with pytest.raises(SystemExit) as ended:
        stopped.train()
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in tmp_path.glob("*-[0-9]*")] == ["checkpoint-4"]
    assert f"Stopped by SIGTERM. {tmp_path / 'checkpoint-4'} is whole" in caplog.text
    resumed = trainer_in(tmp_path, tiny_models, **settings)
    resumed.train(resume_from_checkpoint=True)
    whole = trainer_in(tmp_path / "whole", tiny_models, **settings)
    whole.train()
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert all(map(torch.equal, resumed.model.parameters(), whole.model.parameters()))


# Errors


WRITES = {
    "the model": ("model.safetensors", SafetensorError("I/O error: No space left on device (os error 28)")),
    "the optimizer": ("optimizer.safetensors", OSError(errno.ENOSPC, "No space left on device")),
    "the random state": ("process_0.safetensors", OSError(errno.EDQUOT, "Disk quota exceeded")),
    "the state": ("trainer_state.json", OSError(errno.ENOSPC, "No space left on device")),
    "the manifest": (MANIFEST, OSError(errno.ENOSPC, "No space left on device")),
    "the card": ("README.md", OSError(errno.ENOSPC, "No space left on device")),
}


@pytest.mark.parametrize("what", WRITES)
def test_a_full_disk_gives_one_error_and_leaves_the_last_checkpoint_whole(tmp_path, tiny_models, monkeypatch, what):
    name, error = WRITES[what]
    trainer = trainer_in(tmp_path, tiny_models, save_total_limit=1)

    def fill():
        def failing(function):
            def write(first, *args, **kwargs):
                paths = [str(each) for each in (first, *args) if isinstance(each, (str, Path))]
                written = [path for path in paths if "unfinished-" in path or name == "README.md"]
                if name in map(os.path.basename, written):
                    raise error
                return function(first, *args, **kwargs)

            return write

        monkeypatch.setattr("thinkfusion.saving.save_file", failing(saving_module.save_file))
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", failing(save_file_of_transformers))
        monkeypatch.setattr("builtins.open", failing(open))
        monkeypatch.setattr(Path, "open", failing(Path.open))
        monkeypatch.setattr(Path, "write_text", failing(Path.write_text))

    from transformers.modeling_utils import safe_save_file as save_file_of_transformers

    trainer.add_callback(At(3, fill))
    with pytest.raises(SavingError) as found:
        trainer.train()
    place, last = tmp_path / "checkpoint-4", tmp_path / "checkpoint-2"
    assert str(found.value).startswith(f"{place}: the checkpoint could not be written, the disk is full (")
    assert str(found.value).endswith(f"Make room, and go on from {last}, which is whole.")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.glob("*-[0-9]*")] == ["checkpoint-2"]
    assert why_incomplete(last) is None


def test_a_disk_that_is_really_full(tmp_path, tiny_models):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        trainer = trainer_in(disk, tiny_models, save_total_limit=1)

        def fill():
            with open(disk / "ballast", "wb") as file:
                file.write(bytes(shutil.disk_usage(disk).free - 100_000))

        trainer.add_callback(At(3, fill))
        with pytest.raises(SavingError, match="checkpoint-4: the checkpoint could not be written, the disk is full"):
            trainer.train()
        assert last_checkpoint(disk) == str(disk / "checkpoint-2")
        assert not list(disk.glob("unfinished-*"))
        (disk / "ballast").unlink()
        again = trainer_in(disk, tiny_models, save_total_limit=1)
        again.train(resume_from_checkpoint=True)
        assert last_checkpoint(disk) == str(disk / "checkpoint-6")
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # loaded files may still be mapped


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights(tmp_path, tiny_models, where):
    trainer = trainer_in(tmp_path, tiny_models, save_steps=1)
    seen = {}

    def spoil():
        weight = next(weight for name, weight in trainer.model.named_parameters() if "q_proj" in name)
        seen.update({name: each.detach().clone() for name, each in trainer.model.named_parameters()})
        if where == "gradient":
            weight.register_hook(lambda gradient: gradient * float("nan"))
        else:
            norm = trainer.model.model.norm
            norm.register_forward_hook(lambda module, inputs, output: output * float("inf"))

    trainer.add_callback(At(2, spoil))
    what = "norm of the gradient is nan" if where == "gradient" else "loss is (nan|inf)"
    with pytest.raises(ValueError, match=rf"step 3: the {what}, expected a finite number; the step was not made"):
        trainer.train()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(weight, seen[name]), name


@pytest.fixture(scope="module")
def ended(tmp_path_factory, tiny_models):
    """A folder with the checkpoint of a run that was stopped, and its rows."""
    folder = tmp_path_factory.mktemp("ended")
    trainer = trainer_in(folder, tiny_models, max_steps=2, rows=conversations(12))
    trainer.train()
    return folder


def other_content():
    first, *rest = conversations(12)
    return [*rest, first]


def as_labelled():
    """Every other row without reasoning, which is trained in non-thinking mode only."""
    rows = conversations(12)
    for place in range(0, 12, 2):
        (exchange,) = rows[place].exchanges
        question, (answer,) = exchange.user, exchange.steps
        messages = [{"role": "user", "content": question.content}, {"role": "assistant", "content": answer.content}]
        rows[place] = Conversation.from_messages(messages)
    return rows


OTHERS = {
    "rows: 24 in the checkpoint, 20 now": {"rows": 10},
    "content of rows: '": {"rows": other_content},
    "mixture: 'paired' in the checkpoint, 'sequential' now": {"mixture": "sequential", "rows": as_labelled},
    "sequence_layout: 'tree' in the checkpoint, 'packed' now": {"sequence_layout": "packed"},
    "seed: 42 in the checkpoint, 7 now": {"seed": 7},
    "per_device_train_batch_size: 4 in the checkpoint, 2 now; gradient_accumulation_steps: 1": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    },
}


@pytest.mark.parametrize("difference", OTHERS)
def test_a_resume_on_other_rows_or_in_another_order_is_refused(tmp_path, ended, tiny_models, difference):
    given = {name: value() if callable(value) else value for name, value in OTHERS[difference].items()}
    trainer = trainer_in(tmp_path, tiny_models, **{"max_steps": 2, **given})
    with pytest.raises(ValueError, match=r"/checkpoint-2: this checkpoint was trained on other rows, or in") as found:
        trainer.train(resume_from_checkpoint=str(ended / "checkpoint-2"))
    assert difference in str(found.value)
    assert "ignore_data_skip=True" in str(found.value)


def test_other_rows_on_purpose_and_other_settings_are_told(tmp_path, ended, tiny_models, caplog):
    given = {"rows": 10, "max_steps": 3, "ignore_data_skip": True, "learning_rate": 1e-3}
    trainer = trainer_in(tmp_path, tiny_models, **given)
    trainer.train(resume_from_checkpoint=str(ended / "checkpoint-2"))
    assert trainer.state.global_step == 3
    assert "learning_rate: 0.01 in the checkpoint, 0.001 now; max_steps: 2 in the checkpoint, 3 now" in caplog.text


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"num_hidden_layers": 1}, "num_hidden_layers: 2 in the checkpoint, 1 now"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok: 2 in the checkpoint, 1 now"),
        (None, "trained parameters: "),
    ],
)
def test_a_resume_of_another_model_is_refused(tmp_path, ended, tiny_models, change, difference):
    def made():
        if change is None:
            return tiny_models()
        config = copy.deepcopy(tiny_models().config)
        for name, value in change.items():
            setattr(config, name, value)
        return Qwen3MoeForCausalLM(config)

    trainer = trainer_in(tmp_path, made, lora=change is None, max_steps=2)
    with pytest.raises(ValueError, match="checkpoint-2: this is a checkpoint of another model") as found:
        trainer.train(resume_from_checkpoint=str(ended / "checkpoint-2"))
    assert difference in str(found.value)


def test_a_folder_that_is_not_whole_is_no_place_to_go_on_from(tmp_path, ended, tiny_models):
    half = tmp_path / "checkpoint-2"
    shutil.copytree(ended / "checkpoint-2", half)
    (half / "optimizer.safetensors").unlink()
    trainer = trainer_in(tmp_path, tiny_models, max_steps=2)
    with pytest.raises(ValueError, match=r"not whole: optimizer\.safetensors is missing"):
        trainer.train(resume_from_checkpoint=str(half))
    with pytest.raises(ValueError, match="found no whole checkpoint to go on from"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="enable_jit_checkpoint: SIGTERM saves and ends without it"):
        trainer_in(tmp_path, tiny_models, enable_jit_checkpoint=True)


def test_a_folder_with_another_run_is_not_begun_in(ended, tiny_models):
    with pytest.raises(ValueError, match=r"output_dir: found .*checkpoint-2, of an earlier run.*--resume"):
        trainer_in(ended, tiny_models, max_steps=2).train()
    assert [path.name for path in ended.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize(("settings", "bytes_each"), [({}, 12), ({"save_only_model": True}, 4), ({"lora": True}, None)])
def test_room_for_two_checkpoints_is_wanted_before_training(tmp_path, tiny_models, monkeypatch, settings, bytes_each):
    trainer = trainer_in(tmp_path, tiny_models, **settings)
    if bytes_each:
        expected = bytes_each * sum(weight.numel() for weight in trainer.model.parameters())
    else:
        expected = 12 * sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(saving_module, "disk_usage", lambda path: usage._replace(free=2 * expected - 1))
    with pytest.raises(SavingError, match=f"takes {expected / 1e9:.2f} GB, and a new one is written beside the last"):
        trainer.train()
    monkeypatch.setattr(saving_module, "disk_usage", lambda path: usage._replace(free=2 * expected))
    trainer.train()
    written = sum(
        path.stat().st_size for path in (tmp_path / "checkpoint-2").iterdir() if path.suffix == ".safetensors"
    )
    assert 0.95 * expected < written < expected + 200_000


def test_a_checkpoint_of_the_model_alone_is_no_place_to_go_on_from(tmp_path, tiny_models):
    trainer_in(tmp_path, tiny_models, max_steps=2, save_only_model=True).train()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=r"it holds no optimizer\.safetensors"):
        trainer_in(tmp_path, tiny_models, max_steps=2).train(resume_from_checkpoint=True)


# Two processes


PROGRAM = Path(__file__).parent / "soak" / "kill_resume.py"


def test_killed_runs_go_on_exactly_and_two_processes_too(tmp_path):
    """The soak in short: a kill in training and one in a save, and two kills of two processes."""
    for processes, kills, steps, seed in ((1, 2, 9, 5), (2, 2, 12, 4)):
        found = tmp_path / f"{processes}.json"
        ran = subprocess.run(
            [
                *(sys.executable, PROGRAM, "--kills", str(kills), "--seed", str(seed), "--steps", str(steps)),
                *("--processes", str(processes), "--json", found),
            ],
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert ran.returncode == 0, ran.stderr[-3000:]
        report = json.loads(found.read_text())
        assert len(report["kills"]) == kills
        assert report["largest_difference"] <= (0.0 if processes == 1 else 1e-6)
