# SPDX-License-Identifier: Apache-2.0
"""The attention of trees computes what separate sequences compute, loss and gradient, in every family that branches."""

import json
import random
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

import thinkfusion.tree_attention as module
from tests.families import CASES, family_tokenizer
from tests.tiny_models import BRANCHING, NOT_BRANCHING, WINDOWED, random_conversation, tiny_config, tiny_random_model
from thinkfusion import Mode, expand, fusion_tree
from thinkfusion.packing import RowCollator
from thinkfusion.tree_attention import (
    IMPLEMENTATION,
    RowLayout,
    check_implementation,
    tree_attention,
    tree_attention_forward,
    why_not_trees,
)
from thinkfusion.trees import FusionTree

WINDOW = 12
MODELS = [(family, window) for family in BRANCHING for window in ((None, WINDOW) if family in WINDOWED else (None,))]
SOME_MODELS = [("qwen3_moe", WINDOW), ("gpt_oss", WINDOW), ("deepseek_v3", None), ("gemma2", WINDOW), ("llama", None)]
TOLERANCE = 1e-5
CPU = torch.device("cpu")
seeds = st.integers(0, 2**32 - 1)
many = settings(max_examples=100, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks and groups so small that the rows of these tests have several of each."""
    monkeypatch.setattr(module, "QUERIES_PER_BLOCK", 16)
    monkeypatch.setattr(module, "GROUPED_TOKENS", 200)


@cache
def row_of_trees(number: int) -> list[FusionTree]:
    """Three conversations of random dialects: of 2 to 8 turns, under both schemes, and one with tools."""
    draw = random.Random(number)
    trees = []
    for scheme, turns, tools in (
        ("control", 8 if number % 4 == 0 else draw.randint(2, 4), False),
        ("empty-block", draw.randint(1, 3), False),
        (draw.choice(("control", "empty-block")), draw.randint(1, 2), True),
    ):
        name = draw.choice([name for name, offered in CASES if offered == scheme])
        conversation = random_conversation(draw, turns=turns, tools=tools, parallel=name != "gpt_oss")
        trees.append(fusion_tree(conversation, family_tokenizer(name, scheme)))
    return trees


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of each trained token of the only row."""
    trained = labels[0, 1:] != -100
    return torch.nn.functional.cross_entropy(logits[0, :-1][trained].float(), labels[0, 1:][trained], reduction="none")


def run_trees(model, trees, *, backward=False, nodes=None) -> tuple[torch.Tensor, RowLayout]:
    """The losses of all trained tokens, in the order of the row, and the layout that was used."""
    batch = RowCollator(0)([trees])
    layout = RowLayout(batch["nodes"] if nodes is None else nodes)
    with tree_attention(model), torch.set_grad_enabled(backward):
        output = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], tree_layout=layout, use_cache=False
        )
        losses = token_losses(output.logits, batch["labels"])
        if backward:
            losses.sum().backward()
    return losses.detach(), layout


def run_sequences(model, trees, *, backward=False) -> torch.Tensor:
    """The same losses, each sequence run for itself."""
    losses = []
    for tree in trees:
        for sequence in in_order_of_nodes(tree):
            with torch.set_grad_enabled(backward):
                output = model(input_ids=torch.tensor([sequence.ids]), use_cache=False)
                loss = token_losses(output.logits, torch.tensor([sequence.labels]))
                if backward:
                    loss.sum().backward()
            losses.append(loss.detach())
    return torch.cat(losses)


def in_order_of_nodes(tree: FusionTree) -> list:
    """The sequences of a tree, that of the trunk first if it has loss."""
    sequences = expand(tree)
    if (tree.labels[: tree.lengths[0]] != -100).any():
        own = len(sequences) - 1 if tree.trunk_at is None else tree.trunk_at
        sequences.insert(0, sequences.pop(own))
    return sequences


