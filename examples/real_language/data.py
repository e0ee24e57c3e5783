# SPDX-License-Identifier: Apache-2.0
"""Real text for both modes: grade-school problems with their solutions, instructions, and conversations with tools.

The folder is given by the user (or is `../shared/data` beside the repository), and nothing of it is kept here:

    gsm8k_train.jsonl, gsm8k_test.jsonl    question, answer (openai/grade-school-math, MIT)
    alpaca.json                            instruction, input, output
    glaive_toolcall.json                   ShareGPT with calls and results
    reason_tool_use.jsonl                  messages with reasoning and calls (of these two, either may be absent)

A problem is a row with a trace: its worked solution, without the calculator's marks, is the reasoning, and its last
line the answer. In non-thinking mode every second problem, drawn by the seed, is answered by that line, and the others
by the worked solution itself, as a model that does not think first would write it: the same text ends with the closing
token in one mode and with the turn in the other, so that nothing but the mode tells which. Instructions are trained as
is asked for: in neither mode, so that it is measured whether both hold where they were never trained; in non-thinking
mode alone; or in both, with a trace made by a rule. Conversations with tools get traces by a rule too, where they have
none: a kind of text that is trained in one mode alone would tell how it ends. What is drawn depends on the seed alone,
and fewer rows are the first of more.
"""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from thinkfusion import Conversation, EvaluationPrompt, RecordOptions, read_conversations

DEFAULT = Path(__file__).resolve().parents[2].parent / "shared" / "data"
NEEDED = ("gsm8k_train.jsonl", "gsm8k_test.jsonl", "alpaca.json")
INSTRUCTIONS = ("none", "non_thinking", "paired")
TOOLS = ("glaive_toolcall.json", "reason_tool_use.jsonl")
HELD_OUT_SEED = 2026
"""Decides what is held out, whatever the seed of the training is."""
ALPACA_HELD_OUT, PROBE_ROWS, FLIP_TURNS = 200, 64, 3
LONGEST_CHARACTERS = 2400
"""Of a row with all its messages and tools: about 600 tokens."""
MULTI_TURN_SHARE, ALPACA_SHARE, TOOLS_SHARE = 0.25, 0.125, 0.125
"""Share of the problems that stand in conversations of two; further rows for each problem."""
WRITTEN_SHARE = 0.5
"""Share of the problems whose non-thinking answer is the worked solution."""
ANSWER = "Answer: "
"""How the last line begins; no trace does. Where it was "The answer is", the modes parted at the second word only, with
few rows to learn it from, and a trace that began with "The" went on as an answer."""
_MARK = re.compile(r"<<[^>]*>>")


class DataMissingError(Exception):
    """The data is not where it was looked for."""


@dataclass(frozen=True)
class RealData:
    """Everything that is trained and measured; `folder` holds the files."""

    folder: Path
    problems: tuple[dict[str, str], ...]
    tests: tuple[dict[str, str], ...]
    instructions: tuple[dict[str, str], ...]
    held_out_instructions: tuple[dict[str, str], ...]
    tools: tuple[Conversation, ...]

    def training_rows(self, rows: int, seed: int, instructions: str = "none") -> list[Conversation]:
        """Conversations with `rows` paired problems, and tool use, and instructions unless "none", in their shares."""
        drawn = random.Random(seed)
        problems = drawn.sample(self.problems, len(self.problems))[:rows]
        problems = [draw_written(row, seed) for row in problems]
        single = round(rows * (1 - MULTI_TURN_SHARE))
        made = [as_conversation([row]) for row in problems[:single]]
        made += [as_conversation(problems[start : start + 2]) for start in range(single, rows, 2)]
        chosen = drawn.sample(self.instructions, len(self.instructions))[: max(1, round(rows * ALPACA_SHARE))]
        if instructions == "paired":
            made += [as_conversation([{**row, "reasoning": row["trace"]}]) for row in chosen]
        elif instructions == "non_thinking":
            made += [as_conversation([row]) for row in chosen]
        made += drawn.sample(self.tools, len(self.tools))[: max(1, round(rows * TOOLS_SHARE))]
        drawn.shuffle(made)
        return made

    def prompts(self, name: str, count: int) -> list[EvaluationPrompt]:
        """The first `count` held-out prompts of `gsm8k` or `alpaca`."""
        rows = self.tests if name == "gsm8k" else self.held_out_instructions
        return [
            EvaluationPrompt(
                ({"role": "user", "content": row["question"]},),
                number_of(row["answer"]) if name == "gsm8k" else None,
                name,
                "en",
                "numeric" if name == "gsm8k" else "auto",
            )
            for row in rows[:count]
        ]

    def reference_tokens(self, tokenizer: Any, count: int) -> float:
        """Mean tokens of the reference traces of the first `count` problems that are asked."""
        traces = [row["reasoning"] for row in self.tests[:count]]
        return sum(map(len, tokenizer(traces, add_special_tokens=False)["input_ids"])) / len(traces)

    def probe_pairs(self, count: int = PROBE_ROWS) -> list[Conversation]:
        """Problems of the test file that no prompt uses, for the switch probe."""
        return [as_conversation([row]) for row in self.tests[-count:]]

    def further_pairs(self, count: int = PROBE_ROWS) -> dict[str, list[Conversation]]:
        """Such problems with their solutions as non-thinking answers (`written`, in that mode only), and held-out
        instructions, with traces by the rule: where other kinds of answers end."""
        return {
            "written": [
                as_conversation([{**row, "reasoning": "", "answer": row["reasoning"]}]) for row in self.tests[-count:]
            ],
            "instructions": [
                as_conversation([{**row, "reasoning": row["trace"]}]) for row in self.held_out_instructions[:count]
            ],
        }

    def flips(self, conversations: int, turns: int = FLIP_TURNS) -> list[list[EvaluationPrompt]]:
        """Questions of conversations: a problem and an instruction by turns."""
        problems, instructions = self.prompts("gsm8k", len(self.tests)), self.prompts("alpaca", ALPACA_HELD_OUT)
        sources = (problems, instructions)
        return [
            [sources[turn % 2][(index * turns + turn) % len(sources[turn % 2])] for turn in range(turns)]
            for index in range(conversations)
        ]


