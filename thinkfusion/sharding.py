# SPDX-License-Identifier: Apache-2.0
"""How a model is spread over devices: accelerate's configuration files, with the classes of the model's family.

FSDP2 gathers a decoder layer at a time. DeepSpeed's ZeRO-3 gathers module by module and waits for those that a process
does not reach; experts that got no token would leave it waiting for ever, so the blocks that hold experts are its
leaves, gathered as a whole (transformers #39275).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from thinkfusion.activations import decoder_layers
from thinkfusion.moe import bare, meta_model, moe_layers
from thinkfusion.planning import STRATEGIES
from thinkfusion.tree_attention import why_not_trees


@dataclass(frozen=True)
class Sharding:
    """What of a family its configuration of accelerate needs."""

    family: str
    layer_classes: tuple[str, ...]
    """Classes of the decoder layers: what FSDP2 wraps."""
    leaf_classes: tuple[str, ...]
    """Classes of the blocks that hold experts: ZeRO-3's leaves. Empty for a dense model."""
    experts_implementation: str | None
    """"grouped_mm" where the family can take it, else "eager"; None for a dense model."""
    attn_implementation: str
    remarks: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def choose_sharding(model_or_config: Any, layout: str = "tree") -> Sharding:
    """The classes to wrap, read from the model's structure, and the implementations that its class supports.

    Raises ValueError for a family without a causal language model, or a model without a list of decoder layers.
    """
    from transformers import PretrainedConfig

    given = model_or_config
    model = meta_model(given) if isinstance(given, PretrainedConfig) else bare(given)
    layers = decoder_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__}: found no list of decoder layers, so there is nothing to shard by.")
    blocks = [model.get_submodule(layer.block) for layer in moe_layers(model)]
    remarks = []
    experts = None
    if blocks:
        # transformers' own test; a family with experts of its own making runs them one by one.
        experts = "grouped_mm" if model._can_set_experts_implementation() else "eager"
    if experts == "grouped_mm":
        remarks.append("grouped_mm wants a GPU of compute capability 8.0 (A100) or above; transformers chooses it.")
    elif experts == "eager":
        remarks.append("This family's experts run one after another: transformers has no grouped_mm for them.")
    supported = getattr(model, "_supports_sdpa", False)
    reason = why_not_trees(model) if layout != "padded" else None
    if reason is not None:
        remarks.append(f"sequence_layout {layout} becomes padded: {reason}.")
    return Sharding(
        family=str(model.config.model_type),
        layer_classes=_names(layers),
        leaf_classes=_names(blocks),
        experts_implementation=experts,
        attn_implementation="sdpa" if supported else "eager",
        remarks=tuple(remarks),
    )


def _names(modules: Any) -> tuple[str, ...]:
    return tuple(sorted({type(module).__name__ for module in modules}))


def accelerate_config(strategy: str, sharding: Sharding, *, gpus: int = 8, bf16: bool = True) -> dict[str, Any]:
    """The configuration of `accelerate launch --config_file` for one machine.

    Raises ValueError for an unknown strategy.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: {strategy!r} is unknown; choose one of {', '.join(STRATEGIES)}.")
    own: dict[str, Any] = {"distributed_type": "MULTI_GPU" if gpus > 1 else "NO"}
    if strategy == "fsdp2":
        own = {
            "distributed_type": "FSDP",
            "fsdp_config": {
                "fsdp_version": 2,
                "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "fsdp_transformer_layer_cls_to_wrap": ",".join(sharding.layer_classes),
                "fsdp_reshard_after_forward": True,
                # transformers' save_model writes nothing at all of a sharded state.
                "fsdp_state_dict_type": "FULL_STATE_DICT",
                "fsdp_cpu_ram_efficient_loading": True,
                "fsdp_offload_params": False,
                # The trainer's gradient_checkpointing does it.
                "fsdp_activation_checkpointing": False,
            },
        }
    elif strategy == "deepspeed_zero3":
        own = {
            "distributed_type": "DEEPSPEED",
            "deepspeed_config": {
                "zero_stage": 3,
                "zero3_init_flag": True,
                "zero3_save_16bit_model": True,
                "offload_optimizer_device": "none",
                "offload_param_device": "none",
                "deepspeed_multinode_launcher": "standard",
            },
        }
        if sharding.leaf_classes:
            own["deepspeed_config"]["deepspeed_moe_layer_cls_names"] = ",".join(sharding.leaf_classes)
    return {
        "compute_environment": "LOCAL_MACHINE",
        **own,
        "mixed_precision": "bf16" if bf16 else "no",
        "num_machines": 1,
        "machine_rank": 0,
        "num_processes": gpus,
        "main_training_function": "main",
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": False,
    }


def config_text(strategy: str, sharding: Sharding, *, gpus: int = 8, bf16: bool = True) -> str:
    """The same as YAML, with what it is for."""
    import yaml

    heading = (
        f"# {strategy}, for models of the family {sharding.family}:\n"
        "#   accelerate launch --config_file THIS recipes/sft.py --config MY.yaml\n"
    )
    return heading + yaml.safe_dump(accelerate_config(strategy, sharding, gpus=gpus, bf16=bf16), sort_keys=False)


def write_accelerate_config(
    path: str | Path, strategy: str, sharding: Sharding, *, gpus: int = 8, bf16: bool = True
) -> Path:
    """Write the configuration file; folders on the way are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(config_text(strategy, sharding, gpus=gpus, bf16=bf16), encoding="utf-8")
    return path
