"""`caption --endpoint` and `--rewrite` against a server of this machine that behaves as servers do."""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import subprocess
import sys
import time
from hashlib import blake2b
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from data_tools import caption
from opensora_repro.data.caption import chat, completions
from opensora_repro.data.caption.ask import INSTRUCTION
from opensora_repro.data.write import write_video
from tests.chat_server import BREAK, ChatServer, brightness, chat_server, completion, error, pictures
from tests.frames import read_manifest, read_table, write_manifest
from tests.job_records import recorded

COUNT = 6
KEY = "sk-secret-0123456789"


@pytest.fixture(scope="module")
def shaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of one grey each, c1 darkest: two videos of 12 frames, then images."""
    root = tmp_path_factory.mktemp("shaded")
    rows = []
    for shade in range(1, COUNT + 1):
        frames = np.full((12 if shade < 3 else 1, 32, 48, 3), 20 * shade, dtype=np.uint8)
        path = root / (f"{shade}.mp4" if shade < 3 else f"{shade}.png")
        if shade < 3:
            write_video(path, frames, 8.0)
        else:
            Image.fromarray(frames[0]).save(path)
        rows.append({"id": f"c{shade}", "path": str(path), "caption": "", "num_frames": len(frames),
                     "fps": 8.0, "height": 32, "width": 48})  # fmt: skip
    write_manifest(pd.DataFrame(rows), root / "manifest.parquet")
    return root / "manifest.parquet"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "FIRST_WAIT", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def options(server: ChatServer, manifest: Path, out: Path, *more: str) -> list[str]:
    return [str(manifest), "--endpoint", server.url, "--endpoint-model", "m", "--out", str(out), *more]


def captions_in(out: Path) -> dict[str, str]:
    table = read_table(out / "manifest.parquet")
    return dict(zip(table["id"], table["caption"], strict=True))


def reasons_in(out: Path) -> dict[str, str]:
    table = read_table(out / "rejects.parquet")
    assert set(table["stage"]) <= {"caption"}
    return dict(zip(table["id"], table["reason"], strict=True))


def shade(question: dict[str, Any], _number: int = 0) -> Any:
    """Answer late now and then, so that answers come in another order."""
    time.sleep(random.random() / 20)
    return completion(f"shade {brightness(question)} of grey")


SOME = ["--endpoint", "http://localhost:9/v1", "--endpoint-model", "m"]
EXPECTED = {f"c{i}": f"shade {i} of grey" for i in range(1, COUNT + 1)}


def test_every_clip_gets_its_own_answer(
    shaded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    out = tmp_path / "out"
    more = ["--api-key-env", "MY_KEY", "--concurrency", "4", "--frames", "4", "--price-in", "2", "--price-out", "10"]
    with chat_server(shade) as server:
        assert caption.main(options(server, shaded, out, *more)) == 0
        assert captions_in(out) == EXPECTED
        assert list(captions_in(out)) == list(EXPECTED)
        assert {h["Authorization"] for h in server.headers} == {f"Bearer {KEY}"}
        assert {h["path"] for h in server.headers} == {"/v1/chat/completions"}
        assert sorted(len(pictures(q)) for q in server.questions) == [1, 1, 1, 1, 4, 4]
        assert {q["model"] for q in server.questions} == {"m"} and server.questions[0]["max_tokens"] == 256
        told = capsys.readouterr()
        assert "captioning: 6 answers, 600 tokens in, 60 out, cost 0.0018\n" in told.out
        before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
        assert caption.main(options(server, shaded, out, *more)) == 0
        assert len(server.questions) == COUNT
        assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
        told = capsys.readouterr()
        assert "captioning: 0 answers, 0 tokens in, 0 out, cost 0.0000; before: 6 answers" in told.out
    assert not any(KEY.encode() in path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert KEY not in told.out + told.err
    rows = read_manifest(out / "manifest.parquet")
    assert set(rows["caption_flag"]) == {""} and all(Path(path).is_file() for path in rows["path"])


def test_troubles_that_pass(shaded: Path, tmp_path: Path) -> None:
    """Each question meets another trouble first; a wait that the server asks for is kept, by everybody."""
    troubles = [error(429, "slow down", Retry_After="1"), error(500), error(503, Retry_After="0"), BREAK]
    troubles += [(200, {}, b"{no json"), (200, {}, b'{"choices": []}'), error(408), error(409), (502, {}, b"<html>")]

    def answer(question: dict[str, Any], number: int) -> Any:
        return troubles[number] if number < len(troubles) else shade(question)

    with chat_server(answer) as server:
        assert caption.main(options(server, shaded, tmp_path / "out", "--concurrency", "1", "--retries", "9")) == 0
        assert captions_in(tmp_path / "out") == EXPECTED
        assert len(server.questions) == COUNT + len(troubles)
        assert server.moments[1] - server.moments[0] >= 1.0


def test_an_answer_that_never_comes_is_asked_for_again(shaded: Path, tmp_path: Path) -> None:
    def answer(question: dict[str, Any], number: int) -> Any:
        if number == 0:
            time.sleep(3)
        return shade(question)

    with chat_server(answer) as server:
        assert caption.main(options(server, shaded, tmp_path / "out", "--timeout", "0.5")) == 0
        assert captions_in(tmp_path / "out") == EXPECTED
        assert len(server.questions) == COUNT + 1


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "wrong key (the key of the environment variable OPENAI_API_KEY is not set"), (404, "is this the address"),
     (402, "402 wrong key"), (302, "302 wrong key; is this the address")],
)  # fmt: skip
def test_troubles_that_stay_end_the_run(
    shaded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int, message: str
) -> None:
    with chat_server(lambda *_: completion("stolen")) as other, chat_server(
        lambda *_: error(status, "wrong\nkey", Location=f"{other.url}/chat/completions")
    ) as server:  # fmt: skip
        assert caption.main(options(server, shaded, tmp_path / "out", "--concurrency", "1")) == 2
        assert (len(server.questions), len(other.questions)) == (1, 0)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and message in last


def test_a_question_that_is_refused_costs_one_clip(shaded: Path, tmp_path: Path) -> None:
    def answer(question: dict[str, Any], _number: int) -> Any:
        return error(400, "picture 3 is not liked") if brightness(question) == 3 else shade(question)

    with chat_server(answer) as server:
        for run in (1, 2):
            assert caption.main(options(server, shaded, tmp_path / "out")) == 0
            assert captions_in(tmp_path / "out") == {k: v for k, v in EXPECTED.items() if k != "c3"}
            assert reasons_in(tmp_path / "out") == {"c3": "400 picture 3 is not liked"}
            assert len(server.questions) == COUNT + run - 1


def test_where_all_is_refused_the_run_ends_soon(
    shaded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for answer, count in ((error(400, "no such option"), 3), (error(500), 6)):
        with chat_server(lambda *_, answer=answer: answer) as server:
            more = ("--concurrency", "1", "--retries", "1")
            assert caption.main(options(server, shaded, tmp_path / "out", *more)) == 2
            assert "3 times in a row; the same command goes on" in capsys.readouterr().err
            assert len(server.questions) in (count, count + 1)  # one may be under way
        assert not (tmp_path / "out" / "manifest.parquet").exists()


def test_flags(shaded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = {
        1: completion("A street at night,\x1b[2J with\n\nrain and", "length"),
        2: completion("I'm sorry, but I can't help with identifying people."),
        3: completion(None, refusal="I can't assist with that."),
        4: completion("", "length"),
        5: completion("the dog runs and " * 30),
        6: completion([{"type": "text", "text": "<think>a dog?</think> A dog."}]),
    }
    with chat_server(lambda question, _: said[brightness(question)]) as server:
        assert caption.main(options(server, shaded, tmp_path / "out")) == 0
        table = read_table(tmp_path / "out" / "manifest.parquet").set_index("id")
        assert table["caption_flag"].to_dict() == {"c1": "truncated", "c5": "loop", "c6": ""}
        assert table.loc["c1", "caption"] == "A street at night,[2J with rain and"
        assert table.loc["c6", "caption"] == "A dog."
        assert reasons_in(tmp_path / "out") == {
            "c2": "looks like a refusal: I'm sorry, but I can't help with identifying people.",
            "c3": "looks like a refusal: I can't assist with that.",
            "c4": "the caption is empty",
        }
        told = capsys.readouterr().out
        assert "3 of 6 clips captioned, 1 flagged loop, 1 flagged truncated, 3 rejected" in told
        assert "1 captions had thoughts, chat markers or courtesies around them" in told
        assert caption.main(options(server, shaded, tmp_path / "out", "--keep-flagged")) == 0
        assert len(server.questions) == COUNT
    table = read_table(tmp_path / "out" / "manifest.parquet").set_index("id")
    assert table["caption_flag"].tolist() == ["truncated", "refusal", "refusal", "empty", "loop", ""]


def test_another_word_for_the_limit(shaded: Path, tmp_path: Path) -> None:
    def answer(question: dict[str, Any], _number: int) -> Any:
        wrong = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
        return error(400, wrong) if "max_tokens" in question else shade(question)

    with chat_server(answer) as server:
        assert caption.main(options(server, shaded, tmp_path / "out", "--concurrency", "1")) == 0
        assert len(server.questions) == COUNT + 1 and server.questions[-1]["max_completion_tokens"] == 256


def test_options_reach_the_server_and_decide_what_is_asked_again(shaded: Path, tmp_path: Path) -> None:
    body = {"top_k": 20, "chat_template_kwargs": {"enable_thinking": False}}
    more = ["--temperature", "0.2", "--seed", "7", "--extra-body", json.dumps(body), "--frames", "2"]
    with chat_server(shade) as server:
        assert caption.main(options(server, shaded, tmp_path / "out", *more)) == 0
        assert captions_in(tmp_path / "out") == EXPECTED
        sent = {name: value for name, value in server.questions[0].items() if name not in ("model", "messages")}
        assert sent == {"max_tokens": 256, "temperature": 0.2, "seed": 7, **body}
        texts = [question["messages"][0]["content"][0]["text"] for question in server.questions]
        told = "The frames are at 0.38, 1.12 seconds of a clip of 1.50 seconds. "
        assert sum(text.startswith(told) for text in texts) == 2 and sum("seconds" in text for text in texts) == 2
        assert caption.main(options(server, shaded, tmp_path / "out", *more)) == 0
        assert len(server.questions) == COUNT
        for number, other in enumerate((["--temperature", "0.3"], ["--seed", "8"], ["--extra-body", "{}"]), start=2):
            assert caption.main(options(server, shaded, tmp_path / "out", *more, *other)) == 0
            assert len(server.questions) == number * COUNT


def test_a_server_sees_the_clips_themselves(shaded: Path, tmp_path: Path) -> None:
    def answer(question: dict[str, Any], _number: int) -> Any:
        parts = [part for part in question["messages"][0]["content"] if part["type"] == "video_url"]
        if not parts:
            return shade(question)
        head, data = parts[0]["video_url"]["url"].split(",")
        assert head == "data:video/mp4;base64"
        content = base64.b64decode(data)
        return completion(f"shade {1 + (content == (shaded.parent / '2.mp4').read_bytes())} of grey")

    with chat_server(answer) as server:
        assert caption.main(options(server, shaded, tmp_path / "out", "--send", "video")) == 0
        assert captions_in(tmp_path / "out") == EXPECTED


@pytest.mark.parametrize(
    "words", ["Unknown part type: video_url", "At most 0 video(s) may be provided in one prompt.",
              "This model does not support videos"]
)  # fmt: skip
def test_a_server_that_takes_no_videos(
    shaded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    def answer(question: dict[str, Any], _number: int) -> Any:
        return error(400, words) if "video_url" in json.dumps(question) else shade(question)

    with chat_server(answer) as server:
        more = ("--send", "video", "--concurrency", "1")
        assert caption.main(options(server, shaded, tmp_path / "out", *more)) == 2
        assert len(server.questions) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and words in last and "--send frames sends pictures" in last


def test_a_video_that_a_server_cannot_read_costs_one_clip(shaded: Path, tmp_path: Path) -> None:
    def answer(question: dict[str, Any], _number: int) -> Any:
        return error(400, "broken file") if "video_url" in json.dumps(question) else shade(question)

    with chat_server(answer) as server:
        assert caption.main(options(server, shaded, tmp_path / "out", "--send", "video")) == 0
    assert list(reasons_in(tmp_path / "out")) == ["c1", "c2"]
    assert reasons_in(tmp_path / "out")["c1"].startswith("400 broken file (does this server's model take videos?")


def test_a_server_that_is_not_there(shaded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is told before INPUT is looked at; where all answers are there, nobody needs it."""
    with chat_server(shade) as server:
        assert caption.main(options(server, shaded, tmp_path / "out")) == 0
    assert caption.main(options(server, shaded, tmp_path / "out")) == 0
    capsys.readouterr()
    assert caption.main(options(server, tmp_path / "nothing", tmp_path / "new")) == 2
    told = capsys.readouterr().err
    assert "no connection (Connection refused): is the server running" in told and told.count("\n") == 1
    assert not (tmp_path / "new").exists()
    assert caption.main(options(server, shaded, tmp_path / "out", "--seed", "1")) == 2
    assert "Connection refused" in capsys.readouterr().err


