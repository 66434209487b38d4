"""From gradient descent to Adam, one idea and one figure at a time, on real gradients.

The lesson that goes with the figures is `docs/tutorials/adam_by_hand.md`, a notebook that calls the functions of this
file. As a script it says what each figure shows, in numbers, and writes the figures to build/adam_by_hand/:

    python3 -m uv run examples/adam_by_hand.py
    python3 -m uv run examples/adam_by_hand.py descent_shakes snr      only these two

Each figure is a function. Figures and runs that several of them need are computed once.
"""

import argparse
import functools
import io
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import snr_adam

FOLDER = Path("build", "adam_by_hand")
BLUE, ORANGE, GREEN, GRAY = "#0072b2", "#d55e00", "#009e73", "#666666"  # told apart also by colour-blind eyes
BATCH, UPDATES = 32, 800
B1, B2, EPS = 0.9, 0.999, 1e-8  # Adam's defaults
RATE, DESCENT_RATE = 0.002, 0.1  # with these the two learn equally fast
FLOOR = ((1 - B1) / (1 + B1)) ** 0.5

# --- The task: 8 x 8 pixels -> 32 hidden units -> 10 digits, and one label in five is wrong -------------------------

rng = np.random.default_rng(0)
images, right_labels = load_digits(return_X_y=True)
wrong = rng.random(len(images)) < 0.2
labels = np.where(wrong, (right_labels + rng.integers(1, 10, len(images))) % 10, right_labels)
images = jnp.asarray(images / 16, jnp.float32)

layers = {
    "hidden": {"kernel": rng.normal(size=(64, 32)) / 8, "bias": np.zeros(32)},
    "out": {"kernel": rng.normal(size=(32, 10)) / 6, "bias": np.zeros(10)},
}
start, as_layers = ravel_pytree(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), layers))  # all weights, one vector
everyone = np.arange(len(images))
batches = rng.integers(0, len(images), (UPDATES, BATCH))  # which digits each update sees
times = np.arange(1, UPDATES + 1)
lit = np.asarray((images > 0).mean(axis=0))  # the share of the digits in which a pixel is lit


def loss(w, x, y):
    """How surprised the network is by the labels, in nats per digit; guessing blindly costs log 10 = 2.3."""
    layers = as_layers(w)
    hidden = jax.nn.relu(x @ layers["hidden"]["kernel"] + layers["hidden"]["bias"])
    scores = hidden @ layers["out"]["kernel"] + layers["out"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()


def gradient(w, batch, y):
    """The gradient of the loss over the digits with these numbers."""
    return jax.grad(loss)(w, images[batch], y[batch])


@jax.jit
def each_gradient(w, y):
    """The gradient of every single digit, a row each: their mean is the true gradient."""
    return jax.vmap(gradient, (None, 0, None))(w, everyone[:, None], y)


@jax.jit
def along(ws, batches, y):
    """The gradient of each mini-batch at its weights."""
    return jax.lax.map(lambda at: gradient(*at, y), (ws, batches))


# --- Two optimizers ------------------------------------------------------------------------------------------------


def adam_by_hand(m, v, t, g, rate, b1=B1, b2=B2, eps=EPS):
    """Update number t = 1, 2, ...: the step for every weight, and the two averages."""
    m = m + (1 - b1) * (g - m)
    v = v + (1 - b2) * (g * g - v)
    signal = m / (1 - b1**t)
    noise = (v / (1 - b2**t)) ** 0.5
    return -rate * signal / (noise + eps), m, v


def look_at(w, y, look):
    """The loss over all digits, where one looks; it takes longer than the update."""
    return jax.lax.cond(look, lambda: loss(w, images, y), lambda: jnp.nan)


@jax.jit
def descend(y, batches, looks, rate):
    """Plain descent: the weights before each update, and their loss where one looks."""

    def update(w, now):
        batch, look = now
        return w - rate * gradient(w, batch, y), (w, look_at(w, y, look))

    return jax.lax.scan(update, start, (batches, looks))[1]


@jax.jit
def adam(y, batches, looks, rate, b1, b2, eps, factor):
    """Adam by hand, with all gradients multiplied by `factor`: the same two."""

    def update(carry, now):
        (batch, look), (w, m, v, t) = now, carry
        step, m, v = adam_by_hand(m, v, t, factor * gradient(w, batch, y), rate, b1, b2, eps)
        return (w + step, m, v, t + 1.0), (w, look_at(w, y, look))

    zeros = jnp.zeros_like(start)
    return jax.lax.scan(update, (start, zeros, zeros, 1.0), (batches, looks))[1]


LOOKS = {"always": times > 0, "every tenth": times % 10 == 1, "the last 200": times > UPDATES - 200}
LOOKS["around 200"] = (times > 150) & (times <= 250)


def run(method, rate, looks="the last 200", y=labels, **settings):
    """800 updates: the weights before each, and the losses where one looks."""
    if method is adam:
        settings = {"b1": B1, "b2": B2, "eps": EPS, "factor": 1.0} | settings  # all given: it compiles once
    ws, losses = method(y, batches, LOOKS[looks], rate, **settings)
    return np.asarray(ws), np.asarray(losses)[LOOKS[looks]]


@functools.cache
def losses(method, rate, looks="the last 200", **settings):
    """The losses of a run."""
    return run(method, rate, looks, **settings)[1]


# --- What is measured ----------------------------------------------------------------------------------------------


def size(x):
    """The length of a vector, or of each row of a table."""
    return np.sqrt(np.square(x).sum(axis=-1))


def change(losses, updates=1):
    """By how much a loss changes within so many updates, on average."""
    return np.abs(losses[updates:] - losses[:-updates]).mean()


def moving_average(xs, b):
    """The raw moving average after each row of `xs`; it starts at 0."""
    m, ms = np.zeros_like(xs[0]), np.empty_like(xs)
    for t, x in enumerate(xs):
        m = m + (1 - b) * (x - m)
        ms[t] = m
    return ms


def corrected(xs, b):
    """The moving average without the bias of its start at 0."""
    return moving_average(xs, b) / (1 - b ** times[:, None])


def gradient_noise(w, y=labels):
    """The standard deviation of a mini-batch's gradient from the true one, for each weight."""
    return np.asarray(each_gradient(w, y)).std(axis=0) / BATCH**0.5


def floor(t):
    """The SNR that pure noise shows after t updates: 1 at the first one, then less and less."""
    return np.sqrt((1 - B1) * (1 + B1**t) / ((1 + B1) * (1 - B1**t)))


class Recording(NamedTuple):
    """Descent at a low rate: every gradient, the true one beside it, and the gradient noise at every 50th update."""

    gs: np.ndarray
    truth: np.ndarray
    looks: np.ndarray
    noise: np.ndarray


@functools.cache
def recording(rate=0.05, y="given"):
    """Everything before section 8 is made of this, with the labels as given or all of them right."""
    y = labels if y == "given" else right_labels
    ws = run(descend, rate, y=y)[0]
    looks = np.arange(0, UPDATES, 50)
    noise = np.stack([gradient_noise(w, y) for w in ws[looks]])
    all_of_them = np.broadcast_to(everyone, (UPDATES, len(everyone)))
    return Recording(np.asarray(along(ws, batches, y)), np.asarray(along(ws, all_of_them, y)), looks, noise)


@functools.cache
def averages():
    """Adam's two averages of the recorded gradients, corrected, and their ratio, the SNR."""
    gs = recording().gs
    m_hat, v_hat = corrected(gs, B1), corrected(gs * gs, B2)
    return m_hat, v_hat, m_hat / (np.sqrt(v_hat) + EPS)


@functools.cache
def clear_weight():
    """Of the weights with the strongest true gradients, the one that stands out from its noise."""
    seen = recording()
    strong = np.argsort(np.abs(seen.truth[0]))[-200:]
    return strong[np.argmax(np.abs(seen.truth[0, strong]) / seen.noise[0, strong])]


def moved():
    """Which weights have had a gradient at all: not those that read a pixel that is never lit."""
    return averages()[1][-1] > 0


def typical(snr):
    """The root mean square over these weights and 50 updates."""
    return np.sqrt(np.square(snr[:, moved()]).mean(axis=1).reshape(-1, 50).mean(axis=1))


FIFTIES = times.reshape(-1, 50).mean(axis=1)


# --- The figures ---------------------------------------------------------------------------------------------------


class Shown(NamedTuple):
    """A figure, what it shows in a sentence or two, and the numbers in them. Notebooks display it."""

    figure: Figure
    says: str
    numbers: dict

    def __repr__(self):
        return self.says

    def _repr_png_(self):
        buffer = io.BytesIO()
        self.figure.savefig(buffer, dpi=120)
        return buffer.getvalue()


def panels(*titles):
    """A figure with one panel for each title, side by side."""
    figure = Figure(figsize=(9, 3.9), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)
    axes = figure.subplots(1, len(titles), squeeze=False)[0]
    for panel, title in zip(axes, titles, strict=True):
        panel.set_title(title, weight="bold", size=10.5)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, *axes


def legends(figure, **places):
    """A legend on every panel that has lines."""
    for panel in figure.axes:
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8.5, edgecolor="none", framealpha=0.8)


