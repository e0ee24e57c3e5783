# SPDX-License-Identifier: Apache-2.0
"""Control tokens: which are new, their own learning rate, the weight of the closing one, against plain computations."""

import logging

import pytest
import torch
from peft import LoraConfig

from thinkfusion import ThinkFusionConfig, ThinkFusionTrainer, install_chat_template, lora_config, prepare
from thinkfusion.control_tokens import (
    CLOSING_WEIGHT,
    END_SHARE,
    control_rows,
    multiply_updates,
    new_tokens,
    settle,
    weigh_tokens,
    why_untrained,
)

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
    for rate in (1e-3, 1e-2, None):
        model = tiny_models()
        added = install_chat_template(base_tokenizer, model) or list(range(1024, 1028))
        before = model.get_input_embeddings().weight.detach().clone()
        trainer = ThinkFusionTrainer(
            model,
            config(
                tmp_path,
                max_steps=1,
                learning_rate=1e-3,
                warmup_steps=0,
                control_token_learning_rate=rate,
                control_token_weight=1.0,
            ),
            train_dataset=conversations(4),
            processing_class=base_tokenizer,
            peft_config=lora_config(model, base_tokenizer) if lora else None,
        )
        trainer.train()
        merged = trainer.model.merge_and_unload() if lora else trainer.model
        moved.append((merged.get_input_embeddings().weight - before)[[*added, 5]].abs().mean(dim=1))
    plain, fast, chosen = moved
    torch.testing.assert_close(chosen, fast)  # 25 times 1e-3, but at most 1e-2
    torch.testing.assert_close(fast[:4], 10 * plain[:4], rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(fast[4], plain[4])


def test_the_tokens_that_end_a_text_weigh_more_in_the_gradient_and_not_in_the_logs(
    tmp_path, tiny_models, base_tokenizer
):
    model = tiny_models()
    install_chat_template(base_tokenizer, model)
    rows = conversations(2)
    closing, end = base_tokenizer.convert_tokens_to_ids(["</think>", "<|im_end|>"])
    batch = [dict(row) for row in prepare(rows, base_tokenizer)[0]]
    expected, tokens = 0.0, 0
    for row in batch:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        losses = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
        weights = torch.where(labels == closing, 5.0, torch.where(labels == end, 3.0, 1.0))
        expected = expected + (losses * weights).sum()
        tokens += int((labels != -100).sum())
    (expected / tokens).backward()
    gradient = model.get_input_embeddings().weight.grad.clone()
    weights = {"control_token_weight": 5.0, "end_of_turn_weight": 3.0}
    settings = config(tmp_path, max_steps=1, learning_rate=1e-9, max_grad_norm=0.0, **weights)
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


def test_weights_stand_at_the_labels_of_their_tokens_only():
    log_probs = torch.full((1, 4), -1.0, requires_grad=True)
    labels = torch.tensor([[7, -100, 7, 3, 7]])  # the first label is no prediction
    weighed = weigh_tokens(log_probs, labels, {7: 5.0, 3: 2.0})
    assert weighed.tolist() == [[-1.0, -5.0, -2.0, -5.0]]
    assert weighed.requires_grad
    assert weigh_tokens(log_probs, labels, {}) is log_probs


@pytest.mark.parametrize("name", ["control_token_learning_rate", "control_token_weight", "end_of_turn_weight"])
def test_numbers_that_make_no_sense_are_refused(tmp_path, name):
    for value in (0, -1, float("nan")):
        with pytest.raises(ValueError, match=f"{name}: found {value}, expected a number above 0"):
            ThinkFusionConfig(output_dir=str(tmp_path), **{name: value})


# Which tokens are new ------------------------------------------------------------------------------------------------


def with_rows(model, rows):
    """The model with these rows of its input embeddings."""
    with torch.no_grad():
        for token, row in rows.items():
            model.get_input_embeddings().weight[token] = row
    return model


def test_a_row_that_was_never_trained_is_told_by_itself_and_its_neighbours(tiny_models):
    model = tiny_models(tied=False)
    weight = model.get_input_embeddings().weight.detach()
    mean, reserved = weight.mean(dim=0), torch.randn(32) * weight.std()
    with_rows(model, {7: mean, 8: torch.zeros(32), 9: reserved, 10: reserved * 1.0001, 11: 3 * weight[11]})
    assert why_untrained(model, 7).startswith("its row is the mean of all (at 0.0")
    assert why_untrained(model, 8) == "its row is zero"
    assert why_untrained(model, 9) == "its row is that of token 10 (cosine 1.000)"
    assert [token for token in range(12, 60) if why_untrained(model, token)] == []
    assert why_untrained(model, 11) is None
    with torch.no_grad():  # untied: the output row alone may be new
        model.get_output_embeddings().weight[11] = model.get_output_embeddings().weight.mean(dim=0)
    assert why_untrained(model, 11).startswith("its row is the mean")


def test_tokens_that_were_added_are_new_and_those_that_were_trained_are_not(tiny_models, base_tokenizer):
    model = tiny_models()
    added = install_chat_template(base_tokenizer, model)
    tokens = base_tokenizer.convert_ids_to_tokens(added)
    assert new_tokens(model, base_tokenizer, tokens, added) == dict.fromkeys(tokens, "it was added")
    # The same checkpoint, loaded another day: its rows tell.
    found = new_tokens(model, base_tokenizer, tokens, [])
    assert set(found) == set(tokens)
    assert new_tokens(model, base_tokenizer, tokens, [], rows_are_whole=False) == {}
    trained = {token: torch.randn(32) for token in added if token != base_tokenizer.convert_tokens_to_ids("</think>")}
    with_rows(model, trained)
    assert list(new_tokens(model, base_tokenizer, tokens, [])) == ["</think>"]


GIVEN = {"closes": 0.5, "learning_rate": 1e-5, "own_rate": None, "weight": None}


@pytest.mark.parametrize(
    ("new", "changes", "rate", "weight", "said"),
    [
        ({"</think>": "it was added"}, {}, 2.5e-4, 15.0, "new to the model (</think>: it was added) get"),
        ({"</think>": "it was added"}, {"learning_rate": 1e-3}, 1e-2, 15.0, "a learning rate of 0.01"),
        ({"</think>": "it was added"}, {"learning_rate": 2e-2}, 2e-2, 15.0, "0.02"),
        ({"</think>": "it was added"}, {"learning_rate": 0.0}, None, 15.0, "the learning rate of the rest"),
        ({"</think>": "it was added"}, {"own_rate": 3e-5, "weight": 1.0}, 3e-5, 1.0, "the weight 1 in the loss"),
        ({"</think>": "it was added"}, {"sharded": True}, None, 15.0, "Sharded weights"),
        ({"<|im_end|>": "it was added"}, {}, 2.5e-4, 1.0, "</think> the weight 1"),
        ({}, {}, None, 1.0, "knows all of them, they are trained as everything else"),
        ({}, {"closes": None}, None, 1.0, "knows all"),
        ({}, {"closes": 2e-9}, 2.5e-4, 15.0, "</think>: after a whole trace its probability is 2e-09"),
        ({}, {"weight": 4.0}, None, 4.0, "knows all of them. As asked for, they get the learning rate of the rest"),
        ({}, {"weight": 4.0, "closed": False}, None, 4.0, "No row ends a trace with </think>: its weight does nothing"),
        ({}, {"own_rate": 1e-4}, 1e-4, 1.0, "As asked for, they get a learning rate of 0.0001"),
    ],
)
def test_what_is_done_follows_from_what_is_new_unless_it_is_given(new, changes, rate, weight, said):
    found = settle(new, "</think>", **{**GIVEN, **changes})
    assert found.learning_rate == pytest.approx(rate)
    assert found.weight == weight
    assert said in found.line
    assert found.end_weight == (10.0 if weight == CLOSING_WEIGHT else 1.0)
    # What is chosen falls, what is given stays.
    chosen = weight == CLOSING_WEIGHT
    assert (found.last_weight, found.last_end_weight) == ((3.0, pytest.approx(2.0)) if chosen else (weight, 1.0))
    assert ("falling to 3" in found.line) == (weight == CLOSING_WEIGHT)
    assert ("the end of the turn" in found.line) == (found.end_weight != 1)


def test_weights_fall_in_the_first_three_quarters():
    found = settle({"</think>": "it was added"}, "</think>", **GIVEN)
    assert found.weights_at(0.0) == (15.0, pytest.approx(10.0))
    assert found.weights_at(0.375) == (pytest.approx(9.0), pytest.approx(6.0))
    assert found.weights_at(0.75) == found.weights_at(1.0) == (3.0, pytest.approx(2.0))
    given = settle({"</think>": "it was added"}, "</think>", **{**GIVEN, "weight": 6.0})
    assert given.weights_at(0.0) == given.weights_at(1.0) == (6.0, 4.0)


def test_the_weights_of_a_step_are_those_of_the_steps_that_are_done(tmp_path, tiny_models, base_tokenizer, monkeypatch):
    seen = []

    def noted(log_probs, labels, weights):
        seen.append(weights)
        return weigh_tokens(log_probs, labels, weights)

    monkeypatch.setattr("thinkfusion.training.weigh_tokens", noted)
    train(tmp_path, tiny_models(), base_tokenizer, rows=16, max_steps=4, gradient_accumulation_steps=2)
    closing, end = base_tokenizer.convert_tokens_to_ids(["</think>", "<|im_end|>"])
    assert [weights.get(closing, 1.0) for weights in seen] == pytest.approx([15, 15, 11, 11, 7, 7, 3, 3])
    fallen = [10, 22 / 3, 14 / 3, 2]
    assert [weights.get(end, 1.0) for weights in seen] == pytest.approx([each for each in fallen for _ in range(2)])


def test_the_end_of_the_turn_has_the_weight_that_is_given():
    known = settle({}, "</think>", **GIVEN, end_weight=3.0)
    assert (known.weight, known.end_weight) == (1.0, 3.0)
    assert "As asked for, they get" in known.line
    assert "</think> the weight 1 in the loss, the end of the turn 3." in known.line
    assert settle({"</think>": "it was added"}, "</think>", **GIVEN, end_weight=1.0).end_weight == 1.0
    stays = settle({"</think>": "it was added"}, "</think>", **GIVEN, end_weight=4.0)
    assert (stays.weights_at(0.0), stays.weights_at(1.0)) == ((15.0, 4.0), (3.0, 4.0))
    assert stays.line.endswith("the weight 15 in the loss, falling to 3, the end of the turn 4.")
    # Where no trace is trained there is no choice to be balanced.
    assert settle({"</think>": "it was added"}, "</think>", **GIVEN, closed=False).end_weight == 1.0


def train(folder, model, tokenizer, *, rows=4, **settings):
    settings = {"max_steps": 1, "probe_rows": 2, **settings}
    trainer = ThinkFusionTrainer(
        model, config(folder, **settings), train_dataset=conversations(rows), processing_class=tokenizer
    )
    trainer.train()
    return trainer


def test_a_base_without_the_tokens_is_treated_and_its_pupil_is_not(tmp_path, tiny_models, base_tokenizer, caplog):
    model = tiny_models()
    with caplog.at_level(logging.INFO, logger="thinkfusion.training"):
        first = train(tmp_path, model, base_tokenizer, rows=16, max_steps=30, learning_rate=3e-3)
    assert list(first.control_tokens.new) == ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    assert first.control_tokens[1:4] == (1e-2, CLOSING_WEIGHT, END_SHARE * CLOSING_WEIGHT)
    (record,) = [record for record in caplog.records if record.message.startswith("Control tokens")]
    assert record.levelno == logging.WARNING
    assert "(<|im_start|>, <|im_end|>, <think>, </think>: it was added)" in record.message
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="thinkfusion.training"):
        second = train(tmp_path / "again", model, base_tokenizer, learning_rate=1e-3)
    assert second.control_tokens[:4] == ({}, None, 1.0, 1.0)
    assert "the model knows all of them" in caplog.text
    overruled = train(tmp_path / "more", model, base_tokenizer, control_token_weight=3.0)
    assert overruled.control_tokens.weight == 3.0


