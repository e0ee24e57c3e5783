# SPDX-License-Identifier: Apache-2.0
"""Broken rows by the hundred thousand: none may crash anything, none may be missing from the account.

    python tests/benchmarks/fuzzing.py --rows 200000 --processes 2 --json fuzzing.json

Rows of every format are broken at random (types, keys, nesting, nulls, lone surrogates, huge texts, control tokens,
roles, bytes, lines), written as JSON Lines, and read, rendered and tokenised under the policy `skip`, with default
options and with those that forgive most. Of each chunk some sequences are compared with the chat template. Lines are
counted apart from the reader that is tested. `--data` adds real rows to those that are broken.
"""

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

from thinkfusion import install_chat_template
from thinkfusion.checkpointing import tiny_base_path
from thinkfusion.formats import FORMATS, RecordOptions, detect_format
from thinkfusion.records import account
from thinkfusion.row_report import RowReport
from thinkfusion.sequences import Chunk, Plan, SequenceMaker
from thinkfusion.sources import Source, as_sources, iterate_raw, iterate_rows

CHUNK_ROWS, CHECKED_ROWS, MAX_LENGTH, SHOWN_CRASHES = 200, 4, 4096, 5
DEEP = "@deep@"
TEXTS = [
    *("What is 17 + 25?", "Sum the digits of 9041 modulo 10.", "Write a haiku about rain.", "e\u0301 vs é", "42", "{}"),
    *("서울에서 부산까지 몇 km인가요?", "네, 맞습니다.", "👩‍👩‍👧 means family 🎉", "שלום, מה שלומך?"),
    *("First, 17 + 25 = 42.\nSo the answer is 42.", "Let me think. 먼저 더하면 9 + 0 = 9.", "a | b\n--|--\n1 | 2"),
    "def f(x):\n    return x ** 2\n",
]
CONTROL = [
    *("<think>", "</think>", "<|im_start|>system", "<|im_end|>", "<|endoftext|>", "[INST]", "[/INST]", "<s>", "<|im_"),
    *("<thinking>", "◁think▷", "<think>\n\n</think>\n\n", "/no_think", "/think", "<｜User｜>", "<tool_call>"),
    "<|channel|>",
]
ODD = ["\0", "\x1b[31m", "\r", "\u2028", "\u202e", "\ufeff", "\ud83d", "\udc00", " ", "\t\n", "\u0301", "\U0010ffff"]
WORDS = ["role", "content", "system", "user", "Human", "bot", "tool", "assistant ", "ASSISTANT", "mode", "id", "\\"]
HUGE = ["x", "ab ", "한글 ", "\n", "<think>", "🎉", "1 + 1 = 2. "]
JUNK = [None, True, False, 0, -1, 3.5, 10**30, float("nan"), float("inf"), "", " \n", "null", "[]", "{", DEEP]
BYTES = [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\n", b"\r\n", b"\0", b"\xef\xbb\xbf", b"}", b'"', b",", b"\\", b"\\u12"]
LENIENT = {
    **{"join_messages": True, "drop_first_assistant": True, "plain_control_tokens": True, "drop_reasoning": True},
    **{"reasoning_tags": "<thinking>,</thinking>", "drop_duplicates": True},
}


# --- rows that are whole ----------------------------------------------------------------------------------------


def whole_row(name: str, draw: random.Random) -> dict[str, Any]:
    """A row of the format, as data sets have it."""
    question, answer, reasoning = (draw.choice(TEXTS) for _ in range(3))
    if name == "messages":
        return {"messages": conversation(draw), **draw.choice([{}, {"tools": tools(draw)}, {"mode": None}])}
    if name == "prompt_completion":
        plain = {"prompt": question, "completion": f"<think>\n{reasoning}\n</think>\n\n{answer}"}
        *prompt, last = conversation(draw)
        return draw.choice([plain, {"prompt": prompt, "completion": [last]}])
    if name == "sharegpt":
        names = {"user": "human", "assistant": "gpt", "tool": "observation", "system": "system"}
        turns = [{"from": names[one["role"]], "value": shown(one)} for one in conversation(draw, with_tools=False)]
        if draw.random() < 0.3:
            call = {"from": "function_call", "value": json.dumps({"name": "add", "arguments": {"a": 1, "b": 2}})}
            turns[-1:-1] = [call, {"from": "observation", "value": '{"sum": 3}'}]
        return {"conversations": turns, "tools": json.dumps(tools(draw)), "system": draw.choice(["", "Be brief."])}
    if name == "alpaca":
        history = [[draw.choice(TEXTS), draw.choice(TEXTS)] for _ in range(draw.randint(0, 2))]
        return {"instruction": question, "input": draw.choice(["", answer]), "output": answer, "history": history}
    if name == "columns":
        return {"question": question, "reasoning": draw.choice([reasoning, None]), "answer": answer}
    thinking = draw.choice([f"<think>{reasoning}</think>{answer}", {"role": "assistant", "content": answer}])
    return {"prompt": question, "thinking": thinking, "non_thinking": answer, "reasoning": reasoning}


