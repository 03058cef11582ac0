"""Records: each there at once, of one process alone, and those of earlier releases taken over once."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from opensora_repro.data.jobs import records as records_module
from opensora_repro.data.jobs.records import RECORDS_FILE, Records
from opensora_repro.errors import DataError, run_command
from tests.job_records import recorded


def test_what_is_put_is_found_again(tmp_path: Path) -> None:
    odd = {"n": 1, "text": "é\n'\udcff"}
    with Records(tmp_path / "new" / "out") as records:
        assert records.get("a", ["k"]) == {}
        records.put("a", {"k": json.dumps(odd), "abc-1": "1", "abc-2": "2", "abd-1": "3"})
        records.put("b", {"k": "[]"})
        records.put("b", {"k": "null"})
        records.drop("a", "abc-")
    assert sorted(path.name for path in (tmp_path / "new/out").iterdir()) == [RECORDS_FILE]
    with Records(tmp_path / "new" / "out") as records:
        assert records.get("a", ["abd-1", "abc-1", "k", "other"]) == {"abd-1": 3, "k": odd}
        assert records.get("b", ["k"]) == {"k": None}


def test_a_killed_process_loses_nothing(tmp_path: Path, repo_dir: Path) -> None:
    """Neither what it put, nor the folder for the next one."""
    code = (
        "import os, signal, sys; from pathlib import Path; from opensora_repro.data.jobs.records import Records\n"
        "records = Records(Path(sys.argv[1]))\n"
        "for n in range(1000): records.put('a', {str(n): str(n)})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=repo_dir).returncode == -signal.SIGKILL
    assert len(recorded(tmp_path, "a")) == 1000
    with Records(tmp_path) as records:
        assert records.get("a", ["0", "999"]) == {"0": 0, "999": 999}


def test_records_of_an_earlier_release_are_taken_over_once(tmp_path: Path) -> None:
    answers, batches = tmp_path / "captions", tmp_path / "model" / "00000"
    answers.mkdir()
    batches.mkdir(parents=True)
    (answers / "k1.json").write_text('{"text": "paid for", "cut": false}')
    (answers / "half.json").write_text('{"te')
    (answers / ".k3.json.host.12-0.tmp").write_text("{}")
    (batches / "b.json").write_text('{"clips": {"k1": {"text": "one"}, "k2": {"text": "two"}}}')
    for _ in range(2):
        with Records(tmp_path) as records:
            assert records.get("captions", ["k1", "half", "late"]) == {"k1": {"text": "paid for", "cut": False}}
            assert records.get("model", ["b", "k1", "k2"]) == {"k1": {"text": "one"}, "k2": {"text": "two"}}
            assert (records.num_taken_over("captions"), records.num_taken_over("none")) == (1, 0)
        (answers / "late.json").write_text("{}")
        (answers / "k1.json").write_text('{"text": "changed"}')


def test_one_process_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Records(tmp_path):
        assert run_command(lambda: len(str(Records(tmp_path)))) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: another command is at work in this folder\n"
    Records(tmp_path).__exit__()


@pytest.mark.parametrize("what", ["text", "middle", "database"])
def test_a_damaged_or_foreign_file_is_one_line(tmp_path: Path, what: str) -> None:
    path = tmp_path / RECORDS_FILE
    if what == "text":
        path.write_text("no database at all\n" * 100)
    elif what == "database":
        with sqlite3.connect(path) as other:
            other.execute("CREATE TABLE somebody (s TEXT)")
        other.close()
    else:
        with Records(tmp_path) as records:
            records.put("a", {str(n): json.dumps("x" * 200) for n in range(500)})
        data = path.read_bytes()
        path.write_bytes(data[:4096] + os.urandom(len(data) - 4096))
    with (
        pytest.raises(DataError, match=f"{RECORDS_FILE}: is (damaged|a database of something else)"),
        Records(tmp_path) as r,
    ):
        r.get("a", [str(n) for n in range(500)])


def test_where_no_log_can_be_a_plain_journal_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As SQLite answers where a file system cannot have one: the journal that there was."""
    monkeypatch.setattr(records_module, "JOURNAL", "DELETE")
    with Records(tmp_path) as records:
        records.put("a", {"k": "1"})
        assert not list(tmp_path.glob("*-wal"))
    with Records(tmp_path) as records:
        assert records.get("a", ["k"]) == {"k": 1}
