"""Pictures of a run: what a `History` of reports shows a person.

    signal_and_noise(history)             the two, over time
    snr(history)                          their ratio as the optimizer sees it, and the floor that pure noise shows
    heat_map(history)                     every layer over time
    depth(history)                        every layer's SNR, early, in the middle and late
    noise_scale(history, batch_size)      the batch size at which noise equals signal, and the one that was used
    overview(history, batch_size)         all of them in one figure

Each takes a `History` or a list of reports and, if you have one, the matplotlib axes to draw on; each returns the axes.
Nothing here touches matplotlib's global state, so it works in threads, servers and notebooks:

    plots.heat_map(history).figure.savefig("heat.png")

Layers are in the order of the network, the first on top; hatched are those whose gradient is at the level of rounding.
A layer's SNR says little by itself: pure noise shows sqrt((1-b1)/(1+b1)), and more in the first steps. So the two
pictures that compare layers show it as a multiple of its floor: 1 is pure noise. Colours and line styles can be told
apart by colour-blind eyes and in print.
"""

import re
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np

from snr_adam.telemetry import _frame as frame
from snr_adam.telemetry import _matplotlib as mpl
from snr_adam.telemetry._layers import mostly_rounding, network_order
from snr_adam.telemetry._matplotlib import Axes, Figure
from snr_adam.telemetry.history import History

Reports = History | Iterable[Any]
Against = Literal["steps", "examples"]

BLUE, ORANGE, GREEN, GRAY = "#0072b2", "#d55e00", "#009e73", "#666666"
_COLORS = mpl.colormaps["viridis"].with_extremes(bad="#dddddd")
_MULTIPLES = {1: "floor", 1.25: "1.25", 1.5: "1.5", 2: "2", 3: "3", 4: "4", 6: "6", 10: "10"}
_GRADIENT = "loss per unit of weight"
_STEPS = "steps (updates)"
_UNITS = {
    "signal": f"signal ({_GRADIENT})",
    "noise": f"noise ({_GRADIENT})",
    "gradient_norm": f"norm of the gradient ({_GRADIENT})",
    "pseudo_snr": "SNR, as a multiple of its floor",
    "significant": "share of parameters that differ from noise",
    "snr": "SNR of one gradient, as estimated (a ratio of powers)",
    "persistence": "persistence (share of the signal)",
    "gradient_signal": f"norm of the true gradient, as estimated ({_GRADIENT})",
    "gradient_noise": f"noise of one gradient, as estimated ({_GRADIENT})",
    "effective_step": "effective step (RMS of the update / RMS of the parameters)",
    "update_rms": "RMS of the update (units of weight)",
    "param_rms": "RMS of the parameters (units of weight)",
}


def signal_and_noise(
    history: Reports, layer: str | None = None, axes: Axes | None = None, against: Against = "steps"
) -> Axes:
    """The norms of the true gradient and of a mini-batch's deviation from it over time, |G| and tr(Sigma)^(1/2).

    The estimates `gradient_signal` and `gradient_noise`, averages over some 80 looks: late where gradients shrink fast.

    Args:
      history: a `History` or reports.
      layer: the name of a layer; None for all layers together.
      axes: where to draw; None for a new figure.
      against: what runs along the axis, "steps" or "examples": the steps times the batch size that was given to
        `report`.

    Returns:
      The axes: gradients in units of the loss per unit of weight; below the dotted line, half of the 95 % interval, a
      signal cannot be told from none.
    """
    history, axes = _history(history), frame.axes(axes)
    along, of = _along(history, against)
    signal, noise = (_of(history, f"gradient_{each}", layer) for each in ("signal", "noise"))
    least = noise * np.sqrt(1.96 * _of(history, "snr_error", layer))
    _line(axes, along, noise, "--", ORANGE, "noise: how mini-batches differ")
    _line(axes, along, signal, "-", BLUE, "signal: the true gradient")
    _line(axes, along, least, ":", GRAY, "limit: less signal cannot be seen")
    axes.set_ylim(bottom=0)
    return frame.finish(axes, "Signal and noise of the gradient" + _where(layer), of, f"gradient ({_GRADIENT})")


