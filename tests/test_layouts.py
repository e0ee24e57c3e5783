# SPDX-License-Identifier: Apache-2.0
"""The layouts of training: trees, packed and padded sequences train the same, in every setting of the trainer."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3NextConfig
from trl import SFTConfig, SFTTrainer

from tests.families import make_messages
from thinkfusion import (
    Conversation,
    Mode,
    ModeEvaluationCallback,
    ThinkFusionConfig,
    ThinkFusionTrainer,
    install_chat_template,
    load_checkpoint,
    lora_config,
    prepare,
)
from thinkfusion.tree_attention import RowLayout, tree_attention
from thinkfusion.weighting import ModeWeights


def conversations(count: int = 6) -> list[Conversation]:
    """Of one to three turns, every other with tools."""
    return [
        Conversation.from_messages(make_messages("en", turns=1 + number % 3, system=number % 2 == 0, tools=number == 4))
        for number in range(count)
    ]


def config(folder, **settings) -> ThinkFusionConfig:
    defaults = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "disable_tqdm": True,
    }
    return ThinkFusionConfig(**defaults | settings)


UNTREATED = {"control_token_learning_rate": 1e-3, "control_token_weight": 1.0}
"""The new control tokens of the base trained as everything else, as plain computations have it."""


def logged(trainer, name: str) -> list[float]:
    return [record[name] for record in trainer.state.log_history if name in record]


@pytest.fixture
def trained(tmp_path, tiny_models):
    """Trains a fresh model of two layers, and returns its trainer."""

    def train(rows=None, *, adapter=False, evaluated=None, **settings):
        model, tokenizer = tiny_models(), load_checkpoint("tiny-base")[1]
        model.config.max_position_embeddings = 4096
        folder = settings.pop("folder", tmp_path)
        resume = settings.pop("resume", None)
        install_chat_template(tokenizer, model, scheme=settings.get("scheme", "control"))
        trainer = ThinkFusionTrainer(
            model,
            config(folder, **settings),
            train_dataset=conversations() if rows is None else rows,
            eval_dataset=evaluated,
            processing_class=tokenizer,
            peft_config=lora_config(model, tokenizer) if adapter else None,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return train


def whole_batch(layout: str, rows: int) -> dict:
    """Settings under which a step sees all of six conversations: 12 exchanges, so 18 sequences or 6 trees."""
    return {"sequence_layout": layout, "per_device_train_batch_size": rows, "max_steps": 3}


@pytest.mark.parametrize("scheme", ["control", "empty-block"])
def test_all_layouts_train_the_same(trained, scheme):
    histories = []
    for layout, size in (("padded", 24), ("packed", 24), ("tree", 6)):
        trainer = trained(scheme=scheme, **whole_batch(layout, size))
        assert trainer.sequence_layout == layout
        histories.append(
            [logged(trainer, name) for name in ("loss", "loss_thinking", "loss_non_thinking", "grad_norm")]
        )
        tokens = [logged(trainer, f"tokens_{mode}")[-1] for mode in Mode]
        assert tokens == [3 * trainer.row_report.tokens[mode.value] for mode in Mode]
    for other in histories[1:]:
        torch.testing.assert_close(torch.tensor(other), torch.tensor(histories[0]), rtol=2e-5, atol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
        {"gradient_checkpointing": True},
        {"tokens_per_row": 6000, "per_device_train_batch_size": 1},
        {"tokens_per_row": 1000, "per_device_train_batch_size": 50},
    ],
    ids=["accumulation", "checkpointing", "one row", "split"],
)
def test_no_setting_of_memory_changes_what_is_learned(trained, settings):
    plain = trained(**whole_batch("tree", 6))
    other = trained(**whole_batch("tree", 6) | settings)
    if settings.get("tokens_per_row") == 1000:
        assert other.train_dataset.report.split >= 1
    for name in ("loss", "loss_thinking", "loss_non_thinking"):
        torch.testing.assert_close(
            torch.tensor(logged(other, name)), torch.tensor(logged(plain, name)), rtol=5e-5, atol=0
        )


def test_trees_train_adapters_as_padded_batches_do(trained):
    losses = [
        logged(trained(adapter=True, **whole_batch(layout, size)), "loss")
        for layout, size in (("padded", 24), ("tree", 6))
    ]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=2e-5, atol=0)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("weights", [{}, {"normalise_by_mode": True}], ids=["plain", "by mode"])
def test_the_evaluation_loss_is_that_of_all_tokens_whatever_the_layout(trained, weights):
    found = []
    for layout, size in (("padded", 3), ("packed", 5), ("tree", 1)):
        trainer = trained(
            evaluated=conversations(5),
            per_device_eval_batch_size=size,
            sequence_layout=layout,
            learning_rate=0.0,
            max_steps=1,
            **weights,
        )
        metrics = trainer.evaluate()
        found.append([metrics[name] for name in ("eval_loss", "eval_loss_thinking", "eval_loss_non_thinking")])
    torch.testing.assert_close(torch.tensor(found[1:]), torch.tensor([found[0]] * 2), rtol=2e-5, atol=0)
    if weights:
        assert found[0][0] == pytest.approx((found[0][1] + found[0][2]) / 2)


def test_a_resumed_run_of_trees_goes_on_as_if_never_stopped(trained, tmp_path):
    settings = {
        "max_steps": 7,  # three batches an epoch
        "save_strategy": "steps",
        "save_steps": 4,
        "train_sampling_strategy": "random",
        "tokens_per_row": 1200,
        "per_device_train_batch_size": 1,
    }
    whole = trained(conversations(9), folder=tmp_path / "whole", **settings)
    assert whole.train_dataset.report.rows > 2
    resumed = trained(
        conversations(9), folder=tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-4"), **settings
    )
    for name in ("loss", "loss_thinking", "grad_norm"):
        assert logged(resumed, name)[-3:] == logged(whole, name)[-3:]


def test_the_order_of_rows_follows_the_seed_and_changes_with_the_epoch(trained):
    settings = {
        "train_sampling_strategy": "random",
        "per_device_train_batch_size": 1,
        "max_steps": 12,
        "learning_rate": 0.0,
        "control_token_weight": 1.0,  # by default it falls from step to step
    }
    runs = [logged(trained(seed=seed, **settings), "loss") for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert sorted(runs[0][:6]) == pytest.approx(sorted(runs[0][6:]), rel=1e-6)
    assert runs[0][:6] != runs[0][6:]


def test_a_stream_of_trees_trains_like_a_file(trained, caplog):
    caplog.set_level(logging.INFO, logger="thinkfusion.training")
    losses = []
    for streaming in (False, True):
        tokenizer = load_checkpoint("tiny-base")[1]
        install_chat_template(tokenizer)
        data, _ = prepare(conversations(), tokenizer, streaming=streaming)
        trainer = trained(data, tokens_per_row=3000, per_device_train_batch_size=1, max_steps=3)
        losses.append(logged(trainer, "loss"))
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3
    # The file's rows are known at once, the stream's when it has been read to its end.
    first, second = [record.message for record in caplog.records if "sequences of" in record.message]
    assert first == second


def test_a_mode_counts_as_much_as_its_weight_says(trained):
    """Against the logged losses of the modes, which no weight changes; a step in two batches is one step."""
    plain = trained(max_steps=1, per_device_train_batch_size=6, **UNTREATED)
    thinking, non_thinking = (logged(plain, f"loss_{mode}")[0] for mode in Mode)
    n_thinking, n_non_thinking = (logged(plain, f"tokens_{mode}")[0] for mode in Mode)
    assert logged(plain, "loss")[0] == pytest.approx(
        (n_thinking * thinking + n_non_thinking * non_thinking) / (n_thinking + n_non_thinking), rel=1e-4
    )
    weights = {"thinking": 0.25, "non_thinking": 3}
    for settings, expected in (
        ({"normalise_by_mode": True}, (thinking + non_thinking) / 2),
        ({"normalise_by_mode": True, "mode_weights": weights}, (0.25 * thinking + 3 * non_thinking) / 3.25),
        (
            {"mode_weights": json.dumps(weights)},
            (0.25 * n_thinking * thinking + 3 * n_non_thinking * non_thinking)
            / (0.25 * n_thinking + 3 * n_non_thinking),
        ),
        ({"mode_weights": {"thinking": 2, "non_thinking": 2}}, logged(plain, "loss")[0]),
    ):
        for layout, size, accumulation in (("tree", 6, 1), ("tree", 2, 3), ("padded", 9, 2)):
            trainer = trained(
                max_steps=1,
                sequence_layout=layout,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulation,
                **settings,
                **UNTREATED,
            )
            assert logged(trainer, "loss")[0] == pytest.approx(expected, rel=1e-4)
            assert logged(trainer, "loss_thinking")[0] == pytest.approx(thinking, rel=1e-4)


def test_a_step_of_one_mode_has_that_modes_mean():
    factors, divisor = ModeWeights((1.0, 1.0), by_mode=True).factors(torch.tensor([4, 0]))
    assert (factors / divisor).tolist() == [0.25, 1.0]
    assert ModeWeights().plain
    assert ModeWeights((2.0, 2.0)).plain
    assert not ModeWeights((2.0, 1.0)).plain


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"thinking": 0}, "mode_weights: found 0 for thinking, expected a number above 0"),
        ({"thinking": True}, "found True for thinking"),
        ("[1, 2]", r"mode_weights: found '\[1, 2\]', expected weights by mode"),
        ("{", "mode_weights: found '{', expected weights by mode"),
        ({"both": 1.0}, "unknown mode 'both'"),
    ],
)
def test_weights_that_make_no_sense_are_refused(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, mode_weights=given)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequence_layout": "trees"}, "sequence_layout: 'trees' is unknown; choose one of tree, packed, padded"),
        ({"sequence_layout": "padded", "tokens_per_row": 9}, "tokens_per_row: only for rows of trees"),
        ({"tokens_per_row": 0}, "tokens_per_row: found 0, expected at least 1"),
        (
            {"tokens_per_row": 9, "max_length": 10},
            "max_length: 10 is more than tokens_per_row, 9. Raise tokens_per_row",
        ),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy: rows have no padding"),
        ({"mode_weights": {"thinking": 2}, "loss_type": "dft"}, "only for loss_type='nll'"),
    ],
)
def test_settings_of_rows_that_clash_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)


def test_a_sequence_longer_than_a_row_is_a_bad_row(trained, caplog):
    with pytest.raises(
        ValueError, match=r"row 5: .*tokens, and max_length is 300\. Raise it .and tokens_per_row.*too_long"
    ):
        trained(tokens_per_row=300)
    with caplog.at_level(logging.INFO, logger="thinkfusion.training"):
        trainer = trained(tokens_per_row=300, on_long_row="drop", max_skipped=1.0, max_steps=1)
    assert trainer.row_report.skipped == {"too_long": 1}
    report = trainer.train_dataset.report
    assert report.conversations == 5
    assert f"in {report.rows} rows of at most 300" in caplog.text


def test_a_model_whose_layers_cannot_branch_gets_padded_sequences(tmp_path, caplog):
    tokenizer = load_checkpoint("tiny-base")[1]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        Qwen3NextConfig(
            vocab_size=1088,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
            layer_types=["linear_attention", "full_attention"],
        )
    )
    trainer = ThinkFusionTrainer(
        model, config(tmp_path, max_steps=1), train_dataset=conversations(2), processing_class=tokenizer
    )
    lines = [record.message for record in caplog.records if "sequence_layout" in record.message]
    assert len(lines) == 1
    assert "'padded' in place of 'tree', since Qwen3NextForCausalLM has layers of another kind" in lines[0]
    assert trainer.sequence_layout == "padded"
    trainer.train()
    with pytest.raises(ValueError, match=r"tokens_per_row: needs rows, and Qwen3NextForCausalLM has layers"):
        ThinkFusionTrainer(
            model, config(tmp_path, tokens_per_row=99), train_dataset=conversations(2), processing_class=tokenizer
        )


def test_what_would_tear_rows_apart_is_refused(trained):
    with pytest.raises(ValueError, match="torch_compile: not for rows of trees"):
        trained(torch_compile=True)
    with pytest.raises(ValueError, match=r"parallelism_config .*: not for rows of trees .*sequence_layout='padded'"):
        trained(parallelism_config=SimpleNamespace(cp_enabled=True, sp_enabled=False))


def test_the_balance_loss_of_the_checkpoint_counts_the_tokens_of_rows(trained):
    """transformers' own; padding would be left out by the mask, and rows have none on a CPU."""
    trainer = trained(
        max_steps=1,
        per_device_train_batch_size=6,
        router_aux_loss_coef=0.5,
        learning_rate=0.0,
        control_token_weight=1.0,
    )
    model, (batch,) = trainer.model, list(trainer.get_train_dataloader())
    nodes, _, labels = batch.pop("nodes"), batch.pop("modes"), batch.pop("labels")
    with torch.no_grad(), tree_attention(model):
        outputs = model(**batch, tree_layout=RowLayout(nodes), output_router_logits=True)
    nll = torch.nn.functional.cross_entropy(outputs.logits[0, :-1], labels[0, 1:], ignore_index=-100)
    assert logged(trainer, "aux_loss")[0] == pytest.approx(outputs.aux_loss.item(), rel=1e-5)
    assert logged(trainer, "loss")[0] == pytest.approx(nll.item() + 0.5 * outputs.aux_loss.item(), rel=1e-5)


