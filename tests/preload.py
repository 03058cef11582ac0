"""What a stage's process loads, loaded once by the server that the tests' processes are forked from."""

# ruff: noqa: F401
from __future__ import annotations

import contextlib

import benchmarks.everywhere
import opensora_repro.parallel.colossal
import opensora_repro.training.dry_run
import opensora_repro.training.run
import stages.sample
import tests.libraries
import tests.sequence_world

with contextlib.suppress(ImportError):  # of torch before 2.6
    import opensora_repro.parallel.fsdp
