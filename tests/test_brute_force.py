"""What a report says of a gradient's signal is true: held against the gradients of all examples, at every step.

From timid learning rates to the edge of stability, where momentum keeps little of the signal (`brute_force`).
"""

import functools

import numpy as np
import pytest
from brute_force import WORKLOADS, Row, covers, rows

WORST = 1.5  # no bound is false by more


@functools.cache
def seen(name: str) -> list[Row]:
    """All looks at a workload."""
    return rows(name)


def false_bounds(found: list[Row]) -> tuple[list[float], int]:
    """By how much false statements ">= limit" are false, of how many such statements."""
    bounds = [row for row in found if row.total["snr_low"] <= 0]
    over = [row.snr / row.total["snr_high"] for row in bounds]
    return [x for x in over if x > 1], len(bounds)


def ratio(found: list[Row]) -> float:
    """The median of estimate over truth, where the truth is at least three errors; nan where it never is."""
    clear = [row.total["snr"] / row.snr for row in found if row.snr > 3 * row.total["snr_error"]]
    return float(np.median(clear)) if clear else np.nan


def check_consistent(row: Row) -> None:
    """The numbers of one row say one thing."""
    x = row.total
    assert x["snr_low"] <= x["snr"] <= x["snr_high"]
    assert (x["snr_low"] > 0) == np.isfinite(x["noise_scale"]) == np.isfinite(x["noise_scale_high"])
    if x["snr_low"] > 0:
        assert x["noise_scale"] == pytest.approx(row.batch / x["snr"])
        if np.isfinite(x["snr_error"]):
            assert x["noise_scale_error"] / x["noise_scale"] == pytest.approx(x["snr_error"] / x["snr"], rel=1e-6)


def test_a_small_workload():
    """A noisy quadratic at two rates: the SNR is in its interval, also where <m, g> knows only a part of it."""
    found = rows("quadratic", rates=(0.03, 0.1), batches=(16,), looks=(20, 80), seeds=4)
    assert np.mean([covers(row) for row in found]) >= 0.85
    assert 0.8 < ratio(found) < 1.25
    late = [row.total for row in found if row.step == 80]
    assert np.median([x["snr_high"] / x["snr_low"] for x in late]) < 6
    of_momentum = [x["persistent"] / (x["gradient_norm"] ** 2 - x["persistent"]) for x in late]
    fast = [row.rate > 0.05 for row in found if row.step == 80]
    truth = [row.snr for row in found if row.step == 80]
    assert np.median(np.divide(of_momentum, truth)[fast]) < 0.5
    for row in found:
        check_consistent(row)


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKLOADS)
def test_the_snr_is_in_its_interval_at_every_rate(name):
    """In at least 75 % of looks at each rate; and right on the median, where there is enough to see."""
    for rate in sorted({row.rate for row in seen(name)}):
        some = [row for row in seen(name) if row.rate == rate]
        assert np.mean([covers(row) for row in some]) >= 0.75, rate
        assert not abs(np.log(ratio(some))) > np.log(1.25), (rate, ratio(some))
    for row in seen(name):
        check_consistent(row)


@pytest.mark.slow
def test_the_snr_is_in_its_interval():
    """In at least 85 % of all looks; at most 5 % of bounds are false, and none by much."""
    every = [row for name in WORKLOADS for row in seen(name)]
    assert np.mean([covers(row) for row in every]) >= 0.85
    over, bounds = false_bounds(every)
    assert len(over) <= 0.05 * bounds
    assert max(over, default=0) <= WORST
