"""From a noise scale to a batch size, and to the hyper-parameters that belong to it.

With batches of B examples, the same loss takes (McCandlish et al. 2018, arXiv 1812.06162, eq. 2.11)

    S = S_min (1 + B_simple / B) steps,   E = E_min (1 + B / B_simple) examples

At B = B_simple both are twice the least. Below it, a batch twice as large nearly halves the steps; above it, the
examples are wasted. That is with the best learning rate for each batch. Where the rate is far below the best, curvature
does not limit it: of a step of length alpha, a share (1 + B_simple / B)^(-1/2) goes along the gradient, so that

    S ~ 1/alpha (1 + B_simple / B)^(1/2) = ((1 + B_simple / B) / B)^(1/2)            for alpha ~ sqrt(B), see below

The intervals of `steps` and `examples` hold both. Far below B_simple they are the same.

Learning rate and decays are not independent settings; they scale with the batch size:

    alpha ~ sqrt(B)                       the noise of the gradient falls by as much (Malladi et al. 2022)
    log b ~ B                             so that m and v remember as many examples as before (Marek et al. 2025)

Both rules are local, so one goes from batch to batch in steps, and measures again.

B_simple grows while a model learns, often tenfold and more. The number to put in is that of the whole run, from the
mean share of signal in its gradients (`over_run`): what it says of the steps is the mean of what the run's moments do.
"""

import math
from typing import NamedTuple

import numpy as np

from snr_adam.telemetry.noise_scale import NoiseScale

# each held against branches of runs at half and twice the rate, `benchmarks/persistence.py`
_NOT_TOO_LARGE, _IN_BALANCE = (
    "The learning rate is not too large while the loss falls: gradients agree over the memory of m.",
    "Steep directions are in balance with the noise. A larger learning rate is unlikely to help; a lower one, or a\n"
    "decay, helps if the loss has stopped falling.",
)

STRIDE = 3
"""The doublings that are advised at once: 8 times the batch turns b1 = .9 into .43, 64 times into .001: no average."""


class Setting(NamedTuple):
    """A batch size and the hyper-parameters that belong to it."""

    batch_size: int
    learning_rate: float
    b1: float
    b2: float

    def __str__(self) -> str:
        rates = f"learning rate {self.learning_rate:.3g}, b1 {self.b1:.3g}, b2 {self.b2:.5g}"
        return f"{self.batch_size:,} examples, {rates}"

    def at(self, batch_size: int) -> "Setting":
        """The same for another batch size."""
        ratio = batch_size / self.batch_size
        return Setting(batch_size, self.learning_rate * math.sqrt(ratio), self.b1**ratio, self.b2**ratio)

    def half_life(self, b: float) -> float:
        """After how many examples a moving average of decay b has forgotten half of what it knew."""
        return self.batch_size * math.log(0.5) / math.log(b) if b > 0 else 0.0


