# SPDX-License-Identifier: Apache-2.0
"""The settings of training both modes: TRL's, and those of the two modes and their data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from trl import SFTConfig

from thinkfusion.control_tokens import INITS, check_init
from thinkfusion.dialects import get_dialect
from thinkfusion.formats import RecordOptions
from thinkfusion.mixture import MIXTURES, MixtureOptions
from thinkfusion.modes import Mode, get_scheme
from thinkfusion.packing import LAYOUTS
from thinkfusion.sampling_defaults import parse_generation_defaults
from thinkfusion.sequences import ON_LONG_ROW, Plan
from thinkfusion.shortening import ReasoningOptions
from thinkfusion.weighting import ModeWeights


@dataclass
class TrainedParts:
    """Settings that any training has: what of the model trains, and how its experts are kept in balance."""

    router_aux_loss_coef: float | None = field(default=0.0, metadata={"help": "Weight of transformers' balance loss."})
    """0: transformers' balance loss pools all layers and takes collapsed routers for balanced ones."""
    train_router: bool | None = field(
        default=None, metadata={"help": "Train the routers; by default in full fine-tuning, and not under LoRA."}
    )
    """Whether routers train; None: in full fine-tuning, and not under LoRA. This and the next four say what of the
    model trains, see `set_trainable` and `lora_config`."""
    train_experts: bool = field(default=True, metadata={"help": "Train the routed experts."})
    train_shared_experts: bool = field(
        default=True, metadata={"help": "Train shared experts, and the MLPs of layers without experts."}
    )
    train_attention: bool = field(default=True, metadata={"help": "Train the attention."})
    train_embeddings: bool | None = field(
        default=None,
        metadata={"help": "Train all embeddings; by default in full fine-tuning, and under LoRA the control tokens'."},
    )
    """Whether all embeddings train. The rows of the control tokens always do."""
    balance_loss_coef: float = field(
        default=0.0, metadata={"help": "Weight of the load-balancing loss of each layer's experts; 0: none."}
    )
    """The weight of our balance loss, per layer and over all tokens of a step but padding: `thinkfusion.balance`."""
    router_bias_update_rate: float = field(
        default=0.0, metadata={"help": "By how much a step moves the routers' correction biases; 0 keeps them."}
    )
    """How far each step moves the correction biases of routers that have them (DeepSeek-V3, A.X K1, GLM-4.5: 0.001 in
    their pretraining) towards the experts that got too few tokens; 0 keeps them as they are."""
    routing_steps: int = field(default=0, metadata={"help": "Log how tokens are routed every so many steps; 0: never."})

    def settle(self) -> None:
        """Check these, and fit precision and device to the machine; to be called before TRL's own checks."""
        for name in ("balance_loss_coef", "router_bias_update_rate", "routing_steps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected a number of at least 0.")
        own: Any = self
        if own.bf16 is None and not own.fp16:
            own.bf16 = torch.cuda.is_available() and not own.use_cpu
        # Told so, and only then, processes on a CPU find each other.
        own.use_cpu = own.use_cpu or not torch.accelerator.is_available()
        own.dataloader_pin_memory = own.dataloader_pin_memory and not own.use_cpu

    def kinds_that_train(self, *, lora: bool) -> dict[str, bool]:
        """The settings `train_…`, for `lora_config` or `set_trainable`; some defaults are those of full fine-tuning."""
        return {
            "train_router": not lora if self.train_router is None else self.train_router,
            "train_experts": self.train_experts,
            "train_shared_experts": self.train_shared_experts,
            "train_attention": self.train_attention,
            "train_embeddings": not lora if self.train_embeddings is None else self.train_embeddings,
        }


