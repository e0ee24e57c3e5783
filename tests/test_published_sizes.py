# SPDX-License-Identifier: Apache-2.0
"""Total and active parameters of released models, from their published configurations, on `meta`."""

from typing import Any, NamedTuple

import pytest
from transformers import AutoConfig

from thinkfusion import describe_moe


class Published(NamedTuple):
    config: dict[str, Any]
    """The settings of the released config.json that decide about sizes."""
    total: float
    """Published parameters, in billions."""
    active: float
    layers: int
    """Mixture-of-Experts layers."""
    embeddings: str
    """What of the embeddings the published active parameters contain: "both", "output" or "none"."""
    counted: int
    """What we count, to one, so that a change of counting shows: not a published figure."""
    rounding: float = 0.0
    """By how much the published active parameters are rounded or cut, where 1 % of so short a figure is less."""


LATENT = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
}

PUBLISHED = {
    # Model card and technical report (arXiv 2601.09200): 61 layers, 1 of them dense, 192 + 1 experts, 8 + 1 active.
    "A.X K1": Published(
        {
            **LATENT,
            "model_type": "axk1",
            "vocab_size": 163840,
            "num_attention_heads": 64,
            "num_key_value_heads": 64,
            "n_routed_experts": 192,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
        519,
        33,
        60,
        "both",
        518_983_052_288,
    ),
    # Technical report (arXiv 2505.09388): 30.5 B and "3B"; model card: 3.3 B, which is 3.35 cut.
    "Qwen3-30B-A3B": Published(
        {
            "model_type": "qwen3_moe",
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
        },
        30.5,
        3.3,
        48,
        "both",
        30_532_122_624,
        0.1,
    ),
    # OLMoE (arXiv 2409.02060).
    "OLMoE-1B-7B": Published(
        {
            "model_type": "olmoe",
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
        },
        6.9,
        1.3,
        16,
        "both",
        6_919_161_856,
        0.05,
    ),
    # The repository's README_WEIGHTS: 671 B and 36.7 B (37 B in the report, arXiv 2412.19437). It says that both
    # embeddings are in it; the arithmetic gives 36.6 with the output's alone, and 37.6 with both.
    "DeepSeek-V3": Published(
        {
            **LATENT,
            "model_type": "deepseek_v3",
            "vocab_size": 129280,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "n_routed_experts": 256,
            "first_k_dense_replace": 3,
        },
        671,
        36.7,
        58,
        "output",
        671_026_404_352,
    ),
    # Technical report (arXiv 2508.06471): 106 B and 12 B, which is the count without embeddings and output head.
    "GLM-4.5-Air": Published(
        {
            "model_type": "glm4_moe",
            "vocab_size": 151552,
            "hidden_size": 4096,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 46,
            "num_attention_heads": 96,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "attention_bias": True,
            "use_qk_norm": False,
            "n_routed_experts": 128,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "first_k_dense_replace": 1,
        },
        106,
        12,
        45,
        "none",
        106_852_245_504,
        0.5,
    ),
    # Model card (arXiv 2508.10925): 20.91 B and 3.61 B; "unembedding parameters are counted, embeddings are not".
    "gpt-oss-20b": Published(
        {
            "model_type": "gpt_oss",
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 24,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
        },
        20.9,
        3.6,
        24,
        "output",
        20_914_757_184,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_those_published(name: str) -> None:
    published = PUBLISHED[name]
    settings = dict(published.config)
    found = describe_moe(AutoConfig.for_model(settings.pop("model_type"), **settings))
    assert found.total_parameters == published.counted
    assert found.total_parameters / 1e9 == pytest.approx(published.total, rel=0.01)
    left_out = {
        "both": 0,
        "output": found.input_embeddings,
        "none": found.parameters["embeddings"],
    }[published.embeddings]
    active = (found.active_parameters - left_out) / 1e9
    assert active == pytest.approx(published.active, abs=0.01 * published.active + published.rounding)
    assert len(found.layers) == published.layers
    assert (found.num_experts, found.top_k) == _experts(published.config)


def _experts(config: dict[str, Any]) -> tuple[int, int]:
    names = ("num_experts", "n_routed_experts", "num_local_experts")
    return next(config[name] for name in names if name in config), config["num_experts_per_tok"]


def test_active_parameters_are_those_of_a_sum_by_hand() -> None:
    settings = dict(PUBLISHED["Qwen3-30B-A3B"].config)
    found = describe_moe(AutoConfig.for_model(settings.pop("model_type"), **settings))
    attention = 2048 * 128 * (32 + 4 + 4 + 32) + 2 * 128
    layer = attention + 2048 * 128 + 8 * 3 * 2048 * 768 + 2 * 2048
    assert found.active_parameters == 48 * layer + 2048 + 2 * 151936 * 2048
