"""The planner's memory of sampling against tensors counted on a CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from opensora_repro.config import Config, DataConfig, SampleConfig, TrainConfig
from opensora_repro.diffusion.samplers import LatentSampler
from opensora_repro.models.config import DiTConfig, STDiTConfig
from opensora_repro.models.dit import DiT
from opensora_repro.models.stdit import STDiT
from opensora_repro.planning.sampling import SamplingMemory, sampling_memory
from tests.live_bytes import LiveBytes

STDIT = STDiTConfig(hidden_size=192, depth=2, num_heads=4, caption_channels=64, model_max_length=20)
LATTE = DiTConfig(hidden_size=192, depth=2, num_heads=4, num_classes=10, factorised=True)
SHAPE = (4, 8, 32, 32)  # of a sample's latents
BATCH = 2


def planned(cfg: Config, model: STDiTConfig | DiTConfig, parameters: int, *, reads_t5: bool = False) -> SamplingMemory:
    return sampling_memory(cfg, model, parameters, batch_size=BATCH, device_type="cpu", reads_t5=reads_t5)


def config(dtype: str = "fp32", guidance: float = 4.0) -> Config:
    sample = SampleConfig(guidance=guidance, sampler="dpm", steps=2)
    return Config(data=DataConfig(num_frames=8, height=256, width=256), sample=sample, train=TrainConfig(dtype=dtype))


@pytest.mark.parametrize("model", [STDIT, LATTE], ids=["stdit", "latte"])
@pytest.mark.parametrize(("dtype", "guidance"), [("fp32", 1.0), ("fp32", 4.0), ("bf16", 4.0)])
def test_a_denoising_step(model: STDiTConfig | DiTConfig, dtype: str, guidance: float) -> None:
    cfg = config(dtype, guidance)
    if isinstance(model, STDiTConfig):
        network: STDiT | DiT = STDiT(model).eval()
        condition, mask = torch.randn(BATCH, 20, 64), torch.ones(BATCH, 20, dtype=torch.bool)
    else:
        network, condition, mask = DiT(model).eval(), torch.tensor([1, 2]), None
    with LiveBytes() as live, torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        LatentSampler(
            cfg.diffusion,
            "dpm",
            steps=2,
            guidance=guidance,
            prepare_text=network.prepare_text if isinstance(network, STDiT) else None,
        )(
            network,
            condition,
            mask,
            network.null_condition(),
            shape=SHAPE,
            generators=[torch.Generator().manual_seed(i) for i in range(BATCH)],
        )
    parameters = sum(value.numel() for value in network.parameters())
    found = planned(cfg, model, parameters).denoising
    assert 0.75 * live.peak < found < 1.05 * live.peak  # no less than that is needed, hardly more


def test_what_grows_with_what() -> None:
    cfg = config()
    small = planned(cfg, STDIT, 1_000_000)
    assert small.weights == 4e6 and small.peak == small.weights + small.frozen + max(small.denoising, small.decoding)
    longer = planned(replace(cfg, data=replace(cfg.data, num_frames=16)), STDIT, 1_000_000)
    assert longer.denoising == pytest.approx(2 * small.denoising, rel=0.01) and longer.decoding > small.decoding
    assert planned(config(guidance=1.0), STDIT, 1_000_000).denoising == pytest.approx(small.denoising / 2, rel=0.01)
    with_t5 = planned(cfg, STDIT, 1_000_000, reads_t5=True)
    assert with_t5.frozen - small.frozen == pytest.approx(4 * 4.76e9, rel=0.01)  # the XXL encoder in float32
