"""What the pages tell a reader exists: links, files, modules, config keys, commands with their options, make targets.

Commands are read by the commands' own parsers, which are stopped before any work begins.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import io
import json
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from opensora_repro.config import (
    AutoencoderConfig,
    BucketConfig,
    Config,
    config_dict,
    load_autoencoder_config,
    load_config,
)
from opensora_repro.models.config import ARCHITECTURES

REPO = Path(__file__).resolve().parents[2]
PAGES = sorted([*REPO.glob("*.md"), *REPO.glob("docs/*.md")])
OURS = "opensora_repro|data_tools|stages|benchmarks|tests"
PLACEHOLDERS = {"data_tools.NAME", "stages.NAME", "opensora_repro.data.NAME"}
OTHERS_OPTIONS = {  # of torchrun and of ColossalAI's launcher
    "--standalone", "--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-id", "--rdzv-endpoint", "--max-restarts",
    "--nproc_per_node", "--hostfile", "--host", "--extra_launch_args", "--master_port",
}  # fmt: skip
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def test_the_pages_are_there() -> None:
    names = {str(page.relative_to(REPO)) for page in PAGES}
    pages = {page.stem for page in REPO.glob("docs/*.md")}
    assert pages >= {"data", "training", "sampling", "weights", "parallelism", "speed", "config", "troubleshooting"}
    assert names >= {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "docs/architecture.md"}
    text = (REPO / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 220
    assert all(f"docs/{page}.md" in text for page in pages)


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def code_spans(text: str) -> Iterator[str]:
    """What stands in backticks outside of blocks; a line may break within."""
    return (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(text)))


def shell_lines(text: str) -> Iterator[str]:
    """The lines of bash blocks, joined where a backslash breaks them, without comments."""
    for block in re.findall(r"^```bash\n(.*?)^```$", text, flags=re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if line := re.sub(r"(^|\s)# .*", "", line).strip():
                yield line


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page.read_text(encoding="utf-8")), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text(encoding="utf-8"))):
        if re.match(r"https?://", link):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists() and target.is_relative_to(REPO), f"{link}: linked, but not here"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


@cache
def defined_in(path: Path) -> set[str]:
    """Names that a module's own lines bind."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        else:
            names |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
    return names


def is_there(dotted: str) -> bool:
    """Whether a dotted name is a package, a module, or a name in one."""
    path, parts = REPO, dotted.split(".")
    for number, part in enumerate(parts):
        if (path / part).with_suffix(".py").is_file():
            rest = parts[number + 1 :]
            return not rest or rest[0] in defined_in((path / part).with_suffix(".py"))
        if not (path / part).is_dir():
            return (path / "__init__.py").is_file() and part in defined_in(path / "__init__.py")
        path = path / part
    return True


@every_page
def test_modules_and_files_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in set(re.findall(rf"(?<![\w/.-])(?:{OURS})(?:\.\w+)+", text)) - PLACEHOLDERS:
        assert is_there(name), name
    for path in re.findall(
        rf"(?<![\w/.-])(?:(?:{OURS}|configs|checkpoints(?!/step-)|docs|examples|requirements)/[\w./-]*)", text
    ):
        if "NAME" not in path:
            assert (REPO / path.rstrip(".")).exists(), path
    for config in re.findall(r"(?<![\w/-])stage\d_[\w-]+\.toml", text):
        assert (REPO / "configs" / config).is_file(), config


@every_page
def test_config_keys_are_keys(page: Path) -> None:
    keys = {section: {*names} for section, names in config_dict(Config()).items()}
    keys["model"] |= {field.name for kind in ARCHITECTURES.values() for field in fields(kind)}
    for section, own in config_dict(AutoencoderConfig()).items():  # stage 0's
        keys[section] = keys.get(section, set()) | set(own)
    for span in code_spans(page.read_text(encoding="utf-8")):
        found = re.match(r"([a-z]+)\.([a-z_]+)(?![\w./*-])", span)
        if found and found[1] in keys and not span.endswith((".toml", ".py", ".json", ".parquet")):
            assert found[2] in keys[found[1]], span


def test_the_reference_lists_every_config_key_with_its_default() -> None:
    text = (REPO / "docs/config.md").read_text(encoding="utf-8")
    text, *others = text.split("\n## ")
    row = re.compile(r"^\| `([\w.\[\]]+)` \| `?(.*?)`? \| (.+) \|$", flags=re.M)
    for kind, table in zip(list(ARCHITECTURES.values())[1:], others, strict=True):
        expected = {f"model.{k}": json.dumps(v) for k, v in config_dict(Config(model=kind()))["model"].items()}
        assert {name: default for name, default, _ in row.findall(table)} == expected
    listed = row.findall(text)
    expected = {f"{s}.{k}": json.dumps(v) for s, keys in config_dict(Config()).items() for k, v in keys.items()}
    for field in fields(BucketConfig):
        default = "needed" if field.default is MISSING else json.dumps(field.default)
        expected[f"data.buckets[].{field.name}"] = default
    assert {name: default for name, default, _ in listed} == expected


