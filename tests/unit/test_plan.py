"""`python -m stages.plan`: what it prints, the layouts it finds, the utilisation it reads, what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from opensora_repro.config import Config, ConfigError, TrainConfig, dump_toml, load_config
from opensora_repro.config.renew import kind_of, recipes
from opensora_repro.models.config import SIZES
from opensora_repro.parallel.mesh import Mesh
from opensora_repro.planning.encoders import frozen_sizes
from opensora_repro.planning.flops import forward_products
from opensora_repro.planning.gpus import GPUS, find_gpu, gpu_of_device
from opensora_repro.planning.memory import needed_memory, step_memory
from opensora_repro.planning.parameters import count_parameters
from opensora_repro.planning.sizes import latent_shape, token_grid
from stages import weights
from stages.plan import PUBLISHED_UTILISATION, main

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = [path for path in recipes(CONFIGS) if kind_of(path) is Config]
LONG = str(CONFIGS / "stage2_64x512x512.toml")
CHANGED = r"with ((?:\w+\.\w+=\w+ )*\w+\.\w+=\w+),?(?: as the release ran,)? (\d+) GiB on 8"
SMALL_RECIPES = sorted((CONFIGS / "small").glob("*.toml"))
SMALL = str(CONFIGS / "demo" / "stage2.toml")


def header(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n[")[0]


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert not captured.err
    budget: dict[str, Any] = json.loads(captured.out)
    return budget


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main([*arguments]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


# What it says


def test_a_published_recipe_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--gpu", "H100", "--gpus", "64", "--clips", "400000", "--utilisation", "0.5", "--price-per-gpu-hour", "2"]
    assert main([LONG, *words]) == 0
    out = capsys.readouterr().out
    assert "parameters  759,620,768" in out
    assert "64 x 512x512 -> latents 4x64x64x64 -> 65,536 tokens" in out
    assert "256 samples, 16,777,216 tokens" in out
    assert "12.8 epochs" in out
    assert "count a multiplication and its addition as two" in out
    for part in ("weights", "gradients", "optimizer", "average", "activations", "encoders"):
        assert f"\n  {part}" in out
    assert "50% of the peak of 64 x H100 in model FLOPs (given)" in out
    assert "minutes of video" in out
    assert "smallest that fits: parallel.engine=torch parallel.plugin=ddp" in out
    assert max(map(len, out.splitlines())) < 180


def test_the_arithmetic_hangs_together(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, LONG, "--gpus", "16", "--utilisation", "0.25", "--price-per-gpu-hour", "3")
    work, time, sampling = found["work"], found["time"], found["inference"]
    cfg = load_config(LONG)
    products = forward_products(cfg.model, token_grid(cfg.model, latent_shape(cfg)))
    assert work["samples_a_step"] == 4 * 16
    assert work["step_flops"] == 64 * products.training_flops
    assert work["recomputed_flops"] == 64 * products.recomputed_flops("full")
    assert work["run_flops"] == 20000 * (work["step_flops"] + work["encoder_flops"])
    assert time["step_seconds"] * 16 * 989e12 * 0.25 == pytest.approx(work["step_flops"] + work["encoder_flops"])
    assert time["gpu_hours"] == pytest.approx(time["run_seconds"] * 16 / 3600)
    assert time["cost"] == pytest.approx(3 * time["gpu_hours"])
    assert time["tokens_a_second_a_gpu"] == pytest.approx(work["tokens_a_step"] / time["step_seconds"] / 16)
    assert sampling["evaluations"] == 200
    clip = 200 * products.forward_flops + frozen_sizes(cfg).decode_flops + frozen_sizes(cfg).text_flops
    assert sampling["clip_flops"] == pytest.approx(clip)
    assert sampling["break_even_clips"] == pytest.approx(work["run_flops"] / clip)
    assert sampling["video_minutes_a_gpu_hour"] == pytest.approx(3600 / sampling["clip_seconds"] * 8 / 60)


def test_overrides_sampler_and_strides_count(capsys: pytest.CaptureFixture[str]) -> None:
    one = planned(capsys, SMALL, "sample.guidance=1")["inference"]["evaluations"]
    two = planned(capsys, SMALL)["inference"]["evaluations"]
    assert (one, two) == (12, 24)
    sizes = ("data.num_frames=17", "data.height=128", "data.width=128", "model.patch_size=[1,1,1]")
    assert planned(capsys, SMALL, *sizes, "--strides", "4,8,8")["work"]["tokens_a_sample"] == 1280
    assert planned(capsys, SMALL, *sizes)["work"]["tokens_a_sample"] == 17 * 256


def test_encoded_clips_leave_encoders_out(capsys: pytest.CaptureFixture[str]) -> None:
    cached = planned(capsys, LONG, "data.draws=1", "data.cache=c", "sample.every=0")
    plain = planned(capsys, LONG)
    assert cached["work"]["encoder_flops"] == 0 < plain["work"]["encoder_flops"]
    memory = [found["configured"]["memory"] for found in (cached, plain)]
    assert memory[0]["encoders"] == 0 < memory[1]["encoders"]
    assert memory[0]["peak"] < memory[1]["peak"]


def test_a_run_of_pictures_counts_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(CONFIGS / "stage1_1x512x512.toml")]) == 0
    out = capsys.readouterr().out
    assert "pictures" in out
    assert "minutes of video" not in out


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_has_a_plan(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, str(path), "--gpus", "8")
    assert found["smallest"]


def names_a_card(path: Path) -> bool:
    return path.parent.name in (CONFIGS.name, "profiles", "small") or "--gpu " in header(path)


@pytest.mark.parametrize("path", filter(names_a_card, RECIPES), ids=lambda path: path.stem)
def test_every_recipe_fits_the_card_its_header_names(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a tenth to spare of what is usable, as it is: layout, batch, encoders beside the model."""
    (name,) = set(re.findall(r"--gpu (\S+)", header(path)))
    gpus = re.findall(r"--gpus (\d+)", header(path)) or ["1"]
    fit = planned(capsys, str(path), "--gpu", name, "--gpus", *gpus)["configured"]
    assert not fit["refused"]
    assert fit["memory"]["peak"] < 0.9 * find_gpu(name).usable_bytes


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("opensora_1_*/*.toml")), ids=lambda path: path.stem)
def test_recipes_of_1_1_and_1_2_take_what_their_header_says(path: Path) -> None:
    """Where 80 GB would be tight as it is, the header has changes with which a tenth is left."""
    told = header(path).replace("\n# ", " ")
    (as_it_is,) = re.findall(r"(\d+) GiB a GPU", told)
    usable, peaks = find_gpu("H100").usable_bytes, []
    for size, changes in [(as_it_is, ""), *((size, words) for words, size in re.findall(CHANGED, told))]:
        peaks.append(needed_memory(load_config(path, changes.split()), Mesh(0, 8), "cuda").peak)
        assert round(peaks[-1] / 2**30) == int(size)
    assert peaks[-1] < 0.9 * usable
    assert ("fits GPUs of 80 GB" in told) == (len(peaks) == 1)


