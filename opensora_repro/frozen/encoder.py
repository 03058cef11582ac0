"""The frozen models: a clip's latent moments and its caption's embedding."""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opensora_repro.config import Config
from opensora_repro.data.dataset import BadSample, Clip, to_tensor
from opensora_repro.frozen.autoencoder import Autoencoder
from opensora_repro.frozen.pretrained import frozen_dtype
from opensora_repro.frozen.text import T5Text, open_text_encoder
from opensora_repro.frozen.vae import open_vae
from opensora_repro.kernels.ops import to_device
from opensora_repro.parallel.device import read_here, return_memory

if TYPE_CHECKING:
    from opensora_repro.parallel.shards import Shards

TEXT_MEMORY = 256 << 20  # bytes of caption embeddings kept, so that a caption met again is not encoded again


@dataclass(frozen=True)
class Encoded:
    """A sample after the frozen models."""

    id: str
    moments: Tensor  # [2 * Cz, T, h, w] float32: mean and log variance of the latents
    text: Tensor  # [L, Ct] float32 or bfloat16
    mask: Tensor  # [L] bool, in host memory
    fps: Tensor  # [] float32, in host memory: frames a second as taken; 0: a picture

    def cpu(self) -> Encoded:
        return Encoded(self.id, self.moments.cpu(), self.text.cpu(), self.mask.cpu(), self.fps)


class Encoder:
    """Autoencoder and text encoder, loaded when first used.

    Embeddings leave it as the model will read them and the cache keeps them: zero where there is no token, and rounded
    to `text_dtype`. Encoded again or read from the cache, they are the same bit for bit.
    """

    def __init__(
        self,
        vae: Autoencoder,
        text: T5Text,
        device: torch.device,
        *,
        half: bool,
        text_dtype: torch.dtype = torch.float32,
        together: bool = False,
    ) -> None:
        """`together`: clips are encoded with their neighbours, which is much faster on a GPU and changes no more than
        rounding; else each alone, and neighbours never change it by a bit."""
        self.vae, self.text, self.device, self.half = vae, text, device, half
        self.text_dtype, self.together = text_dtype, together
        self._captions: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()
        self._caption_bytes = 0

    def load(self) -> Encoder:
        """Read the weights now: what is wrong with them is said at the start. Raises ModelNotFound."""
        self.vae.frozen.load()
        self.text.frozen.load()
        return self

    def not_loaded(self) -> list[str]:
        """Names of the models whose weights were not needed so far."""
        models = {"text encoder": self.text.frozen, "autoencoder": self.vae.frozen}
        return [name for name, model in models.items() if not model.loaded]

    def release(self) -> None:
        """Give the weights' memory back; a later use reads them again."""
        self.vae.frozen.release()
        self.text.frozen.release()
        self._captions.clear()
        self._caption_bytes = 0
        gc.collect()  # hooks and the modules that they gather hold each other
        return_memory(self.device)

    def join(self) -> None:
        """Where the text encoder is spread: take part in what others encode until every process has come here."""
        self.text.join()

    def encoded(
        self, samples: Iterable[Clip | Encoded | BadSample], at_once: int | None = None
    ) -> Iterator[Encoded | BadSample]:
        """Samples in their order, clips encoded; where clips are encoded together, those of `at_once` samples.

        None: as many as the text encoder takes captions. Results lie on the frozen models' device. Whoever is done
        calls `join`: processes may have different numbers of samples.
        """
        rest = iter(samples)
        at_once = (at_once or self.text.micro_batch_size) if self.together else 1
        while group := list(islice(rest, at_once)):
            done = iter(self._encode([sample for sample in group if isinstance(sample, Clip)]))
            yield from (next(done) if isinstance(sample, Clip) else sample for sample in group)

    @torch.no_grad()
    def _encode(self, clips: Sequence[Clip]) -> list[Encoded]:
        """Those of one height and width together; their pixels travel to the device as bytes."""
        if not clips:
            return []
        moments: dict[int, Tensor] = {}
        sizes = [clip.pixels.shape[1:3] for clip in clips]
        for size in dict.fromkeys(sizes):
            alike = [number for number, other in enumerate(sizes) if other == size]
            videos = [to_tensor(to_device(clips[n].pixels, self.device)).to(self.vae.pixel_dtype) for n in alike]
            moments |= dict(zip(alike, self.vae.encode_clips(videos), strict=True))
        captions = self._encode_captions(list(dict.fromkeys(clip.caption for clip in clips)))
        return [
            Encoded(clip.id, moments[n], *captions[clip.caption], torch.tensor(clip.fps))
            for n, clip in enumerate(clips)
        ]

    def _encode_captions(self, captions: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
        if not self.together:
            return {caption: self.encode_caption(caption) for caption in captions}
        # None is remembered: with which others a caption is encoded, and so how it is rounded, must not depend on what
        # came before, or a resumed run would differ from one that was not stopped.
        embeddings, masks = self.text.encode(captions)
        return {c: self._as_read(*found) for c, *found in zip(captions, embeddings, masks, strict=True)}

    def _as_read(self, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        there = to_device(mask, text.device)[:, None]
        return torch.where(there, text, 0).to(self.text_dtype), mask

    @torch.no_grad()
    def encode_caption(self, caption: str) -> tuple[Tensor, Tensor]:
        """Embedding [L, Ct] and mask [L] of a caption alone."""
        if caption in self._captions:
            self._captions.move_to_end(caption)
            read_here(self._captions[caption])
            return self._captions[caption]
        embeddings, masks = self.text.encode([caption])
        found = self._as_read(embeddings[0], masks[0])
        self._captions[caption] = found
        self._caption_bytes += found[0].nbytes
        while self._caption_bytes > TEXT_MEMORY and len(self._captions) > 1:
            self._caption_bytes -= self._captions.popitem(last=False)[1][0].nbytes
        return found


def open_encoder(cfg: Config, device: torch.device, shards: Shards | None = None) -> Encoder:
    """The config's frozen models; their weights are read when first used. Raises ModelNotFound.

    `shards`: the processes over which the text encoder is spread.
    """
    dtype = frozen_dtype(cfg, device)
    vae = open_vae(cfg.vae, device, dtype)
    text = open_text_encoder(cfg.text, cfg.model.model_max_length, device, dtype, shards)
    # The model rounds what it multiplies, where it trains in bfloat16: rounded before, that is the same bit for bit.
    text_dtype = torch.bfloat16 if cfg.train.dtype == "bf16" else torch.float32
    together = device.type != "cpu"
    return Encoder(vae, text, device, half=dtype == torch.bfloat16, text_dtype=text_dtype, together=together)


def skipped_models(not_loaded: Sequence[Sequence[str]]) -> str:
    """What to tell the user of the models that no process needed to load; nothing if there is none."""
    first, *others = not_loaded
    names = [name for name in first if all(name in other for other in others)]
    return f"{' and '.join(names)} not loaded: everything is in the cache" if names else ""
