"""Optimizers of others, seen from outside: what their moments are of the gradients, found without the run's own.

This package's steps say what they do (`_look.py`). Of any other optimizer a copy with leaves of two elements is stepped
with a few gradients that are made up, once, before the run: where

    m_t = m_{t-1} + gain g_t - leak m_{t-1}          v_t = v_{t-1} + gain |g_t|^2 - leak v_{t-1}

holds for all of them with one gain and one leak, the moment is a linear average with these decays. Where it does not,
as for Yogi's v, momentum of scaled steps, or a v around a mean, nothing is known, and what would need it is nan.

Where it holds for small gradients and not for huge ones, something clips the gradients between here and the moment.
Then what the moment averages is not what is seen here, and `observe` says where it belongs.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from snr_adam import _tree
from snr_adam._moments import Moments, find
from snr_adam._numerics import Average, widen

_STEPS = np.array([[0.05, -0.02], [-0.08, 0.03], [1e-4, -2e-4], [0.02, 0.09], [0.07, -0.06]])
_HUGE = 2.0**20


class Clipped(ValueError):
    """The moment sees other gradients than the transformation is given."""


def averages_of(tx, leaves: list, outer) -> list[tuple[Average | None, Average | None]]:
    """What the first and second moment of each leaf are of the gradients that `tx` is given."""
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        small, huge = (_fits(_moments_after(tx, leaves, outer, scale), scale, len(leaves)) for scale in (1.0, _HUGE))
    for (first, _), (other, _) in zip(small, huge, strict=True):
        if first and not (other and np.allclose(np.array(first[:2]), np.array(other[:2]), rtol=1e-3)):
            raise Clipped
    return small


def _tiny(x, row) -> Any:
    """Two numbers of 64 bits in the rank of x; the first alone for a scalar."""
    shape = (2, *(1,) * (jax.numpy.ndim(x) - 1)) if jax.numpy.ndim(x) else ()
    dtype = "complex128" if jax.numpy.iscomplexobj(x) else "float64"
    return jax.numpy.asarray(row[: 2 if shape else 1].reshape(shape), dtype)


def _moments_after(tx, leaves, outer, scale: float) -> list[list]:
    """The moments of each leaf before and after each of a few steps; [] of an optimizer that cannot be stepped so."""

    def tree(row):
        return outer.unflatten([None if x is None else _tiny(x, row) for x in leaves])

    try:
        params = tree(np.array([1.5, -0.5]))
        state, seen = tx.init(params), []
        for row in (np.zeros(2), *_STEPS):
            if row.any():
                _, state = tx.update(tree(scale * row), state, params)
            found = find(state, outer, outer.flatten_up_to(params))
            seen.append(
                [
                    None if x is None or x.form != "numbers" else (*x.read(), _spacing(x.mu), _spacing(x.nu))
                    for x in found
                ]
            )
    except Exception:  # whatever another optimizer may want that it is not given here: nothing is known of it
        return []
    return seen


def _fits(seen: list[list], scale: float, number: int) -> list[tuple[Average | None, Average | None]]:
    if not seen:
        return [(None, None)] * number
    rows: list[tuple[Average | None, Average | None]] = []
    for i in range(number):
        track = [each[i] for each in seen]
        if any(x is None for x in track):
            rows.append((None, None))
            continue
        gs = scale * _STEPS[:, : np.size(track[0][0])]
        *_, first_spacing, second_spacing = track[0]
        first = _linear([np.ravel(np.asarray(m).real) for m, *_ in track], gs, first_spacing)
        vs = [None if v is None else np.ravel(np.asarray(v)) for _, v, *_ in track]
        second = None if any(v is None or v.size != gs.shape[1] for v in vs) else _linear(vs, gs**2, second_spacing)
        rows.append((first, second))
    return rows


def _spacing(x) -> float:
    """The relative distance of two numbers in the dtype of x."""
    return 0.0 if x is None else float(jax.numpy.finfo(x.dtype).eps)


def _linear(track: list, ys, spacing: float) -> Average | None:
    """gain and leak of x_t = x_{t-1} + gain y_t - leak x_{t-1}, if every step agrees as exactly as x is kept."""
    xs = np.asarray(track, float)
    old, change, y = xs[:-1].ravel(), np.diff(xs, axis=0).ravel(), np.asarray(ys, float).ravel()
    if not np.isfinite(xs).all() or not old.any():
        return None
    scale = np.array([np.abs(y).max(), np.abs(old).max()])
    (gain, leak), *_ = np.linalg.lstsq(np.stack([y, -old], 1) / scale, change, rcond=None)
    gain, leak = float(gain / scale[0]), float(min(leak / scale[1], 1.0))
    left, size = np.abs(change - gain * y + leak * old), np.abs(gain * y) + np.abs(leak * old)
    known = gain > 0 and leak > 0 and np.all(left <= spacing * (np.abs(old) + size) + 1e-9 * size)
    return Average(_plain(gain, spacing / gain), _plain(leak, spacing / leak), 0.0) if known else None


def _plain(x: float, near: float) -> float:
    """The number of few digits that rounding made x of, if there is one as near: 0.1 for what 16 bits made 0.09996."""
    for digits in range(1, 9):
        if abs((plain := float(f"{x:.{digits}g}")) - x) <= near * x:
            return plain
    return x


def injected_rate(state) -> Any:
    """The learning rate in the state of an `inject_hyperparams`; nan if there is none, or more than one."""
    nodes = jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "hyperparams"))
    found = [x.hyperparams["learning_rate"] for x in nodes if "learning_rate" in getattr(x, "hyperparams", ())]
    return found[0] if len(found) == 1 and jax.numpy.ndim(found[0]) == 0 else float("nan")


class Outside(NamedTuple):
    """One step of one leaf of another optimizer; the same questions as to `_look.Seen`."""

    g: Any
    old: Moments
    new: Moments
    averages: tuple
    u: Any
    t: Any
    ok: Any = True
    rate: Any = float("nan")
    scale: Any = None

    def kind(self) -> tuple:
        """What two leaves have in common if their sums may be taken together."""
        arrays = [x for x in (self.g, self.old.mu, self.old.nu) if x is not None]
        return (
            self.averages,
            id(self.t),
            self.old.form,
            *((x.shape, str(x.dtype)) for x in map(_tree.jax_array, arrays)),
        )

    def stacked(self, others: "list[Outside]") -> "Outside":
        """Several leaves of one kind as one, along a new first axis; for sums of what the step began with."""
        gs, mus = zip(*((_tree.jax_array(each.g), each.old.mu) for each in (self, *others)), strict=True)
        return self._replace(g=jax.numpy.stack(gs), old=self.old._replace(mu=jax.numpy.stack(mus), nu=None))

    def gradient(self):
        return widen(_tree.jax_array(self.g))

    @property
    def repeats(self) -> bool:
        """Whether the moment sees some of the gradient of the step before; one that did would be no average."""
        return False

    @property
    def first(self):
        return self.averages[0]

    @property
    def second(self):
        return self.averages[1]

    @property
    def noise(self) -> str:
        return "average" if self.second else "none" if self.old.nu is None else "unknown"

    def before(self):
        return self.old.read()[0]

    def after(self):
        return self.new.read()

    def update(self, p):
        return widen(_tree.jax_array(self.u))


def as_computed(averages: tuple, moments: Moments) -> tuple[Average | None, Average | None]:
    """The decays that d x + (1-d) y has when both factors are rounded to float32, as they are in Optax."""

    def rounded(average: Average | None, x) -> Average | None:
        if average is None or x.dtype == np.float64 or average.leak == 1:
            return average
        return Average(float(np.float32(average.gain)), 1.0 - float(np.float32(1.0 - average.leak)), 0.0)

    return rounded(averages[0], moments.mu), rounded(averages[1], moments.nu)
