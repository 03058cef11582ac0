"""Freed memory that a process on a CPU keeps: counted by the pages that the system must clear."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from opensora_repro.process import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(16 << 20)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
faults()
before = faults()
kept = keep_freed_memory()
for _ in range(6):
    faults()
print(kept, before, faults())
"""


def count_faults(**environment: str) -> tuple[str, int, int]:
    base = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, env=base | environment
    )
    kept, before, after = done.stdout.split()
    return kept, int(before), int(after)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_memory_of_freed_tensors_is_used_again() -> None:
    kept, before, after = count_faults()
    assert kept == "True"
    assert after < 0.02 * before


@pytest.mark.exhaustive
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_a_users_own_settings_stay() -> None:
    kept, before, after = count_faults(MALLOC_ARENA_MAX="4")
    assert kept == "False"
    assert after > 0.5 * before
