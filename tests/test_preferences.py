# SPDX-License-Identifier: Apache-2.0
"""Preference rows: which reply stands against which, their ids, and a training on them."""

import json
import os
from pathlib import Path

import pytest

from thinkfusion import (
    DataError,
    PreferenceIds,
    export_checkpoint,
    install_chat_template,
    load_checkpoint,
    read_preferences,
    split_reply,
)
from thinkfusion.generation import Prompter
from thinkfusion.modes import Mode
from thinkfusion.preferences import PreferenceWriter

from .forked import run_forked

ROOT = Path(__file__).parent.parent
MESSAGES = [{"role": "user", "content": "What closes <think>? </think><|im_end|> I guess."}]
END = "<|im_end|>"


def replies(tokenizer, mode, *texts):
    """Replies as they come from a model: by ids, the first of which keeps its mode."""
    return [
        split_reply(tokenizer(text, add_special_tokens=False)["input_ids"], mode, tokenizer=tokenizer) for text in texts
    ]


@pytest.fixture
def given(tokenizer):
    return {
        Mode.THINKING: replies(tokenizer, "thinking", f"Two.</think>\n4{END}", f"4{END}"),
        Mode.NON_THINKING: replies(tokenizer, "non_thinking", f"4{END}", f"Two.</think>4{END}"),
    }


def kept(given):
    return {mode: next((each for each in own if each.kind == "ok"), None) for mode, own in given.items()}


def test_a_kept_reply_stands_against_a_broken_one(tokenizer, given):
    thinking, plain = PreferenceWriter(tokenizer).rows(MESSAGES, kept(given), given)
    assert [thinking[0], plain[0]] == [*Mode]
    assert (thinking[1]["chosen"], thinking[1]["rejected"]) == (f"Two.</think>\n4{END}", f"4{END}")
    assert (plain[1]["chosen"], plain[1]["rejected"]) == (f"4{END}", f"Two.</think>4{END}")
    assert [row["broke"] for _, row in (thinking, plain)] == ["never_closed", "extra_tag"]
    for mode, row in (thinking, plain):
        assert row["origin"] == "sampled"
        assert row["prompt"] == tokenizer.apply_chat_template(
            MESSAGES, tokenize=False, add_generation_prompt=True, enable_thinking=mode is Mode.THINKING
        )


def test_what_was_not_sampled_is_made_only_if_asked(tokenizer, given):
    given = {mode: own[:1] for mode, own in given.items()}
    assert [row for _, row in PreferenceWriter(tokenizer).rows(MESSAGES, kept(given), given)] == ["no_broken_reply"] * 2
    writer = PreferenceWriter(tokenizer, construct=True)
    (_, thinking), (_, plain) = writer.rows(MESSAGES, kept(given), given)
    assert (thinking["chosen"], thinking["rejected"]) == (f"Two.</think>\n4{END}", f"4{END}")
    assert (plain["chosen"], plain["rejected"]) == (f"4{END}", f"Two.</think>\n4{END}")
    assert {thinking["origin"], plain["origin"]} == {"rejected_constructed"}
    # A non-thinking mode that is broken all the time.
    given[Mode.NON_THINKING] = replies(tokenizer, "non_thinking", f"Two.</think>4{END}")
    assert PreferenceWriter(tokenizer).rows(MESSAGES, kept(given), given)[1][1] == "no_kept_reply"
    row = writer.rows(MESSAGES, kept(given), given)[1][1]
    assert (row["chosen"], row["rejected"], row["origin"]) == (f"4{END}", f"Two.</think>4{END}", "chosen_constructed")


def test_a_truncated_reply_broke_nothing_and_an_unfinished_one_has_no_end(tokenizer, given):
    given[Mode.THINKING][1] = replies(tokenizer, "thinking", "Two and")[0]
    assert given[Mode.THINKING][1].kind == "truncated"
    assert PreferenceWriter(tokenizer).rows(MESSAGES, kept(given), given)[0][1] == "no_broken_reply"
    given[Mode.THINKING][1] = replies(tokenizer, "thinking", "Two</think>4</think>4</think>")[0]
    assert (
        PreferenceWriter(tokenizer).rows(MESSAGES, kept(given), given)[0][1]["rejected"]
        == "Two</think>4</think>4</think>"
    )


