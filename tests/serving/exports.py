# SPDX-License-Identifier: Apache-2.0
"""Does a served export say what the trained model says? One tiny model of a family, trained, exported, and asked.

    python tests/serving/exports.py --engine vllm --family axk1 --json axk1.json

A random model of the family, of sizes that vLLM takes on a CPU, is fine-tuned for a few steps with LoRA on its experts,
exported in float32, and loaded by the engine in a process of its own. Both sides get the same token ids: the
log-probabilities of every prompt token, and of the tokens of a greedy reply, have to agree. The file has `family`,
`loaded`, `tokens_equal`, `prompts`, and beside them `largest_difference` of the log-probabilities (of prompts, and
of replies as far as they are equal), versions, and the `reason` where something is amiss. `--family all` writes a list.
The engine's environment (`environments.py`) is made if it is not there.
"""

from __future__ import annotations

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
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from tests.serving.environments import install  # noqa: E402
from tests.tiny_models import tiny_random_model  # noqa: E402
from thinkfusion import (  # noqa: E402
    Conversation,
    ThinkFusionConfig,
    ThinkFusionTrainer,
    export_checkpoint,
    generate_samples,
    install_chat_template,
    load_checkpoint,
    lora_config,
)

FAMILIES = (
    *("qwen3_moe", "qwen2_moe", "olmoe", "mixtral", "axk1", "deepseek_v3", "gpt_oss", "glm4_moe", "granitemoe"),
    *("minimax_m2", "ernie4_5_moe"),
)
TOLERANCE = 1e-3
NEW_TOKENS = 16
PROMPTS = 8
VOCABULARY = 1088
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# The released sizes of the heads, which vLLM's attention for compressed keys and values is written for.
LATENT_SIZES: dict[str, Any] = {
    **{"num_key_value_heads": 4, "head_dim": 64, "q_lora_rank": 64, "kv_lora_rank": 512},
    **{"qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128},
}
OWN_SIZES: dict[str, dict[str, Any]] = {
    "olmoe": {"num_key_value_heads": 4},
    "axk1": LATENT_SIZES,
    "deepseek_v3": LATENT_SIZES,
    "gpt_oss": {"head_dim": 64},
}
NATIVE_ROTATION: dict[str, Any] = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}
"""vLLM 0.32 rotates the queries of compressed attention wrongly on a CPU: its kernel for interleaved pairs misreads a
query of three dimensions. Without that kernel, PyTorch rotates them, and the log-probabilities are transformers'."""
ENGINE_OPTIONS = {"axk1": NATIVE_ROTATION, "deepseek_v3": NATIVE_ROTATION}


def export_trained(family: str, folder: Path, *, zero_bias: bool = False) -> None:
    """A random model of the family, fine-tuned for a few steps with LoRA on its experts, in `folder`."""
    _, tokenizer = load_checkpoint("tiny-base")
    rows = [
        Conversation.from_messages(
            [
                {"role": "user", "content": sample.question},
                {"role": "assistant", "content": sample.answer, "reasoning_content": sample.reasoning},
            ]
        )
        for sample in generate_samples(32, seed=0)
    ]
    model = tiny_random_model(family, **{**SIZES, **OWN_SIZES.get(family, {})})
    if zero_bias:
        for name, values in [*model.named_parameters(), *model.named_buffers()]:
            if "correction_bias" in name:
                values.data.zero_()
    # The markup of the embedded base's own tokenizer, whatever the family's is.
    install_chat_template(tokenizer, model, dialect="chatml")
    settings = ThinkFusionConfig(
        output_dir=str(folder / "training"),
        max_steps=5,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        bf16=False,
    )
    trainer = ThinkFusionTrainer(
        model,
        settings,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora_config(model, tokenizer, r=4, lora_alpha=8),
    )
    trainer.train()
    export_checkpoint(trainer.model, trainer.processing_class, folder / "checkpoint", dtype="float32")


def prompts_of(folder: Path) -> list[list[int]]:
    """Prompts in both modes, as the template makes them."""
    _, tokenizer = load_checkpoint(folder)
    return [
        list(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": sample.question}],
                add_generation_prompt=True,
                enable_thinking=bool(number % 2),
                return_dict=True,
            )["input_ids"]
        )
        for number, sample in enumerate(generate_samples(PROMPTS, seed=3))
    ]


