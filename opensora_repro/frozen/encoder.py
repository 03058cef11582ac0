"""The frozen models: a clip's latent moments and its caption's embedding."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from opensora_repro.config import Config
from opensora_repro.data.cache import LatentCache
from opensora_repro.data.dataset import BadSample, Clip, ClipDataset, LoaderDied, build_loader
from opensora_repro.data.sampler import SampleBatch
from opensora_repro.data.transforms import to_tensor
from opensora_repro.errors import TrainingError
from opensora_repro.frozen.hashes import HashMemo
from opensora_repro.frozen.text import T5Text, open_text_encoder
from opensora_repro.frozen.vae import FrameVAE, open_vae
from opensora_repro.kernels.transfer import to_device
from opensora_repro.parallel.device import read_here, return_memory
from opensora_repro.training.batch import Encoded
from opensora_repro.training.feed import CacheRows

TEXT_MEMORY = 256 << 20  # bytes of caption embeddings kept, so that a caption met again is not encoded again
FROZEN_HASHES = "frozen-files.json"  # in a cache's folder: the frozen models' digests
FLUSH_EVERY = 256  # samples between the cache's writes: what a killed fill loses at most


class Encoder:
    """Autoencoder and text encoder, loaded when first used.

    Embeddings leave it as the model will read them and the cache keeps them: zero where there is no token, and rounded
    to `text_dtype`. Encoded again or read from the cache, they are the same bit for bit.
    """

    def __init__(
        self,
        vae: FrameVAE,
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
        self.vae.frozen.get()
        self.text.frozen.get()
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
        return_memory(self.device)

    def encoded(
        self, samples: Iterable[Clip | Encoded | BadSample], at_once: int | None = None
    ) -> Iterator[Encoded | BadSample]:
        """Samples in their order, clips encoded; where clips are encoded together, those of `at_once` samples.

        None: as many as the text encoder takes captions. Results lie on the frozen models' device.
        """
        rest = iter(samples)
        at_once = (at_once or self.text.micro_batch_size) if self.together else 1
        while group := list(islice(rest, at_once)):
            done = iter(self._encode([sample for sample in group if isinstance(sample, Clip)]))
            yield from (next(done) if isinstance(sample, Clip) else sample for sample in group)

    @torch.no_grad()
    def _encode(self, clips: Sequence[Clip]) -> list[Encoded]:
        """Clips of one height and width; their pixels travel to the device as bytes."""
        if not clips:
            return []
        videos = [to_tensor(to_device(clip.pixels, self.device)).to(self.vae.dtype) for clip in clips]
        moments = self.vae.encode_moments(torch.cat(videos, dim=1)).split([v.shape[1] for v in videos], dim=1)
        captions = self._encode_captions(list(dict.fromkeys(clip.caption for clip in clips)))
        pairs = zip(clips, moments, strict=True)
        return [Encoded(clip.id, found, *captions[clip.caption]) for clip, found in pairs]

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


def open_encoder(cfg: Config, device: torch.device) -> Encoder:
    """The config's frozen models; their weights are read when first used. Raises ModelNotFound."""
    dtype = frozen_dtype(cfg, device)
    vae = open_vae(cfg.vae, device, dtype)
    text = open_text_encoder(cfg.text, cfg.model.model_max_length, device, dtype)
    # The model rounds what it multiplies, where it trains in bfloat16: rounded before, that is the same bit for bit.
    text_dtype = torch.bfloat16 if cfg.train.dtype == "bf16" else torch.float32
    together = device.type != "cpu"
    return Encoder(vae, text, device, half=dtype == torch.bfloat16, text_dtype=text_dtype, together=together)


def skipped_models(not_loaded: Sequence[Sequence[str]]) -> str:
    """What to tell the user of the models that no process needed to load; nothing if there is none."""
    first, *others = not_loaded
    names = [name for name in first if all(name in other for other in others)]
    return f"{' and '.join(names)} not loaded: everything is in the cache" if names else ""


