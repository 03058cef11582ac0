"""Sharing a run: its model card, and what a hub receives, on a stand-in of one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from opensora_repro.errors import UserError
from opensora_repro.weights.card import escaped, share
from opensora_repro.weights.push import push as send
from stages import sample, stage2_video, weights
from tests.hub_server import Hub
from tests.training_world import World, make_world, newest_tensors

REPO = "me/a-model"
PROMPTS = ["a red square", "<img src=x onerror=alert(1)> | [x](javascript:1)\u202e\n# head `'"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"))
    assert train(world, "run", sample__every=2, sample__prompts=[PROMPTS[0]], sample__steps=2) == 0
    line = {"step": 2, "metrics": {"frechet": {"value": 12.345678, "low": 11.0, "high": 14.5}, "loss|<b>": 0.25}}
    (world.root / "run" / "evaluation.jsonl").write_text(json.dumps(line) + "\n")
    return world


def train(world: World, run: str, **changes: Any) -> int:
    given = {"train__steps": 2, **changes}
    return stage2_video.main(
        [str(world.root / "empty.toml"), *world.arguments(world.root / run, "clips", **given)]
    )  # fmt: skip


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.server.shutdown()


def push(hub: Hub, *words: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the hub's address is read where its library is imported."""
    told = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_test", **environment}
    command = [sys.executable, "-m", "stages.weights", "push", *map(str, words)]
    return subprocess.run(command, env=told, capture_output=True, text=True, timeout=300)


def test_a_card_tells_what_was_evaluated_of_its_checkpoint(world: World, tmp_path: Path) -> None:
    run, file = world.root / "run", world.root / "run" / "evaluation" / "evaluation.json"
    of = {name: {"path": f"runs/run/checkpoints/step-0000000{name}", "metrics": {"psnr": int(name)}} for name in "12"}
    file.parent.mkdir()
    file.write_text(json.dumps({"checkpoints": list(of.values())}))
    assert weights.main(["card", str(run), "--out", str(tmp_path / "card.md")]) == 0
    card = (tmp_path / "card.md").read_text()
    assert "| psnr | 2 |" in card and "psnr | 1" not in card and "frechet" not in card and "lora" not in card
    file.unlink()


def test_what_a_hub_receives_samples_like_the_run(world: World, hub: Hub, tmp_path: Path) -> None:
    run = world.root / "run"
    shown = push(hub, run, REPO)
    assert shown.returncode == 0 and not hub.asked, shown.stderr
    assert f"-> {hub.address}/{REPO} (private" in shown.stdout and "nothing was sent" in shown.stdout
    sent = push(hub, run, REPO, "--yes", "--license", "apache-2.0")
    assert sent.returncode == 0, sent.stderr
    assert hub.made[0]["name"] == "a-model" and hub.made[0]["organization"] == "me"
    assert hub.made[0].get("private") is True or hub.made[0].get("visibility") == "private"
    assert set(hub.files) == {"model.safetensors", "config.toml", "README.md", "samples.png"}
    average = newest_tensors(run, "ema")
    assert all(np.array_equal(value, average[key]) for key, value in load(hub.files["model.safetensors"]).items())
    config = hub.files["config.toml"].decode()
    assert str(world.root) not in config + hub.files["README.md"].decode()
    assert 'path = "vae"' in config and 'manifest = "clips.parquet"' in config
    folder = hub.write(tmp_path / "download")
    places = ["--vae", str(world.vae), "--text", str(world.text), "--dtype", "fp32"]
    for source, out in ((folder, "theirs"), (run, "ours")):
        given = [str(source), "--prompt", "a red square", "--out", str(tmp_path / out), "--steps", "2", *places]
        assert sample.main(given) == 0
    theirs, ours = ((tmp_path / out / "0000.mp4").read_bytes() for out in ("theirs", "ours"))
    assert theirs == ours


def test_a_hub_that_refuses(world: World, hub: Hub) -> None:
    hub.refuse = 403
    refused = push(hub, world.root / "run", REPO, "--yes")
    assert refused.returncode == 1 and "nothing was committed" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


def test_what_is_damaged_is_not_sent(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = shutil.copytree(world.root / "run", tmp_path / "run")
    (file,) = run.glob("checkpoints/step-*/ema.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    monkeypatch.setenv("HF_TOKEN", "a token")
    with pytest.raises(UserError, match=r"ema\.safetensors: damaged or changed since it was written"):
        send(share(run, name=REPO), REPO, public=False)


def test_a_card_tells_how_the_run_was_made(world: World, tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    assert weights.main(["card", str(world.root / "run"), "--out", str(card), "--license", "mit"]) == 0
    text = card.read_text()
    assert text.startswith('---\npipeline_tag: "text-to-video"\n') and 'license: "mit"' in text
    assert "python -m stages.sample FOLDER --prompt 'a red square' --out samples" in text
    assert "`--vae PATH` says where vae lies" in text
    assert "| frechet | 12\\.35 | 11 to 14\\.5 |".replace("\\.", ".") in text.replace("\\.", ".")
    assert "| loss\\|&lt;b&gt; | 0.25 |  |" in text
    assert "7 samples, ids" in text and "| steps | 2 |" in text and "## Loss" in text
    assert "![samples](samples.png)" in text and "1. a red square" in text
    sha256 = next((world.root / "vae").glob("*.safetensors"))
    assert sha256.name.replace("_", "\\_") in text


def test_texts_of_others_are_shown_not_read(world: World) -> None:
    text = escaped(PROMPTS[1])
    assert "<" not in text and "\n" not in text and "\u202e" not in text and "\\[x\\]\\(javascript" in text
    assert "\\| " in text and "\\`" in text


def test_an_adapter_is_shared_as_peft_has_it(world: World) -> None:
    base = str(world.root / "run")
    assert train(world, "lora", lora__rank=2, init__weights=base) == 0
    shared = share(world.root / "lora", name=REPO)
    assert {*shared.files, *shared.texts} == {
        "adapter_model.safetensors", "adapter_config.json", "config.toml", "README.md"
    }  # fmt: skip
    assert "python -m stages.sample BASE --lora FOLDER" in shared.texts["README.md"]
    assert str(world.root) not in "".join(shared.texts.values())


@pytest.mark.parametrize("repo", ["model", "../x", "a/b/c", "me/x y"])
def test_mistakes(world: World, repo: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert weights.main(["push", str(world.root / "run"), repo]) == 2
    assert "expected OWNER/NAME" in capsys.readouterr().err
    assert weights.main(["push", str(world.root), REPO]) == 2
    assert "no run with a checkpoint" in capsys.readouterr().err
