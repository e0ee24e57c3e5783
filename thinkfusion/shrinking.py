# SPDX-License-Identifier: Apache-2.0
"""Generating for a batch whose rows end at different lengths: those that have ended leave it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMALLEST = 16
"""A batch with fewer rows is generated to its end: a step of half of it is hardly faster."""
LEAVING = 0.25
"""Part of the rows that leaves at a time, not each when it ends: the others' cache is copied whenever some leave."""
PIECE = 1024
"""Tokens of prompts at a time: enough for the products of matrices, few enough that the lengths are similar."""
ROOM = 32
"""Tokens that a cache has room for beyond those it holds: one that is full is copied."""
WORTH = 0.75
"""Part of a padded batch that pieces may compute at most."""
PLAIN = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "max_length", "max_new_tokens"),
    *("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "use_cache", "trust_remote_code"),
}
"""Settings of a generation that read the rows as they are, however many calls they were made in."""


class GrowingLayer(DynamicLayer):
    """Writes new tokens behind those it holds; a `DynamicLayer` copies all that it holds for each."""

    keys: torch.Tensor
    values: torch.Tensor
    rooms: tuple[torch.Tensor, ...] = ()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States: (rows, heads, new tokens, width). Returns all, (rows, heads, tokens, width), as views."""
        held, new = self.get_seq_length(), (key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = held + key_states.shape[-2]
        replaced = not self.rooms or self.keys.data_ptr() != self.rooms[0].data_ptr()
        if replaced or length > self.rooms[0].shape[-2]:
            self.rooms = tuple(each.new_empty(*each.shape[:2], length + ROOM, each.shape[-1]) for each in new)
            if held:
                self.rooms[0][:, :, :held], self.rooms[1][:, :, :held] = self.keys, self.values
        for room, states in zip(self.rooms, new, strict=True):
            room[:, :, held:length] = states
        self.keys, self.values = (room[:, :, :length] for room in self.rooms)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only keep such rows."""
        self.rooms = ()
        super().batch_select_indices(indices)


def growing_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache for a model that `can_shrink` allows."""
    cache = DynamicCache(config=model.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class SomeEnded(StoppingCriteria):
    """Stops a batch when LEAVING of its rows, or more, have one of `ends` behind the first `length` tokens."""

    def __init__(self, ends: torch.Tensor, length: int) -> None:
        self.ends, self.length = ends, length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """input_ids: (rows, length so far). Returns (rows,), all true or none."""
        ended = torch.isin(input_ids[:, self.length :], self.ends).any(1)
        return (ended.sum() >= LEAVING * len(ended)).expand(len(ended))


def generate_shrinking(
    model: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    ends: Sequence[int],
    max_new_tokens: int,
    **arguments: Any,
) -> list[list[int]]:
    """What `model.generate` writes after left-padded prompts, without computing to the end what has ended already.

    `generate` computes every row for as long as the longest one goes on. Here it stops when a quarter of the rows
    have ended, the rest takes its part of the cache along, and so on, so that a step costs at most a third more than
    its living rows do. Rows do not depend on each other but by rounding, so greedy replies are the same; sampled ones
    are drawn with the same probabilities, from other random numbers.

    ids, mask: (rows, length of the prompts). ends: ids of the tokens that end a reply. max_new_tokens: most tokens of a
    row. arguments: others of `generate`, one sequence for a prompt. Returns the new tokens of each row, with what comes
    after its end. For models that `can_shrink` allows; others may fail in the selection of their cache.
    """
    length, left = ids.shape[1], max_new_tokens
    cache = prefill_in_pieces(model, ids, mask, **arguments)
    if cache is None:
        cache = growing_cache(model)
    ending = torch.tensor(list(ends), device=ids.device)
    living = list(range(len(ids)))
    found: list[list[int]] = [[] for _ in living]
    while True:
        stop = StoppingCriteriaList([SomeEnded(ending, length)] if len(ids) >= SMALLEST else [])
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=left,
            eos_token_id=list(ends),
            use_cache=True,
            stopping_criteria=stop,
            return_dict_in_generate=True,
            **arguments,
        )
        written = out.sequences[:, length:]
        for row, tokens in zip(living, written.tolist(), strict=True):
            found[row] = tokens
        new = out.sequences.shape[1] - ids.shape[1]
        left -= new
        (kept,) = torch.where(~torch.isin(written, ending).any(1))
        if not left or not len(kept):
            return found
        ids, mask, cache = (
            out.sequences[kept],
            torch.nn.functional.pad(mask[kept], (0, new), value=1),
            out.past_key_values,
        )
        cache.batch_select_indices(kept)
        living = [living[place] for place in kept.tolist()]


def prefill_in_pieces(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, **arguments: Any
) -> DynamicCache | None:
    """The cache of left-padded prompts but for their last token; None where pieces would hardly be faster than all.

    A batch is as long as its longest prompt. Rows of similar length, PIECE tokens of them at a time, need little
    padding.

    ids, mask: (rows, length). arguments: those of `generate_shrinking`; a token is drawn for each row and dropped. The
    cache holds length - 1 tokens of each row, with zeros at the padding.
    """
    length, lengths = ids.shape[1], mask.sum(1).tolist()
    shortest_first = sorted(range(len(ids)), key=lambda row: lengths[row])
    pieces: list[list[int]] = [[]]
    for row in shortest_first:
        if len(pieces[-1]) * lengths[row] >= PIECE:
            pieces.append([])
        pieces[-1].append(row)
    computed = sum(len(piece) * lengths[piece[-1]] for piece in pieces)
    # A prompt of one token leaves nothing to attend to, and positions that count the padding differ between pieces.
    if computed > WORTH * len(ids) * length or min(lengths) < 2 or not _counts_from_the_mask(model):
        return None
    caches = []
    for piece in pieces:
        first = length - lengths[piece[-1]]
        out = model.generate(
            input_ids=ids[piece, first:-1],
            attention_mask=mask[piece, first:-1],
            max_new_tokens=1,
            use_cache=True,
            return_dict_in_generate=True,
            **arguments,
        )
        caches.append(out.past_key_values)
    whole = growing_cache(model)
    for index, layers in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
        if layers[0].is_initialized:
            keys = torch.cat([_to_length(layer.keys, length - 1) for layer in layers])
            values = torch.cat([_to_length(layer.values, length - 1) for layer in layers])
            whole.update(keys, values, index)
    whole.batch_select_indices(torch.argsort(torch.tensor(shortest_first, device=ids.device)))
    return whole


def _counts_from_the_mask(model: PreTrainedModel) -> bool:
    """Whether `generate` gives the model positions that leave out the padding."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "position_ids" in inspect.signature(plain.forward).parameters


def _to_length(states: torch.Tensor, length: int) -> torch.Tensor:
    """(rows, heads, tokens, width), padded on the left to so many tokens."""
    return torch.nn.functional.pad(states, (0, 0, length - states.shape[-2], 0))


def can_shrink(model: PreTrainedModel, rows: int) -> bool:
    """Whether a batch is worth it, and neither the cache nor a setting of the checkpoint depends on earlier calls.

    Not in training with several processes: where weights are sharded, all have to make the same steps.
    """
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    if rows < SMALLEST or (together and torch.distributed.get_world_size() > 1):
        return False
    settings = model.generation_config.to_diff_dict() if model.generation_config is not None else {}
    if not all(name in PLAIN or name.startswith("_") or not value for name, value in settings.items()):
        return False
    return all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=model.config).layers
    )
