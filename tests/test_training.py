# SPDX-License-Identifier: Apache-2.0
"""The trainer: losses by mode, resuming, LoRA that reaches experts and control tokens, settings that clash."""

import json
import math

import pytest
import torch
from peft import LoraConfig

from thinkfusion import (
    Conversation,
    DataError,
    Mode,
    ModeEvaluationCallback,
    RecordOptions,
    ThinkFusionConfig,
    ThinkFusionTrainer,
    expand,
    export_checkpoint,
    generate_samples,
    install_chat_template,
    load_checkpoint,
    lora_config,
    prepare,
    task_prompts,
)
from thinkfusion.trainable import expert_parameters

ALL = RecordOptions(max_skipped=1.0)


def conversations(count: int = 16) -> list[Conversation]:
    return [
        Conversation.from_messages(
            [
                {"role": "user", "content": sample.question},
                {"role": "assistant", "content": sample.answer, "reasoning_content": sample.reasoning},
            ]
        )
        for sample in generate_samples(count, seed=3)
    ]


def config(folder, **settings) -> ThinkFusionConfig:
    defaults = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    return ThinkFusionConfig(**defaults | settings)


def logged(trainer, name: str) -> list[float]:
    return [record[name] for record in trainer.state.log_history if name in record]


def test_losses_by_mode_are_the_means_of_their_tokens(tmp_path, base_tokenizer, model):
    rows = conversations(2)
    settings = config(tmp_path, max_steps=1, learning_rate=0.0, control_token_weight=1.0)
    trainer = ThinkFusionTrainer(model, settings, train_dataset=rows, processing_class=base_tokenizer)
    trainer.train()
    data, _ = prepare(rows, base_tokenizer)
    sums = {mode: [0.0, 0] for mode in Mode}
    for row in data:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        sums[list(Mode)[row["mode"]]][0] += loss.item()
        sums[list(Mode)[row["mode"]]][1] += int((labels != -100).sum())
    for mode, (total, count) in sums.items():
        assert logged(trainer, f"loss_{mode}")[0] == pytest.approx(total / count, rel=1e-5)
        assert logged(trainer, f"tokens_{mode}")[0] == count == trainer.row_report.tokens[mode.value]
    both = sum(total for total, _ in sums.values()) / sum(count for _, count in sums.values())
    assert logged(trainer, "loss")[0] == pytest.approx(both, rel=1e-4)


def test_it_learns_and_logs_evaluation_losses(tmp_path, base_tokenizer, model):
    settings = config(tmp_path, max_steps=12, learning_rate=5e-3, eval_strategy="steps", eval_steps=6)
    trainer = ThinkFusionTrainer(
        model, settings, train_dataset=conversations(8), eval_dataset=conversations(4), processing_class=base_tokenizer
    )
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0] - 0.5
    for mode in Mode:
        assert len(logged(trainer, f"eval_loss_{mode}")) == 2
    assert logged(trainer, "tokens_thinking")[-1] > logged(trainer, "tokens_thinking")[0]


