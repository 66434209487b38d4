"""PyTorch's Adam and AdamW: their state as plain arrays, in and out, without PyTorch.

`torch.optim.Adam` and `AdamW` keep per parameter what is kept here, in the order in which the optimizer was given them:

    {"state": {0: {"step": 7.0, "exp_avg": m, "exp_avg_sq": v}, 1: ...}, "param_groups": [{"params": [0, 1, ...]}]}

Which of them is which leaf, and which are transposed, only the user knows, who has moved the weights in the same way:
one function from the list of PyTorch's arrays to the tree of parameters serves for weights, m and v alike, and its
inverse for the way back.

    weights = [p.detach().numpy() for p in model.parameters()]
    params = convert(weights)
    state = from_torch(optimizer.state_dict(), tx.init(params), convert)
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from snr_adam import _tree
from snr_adam._given import boxed_like, check_known, plain
from snr_adam._moments import is_adam
from snr_adam.accumulation import AccumulateState
from snr_adam.state.migration import move_moments, to_optax

_MOMENTS = ("exp_avg", "exp_avg_sq")


def from_torch(state_dict: Mapping, like: Any, convert: Callable[[list], Any] | None = None) -> Any:
    """The state with which `adam` or `adamw`, of this package or of Optax, goes on where PyTorch's stopped.

    Args:
      state_dict: what `optimizer.state_dict()` of a `torch.optim.Adam` or `AdamW` returns, or its entry "state": of
        tensors, or of NumPy's arrays.
      like: what `init` returns for the optimizer that goes on, in whatever wrappers.
      convert: makes the tree of parameters of the list of PyTorch's arrays, in the order of its parameters; None stands
        for those without a state. By default the list is in the order of the tree's leaves, each as it is. A function
        that also scales or sums weights is not right for v, which is of squares.

    Returns:
      `like` with these moments and their count.

    Raises:
      ValueError: if the entries are not those of an Adam, if they have not taken the same number of steps, if shapes or
        trees do not fit, or if `like` holds no Adam or several.

    >>> import snr_adam
    >>> kept = {0: {"step": 3.0, "exp_avg": np.float32([[1, 2]]), "exp_avg_sq": np.float32([[4, 5]])}}
    >>> tx, params = snr_adam.adam(1e-3), {"kernel": jnp.zeros((2, 1))}
    >>> state = from_torch(kept, tx.init(params), lambda arrays: {"kernel": arrays[0].T})
    >>> print(state[0].count, state[0].mu["kernel"].ravel())
    3 [1. 2.]

    Reference: torch.optim.Adam, whose state_dict has these names since PyTorch 0.4.
    """
    check_known("from_torch", like)
    form, like = like, plain(like)
    adams = [node for node in jax.tree.leaves(like, is_leaf=is_adam) if is_adam(node)]
    if len(adams) != 1:
        raise ValueError(f"from_torch: `like` holds {len(adams)} states of an Adam: give one that `init` returned")
    entries, order = state_dict, None
    if "state" in state_dict:
        entries = state_dict["state"]
        order = [i for group in state_dict.get("param_groups", ()) for i in group["params"]] or None
    order = sorted(entries) if order is None else order
    for i, entry in entries.items():
        if not set(_MOMENTS) | {"step"} <= set(entry) or "max_exp_avg_sq" in entry:
            raise ValueError(
                f"from_torch: parameter {i} has {sorted(entry)}: only step, exp_avg and exp_avg_sq of Adam and AdamW "
                "without amsgrad move"
            )
    steps = sorted({int(_array(entry["step"])) for entry in entries.values()})
    if len(steps) != 1:
        raise ValueError(
            f"from_torch: the parameters have taken {steps or 'no'} steps: here one count serves for all. Leave out "
            "those that were trained at other times, and let `convert` give zeros for them"
        )
    outer = _tree.flatten(adams[0].mu)[1]
    mu, nu = (
        _tree_of([_array(entries[i][name]) if i in entries else None for i in order], outer, convert)
        for name in _MOMENTS
    )
    return boxed_like(_started(like, optax.ScaleByAdamState(jnp.int32(steps[0]), mu, nu), {}), form)


def _array(x) -> np.ndarray:
    """A tensor, wherever it lies and in whatever dtype, or an array, as NumPy's; bfloat16 becomes float32."""
    x = x.detach().cpu() if hasattr(x, "detach") else x
    return np.asarray(x.float() if str(getattr(x, "dtype", "")) == "torch.bfloat16" else x)


