"""Runs a program that ends when the process that wanted it does, however that ends.

python tethered.py PID PROGRAM [ARGUMENT ...]: PID is this script's parent. Started in a process group of its own, it
ends all of the group when it has another parent: its own is gone then.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time


def main() -> int:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    program = subprocess.Popen(command)
    while program.poll() is None:
        if os.getppid() != parent:
            os.killpg(0, signal.SIGKILL)
        time.sleep(0.1)
    return program.returncode if program.returncode >= 0 else 128 - program.returncode


if __name__ == "__main__":
    sys.exit(main())
