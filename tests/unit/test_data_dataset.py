from __future__ import annotations

import copy
import fcntl
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from benchmarks import tables
from opensora_repro.config import DataConfig
from opensora_repro.data.dataset import BadSample, Clip, ClipDataset, build_loader, to_tensor
from opensora_repro.data.manifest import read_manifest
from opensora_repro.data.sampler import BatchSampler, Schedule, Shape, everything
from opensora_repro.data.video import cover_size, read_frames_at
from opensora_repro.training.fill import load_listed
from tests.frames import write_manifest

CONFIG = DataConfig(num_frames=4, frame_interval=2, height=48, width=40, num_workers=0)
CAPTIONS = ["a walk", "a bright day", "turning left", "a ride"]


@pytest.fixture(scope="module")
def manifest(videos_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight rows over four real files; two cannot be read, one is shorter than a sample."""
    names = ["start_at_5s.mp4", "vp9.webm", "tiny_16x16.mp4", "rotated_90.mp4"]
    lengths = [90, 48, 20, 60]
    files = [videos_dir / "bad" / name for name in names]
    rows = [(f"good-{i}", files[i % 4], CAPTIONS[i % 4], lengths[i % 4]) for i in range(5)]
    rows.append(("damaged", videos_dir / "bad/trunc_mdat_half.mp4", "a walk", 90))
    rows.append(("gone", videos_dir / "no such file.mp4", "a walk", 30))
    rows.append(("short", videos_dir / "bad/one_frame.mp4", "a walk", 1))
    frame = pd.DataFrame(rows, columns=["id", "path", "caption", "num_frames"])
    path = tmp_path_factory.mktemp("data") / "manifest.parquet"
    write_manifest(frame.assign(path=frame["path"].astype(str), fps=30.0, height=64, width=64), path)
    return path


def same(a: Clip | BadSample, b: Clip | BadSample) -> bool:
    if isinstance(a, Clip) and isinstance(b, Clip):
        return (a.id, a.caption, a.flipped) == (b.id, b.caption, b.flipped) and torch.equal(a.pixels, b.pixels)
    return a == b


def column(dataset: ClipDataset, name: str) -> list[str]:
    return list(dataset.rows[name].to_pylist())


def clips(dataset: ClipDataset, index: int, epochs: int) -> Iterator[Clip]:
    for epoch in range(epochs):
        clip = dataset.load(epoch, index)
        assert isinstance(clip, Clip)
        yield clip


def test_a_sample_is_a_function_of_seed_epoch_and_id(manifest: Path) -> None:
    one, two = ClipDataset(manifest, CONFIG, 5), ClipDataset(manifest, CONFIG, 5)
    assert all(same(one.load(epoch, i), two.load(epoch, i)) for epoch in range(2) for i in range(len(one)))
    clip, again, other = one.load(0, 0), one.load(1, 0), ClipDataset(manifest, CONFIG, 6).load(0, 0)
    assert not same(clip, again)
    assert not same(clip, other)
    assert isinstance(clip, Clip)
    video = to_tensor(clip.pixels)
    assert (video.shape, video.dtype) == ((3, 4, 48, 40), torch.float32)
    assert -1.0 <= float(video.min()) < float(video.max()) <= 1.0


def test_row_order_does_not_matter(manifest: Path) -> None:
    """Randomness belongs to the id: a sorted manifest gives every sample the same pixels."""
    dataset = ClipDataset(manifest, CONFIG, 5)
    turned = ClipDataset(dataset.rows.take(list(range(len(dataset)))[::-1]), CONFIG, 5)
    assert column(turned, "id") == column(dataset, "id")[::-1]
    assert all(same(dataset.load(2, i), turned.load(2, len(dataset) - 1 - i)) for i in range(5))


def test_draws_repeat(manifest: Path) -> None:
    dataset = ClipDataset(manifest, replace(CONFIG, draws=2), 5)
    assert same(dataset.load(0, 0), dataset.load(2, 0))
    assert not same(dataset.load(0, 0), dataset.load(1, 0))


def test_without_augmentation_the_middle_is_taken(manifest: Path) -> None:
    dataset = ClipDataset(manifest, CONFIG, 5, augment=False)
    clip = dataset.load(0, 3)  # 60 frames, 360x640 as displayed
    assert isinstance(clip, Clip)
    assert same(clip, dataset.load(9, 3))
    height, width = cover_size(640, 360, (48, 40))
    frames = read_frames_at(column(dataset, "path")[3], [26, 28, 30, 32], size=(48, 40))
    assert frames.shape == (4, height, width, 3) == (4, 71, 40, 3)
    assert torch.equal(clip.pixels, frames[:, 11:59])


def test_only_captions_without_a_side_are_mirrored(manifest: Path) -> None:
    dataset = ClipDataset(manifest, CONFIG, 5)
    assert not any(clip.flipped for clip in clips(dataset, 2, 12))  # "turning left"
    flips = [clip.flipped for clip in clips(dataset, 0, 24)]
    assert 4 <= sum(flips) <= 20
    never = ClipDataset(manifest, replace(CONFIG, flip=False), 5)
    pairs = list(zip(clips(dataset, 0, 8), clips(never, 0, 8), strict=True))
    assert not any(plain.flipped for _, plain in pairs)
    for clip, plain in pairs:
        assert torch.equal(clip.pixels, plain.pixels.flip(2) if clip.flipped else plain.pixels)


def test_unreadable_samples_are_named_never_replaced(manifest: Path) -> None:
    dataset = ClipDataset(manifest, replace(CONFIG, num_frames=16, frame_interval=5), 5)
    damaged, gone, short = (dataset.load(0, column(dataset, "id").index(name)) for name in ("damaged", "gone", "short"))
    for sample, name, reason in [
        (damaged, "damaged", "ends early"),
        (gone, "gone", "no such file"),
        (short, "short", "the clip has 1 frames, the sample needs 16"),
    ]:
        assert isinstance(sample, BadSample)
        assert sample.id == name
        assert reason in sample.reason
        assert sample.path == column(dataset, "path")[column(dataset, "id").index(name)]


def sampler_of(dataset: ClipDataset, size: int, seed: int, shape: Shape | None = None) -> BatchSampler:
    return BatchSampler(Schedule(everything(len(dataset)), [size], seed), [shape or dataset.shape])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(manifest: Path, workers: int) -> None:
    dataset = ClipDataset(manifest, CONFIG, 5)
    sampler = sampler_of(dataset, 3, 1)
    torch.manual_seed(0)
    plain = list(build_loader(dataset, sampler, 4, 6, 0))
    prefetched = list(build_loader(dataset, sampler, 4, 6, workers))
    assert len(plain) == len(prefetched) == 6
    for step, one, other in zip(range(4, 10), plain, prefetched, strict=True):
        assert all(same(a, b) for a, b in zip(one, other, strict=True))
        assert [s.id for s in one] == [column(dataset, "id")[i] for _, i in sampler.batch(step)]
        assert one.shape == other.shape == (4, 48, 40)
    assert torch.initial_seed() == 0
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(0)))


def test_processes_that_are_not_forked_map_the_rows(manifest: Path) -> None:
    """They are told a file, whose pages all of them share; forked ones share the columns as they are."""
    dataset = ClipDataset(manifest, CONFIG, 5)
    texts = pickle.dumps(dataset)
    assert len(texts) < 2000 and b"damaged" not in texts
    before = pa.total_allocated_bytes()
    other = copy.copy(dataset)  # as from one process to another
    assert other.rows.equals(dataset.rows) and pa.total_allocated_bytes() == before
    assert same(other.load(0, 0), dataset.load(0, 0))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as others:
        assert same(others.submit(dataset.load, 0, 0).result(), dataset.load(0, 0))


def test_a_loader_process_has_no_rows_of_its_own(tmp_path: Path) -> None:
    tables.make_manifest(tmp_path / "m.parquet", 300_000)
    many = read_manifest(tmp_path / "m.parquet")
    few, all_ = (tables.loader_memory(table, 10_000) for table in (many.slice(0, 3000), many))
    assert all_ - few < many.select(["id", "path", "caption", "num_frames"]).nbytes / 2


def test_batches_of_another_shape(manifest: Path) -> None:
    dataset = ClipDataset(manifest, CONFIG, 5)
    (batch,) = build_loader(dataset, sampler_of(dataset, 4, 1, (2, 32, 32)), 0, 1, 0)
    assert batch.shape == (2, 32, 32)
    assert {tuple(s.pixels.shape) for s in batch if isinstance(s, Clip)} == {(2, 32, 32, 3)}


def test_clips_travel_between_processes(manifest: Path) -> None:
    clip = ClipDataset(manifest, CONFIG, 5).load(0, 0)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as others:
        assert same(others.submit(copy.copy, clip).result(), clip)  # there and back
    assert isinstance(clip, Clip)
    assert clip.pixels.dtype == torch.uint8


def load_for_ever(manifest: Path, log: Path, line: Connection) -> None:
    """A training process: reads batches until SIGTERM, then takes a second to save."""
    os.setsid()
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    dataset = ClipDataset(manifest, CONFIG, 0)
    sampler = sampler_of(dataset, 2, 0)
    for number, batch in enumerate(build_loader(dataset, sampler, 0, 10**6, 2)):
        if number == 0:
            line.send([process.pid for process in multiprocessing.active_children()])
        if stop:
            time.sleep(1)
            line.send(len(batch))
            return


def start_loader(manifest: Path, log: Path) -> tuple[multiprocessing.process.BaseProcess, list[int], Connection]:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=load_for_ever, args=(manifest, log, there))
    process.start()
    assert here.poll(60), log.read_text()
    return process, here.recv(), here


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_signal_to_the_whole_job_lets_it_finish_its_step(manifest: Path, tmp_path: Path) -> None:
    process, workers, line = start_loader(manifest, tmp_path / "log")
    assert process.pid and len(workers) == 2
    os.killpg(process.pid, signal.SIGTERM)  # what a scheduler does
    process.join(60)
    assert line.recv() == 2
    assert (process.exitcode, (tmp_path / "log").read_text()) == (0, "")
    assert not any(alive(pid) for pid in workers)


def test_workers_end_when_the_parent_is_killed(manifest: Path, tmp_path: Path) -> None:
    process, workers, _ = start_loader(manifest, tmp_path / "log")
    process.kill()
    process.join(60)
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(alive(pid) for pid in workers)


def test_memory_and_files_stay_bounded(manifest: Path) -> None:
    """Hundreds of reads, failures among them, leave no open file behind and no growing heap."""
    import psutil

    dataset = ClipDataset(manifest, CONFIG, 5)
    process = psutil.Process()
    sizes = []
    for epoch in range(20):
        for index in range(1, 7):
            dataset.load(epoch, index)
        if epoch in (7, 19):
            sizes.append((process.memory_info().rss, process.num_fds()))
    assert sizes[1][1] == sizes[0][1]
    assert sizes[1][0] - sizes[0][0] < 24 * 2**20, np.diff(sizes, axis=0)


@pytest.fixture
def with_stuck(manifest: Path, tmp_path: Path) -> Iterator[Path]:
    """The manifest with a row more, of a file that nobody gets open: for 45 s Linux lets others wait for a lease."""
    leased = tmp_path / "leased.mp4"
    frame = pd.read_parquet(manifest)
    leased.write_bytes(Path(frame["path"][0]).read_bytes())
    row = pd.DataFrame([{**frame.iloc[0].to_dict(), "id": "stuck", "path": str(leased)}])
    write_manifest(pd.concat([frame.iloc[:2], row, frame.iloc[2:]], ignore_index=True), tmp_path / "manifest.parquet")
    told = signal.signal(signal.SIGIO, signal.SIG_IGN)  # that somebody waits
    with leased.open("r+b") as holder:
        fcntl.fcntl(holder, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield tmp_path / "manifest.parquet"
    signal.signal(signal.SIGIO, told)


def test_a_loader_stuck_in_a_file_is_replaced(manifest: Path, with_stuck: Path) -> None:
    dataset = ClipDataset(with_stuck, replace(CONFIG, decode_timeout=5), 5)
    whole = ClipDataset(manifest, CONFIG, 5)
    expected = {s.id: s for s in (whole.load(0, index) for index in range(len(whole)))}
    for _ in range(2):  # the second time nobody tries that file
        samples = list(load_listed(dataset, range(9), [dataset.shape] * 9, 2))
        assert [s.id for s in samples] == column(dataset, "id")
        (stuck,) = [s for s in samples if s.id == "stuck"]
        assert isinstance(stuck, BadSample) and stuck.path.endswith("leased.mp4")
        assert stuck.reason == "its reading did not end within data.decode_timeout = 5 seconds"
        assert all(same(s, expected[s.id]) for s in samples if s.id != "stuck")
        assert dataset.stuck == {stuck.path}


def test_a_process_stuck_in_a_file_ends_with_its_name(with_stuck: Path, tmp_path: Path) -> None:
    def read_all() -> None:
        sys.stderr = (tmp_path / "log").open("w")
        dataset = ClipDataset(with_stuck, replace(CONFIG, decode_timeout=5), 5)
        list(load_listed(dataset, range(9), [dataset.shape] * 9, 0))

    process = multiprocessing.get_context("fork").Process(target=read_all)
    process.start()
    process.join(60)
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert process.exitcode == 1
    assert "leased.mp4 has not ended within data.decode_timeout = 5 seconds" in line and line.startswith("error: ")
