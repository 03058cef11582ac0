"""Tiny vision-language models on disk, in the formats of the real ones, one of each family that captions.

Random but seeded, with weights large enough that what they write depends on what they see.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.tiny_models import LETTERS

PARTS = [[16, 16], [16, 32], [32, 16]]  # sizes into which pictures are cut
WORDS = [f"{a}{b}" for a in "bdfgklmnprst" for b in "aeiou"]
TIMES = [f"{second:02d}" for second in range(12)]  # as SmolVLM's processor writes them
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
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = _tokenizer("<image>")
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        **_llava(tokenizer), image_token_index=image, image_token_id=image, image_seq_length=16,
    )  # fmt: skip
    pictures = CLIPImageProcessor(**_square())
    processor = LlavaProcessor(
        pictures, tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=_template("<image>"),
    )  # fmt: skip
    return _save(folder, lambda: LlavaForConditionalGeneration(config), processor)


def make_tiny_llava_next(folder: Path) -> Path:
    """Write a LLaVA-NeXT, which sees each picture whole and in parts."""
    from transformers import (
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
    )

    tokenizer = _tokenizer("<image>")
    config = LlavaNextConfig(
        **_llava(tokenizer), image_grid_pinpoints=PARTS, image_seq_length=16,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    processor = LlavaNextProcessor(
        LlavaNextImageProcessor(**_square(), image_grid_pinpoints=PARTS), tokenizer, patch_size=4,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=_template("<image>"),
    )  # fmt: skip
    return _save(folder, lambda: LlavaNextForConditionalGeneration(config), processor)


def make_tiny_llava_next_video(folder: Path) -> Path:
    """Write a LLaVA-NeXT-Video."""
    from transformers import (
        LlavaNextImageProcessor,
        LlavaNextVideoConfig,
        LlavaNextVideoForConditionalGeneration,
        LlavaNextVideoProcessor,
        LlavaNextVideoVideoProcessor,
    )

    tokenizer = _tokenizer("<image>", "<video>")
    image, video = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    config = LlavaNextVideoConfig(
        **_llava(tokenizer), image_grid_pinpoints=PARTS, image_token_index=image, video_token_index=video,
        image_seq_length=16, video_seq_length=4,
    )  # fmt: skip
    processor = LlavaNextVideoProcessor(
        LlavaNextVideoVideoProcessor(**_square()), LlavaNextImageProcessor(**_square(), image_grid_pinpoints=PARTS),
        tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=_template("<{{ part['type'] }}>"),
    )  # fmt: skip
    return _save(folder, lambda: LlavaNextVideoForConditionalGeneration(config), processor)


def make_tiny_video_llava(folder: Path) -> Path:
    """Write a Video-LLaVA; it takes eight frames."""
    from transformers import (
        VideoLlavaConfig,
        VideoLlavaForConditionalGeneration,
        VideoLlavaImageProcessor,
        VideoLlavaProcessor,
        VideoLlavaVideoProcessor,
    )

    tokenizer = _tokenizer("<image>", "<video>")
    image, video = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    config = VideoLlavaConfig(
        **_llava(tokenizer), image_token_index=image, video_token_index=video, image_seq_length=16, video_seq_length=136
    )
    processor = VideoLlavaProcessor(
        VideoLlavaImageProcessor(**_square()), VideoLlavaVideoProcessor(**_square()), tokenizer, patch_size=4,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=_template("<{{ part['type'] }}>"),
    )  # fmt: skip
    return _save(folder, lambda: VideoLlavaForConditionalGeneration(config), processor)


def make_tiny_llava_onevision(folder: Path) -> Path:
    """Write a LLaVA-OneVision of a SigLIP and a Qwen2."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        Qwen2Config,
    )

    tokenizer = _tokenizer("<image>", "<video>")
    image, video = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    config = LlavaOnevisionConfig(
        vision_config=_siglip(), text_config=_llama(Qwen2Config, tokenizer, num_key_value_heads=2),
        image_token_index=image, video_token_index=video, image_grid_pinpoints=PARTS,
    )  # fmt: skip
    size = {"size": {"height": 16, "width": 16}}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(**size, image_grid_pinpoints=PARTS), tokenizer,
        LlavaOnevisionVideoProcessor(**size), num_image_tokens=16, vision_feature_select_strategy="full",
        chat_template=_template("<{{ part['type'] }}>"),
    )  # fmt: skip
    return _save(folder, lambda: LlavaOnevisionForConditionalGeneration(config), processor)


def make_tiny_gemma3(folder: Path) -> Path:
    """Write a Gemma 3, which sees frames as pictures."""
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3ImageProcessor,
        Gemma3Processor,
        Gemma3TextConfig,
    )

    places = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = _tokenizer(*places.values(), named=places)
    start, end, image = tokenizer.convert_tokens_to_ids(list(places.values()))
    text = _llama(Gemma3TextConfig, tokenizer, num_key_value_heads=1, head_dim=8, sliding_window=64)
    config = Gemma3Config(
        text_config=text, vision_config=_siglip(), mm_tokens_per_image=4, boi_token_index=start,
        eoi_token_index=end, image_token_index=image, tie_word_embeddings=False, **_ends(tokenizer),
    )  # fmt: skip
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size={"height": 16, "width": 16}), tokenizer, image_seq_length=4,
        chat_template=_template("<start_of_image>"),
    )  # fmt: skip
    return _save(folder, lambda: Gemma3ForConditionalGeneration(config), processor)


