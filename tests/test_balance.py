# SPDX-License-Identifier: Apache-2.0
"""Balance of experts: the loss against one counted token by token, over batches, processes, layouts and adapters."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.test_training import config, conversations, logged
from tests.tiny_models import tiny_random_model
from tests.two_processes import run_in_both
from thinkfusion import ThinkFusionTrainer
from thinkfusion.balance import Balancer, layer_balance
from thinkfusion.checkpointing import load_checkpoint
from thinkfusion.moe import moe_layers, watch_routes

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
ALONE = SimpleNamespace(device=torch.device("cpu"), num_processes=1, reduce=lambda tensor, reduction: tensor)


def counted(seen, layers, masks):
    """The loss of a step in plain arithmetic: `seen` are (batch, place, logits, chosen)."""
    scores = []
    for place, layer in enumerate(layers):
        assigned, mass, tokens = [0] * layer.num_experts, [0.0] * layer.num_experts, 0
        for batch, where, logits, chosen in seen:
            if where != place:
                continue
            for token, kept in enumerate(masks[batch].flatten().tolist()):
                if not kept:
                    continue
                tokens += 1
                row = logits[token].double()
                values = 1 / (1 + (-row).exp()) if layer.score_function == "sigmoid" else (row - row.max()).exp()
                for expert in range(layer.num_experts):
                    mass[expert] += float(values[expert] / values.sum())
                for expert in chosen[token].tolist():
                    assigned[expert] += 1
        pairs = zip(assigned, mass, strict=True)
        scores.append(layer.num_experts * sum(a / sum(assigned) * m / tokens for a, m in pairs))
    return sum(scores) / len(scores)


def batches_of(*, seed=1):
    """Two batches of different sizes, padded on the right."""
    draw, made = torch.Generator().manual_seed(seed), []
    for size, lengths in ((2, (7, 3)), (3, (5, 9, 4))):
        ids = torch.randint(1, 600, (size, max(lengths)), generator=draw)
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def in_double(model):
    """In float64, which grouped_mm does not take."""
    model.set_experts_implementation("eager")
    return model.double()


def step(model, balancer, batches):
    """The losses of a step's batches."""
    balancer.begin(batches)
    losses = []
    for batch in batches:
        with balancer.watch(batch["attention_mask"]):
            model(**batch, use_cache=False)
        losses.append(balancer.loss())
    return losses


@pytest.mark.parametrize(
    ("family", "changes", "score", "groups"),
    [
        ("qwen3_moe", {}, "softmax", 1),
        ("gpt_oss", {}, "softmax", 1),
        ("glm4_moe", {"first_k_dense_replace": 0}, "sigmoid", 1),
        ("deepseek_v3", dict.fromkeys(EXPERTS, 8) | {"n_group": 4, "topk_group": 2}, "sigmoid", 4),
    ],
)
def test_the_loss_is_that_of_a_count_token_by_token(family, changes, score, groups):
    model = in_double(tiny_random_model(family, **changes))
    layers = moe_layers(model)
    assert {(layer.score_function, layer.groups) for layer in layers} == {(score, groups)}
    batches = batches_of()
    masks = [batch["attention_mask"] for batch in batches]
    seen = []
    for number, batch in enumerate(batches):
        with torch.no_grad(), watch_routes(model, layers, lambda *route, at=number: seen.append((at, *route))):
            model(**batch, use_cache=False)
    balancer = Balancer(model, ALONE, coefficient=1.0, update_rate=0.0)
    step(model, balancer, batches)
    expected = counted(seen, layers, masks)
    assert balancer.value() == pytest.approx(expected, abs=1e-6)
    assert abs(expected - 1) > 1e-3
    assert balancer.value() is None
    # The first batch stands alone; a second one is weighted by its tokens and has the shares of both.
    (only,) = step(model, balancer, batches[:1])
    assert only.item() == pytest.approx(counted([each for each in seen if each[0] == 0], layers, masks), abs=1e-6)
    # What is padded must not matter.
    filled = [batch | {"input_ids": batch["input_ids"].clone()} for batch in batches]
    for batch in filled:
        batch["input_ids"][batch["attention_mask"] == 0] = 7
    balancer.value()
    step(model, balancer, filled)
    # Sigmoid routers compute in float32, whatever the model does.
    assert balancer.value() == pytest.approx(expected, abs=1e-6)


def test_the_gradient_is_that_of_the_mean_affinities():
    model = in_double(tiny_random_model("qwen3_moe"))
    layers, (batch, _) = moe_layers(model), batches_of()
    weight = model.get_submodule(layers[-1].router).weight
    (loss,) = step(model, Balancer(model, ALONE, coefficient=2.0, update_rate=0.0), [batch])
    (found,) = torch.autograd.grad(loss, weight)
    change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).to(weight) * 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * change
        values.append(step(model, Balancer(model, ALONE, coefficient=2.0, update_rate=0.0), [batch])[0].item())
        with torch.no_grad():
            weight -= sign * change
    # The choice is the same under so small a change, so the shares are constant.
    assert (values[0] - values[1]) / 2 == pytest.approx((found * change).sum().item(), rel=1e-4)
    assert found.abs().sum() > 0