def taken_gradient(model) -> torch.Tensor:
    """All gradients as one vector, taken off the model."""
    gradients = [parameter.grad.flatten().float() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return torch.cat(gradients)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over the norm."""
    assert expected.norm() > 0
    return float((found - expected).norm() / expected.norm())


# --- exactness --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "window"), MODELS)
def test_loss_and_gradient_equal_those_of_separate_sequences(family, window):
    number = MODELS.index((family, window))
    trees, model = row_of_trees(number), tiny_random_model(family, window=window, seed=number)
    losses, layout = run_trees(model, trees, backward=True)
    gradient = taken_gradient(model)
    expected = run_sequences(model, trees, backward=True)
    assert layout.layers == 2
    assert abs(losses.sum() / expected.sum() - 1) <= TOLERANCE
    assert error(losses, expected) <= TOLERANCE
    assert error(gradient, taken_gradient(model)) <= TOLERANCE


@pytest.mark.parametrize(("family", "window"), MODELS)
def test_a_fork_or_a_window_off_by_one_would_be_noticed(family, window):
    number = MODELS.index((family, window))
    trees, model = row_of_trees(number), tiny_random_model(family, window=window, seed=number).eval()
    losses, layout = run_trees(model, trees)
    nodes = [(trunk, max(fork - 1, 0), start, stop) for trunk, fork, start, stop in layout.nodes]
    assert error(run_trees(model, trees, nodes=nodes)[0], losses) > 5 * TOLERANCE
    if window is not None:
        model.config.sliding_window += 1
        assert error(run_trees(model, trees)[0], losses) > 5 * TOLERANCE


@pytest.mark.parametrize(("queries", "grouped"), [(1024, 512), (1, 0), (7, 10**6), (10**6, 0)])
@pytest.mark.parametrize(("family", "window"), SOME_MODELS)
def test_blocks_of_any_size_compute_the_same(monkeypatch, family, window, queries, grouped):
    trees, model = row_of_trees(0), tiny_random_model(family, window=window).eval()
    expected, _ = run_trees(model, trees)
    monkeypatch.setattr(module, "QUERIES_PER_BLOCK", queries)
    monkeypatch.setattr(module, "GROUPED_TOKENS", grouped)
    assert error(run_trees(model, trees)[0], expected) <= TOLERANCE


@pytest.mark.parametrize("family", BRANCHING)
def test_in_bfloat16_trees_are_no_further_from_float32_than_separate_sequences_are(family):
    number, window = BRANCHING.index(family), WINDOW if family in WINDOWED else None
    # Every token goes to all experts: a choice among them that rounding turns over would hide all else.
    experts = {} if family == "phimoe" else dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 4)
    trees, model = row_of_trees(number)[:2], tiny_random_model(family, window=window, seed=number, **experts)
    exact = run_sequences(model, trees, backward=True), taken_gradient(model)
    model.bfloat16()
    control = run_sequences(model, trees, backward=True), taken_gradient(model)
    found = run_trees(model, trees, backward=True)[0], taken_gradient(model)
    for ours, theirs, reference in zip(found, control, exact, strict=True):
        noise = error(theirs, reference)
        assert error(ours, reference) <= 1.25 * noise
        assert error(ours, theirs) <= noise


@pytest.mark.parametrize(("family", "window"), SOME_MODELS)
def test_checkpointed_layers_give_the_same_gradient(family, window):
    trees, model = row_of_trees(1), tiny_random_model(family, window=window)
    losses, _ = run_trees(model, trees, backward=True)
    gradient = taken_gradient(model)
    model.gradient_checkpointing_enable()
    again, layout = run_trees(model, trees, backward=True)
    assert layout.layers == 4, "the layers were not run again by the backward pass"
    assert error(again, losses) <= TOLERANCE
    assert error(taken_gradient(model), gradient) <= TOLERANCE


@pytest.mark.parametrize("family", ["qwen3", "gpt_oss", "gemma2"])
def test_dropout_is_of_training_alone(family):
    trees, model = row_of_trees(1), tiny_random_model(family, attention_dropout=0.5)
    first, second = run_trees(model, trees)[0], run_trees(model, trees)[0]
    assert error(first, second) > 0.001
    model.eval()
    assert torch.equal(run_trees(model, trees)[0], run_trees(model, trees)[0])


# --- what a token sees ------------------------------------------------------------------------------------------


def visible(trees: list[FusionTree], window: int | None = None, padding: int = 0) -> torch.Tensor:
    """(tokens, tokens): whether the query of a row sees the key of a column, as FusionTree says it."""
    tokens = sum(map(len, trees))
    seen = np.zeros((tokens + padding, tokens + padding), dtype=bool)
    start = 0
    for tree in trees:
        place, part = np.arange(len(tree)), slice(start, start + len(tree))
        own = (tree.node[:, None] == tree.node) & (place[:, None] >= place)
        trunk = (tree.node == 0) & (tree.positions < tree.fork[:, None])
        near = tree.positions[:, None] - tree.positions < (len(tree) if window is None else window)
        seen[part, part] = (own | trunk) & near
        start += len(tree)
    place = np.arange(padding)
    near = place[:, None] - place < (padding if window is None else window)
    seen[tokens:, tokens:] = (place[:, None] >= place) & near
    return torch.from_numpy(seen)


def random_layout(draw: random.Random) -> tuple[list[FusionTree], RowLayout, int]:
    """Up to four trees of no particular tokens, their layout, and how many tokens of padding it has."""
    trees = []
    for _ in range(draw.randint(1, 4)):
        trunk = draw.randint(1, 60)
        branches = [(draw.randint(0, trunk), draw.randint(1, 30)) for _ in range(draw.randint(0, 5))]
        lengths = (trunk, *(length for _, length in branches))
        idle = np.zeros(sum(lengths), dtype=np.int32)
        modes = (Mode.THINKING,) * len(lengths)
        trees.append(FusionTree(idle, idle, lengths, (0, *(fork for fork, _ in branches)), modes))
    batch = RowCollator(0, draw.choice((1, 16)))([trees])
    return trees, RowLayout(batch["nodes"]), batch["input_ids"].shape[1] - sum(map(len, trees))


windows = st.none() | st.integers(1, 40)


@many
@given(seed=seeds, window=windows, queries=st.sampled_from((1, 4, 1000)), grouped=st.sampled_from((0, 90, 1000)))
def test_blocks_hold_exactly_the_pairs_that_are_visible(seed, window, queries, grouped):
    trees, layout, padding = random_layout(random.Random(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "QUERIES_PER_BLOCK", queries)
        patch.setattr(module, "GROUPED_TOKENS", grouped)
        blocks = layout.blocks(window, CPU)
    found = torch.zeros((layout.tokens, layout.tokens), dtype=torch.long)
    place = torch.arange(layout.tokens)
    for block in blocks:
        rows, keys = place[block.queries], torch.cat([place[block.trunk], place[block.own]])
        mask = torch.ones(len(rows), len(keys), dtype=torch.long)
        # As torch's attention takes them: a mask, or causal over as many keys as queries.
        assert (block.mask is None) == block.causal
        assert not block.causal or len(rows) == len(keys)
        mask = mask.tril() if block.causal else block.mask.long()
        found[rows[:, None], keys] += mask
        # And little more than those is computed.
        assert mask.any(0).all()
        assert window is None or len(keys) <= max(grouped, max(window, queries) + window - 1)
    assert torch.equal(found, visible(trees, window, padding).long())
    assert torch.equal(torch.cat([place[block.queries] for block in blocks]), place)


def test_small_trees_share_a_block_and_large_ones_have_their_own(monkeypatch):
    monkeypatch.setattr(module, "QUERIES_PER_BLOCK", 1000)

    def spans(*sizes):
        ends = np.cumsum(sizes).tolist()
        layout = RowLayout([(end - size, 0, end - size, end) for end, size in zip(ends, sizes, strict=True)])
        return [block.queries.stop - block.queries.start for block in layout.blocks(None, CPU)]

    assert spans(50, 50, 50, 50, 50, 50) == [200, 100]
    assert spans(150, 60, 140) == [150, 200]
    assert spans(50, 201, 50, 50) == [50, 201, 100]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=seeds, window=windows)
def test_flex_attention_is_given_the_same_pairs_and_computes_the_same(seed, window):
    from torch.nn.attention.flex_attention import create_mask, flex_attention

    trees, layout, padding = random_layout(random.Random(seed))
    mask = layout.block_mask(window, CPU)
    expected = visible(trees, window, padding)
    pairs = create_mask(mask.mask_mod, None, None, layout.tokens, layout.tokens, device="cpu")
    assert torch.equal(pairs[0, 0], expected)
    torch.manual_seed(seed)
    query, key, value = (torch.randn(1, heads, layout.tokens, 16) for heads in (4, 2, 2))
    flexible = flex_attention(query, key, value, block_mask=mask, enable_gqa=True)
    given_window = None if window is None else torch.tensor(window)
    ours, _ = tree_attention_forward(torch.nn.Module(), query, key, value, given_window, tree_layout=layout)
    assert error(ours.transpose(1, 2), flexible) <= TOLERANCE
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, expected, enable_gqa=True)
    assert error(ours.transpose(1, 2), dense) <= TOLERANCE


@pytest.mark.parametrize(("family", "window"), SOME_MODELS)
def test_a_token_depends_on_what_its_layers_see_and_on_nothing_else(family, window):
    trees, model = row_of_trees(1), tiny_random_model(family, window=window).eval()
    reached = torch.eye(sum(map(len, trees)), dtype=torch.bool)
    for kind in WINDOWED[family] if window else ("full_attention", "full_attention"):
        layer = visible(trees, window if kind == "sliding_attention" else None)
        reached = (reached.float() @ layer.float()) > 0
    embedded = []
    model.get_input_embeddings().register_forward_hook(lambda *given: embedded.append(given[-1]))
    batch = RowCollator(0)([trees])
    arguments = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    with tree_attention(model):
        logits = model(**arguments, tree_layout=RowLayout(batch["nodes"]), use_cache=False).logits[0]
    draw = random.Random(1)
    for start, stop in [(start, stop) for _, _, start, stop in batch["nodes"]]:
        token = draw.randrange(start, stop)
        (gradient,) = torch.autograd.grad(logits[token].square().sum(), embedded[0], retain_graph=True)
        assert torch.equal(gradient[0].abs().sum(-1) > 0, reached[token])


@pytest.mark.parametrize(("family", "window"), SOME_MODELS)
def test_what_one_tree_says_changes_nothing_in_the_others(family, window):
    trees, model = row_of_trees(1), tiny_random_model(family, window=window).eval()
    batch = RowCollator(0, 64)([trees])
    other = batch["input_ids"].clone()
    changed = slice(len(trees[0]), len(trees[0]) + len(trees[1]))
    other[0, changed] = other[0, changed].roll(1) + 1
    logits = []
    with tree_attention(model), torch.no_grad():
        for ids in (batch["input_ids"], other):
            given = {"input_ids": ids, "position_ids": batch["position_ids"]}
            logits.append(model(**given, tree_layout=RowLayout(batch["nodes"]), use_cache=False).logits[0])
    for part in (slice(0, changed.start), slice(changed.stop, None)):
        # Experts compute as many tokens as chose them at once, and rounding may depend on how many.
        assert torch.allclose(logits[0][part], logits[1][part], rtol=0, atol=0 if family == "llama" else 1e-5)
    assert not torch.allclose(logits[0][changed], logits[1][changed], atol=0.01)


# --- which models -----------------------------------------------------------------------------------------------


def on_paper(family: str, **changes) -> torch.nn.Module:
    """A model without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(family, **changes))


