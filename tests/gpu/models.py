"""GPU checks of the models: against themselves on the CPU and the published outputs; samplers and frozen encoders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.comparisons import Skip, relative_error, require, rms_error
from benchmarks.sides import random_weights

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from opensora_repro.models.stdit import STDiT

REPO = Path(__file__).resolve().parents[2]
FP32_TOLERANCE = 5e-5  # largest difference over largest value; float32 sums in another order
BF16_TOLERANCE = 3e-2  # root mean square of the difference over that of the values
GOLDEN_SLACK = 5  # times a case's own tolerance, which was set for one order of sums
GOLDEN_CASES = (
    "stdit_base", "stdit_T1", "stdit_nonsquare_scaled", "stdit_maskholes_patch222", "stdit_fractional_t_maskrepeat",
    "stdit_nomask", "stdit_nosigma", "pixart_image", "pixart_image_tpos", "pixart_video",
)  # fmt: skip


def small_model(temporal_attention: bool) -> STDiT:
    """A model of a few blocks with random weights, also where a new one has zeros."""
    import torch

    from opensora_repro.models.config import STDiTConfig
    from opensora_repro.models.stdit import STDiT

    torch.manual_seed(0)
    cfg = STDiTConfig(
        hidden_size=144, depth=4, num_heads=4, caption_channels=32, model_max_length=12,
        temporal_attention=temporal_attention,
    )  # fmt: skip
    return random_weights(STDiT(cfg))


def small_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents with an odd side, a fractional timestep, captions of different length."""
    import torch

    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(3, 4, 5, 9, 16, generator=generator),
        torch.tensor([999.0, 12.5, 505.0]),
        torch.randn(3, 12, 32, generator=generator),
        torch.arange(12)[None] < torch.tensor([[12], [1], [7]]),
    )


