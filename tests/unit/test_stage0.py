"""Stage 0's parts: its config, the measures of quality, losses, the start as a picture, the captions' words."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from einops import reduce, repeat
from safetensors.torch import save_file
from torch import Tensor, nn

from opensora_repro.config import (
    AutoencoderConfig,
    AutoencoderModelConfig,
    ConfigError,
    InitConfig,
    MixtureConfig,
    ReconstructionConfig,
    dump_toml,
    load_autoencoder_config,
    load_config,
    load_recorded,
)
from opensora_repro.data.dataset import Clip
from opensora_repro.frozen.own_words import build_encoder, build_tokenizer, count_words, save_text_encoder, vocabulary
from opensora_repro.frozen.perceptual import load_lpips
from opensora_repro.frozen.pretrained import ModelNotFound
from opensora_repro.frozen.text import read_cleaned
from opensora_repro.training.autoencoder.batches import VideoBuilder
from opensora_repro.training.autoencoder.discriminator import PatchDiscriminator, adaptive_weight
from opensora_repro.training.autoencoder.losses import PARTS, AutoencoderLosses, Drawn
from opensora_repro.training.autoencoder.model import (
    ImageAutoencoder,
    build_image,
    check_models,
    draw_image,
    temporal_config,
)
from opensora_repro.training.autoencoder.picture_start import GAINS, OPPONENTS, has_room, start_as_picture
from opensora_repro.training.autoencoder.quality import psnr, ssim
from opensora_repro.training.autoencoder.report import latents_told

TINY = AutoencoderModelConfig(channels=(16, 32), layers_per_block=1, latent_channels=4, norm_groups=4, attention=False)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 1


def tiny(model: AutoencoderModelConfig = TINY) -> ImageAutoencoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ImageAutoencoder(draw_image(model))


# Config


def test_a_config_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[model]\nchannels = [32, 64]\n[data]\nheight = 96\nwidth = 96\n")
    cfg = load_autoencoder_config(path, ["loss.kl=0.5", "model.image="])
    assert (cfg.model.channels, cfg.loss.kl, cfg.spatial_stride, cfg.shared.data.height) == ((32, 64), 0.5, 2, 96)
    path.write_text(dump_toml(cfg))
    assert load_autoencoder_config(path) == cfg


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.chanels=[8]", "did you mean model.channels?"),
        ("vae.path=x", "unknown key vae.path"),
        ("model.norm_groups=7", "model.norm_groups = 7: expected a divisor"),
        ("model.channels=[]", "model.channels = []"),
        ("model.kind=video", "model.image"),
        ("loss.target=latents", "loss.target"),
        ("data.height=100", "data.height = 100: expected a multiple of 8"),
        ("data.cache=x", "data.cache"),
        ("parallel.plugin=fsdp", "parallel.plugin"),
        ("train.steps=0", "train.steps = 0"),
        ("loss.kl=-1", "loss.kl = -1"),
        ("mixture.image_share=0.5", "mixture.image_share"),
    ],
)
def test_what_cannot_work_is_one_line(tmp_path: Path, override: str, told: str) -> None:
    (tmp_path / "c.toml").write_text("")
    with pytest.raises(ConfigError) as raised:
        load_autoencoder_config(tmp_path / "c.toml", [override])
    assert told in str(raised.value) and "\n" not in str(raised.value)


def test_a_config_of_the_other_kind_is_called_so(tmp_path: Path) -> None:
    """Not key by key: every one of them would be unknown."""
    recipes = Path(__file__).parents[2] / "configs" / "laptop"
    with pytest.raises(ConfigError, match=r"stage1.toml: this is of stages 1 to 3; expected a config of stage 0"):
        load_autoencoder_config(recipes / "stage1.toml")
    for load in (load_config, load_recorded):
        with pytest.raises(ConfigError, match=r"stage0.toml: this is of stage 0, .* of stages 1 to 3"):
            load(recipes / "stage0.toml")


def test_folders_that_the_model_cannot_begin_from_are_seen_before_anything_is_built(tmp_path: Path) -> None:
    """By config.json alone: no weights of theirs are there."""
    config = {"block_out_channels": [8, 16], "latent_channels": 4, "norm_num_groups": 4}
    for name, told in (
        ("image", {"_class_name": "AutoencoderKL", **config}),
        ("wan", {"_class_name": "AutoencoderKLWan", "z_dim": 4}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(told))
        for file in ("diffusion_pytorch_model.safetensors", "model.safetensors"):
            save_file({"none.of.it": torch.zeros(1)}, tmp_path / name / file)
    image = AutoencoderConfig(model=AutoencoderModelConfig(channels=(8, 16), layers_per_block=1, norm_groups=4))
    video = replace(image, model=replace(image.model, kind="video", image=f"{tmp_path}/image"))
    check_models(replace(image, init=InitConfig(f"{tmp_path}/image")))
    check_models(video)
    for cfg, told in (
        (replace(image, init=InitConfig(f"{tmp_path}/wan")), "config.json describes AutoencoderKLWan"),
        (
            replace(image, init=InitConfig(f"{tmp_path}/image"), model=replace(image.model, norm_groups=2)),
            "norm_groups",
        ),
        (replace(video, model=replace(video.model, image=f"{tmp_path}/wan")), "config.json describes AutoencoderKLWan"),
        (replace(video, model=replace(video.model, channels=(8, 12))), "multiples of the first"),
        (replace(video, init=InitConfig(f"{tmp_path}/image")), "init.weights"),
        (
            replace(video, model=replace(video.model, latent_channels=8), loss=replace(video.loss, image_latents=1.0)),
            "model.latent_channels = 4 as model.image has",
        ),
    ):
        with pytest.raises((ConfigError, ModelNotFound), match=told) as raised:
            check_models(cfg)
        assert "\n" not in str(raised.value)


def test_the_latents_of_a_video_are_told_as_they_are_made() -> None:
    for channels, told in (((8,), "one a frame"), ((8, 16), "2 frames share"), ((8, 8, 16), "4 frames share")):
        model = replace(TINY, kind="video", channels=channels)
        line = latents_told(AutoencoderConfig(model=model))
        assert told in line
        stride = math.prod(1 + halved for halved in temporal_config(model, 4, None).temporal.temporal_downsample)
        assert stride == 1 or f"{stride} frames" in line


# Quality


def test_psnr_of_a_known_error() -> None:
    source = uniform(2, 3, 16, 16) / 2
    found = source + torch.tensor([0.02, 0.2])[:, None, None, None]
    assert torch.allclose(psnr(found, source), torch.tensor([40.0, 20.0]), atol=1e-3)
    assert psnr(source, source).tolist() == [100.0, 100.0]


def test_ssim_is_the_mean_over_windows() -> None:
    """By its definition, a window at a time in double precision."""
    source, found = uniform(1, 3, 14, 15).double(), uniform(1, 3, 14, 15, seed=1).double()
    x, y = (source[0] + 1) / 2, (found[0] + 1) / 2
    g = torch.exp(-0.5 * ((torch.arange(11).double() - 5) / 1.5) ** 2)
    window = g[:, None] * g / (g.sum() ** 2)
    values = []
    for channel in range(3):
        for top in range(4):
            for left in range(5):
                a, b = (z[channel, top : top + 11, left : left + 11] for z in (x, y))
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
                both = (window * (a - mean_a) * (b - mean_b)).sum()
                upper = (2 * mean_a * mean_b + 1e-4) * (2 * both + 9e-4)
                values.append(upper / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4)))
    assert ssim(found, source).item() == pytest.approx(torch.stack(values).mean().item(), abs=1e-9)
    assert ssim(source, source).item() == pytest.approx(1.0)


# Losses


def test_lpips_is_the_one_of_torchvisions_vgg16(tmp_path: Path) -> None:
    from torchvision.models import vgg16

    torch.manual_seed(0)
    vgg = vgg16(weights=None)
    lin = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}
    torch.save({key: value for key, value in vgg.state_dict().items() if "features" in key}, tmp_path / "vgg16.pth")
    torch.save(lin, tmp_path / "vgg.pth")
    first, second = uniform(2, 3, 32, 32), uniform(2, 3, 32, 32, seed=1)

    def features(x: Tensor) -> list[Tensor]:
        mean, std = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]])[..., None, None]
        x = (x - mean) / std
        found = []
        for number, layer in enumerate(vgg.features):
            x = layer(x)
            if number in (3, 8, 15, 22, 29):  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
                found.append(nn.functional.normalize(x, dim=1))
        return found

    with torch.no_grad():
        expected = sum(
            (weight * (a - b) ** 2).sum(1).mean((1, 2))
            for weight, a, b in zip(lin.values(), features(first), features(second), strict=True)
        )
        measure = load_lpips(str(tmp_path))
        assert torch.allclose(measure(first, second), expected, rtol=1e-4)
        assert measure(first, first).abs().max() < 1e-6
    assert not any(parameter.requires_grad for parameter in measure.parameters())


def test_an_lpips_folder_without_vgg_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder with a file of weights"):
        load_lpips(str(tmp_path))
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(ConfigError, match="no VGG16 in torchvision's layout"):
        load_lpips(str(tmp_path))


def test_the_judge_and_the_judged_learn_apart() -> None:
    torch.manual_seed(0)
    judge = PatchDiscriminator(8, 2)
    found, source = uniform(2, 3, 32, 32).requires_grad_(), uniform(2, 3, 32, 32, seed=1)
    judge.judged(found).sum().backward()
    assert found.grad is not None and all(parameter.grad is None for parameter in judge.parameters())
    found.grad = None
    judge.loss(found, source).sum().backward()
    assert found.grad is None and all(parameter.grad is not None for parameter in judge.parameters())
    with torch.no_grad():
        real, fake = judge(source), judge(found)
        hinge = 0.5 * ((1 - real).clamp(min=0) + (1 + fake).clamp(min=0)).mean((1, 2, 3))
        assert torch.allclose(judge.loss(found, source), hinge)


def test_adaptive_weight_is_the_ratio_of_gradients() -> None:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    found = adaptive_weight((3 * weight).sum(), (0.5 * weight).sum(), weight)
    assert found.item() == pytest.approx(6.0, rel=1e-3)


def drawn(autoencoder: ImageAutoencoder, video: Tensor) -> Drawn:
    shape = (len(video), *autoencoder.latent_shape(*video.shape[2:]))
    generator = torch.Generator().manual_seed(5)
    return Drawn(*(torch.randn(shape, generator=generator) for _ in range(2)), torch.ones(len(video)))


def test_loss_is_the_weighted_sum_of_its_parts() -> None:
    autoencoder, video = tiny(), uniform(2, 3, 2, 16, 16)
    cfg = ReconstructionConfig(kl=0.01, discriminator=0.5, discriminator_start=3, discriminator_adaptive=False,
                               discriminator_channels=8, discriminator_layers=1)  # fmt: skip
    losses = AutoencoderLosses(autoencoder, cfg)
    noise = drawn(autoencoder, video)
    early, parts = losses(video, noise, 2)
    told = dict(zip(PARTS, parts.tolist(), strict=True))
    assert told["adversarial"] == told["discriminator"] == told["lpips"] == 0
    assert early.mean().item() == pytest.approx(told["l1"] + 0.01 * told["kl"], rel=1e-5)
    moments = autoencoder.moments(video)
    mean, logvar = moments.chunk(2, dim=1)
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum((1, 2, 3, 4)).mean() / (3 * 2 * 16 * 16)
    assert told["kl"] == pytest.approx(kl.item(), rel=1e-5)
    late, parts = losses(video, noise, 3)
    told = dict(zip(PARTS, parts.tolist(), strict=True))
    expected = told["l1"] + 0.01 * told["kl"] + 0.5 * told["adversarial"] + told["discriminator"]
    assert late.mean().item() == pytest.approx(expected, rel=1e-5)
    early.sum().backward()
    assert all(parameter.grad is not None for parameter in losses.parameters())  # as DDP wants it


def test_latent_noise_is_shown_to_the_decoder() -> None:
    autoencoder, video = tiny(), uniform(2, 3, 1, 16, 16)
    noise = drawn(autoencoder, video)
    quiet, loud = (
        AutoencoderLosses(autoencoder, ReconstructionConfig(latent_noise=level))(video, noise, 0)[0].mean().item()
        for level in (0.0, 1.0)
    )
    assert loud > quiet + 0.05


def test_with_a_frozen_encoder_the_decoder_alone_is_trained_and_latents_keep_their_factor(tmp_path: Path) -> None:
    ImageAutoencoder(tiny().vae).save(tmp_path / "from", torch.zeros(4), torch.full((4,), 2.0))
    model = replace(TINY, frozen_encoder=True)
    cfg = AutoencoderConfig(model=model, init=InitConfig(weights=str(tmp_path / "from")))
    autoencoder, video = build_image(cfg), uniform(1, 3, 1, 16, 16)
    AutoencoderLosses(autoencoder, ReconstructionConfig())(video, drawn(autoencoder, video), 0)[0].sum().backward()
    trained = {name.split(".")[0] for name, weight in autoencoder.vae.named_parameters() if weight.grad is not None}
    assert trained == {"decoder", "post_quant_conv"}
    autoencoder.save(tmp_path / "to", torch.zeros(4), torch.ones(4))
    assert json.loads((tmp_path / "to" / "config.json").read_text())["scaling_factor"] == 0.5


# The start


@pytest.mark.parametrize(("channels", "groups"), [((32, 64, 96), 8), ((16, 16), 4), ((64, 64, 64, 64), 16)])
def test_a_new_autoencoder_shrinks_the_picture(channels: tuple[int, ...], groups: int) -> None:
    """Latents are colours of squares, and these come back: what training begins with is no noise."""
    vae = tiny(replace(TINY, channels=channels, norm_groups=groups))
    stride, video = vae.stride, uniform(1, 3, 1, 32, 32)
    squares = reduce(video, "b c t (h s) (w r) -> b c t h w", "mean", s=stride, r=stride)
    with torch.no_grad():
        mean = vae.moments(video).chunk(2, dim=1)[0]
        expected = torch.einsum("lc,bcthw->blthw", torch.tensor(OPPONENTS) * torch.tensor(GAINS)[:, None], squares)
        assert (mean[:, :3] - expected).abs().max() < 0.1 * expected.abs().max()
        found = vae.decode(mean, num_frames=1)
    big = repeat(squares, "b c t h w -> b c t (h s) (w r)", s=stride, r=stride)
    assert (found - big).abs().mean() < 0.03


@pytest.mark.parametrize(("channels", "groups", "latents"), [((8, 16), 2, 4), ((8, 16), 4, 4), ((16, 32), 4, 2)])
def test_without_room_for_colours_it_begins_as_noise_and_says_so(
    channels: tuple[int, ...], groups: int, latents: int
) -> None:
    model = replace(TINY, channels=channels, norm_groups=groups, latent_channels=latents)
    vae, drawn = tiny(model).module, tiny(model).module.encoder.conv_in.weight.clone()
    assert has_room(channels, groups, latents) is start_as_picture(vae) is False
    assert torch.equal(vae.encoder.conv_in.weight, drawn)


def test_groups_without_room_leave_the_weights_at_random() -> None:
    vae, video = tiny(replace(TINY, channels=(8, 16), norm_groups=8)), uniform(1, 3, 1, 16, 16)
    with torch.no_grad():
        found = vae.decode(vae.moments(video).chunk(2, dim=1)[0], num_frames=1)
    assert found.shape == video.shape and (found - video).abs().mean() > 0.1


def test_sizes_of_a_temporal_autoencoder_are_the_published_ones() -> None:
    published = AutoencoderModelConfig("video", "x", (128, 256, 256, 512), 4, 4, 32)
    found = temporal_config(published, 4, 0.18215)
    assert found.temporal == type(found.temporal)() and found.latent_scale == 0.18215
    with pytest.raises(ConfigError, match="multiples of the first"):
        temporal_config(replace(published, channels=(64, 96)), 4, None)


# Batches


def test_micro_batches_are_cut_to_images_and_lengths() -> None:
    cfg = AutoencoderConfig(mixture=MixtureConfig(image_share=0.25, random_length=True))
    builder = VideoBuilder(cfg, tiny(), torch.device("cpu"))
    pixels = torch.zeros(33, 2, 2, 3, dtype=torch.uint8)
    lengths = [builder.num_frames(epoch, Clip("a", "", pixels, False, 8.0)) for epoch in range(2000)]
    assert lengths == [builder.num_frames(epoch, Clip("a", "", pixels, False, 8.0)) for epoch in range(2000)]
    share_of_images = sum(length == 1 for length in lengths) / len(lengths)
    assert share_of_images == pytest.approx(0.25 + 0.75 / 33, abs=0.04)
    assert (min(lengths), max(lengths)) == (1, 33)
    assert sum(lengths) / len(lengths) == pytest.approx(0.25 + 0.75 * 17, abs=0.8)


# Words


def test_words_of_captions(tmp_path: Path) -> None:
    captions = ["A red ball, rolling.", "a RED car", "the car: a red one"]
    words = count_words(captions, 3)
    assert words.known == ("a", "red", "car") and words.longest == 5
    assert words.num_left_out == 4 and math.isclose(words.share_left_out, 4 / 12)
    tokens = len(vocabulary(words.known))
    save_text_encoder(build_encoder(tokens, seed=0), build_tokenizer(words.known, 16), tmp_path / "text")

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "text")
    assert tokenizer("a red car")["input_ids"] == tokenizer("a  red, car!")["input_ids"] == [3, 4, 5, 1]
    (known, unknown) = read_cleaned(tokenizer, ["A car, a red car", "a blue cars"], 16)
    assert (known.unknown, unknown.unknown) == (0, 2)  # no piece of a word passes for another word


def test_the_planner_counts_what_has_no_attention() -> None:
    from opensora_repro.planning.image_encoders import _decoder, _encoder

    vae = tiny().vae
    layers = [*_encoder(dict(vae.config)), *_decoder(dict(vae.config))]
    assert sum(layer.parameters for layer in layers) == sum(value.numel() for value in vae.parameters())
