# SPDX-License-Identifier: Apache-2.0
"""The switchable chat template of a dialect, and installing it on a tokenizer with everything that it needs."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from thinkfusion.dialects import CHATML, DIALECTS, Dialect, get_dialect
from thinkfusion.modes import CONTROL, EMPTY_BLOCK, THINK_CLOSE, THINK_OPEN, Mode, Scheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PAD_TOKEN = "<|pad|>"
_MARKER = re.compile(r"made by thinkfusion: dialect=(\S+) scheme=(\S+) default=(\S+) bos=(\S+)")


@dataclass(frozen=True)
class InstalledTemplate:
    """What a thinkfusion chat template says of itself; `bos` puts the tokenizer's `bos_token` in front."""

    dialect: Dialect
    scheme: Scheme
    default_mode: Mode
    bos: bool


def chat_template(
    scheme: Scheme | str = "control",
    *,
    default_mode: Mode | str = Mode.THINKING,
    bos: bool = False,
    dialect: Dialect | str = CHATML,
) -> str:
    """The Jinja source of the switchable chat template; `bos` puts the tokenizer's `bos_token` in front.

    Raises ValueError for an unknown dialect or mode, or a scheme that the dialect does not have.
    """
    dialect, default_mode = get_dialect(dialect), Mode.parse(default_mode)
    scheme = dialect.scheme(scheme)
    marker = f"made by thinkfusion: dialect={dialect.name} scheme={scheme.name} default={default_mode} bos={bos}"
    values = {
        "MARKER": marker,
        "DEFAULT": "true" if default_mode is Mode.THINKING else "false",
        "MARKUP": ",\n".join(
            f"    '{name}': {_literal(text)}" for name, text in _markup(dialect, scheme, bos=bos).items()
        ),
    }
    source = (files("thinkfusion") / "templates" / "skeleton.jinja").read_text(encoding="utf-8")
    return re.sub(r"@([A-Z]+)@", lambda found: values[found[1]], source)


def _markup(dialect: Dialect, scheme: Scheme, *, bos: bool) -> dict[str, str | bool]:
    """All strings of the skeleton, by the names that it has for them."""
    calls = dialect.calls
    argument = calls.argument or ("", "", "")
    given = {
        name: getattr(dialect, name)
        for name in (
            *("system_open", "system_close", "user_open", "user_close", "assistant_open", "gap"),
            *("results_open", "result_open", "result_close", "results_close", "tools_place", "tools_before"),
            *("signature_open", "signature_close", "bare_signatures", "tools_after", "history_end"),
        )
    }
    in_header = dialect.ends_in_next_header
    return given | {
        "opening": ("{bos}" if bos else "") + dialect.opening,
        "user_open_after_system": _or(dialect.user_open_after_system, dialect.user_open),
        "assistant_open_after_tools": _or(dialect.assistant_open_after_tools, dialect.assistant_open),
        "tools_open": _or(dialect.tools_open, dialect.system_open),
        "tools_close": _or(dialect.tools_close, dialect.system_close),
        "answer_end": "" if in_header else dialect.answer_end,
        "call_end": "" if in_header else dialect.call_end,
        "named_results": dialect.after_result_name is not None,
        "after_result_name": dialect.after_result_name or "",
        "own_message": calls.own_message,
        "calls_open": calls.opening,
        "calls_open_after_text": calls.opening_after_text,
        "between": calls.between,
        "call_open": calls.call_open,
        "quoted_name": calls.quoted_name,
        "after_name": calls.after_name,
        "tagged_arguments": calls.argument is not None,
        "argument_open": argument[0],
        "argument_between": argument[1],
        "argument_close": argument[2],
        "call_close": calls.call_close,
        "calls_close": calls.closing,
        "thinking_prefix": "".join(scheme.thinking_prefix),
        "thinking_before": "".join(scheme.thinking_prefix + scheme.thinking_start),
        "thinking_after": "".join(scheme.thinking_end),
        "non_thinking_prefix": "".join(scheme.non_thinking_prefix),
        "history_prefix": "".join(scheme.history_prefix),
    }


