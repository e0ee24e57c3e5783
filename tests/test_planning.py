# SPDX-License-Identifier: Apache-2.0
"""What training takes of memory: counted, traced, and measured."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig

from tests.benchmarks.planning import measured_and_planned
from tests.tiny_models import SIZES, tiny_config, tiny_random_model
from thinkfusion.activations import Setup, decoder_layers, trace_layers
from thinkfusion.cli import main
from thinkfusion.moe import meta_model
from thinkfusion.planning import (
    GIB,
    STRATEGIES,
    gpus_needed,
    plan_memory,
    read_config,
)
from thinkfusion.trainable import lora_config

LARGE = {"num_hidden_layers": 48, "head_dim": 128}  # the rest of Qwen3-30B-A3B is Qwen3MoeConfig's default


def config_file(folder: Path, **settings: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(settings))
    return file


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_full_fine_tuning_keeps_sixteen_bytes_a_parameter(family: str) -> None:
    model = tiny_random_model(family)
    count = sum(parameter.numel() for parameter in model.parameters())
    plan = plan_memory(tiny_config(family), Setup(gpus=4, sequence_length=64))
    assert (plan.sizes.trained, plan.sizes.frozen) == (count, 0)
    assert plan.memory["ddp"].state == 16 * count
    for sharded in ("fsdp2", "deepspeed_zero3"):
        assert plan.memory[sharded].state == pytest.approx(16 * count / 4, abs=3)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "qwen2_moe"])
def test_lora_counts_the_adapters_that_peft_makes(family: str) -> None:
    model = tiny_random_model(family)
    base = sum(parameter.numel() for parameter in model.parameters())
    adapted = get_peft_model(model, lora_config(model, r=4))
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    plan = plan_memory(tiny_config(family), Setup("lora", lora_r=4, sequence_length=64))
    assert (plan.sizes.trained, plan.sizes.frozen) == (trained, base)
    assert plan.memory["ddp"].state == 2 * base + 16 * trained
    assert plan_memory(tiny_config(family), Setup("lora", lora_r=4, sequence_length=64, bf16=False)).memory[
        "ddp"
    ].state == (4 * base + 16 * trained)


def test_traced_activations_are_those_of_a_real_pass() -> None:
    """Against the tensors that a forward pass on the CPU keeps: the same layers, attention apart."""
    family, tokens = "qwen3_moe", 96
    setup = Setup(sequence_length=tokens)
    traced, _ = trace_layers(meta_model(tiny_config(family)), setup)
    model = tiny_random_model(family).bfloat16()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage
        return tensor

    layer = decoder_layers(model)[0]
    hidden = torch.randn(1, tokens, SIZES["hidden_size"], requires_grad=True, dtype=torch.bfloat16)
    positions = model.model.rotary_emb(hidden, torch.arange(tokens)[None])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(hidden, position_embeddings=positions, attention_mask=None)
    real = sum(storage.nbytes() for storage in held.values())
    assert traced[0] == pytest.approx(real, rel=0.1)


def test_activations_grow_with_the_row_and_shrink_by_checkpointing() -> None:
    config = AutoConfig.for_model("qwen3_moe", **LARGE)
    short, long = (plan_memory(config, Setup(sequence_length=length)).memory["fsdp2"] for length in (2048, 8192))
    assert short.state == long.state
    assert 3 < long.activations / short.activations < 4
    stored = plan_memory(config, Setup(sequence_length=8192, gradient_checkpointing=False)).memory["fsdp2"]
    assert stored.activations > 10 * long.activations
    rows = plan_memory(config, Setup(sequence_length=2048, batch_size=4)).memory["fsdp2"]
    assert rows.activations == pytest.approx(long.activations, rel=0.01)


def test_adapted_experts_are_made_whole() -> None:
    """Without checkpointing, every layer's experts are there twice: 58 GB for Qwen3-30B-A3B in bfloat16."""
    config = AutoConfig.for_model("qwen3_moe", **LARGE)
    full, lora = (
        plan_memory(config, Setup(method, sequence_length=256, gradient_checkpointing=False)).memory["fsdp2"]
        for method in ("full", "lora")
    )
    experts = 48 * 128 * 3 * 2048 * 768
    assert lora.activations - full.activations == pytest.approx(2 * experts, rel=0.05)


