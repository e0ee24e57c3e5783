# SPDX-License-Identifier: Apache-2.0
"""Exports of tiny models of eleven families, trained with LoRA on their experts, in real vLLM.

The last tests fail when vLLM or transformers mends what our export, or these tests, work around.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.serving import exports
from tests.serving.environments import find

VLLM = find("vllm")
pytestmark = pytest.mark.skipif(VLLM.python is None, reason=VLLM.reason)
CANNOT_RUN = ("minimax_m2",)
RUN = [family for family in exports.FAMILIES if family not in CANNOT_RUN]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the script says of all families, by family."""
    file = tmp_path_factory.mktemp("exports") / "all.json"
    command = [sys.executable, exports.__file__, "--engine", "vllm", "--family", "all", "--json", str(file)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return {result["family"]: result for result in json.loads(file.read_text())}


@pytest.mark.parametrize("family", RUN)
def test_vllm_says_what_transformers_says(found, family):
    result = found[family]
    if family == "ernie4_5_moe":  # with its correction bias: below
        result = exports.measure(family, str(VLLM.python), zero_bias=True)
    assert result["loaded"], result["reason"]
    assert result["prompts"] == exports.PROMPTS
    assert result["largest_difference"] <= exports.TOLERANCE
    assert result["tokens_equal"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder of an export of a family, made once."""
    made: dict[str, Path] = {}

    def export(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            exports.export_trained(family, made[family])
        return made[family]

    return export


def asked(folder, **options):
    prompts = exports.prompts_of(folder / "checkpoint")[:2]
    return exports.vllm_says(folder, prompts, str(VLLM.python), options), prompts


# What vLLM cannot do on a CPU


def test_minimax_m2_is_loaded_and_not_run(found):
    """vLLM 0.32 chooses experts on a CPU by softmax only, where they are in no groups."""
    result = found["minimax_m2"]
    assert result["loaded"]
    assert 'assert self.scoring_func == "softmax"' in result["reason"]


def test_vllm_leaves_out_the_correction_bias_of_ernie(found):
    """The same path has no bias, so that other experts are chosen; without one all is equal, as tested above."""
    assert found["ernie4_5_moe"]["loaded"]
    assert found["ernie4_5_moe"]["largest_difference"] > exports.TOLERANCE


def test_vllm_rotates_queries_of_compressed_attention_wrongly(exported):
    """With its own kernel; `exports.NATIVE_ROTATION` switches it off."""
    folder = exported("deepseek_v3")
    answer, prompts = asked(folder)
    expected = exports.transformers_says(folder / "checkpoint", prompts)
    result = exports.compared(expected, answer["replies"], prompts)
    assert result["differences"]["prompt"] > exports.TOLERANCE
    # Nothing but the rotation: a first token attends to itself alone.
    for mine, other in zip(expected, answer["replies"], strict=True):
        assert abs(mine["log_probs"][0] - other["log_probs"][0]) < exports.TOLERANCE


KERNEL = """
import torch
import vllm._custom_ops as ops
draw = torch.Generator().manual_seed(0)
query, key = torch.randn(3, 4, 64, generator=draw), torch.randn(3, 1, 64, generator=draw)
angles = torch.arange(3)[:, None] / 10000 ** (torch.arange(0, 64, 2) / 64)
cache = torch.cat([angles.cos(), angles.sin()], -1)
def turned(given):
    even, odd = given[..., ::2], given[..., 1::2]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
expected = turned(query)
for shape in ((3, 256), (3, 4, 64)):
    given = query.clone().view(shape)
    other = key.clone().view((3, 64) if len(shape) == 2 else (3, 1, 64))
    ops.rotary_embedding(torch.arange(3), given, other, 64, cache, False)
    print(float((given.view(3, 4, 64) - expected).abs().max()))
"""


def test_the_kernel_that_rotates_wrongly():
    """A flat query is rotated right, the same one by heads is not: the rule needs no model to be shown."""
    done = subprocess.run([VLLM.python, "-c", KERNEL], check=True, capture_output=True, text=True, timeout=120)
    flat, by_heads = map(float, done.stdout.split()[-2:])
    assert flat < 1e-5
    assert by_heads > 1e-2


# What the export adds for vLLM


def without(folder, *, settings=(), weights=""):
    """The checkpoint as transformers would have written it: without these settings, and weights of that ending."""
    path = folder / "checkpoint" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in config.items() if name not in settings}))
    file = folder / "checkpoint" / "model.safetensors"
    if weights:
        kept = load_file(file)
        save_file({n: w for n, w in kept.items() if not n.endswith(weights)}, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("family", "missing"),
    [
        ("axk1", {"weights": "layers.0.post_mlp_layernorm.weight"}),
        ("deepseek_v3", {"settings": ("topk_method", "scoring_func")}),
        ("minimax_m2", {"settings": ("rotary_dim",)}),
    ],
)
def test_vllm_does_not_load_what_transformers_writes(tmp_path, family, missing):
    exports.export_trained(family, tmp_path)
    without(tmp_path, **missing)
    answer, _ = asked(tmp_path)
    assert not answer["loaded"], "vLLM loads it now: the export need not add this any more"