def snr(history: Reports, layer: str | None = None, axes: Axes | None = None, against: Against = "steps") -> Axes:
    """The SNR that the optimizer sees over time, and its floor: pure noise. Below it, successive gradients turn round.

    Args, Returns: as for `signal_and_noise`.

    >>> from types import SimpleNamespace
    >>> totals = {10: {"pseudo_snr": 0.9, "floor": 0.33}, 20: {"pseudo_snr": 0.5, "floor": 0.26}}
    >>> seen = [SimpleNamespace(step=t, names=(), columns={}, total=total) for t, total in totals.items()]
    >>> axes = snr(seen)
    >>> axes.get_ylabel(), [line.get_ydata().tolist() for line in axes.get_lines()]
    ('SNR (a ratio; 1 is all signal)', [[0.9, 0.5], [0.33, 0.26]])
    """
    history, axes = _history(history), frame.axes(axes)
    along, of = _along(history, against)
    seen, floor = _of(history, "pseudo_snr", layer), _of(history, "floor", layer)
    _line(axes, along, seen, "-", GREEN, "SNR as the optimizer sees it")
    _line(axes, along, floor, "--", GRAY, f"floor: pure noise shows {floor[-1]:.2f}")
    above = {"where": seen > floor, "color": GREEN, "alpha": 0.15, "lw": 0}
    axes.fill_between(along, floor, seen, label="_above the floor", **above)
    axes.set_ylim(bottom=0)
    return frame.finish(axes, "Signal-to-noise ratio" + _where(layer), of, "SNR (a ratio; 1 is all signal)")


def heat_map(history: Reports, key: str = "pseudo_snr", layers: str = "", axes: Axes | None = None) -> Axes:
    """Every layer over time; gray where there is no number.

    Args:
      history: a `History` or reports.
      key: the quantity; "pseudo_snr" is shown as a multiple of its floor, so that the darkest is pure noise.
      layers: a regular expression that the names of the layers to show contain.
      axes: where to draw; None for a new figure.

    Returns:
      The axes. The colours' scale is logarithmic if the values span more than a factor of ten.

    Raises:
      ValueError: if no layer's name contains `layers`.
    """
    history = _history(history)
    chosen = _matching(history, layers)
    values = _over_floor(history) if key == "pseudo_snr" else history.columns[key]
    axes, rounding = frame.axes(axes, frame.height(chosen)), mostly_rounding(history)[chosen]
    values = np.ma.masked_where(rounding[:, None] | ~np.isfinite(values[:, chosen].T), values[:, chosen].T)
    image = axes.pcolorfast(frame.edges(history.steps), np.arange(len(chosen) + 1) - 0.5, values)
    image.set(cmap=_COLORS, norm=frame.norm(values, key))
    if hasattr(image, "set_interpolation"):
        image.set_interpolation("auto")  # averages where layers outnumber pixels, instead of leaving some out
    bar = axes.figure.colorbar(image, ax=axes, label=_UNITS.get(key, key), extend="both", pad=0.01)
    if key == "pseudo_snr":
        ticks = {x: name for x, name in _MULTIPLES.items() if x <= bar.ax.get_ylim()[1]}  # more would stretch the bar
        bar.set_ticks(list(ticks), labels=list(ticks.values()))
        bar.ax.minorticks_off()
    frame.name_layers(axes, [history.names[i] for i in chosen], rounding)
    return frame.finish(axes, "Every layer over time", _STEPS)


def depth(history: Reports, layers: str = "", axes: Axes | None = None) -> Axes:
    """The SNR of each layer over its floor, in each third of the run.

    Args:
      history: a `History` or reports.
      layers: a regular expression that the names of the layers to show contain, such as "query/kernel".
      axes: where to draw; None for a new figure.

    Raises:
      ValueError: if no layer's name contains `layers`.
    """
    history = _history(history)
    chosen = _matching(history, layers)
    axes, rounding = frame.axes(axes, frame.height(chosen)), mostly_rounding(history)[chosen]
    ratios = _over_floor(history)[:, chosen]
    squares = np.ma.masked_where(rounding | ~np.isfinite(ratios), ratios**2)
    parts = [part for part in np.array_split(np.arange(len(history)), 3) if len(part)]
    styles = (ORANGE, "o:"), (GREEN, "s--"), (BLUE, "^-")
    for part, (color, style) in zip(parts, styles, strict=False):
        first, last = history.steps[part[0]], history.steps[part[-1]]
        label = f"steps {first:,} to {last:,}" if last > first else f"step {first:,}"
        ratio = np.ma.sqrt(squares[part].mean(axis=0)).filled(np.nan)
        size = 4 if len(chosen) <= frame.NAMED_LAYERS else 0
        axes.plot(ratio, range(len(chosen)), style, color=color, label=label, markersize=size)
    axes.axvline(1, ls="--", color=GRAY, label="floor: pure noise")
    axes.set_xlim(left=0)
    frame.name_layers(axes, [history.names[i] for i in chosen], rounding)
    return frame.finish(axes, "SNR against depth", _UNITS["pseudo_snr"], axes.get_ylabel())


