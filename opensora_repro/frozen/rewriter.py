"""A frozen causal language model of transformers that answers a question in text."""

from __future__ import annotations

from typing import Any

import torch

from opensora_repro.frozen.captioner import OPENED_THOUGHT, THOUGHT
from opensora_repro.frozen.pretrained import FrozenModel, ModelNotFound, check_complete, load_frozen
from opensora_repro.frozen.text import TOKENIZER, WEIGHTS

KIND = "transformers causal language model with its tokenizer"


class Rewriter:
    """A model and its tokenizer. Chat models are asked by their template, others are given the words to go on from."""

    def __init__(self, model: Any, tokenizer: Any, max_tokens: int) -> None:
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens
        special = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
        self.dropped = {number for number, token in special if not THOUGHT.search(token)}

    @torch.no_grad()
    def write(self, question: str) -> tuple[str, bool]:
        """What the model writes, the likeliest word each time, and whether its limit cut it."""
        chat = bool(self.tokenizer.chat_template)
        prompt = f"{question}\nThe prompt rewritten:"
        if chat:
            messages = [{"role": "user", "content": question}]
            prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = self.tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).to(self.model.device)
        length = inputs["input_ids"].shape[1]
        room = getattr(self.model.config, "max_position_embeddings", None) or length + self.max_tokens
        if length >= room:
            return "", True
        limit = min(self.max_tokens, room - length)
        ids = self.model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=limit,
            do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None,
            pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
        )  # fmt: skip
        written = ids[0, length:].tolist()
        text = self.tokenizer.decode([token for token in written if token not in self.dropped]).strip()
        if not chat:  # which goes on with further prompts
            lines = [line.strip() for line in text.split("\n") if line.strip()]
            return (lines[0] if lines else ""), len(written) >= limit and len(lines) < 2
        opened = OPENED_THOUGHT.search(prompt)
        return f"{opened[0].strip()}{text}" if opened else text, len(written) >= limit


def check_rewriter(path: str, *, key: str) -> None:
    """Raise ModelNotFound for what can be seen without reading weights."""
    frozen = FrozenModel(lambda *_, **__: None, path, key=key, kind=KIND, weights=WEIGHTS, tokenizer=TOKENIZER)
    kinds = frozen.config.get("architectures") or []
    if not any("CausalLM" in kind or "LMHead" in kind for kind in kinds):
        raise ModelNotFound(f"{key}={path}: this is a {', '.join(kinds) or 'model of no kind'}, expected a {KIND}")


def load_rewriter(path: str, *, key: str, device: str, max_tokens: int) -> Rewriter:
    """Load a local folder or a hub name in the cache. Raises ModelNotFound."""

    def load(folder: str, **options: Any) -> Rewriter:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, torch_dtype=dtype, output_loading_info=True, trust_remote_code=False, **options
        )
        check_complete(info)
        return Rewriter(model.to(device).eval().requires_grad_(False), tokenizer, max_tokens)

    return load_frozen(load, path, key=key, kind=KIND)
