from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from opensora_repro.config import BucketConfig, Config, ConfigError, DataConfig, dump_toml, load_config, parse_config
from opensora_repro.data.buckets import COLUMNS, PIXELS, Rule, as_heaviest, as_sampled, assign, nearest, published_table
from opensora_repro.data.sampler import Assignment, Schedule, everything, keyed_words


def section(config: dict[str, Any], interval: int = 1) -> DataConfig:
    """The data section of a published bucket config."""
    entries = [
        BucketConfig(int(n), name, "", size or 0, tuple(keep) if isinstance(keep, list) else float(keep))
        for name, counts in config.items()
        for n, (keep, size) in counts.items()
    ]
    return DataConfig(frame_interval=interval, buckets=tuple(entries))


def cell_of(rule: Rule, *clip: int) -> int:
    return int(rule.cells(*(np.array([value]) for value in (*clip, 24.0)))[0])


class Published:
    """The published draws: a generator for each clip, resolution and frame count, asked first whether, then if kept."""

    def __init__(self, config: dict[str, Any], interval: int) -> None:
        self.rule = Rule(section(config, interval), 1)
        self.num_buckets = len(self.rule.buckets)
        pairs = [(name, int(n)) for name in config for n in config[name]]
        pairs.sort(key=lambda pair: (-PIXELS[pair[0]], -pair[1]))
        of_pixels = {PIXELS[name]: name for name in config}
        self.numbers = {
            rung.first + ratio: pairs.index((of_pixels[level.pixels], rung.num_frames))
            for level in self.rule.levels
            for rung in level.rungs
            for ratio in range(len(rung.ratios))
        }

    def bucket(self, seed: int, *clip: int) -> int | None:
        for rungs in self.rule.ladder(cell_of(self.rule, *clip)):
            for bucket, considered, kept in rungs:
                random = np.random.default_rng(seed + self.numbers[bucket])
                if considered < 1 and random.random() >= considered:
                    continue
                if kept >= 1 or random.random() < kept:
                    return bucket
                break
        return None


def test_published_tables(golden_1_2_dir: Path) -> None:
    golden = json.loads((golden_1_2_dir / "aspect.json").read_text())
    assert golden["pixels"] == PIXELS
    for name, table in golden["tables"].items():
        assert {float(ratio): tuple(size) for ratio, size in table.items()} == {
            ratio: (height, width) for ratio, height, width in published_table(name)
        }
    for height, width, name, ratio in golden["closest"]:
        ratios = np.array([row[0] for row in published_table(name)])
        assert ratios[nearest(ratios, height / width)] == float(ratio)


def test_published_assignments(golden_1_2_dir: Path) -> None:
    """All but those of clips with exactly the frames that a bucket needs, which did not fit there."""
    golden, differing = json.loads((golden_1_2_dir / "buckets.json").read_text()), 0
    published = {(name, k): Published(config, k) for name, config in golden["configs"].items() for k in (1, 2, 3)}
    for name, frames, height, width, interval, seed, _, shape in golden["rows"]:
        there = published[name, interval]
        assert there.num_buckets == golden["order"][name]["num_bucket"]
        exact = any(frames == int(n) * interval for counts in golden["configs"][name].values() for n in counts)
        bucket = there.bucket(seed, frames, height, width)
        found = None if bucket is None else list(there.rule.buckets[bucket].shape)
        if found != shape:
            assert exact
            assert shape is None
            differing += 1
    assert differing == 20


def test_published_batches(golden_1_2_dir: Path) -> None:
    """An epoch has as many batches of each shape as the published order, and every clip has the published shape."""
    compared = 0
    for case in json.loads((golden_1_2_dir / "sampler.json").read_text())["cases"]:
        if not case["drop_last"] or case["last_micro_batch_access_index"]:
            continue
        there = Published(case["config"], case["frame_interval"])
        buckets, seed = there.rule.buckets, case["sampler_seed"] + case["epoch"]
        found = [there.bucket(seed + row * there.num_buckets, *clip) for row, clip in enumerate(case["rows"])]
        shapes = {row: "-".join(map(str, buckets[b].shape)) for row, b in enumerate(found) if b is not None}
        theirs = [[name.split("-", 1) for name in batch] for batches in case["batches"].values() for batch in batches]
        assert all(shapes[int(row)] == shape for batch in theirs for row, shape in batch)
        rows = list(shapes)
        assignment = Assignment(
            np.array([found[row] << 32 for row in rows], dtype=np.uint64), lambda cell: [(cell, 1.0)], len(buckets)
        )
        schedule = Schedule(assignment, [bucket.batch_size for bucket in buckets], 0)
        steps = [schedule.step(number) for number in range(schedule.steps_before(1))]
        ours = [{shapes[rows[row]] for row in step.rows} for step in steps]
        assert sorted(shape for (shape,) in ours) == sorted(batch[0][1] for batch in theirs)
        compared += len(ours)
    assert compared > 60


