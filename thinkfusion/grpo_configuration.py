# SPDX-License-Identifier: Apache-2.0
"""The settings of RL in both modes: TRL's, and what of the model trains."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl import GRPOConfig

from thinkfusion.configuration import TrainedParts

CLIPPING = {"sequence": (3e-4, 4e-4), "token": (0.2, 0.28)}
"""epsilon and epsilon_high by level: ratios of whole sequences stay much nearer to 1 (GSPO, arXiv 2507.18071) than
those of tokens (DAPO, arXiv 2503.14476)."""
MOST_NEW_TOKENS = 4096


@dataclass
class ThinkFusionGRPOConfig(TrainedParts, GRPOConfig):
    """`GRPOConfig` with the settings of A.X K1's RL: GSPO's ratios, DAPO's loss, a higher clip upwards, no KL.

    Replies are drawn at temperature 1 from all tokens, as the gradient assumes. A cut reply is judged like any other
    (wrong, though no format error): a limit that costs nothing would teach a model to reason past it.
    `mask_truncated_completions` leaves cut replies out, of the loss and of what their group is compared with.
    """

    importance_sampling_level: str = field(
        default="sequence", metadata={"help": "Ratios of whole replies (sequence, GSPO), or of tokens (token)."}
    )
    """Routing makes the ratios of single tokens noisy in a Mixture of Experts; those of whole replies are not."""
    loss_type: str = field(default="dapo", metadata={"help": "The loss; dapo is a mean over all tokens of a step."})
    epsilon: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Clip below; by default 3e-4 for ratios of sequences, 0.2 for those of tokens."}
    )
    """Clips a ratio below 1 - epsilon; None is the default of the level, as of `epsilon_high`. Without
    effect where every reply is used for one step, TRL's and our default."""
    epsilon_high: float | None = field(
        default=None,
        metadata={"help": "Clip above; by default 4e-4 for ratios of sequences, 0.28 for those of tokens."},
    )
    per_device_train_batch_size: int = field(
        default=16, metadata={"help": "Replies of a batch: by default those to one prompt, 8 in each mode."}
    )
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Most tokens of a reply; by default the model's room, at most 4096."}
    )
    """The most tokens of a reply; None: what the model's positions leave after the longest prompt, at most 4,096."""

    def __post_init__(self) -> None:
        self.settle()
        low, high = CLIPPING.get(self.importance_sampling_level, CLIPPING["token"])
        self.epsilon = low if self.epsilon is None else self.epsilon
        self.epsilon_high = high if self.epsilon_high is None else self.epsilon_high
        super().__post_init__()
        groups, rest = divmod(self.generation_batch_size or 0, self.num_generations or 1)
        if rest or groups % 2:
            raise ValueError(
                f"generation_batch_size: found {self.generation_batch_size} replies in groups of "
                f"{self.num_generations}, expected an even number of groups, since each prompt has one in either mode. "
                f"Make per_device_train_batch_size × steps_per_generation × processes a multiple of "
                f"{2 * (self.num_generations or 1)}."
            )
        window = self.gradient_accumulation_steps
        if (self.balance_loss_coef or self.router_bias_update_rate) and (self.steps_per_generation or 1) % window:
            raise ValueError(
                f"balance_loss_coef, router_bias_update_rate: found steps_per_generation {self.steps_per_generation}, "
                f"expected a multiple of gradient_accumulation_steps ({window}), so that a step's tokens are known."
            )
