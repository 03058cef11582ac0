"""Sequence parallelism over gloo: two and four processes equal one, in outputs and in every parameter's gradient."""

from __future__ import annotations

from typing import Any

import pytest

from tests.sequence_world import CHECKS, FLOAT32_CASES, run_checks

TOLERANCE = 1e-5  # largest difference over the tensor's largest value, float32


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.exhaustive)])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All checks, run once on that many processes."""
    found = run_checks(request.param, tmp_path_factory.mktemp("group") / "ranks")
    for check, errors in found.items():  # shown by pytest -s
        for name, error in errors.items() if isinstance(errors, dict) else ():
            print(f"{request.param} processes, {check}, {name}: {error:.2e}")
    return found


def errors_of(results: dict[str, Any], check: str) -> dict[str, float]:
    errors = results[check]
    assert isinstance(errors, dict), errors  # else the traceback of a rank
    return errors


@pytest.mark.parametrize("case", FLOAT32_CASES)
def test_outputs_and_gradients_are_those_of_one_process(results: dict[str, Any], case: str) -> None:
    assert errors_of(results, "float32")[case] <= TOLERANCE


def test_videos_of_unlike_lengths_forward_before_either_backward(results: dict[str, Any]) -> None:
    assert max(errors_of(results, "two forwards").values()) <= TOLERANCE


def test_bf16_autocast_is_as_exact_as_in_one_process(results: dict[str, Any]) -> None:
    errors = errors_of(results, "autocast")
    for kind in ("kept", "recomputed"):
        noise = errors[f"{kind}: whole to float32"]
        assert errors[f"{kind}: shared to float32"] <= 1.5 * noise
        assert errors[f"{kind}: shared to whole"] <= 1.5 * noise


def test_sampling_with_a_doubled_batch(results: dict[str, Any]) -> None:
    assert max(errors_of(results, "sampling").values()) <= TOLERANCE


def test_two_groups_under_data_parallelism(results: dict[str, Any]) -> None:
    """Of two processes each group has one, and sequence parallelism adds nothing."""
    assert max(errors_of(results, "data parallel").values()) <= TOLERANCE


def test_projections_may_be_replaced_afterwards(results: dict[str, Any]) -> None:
    assert max(errors_of(results, "replaced projections").values()) <= TOLERANCE


def test_layers_cut_by_heads_and_columns(results: dict[str, Any]) -> None:
    assert max(errors_of(results, "tensor parallel").values()) <= TOLERANCE


@pytest.mark.parametrize("check", ["counts", "refusals", "group of one"])
def test_edges(results: dict[str, Any], check: str) -> None:
    assert check in CHECKS
    assert errors_of(results, check) == {}
