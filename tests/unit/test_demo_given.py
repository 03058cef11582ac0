"""The demo's jobs with given frames, and their judge: what goes on evenly is told from what jumps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from opensora_repro.config import DataConfig, VaeConfig
from opensora_repro.data.dataset import to_tensor
from opensora_repro.data.video import probe, read_frames
from opensora_repro.data.write import write_png, write_video
from opensora_repro.demo.adherence import mask_of
from opensora_repro.demo.given import MAX_JUMP, PARTS, TASKS, Job, judge, largest_jump, make_jobs, rows_of
from opensora_repro.demo.shapes import Motion, draw_scene, motions
from opensora_repro.frozen.vae import open_vae
from opensora_repro.sampling.generate import decode
from tests.bounding_box import judged, jump_by_light


def filmed(motion: Motion, count: int = 12, seed: int = 0) -> np.ndarray:
    return draw_scene(motion, np.random.default_rng(seed)).frames(count=count, size=96)


@pytest.fixture
def vae(repo_dir: Path) -> Any:
    return open_vae(VaeConfig(path=str(repo_dir / "checkpoints/demo/vae")), "cpu", torch.float32)


def test_what_goes_on_evenly_is_as_asked_by_both_judges(vae: Any, tmp_path: Path) -> None:
    there, back = Motion("red", "square", "left"), Motion("green", "circle", "up", returns=True)
    for job in (Job("extend", there, (), (2,)), Job("join", there, (), (2, 8)), Job("loop", back, (), (-1,))):
        frames = filmed(job.motion)
        frames = frames[:-1] if job.task == "loop" else frames
        told = judge(job, frames, vae)
        assert told["agrees"] == dict.fromkeys(PARTS, True), (job.task, told)
        write_video(tmp_path / "video.mp4", frames, 12)
        second = judged({"path": str(tmp_path / "video.mp4"), "caption": job.motion.caption, "seams": told["seams"]})
        assert all(second[part] for part in PARTS) and second["overlap"] > 0.9, (job.task, second)


@pytest.mark.parametrize("fault", ["jump", "gone", "no way back"])
def test_a_seam_that_shows_is_told(vae: Any, fault: str) -> None:
    motion = Motion("blue", "triangle", "right")
    frames, job = filmed(motion), Job("extend", motion, (), (2,))
    if fault == "jump":  # two steps at once, after the given frames
        frames = np.concatenate([frames[:3], filmed(motion, 13)[5:]])
    elif fault == "gone":
        frames[4] = frames[4].min()
    else:
        job = Job("loop", motion, (), (-1,))
    told = judge(job, frames, vae)["agrees"]
    assert not told["seam"] and told["colour"] and told["shape"]
    if fault != "gone":
        assert jump_by_light(frames, job.seams) > MAX_JUMP


def test_what_the_autoencoder_gives_back_of_a_clip_has_no_seam(vae: Any) -> None:
    for motion in (
        Motion("red", "triangle", "up"),
        Motion("blue", "circle", "right"),
        Motion("cyan", "square", "down"),
    ):
        with torch.no_grad():
            latents = vae.sample_latents(vae.encode_moments(to_tensor(torch.from_numpy(filmed(motion)))), None)
            frames = decode(vae, latents, num_frames=12)
        masks = [mask_of(frame) for frame in frames]
        assert max(largest_jump(masks, range(11)), jump_by_light(frames, tuple(range(11)))) < 1.2


def test_a_first_frame_is_held_to_what_the_autoencoder_makes_of_its_picture(vae: Any, tmp_path: Path) -> None:
    motion = Motion("cyan", "circle", "down")
    frames, picture = filmed(motion), tmp_path / "first.png"
    write_png(picture, frames[0])
    job = Job("first", motion, (picture,), ())
    assert judge(job, frames, vae)["agrees"]["seam"]
    other = np.concatenate([filmed(motion, seed=1)[:1], frames[1:]])  # another picture of the same
    assert not judge(job, other, vae)["agrees"]["seam"]


def test_jobs_are_made_of_held_out_clips(tmp_path: Path) -> None:
    tables = []
    for seed in range(2):
        rows = []
        for motion in [*motions()[:2], *motions(returns=True)[:2]]:
            path = tmp_path / f"{seed}-{len(rows)}.mp4"
            write_video(path, filmed(motion, 24, seed), 24)
            rows.append({"path": str(path), "caption": motion.caption, "num_frames": 24, "fps": 24.0})
        tables.append(pa.Table.from_pylist(rows))
    data = DataConfig(num_frames=12, frame_sampling="uniform")
    jobs = make_jobs(*tables, data, tmp_path / "given", 3)
    assert [job.task for job in jobs] == [task for task in TASKS for _ in range(3)]
    assert all(job.motion.returns == (job.task == "loop") for job in jobs)
    first, extend, _, join = jobs[::3]
    assert extend.options == ["--extend", str(extend.given[0])] and extend.seams == (2,)
    assert [probe(path).num_frames for path in join.given] == [3, 3] and join.seams == (2, 8)
    shown = read_frames(first.given[0], start=0, count=1).numpy().astype(int)
    begun = read_frames(extend.given[0], start=0, count=1).numpy()
    assert np.abs(shown - begun).mean() < 4  # both are the clip's beginning


def test_shares_are_by_task() -> None:
    agrees = dict.fromkeys(PARTS, True)
    records = [
        {"task": "first", "agrees": agrees},
        {"task": "loop", "agrees": agrees},
        {"task": "loop", "agrees": agrees | {"seam": False}},
    ]
    rows = rows_of(records)
    assert list(rows) == [TASKS["first"], TASKS["loop"]]
    assert rows[TASKS["loop"]] == {"colour": 1.0, "shape": 1.0, "direction": 1.0, "seam": 0.5}
