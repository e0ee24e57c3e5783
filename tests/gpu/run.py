# SPDX-License-Identifier: Apache-2.0
"""What needs a GPU: FSDP2 on one device, bfloat16, a large random Qwen3-MoE, saved, resumed and exported.

    accelerate launch --config_file /tmp/fsdp2.yaml --num_processes 1 tests/gpu/run.py --output_dir DIR --json gpu.json

The file is made for one device by

    thinkfusion plan tests/gpu/qwen3_moe.json --gpus 1 --strategy fsdp2 --write-accelerate-config /tmp/fsdp2.yaml

`make test` runs it on a tiny model without a GPU (`--any_device`), so that it is known to run. The default is LoRA on a
model of 3.2 billion parameters; `--method full --layers 6` trains all of 1.9 billion. In order, each a line that says
what passed:

1. the plan, and that it fits; 2. grouped_mm, FSDP and bfloat16 are what runs; 3. five steps: finite losses that fall,
and the peak of memory beside the plan; 4. a resume from the checkpoint of step three, whose losses are those of the run
never stopped; 5. an export that is loaded back, with finite logits and a reply in both modes.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from thinkfusion import (
    ThinkFusionConfig,
    ThinkFusionTrainer,
    export_checkpoint,
    generate_samples,
    install_chat_template,
    load_checkpoint,
    lora_config,
    reply,
)
from thinkfusion.activations import Setup
from thinkfusion.planning import GIB, plan_memory

CONFIG = Path(__file__).parent / "qwen3_moe.json"
STEPS, RESUMED_STEPS, TOKENS = 3, 5, 2048


def report(passed: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"passed: {passed}", flush=True)


def check(condition: bool, what: str) -> None:
    if not condition:
        sys.exit(f"failed: {what}")
    report(what)


def configuration(options: argparse.Namespace, vocabulary: int) -> Any:
    given = json.loads(options.config.read_text()) | {"vocab_size": vocabulary}
    if options.layers is not None:
        given["num_hidden_layers"] = options.layers
    return AutoConfig.for_model(**given)


def trainer_of(config: Any, options: argparse.Namespace, folder: Path, steps: int) -> ThinkFusionTrainer:
    _, tokenizer = load_checkpoint("tiny-base")
    torch.manual_seed(0)
    dtype = torch.bfloat16 if options.method == "lora" else torch.float32
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    install_chat_template(tokenizer, model)
    rows = [
        {"question": each.question, "reasoning": each.reasoning, "answer": each.answer}
        for each in generate_samples(256, seed=1)
    ]
    args = ThinkFusionConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,
        tokens_per_row=TOKENS,
        max_length=TOKENS,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        gradient_checkpointing=True,
        logging_steps=1,
        save_strategy="steps",
        save_steps=STEPS,
        report_to="none",
        seed=0,
    )
    adapter = lora_config(model, tokenizer, r=8) if options.method == "lora" else None
    return ThinkFusionTrainer(
        model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=adapter
    )


def losses(trainer: ThinkFusionTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--method", choices=("full", "lora"), default="lora")
    parser.add_argument("--layers", type=int, help="decoder layers in place of the file's")
    parser.add_argument("--config", type=Path, default=CONFIG, help="the model's config.json")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--any_device", action="store_true", help="run where no GPU is, to see that the script runs")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.any_device:
        sys.exit("no GPU is here; nothing was run.")
    vocabulary = len(load_checkpoint("tiny-base")[1]) + 16
    config = configuration(options, vocabulary)
    gpu = torch.cuda.is_available()
    memory = torch.cuda.get_device_properties(0).total_memory / GIB if gpu else 16.0
    gpus = int(os.environ.get("WORLD_SIZE", "1"))
    setup = Setup(options.method, gpus, memory, TOKENS, lora_r=8, bf16=gpu)
    plan = plan_memory(config, setup)
    print(plan)
    check(plan.fits("fsdp2"), f"the plan fits into {memory:.1f} GiB")

    trainer = trainer_of(config, options, options.output_dir / "whole", RESUMED_STEPS)
    model = trainer.accelerator.unwrap_model(trainer.model)
    check(model.config._experts_implementation == "grouped_mm", "experts run by grouped_mm")
    if gpu:
        check(trainer.is_fsdp_enabled, "FSDP is on")
        check(bool(trainer.args.bf16), "bfloat16 is on")
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    whole = losses(trainer)
    check(len(whole) == RESUMED_STEPS and all(map(math.isfinite, whole)), f"finite losses {whole}")
    check(whole[-1] < whole[0], "the loss falls")
    peak = torch.cuda.max_memory_allocated() if gpu else None
    planned = plan.memory["fsdp2"].total
    if peak is not None:
        print(f"measured: peak {peak / GIB:.2f} GiB, planned {planned / GIB:.2f}, ratio {planned / peak:.3f}")

    del trainer, model
    if gpu:
        torch.cuda.empty_cache()
    resumed = trainer_of(config, options, options.output_dir / "whole", RESUMED_STEPS)
    resumed.train(resume_from_checkpoint=str(options.output_dir / "whole" / f"checkpoint-{STEPS}"))
    again = losses(resumed)
    close = all(math.isclose(one, two, rel_tol=1e-2) for one, two in zip(again, whole, strict=True))
    check(close, f"a resumed run goes on as the whole one: {again}")

    folder = options.output_dir / "export"
    if resumed.is_fsdp_enabled:
        resumed.save_model(str(folder))
    else:
        export_checkpoint(resumed.accelerator.unwrap_model(resumed.model), resumed.processing_class, folder)
    resumed.accelerator.wait_for_everyone()
    if not resumed.is_world_process_zero():
        return
    written, tokenizer = _loaded(folder, config, options)
    with torch.no_grad():
        logits = written(torch.arange(16, device=written.device)[None]).logits
    check(bool(torch.isfinite(logits).all()), "the export is loaded back, its logits are finite")
    for mode in ("thinking", "non_thinking"):
        given = reply(written, tokenizer, [{"role": "user", "content": "2 + 2?"}], mode=mode, max_new_tokens=8)
        check(given.mode.value == mode, f"a reply in mode {mode}")
    if options.json:
        figures = {"losses": whole, "resumed": again, "peak_bytes": peak, "planned_bytes": planned}
        options.json.write_text(json.dumps({**figures, "plan": plan.to_dict()}, indent=1) + "\n")


def _loaded(folder: Path, config: Any, options: argparse.Namespace) -> tuple[Any, Any]:
    """The export; adapters that a sharded run wrote alone are put on the random base, which has no folder."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not (folder / "adapter_config.json").is_file():
        model, tokenizer = load_checkpoint(str(folder))
        return model.to(device), tokenizer
    from peft import PeftModel
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    torch.manual_seed(0)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    install_chat_template(tokenizer, base)
    return PeftModel.from_pretrained(base, str(folder)).merge_and_unload().eval(), tokenizer


if __name__ == "__main__":
    main()
