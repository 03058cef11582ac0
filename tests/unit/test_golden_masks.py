"""Frame masks against the published code: how they are drawn, what they do to IDDPM's losses, and what strings give."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from opensora_repro.config import ConfigError, FrameMasksConfig
from opensora_repro.diffusion.frame_masks import FrameMasks, draw_mask
from opensora_repro.diffusion.gaussian import SPEED_MIRROR, GaussianDiffusion, speed_probabilities
from opensora_repro.sampling.conditions import (
    aligned,
    append_generated,
    frames_of_chunks,
    insert_references,
    merge_prompt,
    parse_strategy,
    prompt_of_loop,
    read_json,
    split_prompt,
    with_scores,
)
from tests.golden import Case, load_case, relative_error
from tests.published_diffusion import Float32Diffusion

DRAWS = 1500
OURS = {"intepolate": "interpolate", "identity": "none"}  # the published names spelled correctly


@pytest.fixture(scope="module")
def masks(golden_1_2_dir: Path) -> Any:
    return json.loads((golden_1_2_dir / "mask_generator.json").read_text())


@pytest.fixture(scope="module")
def strings(golden_1_2_dir: Path) -> Any:
    return json.loads((golden_1_2_dir / "mask_strategy.json").read_text())


def written(mask: torch.Tensor) -> str:
    return "".join("1" if generated else "0" for generated in mask.tolist())


# ---------------------------------------------------------------------------------------------------------------------
# Training


def test_masks_are_as_likely_as_published(masks: Any) -> None:
    """But for those that the published code cannot draw, and those that give all frames."""
    generator, seen = torch.Generator().manual_seed(0), 0
    for mode, by_length in masks["distributions"].items():
        for length, expected in by_length.items():
            if not isinstance(expected, dict) or any("1" not in mask for mask in expected):
                continue
            count = 1 if len(expected) == 1 else DRAWS
            found = Counter(written(draw_mask(OURS.get(mode, mode), int(length), generator)) for _ in range(count))
            assert found.keys() <= expected.keys(), (mode, length)
            for mask, share in expected.items():
                spread = (share * (1 - share) / count) ** 0.5
                assert found[mask] / count == pytest.approx(share, abs=5 * spread + 1e-12), (mode, mask)
            seen += 1
    assert seen == 45


def test_random_masks_give_about_half(masks: Any) -> None:
    golden, generator = masks["random_mode"], torch.Generator().manual_seed(0)
    drawn = torch.stack([draw_mask("random", golden["T"], generator) for _ in range(4000)])
    assert drawn.any(1).all()
    given = (~drawn).double().mean(1)
    assert given.mean() == pytest.approx(golden["mean_fraction_conditioned"], abs=0.02)
    assert (given < 0.1).double().mean() > 0.05 and (given > 0.8).double().mean() > 0.05  # each with its own share


@pytest.mark.parametrize("mode", list(FrameMasksConfig().shares()))
@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_short_clips_keep_a_frame_to_generate(mode: str, length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([draw_mask(mode, length, generator) for _ in range(50)])
    assert drawn.any(1).all()
    assert drawn.all() if length == 1 else not drawn.all()


def test_shares_decide_how_often_a_mode_is_drawn(masks: Any) -> None:
    published = masks["mask_ratios"]["v12_adapt_and_feat"]
    shares = {OURS.get(mode, mode): share for mode, share in published.items()}
    drawer = FrameMasks(FrameMasksConfig(**shares))
    drawn = drawer.draw(15, [torch.Generator().manual_seed(number) for number in range(6000)])
    assert drawn is not None and drawn.dtype == torch.bool
    found = Counter(map(written, drawn))
    everything, first, ends = ("1" * 15, "0" + "1" * 14, "0" + "1" * 13 + "0")
    assert found[everything] / 6000 == pytest.approx(1 - sum(shares.values()), abs=0.03)
    head = shares["image_head"] + (shares["quarter_head"] + shares["image_random"] / 5) / 3
    assert found[first] / 6000 == pytest.approx(head, abs=0.02)
    assert found[ends] / 6000 == pytest.approx(0.05 + 0.01 / 3, abs=0.012)


def test_a_mask_belongs_to_its_sample_and_to_whole_tokens() -> None:
    drawer = FrameMasks(FrameMasksConfig(random=1.0), patch_frames=2)
    many = drawer.draw(7, [torch.Generator().manual_seed(seed) for seed in range(5)])
    alone = drawer.draw(7, [torch.Generator().manual_seed(3)])
    assert many is not None and alone is not None and many.shape == (5, 7)
    assert torch.equal(many[3], alone[0]) and len({written(mask) for mask in many}) > 2
    assert torch.equal(many[:, :6:2], many[:, 1::2])
    assert drawer.draw(1, [torch.Generator()]) is None  # a picture
    nothing = FrameMasks(FrameMasksConfig())
    assert not nothing and nothing.draw(7, [torch.Generator()]) is None


# ---------------------------------------------------------------------------------------------------------------------
# IDDPM


@pytest.mark.parametrize("name", ["masked", "plain"])
@pytest.mark.parametrize("kind", [GaussianDiffusion, Float32Diffusion])
def test_iddpm_losses(golden_1_2_dir: Path, name: str, kind: type[GaussianDiffusion]) -> None:
    """Ours but for the bound at step 0, which the original's float32 tables shift; with such tables everywhere."""
    case = load_case(golden_1_2_dir, "iddpm_mask_losses")
    x_0, noise, output, t = (case[f"in.{key}.{name}"] for key in ("x0", "noise", "model_out", "t"))
    frame_mask = case.tensors.get(f"in.mask.{name}")
    diffusion, tolerance = kind(), case.info["tolerances"]["out_rel"]
    seen = []

    def model(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return output

    loss = diffusion.losses(model, x_0, noise, t.float(), frame_mask=frame_mask)
    terms = diffusion.loss_terms(output, x_0, seen[0], t, noise, frame_mask=frame_mask)
    assert t.tolist() == [0, 421, 999]
    for key, found in {"loss": loss, "x_t": seen[0], **terms}.items():
        expected = case[f"out.{key}.{name}"]
        if kind is GaussianDiffusion and key in ("loss", "vb"):
            assert relative_error(found[:1], expected[:1]) < 0.01, key
            found, expected = found[1:], expected[1:]
        assert relative_error(found, expected) < tolerance, key


def test_all_given_is_no_loss_and_no_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, 2, 4, 3, 2, 2, generator=generator)
    output = torch.randn(2, 8, 3, 2, 2, generator=generator, requires_grad=True)
    frame_mask = torch.tensor([[True, False, True], [False, False, False]])
    timesteps = torch.tensor([0.0, 500.0])
    losses = GaussianDiffusion().losses(lambda *_: output, x_0, noise, timesteps, frame_mask=frame_mask)
    assert losses[0] > 0 and losses[1] == 0
    losses.sum().backward()
    assert output.grad is not None and output.grad.isfinite().all()
    assert output.grad[0, :, [0, 2]].abs().sum() > 0
    assert output.grad[0, :, 1].abs().sum() == output.grad[1].abs().sum() == 0


