"""What the tests of `stages.sample` share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `vae`, `text` and the runs `flow` (two checkpoints), `iddpm` and `empty`; no test changes it."""
    from tests.sample_home import make_home

    home = tmp_path_factory.mktemp("home")
    make_home(home)
    return home
