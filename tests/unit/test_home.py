"""`~` is the user's home in every key and option that takes a path, and text everywhere else."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import stages
from data_tools import pipeline
from opensora_repro.config import load_config
from opensora_repro.config.sections import PATH_KEYS
from opensora_repro.data.manifest import read_manifest
from opensora_repro.data.pipeline.config import load_line
from stages import _training as cli
from stages import demo, plan, sample, stage2_video, weights

# What options call the paths that they take
PATHS = {"DIR", "FILE", "PATH", "INPUT", "MODEL", "HEAD", "CONFIG.toml", "RUN_OR_CHECKPOINT", "input", "table"}


STAGES = sorted(
    m.name for m in pkgutil.iter_modules(stages.__path__) if m.name not in ("__main__", "_training", "configs")
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_every_path_key_of_a_config(home: Path) -> None:
    sections: dict[str, str] = {}
    for name in PATH_KEYS:
        section, key = name.split(".")
        sections[section] = sections.get(section, f"[{section}]\n") + f'{key} = "~/in a file/{key}"\n'
    sections["data"] += "draws = 1\n"
    (home / "run.toml").write_text("\n".join(sections.values()) + '\n[sample]\nprompts = ["~/ is text"]\n')
    cfg: Any = load_config(home / "run.toml", ["run.dir=~/given", "init.weights=~"])
    for name in PATH_KEYS:
        section, key = name.split(".")
        expected = {"run.dir": f"{home}/given", "init.weights": str(home)}.get(name, f"{home}/in a file/{key}")
        assert getattr(getattr(cfg, section), key) == expected
    assert cfg.sample.prompts == ("~/ is text",)


@pytest.mark.parametrize("name", [*pipeline.TOOLS, "pipeline", "preview", "report"])
def test_every_path_option_of_the_data_tools(home: Path, name: str) -> None:
    parser = importlib.import_module(f"data_tools.{name}").build_parser()
    taken = [action for action in parser._actions if (action.metavar or action.dest) in PATHS]
    assert len(taken) >= 2
    for action in taken:
        suffix = ".toml" if action.metavar == "CONFIG.toml" else ""
        assert str(action.type(f"~/x{suffix}")) == f"{home}/x{suffix}", action
    assert not [action for action in parser._actions if action.type is Path]


# What other options of the stages call what they take; those with a file among it expand that where they read it
OTHERS = {
    "ADDRESS", "H:W", "ID", "KEY=VALUE", "N", "NAME", "REPO", "S,B,...", "1x,4x,...", "SIZE", "STEP", "TEXT", "T,H,W",
    "X", "device", "section.key=value",
    "FILE;FILE", "FILE[:THRESHOLD]|THRESHOLD", "MASK|X,Y,WIDTH,HEIGHT", "PATH[:WEIGHT]",
    "PLACE=FILE[SPAN]@STRENGTH", "URL|MODEL",
}  # fmt: skip


class Built(Exception):
    pass


def parsers(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[argparse.ArgumentParser]:
    """Those that a stage parses its command line with."""

    def stop(parser: argparse.ArgumentParser, *_: Any) -> None:
        raise Built(parser)

    for method in ("parse_args", "parse_known_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, method, stop)
    module = importlib.import_module(f"stages.{name}")
    with pytest.raises(Built) as found:
        (module.parse if hasattr(module, "parse") else module.main)([])
    (parser,) = found.value.args
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    yield parser
    yield from (choice for action in inner for choice in action.choices.values())


@pytest.mark.parametrize("name", STAGES)
def test_whatever_an_option_of_the_stages_takes_is_a_path_or_known_to_be_none(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for parser in parsers(name, monkeypatch):
        for action in parser._actions:
            plain = action.nargs == 0 or action.choices or action.type in (int, float)
            if not plain and (action.metavar or action.dest) not in OTHERS:
                assert action.type is not None, action
                assert str(action.type("~/x.toml")) == f"{home}/x.toml", action


def test_every_path_option_of_the_stages(home: Path) -> None:
    def paths(args: argparse.Namespace) -> dict[str, str]:
        return {name: str(value).replace(str(home), "HOME") for name, value in vars(args).items() if "~" in str(value)}

    options = ["--out=~/out", "--vae", "~/vae", "--text=~/text"]
    assert paths(sample.parse(["~/run", "--prompts", "~/prompts", *options])) == {}
    assert paths(sample.parse(["run", "--prompt", "~/text", "--out", "out"])) == {"prompt": "['~/text']"}
    assert paths(plan.parse(["~/run.toml", "--measured", "~/run"])) == {}
    assert paths(weights.parse(["convert", "~/a.pth", "--to", "pixart", "--out=~/b.pth"])) == {}
    assert paths(cli._parse(stage2_video.STAGE, None, ["~/run.toml", "run.dir=~/run"])) == {
        "overrides": "['run.dir=~/run']"  # of which the config makes a path
    }
    found = demo.parse(["--dir=~/demo", "--configs", "~/configs"])
    assert (found.root, found.configs) == (home / "demo", home / "configs")


def test_a_line_of_data_tools(home: Path) -> None:
    config = home / "line.toml"
    config.write_text('input = "~/videos"\nout = "~/out"\n[caption]\nsidecar = "~/captions.csv"\n')
    tools = pipeline.find_tools()
    known, report = {name: tool.Arguments for name, tool in tools.items()}, pipeline.report.Arguments
    line = load_line(config, [], known, report)
    assert (line.input, line.out) == (f"{home}/videos", f"{home}/out")
    command = pipeline.command_of(line.steps[0], line.input, Path(line.out))
    assert tools["caption"].build_parser().parse_args(command).sidecar == f"{home}/captions.csv"
    line = load_line(config, ["input=~/others", "out=~/there"], known, report)
    assert (line.input, line.out) == (f"{home}/others", f"{home}/there")


def test_the_paths_of_a_manifest(home: Path) -> None:
    rows = ["id,path,caption,num_frames,fps,height,width", "a,~/far/a.mp4,x,9,8,32,32", "b,~b.mp4,x,9,8,32,32"]
    (home / "here").mkdir()
    (home / "here" / "m.csv").write_text("\n".join(rows))
    paths = read_manifest(home / "here" / "m.csv")["path"].to_pylist()
    assert paths == [f"{home}/far/a.mp4", f"{home}/here/~b.mp4"]
