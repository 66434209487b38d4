"""What `observe` has measured, for people: one row per layer, groups of layers, everything together.

The state of a run is a few vectors on the device; here, on the host, they become numbers with names and errors. Names
are the paths of the parameters, read off the tree of the first moment. Numbers for several layers are ratios of sums,
never means of ratios: a small layer with a wild ratio does not count more than it weighs.

    signal          |m^|, the norm of the average gradient; the noise that passes it is still in it
    noise           the root of the sum of v^ (without a second moment, of |g|^2)
    pseudo_snr      signal / noise, Adam's step in units of the learning rate
    floor           what pure noise would show as pseudo_snr
    snr             |G|^2 / tr(Sigma), a ratio of powers: the true gradient against the noise of one gradient
    snr_error       its standard error (`telemetry` derives it)
    significant     the share of elements that differ from noise at the 5 % level: 0.05 is no signal
    update_rms, param_rms, effective_step    root mean squares per element, and their ratio
    gradient_norm   root of the average of |g|^2
    persistent      the average of <m^_{t-1}, g_t>, which estimates |G|^2: below 0, no descent is left
    noise_scale     B_simple = tr(Sigma) / |G|^2, in examples, or in batches if no batch size was given; with its
                    standard error and limit (`noise_scale.NoiseScale`): inf is "more than the limit"

`signal` to `floor`, `significant` and the root mean squares are those of the last examination, the others averages.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from snr_adam import _moments as moments
from snr_adam import _tree
from snr_adam._checks import check_pattern
from snr_adam._given import check_known, readable
from snr_adam.telemetry import text
from snr_adam.telemetry._averages import Last, Means, errors, newest_weight
from snr_adam.telemetry.noise_scale import from_scalars
from snr_adam.telemetry.observe import ObserveState

_TINY = np.finfo(float).tiny


@dataclass(frozen=True)
class _Raw:
    """Sums per row, from which every number is made; float64 (L,) each."""

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
    persistent_var: np.ndarray
    snr_var: np.ndarray

    def pick(self, rows) -> "_Raw":
        return _Raw(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))

    def add(self) -> "_Raw":
        """One row for all. The errors of different rows count as independent, the floor is weighted by the noise."""
        total = {field.name: np.nansum(getattr(self, field.name), keepdims=True) for field in dataclasses.fields(self)}
        power = np.where(np.isfinite(self.persistent), self.gradient_sq - self.persistent, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            for key in ("persistent", "persistent_var"):  # unknown for one leaf, unknown for all
                total[key] = np.sum(getattr(self, key), keepdims=True)
            weight = self.noise_sq / np.nansum(self.noise_sq)
            total["floor_sq"] = np.nansum(self.floor_sq * weight, keepdims=True)
            total["snr_var"] = np.sum(self.snr_var * power**2, keepdims=True) / np.sum(power) ** 2
        return _Raw(**total)

    def columns(self, batch_size) -> dict[str, np.ndarray]:
        """The table."""
        a, x = self.gradient_sq, self.persistent
        with np.errstate(divide="ignore", invalid="ignore"):
            scale = from_scalars(a, x, np.sqrt(self.persistent_var), batch_size=batch_size or 1.0)
            signal, noise = np.sqrt(self.signal_sq), np.sqrt(self.noise_sq)
            update, param = np.sqrt(self.update_sq / self.size), np.sqrt(self.param_sq / self.size)
            return {
                "size": self.size,
                "signal": signal,
                "noise": noise,
                "pseudo_snr": signal / noise,
                "floor": np.sqrt(self.floor_sq),
                "snr": np.where(x < a, x / (a - x), np.where(np.isfinite(x) & (a > 0), np.inf, np.nan)),
                "snr_error": np.where(x < a, np.sqrt(self.snr_var), np.nan),
                "significant": self.significant / self.counted,
                "effective_step": update / param,
                "update_rms": update,
                "param_rms": param,
                "gradient_norm": np.sqrt(a),
                "persistent": x,
                "noise_scale": np.broadcast_to(scale.value, a.shape),
                "noise_scale_error": np.broadcast_to(scale.error, a.shape),
                "noise_scale_limit": np.broadcast_to(scale.limit, a.shape),
            }


@dataclass(frozen=True)
class Report:
    """Numbers per layer and in total, as `str()` an aligned table, with `rich` a coloured one.

    step: the number of steps taken. names: one per row. columns: float64 (L,) each; total: the same keys; nan where
    there is no number. batch_size: what noise scales count in, None for batches.
    """

    step: int
    names: tuple[str, ...]
    columns: dict[str, np.ndarray]
    total: dict[str, float]
    batch_size: float | None = None
    raw: Any = dataclasses.field(default=None, repr=False, compare=False)

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
        parts = [self.raw.pick(np.array([key == name for name in first], bool)).add() for key in kept]
        empty = self.raw.pick(slice(0, 0))
        raw = _Raw(*(np.concatenate([getattr(p, f.name) for p in (empty, *parts)]) for f in dataclasses.fields(_Raw)))
        return dataclasses.replace(self, names=tuple(kept), columns=raw.columns(self.batch_size), raw=raw)

    def __str__(self) -> str:
        return str(text.numbers(self))

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


def _read(state: ObserveState):
    """Names, sums per entry, and the total's own sums."""
    names, sizes = _names(state)
    means, last = Means(*_host(state.means)), Last(*_host(state.last))
    seen, count, square = (float(_host(x)) for x in (state.seen, state.count, state.square))
    means = means if seen else Means(*np.full((len(Means._fields), len(names) + 1), np.nan))
    with np.errstate(divide="ignore", invalid="ignore"):
        by_noise = np.maximum(means.gradient_sq[:-1] - means.persistent[:-1], _TINY)
        forgets = 1 - newest_weight(max(seen, 1))
        rhos, decays, newest = (
            np.append(x, np.sum(by_noise * x) / max(np.sum(by_noise), _TINY))
            for x in (last.rho, 1 - last.leak, last.newest)
        )
        var_x, var_snr = errors(means, square, rhos, decays, newest, forgets * decays ** (count / max(seen, 1)))
    raw = _Raw(
        sizes, last.signal_sq, last.noise_sq, last.floor_sq, last.significant, last.counted, last.update_sq,
        last.param_sq, means.gradient_sq[:-1], means.persistent[:-1], var_x[:-1], var_snr[:-1],
    )  # fmt: skip
    own = {"persistent": means.persistent[-1:], "persistent_var": var_x[-1:], "snr_var": var_snr[-1:]}
    return names, raw, own


