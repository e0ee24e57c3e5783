# SPDX-License-Identifier: Apache-2.0
"""How the two modes are combined: which exchanges are trained in which mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from thinkfusion.conversations import Conversation, DataError, Exchange
from thinkfusion.modes import Mode

MIXTURES = ("paired", "combined")


def mix(conversations: Sequence[Conversation], mixture: str = "paired") -> list[Conversation]:
    """The conversations with the modes that each exchange is trained in.

    `paired` (the default): an exchange with reasoning is trained in both modes, the non-thinking answer being the
    thinking one without its reasoning. The control token is then the only thing that tells the modes apart, so that
    it must be obeyed: format errors in thinking mode fall from 96 % to 0.4 % (KRAFTON's experiments for A.X K1,
    arXiv 2601.09200). `combined`: every exchange in its own mode, for comparison.

    Raises ValueError for an unknown mixture, or when one mode gets no exchange at all; DataError for a row that
    is marked as non-thinking and has reasoning, which `combined` would have to throw away.
    """
    if mixture not in MIXTURES:
        raise ValueError(f"unknown mixture {mixture!r}; choose one of {', '.join(MIXTURES)}.")
    mixed = [
        replace(
            conversation,
            exchanges=tuple(_assign(exchange, mixture, conversation) for exchange in conversation.exchanges),
        )
        for conversation in conversations
    ]
    trained = {mode for conversation in mixed for exchange in conversation.exchanges for mode in exchange.modes}
    for mode in Mode:
        if mode not in trained:
            remedy = (
                "Paired training needs rows with reasoning"
                if mode is Mode.THINKING
                else "Use the mixture 'paired', which trains every row with reasoning in both modes"
            )
            raise ValueError(f"no row is trained in {mode} mode, so the switch cannot be learned. {remedy}.")
    return mixed


def _assign(exchange: Exchange, mixture: str, conversation: Conversation) -> Exchange:
    if not exchange.modes or not exchange.has_reasoning:
        return exchange
    if mixture == "paired":
        return replace(exchange, modes=(Mode.THINKING, Mode.NON_THINKING))
    if exchange.modes == (Mode.NON_THINKING,):
        raise DataError(
            "unexpected_reasoning",
            "mode: the row is marked as non-thinking and has reasoning. Remove one of the two, or use the mixture "
            "'paired'.",
            source=conversation.source,
            line=conversation.line,
        )
    return exchange