def make_tiny_internvl(folder: Path) -> Path:
    """Write an InternVL 3 with a Qwen2."""
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
        InternVLVisionConfig,
        Qwen2Config,
    )

    places = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
              "video_token": "<video>"}  # fmt: skip
    tokenizer = _tokenizer(*places.values(), named=places)
    vision = InternVLVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=[16, 16],
        patch_size=[4, 4],
    )  # fmt: skip
    config = InternVLConfig(
        vision_config=vision.to_dict(), text_config=_llama(Qwen2Config, tokenizer, num_key_value_heads=2),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=4,
    )  # fmt: skip
    size = {"size": {"height": 16, "width": 16}}
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(**size), tokenizer, InternVLVideoProcessor(**size), image_seq_length=4,
        chat_template=_template("<video>"),
    )  # fmt: skip
    return _save(folder, lambda: InternVLForConditionalGeneration(config), processor)


def make_tiny_smolvlm(folder: Path) -> Path:
    """Write a SmolVLM; its processor needs the package num2words."""
    from transformers import (
        LlamaConfig,
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
        SmolVLMVisionConfig,
    )

    places = {"fake_image_token": "<fake_token_around_image>", "image_token": "<image>", "video_token": "<video>",
              "global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>"}  # fmt: skip
    tokenizer = _tokenizer(*places.values(), named=places)
    vision = SmolVLMVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4
    )
    config = SmolVLMConfig(
        vision_config=vision.to_dict(), text_config=_llama(LlamaConfig, tokenizer), scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    size = {"size": {"longest_edge": 16}, "max_image_size": {"longest_edge": 16}}
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(**size), tokenizer, SmolVLMVideoProcessor(**size), image_seq_len=4,
        chat_template=_template("<{{ part['type'] }}>"),
    )  # fmt: skip
    return _save(folder, lambda: SmolVLMForConditionalGeneration(config), processor)


def make_tiny_qwen2_vl(folder: Path) -> Path:
    """Write a Qwen2-VL."""
    return _qwen(folder, "Qwen2VL", {"embed_dim": 16, "hidden_size": 16, "mlp_ratio": 2})


def make_tiny_qwen2_5_vl(folder: Path) -> Path:
    """Write a Qwen2.5-VL."""
    vision = {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 16, "fullatt_block_indexes": [0],
              "window_size": 16, "tokens_per_second": 2}  # fmt: skip
    return _qwen(folder, "Qwen2_5_VL", vision)


def make_tiny_qwen3_vl(folder: Path) -> Path:
    """Write a Qwen3-VL."""
    return _qwen(folder, "Qwen3VL", _qwen3_vision(), head_dim=8)


def make_tiny_qwen3_vl_moe(folder: Path) -> Path:
    """Write a Qwen3-VL with experts."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    return _qwen(folder, "Qwen3VLMoe", _qwen3_vision(), head_dim=8, **experts)


def make_tiny_qwen3_5(folder: Path) -> Path:
    """Write a Qwen3.5, of linear attention and full attention in turn."""
    vision = _qwen3_vision()
    del vision["deepstack_visual_indexes"]
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
              "linear_num_value_heads": 2, "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
    return _qwen(folder, "Qwen3_5", vision, head_dim=16, **linear)


def _qwen3_vision() -> dict[str, Any]:
    return {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 16, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0]}  # fmt: skip


def _qwen(folder: Path, family: str, vision: dict[str, Any], **more: Any) -> Path:
    import transformers

    places = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = _tokenizer(*places)
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(places))
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}, **more, **_ends(tokenizer),
    }  # fmt: skip
    if "3" in family:
        text["rope_scaling"]["mrope_interleaved"] = True
    vision = {"depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, **vision}
    config = getattr(transformers, f"{family}Config")(
        text_config=text, vision_config=vision, image_token_id=image, video_token_id=video,
        vision_start_token_id=start, vision_end_token_id=end, **_ends(tokenizer),
    )  # fmt: skip
    size: dict[str, Any] = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    size |= {"size": {"shortest_edge": 8 * 8, "longest_edge": 32 * 32}}
    videos = transformers.Qwen3VLVideoProcessor if "3" in family else transformers.Qwen2VLVideoProcessor
    if "3" in family:  # whose limits are of all frames together
        size["size"] = {"shortest_edge": 8 * 8, "longest_edge": 32 * 32 * 8}
    kind = "Qwen3VL" if "3" in family else family
    processor = getattr(transformers, f"{kind}Processor")(
        transformers.Qwen2VLImageProcessor(**size), tokenizer, videos(**size),
        chat_template=_template("<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>"),
    )  # fmt: skip
    return _save(folder, lambda: getattr(transformers, f"{family}ForConditionalGeneration")(config), processor)


def _template(place: str) -> str:
    return TEMPLATE.replace("PLACE", place)


def _square() -> dict[str, Any]:
    return {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}


def _llava(tokenizer: Any) -> dict[str, Any]:
    from transformers import CLIPVisionConfig, LlamaConfig

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4,
        projection_dim=16,
    )  # fmt: skip
    return {"vision_config": vision.to_dict(), "text_config": _llama(LlamaConfig, tokenizer)}


def _siglip() -> dict[str, Any]:
    from transformers import SiglipVisionConfig

    return SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4,
        vision_use_head=False,
    ).to_dict()  # fmt: skip


def _llama(config: Any, tokenizer: Any, **more: Any) -> dict[str, Any]:
    return config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512, **_ends(tokenizer), **more,
    ).to_dict()  # fmt: skip


def _ends(tokenizer: Any) -> dict[str, int]:
    return {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}


def _tokenizer(*places: str, named: dict[str, str] | None = None) -> Any:
    """Return one of syllables: what a random model writes are words. `named`: places that processors ask it for."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", *places]
    pieces = [*special, *WORDS, *LETTERS, "answer", "describe", "the", "clip", "seconds", ":", *TIMES]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens=named or list(places), model_max_length=2048,
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
