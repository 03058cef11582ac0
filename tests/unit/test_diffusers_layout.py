"""PixArt and DiT weights go to diffusers' layout and back unchanged, and diffusers computes the same with them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from opensora_repro.models.config import DiTConfig, STDiTConfig
from opensora_repro.models.dit import DiT
from opensora_repro.models.stdit import STDiT
from opensora_repro.weights.diffusers_layout import (
    diffusers_kind,
    dit_diffusers_config,
    dit_facts,
    dit_from_diffusers,
    dit_to_diffusers,
    pixart_diffusers_config,
    pixart_facts,
    pixart_from_diffusers,
    pixart_to_diffusers,
)
from tests.tiny_models import make_tiny_vae

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

SIZE = {"depth": 2, "num_heads": 4, "hidden_size": 48, "in_channels": 4, "patch_size": (1, 2, 2)}
NULL_CAPTION = "y_embedder.y_embedding"


def pixart_config(sample_size: int = 16, space_scale: float = 1.0, size_conditioning: bool = False) -> dict[str, Any]:
    cfg = STDiTConfig(**SIZE, caption_channels=16, space_scale=space_scale, size_conditioning=size_conditioning)
    return pixart_diffusers_config(cfg, sample_size)


def dit_config() -> dict[str, Any]:
    return dit_diffusers_config(DiTConfig(**SIZE, num_classes=7), 16)


def settings(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


def noisy(model: Any, seed: int = 0) -> Any:
    """Return the model with no branch silent."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def make_pixart(config: dict[str, Any]) -> tuple[STDiT, Any]:
    """Return our model and diffusers' with the same weights, both from one config.json."""
    from diffusers import PixArtTransformer2DModel

    facts = pixart_facts(config)
    facts.pop("sample_size")
    torch.manual_seed(0)
    ours = noisy(STDiT(STDiTConfig(**facts, model_max_length=10)))
    theirs = PixArtTransformer2DModel(**settings(config)).eval()
    missing, unexpected = theirs.load_state_dict(pixart_to_diffusers(ours.state_dict()), strict=True)
    assert not missing and not unexpected
    return ours, theirs


def make_dit(config: dict[str, Any]) -> tuple[DiT, Any]:
    from diffusers import DiTTransformer2DModel

    facts = dit_facts(config)
    facts.pop("sample_size")
    torch.manual_seed(0)
    ours = noisy(DiT(DiTConfig(**facts)))
    theirs = DiTTransformer2DModel(**settings(config)).eval()
    missing, unexpected = theirs.load_state_dict(dit_to_diffusers(ours.state_dict()), strict=True)
    assert not missing and not unexpected
    return ours, theirs


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# ---------------------------------------------------------------------------------------------------------------------
# Tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size_conditioning", [False, True])
def test_pixart_goes_there_and_back_bit_for_bit(size_conditioning: bool, dtype: torch.dtype) -> None:
    ours, theirs = (model.to(dtype) for model in make_pixart(pixart_config(size_conditioning=size_conditioning)))
    published = ours.state_dict()
    there = pixart_to_diffusers(published)
    back = pixart_from_diffusers(there)
    assert_same(back, {key: value for key, value in published.items() if key != NULL_CAPTION})
    assert_same(pixart_to_diffusers(pixart_from_diffusers(theirs.state_dict())), theirs.state_dict())
    assert any("resolution_embedder" in key for key in there) == size_conditioning


def test_dit_goes_there_and_back_bit_for_bit() -> None:
    ours, theirs = make_dit(dit_config())
    assert_same(dit_from_diffusers(dit_to_diffusers(ours.state_dict())), ours.state_dict())
    assert_same(dit_to_diffusers(dit_from_diffusers(theirs.state_dict())), theirs.state_dict())


