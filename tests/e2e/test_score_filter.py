"""The tools that measure and choose clips, through their commands, on small clips."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from benchmarks import tables
from data_tools import deduplicate, score
from data_tools import filter as filter_tool
from opensora_repro.config import read_toml
from opensora_repro.data.write import write_png, write_video
from tests.frames import read_manifest, read_table, write_manifest
from tests.made_pictures import moving, texture
from tests.tiny_models import make_tiny_clip, make_tiny_image_encoder

FPS = 8.0


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fast clip, a slow one, a smaller copy of the fast one, a black one, an image, and a broken file."""
    root = tmp_path_factory.mktemp("clips")
    fast, slow = (moving([(step, 0.0)] * 29, 64, 96) for step in (3.0, 0.5))
    pictures = {"fast": fast, "slow": slow, "small": fast[:, ::2, ::2], "black": np.zeros_like(fast)}
    rows = []
    for name, frames in pictures.items():
        write_video(root / f"{name}.mp4", np.repeat(frames[..., None], 3, axis=3), FPS)
        rows.append({"id": name, "path": str(root / f"{name}.mp4"), "caption": f"a {name} clip", "num_frames": 30,
                     "fps": FPS, "height": frames.shape[1], "width": frames.shape[2]})  # fmt: skip
    (root / "broken, 'x'.mp4").write_bytes(b"\0" * 500)
    rows.append(rows[0] | {"id": "broken", "path": str(root / "broken, 'x'.mp4")})
    rows.append(rows[0] | {"id": "gone", "path": str(root / "gone.mp4"), "caption": ""})
    write_manifest(pd.DataFrame(rows), root / "manifest.parquet")
    return root / "manifest.parquet"


