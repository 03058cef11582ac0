"""Frames that are given beside those that are generated, in all networks: read at timestep 0, free where none is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from opensora_repro.models.layers import generated_frames
from tests.video_models import CONFIGS, make_inputs, make_model, some_frames

NAMES = list(CONFIGS)


def gradients(model: Any, out: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    out.square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_without_given_frames_nothing_changes(name: str) -> None:
    model = make_model(name)
    inputs, told = make_inputs(model.cfg)
    plain = model(*inputs, **told)
    expected = gradients(model, plain)
    masked = model(*inputs, **told, frame_mask=torch.ones(2, 3, dtype=torch.bool))
    assert torch.equal(masked, plain)
    found = gradients(model, masked)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_without_given_frames_is_the_same_beside_one_with_them(name: str) -> None:
    """As on a GPU, where nobody looks into a mask: modulation by frame is the samples' to the bit."""
    model = make_model(name)
    inputs, told = make_inputs(model.cfg)
    mask = torch.tensor([[True, True, True], [False, True, True]])
    with torch.no_grad():
        plain, masked = model(*inputs, **told), model(*inputs, **told, frame_mask=mask)
    assert torch.equal(masked[0], plain[0]) and not torch.allclose(masked[1], plain[1], atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_all_frames_given_are_the_model_at_timestep_0(name: str) -> None:
    model = make_model(name)
    (latents, timestep, *rest), told = make_inputs(model.cfg)
    with torch.no_grad():
        given = model(latents, timestep, *rest, **told, frame_mask=torch.zeros(2, 3))
        at_zero = model(latents, torch.zeros(2), *rest, **told)
    same = torch.allclose(given, at_zero, atol=1e-5)
    assert same == (name != "stdit2")  # whose final layer tells given frames their size, and no others


@pytest.mark.parametrize("name", NAMES)
def test_fewer_rows_are_repeated(name: str) -> None:
    """A guidance call's: conditions and masks of n samples for 2n."""
    model = make_model(name)
    inputs, told = make_inputs(model.cfg, samples=4)
    mask = some_frames(2, 3)
    with torch.no_grad():
        few = {key: value[:2] for key, value in told.items()}
        whole = {key: value.repeat(2) for key, value in few.items()}
        found = model(*inputs, **few, frame_mask=mask)
        torch.testing.assert_close(found, model(*inputs, **whole, frame_mask=mask.repeat(2, 1)))
        with pytest.raises(ValueError, match="a frame mask of 3 rows cannot be repeated over 4 samples"):
            model(*inputs, **told, frame_mask=some_frames(3, 3))


@pytest.mark.parametrize("name", NAMES)
def test_frames_of_latents_or_of_tokens(name: str) -> None:
    """A token of two frames is given where both are; what is padded is given."""
    model = make_model(name, patch_size=(2, 2, 2))
    inputs, told = make_inputs(model.cfg, size=(5, 6, 8))
    latents = torch.tensor([[False, False, True, False, True], [True, True, False, False, False]])
    tokens = torch.tensor([[False, True, True], [True, False, False]])
    with torch.no_grad():
        assert torch.equal(*(model(*inputs, **told, frame_mask=mask) for mask in (latents, tokens)))
    with pytest.raises(ValueError, match=r"expected a frame mask \[2, 5\], got \[2, 4\]"):
        model(*inputs, **told, frame_mask=torch.ones(2, 4))


def test_a_mask_that_is_true_everywhere_is_none() -> None:
    latents = torch.zeros(2, 4, 3, 2, 2)
    assert generated_frames(torch.ones(2, 3), latents, 1) is None
    found = generated_frames(some_frames(1, 3).long(), latents, 1)
    assert found is not None and torch.equal(found, torch.tensor([[False, True, True]] * 2))


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_changes_nothing(name: str, checkpointing: str, offload: bool) -> None:
    model = make_model(name)
    inputs, told = make_inputs(model.cfg)
    told["frame_mask"] = some_frames(2, 3)
    expected = gradients(model, model(*inputs, **told))
    model.activation_checkpointing, model.offload_activations = checkpointing, offload
    found = gradients(model, model(*inputs, **told))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", NAMES)
def test_prepared_text_with_guidance(name: str) -> None:
    """Each latent once for two captions; folded, as it is on a CPU, and with captions under a mask."""
    model = make_model(name)
    (latents, timestep, text, mask), told = make_inputs(model.cfg)
    null = model.null_condition()
    for masks in (mask, None):
        for frame_mask in (None, some_frames(2, 3)):
            with torch.no_grad():
                doubled = [x.repeat(2, *[1] * (x.ndim - 1)) for x in (latents, timestep)]
                both = torch.cat([text, null.expand_as(text)])
                expected = model(*doubled, both, masks, **told, frame_mask=frame_mask)
                found = model(
                    latents, timestep, model.prepare_text(text, masks, null=null), **told, frame_mask=frame_mask
                )
                alone = model(latents, timestep, model.prepare_text(text, masks), **told, frame_mask=frame_mask)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(alone, expected[:2], atol=1e-5, rtol=1e-4)


def test_embedded_captions_end_to_end() -> None:
    """`skip_y_embedder`: cached text, whose lengths stand in for a mask; prepared likewise."""
    model, plain = make_model("stdit3", skip_y_embedder=True), make_model("stdit3")
    (latents, timestep, text, mask), told = make_inputs(model.cfg)
    with torch.no_grad():
        expected = plain(latents, timestep, text, mask, **told)
        embedded = plain.y_embedder(text)[mask][None]  # [1, N, D]
        lengths = mask.sum(1)
        found = model(latents, timestep, embedded, lengths, **told)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        null = model.null_condition()
        guided = model(latents, timestep, model.prepare_text(embedded, lengths, null=null), **told)
        torch.testing.assert_close(guided[:2], expected, atol=1e-5, rtol=1e-4)
        nulls = plain(latents, timestep, plain.null_condition().expand_as(text), mask, **told)
        torch.testing.assert_close(guided[2:], nulls, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"expected text \[1, 15, 48\], got \[1, 14, 48\]"):
        model(latents, timestep, embedded[:, :14], lengths, **told)
    with pytest.raises(ValueError, match=r"model\.skip_y_embedder=true: captions that are embedded already"):
        model(latents, timestep, embedded, lengths, drop_text=torch.ones(2).bool(), **told)


@pytest.mark.parametrize("name", ["stdit2", "stdit3"])
def test_frames_of_a_longer_video_keep_its_positions(name: str) -> None:
    """The order of frames matters, and where they are only as far as they are apart."""
    model = make_model(name)
    seen: list[Tensor] = []
    model.in_order()[0].register_forward_hook(lambda _module, inputs, _out: seen.append(inputs[4]))
    inputs, told = make_inputs(model.cfg, size=(5, 6, 8))
    with torch.no_grad():
        model(*inputs, **told)
        model(inputs[0][:, :, 2:], *inputs[1:], **told, first_frame=2)
    assert torch.equal(seen[1], seen[0][2:])
    with pytest.raises(ValueError, match="first_frame=-1 must be a multiple"):
        model(*inputs, **told, first_frame=-1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 16}, r"hidden_size=48 over model\.num_heads=16 must be even"),
        ({"num_heads": 5}, r"model\.num_heads=5 does not divide"),
        ({"input_sq_size": 0}, r"model\.input_sq_size=0 must be positive"),
    ],
)
@pytest.mark.parametrize("name", ["stdit2", "stdit3"])
def test_wrong_configs_are_named(name: str, change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(name, **change)