def conversation(draw: random.Random, with_tools: bool = True) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}] if draw.random() < 0.3 else []
    for _ in range(draw.randint(1, 3)):
        messages.append({"role": "user", "content": draw.choice(TEXTS)})
        if with_tools and draw.random() < 0.3:
            function = {"name": "add", "arguments": draw.choice([{"a": 1, "b": 2}, '{"a": 1, "b": null}'])}
            call = {"id": "call_1", "type": "function", "function": function}
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
            messages.append({"role": "tool", "tool_call_id": "call_1", "content": "3"})
        messages.append({"role": "assistant", **reply(draw)})
    return messages


def reply(draw: random.Random) -> dict[str, Any]:
    answer, reasoning = draw.choice(TEXTS), draw.choice(TEXTS)
    return draw.choice(
        [
            {"content": answer},
            {"content": answer, draw.choice(["reasoning_content", "reasoning", "thinking"]): reasoning},
            {"content": f"<think>\n{reasoning}\n</think>\n\n{answer}"},
            {"content": [{"type": "reasoning", "text": reasoning}, {"type": "text", "value": answer}]},
        ]
    )


def shown(message: dict[str, Any]) -> str:
    return message["content"] if isinstance(message["content"], str) else "42"


def tools(draw: random.Random) -> list[dict[str, Any]]:
    arguments = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": ["integer", "null"]}}}
    function = {"name": "add", "description": draw.choice(TEXTS), "parameters": arguments}
    return draw.choice([[{"type": "function", "function": function}], [function]])


# --- how they are broken ----------------------------------------------------------------------------------------


def broken_line(row: dict[str, Any], draw: random.Random) -> bytes:
    """The row as a line of JSON after some mutations, of its values first and then of its bytes."""
    holder = [json.loads(json.dumps(row))]
    for _ in range(draw.choice([0, 1, 1, 1, 2, 3, 6])):
        mutate(holder, draw)
    text = json.dumps(holder[0], ensure_ascii=draw.random() < 0.5)
    if DEEP in text:
        depth = draw.choice([3, 50, 300, 900, 20_000])
        left, right = draw.choice([("[", "]"), ('{"a":', "}")])
        text = text.replace(f'"{DEEP}"', left * depth + "1" + right * depth)
    data = text.encode("utf-8", "surrogatepass")
    return broken_bytes(data, draw) if draw.random() < 0.08 else data


def mutate(holder: list[Any], draw: random.Random) -> None:
    """Change one place in the tree of a row."""
    places = list(places_of(holder))
    parent, key = draw.choice(places)
    kind = draw.random()
    if kind < 0.25:
        parent[key] = junk(draw)
    elif kind < 0.4 and parent is not holder:
        del parent[key]
    elif kind < 0.5:
        parent[key] = draw.choice([[parent[key]], {"content": parent[key]}, json.dumps(parent[key]), [[parent[key]]]])
    elif kind < 0.6 and isinstance(parent, dict):
        parent[draw.choice([*WORDS, *CONTROL, *ODD, ""])] = parent.pop(key)
    elif kind < 0.65 and isinstance(parent, list):
        parent.insert(draw.randint(0, len(parent)), json.loads(json.dumps(parent[key])))
    elif kind < 0.7 and isinstance(parent, list):
        draw.shuffle(parent)
    elif isinstance(parent[key], str):
        parent[key] = spoilt(parent[key], draw)
    elif isinstance(parent[key], dict):
        parent[key][draw.choice(WORDS)] = junk(draw)


def places_of(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], (dict, list)):
            yield from places_of(tree[key])


def junk(draw: random.Random) -> Any:
    return draw.choice(
        [*JUNK, [], {}, [None], {"": None}, draw.choice(WORDS), draw.choice(CONTROL), draw.choice(TEXTS)]
    )


def spoilt(text: str, draw: random.Random) -> str:
    place = draw.randint(0, len(text))
    if draw.random() < 0.005:
        return text + draw.choice(HUGE) * draw.choice([10**4, 10**5])
    piece = draw.choice([*CONTROL, *CONTROL, *ODD, *TEXTS, draw.choice(WORDS)])
    inside = text[:place] + piece + text[place:]
    return draw.choice([inside, text[:place], piece, text.upper(), piece + text, text + piece])


