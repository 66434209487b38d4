"""Gradients of groups of examples: micro-batches, single examples, replicas, and what they show of a gradient's noise.

The numbers go to `noise_scale.from_groups`, whose docstring has the formulas.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from snr_adam._numerics import abs_sq, widen


class Groups(NamedTuple):
    """What n groups of gradients show: all that `from_groups` needs, as `from_groups(*groups)`.

    groups_sq: Q, the mean of the squared norms of the groups' gradients. mean_sq: A, the squared norm of their mean.
    n: the number of groups. batch_size: the number of examples in each.
    """

    groups_sq: Any
    mean_sq: Any
    n: Any
    batch_size: Any


def microbatches(loss, size: int, *, at_once: int | None = 1):
    """The gradient of a batch, computed in groups, and what the groups show of its noise.

    Args:
      loss: a function (params, *batch) -> the mean loss over the examples on the leading axis of `batch`'s arrays.
      size: b, the number of examples in a group. It divides the batch. With 1, groups are single examples.
      at_once: how many groups to compute together, None for all: each holds a gradient in memory meanwhile.

    Returns:
      A function (params, *batch) -> ((value, `Groups`), gradient), like `jax.value_and_grad(..., has_aux=True)`. Value
      and gradient are those of the whole batch. It may be jitted, scanned and sharded.

    >>> from snr_adam.telemetry.noise_scale import from_groups
    >>> def loss(w, x):
    ...     return jnp.mean((w - x) ** 2) / 2
    >>> (value, groups), grad = microbatches(loss, 1)(0.0, jnp.array([1.0, 2.0, 3.0, 4.0]))
    >>> print(value, grad, from_groups(*groups))  # Sigma = 5/3, G^2 = 2.5^2 - 5/12
    3.75 -2.5 0.29 (0 to 1.4)

    Reference: `optax.microbatching.micro_grad`, which does the work.
    """

    def value_and_grad(params, *batch):
        numbers = tuple(range(1, len(batch) + 1))
        grad = optax.microbatching.micro_grad(
            loss,
            batch_argnums=numbers,
            keep_batch_dim=False,
            microbatch_size=at_once,
            accumulator=optax.microbatching.AccumulationType.MEAN,
            metrics_fn=squared_norm,
        )
        grads, seen = grad(params, *optax.microbatching.reshape_batch_axis(batch, size))
        groups = Groups(jnp.mean(seen.metrics), squared_norm(grads), jnp.asarray(seen.metrics.size), jnp.asarray(size))
        return (jnp.mean(seen.values), groups), grads

    return value_and_grad


def replicas(loss, axis_name):
    """The gradient of a batch that is spread over devices, and what the devices show of its noise.

    For use inside `jax.shard_map`, where every device sees its own part of the batch and the same parameters. Under
    plain `jit` the compiler adds gradients up unseen, and nobody can measure how they differ.

    Args:
      loss: a function (params, *batch) -> the mean loss over the examples on the leading axis of `batch`'s arrays.
      axis_name: the mesh axis (or a tuple of them) that the batch is spread over, with at least 2 devices.

    Returns:
      A function (params, *batch) -> ((value, `Groups`), gradient), like `jax.value_and_grad(..., has_aux=True)`, the
      same on every device: the gradient is averaged here, and not again by the caller. It costs one scalar more in the
      all-reduce.
    """

    def value_and_grad(params, *batch):
        # Without the cast the gradient of parameters that are the same on every device is summed before it is seen.
        value, grads = jax.value_and_grad(loss)(jax.lax.pcast(params, axis_name, to="varying"), *batch)
        value, groups_sq, grads = jax.lax.pmean((value, squared_norm(grads), grads), axis_name)
        size = jax.tree.leaves(batch)[0].shape[0]
        n = jnp.asarray(jax.lax.axis_size(axis_name))
        return (value, Groups(groups_sq, squared_norm(grads), n, jnp.asarray(size))), grads

    return value_and_grad


def total(terms):
    return functools.reduce(jnp.add, terms, jnp.zeros((), jnp.float32))


def squared_norm(tree) -> jax.Array:
    """The sum of |x|^2 over all elements of a tree, in float32 or wider."""
    return total(jnp.sum(abs_sq(widen(x))) for x in jax.tree.leaves(tree))
