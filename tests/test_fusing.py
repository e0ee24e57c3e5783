# SPDX-License-Identifier: Apache-2.0
"""Two checkpoints into one: values as in float64, files as those of the inputs, refusals that name what differs."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.tiny_models import tiny_random_model
from thinkfusion import (
    FusionOptions,
    export_checkpoint,
    fuse_adapters,
    fuse_checkpoints,
    install_chat_template,
    load_checkpoint,
    lora_config,
    sweep_ratios,
)
from thinkfusion import weight_files as weight_files_module
from thinkfusion.cli import main
from thinkfusion.digests import weights_digest
from thinkfusion.flags import FUSION_GROUPS, FUSION_METHODS
from thinkfusion.fusing import GROUPS, METHODS, file_kinds, fused_state
from thinkfusion.sweeping import Sweep, fused_model, ratios_of

R = 0.7


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """By family and dtype, a folder with `base`, `thinking` and `non_thinking`, made when it is asked for."""
    made: dict[tuple[str, str], Path] = {}

    def folder(family="qwen3_moe", dtype="float32", shards="1MB"):
        key = (family, dtype)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(family)
            tokenizer = load_checkpoint("tiny-base")[1]
            for seed, name in enumerate(("base", "thinking", "non_thinking")):
                model = tiny_random_model(family).to(getattr(torch, dtype))
                torch.manual_seed(seed)
                if seed:
                    for weight in model.parameters():
                        weight.data += (0.05 * torch.randn(weight.shape)).to(weight)
                model.save_pretrained(made[key] / name, max_shard_size=shards if seed != 2 else "20KB")
                tokenizer.save_pretrained(made[key] / name)
        return made[key]

    return folder


@pytest.fixture
def pair(folders, tmp_path) -> Path:
    """A copy of a base, a thinking and a non-thinking checkpoint that a test may spoil."""
    for name in ("base", "thinking", "non_thinking"):
        shutil.copytree(folders() / name, tmp_path / name)
    return tmp_path


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def trimmed(difference, density):
    magnitudes = difference.float().abs()
    limit = magnitudes.flatten().sort(descending=True).values[max(1, round(density * magnitudes.numel())) - 1]
    return torch.where(magnitudes < limit, 0.0, difference)


def reference(method, ratio, thinking, non_thinking, base):
    """The methods as their formulas say, in float64."""
    shares = (ratio, 1 - ratio)
    if method == "linear":
        return shares[0] * thinking + shares[1] * non_thinking
    if method == "task":
        return base + 0.9 * (shares[0] * (thinking - base) + shares[1] * (non_thinking - base))
    if method == "slerp":
        angle = torch.arccos((thinking * non_thinking).sum() / thinking.norm() / non_thinking.norm())
        return (torch.sin(shares[0] * angle) * thinking + torch.sin(shares[1] * angle) * non_thinking) / angle.sin()
    parts = [trimmed(each - base, 0.3) for each in (thinking, non_thinking)]
    sign = sum(share * part for share, part in zip(shares, parts, strict=True)).sign()
    kept = [(part.sign() == sign) & (part != 0) for part in parts]
    total = sum(share * part * keep for share, part, keep in zip(shares, parts, kept, strict=True))
    weight = sum(share * keep for share, keep in zip(shares, kept, strict=True))
    return base + 0.9 * torch.where(weight == 0, 0.0, total / weight)


def units(found, expected):
    """How far values are from float64 ones, in units in the last place of their own type."""
    rounded = expected.to(found.dtype).abs()
    unit = torch.nextafter(rounded, torch.full_like(rounded, float("inf"))) - rounded
    return float(((found.double() - expected).abs() / unit.double()).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("method", METHODS)
def test_values_are_those_of_float64_within_one_unit(folders, tmp_path, monkeypatch, method, dtype):
    monkeypatch.setattr("thinkfusion.weight_files.PIECE", 1000)
    monkeypatch.setattr("thinkfusion.fusing.PIECE", 1000)
    folder = folders(dtype=dtype)
    options = FusionOptions(R, method, scale=0.9, density=0.3)
    fuse_checkpoints(folder / "thinking", folder / "non_thinking", tmp_path, options, base=folder / "base")
    one, two, base, fused = (
        tensors(place) for place in (folder / "thinking", folder / "non_thinking", folder / "base", tmp_path)
    )
    assert fused.keys() == one.keys()
    assert max(tensor.numel() for tensor in fused.values()) > 5000
    for name, tensor in fused.items():
        expected = reference(method, R, *(each[name].double() for each in (one, two, base)))
        assert units(tensor, expected) <= 1, name
        assert not torch.equal(tensor, one[name])


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "axk1", "granitemoe", "ernie4_5_moe"])
def test_every_family_is_fused_loads_and_keeps_its_files(folders, tmp_path, family):
    folder = folders(family, "bfloat16")
    groups = {"router": 1.0, "experts": 0.0, "attention": 0.25, "embeddings": 0.5}
    fuse_checkpoints(folder / "thinking", folder / "non_thinking", tmp_path, FusionOptions(R, groups=groups))
    one, two, fused = (tensors(place) for place in (folder / "thinking", folder / "non_thinking", tmp_path))
    kinds = file_kinds(folder / "thinking")
    assert set(groups) <= set(kinds.values())
    assert set(one) <= set(kinds)
    for name, tensor in fused.items():
        ratio = groups.get(kinds[name], R)
        assert units(tensor, ratio * one[name].double() + (1 - ratio) * two[name].double()) <= 1, name
    AutoModelForCausalLM.from_pretrained(tmp_path)
    ours, theirs = (sorted(path.name for path in place.iterdir()) for place in (tmp_path, folder / "thinking"))
    assert ours == sorted([*theirs, "fusion.json"])
    for path in tmp_path.glob("*.safetensors"):
        length = struct.unpack("<Q", path.read_bytes()[:8])[0] + 8
        assert path.read_bytes()[:length] == (folder / "thinking" / path.name).read_bytes()[:length]


def test_ends_are_the_inputs_and_texts_are_chosen(pair, tmp_path):
    (pair / "non_thinking" / "chat_template.jinja").write_text("other")
    one, two = tensors(pair / "thinking"), tensors(pair / "non_thinking")
    for ratio, expected, texts in ((1.0, one, "thinking"), (0.0, two, "non_thinking")):
        out = tmp_path / f"out{ratio}"
        fusion = fuse_checkpoints(pair / "thinking", pair / "non_thinking", out, FusionOptions(ratio), texts_from=texts)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors(out).items())
        assert (out / "chat_template.jinja").is_file() == (texts == "non_thinking")
        record = json.loads((out / "fusion.json").read_text())
        assert (record["ratio"], record["method"], record["texts_from"]) == (ratio, "linear", texts)
        assert str(fusion) == f"{out}: linear fusion of {len(one)} tensors with {ratio:g} of the thinking model."


def test_inputs_of_two_types_give_the_type_of_the_thinking_one(folders, tmp_path):
    wide, narrow = folders(dtype="float32") / "thinking", folders(dtype="bfloat16") / "non_thinking"
    fuse_checkpoints(wide, narrow, tmp_path, FusionOptions(0.5))
    one, two = tensors(wide), tensors(narrow)
    for name, tensor in tensors(tmp_path).items():
        assert tensor.dtype == torch.float32
        assert units(tensor, 0.5 * one[name].double() + 0.5 * two[name].double()) <= 1


# Refusals


def spoilt_config(pair):
    path = pair / "non_thinking" / "config.json"
    path.write_text(path.read_text().replace('"num_experts_per_tok": 2', '"num_experts_per_tok": 1'))


def cut_off(pair):
    path = sorted((pair / "non_thinking").glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-10])


def no_header(pair):
    path = sorted((pair / "thinking").glob("*.safetensors"))[0]
    path.write_bytes(b"\xff" * 100)


def missing_shard(pair):
    sorted((pair / "non_thinking").glob("*.safetensors"))[-1].unlink()


def other_tensors(pair):
    weights = tensors(pair / "thinking")
    weights.pop("model.norm.weight")
    save_file(weights, pair / "thinking" / "model.safetensors")
    (pair / "thinking" / "model.safetensors.index.json").unlink(missing_ok=True)


def with_nan(pair):
    path = sorted((pair / "non_thinking").glob("*.safetensors"))[-1]
    weights = load_file(path)
    name = sorted(weights)[-1]
    weights[name].view(-1)[7] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})


def other_base(pair):
    for path in (pair / "non_thinking").glob("*.safetensors"):
        torch.manual_seed(1)
        save_file({name: torch.randn_like(each) for name, each in load_file(path).items()}, path, {"format": "pt"})


def other_token(pair):
    path = pair / "non_thinking" / "tokenizer.json"
    found = json.loads(path.read_text())
    found["added_tokens"].append({**found["added_tokens"][-1], "id": 5000, "content": "<|new|>"})
    path.write_text(json.dumps(found))


FAULTS = {
    "these are different models. num_experts_per_tok: 2 and 1": (spoilt_config, ValueError),
    "the file is cut off": (cut_off, ValueError),
    "this is no safetensors file, or its beginning is damaged": (no_header, ValueError),
    "weight files are missing": (missing_shard, FileNotFoundError),
    "1 tensors of .*non_thinking are missing .model.norm.weight": (other_tensors, ValueError),
    "holds values that are not finite; this model is broken": (with_nan, ValueError),
    "they are not of one base": (other_base, ValueError),
    r"1 tokens of their tokenizers differ .'<\|new\|>': id None and 5000": (other_token, ValueError),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_and_nothing_is_written(pair, fault):
    spoil, kind = FAULTS[fault]
    spoil(pair)
    with pytest.raises(kind, match=fault):
        fuse_checkpoints(pair / "thinking", pair / "non_thinking", pair / "out")
    assert not (pair / "out").exists()


OPTIONS = [
    ({"ratio": 1.2}, "ratio: found 1.2, expected the share of the thinking model"),
    ({"ratio": float("nan")}, "ratio: found nan"),
    ({"method": "dare"}, "method: 'dare' is unknown; choose one of linear, task, ties, slerp"),
    ({"groups": {"heads": 1.0}}, "groups: 'heads' is unknown"),
    ({"groups": {"router": 2.0}}, "router: found 2.0"),
    ({"density": 0.0}, "density: found 0.0"),
]


@pytest.mark.parametrize(("given", "message"), OPTIONS)
def test_options_that_make_no_sense(given, message):
    with pytest.raises(ValueError, match=message):
        FusionOptions(**given)


def test_requests_that_cannot_be_met(pair):
    one, two = pair / "thinking", pair / "non_thinking"
    with pytest.raises(ValueError, match="base: the method 'ties' needs the checkpoint that both began with"):
        fuse_checkpoints(one, two, pair / "out", FusionOptions(method="ties"))
    with pytest.raises(ValueError, match="this is one of the checkpoints that are fused"):
        fuse_checkpoints(one, two, two)
    with pytest.raises(ValueError, match=r"no weight of .* is of the kind 'shared_experts'"):
        fuse_checkpoints(one, two, pair / "out", FusionOptions(groups={"shared_experts": 1.0}))
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        fuse_checkpoints(pair / "nowhere", two, pair / "out")
    with pytest.raises(ValueError, match="texts_from: 'base' is unknown"):
        fuse_checkpoints(one, two, pair / "out", texts_from="base")


def test_a_disk_without_room(pair, monkeypatch):
    usage = shutil.disk_usage(pair)
    monkeypatch.setattr("thinkfusion.fusing.shutil.disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match="the disk is full"):
        fuse_checkpoints(pair / "thinking", pair / "non_thinking", pair / "out")
    assert not (pair / "out").exists()


def test_no_more_than_pieces_are_read(pair, monkeypatch):
    """Every read is of a piece, whatever the size of the tensor."""
    sizes = []
    whole = weight_files_module.os.preadv
    monkeypatch.setattr(
        weight_files_module.os,
        "preadv",
        lambda handle, parts, at: sizes.append(len(parts[0])) or whole(handle, parts, at),
    )
    monkeypatch.setattr("thinkfusion.weight_files.PIECE", 256)
    monkeypatch.setattr("thinkfusion.fusing.PIECE", 256)
    fuse_checkpoints(pair / "thinking", pair / "non_thinking", pair / "out")
    assert len(sizes) > 100
    assert max(sizes) <= 4 * 256


# Adapters


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> Path:
    """Two adapters of the embedded base, on attention, experts and routers, of other ranks."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, rank) in enumerate((("thinking", 4), ("non_thinking", 3))):
        model, tokenizer = load_checkpoint("tiny-base")
        install_chat_template(tokenizer, model)
        settings = {"r": rank, "lora_alpha": 5, "train_router": True, "use_rslora": seed == 1}
        adapted = get_peft_model(model, lora_config(model, tokenizer, **settings))
        torch.manual_seed(seed)
        for _, weight in adapted.named_parameters():
            if weight.requires_grad:
                weight.data.normal_(0, 0.05)
        export_checkpoint(adapted, tokenizer, folder / name, adapters_only=True)
    return folder


