# SPDX-License-Identifier: Apache-2.0
"""What the files in a checkpoint's folder tell of it: architecture, template, base, recipe, rows, measurement.

Nothing is guessed: what no file tells is None or empty, and the model card says that it is not known. Names of local
files and folders are cut to their last part, so that no path of a machine leaves it.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from thinkfusion.chat_templates import template_marks
from thinkfusion.checkpointing import TINY_BASE
from thinkfusion.digests import weight_files, weights_digest
from thinkfusion.modes import Mode
from thinkfusion.reporting import REPORT_NAME
from thinkfusion.row_report import RowReport

RECIPE = "recipe.json"
ROWS = "row_report.json"
FUSION = "fusion.json"
ARGUMENTS = "training_args.json"
ADAPTER = "adapter_config.json"
_DATA_FILE = re.compile(r"\.(jsonl?|ndjson|csv|tsv|parquet|txt|gz|zst|arrow)$")
_MORE_SETTINGS = (
    *("scheme", "default_mode", "dialect", "max_length", "train_router", "train_experts", "train_shared_experts"),
    *("train_attention", "train_embeddings", "control_token_init"),
)
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Origin:
    """A model or data set that something was made from: its Hub id, or the last part of a local name."""

    name: str
    on_hub: bool = False
    revision: str | None = None

    @classmethod
    def of(cls, given: str, revision: str | None = None) -> Origin:
        """The origin that `given` names, a path or a Hub id (of data also `owner/name:subset`)."""
        on_hub = is_hub_id(given)
        return cls(given.partition(":")[0] if on_hub else last_part(given), on_hub, revision if on_hub else None)


def is_hub_id(name: str) -> bool:
    """Whether `name` is nothing on this disk and has the form of a Hub id, `owner/name`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    repository = name.partition(":")[0]
    if repository.count("/") != 1 or _DATA_FILE.search(repository) or Path(name).exists():
        return False
    try:
        validate_repo_id(repository)
    except HFValidationError:
        return False
    return True


def last_part(name: str) -> str:
    """The last part of a path of any system; a name that is none as it is."""
    return PureWindowsPath(PurePosixPath(name).name).name or name


def is_path(text: str) -> bool:
    """Whether `text` is an absolute path of some machine, or one in a home folder."""
    return text.startswith(("/", "~", "\\\\")) or re.match(r"[A-Za-z]:[\\/]", text) is not None


