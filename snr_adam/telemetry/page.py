"""A run as one HTML file: everything that a `History` holds, to look at in a browser on any machine.

    text = page(history)            the file; `history.page("run.html")` writes it

The file needs no network and forbids itself one. What it shows is drawn by the script of `page.html` from the data that
are put into it here: numbers for the whole model as JSON, rounded to four digits, those of layers as float16 in base64,
because 300 layers in 1,000 reports make 800,000 characters of one quantity that way, and three times as many as JSON.
A file that is too large shows fewer quantities of layers, then fewer reports.
"""

import base64
import html
import json
import math
import pkgutil
import string
import time
from typing import Any

import numpy as np

from snr_adam.telemetry._layers import mostly_rounding, network_order
from snr_adam.telemetry.alarms import alarms
from snr_adam.telemetry.columns import COLUMNS

MOST_REPORTS = 1000
"""More points than these cannot be told apart on a screen."""
ROOM = 2_400_000
"""Characters for the numbers of layers."""
OVER_FLOOR = "pseudo_snr / floor"
_FIRST = (
    OVER_FLOOR,
    "snr",
    "persistence",
    "noise_scale",
    "gradient_norm",
    "effective_step",
    "significant",
    "pseudo_snr",
)
_LARGEST = 2.0**15  # of the numbers of a layer, in the units in which they are kept as float16


def page(history, *, title: str, batch_size: float | None = None, refresh: float | None = None) -> str:
    """The text of an HTML file that shows a run. Its arguments are those of `History.page`.

    Args:
      history: a `History`.
      title: a name for the run.
      batch_size: what `report` was told, if the history is of a file that does not say it; None to take it from there.
      refresh: after how many seconds an open page reads its file again; None for never.

    Returns:
      The text, below 3 MB for 300 layers in 1,000 reports.

    Raises:
      ValueError: if `refresh` is no number of seconds above 0.
    """
    if refresh is not None and not (math.isfinite(refresh) and refresh > 0):
        raise ValueError(f"refresh={refresh!r}: give a number of seconds, or None")
    found = alarms(history)
    order, total = network_order(history.names), dict(history.total)
    layers = {key: values[:, order] for key, values in history.columns.items() if key != "size"}
    if {"pseudo_snr", "floor"} <= {*layers}:
        with np.errstate(all="ignore"):
            layers[OVER_FLOOR] = layers["pseudo_snr"] / np.where(layers["floor"] > 0, layers["floor"], np.nan)
    layers = {key: x for key, x in layers.items() if x.size and not np.isnan(x).all()}
    each = 8 / 3 * max(len(order), 1)
    shown = _spread(len(history.steps), int(min(MOST_REPORTS, max(ROOM / each, 2))))
    kept = sorted(layers, key=lambda key: (*_FIRST, key).index(key))[: max(int(ROOM / (each * len(shown) or 1)), 1)]
    batches = np.asarray(history.batch_size) if batch_size is None else np.full(len(history.steps), float(batch_size))
    data = {
        "title": title,
        "written": round(time.time()),
        "refresh": refresh,
        "reports": len(history.steps),
        "steps": np.asarray(history.steps)[shown].tolist(),
        "names": [history.names[i] for i in order],
        "rounding": np.flatnonzero(mostly_rounding(history)[order]).tolist(),
        "unit": "batches" if np.isnan(batches).all() else "examples",
        "alarms": [str(alarm) for alarm in found],
        "calm": "No alarm." if len(history.steps) >= 5 else "Too few reports for alarms.",
        "says": {OVER_FLOOR: "The pseudo-SNR as a multiple of what pure noise shows."}
        | {key: COLUMNS[key].says for key in {*total, *kept} if key in COLUMNS},
        "over_floor": OVER_FLOOR,
        "first": _FIRST,
        "layers": {key: _packed(layers[key][shown].T) for key in kept},
    }
    totals = ",".join(f"{json.dumps(key)}:{_numbers(x[shown])}" for key, x in total.items() if key != "size")
    text = json.dumps(data, separators=(",", ":"))[:-1]
    text += f',"batch":{_numbers(batches[shown])},"total":{{{totals}}}}}'
    template = string.Template((pkgutil.get_data("snr_adam.telemetry", "page.html") or b"").decode())
    return template.substitute(title=html.escape(title), data=text.replace("<", "\\u003c"))


def _spread(length: int, most: int) -> np.ndarray:
    """The positions of at most so many of them, the first and the last among them."""
    return np.unique(np.linspace(0, length - 1, min(length, most)).round().astype(int))


def _numbers(values: np.ndarray) -> str:
    """A list in JSON, of four digits each; 1e999 is infinity to every reader."""
    return "[" + ",".join(_number(x) for x in values.tolist()) + "]"


def _number(x: float) -> str:
    return "null" if math.isnan(x) else f"{x:.4g}" if math.isfinite(x) else f"{math.copysign(1, x):.0f}e999"


def _packed(values: np.ndarray) -> dict[str, Any]:
    """A matrix as float16, row by row, in units in which its largest number is 2^15: three digits over nine decades."""
    known = np.abs(values[np.isfinite(values)])
    scale = float(known.max(initial=0)) / _LARGEST or 1.0
    with np.errstate(all="ignore"):
        halves = (values / scale).astype("<f2")
    return {"scale": scale, "data": base64.b64encode(halves.tobytes()).decode()}