CONFIG = DataConfig(
    frame_interval=2,
    buckets=(
        BucketConfig(8, "64x64", ("2:3", "1:1", "3:2"), keep=0.5),
        BucketConfig(16, "64x64", ("1:1", "3:2"), keep=(0.75, 0.5)),
        BucketConfig(4, "32x32", "square"),
        BucketConfig(1, "48x32", keep=0.25),
    ),
)


def manifest(count: int, seed: int = 0) -> pa.Table:
    random = np.random.default_rng(seed)
    return pa.table(
        {
            "id": [f"clip {index}" for index in range(count)],
            "num_frames": random.choice([1, 4, 8, 16, 17, 32], count),
            "height": random.integers(20, 100, count),
            "width": random.integers(20, 100, count),
            "fps": random.choice([12.0, 24.0, 60.0], count),
        }
    )


def test_sizes_of_areas() -> None:
    rule = Rule(CONFIG, 6)
    assert [bucket.shape for bucket in rule.buckets] == [
        (16, 56, 80), (16, 64, 64), (8, 56, 80), (8, 64, 64), (8, 80, 56), (1, 32, 48), (4, 32, 32),
    ]  # fmt: skip
    assert {bucket.batch_size for bucket in rule.buckets} == {6}
    table = [BucketConfig(1, "360p", ("16:9", 1)), BucketConfig(1, "300x300", "360p"), BucketConfig(1, "512", "square")]
    shapes = [bucket.shape for bucket in Rule(DataConfig(buckets=tuple(table)), 1).buckets]
    assert shapes[:3] == [(1, 512, 512), (1, 360, 640), (1, 480, 480)]
    assert len(shapes) == 3 + 17


@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        ((32, 64, 64), {(16, 64, 64), (8, 64, 64), (4, 32, 32)}),  # exactly the frames that the longest needs
        ((31, 64, 64), {(8, 64, 64), (4, 32, 32)}),
        ((32, 57, 57), {(4, 32, 32)}),  # less than .8 of 64 x 64
        ((1, 300, 300), {(1, 32, 48)}),
        ((7, 300, 300), set()),
        ((8, 10, 10), set()),
    ],
)
def test_what_a_clip_may_go_to(clip: tuple[int, int, int], expected: set[Any]) -> None:
    rule = Rule(CONFIG, 1)
    cell = cell_of(rule, *clip)
    assert {rule.buckets[bucket].shape for bucket, _ in rule.chances(cell)} == expected
    if not expected:
        assert rule.why_lost(cell) == ("too short" if clip[0] == 7 else "too small")


def test_by_time_a_clip_counts_as_it_lasts() -> None:
    """A second holds 24 frames, whatever it was filmed at."""
    rule = Rule(replace(CONFIG, frame_interval=3, fps=24.0), 1)
    rates = np.array([12.0, 24.0, 30.0, 60.0, 12.0, 24.0, 30.0, 60.0, 0.0])
    frames = np.array([8, 16, 20, 40, 7, 15, 18, 37, 1])
    sides = np.full(9, 64)
    found = [rule.buckets[rule.chances(int(cell))[0][0]].num_frames for cell in rule.cells(frames, sides, sides, rates)]
    assert found == [16, 16, 16, 16, 8, 8, 8, 8, 1]
    whole = Rule(replace(CONFIG, frame_sampling="uniform"), 1)
    assert whole.buckets[whole.chances(cell_of(whole, 16, 64, 64))[0][0]].num_frames == 16


def test_buckets_of_draws_are_shares_and_a_rows_own() -> None:
    table, rule = manifest(4000), Rule(CONFIG, 1)
    assignment = assign(table, rule, 3)
    columns = [table[name].to_numpy() for name in COLUMNS]
    cells = rule.cells(*columns)
    draws = np.array([assignment.buckets(draw) for draw in range(40)])
    assert (assignment.counts(np.arange(40)) == [np.bincount(of[of >= 0], minlength=7) for of in draws]).all()
    for cell in np.unique(cells):
        before = 0.0
        for bucket, share in rule.chances(int(cell)):
            kept = (draws[:, cells == cell] == bucket).mean(axis=0)  # of each row
            assert np.abs(kept - (share - before)).max() <= 0.075  # evenly: chance alone would be off by .2 and more
            before = share
        assert set(draws[:, cells == cell].flat) <= {bucket for bucket, _ in rule.chances(int(cell))} | {-1}
    some = table.take(list(range(0, 4000, 3)))
    assert (assign(some, rule, 3).buckets(5) == draws[5, ::3]).all()
    assert (assign(table, rule, 4).buckets(5) != draws[5]).any()


