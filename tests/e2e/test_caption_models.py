"""`caption --model` with tiny models of each family: batches, failures, resuming, and over Ray."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from data_tools import caption
from opensora_repro.data.clip_frames import read_middles
from opensora_repro.data.manifest import read_manifest, read_table, write_manifest
from opensora_repro.data.write import write_video
from opensora_repro.models.captioner import load_captioner
from tests import tiny_captioners
from tests.made_pictures import texture

FAMILIES = ("blip2", "llava", "qwen2_vl")
SIZES = [(32, 48), (48, 32), (24, 40), (40, 40), (32, 48)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: getattr(tiny_captioners, f"make_tiny_{name}")(root / name) for name in FAMILIES}


def pictures(seed: int, frames: int = 10) -> np.ndarray:
    """Return a clip of uint8 [T, H, W, 3] that looks like no other seed's."""
    height, width = SIZES[seed % len(SIZES)]
    channels = [
        [texture(height, width, seed=1000 * seed + 10 * frame + c) for c in range(3)] for frame in range(frames)
    ]
    return np.stack([np.stack(each, axis=-1) for each in channels])


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five clips of several sizes, and in their middle one that cannot be read."""
    root = tmp_path_factory.mktemp("clips")
    rows = []
    for seed in range(5):
        frames = pictures(seed)
        write_video(root / f"{seed}.mp4", frames, 8.0)
        rows.append({"id": f"c{seed}", "path": str(root / f"{seed}.mp4"), "caption": "", "num_frames": len(frames),
                     "fps": 8.0, "height": frames.shape[1], "width": frames.shape[2]})  # fmt: skip
    (root / "broken.mp4").write_bytes(b"\0" * 100)
    rows.insert(2, rows[0] | {"id": "broken", "path": str(root / "broken.mp4")})
    write_manifest(pd.DataFrame(rows), root / "manifest.parquet")
    return root / "manifest.parquet"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_says_what_each_clip_alone_would(models: dict[str, Path], family: str) -> None:
    captioner = load_captioner(str(models[family]), key="--model", device="cpu", dtype="float32")
    shown = [pictures(seed, 1 if family == "blip2" else 2 + seed % 3) for seed in range(5)]
    instruction = "" if family == "blip2" else "describe the clip"
    together = captioner.caption(shown, instruction, 12)
    assert together == [captioner.caption([frames], instruction, 12)[0] for frames in shown]
    assert len({text for text, _ in together}) > 1, "what it writes depends on what it sees"
    half = load_captioner(str(models[family]), key="--model", device="cpu", dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16 and half.caption(shown, instruction, 2)[0][0]
    assert all("answer" not in text and "describe" not in text and "<" not in text for text, _ in together)


def test_what_ends_a_text(models: dict[str, Path]) -> None:
    captioner = load_captioner(str(models["llava"]), key="--model", device="cpu", dtype="float32")
    (text, cut), = captioner.caption([pictures(0, 2)], "describe", 5)  # fmt: skip
    assert cut and len(text.split()) == 5
    third = captioner.processor.tokenizer.convert_tokens_to_ids(text.split()[2])
    captioner.model.generation_config.eos_token_id = third
    captioner.ends = {third}
    (shorter, cut), = captioner.caption([pictures(0, 2)], "describe", 5)  # fmt: skip
    assert not cut and text.startswith(shorter) and len(shorter) < len(text)


def run(manifest: Path, model: Path, out: Path, *more: str) -> pd.DataFrame:
    options = ["--model", str(model), "--out", str(out), "--instruction", "describe", "--max-tokens", "6"]
    assert caption.main([str(manifest), *options, "--workers", "2", *more]) == 0
    return read_table(out / "manifest.parquet")


def test_the_tool(clips: Path, models: dict[str, Path], tmp_path: Path) -> None:
    """Each clip gets what the model says of it, and nothing is done twice."""
    out = tmp_path / "out"
    table = run(clips, models["qwen2_vl"], out, "--frames", "4", "--batch-size", "3")
    records = [json.loads(path.read_text())["clips"] for path in (out / "model").glob("*.json")]
    assert sorted(map(len, records)) == [3, 3]

    captioner = load_captioner(str(models["qwen2_vl"]), key="--model", device="cpu", dtype="float32")
    rows = read_manifest(out / "manifest.parquet").to_dict("records")
    shown = [read_middles(row["path"], 10, parts=4, short_side=min(row["height"], row["width"])) for row in rows]
    assert [len(frames) for frames in shown] == [4] * 5
    expected = [captioner.caption([frames], "describe", 6)[0][0] for frames in shown]
    assert table["caption"].tolist() == expected and len(set(expected)) > 3
    assert table["id"].tolist() == [f"c{seed}" for seed in range(5)]
    assert set(table["caption_flag"]) <= {"truncated", "loop", ""}
    (rejected,) = read_table(out / "rejects.parquet").to_dict("records")
    assert (rejected["id"], rejected["stage"]) == ("broken", "caption") and "broken.mp4" not in rejected["reason"]
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    run(clips, models["qwen2_vl"], out, "--frames", "4", "--batch-size", "1")
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_models_that_cannot_be_used(
    clips: Path, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert", "auto_map": {"AutoProcessor": "evil.Processor"}}')
    (other / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).symlink_to(models["llava"] / name)
    half = tmp_path / "half"
    half.mkdir()
    for path in models["llava"].iterdir():
        (half / path.name).write_bytes(path.read_bytes()[: 5000 if path.suffix == ".safetensors" else None])
    for model, more, message in (
        (other, [], "model_type is 'bert', expected one of blip-2, llava"),
        (bare, [], "are the tokenizer's files there?"),
        (half, [], "was it copied whole?"),
        (tmp_path / "none", [], "no such folder"),
        ("some/model-not-here", [], "hf download some/model-not-here"),
        (models["blip2"], ["--frames", "3"], "--frames 3: this model looks at one picture"),
        (models["blip2"], ["--device", "nowhere"], "--device nowhere"),
        (models["blip2"], ["--batch-size", "0"], "--batch-size 0"),
    ):
        assert caption.main([str(clips), "--model", str(model), "--out", str(tmp_path / "out"), *more]) == 2
        told = capsys.readouterr().err.splitlines()
        assert told[-1].startswith("error: ") and message in told[-1], told
    assert not (tmp_path / "ran").exists()


@pytest.mark.exhaustive
def test_ray_says_the_same(clips: Path, models: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    run(clips, models["llava"], tmp_path / "local", "--batch-size", "3")
    run(clips, models["llava"], tmp_path / "ray", "--batch-size", "2", "--model-workers", "2", "--runner", "ray")
    for name in ("manifest.parquet", "rejects.parquet"):
        assert (tmp_path / "local" / name).read_bytes() == (tmp_path / "ray" / name).read_bytes()
