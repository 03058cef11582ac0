"""A page to sample runs in a browser: prompts, given frames, a preview while it works, and what was made before.

It is served to this machine alone. For others, --host needs a password: OPENSORA_APP_AUTH=USER:PASSWORD, or it is asked
for.
"""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from opensora_repro.config import ConfigError
from opensora_repro.errors import run_command
from opensora_repro.files import user_path

AUTH = "OPENSORA_APP_AUTH"  # not an option: those are seen in the list of processes
PORT = 7860


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stages.app", description=__doc__)
    add = parser.add_argument
    source = "folder of a run, a checkpoint, or published weights (file, folder, fetched NAME); several to choose from"
    add("runs", metavar="RUN", type=user_path, nargs="+", help=source)
    add("--out", type=user_path, default="app", metavar="DIR", help="where results and uploads lie (%(default)s)")
    add("--port", type=int, default=PORT, metavar="N", help="(%(default)s)")
    others = "address to serve others at, such as 0.0.0.0 for all of this machine's; needs a password (%(default)s)"
    add("--host", default="127.0.0.1", metavar="ADDRESS", help=others)
    add("--device", help="such as cuda, cuda:1 or cpu (a GPU where there is one)")
    add("--max-seconds", type=float, default=60.0, metavar="X", help="longest video that is made (%(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    return run_command(lambda: serve(args), kept="")


def serve(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("gradio") is None or int(version("gradio").split(".")[0]) < 6:
        raise ConfigError("the page needs gradio 6 or later: pip install 'opensora-repro[app]'")
    local = is_loopback(args.host)
    auth = credentials(local=local)
    check_port(args.host, args.port)
    runs = named_runs(args.runs)

    from opensora_repro.app.serve import Server
    from opensora_repro.app.studio import Studio
    from opensora_repro.sampling.build import build_run
    from stages.sample import parse as parse_sample

    studio = Studio(
        runs, args.out, lambda words: build_run(parse_sample(words)), device=args.device, max_seconds=args.max_seconds
    )
    server = Server(studio, host=args.host, port=args.port, auth=auth, local=local)
    print(f"{server.address} shows {', '.join(runs)}; results are in {args.out}; Ctrl-C ends it", flush=True)
    if not local:
        print(
            "warning: the password crosses the network as it is: let a proxy with TLS stand before it", file=sys.stderr
        )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    with suppress(KeyboardInterrupt):
        while True:
            time.sleep(3600)
    server.close()
    return 0


def is_loopback(host: str) -> bool:
    """Raises ConfigError for what is no address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        raise ConfigError(f"--host {host}: expected an address, such as 0.0.0.0") from None


def credentials(*, local: bool) -> tuple[str, str] | None:
    """User and password, of the environment or the terminal; None where none are needed. Raises ConfigError."""
    given = os.environ.pop(AUTH, "")  # not for the processes that this one starts
    if not given and not local and sys.stdin.isatty():
        import getpass

        given = f"{input('user: ')}:{getpass.getpass('password: ')}"
    user, _, password = given.partition(":")
    if user and password:
        return user, password
    if given or not local:
        why = "expected USER:PASSWORD" if given else "serving others needs a password"
        raise ConfigError(f"{AUTH}: {why}; set it in the environment, or answer in a terminal")
    return None


def check_port(host: str, port: int) -> None:
    """Raises ConfigError; before anything is loaded."""
    if not 0 < port < 1 << 16:
        raise ConfigError(f"--port {port}: expected a number from 1 to 65535")
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host.strip("[]"), port))
    except OSError as error:
        raise ConfigError(f"--port {port}: cannot be used at {host} ({error.strerror}); choose another one") from None


def named_runs(paths: Sequence[Path]) -> dict[str, Path]:
    """Each by the shortest end of its path that no other has. Raises ConfigError."""
    from opensora_repro.weights.catalog import here_or_published

    found = list(map(here_or_published, paths))
    names: dict[str, Path] = {}
    for path in found:
        parts = path.resolve().parts
        others = [other.resolve().parts for other in found if other.resolve() != path.resolve()]
        length = next((n for n in range(1, len(parts)) if all(o[-n:] != parts[-n:] for o in others)), len(parts))
        names["/".join(parts[-length:])] = path.resolve()
    return names


if __name__ == "__main__":
    sys.exit(main())
