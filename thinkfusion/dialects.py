# SPDX-License-Identifier: Apache-2.0
"""A family's markup as data: the strings around messages, tools and thoughts. One skeleton and one renderer read it.

Token strings, their order and the line breaks are those of each family's own template; sentences (how tools are
announced) are ours. What differs from the original, and why, stands in each dialect's comment and is tested.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from thinkfusion.modes import CONTROL, EMPTY_BLOCK, THINK_CLOSE, THINK_OPEN, Scheme

THINK_TAGS = (THINK_OPEN, THINK_CLOSE)


@dataclass(frozen=True)
class ToolCalls:
    """How an assistant calls tools: `opening`, then each call (`between` them), then `closing`.

    A call is `call_open`, its name, `after_name`, its arguments and `call_close`. The arguments are one JSON object,
    or, where `argument` is given, each stands between its three strings, and text is not quoted.
    """

    opening: str = ""
    opening_after_text: str = "\n"
    between: str = "\n"
    call_open: str = '<tool_call>\n{"name": '
    after_name: str = ', "arguments": '
    call_close: str = "}\n</tool_call>"
    closing: str = ""
    quoted_name: bool = True
    argument: tuple[str, str, str] | None = None
    own_message: bool = False
    """A call is a message of its own (harmony): `opening` ends the message before it. There is one in a step."""


TAGGED_JSON = ToolCalls()
_LINES = "These functions can be called to help the user. Their signatures, one JSON object a line:"
_ONE_OBJECT = "To call a function, write its name and its arguments as one JSON object:"
_EXAMPLE = '{"name": "the function", "arguments": {"an argument": "its value"}}'


@dataclass(frozen=True)
class Dialect:
    """The markup of a family. `{bos}` and `{eos}` stand for the tokenizer's own tokens.

    An assistant's turn ends in `answer_end` where the model has just written it, in `history_end` where it is shown
    as history, and in `call_end` after tool calls; `gap` follows. With `ends_in_next_header` there is no such token:
    the model ends its turn by writing the header of the next one, which `answer_end` and `call_end` name.
    """

    name: str
    turn_tokens: tuple[str, ...]
    """Strings that must be single tokens, besides the think tags."""
    system_open: str
    system_close: str
    user_open: str
    user_close: str
    assistant_open: str
    answer_end: str
    history_end: str
    call_end: str
    opening: str = ""
    gap: str = ""
    user_open_after_system: str | None = None
    assistant_open_after_tools: str | None = None
    ends_in_next_header: bool = False
    results_open: str = ""
    result_open: str = "\n<tool_response>\n"
    after_result_name: str | None = None
    """Where given, a tool's result names its tool: after `result_open`, and before this."""
    result_close: str = "\n</tool_response>"
    results_close: str = ""
    tools_place: str = "inside"
    """Signatures stand "inside" the system turn, or in a turn of their own "before" or "after" it."""
    tools_open: str | None = None
    tools_close: str | None = None
    tools_before: str = f"# Tools\n\n{_LINES}\n<tools>"
    signature_open: str = "\n"
    signature_close: str = ""
    bare_signatures: bool = False
    """Show what is in a tool's `function`, without the object around it."""
    tools_after: str = f"\n</tools>\n\n{_ONE_OBJECT}\n<tool_call>\n{_EXAMPLE}\n</tool_call>"
    calls: ToolCalls = TAGGED_JSON
    schemes: tuple[Scheme, ...] = (CONTROL, EMPTY_BLOCK)
    think_tags: tuple[str, ...] = THINK_TAGS
    added_tokens: tuple[str, ...] = THINK_TAGS
    """Those of the single tokens that are added to a tokenizer that lacks them."""
    known_by_tokens: tuple[str, ...] = ()
    known_by_template: tuple[str, ...] = ()
    known_by_model_types: tuple[str, ...] = ()

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """The strings that must be single tokens: turns and thoughts."""
        return (*self.turn_tokens, *self.think_tags)

    @property
    def stops(self) -> tuple[str, ...]:
        """The tokens that end a generation; the first ends an answer."""
        return tuple(dict.fromkeys((self.answer_end, self.call_end)))

    @property
    def answers_differ_in_history(self) -> bool:
        """Whether history shows an answer otherwise than the model wrote it."""
        return not self.ends_in_next_header and self.answer_end != self.history_end

    def scheme(self, name: Scheme | str) -> Scheme:
        """The pieces of a scheme in this dialect; raises ValueError if there is no such scheme, or not here."""
        given = {scheme.name: scheme for scheme in self.schemes}
        wanted = name.name if isinstance(name, Scheme) else name
        if wanted not in given:
            known = ("control", "empty-block")
            if wanted in known:
                raise ValueError(
                    f"scheme {wanted!r}: the dialect {self.name} has none, since its modes are told apart by other "
                    f"markup; use {' or '.join(map(repr, given))}."
                )
            raise ValueError(f"unknown scheme {wanted!r}; choose one of {', '.join(known)}.")
        calls = self.calls
        shown = (calls.opening, calls.between, calls.call_open, calls.after_name, calls.call_close, calls.closing)
        return replace(
            given[wanted],
            ends=self.stops,
            call_markup="".join((*shown, *(calls.argument or ()))),
            call_lead=calls.opening if calls.own_message else "",
            call_start=calls.call_open.split(" ")[0] if calls.own_message else "",
        )

    def for_tokenizer(self, tokenizer: Any) -> Dialect:
        """The dialect with the tokenizer's own tokens in their places. Raises ValueError without an `eos_token`."""
        texts = {field.name: getattr(self, field.name) for field in fields(self)}
        if not any("{eos}" in str(text) or "{bos}" in str(text) for text in texts.values()):
            return self
        eos, bos = tokenizer.eos_token, tokenizer.bos_token or ""
        if eos is None:
            raise ValueError(
                f"the dialect {self.name} ends a turn with the tokenizer's own end token, and this tokenizer has none; "
                "set tokenizer.eos_token first."
            )

        def fill(text: str) -> str:
            return text.replace("{eos}", eos).replace("{bos}", bos)

        filled: dict[str, Any] = {name: fill(text) for name, text in texts.items() if isinstance(text, str)}
        return replace(self, **filled, turn_tokens=tuple(map(fill, self.turn_tokens)))