def test_no_layout_is_offered_that_a_bucket_does_not_allow(capsys: pytest.CaptureFixture[str]) -> None:
    """A picture has no frames to share, nor have 17 frames enough for 8 processes, behind an autoencoder of time."""
    pictures, clips = (str(CONFIGS / name) for name in ("opensora_1_1/stage3.toml", "opensora_1_2/stage3.toml"))
    layouts = planned(capsys, pictures, "--gpus", "8")["layouts"]
    assert len({layout["parallel"]["sp_size"] for layout in layouts}) == 4
    assert all("only 1 latent frames" in fit["refused"] for fit in layouts if fit["parallel"]["sp_size"] > 1)
    bucket = (
        '{resolution="256", num_frames=17, keep=1.0, batch_size=1}, {resolution="256", num_frames=68, batch_size=1}'
    )
    layouts = planned(capsys, clips, f"data.buckets=[{bucket}]", "--gpus", "8")["layouts"]
    refused = {fit["parallel"]["sp_size"]: "only 5 latent frames" in fit["refused"] for fit in layouts}
    assert refused == {1: False, 2: False, 4: False, 8: True}


def test_memory_is_of_the_bucket_that_needs_the_most(capsys: pytest.CaptureFixture[str]) -> None:
    """Not of the one with the most pixels a step, where fewer of them are more to encode at once; the advice fits."""
    recipe = str(CONFIGS / "opensora_1_1/stage2.toml")
    heavy, large = (
        f'{{resolution="{size}", num_frames=16, batch_size={count}}}' for size, count in (("256", 60), ("720p", 2))
    )
    peaks = {}
    for name, buckets in (("heavy", heavy), ("large", large), ("both", f"{heavy}, {large}")):
        found = planned(capsys, recipe, f"data.buckets=[{buckets}]", "vae.micro_batch_size=32")
        peaks[name] = found["configured"]["memory"]["peak"], found["work"]["tokens_a_step"]
    assert peaks["heavy"][0] < peaks["large"][0] == peaks["both"][0]
    assert peaks["large"][1] < peaks["heavy"][1] == peaks["both"][1]
    assert main([recipe, f"data.buckets=[{heavy}, {large}]", "vae.micro_batch_size=64", "--gpu", "4090"]) == 0
    assert "none fits on 1 x RTX-4090: lower the batch_size of data.buckets, or lower vae" in capsys.readouterr().out