def test_speed(golden_1_2_dir: Path) -> None:
    case = load_case(golden_1_2_dir, "iddpm_speed")
    tolerance = case.info["tolerances"]["out_rel"]
    assert case.info["meaningful_steps"] == SPEED_MIRROR
    p, published = torch.from_numpy(speed_probabilities()), case["p"]
    # Where the curve turns the original's float32 tables leave their rounding, which the factor 1e6 makes visible.
    turn = slice(634, 649)
    assert relative_error(p[turn], published[turn]) < 5e-3
    assert relative_error(torch.cat([p[:634], p[649:]]), torch.cat([published[:634], published[649:]])) < tolerance
    diffusion = GaussianDiffusion(timestep_sampling="speed")
    assert relative_error(diffusion._lookup("speed_weights", torch.arange(1000)), case["weights"]) < tolerance
    _check_speed_draws(diffusion, case)


def _check_speed_draws(diffusion: GaussianDiffusion, case: Case) -> None:
    p = case["p"].double()
    steps = torch.arange(1000)
    mirrored = torch.where(steps < SPEED_MIRROR, SPEED_MIRROR - steps, steps - SPEED_MIRROR)
    expected = (p + torch.zeros(1000, dtype=torch.float64).index_add(0, mirrored, p)) / 2
    generators = [torch.Generator().manual_seed(number) for number in range(8000)]
    drawn = diffusion.draw_timesteps(generators, 1).long()
    for low, high in pairwise([0, 100, 300, 500, 640, 700, 850, 1000]):
        share = ((drawn >= low) & (drawn < high)).double().mean().item()
        assert share == pytest.approx(expected[low:high].sum().item(), abs=0.02), (low, high)
    assert ((drawn >= 700).double().mean() < 0.06) and drawn.min() >= 0 and drawn.max() <= 999


def test_speed_weighs_the_mse_alone() -> None:
    x_0, noise = torch.randn(2, 3, 4, 2, 2, 2)
    output, t = torch.randn(3, 8, 2, 2, 2), torch.tensor([0, 421, 999])
    plain, speed = GaussianDiffusion(), GaussianDiffusion(timestep_sampling="speed")
    x_t = plain.q_sample(x_0, t, noise)
    usual, weighed = (each.loss_terms(output, x_0, x_t, t, noise) for each in (plain, speed))
    signal = torch.from_numpy(plain.tables["alphas_cumprod"])[t].float()
    torch.testing.assert_close(weighed["mse"], usual["mse"] * (1 - signal), rtol=1e-5, atol=1e-7)
    assert torch.equal(weighed["vb"], usual["vb"])


