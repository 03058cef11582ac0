"""One process of a small group that holds a T5 encoder together: what it encodes, and how much it holds, as JSON."""

from __future__ import annotations

import gc
import json
import time

import torch
from torch import Tensor

from opensora_repro.config import ParallelConfig, TextConfig
from opensora_repro.frozen.text import open_text_encoder
from opensora_repro.parallel.build import build_engine, build_shards
from opensora_repro.parallel.engine import TorchEngine
from tests.shares import held

LENGTH, AT_ONCE = 9, 2
CAPTIONS = ["a red square", "", "a blue circle, which is longer than the model reads", "green", "yellow"]


def main(arguments: list[str]) -> int:
    (folder,) = arguments
    engine = build_engine(ParallelConfig(), "cpu")
    open_text_encoder(TextConfig(path=folder), LENGTH, "cpu", torch.float32).encode(["green"])
    gc.collect()
    gc.freeze()  # all that the imports brought need not be looked through again and again
    try:
        found = {str(dtype): encode(engine, TextConfig(path=folder, shard=True), dtype) for dtype in DTYPES}
        print(json.dumps(found), flush=True)
    finally:
        engine.close()
    return 0


DTYPES = (torch.float32, torch.bfloat16)


def settled(dtype: torch.dtype) -> int:
    """What is held when gloo's own thread has let go of the exchange before, which on a busy machine takes a while."""
    found = []
    for _ in range(10):
        found.append(held(dtype))
        time.sleep(0.02)
    return min(found)


@torch.no_grad()
def encode(engine: TorchEngine, cfg: TextConfig, dtype: torch.dtype) -> dict[str, float]:
    """Each process has other captions, in as many calls and passes as no other has; the first one has none at all."""
    rank = engine.mesh.rank
    before = held(dtype)
    text = open_text_encoder(cfg, LENGTH, "cpu", dtype, build_shards(engine))
    text.micro_batch_size = AT_ONCE
    found: list[Tensor] = []
    with torch.autocast("cpu", torch.bfloat16):  # as where samples are made
        for phase in range(2):
            for call in range(rank):
                time.sleep(0.02 * rank)
                found.append(text.encode(CAPTIONS[call : call + rank + 1])[0])
            text.join()
            if phase == 0:
                text.frozen.release()  # and read again
    most: list[int] = []
    for block in text.model.encoder.block:
        block.layer[-1].register_forward_hook(lambda *_: most.append(settled(dtype)))
    text.encode(["green"])
    results = sum(value.numel() for value in found) if dtype == torch.float32 else 0
    shares = held(dtype) - before - results
    gathered = max(most) - before - results - shares
    whole = open_text_encoder(cfg, LENGTH, "cpu", dtype)
    whole.micro_batch_size = AT_ONCE
    expected = [whole.encode(CAPTIONS[call : call + rank + 1])[0] for call in range(rank)] * 2
    differences = [(a - b).abs().max().item() for a, b in zip(found, expected, strict=True)]
    numel = sum(parameter.numel() for parameter in whole.model.parameters())
    part = max(sum(p.numel() for p in block.parameters()) for block in whole.model.encoder.block)
    return {
        "calls": len(found),
        "difference": max(differences, default=0.0),
        "held": shares,
        "whole": numel,
        "gathered": gathered,
        "part": part,
    }
