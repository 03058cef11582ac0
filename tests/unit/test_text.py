"""The frozen text encoder: cleaning, masks, truncation, where it is looked for, and clear errors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from opensora_repro.config import TextConfig
from opensora_repro.frozen.pretrained import ModelNotFound
from opensora_repro.frozen.text import MAX_CHARACTERS, T5Text, apply_offload, clean_caption, open_text_encoder
from tests.tiny_models import TINY_TEXT_CHANNELS, make_tiny_text

CAPTIONS = ["A red circle", "", "a", "a blue square moving left, then right"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_text(tmp_path_factory.mktemp("text"))


def load(folder: Path, max_length: int = 20, dtype: torch.dtype = torch.float32) -> T5Text:
    return open_text_encoder(TextConfig(str(folder)), max_length, "cpu", dtype)


@pytest.fixture(scope="module")
def text(folder: Path) -> T5Text:
    return load(folder)


def test_shapes_masks_and_lengths(text: T5Text) -> None:
    embeddings, mask = text.encode(CAPTIONS)
    assert embeddings.shape == (4, 20, TINY_TEXT_CHANNELS) and embeddings.dtype == torch.float32
    assert text.channels == TINY_TEXT_CHANNELS
    assert mask.dtype == torch.bool and mask.device == embeddings.device
    # one token a letter and a space before each word, and the end token; the empty caption is the end token alone
    assert mask.sum(dim=1).tolist() == [len("_a_red_circle") + 1, 1, len("_a") + 1, 20]
    assert all(row == sorted(row, reverse=True) for row in mask.tolist())
    assert not embeddings.requires_grad and not embeddings.is_inference()


def test_a_captions_embedding_is_its_own(text: T5Text) -> None:
    embeddings, mask = text.encode(CAPTIONS)
    for index, caption in enumerate(CAPTIONS):
        alone, alone_mask = text.encode([caption])
        assert torch.equal(alone[0], embeddings[index]) and torch.equal(alone_mask[0], mask[index])
    assert not torch.equal(embeddings[0], embeddings[2])


def test_captions_a_few_at_a_time(text: T5Text) -> None:
    captions = ["a red circle", "", "a blue square moving left", "waves", "a cat"]
    expected, mask = text.encode(captions)
    for size, calls in ((2, [2, 2, 1]), (3, [3, 2]), (8, [5])):
        chunked = T5Text(text.frozen, text.max_length, text.device, text.dtype, size)
        found: list[int] = []
        hook = text.model.register_forward_pre_hook(
            lambda _, __, named, found=found: found.append(len(named["input_ids"])), with_kwargs=True
        )
        embedded, found_mask = chunked.encode(captions)
        hook.remove()
        assert found == calls
        torch.testing.assert_close(embedded, expected)
        assert torch.equal(found_mask, mask)


def test_what_of_a_caption_is_read(text: T5Text) -> None:
    """A token a letter and a space before each word: 19 of 20 tokens are left for words."""
    captions = ["A Red circle", "", "one two three forty six", "abcdefghijklmnopqrstuvwxyz end", "röt circle ☃"]
    readings = text.read(captions)
    assert [reading.dropped for reading in readings] == ["", "", "y six", "stuvwxyz end", ""]
    read = ["a red circle", "", "one two three fort", "abcdefghijklmnopqr", "röt circle ☃"]
    assert [reading.read for reading in readings] == read
    assert [(reading.words, reading.unknown) for reading in readings] == [(3, 0), (0, 0), (5, 0), (2, 0), (3, 2)]
    # ... exactly where the model's own tokens end
    ids, _ = text._tokenize(["one two three four", "one two three forty"])
    last = [text.tokenizer.convert_ids_to_tokens(row)[-2:] for row in ids.tolist()]
    assert last == [["r", "</s>"], ["t", "</s>"]]
    assert [reading.dropped for reading in text.read(["one two three four", "one two three forty"])] == ["", "y"]


def test_scripts_without_spaces_count_by_their_signs(text: T5Text) -> None:
    readings = text.read(["a red circle", "\u4e00\u53ea\u7ea2\u8272\u7684\u5706", "red \u0e41\u0e14\u0e07"])
    assert [(reading.words, reading.unknown) for reading in readings] == [(3, 0), (6, 6), (4, 3)]


# In a tokenizer's folder: the file, what is changed in it
SPACES = {"pre_tokenizer": None, "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}}
CUT = {"direction": "Left", "max_length": 6, "strategy": "LongestFirst", "stride": 0}
ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "filled up in front": ("tokenizer_config.json", {"padding_side": "left"}),
    "cut in front": ("tokenizer_config.json", {"truncation_side": "left"}),
    "cut in front to its own length": ("tokenizer.json", {"truncation": CUT}),
    "no space before the first word": ("tokenizer.json", SPACES),
    "no end token": ("tokenizer.json", {"post_processor": None}),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_tokenizers_read_captions_from_their_beginning(folder: Path, tmp_path: Path, name: str) -> None:
    """And what is told of it is what the ids hold."""
    odd = change(folder, tmp_path / "odd", *ODD[name])
    captions = ["a red circle moves left", "a cat", "one two three forty", "one two three four"]
    text = load(odd)
    ids, mask = text._tokenize(captions)
    assert all(row == sorted(row, reverse=True) for row in mask.tolist())
    for row, caption, reading in zip(ids, captions, text.read(captions), strict=True):
        assert text.tokenizer.decode(row, skip_special_tokens=True).strip() == reading.read
        assert reading.dropped == caption.removeprefix(reading.read).strip()


def change(folder: Path, copy: Path, file: str, changes: dict[str, Any]) -> Path:
    shutil.copytree(folder, copy)
    content = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps(content | changes))
    return copy


def test_of_a_sentence_without_spaces_only_strange_signs_are_unknown(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = [*content["model"]["vocab"], ["\u7ea2", -1.0], ["\u8272", -1.0]]
    odd = change(folder, tmp_path / "odd", "tokenizer.json", {"model": {**content["model"], "vocab": vocabulary}})
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(config | {"vocab_size": len(vocabulary)}))
    readings = load(odd).read(["\u7ea2\u8272\u5706", "\u7ea2\u8272", "\u7ea2cat\u8272\u2603\u3001", "\u5706\u3002"])
    assert [(reading.words, reading.unknown) for reading in readings] == [(3, 1), (2, 0), (4, 1), (1, 1)]


def test_what_lies_beyond_the_longest_caption_is_not_read(folder: Path) -> None:
    tags = "<b>" * (MAX_CHARACTERS // 3)
    (reading,) = load(folder).read([f"{tags}a waves at sea"])
    assert reading.dropped.endswith("waves at sea")


def test_long_captions_keep_the_end_token(text: T5Text) -> None:
    ids, mask = text._tokenize(["a" * 5000])
    assert ids.shape == (1, 20) and mask.all()
    assert ids[0, -1].item() == text.tokenizer.eos_token_id
    embeddings, mask = text.encode([])
    assert embeddings.shape == (0, 20, TINY_TEXT_CHANNELS) and mask.shape == (0, 20) and mask.dtype == torch.bool


def test_embeddings_are_the_librarys(text: T5Text) -> None:
    ids = text.tokenizer(["a red circle"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = text.model(ids).last_hidden_state
    embeddings, mask = text.encode(["A  red circle"])
    torch.testing.assert_close(embeddings[:, mask[0]], expected)


def test_autocast_does_not_reach_the_frozen_model(text: T5Text) -> None:
    expected, _ = text.encode(CAPTIONS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(text.encode(CAPTIONS)[0], expected)
    assert not any(parameter.requires_grad for parameter in text.model.parameters())


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A Red CIRCLE", "a red circle"),
        ("  two\tspaces\n\nand lines\r\n", "two spaces and lines"),
        ("&amp;lt;b&amp;gt;bold&lt;/b&gt; &amp; brave", "bold & brave"),
        ("see https://example.com/a?b=c&d=e or www.example.org now", "see or now"),
        ('<p class="x">a <br/>dog</p> by @someone', "a dog by"),
        ("[a cat](http://example.com) sits", "a cat sits"),
        ("schÃ¶n “quoted”", 'schön "quoted"'),
        ("left\u202etfel\u202c and\u200bzero\x00byte", "left tfel and zerobyte"),
        ("<person> walks", "person walks"),
        ("2 < 3 and 5 > 4, e.g. a@b", "2 < 3 and 5 > 4, e.g. a@b"),
        ("", ""),
        ("<>", "<>"),
    ],
)
def test_clean_caption(caption: str, expected: str) -> None:
    assert clean_caption(caption) == expected
    assert clean_caption(expected) == expected


def test_hostile_captions_cost_little() -> None:
    for caption in (
        "<" * 100_000,
        "&amp;" * 50_000,
        "[" * 100_000,
        "@" * 100_000,
        "http://" * 50_000,
        "\u0301" * 100_000,
    ):
        start = time.process_time()
        assert len(clean_caption(caption)) <= MAX_CHARACTERS
        assert time.process_time() - start < 2


def test_fingerprint(folder: Path, text: T5Text) -> None:
    assert load(folder).fingerprint() == text.fingerprint()
    assert load(folder, max_length=21).fingerprint() != text.fingerprint()
    assert load(folder, dtype=torch.bfloat16).fingerprint() != text.fingerprint()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offload_gives_the_same_bits(folder: Path, dtype: torch.dtype) -> None:
    """Forced on a CPU, where the config key changes nothing."""
    plain, streamed = load(folder, dtype=dtype), load(folder, dtype=dtype)
    apply_offload(streamed.model, torch.device("cpu"))
    for _ in range(2):
        for expected, found in zip(plain.encode(CAPTIONS), streamed.encode(CAPTIONS), strict=True):
            assert torch.equal(expected, found)
        assert {parameter.device.type for parameter in streamed.model.parameters()} == {"meta"}
    asked = open_text_encoder(TextConfig(str(folder), offload=True), 20, "cpu", dtype)
    assert {parameter.device.type for parameter in asked.model.parameters()} == {"cpu"}
    assert asked.fingerprint() == plain.fingerprint()


def check_error(path: str, reason: str) -> None:
    with pytest.raises(ModelNotFound, match=reason) as error:
        open_text_encoder(TextConfig(path), 20, "cpu", torch.float32).frozen.load()
    message = str(error.value)
    assert message.startswith(f"text.path={path}: ") and "\n" not in message and len(message) < 600


def test_wrong_folders_end_in_one_line(folder: Path, tmp_path: Path) -> None:
    check_error(str(tmp_path / "absent"), "no such folder")
    check_error(str(tmp_path), "no config.json in this folder")
    for left_out, reason in (
        ("tokenizer.json", "its tokenizer knows no letters|cannot be loaded"),  # as the library notices it
        ("model.safetensors", "cannot be loaded"),
    ):
        copy = shutil.copytree(folder, tmp_path / left_out)
        for file in copy.glob("tokenizer*" if "tokenizer" in left_out else left_out):
            file.unlink()
        check_error(str(copy), reason)
    copy = shutil.copytree(folder, tmp_path / "too-many-tokens")
    tokenizer = load(folder).tokenizer
    tokenizer.add_tokens(["circle"])
    tokenizer.save_pretrained(copy)
    check_error(str(copy), "its tokenizer has 45 tokens, the model embeds 44")


def test_lacking_weights_are_an_error(folder: Path, tmp_path: Path) -> None:
    """The library alone would draw them at random."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text()) | {"num_layers": 3}
    (copy / "config.json").write_text(json.dumps(config))
    check_error(str(copy), r"weights are missing or misshapen, first encoder\.block\.2")


