"""One step of all observed leaves, as vectors with a column per leaf: the sums, and the numbers that they make.

A new quantity is a row of `_averages.Last`, made here or in `_details`, and a column of `columns`.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from snr_adam import _compiler, _tree
from snr_adam._bits import Seed
from snr_adam._look import Seen
from snr_adam._numerics import Average, abs_sq
from snr_adam._tree import check_sizes
from snr_adam.telemetry import _averages as averages
from snr_adam.telemetry import _lags as lags
from snr_adam.telemetry import _sums as sums
from snr_adam.telemetry._averages import Last, Memory

_ROUNDING = 1e-5  # a difference of sums that is a smaller share of them is not known
_UNKNOWN = float("nan")


class Leaf(NamedTuple):
    """An observed leaf: its number, the key of its path, the axis it is sliced along (None: not), and its part of the
    vectors."""

    number: int
    key: str
    axis: int | None
    part: slice

    @property
    def size(self) -> int:
        return self.part.stop - self.part.start


def _layer_axis(rule, path: str, shape) -> int | None:
    """The axis of this leaf that stacks layers."""
    if isinstance(rule, Mapping):
        rule = next((axis for pattern, axis in rule.items() if re.search(pattern, path)), None)
    if rule is None or not -len(shape) <= rule < len(shape) or not shape[rule]:
        return None
    return rule % len(shape)


def observed_in(tree, found, rule, columns: int | None = None) -> list[Leaf]:
    """The leaves that have a first moment; as many as there are columns, where that is known."""
    leaves, start, keys = [], 0, _tree.keys(tree)
    for i, ((path, x), moments) in enumerate(zip(_tree.named_leaves(tree), found, strict=True)):
        if moments is not None:
            check_sizes("observe: a look sums in blocks, whose sizes must be known", jnp.shape(x))
            axis = _layer_axis(rule, path, jnp.shape(x))
            stop = start + (1 if axis is None else jnp.shape(x)[axis])
            leaves.append(Leaf(i, keys[i], axis, slice(start, stop)))
            start = stop
    if columns not in (None, start):
        none = [path for path, x in _tree.named_leaves(tree) if x is None]
        raise ValueError(
            f"observe: the gradients have {start} layers with a first moment, the state has {columns} (gradients that "
            f"are None: {', '.join(none) or 'none'}). A frozen parameter is None when `init` is called too, or masked: "
            "optax.masked(observe(tx), mask)"
        )
    return leaves


class Taken(NamedTuple):
    """The sums of a look, (L,) each, with the m of before the step and of after it.

    power: A. product: <m_{t-1}, g>. zeros: how many elements of g are 0, nan on accelerators. before_sq, first:
    |m_{t-1}|^2 and |m_t|^2. second: the sum of the noise's square. sketches: (L, 128).
    """

    power: Any
    product: Any
    zeros: Any
    before_sq: Any
    first: Any
    second: Any
    sketches: Any


class Shown:
    """What one step has shown: its leaves, and what can be asked of each (`_look.Seen`, or `_outside.Outside`)."""

    def __init__(self, observed: list[Leaf], seen: list, params: list, updates: list):
        self.observed, self.seen, self.params, self.updates = observed, seen, params, updates
        self.firsts: list[Average | None] = [each.first for each in seen]
        self.seconds: list[Average | None] = [each.second for each in seen]
        self.given = [each.rate for each in seen], [each.scale for each in seen]
        self.is_own = all(isinstance(each, Seen) for each in seen)
        self.is_constant = all(x is None or averages.is_constant(x) for x in self.firsts)

    @property
    def ok(self):
        """Whether the step was taken."""
        return jnp.all(jnp.stack([jnp.asarray(x) for x in {id(each.ok): each.ok for each in self.seen}.values()]))

    @property
    def t(self):
        """The number of the step by each leaf's own count."""
        return self.row([each.t for each in self.seen])

    def of_kind(self, kind: str):
        """Where the noise is an "average" of |g|^2, "direct", "none" or "unknown"."""
        return self.row([float(each.noise == kind) for each in self.seen]) > 0

    def row(self, values: list):
        """One number per leaf as a vector."""
        size = sum(leaf.size for leaf in self.observed)
        known = isinstance(values[0], float)
        if all(x is values[0] or (known and isinstance(x, float) and x == values[0]) for x in values):
            return jnp.broadcast_to(jnp.asarray(values[0], jnp.float32), (size,))
        each = zip(values, self.observed, strict=True)
        return jnp.concatenate([jnp.broadcast_to(jnp.asarray(x, jnp.float32), (leaf.size,)) for x, leaf in each])

    @property
    def sizes(self):
        """The number of elements of each leaf or slice."""
        return self.row(
            [float(jnp.size(u) // max(leaf.size, 1)) for u, leaf in zip(self.updates, self.observed, strict=True)]
        )

    def field(self, which: list[Average | None], name: str):
        return self.row([float("nan") if x is None else getattr(x, name) for x in which])

    def weights(self, memory: Memory, before: int = 0):
        """The sum of the weights in the first moment, and of their squares, after the step or so many steps `before`.

        memory: as it is then; only where decays change in time the weights are read from it."""
        pairs, known = [], _known()
        for each, average, leaf in zip(self.seen, self.firsts, self.observed, strict=True):
            if average is None:
                pairs.append((float("nan"), float("nan")))
            elif averages.is_constant(average):
                pairs.append(known(average, each.t, before)[:2])
            else:
                pairs.append((memory.weight[leaf.part], memory.square[leaf.part]))
        return tuple(self.row(list(column)) for column in zip(*pairs, strict=True))

    def remember(self, memory: Memory) -> Memory:
        """The weights after this step, where decays change in time."""
        if self.is_constant:
            return memory
        gain, leak = self.field(self.firsts, "gain"), self.field(self.firsts, "leak")
        weight = memory.weight + (gain - leak * memory.weight)
        return memory._replace(weight=weight, square=memory.square + (gain * gain - leak * (2 - leak) * memory.square))

    def advance(self, memory: Memory, power, product) -> Memory:
        """|m|^2 and the sum of v after this step, from A and <m_{t-1}, g>."""
        gain, leak = self.field(self.firsts, "gain"), self.field(self.firsts, "leak")
        change = gain * gain * power + 2 * (1 - leak) * gain * product - leak * (2 - leak) * memory.first
        first = averages.advance((memory.first, memory.first_rest), change)
        gain, leak = self.field(self.seconds, "gain"), self.field(self.seconds, "leak")
        second = averages.advance((memory.second, memory.second_rest), gain * power - leak * memory.second)
        return Memory(memory.weight, memory.square, *first, *second)

    @functools.cached_property
    def is_whole(self) -> np.ndarray:
        """Whether a column's sketches are the gradients themselves."""
        each = zip(self.seen, self.observed, strict=True)
        return np.concatenate(
            [[lags.is_whole(jax.eval_shape(seen.gradient), leaf.axis)] * leaf.size for seen, leaf in each]
        )

    def in_the_step(self, seeds: list, take, beside):
        """A and <m_{t-1}, g> from what the step began with, the square of the noise where it is no average, and the
        sketches.

        seeds: of the signs of each leaf. take: how rows are summed. beside(p, u): what to make the sums beside, so that
        XLA takes them into the kernel which makes p + u; None: nothing.
        """
        is_direct = any(seen.noise == "direct" for seen in self.seen)

        def of(seen, p, u, seed, axis):
            noise = seen.after()[1] if seen.noise == "direct" else jnp.zeros((), jnp.float32)
            given = seen.gradient(), _new(seen), seen.before(), [noise] if is_direct else [], seed, beside(p, u)
            return _before(*given, axis=axis, take=take)

        groups: dict = {}
        for i, (seen, leaf) in enumerate(zip(self.seen, self.observed, strict=True)):
            small = leaf.axis is None and sums.is_small(seen.before())
            groups.setdefault(seen.kind() if small else i, []).append(i)
        found = []
        for first, *rest in groups.values():
            seen, leaf = self.seen[first], self.observed[first]
            if rest:
                seed = Seed(*map(jnp.stack, zip(*(seeds[i] for i in (first, *rest)), strict=True)))
                found.append(of(seen.stacked([self.seen[i] for i in rest]), None, None, seed, 0))
            else:
                found.append(of(seen, self.params[first], self.updates[first], seeds[first], leaf.axis))
        made = [i for group in groups.values() for i in group]
        order = sums.in_order(made, [leaf.size for leaf in self.observed])
        rows, sketches = sums.joined(found)
        rows, sketches = rows[:, order], sketches[order]
        return (*rows, sketches) if is_direct else (*rows, jnp.zeros((), jnp.float32), sketches)

    def after_the_step(self, seeds: list) -> Taken:
        """All sums from what the step ended with; what was before it follows from m_t = (1-k) m_{t-1} + c g_t."""

        each = zip(self.seen, seeds, self.observed, strict=True)
        found = [_after(seen.gradient(), _new(seen), *seen.after(), seed, axis=leaf.axis) for seen, seed, leaf in each]
        (power, inner, zeros, first, second), sketches = sums.joined(found)
        gain, leak = self.field(self.firsts, "gain"), self.field(self.firsts, "leak")
        left = jnp.where(leak < 1, 1 / jnp.where(leak < 1, 1 - leak, 1.0), jnp.nan)
        newest = gain * gain * power
        before = first - 2 * gain * inner + newest
        before = jnp.where(before > _ROUNDING * (first + newest), before * left * left, jnp.nan)
        return Taken(power, (inner - gain * power) * left, zeros, before, first, second, sketches)

    def numbers(self, taken: Taken, before: Memory, after: Memory):
        """The row of this look, without details, and L."""
        power = taken.power
        gain, leak = self.field(self.firsts, "gain"), self.field(self.firsts, "leak")
        (weight, square), (old, _) = self.weights(after), self.weights(before, 1)
        own = self.field(self.firsts, "debias")
        debias = jnp.where(own > 0, own, 1 / weight)
        alone = self.row([_UNKNOWN if seen.repeats else 1.0 for seen in self.seen])
        rho = alone * debias * debias * square
        noise = jnp.where(self.of_kind("none"), power, self.row(self.factors()) * taken.second)
        floor = jnp.where(self.of_kind("direct"), jnp.nan, rho)
        unknown = jnp.full_like(power, jnp.nan)
        signal = debias * debias * taken.first
        rate, scale = (self.row([_UNKNOWN if x is None else x for x in xs]) for xs in self.given)
        sums = power, taken.product, taken.before_sq, taken.zeros
        details = (unknown,) * averages.DETAILS
        last = Last(signal, noise, rho, floor, leak, gain * debias, *sums, rate, scale, *details)
        return last, alone * taken.product / jnp.where(old > 0, old, 1.0)

    def factors(self) -> list:
        """What makes the noise's square of the sum of v: the optimizer's own correction, or that of its weights."""

        known = _known()

        def factor(seen, average: Average | None):
            if average is None:
                return 1.0 if seen.noise == "direct" else float("nan")
            unknown = isinstance(average.debias, float) and average.debias == 0
            return known(average, seen.t)[2] if unknown else average.debias

        return [factor(seen, average) for seen, average in zip(self.seen, self.seconds, strict=True)]


@functools.partial(jax.jit, static_argnames=("axis", "take"))  # traced once for all leaves of one shape
def _before(g, x, m, noise: list, seed, y, *, axis, take):
    """The sums over rows of |g|^2, <m, g>, the noise where there is one, and of x, or g, with signs.

    y: what to make them beside, and the step, or None."""
    found = [abs_sq(g), sums.inner(m, g), *noise, lags.signed(g if x is None else x, seed, axis)]
    return sums.rows(found if y is None else [_compiler.beside(x, *y) for x in found], axis, take)


@functools.partial(jax.jit, static_argnames="axis")
def _after(g, x, m, v, seed, *, axis):
    """The sums over rows of |g|^2, <m, g>, zeros in g, |m|^2, v and of x, or g, with signs."""
    v = jnp.zeros((), jnp.float32) if v is None else v
    x = lags.signed(g if x is None else x, seed, axis)
    return sums.rows([abs_sq(g), sums.inner(m, g), g == 0, abs_sq(m), v, x], axis)


def _new(seen):
    """The gradient whose noise no other step's has, where it is not what the moment sees: what that was made of."""
    return seen.given() if seen.repeats else None


def _known():
    """`weights_after`, and one over the sum of the weights, made once for all leaves that have the same."""
    found: dict = {}

    def known(average: Average, t, before: int = 0) -> tuple:
        key = average.gain, average.leak, id(t), before
        if key not in found:
            weight, square = averages.weights_after(average, t - before)
            found[key] = weight, square, 1 / weight
        return found[key]

    return known
