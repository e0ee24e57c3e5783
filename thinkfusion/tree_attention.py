# SPDX-License-Identifier: Apache-2.0
"""The attention of fusion trees: every node's queries against the keys that they see, and nothing else.

A dense mask over a packed row costs the square of its length. Here a node attends to the trunk up to its fork and to
itself, causally at the lower right, layer by layer with the window that the model gives that layer; on a GPU the same
visibility goes to FlexAttention as a `BlockMask`. Both are reached through transformers' `AttentionInterface`, under
the name `IMPLEMENTATION`, which a model has only within `tree_attention`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

IMPLEMENTATION = "thinkfusion_tree"
REPLACED = (None, "sdpa", "eager", "flex_attention")
"""The implementations in whose place ours computes the same; others are asked for by name and cannot take a mask."""
BRANCHING_LAYERS = {"full_attention", "sliding_attention", "attention"}
QUERIES_PER_BLOCK = 128
"""Long nodes are cut into blocks of queries: the whole would be a square, half of which is computed in vain."""
GROUPED_TOKENS = 256
"""Small trees are computed together under one mask, up to so many tokens: less work than a call for each node."""


class Node(NamedTuple):
    """A node of a row: its tokens are `start` to `stop`; it sees `fork` tokens from `trunk` on, and itself."""

    trunk: int
    fork: int
    start: int
    stop: int


class _Scores(NamedTuple):
    """How a layer scores keys: its dropout, its scale (None for the usual), attention sinks (heads,), and a cap."""

    dropout: float = 0.0
    scaling: float | None = None
    sinks: torch.Tensor | None = None
    softcap: float | None = None


class _Block(NamedTuple):
    """Queries, and the two stretches of keys that they see; the last query sees the last key."""

    queries: slice
    trunk: slice
    own: slice
    mask: torch.Tensor | None
    causal: bool


class RowLayout:
    """The nodes of one row, (1, tokens), for the attention of every layer.

    nodes: in the order of the row, together all of its tokens.
    """

    def __init__(self, nodes: Sequence[Sequence[int]]) -> None:
        self.nodes = [Node(*node) for node in nodes]
        self.tokens = self.nodes[-1].stop
        self.layers = 0
        self._blocks: dict[tuple[int | None, torch.device], list[_Block]] = {}
        self._block_masks: dict[tuple[int | None, torch.device], Any] = {}

    def blocks(self, window: int | None, device: torch.device) -> list[_Block]:
        """The queries in blocks, each with its keys; `window` is how many positions a token sees, or all."""
        if (window, device) not in self._blocks:
            blocks: list[_Block] = []
            for nodes in self._groups:
                if len(nodes) == 1 or nodes[-1].stop - nodes[0].start > GROUPED_TOKENS:
                    blocks += [block for node in nodes for block in _blocks_of(node, window, device)]
                else:
                    blocks.append(self._grouped(slice(nodes[0].start, nodes[-1].stop), window, device))
            self._blocks[window, device] = blocks
        return self._blocks[window, device]

    @cached_property
    def _groups(self) -> list[list[Node]]:
        """The nodes of whole trees, as many of them together as are small."""
        groups: list[list[Node]] = []
        for _, tree in groupby(self.nodes, lambda node: node.trunk):
            nodes = list(tree)
            if groups and nodes[-1].stop - groups[-1][0].start <= GROUPED_TOKENS:
                groups[-1] += nodes
            else:
                groups.append(nodes)
        return groups

    @property
    def group_tokens(self) -> list[int]:
        """The tokens of each group of whole trees: no block's keys lie in two of them."""
        return [nodes[-1].stop - nodes[0].start for nodes in self._groups]

    def _grouped(self, at: slice, window: int | None, device: torch.device) -> _Block:
        numbers = torch.arange(at.start, at.stop)
        mask = self._visible(window, torch.device("cpu"))(None, None, numbers[:, None], numbers)
        return _Block(at, slice(at.start, at.start), at, mask.to(device), False)

    @cached_property
    def _numbers(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(tokens,) each: document, node, fork and position."""
        lengths = torch.tensor([node.stop - node.start for node in self.nodes])

        def each(values: list[int]) -> torch.Tensor:
            return torch.tensor(values).repeat_interleave(lengths)

        offset = each([node.fork - node.start for node in self.nodes])
        node = [number if given.start != given.trunk else -1 for number, given in enumerate(self.nodes)]
        document, fork = each([given.trunk for given in self.nodes]), each([given.fork for given in self.nodes])
        return document, each(node), fork, torch.arange(self.tokens) + offset

    def _visible(self, window: int | None, device: torch.device) -> Callable[..., torch.Tensor]:
        """Whether a query sees a key, as FlexAttention asks it: of indices in the row, of any shape."""
        document, node, fork, position = (each.to(device) for each in self._numbers)

        def visible(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            own = (node[query] == node[key]) & (query >= key)
            trunk = (node[key] == -1) & (position[key] < fork[query])
            seen = (document[query] == document[key]) & (own | trunk)
            return seen if window is None else seen & (position[query] - position[key] < window)

        return visible

    def block_mask(self, window: int | None, device: torch.device) -> Any:
        """The same visibility for FlexAttention; made once, and shared by the layers of one window."""
        from torch.nn.attention.flex_attention import create_block_mask

        if (window, device) not in self._block_masks:
            size, compiled = (None, None, self.tokens, self.tokens), device.type == "cuda"
            self._block_masks[window, device] = create_block_mask(
                self._visible(window, device), *size, device=str(device), _compile=compiled
            )
        return self._block_masks[window, device]


def _blocks_of(node: Node, window: int | None, device: torch.device) -> Iterator[_Block]:
    length = node.stop - node.start
    size = QUERIES_PER_BLOCK if window is None else max(window, QUERIES_PER_BLOCK)
    for first in range(0, length, size):
        last = min(first + size, length)
        # Positions, of which the first `fork` lie in the trunk.
        begin = 0 if window is None else max(0, node.fork + first - window + 1)
        trunk = slice(node.trunk + min(begin, node.fork), node.trunk + node.fork)
        own = slice(node.start + max(0, begin - node.fork), node.start + last)
        keys = node.fork + last - begin
        banded = window is not None and keys > window
        causal = keys == last - first and not banded
        mask = None
        if not causal:
            query = torch.arange(node.fork + first, node.fork + last, device=device)[:, None]
            key = torch.arange(begin, node.fork + last, device=device)
            mask = query >= key
            if window is not None:
                mask &= query - key < window
        yield _Block(slice(node.start + first, node.start + last), trunk, own, mask, causal)


def tree_attention_forward(  # noqa: PLR0917 - transformers calls it so
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    s_aux: torch.Tensor | None = None,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
    tree_layout: RowLayout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over a row of trees, as transformers calls it.

    query, key, value: (1, heads, tokens, width), keys and values of fewer heads where the model groups them.
    attention_mask: what our mask function made for this layer: its window, or None.
    tree_layout: the nodes of the row, which the caller of the model gives as a keyword argument.
    s_aux: (heads,), the logits of attention sinks. Returns (1, tokens, heads, width of values).

    Raises ValueError without a layout, and for a layer with a mask or a bias of its own.
    """
    if tree_layout is None:
        raise ValueError(
            "tree_layout: missing; a model within tree_attention is called with the layout of its rows. If it was, its "
            "layers do not pass it on: set sequence_layout='padded'."
        )
    if position_bias is not None or (attention_mask is not None and attention_mask.numel() > 1):
        raise ValueError(
            f"{type(module).__name__} makes a mask or a bias of its own, which knows nothing of trees: set "
            "sequence_layout='padded'."
        )
    tree_layout.layers += 1
    window = None if attention_mask is None else int(attention_mask)
    if query.device.type == "cuda" and not dropout:  # which FlexAttention has not
        from transformers.integrations.flex_attention import flex_attention_forward

        mask = tree_layout.block_mask(window, query.device)
        options = {"scaling": scaling, "s_aux": s_aux, "softcap": softcap}
        output, _ = flex_attention_forward(module, query, key, value, mask, **options)
        return output, None
    scores = _Scores(dropout, scaling, s_aux, softcap)
    outputs = _attended(query, key, value, layout=tree_layout, window=window, scores=scores)
    return torch.cat(list(outputs), dim=1), None


def _attended(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    layout: RowLayout,
    window: int | None,
    scores: _Scores,
) -> Iterator[torch.Tensor]:
    """For each block (1, queries, heads, width of values).

    The row is split into groups of trees before stretches of them are taken: the gradient of a split is a
    concatenation, that of a slice a row of zeros for each slice.
    """
    attend = _sdpa if scores.sinks is None and scores.softcap is None else _explicit
    blocks, tokens = layout.blocks(window, query.device), layout.group_tokens
    queries = torch.split(query, [block.queries.stop - block.queries.start for block in blocks], dim=2)
    groups = zip(torch.split(key, tokens, dim=2), torch.split(value, tokens, dim=2), strict=True)
    start = stop = 0
    for block, own_queries in zip(blocks, queries, strict=True):
        if block.queries.start == stop:
            keys, values = next(groups)
            start, stop = stop, stop + keys.shape[2]
        seen = _stretches(block, start)
        yield attend(own_queries, _taken(keys, seen), _taken(values, seen), block, scores).transpose(1, 2)


def _taken(given: torch.Tensor, stretches: list[slice]) -> torch.Tensor:
    if len(stretches) == 1:
        return given[:, :, stretches[0]]
    return torch.cat([given[:, :, stretch] for stretch in stretches], dim=2)


def _stretches(block: _Block, start: int) -> list[slice]:
    """The keys of a block, counted from `start`; one stretch where they are neighbours."""
    trunk, own = (slice(given.start - start, given.stop - start) for given in (block.trunk, block.own))
    if trunk.start == trunk.stop:
        return [own]
    return [slice(trunk.start, own.stop)] if trunk.stop == own.start else [trunk, own]


def _sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block: _Block, scores: _Scores) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=block.mask,
        dropout_p=scores.dropout,
        is_causal=block.causal,
        scale=scores.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _explicit(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block: _Block, scores: _Scores
) -> torch.Tensor:
    """Attention with sinks or a cap of its scores, which torch's own has not."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    logits = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scores.scaling is None else scores.scaling)
    if scores.softcap is not None:
        logits = scores.softcap * torch.tanh(logits / scores.softcap)
    mask = block.mask
    if mask is None:
        mask = torch.ones(logits.shape[2:], dtype=torch.bool, device=logits.device).tril()
    logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    if scores.sinks is not None:
        sinks = scores.sinks.reshape(1, -1, 1, 1).expand(1, -1, logits.shape[2], 1)
        logits = torch.cat([logits, sinks.to(logits)], dim=-1)
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32).to(value.dtype)[..., : key.shape[2]]
    return torch.nn.functional.dropout(weights, scores.dropout) @ value


def _window_of_layer(*_: Any, local_size: int | None = None, **__: Any) -> torch.Tensor | None:
    """In place of a mask: the window of the layers that it is for. The model decides which layers those are."""
    return None if local_size is None else torch.tensor(local_size)


AttentionInterface.register(IMPLEMENTATION, tree_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, _window_of_layer)


@contextmanager
def tree_attention(model: torch.nn.Module) -> Iterator[None]:
    """Within this, `model` expects rows of trees: `model(input_ids, position_ids=…, tree_layout=RowLayout(nodes))`.

    The backward pass belongs inside too, if layers are checkpointed.
    """
    given = [getattr(module, "config", None) for module in model.modules()]
    configs = list({id(config): config for config in given if isinstance(config, PretrainedConfig)}.values())
    before = [(config, config._attn_implementation) for config in configs]
    for config, _ in before:
        config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


def why_not_trees(model: PreTrainedModel) -> str | None:
    """Why the layers of a model cannot branch, or None if they can; told from its config and its signature."""
    config = model.config.get_text_config()
    kinds = _layer_kinds(config)
    others = sorted(set(kinds) - BRANCHING_LAYERS)
    if others:
        return f"{type(model).__name__} has layers of another kind than attention over all tokens: {', '.join(others)}"
    if getattr(config, "index_topk", None):
        return f"{type(model).__name__} chooses the keys that it attends to (index_topk)"
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return f"{type(model).__name__} takes no position_ids"
    if not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} does not take its attention from transformers' AttentionInterface"
    return None


def _layer_kinds(config: Any) -> list[str]:
    for name in ("layer_types", "layers_block_type", "block_types"):
        kinds = getattr(config, name, None)
        if kinds is not None:
            return list(kinds)
    return []


def check_implementation(model: PreTrainedModel) -> None:
    """Raise ValueError for a model loaded with an attention that trees would silently replace by another."""
    chosen: str | None = model.config.get_text_config()._attn_implementation
    if chosen not in REPLACED:
        raise ValueError(
            f"attn_implementation: {chosen!r} cannot take the visibility of packed rows. Load the model with "
            "attn_implementation='sdpa', or set sequence_layout='padded'."
        )
