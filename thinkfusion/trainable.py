# SPDX-License-Identifier: Apache-2.0
"""What of a model trains, by kind: LoRA's targets, what is frozen in full fine-tuning, and a check of the rest.

The commonest silent failure of fine-tuned Mixtures of Experts is that nothing reached the experts. Here every parameter
that is meant to train must have got a gradient by the first optimizer step.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from thinkfusion.chat_templates import installed_template
from thinkfusion.moe import KINDS, moe_layers, parameter_kinds

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# They choose among keys, which passes no gradient of the loss.
CHOOSING = ".indexer."
SHOWN = 5


def expert_parameters(model: PreTrainedModel) -> list[str]:
    """Names of the parameters that hold all experts of a layer, (experts, …, …): three-dimensional ones."""
    kinds = parameter_kinds(model)
    return [name for name, parameter in model.named_parameters() if kinds[name] == "experts" and parameter.dim() == 3]


def trained_kinds(
    *, train_router: bool, train_experts: bool, train_shared_experts: bool, train_attention: bool
) -> set[str]:
    """The kinds of parameters, of `thinkfusion.moe.KINDS`, that these settings train, but for the embeddings."""
    wanted = {
        "router": train_router,
        "experts": train_experts,
        "shared_experts": train_shared_experts,
        "dense": train_shared_experts,
        "attention": train_attention,
    }
    return {kind for kind, given in wanted.items() if given}


def lora_config(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    r: int = 16,
    lora_alpha: int = 32,
    train_router: bool = False,
    train_experts: bool = True,
    train_shared_experts: bool = True,
    train_attention: bool = True,
    train_embeddings: bool = False,
    **options: Any,
) -> LoraConfig:
    """A LoRA configuration that reaches what a Mixture of Experts of any family is made of.

    Linear layers are adapted as modules (`target_modules`); experts, three-dimensional parameters that modules do not
    reach, and routers by name (`target_parameters`). `train_shared_experts` includes the MLPs of layers without
    experts. With a tokenizer the rows of its control tokens are trained in full, in the input embedding and in an
    output embedding of its own (peft's `trainable_token_indices`): a new token would otherwise never be learned.
    `train_embeddings` trains all rows.

    Further `options` go to `peft.LoraConfig`, and win. Norms, and the biases of experts, have no adapters. Raises
    ValueError if nothing in the model is targeted, if `target_modules` or `target_parameters` of yours match nothing,
    or if the tokenizer has no template of ours.
    """
    from peft import LoraConfig

    wanted = trained_kinds(
        train_router=train_router,
        train_experts=train_experts,
        train_shared_experts=train_shared_experts,
        train_attention=train_attention,
    )
    modules, parameters = _targets(model, wanted)
    given = {
        "r": r,
        "lora_alpha": lora_alpha,
        "target_modules": modules or None,
        "target_parameters": parameters or None,
        "task_type": "CAUSAL_LM",
        **_embedding_rows(model, tokenizer, train_embeddings),
        **options,
    }
    for name, places in (
        ("target_modules", [name for name, _ in model.named_modules()]),
        ("target_parameters", [name for name, _ in model.named_parameters()]),
    ):
        if name in options:
            _check_matches(name, options[name], places)
    if not given["target_modules"] and not given["target_parameters"]:
        raise ValueError(
            f"lora_config: found nothing to adapt in {type(model).__name__}. Set train_attention, train_experts, "
            "train_shared_experts or train_router."
        )
    if not given["target_modules"]:
        # peft would otherwise choose modules of its own for the family.
        given["target_modules"] = []
    return LoraConfig(**given)


def _targets(model: PreTrainedModel, wanted: set[str]) -> tuple[list[str], list[str]]:
    """The linear layers and the other parameters of these kinds, by the shortest names that mean no others."""
    from torch import nn

    kinds = parameter_kinds(model)
    modules = dict(model.named_modules())
    linear, parameters = [], []
    for name, parameter in model.named_parameters():
        if kinds[name] not in wanted or CHOOSING in name:
            continue
        owner, _, own = name.rpartition(".")
        if type(modules[owner]) is nn.Linear:
            linear += [owner] if own == "weight" else []
        elif own.endswith("bias") or kinds[name] not in ("experts", "router"):
            continue
        elif parameter.dim() == (3 if kinds[name] == "experts" else 2):
            parameters.append(name)
    names = _shortest(linear, modules)
    lost = _taken_for_experts(model, names)
    parameters += [f"{owner}.weight" for owner in linear if any(f".{owner}".endswith(f".{end}") for end in lost)]
    return [name for name in names if name not in lost], _shortest(parameters, kinds, least=2)


def _taken_for_experts(model: PreTrainedModel, names: list[str]) -> set[str]:
    """Those of `names` that peft would take for experts.

    peft 0.21 translates adapters of old checkpoints, whose experts were modules: in many families it turns `gate_proj`,
    `up_proj` and `down_proj`, in whatever module, into the experts' parameters, so that shared experts and dense layers
    would silently stay as they are. Their weights are named as parameters then.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    translated = LoraConfig(target_modules=list(names))
    convert_peft_config_for_transformers(translated, model, None)
    return set(names) - set(translated.target_modules)


def _shortest(names: Sequence[str], everything: Iterable[str], least: int = 1) -> list[str]:
    """Ends of `names`, of at least `least` parts, that are ends of no other name in `everything`."""
    chosen = set(names)
    taken = {end for name in everything if name not in chosen for end in _ends(name)}
    return sorted({next((end for end in _ends(name)[least - 1 :] if end not in taken), name) for name in names})


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]


