"""Inside of `jax.shard_map` an optimizer sees its device's shard alone; see `docs/how_to/order_of_wrappers.md`.

Elementwise steps are those of the whole. What needs all of an array, or all of them, is of the shard: the norm that a
guard clips by and its verdict, the norms of LAMB, the places that rounding hashes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import snr_adam
from snr_adam import adam, guard

SHARDS = 4
P, G = jnp.linspace(1.0, 2.0, 32), jnp.linspace(0.5, 3.0, 32)
OPTIMIZERS = {
    "adam": adam(0.1),
    "guard": guard(optax.sgd(1.0), clip_norm=1.0),
    "lamb": snr_adam.lamb(0.1),
    "packed": adam(0.1, b1=0.83, storage="packed"),
}


def steps(p, g):
    return {name: tx.update(g, tx.init(p), p)[0] for name, tx in OPTIMIZERS.items()}


@pytest.fixture(scope="module")
def found():
    """The updates of the whole, inside of shard_map, and of each shard by itself."""
    mesh = jax.make_mesh((SHARDS,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:SHARDS])
    mapped = jax.shard_map(steps, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"))
    parts = [jax.jit(steps)(*each) for each in zip(jnp.split(P, SHARDS), jnp.split(G, SHARDS), strict=True)]
    return jax.jit(steps)(P, G), jax.jit(mapped)(P, G), jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_shard_is_all_there_is(found, name):
    _, mapped, parts = found
    np.testing.assert_allclose(mapped[name], parts[name], rtol=1e-6)


def test_steps_of_elements_are_those_of_the_whole(found):
    whole, mapped, _ = found
    np.testing.assert_array_equal(mapped["adam"], whole["adam"])


@pytest.mark.parametrize("name", ["guard", "lamb"])
def test_norms_are_those_of_the_shard(found, name):
    whole, mapped, _ = found
    assert np.abs(mapped[name] / whole[name] - 1).max() > 0.1


def test_random_bits_repeat_from_shard_to_shard():
    """Rounding is as unbiased as ever, but shards do not round independently: equal values round alike."""
    tx = adam(0.1, b1=0.83, storage="packed")
    mesh = jax.make_mesh((SHARDS,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:SHARDS])

    def words(g):
        return tx.update(g, tx.init(g))[1][0].mu

    split = PartitionSpec("x")
    mapped = jax.jit(jax.shard_map(words, mesh=mesh, in_specs=split, out_specs=split))(jnp.full(64, 0.3))
    rows = np.asarray(mapped).reshape(SHARDS, -1)
    assert np.array_equal(rows, np.tile(rows[0], (SHARDS, 1)))
    assert len(np.unique(np.asarray(jax.jit(words)(jnp.full(64, 0.3))).reshape(SHARDS, -1), axis=0)) == SHARDS


def test_gradients_in_shard_map_and_the_step_outside_is_the_whole(found):
    """What the documentation says to do."""
    whole, _, _ = found
    mesh = jax.make_mesh((SHARDS,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:SHARDS])
    split = PartitionSpec("x")

    @jax.jit
    def run(p, g):
        tx = OPTIMIZERS["guard"]
        grads = jax.shard_map(lambda g: g * 1.0, mesh=mesh, in_specs=split, out_specs=split)(g)
        return tx.update(grads, tx.init(p), p)[0]

    np.testing.assert_allclose(run(P, G), whole["guard"], rtol=1e-6)
