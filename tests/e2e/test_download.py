"""`download` from a server that drops, stalls, redirects, changes its mind, and is honest at times."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from data_tools import caption, download
from opensora_repro.data.download import connect
from opensora_repro.data.download.downloads import KIND
from opensora_repro.data.jobs.records import Records
from tests.file_server import CONTENT, MD5, SHA256, Server, serving
from tests.frames import read_table, write_table
from tests.job_records import recorded


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    with serving() as server:
        yield server


def run(table: Path, rows: list[dict[str, Any]], out: Path, *options: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the manifest's rows and the rejects' reasons, by id."""
    write_table(pd.DataFrame(rows), table)
    code = download.main([str(table), "--out", str(out), "--retries", "2", "--allow-private", *options])
    kept = read_table(out / "manifest.parquet").to_dict("records")
    rejects = read_table(out / "rejects.parquet").to_dict("records")
    assert code == (0 if kept else 2)
    assert {row["stage"] for row in rejects} <= {"download"}
    assert not list((out / "files").glob(".*"))
    for row in kept:
        assert (out / row["path"]).read_bytes() == CONTENT
        assert (row["sha256"], row["file_size"]) == (SHA256, len(CONTENT))
    return {row["id"]: row for row in kept}, {row["id"]: row["reason"] for row in rejects}


def test_every_fault_has_its_answer(server: Server, tmp_path: Path) -> None:
    kinds = ("ranges", "drop", "changed", "mixed", "noranges", "busy", "tohere", "missing", "busyforlong", "broken",
             "text", "tofile", "tonowhere", "huge", "endless", "page", "circle")  # fmt: skip
    rows: list[dict[str, Any]] = [
        {"id": kind, "url": server.url(f"{kind}/a.mp4"), "caption": f"a {kind}", "likes": 3} for kind in kinds
    ]
    for row in rows:
        row["sha256"] = SHA256.upper() if row["id"] in ("mixed", "ranges") else None
        row["md5"] = MD5 if row["id"] == "drop" else None
    more = {"scheme": "file:///etc/passwd", "none": None, "no host": "http:///a.mp4", "port": "http://a:b/c.mp4"}
    rows += [{"id": name, "url": url} for name, url in more.items()]
    rows.append({"id": "wrong", "url": server.url("ranges/b.mp4"), "md5": "0" * 32})
    rows.append({"id": "odd", "url": server.url("ranges/c.mp4"), "sha256": "12"})
    rows.append({"id": "ranges", "url": server.url("ranges/again.mp4")})
    kept, reasons = run(tmp_path / "t.csv", rows, tmp_path / "out", "--max-bytes", "1M")
    assert list(kept) == ["ranges", "drop", "changed", "mixed", "noranges", "busy", "tohere", "text"]
    assert kept["drop"]["path"] == "files/drop.mp4"
    assert (kept["drop"]["caption"], kept["drop"]["likes"]) == ("a drop", 3)
    assert reasons == {
        "missing": "HTTP 404 Not Found",
        "busyforlong": "HTTP 429 Too Many Requests (the server asks to wait 100000 seconds)",
        "broken": "HTTP 500 Internal Server Error (3 tries)",
        "tofile": "redirected to file:, which is not followed",
        "tonowhere": reasons["tonowhere"],
        "huge": "has 1,000,000,000,000 bytes, --max-bytes is 1,000,000",
        "endless": "has more than 1,000,000 bytes, the limit of --max-bytes",
        "page": "is a page or other text; expected a video or picture",
        "circle": "HTTP 302: it redirects in a circle, or too often",
        "scheme": "expected an http or https URL, got file:///etc/passwd",
        "none": "url is empty",
        "no host": "expected an http or https URL, got http:///a.mp4",
        "port": reasons["port"],
        "wrong": f"md5 is {MD5}, expected {'0' * 32}",
        "odd": "sha256 is not 64 hex digits",
        "ranges": "another row has this id",
    }
    assert reasons["port"].startswith("no URL: ")
    assert reasons["tonowhere"].startswith("redirected to no URL: ")
    asked = {kind: [r for path, r in server.asked if path == f"/{kind}/a.mp4"] for kind in kinds}
    assert asked["drop"] == [None, "bytes=200000-"]
    assert asked["changed"] == [None, "bytes=200000-"]  # answered from the start
    assert asked["mixed"] == [None, "bytes=200000-", None]  # whole once more: the checksum was wrong
    assert asked["noranges"] == [None, None]
    assert len(asked["missing"]) == len(asked["busyforlong"]) == 1
    assert len(asked["busy"]) == len(asked["broken"]) == 3
    assert not list((tmp_path / "out" / "parts").iterdir())


