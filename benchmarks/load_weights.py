"""Loading full-size published weights: our checked load against a plain read and copy of the file.

    python -m benchmarks.load_weights [--rounds N] [--layout NAME ...] [--file FILE] [--out FILE]

The file has the layout and the size of a published one, float32, with random values, and is written to a temporary
folder: `pixart`, PixArt-alpha's PixArt-XL/2 for an STDiT-XL/2 (2.4 GB), or the releases of Open-Sora 1.1 and 1.2,
`stdit2` and `stdit3` (3.1 and 4.8 GB). Each side runs in a process of its own and times from the first to the last
byte, imports left out; its peak resident memory is the kernel's count. `other` maps the file, with torch.load
(mmap=True, weights_only=True) or safe_open, and copies every tensor.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import environment, save, side_by_side, table
from opensora_repro.process import peak_memory

SIDES = ("ours", "other")
LAYOUTS = {
    "pixart": "PixArt-XL/2 .pth into STDiT-XL/2",
    "stdit2": "STDiT2-XL/2 .safetensors",
    "stdit3": "STDiT3-XL/2 .safetensors",
}


def build(layout: str) -> Any:
    """The model that the file is for, on the meta device."""
    import torch

    from opensora_repro.models.stdit import stdit_xl_2
    from opensora_repro.models.stdit2 import stdit2_xl_2
    from opensora_repro.models.stdit3 import stdit3_xl_2

    with torch.device("meta"):
        return {"pixart": stdit_xl_2, "stdit2": stdit2_xl_2, "stdit3": stdit3_xl_2}[layout]()


def write_file(path: Path, layout: str = "pixart") -> None:
    """PixArt-XL/2 as PixArt-alpha's training saves it: wrapped, an image's patch kernel, a position table.

    Or one of Open-Sora's models as it is released.
    """
    import torch
    from safetensors.torch import save_file

    from opensora_repro.models.stdit import pixart_xl_2

    if layout != "pixart":
        save_file({key: torch.rand(value.shape) for key, value in build(layout).state_dict().items()}, path)
        return
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in pixart_xl_2().state_dict().items()}
    kernel = shapes.pop("x_embedder.proj.weight")
    shapes |= {"x_embedder.proj.weight": (*kernel[:2], *kernel[3:]), "pos_embed": (1, 1024, 1152)}
    torch.save({"state_dict": {key: torch.rand(shape) for key, shape in shapes.items()}, "epoch": 1}, path)


def run_side(side: str, path: Path, layout: str) -> dict[str, float]:
    """Load in this process: seconds, peak bytes, and bytes of what was made."""
    import torch
    from safetensors import safe_open

    from opensora_repro.weights.load import load_model_weights

    began = time.perf_counter()
    if side == "other" and layout == "pixart":
        mapped = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
        made = {key: value.clone() for key, value in mapped.items()}
    elif side == "other":
        with safe_open(path, "pt") as file:
            made = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    else:
        model = build(layout)
        load_model_weights(model, path)
        made = model.state_dict()
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak_bytes": peak_memory(), "bytes": sum(value.nbytes for value in made.values())}


def in_process(side: str, path: Path, layout: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.load_weights", "--side", side, "--file", str(path)]
    command += ["--layout", layout]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(path: Path, rounds: int, layout: str) -> dict[str, Any]:
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(rounds + 1):  # the first round brings the file into the page cache
        for side in SIDES:
            runs[side].append(in_process(side, path, layout))
    seconds = {side: [run["seconds"] for run in runs[side][1:]] for side in SIDES}
    model = runs["ours"][0]["bytes"]
    peak = max(run["peak_bytes"] for run in runs["ours"])
    return {
        "name": LAYOUTS[layout],
        **side_by_side(seconds["ours"], seconds["other"]),
        "model_bytes": model,
        "peak_bytes": peak,
        "peak_over_model": round(peak / model, 3),
        "file_bytes": path.stat().st_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load_weights", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=["pixart"])
    parser.add_argument("--file", type=Path, help="a file to read instead of making one")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(run_side(args.side, args.file, args.layout[0])))
        return
    rows = []
    for layout in args.layout:
        with tempfile.TemporaryDirectory() as folder:
            path = args.file or Path(folder) / "weights"
            if not args.file:
                print(f"writing {LAYOUTS[layout]}", file=sys.stderr)
                write_file(path, layout)
            rows.append(compare(path, args.rounds, layout))
    result = {"benchmark": "load_weights", "environment": environment(), "rows": rows}
    columns = ("", "ours ms", "other ms", "ratio", "peak / model")
    cells = [
        (row["name"], row["ours"]["median_ms"], row["other"]["median_ms"], row["ratio"], row["peak_over_model"])
        for row in rows
    ]
    print(table("Loading weights (ratio: how many times as fast as a plain read and copy)", columns, cells))
    print(json.dumps(result, indent=2))
    print(f"written to {save('load_weights', result, args.out)}")


if __name__ == "__main__":
    main()