def _embedding_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, train_embeddings: bool
) -> dict[str, Any]:
    inputs, output = model.get_input_embeddings(), model.get_output_embeddings()
    ends = [inputs] if output is None or output.weight is inputs.weight else [inputs, output]
    names = [_name_of(model, end) for end in ends]
    if train_embeddings:
        return {"modules_to_save": names, "ensure_weight_tying": len(ends) == 1 and output is not None}
    if tokenizer is None:
        return {}
    template = installed_template(tokenizer)
    if template is None:
        raise ValueError("lora_config: call install_chat_template(tokenizer, model) first.")
    control = [tokenizer.convert_tokens_to_ids(token) for token in template.dialect.control_tokens]
    return {"trainable_token_indices": {name: control for name in names}}


def _name_of(model: PreTrainedModel, wanted: Any) -> str:
    return next(str(name).rsplit(".", 1)[-1] for name, module in model.named_modules() if module is wanted)


def _check_matches(setting: str, targets: Any, names: Sequence[str]) -> None:
    if isinstance(targets, str):
        # peft takes "all-linear" for every linear layer, and any other text for a pattern.
        missing = [] if targets == "all-linear" or any(re.fullmatch(targets, name) for name in names) else [targets]
    else:
        missing = [each for each in targets or [] if not any(f".{name}".endswith(f".{each}") for name in names)]
    if missing:
        ends = sorted({name.rpartition(".")[2] for name in names} - {"", *map(str, range(1000))})
        shown = ", ".join(ends[:30]) + (", …" if len(ends) > 30 else "")
        raise ValueError(f"{setting}: {', '.join(missing)} is nowhere in the model. It has {shown}.")


def set_trainable(
    model: PreTrainedModel,
    *,
    train_router: bool = True,
    train_experts: bool = True,
    train_shared_experts: bool = True,
    train_attention: bool = True,
    train_embeddings: bool = True,
    control_ids: Sequence[int] = (),
) -> None:
    """Freeze what is not to train in full fine-tuning: parameters by kind. What was frozen before stays so.

    Norms and whatever is of no kind train. Without `train_embeddings` the rows `control_ids` of the embeddings still
    do; give these no weight decay, see `frozen_rows`. Correction biases never train by gradient, and parts that no
    gradient reaches (the indexers of sparse attention) are frozen, with a remark.
    """
    wanted = trained_kinds(
        train_router=train_router,
        train_experts=train_experts,
        train_shared_experts=train_shared_experts,
        train_attention=train_attention,
    ) | {"norms", "other", "embeddings"}
    kinds, layers = parameter_kinds(model), moe_layers(model)
    biases = {layer.correction_bias for layer in layers}
    unreached = [name for name, parameter in model.named_parameters() if CHOOSING in name and parameter.requires_grad]
    if unreached:
        logger.warning("%d parameters that choose among keys are frozen: no gradient reaches them.", len(unreached))
    for name, parameter in model.named_parameters():
        if kinds[name] not in wanted or name in biases or CHOOSING in name:
            parameter.requires_grad_(False)
    if not train_embeddings:
        for weight in _embeddings(model):
            weight.requires_grad_(bool(control_ids))
            if control_ids:
                _train_rows(weight, control_ids)


