"""What a launcher tells a process, in one line; imports nothing that takes time."""

import os
import sys

if __name__ == "__main__":
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK")
    line = " ".join(f"{name}={os.environ[name]}" for name in names) + f" arguments={sys.argv[1:]}\n"
    os.write(1, line.encode())  # at once, so that processes do not cut each other's lines
