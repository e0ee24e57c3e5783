# SPDX-License-Identifier: Apache-2.0
"""The control tokens' own learning rate and the weight of the closing one, each against a plain computation."""

import pytest
import torch

from thinkfusion import ThinkFusionConfig, ThinkFusionTrainer, install_chat_template, lora_config, prepare
from thinkfusion.control_tokens import control_rows, multiply_updates, weigh_closing_token

from .test_training import config, conversations, logged


def test_rows_move_as_with_their_own_learning_rate():
    """Adam with weight decay, three steps: a matrix whose rows are parameters of two groups is the reference."""
    torch.manual_seed(0)
    start, gradients = torch.randn(4, 3), torch.randn(3, 4, 3)
    whole = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([whole], lr=0.01, weight_decay=0.1)
    multiply_updates(optimizer, [(whole, [1, 3])], 25.0)
    plain, fast = torch.nn.Parameter(start[[0, 2]].clone()), torch.nn.Parameter(start[[1, 3]].clone())
    reference = torch.optim.AdamW([{"params": [plain]}, {"params": [fast], "lr": 0.25}], lr=0.01, weight_decay=0.1)
    for gradient in gradients:
        whole.grad = gradient.clone()
        plain.grad, fast.grad = gradient[[0, 2]].clone(), gradient[[1, 3]].clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(whole[[0, 2]], plain, rtol=0, atol=0)
    torch.testing.assert_close(whole[[1, 3]], fast, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_the_rows_are_those_of_every_embedding(base_tokenizer, tiny_models, tied):
    model = tiny_models(tied=tied)
    added = install_chat_template(base_tokenizer, model)
    rows = control_rows(model, added)
    assert [weight.shape[0] for weight, _ in rows] == [1088] * (1 if tied else 2)
    assert all(chosen == added for _, chosen in rows)


@pytest.mark.parametrize("lora", [False, True])
def test_training_moves_control_tokens_faster(tmp_path, tiny_models, base_tokenizer, lora):
    moved = []
    for rate in (None, 1e-2):
        model = tiny_models()
        added = install_chat_template(base_tokenizer, model) or list(range(1024, 1028))
        before = model.get_input_embeddings().weight.detach().clone()
        trainer = ThinkFusionTrainer(
            model,
            config(tmp_path, max_steps=1, learning_rate=1e-3, warmup_steps=0, control_token_learning_rate=rate),
            train_dataset=conversations(4),
            processing_class=base_tokenizer,
            peft_config=lora_config(model, base_tokenizer) if lora else None,
        )
        trainer.train()
        merged = trainer.model.merge_and_unload() if lora else trainer.model
        moved.append((merged.get_input_embeddings().weight - before)[[*added, 5]].abs().mean(dim=1))
    plain, fast = moved
    torch.testing.assert_close(fast[:4], 10 * plain[:4], rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(fast[4], plain[4])


def test_the_closing_token_weighs_more_in_the_gradient_and_not_in_the_logs(tmp_path, tiny_models, base_tokenizer):
    model = tiny_models()
    install_chat_template(base_tokenizer, model)
    rows = conversations(2)
    closing = base_tokenizer.convert_tokens_to_ids("</think>")
    batch = [dict(row) for row in prepare(rows, base_tokenizer)[0]]
    expected, tokens = 0.0, 0
    for row in batch:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        losses = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
        expected = expected + (losses * torch.where(labels == closing, 5.0, 1.0)).sum()
        tokens += int((labels != -100).sum())
    (expected / tokens).backward()
    gradient = model.get_input_embeddings().weight.grad.clone()
    settings = config(tmp_path, max_steps=1, learning_rate=1e-9, max_grad_norm=0.0, control_token_weight=5.0)
    trainer = ThinkFusionTrainer(model, settings, train_dataset=rows, processing_class=base_tokenizer)
    model.zero_grad()
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    seen = []
    trainer.optimizer.register_step_pre_hook(lambda *_: seen.append(model.get_input_embeddings().weight.grad.clone()))
    trainer.train()
    torch.testing.assert_close(seen[0], gradient, rtol=1e-4, atol=1e-6)
    assert logged(trainer, "loss")[0] == pytest.approx((expected / tokens).item(), rel=1e-4)
    both = [logged(trainer, f"loss_{mode}")[0] for mode in ("thinking", "non_thinking")]
    assert max(both) < 7.5  # unweighted: about the logarithm of the vocabulary


def test_weights_stand_at_the_closing_labels_only():
    log_probs = torch.full((1, 4), -1.0, requires_grad=True)
    labels = torch.tensor([[7, -100, 7, 3, 7]])  # the first label is no prediction
    weighed = weigh_closing_token(log_probs, labels, 7, 5.0)
    assert weighed.tolist() == [[-1.0, -5.0, -1.0, -5.0]]
    assert weighed.requires_grad


@pytest.mark.parametrize("name", ["control_token_learning_rate", "control_token_weight"])
def test_numbers_that_make_no_sense_are_refused(tmp_path, name):
    for value in (0, -1, float("nan")):
        with pytest.raises(ValueError, match=f"{name}: found {value}, expected a number above 0"):
            ThinkFusionConfig(output_dir=str(tmp_path), **{name: value})
