# SPDX-License-Identifier: Apache-2.0
"""A checkpoint to the Hub: the real client against a small server on the loopback, failures included."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from tests.conftest import tiny_model
from tests.hub_server import HubServer, Repo, sha256
from tests.test_training import config, conversations
from thinkfusion import (
    ThinkFusionTrainer,
    evaluate_modes,
    export_checkpoint,
    install_chat_template,
    load_checkpoint,
    plan_upload,
    push_checkpoint,
    reply,
    save_report,
)
from thinkfusion.checkpointing import tiny_base_path
from thinkfusion.cli import main
from thinkfusion.model_card import UNMEASURED
from thinkfusion.publishing import PublishingError

ROOT = Path(__file__).parent.parent
TOKEN = "canary-4711-never-shown"
EXPORTED = {"chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


def ready():
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_base_path()), tiny_model()
    install_chat_template(tokenizer, model)
    return model, tokenizer


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A checkpoint in three files of weights, with its mode report, and with files that are nobody's business."""
    folder = tmp_path_factory.mktemp("runs") / "fused"
    model, tokenizer = ready()
    export_checkpoint(model, tokenizer, folder, check=False, max_shard_size="150KB")
    assert len(list(folder.glob("*.safetensors"))) >= 2
    report = evaluate_modes(model, tokenizer, samples=2, max_new_tokens=3, progress=False)
    save_report(report, folder, checkpoint=folder)
    (folder / "training_args.json").write_text(json.dumps({"output_dir": str(folder), "hub_token": TOKEN}))
    (folder / "trainer_state.json").write_text("{}")
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "optimizer.safetensors").write_bytes(b"x")
    (folder / "notes.md").write_text("private")
    return folder


@pytest.fixture
def checkpoint(measured, tmp_path):
    return Path(shutil.copytree(measured, tmp_path / "fused"))


