# SPDX-License-Identifier: Apache-2.0
"""From sources to sequences: the same through a file, as a stream and over processes; long rows, cache and account."""

import gc
import itertools
import json
import multiprocessing
import os
import random
import signal
from types import SimpleNamespace

import pytest

from thinkfusion import (
    Conversation,
    DataError,
    EvaluationPrompt,
    MixtureOptions,
    ReasoningOptions,
    RecordOptions,
    Renderer,
    Source,
    mix,
    overlap_with_training,
    prepare,
    preparing,
    read_conversations,
    sequences,
)
from thinkfusion.sequences import MODES, Plan

ALL = RecordOptions(on_bad_row="skip", max_skipped=1.0)
WORDS = ("the", "sum", "of", "two", "and", "three", "is", "five", "so", "it", "must", "be", "odd", "그래서", "합은")


def sentence(draw, length):
    return " ".join(draw.choices(WORDS, k=length)).capitalize() + "."


def row(number, *, thinks=True, turns=1):
    draw = random.Random(number)
    messages = []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"{number}.{turn}: {sentence(draw, 6)}"})
        reply = {"role": "assistant", "content": sentence(draw, 4)}
        if thinks:
            reply["reasoning_content"] = " ".join(sentence(draw, 7) for _ in range(draw.randint(2, 6)))
        messages.append(reply)
    return {"messages": messages}


@pytest.fixture
def mixed_rows():
    """Rows of both modes and of several turns, with bad ones between."""
    rows = [row(number, thinks=number % 3 != 0, turns=1 + number % 4 // 3) for number in range(60)]
    rows[7] = {"messages": []}
    rows[31] = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>b"}]}
    return rows


@pytest.fixture
def write(tmp_path):
    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rows), encoding="utf-8")
        return str(path)

    return write


def listed(dataset):
    return [(each["input_ids"], each["labels"], each["mode"]) for each in dataset]


class Endless:
    """Rows without an end."""

    def __iter__(self):
        return map(row, itertools.count())


