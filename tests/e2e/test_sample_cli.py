"""`python -m stages.sample` on tiny runs, with frozen models just as random: files and mistakes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from stages.sample import main
from tests.sample_home import PROMPTS, check_mistake, decode, generate_samples, sample


def test_defaults_come_from_the_newest_checkpoint(home: Path, tmp_path: Path) -> None:
    videos = sample(home / "flow", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000.mp4", "0001.mp4", "0002.mp4", "samples.json"]
    assert [video.shape for video in videos] == [(6, 32, 48, 3)] * 3
    with av.open(str(tmp_path / "0000.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 8
    record = json.loads((tmp_path / "samples.json").read_text(encoding="utf-8"))
    names = ["0000.mp4", "0001.mp4", "0002.mp4"]
    assert record.pop("samples") == [{"file": n, "prompt": p} for n, p in zip(names, PROMPTS, strict=True)]
    assert record["checkpoint"].endswith("flow/checkpoints/step-00000020")
    expected = {"seed": 3, "steps": 3, "guidance": 2.0, "sampler": "euler", "weights": "ema", "fps": 8}
    assert {key: record[key] for key in expected} == expected

    again = sample(home / "flow" / "checkpoints" / "step-00000020", tmp_path / "again")
    assert all(np.array_equal(a, b) for a, b in zip(videos, again, strict=True))
    older = sample(home / "flow" / "checkpoints" / "step-00000005", tmp_path / "older")
    trained = sample(home / "flow", tmp_path / "trained", "--no-ema")
    other_seed = sample(home / "flow", tmp_path / "seed", "--seed", "4")
    for others in (older, trained, other_seed):
        assert np.abs(videos[0] - others[0]).max() > 8


def test_a_sample_depends_on_its_number_not_on_its_batch(home: Path) -> None:
    """Before H.264, which turns the rounding of one pixel into another coding of its block."""
    together = generate_samples(home / "flow", batch_size=3)
    apart = generate_samples(home / "flow", batch_size=1)
    fewer = generate_samples(home / "flow", batch_size=8, prompts=PROMPTS[:2])
    assert [len(together), len(apart), len(fewer)] == [3, 3, 2]
    for one, other in (*zip(together, apart, strict=True), *zip(fewer, together, strict=False)):
        difference = np.abs(one - other)
        assert difference.max() <= 1  # rounding
        assert difference.mean() < 0.001
    twice = generate_samples(home / "flow", batch_size=2, prompts=PROMPTS[:1] * 2)
    assert np.abs(twice[0] - twice[1]).max() > 8  # the same words, another number


def test_files_carry_their_samples_number(home: Path, tmp_path: Path) -> None:
    videos = generate_samples(home / "flow", batch_size=8)
    for batch_size in ("3", "2"):
        files = sample(home / "flow", tmp_path / batch_size, "--batch-size", batch_size)
        for i, file in enumerate(files):
            off = [np.abs(file - video).mean() for video in videos]
            assert np.argmin(off) == i
            assert off[i] < 0.5 * min(off[:i] + off[i + 1 :])  # what H.264 loses against another sample


def test_one_frame_is_a_png_and_sizes_can_be_chosen(home: Path, tmp_path: Path) -> None:
    sample(home / "flow", tmp_path / "image", "--num-frames", "1", "--height", "20", "--gif", prompts=PROMPTS[:1])
    assert sorted(path.name for path in (tmp_path / "image").iterdir()) == ["0000.png", "samples.json"]
    assert Image.open(tmp_path / "image" / "0000.png").size == (48, 20)
    (video,) = sample(
        home / "flow", tmp_path / "video", "--num-frames", "3", "--width", "16", "--fps", "24", "--gif",
        prompts=PROMPTS[:1],
    )  # fmt: skip
    assert video.shape == (3, 32, 16, 3)
    assert Image.open(tmp_path / "video" / "0000.gif").n_frames == 3


@pytest.mark.parametrize("sampler", ["iddpm", "ddim", "dpm"])
def test_iddpm_samplers(home: Path, tmp_path: Path, sampler: str) -> None:
    (video,) = sample(home / "iddpm", tmp_path, "--sampler", sampler, "--steps", "12", prompts=PROMPTS[:1])
    assert video.shape == (6, 32, 48, 3)
    assert json.loads((tmp_path / "samples.json").read_text())["sampler"] == sampler


def test_prompts_from_a_file(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeff# two prompts\n\n  a red circle \na häßlicher 円 moving up\n", encoding="utf-8")
    out = tmp_path / "out"
    assert main([str(home / "flow"), "--prompts", str(path), "--out", str(out), "--device", "cpu"]) == 0
    samples = json.loads((out / "samples.json").read_text(encoding="utf-8"))["samples"]
    assert [s["prompt"] for s in samples] == ["a red circle", "a häßlicher 円 moving up"]
    assert [s["file"] for s in samples] == ["0000.mp4", "0001.mp4"]


def test_dry_run_writes_nothing(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample(home / "flow", tmp_path / "out", "--dry-run")
    shown = capsys.readouterr().out
    assert "step-00000020" in shown and "prompts  3" in shown and "parameters" in shown
    assert not (tmp_path / "out").exists()


def test_interrupted_work_leaves_whole_files(home: Path, tmp_path: Path) -> None:
    def interrupt() -> None:
        while not (tmp_path / "0000.mp4").exists():
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)
        while not ended.wait(3):  # Python drops one that arrives within a destructor
            os.kill(os.getpid(), signal.SIGINT)

    ended = threading.Event()
    watcher = threading.Thread(target=interrupt)
    watcher.start()
    args = [word for _ in range(200) for word in ("--prompt", PROMPTS[0])]
    try:
        code = main([str(home / "flow"), *args, "--out", str(tmp_path), "--device", "cpu", "--batch-size", "1"])
    finally:
        ended.set()
        watcher.join()
    assert code == 130
    files = sorted(path.name for path in tmp_path.iterdir())
    videos = [name for name in files if name != "samples.json"]
    assert videos == [f"{i:04d}.mp4" for i in range(len(videos))]
    assert 1 <= len(videos) < 200
    assert all(len(decode(tmp_path / name)) == 6 for name in videos)


def broken_run(home: Path, folder: Path, *, weights: bytes | None = None, config: str | None = None) -> Path:
    """A copy of the flow run's checkpoint with something wrong."""
    shutil.copytree(home / "flow" / "checkpoints" / "step-00000020", folder)
    if weights is not None:
        (folder / "ema.safetensors").write_bytes(weights)
    if config is not None:
        path = folder / "config.toml"
        path.write_text(path.read_text().replace("hidden_size = 32", config))
    return folder


