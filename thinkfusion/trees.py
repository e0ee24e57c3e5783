# SPDX-License-Identifier: Apache-2.0
"""Fusion trees: all training sequences of one conversation, with what they share computed once.

A conversation of n turns has up to 2n training sequences, each with the history of the one before. A tree holds them
as a trunk, the history as inference renders it, and a branch for what each sequence adds. A branch sees the trunk up
to its fork, and itself; its positions go on from the fork. Where the non-thinking rendering is the history (the scheme
`control`), it is the trunk and carries its own loss; elsewhere the trunk has none. Loss and gradient are those of the
separate sequences, and the tokens grow with the turns, not with their square.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from thinkfusion.chat_templates import installed_template
from thinkfusion.modes import Mode
from thinkfusion.rendering import IGNORED, Rendered, Renderer

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from thinkfusion.conversations import Conversation


class TrainingSequence(NamedTuple):
    """One training sequence: `ids` and `labels` (-100 where untrained) of equal lengths, 32-bit integers."""

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    mode: Mode

    @property
    def first_trained(self) -> int:
        """The index of the first trained token; the length if there is none."""
        trained = self.labels != IGNORED
        return int(trained.argmax()) if trained.any() else len(trained)


@dataclass(frozen=True, eq=False)
class FusionTree:
    """The trunk and the branches of one conversation, laid one after another.

    ids, labels: (tokens,), 32-bit integers; labels are -100 where untrained, and the first of each node always is, so
        that the usual shift of labels by one token holds across the whole row.
    lengths, forks, modes: one element a node, the trunk first; a node sees `forks` tokens of the trunk (0 for the
        trunk itself), and what it trains is of `modes`.
    trunk_at: where the trunk's own sequence stands among the separate ones, if it has loss; None: after the others.

    Which tokens are visible is told by three numbers a token. A token sees another of its `document` that is in its own
    `node` and not after it, or in node 0 at a position below its `fork`.
    """

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    lengths: tuple[int, ...]
    forks: tuple[int, ...]
    modes: tuple[Mode, ...]
    trunk_at: int | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The index of the first token of each node."""
        return tuple(int(end) - length for end, length in zip(np.cumsum(self.lengths), self.lengths, strict=True))

    @cached_property
    def positions(self) -> NDArray[np.int32]:
        """(tokens,): the position of each token in the sequences that it belongs to."""
        offsets = np.subtract(self.forks, self.starts, dtype=np.int32)
        positions: NDArray[np.int32] = np.arange(len(self), dtype=np.int32) + np.repeat(offsets, self.lengths)
        return positions

    @cached_property
    def document(self) -> NDArray[np.int32]:
        """(tokens,): 0 for a tree alone; among several in a row each has its own number."""
        return np.zeros(len(self), dtype=np.int32)

    @cached_property
    def node(self) -> NDArray[np.int32]:
        """(tokens,): the node of each token; 0 is the trunk."""
        return np.repeat(np.arange(len(self.lengths), dtype=np.int32), self.lengths)

    @cached_property
    def fork(self) -> NDArray[np.int32]:
        """(tokens,): how many tokens of the trunk each token sees, beside its own node."""
        return np.repeat(np.array(self.forks, dtype=np.int32), self.lengths)

    @property
    def expanded_tokens(self) -> int:
        """The tokens of the separate sequences."""
        return sum(len(sequence.ids) for sequence in expand(self))


def fuse(sequences: Sequence[TrainingSequence], *, non_thinking_trunk: bool = True) -> FusionTree:
    """The tree of the sequences of one conversation.

    sequences: those of `Renderer.render`, in any order; their prefixes are compared token by token.
    non_thinking_trunk: whether history is rendered as non-thinking answers are, so that the non-thinking sequence is
        the trunk (see `trunk_is_non_thinking`). Otherwise the trunk is the longest history, without loss.

    A sequence without trained tokens is left out. Raises ValueError if nothing is left.
    """
    sequences = _trained(sequences)
    if not sequences:
        raise ValueError("sequences: found none with trained tokens, expected at least one.")
    if len(sequences) == 1:
        ids, labels, mode = sequences[0]
        return FusionTree(ids, labels, (len(ids),), (0,), (mode,))
    at = next((at for at, each in enumerate(sequences) if each.mode is Mode.NON_THINKING), None)
    at = at if non_thinking_trunk else None
    main = None if at is None else sequences[at]
    branches = [sequence for sequence in sequences if sequence is not main]
    # One token before the first trained one, so that what predicts it belongs to the branch too.
    history = max((each.ids[: max(each.first_trained - 1, 0)] for each in branches), key=len)
    trunk = history if main is None or _shared(main.ids, history) == len(main.ids) else main.ids
    forks = [min(_shared(trunk, each.ids), max(each.first_trained - 1, 0)) for each in branches]
    labels = np.full(len(trunk), IGNORED, dtype=np.int32)
    if main is not None:
        labels[: len(main.ids)] = main.labels
    return FusionTree(
        np.concatenate([trunk, *(each.ids[fork:] for each, fork in zip(branches, forks, strict=True))]),
        np.concatenate([labels, *(each.labels[fork:] for each, fork in zip(branches, forks, strict=True))]),
        (len(trunk), *(len(each.ids) - fork for each, fork in zip(branches, forks, strict=True))),
        (0, *forks),
        (Mode.NON_THINKING if main is None else main.mode, *(each.mode for each in branches)),
        at,
    )


