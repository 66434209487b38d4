"""The step of one array, lifted to trees once: `scale_by_snr` and `descend`.

The formula is in `step.py`. Here are the tree, the count, the numbers that all arrays of a step share, and what reaches
a step from around it: the gate of a `guard`, the look of an `observe`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from snr_adam import _tree
from snr_adam import storage as storages
from snr_adam._bits import random_bits, seeds_at
from snr_adam._checks import check_arguments
from snr_adam._compiler import unseen_zero, with_moments
from snr_adam._contracts import check_fit, check_part
from snr_adam._look import Look, Seen
from snr_adam._numerics import complex_like, compute_dtype
from snr_adam._per_leaf import Descents, PerLeaf, Rate
from snr_adam._recipe import with_recipe
from snr_adam._state import ScaleBySnrState, fits, made_by, marked
from snr_adam.descent import Decoupled
from snr_adam.noise import RMS, Noise
from snr_adam.shared import Shared, SharedNoise
from snr_adam.signal import EMA, Signal
from snr_adam.step import OPEN, Gate, Rule, Stored
from snr_adam.storage import Name, Storage


class _Memory:
    """What one parameter keeps, and how the tree of a state holds it."""

    def __init__(self, rule: Rule, axes_of):
        self.rule, self.axes_of, self.made = rule, axes_of, made_by(rule.signal, rule.noise)
        self.inner = jax.tree.structure(jax.eval_shape(lambda: rule.init(jnp.zeros((), jnp.float32))))
        self.kept = functools.cache(self._kept)
        if axes_of and not (storages.is_apart(rule.storage) and self._can_share()):
            raise ValueError(
                f"Shared({rule.noise!r}) with storage={rule.storage!r}: sharing needs a noise that keeps one array per "
                "parameter, such as RMS, and a storage that keeps it apart from the signal: 'float32' or 'bfloat16'"
            )

    def _can_share(self) -> bool:
        """Whether the noise is one array per parameter and stays the size it starts with."""
        noise = self.rule.noise
        if self.inner != jax.tree.structure(Stored(0, 0)):
            return False

        def after(g):
            return noise.update(noise.init(g[:1]), g, noise.at(jnp.int32(1), jnp.float32), g)

        return jax.eval_shape(after, jax.ShapeDtypeStruct((2,), jnp.float32)).shape == (1,)

    def _kept(self, dtype) -> list[str]:
        """The dtypes at rest of the moments of a parameter of `dtype`."""
        return [str(x.dtype) for x in jax.tree.leaves(jax.eval_shape(lambda: self.rule.init(jnp.zeros((), dtype))))]

    def init(self, params, leaves) -> list[Stored | None]:
        axes = [()] * len(leaves)
        if self.axes_of:
            axes = [self.axes_of(path, jnp.shape(p)) for path, p in _tree.named_leaves(params)]
        return [
            None if p is None else _tree.init_like(functools.partial(self.rule.init, shared=over), _tree.jax_array(p))
            for p, over in zip(leaves, axes, strict=True)
        ]

    def split(self, outer, updates, state: ScaleBySnrState) -> list[Stored]:
        """The moments of every leaf."""
        shared = isinstance(state.nu, SharedNoise)
        nu = outer.unflatten(state.nu.v) if shared else storages.unmark(state.nu)
        try:
            if not fits(state.made, self.made):
                raise ValueError(
                    f"the moments are those of {state.made} (signal/noise), not of {self.made}; between Adam's own, "
                    "such as nadam's and radam's, `from_optax(state, tx.init(params))` moves"
                )
            if shared and not self._can_share():
                raise ValueError("the noise is shared, and this one keeps more than a mean of squares")
            if not shared and type(storages.mark(self.rule.storage, nu)) is not type(state.nu):
                raise ValueError("the moments rest in another form")
            return _tree.split(outer, self.inner, Stored(state.mu, nu), updates)
        except ValueError as error:
            rule = self.rule
            raise ValueError(
                f"{error}. (This optimizer keeps {rule.signal}, {rule.noise} in {rule.storage}; the state's mu is "
                f"{type(state.mu).__name__}, its nu {type(state.nu).__name__}: of another optimizer or storage?)"
            ) from None

    def join(self, outer, rows, count, shared: bool, made: str | None) -> ScaleBySnrState:
        """The inverse of `split`."""
        mu, nu = _tree.join(outer, self.inner, rows)
        nu = SharedNoise(tuple(outer.flatten_up_to(nu))) if shared else storages.mark(self.rule.storage, nu)
        return marked(ScaleBySnrState(count, mu, nu), made)


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


def _lift(memory: _Memory, per_leaf: PerLeaf) -> optax.GradientTransformationExtraArgs:
    """The step of one array as a pure (init, update) pair over trees."""
    rule = memory.rule

    def init(params):
        leaves, outer = _tree.flatten(params)
        _tree.check_floating("parameter", params, leaves)
        rows = memory.init(params, leaves)
        return memory.join(outer, rows, _tree.new_count(leaves), bool(memory.axes_of), memory.made)

    def update(updates, state, params=None, *, gate: Gate = OPEN, look: Look | None = None, **extra_args):
        del extra_args
        if not isinstance(state, ScaleBySnrState):
            raise wrong_state(state)
        t: Any = optax.safe_increment(_tree.checked_count(state.count))
        leaves, outer = _tree.flatten(updates)
        _tree.check_floating("gradient", updates, leaves)
        shared = isinstance(state.nu, SharedNoise)
        rows = memory.split(outer, updates, state)
        ps = [None] * len(leaves) if params is None else _tree.match(outer, params, updates, "parameters")
        _tree.check_leaves(updates, leaves, rows, ps, memory.kept, shared)
        alphas, lambdas, descents = per_leaf.at(t, outer, updates, params)
        seeds = functools.cache(lambda: seeds_at(t, len(leaves)))  # only if some storage asks for them
        numbers = functools.cache(lambda dtype: rule.at(t, dtype, unseen_zero(t, dtype)))
        paths = _tree.keys(updates) if look is not None else [""] * len(leaves)

        def leaf(number, path, given, stored, p, alpha, decay, descent):
            if given is None:
                return None, stored
            g = _tree.jax_array(given)
            dtype = compute_dtype(g, *(x for x in jax.tree.leaves(stored) if jnp.issubdtype(x.dtype, jnp.inexact)))
            wide = complex_like(dtype) if jnp.iscomplexobj(g) else dtype
            dither = functools.cache(lambda shape, stream: random_bits(shape, stream, seeds()[number]))
            k = numbers(dtype)._replace(zero=numbers(dtype).zero.astype(wide))
            source, is_raw = gate.source(given)
            source = _tree.jax_array(source)
            x = gate.gradient(source.astype(wide), is_raw)
            new = rule.moments(x, stored, k, dtype, dither, gate)
            ratio = rule.ratio(x, stored, new, k, dtype)
            p = None if p is None else _tree.jax_array(p).astype(wide)
            alpha, decay = _in(dtype, alpha), _in(dtype, decay)
            if look is not None:
                look.note(path, Seen(rule, source, is_raw, gate, stored, new, k, dtype, wide, t, alpha, decay, descent))
            u = ratio.value if alpha is None else descent.update(ratio, p, alpha, decay)
            if rule.divides_first and g.dtype.itemsize < 4:
                u = with_moments(u, new.nu, t)
            return u.astype(g.dtype), new

        each = zip(range(len(leaves)), paths, leaves, rows, ps, alphas, lambdas, descents, strict=True)
        new = [leaf(*row) for row in each]
        count = t if gate is OPEN else gate.choose(t, state.count)
        after = memory.join(outer, [stored for _, stored in new], count, shared, state.made)
        if gate is not OPEN:
            gate.held.append(after)
        return outer.unflatten([u for u, _ in new]), after

    return optax.GradientTransformationExtraArgs(init, update)


def _build(owner: str, signal, noise, storage, per_leaf=PerLeaf()):
    axes_of = noise.axes_of if isinstance(noise, Shared) else None
    inside, inside_of = (noise.noise, f"{owner}: Shared") if isinstance(noise, Shared) else (noise, owner)
    check_part(owner, "signal", signal, Signal, "EMA(0.9)")
    check_part(inside_of, "noise", inside, Noise, "RMS(0.999)")
    check_fit(inside_of, signal, inside)
    per_leaf.check(owner)
    return _lift(_Memory(Rule(signal, inside, storage), axes_of), per_leaf)


@with_recipe
def scale_by_snr(
    signal: Signal = EMA(), noise: Noise | Shared = RMS(), storage: Name | Storage = "float32"
) -> optax.GradientTransformationExtraArgs:
    """Divides the gradient's signal by its noise.

    u_t = signal_t / noise_t, for every element of every parameter. Put a learning rate behind it, as in
    `optax.chain(scale_by_snr(), optax.scale_by_learning_rate(1e-3))`, or use a preset of `snr_adam.optimizers`.

    Args:
      signal: a numerator of `snr_adam.signal`, by default Adam's EMA(0.9).
      noise: a denominator of `snr_adam.noise`, by default Adam's RMS(0.999, eps=1e-8).
      storage: how the moments rest between steps, a name or an object of `snr_adam.storage`.

    Returns:
      A transformation with state `ScaleBySnrState`. Its updates have the dtypes of the gradients.

    Raises:
      ValueError: for an unknown storage, or one that cannot hold what signal and noise keep; when initializing or
        updating, if gradients, moments and parameters do not belong together.
      TypeError: if signal or noise lacks what such a part needs; when initializing or updating, for leaves that are
        neither floating nor complex, and for a state of another optimizer.

    >>> tx = scale_by_snr(EMA(0.9), RMS(0.999))
    >>> state = tx.init(jnp.zeros(2))
    >>> updates, state = tx.update(jnp.array([3.0, -0.001]), state)
    >>> print(updates.round(5))  # one gradient is all signal, whatever its size
    [ 1.      -0.99999]

    Reference: Kingma & Ba, Adam, arXiv 1412.6980, Algorithm 1 and section 2.1.
    """
    return _build("scale_by_snr", signal, noise, storage)


@with_recipe
def descend(
    learning_rate: Rate,
    signal: Signal = EMA(),
    noise: Noise | Shared = RMS(),
    *,
    weight_decay: Rate = 0.0,
    mask: Any = None,
    descent: Descents = Decoupled(),
    storage: Name | Storage = "float32",
) -> optax.GradientTransformationExtraArgs:
    """The whole step: u = -alpha (signal / noise + lambda p).

    Args:
      learning_rate: alpha. A float, a scalar array, a schedule of the number of steps taken, or a tree of these that
        is a prefix of the parameters.
      signal: a numerator of `snr_adam.signal`.
      noise: a denominator of `snr_adam.noise`.
      weight_decay: lambda, decoupled from signal and noise (Loshchilov & Hutter 2019). A float, a scalar array, a
        schedule, or a tree of these that is a prefix of the parameters.
      mask: which parameters decay: a tree of bools that is a prefix of the parameters, or a function from them to one.
        `mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)` leaves out norms and biases.
      descent: what is done with the ratio, a part of `snr_adam.descent`: `Decoupled()`, `TrustRatio()` for LAMB, or
        `CautiousDecay()`; or a tree of them that is a prefix of the parameters, or a function from them to one.
      storage: how the moments rest between steps.

    Returns:
      A transformation with state `ScaleBySnrState`; `update` needs `params` if there is weight decay or a trust ratio.
      A leaf whose gradient is None rests, while the one count of all leaves goes on: thawed later it steps as after
      gradients of 0, at first (1 - b1) / sqrt(1 - b2) = 3.2 learning rates; see docs/how_to/order_of_wrappers.md.

    Raises:
      ValueError, TypeError: as `scale_by_snr`, and if `params` is needed and missing.

    >>> tx = descend(1.0, EMA(0.9), RMS(0.999), weight_decay=0.5)
    >>> w = jnp.array([1.0, -2.0])
    >>> updates, state = tx.update(jnp.array([3.0, -0.001]), tx.init(w), w)
    >>> print(updates.round(1))
    [-1.5  2. ]
    """
    check_arguments("descend", {"learning_rate": learning_rate, "weight_decay": weight_decay, "mask": mask})
    return _build("descend", signal, noise, storage, PerLeaf(learning_rate, weight_decay, mask, descent))
