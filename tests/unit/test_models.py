"""What the models promise beyond the published code: sizes at call time, masks, memory, precision."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from opensora_repro.models import layers
from opensora_repro.models.config import STDiTConfig
from opensora_repro.models.cross_attention import CrossAttention, lay_out
from opensora_repro.models.stdit import POSITION_TABLES, STDiT
from opensora_repro.weights.load import load_model_weights
from tests.live_bytes import LiveBytes

TINY = STDiTConfig(hidden_size=48, depth=2, num_heads=4, caption_channels=16, model_max_length=10)
IMAGE = replace(TINY, temporal_attention=False)


def make_model(cfg: STDiTConfig = TINY, seed: int = 0) -> STDiT:
    """Return a model none of whose branches is silent."""
    torch.manual_seed(seed)
    model = STDiT(cfg).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def make_inputs(batch: int = 2, size: tuple[int, int, int] = (3, 6, 8), seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return latents, timesteps and text for TINY."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 4, *size, generator=generator)
    timestep = torch.rand(batch, generator=generator) * 1000
    return latents, timestep, torch.randn(batch, 10, 16, generator=generator)


def prefix_mask(*lengths: int) -> Tensor:
    return torch.arange(10) < torch.tensor(lengths)[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# Temporal attention


def test_silent_temporal_attention_is_the_image_model_frame_by_frame() -> None:
    image_model = make_model(IMAGE)
    video_model = STDiT(TINY)
    report = load_model_weights(video_model, image_model.state_dict())
    assert len(report.inserted) == 4 * TINY.depth
    latents, timestep, text = make_inputs(size=(3, 8, 8))
    mask = prefix_mask(4, 10)
    with torch.no_grad():
        video = video_model(latents, timestep, text, mask)
        for frame in range(3):
            image = image_model(latents[:, :, frame : frame + 1], timestep, text, mask)
            torch.testing.assert_close(video[:, :, frame : frame + 1], image, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cfg", [TINY, IMAGE], ids=["stdit", "pixart"])
def test_frames_see_each_other(cfg: STDiTConfig) -> None:
    model = make_model(cfg)
    latents, timestep, text = make_inputs(1)
    changed = latents.clone()
    changed[:, :, 2] += 1
    with torch.no_grad():
        difference = (model(changed, timestep, text) - model(latents, timestep, text)).abs()
    assert difference[:, :, 0].max().item() > 1e-4


def test_the_order_of_frames_matters_only_to_the_video_model() -> None:
    latents, timestep, text = make_inputs(1)
    for cfg, same in ((TINY, False), (IMAGE, True), (replace(IMAGE, no_temporal_pos_emb=False), False)):
        model = make_model(cfg)
        with torch.no_grad():
            turned = model(latents.flip(2), timestep, text).flip(2)
            assert torch.allclose(turned, model(latents, timestep, text), atol=1e-5) == same, cfg


@pytest.mark.parametrize("pixart", [False, True], ids=["stdit", "pixart"])
@pytest.mark.parametrize("patch_frames", [1, 2])
def test_frames_of_a_longer_video_keep_its_positions(pixart: bool, patch_frames: int) -> None:
    """A part of a video, told where it begins, is given the very rows of the whole video's temporal table."""
    cfg = replace(TINY, patch_size=(patch_frames, 2, 2), time_scale=1.5)
    if pixart:
        cfg = replace(cfg, temporal_attention=False, no_temporal_pos_emb=False)
    model = make_model(cfg)
    latents, timestep, text = make_inputs(size=(4 * patch_frames, 6, 8))
    part = latents[:, :, 2 * patch_frames :]
    seen: list[Tensor] = []  # the table where it comes separately, else the tokens it was added to
    model.blocks[0].register_forward_hook(lambda _module, inputs, _out: seen.append(inputs[0] if pixart else inputs[4]))
    with torch.no_grad():
        model(latents, timestep, text)
        model(part, timestep, text, first_frame=2 * patch_frames)
        model(part, timestep, text)
    whole = seen[0][:, 2:] if pixart else seen[0][2:]
    torch.testing.assert_close(seen[1], whole, rtol=0, atol=1e-6 if pixart else 0)
    assert not torch.allclose(seen[2], whole, atol=1e-3)


def test_first_frame_is_a_whole_number_of_patches() -> None:
    model = make_model(replace(TINY, patch_size=(2, 2, 2)))
    for wrong in (1, -2):
        with pytest.raises(ValueError, match=f"first_frame={wrong} must be a multiple of patch_size"):
            model(*make_inputs(), first_frame=wrong)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


