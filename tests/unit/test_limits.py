"""The measures that benchmarks are judged by: FLOPs, the limit of matrix products, memory, energy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import limits, resources
from opensora_repro.models.config import STDiTConfig

REPO = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def test_the_limit_is_that_of_the_fastest_product() -> None:
    works = {"slow": limits.Work(10**9, lambda: None), "fast": limits.Work(3 * 10**9, lambda: None)}
    limit = limits.matmul_limit(works, {"slow": [0.5, 0.1, 0.5], "fast": [1.0, 1.0, 0.3]})
    products = {"slow": 2.0, "fast": 3.0}
    assert limit == {"gflops": 3.0, "best_gflops": 10.0, "product": "fast", "rounds": 3, "products": products}
    share = limits.share_of_limit(6 * 10**9, [4.0, 9.0, 1.0], limit)
    assert share == {"gflops": 1.5, "share_of_limit": 0.5, "share_at_best": 0.6}


def test_products_are_the_layers_and_do_what_they_are_counted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(limits.SQUARE, "cpu", 16)
    monkeypatch.setitem(limits.AT_LEAST, "cpu", 0.001)
    cfg = STDiTConfig(hidden_size=24, num_heads=2)
    shapes = limits.layer_shapes(cfg, 40)
    assert shapes == [(40, 24, 72), (40, 24, 24), (40, 24, 96), (40, 96, 24)]
    works = limits.matmuls(shapes, torch.float32, CPU)
    assert len(works) == 3 * (len(shapes) + 1)
    for work in works.values():
        assert limits.counted_flops(work.call) == work.flops > 0
    limit = limits.measure_matmul_limit(shapes, torch.float32, CPU, seconds=0.1)
    assert limit["gflops"] == max(limit["products"].values()) > 0


@pytest.mark.parametrize(
    ("driver", "sheet"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("Tesla V100-SXM2-32GB", "V100-32GB"),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_drivers_names_lead_to_data_sheets(driver: str, sheet: str | None) -> None:
    found = limits.data_sheet(driver)
    assert (found and found.name) == sheet


def test_energy_is_power_over_time() -> None:
    assert resources.mean_power([(0.0, 100.0), (1.0, 300.0), (3.0, 300.0)]) == pytest.approx(800 / 3)
    assert resources.energy(lambda: None, CPU) is None


def test_memory_is_the_largest_so_far() -> None:
    code = (
        "from opensora_repro.process import peak_memory\n"
        "before = peak_memory(); block = bytearray(b'x') * (64 << 20); del block\n"
        "print(peak_memory() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert 60 << 20 < int(done.stdout) < 100 << 20
