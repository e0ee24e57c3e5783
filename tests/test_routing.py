# SPDX-License-Identifier: Apache-2.0
"""Which experts tokens are routed to: the counts by mode against a count by hand, the figures, and the log."""

from collections import Counter

import pytest
import torch

from tests.test_training import config, conversations
from tests.tiny_models import tiny_random_model
from thinkfusion import ThinkFusionTrainer, load_checkpoint
from thinkfusion.moe import moe_layers, watch_routes
from thinkfusion.routing import LayerRoutes, RouteCounter, RoutingReport


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "jetmoe"])
def test_choices_are_counted_by_mode(family):
    model = tiny_random_model(family).eval()
    torch.manual_seed(0)
    ids, modes, replies = torch.randint(1, 600, (2, 9)), torch.randint(0, 2, (2, 9)), torch.rand(2, 9) < 0.6
    counter, seen, layers = RouteCounter(model), {}, moe_layers(model)
    with torch.no_grad():
        for _ in range(2):
            with counter.watch(modes, replies):
                model(input_ids=ids, use_cache=False)
        with watch_routes(model, layers, lambda place, logits, chosen: seen.update({place: chosen.tolist()})):
            model(input_ids=ids, use_cache=False)
    report = counter.report()
    assert [layer.index for layer in report.layers] == [layer.index for layer in layers]
    for place, layer in enumerate(report.layers):
        for mode in (0, 1):
            expected = Counter()
            for chosen, which, kept in zip(
                seen[place], modes.flatten().tolist(), replies.flatten().tolist(), strict=True
            ):
                if kept and which == mode:
                    expected.update(chosen)
            assert layer.counts[mode] == tuple(2 * expected[expert] for expert in range(4))
    assert counter.report() is None


def test_figures_of_even_collapsed_and_separate_routes():
    even = LayerRoutes(0, 2, ((5, 5, 5, 5), (5, 5, 5, 5)))
    assert (even.entropy(0), even.busiest(0), even.dead(0), even.overlap()) == (pytest.approx(1), 0.5, 0, 1.0)
    collapsed = LayerRoutes(1, 1, ((8, 0, 0, 0), (0, 0, 4, 4)))
    assert (collapsed.entropy(0), collapsed.busiest(0), collapsed.dead(0)) == (0, 1, 3)
    assert (collapsed.entropy(1), collapsed.dead(1), collapsed.overlap()) == (pytest.approx(0.5), 2, 0)
    found = RoutingReport((even, collapsed)).figures()
    assert found["routing_entropy_thinking"] == pytest.approx(0.5)
    assert found["routing_entropy_min_thinking"] == 0
    assert found["routing_dead_non_thinking"] == 2
    assert found["routing_overlap"] == 0.5
    whole = RoutingReport((even, collapsed)).to_dict()["layers"]
    assert whole[1]["thinking"] == {"tokens": 8, "entropy": 0, "busiest": 1, "dead": 3, "counts": [8, 0, 0, 0]}


def test_a_mode_without_tokens_is_left_out():
    figures = RoutingReport((LayerRoutes(0, 1, ((1, 1), (0, 0))),)).figures()
    assert "routing_entropy_thinking" in figures
    assert not any("non_thinking" in name or "overlap" in name for name in figures)


def test_a_dense_model_has_no_routes():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no Mixture-of-Experts layer"):
        RouteCounter(tiny_random_model("llama"))


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_training_logs_routes_and_is_not_changed_by_it(tmp_path, layout):
    losses, trained = [], []
    for steps in (0, 2):
        model, tokenizer = load_checkpoint("tiny-base", dtype="float32")
        args = config(
            tmp_path,
            max_steps=4,
            logging_steps=1,
            routing_steps=steps,
            sequence_layout=layout,
            gradient_checkpointing=True,
        )
        trainer = ThinkFusionTrainer(model, args, train_dataset=conversations(32), processing_class=tokenizer)
        trainer.train()
        losses.append([each["loss"] for each in trainer.state.log_history if "loss" in each])
        routed = [each for each in trainer.state.log_history if "routing_overlap" in each]
        trained.append(routed)
    assert losses[0] == losses[1]
    assert trained[0] == []
    assert [each["step"] for each in trained[1]] == [2, 4]
    assert all(0 < each["routing_entropy_min_thinking"] <= each["routing_entropy_thinking"] <= 1 for each in trained[1])
    reports = next(each for each in trainer.callback_handler.callbacks if hasattr(each, "reports")).reports
    tokens = [sum(sum(layer["thinking"]["tokens"] for layer in reports[step].to_dict()["layers"]) for step in (2, 4))]
    last = [each for each in trainer.state.log_history if "tokens_thinking" in each][-1]
    assert tokens == [4 * last["tokens_thinking"]]  # four layers, recomputed ones counted once