def test_layers_collapsed_onto_different_experts_score_as_collapsed():
    sizes = dict.fromkeys(EXPERTS, 8) | {"num_experts_per_tok": 1}
    model = tiny_random_model("qwen3_moe", num_hidden_layers=8, layer_types=None, **sizes)
    layers = moe_layers(model)
    for place, layer in enumerate(layers):

        def collapsed(module, given, output, place=place):
            logits = torch.zeros_like(output[0])
            logits[:, place] = 50.0
            return logits + 0 * output[0], torch.ones_like(output[1]), torch.full_like(output[2], place)

        model.get_submodule(layer.router).register_forward_hook(collapsed)
    balancer = Balancer(model, ALONE, coefficient=1.0, update_rate=0.0)
    losses = step(model, balancer, batches_of())
    assert sum(each.item() for each in losses) == pytest.approx(8, rel=1e-5)
    assert balancer.value() == pytest.approx(8, rel=1e-5)


def test_balanced_experts_score_one():
    assert layer_balance(torch.ones(6), torch.full((6,), 5.0), 30).item() == pytest.approx(1)


def train(folder, *, family=None, lora=False, rows=None, evaluated=None, **settings):
    """A trainer that has trained a tiny model of the family, by default Qwen3-MoE that fits the embedded tokenizer."""
    sizes = {"vocab_size": 1024, "first_k_dense_replace": 1} if family else {}
    model = tiny_random_model(family or "qwen3_moe", **({"vocab_size": 1024} | sizes))
    tokenizer = load_checkpoint("tiny-base")[1]
    defaults = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_steps": 2}
    defaults |= {"train_sampling_strategy": "sequential", "balance_loss_coef": 0.5}
    trainer = ThinkFusionTrainer(
        model,
        config(folder, **defaults | settings),
        train_dataset=conversations(8) if rows is None else rows,
        eval_dataset=evaluated,
        processing_class=tokenizer,
        peft_config=True if lora else None,
    )
    trainer.train()
    return trainer


def trained_weights(trainer):
    return torch.cat([each.detach().flatten() for each in trainer.model.parameters() if each.requires_grad])


@pytest.mark.parametrize("layout", ["padded", "packed", "tree"])
def test_one_step_logs_the_balance_of_its_tokens(tmp_path, layout):
    """Whatever the batches; without a rate nothing moves, so that the routes are those of the model."""
    settings = {"sequence_layout": layout, "learning_rate": 0.0, "max_steps": 1}
    whole = train(tmp_path, per_device_train_batch_size=4, **settings)
    parts = train(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4, **settings)
    value = logged(whole, "balance_loss")[0]
    assert logged(parts, "balance_loss")[0] == pytest.approx(value, rel=1e-5)
    plain = train(tmp_path, per_device_train_batch_size=4, balance_loss_coef=0.0, **settings)
    assert not logged(plain, "balance_loss")
    assert logged(whole, "loss")[0] == pytest.approx(logged(plain, "loss")[0] + 0.5 * value, abs=2e-4)
    batch = next(iter(whole.get_train_dataloader()))
    layers, seen = moe_layers(whole.model), []
    if layout == "padded":
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad(), watch_routes(whole.model, layers, lambda *route: seen.append((0, *route))):
            whole.model(**inputs, use_cache=False)
        assert value == pytest.approx(counted(seen, layers, [batch["attention_mask"]]), rel=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_checkpointed_layers_count_once(tmp_path, lora):
    plain = train(tmp_path, lora=lora, gradient_accumulation_steps=2)
    again = train(tmp_path, lora=lora, gradient_accumulation_steps=2, gradient_checkpointing=True)
    assert logged(again, "balance_loss") == pytest.approx(logged(plain, "balance_loss"), rel=1e-6)
    torch.testing.assert_close(trained_weights(again), trained_weights(plain), rtol=0, atol=1e-6)


@pytest.mark.parametrize("lora", [False, True])
def test_the_loss_falls_where_it_is_trained(tmp_path, lora):
    """Under LoRA the router is frozen, and what lies below it learns to be routed evenly."""
    settings = {"balance_loss_coef": 100.0, "max_steps": 12, "optim": "adamw_torch", "learning_rate": 5e-3}
    trainer = train(tmp_path, lora=lora, per_device_train_batch_size=8, **settings)
    values = logged(trainer, "balance_loss")
    assert values[-1] - 1 < 0.8 * (values[0] - 1)


def test_nothing_is_added_to_the_evaluation(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1, "learning_rate": 0.0}
    rows = conversations(4)
    with_loss, plain = (
        train(tmp_path, rows=rows, evaluated=rows, balance_loss_coef=coefficient, **settings)
        for coefficient in (100.0, 0.0)
    )
    assert logged(with_loss, "eval_loss") == pytest.approx(logged(plain, "eval_loss"), rel=1e-6)
    assert len(logged(with_loss, "balance_loss")) == 1
    assert not any("balance" in name for record in plain.state.log_history for name in record)


def test_without_coefficient_no_router_is_watched(tmp_path, monkeypatch):
    def refuse(*given):
        raise AssertionError("watched")

    monkeypatch.setattr("thinkfusion.balance.watch_routes", refuse)
    train(tmp_path, balance_loss_coef=0.0, max_steps=1)
    with pytest.raises(AssertionError, match="watched"):
        train(tmp_path, balance_loss_coef=0.1, max_steps=1)


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "ernie4_5_moe"])
def test_a_step_moves_each_bias_towards_the_mean_count(family):
    model = tiny_random_model(family).eval()
    balancer = Balancer(model, ALONE, coefficient=0.0, update_rate=0.01)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    counts = [torch.zeros(4) for _ in balancer.layers]
    batches = batches_of()
    balancer.begin(batches)
    for batch in batches:
        keep = batch["attention_mask"].flatten().bool()

        def count(place, logits, chosen, keep=keep):
            counts[place] += torch.bincount(chosen[keep].flatten(), minlength=4)

        with torch.no_grad(), watch_routes(model, balancer.layers, count), balancer.watch(batch["attention_mask"]):
            model(**batch, use_cache=False)
    balancer.update_biases()
    moved = {layer.correction_bias: count for layer, count in zip(balancer.layers, counts, strict=True)}
    for name, value in model.state_dict().items():
        if name in moved:
            expected = 0.01 * (moved[name].mean() - moved[name]).sign()
            torch.testing.assert_close((value - before[name]).flatten(), expected, rtol=0, atol=1e-6)
        else:
            assert torch.equal(value, before[name]), name
    assert any(value.any() for value in moved.values())


