# SPDX-License-Identifier: Apache-2.0
"""A trained model, out again: merged, checked, and written as `from_pretrained` and servers expect it.

What transformers saves is not always what a server reads: settings that transformers knows by heart are missing from
config.json, settings of training are in it, and names changed between transformers 4, which many servers still use,
and 5. `server_settings` holds what was found so. Nothing is written under its final name before it was loaded back.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from errno import ENOSPC
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from thinkfusion.checkpointing import TINY_BASE, load_checkpoint, tiny_base_path
from thinkfusion.quantising import dequantise, is_quantised

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
_PROBE_SHAPE = (2, 32)
_FLOAT32_NAMES = ("e_score_correction_bias", "expert_bias")
"""Corrections of the routers' scores: steps of 0.001 near 1 that 16 bits would swallow; released in float32."""
_STALE = (
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "adapter_model*", "adapter_config.json"),
    *("config.json", "generation_config.json", "chat_template.*", "additional_chat_templates", "tokenizer*"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
)
"""What an earlier checkpoint in the same folder may have left that would be read beside the new one."""


class Tolerance(NamedTuple):
    """How far logits may be from those expected; see `difference`."""

    quantile: float
    """Of the positions, since in 16 bits single tokens may go to another expert."""
    limit: float


_TOLERANCES = {
    "float64": Tolerance(1.0, 1e-6),
    "float32": Tolerance(1.0, 1e-3),
    "float16": Tolerance(0.5, 0.03),
    "bfloat16": Tolerance(0.5, 0.1),
}


def export_checkpoint(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
    *,
    dtype: str | None = None,
    adapters_only: bool = False,
    check: bool = True,
    max_shard_size: str = "5GB",
) -> Path:
    """Write a checkpoint that `from_pretrained` and servers load: safetensors, configs, tokenizer, template.

    A model with LoRA adapters is merged into full weights first (in place: experts, routers and the rows of control
    tokens included), since servers' support of adapters on experts is not reliable. With `adapters_only` the adapters
    alone are written; `load_checkpoint` puts them onto their base.

    A model in 4 bits (`thinkfusion.quantising`) is made whole first, on the CPU: adapters are merged into the weights
    that they were trained on, which differ from those of the base by what 4 bits cannot tell. To have them on the
    base's own weights, write `adapters_only` and load that folder; its logits are others, and are not compared.

    dtype: of the weights written, "float32", "bfloat16" or "float16"; by default they are as they are. The model in
    memory keeps its own. Correction biases of routers stay in float32.
    check: compare logits before and after merging, and with those of the written checkpoint, loaded back. The last
    needs memory for a second model, and is left to names and shapes where there is none.

    All is written to a temporary folder in `directory` and then moved; other files in `directory` stay. Returns it.
    Raises ValueError if the merged or written model gives other logits, for a dtype that is unknown or too narrow, for
    `adapters_only` without adapters, and for a quantised base; OSError if the disk is full. Until the last moment an
    earlier checkpoint in `directory` stays as it was.
    """
    folder = Path(directory)
    model = _unwrapped(model)
    adapted = hasattr(model, "merge_and_unload")
    _check_request(model, folder, dtype, adapters_only=adapters_only, adapted=adapted)
    quantised = is_quantised(model)
    if check and quantised and adapters_only:
        logger.warning("The base is in 4 bits here and is loaded in full there: the adapters' logits are not compared.")
        check = False
    probe = _probe_ids(model, tokenizer) if check else None
    before = None if probe is None else logits_of(model, probe)
    if quantised and not adapters_only:
        dequantise(model)
    if adapted and not adapters_only:
        model = model.merge_and_unload()
        if probe is not None and before is not None:
            _compare(before, logits_of(model, probe), _dtype_name(model), "merging the adapters changed the model")
    with temporary_folder(folder) as temporary:
        if adapters_only:
            _write_adapters(model, temporary)
            _write_generation(model.get_base_model(), tokenizer, temporary)
        else:
            _write_model(model, tokenizer, temporary, dtype, max_shard_size)
        _write_tokenizer(tokenizer, temporary)
        if probe is not None and before is not None:
            written_dtype = dtype or _dtype_name(model)
            _check_written(model, tokenizer, temporary, probe=probe, expected=before, dtype=written_dtype)
        publish(temporary, folder)
    return folder


