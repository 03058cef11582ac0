"""The three stages from config to checkpoint: what they write, hand on to each other, and say about wrong input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from opensora_repro.data.video import probe
from stages import stage1_image, stage2_video, stage3_hq
from tests.training_world import World, losses, make_world, metrics, newest_hashes


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def image_run(world: World) -> Path:
    """A trained stage 1."""
    run_dir = world.root / "stage1"
    assert train(stage1_image, world, run_dir, "images", optim__lr=1e-2) == 0
    return run_dir


def train(stage: Any, world: World, run_dir: Path, data: str, *flags: str, **changes: Any) -> int:
    arguments = world.arguments(run_dir, data, **{"train__steps": 4, "checkpoint__every": 2, **changes})
    code: int = stage.main([str(world.root / "empty.toml"), *arguments, *flags])
    return code


# What a run leaves behind


def test_stage1_writes_what_it_promises(image_run: Path) -> None:
    lines = [json.loads(line) for line in (image_run / "metrics.jsonl").read_text().splitlines()]
    keys = ["step", "loss", "grad_norm", "lr", "seconds", "data_seconds", "samples", "tokens"]
    assert [list(line) for line in lines] == [keys] * 4
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["samples"] == 2 and line["loss"] > 0 and line["grad_norm"] > 0 for line in lines)
    saved = sorted((image_run / "checkpoints").iterdir())
    assert [folder.name for folder in saved] == ["step-00000002", "step-00000004"]
    state = json.loads((image_run / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert (state["step"], state["samples_seen"]) == (4, 8)
    assert (image_run / "config.toml").read_text() == (
        image_run / "checkpoints" / "step-00000004" / "config.toml"
    ).read_text()
    assert list((image_run / "tensorboard").glob("events.out.tfevents.*"))
    files = {"metrics.jsonl", "checkpoints", "config.toml", "tensorboard", "starts.jsonl", "report.html"}
    assert {path.name for path in image_run.iterdir()} == files


def test_the_same_command_again_has_nothing_left_to_do(
    world: World, image_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in image_run.rglob("*")}
    assert train(stage1_image, world, image_run, "images", optim__lr=1e-2) == 0
    assert "4 steps done" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in image_run.rglob("*")}


def test_evaluation_shows_progress_and_changes_nothing(world: World, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"train__steps": 5, "data__fps": 5}  # of clips with 8 frames a second
    assert train(stage2_video, world, tmp_path / "plain", "clips", **settings) == 0
    settings |= {
        "data__val_manifest": str(world.manifest("val")),
        "validation__every": 2,
        "validation__timesteps": [0.1, 0.9],
        "sample__every": 4,
        "sample__prompts": ["a red square", "a blue square"],
        "sample__sampler": "ddim",
        "sample__steps": 2,
    }
    assert train(stage2_video, world, tmp_path / "watched", "clips", **settings) == 0
    assert metrics(tmp_path / "plain") == metrics(tmp_path / "watched")
    assert newest_hashes(tmp_path / "plain") == newest_hashes(tmp_path / "watched")

    lines = [json.loads(line) for line in (tmp_path / "watched" / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert all(line["samples"] == 3 and len(line["losses"]) == 2 for line in lines)
    assert lines[0]["loss"] == pytest.approx(sum(lines[0]["losses"]) / 2)
    assert all(line["loss"] == pytest.approx(sum(line["of_clips"]) / 3, rel=1e-6) for line in lines)
    assert lines[0]["losses"] != lines[1]["losses"]
    folders = sorted((tmp_path / "watched" / "samples").iterdir())
    assert [folder.name for folder in folders] == ["step-00000004", "step-00000005"]
    assert {path.name for path in folders[0].iterdir()} == {"0000.mp4", "0001.mp4", "grid.png"}
    assert probe(folders[0] / "0000.mp4").fps == 5


def test_cache_workers_and_micro_batches_change_no_loss(world: World, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"train__steps": 6, "train__batch_size": 4, "data__draws": 2, "data__fps": 5}
    assert train(stage2_video, world, tmp_path / "plain", "clips", **settings) == 0
    expected = metrics(tmp_path / "plain")

    cached = {**settings, "data__cache": str(tmp_path / "cache")}
    assert train(stage2_video, world, tmp_path / "cached", "clips", **cached) == 0
    assert metrics(tmp_path / "cached") == expected
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert shards
    assert train(stage2_video, world, tmp_path / "cached again", "clips", **cached) == 0
    assert metrics(tmp_path / "cached again") == expected
    assert shards == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}

    assert train(stage2_video, world, tmp_path / "workers", "clips", **settings, data__num_workers=2) == 0
    assert metrics(tmp_path / "workers") == expected

    accumulated = {**settings, "train__batch_size": 2, "train__accumulation": 2}
    assert train(stage2_video, world, tmp_path / "accumulated", "clips", **accumulated) == 0
    np.testing.assert_allclose(losses(tmp_path / "accumulated"), losses(tmp_path / "plain"), rtol=1e-5)

    for name, given in (("plain", settings), ("cached", cached), ("accumulated", accumulated)):
        in_turn = tmp_path / f"{name} in turn"
        assert train(stage2_video, world, in_turn, "clips", **given, train__overlap=False) == 0
        assert metrics(in_turn) == metrics(tmp_path / name)
        assert newest_hashes(in_turn) == newest_hashes(tmp_path / name)


def test_recomputed_activations_and_bf16(world: World, tmp_path: Path) -> None:
    assert train(stage2_video, world, tmp_path / "plain", "clips") == 0
    assert train(stage2_video, world, tmp_path / "recomputed", "clips", train__activation_checkpointing="full") == 0
    np.testing.assert_allclose(losses(tmp_path / "recomputed"), losses(tmp_path / "plain"), rtol=1e-5)
    assert train(stage2_video, world, tmp_path / "bf16", "clips", train__dtype="bf16") == 0
    assert losses(tmp_path / "bf16") != losses(tmp_path / "plain")
    np.testing.assert_allclose(losses(tmp_path / "bf16"), losses(tmp_path / "plain"), rtol=0.05)


# From stage to stage


def test_stage2_starts_as_the_image_model_and_stage3_goes_on(
    world: World, image_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flow: dict[str, Any] = {"diffusion__objective": "flow", "model__pred_sigma": True}
    assert train(stage2_video, world, tmp_path / "s2", "clips", init__weights=str(image_run), **flow) == 0
    out = capsys.readouterr().out
    assert "temporal attention inserted: on every frame the video model is the image model" in out
    assert "step-00000004/ema.safetensors" in out

    changes = {**flow, "init__weights": str(tmp_path / "s2"), "data__num_frames": 6, "data__height": 48}
    assert train(stage3_hq, world, tmp_path / "s3", "clips", **changes) == 0
    out = capsys.readouterr().out
    assert "positions: frames 0..3 by 1 (4) -> 0..5 by 1 (6); rows 0..1 by 1 (2) -> 0..2 by 1 (3)" in out
    assert "python -m stages.sample" in out

    # What it started from is no longer asked for once it resumes.
    (tmp_path / "s2").rename(tmp_path / "moved")
    assert train(stage3_hq, world, tmp_path / "s3", "clips", **{**changes, "train__steps": 5}) == 0
    assert "resuming" in capsys.readouterr().out
    assert len(metrics(tmp_path / "s3")) == 5


def test_more_steps_continue_the_same_run(world: World, tmp_path: Path) -> None:
    assert train(stage1_image, world, tmp_path / "whole", "images", train__steps=6) == 0
    assert train(stage1_image, world, tmp_path / "parts", "images", train__steps=3) == 0
    assert train(stage1_image, world, tmp_path / "parts", "images", train__steps=6) == 0
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert newest_hashes(tmp_path / "parts") == newest_hashes(tmp_path / "whole")


def test_a_damaged_checkpoint_is_passed_over(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(stage1_image, world, tmp_path / "run", "images") == 0
    expected = metrics(tmp_path / "run"), newest_hashes(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-00000004" / "model.safetensors").write_bytes(b"garbage")
    capsys.readouterr()
    assert train(stage1_image, world, tmp_path / "run", "images") == 0
    out = capsys.readouterr().out
    assert "step-00000004 is damaged: model.safetensors" in out
    assert "resuming" in out
    assert (metrics(tmp_path / "run"), newest_hashes(tmp_path / "run")) == expected


def test_dry_run_of_the_full_size_builds_nothing(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {
        "model__hidden_size": 1152, "model__depth": 28, "model__num_heads": 16, "model__caption_channels": 4096,
        "model__model_max_length": 120, "data__num_frames": 16, "data__height": 256, "data__width": 256,
        "vae__path": "stabilityai/sd-vae-ft-ema", "text__path": "DeepFloyd/t5-v1_1-xxl", "model__in_channels": 4,
    }  # fmt: skip
    assert train(stage2_video, world, tmp_path / "run", "clips", "--dry-run", "--gpu", "H100", **changes) == 0
    out = capsys.readouterr().out
    assert "hidden_size = 1152" in out
    assert "759,620,768 parameters" in out
    assert "4,096 tokens a sample" in out
    assert "from weights drawn at random" in out
    # The plan is for another machine: what is absent from this one is told, and is no mistake
    assert "# not on this machine: vae.path=stabilityai/sd-vae-ft-ema: neither a folder here nor" in out
    assert not (tmp_path / "run").exists()


# Preflight: the same lines and the same mistakes, in a dry run and in the run


def test_a_start_tells_what_a_dry_run_does(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes: dict[str, Any] = {"data__height": 64, "data__frame_interval": 4, "train__steps": 1}
    changes |= {"data__val_manifest": str(world.manifest("val")), "validation__every": 1, "validation__max_samples": 2}
    changes |= {"data__manifest": str(uneven_manifest(world, tmp_path)), "data__max_bad_fraction": 0.5}
    assert train(stage2_video, world, tmp_path / "run", "clips", "--dry-run", **changes) == 0
    planned = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert train(stage2_video, world, tmp_path / "run", "clips", **changes) == 0
    out = capsys.readouterr().out
    for line in (
        f"clips of {tmp_path / 'clips.parquet'}: 7",
        "     usable         5   71.4%",
        f"    missing         1   14.3%  no file, or an empty one; first {str(tmp_path / 'gone.mp4')!r}",
        "  too short         1   14.3%  fewer than 4 frames",
        "   squeezed         5   71.4%  shorter than the window of 13 frames, so that motion is faster",
        "   enlarged         5   71.4%  smaller than 64x32: by 2 (median), 2 at most",
        "        fps 8 to 24, mostly 8",
        f"held-out clips of {world.manifest('val')}: 2",
        "warning: captions: median length 24 tokens; 100 % are cut, longer than the 8 that the model reads",
        "warning: captions: 9 % of the words are unknown to this tokenizer",
    ):
        assert line in out.splitlines() and f"# {line}" in planned.splitlines(), line
    (row,) = (line for line in out.splitlines() if line.split()[:3] == ["4", "x", "64x32"])  # without buckets, too
    assert row.split()[3:7] == ["5", "71.4%", "100.0%", "50.0%"] and f"# {row}" in planned.splitlines()
    for words in ("warning: 29% of the clips", "data_tools.split --short-side 64", "data_tools.split --fps 8"):
        assert words in out and words in planned
    assert "a process, this machine has" in out and "a process, this machine has" in planned


def test_prompts_that_are_cut_are_told_where_they_are_sampled(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = {"sample__prompts": ["a red square that moves left and then right and then left again"]}
    for every in (0, 1):
        assert train(stage2_video, world, tmp_path, "clips", "--dry-run", sample__every=every, **prompts) == 0
        assert ("# warning: of the sample prompt 'a red square" in capsys.readouterr().out) is bool(every)


def uneven_manifest(world: World, folder: Path) -> Path:
    """The clips' manifest with a clip that is not there, one too short, one faster, one with a strange caption."""
    frame = pd.read_parquet(world.manifest("clips"))
    frame["path"] = [str(world.root / path) for path in frame["path"]]
    frame.loc[0, "path"] = "gone.mp4"
    frame.loc[1, "num_frames"] = 3
    frame.loc[2, "fps"] = 24.0
    frame.loc[3, "caption"] = "ein rötliches Quadrat: größer"
    frame.to_parquet(folder / "clips.parquet")
    return folder / "clips.parquet"