def test_what_is_final_is_remembered_and_what_may_pass_is_tried_again(server: Server, tmp_path: Path) -> None:
    rows = [{"id": k, "url": server.url(f"{k}/a.mp4")} for k in ("ranges", "missing", "huge", "broken")]
    first = run(tmp_path / "t.csv", rows, tmp_path / "out", "--max-bytes", "1M")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()}
    server.asked.clear()
    assert run(tmp_path / "t.csv", rows, tmp_path / "out", "--max-bytes", "1M") == first
    assert {path for path, _ in server.asked} == {"/broken/a.mp4"}
    assert {p: p.stat().st_mtime_ns for p in before} == before
    server.asked.clear()
    (tmp_path / "out/files/ranges.mp4").unlink()
    run(tmp_path / "t.csv", rows, tmp_path / "out", "--max-bytes", "2M")
    assert {path for path, _ in server.asked} == {f"/{k}/a.mp4" for k in ("ranges", "huge", "broken")}


def test_a_stalled_connection_is_given_up(server: Server, tmp_path: Path) -> None:
    kinds = {"stall": "stall", "chunk": "chunk", "ok": "ranges"}
    rows = [{"id": name, "url": server.url(f"{kind}/a.mp4")} for name, kind in kinds.items()]
    kept, reasons = run(tmp_path / "t.csv", rows, tmp_path / "out", "--timeout", "0.5", "--retries", "1")
    assert list(kept) == ["ok"]
    assert "timed out (2 tries)" in reasons["stall"]
    assert reasons["chunk"] == "the connection ended early (2 tries)"


def test_a_file_has_its_time(server: Server, tmp_path: Path) -> None:
    """Bytes that drip keep every limit but that; what came is kept for the next run."""
    rows = [{"id": kind, "url": server.url(f"{kind}/a.mp4")} for kind in ("drip", "dripline", "ranges")]
    kept, reasons = run(tmp_path / "t.csv", rows, tmp_path / "out", "--max-time", "1", "--per-host", "3")
    assert list(kept) == ["ranges"]
    assert set(reasons.values()) == {"took longer than --max-time, 1 seconds; the next run goes on where it was"}
    assert not [result for result in recorded(tmp_path / "out", KIND).values() if "error" in result]


