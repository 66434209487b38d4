"""The quantities of a report: how each follows from what was summed, and what it says, in a sentence.

Numbers for several layers are ratios of sums, never means of ratios: a small layer with a wild ratio does not count
more than it weighs.

*Signal and noise of the gradient* are estimates, with an interval that holds the truth in 95 % of cases. Products of
successive gradients, extrapolated to lag 0, give l, the share of the power A = |g|^2 that is signal (`_lags`), at any
learning rate. The inner product of a gradient with the momentum before it gives L, the part of the signal that
persists over the momentum's memory: at most the signal, where gradients do not fall within that memory. Together

    snr = l / (1 - l)        between l - h and l + h, each as x / (1 - x); if the lags alone find no signal, l - h <= 0,
                             between max(l - h, .75 (L/A - 1.4 h_L)) and max(l, L/A, 0) + 1.5 h; at least the lower end,
                             if that is above 0
    persistence = L / (l A),   with Fieller's interval
    noise_scale = B / snr,   between B over the one end and B over the other

Batches that are drawn without replacement from N examples have noises that add up to zero over an epoch, which makes
every product low: to the SNR B / N is added, and a signal is found if the lower end is above 0 after that.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from snr_adam.telemetry._rows import Sums

_SURE = 1.4  # found by either of two, so by each in fewer cases: both together find in 3 % of pure noise
_BOUND = 1.5  # where only a bound is left to say, it is that of 99.7 %
_FALLING = 0.75  # while gradients fall, L holds older and larger ones: up to a fifth more than the signal
_ALL = 1 - 1e-6  # a share of signal above this is all of it, to the rounding of float32


class _Row(NamedTuple):
    """Sums with what follows from them, and what the reader said of the batches."""

    sums: Sums
    share: np.ndarray
    half: np.ndarray
    low: np.ndarray
    high: np.ndarray
    lasting: np.ndarray
    lasting_half: np.ndarray
    batch_size: float
    added: float

    @property
    def power(self):
        """A, and where no L is known that of the sketches: moments may see what is made of several gradients."""
        return np.where(np.isnan(self.lasting), self.sums.power_sum, self.sums.gradient_sq)

    def ratio(self, share):
        """The SNR of a share of signal."""
        return _ratio(share) + self.added

    def fieller(self, sign: int):
        """An end of the interval of the ratio of two independent estimates; nan where the lower one may be 0."""
        x, e, y, h = self.lasting, self.lasting_half, self.share, self.half
        a, c = y**2 - h**2, x**2 - e**2
        root = np.sqrt(np.maximum(x**2 * y**2 - a * c, 0))
        return np.where((a > 0) & (y > 0), (x * y + sign * root) / a, np.nan)

    @property
    def scale(self):
        snr = self.ratio(self.share)
        return np.where(np.isnan(snr), np.nan, np.where(self.ratio(self.low) > 0, self.batch_size / snr, np.inf))

    @property
    def error(self):
        """The standard error of the SNR: 1.96 of it are the larger side of its interval; inf if that has no end."""
        with np.errstate(invalid="ignore"):
            return np.where(self.share < _ALL, self.ratio(self.high) - self.ratio(self.share), np.nan) / 1.96


def _ratio(share):
    """x / (1 - x), inf for all there is."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(share < _ALL, share / (1 - share), np.where(np.isnan(share), np.nan, np.inf))


class Column(NamedTuple):
    """A quantity: how it is made, and what it says."""

    of: Callable[[_Row], np.ndarray]
    says: str


def _root(x):
    return np.sqrt(np.maximum(x, 0))


