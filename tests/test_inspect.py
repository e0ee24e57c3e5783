# SPDX-License-Identifier: Apache-2.0
"""`thinkfusion inspect`: flags, JSON, what it shows in a terminal and on a page, and what it says of bad rows."""

import json
import re
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.families import CASES, TOOLS, family_tokenizer
from thinkfusion.cli import main
from thinkfusion.conversations import Conversation
from thinkfusion.displaying import GUTTER, _wrapped
from thinkfusion.flags import HELP, OPTIONS
from thinkfusion.inspecting import load_tokenizer, pieces_of
from thinkfusion.modes import Mode
from thinkfusion.rendering import Renderer
from thinkfusion.tree_drawing import columns

SHARED = Path(__file__).parents[2] / "shared" / "data"
ESCAPE = "\x1b[2J\x1b[31m"
GOOD = [
    {"question": "What is 2 + 2?", "reasoning": "Two and two.", "answer": "4"},
    {"question": "서울은 어디에 있나요? 🏙️", "reasoning": "한국의 수도이다. 👨‍👩‍👧", "answer": "한국입니다 🎉"},
    {"question": "And 3 + 3?", "reasoning": "Three and three.", "answer": "6"},
    {"question": "And 4 + 4?", "reasoning": "Four and four.", "answer": "8"},
]
BAD = {"question": "Hm?", "reasoning": "", "answer": ""}


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Writes rows (or lines as they are) to a file, and returns its path, relative to where it is run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NO_COLOR", raising=False)

    def write(rows, name="rows.jsonl"):
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        Path(name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return name

    return write


@pytest.fixture
def inspect(capsys):
    """Runs the command; returns the exit status, stdout and stderr."""

    def run(*arguments):
        status = main(["inspect", *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def totals(inspect):
    """The JSON of a run that ends well."""

    def run(*arguments):
        status, out, err = inspect(*arguments, "--json")
        assert status == 0, err
        assert out.count("\n") == 1
        return json.loads(out)

    return run


def blocks(out):
    """What stands beside the gutter, as (label, text)."""
    found = []
    for line in out.splitlines():
        label, bar, text = line.partition(" │")
        if bar and label.strip():
            found.append((label.strip(), text.removeprefix(" ")))
        elif bar:
            found[-1] = (found[-1][0], f"{found[-1][1]}\n{text.removeprefix(' ')}")
    return found


# --- what it says of all rows -----------------------------------------------------------------------------------


def test_json_has_the_promised_keys_and_nothing_else_is_printed(file, inspect):
    rows = [*GOOD[:2], BAD, "no json", {**GOOD[2], "reasoning": " "}]
    status, out, err = inspect(file(rows), "--json")
    found = json.loads(out)
    assert status == 0
    assert err == ""
    assert found["format"] == "columns"
    assert (found["rows_in"], found["rows_kept"]) == (5, 3)
    assert found["skipped"] == {"empty_answer": 1, "invalid_json": 1}
    assert found["altered"] == {"blank_reasoning": 1}
    assert found["tokens"]["thinking"] > found["tokens"]["non_thinking"] > 0
    assert set(found["tokens"]) == {"thinking", "non_thinking"}
    assert found["sequences"] == {"thinking": 2, "non_thinking": 3}
    assert found["account"]["total"]["rows_after"] == 5
    assert found["problems"] == []


def test_the_totals_are_those_of_training(file, totals, tokenizer):
    from thinkfusion import prepare

    name = file(GOOD)
    dataset, report = prepare(name, tokenizer)
    found = totals(name)
    trained = {"thinking": 0, "non_thinking": 0}
    for row in dataset:
        trained[tuple(Mode)[row["mode"]].value] += sum(label != -100 for label in row["labels"])
    assert found["tokens"] == trained == dict(report.tokens)
    assert found["all_tokens"] == sum(len(row["input_ids"]) for row in dataset)


def test_a_missing_mode_is_said_and_no_failure(file, inspect):
    rows = [{"question": "Who?", "answer": "Me."}]
    status, out, _ = inspect(file(rows))
    assert status == 0
    (line,) = [line for line in out.splitlines() if line.startswith("Training would stop")]
    assert "no row is trained in thinking mode" in line
    for flags in ([], ["--mixture", "ratio", "--ratio", "0.5"]):
        _, out, _ = inspect("rows.jsonl", "--json", *flags)
        found = json.loads(out)
        assert "thinking mode" in found["problems"][0]
        assert found["tokens"]["thinking"] == 0
        assert found["tokens"]["non_thinking"] > 0


def test_traces_that_are_only_closed_are_no_missing_mode(file, totals):
    assert totals(file([GOOD[0] | {"reasoning": "One. " * 60}]), "--close_at", "20")["problems"] == []


@pytest.mark.parametrize("rows", [[], [""], [BAD, BAD]])
def test_nothing_kept_is_reported_and_status_1(file, inspect, rows):
    name = file(rows)
    status, out, _ = inspect(name, "--json")
    found = json.loads(out)
    assert status == 1
    assert found["rows_kept"] == 0
    assert found["rows_in"] == sum(found["skipped"].values()) == len([row for row in rows if row])
    assert len(found["problems"]) == 1
    assert "nothing to train on" in found["problems"][0]
    status, out, _ = inspect(name, "--html", "page.html")
    assert status == 1
    assert "Training would stop: rows.jsonl: nothing to train on" in out
    assert "nothing to train on" in Path("page.html").read_text()


def test_bad_rows_are_shown_by_reason_with_what_training_needs(file, inspect):
    status, out, _ = inspect(file([*GOOD, BAD, BAD, "no json"]))
    assert status == 0
    assert "rows: 7 read = 4 kept + 3 skipped" in out
    assert out.count("rows.jsonl, row 5: skipped, empty_answer") == 1
    assert "rows.jsonl, row 6: skipped" not in out
    assert "rows.jsonl, row 7: skipped, invalid_json" in out
    assert "--on_bad_row skip --max_skipped 0.43" in out
    _, out, _ = inspect(file(GOOD))
    assert "--on_bad_row" not in out


def test_strict_ends_at_the_first_bad_row(file, inspect):
    status, out, err = inspect(file([GOOD[0], BAD]), "--strict", "--json")
    assert status == 1
    assert out == ""
    assert "rows.jsonl, row 2: answer" in err
    assert "--on_bad_row skip" in err
    assert "Traceback" not in err
    assert inspect(file(GOOD), "--strict")[0] == 0


def test_max_skipped_is_a_problem_where_it_is_given(file, inspect):
    name = file([*GOOD, BAD])
    assert "Training would stop" not in inspect(name)[1]
    assert "Training would stop: 1 of 5 rows (20.0%) would be skipped" in inspect(name, "--max_skipped", "0.1")[1]


def test_the_whole_row_report_is_saved(file, inspect):
    inspect(file([*GOOD, BAD, BAD]), "--report", "deep/report.json")
    saved = json.loads(Path("deep/report.json").read_text())
    assert [(row["line"], row["reason"]) for row in saved["rows"]] == [(5, "empty_answer"), (6, "empty_answer")]
    assert saved["rows_in"] == 6


# --- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.jsonl"], "absent.jsonl: there is no such file"),
        (["rows.jsonl", "--weights", "1", "2"], "weights: found 2 for 1 sources"),
        (["rows.jsonl", "--weights", "0"], "weight: found 0"),
        (["rows.jsonl", "--mixture", "both"], "mixture: 'both' is unknown"),
        (["rows.jsonl", "--format", "csv"], "format: 'csv' is unknown"),
        (["rows.jsonl", "--row", "9"], "there is no row 9; rows are numbered from 1 to 4"),
        (["rows.jsonl", "--dialect", "latin"], "latin"),
        (["rows.jsonl", "--scheme", "loud"], "loud"),
        (["rows.jsonl", "--model", "./absent"], "./absent: no tokenizer could be loaded"),
        (["rows.jsonl", "--report", "rows.jsonl/x"], "rows.jsonl"),
    ],
)
def test_errors_are_one_line(file, inspect, arguments, message):
    file(GOOD)
    status, out, err = inspect(*arguments)
    assert status == 1
    assert out == ""
    assert message in err
    assert err.startswith("thinkfusion inspect: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("flags", [["--samples", "-1"], ["--row", "0"], ["--no_such_flag"], ["--color", "red"]])
def test_wrong_flags_are_status_2(file, inspect, flags):
    with pytest.raises(SystemExit) as ended:
        inspect(file(GOOD), *flags)
    assert ended.value.code == 2


# --- flags ------------------------------------------------------------------------------------------------------


def test_every_option_is_a_flag_with_a_help_text(capsys):
    names = {each.name for options in OPTIONS for each in fields(options)}
    assert set(HELP) == names
    with pytest.raises(SystemExit):
        main(["inspect", "--help"])
    shown = capsys.readouterr().out
    for name in names:
        assert re.search(rf"^  --{name}\b", shown, re.MULTILINE), name


@pytest.mark.parametrize(
    ("rows", "flags", "expected"),
    [
        ([{"q": "a?", "r": "b", "a": "c"}], "--question_column q --reasoning_column r --answer_column a", {}),
        ([{"question": "a?", "answer": "b #### c"}], "--answer_separator ####", {}),
        ([{"question": "a?", "reasoning": "b <<1>>", "answer": "c"}], "--remove_pattern <<.*?>>", {}),
        ([GOOD[0], GOOD[0]], "--drop_duplicates", {"skipped": {"duplicate": 1}}),
        ([GOOD[0]], "--mixture combined", {"sequences": {"thinking": 1, "non_thinking": 0}}),
        (GOOD, "--pair_fraction 0", {"rows_kept": 4}),
        ([*GOOD, {"question": "a?", "answer": "b"}], "--mixture ratio --ratio 1:1 --ratio_unit samples",
         {"sequences": {"thinking": 1, "non_thinking": 1}}),
        (GOOD, "--max_rows_per_source 2", {"sequences": {"thinking": 2, "non_thinking": 2}}),
        (GOOD, "--remove_fraction 1", {"sequences": {"thinking": 0, "non_thinking": 4}}),
        (GOOD, "--max_length 5", None),
        (GOOD, "--max_tokens_per_source 100000 --seed 3 --processes 2 --split test", {"rows_kept": 4}),
        ([{**GOOD[0], "reasoning": "One. " * 99}], "--shorten_fraction 1 --shorten_budget 5,9",
         {"altered": {"shortened_reasoning": 1}}),
        ([{**GOOD[0], "reasoning": "One. " * 99}], "--max_length 80 --on_long_row shorten_reasoning",
         {"altered": {"shortened_to_fit": 1}}),
        ([{**GOOD[0], "reasoning": "One. " * 99}, *GOOD], "--max_length 120 --on_long_row drop",
         {"skipped": {"too_long": 1}, "asked_for": 1}),
        ([{"messages": [{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}]}, GOOD[0]],
         "--no_repair --format messages", None),
        (GOOD, "--weights 2", {"sequences": {"thinking": 8, "non_thinking": 8}}),
    ],
)  # fmt: skip
def test_flags_do_what_their_options_do(file, inspect, rows, flags, expected):
    status, out, err = inspect(file(rows), "--json", *flags.split())
    assert err == ""
    found = json.loads(out)
    assert status == (0 if found["rows_kept"] else 1)
    assert (expected is None) == (found["rows_kept"] == 0)
    assert {name: found[name] for name in expected or {}} == (expected or {})


@pytest.mark.parametrize(
    ("messages", "flag"),
    [
        ([("user", "a"), ("user", "b"), ("assistant", "c")], "--join_messages"),
        ([("assistant", "hello"), ("user", "b"), ("assistant", "c")], "--drop_first_assistant"),
        ([("user", "b"), ("assistant", "c <|im_end|> d")], "--plain_control_tokens"),
    ],
)
def test_options_of_messages(file, inspect, messages, flag):
    name = file([{"messages": [{"role": role, "content": text} for role, text in messages]}])
    assert json.loads(inspect(name, "--json")[1])["rows_kept"] == 0
    assert json.loads(inspect(name, "--json", flag)[1])["rows_kept"] == 1


def test_reasoning_flags(file, inspect):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<thinking>b</thinking>c"}]
    name = file([{"messages": messages}])
    assert json.loads(inspect(name, "--json")[1])["tokens"]["thinking"] == 0
    assert (
        json.loads(inspect(name, "--json", "--reasoning_tags", "<thinking>,</thinking>")[1])["tokens"]["thinking"] > 0
    )
    name = file([{**GOOD[0], "mode": "non_thinking"}])
    assert json.loads(inspect(name, "--json", "--drop_reasoning", "--mixture", "combined")[1])["altered"]


def test_the_markup_of_a_model_and_what_flags_change(file, inspect, tmp_path):
    family_tokenizer("gpt_oss", "control").save_pretrained(tmp_path / "model")
    name = file(GOOD)
    _, out, _ = inspect(name, "--model", tmp_path / "model")
    assert "shown as gpt_oss, scheme control" in out
    assert ("prefix", "⟦<|channel|>⟧analysis⟦<|message|>⟧") in blocks(out)
    _, out, _ = inspect(name, "--scheme", "empty-block")
    assert "shown as chatml, scheme empty-block" in out
    assert ("reasoning", "⟦<think>⟧↵\nTwo and two.↵\n⟦</think>⟧↵\n↵") in blocks(out)


def test_a_template_of_ours_stays(tmp_path, base_tokenizer):
    from thinkfusion import install_chat_template

    install_chat_template(base_tokenizer, scheme="empty-block", default_mode="non_thinking")
    base_tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).chat_template == base_tokenizer.chat_template
    assert "scheme=control" in load_tokenizer(str(tmp_path), scheme="control").chat_template


# --- rows, piece by piece ---------------------------------------------------------------------------------------


def test_a_row_in_both_modes(file, inspect):
    _, out, _ = inspect(file(GOOD), "--row", "2")
    question = "⟦<|im_start|>⟧user↵\n서울은 어디에 있나요? 🏙️⟦<|im_end|>⟧↵\n⟦<|im_start|>⟧assistant↵"
    assert blocks(out) == [
        ("prompt", question),
        ("prefix", "⟦<think>⟧"),
        ("reasoning", "한국의 수도이다. 👨‍👩‍👧⟦</think>⟧"),
        ("answer", "한국입니다 🎉⟦<|im_end|>⟧"),
        ("prompt", question),
        ("prefix", "⟦</think>⟧"),
        ("answer", "한국입니다 🎉⟦<|im_end|>⟧"),
    ]
    assert "What is 2 + 2?" not in out


def test_samples_are_the_first_rows_of_each_source(file, inspect):
    names = [file(GOOD), file([BAD, *GOOD[1:]], "more.jsonl")]
    shown = re.compile(r"^(\w+)\.jsonl, row (\d)$", re.MULTILINE)
    assert shown.findall(inspect(*names)[1]) == [("rows", "1"), ("rows", "2"), ("more", "2")]
    assert shown.findall(inspect(*names, "--samples", "0")[1]) == []
    assert len(shown.findall(inspect(*names, "--samples", "99")[1])) == 7
    assert shown.findall(inspect(*names, "--row", "2")[1]) == [("rows", "2"), ("more", "2")]


def test_only_what_the_mixture_keeps_is_shown(file, inspect):
    name = file(GOOD)
    _, out, _ = inspect(name, "--max_rows_per_source", "1")
    (row,) = re.findall(r"^rows.jsonl, row (\d)$", out, re.MULTILINE)
    assert "leaves it out" not in out
    other = next(number for number in "1234" if number != row)
    _, out, _ = inspect(name, "--max_rows_per_source", "1", "--row", other)
    assert f"rows.jsonl, row {other}: a good row, but the mixture leaves it out" in out
    assert blocks(out) == []
    _, out, _ = inspect(name, "--mixture", "combined", "--row", "1")
    assert [label for label, _ in blocks(out)] == ["prompt", "prefix", "reasoning", "answer"]


def test_a_skipped_row_says_why(file, inspect):
    status, out, _ = inspect(file([*GOOD, BAD, "{no json"]), "--row", "6", "--html", "page.html")
    assert status == 0
    assert "rows.jsonl, row 6: skipped, invalid_json\n  not JSON: " in out
    assert "{no json" in out
    assert "row 5: skipped" not in out
    assert "{no json" in Path("page.html").read_text()
    _, out, _ = inspect(file([GOOD[0], GOOD[0]]), "--row", "2", "--drop_duplicates")
    assert "row 2: skipped, duplicate" in out


def test_rows_are_numbered_as_lines_of_the_file(file, inspect):
    _, out, _ = inspect(file([GOOD[0], "", "", GOOD[2]]), "--row", "4")
    assert "And 3 + 3?" in out
    Path("rows.json").write_text(json.dumps(GOOD))
    assert "And 3 + 3?" in inspect("rows.json", "--row", "3")[1]


def test_a_changed_row_says_what_was_changed(file, inspect):
    messages = [("human", "What?"), ("gpt", "<think>Hm.</think>That."), ("user", "bye")]
    name = file([{"messages": [{"role": role, "content": text} for role, text in messages]}])
    _, out, _ = inspect(name, "--row", "1")
    assert "altered: role_alias (" in out
    assert "altered: trailing_user (" in out
    assert "bye" not in out.partition("row 1\n")[2].partition("│")[2]


def test_history_and_tool_results_are_untrained(file, inspect):
    call = {"type": "function", "function": {"name": "now", "arguments": {}}}
    messages = [
        {"role": "user", "content": "Time?"},
        {"role": "assistant", "content": "", "reasoning": "I look.", "tool_calls": [call]},
        {"role": "tool", "content": "noon"},
        {"role": "assistant", "content": "Noon.", "reasoning": "It says noon."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    _, out, _ = inspect(file([{"messages": messages, "tools": [TOOLS[1]]}]), "--samples", "1")
    found = blocks(out)
    thinking, plain = found[:8], found[8:]
    assert [label for label, _ in thinking] == [
        *("prompt", "prefix", "reasoning", "answer", "untrained", "prefix", "reasoning", "answer")
    ]
    assert thinking[2][1] == "I look.⟦</think>⟧"
    assert "noon" in thinking[4][1]
    assert thinking[-2:] == [("reasoning", "It says noon.⟦</think>⟧"), ("answer", "Noon.⟦<|im_end|>⟧")]
    assert [text for label, text in plain if label == "answer"][1:] == ["Noon.⟦<|im_end|>⟧", "Yes.⟦<|im_end|>⟧"]
    assert "I look" not in str(plain)


def test_closed_traces_are_untrained_but_for_their_end(file, inspect):
    _, out, _ = inspect(file([GOOD[0] | {"reasoning": "One. " * 60}]), "--close_at", "20")
    thinking = blocks(out)[:6]
    assert [label for label, _ in thinking[:4]] == ["prompt", "prefix", "untrained", "reasoning"]
    assert thinking[3][1] == "⟦</think>⟧"


@pytest.mark.parametrize(("dialect", "scheme"), CASES)
@pytest.mark.parametrize("mode", list(Mode))
def test_pieces_are_the_sequence_in_every_markup(dialect, scheme, mode):
    renderer = Renderer(family_tokenizer(dialect, scheme))
    call = {"type": "function", "function": {"name": "now", "arguments": {"a": 1}}}
    conversation = Conversation.from_messages(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "First?"},
            {"role": "assistant", "content": "One.", "reasoning": "Hm one."},
            {"role": "user", "content": "Second </think>?"},
            {"role": "assistant", "content": "", "reasoning": "Hm look.", "tool_calls": [call]},
            {"role": "tool", "content": "noon"},
            {"role": "assistant", "content": "Two.", "reasoning": "Hm two."},
        ],
        tools=[TOOLS[1]],
        mode=mode,
    )
    for target in renderer.targets(conversation):
        pieces = pieces_of(renderer, conversation, target)
        segments = renderer.segments(conversation, target)
        whole, shown = "".join(segment.text for segment in segments), "".join(piece.text for piece in pieces)
        assert whole.startswith(shown)
        trained = "".join(segment.text for segment in segments if segment.trained)
        assert trained == "".join(piece.text for piece in pieces if piece.kind in ("reasoning", "answer"))
        prefixes = [piece.text for piece in pieces if piece.kind == "prefix"]
        wanted = "".join(renderer.scheme.prefix(mode))
        answers = sum(
            step.role == "assistant" for last in target.trained for step in conversation.exchanges[last].steps
        )
        assert "".join(prefixes) == wanted * answers
        reasoning = "".join(piece.text for piece in pieces if piece.kind == "reasoning")
        assert ("Hm" in reasoning) == (mode is Mode.THINKING)
        assert "One." not in reasoning
        assert "Two." not in reasoning
        answer = "".join(piece.text for piece in pieces if piece.kind == "answer")
        assert "Hm" not in answer
        assert ("now" in answer) == (1 in target.trained)
        alike = [piece for piece in pieces if "</think>?" in piece.text]
        assert not any(piece.control for piece in alike)


# --- in a terminal ----------------------------------------------------------------------------------------------


def test_colours_only_in_a_terminal_and_not_with_no_color(file, inspect, monkeypatch):
    name = file(GOOD)
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b" not in inspect(name)[1]
    assert "\x1b" in inspect(name, "--color", "always")[1]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert "\x1b[36mTwo and two.\x1b[0m\x1b[36;7m</think>\x1b[0m" in inspect(name)[1]
    assert "\x1b" not in inspect(name, "--color", "never")[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in inspect(name)[1]
    assert "\x1b" in inspect(name, "--color", "always")[1]


def test_nothing_from_the_data_reaches_the_terminal_as_a_command(file, inspect):
    row = {"question": f"a{ESCAPE}b\r\u202e\x07?", "reasoning": f"c{ESCAPE}", "answer": f"d{ESCAPE}\x9b"}
    name = file([row, {**row, "answer": "", "x" + ESCAPE: 1}, f"no json {ESCAPE}"], f"a{ESCAPE}.jsonl")
    for flags in ([], ["--row", "2"], ["--row", "3"], ["--strict"]):
        status, out, err = inspect(name, *flags, "--html", "page.html")
        unsafe = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]")
        assert not unsafe.search(out)
        assert not unsafe.search(err)
        assert not unsafe.search(Path("page.html").read_text()) if status == 0 else True
    assert "a\\x1b[2J\\x1b[31mb\\r\\u202e\\x07?" in inspect(name)[1]


def test_text_that_looks_like_a_control_token_looks_different(file, inspect):
    name = file([{**GOOD[0], "question": "Is </think> or ⟦</think>⟧ a token?"}])
    _, out, _ = inspect(name)
    assert "Is </think> or \\u27e6</think>\\u27e7 a token?⟦<|im_end|>⟧" in out
    _, out, _ = inspect(name, "--color", "always")
    assert "\x1b[2;4m</think>\x1b[0m" in out
    assert "\x1b[1;35;7m</think>\x1b[0m" in out
    assert "\x1b[2;7m</think>\x1b[0m" not in out


def test_long_texts_are_shortened_in_the_terminal_and_whole_on_the_page(file, inspect):
    reasoning = "start " + "x" * 3000 + " end"
    _, out, _ = inspect(file([{**GOOD[0], "reasoning": reasoning}]), "--html", "page.html")
    flat = re.sub(r"\n {" + str(GUTTER) + r"} │ ", "", out)
    # A line may break at any of the spaces, and does by the terminal's width.
    flat = flat.replace(" ", "")
    assert "x[…2,410charactersleftout…]x" in flat
    assert "xend⟦</think>⟧" in flat
    assert max(map(len, out.splitlines())) <= 120
    assert "x" * 3000 in Path("page.html").read_text()


def test_lines_are_as_wide_as_the_terminal(file, inspect, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    row = {"question": "가나다 라마바사 " * 12 + "🏙️" * 9, "reasoning": "word " * 50, "answer": "y" * 200}
    shown = [line for line in inspect(file([row]))[1].splitlines() if "│" in line]
    widths = [sum(map(columns, line)) for line in shown]
    assert max(widths) <= 60 + 1  # and the sign of a line's end
    assert max(widths) > 50
    assert all(line.endswith(("word", "</think>⟧")) for line in shown if "word" in line)


def test_wrapping_loses_nothing():
    text = "one two  three가나다 four" * 5 + "\n\nfive\n"
    lines = list(_wrapped([(letter, "") for letter in text], 10))
    assert "".join(letter for line in lines for letter, _ in line) == text.replace("\n", "")


# --- the page ---------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser would see: the elements, the text, and every attribute that could load something."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text, self.links = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "style")]
        assert not any(name.startswith("on") for name, _ in attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if "style" not in self.open else ""


def test_the_page_is_whole_and_escapes_all_data(file, inspect):
    evil = '<script>alert("1")</script> </think> & \'<img src=x onerror=alert(1)>'
    rows = [
        {"question": evil, "reasoning": evil.replace("</think>", ""), "answer": "</div> <b>$title ${x}"},
        {"question": "؟ما هي عاصمة مصر", "reasoning": "القاهرة", "answer": "القاهرة"},
        {"question": evil, "answer": "", evil: 1},
        evil,
    ]
    file(rows, "<i>&.jsonl")
    status, _, _ = inspect("<i>&.jsonl", "--html", "deep/page.html")
    assert status == 0
    text = Path("deep/page.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.links == []
    assert "url(" not in text
    assert "@import" not in text
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "link", "iframe", "object"}
    assert "<b>$title" not in text
    assert evil in page.text
    assert "</div> <b>$title ${x}" in page.text
    assert "<i>&.jsonl" in page.text
    controls = [attributes for tag, attributes in page.tags if attributes.get("class") == "token"]
    assert all(attributes["dir"] == "ltr" for attributes in controls[1:])  # the first is that of the legend
    alike = [attributes for _, attributes in page.tags if attributes.get("class") == "alike"]
    assert len(alike) == 1 + 2  # the legend, and the question in both modes
    assert sum(attributes.get("dir") == "auto" for _, attributes in page.tags) > 10
    assert "prefers-color-scheme: dark" in text


def test_the_page_shows_what_the_terminal_shows(file, inspect):
    _, out, _ = inspect(file([*GOOD, BAD]), "--html", "page.html")
    page = Page(Path("page.html").read_text())
    for wanted in (
        "한국입니다 🎉",
        "Two and two.",
        "rows.jsonl, row 5",
        "empty_answer",
        "--on_bad_row skip",
        "rows kept",
    ):
        assert wanted in page.text
    tokens = re.findall(r"^  (?:non-)?thinking · .*$", out, re.MULTILINE)
    assert len(tokens) == 6
    assert all(line.strip() in page.text for line in tokens)


# --- real files -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")
@pytest.mark.parametrize(
    ("name", "flags", "format_", "rows", "skipped"),
    [
        ("gsm8k_test.jsonl", ["--answer_separator", "####"], "columns", 1319, {}),
        ("gsm8k_train.jsonl", ["--answer_separator", "####", "--processes", "2"], "columns", 7473, {}),
        ("alpaca.json", [], "alpaca", 999, {}),
        ("glaive_toolcall.json", [], "sharegpt", 300, {}),
        ("reason_tool_use.jsonl", [], "messages", 50, {"control_token_in_answer": 2}),
        ("reason_tool_use.jsonl", ["--plain_control_tokens"], "messages", 50, {}),
    ],
)
def test_files_of_the_project(totals, name, flags, format_, rows, skipped):
    found = totals(SHARED / name, *flags)
    assert (found["format"], found["rows_in"], found["skipped"]) == (format_, rows, skipped)
    assert found["rows_kept"] + sum(skipped.values()) == rows
    assert found["tokens"]["non_thinking"] > 0
