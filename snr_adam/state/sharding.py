"""Where an optimizer's state lives on a mesh of devices.

The moments of a parameter are as large as the parameter, or twice that. How they should lie is a question about the
parameters' own layout, so this module knows shapes, specs and meshes, and nothing of optimizers: it finds the arrays of
a state that belong to a parameter by the tree they stand in and by their shape.

    "like parameters"   each moment lies as its parameter does         FSDP, tensor parallelism, one device
    "zero1"             and is split over the data axis as well        replicated parameters, 1/n of the state each

ZeRO-1 (Rajbhandari et al. 2020, arXiv 1910.02054, the stage P_os): parameters stay whole on every device, gradients
arrive reduced, each device steps its 1/n of the moments, and the new updates are gathered. With s state bytes per
parameter a device holds s / n instead of s. Nothing is communicated by hand: JAX partitions the step that it is given,
and an elementwise step has nothing to communicate but, at most, the updates.

    shardings = state_sharding(tx, params, mesh, "zero1")
    state = jax.jit(tx.init, out_shardings=shardings)(params)       made where it lives, never on one device
    print(footprint(state))
    step = jax.jit(step, out_shardings=(params_sharding, shardings), donate_argnums=(0, 1))
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from snr_adam import _tree
from snr_adam.shared import SharedNoise
from snr_adam.transform import ScaleBySnrState


@dataclass(frozen=True)
class LikeParameters:
    """Each array of the state lies as its parameter does."""

    def spec(self, shape: tuple[int, ...], spec: tuple, mesh) -> tuple:
        """How an array of this shape is split, of a parameter split by `spec` (one entry per axis)."""
        return spec


@dataclass(frozen=True)
class Zero1:
    """The state is split over the data axis although its parameters are whole there (ZeRO, stage 1).

    Of the axes that divide without padding the longest is split, the first of equals: what stays whole is then as even
    as it can be, and rows of TPU tiles stay full. Arrays that no axis divides, that are small, or that are split over
    the data axis already (FSDP) lie as their parameter does.

    axis: the name of the mesh's data axis, or a tuple of names; None is the only axis there is, or the one called data.
    smallest: the number of elements from which an array is split. Fewer cost less memory than the message is worth.
    """

    axis: Any = None
    smallest: int = 2**14

    def spec(self, shape: tuple[int, ...], spec: tuple, mesh) -> tuple:
        """How an array of this shape is split, of a parameter split by `spec` (one entry per axis)."""
        axes = self._axes(mesh)
        ways = _ways(axes, mesh)
        taken = {name for entry in spec for name in _names(entry)}
        if math.prod(shape) < self.smallest or taken & set(axes):
            return spec
        room = [size // _ways(_names(entry), mesh) for size, entry in zip(shape, spec, strict=True)]
        best = max((i for i in range(len(room)) if room[i] % ways == 0), key=lambda i: room[i], default=None)
        return tuple((*_names(entry), *axes) if i == best else entry for i, entry in enumerate(spec))

    def _axes(self, mesh) -> tuple[str, ...]:
        names = mesh.axis_names
        if self.axis is None:
            if len(names) > 1 and "data" not in names:
                raise ValueError(
                    f"zero1: the mesh has the axes {names}, none named 'data': say Zero1(axis=...) over which of them "
                    "the gradients are averaged"
                )
            return names if len(names) == 1 else ("data",)
        axes = _names(self.axis)
        if not set(axes) <= set(names):
            raise ValueError(f"Zero1(axis={self.axis!r}): the mesh has the axes {names}")
        return axes


Policy = LikeParameters | Zero1
_BY_NAME = {"like parameters": LikeParameters(), "zero1": Zero1()}


def state_sharding(
    tx: optax.GradientTransformation,
    params,
    mesh: jax.sharding.Mesh,
    policy: str | Policy = "like parameters",
    *,
    memory_kind: str | None = None,
):
    """The sharding of every array in an optimizer's state.

    Arrays that stand in a tree like the parameters and have their parameter's shape follow the policy, whatever their
    dtype and however deep in the state they are (chains, masks, `optax.MultiSteps`, moments packed or shared).
    Everything else, counts and scalars above all, is replicated.

    Args:
      tx: any optimizer, of this package or of Optax. Its `init` is traced, nothing is computed.
      params: the parameters, or `jax.ShapeDtypeStruct`s in their place, each with its NamedSharding on `mesh`. One
        without a sharding, or on a single device, counts as replicated.
      mesh: where the state shall live; its axes may be Auto or Explicit.
      policy: "like parameters", "zero1", or an object such as `Zero1(axis="replica")`.
      memory_kind: "pinned_host" keeps what follows the policy in the host's memory; None in the device's. In a step,
        fetch such a state with `jax.device_put(state, jax.memory.Space.Device)` before the update.

    Returns:
      A tree of NamedShardings with the structure of `tx.init(params)`, for `jax.jit(tx.init, out_shardings=...)`, for
      the step, and for restoring checkpoints. `footprint` says what it costs.

    Raises:
      ValueError: for an unknown policy or data axis, a parameter on another mesh, or a memory the devices lack.

    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> params = {"w": jax.ShapeDtypeStruct((256, 1024), "float32")}
    >>> print(*state_sharding(optax.adam(1e-3), params, mesh, "zero1")[0].mu["w"].spec)
    None data

    Reference: Rajbhandari et al., ZeRO, arXiv 1910.02054, section 5.1.
    """
    rule = _resolve(policy)
    _check_memory(mesh, memory_kind)
    leaves, outer = _tree.flatten(params)
    leaves = [None if p is None else _tree.as_array(p) for p in leaves]
    specs = [
        None if p is None else rule.spec(p.shape, _spec(path, p, mesh), mesh)
        for (path, _), p in zip(_tree.named_leaves(params), leaves, strict=True)
    ]
    shapes = [None if p is None else jax.ShapeDtypeStruct(p.shape, p.dtype) for p in leaves]
    places = _Places(outer, shapes, specs, mesh, memory_kind)
    return jax.tree.map(places.of, jax.eval_shape(tx.init, outer.unflatten(shapes)), is_leaf=places.knows)


class _Places(NamedTuple):
    """The parameters' structure, and per leaf its shape and the spec of what follows it."""

    outer: Any
    shapes: list
    specs: list
    mesh: Any
    memory_kind: str | None

    def knows(self, node) -> bool:
        """Whether a node of the state is a tree like the parameters, or holds their shared noise."""
        return _stands_like(self.outer, node.mu if _is_shared(node) else node)

    def of(self, node):
        """The shardings of such a node, or of an array that is none."""
        if not self.knows(node):
            return NamedSharding(self.mesh, PartitionSpec())
        if not _is_shared(node):
            return self.outer.unflatten([self._like(x, i) for i, x in enumerate(self.outer.flatten_up_to(node))])
        there = self.outer.flatten_up_to(node.mu)
        present = [i for i, x in enumerate(there) if not isinstance(x, optax.MaskedNode)]
        v = tuple(None if x is None else self._like(x, i) for x, i in zip(node.nu.v, present, strict=True))
        return node._replace(count=NamedSharding(self.mesh, PartitionSpec()), mu=self.of(node.mu), nu=SharedNoise(v))

    def _like(self, x, i: int):
        """The sharding of one array that stands at the place of parameter i; of nothing, nothing."""
        if not hasattr(x, "shape"):
            return x
        if not _fits(x.shape, self.shapes[i].shape):
            return NamedSharding(self.mesh, PartitionSpec())
        spec = [entry if size > 1 else None for entry, size in zip(self.specs[i], x.shape, strict=True)]
        return NamedSharding(self.mesh, PartitionSpec(*spec), memory_kind=self.memory_kind)


