"""The recipes of CONTRIBUTING.md, followed on a throw-away copy of the project: the files it names are enough."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.made_pictures import texture
from tests.preloaded_python import preloaded_python

REPO = Path(__file__).resolve().parents[2]
CODE = ("opensora_repro", "stages", "data_tools", "tests")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with preloaded_python(tmp_path_factory.mktemp("python")) as program:
        yield program


class Copy:
    """A copy of the code, to be edited as a recipe says."""

    def __init__(self, root: Path, recipe: str, python: str) -> None:
        self.root, self.python = root, python
        text = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
        self.recipe = text.split(f"\n### {recipe}\n")[1].split("\n### ")[0]
        for folder in CODE:
            shutil.copytree(REPO / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "gpu"))
        (root / "checkpoints").mkdir()
        shutil.copy(REPO / "checkpoints" / "catalog.toml", root / "checkpoints")

    def add(self, path: str, text: str) -> None:
        assert f"`{Path(path).parent}/" in self.recipe, f"{path}: the recipe does not name its folder"
        (self.root / path).write_text(text, encoding="utf-8")

    def edit(self, path: str, old: str, new: str) -> None:
        assert f"`{path}`" in self.recipe, f"{path}: the recipe does not name it"
        text = (self.root / path).read_text(encoding="utf-8")
        changed, count = re.subn(old, new, text)
        assert count == 1, f"{path}: {count} places for {old}"
        (self.root / path).write_text(changed, encoding="utf-8")

    def run(self, *command: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [self.python, *command], cwd=self.root, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout


CONFIG = """

@dataclass(frozen=True)
class PlainConfig:
    in_channels: int = 4
    patch_size: tuple[int, int, int] = (1, 1, 1)
    hidden_size: int = 8
    depth: int = 1
    num_heads: int = 1
    mlp_ratio: float = 4.0
    num_classes: int = 10
    pred_sigma: bool = True

    # As STDiTConfig has them
    conditioning = "class"
    model_max_length = 1
    space_scale = time_scale = 1.0
    base_size = 0
    square = False
    conditions = ()

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.pred_sigma else 1)

    def stretched_to(self, places: int) -> None:
        return None


"""
NETWORK = """
import torch
from einops import rearrange
from torch import nn


class Plain(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.inside = nn.Linear(cfg.in_channels, cfg.hidden_size)
        self.label = nn.Embedding(cfg.num_classes + 1, cfg.hidden_size)
        self.outside = nn.Linear(cfg.hidden_size, cfg.out_channels)

    def forward(self, latents, timestep, condition, mask=None):
        x = self.inside(rearrange(latents, "b c t h w -> b t h w c"))  # [B, T, H, W, D]
        x = x + rearrange(self.label(condition), "b d -> b 1 1 1 d")
        return rearrange(self.outside(torch.tanh(x)), "b t h w c -> b c t h w").float()

    def null_condition(self):
        return torch.tensor(self.cfg.num_classes)
"""
ROW = """    Family(
        name="plain",
        config=PlainConfig,
        network=Plain,
        has=lambda cfg: True,
        layouts=(Layout("Plain", ("inside.weight", "label.weight", "outside.weight")),),
        facts=lambda weights: {
            "in_channels": weights["inside.weight"].shape[1],
            "hidden_size": weights["inside.weight"].shape[0],
            "num_classes": weights["label.weight"].shape[0] - 1,
        },
        sampling=SampleConfig(sampler="ddim", steps=2, guidance=2.0),
        from_tables=lambda found: {},
    ),
)

"""
COMMANDS = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from opensora_repro.models.config import PlainConfig
from opensora_repro.models.plain import Plain
from stages import sample, weights
from tests.tiny_models import make_tiny_vae

folder = Path(sys.argv[1])
model = Plain(PlainConfig(num_classes=7))
torch.save(model.state_dict(), folder / "plain.pth")
given = [str(folder / "plain.pth"), "--num-heads", "1"]
converted = str(folder / "plain.safetensors")
assert weights.main(["inspect", *given]) == 0
assert weights.main(["verify", *given]) == 0
assert weights.main(["convert", *given, "--to", "safetensors", "--out", converted]) == 0
again = load_file(converted)
assert again.keys() == model.state_dict().keys()
assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())
vae = make_tiny_vae(folder / "vae")
size = ["--num-frames", "1", "--height", "32", "--width", "64"]
assert sample.main([converted, "--label", "3", "--out", str(folder / "out"), "--vae", str(folder / "vae"), *size]) == 0
"""


