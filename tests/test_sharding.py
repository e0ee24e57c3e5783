# SPDX-License-Identifier: Apache-2.0
"""Files for accelerate: they load, name classes that are there, and what they ask for computes the same."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.dataclasses import get_module_class_from_name
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from tests.forked import run_forked
from tests.test_recipes import ONE_THREAD
from tests.tiny_models import tiny_config, tiny_random_model
from tests.two_processes import free_port
from thinkfusion.activations import decoder_layers
from thinkfusion.moe import moe_layers
from thinkfusion.planning import STRATEGIES
from thinkfusion.sharding import accelerate_config, choose_sharding, write_accelerate_config

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes" / "accelerate"
FAMILIES = (
    *("qwen3_moe", "qwen2_moe", "olmoe", "mixtral", "axk1", "axk2", "deepseek_v2", "deepseek_v3", "gpt_oss"),
    *("glm4_moe", "granitemoe", "granitemoeshared", "minimax_m2", "ernie4_5_moe", "dots1", "phimoe"),
    *("hunyuan_v1_moe", "exaone_moe", "afmoe", "qwen3_5_moe_text"),
)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment as it was, afterwards: accelerate writes into it."""
    for name in list(os.environ):
        if name.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.delenv(name)
    return monkeypatch


def launched(path: Path) -> Any:
    """The arguments that `accelerate launch --config_file` makes of a file."""
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "recipes/sft.py"])
    return _validate_launch_command(arguments)[0]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_recipes_are_what_is_chosen_for_qwen3(strategy: str) -> None:
    found = yaml.safe_load((RECIPES / f"{strategy}.yaml").read_text())
    assert found == accelerate_config(strategy, choose_sharding(tiny_config("qwen3_moe")))
    config = load_config_from_file(str(RECIPES / f"{strategy}.yaml"))
    assert (config.num_processes, config.mixed_precision) == (8, "bf16")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_classes(family: str, tmp_path: Path, environment: pytest.MonkeyPatch) -> None:
    """What accelerate makes of the files: FSDP2 wraps every decoder layer, ZeRO-3 knows the blocks of experts."""
    model = tiny_random_model(family)
    sharding = choose_sharding(model)
    file = write_accelerate_config(tmp_path / "fsdp2.yaml", "fsdp2", sharding, gpus=2)
    for name, value in prepare_multi_gpu_env(launched(file)).items():
        environment.setenv(name, str(value))
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    plugin.set_auto_wrap_policy(model)
    wrapped = plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
    layers = decoder_layers(model)
    assert len(layers) == model.config.num_hidden_layers
    assert all(type(layer) in wrapped for layer in layers)
    file = write_accelerate_config(tmp_path / "zero3.yaml", "deepspeed_zero3", sharding, gpus=2)
    given = yaml.safe_load(file.read_text())["deepspeed_config"]["deepspeed_moe_layer_cls_names"]
    leaves = {get_module_class_from_name(model, name) for name in given.split(",")}
    assert all(type(model.get_submodule(layer.block)) in leaves for layer in moe_layers(model))
    # A leaf is no whole layer: its attention would be gathered with it.
    assert not leaves & set(map(type, layers))


def test_deepspeed_is_told_of_its_leaves(tmp_path: Path, environment: pytest.MonkeyPatch) -> None:
    arguments = launched(RECIPES / "deepspeed_zero3.yaml")
    assert arguments.use_deepspeed
    assert arguments.zero_stage == 3
    arguments.deepspeed_fields_from_accelerate_config = ""  # which the launcher itself would set
    _, given = prepare_deepspeed_cmd_env(arguments)
    assert given["ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES"] == "Qwen3MoeSparseMoeBlock"
    assert given["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"].lower() == "true"


def test_implementations_are_those_the_family_supports() -> None:
    sharding = choose_sharding(tiny_config("qwen3_moe"))
    assert (sharding.experts_implementation, sharding.attn_implementation) == ("grouped_mm", "sdpa")
    model = tiny_random_model("qwen3_moe")
    assert model.get_correct_experts_implementation("grouped_mm") == "grouped_mm"
    assert choose_sharding(tiny_config("jetmoe")).experts_implementation == "eager"
    assert choose_sharding(tiny_config("gpt_oss")).attn_implementation == "eager"
    assert any("becomes padded" in remark for remark in choose_sharding(tiny_config("qwen3_5_moe_text")).remarks)
    assert choose_sharding(tiny_config("qwen3_5_moe_text"), "padded").remarks == sharding.remarks


def test_a_dense_model_has_no_leaves() -> None:
    sharding = choose_sharding(tiny_config("qwen3"))
    assert (sharding.leaf_classes, sharding.experts_implementation) == ((), None)
    assert "deepspeed_moe_layer_cls_names" not in accelerate_config("deepspeed_zero3", sharding)["deepspeed_config"]


