# SPDX-License-Identifier: Apache-2.0
"""RL in both modes, on TRL's GRPO trainer: every prompt twice, once in each mode, each with a group of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerControl, TrainerState
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from thinkfusion.balance import Balancer, BiasUpdate
from thinkfusion.callbacks import GradientCheck, RoutingCallback
from thinkfusion.chat_templates import installed_template
from thinkfusion.checkpointing import checkpoint_to_train
from thinkfusion.conversations import DataError
from thinkfusion.generation import Prompter, ready_to_generate, reply_ends
from thinkfusion.grpo_configuration import MOST_NEW_TOKENS, ThinkFusionGRPOConfig
from thinkfusion.mode_sums import ModeSums
from thinkfusion.modes import Mode, Reply, split_reply
from thinkfusion.prompts import EvaluationPrompt, read_prompts
from thinkfusion.rewards import DEFAULT_REWARDS, Reward, check_rewards, reward_name, score
from thinkfusion.routing import RouteCounter
from thinkfusion.sequences import MODES
from thinkfusion.trainable import frozen_rows, lora_config, set_trainable
from thinkfusion.training import check_what_trains, give_bias

logger = logging.getLogger(__name__)

Prompts = Sequence[EvaluationPrompt] | str | Path
TRUNCATED, FORMAT_ERROR = "truncated", "format_error"
FACTS = ("mode", "length", FORMAT_ERROR, TRUNCATED)
NOT_OURS = ("reward_funcs", "reward_processing_classes", "tools", "rollout_func", "environment_factory")


class ThinkFusionGRPOTrainer(GRPOTrainer):
    """TRL's `GRPOTrainer` on both modes.

    model: a model that has both modes, or the name of a checkpoint to load together with its tokenizer.
    train_dataset, eval_dataset: prompts, or a file that `read_prompts` reads.
    rewards: functions of a prompt and a reply, see `thinkfusion.rewards`; their sum, by `reward_weights`, counts.
    peft_config: a LoRA configuration; True for the one of `thinkfusion.lora_config`, with `args`' `train_…`.

    Each prompt is asked in both modes in the same step, `num_generations` times in each; a reply is compared with
    those of its own prompt and mode. The ids of prompts are those of `reply` and of training: texts of users are data.
    Replies are split by id, and end where `reply` ends them.

    Logs by mode (`…_thinking`, `…_non_thinking`) `reward`, `rewards/<name>`, `length` (tokens of a reply, its end
    included), `entropy` (of a reply's token), `format_error` and `truncated` (shares of the replies).

    Raises ValueError for a template or model without the two modes, for prompts that a reward cannot judge, for a
    reward that raises or returns what is no finite number, and for settings that contradict each other.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: ThinkFusionGRPOConfig,
        *,
        train_dataset: Prompts,
        rewards: Reward | Sequence[Reward] = DEFAULT_REWARDS,
        eval_dataset: Prompts | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, ThinkFusionGRPOConfig):
            raise TypeError(f"args: found {type(args).__name__}, expected a ThinkFusionGRPOConfig.")
        refused = [name for name in NOT_OURS if kwargs.get(name) is not None]
        if refused:
            raise ValueError(f"{', '.join(refused)}: not for ThinkFusionGRPOTrainer. Give it functions as rewards.")
        model, tokenizer = checkpoint_to_train(model, processing_class, narrow=bool(args.bf16 and peft_config))
        self._prompter = _both_modes(tokenizer, model)
        self._own_rewards: list[Reward] = [rewards] if callable(rewards) else list(rewards)
        self._prompts: list[EvaluationPrompt] = []
        self._prompt_ids: list[list[int]] = []
        train_rows = self._rows(train_dataset, tokenizer)
        eval_rows = None if eval_dataset is None else self._rows(eval_dataset, tokenizer)
        check_rewards(self._own_rewards, self._prompts)
        _fit_lengths(args, model, max(map(len, self._prompt_ids)))
        _check_count(args, len(train_rows) // 2)
        peft_config = _set_what_trains(model, tokenizer, args, peft_config)
        self._ends = reply_ends(model, tokenizer, self._prompter.scheme)
        if args.use_vllm:
            args.generation_kwargs = {"stop_token_ids": self._ends, **(args.generation_kwargs or {})}
        self._asked: list[int] = []
        self._replies: list[Reply] = []
        self._balancer: Balancer | None = None
        self._routes: RouteCounter | None = None
        self._inputs: dict[str, Any] | None = None
        self.signalled = False
        self._entropies = {"train": ModeSums(), "eval": ModeSums()}
        super().__init__(
            model=model,
            args=args,
            reward_funcs=[self._as_trl(reward) for reward in self._own_rewards],
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            peft_config=peft_config,
            **kwargs,
        )
        self.eos_token_ids = self._ends
        if not args.use_vllm:
            self.generation_config.eos_token_id = self.generation_kwargs["eos_token_id"] = self._ends
        self.add_callback(SignalCheck(self))
        coefficient, rate = args.balance_loss_coef, args.router_bias_update_rate
        if coefficient or rate:
            self._balancer = Balancer(self.model, self.accelerator, coefficient=coefficient, update_rate=rate)
            self.add_callback(BiasUpdate(self._balancer))
        if args.routing_steps:
            self._routes = RouteCounter(self.model)
            self.add_callback(RoutingCallback(self, self._routes, every_steps=args.routing_steps))
        give_bias(self.model)

    # Prompts

    def _rows(self, given: Prompts, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Two rows for each prompt, one for each mode; `row` is their place in `_prompt_ids`."""
        prompts = read_prompts(given) if isinstance(given, (str, Path)) else list(given)
        if not prompts:
            raise ValueError("train_dataset, eval_dataset: found no prompt, expected at least one.")
        first = len(self._prompt_ids)
        for number, prompt in enumerate(prompts, start=1):
            if not isinstance(prompt, EvaluationPrompt):
                raise ValueError(
                    f"prompt {number}: found {type(prompt).__name__}, expected an EvaluationPrompt. Make them with "
                    "read_prompts or task_prompts."
                )
            try:
                self._prompt_ids += [self._prompter.prompt_ids(prompt.messages, mode) for mode in MODES]
            except DataError as error:
                raise ValueError(f"prompt {number}: {error} Mend it, or leave it out.") from None
        self._prompts += prompts
        rows = list(range(first, len(self._prompt_ids)))
        # TRL shows `prompt` where it logs completions; what is generated from are the ids.
        return Dataset.from_dict({"prompt": tokenizer.batch_decode(self._prompt_ids[first:]), "row": rows})

    def _prompt_of(self, row: int) -> tuple[EvaluationPrompt, Mode]:
        return self._prompts[row // len(MODES)], MODES[row % len(MODES)]

    def _get_train_sampler(self, dataset: Any = None) -> RepeatSampler:
        """TRL's sampler, but for a prompt's two modes, which stay side by side."""
        return ModesTogether(
            self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """Our ids in place of a rendering by TRL, where control strings in a user's text would become control tokens.

        They are what transformers and vLLM generate from.
        """
        return [self._prompt_ids[row] for row in self._asked], None, {}

    # Replies

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._asked = [each["row"] for each in inputs]
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        output["modes"] = torch.tensor(self._asked, device=self.accelerator.device) % len(MODES)
        return output

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's generation, in evaluation mode and without router logits, which fail with left padding.

        Both modes share a batch. One for each would save a fifth of the time where non-thinking replies are much the
        shorter and a CPU is the limit, and cost up to as much where they are not.
        """
        with ready_to_generate(self.accelerator.unwrap_model(self.model)):
            return super()._generate_single_turn(*args, **kwargs)

    def _split(self, ids: Sequence[int], mode: Mode) -> Reply:
        stop = next((place for place, token in enumerate(ids) if token in self._ends), None)
        return split_reply(
            ids[:stop], mode, tokenizer=self._tokenizer, finished=stop is not None, scheme=self._prompter.scheme
        )

    # Rewards

    def _as_trl(self, reward: Reward) -> Callable[..., list[float | None]]:
        """TRL's form of a reward, over the replies that were split last."""

        def scored(**_: Any) -> list[float | None]:
            return [
                score(reward, self._prompt_of(row)[0], reply)
                for row, reply in zip(self._asked, self._replies, strict=True)
            ]

        scored.__name__ = reward_name(reward)
        return scored

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        """TRL's rewards, (replies of all processes, functions), and the figures of each mode for the log."""
        modes = [self._prompt_of(row)[1] for row in self._asked]
        self._replies = [self._split(ids, mode) for ids, mode in zip(completion_ids_list, modes, strict=True)]
        rewards: torch.Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        own = [
            (MODES.index(reply.mode), len(ids), reply.format_error, not reply.finished)
            for reply, ids in zip(self._replies, completion_ids_list, strict=True)
        ]
        facts = gather(torch.tensor(own, dtype=torch.float32, device=rewards.device))  # (replies, FACTS)
        if self.mask_truncated_completions:
            # TRL masks them in the loss only; what their group is compared with would still count them as wrong.
            rewards[facts[:, FACTS.index(TRUNCATED)].bool()] = torch.nan
        self._note(facts, rewards)
        return rewards

    def _note(self, facts: torch.Tensor, rewards: torch.Tensor) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        said = ~rewards.isnan().all(1)
        total = (rewards * self.reward_weights.to(rewards)).nansum(1)
        for number, mode in enumerate(MODES):
            chosen = facts[:, 0] == number
            if not chosen.any():
                continue
            for name, values in zip(FACTS[1:], facts[chosen].T[1:], strict=True):
                metrics[f"{name}_{mode}"].append(values.mean().item())
            metrics[f"reward_{mode}"].append(total[chosen & said].mean().item())
            for place, reward in enumerate(self.reward_func_names):
                metrics[f"rewards/{reward}_{mode}"].append(rewards[chosen, place].nanmean().item())

    # The loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """TRL's loss, and that of the balance of experts; entropies are noted by mode."""
        balancer = self._balancer if self.model.training else None
        if balancer is not None:
            self._begin_step(balancer)
        self.signalled |= bool((inputs["advantages"] * inputs["completion_mask"].any(1)).any())
        self._inputs = inputs
        try:
            loss: torch.Tensor = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self._inputs = None
        return loss + balancer.loss() if balancer is not None and balancer.coefficient else loss

    def _begin_step(self, balancer: Balancer) -> None:
        """Tell the balancer, at the first batch of an optimizer step, all batches of it."""
        window = self.args.gradient_accumulation_steps
        place = self._step % self.args.steps_per_generation
        if place % window == 0:
            batches = self._buffered_inputs[place : place + window]
            masks = [torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1) for batch in batches]
            balancer.begin([{"attention_mask": mask} for mask in masks])

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int, **options: Any
    ) -> Any:
        inputs = self._inputs
        if inputs is None:  # not a pass of the loss
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, **options
            )
        training, modes = self.model.training, inputs["modes"][:, None]
        replies = torch.nn.functional.pad(
            inputs["completion_mask"], (input_ids.shape[1] - logits_to_keep, 0)
        ).bool()  # (batch, length)
        with ExitStack() as watching:
            if training and self._balancer is not None:
                watching.enter_context(self._balancer.watch(attention_mask))
            if training and self._routes is not None:
                watching.enter_context(self._routes.watch(modes.expand_as(input_ids), replies))
            found = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, **options
            )
        mask = replies[:, -logits_to_keep:]
        entropies = found[1].detach().masked_fill(~mask, 0.0)
        self._entropies["train" if training else "eval"].add(modes.expand_as(mask), entropies, mask)
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the entropy of each mode since the last log, over all processes, and the balance of experts."""
        name = "train" if self.model.training else "eval"
        sums, self._entropies[name] = self._entropies[name], ModeSums()
        totals, counts = sums.totals(self.accelerator)
        prefix = "" if name == "train" else "eval_"
        for mode, total, count in zip(MODES, totals, counts, strict=True):
            if count:
                logs[f"{prefix}entropy_{mode}"] = total / count
        balance = self._balancer.value() if self._balancer is not None and name == "train" else None
        if balance is not None:
            logs["balance_loss"] = balance
        super().log(logs, start_time)

    # Training

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train. A run cannot be gone on from; its checkpoints can be started from, as `model`."""
        if resume_from_checkpoint:
            # transformers 5.23 loses the experts at a resume; SafeTrainer mends it for SFT.
            raise ValueError(
                f"resume_from_checkpoint: found {resume_from_checkpoint!r}, but a run of RL cannot be gone on from. "
                "Start a new one with that checkpoint as the model."
            )
        return super().train(None, *args, **kwargs)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """transformers' choice, without those of which some rows are frozen: decay would move these."""
        whole = frozen_rows(model)
        return [name for name in super().get_decay_parameter_names(model) if name not in whole]