def _is_shared(node) -> bool:
    return isinstance(node, ScaleBySnrState) and isinstance(node.nu, SharedNoise)


def _stands_like(outer, node) -> bool:
    """Whether `node` is a tree like the parameters: an array, or nothing, at the place of each of them."""
    try:
        found = outer.flatten_up_to(node)
    except (ValueError, TypeError):
        return False
    return all(jax.tree_util.all_leaves([x]) or not jax.tree.leaves(x) for x in found)


def _fits(shape, whole) -> bool:
    """Whether an array may lie like its parameter: of the same shape, or of size 1 where its axes are shared."""
    return len(shape) == len(whole) and all(a in (b, 1) for a, b in zip(shape, whole, strict=True))


def _names(entry: Any) -> tuple[str, ...]:
    """The mesh axes that one entry of a spec names."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _ways(axes, mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _spec(path: str, p, mesh) -> tuple:
    """The parameter's spec, one entry per axis."""
    sharding = getattr(p, "sharding", None)
    if sharding is None or isinstance(sharding, SingleDeviceSharding):
        return (None,) * len(p.shape)
    if not isinstance(sharding, NamedSharding) or dict(sharding.mesh.shape) != dict(mesh.shape):
        raise ValueError(
            f"parameter {path} has the sharding {sharding}, which is not on the mesh {dict(mesh.shape)}: put the "
            "parameters on the mesh first, with NamedSharding(mesh, ...)"
        )
    return (*sharding.spec, *(None,) * (len(p.shape) - len(sharding.spec)))


def _resolve(policy: str | Policy) -> Any:
    if isinstance(policy, str) and policy in _BY_NAME:
        return _BY_NAME[policy]
    if hasattr(policy, "spec"):
        return policy
    raise ValueError(f"policy={policy!r}: use one of {sorted(_BY_NAME)} or an object such as Zero1(axis='data')")


def _check_memory(mesh, kind: str | None) -> None:
    kinds = {memory.kind for device in mesh.local_devices for memory in device.addressable_memories()}
    if kind is not None and kind not in kinds:
        raise ValueError(
            f"memory_kind={kind!r}: the mesh's {mesh.devices.flat[0].platform} devices have {sorted(kinds)}. "
            "Leave it out to keep the state in the devices' own memory"
        )