def test_an_unknown_strategy_is_an_error() -> None:
    with pytest.raises(ValueError, match="'zero9' is unknown"):
        accelerate_config("zero9", choose_sharding(tiny_config("qwen3")))


SHARDED_RUN = """
import json, os, sys
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from tests.tiny_models import tiny_random_model
from thinkfusion.activations import Setup, decoder_layers
from thinkfusion.planning import _memory, measure_sizes
from thinkfusion.sharding import choose_sharding
from thinkfusion.trainable import lora_config

dist.init_process_group("gloo")
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
ids = torch.randint(0, 600, (2, 16), generator=torch.Generator().manual_seed(3))
found = {}
for family in sys.argv[2:]:
    for method in ("full", "lora"):
        whole, sharded = (tiny_random_model(family) for _ in range(2))
        if method == "lora":
            made = []
            for model in (whole, sharded):
                torch.manual_seed(1)
                made.append(get_peft_model(model, lora_config(model, r=4, init_lora_weights=False)))
            whole, sharded = made
        wrapped = choose_sharding(sharded).layer_classes
        planned = _memory("fsdp2", measure_sizes(sharded, Setup(method, bf16=False)), 0, 2)
        for module in list(sharded.modules()):
            if type(module).__name__ in wrapped:
                fully_shard(module, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        whole(input_ids=ids, labels=ids).loss.backward()
        own = ids[rank : rank + 1]
        sharded(input_ids=own, labels=own).loss.backward()
        expected = dict(whole.named_parameters())
        worst = max(
            ((parameter.grad.full_tensor() - expected[name].grad).norm() / expected[name].grad.norm()).item()
            for name, parameter in sharded.named_parameters()
            if expected[name].grad is not None and expected[name].grad.norm() > 1e-4
        )
        gradients = sum(p.grad.to_local().nbytes for p in sharded.parameters() if p.grad is not None)
        weights = sum(p.to_local().nbytes for p in sharded.parameters())
        found[f"{family} {method}"] = [worst, weights / planned.weights, gradients / planned.gradients]
if rank == 0:
    with open(sys.argv[1], "w") as file:
        json.dump(found, file)
dist.destroy_process_group()
# The mesh keeps gloo's threads alive beyond this. One that still holds a tensor of Python when the interpreter ends
# aborts the process (pytorch/pytorch#179291), as was seen once here, after all the work was done.
sys.stdout.flush()
os._exit(0)
"""


def test_two_processes_shard_by_these_classes_as_planned(tmp_path: Path) -> None:
    """torch's FSDP2 on two CPU processes: gradients are those of one with both rows, shards as large as planned."""
    script, result = tmp_path / "sharded.py", tmp_path / "result.json"
    script.write_text(SHARDED_RUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(free_port()), str(script), str(result), "qwen3_moe", "axk1"]
    done = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(result.read_text())
    assert len(found) == 4
    for name, (worst, weights, gradients) in found.items():
        assert worst < 1e-5, name
        assert weights == pytest.approx(1, rel=0.01), name
        assert gradients == pytest.approx(1, rel=0.02), name


def test_two_processes_train_with_the_file_of_ddp(tmp_path: Path) -> None:
    flags = ["--max_steps", "2", "--train_samples", "32", "--evaluation_samples", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(RECIPES / "ddp.yaml")]
    command += ["--num_processes", "2", "--main_process_port", str(free_port()), str(ROOT / "recipes" / "sft.py")]
    done = subprocess.run(
        [*command, *flags, "--output_dir", str(tmp_path)],
        env=ONE_THREAD,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Two steps of two processes with four rows each are half of the rows.
    assert re.search(r"'epoch': '?0\.5\b", done.stdout)
    assert (tmp_path / "model.safetensors").is_file()


def test_the_script_for_a_gpu_runs(tmp_path: Path) -> None:
    """On a tiny model, without a GPU: training, resuming and exporting are the same code."""
    config = json.loads((ROOT / "tests" / "gpu" / "qwen3_moe.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 4}
    config |= {"num_experts_per_tok": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = ["--config", str(tmp_path / "config.json"), "--json", str(tmp_path / "gpu.json"), "--any_device"]
    flags += ["--output_dir", str(tmp_path / "out")]
    environment = {**ONE_THREAD, "CUDA_VISIBLE_DEVICES": ""}
    done = run_forked(ROOT / "tests" / "gpu" / "run.py", *flags, environment=environment)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout
    assert "passed: a resumed run goes on as the whole one" in done.stdout
    assert len(json.loads((tmp_path / "gpu.json").read_text())["losses"]) == 5