@dataclass(frozen=True)
class CheckpointFacts:
    """What the files in a checkpoint's folder tell; empty or None where they tell nothing.

    parameters: values in the weights' files, by their type as safetensors names it.
    bases: what it was made from. relation: how, as the Hub names it: "finetune", "adapter", "merge".
    rows: totals of the row report. recipe: `recipe.json`, or the settings alone. report: `mode_report.json`.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, int] = field(default_factory=dict)
    adapter: bool = False
    dialect: str | None = None
    scheme: str | None = None
    default_mode: Mode | None = None
    bases: tuple[Origin, ...] = ()
    relation: str | None = None
    data: tuple[Origin, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[str, Any] | None = None
    fusion: Mapping[str, Any] | None = None
    report: Mapping[str, Any] | None = None

    @property
    def languages(self) -> list[str]:
        """ISO 639 codes of the languages that training rows are in; none where of some only the script is known."""
        records = ((self.rows or {}).get("account") or {}).get("by") or ()
        found = {str(record["language"]) for record in records if record.get("rows_after", 1)}
        known = all(re.fullmatch(r"[a-z]{2,3}", code) and code != "und" for code in found)
        return sorted(found) if known else []


def read_facts(
    folder: str | Path, *, report: Mapping[str, Any] | None = None, base_model: str | None = None
) -> CheckpointFacts:
    """What the files in `folder` tell. `base_model` is the base's Hub id, where the files do not know it.

    Raises ValueError for a file that cannot be read, or a weights file that was cut.
    """
    folder = Path(folder)
    adapter = read_json(folder / ADAPTER)
    recipe = read_json(folder / RECIPE) or _settings_alone(folder)
    fusion = read_json(folder / FUSION)
    bases = (Origin(base_model, on_hub=True),) if base_model else _bases(adapter, recipe, fusion)
    relation = "adapter" if adapter else "merge" if fusion else "finetune" if recipe else None
    template = folder / "chat_template.jinja"
    marks = template_marks(template.read_text(encoding="utf-8")) if template.is_file() else None
    dialect, scheme, default = marks or (None, None, None)
    return CheckpointFacts(
        config=read_json(folder / "config.json") or {},
        parameters=_parameters(weight_files(folder)),
        adapter=adapter is not None,
        dialect=dialect,
        scheme=scheme,
        default_mode=default,
        bases=bases,
        relation=relation,
        data=tuple(Origin(each["name"], bool(each["on_hub"])) for each in (recipe or {}).get("datasets", ())),
        recipe=recipe or {},
        rows=_row_totals(folder / ROWS),
        fusion=fusion,
        report=report,
    )


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None if there is no file; ValueError if it holds something else."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: found no JSON ({error}). Write the file again, or remove it.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: found a {type(found).__name__}, expected a JSON object. Write the file again.")
    return found


def measured_report(folder: str | Path, report: str | Path | None = None) -> dict[str, Any]:
    """The mode report of the checkpoint in `folder`, from that folder or from the file `report`.

    A report that names its weights by their digest must name these; one that does not must not be older than they are.
    Raises FileNotFoundError if there is none, ValueError if it is not one of these weights or cannot be read.
    """
    folder = Path(folder)
    path = folder / REPORT_NAME if report is None else Path(report)
    found = read_json(path)
    remedy = f"Measure it: thinkfusion evaluate {folder}. To upload it unmeasured: --without-report."
    if found is None:
        raise FileNotFoundError(
            f"{path}: there is no mode report, so it is not known whether the switch works. {remedy}"
        )
    modes = found.get("modes")
    if not isinstance(modes, dict) or not {mode.value for mode in Mode} <= set(modes) or "samples" not in found:
        raise ValueError(f"{path}: this is no mode report: found {', '.join(found)}. {remedy}")
    weights = found.get("weights")
    if weights is not None:
        if weights != weights_digest(folder):
            raise ValueError(f"{path}: these are not the weights that were measured; they changed since. {remedy}")
    elif path.stat().st_mtime < max((each.stat().st_mtime for each in weight_files(folder)), default=0.0):
        raise ValueError(f"{path}: it is older than the weights, so it measured others. {remedy}")
    return found


def weights_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file; ValueError if it has none, or the file is not as long as it says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        raw = file.read(length) if length <= min(size - 8, _LONGEST_HEADER) else b""
    try:
        header: dict[str, Any] = json.loads(raw)
        end = max((each["data_offsets"][1] for name, each in header.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: found no header of safetensors. Copy the file again, or export again.") from None
    if size != 8 + length + end:
        raise ValueError(f"{path}: found {size:,} bytes, expected {8 + length + end:,}; it was cut. Copy it again.")
    return header


def _parameters(files: Sequence[Path]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for path in files:
        for name, each in weights_header(path).items():
            if name != "__metadata__":
                counts[each["dtype"]] += math.prod(each["shape"])
    return dict(counts)


def _bases(
    adapter: Mapping[str, Any] | None, recipe: Mapping[str, Any] | None, fusion: Mapping[str, Any] | None
) -> tuple[Origin, ...]:
    if fusion:
        # Folders, whatever they look like; what they were trained from is in their own records, if they are there.
        named = [Path(str(fusion[name])) for name in ("thinking", "non_thinking") if fusion.get(name)]
        records = [read_json(each / RECIPE) for each in named]
        known = [base for record in records if record for base in _bases(None, record, None)]
        return tuple(dict.fromkeys(known if len(known) == len(named) else [Origin(last_part(str(n))) for n in named]))
    if recipe and recipe.get("base_model"):
        return (Origin(recipe["base_model"], bool(recipe.get("base_on_hub")), recipe.get("revision")),)
    base = (adapter or {}).get("base_model_name_or_path")
    return (Origin.of(str(base), (adapter or {}).get("revision")),) if base else ()


def _row_totals(path: Path) -> dict[str, Any] | None:
    return RowReport().load(path) if path.is_file() else None


def _settings_alone(folder: Path) -> dict[str, Any] | None:
    """Settings out of the file that a trainer writes, those alone that say nothing of a machine."""
    from thinkfusion.saving import ORDER_SETTINGS, STEP_SETTINGS

    given = read_json(folder / ARGUMENTS)
    if given is None:
        return None
    return {
        "settings": {name: given[name] for name in (*STEP_SETTINGS, *ORDER_SETTINGS, *_MORE_SETTINGS) if name in given}
    }


# The record of a recipe ------------------------------------------------------------------------------------------


def save_recipe(
    directory: str | Path,
    settings: Any,
    *,
    base_model: str | None,
    method: str,
    revision: str | None = None,
    datasets: Sequence[str] = (),
    steps: int | None = None,
    control_tokens: Any = None,
) -> Path:
    """Write `recipe.json`, what a model card says of the training; returns its path.

    settings: a ThinkFusionConfig, of which what decides the result is kept, and no path, address or secret.
    base_model, datasets: paths or Hub ids; of a path the last part is kept. method: in words, "full fine-tuning".
    revision: the base's commit. steps: optimizer steps that were made. control_tokens: what was done for new control
    tokens, as a trainer's `control_tokens` has it; the settings may leave it to the trainer.
    """
    from thinkfusion.saving import ORDER_SETTINGS, STEP_SETTINGS, plain

    kept = (*STEP_SETTINGS, *ORDER_SETTINGS, *_MORE_SETTINGS)
    base = None if base_model is None else Origin.of(base_model, revision)
    data = [Origin.of(name) for name in datasets]
    treated = control_tokens and {
        "new": list(control_tokens.new),
        "learning_rate": control_tokens.learning_rate,
        "weight_from_to": [control_tokens.weight, control_tokens.last_weight],
        "end_of_turn_weight_from_to": [control_tokens.end_weight, control_tokens.last_end_weight],
    }
    record = {
        "recipe": 1,
        "base_model": base and base.name,
        "base_on_hub": bool(base and base.on_hub),
        "revision": base and base.revision,
        "method": method,
        "datasets": [{"name": each.name, "on_hub": each.on_hub} for each in data],
        "steps": steps,
        "settings": {
            name: plain(getattr(settings, name)) for name in kept if getattr(settings, name, None) is not None
        },
        "control_tokens": treated,
        "versions": {name: version(name) for name in ("thinkfusion", "transformers", "trl", "peft", "torch")},
    }
    path = Path(directory) / RECIPE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return path


def embedded(origin: Origin) -> bool:
    """Whether this is the base that comes with the package."""
    return not origin.on_hub and origin.name in (TINY_BASE, "tiny_base")
