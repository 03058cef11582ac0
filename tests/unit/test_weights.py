"""Weights on disk: every published layout is recognised by its contents and loads whole, or is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from opensora_repro.models.config import DiTConfig, STDiT2Config, STDiT3Config, STDiTConfig
from opensora_repro.models.dit import DiT
from opensora_repro.models.layers import spatial_positions
from opensora_repro.models.stdit import STDiT
from opensora_repro.planning.flops import forward_products
from opensora_repro.planning.sizes import Grid
from opensora_repro.weights.diffusers_layout import (
    dit_diffusers_config,
    dit_to_diffusers,
    pixart_diffusers_config,
    pixart_to_diffusers,
)
from opensora_repro.weights.families import FAMILIES, empty_model, family_of
from opensora_repro.weights.files import NULL_CAPTION_FILE, WeightsError, find_weights
from opensora_repro.weights.initial import draw_xavier_uniform
from opensora_repro.weights.load import load_model_weights

TINY = STDiTConfig(hidden_size=48, depth=2, num_heads=4, caption_channels=16, model_max_length=10)
IMAGE = replace(TINY, temporal_attention=False)
MS = replace(IMAGE, size_conditioning=True, base_size=4, space_scale=2.0)
LABELS = DiTConfig(hidden_size=48, depth=2, num_heads=4, num_classes=10)
FACTS = {
    "depth": 2,
    "num_heads": 4,
    "hidden_size": 48,
    "in_channels": 4,
    "out_channels": 8,
    "patch_size": (1, 2, 2),
    "sample_size": 8,
}
Model = STDiT | DiT
Config = STDiTConfig | DiTConfig


def make_model(cfg: Config = TINY, seed: int = 0) -> Any:
    """Return a model none of whose branches is silent."""
    torch.manual_seed(seed)
    model = family_of(cfg).network(cfg).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def image_layout(model: Model) -> dict[str, Tensor]:
    """As image models are published: no frame axis in the patch kernel, a position table."""
    weights = dict(model.state_dict())
    kernel = weights["x_embedder.proj.weight"].squeeze(2).contiguous()
    return weights | {"x_embedder.proj.weight": kernel, "pos_embed": torch.zeros(1, 16, 48)}


def video_layout(model: Model) -> dict[str, Tensor]:
    """As Open-Sora publishes: both position tables."""
    return dict(model.state_dict()) | {"pos_embed": torch.ones(1, 16, 48), "pos_embed_temporal": torch.ones(1, 4, 48)}


def open_sora_labels(model: Model) -> dict[str, Tensor]:
    tables = {"pos_embed_spatial": torch.zeros(1, 16, 48), "pos_embed_temporal": torch.zeros(1, 4, 48)}
    return dict(model.state_dict()) | tables


def assert_same_weights(model: Model, other: Model) -> None:
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def save_checkpoint(folder: Path, model: Model, ema: Model | None = None) -> Path:
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    if ema is not None:
        save_file(ema.state_dict(), folder / "ema.safetensors")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Families

EXAMPLES: dict[str, Any] = {
    "stdit2": STDiT2Config(hidden_size=48, depth=2, num_heads=4, caption_channels=16, model_max_length=10),
    "stdit3": STDiT3Config(hidden_size=48, depth=2, num_heads=4, caption_channels=16, model_max_length=10),
    "stdit": TINY,
    "pixart": IMAGE,
    "pixart-ms": MS,
    "dit": LABELS,
    "latte": replace(LABELS, factorised=True),
}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_familys_row_is_whole(family: Any) -> None:
    """A model of it is built, planned, described by its own weights, and takes them."""
    cfg = EXAMPLES[family.name]
    assert family_of(cfg) is family
    assert forward_products(cfg, Grid(frames=2, places=4)).forward_flops > 0
    weights = make_model(cfg).state_dict()
    model = empty_model(cfg)
    assert type(model) is family.network and load_model_weights(model, weights).loaded == tuple(weights)
    told = family.facts(weights)
    assert told and {key: getattr(cfg, key) for key in told} == told
    assert cfg.conditioning in ("t5", "clip", "class")


# ---------------------------------------------------------------------------------------------------------------------
# Layouts

LAYOUTS: dict[str, tuple[Config, Callable[[Any], Any], tuple[str, ...]]] = {
    "PixArt-alpha": (IMAGE, lambda m: {"state_dict": image_layout(m)}, ("pos_embed",)),
    "PixArt-alpha 1024-MS": (MS, lambda m: {"state_dict": image_layout(m), "epoch": 3}, ("pos_embed",)),
    "Open-Sora STDiT": (TINY, video_layout, ("pos_embed", "pos_embed_temporal")),
    "Open-Sora PixArt": (IMAGE, video_layout, ("pos_embed", "pos_embed_temporal")),
    "Open-Sora PixArt-MS": (MS, video_layout, ("pos_embed", "pos_embed_temporal")),
    "DiT": (LABELS, image_layout, ("pos_embed",)),
    "Latte": (
        replace(LABELS, factorised=True),
        lambda m: {"ema": image_layout(m) | {"temp_embed": torch.zeros(1, 4, 48)}, "model": {}},
        ("pos_embed", "temp_embed"),
    ),
    "Open-Sora DiT or Latte": (
        replace(LABELS, factorised=True),
        open_sora_labels,
        ("pos_embed_spatial", "pos_embed_temporal"),
    ),
}


@pytest.mark.parametrize("title", LAYOUTS)
@pytest.mark.parametrize("meta", [False, True], ids=["made", "meta"])
def test_published_pickles(tmp_path: Path, title: str, meta: bool) -> None:
    cfg, layout, tables = LAYOUTS[title]
    source = make_model(cfg)
    torch.save(layout(source), tmp_path / "a name that says nothing")
    with torch.device("meta" if meta else "cpu"):
        model = STDiT(cfg) if isinstance(cfg, STDiTConfig) else DiT(cfg)
    report = load_model_weights(model, tmp_path / "a name that says nothing")
    assert_same_weights(model, source)
    assert (report.layout, report.dropped, report.inserted) == (title, tables, ())
    assert set(report.loaded) == set(model.state_dict())
    assert report.num_parameters == sum(value.numel() for value in model.state_dict().values())
    assert report.dtype == "float32" and report.files == (str(tmp_path / "a name that says nothing"),)
    assert json.loads(json.dumps(asdict(report)))["layout"] == title
    assert f"{title} weights" in str(report) and "\n" not in str(report)


@pytest.mark.parametrize("wrapper", ["", "state_dict", "state_dict_ema", "ema", "model"])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_pickled_files_are_unwrapped(tmp_path: Path, wrapper: str, legacy: bool) -> None:
    source = make_model(IMAGE)
    weights = {f"module.{key}": value for key, value in image_layout(source).items()}
    content = {"epoch": 3, wrapper: weights} if wrapper else weights
    torch.save(content, tmp_path / "image.pth", _use_new_zipfile_serialization=not legacy)
    model = STDiT(IMAGE)
    report = load_model_weights(model, tmp_path / "image.pth")
    assert_same_weights(model, source)
    assert report.dropped == ("pos_embed",) and report.wrapper == wrapper


def test_averaged_weights_are_preferred_where_both_are_wrapped(tmp_path: Path) -> None:
    trained, average = make_model(IMAGE), make_model(IMAGE, seed=1)
    torch.save({"state_dict": image_layout(trained), "state_dict_ema": image_layout(average)}, tmp_path / "both.pth")
    for ema, expected in ((True, average), (False, trained)):
        model = STDiT(IMAGE)
        load_model_weights(model, tmp_path / "both.pth", ema=ema)
        assert_same_weights(model, expected)


def write_shards(folder: Path, weights: dict[str, Tensor], kind: str) -> None:
    """Three shards and their index, as ColossalAI and transformers name them."""
    folder.mkdir(parents=True)
    keys = sorted(weights)
    stem, suffix = ("pytorch_model", "bin") if kind == "bin" else ("model", "safetensors")
    index = {}
    for number in range(3):
        part = {key: weights[key] for key in keys[number::3]}
        name = f"{stem}-{number + 1:05d}.{suffix}"
        torch.save(part, folder / name) if kind == "bin" else save_file(part, folder / name)
        index |= dict.fromkeys(part, name)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def test_open_sora_training_folder(tmp_path: Path) -> None:
    trained, average, older = (make_model(seed=seed) for seed in range(3))
    write_shards(tmp_path / "run/epoch0-global_step2000/model", video_layout(older), "bin")
    step = tmp_path / "run/epoch1-global_step1000"
    write_shards(step / "model", video_layout(trained), "bin")
    (step / "running_states.json").write_text(json.dumps({"epoch": 1, "step": 0}))
    without_caption = {key: value for key, value in average.state_dict().items() if "y_embedding" not in key}
    torch.save(without_caption, step / "ema.pt")
    average.y_embedder.y_embedding.copy_(trained.y_embedder.y_embedding)  # a buffer: the average does not have it
    for source in (step, tmp_path / "run"):
        for ema, expected in ((True, average), (False, trained)):
            model = STDiT(TINY)
            report = load_model_weights(model, source, ema=ema)
            assert_same_weights(model, expected)
            assert report.layout == "Open-Sora STDiT"
    assert report.container == "3 shards, torch" and len(report.files) == 4


def test_sharded_safetensors_and_a_missing_shard(tmp_path: Path) -> None:
    source = make_model()
    write_shards(tmp_path / "model", dict(source.state_dict()), "safetensors")
    model = STDiT(TINY)
    load_model_weights(model, tmp_path / "model")
    assert_same_weights(model, source)
    (tmp_path / "model/model-00002.safetensors").unlink()
    check_error(tmp_path / "model", "the shard model-00002.safetensors is missing")
    index = tmp_path / "model/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../secret"}}))
    check_error(index, "names '../../secret', expected files of its own folder")
    index.write_text("[]")
    check_error(index, "not an index of shards")


@pytest.mark.parametrize("cfg", [IMAGE, MS], ids=["pixart", "pixart-ms"])
@pytest.mark.parametrize("pipeline", [False, True], ids=["model", "pipeline"])
def test_diffusers_pixart_folder(tmp_path: Path, cfg: STDiTConfig, pipeline: bool) -> None:
    source = make_model(cfg)
    folder = tmp_path / "transformer" if pipeline else tmp_path
    folder.mkdir(exist_ok=True)
    config = pixart_diffusers_config(cfg, 8)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {key: value.clone() for key, value in pixart_to_diffusers(source.state_dict()).items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    model = STDiT(cfg)
    report = load_model_weights(model, tmp_path)
    assert report.layout.startswith("diffusers PixArt") and report.lacks_null_caption
    assert report.inserted == ("y_embedder.y_embedding",) and not model.y_embedder.y_embedding.any()
    source.y_embedder.y_embedding.zero_()
    assert_same_weights(model, source)

    save_file({"y_embedder.y_embedding": torch.ones(10, 16)}, folder / NULL_CAPTION_FILE)
    report = load_model_weights(model, tmp_path)
    assert not report.inserted and model.y_embedder.y_embedding.eq(1).all()
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 6, "attention_head_dim": 8}))
    with pytest.raises(WeightsError, match=r"made with 6 attention heads, the model has 4: set model\.num_heads=6"):
        load_model_weights(model, tmp_path)


def test_diffusers_dit_folder(tmp_path: Path) -> None:
    source = make_model(LABELS)
    (tmp_path / "config.json").write_text(json.dumps(dit_diffusers_config(LABELS, 8)))
    tensors = {key: value.clone() for key, value in dit_to_diffusers(source.state_dict()).items()}
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    model = DiT(LABELS)
    report = load_model_weights(model, tmp_path)
    assert_same_weights(model, source)
    assert report.layout == "diffusers DiT" and not report.inserted


def test_checkpoints_and_runs(tmp_path: Path) -> None:
    old, new, average = (make_model(seed=seed) for seed in range(3))
    save_checkpoint(tmp_path / "run/checkpoints/step-00000900", old)
    newest = save_checkpoint(tmp_path / "run/checkpoints/step-00001000", new, average)
    (tmp_path / "run/checkpoints/step-00002000").mkdir()  # nothing in it: was never finished
    for source in (newest, tmp_path / "run"):
        for ema, expected in ((True, average), (False, new)):
            model = STDiT(TINY)
            report = load_model_weights(model, source, ema=ema)
            assert_same_weights(model, expected)
            assert not report.inserted and not report.dropped and len(report.loaded) == len(model.state_dict())
    assert find_weights(tmp_path / "run/checkpoints/step-00000900").name == "model.safetensors"
    assert find_weights(newest / "ema.safetensors") == newest / "ema.safetensors"


def test_half_precision_files(tmp_path: Path) -> None:
    source = make_model()
    save_file({key: value.half() for key, value in source.state_dict().items()}, tmp_path / "half.safetensors")
    model = STDiT(TINY)
    report = load_model_weights(model, tmp_path / "half.safetensors")
    assert model.x_embedder.proj.weight.dtype == torch.float32 and report.dtype == "float16"
    torch.testing.assert_close(model.state_dict(), source.half().float().state_dict())


# ---------------------------------------------------------------------------------------------------------------------
# Insertion and positions


@pytest.mark.parametrize("meta", [False, True], ids=["made", "meta"])
def test_insertion_silences_temporal_attention(meta: bool) -> None:
    model = make_model()
    if meta:
        with torch.device("meta"):
            model = STDiT(TINY)
    report = load_model_weights(model, make_model(IMAGE, seed=3).state_dict())
    expected = [key for key in model.state_dict() if ".attn_temp." in key]
    assert list(report.inserted) == expected and report.inserted_temporal_attention
    assert not any(value.any() for key, value in model.state_dict().items() if ".attn_temp.proj." in key)
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_inserted_attention_is_drawn_from_the_seed_as_in_a_new_model() -> None:
    drawn, weights = [], make_model(IMAGE).state_dict()
    for seed in (1, 1, 2):
        with torch.device("meta"):
            model = STDiT(TINY)
        torch.manual_seed(seed)
        load_model_weights(model, weights)
        drawn.append(model.blocks[1].attn_temp.qkv.weight.detach().clone())
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    limit = (6 / (48 + 3 * 48)) ** 0.5
    assert 0.98 * limit < drawn[0].abs().max() <= limit  # Xavier's uniform distribution


def test_xavier_draw() -> None:
    weight = torch.empty(301, 1001)  # an odd number of elements, more than one part
    draw_xavier_uniform(weight, (1, 2))
    limit = (6 / (301 + 1001)) ** 0.5
    shares = torch.histc(weight, bins=20, min=-limit, max=limit) / weight.numel()
    assert weight.abs().max() <= limit and shares.sum() == pytest.approx(1)
    assert (20 * shares - 1).abs().max() < 0.05  # flat
    neighbours = torch.corrcoef(torch.stack([weight.flatten()[:-1], weight.flatten()[1:]]))
    assert abs(neighbours[0, 1].item()) < 0.01
    again, other = torch.empty_like(weight), torch.empty_like(weight)
    draw_xavier_uniform(again, (1, 2))
    draw_xavier_uniform(other, (1, 3))
    assert torch.equal(again, weight) and not torch.equal(other, weight)


def test_positions_follow_the_config_and_the_report_says_so(tmp_path: Path) -> None:
    table = spatial_positions(48, 8, 8).float()[None]
    torch.save({"state_dict": image_layout(make_model(IMAGE)) | {"pos_embed": table}}, tmp_path / "image.pth")
    model = STDiT(replace(IMAGE, space_scale=0.5))
    report = load_model_weights(model, tmp_path / "image.pth")
    assert report.positions == "positions are index / 0.5 (model.space_scale), in the file index / 1 at 8x8 places"
    assert report.positions in str(report)
    scaled = STDiT(replace(IMAGE, space_scale=0.5))
    scaled.load_state_dict(make_model(IMAGE).state_dict())
    latents, text = torch.randn(1, 4, 1, 8, 8), torch.randn(1, 10, 16)
    with torch.no_grad():
        out, expected = (net.eval()(latents, torch.tensor([5.0]), text) for net in (model, scaled))
    assert torch.equal(out, expected)  # whatever the table in the file


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def check_error(source: object, message: str, cfg: Config = TINY) -> str:
    model = make_model(cfg)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match=message) as error:
        load_model_weights(model, source)  # type: ignore[arg-type]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} was changed by a load that failed"
    assert "\n" not in str(error.value)
    return str(error.value)


class Trap:
    """Unpickling this would create a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_pickled_code_is_never_run(tmp_path: Path, legacy: bool) -> None:
    trap = {"state_dict": image_layout(make_model(IMAGE)), "extra": Trap(str(tmp_path / "created"))}
    torch.save(trap, tmp_path / "evil.pth", _use_new_zipfile_serialization=not legacy)
    message = check_error(tmp_path / "evil.pth", "refused: this pickle asks for", cfg=IMAGE)
    assert "open" in message and "expected only tensors and plain containers" in message
    assert not (tmp_path / "created").exists()


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    check_error(tmp_path / "absent.pth", "no such weights file, checkpoint or run")
    check_error(tmp_path, "no weights in this folder: expected a run")
    contents = {
        b"": "is empty: fetch it again",
        b"no weights": "is neither a torch nor a safetensors file",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n": "is a Git LFS pointer",
        b"<!DOCTYPE html>\n<html><body>404</body></html>": "is a web page, not weights",
    }
    for name in ("file.safetensors", "file.pth"):
        for content, message in contents.items():
            (tmp_path / name).write_bytes(content)
            check_error(tmp_path / name, f"{name}: {message}")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    check_error(tmp_path / "list.pth", "holds a list, expected tensors by name")
    torch.save({"epoch": 3}, tmp_path / "numbers.pth")
    check_error(tmp_path / "numbers.pth", "expected tensors by name, found 'epoch'")
    check_error({}, "expected tensors by name, found nothing")
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "resnet.pth")
    check_error(tmp_path / "resnet.pth", r"not PixArt, STDiT, DiT or Latte weights \(its first keys: conv1\.weight\)")
    for key in ("vae.encoder.conv_in.weight", "spatial_vae.module.encoder.conv_in.bias", "encoder.conv_in.conv.weight"):
        torch.save({key: torch.zeros(3)}, tmp_path / "vae.pth")
        check_error(tmp_path / "vae.pth", "vae.pth: an autoencoder's weights, which vae.path takes as a folder")
    torch.save({"encoder.block.0.layer.0.SelfAttention.k.weight": torch.zeros(3)}, tmp_path / "t5.pth")
    check_error(tmp_path / "t5.pth", "t5.pth: a T5 encoder's weights, which text.path takes as a folder")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKLWan"}')
    save_file({"encoder.conv_in.weight": torch.zeros(3)}, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    check_error(tmp_path / "vae", "describes AutoencoderKLWan, neither PixArt nor DiT: vae.path takes it")


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_file_that_was_cut_off(tmp_path: Path, kind: str, share: float) -> None:
    path = tmp_path / "cut"
    weights = dict(make_model().state_dict())
    if kind == "safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=kind == "zip")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    check_error(path, "cut: damaged")


def test_weights_of_another_model_are_refused_with_the_keys_to_change() -> None:
    wider = STDiT(replace(TINY, hidden_size=60, caption_channels=24, pred_sigma=False))
    message = check_error(wider.state_dict(), "shapes differ")
    expected = "the weights were made with model.hidden_size=60, model.pred_sigma=false, model.caption_channels=24"
    assert message.endswith(expected)

    message = check_error(make_model(replace(TINY, depth=3)).state_dict(), "19 are unknown")
    assert message.endswith("model.depth=3")
    message = check_error(
        make_model().state_dict(), r"8 are unknown \(first blocks\.0\.attn_temp\.qkv\.weight, ", IMAGE
    )
    assert message.endswith("model.temporal_attention=true")
    longer = make_model(replace(TINY, model_max_length=30)).state_dict()
    message = check_error(longer, r"1 shapes differ \(first y_embedder\.y_embedding: \[30, 16\] there, \[10, 16\] in")
    assert message.endswith("; the weights were made with model.model_max_length=30")
    message = check_error(make_model(MS).state_dict(), "are unknown", IMAGE)
    assert message.endswith("model.size_conditioning=true")
    message = check_error(make_model(IMAGE).state_dict(), r"8 are missing \(first csize_embedder\.mlp\.0\.weight", MS)
    assert message.endswith("model.size_conditioning=false")
    check_error(make_model(MS).state_dict(), "8 are unknown", TINY)  # size conditioning has no place in a video model


def test_weights_of_another_family_are_refused() -> None:
    check_error(make_model(LABELS).state_dict(), r"DiT or Latte weights, .*fit no stdit model")
    check_error(make_model().state_dict(), r"Open-Sora STDiT weights, .*fit no dit model", LABELS)
    latte = image_layout(make_model(replace(LABELS, factorised=True))) | {"temp_embed": torch.zeros(1, 4, 48)}
    check_error(latte, r"100\.0 % of the model's 31 tensors found; they are a latte model's, this is a dit", LABELS)


def test_one_wrong_key_or_tensor_is_named() -> None:
    weights = make_model().state_dict()
    total = len(weights)
    partly = dict(weights)
    del partly["blocks.1.attn_temp.qkv.bias"]
    check_error(partly, r"1 are missing \(first blocks\.1\.attn_temp\.qkv\.bias\)")
    renamed = {key.replace("blocks.1.mlp.fc1.b", "blocks.1.mlp.first.b"): value for key, value in weights.items()}
    message = check_error(
        renamed, r"1 are missing \(first blocks\.1\.mlp\.fc1\.bias\); 1 are unknown \(first blocks\.1"
    )
    assert f"{100 * (total - 1) / total:.1f} % of the model's {total} tensors found" in message
    transposed = dict(weights) | {"blocks.0.mlp.fc1.weight": weights["blocks.0.mlp.fc1.weight"].T.contiguous()}
    check_error(
        transposed, r"first blocks\.0\.mlp\.fc1\.weight: \[48, 192\] there, \[192, 48\] in the model, transposed"
    )
    half_image = {key: value for key, value in weights.items() if not key.startswith("blocks.0.attn_temp.")}
    check_error(half_image, "4 are missing")  # the image model's list is all of temporal attention, or none