def draws(number):
    """Makes a function that draws and returns (figure, sentences, numbers) into one that does it once."""

    def wrap(function):
        @functools.cache
        @functools.wraps(function)
        def draw():
            figure, says, numbers = function()
            legends(figure)
            return Shown(figure, f"Figure {number}. {says}", numbers)

        FIGURES[function.__name__] = draw
        return draw

    return wrap


FIGURES = {}


@draws(1)
def descent_shakes():
    """Gradients of mini-batches at the same weights; descent with them, at the best rate and at a fair one."""
    each = np.asarray(each_gradient(start, labels))
    truth, many = each.mean(axis=0), each[batches[:300]].mean(axis=1)
    i, j = np.argsort(np.abs(truth))[-2:]  # the two weights that the true gradient moves most
    shaking, fair = losses(descend, 0.5, "always")[:300], losses(descend, DESCENT_RATE, "always")[:300]
    whole = np.broadcast_to(everyone, (300, len(everyone)))
    smooth = np.asarray(descend(labels, whole, np.ones(300, bool), 0.5)[1])

    figure, left, right = panels("Mini-batches disagree about the direction", "Descent with them shakes")
    left.plot(many[:, i], many[:, j], ".", color=ORANGE, alpha=0.5, label="gradient of a mini-batch of 32 digits")
    left.plot(truth[i], truth[j], "*", color=BLUE, ms=13, label="true gradient: all 1,797 digits")
    left.set(xlabel=f"gradient of weight {i} (nats per unit)", ylabel=f"gradient of weight {j} (nats per unit)")
    left.set_ylim(1.6 * many[:, j].min(), None)
    left.axhline(0, color=GRAY, lw=0.5)
    left.axvline(0, color=GRAY, lw=0.5)
    right.plot(shaking, color=ORANGE, lw=1, label="mini-batches, rate 0.5: about the best")
    right.plot(fair, "--", color=GREEN, label=f"mini-batches, rate {DESCENT_RATE}: calmer, slower")
    right.plot(smooth, color=BLUE, label="true gradients, rate 0.5")
    right.set(xlabel="updates", ylabel="loss on all digits (nats per digit)", ylim=(0.9, 2.6))
    numbers = {"shaking": change(shaking[200:]), "fair": change(fair[200:]), "smooth": change(smooth[200:])}
    says = (
        f"With mini-batches the loss changes by {numbers['shaking']:.4f} an update at rate 0.5, by "
        f"{numbers['fair']:.4f} at rate {DESCENT_RATE}; with true gradients by {numbers['smooth']:.4f}, downwards."
    )
    return figure, says, numbers


@draws(2)
def signal_and_noise():
    """One weight's gradient over time; the noise of a mini-batch against its size."""
    seen, one = recording(), clear_weight()
    each = np.asarray(each_gradient(start, labels))
    draw = np.random.default_rng(1)
    sizes = 2 ** np.arange(2, 10)
    samples = [each[draw.integers(0, len(each), (100, n))].mean(axis=1) for n in sizes]
    measured = np.array([np.sqrt(np.square(size(sample - each.mean(axis=0))).mean()) for sample in samples])
    predicted = size(each.std(axis=0)) / np.sqrt(sizes)

    figure, left, right = panels(f"Weight {one} while the network learns", "Four times the samples, half the noise")
    left.plot(times, seen.gs[:, one], ".", color=ORANGE, ms=2.5, alpha=0.6, label="gradient g of a mini-batch")
    middle, spread = seen.truth[seen.looks, one], seen.noise[:, one]
    band = middle - spread, middle + spread
    left.fill_between(times[seen.looks], *band, color=ORANGE, alpha=0.25, lw=0, label="true gradient ± gradient noise")
    left.plot(times, seen.truth[:, one], color=BLUE, label="true gradient")
    left.set(xlabel="updates", ylabel="gradient (nats per unit of weight)")
    right.loglog(sizes, measured, "o", color=ORANGE, label="gradient noise, measured")
    right.loglog(sizes, predicted, "--", color=ORANGE, label="that of one digit / √samples")
    right.axhline(size(each.mean(axis=0)), color=BLUE, label="true gradient")
    right.set(xlabel="samples in a mini-batch", ylabel="length of the vector (nats per unit)")
    right.set_xticks(sizes, sizes, minor=False)
    right.set_yticks([0.2, 0.5, 1, 2], [0.2, 0.5, 1, 2], minor=False)
    right.minorticks_off()
    numbers = {"true": size(each.mean(axis=0)), "noise": predicted[3], "off": np.abs(measured / predicted - 1).max()}
    says = (
        f"At first the true gradient has a length of {numbers['true']:.2f}, the noise of a mini-batch of 32 one of "
        f"{numbers['noise']:.2f}. The noise falls as the root of the samples, within {numbers['off']:.0%}."
    )
    return figure, says, numbers


