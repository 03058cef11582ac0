"""What every test shares: the reference data's folders, and a process that computes the same thing every time."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parent.parent
BESIDE_OTHERS = "PYTEST_XDIST_WORKER" in os.environ
NUM_THREADS = int(os.environ.get("OMP_NUM_THREADS") or (1 if BESIDE_OTHERS else max(1, min(2, os.cpu_count() or 1))))

# Before torch, transformers or OpenCV load: they read these once. Child processes of the tests inherit them; one thread
# each, because threads that outnumber the cores wait for each other many times longer than they work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that would download something fails instead
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A shell starts what it runs in the background with Ctrl-C ignored, and what the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST = ("e2e", "distributed")  # folders
NO_REFERENCE = "reference data not found"


def shared_folder(name: str, variable: str) -> Path:
    """Folder of reference data: the environment's word, or `../shared/NAME` beside the checkout.

    A wrong word fails; a checkout without the data skips what needs it, and says so at the end.
    """
    given = os.environ.get(variable)
    folder = Path(given) if given else REPO.parent / "shared" / name
    if folder.is_dir():
        return folder
    if given:
        pytest.fail(f"{NO_REFERENCE}: {variable} = {given} is no folder", pytrace=False)
    pytest.skip(f"{NO_REFERENCE}: {folder} (put it there, or set {variable})")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    missing = [report for report in terminalreporter.stats.get("skipped", []) if NO_REFERENCE in str(report.longrepr)]
    if missing:
        terminalreporter.write_sep("!", f"{len(missing)} tests NOT RUN: {NO_REFERENCE}", red=True)
        for reason in sorted({str(report.longrepr[2]) for report in missing}):
            terminalreporter.write_line(reason)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Reference outputs of the published model code (`<case>.safetensors` and `<case>.json`)."""
    return shared_folder("golden", "OPENSORA_GOLDEN")


@pytest.fixture(scope="session")
def golden_1_2_dir() -> Path:
    """The same of Open-Sora 1.1 and 1.2, with its buckets and their batches."""
    return shared_folder("golden_1_2", "OPENSORA_GOLDEN_1_2")


@pytest.fixture(scope="session")
def videos_dir() -> Path:
    """Real footage with known cuts, and damaged files with what is expected of them."""
    return shared_folder("videos", "OPENSORA_VIDEOS")


@pytest.fixture(scope="session")
def cases_dir() -> Path:
    """Small inputs after public bug reports; their README says what each must give."""
    return shared_folder("cases", "OPENSORA_CASES")


@pytest.fixture(scope="session")
def repo_dir() -> Path:
    """Root of the checkout."""
    return REPO


@pytest.fixture(scope="session", autouse=True)
def _deterministic_torch() -> None:
    """Few threads and deterministic kernels, so that a result does not depend on the machine's size."""
    import torch

    torch.set_num_threads(NUM_THREADS)
    torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    """Each test starts from the same global random state, whichever tests ran before it."""
    import random

    import numpy
    import torch

    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything under tests/gpu needs a GPU; `make test` leaves it out, `make gpu` runs it.

    The longest files come first, so that at the end no worker is alone with one.
    """
    items.sort(key=lambda item: LONGEST.index(item.path.parent.name) if item.path.parent.name in LONGEST else 9)
    for item in items:
        if (REPO / "tests" / "gpu") in item.path.parents:
            item.add_marker("gpu")
