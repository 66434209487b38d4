"""A hundred thousand Adam updates: 128,000 samples, batches of 128, 100 epochs, on one small network.

The samples are scikit-learn's digits, each drawn again and again, a little shifted and a little noisy. They are made on
the device and shuffled there before each epoch. An epoch is one compiled scan over 1,000 updates that writes the new
weights and moments over the old ones (`donate_argnums`); Python comes back once per epoch, for the progress bar. The
digits that measure the accuracy at the end are originals from which no sample was made.

    python3 -m uv run examples/hundred_thousand.py
    python3 -m uv run examples/hundred_thousand.py --epochs 5         a twentieth of it
"""

import argparse
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from tqdm import tqdm

import snr_adam

HELD_OUT, BATCH, WIDTH, LEARNING_RATE = 360, 128, 128, 1e-3


class MLP(nnx.Module):
    """64 pixels -> 128 -> 128 hidden units -> 10 digits."""

    def __init__(self, rngs: nnx.Rngs, width: int = WIDTH):
        self.first = nnx.Linear(64, width, rngs=rngs)
        self.second = nnx.Linear(width, width, rngs=rngs)
        self.out = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.second(nnx.relu(self.first(x)))))


class Result(NamedTuple):
    """The mean loss of each epoch, the accuracy on held-out digits, the number of updates, and the seconds they took
    (compilation and the making of samples not included)."""

    losses: np.ndarray
    accuracy: float
    updates: int
    seconds: float


def load():
    """Digits to make samples from, and held-out ones: (images, labels) each, images of shape (n, 64) within 0 ... 1."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = jnp.asarray(x[order] / 16, jnp.float32), jnp.asarray(y[order])
    return (x[HELD_OUT:], y[HELD_OUT:]), (x[:HELD_OUT], y[:HELD_OUT])


def make_samples(key, images, labels, count: int):
    """`count` samples: a digit drawn at random, moved by up to one pixel each way, with some noise on every pixel."""
    which, where, noise = jax.random.split(key, 3)
    index = jax.random.randint(which, (count,), 0, len(labels))
    shifts = jax.random.randint(where, (count, 2), 0, 3)
    framed = jnp.pad(images.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)))
    moved = jax.vmap(lambda i, shift: jax.lax.dynamic_slice(framed[i], shift, (8, 8)))(index, shifts)
    return moved.reshape(count, 64) + 0.1 * jax.random.normal(noise, (count, 64)), labels[index]


def compile_epoch(graph, tx: optax.GradientTransformation, carry, x, y):
    """One epoch as a compiled function: (params, opt_state), its number -> (params, opt_state), mean loss."""
    samples = len(x)
    per_epoch = samples // BATCH

    def loss_of(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(nnx.merge(graph, params)(x), y).mean()

    def step(carry, batch):
        params, opt_state = carry
        loss, grads = jax.value_and_grad(loss_of)(params, *batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    def epoch(carry, number, x, y):
        order = jax.random.permutation(jax.random.fold_in(jax.random.key(1), number), samples)
        order = order[: per_epoch * BATCH].reshape(per_epoch, BATCH)
        carry, losses = jax.lax.scan(step, carry, (x[order], y[order]))
        return carry, losses.mean()

    compiled = jax.jit(epoch, donate_argnums=0).lower(carry, jnp.int32(0), x, y).compile()
    return lambda carry, number: compiled(carry, jnp.int32(number), x, y)


def accuracy(graph, params, images, labels) -> float:
    """The share of the digits that the model reads."""
    return float((nnx.merge(graph, params)(images).argmax(axis=1) == labels).mean())


def train(epochs: int, samples: int) -> Result:
    """Trains with Adam, one jitted scan per epoch."""
    digits, held_out = load()
    x, y = jax.jit(make_samples, static_argnums=3)(jax.random.key(0), *digits, samples)
    graph, params = nnx.split(MLP(nnx.Rngs(0)))  # the model as a pure function of its parameters
    tx = snr_adam.adam(LEARNING_RATE)
    carry, losses = (params, tx.init(params)), []
    epoch = compile_epoch(graph, tx, carry, x, y)
    start = time.perf_counter()
    with tqdm(total=epochs * (samples // BATCH), unit=" updates", disable=None) as bar:  # silent unless on a terminal
        for number in range(epochs):
            carry, loss = epoch(carry, number)
            losses.append(float(loss))  # waits for the epoch to end
            bar.update(samples // BATCH)
            bar.set_postfix(loss=f"{losses[-1]:.4f}")
    seconds = time.perf_counter() - start
    return Result(np.array(losses), accuracy(graph, carry[0], *held_out), int(carry[1][0].count), seconds)


def main(args=None) -> Result:
    """Trains and says how fast and how well."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--samples", type=int, default=128_000)
    options = parser.parse_args(args)
    if options.epochs < 1 or options.samples < BATCH:
        parser.error(f"needs at least 1 epoch and {BATCH} samples")
    result = train(options.epochs, options.samples)
    rate = result.updates / result.seconds
    print(f"{result.updates:,} Adam updates in {result.seconds:.1f} s: {rate:,.0f} per second.")
    print(f"Loss per epoch: {result.losses[0]:.3f} in the first, {result.losses[-1]:.3f} in the last.")
    print(f"Held-out digits read: {result.accuracy:.1%}.")
    return result


if __name__ == "__main__":
    main()