class Advice(NamedTuple):
    """What to change: `advised.batch_size`, `advised.learning_rate` and so on. `str()` explains it."""

    noise_scale: NoiseScale
    now: Setting
    advised: Setting
    persistence: tuple[float, float] | None = None

    @property
    def signal(self) -> float:
        """The share of |g|^2 that is signal now, 1 / (1 + B_simple / B)."""
        return 1 / (1 + _least(self.noise_scale) / self.now.batch_size)

    def _steps(self, scale: float) -> tuple[float, float]:
        """With the best learning rate for each batch, and with one far below it."""
        then, now = self.advised.batch_size, self.now.batch_size
        best = now / then if np.isinf(scale) else (1 + scale / then) / (1 + scale / now)
        return best, math.sqrt(best * now / then)

    @property
    def steps(self) -> float:
        """Steps to the same loss, as a multiple of the present number, with the best learning rate for each batch."""
        return self._steps(_least(self.noise_scale))[0]

    @property
    def steps_interval(self) -> tuple[float, float]:
        """The least and the most, for the ends of the noise scale's interval and learning rates up to the best."""
        scales = [float(x) for x in (_least(self.noise_scale), self.noise_scale.low, self.noise_scale.high)]
        ends = [end for scale in scales if not np.isnan(scale) for end in self._steps(scale)]
        return min(ends), max(ends)

    @property
    def examples(self) -> float:
        """Examples, and so compute, to the same loss, as a multiple of the present number."""
        return self.steps * self.advised.batch_size / self.now.batch_size

    @property
    def examples_interval(self) -> tuple[float, float]:
        """The ends of `examples`, likewise."""
        ratio = self.advised.batch_size / self.now.batch_size
        low, high = self.steps_interval
        return low * ratio, high * ratio

    @property
    def learning_rate(self) -> str:
        """What persistence says of the learning rate, "" where it says nothing."""
        low, high = self.persistence or (math.nan, math.nan)
        return _NOT_TOO_LARGE if low > 0.1 else _IN_BALANCE if high < 0.1 else ""

    def __str__(self) -> str:
        now = self.now
        found = f"at most {self.signal:.0%}" if np.isinf(self.noise_scale.value) else f"{self.signal:.0%}"
        head = (
            f"The noise scale is {self.noise_scale} examples.\n"
            f"A gradient of {now.batch_size:,} is {found} signal, the rest of its power is noise.\n"
            f"  now      {now}\n"
        )
        tail = f"\n{self.learning_rate}" if self.learning_rate else ""
        if self.advised == now:
            return f"{head}  advised  the same{tail}"
        steps, examples = (" to ".join(f"{x:.2g}" for x in x) for x in (self.steps_interval, self.examples_interval))
        return (
            f"{head}  advised  {self.advised}\n"
            f"To the same loss: {self.steps:.2g} times the steps ({steps}),\n"
            f"{self.examples:.2g} times the examples ({examples}).\n"
            "The learning rate goes with the square root of the batch, as the noise does. Signal and noise\n"
            f"still forget half in {now.half_life(now.b1):,.0f} and {now.half_life(now.b2):,.0f} examples."
            f"{' Then measure again, to go on.' if self.advised.batch_size == now.batch_size * 2**STRIDE else ''}{tail}"
        )


def over_run(history, batch_size: float, since: int = 0) -> NoiseScale:
    """The noise scale of a whole run, from the mean share of signal in its reports; each counts for its steps.

    B (1 - l) / l,   l = mean of SNR / (1 + SNR)

    At each moment batches of B' take (1 + B_simple / B') / (1 + B_simple / B) = l + (1 - l) B / B' times as many steps.
    That is linear in l, the share of the gradient's power that is signal. So over a run the mean of l counts: where the
    SNR is small, B over the mean SNR, a harmonic mean of noise scales.

    Args:
      history: a `History` of reports, made with or without a batch size. Those whose SNR is not known are left out.
      batch_size: B, the number of examples in a gradient.
      since: leave out reports up to this step.

    Returns:
      A `NoiseScale` in examples. Its interval is that of the means of the ends of all reports' intervals, as if their
      errors were the same; where no signal was found, it counts from 0.

    Raises:
      ValueError: if no report has an SNR.

    >>> from types import SimpleNamespace
    >>> from snr_adam.telemetry.history import History
    >>> total = {"snr": 0.1, "snr_low": 0.08, "snr_high": 0.125}
    >>> print(over_run(History([SimpleNamespace(step=8, names=(), columns={}, total=total)]), batch_size=32))
    320 (256 to 400)

    Reference: McCandlish et al., arXiv 1812.06162, appendix C, for averages over a run.
    """
    steps = np.asarray(history.steps)
    gaps = np.where(steps > since, np.diff(steps, prepend=since), 0)
    keys = ("snr", "snr_low", "snr_high")
    rows = np.array([history.total[key] for key in keys]) if set(keys) <= {*history.total} else np.full((3, 0), np.nan)
    known = ~np.isnan(rows).any(0) & (gaps[: rows.shape[1]] > 0)
    if not known.any():
        raise ValueError("no report of this history has an SNR: the first comes six steps after the start of a run")
    shares = 1 - 1 / (1 + np.maximum(rows[:, known], 0))
    share, low, high = np.average(shares, axis=1, weights=gaps[known])

    def scale(share) -> float:
        return batch_size * float((1 - share) / share) if share > 0 else math.inf

    found = bool(share > 0 and low > 0)
    error = batch_size * float((high - share) / 1.96 / share**2) if found else math.inf
    value = scale(share) if found else math.inf
    return NoiseScale(value, error, scale(high), scale(low), "mean over the run")


