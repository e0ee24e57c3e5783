# SPDX-License-Identifier: Apache-2.0
"""TRL's SFT trainer, made safe for two modes: our rendering, per-mode losses, the switch measured on the way."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from peft.utils.other import TrainableTokensWrapper
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled

from thinkfusion.balance import Balancer, BiasUpdate
from thinkfusion.callbacks import GradientCheck, RoutingCallback, StepsCheck, SwitchProbeCallback
from thinkfusion.chat_templates import InstalledTemplate, install_chat_template, installed_template
from thinkfusion.checkpointing import checkpoint_to_train
from thinkfusion.configuration import ThinkFusionConfig
from thinkfusion.control_tokens import (
    Treatment,
    control_rows,
    multiply_updates,
    new_tokens,
    settle,
    start_as,
    weigh_tokens,
)
from thinkfusion.conversations import Conversation
from thinkfusion.hub_training import HubTrainer
from thinkfusion.mode_sums import ModeSums, counts_by_mode
from thinkfusion.packing import Layout, PackedRows, PaddingCollator, RowCollator, RowSampler, StreamedRows
from thinkfusion.preparing import prepare
from thinkfusion.probing import Marks, prepared_references
from thinkfusion.quantising import is_quantised
from thinkfusion.rendering import IGNORED
from thinkfusion.routing import RouteCounter
from thinkfusion.row_report import RowReport
from thinkfusion.sampling_defaults import set_generation_defaults
from thinkfusion.sequences import MODES
from thinkfusion.trainable import frozen_rows, lora_config, set_trainable
from thinkfusion.tree_attention import RowLayout, check_implementation, tree_attention, why_not_trees
from thinkfusion.trees import trunk_is_non_thinking

logger = logging.getLogger(__name__)


class ThinkFusionTrainer(HubTrainer):
    """TRL's `SFTTrainer` on both modes.

    model: a model, or the name of a checkpoint to load together with its tokenizer.
    train_dataset, eval_dataset: conversations, a file or data set id, a `Dataset` of raw rows (`messages`, or question,
        reasoning and answer), or one that `thinkfusion.prepare` made.
    peft_config: a LoRA configuration; True for the one of `thinkfusion.lora_config`, with `args`' `train_…`.

    A tokenizer without our chat template gets it installed, and the model the embeddings of new control tokens.
    Control tokens that are new to the model, which their rows and the switch probe tell, get a learning rate of their
    own and a weight in the loss; when the training begins `control_tokens` has what was found and done, and the log.
    `row_report` tells what became of the training rows. `switch_probe` measures on the way whether the switch comes
    alive (see `SwitchProbeCallback`), and warns if not. Logs `loss_thinking`, `loss_non_thinking` (mean loss of
    a trained token, since the last log) and `tokens_thinking`, `tokens_non_thinking` (trained tokens so far).

    Raises DataError for rows that cannot be trained on, ValueError for settings that contradict each other.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: ThinkFusionConfig,
        *,
        train_dataset: Dataset | Sequence[Conversation] | str,
        eval_dataset: Dataset | Sequence[Conversation] | str | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, ThinkFusionConfig):
            raise TypeError(f"args: found {type(args).__name__}, expected a ThinkFusionConfig.")
        model, tokenizer = checkpoint_to_train(model, processing_class, narrow=bool(args.bf16 and peft_config))
        template, added = _installed(tokenizer, model, args)
        self._control_ids = [tokenizer.convert_tokens_to_ids(token) for token in template.dialect.control_tokens]
        self._closing_id, self._end_id = tokenizer.convert_tokens_to_ids(
            [template.scheme.closing_token, template.dialect.answer_end]
        )
        # Of sharded weights a process may hold a part, or nothing yet.
        whole = not (is_fsdp_enabled() or is_deepspeed_zero3_enabled())
        self._new_tokens = new_tokens(model, tokenizer, template.dialect.control_tokens, added, rows_are_whole=whole)
        if args.control_token_init == "end_of_turn":
            ids = tokenizer.convert_tokens_to_ids(list(self._new_tokens))
            start_as(model, ids, self._end_id)
        self.control_tokens: Treatment | None = None
        if peft_config is True:
            peft_config = lora_config(model, tokenizer, **args.kinds_that_train(lora=True))
        if peft_config is None and not isinstance(model, PeftModel):
            set_trainable(model, **args.kinds_that_train(lora=False), control_ids=self._control_ids)
        check_what_trains(model, peft_config, self._control_ids)
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if args.max_length is not None and limit is not None and args.max_length > limit:
            raise ValueError(f"max_length: {args.max_length:,} is more than the model's {limit:,} positions.")
        self._longest = args.max_length or min(
            (given for given in (args.tokens_per_row, limit) if given is not None), default=None
        )
        self.sequence_layout = _possible_layout(model, args)
        if self.sequence_layout != "padded" and kwargs.get("data_collator") is not None:
            raise ValueError("data_collator: rows have their own; set sequence_layout='padded' to use another.")
        train_dataset, self.row_report = self._prepared(train_dataset, tokenizer, args)
        if eval_dataset is not None:
            eval_dataset, _ = self._prepared(eval_dataset, tokenizer, args)
        # Everything is prepared, so TRL must neither cut the rows nor shuffle them on its own.
        args.max_length = None
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        args.remove_unused_columns = False
        self._weights = args.loss_weights
        self._step_factors: torch.Tensor | None = None
        self._balancer: Balancer | None = None
        self._routes: RouteCounter | None = None
        self._mode_sums = {"train": ModeSums(), "eval": ModeSums()}
        self._mode_tokens = dict.fromkeys(MODES, 0)
        super().__init__(
            model=model,
            args=args,
            data_collator=kwargs.pop("data_collator", None) or self._collator(tokenizer),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
            **kwargs,
        )
        self.add_callback(GradientCheck(self.accelerator))
        coefficient, rate = args.balance_loss_coef, args.router_bias_update_rate
        if coefficient or rate:
            self._balancer = Balancer(self.model, self.accelerator, coefficient=coefficient, update_rate=rate)
            self.add_callback(BiasUpdate(self._balancer))
        if args.routing_steps:
            self._routes = RouteCounter(self.model)
            self.add_callback(RoutingCallback(self, self._routes, every_steps=args.routing_steps))
        self.switch_probe = self._probe(train_dataset if eval_dataset is None else eval_dataset)
        give_bias(self.model)
        if self.sequence_layout != "padded":
            self.train_dataset = self._rows(train_dataset, args.train_batch_size)
            self.eval_dataset = None if eval_dataset is None else self._rows(eval_dataset, args.eval_batch_size)

    def _probe(self, sequences: Any) -> SwitchProbeCallback | None:
        """The switch probe on the way; not where a process holds a part of the weights only."""
        if not self.args.probe_rows or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return None
        marks = Marks.of(self.processing_class)
        references = prepared_references(sequences, marks, samples=self.args.probe_rows)
        if not references:
            return None
        probe = SwitchProbeCallback(self, references, marks)
        self.add_callback(probe)
        return probe

    def _collator(self, tokenizer: PreTrainedTokenizerBase) -> PaddingCollator | RowCollator:
        if self.sequence_layout == "padded":
            return PaddingCollator(tokenizer.pad_token_id)
        # FlexAttention works in blocks of 128.
        return RowCollator(tokenizer.pad_token_id, 128 if torch.cuda.is_available() else 1)

    def _rows(self, sequences: Dataset | IterableDataset, batch_size: int) -> PackedRows | StreamedRows:
        """The rows that are trained on, of the sequences that `prepare` made."""
        layout = Layout(
            self.sequence_layout,
            self.args.tokens_per_row,
            trunk_is_non_thinking(self.processing_class),
            ordered=self.args.mixture == "sequential",
            rows_at_once=1 if self.args.world_size == 1 else self.args.world_size * batch_size,
        )
        if isinstance(sequences, IterableDataset):
            return StreamedRows(sequences, layout)
        rows = PackedRows(sequences, layout)
        if self.args.process_index == 0:
            logger.info("%s", rows.report)
        return rows

    def _prepared(
        self, rows: Any, tokenizer: PreTrainedTokenizerBase, args: ThinkFusionConfig
    ) -> tuple[Dataset | IterableDataset, RowReport]:
        if isinstance(rows, (Dataset, IterableDataset)) and {"input_ids", "labels", "mode"} <= set(
            rows.column_names or ()
        ):
            size = len(rows) if isinstance(rows, Dataset) else 0
            return rows, RowReport(read=size, kept=size)
        with args.main_process_first(desc="preparing the rows"):
            return prepare(rows, tokenizer, **args.preparation(self._longest))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """An ordered mixture keeps its order, which the usual random sampler would undo."""
        rows: Any = train_dataset if train_dataset is not None else self.train_dataset
        if self.args.mixture == "sequential" or self.args.train_sampling_strategy == "sequential":
            return SequentialSampler(rows)
        if isinstance(rows, PackedRows):
            return RowSampler(rows, self.args.seed if self.args.data_seed is None else self.args.data_seed)
        return super()._get_train_sampler(train_dataset)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        """What the sum of a step's losses is divided by: its trained tokens, or what stands for them under weights."""
        if self._balancer is not None:
            self._balancer.begin(batch_samples)
        items = super()._get_num_items_in_batch(batch_samples, device)
        if items is None or self._weights.plain:
            return items
        counts = torch.stack([counts_by_mode(batch["modes"], batch["labels"]) for batch in batch_samples]).sum(0)
        counts = counts.to(device)
        if self.args.average_tokens_across_devices:
            counts = self.accelerator.reduce(counts, reduction="sum")
        self._step_factors, divisor = self._weights.factors(counts)
        return divisor

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; the rows of a stream are reported when it has been read to its end."""
        if self.control_tokens is None:
            self.control_tokens = self._treated()
            if self.control_tokens.new:
                self.add_callback(StepsCheck())
            if self.args.process_index == 0:
                # What is done by default to tokens that are new is told to everyone who reads warnings.
                level = logging.WARNING if self.control_tokens.new else logging.INFO
                logger.log(level, "%s", self.control_tokens.line)
        result = super().train(*args, **kwargs)
        rows = self.train_dataset
        if isinstance(rows, StreamedRows) and rows.report.rows and self.args.process_index == 0:
            logger.info("%s", rows.report)
        return result

    def _treated(self) -> Treatment:
        """What is done for the control tokens of this model, as it is before the first step."""
        args, closes, closed = self.args, None, True
        if self.switch_probe is not None:
            closed = any(reference.closing is not None for reference in self.switch_probe.references)
            closes = self.switch_probe.look().get("closes")
        can_weigh = args.loss_type == "nll" and not args.label_smoothing_factor
        return settle(
            self._new_tokens,
            self.processing_class.convert_ids_to_tokens(self._closing_id),
            closes=closes,
            closed=closed,
            learning_rate=args.learning_rate,
            own_rate=args.control_token_learning_rate,
            weight=args.control_token_weight if can_weigh else 1.0,
            end_weight=args.end_of_turn_weight if can_weigh else 1.0,
            sharded=self.is_fsdp_enabled or self.is_deepspeed_enabled,
        )

    @property
    def _token_weights(self) -> dict[int, float]:
        """The weight in the loss of each token that has one other than 1, at this step."""
        if self.control_tokens is None:
            return {}
        weights = self.control_tokens.weights_at(self.state.global_step / max(1, self.state.max_steps))
        given = zip((self._closing_id, self._end_id), weights, strict=True)
        return {token: weight for token, weight in given if weight != 1}

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A step forward and backward, under the attention of rows."""
        with self._attention():
            loss: torch.Tensor = super().training_step(*args, **kwargs)
            return loss

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """A step of the evaluation, under the attention of rows."""
        with self._attention():
            return super().prediction_step(*args, **kwargs)

    def _attention(self) -> AbstractContextManager[None]:
        return nullcontext() if self.sequence_layout == "padded" else tree_attention(self.model)

    def figures(self) -> dict[str, Any]:
        """What is summed up since the last log, the losses of modes included."""
        own: dict[str, Any] = {"mode_sums": self._mode_sums["train"].parts, "mode_tokens": self._mode_tokens}
        if self._balancer is not None:
            own["balance"] = self._balancer.values()
        return super().figures() | own

    def set_figures(self, figures: dict[str, Any]) -> None:
        """Go on from what `figures` gave."""
        super().set_figures(figures)
        self._mode_sums["train"].parts = [part.to(self.accelerator.device) for part in figures["mode_sums"]]
        self._mode_tokens = figures["mode_tokens"]
        if self._balancer is not None and "balance" in figures:
            self._balancer.set_values(figures["balance"])

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's loss, the mean over trained tokens (or as `mode_weights` say), noting the share of each mode."""
        modes, nodes = inputs.pop("modes"), inputs.pop("nodes", None)
        labels, weights = inputs["labels"], self._token_weights
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        balancer = self._balancer if self.model.training else None
        routes = self._routes if self.model.training else None

        def forward(**arguments: Any) -> Any:
            if nodes is not None:
                arguments["tree_layout"] = RowLayout(nodes)
            with (
                nullcontext() if balancer is None else balancer.watch(arguments["attention_mask"]),
                nullcontext() if routes is None else routes.watch(modes, labels != IGNORED),
            ):
                outputs = model(**arguments)
            if nodes is not None:
                self._check_attention(arguments["tree_layout"])
            if getattr(outputs, "log_probs", None) is not None:
                seen.append((-outputs.log_probs.detach(), outputs.label_mask))
                if self.model.training:
                    outputs.log_probs = weigh_tokens(outputs.log_probs, labels, weights)
                if not self._weights.plain:
                    factors = self._factors(counts_by_mode(modes, labels), num_items_in_batch)
                    outputs.log_probs = outputs.log_probs * factors[modes[:, 1:]].to(outputs.log_probs)
            return outputs

        result = super().compute_loss(forward, inputs, return_outputs, num_items_in_batch)
        self._mode_sums["train" if self.model.training else "eval"].add(modes[:, 1:], *seen[0])
        if balancer is None or not balancer.coefficient:
            return result
        balance = balancer.loss()
        if num_items_in_batch is None:
            # The trainer divides such a loss by the number of batches.
            balance = balance * self.current_gradient_accumulation_steps
        return (result[0] + balance, result[1]) if return_outputs else result + balance

    def _factors(self, counts: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
        """By which the loss of each mode's tokens is multiplied: of the whole step, or of a batch that stands alone."""
        if num_items_in_batch is not None:
            assert self._step_factors is not None
            return self._step_factors
        factors, divisor = self._weights.factors(counts)
        return factors * counts.sum() / divisor.clamp(min=torch.finfo(divisor.dtype).tiny)

    def _check_attention(self, layout: RowLayout) -> None:
        """What a row holds is kept apart by the attention alone, so every layer must have used ours."""
        layers = self.model.config.get_text_config().num_hidden_layers
        if layout.layers < layers:
            raise ValueError(
                f"sequence_layout: {layout.layers} of the model's {layers} layers took the attention of rows, so that "
                "others would have mixed them. Set sequence_layout='padded' (--sequence_layout padded)."
            )

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """transformers' choice, without those of which some rows are frozen: decay would move these."""
        whole = frozen_rows(model)
        return [name for name in super().get_decay_parameter_names(model) if name not in whole]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's optimizer, with the control tokens' own learning rate in it."""
        exists = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        treatment = self.control_tokens
        if treatment is not None and treatment.learning_rate is not None and not exists:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError(
                    "control_token_learning_rate: not for sharded weights (FSDP, DeepSpeed); leave it unset."
                )
            ids = [self.processing_class.convert_tokens_to_ids(token) for token in treatment.new]
            rows = control_rows(self.model, ids or self._control_ids)
            if not rows:
                logger.warning("control_token_learning_rate: no row of a control token trains, so it does nothing.")
            multiply_updates(optimizer, rows, treatment.learning_rate / self.args.learning_rate)
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the per-mode figures since the last log, over all processes."""
        name = "train" if self.model.training else "eval"
        sums, self._mode_sums[name] = self._mode_sums[name], ModeSums()
        losses, counts = sums.totals(self.accelerator)
        prefix = "" if name == "train" else "eval_"
        if name == "eval" and "eval_loss" in logs and any(counts):
            # Over all tokens: a mean of the batches' means would depend on how rows are laid.
            factors, divisor = self._weights.factors(torch.tensor(counts, dtype=torch.double))
            logs["eval_loss"] = float((factors * torch.tensor(losses, dtype=torch.double)).sum() / divisor)
        balance = self._balancer.value() if self._balancer is not None and name == "train" else None
        if balance is not None:
            logs["balance_loss"] = balance
        for mode, loss, count in zip(MODES, losses, counts, strict=True):
            if count:
                logs[f"{prefix}loss_{mode}"] = loss / count
            if name == "train" and sums.parts:
                self._mode_tokens[mode] += int(count)
                logs[f"tokens_{mode}"] = self._mode_tokens[mode]
        super().log(logs, start_time)


def _installed(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, args: ThinkFusionConfig
) -> tuple[InstalledTemplate, list[int]]:
    """The tokenizer's switchable template, installed if it has none, and the ids of the tokens that this added.

    Raises ValueError if the template is not what `args` asks for. The model gets the modes' generation defaults of
    `args`, if there are any.
    """
    template, added = installed_template(tokenizer), []
    if template is None:
        logger.warning("Installing the chat template with the scheme %r on the tokenizer.", args.scheme)
        added = install_chat_template(
            tokenizer, model, scheme=args.scheme, default_mode=args.default_mode, dialect=args.dialect
        )
    elif template.scheme.name != args.scheme:
        raise ValueError(
            f"scheme: {args.scheme!r} was asked for, but the tokenizer's template has the scheme "
            f"{template.scheme.name!r}. Set one of the two."
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer):,} tokens, and the model embeddings for {rows:,}. Give the model "
            "to install_chat_template(tokenizer, model)."
        )
    template = installed_template(tokenizer)
    assert template is not None
    if args.generation_defaults is not None:
        set_generation_defaults(model, args.generation_defaults, default_mode=template.default_mode)
    return template, added


