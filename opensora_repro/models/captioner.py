"""A frozen vision-language model of transformers that says what a clip shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from opensora_repro.models.pretrained import (
    FrozenModel,
    HashFile,
    ModelNotFound,
    check_complete,
    find_folder,
    load_frozen,
)
from opensora_repro.models.text import TOKENIZER, WEIGHTS

KIND = "transformers vision-language model with its processor"
ONE_IMAGE, IMAGES, VIDEO = "one image", "images", "a video"
# What each family, by its config's model_type, is shown of a clip, and how many frames where the user names no number.
FAMILIES = {
    "blip-2": (ONE_IMAGE, 1),
    "llava": (IMAGES, 3),
    "llava_next": (IMAGES, 1),
    "llava_next_video": (VIDEO, 8),
    "llava_onevision": (VIDEO, 8),
    "qwen2_vl": (VIDEO, 8),
    "qwen2_5_vl": (VIDEO, 8),
}
PLACES = {ONE_IMAGE: "image", IMAGES: "image", VIDEO: "video"}  # in a chat template's words
DTYPES = ("float32", "bfloat16", "float16")


class Captioner:
    """A model, its processor, and what it is shown of a clip."""

    def __init__(self, model: Any, processor: Any, shown: str) -> None:
        self.model, self.processor, self.shown = model, processor, shown
        processor.tokenizer.padding_side = "left"  # so that the prompt's end, where writing goes on, is the last token
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        ends = model.generation_config.eos_token_id
        self.ends = set(ends) if isinstance(ends, list) else {ends}

    @torch.no_grad()
    def caption(self, clips: Sequence[np.ndarray], instruction: str, max_tokens: int) -> list[tuple[str, bool]]:
        """Return of each clip, uint8 [T, H, W, 3] of any length and size, the text and whether max_tokens ended it.

        All clips in one batch; the likeliest word each time, so that a clip's caption does not depend on chance.
        """
        inputs = self._inputs(clips, instruction)
        inputs = inputs.to(self.model.device)
        for name, value in inputs.items():
            if torch.is_floating_point(value):
                inputs[name] = value.to(self.model.dtype)
        tokens = self.model.generate(
            **inputs, max_new_tokens=max_tokens, do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None
        )
        prompt = inputs["input_ids"]
        if tokens.shape[1] >= prompt.shape[1] and torch.equal(tokens[:, : prompt.shape[1]], prompt):
            tokens = tokens[:, prompt.shape[1] :]
        texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
        cut = [len(row) >= max_tokens and not self.ends & set(row) for row in tokens.tolist()]
        return list(zip((text.strip() for text in texts), cut, strict=True))

    def _inputs(self, clips: Sequence[np.ndarray], instruction: str) -> Any:
        from PIL import Image

        options = {"return_tensors": "pt", "padding": True}
        if self.shown == VIDEO:
            # Pairs of frames are seen as one: an odd one out is shown twice.
            videos = [list(frames) + [frames[-1]] * (len(frames) % 2) for frames in clips]
            texts = [self._prompt(instruction, 1)] * len(clips)
            return self.processor(text=texts, videos=[np.stack(frames) for frames in videos], **options)
        pictures = [[Image.fromarray(frame) for frame in frames] for frames in clips]
        if self.shown == ONE_IMAGE:
            # What BLIP-2 was trained to go on from is no text at all, or a question.
            return self.processor(images=[mine[0] for mine in pictures], text=[instruction] * len(clips), **options)
        texts = [self._prompt(instruction, len(mine)) for mine in pictures]
        return self.processor(images=[picture for mine in pictures for picture in mine], text=texts, **options)

    def _prompt(self, instruction: str, places: int) -> str:
        """Return what the model reads: the clip's places, then the instruction, as its chat template has it."""
        place = PLACES[self.shown]
        template = getattr(self.processor, "chat_template", None) or getattr(
            self.processor.tokenizer, "chat_template", None
        )
        if not template:  # older folders: the words that LLaVA was trained with
            return f"USER: {f'<{place}>' * places}\n{instruction} ASSISTANT:"
        content = [{"type": place}] * places + [{"type": "text", "text": instruction}]
        chat = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


def family_of(path: str, *, key: str) -> tuple[str, int]:
    """Return what the model at `path` is shown of a clip, and the usual number of frames. Raises ModelNotFound."""
    import json

    folder = find_folder(path, key=key, kind=KIND)
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        kind = None
    if kind not in FAMILIES:
        raise ModelNotFound(f"{key}={path}: model_type is {kind!r}, expected one of {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def captioner_fingerprint(path: str, *, key: str, hash_file: HashFile) -> str:
    """Return a hash of the model's files without reading it in; tries the processor. Raises ModelNotFound."""
    frozen = FrozenModel(lambda *_, **__: None, path, key=key, kind=KIND, weights=WEIGHTS, tokenizer=TOKENIZER)
    load_frozen(_load_processor, path, key=key, kind=KIND)
    return frozen.fingerprint(hash_file)


def load_captioner(path: str, *, key: str, device: str, dtype: str) -> Captioner:
    """Load a local folder or a hub name in the cache; `key` names the option in errors. Raises ModelNotFound."""
    shown, _ = family_of(path, key=key)

    def load(folder: str, **options: Any) -> Captioner:
        import transformers

        processor = _load_processor(folder, **options)
        name = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
        options |= {name: getattr(torch, dtype), "output_loading_info": True}
        model, info = transformers.AutoModelForImageTextToText.from_pretrained(folder, **options)
        check_complete(info)
        return Captioner(model.to(device).eval().requires_grad_(False), processor, shown)

    return load_frozen(load, path, key=key, kind=KIND)


def _load_processor(folder: str, **options: Any) -> Any:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False, **options)
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise ValueError(f"its processor is a {type(processor).__name__}, which takes no pictures and text")
    return processor
