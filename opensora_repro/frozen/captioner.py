"""A frozen vision-language model of transformers that says what a clip shows."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from opensora_repro.frozen.pretrained import (
    FrozenModel,
    HashFile,
    ModelNotFound,
    check_complete,
    find_folder,
    load_frozen,
)
from opensora_repro.frozen.text import TOKENIZER, WEIGHTS

KIND = "transformers vision-language model with its processor"
ONE_IMAGE, IMAGES, VIDEO = "one image", "images", "a video"
PROCESSOR = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
             "chat_template.jinja", "chat_template.json", "generation_config.json")  # fmt: skip
PLACES = {ONE_IMAGE: "image", IMAGES: "image", VIDEO: "video"}  # in a chat template's words
DTYPES = ("float32", "bfloat16", "float16")
# Marks of reasoning models. Special tokens among them are part of what is written; a prompt may end with one.
THOUGHT = re.compile(r"think|thought|reason|channel|message|unused9[45]", re.IGNORECASE)
OPENED_THOUGHT = re.compile(r"[<\[◁][^<>\[\]/]{0,20}(?:think|thought|reason)[^<>\[\]/]{0,20}[>\]▷]\s*$", re.IGNORECASE)


@dataclass(frozen=True)
class Family:
    """What is shown of a clip, and how many frames where the user names no number.

    `times`: the processor tells the model when each frame is, in positions or in the prompt.
    """

    shown: str
    frames: int
    times: bool = False


FAMILIES = {  # by the config's model_type
    "blip-2": Family(ONE_IMAGE, 1),
    "gemma3": Family(IMAGES, 8),
    "internvl": Family(VIDEO, 8),
    "llava": Family(IMAGES, 3),
    "llava_next": Family(IMAGES, 1),
    "llava_next_video": Family(VIDEO, 8),
    "llava_onevision": Family(VIDEO, 8),
    "qwen2_vl": Family(VIDEO, 8),
    "qwen2_5_vl": Family(VIDEO, 8, times=True),
    "qwen3_5": Family(VIDEO, 8, times=True),
    "qwen3_vl": Family(VIDEO, 8, times=True),
    "qwen3_vl_moe": Family(VIDEO, 8, times=True),
    "smolvlm": Family(VIDEO, 8, times=True),
    "video_llava": Family(VIDEO, 8),
}


@dataclass(frozen=True)
class ShownClip:
    """Some frames, uint8 [T, H, W, 3]: `numbers` of a clip's `num_frames`, which has `fps` a second.

    `instruction` is what the model is asked about it.
    """

    frames: np.ndarray
    numbers: Sequence[int]
    num_frames: int
    fps: float
    instruction: str

    def metadata(self) -> dict[str, Any]:
        """Return the frames' times as video processors take them. A picture has none: any rate will do."""
        fps = self.fps if self.fps > 0 and self.num_frames > 1 else 1.0
        return {"total_num_frames": self.num_frames, "fps": fps, "duration": self.num_frames / fps,
                "frames_indices": list(self.numbers)}  # fmt: skip