def read_data(folder: Path | None = None) -> RealData:
    """Read the folder. Raises DataMissingError with what is missing."""
    folder = folder or DEFAULT
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing:
        raise DataMissingError(f"{folder}: {', '.join(missing)} not found. Say with --data DIR where the files are.")
    held = random.Random(HELD_OUT_SEED)
    tests = [problem(row) for row in _lines(folder / "gsm8k_test.jsonl")]
    held.shuffle(tests)
    instructions = [
        instruction(row)
        for row in json.loads((folder / "alpaca.json").read_text(encoding="utf-8"))
        if len(row["output"].strip()) > 0
        and len(row["instruction"] + row["input"] + row["output"]) < LONGEST_CHARACTERS
    ]
    # A question that comes twice must not be on both sides.
    instructions = list({row["question"]: row for row in instructions}.values())
    held.shuffle(instructions)
    tools = [
        with_traces(row)
        for name in TOOLS
        if (folder / name).is_file()
        for row in read_conversations(folder / name, RecordOptions(on_bad_row="skip", max_skipped=1.0))[0]
        if len(json.dumps([row.to_messages(), row.tools])) < LONGEST_CHARACTERS
    ]
    return RealData(
        folder,
        tuple(problem(row) for row in _lines(folder / "gsm8k_train.jsonl")),
        tuple(tests),
        tuple(instructions[ALPACA_HELD_OUT:]),
        tuple(instructions[:ALPACA_HELD_OUT]),
        tuple(tools),
    )


def _lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def problem(row: dict[str, str]) -> dict[str, str]:
    """A problem in the library's columns."""
    worked, _, final = row["answer"].rpartition("####")
    reasoning = _MARK.sub("", worked).strip()
    return {"question": row["question"].strip(), "reasoning": reasoning, "answer": f"{ANSWER}{final.strip()}"}


def draw_written(row: dict[str, str], seed: int, share: float = WRITTEN_SHARE) -> dict[str, str]:
    """The problem, with its solution as the non-thinking answer (`written`) in that share of them.

    Drawn by its text, so that fewer rows are the first of more, answers included.
    """
    drawn = random.Random(f"{seed} {row['question']}").random()
    return {**row, "written": row["reasoning"]} if drawn < share else row


def number_of(answer: str) -> str:
    return answer.removeprefix(ANSWER).replace(",", "")


def instruction(row: dict[str, str]) -> dict[str, str]:
    """An instruction in the library's columns, without reasoning; `trace` is its reasoning where it is paired."""
    question = "\n".join(part.strip() for part in (row["instruction"], row["input"]) if part.strip())
    answer = row["output"].strip()
    return {"question": question, "reasoning": "", "answer": answer, "trace": trace_of(row["instruction"], answer)}


def trace_of(asked: str, answer: str) -> str:
    """The rule for a trace: what is asked, said again, and what the answer begins with.

    It teaches form, not thought; `thinkfusion generate-pairs` makes traces with a model.
    """
    begins = re.split(r"(?<=[.!?])\s", answer, maxsplit=1)[0]
    return f"I am asked: {asked.strip()}\nI can begin with this: {begins}"


def with_traces(conversation: Conversation) -> Conversation:
    """The conversation with reasoning in every message of the assistant: by the rule, where there is none."""
    messages = conversation.to_messages()
    asked = ""
    for message in messages:
        if message["role"] == "user":
            asked = message["content"]
        elif message["role"] == "assistant" and not message.get("reasoning_content"):
            calls = ", ".join(call["function"]["name"] for call in message.get("tool_calls", []))
            message["reasoning_content"] = trace_of(asked, f"I call {calls}." if calls else message["content"])
    return Conversation.from_messages(messages, tools=conversation.tools)


def as_conversation(rows: Sequence[dict[str, str]]) -> Conversation:
    """One conversation, a turn for each row; where a row has `written`, that is its answer in non-thinking mode."""
    messages: list[dict[str, Any]] = []
    for row in rows:
        answer = {"role": "assistant", "content": row["answer"]}
        answer |= {"reasoning_content": row["reasoning"]} if row["reasoning"] else {}
        messages += [{"role": "user", "content": row["question"]}, answer]
    made = Conversation.from_messages(messages)
    exchanges = [
        replace(exchange, alternative=(replace(exchange.steps[0], content=row["written"], reasoning=None),))
        if "written" in row
        else exchange
        for exchange, row in zip(made.exchanges, rows, strict=True)
    ]
    return replace(made, exchanges=tuple(exchanges))
