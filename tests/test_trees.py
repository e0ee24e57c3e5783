# SPDX-License-Identifier: Apache-2.0
"""Fusion trees stand for exactly the sequences that the renderer makes, token by token, and grow with the turns."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.families import CASES, bare_tokenizer, family_tokenizer, make_messages
from tests.tiny_models import random_conversation
from thinkfusion import Conversation, Mode, Renderer, expand, fusion_tree, mix
from thinkfusion.trees import FusionTree, TrainingSequence, fuse, fuse_within, trunk_is_non_thinking

OWN_TRUNK = [(name, scheme) for name, scheme in CASES if trunk_is_non_thinking(family_tokenizer(name, scheme))]
FREE_TRUNK = [case for case in CASES if case not in OWN_TRUNK]
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=10, deadline=None, derandomize=True)
many = settings(max_examples=300, deadline=None, derandomize=True)


def drawn(name, scheme, seed, **options) -> tuple[Conversation, list, FusionTree]:
    """A conversation that the dialect can show, its separate sequences, and its tree."""
    tokenizer = family_tokenizer(name, scheme)
    renderer = Renderer(tokenizer)
    parallel = not renderer.template.dialect.calls.own_message
    conversation = random_conversation(random.Random(seed), parallel=parallel, **options)
    return conversation, renderer.render([conversation])[0], fusion_tree(conversation, tokenizer)


def paired(*, turns: int, tools: bool = False) -> Conversation:
    messages = make_messages("en", turns=turns, system=True, tools=tools, parallel=False)
    return mix([Conversation.from_messages(messages)], "paired")[0]


def sequence(ids, trained, mode=Mode.THINKING) -> TrainingSequence:
    ids = np.array(ids, dtype=np.int32)
    return TrainingSequence(ids, np.where(np.array(trained, dtype=bool), ids, -100).astype(np.int32), mode)


def random_sequences(draw: random.Random) -> list[TrainingSequence]:
    """Sequences of two different tokens, so that they share prefixes by chance."""
    made = []
    for _ in range(draw.randint(1, 6)):
        length = draw.randint(2, 10)
        trained = [False, *(draw.random() < 0.4 for _ in range(length - 2)), True]
        made.append(sequence([draw.randint(0, 1) for _ in range(length)], trained, draw.choice(list(Mode))))
    return made


def as_lists(sequences) -> list[tuple]:
    """Sequences of either kind, to compare."""
    return [(list(each.ids), list(each.labels), each.mode) for each in sequences]


def tree_visibility(tree: FusionTree) -> np.ndarray:
    """(tokens, tokens): whether the query of a row sees the key of a column, as FusionTree says it."""
    place = np.arange(len(tree))
    own = (tree.node[:, None] == tree.node) & (place[:, None] >= place)
    trunk = (tree.node == 0) & (tree.positions < tree.fork[:, None])
    return (tree.document[:, None] == tree.document) & (own | trunk)


# --- what a tree stands for -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "scheme"), CASES)
@few
@given(seed=seeds)
def test_a_tree_gives_back_the_rendered_sequences_in_their_order(name, scheme, seed):
    _, rendered, tree = drawn(name, scheme, seed)
    assert expand(tree) == rendered
    assert tree.expanded_tokens == sum(len(each.ids) for each in rendered)
    assert len(tree) <= tree.expanded_tokens


@many
@given(seed=seeds, non_thinking_trunk=st.booleans())
def test_any_sequences_come_back_from_their_tree(seed, non_thinking_trunk):
    sequences = random_sequences(random.Random(seed))
    tree = fuse(sequences, non_thinking_trunk=non_thinking_trunk)
    assert as_lists(expand(tree)) == as_lists(sequences)
    assert len(tree) <= tree.expanded_tokens
    assert all(tree.labels[start] == -100 for start, size in zip(tree.starts, tree.lengths, strict=True) if size)


@pytest.mark.parametrize(("name", "scheme"), CASES)
@few
@given(seed=seeds)
def test_arrays_tell_each_token_its_place(name, scheme, seed):
    _, _, tree = drawn(name, scheme, seed)
    for numbers in (tree.ids, tree.labels, tree.positions, tree.document, tree.node, tree.fork):
        assert (numbers.shape, numbers.dtype) == ((len(tree),), np.dtype(np.int32))
    assert len(tree.lengths) == len(tree.forks) == len(tree.modes) == len(tree.starts)
    assert (sum(tree.lengths), tree.forks[0], min(tree.lengths) > 0) == (len(tree), 0, True)
    assert ((tree.labels == -100) | (tree.labels == tree.ids)).all()
    assert not tree.document.any()
    for node, (start, length, fork) in enumerate(zip(tree.starts, tree.lengths, tree.forks, strict=True)):
        own = slice(start, start + length)
        assert fork <= tree.lengths[0]
        assert tree.labels[start] == -100
        assert set(tree.node[own]) == {node}
        assert set(tree.fork[own]) == {fork}
        assert tree.positions[own].tolist() == list(range(fork, fork + length))


@pytest.mark.parametrize(("name", "scheme"), CASES)
@few
@given(seed=seeds)
def test_a_token_sees_its_predecessors_in_its_sequence_and_nothing_else(name, scheme, seed):
    _, rendered, tree = drawn(name, scheme, seed, turns=random.Random(seed).randint(1, 4))
    visible = tree_visibility(tree)
    found = []
    for start, length, fork, mode in zip(tree.starts, tree.lengths, tree.forks, tree.modes, strict=True):
        path = np.concatenate([np.arange(fork), np.arange(start, start + length)])
        expected = np.zeros((length, len(tree)), dtype=bool)
        expected[:, path] = np.arange(fork, len(path))[:, None] >= np.arange(len(path))
        assert (visible[start : start + length] == expected).all()
        assert tree.positions[path].tolist() == list(range(len(path)))
        trained = np.flatnonzero(tree.labels[start : start + length] != -100)
        if len(trained):
            end = fork + int(trained[-1]) + 1
            found.append((tree.ids[path[:end]].tolist(), mode, len(trained)))
    assert sorted(found) == sorted((each.ids, each.mode, sum(each.trained)) for each in rendered)


@pytest.mark.parametrize(("name", "scheme"), CASES)
@few
@given(seed=seeds)
def test_no_branch_repeats_history_and_no_trunk_has_tokens_that_nothing_needs(name, scheme, seed):
    conversation, _, _ = drawn(name, scheme, seed)
    exchanges = tuple(replace(exchange, ends_only=False) for exchange in conversation.exchanges)
    tokenizer = family_tokenizer(name, scheme)
    tree = fusion_tree(replace(conversation, exchanges=exchanges), tokenizer)
    trained = [np.flatnonzero(part != -100) for part in np.split(tree.labels, tree.starts[1:])]
    # A branch begins with the prefix of its mode, and then comes what is written.
    prefixes = ["".join(Renderer(tokenizer).scheme.prefix(mode)) for mode in Mode]
    longest = max(len(tokenizer(prefix, add_special_tokens=False)["input_ids"]) for prefix in prefixes)
    assert all(branch[0] <= longest + 1 for branch in trained[1:])
    assert tree.lengths[0] == max(*tree.forks, 0, *(trained[0] + 1))


# --- trunks -----------------------------------------------------------------------------------------------------


def test_which_dialects_show_history_as_non_thinking_answers():
    assert [name for name, scheme in CASES if scheme == "control" and (name, scheme) not in OWN_TRUNK] == [
        *("ernie4_5", "gpt_oss")
    ]
    assert [name for name, scheme in OWN_TRUNK if scheme == "empty-block"] == ["glm4_moe"]


@pytest.mark.parametrize(("name", "scheme"), OWN_TRUNK)
@few
@given(seed=seeds)
def test_the_non_thinking_rendering_is_the_trunk_with_its_loss(name, scheme, seed):
    conversation, rendered, tree = drawn(name, scheme, seed)
    own = [each for each in rendered if each.mode is Mode.NON_THINKING]
    wanted = Counter(mode for exchange in conversation.exchanges for mode in exchange.modes)
    assert len(own) == min(wanted[Mode.NON_THINKING], 1)
    trunk, labels = tree.ids[: tree.lengths[0]], tree.labels[: tree.lengths[0]]
    if own:
        length = len(own[0].ids)
        assert (trunk[:length].tolist(), labels[:length].tolist()) == (own[0].ids, own[0].labels)
        assert (labels[length:] == -100).all()
        assert tree.modes == (Mode.NON_THINKING, *[Mode.THINKING] * wanted[Mode.THINKING])
    elif len(rendered) > 1:
        assert (labels == -100).all()
        assert len(tree.lengths) == 1 + len(rendered)


@pytest.mark.parametrize(("name", "scheme"), FREE_TRUNK)
@few
@given(seed=seeds)
def test_a_trunk_of_history_has_no_loss_and_both_modes_are_branches(name, scheme, seed):
    conversation, rendered, tree = drawn(name, scheme, seed)
    wanted = [mode for exchange in conversation.exchanges for mode in exchange.modes]
    assert [each.mode for each in rendered] == wanted
    if len(wanted) > 1:
        assert (tree.labels[: tree.lengths[0]] == -100).all()
        assert list(tree.modes[1:]) == wanted


@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_tokens_grow_with_the_turns_where_those_of_separate_sequences_grow_with_their_square(name, scheme, tools):
    one = paired(turns=1, tools=tools)
    conversations = [replace(one, exchanges=one.exchanges * turns) for turns in range(1, 9)]
    trees = [fusion_tree(conversation, family_tokenizer(name, scheme)) for conversation in conversations]
    assert not np.diff([len(tree) for tree in trees], 2).any()
    # A parabola: each turn lengthens all sequences after it.
    bends = np.diff([tree.expanded_tokens for tree in trees], 2)
    assert bends.min() == bends.max() > 0
    assert len(trees[-1]) < 0.5 * trees[-1].expanded_tokens


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_a_tool_loop_stays_inside_the_branch_of_its_exchange(name, scheme):
    tokenizer = family_tokenizer(name, scheme)
    tree = fusion_tree(paired(turns=3, tools=True), tokenizer)
    exchanges = [0, 1, 2] if (name, scheme) in OWN_TRUNK else [0, 0, 1, 1, 2, 2]
    assert len(tree.lengths) == 1 + len(exchanges)
    for node, exchange in enumerate(exchanges, start=1):
        start, length, fork = tree.starts[node], tree.lengths[node], tree.forks[node]
        branch, history = tokenizer.decode(tree.ids[start : start + length]), tokenizer.decode(tree.ids[:fork])
        results = [f"{{result}} {number}" for number in range(3)]
        assert [branch.count(result) for result in results] == [2 * (number == exchange) for number in range(3)]
        assert [history.count(result) for result in results] == [2 * (number < exchange) for number in range(3)]


def test_a_pair_of_answers_has_both_and_only_the_non_thinking_one_in_the_trunk():
    tokenizer = family_tokenizer("chatml")
    conversation = paired(turns=2)
    first = conversation.exchanges[0]
    short = (replace(first.steps[0], content="Four, in short.", reasoning=None),)
    conversation = replace(conversation, exchanges=(replace(first, alternative=short), conversation.exchanges[1]))
    tree = fusion_tree(conversation, tokenizer)
    trunk, branch, later = (tokenizer.decode(part) for part in np.split(tree.ids, tree.starts[1:]))
    assert ("Four, in short." in trunk, "0: It is 4." in trunk) == (True, False)
    assert ("Four, in short." in branch, "0: It is 4." in branch) == (False, True)
    assert "Four, in short." not in later
    assert expand(tree) == Renderer(tokenizer).render([conversation])[0]


# --- parts of a tree --------------------------------------------------------------------------------------------


@many
@given(seed=seeds, non_thinking_trunk=st.booleans())
def test_parts_hold_every_sequence_once_and_keep_within_the_budget(seed, non_thinking_trunk):
    draw = random.Random(seed)
    sequences = random_sequences(draw)
    whole = fuse(sequences, non_thinking_trunk=non_thinking_trunk)
    longest = max(len(each.ids) for each in sequences)
    budget = draw.randint(longest, max(longest, len(whole)))
    trees = fuse_within(sequences, budget, non_thinking_trunk=non_thinking_trunk)
    assert max(map(len, trees)) <= budget
    assert len(whole) > budget or as_lists(expand(trees[0])) == as_lists(sequences)
    parts = [part for tree in trees for part in as_lists(expand(tree))]
    assert sorted(parts) == sorted(as_lists(sequences))


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_a_long_conversation_is_split_with_as_much_history_as_each_part_needs(name, scheme):
    tokenizer = family_tokenizer(name, scheme)
    conversation, own = paired(turns=8), (name, scheme) in OWN_TRUNK
    rendered = Renderer(tokenizer).render([conversation])[0]
    sequences = [sequence(each.ids, each.trained, each.mode) for each in rendered]
    budget = max(len(each.ids) for each in rendered) + 40
    trees = fuse_within(sequences, budget, non_thinking_trunk=own)
    assert 1 < len(trees) < len(rendered)
    assert max(map(len, trees)) <= budget
    assert sorted(as_lists(part for tree in trees for part in expand(tree))) == sorted(as_lists(rendered))
    assert len(fuse_within(sequences, None, non_thinking_trunk=own)) == 1


def test_a_sequence_longer_than_the_budget_is_refused_with_the_settings_to_change():
    short, long = sequence([1, 2, 3], [0, 0, 1]), sequence(range(1234), [0] * 1233 + [1])
    with pytest.raises(ValueError, match=r"^a training sequence has 1,234 tokens, and tokens_per_row is 1,000\. ") as e:
        fuse_within([short, long], 1000)
    assert str(e.value).endswith(
        "Raise tokens_per_row, or set max_length and say with on_long_row what happens to longer rows "
        "(--on_long_row drop, or shorten_reasoning)."
    )
    assert len(fuse_within([short, long], 1234)[0]) == 1234


def test_a_single_sequence_is_a_trunk():
    one = sequence([5, 6, 7, 8], [0, 0, 1, 1])
    for trunk in (True, False):
        tree = fuse([one], non_thinking_trunk=trunk)
        assert (tree.lengths, tree.forks, tree.modes, tree.starts) == ((4,), (0,), (Mode.THINKING,), (0,))
        assert as_lists(expand(tree)) == as_lists([one])


@pytest.mark.parametrize("budget", [None, 7, 6])
def test_sequences_without_trained_tokens_are_left_out(budget):
    idle = [sequence([1, 2, 3], [0, 0, 0]), sequence(range(9), [0] * 9, Mode.NON_THINKING)]
    trained = [sequence([1, 2, 3, 4], [0, 0, 1, 1]), sequence([1, 2, 4, 4], [0, 0, 1, 1], Mode.NON_THINKING)]
    trees = fuse_within([idle[0], trained[0], idle[1], trained[1]], budget)
    assert len(trees) == (2 if budget == 6 else 1)
    assert sorted(as_lists(part for tree in trees for part in expand(tree))) == sorted(as_lists(trained))


def test_nothing_to_train_is_refused():
    for sequences in ([], [sequence([1, 2, 3], [0, 0, 0])]):
        for build in (fuse, lambda given: fuse_within(given, 10)):
            with pytest.raises(ValueError, match=r"^sequences: found none with trained tokens, expected at least one"):
                build(sequences)


def test_a_tokenizer_without_our_template_has_no_trees():
    with pytest.raises(ValueError, match="install_chat_template"):
        fusion_tree(paired(turns=1), bare_tokenizer("chatml"))
    with pytest.raises(ValueError, match="install_chat_template"):
        trunk_is_non_thinking(bare_tokenizer("chatml"))