@pytest.mark.parametrize("name", ["keys_pixart_xl2_256_alpha", "keys_pixartms_xl2_opensora_1x1024"])
def test_published_pixart_keys_all_have_a_place(golden_dir: Path, name: str) -> None:
    """On the meta device: the real sizes without their memory."""
    from diffusers import PixArtTransformer2DModel

    shapes = json.loads((golden_dir / f"{name}.json").read_text())["shapes"]
    published = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    with torch.device("meta"):
        theirs = PixArtTransformer2DModel(sample_size=128 if "ms" in name else 32, caption_channels=4096)
    there = pixart_to_diffusers(published)
    assert {key: value.shape for key, value in there.items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    back = pixart_from_diffusers(there)
    assert published.keys() - back.keys() == {"pos_embed", "pos_embed_temporal", NULL_CAPTION} & published.keys()
    assert back["x_embedder.proj.weight"].shape == (1152, 4, 1, 2, 2)


def test_published_dit_keys_all_have_a_place(golden_dir: Path) -> None:
    from diffusers import DiTTransformer2DModel

    shapes = json.loads((golden_dir / "keys_dit_xl2_256_fb.json").read_text())["shapes"]
    published = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    with torch.device("meta"):
        theirs = DiTTransformer2DModel(out_channels=8)
    there = dit_to_diffusers(published)
    assert {key: value.shape for key, value in there.items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_splits_are_views_and_a_lazy_mapping_is_read_once() -> None:
    ours, theirs = make_pixart(pixart_config())
    published = ours.state_dict()
    storages = {tensor.untyped_storage().data_ptr() for tensor in published.values()}
    assert {tensor.untyped_storage().data_ptr() for tensor in pixart_to_diffusers(published).values()} <= storages

    class Lazy(Mapping[str, Tensor]):
        def __init__(self, tensors: dict[str, Tensor]) -> None:
            self.tensors, self.reads = tensors, list[str]()

        def __getitem__(self, key: str) -> Tensor:
            self.reads.append(key)
            return self.tensors[key]

        def __iter__(self) -> Iterator[str]:
            return iter(self.tensors)

        def __contains__(self, key: object) -> bool:
            return key in self.tensors

        def __len__(self) -> int:
            return len(self.tensors)

    lazy = Lazy(theirs.state_dict())
    assert_same(pixart_from_diffusers(lazy), {key: value for key, value in published.items() if key != NULL_CAPTION})
    assert sorted(lazy.reads) == sorted(lazy.tensors)


def test_what_diffusers_saves_today_and_saved_once_is_read(tmp_path: Path) -> None:
    """A folder written from our weights is one that diffusers reads; old files carry the position table."""
    from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel

    for maker, config, to_theirs, kind in (
        (make_pixart, pixart_config(), pixart_to_diffusers, PixArtTransformer2DModel),
        (make_dit, dit_config(), dit_to_diffusers, DiTTransformer2DModel),
    ):
        ours, theirs = maker(config)
        folder = tmp_path / kind.__name__
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        save_file(to_theirs(ours.state_dict()), folder / "diffusion_pytorch_model.safetensors")
        loaded, info = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True)
        assert not any(info.values()), info
        assert_same(loaded.state_dict(), theirs.state_dict())

    table = torch.zeros(1, 64, 48)
    assert pixart_from_diffusers({"pos_embed.pos_embed": table}) == {"pos_embed": table}
    assert pixart_to_diffusers({"pos_embed": table}) == {}


def test_foreign_and_broken_tensors_are_refused() -> None:
    ours, theirs = make_pixart(pixart_config())
    video = STDiT(STDiTConfig(hidden_size=48, depth=1, num_heads=4, caption_channels=16, model_max_length=10))
    with pytest.raises(ValueError, match=r"blocks\.0\.attn_temp\.\S+: diffusers' model has no such tensor"):
        pixart_to_diffusers(video.state_dict())
    with pytest.raises(ValueError, match="not a tensor of the diffusers model"):
        pixart_from_diffusers(ours.state_dict())
    with pytest.raises(ValueError, match="a patch of 2 frames"):
        pixart_to_diffusers({"x_embedder.proj.weight": torch.zeros(48, 4, 2, 2, 2)})
    broken = dict(theirs.state_dict())
    del broken["transformer_blocks.1.attn1.to_k.bias"]
    with pytest.raises(ValueError, match=r"transformer_blocks\.1\.attn1\.to_k\.bias is missing"):
        pixart_from_diffusers(broken)


def test_dit_blocks_must_share_their_embedders() -> None:
    _, theirs = make_dit(dit_config())
    changed = {key: value.clone() for key, value in theirs.state_dict().items()}
    changed["transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"][3] += 1e-3
    with pytest.raises(ValueError, match=r"transformer_blocks\.1\.norm1\.emb\.\S+ differs from block 0's"):
        dit_from_diffusers(changed)


# ---------------------------------------------------------------------------------------------------------------------
# config.json


def test_configs_go_there_and_back() -> None:
    facts = pixart_facts(pixart_config(sample_size=32, space_scale=1.5, size_conditioning=True))
    assert facts == {
        "in_channels": 4,
        "patch_size": (1, 2, 2),
        "hidden_size": 48,
        "depth": 2,
        "num_heads": 4,
        "mlp_ratio": 4.0,
        "pred_sigma": True,
        "caption_channels": 16,
        "temporal_attention": False,
        "space_scale": 1.5,
        "size_conditioning": True,
        "sample_size": 32,
        "base_size": 16,
    }
    facts = dit_facts(dit_config())
    assert (facts["num_classes"], facts["sample_size"], facts["pred_sigma"]) == (7, 16, True)
    assert diffusers_kind(pixart_config()) == "pixart" and diffusers_kind(dit_config()) == "dit"


def test_configs_written_before_these_classes_existed() -> None:
    """The hub's PixArt and DiT folders say Transformer2DModel and leave out what followed from the size then."""
    old = {"_class_name": "Transformer2DModel", "caption_channels": 4096, "norm_type": "ada_norm_single"}
    facts = pixart_facts({**old, "sample_size": 128})
    assert (facts["space_scale"], facts["size_conditioning"], facts["base_size"]) == (2.0, True, 64)
    facts = pixart_facts({**old, "sample_size": 64})
    assert (facts["space_scale"], facts["size_conditioning"], facts["base_size"]) == (1.0, False, 32)
    sigma = {"interpolation_scale": 2, "use_additional_conditions": False, "sample_size": 128}
    facts = pixart_facts({**old, **sigma})
    assert (facts["space_scale"], facts["size_conditioning"]) == (2.0, False)
    assert diffusers_kind(old) == "pixart"
    assert diffusers_kind({**old, "norm_type": "ada_norm_zero"}) == "dit"
    xl = {key: facts[key] for key in ("depth", "num_heads", "hidden_size", "in_channels")}
    assert xl == {"depth": 28, "num_heads": 16, "hidden_size": 1152, "in_channels": 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_type": "layer_norm"}, "norm_type='layer_norm'"),
        ({"activation_fn": "geglu"}, "activation_fn='geglu'"),
        ({"out_channels": 5}, "out_channels=5"),
        ({"caption_channels": None}, "no caption_channels"),
    ],
)
def test_other_configs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pixart_facts({**pixart_config(), **change})