def _unwrapped(model: Any) -> Any:
    """The model inside DistributedDataParallel or torch.compile."""
    while hasattr(model, "_orig_mod") or type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def _check_request(model: Any, folder: Path, dtype: str | None, *, adapters_only: bool, adapted: bool) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r} is unknown; choose one of {', '.join(DTYPES)}.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: this is a file; name a folder to write the checkpoint to.")
    if adapters_only and not adapted:
        raise ValueError(
            f"adapters_only: found {type(model).__name__}, which has no adapters. Leave it out to write full weights."
        )
    if adapters_only and dtype is not None:
        raise ValueError("dtype: adapters are written as they are; leave out one of dtype and adapters_only.")
    if adapters_only and not model.peft_config[model.active_adapter].base_model_name_or_path:
        raise ValueError(
            "adapters_only: the base was not loaded from anywhere, so no one could put the adapters onto it again. "
            "Leave it out to write full weights."
        )
    quantised = getattr(getattr(model, "config", None), "quantization_config", None)
    if quantised is not None and not adapters_only:
        method = getattr(quantised, "quant_method", None) or dict(quantised).get("quant_method")
        raise ValueError(
            f"export_checkpoint: the base is quantised ({getattr(method, 'value', method)}), and merging into it would "
            "round the adapters away. Export with adapters_only=True, then load that folder with load_checkpoint, "
            "which takes the base in full precision, and export the result."
        )


# Logits before and after


def _probe_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Token ids that are the same in every run, (2, 32), the tokenizer's own added tokens among them."""
    import torch

    rows = model.get_input_embeddings().weight.shape[0]
    length = min(_PROBE_SHAPE[1], getattr(model.config.get_text_config(), "max_position_embeddings", _PROBE_SHAPE[1]))
    drawn = torch.randint(
        min(rows, len(tokenizer)), (_PROBE_SHAPE[0], length), generator=torch.Generator().manual_seed(0)
    )
    added = sorted(index for index in tokenizer.get_added_vocab().values() if index < rows)[-(length // 2) :]
    drawn[:, 1 : 2 * len(added) : 2] = torch.tensor(added, dtype=torch.long)
    return drawn


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits as the model gives them in its own precision, (batch, length, vocabulary), float32 on the CPU."""
    import torch

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    # accelerate wraps the forward of a prepared model in autocast, which would hide what merging does.
    forward = vars(inner).get("_original_forward", inner)
    modes = [(module, module.training) for module in inner.modules()]
    asked = getattr(inner.config, "output_router_logits", None)
    inner.eval()
    try:
        if asked:
            inner.config.output_router_logits = False
        with torch.no_grad():
            ids = ids.to(inner.get_input_embeddings().weight.device)
            logits: torch.Tensor = forward(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    finally:
        if asked:
            inner.config.output_router_logits = asked
        for module, training in modes:
            module.training = training
    return logits.float().cpu()


def difference(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """How far logits are off at each position, (batch, length): the root of the mean square, in the expected spread."""
    spread = expected.std(dim=-1).clamp_min(1e-6)
    return (found - expected).pow(2).mean(dim=-1).sqrt() / spread


def _compare(expected: torch.Tensor, found: torch.Tensor, dtype: str, what: str) -> None:
    tolerance = _TOLERANCES[dtype]
    width = min(expected.shape[-1], found.shape[-1])
    off = difference(found[..., :width], expected[..., :width]).flatten().float()
    worst = float(off.quantile(tolerance.quantile)) if bool(off.isfinite().all()) else float("nan")
    if not worst <= tolerance.limit:
        kind = "largest" if tolerance.quantile == 1 else "median"
        raise ValueError(
            f"export_checkpoint: {what}: the {kind} difference of the logits is {worst:.2g} of their spread, expected "
            f"at most {tolerance.limit:g} in {dtype}. Nothing was written; train again with an adapter that merges, or "
            "export with adapters_only=True."
        )
    logger.info("%s: no (difference of the logits %.1e of their spread).", what, worst)


def _dtype_name(model: Any) -> str:
    name = str(model.dtype).removeprefix("torch.")
    return name if name in _TOLERANCES else "bfloat16"


# Writing


@contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """A folder in `folder`, so that it is on the same disk; gone in the end, and so is `folder` if it was made."""
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".export-", dir=folder))
    try:
        yield temporary
    except OSError as error:
        if error.errno != ENOSPC and "No space left" not in str(error):
            raise
        free = shutil.disk_usage(folder).free
        raise OSError(
            ENOSPC,
            f"{folder}: the disk is full ({free / 2**30:.1f} GiB free with what was written). Nothing was exported, "
            "and an earlier checkpoint there is as it was. Free some space, or export to another disk",
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if made and not any(folder.iterdir()):
            folder.rmdir()


def _write_model(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: str | None, max_shard_size: str
) -> None:
    weights = _weights(model, dtype)
    needed, free = sum(each.numel() * each.element_size() for each in weights.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(ENOSPC, f"No space left: {needed / 2**30:.1f} GiB are needed")
    _mend_generation(model, tokenizer)
    model.save_pretrained(folder, state_dict=weights, max_shard_size=max_shard_size)
    path = folder / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings |= server_settings(settings, getattr(model.config, "attribute_map", {}), set(weights))
    settings["dtype"] = settings["torch_dtype"] = dtype or settings.get("dtype") or _dtype_name(model)
    _write_json(path, settings)


def _weights(model: Any, dtype: str | None) -> dict[str, torch.Tensor]:
    """The weights to write, in `dtype`, tied ones once; with what servers want and transformers leaves out."""
    import torch

    wanted = None if dtype is None else getattr(torch, dtype)
    kept = {*_FLOAT32_NAMES, *(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    cast: dict[tuple[Any, ...], torch.Tensor] = {}
    weights = {name: weight.detach() for name, weight in model.state_dict().items()}
    for name, weight in weights.items():
        if wanted is None or not weight.is_floating_point() or weight.dtype == wanted or kept & {*name.split(".")}:
            continue
        place = (weight.data_ptr(), weight.shape, weight.stride())
        if place not in cast:
            cast[place] = weight.to("cpu", wanted)
            if not bool(cast[place].isfinite().all()) and bool(weight.isfinite().all()):
                raise ValueError(
                    f"dtype: {dtype} cannot hold {name}, whose largest value is {float(weight.abs().max()):.3g}. "
                    "Use bfloat16 or float32."
                )
        weights[name] = cast[place]
    return weights | _unwritten_norms(model, weights)


def _unwritten_norms(model: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A.X K1's released checkpoints have a norm after every MLP, and vLLM loads one for each layer.

    In dense layers it is not used; transformers drops it at loading, so that it must be put back: ones.
    """
    import torch

    if model.config.model_type != "axk1":
        return {}
    layers = model.config.num_hidden_layers
    prefix = f"{model.base_model_prefix}.layers"
    like = weights[f"{prefix}.0.input_layernorm.weight"]
    return {
        f"{prefix}.{index}.post_mlp_layernorm.weight": torch.ones_like(like)
        for index in range(layers)
        if f"{prefix}.{index}.mlp.post_mlp_layernorm.weight" not in weights
    }


_GROUPED_SIGMOID = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}
_FAMILY_SETTINGS: dict[str, dict[str, Any]] = {
    "axk1": _GROUPED_SIGMOID,
    "axk2": _GROUPED_SIGMOID,
    "deepseek_v2": {"scoring_func": "softmax", "moe_layer_freq": 1},
    "deepseek_v3": _GROUPED_SIGMOID,
    "dots1": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1},
    "minimax_m2": {"scoring_func": "sigmoid", "use_routing_bias": True, "use_qk_norm": True},
    "afmoe": {"n_group": 1, "topk_group": 1, "score_func": "sigmoid", "route_norm": True},
    "bailing_hybrid": {"score_function": "sigmoid", "moe_router_enable_expert_bias": True, "use_bias": False},
}
"""What the family's released config.json says, servers read, and transformers knows by heart."""


