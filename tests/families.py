# SPDX-License-Identifier: Apache-2.0
"""A tokenizer for every family, built in the process with that family's own tokens, and conversations to render."""

import json
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from thinkfusion import install_chat_template
from thinkfusion.dialects import DIALECTS

TOKENS = {
    "chatml": ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"],
    "olmoe": ["|||IP_ADDRESS|||", "<|padding|>"],
    "mixtral": ["<s>", "</s>"],
    "deepseek_v2": ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"],
    "deepseek_v3": [
        *("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
        *("<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
        "<｜tool▁sep｜>",
    ],
    "glm4_moe": [
        *("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"),
        *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
        *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    ],
    "granite": ["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"],
    "gpt_oss": [
        *("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>", "<|return|>"),
        "<|endoftext|>",
    ],
    "minimax_m2": ["]~!b[", "]~b]", "[e~[", "<think>", "</think>", "<minimax:tool_call>", "</minimax:tool_call>"],
    "ernie4_5": ["<s>", "</s>", "<|begin_of_sentence|>", "<|end_of_sentence|>"],
}
ORDINARY = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<minimax:tool_call>", "</minimax:tool_call>")
"""Tokens that the families' tokenizers do not call special; DeepSeek's turn tokens are not either."""
BOS = {
    "olmoe": "|||IP_ADDRESS|||",
    "mixtral": "<s>",
    "deepseek_v2": "<｜begin▁of▁sentence｜>",
    "deepseek_v3": "<｜begin▁of▁sentence｜>",
    "ernie4_5": "<s>",
}
EOS = {
    "chatml": "<|im_end|>",
    "olmoe": "|||IP_ADDRESS|||",
    "mixtral": "</s>",
    "deepseek_v2": "<｜end▁of▁sentence｜>",
    "deepseek_v3": "<｜end▁of▁sentence｜>",
    "glm4_moe": "<|endoftext|>",
    "granite": "<|end_of_text|>",
    "gpt_oss": "<|return|>",
    "minimax_m2": "[e~[",
    "ernie4_5": "</s>",
}
CASES = [(name, scheme.name) for name, dialect in sorted(DIALECTS.items()) for scheme in dialect.schemes]

TEXTS = {
    "en": ("What is 2 + 2?", "Two and two.\n\nThat is four.", "It is 4."),
    "ko": ("2 더하기 2는 무엇입니까?", "둘과 둘을 더하면\n넷입니다.", "답은 4입니다."),
    "emoji": ("🧮 2️⃣➕2️⃣?\n", "  🤔…  ", "👩‍🔬 4️⃣ e\u0301 \u202bשלום\u202c"),
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "a < b & \"c\" > 'd' \\ 더하기",
            "parameters": {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "number"}}}},
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {}, "strict": True}},
]


def corpus() -> list[str]:
    return [text * 3 for texts in TEXTS.values() for text in texts] + [json.dumps(TOOLS, ensure_ascii=False)]


def _byte_level() -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(corpus(), trainer)
    return core


def _sentencepiece(*, prefix: bool) -> Tokenizer:
    """Spaces are marks, what is not known is bytes; with `prefix` a text begins with a mark, as Mixtral's does."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    marks = [normalizers.Prepend("▁")] if prefix else []
    core.normalizer = normalizers.Sequence([*marks, normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", *byte_tokens])
    core.train_from_iterator(corpus(), trainer)
    description = json.loads(core.to_str())
    description["added_tokens"] = description["added_tokens"][:1]
    return Tokenizer.from_str(json.dumps(description))


def bare_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a family as a checkpoint brings it, without a chat template."""
    from tokenizers import AddedToken

    core = _sentencepiece(prefix=name == "mixtral") if name in ("mixtral", "ernie4_5") else _byte_level()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    ordinary = {*ORDINARY, *(token for token in TOKENS[name] if "｜" in token and "sentence" not in token)}
    tokenizer.add_tokens([AddedToken(t, special=t not in ordinary, normalized=False) for t in TOKENS[name]])
    tokenizer.eos_token = EOS[name]
    if name in BOS:
        tokenizer.bos_token = BOS[name]
    if name in ("mixtral", "ernie4_5"):
        tokenizer.unk_token = "<unk>"
    return tokenizer


@cache
def family_tokenizer(name: str, scheme: str = "control") -> PreTrainedTokenizerFast:
    """A family's tokenizer with our template; shared, not to be changed."""
    tokenizer = bare_tokenizer(name)
    install_chat_template(tokenizer, scheme=scheme, dialect=name)
    return tokenizer


def make_messages(language: str, *, turns: int, system: bool, tools: bool, parallel: bool = True) -> list[dict]:
    """A conversation with reasoning in every assistant message; `parallel` makes two calls in one of them."""
    question, reasoning, answer = TEXTS[language]
    messages: list[dict] = [{"role": "system", "content": f"{answer} 안녕"}] if system else []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"{turn} {question}"})
        if tools:
            arguments = {"a": [turn, 1.5, None, True, {"items": "<둘>'&\\u003c\\"}], "b": f"{answer}\n</b>"}
            call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
            other = {"type": "function", "function": {"name": "now", "arguments": {}}}
            result = {"role": "tool", "content": f"{{result}} {turn}"}
            calls = [call, other] if parallel else [other]
            messages += [
                {"role": "assistant", "content": "", "reasoning_content": f"call {reasoning}", "tool_calls": [call]},
                result,
                {"role": "assistant", "content": answer, "reasoning_content": reasoning, "tool_calls": calls},
                *([result] * len(calls)),
            ]
        messages.append(
            {"role": "assistant", "content": f"{turn}: {answer}", "reasoning_content": f"{turn} {reasoning}"}
        )
    return messages
