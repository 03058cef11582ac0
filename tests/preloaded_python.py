"""An interpreter that has loaded the heavy libraries already: `python -m MODULE ...` without seconds of imports.

A server loads `tests.libraries` once and forks a process for each command, with the caller's arguments, environment,
folder and files. The client is a program that stands for the interpreter: it ends as the command ends, passes signals
on, and takes the command with it when it is killed. What a command starts by `sys.executable` is made alike.
What libraries read from the environment when they load must be in the server's own.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
PASSED_ON = (signal.SIGINT, signal.SIGTERM)
# Without `site`: it starts in twenty milliseconds.
CLIENT = """#!{python} -SE
import array, json, os, signal, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    request = json.dumps([sys.argv[0], sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    files = array.array("i", [0, 1, 2])
    server.sendmsg([len(request).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
    for number in {passed_on}:
        signal.signal(number, lambda number, _: server.sendall(bytes([number])))
    server.sendall(request)
    code = int(server.makefile().readline() or 1)
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@contextlib.contextmanager
def preloaded_python(folder: Path, environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """Give the path of a program that stands for this interpreter; `folder`, a short path, holds it."""
    address, client = str(folder / "server"), folder / "python"
    passed_on = [int(number) for number in PASSED_ON]
    client.write_text(CLIENT.format(python=sys.executable, address=address, passed_on=passed_on))
    client.chmod(0o755)
    if not hasattr(os, "pidfd_open"):  # Linux's
        client.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        yield str(client)
        return
    command = [sys.executable, "-m", "tests.preloaded_python", address]
    with subprocess.Popen(command, cwd=REPO, env=environment, stdout=subprocess.PIPE) as server:
        assert server.stdout and server.stdout.readline() == b"ready\n"
        try:
            yield str(client)
        finally:
            server.terminate()


def serve(address: str) -> tuple[str, list[str]]:
    """Answer clients for good; returns in each command's process alone, with its program and arguments."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while True:
            client, _ = listener.accept()
            if os.fork() == 0:
                break
            client.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    sent, files, _, _ = socket.recv_fds(client, 8, 3)
    request = _receive(client, int.from_bytes(sent, "big"))
    command = os.fork()
    if command:
        _wait(command, client)
    client.close()
    program, arguments, cwd, environment = json.loads(request)
    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    return program, arguments


def _receive(client: socket.socket, size: int) -> bytes:
    content = b""
    while len(content) < size:
        content += client.recv(size - len(content))
    return content


def _wait(command: int, client: socket.socket) -> None:
    """Tell the client how its command ended; a client that is gone takes it along. Ends this process."""
    for file in range(3):
        os.close(file)  # a pipe that the command leaves is at its end
    ended = os.pidfd_open(command)
    while ended not in select.select([ended, client], [], [])[0]:
        number = client.recv(1)
        with contextlib.suppress(ProcessLookupError):
            os.kill(command, number[0] if number else signal.SIGKILL)
        if not number:
            break
    code = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
    with contextlib.suppress(OSError):
        client.sendall(f"{code}\n".encode())
    os._exit(0)


def main() -> None:
    outcome = [0]
    atexit.register(_leave, outcome)  # the first to register is the last to run
    import tests.libraries  # noqa: F401

    gc.collect()
    gc.freeze()  # a command's collector leaves the libraries' pages shared
    sys.executable, words = serve(sys.argv[1])
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]  # the command's own folder may have others
    if words[0] == "-u":
        del words[0]
    if module := words[0] == "-m":
        del words[0]
    sys.argv = words
    sys.path[0] = os.getcwd() if module else str(Path(words[0]).resolve().parent)
    sys.path[1:1] = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    try:
        if module:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as ending:
        outcome[0] = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        traceback.print_exc()
        outcome[0] = 1


def _leave(outcome: list[int]) -> None:
    """End without taking the libraries down one by one, which takes longer than most commands do."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(outcome[0])


if __name__ == "__main__":
    main()
