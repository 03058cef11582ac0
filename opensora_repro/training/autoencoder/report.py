"""What the page of a stage 0 run tells besides: its latents, and what its text encoder cannot do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opensora_repro.config import AutoencoderConfig
from opensora_repro.report.page import write_report
from opensora_repro.run_folder import REPORT_FILE

TEXT_FACTS = "text.json"


def write_stage0_report(run_dir: Path, cfg: AutoencoderConfig) -> None:
    """Write the page from what lies in the run's folder. Raises OSError."""
    facts = run_dir / TEXT_FACTS
    clips = cfg.data.val_manifest or f"{cfg.data.manifest}, which it is trained on"
    notes = {
        "Latents": [latents_told(cfg), f"Samples are frames of {clips}: each beside what its latents give back."],
        "Its text encoder": limits(json.loads(facts.read_text(encoding="utf-8"))) if facts.is_file() else [],
    }
    write_report([run_dir], run_dir / REPORT_FILE, notes=notes)


def latents_told(cfg: AutoencoderConfig) -> str:
    """A line on the latents of a frame."""
    model, data = cfg.model, cfg.data
    if model.kind == "video":
        frames = 2 ** min(2, len(model.channels) - 1)  # as `temporal_config` halves time
        shared = f"{frames} frames share their latents, the first of a clip apart" if frames > 1 else "one a frame"
        return f"{model.latent_channels} values a latent; {shared} (model.in_channels = {model.latent_channels})."
    height, width = data.height // cfg.spatial_stride, data.width // cfg.spatial_stride
    values = model.latent_channels * height * width
    return (
        f"A frame of {data.height}x{data.width} becomes {model.latent_channels} x {height}x{width} latents: "
        f"{3 * data.height * data.width / values:.3g} times fewer values, and {-(-height // 2) * -(-width // 2)} "
        f"tokens with patches of 2x2 (model.in_channels = {model.latent_channels})."
    )


def limits(facts: Mapping[str, Any]) -> list[str]:
    """What a text encoder of one's own captions knows and cannot do, a sentence each."""
    lines = [
        f"It knows {facts['words']:,} words of {facts['captions']:,} captions. Any other word, in a prompt as in a "
        "caption, is one unknown token, like every other unknown word.",
        "Its weights are random and stay so: no word is near to another in meaning. What a word looks like is learnt "
        "from the clips whose captions have it; synonyms, plurals and numbers are words of their own.",
        "Punctuation and the case of letters are left out.",
        f"Prompts longer than the longest caption ({facts['longest']} words) were never seen.",
    ]
    if facts["left_out"]:
        lines.insert(
            1,
            f"text.vocab_size left out {facts['left_out']:,} rarer words, {facts['share_left_out']:.1%} of what "
            "captions say.",
        )
    return lines