def test_adapters_are_fused_by_their_updates(adapters, tmp_path):
    fuse_adapters(adapters / "thinking", adapters / "non_thinking", tmp_path, R)
    places = ("tiny-base", adapters / "thinking", adapters / "non_thinking", tmp_path)
    base, one, two, fused = (load_checkpoint(place, dtype="float32")[0].state_dict() for place in places)
    moved = 0
    for name, tensor in fused.items():
        if "embed" in name or "lm_head" in name:
            expected = R * one[name] + (1 - R) * two[name]
        else:
            expected = base[name] + R * (one[name] - base[name]) + (1 - R) * (two[name] - base[name])
            moved += not torch.equal(expected, base[name])
        assert torch.allclose(tensor, expected, atol=2e-5, rtol=0), name
    assert moved >= 4 * 7
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 7


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("base_model_name_or_path", "other", "base_model_name_or_path is 'tiny-base' and 'other'"),
        ("use_dora", True, "use_dora is True; such adapters are not fused by their factors"),
        ("peft_type", "IA3", "found an adapter of the type IA3"),
        ("trainable_token_indices", None, "trainable_token_indices is"),
    ],
)
def test_adapters_that_do_not_fit(adapters, tmp_path, name, value, message):
    other = tmp_path / "other"
    shutil.copytree(adapters / "non_thinking", other)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises(ValueError, match=message):
        fuse_adapters(adapters / "thinking", other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Sweeps


def test_a_model_in_memory_is_the_one_on_the_disk(folders, tmp_path):
    folder = folders("mixtral", "bfloat16")
    options = FusionOptions(0.4, "ties", density=0.5)
    inputs = (folder / "thinking", folder / "non_thinking")
    fuse_checkpoints(*inputs, tmp_path, options, base=folder / "base")
    written = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    made = fused_model(*inputs, options, base=folder / "base").state_dict()
    assert made.keys() == written.keys()
    assert all(torch.equal(made[name], written[name]) for name in written)
    state = fused_state(*inputs, options, base=folder / "base")
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors(tmp_path).items())


