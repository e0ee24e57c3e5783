# SPDX-License-Identifier: Apache-2.0
"""Two checkpoints of one base into one: the thinking model's weights and the non-thinking model's, merged on disk.

Think-Fusion merges linearly, with a share near 0.8 of the thinking model, and trains both modes from there (A.X K1,
arXiv 2601.09200). Every value is computed in float64 from the values of the inputs, a piece of a tensor at a time, and
rounded once to the type of the thinking checkpoint; the files have its names, order and headers.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from thinkfusion.checkpointing import TINY_BASE, tiny_base_path
from thinkfusion.exporting import publish, temporary_folder
from thinkfusion.moe import KINDS, meta_model, parameter_kinds
from thinkfusion.weight_files import FLOATS, INDEX, PIECE, StoredTensor, StoredWeights, bytes_of

logger = logging.getLogger(__name__)

METHODS = ("linear", "task", "ties", "slerp")
GROUPS = tuple(KINDS)
RECORD = "fusion.json"
SOURCES = ("thinking", "non_thinking")
TEXT_FILES = (
    *("config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model"),
)
# Not sizes: they may differ between checkpoints that can be fused.
_SETTINGS = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "architectures")
_SAMPLED = 64
_LEAST_COSINE = 0.5


@dataclass(frozen=True)
class FusionOptions:
    """How weights are fused; T, N and B are a weight of the thinking model, the non-thinking one, and their base.

    ratio: the share r of the thinking model, 0 to 1.
    method: "linear": r·T + (1 - r)·N. "task": B + scale·(r·(T - B) + (1 - r)·(N - B)). "ties" (arXiv 2306.01708):
    as "task", of each tensor's `density` largest differences, without those against the elected sign, and divided by
    the shares of those that are left. "slerp": along the arc between T and N, each tensor as a vector.
    groups: shares of their own for kinds of weights, by a name of `GROUPS`.
    """

    ratio: float = 0.8
    method: str = "linear"
    scale: float = 1.0
    density: float = 0.2
    groups: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: {self.method!r} is unknown; choose one of {', '.join(METHODS)}.")
        for name, ratio in {"ratio": self.ratio, **self.groups}.items():
            if name != "ratio" and name not in GROUPS:
                raise ValueError(f"groups: {name!r} is unknown; choose of {', '.join(GROUPS)}.")
            if not 0 <= ratio <= 1:
                raise ValueError(f"{name}: found {ratio}, expected the share of the thinking model, 0 to 1.")
        if not 0 < self.density <= 1:
            raise ValueError(f"density: found {self.density}, expected a share of the differences, over 0 to 1.")
        if not math.isfinite(self.scale):
            raise ValueError(f"scale: found {self.scale}, expected a finite number.")

    @property
    def needs_base(self) -> bool:
        return self.method in ("task", "ties")


@dataclass(frozen=True)
class Fusion:
    """What was fused: how many tensors with which share of the thinking model, and the record written beside them."""

    directory: Path
    tensors: Mapping[float, int]
    record: Mapping[str, Any]

    def __str__(self) -> str:
        counts = ", ".join(
            f"{count:,} tensors with {ratio:g} of the thinking model" for ratio, count in self.tensors.items()
        )
        return f"{self.directory}: {self.record['method']} fusion of {counts}."


def fuse_checkpoints(
    thinking: str | Path,
    non_thinking: str | Path,
    directory: str | Path,
    options: FusionOptions | None = None,
    *,
    base: str | Path | None = None,
    texts_from: str = "thinking",
    progress: bool = False,
) -> Fusion:
    """Fuse two checkpoint folders of one base into `directory`, in memory of a few MiB.

    base: the folder of their base, for the methods "task" and "ties"; checked against them wherever it is given.
    texts_from: whose tokenizer, template, config and generation config are written, "thinking" or "non_thinking".

    All is written to a temporary folder in `directory` first; `fusion.json` records what was fused, and how.

    Raises FileNotFoundError for a folder that is no whole checkpoint; ValueError where architectures, sizes,
    tokenizers or bases differ, for damaged files, for weights that are not finite, and for options that do not fit;
    OSError if the disk is full. Nothing is left in `directory` then.
    """
    options = options or FusionOptions()
    folder = Path(directory)
    with ExitStack() as stack:
        inputs = Inputs.opened(thinking, non_thinking, base, options, stack)
        inputs.check()
        if texts_from not in SOURCES:
            raise ValueError(f"texts_from: {texts_from!r} is unknown; choose one of {', '.join(SOURCES)}.")
        if folder.resolve() in [each.folder.resolve() for each in inputs.all]:
            raise ValueError(f"{folder}: this is one of the checkpoints that are fused. Name another folder.")
        record = {
            **asdict(options),
            "groups": dict(options.groups),
            "thinking": str(thinking),
            "non_thinking": str(non_thinking),
            "base": None if base is None else str(base),
            "texts_from": texts_from,
        }
        with temporary_folder(folder) as temporary:
            _check_room(inputs.thinking, temporary)
            with _bar(inputs.thinking, progress) as advance:
                for file in inputs.thinking.files:
                    with (temporary / file.name).open("wb") as out:
                        out.write(file.header)
                        for tensor in file.tensors:
                            for piece in inputs.fused(tensor):
                                out.write(bytes_of(piece))
                            advance(tensor.end - tensor.begin)
            _write_texts(inputs, temporary, texts_from)
            (temporary / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            publish(temporary, folder)
    return Fusion(folder, dict(Counter(map(inputs.ratio, inputs.thinking.tensors))), record)


def fused_state(
    thinking: str | Path, non_thinking: str | Path, options: FusionOptions, *, base: str | Path | None = None
) -> dict[str, torch.Tensor]:
    """What `fuse_checkpoints` would write, in memory, by the names of the files; the same errors."""
    state = {}
    with ExitStack() as stack:
        inputs = Inputs.opened(thinking, non_thinking, base, options, stack)
        inputs.check()
        for name, tensor in inputs.thinking.tensors.items():
            pieces = [piece.clone() for piece in inputs.fused(tensor)]
            flat = torch.cat(pieces) if pieces else torch.empty(0, dtype=FLOATS.get(tensor.dtype, torch.uint8))
            state[name] = flat.reshape(tensor.shape) if tensor.dtype in FLOATS else inputs.other(tensor)
    return state


# The inputs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """The opened checkpoints, and how their tensors are combined."""

    thinking: StoredWeights
    non_thinking: StoredWeights
    base: StoredWeights | None
    options: FusionOptions
    kinds: Mapping[str, str]
    """The kind of each tensor by its name in the files; empty unless groups have shares of their own."""

    @classmethod
    def opened(
        cls,
        thinking: str | Path,
        non_thinking: str | Path,
        base: str | Path | None,
        options: FusionOptions,
        stack: ExitStack,
    ) -> Inputs:
        if options.needs_base and base is None:
            raise ValueError(f"base: the method {options.method!r} needs the checkpoint that both began with (--base).")
        folders = [None if each is None else _folder(each) for each in (thinking, non_thinking, base)]
        opened = [None if each is None else stack.enter_context(StoredWeights(each)) for each in folders]
        first, second, third = opened
        assert first is not None
        assert second is not None
        kinds = file_kinds(first.folder) if options.groups else {}
        for group in options.groups:
            if group not in kinds.values():
                raise ValueError(f"groups: no weight of {first.folder} is of the kind {group!r}. Leave it out.")
        return cls(first, second, third, options, kinds)

    @property
    def all(self) -> list[StoredWeights]:
        return [each for each in (self.thinking, self.non_thinking, self.base) if each is not None]

    def ratio(self, name: str) -> float:
        """The share of the thinking model in this tensor."""
        return self.options.groups.get(self.kinds.get(name, "other"), self.options.ratio)

    def fused(self, tensor: StoredTensor) -> Iterator[torch.Tensor]:
        """The fused tensor in pieces, (values,), of its dtype, in a buffer that each piece overwrites.

        Tensors of other types than floating point are equal in all inputs, and come as their bytes.
        """
        if tensor.dtype not in FLOATS:
            yield torch.frombuffer(bytearray(self.thinking.raw(tensor.name)), dtype=torch.uint8)
            return
        combine = self._combiner(tensor.name)
        own = torch.empty(PIECE, dtype=FLOATS[tensor.dtype])
        pieces = [each.pieces(tensor.name) for each in self.all]
        for parts in zip(*pieces, strict=True):
            total = combine(parts)
            # A sum takes one pass, and no finite values of these types are summed up to infinity.
            if not math.isfinite(total.sum().item()) and not total.isfinite().all():
                self._refuse(tensor)
            yield own[: len(total)].copy_(total)

    def other(self, tensor: StoredTensor) -> torch.Tensor:
        """A tensor that is not of floating point, as safetensors reads it."""
        from safetensors import safe_open

        with safe_open(self.thinking.folder / tensor.file, "pt") as file:
            found: torch.Tensor = file.get_tensor(tensor.name)
        return found

    def _combiner(self, name: str) -> Callable[[Sequence[torch.Tensor]], torch.Tensor]:
        ratio, options = self.ratio(name), self.options
        if options.method == "ties":
            limits = [_trim_limit(self, source, name, options.density) for source in (self.thinking, self.non_thinking)]
            return lambda parts: _ties(parts, ratio, limits, options.scale)
        weights = (ratio, 1 - ratio)
        if options.method == "slerp":
            weights = _slerp_weights(self, name, ratio)
        if options.method == "task":
            return lambda parts: _task(parts, weights, options.scale)
        return lambda parts: _weighted(parts[:2], weights)

    def _refuse(self, tensor: StoredTensor) -> None:
        for source in self.all:
            if not all(piece.isfinite().all() for piece in source.pieces(tensor.name)):
                raise ValueError(
                    f"{source.folder / source.tensors[tensor.name].file}: {tensor.name} holds values that are not "
                    "finite; this model is broken. Export it again, or take an earlier checkpoint."
                )
        raise ValueError(f"{tensor.name}: fused values overflow {tensor.dtype}. Use another method or scale.")

    def check(self) -> None:
        """Raise ValueError unless the inputs can be fused."""
        for other in self.all[1:]:
            _check_configs(self.thinking.folder, other.folder)
            _check_tensors(self.thinking, other)
        check_tokenizers(self.thinking.folder, self.non_thinking.folder)
        self._check_bases()

    def _check_bases(self) -> None:
        """Fine-tuning turns weights by a little; those of two pretrainings are at right angles."""
        floats = [tensor for tensor in self.thinking.tensors.values() if tensor.dtype in FLOATS]
        matrices = [tensor for tensor in floats if len(tensor.shape) > 1]
        sampled = matrices[:: max(1, len(matrices) // _SAMPLED)]
        for other in self.all[1:]:
            dots = torch.zeros(3, dtype=torch.float64)
            for tensor in sampled:
                one, two = next(self.thinking.pieces(tensor.name)), next(other.pieces(tensor.name))
                dots += torch.stack([one @ two, one @ one, two @ two])
            cosine = float(dots[0] / (dots[1] * dots[2]).sqrt()) if dots[1] and dots[2] else 1.0
            if cosine < _LEAST_COSINE:
                raise ValueError(
                    f"{self.thinking.folder} and {other.folder}: their weights point {cosine:.2f} in one direction "
                    f"(cosine), expected over {_LEAST_COSINE}: they are not of one base, and a mean of them is noise. "
                    "Fuse checkpoints that were trained from the same one."
                )


def _folder(name: str | Path) -> Path:
    folder = tiny_base_path() if str(name) == TINY_BASE else Path(name)
    if not (folder / "config.json").is_file():
        what = "there is no such folder" if not folder.is_dir() else "this is no checkpoint: config.json is missing"
        raise FileNotFoundError(f"{folder}: {what}. Name a local checkpoint (of the Hub: `hf download` it first).")
    return folder


def file_kinds(folder: Path) -> dict[str, str]:
    """The kind, one of `GROUPS`, of every tensor by its name in a checkpoint's files, from its configuration.

    The model's own parameters are told apart by its structure, and their names are those they are saved under.
    """
    from transformers import AutoConfig
    from transformers.core_model_loading import revert_weight_conversion

    model = meta_model(AutoConfig.from_pretrained(folder))
    kinds, found = parameter_kinds(model), {}
    state = model.state_dict()
    for kind in GROUPS:
        part = {name: tensor for name, tensor in state.items() if kinds.get(name) == kind}
        found.update(dict.fromkeys(revert_weight_conversion(model, part), kind))
    # Buffers of a router are its correction bias.
    routers = {name.rsplit(".", 1)[0] for name, kind in found.items() if kind == "router"}
    whole = revert_weight_conversion(model, state)
    found.update({name: "router" for name in whole if name not in found and name.rsplit(".", 1)[0] in routers})
    return found


def _check_configs(one: Path, other: Path) -> None:
    ours, theirs = (json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (one, other))
    names = [
        name
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
        and name not in _SETTINGS
        and not name.endswith("token_id")
        and (name == "model_type" or _is_size(ours.get(name)) or _is_size(theirs.get(name)))
    ]
    if names:
        told = "; ".join(f"{name}: {ours.get(name)!r} and {theirs.get(name)!r}" for name in names[:4])
        raise ValueError(f"{one} and {other}: these are different models. {told}. Fuse checkpoints of one base.")


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_tensors(one: StoredWeights, other: StoredWeights) -> None:
    for first, second in ((one, other), (other, one)):
        absent = sorted(first.tensors.keys() - second.tensors.keys())
        if absent:
            raise ValueError(
                f"{second.folder}: {len(absent):,} tensors of {first.folder} are missing ({', '.join(absent[:3])}). "
                "Fuse whole checkpoints that were written by the same program."
            )
    for name, tensor in one.tensors.items():
        found = other.tensors[name]
        if found.shape != tensor.shape:
            raise ValueError(
                f"{other.folder}: {name} is {list(found.shape)}, and {list(tensor.shape)} in {one.folder}. "
                "Fuse checkpoints of one base."
            )
        if tensor.dtype in FLOATS and found.dtype in FLOATS:
            continue
        if found.dtype != tensor.dtype or one.raw(name) != other.raw(name):
            raise ValueError(
                f"{name}: {tensor.dtype} in {one.folder} and {found.dtype} in {other.folder}; only {', '.join(FLOATS)} "
                "can be fused where they differ. Fuse the checkpoints before they are quantised."
            )


def check_tokenizers(one: Path, other: Path) -> None:
    """Raise ValueError where one id stands for two tokens."""
    vocabularies = [_vocabulary(folder) for folder in (one, other)]
    if None in vocabularies or vocabularies[0] == vocabularies[1]:
        return
    ours, theirs = (vocabulary or {} for vocabulary in vocabularies)
    differing = [token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)]
    token = min(differing)
    raise ValueError(
        f"{one} and {other}: {len(differing):,} tokens of their tokenizers differ ({token!r}: id {ours.get(token)} and "
        f"{theirs.get(token)}), so a row of the embeddings stands for two things. Install the same control tokens in "
        "both before training."
    )


def _vocabulary(folder: Path) -> dict[str, int] | None:
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = found.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # unigram: pairs of token and score
        vocabulary = {token: number for number, (token, *_) in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in found.get("added_tokens", ())}}


# The methods ----------------------------------------------------------------------------------------------------------


def _weighted(parts: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """w₀·x₀ + w₁·x₁, in place of x₀; each step rounded, where `alpha=` would skip one."""
    return parts[0].mul_(weights[0]).add_(parts[1].mul_(weights[1]))


def _task(parts: Sequence[torch.Tensor], weights: Sequence[float], scale: float) -> torch.Tensor:
    """B + scale·(w₀·(T - B) + w₁·(N - B))."""
    base = parts[2]
    return _weighted([part.sub_(base) for part in parts[:2]], weights).mul_(scale).add_(base)


def _slerp_weights(inputs: Inputs, name: str, ratio: float) -> tuple[float, float]:
    """Spherical weights of two tensors as vectors: sin(r·θ) / sin θ, θ the angle between them; linear where it is 0."""
    dots = torch.zeros(3, dtype=torch.float64)
    for one, two in zip(inputs.thinking.pieces(name), inputs.non_thinking.pieces(name), strict=True):
        dots += torch.stack([one @ two, one @ one, two @ two])
    product, first, second = dots.tolist()
    if not (first and second):
        return ratio, 1 - ratio
    angle = math.acos(min(1.0, max(-1.0, product / math.sqrt(first * second))))
    sine = math.sin(angle)
    if sine < 1e-6:
        return ratio, 1 - ratio
    return math.sin(ratio * angle) / sine, math.sin((1 - ratio) * angle) / sine


def _differences(source: StoredWeights, base: StoredWeights, name: str) -> Iterator[torch.Tensor]:
    """What training changed, in float32, piece by piece."""
    for tuned, start in zip(source.pieces(name), base.pieces(name), strict=True):
        yield (tuned - start).float()


def _trim_limit(inputs: Inputs, source: StoredWeights, name: str, density: float) -> float:
    """The magnitude of the difference from the base that the `density` largest of a tensor reach; exact.

    Bits of non-negative floats are ordered as their values are: the upper 16 are counted, and then the lower 15 of
    those at the limit, so that no tensor is held.
    """
    assert inputs.base is not None
    count = source.tensors[name].numel
    wanted = max(1, round(density * count))
    upper = torch.zeros(1 << 16, dtype=torch.long)
    for piece in _differences(source, inputs.base, name):
        upper += torch.bincount(piece.abs().view(torch.int32) >> 15, minlength=len(upper))
    bin_, above = _reached(upper, wanted)
    lower = torch.zeros(1 << 15, dtype=torch.long)
    for piece in _differences(source, inputs.base, name):
        bits = piece.abs().view(torch.int32)
        lower += torch.bincount(bits[bits >> 15 == bin_] & 0x7FFF, minlength=len(lower))
    last, _ = _reached(lower, wanted - above)
    return float(torch.tensor((bin_ << 15) | last, dtype=torch.int32).view(torch.float32))


def _reached(counts: torch.Tensor, wanted: int) -> tuple[int, int]:
    """The highest bin at which the bins from above hold `wanted`, and how many are above it."""
    summed = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(summed, wanted))
    return len(counts) - 1 - place, int(summed[place - 1]) if place else 0


def _ties(parts: Sequence[torch.Tensor], ratio: float, limits: Sequence[float], scale: float) -> torch.Tensor:
    """Trim, elect a sign, and average those that agree with it."""
    base = parts[2]
    weights = (ratio, 1 - ratio)
    trimmed = [part - base for part in parts[:2]]
    for each, limit in zip(trimmed, limits, strict=True):
        each[each.float().abs() < limit] = 0
    elected = (weights[0] * trimmed[0] + weights[1] * trimmed[1]).sign()
    total, share = torch.zeros_like(base), torch.zeros_like(base)
    for each, weight in zip(trimmed, weights, strict=True):
        agrees = (each.sign() == elected) & (each != 0)
        total += weight * each * agrees
        share += weight * agrees
    return base + scale * (total / torch.where(share == 0, torch.ones_like(share), share))


# Writing --------------------------------------------------------------------------------------------------------------


def _check_room(weights: StoredWeights, folder: Path) -> None:
    needed = sum((weights.folder / file.name).stat().st_size for file in weights.files)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(28, f"No space left: {needed / 2**30:.1f} GiB are needed")


def _write_texts(inputs: Inputs, temporary: Path, texts_from: str) -> None:
    """Tokenizer, template and configs of one of the inputs, and the index of the files."""
    chosen = inputs.thinking if texts_from == "thinking" else inputs.non_thinking
    for name in TEXT_FILES:
        if (chosen.folder / name).is_file():
            shutil.copyfile(chosen.folder / name, temporary / name)
    if (chosen.folder / "additional_chat_templates").is_dir():
        shutil.copytree(chosen.folder / "additional_chat_templates", temporary / "additional_chat_templates")
    config = json.loads((temporary / "config.json").read_text(encoding="utf-8"))
    own = json.loads((inputs.thinking.folder / "config.json").read_text(encoding="utf-8"))
    config |= {name: own[name] for name in ("dtype", "torch_dtype") if name in own}  # the weights are of its type
    (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if inputs.thinking.index is not None:
        shutil.copyfile(inputs.thinking.folder / INDEX, temporary / INDEX)


class _bar:  # noqa: N801 - a context manager that is called as a function
    """A progress bar over bytes, or nothing."""

    def __init__(self, weights: StoredWeights, shown: bool) -> None:
        from tqdm import tqdm

        total = sum(tensor.end - tensor.begin for tensor in weights.tensors.values())
        self._bar = tqdm(total=total, unit="B", unit_scale=True, desc="fusing", disable=not shown)

    def __enter__(self) -> Callable[[int], Any]:
        update: Callable[[int], Any] = self._bar.update
        return update

    def __exit__(self, *error: object) -> None:
        self._bar.close()