def broken_bytes(data: bytes, draw: random.Random) -> bytes:
    place = draw.randint(0, len(data))
    if draw.random() < 0.4:
        return data[:place]
    return data[:place] + draw.choice(BYTES) + data[place + draw.choice([0, 0, 1, 3]) :]


def write_rows(path: Path, name: str, real: list[Any], count: int, draw: random.Random) -> int:
    """Write broken rows of a format; returns the number of lines that hold anything."""
    lines = 0
    with path.open("wb") as file:
        for _ in range(count):
            row = draw.choice(real) if real and draw.random() < 0.5 else whole_row(name, draw)
            data = broken_line(row, draw)
            file.write(data + b"\n")
            lines += sum(bool(part.strip()) for part in data.split(b"\n"))
    return lines


# --- reading them -----------------------------------------------------------------------------------------------


def prepared(chunk: Chunk, maker: SequenceMaker) -> tuple[list[Any], list[str], int]:
    """What became of the rows of a chunk, what they crashed, and the sequences made of them."""
    try:
        made = maker(chunk)
        return made.outcomes, [], len(made.mode)
    except Exception:
        if len(chunk.rows) == 1:
            (line, raw) = chunk.rows[0]
            return [], [f"{chunk.source}, row {line}: {raw[:300]!r}\n{traceback.format_exc(limit=-6)}"], 0
    parts = [prepared(chunk._replace(rows=[row], checked=1), maker) for row in chunk.rows]
    outcomes, crashes, counts = zip(*parts, strict=True)
    return list(chain(*outcomes)), list(chain(*crashes)), sum(counts)


_makers: dict[RecordOptions, SequenceMaker] = {}


def work(chunk: Chunk) -> tuple[list[Any], list[str], int]:
    if chunk.records not in _makers:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tiny_base_path())
        install_chat_template(tokenizer)
        lenient = chunk.records.join_messages
        plan = Plan(chunk.records, max_length=MAX_LENGTH, on_long_row="shorten_reasoning" if lenient else "drop")
        _makers[chunk.records] = SequenceMaker(tokenizer, plan)
    return prepared(chunk, _makers[chunk.records])


def chunks(path: Path, options: RecordOptions) -> Iterator[Chunk]:
    rows = iterate_raw(Source(path))
    while taken := list(islice(rows, CHUNK_ROWS)):
        yield Chunk(path.name, 1.0, options, taken, CHECKED_ROWS)


def real_rows(paths: list[Path]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for source in as_sources(paths):
        rows = [row for _, row in iterate_rows(source)]
        found.setdefault(detect_format(rows[0], RecordOptions(), source.name), []).extend(rows)
    return found


def run(rows: int, seed: int, processes: int, data: list[Path]) -> dict[str, Any]:
    report, crashes, lines, sequences = RowReport(), [], 0, 0
    real = real_rows(data) if data else {}
    start = time.perf_counter()
    cases = [(name, options) for name in FORMATS for options in ({}, LENIENT)]
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(processes) as pool:
        for number, (name, options) in enumerate(cases):
            path = Path(folder) / f"{name}-{number}.jsonl"
            count = rows // len(cases) + (number < rows % len(cases))
            lines += write_rows(path, name, real.get(name, []), count, random.Random(f"{seed} {number}"))
            records = RecordOptions(format=name, on_bad_row="skip", max_skipped=1.0, **options)
            for outcomes, found, made in pool.imap(work, chunks(path, records)):
                for outcome in outcomes:
                    account(report, outcome, records)
                crashes += found
                sequences += made
            path.unlink()
            print(f"{name}, {'lenient' if options else 'default'}: {report.read:,} rows so far", flush=True)
    skipped = sum(report.skipped.values())
    return {
        "ratios": {
            "accounted": (report.kept + skipped) / lines,
            "kept": report.kept / lines,
            "crashed": len(crashes) / lines,
        },
        "rows_in": lines,
        "rows_kept": report.kept,
        "sequences": sequences,
        **{kind: dict(getattr(report, kind).most_common()) for kind in ("skipped", "altered", "noted")},
        "crashes": crashes,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="files of real rows, to be broken as well")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = run(arguments.rows, arguments.seed, arguments.processes, arguments.data)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for crash in result["crashes"][:SHOWN_CRASHES]:
        print(crash, file=sys.stderr)
    print(json.dumps({**result, "crashes": len(result["crashes"])}, indent=2))
    if result["crashes"] or result["rows_in"] != result["rows_kept"] + sum(result["skipped"].values()):
        sys.exit("rows crashed the reader, or are missing from the account")


if __name__ == "__main__":
    main()
