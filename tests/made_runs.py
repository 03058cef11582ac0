"""Runs as training leaves them, without the training; and how fast the page about a long one is drawn.

`python -m tests.made_runs OUT` makes a run of 10,000 steps and its page, opens that in chromium and prints JSON.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from opensora_repro.config import dump_toml, parse_config
from opensora_repro.data.write import write_video
from opensora_repro.report.page import write_report

HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)>‮'


def make_run(folder: Path, *, steps: int = 400, grids: int = 3, side: int = 96, **changes: Any) -> Path:
    """What a run of so many steps leaves."""
    (folder / "samples").mkdir(parents=True)
    rng = np.random.default_rng(0)
    settings = {"sample": {"prompts": ["a red square", HOSTILE]}, "train": {"steps": steps}, **changes}
    (folder / "config.toml").write_text(dump_toml(parse_config(settings)))
    write_lines(folder / "metrics.jsonl", [
        {"step": step, "loss": 1 / math.sqrt(step) + 0.02 * rng.random(), "grad_norm": 0.3 + 0.1 * rng.random(),
         "lr": 1e-4, "seconds": 0.5, "data_seconds": 0.05, "samples": 8, "tokens": 1024}
        for step in range(1, steps + 1)
    ])  # fmt: skip
    every = max(1, steps // 50)
    write_lines(folder / "validation.jsonl", [
        {"step": step, "loss": 0.5, "losses": [0.6, 0.5, 0.4], "timesteps": [200.0, 500.0, 800.0], "samples": 64,
         "of_trained": 0.5, "of_average": 0.51, "activation": 30.0}
        for step in range(every, steps + 1, every)
    ])  # fmt: skip
    metrics = [{"loss": 0.5, "caption_gap": 0.01 * n, "motion_gap": {"value": 0.02, "low": 0.01, "high": 0.03}}
               for n in range(1, 5)]  # fmt: skip
    write_lines(folder / "evaluation.jsonl", [{"step": n * every, "metrics": m} for n, m in enumerate(metrics, 1)])
    write_lines(folder / "alarms.jsonl", [{"step": 300, "alarm": "text", "message": f"captions {HOSTILE}"}])
    bucket = {"bucket": "16 x 256x256", "clips": 1200.0, "share": 0.6, "enlarged": 0.0, "cropped": 0.1, "samples": 8,
              "steps": 150.0, "tokens": 1024, "time": 0.9}  # fmt: skip
    clips = [{"title": f"clips of {HOSTILE}.parquet", "rows": 2000, "looked_at": 2000, "rates": [24, 30, 24],
              "kinds": [["usable", 1990, ""], ["missing", 10, "no file"]], "buckets": [bucket],
              "empty_buckets": 2}]  # fmt: skip
    start = {"device": "NVIDIA H100", "processes": 8, "torch": "2.5", "stage": "stage2_video", "clips": clips}
    write_lines(folder / "starts.jsonl", [{"step": 0, **start}, {"step": steps // 2, **start, "processes": 4}])
    weights = {"source": HOSTILE, "layout": "PixArt", "loaded": ["a"], "inserted": ["b"], "num_parameters": 12,
               "dtype": "float32", "notes": [HOSTILE], "files": {"ema.safetensors": "0" * 64}}  # fmt: skip
    (folder / "weights.json").write_text(json.dumps(weights))
    for number in range(1, grids + 1):
        own = folder / "samples" / f"step-{number * steps // grids:08d}"
        own.mkdir()
        picture = Image.effect_noise((8 * side, 4 * side), 80 + number).convert("RGB")
        picture.save(own / "grid.png")
        frames = np.asarray(picture)[None, :side, :side].repeat(4, axis=0).copy()
        frames[:, :, : side // 2] = np.arange(4, dtype=np.uint8)[:, None, None, None] * 60
        write_video(own / "0000.mp4", frames, 8)
    return folder


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def main() -> None:
    from playwright.sync_api import sync_playwright

    run = make_run(Path(sys.argv[1]) / "run", steps=10_000, grids=40, side=128)
    began = time.process_time()
    write_report([run], run / "report.html")
    told: dict[str, Any] = {"write_cpu_seconds": time.process_time() - began}
    told["megabytes"] = (run / "report.html").stat().st_size / 1e6
    with sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for width in (1200, 390):
            tab = browser.new_page(viewport={"width": width, "height": 800})
            tab.goto((run / "report.html").as_uri(), wait_until="load")
            # two frames later everything has been drawn once
            tab.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
            told[f"drawn_seconds_{width}"] = tab.evaluate("performance.now()") / 1e3
            tab.screenshot(path=str(run / f"{width}.png"), full_page=True)
        browser.close()
    print(json.dumps({name: round(value, 2) for name, value in told.items()}))


if __name__ == "__main__":
    main()
