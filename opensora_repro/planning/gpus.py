"""What GPUs can do, from their makers' data sheets."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from opensora_repro.config import ConfigError

GIB = 2**30
RESERVED_SHARE, RESERVED_BYTES = 0.05, GIB  # fragments; the driver, libraries' workspaces, exchange buffers


@dataclass(frozen=True)
class Gpu:
    """Peaks are of dense matrices: sheets that tell sparse ones are halved."""

    name: str
    memory_gib: float
    half_tflops: float  # bfloat16, summed in float32; float16 where there is no bfloat16
    float_tflops: float  # float32 without tensor cores
    bfloat16: bool = True

    def peak(self, dtype: str) -> float:
        """FLOPs a second in the config's `train.dtype`. Raises ConfigError where it has no such arithmetic."""
        if dtype == "bf16" and not self.bfloat16:
            raise ConfigError(f"--gpu {self.name}: it has no bfloat16 arithmetic; plan with train.dtype=fp32")
        return 1e12 * (self.half_tflops if dtype == "bf16" else self.float_tflops)

    @property
    def usable_bytes(self) -> float:
        """What is left for tensors."""
        return usable_bytes(self.memory_gib * GIB)


def usable_bytes(total: float) -> float:
    """What is left for tensors of a GPU's memory."""
    return (1 - RESERVED_SHARE) * total - RESERVED_BYTES


GPUS = (
    Gpu("B200", 180, 2250, 75),
    Gpu("H200", 141, 989, 67),
    Gpu("H100", 80, 989, 67),  # SXM
    Gpu("H100-PCIe", 80, 756, 51),
    Gpu("H100-NVL", 94, 835, 60),
    Gpu("H800", 80, 989, 67),
    Gpu("H20", 96, 148, 44),
    Gpu("A100-80GB", 80, 312, 19.5),  # SXM
    Gpu("A100-40GB", 40, 312, 19.5),
    Gpu("A800", 80, 312, 19.5),
    Gpu("A40", 48, 149.7, 37.4),
    Gpu("A30", 24, 165, 10.3),
    Gpu("A10", 24, 125, 31.2),
    Gpu("L40S", 48, 362, 91.6),
    Gpu("L40", 48, 181, 90.5),
    Gpu("L4", 24, 121, 30.3),
    Gpu("RTX-5090", 32, 209.5, 104.8),
    Gpu("RTX-4090", 24, 165.2, 82.6),
    Gpu("RTX-4080", 16, 97.5, 48.7),
    Gpu("RTX-4060", 8, 30.2, 15.1),
    Gpu("RTX-3090", 24, 71, 35.6),
    Gpu("RTX-3060", 12, 25.5, 12.7),
    Gpu("V100-32GB", 32, 125, 15.7, bfloat16=False),  # SXM2
    Gpu("V100-16GB", 16, 125, 15.7, bfloat16=False),
    Gpu("T4", 16, 65, 8.1, bfloat16=False),
)
# Short names for what has several
DEFAULT_VARIANT = {"a100": "a10080gb", "v100": "v10032gb", "h100sxm": "h100", "h200sxm": "h200", "h800sxm": "h800"}


def find_gpu(name: str) -> Gpu:
    """The GPU of that name, however it is spelt (H100, a100-40gb, "RTX 4090", 4090). Raises ConfigError."""
    known = {}
    for gpu in GPUS:
        known[_plain(gpu.name)] = gpu
        known[_plain(gpu.name).removeprefix("rtx")] = gpu
    plain = _plain(name)
    found = known.get(DEFAULT_VARIANT.get(plain, plain))
    if found is None:
        nearest = known[difflib.get_close_matches(plain, list(known), n=1, cutoff=0.0)[0]].name
        names = ", ".join(gpu.name for gpu in GPUS)
        raise ConfigError(f"--gpu {name!r} is not in the table; did you mean {nearest}? Known are {names}")
    return found


def gpu_of_device(name: str) -> Gpu | None:
    """The table's GPU that calls itself so ("NVIDIA A100-SXM4-40GB"); None for another device, a part of one too."""
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    if words & {"mig", "laptop", "ti", "super"}:
        return None
    known = [(gpu, set(gpu.name.lower().split("-"))) for gpu in GPUS]
    found = [(len(own), gpu) for gpu, own in known if own <= words]
    return max(found, key=lambda match: match[0])[1] if found else None


def _plain(name: str) -> str:
    """Letters and digits alone, without the maker's words."""
    plain = "".join(character for character in name.lower() if character.isalnum())
    return plain.removeprefix("nvidia").removeprefix("geforce").removeprefix("tesla")