def test_one_size_takes_all() -> None:
    assert everything(5).buckets(7).tolist() == [0] * 5
    assert everything(5).counts(np.arange(3)).tolist() == [[5]] * 3


def test_keyed_words_are_of_each_id_alone() -> None:
    ids = ["a", "", "abcdefgh", "abcdefgi", "abcdefghi", "\u00fc" * 9, "a\0", "clip-1" * 7]
    words = keyed_words(pa.array(ids), 1, "x")
    assert len(set(words.tolist())) == len(ids)
    assert keyed_words(pa.array(ids).slice(2, 4), 1, "x").tolist() == words[2:6].tolist()
    assert words[0] == 2724244313546605193  # pinned: other draws would be another run


@pytest.mark.parametrize(
    ("bucket", "message"),
    [
        ({"ratio": 1}, "data.buckets[0].ratio; did you mean ratios?"),
        ({"keep": 1.5}, "data.buckets[0].keep = 1.5: expected shares"),
        ({"keep": [0.5]}, "data.buckets[0].keep = [0.5]: expected a list of 2 values"),
        ({"num_frames": 0}, "data.buckets[0].num_frames = 0: expected at least 1"),
        ({"resolution": "64"}, "data.buckets[0].resolution = '64': expected one of 144p, "),
        ({"resolution": "0x64"}, "or an area as WIDTHxHEIGHT"),
        ({"ratios": "wide"}, "data.buckets[0].ratios = 'wide': expected \"square\", a published table"),
        ({"ratios": ["3:0"]}, "data.buckets[0].ratios: '3:0': expected WIDTH:HEIGHT"),
        ({"ratios": []}, "data.buckets[0].ratios = []: expected at least one"),
        ({"ratios": [True]}, "data.buckets[0].ratios[0] = true: expected a number"),
    ],
)
def test_mistakes_are_one_line(bucket: dict[str, Any], message: str) -> None:
    entry = {"num_frames": 4, "resolution": "64x64", **bucket}
    with pytest.raises(ConfigError) as raised:
        Rule(parse_config({"data": {"buckets": [entry]}}).data, 1)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_a_bucket_lacks() -> None:
    with pytest.raises(ConfigError, match=r"data.buckets\[0\] lacks resolution"):
        parse_config({"data": {"buckets": [{"num_frames": 1}]}})
    with pytest.raises(ConfigError, match=r"data.buckets\[1\]: data.buckets\[0\] has its num_frames and resolution"):
        parse_config({"data": {"buckets": [{"num_frames": 1, "resolution": "256"}] * 2}})


def test_samples_have_the_size_of_a_bucket() -> None:
    """Of the one most like the section's, in whole latents."""
    data = replace(CONFIG, num_frames=14, height=50, width=90)
    cfg = as_sampled(Config(data=data))
    assert (cfg.data.num_frames, cfg.data.height, cfg.data.width, cfg.data.buckets) == (16, 56, 80, ())
    odd = as_sampled(Config(data=DataConfig(buckets=(BucketConfig(1, "240p", ("16:9",), batch_size=3),))))
    assert (odd.data.height, odd.data.width, odd.train.batch_size) == (240, 424, 3)
    assert as_sampled(Config()) == Config()


def test_what_keeps_no_clip_decides_nothing() -> None:
    """The published tables have buckets that only send clips on to fewer pixels, with no batch size of their own."""
    data = replace(CONFIG, num_frames=99, buckets=(BucketConfig(99, "64x64", keep=0.0), *CONFIG.buckets))
    assert as_heaviest(Config(data=data)).data.num_frames == as_sampled(Config(data=data)).data.num_frames == 16
    assert as_heaviest(Config(data=replace(data, buckets=data.buckets[:1]))).data.num_frames == 99


def test_where_all_buckets_are_of_pictures_clips_give_theirs() -> None:
    pictures = Rule(DataConfig(frame_interval=3, buckets=(BucketConfig(1, "64x64"), BucketConfig(1, "32x32"))), 1)
    for frames in (1, 2, 500):
        assert pictures.chances(cell_of(pictures, frames, 64, 64))[0] == (0, 1.0)
    assert not Rule(CONFIG, 1).chances(cell_of(Rule(CONFIG, 1), 2, 64, 64))


def test_config_files_round_trip(tmp_path: Path) -> None:
    cfg = Config(data=CONFIG)
    (tmp_path / "c.toml").write_text(dump_toml(cfg))
    assert load_config(tmp_path / "c.toml") == cfg
    (tmp_path / "c.toml").write_text(dump_toml(Config()) + '[[data.buckets]]\nnum_frames = 1\nresolution = "144p"\n')
    assert load_config(tmp_path / "c.toml").data.buckets == (BucketConfig(1, "144p"),)
