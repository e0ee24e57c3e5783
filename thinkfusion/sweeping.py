# SPDX-License-Identifier: Apache-2.0
"""Which ratio to fuse at: each is made in memory, both modes are measured, and the best is written.

A merge that favours one mode too much breaks the other, not little by little but at a cliff: in A.X K1's account
linear merges hold to a share near 0.8 of the thinking model. Where the cliff is depends on the checkpoints.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkfusion.adapter_fusing import fuse_adapters, is_adapter
from thinkfusion.fusing import FusionOptions, fuse_checkpoints, fused_state
from thinkfusion.modes import Mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from thinkfusion.evaluation import ModeReport

logger = logging.getLogger(__name__)

RULE = (
    "fewest format errors over both modes; of those, the highest sum of the modes' accuracies; of those, the largest "
    "share of the thinking model"
)
_COLOURS = {Mode.THINKING: "#1f77a8", Mode.NON_THINKING: "#c8641a"}


@dataclass(frozen=True)
class Sweep:
    """The modes' figures at each ratio, in ascending order of the ratio."""

    reports: Mapping[float, ModeReport]

    @property
    def best(self) -> float:
        """The ratio that `RULE` picks."""

        def rank(ratio: float) -> tuple[float, float, float]:
            modes = self.reports[ratio].modes.values()
            errors = sum(mode["format_error"] or 0.0 for mode in modes)
            return errors, -sum(mode["accuracy"] or 0.0 for mode in modes), -ratio

        return min(self.reports, key=rank)

    def to_dict(self) -> dict[str, Any]:
        """The winner, the rule, and what was measured at each ratio."""
        points = [{"ratio": ratio, "modes": report.modes} for ratio, report in self.reports.items()]
        return {"best": self.best, "rule": RULE, "points": points}

    def __str__(self) -> str:
        lines = ["ratio   format error (think / non)   accuracy (think / non)"]
        for ratio, report in self.reports.items():
            modes = [report.modes[mode.value] for mode in Mode]
            errors, marks = ([_percent(mode[name]) for mode in modes] for name in ("format_error", "accuracy"))
            chosen = "  best" if ratio == self.best else ""
            lines.append(f"{ratio:5.3g}   {' / '.join(errors):>26}   {' / '.join(marks):>22}{chosen}")
        return "\n".join([*lines, f"best: {RULE}."])


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def ratios_of(text: str) -> list[float]:
    """The ratios of `BEGIN:END:STEP`, both ends included, ascending.

    Raises ValueError unless there are at least two, all from 0 to 1.
    """
    try:
        begin, end, step = (float(part) for part in text.split(":"))
    except ValueError:
        raise ValueError(f"sweep: found {text!r}, expected BEGIN:END:STEP, such as 0:1:0.1.") from None
    if not (0 <= begin < end <= 1 and 0 < step <= end - begin):
        raise ValueError(f"sweep: found {text!r}, expected shares of the thinking model from 0 to 1, such as 0:1:0.1.")
    count = int((end - begin) / step + 1e-6) + 1
    return [round(begin + step * index, 10) for index in range(count)]


def sweep_ratios(
    thinking: str | Path,
    non_thinking: str | Path,
    ratios: Sequence[float],
    options: FusionOptions | None = None,
    *,
    base: str | Path | None = None,
    texts_from: str = "thinking",
    device: str = "cpu",
    **evaluation: Any,
) -> Sweep:
    """Measure both modes at each ratio; `evaluation` is what `evaluate_modes` takes.

    Checkpoints or adapters, as `fuse_checkpoints` and `fuse_adapters` take them; the fused weights and a model are in
    memory at a time. Raises as those do, and ValueError for checkpoints whose template has no switch.
    """
    from transformers import AutoTokenizer

    from thinkfusion.checkpointing import load_checkpoint
    from thinkfusion.evaluation import evaluate_modes

    options, adapters = options or FusionOptions(), is_adapter(thinking)
    tokenizer = AutoTokenizer.from_pretrained(thinking if texts_from == "thinking" else non_thinking)
    reports = {}
    for ratio in sorted(ratios):
        if adapters:
            with tempfile.TemporaryDirectory() as folder:
                model, _ = load_checkpoint(fuse_adapters(thinking, non_thinking, folder, ratio))
        else:
            model = fused_model(thinking, non_thinking, replace(options, ratio=ratio), base=base)
        reports[ratio] = evaluate_modes(model.to(device), tokenizer, **evaluation)
        del model
        logger.info("ratio %g: %s", ratio, {name: mode["format_error"] for name, mode in reports[ratio].modes.items()})
    return Sweep(reports)


