"""Who may import whom, what `--help` may load, and what no tracked file may contain."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
OURS = ("opensora_repro", "stages", "data_tools", "benchmarks", "tests")

# From the ground up: a room uses what stands above it in this list, and its own.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("storage", "process"),
    ("files",),
    ("errors",),
    ("kernels",),
    ("models",),
    ("config",),
    ("diffusion",),
    ("data",),
    ("parallel",),
    ("run_folder",),
    ("weights",),
    ("frozen",),
    ("planning",),
    ("report",),
    ("sampling",),
    ("app",),
    ("training",),
    ("evaluation",),
    ("demo",),
)
LIBRARY = "opensora_repro"
STANDS_ON = {  # of what stands outside the library
    "stages": (LIBRARY,),
    "stages.demo": (LIBRARY, "stages", "data_tools"),
    "stages.__main__": (LIBRARY, "stages", "data_tools"),
    "data_tools": tuple(
        f"{LIBRARY}.{room}"
        for room in ("errors", "files", "process", "storage", "config", "data", "weights", "frozen", "planning")
    ),
    "benchmarks": (LIBRARY, "data_tools", "stages", "tests.golden", "tests.gpu"),
}

COMMANDS = [
    "stages.stage0_autoencoder",
    "stages.stage1_image",
    "stages.stage2_video",
    "stages.stage3_hq",
    "stages.sample",
    "stages.app",
    "stages.plan",
    "stages.buckets",
    "stages.calibrate",
    "stages.weights",
    "stages.evaluate",
    "stages.recipe",
    "stages.scaling",
    "stages.trace",
    "stages.configs",
    "stages.demo",
    "stages.report",
    "data_tools.probe",
    "data_tools.split",
    "data_tools.caption",
    "data_tools.score",
    "data_tools.filter",
    "data_tools.deduplicate",
    "data_tools.convert",
    "data_tools.download",
    "data_tools.preview",
    "data_tools.report",
    "data_tools.pipeline",
    "data_tools.plan",
]
HEAVY = (
    "torch", "torchvision", "diffusers", "transformers", "timm", "pandas", "pyarrow", "av", "cv2", "scenedetect",
    "gradio",
)  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (REPO / folder).rglob("*.py"))


def is_module(name: str) -> bool:
    path = REPO.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(path: Path, name: str = "") -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything the file imports, inside functions and `if TYPE_CHECKING` too."""
    package = (name or module_name(path)).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if base.split(".")[0] in OURS and is_module(full) else base


def inside(name: str, part: str) -> bool:
    return name == part or name.startswith(part + ".")


def may_import(name: str) -> tuple[str, ...]:
    """What a module may import besides its own room."""
    parts = name.split(".")
    if parts[0] != LIBRARY:
        return STANDS_ON[max((part for part in STANDS_ON if inside(name, part)), key=len)]
    if len(parts) == 1:
        return ()
    number = next((i for i, rooms in enumerate(FLOORS) if parts[1] in rooms), None)
    assert number is not None, f"{name}: a new room of the house; say in FLOORS where it stands"
    return tuple(f"{LIBRARY}.{room}" for floor in FLOORS[:number] for room in floor)


