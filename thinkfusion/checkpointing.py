# SPDX-License-Identifier: Apache-2.0
"""Loading checkpoints: pinned to a commit, from safetensors alone, with errors that say what is missing.

transformers fills a weight that a checkpoint lacks with random numbers and goes on; here that is an error.
"""

from __future__ import annotations

import json
import logging
import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkfusion.chat_templates import add_embedding_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TINY_BASE = "tiny-base"
"""The name under which recipes know the embedded base checkpoint."""
COMMIT = re.compile(r"[0-9a-f]{40}")
_SHOWN = 6


def tiny_base_path() -> Path:
    """The folder of the embedded base checkpoint (`recipes/tiny_base.py` makes it)."""
    return Path(__file__).parent / "tiny_base"


def load_checkpoint(
    name: str | Path, *, dtype: str = "auto", revision: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer from a folder or the Hub; `tiny-base` is the embedded base.

    A folder with a LoRA adapter is loaded onto its base (of the commit that the adapter names) and merged.

    revision: a branch, tag or commit of a Hub repository. It is resolved to a commit once, so that the model and the
    tokenizer are of one; the commit is logged, and kept in `model.config._commit_hash`.
    trust_remote_code: run Python code that comes with the checkpoint; from the Hub only at a given commit.

    Raises FileNotFoundError if there is no such checkpoint, or only a part of one; ValueError if it is not a causal
    language model that this transformers knows, if its weights are those of another architecture than its
    config.json names, if an adapter does not fit its base, for a revision of a folder, and for remote code from the
    Hub without a commit. Each in one sentence or two.
    """
    folder = tiny_base_path() if str(name) == TINY_BASE else Path(name)
    source = str(folder)
    if folder.exists():
        if revision is not None:
            raise ValueError(f"{name}: this is a folder, and revision={revision!r} is for the Hub. Leave it out.")
        adapter = check_folder(folder)
    elif folder.is_absolute() or str(name).startswith(".") or len(folder.parts) != 2:
        raise FileNotFoundError(f"{name}: there is no such checkpoint folder.")
    else:
        adapter = False
        if trust_remote_code and not COMMIT.fullmatch(revision or ""):
            raise ValueError(
                f"{name}: trust_remote_code runs whatever the repository holds, so it needs revision= with a commit "
                f"(40 hexadecimal digits) that you have read; found {revision!r}."
            )
        revision = _commit(source, revision, trust_remote_code)
    with _plain_errors(str(name)):
        tokenizer = _load_tokenizer(source, revision, trust_remote_code)
        if adapter:
            return _load_with_adapter(folder, tokenizer, dtype, trust_remote_code), tokenizer
        return _load_model(source, dtype, revision, trust_remote_code), tokenizer


def checkpoint_to_train(
    model: PreTrainedModel | str, tokenizer: PreTrainedTokenizerBase | None, *, narrow: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A trainer's model and tokenizer; those of a name are loaded, and a tokenizer that was given goes before.

    narrow: keep a checkpoint's own precision, since adapters alone train; else weights are float32, whatever
    precision they are multiplied in.

    Raises ValueError for a model without a tokenizer, and as `load_checkpoint`.
    """
    if isinstance(model, str):
        model, loaded = load_checkpoint(model, dtype="auto" if narrow else "float32")
        tokenizer = tokenizer or loaded
    if tokenizer is None:
        raise ValueError("processing_class: missing; give the tokenizer of the model.")
    return model, tokenizer


def _commit(source: str, revision: str | None, trust_remote_code: bool) -> str | None:
    """The commit that a branch or tag of a Hub repository stands for now."""
    from transformers import AutoConfig

    with _plain_errors(source):
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    commit = getattr(config, "_commit_hash", None)
    logger.info("%s: commit %s", source, commit)
    return commit or revision


@contextmanager
def _plain_errors(name: str) -> Iterator[None]:
    """Turn the errors of loading into those of `load_checkpoint`."""
    from safetensors import SafetensorError

    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: {error}") from None
    except OSError as error:
        raise FileNotFoundError(
            f"{name}: could not be loaded ({_first_line(error)}). Check the name and the revision, run `hf auth login` "
            "if it is private, or name a local folder."
        ) from None
    except SafetensorError as error:
        raise FileNotFoundError(
            f"{name}: its weights cannot be read ({_first_line(error)}); the file is damaged or only half there. Copy "
            "it again."
        ) from None
    except _ArchitectureError as error:
        raise ValueError(f"{name}: {error}") from None
    except (ValueError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"{name}: this is not a causal language model that the installed transformers can load "
            f"({_first_line(error)})."
        ) from error


class _ArchitectureError(ValueError):
    pass


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


def _load_tokenizer(source: str, revision: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        source, revision=revision or "main", trust_remote_code=trust_remote_code
    )
    return loaded


def _load_model(source: str, dtype: str, revision: str | None, trust_remote_code: bool) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=dtype,
        revision=revision or "main",
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # so that they are named below
        output_loading_info=True,
    )
    _check_loaded(model, info)
    return model