COLUMNS: dict[str, Column] = {
    "size": Column(lambda r: r.sums.size, "How many numbers the layer has."),
    "signal": Column(
        lambda r: np.sqrt(r.sums.signal_sq),
        "The norm of m^, the average gradient that the optimizer follows; the noise that passes it is still in it.",
    ),
    "noise": Column(
        lambda r: np.sqrt(r.sums.noise_sq),
        "The root of the sum of v^, by which the optimizer divides (without a v, the norm of the gradient).",
    ),
    "pseudo_snr": Column(
        lambda r: np.sqrt(r.sums.signal_sq) / np.sqrt(r.sums.noise_sq),
        "signal / noise: Adam's step in units of the learning rate. 1 is all signal; near the floor the steps are a "
        "random walk.",
    ),
    "floor": Column(lambda r: np.sqrt(r.sums.floor_sq), "What pure noise shows as pseudo_snr."),
    "snr": Column(
        lambda r: r.ratio(r.share),
        "The power of the true gradient over that of the noise in one batch's gradient: below 1, a gradient is mostly "
        "noise, and larger batches save steps.",
    ),
    "snr_error": Column(
        lambda r: r.error,
        "The standard error of snr: 1.96 of it are the larger side of its 95 % interval; inf if that has no end.",
    ),
    "snr_low": Column(
        lambda r: r.ratio(r.low), "The lower end of the 95 % interval of snr; above 0, signal was found."
    ),
    "snr_high": Column(lambda r: r.ratio(r.high), "The upper end of the 95 % interval of snr."),
    "persistence": Column(
        lambda r: np.where(np.isnan(r.fieller(1)), np.nan, r.lasting / r.share),
        "The share of the signal that gradients agree on over the memory of m. Above 0.1, the learning rate is not too "
        "large while the loss falls; near 0, steep directions are in balance with the noise.",
    ),
    "persistence_low": Column(lambda r: r.fieller(-1), "The lower end of the 95 % interval of persistence."),
    "persistence_high": Column(lambda r: r.fieller(1), "The upper end of the 95 % interval of persistence."),
    "significant": Column(
        lambda r: r.sums.significant / r.sums.counted,
        "The share of elements whose m^ noise alone would exceed in 5 % of cases: 0.05 is no signal. Not known where "
        "more than a fifth of the gradients that come at all are 0.",
    ),
    "effective_step": Column(
        lambda r: np.sqrt(r.sums.update_sq / r.sums.size) / np.sqrt(r.sums.param_sq / r.sums.size),
        "update_rms / param_rms: how fast a layer moves.",
    ),
    "update_rms": Column(lambda r: np.sqrt(r.sums.update_sq / r.sums.size), "Root mean square of the update."),
    "param_rms": Column(lambda r: np.sqrt(r.sums.param_sq / r.sums.size), "Root mean square of the parameters."),
    "gradient_norm": Column(lambda r: np.sqrt(r.sums.gradient_sq), "Root of the average of |g|^2."),
    "gradient_signal": Column(
        lambda r: _root(r.share * r.power),
        "The norm of the true gradient, as estimated; 0 if none is found.",
    ),
    "gradient_noise": Column(
        lambda r: _root((1 - r.share) * r.power),
        "The norm of the noise in one batch's gradient, as estimated.",
    ),
    "persistent": Column(
        lambda r: r.sums.persistent,
        "The average of <m^ before the step, g>, the power that gradients agree on over the memory of m. Below 0 they "
        "turn round.",
    ),
    "learning_rate": Column(
        lambda r: r.sums.rate_sum / r.sums.size,
        "The learning rate of the step looked at, the mean over the elements. Not known of other optimizers without "
        "`optax.inject_hyperparams`.",
    ),
    "effective_rate": Column(
        lambda r: r.sums.rate_sum / r.sums.size * np.sqrt(r.sums.signal_sq) / np.sqrt(r.sums.noise_sq),
        "learning_rate * pseudo_snr: how far an element goes in a step, without weight decay.",
    ),
    "step_gradient_norm": Column(
        lambda r: np.sqrt(r.sums.power), "The norm of one gradient, that of the step looked at, as the moments see it."
    ),
    "unclipped_norm": Column(
        lambda r: np.sqrt(r.sums.unclipped_sq),
        "The same before a guard clipped it; not known where none clips.",
    ),
    "clipped": Column(
        lambda r: r.sums.clipped,
        "The share of steps whose gradients a guard has clipped, an average; not known where none clips.",
    ),
    "skipped_share": Column(
        lambda r: r.sums.skipped,
        "The share of steps that a guard has not taken, for gradients that were not finite; spikes are counted apart, "
        "by `health`. Not known without a guard.",
    ),
    "cosine": Column(
        lambda r: r.sums.product / np.sqrt(r.sums.before_sq * r.sums.power),
        "The cosine between the gradient and m before it. Around 0 in pure noise; below 0 the gradient turns round.",
    ),
    "spike": Column(
        lambda r: r.sums.spike,
        "By how many standard deviations the log of the gradient's norm, before a guard clips it, exceeds its average; "
        "not known before 20 looks. Above 6 it is a spike.",
    ),
    "spike_step": Column(
        lambda r: r.sums.spike_step,
        "The step at which the newest spike began; the layer with the smallest spiked first.",
    ),
    "spike_peak": Column(lambda r: r.sums.spike_peak, "The largest spike since spike_step."),
    "zero_gradients": Column(
        lambda r: r.sums.zeros / r.sums.size, "The share of elements whose gradient is 0; on CPU."
    ),
    "relative_gradient": Column(
        lambda r: np.sqrt(r.sums.relative_sq / r.sums.size),
        "Root mean square of g / v^^(1/2), element by element. Well above 1, v has not seen such gradients yet, and "
        "steps are too large.",
    ),
    "largest_gradient": Column(lambda r: r.sums.largest_gradient, "The largest |g| of an element."),
    "largest_signal": Column(lambda r: r.sums.largest_signal, "The largest |m^| of an element."),
    "largest_update": Column(lambda r: r.sums.largest_update, "The largest |u| of an element's update u."),
    "lost_updates": Column(
        lambda r: r.sums.lost / r.sums.moved,
        "The share of updates that are lost to rounding, as p + u is p: most of them are below half a unit in the last "
        "place of the weights as they are stored. `carry_remainder` keeps them.",
    ),
    "noise_scale": Column(
        lambda r: r.scale,
        "The batch in which signal and noise are equally strong, in examples (in batches, if no batch size was given); "
        "inf where no signal was found.",
    ),
    "noise_scale_error": Column(
        lambda r: np.where(np.isinf(r.scale), np.inf, r.scale * r.error / r.ratio(r.share)),
        "The standard error of noise_scale, relative to it the same as that of snr.",
    ),
    "noise_scale_low": Column(
        lambda r: r.batch_size / np.maximum(r.ratio(r.high), 0),
        "The lower end of the 95 % interval of noise_scale: without signal, what it is above.",
    ),
    "noise_scale_high": Column(
        lambda r: np.where(np.isnan(r.low), np.nan, r.batch_size / np.maximum(r.ratio(r.low), 0)),
        "The upper end of the 95 % interval of noise_scale; inf where no signal was found.",
    ),
}
"""Every quantity of a report, by name."""


