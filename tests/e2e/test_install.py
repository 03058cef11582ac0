"""The wheel, installed into an environment of its own, works in a folder that holds nothing of the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from opensora_repro.data.manifest import read_manifest
from opensora_repro.data.video import probe
from opensora_repro.data.write import write_video

SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "opensora_repro", "stages", "data_tools", "configs")
SMALL = (
    "model.hidden_size=32", "model.depth=2", "model.num_heads=2", "data.num_frames=4", "data.draws=0", "data.cache=",
    "data.val_manifest=", "data.num_workers=0", "validation.every=0", "sample.every=0", "sample.steps=2",
    "train.steps=2", "train.batch_size=2", "optim.warmup_steps=0", "optim.decay_steps=0", "init.weights=",
)  # fmt: skip


def run(*command: str | Path, cwd: Path, code: int = 0) -> str:
    """What a command says, in an environment without our checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: building leaves its own files beside the sources."""
    repo, folder = Path(__file__).resolve().parents[2], tmp_path_factory.mktemp("wheel")
    for name in (*SOURCES, "checkpoints"):
        if (repo / name).is_dir():
            shutil.copytree(repo / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(repo / name, folder / name)
    run(sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "--quiet",
        cwd=folder)  # fmt: skip
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def bin_dir(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Commands of an environment that has the wheel, and sees the packages of the one that runs the tests."""
    home = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    python = home / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel,
        cwd=home)  # fmt: skip
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip()
    # A folder named so is searched last, and its own .pth files, such as the checkout's, are not read.
    (Path(packages) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert packages in run(python, "-c", "import opensora_repro; print(opensora_repro.__file__)", cwd=home)
    return home / "bin"


def film(path: Path, seed: int) -> None:
    """Four seconds of coloured clouds that pass by."""
    sky = np.random.default_rng(seed).integers(0, 256, (96, 400, 3)).astype(np.float32)
    sky = cv2.normalize(cv2.GaussianBlur(sky, (0, 0), 6), None, 30, 220, cv2.NORM_MINMAX).astype(np.uint8)
    write_video(path, np.stack([sky[:, 2 * t : 2 * t + 128] for t in range(96)]), 24)


def test_the_wheel_holds_the_product_and_nothing_else(wheel: Path, repo_dir: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == {"opensora_repro", "stages", "data_tools"}
    assert {"opensora_repro/py.typed", "stages/py.typed", "data_tools/py.typed"} <= set(names)
    listed = subprocess.run(
        ["git", "ls-files", "opensora_repro", "stages", "data_tools", "configs", "checkpoints"],
        cwd=repo_dir, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    brought = [f"opensora_repro/{name}" if name.startswith(("configs/", "checkpoints/")) else name for name in listed]
    assert set(brought) <= set(names)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_it_works_in_any_folder(bin_dir: Path, tmp_path: Path) -> None:
    def call(*words: str, code: int = 0) -> str:
        return run(bin_dir / "opensora-repro", *words, cwd=tmp_path, code=code)

    assert "PixArt-XL-2-512x512.pth" in call("weights", "list")
    assert "the closest name is stage2_video" in call("stage2-vido", code=2)

    assert f"copied: {Path('recipes/demo/stage2.toml')}" in call("configs", "--copy", "recipes")
    (tmp_path / "videos").mkdir()
    for seed in range(2):
        film(tmp_path / "videos" / f"{seed}.mp4", seed)
    call("pipeline", "recipes/data/pipeline.toml", "input=videos", "out=data/mine")
    (tmp_path / "captions.csv").write_text("source,caption\n0.mp4,clouds\n1.mp4,other clouds\n")
    call("caption", "data/mine/manifest.parquet", "--sidecar", "captions.csv", "--out", "data/clips")
    assert len(read_manifest(tmp_path / "data/clips/manifest.parquet")) == 2

    # A recipe that was not copied, and the frozen models that it names, are found where they were installed.
    call("stage2_video", "configs/demo/stage2.toml", "run.dir=run", "data.manifest=data/clips/manifest.parquet", *SMALL)
    call("sample", "run", "--prompt", "clouds", "--out", "out")
    assert probe(tmp_path / "out" / "0000.mp4").num_frames == 4