class Report:
    def __init__(self, errors, marks):
        modes = zip(("thinking", "non_thinking"), errors, marks, strict=True)
        interval = {"format_error_interval": [0, 1], "accuracy_interval": [0, 1]}
        self.modes = {mode: {"format_error": error, "accuracy": mark, **interval} for mode, error, mark in modes}


def test_the_best_ratio_breaks_no_mode_first(tmp_path):
    reports = {
        0.2: Report((0.5, 0.0), (0.9, 0.9)),
        0.5: Report((0.0, 0.0), (0.5, 0.6)),
        0.7: Report((0.0, 0.0), (0.7, 0.4)),
        0.9: Report((0.0, 0.01), (1.0, 1.0)),
    }
    assert Sweep(reports).best == 0.7
    assert Sweep({0.1: reports[0.2], 0.4: reports[0.9]}).best == 0.4
    unmarked = {ratio: Report((0.0, 0.0), (None, None)) for ratio in (0.3, 0.6)}
    assert Sweep(unmarked).best == 0.6
    shown = str(Sweep(reports)).splitlines()
    assert [line.endswith("best") for line in shown[1:5]] == [False, False, True, False]


def test_ratios():
    assert ratios_of("0:1:0.1") == [round(0.1 * step, 1) for step in range(11)]
    assert ratios_of("0.7:0.9:0.05") == [0.7, 0.75, 0.8, 0.85, 0.9]
    for text in ("0:1", "0:1.1:0.1", "1:0:0.1", "0:1:0", "a:b:c", "0:0.5:0.6"):
        with pytest.raises(ValueError, match=f"sweep: found '{text}'"):
            ratios_of(text)


