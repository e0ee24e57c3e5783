# SPDX-License-Identifier: Apache-2.0
"""Replies of a served model to many prompts: at once, bounded, asked again after a fault, and never twice for a reply.

Every answer is written to a journal as it comes, so that a run that was cut goes on where it was.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from thinkfusion.endpoint import FAULTS, LONGEST_WAIT, Answer, Endpoint, EndpointError, RequestError
from thinkfusion.endpoint_presets import Switch
from thinkfusion.endpoint_reading import alike, read_answer, reasons, remarks, shows_reasoning
from thinkfusion.generation import Messages
from thinkfusion.modes import Mode, Reply

if TYPE_CHECKING:
    from collections.abc import Iterable

    from httpx2 import AsyncClient
    from tokenizers import Tokenizer
    from tqdm import tqdm

JOURNAL_NAME = "endpoint_replies.jsonl"
_FIRST_WAIT, _WAIT = 1.0, 30.0
_ASKED_FOR_DEFAULT = 8
_TELLING = 3
_ADVICE = {
    "no_connection": " Is the server running, and is this its address?",
    "unreadable": " Is this the address of the API (most often it ends in /v1)?",
    "refused": " If it is the switch that it does not take, see --preset, --thinking_body and --non_thinking_body.",
}


class Request(NamedTuple):
    """What is asked, and the mode that the reply is read in; None where no switch is given."""

    body: dict[str, Any]
    mode: Mode | None


class Journal:
    """Answers by request, in a file of JSON lines that is appended to. A last line that was cut is dropped.

    Raises EndpointError for a file that is no journal.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, Answer] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        whole = self._read()
        if whole != path.stat().st_size:
            os.truncate(path, whole)
        self.found = len(self.answers)

    def _read(self) -> int:
        """Reads the answers; the size of what is whole."""
        size = 0
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    row = json.loads(line)
                    self.answers[row["key"]] = Answer(**{**row["answer"], "noted": tuple(row["answer"]["noted"])})
                except (ValueError, KeyError, TypeError):
                    raise EndpointError(
                        f"{self.path}: found a line that is no reply of an earlier run. Remove the file, or name "
                        "another --output."
                    ) from None
                size += len(line)
        return size

    def add(self, key: str, answer: Answer) -> None:
        self.answers[key] = answer
        row = json.dumps({"key": key, "answer": answer._asdict()})
        self._file.write(row.encode() + b"\n")
        self._file.flush()

    def close(self, *, remove: bool) -> None:
        self._file.close()
        if remove:
            self.path.unlink(missing_ok=True)