def check_what_trains(model: PreTrainedModel, peft_config: Any, control_ids: list[int]) -> None:
    """Refuse full fine-tuning in 4 bits, and adapters that leave new control tokens as they were added: all equal."""
    if peft_config is None and not isinstance(model, PeftModel) and is_quantised(model):
        raise ValueError(
            "peft_config: missing; the model is in 4 bits, and such weights cannot train. Set peft_config=True "
            "(--lora true) for LoRA, or load the model without load_in_4bit to train all weights."
        )
    # Not every kind of adapter has these settings; one without them cannot train rows of an embedding.
    if peft_config is None or any(
        getattr(peft_config, name, None) for name in ("trainable_token_indices", "modules_to_save")
    ):
        return
    rows = model.get_input_embeddings().weight.detach()[control_ids[-2:]]
    if torch.equal(rows[0], rows[1]):
        raise ValueError(
            "peft_config: the control tokens are new, and this configuration does not train them. Use "
            "lora_config(model, tokenizer), or set trainable_token_indices (or modules_to_save)."
        )


def give_bias(model: Any) -> None:
    """TRL's fused head reads `bias`, which peft's wrapper of a layer without one lacks (trl 1.16, peft 0.21)."""
    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        # Set beside torch's bookkeeping, so that a bias that is there is not registered twice.
        head.__dict__["bias"] = head.original_module.bias


def _possible_layout(model: PreTrainedModel, args: ThinkFusionConfig) -> str:
    """The layout that the model allows: one whose layers cannot branch gets padded sequences, and the log says so.

    Raises ValueError for settings under which rows would be torn apart or their attention replaced.
    """
    if args.sequence_layout == "padded":
        return "padded"
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    reason = why_not_trees(base)
    if reason is not None:
        if args.tokens_per_row is not None:
            raise ValueError(
                f"tokens_per_row: needs rows, and {reason}. Set sequence_layout='padded', and no such limit."
            )
        if args.process_index == 0:
            logger.warning("sequence_layout: 'padded' in place of %r, since %s.", args.sequence_layout, reason)
        return "padded"
    check_implementation(base)
    parallel = args.parallelism_config
    splits = {
        "torch_compile": args.torch_compile,
        "parallelism_config (context or sequence)": parallel and (parallel.cp_enabled or parallel.sp_enabled),
        "several GPUs in one process (start one for each with accelerate launch)": args.n_gpu > 1,
    }
    for name, given in splits.items():
        if given:
            raise ValueError(f"{name}: not for rows of trees or packed sequences; set sequence_layout='padded'.")
    return args.sequence_layout