MISTAKES = {
    "no such run": (["{home}/nowhere", "--prompt", "x"], "nowhere: no such run, checkpoint or weights file"),
    "no checkpoint": (["{home}/empty", "--prompt", "x"], "empty: no checkpoint in this run yet"),
    "no weights": (
        ["{home}/vae/config.json", "--prompt", "x"],
        "{home}/vae/config.json: is neither a torch nor a safetensors file",
    ),
    "other weights": (["{home}/vae", "--prompt", "x"], "describes a AutoencoderKL, neither PixArt nor DiT"),
    "no checkpoint's folder": (["{home}", "--prompt", "x"], "no weights in this folder"),
    "label": (["{home}/flow", "--label", "1"], "step-00000020 is conditioned on text, give --prompt"),
    "size": (
        ["{home}/flow", "--prompt", "x", "--height", "30", "--width", "46"],
        "height 30 and width 46 must be",
    ),
    "no frames": (["{home}/flow", "--prompt", "x", "--num-frames", "0"], "--num-frames 0: expected at least 1"),
    "sampler": (["{home}/flow", "--prompt", "x", "--sampler", "dpm"], "--sampler dpm: this flow model needs euler"),
    "euler": (["{home}/iddpm", "--prompt", "x", "--sampler", "euler"], "this iddpm model needs iddpm, ddim or dpm"),
    "guidance": (["{home}/flow", "--prompt", "x", "--guidance", "nan"], "--guidance nan: expected a finite number"),
    "steps": (["{home}/iddpm", "--prompt", "x", "--sampler", "ddim", "--steps", "1001"], "trained with 1000"),
    "empty prompt": (["{home}/flow", "--prompt", " "], "prompt 1 is empty"),
    "no prompts file": (["{home}/flow", "--prompts", "{home}/none.txt"], "none.txt: cannot be read"),
    "not text": (["{home}/flow", "--prompts", "{home}/flow/checkpoints/step-00000020/ema.safetensors"], "not UTF-8"),
    "no vae": (["{home}/flow", "--prompt", "x", "--vae", "{home}/no-vae"], "vae.path={home}/no-vae: no such folder"),
    "no text": (["{home}/flow", "--prompt", "x", "--text", "{home}/vae"], "text.path={home}/vae"),
    "device": (["{home}/flow", "--prompt", "x", "--device", "abacus"], "--device abacus: cannot be used"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    args, message = MISTAKES[name]
    check_mistake([arg.format(home=home) for arg in args], message.format(home=home), tmp_path, capsys)


@pytest.mark.parametrize("text", ["", "\n\n# nothing\n"])
def test_an_empty_prompts_file(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(text)
    check_mistake([str(home / "flow"), "--prompts", str(path)], "no prompts in this file", tmp_path, capsys)


def test_weights_of_another_size(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = broken_run(home, tmp_path / "run", config="hidden_size = 64")
    check_mistake([str(run), "--prompt", "x"], "does not fit the model", tmp_path, capsys)


def test_damaged_weights(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = broken_run(home, tmp_path / "run", weights=b"half a file")
    check_mistake([str(run), "--prompt", "x"], "ema.safetensors: is neither a torch nor", tmp_path, capsys)


def test_an_unknown_key_in_the_config(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = broken_run(home, tmp_path / "run", config="hiden_size = 32")
    check_mistake([str(run), "--prompt", "x"], "hidden_size", tmp_path, capsys)


def test_out_is_a_file(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("mine")
    assert main([str(home / "flow"), "--prompt", "x", "--out", str(tmp_path / "out")]) == 2
    assert "this is a file, expected a folder" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


def test_as_a_command(home: Path, tmp_path: Path, repo_dir: Path) -> None:
    """A mistake that needs no torch to be seen answers at once, without a traceback."""
    command = [sys.executable, "-m", "stages.sample", str(tmp_path / "none"), "--prompt", "x", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=repo_dir, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'none'}: no such run, checkpoint or weights file\n"
    assert done.stdout == ""
