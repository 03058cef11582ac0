"""`caption --model` with tiny models of each family: batches, failures, resuming, and over Ray."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from data_tools import caption
from opensora_repro.data.caption.ask import with_times
from opensora_repro.data.caption.text import judge
from opensora_repro.data.clip_frames import middles_of, read_middles
from opensora_repro.data.write import write_video
from opensora_repro.frozen import captioner as captioners
from opensora_repro.frozen.captioner import Captioner, ShownClip
from tests import tiny_captioners
from tests.frames import read_manifest, read_table, write_manifest
from tests.job_records import recorded
from tests.made_pictures import texture

FAMILIES = [name.removeprefix("make_tiny_") for name in dir(tiny_captioners) if name.startswith("make_tiny_")]
SIZES = [(32, 48), (48, 32), (24, 40), (40, 40), (32, 48)]


class Models(dict[str, Path]):
    """The tiny models, each made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __missing__(self, name: str) -> Path:
        return self.setdefault(name, getattr(tiny_captioners, f"make_tiny_{name}")(self.root / name))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


def load_captioner(folder: Path, dtype: str = "float32") -> Captioner:
    return captioners.load_captioner(str(folder), key="--model", device="cpu", dtype=dtype)


def clip_of(seed: int, frames: int, instruction: str = "describe", *, of: int = 30, fps: float = 12.0) -> ShownClip:
    return ShownClip(pictures(seed, frames), middles_of(of, frames), of, fps, instruction)


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


