# SPDX-License-Identifier: Apache-2.0
"""How each mode samples by default, stored in the checkpoint's generation_config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from thinkfusion.modes import Mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEY = "thinkfusion"
"""The name of our block in generation_config.json; servers read the names that they know, and leave it alone."""


@dataclass(frozen=True)
class SamplingDefaults:
    """How tokens are drawn: greedily at temperature 0; among all tokens at top_p 1 and top_k 0."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        wrong = [
            f"{name}: found {value!r}, expected {expected}."
            for name, value, expected, right in (
                ("temperature", self.temperature, "a number of at least 0", _number(self.temperature)),
                ("top_p", self.top_p, "a number above 0, at most 1", _number(self.top_p) and 0 < self.top_p <= 1),
                ("top_k", self.top_k, "a whole number of at least 0", _number(self.top_k) and self.top_k % 1 == 0),
            )
            if not right
        ]
        if wrong:
            raise ValueError(" ".join(wrong))


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")


PRESETS: dict[str, dict[Mode, SamplingDefaults]] = {
    "qwen3": {
        Mode.THINKING: SamplingDefaults(0.6, 0.95, 20),
        Mode.NON_THINKING: SamplingDefaults(0.7, 0.8, 20),
    }
}
"""Sampling that others published: `qwen3` is that of Qwen3's model cards. Greedy decoding makes small models loop."""


def parse_generation_defaults(
    value: str | Mapping[Any, Any] | None, where: str = "generation_defaults"
) -> dict[Mode, SamplingDefaults]:
    """Read `{"thinking": {"temperature": 0.6, …}, …}`, as a mapping or as JSON, or the name of a preset.

    None is none at all; a mode that is left out has none. Raises ValueError with `where` in front.
    """
    if isinstance(value, str) and value in PRESETS:
        return PRESETS[value]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise ValueError(f"{where}: found {value!r}, expected JSON or one of {', '.join(PRESETS)}.") from None
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: found {value!r}, expected settings by mode.")
    return {Mode.parse(mode): _defaults(settings, f"{where}.{mode}") for mode, settings in value.items()}


def _defaults(settings: Any, where: str) -> SamplingDefaults:
    if isinstance(settings, SamplingDefaults):
        return settings
    known = [each.name for each in fields(SamplingDefaults)]
    if not isinstance(settings, Mapping) or set(settings) - {*known}:
        raise ValueError(f"{where}: found {settings!r}, expected some of {', '.join(known)}.")
    try:
        return SamplingDefaults(**settings)
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from None


def set_generation_defaults(
    model: PreTrainedModel,
    defaults: str | Mapping[Any, Any] = "qwen3",
    *,
    default_mode: Mode | str = Mode.THINKING,
) -> None:
    """Store how each mode samples in `model.generation_config`, which is saved and exported with the model.

    defaults: a preset ("qwen3"), or settings by mode; see `parse_generation_defaults`. `reply`, `replies`,
    `stream_reply` and `thinkfusion chat` take what they are not told from there. Servers know one set of defaults:
    they are given those of `default_mode`, and a client sends those of the other mode with its requests.

    Raises ValueError for settings that cannot be, or a model that does not generate.
    """
    from transformers import GenerationConfig

    parsed = parse_generation_defaults(defaults)
    if hasattr(model, "get_base_model"):  # peft would keep it on its wrapper
        model = model.get_base_model()
    if model.generation_config is None:
        raise ValueError(f"set_generation_defaults: found {type(model).__name__}, which has no generation_config.")
    # A config that was derived from the model's would lose what transformers does not know when it is read again.
    settings = {**model.generation_config.to_dict(), KEY: {mode.value: asdict(each) for mode, each in parsed.items()}}
    settings.pop("_from_model_config", None)
    served = parsed.get(Mode.parse(default_mode))
    if served is not None and served.temperature > 0:
        settings |= {"do_sample": True, **asdict(served)}
    elif served is not None:
        settings |= {"do_sample": False, **dict.fromkeys(asdict(served))}
    model.generation_config = GenerationConfig(**settings)


def generation_defaults(model: PreTrainedModel) -> dict[Mode, SamplingDefaults]:
    """How each mode samples by default, as stored with the checkpoint; empty if nothing is."""
    stored = getattr(getattr(model, "generation_config", None), KEY, None)
    return parse_generation_defaults(stored, f"generation_config.{KEY}")