def test_shapes_that_diffusers_cannot_have_are_refused() -> None:
    with pytest.raises(ValueError, match="square patches of one frame"):
        dit_diffusers_config(DiTConfig(**{**SIZE, "patch_size": (2, 2, 2)}, num_classes=7), 16)
    with pytest.raises(ValueError, match="neither PixArt nor DiT"):
        diffusers_kind({"_class_name": "UNet2DConditionModel"})


# ---------------------------------------------------------------------------------------------------------------------
# The same weights compute the same


def make_inputs(height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return latents [2, 4, H, W], timesteps, text [2, 10, 16] and its mask."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, height, width, generator=generator)
    text = torch.randn(2, 10, 16, generator=generator)
    return latents, torch.tensor([999, 17]), text, torch.arange(10) < torch.tensor([[4], [10]])


@pytest.mark.parametrize("base_size", [True, False])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 32), (64, 4), (12, 20), (24, 24)])
def test_pixart_predicts_as_diffusers_does(height: int, width: int, base_size: bool) -> None:
    """Without a base size of its own our model stretches positions alike only where the area is the config's."""
    config = pixart_config(space_scale=2.0)
    ours, theirs = make_pixart(config)
    if not base_size:
        free = STDiT(STDiTConfig(**{**vars(ours.cfg), "base_size": 0}))
        free.load_state_dict(ours.state_dict())
        ours = free.eval()
    latents, timestep, text, mask = make_inputs(height, width)
    with torch.no_grad():
        found = ours(latents.unsqueeze(2), timestep, text, mask).squeeze(2)
        expected = theirs(latents, text, timestep, encoder_attention_mask=mask).sample
    error = relative_error(found, expected)
    if base_size or height * width == 16 * 16:
        assert error <= 1e-5
    else:
        assert error > 1e-3


