"""Our video models as a pipeline of diffusers, which has no classes that compute what they do.

`stages.weights convert --to diffusers` writes folders for it. The code in them is an import from here, which diffusers
runs when it is told `trust_remote_code=True`, and refuses otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import nn

from opensora_repro.config import Config
from opensora_repro.frozen.autoencoder import Autoencoder
from opensora_repro.frozen.text import ConditionEncoder
from opensora_repro.kernels.ops import choose
from opensora_repro.sampling.generate import generate
from opensora_repro.sampling.run import check_prompts_fit, load_models, with_options
from opensora_repro.sampling.source import ModelSource, find_source
from opensora_repro.weights.families import Network
from opensora_repro.weights.load import check_complete


class VideoModel(nn.Module):
    """The pipeline's only component: a model with its run's settings; autoencoder and text encoder go by their names.

    Weights are read when they are first asked for, on the device that this has been moved to.
    """

    dtype = torch.float32

    def __init__(self, source: ModelSource) -> None:
        super().__init__()
        self.source = source
        self.register_buffer("place", torch.empty(0), persistent=False)
        self._loaded: tuple[Any, Any] = (None, None)

    @classmethod
    def from_pretrained(cls, folder: str, **_: Any) -> VideoModel:
        """Raises WeightsError for a folder that does not hold the weights of a whole model."""
        source = find_source(Path(folder))
        check_complete(source.weights, source.model)
        return cls(source)

    @property
    def device(self) -> torch.device:
        return self.get_buffer("place").device

    def loaded(self, cfg: Config) -> tuple[Network, Autoencoder, ConditionEncoder]:
        """The network, and of `cfg` the autoencoder and what makes a condition of prompts. Raises as `load_models`."""
        key = (self.device, cfg.vae, cfg.text, cfg.train.dtype)
        if self._loaded[0] != key:
            self._loaded = (None, None)  # before others take as much memory
            self._loaded = (key, load_models(replace(self.source, config=cfg), self.device)[:3])
        models: tuple[Network, Autoencoder, ConditionEncoder] = self._loaded[1]
        return models


@dataclass
class Videos(BaseOutput):  # type: ignore[misc]
    """`frames`: uint8 [prompts, frames, height, width, 3], or lists of PIL's images."""

    frames: Any


class TextToVideoPipeline(DiffusionPipeline):
    """Prompts to videos by what `stages.sample` calls, on the device that `to` names."""

    def __init__(self, transformer: VideoModel) -> None:
        super().__init__()
        self.register_modules(transformer=transformer)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str = "",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        vae: str | None = None,
        text_encoder: str | None = None,
        output_type: str = "pil",
    ) -> Videos:
        """Sample a video of each prompt: the same as `stages.sample` makes with this seed.

        What is not given is as the model was trained or released; `vae` and `text_encoder` are names of the hub or
        folders. `output_type`: "pil" or "np". Raises ConfigError for a size, prompts or models that do not fit,
        ModelNotFound for models that are not there.
        """
        if output_type not in ("pil", "np"):
            raise ValueError(f'output_type = {output_type!r}: expected "pil" or "np"')
        model: VideoModel = self.transformer
        source, device = model.source, model.device
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        check_prompts_fit(source, prompts, labels=False)
        cfg = with_options(
            source.config, steps=num_inference_steps, guidance=guidance_scale, num_frames=num_frames, height=height,
            width=width, vae=vae, text=text_encoder,
        )  # fmt: skip
        choose("eager" if cfg.train.kernels == "eager" else "auto", device.type)
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.train.dtype == "bf16"):
            network, autoencoder, conditions = model.loaded(cfg)
            videos = generate(
                network, autoencoder, conditions, cfg, prompts, seed=seed, batch_size=len(prompts),
                progress=self._progress(), negative=negative_prompt.strip(),
            )  # fmt: skip
            found = dict(videos)
        told = [found[number] for number in range(len(prompts))]
        return Videos(np.stack(told) if output_type == "np" else [self.numpy_to_pil(video / 255) for video in told])

    def _progress(self) -> Any:
        """Of denoising steps, as diffusers' pipelines show it; `set_progress_bar_config` changes it."""
        bar = None

        def show(done: int, total: int) -> None:
            nonlocal bar
            bar = bar or self.progress_bar(total=total)
            bar.update(done - bar.n)
            if done == total:
                bar.close()

        return show
