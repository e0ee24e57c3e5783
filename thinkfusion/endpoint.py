# SPDX-License-Identifier: Apache-2.0
"""One question to a served model, over the OpenAI-compatible protocol: an answer, or a fault with a name.

The API key is read from the environment (`OPENAI_API_KEY`) when a client is made; nothing here keeps or shows it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx2

KEY_VARIABLE = "OPENAI_API_KEY"
CHAT = "/chat/completions"
CONNECT_SECONDS = 15.0
LONGEST_WAIT = 120.0
"""A server may ask for a longer pause; it is asked again after this one."""
_REASONING = ("reasoning_content", "reasoning", "thinking")
"""transformers serve, llama.cpp and SGLang write the first, vLLM the second, Ollama the third."""
_LENGTH = ("length", "max_tokens")
_REDIRECTS = (301, 302, 303, 307, 308)
_KEEPING = (307, 308)
_DENIED = (401, 403)
_MISSING = (404, 405)
_BUSY = (429, 503)
_LATER = (408, 409, 425)
_LEAST_ERROR, _LEAST_SERVER_ERROR = 400, 500


class EndpointError(ValueError):
    """The endpoint cannot be measured, or not any further; the message says what to do."""


class RequestError(Exception):
    """One request failed. `kind` is one of FAULTS; `wait` is the pause in seconds that the server asked for."""

    def __init__(self, kind: str, text: str, wait: float | None = None) -> None:
        super().__init__(text)
        self.kind, self.wait = kind, wait


FAULTS = {
    "no_connection": "there was no connection, or it was lost",
    "timeout": "no reply in time",
    "server_error": "a server error (5xx)",
    "busy": "the server asked to come later (429, 503)",
    "cut": "a reply that ended in the middle",
    "unreadable": "a reply that is no chat completion",
    "refused": "the server refused this request (400, 413, 422)",
}


class Answer(NamedTuple):
    """What came back. Times are in seconds since the epoch; `first` is that of the first piece of a stream.

    reasoning: None where the reply has no such field. completion_tokens, reasoning_tokens: as the server counts, or
    None. noted: what was strange about it. problem: why there is no reply, for a prompt that got none.
    """

    content: str = ""
    reasoning: str | None = None
    finish: str | None = None
    completion_tokens: int | None = None
    reasoning_tokens: int | None = None
    began: float = 0.0
    ended: float = 0.0
    first: float | None = None
    noted: tuple[str, ...] = ()
    problem: str | None = None

    @property
    def finished(self) -> bool:
        """Whether it ended by itself; servers that do not say count as finished."""
        return self.finish not in _LENGTH


@dataclass(frozen=True)
class Endpoint:
    """Where a model is served, and under which name. `timeout` is in seconds: for a reply, or a stream's next piece.

    Raises EndpointError for an address that is none, or that holds a password or a key.
    """

    url: str
    model: str
    timeout: float = 600.0
    stream: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", checked_url(self.url))

    @asynccontextmanager
    async def client(self, connections: int) -> AsyncIterator[httpx2.AsyncClient]:
        """A client with the key of the environment; redirects are not followed by it."""
        key = os.environ.get(KEY_VARIABLE, "").strip()
        if not key.isascii() or not (key == "" or key.isprintable()):
            raise EndpointError(f"{KEY_VARIABLE}: holds characters that no key has. Set it again.")
        headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
        timeout = httpx2.Timeout(self.timeout, connect=CONNECT_SECONDS, pool=None)
        async with httpx2.AsyncClient(headers=headers, limits=limits, timeout=timeout, follow_redirects=False) as made:
            yield made

    async def ask(self, client: httpx2.AsyncClient, body: Mapping[str, Any]) -> Answer:
        """One attempt. Raises RequestError where another may help or only this prompt is lost, else EndpointError."""
        sent = {**body, "model": self.model}
        if self.stream:
            sent |= {"stream": True, "stream_options": {"include_usage": True}}
        began = time.time()
        try:
            url, response = await self._sent(client, json.dumps(sent).encode())
            try:
                if response.status_code != httpx2.codes.OK:
                    await response.aread()
                    raise self._refusal(url, response)
                if self.stream and "text/event-stream" in response.headers.get("content-type", ""):
                    return await _streamed(response, began)
                return _whole(await response.aread(), response.headers.get("content-type", ""), began)
            finally:
                await response.aclose()
        except httpx2.TimeoutException as error:
            raise RequestError("timeout", f"no reply in {self.timeout:g} s ({type(error).__name__})") from None
        except httpx2.RemoteProtocolError as error:
            raise RequestError("cut", f"the reply ended in the middle ({_without_key(str(error))})") from None
        except httpx2.DecodingError as error:
            raise RequestError("unreadable", f"the reply cannot be decoded ({_without_key(str(error))})") from None
        except httpx2.TransportError as error:
            text = _without_key(str(error)) or type(error).__name__
            raise RequestError("no_connection", f"no connection to {self.url} ({text})") from None

    async def _sent(self, client: httpx2.AsyncClient, content: bytes) -> tuple[str, httpx2.Response]:
        """Follows a redirect on the same server only: prompts and key are for the one that was named."""
        url = self.url + CHAT
        for _ in range(3):
            response = await client.send(client.build_request("POST", url, content=content), stream=True)
            if response.status_code not in _REDIRECTS:
                return url, response
            target = str(httpx2.URL(url).join(response.headers.get("location", "")))
            await response.aclose()
            if _origin(target) != _origin(url):
                raise EndpointError(
                    f"{self.url}: the server redirects to another one, {_origin_text(target)}, which is not followed. "
                    "If you trust it, give its address as --endpoint."
                )
            if response.status_code not in _KEEPING:
                break
            url = target
        raise EndpointError(f"{self.url}: the server redirects to {target}. Give the address of the API itself, …/v1.")

    def _refusal(self, url: str, response: httpx2.Response) -> Exception:
        status = response.status_code
        told = _without_key(_told(response.content))
        if status in _DENIED:
            given = "was not accepted" if os.environ.get(KEY_VARIABLE) else "is not set"
            return EndpointError(
                f"{self.url}: the server wants a valid key ({status}: {told}); {KEY_VARIABLE} {given}."
            )
        if status in _MISSING:
            return EndpointError(
                f"{url}: not found ({status}: {told}). Is {self.model!r} the server's name for the model, and does "
                "the address end as the server's documentation says (most often in /v1)?"
            )
        if status in _BUSY:
            return RequestError("busy", f"{status}: {told}", _retry_after(response.headers.get("retry-after")))
        if status >= _LEAST_SERVER_ERROR or status in _LATER:
            return RequestError("server_error", f"{status}: {told}")
        if status >= _LEAST_ERROR:
            return RequestError("refused", f"{status}: {told}")
        return RequestError("unreadable", f"status {status}, expected 200")


def checked_url(url: str) -> str:
    """The address without a final slash or `/chat/completions`; raises EndpointError for one that cannot be used."""
    text = url.strip().rstrip("/").removesuffix(CHAT).rstrip("/")
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError:
        raise EndpointError("endpoint: found no address, expected one such as http://localhost:8000/v1.") from None
    if parts.username or parts.password or parts.query or parts.fragment:
        raise EndpointError(
            "endpoint: the address holds a user name, a query or a fragment, which would be written into the report. "
            f"Give it without, and a key as {KEY_VARIABLE}."
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or any(c.isspace() for c in text):
        raise EndpointError(f"endpoint: found {url!r}, expected an address such as http://localhost:8000/v1.")
    return text


def sends_key_in_the_open(url: str) -> bool:
    """Whether a key is set and would go over a network unencrypted."""
    parts = urlsplit(url)
    local = parts.hostname in ("localhost", "::1") or (parts.hostname or "").startswith("127.")
    return bool(os.environ.get(KEY_VARIABLE)) and parts.scheme == "http" and not local


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _origin_text(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")


def _without_key(text: str) -> str:
    """Servers quote the key that they refuse."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    return text.replace(key, "(the key)") if key else text