def test_of_a_tokenizer_with_one_of_the_two_the_other_is_treated(tmp_path, tiny_models, base_tokenizer):
    model = tiny_models()
    base_tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<think>"], special_tokens=True)
    model.resize_token_embeddings(1088, mean_resizing=False)
    with_rows(model, {token: 0.02 * torch.randn(32) for token in range(1024, 1027)})
    assert list(train(tmp_path, model, base_tokenizer).control_tokens.new) == ["</think>"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lora", [False, True])
def test_new_rows_can_start_as_the_end_of_a_turn(tmp_path, tiny_models, base_tokenizer, tied, lora):
    model = tiny_models(tied=tied)
    base_tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    end = base_tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.resize_token_embeddings(1088, mean_resizing=False)
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    with torch.no_grad():
        for layer in layers:
            layer.weight[1024:1026] = 0.02 * torch.randn(2, 32)
    before = [layer.weight[end].clone() for layer in layers]
    trainer = ThinkFusionTrainer(
        model,
        config(tmp_path, max_steps=1, learning_rate=0.0, control_token_init="end_of_turn"),
        train_dataset=conversations(4),
        processing_class=base_tokenizer,
        peft_config=True if lora else None,
    )
    trainer.train()
    assert list(trainer.control_tokens.new) == ["<think>", "</think>"]
    model = trainer.model.merge_and_unload() if lora else trainer.model
    ids = base_tokenizer.convert_tokens_to_ids(["<|im_end|>", "<think>", "</think>"])
    for layer, row in zip([model.get_input_embeddings(), model.get_output_embeddings()], before, strict=True):
        torch.testing.assert_close(layer.weight[ids].detach(), row.expand(3, -1))


def test_a_start_that_there_is_not_is_refused(tmp_path):
    with pytest.raises(ValueError, match="control_token_init: found 'zero', expected one of mean, end_of_turn"):
        ThinkFusionConfig(output_dir=str(tmp_path), control_token_init="zero")


LAYOUTS = {
    "tree": {},
    "packed in one row": {"sequence_layout": "packed", "tokens_per_row": 4096, "per_device_train_batch_size": 1},
    "trees in one row": {"tokens_per_row": 4096, "per_device_train_batch_size": 1},
    "padded": {"sequence_layout": "padded", "per_device_train_batch_size": 8},
    "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
}


@pytest.fixture
def gradients(tmp_path, tiny_models, base_tokenizer):
    """The embeddings' gradient of the first step under some settings."""

    def found(**settings):
        model = tiny_models()
        install_chat_template(base_tokenizer, model)
        trainer = ThinkFusionTrainer(
            model,
            config(tmp_path, max_steps=1, probe_rows=0, max_grad_norm=0.0, learning_rate=1e-9, **settings),
            train_dataset=conversations(4),
            processing_class=base_tokenizer,
        )
        trainer.optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
        seen = []
        weight = model.get_input_embeddings().weight
        trainer.optimizer.register_step_pre_hook(lambda *_: seen.append(weight.grad.clone()))
        trainer.train()
        return seen[0]

    return found


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_the_weight_is_the_same_however_rows_are_laid(gradients, layout):
    expected = gradients(**LAYOUTS["tree"])
    torch.testing.assert_close(gradients(**LAYOUTS[layout]), expected, rtol=1e-4, atol=1e-6)
    for name in ("control_token_weight", "end_of_turn_weight"):
        other = gradients(**LAYOUTS[layout], **{name: 1.0})
        assert not torch.allclose(other, expected, rtol=1e-2, atol=1e-5)


def test_rows_that_do_not_train_are_told(tmp_path, tiny_models, base_tokenizer, caplog):
    model = tiny_models()
    added = install_chat_template(base_tokenizer, model)
    with_rows(model, {token: 0.02 * torch.randn(32) for token in added})
    with caplog.at_level(logging.WARNING, logger="thinkfusion.training"):
        ThinkFusionTrainer(
            model,
            config(tmp_path, max_steps=1, control_token_learning_rate=1e-2, probe_rows=0),
            train_dataset=conversations(4),
            processing_class=base_tokenizer,
            peft_config=LoraConfig(target_modules=["q_proj"]),
        ).train()
    assert "control_token_learning_rate: no row of a control token trains, so it does nothing" in caplog.text


def test_rows_without_a_trace_train_no_closing_token(tmp_path, tiny_models, base_tokenizer):
    trainer = train(tmp_path, tiny_models(), base_tokenizer, mixture="non_thinking", control_token_weight=5.0)
    assert "No row ends a trace with </think>" in trainer.control_tokens.line


def test_labels_that_are_smoothed_have_no_weight(tmp_path, tiny_models, base_tokenizer):
    trainer = train(tmp_path, tiny_models(), base_tokenizer, label_smoothing_factor=0.1)
    assert trainer.control_tokens.weight == 1.0
    with pytest.raises(ValueError, match="control_token_weight"):
        config(tmp_path, label_smoothing_factor=0.1, control_token_weight=5.0)
