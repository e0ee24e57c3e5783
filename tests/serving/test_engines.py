# SPDX-License-Identifier: Apache-2.0
"""The checkpoint of `make demo` in three servers: the same prompts, the same replies, split right, in both modes."""

import time
from concurrent.futures import ThreadPoolExecutor

from tests.serving.asking import ask, stream
from tests.serving.conftest import AT_A_TIME
from tests.serving.engine_prompts import prompt_ids
from tests.serving.matrix import rows
from tests.serving.reference import MOST_TOKENS, TIE, whole_text
from thinkfusion.modes import Mode

EQUAL = 0.99
CONCURRENT = 200
TAGS = ("<think>", "</think>", "<|im_end|>", "<|im_start|>")


def template_ids(reference, row):
    prompt = reference.tokenizer.apply_chat_template(
        row.messages, tools=row.tools, add_generation_prompt=True, enable_thinking=row.thinking, return_dict=True
    )
    return list(prompt["input_ids"])


def without_reasoning(server, row):
    """The row as the server reads it: transformers serve leaves out the reasoning of messages."""
    if server.engine != "transformers":
        return row
    kept = [{key: value for key, value in each.items() if key != "reasoning_content"} for each in row.messages]
    return row._replace(messages=kept)


def test_prompts_have_the_same_ids(server, reference, figures):
    matrix = rows()
    wrong, lost = [], 0
    for row, theirs in zip(matrix, prompt_ids(server, matrix), strict=True):
        mode = Mode.parse(row.thinking)
        ours = reference.prompter.prompt_ids(row.messages, mode, row.tools)
        if row.control:
            # Servers tokenise the rendered text as a whole: a control string of a user becomes a control token.
            assert theirs == template_ids(reference, row), row.name
            assert theirs != ours, row.name
            continue
        read = without_reasoning(server, row)
        expected = reference.prompter.prompt_ids(read.messages, mode, row.tools)
        lost += expected != ours
        if theirs != expected:
            shown = reference.tokenizer.decode(expected), reference.tokenizer.decode(theirs)
            wrong.append(f"{row.name}:\n  ours   {shown[0]!r}\n  theirs {shown[1]!r}")
    # The reasoning before a tool's result is what they lose: thinking mode, with and without a system text, twice.
    assert lost == (4 if server.engine == "transformers" else 0)
    figures.setdefault(server.engine, {})["prompts"] = {"equal": len(matrix) - len(wrong), "of": len(matrix)}
    assert not wrong, "\n".join([f"{len(wrong)} of {len(matrix)}", *wrong[:5]])


def test_greedy_replies_are_those_of_transformers(server, reference, asked, figures):
    equal, lines, worst = {}, [], 0.0
    for mode in Mode:
        same = [theirs.parts() == tuple(ours) for theirs, ours in zip(asked[mode], reference.replies[mode], strict=True)]
        equal[mode.value] = sum(same)
        for index in [place for place, each in enumerate(same) if not each]:
            apart, line = reference.margin(index, mode, whole_text(asked[mode][index].parts(), mode))
            worst = max(worst, apart)
            lines.append(line)
    print("\n".join(lines))
    figures.setdefault(server.engine, {})["greedy"] = {**equal, "of": len(reference.prompts), "differences": lines}
    assert worst <= TIE, "\n".join(lines)
    assert min(equal.values()) >= EQUAL * len(reference.prompts), "\n".join(lines)


def split_right(mode, reply, ours):
    """Whether a reply came in the parts that its mode has; `ours` says what became of it without a server."""
    thinking = mode is Mode.THINKING
    finished = ours.kind != "truncated"
    right = bool(reply.reasoning) == thinking and (bool(reply.answer) or not finished)
    return right and not any(tag in part for tag in TAGS for part in (reply.reasoning, reply.answer))


def test_replies_are_split(server, reference, asked, figures):
    wrong = [
        (mode.value, reply)
        for mode in Mode
        for reply, ours in zip(asked[mode], reference.replies[mode], strict=True)
        if not split_right(mode, reply, ours)
    ]
    figures.setdefault(server.engine, {})["split wrong, whole"] = len(wrong)
    assert not wrong, wrong[:5]


def test_streams_are_split(server, reference, asked, figures):
    jobs = [(mode, index) for mode in Mode for index in range(len(reference.prompts))]
    with ThreadPoolExecutor(AT_A_TIME) as workers:
        streamed = workers.map(
            lambda job: stream(server, reference.prompts[job[1]].messages, job[0], max_tokens=MOST_TOKENS), jobs
        )
        found = list(zip(jobs, streamed, strict=True))
    wrong = []
    for (mode, index), reply in found:
        ordered = reply.order == (("reasoning", "answer") if mode is Mode.THINKING else ("answer",))
        cut = reference.replies[mode][index].kind == "truncated"
        if not split_right(mode, reply, reference.replies[mode][index]) or not (ordered or cut):
            wrong.append((mode.value, index, reply))
    other = sum(reply.parts() != asked[mode][index].parts() for (mode, index), reply in found)
    figures.setdefault(server.engine, {})["split wrong, streamed"] = len(wrong)
    figures[server.engine]["streamed otherwise than whole"] = other
    assert not wrong, wrong[:5]
    assert other <= (1 - EQUAL) * len(jobs)


def test_requests_of_both_modes_at_once(server, reference, figures):
    jobs = [(list(Mode)[index % 2], index) for index in range(CONCURRENT)]
    begun = time.monotonic()
    with ThreadPoolExecutor(CONCURRENT) as workers:
        found = list(
            workers.map(
                lambda job: ask(server, reference.prompts[job[1]].messages, job[0], max_tokens=MOST_TOKENS), jobs
            )
        )
    seconds = time.monotonic() - begun
    wrong, equal = [], 0
    for (mode, index), reply in zip(jobs, found, strict=True):
        other = next(each for each in Mode if each is not mode)
        ours, theirs = (tuple(reference.replies[each][index]) for each in (mode, other))
        equal += reply.parts() == ours
        if not split_right(mode, reply, reference.replies[mode][index]) or reply.parts() == theirs != ours:
            wrong.append((mode.value, index, reply))
    figures.setdefault(server.engine, {})["at once"] = {
        "wrong mode": len(wrong),
        "equal": equal,
        "of": CONCURRENT,
        "seconds": round(seconds, 1),
    }
    assert not wrong, wrong[:5]