def test_private_addresses_need_an_option(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a URL, behind a name, and where a server sends us on to."""
    found = socket.getaddrinfo
    places = {"public.example": "127.0.0.1"}

    def lookup(host: str, *more: Any, **named: Any) -> Any:
        return found(places.get(host, host), *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    port = server.server_port
    hosts = ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "2130706433", "10.1.2.3",
             "192.168.0.1", "169.254.169.254", "[fe80::1]", "[fd00::1]", "100.64.0.1", "public.example"]  # fmt: skip
    rows = [{"id": host, "url": f"http://{host}:{port}/ranges/a.mp4"} for host in hosts]
    write_table(pd.DataFrame(rows), tmp_path / "t.csv")
    assert download.main([str(tmp_path / "t.csv"), "--out", str(tmp_path / "out")]) == 2
    rejects = read_table(tmp_path / "out/rejects.parquet").to_dict("records")
    assert len(rejects) == len(hosts) and not server.asked
    assert all("in this machine or a private network: --allow-private" in row["reason"] for row in rejects), rejects
    assert not recorded(tmp_path / "out", KIND)
    # A name that is public when it is looked at first; a public server that sends on.
    monkeypatch.setattr(connect, "is_public", lambda address: address != "127.0.0.2")
    rows = [{"id": "on", "url": server.url("toloopback/a.mp4")}, {"id": "ok", "url": server.url("ranges/a.mp4")}]
    write_table(pd.DataFrame(rows), tmp_path / "t.csv")
    assert download.main([str(tmp_path / "t.csv"), "--out", str(tmp_path / "out")]) == 0
    (reject,) = read_table(tmp_path / "out/rejects.parquet").to_dict("records")
    assert reject["id"] == "on" and "127.0.0.2" in reject["reason"]


def test_names_come_from_ids_and_stay_in_their_folder(server: Server, tmp_path: Path) -> None:
    ids = ["../../up", "/abs", "a b", "a_b", "A_B", "-dash", "é", "x" * 300, "con.mp4"]
    rows = [{"id": name, "url": server.url(f"ranges/{at}/..%2f..%2fetc.mp4")} for at, name in enumerate(ids)]
    rows.append({"id": "other name", "url": server.url("slow/a.exe")})
    server.pause = 0
    kept, reasons = run(tmp_path / "t.csv", rows, tmp_path / "out")
    assert not reasons
    files = sorted((tmp_path / "out" / "files").iterdir())
    assert len({path.name.lower() for path in files}) == len(rows)
    assert {f"files/{path.name}" for path in files} == {row["path"] for row in kept.values()}
    assert kept["a_b"]["path"] == "files/a_b.mp4"
    assert kept["other name"]["path"].endswith(".mp4")
    assert {p.name for p in tmp_path.iterdir()} == {"t.csv", "out"}


def test_all_files_together_stay_below_their_limit(server: Server, tmp_path: Path) -> None:
    rows = [{"id": str(at), "url": server.url(f"slow/{at}.mp4")} for at in range(6)]
    server.pause = 0.005
    options = ("--max-total", "2M", "--workers", "6", "--per-host", "2")
    kept, reasons = run(tmp_path / "t.csv", rows, tmp_path / "out", *options)
    assert len(kept) == 3
    assert set(reasons.values()) == {"--max-total is reached: 2,000,000 bytes"}
    assert sum(p.stat().st_size for p in (tmp_path / "out" / "files").iterdir()) <= 2_000_000
    kept, _ = run(tmp_path / "t.csv", rows, tmp_path / "out", "--max-total", "1M")
    assert len(kept) == 3  # what is there stays


def test_killed_and_run_again_equals_a_run_in_peace(server: Server, tmp_path: Path, repo_dir: Path) -> None:
    rows = [{"id": f"v{at}", "url": server.url(f"slow/{at}.mp4"), "sha256": SHA256} for at in range(5)]
    write_table(pd.DataFrame(rows), tmp_path / "t.parquet")
    out = tmp_path / "killed"
    parts = out / "parts"
    command = [sys.executable, "-m", "data_tools.download", str(tmp_path / "t.parquet"), "--out", str(out),
               "--allow-private"]  # fmt: skip
    process = subprocess.Popen(command, cwd=repo_dir, stderr=subprocess.DEVNULL)
    # Records that are being written are hidden files, gone in a moment.
    while not any(p.stat().st_size > 100_000 for p in parts.glob("[!.]*") if p.suffix != ".json"):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.parquet").exists()
    server.asked.clear()
    server.pause = 0
    run(tmp_path / "t.parquet", rows, out)
    assert any(asked for _, asked in server.asked)  # went on
    kept, _ = run(tmp_path / "t.parquet", rows, tmp_path / "peace")
    assert len(kept) == 5
    for name in ("manifest.parquet", "rejects.parquet", *(f"files/v{at}.mp4" for at in range(5))):
        assert (out / name).read_bytes() == (tmp_path / "peace" / name).read_bytes(), name
    assert not list(parts.iterdir())


def test_two_runs_do_not_write_the_same_files(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_table(pd.DataFrame([{"url": server.url("ranges/a.mp4")}]), tmp_path / "t.csv")
    with Records(tmp_path / "out"):
        assert download.main([str(tmp_path / "t.csv"), "--out", str(tmp_path / "out")]) == 2
    assert "another command is at work in this folder" in capsys.readouterr().err


def test_parts_of_a_video_become_captions_for_split_and_caption(server: Server, tmp_path: Path) -> None:
    url = server.url("ranges/watch?v=abc")
    spans = [(0.0, 2.0, "a dog"), (2.0, 5.0, "a cat")]
    rows = [
        {"id": f"abc-{at}", "url": url, "source": "abc", "start_time": start, "end_time": end, "caption": text}
        for at, (start, end, text) in enumerate(spans)
    ]
    kept, reasons = run(tmp_path / "t.csv", rows, tmp_path / "out")
    assert not reasons
    assert [(row["id"], row["path"], row["source"]) for row in kept.values()] == [("abc", "files/abc.mp4", "abc.mp4")]
    assert len(server.asked) == 1
    clips = [
        {"id": f"c{at}", "path": f"c{at}.mp4", "caption": "", "num_frames": 50, "fps": 25.0, "height": 8, "width": 8,
         "source": "abc.mp4", "start_time": start, "end_time": start + 2} for at, start in enumerate((0.0, 2.5))
    ]  # fmt: skip
    write_table(pd.DataFrame(clips), tmp_path / "split" / "manifest.parquet")
    sidecar = ["--sidecar", str(tmp_path / "out/captions.parquet"), "--out", str(tmp_path / "captioned")]
    assert caption.main([str(tmp_path / "split/manifest.parquet"), *sidecar]) == 0
    assert read_table(tmp_path / "captioned/manifest.parquet")["caption"].tolist() == ["a dog", "a cat"]


YT_DLP = """#!{python}
import sys
arguments = sys.argv[1:]
template, url = arguments[arguments.index("--output") + 1], arguments[-1]
assert arguments[-2] == "--"
if "private" in url:
    sys.exit("ERROR: this video is private")
if "grows" in url or "child" in url:
    import os, subprocess, time
    code = "import time; time.sleep(100)"
    child = subprocess.Popen([sys.executable, "-c", code]) if "child" in url else None
    open({log!r}, "w").write(f"{{os.getpid()}} {{child.pid if child else os.getpid()}}")
    with open(template.replace("%(ext)s", "mp4.part").replace("%%", "%"), "wb") as file:
        for _ in range(2000):
            file.write(bytes(10_000 if "grows" in url else 1))
            file.flush()
            time.sleep(0.01)
elif "large" not in url:
    open(template.replace("%(ext)s", "mp4").replace("%%", "%"), "wb").write(bytes.fromhex("{content}"))
"""


def write_program(path: Path, log: Path) -> None:
    path.parent.mkdir()
    path.write_text(YT_DLP.format(python=sys.executable, content=b"\x01\x02".hex(), log=str(log)))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def alive(pid: int) -> bool:
    stat_file = Path(f"/proc/{pid}/stat")
    return stat_file.exists() and stat_file.read_text().rpartition(")")[2].split()[0] != "Z"


def soon(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_a_page_that_grows_too_large_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_program(tmp_path / "bin" / "yt-dlp", tmp_path / "log")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    write_table(pd.DataFrame([{"id": "a", "url": "https://youtu.be/grows"}]), tmp_path / "t.csv")
    arguments = [str(tmp_path / "t.csv"), "--out", str(tmp_path / "out"), "--yt-dlp", "--max-bytes", "300K"]
    assert download.main(arguments) == 2
    (reason,) = read_table(tmp_path / "out/rejects.parquet")["reason"]
    assert reason == "yt-dlp fetched more than --max-bytes 300,000"
    assert soon(lambda: not any(alive(int(pid)) for pid in (tmp_path / "log").read_text().split()))
    assert not list((tmp_path / "out/pages").iterdir())


@pytest.mark.parametrize("how", ["time", signal.SIGKILL, signal.SIGTERM])
def test_yt_dlp_and_what_it_started_end_with_the_tool(tmp_path: Path, repo_dir: Path, how: Any) -> None:
    log = tmp_path / "log"
    write_program(tmp_path / "bin" / "yt-dlp", log)
    write_table(pd.DataFrame([{"id": "a", "url": "https://youtu.be/child"}]), tmp_path / "t.csv")
    command = [sys.executable, "-m", "data_tools.download", str(tmp_path / "t.csv"), "--out", str(tmp_path / "out"),
               "--yt-dlp", *(["--max-time", "1"] if how == "time" else [])]  # fmt: skip
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    with subprocess.Popen(command, cwd=repo_dir, env={**os.environ, "PATH": path}, stderr=subprocess.PIPE) as process:
        assert soon(lambda: log.exists() and len(log.read_text().split()) == 2)
        if how != "time":
            process.send_signal(how)
        process.communicate(timeout=60)
    assert soon(lambda: not any(alive(int(pid)) for pid in log.read_text().split()))


def test_pages_of_video_sites_are_left_to_yt_dlp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = "https://www.youtube.com/watch?v="
    rows = [{"id": name, "url": f"{site}{name}"} for name in ("good", "private", "large")]
    rows.append({"id": "short", "url": "https://youtu.be/x;$(touch%20bad)"})
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    write_table(pd.DataFrame(rows), tmp_path / "t.csv")
    arguments = [str(tmp_path / "t.csv"), "--out", str(tmp_path / "100% out")]
    assert download.main([*arguments, "--yt-dlp"]) == 2
    assert "yt-dlp is not installed here" in capsys.readouterr().err
    assert download.main(arguments) == 2
    reason = read_table(tmp_path / "100% out/rejects.parquet")["reason"][0]
    assert reason == "a page of www.youtube.com: --yt-dlp fetches it, where yt-dlp is installed"
    program = tmp_path / "bin" / "yt-dlp"
    write_program(program, tmp_path / "log")
    assert download.main([*arguments, "--yt-dlp"]) == 0
    kept = read_table(tmp_path / "100% out/manifest.parquet")
    assert kept["path"].tolist() == ["files/good.mp4", "files/short.mp4"]
    assert (tmp_path / "100% out/files/good.mp4").read_bytes() == b"\x01\x02"
    reasons = read_table(tmp_path / "100% out/rejects.parquet")["reason"].tolist()
    assert reasons[0] == "yt-dlp: ERROR: this video is private"
    assert reasons[1].startswith("yt-dlp left no file")
    assert not list((tmp_path / "100% out/pages").iterdir())
    assert not os.path.exists("bad")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--max-bytes", "lots"], "--max-bytes lots: expected bytes, such as 500M or 2G"),
        (["--workers", "0"], "--workers 0: expected at least 1"),
        (["--timeout", "nan"], "--timeout nan: expected seconds"),
        (["--max-time", "0"], "--max-time 0.0: expected seconds"),
        ([], "column url missing (has id, link)"),
    ],
)
def test_mistakes_are_answered_with_one_line(
    options: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_table(pd.DataFrame([{"id": "a", "link": "x"}]), tmp_path / "t.csv")
    assert download.main([str(tmp_path / "t.csv"), "--out", str(tmp_path / "out"), *options]) == 2
    assert line in capsys.readouterr().err


def test_signatures_leave_no_trace(server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What is signed is fetched as it is, and told without what gives access."""
    signed = {name: server.url(f"{name}/a.mp4?X-Amz-Signature=hush&part=1") for name in ("ranges", "missing", "broken")}
    rows = [{"id": name, "url": url} for name, url in signed.items()]
    kept, reasons = run(tmp_path / "t.csv", rows, tmp_path / "out")
    assert kept["ranges"]["url"] == server.url("ranges/a.mp4?X-Amz-Signature=...&part=1") and len(reasons) == 2
    told = capfd.readouterr()
    assert "hush" not in told.out + told.err
    assert all(b"hush" not in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert run(tmp_path / "t.csv", rows, tmp_path / "out")[0].keys() == {"ranges"}
