"""A store that speaks S3, on this machine: it tells what it was asked, and can be busy or stop in the middle."""

from __future__ import annotations

import logging
import os
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BUSY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
BUCKET = "bucket-a"


@dataclass
class Store:
    """The server's side. Names are parts of what is asked for, such as "PUT /bucket-a/out/"."""

    url: str = ""
    asked: list[str] = field(default_factory=list)  # "METHOD /path?query" of every request that was answered
    busy: dict[str, int] = field(default_factory=dict)  # how many more requests of a name get 503
    stalled: set[str] = field(default_factory=set)  # whose answers stop after half of their bytes

    def __call__(self, app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
        def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            query = environ.get("QUERY_STRING")
            asked = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}{f'?{query}' if query else ''}"
            for name, left in self.busy.items():
                if name in asked and left > 0:
                    self.busy[name] -= 1
                    body = b"" if environ["REQUEST_METHOD"] == "HEAD" else BUSY
                    start("503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
                    return [body]
            self.asked.append(asked)
            answered = app(environ, start)
            return half_of(answered) if any(name in asked for name in self.stalled) else answered

        return answer

    def count(self, name: str) -> int:
        return sum(name in asked for asked in self.asked)


def half_of(answered: Iterable[bytes]) -> Iterator[bytes]:
    content = b"".join(answered)
    yield content[: len(content) // 2]
    time.sleep(600)


@contextmanager
def serving(environ: dict[str, str]) -> Iterator[Store]:
    """Run a store with a bucket, and set the variables that lead to it and to a scratch folder in `environ`."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    store = Store()
    server = make_server("127.0.0.1", 0, store(DomainDispatcherApplication(create_backend_app)), threaded=True)
    server.daemon_threads = True
    store.url = f"http://127.0.0.1:{server.server_port}"
    environ |= {
        "AWS_ENDPOINT_URL": store.url, "AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "unspoken",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "1", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    threading.Thread(target=server.serve_forever, daemon=True).start()
    before = dict(os.environ)
    os.environ.update(environ)
    try:
        files().clear_instance_cache()  # a server that was there before, in this process, left its address and objects
        urllib.request.urlopen(urllib.request.Request(f"{store.url}/moto-api/reset", method="POST")).close()
        files().mkdir(BUCKET)
        yield store
    finally:
        server.shutdown()
        os.environ.clear()
        os.environ.update(before)


def files() -> Any:
    """The bucket as fsspec shows it, by names such as bucket-a/folder/name."""
    import fsspec

    return fsspec.filesystem("s3", use_listings_cache=False)


def fill(folder: Path, name: str) -> None:
    """Copy a folder's files into the bucket."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files().put_file(str(path), f"{BUCKET}/{name}/{path.relative_to(folder).as_posix()}")
