"""Means with intervals, differences paired on seed, and what no other setting beats."""

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import scipy.stats

CONFIDENCE = 0.95
Pair = TypeVar("Pair", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean of n numbers with its interval; low and high are None for less than two numbers."""

    mean: float
    low: float | None
    high: float | None
    n: int


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and 95 % interval by Student's t: mean ± t(n-1) · s / √n, s with n - 1.

    Holds for independent numbers from a normal distribution, as seeds are usually taken to be.
    None of no numbers.
    """
    if not values:
        return None
    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return Estimate(mean, None, None, n)
    quantile = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
    half = quantile * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def paired_differences(
    values: Mapping[Pair, float], base: Mapping[Pair, float]
) -> dict[Pair, float]:
    """`values` minus `base` for what both have; what only one has takes part in nothing."""
    return {each: value - base[each] for each, value in values.items() if each in base}


def pareto_front(points: Sequence[tuple[float, float]], *, best: str) -> list[int]:
    """Indices, by cost, of the points that no other beats.

    A point is beaten by one that is at least as good and as cheap, and better or cheaper.

    Args:
      points: cost (less is better) and quality of each.
      best: "lowest" or "highest" quality.
    """
    sign = 1 if best == "lowest" else -1
    order = sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1]))
    front: list[int] = []
    for index in order:
        cost, quality = points[index]
        if (
            not front
            or sign * quality < sign * points[front[-1]][1]
            or points[front[-1]]
            == (
                cost,
                quality,
            )
        ):
            front.append(index)
    return front