def _check_loaded(model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Raise if weights were missing or of other shapes; transformers would have drawn them at random."""
    faults = []
    if info["mismatched_keys"]:
        name, found, expected = sorted(info["mismatched_keys"])[0]
        faults.append(
            f"{len(info['mismatched_keys'])} weights have other shapes ({name}: found {_shape(found)}, expected "
            f"{_shape(expected)})"
        )
    if info["missing_keys"]:
        faults.append(f"{len(info['missing_keys'])} weights are missing ({_some(info['missing_keys'])})")
    unused = f"{len(info['unexpected_keys'])} weights have no place in it ({_some(info['unexpected_keys'])})"
    if faults:
        faults += [unused] if info["unexpected_keys"] else []
        raise _ArchitectureError(
            f"the weights are not those of {type(model).__name__} ({model.config.model_type}), which config.json "
            f"names: {'; '.join(faults)}. Give it the config.json that it was saved with, or the whole checkpoint."
        )
    if info["unexpected_keys"]:
        logger.warning("%s: %s; they are left out.", type(model).__name__, unused)


def _shape(shape: Any) -> str:
    return " x ".join(map(str, shape))


def _some(names: Any) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:_SHOWN]) + (", …" if len(ordered) > _SHOWN else "")


def _load_with_adapter(
    folder: Path, tokenizer: PreTrainedTokenizerBase, dtype: str, trust_remote_code: bool
) -> PreTrainedModel:
    """The base that the adapter in `folder` names, with the rows of new tokens, the adapter merged into it."""
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from safetensors import safe_open
    from transformers import GenerationConfig

    described = PeftConfig.from_pretrained(str(folder))
    base = described.base_model_name_or_path
    if not base:
        raise _ArchitectureError("adapter_config.json names no base_model_name_or_path; write the base's name there.")
    model, old_tokenizer = load_checkpoint(
        base, dtype=dtype, revision=described.revision, trust_remote_code=trust_remote_code
    )
    add_rows(model, tokenizer, len(old_tokenizer))
    try:
        adapted = PeftModel.from_pretrained(model, str(folder))
    except (ValueError, RuntimeError, IndexError, KeyError) as error:
        detail = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), _first_line(error))
        raise _ArchitectureError(
            f"the adapter does not fit its base {base} ({type(model).__name__}): {detail}. Name the base that it was "
            "trained on in adapter_config.json."
        ) from None
    with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
        missing = set(get_peft_model_state_dict(adapted, save_embedding_layers=False)) - set(weights.keys())
    if missing:
        raise _ArchitectureError(
            f"the adapter does not fit its base {base} ({type(model).__name__}): {len(missing)} of its weights are "
            f"missing ({_some(missing)})."
        )
    merged: PreTrainedModel = adapted.merge_and_unload()
    if (folder / "generation_config.json").is_file():
        merged.generation_config = GenerationConfig.from_pretrained(folder)
    return merged


def add_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, old_size: int) -> None:
    """Give `model` embedding rows for tokens that its own tokenizer, of `old_size` tokens, did not have.

    They are those that `install_chat_template` gave it before training; the trained ones follow with the adapter.
    """
    if len(tokenizer) > old_size:
        add_embedding_rows(model, tokenizer, list(range(old_size, len(tokenizer))), old_size)


def check_folder(folder: Path) -> bool:
    """Raise FileNotFoundError if `folder` holds no whole checkpoint; whether it is an adapter."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: this is a file; name the folder of a checkpoint.")
    adapter = (folder / "adapter_config.json").is_file()
    kind, stem = ("an adapter", "adapter_model") if adapter else ("a checkpoint", "pytorch_model")
    needed = ["adapter_model.safetensors"] if adapter else ["config.json", *_shards(folder)]
    missing = [name for name in needed if not (folder / name).is_file()]
    if not adapter and not any(folder.glob("*.safetensors")):
        missing.append("weights")
    if not missing:
        return adapter
    found = sorted(path.name for path in folder.iterdir())
    pickled = [name for name in found if name.startswith(stem) and name.endswith((".bin", ".pt"))]
    if pickled:
        raise FileNotFoundError(
            f"{folder}: its weights are pickled ({_some(pickled)}), and a pickle can run anything when it is read. "
            "Convert them to safetensors."
        )
    raise FileNotFoundError(
        f"{folder}: this is not {kind}: {' and '.join(missing)} missing. The folder holds {_some(found) or 'nothing'}."
    )


def _shards(folder: Path) -> list[str]:
    """The files that the index of a checkpoint in several parts names, if there is one."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise FileNotFoundError(f"{index}: names {_some(outside)}, which is outside the folder.")
    return names