def test_the_simplest_that_fits_is_chosen() -> None:
    config = AutoConfig.for_model("qwen3_moe", **LARGE)
    assert plan_memory(config, Setup(gpus=8)).chosen == "fsdp2"
    assert plan_memory(config, Setup("lora", gpus=8, gpu_memory=140)).chosen == "ddp"
    small = plan_memory(config, Setup(gpus=1))
    assert small.chosen is None
    needed = gpus_needed(small)
    assert needed is not None
    assert plan_memory(config, Setup(gpus=needed)).fits("fsdp2")
    assert not plan_memory(config, Setup(gpus=needed // 2)).fits("fsdp2")
    assert any(f"fits on {needed}" in remark for remark in small.remarks)


@pytest.mark.parametrize("family", ["jetmoe", "qwen3_5_moe_text"])
def test_layers_that_do_not_run_without_weights_are_estimated(family: str) -> None:
    plan = plan_memory(tiny_config(family), Setup(sequence_length=64))
    assert re.match(r"\w*Error: .", plan.untraced)
    assert plan.memory["ddp"].activations > 0
    assert any(f"do not run without weights ({plan.untraced})" in remark for remark in plan.remarks)


def test_dense_models_are_planned_with_a_remark() -> None:
    plan = plan_memory(tiny_config("qwen3"), Setup(sequence_length=64))
    assert plan.description.dense
    assert any("dense" in remark for remark in plan.remarks)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "qlora"}, "method: 'qlora' is unknown"),
        ({"layout": "flat"}, "layout: 'flat' is unknown"),
        ({"gpus": 0}, "gpus: found 0"),
        ({"gpu_memory": 0.0}, "gpu_memory: found 0.0"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Setup(**settings)


def test_configurations_are_read_from_where_they_are(tmp_path: Path) -> None:
    file = config_file(tmp_path, model_type="olmoe", num_hidden_layers=3)
    for name in (tmp_path, str(file)):
        assert read_config(name).num_hidden_layers == 3
    assert read_config("tiny-base").model_type == "qwen3_moe"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": "zork"}', "the family 'zork' .* is unknown"),
        ('{"hidden_size": 8}', "there is no model_type"),
        ("[1]", "found a list, expected an object"),
        ("{", "this is not JSON"),
        ('{"model_type": "clip"}', "no causal language model"),
    ],
)
def test_bad_configurations_are_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    assert main(["plan", str(file)]) == 1
    written = capsys.readouterr()
    assert written.out == ""
    assert len(written.err.splitlines()) == 1
    assert re.search(message, written.err), written.err


def test_a_missing_configuration_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"found no config\.json"):
        read_config(tmp_path)


def test_the_verb_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config_file(tmp_path, model_type="qwen3_moe", **LARGE)
    written = tmp_path / "new" / "accelerate.yaml"
    flags = ["--gpus", "8", "--gpu-memory", "80", "--sequence-length", "4096", "--layout", "tree"]
    assert main(["plan", str(tmp_path), *flags, "--json", "--write-accelerate-config", str(written)]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["chosen"] == "fsdp2"
    assert set(plan["bytes_per_device"]) == set(STRATEGIES)
    assert plan["model"]["total_parameters"] == plan["trained_parameters"] == 30_532_122_624
    assert written.read_text() == plan["accelerate_config"]
    # 16 bytes a parameter over 8 devices, in the table too.
    assert main(["plan", str(tmp_path), *flags]) == 0
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("fsdp2"))
    assert sum(map(float, row.split()[1:4])) == pytest.approx(2 * 30_532_122_624 / GIB, abs=0.02)
    assert row.endswith("fits")


def test_nothing_fits_is_said_and_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config_file(tmp_path, model_type="qwen3_moe", **LARGE)
    assert main(["plan", str(tmp_path), "--gpus", "1"]) == 0
    assert "Nothing fits" in capsys.readouterr().out
    assert main(["plan", str(tmp_path), "--gpus", "1", "--write-accelerate-config", str(tmp_path / "a.yaml")]) == 1
    assert "nothing fits" in capsys.readouterr().err
    assert not (tmp_path / "a.yaml").exists()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux resets the peak of a process")
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_plan_is_near_what_training_took(method: str) -> None:
    measured, planned = measured_and_planned("qwen3_moe", method, millions=40)
    assert planned == pytest.approx(measured, rel=0.15)