def room_of(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == LIBRARY else parts[0]


def test_maps_show_every_room_in_its_place() -> None:
    """The README's map and the architecture's table, from the ground up; what is on one floor in any order."""
    for page, mark in (("README.md", r"(?m)^  (\S.*?)    "), ("docs/architecture.md", r"(?m)^\| (`.*?) \|")):
        rows = re.findall(mark, (REPO / page).read_text(encoding="utf-8"))
        shown = [room for row in rows for room in re.findall(r"\w+", row)]
        places = [[shown.index(room) for room in floor] for floor in FLOORS[3:]]  # what is below shares a line
        assert {room for floor in FLOORS[:3] for room in floor} <= set(shown[: min(places[0])]), page
        assert places == sorted(places), page


def test_rooms_use_what_stands_above_them() -> None:
    wrong = []
    files = python_files("opensora_repro", "stages", "data_tools", "benchmarks")
    for path in files:
        name = module_name(path)
        allowed = (room_of(name), *may_import(name))
        for line, imported in imports(path):
            if imported.split(".")[0] in OURS and not any(inside(imported, target) for target in allowed):
                wrong.append(f"{path.relative_to(REPO)}:{line} imports {imported}")
    assert len(files) > 20
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {module_name(path): {name for _, name in imports(path)} for path in python_files("opensora_repro")}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_packages_of_data_stand_on_its_root_and_on_jobs() -> None:
    """One package a tool, and `jobs`, which runs their work; pipeline and preview build on report's pages, too."""
    data = REPO / "opensora_repro" / "data"
    packages = {path.parent.name for path in data.glob("*/__init__.py")}
    assert packages == {path.stem for path in (REPO / "data_tools").glob("[!_]*.py")} | {"jobs"}
    allowed = {name: {name, "jobs"} for name in packages}
    allowed |= {name: {name, "jobs", "report"} for name in ("pipeline", "preview")}
    wrong = []
    for path in python_files("opensora_repro/data"):
        own = path.relative_to(data).parts[0]  # of a module at the root its file name, which may import no package
        for line, imported in imports(path):
            part = imported.removeprefix("opensora_repro.data.").split(".")[0]
            if inside(imported, "opensora_repro.data") and part in packages - allowed.get(own, set()):
                wrong.append(f"{path.relative_to(REPO)}:{line} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_the_walk_sees_a_forbidden_import(tmp_path: Path) -> None:
    """The rule above is only worth something if a breach of it is seen, wherever it stands in a file."""
    tree = REPO / "opensora_repro" / "models" / "example.py"
    code = "def f():\n    from opensora_repro.training import checkpoint\n    import colossalai.booster\n"
    (tmp_path / "example.py").write_text(code)
    found = [name for _, name in imports(tmp_path / "example.py", module_name(tree))]
    assert found == ["opensora_repro.training.checkpoint", "colossalai.booster"]
    allowed = may_import("opensora_repro.models.example")
    assert not any(inside(found[0], target) for target in allowed)
    assert inside("opensora_repro.kernels.ops", allowed[-1])
    assert not inside("opensora_repro.models_extra", "opensora_repro.models")


def test_what_tells_models_apart_stands_in_the_table_of_families() -> None:
    found = [
        f"{path.relative_to(REPO)}:{node.lineno}"
        for path in python_files("opensora_repro", "stages", "data_tools")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and re.match(r"(isinstance|type)\(.*\b\w*DiT\d?(Config)?\b", ast.unparse(node))
    ]
    assert not found


def test_cuda_is_called_by_the_device_helpers_alone() -> None:
    found = {
        module_name(path)
        for path in python_files("opensora_repro", "stages", "data_tools")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and re.search(r"\btorch\.cuda\.|\.cuda\(", ast.unparse(node.func) + "(")
    }
    assert found == {"opensora_repro.parallel.device", "opensora_repro.parallel.cuda_graph"}


def test_only_the_colossal_engines_import_colossalai() -> None:
    found = {
        module_name(path)
        for path in python_files("opensora_repro", "stages", "data_tools", "benchmarks")
        for _, imported in imports(path)
        if inside(imported, "colossalai")
    }
    assert found == {f"opensora_repro.parallel.{name}" for name in ("colossal", "cpu")}


def test_triton_is_imported_by_the_fused_kernels_alone_and_they_by_need() -> None:
    found = {
        module_name(path)
        for path in python_files("opensora_repro", "stages", "data_tools", "benchmarks")
        for _, imported in imports(path)
        if inside(imported, "triton")
    }
    assert found
    assert all(inside(name, "opensora_repro.kernels.fused") for name in found)
    for path in python_files("opensora_repro", "stages"):
        if not inside(module_name(path), "opensora_repro.kernels.fused"):
            loaded = [ast.unparse(node) for node in ast.parse(path.read_text(encoding="utf-8")).body]
            assert not any(re.match(r"(from|import) opensora_repro\.kernels\.fused", line) for line in loaded), path


def commands() -> list[str]:
    """Every module that can be started with `python -m`, and those the documentation promises."""
    found = {
        module_name(path)
        for path in python_files("stages", "data_tools", "opensora_repro")
        if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
    }
    return sorted(found | set(COMMANDS))


def test_opensora_repro_has_every_command_under_a_name_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    from stages import __main__ as opensora_repro

    known = opensora_repro.commands()
    assert sorted(known.values()) == sorted(COMMANDS)
    assert opensora_repro.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(f"  {name} ") and line.endswith(".") for line in lines) for name in known)
    assert opensora_repro.main(["scroe", "--help"]) == 2
    assert capsys.readouterr().err == "error: scroe: no such command; the closest name is score\n"


