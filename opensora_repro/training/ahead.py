"""Micro-batches ready for the model; the next one is made ready while the model trains on the one before."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from safetensors import SafetensorError

from opensora_repro.data.dataset import BadSample
from opensora_repro.data.sampler import interleave
from opensora_repro.errors import TrainingError
from opensora_repro.frozen.encoder import Encoded, Encoder
from opensora_repro.parallel.device import SideStream
from opensora_repro.parallel.peers import Peers
from opensora_repro.training.batch import Batch, BatchBuilder
from opensora_repro.training.feed import Sample


@dataclass(frozen=True)
class Ready:
    """A micro-batch and what could not become part of it."""

    batch: Batch
    bad_samples: list[BadSample]  # those that this process has read
    num_bad: int  # of all processes that work on this micro-batch
    lost: bool = False  # one of them could not read on


class Assembler:
    """Encodes what is not yet encoded, sets bad samples aside, draws the random numbers."""

    def __init__(self, encoder: Encoder, builder: BatchBuilder, members: Peers) -> None:
        """`members`: the processes that work on the same samples; each has read and encodes a share."""
        self.encoder, self.builder, self.members = encoder, builder, members

    def assemble(self, samples: list[Sample] | None) -> Ready:
        """Collective among `members`; None where this process cannot read on."""
        if samples is None:
            self.members.gather(None)
            return self._lost()
        bad = [sample for _, sample in samples if isinstance(sample, BadSample)]
        encoded = self.encoder.encoded([sample for _, sample in samples], len(samples))
        own = [(epoch, self._good(sample)) for (epoch, _), sample in zip(samples, encoded, strict=True)]
        parts = self.members.gather(own)
        if None in parts:
            return self._lost()
        everyone = interleave(parts)
        good = [(epoch, encoded) for epoch, encoded in everyone if encoded is not None]
        batch = self.builder.build(good) if good else self.builder.stand_in()
        return Ready(batch, bad, len(everyone) - len(good))

    def _lost(self) -> Ready:
        return Ready(self.builder.stand_in(), [], 0, lost=True)

    def _good(self, sample: Encoded | BadSample) -> Encoded | None:
        if isinstance(sample, BadSample):
            return None
        return sample if self.members.size == 1 else sample.cpu()


class ReadyBatches:
    """A run's micro-batches in order. Whether they are made ready ahead changes when things are done, not what."""

    def __init__(
        self, samples: Iterator[list[Sample]], assembler: Assembler, device: torch.device, *, overlap: bool
    ) -> None:
        """`overlap`: assemble the next micro-batch on a stream of its own beside the training, not only fetch it."""
        self._samples, self._assembler = samples, assembler
        self._side = SideStream(device) if overlap else None
        self._fetched: list[Sample] | None = None
        self._over = False
        self._ready: Ready | None = None
        self.error: Exception | None = None  # why nothing more can be read
        self.seconds_waited = 0.0  # for samples to be read

    def prepare(self) -> None:
        """Called once the device has work: fetch the next micro-batch, and assemble it where that overlaps.

        Where it cannot be read, `error` says why, and all that follows is stand-ins, with which the others can end
        their step.
        """
        started = time.perf_counter()
        self._fetched = self._next()
        self.seconds_waited += time.perf_counter() - started
        if self._side is not None and not self._over:
            with self._side.entered():
                self._ready = self._assembler.assemble(self._fetched)

    def _next(self) -> list[Sample] | None:
        if self.error is not None:
            return None
        try:
            fetched = next(self._samples, None)
        except (TrainingError, OSError, SafetensorError) as error:
            self.error = error
            return None
        self._over = fetched is None
        return fetched

    def take(self) -> Ready:
        """The micro-batch that the last `prepare` was for."""
        assert not self._over
        if self._side is None:
            return self._assembler.assemble(self._fetched)
        assert self._ready is not None
        ready, self._ready = self._ready, None
        self._side.hand_over(ready.batch.tensors())
        return ready
