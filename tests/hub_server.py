# SPDX-License-Identifier: Apache-2.0
"""A small Hub on the loopback: as much of its upload protocol as huggingface_hub speaks, with failures on demand."""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse

import yaml

REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("GET", rf"/api/models/{REPO}(?:/revision/main)?", "info"),
    ("POST", rf"/api/models/{REPO}/preupload/main", "preupload"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/lfs/(?P<oid>\w+)(?:/(?P<part>\d+))?", "put"),
    ("POST", r"/lfs/(?P<oid>\w+)/complete", "complete"),
    ("POST", r"/lfs/(?P<oid>\w+)/verify", "verify"),
    ("POST", rf"/api/models/{REPO}/commit/main", "commit"),
]


class Repo:
    def __init__(self, private):
        self.private, self.commits, self.files = private, ["0" * 40], {".gitattributes": b"*.safetensors lfs\n"}
        self.lfs = set()


class HubServer(ThreadingHTTPServer):
    """The state of a Hub. `fail[verb]` is a list of what its next calls do: a status, "cut", or None for nothing."""

    daemon_threads = True

    def __init__(self, token, part_bytes=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.token, self.part_bytes = token, part_bytes
        self.repos, self.objects, self.parts, self.cards = {}, {}, {}, {}
        self.fail, self.calls, self.received_bytes = {}, Counter(), Counter()
        self.lock = threading.Lock()
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # a cut connection is meant

    def write_to(self, repo, folder):
        for name, content in self.repos[repo].files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body in one packet: the second of two would wait for the client's delayed acknowledgement.
    wbufsize = -1
    disable_nagle_algorithm = True
    server: HubServer

    def log_message(self, *arguments):
        pass

    def do(self):
        url = urlparse(self.path)
        matches = (
            (name, re.fullmatch(pattern, url.path)) for method, pattern, name in ROUTES if method == self.command
        )
        name, found = next((each for each in matches if each[1]), ("", None))
        if found is None:
            self.answer(404, {"error": f"no {self.command} {url.path}"})
            return
        with self.server.lock:
            self.server.calls[name] += 1
            planned = self.server.fail.get(name) or [None]
            failure = planned.pop(0)
        if failure == "cut":
            length = int(self.headers.get("Content-Length") or 0)
            self.server.received_bytes["cut"] += len(self.rfile.read(length // 2))
            reset = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            self.close_connection = True
            self.connection.close()
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if name not in ("put", "complete") and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            failure = failure or 401
        if isinstance(failure, int):
            # A careless server repeats what it was given.
            told = self.headers.get("Authorization", "")
            self.answer(failure, {"error": f"planned failure for {told}"}, {"X-Error-Message": f"refused: {told}"})
            return
        with self.server.lock:
            getattr(self, name)(body, **{key: value for key, value in found.groupdict().items() if value})

    do_GET = do_POST = do_PUT = do_HEAD = do  # noqa: N815

    def answer(self, status, value, headers=None):
        raw = value if isinstance(value, bytes) else json.dumps(value).encode()
        with suppress(OSError):
            self.send_response(status)
            for key, each in {
                "Content-Type": "application/json",
                "Content-Length": len(raw),
                **(headers or {}),
            }.items():
                self.send_header(key, str(each))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(raw)

    # What the Hub does

    def whoami(self, body):
        self.answer(200, {"name": "me", "type": "user", "orgs": []})

    def create(self, body):
        given = json.loads(body)
        repo = f"{given.get('organization') or 'me'}/{given['name']}"
        url = {"url": f"{self.server.address}/{repo}", "name": repo}
        if repo in self.server.repos:
            self.answer(409, {"error": "You already created this model repo", **url})
            return
        self.server.repos[repo] = Repo(given.get("visibility") == "private")
        self.answer(200, url)

    def validate(self, body):
        head = json.loads(body)["content"].split("---\n")[1]
        errors = []
        for model in (yaml.safe_load(head) or {}).get("model-index", []):
            for result in model["results"]:
                whole = result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]
                if not (model["name"] and whole and all("type" in m and "value" in m for m in result["metrics"])):
                    errors.append({"message": "model-index"})
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def info(self, body, repo):
        found = self.server.repos.get(repo)
        if repo in self.server.cards:
            self.answer(200, {"id": repo, "cardData": self.server.cards[repo]})
            return
        if found is None:
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        files = []
        for name, content in found.files.items():
            each = {"rfilename": name, "size": len(content), "blobId": git_id(content)}
            if name in found.lfs:
                each["lfs"] = {"size": len(content), "sha256": sha256(content), "pointerSize": 130}
            files.append(each)
        self.answer(200, {"id": repo, "private": found.private, "sha": found.commits[-1], "siblings": files})

    def preupload(self, body, repo):
        found, answers = self.server.repos[repo], []
        for each in json.loads(body)["files"]:
            there = found.files.get(each["path"])
            lfs = each["path"].endswith(".safetensors")
            oid = None if there is None else sha256(there) if lfs else git_id(there)
            mode = "lfs" if lfs else "regular"
            answers.append({"path": each["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": answers})

    def batch(self, body, repo):
        objects = []
        for each in json.loads(body)["objects"]:
            oid, size = each["oid"], each["size"]
            if oid not in self.server.objects:
                here, step = f"{self.server.address}/lfs/{oid}", self.server.part_bytes
                upload = {"href": here}
                if step:
                    parts = {str(n + 1): f"{here}/{n + 1}" for n in range(-(-size // step))}
                    upload = {"href": f"{here}/complete", "header": {"chunk_size": str(step), **parts}}
                each["actions"] = {"upload": upload, "verify": {"href": f"{here}/verify"}}
            objects.append(each)
        self.answer(200, {"transfer": "multipart" if self.server.part_bytes else "basic", "objects": objects})

    def put(self, body, oid, part=None):
        self.server.received_bytes[oid] += len(body)
        if part is not None:
            self.server.parts.setdefault(oid, {})[int(part)] = body
        elif sha256(body) != oid:
            self.answer(400, {"error": "content does not match its oid"})
            return
        else:
            self.server.objects[oid] = body
        self.answer(200, {}, {"ETag": f'"{sha256(body)[:16]}"'})

    def complete(self, body, oid):
        whole = b"".join(each for _, each in sorted(self.server.parts.pop(oid).items()))
        if sha256(whole) != oid:
            self.answer(400, {"error": "parts do not match"})
            return
        self.server.objects[oid] = whole
        self.answer(200, {})

    def verify(self, body, oid):
        whole = len(self.server.objects.get(oid, b"")) == json.loads(body)["size"]
        self.answer(200 if whole else 404, {} if whole else {"error": "not there"})

    def commit(self, body, repo):
        found = self.server.repos[repo]
        lines = [json.loads(line) for line in body.splitlines()]
        parent = lines[0]["value"].get("parentCommit")
        if parent is not None and parent != found.commits[-1]:
            self.answer(412, {"error": "A commit has happened since. Please refresh and try again."})
            return
        files, lfs = dict(found.files), set(found.lfs)
        for line in lines[1:]:
            key, value = line["key"], line["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
                lfs.add(value["path"])
            elif key == "deletedFile":
                del files[value["path"]]
        found.files, found.lfs = files, lfs
        found.commits.append(hashlib.sha1(body + found.commits[-1].encode()).hexdigest())
        if (self.server.fail.get("commit_answer") or [None]).pop(0) == "cut":
            self.close_connection = True
            self.connection.close()
            return
        url = f"{self.server.address}/{repo}/commit/{found.commits[-1]}"
        self.answer(200, {"success": True, "commitOid": found.commits[-1], "commitUrl": url})


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def git_id(content):
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