def _or(text: str | None, default: str) -> str:
    return default if text is None else text


def _literal(value: str | bool) -> str:
    """A value as Jinja writes it; the tokenizer's own tokens are the variables that every server gives a template."""
    if isinstance(value, bool):
        return "true" if value else "false"
    parts = [part for part in re.split(r"(\{bos\}|\{eos\})", value) if part]
    tokens = {"{bos}": "(bos_token or '')", "{eos}": "(eos_token or '')"}
    return " + ".join(tokens.get(part) or json.dumps(part, ensure_ascii=False) for part in parts) or '""'


def template_marks(source: str) -> tuple[str, str, Mode] | None:
    """The names of dialect and scheme, and the default mode, of a template's source; None if it is none of ours."""
    found = _MARKER.search(source)
    return None if found is None else (found[1], found[2], Mode.parse(found[3]))


def installed_template(tokenizer: PreTrainedTokenizerBase) -> InstalledTemplate | None:
    """What `install_chat_template` put on this tokenizer, or None if its template is another one."""
    source = tokenizer.chat_template
    found = _MARKER.search(source) if isinstance(source, str) else None
    if found is None or found[1] not in DIALECTS:
        return None
    dialect = DIALECTS[found[1]].for_tokenizer(tokenizer)
    return InstalledTemplate(dialect, dialect.scheme(found[2]), Mode.parse(found[3]), found[4] == "True")


def scheme_of(tokenizer: PreTrainedTokenizerBase) -> Scheme:
    """The scheme of any switchable chat template, ours or not, told from what its prompts end in.

    Raises ValueError if the template is missing or both modes have the same prompt.
    """
    template = installed_template(tokenizer)
    if template is not None:
        return template.scheme
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; call install_chat_template(tokenizer, model) first.")
    thinking, non_thinking = (_template_prompt(tokenizer, mode) for mode in (Mode.THINKING, Mode.NON_THINKING))
    if thinking == non_thinking:
        raise ValueError("the tokenizer's chat template has no thinking switch: both modes have the same prompt.")
    # Where the prompt opens the trace itself, the reply is read as with `control`: it begins inside the trace.
    return CONTROL if thinking.rstrip().endswith(THINK_OPEN) else EMPTY_BLOCK


def _template_prompt(tokenizer: PreTrainedTokenizerBase, mode: Mode) -> str:
    switch = mode is Mode.THINKING
    messages = [{"role": "user", "content": "a"}]
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=switch, thinking=switch
    )
    return str(text)


def recognise_dialect(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None) -> Dialect:
    """The dialect of a checkpoint: that of a template of ours, else by tokens, by template, by model type; else ChatML.

    Tokens are asked first, since a checkpoint that was given other markup has its tokens, and keeps its type; then
    strings of the template that it came with; then `model.config.model_type`.
    """
    source = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    found = _MARKER.search(source)
    if found is not None and found[1] in DIALECTS:
        return DIALECTS[found[1]]
    tokens = tokenizer.get_vocab()
    for dialect in DIALECTS.values():
        if dialect.known_by_tokens and all(token in tokens for token in dialect.known_by_tokens):
            return dialect
    for dialect in DIALECTS.values():
        if dialect.known_by_template and all(text in source for text in dialect.known_by_template):
            return dialect
    model_type = model.config.get_text_config().model_type if model is not None else ""
    return next((each for each in DIALECTS.values() if model_type in each.known_by_model_types), CHATML)


