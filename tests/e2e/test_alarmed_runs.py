"""Alarms in runs as users start them, the page each run leaves, and what `[track]` sends, offline."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from opensora_repro.config import Config, ConfigError, parse_config
from opensora_repro.training.track import check_track
from stages import stage2_video
from tests.training_world import Command, World, make_world, metrics, newest_hashes

STAGE2 = "stages.stage2_video"
DEMO_VAE = Path(__file__).parents[2] / "checkpoints" / "demo" / "vae"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def arguments(world: World, run_dir: Path, **changes: Any) -> list[str]:
    settings = {
        "train__steps": 20,
        "checkpoint__every": 5,
        "model__depth": 1,
        "data__val_manifest": str(world.manifest("val")),
        "validation__every": 5,
        "validation__timesteps": [0.2, 0.5, 0.8],
        **changes,
    }
    return [str(world.root / "empty.toml"), *world.arguments(run_dir, "clips", **settings)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def events_of(run_dir: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0}).Reload()


@pytest.mark.exhaustive
def test_an_alarm_ends_a_run_which_is_tracked_and_goes_on(world: World, tmp_path: Path) -> None:
    """Clips that repeat: after step 10 of 20, saved; without the order to stop the same command ends as any other."""
    sampled = {"sample__every": 5, "sample__prompts": ["a red square"], "sample__sampler": "ddim", "sample__steps": 2}
    given: dict[str, Any] = {"alarms__epochs": 2, "alarms__off": ["noise", "flat", "motion"], **sampled}
    run_dir = tmp_path / "run"
    stopping = arguments(world, run_dir, **given, alarms__stop=["repeats"], track__wandb="tiny")
    command = Command(STAGE2, stopping, tmp_path / "log", {"WANDB_MODE": "offline"})
    assert command.wait() == 1, command.err
    (error,) = [line for line in command.err.splitlines() if line.startswith("error")]
    assert "stopped by alarm 'repeats' of alarms.stop: every clip has been seen 2 times" in error
    assert f"best checkpoint: {run_dir}/checkpoints/step-000000" in error and "saved: " in error
    assert "alarm: repeats, step 10: every clip has been seen 2 times" in command.out
    (told,) = lines(run_dir / "alarms.jsonl")
    assert told == {"step": 10, "alarm": "repeats", "message": "every clip has been seen 2 times"}
    last = lines(run_dir / "metrics.jsonl")[-1]["step"]
    assert 10 <= last <= 12 and (run_dir / "checkpoints" / f"step-{last:08d}").is_dir()

    (sent,) = (run_dir / "wandb").glob("offline-run-*/run-*.wandb")
    content = sent.read_bytes()
    assert all(name in content for name in (b"train/loss", b"validation/of_trained", b"samples/moving"))
    events = events_of(run_dir)
    assert "alarms/repeats/text_summary" in events.Tags()["tensors"]
    moving = events.Images("samples/moving")
    assert [image.step for image in moving] == [5, 10] and moving[0].encoded_image_string.startswith(b"GIF8")
    page = (run_dir / "report.html").read_text()
    assert "every clip has been seen 2 times" in page and "clips of" in page and "<video" in page

    assert stage2_video.main(arguments(world, run_dir, **given)) == 0
    assert [line["step"] for line in lines(run_dir / "alarms.jsonl")] == [10]  # told already
    assert [line["step"] for line in lines(run_dir / "starts.jsonl")] == [0, last]
    plain = tmp_path / "plain"
    assert stage2_video.main(arguments(world, plain, validation__every=0)) == 0
    assert metrics(run_dir) == metrics(plain) and newest_hashes(run_dir) == newest_hashes(plain)
    assert not (plain / "wandb").exists() and not (plain / "alarms.jsonl").exists()


def test_an_activation_saturates_in_a_run(world: World, tmp_path: Path) -> None:
    """Of weights whose last block adds millions."""
    assert stage2_video.main(arguments(world, tmp_path / "sound", train__steps=5)) == 0
    (line,) = lines(tmp_path / "sound" / "validation.jsonl")
    assert 0 < line["activation"] < 100 and line["of_average"] == line["losses"][1]
    assert line["of_trained"] != line["of_average"]
    assert not (tmp_path / "sound" / "alarms.jsonl").exists()
    weights = load_file(next((tmp_path / "sound").glob("checkpoints/*/model.safetensors")))
    weights["blocks.0.mlp.fc2.bias"] += 1e6
    save_file(weights, tmp_path / "weights.safetensors")
    changes = {"init__weights": str(tmp_path / "weights.safetensors"), "train__steps": 5}
    assert stage2_video.main(arguments(world, tmp_path / "run", **changes)) == 0
    (told,) = lines(tmp_path / "run" / "alarms.jsonl")
    assert told["alarm"] == "saturation" and told["step"] == 5


def test_samples_are_of_one_colour_where_the_decoder_is_dead(world: World, tmp_path: Path) -> None:
    """Training, which only encodes, does not notice. With the same autoencoder whole, they are seen to be noise yet."""
    dead = tmp_path / "dead"
    shutil.copytree(DEMO_VAE, dead)
    weights = load_file(dead / "diffusion_pytorch_model.safetensors")
    weights["decoder.conv_out.weight"].zero_()
    save_file(weights, dead / "diffusion_pytorch_model.safetensors")
    sampled = {"sample__every": 3, "sample__prompts": ["a red square", "a blue square"], "sample__sampler": "ddim",
               "sample__steps": 2, "train__steps": 3, "validation__every": 0}  # fmt: skip
    for vae, expected in ((DEMO_VAE, ["noise"]), (dead, ["flat", "motion"])):
        run_dir = tmp_path / f"run_{vae.name}"
        assert stage2_video.main(arguments(world, run_dir, **sampled, vae__path=str(vae))) == 0
        told = lines(run_dir / "alarms.jsonl")
        assert [line["alarm"] for line in told] == expected
    assert told[0]["message"] == "2 of 2 samples are of one colour" and told[0]["step"] == 3
    assert metrics(tmp_path / "run_dead") == metrics(tmp_path / "run_vae")


def test_a_page_that_cannot_be_written_ends_no_run(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "report.html").mkdir(parents=True)
    assert stage2_video.main(arguments(world, tmp_path / "run", train__steps=3, validation__every=0)) == 0
    assert "warning: no report.html: " in capsys.readouterr().out


def test_a_run_that_may_not_send_is_refused_by_its_dry_run_in_the_same_line(world: World, tmp_path: Path) -> None:
    """wandb has no key here; then it has one, whose server is never asked."""
    words = arguments(world, tmp_path / "run", track__wandb="tiny", validation__every=0)
    clean = {"WANDB_API_KEY": "", "WANDB_IDENTITY_TOKEN_FILE": "", "WANDB_MODE": "online", "NETRC": ""}
    clean |= {
        "HOME": str(tmp_path),
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_CONFIG_DIR": str(tmp_path / "wandb"),
    }
    told = []
    for flags in (["--dry-run"], []):
        command = Command(STAGE2, words + flags, tmp_path / "log", clean)
        assert command.wait() == 2, command.out
        told.append([line for line in command.err.splitlines() if line.startswith("error")])
    assert told[0] == told[1] and len(told[0]) == 1
    assert "track.wandb = tiny: wandb has no key here: run `wandb login`; WANDB_MODE=offline keeps it" in told[0][0]
    assert not (tmp_path / "run").exists()
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login user password {'a' * 40}\n")
    command = Command(STAGE2, [*words, "--dry-run"], tmp_path / "log", clean | {"NETRC": str(tmp_path / "netrc")})
    assert command.wait() == 0, command.err


def test_nothing_of_wandb_is_loaded_unasked_and_its_absence_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # what an environment without it looks like
    check_track(Config())
    with pytest.raises(ConfigError, match=r"track.wandb = tiny: wandb is not installed; pip install"):
        check_track(parse_config({"track": {"wandb": "tiny"}}))
