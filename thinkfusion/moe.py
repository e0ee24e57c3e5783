# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-Experts models of any family: their layers, routers and experts, found by structure.

A layer is a Mixture of Experts if one of its modules owns parameters with a dimension for experts (or is a list of
equal MLPs) and has a router beside it: a module with one matrix that has a row for each expert. How a router scores
experts is found out by running a copy of it.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

KINDS = ("attention", "router", "experts", "shared_experts", "dense", "embeddings", "norms", "other")
"""What a parameter belongs to. "attention" is all that mixes tokens, linear attention and state spaces too; "dense" are
the MLPs of layers without experts."""

SOFTMAX, SIGMOID, UNKNOWN = "softmax", "sigmoid", "unknown"
PROBED_TOKENS = 8
_MLP_NAME = re.compile(r"mlp|feed_forward|ffn|moe")
_MLP_CLASS = re.compile(r"MLP|FeedForward|FFN")
# What adapters put between a module's name and the names of its parameters.
_WRAPPERS = re.compile(r"\.(base_layer|original_module|modules_to_save\.[^.]+)(?=\.|$)")


@dataclass(frozen=True)
class MoELayer:
    """A Mixture-of-Experts layer; names are those of modules and parameters in the model without adapters."""

    index: int
    """The number of the decoder layer."""
    block: str
    """The module that holds router and experts."""
    router: str
    experts: tuple[str, ...]
    """The modules that own the experts' parameters, nearly always one."""
    shared_experts: tuple[str, ...]
    """The modules every token passes beside the experts, their gates included."""
    num_experts: int
    """Experts the router chooses among."""
    top_k: int
    score_function: str
    """What makes affinities of logits: "softmax", "sigmoid", or "unknown"."""
    groups: int
    """Groups of experts, some of which the router chooses first; 1 if there are none."""
    correction_bias: str | None
    """The parameter or buffer, (experts,) or (1, experts), that is added to the affinities for the choice alone."""


@dataclass(frozen=True)
class MoEDescription:
    """What a model is made of. Without Mixture-of-Experts layers, `layers` is empty and the model dense."""

    family: str
    layers: tuple[MoELayer, ...]
    num_experts: int
    """Experts of a layer (the most, where layers differ), 0 in a dense model."""
    top_k: int
    total_parameters: int
    active_parameters: int
    """Parameters that compute one token: all, but for the experts of each layer only the chosen ones' share."""
    input_embeddings: int
    """Parameters of an input embedding of its own, of which a token reads one row; some publish active parameters
    without them."""
    parameters: dict[str, int]
    """Parameters of each kind that the model has, see `KINDS`."""

    @property
    def dense(self) -> bool:
        return not self.layers

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.family}: {_billions(self.total_parameters)} parameters"]
        if self.dense:
            lines[0] += ", dense: it has no Mixture-of-Experts layer, so there is no router and no expert to train."
        else:
            lines[0] += f", of which {_billions(self.active_parameters)} compute a token"
            lines += [f"  {line}" for line in _layer_lines(self.layers)]
        lines += [
            f"  {kind.replace('_', ' '):<15}{_billions(count):>10}  {count / self.total_parameters:6.1%}"
            for kind, count in self.parameters.items()
        ]
        return "\n".join(lines)


def _billions(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:,}"


def _layer_lines(layers: Sequence[MoELayer]) -> Iterator[str]:
    """One line for all layers that are alike."""
    alike: dict[tuple, list[MoELayer]] = {}
    for layer in layers:
        key = (layer.num_experts, layer.top_k, layer.score_function, layer.groups, layer.correction_bias is not None)
        alike.setdefault((*key, len(layer.shared_experts) > 0), []).append(layer)
    for (experts, top_k, score, groups, bias, shared), same in alike.items():
        parts = [f"{experts} experts", f"top-{top_k}", f"{score} scores"]
        parts += [f"{groups} groups"] * (groups > 1)
        parts += ["correction bias"] * bias + ["shared experts"] * shared
        numbers = sorted({layer.index for layer in same})
        whole = numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 2
        shown = f"{numbers[0]}-{numbers[-1]}" if whole else ", ".join(map(str, numbers))
        yield f"{len(same)} layers ({shown}): {', '.join(parts)}; router {_inner(same[0], same[0].router)}"


def _inner(layer: MoELayer, name: str) -> str:
    return name.removeprefix(f"{layer.block}.")


