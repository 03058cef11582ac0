"""Recipes by a card's memory: each fits with room to spare, and would not without what makes it fit."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from opensora_repro.config import load_config
from opensora_repro.planning.gpus import GIB, find_gpu
from opensora_repro.training.dry_run import dry_run
from stages import stage2_video, stage3_hq
from tests.frames import write_manifest

PROFILES = Path(__file__).resolve().parents[2] / "configs" / "profiles"
CARDS = {"16gb": "RTX-4080", "24gb": "RTX-4090", "40gb": "A100-40GB", "80gb": "H100"}
ROOM = 0.9  # of what is usable, which already leaves out a card's own share
TOO_MUCH = {  # what of a profile's means is taken away
    "16gb": ("optim.offload=false",),
    "24gb": ('train.activation_checkpointing="none"',),
    "40gb": ("text.offload=false",),
    "80gb": ('train.activation_checkpointing="none"',),
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "manifest.parquet"
    sizes = {"num_frames": 64, "fps": 8.0, "height": 512, "width": 512}
    write_manifest(pd.DataFrame([{"id": "a", "path": "a.mp4", "caption": "a clip", **sizes}]), path)
    return path


def planned(name: str, clips: Path, *changes: str) -> str:
    """What the dry run that the profile's first lines name says, but for data and weights, which are not here."""
    path = PROFILES / f"{name}.toml"
    module, gpu = re.findall(r"python -m stages\.(\w+) \S+ --dry-run --gpu (\S+)", path.read_text())[0]
    assert gpu == CARDS[name]
    overrides = [f"run.dir={clips.parent / name}", f"data.manifest={clips}", "init.weights=", *changes]
    stage = {"stage2_video": stage2_video, "stage3_hq": stage3_hq}[module].STAGE
    return "\n".join(dry_run(load_config(path, overrides), stage, find_gpu(gpu)))


def test_every_profile_is_tested() -> None:
    assert {path.stem for path in PROFILES.glob("*.toml")} == set(CARDS)


@pytest.mark.parametrize("name", CARDS)
def test_fits_with_room_to_spare(name: str, clips: Path) -> None:
    gpu = find_gpu(CARDS[name])
    assert f"{gpu.memory_gib:g}gb" == name
    out = planned(name, clips)
    assert f"fits into the {gpu.usable_bytes / GIB:.3g} GiB usable of a {gpu.name}" in out
    (needed,) = re.findall(r"# memory: +about ([\d.]+) GiB a process", out)
    assert 0.6 * gpu.usable_bytes < float(needed) * GIB < ROOM * gpu.usable_bytes
    for part in ("weights", "gradients", "activations", "encoders"):
        assert part in out
    cfg = load_config(PROFILES / f"{name}.toml")
    assert cfg.model.temporal_attention and cfg.train.dtype == "bf16"


@pytest.mark.parametrize("name", TOO_MUCH)
def test_does_not_fit_without_its_means(name: str, clips: Path) -> None:
    assert "does NOT fit into the" in planned(name, clips, *TOO_MUCH[name])


def test_a_card_is_for_a_dry_run_alone(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(PROFILES / "40gb.toml")
    assert stage2_video.main([path, "--gpu", "H100"]) == 2
    assert "--gpu asks what --dry-run estimates" in capsys.readouterr().err