def test_a_hub_name_that_was_not_fetched() -> None:
    check_error("nobody/no-such-model", "nor in the hub's cache .*; run `hf download nobody/no-such-model` once")
    published = "DeepFloyd/t5-v1_1-xxl"
    check_error(published, f"nor in the hub's cache .*; run `python -m stages.weights fetch {published}` once")


def test_hub_names_are_looked_up_in_the_cache_alone(folder: Path, tmp_path: Path) -> None:
    """A fetched model loads, and an absent one fails in one line, whatever the network could do."""
    cached = tmp_path / "hub" / "models--owner--cached"
    shutil.copytree(folder, cached / "snapshots" / "0123abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123abc")
    script = (
        "import time, torch\n"
        "from opensora_repro.config import TextConfig\n"
        "from opensora_repro.frozen.text import open_text_encoder\n"
        "print(open_text_encoder(TextConfig('owner/cached'), 20, 'cpu', torch.float32).fingerprint())\n"
        "start = time.monotonic()\n"
        "try:\n"
        "    open_text_encoder(TextConfig('owner/absent'), 20, 'cpu', torch.float32)\n"
        "except ValueError as error:\n"
        "    print(error)\n"
        "print(time.monotonic() - start)\n"
    )
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    env |= {"HF_HUB_CACHE": str(tmp_path / "hub")}
    result = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stderr
    found, absent, seconds = result.stdout.splitlines()
    assert found == load(folder).fingerprint()
    assert absent.startswith("text.path=owner/absent: neither a folder here nor in the hub's cache")
    assert "hf download owner/absent" in absent
    assert float(seconds) < 30
