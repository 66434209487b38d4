"""Reports as text: aligned tables, bars and sparklines, the same in colours where `rich` or a notebook draws them.

    numbers(report)                 one row per layer and one for all
    bars(report)                    and a bar for each SNR
    sparklines(history, key)        a quantity over time, one block of eight heights per report

What it is given is anything with the attributes of a `Report` or a `History`; what it gives back is a `Table`. Layers
are in the order of the network; those whose gradient is at the level of rounding are marked.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from snr_adam.telemetry._layers import is_rounding, network_order
from snr_adam.telemetry._table import Drawing, Table
from snr_adam.telemetry.noise_scale import NoiseScale

_SHOWN = ("signal", "noise", "pseudo_snr", "floor", "snr", "persistence", "significant", "effective_step")
_SPARE = ("effective_step", "significant", "signal", "noise", "persistence", "floor", "pseudo_snr")
_HEIGHTS = "▁▂▃▄▅▆▇█"
_LENGTHS = " ▏▎▍▌▋▊▉█"
_BAR = 8  # blocks in the longest bar
_MARK = " ~"
_NOTES = {
    "signal": "signal = |m^|",
    "noise": "noise = |v^|^(1/2)",
    "pseudo_snr": "pseudo_snr = |m^| / |v^|^(1/2)",
    "floor": "floor: what pure noise shows as pseudo_snr",
    "snr": "snr: power of the true gradient over that of the noise, 95 % within 1.96 errors",
    "persistence": "persistence: the share of the signal that lasts over m's memory",
    "significant": "significant: of elements, 5 % in pure noise",
    "effective_step": "effective_step: rms of the update over that of the parameters",
}


def numbers(report) -> Table:
    """The numbers of a report."""
    names, order = _marked(report)
    rows = [*report.rows, {"name": "total", **report.total}]
    cells = [[names[i], *(_text(key, rows[i]) for key in _SHOWN), _scale_text(rows[i])] for i in order]
    legend = f"noise scale in {'batches' if report.batch_size is None else 'examples'}, with its 95 % interval"
    window = getattr(report, "window", 0)
    over = f"; snr, persistence and noise scale over about {window:,} steps" if window else ""
    title = f"step {report.step:,}{over}"
    return Table(title, ("layer", *_SHOWN, "noise scale"), cells, legend + _meant(names), spare=_SPARE, notes=_NOTES)


def bars(report) -> Table:
    """The numbers of a report, and a bar for each SNR that is above 0, on the scale of `sparklines`."""
    _, order = _marked(report)
    snr, least = (np.append(report.columns[key], report.total[key])[order] for key in ("snr", "snr_low"))
    shares, styles = _shares(snr, *_range(snr)), _styles(least)
    drawings = tuple(
        Drawing((_bar(share) if x > 0 else "").ljust(_BAR), (style,) * _BAR)
        for x, share, style in zip(snr, shares, styles, strict=True)
    )
    return dataclasses.replace(numbers(report), drawn="SNR".ljust(_BAR), drawings=drawings)


def _marked(seen) -> tuple[list[str], list[int]]:
    """The names of a report or of a history's last one, and 'total', marked; and the order in which to show them."""
    layers = [*seen.names]
    noise = np.atleast_2d(is_rounding(seen.columns))[-1] if layers else ()
    names = [name + _MARK * bool(x) for name, x in zip(layers, noise, strict=True)]
    return [*names, "total"], [*network_order(layers), len(layers)]


def _meant(names: list[str]) -> str:
    return f";{_MARK}: the gradient is at the level of rounding" if any(x.endswith(_MARK) for x in names) else ""