def columns(sums: Sums, batch_size: float | None, examples: int | None) -> dict[str, np.ndarray]:
    """The table of all quantities."""
    with np.errstate(divide="ignore", invalid="ignore"):
        share, half = sums.share_sum / sums.power_sum, (np.sqrt(sums.spread) + sums.slack) / sums.power_sum
        power = np.where(sums.gradient_sq > 0, sums.gradient_sq, np.nan)
        lasting, lasting_half = sums.persistent / power, np.sqrt(sums.persistent_half) / power
        least, above = sums.least_sum / sums.power_sum, sums.above / sums.power_sum
        share = np.maximum(share, least)
        low, high = np.maximum(share - half, least), share + half + above
        added = 0.0 if examples is None else (batch_size or 1.0) / examples
        unsure = _ratio(low) + added <= 0  # where the lags found nothing, L may
        low = np.where(unsure, np.fmax(low, _FALLING * (lasting - _SURE * lasting_half)), low)
        high = np.where(unsure, np.fmax(np.fmax(share, lasting), 0) + _BOUND * half + above, high)
        found = _ratio(low) + added > 0
        share, low = np.where(found, np.fmax(share, low), share), np.where(found, low, np.fmin(low, share))
        row = _Row(sums, share, half, low, high, lasting, lasting_half, batch_size or 1.0, added)
        return {key: np.broadcast_to(column.of(row), sums.size.shape) for key, column in COLUMNS.items()}