@pytest.mark.parametrize("path", SMALL_RECIPES, ids=lambda path: path.stem)
def test_small_recipes_take_what_their_header_says(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ((arguments, told),) = re.findall(r"python -m stages\.plan (.*?) +# (.*)", header(path))
    config, *options = arguments.split()
    assert main([str(CONFIGS.parent / config), *options]) == 0
    out = capsys.readouterr().out
    peak, step, run = re.fullmatch(r"(\S+ GiB) at most; a step (\S+ s), the run (\S+ \w+)", told).groups()
    assert re.search(rf"at most +{peak} ", out)
    assert re.search(rf"a step +{step};", out)
    assert re.search(rf"the run +{run},", out)
    fit = planned(capsys, str(path), "--gpu", "RTX-4060", "train.activation_checkpointing=full")["configured"]
    assert fit["memory"]["peak"] < 0.9 * find_gpu("RTX-4060").usable_bytes  # 8 GB, the larger model's, too


def test_model_sizes_are_printed_as_the_documentation_has_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert weights.main(["models"]) == 0
    out = capsys.readouterr().out
    assert out in (CONFIGS.parent / "docs/training.md").read_text(encoding="utf-8")
    assert SIZES == {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
    assert "XL/2         1152     28         16   610,856,096   759,620,768" in out  # the published ones


# Layouts


def test_layouts_from_the_simplest_on(capsys: pytest.CaptureFixture[str]) -> None:
    """On small cards the weights do not fit in one place, and the plan says what each layout would need."""
    changes = ("train.batch_size=1", "data.cache=c", "data.draws=1", "sample.every=0")
    found = planned(capsys, LONG, *changes, "--gpu", "4090", "--gpus", "8")
    layouts = {layout["overrides"]: layout for layout in found["layouts"]}
    ddp = layouts["parallel.engine=torch parallel.plugin=ddp"]
    assert "needs" in ddp["refused"] and "GiB usable on a RTX-4090" in ddp["refused"]
    smallest = layouts[found["smallest"]]
    assert not smallest["refused"]
    usable = find_gpu("4090").usable_bytes
    assert smallest["memory"]["peak"] <= usable < ddp["memory"]["peak"]
    before = list(layouts.values())[: list(layouts).index(found["smallest"])]
    assert all(layout["refused"] for layout in before)


def test_impossible_layouts_say_why(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, LONG, "data.num_frames=3", "train.dtype=fp32", "--gpus", "12")
    why = {layout["overrides"]: layout["refused"] for layout in found["layouts"]}
    prefix = "parallel.engine=colossalai parallel.plugin="
    assert "only 3 latent frames" in why[prefix + "zero2 parallel.sp_size=4"]
    assert "12 processes are not divisible" in why[prefix + "hybrid parallel.tp_size=8"]


def test_where_nothing_fits_it_says_what_would_help(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (LONG, "train.batch_size=16", "vae.micro_batch_size=4", "--gpu", "A10")
    assert main([*arguments]) == 0
    out = capsys.readouterr().out
    assert "does NOT fit" in out
    assert "none fits on 1 x A10: lower train.batch_size" in out
    big = ("train.activation_checkpointing=none", "train.batch_size=1", "--gpu", "H100")
    assert main([LONG, *big]) == 0
    assert "with train.activation_checkpointing=selective parallel.engine=torch" in capsys.readouterr().out


def test_dry_run_and_plan_share_their_memory(capsys: pytest.CaptureFixture[str]) -> None:
    cfg = load_config(LONG)
    grid = token_grid(cfg.model, latent_shape(cfg))
    memory = step_memory(cfg, grid, count_parameters(cfg.model), frozen_sizes(cfg), Mesh(), encodes=True)
    assert planned(capsys, LONG)["configured"]["memory"]["peak"] == memory.peak


# GPUs


def test_gpus_by_any_spelling() -> None:
    for name, expected in {
        "H100": "H100", "h100 sxm": "H100", "NVIDIA H200": "H200", "a100": "A100-80GB", "A100-40GB": "A100-40GB",
        "GeForce RTX 4090": "RTX-4090", "3090": "RTX-3090", "Tesla T4": "T4", "v100": "V100-32GB", "l40s": "L40S",
    }.items():  # fmt: skip
        assert find_gpu(name).name == expected
    assert all(find_gpu(gpu.name) is gpu for gpu in GPUS)


def test_an_unknown_gpu_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'H1000' is not in the table; did you mean H100"):
        find_gpu("H1000")
    with pytest.raises(ConfigError, match=r"no bfloat16 arithmetic; plan with train\.dtype=fp32"):
        find_gpu("T4").peak("bf16")
    assert find_gpu("T4").peak("fp32") == pytest.approx(8.1e12)


# Measured utilisation


def write_run(folder: Path, cfg: Config, lines: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    (folder / "config.toml").write_text(dump_toml(cfg), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def test_utilisation_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run of two processes whose steps took as long as one at half of the peak."""
    cfg = load_config(LONG)
    steps = planned(capsys, LONG, "--gpu", "A100", "--gpus", "2", "--utilisation", "0.5")
    seconds, samples = steps["time"]["step_seconds"], steps["work"]["samples_a_step"]
    slow = [{"step": i, "samples": samples, "seconds": 50 * seconds} for i in (1, 2)]
    lines = slow + [{"step": i, "samples": samples, "seconds": seconds} for i in (3, 4, 5)]
    run = write_run(tmp_path / "run", cfg, lines)
    for path in (run, run / "metrics.jsonl"):
        time = planned(capsys, SMALL, "--gpu", "A100", "--measured", str(path))["time"]
        assert time["utilisation"] == pytest.approx(0.5)
        assert time["utilisation_from"].endswith("metrics.jsonl")
    other = write_run(tmp_path / "other", Config(train=TrainConfig(dtype="fp32")), lines)
    assert "of the peak of T4: name the GPU" in refused(capsys, SMALL, "--gpu", "T4", "--measured", str(other))


def test_utilisation_of_a_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = load_config(LONG)
    grid = token_grid(cfg.model, (4, 16, 32, 32))
    rate = 0.3 * 989e12 / (forward_products(cfg.model, grid).training_flops / grid.tokens)
    row = {"parameters": 759_620_768, "latents": [8, 4, 16, 32, 32], "tokens_per_second": rate}
    others = [{"parameters": 5, "latents": [1, 4, 1, 8, 8], "tokens_per_second": 9e9}, {"tokens_per_second": 7}]
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"checks": {"a": row, "b": others}}))
    assert planned(capsys, LONG, "--measured", str(path))["time"]["utilisation"] == pytest.approx(0.3)
    path.write_text(json.dumps({"checks": others}))
    assert "no row with tokens_per_second and latents" in refused(capsys, LONG, "--measured", str(path))


def test_another_kind_of_device_tells_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = load_config(LONG)
    seconds = planned(capsys, LONG, "--gpu", "A100", "--utilisation", "0.5")["time"]["step_seconds"]
    lines = [{"step": i, "samples": 4, "seconds": seconds} for i in range(1, 6)]
    run = write_run(tmp_path / "run", cfg, lines)
    source = planned(capsys, LONG, "--gpu", "A100", "--measured", str(run))["time"]["utilisation_from"]
    assert source.startswith("on a device that is not recorded")
    starts = run / "starts.jsonl"  # of a run without checkpoints so far
    starts.write_text('{"step": 0, "device": "Tesla T4"}\n{"step": 9, "dev')
    assert "measured on Tesla T4, which" in refused(capsys, LONG, "--gpu", "A100", "--measured", str(run))
    starts.unlink()
    for step, device in enumerate(("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-40GB", "cpu")):
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"step": step, "device": device}))
        if step == 0:
            assert planned(capsys, LONG, "--gpu", "A100", "--measured", str(run))["time"]["utilisation"]
            assert "measured on NVIDIA A100-SXM4-80GB, which tells nothing of a A100-40GB" in refused(
                capsys, LONG, "--gpu", "A100-40GB", "--measured", str(run)
            )
    assert "measured on NVIDIA A100-SXM4-40GB, cpu, which" in refused(
        capsys, LONG, "--gpu", "A100", "--measured", str(run)
    )
    row = {"latents": [8, 4, 16, 32, 32], "tokens_per_second": 9000}
    path = tmp_path / "bench.json"
    for content, kind in (
        ({"environment": {"cpu": "x"}, "rows": [row]}, "cpu"),
        ({"gpu": None, "rows": [row]}, "cpu"),
        ({"gpu": "NVIDIA H200", "environment": {}, "rows": [row]}, "NVIDIA H200"),
    ):
        path.write_text(json.dumps(content))
        assert f"measured on {kind}, which" in refused(capsys, LONG, "--gpu", "H100", "--measured", str(path))
    assert planned(capsys, LONG, "--gpu", "H200", "--measured", str(path))["time"]["utilisation"] < 0.2


def test_what_gpus_call_themselves() -> None:
    for name, expected in {
        "NVIDIA H100 80GB HBM3": "H100", "NVIDIA H100 PCIe": "H100-PCIe", "NVIDIA H100 NVL": "H100-NVL",
        "NVIDIA A100-PCIE-40GB": "A100-40GB", "NVIDIA A100 80GB PCIe": "A100-80GB", "NVIDIA H800": "H800",
        "NVIDIA GeForce RTX 4090": "RTX-4090", "Tesla V100-SXM2-16GB": "V100-16GB", "Tesla T4": "T4",
        "NVIDIA L40": "L40",
    }.items():  # fmt: skip
        assert gpu_of_device(name) is find_gpu(expected)
    for name in ("cpu", "", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-80GB MIG 3g.40gb", "NVIDIA A10G"):
        assert gpu_of_device(name) is None


def test_the_published_utilisation_is_the_published_speed(capsys: pytest.CaptureFixture[str]) -> None:
    """28 thousand tokens a second a GPU, on an H800; it and the best public one are named."""
    cfg = load_config(CONFIGS / "stage2_16x256x256.toml")
    grid = token_grid(cfg.model, latent_shape(cfg))
    rate = 28_000 * forward_products(cfg.model, grid).training_flops / grid.tokens
    assert rate / find_gpu("H800").peak("bf16") == pytest.approx(PUBLISHED_UTILISATION, rel=0.02)
    assert main([LONG]) == 0
    out = capsys.readouterr().out
    assert "33% of the peak of 1 x H100 in model FLOPs (assumed, the best that is public" in out
    assert "Open-Sora's own runs reached 12%)" in out


# Mistakes: one line, exit 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["no.toml"], "config no.toml: cannot be read"),
        ([SMALL, "model.depht=3"], "did you mean model.depth"),
        ([SMALL, "--gpu", "H101"], "did you mean H100"),
        ([SMALL, "--gpu", "H100\n\x1b[2J"], "is not in the table"),
        ([SMALL, "--gpus", "0"], "--gpus 0: expected at least 1"),
        ([SMALL, "--clips", "-4"], "--clips -4: expected at least 1"),
        ([SMALL, "--utilisation", "50"], "--utilisation 50.0: expected a share above 0, at most 1"),
        ([SMALL, "--utilisation", "nan"], "--utilisation nan"),
        ([SMALL, "--price-per-gpu-hour", "-1"], "--price-per-gpu-hour -1.0: expected 0 or more"),
        ([SMALL, "--strides", "4,8"], "--strides '4,8': expected three numbers"),
        ([SMALL, "--measured", "nowhere"], "--measured nowhere: no such run or file"),
        ([LONG, "--gpu", "V100"], "no bfloat16"),
        ([str(CONFIGS / "stage2_64x512x512-sp.toml"), "--gpus", "3"], "3 processes are not divisible by"),
        ([SMALL, "data.height=4"], "data.height"),
    ],
)
def test_mistakes(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in refused(capsys, *arguments)


@pytest.mark.parametrize(
    "line", ['{"samples": true, "seconds": 2}', f'{{"samples": {"9" * 400}, "seconds": 2}}', "[" * 5000]
)
def test_damaged_metrics_are_passed_over(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"step": i, "samples": 4, "seconds": 20} for i in range(5)]
    found = []
    for name, more in (("whole", ""), ("damaged", 9 * f"{line}\n")):
        run = write_run(tmp_path / name, load_config(LONG), lines)
        with (run / "metrics.jsonl").open("a") as file:
            file.write(more)
        found.append(planned(capsys, SMALL, "--gpu", "A100", "--measured", str(run))["time"]["utilisation"])
    assert found[0] == found[1]
    path = tmp_path / "bench.json"
    path.write_text(f'{{"tokens_per_second": {"9" * 400}, "latents": [4, 16, 32, 32], "more": {line}}}')
    assert re.search("no row with|not a JSON file", refused(capsys, LONG, "--measured", str(path)))


def test_runs_that_measure_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", load_config(SMALL), [{"step": 1, "samples": 2, "seconds": 1}, {"step": 2}])
    assert "1 step(s) with samples and seconds, expected more than 2" in refused(capsys, SMALL, "--measured", str(run))
    (run / "config.toml").unlink()
    assert "config.toml is not beside it" in refused(capsys, SMALL, "--measured", str(run))
    (tmp_path / "x.json").write_text("{")
    assert "not a JSON file" in refused(capsys, SMALL, "--measured", str(tmp_path / "x.json"))
