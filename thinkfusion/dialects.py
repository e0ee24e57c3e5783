# SPDX-License-Identifier: Apache-2.0
"""A family's markup as data, the switchable chat template made from it, and installing that on a tokenizer."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from thinkfusion.modes import THINK_CLOSE, THINK_OPEN, Mode, Scheme, get_scheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PAD_TOKEN = "<|pad|>"


@dataclass(frozen=True)
class Dialect:
    """The strings around the messages of a family. Those in `markup` are tokens of their own where they exist."""

    name: str
    turn_open: str
    turn_close: str
    tools_before: str
    tools_after: str

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """The strings that must be single tokens: turns and thoughts."""
        return (self.turn_open, self.turn_close, THINK_OPEN, THINK_CLOSE)


TOOL_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<tools>", "</tools>")
CHATML = Dialect(
    name="chatml",
    turn_open="<|im_start|>",
    turn_close="<|im_end|>",
    tools_before=(
        "# Tools\n\nThese functions can be called to help the user. Their signatures, one JSON object a line:\n<tools>"
    ),
    tools_after=(
        "\n</tools>\n\nTo call a function, write its name and its arguments as one JSON object:\n"
        '<tool_call>\n{"name": "the function", "arguments": {"an argument": "its value"}}\n</tool_call>'
    ),
)
DIALECTS: dict[str, Dialect] = {CHATML.name: CHATML}

_MARKER = re.compile(r"made by thinkfusion: dialect=(\S+) scheme=(\S+) default=(\S+) bos=(\S+)")


@dataclass(frozen=True)
class InstalledTemplate:
    """What a thinkfusion chat template says of itself."""

    dialect: Dialect
    scheme: Scheme
    default_mode: Mode
    bos: bool


def chat_template(
    scheme: Scheme | str = "control",
    *,
    default_mode: Mode | str = Mode.THINKING,
    bos: bool = False,
    dialect: Dialect = CHATML,
) -> str:
    """The Jinja source of the switchable chat template; `bos` puts the tokenizer's `bos_token` in front."""
    scheme, default_mode = get_scheme(scheme), Mode.parse(default_mode)
    values = {
        "MARKER": f"made by thinkfusion: dialect={dialect.name} scheme={scheme.name} default={default_mode} bos={bos}",
        "DEFAULT": "true" if default_mode is Mode.THINKING else "false",
        "BOS": "bos_token" if bos else '""',
    }
    literals = {
        "TURN_OPEN": dialect.turn_open,
        "TURN_CLOSE": dialect.turn_close,
        "TOOLS_BEFORE": dialect.tools_before,
        "TOOLS_AFTER": dialect.tools_after,
        "THINKING_PREFIX": "".join(scheme.thinking_prefix),
        "NON_THINKING_PREFIX": "".join(scheme.non_thinking_prefix),
        "HISTORY_PREFIX": "".join(scheme.history_prefix),
        "THINKING_BEFORE": "".join(scheme.thinking_prefix + scheme.thinking_start),
        "THINKING_AFTER": "".join(scheme.thinking_end),
    }
    values |= {name: json.dumps(text, ensure_ascii=False) for name, text in literals.items()}
    source = (files("thinkfusion") / "templates" / f"{dialect.name}.jinja").read_text(encoding="utf-8")
    return re.sub(r"@([A-Z_]+)@", lambda found: values[found[1]], source)


def installed_template(tokenizer: PreTrainedTokenizerBase) -> InstalledTemplate | None:
    """What `install_chat_template` put on this tokenizer, or None if its template is another one."""
    source = tokenizer.chat_template
    found = _MARKER.search(source) if isinstance(source, str) else None
    if found is None or found[1] not in DIALECTS:
        return None
    return InstalledTemplate(DIALECTS[found[1]], get_scheme(found[2]), Mode.parse(found[3]), found[4] == "True")


