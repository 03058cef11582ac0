"""ColossalAI's Booster and plugins behind the engine: DDP, ZeRO-1 and -2, and data x sequence x tensor parallelism.

Working weights are float32 in all of these plugins and bfloat16 comes from autocast, as under the torch engine: so they
train the same run. ZeRO's master weights are this rank's slices of the flattened working weights.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from colossalai.accelerator import get_accelerator, set_accelerator
from colossalai.booster import Booster
from colossalai.booster.plugin import HybridParallelPlugin, LowLevelZeroPlugin, TorchDDPPlugin
from colossalai.booster.plugin.hybrid_parallel_plugin import (
    HybridParallelModule,
    HybridParallelZeroOptimizer,
    get_param_info,
)
from colossalai.shardformer.policies.base_policy import (
    ModulePolicyDescription,
    Policy,
    SubModuleReplacementDescription,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from opensora_repro.config import ParallelConfig
from opensora_repro.parallel.cpu import GlooAccelerator
from opensora_repro.parallel.device import backend_of
from opensora_repro.parallel.engine import TorchEngine
from opensora_repro.parallel.tensor import ColumnLinear, Cut, HeadNorm, RowLinear, tensor_cuts

BUCKET_MILLIONS = 12  # elements of one gradient exchange
# A block's layers that tensor parallelism cuts: by columns, with the number of matrices that are side by side, and rows
COLUMNS = {"attn.qkv": 3, "attn_temp.qkv": 3, "cross_attn.q_linear": 1, "cross_attn.kv_linear": 2, "mlp.fc1": 1}
ROWS = ("attn.proj", "attn_temp.proj", "cross_attn.proj", "mlp.fc2")
NORMS = ("attn.q_norm", "attn.k_norm", "attn_temp.q_norm", "attn_temp.k_norm")


class ColossalEngine(TorchEngine):
    """The plugins of `parallel.plugin`; a single process, too, forms a group."""

    def __init__(self, cfg: ParallelConfig, device: str | None = None) -> None:
        super().__init__(cfg, device)
        if not dist.is_initialized():
            dist.init_process_group(backend_of(self.device), store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        if self.device.type == "cpu":
            set_accelerator(GlooAccelerator())
        logging.getLogger("colossalai").setLevel(logging.ERROR)

    def _wrap(self, optimizer: torch.optim.Optimizer) -> None:
        plugin = _build_plugin(self.cfg, overlap=self._has_streams())
        module, boosted, *_ = Booster(plugin=plugin).boost(self.model, optimizer)
        self.plugin, self.wrapped, self.boosted = plugin, module, boosted
        self.optimizer = boosted.optim
        self._cuts: dict[str, Cut] = tensor_cuts(self.model)
        self._tensor_group = getattr(plugin, "tp_group", None)
        self._zero_group: dist.ProcessGroup | None = None
        self.masters = dict(self.working)
        if self.cfg.plugin != "ddp":
            self._zero_group = plugin.mixed_dp_group if self.cfg.plugin == "hybrid" else dist.group.WORLD
            self.masters = {name: boosted.working_to_master_param[id(p)] for name, p in self.working.items()}
            # The loop knows the norm before it decides on the step: computing it once more would wait for the device.
            boosted._compute_grad_norm = lambda **_: 0.0

    # A step

    def accumulating(self, *, last: bool) -> AbstractContextManager[Any]:
        if last or self.cfg.plugin == "zero2":  # which reduces every micro-batch, since it keeps slices alone
            return contextlib.nullcontext()
        if self.cfg.plugin == "ddp":
            assert isinstance(self.wrapped.module, DistributedDataParallel)
            return self.wrapped.module.no_sync()
        return self.boosted.no_sync()  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        if self._zero_group is None or not self._has_streams():
            self.boosted.backward(loss)
            return
        # Where ZeRO exchanges gradients on a stream of its own, its `backward` ends in a wait for the whole device, and
        # the host could prepare no batch meanwhile. That the main stream waits for the exchange is enough: memory which
        # is freed on either is used anew only behind a wait for the other.
        loss.backward()
        if self.boosted.require_grad_sync:
            self.boosted._reduce_grad(self.boosted._partition_grads)
            for bucket in self.boosted.pg_to_bucket_store.values():
                get_accelerator().current_stream().wait_stream(bucket.comm_stream)

    def _has_streams(self) -> bool:
        return get_accelerator().Stream() is not None

    def squared_gradients(self) -> Tensor:
        if self._zero_group is None:
            return super().squared_gradients()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for name, gradient in self._slices().items():
            square = torch.linalg.vector_norm(gradient).double().square()
            total += square if name in self._cuts else square / self.mesh.tp_size  # replicated there
        return total

    def _optimizer_step(self, lr: float) -> None:
        if self._zero_group is None:
            super()._optimizer_step(lr)
            return
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.boosted.step()

    def zero_grad(self) -> None:
        self.boosted.zero_grad()

    def _gradients(self) -> list[Tensor]:
        return super()._gradients() if self._zero_group is None else list(self._slices().values())

    def _slices(self) -> dict[str, Tensor]:
        """This rank's slice of every averaged gradient."""
        store = self.boosted.pid_to_grad_store
        found = {name: store[id(p)].get_working_grad_by_param_id(id(p)) for name, p in self.working.items()}
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    # Weights

    def whole(self, name: str, piece: Tensor) -> Tensor:
        value = self._join_slices(name, piece)
        cut = self._cuts.get(name)
        if cut is None:
            return value
        pieces = [torch.empty_like(value) for _ in range(cut.size)]
        dist.all_gather(pieces, value.contiguous(), group=self._tensor_group)
        return cut.join(pieces)

    def take(self, name: str, whole: Tensor) -> Tensor:
        cut = self._cuts.get(name)
        value = whole if cut is None else cut.take(whole)
        return value if self._zero_group is None else self._slice(value)

    @torch.no_grad()
    def load(self, name: str, whole: Tensor) -> None:
        cut = self._cuts.get(name)
        self.working[name].copy_(whole if cut is None else cut.take(whole))
        self.masters[name].copy_(self.take(name, whole))

    @torch.no_grad()
    def show(self, pieces: Mapping[str, Tensor]) -> None:
        for name, piece in pieces.items():
            self.working[name].copy_(self._join_slices(name, piece))

    def _slice(self, value: Tensor) -> Tensor:
        """ZeRO's part of a flattened tensor, padded to equal parts."""
        size, rank = dist.get_world_size(self._zero_group), dist.get_rank(self._zero_group)
        flat = torch.nn.functional.pad(value.flatten(), (0, -value.numel() % size))
        return flat.chunk(size)[rank]

    def _join_slices(self, name: str, piece: Tensor) -> Tensor:
        if self._zero_group is None:
            return piece
        piece = piece.to(self.device)  # from where it may be kept
        shape = self.working[name].shape
        flat = piece.new_empty(piece.numel() * dist.get_world_size(self._zero_group))
        dist.all_gather_into_tensor(flat, piece.contiguous(), group=self._zero_group)
        return flat[: shape.numel()].view(shape)


