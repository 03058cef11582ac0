"""Stage 2 in one process whose layers are cut in two as tensor parallelism cuts them: its roundings, no exchange."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

import opensora_repro.training.run as run
from opensora_repro.parallel.colossal import COLUMNS, ROWS
from opensora_repro.parallel.tensor import Cut
from stages import stage2_video

SIZE = 2


class Columns(nn.Linear):
    parts: int

    def forward(self, x: Tensor) -> Tensor:
        cuts = [Cut(0, self.parts, rank, SIZE) for rank in range(SIZE)]
        outputs = [F.linear(x, cut.take(self.weight), cut.take(self.bias)) for cut in cuts]
        return Cut(x.ndim - 1, self.parts, 0, SIZE).join(outputs)


class Rows(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        weights, bias = self.weight.chunk(SIZE, dim=1), self.bias / SIZE
        first, second = (F.linear(part, weight, bias) for part, weight in zip(x.chunk(SIZE, -1), weights, strict=True))
        return first + second


def main(arguments: list[str]) -> int:
    build = run.build_model

    def build_cut(*given: Any, **named: Any) -> Any:
        model, report = build(*given, **named)
        for block in model.blocks:
            for path, parts in COLUMNS.items():
                layer = block.get_submodule(path)
                layer.__class__, layer.parts = Columns, parts
            for path in ROWS:
                block.get_submodule(path).__class__ = Rows
        return model, report

    run.build_model = build_cut
    return stage2_video.main(arguments)
