"""The heart: w := w - alpha signal / noise, for one array, lifted to trees once.

For every parameter a step does the same five things:

    decode     the moments from the form they rest in                            storage.py
    update     them with the gradient                                            signal.py, noise.py
    encode     them for their rest                                               storage.py
    estimate   signal and noise from the moments as they will rest               signal.py, noise.py
    divide     u = signal / noise                                                here, and nowhere else

Arithmetic is float32 (float64 for 64-bit gradients or moments) whatever the parameters' dtype and the storage; the
update comes back in the gradient's dtype. The learning rate divides the noise before the division: an update that
ends in a division or an addition gives the same bits whether or not the compiler fuses it with `params + update`. Where
it would end in a product (x / 1, or a trust ratio) a zero is added, see `_numerics.unseen_zero`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from snr_adam import _tree
from snr_adam import storage as storages
from snr_adam._checks import check_arguments
from snr_adam._numerics import (
    Hyper,
    complex_like,
    compute_dtype,
    divide,
    random_bits,
    seeds_at,
    unseen_zero,
)
from snr_adam.descent import Descent
from snr_adam.gate import OPEN, Gate, Gated
from snr_adam.noise import RMS, Noise, Shared
from snr_adam.signal import EMA, Signal
from snr_adam.storage import Storage


@_tree.exportable
class ScaleBySnrState(NamedTuple):
    """What a step needs of the past. With float32 storage these are the fields of `optax.ScaleByAdamState`.

    count: int32 scalar, the number of steps taken; stays at 2^31 - 1 once there.
    mu: the signal's memory, a tree like the parameters (or a NamedTuple of such trees, or ()).
    nu: the noise's memory, likewise.
    """

    count: Any
    mu: Any
    nu: Any


class _Stored(NamedTuple):
    """The moments of one parameter, as they rest."""

    mu: Any
    nu: Any


class _Step(NamedTuple):
    """The numbers of one step in one dtype, shared by all parameters."""

    signal: Any
    noise: Any
    zero: Any


@_tree.exportable
class SharedNoise(NamedTuple):
    """The `nu` of a state whose noise is shared over axes (`noise.Shared`, `sharing.share`).

    v: one array per parameter, in the order of the tree's leaves, with size 1 along the axes that share. Not a tree
      like the parameters, because Flax and others give every array in such a tree the sharding of its parameter.
    """

    v: tuple


class _Rule:
    """The step of one array, for a fixed choice of signal, noise and storage."""

    def __init__(self, signal: Signal, noise: Noise, storage: str | Storage):
        self.axes_of = noise.axes_of if isinstance(noise, Shared) else None
        self.noise: Any = noise.noise if isinstance(noise, Shared) else noise
        self.signal, self.storage = signal, storages.resolve(storage)
        self.memory = jax.tree.structure(jax.eval_shape(lambda: self.init(jnp.zeros((), jnp.float32))))
        self.kept = functools.cache(self._kept)
        if self.axes_of and not self._can_share():
            raise ValueError(
                f"Shared({self.noise!r}) with storage={storage!r}: sharing needs a noise that keeps one array per "
                "parameter, such as RMS, and a storage that keeps it apart from the signal: 'float32' or 'bfloat16'"
            )

    def _can_share(self) -> bool:
        """Whether the noise is one array per parameter and stays the size it starts with."""
        if self.memory != jax.tree.structure(_Stored(0, 0)):
            return False

        def after(g):
            return self.noise.update(self.noise.init(g[:1]), g, self.noise.at(jnp.int32(1), jnp.float32), g)

        return jax.eval_shape(after, jax.ShapeDtypeStruct((2,), jnp.float32)).shape == (1,)

    def init(self, p, shared: tuple[int, ...] = ()) -> _Stored:
        def dither(shape, stream):
            return jnp.zeros(shape, jnp.uint32)

        nu: Any = self.noise.init(p)
        if shared:
            nu = jnp.mean(nu, shared, keepdims=True)
        return _Stored(*self.storage.encode(self.signal.init(p), nu, dither))

    def _kept(self, dtype) -> list[str]:
        """The dtypes at rest of the moments of a parameter of `dtype`."""
        return [str(x.dtype) for x in jax.tree.leaves(jax.eval_shape(lambda: self.init(jnp.zeros((), dtype))))]

    def rows(self, outer, updates, state: ScaleBySnrState, shared: bool) -> list[_Stored]:
        """The moments of every leaf."""
        stored = _Stored(state.mu, outer.unflatten(state.nu.v) if shared else state.nu)
        try:
            return _tree.split(outer, self.memory, stored, updates)
        except ValueError as error:
            raise ValueError(
                f"{error}. (This optimizer keeps {self.signal}, {self.noise} in {self.storage}; the state's mu is "
                f"{type(state.mu).__name__}, its nu {type(state.nu).__name__}: of another optimizer or storage?)"
            ) from None

    def at(self, t, dtype) -> _Step:
        return _Step(self.signal.at(t, dtype), self.noise.at(t, dtype), unseen_zero(t, dtype))

    def estimate(self, g, stored: _Stored, step: _Step, dtype, dither, gate: Gate | None):
        """The signal as (array, scalar) and the noise of one array, and its memory at rest."""
        old = _Stored(*self.storage.decode(*stored, dtype))
        x, noise = g, None
        if self.noise.divides_first:
            x, noise = divide(g, self.noise.estimate(old.nu, g, step.noise, None)), 1.0
        mu = self.signal.update(old.mu, x, step.signal)
        nu = self.noise.update(old.nu, g, step.noise, _center(mu))
        if gate:  # encoding what was decoded gives the bits that were there, see storage.py
            mu, nu = gate.held((mu, nu), tuple(old))
        stored = _Stored(*self.storage.encode(mu, nu, dither))
        mu, nu = self.storage.decode(*stored, dtype)  # from here on what is stored, and the step reads nothing twice
        if noise is None:
            noise = self.noise.estimate(nu, g, step.noise, _center(mu))
        return self.signal.estimate(old.mu, mu, x, step.signal), noise, stored


def _center(mu):
    """The moving average that a spread is measured around: the signal's first, 0 if it keeps none."""
    return next(iter(jax.tree.leaves(mu)), 0.0)


