# SPDX-License-Identifier: Apache-2.0
"""The checkpoint of `make demo` in three servers: the same prompts, the same replies, split right, in both modes."""

import time
from concurrent.futures import ThreadPoolExecutor

from tests.serving.asking import ask, stream
from tests.serving.conftest import AT_A_TIME
from tests.serving.engine_prompts import prompt_ids
from tests.serving.matrix import rows
from tests.serving.reference import END, MOST_TOKENS, TIE, written
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
    odd = sum(row.control for row in matrix)
    counts = {"equal": len(matrix) - odd - lost - len(wrong), "control strings": odd, "reasoning lost": lost}
    figures.setdefault(server.engine, {})["prompts"] = {**counts, "of": len(matrix)}
    assert not wrong, "\n".join([f"{len(wrong)} of {len(matrix)}", *wrong[:5]])


def same_reply(server, reference, theirs, ours):
    """Whether the model wrote the same.

    transformers serve takes text out of a reply that is not in its mode's format: of such a one the number of tokens
    and the answer are compared.
    """
    if server.engine != "transformers" or ours.kind == "ok":
        return theirs.written() == written(ours)
    text = written(ours)
    return theirs.tokens == len(reference.ids(text + END)) and text.endswith(theirs.written().removesuffix(END))


def test_greedy_replies_are_those_of_transformers(server, reference, asked, figures):
    equal, lines, worst = {}, [], 0.0
    for mode in Mode:
        pairs = list(zip(asked[mode], reference.replies[mode], strict=True))
        other = [index for index, (theirs, ours) in enumerate(pairs) if not same_reply(server, reference, theirs, ours)]
        equal[mode.value] = len(pairs) - len(other)
        for index in other:
            apart, line = reference.margin(index, mode, asked[mode][index].written())
            worst = max(worst, apart)
            lines.append(line)
    figures.setdefault(server.engine, {})["greedy"] = {**equal, "of": len(reference.prompts), "differences": lines}
    assert worst <= TIE, "\n".join(lines)
    assert min(equal.values()) >= EQUAL * len(reference.prompts), "\n".join(lines)


def split_right(mode, reply):
    """Whether a reply came in the parts that its mode has, without a tag in either."""
    right = bool(reply.reasoning) == (mode is Mode.THINKING) and bool(reply.answer)
    return right and not any(tag in part for tag in TAGS for part in (reply.reasoning, reply.answer))


def in_format(reference, mode):
    """The prompts to which the checkpoint itself replies in the format of the mode: only these can be split."""
    return [index for index, ours in enumerate(reference.replies[mode]) if ours.kind == "ok"]


def test_replies_are_split(server, reference, asked, figures):
    jobs = [(mode, index) for mode in Mode for index in in_format(reference, mode)]
    wrong = [(mode.value, index) for mode, index in jobs if not split_right(mode, asked[mode][index])]
    figures.setdefault(server.engine, {})["split, whole"] = {"wrong": len(wrong), "of": len(jobs)}
    assert not wrong, wrong[:5]


def test_streams_are_split(server, reference, asked, figures):
    jobs = [(mode, index) for mode in Mode for index in range(len(reference.prompts))]
    with ThreadPoolExecutor(AT_A_TIME) as workers:
        streamed = workers.map(
            lambda job: stream(server, reference.prompts[job[1]].messages, job[0], max_tokens=MOST_TOKENS), jobs
        )
        found = dict(zip(jobs, streamed, strict=True))
    kept = [(mode, index) for mode in Mode for index in in_format(reference, mode)]
    order = {Mode.THINKING: ("reasoning", "answer"), Mode.NON_THINKING: ("answer",)}
    wrong = [job for job in kept if not split_right(job[0], found[job]) or found[job].order != order[job[0]]]
    # transformers serve streams what it takes out of a whole reply that is not in its mode's format.
    alike = kept if server.engine == "transformers" else jobs
    other = [job for job in alike if found[job].parts() != asked[job[0]][job[1]].parts()]
    counts = {"wrong": len(wrong), "of": len(kept), "otherwise than whole": len(other)}
    figures.setdefault(server.engine, {})["split, streamed"] = counts
    assert not wrong, wrong[:5]
    assert len(other) <= (1 - EQUAL) * len(jobs), [(job, found[job], asked[job[0]][job[1]]) for job in other[:5]]


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
    equal, wrong = 0, []
    for (mode, index), reply in zip(jobs, found, strict=True):
        # A reply that the checkpoint itself gives out of its mode's format is no mistake of the server.
        same = same_reply(server, reference, reply, reference.replies[mode][index])
        equal += same
        if not same and not split_right(mode, reply):
            wrong.append((mode.value, index, reply))
        if reference.replies[mode][index].kind == "ok" and not split_right(mode, reply):
            wrong.append((mode.value, index, reply))
    counts = {"wrong mode": len(wrong), "equal": equal, "of": CONCURRENT, "seconds": round(seconds, 1)}
    figures.setdefault(server.engine, {})["at once"] = counts
    assert not wrong, wrong[:5]
