# SPDX-License-Identifier: Apache-2.0
"""Shortening, removing and closing reasoning: what is kept, what is counted, and that answers stay."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkfusion.conversations import Conversation, DataError, Message
from thinkfusion.mixture import MixtureOptions, assign_modes
from thinkfusion.modes import Mode
from thinkfusion.shortening import ReasoningOptions, apply_reasoning_options, shorten, shorten_to_fit

BOTH, THINKING, NON_THINKING = tuple(Mode), (Mode.THINKING,), (Mode.NON_THINKING,)
TRACE = "One is odd. Two is even.\nThree follows! Is that all? Yes."


def ends_of(text):
    """A tokenizer of words with the space before them; each East Asian character is a token."""
    return [
        match.end() for match in re.finditer(r"\s*[ぁ-ヿ一-鿿가-힣。！？]|\s*[^\sぁ-ヿ一-鿿가-힣。！？]+|\s+\Z", text)
    ]


def conversation(*traces, line=1):
    """One exchange per trace, or None; both modes where there is a trace, as `paired` assigns them."""
    messages = []
    for number, trace in enumerate(traces):
        messages += [
            {"role": "user", "content": f"question {number}"},
            {"role": "assistant", "content": f"answer {number}", "reasoning_content": trace},
        ]
    own = replace(Conversation.from_messages(messages), source="data/rows.jsonl", line=line)
    return assign_modes(own, MixtureOptions())


def with_tool_loop(first, second):
    messages = [
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "reasoning_content": first,
            "tool_calls": [{"function": {"name": "look", "arguments": {"at": 1}}}],
        },
        {"role": "tool", "content": "seen. Really."},
        {"role": "assistant", "content": "answer", "reasoning_content": second},
    ]
    return assign_modes(replace(Conversation.from_messages(messages), source="t", line=1), MixtureOptions())


def pre_paired(trace):
    row = conversation(trace)
    other = (Message("assistant", "a given short answer"),)
    return replace(row, exchanges=(replace(row.exchanges[0], alternative=other),))


def without_traces(row):
    """All that must never change: questions, answers, calls, tool results, alternatives."""
    return [
        (exchange.user, [(m.role, m.content, m.tool_calls) for m in exchange.steps], exchange.alternative)
        for exchange in row.exchanges
    ]


def traces(row):
    return [[step.reasoning for step in exchange.steps] for exchange in row.exchanges]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three? Four… Five", ["One.", "One. Two!", "One. Two! Three?", "One. Two! Three? Four…"]),
        ("Pi is 3.14 or so. Next 2.5.7 end", ["Pi is 3.14 or so."]),
        ("답은 3.5입니다. 맞아요. 끝", ["답은 3.5입니다.", "답은 3.5입니다. 맞아요."]),
        ("これです。次は？！そう！終", ["これです。", "これです。次は？！", "これです。次は？！そう！"]),
        ("“他走了。”然后呢", ["“他走了。”"]),
        ("He said “no.” (Why?) So", ["He said “no.”", "He said “no.” (Why?)"]),
        ("first line  \n\nsecond\r\nthird", ["first line", "first line  \n\nsecond"]),
        ("1. Add\n2. Halve it. 3", ["1. Add", "1. Add\n2. Halve it."]),
        ("Primes, e.g. 7 or i.e. 5. So", ["Primes, e.g. 7 or i.e. 5."]),
        ("5! = 120. b", ["5! = 120."]),
        ("It is 5!\nThat is\n120.\nor so", ["It is 5!", "It is 5!\nThat is", "It is 5!\nThat is\n120."]),
        ("x ? a : b. c", ["x ? a : b."]),
        ("see a.py and b != c. d", ["see a.py and b != c."]),
        ("**Done.** x", ["**Done.**"]),
        ("यह है। अब", ["यह है।"]),
        ("no end here", []),
        ("   \n\n x", []),
        ("这样吗？\ufe00 好", ["这样吗？\ufe00"]),
    ],
)
def test_where_sentences_end(text, sentences):
    """By a tokenizer of characters, every budget that is too small for the text ends at the last end before it."""
    ends = range(1, len(text) + 1)
    found = [shorten(text, ends, budget) for budget in range(1, len(text))]
    assert list(dict.fromkeys(each for each in found if each is not None and each != text.rstrip())) == sentences
    for budget, each in enumerate(found, start=1):
        assert each == max((s for s in [*sentences, text.rstrip()] if len(s) <= budget), key=len, default=None)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (0, None),
        (-3, None),
        (2, None),
        (3, "One is odd."),
        (5, "One is odd."),
        (6, "One is odd. Two is even."),
        (11, "One is odd. Two is even.\nThree follows! Is that all?"),
        (12, TRACE),
        (99, TRACE),
    ],
)
def test_a_budget_is_of_tokens(budget, expected):
    assert len(ends_of(TRACE)) == 12
    assert shorten(TRACE, ends_of(TRACE), budget) == expected


def test_a_token_across_the_end_is_not_split():
    """`.\\n` is one token of many tokenizers: the sentence ends inside the third token, and needs it."""
    assert shorten("So it.\nIs", [2, 5, 7, 9], 2) is None
    assert shorten("So it.\nIs", [2, 5, 7, 9], 3) == "So it."


WORDS = st.text(st.sampled_from("ab1 .!?…\n\r\t。！？다요)”\u0301\ufe0f🙂e3g-*"), min_size=1, max_size=60)


@given(WORDS, st.integers(1, 70), st.integers(1, 4))
def test_what_is_left_is_a_beginning(text, budget, width):
    ends = [*range(width, len(text), width), len(text)]
    result = shorten(text, ends, budget)
    if result is None:
        assert budget < len(ends) or not text.strip()
        return
    assert result
    assert text.startswith(result)
    assert result == result.rstrip()
    assert len(result) <= ends[min(budget, len(ends)) - 1]
    if budget >= len(ends):
        assert result == text.rstrip()
    rest = text[len(result) :]
    assert not (result[-1] == "." and rest[:1].isdigit())


@given(WORDS, st.integers(2, 60))
def test_a_larger_budget_never_gives_less(text, budget):
    ends = range(1, len(text) + 1)
    assert len(shorten(text, ends, budget) or "") >= len(shorten(text, ends, budget - 1) or "")


@pytest.mark.parametrize(
    "text", ["e.g. " * 40_000, "." * 200_000, " " * 200_000 + "a", "1.\n" * 60_000, "a.)" * 60_000]
)
def test_a_strange_trace_takes_no_long_time(text):
    shorten(text, range(1, len(text) + 1), len(text) - 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shorten_fraction": 1.5, "shorten_budget": (1, 2)}, r"shorten_fraction: found 1.5.*--shorten_fraction"),
        ({"remove_fraction": -0.1}, r"remove_fraction: found -0.1.*--remove_fraction"),
        ({"remove_fraction": float("nan")}, "remove_fraction: found nan"),
        ({"remove_fraction": True}, "remove_fraction: found True"),
        ({"remove_fraction": "0.1"}, "remove_fraction: found '0.1'"),
        ({"shorten_fraction": 0.6, "shorten_budget": (1, 2), "remove_fraction": 0.5}, "more than all rows"),
        ({"shorten_fraction": 0.1}, "shorten_budget: .*go together"),
        ({"shorten_budget": (1, 2)}, "shorten_budget: .*go together"),
        ({"close_at": 0}, r"close_at: found 0.*--close_at"),
        ({"close_at": 2.0}, "close_at: found 2.0"),
        ({"close_at": 9, "remove_fraction": 0.1}, "close_at: .*neither"),
        ({"close_at": 9, "shorten_fraction": 0.1, "shorten_budget": "1,2"}, "close_at: .*neither"),
        ({"seed": -1}, "seed: found -1"),
        *(
            ({"shorten_fraction": 0.1, "shorten_budget": budget}, r"shorten_budget: found .*--shorten_budget 32,512")
            for budget in ["512,32", "0,5", "5", "a,b", "1,2,3", "1.5,2", (5, 4), (True, 2), (1,), 7, (1.0, 2.0), ""]
        ),
    ],
)
def test_bad_options_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ReasoningOptions(**arguments)


def test_a_budget_may_be_text():
    given_as_text = ReasoningOptions(shorten_fraction=0.1, shorten_budget=" 32, 512")
    assert given_as_text.shorten_budget == (32, 512)
    assert given_as_text == ReasoningOptions(shorten_fraction=0.1, shorten_budget=[32, 512])
    assert hash(given_as_text) == hash(ReasoningOptions(shorten_fraction=0.1, shorten_budget=[32, 512]))


def test_active_says_whether_anything_is_done():
    assert not ReasoningOptions().active
    assert ReasoningOptions(remove_fraction=0.1).active
    assert ReasoningOptions(close_at=3).active
    assert ReasoningOptions(shorten_fraction=0.1, shorten_budget=(1, 2)).active


def test_nothing_is_done_by_default():
    row, notes = conversation(TRACE, None), []
    assert apply_reasoning_options(row, ReasoningOptions(), ends_of, notes) is row
    assert notes == []


def test_shares_are_of_all_rows_and_no_row_is_in_both():
    options = ReasoningOptions(shorten_fraction=0.3, shorten_budget=(3, 8), remove_fraction=0.2)
    removed = shortened = 0
    for line in range(4000):
        row, notes = conversation(TRACE, line=line), []
        changed = apply_reasoning_options(row, options, ends_of, notes)
        reasons = [note.reason for note in notes]
        removed += reasons == ["removed_reasoning"]
        shortened += reasons == ["shortened_reasoning"]
        assert (changed != row) == bool(reasons)
        assert len(reasons) <= 1
    # Five standard deviations.
    assert abs(removed - 800) < 130
    assert abs(shortened - 1200) < 150


def test_draws_differ_by_seed_and_not_by_folder():
    def removed(seed, source):
        options = ReasoningOptions(remove_fraction=0.5, seed=seed)
        rows = [replace(conversation(TRACE, line=line), source=source) for line in range(64)]
        return [apply_reasoning_options(row, options, ends_of, []) != row for row in rows]

    assert removed(0, "a/rows.jsonl") == removed(0, "b/rows.jsonl")
    assert removed(0, "a/rows.jsonl") != removed(1, "a/rows.jsonl")
    assert removed(0, "a/rows.jsonl") != removed(0, "a/others.jsonl")


def test_removing_leaves_answers_in_non_thinking_mode():
    row = conversation(TRACE, None, TRACE)
    row = replace(row, exchanges=(*row.exchanges[:2], replace(row.exchanges[2], modes=())))
    notes = []
    changed = apply_reasoning_options(row, ReasoningOptions(remove_fraction=1), ends_of, notes)
    assert traces(changed) == [[None], [None], [None]]
    assert [exchange.modes for exchange in changed.exchanges] == [NON_THINKING, NON_THINKING, ()]
    assert without_traces(changed) == without_traces(row)
    assert notes == [("altered", "removed_reasoning", "of 2 exchanges")]
    assert (changed.source, changed.line) == (row.source, row.line)


def test_removing_from_a_tool_loop_removes_all_traces():
    row = with_tool_loop(TRACE, TRACE)
    changed = apply_reasoning_options(row, ReasoningOptions(remove_fraction=1), ends_of, [])
    assert traces(changed) == [[None, None, None]]
    assert without_traces(changed) == without_traces(row)


def test_removing_from_a_pre_paired_row_leaves_its_non_thinking_answer():
    changed = apply_reasoning_options(pre_paired(TRACE), ReasoningOptions(remove_fraction=1), ends_of, [])
    (exchange,) = changed.exchanges
    assert [step.content for step in exchange.steps] == ["a given short answer"]
    assert exchange.modes == NON_THINKING
    assert exchange.alternative == ()


@pytest.mark.parametrize("options", [ReasoningOptions(remove_fraction=1), ReasoningOptions(1, (1, 3))])
def test_rows_not_trained_in_thinking_mode_are_left_alone(options):
    for row in (conversation(None), assign_modes(conversation(TRACE), MixtureOptions(pair_fraction=0, seed=1))):
        fixed = replace(row, exchanges=(replace(row.exchanges[0], modes=NON_THINKING),))
        notes = []
        assert apply_reasoning_options(fixed, options, ends_of, notes) is fixed
        assert notes == []


def test_shortening_keeps_answers_and_modes():
    row, notes = conversation(TRACE, None, "Short."), []
    changed = apply_reasoning_options(row, ReasoningOptions(1, (6, 6)), ends_of, notes)
    assert traces(changed) == [["One is odd. Two is even."], [None], ["Short."]]
    assert without_traces(changed) == without_traces(row)
    assert [exchange.modes for exchange in changed.exchanges] == [BOTH, NON_THINKING, BOTH]
    assert notes == [("altered", "shortened_reasoning", "exchange 1, step 1: 6 of 12 tokens")]


def test_shortening_leaves_history_of_no_mode_and_pre_paired_answers():
    row = conversation(TRACE, TRACE)
    row = replace(row, exchanges=(replace(row.exchanges[0], modes=()), row.exchanges[1]))
    changed = apply_reasoning_options(row, ReasoningOptions(1, (3, 3)), ends_of, [])
    assert traces(changed) == [[TRACE], ["One is odd."]]
    changed = apply_reasoning_options(pre_paired(TRACE), ReasoningOptions(1, (3, 3)), ends_of, [])
    assert without_traces(changed) == without_traces(pre_paired(TRACE))
    assert traces(changed) == [["One is odd."]]


def test_a_trace_that_fits_is_left_as_it_is():
    """Byte for byte: not even the white space at its end goes."""
    row, notes = conversation("A short one.  \n "), []
    assert apply_reasoning_options(row, ReasoningOptions(1, (4, 40)), ends_of, notes) is row
    assert notes == []


def test_a_trace_without_a_sentence_end_stays_whole_and_is_counted():
    row, notes = conversation("a b c d e f"), []
    assert apply_reasoning_options(row, ReasoningOptions(1, (2, 3)), ends_of, notes) is row
    ((kind, reason, detail),) = notes
    assert (kind, reason) == ("noted", "no_sentence_end")
    assert re.fullmatch(r"exchange 1, step 1: [23] of 6 tokens", detail)


def test_budgets_are_even_over_the_whole_range_and_each_trace_has_its_own():
    trace = " ".join(f"W{number}." for number in range(30))
    lengths = []
    for line in range(600):
        row = conversation(trace, trace, line=line)
        changed = apply_reasoning_options(row, ReasoningOptions(1, (5, 10)), ends_of, [])
        lengths.append(tuple(len(ends_of(each)) for (each,) in traces(changed)))
    for position in (0, 1):
        counts = [sum(pair[position] == length for pair in lengths) for length in range(5, 11)]
        assert sum(counts) == 600
        assert min(counts) > 60
        assert max(counts) < 140
    assert sum(first == second for first, second in lengths) < 160


def test_closing_trains_the_ends_of_long_traces_only():
    row, notes = conversation(TRACE, "Short.", None), []
    changed = apply_reasoning_options(row, ReasoningOptions(close_at=4), ends_of, notes)
    assert traces(changed) == [["One is odd. Two"], ["Short."], [None]]
    assert [exchange.modes for exchange in changed.exchanges] == [THINKING, (), ()]
    assert [exchange.ends_only for exchange in changed.exchanges] == [True, False, False]
    assert without_traces(changed) == without_traces(row)
    assert notes == [("altered", "closed_reasoning", "at 4 tokens: exchange 1")]


def test_a_mixture_leaves_a_closed_row_alone():
    closed = apply_reasoning_options(conversation(TRACE, TRACE[:11]), ReasoningOptions(close_at=4), ends_of, [])
    assert assign_modes(closed, MixtureOptions()) == closed


@pytest.mark.parametrize("row", [conversation(TRACE), conversation(None), conversation("Short.", "One more.")])
def test_a_row_without_a_long_trace_cannot_be_closed(row):
    notes = []
    with pytest.raises(DataError, match=r"rows\.jsonl, row 1: .*more than 12 tokens.*--close_at") as caught:
        apply_reasoning_options(row, ReasoningOptions(close_at=12), ends_of, notes)
    assert caught.value.reason == "trace_too_short"
    assert notes == []


def test_closing_never_leaves_a_blank_trace():
    def characters(text):
        return range(1, len(text) + 1)

    with pytest.raises(DataError):
        apply_reasoning_options(conversation("  \n Long enough."), ReasoningOptions(close_at=3), characters, [])
    changed = apply_reasoning_options(conversation("  \n Long enough."), ReasoningOptions(close_at=5), characters, [])
    assert traces(changed) == [["  \n L"]]


def test_context_is_not_closed():
    row = conversation(TRACE, TRACE)
    row = replace(row, exchanges=(replace(row.exchanges[0], modes=()), row.exchanges[1]))
    changed = apply_reasoning_options(row, ReasoningOptions(close_at=4), ends_of, [])
    assert [exchange.modes for exchange in changed.exchanges] == [(), THINKING]
    assert traces(changed)[0] == [TRACE]


def test_shortening_to_fit():
    row = conversation(TRACE, TRACE)
    changed = shorten_to_fit(row, {1: 5}, ends_of)
    assert traces(changed) == [[TRACE], ["One is odd. Two is even."]]
    assert without_traces(changed) == without_traces(row)
    assert [exchange.modes for exchange in changed.exchanges] == [BOTH, BOTH]
    assert traces(shorten_to_fit(row, {0: 1, 1: 9}, ends_of)) == [[TRACE.removesuffix(" Yes.")], ["One is odd."]]


@pytest.mark.parametrize("excess", [{0: 10}, {0: 99}, {0: 1, 1: 10}, {2: 1}])
def test_what_cannot_fit_is_none(excess):
    assert shorten_to_fit(conversation(TRACE, TRACE, None), excess, ends_of) is None


@pytest.mark.parametrize("trace", ["1.", "e.g.", "5!", "x"])
def test_a_trace_of_one_short_sentence_cannot_fit(trace):
    assert shorten_to_fit(conversation(trace), {0: 1}, ends_of) is None


def test_fitting_takes_the_longest_trace_first():
    row = with_tool_loop("Look there. Now.", TRACE)
    assert traces(shorten_to_fit(row, {0: 6}, ends_of)) == [["Look there. Now.", None, "One is odd. Two is even."]]
    assert traces(shorten_to_fit(row, {0: 9}, ends_of)) == [["Look there. Now.", None, "One is odd."]]
    assert traces(shorten_to_fit(row, {0: 10}, ends_of)) == [["Look there.", None, "One is odd."]]
    assert shorten_to_fit(row, {0: 11}, ends_of) is None


@given(st.lists(WORDS.filter(str.strip), min_size=1, max_size=3), st.integers(1, 40), st.integers(1, 5))
def test_fitting_saves_enough_or_gives_up(texts, excess, width):
    def ends(text):
        return [*range(width, len(text), width), len(text)]

    row = conversation(*texts)
    changed = shorten_to_fit(row, {0: excess}, ends)
    if changed is None:
        return
    assert without_traces(changed) == without_traces(row)
    (before,), (after,) = traces(row)[0], traces(changed)[0]
    assert before.startswith(after)
    assert after.strip()
    assert len(ends(before)) - len(ends(after)) >= excess
    assert traces(changed)[1:] == traces(row)[1:]


@given(
    st.lists(st.one_of(st.none(), WORDS.filter(str.strip)), min_size=1, max_size=4),
    st.sampled_from([ReasoningOptions(1, (1, 9)), ReasoningOptions(remove_fraction=1), ReasoningOptions(close_at=2)]),
    st.integers(0, 99),
)
def test_no_option_touches_an_answer(texts, options, line):
    row, notes = conversation(*texts, line=line), []
    try:
        changed = apply_reasoning_options(row, options, ends_of, notes)
    except DataError:
        assert options.close_at
        return
    assert without_traces(changed) == without_traces(row)
    for (before,), (after,) in zip(traces(row), traces(changed), strict=True):
        assert after is None or (after.strip() and before.startswith(after))
    assert (changed != row) == any(note.kind == "altered" for note in notes)
