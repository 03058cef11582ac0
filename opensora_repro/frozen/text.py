"""What models are conditioned on: captions through the frozen T5 or CLIP text encoder, or class numbers."""

from __future__ import annotations

import html
import re
import statistics
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from opensora_repro.files import sha256_of
from opensora_repro.frozen.pretrained import FrozenModel, HashFile, ModelNotFound, bar_if_large, check_complete
from opensora_repro.kernels.ops import to_device

if TYPE_CHECKING:
    from opensora_repro.config import TextConfig
    from opensora_repro.models.config import ModelConfig
    from opensora_repro.parallel.shards import Shards

KIND = "transformers T5 encoder with its tokenizer"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # as transformers looks for them
TOKENIZER = ("tokenizer.json", "spiece.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
CLIP_KIND = "transformers CLIP text model with its tokenizer"
CLIP_LENGTH, CLIP_CHANNELS = 77, 512  # where a config leaves them out, as transformers takes it
MAX_CHARACTERS = 4096  # far beyond what the encoder reads; bounds the work that a hostile caption can cause
UNKNOWN_WORDS, CUT_CAPTIONS = 0.01, 0.1  # shares from which on a warning is due
LOOKED_AT = 32  # texts by which it is told how a tokenizer takes spaces
CLEANING = 1  # part of the fingerprint: count up when `clean_caption` changes, so that no cache mixes old and new text

_URL = re.compile(r"\b(?:https?://|www\.)\S+")
_TAG = re.compile(r"</?[a-z!][^<>]*>")
_MARKDOWN_LINK = re.compile(r"!?\[([^\[\]]*)\]\([^()]*\)")
# Thai to Lao, Burmese, Khmer, Japanese, Chinese
_UNSPACED = re.compile("([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff])")
_HANDLE = re.compile(r"(?<!\w)@\w+")


def clean_caption(text: str) -> str:
    """Return a caption as T5 should read it: plain lower-case text on one line.

    In the manner of DeepFloyd's caption cleaning, which PixArt and Open-Sora were trained with: broken encodings are
    repaired, HTML entities resolved, addresses, handles, markup and control characters removed. Cleaning twice
    changes nothing.
    """
    text = text[:MAX_CHARACTERS]
    for _ in range(8):  # what is removed may uncover more: `&amp;lt;b&amp;gt;`
        cleaned = _clean_once(text)
        if cleaned == text:
            break
        text = cleaned
    return text


def _clean_once(text: str) -> str:
    import ftfy

    text = html.unescape(ftfy.fix_text(text)).lower()
    text = text.replace("<person>", "person")  # WebVid's placeholder for a name
    text = _MARKDOWN_LINK.sub(r" \1 ", text)
    for pattern in (_TAG, _URL, _HANDLE):
        text = pattern.sub(" ", text)
    # Controls, format characters (invisible, or turning the reading direction) and unassigned code points
    text = "".join(" " if unicodedata.category(character)[0] in "CZ" else character for character in text)
    return " ".join(text.split())


@dataclass(frozen=True)
class Reading:
    """What of a text a model reads. Words are what lies between spaces; where a script has none, its signs."""

    tokens: int  # of the whole text, with those that the tokenizer adds
    words: int
    unknown: int  # words in which the tokenizer meets something that it does not know
    read: str  # the text's beginning, up to its end or to
    dropped: str  # what lies beyond the model's tokens; empty where all is read


def read_texts(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[Reading]:
    """How each text, as the tokenizer is given it, is read by a model of `max_length` tokens."""
    split = [text.split() for text in texts]
    # A word that many captions have is looked at once.
    alone = _ids(tokenizer, (word for words in split for word in words))
    unknown = _unknown(tokenizer, alone)
    ids = [[alone[word] for word in words] for words in split]
    if not _are_apart(tokenizer, split, ids):
        ids = [_ids_within(tokenizer, words) for words in split]
    return [_reading(tokenizer, words, found, unknown, max_length) for words, found in zip(split, ids, strict=True)]


def _ids(tokenizer: Any, texts: Iterable[str]) -> dict[str, list[int]]:
    """Token ids of each of the texts, alone."""
    known = list(dict.fromkeys(texts))
    found = tokenizer(known, add_special_tokens=False, verbose=False).input_ids if known else []
    return dict(zip(known, found, strict=True))


def _unknown(tokenizer: Any, alone: dict[str, list[int]]) -> dict[str, tuple[int, int]]:
    """Of each word: how many it counts as, and how many of these the tokenizer does not know."""
    unk, parts = tokenizer.unk_token_id, {word: _counted(word) for word in alone}
    several = (part for word, own in parts.items() if len(own) > 1 and unk in alone[word] for part in own)
    of_parts = _ids(tokenizer, several)
    return {word: (len(own), sum(unk in of_parts.get(part, alone[word]) for part in own if unk in alone[word]))
            for word, own in parts.items()}  # fmt: skip


def _counted(word: str) -> list[str]:
    """A word itself; of what is written without spaces, its signs and what stands between them, but for points."""
    parts = [part for part in _UNSPACED.split(word) if any(unicodedata.category(sign)[0] != "P" for sign in part)]
    return parts if len(parts) > 1 else [word]


def _are_apart(tokenizer: Any, split: Sequence[list[str]], ids: Sequence[Sequence[Sequence[int]]]) -> bool:
    """Whether a text's tokens are its words', each alone, as with T5's tokenizer and CLIP's; by a few of the texts."""
    some = [number for number, words in enumerate(split) if len(words) > 1][:LOOKED_AT]
    if not some or not tokenizer.is_fast:  # only those tell where their tokens lie
        return True
    whole = tokenizer([" ".join(split[number]) for number in some], add_special_tokens=False, verbose=False).input_ids
    return all(list(chain.from_iterable(ids[number])) == found for number, found in zip(some, whole, strict=True))


def _ids_within(tokenizer: Any, words: Sequence[str]) -> list[list[int]]:
    """Token ids of each word within its text; a token of the space before a word is the word's."""
    found: list[list[int]] = [[] for _ in words]
    ends = list(accumulate((len(word) + 1 for word in words), initial=-1))[1:]
    text = tokenizer(" ".join(words), add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    for token, (start, _) in zip(text.input_ids, text.offset_mapping, strict=True):
        found[bisect_right(ends, start)].append(token)
    return found


def _reading(
    tokenizer: Any, words: Sequence[str], ids: Sequence[Sequence[int]], unknown: dict[str, tuple[int, int]],
    max_length: int,
) -> Reading:  # fmt: skip
    added = tokenizer.num_special_tokens_to_add()
    counts = [unknown[word] for word in words]
    known, strange = (sum(count[column] for count in counts) for column in (0, 1))
    reading = Reading(added + sum(map(len, ids)), known, strange, " ".join(words), "")
    room = max_length - added
    for number, tokens in enumerate(ids):
        if len(tokens) > room:  # of a word that is cut, such as a sentence without spaces, the rest
            part, rest = ("", words[number]) if room <= 0 else map(tokenizer.decode, (tokens[:room], tokens[room:]))
            read, dropped = [*words[:number], part.strip()], [rest.strip(), *words[number + 1 :]]
            return replace(reading, read=" ".join(read).rstrip(), dropped=" ".join(dropped))
        room -= len(tokens)
    return reading


def read_cleaned(tokenizer: Any, captions: Sequence[str], max_length: int) -> list[Reading]:
    """As `read_texts`, of captions that are cleaned as `T5Text` does; what lies beyond MAX_CHARACTERS is dropped."""
    readings = read_texts(tokenizer, [clean_caption(caption) for caption in captions], max_length)
    return [
        replace(reading, dropped=f"{reading.dropped}{caption[MAX_CHARACTERS:]}".strip())
        for reading, caption in zip(readings, captions, strict=True)
    ]


def survey_captions(text: T5Text, looked: Sequence[str], total: int, prompts: Sequence[str]) -> Iterator[str]:
    """Lines for people: how many captions the model reads to their end, and knows the words of; what prompts lose.

    `looked`: a sample of the `total` captions. This is where training counts them.
    """
    tokenizer, limit = text.load_tokenizer(), text.max_length
    readings = read_cleaned(tokenizer, looked, limit)
    cut = sum(bool(reading.dropped) for reading in readings) / len(readings)
    length = statistics.median(reading.tokens for reading in readings)
    sampled = f" ({len(looked):,} of {total:,} looked at)" if len(looked) < total else ""
    told = "none is longer than" if not cut else f"{_share(cut)} are cut, longer than"
    warning = "warning: " if cut > CUT_CAPTIONS else ""
    yield f"{warning}captions{sampled}: median length {length:g} tokens; {told} the {limit} that the model reads"
    unknown = sum(reading.unknown for reading in readings) / max(1, sum(reading.words for reading in readings))
    if unknown:
        warning = "warning: " if unknown > UNKNOWN_WORDS else ""
        yield f"{warning}captions{sampled}: {_share(unknown)} of the words are unknown to this tokenizer"
    for prompt, reading in zip(prompts, read_cleaned(tokenizer, prompts, limit), strict=True):
        if reading.dropped:
            yield f"warning: of the sample prompt {prompt[:40]!r}... the model does not read {reading.dropped[:200]!r}"


def _share(value: float) -> str:
    """Of a part above 0, which is not told to be none."""
    return f"{100 * value:.0f} %" if value > 0.01 else f"{100 * value:.2g} %"


class _TextModel:
    """A transformers text model and its tokenizer, both loaded when first needed."""

    frozen: FrozenModel[tuple[Any, Any]]

    @property
    def model(self) -> Any:
        """Raises ModelNotFound."""
        return self.frozen.model[0]

    @property
    def tokenizer(self) -> Any:
        """Raises ModelNotFound."""
        return self.frozen.model[1]


class T5Text(_TextModel):
    """A T5 encoder and its tokenizer; every caption becomes `max_length` tokens and a mask.

    Both are loaded at the first encoding; `channels` and `fingerprint` need neither.
    """

    def __init__(
        self,
        frozen: FrozenModel[tuple[Any, Any]],
        max_length: int,
        device: torch.device,
        dtype: torch.dtype,
        micro_batch_size: int = 1,
        shards: Shards | None = None,
    ) -> None:
        """`frozen` gives the model and its tokenizer, `device` is where it computes. Raises ModelNotFound.

        `shards`: the processes over which the model's weights are spread; see `join`.
        """
        if max_length < 1:
            raise ValueError(f"model.model_max_length={max_length} must be at least 1")
        self.frozen = frozen
        self.max_length = max_length
        self.device, self.dtype = device, dtype
        self.micro_batch_size, self.shards = micro_batch_size, shards
        self.channels = frozen.size("d_model")

    def load_tokenizer(self) -> Any:
        """The tokenizer alone, for looking at captions; read anew at each call. Raises ModelNotFound."""

        def load(path: str, **options: Any) -> Any:
            tokenizer = _tokenizer(path, **options)
            _check_tokenizer(tokenizer, self.frozen.config.get("vocab_size", len(tokenizer)))
            return tokenizer

        return self.frozen.part(load)

    def fingerprint(self, hash_file: HashFile = sha256_of) -> str:
        """Hash of what decides the embeddings: the files, the dtype, the length, and how captions are cleaned."""
        return self.frozen.fingerprint(hash_file, self.dtype, self.max_length, CLEANING)

    @torch.no_grad()  # not inference mode: the embeddings may be saved for a backward pass
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return float32 embeddings [B, L, Ct] and a bool mask [B, L]; an empty caption is the end token alone.

        They are encoded `micro_batch_size` at a time. Where that is 1, as for loaded encoders on a CPU, a caption's
        embedding does not depend on its neighbours, bit for bit; else to rounding. The mask lies in host memory, where
        lengths are read from it without waiting for the encoder's device.
        """
        device = self.device  # an offloaded model's weights lie elsewhere
        ids, host_mask = self._tokenize(captions)
        ids, mask = to_device(ids, device), to_device(host_mask, device)
        starts = range(0, len(ids), self.micro_batch_size)
        passes = self.shards.most(len(starts)) if self.shards is not None and starts else len(starts)
        batches = [torch.empty(0, self.max_length, self.channels, device=device)]
        for start in starts:
            part = slice(start, start + self.micro_batch_size)
            batches.append(self._forward(ids[part], mask[part]))
        self._stand_in(passes - len(starts))
        return torch.cat(batches), host_mask.bool()

    def join(self) -> None:
        """Make the forward passes that others need of this process, until every process has come here.

        Where the weights are spread, each process may `encode` as often as it likes between two calls of this. Where
        they are not, there is nothing to do.
        """
        while self.shards is not None and (passes := self.shards.most(0)):
            self._stand_in(passes)

    def _forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):  # the weights' dtype decides, not the caller's
            output: Tensor = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return output.float()

    @torch.no_grad()
    def _stand_in(self, passes: int) -> None:
        """Forward passes of one token, for the sake of those that gather this process's shares."""
        token = torch.ones(1, 1, dtype=torch.int64, device=self.device)
        for _ in range(passes):
            self._forward(token, token)

    def read(self, captions: Sequence[str]) -> list[Reading]:
        """What of each caption, once cleaned, the model reads; its weights are not needed. Raises ModelNotFound."""
        tokenizer = self.tokenizer if self.frozen.loaded else self.load_tokenizer()
        return read_cleaned(tokenizer, captions, self.max_length)

    def _tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return int64 token ids and mask, both [B, L]; long captions are cut, keeping the end token."""
        if not captions:
            empty = torch.empty(0, self.max_length, dtype=torch.int64)
            return empty, empty
        batch = self.tokenizer(
            [clean_caption(caption) for caption in captions],
            max_length=self.max_length,
            padding="max_length",
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return batch["input_ids"], batch["attention_mask"]


class EncodedPrompts:
    """Prompts that a text encoder has read already, so that it need not be at hand where they are sampled."""

    def __init__(self, text: T5Text, prompts: Sequence[str]) -> None:
        """Collective where the encoder's weights are spread."""
        self.channels = text.channels
        embeddings, masks = text.encode(prompts)
        self._found = dict(zip(prompts, zip(embeddings, masks, strict=True), strict=True))

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """As `T5Text.encode`, of some of the prompts."""
        embeddings, masks = zip(*(self._found[prompt] for prompt in prompts), strict=True)
        return torch.stack(embeddings), torch.stack(masks)


def open_text_encoder(
    cfg: TextConfig,
    max_length: int,
    device: torch.device | str,
    dtype: torch.dtype,
    shards: Shards | None = None,
) -> T5Text:
    """Encoder and tokenizer of `cfg.path`, a local folder or a hub name, read when first needed.

    Raises ModelNotFound for what can be seen without.
    """
    device = torch.device(device)

    def load(path: str, **options: Any) -> tuple[Any, Any]:
        from transformers import T5EncoderModel

        bar_if_large(path)
        tokenizer = _tokenizer(path, **options)
        model, info = T5EncoderModel.from_pretrained(path, torch_dtype=dtype, output_loading_info=True, **options)
        check_complete(info)
        _check_tokenizer(tokenizer, model.config.vocab_size)
        model.eval().requires_grad_(False)
        if shards is not None:
            shards.apply(_parts(model))
            return model, tokenizer
        if cfg.offload and device.type != "cpu":
            return apply_offload(model, device), tokenizer
        return model.to(device), tokenizer

    frozen = FrozenModel(load, cfg.path, key="text.path", kind=KIND, weights=WEIGHTS, tokenizer=TOKENIZER)
    micro_batch_size = 1 if device.type == "cpu" else cfg.micro_batch_size
    return T5Text(frozen, max_length, device, dtype, micro_batch_size, shards)


def _parts(model: Any) -> list[tuple[nn.Module, ...]]:
    """All of a T5 encoder, in parts that compute one after the other."""
    encoder = model.encoder
    blocks = [(block,) for block in encoder.block]
    return [(model.shared, encoder.embed_tokens), *blocks, (encoder.final_layer_norm,)]


def apply_offload(model: nn.Module, device: torch.device) -> nn.Module:
    """Keep the weights in host memory; each layer's are on `device` during its own forward alone.

    The same numbers meet the same kernels, so the results are the same bit for bit.
    """
    from accelerate import cpu_offload

    if device.type == "cuda":
        for parameter in model.parameters():
            try:
                parameter.data = parameter.data.pin_memory()  # copied to the GPU about twice as fast
            except RuntimeError:  # the machine lets no more memory be pinned
                break
    return cpu_offload(model, device, state_dict=model.state_dict())  # the dict shares the weights: no second copy


class ClipText(_TextModel):
    """A CLIP text model and its tokenizer; every caption becomes one pooled token, as Open-Sora's DiT and Latte read.

    Captions go to the tokenizer as they are: Open-Sora cleans them for T5 alone.
    """

    def __init__(self, frozen: FrozenModel[tuple[Any, Any]]) -> None:
        """`frozen` gives the model and its tokenizer at the first encoding. Raises ModelNotFound for another model."""
        kind = frozen.config.get("model_type")
        if kind not in ("clip", "clip_text_model"):
            raise ModelNotFound(f"{frozen.where}: cannot be loaded as a {frozen.kind} (its model_type is {kind!r})")
        self.frozen = frozen
        config = frozen.config.get("text_config") or frozen.config  # of the whole CLIP, or of its text half alone
        self.max_length = int(config.get("max_position_embeddings", CLIP_LENGTH))
        self.channels = int(config.get("hidden_size", CLIP_CHANNELS))

    def read(self, captions: Sequence[str]) -> list[Reading]:
        """What of each caption the model reads; its weights are not needed. Raises ModelNotFound."""
        tokenizer = self.tokenizer if self.frozen.loaded else self.frozen.part(_tokenizer)
        return read_texts(tokenizer, captions, self.max_length)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, None]:
        """Return float32 embeddings [B, 1, Ct] and no mask; a caption is encoded alone, whatever its neighbours."""
        device = self.model.device
        pooled = [torch.empty(0, self.channels, device=device)]
        with torch.autocast(device.type, enabled=False):  # the weights' dtype decides, not the caller's
            for caption in captions:
                ids = self.tokenizer(
                    caption[:MAX_CHARACTERS],
                    max_length=self.max_length,
                    padding="max_length",
                    truncation=True,
                    return_tensors="pt",
                )["input_ids"]
                pooled.append(self.model(input_ids=ids.to(device)).pooler_output.float())
        return torch.cat(pooled)[:, None], None


def open_clip_text(cfg: TextConfig, device: torch.device | str, dtype: torch.dtype) -> ClipText:
    """The text half of a CLIP model, `cfg.path`, a local folder or a hub name, read when first needed.

    Open-Sora conditioned DiT and Latte on openai/clip-vit-base-patch32. Raises ModelNotFound for what can be seen
    without.
    """

    def load(path: str, **options: Any) -> tuple[Any, Any]:
        from transformers import CLIPTextModel

        bar_if_large(path)
        tokenizer = _tokenizer(path, **options)
        model, info = CLIPTextModel.from_pretrained(path, torch_dtype=dtype, output_loading_info=True, **options)
        check_complete(info)
        _check_tokenizer(tokenizer, model.config.vocab_size)
        return model.to(device).eval().requires_grad_(False), tokenizer

    files = (*TOKENIZER, "vocab.json", "merges.txt")
    return ClipText(FrozenModel(load, cfg.path, key="text.path", kind=CLIP_KIND, weights=WEIGHTS, tokenizer=files))


def _tokenizer(path: str, **options: Any) -> Any:
    """Captions begin where their row does, whatever the folder says: they are cut and filled up at their end."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, **options)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer


class ClassLabels:
    """Prompts that are class numbers, for models conditioned on a class."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, None]:
        """Return int64 labels [B] and no mask. Raises ValueError for a prompt that is not a class number."""
        for prompt in prompts:
            if not prompt.strip().isdecimal() or int(prompt) >= self.num_classes:
                raise ValueError(f"prompt {prompt!r}: expected a class number, 0 to {self.num_classes - 1}")
        return torch.tensor([int(prompt) for prompt in prompts], dtype=torch.int64), None


# Whose `encode` makes prompts a condition, one row a prompt, and the mask of its tokens or None.
ConditionEncoder = T5Text | ClipText | ClassLabels


def open_conditions(
    cfg: TextConfig,
    model: ModelConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    shards: Shards | None = None,
) -> ConditionEncoder:
    """What reads prompts for a model, its weights read when first needed; T5's may be spread. Raises ModelNotFound."""
    if model.conditioning == "class":
        return ClassLabels(model.num_classes)
    if model.conditioning == "clip":
        return open_clip_text(cfg, device, dtype)
    return open_text_encoder(cfg, model.model_max_length, device, dtype, shards)


def _check_tokenizer(tokenizer: Any, vocab_size: int) -> None:
    """Raise ValueError for a tokenizer that is not the model's: without files, the library makes up an empty one."""
    ids = tokenizer("a", add_special_tokens=False).input_ids
    if not ids or tokenizer.unk_token_id in ids:
        raise ValueError("its tokenizer knows no letters; are the tokenizer's files there?")
    if tokenizer.pad_token_id is None:
        raise ValueError("its tokenizer has no padding token, which fills up short captions: name one as pad_token")
    if len(tokenizer) > vocab_size:
        raise ValueError(f"its tokenizer has {len(tokenizer)} tokens, the model embeds {vocab_size}")


@torch.no_grad()
def take_null_caption(model: nn.Module, text: T5Text) -> None:
    """For weights without a null caption (diffusers'): the empty text's encoding, as their pipelines use it."""
    encoded, _ = text.encode([""])
    model.get_buffer("y_embedder.y_embedding").copy_(encoded[0])
