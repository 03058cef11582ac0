"""Given frames: places and files, what an autoencoder's stride makes of them, how a long video is cut into clips."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from opensora_repro.config import ConfigError, DataConfig, DiffusionConfig, VaeConfig
from opensora_repro.data.write import write_png
from opensora_repro.diffusion.samplers import LatentSampler
from opensora_repro.frozen.autoencoder import Autoencoder
from opensora_repro.frozen.geometry import Geometry
from opensora_repro.frozen.vae import open_vae
from opensora_repro.sampling.chain import Chain, read_script, text_at, texts_of, with_texts
from opensora_repro.sampling.given import Given, GivenClip, condition_lengths, parse_keep, place, told
from tests.tiny_models import make_tiny_video_vae
from tests.video_models import CONFIGS, conditions, make_model

WAN = Geometry("AutoencoderKLWan", 4, 8, 4, period=4, remainders=(1,))
OPEN_SORA = Geometry("VideoAutoencoderPipeline", 4, 8, 4, chunk=17)
IMAGES = Geometry("AutoencoderKL", 4, 8)


@pytest.fixture(scope="module", params=["AutoencoderKLWan", "AutoencoderKLLTXVideo"])
def vae(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Autoencoder:
    path = make_tiny_video_vae(tmp_path_factory.mktemp("vae") / "vae", request.param)
    return open_vae(VaeConfig(str(path)), "cpu", torch.float32)


def test_latents_cover_the_frames_that_they_are_made_of(vae: Autoencoder) -> None:
    """Of causal autoencoders a frame changes no latent before its own."""
    frames = 2 * vae.temporal_stride + 1
    video = torch.rand(3, frames, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before = vae.encode_moments(video)
    for number, span in enumerate(vae.geometry.latent_spans(frames)):
        for frame in {span.start, span.stop - 1}:
            changed = video.clone()
            changed[:, frame] *= -1
            moved = (vae.encode_moments(changed) - before).abs().amax(dim=(0, 2, 3)) > 1e-5
            assert moved.nonzero()[0].item() == number, frame


def test_spans_of_latents() -> None:
    assert IMAGES.latent_spans(3) == [range(0, 1), range(1, 2), range(2, 3)]
    assert WAN.latent_spans(9) == [range(0, 1), range(1, 5), range(5, 9)]
    spans = OPEN_SORA.latent_spans(34)
    assert spans[:2] == [range(0, 1), range(1, 5)] and spans[5:7] == [range(17, 18), range(18, 22)]
    for geometry, frames in ((IMAGES, 7), (WAN, 13), (OPEN_SORA, 51), (OPEN_SORA, 20)):
        spans = geometry.latent_spans(frames)
        assert len(spans) == geometry.latent_frames(frames)
        assert [frame for span in spans for frame in span] == list(range(frames))


def test_conditions_are_whole_latents() -> None:
    assert condition_lengths(IMAGES, 16, None) == (4, 4)
    assert condition_lengths(WAN, 33, None) == (5, 8)  # 2 of 9 latents
    assert condition_lengths(WAN, 33, 7) == (5, 4)
    assert condition_lengths(WAN, 33, 1) == (1, 4)
    assert condition_lengths(OPEN_SORA, 51, None) == (17, 17)  # as 1.2 has it: 5 latents


def test_frames_that_share_a_latent_with_given_ones_are_told(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", np.zeros((32, 32, 3), np.uint8))
    data = DataConfig(num_frames=9, height=32, width=32)
    placed = place([parse_keep(f"{at}={tmp_path}/a.png") for at in ("0", "-1")], data, 9)
    assert told(Given(placed), WAN, [range(9)]) == [
        "frames 0 to 0 from a.png: latents 0 to 0 of 3 kept",
        "frames 8 to 8 from a.png: latents 2 to 2 of 3 kept; 3 free frames that share them start from the nearest "
        "given one",
    ]


@pytest.mark.parametrize("name", ["stdit", "stdit2", "stdit3"])
def test_given_latents_stay_and_the_others_look_at_them(vae: Autoencoder, name: str) -> None:
    frames = 2 * vae.temporal_stride + 1
    size, model = (frames, 64, 64), make_model(name)
    sampler = LatentSampler(DiffusionConfig(objective="flow"), "euler", steps=3, guidance=2.0)
    found = []
    for value in (40, 200):
        pixels = torch.full((1, 64, 64, 3), value, dtype=torch.uint8)
        given = Given().latents(vae, GivenClip([0], pixels, [0.0]), size)
        assert given is not None and given.ratios.tolist() == [[0, 1, 1]]
        latents = sampler(
            model, torch.ones(1, 8, 16), torch.ones(1, 8, dtype=torch.bool), model.null_condition(),
            shape=vae.latent_shape(*size), generators=[torch.Generator().manual_seed(0)], size=size,
            conditions=conditions(model.cfg, 1), given=given,
        )  # fmt: skip
        still = pixels.float().div(127.5).sub(1).permute(3, 0, 1, 2)
        alone = vae.sample_latents(vae.encode_moments(still), None)
        torch.testing.assert_close(latents[0, :, :1], alone, rtol=1e-4, atol=1e-4)
        assert torch.equal(latents[:, :, 0], given.latents[:, :, 0])
        found.append(latents)
    assert name in CONFIGS and not torch.allclose(found[0][:, :, 1:], found[1][:, :, 1:], atol=1e-4)


def test_clips_of_a_long_video_cover_it_once() -> None:
    for total in (17, 20, 26, 27, 100, 480):
        for loop in (False, True):
            chain = Chain(total, 16, 4, 3, loop)
            parts = chain.rounds()
            assert [frame for part in parts for frame in part.new] == list(range(total))
            for before, part in pairwise(parts):
                assert part.window.start == before.new.stop - 4 and len(part.window) == 16
                assert part.new.start == part.window.start + 4 and before.new.stop <= before.window.stop
            assert [part.closes for part in parts] == [False] * (len(parts) - 1) + [loop]
            assert parts[-1].window.stop == total + (3 if loop else 0)


def test_scripts_hold_from_their_second_on() -> None:
    script = read_script(["0: dawn", "1.5: noon"], "--prompts p.txt")
    assert script is not None and texts_of(script) == ["dawn", "noon"]
    assert with_texts(script, str.upper) == "0: DAWN\n1.5: NOON"
    parts = Chain(20, 6, 2, 2).rounds()  # new frames begin at 0, 6, 10, 14 and 16
    assert [text_at(script, part, 8) for part in parts] == ["dawn"] * 3 + ["noon"] * 2
    assert [text_at("|0|a|2|b", part, 8) for part in parts[:4]] == ["a", "a", "b", "b"]
    assert text_at("12: 5 is a ratio", parts[1], 8) == "12: 5 is a ratio" and read_script(["a", "0: b"], "x") is None
    for lines in (["0: a", "b"], ["0: a", "3: b", "3: c"]):
        with pytest.raises(ConfigError, match=rf"^--prompts p: line {len(lines)} of a script: expected SECONDS: TEXT"):
            read_script(lines, "--prompts p")
