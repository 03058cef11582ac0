"""A tokenizer of one's own words and a tiny T5 encoder for them, for machines without a hub.

The encoder is T5 v1.1's architecture with seeded random weights. Nothing needs training: frozen random embeddings
already tell words apart, and the diffusion model learns what each one means. What it cannot do follows from that: a
word that is not in the vocabulary is one unknown token like any other, and no word is near to another in meaning.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_repro.files import replacing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, T5EncoderModel

WORD_START = "▁"  # sentencepiece's mark for a leading space
SPECIAL = ("<pad>", "</s>", "<unk>")  # T5's ids 0, 1, 2
_WORD = re.compile(r"\w+")
NO_WORD = r"[^\w]+"  # what stands between words: to the tokenizer a space


@dataclass(frozen=True)
class Words:
    """The words of captions, most frequent first, and what was counted of them."""

    known: tuple[str, ...]
    num_left_out: int  # different words that found no place
    share_left_out: float  # of all words as they stand in the captions
    longest: int  # words of the longest caption


def count_words(captions: Iterable[str], most: int) -> Words:
    """Read captions as the text encoder does; keep the `most` frequent words, of equally frequent ones by alphabet."""
    from opensora_repro.frozen.text import clean_caption

    counts: Counter[str] = Counter()
    longest = 0
    for caption in captions:
        found = _WORD.findall(clean_caption(caption))
        counts.update(found)
        longest = max(longest, len(found))
    ordered = sorted(counts, key=lambda word: (-counts[word], word))
    left_out = sum(counts[word] for word in ordered[most:])
    share = left_out / max(1, counts.total())
    return Words(tuple(ordered[:most]), max(0, len(ordered) - most), share, longest)


def vocabulary(words: Sequence[str]) -> list[tuple[str, float]]:
    """Pieces with unigram scores: the special tokens and the words."""
    return [(token, 0.0) for token in SPECIAL] + [(WORD_START + word, -1.0) for word in words]


def build_tokenizer(words: Sequence[str], max_length: int, *, prose: bool = True) -> PreTrainedTokenizerFast:
    """`prose`: what stands between words, such as a comma, is a space, and a word is known whole or not at all."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    unknown = SPECIAL.index("<unk>")
    model: Any = models.Unigram(vocabulary(words), unk_id=unknown)
    if prose:
        ids = {piece: number for number, (piece, _) in enumerate(vocabulary(words))}
        model = models.WordLevel(ids, unk_token=SPECIAL[unknown])
    tokenizer = Tokenizer(model)
    if prose:
        spaces = [normalizers.Replace(Regex(NO_WORD), " "), normalizers.Strip()]
        tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", SPECIAL.index("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=max_length,
    )


def build_encoder(
    num_tokens: int, *, seed: int, hidden_size: int = 64, depth: int = 2, num_heads: int = 4
) -> T5EncoderModel:
    import torch
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=num_tokens,
        d_model=hidden_size,
        d_kv=hidden_size // num_heads,
        d_ff=2 * hidden_size,
        num_layers=depth,
        num_heads=num_heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return T5EncoderModel(config).eval()


def save_text_encoder(encoder: T5EncoderModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the folder that `text.path` takes, in half precision."""
    import torch

    with replacing(out) as folder:
        encoder.to(torch.float16).save_pretrained(folder, safe_serialization=True)
        tokenizer.save_pretrained(folder)
        _name_tokenizer_class(folder / "tokenizer_config.json")


def _name_tokenizer_class(path: Path) -> None:
    """Write the class name that transformers 4 and 5 both know; 5 alone saves its own."""
    settings = json.loads(path.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n")
