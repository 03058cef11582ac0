"""Which GPUs there are for the workers, told without starting CUDA in the process that asks."""

from __future__ import annotations

import os

from opensora_repro.errors import DataError


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES takes."""
    from torch.cuda import device_count  # asks the driver, and starts nothing

    count = device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in given.split(",")][:count] if given else [str(number) for number in range(count)]


def usual_device(*, over_ray: bool) -> str:
    """Return the device where none was given: over Ray the nodes' GPUs are not known here."""
    return "cuda" if not over_ray and visible_gpus() else "cpu"


def check_device(device: str, workers: int, *, over_ray: bool) -> bool:
    """Return whether `workers` copies of a model on `device` have a GPU each: "cuda" means that. Raises DataError.

    A GPU that is named by its number is shared by all of them, other devices are tried.
    """
    import torch

    try:
        parsed = torch.device(device)
        if parsed.type != "cuda":
            torch.empty(1, device="cpu" if over_ray else parsed)
            return False
    except Exception as error:  # of torch's many classes
        raise DataError(f"--device {device}: {' '.join(str(error).split())[:200]}") from None
    if over_ray:
        if parsed.index is not None:
            raise DataError(f"--device {device}: over Ray each worker gets a GPU of its own; give --device cuda")
        return True
    count = len(visible_gpus())
    if (parsed.index or 0) >= count:
        raise DataError(f"--device {device}: {count or 'no'} GPU{'s' * (count > 1)} can be used here")
    if parsed.index is None and workers > count:
        raise DataError(
            f"--model-workers {workers}: more than the {count} GPU{'s' * (count > 1)} here, of which each gets one; "
            "--device cuda:0 lets all of them share the first"
        )
    return parsed.index is None