@dataclass
class EndpointReplier:
    """A served model and how it is asked; what `Replier` is for a checkpoint (see `replying.Asked`).

    concurrency: requests at once. retries: attempts after the first, each after a longer pause, or after the one that
    the server asks for. A prompt that fails in all of them is `unanswered`; when as many as are asked at once do so,
    without a reply in between, the run ends with EndpointError. budget_field: the field of a request that takes a
    thinking budget.
    """

    endpoint: Endpoint
    switch: Switch
    journal: Journal
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    concurrency: int = 64
    retries: int = 5
    tokenizer: Tokenizer | None = None
    budget_field: str | None = None
    progress: bool = True
    offline: bool = False
    """Nothing is asked any more: what has no answer in the journal is unanswered."""
    faults: Counter[str] = field(default_factory=Counter)
    _problems: dict[str, Answer] = field(default_factory=dict)
    _asked: dict[str, tuple[Mode | None, Answer]] = field(default_factory=dict)
    _refused: int = 0
    _lost_in_a_row: int = 0
    _succeeded: int = 0
    _paused_until: float = 0.0

    @property
    def soft_switch(self) -> bool:
        return self.switch.soft

    def job(self, messages: Messages, mode: Mode) -> Request:
        return Request(self._body(messages) | dict(self.switch.bodies[mode]), mode)

    def served(self, messages: Messages, hard: bool | None) -> Request:
        if hard is None:
            return Request(self._body(messages), None)
        return self.job(messages, Mode.parse(hard))

    def _body(self, messages: Messages) -> dict[str, Any]:
        body: dict[str, Any] = {
            "messages": [dict(message) for message in messages],
            "max_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
        }
        return body | ({"seed": self.seed} if self.temperature else {})

    def default_mode(self, asked: Sequence[Mapping[str, Any]]) -> Mode:
        """What most replies to the first of the messages are without a switch: nothing else says it of a server."""
        requests = [self.served([message], None) for message in asked[:_ASKED_FOR_DEFAULT]]
        shown = [self.shown_mode(reply) for reply in self.replies(requests, label="default mode")]
        return Mode.NON_THINKING if shown.count(Mode.NON_THINKING) * 2 > len(shown) else Mode.THINKING

    def shown_mode(self, reply: Reply) -> Mode | None:
        if reply.kind == "ok":
            return reply.mode
        if reply.mode is Mode.THINKING and reply.kind == "empty_trace" and reply.answer:
            return Mode.NON_THINKING
        reasoned = reply.mode is Mode.NON_THINKING and reply.reasoning and reply.answer and not reply.pieces
        return Mode.THINKING if reasoned else None

    def replies(
        self, jobs: Sequence[Request], *, thinking_budget: int | None = None, label: str = "replies"
    ) -> list[Reply]:
        return self.timed(jobs, thinking_budget=thinking_budget, label=label)[0]

    def timed(
        self, jobs: Sequence[Request], *, thinking_budget: int | None = None, label: str = "replies"
    ) -> tuple[list[Reply], dict[Mode, float]]:
        """One reply for each request, in their order, and the seconds in which requests of each mode were under way.

        Raises EndpointError if the endpoint cannot be asked, or not any further.
        """
        if thinking_budget is not None:
            if self.budget_field is None:
                raise EndpointError("budgets: say which field of a request takes one; --budget_field of vLLM is "
                                    "thinking_token_budget.")  # fmt: skip
            jobs = [Request(job.body | {self.budget_field: thinking_budget}, job.mode) for job in jobs]
        keys = list(self._keys(jobs))
        waiting = {key: job for key, job in zip(keys, jobs, strict=True) if key not in self.journal.answers}
        if waiting and not self.offline:
            asyncio.run(self._ask_all(waiting, len(jobs), label))
        missing = Answer(problem="the run ended before")
        answers = [self.journal.answers.get(key) or self._problems.get(key) or missing for key in keys]
        self._asked.update((key, (job.mode, answer)) for key, job, answer in zip(keys, jobs, answers, strict=True))
        hides = not any(map(shows_reasoning, self.journal.answers.values()))
        replies = [
            read_answer(answer, job.mode, self.switch, self.tokenizer, hides=hides)
            for answer, job in zip(answers, jobs, strict=True)
        ]
        times = {
            mode: _covered(
                (answer.began, answer.ended)
                for answer, job in zip(answers, jobs, strict=True)
                if job.mode is mode and answer.problem is None
            )
            for mode in Mode
        }
        return replies, times

    def _keys(self, jobs: Sequence[Request]) -> Iterator[str]:
        """What a request is known by in the journal; a prompt that is there twice is asked twice."""
        seen: Counter[str] = Counter()
        asked = (self.endpoint.url, self.endpoint.model, self.endpoint.stream)
        for job in jobs:
            text = json.dumps([*asked, job.body], sort_keys=True)
            seen[text] += 1
            yield hashlib.sha256(f"{seen[text]}{text}".encode()).hexdigest()[:32]

    async def _ask_all(self, waiting: Mapping[str, Request], total: int, label: str) -> None:
        from tqdm.auto import tqdm

        # A server that is not there, or a switch that it does not take, is known after one request of each mode.
        first: dict[Mode | None, str] = {}
        for key, job in waiting.items() if not self._succeeded else ():
            first.setdefault(job.mode, key)
        bar = tqdm(total=total, initial=total - len(waiting), desc=label, disable=not self.progress)
        with bar:
            async with self.endpoint.client(self.concurrency) as client:
                for key in first.values():
                    await self._ask(client, key, waiting[key], bar, enough=min(_TELLING, len(waiting)))
                asked = {*first.values()}
                left = ((key, job) for key, job in waiting.items() if key not in asked)
                tasks = [
                    asyncio.create_task(self._work(client, left, bar))
                    for _ in range(min(self.concurrency, len(waiting)))
                ]
                try:
                    await asyncio.gather(*tasks)
                finally:
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)

    async def _work(self, client: AsyncClient, left: Iterable[tuple[str, Request]], bar: tqdm[Any]) -> None:
        for key, job in left:
            await self._ask(client, key, job, bar)

    async def _ask(self, client: AsyncClient, key: str, job: Request, bar: tqdm[Any], enough: int = _TELLING) -> None:
        answer = await self._patiently(client, job, enough)
        if answer.problem is None:
            self.journal.add(key, answer)
        else:
            self._problems[key] = answer
        bar.update()

    async def _patiently(self, client: AsyncClient, job: Request, enough: int) -> Answer:
        """Asks until there is an answer or no hope for one; `enough` requests that are refused are no accident."""
        attempts, succeeded = 0, self._succeeded
        draw = random.Random(json.dumps(job.body, sort_keys=True))
        while True:
            # Others may have been told to wait while this one slept.
            while (left := self._paused_until - time.monotonic()) > 0:
                await asyncio.sleep(left)
            try:
                answer = await self.endpoint.ask(client, job.body)
            except RequestError as error:
                fault = error
            else:
                self._succeeded += 1
                self._lost_in_a_row = 0
                return answer
            self.faults[fault.kind] += 1
            if fault.kind == "busy" and self._succeeded > succeeded:
                # Others get their turn: so will this one.
                attempts, succeeded = 0, self._succeeded
            attempts += 1
            if fault.kind == "refused":
                self._refused += 1
                if not self._succeeded and not self.journal.found and self._refused >= enough:
                    raise EndpointError(f"{self.endpoint.url}: {fault}.{_ADVICE[fault.kind]}")
                return Answer(problem=str(fault))
            if not self._succeeded and fault.kind in _ADVICE:
                raise EndpointError(f"{self.endpoint.url}: {fault}.{_ADVICE[fault.kind]}")
            if attempts > self.retries:
                self._lost_in_a_row += 1
                if not self._succeeded or self._lost_in_a_row >= max(_TELLING, self.concurrency):
                    raise EndpointError(
                        f"{self.endpoint.url}: no reply any more, in {attempts} attempts each; the last fault: {fault}."
                    )
                return Answer(problem=str(fault))
            pause = min(_FIRST_WAIT * 2 ** (attempts - 1), _WAIT) * (0.5 + draw.random())
            if fault.kind == "busy":
                pause = max(fault.wait or 0.0, pause if fault.wait is None else 0.05)
                self._paused_until = max(self._paused_until, time.monotonic() + min(pause, LONGEST_WAIT))
            else:
                await asyncio.sleep(pause)

    def account(self, replies: Mapping[Mode, Sequence[Reply]]) -> dict[str, Any]:
        """What a report says of the endpoint: how it was asked, what came back, and what cannot be seen.

        replies: of both modes to the prompts.
        """
        answers = [answer for _, answer in self._asked.values() if answer.problem is None]
        problems = Counter(answer.problem for _, answer in self._asked.values() if answer.problem is not None)
        seen = list(remarks(replies, answers, self.switch))
        if problems:
            (most, count), *_ = problems.most_common()
            seen.append(f"{problems.total():,} requests got no reply; {count:,} of them: {most}.")
        by_usage = sum(answer.completion_tokens is not None for answer in answers)
        counted = any(answer.reasoning_tokens is not None for answer in answers)
        return {
            "url": self.endpoint.url,
            "model": self.endpoint.model,
            "switch": self.switch.name,
            **{f"{mode.value}_body": dict(self.switch.bodies[mode]) for mode in Mode},
            "stream": self.endpoint.stream,
            "concurrency": self.concurrency,
            "replies": len(answers),
            "seconds": _covered((answer.began, answer.ended) for answer in answers),
            "of_an_earlier_run": self.journal.found,
            "faults": {kind: self.faults[kind] for kind in FAULTS if self.faults[kind]},
            "unanswered": dict(problems.most_common(20)),
            "noted": dict(Counter(name for answer in answers for name in answer.noted)),
            "tokens_from": "tokenizer"
            if self.tokenizer is not None
            else None
            if not by_usage
            else "usage"
            if counted
            else "usage, shared out by length",
            "reasons": {mode.value: sum(map(reasons, own)) for mode, own in replies.items()},
            "seconds_to_first_token": {
                mode.value: _mean(
                    [a.first - a.began for asked, a in self._asked.values() if asked is mode and a.first is not None]
                )
                for mode in Mode
            }
            if self.endpoint.stream
            else None,
            "alike": alike(replies, both_reason=self.switch.both_reason),
            "remarks": seen,
        }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _covered(spans: Iterator[tuple[float, float]]) -> float:
    """The length of the union of spans of time: pauses between runs, and what goes on at once, count once or not."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
