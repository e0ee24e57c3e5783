# SPDX-License-Identifier: Apache-2.0
"""A model card says what the files of a checkpoint tell, no more, and nothing of the machine or the rows."""

import json
import re

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from torch import zeros

from tests.test_training import config
from thinkfusion import Conversation, RowReport, chat_template, make_card, prepare, save_recipe, save_report
from thinkfusion.card_facts import Origin, is_hub_id, last_part, read_facts
from thinkfusion.control_tokens import Treatment
from thinkfusion.digests import weights_digest
from thinkfusion.evaluation import EvaluationPrompt, summarise
from thinkfusion.model_card import UNMEASURED
from thinkfusion.modes import Mode, split_reply
from thinkfusion.reading import DataError


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of which only what a card reads is there."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": zeros(3, 4), "b": zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "num_local_experts": 8}))
    (folder / "chat_template.jinja").write_text(chat_template(default_mode="non_thinking"))
    return folder


def report():
    """Four thinking replies, one of them broken and one cut; four non-thinking ones, all right."""
    said = ["1 + 1</think>2<|im_end|>", "1 + 1</think>3<|im_end|>", "2<|im_end|>", "1 + 1 +"]
    prompts = [EvaluationPrompt(({"role": "user", "content": "secret?"},), "2", "sums|all") for _ in said]
    replies = {
        Mode.THINKING: [split_reply(text, "thinking", finished=False) for text in said],
        Mode.NON_THINKING: [split_reply("2<|im_end|>", "non_thinking") for _ in said],
    }
    return summarise(prompts, replies, {"max_new_tokens": 9, "temperature": 0.0, "prompts": "given"})


def measured(folder):
    return json.loads(save_report(report(), folder, checkpoint=folder).read_text())


def test_the_table_and_the_metadata_are_what_was_measured(folder):
    values = measured(folder)
    card = make_card(folder, "me/model", report=values, license="mit")
    assert "Of 7 finished replies, 1 broke their mode's format; 1 more were cut at the token limit." in card.text
    (line,) = re.findall(r"\| format error \| (.*)", card.text)
    thinking = values["modes"]["thinking"]
    low, high = thinking["format_error_interval"]
    assert line.startswith(f"33.3 % [{100 * low:.1f}, {100 * high:.1f}] | 0.0 % ")
    assert r"| accuracy, sums\|all | 50.0 % " in card.text
    read = ModelCard(str(card)).data
    found = {(each.dataset_config, each.metric_type): each for each in read.eval_results}
    assert found["thinking", "format_error"].metric_value == pytest.approx(1 / 3, abs=1e-6)
    assert found["thinking", "format_error"].metric_args["interval_95"] == pytest.approx([low, high], abs=1e-6)
    assert found["non_thinking", "accuracy"].metric_value == 1.0
    assert len(found) == 12
    assert (read.license, read.pipeline_tag, read.library_name) == ("mit", "text-generation", "transformers")
    assert "secret" not in str(card)
    assert "`qwen3_moe`, 8 experts a layer, 14 parameters in these files (F32)." in card.text
    assert "Without any: non-thinking." in card.text


def test_what_is_not_known_is_said_and_not_made_up(folder):
    card = make_card(folder, "me/model")
    assert card.text.strip().splitlines()[0] == UNMEASURED
    for line in ("Base: not known.", "The recipe is not known.", "Data sets: not known.", "Not stated: "):
        assert line in card.text
    data = card.data.to_dict()
    assert not {"base_model", "datasets", "license", "model-index", "language", "base_model_relation"} & set(data)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert "it is not known how it switches" in make_card(folder, "me/model").text.replace("\n", " ")


def test_the_recipe_without_places_and_secrets(folder, tmp_path):
    settings = config(tmp_path, learning_rate=3e-4, hub_token="canary", run_name="secret run")
    data = ["owner/data:sub", str(tmp_path / "private" / "rows.jsonl"), "C:\\users\\me\\more.csv"]
    path = save_recipe(
        folder, settings, base_model="owner/base", revision="c" * 40, method="LoRA", datasets=data, steps=1200
    )
    for text in (path.read_text(), str(make_card(folder, "me/model"))):
        assert str(tmp_path) not in text
        assert "canary" not in text
        assert "users" not in text
        assert "secret run" not in text
    card = make_card(folder, "me/model")
    assert card.data.base_model == "owner/base"
    assert card.data.base_model_relation == "finetune"
    assert card.data.datasets == ["owner/data"]
    assert f"Base: [owner/base](https://huggingface.co/owner/base) at `{'c' * 40}`." in card.text
    assert "Trained by LoRA, 1,200 steps." in card.text
    assert "| `learning_rate` | 0.0003 |" in card.text
    assert (
        "[owner/data](https://huggingface.co/datasets/owner/data), rows.jsonl (not on the Hub), more.csv" in card.text
    )


def test_the_recipe_has_what_was_done_for_control_tokens_not_what_was_left_open(folder, tmp_path):
    given = {"base_model": "owner/base", "method": "LoRA"}
    done = Treatment({"</think>": "it was added"}, 5e-3, 15.0, 10.0, 1.0, 1.0, "…")
    record = json.loads(save_recipe(folder, config(tmp_path), control_tokens=done, **given).read_text())
    assert record["control_tokens"] == {
        "new": ["</think>"],
        "learning_rate": 5e-3,
        "weight_from_to": [15.0, 1.0],
        "end_of_turn_weight_from_to": [10.0, 1.0],
    }
    assert record["settings"]["control_token_init"] == "mean"
    # A number among the settings would stay, where this one fell.
    assert "control_token_weight" not in record["settings"]
    assert json.loads(save_recipe(folder, config(tmp_path), **given).read_text())["control_tokens"] is None


