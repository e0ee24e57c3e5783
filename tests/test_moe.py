# SPDX-License-Identifier: Apache-2.0
"""Discovery of Mixture-of-Experts layers: every family on a tiny random model, by what its modules are."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from tests.tiny_models import tiny_config, tiny_random_model
from thinkfusion import describe_moe
from thinkfusion.moe import KINDS, moe_layers, parameter_kinds, read_routes, watch_routes

SOFTMAX = ("qwen3_moe", "qwen2_moe", "olmoe", "mixtral", "deepseek_v2", "gpt_oss", "granitemoe", "granitemoeshared")
SIGMOID = ("axk1", "axk2", "deepseek_v3", "glm4_moe", "minimax_m2", "dots1", "exaone_moe", "bailing_hybrid", "afmoe")
SCORES = {
    **dict.fromkeys((*SOFTMAX, "ernie4_5_moe", "hunyuan_v1_moe", "qwen3_5_moe_text"), "softmax"),
    **dict.fromkeys((*SIGMOID, "lfm2_moe"), "sigmoid"),
    "phimoe": "unknown",
}
SHARED = ("qwen2_moe", "axk1", "axk2", "deepseek_v2", "deepseek_v3", "glm4_moe", "ernie4_5_moe", "dots1", "afmoe")
SHARED += ("hunyuan_v1_moe", "exaone_moe", "bailing_hybrid", "qwen3_5_moe_text", "granitemoeshared")
BIASED = ("axk1", "axk2", "deepseek_v3", "glm4_moe", "minimax_m2", "ernie4_5_moe", "dots1", "exaone_moe", "afmoe")
BIASED += ("bailing_hybrid", "lfm2_moe")
CHANGES = {
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "granitemoeshared": {"shared_intermediate_size": 32},
    "bailing_hybrid": {"num_hidden_layers": 3, "layer_types": None, "first_k_dense_replace": 1, "n_group": 2}
    | {"topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 16},
}


def model_of(family):
    return tiny_random_model(family, **CHANGES.get(family, {}))


@pytest.mark.parametrize("family", SCORES)
def test_every_family_is_found_by_structure(family):
    model = model_of(family)
    described = describe_moe(model)
    assert described.layers
    assert described.family == model.config.model_type
    for layer in described.layers:
        assert (layer.num_experts, layer.top_k, layer.score_function) == (4, 2, SCORES[family])
        assert f".{layer.index}." in layer.block
        assert bool(layer.shared_experts) == (family in SHARED)
        assert (layer.correction_bias is not None) == (family in BIASED)
        experts = [p for name in layer.experts for p in model.get_submodule(name).parameters(recurse=False)]
        assert experts
        assert {each.shape[0] for each in experts} == {4}
    # What the figures are made of, counted another way.
    idle = sum(parameter.numel() // 2 for name, parameter in model.named_parameters() if ".experts." in name)
    assert described.total_parameters == model.num_parameters()
    assert described.active_parameters == described.total_parameters - idle
    assert sum(described.parameters.values()) == described.total_parameters
    assert "top-2" in str(described)


@pytest.mark.parametrize("family", SCORES)
def test_every_parameter_has_its_kind(family):
    model = model_of(family)
    kinds = parameter_kinds(model)
    assert set(kinds.values()) <= set(KINDS) - {"other"}
    for name, kind in kinds.items():
        if ".experts." in name:
            assert kind == "experts", name
        elif "embed_tokens" in name or name == "lm_head.weight":
            assert kind == "embeddings", name
        elif "shared" in name:
            assert kind == "shared_experts", name
        elif "norm" in name:
            assert kind == "norms", name
        elif "attn" in name or ".conv." in name:
            assert kind == "attention", name
    assert list(kinds.values()).count("router") >= len(moe_layers(model))


@pytest.mark.parametrize("family", [*SCORES, "jetmoe", "llama4_text"])
def test_routers_are_watched(family):
    model, seen = model_of(family).eval(), []
    layers = moe_layers(model)
    ids = torch.randint(1, 600, (2, 5))
    with torch.no_grad(), watch_routes(model, layers, lambda *given: seen.append(given)):
        model(input_ids=ids, use_cache=False)
    assert sorted(position for position, *_ in seen) == list(range(len(layers)))
    for position, logits, chosen in seen:
        assert logits.shape == (10, layers[position].num_experts)
        assert chosen.shape == (10, layers[position].top_k)
        assert not chosen.is_floating_point()
        if layers[position].correction_bias is None and layers[position].groups == 1 and family != "phimoe":
            assert torch.equal(chosen.sort(-1).values, logits.topk(2).indices.sort(-1).values)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    assert len(seen) == len(layers), "a hook was left behind"


def test_a_configuration_is_described_without_weights():
    config = tiny_config("deepseek_v3", n_group=2, topk_group=1)
    described = describe_moe(config)
    assert described.layers[0].groups == 2
    assert described.layers[0].score_function == "sigmoid"
    assert described.to_dict() == describe_moe(tiny_random_model("deepseek_v3", n_group=2, topk_group=1)).to_dict()


def test_describing_leaves_the_random_state_and_the_model_alone():
    model = tiny_random_model("axk1")
    before = {name: each.clone() for name, each in model.state_dict().items()}
    state = torch.get_rng_state()
    describe_moe(model)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert model.training


def test_adapters_change_no_name():
    model = tiny_random_model("qwen2_moe")
    layers, described = moe_layers(model), describe_moe(model)
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=2,
            target_modules=["q_proj", "gate_proj"],
            target_parameters=experts,
            modules_to_save=["mlp.gate"],
            trainable_token_indices={"embed_tokens": [1]},
        ),
    )
    assert moe_layers(adapted) == layers
    kinds = parameter_kinds(adapted)
    assert all(kind != "other" for kind in kinds.values())
    assert {kinds[name] for name in kinds if ".experts." in name} == {"experts"}
    assert {kinds[name] for name in kinds if "trainable_tokens" in name} == {"embeddings"}
    trained = {kinds[name] for name, each in adapted.named_parameters() if each.requires_grad}
    assert trained == {"attention", "shared_experts", "experts", "router", "embeddings"}
    assert described.num_experts == 4


def test_a_dense_model_is_described_with_a_remark():
    described = describe_moe(tiny_random_model("llama"))
    assert described.dense
    assert (described.layers, described.num_experts, described.top_k) == ((), 0, 0)
    assert described.active_parameters == described.total_parameters
    assert "dense: it has no Mixture-of-Experts layer" in str(described)


def test_an_unknown_family_is_one_error():
    class Unheard(PretrainedConfig):
        model_type = "unheard"

    with pytest.raises(ValueError, match="unheard: transformers knows no causal language model"):
        describe_moe(Unheard())


class OldBlock(nn.Module):
    """How code that comes with a checkpoint writes experts: a list of MLPs beside a linear router."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 3, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8)) for _ in range(3))
        self.top_k = 2


def test_experts_in_a_list_are_found():
    model = nn.Module()
    model.config = AutoConfig.for_model("llama")
    model.layers = nn.ModuleList([OldBlock(), nn.Linear(8, 8)])
    (layer,) = moe_layers(model)
    assert (layer.block, layer.router, layer.experts) == ("layers.0", "layers.0.gate", ("layers.0.experts",))
    assert (layer.num_experts, layer.top_k) == (3, 2)
    logits = torch.randn(5, 3)
    assert torch.equal(read_routes(layer, logits)[1], logits.topk(2).indices)
    with pytest.raises(ValueError, match="no logits of 3 experts"):
        read_routes(layer, torch.randn(5, 4))
