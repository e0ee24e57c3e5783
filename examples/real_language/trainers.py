# SPDX-License-Identifier: Apache-2.0
"""The trainers of the comparison's three recipes, on the same rows with the same settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from experts import choose_experts

if TYPE_CHECKING:
    from compare import Job
    from data import RealData

FROZEN = {"train_shared_experts": False}
"""The base's shared expert adds nothing: it begins with zeros, so that a part of it has no gradient, and stays so."""
LEARNING_RATE, ROWS_OF_A_STEP, LONGEST = 2e-4, 5, 1024
NO_TREATMENT = {"control_token_learning_rate": LEARNING_RATE, "control_token_weight": 1.0}


def common_settings(job: Job) -> dict[str, Any]:
    """What all recipes share."""
    return {
        "output_dir": str(job.work / "training"),
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "weight_decay": 0.0,
        "gradient_checkpointing": False,
        "bf16": job.setting["bf16"],
        "use_cpu": job.setting["device"] == "cpu",
        "seed": job.seed,
        "save_strategy": "no",  # see `KeepAndStop`
        "save_total_limit": 1,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }


def trainer_of(job: Job, data: RealData) -> tuple[Any, Any]:
    """The trainer of a recipe on its rows, and the tokenizer."""
    from thinkfusion import ThinkFusionConfig, ThinkFusionTrainer, install_chat_template, load_checkpoint

    model, tokenizer = load_checkpoint(job.setting["base"], dtype="float32")
    choose_experts(model, job.setting["device"], trained=True)
    rows = data.training_rows(job.rows, job.seed, job.setting["instructions"])
    if job.recipe == "trl":
        install_chat_template(tokenizer, model, scheme="empty-block")  # the same tokens, and rows of the embeddings
        return trl_trainer(job, model, tokenizer, rows), tokenizer
    install_chat_template(tokenizer, model)
    given = NO_TREATMENT if job.recipe == "no-treatment" else job.setting["default"]
    settings = ThinkFusionConfig(
        **common_settings(job), per_device_train_batch_size=ROWS_OF_A_STEP, max_length=LONGEST, **FROZEN, **given
    )
    trainer = ThinkFusionTrainer(
        model, settings, train_dataset=rows, eval_dataset=data.probe_pairs(8), processing_class=tokenizer
    )
    return trainer, tokenizer


def trl_trainer(job: Job, model: Any, tokenizer: Any, rows: list[Any]) -> Any:
    """TRL's own way: Qwen3's template, which it swaps for its training variant, and the loss on assistant tokens.

    A conversation with reasoning is two rows, one of each mode, next to each other in as many steps as ours.
    """
    import trl
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from thinkfusion import Mode

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".shared_expert" not in name)
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    made = []
    for row in rows:
        reasoned = any(exchange.has_reasoning for exchange in row.exchanges)
        for mode in (Mode.THINKING, Mode.NON_THINKING) if reasoned else (Mode.NON_THINKING,):
            messages = row.to_messages(mode)
            if mode is Mode.NON_THINKING:
                messages = [
                    {key: message[key] for key in message if key != "reasoning_content"} for message in messages
                ]
            made.append(
                {
                    "messages": messages,
                    "tools": list(row.tools),
                    "chat_template_kwargs": {"enable_thinking": mode is Mode.THINKING},
                }
            )
    # Padding costs a CPU more than a GPU; the loss of a step is the same.
    at_once = 1 if job.setting["device"] == "cpu" else ROWS_OF_A_STEP
    settings = SFTConfig(
        **common_settings(job),
        per_device_train_batch_size=2 * at_once,
        gradient_accumulation_steps=ROWS_OF_A_STEP // at_once,
        max_length=LONGEST,
        assistant_only_loss=True,
        router_aux_loss_coef=0.0,
    )
    # Arguments of tools have other keys in every row, which a column of one type would fill with nulls.
    dataset = Dataset.from_list(made, on_mixed_types="use_json")
    return SFTTrainer(model, settings, train_dataset=dataset, processing_class=tokenizer)


def trained_tokens(dataset: Any) -> int:
    if "labels" in dataset.column_names:
        return sum(sum(label != -100 for label in labels) for labels in dataset["labels"])
    return sum(sum(mask) for mask in dataset["assistant_masks"])
