"""An HTTP server of this machine, with the faults that real ones have."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CONTENT = b"\0\0\0\x18ftypisom" + hashlib.shake_128(b"content").digest(599_988)  # begins as an mp4 does
OTHER = CONTENT[:12] + CONTENT[:11:-1]
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MD5 = hashlib.md5(CONTENT).hexdigest()
CUT = 200_000  # bytes after which a connection is dropped


class Handler(BaseHTTPRequestHandler):
    """The path's first part says what goes wrong; the rest is a name."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        kind = self.path.split("/")[1]
        with self.server.lock:
            self.server.asked.append((self.path, self.headers.get("Range")))
            self.server.count[self.path] += 1
        with suppress(OSError):  # the other side may have gone
            getattr(self, f"send_{kind}", self.send_missing)(self.server.count[self.path])

    def log_message(self, *_: object) -> None:
        pass

    def begin(self, status: int = 200, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Connection", "close")
        self.end_headers()

    def send_missing(self, time: int) -> None:
        self.begin(404, Content_Length=0)

    def send_ranges(self, time: int, *, tag: str = '"one"', stop: int | None = None, content: bytes = CONTENT) -> None:
        """Answer a range, if the file is still the one that is asked for; `stop`: end early."""
        asked = self.headers.get("Range")
        start = int(asked[6:-1]) if asked and self.headers.get("If-Range") == tag else 0
        head = {"Content_Type": "video/mp4", "ETag": tag, "Content_Length": len(content) - start}
        if start:
            head["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.begin(206 if start else 200, **head)
        self.wfile.write(content[start:stop])

    def send_drop(self, time: int) -> None:
        self.send_ranges(time, stop=CUT if time == 1 else None)

    def send_changed(self, time: int) -> None:
        """Another file after the first connection has ended early."""
        if time == 1:
            self.send_ranges(time, tag='"old"', stop=CUT, content=OTHER)
        else:
            self.send_ranges(time)

    def send_mixed(self, time: int) -> None:
        """Another file, too, but the server says that it is the same."""
        asked_for_rest = bool(self.headers.get("Range"))
        self.send_ranges(time, stop=CUT if time == 1 else None, content=OTHER if time == 1 else CONTENT)
        assert asked_for_rest == (time == 2)

    def send_noranges(self, time: int) -> None:
        self.begin(Content_Type="video/mp4", Content_Length=len(CONTENT))
        self.wfile.write(CONTENT[: CUT if time == 1 else None])

    def send_busy(self, time: int) -> None:
        if time <= 2:
            self.begin(429 if time == 1 else 503, Content_Length=0, Retry_After=0)
        else:
            self.send_ranges(time)

    def send_busyforlong(self, time: int) -> None:
        self.begin(429, Content_Length=0, Retry_After=100_000)

    def send_broken(self, time: int) -> None:
        self.begin(500, Content_Length=0, Retry_After=0)

    def send_tofile(self, time: int) -> None:
        self.begin(302, Content_Length=0, Location="file:///etc/passwd")

    def send_tonowhere(self, time: int) -> None:
        self.begin(302, Content_Length=0, Location="http://[::/")

    def send_toloopback(self, time: int) -> None:
        target = f"http://127.0.0.2:{self.server.server_port}/ranges/a.mp4"
        self.begin(302, Content_Length=0, Location=target)

    def send_tohere(self, time: int) -> None:
        self.begin(302, Content_Length=0, Location="/ranges/redirected.mp4")

    def send_circle(self, time: int) -> None:
        self.begin(302, Content_Length=0, Location=self.path)

    def send_chunk(self, time: int) -> None:
        """The end of the first of several parts."""
        self.begin(Transfer_Encoding="chunked")
        self.wfile.write(b"1000\r\n" + CONTENT[:0x1000] + b"\r\n")

    def send_huge(self, time: int) -> None:
        self.begin(Content_Type="video/mp4", Content_Length=10**12)

    def send_endless(self, time: int) -> None:
        self.begin(Content_Type="video/mp4")
        while True:
            self.wfile.write(CONTENT)

    def send_page(self, time: int) -> None:
        """A page of an error that is called a video, and long."""
        self.begin(Content_Type="video/mp4", Content_Length=10**6)
        self.wfile.write(b"<!DOCTYPE html>" + b" " * 2000)
        self.server.stop.wait(20)

    def send_text(self, time: int) -> None:
        """A video that is called text."""
        self.begin(Content_Type="text/html", Content_Length=len(CONTENT))
        self.wfile.write(CONTENT)

    def send_drip(self, time: int) -> None:
        """A byte now and then, without a length."""
        self.begin(Content_Type="video/mp4")
        for at in range(1000):
            self.wfile.write(CONTENT[at : at + 1])
            if self.server.stop.wait(0.05):
                return

    def send_dripline(self, time: int) -> None:
        """The same, in the headers."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        while not self.server.stop.wait(0.05):
            self.wfile.write(b"x")

    def send_stall(self, time: int) -> None:
        self.begin(Content_Type="video/mp4", Content_Length=len(CONTENT), ETag='"one"')
        self.wfile.write(CONTENT[:10])
        self.server.stop.wait(20)

    def send_slow(self, later: int) -> None:
        """Ranges, a second in all, or more."""
        asked = self.headers.get("Range")
        start = int(asked[6:-1]) if asked else 0
        head = {"Content_Range": f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"} if start else {}
        self.begin(206 if start else 200, Content_Length=len(CONTENT) - start, ETag='"one"', **head)
        for at in range(start, len(CONTENT), 20_000):
            self.wfile.write(CONTENT[at : min(at + 20_000, len(CONTENT))])
            time.sleep(self.server.pause)


class Server(ThreadingHTTPServer):
    """Keeps what was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock, self.stop, self.pause = threading.Lock(), threading.Event(), 0.03
        self.asked: list[tuple[str, str | None]] = []
        self.count = Counter[str]()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


@contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop.set()
        server.shutdown()
        server.server_close()
        thread.join()