# Qwen2 and Qwen3, A.X K1. The default system text of Qwen2.5 is left out: a model must not be told who it is by a
# template. As in Qwen3, tool results stand in a user turn.
CHATML = Dialect(
    name="chatml",
    turn_tokens=("<|im_start|>", "<|im_end|>"),
    added_tokens=("<|im_start|>", "<|im_end|>", *THINK_TAGS),
    known_by_tokens=("<|im_start|>",),
    system_open="<|im_start|>system\n",
    system_close="<|im_end|>\n",
    user_open="<|im_start|>user\n",
    user_close="<|im_end|>\n",
    assistant_open="<|im_start|>assistant\n",
    answer_end="<|im_end|>",
    history_end="<|im_end|>",
    call_end="<|im_end|>",
    gap="\n",
    results_open="<|im_start|>user",
    results_close="<|im_end|>\n",
)

# OLMoE-1B-7B-Instruct (Tülu). Its headers are ordinary text. The end of a turn is the tokenizer's own end token, which
# is also its bos_token in the instruct checkpoints. No tools in the original: theirs are ChatML's tags, as text.
OLMOE = Dialect(
    name="olmoe",
    turn_tokens=("{eos}",),
    known_by_template=("<|user|>", "<|assistant|>", "eos_token"),
    known_by_model_types=("olmoe", "flex_olmo"),
    opening="{bos}",
    system_open="<|system|>\n",
    system_close="\n",
    user_open="<|user|>\n",
    user_close="\n",
    assistant_open="<|assistant|>\n",
    answer_end="{eos}",
    history_end="{eos}",
    call_end="{eos}",
    gap="\n",
    results_open="<|user|>",
    results_close="\n",
)