@pytest.mark.parametrize("command", commands())
def test_help_loads_nothing_heavy(command: str) -> None:
    """`--help` answers at once because it loads none of the large libraries."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{command!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_module({command!r}, run_name='__main__', alter_sys=True)\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
        f"print('LOADED', *[name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *shown, loaded = done.stdout.splitlines()
    assert any(line.startswith("usage:") for line in shown), done.stdout
    assert loaded == "LOADED", f"{command} --help loads {loaded.removeprefix('LOADED ')}"


def tracked_files() -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    )
    files = [REPO / name for name in done.stdout.split("\0") if name]
    return [path for path in files if path.is_file()]


def text_of(path: Path) -> str:
    data = path.read_bytes()
    return "" if b"\0" in data[:8192] else data.decode("utf-8", errors="replace")


def test_no_file_names_one_machine_or_a_package_registry() -> None:
    machine = re.compile(r"(?<![\w.])/(?:home|root|Users|work|farm|mnt)/\w")
    registry = re.compile(r"pypi[.]org|pythonhosted[.]org|registry[.]npmjs|deb[.]debian[.]org|download[.]pytorch[.]org")
    wrong = [
        f"{path.relative_to(REPO)}:{number}: {line.strip()[:120]}"
        for path in tracked_files()
        for number, line in enumerate(text_of(path).splitlines(), 1)
        if machine.search(line) or registry.search(line)
    ]
    assert not wrong, "\n".join(wrong)


def test_tracked_files_stay_small() -> None:
    large = {str(path.relative_to(REPO)): path.stat().st_size for path in tracked_files()}
    assert not {name: size for name, size in large.items() if size > 4_000_000}
    demo = sum(size for name, size in large.items() if name.startswith("checkpoints/demo/"))
    assert demo < 4_000_000, f"checkpoints/demo holds {demo} bytes; it is to stay under 4 MB"


PRIVATE_WORDS = "verdict ahead needs peers turns wanted near asking wish through dear visits besides"
AS_NAMES = re.compile(rf"\b({PRIVATE_WORDS.replace(' ', '|')})\b *([]=:,()[.-]|in\b)")


def private_names(source: str) -> Iterator[tuple[int, str]]:
    """Where names are given that say less than the field's own."""
    for node in ast.walk(ast.parse(source)) if AS_NAMES.search(source) else ():
        name = ""
        if isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.arg | ast.keyword):
            name = node.arg or ""
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            name = node.name
        if name in PRIVATE_WORDS.split():
            yield node.lineno, name


def test_names_are_standard_words() -> None:
    example = "def near(wish):\n    for ahead, here in turns:\n        self.dear = unseen(besides=nearest)"
    assert sorted(private_names(example)) == [
        (1, "near"),
        (1, "wish"),
        (2, "ahead"),
        (2, "turns"),
        (3, "besides"),
        (3, "dear"),
    ]
    wrong = [
        f"{path.relative_to(REPO)}:{line}: {name}"
        for path in python_files(*OURS, "examples")
        for line, name in private_names(path.read_text(encoding="utf-8"))
    ]
    assert not wrong, "\n".join(wrong)


def test_one_word_has_one_meaning() -> None:
    """A stage of the training, a source video, a training sample's frames."""
    texts = (path.read_text(encoding="utf-8") for path in python_files(LIBRARY, "stages", "data_tools"))
    found = [name for text in texts for name in re.findall(r"^class (Stage|Source|Clip)\b", text, re.MULTILINE)]
    assert sorted(found) == ["Clip", "Source", "Stage"]


READERS = ("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load")


def unsafe_loads(source: str) -> Iterator[int]:
    """Lines that unpickle: `torch.load` without a literal weights_only=True, pickle's own readers, numpy's opt-in.

    And lines that import one under another name, by which its calls would not be known.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            if any(f"{node.module}.{item.name}" in ("torch.load", *READERS) for item in node.names):
                yield node.lineno
        elif isinstance(node, ast.Import):
            if any(item.asname and item.name in ("torch", "pickle", "joblib") for item in node.names):
                yield node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            options = {option.arg: option.value for option in node.keywords}
            name, safe = ast.unparse(node.func), options.get("weights_only")
            unsafe = name == "torch.load" and not (isinstance(safe, ast.Constant) and safe.value is True)
            if unsafe or name in READERS or "allow_pickle" in options:
                yield node.lineno


def test_nothing_is_unpickled_unsafely() -> None:
    example = [
        "torch.load(p)",
        "torch.load(p, weights_only=True)",
        "torch.load(p, weights_only=flag)",
        "pickle.loads(data)",
        "numpy.load(p, allow_pickle=True)",
        "from pickle import dumps, loads",
        "import torch, pickle as p",
        "import pickle, torch.nn as nn",
    ]
    assert sorted(unsafe_loads("\n".join(example))) == [1, 3, 4, 5, 6, 7]
    wrong = [
        f"{path.relative_to(REPO)}:{line}"
        for path in python_files(*OURS)
        for line in unsafe_loads(path.read_text(encoding="utf-8"))
    ]
    assert not wrong, "\n".join(wrong)
