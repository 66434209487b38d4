"""What `observe` has measured, for people: one row per layer, groups of layers, everything together.

The state of a run is a few vectors on the device; here, on the host, they become numbers with names and errors. Names
are the paths of the parameters, read off the tree of the first moment. Numbers for several layers are ratios of sums,
never means of ratios: a small layer with a wild ratio does not count more than it weighs.

What each number is stands in `columns`; `print(report.explain())` says it in a sentence each. Some are those of the
last step that was looked at (`signal` to `floor`, `learning_rate` to `zero_gradients` but for `clipped`), or of the
last one at which they were made (`significant`, the root mean squares and `relative_gradient` to `lost_updates`; on
accelerators they are not), the others averages.
"""

import dataclasses
import math
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from snr_adam import _moments as moments
from snr_adam import _tree
from snr_adam._checks import check_pattern
from snr_adam._given import check_known, readable
from snr_adam.guard import GuardState
from snr_adam.telemetry import text
from snr_adam.telemetry._averages import WINDOW, Last, Means, errors
from snr_adam.telemetry._lags import Lags, estimate, student
from snr_adam.telemetry._layers import first_spike
from snr_adam.telemetry._rows import OF_LAGS, SUMS, Sums
from snr_adam.telemetry._state import ObserveState, means_in, spikes_in
from snr_adam.telemetry.columns import COLUMNS, columns

_TINY = np.finfo(float).tiny


@dataclass(frozen=True)
class Report:
    """Numbers per layer and in total, as `str()` an aligned table, with `rich` a coloured one.

    step: the number of steps taken. names: one per row. columns: float64 (L,) each; total: the same keys; nan where
    there is no number. batch_size: what noise scales count in, None for batches. examples: as given to `report`.
    looked, detailed: the steps of the last look, and of the last one that made `significant` and other details;
    0 if there was none. window: over about how many steps averages reach back.
    """

    step: int
    names: tuple[str, ...]
    columns: dict[str, np.ndarray]
    total: dict[str, float]
    batch_size: float | None = None
    examples: int | None = None
    looked: int = 0
    detailed: int = 0
    window: int = 0
    sums: Any = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dict per row, with its name."""
        return [
            {"name": name, **{key: float(column[i]) for key, column in self.columns.items()}}
            for i, name in enumerate(self.names)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings, for JSON; None where there is no finite number."""
        columns = {key: [_plain(x) for x in column] for key, column in self.columns.items()}
        total = {key: _plain(x) for key, x in self.total.items()}
        return {
            "step": self.step,
            "batch_size": self.batch_size,
            "examples": self.examples,
            "looked": self.looked,
            "detailed": self.detailed,
            "window": self.window,
            "names": list(self.names),
            **{"columns": columns, "total": total},
        }

    def group(self, patterns: Mapping[str, str] | list[str]) -> "Report":
        """One row per pattern: a list of regular expressions, searched in the names, or a dict from new names to them.

        A layer belongs to the first pattern that it matches; those that match none are left out of the rows, and stay
        in the total.
        """
        if isinstance(patterns, str):
            raise TypeError(f"group: give a list of patterns, [{patterns!r}], or a dict from names to patterns")
        named = patterns if isinstance(patterns, Mapping) else {pattern: pattern for pattern in patterns}
        for pattern in named.values():
            check_pattern("group", pattern)
        first = [next((key for key, pattern in named.items() if re.search(pattern, name)), None) for name in self.names]
        kept = [key for key in named if key in first]
        parts = [self.sums.pick(np.array([key == name for name in first], bool)).add() for key in kept]
        sums = Sums.join([self.sums.pick(slice(0, 0)), *parts])
        made = columns(sums, self.batch_size, self.examples)
        return dataclasses.replace(self, names=tuple(kept), columns=made, sums=sums)

    @property
    def first_spike(self) -> str | None:
        """The layer whose gradient spiked first in the newest spikes, None if there was none.

        These are the spikes that began within 20 steps of the last; of those that began at one step, the largest.
        """
        began, peak = self.columns["spike_step"], self.columns["spike_peak"]
        first = first_spike(began, peak, np.fmax.reduce(began, initial=np.nan))
        return None if first is None else self.names[first]

    def explain(self) -> str:
        """What each quantity says, in lines of 100 characters."""
        width = max(map(len, COLUMNS)) + 2
        said = [f"{key:{width}}{column.says}" for key, column in COLUMNS.items()]
        return "\n".join(textwrap.fill(line, 100, subsequent_indent=" " * width) for line in said)

    def __str__(self) -> str:
        return str(text.numbers(self))

    def _repr_html_(self) -> str:
        """For notebooks: the table, with bars for the SNR."""
        return text.bars(self)._repr_html_()

    def __rich_console__(self, console, options):
        """For `rich`: bars for the SNR against the largest, red where there is no signal."""
        yield text.bars(self)


def _plain(x) -> float | None:
    return float(x) if np.isfinite(x) else None


def _host(x):
    """An array, or a box of a library around it, as float64."""
    return np.asarray(jax.device_get(jax.tree.leaves(x)[0]), float)


def _names(state: ObserveState) -> tuple[list[str], np.ndarray]:
    """Name and size of every entry."""
    axes = _host(state.axis).astype(int)
    names, sizes, at = [], [], 0
    for name, shape in moments.named_shapes(state.inner):
        axis = axes[at] if at < len(axes) else -1
        parts = 1 if axis < 0 else shape[axis]
        names += [name] if axis < 0 else [f"{name}[{i}]" for i in range(parts)]
        sizes += [math.prod(shape) / parts] * parts
        at += parts
    if at != len(axes):
        raise ValueError(f"the state was observed with {len(axes)} entries but its optimizer's moments have {at}")
    return names, np.array(sizes, float)


