# SPDX-License-Identifier: Apache-2.0
"""Fusion trees as they are shown: roles, figures, terminal and picture; and the page about them, which is run."""

import json
import random
import re
from dataclasses import fields
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from tests.families import CASES, family_tokenizer
from tests.test_inspect import ESCAPE, Page
from tests.tiny_models import BRANCHING, NOT_BRANCHING, random_conversation
from thinkfusion import Mode, Renderer, ThinkFusionConfig, expand, fusion_tree, prepare
from thinkfusion.cli import main
from thinkfusion.displaying import COLOURS
from thinkfusion.inspecting import roles_of
from thinkfusion.packing import Layout, PackedRows
from thinkfusion.row_report import UNPRINTABLE
from thinkfusion.tree_drawing import HEADER, LETTERS, Labelled, columns, sketch, strips
from thinkfusion.trees import TrainingSequence

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "fusion_tree.json"
GUIDE = (ROOT / "examples" / "fusion_trees.md").read_text(encoding="utf-8")
PAIRED = {
    "prompt": "A sea?",
    "thinking": "<think>Baltic, Red.</think>I take the Baltic.",
    "non_thinking": "The Red Sea.",
}


def messages(*turns):
    """Messages of turns given as (question, reasoning, answer)."""
    for question, reasoning, answer in turns:
        yield {"role": "user", "content": question}
        yield {"role": "assistant", "content": answer, **({"reasoning_content": reasoning} if reasoning else {})}


CHAT = {"messages": list(messages(("One?", "Hm one.", "1."), ("Two?", None, "2."), ("Three?", "Hm three.", "3.")))}


