"""The project's frame: make targets, the CI script, pinned requirements and the packaged files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def requirement_names(text: str) -> set[str]:
    lines = (line.strip() for line in text.splitlines())
    return {re.split(r"[\s=<>~!;\[]", line, maxsplit=1)[0].lower() for line in lines if line and line[0] not in "#-"}


def run_make(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    }
    return subprocess.run(["make", *words], cwd=REPO, env=environment, capture_output=True, text=True, timeout=60)


def test_every_requirement_is_pinned_and_nothing_else_is_in_the_file() -> None:
    lines = (REPO / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert len(pins) > 50
    wrong = [line for line in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][\w.]*( ; .+)?", line)]
    assert not wrong


def test_requirements_cover_what_the_project_declares() -> None:
    text = (REPO / "pyproject.toml").read_text(encoding="utf-8")
    declared = re.findall(r'^\s+"([A-Za-z0-9._-]+)(?:>=[^"]*)?"?,?$', text.split("[project.urls]")[0], flags=re.M)
    listed = set(re.findall(r'"([a-z][a-z0-9-]+)>=', text)) | {name.lower() for name in declared if ">=" in name}
    assert {"torch", "colossalai", "diffusers", "transformers", "av", "pytest", "ruff", "mypy"} <= listed
    missing = listed - requirement_names((REPO / "requirements.txt").read_text(encoding="utf-8"))
    assert missing == {
        "gcsfs"
    }  # of an extra alone: seventeen packages of Google's, for a store that no test can stand in for


def test_make_names_its_targets() -> None:
    done = run_make("help")
    assert done.returncode == 0, done.stderr
    for target in ("make demo", "make test", "make bench", "make gpu", "make setup"):
        assert target in done.stdout


def test_setup_without_a_usable_python_says_so(tmp_path: Path) -> None:
    done = run_make("setup", "PYTHON3=no-such-python", f"VENV={tmp_path / 'venv'}")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "error: no no-such-python found; install Python 3.10 or newer"
    old = tmp_path / "python-old"
    old.write_text('#!/bin/sh\nif [ "$1" = --version ]; then echo "Python 3.8.1"; exit 0; fi\nexit 1\n')
    old.chmod(0o755)
    done = run_make("setup", f"PYTHON3={old}", f"VENV={tmp_path / 'venv'}")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0].startswith("error: Python 3.8.1 is too old; name a newer one")
    assert not (tmp_path / "venv").exists()


def test_ci_runs_the_tests() -> None:
    script = REPO / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.read_text(encoding="utf-8").splitlines()[-1] == "exec make test"


def test_installed_version_is_the_declared_one() -> None:
    from importlib.metadata import metadata

    text = (REPO / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.+)"$', text, flags=re.M)
    assert version is not None
    found = metadata("opensora-repro")
    assert found["Version"] == version.group(1)
    assert found["License-Expression"] == "Apache-2.0"
    assert "Apache License" in (REPO / "LICENSE").read_text(encoding="utf-8")


def test_gpu_checks_say_when_there_is_no_gpu(tmp_path: Path) -> None:
    """Without a GPU `make gpu` is one line and a JSON file that says so, not a failure."""
    out = tmp_path / "gpu.json"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.checks", "--out", str(out)],
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip().splitlines()) == 1
    assert '"gpu": null' in out.read_text(encoding="utf-8")


def test_one_version_and_one_script_everywhere() -> None:
    """The citation and the changelog name the declared version; the workflow runs the CI script, the hooks `.venv`."""
    version = re.search(r'^version = "(.+)"$', (REPO / "pyproject.toml").read_text(encoding="utf-8"), flags=re.M)
    assert version is not None
    assert f"\nversion: {version[1]}\n" in (REPO / "CITATION.cff").read_text(encoding="utf-8")
    changes = (REPO / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)", changes, flags=re.M)[:2] == ["Unreleased", version[1]]
    assert "- run: .ci/run\n" in (REPO / ".github/workflows/test.yml").read_text(encoding="utf-8")
    hooks = (REPO / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    commands = re.findall(r"entry: \.venv/bin/python -m (\w+(?: \w+)?)", hooks)
    assert commands == ["ruff check", "ruff format", "mypy"] and hooks.count("language: system") == 3