class _Part(NamedTuple):
    """What one state of `observe` holds: names and sums of its rows, its total's sums, and when they are of."""

    names: list[str]
    sums: Sums
    total: Sums
    step: int
    looked: int
    detailed: int
    window: int


def _read(state: ObserveState, guards: list[GuardState]) -> _Part:
    names, sizes = _names(state)
    rows, last, lags = _host(state.means), Last(*_host(state.last)), Lags(*_host(state.lags))
    means, spikes = means_in(rows), spikes_in(rows)
    seen, count, looked, detailed, bursts = (
        int(_host(x)) for x in (state.seen, state.count, state.looked, state.detailed, state.bursts)
    )
    means = means if seen else Means(*np.full((len(Means._fields), len(names) + 1), np.nan))
    found = estimate(lags, bursts)
    with np.errstate(divide="ignore", invalid="ignore"):
        by_noise = np.maximum(means.gradient_sq[:-1] - means.persistent[:-1], _TINY)
        rhos, decays, newest = (
            np.append(x, np.sum(by_noise * x) / max(np.sum(by_noise), _TINY))
            for x in (last.rho, 1 - last.leak, last.newest)
        )
        error = errors(means, float(_host(state.square)), rhos, decays, newest, seen, count)
    of_lags = found._replace(half=found.half**2)
    lasting = (student(bursts) if bursts else np.nan) * error
    of_means = {"persistent": means.persistent, "persistent_half": lasting**2, "clipped": means.clipped}
    of_means |= dict(zip(OF_LAGS, of_lags, strict=True))
    of_means |= {"spike": spikes.z, "spike_step": spikes.began, "spike_peak": spikes.peak}
    skipped = max((int(_host(guard.skipped)) for guard in guards), default=0)
    share = skipped / (skipped + count) if guards and skipped + count else np.nan
    same = {key: x for key, x in last._asdict().items() if key in SUMS}
    with np.errstate(divide="ignore", invalid="ignore"):
        made = {"unclipped_sq": last.power / last.scale**2, "rate_sum": last.rate * sizes}
    made |= {"skipped": np.full_like(sizes, share)}
    made |= {"gradient_sq": means.gradient_sq[:-1], **{key: x[:-1] for key, x in of_means.items()}}
    rows = Sums(size=sizes, **same, **made)
    # leaves share examples, so their errors are not independent: the total has its own
    total = dataclasses.replace(rows.add(), **{key: x[-1:] for key, x in of_means.items()})
    window = round(min(seen, WINDOW) * count / seen) if seen else 0
    return _Part(names, rows, total, count, looked, detailed, window)


def report(opt_state, batch_size: float | None = None, examples: int | None = None) -> Report:
    """Reads what `observe` has measured, wherever in an optimizer's state it is.

    Args:
      opt_state: the state of an optimizer that is, or contains, `observe(...)`: a chain, partition, `MultiSteps`, an
        `nnx.Optimizer`'s `opt_state`, ... Only small vectors are fetched from the device.
      batch_size: the number of examples in a gradient, to report noise scales in examples; else in batches.
      examples: the number of examples in the data set, if each epoch goes through all of them in a new order; None if
        batches are drawn independently, or never come back.

    Returns:
      A `Report`; `print(report(opt_state))` shows it.

    Raises:
      ValueError: if the state holds nothing observed, if it is that of several runs at once (take one of them, or
        report each), and if it came back from a disk as dicts or lists; if `batch_size` is not above 0, or more than
        `examples`, or missing where `examples` is given.
      TypeError: inside of jit.
    """
    check_known("report", opt_state)
    _check_batches(batch_size, examples)
    opt_state = readable("report", opt_state, ObserveState)
    states = _tree.nodes(ObserveState, opt_state)
    if not states:
        raise ValueError(
            f"no telemetry in this state ({moments.kinds_in(opt_state)}): wrap the optimizer, "
            "tx = snr_adam.observe(tx), and pass the state of that one"
        )
    guards = _tree.nodes(GuardState, opt_state)
    parts = [_read(state, guards) for state in states]
    parts = [part for part in parts if part.names] or parts[:1]
    names = tuple(name for part in parts for name in part.names)
    sums = Sums.join([part.sums for part in parts])
    total = parts[0].total if len(parts) == 1 else Sums.join([part.total for part in parts]).add()
    newest = max(parts, key=lambda part: part.step)
    of = batch_size, examples
    every = {key: float(column[0]) for key, column in columns(total, *of).items()}
    return Report(newest.step, names, columns(sums, *of), every, *of, *newest[-3:], sums)


def _check_batches(batch_size, examples) -> None:
    if batch_size is not None and not (np.ndim(batch_size) == 0 and np.isfinite(batch_size) and batch_size > 0):
        raise ValueError(f"batch_size={batch_size!r}: give the number of examples in a gradient, 1 or more")
    if examples is not None and (batch_size is None or not examples >= batch_size):
        raise ValueError(
            f"examples={examples!r} with batch_size={batch_size!r}: an epoch has at least as many examples as a batch, "
            "and both must be given: report(opt_state, batch_size=64, examples=50_000)"
        )
