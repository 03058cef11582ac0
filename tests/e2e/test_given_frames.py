"""`python -m stages.sample` with given frames: kept, pasted, extended, joined, edited, chained, closed to a loop."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from opensora_repro.data.dataset import crop, to_tensor
from opensora_repro.data.video import read_frames_at
from opensora_repro.data.write import write_video
from opensora_repro.frozen.vae import open_vae
from opensora_repro.sampling import chain as chains
from opensora_repro.sampling import run as runs
from opensora_repro.sampling.generate import decode as decode_latent
from opensora_repro.sampling.source import find_source
from stages.sample import main
from tests.sample_home import PROMPTS, check_mistake, decode
from tests.training_world import Command

SIZE = (32, 48)
PROMPT = PROMPTS[:1]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`a.png`, `b.png` and `clip.mp4`, of another size than the samples.

    The clip has 30 frames, of which training with `data.frame_interval` 3 takes 10.
    """
    folder = tmp_path_factory.mktemp("files")
    grid = np.mgrid[0:40, 0:72]
    for name, shift in (("a", 0), ("b", 90)):
        picture = np.stack([grid[0] * 4 + shift, grid[1] * 2, 255 - grid[1] * 3], axis=-1) % 256
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"{name}.png")
    frames = np.stack([np.roll(picture, 3 * i, axis=1) for i in range(30)]).astype(np.uint8)
    write_video(folder / "clip.mp4", frames, 8)
    return folder


def as_read(path: Path, frames: list[int]) -> torch.Tensor:
    """uint8 [T, H, W, 3] as training reads it."""
    return crop(read_frames_at(path, [3 * frame for frame in frames], size=SIZE), SIZE)[0]


def reconstruction(home: Path, pixels: torch.Tensor) -> np.ndarray:
    """Of uint8 [T, H, W, 3] by the autoencoder, frame by frame."""
    vae = open_vae(find_source(home / "flow").config.vae, "cpu", torch.float32)
    latents = vae.sample_latents(vae.encode_moments(to_tensor(pixels)), None)
    return decode_latent(vae, latents, num_frames=len(pixels))


def sampled(
    source: Path, out: Path, *args: str, monkeypatch: pytest.MonkeyPatch, prompts: list[str] = PROMPT
) -> list[np.ndarray]:
    """What is handed to the writer of files: videos before they are coded; of long ones, the parts together."""
    written: dict[str, list[np.ndarray]] = {}

    def write(path: Path, video: np.ndarray, fps: float) -> None:
        key = path.parent.name if path.parent.suffix == ".parts" else path.name
        written.setdefault(key, []).append(np.array(video))
        write_video(path, video, fps)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_sample", write)
        patch.setattr(chains, "write_video", write)
        texts = [word for prompt in prompts for word in ("--prompt", prompt)]
        assert main([str(source), *texts, "--out", str(out), "--seed", "3", "--device", "cpu", *args]) == 0
    return [np.concatenate(written[key]) for key in sorted(written)]


@pytest.mark.parametrize("run", ["flow", "iddpm"])
def test_kept_frames_come_out_as_reconstructed_and_pasted_ones_as_given(
    home: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str
) -> None:
    keeps = ["--keep", f"0={files}/a.png", "--keep", f"-2:={files}/clip.mp4[3:5]"]
    given = torch.cat([as_read(files / "a.png", [0]), as_read(files / "clip.mp4", [3, 4])])
    places = [0, 4, 5]
    [plain] = sampled(home / run, tmp_path / "plain", monkeypatch=monkeypatch)
    [kept] = sampled(home / run, tmp_path / "kept", *keeps, monkeypatch=monkeypatch)
    assert np.array_equal(kept[places], reconstruction(home, given))
    assert not np.array_equal(kept[1:4], plain[1:4])
    [pasted] = sampled(home / run, tmp_path / "pasted", *keeps, "--paste", monkeypatch=monkeypatch)
    assert np.array_equal(pasted[places], given.numpy())
    assert np.array_equal(pasted[1:4], kept[1:4])