def trained(name, folder):
    """A checkpoint with the switch, moved a little from the base."""
    model, tokenizer = load_checkpoint("tiny-base")
    install_chat_template(tokenizer, model)
    torch.manual_seed(len(name))
    for weight in model.parameters():
        weight.data += 0.01 * torch.randn_like(weight)
    export_checkpoint(model, tokenizer, folder / name)
    return folder / name


def test_the_command_fuses_and_sweeps(tmp_path, capsys):
    one, two = (str(trained(name, tmp_path)) for name in ("thinking", "non_thinking"))
    out = tmp_path / "out"
    assert main(["fuse", one, two, "--ratio", "0.6", "--router", "1", "--output", str(out)]) == 0
    assert "tensors with 0.6 of the thinking model, 4 tensors with 1 of the thinking model" in capsys.readouterr().out
    load_checkpoint(out)
    assert main(["fuse", one, two, "--ratio", "1.6", "--output", str(tmp_path / "no")]) == 1
    assert capsys.readouterr().err.startswith("thinkfusion fuse: ratio: found 1.6")
    assert main(["fuse", one, two, "--ratio", "1", "--sweep", "0:1:1", "--output", str(tmp_path / "no")]) == 1
    swept = tmp_path / "swept"
    flags = ["--sweep", "0:1:0.5", "--samples", "4", "--max_new_tokens", "8", "--output", str(swept)]
    assert main(["fuse", one, two, *flags]) == 0
    found = json.loads((swept / "sweep.json").read_text())
    assert [point["ratio"] for point in found["points"]] == [0, 0.5, 1]
    assert json.loads((swept / "fusion.json").read_text())["ratio"] == found["best"]
    assert (swept / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("best") == 2
    proof = json.loads((swept / "mode_report.json").read_text())
    assert proof["weights"] == weights_digest(swept)
    winner = next(point for point in found["points"] if point["ratio"] == found["best"])
    assert {mode: each["classes"] for mode, each in proof["modes"].items()} == {
        mode: each["classes"] for mode, each in winner["modes"].items()
    }
    report = sweep_ratios(one, two, [0.5], samples=4, max_new_tokens=8, progress=False).reports[0.5]
    for mode, figures in found["points"][1]["modes"].items():
        for name in ("classes", "format_error", "accuracy", "reasoning_tokens", "tasks"):
            assert report.modes[mode][name] == figures[name], name


def test_the_command_fuses_adapters(adapters, tmp_path, capsys):
    inputs = [str(adapters / name) for name in ("thinking", "non_thinking")]
    assert main(["fuse", *inputs, "--output", str(tmp_path / "out")]) == 0
    assert "an adapter with the ranks of both, and 0.8" in capsys.readouterr().out
    assert main(["fuse", *inputs, "--method", "slerp", "--output", str(tmp_path / "no")]) == 1
    assert "adapters are fused linearly" in capsys.readouterr().err


def test_names_of_flags_are_those_of_the_options():
    assert FUSION_METHODS == METHODS
    assert set(FUSION_GROUPS) < set(GROUPS)