@pytest.mark.parametrize(("height", "width"), [(16, 16), (12, 20)])
def test_pixart_1024_ms_predicts_as_diffusers_does(height: int, width: int) -> None:
    ours, theirs = make_pixart(pixart_config(size_conditioning=True))
    latents, timestep, text, mask = make_inputs(height, width)
    image_size = torch.tensor([[128.0, 128.0], [96.0, 160.0]])
    aspect_ratio = torch.tensor([[1.0], [0.6]])
    with torch.no_grad():
        found = ours(latents.unsqueeze(2), timestep, text, mask, image_size=image_size, aspect_ratio=aspect_ratio)
        conditions = {"resolution": image_size, "aspect_ratio": aspect_ratio}
        expected = theirs(latents, text, timestep, conditions, encoder_attention_mask=mask).sample
    assert relative_error(found.squeeze(2), expected) <= 1e-5


def test_dit_differs_from_diffusers_by_the_sinusoid_alone() -> None:
    ours, theirs = make_dit(dit_config())
    latents, timestep, _, _ = make_inputs(16, 16)
    labels = torch.tensor([3, 7])  # the last one is the null label
    with torch.no_grad():
        found = ours(latents.unsqueeze(2), timestep, labels).squeeze(2)
        assert 1e-4 < relative_error(theirs(latents, timestep, labels).sample, found) < 0.2
        for block in theirs.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        assert relative_error(theirs(latents, timestep, labels).sample, found) <= 1e-5


@pytest.mark.parametrize("scheduler", ["DPMSolverMultistepScheduler", "DDIMScheduler"])
def test_the_pipeline_draws_the_picture_that_our_model_draws(tmp_path: Path, scheduler: str) -> None:
    import diffusers

    ours, theirs = make_pixart(pixart_config())
    make = getattr(diffusers, scheduler)
    schedule = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02}
    vae = diffusers.AutoencoderKL.from_pretrained(make_tiny_vae(tmp_path / "vae"), local_files_only=True)
    pipeline = diffusers.PixArtAlphaPipeline(None, None, vae, theirs, make(**schedule))
    pipeline.set_progress_bar_config(disable=True)

    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(2, 4, 8, 32, generator=generator)
    text, null = torch.randn(2, 2, 10, 16, generator=generator)
    mask, null_mask = torch.arange(10) < torch.tensor([4, 10, 1, 1])[:, None].unflatten(0, (2, 2))
    images = pipeline(
        prompt_embeds=text,
        prompt_attention_mask=mask,
        negative_prompt=None,
        negative_prompt_embeds=null,
        negative_prompt_attention_mask=null_mask,
        guidance_scale=4.5,
        num_inference_steps=6,
        height=64,
        width=256,
        latents=noise.clone(),
        use_resolution_binning=False,
        output_type="latent",
    ).images

    steps = make(**schedule)
    steps.set_timesteps(6)
    latents = noise * steps.init_noise_sigma
    for t in steps.timesteps:
        both = torch.cat([latents, latents]).unsqueeze(2)  # [2B, 4, 1, H, W]: no caption, then the caption
        with torch.no_grad():
            out = ours(both, t.expand(4), torch.cat([null, text]), torch.cat([null_mask, mask]))
        without, given = out[:, :4, 0].chunk(2)
        latents = steps.step(without + 4.5 * (given - without), t, latents).prev_sample
    assert relative_error(images, latents) <= 1e-5