class ModesTogether(RepeatSampler):
    """TRL's sampler of groups, whose rows come in pairs: the two modes of a prompt are in the same batch."""

    def __iter__(self) -> Iterator[int]:
        count = self.num_samples // len(MODES)
        order = torch.randperm(count, generator=self.generator).tolist() if self.shuffle else list(range(count))
        rows = [len(MODES) * prompt + mode for prompt in order for mode in range(len(MODES))]
        for start in range(0, len(rows) - self.batch_size + 1, self.batch_size):
            for _ in range(self.repeat_count):
                for row in rows[start : start + self.batch_size]:
                    yield from [row] * self.mini_repeat_count


class SignalCheck(GradientCheck):
    """The check of gradients, at the first step whose rewards differ within a group: before, they say nothing."""

    def __init__(self, trainer: ThinkFusionGRPOTrainer) -> None:
        super().__init__(trainer.accelerator)
        self.trainer = trainer

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if self.trainer.signalled:
            super().on_pre_optimizer_step(args, state, control, model=model, **kwargs)


def _both_modes(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Prompter:
    """What makes prompts of both modes. Raises ValueError for a template or model without them."""
    fix = (
        "RL starts from a checkpoint that was trained in both modes: make one with recipes/sft.py (ThinkFusionTrainer)."
    )
    try:
        prompter = Prompter(tokenizer)
    except ValueError as error:
        raise ValueError(f"processing_class: {error} {fix}") from None
    rows = model.get_input_embeddings().weight
    if len(tokenizer) > rows.shape[0]:
        raise ValueError(
            f"processing_class: the tokenizer has {len(tokenizer):,} tokens, and the model embeddings for "
            f"{rows.shape[0]:,}, so that it knows no control token. {fix}"
        )
    control = _control_ids(tokenizer)[-2:]
    if len(control) == 2 and torch.equal(*rows.detach()[control]):
        raise ValueError(
            f"model: {tokenizer.decode(control[:1])} and {tokenizer.decode(control[1:])} have the same embedding, so "
            f"that it cannot tell the modes apart: they were never trained. {fix}"
        )
    return prompter


def _control_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    template = installed_template(tokenizer)
    if template is None:
        return []
    return [int(tokenizer.convert_tokens_to_ids(token)) for token in template.dialect.control_tokens]


def _set_what_trains(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: ThinkFusionGRPOConfig, peft_config: Any
) -> Any:
    """Freeze what `args` say in full fine-tuning; the LoRA configuration, if there is one."""
    control_ids = _control_ids(tokenizer)
    if peft_config is True:
        peft_config = lora_config(model, tokenizer if control_ids else None, **args.kinds_that_train(lora=True))
    if peft_config is None and not isinstance(model, PeftModel):
        set_trainable(model, **args.kinds_that_train(lora=False), control_ids=control_ids)
    if len(control_ids) > 1:
        check_what_trains(model, peft_config, control_ids)
    return peft_config


def _check_count(args: ThinkFusionGRPOConfig, prompts: int) -> None:
    """ValueError for fewer prompts than a generation batch holds: TRL would train on none."""
    wanted = (args.generation_batch_size or 1) // (args.num_generations or 1) // len(MODES)
    if prompts < wanted:
        raise ValueError(
            f"train_dataset: found {prompts} prompts, expected at least the {wanted} of a generation batch. Add "
            "prompts, or lower per_device_train_batch_size or steps_per_generation."
        )


def _fit_lengths(args: ThinkFusionGRPOConfig, model: PreTrainedModel, longest: int) -> None:
    """Set the limit of a reply if there is none; ValueError if the model has no room for it after the prompts."""
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    left = MOST_NEW_TOKENS if room is None else room - longest
    if left < 1 or (args.max_completion_length is not None and args.max_completion_length > left):
        if room is None:
            return
        raise ValueError(
            f"max_completion_length: found {args.max_completion_length}, but the longest prompt takes {longest:,} of "
            f"the model's {room:,} positions. Lower it, or leave out the longest prompts."
        )
    if args.max_completion_length is None:
        args.max_completion_length = min(left, MOST_NEW_TOKENS)
