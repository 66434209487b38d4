"""The heart: w := w - alpha signal / noise, for one array, lifted to trees once.

For every parameter a step does the same five things:

    decode     the moments from the form they rest in                            storage.py
    update     them with the gradient                                            signal.py, noise.py
    encode     them for their rest                                               storage.py
    estimate   signal and noise from the moments as they will rest               signal.py, noise.py
    divide     u = signal / noise                                                here, and nowhere else

Arithmetic is float32 (float64 for 64-bit gradients or moments) whatever the parameters' dtype and the storage; the
update comes back in the gradient's dtype. The learning rate multiplies the signal before the division: an update that
ends in a division or an addition gives the same bits whether or not the compiler fuses it with `params + update`. Some
noises make a product of it all the same (x / 1, x / sqrt(y)); so a zero is added, see `_numerics.unseen_zero`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from snr_adam import _tree
from snr_adam import storage as storages
from snr_adam._numerics import (
    Hyper,
    abs_sq,
    complex_like,
    compute_dtype,
    divide,
    random_bits,
    step_seed,
    times,
    unseen_zero,
    value_at,
)
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

    def at(self, t, dtype) -> _Step:
        return _Step(self.signal.at(t, dtype), self.noise.at(t, dtype), unseen_zero(t, dtype))

    def estimate(self, g, stored: _Stored, step: _Step, dtype, dither):
        """The signal as (array, scalar) and the noise of one array, and its memory at rest."""
        old = _Stored(*self.storage.decode(*stored, dtype))
        x, noise = g, None
        if self.noise.divides_first:
            x, noise = divide(g, self.noise.estimate(old.nu, g, step.noise, None)), 1.0
        mu = self.signal.update(old.mu, x, step.signal)
        nu = self.noise.update(old.nu, g, step.noise, _center(mu))
        stored = _Stored(*self.storage.encode(mu, nu, dither))
        mu, nu = self.storage.decode(*stored, dtype)  # from here on what is stored, and the step reads nothing twice
        if noise is None:
            noise = self.noise.estimate(nu, g, step.noise, _center(mu))
        return self.signal.estimate(old.mu, mu, x, step.signal), noise, stored


def _center(mu):
    """The moving average that a spread is measured around: the signal's first, 0 if it keeps none."""
    return next(iter(jax.tree.leaves(mu)), 0.0)


def _trust_ratio(p, u):
    """|p| / |u|, and 1 where either is 0 (LAMB, You et al. 2020, with phi the identity)."""
    p_norm, u_norm = jnp.sqrt(jnp.sum(abs_sq(p))), jnp.sqrt(jnp.sum(abs_sq(u)))
    return jnp.where((p_norm > 0) & (u_norm > 0), p_norm / jnp.where(u_norm > 0, u_norm, 1.0), 1.0)


def _resolve(hyper, t):
    """A hyper-parameter, or a tree of them, with every schedule replaced by its value at step t."""
    return jax.tree.map(lambda h: value_at(h, t), hyper, is_leaf=_tree.is_none)


class _Descent(NamedTuple):
    """How signal and noise make an update: -(alpha signal) / noise - (alpha lambda) p; without alpha, their ratio."""

    alpha: Any = None
    weight_decay: Any = 0.0
    mask: Any = None
    trust_ratio: bool = False

    @property
    def needs_params(self) -> bool:
        return self.trust_ratio or not (isinstance(self.weight_decay, (int, float)) and self.weight_decay == 0)

    def per_leaf(self, t, outer, updates, params) -> tuple[list, list]:
        """alpha and lambda of every leaf."""
        if self.alpha is None:
            return [None] * outer.num_leaves, [0.0] * outer.num_leaves
        alphas = _tree.spread(_resolve(self.alpha, t), outer, updates)
        decay = _resolve(self.weight_decay, t)
        if self.mask is None:
            return alphas, [decay] * outer.num_leaves
        mask = self.mask(updates if params is None else params) if callable(self.mask) else self.mask
        masks = _tree.spread(mask, outer, updates)
        return alphas, [_select(on, decay) for on in masks]

    def step(self, signal, noise, p, alpha, decay, zero):
        x, k = signal
        if alpha is None:
            return divide(times(x, k), noise)
        decays = not (isinstance(decay, float) and decay == 0)
        if self.trust_ratio:
            u = divide(times(x, k), noise)
            u = u + times(p, decay) if decays else u
            return times(u, -alpha * _trust_ratio(p, u)) + zero
        u = divide(times(x, -alpha * k), noise) + zero
        return u - times(p, alpha * decay) if decays else u