# ---------------------------------------------------------------------------------------------------------------------
# Strings


def test_strategies_are_parsed(strings: Any) -> None:
    for text, expected in strings["parse"].items():
        assert [list(condition) for condition in parse_strategy(text)] == expected, text
    assert parse_strategy(None) == []


def test_references_are_inserted(strings: Any) -> None:
    """z frame i is -(i + 1), frame i of reference r is 100 (r + 1) + i."""
    for row in strings["rows"]:
        if "error" in row:
            with pytest.raises(ConfigError, match=r"there is no reference 2 \(1 reference, from 0\)"):
                _insert(row, 0)
            continue
        for sample, (frames, ratios) in enumerate(zip(row["frames"], row["mask"], strict=True)):
            found, found_ratios = _insert(row, sample)
            assert found.flatten().tolist() == frames, row["strings"]
            assert torch.equal(found_ratios, torch.tensor(ratios)), row["strings"]


def _insert(row: Any, sample: int) -> tuple[torch.Tensor, torch.Tensor]:
    latents = -torch.arange(1.0, row["T"] + 1).view(1, -1, 1, 1)
    references = [
        (100.0 * (number + 1) + torch.arange(length)).view(1, -1, 1, 1)
        for number, length in enumerate(row["ref_lengths"][sample])
    ]
    conditions = parse_strategy(row["strings"][sample])
    return insert_references(latents, references, conditions, loop=row["loop"], align=row["align"])


def test_starts_are_aligned(strings: Any) -> None:
    for start, align, total, expected in strings["nearest"]:
        assert aligned(start, align, total) == expected, (start, align, total)


def test_the_clip_before_becomes_a_reference(strings: Any) -> None:
    for case in strings["append_generated"]:
        settings = {
            "loop": case["loop"],
            "length": case["condition_frame_length"],
            "edit_ratio": case["condition_frame_edit"],
        }
        for before, count, after, more in zip(
            case["before"], case["ref_counts_before"], case["after"], case["ref_counts_after"], strict=True
        ):
            assert append_generated(before, count, **settings) == after
            assert more == count + 1
    for latents, frames in strings["dframe_to_frame"].items():
        assert frames_of_chunks(int(latents)) == frames


def test_prompts(strings: Any) -> None:
    for case in strings["prompts_loop"]:
        assert prompt_of_loop(case["prompt"], case["loop"]) == case["out"]
    for case in strings["split_merge"]:
        texts, loops = split_prompt(case["prompt"])
        assert [texts, loops] == case["split"]
        assert merge_prompt(texts, loops) == case["merged"]
    for case in strings["json_in_prompt"]:
        found = read_json(case["prompt"])
        assert [[found.text], [found.reference_path], [found.mask_strategy]] == case["out"]
    for case in strings["score_suffix"]:
        names = {"aes": "aesthetic", "flow": "motion", "camera_motion": "camera"}
        scores = {names[name]: value for name, value in case["args"].items()}
        found = with_scores("A cat.", **scores)
        assert found == case["out"]
        assert with_scores(found, **scores) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,x", "mask strategy '0,x': '0,x': expected loop,ref,ref_start,target,length,edit_ratio"),
        ("0;", "mask strategy '0;': '': expected loop,ref"),
        ("0,0,0,0,1,0,7", "expected loop,ref"),
        ("0,0,0,0,0", "expected a length of at least 1"),
        ("0,0,0,0,1,1.5", "an edit ratio from 0 to 1"),
        ("0,-1", "no negative loop or reference"),
    ],
)
def test_strategies_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_strategy(text)
    assert message in str(caught.value)


def test_places_outside_the_clip() -> None:
    latents, reference = torch.zeros(1, 4, 1, 1), torch.ones(1, 2, 1, 1)
    for text, message in (("0,0,0,4", "clip has 4 latent frames, and none at 4"), ("0,0,-3", "reference has 2 latent")):
        with pytest.raises(ConfigError, match=message):
            insert_references(latents, [reference], parse_strategy(text), loop=0)
    with pytest.raises(ConfigError, match="6 latent frames are no whole chunks of 5"):
        frames_of_chunks(6)


def test_braces_in_prompts() -> None:
    assert read_json("a set {1, 2}").text == "a set {1, 2}"
    for broken in ('a {"mask_strategy": 0,}', 'a {"mask_strategy": "0", "more": 1}'):
        with pytest.raises(ConfigError, match=r"expected \{\"reference_path\": "):
            read_json(broken)
