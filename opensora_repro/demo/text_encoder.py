"""Make the demo's text encoder: `python -m opensora_repro.demo.text_encoder --out checkpoints/demo/text`.

A tiny T5 encoder with seeded random weights, and a tokenizer that knows the demo's words; see frozen/own_words.py. The
words of colours that the demo does not train on come last, and leave the vectors of the others what they are without.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from opensora_repro.frozen.own_words import build_encoder, build_tokenizer, save_text_encoder, vocabulary

if TYPE_CHECKING:
    from transformers import T5EncoderModel

MAX_LENGTH = 8


def trained_words() -> list[str]:
    from opensora_repro.demo.shapes import COLOURS, DIRECTIONS, SHAPES

    return ["a", "moving", *COLOURS, *SHAPES, *DIRECTIONS, "and", "back"]


def words() -> list[str]:
    from opensora_repro.demo.shapes import OTHER_COLOURS

    return [*trained_words(), *OTHER_COLOURS]


def build(seed: int) -> T5EncoderModel:
    """The encoder of the trained words alone, with a vector more for each of the others."""
    import torch

    encoder = build_encoder(len(vocabulary(trained_words())), seed=seed)
    known, more = encoder.get_input_embeddings(), build_encoder(len(vocabulary(words())), seed=seed + 1)
    vectors = more.get_input_embeddings().weight.detach().clone()
    vectors[: len(known.weight)] = known.weight.detach()
    encoder.set_input_embeddings(torch.nn.Embedding.from_pretrained(vectors, freeze=False))
    encoder.config.vocab_size = len(vectors)
    return encoder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("checkpoints/demo/text"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    encoder = build(args.seed)
    save_text_encoder(encoder, build_tokenizer(words(), MAX_LENGTH, prose=False), args.out)
    num_tokens = encoder.config.vocab_size
    print(f"wrote {args.out}: {sum(p.numel() for p in encoder.parameters()):,} parameters, {num_tokens} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