def frozen_dtype(cfg: Config, device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU that trains in it, as the published runs did."""
    return torch.bfloat16 if device.type == "cuda" and cfg.train.dtype == "bf16" else torch.float32


def cache_fingerprint(cfg: Config, encoder: Encoder) -> str:
    """Digest of all that an encoded sample depends on, but for its row and its draw.

    The frozen models enter by their files' digests, which `data.cache` remembers.
    """
    hash_file = HashMemo(Path(cfg.data.cache) / FROZEN_HASHES)
    keys = ("num_frames", "frame_interval", "height", "width", "flip", "draws")
    content = {
        "vae": encoder.vae.fingerprint(hash_file),
        "text": encoder.text.fingerprint(hash_file),
        "max_length": cfg.model.model_max_length,
        "half": encoder.half,
        "text dtype": str(encoder.text_dtype),
        "data": {key: getattr(cfg.data, key) for key in keys},
        "seed": cfg.run.seed,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def fill_cache(
    dataset: ClipDataset,
    rows: CacheRows,
    share: tuple[int, int],
    encoder: Encoder,
    cache: LatentCache,
    *,
    num_workers: int,
    set_aside: Callable[[BadSample], None],
    stopped: Callable[[], bool],
    attempted: Callable[[int], None] = lambda index: None,
) -> None:
    """Encode what the cache lacks of every sample's draws; what a killed fill wrote is kept.

    `share` is (rank, world size): each process fills its rows. `attempted` is told each row's index, with every draw.
    Ends early once `stopped()`. Raises OSError where the cache cannot be written, TrainingError without its loaders.
    """
    from tqdm import tqdm

    draws = dataset.cfg.draws
    missing = set(cache.missing(rows.keys(draws)))
    # A share is every so many rows of all, not of those missing: others write while this one looks. A row's draws stay
    # together, so that its caption is encoded once.
    own = range(share[0], len(rows.names), share[1])
    todo = [(draw, i) for i in own for draw in range(draws) if (rows.names[i], draw) in missing]
    if not todo:
        return
    interval = 0.5 if sys.stderr.isatty() else 15.0
    with tqdm(
        total=len(todo), desc="encoding", unit="clip", mininterval=interval, dynamic_ncols=True, disable=share[0] > 0
    ) as bar:
        try:
            samples = encoder.encoded(sample for _, _, sample in _load(dataset, todo, num_workers))
            for done, ((draw, index), sample) in enumerate(zip(todo, samples, strict=True), start=1):
                attempted(index)
                if isinstance(sample, BadSample):
                    set_aside(sample)
                else:
                    entry = {"moments": sample.moments, "text": sample.text, "mask": sample.mask}
                    cache.put((rows.names[index], draw), entry)
                if done % FLUSH_EVERY == 0:
                    cache.flush()
                bar.update(1)
                if stopped():
                    break
        except TrainingError:
            cache.flush()
            raise
    cache.flush()


def load_listed(dataset: ClipDataset, indices: list[int], num_workers: int) -> Iterator[Clip | BadSample]:
    """The samples of these indexes, in order."""
    for _, _, sample in _load(dataset, [(0, index) for index in indices], num_workers):
        yield sample


class _Listed:
    """A sampler of listed (draw, index) pairs, one a batch, for the loader."""

    def __init__(self, pairs: list[tuple[int, int]]) -> None:
        self._pairs = pairs

    def batch(self, step: int) -> SampleBatch:
        return SampleBatch([self._pairs[step]])


def _load(
    dataset: ClipDataset, pairs: list[tuple[int, int]], num_workers: int
) -> Iterator[tuple[int, int, Clip | BadSample]]:
    loader = build_loader(dataset, _Listed(pairs), 0, len(pairs), num_workers)
    try:
        for (draw, index), (sample,) in zip(pairs, loader, strict=True):
            yield draw, index, sample
    except LoaderDied as error:
        raise TrainingError(str(error)) from error