def fuse_within(
    sequences: Sequence[TrainingSequence], budget: int | None, *, non_thinking_trunk: bool = True
) -> list[FusionTree]:
    """The tree of the sequences, or several of at most `budget` tokens, each with as much trunk as it needs.

    Every sequence with trained tokens is in exactly one of them. Raises ValueError for one longer than the budget.
    """
    whole = fuse(sequences, non_thinking_trunk=non_thinking_trunk)
    if budget is None or len(whole) <= budget:
        return [whole]
    groups: list[list[TrainingSequence]] = []
    trees: list[FusionTree] = []
    for sequence in sorted(_trained(sequences), key=lambda each: -len(each.ids)):
        if len(sequence.ids) > budget:
            raise ValueError(
                f"a training sequence has {len(sequence.ids):,} tokens, and tokens_per_row is {budget:,}. Raise "
                "tokens_per_row, or set max_length and say with on_long_row what happens to longer rows "
                "(--on_long_row drop, or shorten_reasoning)."
            )
        for number, group in enumerate(groups):
            tree = fuse([*group, sequence], non_thinking_trunk=non_thinking_trunk)
            if len(tree) <= budget:
                groups[number], trees[number] = [*group, sequence], tree
                break
        else:
            groups.append([sequence])
            trees.append(fuse([sequence], non_thinking_trunk=non_thinking_trunk))
    return trees


def expand(tree: FusionTree) -> list[Rendered]:
    """The separate sequences that a tree stands for, in the order in which they were fused."""
    trunk = tree.ids[: tree.lengths[0]]
    sequences = []
    for start, length, fork, mode in zip(tree.starts, tree.lengths, tree.forks, tree.modes, strict=True):
        ids = np.concatenate([trunk[:fork], tree.ids[start : start + length]])
        trained = np.concatenate([np.zeros(fork, dtype=bool), tree.labels[start : start + length] != IGNORED])
        if trained.any():
            end = int(np.flatnonzero(trained)[-1]) + 1
            sequences.append(Rendered(ids[:end].tolist(), trained[:end].tolist(), mode))
    if (tree.labels[: len(trunk)] != IGNORED).any():
        own = sequences.pop(0)
        sequences.insert(len(sequences) if tree.trunk_at is None else tree.trunk_at, own)
    return sequences


def fusion_tree(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> FusionTree:
    """The fusion tree of a conversation, each exchange in the modes that it has (`mix` gives it both).

    `expand` gives back the sequences of `Renderer.render`. Raises ValueError for a tokenizer without our template, and
    what `Renderer.targets` raises.
    """
    renderer = Renderer(tokenizer)
    sequences = [
        TrainingSequence(np.array(each.ids, dtype=np.int32), np.array(each.labels, dtype=np.int32), each.mode)
        for each in renderer.render([conversation])[0]
    ]
    return fuse(sequences, non_thinking_trunk=trunk_is_non_thinking(tokenizer))


def trunk_is_non_thinking(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's template, made by us, shows earlier answers as they were written without thinking."""
    template = installed_template(tokenizer)
    if template is None:
        raise ValueError("the tokenizer has no template of ours; call install_chat_template(tokenizer, model) first.")
    return template.scheme.history_is_non_thinking and not template.dialect.answers_differ_in_history


def _trained(sequences: Sequence[TrainingSequence]) -> list[TrainingSequence]:
    return [sequence for sequence in sequences if sequence.first_trained < len(sequence.ids)]


def _shared(left: NDArray[np.int32], right: NDArray[np.int32]) -> int:
    """How many tokens two sequences have in common at their beginnings."""
    length = min(len(left), len(right))
    differs = left[:length] != right[:length]
    return int(differs.argmax()) if differs.any() else length