@pytest.mark.parametrize("cfg", [TINY, IMAGE, replace(TINY, patch_size=(2, 2, 2))], ids=["stdit", "pixart", "patch222"])
def test_odd_sizes_are_padded_with_zeros_and_cropped(cfg: STDiTConfig) -> None:
    model = make_model(cfg)
    latents, timestep, text = make_inputs(size=(3, 5, 7))
    frames = 3 + 3 % cfg.patch_size[0]
    padded = torch.zeros(2, 4, frames, 6, 8)
    padded[:, :, :3, :5, :7] = latents
    with torch.no_grad():
        out = model(latents, timestep, text)
        assert out.shape == (2, 8, 3, 5, 7)
        assert torch.equal(out, model(padded, timestep, text)[:, :, :3, :5, :7])


@pytest.mark.parametrize("cfg", [TINY, IMAGE], ids=["stdit", "pixart"])
def test_sizes_at_call_time(cfg: STDiTConfig) -> None:
    """A model that has seen other sizes gives what a fresh one gives."""
    used, text_mask = make_model(cfg), prefix_mask(3, 9)
    fresh = STDiT(cfg)
    fresh.load_state_dict(used.state_dict())
    layers.spatial_table.cache_clear()
    layers.temporal_table.cache_clear()
    sizes = [(3, 6, 8), (1, 4, 4), (5, 8, 6), (3, 6, 8)]
    with torch.no_grad():
        outputs = [used(*make_inputs(size=size), text_mask) for size in sizes]
        layers.spatial_table.cache_clear()
        layers.temporal_table.cache_clear()
        assert torch.equal(fresh(*make_inputs(size=sizes[2]), text_mask), outputs[2])
    assert torch.equal(outputs[0], outputs[3])


def test_scales_stretch_the_positions() -> None:
    """Twice the rows and frames at half the step pass through the same places."""
    fine = layers.spatial_positions(48, 8, 12, scale=2.0).view(8, 12, 48)
    coarse = layers.spatial_positions(48, 4, 6).view(4, 6, 48)
    torch.testing.assert_close(fine[::2, ::2], coarse)
    torch.testing.assert_close(layers.temporal_positions(48, 12, scale=2.0)[::2], layers.temporal_positions(48, 6))
    latents, timestep, text = make_inputs()
    plain = make_model()
    for change in ({"space_scale": 2.0}, {"time_scale": 2.0}):
        scaled = STDiT(replace(TINY, **change)).eval()
        scaled.load_state_dict(plain.state_dict())
        with torch.no_grad():
            assert not torch.allclose(scaled(latents, timestep, text), plain(latents, timestep, text), atol=1e-3)


def test_tables_made_while_sampling_serve_training() -> None:
    layers.spatial_table.cache_clear()
    layers.temporal_table.cache_clear()
    layers._timestep_frequencies.cache_clear()
    model, inputs = make_model(), make_inputs()
    with torch.inference_mode():
        model(*inputs)
    model(*inputs).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_position_tables_are_not_state() -> None:
    model = make_model()
    model(*make_inputs())
    assert not set(POSITION_TABLES) & set(model.state_dict())
    assert [name for name, _ in model.named_buffers()] == ["y_embedder.y_embedding"]
    # a released file, which carries them, still loads strictly
    tables = {"pos_embed": torch.zeros(1, 12, 48), "pos_embed_temporal": torch.zeros(1, 3, 48)}
    make_model(seed=2).load_state_dict(model.state_dict() | tables, strict=True)


# ---------------------------------------------------------------------------------------------------------------------
# Captions


def test_captions_of_different_length_equal_each_alone() -> None:
    model = make_model()
    latents, timestep, text = make_inputs(4)
    mask = torch.cat([prefix_mask(1, 10, 6), torch.tensor([[0, 1, 1, 0, 0, 1, 0, 0, 0, 1]]).bool()])
    with torch.no_grad():
        together = model(latents, timestep, text, mask)
        for i in range(4):
            alone = model(latents[i : i + 1], timestep[i : i + 1], text[i : i + 1, mask[i]])
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_masked_tokens_do_not_matter() -> None:
    model = make_model()
    latents, timestep, text = make_inputs()
    mask = prefix_mask(4, 7)
    garbage = torch.where(mask[..., None], text, 1e4)
    with torch.no_grad():
        assert torch.equal(model(latents, timestep, garbage, mask), model(latents, timestep, text, mask))


def test_a_mask_with_fewer_rows_is_repeated() -> None:
    model = make_model()
    inputs = make_inputs(4)
    with torch.no_grad():
        assert torch.equal(model(*inputs, prefix_mask(3, 8)), model(*inputs, prefix_mask(3, 8, 3, 8)))
        with pytest.raises(ValueError, match="mask of 3 rows cannot be repeated over 4 samples"):
            model(*inputs, prefix_mask(1, 2, 3))


