"""Work of a GPU that is recorded once and launched again as a whole."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

from opensora_repro.parallel.device import return_memory

# Replays that the host may be ahead: the progress it shows is the GPU's, and an interrupt has little to wait for.
MOST_REPLAYS = 2


class CudaGraph:
    """A call without arguments, recorded once with memory of its own; it works on buffers that stay where they are.

    The recording is made on a stream that serves for nothing else.

    After one recording that failed this process makes no more: torch before 2.12 takes that for one that goes on.
    """

    spoilt = False

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, _recording_stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._running: deque[torch.cuda.Event] = deque()

    def warm_up(self, call: Callable[[], Tensor]) -> Tensor:
        """Return call(), run as it will be recorded; to be read before the next call of anything here."""
        with self._beside():  # where libraries get their workspaces now, so that the recording finds them
            return call()

    def capture(self, call: Callable[[], Tensor]) -> Tensor:
        """Record the call without running it; return the tensor that every `replay` will fill.

        Raises what the call raises, or torch, and RuntimeError where an earlier recording failed.

        Autocast's copies of weights are from the warm-up. Made here, they would hold nothing before the first replay;
        with autocast's cache off, each replay would make them anew.
        """
        if CudaGraph.spoilt:
            raise RuntimeError("an earlier recording failed")
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        # Of other threads nothing is recorded or forbidden: one may write a checkpoint, NCCL watches its queue.
        recording = torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local")
        try:
            with self._beside(), recording:
                output = call()
        except BaseException:
            CudaGraph.spoilt = True
            torch.clear_autocast_cache()  # of copies that were recorded, and never made
            raise
        self._graph = graph
        return output

    def replay(self) -> None:
        assert self._graph is not None
        if len(self._running) == MOST_REPLAYS:
            self._running.popleft().synchronize()
        self._graph.replay()
        done = torch.cuda.Event(blocking=True)
        done.record(torch.cuda.current_stream(self._device))
        self._running.append(done)

    def close(self) -> None:
        """Give the recording's memory back, its result's included."""
        self._running.clear()
        if self._graph is not None:
            torch.cuda.current_stream(self._device).synchronize()
            self._graph.reset()
            self._graph = None
        if not CudaGraph.spoilt:  # torch gives none back while it records
            return_memory(self._device)  # the recording's, which nobody else could use

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """On the recording's stream, in turn with the current one; that is the current one again in any case."""
        main = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(main)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            main.wait_stream(self._stream)


@lru_cache(maxsize=8)
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs of a device: libraries keep a workspace for every stream."""
    return torch.cuda.Stream(device)
