"""The catalog of published weights, and fetching from a small hub of our own that can break off, lie and vanish."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from opensora_repro.files import sha256_of
from opensora_repro.weights.catalog import (
    SHA256,
    CatalogError,
    Entry,
    File,
    fetch,
    find_cached,
    find_entry,
    load_catalog,
    similar_name,
)

REPO = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = bytes(range(256)) * 4000  # about 1 MB, a large file to the hub
WEIGHTS_SHA = hashlib.sha256(WEIGHTS).hexdigest()
CONFIG = b'{"sample_size": 32}\n'


# ---------------------------------------------------------------------------------------------------------------------
# The catalog


def test_the_catalog_is_sound() -> None:
    entries = load_catalog()
    names = [entry.name for entry in entries]
    assert len(names) == len(set(names)) >= 15
    layouts = {"pixart", "pixart-ms", "stdit", "stdit2", "stdit3", "dit", "latte", "diffusers-pixart", "diffusers-dit"}
    for entry in entries:
        assert entry.licence and entry.about and "\n" not in entry.about
        assert entry.layout in layouts | {"diffusers-vae", "opensora-vae", "transformers-t5"}
        assert bool(entry.repository) != bool(entry.url)
        assert entry.about_bytes > 10**8
        for file in entry.files:
            assert not file.sha256 or SHA256.fullmatch(file.sha256)
            assert file.path.startswith(entry.folder + "/") or entry.folder in ("", ".")
            assert not (file.size and file.about_bytes)
        assert entry.folder or len(entry.files) == 1
        assert find_entry(entry.name) == entry


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("hpcai-tech/OpenSora-STDiT-v2-stage2", "keys_stdit2_xl2"),
        ("hpcai-tech/OpenSora-STDiT-v2-stage3", "keys_stdit2_xl2"),
        ("hpcai-tech/OpenSora-STDiT-v3", "keys_stdit3_xl2"),
        ("hpcai-tech/OpenSora-VAE-v1.2", "keys_vae_pipeline_v12"),
    ],
)
def test_the_estimates_of_1_1_and_1_2(golden_1_2_dir: Path, name: str, keys: str) -> None:
    numbers = json.loads((golden_1_2_dir / f"{keys}.json").read_text())["n_state_dict_elements"]
    assert find_entry(name).about_bytes == 4 * numbers


def test_the_estimates_agree_with_the_published_key_lists(golden_dir: Path) -> None:
    lists = {
        "PixArt-XL-2-256x256.pth": "keys_pixart_xl2_256_alpha",
        "PixArt-XL-2-512x512.pth": "keys_pixart_xl2_512_alpha",
        "PixArt-XL-2-1024-MS.pth": "keys_pixartms_xl2_opensora_1x1024",
        "OpenSora-v1-16x256x256.pth": "keys_stdit_xl2_16x256x256",
        "OpenSora-v1-HQ-16x512x512.pth": "keys_stdit_xl2_16x512x512",
        "DiT-XL-2-256x256.pt": "keys_dit_xl2_256_fb",
        "ucf101.pt": "keys_latte_xl2_ucf101_vchitect",
    }
    for name, keys in lists.items():
        numbers = json.loads((golden_dir / f"{keys}.json").read_text())["n_state_dict_elements"]
        assert 0 <= find_entry(name).about_bytes - 4 * numbers < 200_000, name  # the rest is names and padding


def test_an_unknown_name_gets_the_closest_one() -> None:
    with pytest.raises(CatalogError, match=r"^opensora-v1-hq-16x512: not in .* is OpenSora-v1-HQ-16x512x512\.pth$"):
        find_entry("opensora-v1-hq-16x512")


def cache(hub_cache: Path, repository: str, *names: str) -> Path:
    """The hub's cache with these (empty) files of a repository, as huggingface_hub lays it out; their folder."""
    folder = hub_cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    for name in names:
        path = folder / "snapshots" / COMMIT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder / "snapshots" / COMMIT


def test_what_was_fetched_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    files = cache(tmp_path, "PixArt-alpha/PixArt-alpha", "PixArt-XL-2-256x256.pth")
    assert find_cached("PixArt-XL-2-256x256.pth") == files / "PixArt-XL-2-256x256.pth"
    names = ("transformer/config.json", "transformer/diffusion_pytorch_model.safetensors")
    files = cache(tmp_path, "PixArt-alpha/PixArt-XL-2-512x512", *names)
    assert find_cached("PixArt-alpha/PixArt-XL-2-512x512/transformer") == files / "transformer"
    cache(tmp_path, "PixArt-alpha/PixArt-XL-2-256x256", names[0])  # half of it
    for name in ("PixArt-XL-2-512x512.pth", "PixArt-alpha/PixArt-XL-2-256x256/transformer"):
        with pytest.raises(
            CatalogError, match=f"^{name}: not in the hub's cache {tmp_path}: run `python -m stages"
        ) as e:
            find_cached(name)
        assert f"`python -m stages.weights fetch {name}`" in str(e.value)
    with pytest.raises(CatalogError, match=r"curl -L -C - -O https://dl\.fbaipublicfiles\.com"):
        find_cached("DiT-XL-2-256x256.pt")
    assert find_cached("runs/stage1") is None


