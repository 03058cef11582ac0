"""What clips cost: the benchmark's arithmetic, the plan that is made of it, and the files that start a cluster."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import av
import pytest
import yaml

from benchmarks import curation
from data_tools import plan
from opensora_repro.data.write import write_video
from tests.made_pictures import moving

REPO = Path(__file__).resolve().parents[2]
ROUNDS = [
    {
        "probe": {"cpu_seconds": 2.0, "start_cpu_seconds": 1.0},
        "split": {"cpu_seconds": seconds, "start_cpu_seconds": 2.0, "clips": 12},
        "score": {"cpu_seconds": 13.0, "start_cpu_seconds": 3.0, "clips": 12},
        "filter": {"cpu_seconds": 1.0, "start_cpu_seconds": 1.0, "clips": 9},
        "decode": {"cpu_seconds": 7.0, "start_cpu_seconds": 1.0, "clips": 0},
        "video2dataset": {"missing": "No module named 'video2dataset'"},
    }
    for seconds in (21.0, 500.0, 20.0)
]


def written(folder: Path) -> Path:
    """What the benchmark writes of a minute of footage."""
    path = folder / "curation.json"
    path.write_text(json.dumps({"footage": {"720p": curation.summary(ROUNDS, 60.0, 0.04)}}))
    return path


def test_rates_are_medians_without_the_starts() -> None:
    found = curation.summary(ROUNDS, 60.0, 0.04)
    assert found["tools"]["split"]["cpu_seconds"] == 21.0
    assert found["tools"]["split"]["footage_minutes_per_core_hour"] == round(60 / 19 * 60, 1)
    assert found["line"]["cpu_seconds"] == 37.0 and found["line"]["start_cpu_seconds"] == 7.0
    assert found["line"]["footage_minutes_per_core_hour"] == 120 and found["line"]["clips_per_core_hour"] == 1440
    assert found["million_clips"] == {"core_hours": 694.4, "cost": 27.78}
    assert found["others"]["decode"]["footage_minutes_per_core_hour"] == 600
    assert "No module named" in found["others"]["video2dataset"]["missing"]


def test_footage_that_takes_no_time_has_no_rates() -> None:
    idle = {tool: {"cpu_seconds": 1.0, "start_cpu_seconds": 1.0, "clips": 1} for tool in curation.TOOLS}
    found = curation.summary([idle], 0.5, 0.04)
    report = curation.report({"footage": {"blink": found}, "price": 0.04})
    assert "blink: too short to tell what a million clips take" in report


def test_a_plan_follows_from_the_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["100", "--measured", str(written(tmp_path)), "--cores", "10", "--used", "1"]
    assert plan.main([*options, "--price-per-core-hour", "0.1"]) == 0
    told = capsys.readouterr().out
    assert "about 72,000 clips" in told
    assert "50.0 core hours\non 10 cores: 5.0 hours\ncost: 5.00, 69.44 a million clips" in told
    assert plan.main([*options, "--gpu-seconds", "2", "--gpus", "4", "--price-per-gpu-hour", "3"]) == 0
    told = capsys.readouterr().out
    assert "40.0 GPU hours\non 10 cores, then 4 GPUs: 15.0 hours\ncost, without cores: 120.00" in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--cores", "0"], "--cores 0: expected at least 1"),
        (["--used", "2"], "--used 2.0: expected more than 0"),
        (["--price-per-gpu-hour", "-1"], "--price-per-gpu-hour -1.0: expected 0 or more"),
        (["--price-per-gpu-hour", "1"], "--price-per-gpu-hour: expected --gpu-seconds with it"),
        (["--footage", "8k"], "--footage 8k: "),
        (["--measured", "nothing.json"], "python -m benchmarks.curation makes it"),
        (["--measured", "README.md"], "expected what python -m benchmarks.curation writes"),
    ],
)
def test_mistakes_of_a_plan(
    options: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPO)
    assert plan.main(["10", "--measured", str(written(tmp_path)), *options]) == 2
    assert told in capsys.readouterr().err


def test_the_first_seconds_of_a_video_are_taken(tmp_path: Path) -> None:
    frames = moving([(3.0, 0.0)] * 29, 32, 48)
    write_video(tmp_path / "whole.mp4", frames[..., None].repeat(3, axis=3), 10.0)
    assert curation.take(tmp_path / "whole.mp4", tmp_path / "all.mp4", 0) == pytest.approx(3.0, abs=0.11)
    assert curation.take(tmp_path / "whole.mp4", tmp_path / "some.mp4", 1.5) == pytest.approx(1.5, abs=0.31)
    with av.open(str(tmp_path / "some.mp4")) as made:
        assert 12 <= sum(1 for _ in made.decode(video=0)) <= 18


@pytest.mark.exhaustive
def test_the_benchmark_measures_every_tool(tmp_path: Path) -> None:
    frames = moving([(1.0, 0.0)] * 39, 64, 96)  # one shot: most of what it shows stays
    write_video(tmp_path / "film.mp4", frames[..., None].repeat(3, axis=3), 10.0)
    kept: list[dict] = []
    args = argparse.Namespace(seconds=0, rounds=1, ours=True, price_per_core_hour=1.0)
    curation.measure({"film": tmp_path / "film.mp4"}, args, lambda found: kept.append(json.loads(json.dumps(found))))
    (found,) = kept
    film = found["footage"]["film"]
    assert film["clips"] == 1 and film["others"]["decode"]["cpu_seconds"] > 0
    assert all(side["cpu_seconds"] > 0 for side in film["tools"].values())
    assert "a million clips of film" in curation.report({**found, "price": 1.0})


def test_the_ray_file_is_as_ray_wants_it() -> None:
    util = pytest.importorskip("ray.autoscaler._private.util")
    config = yaml.safe_load((REPO / "configs/cluster/ray.yaml").read_text(encoding="utf-8"))
    prepared = util.prepare_config(config)
    util.validate_config(prepared)
    assert prepared["max_workers"] == len(config["provider"]["worker_ips"])


def test_the_kuberay_manifest_runs_the_pipeline() -> None:
    job = yaml.safe_load((REPO / "configs/cluster/kuberay.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["spec"]["entrypoint"].endswith("run.runner=ray run.address=auto")
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]} <= volumes
