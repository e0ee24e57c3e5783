# SPDX-License-Identifier: Apache-2.0
"""What trains: LoRA on every kind of parameter in all families, what is frozen, and the check that the rest learns."""

import logging
import re

import pytest
import torch
from peft import get_peft_model

from tests.test_moe import SCORES, model_of
from tests.tiny_models import tiny_random_model
from thinkfusion import ThinkFusionConfig, ThinkFusionTrainer, generate_samples, load_checkpoint, lora_config
from thinkfusion.conversations import Conversation
from thinkfusion.moe import parameter_kinds
from thinkfusion.trainable import check_gradients, frozen_rows, set_trainable, trained_line

ADAPTED = ("attention", "router", "experts", "shared_experts", "dense")


def rows():
    return torch.randint(1, 600, (8, 40), generator=torch.Generator().manual_seed(0))


def step(model):
    model(input_ids=rows(), labels=rows(), use_cache=False).loss.backward()


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=rows(), use_cache=False).logits


@pytest.mark.parametrize("family", SCORES)
def test_lora_moves_all_it_targets_and_merges(family):
    before = dict(model_of(family).named_parameters())
    model = model_of(family)
    model = get_peft_model(model, lora_config(model, r=4, lora_alpha=4, train_router=True))
    trained = {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=3e-3)
    for number in range(20):
        step(model)
        if number == 0:
            check_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
    still = [name for name, each in model.named_parameters() if name in trained and torch.equal(each, trained[name])]
    assert not still
    adapted = logits(model)
    merged = model.merge_and_unload()
    # Rounding grows with the logits, and with the recurrence of linear attention.
    allowed = (1e-4 if family == "bailing_hybrid" else 1e-5) * max(1.0, float(adapted.abs().max()))
    assert torch.allclose(logits(merged), adapted, rtol=0, atol=allowed)
    # Every matrix of these kinds has moved: none was left out, as peft's own translation of names would.
    kinds = parameter_kinds(merged)
    unmoved = {
        name
        for name, each in merged.named_parameters()
        if kinds[name] in ADAPTED and each.dim() > 1 and torch.equal(each, before[name])
    }
    unadapted = re.compile(r"bias$|indexer|conv1d|conv\.conv\.")
    assert not [name for name in unmoved if not unadapted.search(name)]


@pytest.mark.parametrize("kind", ["train_router", "train_experts", "train_shared_experts", "train_attention"])
def test_each_kind_is_a_choice_of_its_own(kind):
    off = dict.fromkeys(("train_router", "train_experts", "train_shared_experts", "train_attention"), False)
    kinds = {"shared_experts", "dense"} if kind == "train_shared_experts" else {kind.removeprefix("train_")}
    for family in ("deepseek_v3", "qwen2_moe", "hunyuan_v1_moe"):
        model = tiny_random_model(family)
        adapted = get_peft_model(model, lora_config(model, **{**off, kind: True}))
        found = parameter_kinds(adapted)
        present = set(parameter_kinds(tiny_random_model(family)).values())
        assert {found[name] for name, each in adapted.named_parameters() if each.requires_grad} == kinds & present
        model = tiny_random_model(family)
        set_trainable(model, **{**off, kind: True}, train_embeddings=False)
        found = parameter_kinds(model)
        trained = {found[name] for name, each in model.named_parameters() if each.requires_grad}
        assert trained == kinds & present | {"norms"}


def test_nothing_to_adapt_is_an_error():
    off = dict.fromkeys(("train_experts", "train_shared_experts", "train_attention"), False)
    with pytest.raises(ValueError, match="found nothing to adapt in OlmoeForCausalLM"):
        lora_config(tiny_random_model("olmoe"), **off)


def test_targets_that_match_nothing_are_named():
    with pytest.raises(ValueError, match=r"target_modules: query_key_value is nowhere in the model.* q_proj"):
        lora_config(tiny_random_model("olmoe"), target_modules=["q_proj", "query_key_value"])
    with pytest.raises(ValueError, match=r"target_parameters: experts\.w1 is nowhere"):
        lora_config(tiny_random_model("olmoe"), target_parameters=["experts.w1"])


def test_a_dense_model_is_adapted():
    model = tiny_random_model("llama")
    config = lora_config(model)
    assert not config.target_parameters
    assert set(config.target_modules) >= {"q_proj", "down_proj"}


