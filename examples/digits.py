"""Watch Adam tell signal from noise while a small network learns to read handwritten digits.

    w := w - learning_rate * signal / noise

The gradient of a mini-batch is the true gradient plus noise: each mini-batch is another handful of digits. Adam keeps
two moving averages of it: m of the gradient, in which the noise averages out and the *signal* stays, and v of its
square, whose root is the *noise*. Every weight moves by learning_rate times their ratio, the SNR.

Here one label in five is wrong. Nobody can predict which, so mini-batches never stop disagreeing: once the digits are
learned the signal is lost in a noise that even grows, for the more certain the network is, the harder the wrong labels
pull. The SNR then falls to a floor, and not to 0, because the average of finitely many noisy numbers is never quite 0.
With --clean all labels are right: then the noise falls too.

    python3 -m uv run examples/digits.py                          two tables, and the picture build/digits.png
    python3 -m uv run examples/digits.py --clean                  the same with right labels only
    python3 -m uv run examples/digits.py --out docs/digits.png    the picture in the README
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
from snr_adam.telemetry import plots

# Signal and noise both remember about 1 / (1 - BETA) = 20 updates. With the usual b2 = .999 the noise would remember
# 1,000: as long as gradients change, it would tell of a time that is over, and the SNR misleads.
BETA = 0.95
RATES = {"Adam": 0.002, "gradient descent": 0.1}  # learning rates with which the two learn equally fast
BATCH, HELD_OUT, WRONG = 32, 360, 0.2


class MLP(nnx.Module):
    """64 pixels -> 32 hidden units -> 10 digits."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden, self.out = nnx.Linear(64, 32, rngs=rngs), nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


class Run(NamedTuple):
    """The loss of each update, the accuracy on held-out digits and, if it was watched, a report per epoch."""

    loss: np.ndarray
    accuracy: float
    reports: list


def load(wrong: float):
    """Images, labels of which a share `wrong` is wrong, held-out images, and their right labels."""
    rng = np.random.default_rng(0)
    x, y = load_digits(return_X_y=True)
    order = rng.permutation(len(x))
    x, y = jnp.asarray(x[order] / 16, jnp.float32), y[order]
    given = np.where(rng.random(len(y)) < wrong, (y + rng.integers(1, 10, len(y))) % 10, y)
    return x[HELD_OUT:], jnp.asarray(given[HELD_OUT:]), x[:HELD_OUT], jnp.asarray(y[:HELD_OUT])


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
        return (optax.apply_updates(params, updates), opt_state), loss

    # Every mini-batch is drawn from all samples: then they are independent, as the formula of the floor assumes.
    batches = np.random.default_rng(1).integers(0, len(y), (epochs, len(y) // BATCH, BATCH))
    epoch = jax.jit(lambda carry, batches: jax.lax.scan(step, carry, batches))
    carry, losses, reports = (params, tx.init(params)), [], []
    for batch in tqdm(batches, desc=f"{name:16}", unit=" epochs", disable=None):  # silent unless on a terminal
        carry, loss = epoch(carry, batch)
        losses.append(np.asarray(loss, float))
        if name == "Adam":
            reports.append(snr_adam.report(carry[1], BATCH))
    right = nnx.merge(graph, carry[0])(x_held_out).argmax(axis=1) == y_held_out
    return Run(np.concatenate(losses), float(right.mean()), reports)


def draw(runs: dict[str, Run], epochs: int, wrong: float, out: Path) -> None:
    """Three panels: loss, signal and noise, SNR."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12)
    left, middle, right = figure.subplots(1, 3)
    n = len(runs["Adam"].loss) // epochs
    for (name, run), style in zip(
        runs.items(), ({"color": plots.BLUE}, {"color": plots.ORANGE, "ls": "--"}), strict=True
    ):
        mean, x = run.loss.reshape(epochs, n).mean(axis=1), n * (np.arange(epochs) + 0.5)
        left.plot(x, mean, label=f"{name}, learning rate {RATES[name]}", **style)
    if wrong:
        best = -(1 - wrong) * np.log(1 - wrong) - wrong * np.log(wrong / 9)
        left.axhline(
            best, color=plots.GRAY, ls=":", label=f"least possible without\nmemorising the {wrong:.0%} wrong labels"
        )
    left.set(ylabel="loss (nats per digit)", ylim=(0, 3))
    plots.signal_and_noise(runs["Adam"].reports, axes=middle)
    plots.snr(runs["Adam"].reports, axes=right)
    middle.set_ylim(0, 1.35 * middle.dataLim.ymax)
    right.set_ylim(0, 1)
    noise, signal, *_ = middle.get_lines()
    noise.set_label("gradient noise of a mini-batch")
    signal.set_label("gradient signal, as estimated")
    late = [report.total["pseudo_snr"] for report in runs["Adam"].reports[-max(epochs // 4, 1) :]]
    note = f"{np.mean(late):.2f} on average in the last quarter;\nsingle readings vary to both sides"
    right.text(1, 0.84, note, ha="right", va="top", transform=right.transAxes)
    first, second = ("equally fast", "The signal is lost in the noise") if wrong else ("", "Signal and noise fall")
    titles = f"1  Both learn {first}".rstrip(), f"2  {second}", "3  The SNR falls to its floor"
    for axes, title in zip((left, middle, right), titles, strict=True):
        axes.set(xlabel=f"updates (mini-batches of {BATCH} digits)", xlim=(0, n * epochs))
        axes.set_title(title, weight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper right", handlelength=1.6, borderaxespad=0)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)


def closing(run: Run) -> str:
    """What one sees, in numbers: all layers together, after the first epoch and after the last."""
    early, late = (run.reports[i].total for i in (0, -1))
    noises = early["gradient_noise"], late["gradient_noise"]
    # where no signal was found, only the upper end of the interval is known
    left = f"{late['snr']:.2f}" if late["snr_low"] > 0 else f"at most {late['snr_high']:.2f}"
    noise = "fell too" if noises[1] < 0.8 * noises[0] else "did not fall"
    return (
        f"The true gradient had {early['snr']:.2f} times the power of the noise, and has {left} in the end;\n"
        f"the noise {noise}: {noises[0]:.2f}, then {noises[1]:.2f}.\n"
        f"The optimizer's SNR fell from {early['pseudo_snr']:.2f} to {late['pseudo_snr']:.3f}; "
        f"pure noise would show {late['floor']:.3f}."
    )


def main(args=None) -> dict[str, Run]:
    """Trains, prints the tables, draws the picture."""
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
    watched = snr_adam.observe(snr_adam.adam(adam, b1=BETA, b2=BETA))
    runs = {name: train(name, tx, wrong, epochs) for name, tx in zip(RATES, (watched, optax.sgd(descent)), strict=True)}
    draw(runs, epochs, wrong, out)
    for epoch in sorted({1, epochs}):
        print(f"Epoch {epoch}\n{runs['Adam'].reports[epoch - 1]}\n")
    print(f"Held-out digits read: {', '.join(f'{name} {run.accuracy:.1%}' for name, run in runs.items())}.")
    print(closing(runs["Adam"]))
    print(f"The picture is in {out.resolve()}")
    return runs


if __name__ == "__main__":
    main()
