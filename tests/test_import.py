# SPDX-License-Identifier: Apache-2.0
"""What importing the package costs, its public names, and the order of its modules."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import thinkfusion

FOLDER = Path(thinkfusion.__file__).parent
# Each module imports only from those before it.
ORDER = [
    *("modes", "tasks", "reading", "texts", "tool_calls", "messages", "conversations", "formats", "sources"),
    *("row_report", "records", "mixture", "shortening", "dialects", "chat_templates", "tokenising", "rendering"),
    *("sequences", "storing", "following", "preparing", "trees", "tree_attention", "packing", "weighting", "mode_sums"),
    *(
        "moe",
        "trainable",
        "four_bit",
        "quantising",
        "routing",
        "route_counting",
        "route_verdict",
        "route_drawing",
        "balance",
        "budget",
        "sampling_defaults",
        "shrinking",
        "generation",
        *("grading", "intervals", "prompts", "rewards", "replying", "leakage", "transcripts", "obedience", "flipping"),
        *("budget_curve", "probing", "mode_verdict", "evaluation", "digests", "reporting", "comparing", "report_plots"),
        *("report_page", "harness", "preferences", "appending"),
        *("endpoint", "endpoint_presets", "endpoint_reading", "endpoint_replying"),
    ),
    *(
        "checkpointing",
        "self_distillation",
        "exporting",
        "weight_files",
        "fusing",
        "adapter_fusing",
        "sweeping",
        "saving",
        "card_facts",
        "model_card",
        "publishing",
        "activations",
        "planning",
        "qlora",
        "sharding",
        "launching",
        "control_tokens",
        "configuration",
        "callbacks",
        "safe_training",
        "hub_training",
        "training",
        *("grpo_configuration", "grpo"),
        "tree_drawing",
        "inspecting",
        "displaying",
        "flags",
        "endpoint_verb",
        "evaluate_verb",
        "chat_verb",
        "pairs_verb",
        "cli",
    ),
]


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout


def test_importing_the_package_loads_neither_torch_nor_transformers():
    heavy = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers", "pyarrow"}
    code = "import sys, thinkfusion; dir(thinkfusion); print(*{name.split('.')[0] for name in sys.modules})"
    loaded = set(python(code).split())
    assert "thinkfusion" in loaded
    assert not loaded & heavy


@pytest.mark.parametrize("module", ["modes", "tasks", "conversations", "records", "mixture", "dialects", "cli"])
def test_light_modules_load_neither_torch_nor_transformers(module):
    code = f"import sys, thinkfusion.{module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    assert not set(python(code).split()) & {"torch", "transformers"}


def test_every_public_name_resolves():
    for name in thinkfusion.__all__:
        assert getattr(thinkfusion, name) is not None, name
    assert len(set(thinkfusion.__all__)) == len(thinkfusion.__all__)
    assert dir(thinkfusion) == sorted(thinkfusion.__all__)


def test_a_public_name_is_that_of_its_module():
    assert thinkfusion.Mode is import_module("thinkfusion.modes").Mode
    assert thinkfusion.reply is import_module("thinkfusion.generation").reply
    for name in thinkfusion.__all__[1:]:
        assert getattr(thinkfusion, name).__module__.startswith("thinkfusion."), name


def test_type_checkers_see_the_same_names():
    tree = ast.parse((FOLDER / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.name: node.module.removeprefix("thinkfusion.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == thinkfusion._HOME


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'thinkfusion' has no attribute 'answers'"):
        _ = thinkfusion.answers
    assert not hasattr(thinkfusion, "Modes")


def test_every_module_has_a_place_in_the_order():
    assert sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__") == sorted(ORDER)


def imported(module):
    """The thinkfusion modules that `module` imports, inside functions and for type checkers too."""
    for node in ast.walk(ast.parse((FOLDER / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = [f"thinkfusion.{node.module or alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "thinkfusion":
            names = [f"thinkfusion.{thinkfusion._HOME.get(alias.name, alias.name)}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("thinkfusion."))


@pytest.mark.parametrize("module", ORDER)
def test_modules_import_only_from_those_above(module):
    above = [*ORDER[: ORDER.index(module)], "__version__"]
    assert [name for name in imported(module) if name not in above] == []