def _told(content: bytes) -> str:
    """What a server says about an error, in one short line."""
    text = content.decode("utf-8", "replace")
    try:
        found = json.loads(text)
        found = found.get("error", found) if isinstance(found, dict) else found
        if isinstance(found, dict):
            found = found.get("message") or found.get("detail") or found
        text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
    except ValueError:
        pass
    line = " ".join(text.split())
    return line[:300] + "…" * (len(line) > 300) if line else "without a message"


def _retry_after(text: str | None) -> float | None:
    """Seconds, from a number or a date; None where there is neither."""
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except ValueError:
            return None
    # A comparison with "not a number" is false both ways.
    return min(seconds, LONGEST_WAIT) if seconds >= 0 else 0.0


def _read_json(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise RequestError("unreadable", "the reply is not UTF-8") from None
    except ValueError:
        start = data[:60].decode("utf-8", "replace").strip()
        kind = "HTML" if start[:1] == "<" else "no JSON"
        raise RequestError("unreadable", f"found {kind}, expected JSON: {start!r}") from None


def _text(value: Any, what: str) -> str | None:
    """A text, or the texts of a list of parts; what is no text makes the reply unreadable."""
    if isinstance(value, list):
        parts = [part.get("text", part.get("thinking")) for part in value if isinstance(part, dict)]
        return "".join(_text(part, what) or "" for part in parts)
    if value is not None and not isinstance(value, str):
        raise RequestError("unreadable", f"found {type(value).__name__} as {what}, expected a text")
    return value


def _parts_of(message: Any) -> tuple[str | None, str | None]:
    """Content and reasoning of a message or of a stream's piece; None for a field that is not there."""
    if not isinstance(message, dict):
        raise RequestError("unreadable", "found no message in the reply")
    given = [_text(message[name], name) for name in _REASONING if name in message]
    reasoning = next((text for text in given if text), "" if given else None)
    content = message.get("content")
    if isinstance(content, list):
        thoughts = [part for part in content if isinstance(part, dict) and part.get("type") == "thinking"]
        content = [part for part in content if part not in thoughts]
        reasoning = reasoning or (_text(thoughts, "thinking") if thoughts else reasoning)
    return _text(content, "content"), reasoning


def _counted(usage: Any) -> tuple[int | None, int | None]:
    """Tokens of the completion and of its reasoning, as far as a server tells."""
    if not isinstance(usage, dict):
        return None, None
    details = usage.get("completion_tokens_details")
    given = (usage.get("completion_tokens"), details.get("reasoning_tokens") if isinstance(details, dict) else None)
    whole, part = (count if isinstance(count, int) and count >= 0 else None for count in given)
    return whole, part


def _made(parts: tuple[str | None, str | None], finish: Any, usage: Any, times: tuple[float, float | None]) -> Answer:
    noted = []
    texts = []
    for text in parts:
        whole = None if text is None else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if whole != text and "half_characters" not in noted:
            noted.append("half_characters")
        texts.append(whole)
    completion, thought = _counted(usage)
    if completion is None:
        noted.append("without_usage")
    if texts[1] is None:
        noted.append("without_reasoning_field")
    began, first = times
    return Answer(
        content=texts[0] or "",
        reasoning=texts[1],
        finish=finish if isinstance(finish, str) else None,
        completion_tokens=completion,
        reasoning_tokens=thought,
        began=began,
        ended=time.time(),
        first=first,
        noted=tuple(noted),
    )


def _whole(data: bytes, kind: str, began: float) -> Answer:
    if "html" in kind:
        raise RequestError("unreadable", "found HTML, expected JSON")
    found = _read_json(data)
    choice = _choice(found)
    if choice is None:
        raise RequestError("unreadable", f"found a reply without choices: {_told(data)}")
    return _made(_parts_of(choice.get("message")), choice.get("finish_reason"), found.get("usage"), (began, None))


def _choice(found: Any) -> dict[str, Any] | None:
    choices = found.get("choices") if isinstance(found, dict) else None
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        return choices[0]
    return None


async def _streamed(response: httpx2.Response, began: float) -> Answer:
    """The pieces put together; raises RequestError `cut` for a stream that stops without saying so."""
    content: list[str] = []
    reasoning: list[str] | None = None
    finish = usage = first = None
    done = False
    async for line in _lines(response):
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            done = True
            break
        found = _read_json(data)
        if isinstance(found, dict) and found.get("error"):
            raise RequestError("server_error", f"in the stream: {_without_key(_told(data))}")
        usage = found.get("usage") or usage if isinstance(found, dict) else usage
        choice = _choice(found)
        if choice is None:
            continue
        text, thought = _parts_of(choice.get("delta") or {})
        if first is None and (text or thought):
            first = time.time()
        content += [text] if text else []
        if thought is not None:
            reasoning = reasoning if reasoning is not None else []
            reasoning.append(thought)
        finish = choice.get("finish_reason") or finish
    if finish is None and not done:
        raise RequestError("cut", "the stream ended in the middle")
    parts = "".join(content), None if reasoning is None else "".join(reasoning)
    return _made(parts, finish, usage, (began, first))


async def _lines(response: httpx2.Response) -> AsyncIterator[bytes]:
    """Lines as bytes, so that a character that is cut in two is found."""
    rest = b""
    async for data in response.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line
    if rest:
        yield rest