def test_shorthands_are_the_general_form(
    home: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, a, b = (str(files / name) for name in ("clip.mp4", "a.png", "b.png"))
    pairs: list[tuple[list[str], list[str]]] = [
        (["--first", a, "--last", b], ["--keep", f"0={a}", "--keep", f"-1={b}"]),
        (["--extend", clip, "--condition-frames", "2"], ["--keep", f":2={clip}[-2:]"]),
        (["--extend", clip, "--before", "--condition-frames", "2"], ["--keep", f"-2:={clip}[:2]"]),
        (["--join", clip, a], ["--keep", f"0={clip}[-1:]", "--keep", f"-1={a}"]),
        (["--edit", clip, "--strength", "0.6"], ["--keep", f":={clip}[0:6]@0.6"]),
    ]
    for number, (short, general) in enumerate(pairs):
        [one] = sampled(home / "flow", tmp_path / f"{number}", *short, monkeypatch=monkeypatch)
        [other] = sampled(home / "flow", tmp_path / f"{number}general", *general, monkeypatch=monkeypatch)
        assert np.array_equal(one, other), short
        records = [
            json.loads((tmp_path / name / "samples.json").read_text()) for name in (f"{number}", f"{number}general")
        ]
        assert records[0]["given"] == records[1]["given"]


def test_an_extension_begins_where_the_clip_ends(
    home: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["--extend", str(files / "clip.mp4"), "--seconds", "2.5", "--condition-frames", "2", "--paste"]
    [video] = sampled(home / "flow", tmp_path / "out", *args, monkeypatch=monkeypatch)
    assert len(video) == 20
    assert np.array_equal(video[:2], as_read(files / "clip.mp4", [8, 9]).numpy())


def test_strength_leads_from_the_clip_to_something_new(
    home: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = reconstruction(home, as_read(files / "clip.mp4", list(range(6)))).astype(int)
    distances = []
    for strength in ("0", "0.7", "0.99"):
        args = ["--edit", str(files / "clip.mp4"), "--strength", strength, "--steps", "10"]
        [video] = sampled(home / "flow", tmp_path / strength, *args, monkeypatch=monkeypatch)
        distances.append(np.abs(video.astype(int) - clip).mean())
    assert distances[0] == 0 < distances[1] < distances[2]


def test_inpainting_leaves_the_rest_of_a_clip(
    home: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clip is 40x72, the sample its middle: 40x60 of it, at 32x48."""
    clip = as_read(files / "clip.mp4", list(range(6))).numpy()
    white = np.zeros((40, 72), np.uint8)
    white[10:30, 6:26] = 255
    Image.fromarray(white).save(tmp_path / "mask.png")
    args = ["--inpaint", str(files / "clip.mp4"), "--paste", "--region"]
    [by_box] = sampled(home / "flow", tmp_path / "box", *args, "6,10,20,20", monkeypatch=monkeypatch)
    [by_mask] = sampled(home / "flow", tmp_path / "mask", *args, str(tmp_path / "mask.png"), monkeypatch=monkeypatch)
    inside = np.zeros((32, 48), bool)
    inside[8:24, 0:16] = True
    for video in (by_box, by_mask):
        assert np.array_equal(video[:, ~inside], clip[:, ~inside])
        assert (video[:, inside] != clip[:, inside]).mean() > 0.9
    assert np.array_equal(by_box, by_mask)


def test_a_published_strategy_counts_latents(
    home: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    references = ["--reference", f"{files}/a.png;{files}/clip.mp4"]
    args = ["--mask-strategy", "0;0,1,-2,-2,2,0", *references]
    [video] = sampled(home / "flow", tmp_path / "out", *args, monkeypatch=monkeypatch)
    given = torch.cat([as_read(files / "a.png", [0]), as_read(files / "clip.mp4", [8, 9])])
    assert np.array_equal(video[[0, 4, 5]], reconstruction(home, given))
    record = json.loads((tmp_path / "out" / "samples.json").read_text())["given"]["strategy"]
    assert record["text"] == "0;0,1,-2,-2,2,0" and len(record["sha256"]) == 2


def test_a_prompts_own_json_is_the_options(home: Path, files: Path, tmp_path: Path, capsys: Any) -> None:
    place = {"reference_path": f"{files}/clip.mp4", "mask_strategy": "0,0,-1,0,1,0"}
    text, common = PROMPT[0], [str(home / "flow"), "--seed", "3", "--device", "cpu", "--out"]
    own = [*common, str(tmp_path / "own"), "--prompt", f"{text} {json.dumps(place)}"]
    assert main(own) == 0
    options = ["--reference", place["reference_path"], "--mask-strategy", place["mask_strategy"]]
    assert main([*common, str(tmp_path / "options"), "--prompt", text, *options]) == 0
    assert (tmp_path / "own" / "0000.mp4").read_bytes() == (tmp_path / "options" / "0000.mp4").read_bytes()
    records = [json.loads((tmp_path / name / "samples.json").read_text()) for name in ("own", "options")]
    assert records[0] == records[1]
    capsys.readouterr()
    for more, told in (
        (options[:2], "--reference: the prompt's own JSON says it, too"),
        (["--prompt", '{"mask_strategy": "0"}'], "other references or strategies than each other"),
    ):
        assert main([*own, *more]) == 2
        assert told in capsys.readouterr().err
    for broken, told in (
        ('x {"mask_strategy": "0"}', "--mask-strategy and --reference: give both"),
        ('x {"mask_strategy": 0 0}', "cannot read"),
        (json.dumps(place), "--prompt without its JSON: prompt 1 is empty"),
    ):
        assert main([*common, str(tmp_path / "none"), "--prompt", broken]) == 2
        assert told in capsys.readouterr().err


def test_a_killed_process_leaves_a_long_video_that_goes_on(home: Path, tmp_path: Path) -> None:
    def arguments(out: Path) -> list[str]:
        long = ["--seconds", "3.5", "--num-frames", "6", "--condition-frames", "2", "--steps", "2"]
        return [str(home / "flow"), "--prompt", PROMPT[0], "--out", str(out), "--seed", "3", "--device", "cpu", *long]

    assert main(arguments(tmp_path / "whole")) == 0
    cut = tmp_path / "cut"
    command = Command("stages.sample", arguments(cut), tmp_path / "log")
    while not (cut / "0000.parts" / "0001.mp4").exists():
        assert command.process.exitcode is None, command.err
        time.sleep(0.002)
    os.kill(command.pid, signal.SIGKILL)
    assert command.wait() == -signal.SIGKILL
    assert not (cut / "0000.mp4").exists()
    assert main(arguments(cut)) == 0
    assert (cut / "0000.mp4").read_bytes() == (tmp_path / "whole" / "0000.mp4").read_bytes()
    assert sorted(path.name for path in cut.iterdir()) == ["0000.mp4", "samples.json"]


@pytest.mark.exhaustive
def test_a_minute_takes_the_memory_of_two_clips(home: Path, tmp_path: Path) -> None:
    """A clip's new frames are 1.3 MB, of which 28 more clips would leave 37 in memory."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # what other tests left in this one's memory may go
        code, resident = pool.submit(memory_of_a_minute, str(home / "flow"), str(tmp_path)).result()
    assert code == 0
    assert len(resident) == 30
    assert np.median(resident[-8:]) < np.median(resident[1:9]) + 10e6


def memory_of_a_minute(run: str, out: str) -> tuple[int, list[int]]:
    """Exit code of sampling a minute's video, and this process's resident bytes after each of its clips."""
    resident: list[int] = []

    def save(self: chains.Progress) -> None:
        write(self)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident.append(pages * resource.getpagesize())

    write, chains.Progress.save = chains.Progress.save, save  # type: ignore[method-assign]
    size = ["--height", "256", "--width", "256", "--num-frames", "10", "--condition-frames", "2", "--vae-tile", "64"]
    arguments = ["--seconds", "60", "--fps", "4", "--steps", "1", *size, "--guidance", "1"]
    return main([run, "--prompt", "x", "--out", out, "--device", "cpu", *arguments]), resident


def test_a_long_video_goes_on_where_it_was_killed(
    home: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "script.txt"
    script.write_text("0: a red circle\n1.5: a blue square\n")
    args = ["--prompts", str(script), "--seconds", "2.5", "--num-frames", "6", "--condition-frames", "2"]
    [whole] = sampled(home / "flow", tmp_path / "whole", *args, monkeypatch=monkeypatch, prompts=[])
    assert len(whole) == 20 == len(decode(tmp_path / "whole" / "0000.mp4"))
    [other] = sampled(home / "flow", tmp_path / "other", *args[2:], monkeypatch=monkeypatch, prompts=["a red circle"])
    assert np.array_equal(whole[:10], other[:10]) and not np.array_equal(whole[14:], other[14:])

    class Killed(BaseException):
        pass

    def seen(self: Any, new: np.ndarray) -> None:
        if self.done == 2:
            raise Killed
        remember(self, new)

    remember = chains.Progress.seen
    command = [str(home / "flow"), *args, "--out", str(tmp_path / "cut"), "--seed", "3", "--device", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(chains.Progress, "seen", seen)
        with pytest.raises(Killed):
            main(command)
    assert sorted(path.name for path in (tmp_path / "cut" / "0000.parts").glob("*.mp4"))[:2] == ["0000.mp4", "0001.mp4"]
    assert not (tmp_path / "cut" / "0000.mp4").exists()
    [rest] = sampled(home / "flow", tmp_path / "cut", *args, monkeypatch=monkeypatch, prompts=[])
    assert len(rest) < 20 and np.array_equal(rest, whole[-len(rest) :])
    assert (tmp_path / "cut" / "0000.mp4").read_bytes() == (tmp_path / "whole" / "0000.mp4").read_bytes()
    assert not (tmp_path / "cut" / "0000.parts").exists()


def test_a_loop_is_given_its_first_frames_as_those_after_the_last(
    home: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[tuple[Any, Any]] = []
    plain = chains.Progress.given

    def given(self: Any, part: Any) -> Any:
        found = plain(self, part)
        ends.append((part, found))
        return found

    monkeypatch.setattr(chains.Progress, "given", given)
    args = ["--loop", "--condition-frames", "2", "--first", str(files / "a.png"), "--paste"]
    [video] = sampled(home / "flow", tmp_path / "out", *args, monkeypatch=monkeypatch)
    assert len(video) == 8
    part, (before, after) = ends[-1]
    assert part.closes and after[0] == range(8, 10) and np.array_equal(after[1], video[:2])
    assert before[0] == range(4, 6) and np.array_equal(before[1], video[4:6])
    assert np.array_equal(video[0], as_read(files / "a.png", [0])[0].numpy())


def test_settings_know_files_by_content(
    home: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "moved.png"
    moved.write_bytes((files / "a.png").read_bytes())
    out = tmp_path / "out"
    assert sampled(home / "flow", out, "--first", str(files / "a.png"), monkeypatch=monkeypatch)
    assert sampled(home / "flow", out, "--first", str(moved), monkeypatch=monkeypatch) == []
    for args, told in (
        (["--first", str(files / "b.png")], "given.0:1.sha256"),
        ([], "given = {'0:1'"),
        (["--first", str(moved), "--paste"], "given.paste is not told there"),
        (["--first", str(moved), "--last", str(moved)], "given.5:6 is not told there"),
    ):
        assert main([str(home / "flow"), "--prompt", PROMPT[0], "--seed", "3", "--out", str(out), *args]) == 2
        assert told in capsys.readouterr().err


def test_what_is_given_is_told(home: Path, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [str(home / "flow"), "--prompt", "x", "--out", str(tmp_path / "out"), "--device", "cpu", "--dry-run"]
    assert main([*args, "--keep", f"-2:={files}/clip.mp4[0:2]", "--seconds", "2", "--condition-frames", "2"]) == 0
    told = capsys.readouterr()
    assert "16 frames in 4 clips of 6, each given the last 2 of the one before" in told.out
    assert "frames 14 to 15 from clip.mp4: latents 4 to 5 of 6 kept" in told.out
    assert "warning: this model was not trained with frame masks" in told.err


MISTAKES: list[tuple[list[str], str]] = [
    (["--keep", "first.png"], "--keep first.png: expected PLACE=FILE[SPAN]@STRENGTH"),
    (["--keep", "0=none.png"], "--keep 0=none.png: none.png cannot be read (no such file)"),
    (["--keep", "0={files}/a.png@1"], "expected a strength from 0 (kept as it is) to below 1"),
    (["--keep", "9={files}/a.png"], "of the sample: there are 6 frames, of which 9 is no part"),
    (["--keep", "0={files}/clip.mp4[4:40]"], "there are 10 frames, of which 4:40 is no part"),
    (["--keep", "0:3={files}/clip.mp4[:2]"], "2 frames of {files}/clip.mp4 do not fill 3 of the sample"),
    (["--keep", "0={files}/a.png", "--first", "{files}/a.png"], "frame 0 is given twice"),
    (["--inpaint", "{files}/a.png"], "--inpaint and --region: give both"),
    (["--inpaint", "{files}/clip.mp4", "--region", "60,0,20,20"], "--region 60,0,20,20: {files}/clip.mp4 has 72x40 p"),
    (["--inpaint", "{files}/clip.mp4", "--region", "0,0,4,20"], "--region 0,0,4,20: nothing of it is in the sample"),
    (["--inpaint", "{files}/clip.mp4", "--region", "no.png"], "--region: no.png cannot be read"),
    (["--before"], "--before: give --extend, too"),
    (["--edit", "{files}/clip.mp4"], "--edit and --strength: give both"),
    (["--edit", "{files}/clip.mp4", "--strength", "2"], "--strength 2: expected a strength"),
    (["--paste"], "--paste: no frames are given"),
    (["--mask-strategy", "0"], "--mask-strategy and --reference: give both"),
    (["--mask-strategy", "0,1", "--reference", "{files}/a.png"], "there is no reference 1 (1 reference, from 0)"),
    (["--mask-strategy", "1", "--reference", "{files}/a.png"], "of clips there are 1, and no number 1"),
    (["--mask-strategy", "x", "--reference", "{files}/a.png"], "mask strategy 'x': 'x': expected loop,ref"),
    (["--loop", "--seconds", "0.5"], "--loop: 4 frames are too few, 5 is the least"),
    (["--loop", "--condition-frames", "3"], "3 + 3 given frames leave nothing to generate of a clip of 6"),
    (["--seconds", "2", "--condition-frames", "6"], "6 given frames leave nothing to generate of a clip of 6"),
    (["--seconds", "9", "--gif"], "--gif: a video of chained clips is written as it goes"),
    (["--prompt", "|0|a|2|b"], "--prompt: |0|TEXT|2|TEXT counts chained clips: give --seconds, longer than a clip"),
    (["--condition-frames", "0"], "--condition-frames 0: expected at least 1"),
    (["--motion", "fast"], "--motion fast: expected a number from 0 on"),
    (["--prompt", 'y{"reference_path": "{files}/a.png"}'], "with other references or strategies than each other"),
]


@pytest.mark.parametrize(("args", "message"), MISTAKES, ids=[" ".join(args) for args, _ in MISTAKES])
def test_mistakes(
    home: Path, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    args = [arg.replace("{files}", str(files)) for arg in args]
    words = [str(home / "flow"), "--prompt", "x", "--dry-run", *args]
    check_mistake(words, message.replace("{files}", str(files)), tmp_path, capsys)
