"""A hundred thousand Adam updates: 128,000 samples, batches of 128, 100 epochs, on one small network.

The samples are scikit-learn's digits, each drawn again and again, a little shifted and a little noisy. They are made on
the device and shuffled there before each epoch. An epoch is one compiled scan over 1,000 updates that writes the new
weights and moments over the old ones (`donate_argnums`); Python comes back once per epoch, for the progress bar and to
read what `snr_adam.observe` has seen of the optimizer. The digits that measure the accuracy at the end are originals
from which no sample was made.

What one sees: the digits held out gain in the first few epochs, and nothing later. By then the SNR is at its floor,
which is what pure noise shows: the steps are a random walk. Later it is often far below. Nearly all samples are learned
by heart, and their gradients nearly 0; v still remembers the last large one, which m has forgotten.

    python3 -m uv run examples/hundred_thousand.py                    and the picture build/hundred_thousand.png
    python3 -m uv run examples/hundred_thousand.py --epochs 5         a twentieth of it
"""

import argparse
import functools
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from tqdm import tqdm

import snr_adam
from snr_adam.telemetry import plots

HELD_OUT, BATCH, WIDTH, LEARNING_RATE = 360, 128, 128, 1e-3
EVERY = 10  # of so many updates one is looked at


class MLP(nnx.Module):
    """64 pixels -> 128 -> 128 hidden units -> 10 digits."""

    def __init__(self, rngs: nnx.Rngs, width: int = WIDTH):
        self.first = nnx.Linear(64, width, rngs=rngs)
        self.second = nnx.Linear(width, width, rngs=rngs)
        self.out = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.second(nnx.relu(self.first(x)))))


class Result(NamedTuple):
    """The mean loss of each epoch and that of the held-out digits after it, their accuracy at the end, the number of
    updates, the seconds they took (nothing else is counted), and a report of the optimizer after each epoch."""

    losses: np.ndarray
    held_out: np.ndarray
    accuracy: float
    updates: int
    seconds: float
    reports: list


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


@functools.partial(jax.jit, static_argnums=0)
def loss_on(graph, params, images, labels):
    """The mean loss over these digits."""
    return optax.softmax_cross_entropy_with_integer_labels(nnx.merge(graph, params)(images), labels).mean()


def train(epochs: int, samples: int) -> Result:
    """Trains with Adam, one jitted scan per epoch."""
    digits, held_out = load()
    x, y = jax.jit(make_samples, static_argnums=3)(jax.random.key(0), *digits, samples)
    graph, params = nnx.split(MLP(nnx.Rngs(0)))  # the model as a pure function of its parameters
    tx = snr_adam.observe(snr_adam.adam(LEARNING_RATE), every=EVERY)
    carry, losses, losses_held_out, reports, seconds = (params, tx.init(params)), [], [], [], 0.0
    epoch = compile_epoch(graph, tx, carry, x, y)
    with tqdm(total=epochs * (samples // BATCH), unit=" updates", disable=None) as bar:  # silent unless on a terminal
        for number in range(epochs):
            start = time.perf_counter()
            carry, loss = epoch(carry, number)
            losses.append(float(loss))  # waits for the epoch to end
            seconds += time.perf_counter() - start
            losses_held_out.append(float(loss_on(graph, carry[0], *held_out)))
            reports.append(snr_adam.report(carry[1], BATCH))
            bar.update(samples // BATCH)
            bar.set_postfix(loss=f"{losses[-1]:.4f}")
    read = accuracy(graph, carry[0], *held_out)
    return Result(np.array(losses), np.array(losses_held_out), read, reports[-1].step, seconds, reports)


def draw(result: Result, out: Path) -> None:
    """Two panels: the loss of each epoch, and the SNR at the end of each with its floor."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    updates = np.array([report.step for report in result.reports])
    snr, floor = (np.array([report.total[key] for report in result.reports]) for key in ("pseudo_snr", "floor"))
    left.plot(updates, result.held_out, color=plots.ORANGE, label=f"{HELD_OUT} digits held out")
    left.plot(updates, result.losses, "--", color=plots.BLUE, label="the samples, mean of each epoch")
    left.set(ylabel="loss (nats per digit)", ylim=(result.losses.min() / 2, 3))
    right.plot(updates, snr, ".", color=plots.GREEN, label="SNR as the optimizer sees it, once an epoch")
    right.plot(updates, floor, "--", color=plots.GRAY, label=f"floor: pure noise shows {floor[-1]:.2f}")
    right.text(0.03, 0.04, "far below: v remembers large gradients\nthat m has forgotten", transform=right.transAxes)
    right.set(ylabel="SNR (a ratio)", ylim=(snr.min() / 6, 3))
    titles = "New digits gain early, then only the samples", "The SNR: around its floor, then far below"
    for axes, title in zip((left, right), titles, strict=True):
        axes.set_title(title, weight="bold", size=11)
        axes.set(xscale="log", yscale="log", xlabel=f"updates ({updates[0]:,} are an epoch)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)


def told(result: Result) -> str:
    """What the later updates added, in numbers."""
    held_out, tenth = result.held_out, max(len(result.held_out) // 10, 1)
    snr, floor = (np.array([report.total[key] for report in result.reports]) for key in ("pseudo_snr", "floor"))
    return (
        f"Loss on held-out digits: {held_out[0]:.3f} after the first epoch, {held_out[:tenth].min():.3f} at best in "
        f"the first tenth of the updates,\n{held_out[-tenth:].mean():.3f} on average in the last tenth.\n"
        f"SNR: at or below the floor of pure noise, {floor[-1]:.2f}, after {(snr <= floor).sum()} of {len(snr)} epochs."
    )


def main(args=None) -> Result:
    """Trains, says how fast and how well and how little the later updates add, and draws it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--samples", type=int, default=128_000)
    parser.add_argument(
        "--out", type=Path, default=Path("build", "hundred_thousand.png"), help="where the picture goes"
    )
    options = parser.parse_args(args)
    if options.epochs < 1 or options.samples < BATCH:
        parser.error(f"needs at least 1 epoch and {BATCH} samples")
    result = train(options.epochs, options.samples)
    rate = result.updates / result.seconds
    print(f"{result.updates:,} Adam updates in {result.seconds:.1f} s: {rate:,.0f} per second.")
    print(f"Loss per epoch: {result.losses[0]:.3f} in the first, {result.losses[-1]:.3f} in the last.")
    print(f"Held-out digits read: {result.accuracy:.1%}.")
    print(told(result))
    print(f"\n{result.reports[-1]}\n")
    draw(result, options.out)
    print(f"The picture is in {options.out.resolve()}")
    return result


if __name__ == "__main__":
    main()