def fused_model(
    thinking: str | Path, non_thinking: str | Path, options: FusionOptions, *, base: str | Path | None = None
) -> PreTrainedModel:
    """The model of `fuse_checkpoints`, without a file."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(thinking)
    state = fused_state(thinking, non_thinking, options, base=base)
    # The class itself: the automatic one wants a folder's name.
    model, found = AutoModelForCausalLM._model_mapping[type(config)].from_pretrained(
        None, config=config, state_dict=state, dtype="auto", output_loading_info=True
    )
    if found["missing_keys"] or found["mismatched_keys"]:
        raise ValueError(f"{thinking}: weights are missing: {sorted(found['missing_keys'])[:3]}. Copy it again.")
    fused: PreTrainedModel = model.eval()
    return fused


def sweep_and_fuse(
    thinking: str | Path,
    non_thinking: str | Path,
    directory: str | Path,
    ratios: Sequence[float],
    options: FusionOptions | None = None,
    *,
    base: str | Path | None = None,
    texts_from: str = "thinking",
    device: str = "cpu",
    **evaluation: Any,
) -> Sweep:
    """`sweep_ratios`, then the winner's checkpoint into `directory`.

    Beside it `sweep.json`, `sweep.png` (matplotlib), and the winner's `mode_report.json` and `replies.jsonl`.
    """
    from thinkfusion.reporting import save_report

    options = options or FusionOptions()
    found = sweep_ratios(
        thinking, non_thinking, ratios, options, base=base, texts_from=texts_from, device=device, **evaluation
    )
    if is_adapter(thinking):
        fuse_adapters(thinking, non_thinking, directory, found.best, texts_from=texts_from)
    else:
        fuse_checkpoints(
            thinking, non_thinking, directory, replace(options, ratio=found.best), base=base, texts_from=texts_from
        )
    folder = Path(directory)
    (folder / "sweep.json").write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
    draw_sweep(found, folder / "sweep.png")
    save_report(found.reports[found.best], folder, checkpoint=folder)
    return found


def draw_sweep(found: Sweep, path: str | Path) -> None:
    """Format error and accuracy of each mode against the ratio, with 95 % intervals, as a picture.

    Raises ValueError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("sweep.png: matplotlib is not installed. Install thinkfusion[plots].") from None
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    ratios = list(found.reports)
    for panel, name, title in zip(panels, ("format_error", "accuracy"), ("format errors", "accuracy"), strict=True):
        for mode in Mode:
            figures = [found.reports[ratio].modes[mode.value] for ratio in ratios]
            if any(each[name] is None for each in figures):
                continue
            values = [100 * each[name] for each in figures]
            low, high = zip(*([100 * end for end in each[f"{name}_interval"]] for each in figures), strict=True)
            label = mode.value.replace("_", "-")
            panel.fill_between(ratios, low, high, color=_COLOURS[mode], alpha=0.18, linewidth=0)
            panel.plot(ratios, values, color=_COLOURS[mode], marker="o", markersize=3.5, label=label)
        panel.axvline(found.best, color="#666666", linewidth=0.8, linestyle=":")
        panel.set(title=title, xlabel="share of the thinking model", ylabel="%", ylim=(-2, 102))
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    if panels[0].lines[:-1]:
        panels[0].legend(frameon=False)
    figure.suptitle(f"Fused at {found.best:g}: {RULE.split(';', maxsplit=1)[0]}", fontsize=10, color="#555555")
    figure.savefig(path, dpi=140)
