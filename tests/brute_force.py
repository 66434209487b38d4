"""The truth that telemetry's estimates are held against: gradients of every example of a data set, at every step.

A workload is trained by Adam with batches drawn independently. At every step the gradient of each example is computed,
so that the true gradient G and the trace of the noise's covariance are known, and averaged with the weights that the
estimate's looks have. `python tests/brute_force.py` prints the table of all workloads.
"""

import functools
import itertools
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import snr_adam
from snr_adam.telemetry import _averages as averages
from snr_adam.telemetry import _lags as lags

B1 = 0.9
LOOKS = (40, 80, 160, 320)
RATES, BATCHES = (3e-4, 1e-3, 3e-3, 1e-2), (16, 64, 256)


class Workload(NamedTuple):
    """init(key) -> parameters; loss(parameters, *example) -> loss of one example; data: arrays, an example per row."""

    init: Any
    loss: Any
    data: tuple
    rates: tuple = RATES


def _dense(key, *widths):
    keys = jax.random.split(key, len(widths))
    pairs = zip(keys, itertools.pairwise(widths), strict=False)
    return [{"w": jax.random.normal(k, pair) * (2 / pair[0]) ** 0.5, "b": jnp.zeros(pair[1])} for k, pair in pairs]


def _mlp(layers, x):
    for layer in layers[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ layers[-1]["w"] + layers[-1]["b"]


def _cross_entropy(logits, label):
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


def _digits(wrong: float = 0.0, size: int = 600):
    data = load_digits()
    rng = np.random.default_rng(0)
    pick = rng.permutation(len(data.target))[:size]
    labels = data.target[pick]
    labels = np.where(rng.random(size) < wrong, rng.integers(0, 10, size), labels)
    return jnp.asarray(data.data[pick] / 16, jnp.float32), jnp.asarray(labels)


def mlp(wrong: float = 0.0) -> Workload:
    return Workload(lambda key: _dense(key, 64, 24, 10), lambda p, x, y: _cross_entropy(_mlp(p, x), y), _digits(wrong))


def logistic() -> Workload:
    return Workload(lambda key: _dense(key, 64, 10), lambda p, x, y: _cross_entropy(_mlp(p, x), y), _digits())


def convolutional() -> Workload:
    def init(key):
        keys = jax.random.split(key, 3)
        return {
            "a": jax.random.normal(keys[0], (3, 3, 1, 6)) * 0.5,
            "b": jax.random.normal(keys[1], (3, 3, 6, 8)) * 0.2,
            "head": _dense(keys[2], 32, 10),
        }

    def convolved(x, kernel):
        """Stride 2, as one product: XLA is slow at convolutions whose kernels differ from run to run."""
        n, x = x.shape[0], jnp.pad(x, ((0, 1), (0, 1), (0, 0)))
        patches = [x[i : i + n - 1 : 2, j : j + n - 1 : 2] for i, j in itertools.product(range(3), repeat=2)]
        return jnp.concatenate(patches, -1) @ kernel.reshape(-1, kernel.shape[-1])

    def loss(p, x, y):
        x = x.reshape(8, 8, 1)
        for kernel in (p["a"], p["b"]):
            x = jax.nn.relu(convolved(x, kernel))
        return _cross_entropy(_mlp(p["head"], x.reshape(-1)), y)

    return Workload(init, loss, _digits(0.1, 400))


def transformer(width: int = 16, context: int = 12, size: int = 384) -> Workload:
    """Two layers, one head, on the bytes of a text about itself."""
    text = np.frombuffer((__doc__ * 20).encode(), np.uint8)
    starts = np.random.default_rng(0).integers(0, len(text) - context - 1, size)
    rows = jnp.asarray(text[starts[:, None] + np.arange(context + 1)] % 128)

    def init(key):
        keys = iter(jax.random.split(key, 16))

        def matrix(n, m):
            return jax.random.normal(next(keys), (n, m)) / n**0.5

        block = [
            {"qkv": matrix(width, 3 * width), "out": matrix(width, width), "mlp": _dense(next(keys), width, 32, width)}
            for _ in range(2)
        ]
        return {"token": matrix(128, width), "place": matrix(context, width) * 0.1, "blocks": block}

    def normed(x):
        return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)

    def loss(p, row):
        x = p["token"][row[:-1]] + p["place"]
        for block in p["blocks"]:
            q, k, v = jnp.split(normed(x) @ block["qkv"], 3, -1)
            scores = jnp.where(jnp.tri(context, dtype=bool), q @ k.T / width**0.5, -1e9)
            x = x + jax.nn.softmax(scores) @ v @ block["out"]
            x = x + _mlp(block["mlp"], normed(x))
        return jnp.mean(_cross_entropy(normed(x) @ p["token"].T, row[1:]))

    return Workload(init, loss, (rows,))


def quadratic() -> Workload:
    """w'Hw / 2 with 100 curvatures from .1 to 10; an example's gradient has noise of unit variance."""
    curvature = jnp.asarray(np.geomspace(0.1, 10, 100), jnp.float32)
    noise = np.random.default_rng(0).normal(size=(512, 100))
    noise = jnp.asarray(noise - noise.mean(0), jnp.float32)

    def loss(p, x):
        return jnp.sum(curvature * p["w"] ** 2) / 2 + jnp.sum(p["w"] * x)

    return Workload(lambda key: {"w": jax.random.normal(key, (100,))}, loss, (noise,), (0.01, 0.03, 0.1, 0.2))


