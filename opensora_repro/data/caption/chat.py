"""One question to an OpenAI-compatible chat-completions endpoint: asked again where that may help, never otherwise.

The key is read from the environment, sent in a header to the endpoint alone (redirects are not followed) and never over
plain http to another machine; it is in no message and no record.
"""

from __future__ import annotations

import ipaddress
import json
import os
import queue
import random
import re
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from opensora_repro.data.http_retries import TryAgain, retry_after
from opensora_repro.errors import DataError
from opensora_repro.files import one_line

AGAIN = frozenset((408, 409, 425, 429))  # and 5xx: statuses of which the next try may be rid
STOPS = frozenset((401, 402, 404))  # no other question will fare better (403 may be about one picture)
WRONG = frozenset((400, 415, 422, 500, 501))  # what a server says to a question that it does not understand
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between tries, doubled each time; a server may ask for more
LONGEST_ASKED_WAIT = 3600.0  # seconds that a server may ask for
LARGEST_ANSWER = 1 << 22  # bytes
CONNECT_TIMEOUT = 4.5  # seconds in which a server has to take a connection
# Words of servers whose model takes no videos: no other question will fare better.
_NO_VIDEOS = re.compile(
    r"video_url|unknown part type|(?:unsupported|invalid|unknown) content|at most 0 video|not a multimodal|"
    r"(?:not|n't) (?:support|accept|take)\w* (?:\w+ )?videos?\b|"
    r"videos? (?:\w+ )?(?:is|are|was|were) not (?:supported|enabled|allowed|accepted)",
    re.IGNORECASE,
)


class NoAnswer(Exception):
    """A question has no answer: the server's word for why, as one line. `unreachable`: it failed at all tries."""

    def __init__(self, reason: str, *, unreachable: bool) -> None:
        super().__init__(reason)
        self.unreachable = unreachable


class Stopped(Exception):
    """The run ends; what was not sent is not sent any more."""


@dataclass(frozen=True)
class Answer:
    """What the model wrote; `cut`: at its limit of tokens. `tokens_in` and `tokens_out` as the server counts them."""

    text: str
    cut: bool
    tokens_in: int
    tokens_out: int


