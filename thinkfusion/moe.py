# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-Experts models: which parameters are experts and routers, and what LoRA has to reach."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from thinkfusion.chat_templates import installed_template

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def expert_parameters(model: PreTrainedModel) -> list[str]:
    """Names of the parameters that hold all experts of a layer, (experts, …, …): three-dimensional ones."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and "expert" in name and not name.endswith("bias")
    ]


def lora_config(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    r: int = 16,
    lora_alpha: int = 32,
    train_experts: bool = True,
    **options: Any,
) -> LoraConfig:
    """A LoRA configuration that reaches what a MoE is made of; the router stays frozen.

    Attention and dense layers are adapted as modules. Experts are three-dimensional parameters that `target_modules`
    cannot reach, so they are named in `target_parameters`; without `train_experts` they stay frozen. The rows of the
    control tokens are trained in full, in the input embedding and in an output embedding of its own (peft's
    `trainable_token_indices`): a new token would otherwise never be learned.

    Further `options` go to `peft.LoraConfig`. Raises ValueError if nothing in the model can be targeted, or the
    tokenizer has no template of ours.
    """
    import torch
    from peft import LoraConfig

    template = installed_template(tokenizer)
    if template is None:
        raise ValueError("lora_config: call install_chat_template(tokenizer, model) first.")
    output = model.get_output_embeddings()
    experts = expert_parameters(model)
    blocks = {name.rsplit(".experts", 1)[0] for name in experts}
    modules = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not output and not _is_router(name, blocks)
    }
    if not modules and not experts:
        raise ValueError(f"lora_config: found neither linear layers nor experts in {type(model).__name__}.")
    control = [tokenizer.convert_tokens_to_ids(token) for token in template.dialect.control_tokens]
    embeddings = {_name_of(model, model.get_input_embeddings()): control}
    if output is not None and output.weight is not model.get_input_embeddings().weight:
        embeddings[_name_of(model, output)] = control
    return LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        target_modules=sorted(modules),
        target_parameters=sorted({name.split(".", 3)[-1] for name in experts}) if train_experts else None,
        trainable_token_indices=embeddings,
        task_type="CAUSAL_LM",
        **options,
    )


def _is_router(name: str, blocks: set[str]) -> bool:
    """Whether a linear layer stands directly in a block with experts and decides on them."""
    parent, _, own = name.rpartition(".")
    return parent in blocks and own in ("gate", "router", "shared_expert_gate")


def _name_of(model: PreTrainedModel, wanted: Any) -> str:
    return next(str(name).rsplit(".", 1)[-1] for name, module in model.named_modules() if module is wanted)