@draws(3)
def noise_grows():
    """How long true gradient and gradient noise are over time, and which digits make the noise."""
    seen, honest = recording(), recording(y="right")
    noise, without = size(seen.noise), size(honest.noise)
    ws = run(descend, 0.05)[0][seen.looks]
    power = [
        np.square(each - each.mean(axis=0)).sum(axis=1) for each in (np.asarray(each_gradient(w, labels)) for w in ws)
    ]
    share = np.array([x[wrong].sum() / x.sum() for x in power])
    lasting = size(seen.truth.reshape(-1, 50, len(start)).mean(axis=1))

    figure, left, right = panels(
        "The true gradient falls, the noise grows by half", "Wrong labels come to make the noise"
    )
    left.plot(times[seen.looks], noise, "o-", color=ORANGE, ms=3, label="gradient noise of a mini-batch")
    left.plot(times[seen.looks], without, "s--", color=GRAY, ms=3, label="the same if all labels are right")
    left.plot(FIFTIES, lasting, color=BLUE, label="true gradient, mean of 50 updates")
    left.set(xlabel="updates", ylabel="length of the vector (nats per unit)", ylim=(0, 1.4))
    right.plot(times[seen.looks], share, "o-", color=ORANGE, ms=3, label="their share of the noise's power")
    right.axhline(wrong.mean(), ls="--", color=GRAY, label="their share of the digits")
    right.set(xlabel="updates", ylabel="share of the digits with wrong labels", ylim=(0, 1))
    late = slice(-4, None)
    numbers = {
        "early": lasting[0],
        "late": lasting[late].mean(),
        "noise": (noise[0], noise[late].mean()),
        "right": (without[0], without[late].mean()),
        "share": (share[0], share[-1]),
    }
    says = (
        f"The true gradient falls from {lasting[0]:.2f} to {numbers['late']:.2f}. The noise does not fall: it grows "
        f"from {noise[0]:.2f} to {numbers['noise'][1]:.2f}, for the network becomes sure and the wrong labels contradict "
        f"it; their share of its power rises from {share[0]:.0%} to {share[-1]:.0%}. With right labels the noise falls, "
        f"from {without[0]:.2f} to {numbers['right'][1]:.2f}."
    )
    return figure, says, numbers


@draws(4)
def moving_averages():
    """Averages with three memories of one weight's gradient."""
    seen, one, shown = recording(), clear_weight(), slice(0, 400)
    figure, panel = panels(f"Averages of weight {one}'s gradient: a short memory shakes, a long one is late")
    panel.plot(times[shown], seen.gs[shown, one], ".", color=GRAY, ms=3, alpha=0.4, label="gradient g of a mini-batch")
    for b, color, style in ((0.5, ORANGE, ":"), (B1, GREEN, "-"), (0.99, BLUE, "--")):
        average = moving_average(seen.gs[shown, one], b)
        panel.plot(times[shown], average, style, color=color, label=f"average with b1 = {b}")
    panel.plot(times[shown], seen.truth[shown, one], color="black", lw=1, label="true gradient: what they should find")
    panel.set(xlabel="updates", ylabel="gradient (nats per unit of weight)")
    raw, average = (size(moving_average(seen.gs, b)[20:] - seen.truth[20:]).mean() for b in (0.0, B1))
    says = f"A raw gradient is {raw:.2f} away from the true one, its average with b1 = {B1} only {average:.2f}."
    return figure, says, {"raw": raw, "average": average}


@draws(5)
def bias_correction():
    """Both averages with and without the correction of their start at 0."""
    seen, one = recording(), clear_weight()
    m, v = moving_average(seen.gs, B1), moving_average(seen.gs**2, B2)
    m_hat, v_hat, _ = averages()
    wanted = np.sqrt(size(seen.noise) ** 2 + size(seen.truth[seen.looks]) ** 2)

    figure, left, right = panels(
        f"m of weight {one}, b1 = {B1}", f"√v of all weights, b2 = {B2}: late while noise grows"
    )
    left.plot(times[:50], m[:50, one], "--", color=ORANGE, label="m: starts at 0")
    left.plot(times[:50], m_hat[:50, one], color=BLUE, label="signal: m / (1 - b1^t)")
    left.plot(times[:50], seen.truth[:50, one], color="black", lw=1, label="true gradient")
    left.set(xlabel="updates", ylabel="gradient (nats per unit of weight)", ylim=(0, None))
    right.plot(times, np.sqrt(v.sum(axis=1)), "--", color=ORANGE, label="√v: starts at 0")
    right.plot(times, np.sqrt(v_hat.sum(axis=1)), color=BLUE, label="noise: √(v / (1 - b2^t))")
    right.plot(times[seen.looks], wanted, ".", color="black", label="√(true gradient² + gradient noise²)")
    right.set(xlabel="updates", ylabel="length of the vector (nats per unit)", ylim=(0, None))
    first = np.abs(m[0, one]) / np.sqrt(v[0, one])
    found = np.sqrt(v_hat.sum(axis=1))[seen.looks]
    shares = size(seen.truth[seen.looks]) ** 2 / wanted**2
    numbers = {"first": first, "off": np.abs(found / wanted - 1)[1:].max(), "shares": (shares[0], shares[-4:].mean())}
    says = (
        f"Without correction the first step would be {first:.2f} learning rates long; with it, 1. What v should find "
        f"is a raw second moment: {shares[0]:.0%} of it is true gradient at first, {numbers['shares'][1]:.0%} in the end. "
        f"Its memory of 1,000 updates comes up to {numbers['off']:.0%} short while the noise grows."
    )
    return figure, says, numbers


