# SPDX-License-Identifier: Apache-2.0
"""The planned memory of training against the peak of real runs on this CPU.

    python tests/benchmarks/planning.py --millions 60 120 --json planning.json

Each run is a process of its own: it loads its libraries and trains a model of a few thousand parameters, so that what
is loaded on first use is there, and then trains the large model for three steps on rows of a few tokens, in float32.
What is compared is the growth of its resident memory from there to the peak (VmHWM, which Linux resets on request),
with weights, gradients and optimizer of the plan. Rows are short, so activations are small; under LoRA on experts they
are not (adapted experts are made whole), and the planned activations are added there.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss")
LAYERS, HIDDEN, EXPERTS, CHOSEN = 4, 384, 8, 2
TOKENS = 48
MIB = 2**20


def model_config(family: str, millions: float) -> Any:
    """A configuration of about so many million parameters, most of them in experts, with the embedded vocabulary."""
    from transformers import AutoConfig

    width = max(8, round(millions * 1e6 / (LAYERS * EXPERTS * 3 * HIDDEN)) // 8 * 8)
    sizes: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": HIDDEN,
        "intermediate_size": width,
        "moe_intermediate_size": width,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "head_dim": 64,
        "num_experts_per_tok": CHOSEN,
        "n_shared_experts": 1,
        "max_position_embeddings": 1024,
        **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), EXPERTS),
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
    }
    if family == "deepseek_v3":
        sizes |= {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32}
        sizes |= {"v_head_dim": 64, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 32}
    return AutoConfig.for_model(family, **sizes)


def train(family: str, method: str, millions: float) -> None:
    """Three steps of the trainer on a random model."""
    import torch
    from transformers import AutoModelForCausalLM

    from thinkfusion import ThinkFusionConfig, ThinkFusionTrainer, install_chat_template, lora_config
    from thinkfusion.checkpointing import load_checkpoint

    _, tokenizer = load_checkpoint("tiny-base")
    config = model_config(family, millions)
    config.vocab_size = len(tokenizer) + 8
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    install_chat_template(tokenizer, model)
    rows = [{"question": f"{number}?", "reasoning": "so", "answer": "yes"} for number in range(8)]
    from datasets import Dataset

    with tempfile.TemporaryDirectory() as folder:
        args = ThinkFusionConfig(
            output_dir=folder,
            max_steps=3,
            per_device_train_batch_size=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=True,
            logging_strategy="no",
            disable_tqdm=True,
        )
        peft = lora_config(model, tokenizer, r=8) if method == "lora" else None
        ThinkFusionTrainer(
            model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=peft
        ).train()


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (at the highest)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure(family: str, method: str, millions: float) -> int:
    """Bytes by which the resident memory of this process grew, at its highest, while it trained."""
    import gc

    train(family, method, 0.1)
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    train(family, method, millions)
    return resident("VmHWM") - before


def measured_and_planned(family: str, method: str, *, millions: float) -> tuple[int, int]:
    """Bytes of a run in a process of its own, and of its plan."""
    from thinkfusion.activations import Setup
    from thinkfusion.planning import plan_memory

    own = [sys.executable, __file__, "--measure", family, method, str(millions)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(own, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    measured = int(done.stdout.splitlines()[-1])
    setup = Setup(method, gpus=1, sequence_length=TOKENS, lora_r=8, bf16=False)
    memory = plan_memory(model_config(family, millions), setup).memory["ddp"]
    return measured, memory.state + (memory.activations if method == "lora" else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, nargs="+", default=[60.0, 120.0])
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        family, method, millions = options.measure
        print(measure(family, method, float(millions)))
        return
    results = []
    for family in options.families:
        for method in ("full", "lora"):
            for millions in options.millions:
                measured, planned = measured_and_planned(family, method, millions=millions)
                results.append({"family": family, "method": method, "millions": millions})
                results[-1] |= {"measured_bytes": measured, "planned_bytes": planned, "ratio": planned / measured}
                print(
                    f"{family:<12} {method:<5} {millions:>5.0f} M: measured {measured / MIB:>8,.0f} MiB, planned "
                    f"{planned / MIB:>8,.0f}, ratio {planned / measured:.3f}",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