def _in(dtype, x):
    """A scalar in `dtype`; Python floats take the dtype of what they meet."""
    return x.astype(dtype) if isinstance(x, jax.Array) else x


def wrong_state(state) -> TypeError:
    """What to say of a state that `init` has not returned."""
    return TypeError(
        f"the state is of type {type(state).__name__}, which is not what this optimizer's init returned. The order is "
        "update(grads, state, params). A state of optax.adam is taken over by `from_optax`; a checkpoint that comes "
        "back as dicts or lists is restored again with init(params) as its target"
    )


def _flat(outer, nu) -> SharedNoise:
    return SharedNoise(tuple(outer.flatten_up_to(nu)))


def _lift(rule: _Rule, descent: Descent) -> Gated:
    """The step of one array as a pure (init, update) pair over trees."""

    def init(params):
        leaves, outer = _tree.flatten(params)
        _tree.check_floating("parameter", params, leaves)
        shared = [()] * len(leaves)
        if rule.axes_of:
            shared = [rule.axes_of(path, jnp.shape(p)) for path, p in _tree.named_leaves(params)]
        rows = [
            None if p is None else _tree.init_like(functools.partial(rule.init, shared=axes), _tree.as_array(p))
            for p, axes in zip(leaves, shared, strict=True)
        ]
        mu, nu = _tree.join(outer, rule.memory, rows)
        return ScaleBySnrState(_tree.new_count(leaves), mu, _flat(outer, nu) if rule.axes_of else nu)

    def update(updates, state, params=None, *, gate: Gate | None = None, **extra_args):
        del extra_args
        if not isinstance(state, ScaleBySnrState):
            raise wrong_state(state)
        t = optax.safe_increment(state.count)
        leaves, outer = _tree.flatten(updates)
        _tree.check_floating("gradient", updates, leaves)
        shared = isinstance(state.nu, SharedNoise)
        rows = rule.rows(outer, updates, state, shared)
        ps = [None] * len(leaves) if params is None else _tree.match(outer, params, updates, "parameters")
        _tree.check_leaves(updates, leaves, rows, ps, rule.kept, shared)
        if params is None and descent.needs_params:
            raise ValueError(
                "weight decay and trust ratios need the parameters: call update(grads, state, params), got params=None"
            )
        alphas, decays = descent.per_leaf(t, outer, updates, params)
        seeds = functools.cache(lambda: seeds_at(t, len(leaves)))  # only if some storage asks for them
        numbers = functools.cache(lambda dtype: rule.at(t, dtype))

        def leaf(number, g, stored, p, alpha, decay):
            if g is None:
                return None, stored
            g = _tree.as_array(g)
            dtype = compute_dtype(g, *(x for x in jax.tree.leaves(stored) if jnp.issubdtype(x.dtype, jnp.inexact)))
            wide = complex_like(dtype) if jnp.iscomplexobj(g) else dtype
            dither = functools.cache(lambda shape, stream: random_bits(shape, stream, seeds()[number]))
            x = (gate or OPEN).scaled(g.astype(wide))
            signal, noise, stored = rule.estimate(x, stored, numbers(dtype), dtype, dither, gate)
            p = None if p is None else _tree.as_array(p).astype(wide)
            zero = numbers(dtype).zero.astype(wide)
            u = descent.step(signal, noise, p, _in(dtype, alpha), _in(dtype, decay), zero)
            return u.astype(g.dtype), stored

        new = [leaf(*each) for each in zip(range(len(leaves)), leaves, rows, ps, alphas, decays, strict=True)]
        out = outer.unflatten([u for u, _ in new])
        mu, nu = _tree.join(outer, rule.memory, [stored for _, stored in new])
        count = gate.held(t, state.count) if gate else t
        return out, ScaleBySnrState(count, mu, _flat(outer, nu) if shared else nu)

    return Gated(init, update)