def noise_scale(
    history: Reports, batch_size: float | None = None, axes: Axes | None = None, against: Against = "steps"
) -> Axes:
    """The noise scale over time with its 95 % interval, and the batch size that was used.

    Batches far below the noise scale are mostly noise, far above it mostly waste. Where the signal is too weak to be
    measured only the lower end of the interval is known: drawn as triangles.

    Args:
      history: a `History` or reports.
      batch_size: what `report` was told, if the history is of a file that does not say it; None to take it from there.
        If `report` was told none, all is in batches.
      axes: where to draw; None for a new figure.
      against: as for `signal_and_noise`.
    """
    history, axes = _history(history), frame.axes(axes)
    along, of = _along(history, against)
    scale, low, high = (history.total[f"noise_scale{end}"] for end in ("", "_low", "_high"))
    beyond = np.isinf(scale) & np.isfinite(low) & (low > 0)
    value = np.where(np.isfinite(scale) & (scale > 0), scale, np.nan)
    ends = np.maximum(low, value / 10), np.minimum(high, value * 10)
    axes.fill_between(along, *ends, color=BLUE, alpha=0.2, lw=0, label="95 % interval")
    # dots, for a number between two limits would be a line of length 0
    axes.plot(along, value, ".-", color=BLUE, ms=4, label="noise scale: as much signal as noise")
    if beyond.any():
        axes.plot(along[beyond], low[beyond], "^", color=ORANGE, ms=5, label="at least: beyond measurement")
    batches = history.batch_size if batch_size is None else np.full(len(history), float(batch_size))
    sizes = np.unique(batches[np.isfinite(batches)])
    if len(sizes) > 1:
        used = f"batch size used: {sizes[0]:,g} to {sizes[-1]:,g}"
        axes.step(along, batches, ls="--", color=GRAY, label=used)
    else:
        used = f"batch size used: {sizes[0]:,g}" if len(sizes) else "the batch that was used"
        axes.axhline(sizes[0] if len(sizes) else 1, ls="--", color=GRAY, label=used)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(frame.THOUSANDS)
    return frame.finish(axes, "Noise scale", of, f"noise scale ({'examples' if len(sizes) else 'batches'})")


def overview(history: Reports, batch_size: float | None = None) -> Figure:
    """All the pictures in one figure, 1,400 pixels wide when saved as it is."""
    history = _history(history)
    layers = frame.height(history.names)
    figure = frame.figure(14, 5 + layers)
    ((top,), (bottom,)) = figure.subfigures(2, 1, squeeze=False, height_ratios=(5, layers))
    left, middle, right = top.subplots(1, 3)
    signal_and_noise(history, axes=left)
    snr(history, axes=middle)
    noise_scale(history, batch_size, axes=right)
    left, right = bottom.subplots(1, 2, width_ratios=(3, 2), sharey=True)
    heat_map(history, axes=left)
    depth(history, axes=right).set_ylabel("")
    return figure


def _history(reports: Reports) -> History:
    history = reports if isinstance(reports, History) else History(reports)
    if not len(history):
        raise ValueError("there is nothing to draw: the history has no reports")
    return history


def _of(history: History, key: str, layer: str | None) -> np.ndarray:
    """The values of one layer, or of all together, over time."""
    if layer is None:
        return history.total[key]
    if layer not in history.names:
        raise ValueError(f"no layer {layer!r}; there are {', '.join(history.names)}")
    return history.columns[key][:, history.names.index(layer)]


def _matching(history: History, pattern: str) -> list[int]:
    chosen = [i for i in network_order(history.names) if re.search(pattern, history.names[i])]
    if not chosen:
        raise ValueError(f"no layer's name contains {pattern!r}; there are {', '.join(history.names)}")
    return chosen


def _over_floor(history: History) -> np.ndarray:
    floor = history.columns["floor"]
    return history.columns["pseudo_snr"] / np.where(floor > 0, floor, np.nan)


def _along(history: History, against: Against) -> tuple[np.ndarray, str]:
    """Where the reports are along the axis of a curve, and its name."""
    if against not in ("steps", "examples"):
        raise ValueError(f"against={against!r}: give 'steps' or 'examples'")
    if against == "steps":
        return history.steps, _STEPS
    if np.isnan(history.examples).any():
        raise ValueError(
            "against='examples': some reports were not told a batch size: report(opt_state, batch_size=32)"
        )
    return history.examples, "examples"


def _line(axes: Axes, along: np.ndarray, values: np.ndarray, style: str, color: str, label: str) -> None:
    """A line; a single report is a point, which a line would not show. A missing quantity is named as such."""
    marker = "o" if len(along) == 1 else ""
    label += "" if np.isfinite(values).any() else " (not available)"
    axes.plot(along, values, style, marker=marker, color=color, label=label)


def _where(layer: str | None) -> str:
    return f": {layer}" if layer else ""
