"""What a run is told of its clips and its machine before anything is built."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from opensora_repro.config import BucketConfig, ConfigError, DataConfig
from opensora_repro.data import preflight
from opensora_repro.data.manifest import read_manifest
from opensora_repro.data.preflight import (
    SAMPLED_ROWS,
    Survey,
    bucket_rows,
    bucket_table,
    keyed_sample,
    require_kept,
    require_usable,
    survey,
    table,
    warnings,
)
from opensora_repro.errors import DataError
from opensora_repro.process import HostMemory, host_memory
from opensora_repro.run_folder import check_folder

DATA = DataConfig(num_frames=8, frame_interval=3, height=256, width=256)  # a window of 22 frames


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "a.mp4"
    path.write_bytes(b"looked at by stat alone")
    return path


def look(clip: Path, *rows: dict[str, Any], data: DataConfig = DATA) -> Survey:
    """At clips that need nothing done about them, but for what the rows say."""
    usual = {"path": "a.mp4", "caption": "a", "num_frames": 30, "fps": 24.0, "height": 256, "width": 456}
    manifest = clip.parent / "manifest.csv"
    pd.DataFrame([{"id": f"clip {i}", **usual, **row} for i, row in enumerate(rows)]).to_csv(manifest)
    return survey(read_manifest(manifest), data, manifest)


def counts(found: Survey) -> dict[str, int]:
    """As the table tells them."""
    rows = (re.match(r" +(\D+?) +([\d,]+) +[\d.]+%", line) for line in table(found, "clips of"))
    return {row[1]: int(row[2].replace(",", "")) for row in rows if row}


def test_clips_that_fit(clip: Path) -> None:
    found = look(clip, {}, {"num_frames": 22}, {"height": 456, "width": 256})
    assert counts(found) == {"usable": 3, "missing": 0, "too short": 0, "squeezed": 0, "enlarged": 0}
    assert list(warnings(found)) == []
    require_usable(found)


def test_each_kind_is_counted(clip: Path) -> None:
    (clip.parent / "empty.mp4").touch()
    found = look(
        clip,
        {"path": "gone.mp4"},
        {"path": "empty.mp4"},
        {"path": "gone.mp4", "num_frames": 7},
        {"path": str(clip.parent)},
        {"num_frames": 7},
        {"num_frames": 8},
        {"num_frames": 21},
        {"height": 128, "width": 228},
        {"height": 200, "width": 300, "num_frames": 8},
        {},
    )
    assert counts(found) == {"usable": 5, "missing": 4, "too short": 1, "squeezed": 3, "enlarged": 2}
    text = "\n".join(table(found, "clips of"))
    assert "by 1.64 (median), 2 at most" in text and f"first {str(clip.parent / 'gone.mp4')!r}" in text
    unusable, enlarged = warnings(found)
    assert "50% of the clips" in unusable and "--min-frames 22" in unusable and "max_bad_fraction = 0.1" in unusable
    assert "20% of the clips" in enlarged and "data_tools.split --short-side 256" in enlarged


def test_up_to_a_tenth_needs_no_warning(clip: Path) -> None:
    assert list(warnings(look(clip, *[{}] * 18, {"path": "gone.mp4"}, {"num_frames": 3}))) == []
    assert list(warnings(look(clip, *[{}] * 9, {"height": 128}))) == []


def test_a_wide_sample_of_clips_that_are_less_wide(clip: Path) -> None:
    """The side is enough in both directions."""
    found = look(clip, {"height": 240, "width": 320}, data=dataclasses.replace(DATA, height=256, width=512))
    assert found.factors == (1.6,) and found.short_side == 384


def test_pictures_are_no_clips_of_split(clip: Path) -> None:
    pictures = dataclasses.replace(DATA, num_frames=1)
    (line,) = warnings(look(clip, {"num_frames": 1, "fps": 0.0, "height": 100, "width": 100}, data=pictures))
    assert "take larger pictures" in line and "split" not in line


def test_frame_rates(clip: Path) -> None:
    def rates(*values: float, **more: Any) -> list[str]:
        found = look(clip, *({"fps": value, **more} for value in values), data=dataclasses.replace(DATA, **more))
        return list(warnings(found))

    assert rates(24.0, 30.0, 36.0) == []
    (line,) = rates(24.0, 24.0, 60.0, 12.5)
    assert "from 12.5 to 60" in line and "data.fps, such as 8, takes" in line and "data_tools.split --fps 24 " in line
    assert rates(24.0, 24.0, 60.0, 12.5, fps=8.0) == rates(24.0, 60.0, frame_sampling="uniform") == []
    assert rates(24.0, 60.0, num_frames=1) == []  # single frames do not move
    assert list(warnings(look(clip, {}, {}, *[{}] * 20, {"fps": 60.0, "path": "gone.mp4"}))) == []  # nobody sees it


def test_frames_by_time(clip: Path) -> None:
    """Clips count by how long they last; what is slower than data.fps is told, and a warning from a tenth on."""
    data = dataclasses.replace(DATA, fps=24.0)
    rows = [{"num_frames": 18, "fps": 60.0}, {"num_frames": 17, "fps": 60.0}, {"fps": 23.976}, {"fps": 12.0}]
    found = look(clip, *rows, data=data)
    assert counts(found) == {"usable": 3, "missing": 0, "too short": 1, "slow": 1, "enlarged": 0}
    lines = list(table(found, "clips of"))
    assert "too short         1   25.0%  fewer than 8 frames at data.fps = 24" in lines[3]
    assert "slow         1   25.0%  below data.fps = 24, so that frames repeat" in lines[4]
    unusable, slow = warnings(found)
    assert "data_tools.filter --keep 'duration > 0.2917' leaves out what is too short" in unusable
    assert "25% of the clips" in slow and "lower data.fps (the slowest have 12)" in slow and "'fps >= 23.76'" in slow
    assert list(warnings(look(clip, *[{}] * 9, {"fps": 12.0}, data=data))) == []
    with pytest.raises(DataError, match=r"2 clips have fewer than data\.num_frames = 8 frames at data\.fps = 24, the "):
        require_usable(look(clip, rows[1], rows[1], data=data))
    uniform = dataclasses.replace(DATA, frame_sampling="uniform")
    found = look(clip, {"num_frames": 8}, {"num_frames": 7}, data=uniform)
    assert counts(found) == {"usable": 1, "missing": 0, "too short": 1, "enlarged": 0}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"path": "gone.mp4"}, r"2 files are missing or empty, first '.*gone\.mp4' \(paths are relative to"),
        ({"num_frames": 5}, r"fewer than data\.num_frames = 8 frames, the longest has 5: .*--min-frames 22"),
        ({"num_frames": 5, "resplit": True}, r"data_tools\.split --max-frames divided them: give it at least 22"),
    ],
)
def test_nothing_to_train_on(clip: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"none of the 2 clips can be used: .*{message}"):
        require_usable(look(clip, row, row))


def test_a_sample_of_many_rows(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 120_000
    frame = pd.DataFrame({
        "id": [f"{i:06d}" for i in range(rows)], "path": str(clip), "num_frames": 30, "fps": 24.0, "height": 256,
        "width": 256,
    })  # fmt: skip
    gone = np.arange(rows) < rows // 4
    frame.loc[gone, "path"] = "/nowhere/gone.mp4"
    looked_at: list[str] = []
    missing = preflight._missing
    monkeypatch.setattr(preflight, "_missing", lambda paths, share: looked_at.extend(paths) or missing(paths, share))
    many = pa.Table.from_pandas(frame)
    found = survey(many, DATA, "many.parquet")
    assert found.looked_at == len(looked_at) == SAMPLED_ROWS and found.rows == rows
    assert 0.23 < found.missing / SAMPLED_ROWS < 0.27
    assert next(table(found, "clips of")) == "clips of many.parquet: 120,000; a keyed sample of 10,000 is looked at"
    # The rows' ids choose, wherever they stand
    chosen = set(keyed_sample(many, 100)["id"].to_pylist())
    turned = pa.Table.from_pandas(frame.iloc[::-1])
    assert len(chosen) == 100 and set(keyed_sample(turned, 100)["id"].to_pylist()) == chosen
    assert survey(many.slice(0, 5000), DATA, "few.parquet").looked_at == 5000


# The machine


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = (
    "MemTotal:       16000 kB\nMemFree:  100 kB\nMemAvailable:    9000 kB\nSwapTotal:  500 kB\nHugePages_Total:   0\n"
)


def test_host_memory_without_a_limit(tmp_path: Path) -> None:
    files = {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/user\n", "sys/fs/cgroup/user/memory.max": "max\n"}
    assert host_memory(write(tmp_path, files)) == HostMemory(16000 << 10, 9000 << 10, 500 << 10)


def test_host_memory_within_control_groups(tmp_path: Path) -> None:
    """The tightest group counts, its cache of files as free; a container's own group is shown as the root."""
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/job/step\n",
        "sys/fs/cgroup/job/memory.max": str(8000 << 10),
        "sys/fs/cgroup/job/memory.current": str(7000 << 10),
        "sys/fs/cgroup/job/memory.stat": f"anon 5\ninactive_file {3000 << 10}\n",
    }
    assert host_memory(write(tmp_path / "2", files)) == HostMemory(8000 << 10, 4000 << 10, 500 << 10)
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "3:cpu,cpuacct:/a\n2:memory:/docker/b\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": str(4000 << 10),
        "sys/fs/cgroup/memory/memory.usage_in_bytes": str(1000 << 10),
        "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 0\n",
    }
    assert host_memory(write(tmp_path / "1", files)) == HostMemory(4000 << 10, 3000 << 10, 500 << 10)


