"""What each way to keep the moments costs in quality: 20 networks trained on digits with each, from the same starts.

    python benchmarks/quality.py        prints Markdown tables, writes benchmarks/results/quality.json

The network of `examples/digits.py` and its digits, all labels right. Seed by seed every optimizer starts from the same
weights and sees the same batches, so its held-out loss is compared with `optax.adamw`'s in pairs:

    d_s = loss_s - base_s,     mean(d) +- t(0.975, 19) std(d) / sqrt(20)        a 95 % confidence interval

The learning rate decays to 0, so that the last loss is not a matter of the last batch. `carried` has bfloat16 weights.
`shared` goes against advice: no noise of so small a network reaches the cutoff of `suggest_sharing`, so after a third
of the run a cutoff of 0.5 shares it nevertheless, over axes found in the state of the first seed. All seeds train at
once, under `vmap`: they have their stochastic rounding's bits in common, and not their gradients.

The second table is the small transformer's, made by `examples/char_lm.py --table`.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import RESULTS, machine
from flax import nnx
from readme import digits_quality_table, load, quality_table
from scipy.stats import t as student

import snr_adam

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import digits

BASE = "optax.adamw"
VARIANTS = (BASE, "float32", "bfloat16", "packed", "shared", "carried")
RATE, BATCH, SHARE_AFTER, CUTOFF = 4e-3, 32, 1 / 3, 0.5


def optimizer(variant: str, steps: int) -> optax.GradientTransformationExtraArgs:
    """The optimizer of that name."""
    rate = optax.cosine_decay_schedule(RATE, steps)
    if variant == BASE:
        return optax.adamw(rate, weight_decay=0.01)
    storage = {"carried": "packed", "shared": "float32"}.get(variant, variant)
    tx = snr_adam.adamw(rate, weight_decay=0.01, storage=storage)
    return snr_adam.carry_remainder(tx, "8") if variant == "carried" else tx


def loss_of(params, graph, x, y):
    """Mean cross-entropy, computed in float32 also for bfloat16 weights."""
    model = nnx.merge(graph, jax.tree.map(lambda p: p.astype(jnp.float32), params))
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@functools.partial(jax.jit, static_argnames=("graph", "tx"))
def train(carry, keys, steps, x, y, graph, tx):
    """One update per entry of `steps` for each of the seeds."""

    def one(carry, key):
        def step(carry, number):
            params, state = carry
            batch = jax.random.randint(jax.random.fold_in(key, number), (BATCH,), 0, len(y))
            grads = jax.grad(loss_of)(params, graph, x[batch], y[batch])
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, carry, steps)[0]

    return jax.vmap(one)(carry, keys)


def share(carry):
    """The carry with noise shared as the first seed's state suggests, and the suggestion."""
    first = jax.tree.map(lambda leaf: leaf[0], carry)
    suggestion = snr_adam.state.suggest_sharing(first[1], first[0], cutoff=CUTOFF)
    params, state = carry
    return (params, jax.vmap(lambda s, p: snr_adam.state.share(s, p, suggestion))(state, params)), suggestion


def run(variant: str, seeds: int, steps: int) -> dict:
    """The held-out loss of each seed, the bytes per parameter that it keeps, and what was shared."""
    x, y, *held_out = digits.load(0.0)
    starts = [nnx.split(digits.MLP(nnx.Rngs(seed))) for seed in range(seeds)]
    graph = starts[0][0]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(each for _, each in starts))
    if variant == "carried":
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    tx, keys = optimizer(variant, steps), jax.vmap(jax.random.key)(jnp.arange(seeds))
    carry, shared = (params, jax.vmap(tx.init)(params)), {}
    cut = int(steps * SHARE_AFTER) if variant == "shared" else 0
    if cut:
        carry = train(carry, keys, jnp.arange(cut), x, y, graph, tx)
        carry, suggestion = share(carry)
        shared = {row.path: {"axes": row.axes, "error": row.error} for row in suggestion.rows if row.axes}
    carry = train(carry, keys, jnp.arange(cut, steps), x, y, graph, tx)
    losses = jax.vmap(lambda params: loss_of(params, graph, *held_out))(carry[0])
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(carry)) / sum(p.size for p in jax.tree.leaves(carry[0]))
    return {"variant": variant, "bytes_per_parameter": kept, "losses": losses.tolist(), "shared": shared}


def compare(rows: list[dict]) -> None:
    """Adds to each row its mean loss, its paired difference to the first row, and half the interval's width."""
    base = np.array(rows[0]["losses"])
    for row in rows:
        losses = np.array(row["losses"])
        difference, n = losses - base, len(base)
        row["mean"], row["spread"] = float(losses.mean()), float(losses.std(ddof=1))
        row["difference"] = float(difference.mean())
        row["interval"] = float(student.ppf(0.975, n - 1) * difference.std(ddof=1) / n**0.5)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--json", type=Path, default=RESULTS / "quality.json")
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error("an interval needs at least 2 seeds")
    rows = [run(variant, options.seeds, options.steps) for variant in VARIANTS]
    compare(rows)
    results = {"machine": machine(), "steps": options.steps, "seeds": options.seeds, "rows": rows}
    options.json.parent.mkdir(exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    print(digits_quality_table(results), quality_table(load("char_lm")), sep="\n\n")


if __name__ == "__main__":
    main()
