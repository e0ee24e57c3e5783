# SPDX-License-Identifier: Apache-2.0
"""What the README shows is run: its Python as it stands (with fewer rows), its files and flags looked up."""

import re
from pathlib import Path

import pytest

from thinkfusion import export_checkpoint
from thinkfusion.cli import _parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))


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


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:recipes|examples|thinkfusion)/[\w./-]+\.\w+", README))))
def test_named_files_are_there(path):
    assert (ROOT / path).is_file()


def test_commands_are_understood():
    verbs = re.findall(r"thinkfusion (evaluate|chat) ([^\n#]*)", SHELL)
    assert len(verbs) >= 4
    for verb, flags in verbs:
        _parser().parse_args([verb, *flags.replace("'####'", "####").split()])
    targets = set(re.findall(r"make (\w+)", SHELL))
    makefile = (ROOT / "Makefile").read_text()
    assert targets == {"demo", "test"}
    assert all(f"\n{target}: setup" in makefile for target in targets)
