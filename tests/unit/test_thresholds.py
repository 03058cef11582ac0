from __future__ import annotations

import numpy as np
import pytest

from opensora_repro.data.filter import thresholds
from opensora_repro.data.filter.step import filter_step
from opensora_repro.data.filter.thresholds import percentile
from opensora_repro.data.jobs.steps import NeedsAllRows

RANDOM = np.random.default_rng(0)
CASES = {
    "normal": RANDOM.normal(size=50_001),
    "few values": RANDOM.integers(0, 5, 40_000) - 2.0,
    "narrow": 1 + 1e-9 * RANDOM.random(30_000),
    "wide": np.array([-np.inf, -1e308, -1.0, -0.0, 0.0, 5e-324, 1.0, 1e308]),
    "one": np.array([7.5]),
    "with gaps": np.where(RANDOM.random(20_000) < 0.5, np.nan, RANDOM.gamma(2, 1, 20_000)),
    "all equal": np.full(30_000, 3.25),
}


@pytest.mark.parametrize("collect", [thresholds.COLLECT, 4])  # sorted at the end, or counted to the last bit
@pytest.mark.parametrize("name", CASES)
def test_percentiles_equal_numpys(name: str, collect: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thresholds, "COLLECT", collect)
    values = CASES[name]
    for percent in (0, 0.1, 10, 33.3, 50, 95, 99.99, 100):
        expected = np.nanpercentile(values, percent)
        found = percentile(lambda: np.array_split(values, 7), percent)
        assert found == expected or (np.isnan(expected) and found is not None)


def test_no_numbers_have_no_percentile() -> None:
    assert percentile(lambda: [np.array([np.nan]), np.array([])], 50) is None


def test_a_line_has_the_filters_that_a_row_alone_tells() -> None:
    columns = {"id": "string", "path": "string", "motion": "double", "num_frames": "int64", "fps": "double"}
    step = filter_step("filter", [("keep", "motion > .5 or missing(motion)"), ("keep", "duration >= 2")], columns)
    row = {"id": "a", "path": "/a.mp4", "motion": None, "num_frames": 48, "fps": 24.0, "other": object()}
    assert step.keeps(row) and step.keeps({**row, "motion": 0.6})
    assert not step.keeps({**row, "motion": 0.5}) and not step.keeps({**row, "num_frames": 47})
    for kind, text in (("percentile", "motion > 1%"), ("keep", "not duplicate"), ("keep", "path != ''")):
        with pytest.raises(NeedsAllRows) as told:
            filter_step("filter-late", [("keep", "motion > 0"), (kind, text)], columns)
        assert str(told.value) == f"filter-late ({text})"