def describe_moe(model_or_config: Any) -> MoEDescription:
    """The Mixture-of-Experts layers of a causal language model, its total and its active parameters.

    A configuration is built without weights (on the device `meta`). A dense model is described too, and says so.
    Parameters that are shared (tied embeddings) count once. Raises ValueError for a configuration of an unknown family.
    """
    model = meta_model(model_or_config) if _is_config(model_or_config) else bare(model_or_config)
    layers = moe_layers(model)
    kinds = parameter_kinds(model, layers)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    counts = {kind: sum(sizes[name] for name in sizes if kinds[name] == kind) for kind in KINDS}
    total = sum(sizes.values())
    idle = 0.0
    for layer in layers:
        own = sum(size for name, size in sizes.items() if _within(_plain(name), layer.experts))
        idle += own * (1 - layer.top_k / layer.num_experts)
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    tied = outputs is not None and outputs.weight is inputs.weight
    return MoEDescription(
        family=str(getattr(model.config, "model_type", type(model).__name__)),
        layers=layers,
        num_experts=max((layer.num_experts for layer in layers), default=0),
        top_k=max((layer.top_k for layer in layers), default=0),
        total_parameters=total,
        active_parameters=round(total - idle),
        input_embeddings=0 if tied else inputs.weight.numel(),
        parameters={kind: count for kind, count in counts.items() if count},
    )


def _is_config(value: Any) -> bool:
    from transformers import PretrainedConfig

    return isinstance(value, PretrainedConfig)


def meta_model(config: Any) -> Any:
    """The model of a configuration without its weights, on the device `meta`; the text part of a multimodal one.

    Raises ValueError for a family that transformers has no causal language model for.
    """
    import torch
    from transformers import AutoModelForCausalLM

    known = AutoModelForCausalLM._model_mapping
    wanted = next((each for each in (config, config.get_text_config()) if type(each) in known), None)
    if wanted is None:
        family = getattr(config, "model_type", "") or type(config).__name__
        raise ValueError(
            f"{family}: transformers knows no causal language model of this family. Update transformers, or load the "
            "model with its own code (trust_remote_code) and give the model."
        )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(wanted)