@pytest.mark.parametrize("family", NOT_BRANCHING)
def test_families_with_other_layers_are_told_by_their_config(family):
    kinds = {"layer_types": ["conv", "full_attention"]} if family == "lfm2_moe" else {}
    model = on_paper(family, **kinds)
    why = why_not_trees(model)
    assert why.startswith(f"{type(model).__name__} has layers of another kind than attention over all tokens: ")


@pytest.mark.parametrize(("family", "window"), MODELS)
def test_families_that_can_branch_have_no_reason_not_to(family, window):
    model = on_paper(family, window=window)
    assert why_not_trees(model) is None
    check_implementation(model)


def test_models_without_positions_or_with_an_attention_of_their_own_are_told():
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "hidden_size": 8}
    bloom = on_paper("bloom", **sizes)
    assert why_not_trees(bloom) == "BloomForCausalLM takes no position_ids"
    gptj = on_paper("gptj", **sizes, rotary_dim=4)
    assert why_not_trees(gptj) == "GPTJForCausalLM does not take its attention from transformers' AttentionInterface"
    llama = on_paper("llama")
    llama.config.index_topk = 4
    assert why_not_trees(llama) == "LlamaForCausalLM chooses the keys that it attends to (index_topk)"


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn", "mine"])
def test_an_attention_that_cannot_take_a_mask_is_refused_with_the_settings_to_change(name):
    model = on_paper("qwen3_moe")
    for possible in (None, "eager", "sdpa", "flex_attention"):
        model.config._attn_implementation = possible
        check_implementation(model)
    model.config._attn_implementation = name
    with pytest.raises(ValueError, match=f"^attn_implementation: '{name}' cannot take the visibility of") as caught:
        check_implementation(model)
    assert "attn_implementation='sdpa'" in str(caught.value)
    assert "sequence_layout='padded'" in str(caught.value)


