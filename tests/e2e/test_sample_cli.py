"""`python -m stages.sample` on tiny runs and published files, with frozen models just as random: files and mistakes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from opensora_repro.config import Config, DataConfig, DiffusionConfig, SampleConfig, TrainConfig, dump_toml
from opensora_repro.models.config import STDiTConfig
from opensora_repro.models.weight_files import NULL_CAPTION_FILE
from stages.sample import main
from tests.checkpoints import write_checkpoint
from tests.published_files import PUBLISHED, publish

PROMPTS = ["a red circle moving left", "a blue square moving up", "../../etc/passwd; rm -rf ~"]


def save_run(run: Path, cfg: Config, *, steps: tuple[int, ...]) -> None:
    """A run's folder with a checkpoint of other random weights at each of `steps`."""
    from opensora_repro.models.stdit import STDiT
    from opensora_repro.training.checkpoint import TrainState

    for step in steps:
        torch.manual_seed(step)
        model = STDiT(cfg.model)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        write_checkpoint(run, model, dump_toml(cfg), TrainState(step=step), shrink_average=0.8)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `vae`, `text` and the runs `flow` (two checkpoints), `iddpm` and `empty`."""
    from diffusers import AutoencoderKL

    from opensora_repro.demo.text_encoder import build_encoder, build_tokenizer

    home = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    ).save_pretrained(home / "vae")
    build_encoder(seed=0).save_pretrained(home / "text")
    build_tokenizer().save_pretrained(home / "text")
    cfg = Config(
        model=STDiTConfig(
            hidden_size=32, depth=2, num_heads=2, caption_channels=64, model_max_length=12, pred_sigma=False
        ),
        data=DataConfig(num_frames=6, height=32, width=48),
        diffusion=DiffusionConfig(objective="flow", shift=2.0),
        sample=SampleConfig(sampler="euler", steps=3, guidance=2.0, fps=8),
        train=TrainConfig(dtype="fp32"),
    )
    cfg = replace(cfg, vae=replace(cfg.vae, path=str(home / "vae")), text=replace(cfg.text, path=str(home / "text")))
    save_run(home / "flow", cfg, steps=(5, 20))
    cfg = replace(cfg, diffusion=DiffusionConfig(), model=replace(cfg.model, pred_sigma=True))
    save_run(home / "iddpm", replace(cfg, sample=replace(cfg.sample, sampler="dpm")), steps=(1,))
    (home / "empty").mkdir()
    return home


def sample(source: Path, out: Path, *args: str, prompts: list[str] = PROMPTS) -> list[np.ndarray]:
    """Run the command; return the written videos."""
    texts = [word for prompt in prompts for word in ("--prompt", prompt)]
    assert main([str(source), *texts, "--out", str(out), "--seed", "3", "--device", "cpu", *args]) == 0
    return [decode(path) for path in sorted(out.glob("*.mp4"))]


def decode(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(int)


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


def test_a_sample_depends_on_its_number_not_on_its_batch(home: Path, tmp_path: Path) -> None:
    together = sample(home / "flow", tmp_path / "a", "--batch-size", "3")
    apart = sample(home / "flow", tmp_path / "b", "--batch-size", "1")
    fewer = sample(home / "flow", tmp_path / "c", prompts=PROMPTS[:2])
    for i, video in enumerate(together):
        assert np.abs(video - apart[i]).max() <= 3, i  # rounding, at most a level before H.264
    for i, video in enumerate(fewer):
        assert np.abs(video - together[i]).max() <= 3, i
    twice = sample(home / "flow", tmp_path / "d", prompts=PROMPTS[:1] * 2)
    assert np.abs(twice[0] - twice[1]).max() > 8  # the same words, another number


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


def check_mistake(args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device = [] if "--device" in args else ["--device", "cpu"]
    assert main([*args, "--out", str(tmp_path / "out"), *device]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "out").exists()


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


# Published weights


@pytest.fixture(scope="module")
def published(home: Path) -> Path:
    """A folder with weights of every published layout, for the text encoder of `home`."""
    for name, cfg in PUBLISHED.items():
        publish(home / "published", name, **({"caption_channels": 64} if isinstance(cfg, STDiTConfig) else {}))
    return home / "published"


def words(home: Path, name: str) -> list[str]:
    """The options that tiny weights need: what the published ones say by their width, and small frozen models."""
    options = ["--vae", str(home / "vae"), "--text", str(home / "text"), "--height", "32", "--width", "32"]
    options += ["--steps", "3", "--dtype", "fp32", "--device", "cpu", "--seed", "3"]
    return options + (["--num-heads", "4"] if "." in name else [])


def sample_published(home: Path, source: Path, out: Path, *args: str, condition: tuple[str, ...]) -> np.ndarray:
    """The one sample's frames [T, H, W, 3]."""
    assert main([str(source), *condition, "--out", str(out), *words(home, source.name), *args]) == 0
    (name,) = {path.name for path in out.iterdir()} - {"samples.json"}
    if name == "0000.mp4":
        return decode(out / name)
    assert name == "0000.png"
    return np.asarray(Image.open(out / name))[None].astype(int)