def test_a_local_base_is_named_by_its_last_part_and_not_in_the_metadata(folder, tmp_path):
    save_recipe(folder, config(tmp_path), base_model=str(tmp_path), method="full fine-tuning")
    card = make_card(folder, "me/model")
    assert card.data.base_model is None
    assert f"Base: {tmp_path.name} (not on the Hub)." in card.text.replace("\\", "")
    assert make_card(folder, "me/model", base_model="owner/base").data.base_model == "owner/base"


def test_rows_are_accounted_for_and_not_quoted(folder, tokenizer):
    messages = [{"role": "user", "content": "하나?"}, {"role": "assistant", "content": "A", "reasoning_content": "R"}]
    rows = [Conversation.from_messages(messages) for _ in range(3)]
    _, account = prepare(rows, tokenizer)
    account.read += 1
    account.skip(DataError("bad_message", "found the secret 42").at("/home/someone/rows.jsonl", 7), "secret row")
    account.account.add("/home/someone/rows.jsonl", "thinking", "ko", 30, stage="after")
    account.save(folder / "row_report.json")
    card = make_card(folder, "me/model")
    assert "4 rows read = 3 kept + 1 left out; 0 were altered." in card.text
    assert "Left out: bad_message 1." in card.text
    assert "| rows.jsonl | thinking | ko | 1 | 30 |" in card.text
    assert "secret" not in str(card)
    assert "someone" not in str(card)
    assert card.data.language == ["ko"]
    account.account.add("rows", "thinking", "latin", 30, stage="after")
    account.save(folder / "row_report.json")
    assert make_card(folder, "me/model").data.language is None  # of some rows only the script is known


def test_a_fused_checkpoint_names_what_it_was_fused_from(folder, tmp_path):
    parents = []
    for name in ("thinking", "instruct"):
        (tmp_path / name).mkdir()
        parents.append(str(tmp_path / name))
    fusion = {"method": "linear", "ratio": 0.8, "groups": {}, "thinking": parents[0], "non_thinking": parents[1]}
    (folder / "fusion.json").write_text(json.dumps(fusion))
    text = make_card(folder, "me/model").text
    assert "Base: thinking (not on the Hub), instruct (not on the Hub)." in text
    assert "method `linear`, share of the thinking one 0.8." in text
    assert str(tmp_path) not in text
    for parent in parents:
        save_recipe(parent, config(tmp_path), base_model="owner/base", method="full fine-tuning")
    data = make_card(folder, "me/model").data
    assert (data.base_model, data.base_model_relation) == ("owner/base", "merge")


def test_text_from_outside_is_escaped(folder, tmp_path):
    values = measured(folder)
    tasks = values["modes"]["thinking"]["tasks"]
    tasks["<script>\n---\n|`x`[a](b)\x1b[31m"] = tasks.pop("sums|all")
    text = make_card(folder, "me/model", report=values).text
    assert "<script>" not in text.replace("\\<", "")
    assert "\x1b" not in text
    assert "\n---\n" not in text


def test_reports_name_the_weights_that_they_measured(folder):
    values = measured(folder)
    assert values["weights"] == weights_digest(folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1] + b"\1")
    assert values["weights"] != weights_digest(folder)
    assert "weights" not in json.loads(save_report(report(), folder).read_text())
    assert weights_digest(folder.parent) is None


@pytest.mark.parametrize(
    ("name", "on_hub", "shown"),
    [
        ("owner/name", True, "owner/name"),
        ("owner/name:subset", True, "owner/name"),
        ("data/rows.jsonl", False, "rows.jsonl"),
        ("/home/someone/model", False, "model"),
        ("../runs/model", False, "model"),
        ("C:\\Users\\someone\\model", False, "model"),
        ("data/*.parquet", False, "*.parquet"),
        ("tasks", False, "tasks"),
    ],
)
def test_hub_ids_are_told_from_paths(name, on_hub, shown):
    assert is_hub_id(name) is on_hub
    assert Origin.of(name).name == shown
    assert "/" not in last_part(name)


def test_a_folder_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    assert not is_hub_id("runs/tiny")


def test_settings_of_a_trainer_alone_are_shown(folder):
    given = {"learning_rate": 0.5, "output_dir": "/home/someone", "hub_token": "canary", "seed": 3}
    (folder / "training_args.json").write_text(json.dumps(given))
    text = make_card(folder, "me/model").text
    assert "| `learning_rate` | 0.5 |" in text
    assert "someone" not in text
    assert "canary" not in text
    assert read_facts(folder).relation == "finetune"


def test_an_empty_row_report_and_a_broken_file(folder):
    RowReport().save(folder / "row_report.json")
    assert "0 rows read = 0 kept + 0 left out" in make_card(folder, "me/model").text
    (folder / "recipe.json").write_text("[]")
    with pytest.raises(ValueError, match=r"recipe.json: found a list, expected a JSON object"):
        make_card(folder, "me/model")