def report(opt_state, batch_size: float | None = None) -> Report:
    """Reads what `observe` has measured, wherever in an optimizer's state it is.

    Args:
      opt_state: the state of an optimizer that is, or contains, `observe(...)`: a chain, partition, `MultiSteps`, an
        `nnx.Optimizer`'s `opt_state`, ... Only small vectors are fetched from the device.
      batch_size: the number of examples in a gradient, to report noise scales in examples; else in batches.

    Returns:
      A `Report`; `print(report(opt_state))` shows it.

    Raises:
      ValueError: if the state holds nothing observed, if it is that of several runs at once (take one of them, or
        report each), and if it came back from a disk as dicts or lists.
      TypeError: inside of jit.
    """
    check_known("report", opt_state)
    opt_state = readable("report", opt_state, ObserveState)
    states = _tree.nodes(ObserveState, opt_state)
    if not states:
        raise ValueError(
            f"no telemetry in this state ({moments.kinds_in(opt_state)}): wrap the optimizer, "
            "tx = snr_adam.observe(tx), and pass the state of that one"
        )
    parts = [_read(state) for state in states]
    names = tuple(name for part in parts for name in part[0])
    raw = _Raw(*(np.concatenate([getattr(part[1], f.name) for part in parts]) for f in dataclasses.fields(_Raw)))
    total = raw.add()
    if len(parts) == 1:  # leaves share examples, so their errors are not independent: the total has its own
        total = dataclasses.replace(total, **parts[0][2])
    columns = total.columns(batch_size)
    step = max(int(_host(state.count)) for state in states)
    every = {key: float(column[0]) for key, column in columns.items()}
    return Report(step, names, raw.columns(batch_size), every, batch_size, raw)
