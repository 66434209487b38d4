"""How large should a batch be? Measure it while a small network learns to read handwritten digits.

    B_simple = tr(Sigma) / |G|^2        Sigma: how single examples' gradients differ,  G: their mean

The gradient of B examples is G plus noise, and in a batch of B_simple examples both are equally strong. Smaller batches
are mostly noise: twice the batch then needs nearly half the steps. Larger ones waste examples.

Two gradients of the same weights have independent noise, so what they have in common is signal. Successive gradients
are nearly that: `snr_adam.observe` keeps their products, six at a time, and takes them back to lag 0. Momentum will not
do: it remembers ten gradients, and at ordinary learning rates they turn round within that time.

Beside it stands the truth, from the gradients of all 1,437 training examples one by one; and the noise scale in Adam's
own geometry, where sums of sizes take the place of sums of squares (l1), from moving averages of g and g^2.

As the network learns, signal goes faster than noise, so larger batches pay. The truth is of one moment, the estimate an
average over some 80 steps, which is behind while the noise scale grows. Where it finds no signal it says what the noise
scale is above, and the truth is.

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
from snr_adam.telemetry import Report, noise_scale
from snr_adam.telemetry.advice import over_run
from snr_adam.telemetry.noise_scale import NoiseScale

BATCH, HELD_OUT, RATE = 32, 360, 0.001
B1, B2 = 0.9, 0.999  # Adam's usual decays
BETA = 0.95  # for the averages of g and g^2: one decay for both, so that they are of the same time
LOOK = 25  # steps between two looks
BLUE, ORANGE, GREEN, GRAY = "#0072b2", "#d55e00", "#009e73", "#666666"  # told apart also by colour-blind eyes


class MLP(nnx.Module):
    """64 pixels -> 32 hidden units -> 10 digits."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden, self.out = nnx.Linear(64, 32, rngs=rngs), nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


class Look(NamedTuple):
    """The loss since the last look, what `observe` has seen, and the noise scales after `step` steps, in examples."""

    step: int
    loss: float
    report: Report
    lags: NoiseScale
    exact: float
    l1: NoiseScale
    l1_exact: float


def load(wrong: float):
    """Training images, and their labels, of which a share `wrong` is wrong."""
    rng = np.random.default_rng(0)
    x, y = load_digits(return_X_y=True)
    order = rng.permutation(len(x))[HELD_OUT:]
    x, y = x[order] / 16, y[order]
    y = np.where(rng.random(len(y)) < wrong, (y + rng.integers(1, 10, len(y))) % 10, y)
    return jnp.asarray(x, jnp.float32), jnp.asarray(y)


def all_examples(loss_of, params, x, y):
    """The means of g and g^2 over the examples, from the gradient of each one by itself."""
    squares = optax.microbatching.micro_grad(
        loss_of,
        batch_argnums=(1, 2),
        accumulator=optax.microbatching.AccumulationType.MEAN,
        transform_fn=lambda g: (g, jax.tree.map(jnp.square, g)),
    )
    return squares(params, x, y)[0]


def from_lags(report: Report) -> NoiseScale:
    """What `observe` has seen, all layers together."""
    value, error, low, high = (report.total[f"noise_scale{end}"] for end in ("", "_error", "_low", "_high"))
    return NoiseScale(value, error, low, high, "lags")


