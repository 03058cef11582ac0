"""Frozen models before and after their weights are read: what is known without, what is refused, what is remembered."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opensora_repro import files
from opensora_repro.config import Config, parse_config
from opensora_repro.config.sections import encodes_after_start, encodes_always
from opensora_repro.data.cache import LatentCache
from opensora_repro.data.dataset import BadSample, Clip
from opensora_repro.files import Sha256Memo, sha256_of
from opensora_repro.frozen.encoder import Encoded, Encoder, open_encoder, skipped_models
from opensora_repro.frozen.pretrained import FrozenModel, ModelNotFound
from opensora_repro.training import fill
from opensora_repro.training.fill import cache_fingerprint
from tests.tiny_models import TINY_LATENT_CHANNELS, TINY_STRIDE, TINY_TEXT_CHANNELS, make_tiny_text, make_tiny_vae

CPU = torch.device("cpu")
VAE_WEIGHTS, TEXT_WEIGHTS = "diffusion_pytorch_model.safetensors", "model.safetensors"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("frozen")
    make_tiny_vae(root / "vae")
    make_tiny_text(root / "text")
    return root


@pytest.fixture
def folder(originals: Path, tmp_path: Path) -> Path:
    """The two models' folders, to spoil."""
    return shutil.copytree(originals, tmp_path / "frozen")


def config(folder: Path, **changes: object) -> Config:
    vae, text = {"path": str(folder / "vae")}, {"path": str(folder / "text")}
    data = {"draws": 1, "cache": str(folder / "cache")}
    return parse_config({"vae": vae, "text": text, "data": data, "model": {"model_max_length": 12}, **changes})


def change(file: Path, old: bytes, new: bytes) -> None:
    """Replace bytes by as many others, and let some time pass."""
    content = file.read_bytes()
    assert old in content and len(old) == len(new)
    stat = file.stat()
    file.write_bytes(content.replace(old, new))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def change_last_byte(file: Path) -> None:
    last = file.read_bytes()[-4:]
    change(file, last, bytes(byte ^ 1 for byte in last))


def test_weights_are_read_at_the_first_use(folder: Path) -> None:
    encoder = open_encoder(config(folder), CPU)
    vae, text = encoder.vae, encoder.text
    assert (vae.spatial_stride, vae.latent_channels) == (TINY_STRIDE, TINY_LATENT_CHANNELS)
    assert (text.channels, text.max_length) == (TINY_TEXT_CHANNELS, 12)
    vae.sample_latents(torch.zeros(2 * TINY_LATENT_CHANNELS, 1, 4, 4), torch.Generator())
    cache_fingerprint(config(folder), encoder)
    assert encoder.not_loaded() == ["text encoder", "autoencoder"]
    embedding, _ = encoder.encode_caption("a red square")
    assert encoder.not_loaded() == ["autoencoder"]
    moments = vae.encode_moments(torch.zeros(3, 1, 16, 16))
    assert encoder.not_loaded() == []

    encoder.release()
    assert encoder.not_loaded() == ["text encoder", "autoencoder"]
    assert torch.equal(encoder.encode_caption("a red square")[0], embedding)
    assert torch.equal(vae.encode_moments(torch.zeros(3, 1, 16, 16)), moments)
    assert open_encoder(config(folder), CPU).load().not_loaded() == []


