"""Make the demo's text encoder: `python -m opensora_repro.demo.text_encoder --out checkpoints/demo/text`.

A tiny T5 encoder with seeded random weights, and a tokenizer that knows the demo's words; see frozen/own_words.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from opensora_repro.frozen.own_words import build_encoder, build_tokenizer, save_text_encoder, vocabulary

MAX_LENGTH = 8


def words() -> list[str]:
    from opensora_repro.demo.shapes import COLOURS, DIRECTIONS, SHAPES

    return ["a", "moving", *COLOURS, *SHAPES, *DIRECTIONS, "and", "back"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("checkpoints/demo/text"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    num_tokens = len(vocabulary(words()))
    encoder = build_encoder(num_tokens, seed=args.seed)
    save_text_encoder(encoder, build_tokenizer(words(), MAX_LENGTH, prose=False), args.out)
    print(f"wrote {args.out}: {sum(p.numel() for p in encoder.parameters()):,} parameters, {num_tokens} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