@dataclass
class ThinkFusionConfig(TrainedParts, SFTConfig):
    """`SFTConfig` with the settings of the two modes, and with other defaults where TRL's would harm them.

    TRL's `max_length` cuts rows at 1,024 tokens, inside the reasoning; ours defaults to what the model can take, and
    a longer row is an error or a counted skip. bfloat16 is on where a GPU is, off on a CPU, unless set.
    """

    mixture: str = field(default="paired", metadata={"help": f"How modes are combined: {', '.join(MIXTURES)}."})
    """How the modes are combined. This and the next five: see `MixtureOptions`."""
    pair_fraction: float = field(default=1.0, metadata={"help": "Share of rows with reasoning trained in both modes."})
    ratio: str | None = field(
        default=None, metadata={"help": "Share of thinking (0.6), or ratio to non-thinking (1.5:1)."}
    )
    ratio_unit: str = field(default="tokens", metadata={"help": "What the ratio counts: tokens or samples."})
    max_rows_per_source: int | None = field(default=None, metadata={"help": "At most so many rows of each source."})
    max_tokens_per_source: int | None = field(
        default=None, metadata={"help": "At most so many trained tokens of each source."}
    )
    shorten_fraction: float = field(default=0.0, metadata={"help": "Share of the rows whose traces are shortened."})
    """Traces that end early. This and the next three: see `ReasoningOptions`."""
    shorten_budget: str | None = field(default=None, metadata={"help": "Least and most tokens of these: 32,512."})
    remove_fraction: float = field(default=0.0, metadata={"help": "Share of the rows that lose their traces."})
    close_at: int | None = field(
        default=None, metadata={"help": "Cut traces at so many tokens, and train only </think> and the end."}
    )
    scheme: str = field(default="control", metadata={"help": "How prompts announce a mode: control, empty-block."})
    """The mode scheme that is installed if the tokenizer's template is not ours yet."""
    dialect: str | None = field(
        default=None, metadata={"help": "The markup of the messages; by default the checkpoint's family."}
    )
    """The markup of the messages, one of `DIALECTS`; None recognises the family of the checkpoint."""
    default_mode: str = field(
        default="thinking", metadata={"help": "The mode without a switch, stored in the template."}
    )
    """The mode of a prompt without a switch, stored in the template that is installed."""
    generation_defaults: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "How each mode samples, stored with the checkpoint: qwen3, or JSON by mode."}
    )
    """How each mode samples by default, stored in the checkpoint's generation_config.json: "qwen3" (0.6, 0.95, 20 and
    0.7, 0.8, 20), or temperature, top_p and top_k by mode; None leaves them as they are. See `set_generation_defaults`.
    """
    on_bad_row: str = field(default="error", metadata={"help": "error: stop at a bad row; skip: leave out, and count."})
    """What happens to rows that cannot be trained on."""
    max_skipped: float = field(default=0.01, metadata={"help": "Largest share of skipped rows that is accepted."})
    """The largest share of rows that may be skipped; more of them stop the run with the report."""
    on_long_row: str = field(
        default="error", metadata={"help": f"What happens to rows over max_length: {', '.join(ON_LONG_ROW)}."}
    )
    """Too long a row is a bad row ("error"), is left out and counted ("drop"), or has its reasoning shortened."""
    max_length: int | None = field(default=None, metadata={"help": "Longest row in tokens; by default the model's."})
    """The longest row allowed, in tokens; None is the model's own limit. Rows are never cut."""
    sequence_layout: str = field(default="tree", metadata={"help": f"How sequences become rows: {', '.join(LAYOUTS)}."})
    """"tree" computes what the sequences of a conversation share once, "packed" lays them one after another, both
    without padding; "padded" is a plain batch. All three train the same. See `examples/fusion_trees.md`."""
    tokens_per_row: int | None = field(
        default=None, metadata={"help": "Most tokens of a row; by default a row is one conversation."}
    )
    """The most tokens of a row, into which conversations are packed; `per_device_train_batch_size` counts rows. None
    makes each conversation (or sequence) a row. A sequence longer than a row is treated as one over max_length."""
    mode_weights: dict[str, float] | str | None = field(
        default=None, metadata={"help": """Weights of the modes in the loss: '{"thinking": 0.5}'."""}
    )
    """The weight of a trained token of each mode; 1 where not given. The loss is their weighted mean."""
    normalise_by_mode: bool = field(
        default=False, metadata={"help": "Mean of the modes' own mean losses, so that long reasoning drowns nothing."}
    )
    """Whether the loss is the mean of the modes' mean losses, so that each mode has an equal share, or that of
    `mode_weights`; otherwise it is the mean over all trained tokens."""
    control_token_init: str = field(
        default="mean", metadata={"help": f"How the rows of new control tokens start: {', '.join(INITS)}."}
    )
    """How the embedding rows of control tokens start that are new to the model. "mean": added ones as the mean of all
    rows, reserved ones as they are; "end_of_turn": all as the row of the token that ends a turn."""
    control_token_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of new control tokens' rows; by default 25 times the rest's."}
    )
    """The learning rate of the embedding rows of control tokens that are new to the model, on the schedule of the rest.
    None: 25 times that of the rest, at most 1e-2, where there are such tokens, and that of the rest where there are
    none; a number holds for new ones, or, if there are none, for the scheme's. Not for sharded weights."""
    control_token_weight: float | None = field(
        default=None, metadata={"help": "Weight in the loss of the </think> that ends a trace; by default 15 if new."}
    )
    """The weight in the loss of the `</think>` that ends a trace. None: 15 where that token is new to the model, which
    falls to 2 in the first three quarters of the steps, else 1; a number stays. The loss stays divided by the number
    of tokens, so that rows, batches and processes change nothing."""
    end_of_turn_weight: float | None = field(
        default=None, metadata={"help": "Weight in the loss of an answer's end; by default 2/3 of a new </think>'s."}
    )
    """The weight in the loss of the token that ends an answer, which is what non-thinking mode writes where thinking
    mode writes `</think>`. None: two thirds of that of a new `</think>`, at least 1, falling as it does; else 1."""
    probe_rows: int = field(
        default=8, metadata={"help": "Rows of each mode for the switch probe while training; 0: none."}
    )
    """Rows of each mode for the switch probe: measured at every evaluation, and after a tenth of the steps, where it
    warns of a closing token that does not come alive. Those of eval_dataset if there is one, else the first that are
    trained on. Not under sharded weights."""

    def __post_init__(self) -> None:
        for name in ("control_token_learning_rate", "control_token_weight", "end_of_turn_weight"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: found {value}, expected a number above 0.")
        check_init(self.control_token_init)
        if self.probe_rows < 0:
            raise ValueError(f"probe_rows: found {self.probe_rows}, expected at least 0.")
        self.settle()
        get_scheme(self.scheme)
        if self.dialect is not None:
            get_dialect(self.dialect)
        Mode.parse(self.default_mode)
        parse_generation_defaults(self.generation_defaults)
        self._check_layout()
        # Their own checks name the flags.
        data = self.preparation(None)
        Plan(data["records"], data["mixture"], data["reasoning"], on_long_row=self.on_long_row)
        unsupported = {
            "packing": self.packing,
            "padding_free": self.padding_free,
            "assistant_only_loss": self.assistant_only_loss,
            "completion_only_loss": self.completion_only_loss,
        }
        given = [name for name, value in unsupported.items() if value]
        if given:
            raise ValueError(
                f"{', '.join(given)}: not for ThinkFusionTrainer, which renders the rows and sets the loss itself; "
                "leave it unset."
            )
        super().__post_init__()

    def _check_layout(self) -> None:
        if self.sequence_layout not in LAYOUTS:
            raise ValueError(
                f"sequence_layout: {self.sequence_layout!r} is unknown; choose one of {', '.join(LAYOUTS)}."
            )
        if self.tokens_per_row is not None:
            if self.sequence_layout == "padded":
                raise ValueError("tokens_per_row: only for rows of trees or packed sequences, not for 'padded'.")
            if self.tokens_per_row < 1:
                raise ValueError(f"tokens_per_row: found {self.tokens_per_row}, expected at least 1.")
            if self.max_length is not None and self.max_length > self.tokens_per_row:
                raise ValueError(
                    f"max_length: {self.max_length:,} is more than tokens_per_row, {self.tokens_per_row:,}. Raise "
                    "tokens_per_row, or lower max_length."
                )
        if self.sequence_layout != "padded" and self.train_sampling_strategy == "group_by_length":
            raise ValueError("train_sampling_strategy: rows have no padding to save by grouping; leave it unset.")
        own_weights = {self.control_token_weight, self.end_of_turn_weight}
        weighted = not self.loss_weights.plain or not own_weights <= {None, 1}
        if weighted and (self.loss_type != "nll" or self.label_smoothing_factor):
            raise ValueError(
                "mode_weights, normalise_by_mode, control_token_weight, end_of_turn_weight: only for loss_type='nll' "
                "without label smoothing."
            )

    @property
    def loss_weights(self) -> ModeWeights:
        """`mode_weights` and `normalise_by_mode`, read."""
        return ModeWeights.parse(self.mode_weights, self.normalise_by_mode)

    def preparation(self, max_length: int | None, records: RecordOptions | None = None) -> dict[str, Any]:
        """What `prepare` is given; `records` are the options of reading, to which the policies of this are added."""
        records = replace(records or RecordOptions(), on_bad_row=self.on_bad_row, max_skipped=self.max_skipped)
        return {
            "records": records,
            "mixture": MixtureOptions(
                self.mixture,
                self.pair_fraction,
                self.ratio,
                self.ratio_unit,
                self.max_rows_per_source,
                self.max_tokens_per_source,
                self.seed,
            ),
            "reasoning": ReasoningOptions(
                self.shorten_fraction, self.shorten_budget, self.remove_fraction, self.close_at, self.seed
            ),
            "max_length": max_length,
            "on_long_row": self.on_long_row,
            "processes": self.dataset_num_proc or 1,
        }
