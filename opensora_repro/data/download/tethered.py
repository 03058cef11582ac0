"""Runs a program that ends when the process that wanted it does, however that ends.

Started in a process group of its own, it ends all of the group when it has another parent: its own is gone then.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time


def main() -> int:
    parser = argparse.ArgumentParser(prog="tethered.py", description=__doc__)
    parser.add_argument("parent", type=int, help="this script's parent")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the program, with its arguments")
    args = parser.parse_args()
    program = subprocess.Popen(args.command)
    while program.poll() is None:
        if os.getppid() != args.parent:
            os.killpg(0, signal.SIGKILL)
        time.sleep(0.1)
    return program.returncode if program.returncode >= 0 else 128 - program.returncode


if __name__ == "__main__":
    sys.exit(main())