def test_biases_stay_unless_asked_for_and_reach_the_checkpoint(tmp_path):
    name = moe_layers(tiny_random_model("deepseek_v3"))[0].correction_bias
    start = tiny_random_model("deepseek_v3", vocab_size=1024).state_dict()[name]
    kept = train(tmp_path, family="deepseek_v3")
    assert torch.equal(kept.model.state_dict()[name], start)
    moved = train(tmp_path, family="deepseek_v3", balance_loss_coef=0.0, router_bias_update_rate=0.5, max_steps=1)
    assert {0.5} >= set((moved.model.state_dict()[name] - start).abs().tolist()) - {0.0}
    assert not torch.equal(moved.model.state_dict()[name], start)
    moved.save_model(str(tmp_path / "saved"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.state_dict()[name], moved.model.state_dict()[name])


@pytest.mark.parametrize(
    ("family", "settings", "error"),
    [
        ("qwen3", {}, "balance_loss_coef.*Qwen3ForCausalLM"),
        ("qwen3_moe", {"router_bias_update_rate": 0.1}, "router_bias_update_rate.*no correction bias"),
        ("deepseek_v3", {"router_bias_update_rate": 0.1, "lora": True}, "router_bias_update_rate.*adapter"),
        (
            "qwen3_moe",
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}, "lora": True},
            "reentrant",
        ),
    ],
)
def test_what_cannot_be_balanced_is_refused(tmp_path, family, settings, error):
    with pytest.raises(ValueError, match=error):
        train(tmp_path, family=family, max_steps=1, **settings)


def test_a_coarse_bias_is_refused():
    model = AutoModelForCausalLM.from_config(tiny_random_model("deepseek_v3").config).bfloat16()
    with pytest.raises(ValueError, match=r"router_bias_update_rate: .*bfloat16.*float32"):
        Balancer(model, ALONE, coefficient=0.0, update_rate=0.001)


def part(rank: int, processes: int, folder: str) -> None:
    """One of two processes, or the only one; the first writes its weights and what it logged."""
    torch.set_num_threads(1)
    trainer = train(
        folder,
        family="deepseek_v3",
        max_steps=3,
        per_device_train_batch_size=2 // processes,
        gradient_accumulation_steps=2,
        router_bias_update_rate=0.01,
        sequence_layout="padded",
        balance_loss_coef=2.0,
        use_cpu=True,
        max_grad_norm=0.0,
    )
    assert trainer.accelerator.num_processes == processes
    if rank == 0:
        state = {name: each.clone() for name, each in trainer.model.state_dict().items()}
        torch.save({"state": state, "logged": logged(trainer, "balance_loss")}, f"{folder}/{processes}.pt")
    trainer.accelerator.end_training()


def test_two_processes_train_as_one_with_twice_the_batch(tmp_path):
    run_in_both(part, 2, str(tmp_path))
    part(0, 1, str(tmp_path))
    two, one = (torch.load(tmp_path / f"{processes}.pt", weights_only=True) for processes in (2, 1))
    assert two["logged"] == pytest.approx(one["logged"], rel=1e-5)
    assert len(one["logged"]) == 3
    for name, value in one["state"].items():
        torch.testing.assert_close(
            two["state"][name], value, rtol=0, atol=1e-6, msg=lambda text, at=name: f"{at} {text}"
        )


def test_routers_that_return_no_choice_can_be_checkpointed():
    model = tiny_random_model("llama4_text")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = batches_of()[0]
    (loss,) = step(model, Balancer(model, ALONE, coefficient=1.0, update_rate=0.0), [batch])
    loss.backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0
