"""A frozen model in equal shares: every process holds 1/N of it, and gathers each part while that computes.

torch's `fully_shard` (FSDP2) keeps and gathers the shares. Its own hooks are made for training: they note every forward
pass until a backward pass comes, and gather on streams of their own. Those here call `unshard` and `reshard` instead.

A forward pass is collective, so every process must make as many; `most` is how they agree on the number. All of it runs
in the main threads, in the same order everywhere: a thread beside (of a loader, of a writer) would come in between at
another place in each process. Its groups are its own, so that no other exchange is taken for one of these.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from opensora_repro.parallel.engine import PATIENCE


class Shards:
    """All processes of a run, as the holders of a frozen model. Making it is collective."""

    def __init__(self, device: torch.device) -> None:
        # While one waits, another may still read clips or weights: what takes too long is for the watchdog to say.
        self._mesh = DeviceMesh.from_group(dist.new_group(timeout=PATIENCE), device.type)
        self._words = dist.new_group(backend="gloo", timeout=PATIENCE)

    def apply(self, parts: Iterable[Sequence[nn.Module]]) -> None:
        """Leave this process its share of each part, on its device.

        A part is modules that have parameters in common, or one; the last of them is the one that is called.
        """
        for modules in parts:
            self._share(modules)

    def _share(self, modules: Sequence[nn.Module]) -> None:
        part: Any = _Part(modules)
        fully_shard(part, mesh=self._mesh)
        modules[-1].register_forward_pre_hook(lambda *_: part.unshard())
        modules[-1].register_forward_hook(lambda *_: part.reshard())

    def most(self, passes: int) -> int:
        """The largest number of passes that any process comes with. Collective."""
        found = torch.tensor(passes)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self._words)
        return int(found)


class _Part(nn.Module):
    """What is gathered together; it is never called, its modules are."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.held = nn.ModuleList(modules)
