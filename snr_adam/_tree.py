"""The only tree helpers: one leaf's work is written for arrays and lifted to trees here.

An estimator's memory of one array is an array, a NamedTuple of arrays, or (). In the optimizer's state it lies the
other way round, as a NamedTuple of trees shaped like the parameters, because that is the form that sharding,
checkpoints and Flax's boxes understand. `split` and `join` turn one into the other. A None leaf (a frozen parameter)
stays None.
"""

from typing import Any

import jax
import jax.export
import jax.numpy as jnp


def exportable(cls):
    """Lets `jax.export` write programs whose state holds this NamedTuple."""
    return jax.export.register_namedtuple_serialization(cls, serialized_name=f"snr_adam.{cls.__name__}")


def is_none(x) -> bool:
    """Whether x is None, so that None counts as a leaf."""
    return x is None


def flatten(tree) -> tuple[list, Any]:
    """Leaves and structure, None included among the leaves."""
    return jax.tree.flatten(tree, is_leaf=is_none)


def join(outer, inner, rows: list):
    """A list with one small tree of structure `inner` per leaf -> an `inner` of trees of structure `outer`."""
    columns = zip(
        *(inner.flatten_up_to(row) if row is not None else [None] * inner.num_leaves for row in rows), strict=True
    )
    trees = [outer.unflatten(column) for column in columns] if rows else [outer.unflatten(())] * inner.num_leaves
    return inner.unflatten(trees)


def split(outer, inner, state) -> list:
    """The inverse of `join`: one small tree per leaf of `outer`."""
    columns = [outer.flatten_up_to(tree) for tree in inner.flatten_up_to(state)]
    return [inner.unflatten([column[i] for column in columns]) for i in range(outer.num_leaves)]


def spread(prefix, outer, whole) -> list:
    """One value per leaf of `whole`, from a single value or from a tree that is a prefix of it."""
    full = jax.tree.broadcast(prefix, whole, is_leaf=is_none)
    return outer.flatten_up_to(full)


def name(path) -> str:
    """A leaf's path as "layer/kernel"; the same whether or not Flax's Variables still box the leaf."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value") or "the tree itself"


def named_leaves(tree) -> list[tuple[str, Any]]:
    """Path and value of each leaf, None included."""
    return [(name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_none)]


def as_array(x):
    """Python and NumPy numbers as arrays; arrays, tracers and ShapeDtypeStructs as they are."""
    return x if hasattr(x, "dtype") and hasattr(x, "shape") else jnp.asarray(x)


def is_abstract(x) -> bool:
    """Whether x is a ShapeDtypeStruct: a shape without values."""
    return isinstance(x, jax.ShapeDtypeStruct)


def init_like(init, p):
    """init(p); for a ShapeDtypeStruct the same without values, sharded like p where the shape is p's."""
    if not is_abstract(p):
        return init(p)
    like = jax.eval_shape(init, p)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p.sharding if x.shape == p.shape else None), like
    )


def check_floating(what: str, tree, leaves) -> None:
    """Raises TypeError, naming the leaf, unless all leaves are floating or complex numbers."""
    for i, x in enumerate(leaves):
        if x is not None and not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
            raise TypeError(
                f"{what} {named_leaves(tree)[i][0]} has dtype {jnp.result_type(x)}, which has no moments: "
                "leave it out of the trained parameters, for instance with optax.masked or by making it None"
            )


def check_shapes(updates, leaves, rows, params, shared: bool) -> None:
    """Raises ValueError, naming the leaf, where gradient, moments and parameter differ in shape."""
    for i, (g, row, p) in enumerate(zip(leaves, rows, params, strict=True)):
        if g is None:
            continue
        moments = jax.tree.leaves(row, is_leaf=is_none)
        for what, others in (("moments", moments), ("parameter", [] if p is None else [p])):
            if not all(_fits(x, jnp.shape(g), shared and what == "moments") for x in others):
                got = [None if x is None else jnp.shape(x) for x in others]
                raise ValueError(
                    f"gradient {named_leaves(updates)[i][0]} has shape {jnp.shape(g)} but its {what} have {got}: "
                    "pass the gradients of the parameters that `init` was given, with the state it returned"
                )


def _fits(x, shape, shared: bool) -> bool:
    if x is None or len(jnp.shape(x)) != len(shape):
        return False
    return all(a == b or (shared and a == 1) for a, b in zip(jnp.shape(x), shape, strict=True))


def new_scalar(leaves, value):
    """A scalar array of a state, abstract if the parameters are."""
    scalar = jnp.asarray(value)
    return jax.ShapeDtypeStruct(scalar.shape, scalar.dtype) if any(map(is_abstract, leaves)) else scalar


def new_count(leaves):
    """A step counter at 0, int32."""
    return new_scalar(leaves, jnp.zeros((), jnp.int32))
