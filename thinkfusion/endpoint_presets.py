# SPDX-License-Identifier: Apache-2.0
"""How a served model is switched: what a request says in each mode, and how unsplit replies look."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from thinkfusion.endpoint import EndpointError
from thinkfusion.modes import CONTROL, EMPTY_BLOCK, Mode, Scheme

EFFORTS = ("low", "medium", "high")
_OURS = ("messages", "model", "stream", "stream_options", "n")


@dataclass(frozen=True)
class Switch:
    """`bodies` are the fields that a request gets in each mode.

    scheme: how a reply is read where the server leaves the tags in it. soft: whether `/think` and `/no_think` switch.
    both_reason: the modes are levels of effort, and a reply of either may reason.
    """

    name: str
    bodies: Mapping[Mode, Mapping[str, Any]]
    scheme: Scheme = EMPTY_BLOCK
    soft: bool = False
    both_reason: bool = False


def _template(name: str) -> dict[Mode, dict[str, Any]]:
    return {mode: {"chat_template_kwargs": {name: mode is Mode.THINKING}} for mode in Mode}


def _effort(level: str) -> dict[str, Any]:
    # vLLM reads the field; llama.cpp hands the template its own arguments.
    return {"reasoning_effort": level, "chat_template_kwargs": {"reasoning_effort": level}}


PRESETS: dict[str, Switch] = {
    switch.name: switch
    for switch in (
        Switch("thinkfusion", _template("enable_thinking"), soft=True),
        Switch("qwen3", _template("enable_thinking"), soft=True),
        Switch("deepseek", _template("thinking"), scheme=CONTROL),
        Switch("glm", _template("enable_thinking")),
        Switch("axk1", _template("enable_thinking"), scheme=CONTROL),
        Switch("granite", _template("thinking")),
        Switch(
            "gpt-oss",
            {Mode.THINKING: _effort("high"), Mode.NON_THINKING: _effort("low")},
            both_reason=True,
        ),
    )
}
"""`thinkfusion` is the default. deepseek: V3.1 and later; granite: 3.2 and 3.3; gpt-oss: its effort `high` stands for
thinking mode and `low` for non-thinking mode, both of which reason."""


def switch_of(
    preset: str = "thinkfusion",
    *,
    thinking_body: str | None = None,
    non_thinking_body: str | None = None,
    efforts: str | None = None,
) -> Switch:
    """A preset, with one's own fields in place of its own where they are given, as JSON objects.

    efforts: two levels of gpt-oss, such as `medium,low`. Raises EndpointError for anything that is not so, and for
    modes that are asked for alike.
    """
    if preset not in PRESETS:
        raise EndpointError(f"preset: found {preset!r}, expected one of {', '.join(PRESETS)}.")
    switch = PRESETS[preset]
    bodies = dict(switch.bodies)
    if efforts is not None:
        levels = [level.strip() for level in efforts.split(",")]
        if not switch.both_reason or len(levels) != len(Mode) or not {*levels} <= {*EFFORTS}:
            raise EndpointError(
                f"efforts: found {efforts!r} with the preset {preset}, expected two of {', '.join(EFFORTS)}, the "
                "higher one first, with gpt-oss."
            )
        bodies = dict(zip(Mode, map(_effort, levels), strict=True))
    for mode, name, given in (
        (Mode.THINKING, "thinking_body", thinking_body),
        (Mode.NON_THINKING, "non_thinking_body", non_thinking_body),
    ):
        if given is not None:
            bodies[mode] = _body(name, given)
    first, second = bodies.values()
    if first == second:
        raise EndpointError(
            f"the requests of both modes say the same, {json.dumps(first)}, so nothing would switch. Give "
            "--thinking_body and --non_thinking_body."
        )
    return replace(switch, bodies=bodies)


def _body(name: str, given: str) -> dict[str, Any]:
    try:
        body = json.loads(given)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise EndpointError(
            f"{name}: found {given!r}, expected a JSON object, such as "
            '\'{"chat_template_kwargs": {"enable_thinking": true}}\'.'
        )
    own = sorted({*body} & {*_OURS})
    if own:
        raise EndpointError(f"{name}: found {', '.join(own)}, which the evaluation sets itself. Leave it out.")
    return body