class Endpoint:
    """A chat-completions API, its model and how patient we are; used by many threads."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_env: str,
        max_tokens: int,
        timeout: float,
        retries: int,
        fields: dict[str, Any] | None = None,
    ) -> None:
        """`timeout` in seconds, for a whole answer; `fields`: more of every question's body. Raises DataError."""
        self.url, self.model, self.key_env, self.fields = full_url(url), model, key_env, fields or {}
        self.max_tokens, self.timeout, self.retries = max_tokens, timeout, retries
        self._key = os.environ.get(key_env, "").strip()
        if not self._key.isascii() or not self._key.isprintable():
            raise DataError(f"{key_env}: the key in this environment variable holds characters that no key has")
        if self._key and not may_send_key(self.url):
            print(f"note: {key_env} is not sent over plain http to another machine", file=sys.stderr)
            self._key = ""
        self._limit = "max_tokens"  # newer models of OpenAI's know another word for it
        self._local = threading.local()
        self._stop = threading.Event()
        self._not_before = 0.0  # when the server wants to be asked again, by anybody

    def check_reachable(self) -> None:
        """Raise DataError, within five seconds, where nothing takes a connection."""
        from requests.utils import get_environ_proxies

        parts, outcome = urlsplit(self.url), queue.SimpleQueue[str]()
        if parts.scheme == "https" and get_environ_proxies(self.url):
            return  # only the proxy could be asked

        def connect() -> None:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            try:
                socket.create_connection((parts.hostname or "", port), timeout=CONNECT_TIMEOUT).close()
                outcome.put("")
            except OSError as error:
                outcome.put(_connection_reason(error))

        threading.Thread(target=connect, daemon=True).start()  # looking up a name knows no limit of time
        try:
            reason = outcome.get(timeout=CONNECT_TIMEOUT)
        except queue.Empty:
            reason = f"no connection in {CONNECT_TIMEOUT:g} s"
        if reason:
            raise DataError(f"--endpoint {self.url}: {reason}: is the server running, and this its address?")

    def list_models(self) -> list[str]:
        """Names of the server's models; none where it does not tell."""
        import requests

        url = self.url.removesuffix("chat/completions") + "models"
        try:
            reply = self._session().get(url, auth=self._sign, timeout=CONNECT_TIMEOUT, allow_redirects=False)
            return [str(model["id"]) for model in reply.json()["data"]] if reply.ok else []
        except (requests.exceptions.RequestException, ValueError, LookupError, TypeError):
            return []

    def start(self) -> None:
        """Answer questions (again)."""
        self._stop.clear()

    def stop(self) -> None:
        """End all waiting, so that threads end at their next step."""
        self._stop.set()

    def ask(self, messages: Sequence[dict[str, Any]]) -> Answer:
        """Return the model's answer. Raises NoAnswer, Stopped, and DataError where no question will be answered."""
        for attempt in range(self.retries + 1):
            self._wait_until(self._not_before)
            try:
                return self.ask_once(messages)
            except TryAgain as trouble:
                if attempt == self.retries:
                    raise NoAnswer(f"{trouble} ({attempt + 1} tries)", unreachable=True) from None
                pause = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1.0)
                if trouble.wait is not None:
                    pause = min(trouble.wait, LONGEST_ASKED_WAIT)
                    self._not_before = max(self._not_before, time.monotonic() + pause)
                self._wait_until(time.monotonic() + pause)
        raise AssertionError("unreachable")

    def _wait_until(self, moment: float) -> None:
        if self._stop.wait(max(0.0, moment - time.monotonic())):
            raise Stopped

    def ask_once(self, messages: Sequence[dict[str, Any]]) -> Answer:
        """Like `ask`, and raises TryAgain for what another try may be rid of."""
        limit = self._limit
        question = {"model": self.model, "messages": list(messages), limit: self.max_tokens, **self.fields}
        status, wait, body = self._post(question)
        if status == 200:
            return _answer_in(body)
        reason = f"{status} {self._message(body)}".strip()
        refused = status >= 500 and _sends_video(messages) and _NO_VIDEOS.search(reason)
        if (status in AGAIN or status >= 500) and not refused:
            raise TryAgain(reason, wait)
        if status == 401:
            have = "was refused" if self._key else "is not set, or was not sent"
            raise DataError(f"{self.url}: {reason} (the key of the environment variable {self.key_env} {have})")
        if status in STOPS or 300 <= status < 400:
            hint = f"; is this the address of the API, and {self.model} one of its models?" if status != 402 else ""
            raise DataError(f"{self.url}: {reason}{hint}")
        if status == 400 and limit == "max_tokens" and b"max_completion_tokens" in body:
            self._limit = "max_completion_tokens"
            raise TryAgain(reason, 0.0)
        if status in WRONG and _sends_video(messages):
            hint = "does this server's model take videos? --send frames sends pictures"
            if _NO_VIDEOS.search(reason):
                raise DataError(f"{self.url}: {reason}; {hint}")
            reason = f"{reason} ({hint})"
        raise NoAnswer(reason, unreachable=False)

    def _post(self, question: dict[str, Any]) -> tuple[int, float | None, bytes]:
        """Return status, Retry-After in seconds and body. Raises TryAgain for a broken connection."""
        import requests

        deadline = time.monotonic() + self.timeout
        try:
            with self._session().post(
                self.url, json=question, auth=self._sign, timeout=self.timeout, stream=True, allow_redirects=False
            ) as response:
                body = b""
                for block in response.iter_content(1 << 16):
                    body += block
                    if len(body) > LARGEST_ANSWER:
                        raise TryAgain("the answer is far too long", None)
                    if time.monotonic() > deadline:
                        raise TryAgain(f"no whole answer in {self.timeout:g} s", None)
                return response.status_code, retry_after(response.headers.get("Retry-After")), body
        except requests.exceptions.Timeout:
            raise TryAgain(f"no answer in {self.timeout:g} s", None) from None
        except (requests.exceptions.RequestException, OSError) as error:
            raise TryAgain(_connection_reason(error), None) from None

    def _session(self) -> Any:
        """Return this thread's connection, which is kept between questions."""
        import requests

        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
            # A proxy for plain http would read along what is meant for this machine.
            self._local.session.trust_env = self.url.startswith("https:")
        return self._local.session

    def _sign(self, request: Any) -> Any:
        """Add the key, if there is one, and nothing that other files of the user's (.netrc) hold."""
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _message(self, body: bytes) -> str:
        """Return the server's own words, without the key should it repeat it."""
        try:
            error = json.loads(body)
            error = error.get("error", error.get("message", error)) if isinstance(error, dict) else error
            text = error.get("message", error) if isinstance(error, dict) else error
        except (ValueError, RecursionError):
            text = body[:300].decode("utf-8", "replace")
        text = one_line(" ".join(str(text).split()))[:300]
        return text.replace(self._key, "***") if self._key else text


def full_url(url: str) -> str:
    """Return the address of the chat completions, given it or the API's base. Raises DataError."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise DataError(f"--endpoint {one_line(url)}: {error}") from None
    if parts.username or parts.password:
        raise DataError("--endpoint: holds a user name or password; the key belongs into an environment variable")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise DataError(f"--endpoint {one_line(url)}: expected an address such as https://HOST/v1")
    path = parts.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path = (path or "/v1") + "/chat/completions"
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def may_send_key(url: str) -> bool:
    """True for https, and for this machine itself."""
    parts = urlsplit(url)
    try:
        here = ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        here = parts.hostname == "localhost"
    return parts.scheme == "https" or here


def _sends_video(messages: Sequence[dict[str, Any]]) -> bool:
    parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
    return any(part["type"] == "video_url" for part in parts)


def _answer_in(body: bytes) -> Answer:
    """Return what a reply holds. Raises TryAgain for one that is none."""
    try:
        reply = json.loads(body)
        choice = reply["choices"][0]
        message, usage = choice["message"], reply.get("usage") or {}
        text = message.get("content") or message.get("refusal") or ""
        if isinstance(text, list):  # of parts
            text = "".join(part.get("text", "") for part in text)
        if not isinstance(text, str):
            raise TypeError("content is no text")
        if not text and (message.get("reasoning_content") or message.get("reasoning")):
            text = "<think>"  # which a server tells apart itself: the limit of tokens came before the answer
        counts = (int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
        return Answer(text, choice.get("finish_reason") == "length", *counts)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise TryAgain(f"the answer is no chat completion ({type(error).__name__})", None) from None


def _connection_reason(error: Exception) -> str:
    """Return the innermost cause in few words: the libraries' own messages hold addresses of objects."""
    seen: BaseException = error
    while (inner := getattr(seen, "reason", None) or seen.__context__ or next(iter(seen.args), None)) is not None:
        if not isinstance(inner, BaseException) or inner is seen:
            break
        seen = inner
    text = getattr(seen, "strerror", None) or type(seen).__name__
    return f"no connection ({one_line(text)})"