@pytest.fixture
def hub(monkeypatch, capfd):
    """A Hub that the client of this process talks to, with all that it logs; no word of it may hold the token."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server = HubServer(TOKEN)
    connect(server, monkeypatch)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    before = huggingface_hub.utils.logging.get_verbosity()
    huggingface_hub.utils.logging.set_verbosity_debug()
    yield server
    huggingface_hub.utils.logging.set_verbosity(before)
    huggingface_hub.utils.close_session()
    server.shutdown()
    server.server_close()
    shown = capfd.readouterr()
    assert TOKEN not in shown.out + shown.err


def connect(server, monkeypatch):
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_DEBUG", True)
    huggingface_hub.utils.close_session()


def untouched(hub, repo="me/fused"):
    """Whether nothing of the checkpoint can be seen on the Hub."""
    return repo not in hub.repos or set(hub.repos[repo].files) == {".gitattributes"}


def test_what_is_stored_replies_as_the_original(hub, checkpoint, tmp_path):
    address = push_checkpoint(checkpoint, "me/fused", license="apache-2.0")
    assert address == f"{hub.address}/me/fused"
    stored = hub.repos["me/fused"]
    assert stored.private
    weights = {path.name for path in checkpoint.glob("*.safetensors")}
    assert set(stored.files) == EXPORTED | weights | {".gitattributes", "README.md", "model.safetensors.index.json"}
    assert stored.lfs == weights
    assert len(stored.commits) == 2
    back = hub.write_to("me/fused", tmp_path / "back")
    ask = {"messages": "Which of the digits 3, 9, 1 is the largest?", "max_new_tokens": 8}
    for mode in ("thinking", "non_thinking"):
        texts = [reply(*load_checkpoint(folder), mode=mode, **ask) for folder in (checkpoint, back)]
        assert texts[0] == texts[1]
    card = ModelCard((back / "README.md").read_text())
    report = json.loads((checkpoint / "mode_report.json").read_text())
    values = {(each.dataset_config, each.metric_type): each.metric_value for each in card.data.eval_results}
    for mode in ("thinking", "non_thinking"):
        assert values[mode, "truncated"] == report["modes"][mode]["truncated"]
    assert card.data.license == "apache-2.0"
    assert 'from_pretrained("me/fused")' in card.text
    for name, content in stored.files.items():
        assert TOKEN.encode() not in content, name
        assert str(checkpoint.parent).encode() not in content, name


def test_a_second_push_sends_nothing(hub, checkpoint):
    push_checkpoint(checkpoint, "me/fused")
    before, commits = dict(hub.received_bytes), list(hub.repos["me/fused"].commits)
    push_checkpoint(checkpoint, "me/fused")
    assert dict(hub.received_bytes) == before
    assert hub.repos["me/fused"].commits == commits


def test_in_parts(hub, checkpoint):
    hub.part_bytes = 50_000
    push_checkpoint(checkpoint, "me/fused")
    for path in checkpoint.glob("*.safetensors"):
        assert hub.repos["me/fused"].files[path.name] == path.read_bytes()
    assert hub.calls["put"] > 3


@pytest.mark.parametrize(
    ("verb", "plan"),
    [
        ("whoami", [503]),
        ("create", [500, 502]),
        ("create", ["cut"]),
        ("info", [503]),
        ("preupload", [503]),
        ("batch", [429, 500]),
        ("put", [500, 503]),
        ("put", ["cut", "cut"]),
        ("verify", [503]),
        ("commit", [503, 500]),
        ("commit", ["cut"]),
        ("commit_answer", ["cut"]),
    ],
    ids=lambda each: each if isinstance(each, str) else "-".join(map(str, each)),
)
def test_errors_that_pass_are_waited_out(hub, checkpoint, verb, plan):
    hub.fail[verb] = [*plan, *[None] * 100]
    push_checkpoint(checkpoint, "me/fused")
    assert "README.md" in hub.repos["me/fused"].files
    assert len(hub.repos["me/fused"].commits) == 2
    assert len(hub.fail[verb]) <= 100


@pytest.mark.parametrize(
    ("verb", "failure", "expected"),
    [
        ("whoami", 401, "the Hub does not know this token"),
        ("create", 403, "the token may not write there"),
        ("preupload", 403, "the token may not write there"),
        ("batch", 401, "the Hub does not know this token"),
        ("put", 500, "the Hub failed, several times in a row"),
        ("put", "cut", "the connection broke"),
        ("put", 403, "the token may not write there"),
        ("commit", 409, "the repository changed during the upload"),
        ("commit", 503, "the Hub failed, several times in a row"),
        ("commit", "cut", "the connection broke"),
        ("validate", 400, "the Hub refused"),
    ],
)
def test_errors_that_stay_are_one_line_and_leave_nothing(hub, checkpoint, capfd, verb, failure, expected):
    hub.fail[verb] = [failure] * 100
    before = sorted(path.name for path in checkpoint.rglob("*"))
    assert main(["push", str(checkpoint), "me/fused"]) == 1
    told = capfd.readouterr().err
    (line,) = [line for line in told.splitlines() if "thinkfusion push:" in line]  # a bar may stand in front of it
    assert f"thinkfusion push: me/fused: {expected}" in line
    assert TOKEN not in told
    assert untouched(hub)
    assert sorted(path.name for path in checkpoint.rglob("*")) == before


def test_a_broken_upload_goes_on_where_it_was(hub, checkpoint):
    first, second, *_ = (path.read_bytes() for path in sorted(checkpoint.glob("*.safetensors")))
    hub.fail["put"] = [None, *["cut"] * 6]
    with pytest.raises(PublishingError, match="Start the same command again"):
        push_checkpoint(checkpoint, "me/fused")
    assert untouched(hub)
    assert set(hub.objects) == {sha256(first)}
    hub.fail.clear()
    push_checkpoint(checkpoint, "me/fused")
    assert hub.received_bytes[sha256(first)] == len(first)  # once
    assert hub.received_bytes[sha256(second)] == len(second)
    assert len(hub.repos["me/fused"].commits) == 2


def test_a_change_by_someone_else_is_not_written_over(hub, checkpoint, monkeypatch):
    create = huggingface_hub.HfApi.create_commit

    def meanwhile(*arguments, **options):
        hub.repos["me/fused"].commits.append("1" * 40)
        return create(*arguments, **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", meanwhile)
    with pytest.raises(PublishingError, match=r"the repository changed during the upload. Nothing was committed"):
        push_checkpoint(checkpoint, "me/fused")
    assert untouched(hub)


def test_what_another_model_left_goes(hub, checkpoint):
    hub.repos["me/fused"] = Repo(private=True)
    old = {"pytorch_model.bin": b"1", "model.safetensors": b"2", "tokenizer.model": b"3", "figure.png": b"4"}
    hub.repos["me/fused"].files |= old
    push_checkpoint(checkpoint, "me/fused")
    assert set(old) & set(hub.repos["me/fused"].files) == {"figure.png"}


def test_a_lost_answer_to_a_commit_that_also_deletes(hub, checkpoint):
    hub.repos["me/fused"] = Repo(private=True)
    hub.repos["me/fused"].files["pytorch_model.bin"] = b"1"
    hub.fail["commit_answer"] = ["cut", None, None]
    push_checkpoint(checkpoint, "me/fused")
    assert len(hub.repos["me/fused"].commits) == 2
    assert "pytorch_model.bin" not in hub.repos["me/fused"].files


def test_a_public_repository_needs_a_word(hub, checkpoint):
    hub.repos["me/fused"] = Repo(private=False)
    with pytest.raises(PublishingError, match=r"found a public repository, expected a private one. Add --public"):
        push_checkpoint(checkpoint, "me/fused")
    assert not hub.objects
    push_checkpoint(checkpoint, "me/fused", public=True)
    push_checkpoint(checkpoint, "me/another", public=True)
    assert not hub.repos["me/another"].private


@pytest.mark.parametrize(
    "name", ["fused", "me/", "/fused", "a/b/c", "me/fu sed", "me/-fused", "me/a..b", "me/x.git", "me/" + "x" * 97, ""]
)
def test_names_that_the_hub_would_refuse(hub, checkpoint, name, capfd):
    assert main(["push", str(checkpoint), name]) == 1
    told = capfd.readouterr().err
    assert told.startswith(f"thinkfusion push: repository: found {name!r}, expected owner/name")
    assert told.count("\n") == 1
    assert not hub.calls


def test_without_a_token_nothing_is_asked(hub, checkpoint, monkeypatch, tmp_path, capfd):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert main(["push", str(checkpoint), "me/fused"]) == 1
    assert "no token: " in capfd.readouterr().err
    with pytest.raises(ValueError, match="Log in with `hf auth login`, or set HF_TOKEN"):
        push_checkpoint(checkpoint, "me/fused")
    assert not hub.calls


def test_a_token_from_a_login_is_not_told_either(hub, checkpoint, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text(TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    hub.fail["create"] = [403]  # whose answer repeats the token
    with pytest.raises(PublishingError, match="the token may not write there") as raised:
        push_checkpoint(checkpoint, "me/fused")
    assert TOKEN not in str(raised.value)
    push_checkpoint(checkpoint, "me/fused")


def test_offline_is_said_and_not_tried_again(hub, checkpoint, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PublishingError, match="offline mode is enabled"):
        push_checkpoint(checkpoint, "me/fused")


# The mode report


def test_a_report_of_other_weights_is_refused(hub, checkpoint):
    path = sorted(checkpoint.glob("*.safetensors"))[-1]
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    os.utime(path, (1, 1))  # older than the report, and still not what it measured
    with pytest.raises(ValueError, match="these are not the weights that were measured"):
        push_checkpoint(checkpoint, "me/fused")
    assert not hub.calls
    push_checkpoint(checkpoint, "me/fused", without_report=True)
    card = ModelCard(hub.repos["me/fused"].files["README.md"].decode())
    assert card.text.strip().splitlines()[0] == UNMEASURED
    assert card.data.eval_results is None
    assert "format error" not in card.text


def test_a_report_that_names_no_weights_goes_by_its_age(checkpoint):
    path = checkpoint / "mode_report.json"
    report = json.loads(path.read_text())
    del report["weights"]
    path.write_text(json.dumps(report))
    assert "README.md" in {file.name for file in plan_upload(checkpoint, "me/fused").files}
    os.utime(path, (1, 1))
    with pytest.raises(ValueError, match="it is older than the weights, so it measured others"):
        plan_upload(checkpoint, "me/fused")


def test_a_missing_or_broken_report(checkpoint, tmp_path):
    path = checkpoint / "mode_report.json"
    elsewhere = path.rename(tmp_path / "report.json")
    with pytest.raises(FileNotFoundError, match="there is no mode report"):
        plan_upload(checkpoint, "me/fused")
    assert "| format error |" in plan_upload(checkpoint, "me/fused", report=elsewhere).card
    path.write_text("{}")
    with pytest.raises(ValueError, match="this is no mode report"):
        plan_upload(checkpoint, "me/fused")
    path.write_text("{")
    with pytest.raises(ValueError, match="found no JSON"):
        plan_upload(checkpoint, "me/fused")


# What goes up


def test_damaged_weights_are_refused(checkpoint):
    path = sorted(checkpoint.glob("*.safetensors"))[0]
    whole = path.read_bytes()
    for broken in (whole[:-5], whole[:6], b"\xff" * 16):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"it was cut|no header of safetensors"):
            plan_upload(checkpoint, "me/fused", without_report=True)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=path.name):
        plan_upload(checkpoint, "me/fused", without_report=True)


def test_no_path_of_this_machine_goes_up(checkpoint):
    settings = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**settings, "_name_or_path": str(checkpoint / "base")}))
    upload = plan_upload(checkpoint, "me/fused")
    (sent,) = [file.source for file in upload.files if file.name == "config.json"]
    assert json.loads(sent) == settings
    assert any("_name_or_path is left out" in remark for remark in upload.remarks)
    (checkpoint / "generation_config.json").write_text(json.dumps({"note": f"see {checkpoint}/x"}))
    with pytest.raises(ValueError, match=r"generation_config.json: it holds a path of this machine"):
        plan_upload(checkpoint, "me/fused")


def test_an_adapter_needs_a_base_that_others_have(tmp_path):
    model, tokenizer = ready()
    model.save_pretrained(tmp_path / "base")
    model.config._name_or_path = model.name_or_path = str(tmp_path / "base")
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    export_checkpoint(model, tokenizer, tmp_path / "adapter", adapters_only=True, check=False)
    with pytest.raises(ValueError, match="the base is the folder base of this machine"):
        plan_upload(tmp_path / "adapter", "me/lora", without_report=True)
    upload = plan_upload(tmp_path / "adapter", "me/lora", without_report=True, base_model="owner/base")
    files = {file.name: file.source for file in upload.files}
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "owner/base"
    assert {"adapter_model.safetensors", "tokenizer.json"} <= set(files)
    card = ModelCard(upload.card)
    assert card.data.base_model == "owner/base"
    assert (card.data.library_name, card.data.base_model_relation) == ("peft", "adapter")
    assert str(tmp_path) not in upload.card


def test_the_licence_of_the_base(hub, checkpoint):
    hub.cards["owner/base"] = {"license": "other", "license_name": "theirs-1.0", "license_link": "LICENSE"}
    data = ModelCard(plan_upload(checkpoint, "me/fused", base_model="owner/base").card).data
    assert (data.license, data.license_name, data.license_link) == ("other", "theirs-1.0", "LICENSE")
    upload = plan_upload(checkpoint, "me/fused", base_model="owner/without")
    assert ModelCard(upload.card).data.license is None
    assert any(remark.startswith("no licence") for remark in upload.remarks)
    with pytest.raises(ValueError, match="found 'Apache 2', expected an identifier of the Hub"):
        plan_upload(checkpoint, "me/fused", license="Apache 2")


# The command and the trainer


def test_the_command_in_a_process_of_its_own(hub, checkpoint):
    command = [sys.executable, "-m", "thinkfusion.cli", "push", str(checkpoint), "me/fused", "--license", "mit"]
    given = {
        **os.environ,
        "HF_ENDPOINT": hub.address,
        "HF_HUB_DISABLE_XET": "1",
        "HF_DEBUG": "1",
        "HF_HUB_OFFLINE": "0",
    }
    given |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--dry-run"], capture_output=True, text=True, env=given, timeout=100, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "# fused" in done.stdout
    assert not hub.calls
    done = subprocess.run(command, capture_output=True, text=True, env=given, timeout=100, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    listed = done.stdout[: done.stdout.index("Uploaded: ")]
    for name in set(hub.repos["me/fused"].files) - {".gitattributes"}:
        assert f"  {name}\n" in listed
    assert (
        "Stays here: checkpoint-3, mode_report.json, notes.md, replies.jsonl, trainer_state.json, training_args"
        in listed
    )
    assert "curl" in done.stderr  # all that the client can say was said
    assert TOKEN not in done.stdout + done.stderr


def test_the_trainer_uploads_its_export_alone(hub, tmp_path):
    model, tokenizer = ready()
    settings = config(tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=1, learning_rate=0.5)
    settings.push_to_hub, settings.hub_model_id, settings.hub_token = True, "me/trained", TOKEN
    trainer = ThinkFusionTrainer(model, settings, train_dataset=conversations(4), processing_class=tokenizer)
    assert not hub.calls
    trainer.train()
    trainer.save_model()
    assert not hub.calls
    with pytest.raises(FileNotFoundError, match="there is no mode report"):
        trainer.push_to_hub()
    folder = tmp_path / "out"
    written = load_checkpoint(folder)
    torch.testing.assert_close(written[0].state_dict(), trainer.model.state_dict())
    report = evaluate_modes(*written, samples=2, max_new_tokens=3, progress=False)
    save_report(report, folder, checkpoint=folder)
    before = (folder / "model.safetensors").stat().st_mtime
    assert trainer.push_to_hub(license="mit") == f"{hub.address}/me/trained"
    assert (folder / "model.safetensors").stat().st_mtime == before
    stored = hub.repos["me/trained"]
    assert stored.private
    assert set(stored.files) == EXPORTED | {".gitattributes", "README.md", "model.safetensors"}
    card = stored.files["README.md"].decode()
    assert "full fine-tuning, 2 steps" in card
    assert str(tmp_path) not in card
    shutil.rmtree(folder / "checkpoint-1")
    shutil.rmtree(folder / "checkpoint-2")
    trainer.train()  # from what it has learned; the export and its report are outdated
    with pytest.raises(ValueError, match="not the weights that were measured"):
        trainer.push_to_hub()


def test_a_trainer_without_name_or_token_says_so_at_once(hub, tmp_path, monkeypatch):
    settings = config(tmp_path)
    settings.push_to_hub, settings.hub_model_id = True, "no owner"
    model, tokenizer = ready()
    build = {"train_dataset": conversations(4), "processing_class": tokenizer}
    with pytest.raises(ValueError, match="hub_model_id: found 'no owner', expected owner/name"):
        ThinkFusionTrainer(model, settings, **build)
    settings.hub_model_id = "me/trained"
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="no token: "):
        ThinkFusionTrainer(model, settings, **build)
    assert not hub.calls