MIXTURES = {
    "paired": MixtureOptions(),
    "pair fraction": MixtureOptions(pair_fraction=0.4, seed=3),
    "combined": MixtureOptions("combined"),
    "ratio of tokens": MixtureOptions("ratio", ratio="1:3"),
    "ratio of samples": MixtureOptions("ratio", ratio=0.5, ratio_unit="samples", seed=1),
    "sequential": MixtureOptions("sequential"),
    "rows capped": MixtureOptions(max_rows_per_source=9),
    "tokens capped": MixtureOptions(max_tokens_per_source=900),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_a_stream_and_several_processes_give_the_same_as_one(name, write, mixed_rows, tokenizer, monkeypatch):
    monkeypatch.setattr(preparing, "CHUNK_ROWS", 7)
    data = [Source(write(mixed_rows), 1.5), Source(write(mixed_rows[:20], "more.jsonl"), 0.5)]
    options = {"records": ALL, "mixture": MIXTURES[name]}
    given, report = prepare(data, tokenizer, **options)
    expected = listed(given)
    assert expected
    for other in ({"processes": 2}, {"streaming": True}, {"streaming": True, "processes": 2}):
        found, its_report = prepare(data, tokenizer, **options, **other)
        assert listed(found) == expected
        assert its_report.to_dict() == report.to_dict()
    assert report.read == 80 == report.kept + report.skipped.total()
    assert report.skipped == {"empty_conversation": 2, "unclosed_think": 1}
    for index, mode in enumerate(MODES):
        mine = [labels for _, labels, which in expected if which == index]
        assert report.sequences[mode.value] == len(mine)
        assert report.tokens[mode.value] == sum(label != -100 for labels in mine for label in labels)
        assert (
            sum(cell["tokens_after"] for cell in report.account.to_dict()["by"] if cell["mode"] == mode.value)
            == (report.tokens[mode.value])
        )
    assert report.all_tokens == sum(len(ids) for ids, _, _ in expected)


def test_a_stream_can_be_read_again(write, mixed_rows, tokenizer):
    stream, report = prepare(write(mixed_rows), tokenizer, records=ALL, streaming=True)
    first = listed(stream)
    counted = report.to_dict()
    assert listed(stream) == first
    assert report.to_dict() == counted


def test_a_stream_reads_no_further_than_it_is_asked(tokenizer):
    stream, report = prepare(Endless(), tokenizer, streaming=True)
    assert len(list(itertools.islice(stream, 5))) == 5
    assert report.read == preparing.CHUNK_ROWS


def test_a_stream_of_rows_that_are_gone_after_an_epoch_is_refused(tokenizer):
    with pytest.raises(ValueError, match="streaming: found rows that can be read but once"):
        prepare(iter(Endless()), tokenizer, streaming=True)


def test_sequences_are_those_of_the_renderer(write, mixed_rows, tokenizer):
    path = write(mixed_rows)
    conversations, _ = read_conversations(path, ALL)
    expected = [
        (each.ids, each.labels, MODES.index(each.mode))
        for rendered in Renderer(tokenizer).render(mix(conversations))
        for each in rendered
    ]
    assert listed(prepare(path, tokenizer, records=ALL)[0]) == expected
    assert listed(prepare(conversations, tokenizer)[0]) == expected


@pytest.mark.parametrize("collecting", [True, False])
def test_the_garbage_collector_is_left_as_it_was(collecting, write, mixed_rows, tokenizer):
    """What a program froze stays frozen: else every later collection looks through all that it imported."""
    assert gc.isenabled()
    kept = [object() for _ in range(1000)]
    gc.freeze()
    if not collecting:
        gc.disable()
    before = gc.get_freeze_count()
    try:
        prepare(write(mixed_rows), tokenizer, records=ALL)
        assert gc.isenabled() is collecting
    finally:
        gc.enable()
    assert gc.get_freeze_count() > 0.9 * before > len(kept)


def test_the_seed_decides_and_nothing_else(write, mixed_rows, tokenizer, tmp_path):
    path = write(mixed_rows)
    drawn = [
        listed(prepare(path, tokenizer, records=ALL, mixture=MixtureOptions(pair_fraction=0.5, seed=seed))[0])
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    (tmp_path / "elsewhere").mkdir()
    moved = write(mixed_rows, "elsewhere/rows.jsonl")
    assert listed(prepare(moved, tokenizer, records=ALL, mixture=MixtureOptions(pair_fraction=0.5))[0]) == drawn[0]


# --- bad rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2])
def test_the_first_bad_row_stops(processes, write, mixed_rows, tokenizer, monkeypatch):
    monkeypatch.setattr(preparing, "CHUNK_ROWS", 5)
    with pytest.raises(DataError, match=r"rows\.jsonl, row 8: messages: .*--on_bad_row skip.*\[empty_conversation\]"):
        prepare(write(mixed_rows), tokenizer, processes=processes)


def test_too_many_skipped_rows_stop_with_the_report(write, mixed_rows, tokenizer):
    with pytest.raises(ValueError, match=r"(?s)2 of 60 rows \(3\.3%\) would be skipped.*--max_skipped 0\.04.*60 read"):
        prepare(write(mixed_rows), tokenizer, on_bad_row="skip")


@pytest.mark.parametrize("streaming", [False, True])
def test_one_mode_alone_is_refused(streaming, tokenizer):
    rows = [row(number, thinks=False) for number in range(4)]
    with pytest.raises(ValueError, match="no row is trained in thinking mode"):
        list(prepare(rows, tokenizer, streaming=streaming)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processes": 0}, "processes: found 0"),
        ({"max_length": 0}, "max_length: found 0"),
        ({"on_long_row": "cut"}, "on_long_row: 'cut' is unknown; choose one of error, drop, shorten_reasoning"),
        ({"mixture": "both"}, "mixture: 'both' is unknown"),
    ],
)
def test_bad_options_are_named_before_anything_is_read(options, message, tokenizer):
    def unread():
        raise AssertionError("the rows were read")
        yield

    with pytest.raises(ValueError, match=message):
        prepare(unread(), tokenizer, **options)


def test_a_tokenizer_without_the_template_is_refused_first(base_tokenizer):
    with pytest.raises(ValueError, match="install_chat_template"):
        prepare([{"messages": []}], base_tokenizer)


def test_another_template_than_was_installed_is_noticed(tokenizer, write, mixed_rows):
    tokenizer.chat_template = tokenizer.chat_template.replace("user", "User")
    with pytest.raises(DataError, match=r"the rendering differs from the chat template"):
        prepare(write(mixed_rows), tokenizer, records=ALL)


# --- long rows --------------------------------------------------------------------------------------------------


def lengths(rows, tokenizer):
    return [len(ids) for ids, _, _ in listed(prepare(rows, tokenizer)[0])]


def test_a_long_row_is_an_error_with_the_way_out(tokenizer):
    rows = [row(number) for number in range(6)]
    longest = max(lengths(rows, tokenizer))
    with pytest.raises(DataError, match=rf"has {longest} tokens, and max_length is {longest - 1}.*--on_long_row drop"):
        prepare(rows, tokenizer, max_length=longest - 1)


def test_long_rows_are_dropped_and_counted(tokenizer):
    rows = [row(number) for number in range(6)]
    found = lengths(rows, tokenizer)
    limit = sorted(found)[-2]
    kept, report = prepare(rows, tokenizer, max_length=limit, on_long_row="drop")
    dropped = found.index(max(found)) // 2
    assert report.skipped == {"too_long": 1}
    assert (report.read, report.kept, report.asked_for) == (6, 5, 1)
    entries = list(report.entries())
    assert [(entry["line"], entry["reason"]) for entry in entries] == [(dropped + 1, "too_long")]
    assert [len(ids) for ids, _, _ in listed(kept)] == [
        each for index, each in enumerate(found) if index // 2 != dropped
    ]


@pytest.mark.parametrize("turns", [1, 3])
def test_reasoning_is_shortened_and_all_else_stays(tokenizer, turns):
    rows = [row(number, turns=turns) for number in range(8)]
    whole = listed(prepare(rows, tokenizer)[0])
    limit = sorted(len(ids) for ids, _, _ in whole)[-3]
    short, report = prepare(rows, tokenizer, max_length=limit, on_long_row="shorten_reasoning")
    short = listed(short)
    close, end = (tokenizer.convert_tokens_to_ids(token) for token in ("</think>", "<|im_end|>"))
    assert len(short) == len(whole)
    assert report.skipped == {}
    changed = 0
    for (ids, labels, mode), (more_ids, more_labels, _) in zip(short, whole, strict=True):
        assert len(ids) <= limit
        if ids == more_ids:
            continue
        changed += 1
        assert MODES[mode].value == "thinking"
        last, more_last = (len(each) - 1 - each[::-1].index(close) for each in (ids, more_ids))
        assert ids[last:] == more_ids[more_last:]
        assert labels[last:] == ids[last:]
        assert labels[-1] == end
        prompt, more_prompt = labels.count(-100), more_labels.count(-100)
        assert ids[:prompt] == more_ids[:more_prompt]
        trace, more_trace = (tokenizer.decode(each) for each in (ids[prompt:last], more_ids[more_prompt:more_last]))
        assert trace
        assert more_trace.startswith(trace)
        assert trace.endswith(".")
    assert changed == report.altered["shortened_to_fit"] >= 1 or turns > 1


def test_what_cannot_be_shortened_enough_is_dropped(tokenizer):
    rows = [row(0), {"messages": [{"role": "user", "content": "a " * 300}, {"role": "assistant", "content": "b"}]}]
    limit = max(lengths(rows[:1], tokenizer))
    _, report = prepare(rows, tokenizer, max_length=limit, on_long_row="shorten_reasoning")
    assert (report.kept, report.skipped) == (1, {"too_long": 1})


# --- reasoning options ------------------------------------------------------------------------------------------


def test_only_the_end_of_long_traces_is_trained(tokenizer):
    rows = [row(number) for number in range(10)]
    data, report = prepare(rows, tokenizer, reasoning=ReasoningOptions(close_at=40))
    close, end = (tokenizer.convert_tokens_to_ids(token) for token in ("</think>", "<|im_end|>"))
    assert 0 < len(data) < 10
    assert report.kept == len(data)
    assert report.skipped == {"trace_too_short": 10 - len(data)}
    for ids, labels, mode in listed(data):
        assert MODES[mode].value == "thinking"
        assert [label for label in labels if label != -100] == [close, end]
        opened = ids.index(tokenizer.convert_tokens_to_ids("<think>"))
        assert labels.index(close) - opened - 1 == pytest.approx(40, abs=2)


def test_traces_are_shortened_and_removed(tokenizer):
    rows = [row(number) for number in range(40)]
    plain = prepare(rows, tokenizer)[1]
    data, report = prepare(
        rows,
        tokenizer,
        reasoning=ReasoningOptions(shorten_fraction=0.4, shorten_budget=(20, 60), remove_fraction=0.2),
    )
    assert report.altered["removed_reasoning"] > 0
    assert report.altered["shortened_reasoning"] > 0
    assert report.sequences["thinking"] == 40 - report.altered["removed_reasoning"]
    assert report.sequences["non_thinking"] == 40
    assert report.tokens["thinking"] < plain.tokens["thinking"]
    total = report.account.to_dict()["total"]
    assert total["tokens_before"] == plain.tokens["thinking"]
    assert len(data) == sum(report.sequences.values())


# --- weights, duplicates, pairs ---------------------------------------------------------------------------------


def test_a_weight_repeats_or_thins_rows(tokenizer):
    rows = [row(number) for number in range(40)]
    once = listed(prepare(rows, tokenizer)[0])
    assert listed(prepare(Source(rows, 2), tokenizer)[0]) == [
        each for pair in zip(once[::2], once[1::2], strict=True) for each in (*pair, *pair)
    ]
    half, report = prepare(Source(rows, 0.5), tokenizer)
    assert 10 <= len(half) // 2 <= 30
    assert (report.read, report.kept) == (40, 40)
    assert report.noted["not_drawn"] == 40 - len(half) // 2


@pytest.mark.parametrize("processes", [1, 2])
def test_duplicates_are_counted_or_dropped(processes, write, tokenizer, monkeypatch):
    monkeypatch.setattr(preparing, "CHUNK_ROWS", 3)
    path = write([row(number % 8) for number in range(12)])
    data, report = prepare(path, tokenizer, processes=processes)
    assert (len(data), report.noted["duplicate"]) == (24, 4)
    options = RecordOptions(drop_duplicates=True)
    data, report = prepare(path, tokenizer, records=options, processes=processes)
    assert (len(data), report.kept, report.skipped) == (16, 8, {"duplicate": 4})


def test_pre_paired_rows_have_an_answer_per_mode(tokenizer):
    rows = [{"prompt": "2+2?", "thinking": "<think>two and two</think>4, I think", "non_thinking": "4"}]
    data = listed(prepare(rows, tokenizer)[0])
    texts = [tokenizer.decode([label for label in labels if label != -100]) for _, labels, _ in data]
    assert texts == ["two and two</think>4, I think<|im_end|>", "4<|im_end|>"]


def test_the_account_has_every_source_mode_and_language(write, tokenizer):
    english = write([{"question": "Why?", "reasoning": "Since so", "answer": "So"}], "en.jsonl")
    korean = write([{"question": "왜 그래요?", "answer": "그래요"}] * 2, "ko.jsonl")
    _, report = prepare([english, korean], tokenizer)
    cells = {
        (cell["source"], cell["mode"], cell["language"]): (cell["rows_before"], cell["rows_after"])
        for cell in report.account.to_dict()["by"]
    }
    assert cells == {
        (english, "thinking", "latin"): (1, 1),
        (english, "non_thinking", "latin"): (0, 1),
        (korean, "non_thinking", "ko"): (2, 2),
    }


def test_a_row_of_both_modes_brings_each_into_the_account(tokenizer):
    messages = [*row(0)["messages"], *row(1, thinks=False)["messages"]]
    single = prepare([{"messages": messages}], tokenizer, mixture="combined")[1]
    paired = prepare([{"messages": messages}], tokenizer)[1]
    before = paired.account.to_dict()["total"]["tokens_before"]
    assert before == sum(single.tokens.values()) < sum(paired.tokens.values())


# --- the cache --------------------------------------------------------------------------------------------------


def test_prepared_rows_are_kept_and_taken_again(write, mixed_rows, tokenizer, tmp_path, monkeypatch):
    path, cache = write(mixed_rows), tmp_path / "cache"
    options = {"records": ALL, "mixture": MixtureOptions("ratio", ratio=0.5), "cache_dir": cache}
    first, report = prepare(path, tokenizer, **options)

    def fail(*_):
        raise AssertionError("the rows were read again")

    monkeypatch.setattr(sequences.SequenceMaker, "__call__", fail)
    second, again = prepare(path, tokenizer, **options)
    assert listed(second) == listed(first)
    assert again.to_dict() == report.to_dict()
    assert list(again.entries()) == list(report.entries())
    assert again.prompt_keys == report.prompt_keys
    assert str(again.account) == str(report.account)
    for changed in ({"mixture": MixtureOptions()}, {"max_length": 500}, {"records": RecordOptions(max_skipped=0.5)}):
        with pytest.raises(AssertionError, match="read again"):
            prepare(path, tokenizer, **{**options, **changed})
    with pytest.raises(AssertionError, match="read again"):
        prepare(write(mixed_rows[:-1]), tokenizer, **options)


def test_rows_in_memory_are_not_kept(tokenizer, tmp_path):
    prepare([row(0)], tokenizer, cache_dir=tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*"))


def test_a_failed_run_leaves_nothing_behind(write, mixed_rows, tokenizer, tmp_path):
    with pytest.raises(DataError):
        prepare(write(mixed_rows), tokenizer, cache_dir=tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*"))


def be_killed(_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_told(write, tokenizer, monkeypatch):
    monkeypatch.setattr("thinkfusion.preparing._make", be_killed)
    with pytest.raises(ChildProcessError, match=r"one of the 2 that prepare rows was killed.*Fewer processes"):
        prepare(write([row(0), row(1)]), tokenizer, processes=2)


def test_the_plan_says_whether_all_sequences_must_be_known():
    assert not Plan().chooses
    assert Plan(mixture=MixtureOptions("sequential")).chooses
    assert not Plan(mixture=MixtureOptions("sequential")).needs_draws
    assert Plan(mixture=MixtureOptions(max_rows_per_source=3)).needs_draws


def test_conversations_keep_the_source_they_came_from(tokenizer, write):
    path = write([row(0), row(1)])
    conversations, read = read_conversations(path)
    _, report = prepare(conversations, tokenizer, report=read)
    assert (report.read, report.kept) == (2, 2)
    assert {cell["source"] for cell in report.account.to_dict()["by"]} == {path}
    made = Conversation.from_messages(row(2)["messages"])
    assert len(prepare([made], tokenizer)[0]) == 2


def test_evaluation_prompts_found_in_the_training_rows_are_named(tokenizer, write):
    _, report = prepare(write([row(0), row(1), row(2)]), tokenizer)
    asked = [
        EvaluationPrompt(({"role": "assistant", "content": "no row begins so"},)),
        EvaluationPrompt(tuple(row(7)["messages"][:1])),
        EvaluationPrompt(tuple(row(2)["messages"][:1])),
        EvaluationPrompt(tuple(row(0)["messages"][:1])),
    ]
    found = overlap_with_training(report, asked)
    assert found
    assert (found.evaluation, found.training, found.prompts) == ([2, 3], [0, 2], 4)
    assert "2 of 4 evaluation prompts are found in 2 training rows" in str(found)
    assert not overlap_with_training(report, asked[:2])


def test_the_worker_of_a_loader_makes_a_stream_by_itself(tokenizer, monkeypatch):
    """It is a daemon, which may start no processes."""
    rows = [{"question": "a", "reasoning": "b", "answer": "c"}]
    expected = list(prepare(rows, tokenizer, streaming=True)[0])
    monkeypatch.setattr(multiprocessing, "current_process", lambda: SimpleNamespace(daemon=True))
    monkeypatch.setattr("thinkfusion.preparing.ProcessPoolExecutor", None)
    assert list(prepare(rows, tokenizer, streaming=True, processes=2)[0]) == expected