def test_batches_and_accumulation_give_the_same_losses(tmp_path, tiny_models):
    histories = []
    for size, accumulation in ((4, 1), (1, 4)):
        model, tokenizer = tiny_models(), load_checkpoint("tiny-base")[1]
        settings = config(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
        trainer = ThinkFusionTrainer(model, settings, train_dataset=conversations(8), processing_class=tokenizer)
        trainer.train()
        histories.append([logged(trainer, name) for name in ("loss", "loss_thinking", "loss_non_thinking")])
    torch.testing.assert_close(torch.tensor(histories[0]), torch.tensor(histories[1]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_resuming_gives_the_losses_of_the_run_never_stopped(tmp_path, tiny_models, lora):
    names = ("loss", "loss_thinking", "loss_non_thinking", "tokens_thinking", "grad_norm")

    def run(folder, resume=None):
        model, tokenizer = tiny_models(), load_checkpoint("tiny-base")[1]
        # Five batches an epoch: the checkpoint lies before its edge, the end behind it. Adapters have dropout.
        settings = config(folder, max_steps=8, learning_rate=1e-2, save_strategy="steps", save_steps=4)
        install_chat_template(tokenizer, model)
        adapter = None
        if lora:
            adapter = lora_config(model, tokenizer, train_experts=False, lora_dropout=0.2)
        trainer = ThinkFusionTrainer(
            model, settings, train_dataset=conversations(10), processing_class=tokenizer, peft_config=adapter
        )
        trainer.add_callback(
            ModeEvaluationCallback(trainer, task_prompts(2), every_steps=3, batch_size=2, max_new_tokens=4)
        )
        trainer.train(resume_from_checkpoint=resume)
        return [logged(trainer, name) for name in names], trainer.model

    whole, model = run(tmp_path / "whole")
    resumed, again = run(tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoint-4"))
    assert len(whole[0]) == 8
    assert whole == resumed
    for (name, weight), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(weight, other), name


def test_resuming_with_lora_on_experts(tmp_path, tiny_models):
    def run(folder, resume=None):
        model, tokenizer = tiny_models(), load_checkpoint("tiny-base")[1]
        install_chat_template(tokenizer, model)
        settings = config(folder, max_steps=6, learning_rate=1e-2, save_strategy="steps", save_steps=3)
        trainer = ThinkFusionTrainer(
            model,
            settings,
            train_dataset=conversations(10),
            processing_class=tokenizer,
            peft_config=lora_config(model, tokenizer, r=4),
        )
        trainer.train(resume_from_checkpoint=resume)
        return logged(trainer, "loss")

    assert run(tmp_path / "whole") == run(tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoint-3"))


def test_a_checkpoint_of_another_model_is_refused(tmp_path, base_tokenizer, model, tiny_models):
    trainer = ThinkFusionTrainer(
        model, config(tmp_path, max_steps=1), train_dataset=conversations(4), processing_class=base_tokenizer
    )
    other = tiny_models()
    other.save_pretrained(tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    path.write_text(path.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(ValueError, match=r"does not fit the model; missing: \['model.layers.2"):
        trainer._load_from_checkpoint(str(tmp_path / "other"))


def test_measuring_the_modes_changes_nothing(tmp_path, tiny_models):
    histories = []
    for measured in (False, True):
        model, tokenizer = tiny_models(), load_checkpoint("tiny-base")[1]
        model.config.attention_dropout = 0.1
        trainer = ThinkFusionTrainer(
            model, config(tmp_path), train_dataset=conversations(8), processing_class=tokenizer
        )
        if measured:
            callback = ModeEvaluationCallback(trainer, every_steps=2, samples=8, batch_size=8, max_new_tokens=5)
            trainer.add_callback(callback)
        trainer.train()
        histories.append([logged(trainer, "loss"), logged(trainer, "loss_thinking")])
    assert histories[0] == histories[1]
    assert sorted(callback.reports) == [2, 4]
    assert callback.reports[4].samples == 8
    for mode in Mode:
        assert logged(trainer, f"eval_truncated_{mode}") == [
            callback.reports[step].modes[mode.value]["truncated"] for step in (2, 4)
        ]


@pytest.mark.parametrize("tied", [True, False])
def test_lora_trains_experts_and_control_tokens_and_merges(tmp_path, base_tokenizer, tiny_models, tied):
    model = tiny_models(tied=tied)
    install_chat_template(base_tokenizer, model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = config(tmp_path, max_steps=6, learning_rate=1e-2, gradient_checkpointing=True)
    trainer = ThinkFusionTrainer(
        model,
        settings,
        train_dataset=conversations(8),
        processing_class=base_tokenizer,
        peft_config=lora_config(model, base_tokenizer, r=4),
    )
    trainer.train()
    still = [n for n, p in trainer.model.named_parameters() if p.requires_grad and "lora_B" in n and not p.any()]
    assert not still
    trainer.model.eval()
    ids = torch.tensor([base_tokenizer("What is 2 + 2?")["input_ids"]])
    with torch.no_grad():
        logits = trainer.model(ids).logits
    export_checkpoint(trainer.model, base_tokenizer, tmp_path / "merged")
    merged, tokenizer = load_checkpoint(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, logits, rtol=0, atol=1e-5)
    after = dict(merged.named_parameters())
    assert len(expert_parameters(merged)) == 4
    for name in expert_parameters(merged):
        assert not torch.equal(after[name], before[name]), name
    for name in (name for name in before if "mlp.gate." in name):
        assert torch.equal(after[name], before[name]), name
    control = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<think>", "</think>"])
    layers = ["model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"])
    for name in layers:
        changed = (after[name] != before[name]).any(dim=1).nonzero().flatten().tolist()
        assert set(changed) <= set(control), name
        # <|im_start|> is never a label, so that an output row of its own has nothing to learn but to be unlikely.
        assert set(control[1:] if name == "lm_head.weight" else control) <= set(changed), name


def test_a_model_given_by_name_and_lora_by_default(tmp_path):
    trainer = ThinkFusionTrainer(
        "tiny-base", config(tmp_path, max_steps=1), train_dataset=conversations(4), peft_config=True
    )
    trainer.train()
    assert trainer.processing_class.eos_token == "<|im_end|>"
    assert any("experts" in name for name, p in trainer.model.named_parameters() if p.requires_grad)
    assert math.isfinite(logged(trainer, "loss")[0])


def test_a_file_as_data_set(tmp_path, base_tokenizer, model):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"question": each.question, "reasoning": each.reasoning, "answer": each.answer}
        for each in generate_samples(4, seed=0)
    ]
    rows.append({"question": "a", "reasoning": "b", "answer": " "})
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl, row 5: .*\[empty_answer\]"):
        ThinkFusionTrainer(model, config(tmp_path), train_dataset=str(path), processing_class=base_tokenizer)
    settings = config(tmp_path, on_bad_row="skip", max_skipped=1.0)
    trainer = ThinkFusionTrainer(model, settings, train_dataset=str(path), processing_class=base_tokenizer)
    assert trainer.row_report.to_dict()["skipped"] == {"empty_answer": 1}
    assert (trainer.row_report.read, trainer.row_report.kept) == (5, 4)


def test_settings_that_clash_are_refused(tmp_path, tokenizer, model, tiny_models):
    with pytest.raises(ValueError, match="packing: not for ThinkFusionTrainer"):
        config(tmp_path, packing=True, max_length=64)
    with pytest.raises(ValueError, match="mixture: 'both' is unknown; choose one of paired, combined"):
        config(tmp_path, mixture="both")
    with pytest.raises(ValueError, match="unknown scheme 'x'"):
        config(tmp_path, scheme="x")
    rows = conversations(2)
    with pytest.raises(ValueError, match="the tokenizer has 1,028 tokens, and the model embeddings for 1,024"):
        ThinkFusionTrainer(model, config(tmp_path), train_dataset=rows, processing_class=tokenizer)
    model.resize_token_embeddings(1088)
    with pytest.raises(ValueError, match="has the scheme 'control'"):
        ThinkFusionTrainer(
            model, config(tmp_path, scheme="empty-block"), train_dataset=rows, processing_class=tokenizer
        )
    with pytest.raises(ValueError, match="more than the model's 512 positions"):
        ThinkFusionTrainer(model, config(tmp_path, max_length=600), train_dataset=rows, processing_class=tokenizer)
    fresh = tiny_models()
    install_chat_template(load_checkpoint("tiny-base")[1], fresh)
    with pytest.raises(ValueError, match="the control tokens are new, and this configuration does not train them"):
        ThinkFusionTrainer(
            fresh,
            config(tmp_path),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=LoraConfig(target_modules=["q_proj"]),
        )
    with pytest.raises(TypeError, match="expected a ThinkFusionConfig"):
        ThinkFusionTrainer(model, None, train_dataset=rows, processing_class=tokenizer)
    with pytest.raises(ValueError, match="processing_class: missing"):
        ThinkFusionTrainer(model, config(tmp_path), train_dataset=rows)
    with pytest.raises(DataError, match="row 1: found int, expected an object"):
        ThinkFusionTrainer(model, config(tmp_path), train_dataset=[1, 2], processing_class=tokenizer)
    with pytest.raises(ValueError, match="every_steps"):
        ModeEvaluationCallback(None, every_steps=0)
    with pytest.raises(ValueError, match="prompts: found none"):
        ModeEvaluationCallback(None, [], every_steps=1)


def test_too_long_rows_are_never_cut(tokenizer):
    rows = conversations(6)
    lengths = sorted(len(row["input_ids"]) for row in prepare(rows, tokenizer)[0])
    with pytest.raises(DataError, match=rf"the row has {lengths[-1]} tokens, and max_length is {lengths[-1] - 1}"):
        prepare(rows, tokenizer, max_length=lengths[-1] - 1)
    data, report = prepare(rows, tokenizer, max_length=lengths[-1] - 1, on_long_row="drop", records=ALL)
    assert report.read == 6 == report.kept + report.skipped["too_long"]
    assert report.skipped["too_long"] >= 1
    assert len(data) == 2 * report.kept
    assert report.sequences == {"thinking": report.kept, "non_thinking": report.kept}
    assert report.all_tokens == sum(map(len, data["input_ids"]))
    with pytest.raises(ValueError, match="nothing to train on"):
        prepare(rows, tokenizer, max_length=3, on_long_row="drop", records=ALL)


def test_rows_reach_the_model_as_they_were_prepared(tmp_path, base_tokenizer, model):
    """Neither cut at TRL's 1,024 tokens nor rendered again."""
    reply = {"role": "assistant", "content": "b", "reasoning_content": "long " * 400}
    rows = [Conversation.from_messages([{"role": "user", "content": "a"}, reply])] * 2
    model.config.max_position_embeddings = 4096
    trainer = ThinkFusionTrainer(model, config(tmp_path), train_dataset=rows, processing_class=base_tokenizer)
    expected, _ = prepare(rows, base_tokenizer)
    trained = [each for row in trainer.train_dataset for tree in row for each in expand(tree)]
    assert [each.ids for each in trained] == expected["input_ids"]
    assert [each.labels for each in trained] == expected["labels"]
    assert max(map(len, expected["input_ids"])) > 1024


def test_an_ordered_mixture_is_trained_in_order(tmp_path, base_tokenizer, model):
    seen = []

    class Watching(ThinkFusionTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.extend(inputs["modes"][0][inputs["position_ids"][0] == 0].tolist())
            return super().compute_loss(model, inputs, *args, **kwargs)

    rows = [
        {"question": str(number), "answer": "a", **({"reasoning": "b"} if number % 2 else {})} for number in range(16)
    ]
    settings = config(tmp_path, mixture="sequential", max_steps=-1, num_train_epochs=1, per_device_train_batch_size=4)
    Watching(model, settings, train_dataset=rows, processing_class=base_tokenizer).train()
    assert seen == [0] * 8 + [1] * 8


def test_a_stream_trains_like_a_file(tmp_path, tokenizer, tiny_models):
    losses = []
    for streaming in (False, True):
        model = tiny_models(seed=1)
        model.resize_token_embeddings(1088)
        rows = conversations(12)
        data, _ = prepare(rows, tokenizer, streaming=streaming, mixture="paired")
        # A stream comes in its order, and so does a file when it is not shuffled.
        settings = config(tmp_path / str(streaming), max_steps=3, train_sampling_strategy="sequential")
        trainer = ThinkFusionTrainer(model, settings, train_dataset=data, processing_class=tokenizer)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3


def test_settings_of_the_data_are_checked_at_once(tmp_path):
    for settings, message in (
        ({"ratio": "2"}, "ratio: "),
        ({"mixture": "ratio", "ratio": "0"}, "ratio: found '0'"),
        ({"shorten_fraction": 0.1}, "shorten_budget"),
        ({"on_long_row": "cut"}, "on_long_row: 'cut'"),
        ({"max_skipped": 2.0}, "max_skipped: found 2.0"),
        ({"pair_fraction": -0.5}, "pair_fraction: found -0.5"),
        ({"dialect": "qwen"}, "unknown dialect 'qwen'; choose one of "),
    ):
        with pytest.raises(ValueError, match=message):
            config(tmp_path, **settings)
