# SPDX-License-Identifier: Apache-2.0
"""Preference training of the switch: replies that kept their mode over replies that broke it, with TRL's DPOTrainer.

    thinkfusion generate-pairs runs/tiny tasks --output pairs.jsonl --preferences preferences.jsonl --construct
    python recipes/dpo.py --model runs/tiny --dataset preferences.jsonl --output_dir runs/preferred

Settings come from flags, or from a YAML file (--config) with the same names. Every setting of TRL's `DPOConfig` is one.
"""

import gc
import logging
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
gc.disable()  # until all is imported: a fifth of the time would go into looking for garbage that is not there

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, TrlParser

from thinkfusion import (
    DataError,
    evaluate_modes,
    export_checkpoint,
    load_checkpoint,
    lora_config,
    mode_table,
    read_preferences,
    read_prompts,
    save_recipe,
    save_report,
)

gc.freeze()
gc.enable()

LEAST_SHARE = 0.05
"""Of the rows of a mode; with less, the other mode is pushed into this one."""


@dataclass
class RecipeArguments:
    model: str = "runs/tiny"
    """Folder or Hub id of a checkpoint with a switch, the one that the rows were sampled from."""
    revision: str | None = None
    dataset: str = "preferences.jsonl"
    """Rows of `thinkfusion generate-pairs --preferences`."""
    lora: bool = False
    """Train LoRA adapters (experts included); they are merged at the end."""
    lora_r: int = 16
    lora_alpha: int = 32
    prompts: str | None = None
    """A file of prompts to measure the modes on; without it the embedded tasks."""
    evaluation_samples: int = 200
    """Prompts per mode, before and after; 0 for none."""
    evaluation_max_new_tokens: int = 512
    evaluation_temperature: float = 0.0


@dataclass
class PreferenceConfig(DPOConfig):
    """`DPOConfig` with defaults for the switch.

    The likelihood of the chosen reply is trained too (`sft`): the two replies of a row often differ from their first
    token on, and the preference alone is then met by making both less likely.
    """

    loss_type: list[str] = field(default_factory=lambda: ["sigmoid", "sft"])
    loss_weights: list[float] | None = field(default_factory=lambda: [1.0, 1.0])
    max_length: int | None = None
    """The longest row allowed, None for what the model takes; a longer one is an error, never cut."""
    router_aux_loss_coef: float | None = 0.0
    """0: transformers' balance loss pools all layers and takes collapsed routers for balanced ones."""
    learning_rate: float = 5e-5
    gradient_checkpointing: bool = False
    save_strategy: str = "no"
    report_to: str = "none"

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.fp16 and torch.cuda.is_available()
        super().__post_init__()


class ModeDPOTrainer(DPOTrainer):
    """Takes rows whose ids are made already; TRL would tokenise the text, control strings of users included."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    recipe, training = TrlParser((RecipeArguments, PreferenceConfig)).parse_args_and_config()

    # 1. The checkpoint, whose template has the switch; and a second one, which the preference is measured against.
    given = {"dtype": "float32", "revision": recipe.revision, "trust_remote_code": training.trust_remote_code}
    model, tokenizer = load_checkpoint(recipe.model, **given)
    reference = None if recipe.lora else load_checkpoint(recipe.model, **given)[0]

    # 2. The rows, as ids: the prompt ends in what announces its mode, the replies in the end of turn.
    longest = training.max_length or model.config.get_text_config().max_position_embeddings
    rows = read_preferences(recipe.dataset, tokenizer, max_length=longest)
    training.max_length = None
    modes = Counter(row.pop("mode") for row in rows)
    print(f"{len(rows):,} rows: {modes['thinking']:,} thinking, {modes['non_thinking']:,} non-thinking")
    if min(modes["thinking"], modes["non_thinking"]) < LEAST_SHARE * len(rows):
        logging.warning(
            "Nearly all rows are of one mode, and may push the other into it: use --construct for the rows."
        )

    # 3. Before, in between, after.
    prompts = read_prompts(recipe.prompts) if recipe.prompts else None

    def measure(checked: Any, read: Any) -> Any:
        return evaluate_modes(
            checked.to(training.device),
            read,
            prompts,
            samples=recipe.evaluation_samples,
            max_new_tokens=recipe.evaluation_max_new_tokens,
            temperature=recipe.evaluation_temperature,
        )

    if recipe.evaluation_samples and training.process_index == 0:
        print("Before:", mode_table(measure(model, tokenizer)), sep="\n", flush=True)
    adapter = None
    if recipe.lora:
        adapter = lora_config(model, tokenizer, r=recipe.lora_r, lora_alpha=recipe.lora_alpha)
        # The checkpoint knows its control tokens; TRL 1.16's fused head cannot take peft's rows of them.
        adapter.trainable_token_indices = None
    trainer = ModeDPOTrainer(
        model,
        ref_model=reference,
        args=training,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=adapter,
    )
    trainer.train()
    if not trainer.is_world_process_zero():
        return
    trained = trainer.accelerator.unwrap_model(trainer.model)
    export_checkpoint(trained, tokenizer, training.output_dir, dtype="bfloat16" if training.bf16 else None)
    print(f"The checkpoint is in {training.output_dir}.")
    save_recipe(
        training.output_dir,
        training,
        base_model=recipe.model,
        revision=getattr(model.config, "_commit_hash", None),
        method=f"preferences (DPO), {'LoRA' if recipe.lora else 'all weights'}",
        datasets=[recipe.dataset],
        steps=trainer.state.global_step,
    )
    if recipe.evaluation_samples:
        proof = measure(*load_checkpoint(training.output_dir))
        save_report(proof, training.output_dir, checkpoint=training.output_dir)
        print("After:", mode_table(proof), sep="\n")


if __name__ == "__main__":
    try:
        main()
    except (DataError, FileNotFoundError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
