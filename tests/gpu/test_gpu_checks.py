"""The checks of `make gpu`, one test each (`python -m pytest tests/gpu` on a machine with an NVIDIA GPU)."""

from __future__ import annotations

import pytest
import torch

from tests.gpu import checks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture(autouse=True)
def _true_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("name", checks.CHECKS)
def test_check(name: str) -> None:
    result = checks.run_check(name, torch.device("cuda", 0))
    if result["status"] == "skipped":
        pytest.skip(result["reason"])
    assert result["status"] == "passed", result
