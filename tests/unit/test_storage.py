"""Paths that are addresses, against a store on this machine: patience, room, the dead, what is never told."""

from __future__ import annotations

import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest

from data_tools import pipeline, preview, probe, report
from opensora_repro.config import ConfigError
from opensora_repro.config.toml import parse_config
from opensora_repro.data.inputs import find_inputs
from opensora_repro.data.jobs import records
from opensora_repro.data.manifest import read_manifest
from opensora_repro.data.preflight import survey
from opensora_repro.data.write import write_video
from opensora_repro.errors import run_command
from opensora_repro.files import one_line, write_text
from opensora_repro.run_folder import check_folder
from opensora_repro.storage import objects, scratch
from opensora_repro.storage.addresses import AddressRefused, address_of, place, relative, scratch_folder, shown, within
from opensora_repro.storage.objects import facts_of, is_object, look_up
from opensora_repro.storage.scratch import fetched, prefetch, publish, unfinished_name
from tests.hub_server import DatasetHub
from tests.object_store import BUCKET, Store, files, fill, serving

SECRETS = (
    "s3://me:hush@bucket-a/a.mp4",
    "https://host/a.mp4?X-Amz-Signature=hush&x=1",
    "https://host/a?token=hush",
    "https://host/a?x=1&auth=hush",
)


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with serving({}) as store:
        yield store


