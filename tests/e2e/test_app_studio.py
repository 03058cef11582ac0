"""What stands behind the page, without a browser: settings, uploads, results, samples made one after the other."""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from opensora_repro.app.settings import AT, BEFORE, EDIT, END, EXTEND, START, GivenFile, Settings, places, total_frames
from opensora_repro.app.studio import Job, Studio
from opensora_repro.app.uploads import MAX_BYTES, keep_upload
from opensora_repro.config import ConfigError
from opensora_repro.data.write import write_video
from opensora_repro.errors import UserError
from opensora_repro.sampling.build import build_run
from stages import app
from stages.sample import main
from stages.sample import parse as parse_sample
from tests.sample_home import decode

ONE, OTHER = "0" * 31 + "1", "0" * 31 + "2"  # two browsers


@pytest.fixture
def studio(home: Path, tmp_path: Path) -> Studio:
    runs = {name: home / name for name in ("flow", "iddpm")}
    return Studio(runs, tmp_path / "app", lambda words: build_run(parse_sample(words)), device="cpu", max_seconds=10)


def settings(**changes: object) -> Settings:
    base = Settings(
        run="flow", checkpoint="step-00000020", prompt="a red circle moving left", height=32, width=48, seconds=0.75,
        steps=3, guidance=2.0, seed=3,
    )  # fmt: skip
    return replace(base, **changes)  # type: ignore[arg-type]


def made(studio: Studio, browser: str, *expected: Settings) -> list[Job]:
    jobs = studio.submit(browser, expected)
    for job in jobs:
        assert job.ended.wait(120)
    return jobs


def clip(path: Path, frames: int, fps: float = 8.0, size: tuple[int, int] = (32, 48)) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (1, *size, 3), dtype=np.uint8)
    write_video(path, np.repeat(pixels, frames, axis=0), fps)
    return path


def sent(studio: Studio, path: Path) -> str:
    """A file where gradio puts what a browser sends."""
    place = studio.folder / "cache" / path.name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(path.read_bytes())
    return str(place)


def test_samples_are_those_of_the_command_whatever_is_kept_and_previewed(studio: Studio, home: Path) -> None:
    expected = [settings(), settings(negative="a blue square"), settings(run="iddpm", checkpoint="step-00000001")]
    jobs = made(studio, ONE, *expected[:2])
    kept = studio.models.models
    assert made(studio, ONE, expected[0])[0].state == "done" and studio.models.models is kept
    jobs += made(studio, ONE, expected[2])
    assert studio.models.models is not kept  # one at a time
    assert [job.state for job in jobs] == ["done"] * 3
    assert all(job.preview[:2] == b"\xff\xd8" and job.steps[0] == job.steps[1] for job in jobs)
    for number, (job, negative) in enumerate(zip(jobs, ("", "a blue square", ""), strict=True)):
        result = studio.result(ONE, job.result)
        assert result is not None and result.settings == expected[number]
        words = [*("--negative", negative)] if negative else []
        out = studio.folder.parent / f"command{number}"
        run, sampled = home / expected[number].run, ["--num-frames=6", "--steps=3", "--seed=3", "--device=cpu"]
        assert main([str(run), "--prompt", result.settings.prompt, "--out", str(out), *sampled, *words]) == 0
        assert (out / "0000.mp4").read_bytes() == result.file.read_bytes()
        known = [json.loads((folder / "samples.json").read_text()) for folder in (out, result.folder)]
        assert known[0] == known[1]
        assert "--seed=3" in studio.command(ONE, result)
    assert len({studio.result(ONE, job.result).file.read_bytes() for job in jobs}) == 3  # type: ignore[union-attr]


def test_results_are_their_browsers_alone(studio: Studio) -> None:
    [job] = made(studio, ONE, settings(seconds=0, steps=1))
    assert [one.id for one in studio.results(ONE)] == [job.result] and not list(studio.results(OTHER))
    found = studio.result(ONE, job.result)
    assert found is not None and found.file.name == "0000.png"
    assert studio.result(OTHER, job.result) is None
    with pytest.raises(ConfigError, match="not there any more"):
        studio.given_path(OTHER, job.result)
    for name in ("../" + ONE, "", None, f"../{ONE}/{job.result}"):
        assert studio.result(OTHER, name) is None
    assert studio.browser(ONE) == ONE and studio.browser("../x") != "../x" and len(studio.browser(None)) == 32
    with pytest.raises(ConfigError, match="load it again"):
        studio.submit("..", [settings()])


