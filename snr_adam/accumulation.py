"""One optimizer step for several microbatches.

A batch that does not fit into memory is taken in n pieces. Their gradients are summed, and the optimizer sees the mean,

    S_i = S_{i-1} + g_i  (S_0 = 0)        u = inner update of S_n / n        and zero after the pieces before the last

A microbatch that only accumulates moves what it must: gradient in, sum in, sum out, 12 bytes per float32 parameter.
The inner optimizer does not run (it is in the other branch of a `lax.cond`), and there is one buffer: when the sum has
been used, the update u lies in its place until the next sum begins. `update` returns that buffer or zero, an expression
that fuses with `params + update`, so that a tree of zeros is never written; `apply_accumulated` leaves that sum out.

Gradients of pieces also say how noisy a gradient is, for nothing. For pieces of b examples, with Sigma the covariance
of one example's gradient and G the mean gradient,

    E |g_n|^2 = |G|^2 + tr(Sigma) / b          E |S_n / n|^2 = |G|^2 + tr(Sigma) / (n b)

Both squares are taken when the inner step runs, of the last piece and of the mean; to square every piece would read
every gradient twice. They serve as the Q and A of `noise_scale.from_groups(Q, A, n, b)`, one of each per step; there Q
is the mean over all pieces, which has the same expectation and a smaller spread. (McCandlish et al. 2018, arXiv
1812.06162, appendix A.1.)
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from snr_adam import _tree
from snr_adam._checks import check_optimizer, check_scalar
from snr_adam._compiler import never
from snr_adam._numerics import abs_sq, compute_dtype, divide, moment_like
from snr_adam._recipe import with_recipe


@_tree.exportable
class AccumulateState(NamedTuple):
    """Between two microbatches.

    count: int32 scalar, microbatches in the sum; 0 right after a step of the inner optimizer.
    steps: int32 scalar, steps of the inner optimizer so far.
    buffer: a tree like the parameters, float32: the sum, or if count is 0 the last update.
    piece_sq: float32 scalar, |g_n|^2 of the last step's last microbatch.
    mean_sq: float32 scalar, |S_n / n|^2 of the last step.
    inner: the wrapped optimizer's state.
    """

    count: Any
    steps: Any
    buffer: Any
    piece_sq: Any
    mean_sq: Any
    inner: Any


@with_recipe
def accumulate(
    tx: optax.GradientTransformation, every: int | Callable[[jax.Array], Any]
) -> optax.GradientTransformationExtraArgs:
    """Runs `tx` once for every so many microbatches, on the mean of their gradients.

    The result is that of one large batch, to float32 rounding, for losses that are means over examples and microbatches
    of one size. Microbatches that only accumulate change neither parameters nor the inner state.

    Args:
      tx: any optimizer; the result replaces it.
      every: n, microbatches per step; or a schedule of n, a function of the number of steps so far, for a batch size
        that grows. Of a schedule's number that is not known while the step is traced the fraction is dropped, and less
        than 1 is 1.

    Returns:
      A transformation with the state `AccumulateState`. Its updates have the gradients' dtypes, or wider ones if `tx`
      gives such; they are zero but after every n-th microbatch, when `state.count` is 0.

    Raises:
      ValueError, TypeError: if `every`, or what it returns, is known and no whole number from 1 on.

    >>> tx = accumulate(optax.sgd(0.5), every=2)
    >>> state = tx.init(jnp.zeros(()))
    >>> for g in (1.0, 3.0):
    ...     updates, state = tx.update(jnp.array(g), state)
    ...     print(updates, state.count)
    0.0 1
    -1.0 0
    """
    if not callable(every):
        _check_every("every", every)
    tx = check_optimizer("accumulate", tx)

    def init(params):
        leaves, outer = _tree.flatten(params)
        _tree.check_floating("parameter", params, leaves)
        buffer = [None if p is None else _tree.init_like(moment_like, _tree.jax_array(p)) for p in leaves]
        # scalars are arrays of their own: one buffer cannot be donated twice
        (count, steps), (piece, mean) = ([new(leaves) for _ in range(2)] for new in (_tree.new_count, _zero))
        return AccumulateState(count, steps, outer.unflatten(buffer), piece, mean, tx.init(params))

    def update(updates, state, params=None, **extra_args):
        for what, tree in (("gradient", updates), ("parameter", params)):
            _tree.check_arrays(f"accumulate: {what}", tree, _tree.flatten(tree)[0])
        n = every
        if callable(every):
            n = every(state.steps)
            _check_every("the value of schedule every", n)
        n = jnp.maximum(jnp.asarray(n).astype(jnp.int32), 1)
        grads = jax.tree.map(_tree.jax_array, updates)
        like, _ = jax.eval_shape(tx.update, grads, state.inner, params, **extra_args)
        # what lies in the buffer of a step that was taken is its update, and no part of the next sum
        total = _each(lambda g, s: jnp.where(state.count == 0, 0, s) + g.astype(s.dtype), grads, state.buffer)

        def run(state):
            piece, whole = _square(grads), _square(_each(lambda g, s: s, grads, state.buffer, None))
            # the sum is read before the update takes its place, and need not be copied
            pieces = jnp.where(never(whole), 0, n)
            mean = _each(lambda g, s: divide(s, pieces.astype(compute_dtype(s))), grads, state.buffer, None)
            given = jax.tree.map(lambda x, g: x.astype(g.dtype), mean, grads)
            us, inner = tx.update(given, state.inner, params, **extra_args)
            buffer = _each(lambda u, s: u.astype(s.dtype), us, state.buffer)
            squares = piece, whole / (n * n).astype(jnp.float32)
            return AccumulateState(jnp.zeros_like(n), optax.safe_increment(state.steps), buffer, *squares, inner)

        done = _tree.checked_count(state.count) + 1 >= n
        state = state._replace(count=state.count + 1, buffer=total)
        state = jax.lax.cond(done, run, lambda state: state, state)
        return _each(lambda u, b: jnp.where(done, b, 0).astype(u.dtype), like, state.buffer, None), state

    return optax.GradientTransformationExtraArgs(init, update)


def apply_accumulated(params, state: AccumulateState):
    """`optax.apply_updates` for the state that `update` returned: adds the update after a step, else touches nothing.

    The sum with zero reads and writes every parameter to no effect. This does not; the rest is the same, bit for bit:

        _, state = tx.update(grads, state, params)
        params = apply_accumulated(params, state)
    """
    return jax.lax.cond(state.count == 0, optax.apply_updates, lambda params, _: params, params, state.buffer)


_KEPT = object()


def _each(of, grads, buffer, frozen=_KEPT):
    """of(g, s) of every leaf; where a gradient is None, `frozen`, or what is in the buffer."""

    def one(g, s):
        return (s if frozen is _KEPT else frozen) if g is None else of(g, s)

    return jax.tree.map(one, grads, buffer, is_leaf=_tree.is_none)


def _check_every(what: str, n) -> None:
    """Raises unless n is a whole number from 1 on, or is not known yet."""
    check_scalar(what, n, "a whole number of microbatches from 1 on")
    if isinstance(n, jax.core.Tracer) or not getattr(n, "is_fully_addressable", True):
        return
    if not (1 <= float(n) < math.inf and float(n) == int(n)):
        raise ValueError(f"{what}={n}: a step needs a whole number of microbatches from 1 on")


def _zero(leaves):
    return _tree.new_scalar(leaves, jnp.zeros((), jnp.float32))


def _square(tree):
    """The squared norm of a tree, float32."""
    return sum((jnp.sum(abs_sq(x), dtype=jnp.float32) for x in jax.tree.leaves(tree)), jnp.float32(0))
