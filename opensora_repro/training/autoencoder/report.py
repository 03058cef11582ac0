"""RUN/report.html of stage 0: quality over the steps, pairs of pictures, and what the text encoder cannot do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opensora_repro.config import AutoencoderConfig
from opensora_repro.data.report.markup import data_uri, render
from opensora_repro.files import write_text
from opensora_repro.run_folder import VALIDATION_FILE, JsonLines, list_steps, samples_folder, step_of

TEMPLATE = Path(__file__).with_name("templates") / "stage0.html"
REPORT, TEXT_FACTS = "report.html", "text.json"


def write_report(run_dir: Path, cfg: AutoencoderConfig) -> Path:
    """Write the page from what lies in the run's folder; return where. Raises OSError."""
    folders = [folder for folder in list_steps(samples_folder(run_dir)) if (folder / "grid.png").is_file()]
    picture = data_uri("image/png", (folders[-1] / "grid.png").read_bytes()) if folders else ""
    facts = run_dir / TEXT_FACTS
    write_text(
        run_dir / REPORT,
        render(
            TEMPLATE,
            title=f"Stage 0: {run_dir.name}",
            clips=cfg.data.val_manifest or f"{cfg.data.manifest}, which it is trained on",
            lines=[line for line in JsonLines(run_dir / VALIDATION_FILE).read() if line.get("psnr") is not None],
            picture=picture,
            step=step_of(folders[-1]) if folders else 0,
            latents=latents_told(cfg),
            text=limits(json.loads(facts.read_text(encoding="utf-8"))) if facts.is_file() else [],
        ),
    )
    return run_dir / REPORT


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