def test_thoughts_that_a_server_tells_apart(shaded: Path, tmp_path: Path) -> None:
    with chat_server(lambda *_: completion(None, "length", reasoning_content="A dog? A cat?")) as server:
        assert caption.main(options(server, shaded, tmp_path / "out")) == 2
    assert all("thoughts without an answer" in reason for reason in reasons_in(tmp_path / "out").values())


# ---- ending early


def test_answers_that_an_earlier_release_paid_for_are_found(shaded: Path, tmp_path: Path) -> None:
    """It had a file for each, and knew a clip by its size, beginning, middle and end: a small one's are the same."""
    answers = tmp_path / "out" / "captions"
    answers.mkdir(parents=True)
    for number, row in enumerate(read_manifest(shaded, need_captions=False).to_dict("records")):
        data = Path(row["path"]).read_bytes()
        content = blake2b(len(data).to_bytes(8, "little") + data, digest_size=16).hexdigest()
        how = [content, row["num_frames"], 8.0, 2, "m", INSTRUCTION, 8, 256, {}]
        key = blake2b(json.dumps(how).encode(), digest_size=16).hexdigest()
        if number:  # one was not asked about
            text = {"text": f"old {row['id']} of grey", "cut": False, "tokens_in": 1, "tokens_out": 1}
            (answers / f"{key}.json").write_text(json.dumps(text))
    with chat_server(shade) as server:
        for _ in range(2):
            assert caption.main(options(server, shaded, tmp_path / "out")) == 0
        assert len(server.questions) == 1
    found = captions_in(tmp_path / "out")
    assert found == {name: f"old {name} of grey" for name in EXPECTED} | {"c1": EXPECTED["c1"]}


