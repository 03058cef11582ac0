"""A stand-in for a hub of models, on this machine: it takes one commit of small files, and keeps what it was told."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Hub:
    """`files` of the last commit by name, `made` as repositories were asked for, `refuse`: an HTTP status for all."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.made: list[dict[str, Any]] = []
        self.asked: list[str] = []
        self.refuse = 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.do_POST()

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.asked.append(self.path)
                status, answer = hub.answer(self.path, body)
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        if self.refuse:
            return self.refuse, {"error": "no"}
        if path == "/api/repos/create":
            made = json.loads(body)
            self.made.append(made)
            return 200, {"url": f"{self.address}/{made['organization']}/{made['name']}"}
        if path == "/api/validate-yaml":
            return 200, {"warnings": [], "errors": []}
        if "/preupload/" in path:
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            return 200, {"files": files}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {
                "success": True,
                "commitOid": "0" * 40,
                "commitUrl": self.address + path.replace("/api/models", "").replace("/main", "/0"),
                "hookOutput": "",
            }
        return 404, {"error": path}

    def write(self, folder: Path) -> Path:
        """What was sent, as a download has it."""
        for name, data in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        return folder


class DatasetHub(Hub):
    """A hub with one dataset, me/it, whose files are given by name; it answers what reads them."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__()
        self.files |= files

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        where, _, _ = path.partition("?")
        if "/resolve/main/" in where:
            return 200, self.files[where.partition("/resolve/main/")[2]]
        if "/tree/main" in where:
            folder = where.partition("/tree/main")[2].strip("/")
            return 200, [
                {"type": "file", "oid": f"{len(data):040x}", "size": len(data), "path": name}
                for name, data in self.files.items() if name.startswith(folder)
            ]  # fmt: skip
        return 200, {"id": "me/it", "sha": "b" * 40, "siblings": [{"rfilename": name} for name in self.files]}
