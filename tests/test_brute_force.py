"""What a report says of a gradient's signal is true: held against the gradients of all examples, at every step.

From timid learning rates to the edge of stability, where momentum keeps little of the signal (`brute_force`).
"""

import functools

import numpy as np
import pytest
from brute_force import WORKLOADS, Row, covers, covers_persistence, rows

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


def ratios(found: list[Row]) -> dict[tuple, float]:
    """Median of the estimates over median of the truth, for each rate, batch and step where it is three errors clear.

    Not row by row: an estimate that is too small has a small error, and would be chosen for it.
    """
    cells: dict = {}
    for row in found:
        cells.setdefault((row.rate, row.batch, row.step), []).append(row)
    medians = {
        cell: [np.median(x) for x in zip(*((r.total["snr"], r.total["snr_error"], r.snr) for r in some), strict=True)]
        for cell, some in cells.items()
    }
    return {cell: float(snr / true) for cell, (snr, error, true) in medians.items() if true > 3 * error}


def check_consistent(row: Row) -> None:
    """The numbers of one row say one thing."""
    x = row.total
    assert x["snr_low"] <= x["snr"] <= x["snr_high"]
    assert (x["snr_low"] > 0) == np.isfinite(x["noise_scale"]) == np.isfinite(x["noise_scale_high"])
    if x["snr_low"] > 0:
        assert x["noise_scale"] == pytest.approx(row.batch / x["snr"])
        if np.isfinite(x["snr_error"]):
            assert x["noise_scale_error"] / x["noise_scale"] == pytest.approx(x["snr_error"] / x["snr"], rel=1e-6)


def check_persistence(found: list[Row]) -> None:
    """Its interval holds what <m^, G> is of |G|^2 in at least 90 % of looks, of those at which it is known: most."""
    known = [row for row in found if np.isfinite(row.total["persistence_low"])]
    assert len(known) > len(found) / 2
    assert np.mean([covers_persistence(row) for row in known]) >= 0.9


def test_a_small_workload():
    """A noisy quadratic at two rates: the SNR is in its interval, also where <m, g> knows only a part of it."""
    found = rows("quadratic", rates=(0.03, 0.1), batches=(16,), looks=(20, 80), seeds=4)
    assert np.mean([covers(row) for row in found]) >= 0.85
    for rate in (0.03, 0.1):
        late = [(row.total["snr"], row.snr) for row in found if (row.step, row.rate) == (80, rate)]
        assert 0.8 < np.divide(*np.median(late, axis=0)) < 1.25, rate
    late = [row.total for row in found if row.step == 80]
    assert np.median([x["snr_high"] / x["snr_low"] for x in late]) < 6
    of_momentum = [x["persistent"] / (x["gradient_norm"] ** 2 - x["persistent"]) for x in late]
    fast = [row.rate > 0.05 for row in found if row.step == 80]
    truth = [row.snr for row in found if row.step == 80]
    assert np.median(np.divide(of_momentum, truth)[fast]) < 0.5
    for row in found:
        check_consistent(row)
    check_persistence(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKLOADS)
def test_the_snr_is_in_its_interval_at_every_rate(name):
    """In at least 75 % of looks at each rate; and right on the median, where there is enough to see."""
    clear = ratios(seen(name))
    assert clear
    for rate in sorted({row.rate for row in seen(name)}):
        some = [row for row in seen(name) if row.rate == rate]
        assert np.mean([covers(row) for row in some]) >= 0.75, rate
        middle = np.median([x for cell, x in clear.items() if cell[0] == rate] or [1.0])  # a cell is a few runs: +- .3
        assert 0.8 < middle < 1.25, (rate, clear)
    for row in seen(name):
        check_consistent(row)


@pytest.mark.slow
def test_persistence_is_in_its_interval():
    check_persistence([row for name in WORKLOADS for row in seen(name)])


@pytest.mark.slow
def test_the_snr_is_in_its_interval():
    """In at least 85 % of all looks; at most 5 % of bounds are false, and none by much."""
    every = [row for name in WORKLOADS for row in seen(name)]
    assert np.mean([covers(row) for row in every]) >= 0.85
    over, bounds = false_bounds(every)
    assert bounds > 0
    assert len(over) <= max(0.05 * bounds, 1)  # there are few: one more or less is chance
    assert max(over, default=0) <= WORST