def bare(model: Any) -> Any:
    """The transformers model inside adapters and the wrapper of several processes."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif not hasattr(model, "config") and hasattr(model, "module"):
            model = model.module
        else:
            return model


def moe_layers(model: Any) -> tuple[MoELayer, ...]:
    """The Mixture-of-Experts layers of a model, in order; empty if it is dense. Adapters may be on it."""
    model = bare(model)
    modules = dict(model.named_modules())
    blocks: dict[str, dict[str, int]] = {}
    for name, module in modules.items():
        own, plain = _experts_of(name, module), _plain(name)
        if own and "." in plain and not re.search(r"\.lora_|\.token_adapter", plain):
            blocks.setdefault(plain.rpartition(".")[0], {})[plain] = own
    scores: dict[Any, tuple[str, int | None]] = {}
    found = []
    for block, experts in blocks.items():
        layer = _layer(modules, block, experts, scores)
        if layer is not None:
            found.append(layer)
    return tuple(sorted(found, key=lambda layer: layer.index))


def _plain(name: str) -> str:
    """The name without what adapters put into it."""
    return _WRAPPERS.sub("", name.removeprefix("base_model.model."))


def _within(name: str, modules: Sequence[str]) -> bool:
    return any(name == each or name.startswith(f"{each}.") for each in modules)


def _experts_of(name: str, module: nn.Module) -> int:
    """How many experts a module owns the parameters of; 0 if it is no module of experts."""
    from torch import nn
    from torch.nn.modules.conv import _ConvNd

    if isinstance(module, nn.ModuleList):
        mlps = len(module) > 1 and len({type(each) for each in module}) == 1 and _matrices(module[0]) > 1
        return len(module) if mlps and "expert" in name.rpartition(".")[2] else 0
    if isinstance(module, _ConvNd):
        return 0
    counts = [parameter.shape[0] for _, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3]
    return min(counts, default=0)


def _matrices(module: nn.Module) -> int:
    """The number of matrices in a module, without those of adapters."""
    return sum(parameter.dim() == 2 and "lora_" not in name for name, parameter in _own_parameters(module))


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in module.named_parameters():
        if "lora_" not in name and "modules_to_save" not in name:
            yield name, parameter


def _layer(
    modules: dict[str, nn.Module], block: str, experts: dict[str, int], scores: dict[Any, tuple[str, int | None]]
) -> MoELayer | None:
    """The layer of a block that owns experts; None if nothing beside them is a router."""
    owner, count = modules[block], min(experts.values())
    children = {f"{block}.{name}": child for name, child in owner.named_children() if f"{block}.{name}" not in experts}
    routers = [name for name, child in children.items() if _rows_for_experts(child, count)]
    # A projection may have as many rows as there are experts; what chooses says so.
    router = next((name for name in routers if hasattr(_unwrapped(children[name]), "top_k")), next(iter(routers), None))
    if router is None:
        return None
    module = _unwrapped(children[router])
    rows = _rows_for_experts(module, count)
    # The router's score function is that of all routers like it.
    key = (type(module), rows, getattr(module, "top_k", None))
    if key not in scores:
        scores[key] = _probe(module, rows)
    score, chosen = scores[key]
    top_k = chosen or _first_number(module, owner, names=("top_k", "num_experts_per_tok", "moe_topk"))
    inside = [name for name, child in children.items() if name != router and _matrices(child)]
    beside = [
        name
        for name in modules
        if name.rpartition(".")[0] == block.rpartition(".")[0] and "shared" in name.rpartition(".")[2]
    ]
    number = re.search(r"\.(\d+)(\.|$)", block)
    return MoELayer(
        index=int(number.group(1)) if number else 0,
        block=block,
        router=router,
        experts=tuple(sorted(experts)),
        shared_experts=tuple(inside + beside),
        num_experts=rows,
        top_k=min(top_k or 1, rows),
        score_function=score,
        groups=_first_number(module, names=("num_group", "n_group", "num_expert_groups")) or 1,
        correction_bias=_correction_bias(block, owner, router, rows),
    )


def _unwrapped(module: Any) -> Any:
    while True:
        inner = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
        if inner is None:
            return module
        module = inner


def _rows_for_experts(module: nn.Module, count: int) -> int:
    """The rows of the one matrix of a module that may be a router of `count` experts, 0 if it is none.

    A few more rows than experts are choices that compute nothing (LongCat's zero experts).
    """
    matrices = [
        parameter for _, parameter in _own_parameters(module) if parameter.dim() == 2 and parameter.shape[0] > 1
    ]
    if len(matrices) != 1:
        return 0
    rows = int(matrices[0].shape[0])
    return rows if rows == count or (count < rows <= 2 * count and hasattr(_unwrapped(module), "top_k")) else 0


def _first_number(*places: Any, names: Sequence[str]) -> int | None:
    for place in places:
        for name in names:
            value = getattr(place, name, None)
            if isinstance(value, int):
                return value
    return None


def _correction_bias(block: str, owner: nn.Module, router: str, rows: int) -> str | None:
    """The bias that is added for the choice alone. A router's own `bias` is part of its logits."""
    own = router.removeprefix(f"{block}.")
    for name, tensor in [*owner.named_buffers(), *owner.named_parameters()]:
        plain = _plain(f".{name}")[1:]
        where, _, last = plain.rpartition(".")
        here = where in ("", own) or where.startswith(f"{own}.")
        if here and "bias" in last and last != "bias" and tensor.numel() == rows:
            return f"{block}.{plain}"
    return None


def _probe(router: nn.Module, experts: int) -> tuple[str, int | None]:
    """The score function of a router and the number of experts it chooses, from a run of a random copy of it.

    The weights of the chosen experts are in proportion to their scores, whatever they are normalised and scaled by.
    """
    import torch

    draw = torch.Generator().manual_seed(0)
    try:
        # Not a copy of the weights: they may have none (meta), or lie on several devices.
        probed = copy.deepcopy(router, memo={id(each): _random_like(each, draw) for each in _tensors(router)}).eval()
        (width,) = {each.shape[1] for each in probed.parameters() if each.dim() == 2 and each.shape[0] > 1}
        extra = [
            torch.zeros(experts)
            for parameter in list(inspect.signature(probed.forward).parameters.values())[1:]
            if "bias" in parameter.name
        ]
        hidden = torch.randn(1, PROBED_TOKENS, width, generator=draw)
        with torch.no_grad():
            output = _first_that_runs(probed, (hidden[0], hidden), extra)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return UNKNOWN, None
    given = output if isinstance(output, tuple) else (output,)
    shaped = [each.reshape(PROBED_TOKENS, -1) for each in given if _is_per_token(each)]
    logits = next((each for each in shaped if each.shape[1] == experts and each.is_floating_point()), None)
    chosen = next((each for each in shaped if not each.is_floating_point()), None)
    if logits is None or chosen is None:
        return UNKNOWN, None
    weights = next((e for e in shaped if e.shape == chosen.shape and e.is_floating_point() and e is not logits), None)
    if weights is None:
        return UNKNOWN, chosen.shape[1]
    for name, scores in ((SOFTMAX, logits.float().softmax(-1)), (SIGMOID, logits.float().sigmoid())):
        expected = scores.gather(1, chosen)
        if torch.allclose(weights / weights.sum(1, True), expected / expected.sum(1, True), rtol=1e-3, atol=1e-5):
            return name, chosen.shape[1]
    return UNKNOWN, chosen.shape[1]


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _random_like(tensor: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Matrices at random; a bias of zero leaves the choice to the scores."""
    import torch
    from torch import nn

    values = torch.randn(tensor.shape, generator=draw) if tensor.dim() == 2 and min(tensor.shape) > 1 else 0
    made = torch.zeros(tensor.shape) + values
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made


def _first_that_runs(router: nn.Module, inputs: Sequence[torch.Tensor], extra: list[torch.Tensor]) -> Any:
    """Some routers want (tokens, width), some (batch, length, width)."""
    for hidden in inputs[:-1]:
        try:
            return router(hidden, *extra)
        except (RuntimeError, TypeError, ValueError, IndexError):
            continue
    return router(inputs[-1], *extra)


def _is_per_token(value: Any) -> bool:
    return hasattr(value, "shape") and value.dim() > 1 and value.numel() % PROBED_TOKENS == 0


def parameter_kinds(model: Any, layers: Sequence[MoELayer] | None = None) -> dict[str, str]:
    """The kind, one of `KINDS`, of every parameter by its name in the model; those of adapters too."""
    inner = bare(model)
    layers = moe_layers(inner) if layers is None else layers
    modules = dict(inner.named_modules())
    ends = [inner.get_input_embeddings(), inner.get_output_embeddings()]
    embeddings = [_plain(name) for name, module in modules.items() if any(module is end for end in ends)]
    classes = {_plain(name): type(_unwrapped(module)).__name__ for name, module in modules.items()}
    return {name: _kind(_plain(name), layers, embeddings, classes) for name, _ in model.named_parameters()}


def _kind(name: str, layers: Sequence[MoELayer], embeddings: Sequence[str], classes: dict[str, str]) -> str:
    if _within(name, embeddings):
        return "embeddings"
    # A norm may have parts (A.X K2 has a small MLP in some).
    parts = name.split(".")
    if any("Norm" in classes.get(".".join(parts[:count]), "") for count in range(1, len(parts))):
        return "norms"
    for layer in layers:
        if _within(name, [layer.block, *layer.shared_experts]):
            router = _within(name, [layer.router]) or name == layer.correction_bias
            return "router" if router else "shared_experts" if _within(name, layer.shared_experts) else "experts"
    inside = re.search(r"^(.*?\.\d+\.([^.]+))\.", name)
    if inside is None:
        return "other"
    mlp = _MLP_NAME.search(inside.group(2)) or _MLP_CLASS.search(classes.get(inside.group(1), ""))
    return "dense" if mlp else "attention"


def read_routes(layer: MoELayer, output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (tokens, experts) and chosen experts (tokens, top-k) from what a router of any family returns.

    Raises ValueError if there are no logits in it.
    """
    import torch

    given = [each for each in (output if isinstance(output, tuple | list) else [output]) if torch.is_tensor(each)]
    floating = [each for each in given if each.is_floating_point() and each.shape[-1:] == (layer.num_experts,)]
    if not floating:
        raise ValueError(f"{layer.router}: its output has no logits of {layer.num_experts} experts.")
    # Llama 4 returns its scores in front of the logits, both as wide.
    logits = floating[-1] if len(floating) == len(given) else floating[0]
    logits = logits.reshape(-1, layer.num_experts)
    whole = [each for each in given if not each.is_floating_point() and each.dim() > 1]
    chosen = next((each for each in whole if each.shape[-1] == layer.top_k), None)
    if chosen is None:
        # Without a graph: gradient checkpointing, which runs layers again, would miss what is kept for it.
        return logits, logits.detach().topk(layer.top_k, dim=-1).indices
    return logits, chosen.reshape(-1, layer.top_k)


@contextmanager
def watch_routes(
    model: Any, layers: Sequence[MoELayer], seen: Callable[[int, torch.Tensor, torch.Tensor], Any]
) -> Iterator[None]:
    """Within it, `seen` gets the position in `layers`, the logits and the chosen experts at every run of a router.

    Under gradient checkpointing layers run again in the backward pass: leave the context before it.
    """
    inner = bare(model)

    def hook(position: int) -> Callable[..., None]:
        def pass_on(module: nn.Module, given: Any, output: Any) -> None:
            # What a hook returns would take the place of the output.
            seen(position, *read_routes(layers[position], output))

        return pass_on

    handles = [
        inner.get_submodule(layer.router).register_forward_hook(hook(position)) for position, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
