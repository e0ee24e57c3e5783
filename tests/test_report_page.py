# SPDX-License-Identifier: Apache-2.0
"""The page of a mode report: its verdict, its figures, its transcripts, and what replies of any kind do to it."""

import json
import random
import re
from html import unescape
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinkfusion import EvaluationPrompt, Mode, Reply, save_page, save_report, split_reply
from thinkfusion.comparing import answered, compare
from thinkfusion.evaluation import summarise, token_histogram
from thinkfusion.intervals import wilson_interval
from thinkfusion.mode_verdict import verdict
from thinkfusion.modes import REPLY_CLASSES
from thinkfusion.obedience import CELLS
from thinkfusion.report_page import report_page
from thinkfusion.transcripts import KINDS, Failure, pieces

THINKING, NON_THINKING = Mode.THINKING, Mode.NON_THINKING


class Page(HTMLParser):
    """Every element with attributes, the figures (pointer, value, shown), and what cells hold beside them."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.figures, self.loose, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.elements.append((tag, given))
        self.open.append((tag, given))
        if tag in ("meta", "line", "circle", "rect", "polyline"):
            self.open.pop()
        if "data-of" in given and tag != "data":
            self.figures.append((given["data-of"], given["data-value"], None))

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, text):
        tag, given = self.open[-1] if self.open else ("", {})
        if tag == "data":
            self.figures.append((given["data-of"], given["value"], text))
        elif any(name == "td" for name, _ in self.open):
            self.loose.append(text)


def at(report, pointer):
    for part in pointer.removeprefix("/").split("/"):
        name = part.replace("~1", "/").replace("~0", "~")
        report = report[int(name)] if isinstance(report, list) else report[name]
    return report


def made(kinds="ok", count=20, **more):
    """A report of `count` prompts whose thinking replies have these kinds by turns."""
    kinds = kinds.split()
    prompts = [
        EvaluationPrompt(({"role": "user", "content": f"{n}?"},), str(n % 3), "a/b~c" if n % 2 else "sums", "en")
        for n in range(count)
    ]
    texts = {
        "ok": "so</think>0",
        "never_closed": "0",
        "empty_trace": "</think>0",
        "extra_tag": "so</think>0<think>1",
        "empty_answer": "so</think>",
        "truncated": "so on and",
    }
    thinking = []
    for n in range(count):
        kind = kinds[n % len(kinds)]
        reply = split_reply(texts[kind], THINKING, finished=kind != "truncated")
        assert reply.kind == kind
        thinking.append(reply)
    plain = [split_reply("wait, 1" if n % 4 == 3 else "1", NON_THINKING) for n in range(count)]
    replies = {THINKING: thinking, NON_THINKING: plain}
    return summarise(prompts, replies, {"seed": 0}, seconds={THINKING: 2.0, NON_THINKING: 1.0}, **more)


def measured():
    """All further measurements, with figures of their own."""
    share = {"share": 0.75, "share_interval": list(wilson_interval(3, 4)), "total": 4, "truncated": 0}
    cells = [
        {"hard": cell.hard, "soft": cell.soft and cell.soft.value, "system": cell.system, "turn": cell.turn}
        | {"expected": cell.expected(THINKING).value, "obeyed": 3, **share}
        for cell in CELLS
    ]
    turns = [{"mode": "thinking", "right": 3, **share} for _ in range(6)]
    point = {"within": 1.0, "within_interval": [0.9, 1.0], "accuracy": 0.25, "accuracy_interval": [0.1, 0.4]}
    point |= {"format_error": 0.0, "format_error_interval": [0.0, 0.1], "reasoning_tokens": 7.5}
    point |= {"reasoning_tokens_interval": [7.0, 8.0], "budget": 1024, "samples": 20}
    probe = {"samples": 8, **{name: 0.5 for name in ("closes", "trace_begins", "answer_begins")}}
    probe |= {f"{name}_interval": [0.25, 0.75] for name in ("closes", "trace_begins", "answer_begins")}
    report = made()
    return {
        "obedience": {"prompts": 4, "default": "thinking", "obeyed": 162, **share, "total": 216, "cells": cells},
        "flip": {"conversations": 8, "judged": 8, "turns": 6, "right": 36, **share, "total": 48, "unbroken": 2}
        | {"whole": 0.25, "whole_interval": [0.1, 0.5], "starts": {"thinking": turns, "non_thinking": turns}},
        "budgets": [point],
        "probe": probe,
        "comparison": compare(answered(report, "this"), answered(report, "<b>other</b>")),
        "harness": {"sums/x": {"exact_match": {"thinking": 0.5, "thinking_interval": [0.1, 0.9], "non_thinking": 1.0}}},
    }


SHOWN = {
    "%": lambda value: f"{100 * value:.1f} %",
    "bound": lambda value: f"{100 * value:.1f}",
    "points": lambda value: f"{100 * value:+.1f}",
    "count": lambda value: f"{value:,}",
    "mean": lambda value: f"{value:.1f}",
    "ratio": lambda value: f"{value:.2f}",
    "three": lambda value: f"{value:.3f}",
    "p": lambda value: f"{value:.2g}",
}


@pytest.mark.parametrize("kinds", ["ok", "ok never_closed extra_tag", " ".join(REPLY_CLASSES), "truncated"])
def test_every_number_of_the_page_is_that_of_the_report(tmp_path, kinds):
    report = made(kinds, measured=measured())
    saved = json.loads(save_report(report, tmp_path).read_text(encoding="utf-8"))
    page = Page(save_page(report, tmp_path, title="one").read_text(encoding="utf-8"))
    assert len(page.figures) > 300
    for pointer, value, shown in page.figures:
        found = at(saved, pointer)
        assert json.loads(value) == found, pointer
        assert shown is None or shown in {write(found) for write in SHOWN.values() if write is not SHOWN["count"]} | (
            {f"{found:,}"} if isinstance(found, int) else set()
        ), (pointer, shown)
    seen = {pointer for pointer, _, _ in page.figures}
    for mode in Mode:
        values = saved["modes"][mode.value]
        for name in ("format_error", "truncated", "leakage", "accuracy", "reasoning_tokens", "answer_tokens"):
            assert (f"/modes/{mode.value}/{name}" in seen) == (values[name] is not None)
        assert {f"/modes/{mode.value}/classes/{kind}" for kind in REPLY_CLASSES} <= seen
        assert f"/modes/{mode.value}/tasks/a~1b~0c/accuracy" in seen
    assert {f"/obedience/cells/{place}/share" for place in range(54)} <= seen
    names = {"sums", "a/b~c", "sums/x"}
    assert not [text for text in page.loose if re.search(r"\d", text) and text not in names]


def test_the_verdict_of_the_page_is_that_of_the_report(tmp_path):
    report = made("ok", 400)
    saved = json.loads(save_report(report, tmp_path).read_text(encoding="utf-8"))
    page = save_page(report, tmp_path).read_text(encoding="utf-8")
    assert saved["verdict"]["headline"] in unescape(page)
    counts = [saved["modes"][mode.value]["classes"] for mode in Mode]
    finished = sum(sum(each.values()) - each["truncated"] for each in counts)
    broken = finished - sum(each["ok"] for each in counts)
    assert f"{broken:,} of {finished:,} replies broke their mode" in saved["verdict"]["headline"]
    for line in (*saved["verdict"]["findings"], saved["verdict"]["rule"]):
        assert line in unescape(page)


@pytest.mark.parametrize(
    ("kinds", "count", "level", "words"),
    [
        ("ok", 400, "warning", "25.0 % of the non-thinking answers reason aloud"),
        ("ok", 20, "warning", "Not settled: 0 of 40 replies broke their mode, too few"),
        ("never_closed", 20, "bad", "The switch does not work in thinking mode: 20 of 40 replies broke"),
        ("truncated", 400, "warning", "most replies in thinking mode were cut at the token limit"),
    ],
)
def test_the_rule_of_the_verdict(kinds, count, level, words):
    found = made(kinds, count).verdict
    assert (found.level, words in found.headline) == (level, True), found


def figures(classes, **values):
    counted = dict.fromkeys(REPLY_CLASSES, 0) | classes
    whole = sum(counted.values())
    given = {"classes": counted, "samples": whole, "truncated": counted["truncated"] / whole, "leakage": 0.0}
    return given | {"leakage_interval": [0, 0], "accuracy": None, "reasoning_tokens": 3, "answer_tokens": 2} | values


def judged(first, measured=None):
    return verdict({"thinking": figures(first), "non_thinking": figures({"ok": 1000})}, measured)


def test_the_edges_of_the_rule():
    assert judged({"ok": 1000}).headline == "The switch works: 0 of 2,000 replies broke their mode."
    assert judged({"ok": 989, "extra_tag": 11}).level == "good"  # up to 1.96 %
    assert judged({"ok": 988, "extra_tag": 12}).level == "warning"  # up to 2.09 %
    assert judged({"ok": 960, "extra_tag": 40}).level == "bad"
    assert judged({"extra_tag": 2}).level == "warning"  # two are too few to condemn a switch
    assert "cut at the token limit" in judged({"ok": 880, "truncated": 120}).headline
    part = {"obeyed": 900, "total": 1000, "cells": [{}] * 54}
    found = judged({"ok": 1000}, {"obedience": part})
    assert (found.level, "100 of 1,000 disobeyed a switch" in found.headline) == ("warning", True)
    assert judged({"ok": 1000}, {"obedience": part | {"obeyed": 995}}).level == "good"


def test_the_page_needs_nothing_from_elsewhere():
    text = report_page(made(" ".join(REPLY_CLASSES), measured=measured()))
    assert "<script" not in text
    assert not re.search(r"https?:|//\w|url\(|@import|\bsrc=", text)
    for tag, attributes in Page(text).elements:
        assert tag not in ("script", "link", "iframe", "img", "object", "a")
        assert not [name for name in attributes if name.startswith("on") or name in ("href", "src")]


def test_text_is_escaped_and_its_control_characters_are_seen():
    evil = "<script>alert(1)</script>\x1b[31m\u202egnp\x00\ud800"
    prompt = EvaluationPrompt(({"role": "user", "content": evil},), "4", "<i>task</i>", "en")
    replies = {mode: [split_reply(f"{evil}<think>", mode)] for mode in Mode}
    text = report_page(summarise([prompt], replies, {"seed": "<u>"}), title="<h1>")
    text.encode("utf-8")
    assert not [tag for tag, _ in Page(text).elements if tag in ("script", "u")]
    assert "&lt;script&gt;" in text
    assert "\\x1b[31m\\u202egnp\\x00\\ud800" in text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", text)


@pytest.mark.parametrize(
    ("text", "mode", "finished", "marks"),
    [
        ("It is 4.", THINKING, True, [("missing", "ends without </think>")]),
        ("</think>4", THINKING, True, [("broken", "</think>")]),
        ("so</think>", THINKING, True, [("missing", "ends without an answer")]),
        ("a</think>b<think>c</think>d", THINKING, True, [("broken", "<think>"), ("broken", "</think>")]),
        ("4</think>5", NON_THINKING, True, [("broken", "</think>")]),
        ("so on", THINKING, False, [("missing", "cut here")]),
    ],
)
def test_the_broken_place_is_marked(text, mode, finished, marks):
    reply = split_reply(text, mode, finished=finished)
    found = pieces(Failure(reply.kind, "", (), reply))
    assert [piece for piece in found if piece.kind in ("broken", "missing")] == marks
    assert "".join(piece.text for piece in found if piece.kind != "missing") == text


def test_a_leak_is_marked_word_by_word():
    reply = split_reply("so</think>Wait, 4. Hmm!", THINKING)
    found = pieces(Failure("leakage", "", (), reply))
    assert [piece.text for piece in found if piece.kind == "broken"] == ["Wait", "Hmm"]
    assert "".join(piece.text for piece in found) == "so</think>Wait, 4. Hmm!"
    long = Reply(NON_THINKING, "", "4", "ok", True, 0, 30)
    assert pieces(Failure("leakage", "", (), long, cap=10.0))[-1].text == "30 tokens, over the cap of 10"


def test_histogram_bins_hold_every_reply():
    lengths = [0, 1, 9, 10, 11, 239, 240, 999]
    replies = {mode: [Reply(mode, "", "", "ok", True, n, 0) for n in lengths] for mode in Mode}
    found = token_histogram(replies)
    assert found["width"] == 50
    assert len(found["thinking"]) == 20
    assert (sum(found["thinking"]), found["thinking"][0], found["thinking"][4], found["thinking"][19]) == (8, 5, 2, 1)
    assert token_histogram({mode: [] for mode in Mode})["thinking"] == [0]


# --- replies of any kind ----------------------------------------------------------------------------------------

BITS = (
    "<think>",
    "</think>",
    "<|im_end|>",
    "<|im_start|>",
    "wait",
    "답은 4",
    "4",
    "\n",
    " ",
    "</thi",
    "nk>",
    "\x00",
    "\u202e",
)
BITS += ("\ud83d", "\ufffd", "```\n</think>\n```", "<tool_call>{", "}</tool_call>", "$", "(", "%", "\\", "", "hmm" * 50)


def test_ten_thousand_malformed_replies_each_have_one_class(tokenizer):
    """As text and as ids, in both modes and schemes, through the metrics and onto a page."""
    draw, count = random.Random(0), 10_000
    prompts, replies = [], {mode: [] for mode in Mode}
    vocabulary = len(tokenizer)
    for n in range(count // 2):
        solution = draw.choice((None, "4", "</think>", ""))
        grader = draw.choice(("auto", "exact", "choice", "regex"))
        prompts.append(EvaluationPrompt(({"role": "user", "content": "?"},), solution, f"t{n % 3}", "en", grader))
        for mode in Mode:
            scheme, finished = draw.choice(("control", "empty-block")), draw.choice((True, False, None))
            if n % 2:
                given = "".join(draw.choice(BITS) for _ in range(draw.randint(0, 8)))
                reply = split_reply(given, mode, finished=finished, scheme=scheme)
            else:
                given = [draw.randrange(vocabulary) for _ in range(draw.randint(0, 12))]
                if draw.random() < 0.7:
                    given.insert(draw.randint(0, len(given)), tokenizer.convert_tokens_to_ids("</think>"))
                reply = split_reply(given, mode, tokenizer=tokenizer, finished=finished, scheme=scheme)
            assert REPLY_CLASSES.count(reply.kind) == 1
            assert reply.format_error == (reply.kind not in ("ok", "truncated"))
            replies[mode].append(reply)
    report = summarise(prompts, replies, {}, seconds=dict.fromkeys(Mode, 1.0))
    for values in report.modes.values():
        assert sum(values["classes"].values()) == count // 2
        assert min(values["classes"][kind] for kind in ("ok", "extra_tag", "truncated")) > 0
        assert 0 <= values["format_error"] <= 1
    failures = report.failures(3)
    assert {failure.kind for failure in failures} <= set(KINDS)
    assert all(pieces(failure) or not failure.reply.pieces[0] for failure in failures)
    json.dumps(report.to_dict())
    report_page(report).encode("utf-8")


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(BITS) | st.text(max_size=8), max_size=8), st.sampled_from(list(Mode)), st.booleans())
def test_any_text_is_one_reply(bits, mode, finished):
    text = "".join(bits)
    for scheme in ("control", "empty-block"):
        reply = split_reply(text, mode, finished=finished, scheme=scheme)
        assert reply.kind in REPLY_CLASSES
        assert len(reply.pieces) % 2 == 1
        assert all(tag in ("<think>", "</think>") for tag in reply.pieces[1::2])
        shown = pieces(Failure(reply.kind, "", (), reply))
        assert "".join(piece.text for piece in shown if piece.kind != "missing") == "".join(reply.pieces)
        report = summarise([EvaluationPrompt(({},))], {each: [reply] for each in Mode}, {})
        assert sum(report.modes["thinking"]["classes"].values()) == 1