def test_each_family_that_is_listed_is_tried() -> None:
    assert {name.replace("blip2", "blip-2") for name in FAMILIES} == set(captioners.FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_says_what_each_clip_alone_would(models: Models, family: str) -> None:
    """Clips of several sizes and counts of frames, a picture among them."""
    captioner = load_captioner(models[family])
    counts = [1] * 5 if family == "blip2" else [2, 3, 4, 1, 3]
    shown = [clip_of(seed, count, "" if family == "blip2" else "describe") for seed, count in enumerate(counts)]
    together = captioner.caption(shown, 6)
    assert together == [captioner.caption([clip], 6)[0] for clip in shown]
    assert len({text for text, _ in together}) > 1, "what it writes depends on what it sees"
    assert all("<" not in text for text, _ in together)


def test_half_precision(models: Models) -> None:
    half = load_captioner(models["llava"], "bfloat16")
    assert half.model.dtype == torch.bfloat16 and half.caption([clip_of(0, 2)], 2)


def test_times_reach_the_models_that_know_them(models: Models) -> None:
    """Three frames at the middles of thirds: of 2.5 seconds, and of 10."""
    clips = [clip_of(0, 3), clip_of(0, 3, of=120)]
    captioner = load_captioner(models["qwen2_5_vl"])
    assert captioner.inputs(clips)["second_per_grid_ts"].tolist() == pytest.approx([2.5 / 3 * 2, 10 / 3 * 2])
    # pairs of frames, the third with itself
    spaced = ("0 . 8", "2 . 1"), ("3 . 3", "8 . 3")
    told = {"qwen3_vl": spaced, "qwen3_vl_moe": spaced, "qwen3_5": (("0.8", "2.1"), ("3.3", "8.3"))}
    for family, expected in told.items():
        captioner = load_captioner(models[family])
        for ids, times in zip(captioner.inputs(clips)["input_ids"], expected, strict=True):
            assert all(time in captioner.processor.tokenizer.decode(ids) for time in times), family
    picture = clip_of(0, 1, of=1, fps=0.0)
    assert load_captioner(models["qwen3_vl"]).caption([picture], 2)


def test_times_reach_smolvlm(models: Models) -> None:
    captioner = load_captioner(models["smolvlm"])
    (ids,) = captioner.inputs([clip_of(0, 3, of=120)])["input_ids"]
    text = captioner.processor.tokenizer.decode(ids)
    assert all(f"00 : {second}" in text for second in ("01", "05", "08"))


def test_a_model_that_is_told_no_times_reads_them(models: Models) -> None:
    row = {"num_frames": 30, "fps": 12.0}
    told = "The frames are at 0.42, 1.25, 2.08 seconds of a clip of 2.50 seconds. describe"
    assert with_times("describe", row, middles_of(30, 3)) == told
    assert with_times("describe", {"num_frames": 1, "fps": 12.0}, [0]) == "describe"
    assert not load_captioner(models["qwen2_vl"]).family.times


def test_thoughts_that_the_prompt_begins_are_told_apart(models: Models) -> None:
    captioner = load_captioner(models["llava"])
    captioner.processor.chat_template += "<think>\n"
    ((text, _),) = captioner.caption([clip_of(0, 2)], 5)
    assert text.startswith("<think>")
    assert judge({"text": text, "cut": True}).flag == "thoughts"
    captioner.processor.chat_template += "\n</think>\n\n"
    ((text, _),) = captioner.caption([clip_of(0, 2)], 5)
    assert not text.startswith("<think>")


def test_what_ends_a_text(models: Models) -> None:
    captioner = load_captioner(models["llava"])
    (text, cut), = captioner.caption([clip_of(2, 2)], 5)  # fmt: skip
    assert cut and len(text.split()) == 5
    third = captioner.processor.tokenizer.convert_tokens_to_ids(text.split()[2])
    captioner.model.generation_config.eos_token_id = third
    captioner.ends = {third}
    (shorter, cut), = captioner.caption([clip_of(2, 2)], 5)  # fmt: skip
    assert not cut and text.startswith(shorter) and len(shorter) < len(text)


def run(manifest: Path, model: Path, out: Path, *more: str) -> pd.DataFrame:
    options = ["--model", str(model), "--out", str(out), "--instruction", "describe", "--max-tokens", "6"]
    assert caption.main([str(manifest), *options, "--workers", "2", *more]) == 0
    return read_table(out / "manifest.parquet")


def test_the_tool(clips: Path, models: Models, tmp_path: Path) -> None:
    """Each clip gets what the model says of it, and nothing is done twice."""
    out = tmp_path / "out"
    table = run(clips, models["qwen2_vl"], out, "--frames", "4", "--batch-size", "3")
    assert len(recorded(out, "model")) == 6

    captioner = load_captioner(models["qwen2_vl"])
    rows = read_manifest(out / "manifest.parquet").to_dict("records")
    shown = [read_middles(row["path"], 10, parts=4, short_side=min(row["height"], row["width"])) for row in rows]
    assert [len(frames) for frames in shown] == [4] * 5
    numbers, asked = (
        [1, 3, 6, 8],
        "The frames are at 0.12, 0.38, 0.75, 1.00 seconds of a clip of 1.25 seconds. describe",
    )
    expected = [captioner.caption([ShownClip(frames, numbers, 10, 8.0, asked)], 6)[0][0] for frames in shown]
    assert table["caption"].tolist() == expected and len(set(expected)) > 3
    assert table["id"].tolist() == [f"c{seed}" for seed in range(5)]
    assert set(table["caption_flag"]) <= {"truncated", "loop", ""}
    (rejected,) = read_table(out / "rejects.parquet").to_dict("records")
    assert (rejected["id"], rejected["stage"]) == ("broken", "caption") and "broken.mp4" not in rejected["reason"]
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    run(clips, models["qwen2_vl"], out, "--frames", "4", "--batch-size", "1")
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_models_that_cannot_be_used(
    clips: Path, models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
        (other, [], "model_type is 'bert', expected one of blip-2, gemma3"),
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
def test_ray_says_the_same(clips: Path, models: Models, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    run(clips, models["llava"], tmp_path / "local", "--batch-size", "3")
    run(clips, models["llava"], tmp_path / "ray", "--batch-size", "2", "--model-workers", "2", "--runner", "ray")
    for name in ("manifest.parquet", "rejects.parquet"):
        assert (tmp_path / "local" / name).read_bytes() == (tmp_path / "ray" / name).read_bytes()