def advise(
    noise_scale: NoiseScale, batch_size, learning_rate, b1=0.9, b2=0.999, *, largest=None, persistence=None
) -> Advice:
    """The batch size that a noise scale asks for, with the learning rate and the decays that go with it.

    B' = B 2^k next to B_simple, |k| <= 3,   alpha' = alpha sqrt(B'/B),   b' = b^(B'/B)

    It is an order of magnitude: the best batches of McCandlish et al. lay between 1/8 and 20 times the run's average
    noise scale (their Table 1). Put in that of a whole run, `over_run(history, batch_size)`, not the last number alone.

    Args:
      noise_scale: a measurement, in examples. Where no signal was found, its lower end is taken and k is at least 0.
      batch_size: B, the number of examples in a batch now.
      learning_rate: alpha now.
      b1: the decay of the signal's moving average now.
      b2: the decay of the noise's moving average now.
      largest: the largest batch that is possible, if there is one.
      persistence: the ends of the interval of `persistence` in a report, (low, high), for a sentence about the learning
        rate where experiments bear one out: above 0.1 that it is not too large while the loss falls, below 0.1
        that a larger one is unlikely to help.

    Returns:
      An `Advice`. Print it.

    Raises:
      ValueError: if there is no noise scale to go by, because it is nan or an array.

    >>> from snr_adam.telemetry.noise_scale import from_scalars
    >>> print(advise(from_scalars(4.0, 1.0, 0.1, batch_size=32), 32, 1e-3))
    The noise scale is 96 (75 to 128) examples.
    A gradient of 32 is 25% signal, the rest of its power is noise.
      now      32 examples, learning rate 0.001, b1 0.9, b2 0.999
      advised  128 examples, learning rate 0.002, b1 0.656, b2 0.99601
    To the same loss: 0.44 times the steps (0.32 to 0.48),
    1.8 times the examples (1.3 to 1.9).
    The learning rate goes with the square root of the batch, as the noise does. Signal and noise
    still forget half in 211 and 22,170 examples.

    References: McCandlish et al., arXiv 1812.06162; Malladi et al., arXiv 2205.10287; Marek et al., arXiv 2507.07101.
    """
    if np.ndim(noise_scale.value) or np.isnan(noise_scale.value):
        raise ValueError(f"noise_scale={noise_scale}: advice needs one number that is not nan")
    now = Setting(int(batch_size), float(learning_rate), float(b1), float(b2))
    wanted = math.log2(max(_least(noise_scale), 1.0) / now.batch_size)
    doublings = max(math.floor(wanted), 0) if np.isinf(noise_scale.value) else round(wanted)
    doublings = min(max(doublings, -STRIDE), STRIDE)
    if largest is not None:
        doublings = min(doublings, math.floor(math.log2(largest / now.batch_size)))
    return Advice(noise_scale, now, now.at(max(1, math.floor(now.batch_size * 2.0**doublings))), persistence)


def _least(noise_scale: NoiseScale) -> float:
    """The noise scale, or what it exceeds; 0 where even that is unknown."""
    least = noise_scale.low if np.isinf(noise_scale.value) else noise_scale.value
    return float(least) if np.isfinite(least) else 0.0