@draws(6)
def first_steps():
    """The SNR of every weight in the first updates."""
    _, v_hat, snr = averages()
    first = np.abs(snr[0][recording().gs[0] != 0])
    figure, left, right = panels(
        "SNR of every weight: at update 1 it is ±1", "Until 20 updates are seen, the floor is high"
    )
    bins = np.linspace(-1.05, 1.05, 43)
    for t, color, style in ((1, ORANGE, "-"), (2, GREEN, "--"), (20, BLUE, "-")):
        known = snr[t - 1][v_hat[t - 1] > 0]
        weights = np.full(len(known), 1 / len(known))
        left.hist(known, bins, weights=weights, histtype="step", color=color, ls=style, lw=1.6, label=f"update {t}")
    left.set(xlabel="SNR (a ratio)", ylabel="share of the weights")
    shown = times[:50]
    rms = [np.sqrt(np.square(snr[t - 1][v_hat[t - 1] > 0]).mean()) for t in shown]
    right.plot(shown, rms, "o-", color=GREEN, ms=3, label="SNR of a typical weight")
    right.plot(shown, floor(shown), "--", color=GRAY, label="floor: what pure noise shows")
    right.set(xlabel="updates", ylabel="SNR (a ratio)", ylim=(0, 1.1))
    numbers = {
        "least": first.min(),
        "most": first.max(),
        "second": rms[1],
        "floors": tuple(floor(np.array([1, 2, 20]))),
    }
    says = (
        f"At update 1 signal and noise are the same number, |g|: every SNR is ±1 (here from {first.min():.4f} to "
        f"{first.max():.4f}; the rest is eps). It is no evidence of signal, for the floor is {numbers['floors'][0]:.0f}, "
        f"too; it falls to {numbers['floors'][1]:.2f} at update 2 and {numbers['floors'][2]:.2f} at update 20."
    )
    return figure, says, numbers


@draws(7)
def snr_and_floor():
    """The SNR over time and of every weight, beside that of pure noise."""
    seen, (_, _, snr) = recording(), averages()
    rest = seen.gs - seen.truth
    rest_snr = corrected(rest, B1) / (np.sqrt(corrected(rest * rest, B2)) + EPS)
    whole, noise = typical(snr), typical(rest_snr)

    figure, left, right = panels("The SNR falls to its floor", "Of every weight: in the end as wide as pure noise")
    left.plot(FIFTIES[1:], whole[1:], color=GREEN, label="SNR of the gradients")
    left.plot(FIFTIES[1:], noise[1:], "o", color=ORANGE, ms=4, label="SNR of their noise alone")
    left.plot(times, floor(times), "--", color=GRAY, label=f"floor: √((1-b1)/(1+b1)) = {FLOOR:.2f}")
    left.set(xlabel="updates", ylabel="SNR (a ratio)", ylim=(0, 1))
    bins = np.linspace(-1.2, 1.2, 49)
    early, late = snr[50:150, moved()].ravel(), snr[-100:, moved()].ravel()
    right.hist(early, bins, density=True, histtype="step", color=BLUE, lw=1.8, label="updates 51-150")
    right.hist(late, bins, density=True, color=GREEN, alpha=0.35, label=f"the last 100 of {UPDATES}")
    normal = np.exp(-0.5 * (bins / FLOOR) ** 2) / (FLOOR * np.sqrt(2 * np.pi))
    right.plot(bins, normal, "--", color=GRAY, label="pure noise: as wide as the floor")
    right.set(xlabel="SNR (a ratio)", ylabel="share of the weights (per unit of SNR)", ylim=(0, 5))
    numbers = {"early": whole[1], "late": whole[-6:].mean(), "noise": noise[1:].mean(), "all": whole}
    says = (
        f"The SNR of a typical weight falls from {numbers['early']:.2f} to {numbers['late']:.2f}. Gradients without "
        f"their signal show {numbers['noise']:.2f}, and by the formula {FLOOR:.2f}: in the end one sees noise."
    )
    return figure, says, numbers