# Mixtral-8x7B-Instruct. [INST] is ordinary text (a token of its own in 8x22B, and then used as such); the system text
# stands at the head of the first user turn. The original writes a space before the answer: here the token of the mode
# stands in that place. No tools in the original of 8x7B.
MIXTRAL = Dialect(
    name="mixtral",
    turn_tokens=("{eos}",),
    known_by_template=("[INST]", "[/INST]"),
    known_by_model_types=("mixtral",),
    opening="{bos}",
    system_open=" [INST] ",
    system_close="\n\n",
    user_open=" [INST] ",
    user_open_after_system="",
    user_close="",
    assistant_open=" [/INST]",
    answer_end="{eos}",
    history_end="{eos}",
    call_end="{eos}",
    results_open=" [INST]",
)

# DeepSeek-V2-Chat. Headers are ordinary text; the original's answer begins with a space, here with the mode's token.
DEEPSEEK_V2 = Dialect(
    name="deepseek_v2",
    turn_tokens=("{eos}",),
    known_by_tokens=("<｜begin▁of▁sentence｜>",),
    known_by_model_types=("deepseek_v2",),
    opening="{bos}",
    system_open="",
    system_close="\n\n",
    user_open="User: ",
    user_close="\n\n",
    assistant_open="Assistant:",
    answer_end="{eos}",
    history_end="{eos}",
    call_end="{eos}",
    results_open="User:",
    results_close="\n\n",
)

# DeepSeek-V3. After tool results the assistant goes on without a header, as in the original; the mode's token stands
# there too (V3.1 leaves it out), since every prompt must name its mode. The original opens calls and results only the
# first time in a conversation, which is an oversight: here every step has its own.
DEEPSEEK_V3 = Dialect(
    name="deepseek_v3",
    turn_tokens=("<｜User｜>", "<｜Assistant｜>", "{eos}"),
    known_by_tokens=("<｜User｜>", "<｜Assistant｜>"),
    opening="{bos}",
    system_open="",
    system_close="",
    user_open="<｜User｜>",
    user_close="",
    assistant_open="<｜Assistant｜>",
    assistant_open_after_tools="",
    answer_end="{eos}",
    history_end="{eos}",
    call_end="{eos}",
    results_open="<｜tool▁outputs▁begin｜>",
    result_open="<｜tool▁output▁begin｜>",
    result_close="<｜tool▁output▁end｜>",
    results_close="<｜tool▁outputs▁end｜>",
    tools_after="\n</tools>\n\nA call names a function, and gives its arguments as one JSON object in a block of code.",
    calls=ToolCalls(
        opening="<｜tool▁calls▁begin｜>",
        opening_after_text="<｜tool▁calls▁begin｜>",
        call_open="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
        after_name="\n```json\n",
        call_close="\n```<｜tool▁call▁end｜>",
        closing="<｜tool▁calls▁end｜>",
        quoted_name=False,
    ),
)

