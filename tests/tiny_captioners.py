"""Tiny vision-language models on disk, in the formats of the real ones: BLIP-2, LLaVA and Qwen2-VL.

Random but seeded, with weights large enough that what they write depends on what they see.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.tiny_models import LETTERS

WORDS = [f"{a}{b}" for a in "bdfgklmnprst" for b in "aeiou"]
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }} {% else %}PLACE {% endif %}"
    "{% endfor %}{% endfor %}answer "
)


def make_tiny_blip2(folder: Path) -> Path:
    """Write a BLIP-2 with an OPT model."""
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        BlipImageProcessor,
        OPTConfig,
    )

    tokenizer = _tokenizer("<image>")
    vision = Blip2VisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4
    )
    q_former = Blip2QFormerConfig(
        vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        encoder_hidden_size=16,
    )  # fmt: skip
    text = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
        word_embed_proj_dim=16, max_position_embeddings=128, **_ends(tokenizer),
    )  # fmt: skip
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = Blip2Config(
        vision_config=vision.to_dict(), qformer_config=q_former.to_dict(), text_config=text.to_dict(),
        num_query_tokens=4, image_token_index=image, image_token_id=image,
    )  # fmt: skip
    pictures = BlipImageProcessor(size={"height": 16, "width": 16})
    processor = Blip2Processor(pictures, tokenizer, num_query_tokens=4)
    return _save(folder, lambda: Blip2ForConditionalGeneration(config), processor)


def make_tiny_llava(folder: Path) -> Path:
    """Write a LLaVA of a CLIP and a LLaMA."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = _tokenizer("<image>")
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4,
        projection_dim=16,
    )  # fmt: skip
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=vision.to_dict(), text_config=_llama(LlamaConfig, tokenizer), image_token_index=image,
        image_token_id=image, image_seq_length=16,
    )  # fmt: skip
    pictures = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        pictures, tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("PLACE", "<image>"),
    )  # fmt: skip
    return _save(folder, lambda: LlavaForConditionalGeneration(config), processor)


def make_tiny_qwen2_vl(folder: Path) -> Path:
    """Write a Qwen2-VL."""
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    places = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = _tokenizer(*places)
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(places))
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, **_ends(tokenizer),
    }  # fmt: skip
    vision = {
        "depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=image, video_token_id=video,
        vision_start_token_id=start, vision_end_token_id=end, **_ends(tokenizer),
    )  # fmt: skip
    size: dict[str, Any] = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    size |= {"min_pixels": 8 * 8, "max_pixels": 32 * 32, "size": {"shortest_edge": 8 * 8, "longest_edge": 32 * 32}}
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(**size), tokenizer, Qwen2VLVideoProcessor(**size),
        chat_template=TEMPLATE.replace("PLACE", "<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>"),
    )  # fmt: skip
    return _save(folder, lambda: Qwen2VLForConditionalGeneration(config), processor)


def _llama(config: Any, tokenizer: Any) -> dict[str, Any]:
    return config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512, **_ends(tokenizer),
    ).to_dict()  # fmt: skip


def _ends(tokenizer: Any) -> dict[str, int]:
    return {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}


def _tokenizer(*places: str) -> Any:
    """Return one of syllables: what a random model writes are words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", *places]
    pieces = [*special, *WORDS, *LETTERS, *(word for word in ("answer", "describe", "the", "clip"))]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=list(places), model_max_length=512,
    )  # fmt: skip


def _save(folder: Path, build: Any, processor: Any) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.7)
    model.generation_config.update(**_ends(processor.tokenizer))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder
