"""Connections that lead where they may, and end when their time is over."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import threading
import time
import urllib.parse
import urllib.request
from contextlib import suppress
from typing import Any

from opensora_repro.files import one_line

NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Of no use to anybody else, but global to some releases of `ipaddress`: protocols' own, NAT64 within a network, and two
# kinds of old, site-local addresses and IPv4's within IPv6.
NOT_PUBLIC = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "64:ff9b:1::/48", "fec0::/10", "::/96")))


class Forbidden(Exception):
    """An address of this machine or of a private network, which a list from elsewhere has no business with."""


class Line:
    """The connections of one try: closed at `deadline` (time.monotonic), whatever they wait for.

    Time limits of sockets are for one read each, and a server that sends a byte now and then keeps all of them.
    """

    def __init__(self, deadline: float, *, allow_private: bool) -> None:
        self.allow_private, self.expired = allow_private, False
        self._open: list[socket.socket] = []
        self._timer = threading.Timer(max(0.0, deadline - time.monotonic()), self._expire)
        self._timer.daemon = True

    def __enter__(self) -> Line:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        for held in self._open:
            held.close()

    def _expire(self) -> None:
        self.expired = True
        for held in list(self._open):
            with suppress(OSError):
                held.shutdown(socket.SHUT_RDWR)

    def connect(self, address: tuple[str, int], timeout: Any = None, source_address: Any = None) -> socket.socket:
        """Do as socket.create_connection does, with the host's allowed addresses. Raises OSError or Forbidden."""
        return self._connect(address, timeout, public=not self.allow_private)

    def connect_proxy(self, address: tuple[str, int], timeout: Any = None, source_address: Any = None) -> socket.socket:
        """Connect to the user's proxy, wherever that is."""
        return self._connect(address, timeout, public=False)

    def _connect(self, address: tuple[str, int], timeout: Any, *, public: bool) -> socket.socket:
        trouble: OSError = OSError("no address for this name")
        # The address that was looked at is the one that is connected to: a name may have another the next moment.
        for family, kind, protocol, _, place in addresses_of(*address, public=public):
            connection = socket.socket(family, kind, protocol)
            try:
                connection.settimeout(timeout)
                connection.connect(place)
            except OSError as error:
                connection.close()
                trouble = error
                continue
            self._open.append(connection.dup())  # TLS takes the other one over
            if self.expired:
                self._expire()
            return connection
        raise trouble

    def opener(self, *handlers: urllib.request.BaseHandler) -> urllib.request.OpenerDirector:
        """Return an opener that knows http and https, and no files or other schemes."""
        opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(),
            urllib.request.UnknownHandler(),
            _Http(self),
            _Https(self),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
            *handlers,
        ):
            opener.add_handler(handler)
        return opener


class _Http(urllib.request.HTTPHandler):
    def __init__(self, line: Line) -> None:
        super().__init__()
        self.line = line

    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_opens(http.client.HTTPConnection, self.line, req), req)  # type: ignore[arg-type]


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, line: Line) -> None:
        super().__init__()
        self.line = line

    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_opens(http.client.HTTPSConnection, self.line, req), req)  # type: ignore[arg-type]


def _opens(kind: Any, line: Line, request: urllib.request.Request) -> Any:
    """Return what makes the connection for a request, through the line. Raises Forbidden."""
    target = urllib.parse.urlsplit(request.full_url)
    proxied = request.host != target.netloc
    if proxied and not line.allow_private:
        with suppress(OSError):  # behind a proxy names may have no addresses here
            addresses_of(target.hostname or "", target.port or 0, public=True)

    def build(host: str, **options: Any) -> Any:
        connection = kind(host, **options)
        connection._create_connection = line.connect_proxy if proxied else line.connect
        return connection

    return build


def addresses_of(host: str, port: int, *, public: bool) -> list[Any]:
    """Return what getaddrinfo does, of `public` addresses alone. Raises Forbidden if it has none of those."""
    found = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
    allowed = [entry for entry in found if not public or is_public(str(entry[4][0]))]
    if found and not allowed:
        where = f"{one_line(host)} is at {found[0][4][0]}, in this machine or a private network"
        raise Forbidden(f"{where}: --allow-private fetches from there")
    return allowed


def is_public(address: str) -> bool:
    """True for an address of the internet; an IPv4 address within one of IPv6 counts as itself."""
    place = ipaddress.ip_address(address)
    if isinstance(place, ipaddress.IPv6Address):
        within = place.ipv4_mapped or place.sixtofour
        if place in NAT64:
            within = ipaddress.IPv4Address(int(place) & 0xFFFFFFFF)
        if within is not None:
            return is_public(str(within))
    return place.is_global and not place.is_multicast and not any(place in network for network in NOT_PUBLIC)