@pytest.fixture
def node(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store, seen from a node that has nothing of it yet."""
    monkeypatch.setenv("OPENSORA_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setattr(objects, "FIRST_PAUSE", 0.01)
    forget()
    store.asked.clear()
    store.busy.clear()
    yield store
    forget()


def forget() -> None:
    """Be a process that has just begun."""
    scratch._begin_in_child()
    objects._known.clear()


def put(name: str, content: bytes) -> Path:
    files().pipe_file(f"{BUCKET}/{name}", content)
    return place(f"s3://{BUCKET}/{name}")


def copies() -> list[Path]:
    return [path for path in (scratch_folder() / "s3").rglob("*") if path.is_file()]


def test_an_address_and_its_path_stand_for_each_other(tmp_path: Path) -> None:
    for address in ("s3://bucket/a b/ü.mp4", "gs://b/x", "hf://datasets/me/it@main/a.mp4", "https://h:8/a.mp4?v=1"):
        path = place(address)
        assert address_of(path) == address == shown(str(path)) == one_line(path)
        assert place(str(path)) == path == within(tmp_path, address)
        assert address_of(path.parent / "sub" / ".." / path.name) == address
    mac = "s3://bucket/Screen Recording 1.00\u202fPM.mov"  # as macOS names them
    assert address_of(place(mac)) == mac
    assert place("~/x") == Path("~/x").expanduser()
    assert address_of(tmp_path) == "" == address_of("s3:/bucket/x")
    for wrong in ("s3://", "s3://bucket/../x", "s3://bucket//x", "s3://bucket/a\nb"):
        with pytest.raises(AddressRefused, match="no address of an object"):
            place(wrong)
    for wrong in ("S3://bucket/x", "az://bucket/x", "s3a://bucket/x"):
        with pytest.raises(AddressRefused, match="no store that can be used: expected s3://, gs://, hf://"):
            place(wrong)


def test_a_manifest_names_files_by_the_shortest_way_there_is(tmp_path: Path) -> None:
    here = place("s3://bucket/out")
    assert relative(place("s3://bucket/out/clips/a.mp4"), here) == "clips/a.mp4"
    assert relative(place("s3://bucket/in/a.mp4"), here) == "../in/a.mp4"
    assert relative(place("s3://other/a.mp4"), here) == "s3://other/a.mp4"
    assert relative(place("s3://other/a.mp4"), tmp_path) == "s3://other/a.mp4"
    assert relative(tmp_path / "a.mp4", here) == str(tmp_path / "a.mp4")
    assert relative(tmp_path / "a.mp4", tmp_path / "out") == "../a.mp4"


@pytest.mark.parametrize("address", SECRETS)
def test_credentials_are_refused_and_told_to_nobody(
    address: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        probe.main([address, "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    line = tmp_path / "line.toml"
    line.write_text(f"input = '{address}'\nout = '{tmp_path}'\n[probe]\n")
    assert pipeline.main([str(line)]) == 2
    with pytest.raises(ConfigError, match=r"data\.manifest = .*holds credentials; leave them out") as refused:
        parse_config({}, [f'data.manifest="{address}"'], where="x")
    told = capfd.readouterr()
    assert told.err.count("holds credentials; leave them out and set them in the environment") == 2
    assert "hush" not in told.out + told.err + str(refused.value)
    assert "hush" not in one_line(f"cannot open {address}")


def test_a_row_with_credentials_is_a_reject_and_leaves_no_trace_of_them(tmp_path: Path, videos_made: Path) -> None:
    rows = [{"path": address} for address in SECRETS] + [{"path": str(videos_made / "a.mp4")}]
    pd.DataFrame(rows).to_csv(tmp_path / "in.csv", index=False)
    assert probe.main([str(tmp_path / "in.csv"), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    rejects = pd.read_parquet(tmp_path / "out" / "rejects.parquet")
    assert len(rejects) == len(SECRETS) and rejects["reason"].str.contains("holds credentials").all()
    assert all(b"hush" not in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def videos_made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import numpy as np

    folder = tmp_path_factory.mktemp("videos")
    for name, grey in (("a.mp4", 40), ("sub/b.mp4", 90), ("gone.mp4", 140)):
        (folder / name).parent.mkdir(exist_ok=True)
        write_video(folder / name, np.full((9, 32, 32, 3), grey, np.uint8), 12)
    return folder


def test_what_takes_no_address_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        preview.main(["s3://bucket/m.parquet", "--config", "x.toml", "--out", str(tmp_path)])
    assert "s3://bucket/m.parquet: expected a path of this machine, not an address" in capfd.readouterr().err
    with pytest.raises(ConfigError, match=r"run\.dir = s3://b/run: expected a path of this machine; data\.manifest,"):
        parse_config({}, ['run.dir="s3://b/run"'], where="x")


def test_a_store_that_is_busy_is_waited_for(node: Store) -> None:
    path = put("busy/a", b"there")
    node.busy |= {f"HEAD /{BUCKET}/busy/a": 2, f"GET /{BUCKET}/busy/a": 7}  # some of them are met by s3fs itself
    assert fetched(path).read_bytes() == b"there"
    assert sum(node.busy.values()) == 0
    node.busy[f"PUT /{BUCKET}/busy/b"] = 7
    write_text(place(f"s3://{BUCKET}/busy/b"), "written")
    assert files().cat_file(f"{BUCKET}/busy/b") == b"written"


def test_a_store_that_stays_busy_ends_the_work_in_one_line(node: Store, capfd: pytest.CaptureFixture[str]) -> None:
    path = put("busy/c", b"there")
    node.busy[f"HEAD /{BUCKET}/busy/c"] = 1000
    assert run_command(lambda: len(fetched(path).read_bytes())) == 1
    assert capfd.readouterr().err == (
        f"error: s3://{BUCKET}/busy/c: Service Unavailable; the same command goes on from here\n"
    )


def test_copies_keep_within_their_room(node: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [put(f"room/{number}", bytes([number]) * 300_000) for number in range(8)]
    monkeypatch.setenv("OPENSORA_SCRATCH_GB", "0.001")
    for number, path in enumerate(paths):
        assert fetched(path).read_bytes() == bytes([number]) * 300_000
        fetched(paths[0])  # used all the time: it stays, whatever else goes
        assert sum(copy.stat().st_size for copy in copies()) <= 1_000_000
    assert node.count(f"GET /{BUCKET}/room/0") == 1
    assert {*copies()} >= {paths[0], paths[-1]}
    assert all(stat.S_IMODE(copy.stat().st_mode) == 0o444 for copy in copies())
    monkeypatch.setenv("OPENSORA_SCRATCH_GB", "0.0002")
    with pytest.raises(OSError, match=r"0\.0003 GB more, with what is in use, are above OPENSORA_SCRATCH_GB = 0\.0002"):
        fetched(paths[3])


ON_A_SMALL_DISK = """
import sys
from opensora_repro.storage.addresses import place
from opensora_repro.storage.scratch import fetched
print(*(len(fetched(place(f"s3://bucket-a/disk/{number}")).read_bytes()) for number in range(4)))
fetched(place("s3://bucket-a/disk/large"))
"""


def test_copies_keep_within_their_disk(node: Store, tmp_path: Path) -> None:
    for number in range(4):
        put(f"disk/{number}", bytes([number]) * 400_000)
    put("disk/large", b"x" * 3_000_000)
    (tmp_path / "disk").mkdir()
    mount = 'mount -t tmpfs -o size=1400k tmpfs "$OPENSORA_SCRATCH" || exit 9; exec "$@"'
    command = ["unshare", "-rm", "sh", "-c", mount, "sh", sys.executable, "-c", ON_A_SMALL_DISK]
    where = {**os.environ, "OPENSORA_SCRATCH": str(tmp_path / "disk")}
    done = subprocess.run(command, env=where, capture_output=True, text=True, timeout=300)
    if done.returncode == 9 or "unshare" in done.stderr:
        pytest.skip("this machine gives nobody a disk of their own")
    assert done.stdout.split() == ["400000"] * 4, done.stderr
    assert "0.003 GB more, with what is in use, are above what its disk has; set OPENSORA_SCRATCH" in done.stderr


def test_processes_share_copies_and_their_room(node: Store) -> None:
    contents = {put(f"shared/{number}", os.urandom(50_000)): None for number in range(6)}
    paths = [path for path in contents for _ in range(2)]
    workers = [multiprocessing.get_context("fork").Process(target=_read_all, args=(paths[n:] + paths[:n],))
               for n in range(3)]  # fmt: skip
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    for path in contents:
        assert node.count(f"GET /{BUCKET}/shared/{path.name}") == 1
        assert path.read_bytes() == files().cat_file(f"{BUCKET}/shared/{path.name}")


def _read_all(paths: list[Path]) -> None:
    prefetch(map(str, paths))
    os._exit(0 if all(len(fetched(path).read_bytes()) == 50_000 for path in paths) else 1)


def test_a_killed_process_leaves_no_half_of_an_object(node: Store) -> None:
    path = put("half/a", b"x" * 400_000)
    node.stalled.add(f"GET /{BUCKET}/half/a")
    worker = multiprocessing.get_context("fork").Process(target=fetched, args=(path,))
    worker.start()
    incoming = scratch_folder() / "incoming"
    while not any(file.stat().st_size for file in incoming.glob("*/*[0-9]")):
        time.sleep(0.02)
    os.kill(worker.pid or 0, signal.SIGKILL)
    worker.join()
    node.stalled.clear()
    assert not path.exists() and len(list(incoming.iterdir())) == 1
    assert fetched(path).read_bytes() == b"x" * 400_000
    assert [folder.name.partition("-")[0] for folder in incoming.iterdir()] == [str(os.getpid())]


def test_an_object_that_was_replaced_is_fetched_again(node: Store) -> None:
    path = put("new/a", b"old!")
    assert fetched(path).read_bytes() == b"old!"
    put("new/a", b"new!")  # as long, and perhaps in the same second
    forget()
    assert fetched(path).read_bytes() == b"new!"


def test_a_file_is_published_whole_and_an_equal_one_left_untouched(node: Store, tmp_path: Path) -> None:
    path = place(f"s3://{BUCKET}/out/a.txt")
    with pytest.raises(RuntimeError):
        _write_half(path)
    assert not is_object(path)
    for text in ("one", "one", "two"):
        write_text(path, text)
    assert node.count(f"PUT /{BUCKET}/out/a.txt") == 2
    forget()
    assert fetched(path).read_text() == "two" and node.count(f"GET /{BUCKET}/out/a.txt") == 0
    unfinished = unfinished_name(path)
    unfinished.write_text("x")
    with pytest.raises(AddressRefused, match="can only be read from"):
        publish(unfinished, place("https://127.0.0.1:1/a.txt"))


def _write_half(path: Path) -> None:
    from opensora_repro.files import writing

    with writing(path) as file:
        file.write(b"half")
        raise RuntimeError


def test_what_a_folder_and_a_pattern_stand_for(node: Store, tmp_path: Path) -> None:
    for name in ("v/b.mp4", "v/a.mp4", "v/sub/c.mp4", "v/.hidden/d.mp4", "v/out/e.mp4", "v/notes.txt"):
        put(name, b"x")
    here, out = place(f"s3://{BUCKET}/v"), place(f"s3://{BUCKET}/v/out")
    found = find_inputs(here, out=out)
    assert [item.name for item in found.items] == ["a.mp4", "b.mp4", "sub/c.mp4"] and found.others == 1
    assert [item.name for item in find_inputs(here / "*.mp4", out=out).items] == ["a.mp4", "b.mp4"]
    assert [item.name for item in find_inputs(here / "b.mp4", out=out).items] == ["b.mp4"]
    assert node.count("HEAD") < 9 and not copies()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (f"{BUCKET}/nowhere", "no such object or folder"),
        (f"{BUCKET}/nowhere/a.mp4", "no such object or folder"),
        (f"{BUCKET}/nowhere/*.mp4", "no such object or folder"),
        (f"{BUCKET}/words/*.mp4", "no object matches this pattern"),
        (f"{BUCKET}/words", "no video in this folder"),
        (f"{BUCKET}/empty", "no video in this folder"),
        ("bucket-b", "no such bucket"),
        ("bucket-b/a.mp4", "no such bucket"),
        ("bucket-b/*.mp4", "no such bucket"),
    ],
)
def test_what_is_missing_is_told_from_what_is_empty(
    node: Store, name: str, told: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    put("words/notes.txt", b"x")
    files().pipe_file(f"{BUCKET}/empty/", b"")  # as the stores' own pages make a folder
    assert probe.main([f"s3://{name}", "--out", str(tmp_path / "out")]) == 2
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith(f"error: s3://{name}: {told}")
    if told.startswith("no such"):
        assert report.main([f"s3://{name}", "--out", str(tmp_path / "page")]) == 2
        assert capfd.readouterr().err == f"error: s3://{name}: {told}\n"


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("OPENSORA_SCRATCH_GB", "abc", "OPENSORA_SCRATCH_GB = abc: expected a number of gigabytes"),
        ("OPENSORA_SCRATCH_GB", "inf", "OPENSORA_SCRATCH_GB = inf: expected a number of gigabytes"),
        ("OPENSORA_SCRATCH", "FILE", "no copies of objects can be kept here (Not a directory); set OPENSORA_SCRATCH"),
    ],
)
def test_a_scratch_folder_that_cannot_be_used_is_no_fault_of_the_videos(
    name: str, value: str, told: str, node: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    put("wrong/a.mp4", b"x")
    (tmp_path / "file").touch()
    monkeypatch.setenv(name, value.replace("FILE", str(tmp_path / "file")))
    command = [f"s3://{BUCKET}/wrong", "--out", str(tmp_path / "out"), "--workers", "1"]
    assert probe.main(command) == 2 and told in capfd.readouterr().err
    assert not (tmp_path / "out" / "rejects.parquet").exists()


def test_a_vanished_object_is_a_reject_and_others_go_on(
    node: Store, videos_made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fill(videos_made, "footage")
    node.busy[f"GET /{BUCKET}/footage/a.mp4"] = 2
    pd.DataFrame({"path": [f"s3://{BUCKET}/footage/{name}" for name in ("a.mp4", "gone.mp4")]}).to_csv(
        tmp_path / "in.csv", index=False
    )
    files().rm_file(f"{BUCKET}/footage/gone.mp4")
    out = place(f"s3://{BUCKET}/probed")
    assert probe.main([str(tmp_path / "in.csv"), "--out", f"s3://{BUCKET}/probed", "--workers", "1"]) == 0
    assert capfd.readouterr().out == f"2 files, 1 readable, 1 rejected, 0 others: s3://{BUCKET}/probed\n"
    rejects = pd.read_parquet(fetched(out / "rejects.parquet"))
    assert rejects["reason"].tolist() == ["no such object"] and rejects["path"].tolist() == ["../footage/gone.mp4"]
    made = pd.read_parquet(fetched(out / "manifest.parquet"))
    assert made["path"].tolist() == ["../footage/a.mp4"]
    assert read_manifest(out / "manifest.parquet", need_captions=False)["path"].to_pylist() == [
        str(place(f"s3://{BUCKET}/footage/a.mp4"))
    ]


def test_another_node_goes_on_where_the_first_ended(
    node: Store, videos_made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(videos_made, "again")
    command = [f"s3://{BUCKET}/again", "--out", f"s3://{BUCKET}/again-out", "--workers", "1"]
    assert probe.main(command) == 0
    monkeypatch.setenv("OPENSORA_SCRATCH", str(tmp_path / "another"))
    forget()
    node.asked.clear()
    assert probe.main(command) == 0
    assert node.count(f"GET /{BUCKET}/again/") == 0  # nothing is read: the records tell by size and time
    assert node.count(f"GET /{BUCKET}/again-out/records.sqlite") == 1


def test_records_outlast_the_node_that_is_lost(node: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = f"s3://{BUCKET}/lost"
    monkeypatch.setattr(records, "SAVED_EVERY", 0.0)
    lost = records.Records(place(out))
    lost.put("files", {"a": '"done"'})
    lost.put("files", {"b": '"done"'})
    monkeypatch.setenv("OPENSORA_SCRATCH", str(tmp_path / "another"))
    with records.Records(place(out)) as found:
        assert found.get("files", ["a", "b", "c"]) == {"a": "done", "b": "done"}


def test_a_run_looks_at_clips_without_fetching_them(node: Store) -> None:
    from opensora_repro.config import DataConfig

    for number in range(30):
        put(f"set/clips/{number}.mp4", b"x" * (number != 7))
    rows = [{"id": str(n), "path": f"clips/{n}.mp4", "caption": "a", "num_frames": 99, "fps": 24.0, "height": 256,
             "width": 256} for n in range(31)]  # fmt: skip
    put("set/manifest.csv", pd.DataFrame(rows).to_csv(index=False).encode())
    address = f"s3://{BUCKET}/set/manifest.csv"
    table = read_manifest(address)
    node.asked.clear()
    found = survey(table, DataConfig(), address)
    assert (found.missing, found.usable, found.first_missing) == (2, 29, f"s3://{BUCKET}/set/clips/7.mp4")
    assert node.count("list-type=2") <= 2 and node.count("HEAD") <= 1 and node.count(".mp4") <= 2


def test_a_folder_to_write_to_is_tried(node: Store) -> None:
    check_folder("data.cache", f"s3://{BUCKET}/cache")
    assert files().find(f"{BUCKET}/cache") == []
    with pytest.raises(ConfigError, match=r"data\.cache = s3://bucket-b/cache: cannot be used \(no such bucket\)"):
        check_folder("data.cache", "s3://bucket-b/cache")


def test_facts_are_asked_for_side_by_side_and_once(node: Store) -> None:
    paths = [put(f"facts/{number}", b"x" * number) for number in range(1, 5)]
    look_up([*paths, *paths, place(f"s3://{BUCKET}/facts/none")])
    assert [facts_of(path).size for path in paths] == [1, 2, 3, 4]
    assert all(node.count(f"HEAD /{BUCKET}/facts/{path.name}") == 1 for path in paths)


def test_a_batch_of_clips_lists_no_folder_of_millions(node: Store) -> None:
    paths = [put(f"many/{number}", b"x") for number in range(25)]
    prefetch(map(str, paths))
    assert len(copies()) == 25 and node.count("list-type=2") == 0
    forget()
    look_up(paths, share=0.01)  # a survey's sample of ten thousand, say
    assert node.count("list-type=2") == 0 and node.count("HEAD") == 50
    forget()
    look_up(paths, share=1.0)
    assert node.count("list-type=2") == 1 and node.count("HEAD") == 50


def test_a_web_server_is_read_from(node: Store) -> None:
    put("web/a.txt", b"from the web")
    files().chmod(f"{BUCKET}/web/a.txt", acl="public-read")
    path = place(f"{node.url}/{BUCKET}/web/a.txt")
    assert fetched(path).read_bytes() == b"from the web"
    node.busy["/web/b.txt"] = 3
    with pytest.raises(FileNotFoundError, match="no such object"):
        fetched(place(f"{node.url}/{BUCKET}/web/b.txt"))
    assert node.busy["/web/b.txt"] == 0


def test_a_web_server_that_does_not_answer_is_told_from_a_file_that_is_not_there(node: Store) -> None:
    with pytest.raises(ConnectionRefusedError, match=r"Connect call failed|Cannot connect"):
        is_object(place("http://127.0.0.1:1/a.mp4"))


class Refusing(BaseHTTPRequestHandler):
    """Knows nobody."""

    def do_HEAD(self) -> None:
        self.send_response(403 if "denied" in self.path else 400)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_PUT = do_HEAD

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_wrong_credentials_are_a_line_that_says_where_to_look(
    node: Store, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    files().clear_instance_cache()
    for name, told, code in (("denied", "Forbidden", 2), ("expired", "Bad Request", 1)):
        assert run_command(lambda name=name: len(objects.objects_below(place(f"s3://elsewhere/{name}")))) == code
        assert f"{told}; are the credentials, the region and the endpoint in the environment right?" in (
            capfd.readouterr().err
        )
    assert run_command(lambda: len(fetched(place(f"{url}/denied")).read_bytes())) == 2
    assert "403" in capfd.readouterr().err
    files().clear_instance_cache()
    server.shutdown()


class Plain(BaseHTTPRequestHandler):
    """Tells no length and no tag, only the time of change."""

    changed = "Mon, 01 Jan 2024 00:00:00 GMT"

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Last-Modified", self.changed)
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.changed[:11].encode() + b"x" * 300_000)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_of_a_plain_web_server_changes_are_seen_and_bytes_are_counted(
    node: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Plain)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("OPENSORA_SCRATCH_GB", "0.001")
    for number in range(6):
        assert fetched(place(f"{url}/{number}.mp4")).read_bytes().startswith(b"Mon, 01 Jan")
        web = [path for path in (scratch_folder() / "http").rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in web) <= 1_000_000
    assert objects.read_object(place(f"{url}/5.mp4"), 5, 6) == b"01 Jan"
    monkeypatch.setattr(Plain, "changed", "Tue, 02 Jan 2024 00:00:00 GMT")
    forget()
    assert fetched(place(f"{url}/5.mp4")).read_bytes().startswith(b"Tue, 02 Jan")
    server.shutdown()
    # However large a file is: a server may take as long as it wants, if only bytes come
    timeout = objects._file_system(url).client_kwargs["timeout"]
    assert timeout.total is None and timeout.sock_read == objects.SILENCE


HUB_READER = """
from opensora_repro.data.inputs import find_inputs
from opensora_repro.storage.addresses import place
from opensora_repro.storage.scratch import fetched
from pathlib import Path
(item,) = find_inputs(place("hf://datasets/me/it/videos"), out=Path("out")).items
print(item.name, fetched(item.path).read_bytes())
"""


@pytest.mark.exhaustive
def test_a_hub_is_read_from(tmp_path: Path) -> None:
    hub = DatasetHub({"videos/a.mp4": b"from a hub", "videos/notes.txt": b"-"})
    where = {
        "HF_ENDPOINT": hub.address,
        "HF_HUB_OFFLINE": "0",
        "OPENSORA_SCRATCH": str(tmp_path),
        "HF_HOME": str(tmp_path),
    }
    read = subprocess.run(
        [sys.executable, "-c", HUB_READER], env={**os.environ, **where}, capture_output=True, text=True, timeout=300
    )
    assert read.stdout == "a.mp4 b'from a hub'\n", read.stderr