@draws(8)
def spike_at_zero():
    """Why so many weights have an SNR of 0: the pixels that they read."""
    snr = averages()[2][-100:]
    reads = np.concatenate([np.ones(32), np.repeat(lit, 32), np.ones(10 + 320)])  # weights as in `start`: biases first
    groups = {
        "pixel never lit": (reads == 0, ORANGE, "-"),
        "pixel lit in less than 10 % of the digits": (((reads > 0) & (reads < 0.1)), BLUE, "--"),
        "all other weights": (reads >= 0.1, GREEN, "-"),
    }
    figure, left, right = panels("The spike at 0: pixels that are rarely lit", "Share of the digits that light a pixel")
    bins, near, counts = np.linspace(-1.025, 1.025, 42), [], []
    for name, (which, color, style) in groups.items():
        x = snr[:, which].ravel()
        weights = np.full(len(x), 1 / len(x))
        label = f"{name}: {which.sum():,} weights"
        left.hist(x, bins, weights=weights, histtype="step", color=color, ls=style, lw=1.6, label=label)
        near.append((np.abs(x) < 0.025).mean())
        counts.append(int(which.sum()))
    left.set(xlabel="SNR in the last 100 updates (a ratio)", ylabel="share of the weights in the group", ylim=(0, 1.4))
    image = right.imshow(lit.reshape(8, 8), cmap="gray", vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(lit.reshape(8, 8)):
        if share < 0.1:
            text = "never" if share == 0 else f"{share:.1%}"
            right.text(column, row, text, ha="center", va="center", size=7, color="white")
    right.set(xticks=[], yticks=[])
    figure.colorbar(image, ax=right, label="share of the digits")
    numbers = {"near": near, "counts": counts}
    says = (
        f"{counts[0]} weights read pixels that are never lit: their gradient is 0 in every digit, and eps makes 0 / 0 a 0. "
        f"{counts[1]} read pixels that are lit in less than 10 % of the digits: m forgets such a gradient within tens of "
        f"updates, v remembers it for a thousand, and {near[1]:.0%} of their SNRs lie within 0.025 of 0 ({near[2]:.0%} of "
        f"all others)."
    )
    return figure, says, numbers


@draws(9)
def below_the_floor():
    """Adam's own runs: the SNR may end below its floor, for two reasons."""
    runs = {"right": right_labels, "given": labels}
    snr, turn, longer = {}, {}, {}
    for name, y in runs.items():
        ws = run(adam, RATE, y=y)[0]
        gs = np.asarray(along(ws, batches, y))
        m_hat, v_hat = corrected(gs, B1), corrected(gs * gs, B2)
        snr[name] = typical(m_hat / (np.sqrt(v_hat) + EPS))
        turn[name] = ((m_hat[:-1] * gs[1:]).sum(axis=1) / (gs[1:] ** 2).sum(axis=1))[-400:].mean()
        looks = np.arange(0, UPDATES, 50)
        wanted = np.array([np.sqrt(np.square(each_gradient(w, y)).mean(axis=0).sum() / BATCH) for w in ws[looks]])
        longer[name] = np.sqrt(v_hat.sum(axis=1))[looks], wanted
    predicted = np.sqrt(FLOOR**2 + 2 * B1 / (1 + B1) * turn["given"])

    figure, left, right = panels("Right labels: v remembers a noise that is gone", "Then the SNR ends below its floor")
    left.plot(times[looks], longer["right"][0], color=BLUE, label="noise as Adam knows it: √v, b2 = 0.999")
    left.plot(times[looks], longer["right"][1], ".-", color="black", lw=0.8, label="√(mean g²) at this moment")
    left.set(xlabel="updates", ylabel="length of the vector (nats per unit)", ylim=(0, 1))
    right.plot(FIFTIES, snr["given"], color=GREEN, label="one label in five is wrong")
    right.plot(FIFTIES, snr["right"], "s--", color=BLUE, ms=3, label="all labels are right")
    right.plot(times, floor(times), "--", color=GRAY, label=f"floor: pure noise, {FLOOR:.2f}")
    right.set(xlabel="updates", ylabel="SNR of a typical weight under Adam", ylim=(0, 0.8))
    ends = {name: x[-8:].mean() for name, x in snr.items()}
    factor = (longer["right"][0] / longer["right"][1])[-8:].mean()
    numbers = {"given": ends["given"], "right": ends["right"], "factor": factor, "turn": turn, "predicted": predicted}
    says = (
        f"With right labels the SNR ends at {ends['right']:.2f}, below the floor of {FLOOR:.2f}: the noise falls, and v "
        f"still shows {factor:.2f} times of it. With wrong labels it ends at {ends['given']:.2f}: successive gradients turn "
        f"round, because each step answers the one before (<m, g> is {turn['given']:.3f} of |g|², which makes the floor "
        f"{predicted:.2f})."
    )
    return figure, says, numbers


@draws(10)
def effective_step():
    """The steps of all weights, and over time."""
    gs, (_, _, snr) = recording().gs, averages()
    some = moved()
    typical_g = np.sqrt(np.square(gs).mean(axis=0))[some]
    typical_step = RATE * np.sqrt(np.square(snr).mean(axis=0))[some]
    figure, left, right = panels("One rate serves all weights", "The rate is constant, the steps shrink to a floor")
    left.loglog(
        typical_g, DESCENT_RATE * typical_g, ".", color=ORANGE, ms=3, label=f"plain descent, rate {DESCENT_RATE}"
    )
    left.loglog(typical_g, typical_step, ".", color=BLUE, ms=3, label=f"Adam, rate {RATE}")
    left.axhline(RATE * FLOOR, ls="--", color=GRAY, label="rate x floor: pure noise")
    left.set(xlabel="typical gradient of the weight (nats per unit)", ylabel="typical step (units of weight)")
    right.axhline(RATE, color="black", lw=1, label="rate")
    right.plot(FIFTIES[1:], RATE * typical(snr)[1:], color=BLUE, label="effective step: rate x SNR")
    right.plot(times, RATE * floor(times), "--", color=GRAY, label="rate x floor: pure noise")
    right.set(xlabel="updates", ylabel="typical step (units of weight)", ylim=(0, 1.5 * RATE))
    spans = [np.percentile(x, 95) / np.percentile(x, 5) for x in (typical_g, typical_step)]
    says = f"The gradients of different weights span a factor of {spans[0]:.0f}, Adam's steps one of {spans[1]:.1f}."
    return figure, says, {"gradients": spans[0], "steps": spans[1]}


@draws(11)
def random_walk():
    """How far the weights get in so many updates, early and late, beside a random walk."""
    ws, one = run(adam, RATE)[0][:, moved()], np.flatnonzero(moved()) == clear_weight()
    spans = np.array([1, 2, 5, 10, 20, 50, 100])

    def distances(ws):
        return np.array([np.sqrt(np.square(ws[k:] - ws[:-k]).mean()) for k in spans])

    early, late, walk = distances(ws[:150]), distances(ws[400:]), RATE * np.sqrt(spans)
    figure, left, right = panels("Early a march, late a random walk", f"The path of weight {clear_weight()} under Adam")
    left.loglog(spans, early, "o-", color=BLUE, label="updates 1-150")
    left.loglog(spans, late, "s-", color=ORANGE, label="updates 401-800")
    left.loglog(spans, walk, "--", color=GRAY, label="random walk: rate x √updates")
    left.set(xlabel="updates", ylabel="how far a typical weight gets")
    left.set_xticks(spans, spans, minor=False)
    left.minorticks_off()
    right.plot(times, ws[:, one], color=BLUE)
    right.set(xlabel="updates", ylabel="weight")
    numbers = {"early": early[-1] / walk[-1], "late": late[-1] / walk[-1], "step": late[0] / RATE}
    says = (
        f"In 100 updates a typical weight gets {numbers['early']:.1f} times as far as a random walk would early in "
        f"training, and {numbers['late']:.2f} times as far late. The late steps do not cease: they are "
        f"{numbers['step']:.2f} learning rates long, about the floor of {FLOOR:.2f}."
    )
    return figure, says, numbers


@draws(12)
def beta_is_a_time():
    """How much old gradients count, and the error of the average, by its memory."""
    seen = recording()
    memories = np.array([2, 5, 10, 20, 50, 100, 200, 500])
    phases = {
        "updates 1-100": (0, 100, ORANGE, "o-"),
        "101-300": (100, 300, GREEN, "s-"),
        "301-800": (300, 800, BLUE, "^-"),
    }
    averages = {T: corrected(seen.gs, 1 - 1 / T) for T in memories}
    figure, left, right = panels("How much an old gradient counts", "A longer memory estimates better, late")
    ages = np.logspace(0, 3.5, 200)
    for b, color, style in ((0.9, ORANGE, "-"), (0.99, GREEN, "--"), (0.999, BLUE, ":")):
        half = np.log(0.5) / np.log(b)
        left.semilogx(ages, b**ages, style, color=color, label=f"b = {b}: half-life {half:.3g} updates")
        left.plot(half, 0.5, "o", color=color)
    left.set(xlabel="age of the gradient (updates)", ylabel="its weight (share of the newest's)", ylim=(0, 1.5))
    best, at_ten = {}, {}
    for phase, (a, z, color, style) in phases.items():
        length = np.square(size(seen.truth[a:z])).mean()
        errors = [np.sqrt(np.square(size(x[a:z] - seen.truth[a:z])).mean() / length) for x in averages.values()]
        best[phase], at_ten[phase] = int(memories[np.argmin(errors)]), errors[2]
        right.semilogx(memories, errors, style, color=color, ms=4, label=f"{phase}: best near {best[phase]}")
    right.set(xlabel="memory 1 / (1 - b1) (updates)", ylabel="error (1: as long as the true gradient)", ylim=(0, None))
    right.set_xticks(memories, memories, minor=False)
    right.minorticks_off()
    says = (
        "Of a recording in which weights move slowly, the best memory for the true gradient is "
        + ", ".join(f"{T} in {phase}" for phase, T in best.items())
        + "."
    )
    return figure, says, {"best": best}


@draws(13)
def why_these_betas():
    """The loss by the memory of m where the weights move, and the error of the noise by the memory of v."""
    seen = recording()
    memories = np.array([1, 2, 5, 10, 20, 50, 100, 200])
    figure, left, right = panels("Signal: with b1 > 0.9 training is slower", "Noise: a long memory estimates it better")
    ends, shakes = {}, {}
    for rate, color, style in ((0.01, ORANGE, "o-"), (RATE, BLUE, "s--")):
        curves = [losses(adam, rate, "around 200", b1=1 - 1 / T) for T in memories]
        ends[rate], shakes[rate] = np.array([x.mean() for x in curves]), np.array([change(x) for x in curves])
        left.semilogx(memories, ends[rate], style, color=color, ms=4, label=f"learning rate {rate}")
    left.axvline(10, color=GRAY, lw=0.8, ls=":", label="b1 = 0.9")
    left.set(xlabel="memory of m, 1 / (1 - b1) (updates)", ylabel="loss after 200 updates (nats per digit)")
    wanted = np.sqrt(seen.noise**2 + seen.truth[seen.looks] ** 2)[4:]
    spans = np.array([1, 2, 5, 10, 20, 50, 100, 200, 500, 1000])
    found = [np.sqrt(corrected(seen.gs**2, 1 - 1 / T))[seen.looks[4:]] for T in spans]
    errors = np.array([np.sqrt(np.square(x - wanted).sum() / np.square(wanted).sum()) for x in found])
    right.semilogx(spans, errors, "o-", color=GREEN, ms=4, label="updates 201-800")
    right.axvline(1000, color=GRAY, lw=0.8, ls=":", label="b2 = 0.999")
    right.set(xlabel="memory of v, 1 / (1 - b2) (updates)", ylabel="error of √v (share of the noise)", ylim=(0, None))
    for panel, ticks in ((left, memories), (right, spans)):
        panel.set_xticks(ticks, ticks, minor=False)
        panel.tick_params("x", labelsize=8)
        panel.minorticks_off()
    fast, calm = ends[0.01], shakes[0.01]
    numbers = {"loss": (fast[0], fast[3], fast[6]), "shake": (calm[0], calm[3]), "noise": (errors[3], errors[-1])}
    says = (
        f"At rate 0.01 the loss after 200 updates is {fast[3]:.2f} with a memory of 10, {fast[6]:.2f} with 100: the "
        f"weights move on, and an old gradient belongs to weights that are left. A memory of 1 would do as well "
        f"({fast[0]:.2f}), but its loss changes by {calm[0]:.4f} an update, that of 10 by {calm[3]:.4f}. The noise changes "
        f"slowly: √v is {errors[3]:.0%} off with a memory of 10, {errors[-1]:.0%} with 1,000."
    )
    return figure, says, numbers


@jax.jit
def by_package(gs):
    """The steps of `snr_adam.adam` on the same gradients."""
    tx = snr_adam.adam(RATE)
    return jax.lax.scan(lambda state, g: tx.update(g, state)[::-1], tx.init(gs[0]), gs)[1]


def disagreement():
    """The largest difference between the steps by hand and those of the package, in learning rates."""
    gs, difference = recording().gs, 0.0
    m = v = np.zeros(len(start))
    for t, (g, expected) in enumerate(zip(gs, np.asarray(by_package(gs)), strict=True), start=1):
        step, m, v = adam_by_hand(m, v, t, g.astype(np.float64), RATE)
        difference = max(difference, np.abs(step - expected).max() / RATE)
    return difference


@draws(14)
def units():
    """Both optimizers when all gradients are multiplied by 32, or divided by it."""
    difference, allowed = disagreement(), 12 * 2.0**-23  # 2^-23 is the last bit of a 32-bit number near 1
    assert difference < allowed, f"{difference:.1e} of the learning rate apart"
    figure, left, right = panels(
        f"Plain descent, rate {DESCENT_RATE}: the unit counts", f"Adam, rate {RATE}: it cancels"
    )
    ends = {"descent": [], "adam": []}
    for factor, name, color, width in ((32, "x 32", ORANGE, 4), (1, "x 1", BLUE, 2), (1 / 32, "/ 32", "black", 0.8)):
        line = {"color": color, "lw": width, "label": f"gradients {name}"}
        plain = losses(descend, DESCENT_RATE * factor, "every tenth")
        ratio = losses(adam, RATE, "every tenth", factor=float(factor))
        left.plot(times[LOOKS["every tenth"]], plain, **line)
        right.plot(times[LOOKS["every tenth"]], ratio, **line)
        ends["descent"].append(plain[-1])
        ends["adam"].append(ratio[-1])
    for panel in (left, right):
        panel.set(xlabel="updates", ylabel="loss on all digits (nats per digit)", ylim=(0.8, 4))
    numbers = ends | {"difference": difference, "allowed": allowed}
    says = (
        f"Adam by hand and snr_adam.adam take the same steps: over {UPDATES} updates of {len(start):,} weights they differ "
        f"by at most {difference:.1e} learning rates; rounding may be {allowed:.1e}. With gradients x 32, x 1 and / 32 "
        f"plain descent ends at a loss of {', '.join(f'{x:.2f}' for x in ends['descent'])}, Adam at "
        f"{', '.join(f'{x:.2f}' for x in ends['adam'])}."
    )
    return figure, says, numbers


RATES = {
    "descent": np.array([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0]),
    "adam": np.array([2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1]),
}


@functools.cache
def swept():
    """The last 200 losses at every rate."""
    methods = {"descent": descend, "adam": adam}
    return {name: np.stack([losses(methods[name], float(rate)) for rate in rates]) for name, rates in RATES.items()}


@draws(15)
def sweep():
    """The loss that each optimizer ends with, at many learning rates."""
    figure, panel = panels("Each has its best rate; in other units of the loss, descent has another one")
    numbers = {}
    styles = {"descent": (ORANGE, "o-", "plain descent"), "adam": (BLUE, "s-", "Adam")}
    for name, (color, style, label) in styles.items():
        rates, ends = RATES[name], swept()[name][:, -100:].mean(axis=1)
        panel.semilogx(rates, ends, style, color=color, ms=4, label=label)
        if name == "descent":
            panel.semilogx(rates / 32, ends, "o--", color=ORANGE, ms=3, lw=0.8, label="plain descent, gradients x 32")
        good = rates[ends < 1.05 * ends.min()]
        numbers[name] = {"best": rates[ends.argmin()], "loss": ends.min(), "span": good[-1] / good[0], "ends": ends}
    panel.set(xlabel="learning rate", ylabel=f"loss after {UPDATES} updates (nats per digit)", ylim=(0.9, 2.6))
    plain, ratio = numbers["descent"], numbers["adam"]
    says = (
        f"Plain descent is best at a rate of {plain['best']:g} (loss {plain['loss']:.2f}), Adam at {ratio['best']:g} "
        f"({ratio['loss']:.2f}). Both valleys are wide: rates within a factor of {plain['span']:.0f} and "
        f"{ratio['span']:.0f} end within 5 % of the best."
    )
    return figure, says, numbers


@draws(16)
def adam_shakes_less():
    """How much the loss changes from update to update, at equal loss; and which half of Adam calms it."""
    figure, left, right = panels("At equal loss Adam shakes less", "Most of the calm is the average's, and short-lived")
    numbers = {}
    styles = {"descent": (ORANGE, "o-", "plain descent"), "adam": (BLUE, "s-", "Adam")}
    for name, (color, style, label) in styles.items():
        ends = [(x[-100:].mean(), change(x[-100:]), rate) for x, rate in zip(swept()[name], RATES[name], strict=True)]
        x, y, _ = zip(*[end for end in ends if end[2] < (1.0 if name == "descent" else 0.02)], strict=True)
        left.semilogy(x, y, style, color=color, ms=4, label=label)
    left.set(xlabel="loss on all digits (nats per digit)", ylabel="its change from one update to the next")
    # A large eps swallows the noise: what is left of Adam is the average. Without a memory, only the division is left.
    halves = {
        "plain descent": (ORANGE, "o-", losses(descend, DESCENT_RATE)),
        "division only": (GRAY, "v--", losses(adam, RATE, b1=0.0)),
        "average only": (GREEN, "^--", losses(adam, DESCENT_RATE * 1e3, eps=1e3)),
        "Adam": (BLUE, "s-", losses(adam, RATE)),
    }
    spans = np.array([1, 2, 5, 10, 20, 50])
    for name, (color, style, curve) in halves.items():
        right.loglog(spans, [change(curve, k) for k in spans], style, color=color, ms=4, label=name)
        numbers[name] = change(curve), change(curve, 20), curve.mean()
    right.set(xlabel="updates", ylabel="change of the loss within them")
    right.set_xticks(spans, spans, minor=False)
    right.minorticks_off()
    (fast, slow, high), (calm, calmer, low) = numbers["plain descent"], numbers["Adam"]
    numbers["times"] = fast / calm
    says = (
        f"At equal loss ({high:.2f} and {low:.2f}) plain descent changes the loss by {fast:.4f} an update, Adam by "
        f"{calm:.4f}, {fast / calm:.0f} times less. Division alone: {numbers['division only'][0]:.4f}; average alone: "
        f"{numbers['average only'][0]:.4f}. Within 20 updates it is {slow:.4f} against {calmer:.4f}: the average spreads "
        f"the push of a mini-batch over 10 updates, it does not undo it."
    )
    return figure, says, numbers


@draws(17)
def what_eps_does():
    """Steps by gradient for three eps; training with gradients that come near eps."""
    gs, (m_hat, v_hat, _) = recording().gs, averages()
    some = moved()
    typical_g = np.sqrt(np.square(gs).mean(axis=0))[some]
    figure, left, right = panels("eps above the gradient: descent again", "Gradients near eps = 1e-8: learning stops")
    for eps, color in ((1e-8, BLUE), (1e-3, GREEN), (1e-1, ORANGE)):
        steps = np.sqrt(np.square(m_hat / (np.sqrt(v_hat) + eps)).mean(axis=0))[some]
        left.loglog(typical_g, steps, ".", color=color, ms=3, label=f"eps = {eps:g}")
    left.set(xlabel="typical gradient of the weight (nats per unit)", ylabel="typical step (learning rates)")
    left.set_ylim(None, 10)
    factors = {1.0: (BLUE, "-"), 1e-5: (GREEN, "--"), 1e-6: (GRAY, "-."), 1e-7: (ORANGE, "-"), 1e-8: ("black", ":")}
    ends = {}
    for factor, (color, style) in factors.items():
        curve = losses(adam, RATE, "every tenth", factor=factor)
        name = f"gradients x {factor:g}: typically {factor * np.median(typical_g):.0e}"
        right.plot(times[LOOKS["every tenth"]], curve, style, color=color, label=name)
        ends[factor] = curve[-1]
    right.set(xlabel="updates", ylabel="loss on all digits (nats per digit)", ylim=(0.9, 3.6))
    numbers = {"ends": ends, "median": np.median(typical_g), "idle": int((~some).sum())}
    says = (
        f"eps makes 0 / 0 a 0, for {numbers['idle']} weights that never had a gradient. A typical gradient here is "
        f"{numbers['median']:.3f}, far above 1e-8. Multiplied by 1e-6, it is about eps, and the loss ends at "
        f"{ends[1e-6]:.2f} instead of {ends[1.0]:.2f}; by 1e-8, at {ends[1e-8]:.2f}: the steps are gone."
    )
    return figure, says, numbers


def one_layer_loss(w, x, y):
    """64 pixels -> 10 digits and nothing between: 650 weights."""
    return optax.softmax_cross_entropy_with_integer_labels(x @ w[:640].reshape(64, 10) + w[640:], y).mean()


@jax.jit
def long_run(rates, batches):
    """Adam by hand for as many updates as there are rates, 100 in a row of them; the loss after each row."""

    def update(carry, now):
        (rate, batch), (w, m, v, t) = now, carry
        g = jax.grad(one_layer_loss)(w, images[batch], jnp.asarray(labels)[batch])
        step, m, v = adam_by_hand(m, v, t, g, rate)
        return (w + step, m, v, t + 1.0), None

    def row(carry, now):
        carry, _ = jax.lax.scan(update, carry, now)
        return carry, one_layer_loss(carry[0], images, labels)

    zeros = jnp.zeros(650)
    return jax.lax.scan(row, (zeros, zeros, zeros, 1.0), (rates, batches))[1]


@draws(18)
def hundred_thousand():
    """100,000 updates of a network without a hidden layer, and 10,000 more with a falling rate."""
    rows, rate = 1000, 0.01
    rates = np.full((rows + 100, 100), rate, np.float32)
    rates[rows:] = np.linspace(rate, 0, 10_000).reshape(100, 100)
    chosen = np.random.default_rng(2).integers(0, len(images), (rows + 100, 100, BATCH))
    curve = np.asarray(long_run(rates, chosen))
    ends = {100 * n: curve[min(n - 1, int(0.9 * n)) : n].mean() for n in (1, 10, 100, 1000)}  # of the last tenth
    gains = -np.diff([*ends.values(), curve[-1]])

    figure, left, right = panels("The loss in 100,000 updates", "What each stage adds")
    left.semilogx(100 * np.arange(1, rows + 1), curve[:rows], color=BLUE, label=f"Adam, rate {rate}")
    left.axhline(curve[-1], color=ORANGE, ls="--", label="10,000 more, rate falling to 0")
    left.set(xlabel="updates", ylabel="loss on all digits (nats per digit)")
    names = ["to 1,000", "to 10,000", "to 100,000", "10,000 more,\nrate falling"]
    right.bar(names, gains, color=[BLUE] * 3 + [ORANGE])
    for place, gain in enumerate(gains):
        right.text(place, gain, f"{gain:.3f}", ha="center", va="bottom", size=9)
    right.set(ylabel="the loss falls by (nats per digit)")
    right.set_xticks(range(4), names, size=8.5)
    numbers = {"ends": ends, "gains": gains, "cooled": curve[-1]}
    says = (
        f"From update 100 to 1,000 the loss falls by {gains[0]:.3f}, from there to 10,000 by {gains[1]:.3f}, and in the "
        f"90,000 after that by {gains[2]:.3f}. Then the rate falls to 0: 10,000 updates gain {gains[3]:.3f}."
    )
    return figure, says, numbers


def note():
    """Every sentence of the introductory note: the number of the figure that shows it, and what it shows."""
    of = {name: draw().numbers for name, draw in FIGURES.items()}
    grows, walk, ratio, lasting = of["noise_grows"], of["random_walk"], of["snr_and_floor"], of["hundred_thousand"]
    shakes, betas, eps, unit = of["adam_shakes_less"], of["why_these_betas"], of["what_eps_does"], of["units"]
    first, second = of["bias_correction"]["shares"]
    rows = [
        ("Mini-batches make plain descent shake.", "descent_shakes",
         f"the loss changes by {of['descent_shakes']['shaking']:.4f} an update, by "
         f"{of['descent_shakes']['smooth']:.4f} with true gradients"),
        ("The update is a ratio, w := w - alpha SNR, with SNR = m_hat / (sqrt(v_hat) + eps).", "units",
         f"by hand and by `snr_adam.adam` within {unit['difference']:.1e} learning rates"),
        ("The signal is the moving average of the gradients ...", "moving_averages",
         f"{of['moving_averages']['average']:.2f} away from the true gradient, a raw gradient "
         f"{of['moving_averages']['raw']:.2f}"),
        ("... with its bias corrected.", "bias_correction",
         f"the first step is 1 learning rate long, not {of['bias_correction']['first']:.2f}"),
        ("The noise is the root of the moving average of the squared gradients ...", "bias_correction",
         f"at most {of['bias_correction']['off']:.0%} off the root of the mean square"),
        ("... a pseudo-noise, for it is a raw second moment.", "bias_correction",
         f"{first:.0%} of it is true gradient at first, {second:.0%} in the end; at update 1 SNR = ±1"),
        ("The SNR has no unit: one learning rate serves all weights.", "effective_step",
         f"gradients span a factor of {of['effective_step']['gradients']:.0f}, steps "
         f"{of['effective_step']['steps']:.1f}"),
        ("Adam shakes the model less than descent does.", "adam_shakes_less",
         f"{shakes['Adam'][0]:.4f} an update against {shakes['plain descent'][0]:.4f}, at equal loss"),
        ("While training goes on, the signal falls ...", "noise_grows",
         f"the true gradient falls from {grows['early']:.2f} to {grows['late']:.2f}"),
        ("... and the noise stays.", "noise_grows",
         f"half right: it grows from {grows['noise'][0]:.2f} to {grows['noise'][1]:.2f}, and with right labels it falls "
         f"to {grows['right'][1]:.2f}"),
        ("So the SNR falls ...", "snr_and_floor",
         f"from {ratio['early']:.2f} to {ratio['late']:.2f}; pure noise shows {FLOOR:.2f}"),
        ("... and the steps turn into a random walk.", "random_walk",
         f"from {walk['early']:.1f} to {walk['late']:.2f} times the distance of a random walk; half right: steps do not "
         f"cease, they stay {walk['step']:.2f} learning rates long"),
        ("eps keeps the division from failing.", "what_eps_does",
         f"{eps['idle']} weights would be 0 / 0; gradients of its size end at a loss of {eps['ends'][1e-6]:.2f}, not "
         f"{eps['ends'][1.0]:.2f}"),
        ("b1 = 0.9 and b2 = 0.999.", "why_these_betas",
         f"loss {betas['loss'][1]:.2f} with b1 = 0.9, {betas['loss'][2]:.2f} with 0.99; the noise {betas['noise'][1]:.0%} "
         f"off with b2 = 0.999, {betas['noise'][0]:.0%} with 0.9"),
        ("In 100,000 updates the later ones add little.", "hundred_thousand",
         f"the last 90,000 lower the loss by {lasting['gains'][2]:.3f}, the 9,000 before by {lasting['gains'][1]:.3f}"),
    ]  # fmt: skip
    numbers = {name: number for number, name in enumerate(FIGURES, start=1)}
    return [(sentence, numbers[name], shown) for sentence, name, shown in rows]


def main(args=None):
    """Draws the figures, says what they show, and, if they are all drawn, goes through the note."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("figures", nargs="*", metavar="figure", help=f"one of {', '.join(FIGURES)}; default: all")
    chosen = parser.parse_args(args).figures or list(FIGURES)
    if unknown := set(chosen) - set(FIGURES):
        parser.error(f"no figure {', '.join(sorted(unknown))}; there are {', '.join(FIGURES)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for number, (name, draw) in enumerate(FIGURES.items(), start=1):
        if name in chosen:
            shown, path = draw(), FOLDER / f"{number:02}-{name.replace('_', '-')}.png"
            path.write_bytes(shown._repr_png_())
            print(f"{shown.says}\n  {path}\n", flush=True)
    if len(set(chosen)) == len(FIGURES):
        print("The note, sentence by sentence:")
        for sentence, number, shown in note():
            print(f"- {sentence}\n    figure {number}: {shown}")


if __name__ == "__main__":
    main()
