# SPDX-License-Identifier: Apache-2.0
"""Reinforcement learning in both modes at once: every prompt is asked in each, and its replies are compared there.

    accelerate launch recipes/rl.py --model runs/tiny --prompts prompts.jsonl --output_dir runs/rl

Prompts have answers and graders, as those of `thinkfusion evaluate`; no worked answers are needed. Settings come from
flags, or from a YAML file (--config) with the same names. Every setting of `ThinkFusionGRPOConfig`, and so of TRL's
GRPOConfig, is one. A run that was stopped begins anew; the checkpoint is written at its end.
"""

import gc
import logging
import os
import sys
from dataclasses import dataclass

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
gc.disable()  # until all is imported: a fifth of the time would go into looking for garbage that is not there

import torch
from trl import TrlParser

from thinkfusion import (
    DataError,
    EvaluationPrompt,
    ThinkFusionGRPOConfig,
    ThinkFusionGRPOTrainer,
    brevity,
    correctness,
    ensure_processes,
    evaluate_modes,
    export_checkpoint,
    format_reward,
    generate_samples,
    load_checkpoint,
    lora_config,
    mode_table,
    read_prompts,
    save_recipe,
    save_report,
)
from thinkfusion.following import follow_launcher
from thinkfusion.launching import usable_cores

gc.freeze()
gc.enable()

EMBEDDED = "tasks"


@dataclass
class RecipeArguments:
    model: str = "runs/tiny"
    """Folder or Hub id of a checkpoint with a switch."""
    revision: str | None = None
    prompts: str = EMBEDDED
    """A file of prompts with answers, or `tasks` for the embedded ones."""
    answer_separator: str | None = None
    """The answer is what follows this text, e.g. "####"."""
    train_samples: int = 1600
    """How many prompts of the embedded tasks are drawn."""
    brevity_cap: float = 0
    """Tokens of a non-thinking answer from which on length costs, up to 1 at twice as many; 0 for no such reward."""
    lora: bool = False
    """Train LoRA adapters (experts included); they are merged at the end."""
    lora_r: int = 16
    lora_alpha: int = 32
    evaluation_prompts: str | None = None
    """A file of prompts to measure the modes on; without it the embedded tasks."""
    evaluation_samples: int = 200
    """Prompts per mode, after the training; 0 for none."""
    evaluation_temperature: float = 0.0


def read(recipe: RecipeArguments, seed: int) -> list[EvaluationPrompt]:
    if recipe.prompts != EMBEDDED:
        return read_prompts(recipe.prompts, answer_separator=recipe.answer_separator)
    drawn = generate_samples(recipe.train_samples, seed=seed)
    return [
        EvaluationPrompt(({"role": "user", "content": each.question},), each.solution, each.name, each.language)
        for each in drawn
    ]


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    ensure_processes()
    follow_launcher()
    recipe, training = TrlParser((RecipeArguments, ThinkFusionGRPOConfig)).parse_args_and_config()
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, usable_cores() // training.world_size))

    # 1. A checkpoint with a switch, and prompts whose answers can be judged.
    dtype = "auto" if recipe.lora and training.bf16 else "float32"
    model, tokenizer = load_checkpoint(
        recipe.model, dtype=dtype, revision=recipe.revision, trust_remote_code=training.trust_remote_code
    )
    prompts = read(recipe, training.seed)
    proof_prompts = read_prompts(recipe.evaluation_prompts) if recipe.evaluation_prompts else None
    rewards = [correctness, format_reward]
    if recipe.brevity_cap:
        rewards.append(brevity(recipe.brevity_cap))

    # 2. Replies in both modes, judged; those better than the others of their prompt and mode become likelier.
    adapter = None
    if recipe.lora:
        adapter = lora_config(
            model, tokenizer, r=recipe.lora_r, lora_alpha=recipe.lora_alpha, **training.kinds_that_train(lora=True)
        )
    trainer = ThinkFusionGRPOTrainer(
        model,
        training,
        train_dataset=prompts,
        rewards=rewards,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    trainer.train()

    # 3. The result, and the proof.
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        trainer.save_model(training.output_dir)  # gathers the shards, so every process takes part
    elif trainer.is_world_process_zero():
        trained = trainer.accelerator.unwrap_model(trainer.model)
        export_checkpoint(trained, tokenizer, training.output_dir, dtype="bfloat16" if training.bf16 else None)
    if not trainer.is_world_process_zero():
        return
    print(f"The checkpoint is in {training.output_dir}.")
    save_recipe(
        training.output_dir,
        training,
        base_model=recipe.model,
        revision=getattr(model.config, "_commit_hash", None),
        method=f"reinforcement learning in both modes (GRPO), {'LoRA' if recipe.lora else 'all weights'}",
        datasets=[recipe.prompts],
        steps=trainer.state.global_step,
    )
    if not recipe.evaluation_samples:
        return
    written, tokenizer = load_checkpoint(training.output_dir)
    proof = evaluate_modes(
        written.to(training.device),
        tokenizer,
        proof_prompts,
        samples=recipe.evaluation_samples,
        max_new_tokens=training.max_completion_length,
        temperature=recipe.evaluation_temperature,
    )
    save_report(proof, training.output_dir, checkpoint=training.output_dir)
    print(mode_table(proof))


if __name__ == "__main__":
    try:
        main()
    except (DataError, FileNotFoundError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
