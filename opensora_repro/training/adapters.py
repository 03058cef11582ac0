"""Adapters in place of weights (`[lora]`): peft puts them into the model's blocks, and nothing else is trained.

What peft's dropout would draw from the process's stream is drawn here by sample, epoch and layer, as all chance is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from opensora_repro.config import Config
from opensora_repro.data.sampler import keyed_seed
from opensora_repro.models.captioned import CaptionedModel
from opensora_repro.weights.adapters import target_pattern

OF_CAPTIONS = "kv_linear"  # reads captions, which lie end to end in some kernels: nothing of them is dropped


@dataclass
class DropoutKeys:
    """Of the samples that the model is being trained on; none: nothing is dropped, as in evaluation."""

    seeds: list[int] = field(default_factory=list)

    def __deepcopy__(self, memo: Any) -> DropoutKeys:
        return self  # FSDP trains a copy of the model, which reads what is set here


class SampleDropout(nn.Module):
    """Dropout whose mask follows from each sample's seed and the layer: recomputed, resumed and spread alike."""

    def __init__(self, share: float, keys: DropoutKeys, layer: int) -> None:
        super().__init__()
        self.share, self.keys, self.layer = share, keys, layer

    def forward(self, x: Tensor) -> Tensor:
        """[B * n, ...], samples one after the other."""
        if not self.keys.seeds:
            return x
        kept = torch.empty(len(self.keys.seeds), x.numel() // len(self.keys.seeds), dtype=x.dtype, device=x.device)
        for row, seed in zip(kept, self.keys.seeds, strict=True):
            generator = torch.Generator(x.device).manual_seed(keyed_seed(seed, self.layer) >> 1)
            row.bernoulli_(1 - self.share, generator=generator)
        return x * kept.view_as(x) / (1 - self.share)


def apply_lora(model: CaptionedModel, cfg: Config) -> None:
    """Freeze the model and put adapters of float32 into it, drawn from torch's seed.

    Where autocast rounds to bfloat16, the frozen matrices of blocks are kept so: the same numbers in half the memory.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora.layer import Linear

    lora = cfg.lora
    peft_config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=target_pattern(cfg))  # type: ignore[arg-type]
    inject_adapter_in_model(peft_config, model)
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, Linear)]
    keys = DropoutKeys() if lora.dropout else None
    for number, (name, layer) in enumerate(layers):
        layer.cast_input_dtype_enabled = False  # autocast's work: peft would keep a copy in float32
        if keys is not None and not name.endswith(OF_CAPTIONS):
            layer.lora_dropout["default"] = SampleDropout(lora.dropout, keys, number)
    if cfg.train.dtype == "bf16":
        for block in model.in_order():
            for module in block.modules():
                if type(module) is nn.Linear and not module.weight.requires_grad:
                    module.weight.data = module.weight.data.bfloat16()


def dropout_keys(model: nn.Module) -> DropoutKeys | None:
    """What the dropout of its adapters is keyed by; None: there is none."""
    return next((module.keys for module in model.modules() if isinstance(module, SampleDropout)), None)
