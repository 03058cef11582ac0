"""A chat-completions API on this machine that answers as a test tells it, and remembers what it was asked."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

Question = dict[str, Any]
BREAK = "break the connection"


class ChatServer:
    """`answer` gets a question's body and number, from 0, and returns what `completion` or `error` make, or BREAK."""

    def __init__(self, answer: Callable[[Question, int], Any]) -> None:
        self.answer = answer
        self.questions: list[Question] = []
        self.headers: list[dict[str, str]] = []
        self.moments: list[float] = []
        self.lock = threading.Lock()
        self.url = ""

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        moment = time.monotonic()
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            number = len(self.questions)
            self.questions.append(body)
            self.headers.append({"path": handler.path, **dict(handler.headers)})
            self.moments.append(moment)
        answer = self.answer(body, number)
        if answer == BREAK:
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        status, headers, data = answer
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)


@contextmanager
def chat_server(answer: Callable[[Question, int], Any]) -> Iterator[ChatServer]:
    """Run a server; its `url` is what --endpoint takes."""
    chat = ChatServer(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            try:
                chat.handle(self)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # who asked is gone

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass  # connections that a test breaks

    server = Server(("127.0.0.1", 0), Handler)
    chat.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield chat
    finally:
        server.shutdown()
        server.server_close()


def completion(text: object, finish: str = "stop", **message: Any) -> tuple[int, dict[str, str], bytes]:
    """Return an answer: 100 tokens in, 10 out."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return 200, {}, json.dumps({"id": "x", "choices": [choice], "usage": usage}).encode()


def error(status: int, message: str = "", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Return an error; `Retry_After` stands for the header."""
    data = json.dumps({"error": {"message": message, "type": "some"}}).encode()
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, data


def pictures(question: Question) -> list[np.ndarray]:
    """Return the pictures of a question, uint8 [H, W, 3]."""
    parts = question["messages"][-1]["content"]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    assert all(url.startswith("data:image/jpeg;base64,") for url in urls)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))) for url in urls]


def brightness(question: Question) -> int:
    """Return which clip of `shaded` a question shows."""
    return round(float(np.mean([picture.mean() for picture in pictures(question)])) / 20)