def sparklines(history, key: str, width: int) -> Table:
    """A quantity over time: its first and last numbers, and in between a block per report, or for several one.

    The height of a block is logarithmic, the same for all rows, over at least one decade and at most four. What is
    below it, and so what is not above 0, is the lowest; where there is no number, there is a gap. A block that stands
    for several reports shows the median of their numbers.
    """
    if width < 1:
        raise ValueError(f"width={width}: a sparkline needs at least 1 character")
    tracks = {each: _tracks(history, each) for each in {key, "snr_low", "snr_error"} & {key, *history.total}}
    names, order = _marked(history)
    tracks = {each: track[order] for each, track in tracks.items()}
    known = np.array([_medians(track, width) for track in tracks[key]])
    least, errors = (tracks.get(each, np.full_like(tracks[key], np.nan)) for each in ("snr_low", "snr_error"))
    low, high = _range(known)
    drawings = tuple(
        Drawing(_sparkline(values, low, high), _styles(_medians(each, width)))
        for values, each in zip(known, least, strict=True)
    )
    rows = [
        [names[i], *(_text(key, {key: track[t], "snr_error": error[t]}) for t in (0, -1))]
        for i, track, error in zip(order, tracks[key], errors, strict=True)
    ]
    first, last, reports = history.steps[0], history.steps[-1], len(history)
    legend = f"▁ is {low:.2g} or less, █ {high:.2g} or more, logarithmic in between; a gap: no number"
    legend += f"; a block: the median of up to {math.ceil(reports / width)} reports" if reports > width else ""
    legend += _meant(names)
    title = f"{key} in {reports:,} report{'s' if reports > 1 else ''}"
    heads = ("layer", f"step {first:,}", f"step {last:,}")
    return Table(title, heads, rows, legend, "over time", drawings, heads[1:2])


def _tracks(history, key: str) -> np.ndarray:
    """A quantity over time, a row per layer and one for all."""
    layers = [history.columns[key].T] if history.names else []
    return np.concatenate([*layers, history.total[key][None]])


def _medians(values, width: int) -> np.ndarray:
    """At most `width` numbers for all: each the (upper) median of those it stands for, nan if all of them are."""
    parts = [np.sort(part[~np.isnan(part)]) for part in np.array_split(values, min(width, len(values)))]
    return np.array([part[len(part) // 2] if len(part) else np.nan for part in parts])


def _range(values) -> tuple[float, float]:
    """The ends of a logarithmic scale. The few largest and smallest do not count, lest all others look the same."""
    positive = values[np.isfinite(values) & (values > 0)]
    if not positive.size:
        return 0.1, 1.0
    low, high = (float(np.percentile(positive, p, method=end)) for p, end in ((5, "lower"), (99, "higher")))
    return min(max(low, high / 1e4), high / 10), high


def _shares(values, low: float, high: float) -> np.ndarray:
    """Where numbers are on the scale, from 0 to 1; nan stays nan."""
    return np.log(np.clip(values, low, high) / low) / np.log(high / low)


def _sparkline(values, low: float, high: float) -> str:
    return "".join(" " if np.isnan(x) else _HEIGHTS[round(7 * x)] for x in _shares(values, low, high))


def _bar(share: float) -> str:
    eighths = max(1, round(8 * _BAR * share))
    return "█" * (eighths // 8) + _LENGTHS[eighths % 8].strip()


def _styles(least) -> tuple[str, ...]:
    """By the lower ends of SNRs; no style where there is no number."""
    return tuple("" if np.isnan(x) else "green" if x > 0 else "red" for x in least)


def _text(key: str, row: dict[str, Any]) -> str:
    x = row[key]
    if np.isnan(x):
        return "-"
    if key == "significant":
        return f"{x:.1%}"
    if key == "snr":
        return f"{x:.2g} +- {row['snr_error']:.1g}" if np.isfinite(row["snr_error"]) else f"{x:.2g}"
    return f"{x:.2e}" if key == "effective_step" else f"{x:.3g}"


def _scale_text(row: dict[str, Any]) -> str:
    if np.isnan(row["noise_scale"]):
        return "-"
    value, error, low, high = (row[f"noise_scale{end}"] for end in ("", "_error", "_low", "_high"))
    return str(NoiseScale(value, error, low, high, "lags"))