def test_this_machine_has_memory() -> None:
    found = host_memory()
    assert 0 < found.free <= found.total


def test_folders_that_can_be_written(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "a" / "b"):
        check_folder("run.dir", str(path))
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "file/run", "link", "n" * 300):
        with pytest.raises(ConfigError, match=r"run\.dir = .*: cannot be used \("):
            check_folder("run.dir", str(tmp_path / name))


def test_buckets_that_keep_nothing(clip: Path) -> None:
    buckets = (BucketConfig(8, "64x64", keep=0.0), BucketConfig(99, "64x64"))
    found = look(clip, {}, data=DataConfig(frame_interval=2, buckets=buckets))
    require_usable(found)
    with pytest.raises(DataError, match=r"manifest\.csv: no clip goes to any of data\.buckets: let one that has"):
        require_kept(found)


def test_a_rate_that_is_a_slip_makes_no_length_a_negative_one(clip: Path) -> None:
    by_time = dataclasses.replace(DATA, frame_interval=1, fps=12.0)
    found = look(clip, {"fps": 1e-30}, data=by_time)
    assert found.usable == 1 and found.longest > 0


def test_clips_of_buckets(clip: Path) -> None:
    buckets = (
        BucketConfig(8, "256x256", ("16:9", "1:1"), keep=0.25),
        BucketConfig(8, "64x64", "square"),
        BucketConfig(1, "64x64"),
    )
    data = DataConfig(frame_interval=2, buckets=buckets)
    usual = {"num_frames": 16}
    found = look(
        clip, usual, usual, usual, usual, {**usual, "height": 240, "width": 240}, {**usual, "height": 60, "width": 60},
        {**usual, "height": 50, "width": 50}, {"num_frames": 15}, {"num_frames": 1}, {"path": "gone.mp4"}, data=data,
    )  # fmt: skip
    assert counts(found) == {
        "usable": 7, "missing": 1, "too short": 1, "too small": 1, "enlarged": 2, "not kept": 0,
    }  # fmt: skip
    require_usable(found)
    assert "7 of the clips" not in "".join(warnings(found))
    rows = bucket_rows(found, [2, 2, 4, 4], [(100, 40.0), (100, 40.0), (10, 1.0), (5, 0.5)])
    # To 192x344 go pictures of 256x456; to squares these (each cut to 256 of 456) and others that are squares already
    assert [(row.clips, row.enlarged, row.steps) for row in rows] == [
        (1, 0, 0.5), (0.25, 1, 0.125), (4.75, 1 / 4.75, 1.1875), (1, 0, 0.25),
    ]  # fmt: skip
    wide, square = 1 - (456 / 256) / (344 / 192), 1 - 256 / 456
    assert [row.cropped for row in rows] == pytest.approx([wide, 0, 3 * square / 4.75, square])
    assert [row.time for row in rows] == pytest.approx([part / 55.25 for part in (40, 10, 4.75, 0.5)])
    lines = [line.split() for line in bucket_table(found, rows)]
    assert lines[1] == ["8", "x", "192x344", "1", "10.0%", "0.0%", "0.6%", "2", "0.5", "100", "200", "72.4%"]
    assert lines[3] == ["8", "x", "64x64", "5", "47.5%", "21.1%", "27.7%", "4", "1.2", "10", "40", "8.6%"]
    assert len(lines) == 5
    packed = bucket_rows(found, [14], [(100, 40.0), (100, 40.0), (10, 1.0), (5, 0.5)])
    assert [(row.samples, row.steps) for row in packed] == [(2, 0.5), (0.5, 0.5), (9.5, 0.5), (2, 0.5)]
    assert [row.time for row in packed] == [row.time for row in rows]
    line = list(bucket_table(found, packed))[3].split()
    assert line[7:11] == ["9.5", "0.5", "10", "95"]
    with pytest.raises(DataError, match=r"1 clips have too few frames for all of data\.buckets, the longest has 15"):
        require_usable(look(clip, {"num_frames": 15}, data=data))
    by_time = dataclasses.replace(data, frame_interval=1, fps=12.0)
    assert look(clip, {"num_frames": 15}, {"num_frames": 14}, {"num_frames": 1, "fps": 0}, data=by_time).too_short == 1
    with pytest.raises(DataError, match=r"few frames at data\.fps = 12 for all .* has 7: give one num_frames of at "):
        require_usable(look(clip, {"num_frames": 14}, data=by_time))
    with pytest.raises(DataError, match=r"1 clips are too small for all of data\.buckets"):
        require_usable(look(clip, {"height": 9, "width": 9}, data=data))
    pictures = look(clip, {"fps": 24.0}, {"fps": 60.0}, {"num_frames": 1}, data=DataConfig(buckets=buckets[-1:]))
    assert counts(pictures)["usable"] == 3 and not pictures.rates  # of clips a frame, which does not move
    assert list(warnings(pictures)) == []
