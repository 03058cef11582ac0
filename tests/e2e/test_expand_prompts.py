"""`stages.sample --expand` with a server and with a local model."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from stages.sample import main
from tests.chat_server import chat_server, completion, error
from tests.sample_home import check_mistake
from tests.tiny_models import make_tiny_causal


def run(home: Path, out: Path, *args: str) -> int:
    return main([str(home / "flow"), "--out", str(out), "--device", "cpu", "--steps", "2", *args])


def record(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "samples.json").read_text(encoding="utf-8"))
    return found


def embellish(body: dict[str, Any], number: int) -> Any:
    text = body["messages"][0]["content"].split("The prompt: ")[1]
    return completion(
        f"<think>hm</think>Sure! {text.capitalize()} in the evening sun." if "blue" not in text else "No."
    )


def test_prompts_are_rewritten_once(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    prompts = ["--prompt", "a red circle", "--prompt", "a blue square"]
    used = ["A red circle in the evening sun.", "a blue square"]
    with chat_server(embellish) as chat:
        args = [*prompts, "--expand", f"{chat.url}#small", "--aesthetic", "5"]
        assert run(home, out, *args, "--dry-run") == 0
        assert not chat.questions and not out.exists()
        assert "2 prompts will be rewritten by" in capsys.readouterr().out
        assert run(home, out, *args) == 0
        assert [question["model"] for question in chat.questions] == ["small"] * 3  # one was asked for again
        told = capsys.readouterr().out
        assert "prompt 'a blue square' is used as it is: what was written for it loses 'blue', 'square'" in told
    found = record(out)
    assert found["expanded"] == {"a red circle": used[0], "a blue square": used[1]}
    assert found["prompts"] == [f"{text} aesthetic score: 5.0." for text in used]
    assert [sample["prompt"] for sample in found["samples"]] == found["prompts"]
    assert run(home, out, *args) == 0  # no server any more
    assert "all 2 were in" in capsys.readouterr().out
    (out / "0001.mp4").unlink()
    assert run(home, out, *args) == 0
    assert "1 written to" in capsys.readouterr().out
    assert record(out) == found
    assert run(home, out, *prompts, "--aesthetic", "5") == 2
    assert "prompt 0 = 'A red circle" in capsys.readouterr().err


def test_answers_are_kept_when_a_later_one_fails(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, prompts = tmp_path / "out", ["--prompt", "a red circle", "--prompt", "a green one"]
    with chat_server(lambda body, number: error(400, "too busy") if number == 1 else embellish(body, number)) as chat:
        assert run(home, out, *prompts, "--expand", chat.url) == 2
        assert f"--expand {chat.url}: 400 too busy; the same command goes on" in capsys.readouterr().err
        assert record(out) == {"expanded": {"a red circle": "A red circle in the evening sun."}}
        assert run(home, out, *prompts, "--expand", chat.url) == 0
        assert len(chat.questions) == 3
    assert list(record(out)["expanded"]) == ["a red circle", "a green one"]


def test_scripts_are_rewritten_text_by_text(home: Path, tmp_path: Path) -> None:
    out, long = tmp_path / "out", ["--num-frames", "6", "--seconds", "1.25", "--condition-frames", "2"]
    script = tmp_path / "script.txt"
    script.write_text("0: a red circle\n0.75: a red square\n")
    with chat_server(embellish) as chat:
        assert run(home, out, "--prompts", str(script), "--expand", chat.url, *long) == 0
        clips = ["--prompt", "|0|a red circle|1|a red square"]
        assert run(home, tmp_path / "clips", *clips, "--expand", chat.url, *long) == 0
        assert len(chat.questions) == 4
    circle, square = "A red circle in the evening sun.", "A red square in the evening sun."
    assert record(out)["prompts"] == [f"0: {circle}\n0.75: {square}"]
    assert record(tmp_path / "clips")["prompts"] == [f"|0|{circle}|1|{square}"]


def test_a_local_model(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A random one loses the words; the second run knows that and asks it no more."""
    model, out = make_tiny_causal(tmp_path / "model", chat=True), tmp_path / "out"
    assert run(home, out, "--prompt", "a red circle", "--expand", str(model)) == 0
    assert "prompt 'a red circle' is used as it is" in capsys.readouterr().out
    (out / "0000.mp4").unlink()
    (model / "model.safetensors").unlink()
    assert run(home, out, "--prompt", "a red circle", "--expand", str(model)) == 0
    assert record(out)["expanded"] == {"a red circle": "a red circle"}


def test_mistakes(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        free = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        began = time.monotonic()
        for more in ([], ["--dry-run"]):
            args = [str(home / "flow"), "--prompt", "x", "--expand", free, *more]
            check_mistake(args, f"--expand {free}/chat/completions: no connection", tmp_path, capsys)
        assert time.monotonic() - began < 60
    for where, told in (
        ("http://u:p@host/v1", "--expand: holds a user name or password"),
        (str(home / "vae"), "--expand="),
        (str(home / "none"), "no such folder"),
    ):
        check_mistake([str(home / "flow"), "--prompt", "x", "--expand", where], told, tmp_path, capsys)
