"""What every quantity of a report is made of, a number per row, and how rows add up."""

import dataclasses
from dataclasses import dataclass

import numpy as np

OF_LAGS = ("share_sum", "power_sum", "spread", "slack", "above", "least_sum")
_ALONE = ("persistent", "persistent_half", *OF_LAGS, "product", "before_sq", "unclipped_sq", "rate_sum", "relative_sq")
"""Sums that are unknown for all if they are for one."""
_LARGEST = ("spike", "spike_step", "spike_peak", "clipped", "skipped")
_LARGEST += ("largest_gradient", "largest_signal", "largest_update")
"""What is no sum: of several rows the largest."""


@dataclass(frozen=True)
class Sums:
    """What every column is made of; float64, one entry per row.

    share_sum to least_sum are of `_lags`: S, a, the square of half the width of the interval of S, what it is wider to
    both sides and above, and the least that S can be. persistent_half: as spread, of L. From power on as in
    `_averages.Last`; unclipped_sq: the power before a guard clipped, rate_sum: the learning rate times the size. The
    spikes are of `_spikes`; skipped is the share of steps that a guard did not take.
    """

    size: np.ndarray
    signal_sq: np.ndarray
    noise_sq: np.ndarray
    floor_sq: np.ndarray
    significant: np.ndarray
    counted: np.ndarray
    update_sq: np.ndarray
    param_sq: np.ndarray
    gradient_sq: np.ndarray
    persistent: np.ndarray
    persistent_half: np.ndarray
    share_sum: np.ndarray
    power_sum: np.ndarray
    spread: np.ndarray
    slack: np.ndarray
    above: np.ndarray
    least_sum: np.ndarray
    power: np.ndarray
    product: np.ndarray
    before_sq: np.ndarray
    unclipped_sq: np.ndarray
    rate_sum: np.ndarray
    zeros: np.ndarray
    clipped: np.ndarray
    relative_sq: np.ndarray
    lost: np.ndarray
    moved: np.ndarray
    largest_gradient: np.ndarray
    largest_signal: np.ndarray
    largest_update: np.ndarray
    spike: np.ndarray
    spike_step: np.ndarray
    spike_peak: np.ndarray
    skipped: np.ndarray

    def pick(self, rows) -> "Sums":
        return Sums(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))

    @staticmethod
    def join(parts: list["Sums"]) -> "Sums":
        """The rows of several, one after the other."""
        return Sums(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in dataclasses.fields(Sums)))

    def add(self) -> "Sums":
        """One row for all. The errors of different rows count as independent, the floor is weighted by the noise."""
        total = {field.name: _known_sum(getattr(self, field.name)) for field in dataclasses.fields(self)}
        total |= {key: np.sum(getattr(self, key), keepdims=True) for key in _ALONE}
        total |= {key: np.fmax.reduce(getattr(self, key), keepdims=True, initial=np.nan) for key in _LARGEST}
        with np.errstate(divide="ignore", invalid="ignore"):
            total["floor_sq"] = _known_sum(self.floor_sq * self.noise_sq) / total["noise_sq"]
        return Sums(**total)


SUMS = tuple(field.name for field in dataclasses.fields(Sums))


def _known_sum(x):
    """The sum of what is known, nan if nothing is."""
    return np.where(np.all(np.isnan(x)), np.nan, np.nansum(x, keepdims=True))