def transformers_says(folder: Path, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """Greedy replies, and the log-probability of every token of prompt and reply but the first."""
    model, _ = load_checkpoint(folder, dtype="float32")
    model.eval()
    found = []
    for prompt in prompts:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(NEW_TOKENS):
                inputs = torch.tensor([ids])
                scores = model(input_ids=inputs, attention_mask=torch.ones_like(inputs), use_cache=False).logits[0]
                ids.append(int(scores[-1].argmax()))
            inputs = torch.tensor([ids])
            scores = model(input_ids=inputs, attention_mask=torch.ones_like(inputs), use_cache=False).logits[0]
        chosen = scores.double().log_softmax(-1)[:-1].gather(1, inputs[0, 1:, None])[:, 0]
        top = scores[len(prompt) - 1 : -1].double().topk(2).values
        found.append(
            {"reply": ids[len(prompt) :], "log_probs": chosen.tolist(), "margins": (top[:, 0] - top[:, 1]).tolist()}
        )
    return found


VLLM = """
import json, sys, traceback
given = json.load(open(sys.argv[1]))
answer = {"loaded": False}
def done():
    json.dump(answer, open(sys.argv[2], "w"))
try:
    import transformers, vllm
    from vllm import LLM, SamplingParams
    answer["versions"] = {"vllm": vllm.__version__, "transformers": transformers.__version__}
    llm = LLM(given["folder"], dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=8, seed=0,
              disable_log_stats=True, enable_prefix_caching=False,
              **given["options"])
    answer["loaded"] = True
    sampling = SamplingParams(temperature=0.0, max_tokens=given["new_tokens"], ignore_eos=True, logprobs=1,
                              prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in given["prompts"]], sampling, use_tqdm=False)
    answer["replies"] = []
    for output, ids in zip(outputs, given["prompts"]):
        reply = output.outputs[0]
        before = [place[token].logprob for place, token in zip(output.prompt_logprobs[1:], ids[1:])]
        after = [place[token].logprob for place, token in zip(reply.logprobs, reply.token_ids)]
        answer["replies"].append({"reply": list(reply.token_ids), "log_probs": before + after})
except BaseException:
    answer["reason"] = traceback.format_exc()
done()
"""


def vllm_says(folder: Path, prompts: list[list[int]], python: str, options: dict[str, Any]) -> dict[str, Any]:
    """The same of vLLM, from a process of its own; `reason` and what it printed last where it failed.

    options: further arguments of the engine.
    """
    given, answer = folder / "given.json", folder / "answer.json"
    given.write_text(
        json.dumps(
            {"folder": str(folder / "checkpoint"), "prompts": prompts, "new_tokens": NEW_TOKENS, "options": options}
        )
    )
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
    }
    environment.pop("PYTHONPATH", None)
    try:
        done = subprocess.run(
            [python, "-c", VLLM, str(given), str(answer)],
            check=False,
            capture_output=True,
            text=True,
            timeout=300,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return {"loaded": False, "reason": "no answer in 300 s"}
    if not answer.is_file():
        return {"loaded": False, "reason": f"ended with {done.returncode}: {done.stderr[-2000:]}"}
    return dict(json.loads(answer.read_text()))


def compared(expected: list[dict[str, Any]], found: list[dict[str, Any]], prompts: list[list[int]]) -> dict[str, Any]:
    """How replies and log-probabilities differ; those behind the first other token are of other texts."""
    largest = {"prompt": 0.0, "reply": 0.0}
    ties = []
    equal = True
    for mine, other, prompt in zip(expected, found, prompts, strict=True):
        pairs = list(zip(mine["reply"], other["reply"], strict=True))
        same = next((place for place, (one, two) in enumerate(pairs) if one != two), len(pairs))
        if same < len(pairs):
            equal = False
            ties.append(mine["margins"][same])
        gaps = [abs(one - two) for one, two in zip(mine["log_probs"], other["log_probs"], strict=True)]
        before = len(prompt) - 1
        largest["prompt"] = max(largest["prompt"], *gaps[:before])
        largest["reply"] = max(largest["reply"], *gaps[before : before + same], 0.0)
    return {"tokens_equal": equal, "largest_difference": max(largest.values()), "differences": largest, "ties": ties}


def measure(family: str, python: str, *, zero_bias: bool = False) -> dict[str, Any]:
    """Everything of one family; with `zero_bias`, of one whose routers correct no score."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        export_trained(family, folder, zero_bias=zero_bias)
        prompts = prompts_of(folder / "checkpoint")
        answer = vllm_says(folder, prompts, python, ENGINE_OPTIONS.get(family, {}))
        result: dict[str, Any] = {"family": family, "engine": "vllm", "prompts": len(prompts), "tokens_equal": False}
        replies = answer.pop("replies", None)
        result |= answer
        if replies is not None:
            result |= compared(transformers_says(folder / "checkpoint", prompts), replies, prompts)
            result["log_probs_equal"] = result["largest_difference"] <= TOLERANCE
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("vllm",), default="vllm")
    parser.add_argument("--family", choices=(*FAMILIES, "all"), required=True)
    parser.add_argument("--zero_bias", action="store_true", help="set the routers' correction biases to zero first")
    parser.add_argument("--json", metavar="FILE", required=True)
    options = parser.parse_args()
    environment = install(options.engine)
    results: list[dict[str, Any]] = []
    for family in FAMILIES if options.family == "all" else (options.family,):
        if environment.python is None:
            missing = {"loaded": False, "tokens_equal": False, "prompts": 0, "reason": environment.reason}
            results.append({"family": family, "engine": options.engine, **missing})
        else:
            results.append(measure(family, str(environment.python), zero_bias=options.zero_bias))
        written = results if options.family == "all" else results[0]
        Path(options.json).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        shown = {name: value for name, value in results[-1].items() if name != "reason"}
        print(json.dumps(shown), str(results[-1].get("reason", ""))[-400:], flush=True)


if __name__ == "__main__":
    main()