def clips(*captions: str) -> list[Clip]:
    """Of different lengths."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(1 + i % 3, 16, 16, 3) for i in range(len(captions))]
    pixels = [torch.randint(256, size, generator=generator, dtype=torch.uint8) for size in sizes]
    return [
        Clip(str(i), caption, frames, False, 8.0)
        for i, (frames, caption) in enumerate(zip(pixels, captions, strict=True))
    ]


def test_a_gpu_encodes_whole_micro_batches_and_a_cpu_clip_by_clip(folder: Path) -> None:
    """Of 9 frames 4 at a time, of 4 captions 2; a CPU takes each alone, with the same bits whoever its neighbours."""
    cfg = config(folder, vae={"path": str(folder / "vae"), "micro_batch_size": 4})
    encoder = open_encoder(cfg, CPU)
    calls: list[str] = []
    encoder.vae.vae.encoder.register_forward_pre_hook(lambda *_: calls.append("frames"))
    encoder.text.model.register_forward_pre_hook(
        lambda _model, _args, given: calls.append(f"{len(given['input_ids'])} captions"), with_kwargs=True
    )
    samples: list[Any] = clips("a red square", "", "a blue circle", "a red square", "green")
    samples.insert(2, BadSample("x", "x.mp4", "ends early"))
    alone = list(encoder.encoded(samples))
    assert calls == ["frames", "1 captions"] * 3 + ["frames"] + ["frames", "1 captions"]  # one caption is known
    (last,) = encoder.encoded(samples[-1:])
    assert isinstance(last, Encoded) and torch.equal(last.moments, alone[-1].moments)

    calls.clear()
    encoder.together, encoder.text.micro_batch_size = True, 2
    together = list(encoder.encoded(samples, len(samples)))
    assert calls == ["frames"] * 3 + ["2 captions"] * 2
    calls.clear()
    assert [sample.id for sample in encoder.encoded(samples)] == ["0", "1", "x", "2", "3", "4"]
    assert calls == ["frames", "2 captions", "frames", "1 captions", "frames", "2 captions"]  # two samples at a time
    assert together[2] is alone[2] is samples[2]
    for one, other in zip(alone, together, strict=True):
        if isinstance(one, Encoded) and isinstance(other, Encoded):
            assert one.id == other.id and torch.equal(one.mask, other.mask)
            torch.testing.assert_close(one.moments, other.moments, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(one.text, other.text, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_embeddings_leave_as_the_model_reads_them(folder: Path, dtype: str) -> None:
    """Rounded where it trains in bfloat16, zero where there is no token."""
    encoder = open_encoder(config(folder, train={"dtype": dtype}), CPU)
    embeddings, masks = encoder.text.encode(["red"])
    text, mask = encoder.encode_caption("red")
    assert text.dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)
    assert torch.equal(text[mask], embeddings[0][masks[0]].to(text.dtype))
    assert not text[~mask].any() and (~mask).any()
    other = open_encoder(config(folder, train={"dtype": "fp32" if dtype == "bf16" else "bf16"}), CPU)
    assert cache_fingerprint(config(folder), encoder) != cache_fingerprint(config(folder), other)


def test_what_a_run_needs() -> None:
    def resources(**sections: object) -> tuple[bool, bool]:
        cfg = parse_config({"data": {"draws": 1, "cache": "somewhere", "val_manifest": "val"}, **sections})
        return encodes_always(cfg), encodes_after_start(cfg)

    assert resources() == (False, False)
    assert resources(data={}) == (True, True)
    assert resources(validation={"every": 5}) == (True, False)
    assert resources(sample={"every": 5, "prompts": ["a"]}) == (True, True)


def test_only_what_no_process_loaded_was_skipped() -> None:
    both = ["text encoder", "autoencoder"]
    assert skipped_models([both]) == "text encoder and autoencoder not loaded: everything is in the cache"
    assert skipped_models([both, ["autoencoder"]]) == "autoencoder not loaded: everything is in the cache"
    assert skipped_models([both, []]) == ""


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def shard(file: Path, present: bool = False) -> None:
    """Weights under an index that lists one shard."""
    name = "part-1.safetensors"
    file.rename(file.with_name(name))
    index = file.with_name(f"{file.name}.index.json")
    index.write_text(json.dumps({"weight_map": {"some.weight": name}}))
    if not present:
        file.with_name(name).unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "vae" / VAE_WEIGHTS).unlink(), f"vae.path=.*: cannot be loaded as .*no {VAE_WEIGHTS} or"),
        (lambda root: cut(root / "vae" / VAE_WEIGHTS), f"vae.path=.*{VAE_WEIGHTS}: .*was it copied whole"),
        (lambda root: cut(root / "text" / TEXT_WEIGHTS), f"text.path=.*{TEXT_WEIGHTS}: .*was it copied whole"),
        (lambda root: shard(root / "text" / TEXT_WEIGHTS), "text.path=.*part-1.safetensors is missing, which"),
        (lambda root: (root / "text" / "config.json").write_text("{"), "text.path=.*config.json holds no JSON object"),
        (
            lambda root: (root / "vae" / "config.json").write_text("{}"),
            "vae.path=.*config.json has no number latent_channels",
        ),
        (lambda root: [file.unlink() for file in (root / "text").glob("*token*")], "text.path=.*tokenizer's files"),
        (
            lambda root: shutil.copytree(root / "vae", root / "text", dirs_exist_ok=True),
            "text.path=.*no number d_model",
        ),
    ],
)
def test_what_can_be_seen_is_refused_without_loading(folder: Path, spoil, message: str) -> None:  # type: ignore[no-untyped-def]
    spoil(folder)
    with pytest.raises(ModelNotFound, match=message) as error:
        open_encoder(config(folder), CPU)
    assert "\n" not in str(error.value)


def test_no_memory_to_load_is_no_fault_of_the_files(folder: Path) -> None:
    def load(path: str, **options: Any) -> torch.Tensor:
        return torch.empty(1 << 50)

    model = FrozenModel(load, str(folder / "vae"), key="vae.path", kind="autoencoder", weights=(VAE_WEIGHTS,))
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        model.load()


def test_shards_and_pickled_weights_are_found(folder: Path) -> None:
    weights = folder / "text" / TEXT_WEIGHTS
    shard(weights, present=True)
    names = [file.name for file in open_encoder(config(folder), CPU).text.frozen.files]
    assert names[:3] == ["config.json", f"{TEXT_WEIGHTS}.index.json", "part-1.safetensors"]
    assert "tokenizer.json" in names
    encoder = open_encoder(config(folder), CPU)
    torch.save(encoder.vae.vae.state_dict(), folder / "vae" / "diffusion_pytorch_model.bin")
    moments = encoder.vae.encode_moments(torch.zeros(3, 1, 16, 16))
    (folder / "vae" / VAE_WEIGHTS).unlink()
    pickled = open_encoder(config(folder), CPU).vae
    assert pickled.frozen.files[1].suffix == ".bin"
    assert torch.equal(pickled.encode_moments(torch.zeros(3, 1, 16, 16)), moments)


def test_the_caches_fingerprint_follows_every_file(folder: Path) -> None:
    def current(cfg: Config | None = None) -> str:
        cfg = cfg or config(folder)
        return cache_fingerprint(cfg, open_encoder(cfg, CPU))

    seen = [current()]
    assert current() == seen[0]
    assert current(config(folder, text={"path": str(folder / "text"), "offload": True})) == seen[0]
    elsewhere = shutil.copytree(folder, folder.parent / "elsewhere")
    assert current(config(elsewhere)) == seen[0]
    for name in (f"vae/{VAE_WEIGHTS}", f"text/{TEXT_WEIGHTS}"):
        change_last_byte(folder / name)
        seen.append(current())
    change(folder / "text" / "tokenizer.json", b'"q"', b'"Q"')
    seen.append(current())
    change(folder / "vae" / "config.json", b'"silu"', b'"relu"')
    seen.append(current())
    assert len(set(seen)) == 5

    text = open_encoder(config(folder), CPU).text
    longer = open_encoder(config(folder, model={"model_max_length": 13}), CPU).text
    assert text.fingerprint() != longer.fingerprint()
    bf16 = Encoder(open_encoder(config(folder), CPU).vae, text, CPU, half=True)
    assert cache_fingerprint(config(folder), bf16) != seen[-1]


def test_a_file_is_hashed_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def counted(file: Path) -> str:
        read.append(file.name)
        return sha256_of(file)

    monkeypatch.setattr(files, "sha256_of", counted)
    memo, file = tmp_path / "cache" / "memo.json", tmp_path / "weights"
    file.write_bytes(b"one")
    first = Sha256Memo.in_file(memo)(file)
    assert first == sha256_of(file)
    link = tmp_path / "link"
    link.symlink_to(file)
    assert Sha256Memo.in_file(memo)(link) == first and read == ["weights"]

    change(file, b"one", b"two")  # as long as before
    assert Sha256Memo.in_file(memo)(file) == sha256_of(file) != first and len(read) == 2
    assert len(json.loads(memo.read_text())) == 1
    for damaged in ("", "[]", "{", json.dumps({str(file): 3}), json.dumps({str(file): [3, None, "0"]})):
        memo.write_text(damaged)
        assert Sha256Memo.in_file(memo)(file) == sha256_of(file)
    assert len(read) == 7
    assert list(memo.parent.iterdir()) == [memo]


def test_a_memo_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert Sha256Memo.in_file(tmp_path / "file" / "memo.json")(tmp_path / "file") == sha256_of(tmp_path / "file")


def test_two_processes_fill_everything_between_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when one has written its share before the other looks at what is missing."""

    class Zeros:
        def encoded(self, clips: Iterable[str]) -> Iterator[Encoded]:
            moments, text, mask = torch.zeros(8, 1, 2, 2), torch.zeros(2, 4), torch.ones(2, dtype=torch.bool)
            return (Encoded(clip, moments, text, mask, torch.tensor(8.0)) for clip in clips)

    class Rows:
        draws = 2

        def __len__(self) -> int:
            return 5

        def shape(self, index: int, draw: int) -> None:
            return None

        def key(self, index: int, draw: int) -> tuple[str, int]:
            return "abcde"[index], draw

        def keys(self) -> list[tuple[str, int]]:
            return [self.key(index, draw) for index in range(5) for draw in range(2)]

    rows, dataset = Rows(), SimpleNamespace()
    monkeypatch.setattr(fill, "_load", lambda dataset, pairs, shapes, workers: [rows.key(i, d)[0] for d, i in pairs])
    caches = [LatentCache(tmp_path, "same"), LatentCache(tmp_path, "same")]
    for rank, cache in enumerate(caches):
        share = fill.CacheFill(dataset, rows, Zeros(), cache, num_workers=0, rank=rank, world_size=2)
        assert all(bad is None for _, bad in share.encode())
        assert len(cache.missing(rows.keys())) == (4 if rank == 0 else 0)