WORKLOADS = {
    "mlp": mlp,
    "mlp, wrong labels": lambda: mlp(0.2),
    "convolutional": convolutional,
    "transformer": transformer,
    "quadratic": quadratic,
    "logistic": logistic,
}


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
@functools.partial(jax.vmap, in_axes=(*[None] * 6, 0, 0))
def _run(init, loss, batch, steps, every, data, rate, key):
    """Power of signal and noise, <m^, G> before the step, at every step; and the states of the run after it."""
    tx = snr_adam.observe(snr_adam.adam(rate, B1), every)
    first, key = jax.random.split(key)
    params = init(first)
    each = jax.vmap(jax.grad(loss), (None, *[0] * len(data)))

    def step(carry, key):
        params, state = carry
        grads = each(params, *data)
        true = jax.tree.map(lambda g: jnp.mean(g, 0), grads)
        picked = jax.random.randint(key, (batch,), 0, data[0].shape[0])
        g = jax.tree.map(lambda g: jnp.mean(g[picked], 0), grads)
        m = optax.tree.bias_correction(state.inner[0].mu, B1, jnp.maximum(state.count, 1))
        updates, state = tx.update(g, state, params)
        signal, lasting = optax.tree.norm(true, squared=True), optax.tree.vdot(m, true)
        power = sum(jnp.sum(x * x) / x.shape[0] for x in jax.tree.leaves(grads))
        own = state._replace(sketches=None)
        return (optax.apply_updates(params, updates), state), (signal, (power - signal) / batch, lasting, own)

    return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(key, steps))[1]


def weights_of_looks(steps: int, every: int = 1) -> np.ndarray:
    """The weight of each step in the means over bursts, after so many steps."""
    starts = [t for t in range(0, steps, lags.BURST * every) if t + lags.BURST <= steps]
    weights = np.zeros(steps)
    for n, start in enumerate(starts, 1):
        gain = lags.weight_of_newest(n)
        weights *= 1 - gain
        weights[start : start + lags.BURST] = gain / lags.BURST
    return weights


def weights_of_means(steps: int) -> np.ndarray:
    """The weight of each step in the means over all looks but the first, after so many steps."""
    weights = np.zeros(steps)
    for n in range(1, steps):
        gain = averages.newest_weight(n)
        weights *= 1 - gain
        weights[n] = gain
    return weights


class Row(NamedTuple):
    """A look: the true SNR and persistence, and what the report says."""

    workload: str
    rate: float
    batch: int
    step: int
    snr: float
    persistence: float
    total: dict


def rows(name: str, rates=None, batches=BATCHES, looks=LOOKS, seeds=2, every: int = 1) -> list[Row]:
    """Looks at runs of a workload, of every rate, batch size and seed."""
    work, found = WORKLOADS[name](), []
    runs = list(itertools.product(rates or work.rates, range(seeds)))
    keys = jnp.stack([jax.random.fold_in(jax.random.key(0), seed) for _, seed in runs])
    for batch in batches:
        made = _run(work.init, work.loss, batch, max(looks), every, work.data, jnp.array([r for r, _ in runs]), keys)
        signal, noise, lasting, states = jax.device_get(made)
        for (i, (rate, _)), look in itertools.product(enumerate(runs), looks):
            w = weights_of_looks(look, every)
            state = jax.tree.map(lambda x, i=i, t=look: x[i, t - 1], states)
            total = snr_adam.report(state, batch_size=batch).total
            s, n, x = (each[i, :look] for each in (signal, noise, lasting))
            snr, means = (w @ s) / (w @ n), weights_of_means(look)
            persistence = (means @ x) / (means @ (s + n)) * (1 + snr) / snr
            found.append(Row(name, rate, batch, look, float(snr), float(persistence), total))
    return found


def covers(row: Row) -> bool:
    return row.total["snr_low"] <= row.snr <= row.total["snr_high"]


def covers_persistence(row: Row) -> bool:
    """Of rows whose persistence is known."""
    return row.total["persistence_low"] <= row.persistence <= row.total["persistence_high"]


def main(names) -> None:
    print(f"{'workload':18} {'rate':>7}  cover  ratio  found  false >=  lasting")
    every: list[Row] = []
    for name in names or WORKLOADS:
        found = rows(name)
        every += found
        for rate in sorted({row.rate for row in found}):
            some = [row for row in found if row.rate == rate]
            clear = [row.total["snr"] / row.snr for row in some if row.snr > 3 * row.total["snr_error"]]
            bound = [row for row in some if row.total["snr_low"] <= 0]
            false = [row.snr / row.total["snr_high"] for row in bound if row.snr > row.total["snr_high"]]
            print(
                f"{name:18} {rate:7.4f}  {np.mean([covers(r) for r in some]):5.2f}  "
                f"{np.median(clear) if clear else np.nan:5.2f}  {1 - len(bound) / len(some):5.2f}  "
                f"{len(false)} of {len(bound)}, at most {max(false, default=0):.2f}  "
                f"{np.nanmedian([r.total['persistence'] for r in some]):.2f}",
                flush=True,
            )
    bound = [row for row in every if row.total["snr_low"] <= 0]
    false = [row for row in bound if row.snr > row.total["snr_high"]]
    print(f"all: {np.mean([covers(row) for row in every]):.3f} covered, {len(false)} of {len(bound)} bounds false")


if __name__ == "__main__":
    main(sys.argv[1:])
