"""Tiny frozen models on disk, in the same formats as the real ones: an AutoencoderKL, a T5 encoder and a CLIP model.

They are random but seeded: two calls make the same files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

TINY_STRIDE = 8
TINY_LATENT_CHANNELS = 4
TINY_TEXT_CHANNELS = 32
TINY_CLIP_CHANNELS, TINY_CLIP_LENGTH = 16, 12
SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")  # T5's ids 0, 1, 2
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,-'"


def make_tiny_vae(folder: Path) -> Path:
    """Write an AutoencoderKL (stride 8, 4 latent channels, 3 colours) into `folder`."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 16, 16),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=TINY_LATENT_CHANNELS,
            sample_size=32,
        )
    vae.save_pretrained(folder)
    return folder


def make_tiny_text(folder: Path) -> Path:
    """Write a two-layer T5 encoder (32 channels) and a tokenizer that spells words into `folder`."""
    from transformers import T5Config, T5EncoderModel

    tokenizer = _spelling_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=TINY_TEXT_CHANNELS,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = T5EncoderModel(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The name that every supported release of transformers knows
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def make_tiny_clip(folder: Path) -> Path:
    """Write a whole CLIP model, as published ones are, into `folder`, with a tokenizer that spells words."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    make_tiny_text(folder)  # for its tokenizer; the model's files are overwritten
    size = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "hidden_size": TINY_CLIP_CHANNELS,
    }
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = size | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": TINY_CLIP_LENGTH,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = CLIPModel(CLIPConfig(text_config=text, vision_config=size | {"image_size": 8, "patch_size": 4}))
        for parameter in clip.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    clip.save_pretrained(folder)
    return folder


def make_tiny_image_encoder(folder: Path) -> Path:
    """Write a small vision transformer of random weights, with a classifier, as timm's hub holds them."""
    import timm
    from safetensors.torch import save_file

    size = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **size)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    told = {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 5, "classifier": "head"}
    config = {"architecture": "vit_tiny_patch16_224", "model_args": size, "pretrained_cfg": told}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def make_tiny_i3d(path: Path, *, scales: bool = True) -> Path:
    """Write a TorchScript file that is called as StyleGAN-V's I3D is, or with pixels alone; it gives their means."""

    class Scales(torch.nn.Module):
        def forward(
            self, x: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
        ) -> torch.Tensor:
            assert rescale and resize and return_features
            return torch.nn.functional.adaptive_avg_pool3d(x, (2, 2, 2)).flatten(1)

    class Plain(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.shape[3] == 224 and x.shape[4] == 224
            return torch.nn.functional.adaptive_avg_pool3d(x, (2, 2, 2)).flatten(1)

    torch.jit.script(Scales() if scales else Plain()).save(str(path))
    return path


def _spelling_tokenizer():  # type: ignore[no-untyped-def]  # the class moved between transformers' releases
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [(token, 0.0) for token in SPECIAL_TOKENS] + [(piece, -1.0) for piece in ("▁", *LETTERS)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


TINY_VIDEO_VAES: dict[str, dict[str, Any]] = {  # arguments of diffusers' classes; stride 8 (LTX: 16), 4 latent channels
    "AutoencoderKLCogVideoX": {
        "block_out_channels": (4,) * 4, "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2,
        "scaling_factor": 0.7,
    },
    "AutoencoderKLWan": {
        "base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1,
        "latents_mean": [0.1, -0.2, 0.3, -0.4], "latents_std": [0.5, 1.0, 1.5, 2.0],
    },
    "AutoencoderKLHunyuanVideo": {
        "latent_channels": 4, "block_out_channels": (4,) * 4, "layers_per_block": 1, "norm_num_groups": 2,
    },
    "AutoencoderKLLTXVideo": {
        "latent_channels": 4, "block_out_channels": (4,) * 4, "decoder_block_out_channels": (4,) * 4,
        "layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5, "patch_size": 2,
    },
    "AutoencoderKLMochi": {  # groups of norms are 32 there
        "latent_channels": 4, "encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4,
        "layers_per_block": (1,) * 5, "add_attention_block": (False,) * 4 + (True,), "scaling_factor": 0.9,
        "latents_mean": [0.1, -0.2, 0.3, -0.4], "latents_std": [0.5, 1.0, 1.5, 2.0],
    },
}  # fmt: skip
TINY_OPEN_SORA: dict[str, Any] = {
    "_class_name": "VideoAutoencoderPipeline",
    "vae_2d": {
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [4, 4, 8, 8], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 2,
    },
    "vae_temporal": {"filters": 4, "num_res_blocks": 1, "num_groups": 2},
    "micro_frame_size": 17,
}  # fmt: skip


def make_tiny_video_vae(folder: Path, kind: str) -> Path:
    """Write a video autoencoder of the class `kind` into `folder`, as diffusers or Open-Sora 1.2 have it."""
    if kind == "VideoAutoencoderPipeline":
        return _make_tiny_open_sora_vae(folder)
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = getattr(diffusers, kind)(**TINY_VIDEO_VAES[kind])
        if kind == "AutoencoderKLLTXVideo":  # its statistics lie among the weights
            vae.latents_mean.copy_(torch.tensor([0.1, -0.2, 0.3, -0.4]))
            vae.latents_std.copy_(torch.tensor([0.5, 1.0, 1.5, 2.0]))
    vae.save_pretrained(folder)
    return folder


def _make_tiny_open_sora_vae(folder: Path) -> Path:
    from diffusers import AutoencoderKL
    from safetensors.torch import save_file

    from opensora_repro.frozen.geometry import image_config, open_sora_config
    from opensora_repro.models.video_autoencoder import VideoAutoencoder

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = VideoAutoencoder(open_sora_config(TINY_OPEN_SORA), AutoencoderKL(**image_config(TINY_OPEN_SORA)))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY_OPEN_SORA))
    save_file(vae.state_dict(), folder / "model.safetensors")
    return folder