def install_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel | None = None,
    *,
    scheme: Scheme | str = "control",
    default_mode: Mode | str = Mode.THINKING,
    dialect: Dialect | str | None = None,
) -> list[int]:
    """Give a checkpoint the switchable chat template and everything that it needs.

    The template speaks the checkpoint's own markup (see `recognise_dialect`), or that of `dialect`. The tokenizer gets
    the missing control tokens, the template with its default mode, `response_template` (so that
    `tokenizer.parse_response` and servers split replies), the end-of-turn token as `eos_token`, and a padding
    token other than that. The model, if given, gets embedding rows for the new tokens (each the mean of the rows
    that were there, in the input and the output embeddings; the number of rows stays a multiple of 64), and
    `eos_token_id` and `pad_token_id` in its configs; the old end tokens go on ending a generation.
    `<think>` and `</think>` are added as tokens that `skip_special_tokens` keeps, since servers remove the
    special ones before they split a reply. Turn tokens are added for ChatML only: those of another family mean
    nothing to a checkpoint that does not know them.

    Returns the ids of the tokens that were added, none if the tokenizer had them all. Installing again replaces
    the template and adds nothing.

    Raises ValueError if the tokenizer is not a fast one, if it lacks tokens of the dialect, or if it still splits a
    control token; for an unknown dialect or mode, and for a scheme that the dialect does not have.
    """
    from tokenizers import AddedToken

    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} is a slow tokenizer; load the checkpoint's fast one.")
    chosen = recognise_dialect(tokenizer, model) if dialect is None else get_dialect(dialect)
    # Made before anything is changed, so that a wrong name leaves the checkpoint as it was.
    bos = not chosen.opening and _puts_bos_first(tokenizer)
    source = chat_template(scheme, default_mode=default_mode, bos=bos, dialect=chosen)
    chosen = chosen.for_tokenizer(tokenizer)
    old_eos, old_size = tokenizer.eos_token, len(tokenizer)
    known = tokenizer.get_vocab()
    missing = [token for token in chosen.control_tokens if token not in known]
    _check_own_tokens(missing, chosen)
    tokenizer.add_tokens(
        [
            AddedToken(token, special=token not in (THINK_OPEN, THINK_CLOSE), normalized=False)
            for token in chosen.control_tokens
            if token not in tokenizer.get_added_vocab()
        ]
    )
    if tokenizer.pad_token is None or tokenizer.pad_token in chosen.stops:
        if old_eos is not None and old_eos not in chosen.stops:
            tokenizer.pad_token = old_eos
        else:
            missing += [PAD_TOKEN] if PAD_TOKEN not in known else []
            tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    tokenizer.eos_token = chosen.answer_end
    check_control_tokens(tokenizer, chosen)

    tokenizer.chat_template = source
    tokenizer.response_template = response_template(chosen, chosen.scheme(scheme))
    added = [tokenizer.convert_tokens_to_ids(token) for token in missing]
    if model is not None:
        add_embedding_rows(model, tokenizer, added, old_size)
        _set_end_of_turn(model, tokenizer, [*chosen.stops, old_eos])
    if added:
        logger.info("Added the control tokens %s as %s.", ", ".join(missing), added)
    return added