def test_a_model_family(tmp_path: Path, python: str) -> None:
    """Its weights are recognised, checked, converted bit for bit and sampled."""
    copy = Copy(tmp_path / "copy", "A model family", python)
    copy.add("opensora_repro/models/plain.py", NETWORK)
    config, families = "opensora_repro/models/config.py", "opensora_repro/weights/families.py"
    copy.edit(config, r"\n+(ModelConfig = .*)\n", rf"{CONFIG}\1 | PlainConfig\n")
    copy.edit(
        "opensora_repro/planning/flops.py",
        r"(PRODUCTS: .* = \{)",
        r"from opensora_repro.models.config import PlainConfig\n"
        r"\1PlainConfig: lambda cfg, grid: Products(0, grid.tokens * cfg.hidden_size * 12, 0), ",
    )
    copy.edit(families, r"\nNetwork = (.*)\n", r"\nfrom opensora_repro.models.config import PlainConfig\n"
              r"from opensora_repro.models.plain import Plain\nNetwork = \1 | Plain\n")  # fmt: skip
    copy.edit(families, r"\n\)\n(?=\n\ndef family_of)", f"\n{ROW}")
    (copy.root / "commands.py").write_text(COMMANDS)
    assert "model.num_classes = 7" in copy.run("commands.py", str(tmp_path))
    assert (tmp_path / "out" / "0000.png").is_file()


SAMPLER = '''
"""DDIM once more, in so many lines."""
import torch
from opensora_repro.diffusion.gaussian import linear_betas


def direct_sample(model_fn, x, steps, progress=None, watch=None):
    signal = torch.from_numpy((1 - linear_betas()).cumprod()).float()
    times = torch.linspace(len(signal) - 1, 0, steps).round().long().tolist()
    for done, (now, after) in enumerate(zip(times, [*times[1:], None])):
        noise = model_fn(x, torch.full((len(x),), now))[:, : x.shape[1]]
        data = (x - (1 - signal[now]).sqrt() * noise) / signal[now].sqrt()
        x = data if after is None else signal[after].sqrt() * data + (1 - signal[after]).sqrt() * noise
        if watch is not None:
            watch(done + 1, data)
        if progress is not None:
            progress(done + 1, steps)
    return x
'''


def test_a_sampler(tmp_path: Path, python: str) -> None:
    copy = Copy(tmp_path, "A sampler", python)
    copy.add("opensora_repro/diffusion/direct.py", SAMPLER)
    samplers = "opensora_repro/diffusion/samplers.py"
    copy.edit(samplers, r'IDDPM_SAMPLERS = \("iddpm"', 'IDDPM_SAMPLERS = ("direct", "iddpm"')
    copy.edit(
        samplers,
        r'( +)if self\.name == "dpm":\n(?=.*\n +return dpm_solver_sample)',
        r'\1if self.name == "direct":\n\1    from opensora_repro.diffusion.direct import direct_sample\n\n'
        r"\1    return direct_sample(model_fn, noise, self.steps, self.progress, watch)\n\g<0>",
    )
    copy.edit("opensora_repro/config/checks.py", r"SAMPLERS = \(", 'SAMPLERS = ("direct", ')
    copy.edit("tests/unit/test_sampling.py", r"\nALL = \[", '\nALL = [("iddpm", "direct"), ')
    assert "direct" in copy.run("-m", "stages.sample", "--help")
    done = copy.run("-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib",
                    "-k", "direct and not direct-True",  # it takes no given frames
                    "tests/unit/test_sampling.py")  # fmt: skip
    assert re.search(r"\d+ passed", done)


TOOL = '''
"""Tell how many bytes a frame of each clip takes: python -m data_tools.weigh INPUT --out DIR"""
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from opensora_repro.data.jobs.course import Job, Keeping
from opensora_repro.data.jobs.records import Records
from opensora_repro.data.jobs.run import RunnerArguments, run_jobs, runner_of
from opensora_repro.data.options import argument, option, parse, parser_of
from opensora_repro.data.manifest import MANIFEST, path_from, reject, write_outcome
from opensora_repro.data.tables import with_types
from opensora_repro.errors import run_command
from opensora_repro.files import digest
from opensora_repro.data.probe.rows import manifest_of


@dataclass(frozen=True, kw_only=True)
class Arguments(RunnerArguments):
    input: str = argument("clips")
    out: str = option("folder of the tables", metavar="DIR")
    kilo: bool = option("in thousands", False)


build_parser = partial(parser_of, Arguments, "data_tools.weigh", __doc__)


def main(argv=None):
    args = parse(Arguments, build_parser(), argv)
    return run_command(lambda: weigh_all(args))


def weigh(args):
    return {"bytes": Path(args["path"]).stat().st_size / args["unit"]}


def weigh_all(args):
    from opensora_repro.data.manifest import read_manifest

    out, runner = Path(args.out), runner_of(args)
    clips = read_manifest(manifest_of(args.input, out, runner), need_captions=False).to_pylist()
    unit = 1000 if args.kilo else 1
    jobs = [
        Job(digest([unit]), c["id"], {"path": c["path"], "unit": unit}, files=(Path(c["path"]),)) for c in clips
    ]
    with Records(out) as records:
        found = run_jobs(weigh, jobs, Keeping(records, "weights"), runner=runner, label="weighing")
    rows, rejects = [], []
    for clip, result in zip(clips, found):
        clip = {**clip, "path": path_from(out, Path(clip["path"]))}
        if "error" in result:
            rejects.append(reject(clip["id"], clip["path"], "weigh", result["error"]))
        else:
            rows.append({**clip, "bytes_a_frame": result["bytes"] / clip["num_frames"]})
    write_outcome(out, rows, rejects, with_types(rows, MANIFEST))
    print(f"{len(rows)} clips weighed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
'''


