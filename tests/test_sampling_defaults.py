# SPDX-License-Identifier: Apache-2.0
"""How each mode samples by default: set, stored, read, and outvoted by what is asked for."""

import json
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM

from thinkfusion import (
    ThinkFusionConfig,
    ThinkFusionTrainer,
    export_checkpoint,
    generation_defaults,
    install_chat_template,
    load_checkpoint,
    replies,
    reply,
    set_generation_defaults,
    stream_reply,
)
from thinkfusion.modes import Mode
from thinkfusion.sampling_defaults import PRESETS, SamplingDefaults, parse_generation_defaults

OWN = {"thinking": {"temperature": 0.6, "top_p": 0.9}, "non_thinking": {"temperature": 0.0}}
PARSED = {Mode.THINKING: SamplingDefaults(0.6, 0.9), Mode.NON_THINKING: SamplingDefaults()}


@pytest.fixture
def ready(base_tokenizer, model):
    install_chat_template(base_tokenizer, model)
    return model.eval(), base_tokenizer


@pytest.fixture
def asked(ready, monkeypatch):
    """The arguments that `model.generate` was called with, call by call."""
    calls = []
    generate = ready[0].generate

    def watched(**arguments):
        calls.append(SimpleNamespace(**arguments))
        return generate(**arguments)

    monkeypatch.setattr(ready[0], "generate", watched)
    return calls


def test_nothing_is_stored_by_itself_and_decoding_is_greedy(ready, asked):
    assert generation_defaults(ready[0]) == {}
    reply(*ready, "a", max_new_tokens=1)
    assert asked[0].do_sample is False


def test_they_survive_saving_and_exporting(ready, tmp_path):
    model, tokenizer = ready
    set_generation_defaults(model, OWN)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert generation_defaults(again) == PARSED
    export_checkpoint(again, tokenizer, tmp_path / "exported")
    stored = json.loads((tmp_path / "exported" / "generation_config.json").read_text())
    assert stored["thinkfusion"]["thinking"] == {"temperature": 0.6, "top_p": 0.9, "top_k": 0}
    # What servers read is that of the default mode.
    assert (stored["do_sample"], stored["temperature"], stored["top_p"]) == (True, 0.6, 0.9)
    assert tokenizer.eos_token_id in stored["eos_token_id"]
    model, _ = load_checkpoint(tmp_path / "exported")
    assert generation_defaults(model) == PARSED
    set_generation_defaults(model, OWN, default_mode="non_thinking")
    assert (model.generation_config.do_sample, model.generation_config.temperature) == (False, None)


def test_adapters_carry_them(tmp_path):
    config = ThinkFusionConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        report_to="none",
        generation_defaults="qwen3",
        default_mode="non_thinking",
    )
    trainer = ThinkFusionTrainer(
        "tiny-base", config, train_dataset=[{"question": "a", "reasoning": "b", "answer": "c"}], peft_config=True
    )
    export_checkpoint(trainer.model, trainer.processing_class, tmp_path / "out", adapters_only=True)
    model, _ = load_checkpoint(tmp_path / "out")
    assert generation_defaults(model) == PRESETS["qwen3"]
    assert model.generation_config.temperature == 0.7
    assert trainer.processing_class.eos_token_id in model.generation_config.eos_token_id


def test_what_is_asked_for_wins(ready, asked):
    set_generation_defaults(ready[0], OWN)
    replies(*ready, ["a", "b", "c"], mode=[True, False, True], max_new_tokens=1)
    # Modes that sample in different ways do not share a batch.
    assert [(len(call.input_ids), call.do_sample, call.temperature) for call in asked] == [
        (2, True, 0.6),
        (1, False, None),
    ]
    reply(*ready, "a", mode=True, top_p=0.5, top_k=7, max_new_tokens=1)
    assert (asked[2].temperature, asked[2].top_p, asked[2].top_k) == (0.6, 0.5, 7)
    reply(*ready, "a", mode=True, temperature=0, max_new_tokens=1)
    assert asked[3].do_sample is False
    list(stream_reply(*ready, "a", mode=True, max_new_tokens=1))
    assert (asked[4].temperature, asked[4].top_p) == (0.6, 0.9)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("qwen4", "found 'qwen4', expected JSON or one of qwen3"),
        ([1], r"generation_defaults: found \[1\], expected settings by mode"),
        ({"fast": {}}, "unknown mode 'fast'"),
        ({"thinking": {"heat": 1}}, "generation_defaults.thinking: found .*heat.*, expected some of temperature"),
        ({"thinking": {"temperature": -1}}, "thinking.temperature: found -1, expected a number of at least 0"),
        ({"thinking": {"top_p": 0}}, "thinking.top_p: found 0, expected a number above 0, at most 1"),
        ({"thinking": {"top_k": 1.5}}, "thinking.top_k: found 1.5, expected a whole number"),
        ({"thinking": {"top_k": True}}, "thinking.top_k: found True"),
        ({"thinking": {"temperature": "hot"}}, "thinking.temperature: found 'hot'"),
    ],
)
def test_bad_settings_are_named(value, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        parse_generation_defaults(value)
    with pytest.raises(ValueError, match=message):
        ThinkFusionConfig(output_dir=str(tmp_path), generation_defaults=value)


def test_json_and_presets_are_read():
    assert parse_generation_defaults(json.dumps(OWN)) == PARSED
    assert parse_generation_defaults("qwen3")[Mode.THINKING] == SamplingDefaults(0.6, 0.95, 20)
    assert parse_generation_defaults(None) == {}


def test_a_damaged_block_is_named(ready):
    ready[0].generation_config.thinkfusion = {"thinking": {"temperature": "hot"}}
    with pytest.raises(ValueError, match=r"generation_config\.thinkfusion\.thinking\.temperature: found 'hot'"):
        reply(*ready, "a")
