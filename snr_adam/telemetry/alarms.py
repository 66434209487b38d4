"""What a person should look at in a run, in sentences: plain rules, each with its number and the limit it is held to.

    for alarm in alarms(history):
        print(alarm)

A rule about an estimate compares an end of its 95 % interval with a limit, never the estimate itself, and speaks if it
has held in every report from some step on to the last. Rules about layers speak of what is exact: no gradient, numbers
that are not finite, gradients that are rounding. Where a number is not known, or a history lacks it, nothing is said.

    rule            speaks if                                                  in
    no signal       snr_low <= 0                                               a quarter of the reports, 5 or more
    batch too small noise scale of the run, lower end > 8 batches              the whole run, 5 or more
    batch too large noise scale of the run, upper end < 1/20 batch             the whole run, 5 or more
    turning round   persistence_high < -floor^2                                5 reports
    random walk     pseudo_snr <= 1.05 floor and persistence_high < 0.1        5 reports
    skipped steps   skipped_share > 0.01                                       the last report
    not finite      signal was a number and is none                            the last report
    spike           spike_peak > 6, begun since the fifth last report          the last report
    no gradient     gradient_norm = 0, or all elements are 0                   5 reports
    rounding        `_layers.is_rounding`                                      5 reports
    updates lost    lost_updates > 0.5                                         5 reports

The limits of 8 batches and 1/20 are how far the best batches of McCandlish et al. (arXiv 1812.06162, table 1) lay from
the noise scale. On a quadratic in balance with the noise, persistence is -(1-b)/(1+b), which is -floor^2.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from snr_adam.telemetry._layers import ROUNDING, first_spike, is_rounding, network_order
from snr_adam.telemetry._spikes import LEAST
from snr_adam.telemetry.advice import over_run

_FAR_ABOVE, _FAR_BELOW = 8.0, 1 / 20
_LEFT = 1.05  # pseudo_snr up to here is at its floor: nothing but chance is above it
_SKIPPED = 0.01
_LOST = 0.5
_NAMED = 4  # more layers than these are counted
_RATE = "A lower learning rate, or a decay, helps if the loss has stopped falling."


class Alarm(NamedTuple):
    """One thing to look at; `str()` is its sentences.

    rule: its name, as in the table of this module. number, limit: what was measured, and what it was held to.
    says: sentences for people. layers: which it is about, none for the whole model. since: the step from which on the
    rule has held in every report.
    """

    rule: str
    number: float
    limit: float
    says: str
    layers: tuple[str, ...] = ()
    since: int = 0

    def __str__(self) -> str:
        return self.says


class _Run:
    """A history, read without complaint: what it lacks is nan."""

    def __init__(self, history, last: int):
        self.history, self.last = history, last
        self.steps = np.asarray(history.steps)
        self.names = tuple(history.names)

    def total(self, key: str) -> np.ndarray:
        """A quantity of the whole model, (T,)."""
        there = key in self.history.total
        return np.asarray(self.history.total[key]) if there else np.full(len(self.steps), np.nan)

    def layers(self, key: str) -> np.ndarray:
        """A quantity of each layer, (T, L)."""
        there = key in self.history.columns
        return np.asarray(self.history.columns[key]) if there else np.full((len(self.steps), len(self.names)), np.nan)

    def stretch(self, holds: np.ndarray, least: int) -> int:
        """In how many reports up to the last a rule has held without a break; 0 if in fewer than `least`."""
        broken = np.flatnonzero(~holds)
        reports = len(holds) - (broken[-1] + 1 if len(broken) else 0)
        return reports if reports >= least else 0

    def where(self, reports: int) -> str:
        """The stretch in words."""
        first, last = self.steps[-reports], self.steps[-1]
        return f"the last {reports:,} reports (steps {first:,} to {last:,})" if reports > 1 else f"step {last:,}"

    def about(self, rule: str, holds: np.ndarray, least: int, numbers, limit: float, text: str) -> Iterator[Alarm]:
        """An alarm for the layers of which a rule, (T, L), has held in the last reports.

        numbers: one per layer; the largest is the alarm's. text: with {where} and {layers}.
        """
        hit = np.all(holds[-least:], axis=0)
        if len(holds) < least or not hit.any():
            return
        layers = [self.names[i] for i in network_order(self.names) if hit[i]]
        few = ", ".join(layers[:_NAMED]) + (f" and {len(layers) - _NAMED:,} more" if len(layers) > _NAMED else "")
        words = f"{len(layers):,} layer{'s' if len(layers) > 1 else ''}: {few}."
        says = text.format(where=self.where(least), layers=words)
        yield Alarm(rule, float(np.max(numbers[hit])), limit, says, tuple(layers), int(self.steps[-least]))


def _no_signal(run: _Run) -> Iterator[Alarm]:
    low, high = run.total("snr_low"), run.total("snr_high")
    reports = run.stretch((low <= 0) & np.isfinite(high), max(run.last, len(low) // 4))
    if reports:
        most = float(high[-reports:].max())
        yield Alarm(
            "no signal",
            float(low[-reports:].max()),
            0.0,
            f"No signal was found in {run.where(reports)}: the SNR is below {most:.2g}, so at least "
            f"{1 / (1 + most):.0%} of a gradient's power is noise. A larger batch would show whether any is left.",
            since=int(run.steps[-reports]),
        )


def _batch(run: _Run) -> Iterator[Alarm]:
    if len(run.steps) < run.last:
        return
    try:
        scale = over_run(run.history, 1.0)
    except ValueError:  # no SNR is known
        return
    since, text = int(run.steps[0]), "Over the whole run the noise scale is"
    if scale.low > _FAR_ABOVE and np.isfinite(scale.high):
        yield Alarm(
            "batch too small",
            float(scale.low),
            _FAR_ABOVE,
            f"{text} {scale.low:.2g} to {scale.high:.2g} times the batch (95 % interval): a gradient is mostly noise. "
            "A larger batch, with the learning rate that `advise` names, takes fewer steps.",
            since=since,
        )
    if scale.high < _FAR_BELOW:
        yield Alarm(
            "batch too large",
            float(scale.high),
            _FAR_BELOW,
            f"{text} {scale.low:.2g} to {scale.high:.2g} of the batch (95 % interval): most examples of a batch add "
            "nothing. A smaller batch takes hardly more steps.",
            since=since,
        )


def _turning(run: _Run) -> Iterator[Alarm]:
    high, limit = run.total("persistence_high"), -(run.total("floor") ** 2)
    reports = run.stretch(high < limit, run.last)
    if reports:
        most, least = float(high[-reports:].max()), float(limit[-reports:].min())
        yield Alarm(
            "turning round",
            most,
            least,
            f"Gradients turned round in {run.where(reports)}: persistence is at most {most:.2g} (upper end of its 95 % "
            f"interval), where steep directions in balance with the noise show {least:.2g}. {_RATE}",
            since=int(run.steps[-reports]),
        )


def _random_walk(run: _Run) -> Iterator[Alarm]:
    seen, floor, high = run.total("pseudo_snr"), run.total("floor"), run.total("persistence_high")
    reports = run.stretch((seen <= _LEFT * floor) & (high < 0.1) & (high >= -(floor**2)), run.last)
    if reports:
        most = float((seen / floor)[-reports:].max())
        yield Alarm(
            "random walk",
            most,
            _LEFT,
            f"The updates were a random walk in {run.where(reports)}: the pseudo-SNR is at most {most:.2f} times its "
            f"floor, and persistence below {high[-reports:].max():.2g}. {_RATE}",
            since=int(run.steps[-reports]),
        )


def _skipped(run: _Run) -> Iterator[Alarm]:
    share = run.total("skipped_share")
    if len(share) and share[-1] > _SKIPPED:
        yield Alarm(
            "skipped steps",
            float(share[-1]),
            _SKIPPED,
            f"The guard has skipped {share[-1]:.1%} of the steps, because gradients were not finite.",
            since=int(run.steps[-1]),
        )


def _not_finite(run: _Run) -> Iterator[Alarm]:
    seen = run.layers("signal")
    lost = ~np.isfinite(seen) & np.isfinite(seen).any(0)
    text = (
        "At {where} the moments are not finite in {layers} Go back to an earlier checkpoint, and wrap the optimizer in "
        "`guard`, which skips such gradients."
    )
    yield from run.about("not finite", lost, 1, np.full(len(run.names), np.nan), np.inf, text)


def _spike(run: _Run) -> Iterator[Alarm]:
    began, peak = run.total("spike_step")[-1], run.total("spike_peak")[-1]
    if not (peak > LEAST and began >= run.steps[-run.last :][0]):
        return
    steps, peaks = run.layers("spike_step")[-1], run.layers("spike_peak")[-1]
    first = first_spike(steps, peaks, began)
    where = "" if first is None else f" It began in {run.names[first]}."
    yield Alarm(
        "spike",
        float(peak),
        LEAST,
        f"The gradient spiked at step {began:,.0f}, by {peak:.1f} standard deviations of its norm's logarithm.{where}",
        () if first is None else (run.names[first],),
        int(began),
    )


def _no_gradient(run: _Run) -> Iterator[Alarm]:
    none = (run.layers("gradient_norm") == 0) | (run.layers("zero_gradients") == 1)
    text = "In {where} no gradient reached {layers} Does the loss depend on it, and is nothing before it stuck at 0?"
    yield from run.about("no gradient", none, run.last, np.zeros(len(run.names)), 0.0, text)


def _rounding(run: _Run) -> Iterator[Alarm]:
    holds = is_rounding(run.history.columns)
    with np.errstate(all="ignore"):
        rms = (run.layers("gradient_norm") / np.sqrt(run.layers("size")))[-1]
    text = (
        "In {where} the gradient was nothing but rounding in {layers} Adam scales it up to steps of full size: freeze "
        "it, or build the model without it."
    )
    largest = np.nanmax(rms, initial=0) or np.nan
    yield from run.about("rounding", holds, run.last, rms / largest, ROUNDING, text)


def _lost(run: _Run) -> Iterator[Alarm]:
    share = run.layers("lost_updates")
    text = (
        "In {where} over half of the updates were lost in {layers} They are below half a unit in the last place of the "
        "stored weights: wrap the optimizer in `carry_remainder`."
    )
    yield from run.about("updates lost", share > _LOST, run.last, share[-1], _LOST, text)


RULES: tuple[Callable[[_Run], Iterator[Alarm]], ...] = (
    _not_finite,
    _skipped,
    _spike,
    _turning,
    _random_walk,
    _no_signal,
    _batch,
    _no_gradient,
    _rounding,
    _lost,
)
"""All rules, the most urgent first."""


def alarms(history, last: int = 5) -> list[Alarm]:
    """What to look at in a run; an empty list if there is nothing, or nothing can be said yet.

    Args:
      history: a `History`. Quantities that it lacks are left out.
      last: in how many reports up to the last a rule must have held.

    Returns:
      `Alarm`s, the most urgent first.

    Raises:
      TypeError: if it is given a report, or anything else that is no history.
      ValueError: if `last` is less than 1.

    >>> from types import SimpleNamespace
    >>> from snr_adam.telemetry.history import History
    >>> seen = {"gradient_norm": [0.0, 1.0]}
    >>> reports = [SimpleNamespace(step=t, names=("unused", "w"), columns=seen, total={}) for t in range(5)]
    >>> [(alarm.rule, alarm.layers) for alarm in alarms(History(reports))]
    [('no gradient', ('unused',))]
    """
    if not all(hasattr(history, key) for key in ("steps", "names", "columns", "total")):
        raise TypeError(f"alarms: got a {type(history).__name__}, give a History of reports")
    if last < 1:
        raise ValueError(f"alarms: last={last}: a rule must hold in 1 report or more")
    run = _Run(history, last)
    return [alarm for rule in RULES for alarm in rule(run)] if len(run.steps) else []
