# SPDX-License-Identifier: Apache-2.0
"""A small random world for trees: tiny models of every family, made from its config, and conversations for them."""

import random
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from tests.families import TOOLS
from thinkfusion import Conversation, Mode
from thinkfusion.conversations import Exchange, Message

SLIDING, FULL = "sliding_attention", "full_attention"
LATENT = ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash")
"""Families that compress keys and values (MLA); their heads have widths of other names, and are not grouped."""
WINDOWED = {
    **dict.fromkeys(("qwen3_moe", "mixtral", "phimoe"), (SLIDING, SLIDING)),
    **dict.fromkeys(("qwen2_moe", "granitemoe_swa", "dots1", "cohere2_moe", "qwen3", "gemma3_text"), (SLIDING, FULL)),
    **dict.fromkeys(("gpt_oss", "exaone_moe", "afmoe", "gemma2"), (FULL, SLIDING)),
}
"""Families that have windows, and the layers of a tiny one; the first three have one window for all layers."""
BRANCHING = (
    *("qwen3_moe", "qwen2_moe", "olmoe", "mixtral", "axk1", "deepseek_v2", "deepseek_v3", "gpt_oss", "glm4_moe"),
    *("glm4_moe_lite", "granitemoe", "granitemoeshared", "granitemoe_swa", "minimax_m2", "ernie4_5_moe", "dots1"),
    *("phimoe", "hunyuan_v1_moe", "exaone_moe", "afmoe", "flex_olmo", "cohere2_moe", "jetmoe", "longcat_flash"),
    *("qwen3", "llama", "gemma2", "gemma3_text"),
)
"""Families whose layers can branch."""
NOT_BRANCHING = (
    *("qwen3_5_moe_text", "qwen3_next", "granitemoehybrid", "nemotron_h", "jamba", "lfm2_moe", "minimax"),
    *("llama4_text", "deepseek_v32", "glm_moe_dsa", "axk2"),
)
"""Families with linear attention, state spaces, convolutions, chunks, or a choice among the keys."""

SIZES: dict[str, Any] = {
    "vocab_size": 640,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
}
LATENT_SIZES = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
DELTA_SIZES = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
"""Heads of linear attention, whose defaults are those of a model of billions of parameters."""
OWN_SIZES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen3_next", "qwen3_5_moe_text"), DELTA_SIZES),
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16},
    "gemma2": {"attn_logit_softcapping": 2.0},
    "longcat_flash": {"ffn_hidden_size": 64, "expert_ffn_hidden_size": 32, "zero_expert_num": 1, "num_layers": 1},
}
EAGER = ("gpt_oss", "granitemoe_swa", "gemma2")
"""Families with attention sinks or a cap of the scores, which sdpa would leave out."""


def tiny_config(family: str, *, window: int | None = None, **changes: Any) -> PretrainedConfig:
    """The config of a tiny model; `window` gives it the layers of WINDOWED, else all are full attention."""
    sizes = {**SIZES, **(LATENT_SIZES if family in LATENT else {}), **OWN_SIZES.get(family, {})}
    if window is not None:
        sizes |= {"sliding_window": window, "use_sliding_window": True}
    if family in WINDOWED:
        sizes["layer_types"] = [FULL, FULL] if window is None else list(WINDOWED[family])
    return AutoConfig.for_model(family, **(sizes | changes))


def tiny_random_model(
    family: str, *, window: int | None = None, seed: int = 0, device: str = "cpu", **changes: Any
) -> PreTrainedModel:
    """A random model of two layers, in training mode; every parameter is drawn, so that none is idle."""
    config = tiny_config(family, window=window, **changes)
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager" if family in EAGER else None)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.normal_(float("norm" in name), 0.1)
        else:
            parameter.data.normal_(0.0, parameter.shape[-1] ** -0.5)
    # PhiMoE's router draws at random in training.
    return model.eval() if family == "phimoe" else model.train()


WORDS = ("What is", " 2 + 2?", "Two and", " two.", "That is", " four.", "It is 4.", "답은", " 4입니다.", "🧮", "\n")


def random_conversation(
    draw: random.Random, *, turns: int | None = None, tools: bool | None = None, parallel: bool = True
) -> Conversation:
    """A conversation of 1 to 8 turns whose exchanges are trained in both modes, in one, with a pair of answers, only
    in the ends of thinking, or not at all; at least the last is trained.

    tools: whether exchanges may call tools; drawn if None. parallel: whether a step may call two of them.
    """
    turns = draw.randint(1, 8) if turns is None else turns
    tools = draw.random() < 0.5 if tools is None else tools
    exchanges = [_random_exchange(draw, tools=tools, parallel=parallel) for _ in range(turns)]
    if not exchanges[-1].modes:
        exchanges[-1] = replace(exchanges[-1], modes=tuple(Mode))
    system = _text(draw) if draw.random() < 0.5 else None
    return Conversation(tuple(exchanges), system, tuple(TOOLS) if tools else ())


def _random_exchange(draw: random.Random, *, tools: bool, parallel: bool) -> Exchange:
    user, steps = Message("user", _text(draw)), _steps(draw, reasons=True, tools=tools, parallel=parallel)
    kind = draw.choice(("both", "both", "both", "thinking", "non-thinking", "pair", "ends", "context"))
    if kind == "pair":
        return Exchange(user, steps, tuple(Mode), _steps(draw, reasons=False, tools=tools, parallel=parallel))
    if kind == "ends":
        return Exchange(user, steps, (Mode.THINKING,), ends_only=True)
    modes = {"both": tuple(Mode), "thinking": (Mode.THINKING,), "non-thinking": (Mode.NON_THINKING,), "context": ()}
    return Exchange(user, steps, modes[kind])


def _steps(draw: random.Random, *, reasons: bool, tools: bool, parallel: bool) -> tuple[Message, ...]:
    steps: list[Message] = []
    for _ in range(draw.randint(0, 2) if tools else 0):
        count = draw.randint(1, 2) if parallel else 1
        calls = tuple({"name": "add", "arguments": {"a": [draw.randint(0, 9)]}} for _ in range(count))
        steps.append(Message("assistant", draw.choice(("", _text(draw))), _text(draw) if reasons else None, calls))
        steps += [Message("tool", f"result {_text(draw)}") for _ in calls]
    return (*steps, Message("assistant", _text(draw), _text(draw) if reasons else None))


def _text(draw: random.Random) -> str:
    return "".join(draw.choice(WORDS) for _ in range(draw.randint(1, 5))) + draw.choice("ab")
