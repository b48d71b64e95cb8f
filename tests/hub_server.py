"""The endpoints of the Hugging Face Hub that a push needs, on the loopback, with repositories that can be looked into.

Content goes where the Hub puts it: large files by their SHA-256 into a store of their own, then their names into commits.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

import tiny
from llmselect.comparison import train_stage
from llmselect.prepare import prepare
from llmselect.recipe import load_recipe
from llmselect.stages import Run, extract_stage, select_stage

TOKEN = "hf_loopback"
HOSTILE = ["a|b <script>alert(1)</script>", "x\n---\nlicense: mit\n", '"q": [1, {`', "![i](http://127.0.0.1/$$)", "/home/ann/x"]
LARGE = (".parquet", ".safetensors", ".png")


@dataclass
class Repo:
    """A repository: per revision its commits, each the whole tree as path → (id, content)."""

    private: bool
    revisions: dict[str, list[dict]] = field(default_factory=lambda: {"main": [{}]})
    pulls: list[dict] = field(default_factory=list)
    titles: list[str] = field(default_factory=list)

    def tree(self, revision: str = "main") -> dict[str, bytes]:
        return {path: content for path, (_, content) in self.revisions[revision][-1].items()}

    def sha(self, revision: str = "main") -> str:
        seen = [sorted((path, oid) for path, (oid, _) in tree.items()) for tree in self.revisions[revision]]
        return hashlib.sha1(json.dumps([revision, seen]).encode()).hexdigest()


@dataclass
class Fault:
    """Requests that go wrong: `times` of those that match, the first `skip` not; `after`: only the answer is wrong."""

    pattern: str
    times: int
    status: int
    after: bool = False
    skip: int = 0
    body: str = '{"error": "out of order"}'


class Hub(ThreadingHTTPServer):
    """The server; `faults` are met in order, `seen` are all requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[tuple[str, str], Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.seen: list[str] = []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, one)) for one in self.seen)

    def checkout(self, kind: str, name: str, folder: Path, revision: str = "main") -> Path:
        """Write a revision's files to `folder`."""
        for path, content in self.repos[kind, name].tree(revision).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        return folder


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if "chunked" in self.headers.get("transfer-encoding", ""):
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        with self.server.lock:
            line = f"{self.command} {self.path}"
            self.server.seen.append(line)
            fault = next((one for one in self.server.faults if one.times and re.search(one.pattern, line)), None)
            if fault is not None and fault.skip:
                fault.skip -= 1
                fault = None
            elif fault is not None:
                fault.times -= 1
            if fault is not None and not fault.after:
                return self.answer(fault.status, fault.body)
            status, value = self.work(body)
            if fault is not None:
                status, value = fault.status, fault.body
        self.answer(status, value)

    do_GET = do_POST = do_PUT = handle_any

    def answer(self, status: int, value: object) -> None:
        data = (value if isinstance(value, str) else json.dumps(value)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def work(self, body: bytes) -> tuple[int, object]:
        split = urlsplit(self.path)
        path, query = unquote(split.path), {k: v[0] for k, v in parse_qs(split.query).items()}
        if found := re.fullmatch(r"/store/([0-9a-f]{64})", path):  # signed addresses: no token is sent there
            return self.store(found[1], body)
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "me", "auth": {"type": "access_token"}}
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return 200, {"transfer": "basic", "objects": [self.batch(one) for one in json.loads(body)["objects"]]}
        found = re.fullmatch(r"/api/(dataset|model)s/([^/]+/[^/]+)(?:/(preupload|commit|revision|discussions)(?:/(.+))?)?", path)
        repo = self.server.repos.get((found[1], found[2])) if found else None
        if found is None or repo is None:
            return 404, {"error": "Repository not found"}
        kind, name, what, revision = found.groups()
        revision = revision or "main"
        if revision not in repo.revisions:
            return 404, {"error": f"Invalid rev id: {revision}"}
        if what == "preupload":
            return 200, {"files": [self.mode(repo, revision, one) for one in json.loads(body)["files"]]}
        if what == "commit":
            return self.commit(repo, kind, name, revision, "create_pr" in query, body)
        if what == "discussions":
            return 200, {"discussions": repo.pulls, "count": len(repo.pulls), "start": 0}
        siblings = [{"rfilename": one} for one in repo.tree(revision)]
        return 200, {"id": name, "sha": repo.sha(revision), "private": repo.private, "siblings": siblings, "tags": []}

    def validate(self, content: str) -> tuple[int, object]:
        try:
            head = yaml.safe_load(content.split("---\n")[1])
        except (yaml.YAMLError, IndexError) as error:
            return 400, {"errors": [{"message": str(error)}], "warnings": []}
        return (200, {"errors": [], "warnings": []}) if isinstance(head, dict) else (400, {"errors": [{"message": "no map"}]})

    def create(self, asked: dict) -> tuple[int, object]:
        kind, name = asked.get("type", "model"), f"{asked.get('organization') or 'me'}/{asked['name']}"
        url = f"{self.server.url}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if (kind, name) in self.server.repos:
            return 409, {"error": "You already created this repo", "url": url}
        if not name.startswith("me/"):
            return 403, {"error": "You don't have the rights to create a repo under this namespace"}
        self.server.repos[kind, name] = Repo(asked.get("visibility") == "private")
        return 200, {"url": url}

    def batch(self, one: dict) -> dict:
        if one["oid"] in self.server.stored:
            return one
        return {**one, "actions": {"upload": {"href": f"{self.server.url}/store/{one['oid']}", "header": {}}}}

    def store(self, oid: str, body: bytes) -> tuple[int, object]:
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "checksum"}
        self.server.stored[oid] = body
        return 200, {}

    def mode(self, repo: Repo, revision: str, one: dict) -> dict:
        oid = repo.revisions[revision][-1].get(one["path"], (None, b""))[0]
        large = one["path"].endswith(LARGE)
        return {"path": one["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def commit(self, repo: Repo, kind: str, name: str, revision: str, pull: bool, body: bytes) -> tuple[int, object]:
        lines = [json.loads(line) for line in body.splitlines()]
        tree, title = dict(repo.revisions[revision][-1]), lines[0]["value"]["summary"]
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                if value["oid"] not in self.server.stored:
                    return 400, {"error": f"{value['path']} was never uploaded"}
                tree[value["path"]] = (value["oid"], self.server.stored[value["oid"]])
            else:
                content = base64.b64decode(value["content"])
                tree[value["path"]] = (hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), content)
        base, url = f"{self.server.url}/{'datasets/' if kind == 'dataset' else ''}{name}", None
        if pull:
            number = len(repo.pulls) + 1
            repo.pulls.append({"num": number, "title": title, "author": {"name": "me"}, "status": "open", "isPullRequest": True,
                               "createdAt": "2026-01-01T00:00:00.000Z", "repo": {"name": name, "type": kind}})  # fmt: skip
            repo.revisions[f"refs/pr/{number}"] = list(repo.revisions[revision])
            revision, url = f"refs/pr/{number}", f"{base}/discussions/{number}"
        repo.revisions[revision].append(tree)
        repo.titles.append(title)
        oid = repo.sha(revision)
        return 200, {"commitUrl": f"{base}/commit/{oid}", "commitOid": oid, "pullRequestUrl": url, "success": True}


@pytest.fixture(scope="session")
def hub_run(tmp_path_factory, tiny_model):
    """A run with sources that try to break out of Markdown and YAML, two licences, and an adapter."""
    folder = tmp_path_factory.mktemp("hub")
    rows = [{"messages": chat, "source": HOSTILE[i % 5], "license": ["MIT", "cc by 4.0"][i % 2]}
            for i, chat in enumerate(tiny.chats(40))]  # fmt: skip
    for name, content in (("pool", rows), ("dev", [{"messages": chat} for chat in tiny.chats(4, 50)])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    recipe = {
        "name": "hub", "out": str(folder / "run"), "model": {"path": str(tiny_model), "max_length": 96},
        "pool": {"path": str(folder / "pool.jsonl")}, "targets": {"t": {"dev": str(folder / "dev.jsonl")}},
        "features": {"trim": {"extractor": "trim"}}, "budget": "25%", "seeds": [0, 1], "full": False,
        "methods": {"random": {"selector": "random"}, "trim+": {"selector": "topk", "x": "trim"}},
        "train": {"tokens": 60, "batch_tokens": 60, "checkpoints": 1},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    made = Run(load_recipe(folder / "recipe.yaml"))
    for stage in (prepare, extract_stage, select_stage, train_stage):
        stage(made)
    return made


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub of our own that the client takes for the real one; waits are recorded in place of waited."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    made = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", made.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made.waits = []
    monkeypatch.setattr(time, "sleep", made.waits.append)
    close_session()
    yield made
    made.shutdown()
    made.server_close()
    close_session()
