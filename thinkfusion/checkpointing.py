# SPDX-License-Identifier: Apache-2.0
"""Loading checkpoints with errors that say what is missing, and writing finished ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TINY_BASE = "tiny-base"
"""The name under which recipes know the embedded base checkpoint."""


def tiny_base_path() -> Path:
    """The folder of the embedded base checkpoint (`recipes/tiny_base.py` makes it)."""
    return Path(__file__).parent / "tiny_base"


def load_checkpoint(
    name: str | Path, *, dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer from a folder or the Hub; `tiny-base` is the embedded base.

    A folder with a LoRA adapter is loaded onto its base and merged. Raises FileNotFoundError, in one sentence, if
    there is no such checkpoint.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_base_path() if str(name) == TINY_BASE else Path(name)
    adapter = (folder / "adapter_config.json").is_file()
    if folder.exists():
        _check_folder(folder, adapter)
    elif folder.is_absolute() or str(name).startswith(".") or len(folder.parts) != 2:
        raise FileNotFoundError(f"{name}: there is no such checkpoint folder.")
    source = str(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        if adapter:
            from peft import AutoPeftModelForCausalLM

            model = AutoPeftModelForCausalLM.from_pretrained(source, dtype=dtype).merge_and_unload()
        else:
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=trust_remote_code)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{name}: could not be loaded ({reason}). Check the name, run `hf auth login` if it is private, or name a "
            "local folder."
        ) from None
    return model, tokenizer


def _check_folder(folder: Path, adapter: bool) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: this is a file; name the folder of a checkpoint.")
    if adapter:
        return
    has_weights = any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    missing = [
        name
        for name, there in (("config.json", (folder / "config.json").is_file()), ("weights", has_weights))
        if not there
    ]
    if missing:
        found = sorted(path.name for path in folder.iterdir())
        shown = ", ".join(found[:8]) + (", …" if len(found) > 8 else "") or "nothing"
        raise FileNotFoundError(
            f"{folder}: this is not a checkpoint: {' and '.join(missing)} missing. The folder holds {shown}."
        )


def export_checkpoint(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str | Path, *, dtype: str | None = None
) -> Path:
    """Write a checkpoint that `from_pretrained` and servers load: weights as safetensors, tokenizer, template.

    A model with LoRA adapters is merged into full weights first (in place), since servers' support of adapters on
    experts is not reliable. `dtype` ("bfloat16", …) is that of the weights written; by default they are as they are.
    """
    import torch

    folder = Path(directory)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    if dtype is not None:
        model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
