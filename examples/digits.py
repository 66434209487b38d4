"""Watch Adam tell signal from noise while a small network learns to read handwritten digits.

    w := w - learning_rate * signal / noise

The gradient of a mini-batch is the true gradient plus noise: each mini-batch is another handful of digits. Adam keeps
two moving averages of it: m of the gradient, in which the noise averages out and the *signal* stays, and v of its
square, whose root is the *noise*. Every weight moves by learning_rate times their ratio, the SNR.

Here one label in five is wrong. Nobody can predict which, so mini-batches never stop disagreeing: once the digits are
learned the signal is gone and the noise is still there. The SNR then falls to a floor, and not to 0, because the
average of finitely many noisy numbers is never quite 0. With --clean all labels are right: then the noise falls too.

    python3 -m uv run examples/digits.py                          a table, and the picture build/digits.png
    python3 -m uv run examples/digits.py --clean                  the same with right labels only
    python3 -m uv run examples/digits.py --out docs/digits.png    the picture in the README
"""

import argparse
import itertools
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

# Signal and noise both remember about 1 / (1 - BETA) = 20 updates. With the usual b2 = .999 the noise would remember
# 1,000: as long as gradients change, it would tell of a time that is over, and comparing it with the signal misleads.
BETA = 0.95
RATES = {"Adam": 0.002, "gradient descent": 0.1}  # learning rates, near the best for each
BATCH, HELD_OUT, WRONG = 32, 360, 0.2
BLUE, ORANGE, GREEN, GRAY = "#0072b2", "#d55e00", "#009e73", "#666666"  # told apart also by colour-blind eyes


