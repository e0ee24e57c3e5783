# SPDX-License-Identifier: Apache-2.0
"""A server of chat completions for tests: it answers by rule, and fails where it is told to."""

import json
import socket
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def asked_mode(body):
    """What the template's switch says, or None."""
    return body.get("chat_template_kwargs", {}).get("enable_thinking")


def message(body, *, default=True):
    """A parsed reply: the trace in a field of its own. The answer is the last word of the question."""
    thinking = asked_mode(body)
    thinking = default if thinking is None else thinking
    answer = body["messages"][-1]["content"].split()[-1]
    return {"role": "assistant", "content": answer, "reasoning_content": f"I read {answer}." if thinking else None}


def completion(body, **changes):
    """A whole reply to a request; `changes` are of the choice, or `usage` and `message`."""
    given = changes.pop("message", None) or message(body)
    usage = {"completion_tokens": 12, "prompt_tokens": 9}
    if given.get("reasoning_content"):
        usage["completion_tokens_details"] = {"reasoning_tokens": 8}
    usage = changes.pop("usage", usage)
    choice = {"index": 0, "message": given, "finish_reason": "stop", **changes}
    return {"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage}


def pieces(body, **changes):
    """The same as the lines of a stream, letter by letter."""
    whole = completion(body, **changes)
    choice = whole["choices"][0]
    for name in ("reasoning_content", "content"):
        for letter in choice["message"].get(name) or "":
            yield {"choices": [{"index": 0, "delta": {name: letter}, "finish_reason": None}]}
    yield {"choices": [{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}]}
    yield {"choices": [], "usage": whole["usage"]}


class FakeServer:
    """`rule(server, body, number)` returns a reply as a dict, or what `sent` understands.

    requests: the bodies, in the order in which they came. `answered` counts the questions that got a reply by their
    last message and mode; `most_at_once` is how many were under way together.
    """

    def __init__(self, rule=None):
        self.rule = rule or (lambda server, body, number: completion(body))
        self.requests = []
        self.headers = []
        self.answered = Counter()
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    def key(self, body):
        return body["messages"][-1]["content"], asked_mode(body)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.sent(404, b'{"error": {"message": "no such page"}}')

    def do_POST(self):
        fake = self.server.fake
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with fake.lock:
            fake.requests.append(body)
            fake.headers.append(dict(self.headers))
            number = len(fake.requests)
            fake.at_once += 1
            fake.most_at_once = max(fake.most_at_once, fake.at_once)
        try:
            reply = fake.rule(fake, body, number)
            if isinstance(reply, dict):
                with fake.lock:
                    fake.answered[fake.key(body)] += 1
                if body.get("stream"):
                    lines = [*map(json.dumps, pieces(body)), "[DONE]"]
                    data = "".join(f"data: {line}\n\n" for line in lines).encode()
                    self.sent(200, data, {"Content-Type": "text/event-stream; charset=utf-8"})
                else:
                    self.sent(200, json.dumps(reply).encode())
            else:
                reply(self)
        finally:
            with fake.lock:
                fake.at_once -= 1

    def sent(self, status, data, headers=None, *, size=None):
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if size is None else size))
        self.end_headers()
        self.wfile.write(data)

    def cut(self, data=b'{"choices": [{"mess', kind="application/json"):
        """Half a reply, and the line is dead."""
        self.sent(200, data, {"Content-Type": kind}, size=10_000)
        self.wfile.flush()
        self.hung_up()

    def hung_up(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request, client_address):
        """Clients that end before their reply comes are part of the tests."""


@contextmanager
def serving(rule=None, port=0):
    """Yields the fake server and its address."""
    fake = FakeServer(rule)
    server = Listener(("127.0.0.1", port), Handler)
    server.fake = fake
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield fake, f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def slowly(seconds):
    def rule(server, body, number):
        time.sleep(seconds)
        return completion(body)

    return rule