class Read(BaseException):
    """A command has read its options; raised in place of its work."""

    def __init__(self, parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
        self.parser, self.options = parser, options


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no parser return: what it has read is raised."""
    for method in ("parse_args", "parse_intermixed_args"):
        read = getattr(argparse.ArgumentParser, method)

        def read_and_stop(self: Any, args: Any = None, namespace: Any = None, read: Any = read) -> None:
            raise Read(self, read(self, args, namespace))

        monkeypatch.setattr(argparse.ArgumentParser, method, read_and_stop)


def read_options(module: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> Read:
    """What the command's own parser makes of the words; fails with its message where it refuses them."""
    monkeypatch.setattr(sys, "argv", [module, *words])
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            importlib.import_module(module).main()
    except Read as read:
        return read
    except SystemExit:
        pytest.fail(f"{module} {shlex.join(words)}: {told.getvalue().strip().splitlines()[-1]}", pytrace=False)
    pytest.fail(f"{module}: reads no options", pytrace=False)


def commands_of(text: str) -> Iterator[tuple[str, list[str]]]:
    """(module, words) of every command of ours in the text's blocks and spans."""
    spans = (span for span in code_spans(text) if re.search(rf"python -m (?:{OURS})\.", span))
    for line in [*shell_lines(text), *spans]:
        words = shlex.split(line)
        if "-m" in words:
            module, *words = words[words.index("-m") + 1 :]
        elif "sbatch" in words:
            module, *words = words[2:]
        else:
            continue
        if re.match(rf"(?:{OURS})\.", module) and module not in PLACEHOLDERS:
            yield module, [word for word in words if word != "..."]


@every_page
@pytest.mark.usefixtures("stopped")
def test_commands_are_understood(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options by the command's parser, and a stage's config with its changes by the config's own reader."""
    monkeypatch.chdir(REPO)
    for module, words in commands_of(page.read_text(encoding="utf-8")):
        if not words:  # named, not called
            assert is_there(module), module
            continue
        options = read_options(module, words, monkeypatch).options
        if module.startswith("stages.") and getattr(options, "config", "").startswith("configs/"):
            if module == "stages.recipe":
                from opensora_repro.planning.recipe import load_recipe, steps_of
                from stages.recipe import check_stage

                # whose folders are the reader's own
                recipe = load_recipe(options.config, [*options.overrides, "input=docs", "captions=README.md"])
                steps_of(recipe, check_stage)
                continue
            load = load_autoencoder_config if module == "stages.stage0_autoencoder" else load_config
            load(options.config, options.overrides)


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {option for command in action.choices.values() for option in options_of(command)}
    return found


@pytest.mark.usefixtures("stopped")
def test_options_in_passing_are_some_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    known = set(OTHERS_OPTIONS)
    for path in sorted([*REPO.glob("stages/*.py"), *REPO.glob("data_tools/*.py"), *REPO.glob("benchmarks/*.py")]):
        module = f"{path.parent.name}.{path.stem}"
        if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8"):
            known |= options_of(parser_of(module, monkeypatch))
    for page in PAGES:
        for span in code_spans(page.read_text(encoding="utf-8")):
            for option in re.findall(r"(?:^|\s)(--[a-z][\w-]*)", span):
                assert option in known, f"{page.name}: {option}"


def parser_of(module: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The command's parser, taken where it begins to read."""
    with monkeypatch.context() as patch:
        for method in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, method, lambda self, *_: raise_read(self))
        return read_options(module, [], monkeypatch).parser


def raise_read(parser: argparse.ArgumentParser) -> None:
    raise Read(parser, argparse.Namespace())


@every_page
def test_make_targets_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    for line in [*shell_lines(text), *code_spans(text)]:
        found = re.match(r"make (?:[A-Z0-9]+=\S+ )?([a-z-]+)$", line)
        assert not found or found[1] in targets, line


def test_a_false_page_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rule above finds the one lie that it is there for."""
    page = tmp_path / "false.md"
    page.write_text(
        "# A page\n\n[a](#b) [c](absent.md) `data.heigth` `opensora_repro.models.stdlt` `make demon`\n"
        "\n```bash\npython -m data_tools.split videos --out DIR --for-trianing\n```\n"
    )
    rules = (test_links_lead_somewhere, test_modules_and_files_are_there, test_config_keys_are_keys,
             test_make_targets_are_there)  # fmt: skip
    for rule in rules:
        with pytest.raises(AssertionError):
            rule(page)
    assert not is_there("opensora_repro.models.stdit.STDlT") and is_there("opensora_repro.models.stdit.STDiT")
    ((module, words),) = commands_of(page.read_text())
    with pytest.raises(pytest.fail.Exception, match="unrecognized arguments: --for-trianing"):
        read_options(module, words, monkeypatch)
