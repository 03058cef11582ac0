from __future__ import annotations

import cv2
import numpy as np
import pytest

from opensora_repro.data.score import duplicates
from opensora_repro.data.score.duplicates import (
    CODE_WORDS,
    MAX_DISTANCE,
    clip_code,
    groups_of,
    near_codes,
    num_crowded,
    perceptual_hash,
)
from tests.made_pictures import moving, texture

RANDOM = np.random.default_rng(0)


def distance(first: np.ndarray, second: np.ndarray) -> int:
    return sum(bin(int(word)).count("1") for word in first ^ second)


def changed(frames: np.ndarray, way: str) -> np.ndarray:
    if way == "smaller":
        return np.stack([cv2.resize(frame, (100, 64), interpolation=cv2.INTER_AREA) for frame in frames])
    if way == "compressed":
        coded = [cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, 15])[1] for frame in frames]
        return np.stack([cv2.imdecode(data, cv2.IMREAD_GRAYSCALE) for data in coded])
    if way == "darker":
        return (frames * 0.7).astype(np.uint8)
    noise = RANDOM.normal(0, 6, frames.shape)
    return np.clip(frames + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("way", ["smaller", "compressed", "darker", "noisy"])
def test_the_same_clip_made_differently_has_a_near_code(way: str) -> None:
    frames = moving([(9.0, 4.0)] * 2)
    first, second = clip_code(frames), clip_code(changed(frames, way))
    assert first is not None and second is not None
    assert distance(first, second) <= MAX_DISTANCE


def test_pictures_that_only_look_alike_are_told_apart() -> None:
    """The same kind of texture, and the same one seen a little further on, are no duplicates."""
    frames = moving([(9.0, 4.0)] * 2)
    code = clip_code(frames)
    others = [np.stack([texture(seed=seed)] * 3) for seed in range(1, 6)]
    others.append(moving([(30.0, 20.0), (9.0, 4.0), (9.0, 4.0)])[1:])
    assert all(distance(code, clip_code(other)) > 2 * MAX_DISTANCE for other in others)


def test_flat_pictures_have_no_code() -> None:
    assert clip_code(np.full((3, 64, 64), 90, np.uint8)) is None
    assert not perceptual_hash(np.full((64, 64), 90, np.uint8)).any()


def test_all_pairs_within_the_distance_are_found() -> None:
    codes = RANDOM.integers(0, 1 << 16, (3000, CODE_WORDS), dtype=np.uint16)
    copies = codes[:200].copy()
    for number, row in enumerate(copies):
        for bit in RANDOM.choice(16 * CODE_WORDS, number % (MAX_DISTANCE + 3), replace=False):
            row[bit // 16] ^= np.uint16(1 << (bit % 16))
    found = {tuple(sorted(pair)) for pair in near_codes(np.concatenate([codes, copies]))}
    assert found == {(n, 3000 + n) for n in range(200) if n % (MAX_DISTANCE + 3) <= MAX_DISTANCE}


def test_many_equal_codes_are_one_group_and_cost_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "MAX_BUCKET", 10)
    codes = np.repeat(RANDOM.integers(0, 1 << 16, (2, CODE_WORDS), dtype=np.uint16), 400, axis=0)
    another = codes[:1] ^ np.array([1] + [0] * (CODE_WORDS - 1), np.uint16)  # however many copies lie between
    pairs = list(near_codes(np.concatenate([codes, another])))
    assert groups_of(801, pairs, range(801)) == [0] * 400 + [400] * 400 + [0]
    assert len(pairs) == 2 * 399 + CODE_WORDS - 1


def test_buckets_that_are_not_looked_through_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "MAX_BUCKET", 10)
    codes = RANDOM.integers(0, 1 << 16, (40, CODE_WORDS), dtype=np.uint16)
    assert num_crowded(np.repeat(codes, 30, axis=0)) == 0
    codes[:11, 3] = 7
    assert num_crowded(codes) == 11


def test_groups_join_through_others_and_keep_the_best() -> None:
    assert groups_of(5, [(0, 1), (1, 2)], [3, 1, 2, 0, 4]) == [1, 1, 1, 3, 4]
    assert groups_of(4, [(3, 2), (0, 1), (2, 1)], [0, 1, 2, 3]) == [0, 0, 0, 0]