def _puts_bos_first(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its own token in front of every text."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _check_own_tokens(missing: list[str], dialect: Dialect) -> None:
    foreign = [token for token in missing if token not in dialect.added_tokens]
    if foreign:
        raise ValueError(
            f"the tokenizer does not know {', '.join(foreign)}, which the dialect {dialect.name} needs; leave "
            "`dialect` unset to use the checkpoint's own markup, or use dialect='chatml', whose tokens can be added."
        )


def check_control_tokens(tokenizer: PreTrainedTokenizerBase, dialect: Dialect) -> None:
    """Raise ValueError if a control token of `dialect` is not one token of this tokenizer."""
    for token in dialect.control_tokens:
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or token not in tokenizer.get_added_vocab():
            raise ValueError(
                f"the tokenizer splits the control token {token} into {len(ids)} tokens {ids}; call "
                "install_chat_template(tokenizer, model) first, and train from what it returns."
            )


def response_template(dialect: Dialect, scheme: Scheme | None = None) -> dict[str, Any]:
    """How transformers (≥ 5.13) splits a reply of ours into `reasoning_content`, `content` and `tool_calls`."""
    scheme = scheme or dialect.scheme("control")
    ends = "|".join(map(re.escape, dialect.stops))
    ends = ends if len(dialect.stops) == 1 else f"(?:{ends})"
    content: dict[str, Any] = {"close_pattern": rf"{ends}\s*", "content": "text"}
    if dialect.think_tags:
        # In non-thinking mode the prompt ends in </think>: a thought of no length, closed at once.
        opened, closed = rf"{re.escape(THINK_OPEN)}|(?={re.escape(THINK_CLOSE)})", rf"{re.escape(THINK_CLOSE)}\s*"
    else:
        # A call may follow a thought or a text at once; what it begins with is its own.
        call = f"(?={re.escape(dialect.calls.opening + dialect.calls.call_open)})"
        opened, closed = re.escape("".join(scheme.thinking_prefix)), f"(?={re.escape(scheme.closing)})|{call}"
        shown = re.escape("".join(scheme.non_thinking_prefix))
        content["open_pattern"] = f"{re.escape(scheme.closing)}|{shown}"
        content["close_pattern"] += f"|{call}"
    anchors = [dialect.assistant_open]
    if dialect.assistant_open_after_tools is not None:
        anchors.append(dialect.assistant_open_after_tools or dialect.results_close)
    return {
        "defaults": {"role": "assistant"},
        "start_anchor": anchors[0] if len(anchors) == 1 else anchors,
        "fields": {
            "reasoning_content": {"open_pattern": opened, "close_pattern": closed, "content": "text"},
            "tool_calls": _call_fields(dialect),
            "content": content,
        },
    }


def _call_fields(dialect: Dialect) -> dict[str, Any]:
    """How tool calls are found and read; the white space after them is theirs."""
    calls = dialect.calls
    function: dict[str, Any] = {"name": "{name}", "arguments": "{content}"}
    shape: dict[str, Any]
    if calls.quoted_name and not calls.opening:
        opened, closed = calls.call_open.partition("\n")[0], calls.call_close.rpartition("\n")[2]
        shape = {"open": opened, "close_pattern": rf"{re.escape(closed)}\s*", "repeats": True, "content": "json"}
        return {**shape, "transform": {"type": "function", "function": "{content}"}}
    if calls.quoted_name:
        shape = {"open": calls.opening.removesuffix("["), "close_pattern": f"(?={re.escape(dialect.call_end)})"}
        function["arguments"] = "{arguments}"
        shape |= {"content": "json", "transform_each": True}
        return {**shape, "transform": {"type": "function", "function": function}}
    around = (calls.opening.strip(), calls.closing.strip())
    lead, tail = (rf"(?:{re.escape(text)}\s*)?" if text else "" for text in around)
    ended = re.escape(calls.call_close) or f"(?={re.escape(dialect.call_end)})"
    shape = {
        "open_pattern": rf"{lead}{re.escape(calls.call_open)}(?P<name>.+?){re.escape(calls.after_name)}",
        "close_pattern": rf"{ended}{tail}\s*",
        "repeats": True,
        "content": "json",
        "transform": {"type": "function", "function": function},
    }
    if calls.argument is not None:
        before, between, after = map(re.escape, calls.argument)
        tags = f"{before}(?P<key>.*?){between}(?P<value>.*?){after}"
        values = {"name": "json", "args": {"allow_non_json": True}}
        shape |= {"content": "xml-inline", "content_args": {"tag_pattern": tags, "value_parser": values}}
    return shape


def add_embedding_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, added: list[int], old_size: int
) -> None:
    """Give `model` rows for the tokens `added`, each the mean of those that were there; a multiple of 64 if it grows.

    old_size: how many tokens the tokenizer had before.
    """
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


def _set_end_of_turn(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ending_tokens: list[str | None]
) -> None:
    """Every token that ends a turn ends a generation; so do those that ended one before."""
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ending_tokens if token is not None]
    model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if model.generation_config is not None:
        before = model.generation_config.eos_token_id
        before = before if isinstance(before, list) else [before]
        ends += [end for end in before if end is not None]
        model.generation_config.eos_token_id = list(dict.fromkeys(ends))
        model.generation_config.pad_token_id = tokenizer.pad_token_id
