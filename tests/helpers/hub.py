"""Stand in for the Hugging Face Hub's network side: repositories in memory, the requests that its client sends."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SHA = "5" * 40  # the one commit that every repository has
TOKEN = "hf_test"


@dataclass
class Hub:
    """Hold what was pushed, and say where to ask for it."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)  # "models/me/policy" -> file -> content
    blobs: dict[str, bytes] = field(default_factory=dict)  # by sha256, until a commit names them
    private: set[str] = field(default_factory=set)
    branches: set[tuple[str, str]] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    endpoint: str = ""

    def add(self, repo: str, folder: Path) -> None:
        """Put a local folder there."""
        files = [path for path in folder.rglob("*") if path.is_file()]
        self.repos[repo] = {str(path.relative_to(folder)): path.read_bytes() for path in files}

    def environment(self, home: Path) -> dict[str, str]:
        """Return the variables of a process that uses this hub, with a cache of its own."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_LEROBOT_HOME": str(home / "lerobot"),
        }


class Handler(BaseHTTPRequestHandler):
    """Answer as the Hub does."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def body(self) -> bytes:
        """Return what was sent, in one piece or in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def answer(self, content: Any, code: int = 200, **headers: str) -> None:
        """Send JSON or bytes."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def handle_request(self) -> None:
        """Find the answer by method and path."""
        body, path = self.body(), self.path.split("?")[0]
        self.hub.asked.append(f"{self.command} {path}")
        if (
            path.startswith("/api/")
            and self.command == "POST"
            and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        ):
            self.answer({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
            self.hub.repos.setdefault(f"models/{name}", {})
            if asked.get("visibility") == "private":
                self.hub.private.add(name)
            self.answer({"url": f"{self.hub.endpoint}/{name}"})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/(models/[^/]+/[^/]+)/branch/([^/]+)", path):
            self.hub.branches.add((found[1], found[2]))
            self.answer({})
        elif found := re.fullmatch(r"/api/(models/[^/]+/[^/]+)/preupload/([^/]+)", path):
            files = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": [{**file, "shouldIgnore": False} for file in files]})
        elif path.endswith(".git/info/lfs/objects/batch"):
            href = f"{self.hub.endpoint}/lfs/"
            objects = [
                {**one, "actions": {"upload": {"href": href + one["oid"]}}} for one in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif path.startswith("/lfs/"):
            assert hashlib.sha256(body).hexdigest() == path.rsplit("/", 1)[1]
            self.hub.blobs[path.rsplit("/", 1)[1]] = body
            self.answer({})
        elif found := re.fullmatch(r"/api/(models/[^/]+/[^/]+)/commit/([^/]+)", path):
            for line in (json.loads(line) for line in body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.hub.repos[found[1]][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.hub.repos[found[1]][value["path"]] = self.hub.blobs[value["oid"]]
            name = found[1].removeprefix("models/")
            self.answer({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{SHA}", "commitOid": SHA})
        elif found := re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)(/revision/[^/]+)?", path):
            self.describe(found[1])
        elif found := re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)/tree/[^/]+", path):
            sizes = {name: len(content) for name, content in self.hub.repos[found[1]].items()}
            self.answer([{"type": "file", "path": name, "size": size, "oid": SHA} for name, size in sizes.items()])
        elif found := re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)/refs", path):
            refs = {"tags": [{"name": "v3.0", "ref": "refs/tags/v3.0", "targetCommit": SHA}]}
            self.answer(
                {"branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": SHA}], "converts": [], **refs}
            )
        elif found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self.give(f"{found[1] or 'models/'}{found[2]}", found[3])
        else:
            self.answer({"error": f"the stand-in does not know {self.command} {path}"}, 404)

    def describe(self, repo: str) -> None:
        """Send what a repository holds."""
        if repo not in self.hub.repos:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return
        name = repo.split("/", 1)[1]
        files = [{"rfilename": file} for file in self.hub.repos[repo]]
        self.answer({"id": name, "modelId": name, "sha": SHA, "siblings": files, "private": False, "tags": []})

    def give(self, repo: str, file: str) -> None:
        """Send a file."""
        content = self.hub.repos.get(repo, {}).get(file)
        if content is None:
            self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=SHA)
        else:
            self.answer(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=SHA)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request


def start() -> tuple[Hub, ThreadingHTTPServer]:
    """Start a hub on a free port of this machine; shut the server down when done."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return hub, server
