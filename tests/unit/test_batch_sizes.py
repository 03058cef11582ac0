"""`python -m stages.buckets`: steps of equal time by formula, what bounds them, what is written, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from opensora_repro.config import ConfigError, load_config
from opensora_repro.config.edit import with_batch_sizes
from opensora_repro.data.buckets import Bucket
from opensora_repro.parallel.mesh import Mesh
from opensora_repro.planning.batch_sizes import TOLERANCE, Formula, balance, choose, entries_of
from opensora_repro.planning.gpus import find_gpu
from opensora_repro.training.measure import Bench, Line, OutOfMemory, Step, explore
from stages import buckets, plan
from tests.unit.test_plan import write_run

TEXT = """# a small model
[model]
hidden_size = 384  # S
num_heads = 6
depth = 12

[[data.buckets]]   # videos
num_frames = 16
resolution = "240p"
batch_size = 4   # by hand

[[data.buckets]]
num_frames = 16
resolution = "144p"
ratios = [
    "16:9",  # wide
    "1:1",
]
# pictures

[[data.buckets]]
num_frames = 1
resolution = "512"
batch_size=300

[train]
accumulation = 2
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(TEXT)
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert buckets.main([*arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("error: ")


# By formula


def test_planned_steps_take_about_the_same_time(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert buckets.main([str(config), "--plan", "--gpu", "4090", "--gpus", "2"]) == 0
    out = capsys.readouterr().out
    written = load_config(config.with_name("run-buckets.toml"))
    sizes = [bucket.batch_size for bucket in written.data.buckets]
    assert sizes[0] == 4 and sizes[1] > 4
    before = load_config(config)
    alike = [replace(b, batch_size=n) for b, n in zip(before.data.buckets, sizes, strict=True)]
    assert written == replace(before, data=replace(before.data, buckets=tuple(alike)))
    gpu, mesh = find_gpu("4090"), Mesh(0, 2)
    costs = [Formula(written, entry.bucket, mesh, gpu, 0.33) for entry in entries_of(written)]
    seconds = [cost.seconds(size) for cost, size in zip(costs, sizes, strict=True)]
    assert max(seconds) < 1.5 * min(seconds)
    assert all(cost.memory(size) <= gpu.usable_bytes for cost, size in zip(costs, sizes, strict=True))
    header, *rows = out.splitlines()[3:7]
    assert header.split("  ")[0] == "bucket" and "held by" in header
    assert rows[0].startswith("16 x 240p (440x232 of 17 ratios)") and " 6,720 " in rows[0] and "4 -> 4" in rows[0]
    assert f"300 -> {sizes[2]}" in rows[2] and rows[2].endswith("-")
    assert "a step has batch size x 2 (train.accumulation) x 2 data ranks samples" in out


def test_what_bounds_a_batch_size_is_told(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(config), "--plan", "--gpu", "4090"]
    assert buckets.main([*arguments, "--max-batch", "5", "--seconds", "5"]) == 0
    rows = capsys.readouterr().out.splitlines()[4:7]
    assert all("-> 5 " in row and row.endswith("--max-batch") for row in rows)
    assert buckets.main([*arguments, "--seconds", "0.001"]) == 0
    rows = capsys.readouterr().out.splitlines()[4:7]
    assert all("-> 1 " in row and row.endswith("  single samples") for row in rows)
    assert buckets.main([*arguments, "--memory", "23", "--seconds", "60"]) == 0
    rows = capsys.readouterr().out.splitlines()[4:7]
    assert all(row.endswith("  memory") for row in rows)
    cfg = load_config(config.with_name("run-buckets.toml"))
    for entry, bucket in zip(entries_of(cfg), cfg.data.buckets, strict=True):
        cost = Formula(cfg, entry.bucket, Mesh(0, 1), find_gpu("4090"), 0.33)
        assert cost.memory(bucket.batch_size) <= 23 * 2**30 < cost.memory(bucket.batch_size + 1)


class Even:
    """A second and a GiB a sample, or other numbers of them."""

    def __init__(self, seconds: float = 1.0, start: float = 0.0) -> None:
        self.each, self.start = seconds, start

    def seconds(self, batch_size: int) -> float:
        return self.start + self.each * batch_size

    def memory(self, batch_size: int) -> float:
        return 2.0**30 * batch_size


def test_choices_are_within_one_and_a_half_unless_bounded(config: Path) -> None:
    entry = entries_of(load_config(config))[0]
    for each in (0.013, 0.11, 0.29, 0.41, 0.49, 0.51, 0.65, 0.7, 0.82, 0.99, 1.2, 1.3):
        for start in (0.0, 0.2):
            cost = Even(each, start)
            found = choose(entry, cost, 1.0, 2.0**40, None)
            about = 1 / TOLERANCE <= cost.seconds(found.batch_size) <= TOLERANCE
            assert about == (found.held_by == ""), (each, start, found)
            assert about or found.batch_size <= 2
    assert choose(entry, Even(), 10.0, 7.5 * 2**30, None).held_by == "memory"
    assert choose(entry, Even(), 10.0, 7.5 * 2**30, None).batch_size == 7
    with pytest.raises(ConfigError, match=r"data\.buckets\[0\] \(16 x 440x232\): a step with one sample takes 1 GiB"):
        choose(entry, Even(), 10.0, 2.0**29, None)


def test_the_heaviest_bucket_sets_the_time(config: Path) -> None:
    """As much of its batch size as fits."""
    entries, told = entries_of(load_config(config)), []
    cost_of = lambda entry, aim, most: Even(entry.tokens / 1000)  # noqa: E731
    found = balance(entries, cost_of, 3.5 * 2**30, seconds=None, most=None, say=told.append)
    assert [choice.batch_size for choice in found] == [3, 3, 3]
    assert told == [
        "aim: 20.2 s a step, as of data.buckets[0] (16 x 440x232) at batch size 3, as 4 do not fit; "
        "at most 3.5 GiB a process"
    ]


def test_a_config_without_buckets_is_one_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "one.toml", tmp_path / "new" / "two.toml"
    path.write_text("[model]\nhidden_size = 384\nnum_heads = 6  # of 64\n")
    assert buckets.main([str(path), "--plan", "--out", str(out), "--max-batch", "3"]) == 0
    assert out.read_text() == path.read_text() + "\n[train]\nbatch_size = 3\n"
    assert "16 x 256x256" in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == [out.parent, path]


# What is written


def test_the_text_stays_as_it_is() -> None:
    expected = TEXT.replace("= 4 ", "= 7 ").replace("=300", "=90").replace("]\n# pic", "]\nbatch_size = 8\n# pic")
    assert with_batch_sizes(TEXT, [7, 8, 90]) == expected
    windows = TEXT.replace("\n", "\r\n")
    assert with_batch_sizes(windows, [7, 8, 90]) == expected.replace("\n", "\r\n")
    assert with_batch_sizes("[train]\n  batch_size = 1_0 # x", [3]) == "[train]\n  batch_size = 3 # x"
    for text in ("data.buckets = [{num_frames = 1, resolution = '256'}]", "train.batch_size = 3"):
        with pytest.raises(ConfigError, match="cannot be written into the config"):
            with_batch_sizes(text, [2])


def test_rows_of_buckets_stay_as_they_are() -> None:
    rows = """[data]
fps = 8.0
buckets = [  # two
    { num_frames = 1, resolution = "256", ratios = ["1:1", "3:2"], batch_size = 475, keep = 1.0 },  # pictures
    { num_frames = 16, resolution = "256" },
    { batch_size=2, num_frames = 32, resolution = "256" },
]

[train]
batch_size = 5
"""
    expected = rows.replace("475", "9").replace("batch_size=2", "batch_size=4")
    expected = expected.replace('16, resolution = "256" }', '16, resolution = "256", batch_size = 3 }')
    assert with_batch_sizes(rows, [9, 3, 4]) == expected
    assert with_batch_sizes(rows, [None, 3, 4]) == expected.replace("= 9,", "= 475,")
    one_line = "[data]\nbuckets = [{num_frames = 1, resolution = '256'}]\n"
    assert with_batch_sizes(one_line, [2]) == one_line.replace("'}", "', batch_size = 2 }")


@pytest.mark.parametrize("recipe", sorted(Path("configs").glob("[os]*/*.toml")), ids=str)
def test_every_recipe_can_be_written(recipe: Path, tmp_path: Path) -> None:
    cfg, path = load_config(recipe), tmp_path / "recipe.toml"
    path.write_text(with_batch_sizes(recipe.read_text(), [7] * (len(cfg.data.buckets) or 1)))
    written = load_config(path)
    assert {bucket.batch_size for bucket in written.data.buckets} <= {7}
    assert cfg.data.buckets or written.train.batch_size == 7


def test_a_bucket_that_keeps_no_clip_stays_as_it_is(config: Path) -> None:
    """It would set the time: its samples are the largest."""
    unused = TEXT.replace("batch_size = 4   # by hand", "keep = 0.0")
    config.write_text(unused)
    assert buckets.main([str(config), "--plan", "--gpu", "4090"]) == 0
    written = load_config(config.with_name("run-buckets.toml")).data.buckets
    assert written[0].batch_size == 0 and written[1].batch_size > 0
    assert [entry.key for entry in entries_of(load_config(config))] == [f"data.buckets[{i}].batch_size" for i in (1, 2)]


# Measured, as far as it can be without steps; tests/e2e/test_bucket_times.py makes some


class Made(Bench):
    """Steps of a second a sample on a device that holds so many."""

    def __init__(self, config: Path, room: int) -> None:
        self.cfg, self.room, self.asked = load_config(config), room, []
        self.engine = SimpleNamespace(mesh=Mesh(), device=SimpleNamespace(type="cpu"))

    def measure(self, bucket: Bucket, batch_size: int) -> Step:
        self.asked.append(batch_size)
        if batch_size > self.room:
            raise OutOfMemory
        return Step(0.5 + batch_size, (1 + batch_size) * 2.0**30)


def test_batch_sizes_double_until_the_time_or_the_memory_is_reached(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = entries_of(load_config(config))[1]
    for room, aim, limit, most, asked, fits in (
        (99, 9.0, 99, None, [1, 2, 4, 8, 16], 16),
        (99, 0.1, 99, None, [1, 2], 2),
        (99, 99.0, 99, 6, [1, 2, 4, 6], 6),
        (99, 99.0, 99, 1, [1], 1),
        (99, 99.0, 7.5, None, [1, 2, 4], 6),
        (5, 99.0, 99, None, [1, 2, 4, 8], 4),
    ):
        bench = Made(config, room)
        line = explore(bench, entry, aim=aim, limit=limit * 2**30, most=most)
        assert bench.asked == asked
        assert choose(entry, line, 99.0, limit * 2**30, most).batch_size == fits
    assert capsys.readouterr().out == (
        "data.buckets[1] (16 x 192x192): out of memory at batch size 8, goes on with 4\n"
    )
    assert [line.seconds(count) for count in (1, 3, 5)] == pytest.approx([1.5, 3.5, 5.5])
    for room, limit, expected in ((0, 9, "runs out of memory"), (9, 1.5, "takes 2 GiB, 1.5 GiB are given")):
        with pytest.raises(ConfigError, match=expected):
            explore(Made(config, room), entry, aim=9.0, limit=limit * 2**30, most=None)


def test_one_measured_batch_size_is_a_line_too() -> None:
    line = Line(a_sample=5.0)
    line.add(2, Step(3.0, 30.0))
    assert (line.seconds(4), line.memory(1)) == (6.0, 25.0)
    line.add(4, Step(2.5, 40.0))  # no sign of faster steps with more samples
    line.most = 9
    assert (line.seconds(9), line.memory(6)) == (3.0, 50.0)


def test_utilisation_of_a_run_in_buckets(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each step is counted by the tokens of its samples; sizes that the run does not have are passed over."""
    cfg, gpu = load_config(config), find_gpu("A100")
    lines = []
    for entry in entries_of(cfg):
        seconds = Formula(cfg, entry.bucket, Mesh(), gpu, 0.25).seconds(entry.bucket.batch_size)
        samples = entry.bucket.batch_size * 2
        line = {"samples": samples, "tokens": samples * entry.tokens, "seconds": seconds}
        lines += [line, {**line, "tokens": 7 * samples}]
    run = write_run(config.parent / "run", cfg, [*lines, *lines])
    assert plan.main([str(config), "--gpu", "A100", "--measured", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["time"]["utilisation"] == pytest.approx(0.25)


# Mistakes: one line, exit 2


def test_packed_steps_have_no_bucket(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text("[data]\npacking_tokens = 9000\n[[data.buckets]]\nnum_frames = 1\nresolution = '256'\n")
    assert "data.packing_tokens = 9000: expected 0, to write a batch size" in refused(capsys, str(config), "--plan")
    run = write_run(config.parent / "run", load_config(config), [])
    assert plan.main([str(config), "--measured", str(run)]) == 2
    assert "the run's steps are packed (data.packing_tokens)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--gpu", "H100"], "--gpu is for --plan"),
        (["--plan", "--gpu", "H101"], "did you mean H100"),
        (["--plan", "--memory", "0.5"], "data.buckets[0] (16 x 440x232): a step with one sample takes "),
        (["--plan", "--memory", "0"], "--memory 0: expected more than 0"),
        (["--plan", "--seconds", "nan"], "--seconds nan: expected more than 0"),
        (["--plan", "--utilisation", "33"], "--utilisation 33: expected a share above 0, at most 1"),
        (["--plan", "--max-batch", "0"], "--max-batch 0: expected at least 1"),
        (["--plan", "--gpus", "3", "parallel.engine=colossalai", "parallel.plugin=zero2", "parallel.sp_size=2",
          "data.num_frames=16"], "parallel.sp_size = 2: there are only 1 latent frames"),
        (["data.buckets=[]"], "override data.buckets: expected [[data.buckets]] in the config"),
        (["data.bukets=[]"], "did you mean data.buckets"),
        (["data.manifest=x.parquet", "vae.path=nowhere"], "nowhere"),
    ],
)  # fmt: skip
def test_mistakes(arguments: list[str], expected: str, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in refused(capsys, str(config), *arguments)
    assert list(config.parent.iterdir()) == [config]


def test_a_config_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "config no.toml: cannot be read" in refused(capsys, "no.toml", "--plan")
