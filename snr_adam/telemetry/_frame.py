"""What all pictures have in common: figures, axes with names and units, the places of layers, the scale of colours."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from snr_adam.telemetry import _matplotlib as mpl
from snr_adam.telemetry._matplotlib import Axes, Figure, LogNorm, Normalize

NAMED_LAYERS = 40
"""More names than these cannot be read on one axis."""
THOUSANDS = mpl.FuncFormatter(lambda x, _: f"{x:,.10g}")


def figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=100, layout=mpl.ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))


def height(layers: Sequence[Any]) -> float:
    """Inches for so many layers' names, one below the other."""
    return 3.0 + 0.15 * min(len(layers), NAMED_LAYERS)


def axes(axes: Axes | None, height: float = 5.0) -> Axes:
    return axes if axes is not None else figure(10, height).subplots()


def finish(axes: Axes, title: str, xlabel: str, ylabel: str | None = None) -> Axes:
    """Names everything; with a `ylabel` the lines, too."""
    axes.set_title(title, weight="bold")
    axes.set_xlabel(xlabel)
    axes.xaxis.set_major_formatter(THOUSANDS)
    if ylabel is not None:
        axes.set_ylabel(ylabel)
        axes.legend(edgecolor="none")
        axes.spines[["top", "right"]].set_visible(False)
    return axes


def edges(steps: np.ndarray) -> np.ndarray:
    """The borders between columns of a heat map: half-way between steps."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middle[0]], middle, [2 * steps[-1] - middle[-1]]])


def name_layers(axes: Axes, names: Sequence[str], rounding: np.ndarray) -> None:
    """Layers from top to bottom: their names, or their numbers if they are too many; hatched where all is rounding."""
    axes.set_ylim(len(names) - 0.5, -0.5)
    for i in np.flatnonzero(rounding):
        axes.axhspan(i - 0.5, i + 0.5, facecolor="none", edgecolor="#999999", hatch="/////", lw=0)
    if len(names) <= NAMED_LAYERS:
        axes.set_yticks(range(len(names)), names, fontsize=8)
    else:
        axes.yaxis.set_major_locator(mpl.MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(THOUSANDS)
        axes.set_ylabel(f"number of the layer, of {len(names):,}")


def norm(values: np.ma.MaskedArray, key: str) -> Normalize:
    """From the 1st to the 99th percentile; an SNR from its floor, 1, on."""
    known = values.compressed()
    if key == "pseudo_snr":
        return LogNorm(1.0, max(1.5, float(np.percentile(known, 99))) if known.size else 2.0)
    low, high = np.percentile(known, [1, 99]) if known.size else (0.0, 1.0)
    return LogNorm(low, high) if low > 0 and high > 10 * low else Normalize(low, high)
