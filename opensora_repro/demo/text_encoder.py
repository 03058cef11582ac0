"""Make the demo's text encoder: `python -m opensora_repro.demo.text_encoder --out checkpoints/demo/text`.

A T5 v1.1 encoder of tiny size with seeded random weights, and a tokenizer that knows the demo's words; any other word
is one unknown token. Nothing needs training: frozen random embeddings already tell the words apart, and the diffusion
model learns what each one means.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from opensora_repro.files import replacing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, T5EncoderModel

WORD_START = "▁"  # sentencepiece's mark for a leading space
SPECIAL = ("<pad>", "</s>", "<unk>")  # T5's ids 0, 1, 2
MAX_LENGTH = 8


def vocabulary() -> list[tuple[str, float]]:
    """Pieces with unigram scores: the special tokens and the demo's words."""
    from opensora_repro.demo.shapes import COLOURS, DIRECTIONS, SHAPES

    words = ["a", "moving", *COLOURS, *SHAPES, *DIRECTIONS]
    return [(token, 0.0) for token in SPECIAL] + [(WORD_START + word, -1.0) for word in words]


def build_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.Unigram(vocabulary(), unk_id=SPECIAL.index("<unk>")))
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
        model_max_length=MAX_LENGTH,
    )


def build_encoder(*, seed: int) -> T5EncoderModel:
    import torch
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(vocabulary()),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5EncoderModel(config).eval()


def name_tokenizer_class(path: Path) -> None:
    """Write the class name that transformers 4 and 5 both know; 5 alone saves its own."""
    settings = json.loads(path.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("checkpoints/demo/text"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    import torch

    out: Path = args.out
    encoder = build_encoder(seed=args.seed)
    with replacing(out) as folder:
        encoder.to(torch.float16).save_pretrained(folder, safe_serialization=True)
        build_tokenizer().save_pretrained(folder)
        name_tokenizer_class(folder / "tokenizer_config.json")
    print(f"wrote {out}: {sum(p.numel() for p in encoder.parameters()):,} parameters, {len(vocabulary())} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
