"""Averaged weights: train with w, evaluate with a moving average of them.

    a_t = a_{t-1} + c_t (w_t - a_{t-1})          c_t = (1 - b) / (1 - b^t),  c_1 = 1

The weights of w_1 ... w_t in it sum to 1 at every t, so nothing is left of where the average began, and no warm-up is
needed. The average is float32 (float64 for 64-bit parameters) whatever the parameters are: in bfloat16 a step of
(1 - b) (w - a) would be lost to rounding.

What `update` is given as `params` are the weights after the step before, as they have landed, whatever was done to the
updates on the way. So it is these that are averaged, one step late, and `averaged_params` adds the newest: the order of
wrappers does not matter, and no sum is formed that the caller forms again. `optax.ema` averages updates instead.

Polyak & Juditsky 1992; exponential weights as in Tarvainen & Valpola 2017 (arXiv 1703.01780).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from snr_adam import _tree
from snr_adam._checks import check_hyperparams, check_optimizer
from snr_adam._compiler import beside
from snr_adam._given import boxed_like, plain
from snr_adam._numerics import Hyper, compute_dtype, corrected_gain, decay_at, lerp, moment_like, widen
from snr_adam._recipe import with_recipe
from snr_adam.step import OPEN, Gate


@_tree.exportable
class AveragedState(NamedTuple):
    """count: int32 scalar, steps so far. average: a tree like the parameters, float32, of the weights after all steps
    but the newest. gain: float32 scalar, c_t of the newest. inner: the wrapped optimizer's state.
    """

    count: Any
    average: Any
    gain: Any
    inner: Any


def unused_average(state: AveragedState) -> AveragedState:
    """An average around the same inner state that has seen nothing yet."""
    zeros = jax.tree.map(jnp.zeros_like, state._replace(inner=()))
    return zeros._replace(inner=state.inner, gain=zeros.gain + 1)


@with_recipe
def averaged(tx: optax.GradientTransformation, decay: Hyper = 0.999) -> optax.GradientTransformationExtraArgs:
    """Keeps a moving average of the parameters beside any optimizer; `averaged_params` reads it.

    a_t = a_{t-1} + c_t (w_t - a_{t-1}) with c_t = (1 - b) / (1 - b^t): 4 bytes of state per parameter, 8 moved.

    Args:
      tx: any optimizer; the result replaces it. Its updates and its state are the same bits with and without.
      decay: b, a memory of 1 / (1 - b) steps. A float, a scalar array, or a schedule of the number of steps so far.

    Returns:
      A transformation with state `AveragedState`; `update` needs `params`. Inside of `guard` a step that is skipped
      does not count; around it the weights of a skipped step count again.

    Raises:
      ValueError: if `decay` is not in [0, 1), or if `params` is missing.
      TypeError: if `tx` is no optimizer, or a parameter is no floating number.

    >>> tx = averaged(optax.sgd(1.0), decay=0.5)
    >>> w = jnp.zeros(())
    >>> state = tx.init(w)
    >>> for _ in range(2):
    ...     updates, state = tx.update(jnp.array(-3.0), state, w)
    ...     w = optax.apply_updates(w, updates)
    >>> print(w, averaged_params(state, w))  # (3 + 2 * 6) / 3
    6.0 5.0

    Reference: Polyak & Juditsky, Acceleration of stochastic approximation by averaging, SIAM J. Control Optim. 30(4),
    1992; Morales-Brotons et al., Exponential moving average of weights in deep learning, arXiv 2411.18704.
    """
    check_hyperparams(decay=decay)
    tx = check_optimizer("averaged", tx)

    def init(params):
        leaves, outer = _tree.flatten(params)
        _tree.check_floating("averaged: parameter", params, leaves)
        zeros = [None if p is None else _tree.init_like(moment_like, _tree.jax_array(p)) for p in leaves]
        gain = _tree.new_scalar(leaves, jnp.ones((), jnp.float32))
        return AveragedState(_tree.new_count(leaves), outer.unflatten(zeros), gain, tx.init(params))

    def update(updates, state, params=None, *, gate: Gate = OPEN, **extra_args):
        if params is None:
            raise ValueError("averaged averages the parameters: call update(grads, state, params), got params=None")
        if gate is not OPEN:
            extra_args = {**extra_args, "gate": gate}
        us, inner = tx.update(updates, state.inner, params, **extra_args)
        t: Any = optax.safe_increment(_tree.checked_count(state.count))
        leaves, outer = _tree.flatten(params)
        olds, us = outer.flatten_up_to(state.average), outer.flatten_up_to(us)
        for i, (p, a) in enumerate(zip(leaves, olds, strict=True)):
            if p is not None:
                olds[i] = jnp.where((state.count > 0) & gate.ok, _after(p, a, state), a)
                us[i] = us[i] if us[i] is None else beside(_tree.jax_array(us[i]), olds[i], t)
        average, us = outer.unflatten(olds), outer.unflatten(us)
        gain = corrected_gain(decay_at(decay, t, jnp.float32), t, jnp.float32)
        after = AveragedState(t, average, gain, ())
        if gate is OPEN:
            return us, after._replace(inner=inner)
        count, gain = gate.choose((t, gain), (state.count, state.gain))
        after = AveragedState(count, average, gain, gate.choose(inner, state.inner))
        gate.held.append(after)
        return us, after

    return optax.GradientTransformationExtraArgs(init, update)


def averaged_params(state, params):
    """The averaged weights, to evaluate and to export with; training goes on with `params`.

    Args:
      state: an optimizer's state that holds an `AveragedState`, or several in the branches of `optax.partition`; an
        `nnx.Optimizer` will do.
      params: the parameters after the step that returned the state. Inside of `carry_remainder` give the whole ones,
        `whole_weights(params, state)`.

    Returns:
      A tree like `params`, in its dtypes and in arrays of its own; where nothing is averaged (masked or frozen leaves,
      and before the first step) its parameters. The swap for an evaluation is `loss(averaged_params(state, params))`.

    Raises:
      ValueError: if the state holds no average, or one of other parameters.
    """
    found, (leaves, outer) = _tree.nodes(AveragedState, plain(state)), _tree.flatten(plain(params))
    if not found:
        raise ValueError("averaged_params: there is no AveragedState in this state: wrap the optimizer, averaged(tx)")
    new: list[Any] = [None if p is None else jnp.array(p, copy=True) for p in leaves]
    places = {key: i for i, key in enumerate(_tree.keys(plain(params)))}
    for node in found:
        for path, a in jax.tree_util.tree_leaves_with_path(node.average):
            i = places.get(jax.tree_util.keystr(path))
            if i is None or new[i] is None or jnp.shape(new[i]) != a.shape:
                raise ValueError(
                    f"averaged_params: the state has an average of {_tree.name(path)} with shape {a.shape}, the "
                    "parameters have no such leaf: give the parameters that it was made for"
                )
            new[i] = _after(_tree.jax_array(leaves[i]), a, node).astype(new[i].dtype)
    return boxed_like(outer.unflatten(new), params)


def _after(p, a, state: AveragedState):
    """The average with one more weight in it."""
    return lerp(a, widen(_tree.jax_array(p)), state.gain.astype(compute_dtype(a)))