# --- the context ------------------------------------------------------------------------------------------------


def test_a_model_has_its_own_attention_again_afterwards():
    model = tiny_random_model("gpt_oss")
    ids = torch.tensor([[1, 2, 3, 4]])
    before = model(input_ids=ids).logits
    with tree_attention(model):
        assert model.config._attn_implementation == IMPLEMENTATION
        with tree_attention(model):
            pass
        assert model.config._attn_implementation == IMPLEMENTATION
    assert model.config._attn_implementation == "eager"
    with pytest.raises(KeyError), tree_attention(model):
        raise KeyError("within")
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model(input_ids=ids).logits, before)


def test_every_config_within_a_model_is_switched_and_restored():
    inner = tiny_random_model("llama")
    outer = torch.nn.ModuleDict({"language": inner, "other": torch.nn.Linear(2, 2)})
    inner.model.layers[0].config = AutoConfig.for_model("llama", attn_implementation="eager")
    outer["other"].config = {"a": "dictionary"}
    with tree_attention(outer):
        assert inner.model.layers[0].config._attn_implementation == IMPLEMENTATION
        assert inner.config._attn_implementation == IMPLEMENTATION
    assert inner.model.layers[0].config._attn_implementation == "eager"
    assert inner.config._attn_implementation == "sdpa"


