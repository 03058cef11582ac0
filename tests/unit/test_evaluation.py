"""Metrics of an evaluation, each against a known answer."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from opensora_repro.config import CheckpointConfig, Config, ConfigError, EvaluateConfig, ValidationConfig, check_config
from opensora_repro.evaluation import memorised, vbench
from opensora_repro.evaluation.clips import once_each
from opensora_repro.evaluation.distances import (
    frechet_distance,
    jackknife,
    kernel_distance,
    mean_of,
    share_of,
    wasserstein_distance,
)
from opensora_repro.evaluation.features import OWN, all_features, as_set, evenly, open_features
from opensora_repro.evaluation.losses import other_clip, shuffled_order, summary
from opensora_repro.evaluation.own_features import OwnFeatures, caption_words, small, train_own
from opensora_repro.evaluation.pixels import flicker, look_at
from opensora_repro.evaluation.quality import of_clip, of_features, of_looks
from opensora_repro.evaluation.run import names_of
from opensora_repro.evaluation.table import as_table
from opensora_repro.run_folder import best_checkpoint, list_checkpoints, mark_best, prune
from tests.tiny_models import make_tiny_clip, make_tiny_i3d, make_tiny_image_encoder

CPU = torch.device("cpu")

# Distances


def gaussian(count: int, mean: list[float], covariance: list[list[float]]) -> torch.Tensor:
    """Samples whose mean and covariance are these exactly."""
    x = torch.randn(count, len(mean), dtype=torch.float64)
    x = x - x.mean(dim=0)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T @ x / (count - 1)), x.T, upper=False).T
    return whitened @ torch.linalg.cholesky(torch.tensor(covariance, dtype=torch.float64)).T + torch.tensor(mean)


def test_frechet_distance_of_gaussians_in_closed_form() -> None:
    """Diagonal ones: |m1 - m2|^2 + sum (s1 - s2)^2; others with sqrtm as its eigenvalues have it."""
    first = gaussian(50, [1.0, 2.0], [[4.0, 0.0], [0.0, 9.0]])
    second = gaussian(70, [2.0, 4.0], [[1.0, 0.0], [0.0, 25.0]])
    assert frechet_distance(first, second) == pytest.approx(1 + 4 + (2 - 1) ** 2 + (3 - 5) ** 2)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
    a, b = [[2.0, 0.7], [0.7, 1.0]], [[1.0, -0.3], [-0.3, 3.0]]
    roots = torch.linalg.eigvals(torch.tensor(a, dtype=torch.float64) @ torch.tensor(b, dtype=torch.float64)).sqrt()
    expected = 3.0 + 4.0 - 2 * float(roots.real.sum())
    assert frechet_distance(gaussian(40, [0.0, 0.0], a), gaussian(30, [0.0, 0.0], b)) == pytest.approx(expected)


def test_frechet_distance_is_torchmetrics_with_fewer_samples_than_channels_too() -> None:
    from torchmetrics.image.fid import _compute_fid

    for count in (200, 12):
        first, second = torch.randn(count, 20).double(), 1.5 * torch.randn(count + 3, 20).double() + 0.3
        theirs = _compute_fid(first.mean(0), first.T.cov(), second.mean(0), second.T.cov())
        assert frechet_distance(first, second) == pytest.approx(float(theirs), rel=1e-4)


def test_kernel_distance_on_kernels_by_hand() -> None:
    """x, y in one channel: (xy + 1)^3. Pairs of different samples within, all across."""
    found, real = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0], [-1.0]])
    within = [1.0, (27.0 + 0.0 + (-1.0)) / 3]  # 0*1; 1*2, 1*-1, 2*-1
    across = (3 * 1.0 + 8.0 + 27.0 + 0.0) / 6
    assert kernel_distance(found, real) == pytest.approx(sum(within) - 2 * across)


def test_kernel_distance_is_unbiased_where_frechet_is_not() -> None:
    draws = [torch.randn(2, 10, 6, generator=torch.Generator().manual_seed(n)) for n in range(300)]
    kernels = torch.tensor([kernel_distance(a, b) for a, b in draws])
    assert abs(kernels.mean()) < 3 * kernels.std() / math.sqrt(len(draws))
    assert min(frechet_distance(a, b) for a, b in draws[:20]) > 0.1


def test_intervals() -> None:
    values = torch.arange(5.0)
    found = mean_of(values)
    assert (found.value, found.high - found.value) == pytest.approx((2.0, 1.96 * math.sqrt(2.5 / 5)))
    none = share_of([False] * 10)  # Wilson: z^2 / (n + z^2)
    assert (none.value, none.low, none.high) == pytest.approx((0, 0, 1.96**2 / (10 + 1.96**2)))
    # Of a mean of ten groups of one, the jackknife's error is the standard error.
    values = torch.randn(10, 1)
    error = jackknife(lambda a, b: float(a.mean()), values, values)
    assert error.high - error.value == pytest.approx(1.96 * float(values.std()) / math.sqrt(10), rel=1e-5)


def test_wasserstein_distance() -> None:
    zeros, ones = torch.zeros(4), torch.ones(7)
    assert wasserstein_distance(zeros, ones) == pytest.approx(1)
    assert wasserstein_distance(torch.tensor([0.0, 4.0]), torch.tensor([1.0, 2.0])) == pytest.approx(1.5)
    assert wasserstein_distance(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0, 3.0, 3.0])) == pytest.approx(0)


# Pixels


def square(step: int = 2, frames: int = 8) -> np.ndarray:
    """A grey square with a soft texture that moves to the right by `step` pixels a frame."""
    ramp = np.random.default_rng(0).integers(60, 200, (16, 16)).repeat(2, 0).repeat(2, 1)
    video = np.zeros((frames, 64, 96, 3), dtype=np.uint8)
    for t in range(frames):
        video[t, 16:48, 8 + step * t : 40 + step * t] = ramp[:, :, None]
    return video


def test_flicker_is_one_for_a_light_that_blinks_and_none_for_fades_and_motion() -> None:
    blink = np.zeros((6, 4, 4, 3), dtype=np.uint8)
    blink[::2] = 255
    fade = np.arange(0, 120, 20, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), dtype=np.uint8)
    assert flicker(blink) == pytest.approx(1)
    assert flicker(fade) == pytest.approx(0, abs=1e-9)
    assert flicker(square()) == pytest.approx(0, abs=1e-9)


def test_what_a_video_looks_like() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (8, 64, 64, 3), dtype=np.uint8)
    blots = noise[:, ::16, ::16].repeat(16, 1).repeat(16, 2)  # smooth within a frame, other ones in the next
    still = np.repeat(square()[:1], 8, axis=0)
    red = np.full((8, 64, 64, 3), (200, 10, 10), dtype=np.uint8)
    videos = {"moves": square(), "noise": noise, "blots": blots, "still": still, "red": red, "black": 0 * red}
    looks = {name: look_at(video) for name, video in videos.items()}
    shares = {name: (of.static, of.blank, of.noise) for name, of in looks.items()}
    assert shares == {
        "moves": (0, 0, 0), "noise": (0, 0, 1), "blots": (0, 0, 1), "still": (1, 0, 0), "red": (1, 1, 0),
        "black": (1, 1, 0),
    }  # fmt: skip
    fast = look_at(square(step=4)).motion
    assert looks["still"].motion == pytest.approx(0, abs=1e-3) and fast is not None
    assert 1.5 < fast / look_at(square(step=2)).motion < 2.5  # type: ignore[operator]
    picture = look_at(noise[:1])
    assert picture.numbers().keys() == {"sharpness", "blank", "noise"} and picture.noise
    assert looks["noise"].sharpness > 10 * looks["blots"].sharpness > looks["red"].sharpness == 0


def test_motion_is_compared_with_the_datas_own() -> None:
    slow, fast = look_at(square(1)), look_at(square(4))
    same, other = of_looks([slow, fast], [fast, slow]), of_looks([slow, slow], [fast, fast])
    assert same["motion_distance"] == pytest.approx(0, abs=1e-9)
    assert other["motion_distance"] == pytest.approx(other["data/motion"] - other["motion"].value)  # type: ignore


# What models see


def clips(count: int, size: int = 24, frames: int = 8) -> tuple[list[np.ndarray], list[str]]:
    """Squares of two colours that move in two directions."""
    videos, captions = [], []
    for number, (colour, way) in enumerate(
        itertools.islice(itertools.cycle(itertools.product((0, 2), (1, -1))), count)
    ):
        video = np.zeros((frames, size, size, 3), dtype=np.uint8)
        for t in range(frames):
            x = (number * 5 + way * 2 * t) % (size - 8)
            video[t, number % 12 : number % 12 + 8, x : x + 8, colour] = 255
        videos.append(video)
        captions.append(f"a {('red', '', 'blue')[colour]} square moving {'right' if way > 0 else 'left'}")
    return videos, captions


def test_features_made_on_the_spot_tell_what_is_shown_and_how_well(tmp_path: Path) -> None:
    videos, captions = clips(48)
    file = tmp_path / "own.safetensors"
    seen = torch.stack(list(map(small, videos[:32])))
    same = [tmp_path / name for name in ("1", "2")]
    for one in same:
        train_own(one, seen, captions[:32], seed=1, steps=2)
    assert same[0].read_bytes() == same[1].read_bytes()
    train_own(file, seen, captions[:32], seed=1, steps=40)
    model = OwnFeatures(file, CPU)
    real, held = all_features(model, videos[:32], 8), all_features(model, videos[32:], 8)
    noisy = [np.clip(v + np.random.default_rng(0).normal(0, 80, v.shape), 0, 255).astype(np.uint8) for v in videos[32:]]
    reds = [video for video, caption in zip(videos, captions, strict=True) if "red" in caption][:16]
    closest, worse, fewer = (of_features(all_features(model, of, 8), real) for of in (videos[32:], noisy, reds))
    for name in ("frechet", "kernel"):
        assert closest[name].value < min(worse[name].value, fewer[name].value) / 2, name  # type: ignore[union-attr]
    assert held.shape == (16, 1, 64)


def test_captions_words_that_tell_clips_apart() -> None:
    found = caption_words(["a red dog", "a blue dog", "a red cat", "a 7 zebra"])
    assert found.tolist() == [[1, 1], [0, 1], [1, 0], [0, 0]] or found.tolist() == [[1, 1], [1, 0], [0, 1], [0, 0]]
    assert caption_words(["same", "same"]).shape == (2, 0)


def test_every_kind_of_model_gives_features(tmp_path: Path) -> None:
    from transformers import VideoMAEConfig, VideoMAEModel

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    VideoMAEModel(VideoMAEConfig(image_size=32, patch_size=16, num_frames=4, **size)).save_pretrained(tmp_path / "mae")
    videos, _ = clips(3)
    found = {}
    for name, path in {
        "timm": make_tiny_image_encoder(tmp_path / "timm"),
        "clip": make_tiny_clip(tmp_path / "clip"),
        "mae": tmp_path / "mae",
        "i3d": make_tiny_i3d(tmp_path / "i3d.pt"),
        "plain": make_tiny_i3d(tmp_path / "plain.pt", scales=False),
    }.items():
        model = open_features(str(path), CPU)
        found[name] = all_features(model, videos, 2)
        assert len(model.fingerprint) >= 32
    shapes = {name: tuple(of.shape) for name, of in found.items()}
    assert shapes == {
        "timm": (3, 8, 24),
        "clip": (3, 8, 512),
        "mae": (3, 1, 16),
        "i3d": (3, 1, 24),
        "plain": (3, 1, 24),
    }
    mean = torch.tensor(np.stack([video.mean(axis=(0, 1, 2)) for video in videos]), dtype=torch.float32)
    colours = {name: found[name].reshape(3, 3, 8).mean(dim=2) for name in ("i3d", "plain")}
    assert torch.allclose(colours["i3d"], mean, atol=1e-3)
    assert torch.allclose(colours["plain"], mean / 127.5 - 1, atol=1e-2)
    assert as_set(found["timm"]).shape == (24, 24)
    assert not torch.equal(found["mae"][0], found["mae"][1])
    for path, message in ((tmp_path / "none", "no such folder"), (tmp_path / "clip" / "config.json", "no TorchScript")):
        with pytest.raises(ValueError, match=message):
            open_features(str(path), CPU)
    assert OWN not in found


def test_frames_are_taken_evenly() -> None:
    assert evenly(np.arange(9), 3).tolist() == [0, 4, 8]
    assert evenly(np.arange(2), 4).tolist() == [0, 0, 1, 1]


def test_clip_score_and_text_match_of_vectors_by_hand() -> None:
    captions = torch.eye(3)
    frames = torch.stack([captions[[0, 0]], captions[[1, 2]], -captions[[2, 2]]])  # right, half right, the opposite
    found = of_clip(frames, captions, ["a", "b", "c"])
    assert found["clip_score"].value == pytest.approx((100 + 50 + 0) / 3)  # type: ignore[union-attr]
    assert found["text_match"].value == pytest.approx(2 / 3)  # type: ignore[union-attr]
    assert "text_match" not in of_clip(frames, captions, ["a"] * 3)


# Losses


def test_gaps_are_zero_for_a_model_that_ignores_text_and_order() -> None:
    """And what they are otherwise; a side that clips do not have has no gap."""
    right = torch.rand(6, 2).double()
    losses = torch.stack([right, right, right + 0.25], dim=1)
    found = summary(losses, (0.2, 0.8))
    assert found["caption_gap"].value == found["caption_gap"].low == 0
    assert found["motion_gap"].value == pytest.approx(0.25)
    assert found["loss@0.8"].value == pytest.approx(float(right[:, 1].mean()))
    assert found["loss"].value == pytest.approx(float(right.mean()))
    losses[:, 2] = torch.nan
    assert "motion_gap" not in summary(losses, (0.2, 0.8))


def test_another_caption_and_another_order_are_keyed() -> None:
    captions, ids = ["red", "red", "blue"], ["1", "2", "3"]
    assert [other_clip(i, captions, ids) for i in range(2)] == [2, 2]
    assert other_clip(2, captions, ids) in (0, 1)
    assert other_clip(0, ["same"] * 3, ids) is None
    orders = [shuffled_order(str(n), 4).tolist() for n in range(60)]
    assert orders == [shuffled_order(str(n), 4).tolist() for n in range(60)]
    assert [0, 1, 2, 3] not in orders and [3, 2, 1, 0] not in orders and len(set(map(tuple, orders))) == 22
    assert shuffled_order("a", 2).tolist() == [1, 0]
    assert shuffled_order("a", 1).tolist() == [0]


# Memorisation


def test_a_copy_is_what_is_near_at_every_noise() -> None:
    """Nearer than nine of ten held-out clips, and than the one of its caption: some scenes are common."""
    held = memorised.Nearest([0] * 20, [1.0] * 20, [0.02 + 0.001 * place for place in range(20)], [0.1] * 20)
    assert memorised.limit_of(held, 7) == pytest.approx(0.021) and memorised.limit_of(held, 0) == pytest.approx(0.02)
    clips, pixels, seconds = (
        [7, 0, 7, 9, 12, 3],
        [0.015, 0.0205, 0.014, 0.03, 0.01, 0.01],
        [0.1] * 4 + [math.inf, 0.014],
    )
    samples = memorised.Nearest([4, 5, 4, 6, 8, 1], [0.5, 3.0, 0.4, 0.1, 9.0, 0.0], pixels, seconds)
    closest = memorised.are_near(samples, held, clips)
    assert closest == [True, False, True, False, True, False]  # the last one is between two
    assert memorised.suspects(samples, closest, clips) == [12, 7]
    flags = [True, False, True, False, False, False]
    lines = memorised.as_lines(samples, clips, {12: 3, 7: 8}, flags, list("abcdef"), [f"id{n}" for n in range(9)])
    assert lines[2]["second"] is None and lines[0]["second"] == 0.1
    assert [(line["sample"], line["training_clip"], line["near_again"]) for line in lines] == [
        (2, "id4", 8), (0, "id4", 8), (4, "id8", 3), (5, "id1", None), (1, "id5", None), (3, "id6", None)
    ]  # fmt: skip


def test_pairs_are_shown_side_by_side() -> None:
    shown = np.random.default_rng(1).integers(0, 255, (4, 2, 4, 4, 3), dtype=np.uint8)
    picture = memorised.side_by_side([(shown[0], shown[0]), (shown[1], shown[2])])
    assert picture.shape == (4 + 2 + 4, 8 + 6 + 8, 3)
    assert np.array_equal(picture[:4, :8], picture[:4, 14:])
    assert memorised.rms(shown[0], shown[0]) == 0
    assert memorised.thumbnail(shown[3]).shape == (2 * 3 * 16 * 16,)


def test_the_next_clip_is_not_the_same_one_in_another_file() -> None:
    training = torch.tensor([[0.5, 0.5], [0.502, 0.5], [0.6, 0.5], [0.9, 0.9]])
    assert memorised.one_apart(torch.tensor([0.51, 0.5]), training, 0) == 2
    assert memorised.one_apart(torch.tensor([0.51, 0.5]), training[:2], 0) is None


def test_channels_count_alike_in_distances() -> None:
    training = torch.tensor([[0.0, 0.0], [1.0, 1000.0], [2.0, 0.0]])
    assert memorised.nearest(torch.tensor([[1.9, 200.0]]), training) == [2]
    assert memorised.scale_of(training[:1]).isfinite().all()  # of one clip, which has no spread


def test_clips_that_are_repeated_are_seen_once() -> None:
    table = pa.table({"id": ["a", "b", "c", "d"], "path": ["y", "x", "y", "z"]})
    assert once_each(table)["id"].to_pylist() == ["a", "b", "d"]


def test_no_two_checkpoints_share_a_folder() -> None:
    paths = [Path(name) for name in ("x/a_2", "x/a", "y/a", "z/a", "r/checkpoints/step-1", "q/r/checkpoints/step-1")]
    assert names_of(paths) == ["a_2", "a", "a_3", "a_4", "r-step-1", "r-step-1_2"]


# VBench


def test_vbench_names_are_the_ones_that_it_looks_for(tmp_path: Path) -> None:
    file, samples, out = tmp_path / "prompts.json", tmp_path / "samples", tmp_path / "vbench"
    entries = [{"prompt_en": text, "dimension": ["color"]} for text in ("a red bike", "a cat, running", "a red bike")]
    file.write_text(json.dumps(entries))
    prompts = vbench.read_prompts(file)
    assert prompts == ["a red bike", "a cat, running"]
    samples.mkdir()
    for number in range(10):
        (samples / f"{number:04d}.mp4").write_text(str(number))
    for _ in range(2):
        vbench.lay_out(samples, out, prompts)
    assert {path.name: path.read_text() for path in out.iterdir()} == {
        f"{prompt}-{index}.mp4": str(5 * of + index) for of, prompt in enumerate(prompts) for index in range(5)
    }
    assert vbench.read_results(out) == {}
    (out / "results_2024_eval_results.json").write_text(json.dumps({"color": [0.75, [{"video_path": "x"}]]}))
    assert vbench.read_results(out) == {"vbench/color": 0.75}
    for text in ("[1]", '[{"prompt_en": "../../etc/passwd"}]', '[{"prompt_en": " "}]', "{"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="--vbench"):
            vbench.read_prompts(file)


# The table, and the best checkpoint


def test_the_table_marks_the_better_one() -> None:
    both = [
        {"name": name, "metrics": {"frechet": {"value": f, "low": f, "high": f}, "caption_gap": g, "motion": 1.0 + f}}
        | {"notes": ["few"]}
        for name, f, g in (("a", 2.0, 0.1), ("b", 1.0, 0.3))
    ]
    lines = as_table(both).splitlines()
    cells = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in lines[2:5]}
    assert cells == {
        "frechet": ["2 (2 to 2)", "**1** (1 to 1)"], "caption_gap": ["0.1", "**0.3**"], "motion": ["3", "2"]
    }  # fmt: skip
    assert lines[-1] == "- few"


def test_the_best_checkpoint_is_kept_and_known(tmp_path: Path) -> None:
    values = {10: 0.5, 20: 0.3, 30: 0.3, 40: 0.4}
    lines = [json.dumps({"step": step, "metrics": {"loss": v, "caption_gap": v}}) for step, v in values.items()]
    (tmp_path / "evaluation.jsonl").write_text("\n".join([*lines, '{"step": 99, "metr']))
    assert best_checkpoint(tmp_path) is None
    for step in (*values, 50):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        mark_best(tmp_path, "loss")
        prune(tmp_path, step, keep=1)
    assert best_checkpoint(tmp_path).name == "step-00000020"  # type: ignore[union-attr]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000020", "step-00000050"]
    mark_best(tmp_path, "caption_gap")  # of those that are there, of which 50 was not measured
    assert best_checkpoint(tmp_path).name == "step-00000020"  # type: ignore[union-attr]
    (tmp_path / "checkpoints" / "step-00000010").mkdir()
    mark_best(tmp_path, "caption_gap")
    assert best_checkpoint(tmp_path).name == "step-00000010"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "metric, evaluate, validation, message",
    [
        ("los", EvaluateConfig(every=10), 0, "one of loss, frechet"),
        ("loss", EvaluateConfig(), 0, "none without evaluate.every"),
        ("frechet", EvaluateConfig(), 10, "none without evaluate.every"),
        ("frechet", EvaluateConfig(every=10), 0, "another without evaluate.features"),
        ("noise", EvaluateConfig(every=10, samples=0), 0, "another without evaluate.samples"),
        ("psnr", EvaluateConfig(every=10), 0, "which .evaluate. measures"),
        ("loss", EvaluateConfig(every=7), 0, "evaluate.every = 7 to be a multiple of checkpoint.every = 5"),
        ("loss@0.33", EvaluateConfig(every=10), 0, "loss, or of validation.timesteps loss@0.1, loss@0.3, "),
        ("noise@0.1", EvaluateConfig(every=10), 0, "noise, or of validation.timesteps loss@0.1"),
        ("loss@0.1", EvaluateConfig(every=10), 0, ""),
        ("loss", EvaluateConfig(), 10, ""),
        ("kernel", EvaluateConfig(every=5, features="own"), 0, ""),
    ],
)
def test_what_keep_best_needs(metric: str, evaluate: EvaluateConfig, validation: int, message: str) -> None:
    cfg = Config(
        evaluate=evaluate,
        checkpoint=CheckpointConfig(every=5, keep_best=metric),
        validation=ValidationConfig(every=validation),
    )
    if not message:
        check_config(cfg)
        return
    with pytest.raises(ConfigError, match=message):
        check_config(cfg)