def test_a_name_that_is_nearly_one_of_the_catalog() -> None:
    assert similar_name("pixart-xl2-512x512.pth") == "; the catalog of published weights has PixArt-XL-2-512x512.pth"
    assert similar_name("runs/stage1") == similar_name("weights.pth") == ""


def test_a_file_outside_the_hub_gets_a_command() -> None:
    with pytest.raises(CatalogError, match=r"curl -L -C - -O https://dl\.fbaipublicfiles\.com/\S+256x256\.pt`"):
        fetch(find_entry("DiT-XL-2-256x256.pt"))


def test_sha256_reports_how_far_it_is(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(WEIGHTS * 5)
    seen: list[int] = []
    assert sha256_of(path, seen.append) == hashlib.sha256(WEIGHTS * 5).hexdigest()
    assert seen == [4 << 20, len(WEIGHTS) * 5]


def test_the_module_is_light() -> None:
    code = "import sys, opensora_repro.weights.catalog; print({'torch', 'huggingface_hub'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Fetching


@dataclass
class Hub:
    """What the small hub holds and how it behaves."""

    endpoint: str
    files: dict[str, bytes] = field(default_factory=dict)
    claimed_sha: dict[str, str] = field(default_factory=dict)  # what it says instead of the truth
    cut_at: int | None = None  # break off a download after so many bytes, once
    silent_after: bool = False  # and from then on answer no download
    silent: bool = False
    ranges: list[str | None] = field(default_factory=list)  # of the downloads asked for


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            name = self.path.split("?")[0].replace("/resolve/main/", "/").replace(f"/resolve/{COMMIT}/", "/")[1:]
            if name not in hub.files:
                owner = name.rpartition("/")[0] + "/"
                known = any(path.startswith(owner) for path in hub.files)
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = hub.files[name]
            expected = self.headers.get("Range")
            start = int(re.match(r"bytes=(\d+)-", expected)[1]) if expected else 0
            if body:
                if hub.silent:
                    self.close_connection = True
                    return
                hub.ranges.append(expected)
            self.send_response(206 if expected else 200)
            self.send_header("X-Repo-Commit", COMMIT)
            if name.endswith((".pth", ".safetensors")):
                self.send_header("X-Linked-Etag", f'"{hub.claimed_sha.get(name, hashlib.sha256(content).hexdigest())}"')
                self.send_header("X-Linked-Size", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            if expected:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            if not body:
                return
            if hub.cut_at:
                self.wfile.write(content[start : start + hub.cut_at])
                hub.cut_at, hub.silent, self.close_connection = None, hub.silent_after, True
            else:
                self.wfile.write(content[start:])

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub("")
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield hub
    server.shutdown()
    server.server_close()


RUN = """
import sys
from opensora_repro.weights.catalog import CatalogError, Entry, File, fetch
entry = eval(sys.argv[1])
try:
    print("PATH", fetch(entry))
except CatalogError as error:
    print("ERROR", error)
"""


def run_fetch(entry: Entry, home: Path, endpoint: str, **environment: str) -> str:
    """Fetch in a process of its own, which reads the hub's variables at its start."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE_"))}
    clean |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    clean |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    command = [sys.executable, "-c", RUN, repr(entry)]
    done = subprocess.run(command, cwd=REPO, env=clean, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 1, done.stdout
    return lines[0]


def single(**facts: Any) -> Entry:
    return Entry("w.pth", "weights", "mit", "pixart", (File("w.pth", **facts),), repository="me/weights")


def test_a_file_is_fetched_verified_and_then_at_hand_without_a_connection(hub: Hub, tmp_path: Path) -> None:
    hub.files["me/weights/w.pth"] = WEIGHTS
    entry = single(size=len(WEIGHTS), sha256=WEIGHTS_SHA)
    answer = run_fetch(entry, tmp_path, hub.endpoint)
    path = Path(answer.removeprefix("PATH "))
    assert path.read_bytes() == WEIGHTS and path.is_relative_to(tmp_path)
    assert run_fetch(entry, tmp_path, hub.endpoint, HF_HUB_OFFLINE="1") == answer
    assert len(hub.ranges) == 1


def test_a_folder_is_fetched_whole(hub: Hub, tmp_path: Path) -> None:
    hub.files["me/model/transformer/config.json"] = CONFIG
    hub.files["me/model/transformer/model.safetensors"] = WEIGHTS
    hub.files["me/model/transformer/model.bin"] = WEIGHTS
    files = (File("transformer/config.json"), File("transformer/model.safetensors"))
    entry = Entry("m", "model", "mit", "diffusers-pixart", files, repository="me/model", folder="transformer")
    folder = Path(run_fetch(entry, tmp_path, hub.endpoint).removeprefix("PATH "))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "config.json": CONFIG,
        "model.safetensors": WEIGHTS,
    }
    assert len(hub.ranges) == 2


def test_a_dropped_connection_is_taken_up_where_it_broke(hub: Hub, tmp_path: Path) -> None:
    large = WEIGHTS * 24  # written to the disk 10 MB at a time
    hub.files["me/weights/w.pth"] = large
    hub.cut_at = 12_000_000
    entry = single(sha256=hashlib.sha256(large).hexdigest())
    answer = run_fetch(entry, tmp_path, hub.endpoint)
    if answer.startswith("ERROR"):  # huggingface_hub up to 1.0 or so goes on at the next call
        assert re.search(r"fetching it failed \(.+\); fetch again$", answer), answer
        answer = run_fetch(entry, tmp_path, hub.endpoint)
    assert Path(answer.removeprefix("PATH ")).read_bytes() == large
    first, last = hub.ranges
    assert first is None and 0 < int(last.removeprefix("bytes=").rstrip("-")) <= 12_000_000


def test_a_hub_that_falls_silent_is_one_line_and_leaves_nothing_broken(hub: Hub, tmp_path: Path) -> None:
    hub.files["me/weights/w.pth"] = WEIGHTS
    hub.cut_at, hub.silent_after = 600_000, True
    answer = run_fetch(single(sha256=WEIGHTS_SHA), tmp_path, hub.endpoint)
    assert re.match(r"ERROR me/weights/w\.pth: fetching it failed \(.+\); fetch again$", answer), answer
    hub.silent = False
    answer = run_fetch(single(sha256=WEIGHTS_SHA), tmp_path, hub.endpoint)
    assert Path(answer.removeprefix("PATH ")).read_bytes() == WEIGHTS


@pytest.mark.parametrize("who", ["catalog", "hub"])
def test_a_wrong_sha256_is_refused_and_a_new_fetch_mends_it(hub: Hub, tmp_path: Path, who: str) -> None:
    damaged = WEIGHTS[:-1] + b"?"
    hub.files["me/weights/w.pth"] = damaged
    hub.claimed_sha["me/weights/w.pth"] = WEIGHTS_SHA
    entry = single(sha256=WEIGHTS_SHA if who == "catalog" else "")
    answer = run_fetch(entry, tmp_path, hub.endpoint)
    found = hashlib.sha256(damaged).hexdigest()
    match = re.match(
        rf"ERROR \S+/w\.pth: has sha256 {found}, expected sha256 {WEIGHTS_SHA}; delete (\S+) and fetch again$", answer
    )
    assert match, answer
    Path(match[1]).unlink()
    hub.files["me/weights/w.pth"] = WEIGHTS
    assert Path(run_fetch(entry, tmp_path, hub.endpoint).removeprefix("PATH ")).read_bytes() == WEIGHTS


def test_a_wrong_size_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.files["me/weights/w.pth"] = WEIGHTS
    answer = run_fetch(single(size=7), tmp_path, hub.endpoint)
    assert re.search(r"w\.pth: has 1024000 bytes, expected 7 bytes; delete \S+ and fetch again$", answer), answer


def test_why_nothing_came(hub: Hub, tmp_path: Path) -> None:
    hub.files["me/weights/other.pth"] = WEIGHTS
    offline = run_fetch(single(), tmp_path, hub.endpoint, HF_HUB_OFFLINE="1")
    assert (
        offline
        == f"ERROR me/weights/w.pth: not in the hub's cache {tmp_path}/hub, and HF_HUB_OFFLINE forbids fetching it"
    )
    no_file = run_fetch(single(), tmp_path, hub.endpoint)
    assert no_file == f"ERROR me/weights/w.pth: {hub.endpoint} has the repository but not this file"
    hub.files.clear()
    no_repository = run_fetch(single(), tmp_path, hub.endpoint)
    assert no_repository.startswith(f"ERROR me/weights/w.pth: {hub.endpoint} has no such repository")


def test_no_connection_is_one_line(tmp_path: Path) -> None:
    answer = run_fetch(single(), tmp_path, "http://127.0.0.1:9")
    assert answer.startswith(
        f"ERROR me/weights/w.pth: not in the hub's cache {tmp_path}/hub, and no connection to http"
    )


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("opensora_repro.weights.catalog._reach_hub", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    with pytest.raises(OSError, match=r"the disk is full; .*HF_HOME.*: 'me/weights/w\.pth'$"):
        fetch(single())