def train(wrong: float, steps: int, seed: int = 0) -> list[Look]:
    """Trains the MLP with Adam and measures while it learns."""
    x, y = load(wrong)
    graph, params = nnx.split(MLP(nnx.Rngs(seed)))
    tx = snr_adam.observe(snr_adam.adam(RATE, B1, B2))
    watch = snr_adam.scale_by_snr(snr_adam.parts.EMA(BETA), snr_adam.parts.RMS(BETA))  # only its moments are used

    def loss_of(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(nnx.merge(graph, params)(x), y).mean()

    def step(carry, batch):
        params, state, watched = carry
        loss, grads = jax.value_and_grad(loss_of)(params, x[batch], y[batch])
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state, watch.update(grads, watched)[1]), loss

    scan = jax.jit(lambda carry, batches: jax.lax.scan(step, carry, batches))
    exactly = jax.jit(lambda params: all_examples(loss_of, params, x, y))
    batches = np.random.default_rng(seed + 1).integers(0, len(y), (steps // LOOK, LOOK, BATCH))
    carry, looks = (params, tx.init(params), watch.init(params)), []
    for batch in tqdm(batches, desc="training", unit=" looks", disable=None):  # silent unless on a terminal
        carry, losses = scan(carry, batch)
        params, state, watched = carry
        count = int(watched.count)
        everything = *exactly(params), 0.0, 1  # no noise is left in the mean over all examples
        recent = [optax.tree.bias_correction(moment, BETA, watched.count) for moment in (watched.mu, watched.nu)]
        l1 = noise_scale.l1_from_moments(*recent, snr_adam.parts.EMA(BETA).floor(count), BATCH)
        exact, l1_exact = noise_scale.from_moments(*everything), noise_scale.l1_from_moments(*everything)
        seen = snr_adam.report(state, batch_size=BATCH)
        looks.append(Look(count, float(losses.mean()), seen, from_lags(seen), exact.value, l1, l1_exact.value))
    return looks


def table(looks: list[Look]) -> str:
    """About a dozen looks, closer together while the network learns fast. Noise scales are in examples."""
    lines = [
        f"{'':14}{'B_simple':>32}{'l1':>32}",
        f"{'step':>6}{'loss':>8}{'lags':>24}{'exact':>8}{'averages':>24}{'exact':>8}",
    ]
    for look in looks:
        if look.step % (50 if look.step <= 300 else 100) == 0 or look is looks[-1]:
            both = f"{look.lags!s:>24}{look.exact:8,.0f}{look.l1!s:>24}{look.l1_exact:8,.0f}"
            lines.append(f"{look.step:6}{look.loss:8.3f}{both}")
    return "\n".join(lines)


def closing(looks: list[Look]) -> str:
    """How often the truth was in the interval, and how far the estimate was from it."""
    inside = sum(look.lags.low <= look.exact <= look.lags.high for look in looks)
    found = [look.lags.value / look.exact for look in looks if np.isfinite(look.lags.value)]
    wrong = sum(look.lags.low > look.exact for look in looks if np.isinf(look.lags.value))
    text = f"The exact noise scale was in the interval of the lags in {inside} of {len(looks)} looks.\n"
    if found:
        middle = np.median(found)
        text += f"Where they found a signal, in {len(found)}, they read {middle:.2f} times the exact one (median).\n"
    bounds = len(looks) - len(found)
    if bounds:
        text += f"Where not, in {bounds}, the noise scale was above what they say in {bounds - wrong}.\n"
    return text.rstrip()


def draw(looks: list[Look], out: Path) -> None:
    """The noise scale while the network learns, with its interval of 95 %, and the truth."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    steps = np.array([look.step for look in looks])
    value, low, high = np.array([(look.lags.value, look.lags.low, look.lags.high) for look in looks]).T
    found = np.isfinite(value)
    top = 3 * max(look.l1_exact for look in looks)
    axes.plot(steps, np.where(found, value, np.nan), color=BLUE, label="from lags of gradients, over some 80 steps")
    axes.fill_between(steps, low, np.minimum(high, top), color=BLUE, alpha=0.2, lw=0, label="its 95 % interval")
    if not found.all():
        axes.plot(steps, np.where(found, np.nan, low), color=BLUE, ls=":", label="no signal found: at least this")
    axes.plot(steps, [look.exact for look in looks], "o", color=ORANGE, label="exact, from single examples")
    axes.plot(steps, [look.l1.value for look in looks], "--", color=GREEN, label="l1, from averages of g and g²")
    axes.plot(steps, [look.l1_exact for look in looks], "^", color=GREEN, label="l1, exact")
    axes.axhline(BATCH, color=GRAY, ls="-.", label=f"the batch used: {BATCH}")
    axes.set(yscale="log", ylim=(BATCH / 2, top), xlim=(0, steps[-1] * 1.01))
    axes.set(xlabel=f"updates (mini-batches of {BATCH} digits)", ylabel="noise scale (examples)")
    axes.set_title("The batch in which signal and noise are equal grows as the network learns", weight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)


def main(args=None) -> list[Look]:
    """Trains, prints the table and the advice, draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--wrong", type=float, default=0.0, help="the share of wrong labels")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("build", "noise_scale.png"), help="where the picture goes")
    options = parser.parse_args(args)
    if options.steps < LOOK:
        parser.error(f"needs at least {LOOK} steps")

    looks = train(options.wrong, options.steps)
    draw(looks, options.out)
    print(table(looks))
    print(closing(looks))
    print("\nAdvice, from the noise scale of the whole run:")
    whole = over_run(snr_adam.History(look.report for look in looks), BATCH)
    last = looks[-1].report.total
    persistence = last["persistence_low"], last["persistence_high"]
    print(snr_adam.telemetry.advise(whole, BATCH, RATE, B1, B2, persistence=persistence))
    print(f"The picture is in {options.out.resolve()}")
    return looks


if __name__ == "__main__":
    main()
