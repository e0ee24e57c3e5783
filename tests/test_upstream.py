# SPDX-License-Identifier: Apache-2.0
"""Faults of the libraries under us that we work around. When a test here fails, its workaround can go."""

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer

from tests.tiny_models import tiny_random_model
from thinkfusion import ThinkFusionConfig, ThinkFusionTrainer, generate_samples, read_conversations


def test_transformers_loses_the_experts_at_a_resume(tmp_path, base_tokenizer, model):
    """`ThinkFusionTrainer._load_from_checkpoint`."""
    rows = [
        {"question": each.question, "reasoning": each.reasoning, "answer": each.answer}
        for each in generate_samples(4, seed=0)
    ]
    settings = ThinkFusionConfig(
        output_dir=str(tmp_path), max_steps=1, save_strategy="steps", save_steps=1, report_to="none", disable_tqdm=True
    )
    conversations, _ = read_conversations(rows)
    trainer = ThinkFusionTrainer(model, settings, train_dataset=conversations, processing_class=base_tokenizer)
    trainer.train()
    experts = model.model.layers[0].mlp.experts.down_proj
    trained = experts.detach().clone()
    checkpoint = str(tmp_path / "checkpoint-1")
    experts.data.zero_()
    Trainer._load_from_checkpoint(trainer, checkpoint)
    assert not experts.any()
    trainer._load_from_checkpoint(checkpoint)
    assert torch.equal(experts, trained)


def test_peft_hides_the_missing_bias_that_trl_reads(model):
    """`head.__dict__["bias"]` in `ThinkFusionTrainer.__init__`."""
    adapted = get_peft_model(
        model, LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1]})
    )
    assert not hasattr(adapted.get_output_embeddings(), "bias")


def test_accelerate_starts_one_process_on_a_cpu(tmp_path):
    """`thinkfusion.launching`."""
    script = tmp_path / "who.py"
    script.write_text("import os; print('started', os.environ.get('WORLD_SIZE'), os.environ['MASTER_PORT'])")
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "2",
        "--main_process_port",
        "29511",
    ]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(script)], capture_output=True, text=True, env=environment, check=True, timeout=120
    )
    assert done.stdout.split("\n")[:-1] == ["started None 29511"]


@pytest.mark.parametrize(
    ("family", "missing"),
    [
        ("axk1", ("topk_method", "scoring_func", "moe_layer_freq", "first_k_dense_replace")),
        ("deepseek_v3", ("topk_method", "scoring_func", "moe_layer_freq")),
        ("deepseek_v2", ("scoring_func", "moe_layer_freq")),
        ("minimax_m2", ("scoring_func", "use_routing_bias", "use_qk_norm", "rotary_dim")),
        ("qwen3_moe", ("num_experts", "rope_theta")),
        ("afmoe", ("score_func", "route_norm")),
        ("bailing_hybrid", ("score_function", "moe_router_enable_expert_bias", "use_bias")),
    ],
)
def test_transformers_does_not_write_what_servers_read(tmp_path, family, missing):
    """`exporting.server_settings` adds it; a name that is there now can go from it."""
    tiny_random_model(family).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {*missing}.isdisjoint(written)


def test_transformers_drops_a_norm_that_servers_load(tmp_path):
    """A.X K1's dense layers have one in the released checkpoints; `exporting` puts it back."""
    tiny_random_model("axk1").save_pretrained(tmp_path)
    names = [name for name in load_file(tmp_path / "model.safetensors") if "post_mlp_layernorm" in name]
    assert names
    assert not [name for name in names if name.startswith("model.layers.0.")]
