"""A small feature model trained on the spot: for machines without a network, and for worlds that no other model knows.

It learns from clips to tell the words of their captions, and what was done to them: noise, blur, frames out of order, a
still. So its vectors change with what is shown and with how well. Distances in it compare checkpoints of one world with
each other, never with what others publish.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opensora_repro.data.sampler import keyed_seed
from opensora_repro.evaluation.clips import Clips
from opensora_repro.evaluation.features import Tower, evenly
from opensora_repro.files import Sha256Memo, replacing

SIDE, FRAMES = 32, 8  # pixels and frames that it sees
MOST_WORDS, WORD = 64, re.compile(r"[^\W\d_]+")
KINDS = 5  # as it is, and four that are done to it
STEPS, BATCH_SIZE, RATE = 300, 16, 2e-3


class OwnFeatures:
    def __init__(self, file: Path, device: torch.device) -> None:
        from safetensors.torch import load_file

        self.name, self.device = "own (trained on the spot)", device
        self.fingerprint = Sha256Memo()(file)
        self.tower = Tower()
        self.tower.load_state_dict(load_file(file))
        self.tower.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def features(self, videos: Sequence[np.ndarray]) -> Tensor:
        pixels = torch.stack([small(video) for video in videos]).to(self.device)
        found: Tensor = self.tower(pixels).float().cpu()[:, None]
        return found


def small(video: np.ndarray | Tensor) -> Tensor:
    """uint8 [T, H, W, 3] -> float32 [3, FRAMES (1 of a picture), SIDE, SIDE] in [-1, 1]."""
    frames = np.asarray(video)
    frames = evenly(frames, FRAMES if len(frames) > 1 else 1)
    pixels = torch.tensor(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    return F.interpolate(pixels, (SIDE, SIDE), mode="area").transpose(0, 1).contiguous()


def make_own(file: Path, clips: Clips, count: int, *, seed: int) -> None:
    """Train on at most `count` of the clips that can be read, and write the tower's weights."""
    found = clips.map_videos(range(min(count, len(clips))), lambda videos: [small(video) for video in videos])
    good = [(video, clips.captions[number]) for number, video in enumerate(found) if video is not None]
    train_own(file, torch.stack([video for video, _ in good]), [caption for _, caption in good], seed=seed)


def train_own(file: Path, videos: Tensor, captions: Sequence[str], *, seed: int, steps: int = STEPS) -> None:
    """Train on `small` videos [N, 3, T, H, W] and write the tower's weights. The same input gives the same file."""
    from safetensors.torch import save_file

    words = caption_words(captions)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed(seed, "own features"))
        tower, width = Tower(), 64
        heads = nn.ModuleList([nn.Linear(width, max(1, words.shape[1])), nn.Linear(width, KINDS)])
        parameters = [*tower.parameters(), *heads.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=1e-2)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = RATE * (1 - step / steps)
            chosen = torch.randint(len(videos), (BATCH_SIZE,))
            kinds = torch.randint(KINDS, (BATCH_SIZE,))
            done = torch.stack([alter(videos[i], int(kind)) for i, kind in zip(chosen, kinds, strict=True)])
            found = F.gelu(tower(done))
            loss = F.cross_entropy(heads[1](found), kinds)
            if words.shape[1]:
                loss = loss + F.binary_cross_entropy_with_logits(heads[0](found), words[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as part:
        save_file(tower.state_dict(), part)


def caption_words(captions: Sequence[str]) -> Tensor:
    """Float [N, V]: which of the words that some captions have, and others not, each caption has."""
    found = [set(WORD.findall(caption.lower())) for caption in captions]
    counts = Counter(word for words in found for word in sorted(words))
    telling = [word for word, count in counts.most_common() if 2 <= count < len(captions)][:MOST_WORDS]
    return torch.tensor([[float(word in words) for word in telling] for words in found]).reshape(len(captions), -1)


def alter(video: Tensor, kind: int) -> Tensor:
    """[3, T, H, W] with noise, blurred, its frames out of order, or still; kind 0: as it is."""
    strength = 0.1 + 0.9 * float(torch.rand(()))
    if kind == 1:
        return video + strength * torch.randn_like(video)
    if kind == 2:
        factor = 2 + round(2 * strength)
        coarse = F.avg_pool2d(video, factor, ceil_mode=True)
        return F.interpolate(coarse, video.shape[-2:], mode="bilinear", align_corners=False)
    if kind == 3:
        return video[:, torch.randperm(video.shape[1])]
    if kind == 4:
        return video[:, :1].expand_as(video)
    return video
