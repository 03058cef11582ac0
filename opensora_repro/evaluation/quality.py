"""Metrics of samples, from videos alone: what pixels say, distances to real clips, whether captions are followed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from opensora_repro.evaluation.distances import (
    Estimate,
    frechet_distance,
    jackknife,
    kernel_distance,
    mean_of,
    share_of,
    wasserstein_distance,
)
from opensora_repro.evaluation.features import ClipFeatures, as_set
from opensora_repro.evaluation.pixels import Looks

SHARES = ("static", "blank", "noise")
Found = dict[str, Estimate | float]


def of_looks(samples: Sequence[Looks], real: Sequence[Looks]) -> Found:
    """Means and shares of the samples, `data/NAME` of the real clips, and how far their amounts of motion lie apart."""
    found: Found = {}
    for name in samples[0].numbers():
        values, data = ([look.numbers()[name] for look in looks] for looks in (samples, real))
        found[name] = share_of([v > 0 for v in values]) if name in SHARES else mean_of(torch.tensor(values))
        found[f"data/{name}"] = float(np.mean(data))
        if name == "motion":
            found["motion_distance"] = wasserstein_distance(torch.tensor(values), torch.tensor(data))
    return found


def of_features(samples: Tensor, real: Tensor) -> Found:
    """Frechet and kernel distance of features [N, F, D] and [M, F, D]; intervals by leaving out videos."""
    return {
        "frechet": jackknife(lambda a, b: frechet_distance(as_set(a), as_set(b)), samples, real),
        "kernel": jackknife(lambda a, b: kernel_distance(as_set(a), as_set(b)), samples, real),
    }


def of_clip(frames: Tensor, captions: Tensor, prompts: Sequence[str]) -> Found:
    """CLIP score, 100 max(cosine, 0), mean over frames [N, F, D]; and the share nearest to its own caption of all.

    `captions` [N, D]: of each sample. Both are of length 1.
    """
    alike = torch.einsum("nfd,md->nfm", frames, captions).clamp(min=0).mean(dim=1)  # [N, N]
    found: Found = {"clip_score": mean_of(100 * alike.diagonal())}
    if len(set(prompts)) > 1:
        nearest = alike.argmax(dim=1).tolist()
        found["text_match"] = share_of([prompts[n] == prompts[i] for i, n in enumerate(nearest)])
    return found


def clip_vectors(model: ClipFeatures, prompts: Sequence[str], at_once: int = 32) -> Tensor:
    parts = [model.model.embed_captions(prompts[i : i + at_once]) for i in range(0, len(prompts), at_once)]
    return torch.cat(parts)


def as_json(found: Found) -> dict[str, object]:
    """Numbers alone: a kernel distance of one sample is none."""
    numbers = {name: value.as_json() if isinstance(value, Estimate) else value for name, value in found.items()}
    values = {name: of.value if isinstance(of, Estimate) else of for name, of in found.items()}
    return {name: number for name, number in numbers.items() if math.isfinite(values[name])}