def outputs_and_gradients(model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    inputs = [value.to(device) for value in small_inputs()]
    model.zero_grad(set_to_none=True)
    out = model(*inputs)
    out.square().mean().backward()
    return {"output": out.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def parity(device: torch.device, temporal_attention: bool) -> dict[str, Any]:
    """float32 outputs and gradients, kept and recomputed, and bf16 autocast, against float32 on the CPU."""
    import torch

    model = small_model(temporal_attention)
    expected = outputs_and_gradients(model, torch.device("cpu"))
    model = model.to(device)
    errors: dict[str, Any] = {}
    for recompute in ("none", "selective", "full"):
        model.activation_checkpointing = recompute
        model.offload_activations = recompute == "full"
        found = outputs_and_gradients(model, device)
        assert found.keys() == expected.keys()
        worst = max(relative_error(found[name], expected[name]) for name in expected)
        errors[f"fp32, {recompute}"] = require(worst, FP32_TOLERANCE, "float32")
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        half = model(*[value.to(device) for value in small_inputs()])
    errors["bf16 rms"] = require(rms_error(half, expected["output"]), BF16_TOLERANCE, "bf16")
    return errors


def golden_folder() -> Path:
    folder = Path(os.environ.get("OPENSORA_GOLDEN") or REPO.parent / "shared" / "golden")
    if not folder.is_dir():
        raise Skip(f"no reference outputs at {folder} (set OPENSORA_GOLDEN)")
    return folder


def golden(device: torch.device) -> dict[str, Any]:
    """The published code's outputs, small cases, in float32."""
    import torch

    from tests.golden import build_model, load_case

    folder = golden_folder()
    errors = {}
    for name in GOLDEN_CASES:
        case = load_case(folder, name)
        model = build_model(case).to(device).eval()
        mask = case.tensors.get("in.mask")
        given = [case["in.x"], case["in.timestep"], case["in.y"][:, 0], mask]
        with torch.no_grad():
            out = model(*[None if value is None else value.to(device) for value in given])
        tolerance = GOLDEN_SLACK * case.info["tolerances"]["out_rel"]
        errors[name] = require(relative_error(out, case["out"]), tolerance, name)
    return errors


def golden_full_size(device: torch.device, name: str = "xl_stdit_16x32x32") -> dict[str, Any]:
    """STDiT-XL/2 with hashed weights against the published code's output, in float32 and bf16."""
    import torch

    from tests.golden import hashed_model, hashed_tensor, load_case, model_config

    case = load_case(golden_folder(), name)
    batch, size = len(case.info["caption_lens"]), case.info["config"]["input_size"]
    x = hashed_tensor(f"{name}.in.x", (batch, 4, *size)).to(device)
    text = hashed_tensor(f"{name}.in.y", (batch, 1, 120, 4096))[:, 0].to(device)
    mask, timestep = case["mask"].to(device), case["timestep"].to(device)
    model = hashed_model(model_config(case.info, temporal_attention=True)).to(device)
    with torch.no_grad():
        full = model(x, timestep, text, mask)
        with torch.autocast(device.type, torch.bfloat16):
            half = model(x, timestep, text, mask)
    tolerance = GOLDEN_SLACK * case.info["tolerances"]["fp32_out_rel"]
    return {
        "fp32": require(relative_error(full, case["out"]), tolerance, "float32"),
        "bf16 rms": require(rms_error(half, case["out"]), BF16_TOLERANCE, "bf16"),
    }


def samplers(device: torch.device) -> dict[str, Any]:
    """Each sampler's latents against the same on the CPU: noise comes from CPU generators, so they start alike."""
    import torch

    from opensora_repro.config import DiffusionConfig
    from opensora_repro.diffusion.samplers import LatentSampler

    model = small_model(temporal_attention=True).eval()
    _, _, text, mask = small_inputs()
    errors = {}
    for sampler in ("iddpm", "ddim", "dpm"):
        results = []
        for where in (torch.device("cpu"), device):
            model = model.to(where)
            with torch.no_grad():
                latents = LatentSampler(DiffusionConfig(), sampler, steps=5, guidance=4.0)(
                    model,
                    text.to(where),
                    mask.to(where),
                    model.null_condition(),
                    shape=(4, 3, 6, 6),
                    generators=[torch.Generator().manual_seed(i) for i in range(3)],
                )
            results.append(latents)
        errors[sampler] = require(relative_error(results[1], results[0]), 20 * FP32_TOLERANCE, sampler)
    return errors


def frozen_models(device: torch.device) -> dict[str, Any]:
    """The demo's autoencoder and text encoder, encoding and decoding as on the CPU."""
    import torch

    from opensora_repro.config import TextConfig, VaeConfig
    from opensora_repro.frozen.text import open_text_encoder
    from opensora_repro.frozen.vae import open_vae

    vae_folder, text_folder = REPO / "checkpoints" / "demo" / "vae", REPO / "checkpoints" / "demo" / "text"
    video = torch.rand(3, 5, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    captions = ["a red circle moving left", "", "a cyan triangle"]
    found: list[dict[str, Tensor]] = []
    for where in (torch.device("cpu"), device):
        vae = open_vae(VaeConfig(path=str(vae_folder), micro_batch_size=2), where, torch.float32)
        moments = vae.encode_moments(video.to(where))
        pixels = vae.decode(vae.sample_latents(moments, None)[None])
        text = open_text_encoder(TextConfig(path=str(text_folder)), 12, where, torch.float32)
        embedded, mask = text.encode(captions)
        streamed = open_text_encoder(TextConfig(path=str(text_folder), offload=True), 12, where, torch.float32)
        assert torch.equal(streamed.encode(captions)[0], embedded), "text.offload changes the embeddings"
        found.append({"moments": moments, "pixels": pixels, "text": embedded, "mask": mask.float()})
    on_cpu, on_gpu = found
    return {key: require(relative_error(on_gpu[key], on_cpu[key]), 10 * FP32_TOLERANCE, key) for key in on_cpu}