def scale_by_snr(
    signal: Signal = EMA(), noise: Noise = RMS(), storage: str | Storage = "float32"
) -> optax.GradientTransformationExtraArgs:
    """Divides the gradient's signal by its noise.

    u_t = signal_t / noise_t, for every element of every parameter. Put a learning rate behind it, as in
    `optax.chain(scale_by_snr(), optax.scale_by_learning_rate(1e-3))`, or use a preset of `snr_adam.optimizers`.

    Args:
      signal: a numerator of `snr_adam.signal`, by default Adam's EMA(0.9).
      noise: a denominator of `snr_adam.noise`, by default Adam's RMS(0.999, eps=1e-8).
      storage: how the moments rest between steps, a name or an object of `snr_adam.storage`.

    Returns:
      A transformation whose state is a `ScaleBySnrState` and whose updates have the gradients' structure, shapes and
      dtypes. It needs no `params` and ignores extra arguments.

    Raises:
      ValueError: for an unknown storage, or when gradients and state do not belong together.
      TypeError: for parameters or gradients that are not floating or complex.

    >>> tx = scale_by_snr()
    >>> state = tx.init(jnp.zeros(2))
    >>> updates, state = tx.update(jnp.array([3.0, -0.001]), state)
    >>> print(updates.round(5))  # one gradient is all signal, whatever its size
    [ 1.      -0.99999]

    Reference: Kingma & Ba, Adam, arXiv 1412.6980, Algorithm 1 and section 2.1.
    """
    return _lift(_Rule(signal, noise, storage), Descent())


def descend(
    learning_rate: Any,
    signal: Signal = EMA(),
    noise: Noise = RMS(),
    *,
    weight_decay: Hyper = 0.0,
    mask: Any = None,
    trust_ratio: bool = False,
    storage: str | Storage = "float32",
) -> optax.GradientTransformationExtraArgs:
    """The whole step: u = -alpha (signal / noise + lambda p).

    Args:
      learning_rate: alpha. A float, a scalar array, a schedule of the number of steps taken, or a tree of these that
        is a prefix of the parameters.
      signal: a numerator of `snr_adam.signal`.
      noise: a denominator of `snr_adam.noise`.
      weight_decay: lambda, decoupled from signal and noise (Loshchilov & Hutter 2019). A float, a scalar array or a
        schedule.
      mask: which parameters decay: a tree of bools that is a prefix of the parameters, or a function from them to one.
      trust_ratio: scales each parameter's step to |p| (LAMB).
      storage: how the moments rest between steps.

    Returns:
      A transformation with state `ScaleBySnrState`; `update` needs `params` if there is weight decay or a trust ratio.

    Raises:
      ValueError: as `scale_by_snr`, and if `params` is needed and missing.
    """
    check_arguments("descend", {"learning_rate": learning_rate, "weight_decay": weight_decay})
    return _lift(_Rule(signal, noise, storage), Descent(learning_rate, weight_decay, mask, trust_ratio))
