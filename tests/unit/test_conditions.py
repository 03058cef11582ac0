"""What DiT and Latte are conditioned on, CLIP's pooled text and class numbers, and videos made of either."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from opensora_repro.config import Config, ConfigError, DataConfig, DiffusionConfig, SampleConfig, TextConfig, VaeConfig
from opensora_repro.diffusion.flow import build_flow
from opensora_repro.frozen.autoencoder import FrameVAE
from opensora_repro.frozen.pretrained import ModelNotFound
from opensora_repro.frozen.text import ClassLabels, ClipText, ConditionEncoder, open_clip_text
from opensora_repro.frozen.vae import open_vae
from opensora_repro.models.config import DiTConfig, STDiTConfig
from opensora_repro.models.dit import DiT
from opensora_repro.models.stdit import STDiT
from opensora_repro.sampling.generate import generate
from tests.tiny_models import TINY_CLIP_CHANNELS as CHANNELS
from tests.tiny_models import TINY_CLIP_LENGTH as LENGTH
from tests.tiny_models import make_tiny_clip, make_tiny_text, make_tiny_vae

CAPTIONS = ["red circle", "", "a blue square moving left, then right"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(folder: Path) -> ClipText:
    return open_clip_text(TextConfig(str(folder)), "cpu", torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# CLIP


def test_a_caption_becomes_one_token(clip: ClipText) -> None:
    embeddings, mask = clip.encode(CAPTIONS)
    assert embeddings.shape == (3, 1, CHANNELS) and embeddings.dtype == torch.float32 and mask is None
    assert (clip.channels, clip.max_length) == (CHANNELS, LENGTH)
    assert not embeddings.requires_grad and not any(parameter.requires_grad for parameter in clip.model.parameters())
    for index, caption in enumerate(CAPTIONS):
        assert torch.equal(clip.encode([caption])[0][0], embeddings[index])
    assert clip.encode([])[0].shape == (0, 1, CHANNELS)


@torch.no_grad()
def test_it_is_the_state_at_the_captions_end(clip: ClipText) -> None:
    """Padding behind the end changes nothing; a long caption is cut, its end kept."""
    embeddings, _ = clip.encode(["red", "b" * 5000])
    for index, text in enumerate(["red", "b" * (LENGTH - 2)]):  # a space before the word, the end after it
        ids = clip.tokenizer([text], return_tensors="pt")["input_ids"]
        assert ids[0, -1] == clip.tokenizer.eos_token_id
        torch.testing.assert_close(embeddings[index], clip.model(ids).last_hidden_state[:, -1])


def test_captions_are_not_cleaned(clip: ClipText) -> None:
    same, _ = clip.encode(["red circle"])
    assert not torch.allclose(clip.encode(["<b>red circle"])[0], same)


def test_autocast_does_not_reach_the_frozen_model(clip: ClipText) -> None:
    expected, _ = clip.encode(CAPTIONS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(clip.encode(CAPTIONS)[0], expected)


def test_wrong_folders_end_in_one_line(tmp_path: Path) -> None:
    for path, reason in (
        (tmp_path / "absent", "no such folder"),
        (make_tiny_text(tmp_path / "t5"), "cannot be loaded"),
    ):
        with pytest.raises(ModelNotFound, match=reason) as error:
            open_clip_text(TextConfig(str(path)), "cpu", torch.float32).frozen.load()
        message = str(error.value)
        assert message.startswith(f"text.path={path}: ") and "CLIP text model" in message and "\n" not in message


# ---------------------------------------------------------------------------------------------------------------------
# Classes


def test_class_numbers() -> None:
    labels, mask = ClassLabels(10).encode(["0", " 7 ", "9"])
    assert labels.tolist() == [0, 7, 9] and labels.dtype == torch.int64 and mask is None
    assert ClassLabels(10).encode([])[0].shape == (0,)
    for prompt in ("10", "-1", "1.5", "a cat", "", "1_0"):
        with pytest.raises(ValueError, match=f"prompt '{prompt}': expected a class number, 0 to 9"):
            ClassLabels(10).encode(["3", prompt])


# ---------------------------------------------------------------------------------------------------------------------
# Videos

LABELS = DiTConfig(hidden_size=32, depth=2, num_heads=2, num_classes=10, factorised=True)
TEXT = replace(LABELS, condition="text", caption_channels=CHANNELS)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> FrameVAE:
    path = make_tiny_vae(tmp_path_factory.mktemp("vae"))
    return open_vae(VaeConfig(str(path)), torch.device("cpu"), torch.float32)


def make_model(cfg: DiTConfig) -> DiT:
    torch.manual_seed(0)
    model = DiT(cfg)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model


def make_videos(
    model: DiT | STDiT,
    vae: FrameVAE,
    encoder: ConditionEncoder,
    prompts: list[str],
    batch_size: int = 2,
    width: int = 32,
) -> list[np.ndarray]:
    """The config describes an STDiT; what the model is, its own config says."""
    cfg = Config(
        data=DataConfig(num_frames=2, height=32, width=width),
        sample=SampleConfig(sampler="ddim", steps=2, guidance=3.0),
    )
    found = generate(model, vae, encoder, cfg, prompts, seed=1, batch_size=batch_size)
    return [video for _, video in found]


@pytest.mark.parametrize("kind", ["label", "text"])
def test_videos_of_a_condition(kind: str, vae: FrameVAE, clip: ClipText) -> None:
    model = make_model(LABELS if kind == "label" else TEXT)
    encoder = ClassLabels(10) if kind == "label" else clip
    prompts, other = (["3", "7", "7"], "4") if kind == "label" else (CAPTIONS, "a dog")
    videos = make_videos(model, vae, encoder, prompts)
    assert [video.shape for video in videos] == [(2, 32, 32, 3)] * 3
    alone = make_videos(model, vae, encoder, prompts, batch_size=1)
    for one, same in zip(videos, alone, strict=True):
        assert np.abs(one.astype(int) - same).max() <= 1
    changed = make_videos(model, vae, encoder, [other])[0]
    assert np.abs(changed.astype(int) - videos[0]).max() > 1
    assert model.training  # as it was


def test_the_models_own_patches_set_the_flows_shift(vae: FrameVAE) -> None:
    """8 tokens in 2 frames here; `cfg.model`, which is not the model's, would make 32 of the latents."""
    model = make_model(replace(LABELS, patch_size=(1, 4, 4)))
    seen: list[float] = []
    model.register_forward_pre_hook(lambda _model, given: seen.append(given[1][0].item()))
    cfg = Config(
        data=DataConfig(num_frames=2, height=64, width=64),
        diffusion=DiffusionConfig(objective="flow"),
        sample=SampleConfig(sampler="euler", steps=4, guidance=3.0),
    )
    list(generate(model, vae, ClassLabels(10), cfg, ["3"], seed=1, batch_size=1))
    expected = build_flow(cfg.diffusion).sampling_times(4, 8, 2)[:-1] * 1000
    assert seen == pytest.approx(expected.tolist())


def test_what_does_not_fit_is_named(vae: FrameVAE, clip: ClipText) -> None:
    labels, text = make_model(LABELS), make_model(TEXT)
    video_model = STDiT(STDiTConfig(hidden_size=32, depth=1, num_heads=2, caption_channels=8, model_max_length=4))
    with pytest.raises(ConfigError, match="height 32 and width 40 must be equal"):
        make_videos(text, vae, clip, ["a"], width=40)
    with pytest.raises(ConfigError, match=r"model\.num_classes = 10: the prompts are not read as their numbers"):
        make_videos(labels, vae, clip, ["a"])
    with pytest.raises(ConfigError, match=r"model\.num_classes = 10"):
        make_videos(labels, vae, ClassLabels(11), ["10"])
    for model in (text, video_model):
        with pytest.raises(ConfigError, match="conditioned on text"):
            make_videos(model, vae, ClassLabels(10), ["1"])
    with pytest.raises(ConfigError, match=r"model\.caption_channels = 8: the text encoder .* has 16"):
        make_videos(video_model, vae, clip, ["a"])
