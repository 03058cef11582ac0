"""The model that is trained: built, and compiled where that pays."""

from __future__ import annotations

import torch

from opensora_repro.config import Config
from opensora_repro.kernels.ops import missing_triton
from opensora_repro.models.captioned import CaptionedModel
from opensora_repro.models.packing import PackedSTDiT, PackedSTDiT2, PackedSTDiT3
from opensora_repro.models.stdit import STDiT
from opensora_repro.models.stdit2 import STDiT2
from opensora_repro.models.stdit3 import STDiT3
from opensora_repro.weights.families import family_of
from opensora_repro.weights.load import LoadReport, load_model_weights

PACKED = {STDiT: PackedSTDiT, STDiT2: PackedSTDiT2, STDiT3: PackedSTDiT3}


def build_model(cfg: Config, device: torch.device, *, load_init: bool) -> tuple[CaptionedModel, LoadReport | None]:
    """The model in float32, its initial weights from `run.seed` or, with `load_init`, from `init.weights`.

    With [lora] those of `init.weights` in any case, frozen, and adapters.

    Raises WeightsError where the weights are absent or made for another model.
    """
    report = None
    network = family_of(cfg.model).network
    build: type[CaptionedModel] = PACKED[network] if cfg.data.packing_tokens else network
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.run.seed)
        if cfg.init.weights and (load_init or cfg.lora.rank):
            with torch.device("meta"):  # nothing is drawn that the file would overwrite
                model = build(cfg.model)
            report = load_model_weights(model, cfg.init.weights)
        else:
            model = build(cfg.model)
        if cfg.lora.rank:
            from opensora_repro.training.adapters import apply_lora

            apply_lora(model, cfg)
    model.activation_checkpointing = cfg.train.activation_checkpointing
    model.offload_activations = cfg.train.offload_activations
    return model.to(device).train(), report


def compiles(cfg: Config, device_type: str) -> bool:
    """ "auto" does on CUDA devices where Triton imports, unless a layout or packing alters the blocks.

    On a CPU compiled blocks were as fast as the others, and each run would wait half a minute for them.
    """
    if cfg.train.compile != "auto":
        return cfg.train.compile == "on"
    parallel = cfg.parallel
    whole = parallel.plugin != "fsdp" and parallel.tp_size == parallel.sp_size == 1
    whole = whole and not cfg.data.packing_tokens and not cfg.lora.rank
    return device_type == "cuda" and whole and not missing_triton()


# Programs of a block that a run may need: for one sample or several, captions of one length or not, one of them empty
# or none, each for a frame or several and either way of autocast. Beyond its limit of 8 the compiler gives up.
MOST_PROGRAMS = 32


def apply_compile(model: CaptionedModel, cfg: Config) -> None:
    """Compile the blocks. What the compiler cannot do runs as it is, with a warning, unless "on" insists."""
    import torch._dynamo

    torch._dynamo.config.suppress_errors = cfg.train.compile == "auto"
    torch._dynamo.config.cache_size_limit = MOST_PROGRAMS
    # Blocks are compiled one by one: there is nothing to cut where DDP's buckets end, and checkpointing cannot be cut.
    torch._dynamo.config.optimize_ddp = False
    model.compile_blocks()