def install_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel | None = None,
    *,
    scheme: Scheme | str = "control",
    default_mode: Mode | str = Mode.THINKING,
) -> list[int]:
    """Give a checkpoint the switchable chat template and everything that it needs.

    The tokenizer gets the missing control tokens, the template with its default mode, `response_template` (so that
    `tokenizer.parse_response` and servers split replies), the end-of-turn token as `eos_token`, and a padding
    token other than that. The model, if given, gets embedding rows for the new tokens (each the mean of the rows
    that were there, in the input and the output embeddings; the number of rows stays a multiple of 64), and
    `eos_token_id` and `pad_token_id` in its configs; the old end token goes on ending a generation.
    `<think>` and `</think>` are added as tokens that `skip_special_tokens` keeps, since servers remove the
    special ones before they split a reply.

    Returns the ids of the tokens that were added, none if the tokenizer had them all. Installing again replaces
    the template and adds nothing.

    Raises ValueError if the tokenizer is not a fast one, or if it still splits a control token.
    """
    from tokenizers import AddedToken

    scheme, default_mode, dialect = get_scheme(scheme), Mode.parse(default_mode), CHATML
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} is a slow tokenizer; load the checkpoint's fast one.")
    # Asked before anything is added: some tokenizers put their own token in front of every text.
    bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    old_eos, old_size = tokenizer.eos_token, len(tokenizer)
    known = tokenizer.get_vocab()
    missing = [token for token in dialect.control_tokens if token not in known]
    tokenizer.add_tokens(
        [
            AddedToken(token, special=token not in (THINK_OPEN, THINK_CLOSE), normalized=False)
            for token in dialect.control_tokens
            if token not in tokenizer.get_added_vocab()
        ]
    )
    if tokenizer.pad_token is None or tokenizer.pad_token == dialect.turn_close:
        if old_eos not in (None, dialect.turn_close):
            tokenizer.pad_token = old_eos
        else:
            missing += [PAD_TOKEN] if PAD_TOKEN not in known else []
            tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    tokenizer.eos_token = dialect.turn_close
    check_control_tokens(tokenizer, dialect)

    tokenizer.chat_template = chat_template(scheme, default_mode=default_mode, bos=bos, dialect=dialect)
    tokenizer.response_template = response_template(dialect)
    added = [tokenizer.convert_tokens_to_ids(token) for token in missing]
    if model is not None:
        _add_embedding_rows(model, tokenizer, added, old_size)
        _set_end_of_turn(model, tokenizer, old_eos)
    if added:
        logger.info("Added the control tokens %s as %s.", ", ".join(missing), added)
    return added


def check_control_tokens(tokenizer: PreTrainedTokenizerBase, dialect: Dialect) -> None:
    """Raise ValueError if a control token of `dialect` is not one token of this tokenizer."""
    for token in dialect.control_tokens:
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or token not in tokenizer.get_added_vocab():
            raise ValueError(
                f"the tokenizer splits the control token {token} into {len(ids)} tokens {ids}; call "
                "install_chat_template(tokenizer, model) first, and train from what it returns."
            )


def response_template(dialect: Dialect) -> dict[str, Any]:
    """How transformers (≥ 5.13) splits a reply of ours into `reasoning_content`, `content` and `tool_calls`."""
    return {
        "defaults": {"role": "assistant"},
        "start_anchor": f"{dialect.turn_open}assistant\n",
        "fields": {
            # In non-thinking mode the prompt ends in </think>: a thought of no length, closed at once.
            "reasoning_content": {
                "open_pattern": rf"{re.escape(THINK_OPEN)}|(?={re.escape(THINK_CLOSE)})",
                "close_pattern": rf"{re.escape(THINK_CLOSE)}\s*",
                "content": "text",
            },
            "tool_calls": {
                "open": "<tool_call>",
                "close_pattern": r"</tool_call>\s*",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {"close_pattern": rf"{re.escape(dialect.turn_close)}\s*", "content": "text"},
        },
    }


def _add_embedding_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, added: list[int], old_size: int
) -> None:
    import torch

    rows = model.get_input_embeddings().weight.shape[0]
    known = min(old_size, rows)
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    fresh = sorted({*added, *range(rows, model.get_input_embeddings().weight.shape[0])})
    if not fresh:
        return
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = {id(layer.weight): layer.weight for layer in layers if layer is not None}
    with torch.no_grad():
        for weight in weights.values():
            weight[fresh] = weight[:known].float().mean(dim=0).to(weight.dtype)


def _set_end_of_turn(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, old_eos: str | None) -> None:
    ends = [tokenizer.eos_token_id]
    if old_eos is not None and old_eos != tokenizer.eos_token:
        ends.append(tokenizer.convert_tokens_to_ids(old_eos))
    model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.eos_token_id = ends
        model.generation_config.pad_token_id = tokenizer.pad_token_id
