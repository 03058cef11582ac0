"""Our STDiT against a plain restatement of the published block, on this machine's CPU.

    python -m benchmarks.train_step [--seconds S] [--out FILE]

Both sides hold the same weights and must give the same output and gradients before anything is timed. A forward pass
and a training step (noise prediction loss, backward, AdamW) are timed in turns, at several latent sizes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import environment, interleaved, save, side_by_side, table

if TYPE_CHECKING:
    from torch import Tensor, nn

HIDDEN, DEPTH, HEADS, CAPTION, LENGTH = 192, 4, 6, 64, 20
CASES = {  # batch, frames, rows, columns of latents
    "16 frames of 8x8": (4, 16, 8, 8),
    "16 frames of 32x32": (1, 16, 32, 32),
    "4 frames of 64x64": (1, 4, 64, 64),
}
TOLERANCE = 1e-4  # largest difference over largest value, float32


def build(size: tuple[int, int, int]) -> tuple[nn.Module, nn.Module]:
    """Ours and the plain model with the same random weights, also where a new model has zeros."""
    import torch

    from benchmarks.plain_stdit import PlainSTDiT
    from opensora_repro.models.config import STDiTConfig
    from opensora_repro.models.stdit import STDiT

    torch.manual_seed(0)
    cfg = STDiTConfig(
        hidden_size=HIDDEN, depth=DEPTH, num_heads=HEADS, caption_channels=CAPTION, model_max_length=LENGTH
    )
    ours = STDiT(cfg)
    for parameter in ours.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    plain = PlainSTDiT(cfg, (cfg.in_channels, *size))
    plain.load_state_dict(ours.state_dict())
    return ours.train(), plain.train()


def inputs(batch: int, size: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    import torch

    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(5, LENGTH + 1, (batch, 1), generator=generator)
    return (
        torch.randn(batch, 4, *size, generator=generator),
        torch.rand(batch, generator=generator) * 1000,
        torch.randn(batch, LENGTH, CAPTION, generator=generator),
        torch.arange(LENGTH)[None] < lengths,
    )


def training_step(model: nn.Module, batch: tuple[Tensor, ...]) -> Callable[[], None]:
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    target = torch.randn(batch[0].shape, generator=torch.Generator().manual_seed(2))

    def step() -> None:
        loss = (model(*batch)[:, :4] - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def forward_pass(model: nn.Module, batch: tuple[Tensor, ...]) -> Callable[[], None]:
    import torch

    def forward() -> None:
        with torch.inference_mode():
            model(*batch)

    return forward


def largest_difference(ours: nn.Module, plain: nn.Module, batch: tuple[Tensor, ...]) -> float:
    """Largest relative difference of outputs and of every parameter's gradient."""
    outputs = [model(*batch) for model in (ours, plain)]
    for output in outputs:
        output.square().mean().backward()
    reference = dict(plain.named_parameters())
    pairs = [(outputs[0].detach(), outputs[1].detach())]
    pairs += [(p.grad, reference[name].grad) for name, p in ours.named_parameters()]  # type: ignore[misc]
    differences = [float((a - b).abs().max() / b.abs().max().clamp_min(1e-6)) for a, b in pairs]
    for model in (ours, plain):
        model.zero_grad(set_to_none=True)
    return max(differences) if all(map(math.isfinite, differences)) else math.inf


def measure(seconds: float) -> list[dict[str, Any]]:
    rows = []
    for name, (batch_size, *size) in CASES.items():
        shape = (size[0], size[1], size[2])
        ours, plain = build(shape)
        batch = inputs(batch_size, shape)
        difference = largest_difference(ours, plain, batch)
        if not difference < TOLERANCE:
            raise SystemExit(
                f"error: {name}: the two models differ by {difference:.1e}; timing them would mean nothing"
            )
        for what, make in (("forward", forward_pass), ("training step", training_step)):
            times = interleaved(
                {"ours": make(ours, batch), "plain": make(plain, batch)},
                rounds=200,
                seconds=seconds / (2 * len(CASES)),
            )
            rows.append(
                {
                    "case": name,
                    "what": what,
                    "batch": batch_size,
                    "latents": [4, *size],
                    "largest_difference": float(f"{difference:.2e}"),
                    **side_by_side(times["ours"], times["plain"]),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=45.0, help="time to spend measuring (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/train_step.json)")
    args = parser.parse_args()

    import torch

    where = environment()
    rows = measure(args.seconds)
    result = {
        "benchmark": "train_step",
        "environment": where,
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "model": {"hidden_size": HIDDEN, "depth": DEPTH, "num_heads": HEADS, "caption_tokens": LENGTH},
        "rows": rows,
    }
    path = save("train_step", result, args.out)
    shown = [
        (r["case"], r["batch"], r["what"], r["ours"]["median_ms"], r["other"]["median_ms"], f"{r['ratio']:.2f}x")
        for r in rows
    ]
    title = f"STDiT, {DEPTH} blocks of {HIDDEN} channels, float32, {torch.get_num_threads()} threads (medians)"
    print(table(title, ("latents", "batch", "", "ours ms", "plain ms", "speed"), shown))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