@pytest.fixture
def inspect(tmp_path, monkeypatch, capsys):
    """Writes rows to a file, runs the command on it at 80 columns, and returns what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(rows, *flags):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        Path("rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        status = main(["inspect", "rows.jsonl", *map(str, flags)])
        out, err = capsys.readouterr()
        assert status == 0, err
        return out

    return run


@pytest.fixture
def trees(inspect):
    """The figures of the trees of rows."""
    return lambda rows, *flags: json.loads(inspect(rows, "--tree", "--json", *flags))["trees"]


def drawing(conversation, renderer):
    """The sketch of a conversation whose exchanges have their modes."""
    labelled = [
        Labelled(
            TrainingSequence(np.array(each.ids, dtype=np.int32), np.array(each.labels, dtype=np.int32), each.mode),
            roles_of(renderer, conversation, target),
            tuple(sorted(target.trained)),
        )
        for target, each in zip(renderer.targets(conversation), renderer.render([conversation])[0], strict=True)
    ]
    return labelled, sketch(labelled, renderer.tokenizer)


# --- what is drawn ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dialect", "scheme"), CASES)
def test_every_token_has_a_role_that_agrees_with_the_loss(dialect, scheme):
    renderer, draw = Renderer(family_tokenizer(dialect, scheme)), random.Random(f"{dialect} {scheme}")
    for turns in (1, 2, 4):
        parallel = not renderer.template.dialect.calls.own_message
        conversation = random_conversation(draw, turns=turns, parallel=parallel)
        labelled, drawn = drawing(conversation, renderer)
        for each in labelled:
            assert set(each.roles) <= {*LETTERS, HEADER}
            trained = [role in ("reasoning", "answer") for role in each.roles]
            assert trained == [bool(label != -100) for label in each.sequence.labels]
            if each.sequence.mode is Mode.NON_THINKING:
                assert "reasoning" not in each.roles
        assert {role for role in (run.role for runs in drawn.runs for run in runs)} <= set(LETTERS)


@pytest.mark.parametrize(("dialect", "scheme"), CASES)
def test_the_drawing_is_the_tree_of_training_token_for_token(dialect, scheme):
    renderer, draw = Renderer(family_tokenizer(dialect, scheme)), random.Random(f"{scheme} {dialect}")
    parallel = not renderer.template.dialect.calls.own_message
    conversation = random_conversation(draw, turns=3, parallel=parallel)
    _, drawn = drawing(conversation, renderer)
    tree = fusion_tree(conversation, renderer.tokenizer)
    assert np.array_equal(drawn.tree.ids, tree.ids)
    assert (drawn.tree.forks, drawn.tree.lengths, drawn.tree.modes) == (tree.forks, tree.lengths, tree.modes)
    for runs, length in zip(drawn.runs, tree.lengths, strict=True):
        assert [run.start for run in runs] == np.cumsum([0, *(run.tokens for run in runs)])[:-1].tolist()
        assert sum(run.tokens for run in runs) == length
    assert sum(drawn.trained().values()) == sum(sum(each.trained) for each in expand(tree))
    assert sorted(drawn.sequences) == sorted(len(each.ids) for each in expand(tree))
    placed = [node for _, nodes in drawn.branches() for node in nodes]
    assert sorted(placed) == list(range(1, len(tree.lengths)))


def test_a_sequence_without_trained_tokens_is_in_no_figure():
    renderer = Renderer(family_tokenizer("chatml"))
    labelled, drawn = drawing(random_conversation(random.Random(1), turns=2), renderer)
    first = labelled[0].sequence
    untrained = labelled[0]._replace(sequence=first._replace(labels=np.full_like(first.labels, -100)))
    again = sketch([*labelled, untrained], renderer.tokenizer)
    assert (again.sequences, again.runs) == (drawn.sequences, drawn.runs)


def test_roles_of_a_tool_loop_and_of_history(inspect):
    call = {"type": "function", "function": {"name": "now", "arguments": {}}}
    talk = [
        *messages(("First?", None, "One.")),
        {"role": "user", "content": "Time?"},
        {"role": "assistant", "content": "", "reasoning": "I look.", "tool_calls": [call]},
        {"role": "tool", "content": "noon"},
        {"role": "assistant", "content": "Noon.", "reasoning": "It says noon."},
    ]
    tools = [{"type": "function", "function": {"name": "now", "parameters": {}}}]
    out = inspect([{"messages": talk, "tools": tools}], "--tree", "--scheme", "empty-block")
    shown = re.findall(r"^  [│╰ ] ?[│╵]? (\w+) +(.*?) +\d+(?: +\d+)?$", out, re.MULTILINE)
    roles = [role for role, _ in shown]
    assert roles == [
        *("system", "user", "prefix", "answer", "history", "user"),
        *("prefix", "reasoning", "answer", "untrained", "reasoning", "answer"),
        *("prefix", "prefix", "answer", "untrained", "prefix", "answer"),
    ]
    assert "One." in shown[4][1]
    assert "Time?" in shown[5][1]
    assert "noon" in shown[9][1]


@pytest.mark.parametrize(
    ("row", "flags", "nodes"),
    [
        (CHAT, [], [([1, 2, 3], "non_thinking"), ([1], "thinking"), ([3], "thinking")]),
        (CHAT, ["--mixture", "combined"], [([2], "non_thinking"), ([1], "thinking"), ([3], "thinking")]),
        (CHAT, ["--scheme", "empty-block"],
         [([], None), ([1], "thinking"), ([1], "non_thinking"), ([2], "non_thinking"), ([3], "thinking"),
          ([3], "non_thinking")]),
        (PAIRED, [], [([1], "non_thinking"), ([1], "thinking")]),
        (PAIRED, ["--scheme", "empty-block"], [([], None), ([1], "thinking"), ([1], "non_thinking")]),
        ({"question": "Who?", "answer": "Me."}, [], [([1], "non_thinking")]),
        ({"question": "Who?", "answer": "Me."}, ["--scheme", "empty-block"], [([1], "non_thinking")]),
    ],
)  # fmt: skip
def test_nodes_of_a_row(trees, row, flags, nodes):
    (tree,) = trees([row], *flags)
    assert [(node["turns"], node["mode"]) for node in tree["nodes"]] == nodes
    assert tree["tokens"] == sum(node["tokens"] for node in tree["nodes"])
    assert sum(tree["trained"].values()) == sum(node["trained"] for node in tree["nodes"])
    assert tree["sequences"] == sum(1 for node in tree["nodes"] if node["turns"])


@pytest.mark.parametrize("flags", [[], ["--scheme", "empty-block"], ["--mixture", "ratio", "--ratio", "0.5"]])
def test_the_figures_are_those_of_the_rows_that_training_packs(trees, flags, base_tokenizer):
    from thinkfusion import MixtureOptions, install_chat_template

    rows = [CHAT, {"messages": list(messages(("Four?", None, "4."), ("Five?", "Hm five.", "5.")))}]
    scheme = "empty-block" if "empty-block" in flags else "control"
    install_chat_template(base_tokenizer, scheme=scheme)
    mixture = MixtureOptions("ratio", ratio="0.5") if "ratio" in flags else MixtureOptions()
    found = trees(rows, *flags)
    dataset, _ = prepare("rows.jsonl", base_tokenizer, mixture=mixture)
    packed = PackedRows(dataset, Layout(non_thinking_trunk=scheme == "control"))
    assert sorted(tree["tokens"] for tree in found) == sorted(len(packed[index][0]) for index in range(len(packed)))
    assert sum(tree["tokens"] for tree in found) == packed.report.tokens
    assert sum(tree["sequence_tokens"] for tree in found) == packed.report.sequence_tokens


def test_what_the_mixture_leaves_out_is_in_no_tree(trees, inspect):
    rows = [{"question": f"{number}?", "reasoning": "Hm. " * number, "answer": "Yes."} for number in range(1, 4)]
    kept = trees(rows, "--max_rows_per_source", "1")
    assert len(kept) == 1
    other = next(number for number in (1, 2, 3) if number != kept[0]["row"])
    assert trees(rows, "--max_rows_per_source", "1", "--row", other) == []
    assert "the mixture leaves it out" in inspect(rows, "--max_rows_per_source", "1", "--row", other, "--tree")


def test_copies_of_a_row_are_trees_of_their_own(trees, inspect):
    (tree,) = trees([CHAT], "--weights", "3")
    assert tree["copies"] == 3
    assert "trained 3 times, each in a tree of its own" in inspect([CHAT], "--tree", "--weights", "3")
    rows = [{"question": "Who?", "answer": "Me."}, {"question": "Why?", "reasoning": "Hm.", "answer": "So."}]
    assert [tree["copies"] for tree in trees(rows, "--weights", "1")] == [1, 1]


def test_closed_traces_are_untrained(inspect):
    row = {"question": "How?", "reasoning": "One. " * 60, "answer": "So."}
    out = inspect([row], "--tree", "--close_at", "20")
    assert re.search(r"│ untrained +One\. ", out)
    assert re.search(r"reasoning +⟦</think>⟧ +1 +1$", out, re.MULTILINE)


def test_the_keys_are_there_only_if_asked_for(inspect):
    assert "trees" not in json.loads(inspect([CHAT], "--json"))
    assert json.loads(inspect([CHAT], "--json", "--tree", "--samples", "0"))["trees"] == []


# --- in a terminal ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 60, 130])
@pytest.mark.parametrize("colour", ["never", "always"])
def test_lines_fit_the_terminal_in_any_script_and_without_colours(inspect, monkeypatch, width, colour):
    monkeypatch.setenv("COLUMNS", str(width))
    rows = [
        {"question": "가나다 라마바사 " * 12 + "🏙️" * 9, "reasoning": "word " * 150, "answer": "👨‍👩‍👧y" * 60},
        {"messages": list(messages(*[(f"{turn}?", "Hm. " * turn, "Yes. " * 9) for turn in range(14)]))},
    ]
    out = inspect(rows, "--tree", "--color", colour)
    plain = re.sub("\x1b\\[[0-9;]*m", "", out)
    # What stands above and below, the account, is not cut to a width, but for 80 columns.
    shown = [line for line in plain[plain.index("capitals") :].splitlines() if width >= 80 or re.search("[│╮╵└]", line)]
    widths = [sum(map(columns, line)) for line in shown]
    assert max(widths) <= width
    assert max(widths) > min(width, 110) - 4
    figures = [line for line in shown if re.match(r"  [│├╰ ]", line) and "└" not in line]
    assert {sum(map(columns, line)) for line in figures if re.search(r"\d {3,}\d+$", line)} == {min(width, 110)}
    assert ("\x1b[36m" in out) == (colour == "always")
    assert ("⟦<think>⟧" in out) == (colour == "never")


def test_colours_are_those_of_the_roles_in_the_loss(inspect):
    out = inspect([CHAT], "--tree", "--color", "always")
    assert f"\x1b[{COLOURS['reasoning']}mHm one.\x1b[0m\x1b[{COLOURS['reasoning']};7m</think>\x1b[0m" in out
    assert f"\x1b[{COLOURS['answer']}m1.\x1b[0m" in out
    assert f"\x1b[{COLOURS['prompt']}muser" in out


def test_branches_hang_where_they_fork(inspect):
    out = inspect([CHAT], "--tree", "--json")
    forks = [node["fork"] for node in json.loads(out)["trees"][0]["nodes"]]
    lines = inspect([CHAT], "--tree").splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("  trunk, non-thinking"))
    seen, sees = 0, []
    for line in lines[start + 1 :]:
        on_trunk = re.match(r"  [│╵] \w+ +.*? (\d+)(?: +\d+)?$", line)
        branch = re.match(r"  [├╰]─╮ turn \d, thinking: sees (\d+) of the trunk", line)
        if on_trunk:
            seen += int(on_trunk[1])
        elif branch:
            assert int(branch[1]) == seen
            sees.append(seen)
    assert sees == forks[1:]


def test_strips_are_to_scale_and_begin_at_the_fork():
    renderer = Renderer(family_tokenizer("chatml"))
    _, drawn = drawing(random_conversation(random.Random(3), turns=4, tools=True), renderer)
    for width in (40, 100, 10_000):
        scale = -(-max(drawn.sequences) // width)
        for (start, letters), fork, length in zip(
            strips(drawn, width), drawn.tree.forks, drawn.tree.lengths, strict=True
        ):
            assert start == fork // scale
            assert start + len(letters) == -(-(fork + length) // scale) <= width
    exact = strips(drawn, 10_000)
    assert exact[0][1] == "".join(LETTERS[run.role] * run.tokens for run in drawn.runs[0])


def test_nothing_from_the_data_reaches_the_terminal_or_the_page_as_a_command(inspect):
    evil = f'a{ESCAPE}\r\u202e\x07 ⟦</think>⟧ </think> <script>alert("1")</script> &amp; $title \ufffe'
    row = {"question": evil, "reasoning": evil.replace("</think>", ""), "answer": f"d{ESCAPE}\x9b <b>\uffff"}
    out = inspect([row], "--tree", "--html", "page.html", "--svg", "deep/tree.svg")
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", out)
    assert "⟦</think>⟧ </think>" not in out
    picture, page = Path("deep/tree.svg").read_text(), Path("page.html").read_text()
    assert not UNPRINTABLE.search(picture + page)
    titles = [element.text for element in ElementTree.fromstring(picture).iter() if element.tag.endswith("title")]
    assert sum("<script>" in title for title in titles) >= 2
    assert not any("⟦</think>⟧ </think>" in title for title in titles)
    parsed = Page(page)
    assert parsed.open == parsed.links == []
    assert not {tag for tag, _ in parsed.tags} & {"script", "img", "a"}


# --- the picture ------------------------------------------------------------------------------------------------


def bars(picture):
    """(kind, x, y, width) of every bar."""
    found = re.findall(r'<rect class="(\w+)" x="([\d.]+)" y="(\d+)" width="([\d.]+)" height="28"', picture)
    return [(kind, float(x), int(y), float(width)) for kind, x, y, width in found]


@pytest.mark.parametrize("scheme", ["control", "empty-block"])
def test_the_picture_is_to_scale_and_no_line_crosses_a_branch(inspect, scheme):
    flags = ["--tree", "--scheme", scheme, "--svg", "tree.svg"]
    (tree,) = json.loads(inspect([CHAT], *flags, "--json"))["trees"]
    picture = Path("tree.svg").read_text()
    rows: dict[int, list] = {}
    for kind, x, y, width in bars(picture):
        rows.setdefault(y, []).append((kind, x, width))
    assert len(rows) == len(tree["nodes"])
    scale = (960 - 176 - 16) / tree["longest_sequence"]
    ends = {y: (row[0][1], row[-1][1] + row[-1][2]) for y, row in rows.items()}
    wanted = [(176 + node["fork"] * scale, node["tokens"] * scale) for node in tree["nodes"]]
    for start, end in ends.values():
        assert any(abs(start - x) < 0.2 and abs(end - start - width) < 0.5 for x, width in wanted)
    lines = re.findall(r'<path class="line" d="M([\d.]+) \d+ V(\d+)"/>', picture)
    assert len(lines) == len(tree["nodes"]) - 1
    for x, end in lines:
        assert ends[int(end)][0] == pytest.approx(float(x))
        crossed = [y for y, (start, stop) in ends.items() if min(ends) < y < int(end) and start + 0.2 < float(x) < stop]
        assert crossed == []


def test_all_of_the_picture_is_inside_it():
    picture = ElementTree.fromstring((ROOT / "examples" / "fusion_tree.svg").read_text(encoding="utf-8"))
    _, _, width, height = map(int, picture.get("viewBox").split())
    texts = [element for element in picture.iter() if element.tag.endswith("text")]
    for text in texts:
        start = float(text.get("x")) - (20 if text.get("text-anchor") == "middle" else 0)
        assert 0 <= start < start + 6.4 * len(text.text) <= width + 6.4, text.text
        assert float(text.get("y")) < height


def test_the_page_has_the_picture_of_each_row_in_its_own_colours(inspect):
    inspect([CHAT, {"messages": CHAT["messages"][:2]}], "--tree", "--html", "page.html")
    page = Path("page.html").read_text()
    assert page.count("<svg ") == 2
    assert page.count("<style") == 1
    inspect([CHAT], "--html", "page.html")
    assert "<svg " not in Path("page.html").read_text()


def test_a_picture_of_nothing_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(json.dumps(CHAT))
    assert main(["inspect", "rows.jsonl", "--samples", "0", "--svg", "tree.svg"]) == 1
    assert "there is no tree to draw" in capsys.readouterr().err
    assert not Path("tree.svg").exists()


# --- the guide --------------------------------------------------------------------------------------------------


def test_the_guide_s_command_draws_its_picture_and_prints_its_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "80")
    (command,) = re.findall(r"```bash\nthinkfusion (.*)\n```", GUIDE)
    picture = "examples/fusion_tree.svg"
    assert command.endswith(picture)
    assert main(command.replace(picture, str(tmp_path / "tree.svg")).split()) == 0
    assert (tmp_path / "tree.svg").read_text() == Path(picture).read_text()
    printed = iter(capsys.readouterr().out.splitlines())
    shown = re.search(r"```bash\n.*?\n```\n.*?```\n(.*?)```", GUIDE, re.DOTALL)[1].splitlines()
    assert len(shown) > 15
    assert all(line in printed for line in shown if line != "  …")


def test_the_guide_s_python_prints_what_it_shows(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    names: dict = {}
    first, growth = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    exec(first, names)
    assert f"```python\n{first}```\n\n```\n{capsys.readouterr().out}```" in GUIDE
    exec(growth, names)
    table = capsys.readouterr().out
    assert table.count("\n") == 12
    assert f"|---|---|---|---|---|---|---|\n{table}\n" in GUIDE


def test_the_guide_names_settings_and_families_that_are_there():
    known = {field.name: field.default for field in fields(ThinkFusionConfig)}
    settings = re.findall(r"^\| `(\w+)` \| (\S+) \|", GUIDE, re.MULTILINE)
    assert len(settings) == 4
    for name, default in settings:
        assert str(known[name]).lower() == default.strip("`")
    listed = set(
        re.findall(r"`(\w+)`", GUIDE[GUIDE.index("cannot branch. So") : GUIDE.index("get `padded` sequences")])
    )
    assert listed == set(NOT_BRANCHING)
    assert not set(BRANCHING) & listed


def test_the_example_has_three_turns_and_a_tool_call():
    (row,) = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    roles = [message["role"] for message in row["messages"]]
    assert roles.count("user") == 3
    assert roles.count("tool") == 1
