"""The recipe files: complete, loadable, and equal to the published table."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from opensora_repro.config import Config, load_autoencoder_config, load_config
from opensora_repro.config.autoencoder import AutoencoderConfig
from opensora_repro.config.renew import complete, kind_of, page, recipes, stage0_page
from opensora_repro.config.toml import written
from opensora_repro.models.config import SIZES, STDiT2Config, STDiT3Config
from stages import configs

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPO = Path(__file__).resolve().parents[2]
ALL = recipes(REPO / "configs")
FILES = [path for path in ALL if kind_of(path) is Config]
STAGE0_FILES = [path for path in ALL if kind_of(path) is AutoencoderConfig]
SPLIT_OVER_GPUS = {"stage2_64x512x512-sp": 2, "stage2_360x512x512": 2}

# frames, interval, size, batch a GPU, activation checkpointing, space scale, time scale, steps of the released run; but
# for checkpointing at 16x512x512, where the released runs have none: no card holds that
PUBLISHED = {
    "stage1_1x512x512": (1, 1, 512, 32, "full", 1.0, 1.0, None),
    "stage2_16x256x256": (16, 3, 256, 8, "full", 0.5, 1.0, 80_000),
    "stage2_16x512x512": (16, 3, 512, 8, "selective", 1.0, 1.0, None),
    "stage2_64x512x512": (64, 2, 512, 4, "full", 1.0, 2 / 3, None),
    "stage2_64x512x512-sp": (64, 2, 512, 1, "full", 1.0, 2 / 3, None),
    "stage2_360x512x512": (360, 1, 512, 1, "full", 1.0, 2 / 3, None),
    "stage3_hq_16x256x256": (16, 3, 256, 8, "full", 0.5, 1.0, 24_000),
    "stage3_hq_16x512x512": (16, 3, 512, 2, "selective", 1.0, 1.0, 20_000),
}

# Frames : share kept / share looked at @ samples a GPU, of each resolution; a share of 0 has no samples
BUCKETS = {
    "opensora_1_1/image": """
        256: 1:1@256
        512: 1:1@80
        480p: 1:1@52
        1024: 1:1@20
        1080p: 1:1@8
    """,
    "opensora_1_1/stage1": """
        144p: 1:.5@48 16:1@6 32:1@3 96:1@1
        256: 1:.5@24 16:.5@3 48:.5@1 64:0
        240p: 16:.3@2 32:.3@1 64:0
        512: 1:.4@12
        1024: 1:.3@3
    """,
    "opensora_1_1/stage2": """
        144p: 1:1@48 16:1@17 32:1@9 64:1@4 128:1@1
        256: 1:.8@254 16:.5@17 32:.5@9 64:.5@4 128:.5@1
        240p: 1:.1@20 16:.9@17 32:.8@9 64:.8@4 128:.8@2
        512: 1:.5@86 16:.2@4 32:.2@2 64:.2@1 128:0
        480p: 1:.4@54 16:.4@4 32:0
        720p: 1:.1@20 16:.1@2 32:0
        1024: 1:.3@20
        1080p: 1:.4@8
    """,
    "opensora_1_1/stage3": """
        144p: 1:1@200 16:1@36 32:1@18 64:1@9 128:1@4
        256: 1:.8@200 16:.5@22 32:.5@11 64:.5@6 128:.8@4
        240p: 1:.8@200 16:.5@22 32:.5@10 64:.5@6 128:.5@3
        360p: 1:.5@120 16:.5@9 32:.5@4 64:.5@2 128:.5@1
        512: 1:.5@120 16:.5@9 32:.5@4 64:.5@2 128:.8@1
        480p: 1:.4@80 16:.6@6 32:.6@3 64:.6@1 128:0
        720p: 1:.4@40 16:.6@3 32:.6@1 96:0
        1024: 1:.3@40
    """,
    "opensora_1_2/stage1": """
        144p: 1:1@475 51:1@51 102:1/.33@27 204:1/.1@13 408:1/.1@6
        256: 1:.4@297 51:.5@20 102:.5/.33@10 204:.5/.1@5 408:.5/.1@2
        240p: 1:.3@297 51:.4@20 102:.4/.33@10 204:.4/.1@5 408:.4/.1@2
        360p: 1:.2@141 51:.15@8 102:.15/.33@4 204:.15/.1@2 408:.15/.1@1
        512: 1:.1@141
        480p: 1:.1@89
        720p: 1:.05@36
        1024: 1:.05@36
        1080p: 1:.1@5
        2048: 1:.1@5
    """,
    "opensora_1_2/stage2": """
        144p: 1:1@475 51:1@51 102:1/.33@27 204:1/.1@13 408:1/.1@6
        256: 1:.4@297 51:.5@20 102:.5/.33@10 204:.5/1@5 408:.5/1@2
        240p: 1:.3@297 51:.4@20 102:.4/.33@10 204:.4/1@5 408:.4/1@2
        360p: 1:.5@141 51:.15@8 102:.3/.5@4 204:.3/1@2 408:.5/.5@1
        512: 1:.4@141 51:.15@8 102:.2/.4@4 204:.2/1@2 408:.4/.5@1
        480p: 1:.5@89 51:.2@5 102:.2@2 204:.1@1
        720p: 1:.1@36 51:.03@1
        1024: 1:.1@36 51:.02@1
        1080p: 1:.01@5
        2048: 1:.01@5
    """,
    "opensora_1_2/stage3": """
        144p: 1:1@475 51:1@51 102:1@27 204:1@13 408:1@6
        256: 1:1@297 51:.5@20 102:.5@10 204:.5@5 408:.5/.5@2
        240p: 1:1@297 51:.5@20 102:.5@10 204:.5@5 408:.5/.4@2
        360p: 1:1@141 51:.5@8 102:.5@4 204:.5@2 408:.5/.3@1
        512: 1:1@141 51:.5@8 102:.5@4 204:.5@2 408:.5/.2@1
        480p: 1:1@89 51:.5@5 102:.5@3 204:.5/.5@1 408:0
        720p: 1:.3@36 51:.2@2 102:.1@1 204:0
        1024: 1:.3@36 51:.1@2 102:.1@1 204:0
        1080p: 1:.1@5
        2048: 1:.05@5
    """,
    "opensora_1_2/adapt": """
        144p: 1:.5@48 34:1@2 51:1@4 102:1@2 204:1@1
        256: 1:.6@20 34:.5@2 51:.5@1 68:.5@1 136:0
        240p: 1:.6@20 34:.5@2 51:.5@1 68:.5@1 136:0
        360p: 1:.5@8 34:.2@1 102:0
        512: 1:.5@8 34:.2@1 102:0
        480p: 1:.2@4 17:.3@1 68:0
        720p: 1:.1@2
        1024: 1:.1@2
        1080p: 1:.1@1
    """,
}


def load(name: str) -> Config:
    return load_config(REPO / "configs" / f"{name}.toml")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_key_is_written(path: Path) -> None:
    """A recipe that leaves out a key would change when a default does."""
    found: dict[str, dict[str, Any]] = tomllib.loads(path.read_text(encoding="utf-8"))
    known = written(load_config(path))
    assert {s: sorted(keys) for s, keys in found.items()} == {s: sorted(keys) for s, keys in known.items()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_loads_to_the_written_values(path: Path) -> None:
    assert written(load_config(path)) == tomllib.loads(path.read_text(encoding="utf-8"))


def test_what_make_configs_makes_is_up_to_date() -> None:
    for path in ALL:
        text = path.read_text(encoding="utf-8")
        assert complete(text, kind_of(path)) == text, path
    assert (REPO / "docs/config.md").read_text(encoding="utf-8") == page()
    assert (REPO / "docs/config_stage0.md").read_text(encoding="utf-8") == stage0_page()


def test_recipes_of_stage_0_are_written_out() -> None:
    assert STAGE0_FILES
    for path in STAGE0_FILES:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
        assert found == written(load_autoencoder_config(path))
        assert f"-m stages.stage0_autoencoder {path.relative_to(REPO).as_posix()}" in path.read_text(encoding="utf-8")


def test_a_new_key_is_one_edit(tmp_path: Path) -> None:
    """On a copy: a key behind a list of several lines, and a section, reach every recipe and the page."""
    for folder in ("opensora_repro", "configs", "docs"):
        shutil.copytree(REPO / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    sections = tmp_path / "opensora_repro/config/sections.py"
    text = sections.read_text(encoding="utf-8")
    for behind, added in (
        (r"    prompts: .*\n", '    words: tuple[str, ...] = ("a", "b")  # said | unsaid\n'),
        (r"    ema: EmaConfig .*\n", "    pause: PauseConfig = field(default_factory=PauseConfig)\n"),
        (
            r"(?=@dataclass.*\nclass Config:)",
            "@dataclass(frozen=True)\nclass PauseConfig:\n    length: int = 5  # of rest\n\n\n",
        ),
    ):
        text, count = re.subn(behind, lambda found, added=added: found[0] + added, text)
        assert count == 1
    sections.write_text(text, encoding="utf-8")
    subprocess.run([sys.executable, "-m", "opensora_repro.config.renew"], cwd=tmp_path, check=True, timeout=60)
    for path in FILES:
        old, new = (p.read_text(encoding="utf-8") for p in (path, tmp_path / path.relative_to(REPO)))
        changes = [line for line in difflib.ndiff(old.splitlines(), new.splitlines()) if line[0] in "+-"]
        added = ['+ words = ["a", "b"]  # said | unsaid', "+ ", "+ [pause]", "+ length = 5  # of rest"]
        assert sorted(changes) == sorted(added)
        expected = tomllib.loads(old)
        expected["sample"]["words"], expected["pause"] = ["a", "b"], {"length": 5}
        assert tomllib.loads(new) == expected
        names = [name for name in expected if name != "pause"]
        names.insert(names.index("ema") + 1, "pause")
        assert list(tomllib.loads(new)) == names
        assert list(tomllib.loads(new)["sample"])[1:3] == ["prompts", "words"]
    table = (tmp_path / "docs/config.md").read_text(encoding="utf-8")
    assert '| `sample.words` | `["a", "b"]` | said \\| unsaid |\n' in table
    assert "| `pause.length` | `5` | of rest |\n" in table


def test_copied_recipes_are_the_users_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mine"
    mine, told = folder / "demo" / "stage2.toml", []
    for options in ((), (), ("--overwrite",)):
        assert configs.main(["--copy", str(folder), *options]) == 0
        told.append(capsys.readouterr().out.splitlines())
        changed = mine.read_text(encoding="utf-8") == "mine"
        assert changed == (len(told) == 2)
        mine.write_text("mine", encoding="utf-8")
    first, second, third = ({line for line in lines if str(mine) in line} for lines in told)
    assert first == {f"copied: {mine}"} and third == {f"overwritten: {mine}"}
    assert second == {f"kept, though it differs (--overwrite replaces it): {mine}"}
    assert len(told[0]) == len(told[1]) and told[1].count(f"there already: {folder / 'slurm.sbatch'}") == 1
    names = [path.relative_to(REPO / "configs") for path in (REPO / "configs").rglob("*") if path.is_file()]
    assert sorted(names) == sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert configs.main(["--copy", str(mine)]) == 2
    assert re.fullmatch(rf"error: {mine}\S*: Not a directory\n", capsys.readouterr().err)
    assert configs.main([]) == 0
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(f"configs/{name}" for name in names)


@pytest.mark.parametrize("name", PUBLISHED)
def test_equals_the_published_recipe(name: str) -> None:
    cfg = load(name)
    frames, interval, size, batch, checkpointing, space, time, steps = PUBLISHED[name]
    assert (cfg.data.num_frames, cfg.data.frame_interval) == (frames, interval)
    assert (cfg.data.height, cfg.data.width) == (size, size)
    assert (cfg.train.batch_size, cfg.train.activation_checkpointing) == (batch, checkpointing)
    assert (cfg.model.space_scale, cfg.model.time_scale) == (space, time)
    assert steps is None or cfg.train.steps == steps
    assert (cfg.train.dtype, cfg.optim.lr, cfg.optim.weight_decay, cfg.optim.clip_norm) == ("bf16", 2e-5, 0.0, 1.0)
    assert (cfg.optim.warmup_steps, cfg.optim.decay_steps) == (0, 0)  # a constant rate
    assert cfg.ema.decay == 0.9999
    assert cfg.diffusion.objective == "iddpm"
    assert (cfg.sample.sampler, cfg.sample.steps, cfg.sample.guidance) == ("iddpm", 100, 7.0)
    assert cfg.model.temporal_attention == (frames > 1)


def test_images_from_scratch_follow_pixart() -> None:
    cfg = load("stage1_1x256x256")
    assert cfg.init.weights == ""
    assert not cfg.model.temporal_attention
    assert (cfg.data.num_frames, cfg.data.height, cfg.data.width) == (1, 256, 256)
    assert (cfg.optim.weight_decay, cfg.optim.eps, cfg.optim.warmup_steps, cfg.optim.clip_norm) == (
        3e-2,
        1e-10,
        1000,
        0.01,
    )


def test_recipes_of_the_table_are_all_here() -> None:
    names = {path.stem for path in ALL if path.parent.name == "configs"}
    assert names == set(PUBLISHED) | {"stage1_1x256x256"}


@pytest.mark.parametrize("name", SPLIT_OVER_GPUS)
def test_long_videos_are_split_over_gpus(name: str) -> None:
    parallel = load(name).parallel
    assert (parallel.engine, parallel.plugin, parallel.sp_size) == ("colossalai", "zero2", SPLIT_OVER_GPUS[name])


Entries = dict[tuple[str, int], tuple[float, float, int]]  # (resolution, frames): share kept, share looked at, samples


def entries_of(name: str) -> Entries:
    found: Entries = {}
    for bucket in load(name).data.buckets:
        kept, looked_at = bucket.keep if isinstance(bucket.keep, tuple) else (bucket.keep, 1.0)
        assert bucket.ratios == ""  # the resolution's own table
        found[bucket.resolution, bucket.num_frames] = kept, looked_at, bucket.batch_size
    return found


@pytest.mark.parametrize("name", BUCKETS)
def test_buckets_are_the_published_ones(name: str) -> None:
    expected: Entries = {}
    for line in BUCKETS[name].split("\n"):
        resolution, _, entries = line.strip().partition(": ")
        for frames, kept, looked_at, size in re.findall(r"(\d+):([\d.]+)(?:/([\d.]+))?(?:@(\d+))?", entries):
            expected[resolution, int(frames)] = float(kept), float(looked_at or 1), int(size or 0)
    assert entries_of(name) == expected
    cfg = load(name)
    assert cfg.data.frame_interval == (3 if "1_1" in name else 1)
    assert (cfg.optim.lr, cfg.optim.eps, cfg.ema.decay) == (
        (2e-5, 1e-8, 0.9999) if "1_1" in name else (1e-4, 1e-15, 0.99)
    )
    assert cfg.diffusion.objective == ("iddpm" if "1_1" in name else "flow")


# Shares of section 9 of the facts on 1.1 and 1.2, in the order of FrameMasksConfig's fields
MASKS = {
    "opensora_1_1/image": (0.0,) * 10,
    "opensora_1_1": (0.025, 0.025, 0.025, 0.05, 0.025, 0.025, 0.025, 0.05, 0.0, 0.0),
    "opensora_1_2/adapt": (0.01, 0.01, 0.01, 0.01, 0.05, 0.1, 0.05, 0.05, 0.2, 0.01),
    "opensora_1_2": (0.005, 0.005, 0.005, 0.005, 0.025, 0.05, 0.025, 0.025, 0.05, 0.005),
    "opensora_1_2/stage3": (0.002, 0.002, 0.002, 0.002, 0.0, 0.22, 0.005, 0.005, 0.01, 0.002),
}


@pytest.mark.parametrize("name", BUCKETS)
def test_recipes_of_1_1_and_1_2_have_their_own_models(name: str) -> None:
    cfg, release = load(name), name.split("/")[0]
    assert tuple(cfg.frame_masks.shares().values()) == MASKS.get(name, MASKS[release])
    if release == "opensora_1_1":
        assert cfg.model == STDiT2Config()
        assert cfg.diffusion.timestep_sampling == ("speed" if name.endswith("image") else "")
        assert (cfg.sample.steps, cfg.sample.guidance, cfg.sample.fps) == (100, 7.0, 8)
    else:
        assert cfg.model == STDiT3Config(freeze_y_embedder=not name.endswith("adapt"))
        assert (cfg.diffusion.schedule, cfg.vae.path) == ("open_sora_1_2", "hpcai-tech/OpenSora-VAE-v1.2")
        assert (cfg.sample.steps, cfg.sample.guidance, cfg.sample.fps) == (30, 7.0, 24)
    assert cfg.optim.warmup_steps == (1000 if name in ("opensora_1_2/stage1", "opensora_1_2/stage3") else 0)
    assert cfg.optim.clip_norm == 1.0 and cfg.optim.weight_decay == 0.0
    starts = {"opensora_1_1/image": "PixArt-XL-2-1024-MS.pth", "opensora_1_2/adapt": "PixArt-Sigma-XL-2-2K-MS.pth"}
    before = {"stage1": "adapt" if release == "opensora_1_2" else "image", "stage2": "stage1", "stage3": "stage2"}
    stage = name.split("/")[1]
    assert cfg.init.weights == (starts.get(name) or f"runs/{release}/{before[stage]}")


@pytest.mark.parametrize(
    ("name", "case"), [("opensora_1_1/stage2", "v11_stage2"), ("opensora_1_2/stage1", "v12_stage1")]
)
def test_buckets_are_those_of_the_golden_assignments(name: str, case: str, golden_1_2_dir: Path) -> None:
    golden = json.loads((golden_1_2_dir / "buckets.json").read_text(encoding="utf-8"))["configs"][case]
    expected: Entries = {}
    for resolution, entries in golden.items():
        for frames, (keep, size) in entries.items():
            kept, looked_at = keep if isinstance(keep, list) else (keep, 1.0)
            expected[resolution, int(frames)] = kept, looked_at, size or 0
    assert entries_of(name) == expected


def test_every_published_bucket_recipe_is_here() -> None:
    found = {path.relative_to(REPO / "configs") for path in FILES if path.parent.name.startswith("opensora_")}
    assert {str(path.with_suffix("")) for path in found} == set(BUCKETS)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_small_recipes_are_one_run_of_each_model(stage: int) -> None:
    """Of the table's sizes, which go on from each other; pictures beside clips, in three ratios."""
    names = {"S": f"small/stage{stage}", "B": f"small/stage{stage}_b2"}
    for size, name in names.items():
        cfg = load(name)
        assert (cfg.model.hidden_size, cfg.model.depth, cfg.model.num_heads) == SIZES[size]
        assert cfg.model.patch_size == (1, 2, 2)
        assert cfg.model.temporal_attention == (stage > 1)
        assert cfg.diffusion.objective == "flow"
        assert (cfg.vae.path, cfg.text.path) == ("stabilityai/sd-vae-ft-mse", "google/t5-v1_1-small")
        before = name.replace(f"stage{stage}", f"stage{stage - 1}")
        assert cfg.init.weights == (load(before).run.dir if stage > 1 else "")
        assert all(bucket.ratios == ("16:9", "1:1", "9:16") for bucket in cfg.data.buckets)
        assert {bucket.num_frames for bucket in cfg.data.buckets} == ({1} if stage == 1 else {1, 16, 32})
    small, larger = (dataclasses.replace(load(name), run=Config().run, init=Config().init) for name in names.values())
    assert dataclasses.replace(larger, model=small.model) == small


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_stage_that_a_header_names_takes_the_recipe(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    names = set(re.findall(r"^# .*-m stages\.(stage\w+) (\S+)", text, re.MULTILINE))
    assert {file for _, file in names} == {path.relative_to(REPO).as_posix()}
    for stage, _ in names:
        importlib.import_module(f"stages.{stage}").STAGE.check(load_config(path))
