"""The demo's frozen models, which lie in checkpoints/demo, and the clips that teach a colour besides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from opensora_repro.config import VaeConfig
from opensora_repro.data.manifest import write_manifest
from opensora_repro.data.video import read_frames
from opensora_repro.demo.adherence import mask_of, measure, overlap
from opensora_repro.demo.seventh import TAKES, film_clips, motions_of
from opensora_repro.demo.shapes import COLOURS, FORMATS, OTHER_COLOURS, SHAPES, Motion, pixels, render
from opensora_repro.demo.text_encoder import build, trained_words, words
from opensora_repro.frozen.own_words import build_encoder, vocabulary
from opensora_repro.frozen.vae import open_vae
from tests.frames import read_manifest


@pytest.fixture(scope="module")
def returned(repo_dir: Path) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Of each colour, pictures [H, W, 3] as they were drawn and as the autoencoder gives them back."""
    vae = open_vae(VaeConfig(path=str(repo_dir / "checkpoints/demo/vae")), "cpu", torch.float32)
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    rng = np.random.default_rng(3)
    for number, colour in enumerate(COLOURS):
        width, height = pixels(list(FORMATS.values())[number % 3], 96)
        drawn = []
        for shape in SHAPES:
            centre = (rng.uniform(0.15, width / 96 - 0.15), rng.uniform(0.15, height / 96 - 0.15))
            motion = Motion(colour, shape, "left")
            drawn.append(render(motion, centre, 0.16, (20, 22, 24), width=width, height=height))
        video = torch.from_numpy(np.stack(drawn)).permute(3, 0, 1, 2) / 127.5 - 1
        with torch.no_grad():
            own = vae.decode(vae.sample_latents(vae.encode_moments(video), None)[None], num_frames=len(drawn))[0]
        frames = ((own.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
        found[colour] = list(zip(drawn, frames, strict=True))
    return found


def test_the_autoencoder_gives_outlines_back(returned: dict[str, list[tuple[np.ndarray, np.ndarray]]]) -> None:
    of_six = [overlap(*map(mask_of, pair)) for colour in COLOURS for pair in returned[colour]]
    assert np.mean(of_six) > 0.96 and min(of_six) > 0.9


def test_the_autoencoder_gives_colours_back(returned: dict[str, list[tuple[np.ndarray, np.ndarray]]]) -> None:
    for colour, pairs in returned.items():
        for drawn, found in pairs:
            inside = mask_of(drawn)
            error = np.abs(found[inside].mean(axis=0) - drawn[inside].mean(axis=0)).max()
            assert error < 20, (colour, error)


def test_words_of_other_colours_leave_the_others_what_they_were() -> None:
    alone, more = build_encoder(len(vocabulary(trained_words())), seed=0), build(0)
    ids = torch.arange(len(vocabulary(trained_words())))[None]
    with torch.no_grad():
        assert torch.equal(alone(ids).last_hidden_state, more(ids).last_hidden_state)
        vectors = more.get_input_embeddings().weight
    assert len(vectors) == len(vocabulary(words())) == len(vectors.unique(dim=0))


def test_clips_of_a_seventh_colour_show_what_they_say(tmp_path: Path) -> None:
    own = {"path": "x.mp4", "num_frames": 23, "fps": 24.0, "height": 96, "width": 96}
    known = pa.Table.from_pylist([{**own, "id": str(i), "caption": "a red circle moving up"} for i in range(70)])
    write_manifest(known, tmp_path / "known.parquet")
    rows = read_manifest(film_clips(tmp_path / "clips", "pink", tmp_path / "known.parquet")).to_dict("records")
    assert len(rows) == 2 * TAKES * len(motions_of("pink")) == 120 and len({row["id"] for row in rows}) == 120
    for row, motion in zip(rows[:60:7], (motions_of("pink") * TAKES)[::7], strict=True):
        frames = read_frames(Path(row["path"]), start=0, count=row["num_frames"]).numpy()
        seen = measure(frames, COLOURS | {"pink": OTHER_COLOURS["pink"]})
        assert row["caption"] == motion.caption and all(seen.agrees(motion).values())
        assert measure(frames).colour is None  # none of the six is so near that it would be taken for one
