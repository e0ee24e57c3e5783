# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness, once per mode: its tasks, with the switch given as a server is given it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkfusion.chat_templates import scheme_of
from thinkfusion.intervals import Z, wilson_interval
from thinkfusion.modes import Mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEPENDENCY = (
    "lm-eval: lm-evaluation-harness is not installed. Install it (pip install lm-eval, or the extra harness), or leave "
    "--lm-eval out."
)


def harness_tasks(names: Sequence[str]) -> tuple[Any, list[str]]:
    """The harness's task manager and the names of the tasks; a name may be the path of a task's YAML file.

    Raises ValueError if the harness is not installed or does not know a task.
    """
    if find_spec("lm_eval") is None:
        raise ValueError(DEPENDENCY)
    from lm_eval.tasks import TaskManager

    files = [Path(name) for name in names if name.endswith((".yaml", ".yml"))]
    absent = [str(path) for path in files if not path.is_file()]
    if absent:
        raise ValueError(f"lm-eval: {absent[0]}: there is no such file.")
    manager = TaskManager(include_path=[str(path.parent) for path in files] or None)
    wanted = [_task_of(Path(name)) if Path(name) in files else name for name in names]
    unknown = [name for name in wanted if not manager.match_tasks([name])]
    if unknown:
        raise ValueError(f"lm-eval: the task {unknown[0]!r} is unknown to the harness. See them with: lm-eval ls tasks")
    return manager, wanted


def _task_of(path: Path) -> str:
    """The name in a task's YAML file, whose other values may be of the harness's own kinds."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("task:"):
            return line.partition(":")[2].strip().strip("'\"")
    raise ValueError(f"lm-eval: {path}: found no line `task: NAME`, expected the YAML of one task.")


def run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 512,
    seed: int = 0,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Run tasks of the harness in both modes: `{task: {metric: {mode: value, mode_interval: [low, high]}}}`.

    Chat template and switch are those of the checkpoint; what stands before the closing token is not graded. Tasks
    have to generate: the harness has no likelihoods after a trace. The stop strings of a task end a trace too.

    Raises ValueError as `harness_tasks`.
    """
    manager, wanted = harness_tasks(names)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    closing = tokenizer.convert_tokens_to_ids(scheme_of(tokenizer).closing_token)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for mode in Mode:
        asked = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            enable_thinking=mode is Mode.THINKING,
            think_end_token=closing,
        )
        results = simple_evaluate(
            asked,
            tasks=wanted,
            task_manager=manager,
            limit=limit,
            apply_chat_template=True,
            gen_kwargs={"max_gen_toks": max_new_tokens},
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
        for task, metrics in results["results"].items():
            count = (results.get("n-samples", {}).get(task) or {}).get("effective")
            for key, value in metrics.items():
                name, _, which = key.partition(",")
                if not which or name.endswith("_stderr") or isinstance(value, (str, bool)):
                    continue
                metric = name if which == "none" else f"{name} ({which})"
                error = metrics.get(f"{name}_stderr,{which}")
                entry = found.setdefault(task, {}).setdefault(metric, {})
                entry |= {mode.value: float(value), f"{mode.value}_interval": _interval(float(value), count, error)}
    return found


def _interval(value: float, count: int | None, error: Any) -> list[float] | None:
    """Wilson's interval for a share of counted samples, else that of the harness's standard error, if it has one."""
    if count and 0 <= value <= 1 and abs(value * count - round(value * count)) < 1e-6 * count:
        return list(wilson_interval(round(value * count), count))
    return [value - Z * error, value + Z * error] if isinstance(error, float) else None