# GLM-4.5. There is no end of turn: the model writes the next header, <|user|> after an answer and <|observation|>
# after tool calls, and that token is trained. The original appends /nothink to user texts in non-thinking mode; here
# the prefix alone carries the mode. Tools stand in a system turn of their own before the system text. Text is kept as
# it is where the original strips it.
GLM4_MOE = Dialect(
    name="glm4_moe",
    turn_tokens=("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    known_by_tokens=("[gMASK]", "<|observation|>"),
    opening="[gMASK]<sop>",
    system_open="<|system|>\n",
    system_close="",
    user_open="<|user|>\n",
    user_close="",
    assistant_open="<|assistant|>",
    answer_end="<|user|>",
    history_end="",
    call_end="<|observation|>",
    ends_in_next_header=True,
    results_open="<|observation|>",
    tools_place="before",
    tools_open="<|system|>\n",
    tools_close="",
    tools_after=(
        "\n</tools>\n\nTo call a function, write its name, and each argument between tags:\n<tool_call>the function\n"
        "<arg_key>an argument</arg_key>\n<arg_value>its value</arg_value>\n</tool_call>"
    ),
    calls=ToolCalls(
        call_open="<tool_call>",
        after_name="\n",
        call_close="</tool_call>",
        quoted_name=False,
        argument=("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n"),
    ),
    schemes=(
        Scheme(
            name="control",
            thinking_prefix=("\n", THINK_OPEN),
            thinking_start=(),
            thinking_end=(THINK_CLOSE,),
            non_thinking_prefix=("\n", THINK_CLOSE),
            history_prefix=("\n", THINK_CLOSE),
        ),
        Scheme(
            name="empty-block",
            thinking_prefix=(),
            thinking_start=("\n", THINK_OPEN),
            thinking_end=(THINK_CLOSE, "\n"),
            non_thinking_prefix=("\n", THINK_OPEN, THINK_CLOSE, "\n"),
            history_prefix=("\n", THINK_OPEN, THINK_CLOSE, "\n"),
        ),
    ),
)

# Granite 3.x MoE. Tools stand in a turn of the role `tools` after the system turn, as JSON lines (indented lists in
# the original). The default system text, which holds a date, is left out: a prompt must not change by the day.
GRANITE = Dialect(
    name="granite",
    turn_tokens=("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
    known_by_tokens=("<|start_of_role|>", "<|end_of_role|>"),
    system_open="<|start_of_role|>system<|end_of_role|>",
    system_close="<|end_of_text|>\n",
    user_open="<|start_of_role|>user<|end_of_role|>",
    user_close="<|end_of_text|>\n",
    assistant_open="<|start_of_role|>assistant<|end_of_role|>",
    answer_end="<|end_of_text|>",
    history_end="<|end_of_text|>",
    call_end="<|end_of_text|>",
    gap="\n",
    result_open="<|start_of_role|>tool_response<|end_of_role|>",
    result_close="<|end_of_text|>\n",
    tools_place="after",
    tools_open="<|start_of_role|>tools<|end_of_role|>",
    tools_close="<|end_of_text|>\n",
    tools_before=_LINES,
    tools_after=f"\n\nTo call functions, write a JSON list of them:\n<|tool_call|>[{_EXAMPLE}]",
    calls=ToolCalls(
        opening="<|tool_call|>[",
        opening_after_text="<|tool_call|>[",
        between=", ",
        call_open='{"name": ',
        call_close="}",
        closing="]",
    ),
)


# gpt-oss (harmony). The modes are channels: analysis before final, or final at once; so there is no <think> and no
# empty block. An answer ends in <|return|> where it is written, and in <|end|> as history, where analysis is not shown.
# Differences from the original: no identity and no date (a prompt must not change by the day), the channels alone are
# named; tools are JSON lines and not TypeScript; a result is the tool's text itself, not a JSON string of it. A call
# names its recipient in the channel, `<|channel|>commentary to=…`, the form of the harmony documentation that leaves
# the prompt `<|start|>assistant` as it is; with text before it, or in non-thinking mode, the call follows the end of a
# final message, which the prompt of that mode has opened. One call a step: <|call|> ends a generation.
GPT_OSS = Dialect(
    name="gpt_oss",
    turn_tokens=(
        *("<|start|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|end|>"),
        *("<|call|>", "<|return|>"),
    ),
    think_tags=(),
    added_tokens=(),
    known_by_tokens=("<|channel|>", "<|return|>"),
    opening=("<|start|>system<|message|># Valid channels: analysis, commentary, final.<|end|>"),
    system_open="<|start|>developer<|message|># Instructions\n\n",
    system_close="\n\n<|end|>",
    user_open="<|start|>user<|message|>",
    user_close="<|end|>",
    assistant_open="<|start|>assistant",
    answer_end="<|return|>",
    history_end="<|end|>",
    call_end="<|call|>",
    result_open="<|start|>functions.",
    after_result_name=" to=assistant<|channel|>commentary<|message|>",
    result_close="<|end|>",
    tools_open="<|start|>developer<|message|>",
    tools_close="<|end|>",
    tools_before=f"# Tools\n\n## functions\n\n{_LINES}",
    tools_after="\n\nA call goes to the commentary channel, addressed to functions and the name, arguments as JSON.",
    calls=ToolCalls(
        opening="<|end|><|start|>assistant",
        opening_after_text="<|end|><|start|>assistant",
        between="",
        call_open="<|channel|>commentary to=functions.",
        after_name=" <|constrain|>json<|message|>",
        call_close="",
        quoted_name=False,
        own_message=True,
    ),
    schemes=(
        Scheme(
            name="control",
            thinking_prefix=("<|channel|>", "analysis", "<|message|>"),
            thinking_start=(),
            thinking_end=("<|end|>", "<|start|>", "assistant", "<|channel|>", "final", "<|message|>"),
            non_thinking_prefix=("<|channel|>", "final", "<|message|>"),
            history_prefix=("<|channel|>", "final", "<|message|>"),
            tags=("<|start|>", "<|channel|>", "<|message|>", "<|end|>"),
        ),
    ),
)

# MiniMax-M2. The original always shows a system turn, with the model's name where none is given: here there is one
# only where there is a system text or tools. It knows only a thinking mode, `<think>\n…\n</think>\n\n`.
MINIMAX_M2 = Dialect(
    name="minimax_m2",
    turn_tokens=("]~b]", "[e~["),
    known_by_tokens=("]~b]", "[e~["),
    opening="]~!b[",
    system_open="]~b]system\n",
    system_close="[e~[\n",
    user_open="]~b]user\n",
    user_close="[e~[\n",
    assistant_open="]~b]ai\n",
    answer_end="[e~[",
    history_end="[e~[",
    call_end="[e~[",
    gap="\n",
    results_open="]~b]tool",
    result_open="\n<response>",
    result_close="</response>",
    results_close="[e~[\n",
    tools_before=f"# Tools\n{_LINES}\n\n<tools>",
    signature_open="\n<tool>",
    signature_close="</tool>",
    bare_signatures=True,
    tools_after=(
        "\n</tools>\n\nTo call functions, write their names, and their arguments between tags:\n\n<minimax:tool_call>\n"
        '<invoke name="the function">\n<parameter name="an argument">its value</parameter>\n</invoke>\n'
        "</minimax:tool_call>"
    ),
    calls=ToolCalls(
        opening="\n<minimax:tool_call>\n",
        opening_after_text="\n<minimax:tool_call>\n",
        between="",
        call_open='<invoke name="',
        after_name='">\n',
        call_close="</invoke>\n",
        closing="</minimax:tool_call>",
        quoted_name=False,
        argument=('<parameter name="', '">', "</parameter>\n"),
    ),
)

# ERNIE-4.5. Headers are ordinary text. The model ends a turn with </s>, and history shows <|end_of_sentence|> instead.
# No tools in the original.
ERNIE4_5 = Dialect(
    name="ernie4_5",
    turn_tokens=("<|begin_of_sentence|>", "<|end_of_sentence|>", "</s>"),
    known_by_tokens=("<|begin_of_sentence|>", "<|end_of_sentence|>"),
    known_by_model_types=("ernie4_5_moe",),
    opening="<|begin_of_sentence|>",
    system_open="",
    system_close="\n",
    user_open="User: ",
    user_close="\n",
    assistant_open="Assistant: ",
    answer_end="</s>",
    history_end="<|end_of_sentence|>",
    call_end="</s>",
    results_open="User:",
    results_close="\n",
)

DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        *(GPT_OSS, MINIMAX_M2, GLM4_MOE, GRANITE, DEEPSEEK_V3),
        *(ERNIE4_5, CHATML, DEEPSEEK_V2, MIXTRAL, OLMOE),
    )
}
"""All dialects by name, in the order in which `recognise` asks for their tokens."""


def get_dialect(name: Dialect | str) -> Dialect:
    """The dialect called `name`; raises ValueError with the known names."""
    if isinstance(name, Dialect):
        return name
    if name not in DIALECTS:
        raise ValueError(f"unknown dialect {name!r}; choose one of {', '.join(DIALECTS)}.")
    return DIALECTS[name]