@pytest.mark.parametrize("how", ["fp32", "bf16 weights", "autocast"])
def test_a_caption_without_tokens_attends_to_nothing(how: str) -> None:
    model = make_model()
    latents, timestep, text = make_inputs()
    mask = prefix_mask(0, 5)
    if how == "bf16 weights":
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        out = model(latents, timestep, text, mask)
        other = model(latents, timestep, torch.randn_like(text), mask)
    assert out.isfinite().all()
    assert torch.equal(out[0], other[0]) and not torch.equal(out[1], other[1])
    out.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_attending_to_nothing_adds_the_projections_bias() -> None:
    attention = CrossAttention(48, 4)
    nn.init.normal_(attention.proj.bias)
    captions = lay_out(prefix_mask(0, 0), 2, torch.device("cpu"))
    out = attention(torch.randn(2, 3, 4, 48), captions.take(torch.randn(2, 10, 48)), captions)
    assert torch.equal(out, attention.proj.bias.expand(2, 3, 4, 48))


def test_dropped_captions_keep_their_mask() -> None:
    model = make_model()
    latents, timestep, text = make_inputs(3)
    mask = prefix_mask(3, 6, 10)
    drop = torch.tensor([True, False, True])
    null = model.null_condition()
    assert null.shape == (10, 16)
    with torch.no_grad():
        dropped = model(latents, timestep, text, mask, drop_text=drop)
        replaced = model(latents, timestep, torch.where(drop[:, None, None], null, text), mask)
        kept = model(latents, timestep, text, mask)
    assert torch.equal(dropped, replaced)
    assert torch.equal(dropped[1], kept[1]) and not torch.equal(dropped[0], kept[0])
    # a shorter caption table is replaced by the head of the null caption
    short = model.y_embedder(text[:, :4], torch.tensor([True] * 3))
    assert torch.equal(short[0], model.y_embedder.y_proj(null[None])[0, :4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(2, 3, 1, 4, 4)}, r"expected latents \[B, 4, T, H, W\], got \[2, 3, 1, 4, 4\]"),
        ({"timestep": torch.zeros(1)}, r"one timestep a sample, \[2\], got \[1\]"),
        ({"text": torch.zeros(2, 10, 8)}, r"expected text \[2, L, 16\], got \[2, 10, 8\]"),
        ({"text": torch.zeros(2, 11, 16)}, "captions of 11 tokens exceed model.model_max_length=10"),
        ({"mask": torch.ones(2, 9)}, r"expected a caption mask \[B, 10\], got \[2, 9\]"),
    ],
)
def test_wrong_inputs_are_named(change: dict[str, Tensor], message: str) -> None:
    latents, timestep, text = make_inputs()
    inputs = {"latents": latents, "timestep": timestep, "text": text} | change
    with pytest.raises(ValueError, match=message):
        make_model()(**inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "model.num_heads=5 does not divide model.hidden_size=48"),
        ({"hidden_size": 50, "num_heads": 5}, "model.hidden_size=50 must be a multiple of 4"),
        ({"patch_size": (2, 2)}, "model.patch_size"),
        ({"space_scale": 0.0}, "model.space_scale"),
    ],
)
def test_wrong_configs_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        STDiT(replace(TINY, **change))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------------
# Memory and precision


def gradients_of(model: STDiT, autocast: bool) -> dict[str, Tensor | None]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(*make_inputs(size=(3, 12, 10)), prefix_mask(4, 9), drop_text=torch.tensor([True, False]))
    out.square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("offload", [False, True], ids=["", "offloaded"])
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_checkpointing_changes_nothing(autocast: bool, checkpointing: str, offload: bool) -> None:
    for cfg in (replace(TINY, depth=5), IMAGE):
        expected = gradients_of(make_model(cfg), autocast)
        model = make_model(cfg)
        model.activation_checkpointing, model.offload_activations = checkpointing, offload
        for name, gradient in gradients_of(model, autocast).items():
            assert torch.equal(gradient, expected[name]), name


def test_checkpointing_keeps_fewer_activations() -> None:
    """Offloaded inputs count as kept: here host memory is all there is."""

    def bytes_kept(checkpointing: str) -> int:
        model = make_model(replace(TINY, depth=6))
        model.activation_checkpointing = checkpointing
        with LiveBytes() as live:
            out = model(*make_inputs(size=(4, 16, 16)))
            gc.collect()
        assert out.requires_grad
        return live.now

    none, selective, full = map(bytes_kept, ("none", "selective", "full"))
    assert full < 0.15 * none
    assert 1.5 * full < selective < 0.4 * none