def test_a_stopped_sample_leaves_nothing_and_the_next_one_is_made(studio: Studio) -> None:
    first, second = studio.submit(ONE, [settings(steps=1000), settings(steps=1000, seed=4)])
    while not first.steps[0]:
        assert not first.ended.wait(0.01)
    assert studio.before(second) == 1
    studio.stop(second)
    assert second.ended.is_set() and second.state == "stopped"  # at once
    studio.stop(first)
    assert first.ended.wait(60) and first.state == "stopped" and 0 < first.steps[0] < 1000
    assert second.steps == (0, 0)
    assert not list(studio.results_folder(ONE).iterdir())
    assert made(studio, ONE, settings(steps=1))[0].state == "done"


def test_what_the_page_does_not_offer_is_refused(studio: Studio) -> None:
    for changes, message in (
        ({"run": "../flow"}, "model: '../flow' is none of flow, iddpm"),
        ({"checkpoint": "../../iddpm"}, "checkpoint: flow has no"),
        ({"height": 4096}, "shape: flow has no 4096x48"),
        ({"seconds": 11.0}, "seconds: at most 10 here"),
    ):
        with pytest.raises(ConfigError, match=message):
            studio.submit(ONE, [settings(**changes)])
    [job] = made(studio, ONE, settings(given=(GivenFile("0" * 32 + ".png", "gone.png", START),)))
    assert (job.state, job.message) == ("failed", "given frames: a file is not there any more; send it again")


def test_uploads_are_looked_at_before_they_are_decoded(studio: Studio, tmp_path: Path) -> None:
    Image.new("RGB", (60, 40), "red").save(tmp_path / "first.bmp.exe", format="PNG")
    upload = studio.upload(ONE, sent(studio, tmp_path / "first.bmp.exe"))
    assert upload.still and upload.name == "first.bmp.exe" and upload.file.endswith(".png")
    assert studio.given_path(ONE, upload.file).is_relative_to(studio.folder / "uploads" / ONE)
    assert not list((studio.folder / "cache").iterdir())
    (tmp_path / "list.mp4").write_text("#EXTM3U\nfile:///etc/passwd")
    (tmp_path / "page.png").write_text("<svg onload=alert(1)>")
    (tmp_path / "cut.mp4").write_bytes(clip(tmp_path / "whole.mp4", 8).read_bytes()[:200])
    Image.new("1", (9000, 5000)).save(tmp_path / "many.png")
    clip(tmp_path / "long.mp4", 310, fps=1.0, size=(16, 16))
    with open(tmp_path / "large.mp4", "wb") as file:
        file.truncate(MAX_BYTES + (1 << 20))
    for name, message in (
        ("list.mp4", "list.mp4: this is a playlist"),
        ("page.png", "page.png: this is a page or other text; expected a picture"),
        ("cut.mp4", "cut.mp4: cannot be read"),
        ("many.png", "many.png: 9000x5000 pixels, at most 40 million are taken"),
        ("long.mp4", "long.mp4: 310 s, 310 frames; at most 300 s are taken"),
        ("large.mp4", "large.mp4: 201 MiB, at most 200 are taken"),
    ):
        with pytest.raises(UserError) as error:
            keep_upload(tmp_path / name, tmp_path / "kept")
        assert str(error.value).startswith(message) and str(tmp_path) not in str(error.value)
    assert not list((tmp_path / "kept").glob("*"))
    for path in ("/etc/passwd", str(tmp_path / "whole.mp4"), f"{studio.folder}/cache/../../whole.mp4"):
        with pytest.raises(UserError, match="not sent to this page"):
            studio.upload(ONE, path)
    assert (tmp_path / "whole.mp4").exists()