def test_an_attention_that_takes_no_mask_is_refused(tmp_path, tiny_models, base_tokenizer):
    model = tiny_models()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        ValueError, match=r"attn_implementation: 'flash_attention_2' cannot take .*'sdpa', or set sequence"
    ):
        ThinkFusionTrainer(model, config(tmp_path), train_dataset=conversations(2), processing_class=base_tokenizer)


def test_a_layer_that_went_its_own_way_stops_training(trained, monkeypatch):
    """Documents would be mixed without a word: the attention is all that keeps them apart."""
    monkeypatch.setattr("thinkfusion.training.ThinkFusionTrainer._attention", lambda self: torch.no_grad())
    with pytest.raises(ValueError, match=r"0 of the model's 2 layers took the attention of rows.*padded"):
        trained(max_steps=1)


def test_generation_during_training_has_the_models_own_attention(trained, tmp_path, tiny_models):
    model, tokenizer = tiny_models(), load_checkpoint("tiny-base")[1]
    trainer = ThinkFusionTrainer(
        model, config(tmp_path, max_steps=2), train_dataset=conversations(3), processing_class=tokenizer
    )
    callback = ModeEvaluationCallback(trainer, every_steps=1, samples=2, max_new_tokens=4)
    trainer.add_callback(callback)
    trainer.train()
    assert sorted(callback.reports) == [1, 2]
    assert model.config._attn_implementation == "sdpa"
    trainer.save_model(str(tmp_path / "saved"))
    assert "thinkfusion_tree" not in (tmp_path / "saved" / "config.json").read_text(encoding="utf-8")


def test_a_collator_of_ones_own_needs_padded_sequences(tmp_path, model, base_tokenizer):
    with pytest.raises(ValueError, match="data_collator: rows have their own; set sequence_layout='padded'"):
        ThinkFusionTrainer(
            model,
            config(tmp_path),
            train_dataset=conversations(2),
            processing_class=base_tokenizer,
            data_collator=lambda rows: {},
        )


def test_padded_sequences_train_as_trls_own_trainer_does(trained, tmp_path, tiny_models):
    """The same sequences, labels and batches: our trainer adds the modes, and changes nothing."""
    ours = trained(sequence_layout="padded", per_device_train_batch_size=6, max_steps=3, **UNTREATED)
    tokenizer = load_checkpoint("tiny-base")[1]
    model = tiny_models()
    install_chat_template(tokenizer, model)
    data, _ = prepare(conversations(), tokenizer)
    settings = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=6,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        max_length=None,
        bf16=False,
        router_aux_loss_coef=0.0,
        use_cpu=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    peer = SFTTrainer(
        model, settings, train_dataset=data.select_columns(["input_ids", "labels"]), processing_class=tokenizer
    )
    peer.train()
    assert logged(ours, "loss") == pytest.approx(logged(peer, "loss"), rel=1e-6)