def test_what_an_earlier_stage_has_to_make(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No mistake of a dry run; a run that is started all the same says which it lacks."""
    coming: dict[str, Any] = {
        "init__weights": str(tmp_path / "stage1"),
        "data__manifest": str(tmp_path / "clips.parquet"),
        "data__val_manifest": str(tmp_path / "val.csv"),
        "validation__every": 1,
    }
    assert train(stage2_video, world, tmp_path / "run", "clips", "--dry-run", **coming) == 0
    out = capsys.readouterr().out
    for key, value in list(coming.items())[:3]:
        assert f"# not yet there: {key.replace('__', '.')} = {value}, which an earlier stage has to make" in out
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.toml").touch()
    begun = {**coming, "init__weights": str(tmp_path / "begun")}
    assert train(stage2_video, world, tmp_path / "run", "clips", "--dry-run", **begun) == 0
    assert f"not yet there: init.weights = {tmp_path / 'begun'}" in capsys.readouterr().out
    for key, value in (
        ("data__manifest", "clips.txt"),
        ("data__manifest", "a folder"),
        ("init__weights", "a folder"),
        ("init__weights", "STDiT.pth"),  # no stage makes such a file
        ("init__weights", "STDiT.PTH"),
        ("init__weights", "checkpoints/STDiT.pth"),
        ("init__weights", "PixArt-alpha/PixArt-XL-2-256x256/transformer"),  # which is fetched
    ):
        (tmp_path / "a folder").mkdir(exist_ok=True)
        wrong = refused(
            stage2_video,
            world,
            capsys,
            "clips",
            dry=True,
            **{**coming, key: value if "/" in value else str(tmp_path / value)},
        )
        assert value in wrong
    own = {**coming, "init__weights": str(world.root / "refused" / "checkpoints")}
    assert "checkpoints: no such weights file" in refused(stage2_video, world, capsys, "clips", dry=True, **own)
    assert "clips.parquet: no such file" in refused(stage2_video, world, capsys, "clips", **coming)
    only = {"init__weights": coming["init__weights"]}
    assert "stage1: no such weights" in refused(stage2_video, world, capsys, "clips", **only)
    held_out = {key: coming[key] for key in ("data__val_manifest", "validation__every")}
    assert "val.csv: no such file" in refused(stage2_video, world, capsys, "clips", **held_out)


# Wrong input: one clear line, exit code 2, and no run folder


def refused(
    stage: Any,
    world: World,
    capsys: pytest.CaptureFixture[str],
    data: str = "images",
    *,
    dry: bool = False,
    **changes: Any,
) -> str:
    run_dir = world.root / "refused"
    capsys.readouterr()
    assert train(stage, world, run_dir, data, *["--dry-run"] * dry, **changes) == 2, changes
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "Loading weights" not in line and line.strip()]
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    assert not run_dir.exists()
    return lines[0]


def broken_manifest(world: World, name: str, change: Any) -> str:
    frame = pd.read_parquet(world.manifest("images"))
    path = world.root / f"{name}.parquet"
    change(frame).to_parquet(path)
    return str(path)


def test_wrong_manifests(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert "absent.parquet: no such file" in refused(
        stage1_image, world, capsys, data__manifest=str(world.root / "absent.parquet")
    )
    no_caption = broken_manifest(world, "no_caption", lambda frame: frame.drop(columns="caption"))
    assert "column caption missing" in refused(stage1_image, world, capsys, data__manifest=no_caption)
    empty = broken_manifest(world, "no_rows", lambda frame: frame.iloc[:0])
    assert "empty" in refused(stage1_image, world, capsys, data__manifest=empty)
    captions = ["words"] * 9 + [float("nan")]
    nan = broken_manifest(world, "nan", lambda frame: frame.assign(caption=captions))
    message = refused(stage1_image, world, capsys, data__manifest=nan)
    assert "row 10" in message
    assert "caption is empty or NaN" in message


def test_wrong_settings(world: World, image_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = [
        (stage1_image, "clips", {}, "model.temporal_attention = true"),
        (stage1_image, "images", {"data__num_frames": 2}, "data.num_frames = 2"),
        (stage2_video, "clips", {"model__temporal_attention": False}, "model.temporal_attention = false"),
        (stage3_hq, "clips", {}, "init.weights is not set"),
        (stage3_hq, "clips", {"init__weights": str(image_run)}, "is an image model"),
        (stage2_video, "clips", {"init__weights": str(image_run), "model__depth": 3}, "model.depth=2"),
        (stage1_image, "images", {"data__manifest": ""}, "data.manifest is not set"),
        (stage1_image, "images", {"run__dir": ""}, "run.dir is not set"),
        (stage1_image, "images", {"train__stepz": 3}, "did you mean train.steps"),
        (stage1_image, "images", {"train__kernels": "fast"}, "expected one of auto, eager, triton"),
        (stage1_image, "images", {"train__kernels": "triton"}, 'train.kernels = "triton" cannot run here'),
        (stage1_image, "images", {"vae__path": str(world.root / "no-vae")}, "vae.path="),
        (stage1_image, "images", {"text__path": str(world.vae)}, "text.path="),
        (stage1_image, "images", {"data__height": 33}, "8, the autoencoder's stride"),
        (stage1_image, "images", {"model__caption_channels": 7}, "model.caption_channels = 7"),
        (stage1_image, "images", {"validation__every": 5}, "but data.val_manifest is not"),
        (stage1_image, "images", {"sample__every": 5}, "but sample.prompts is empty"),
        (stage1_image, "images", {"parallel__plugin": "zero2"}, "parallel.plugin"),
        (stage2_video, "clips", {"parallel__sp_size": 2}, "1 processes are not divisible by"),
        (stage1_image, "images", {"run__dir": str(world.root / "empty.toml")}, "empty.toml: cannot be used"),
        (stage1_image, "images", {"run__dir": str(world.root / "empty.toml" / "run")}, "cannot be used (Not a dir"),
        (stage1_image, "images", {"data__cache": str(world.root / "empty.toml"), "data__draws": 1}, "data.cache = "),
        (stage1_image, "images", {"text__path": "nobody/has-this"}, "nor in the hub's cache"),
        (stage1_image, "images", {"text__path": str(without_padding(world))}, "its tokenizer has no padding token"),
        (stage1_image, "images", {"run__seed": 2**63}, "run.seed: expected a number of 64 bits"),
        (stage1_image, "images", {"optim__lr": 10**400}, "optim.lr: expected a number of 64 bits"),
        (stage1_image, "images", {"track__wandb": "a/b"}, "track.wandb = a/b: expected a project's name"),
        (stage1_image, "images", {"train__batch_size": 10**9}, "do not make one step of 1,000,000,000 samples"),
        (stage1_image, "images", {"data__manifest": str(world.vae / "config.json" / "m.csv")}, "m.csv: no such file"),
        (stage1_image, "images", {"init__weights": str(world.vae / "config.json" / "x")}, "x: no such weights file"),
        (stage1_image, "images", {"init__weights": "x" * 5000}, "no such weights file"),
        (stage1_image, "images", {"init__weights": "runs\0"}, "no such weights file"),
        (stage1_image, "images", {"model__hidden_size": 65536, "model__depth": 500}, "this machine has"),
        (stage2_video, "clips", {"data__num_frames": 13}, "none of the 7 clips can be used: 7 clips have fewer than"),
        (stage2_video, "clips", {"data__num_frames": 13, "data__manifest": wrong_paths(world)}, "7 files are missing"),
        (
            stage2_video,
            "clips",
            {"data__val_manifest": wrong_paths(world), "validation__every": 1},
            "wrong_paths.parquet: none of the 7 clips",
        ),
    ]
    for dry in (True, False):
        for stage, data, changes, message in expected:
            assert message in refused(stage, world, capsys, data, dry=dry, **changes)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("keep = 1e-9", "no clip goes to any of data.buckets in 128 epochs: let one that has clips keep more"),
        ("batch_size = 1000000000", "epochs of the clips do not make one step of 1,000,000,000 samples: lower train."),
    ],
)
def test_buckets_that_never_make_a_step(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: str, message: str
) -> None:
    config = tmp_path / "buckets.toml"
    config.write_text(f'[[data.buckets]]\nnum_frames = 4\nresolution = "32x32"\n{keys}\n')
    for flags in (["--dry-run"], []):
        assert stage2_video.main([str(config), *world.arguments(tmp_path / "run", "clips"), *flags]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_bucket_below_the_autoencoders_stride_is_named(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "buckets.toml"
    config.write_text('[[data.buckets]]\nnum_frames = 4\nresolution = "4x4"\n')
    arguments = [str(config), *world.arguments(tmp_path / "run", "clips"), "--dry-run"]
    assert stage2_video.main(arguments) == 2
    assert "data.buckets: 4 x 4x4: a side is below 8, the autoencoder's stride" in capsys.readouterr().err


def without_padding(world: World) -> Path:
    """The text encoder, whose tokenizer names no padding token."""
    folder = world.root / "text without padding"
    shutil.copytree(world.text, folder, dirs_exist_ok=True)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            content = json.loads((folder / name).read_text())
            content.pop("pad_token", None)
            (folder / name).write_text(json.dumps(content))
    return folder


def wrong_paths(world: World) -> str:
    frame = pd.read_parquet(world.manifest("clips"))
    path = world.root / "wrong_paths.parquet"
    frame.assign(path=[f"elsewhere/{path}" for path in frame["path"]]).to_parquet(path)
    return str(path)


def test_a_run_folder_with_other_settings(world: World, image_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in image_run.rglob("*")}
    capsys.readouterr()
    assert train(stage1_image, world, image_run, "images", optim__lr=1e-3, train__steps=9) == 2
    assert "optim.lr = 0.01 there, 0.001 here" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in image_run.rglob("*")}


def test_what_a_run_began_with_is_not_to_come(
    world: World, image_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = str(tmp_path / "gone.parquet")
    for changes in ({"data__manifest": gone}, {"data__val_manifest": gone, "validation__every": 1}):
        for flags in (["--dry-run"], []):
            settings: dict[str, Any] = {"optim__lr": 1e-2, "train__steps": 9, **changes}
            assert train(stage1_image, world, image_run, "images", *flags, **settings) == 2
            assert "gone.parquet: no such file" in capsys.readouterr().err


def test_a_manifest_that_has_changed(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = tmp_path / "images.parquet"
    frame = pd.read_parquet(world.manifest("images"))
    frame["path"] = [str(world.root / path) for path in frame["path"]]
    frame.to_parquet(manifest)
    assert train(stage1_image, world, tmp_path / "run", "images", data__manifest=str(manifest)) == 0
    frame.iloc[:-1].to_parquet(manifest)
    changes = {"data__manifest": str(manifest), "train__steps": 6}
    assert train(stage1_image, world, tmp_path / "run", "images", **changes) == 2
    assert "has changed since" in capsys.readouterr().err


# Bad samples and bad steps


def with_broken_clip(world: World, folder: Path) -> Path:
    """The clips' manifest with one file cut off in its middle."""
    frame = pd.read_parquet(world.manifest("clips"))
    frame["path"] = [str(world.root / path) for path in frame["path"]]
    content = Path(frame.loc[3, "path"]).read_bytes()
    broken = folder / "broken.mp4"
    broken.write_bytes(content[: len(content) // 2])
    frame.loc[3, "path"] = str(broken)
    frame.to_parquet(folder / "clips.parquet")
    return folder / "clips.parquet"


@pytest.mark.parametrize("cached", [False, True])
def test_an_unreadable_video_is_set_aside(world: World, tmp_path: Path, cached: bool) -> None:
    changes: dict[str, Any] = {"data__manifest": str(with_broken_clip(world, tmp_path)), "data__max_bad_fraction": 0.2}
    if cached:
        changes |= {"data__draws": 1, "data__cache": str(tmp_path / "cache")}
    assert train(stage2_video, world, tmp_path / "run", "clips", train__steps=7, **changes) == 0
    (line,) = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert line["id"] == "clips-3"
    assert line["path"].endswith("broken.mp4")
    assert "broken.mp4" in line["reason"]
    lines = [json.loads(line) for line in metrics(tmp_path / "run")]
    assert sorted({line["samples"] for line in lines}) == [1, 2]
    assert sum(line["samples"] for line in lines) == 12  # two epochs of six good clips
    assert all(line["loss"] > 0 for line in lines)


@pytest.mark.parametrize("cached", [False, True])
def test_too_many_unreadable_videos_stop_the_run(
    world: World, tmp_path: Path, cached: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    changes: dict[str, Any] = {"data__manifest": str(with_broken_clip(world, tmp_path)), "data__max_bad_fraction": 0.1}
    if cached:
        changes |= {"data__draws": 1, "data__cache": str(tmp_path / "cache")}
    assert train(stage2_video, world, tmp_path / "run", "clips", train__steps=7, **changes) == 2
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "1 of 7 samples cannot be read" in message
    assert "data.max_bad_fraction" in message
    assert "broken.mp4" in message
    assert (tmp_path / "run" / "quarantine.jsonl").exists()
    assert (tmp_path / "run" / "checkpoints").exists() == (not cached)  # all seven are seen before the first step


def test_a_non_finite_sample_skips_its_steps_alone(world: World, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"data__draws": 1, "data__cache": str(tmp_path / "cache"), "checkpoint__keep": 0}
    changes |= {"train__steps": 7, "checkpoint__every": 1}
    assert train(stage2_video, world, tmp_path / "clean", "clips", **changes) == 0
    (shard,) = (tmp_path / "cache").rglob("*.safetensors")
    with safe_open(shard, framework="numpy") as file:
        metadata = file.metadata()
    tensors = load_file(shard)
    (poisoned,) = [name for name in tensors if name.startswith("moments") and "clips-5" in name]
    tensors[poisoned] = np.full_like(tensors[poisoned], np.nan)
    save_file(tensors, shard, metadata)

    run_dir = tmp_path / "poisoned"
    assert train(stage2_video, world, run_dir, "clips", **changes) == 0
    skipped = [json.loads(line) for line in (run_dir / "bad_steps.jsonl").read_text().splitlines()]
    assert len(skipped) == 2  # 14 samples are two epochs of seven
    assert all("clips-5" in line["sample_ids"] and line["loss"] is None for line in skipped)
    for line in skipped:
        before, after = ((run_dir / "checkpoints" / f"step-{line['step'] - k:08d}") for k in (1, 0))
        if before.exists():
            for name in ("model", "ema", "optimizer"):
                assert (before / f"{name}.safetensors").read_bytes() == (after / f"{name}.safetensors").read_bytes()
    # Saving waits for every step; without it the next one has begun when a step is found to be bad.
    assert train(stage2_video, world, tmp_path / "late", "clips", **{**changes, "checkpoint__every": 7}) == 0
    assert metrics(tmp_path / "late") == metrics(run_dir)
    assert newest_hashes(tmp_path / "late") == newest_hashes(run_dir)
    assert (tmp_path / "late" / "bad_steps.jsonl").read_text() == (run_dir / "bad_steps.jsonl").read_text()
    first = min(line["step"] for line in skipped)
    assert metrics(run_dir)[: first - 1] == metrics(tmp_path / "clean")[: first - 1]
    assert all(line["loss"] for line in map(json.loads, metrics(run_dir)) if line["step"] not in
               [bad["step"] for bad in skipped])  # fmt: skip


def test_many_non_finite_steps_stop_the_run(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"optim__lr": 1e35, "optim__clip_norm": 0.0, "train__max_bad_steps": 3, "train__steps": 20}
    assert train(stage1_image, world, tmp_path / "run", "images", **changes) == 1
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "3 non-finite steps in a row" in message
    assert len((tmp_path / "run" / "bad_steps.jsonl").read_text().splitlines()) >= 3


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, contextlib\n"
        "from stages import stage1_image, stage2_video, stage3_hq\n"
        "for stage in (stage1_image, stage2_video, stage3_hq):\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        stage.main(['--help'])\n"
        "heavy = {'torch', 'numpy', 'pandas', 'transformers', 'diffusers', 'av', 'cv2', 'timm'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--dry-run") >= 3
