"""The demo's world and its judge: what is drawn is what is measured, and wrong videos are told from right ones."""

import itertools

import numpy as np
import pytest

from opensora_repro.demo.adherence import Seen, ideal_mask, mask_of, measure, overlap, shape_of
from opensora_repro.demo.shapes import (
    COLOURS,
    DIRECTIONS,
    FORMATS,
    SHAPES,
    Motion,
    draw_scene,
    motions,
    training_scenes,
)
from tests.bounding_box import shape_of_video


def test_held_out_rule_and_counts():
    assert len(motions()) == 72
    assert motions(held_out=True)[0].caption == "a red circle moving left"
    for c, colour in enumerate(COLOURS):
        for s, shape in enumerate(SHAPES):
            for d, direction in enumerate(DIRECTIONS):
                assert Motion(colour, shape, direction).held_out == ((c + s + d) % 7 == 0)
    assert not any(scene.motion.held_out for scene in training_scenes(2, seed=0))


@pytest.mark.parametrize(("size", "picture"), [(64, "1:1"), *((96, name) for name in FORMATS)])
def test_every_drawn_motion_is_measured_right_by_both_judges(size, picture):
    rng = np.random.default_rng(0)
    for motion in motions():
        scene = draw_scene(motion, rng, FORMATS[picture])
        frames = scene.frames(count=8, size=size)
        assert measure(frames) == Seen(motion.colour, motion.shape, motion.direction)
        masks = [mask_of(frame) for frame in frames]
        assert shape_of_video(masks) == motion.shape
        assert np.mean([overlap(mask, ideal_mask(motion.shape, mask)) for mask in masks]) > 0.9


def test_what_returns_ends_where_it_began():
    for motion in motions(returns=True)[::5]:
        frames = draw_scene(motion, np.random.default_rng(0)).frames(count=24, size=96)
        assert motion.caption.endswith(f"{motion.direction} and back")
        assert np.array_equal(frames[0], frames[-1]) and measure(frames).direction is None
        assert measure(frames[:12]) == Seen(motion.colour, motion.shape, motion.direction)
    assert not any(scene.motion.held_out for scene in training_scenes(1, seed=0, returns=True))


def test_formats_are_as_large_in_pixels_as_their_names_say_and_show_shapes_of_one_size():
    motion, areas = Motion("red", "square", "down"), []
    for name, picture in FORMATS.items():
        frames = draw_scene(motion, np.random.default_rng(0), picture).frames(count=2, size=96)
        width, height = map(int, name.split(":"))
        assert max(frames.shape[1:3]) == 96 and frames.shape[1] * width == frames.shape[2] * height
        areas.append(mask_of(frames[0]).sum())
    assert max(areas) <= 1.1 * min(areas)


def test_the_judge_says_none_to_fragments_stillness_and_darkness():
    rng = np.random.default_rng(1)
    frames = draw_scene(Motion("red", "circle", "left"), rng).frames(count=8, size=64)
    assert measure(np.repeat(frames[:1], 8, axis=0)).direction is None
    assert measure(np.zeros_like(frames)) == Seen(None, None, None)
    speckled = frames.copy()
    speckled[:, ::3] = speckled[:, :, ::3] = 0
    assert measure(speckled).shape is None
    two = np.zeros((64, 64), bool)
    two[10:20, 10:20] = two[40:50, 40:50] = True
    assert shape_of(two) is None


def test_same_seed_same_scenes():
    assert list(training_scenes(1, seed=3)) == list(training_scenes(1, seed=3))
    assert list(training_scenes(1, seed=3)) != list(training_scenes(1, seed=4))


def test_neighbouring_scenes_differ_in_colour_so_that_cuts_can_be_found():
    scenes = list(training_scenes(3, seed=0))
    same = sum(a.motion.colour == b.motion.colour for a, b in itertools.pairwise(scenes))
    assert same <= len(scenes) // 20