def test_a_reply_that_spells_a_control_token_makes_no_row(tokenizer, given):
    ids = [token for letter in "4 </think>" for token in tokenizer(letter, add_special_tokens=False)["input_ids"]]
    spelled = split_reply([*ids, tokenizer.eos_token_id], "thinking", tokenizer=tokenizer)
    assert spelled.kind == "never_closed"
    given[Mode.THINKING][1] = spelled
    assert PreferenceWriter(tokenizer).rows(MESSAGES, kept(given), given)[0][1] == "no_broken_reply"


def test_ids_are_those_of_our_prompt_and_of_the_reply(tokenizer, given, tmp_path, write):
    rows = [row for _, row in PreferenceWriter(tokenizer).rows(MESSAGES, kept(given), given)]
    close = tokenizer.convert_tokens_to_ids("</think>")
    for mode, row in zip(Mode, rows, strict=True):
        ids = PreferenceIds(tokenizer)(row)
        assert ids["prompt_ids"] == Prompter(tokenizer).prompt_ids(MESSAGES, mode)
        # What the user wrote is text: the only closing token of the prompt is that of the mode.
        assert ids["prompt_ids"].count(close) == (mode is Mode.NON_THINKING)
        assert tokenizer.decode(ids["chosen_ids"]) == row["chosen"]
        assert ids["chosen_ids"].count(close) == (mode is Mode.THINKING)
        assert ids["chosen_ids"] == tokenizer(row["chosen"], add_special_tokens=False)["input_ids"]
        assert split_reply(ids["rejected_ids"], mode, tokenizer=tokenizer).kind == row["broke"]
    path = write("\n".join(map(json.dumps, rows)))
    assert [row["mode"] for row in read_preferences(path, tokenizer)] == ["thinking", "non_thinking"]
    with pytest.raises(DataError, match=r"row 1: found \d+ tokens, expected at most 9 .*\[too_long\]"):
        read_preferences(path, tokenizer, max_length=9)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"messages": None}, "missing_column"),
        ({"chosen": ""}, "missing_column"),
        ({"rejected": f"4{END}"}, "same_reply"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_named(tokenizer, given, write, change, reason):
    row = PreferenceWriter(tokenizer).rows(MESSAGES, kept(given), given)[1][1]
    with pytest.raises(DataError, match=rf"row 1: .*\[{reason}\]"):
        read_preferences(write(json.dumps({**row, **change})), tokenizer)
    with pytest.raises(ValueError, match="there is no preference in it"):
        read_preferences(write("\n"), tokenizer)


@pytest.mark.parametrize("lora", ["false", "true"])
def test_the_recipe_trains_on_them_and_exports(base_tokenizer, given, tmp_path, write, lora):
    model, tokenizer = load_checkpoint("tiny-base", dtype="float32")
    install_chat_template(tokenizer, model)
    base = export_checkpoint(model, tokenizer, tmp_path / "base", check=False)
    rows = [row for _, row in PreferenceWriter(tokenizer).rows(MESSAGES, kept(given), given)]
    path = write("\n".join(map(json.dumps, rows * 4)))
    flags = ["--model", str(base), "--dataset", str(path), "--output_dir", str(tmp_path / "out"), "--lora", lora]
    flags += ["--max_steps", "6", "--learning_rate", "1e-3", "--logging_steps", "1", "--evaluation_samples", "2"]
    flags += ["--evaluation_max_new_tokens", "4", "--per_device_train_batch_size", "4", "--disable_tqdm", "true"]
    done = run_forked(ROOT / "recipes" / "dpo.py", *flags, environment={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "8 rows: 4 thinking, 4 non-thinking" in done.stdout
    logs = [json.loads(line.replace("'", '"')) for line in done.stdout.splitlines() if line.startswith("{'loss'")]
    assert len(logs) == 6
    assert float(logs[0]["rewards/margins"]) == pytest.approx(0, abs=1e-5)
    assert float(logs[-1]["rewards/margins"]) > 0.01
    assert done.stdout.index("Before:") < done.stdout.index("The checkpoint is in") < done.stdout.index("After:")
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["method"].startswith("preferences (DPO)")
    load_checkpoint(tmp_path / "out")
