"""Distances of two sets of features, means of a set, and how sure each number is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NORMAL_95 = 1.96  # standard errors to either side of a mean, of a normal distribution's 95 %
GROUPS = 10  # of a jackknife: each leaves out a tenth of both sets
CHUNK = 1024  # rows of a kernel's matrix at once


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % confidence interval; `low` and `high` are equal where one sample tells of no spread."""

    value: float
    low: float
    high: float

    def as_json(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


def mean_of(values: Tensor) -> Estimate:
    """The mean of independent values [N], and a normal interval from their spread."""
    values = values.double()
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return _around(float(values.mean()), error)


def share_of(flags: Sequence[bool]) -> Estimate:
    """The share of those that are true, and Wilson's interval, which holds where none or all are."""
    count, share, z = len(flags), sum(flags) / len(flags), NORMAL_95
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    reach = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return Estimate(share, max(0.0, middle - reach), min(1.0, middle + reach))


def jackknife(statistic: Callable[[Tensor, Tensor], float], found: Tensor, real: Tensor) -> Estimate:
    """A statistic of two sets [N, ...] and [M, ...], its error by leaving out a tenth of both in turn.

    What the statistic is biased by stays: it is told with the number of samples.
    """
    value = statistic(found, real)
    groups = min(GROUPS, len(found), len(real))
    if groups < 3:
        return Estimate(value, value, value)
    parts = torch.tensor([statistic(_without(found, g, groups), _without(real, g, groups)) for g in range(groups)])
    error = math.sqrt((groups - 1) / groups * float((parts - parts.mean()).square().sum()))
    return _around(value, error)


def _around(value: float, error: float) -> Estimate:
    return Estimate(value, value - NORMAL_95 * error, value + NORMAL_95 * error)


def _without(samples: Tensor, group: int, groups: int) -> Tensor:
    return samples[torch.arange(len(samples)) % groups != group]


def frechet_distance(found: Tensor, real: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to features [N, D] and [M, D] (FID: Heusel et al. 2017; FVD).

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2). The last root's trace is the sum of the singular values of
    X Y^T for the centred X and Y, so that no root of a matrix is taken, and fewer samples than channels are no trouble.
    """
    (mean_1, triangle_1), (mean_2, triangle_2) = _gaussian(found), _gaussian(real)
    root = torch.linalg.svdvals(triangle_1 @ triangle_2.T).sum()
    spread = triangle_1.square().sum() + triangle_2.square().sum()
    return float((mean_1 - mean_2).square().sum() + spread - 2 * root)


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and R [min(N, D), D] with R^T R the covariance."""
    features = features.double()
    mean = features.mean(dim=0)
    centred = (features - mean) / math.sqrt(max(1, len(features) - 1))
    return mean, torch.linalg.qr(centred, mode="r").R


def kernel_distance(found: Tensor, real: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy of features [N, D] and [M, D] (KID: Binkowski et al. 2018; KVD).

    Kernel (x . y / D + 1)^3. It is 0 on average, now and then negative, for samples of one distribution.
    """
    found, real = found.double(), real.double()
    across = _kernel_sum(found, real) / (len(found) * len(real))
    return _within(found) + _within(real) - 2 * across


def _within(features: Tensor) -> float:
    """Mean of the kernel over pairs of different samples."""
    own = float(_kernel((features * features).sum(dim=1), features.shape[1]).sum())
    pairs = len(features) * (len(features) - 1)
    return (_kernel_sum(features, features) - own) / pairs if pairs else math.nan


def _kernel_sum(first: Tensor, second: Tensor) -> float:
    return sum(float(_kernel(rows @ second.T, first.shape[1]).sum()) for rows in first.split(CHUNK))


def _kernel(products: Tensor, channels: int) -> Tensor:
    return (products / channels + 1) ** 3


def wasserstein_distance(found: Tensor, real: Tensor) -> float:
    """Wasserstein-1 distance of two sets of numbers [N] and [M]: how far they lie apart, in their own unit."""
    first, second = found.double().sort().values, real.double().sort().values
    both = torch.cat([first, second]).sort().values
    shares = [torch.searchsorted(own, both[:-1], right=True) / len(own) for own in (first, second)]
    return float(((shares[0] - shares[1]).abs() * both.diff()).sum())
