"""The devices that processes compute on: all that is asked of CUDA itself."""

from __future__ import annotations

import torch

from opensora_repro.parallel.errors import EngineError


def default_kind() -> str:
    """ "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_device(wish: str | None, local_rank: int) -> torch.device:
    """The device torch calls `wish`; "cuda" is this process's GPU by its local rank, None a GPU where there is one.

    Raises EngineError where there is no such GPU.
    """
    device = torch.device(wish or default_kind())
    if device.type != "cuda":
        return device
    index, count = local_rank if device.index is None else device.index, torch.cuda.device_count()
    if index >= count:
        raise EngineError(
            f"process {local_rank} of this machine has no GPU {index} ({count} found): start torchrun with "
            f"--nproc-per-node={count}, or hide the GPUs with CUDA_VISIBLE_DEVICES= to run on CPUs"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def device_name(device: torch.device) -> str:
    """`cpu`, or `cuda:0 (NVIDIA H100)`."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def backend_of(device: torch.device) -> str:
    """The collectives' library for tensors on the device."""
    return "nccl" if device.type == "cuda" else "gloo"


def return_memory(device: torch.device) -> None:
    """Give freed memory back to the device, for others to take."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