def test_a_dataset_tool(tmp_path: Path, python: str) -> None:
    from opensora_repro.data.manifest import read_manifest
    from opensora_repro.data.write import write_png

    copy = Copy(tmp_path / "copy", "A dataset tool", python)
    copy.add("data_tools/weigh.py", TOOL)
    copy.edit("data_tools/pipeline.py", r"\nTOOLS = \(", '\nTOOLS = ("weigh", ')
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(3):
        write_png(pictures / f"{number}.png", np.stack([texture(seed=number)] * 3, axis=-1))
    (pictures / "damaged.png").write_bytes(b"")
    out = tmp_path / "out"
    line = tmp_path / "line.toml"
    line.write_text(
        f'input = "{pictures}"\nout = "{out}"\n[run]\nworkers = 1\n[probe]\nimages = true\n[weigh]\nkilo = true\n'
    )
    assert "3 clips weighed" in copy.run("-m", "data_tools.pipeline", str(line))
    rows = read_manifest(out / "manifest.parquet", need_captions=False)
    assert rows["bytes_a_frame"].to_pylist() == [os.path.getsize(path) / 1000 for path in rows["path"].to_pylist()]
    assert "weighed" not in copy.run("-m", "data_tools.pipeline", str(line))
    assert "[weigh]: unknown key mega" in _refused(copy, "-m", "data_tools.pipeline", str(line), "weigh.mega=true")


def _refused(copy: Copy, *command: str) -> str:
    with pytest.raises(AssertionError) as refused:
        copy.run(*command)
    return str(refused.value)


PLUGIN = '''
"""Masters that lie the other way round than the weights: a piece is a tensor with its first axis reversed."""
import torch
from torch import nn
from opensora_repro.parallel.engine import TorchEngine
from opensora_repro.files import digest


class ReversedEngine(TorchEngine):
    def _wrap(self, optimizer):
        super()._wrap(optimizer)
        self.masters = {name: nn.Parameter(self.take(name, value.detach())) for name, value in self.working.items()}
        master_of = {value: self.masters[name] for name, value in self.working.items()}
        for group in optimizer.param_groups:
            group["params"] = [master_of[value] for value in group["params"]]

    def whole(self, name, piece):
        return piece.flip(0)

    take = whole

    @torch.no_grad()
    def show(self, pieces):
        for name, piece in pieces.items():
            self.working[name].copy_(self.whole(name, piece))

    @torch.no_grad()
    def load(self, name, whole):
        super().load(name, whole)
        self.working[name].copy_(whole)

    def _optimizer_step(self, lr):
        for name, value in self.working.items():
            self.masters[name].grad = None if value.grad is None else self.take(name, value.grad)
        super()._optimizer_step(lr)
        self.show(self.masters)

    def zero_grad(self):
        super().zero_grad()
        self.model.zero_grad(set_to_none=True)
'''
RUNS = """
import sys
from pathlib import Path
from stages.stage2_video import main
from tests.training_world import World, losses, make_world, newest_tensors

world = make_world(Path(sys.argv[1]))
here = {"parallel__plugin": "reversed"}


def run(name, steps, **changes):
    folder = world.root / name
    given = {"train__steps": steps, "optim__eps": 1e-6, "checkpoint__every": 2, **changes}
    assert main([str(world.root / "empty.toml"), *world.arguments(folder, "clips", **given)]) == 0
    return newest_tensors(folder), newest_tensors(folder, "ema"), losses(folder)


expected = run("plain", 4)
run("begun", 2, **here)
for found in (run("reversed", 4, **here), run("begun", 4)):
    for ours, theirs in zip(found[:2], expected[:2]):
        assert ours.keys() == theirs.keys()
        assert all((ours[key] == theirs[key]).all() for key in ours)
    assert found[2] == expected[2]
"""


@pytest.mark.slow
def test_a_parallel_plugin(tmp_path: Path, python: str) -> None:
    """Trained by it, and begun by it and ended without it, a run is the plain engine's bit for bit."""
    copy = Copy(tmp_path / "copy", "A parallel plugin", python)
    copy.add("opensora_repro/parallel/reversed.py", PLUGIN)
    copy.edit(
        "opensora_repro/parallel/build.py",
        r'( +)if cfg.engine == "torch":\n',
        r'\1if cfg.plugin == "reversed":\n\1    from opensora_repro.parallel.reversed import ReversedEngine\n\n'
        r"\1    return ReversedEngine(cfg, device)\n\g<0>",
    )
    checks = "opensora_repro/config/checks.py"
    copy.edit(checks, r'("parallel.plugin": \()', r'\1"reversed", ')
    copy.edit(checks, r'(known = \("ddp", "fsdp")', r'\1, "reversed"')
    copy.edit("opensora_repro/planning/memory.py", r'(parallel.plugin) == "ddp"', r'\1 in ("ddp", "reversed")')
    (copy.root / "runs.py").write_text(RUNS)
    copy.run("runs.py", str(tmp_path / "world"))
