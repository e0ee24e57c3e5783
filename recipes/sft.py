# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning of both modes.

    accelerate launch recipes/sft.py                                          # the embedded default
    accelerate launch recipes/sft.py --config recipes/configs/olmoe_1b_7b.yaml --dataset my_rows.jsonl

Settings come from a YAML file (--config) and from flags of the same names, which win. Every setting of
`ThinkFusionConfig`, and so of TRL's SFTConfig and transformers' TrainingArguments, is one too.
"""

import gc
import logging
import os
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
gc.disable()  # until all is imported: a fifth of the time would go into looking for garbage that is not there

import torch
from trl import TrlParser

from thinkfusion import (
    DataError,
    EvaluationPrompt,
    ModeEvaluationCallback,
    RecordOptions,
    RowReport,
    Source,
    ThinkFusionConfig,
    ThinkFusionTrainer,
    ensure_processes,
    evaluate_modes,
    export_checkpoint,
    generate_samples,
    install_chat_template,
    load_checkpoint,
    load_in_4bit,
    lora_config,
    mode_table,
    overlap_with_training,
    prepare,
    prepared_cache,
    read_prompts,
    save_page,
    save_recipe,
    save_report,
)
from thinkfusion.evaluate_verb import verdict_lines
from thinkfusion.following import follow_launcher
from thinkfusion.launching import usable_cores
from thinkfusion.qlora import place
from thinkfusion.saving import SavingError, last_checkpoint

gc.freeze()
gc.enable()

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "tiny.yaml"
EMBEDDED = "tasks"
ON_OVERLAP = ("warn", "error", "drop")
# Decides which embedded problems are used to train; those of the evaluation never are, by their split.
TASK_SEED = 1


@dataclass
class RecipeArguments:
    model: str = "tiny-base"
    """Folder or Hub id of the checkpoint to start from; `tiny-base` is the embedded one."""
    revision: str | None = None
    """Branch, tag or commit of a checkpoint from the Hub; resolved to a commit, which is logged."""
    dataset: list[str] = field(default_factory=lambda: [EMBEDDED])
    """Files (.jsonl, .json, .csv, .parquet, …), patterns or Hub ids, or `tasks` for the embedded tasks."""
    dataset_weights: list[float] | None = None
    """One for each: 2 trains every row twice, 0.5 a random half of them."""
    streaming: bool = False
    """Make the sequences while they are read, for data larger than the disk; needs max_steps."""
    train_samples: int = 12800
    """How many samples of the embedded tasks are drawn."""
    format: str | None = None
    """The format of the rows; recognised by their columns if not given."""
    question_column: str = "question"
    reasoning_column: str = "reasoning"
    answer_column: str = "answer"
    answer_separator: str | None = None
    """Splits an answer column that holds reasoning and answer, at the last place it occurs."""
    remove_pattern: str | None = None
    """A regular expression; what it matches is removed from reasoning and answer."""
    repair: bool = True
    """Repair what can be repaired (aliases of roles, a trailing question, …); false makes these bad rows."""
    join_messages: bool = False
    """Join two messages of one role in a row with a blank line."""
    drop_first_assistant: bool = False
    """Leave out an assistant message in front of the first user message."""
    plain_control_tokens: bool = False
    """Keep control strings inside answers and reasoning, as ordinary text."""
    reasoning_tags: str | None = None
    """Other marks of reasoning than <think>, e.g. "<thinking>,</thinking>"."""
    drop_reasoning: bool = False
    """Leave out the reasoning of rows that are marked as non-thinking."""
    drop_duplicates: bool = False
    """Leave out rows that came before."""
    on_overlap: str = "warn"
    """What happens when prompts of the evaluation are found in the training rows: warn, error, or drop (from the
    evaluation)."""
    lora: bool = False
    """Train LoRA adapters (experts included) in place of all weights; they are merged at the end."""
    load_in_4bit: bool = False
    """Keep linear layers and experts in 4 bits (bitsandbytes) while LoRA trains; needs lora."""
    lora_r: int = 16
    lora_alpha: int = 32
    adapters_only: bool = False
    """Write the adapters alone in place of merged weights."""
    prompts: str | None = None
    """A file of prompts to measure the modes on; the embedded tasks have their own."""
    evaluation_samples: int = 1000
    """Prompts per mode of the final report; 0 for none."""
    evaluation_steps: int = 0
    """Measure the modes by generation every so many steps; 0 for never."""
    evaluation_max_new_tokens: int = 512
    evaluation_temperature: float = 0.0
    evaluation_obedience: int = 0
    """Prompts for each combination of switches, system text and turn; 0 for none."""
    evaluation_flip: int = 0
    """Conversations that alternate modes; 0 for none."""
    evaluation_budgets: list[int] = field(default_factory=list)
    """Thinking budgets at which the accuracy is measured, on 200 prompts."""
    resume: bool = False
    """Go on from the last whole checkpoint in output_dir; from the beginning if there is none."""


def parse_arguments() -> tuple[RecipeArguments, ThinkFusionConfig]:
    given = sys.argv[1:]
    if not any(flag == "--config" or flag.startswith("--config=") for flag in given):
        given = ["--config", str(DEFAULT_CONFIG), *given]
    recipe, training = TrlParser((RecipeArguments, ThinkFusionConfig)).parse_args_and_config(given)
    if recipe.on_overlap not in ON_OVERLAP:
        raise ValueError(f"on_overlap: {recipe.on_overlap!r} is unknown; choose one of {', '.join(ON_OVERLAP)}.")
    if recipe.load_in_4bit and not recipe.lora:
        raise ValueError(
            "load_in_4bit: found lora false; weights in 4 bits cannot train. Set --lora true, or leave it out."
        )
    return recipe, training


def sources(recipe: RecipeArguments) -> list[Source]:
    names = [recipe.dataset] if isinstance(recipe.dataset, str) else recipe.dataset
    weights = recipe.dataset_weights or [1.0] * len(names)
    if len(weights) != len(names):
        raise ValueError(f"dataset_weights: found {len(weights)} for {len(names)} data sets, expected one for each.")
    return [
        Source(embedded_rows(recipe) if name == EMBEDDED else name, weight, streaming=recipe.streaming)
        for name, weight in zip(names, weights, strict=True)
    ]


def embedded_rows(recipe: RecipeArguments) -> list[dict[str, str]]:
    samples = generate_samples(recipe.train_samples, seed=TASK_SEED)
    return [{"question": each.question, "reasoning": each.reasoning, "answer": each.answer} for each in samples]


def record_options(recipe: RecipeArguments) -> RecordOptions:
    given = {each.name: getattr(recipe, each.name) for each in fields(RecordOptions) if hasattr(recipe, each.name)}
    return RecordOptions(**given)


def without_overlap(
    recipe: RecipeArguments, report: RowReport, prompts: list[EvaluationPrompt]
) -> list[EvaluationPrompt]:
    found = overlap_with_training(report, prompts)
    if not found:
        return prompts
    if recipe.on_overlap == "error":
        raise ValueError(f"{found} Leave them out of one of the two, or use --on_overlap drop or warn.")
    if recipe.on_overlap == "drop":
        logging.warning("%s They are left out of the evaluation.", found)
        return [prompt for index, prompt in enumerate(prompts) if index not in set(found.evaluation)]
    logging.warning("%s What is measured on them is memory.", found)
    return prompts


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    ensure_processes()
    follow_launcher()
    recipe, training = parse_arguments()
    if not torch.cuda.is_available():
        # accelerate gives a process one thread unless told otherwise, and leaves the other cores idle.
        torch.set_num_threads(max(1, usable_cores() // training.world_size))

    # 1. The checkpoint, with the switch installed: template, control tokens, end of turn.
    # Weights that are trained are kept in float32, whatever precision they are multiplied in; adapted ones need not be.
    given = {
        "dtype": "auto" if recipe.lora and training.bf16 else "float32",
        "revision": recipe.revision,
        "trust_remote_code": training.trust_remote_code,
    }
    if recipe.load_in_4bit:
        model, tokenizer = load_in_4bit(recipe.model, device=training.device, **given)
    else:
        model, tokenizer = load_checkpoint(recipe.model, **given)
    install_chat_template(
        tokenizer, model, scheme=training.scheme, default_mode=training.default_mode, dialect=training.dialect
    )

    # 2. The rows, mixed, rendered and tokenised; the report accounts for every one.
    prompts = read_prompts(recipe.prompts, answer_separator=recipe.answer_separator) if recipe.prompts else None
    longest = training.max_length or model.config.get_text_config().max_position_embeddings
    with training.main_process_first(desc="preparing the rows"):
        dataset, report = prepare(
            sources(recipe),
            tokenizer,
            **training.preparation(longest, record_options(recipe)),
            streaming=recipe.streaming,
            cache_dir=prepared_cache(),
        )
    if prompts is not None and not recipe.streaming:
        prompts = without_overlap(recipe, report, prompts)

    # 3. Training in both modes.
    adapter = None
    if recipe.lora:
        adapter = lora_config(
            model, tokenizer, r=recipe.lora_r, lora_alpha=recipe.lora_alpha, **training.kinds_that_train(lora=True)
        )
    trainer = ThinkFusionTrainer(
        model, training, train_dataset=dataset, processing_class=tokenizer, peft_config=adapter
    )
    measured = EMBEDDED in recipe.dataset or prompts is not None
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
        report.save(Path(training.output_dir) / "row_report.json")
        print(report, report.account or "", sep="\n")
    # A SIGTERM saves a checkpoint and ends the process here.
    trainer.train(resume_from_checkpoint=last_checkpoint(training.output_dir) if recipe.resume else None)

    # 4. The result, and the proof: what is measured is what was written.
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        trainer.save_model(training.output_dir)  # gathers the shards, so every process takes part
    elif trainer.is_world_process_zero():
        export_checkpoint(
            trainer.accelerator.unwrap_model(trainer.model),
            tokenizer,
            training.output_dir,
            dtype="bfloat16" if training.bf16 and not recipe.adapters_only else None,
            adapters_only=recipe.adapters_only,
        )
    if not trainer.is_world_process_zero():
        return
    print(f"The checkpoint is in {training.output_dir}.")
    adapters = f"LoRA (r {recipe.lora_r}, alpha {recipe.lora_alpha})"
    save_recipe(
        training.output_dir,
        training,
        base_model=recipe.model,
        revision=getattr(model.config, "_commit_hash", None),
        method=f"{adapters} on weights in 4 bits"
        if recipe.load_in_4bit
        else adapters
        if recipe.lora
        else "full fine-tuning",
        datasets=[recipe.dataset] if isinstance(recipe.dataset, str) else recipe.dataset,
        steps=trainer.state.global_step,
    )
    if not recipe.evaluation_samples or not measured:
        print(f"Measure its switch: thinkfusion evaluate {training.output_dir} --prompts FILE --output DIR")
        return
    written, tokenizer = load_checkpoint(training.output_dir)
    proof = evaluate_modes(
        place(written, training.device) if recipe.load_in_4bit else written.to(training.device),
        tokenizer,
        prompts,
        samples=recipe.evaluation_samples,
        max_new_tokens=recipe.evaluation_max_new_tokens,
        temperature=recipe.evaluation_temperature,
        obedience=recipe.evaluation_obedience,
        flip=recipe.evaluation_flip,
        budgets=recipe.evaluation_budgets,
        budget_samples=200,
        probe=64,
    )
    proof.measured["probe"]["history"] = trainer.switch_probe.history if trainer.switch_probe else []
    save_report(proof, training.output_dir, checkpoint=training.output_dir)
    page = save_page(proof, training.output_dir, title=training.output_dir)
    print(mode_table(proof), "", *verdict_lines(proof), f"The report is a page: {page}", sep="\n")
    if training.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    try:
        main()
    except (ChildProcessError, DataError, FileNotFoundError, SavingError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
