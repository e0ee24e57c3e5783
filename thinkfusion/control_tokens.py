# SPDX-License-Identifier: Apache-2.0
"""New control tokens, brought to life: a learning rate of their own for their rows, a weight for the closing one.

A token that was just added starts nowhere, and `</think>` is one label in a hundred: at the learning rate of the rest
its row hardly moves, the loss looks healthy all along, and the model ends its traces without closing them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def control_rows(model: PreTrainedModel, ids: list[int]) -> list[tuple[torch.Tensor, list[int] | slice]]:
    """The parameters that hold the rows of the tokens `ids`, each with the rows in it: (tokens, width).

    Those are the input embedding and an output embedding of its own, or, under LoRA, peft's trained rows, which are
    control tokens altogether.
    """
    trained = [
        (parameter, slice(None))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "trainable_tokens_delta" in name
    ]
    if trained:
        return list(trained)
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = {id(layer.weight): layer.weight for layer in layers if layer is not None and layer.weight.requires_grad}
    return [(weight, ids) for weight in weights.values()]


def multiply_updates(
    optimizer: torch.optim.Optimizer, rows: list[tuple[torch.Tensor, list[int] | slice]], factor: float
) -> None:
    """Make every step of `optimizer` move these rows `factor` times as far: their learning rate, times `factor`.

    An optimizer group of their own is not to be had for rows of a matrix, and Adam undoes what is done to gradients.
    """
    import torch

    before: list[torch.Tensor] = []

    def remember(*_: Any) -> None:
        before[:] = [weight.detach()[chosen].clone() for weight, chosen in rows]

    def multiply(*_: Any) -> None:
        with torch.no_grad():
            for (weight, chosen), old in zip(rows, before, strict=True):
                weight[chosen] = old + factor * (weight[chosen] - old)

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(multiply)


def weigh_closing_token(log_probs: torch.Tensor, labels: torch.Tensor, closing_id: int, weight: float) -> torch.Tensor:
    """`log_probs` with those of the closing token times `weight`; both (batch, length), labels not yet shifted."""
    import torch

    return log_probs * torch.where(labels[:, 1:] == closing_id, weight, 1.0).to(log_probs)
