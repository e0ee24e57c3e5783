# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning of both modes.

    accelerate launch recipes/sft.py                                          # the embedded default
    accelerate launch recipes/sft.py --config recipes/configs/olmoe_1b_7b.yaml --dataset my_rows.jsonl

Settings come from a YAML file (--config) and from flags of the same names, which win. Every setting of
`ThinkFusionConfig`, and so of TRL's SFTConfig and transformers' TrainingArguments, is one too.
"""

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import torch
from transformers.trainer_utils import get_last_checkpoint
from trl import TrlParser

from thinkfusion import (
    Conversation,
    DataError,
    ModeEvaluationCallback,
    RecordOptions,
    RowReport,
    ThinkFusionConfig,
    ThinkFusionTrainer,
    ensure_processes,
    evaluate_modes,
    export_checkpoint,
    generate_samples,
    install_chat_template,
    load_checkpoint,
    lora_config,
    mode_table,
    prepare,
    read_conversations,
    read_prompts,
    save_report,
)

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "tiny.yaml"
EMBEDDED = "tasks"
# Decides which embedded problems are used to train; those of the evaluation never are, by their split.
TASK_SEED = 1


@dataclass
class RecipeArguments:
    model: str = "tiny-base"
    """Folder or Hub id of the checkpoint to start from; `tiny-base` is the embedded one."""
    dataset: str = EMBEDDED
    """A .jsonl, .json or .parquet file, a Hub id, or `tasks` for the embedded tasks."""
    train_samples: int = 12800
    """How many samples of the embedded tasks are drawn."""
    format: str | None = None
    """`messages` or `columns`; detected from the first row if not given."""
    question_column: str = "question"
    reasoning_column: str = "reasoning"
    answer_column: str = "answer"
    answer_separator: str | None = None
    """Splits an answer column that holds reasoning and answer, at the last place it occurs."""
    remove_pattern: str | None = None
    """A regular expression; what it matches is removed from reasoning and answer."""
    lora: bool = False
    """Train LoRA adapters (experts included) in place of all weights; they are merged at the end."""
    lora_r: int = 16
    lora_alpha: int = 32
    prompts: str | None = None
    """A file of prompts to measure the modes on; the embedded tasks have their own."""
    evaluation_samples: int = 1000
    """Prompts per mode of the final report; 0 for none."""
    evaluation_steps: int = 0
    """Measure the modes by generation every so many steps; 0 for never."""
    evaluation_max_new_tokens: int = 512
    evaluation_temperature: float = 0.0
    resume: bool = False
    """Go on from the last checkpoint in output_dir."""


def parse_arguments() -> tuple[RecipeArguments, ThinkFusionConfig]:
    given = sys.argv[1:]
    if not any(flag == "--config" or flag.startswith("--config=") for flag in given):
        given = ["--config", str(DEFAULT_CONFIG), *given]
    recipe, training = TrlParser((RecipeArguments, ThinkFusionConfig)).parse_args_and_config(given)
    return recipe, training


def read_rows(recipe: RecipeArguments, training: ThinkFusionConfig) -> tuple[list[Conversation], RowReport]:
    if recipe.dataset == EMBEDDED:
        samples = generate_samples(recipe.train_samples, seed=TASK_SEED)
        rows = [{"question": each.question, "reasoning": each.reasoning, "answer": each.answer} for each in samples]
        return read_conversations(rows)
    options = RecordOptions(
        format=recipe.format,
        question_column=recipe.question_column,
        reasoning_column=recipe.reasoning_column,
        answer_column=recipe.answer_column,
        answer_separator=recipe.answer_separator,
        remove_pattern=recipe.remove_pattern,
        on_bad_row=training.on_bad_row,
    )
    return read_conversations(recipe.dataset, options)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    ensure_processes()
    recipe, training = parse_arguments()
    if not torch.cuda.is_available():
        # accelerate gives a process one thread unless told otherwise, and leaves the other cores idle.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // training.world_size))

    # 1. The checkpoint, with the switch installed: template, control tokens, end of turn.
    # Weights that are trained are kept in float32, whatever precision they are multiplied in; adapted ones need not be.
    model, tokenizer = load_checkpoint(recipe.model, dtype="auto" if recipe.lora and training.bf16 else "float32")
    install_chat_template(tokenizer, model, scheme=training.scheme, default_mode=training.default_mode)

    # 2. The rows, mixed, rendered and tokenised; the report accounts for every one.
    conversations, report = read_rows(recipe, training)
    longest = training.max_length or model.config.get_text_config().max_position_embeddings
    with training.main_process_first(desc="preparing the rows"):
        dataset, report = prepare(
            conversations,
            tokenizer,
            mixture=training.mixture,
            max_length=longest,
            on_bad_row=training.on_bad_row,
            report=report,
        )

    # 3. Training in both modes.
    adapter = lora_config(model, tokenizer, r=recipe.lora_r, lora_alpha=recipe.lora_alpha) if recipe.lora else None
    trainer = ThinkFusionTrainer(
        model, training, train_dataset=dataset, processing_class=tokenizer, peft_config=adapter
    )
    prompts = read_prompts(recipe.prompts, answer_separator=recipe.answer_separator) if recipe.prompts else None
    measured = recipe.dataset == EMBEDDED or prompts is not None
    if recipe.evaluation_steps and measured:
        trainer.add_callback(
            ModeEvaluationCallback(
                trainer,
                prompts,
                every_steps=recipe.evaluation_steps,
                max_new_tokens=recipe.evaluation_max_new_tokens,
            )
        )
    if trainer.is_world_process_zero():
        print(report)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(training.output_dir) if recipe.resume else None)

    # 4. The result, and the proof: what is measured is what was written.
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        trainer.save_model(training.output_dir)  # gathers the shards, so every process takes part
    elif trainer.is_world_process_zero():
        dtype = "bfloat16" if training.bf16 else None
        export_checkpoint(trainer.accelerator.unwrap_model(trainer.model), tokenizer, training.output_dir, dtype=dtype)
    if not trainer.is_world_process_zero():
        return
    print(f"The checkpoint is in {training.output_dir}.")
    if not recipe.evaluation_samples or not measured:
        print(f"Measure its switch: thinkfusion evaluate {training.output_dir} --prompts FILE --output DIR")
        return
    written, tokenizer = load_checkpoint(training.output_dir)
    proof = evaluate_modes(
        written.to(training.device),
        tokenizer,
        prompts,
        samples=recipe.evaluation_samples,
        max_new_tokens=recipe.evaluation_max_new_tokens,
        temperature=recipe.evaluation_temperature,
    )
    save_report(proof, training.output_dir)
    print(mode_table(proof))


if __name__ == "__main__":
    try:
        main()
    except (DataError, FileNotFoundError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
