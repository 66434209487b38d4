"""How large should a batch be? Measure it while a small network learns to read handwritten digits.

    B_simple = tr(Sigma) / |G|^2        Sigma: how single examples' gradients differ,  G: their mean

The gradient of B examples is G plus noise, and in a batch of B_simple examples both are equally strong. Smaller batches
are mostly noise: twice the batch then needs nearly half the steps. Larger ones waste examples.

Adam's momentum m remembers the last ten gradients or so. What the next gradient g has in common with it cannot be
noise, for noise comes anew each time. So two numbers per step, |g|^2 and <m, g>, tell noise from signal. Beside them
stands the truth, from the gradients of all 1,437 training examples one by one; and the noise scale in Adam's own
geometry, where sums of sizes take the place of sums of squares (l1), from moving averages of g and g^2.

As the network learns, signal goes faster than noise, so larger batches pay. Late in training gradients turn round every
few steps: then less of them persists than the square of one shows, and the two scalars ask for more than the truth.

    python3 -m uv run examples/noise_scale.py                   a table, and the picture build/noise_scale.png
    python3 -m uv run examples/noise_scale.py --wrong 0.2       with a fifth of the labels wrong, noise stays
"""

import argparse
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
from snr_adam import noise_scale
from snr_adam.noise_scale import NoiseScale

BATCH, HELD_OUT, RATE = 32, 360, 0.001
B1, B2 = 0.9, 0.999  # Adam's usual decays
WINDOW = 1 - 1 / 80  # the two scalars are averaged over about 80 steps
BETA = 0.95  # for the averages of g and g^2: one decay for both, so that they are of the same time
LOOK = 50  # steps between two looks at all examples
BLUE, ORANGE, GREEN, GRAY = "#0072b2", "#d55e00", "#009e73", "#666666"  # told apart also by colour-blind eyes