def _tree_of(arrays: list, outer, convert):
    """The arrays as a tree like the parameters."""
    tree = convert(arrays) if convert else arrays
    if not convert:
        if len(arrays) != outer.num_leaves:
            raise ValueError(
                f"from_torch: PyTorch's optimizer has {len(arrays)} parameters, the tree {outer.num_leaves} leaves: "
                "give a function `convert` that makes the tree of the list"
            )
        tree = outer.unflatten(arrays)
    leaves, structure = _tree.flatten(tree)
    if structure != outer:
        raise ValueError(f"from_torch: `convert` makes {structure}, the parameters are {outer}")
    return outer.unflatten([None if x is None else jnp.asarray(x) for x in leaves])


def _started(like, adam: optax.ScaleByAdamState, injected: dict):
    """`like` with these moments, and their count wherever it counts the steps of the optimizer."""

    def is_known(node) -> bool:
        only_counts = getattr(node, "_fields", ()) == ("count",)
        return is_adam(node) or only_counts or isinstance(node, AccumulateState) or hasattr(node, "hyperparams")

    def put(node):
        if not is_known(node):
            return node
        count = jnp.array(adam.count, copy=True)  # each its own buffer, to be donated
        if is_adam(node):
            return move_moments(adam._replace(count=count), node, "`like`", injected)
        if isinstance(node, AccumulateState):
            return node._replace(steps=count, inner=_started(node.inner, adam, injected))
        if not hasattr(node, "hyperparams"):
            return node._replace(count=count)
        inner = _started(node.inner_state, adam, node.hyperparams)
        schedules = getattr(node, "hyperparams_states", None)
        own = {} if schedules is None else {"hyperparams_states": _started(schedules, adam, injected)}
        return node._replace(count=count, inner_state=inner, **own)

    return jax.tree.map(put, like, is_leaf=is_known)


def to_torch(state: Any, convert: Callable[[Any], list] | None = None) -> dict[int, dict[str, np.ndarray]]:
    """The entry "state" of a `state_dict` with which PyTorch's Adam or AdamW goes on where this optimizer stopped.

        kept = {i: {k: torch.tensor(x) for k, x in entry.items()} for i, entry in to_torch(state, back).items()}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": kept})

    Args:
      state: an optimizer's state that holds one Adam, of this package in any storage or of Optax.
      convert: makes the list of arrays, in the order of PyTorch's parameters, of a tree of parameters; the inverse of
        that of `from_torch`. By default the tree's leaves in their order. What is None has no entry.

    Returns:
      A dict from the parameter's number to its step, exp_avg and exp_avg_sq, in float32.

    Raises:
      ValueError: if the state holds no Adam, or several.
    """
    check_known("to_torch", state)
    state = to_optax(state)
    adams = [
        node for node in jax.tree.leaves(plain(state), is_leaf=is_adam) if isinstance(node, optax.ScaleByAdamState)
    ]
    if len(adams) != 1:
        raise ValueError(f"to_torch: the state holds {len(adams)} states of an Adam: give that of one optimizer")
    make = convert or (lambda tree: _tree.flatten(tree)[0])
    columns = [[None if x is None else np.asarray(x) for x in make(tree)] for tree in (adams[0].mu, adams[0].nu)]
    step = np.asarray(adams[0].count, np.float32)
    return {
        i: {"step": step, "exp_avg": m, "exp_avg_sq": v}
        for i, (m, v) in enumerate(zip(*columns, strict=True))
        if m is not None
    }