def test_selective_checkpointing_keeps_what_is_dear() -> None:
    """Of 64 tokens a frame and 3 frames: attention within frames and the MLP's second matrix; they run once alone."""
    model = make_model()
    counted: dict[str, dict[str, int]] = {}
    for checkpointing in ("none", "selective", "full"):
        model.activation_checkpointing = checkpointing
        with Operations() as operations:
            model(*make_inputs(size=(3, 16, 16))).sum().backward()
        counted[checkpointing] = operations.counts
    attention, matrix = "_scaled_dot_product_flash_attention_for_cpu", "192 -> 48"
    for again in (attention, matrix, "48 -> 192"):
        assert counted["full"][again] > counted["none"][again]
    assert counted["selective"][matrix] == counted["none"][matrix]
    assert counted["selective"]["48 -> 192"] == counted["full"]["48 -> 192"]
    # Of three attentions in each of two blocks, those over time and over captions run again.
    assert [counted[kind][attention] for kind in ("none", "selective", "full")] == [6, 10, 12]


class Operations(TorchDispatchMode):
    """Calls of attention by the operation's name, and of matrix products by their channels."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function.overloadpacket.__name__)
        if name == "addmm":
            self.counts[f"{args[1].shape[1]} -> {args[2].shape[1]}"] += 1
        self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def test_a_second_backward_pass_gives_the_same() -> None:
    """Over a graph that is kept; offloaded inputs come back twice."""
    model = make_model(replace(TINY, depth=4))
    model.activation_checkpointing, model.offload_activations = "full", True
    loss = model(*make_inputs()).square().sum()
    loss.backward(retain_graph=True)
    once = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[name])


@pytest.mark.parametrize("how", ["bf16 weights", "autocast"])
def test_timesteps_stay_float32(how: str) -> None:
    """In bf16 the timesteps 999 and 1000 are one number."""
    model = make_model()
    latents, _, text = make_inputs(1)
    if how == "bf16 weights":
        model.bfloat16()
    outputs = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        for timestep in (999, 999.0, 1000, 1000.0):
            outputs.append(model(latents, torch.tensor([timestep]), text))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[2], outputs[3])
    assert not torch.equal(outputs[1], outputs[2])
    assert outputs[0].dtype == torch.float32


def test_autocast_keeps_the_residual_stream_float32() -> None:
    model = make_model()
    seen: list[torch.dtype] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _inputs, out: seen.append(out.dtype))
    with torch.no_grad():
        exact = model(*make_inputs())
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(*make_inputs())
    assert seen == [torch.float32] * 4
    assert not torch.equal(rounded, exact)
    assert ((rounded - exact).norm() / exact.norm()).item() < 0.03


def test_samples_do_not_mix() -> None:
    for cfg in (TINY, IMAGE):
        model = make_model(cfg)
        latents, timestep, text = make_inputs(3)
        with torch.no_grad():
            out = model(latents, timestep, text)
            latents[1], text[2], timestep[2] = 5.0, -3.0, 7.0
            assert torch.equal(model(latents, timestep, text)[0], out[0])


def test_the_mlp_is_timms() -> None:
    """Written out because importing timm takes as long as importing torch."""
    from timm.layers import Mlp

    theirs = Mlp(6, 24, 10, act_layer=lambda: nn.GELU(approximate="tanh"))
    ours = layers.Mlp(6, 24, 10)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 5, 6)
    assert torch.equal(ours(x), theirs(x))


def test_tokens_and_patches_are_laid_out_row_by_row() -> None:
    """A patch embedding that copies its patch, unpatchified, is the identity."""
    patch = layers.PatchEmbed3D((2, 2, 2), 4, 32)
    with torch.no_grad():
        order = rearrange(torch.arange(32), "(c p q r) -> (p q r c)", c=4, p=2, q=2)
        patch.proj.weight.copy_(rearrange(torch.eye(32)[order], "d (c p q r) -> d c p q r", c=4, p=2, q=2))
        patch.proj.bias.zero_()
        latents = torch.randn(2, 4, 4, 6, 8)
        assert torch.equal(layers.unpatchify(patch(latents), (2, 2, 2), latents.shape[2:]), latents)


def test_a_model_without_values_gets_them_without_the_compiler(tmp_path):
    """What draws or makes room on the meta device imports it, which takes longer than reading a release's weights."""
    torch.save(STDiT(STDiTConfig(hidden_size=48, depth=1, num_heads=4)).state_dict(), tmp_path / "weights.pth")
    code = (
        "import sys, torch; from opensora_repro.models import stdit, stdit2, stdit3\n"
        "from opensora_repro.weights.load import load_model_weights\n"
        "with torch.device('meta'):\n"
        "    model = stdit.stdit_xl_2(hidden_size=48, depth=1, num_heads=4)\n"
        "    stdit2.stdit2_s_2(depth=1), stdit3.stdit3_s_2(depth=1)\n"
        "load_model_weights(model, sys.argv[1])\n"
        "print({'sympy', 'torch._dynamo'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "weights.pth")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "set()"