def start(server: ChatServer, shaded: Path, out: Path, repo_dir: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "data_tools.caption", *options(server, shaded, out, "--concurrency", "2")]
    return subprocess.Popen(command, cwd=repo_dir, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_ended_early_it_goes_on_and_asks_nothing_twice(
    shaded: Path, tmp_path: Path, repo_dir: Path, stop: signal.Signals
) -> None:
    out = tmp_path / "out"

    def answer(question: dict[str, Any], number: int) -> Any:
        if 3 <= number < 5:
            wait_for(lambda: process.poll() is not None or interrupted)
            time.sleep(0.3)
        return shade(question)

    interrupted: list[bool] = []
    with chat_server(answer) as server:
        with start(server, shaded, out, repo_dir) as process:
            wait_for(lambda: len(server.questions) == 5 and len(recorded(out, "captions")) == 3)
            process.send_signal(stop)
            interrupted.append(stop == signal.SIGINT)
            told, errors = process.communicate(timeout=60)
        paid = len(recorded(out, "captions"))
        if stop == signal.SIGINT:
            assert process.returncode == 130 and "goes on from here" in errors and "Traceback" not in errors
            assert paid == 5 and "captioning: 5 answers, 500 tokens in" in told  # those under way are paid for
        else:
            assert process.returncode == -signal.SIGKILL and paid == 3
        assert not (out / "manifest.parquet").exists()
        asked = len(server.questions)
        assert caption.main(options(server, shaded, out)) == 0
        assert len(server.questions) - asked == COUNT - paid
        assert captions_in(out) == EXPECTED
        assert caption.main(options(server, shaded, tmp_path / "fresh")) == 0
    for name in ("manifest.parquet", "rejects.parquet"):
        assert (out / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()


# ---- rewriting


def rewrite(question: dict[str, Any], _number: int = 0) -> Any:
    role, text = question["messages"][-1]["role"], question["messages"][-1]["content"]
    assert role == "user" and question["messages"][0]["role"] == "system"
    return completion("I cannot assist with this." if text == "bad" else f"In detail: {text}.")


def test_rewriting(shaded: Path, tmp_path: Path) -> None:
    listed = {"c1": "a dog", "c2": "a dog", "c3": "I'm sorry, I can't describe this image.", "c4": "bad", "c5": "a cat"}
    pd.DataFrame({"id": list(listed), "caption": list(listed.values())}).to_csv(tmp_path / "l.csv", index=False)
    more = ["--sidecar", str(tmp_path / "l.csv"), "--rewrite"]
    with chat_server(rewrite) as server:
        assert caption.main(options(server, shaded, tmp_path / "out", *more)) == 0
        assert sorted(q["messages"][1]["content"] for q in server.questions) == ["a cat", "a dog", "bad"]
        table = read_table(tmp_path / "out" / "manifest.parquet")
        assert table[["id", "caption_original", "caption"]].to_numpy().tolist() == [
            ["c1", "a dog", "In detail: a dog."],
            ["c2", "a dog", "In detail: a dog."],
            ["c5", "a cat", "In detail: a cat."],
        ]
        assert {k: v.split(":")[0] for k, v in reasons_in(tmp_path / "out").items()} == {
            "c3": "looks like a refusal", "c4": "looks like a refusal", "c6": "no caption for this id"
        }  # fmt: skip
        manifest = tmp_path / "out" / "manifest.parquet"
        assert caption.main(options(server, manifest, tmp_path / "again", "--rewrite")) == 0
        assert captions_in(tmp_path / "again")["c5"] == "In detail: In detail: a cat.."


def test_writing_and_rewriting_in_one_run(shaded: Path, tmp_path: Path) -> None:
    """A manifest without captions: the endpoint sees the clips, then makes more of what it said."""

    def answer(question: dict[str, Any], _number: int) -> Any:
        return rewrite(question) if len(question["messages"]) == 2 else shade(question)

    with chat_server(answer) as server:
        assert caption.main(options(server, shaded, tmp_path / "out", "--rewrite")) == 0
        assert len(server.questions) == 2 * COUNT
    assert captions_in(tmp_path / "out") == {k: f"In detail: {v}." for k, v in EXPECTED.items()}


# ---- keys and addresses


def test_where_the_key_goes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.full_url("https://host/v1/") == "https://host/v1/chat/completions"
    assert chat.full_url("http://host:8000") == "http://host:8000/v1/chat/completions"
    assert chat.full_url("https://host/api/chat/completions") == "https://host/api/chat/completions"
    for safe in ("https://host/v1", "http://localhost:1/v1", "http://127.0.0.5/v1", "http://[::1]:8000/v1"):
        assert chat.may_send_key(safe)
    for unsafe in ("http://host/v1", "http://10.0.0.1/v1", "http://localhost.evil.org/v1", "http://127.0.0.1.evil/v1"):
        assert not chat.may_send_key(unsafe)
    monkeypatch.setenv("K", KEY)
    settings = {"key_env": "K", "max_tokens": 5, "timeout": 1.0, "retries": 0}

    request = SimpleNamespace(headers={})
    assert chat.Endpoint("http://host/v1", "m", **settings)._sign(request).headers == {}
    assert "K is not sent over plain http" in capsys.readouterr().err
    assert chat.Endpoint("https://host/v1", "m", **settings)._message(f"bad {KEY}".encode()) == "bad ***"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "nothing to take captions from"),
        (["--endpoint", "https://x/v1"], "--endpoint and --endpoint-model: give both"),
        (["--endpoint", "ftp://x/v1", "--endpoint-model", "m"], "--endpoint ftp://x/v1: expected an address"),
        (["--endpoint", "https://user:pass@x/v1", "--endpoint-model", "m"], "belongs into an environment variable"),
        (["--endpoint", "https://x:y/v1", "--endpoint-model", "m"], "--endpoint https://x:y/v1"),
        (["--sidecar", "a.csv", "--model", "m"], "--sidecar and --model: give one of them"),
        (["--sidecar", "a.csv", "--endpoint", "https://x/v1", "--endpoint-model", "m"], "give one of them"),
        (["--sidecar", "a.csv", "--rewrite"], "--rewrite: needs --endpoint"),
        (["--sidecar", "a.csv", "--frames", "0"], "--frames 0: expected at least 1"),
        (["--sidecar", "a.csv", "--concurrency", "0"], "--concurrency 0"),
        (["--sidecar", "a.csv", "--timeout", "nan"], "--timeout nan"),
        (["--sidecar", "a.csv", "--price-in", "-1"], "--price-in -1"),
        (["--sidecar", "a.csv", "--seed", "1"], "--seed: only with --endpoint"),
        ([*SOME, "--temperature", "nan"], "--temperature nan: expected 0 or more"),
        ([*SOME, "--send", "video", "--frames", "3"], "--frames: the server chooses them"),
        ([*SOME, "--extra-body", "{"], "--extra-body: no JSON"),
        ([*SOME, "--extra-body", '{"a": NaN}'], "--extra-body: no JSON: NaN"),
        ([*SOME, "--extra-body", "[1]"], "--extra-body: expected a JSON object"),
        ([*SOME, "--extra-body", '{"seed": 1}'], "--extra-body: seed is not among what it can set"),
        (["--sidecar", "nowhere"], "nowhere: no such file or folder"),
    ],
)
def test_mistakes(
    shaded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert caption.main([str(shaded), "--out", str(tmp_path / "out"), *more]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and message in told and told.count("\n") == 1
    assert "user:pass" not in told


def test_a_clip_that_cannot_be_read(shaded: Path, tmp_path: Path) -> None:
    table = read_manifest(shaded, need_captions=False)
    (tmp_path / "broken.mp4").write_bytes(b"\0" * 100)
    table.loc[1, "path"], table.loc[4, "path"] = str(tmp_path / "broken.mp4"), str(tmp_path / "gone.png")
    write_manifest(table, tmp_path / "manifest.parquet")
    with chat_server(shade) as server:
        assert caption.main(options(server, tmp_path / "manifest.parquet", tmp_path / "out")) == 0
        assert len(server.questions) == COUNT - 2
    assert list(captions_in(tmp_path / "out")) == ["c1", "c3", "c4", "c6"]
    reasons = reasons_in(tmp_path / "out")
    assert reasons["c5"] == "no such file" and "broken.mp4" not in reasons["c2"]


def test_prices() -> None:
    assert completions.Prices(2.5, 10).cost(1_000_000, 100_000) == pytest.approx(3.5)
    assert os.environ.get("OPENAI_API_KEY") is None


def both(first: ChatServer, second: ChatServer, manifest: Path, out: Path, *more: str) -> list[str]:
    return options(first, manifest, out, "--endpoint", second.url, *more)


def test_two_servers_share_the_questions(shaded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    with chat_server(shade) as first, chat_server(shade) as second:
        assert caption.main(both(first, second, shaded, out, "--concurrency", "1", "--price-in", "2")) == 0
        counts = len(first.questions), len(second.questions)
        assert captions_in(out) == EXPECTED and sum(counts) == COUNT and min(counts) > 0
        shares = f"{first.url}/chat/completions {counts[0]}, {second.url}/chat/completions {counts[1]}"
        assert f"captioning: 6 answers, 600 tokens in, 60 out, cost 0.0012 ({shares})\n" in capsys.readouterr().out
        assert caption.main(both(second, first, shaded, out)) == 0  # answers are the model's, whoever gave them
        assert sum((len(first.questions), len(second.questions))) == COUNT


@pytest.mark.parametrize("trouble", [error(500), BREAK, error(401, "no")])
def test_a_server_that_fails_leaves_its_part_to_the_other(
    shaded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], trouble: Any
) -> None:
    def fails(question: dict[str, Any], number: int) -> Any:
        return trouble if number else shade(question)

    with chat_server(fails) as first, chat_server(shade) as second:
        assert caption.main(both(first, second, shaded, tmp_path / "out", "--concurrency", "1")) == 0
        assert captions_in(tmp_path / "out") == EXPECTED
        assert len(second.questions) == COUNT - 1
        assert (": 401 no" in capsys.readouterr().err) == (trouble == error(401, "no"))


def test_servers_that_are_not_there(shaded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with chat_server(shade) as first:
        with chat_server(shade) as second:
            pass
        assert caption.main(both(second, first, shaded, tmp_path / "out")) == 0
        assert captions_in(tmp_path / "out") == EXPECTED
        assert f"note: --endpoint {second.url}/chat/completions: no connection" in capsys.readouterr().err
    assert caption.main(both(second, first, shaded, tmp_path / "other")) == 2
    assert "is the server running" in capsys.readouterr().err