@pytest.fixture(scope="module")
def scored(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scored")
    assert score.main([str(clips), "--out", str(out), "--workers", "1"]) == 0
    return out / "manifest.parquet"


@pytest.fixture(scope="module")
def clip_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_clip(tmp_path_factory.mktemp("clip"))


def stamps(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def test_scores_become_columns(scored: Path) -> None:
    table = read_manifest(scored, need_captions=False).set_index("id")
    assert table.index.tolist() == ["fast", "slow", "small", "black"]
    assert table.loc["fast", "motion"] == pytest.approx(3 / 64 * FPS, rel=0.15)
    assert table.loc["slow", "motion"] == pytest.approx(0.5 / 64 * FPS, rel=0.2)
    assert table["black_share"].tolist() == [0, 0, 0, 1]
    assert table["static_share"].tolist() == [0, 0, 0, 1]
    assert table["duplicate"].tolist() == [False, False, True, False]
    assert table["duplicate_group"].iloc[[0, 2]].tolist() == ["fast", "fast"]
    assert table["duplicate_group"].iloc[[1, 3]].isna().all()
    assert all(Path(path).is_file() for path in table["path"])
    rejects = read_table(scored.parent / "rejects.parquet")
    assert rejects["id"].tolist() == ["broken", "gone"] and set(rejects["stage"]) == {"score"}
    assert rejects["reason"].tolist()[1] == "no such file"


def test_the_pipelines_filter_keeps_what_moves_little_and_drops_what_stands_still(tmp_path: Path) -> None:
    """A fixed camera that sees one small thing, slow or quick; a still with a sensor's noise; two slides."""
    pipeline = Path(__file__).parents[2] / "configs" / "data" / "pipeline.toml"
    keep = read_toml(pipeline)["filter"]["keep"]
    wide = np.repeat(texture(180, 5 * 320)[..., None], 3, axis=2)
    scenes = [np.repeat(wide[None, :, 320 * i : 320 * (i + 1)], 60, axis=0) for i in range(5)]
    films = dict(zip(("slow", "quick", "still"), scenes, strict=False))
    for name, side, pace in (("slow", 6, 0.5), ("quick", 4, 2.0)):
        for number, frame in enumerate(films[name]):
            at = 40 + round(number * pace)
            frame[100 : 100 + side, at : at + side] = (255, 0, 0)
    noise = np.random.default_rng(0).integers(-2, 3, films["still"].shape)
    films["still"] = (films["still"] + noise).clip(0, 255).astype(np.uint8)
    films["slides"] = np.concatenate([scene[:30] for scene in scenes[3:]])
    rows = []
    for name, frames in films.items():
        write_video(tmp_path / f"{name}.mp4", frames, 25.0)
        rows.append({"id": name, "path": str(tmp_path / f"{name}.mp4"), "caption": "", "num_frames": len(frames),
                     "fps": 25.0, "height": 180, "width": 320})  # fmt: skip
    write_manifest(pd.DataFrame(rows), tmp_path / "clips.parquet")
    assert score.main([str(tmp_path / "clips.parquet"), "--out", str(tmp_path / "scored"), "--workers", "1"]) == 0
    rules = [option for rule in keep for option in ("--keep", rule)]
    scored = str(tmp_path / "scored" / "manifest.parquet")
    assert filter_tool.main([scored, *rules, "--thumbnails", "0", "--out", str(tmp_path / "good")]) == 0
    kept = read_manifest(tmp_path / "good" / "manifest.parquet", need_captions=False)
    assert kept["id"].tolist() == ["slow", "quick"]


def test_scoring_again_measures_only_what_is_new(clips: Path, scored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = stamps(scored.parent)
    assert score.main([str(clips), "--out", str(scored.parent), "--workers", "1"]) == 0
    assert stamps(scored.parent) == before


def test_a_changed_formula_is_another_record() -> None:
    from opensora_repro.data.score.measure import SCORES, methods_of

    assert set(score.NAMES) == set(SCORES)
    assert methods_of(["motion"]) != methods_of(["motion", "text"])


def test_a_model_adds_its_scores(clips: Path, clip_model: Path, tmp_path: Path) -> None:
    channels = json.loads((clip_model / "config.json").read_text())["projection_dim"]
    generator = torch.Generator().manual_seed(0)
    head = {"layers.0.weight": torch.randn(4, channels, generator=generator), "layers.0.bias": torch.ones(4),
            "layers.2.weight": torch.randn(1, 4, generator=generator), "layers.2.bias": torch.ones(1)}  # fmt: skip
    save_file(head, tmp_path / "head.safetensors")
    options = [str(clips), "--scores", "brightness, duplicates", "--workers", "1", "--batch-size", "3"]
    options += ["--clip", str(clip_model), "--aesthetic", str(tmp_path / "head.safetensors")]
    assert score.main([*options, "--out", str(tmp_path / "out")]) == 0
    table = read_manifest(tmp_path / "out" / "manifest.parquet", need_captions=False).set_index("id")
    assert table["aesthetic"].notna().all() and table["aesthetic"].nunique() > 1
    assert table["text_match"].between(-1, 1).all()
    assert "motion" not in table.columns and "embedding" not in table.columns and "code" not in table.columns
    before = stamps(tmp_path / "out")
    assert score.main([*options, "--out", str(tmp_path / "out")]) == 0
    assert stamps(tmp_path / "out") == before
    assert score.main([*options, "--batch-size", "1", "--out", str(tmp_path / "one")]) == 0
    alone = read_manifest(tmp_path / "one" / "manifest.parquet", need_captions=False).set_index("id")
    assert alone["text_match"].tolist() == pytest.approx(table["text_match"].tolist(), abs=1e-5)
    assert alone["aesthetic"].tolist() == pytest.approx(table["aesthetic"].tolist(), abs=1e-4)


def test_an_image_encoder_of_the_hub_tells_near_duplicates(tmp_path: Path) -> None:
    """From the hub's cache alone: flat pictures of about one colour, which have no low frequencies to compare."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    rows = []
    for name, image in (("flat", 0 * noise + 200), ("noise", noise), ("alike", 0 * noise + 203)):
        write_png(tmp_path / f"{name}.png", image)
        rows.append({"id": name, "path": str(tmp_path / f"{name}.png"), "caption": "", "num_frames": 1, "fps": 0.0,
                     "height": 48, "width": 64})  # fmt: skip
    manifest = tmp_path / "in.parquet"
    write_manifest(pd.DataFrame(rows), manifest)
    cached = tmp_path / "hub" / "models--timm--tiny"
    make_tiny_image_encoder(cached / "snapshots" / "0123abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123abc")
    options = [str(manifest), "--scores", "duplicates", "--workers", "1"]
    assert score.main([*options, "--out", str(tmp_path / "plain")]) == 0
    command = [
        sys.executable,
        "-m",
        "data_tools.score",
        *options,
        "--embed",
        "timm/tiny",
        "--cosine",
        "0.99",  # random weights: all pictures lie in a cone
        "--out",
        str(tmp_path / "out"),
    ]
    subprocess.run(command, check=True, env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"})
    groups = {
        name: read_manifest(tmp_path / name / "manifest.parquet", need_captions=False)["duplicate"].tolist()
        for name in ("plain", "out")
    }
    assert groups == {"plain": [False, False, False], "out": [False, False, True]}


def test_score_mistakes(clips: Path, clip_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"weight": torch.zeros(1, 3)}, tmp_path / "wrong.safetensors")
    for options, message in (
        (["--scores", "motion,nose"], "no score 'nose'"),
        (["--aesthetic", "x"], "--aesthetic needs --clip"),
        (["--clip", str(tmp_path / "nothing")], "--clip="),
        (["--clip", str(clip_model), "--aesthetic", str(tmp_path / "wrong.safetensors")], "not a linear head"),
        (["--embed", str(clip_model)], "cannot be loaded as a timm model"),
        (["--embed", "timm/unknown"], "hf download timm/unknown"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--out", str(clips.parent)], "the manifest's own folder"),
    ):
        arguments = [str(clips), "--scores", "brightness", "--workers", "1", "--out", str(tmp_path / "out"), *options]
        assert score.main(arguments) == 2
        told = capsys.readouterr().err.splitlines()
        assert message in told[-1] and told[-1].startswith("error: ")


def test_nothing_scored_is_an_error(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = read_manifest(clips, need_captions=False).query("id == 'gone'")
    write_manifest(broken, tmp_path / "manifest.parquet")
    options = ["--scores", "motion", "--workers", "1", "--out", str(tmp_path / "out")]
    assert score.main([str(tmp_path / "manifest.parquet"), *options]) == 2
    assert "no clip could be scored" in capsys.readouterr().err
    assert len(read_table(tmp_path / "out" / "rejects.parquet")) == 1


# ---------------------------------------------------------------------------------------------------------------------
# filter


def run_filter(manifest: Path, out: Path, *rules: str) -> dict:
    assert filter_tool.main([str(manifest), "--out", str(out), *rules]) == 0
    return json.loads((out / "filter.json").read_text(encoding="utf-8"))


def test_filter_keeps_reports_and_shows(scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "out"
    rules = ("--keep", "motion > 0.2 and not duplicate", "--percentile", "brightness >= 30%")
    report = run_filter(scored, out, *rules)
    kept = read_manifest(out / "manifest.parquet", need_captions=False)
    assert kept["id"].tolist() == ["fast"] and Path(kept["path"][0]).is_file()
    rejects = read_table(out / "rejects.parquet")
    assert all((out / path).is_file() for path in rejects["path"])
    assert rejects[["id", "stage", "reason"]].to_dict("records") == [
        {"id": "slow", "stage": "filter", "reason": "motion > 0.2"},
        {"id": "small", "stage": "filter", "reason": "not duplicate"},
        {"id": "black", "stage": "filter", "reason": "motion > 0.2"},
    ]
    assert (report["rows"], report["kept"], report["dropped"]) == (4, 1, 3)
    assert [rule["dropped_alone"] for rule in report["rules"]] == [2, 1]
    assert [rule["dropped_in_order"] for rule in report["rules"]] == [2, 1]
    told = capsys.readouterr().out
    assert "1 of 4 rows kept" in told
    assert "4 rows are too few for a percentile (50): nothing drops by brightness >= 30%" in told
    sheets = sorted(path.name for path in (out / "thumbnails").iterdir())
    assert sheets == ["01-motion-0-2.png"]
    before = stamps(out)
    run_filter(scored, out, *rules)
    assert {name: s for name, s in stamps(out).items() if "thumb" not in name} == {
        name: s for name, s in before.items() if "thumb" not in name
    }


def test_filter_reads_csv_and_odd_paths(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    paths = ["x/one.mp4", "../two.mp4", "three, 'three'.mp4", "x/./y/../four.mp4"]
    frame = pd.DataFrame(
        {"id": ["0", "NA", "2", "3"], "path": paths, "caption": ["c"] * 4, "num_frames": [8, 9, 10, 11]}
    )
    for name in ("m.csv", "m.parquet"):
        (frame.to_csv if name.endswith("csv") else frame.to_parquet)(tmp_path / "a" / name, index=False)
        report = run_filter(
            tmp_path / "a" / name, tmp_path / "b" / "c", "--keep", "num_frames > 7", "--thumbnails", "2"
        )
        assert report["kept"] == 4
        kept = read_table(tmp_path / "b" / "c" / "manifest.parquet")
        assert kept["id"].tolist() == ["0", "NA", "2", "3"]
        assert kept["path"].tolist() == [
            "../../a/x/one.mp4", "../../two.mp4", "../../a/three, 'three'.mp4", "../../a/x/four.mp4"
        ]  # fmt: skip


def test_filter_percentile_is_numpys(tmp_path: Path) -> None:
    values = np.random.default_rng(0).gamma(2, 1, 150_000)
    values[::10] = np.nan
    table = pa.table({"id": [str(n) for n in range(len(values))], "score": values})
    pq.write_table(table, tmp_path / "m.parquet", row_group_size=40_000)
    report = run_filter(tmp_path / "m.parquet", tmp_path / "out", "--percentile", "score * 2 < 12.5 %")
    assert report["rules"][0]["threshold"] == np.nanpercentile(values * 2, 12.5)
    assert report["kept"] == int((values * 2 < np.nanpercentile(values * 2, 12.5)).sum())
    assert report["rules"][0]["missing"] == 15_000


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (["--keep", "moton > 1"], "no column moton, did you mean motion?"),
        (["--keep", "motion"], "must be true or false"),
        (["--keep", "1 < 2"], "names no column"),
        (["--percentile", "motion > 10"], "expected a column, <, <=, > or >="),
        (["--percentile", "motion > 101%"], "expected a column, <, <=, > or >="),
        (["--percentile", "caption > 10%"], "is text"),
        ([], "no rule given"),
        (["--keep", "motion > 1e9"], "no row passed the rules"),
    ],
)
def test_filter_mistakes(
    scored: Path, tmp_path: Path, rules: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert filter_tool.main([str(scored), "--out", str(tmp_path / "out"), *rules]) == 2
    told = capsys.readouterr().err
    assert message in told and told.splitlines()[-1].startswith("error: ")


def test_filter_memory_does_not_grow_with_the_manifest(tmp_path: Path) -> None:
    """A manifest ten times as long needs hardly more memory: bounded, whatever the libraries take."""
    peaks = []
    for rows in (20_000, 200_000):
        folder = tmp_path / str(rows)
        folder.mkdir()
        tables.make_manifest(folder / "manifest.parquet", rows)
        options = [str(folder / "manifest.parquet"), "--out", str(folder / "out"), *tables.FILTER, "--thumbnails", "0"]
        measured = tables.measure("data_tools.filter", options, rows)
        peaks.append(measured["peak_rss_mb"])
        report = json.loads((folder / "out" / "filter.json").read_text())
        assert report["rows"] == rows == report["kept"] + len(read_table(folder / "out" / "rejects.parquet"))
    assert peaks[1] < 600 and peaks[1] - peaks[0] < 150


def test_filter_by_its_command(scored: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data_tools.filter", str(scored), "--out", str(tmp_path), "--keep", "fps > 1"]
    done = subprocess.run([*command, "--thumbnails", "0"], capture_output=True, text=True)
    assert done.returncode == 0 and "4 of 4 rows kept" in done.stdout, done.stderr


def test_a_folder_is_probed_first(clips: Path, tmp_path: Path) -> None:
    folder = clips.parent
    assert score.main([str(folder), "--out", str(tmp_path / "a"), "--scores", "motion", "--workers", "1"]) == 0
    measured = read_table(tmp_path / "a" / "manifest.parquet").set_index("source")
    assert set(measured.index) == {"fast.mp4", "slow.mp4", "small.mp4", "black.mp4"}
    assert measured.loc["fast.mp4", "motion"] > 2 * measured.loc["slow.mp4", "motion"]
    assert measured.loc["small.mp4", "height"] == 32 and "duration" in measured
    refused = read_table(tmp_path / "a" / "probe" / "rejects.parquet")
    assert refused["source"].tolist() == ["broken, 'x'.mp4"]

    table = tmp_path / "names.csv"
    pd.DataFrame({"path": [str(folder / "fast.mp4"), str(folder / "small.mp4")]}).to_csv(table, index=False)
    assert filter_tool.main([str(table), "--out", str(tmp_path / "b"), "--keep", "height > 40"]) == 0
    (row,) = read_manifest(tmp_path / "b" / "manifest.parquet", need_captions=False).to_dict("records")
    assert Path(row["path"]) == folder / "fast.mp4" and row["num_frames"] == 30


def test_embeddings_of_score_are_what_deduplicate_reads(
    clips: Path, clip_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [str(clips), "--scores", "brightness", "--workers", "1", "--clip", str(clip_model)]
    assert score.main([*options, "--out", str(tmp_path / "scored")]) == 0
    written = pq.read_table(tmp_path / "scored" / "embeddings.parquet")
    assert written["id"].to_pylist() == ["fast", "slow", "small", "black"]
    vectors = {"fast": [1.0, 0.0], "slow": [0.0, 1.0], "small": [1.0, 0.1], "other": [1.0, 0.0]}  # of a known model
    known = tmp_path / "known.parquet"
    pq.write_table(pa.table({"id": list(vectors), "embedding": list(vectors.values())}), known)
    command = [str(tmp_path / "scored" / "manifest.parquet"), "--out", str(tmp_path / "out"), "--embeddings"]
    assert deduplicate.main([*command, str(known)]) == 0
    told = capsys.readouterr().out
    assert "1 clips have no embedding, or one of zeros or NaN: they stay" in told and "3 of 4 rows kept" in told
    assert read_manifest(tmp_path / "out" / "manifest.parquet")["id"].tolist() == ["fast", "slow", "black"]
    (reject,) = pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()
    assert (reject["id"], reject["duplicate_of"], reject["kept"]) == ("small", "fast", "fast")
    assert reject["reason"] == "near-duplicate of fast (cosine 0.995)" and reject["stage"] == "deduplicate"
    counts = json.loads((tmp_path / "out" / "deduplicate.json").read_text())
    assert (counts["groups"], counts["dropped"], counts["without_embedding"]) == (1, 1, 1)
    before = stamps(tmp_path / "out")
    assert deduplicate.main([*command, str(known)]) == 0 and stamps(tmp_path / "out") == before
    assert deduplicate.main([*command, str(known), "--cosine", "0.999"]) == 0
    assert pq.read_metadata(tmp_path / "out" / "manifest.parquet").num_rows == 4
    assert deduplicate.main([*command, str(known), "--cosine", "2"]) == 2
    assert deduplicate.main([*command, str(tmp_path / "nothing.parquet")]) == 2
    assert "nothing.parquet: no such file" in capsys.readouterr().err
    assert deduplicate.main([*command, str(tmp_path / "scored" / "embeddings.parquet")]) == 0