def server_settings(config: dict[str, Any], aliases: dict[str, str], weights: set[str]) -> dict[str, Any]:
    """What has to be added to or changed in a config.json that transformers wrote, so that servers read it right.

    config: as saved. aliases: the other names of its settings (`attribute_map`): transformers 4 reads `num_experts`
    of a Qwen3-MoE where 5 writes `num_local_experts`, and takes 128 if there is none. weights: names of the weights
    written; a config that promises layers for multi-token prediction which are not there breaks llama.cpp.
    """
    added = dict(_FAMILY_SETTINGS.get(config["model_type"], {}))
    added |= {alias: config[own] for alias, own in aliases.items() if own in config}
    rope = config.get("rope_parameters") or {}
    if "rope_type" in rope:  # one for all layers
        added["rope_theta"] = rope.get("rope_theta")
        added["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        if "partial_rotary_factor" in rope:
            added["partial_rotary_factor"] = rope["partial_rotary_factor"]
        if config.get("head_dim") and config["model_type"] == "minimax_m2":
            added["rotary_dim"] = int(config["head_dim"] * rope.get("partial_rotary_factor", 1.0))
    kinds = config.get("mlp_layer_types") or []
    dense = next((index for index, kind in enumerate(kinds) if kind != "dense"), len(kinds))
    if kinds and "dense" not in kinds[dense:]:
        added["first_k_dense_replace"] = dense
    added = {name: value for name, value in added.items() if name not in config and value is not None}
    predicted = [name for name in ("num_nextn_predict_layers", "num_mtp_layers") if config.get(name)]
    beyond = re.compile(rf"(^|\.)(mtp|layers\.{config.get('num_hidden_layers')})\.")
    if predicted and not any(beyond.search(name) for name in weights):
        added |= dict.fromkeys(predicted, 0)
        added |= {alias: 0 for alias, own in aliases.items() if own in predicted}
    # Settings of training: no cache makes generation slow, and router logits make it fail on padded batches.
    added |= {name: value for name, value in (("use_cache", True), ("output_router_logits", False)) if name in config}
    return added


def _mend_generation(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Ends at the tokenizer's end of turn; sampling settings without `do_sample` could not be saved."""
    settings = model.generation_config
    if settings is None:
        return
    ends = settings.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        settings.eos_token_id = [tokenizer.eos_token_id, *ends]
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id
    if not settings.do_sample and {"temperature", "top_p", "top_k", "min_p"} & {*settings.to_diff_dict()}:
        settings.do_sample = True


def _write_generation(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """generation_config.json beside adapters: ends of a turn and defaults of the modes are not those of the base."""
    if model.generation_config is not None:
        _mend_generation(model, tokenizer)
        model.generation_config.save_pretrained(folder)


def _write_adapters(model: Any, folder: Path) -> None:
    """The adapters, and the base's name and commit; new rows are made again by `load_checkpoint`."""
    inner = model.get_base_model()
    for settings in model.peft_config.values():
        base = settings.base_model_name_or_path
        if Path(base) == tiny_base_path():
            settings.base_model_name_or_path = TINY_BASE
        elif Path(base).is_dir():
            settings.base_model_name_or_path = str(Path(base).resolve())
        settings.revision = getattr(inner.config, "_commit_hash", None) or settings.revision
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The tokenizer with its templates, under names that transformers 4 knows as well."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    for local in ("is_local", "local_files_only"):
        settings.pop(local, None)
    _write_json(path, settings)


def _write_json(path: Path, settings: dict[str, Any]) -> None:
    path.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


# Loading back, and the final names


def _check_written(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    probe: torch.Tensor,
    expected: torch.Tensor,
    dtype: str,
) -> None:
    """Raise ValueError if what was written is not what is in memory."""
    from transformers import AutoTokenizer

    text = "Two and two?\n답은 4입니다.<think>" + "".join(tokenizer.get_added_vocab())
    read = AutoTokenizer.from_pretrained(folder)
    if read(text)["input_ids"] != tokenizer(text)["input_ids"] or read.chat_template != tokenizer.chat_template:
        raise ValueError("export_checkpoint: the written tokenizer splits text otherwise, or has another template.")
    if not _room_for(model):
        logger.warning("Too little memory to load the export beside the model; only its files are checked.")
        _check_files(model, folder)
        return
    # A base may be stored in another precision than it was trained in.
    adapter = (folder / "adapter_config.json").is_file()
    written, _ = load_checkpoint(folder, dtype=dtype if adapter else "auto")
    found = logits_of(written.to(model.get_input_embeddings().weight.device), probe)
    _compare(expected, found, dtype, "loading the export back gives another model")


def _room_for(model: Any) -> bool:
    """Whether a second model of this size fits where the first is."""
    import psutil
    import torch

    size = sum(each.numel() * each.element_size() for each in model.parameters())
    device = model.get_input_embeddings().weight.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    # It is read on the CPU first.
    return bool(1.2 * size < min(free, psutil.virtual_memory().available))


def _check_files(model: Any, folder: Path) -> None:
    """Names and number of the values in the files, without reading them."""
    from safetensors import safe_open

    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - no dict
                size = 1
                for side in weights.get_slice(name).get_shape():
                    size *= side
                count += size
    least = sum(each.numel() for each in model.parameters())
    if not (folder / "adapter_config.json").is_file() and count < least:
        raise ValueError(f"export_checkpoint: the files hold {count:,} values, expected {least:,}.")


def publish(temporary: Path, folder: Path) -> None:
    """Move the written files to their final names, config.json last: without it a folder is no checkpoint."""
    written = sorted(path for path in temporary.iterdir())
    for path in written:
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    last = ("config.json", "adapter_config.json")
    for name in last:
        (folder / name).unlink(missing_ok=True)
    for pattern in _STALE:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in sorted(written, key=lambda path: path.name in last):
        os.replace(path, folder / path.name)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
