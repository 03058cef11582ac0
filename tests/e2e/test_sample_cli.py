"""`python -m stages.sample` on tiny runs, with frozen models just as random: files and mistakes."""

from __future__ import annotations

import errno
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
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from opensora_repro.config.prompts import read_prompts
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


def test_a_negative_prompt(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A prompt that leads away from itself is the one without guidance; the folder knows what led away."""
    one = PROMPTS[:1]
    (itself,) = sample(home / "flow", tmp_path / "itself", "--negative", f" {one[0]}\n", prompts=one)
    (alone,) = sample(home / "flow", tmp_path / "alone", "--guidance", "1", prompts=one)
    (null,) = sample(home / "flow", tmp_path / "null", "--negative", "", prompts=one)
    assert np.abs(itself - alone).mean() < 0.5 < np.abs(null - alone).mean()
    assert json.loads((tmp_path / "itself" / "samples.json").read_text())["negative"] == one[0]
    assert "negative" not in json.loads((tmp_path / "null" / "samples.json").read_text())
    for folder, more, told in (
        ("itself", [], f"negative = {one[0]!r} there, none here"),
        ("null", ["--negative", "grey"], "negative is not told there, 'grey' here"),
    ):
        args = [str(home / "flow"), "--prompt", one[0], "--out", str(tmp_path / folder), "--seed", "3"]
        assert main([*args, "--device", "cpu", *more]) == 2
        assert told in capsys.readouterr().err


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
    """The flow run's weights and config with something wrong, and no word of what they were."""
    shutil.copytree(home / "flow" / "checkpoints" / "step-00000020", folder)
    (folder / "state.json").unlink()
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
    "other weights": (
        ["{home}/vae", "--prompt", "x"],
        "describes AutoencoderKL, neither PixArt nor DiT: vae.path takes it",
    ),
    "no checkpoint's folder": (["{home}", "--prompt", "x"], "no weights in this folder"),
    "label": (["{home}/flow", "--label", "1"], "step-00000020 is conditioned on text, give --prompt"),
    "size": (
        ["{home}/flow", "--prompt", "x", "--height", "30", "--width", "46"],
        "height 30 and width 46 must be",
    ),
    "no frames": (["{home}/flow", "--prompt", "x", "--num-frames", "0"], "--num-frames 0: expected at least 1"),
    "sampler": (
        ["{home}/flow", "--prompt", "x", "--sampler", "dpm"],
        "this flow model needs euler, ab2 or heun",
    ),
    "euler": (["{home}/iddpm", "--prompt", "x", "--sampler", "euler"], "this iddpm model needs iddpm, ddim or dpm"),
    "guidance": (["{home}/flow", "--prompt", "x", "--guidance", "nan"], "--guidance nan: expected a finite number"),
    "steps": (["{home}/iddpm", "--prompt", "x", "--sampler", "ddim", "--steps", "1001"], "trained with 1000"),
    "empty prompt": (["{home}/flow", "--prompt", " "], "prompt 1 is empty"),
    "a prompt without ink": (["{home}/flow", "--prompt", "\u3164\u2800\ufe0f"], "prompt 1 is empty"),
    "a video of years": (["{home}/flow", "--prompt", "x", "--seconds", "1e9"], "--seconds 1e+09: expected more than 0"),
    "a loop of years": (
        ["{home}/flow", "--prompt", "x", "--loop", "--num-frames", "99999999999"],
        "--num-frames 99999999999: expected at most 10,000,000",
    ),
    "no prompts file": (["{home}/flow", "--prompts", "{home}/none.txt"], "none.txt: cannot be read"),
    "not text": (["{home}/flow", "--prompts", "{home}/flow/checkpoints/step-00000020/ema.safetensors"], "not UTF-8"),
    "no vae": (["{home}/flow", "--prompt", "x", "--vae", "{home}/no-vae"], "vae.path={home}/no-vae: no such folder"),
    "too large": (
        ["{home}/flow", "--prompt", "x", "--num-frames", "4000000", "--height", "4096"],
        "1 samples at once of 4000000 frames of 4096x48 need about",
    ),
    "no text": (["{home}/flow", "--prompt", "x", "--text", "{home}/vae"], "text.path={home}/vae"),
    "negative": (
        ["{home}/flow", "--prompt", "x", "--negative", "grey", "--guidance", "1"],
        "--negative: a guidance of 1",
    ),
    "device": (["{home}/flow", "--prompt", "x", "--device", "abacus"], "--device abacus: cannot be used"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_before_weights_are_read(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """... and a dry run says the same."""
    monkeypatch.setattr("opensora_repro.sampling.run.load_models", None)
    args, message = MISTAKES[name]
    arguments = [arg.format(home=home) for arg in args]
    check_mistake(arguments, message.format(home=home), tmp_path, capsys)
    check_mistake([*arguments, "--dry-run"], message.format(home=home), tmp_path, capsys)


def test_lines_of_which_nothing_can_be_seen_are_no_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(
        "\ufeffa cat\r\n\u200b\r\n\ufeff# joined with another file\n\u3164\n \ufeffa dog\n", encoding="utf-8"
    )
    assert read_prompts(path) == ["a cat", "a dog"]


@pytest.mark.parametrize("text", ["", "\n\n# nothing\n", "\u200b\n"])
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


@pytest.mark.parametrize("name", ["ema.safetensors", "config.toml"])
def test_a_checkpoint_that_is_not_what_was_written(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(home / "flow" / "checkpoints" / "step-00000020", run / "checkpoints" / "step-00000020")
    path = run / "checkpoints" / "step-00000020" / name
    content = bytearray(path.read_bytes())
    content[-5] ^= 1  # a digit of a weight, of a number
    path.write_bytes(content)
    for more in ([], ["--dry-run"]):
        args = [str(run), "--prompt", "x", *more]
        check_mistake(args, f"{name}: damaged or changed since it was written", tmp_path, capsys)
    if name == "ema.safetensors":  # what is not read does not matter
        sample(run, tmp_path / "out", "--no-ema", prompts=PROMPTS[:1])


def test_weights_that_are_not_finite(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = broken_run(home, tmp_path / "run")
    weights = load_file(run / "ema.safetensors")
    weights["blocks.1.attn.qkv.weight"][3, 4] = float("nan")
    save_file(weights, run / "ema.safetensors")
    assert main([str(run), "--prompt", "x", "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert "blocks.1.attn.qkv.weight holds values that are not finite" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*.mp4"))


def test_latents_that_are_not_finite_make_no_video(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finite weights whose products overflow."""
    run = broken_run(home, tmp_path / "run")
    weights = load_file(run / "ema.safetensors")
    weights["final_layer.linear.weight"].fill_(3e38)
    save_file(weights, run / "ema.safetensors")
    assert main([str(run), "--prompt", "x", "--out", str(tmp_path / "out"), "--device", "cpu"]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: sample 0: the model's latents are not finite after 3 steps; try less guidance, ")
    assert "fp32" not in line  # which it is
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["samples.json"]


def test_an_autoencoder_that_overflows_makes_no_video(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(home / "vae", tmp_path / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["decoder.conv_out.bias"].fill_(float("nan"))
    save_file(weights, path, {"format": "pt"})
    args = ["--prompt", "x", "--out", str(tmp_path / "out"), "--device", "cpu", "--vae", str(tmp_path / "vae")]
    assert main([str(home / "flow"), *args]) == 1
    assert "the autoencoder made pixels that are not finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "cannot write a file: No space left on device; what is finished is in ",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to\nmore"), "out of memory. Tried to Lower --batch-size, "),
    ],
)
def test_a_failure_of_the_machine_keeps_what_is_finished(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    error: Exception, line: str,
) -> None:  # fmt: skip
    from opensora_repro.data import write

    def full(path: Path, *frames: object) -> None:
        if path.name == "0001.mp4":
            raise error
        write_video(path, *frames)  # type: ignore[arg-type]

    write_video = write.write_video
    monkeypatch.setattr(write, "write_video", full)
    args = ["--prompt", "x", "--prompt", "y", "--out", str(tmp_path / "out"), "--device", "cpu", "--batch-size", "1"]
    assert main([str(home / "flow"), *args]) == 1
    assert line in capsys.readouterr().err.strip().splitlines()[-1]
    assert len(decode(tmp_path / "out" / "0000.mp4")) == 6


# ---------------------------------------------------------------------------------------------------------------------
# Going on


def test_the_same_command_goes_on_and_another_refuses(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = sample(home / "flow", tmp_path)
    record = (tmp_path / "samples.json").read_bytes()
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.mp4")}
    (tmp_path / "0001.mp4").unlink()
    again = sample(home / "flow" / "checkpoints", tmp_path, "--batch-size", "1")
    assert "1 written to" in capsys.readouterr().out
    assert all(np.abs(a - b).mean() < 0.5 for a, b in zip(videos, again, strict=True))
    assert [path.name for path, at in written.items() if path.stat().st_mtime_ns != at] == ["0001.mp4"]
    assert (tmp_path / "samples.json").read_bytes() == record

    with monkeypatch.context() as nothing_loads:
        nothing_loads.setattr("opensora_repro.sampling.run.load_models", None)
        sample(home / "flow", tmp_path)
        assert f"all 3 were in {tmp_path} already" in capsys.readouterr().out
        sample(home / "flow", tmp_path, "--dry-run")
        assert "to do  0" in capsys.readouterr().out
        others = {"--seed": "7", "--steps": "2", "--guidance": "3", "--num-frames": "5", "--fps": "9", "--width": "16"}
        arguments = [str(home / "flow"), "--prompt", PROMPTS[0], "--out", str(tmp_path), "--device", "cpu"]
        for more in ([], ["--dry-run"]):
            for option, value in others.items():
                assert main([*arguments, "--seed", "3", option, value, *more]) == 2
                line = capsys.readouterr().err.strip()
                name = option.removeprefix("--").replace("-", "_")
                assert f"holds samples of other settings: {name} = " in line and "\n" not in line
        assert main([*arguments, "--seed", "3", "--no-ema"]) == 2
    assert (tmp_path / "samples.json").read_bytes() == record

    (other,) = sample(home / "flow", tmp_path, "--overwrite", "--steps", "2", prompts=PROMPTS[1:2])
    assert np.abs(other - videos[0]).max() > 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000.mp4", "samples.json"]


# ---------------------------------------------------------------------------------------------------------------------
# Words


def test_words_that_are_not_read_are_told(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "a red circle moving left and a blue square moving up and a zebra"
    for more in (["--dry-run"], []):
        out = tmp_path / f"out{len(more)}"
        args = ["--prompt", "a red circle", "--prompt", long, "--out", str(out), "--device", "cpu", *more]
        assert main([str(home / "flow"), *args]) == 0
        cut, unknown = (line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: "))
        assert "prompt 1 is longer than the model's 12 tokens, it does not read '" in cut and cut.endswith("zebra'")
        assert "of the prompts' words are unknown to this tokenizer" in unknown
    sample(home / "flow", tmp_path / "short", prompts=["a red circle"])
    assert "warning" not in capsys.readouterr().err


def test_an_unknown_key_in_the_config(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = broken_run(home, tmp_path / "run", config="hiden_size = 32")
    check_mistake([str(run), "--prompt", "x"], "hidden_size", tmp_path, capsys)


@pytest.mark.parametrize("name", ["out", "out/below", "n" * 300, "/proc/below"])
def test_a_folder_that_cannot_be(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (tmp_path / "out").write_text("mine")
    for flags in ([], ["--dry-run"], ["--overwrite"], ["--overwrite", "--dry-run"]):
        assert main([str(home / "flow"), "--prompt", "x", "--out", str(tmp_path / name), *flags]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: --out = ") and "cannot be used (" in line
    assert (tmp_path / "out").read_text() == "mine"


def test_as_a_command(home: Path, tmp_path: Path, repo_dir: Path) -> None:
    """A mistake that needs no torch to be seen answers at once, without a traceback."""
    command = [sys.executable, "-m", "stages.sample", str(tmp_path / "none"), "--prompt", "x", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=repo_dir, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'none'}: no such run, checkpoint or weights file\n"
    assert done.stdout == ""
