"""A frozen CLIP model of transformers: pictures and captions as vectors of one space, and what a head says of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opensora_repro.frozen.image_encoder import prepared, unit
from opensora_repro.frozen.pretrained import FrozenModel, HashFile, ModelNotFound, check_complete, load_frozen
from opensora_repro.frozen.text import MAX_CHARACTERS, TOKENIZER, WEIGHTS

KIND = "transformers CLIP model with its tokenizer"
HEAD_KIND = "linear head over CLIP's image embeddings"
# Of the pictures CLIP was trained on; models without a preprocessor_config.json are read with these.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ClipModel:
    """A CLIP model, its tokenizer, and the size and colours of the pictures it takes."""

    def __init__(self, model: Any, tokenizer: Any, mean: Sequence[float], std: Sequence[float]) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.image_size = int(model.config.vision_config.image_size)
        self.max_length = int(model.config.text_config.max_position_embeddings)
        self.channels = int(model.config.projection_dim)
        self.mean, self.std = mean, std

    @torch.no_grad()
    def embed_pictures(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Return unit vectors, float32 [N, D], of uint8 pictures [H, W, 3] of any sizes, all in one batch."""
        if not len(pictures):
            return torch.empty(0, self.channels)
        device = self.model.device
        pixels = torch.cat([prepared(picture, self.image_size, self.mean, self.std) for picture in pictures]).to(device)
        vision = self.model.vision_model(pixel_values=pixels).pooler_output
        return unit(self.model.visual_projection(vision))

    @torch.no_grad()
    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Return unit vectors, float32 [N, D], in one batch; long captions are cut at the model's length."""
        if not len(captions):
            return torch.empty(0, self.channels)
        tokens = self.tokenizer(
            [caption[:MAX_CHARACTERS] for caption in captions],
            max_length=self.max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).to(self.model.device)
        text = self.model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return unit(self.model.text_projection(text.pooler_output))


def find_clip(path: str, *, key: str) -> FrozenModel[None]:
    """Look a model's files over without reading it in. Raises ModelNotFound, for a model of another kind, too."""
    frozen = FrozenModel(lambda *_, **__: None, path, key=key, kind=KIND, weights=WEIGHTS, tokenizer=TOKENIZER)
    if frozen.config.get("model_type") != "clip":
        raise frozen.unusable(ValueError(f"its model_type is {frozen.config.get('model_type')!r}"))
    return frozen


def clip_fingerprint(path: str, *, key: str, hash_file: HashFile) -> str:
    """Return a hash of the model's files without reading it in. Raises ModelNotFound."""
    return find_clip(path, key=key).fingerprint(hash_file)


def load_clip(path: str, *, key: str, device: str = "cpu") -> ClipModel:
    """Load a local folder or a hub name in the cache; `key` names the option in errors. Raises ModelNotFound."""
    from transformers import AutoTokenizer, CLIPModel

    def load(folder: str, **options: Any) -> ClipModel:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model, info = CLIPModel.from_pretrained(folder, output_loading_info=True, **options)
        check_complete(info)
        return ClipModel(model.float().to(device).eval().requires_grad_(False), tokenizer, *_colours(Path(folder)))

    return load_frozen(load, path, key=key, kind=KIND)


class AestheticHead:
    """A chain of linear layers without anything between them, as the published aesthetic predictors are.

    LAION's aesthetic-predictor is one layer over unit CLIP embeddings; improved-aesthetic-predictor is five, with
    dropout between them in training alone. Both give about 1 (bad) to 10 (good).
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.layers = layers

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Return one score a row, float32 [N], of unit vectors [N, D]."""
        for weight, bias in self.layers:
            embeddings = torch.nn.functional.linear(embeddings, weight, bias)
        return embeddings[:, 0]


def load_head(path: str, channels: int, *, key: str) -> AestheticHead:
    """Load a head from a safetensors or torch file, or from a folder that holds one. Raises ModelNotFound.

    `channels` is the embeddings' width. Weights are taken in the order of their names.
    """
    from opensora_repro.weights.files import WeightsError, open_weights

    try:
        tensors = open_weights(path, ema=False).tensors
    except (WeightsError, OSError) as error:
        raise ModelNotFound(f"{key}={path}: {error}") from error
    names = sorted((name for name in tensors if name.endswith("weight")), key=_in_order)
    layers = []
    for name in names:
        weight = tensors[name].float().clone()
        bias = tensors.get(name.removesuffix("weight") + "bias")
        layers.append((weight, torch.zeros(len(weight)) if bias is None else bias.float().clone()))
    widths = [channels, *(len(weight) for weight, _ in layers)]
    shapes = [list(weight.shape) for weight, _ in layers]
    fits = shapes == [[outputs, inputs] for inputs, outputs in pairwise(widths)]
    if not layers or not fits or widths[-1] != 1:
        shown = ", ".join(map(str, shapes)) or "none"
        raise ModelNotFound(f"{key}={path}: not a {HEAD_KIND} of {channels} channels to 1 (its weights: {shown})")
    return AestheticHead(layers)


def _in_order(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdecimal()]


def _colours(folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Return the mean and standard deviation that the folder's preprocessor asks for."""
    import json

    try:
        config = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        mean, std = config["image_mean"], config["image_std"]
        if len(mean) == len(std) == 3 and all(isinstance(value, int | float) for value in [*mean, *std]):
            return mean, std
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return MEAN, STD
