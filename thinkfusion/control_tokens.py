# SPDX-License-Identifier: Apache-2.0
"""New control tokens, brought to life: found by their rows, with a learning rate of their own and a weight in the loss.

A token that was just added starts nowhere, and `</think>` is one label in a hundred: at the learning rate of the rest
its row hardly moves, the loss looks healthy all along, and the model ends its traces without closing them. A weight for
`</think>` alone makes it likely at the end of every text, in both modes: the end of the turn, which is what the other
mode writes there, gets a weight too, so that the mode is what is learned. Both fall while the model trains, since a
token that weighs more is written too often: traces would end early.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RATE_FACTOR, HIGHEST_RATE = 25.0, 1e-2
"""The learning rate of new rows is so many times that of the rest, up to this one. Measured on a real language model
(2e-4, so 5e-3) and on the embedded base (1.5e-3, so 1e-2): `examples/training.md`."""
CLOSING_WEIGHT, LAST_WEIGHT, END_SHARE, FALLS_UNTIL = 15.0, 3.0, 2 / 3, 0.75
"""The weight of a new closing token in the loss at the first step and at the last ones, the share of it that the end
of the turn has, and the share of the steps in which both fall. With 5 for both the end of a text depends on the mode a
good deal later. Traces had 77 % of the length they were taught with where 15 stayed, 102 % where it fell to 3 (116 %
where it fell to 1, and to 2 with twice the rows): `examples/real_language`."""
INITS = ("mean", "end_of_turn")
NEAR_MEAN, TWIN = 0.5, 0.995
"""A row nearer to the mean row than this share of the usual distance, or of a larger cosine than this with the row of
some other token (both less the mean row), was never trained: reserved tokens of pretraining are all alike."""
CLOSES_AT_ALL = 1e-4
"""The least probability of the closing token after a whole trace, of a model that knows it."""
_CHUNK, _SAMPLE = 8192, 4096


class Treatment(NamedTuple):
    """What a training does for its control tokens.

    new: the tokens that are new to the model, each with what tells so. learning_rate: that of their rows, None where
    it is that of the rest. weight, end_weight: those of the closing token and of the end-of-turn token in the loss, at
    the first step; last_weight, last_end_weight: from `FALLS_UNTIL` of the steps on. line: all of it, for the log.
    """

    new: dict[str, str]
    learning_rate: float | None
    weight: float
    end_weight: float
    last_weight: float
    last_end_weight: float
    line: str

    def weights_at(self, progress: float) -> tuple[float, float]:
        """Those of the closing token and of the end of the turn when `progress` (0 to 1) of the steps are done."""
        fallen = min(1.0, progress / FALLS_UNTIL)
        return (
            self.weight + fallen * (self.last_weight - self.weight),
            self.end_weight + fallen * (self.last_end_weight - self.end_weight),
        )


def why_untrained(model: PreTrainedModel, token: int) -> str | None:
    """What tells that the row of `token` was never trained, by its length and its neighbours; None if nothing does.

    Looks at the input embeddings and at output embeddings of their own, (tokens, width).
    """
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = {id(layer.weight): layer.weight.detach() for layer in layers if layer is not None}
    for weight in weights.values():
        found = _untrained_row(weight, token)
        if found is not None:
            return found
    return None


def _untrained_row(weight: torch.Tensor, token: int) -> str | None:
    import torch

    mean = weight.mean(dim=0, dtype=torch.float32)
    usual = (weight[:: max(1, len(weight) // _SAMPLE)].float() - mean).norm(dim=1).median()
    row = weight[token].float()
    if not row.any():
        return "its row is zero"
    own = row - mean
    if own.norm() < NEAR_MEAN * usual:
        return f"its row is the mean of all (at {float(own.norm() / usual):.2f} of the usual distance)"
    own = own / own.norm()
    twin, largest = -1, -1.0
    for start in range(0, len(weight), _CHUNK):
        others = weight[start : start + _CHUNK].float() - mean
        cosines = (others @ own) / others.norm(dim=1).clamp(min=1e-12)
        if start <= token < start + _CHUNK:
            cosines[token - start] = -1.0
        place = int(cosines.argmax())
        if float(cosines[place]) > largest:
            twin, largest = start + place, float(cosines[place])
    return f"its row is that of token {twin} (cosine {largest:.3f})" if largest > TWIN else None


def new_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Sequence[str],
    added: Sequence[int],
    *,
    rows_are_whole: bool = True,
) -> dict[str, str]:
    """Those of the control tokens `tokens` that are new to the model, with what tells so; `added` were just added.

    rows_are_whole: False where this process holds a part of the weights, whose rows tell nothing.
    """
    found = {}
    for token in tokens:
        number = tokenizer.convert_tokens_to_ids(token)
        why = "it was added" if number in added else why_untrained(model, number) if rows_are_whole else None
        if why is not None:
            found[token] = why
    return found


def start_as(model: PreTrainedModel, ids: Sequence[int], start: int) -> None:
    """Start the rows of the tokens `ids`, in every embedding, as the row of the token `start`."""
    import torch

    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    with torch.no_grad():
        for layer in layers:
            if layer is not None:
                layer.weight[list(ids)] = layer.weight[start].clone()


def check_init(init: str) -> None:
    """Raises ValueError for a start that there is not."""
    if init not in INITS:
        raise ValueError(f"control_token_init: found {init!r}, expected one of {', '.join(INITS)}.")


def settle(
    new: dict[str, str],
    closing: str,
    *,
    closes: float | None,
    closed: bool = True,
    learning_rate: float,
    own_rate: float | None,
    weight: float | None,
    end_weight: float | None = None,
    sharded: bool = False,
) -> Treatment:
    """Choose what is done for control tokens; what is given (not None) is done, whatever the model knows.

    new: see `new_tokens`. closing: the closing token. closes: its probability after whole traces before the training,
    as the switch probe found it: a model that never closes a trace does not know the token, whatever its row looks
    like. closed: whether rows train it. learning_rate: of the rest; own_rate, weight, end_weight: as given. sharded:
    rows cannot have a learning rate.
    """
    new = dict(new)
    if closes is not None and closes < CLOSES_AT_ALL and closing not in new:
        new[closing] = f"after a whole trace its probability is {closes:.1g}"
    rate = own_rate
    if rate is None and new and not sharded:
        rate = max(learning_rate, min(RATE_FACTOR * learning_rate, HIGHEST_RATE)) or None
    chosen = (CLOSING_WEIGHT if closing in new else 1.0) if weight is None else weight
    # Where the weight of the closing token was given as 1 or less, this was to be switched off.
    balanced = max(1.0, END_SHARE * chosen) if closing in new and closed else 1.0
    ending = balanced if end_weight is None else end_weight
    falls, end_falls = weight is None and chosen != 1, weight is end_weight is None and balanced != 1
    reasons: dict[str, list[str]] = {}
    for token, why in new.items():
        reasons.setdefault(why, []).append(token)
    told = "; ".join(f"{', '.join(tokens)}: {why}" for why, tokens in reasons.items())
    does = "the learning rate of the rest" if rate is None else f"a learning rate of {rate:g} for their rows"
    does += f", and {closing} the weight {chosen:g} in the loss{f', falling to {LAST_WEIGHT:g}' if falls else ''}"
    if ending != 1:
        does += f", the end of the turn {ending:.3g}{', falling too' if end_falls else ''}"
    if new:
        line = f"Control tokens that are new to the model ({told}) get {does}."
    elif own_rate is None and weight is None and end_weight is None:
        line = "Control tokens: the model knows all of them, they are trained as everything else."
    else:
        line = f"Control tokens: the model knows all of them. As asked for, they get {does}."
    if not closed and chosen != 1:
        line += f" (No row ends a trace with {closing}: its weight does nothing.)"
    if sharded and new and own_rate is None:
        line += " (Sharded weights: no learning rate of their own.)"
    last = LAST_WEIGHT if falls else chosen
    last_end = max(1.0, END_SHARE * LAST_WEIGHT) if end_falls else ending
    return Treatment(new, rate, chosen, ending, last, last_end, line)


def control_rows(model: PreTrainedModel, ids: list[int]) -> list[tuple[torch.Tensor, list[int]]]:
    """The trained parameters that hold the rows of the tokens `ids`, each with the rows in it: (tokens, width).

    Those are the input embedding and an output embedding of its own, or, under LoRA, peft's trained rows.
    """
    found: dict[int, tuple[torch.Tensor, list[int]]] = {}
    for module in model.modules():
        deltas = getattr(module, "trainable_tokens_delta", None) or {}
        for adapter, parameter in deltas.items():
            if parameter.requires_grad:
                known = list(module.token_indices[adapter])
                found[id(parameter)] = (parameter, [known.index(token) for token in ids if token in known])
    if not found:
        layers = [model.get_input_embeddings(), model.get_output_embeddings()]
        weights = [layer.weight for layer in layers if layer is not None and layer.weight.requires_grad]
        found = {id(weight): (weight, list(ids)) for weight in weights}
    return [(parameter, rows) for parameter, rows in found.values() if rows]


def multiply_updates(
    optimizer: torch.optim.Optimizer, rows: list[tuple[torch.Tensor, list[int]]], factor: float
) -> None:
    """Make every step of `optimizer` move these rows `factor` times as far: their learning rate, times `factor`.

    An optimizer group of their own is not to be had for rows of a matrix, and Adam undoes what is done to gradients.
    """
    import torch

    # Made once: a list of rows would be made a tensor at every step.
    moved = [(weight, torch.tensor(chosen, device=weight.device)) for weight, chosen in rows]
    before: list[torch.Tensor] = []

    def remember(*_: object) -> None:
        before[:] = [weight.detach().index_select(0, places) for weight, places in moved]

    def multiply(*_: object) -> None:
        with torch.no_grad():
            for (weight, places), old in zip(moved, before, strict=True):
                weight.index_copy_(0, places, old + factor * (weight.index_select(0, places) - old))

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(multiply)


def weigh_tokens(log_probs: torch.Tensor, labels: torch.Tensor, weights: Mapping[int, float]) -> torch.Tensor:
    """`log_probs` with those of each token of `weights` times its weight; both (batch, length), labels unshifted."""
    if not weights:
        return log_probs
    factors = log_probs.detach().new_ones(log_probs.shape)
    for token, weight in weights.items():
        factors.masked_fill_(labels[:, 1:] == token, weight)
    return log_probs * factors
