"""Where processes and devices are known: what processes tell each other, and the plain torch engine.

Every engine keeps float32 master weights by name. A rank holds a piece of each (under the torch engine the whole);
`whole` and `take` lead from pieces to published tensors and back, so that averages, optimizer state and checkpoints
need not know how a run is spread.

The torch engine is one process, or plain data parallelism (DistributedDataParallel) when started by torchrun: gloo on
CPUs, NCCL on GPUs. With `parallel.sp_size` the processes of a group share each sample's frames. FSDP, where no process
holds all weights, is beside it in fsdp.py.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import pickle
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from opensora_repro.config import ParallelConfig
from opensora_repro.parallel.device import choose_device
from opensora_repro.parallel.in_backward import StepInBackward
from opensora_repro.parallel.mesh import Mesh, launched_as
from opensora_repro.parallel.preflight import launch
from opensora_repro.parallel.sequence import FrameParallel, apply_sequence_parallelism
from opensora_repro.parallel.watchdog import Watchdog

Forward = Callable[..., Tensor]
Result = TypeVar("Result")

# Work that only rank 0 does (filling a cache, sampling) may outlast any collective's usual time limit.
PATIENCE = datetime.timedelta(days=7)


class Collectives:
    """What the processes of one gloo group do together; without a group, this process alone.

    Python values travel here: small facts, samples, outcomes; tensors of the model never do.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        paused: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """`paused`: the context in which work of one process may take as long as it likes."""
        self.group, self.paused = group, paused
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    def gather(self, value: Any) -> list[Any]:
        """Every process's picklable value, in rank order, on every process; waits for all of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def agree(self, error: Exception | None) -> None:
        """Raise here what went wrong anywhere, the first process's error first; wait for all of them."""
        for found in self.gather(None if error is None else picklable(error)):
            if found is not None:
                raise found

    def on_first(self, work: Callable[[], Result]) -> Result:
        """Run `work` on the first process while the others wait; all get its (picklable) result, or raise its error."""
        if self.size == 1:
            return work()
        with self.paused():
            return self._share(work)

    def _share(self, work: Callable[[], Result]) -> Result:
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = work()
            except Exception as error:
                outcome[1] = picklable(error)
                self._broadcast(outcome)
                raise
        self._broadcast(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        result: Result = outcome[0]
        return result

    def _broadcast(self, outcome: list[Any]) -> None:
        assert self.group is not None
        dist.broadcast_object_list(outcome, src=dist.get_global_rank(self.group, 0), group=self.group)


def picklable(error: Exception) -> Exception:
    """The error itself where another process can rebuild it, else one that says the same."""
    try:
        pickle.dumps(error)
        copy.copy(error)  # rebuilds it as unpickling would
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


class TorchEngine:
    """One process, or torchrun's data-parallel ones; every other engine derives from this one.

    All but `is_main` and `prepare` is collective. Raises EngineError where there are more processes than GPUs, or where
    the processes do not come together.
    """

    device: torch.device
    watchdog: Watchdog
    mesh: Mesh
    world: Collectives  # all processes
    members: Collectives  # those that work on the same samples
    savers: Collectives  # all processes again, for a thread that writes checkpoints
    masters: dict[str, Tensor]  # this rank's piece of every trained parameter, float32
    fixed: dict[str, Tensor]  # the rest of the model's state, whole on every rank
    optimizer: torch.optim.Optimizer  # over the masters
    train_forward: Forward
    eval_forward: Forward

    def __init__(self, cfg: ParallelConfig | None = None, device: str | None = None) -> None:
        """`device`: as torch calls it; None takes a GPU where there is one."""
        self.cfg = cfg or ParallelConfig()
        rank, world_size, local_rank = launched_as()
        self.mesh = Mesh(rank, world_size, self.cfg.tp_size, self.cfg.sp_size)
        self.device = choose_device(device, local_rank)
        self.watchdog = launch(rank, world_size, self.device, self.cfg.timeout)
        self.world, self.savers = self._of_all(), self._of_all()
        self.members = Collectives(self._own_group(self.mesh.model_groups(), "gloo", PATIENCE))
        self._sequence_group = self._own_group(self.mesh.sequence_groups())

    def _of_all(self) -> Collectives:
        group = dist.new_group(backend="gloo", timeout=PATIENCE) if self.mesh.world_size > 1 else None
        return Collectives(group, self.watchdog.paused)

    def _own_group(
        self, groups: list[list[int]], backend: str | None = None, timeout: datetime.timedelta | None = None
    ) -> dist.ProcessGroup | None:
        """Make every group on every rank, as torch wants it; return this rank's, None where it is alone in it."""
        own = None
        for ranks in groups:
            if len(ranks) > 1:
                group = dist.new_group(ranks, backend=backend, timeout=timeout)
                own = group if self.mesh.rank in ranks else own
        return own

    @property
    def is_main(self) -> bool:
        return self.mesh.rank == 0

    # Before training

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, half: bool = False) -> None:
        """Take the model and the optimizer over its trained parameters; every rank must come with the same weights.

        `half`: the model will be called in bfloat16 autocast.
        Afterwards `train_forward` and `eval_forward` have the model's own call signature, whole samples in and out.
        """
        self.model, self.half = model, half
        self.working = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.fixed = {name: value for name, value in model.state_dict().items() if name not in self.working}
        self._whole_shapes = {name: value.shape for name, value in self.working.items()}
        self.eval_forward = self.spread(model)
        self._wrap(optimizer)
        self._in_backward: StepInBackward | None = None
        self.train_forward = self._by_frames(self.wrapped)

    def spread(self, model: nn.Module) -> Forward:
        """Let the processes of a group share each sample's frames; call the model through the result from then on."""
        if self._sequence_group is not None:
            apply_sequence_parallelism(model, self._sequence_group)
        return self._by_frames(model)

    def _by_frames(self, module: nn.Module) -> Forward:
        if self._sequence_group is None:
            return module
        model: Any = next(part for part in module.modules() if hasattr(part, "cfg"))
        return FrameParallel(module, self._sequence_group, model.cfg.patch_size[0])

    def _wrap(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.masters = dict(self.working)
        self.wrapped: nn.Module = self.model
        if self.mesh.world_size > 1:
            # Without device_ids: inputs lie where they should, and DDP would move the captions' mask to the GPU.
            self.wrapped = DistributedDataParallel(self.model, broadcast_buffers=False, gradient_as_bucket_view=True)

    # A step

    def accumulating(self, *, last: bool) -> AbstractContextManager[Any]:
        """Around a micro-batch's forward and backward: ranks average their gradients at the step's last one only."""
        if last or not isinstance(self.wrapped, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.wrapped.no_sync()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def squared_gradients(self) -> Tensor:
        """This rank's share of the squared norm of all gradients together, float64 []; the ranks' shares add up."""
        norms = [] if self._in_backward is None else self._in_backward.norms()
        norms = norms or list(torch._foreach_norm(self._gradients()))
        return torch.linalg.vector_norm(torch.stack(norms)).double().square() / self.mesh.world_size

    def step(self, lr: float, factor: float | Tensor, skip: Tensor | None = None) -> None:
        """Multiply the gradients and let the optimizer make its step; where `skip` is 1, leave all as it is.

        Tensors are float32 [] on the device. A fused optimizer looks at them there, so that nobody waits for the
        device; with any other this call does.
        """
        if not all(group.get("fused") for group in self.optimizer.param_groups):
            if skip is not None and skip.item():
                return
            torch._foreach_mul_(self._gradients(), factor)
            self._optimizer_step(lr)
            return
        scale = 1 / (factor if isinstance(factor, Tensor) else torch.full((), factor, device=self.device))
        self.optimizer.grad_scale, self.optimizer.found_inf = scale, skip  # type: ignore[attr-defined]
        self._optimizer_step(lr)

    def _optimizer_step(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    def step_in_backward(self, lr: float, factor: float) -> None:
        """Let the next backward pass multiply each gradient, make its weight's step and free it; then call no `step`.

        For one process; `squared_gradients` tells the norm as ever.
        """
        assert self.mesh.world_size == 1
        if self._in_backward is None:  # not before: a checkpoint's state is in the optimizer now
            self._in_backward = StepInBackward(self.working, self.optimizer)
        self._in_backward.arm(lr, factor)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if self._in_backward is not None:
            self._in_backward.disarm()

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.working.values() if parameter.grad is not None]

    # Weights

    def whole(self, name: str, piece: Tensor) -> Tensor:
        """The whole tensor, on every rank, of which each rank has a piece as of the parameter `name`."""
        return piece

    def take(self, name: str, whole: Tensor) -> Tensor:
        """This rank's piece of a whole tensor; inverse of `whole`."""
        return whole

    def whole_shape(self, name: str) -> torch.Size:
        return self._whole_shapes[name]

    @torch.no_grad()
    def load(self, name: str, whole: Tensor) -> None:
        """Set a trained parameter, its master and what the model computes with, from the whole tensor."""
        self.masters[name].copy_(self.take(name, whole))

    @torch.no_grad()
    def show(self, pieces: Mapping[str, Tensor]) -> None:
        """Let the model compute with these weights instead of its own."""
        for name, value in pieces.items():
            self.masters[name].copy_(value)

    # All processes

    def sum(self, values: Tensor) -> Tensor:
        """Add `values` up over all ranks, in place; every rank gets the result."""
        if self.mesh.world_size > 1:
            dist.all_reduce(values)
        return values

    def on_first_model(self, work: Callable[[], Result]) -> Result:
        """Run `work` on all processes of the first data rank while the others wait; all get rank 0's result."""
        if self.mesh.data_rank == 0 and not self.is_main:
            work()
        return self.world.on_first(work)

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        self.watchdog.close()