def test_given_files_go_where_the_time_line_shows_them(studio: Studio, tmp_path: Path) -> None:
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
    picture = studio.upload(ONE, sent(studio, tmp_path / "a.png")).file
    film = studio.upload(ONE, sent(studio, clip(tmp_path / "b.mp4", 27))).file  # the run takes every third frame
    source = studio.source("flow", "step-00000020")

    def shown(*given: GivenFile, **changes: object) -> list[range]:
        asked = settings(given=given, **changes)
        run, _ = build_run(parse_sample([*studio._words(ONE, asked), f"--out={tmp_path / 'out'}"]))
        taken = [placed.place for placed in run.given.placed] if run.given else []
        found = [span for _, span, _ in places(asked, source, lambda file: studio.given_path(ONE, file))]
        total = run.chain.total if run.chain else run.source.config.data.num_frames
        assert total_frames(asked, source) == total
        assert sorted(found, key=lambda span: span.start) == sorted(taken, key=lambda span: span.start)
        return found

    assert shown(GivenFile(picture, "a", START), GivenFile(picture, "a", END)) == [range(1), range(5, 6)]
    assert shown(GivenFile(picture, "a", AT, at=3, strength=0.5)) == [range(3, 4)]
    assert shown(GivenFile(film, "b", AT, at=2)) == [range(2, 6)]  # what fits
    assert shown(GivenFile(film, "b", END, part="-2:")) == [range(4, 6)]
    assert shown(GivenFile(film, "b", EXTEND)) == [range(1)]
    assert shown(GivenFile(film, "b", EXTEND), GivenFile(film, "b", BEFORE)) == [range(1), range(5, 6)]
    assert shown(GivenFile(film, "b", EDIT, strength=0.4)) == [range(6)]
    assert shown(GivenFile(film, "b", START, part="0:6"), loop=True) == [range(6)]
    assert shown(GivenFile(film, "b", EXTEND), seconds=2.0) == [range(1)]
    with pytest.raises(ConfigError, match="b: part 'x': expected START:STOP"):
        shown(GivenFile(film, "b", START, part="x"))
    with pytest.raises(ConfigError, match="a: a picture has no end to go on from"):
        shown(GivenFile(picture, "a", EXTEND))
    [job] = made(studio, ONE, settings(given=(GivenFile(picture, "a.png", START),), paste=True))
    result = studio.result(ONE, job.result)
    assert result is not None and "latents 0 to 0 of 6 kept" in result.told[0]
    assert abs(decode(result.file)[0].mean(axis=(0, 1)) - [254, 0, 0]).max() < 12
    looped = settings(given=(GivenFile(job.result, "an earlier result", START),), loop=True, steps=1)
    [job] = made(studio, ONE, looped)
    assert job.state == "done", job.message
    with av.open(str(studio.result(ONE, job.result).file)) as container:  # type: ignore[union-attr]
        assert container.streams.video[0].frames == total_frames(looped, source) == 10


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().removeprefix("error: ")


def test_mistakes_are_one_line(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gradio")
    monkeypatch.delenv(app.AUTH, raising=False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = str(probe.getsockname()[1])
    assert app.main([str(tmp_path / "nowhere"), "--port", free]) == 2
    assert error_of(capsys).startswith(f"{tmp_path}/nowhere: no such run, checkpoint or weights file")
    assert app.main([str(home / "empty"), "--port", free, "--out", str(tmp_path / "app")]) == 2
    assert error_of(capsys).startswith(f"{home}/empty: no checkpoint in this run yet")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert app.main([str(home / "flow"), "--port", str(port)]) == 2
    assert error_of(capsys).startswith(f"--port {port}: cannot be used at 127.0.0.1 (Address already in use)")
    assert app.main([str(home / "flow"), "--port", "700000"]) == 2
    assert error_of(capsys) == "--port 700000: expected a number from 1 to 65535"
    assert app.main([str(home / "flow"), "--host", "0.0.0.0"]) == 2
    assert error_of(capsys).startswith(f"{app.AUTH}: serving others needs a password")
    assert app.main([str(home / "flow"), "--host", "everywhere"]) == 2
    assert error_of(capsys).startswith("--host everywhere: expected an address")
    monkeypatch.setenv(app.AUTH, "nobody")
    assert app.main([str(home / "flow")]) == 2
    assert error_of(capsys).startswith(f"{app.AUTH}: expected USER:PASSWORD")
    monkeypatch.setenv(app.AUTH, "me:a:b")
    assert app.credentials(local=False) == ("me", "a:b") and app.AUTH not in os.environ
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert app.main([str(home / "flow")]) == 2
    assert error_of(capsys) == "the page needs gradio 6 or later: pip install 'opensora-repro[app]'"
    assert torch.is_grad_enabled()


def test_runs_are_named_by_what_tells_them_apart(home: Path, tmp_path: Path) -> None:
    named = app.named_runs([home / "flow", home / "iddpm"])
    assert named == {"flow": (home / "flow").resolve(), "iddpm": (home / "iddpm").resolve()}
    steps = home / "flow" / "checkpoints"
    assert list(app.named_runs([steps / "step-00000005", steps / "step-00000020"])) == [
        "step-00000005",
        "step-00000020",
    ]
    (tmp_path / "x" / "flow").mkdir(parents=True)
    assert list(app.named_runs([home / "flow", tmp_path / "x" / "flow"])) == [f"{home.name}/flow", "x/flow"]