TEXT, LABEL = ("--prompt", PROMPTS[0]), ("--label", "7")
# name -> its condition, the number of frames of a sample, and the release's sampler, steps and guidance
RELEASES = {
    "pixart.pth": (TEXT, 1, ("dpm", 20, 4.5)),
    "pixart-ms.pth": (TEXT, 1, ("dpm", 20, 4.5)),
    "stdit.pth": (TEXT, 6, ("iddpm", 100, 7.0)),
    "dit.pt": (LABEL, 1, ("iddpm", 250, 4.0)),
    "latte.pt": (LABEL, 6, ("iddpm", 250, 7.0)),
    "diffusers-pixart": (TEXT, 1, ("dpm", 20, 4.5)),
    "diffusers-dit": (LABEL, 1, ("iddpm", 250, 4.0)),
}


@pytest.mark.parametrize("name", RELEASES)
def test_published_weights(home: Path, published: Path, tmp_path: Path, name: str) -> None:
    condition, frames, (sampler, _, guidance) = RELEASES[name]
    first = sample_published(home, published / name, tmp_path / "a", condition=condition)
    assert first.shape == (frames, 32, 32, 3)
    record = json.loads((tmp_path / "a" / "samples.json").read_text())
    expected = {"checkpoint": str(published / name), "seed": 3, "sampler": sampler, "steps": 3, "guidance": guidance}
    assert {key: record[key] for key in expected} == expected
    assert record["samples"] == [{"file": f"0000.{'png' if frames == 1 else 'mp4'}", "prompt": condition[1]}]

    again = sample_published(home, published / name, tmp_path / "b", condition=condition)
    assert np.array_equal(first, again)
    other = ("--label", "2") if condition is LABEL else ("--prompt", PROMPTS[1])
    weights = publish(tmp_path / "other", name, seed=1, **({"caption_channels": 64} if condition is TEXT else {}))
    changes = [
        (published / name, ("--seed", "4"), condition),
        (published / name, (), other),
        (weights, (), condition),
    ]
    for number, (source, args, asked) in enumerate(changes):
        changed = sample_published(home, source, tmp_path / f"c{number}", *args, condition=asked)
        assert np.abs(changed - first).max() > 8, (source, args, asked)


def test_weights_of_our_own_in_another_layout_make_the_same_pixels(home: Path, tmp_path: Path) -> None:
    from stages.weights import main as convert

    out = tmp_path / "flat"
    assert convert(["convert", str(home / "iddpm"), "--to", "safetensors", "--out", str(out)]) == 0
    frames = ["--num-frames", "4", "--sampler", "dpm", "--guidance", "2"]
    before = sample_published(home, home / "iddpm", tmp_path / "a", *frames, condition=TEXT)
    after = sample_published(home, out, tmp_path / "b", *frames, condition=TEXT)
    assert np.array_equal(before, after)