class Captioner:
    """A model, its processor, and its family."""

    def __init__(self, model: Any, processor: Any, family: Family) -> None:
        self.model, self.processor, self.family = model, processor, family
        processor.tokenizer.padding_side = "left"  # so that the prompt's end, where writing goes on, is the last token
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        ends = model.generation_config.eos_token_id
        self.ends = set(ends) if isinstance(ends, list) else {ends}
        special = zip(processor.tokenizer.all_special_ids, processor.tokenizer.all_special_tokens, strict=True)
        self.dropped = {number for number, token in special if not THOUGHT.search(token)}

    def caption(self, clips: Sequence[ShownClip], max_tokens: int) -> list[tuple[str, bool]]:
        """Return of each clip, of any length and size, what the model wrote and whether max_tokens ended it.

        Those with as many frames form a batch, which not every family's processor could form otherwise; the likeliest
        word each time, so that a clip's caption does not depend on chance.
        """
        texts: dict[int, tuple[str, bool]] = {}
        for count in sorted({len(clip.frames) for clip in clips}):
            alike = [at for at, clip in enumerate(clips) if len(clip.frames) == count]
            texts |= zip(alike, self._write([clips[at] for at in alike], max_tokens), strict=True)
        return [texts[at] for at in range(len(clips))]

    @torch.no_grad()
    def _write(self, clips: Sequence[ShownClip], max_tokens: int) -> list[tuple[str, bool]]:
        inputs = self.inputs(clips).to(self.model.device)
        for name, value in inputs.items():
            if torch.is_floating_point(value):
                inputs[name] = value.to(self.model.dtype)
        tokens = self.model.generate(
            **inputs, max_new_tokens=max_tokens, do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None
        )
        prompt = inputs["input_ids"]
        if tokens.shape[1] >= prompt.shape[1] and torch.equal(tokens[:, : prompt.shape[1]], prompt):
            tokens = tokens[:, prompt.shape[1] :]
        cut = [len(row) >= max_tokens and not self.ends & set(row) for row in tokens.tolist()]
        return [(self._text(row, clip), was) for row, clip, was in zip(tokens.tolist(), clips, cut, strict=True)]

    def _text(self, tokens: list[int], clip: ShownClip) -> str:
        """Return what was written; marks of thoughts stay, and one that the prompt opened stands at the beginning."""
        kept = [token for token in tokens if token not in self.dropped]
        text = self.processor.tokenizer.decode(kept, skip_special_tokens=False).strip()
        opened = self.family.shown != ONE_IMAGE and OPENED_THOUGHT.search(self._prompt(clip.instruction, 1))
        return f"{opened[0].strip()}{text}" if opened else text

    def inputs(self, clips: Sequence[ShownClip]) -> Any:
        """Return what the model's `generate` takes, of clips with as many frames."""
        from PIL import Image

        options = {"return_tensors": "pt", "padding": True}
        if self.family.shown == VIDEO:
            texts = [self._prompt(clip.instruction, 1) for clip in clips]
            videos = [clip.frames for clip in clips]
            known = [clip.metadata() for clip in clips]
            if len(videos[0]) == 1:  # Qwen3-VL sees frames in pairs, and does not make a pair of one
                videos = [np.repeat(frames, 2, axis=0) for frames in videos]
                known = [told | {"frames_indices": told["frames_indices"] * 2} for told in known]
            return self.processor(text=texts, videos=videos, video_metadata=known, do_sample_frames=False, **options)
        pictures = [[Image.fromarray(frame) for frame in clip.frames] for clip in clips]
        if self.family.shown == ONE_IMAGE:
            # What BLIP-2 was trained to go on from is no text at all, or a question.
            texts = [clip.instruction for clip in clips]
            return self.processor(images=[mine[0] for mine in pictures], text=texts, **options)
        texts = [self._prompt(clip.instruction, len(clip.frames)) for clip in clips]
        return self.processor(images=pictures, text=texts, **options)

    def _prompt(self, instruction: str, places: int) -> str:
        """Return what the model reads: the clip's places, then the instruction, as its chat template has it."""
        place = PLACES[self.family.shown]
        template = getattr(self.processor, "chat_template", None) or getattr(
            self.processor.tokenizer, "chat_template", None
        )
        if not template:  # older folders: the words that LLaVA was trained with
            return f"USER: {f'<{place}>' * places}\n{instruction} ASSISTANT:"
        content = [{"type": place}] * places + [{"type": "text", "text": instruction}]
        chat = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


def family_of(path: str, *, key: str) -> Family:
    """Return the family of the model at `path`. Raises ModelNotFound."""
    if (found := version("transformers")).startswith("4."):  # whose processors drop the frames' times
        raise ModelNotFound(f"{key}={path}: captioning needs transformers 5, here is {found}; upgrade it")
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
    also = [file for name in PROCESSOR if (file := frozen.folder / name).is_file()]
    return frozen.fingerprint(hash_file, *(f"{file.name} {hash_file(file)}" for file in also))


def load_captioner(path: str, *, key: str, device: str, dtype: str) -> Captioner:
    """Load a local folder or a hub name in the cache; `key` names the option in errors. Raises ModelNotFound."""
    family = family_of(path, key=key)

    def load(folder: str, **options: Any) -> Captioner:
        import transformers

        processor = _load_processor(folder, **options)
        options |= {"dtype": getattr(torch, dtype), "output_loading_info": True}
        model, info = transformers.AutoModelForImageTextToText.from_pretrained(folder, **options)
        check_complete(info)
        return Captioner(model.to(device).eval().requires_grad_(False), processor, family)

    return load_frozen(load, path, key=key, kind=KIND)


def _load_processor(folder: str, **options: Any) -> Any:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False, **options)
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise ValueError(f"its processor is a {type(processor).__name__}, which takes no pictures and text")
    return processor
