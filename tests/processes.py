"""Where tests' processes come from: one server that has loaded the heavy libraries, so that each costs no imports.

multiprocessing has one such server a process, and whoever names its modules last decides: so they are named here alone.
"""

from __future__ import annotations

import multiprocessing

forked = multiprocessing.get_context("forkserver")
forked.set_forkserver_preload(["tests.preload"])
