"""Whether a run compiles its blocks: `train.compile`."""

from __future__ import annotations

from opensora_repro.config import Config
from opensora_repro.kernels.choice import missing_triton
from opensora_repro.models.stdit import STDiT


def compiles(cfg: Config, device_type: str) -> bool:
    """ "auto" does on CUDA devices where Triton imports, unless a layout alters the blocks.

    On a CPU compiled blocks were as fast as the others, and each run would wait half a minute for them.
    """
    if cfg.train.compile != "auto":
        return cfg.train.compile == "on"
    parallel = cfg.parallel
    whole = parallel.plugin != "gemini" and parallel.tp_size == parallel.sp_size == 1
    return device_type == "cuda" and whole and not missing_triton()


# Programs of a block that a run may need: for one sample or several, captions of one length or not, one of them empty
# or none, each for a frame or several and either way of autocast. Beyond its limit of 8 the compiler gives up.
MOST_PROGRAMS = 32


def apply_compile(model: STDiT, cfg: Config) -> None:
    """Compile the blocks. What the compiler cannot do runs as it is, with a warning, unless "on" insists."""
    import torch._dynamo

    torch._dynamo.config.suppress_errors = cfg.train.compile == "auto"
    torch._dynamo.config.cache_size_limit = MOST_PROGRAMS
    # Blocks are compiled one by one: there is nothing to cut where DDP's buckets end, and checkpointing cannot be cut.
    torch._dynamo.config.optimize_ddp = False
    model.compile_blocks()