def _build_plugin(cfg: ParallelConfig, *, overlap: bool) -> Any:
    """`overlap`: exchange gradients on a stream of their own, which a CPU has not."""
    if cfg.plugin == "ddp":
        return TorchDDPPlugin(broadcast_buffers=False, gradient_as_bucket_view=True)
    if cfg.plugin == "hybrid":
        return HybridPlugin(
            tp_size=cfg.tp_size,
            pp_size=1,
            precision="fp32",
            zero_stage=1,
            zero_bucket_size_in_m=BUCKET_MILLIONS,
            overlap_communication=overlap,
            custom_policy=TensorPolicy(),
        )
    return LowLevelZeroPlugin(
        stage=int(cfg.plugin.removeprefix("zero")),
        precision="fp32",
        master_weights=False,  # the working weights are float32 themselves: the masters are views of them
        reduce_bucket_size_in_m=BUCKET_MILLIONS,
        overlap_communication=overlap,
        cast_inputs=False,
    )


class HybridPlugin(HybridParallelPlugin):
    """HybridParallelPlugin with ZeRO-1 over float32 weights, which its own `configure` refuses, though ZeRO does not.

    Sequence parallelism is the engine's own; its ranks are data-parallel ones to the plugin, that is, they average.
    """

    def configure(self, model: nn.Module, optimizer: Any = None, *rest: Any, **named: Any) -> tuple[Any, ...]:
        info = get_param_info(optimizer)
        module = HybridParallelModule(
            model,
            precision=self.precision,
            shard_config=self.shard_config,
            dp_group=self.mixed_dp_group,
            tp_group=self.tp_group,
            sp_group=self.sp_group,
            use_ddp=False,
            ddp_config=self.ddp_config,
            custom_policy=self.custom_policy,
        )
        zero = HybridParallelZeroOptimizer(
            optimizer,
            module,
            use_pipeline=False,
            param_info=info,
            dp_process_group=self.mixed_dp_group,
            tp_process_group=self.tp_group,
            pp_process_group=self.pp_group,
            **self.zero_config,
        )
        return module, zero, None, None, None


class TensorPolicy(Policy):
    """How the blocks of PixArt and the STDiTs are cut: attention by heads, the MLP by columns, then rows.

    Embedders, modulation and the final layer are small and stay whole on every rank.
    """

    def config_sanity_check(self) -> None:
        assert self.shard_config is not None

    def preprocess(self) -> nn.Module:
        return self.model

    def postprocess(self) -> nn.Module:
        return self.model

    def module_policy(self) -> dict[Any, ModulePolicyDescription]:
        size = self.shard_config.tensor_parallel_size
        if size == 1:
            return {}
        block = self.model.in_order()[0]  # all of them are of one class
        attentions = ["attn", "cross_attn"] + ["attn_temp"] * (block.attn_temp is not None)
        # ignore_if_not_exist: PixArt has no temporal attention, nor have STDiT3's blocks two of them
        replacements = [
            SubModuleReplacementDescription(path, ColumnLinear, {"parts": parts}, ignore_if_not_exist=True)
            for path, parts in COLUMNS.items()
        ]
        for paths, layer in ((ROWS, RowLinear), (NORMS, HeadNorm)):
            replacements += [SubModuleReplacementDescription(path, layer, ignore_if_not_exist=True) for path in paths]
        heads = {f"{name}.num_heads": getattr(block, name).num_heads // size for name in attentions}
        return {
            type(block).__name__: ModulePolicyDescription(
                attribute_replacement=heads, sub_module_replacement=replacements
            )
        }
