"""A folder of phone videos and a sheet of captions become a sampled video by the README's own lines.

As they stand there, in the order in which they stand. The models are stand-ins under the published names: tiny ones in
the hub's cache, and the recipes' transformer is shrunk to two small blocks and two steps.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pandas as pd
import pytest

from opensora_repro.data.video import probe
from tests.frames import read_manifest, read_table
from tests.preloaded_python import preloaded_python
from tests.published_files import publish
from tests.tiny_captioners import make_tiny_qwen2_vl
from tests.tiny_models import TINY_TEXT_CHANNELS, make_tiny_text, make_tiny_vae

MODEL = {"hidden_size": 48, "depth": 2, "num_heads": 4, "caption_channels": TINY_TEXT_CHANNELS}
SMALLER = {**MODEL, "steps": 2, "batch_size": 1, "num_workers": 0, "dtype": '"fp32"'}  # sample.steps, too
BT709, BT2020, HLG = 1, 9, 18
SIZE = (180, 320)  # rows and columns of what the phone films
VIDEOS = "IMG_0001.MOV", "IMG_0002.MOV", "IMG_0003.mp4", "IMG_0004.mp4", "twovid_mjpeg.mp4"


def film(path: Path, rate: int, *, hdr: bool = False, hidden: int = 0) -> None:
    """Two seconds and a half of coloured clouds that pass by; `hdr`: as HEVC of 10 bits, HLG.

    So many `hidden` frames before them are left out by an edit list, as by a phone's own cutting tool.
    """
    rng = np.random.default_rng(len(path.name) + rate)
    sky = cv2.GaussianBlur(rng.integers(0, 256, (SIZE[0], 3 * SIZE[1], 3)).astype(np.float32), (0, 0), 6)
    sky = cv2.normalize(sky, None, 30, 220, cv2.NORM_MINMAX).astype(np.uint8)
    with av.open(str(path), "w", format="mp4", options={"avoid_negative_ts": "disabled"}) as out:
        options = {"x265-params": "log-level=none"} if hdr else {}
        stream = out.add_stream("libx265" if hdr else "libx264", rate=rate, options=options)
        stream.height, stream.width = SIZE
        stream.pix_fmt = "yuv420p10le" if hdr else "yuv420p"
        context = stream.codec_context
        if hdr:
            context.color_primaries, context.color_trc, context.colorspace = BT2020, HLG, BT2020
        for tick in range(-hidden, 5 * rate // 2):
            at = 60 * (tick + hidden) // rate
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(sky[:, at : at + SIZE[1]]), format="rgb24")
            frame = frame.reformat(format=stream.pix_fmt)
            if hdr:
                frame.colorspace = BT2020
            frame.pts, frame.time_base = tick, Fraction(1, rate)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def turn(path: Path) -> None:
    """As a phone held upright writes it: the track header's matrix (ISO 14496-12, 8.3.2) says 90 degrees."""
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44
    content[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


@pytest.fixture
def home(tmp_path: Path, cases_dir: Path, repo_dir: Path) -> Path:
    """A folder to work in: `my_videos`, the recipes shrunk, prompts, and the hub's cache with the stand-ins."""
    videos = tmp_path / "my_videos"
    videos.mkdir()
    film(videos / VIDEOS[0], 30)
    turn(videos / VIDEOS[0])
    film(videos / VIDEOS[1], 24, hdr=True)
    film(videos / VIDEOS[2], 60)
    film(videos / VIDEOS[3], 25, hidden=17)
    shutil.copy(cases_dir / VIDEOS[4], videos / VIDEOS[4])
    shutil.copytree(repo_dir / "configs", tmp_path / "configs")
    for path in (tmp_path / "configs").glob("*.toml"):
        text = path.read_text(encoding="utf-8")
        for key, value in SMALLER.items():
            text = re.sub(rf"(?m)^{key} = \S+", f"{key} = {value}", text)
        path.write_text(text, encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("clouds pass by\n", encoding="utf-8")
    hub = tmp_path / "hf" / "hub"
    make_tiny_vae(snapshot(hub, "stabilityai/sd-vae-ft-ema"))
    make_tiny_text(snapshot(hub, "DeepFloyd/t5-v1_1-xxl"))
    make_tiny_qwen2_vl(snapshot(hub, "Qwen/Qwen2-VL-7B-Instruct"))
    weights = publish(tmp_path / "made", "pixart.pth", **MODEL, model_max_length=120)
    weights.rename(snapshot(hub, "PixArt-alpha/PixArt-alpha") / "PixArt-XL-2-512x512.pth")
    return tmp_path


def snapshot(hub: Path, name: str) -> Path:
    """The folder of a repository's only revision in the hub's cache."""
    repository = hub / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    folder = repository / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    return folder


def lines_of(readme: Path, heading: str) -> list[str]:
    """The commands of a section, without their comments."""
    section = readme.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line]


@pytest.fixture
def run(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Run a line in a shell, with this interpreter as `python`."""
    bin_dir = tmp_path_factory.mktemp("bin")
    (bin_dir / "torchrun").write_text(f'#!/bin/sh\nexec {bin_dir}/python -m torch.distributed.run "$@"\n')
    (bin_dir / "torchrun").chmod(0o755)
    repo = Path(__file__).resolve().parents[2]
    environment = {
        **os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}", "PYTHONPATH": str(repo), "HF_HOME": str(home / "hf"),
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip

    def run(line: str) -> str:
        done = subprocess.run(line, shell=True, cwd=home, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    with preloaded_python(bin_dir, environment):
        yield run


def told(lines: list[str], word: str) -> Iterator[str]:
    return (line for line in lines if word in line)


@pytest.mark.slow
def test_from_phone_videos_to_a_sampled_one(home: Path, run: Any, repo_dir: Path) -> None:
    lines = lines_of(repo_dir / "README.md", "Your own videos")
    kinds = (
        "pipeline",
        "--template",
        "--sidecar",
        "--model",
        "fetch",
        "preview",
        "--dry-run",
        "stages.plan",
        "stages.sample",
    )
    assert all(any(told(lines, kind)) for kind in kinds)
    for line in lines:
        if "stages.weights fetch" in line:
            continue  # what it fetches is there
        if line.startswith("torchrun"):  # the other way to train, on fewer processes: a run of its own
            shutil.rmtree(home / "runs")
            line = line.replace("--nproc-per-node 8", "--nproc-per-node 2")
        output = run(line)
        if "data_tools.pipeline" in line:
            check_clips(home)
        elif "--template" in line:
            assert pd.read_csv(home / "captions.csv")["caption"].isna().all()
            rows = [f'{name},"clouds, seen by camera {i}"' for i, name in enumerate(VIDEOS)]
            (home / "captions.csv").write_text("\n".join(["source,caption", *rows]), encoding="utf-8")
        elif "--sidecar" in line:
            clips = read_manifest(home / "data/clips/manifest.parquet")
            cameras = dict(zip(VIDEOS, range(5), strict=True))
            assert all(f"camera {cameras[row['source']]}" in row["caption"] for row in clips.to_dict("records"))
        elif "data_tools.preview" in line:
            page = (home / "data/preview/preview.html").read_text(encoding="utf-8")
            assert "cut away" in page and "</s>" in page and "shown whole" not in page
        elif "--dry-run" in line:
            assert re.search(r"usable +\d+ +100.0%", output) and "not yet there" not in output
    video = probe(home / "out" / "0000.mp4")
    assert (video.num_frames, video.height, video.width) == (16, 256, 256)


def check_clips(home: Path) -> None:
    """Every video gave a clip that the recipe can use, upright, at its rate; the report is there."""
    clips = read_manifest(home / "data/mine/manifest.parquet", need_captions=False)
    rejects = read_table(home / "data/mine/rejects.parquet")
    assert sorted(set(clips["source"])) == sorted(VIDEOS), rejects.to_dict("records")
    assert (clips["num_frames"] >= 46).all() and clips["fps"].round(1).eq(24).all()
    upright = clips[clips["source"] == VIDEOS[0]].iloc[0]
    assert upright["height"] > upright["width"]
    assert (home / "data/mine/report.html").is_file()
    found = read_manifest(home / "data/mine/probe/manifest.parquet", need_captions=False).set_index("source")
    assert found["num_frames"].to_dict() == dict(zip(VIDEOS, (75, 60, 150, 62, 130), strict=True))
    assert found.loc[VIDEOS[1], "transfer"] == "arib-std-b67"