def _embeddings(model: PreTrainedModel) -> list[torch.Tensor]:
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    return list({id(end.weight): end.weight for end in ends if end is not None}.values())


FROZEN_ROWS = "_thinkfusion_trained_rows"


def _train_rows(weight: Any, rows: Sequence[int]) -> None:
    """Let the gradient reach these rows alone, (rows, width)."""
    import torch

    def keep(gradient: torch.Tensor) -> torch.Tensor:
        kept = torch.zeros_like(gradient)
        kept[list(rows)] = gradient[list(rows)]
        return kept

    weight.register_hook(keep)
    setattr(weight, FROZEN_ROWS, tuple(rows))


def frozen_rows(model: PreTrainedModel) -> set[str]:
    """Names of parameters only some rows of which train: weight decay would move the others."""
    return {name for name, parameter in model.named_parameters() if hasattr(parameter, FROZEN_ROWS)}


def trained_line(model: PreTrainedModel) -> str:
    """One line: the parameters that train, by kind, and the kinds that are frozen."""
    kinds = parameter_kinds(model)
    counts = dict.fromkeys(KINDS, 0)
    total = dict.fromkeys(KINDS, 0)
    for name, parameter in model.named_parameters():
        rows = getattr(parameter, FROZEN_ROWS, None)
        size = parameter.numel() if rows is None else len(rows) * parameter.shape[-1]
        counts[kinds[name]] += size * parameter.requires_grad
        total[kinds[name]] += parameter.numel()
    trained, everything = sum(counts.values()), sum(total.values())
    parts = [f"{kind.replace('_', ' ')} {counts[kind]:,}" for kind in KINDS if counts[kind]]
    frozen = [kind.replace("_", " ") for kind in KINDS if total[kind] and not counts[kind]]
    line = f"Trains {trained:,} of {everything:,} parameters ({trained / everything:.2%}): {', '.join(parts) or 'none'}"
    return f"{line}; frozen: {', '.join(frozen)}." if frozen else f"{line}."


def check_gradients(model: PreTrainedModel) -> list[str]:
    """Check, before an optimizer step, that every parameter that is meant to train got a gradient.

    Returns the experts that no token was routed to so far, as "name: 3, 5": they are no error. Raises ValueError that
    names the parameters without a gradient. In LoRA's first step A has a gradient of zero, since B is zero.
    """
    kinds = parameter_kinds(model)
    experts = {name: layer.num_experts for layer in moe_layers(model) for name in layer.experts}
    without, idle = [], []
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if not parameter.requires_grad or (".lora_A." in name and gradient is not None):
            continue
        if gradient is not None and bool(gradient.any()):
            unused = _unused(name, gradient, experts) if kinds[name] == "experts" else []
            idle += [f"{name}: {', '.join(map(str, unused))}"] if unused else []
        # An expert that is a module of its own is idle as a whole.
        elif kinds[name] == "experts" and re.search(r"\.experts\.\d+\.", name):
            idle.append(name)
        else:
            without.append(name)
    if without:
        shown = ", ".join(without[:SHOWN]) + (f" and {len(without) - SHOWN} more" if len(without) > SHOWN else "")
        raise ValueError(
            f"{len(without)} parameters are meant to train and got no gradient in the first step: {shown}. Freeze them "
            "(train_router, train_experts, train_shared_experts, train_attention, train_embeddings set to false), or "
            "find out why the loss does not depend on them."
        )
    return idle


def _unused(name: str, gradient: torch.Tensor, experts: dict[str, int]) -> list[int]:
    """The numbers of the experts whose part of a gradient is zero."""
    count = next((number for owner, number in experts.items() if f".{owner}." in f".{name}."), 0)
    if ".lora_B." in name and count and gradient.shape[1] % count == 0:
        # peft lays B as (out, rank, experts).
        each = gradient.reshape(gradient.shape[0], -1, count).abs().amax((0, 1))
    elif gradient.dim() == 3:
        each = gradient.abs().amax((1, 2))
    else:
        return []
    return [number for number, value in enumerate(each.tolist()) if value == 0]