def test_without_a_null_caption_the_empty_text_is_taken(
    home: Path, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from opensora_repro.config import TextConfig
    from opensora_repro.models.text import load_text_encoder

    found = sample_published(home, published / "diffusers-pixart", tmp_path / "a", condition=TEXT)
    assert "no null caption in them: the empty text is encoded instead" in capsys.readouterr().out

    folder = tmp_path / "complete"
    shutil.copytree(published / "diffusers-pixart", folder)
    text = load_text_encoder(TextConfig(path=str(home / "text")), 120, "cpu", torch.float32)
    for caption, same in (("", True), ("a red circle", False)):
        encoded, _ = text.encode([caption])
        save_file({"y_embedder.y_embedding": encoded[0]}, folder / NULL_CAPTION_FILE)
        with_caption = sample_published(home, folder, tmp_path / f"b{same}", condition=TEXT)
        assert "no null caption" not in capsys.readouterr().out
        assert np.array_equal(found, with_caption) == same
    unguided = [
        sample_published(home, source, tmp_path / f"c{i}", "--guidance", "1", condition=TEXT)
        for i, source in enumerate((published / "diffusers-pixart", folder))
    ]
    assert np.array_equal(*unguided)  # which needs no null caption


def test_a_text_conditioned_dit_reads_clip(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.unit.test_conditions import CHANNELS, make_tiny_clip

    clip = make_tiny_clip(tmp_path / "clip")
    path = publish(tmp_path, "dit.pt", condition="text", caption_channels=CHANNELS)
    args = ("--text", str(clip), "--guidance", "100")  # so tiny a model hardly minds its prompt
    images = [
        sample_published(home, path, tmp_path / f"{i}", *args, condition=("--prompt", prompt))
        for i, prompt in enumerate(("red", "red", "a blue square"))
    ]
    assert np.array_equal(images[0], images[1]) and np.abs(images[0] - images[2]).max() > 8
    check_mistake([str(path), "--label", "1", *words(home, path.name)], "conditioned on text", tmp_path, capsys)
    check_mistake([str(path), *TEXT, *words(home, path.name)], "cannot be loaded as a", tmp_path, capsys)


@pytest.mark.parametrize("name", RELEASES)
def test_dry_run_of_published_weights(
    home: Path, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    condition, frames, (sampler, steps, guidance) = RELEASES[name]
    heads = ["--num-heads", "4"] if "." in name else []
    assert main([str(published / name), *condition, "--out", str(tmp_path / "out"), "--dry-run", *heads]) == 0
    shown = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert shown["checkpoint"] == str(published / name) and shown["prompts"] == "1"
    assert (shown["num_frames"], shown["height"], shown["width"]) == (str(frames), "64", "64")
    assert (shown["sampler"], shown["steps"], float(shown["guidance"])) == (sampler, str(steps), guidance)
    assert int(shown["parameters"].replace(",", "")) > 100_000
    assert not (tmp_path / "out").exists()


CONDITIONS = {
    "a label for a text model": ("pixart.pth", ("--label", "7"), "pixart.pth is conditioned on text, give --prompt"),
    "a label for a video model": ("stdit.pth", ("--label", "7"), "stdit.pth is conditioned on text, give --prompt"),
    "words for a class model": ("dit.pt", ("--prompt", "a cat"), "prompt 'a cat': expected a class number, 0 to 9"),
    "words for Latte": ("latte.pt", ("--prompt", "a cat"), "prompt 'a cat': expected a class number, 0 to 9"),
    "one class too many": ("dit.pt", ("--label", "10"), "prompt '10': expected a class number, 0 to 9"),
    "a negative class": ("dit.pt", ("--label=-1",), "prompt '-1': expected a class number, 0 to 9"),
    "no class": ("diffusers-dit", ("--label", ""), "--label: prompt 1 is empty"),
    "no number": ("diffusers-dit", ("--label", "cat"), "prompt 'cat': expected a class number, 0 to 9"),
    "one of several": ("latte.pt", ("--label", "1", "--label", "99"), "prompt '99': expected a class number, 0 to 9"),
    "not square": ("dit.pt", ("--label", "1", "--width", "48"), "must be equal: DiT and Latte make squares alone"),
    "other heads": ("pixart.pth", ("--prompt", "x", "--num-heads", "5"), "cannot be shared among 5 attention heads"),
    "euler": ("dit.pt", ("--label", "1", "--sampler", "euler"), "this iddpm model needs iddpm, ddim or dpm"),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_mistakes_with_published_weights(
    home: Path, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    source, args, message = CONDITIONS[name]
    check_mistake([str(published / source), *words(home, source), *args], message, tmp_path, capsys)


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_published_weights_of_an_unknown_width(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dry_run: list[str]
) -> None:
    args = [str(published / "stdit.pth"), "--prompt", "x", *dry_run]
    check_mistake(args, "its 48 channels have: give them with --num-heads", tmp_path, capsys)


def test_damaged_published_weights(
    home: Path, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (published / "pixart.pth").read_bytes()
    path = tmp_path / "pixart.pth"
    path.write_bytes(content[:-5000])
    check_mistake([str(path), *TEXT, *words(home, path.name)], "pixart.pth: damaged or cut off", tmp_path, capsys)
    weights = torch.load(published / "pixart.pth", weights_only=True)
    del weights["state_dict"]["blocks.1.mlp.fc2.bias"]
    torch.save(weights, path)
    check_mistake([str(path), *TEXT, *words(home, path.name)], "first blocks.1.mlp.fc2.bias", tmp_path, capsys)