class MLP(nnx.Module):
    """64 pixels -> 32 hidden units -> 10 digits."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden, self.out = nnx.Linear(64, 32, rngs=rngs), nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


class Look(NamedTuple):
    """What all training examples, and the moving averages of g and g^2, say after `step` steps."""

    step: int
    exact: float
    l1: NoiseScale
    l1_exact: float


class Run(NamedTuple):
    """The loss and the two-scalar noise scale of every step, and the looks."""

    loss: np.ndarray
    scalars: NoiseScale
    looks: list[Look]

    def at(self, step: int) -> NoiseScale:
        """The two-scalar noise scale after `step` steps."""
        value, error, limit, method = self.scalars
        return NoiseScale(value[step - 1], error[step - 1], limit[step - 1], method)


def load(wrong: float):
    """Training images, and their labels, of which a share `wrong` is wrong."""
    rng = np.random.default_rng(0)
    x, y = load_digits(return_X_y=True)
    order = rng.permutation(len(x))[HELD_OUT:]
    x, y = x[order] / 16, y[order]
    y = np.where(rng.random(len(y)) < wrong, (y + rng.integers(1, 10, len(y))) % 10, y)
    return jnp.asarray(x, jnp.float32), jnp.asarray(y)


def inner(a, b):
    """<a, b> over all leaves."""
    return sum(jnp.sum(x * y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def averaged(scalars: np.ndarray):
    """Moving averages of a sequence of numbers, and their standard errors. At the first step there is no momentum."""
    mean, square, out = 0.0, 0.0, []
    for t, x in enumerate(scalars):
        gain = (1 - WINDOW) / (1 - WINDOW ** max(t, 1)) if t else 0.0
        mean, square = mean + gain * (x - mean), square + gain * (x * x - square)
        share = snr_adam.EMA(WINDOW).floor(max(t, 1))  # of the variance of one, if they are independent
        out.append((mean, np.sqrt(max(square - mean**2, 0) * share / (1 - share)) if t > 1 else np.inf))
    return np.transpose(out)


def all_examples(loss_of, params, x, y):
    """The means of g and g^2 over the examples, from the gradient of each one by itself."""
    squares = optax.microbatching.micro_grad(
        loss_of,
        batch_argnums=(1, 2),
        accumulator=optax.microbatching.AccumulationType.MEAN,
        transform_fn=lambda g: (g, jax.tree.map(jnp.square, g)),
    )
    return squares(params, x, y)[0]


def train(wrong: float, steps: int, seed: int = 0) -> Run:
    """Trains the MLP with Adam and measures while it learns."""
    x, y = load(wrong)
    graph, params = nnx.split(MLP(nnx.Rngs(seed)))
    tx, watch = snr_adam.adam(RATE, B1, B2), snr_adam.scale_by_snr(snr_adam.EMA(BETA), snr_adam.RMS(BETA))

    def loss_of(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(nnx.merge(graph, params)(x), y).mean()

    def step(carry, batch):
        params, state, watched = carry
        loss, grads = jax.value_and_grad(loss_of)(params, x[batch], y[batch])
        momentum = optax.tree.bias_correction(state[0].mu, B1, jnp.maximum(state[0].count, 1))
        seen = loss, inner(grads, grads), inner(momentum, grads)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state, watch.update(grads, watched)[1]), seen

    scan = jax.jit(lambda carry, batches: jax.lax.scan(step, carry, batches))
    exactly = jax.jit(lambda params: all_examples(loss_of, params, x, y))
    batches = np.random.default_rng(seed + 1).integers(0, len(y), (steps // LOOK, LOOK, BATCH))
    carry, records, looks = (params, tx.init(params), watch.init(params)), [], []
    for batch in tqdm(batches, desc="training", unit=" looks", disable=None):  # silent unless on a terminal
        carry, record = scan(carry, batch)
        records.append(record)
        params, _, watched = carry
        everything = *exactly(params), 0.0, 1  # no noise is left in the mean over all examples
        recent = [optax.tree.bias_correction(moment, BETA, watched.count) for moment in (watched.mu, watched.nu)]
        l1 = noise_scale.l1_from_moments(*recent, snr_adam.EMA(BETA).floor(int(watched.count)), BATCH)
        exact, l1_exact = noise_scale.from_moments(*everything), noise_scale.l1_from_moments(*everything)
        looks.append(Look(int(watched.count), exact.value, l1, l1_exact.value))
    loss, power, persistent = (np.concatenate(parts).astype(float) for parts in zip(*records, strict=True))
    scalars = noise_scale.from_scalars(averaged(power)[0], *averaged(persistent), batch_size=BATCH)
    return Run(loss, scalars, looks)


def table(run: Run) -> str:
    """About a dozen looks, closer together while the network learns fast. Noise scales are in examples."""
    lines = [
        f"{'':14}{'B_simple':>25}{'l1':>25}",
        f"{'step':>6}{'loss':>8}{'two scalars':>17}{'exact':>8}{'averages':>17}{'exact':>8}",
    ]
    last = len(run.looks)
    shown = {*range(1, 7), *range(8, last, 4), last}
    for number, look in enumerate(run.looks, 1):
        if number in shown:
            loss = run.loss[look.step - LOOK : look.step].mean()
            both = f"{run.at(look.step)!s:>17}{look.exact:8,.0f}{look.l1!s:>17}{look.l1_exact:8,.0f}"
            lines.append(f"{look.step:6}{loss:8.3f}{both}")
    return "\n".join(lines)


def closing(run: Run) -> str:
    """How far the two scalars are from the truth, while signal is plentiful and after."""
    off = [run.at(look.step).value / look.exact for look in run.looks]
    early, late = off[: 400 // LOOK], [x for x in off[400 // LOOK :] if np.isfinite(x)]
    text = f"Up to step 400 the two scalars read {min(early):.2f} to {max(early):.2f} times the exact noise scale"
    return f"{text}, then {np.median(late):.2f} times (median), where they see a signal." if late else f"{text}."


def draw(run: Run, out: Path) -> None:
    """The noise scale while the network learns, with its band of 2 standard errors, and the truth."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    steps = np.arange(1, len(run.loss) + 1)
    value, error, limit, _ = run.scalars
    found = np.isfinite(value)
    # What has a normal error is the signal, 1 / value; where there is none, all above the limit is possible.
    low = np.where(found, 1 / (1 / value + 2 * error / value**2), limit)
    high = np.where(found & (value > 2 * error), 1 / (1 / value - 2 * error / value**2), np.inf)
    top = 3 * max(value[found].max(), max(look.l1_exact for look in run.looks))
    axes.fill_between(steps, low, np.minimum(high, top), color=BLUE, alpha=0.2, lw=0)
    axes.plot(steps, np.where(found, value, np.nan), color=BLUE, label="from two scalars, with 2 standard errors")
    unseen = ~found & (steps > 2)
    if unseen.any():
        axes.plot(steps, np.where(unseen, limit, np.nan), color=BLUE, ls=":", label="no signal found: at least this")
    looks = [look.step for look in run.looks]
    axes.plot(looks, [look.exact for look in run.looks], "o", color=ORANGE, label="exact, from single examples")
    axes.plot(looks, [look.l1.value for look in run.looks], "--", color=GREEN, label="l1, from averages of g and g²")
    axes.plot(looks, [look.l1_exact for look in run.looks], "^", color=GREEN, label="l1, exact")
    axes.axhline(BATCH, color=GRAY, ls="-.", label=f"the batch used: {BATCH}")
    axes.set(yscale="log", ylim=(BATCH / 2, top), xlim=(0, len(steps)))
    axes.set(xlabel=f"updates (mini-batches of {BATCH} digits)", ylabel="noise scale (examples)")
    axes.set_title("The batch in which signal and noise are equal grows as the network learns", weight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)


def main(args=None) -> Run:
    """Trains, prints the table and the advice, draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--wrong", type=float, default=0.0, help="the share of wrong labels")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("build", "noise_scale.png"), help="where the picture goes")
    options = parser.parse_args(args)
    if options.steps < LOOK:
        parser.error(f"needs at least {LOOK} steps")

    run = train(options.wrong, options.steps)
    draw(run, options.out)
    print(table(run))
    print(closing(run))
    print("\nAdvice from the last two-scalar measurement:")
    print(snr_adam.advise(run.at(len(run.loss)), BATCH, RATE, B1, B2))
    print(f"The picture is in {options.out.resolve()}")
    return run


if __name__ == "__main__":
    main()
