"""CUDA graphs for sampling: a step's kernels are recorded once and launched as one at all later steps.

From step to step latents, timesteps and frame masks alone differ, so the model's call on one set of buffers serves them
all. A graph lives for one batch of prompts: it reads the weights where they lie, the text that was prepared for this
batch, and the copies of weights that the autocast around it keeps.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from opensora_repro.diffusion.flow import ModelFn
from opensora_repro.parallel.cuda_graph import CudaGraph

WARM_UP = 2  # steps before the recording: kernels are compiled, position tables and autocast's copies are made


class StepGraphs:
    """For `LatentSampler`: its model's calls are replayed. What cannot be recorded is called, after one warning."""

    def __init__(self, new_graph: Callable[[torch.device], CudaGraph] | None = None) -> None:
        self._new_graph: Callable[[torch.device], CudaGraph] = new_graph or CudaGraph
        self.usable = True

    @contextlib.contextmanager
    def __call__(self, model_fn: ModelFn) -> Iterator[ModelFn]:
        """Weights, autocast and inference mode must stay as they are in this context."""
        replayed = Replayed(model_fn, self._new_graph)
        try:
            yield replayed if self.usable else model_fn
        finally:
            replayed.close()
            self.usable &= replayed.usable


class Replayed:
    """`model_fn` for tensors of the same shapes again and again: called a few times, recorded, then replayed."""

    def __init__(self, model_fn: ModelFn, new_graph: Callable[[torch.device], CudaGraph]) -> None:
        self._model_fn, self._new_graph = model_fn, new_graph
        self._graph: CudaGraph | None = None
        self._inputs: list[Tensor] = []
        self._output: Tensor | None = None
        self._calls = 0
        self.usable = True

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Latents, timesteps and, where frames are given, their mask.

        The result is the caller's own: later calls leave it as it is.
        """
        if not self.usable:
            return self._model_fn(*inputs)
        graph = self._graph_for(list(inputs))
        self._calls += 1
        if self._calls <= WARM_UP:
            return graph.warm_up(self._run).clone()
        if self._output is None:
            try:
                self._output = graph.capture(self._run)
            except Exception as error:  # whatever this GPU, its driver or this version of torch cannot record
                self._give_up(error)
                return self._model_fn(*inputs)
        graph.replay()
        return self._output.clone()

    def _run(self) -> Tensor:
        return self._model_fn(*self._inputs)

    def _graph_for(self, given: list[Tensor]) -> CudaGraph:
        """The graph whose inputs now hold the given values; a new one where they do not fit."""
        if self._graph is None or list(map(_kind, given)) != list(map(_kind, self._inputs)):
            self.close()
            self._graph = self._new_graph(given[0].device)
            self._inputs = [torch.empty_like(value, memory_format=torch.contiguous_format) for value in given]
        for own, value in zip(self._inputs, given, strict=True):
            own.copy_(value)
        return self._graph

    def _give_up(self, error: Exception) -> None:
        from tqdm import tqdm

        self.usable = False
        self.close()
        first = error.__context__ or error  # ending a spoilt recording fails once more
        reason = (str(first).splitlines() or [type(first).__name__])[0]
        tqdm.write(f"warning: sampling goes on without a CUDA graph ({reason})", file=sys.stderr)

    def close(self) -> None:
        graph, self._graph, self._output, self._inputs, self._calls = self._graph, None, None, [], 0
        if graph is not None:
            graph.close()


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device
