from __future__ import annotations

import multiprocessing
import random
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from opensora_repro.data.cache import Key, LatentCache


def entry(key: Key) -> dict[str, torch.Tensor]:
    """Values that follow from the key, so that a reader can tell whether they are whole."""
    generator = torch.Generator().manual_seed(hash(key[1]) + sum(key[0].encode()))
    return {
        "moments": torch.randn(8, 2, 4, 4, generator=generator),
        "fps": torch.rand((), generator=generator),
        "text": torch.randn(6, 16, generator=generator),
        "mask": torch.rand(6, generator=generator) < 0.5,
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


FPS = torch.tensor(24.0)
KEYS: list[Key] = [("a", 0), ("a", 1), ("b|0|x", 0), ("ünï/视频 #1", 12)]


def test_round_trip_bit_for_bit(tmp_path: Path) -> None:
    cache = LatentCache(tmp_path, "vae1")
    odd = entry(KEYS[0])
    odd["moments"] = torch.tensor([[0.0, -0.0, float("inf"), 1e-45]]).T  # not contiguous, and not ordinary
    odd["text"] = odd["text"].to(torch.bfloat16)
    cache.put(KEYS[0], odd)
    for key in KEYS[1:]:
        cache.put(key, entry(key))
    assert same(cache.get(KEYS[1]), entry(KEYS[1]))  # before the flush
    cache.flush()
    again = LatentCache(tmp_path, "vae1")
    assert len(again) == 4
    assert same(again.get(KEYS[0]), odd)
    assert torch.signbit(again.get(KEYS[0])["moments"]).flatten().tolist() == [False, True, False, False]
    assert all(same(again.get(key), entry(key)) for key in KEYS[1:])


def test_a_caption_is_kept_once_without_its_padding(tmp_path: Path) -> None:
    """Four draws of two clips with one caption, of which 3 of 100 tokens exist; in shards of two processes."""
    mask = torch.arange(100) < 3
    text = torch.where(mask[:, None], torch.randn(100, 64), 0).bfloat16()
    clips = {("ab"[i % 2], i): torch.randn(8, 1, 2, 2) for i in range(8)}
    caches = [LatentCache(tmp_path, "f") for _ in range(2)]
    for number, (key, moments) in enumerate(clips.items()):
        cache = caches[number // 4]
        assert cache.missing([key]) == [key]
        cache.put(key, {"moments": moments, "fps": FPS, "text": text, "mask": mask})
        if number == 3:
            cache.flush()
    caches[1].flush()
    first, second = sorted(caches[0].folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert first.stat().st_size < 4 * 128 + 3 * 128 + 2000
    assert second.stat().st_size < first.stat().st_size - 3 * 128  # the caption is in the other's
    again = LatentCache(tmp_path, "f")
    for key, moments in clips.items():
        assert same(again.get(key), {"moments": moments, "fps": FPS, "text": text, "mask": mask})
    first.unlink()
    assert LatentCache(tmp_path, "f").missing(clips) == list(clips)  # clips without their caption are encoded again


def test_missing_is_ordered_and_incremental(tmp_path: Path) -> None:
    first = LatentCache(tmp_path, "f")
    assert first.missing(KEYS + KEYS) == KEYS
    first.put(KEYS[2], entry(KEYS[2]))
    first.flush()
    second = LatentCache(tmp_path, "f")
    assert second.missing(KEYS) == [KEYS[0], KEYS[1], KEYS[3]]
    second.put(KEYS[0], entry(KEYS[0]))
    second.flush()
    second.flush()
    assert first.missing(KEYS) == [KEYS[1], KEYS[3]]  # sees what another has written since
    assert same(first.get(KEYS[0]), entry(KEYS[0]))
    assert len(list(first.folder.iterdir())) == 2
    with pytest.raises(KeyError, match="'a', draw 1"):
        first.get(KEYS[1])


def test_another_fingerprint_sees_nothing(tmp_path: Path) -> None:
    cache = LatentCache(tmp_path, "vae1")
    cache.put(KEYS[0], entry(KEYS[0]))
    cache.flush()
    other = LatentCache(tmp_path, "vae2")
    assert other.missing(KEYS) == KEYS
    (shard,) = cache.folder.glob("*.safetensors")
    shard.rename(other.folder / shard.name)  # even where a shard strays into its folder
    assert LatentCache(tmp_path, "vae2").missing(KEYS) == KEYS


def test_a_known_entry_is_left_alone(tmp_path: Path) -> None:
    cache = LatentCache(tmp_path, "f")
    cache.put(KEYS[0], entry(KEYS[0]))
    cache.put(KEYS[0], entry(KEYS[1]))
    cache.flush()
    cache.put(KEYS[0], entry(KEYS[1]))
    cache.flush()
    assert same(LatentCache(tmp_path, "f").get(KEYS[0]), entry(KEYS[0]))


def test_later_changes_of_a_tensor_do_not_reach_the_cache(tmp_path: Path) -> None:
    cache, values = LatentCache(tmp_path, "f"), entry(KEYS[0])
    cache.put(KEYS[0], values)
    values["moments"].zero_()
    cache.get(KEYS[0])["text"].zero_()
    cache.flush()
    assert same(cache.get(KEYS[0]), entry(KEYS[0]))


def test_entries_must_be_complete(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="moments, fps, text, mask"):
        LatentCache(tmp_path, "f").put(KEYS[0], {"moments": torch.zeros(1)})


def test_many_entries_are_written_without_a_flush(tmp_path: Path) -> None:
    cache = LatentCache(tmp_path, "f", shard_bytes=4096)
    for i in range(20):
        cache.put(("s", i), entry(("s", i)))
    assert len(list(cache.folder.glob("*.safetensors"))) == 6
    assert len(LatentCache(tmp_path, "f")) == 18


@pytest.mark.parametrize("damage", ["short", "empty", "noise"])
def test_a_damaged_shard_is_encoded_again(tmp_path: Path, damage: str) -> None:
    cache = LatentCache(tmp_path, "f")
    cache.put(KEYS[0], entry(KEYS[0]))
    cache.flush()
    (shard,) = cache.folder.glob("*.safetensors")
    data = shard.read_bytes()
    shard.write_bytes({"short": data[:-8], "empty": b"", "noise": b"\x10" + bytes(7) + b"\xff" * 64}[damage])
    with pytest.warns(UserWarning, match="unreadable"):
        again = LatentCache(tmp_path, "f")
    assert again.missing(KEYS[:1]) == KEYS[:1]
    again.put(KEYS[0], entry(KEYS[0]))
    again.flush()
    assert same(LatentCache(tmp_path, "f").get(KEYS[0]), entry(KEYS[0]))


def write_many(folder: Path, keys: list[Key], line: Connection) -> None:
    torch.set_num_threads(1)
    cache = LatentCache(folder, "f", shard_bytes=20_000)
    for n, key in enumerate(cache.missing(keys)):
        cache.put(key, entry(key))
        if n == 20:
            line.send("writing")
    cache.flush()


def start_writer(folder: Path, keys: list[Key]) -> multiprocessing.process.BaseProcess:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=write_many, args=(folder, keys, there))
    process.start()
    assert here.poll(60) and here.recv() == "writing"
    return process


def test_killed_writers_lose_nothing_that_was_flushed(tmp_path: Path) -> None:
    """SIGKILL at random moments: what is listed reads back whole, and the next writer continues from there."""
    keys: list[Key] = [("clip", i) for i in range(3000)]
    moments, done = random.Random(0), 0
    for _ in range(4):
        writer = start_writer(tmp_path, keys)
        time.sleep(moments.uniform(0.01, 0.1))
        writer.kill()
        writer.join()
        cache = LatentCache(tmp_path, "f")
        absent = set(cache.missing(keys))
        held = [key for key in keys if key not in absent]
        assert done < len(held) < len(keys)
        assert all(same(cache.get(key), entry(key)) for key in held[::7])
        assert not list(cache.folder.glob("*.tmp"))  # what the killed writer left half done is cleared away
        done = len(held)
    writer = start_writer(tmp_path, keys)
    writer.join()
    cache = LatentCache(tmp_path, "f")
    assert (writer.exitcode, cache.missing(keys)) == (0, [])
    assert all(same(cache.get(key), entry(key)) for key in keys[::50])
