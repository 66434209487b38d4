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
import numpy as np


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


def split(outer, inner, state, tree) -> list:
    """The inverse of `join`: one small tree per leaf of `tree`, whose structure is `outer`."""
    columns = [match(outer, part, tree, "moments") for part in inner.flatten_up_to(state)]
    return [inner.unflatten([column[i] for column in columns]) for i in range(outer.num_leaves)]


def match(outer, other, tree, what: str) -> list:
    """The parts of `other` at the leaves of `tree`, whose structure is `outer`; raises ValueError where they differ."""
    try:
        return outer.flatten_up_to(other)
    except (ValueError, TypeError):
        pass
    here, there = ([path for path, _ in named_leaves(x)] for x in (tree, other))
    missing, extra = ([path for path in x if path not in y] for x, y in ((there, set(here)), (here, set(there))))
    found = [f"{word} {_some(paths)}" for word, paths in (("lack", missing), ("have besides", extra)) if paths]
    kinds = f"are {jax.tree.structure(tree)} where the {what} are {jax.tree.structure(other)}"
    raise ValueError(
        f"gradients and {what} are different trees: the gradients {' and '.join(found) or kinds}. Pass the gradients "
        "of the parameters that `init` was given, with the state it returned: update(grads, state, params)"
    )


def _some(paths: list) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def spread(prefix, outer, whole, what: str) -> list:
    """One value per leaf of `whole`, from a single value or from a tree that is a prefix of it."""
    try:
        full = jax.tree.broadcast(prefix, whole, is_leaf=is_none)
    except ValueError as error:
        raise ValueError(
            f"the tree given as {what}, {jax.tree.structure(prefix)}, is no prefix of the parameters "
            f"{jax.tree.structure(whole)}: give one value, or a tree whose branches are theirs"
        ) from error
    return outer.flatten_up_to(full)


def name(path) -> str:
    """A leaf's path as "layer/kernel"; the same whether or not Flax's Variables still box the leaf."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value") or "the tree itself"


def named_leaves(tree) -> list[tuple[str, Any]]:
    """Path and value of each leaf, None included."""
    return [(name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_none)]


def keys(tree) -> list[str]:
    """The path of each leaf, None included, as no other leaf has it: a name such as "a/b" may be that of two."""
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_none)]


def nodes(kind, state) -> list:
    """The parts of a state that are of this type, wherever they are in it."""

    def is_kind(node) -> bool:
        return isinstance(node, kind)

    return [node for node in jax.tree.leaves(state, is_leaf=is_kind) if is_kind(node)]


def as_array(x):
    """Python and NumPy numbers as arrays; arrays, tracers and ShapeDtypeStructs as they are."""
    return x if hasattr(x, "dtype") and hasattr(x, "shape") else jnp.asarray(x)


def jax_array(x):
    """The same for what is computed with: NumPy's arrays too, in the dtype that JAX has for theirs.

    NumPy's are float64 by default, and where 64-bit types are off no operation of JAX keeps that, nor a limit in it.
    """
    is_numpy = isinstance(x, (np.ndarray, np.generic)) and x.dtype != jax.dtypes.float0
    return jnp.asarray(x) if is_numpy else as_array(x)


def is_bool(x) -> bool:
    """Whether x is a truth value, of Python, NumPy or JAX: it passes for a number, and is none."""
    return isinstance(x, bool) or getattr(x, "dtype", None) == np.bool_


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


def check_arrays(what: str, tree, leaves) -> None:
    """Raises TypeError, naming the leaf, unless all leaves are arrays or numbers."""
    for i, x in enumerate(leaves):
        if x is not None and _kind(x).kind == "O":
            raise TypeError(
                f"{what} {named_leaves(tree)[i][0]} has {_described(x)}, which is no array: give the arrays of the "
                "model alone, for instance eqx.filter(model, eqx.is_inexact_array)"
            )


def check_sizes(why: str, shape, first: int = 0) -> None:
    """Raises ValueError for a shape with sizes, from that axis on, that are not known yet, as `jax.export` has them."""
    if not all(isinstance(size, (int, np.integer)) for size in shape[first:]):
        raise ValueError(
            f"{why}, and an array has the shape ({', '.join(map(str, shape))}): export the step for the shapes of the "
            "model that it trains, without symbolic ones"
        )


def check_floating(what: str, tree, leaves) -> None:
    """Raises TypeError, naming the leaf, unless all leaves are floating or complex numbers."""
    for i, x in enumerate(leaves):
        if x is None:
            continue
        if jnp.issubdtype(_kind(x), jnp.floating) and jnp.finfo(_kind(x)).bits < 16:
            raise TypeError(
                f"{what} {named_leaves(tree)[i][0]} has {_described(x)}, in which an update is lost to rounding: train "
                "it in bfloat16 or wider, and convert what the model computes with"
            )
        if not jnp.issubdtype(_kind(x), jnp.inexact):
            raise TypeError(
                f"{what} {named_leaves(tree)[i][0]} has {_described(x)}, which has no moments: leave it out of the "
                "trained parameters, for instance with optax.masked, eqx.filter or by making it None"
            )


def _kind(x):
    """The dtype of a leaf, or `object` for what is no array."""
    try:
        return jnp.result_type(x)
    except (TypeError, ValueError):
        return jnp.dtype(object)


def _described(x) -> str:
    return f"dtype {x.dtype}" if hasattr(x, "dtype") else f"type {type(x).__name__} ({repr(x)[:40]})"


def check_leaves(updates, leaves, rows, params, kept, shared: bool) -> None:
    """Raises ValueError, naming the leaf, where gradient, moments and parameter do not belong together.

    kept(dtype) names the dtypes of the moments of a parameter of that dtype. 32 and 64 bits are not told apart.
    """
    for i, (g, row, p) in enumerate(zip(leaves, rows, params, strict=True)):
        if g is None:
            continue
        shape, dtype = jnp.shape(g), jnp.result_type(g)
        moments, wanted = jax.tree.leaves(row, is_leaf=is_none), [_single(x) for x in kept(dtype)]
        fit = all(_fits(x, shape, shared) for x in moments) and [_single(_kind(x)) for x in moments] == wanted
        both = p is None or (_fits(p, shape, False) and jnp.iscomplexobj(p) == jnp.iscomplexobj(g))
        if not (fit and both):
            what, others, instead = ("parameter has", [p], "") if fit else ("moments have", moments, f", not {wanted}")
            raise ValueError(
                f"gradient {named_leaves(updates)[i][0]} has shape {shape} and dtype {dtype} but its {what} "
                f"{' and '.join(map(_type, others)) or 'nothing'}{instead}: pass the gradients of the parameters that "
                "`init` was given, with the state it returned, to an optimizer with the same options"
            )


def _single(dtype) -> str:
    return {"float64": "float32", "complex128": "complex64"}.get(str(dtype), str(dtype))


def _type(x) -> str:
    return "None" if x is None else f"shape {jnp.shape(x)} and dtype {_kind(x)}"


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


def checked_count(count):
    """A step counter as it comes in a state; raises TypeError for one that would stop counting, or is none."""
    dtype = _kind(count)
    if not (jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits >= 32 and jnp.shape(count) == ()):
        raise TypeError(
            f"the state's count has shape {jnp.shape(count)} and dtype {dtype}: must be one int32. A float32 stops at "
            "2^24; a state restored in another form is restored again with init(params) as its target, and one stacked "
            "over runs is stepped under jax.vmap"
        )
    return jnp.asarray(count)