class MLP(nnx.Module):
    """64 pixels -> 32 hidden units -> 10 digits."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden, self.out = nnx.Linear(64, 32, rngs=rngs), nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


class Run(NamedTuple):
    """The loss of each update, the accuracy on held-out digits and, if the optimizer was Adam, for each update and
    layer (and, last, for all layers together) the sum of m^2, the sum of v, and the mean of the squared step."""

    loss: np.ndarray
    accuracy: float
    layers: list[str]
    adam: tuple[np.ndarray, np.ndarray, np.ndarray] | None


class Measured(NamedTuple):
    """Averages over some updates, one number per layer. Less signal than `limit` cannot be told from none."""

    signal: np.ndarray
    limit: np.ndarray
    noise: np.ndarray
    snr: np.ndarray
    step: np.ndarray

    def signal_text(self, i: int) -> str:
        return f"{self.signal[i]:.3f}" if self.signal[i] > self.limit[i] else f"<{self.limit[i]:.3f}"


def load(wrong: float):
    """Images, labels of which a share `wrong` is wrong, held-out images, and their right labels."""
    rng = np.random.default_rng(0)
    x, y = load_digits(return_X_y=True)
    order = rng.permutation(len(x))
    x, y = jnp.asarray(x[order] / 16, jnp.float32), y[order]
    given = np.where(rng.random(len(y)) < wrong, (y + rng.integers(1, 10, len(y))) % 10, y)
    return x[HELD_OUT:], jnp.asarray(given[HELD_OUT:]), x[:HELD_OUT], jnp.asarray(y[:HELD_OUT])


def watch(opt_state, updates):
    """What `Run.adam` holds. The state of an optimizer is plain arrays: one may simply look at it."""
    if not hasattr(opt_state[0], "mu"):
        return None

    def sums(what, tree):
        each = jnp.stack([what(x).sum() for x in jax.tree.leaves(tree)])
        return jnp.append(each, each.sum())

    m, v = opt_state[0].mu, opt_state[0].nu
    return sums(jnp.square, m), sums(jnp.abs, v), sums(jnp.square, updates) / sums(jnp.ones_like, updates)


def train(name: str, tx: optax.GradientTransformation, wrong: float, epochs: int) -> Run:
    """Trains the MLP, from the same start and on the same mini-batches whatever the optimizer."""
    x, y, x_held_out, y_held_out = load(wrong)
    rngs = nnx.Rngs(jax.random.key(0, impl="rbg"))  # compiles a second faster than the default generator
    graph, params = nnx.split(MLP(rngs))  # the model as a pure function of its parameters

    def loss_of(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(nnx.merge(graph, params)(x), y).mean()

    def step(carry, batch):
        params, opt_state = carry
        loss, grads = jax.value_and_grad(loss_of)(params, x[batch], y[batch])
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), (loss, watch(opt_state, updates))

    # Every mini-batch is drawn from all samples: then they are independent, as the formula of the floor assumes.
    batches = np.random.default_rng(1).integers(0, len(y), (epochs, len(y) // BATCH, BATCH))
    epoch = jax.jit(lambda carry, batches: jax.lax.scan(step, carry, batches))
    carry, records = (params, tx.init(params)), []
    for batch in tqdm(batches, desc=f"{name:16}", unit=" epochs", disable=None):  # silent unless on a terminal
        carry, record = epoch(carry, batch)
        records.append(record)
    loss, adam = jax.tree.map(lambda *parts: np.concatenate(parts).astype(float), *records)
    right = nnx.merge(graph, carry[0])(x_held_out).argmax(axis=1) == y_held_out
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree.leaves_with_path(params)]
    return Run(loss, float(right.mean()), [name.removesuffix(".value") for name in names] + ["all"], adam)


def floor(t):
    """The SNR that pure noise shows at update t: sqrt((1-b)(1+b^t) / ((1+b)(1-b^t)))."""
    return np.sqrt(snr_adam.EMA(BETA).floor(t))


def measure(run: Run, first: int, last: int) -> Measured:
    """Signal and noise over the updates first+1 ... last.

    On average m^2 = signal^2 + floor^2 noise^2 and v = signal^2 + noise^2, two equations to solve for the two. The very
    first update is left out: one gradient alone tells nothing about noise. Sums are averaged before they are divided.
    """
    rows = np.arange(max(first, 1), last)
    t = rows[:, None] + 1.0
    m2, v, step2 = (x[rows] for x in run.adam)
    m2, v = m2 / (1 - BETA**t) ** 2, v / (1 - BETA**t)
    rho = floor(t) ** 2
    signal2, noise2 = (m2 - rho * v) / (1 - rho), (v - m2) / (1 - rho)
    # Neighbouring averages share most of their past: n of them tell as much as n (1-b^2) / (1+b^2) separate ones.
    separate = max(1.0, len(t) * (1 - BETA**2) / (1 + BETA**2))
    error = signal2.std(axis=0) / np.sqrt(separate)
    squares = signal2.mean(axis=0), 2 * error, noise2.mean(axis=0), m2.mean(axis=0) / v.mean(axis=0), step2.mean(axis=0)
    return Measured(*np.sqrt(np.maximum(squares, 0)))


def table(run: Run, epochs: int) -> str:
    """Signal, noise, SNR and effective step of each layer over the epochs 1, 2, 3-4, 5-8, ..."""
    n = len(run.loss) // epochs
    edges = [0, *(2**k for k in range(epochs.bit_length()) if 2**k < epochs), epochs]
    lines = [f"{'layer':14}{'epochs':>8}{'signal':>9}{'noise':>9}{'SNR':>8}{'effective step':>17}"]
    for i, layer in enumerate(run.layers):
        for start, stop in itertools.pairwise(edges):
            got = measure(run, start * n, stop * n)
            span = f"{start + 1}-{stop}" if stop > start + 1 else f"{stop}"
            numbers = f"{got.signal_text(i):>9}{got.noise[i]:9.3f}{got.snr[i]:8.3f}{got.step[i]:17.2e}"
            lines.append(f"{layer:14}{span:>8}{numbers}")
        lines.append("")
    return "\n".join(lines)


def draw(runs: dict[str, Run], epochs: int, wrong: float, out: Path) -> None:
    """Three panels: loss, signal and noise, SNR."""
    n = len(runs["Adam"].loss) // epochs
    x = n * (np.arange(epochs) + 0.5)
    # Each point is an average: of the first epoch alone, then of some epochs before and after.
    spans = [(e - min(e // 2, 6), min(epochs, e + 1 + min(e // 2, 6))) for e in range(epochs)]
    seen = Measured(*np.stack([measure(runs["Adam"], n * a, n * b) for a, b in spans], axis=-1)[:, -1])
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)

    for (name, run), style in zip(runs.items(), ({"color": BLUE}, {"color": ORANGE, "ls": "--"}), strict=True):
        left.plot(x, run.loss.reshape(epochs, n).mean(axis=1), label=f"{name}, learning rate {RATES[name]}", **style)
    if wrong:
        best = -(1 - wrong) * np.log(1 - wrong) - wrong * np.log(wrong / 9)
        left.axhline(best, color=GRAY, ls=":", label=f"least possible without\nmemorising the {wrong:.0%} wrong labels")
    left.set(title="1  Both learn", ylabel="loss (nats per digit)", ylim=(0, 3))

    middle.plot(x, seen.noise, "--", color=ORANGE, label="noise: how mini-batches differ")
    middle.plot(x, seen.signal, color=BLUE, label="signal: the true gradient")
    title = "2  The signal goes, the noise " + ("stays" if wrong else "falls too")
    middle.set(title=title, ylabel="gradient (nats per unit of weight)", ylim=(0, 1.35 * seen.noise.max()))

    t = np.arange(1, n * epochs + 1)
    right.plot(x, seen.snr, color=GREEN, label="signal / noise, as Adam sees it")
    right.plot(t, floor(t), "--", color=GRAY, label=f"floor: pure noise shows {floor(t[-1]):.2f}")
    right.fill_between(x, floor(x), seen.snr, color=GREEN, alpha=0.15, lw=0)
    right.set(title="3  The SNR falls to its floor", ylabel="SNR (a ratio: 1 is all signal)", ylim=(0, 1))

    for axes in (left, middle, right):
        axes.set(xlabel=f"updates (mini-batches of {BATCH} digits)", xlim=(0, len(t)))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper right", handlelength=1.6, borderaxespad=0)
        axes.title.set_weight("bold")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)


def closing(run: Run, epochs: int) -> str:
    """What one sees, in numbers: the first epoch against the last quarter of the run, all layers together."""
    n = len(run.loss)
    early, late = measure(run, 0, n // epochs), measure(run, n * 3 // 4, n)
    least = max(late.signal[-1], late.limit[-1])
    fold = f"{'at least ' if late.signal[-1] < least else ''}{early.signal[-1] / least:.0f}-fold"
    noise = "fell too" if late.noise[-1] < 0.8 * early.noise[-1] else "did not fall"
    return (
        f"The signal fell {fold}, from {early.signal_text(-1)} to {late.signal_text(-1)}; "
        f"the noise {noise}: {early.noise[-1]:.2f}, then {late.noise[-1]:.2f}.\n"
        f"The SNR fell from {early.snr[-1]:.2f} to {late.snr[-1]:.3f}; pure noise would show {floor(n):.3f}."
    )


def main(args=None) -> dict[str, Run]:
    """Trains, prints the table, draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clean", action="store_true", help="no wrong labels: the noise falls too")
    parser.add_argument("--epochs", type=int, default=48)
    parser.add_argument("--out", type=Path, help="where the picture goes (default: build/digits.png)")
    options = parser.parse_args(args)
    if options.epochs < 1:
        parser.error("needs at least 1 epoch")
    wrong, epochs = 0.0 if options.clean else WRONG, options.epochs
    out = options.out or Path("build", "digits-clean.png" if options.clean else "digits.png")

    adam, descent = RATES.values()
    optimizers = {"Adam": snr_adam.adam(adam, b1=BETA, b2=BETA), "gradient descent": optax.sgd(descent)}
    runs = {name: train(name, tx, wrong, epochs) for name, tx in optimizers.items()}
    draw(runs, epochs, wrong, out)
    print(table(runs["Adam"], epochs))
    print(f"Held-out digits read: {', '.join(f'{name} {run.accuracy:.1%}' for name, run in runs.items())}.")
    print(closing(runs["Adam"], epochs))
    print(f"The picture is in {out.resolve()}")
    return runs


if __name__ == "__main__":
    main()