def _select(on, decay):
    """decay where the mask is on, else 0; decided now if the mask is known now. A frozen parameter's mask is None."""
    return (decay if on else 0.0) if on is None or isinstance(on, (bool, np.bool_)) else jnp.where(on, decay, 0.0)


def _in(dtype, x):
    """A scalar in `dtype`; Python floats take the dtype of what they meet."""
    return x.astype(dtype) if isinstance(x, jax.Array) else x


def _flat(outer, nu) -> SharedNoise:
    return SharedNoise(tuple(outer.flatten_up_to(nu)))


def _lift(rule: _Rule, descent: _Descent) -> optax.GradientTransformationExtraArgs:
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

    def update(updates, state, params=None, **extra_args):
        del extra_args
        t = optax.safe_increment(state.count)
        leaves, outer = _tree.flatten(updates)
        _tree.check_floating("gradient", updates, leaves)
        shared = isinstance(state.nu, SharedNoise)
        nu = outer.unflatten(state.nu.v) if shared else state.nu
        rows = _tree.split(outer, rule.memory, _Stored(state.mu, nu))
        ps = [None] * len(leaves) if params is None else outer.flatten_up_to(params)
        _tree.check_shapes(updates, leaves, rows, ps, shared)
        if params is None and descent.needs_params:
            raise ValueError(
                "weight decay and trust ratios need the parameters: call update(grads, state, params), got params=None"
            )
        alphas, decays = descent.per_leaf(t, outer, updates, params)
        seed = step_seed(t)
        numbers = functools.cache(lambda dtype: rule.at(t, dtype))

        def leaf(number, g, stored, p, alpha, decay):
            if g is None:
                return None, stored
            g = _tree.as_array(g)
            dtype = compute_dtype(g, *(x for x in jax.tree.leaves(stored) if jnp.issubdtype(x.dtype, jnp.inexact)))
            wide = complex_like(dtype) if jnp.iscomplexobj(g) else dtype
            dither = functools.partial(random_bits, seed=seed, leaf=number)
            signal, noise, stored = rule.estimate(g.astype(wide), stored, numbers(dtype), dtype, dither)
            p = None if p is None else _tree.as_array(p).astype(wide)
            zero = numbers(dtype).zero.astype(wide)
            u = descent.step(signal, noise, p, _in(dtype, alpha), _in(dtype, decay), zero)
            return u.astype(g.dtype), stored

        new = [leaf(*each) for each in zip(range(len(leaves)), leaves, rows, ps, alphas, decays, strict=True)]
        out = outer.unflatten([u for u, _ in new])
        mu, nu = _tree.join(outer, rule.memory, [stored for _, stored in new])
        return out, ScaleBySnrState(t, mu, _flat(outer, nu) if shared else nu)

    return optax.GradientTransformationExtraArgs(init, update)


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
    return _lift(_Rule(signal, noise, storage), _Descent())


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
      is a
        prefix of the parameters.
      signal: a numerator of `snr_adam.signal`.
      noise: a denominator of `snr_adam.noise`.
      weight_decay: lambda, decoupled from signal and noise (Loshchilov & Hutter 2019). A float, a scalar array or a
      schedule. mask: which parameters decay: a tree of bools that is a prefix of the parameters, or a function from
      them to one. trust_ratio: scales each parameter's step to |p| (LAMB).
      storage: how the moments rest between steps.

    Returns:
      A transformation with state `ScaleBySnrState`; `update` needs `params` if there is weight decay or a trust ratio.

    Raises:
      ValueError: as `scale_by_snr`, and if `params` is needed and missing.
    """
    return _lift(_Rule(signal, noise, storage), _Descent(learning_rate, weight_decay, mask, trust_ratio))