def test_all_embeddings_can_train_under_lora():
    model = tiny_random_model("qwen3_moe")
    adapted = get_peft_model(model, lora_config(model, train_embeddings=True))
    step(adapted)
    check_gradients(adapted)
    kinds = parameter_kinds(adapted)
    assert "embeddings" in {kinds[name] for name, each in adapted.named_parameters() if each.requires_grad}


def test_a_parameter_without_a_gradient_is_named_and_idle_experts_are_listed():
    model = tiny_random_model("qwen3_moe")
    with torch.no_grad():
        # Expert 3 is never chosen: its logit is that of the opposite direction of expert 0, whatever the token.
        model.model.layers[0].mlp.gate.weight[3] = 0
        model.model.layers[0].mlp.gate.weight[:3] *= 1e-3
    step(model)
    unused = torch.zeros(4, 64, 32)
    unused[:3] = model.model.layers[0].mlp.experts.down_proj.grad[:3]
    model.model.layers[0].mlp.experts.down_proj.grad = unused
    assert check_gradients(model) == ["model.layers.0.mlp.experts.down_proj: 3"]
    model.model.layers[1].self_attn.q_proj.weight.grad = None
    model.model.layers[1].mlp.gate.weight.grad.zero_()
    with pytest.raises(
        ValueError, match=r"2 parameters are meant to train.*layers\.1\.self_attn\.q_proj\.weight.*gate"
    ):
        check_gradients(model)


def test_idle_experts_of_adapters_are_listed():
    model = tiny_random_model("qwen3_moe")
    model = get_peft_model(model, lora_config(model, r=2))
    step(model)
    (name, weight) = next(
        (name, each) for name, each in model.named_parameters() if ".experts." in name and ".lora_B." in name
    )
    weight.grad.reshape(weight.shape[0], -1, 4)[:, :, 2] = 0
    assert check_gradients(model) == [f"{name}: 2"]


def test_parts_that_only_choose_are_frozen_with_a_remark(caplog):
    model = tiny_random_model("axk2")
    with caplog.at_level(logging.WARNING):
        set_trainable(model)
    assert "choose among keys are frozen" in caplog.text
    step(model)
    check_gradients(model)


def test_one_line_says_what_trains():
    model = tiny_random_model("axk1")
    set_trainable(model, train_router=False, train_embeddings=False, control_ids=[1, 2])
    line = trained_line(model)
    assert "embeddings 256" in line  # two rows of 64, in two embeddings
    assert line.endswith("frozen: router.")
    assert frozen_rows(model) == {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_training_moves_only_what_it_is_asked_to(tmp_path, caplog, weight_decay):
    model, tokenizer = load_checkpoint("tiny-base", dtype="float32")
    args = ThinkFusionConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        learning_rate=1e-2,
        weight_decay=weight_decay,
        train_embeddings=False,
        train_experts=False,
        report_to="none",
        save_strategy="no",
        gradient_checkpointing=False,
    )
    data = [
        Conversation.from_messages(
            [
                {"role": "user", "content": each.question},
                {"role": "assistant", "reasoning_content": each.reasoning, "content": each.answer},
            ]
        )
        for each in generate_samples(32, seed=1)
    ]
    trainer = ThinkFusionTrainer(model, args, train_dataset=data, processing_class=tokenizer)
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    with caplog.at_level(logging.INFO):
        trainer.train()
    assert "Trains " in caplog.text
    kinds = parameter_kinds(model)
    for name, each in model.named_parameters():
        moved = (each != before[name]).reshape(each.shape[0], -1).any(1)
        if kinds[name] == "experts":
            assert not moved.any(), name
        elif kinds[name] == "embeddings":
            assert set(moved.nonzero().flatten().tolist()) <= set(trainer._control_ids), name
            assert moved.any(), name
        else:
            assert moved.any(), name


def test_training_stops_if_something_does_not_learn(tmp_path):
    model, tokenizer = load_checkpoint("tiny-base", dtype="float32")
    model.forgotten = torch.nn.Linear(4, 4)
    args = ThinkFusionConfig(output_dir=str(tmp_path), max_steps=2, report_to="none", save_strategy="no")
    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "reasoning_content": "2", "content": "3"}]
    data = [Conversation.from_messages(messages)] * 8
    trainer = ThinkFusionTrainer(model, args, train_dataset=data, processing_class=tokenizer)
    with pytest.raises(ValueError, match=r"got no gradient in the first step: forgotten\.weight, forgotten\.bias"):
        trainer.train()
