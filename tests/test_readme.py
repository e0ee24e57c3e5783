# SPDX-License-Identifier: Apache-2.0
"""What the README and the guides show is run: Python as it stands (with fewer rows), files and flags looked up."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from transformers import HfArgumentParser

from recipes.sft import RecipeArguments
from thinkfusion import ThinkFusionConfig, export_checkpoint
from thinkfusion.cli import _parser, main
from thinkfusion.dialects import DIALECTS
from thinkfusion.formats import FORMATS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = {
    name: (ROOT / "examples" / f"{name}.md").read_text(encoding="utf-8") for name in ("data", "training", "families")
}
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = "\n".join(re.findall(r"```bash\n(.*?)```", "\n".join([README, *GUIDES.values()]), re.DOTALL))


def test_the_quick_start_and_the_switch_in_transformers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick, switch = PYTHON
    smaller = quick.replace("generate_samples(6400", "generate_samples(32").replace("samples=200", "samples=8")
    assert smaller != quick
    names: dict = {}
    exec(smaller, names)
    out = capsys.readouterr().out
    assert " because " in out
    assert "8 prompts per mode" in out
    export_checkpoint(names["model"], names["tokenizer"], tmp_path / "runs" / "tiny")
    exec(switch.replace("max_new_tokens=100", "max_new_tokens=5"), {})
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert len(shown) == 2
    assert "'role': 'assistant'" in shown[0]
    assert "'reasoning_content'" in shown[0]


def test_inspect_prints_what_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    (rows,) = re.findall(r"```json\n(.*?)```", GUIDES["data"], re.DOTALL)
    command, shown = re.search(
        r"```bash\nthinkfusion (inspect rows.*?)\n```\n\n```\n(.*?)```", GUIDES["data"], re.DOTALL
    ).groups()
    Path("rows.jsonl").write_text(rows, encoding="utf-8")
    assert main(command.split()) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.rstrip() for line in printed] == [line.rstrip() for line in shown.splitlines()]


def test_every_family_is_in_the_table():
    for dialect in DIALECTS.values():
        (line,) = re.findall(rf"^\| `{dialect.name}` \|.*", GUIDES["families"], re.MULTILINE)
        schemes = line.split(" | ")[3]
        assert schemes == ("both" if len(dialect.schemes) == 2 else f"`{dialect.schemes[0].name}`")
        for stop in dialect.stops:
            assert stop == "{eos}" or f"`{stop}`" in line.replace("\\|", "|")


def test_flags_are_those_of_the_recipe():
    parser = HfArgumentParser((RecipeArguments, ThinkFusionConfig))
    known = {option for action in parser._actions for option in action.option_strings}
    own_data = README[README.index("## Your own data") : README.index("## Which training")]
    own_data += GUIDES["data"] + GUIDES["training"]
    verbs = _parser()._subparsers._group_actions[0].choices
    commands = {flag for verb in ("inspect", "plan", "routes", "fuse") for flag in verbs[verb]._option_string_actions}
    launched = {"--num_processes", "--config", "--gsm8k", "--temperature", "--kills"}
    assert set(re.findall(r"--\w[\w-]+", own_data)) - known <= commands | launched


def test_formats_and_modules_are_named():
    assert all(f"\n| `{name}` | " in GUIDES["data"] for name in FORMATS)
    listed = README[README.index("## Where things are") :]
    assert set(re.findall(r"`(\w+)`", listed)) == {path.stem for path in (ROOT / "thinkfusion").glob("[!_]*.py")}


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:recipes|examples|thinkfusion)/[\w./-]+\.\w+", README))))
def test_named_files_are_there(path):
    assert (ROOT / path).is_file()


def _anchors(text: str) -> set[str]:
    """The names that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_guides_are_linked_and_their_links_are_there():
    assert len(README.splitlines()) <= 250
    guides = [ROOT / "README.md", *sorted((ROOT / "examples").rglob("*.md"))]
    assert len(guides) > 15
    for guide in guides:
        text = guide.read_text(encoding="utf-8")
        for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
            aim = guide.parent / path if path else guide
            assert aim.exists(), f"{guide.name}: {path}"
            if anchor:
                assert anchor in _anchors(aim.read_text(encoding="utf-8")), f"{guide.name}: {path}#{anchor}"
        if guide.parent == ROOT / "examples" and guide.stem != "fusion_trees":
            assert f"(examples/{guide.name})" in README, guide.name


def test_the_table_of_real_language_is_what_was_measured():
    named = {"TRL's own template": "trl", "ours without that treatment": "no-treatment", "ours": "default"}
    results = json.loads((ROOT / "examples/real_language/results/comparison.json").read_text(encoding="utf-8"))
    table = re.findall(r"^\| ([\d,]+), ([\w' ]+) \| (.*) \|$", README, re.MULTILINE)
    assert {recipe for _, recipe, _ in table} == set(named)
    for rows, recipe, shown in table:
        points = [each for each in results if (each["recipe"], f"{each['rows']:,}") == (named[recipe], rows)]
        cells = []
        for name in ("gsm8k", "alpaca"):
            for mode in ("thinking", "non_thinking"):
                classes = sum((Counter(point["sets"][name][mode]["classes"]) for point in points), Counter())
                finished = classes.total() - classes["truncated"]
                cells.append(f"{finished - classes['ok']} of {finished}")
        assert shown.replace("*", "") == " | ".join(cells), (rows, recipe)


def test_commands_are_understood():
    verbs = re.findall(r"thinkfusion (evaluate|chat|inspect|plan|routes|push) ([^\n#]*)", SHELL)
    assert len(verbs) >= 5
    for verb, flags in verbs:
        _parser().parse_args([verb, *flags.replace("'####'", "####").split()])
    published = (ROOT / "examples" / "publishing.md").read_text(encoding="utf-8")
    for line in re.findall(r"^thinkfusion ([^#\n]*)", published, re.MULTILINE):
        _parser().parse_args(line.split())
    pairs = (ROOT / "examples" / "pairs.md").read_text(encoding="utf-8")
    made = re.findall(r"^thinkfusion (generate-pairs [^#]*?[^\\])$", pairs, re.MULTILINE)
    assert len(made) >= 2
    for line in made:
        _parser().parse_args(line.replace("\\\n", " ").split())
    targets = set(re.findall(r"make (\w+)", SHELL))
    makefile = (ROOT / "Makefile").read_text()
    assert targets == {"demo", "test"}
    assert all(f"\n{target}: setup" in makefile for target in targets)