def test_adapters_are_trained_as_on_separate_sequences():
    from peft import LoraConfig, get_peft_model

    trees = row_of_trees(1)
    adapters = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_random_model("qwen3_moe", window=WINDOW), adapters)
    losses, layout = run_trees(model, trees, backward=True)
    gradient = taken_gradient(model)
    assert layout.layers == 2
    assert error(losses, run_sequences(model, trees, backward=True)) <= TOLERANCE
    assert error(gradient, taken_gradient(model)) <= TOLERANCE


def test_a_call_without_a_layout_is_refused():
    model = tiny_random_model("qwen3_moe")
    with tree_attention(model), pytest.raises(ValueError, match=r"^tree_layout: missing;.*sequence_layout='padded'"):
        model(input_ids=torch.tensor([[1, 2, 3]]))


def test_a_layer_with_a_mask_or_a_bias_of_its_own_is_refused():
    layout, states = RowLayout([(0, 0, 0, 3)]), [torch.randn(1, 2, 3, 4)] * 3
    text = r"^Module makes a mask or a bias of its own, .* sequence_layout='padded'"
    with pytest.raises(ValueError, match=text):
        tree_attention_forward(torch.nn.Module(), *states, None, position_bias=torch.zeros(3, 3), tree_layout=layout)
    with pytest.raises(ValueError, match=text):
        tree_attention_forward(torch.nn.Module(), *states, torch.zeros(1, 1, 3, 3), tree_layout=layout)


def test_what_is_saved_says_nothing_of_our_attention(tmp_path):
    model = tiny_random_model("qwen3_moe")
    with tree_attention(model):
        model.save_pretrained(tmp_path / "within")
        assert IMPLEMENTATION not in json.dumps(model.config.to_dict(), default=str)
    model.save_pretrained(tmp_path / "after")
    for folder in ("within", "after"):
        for file in (tmp_path / folder).glob("*.json"):
            assert IMPLEMENTATION not in file.read_text()
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert loaded.config._attn_implementation == "sdpa"
