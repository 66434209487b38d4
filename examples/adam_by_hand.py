"""From gradient descent to Adam, one idea at a time, on real gradients.

A notebook in the form of a script: editors that know `# %%` cells run it cell by cell, and so does Jupyter with the
jupytext extension. As a script it says what it finds and writes every figure to build/adam_by_hand/:

    python3 -m uv run examples/adam_by_hand.py
"""

# %% [markdown]
# # Adam by hand
#
# A network learns by *descent*: compute in which direction each weight should move (the gradient), move a little, and
# repeat. Adam is descent with two additions, an average and a division. Here you build both from real gradients, see
# why each is there, and check at the end that what you built is exactly `snr_adam.adam`.
#
# You need to know what a derivative is, and a little NumPy. Run the cells in order; it takes half a minute.

# %%
from pathlib import Path

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


def panels(*titles):
    """A figure with one panel for each title, side by side."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)
    axes = figure.subplots(1, len(titles), squeeze=False)[0]
    for panel, title in zip(axes, titles, strict=True):
        panel.set_title(title, weight="bold", size=11)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, *axes


def show(figure, name):
    """Puts a legend on every panel, writes the figure to a file, and shows it if this is a notebook."""
    for panel in figure.axes:
        panel.legend(fontsize=9, edgecolor="none", framealpha=0.8)
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.png"
    figure.savefig(path, dpi=120)
    print(f"   figure: {path}\n")
    if "get_ipython" in globals():
        display({"image/png": path.read_bytes()}, raw=True)  # noqa: F821  (every notebook has it)


# %% [markdown]
# ## The task
#
# 1,797 handwritten digits of 8 x 8 pixels, and a small network: 64 pixels -> 32 hidden units -> 10 digits. All its
# 2,410 weights are one long vector `w`. One label in five is wrong, on purpose: real data disagree with themselves.

# %%
rng = np.random.default_rng(0)
images, labels = load_digits(return_X_y=True)
wrong = rng.random(len(labels)) < 0.2
labels = np.where(wrong, (labels + rng.integers(1, 10, len(labels))) % 10, labels)
images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)

layers = {
    "hidden": {"kernel": rng.normal(size=(64, 32)) / 8, "bias": np.zeros(32)},
    "out": {"kernel": rng.normal(size=(32, 10)) / 6, "bias": np.zeros(10)},
}
start, as_layers = ravel_pytree(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), layers))


def loss(w, x, y):
    """How surprised the network is by the labels, in nats per digit; guessing blindly costs log 10 = 2.3."""
    layers = as_layers(w)
    hidden = jax.nn.relu(x @ layers["hidden"]["kernel"] + layers["hidden"]["bias"])
    scores = hidden @ layers["out"]["kernel"] + layers["out"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()


@jax.jit
def gradient(w, batch):
    """The gradient of the loss over the digits with these numbers."""
    return jax.grad(loss)(w, images[batch], labels[batch])


BATCH, UPDATES = 32, 1600
batches = rng.integers(0, len(labels), (UPDATES, BATCH))  # which digits each update sees


# %% [markdown]
# ## 1. Why plain descent shakes
#
# Plain gradient descent is one line, `w = w - rate * g`. The gradient over *all* digits is the true one, but a real
# data set is too large to read for every small step. So one takes a handful of samples, a *mini-batch*: cheap, and a
# little wrong, each time in another direction.
#
# Left: at one and the same `w`, the gradients of 300 mini-batches for two of the weights. Right: what that does to
# descent. With the true gradients the loss falls smoothly. With mini-batches it shakes; and the only cure that plain
# descent knows is a lower rate, which makes it slow.


# %%
@jax.jit
def descend(rate, batches):
    """Plain descent; the loss over all digits before each update."""

    def update(w, batch):
        return w - rate * gradient(w, batch), loss(w, images, labels)

    return jax.lax.scan(update, start, batches)[1]


everyone = np.arange(len(labels))
gradients = jax.jit(jax.vmap(gradient, (None, 0)))  # the same for many mini-batches
true, many = np.asarray(gradient(start, everyone)), np.asarray(gradients(start, batches[:300]))
i, j = np.argsort(np.abs(true))[-2:]  # the two weights that the true gradient moves most

figure, left, right = panels("The same weights, 300 mini-batches", "Descent with them")
left.plot(many[:, i], many[:, j], ".", color=ORANGE, alpha=0.5, label="gradient of a mini-batch of 32 digits")
left.plot(true[i], true[j], "*", color=BLUE, ms=13, label="true gradient: all 1,797 digits")
left.set(xlabel=f"gradient of weight {i} (nats per unit)", ylabel=f"gradient of weight {j} (nats per unit)")
left.axhline(0, color=GRAY, lw=0.5)
left.axvline(0, color=GRAY, lw=0.5)
fast = descend(0.5, batches[:300])
smooth = descend(0.5, np.broadcast_to(everyone, (300, len(labels))))
slow = descend(0.02, batches[:300])
right.plot(slow, "--", color=GRAY, label="mini-batches, rate 0.02: calm but slow")
right.plot(fast, color=ORANGE, lw=1, label="mini-batches, rate 0.5: shakes")
right.plot(smooth, color=BLUE, label="true gradients, rate 0.5")
right.set(xlabel="updates", ylabel="loss on all digits (nats per digit)", ylim=(0.9, 2.6))
print("1  Why plain descent shakes: mini-batches disagree about the direction.")
show(figure, "1-descent-shakes")

# %% [markdown]
# ## 2. Signal and noise
#
# So the gradient of a mini-batch has two parts:
#
#     g = signal + noise
#
# The *signal* is the true gradient: the same for every mini-batch. The *noise* is how this mini-batch differs from it:
# zero on average. Now descend with a low rate and record at every update both the gradient `g` and, only because the
# data set is tiny, the true one. Everything that follows is made of this recording.
#
# Left: one weight's gradient while the network learns. The signal starts strong and fades; the noise stays, because
# nobody can predict the wrong labels. Right: four times the samples, half the noise. The signal does not care.


# %%
@jax.jit
def record(batches):
    """Plain descent at a low rate: the gradient of each mini-batch, the true gradient, and the weights."""

    def update(w, batch):
        g = gradient(w, batch)
        return w - 0.02 * g, (g, gradient(w, everyone), w)

    return jax.lax.scan(update, start, batches)[1]


@jax.jit
def spread(w):
    """The standard deviation of each weight's gradient over single digits."""
    return gradients(w, everyone[:, None]).std(axis=0)


def size(x):
    """The length of a vector, or of each row of a table."""
    return np.sqrt(np.square(x).sum(axis=-1))


gs, signals, ws = (np.asarray(x) for x in record(batches))
times = np.arange(1, UPDATES + 1)
looks = np.arange(0, UPDATES, 100)
noises = np.stack([spread(w) for w in ws[looks]]) / np.sqrt(BATCH)
strong = np.argsort(np.abs(true))[-200:]
one = strong[np.argmax(np.abs(true[strong]) / noises[0, strong])]  # of the strongest signals, the clearest

figure, left, right = panels(f"Weight {one} while the network learns", "More samples, less noise")
left.plot(times, gs[:, one], ".", color=ORANGE, ms=2.5, alpha=0.6, label="g of a mini-batch")
band = signals[looks, one] - noises[:, one], signals[looks, one] + noises[:, one]
left.fill_between(times[looks], *band, color=ORANGE, alpha=0.25, lw=0, label="signal ± noise")
left.plot(times, signals[:, one], color=BLUE, label="signal: the true gradient")
left.set(xlabel="updates", ylabel="gradient (nats per unit of weight)")
sizes = 2 ** np.arange(2, 10)
draws = [gradients(start, rng.integers(0, len(labels), (100, n))) for n in sizes]
measured = [np.sqrt(np.square(size(draw - true)).mean()) for draw in draws]
right.loglog(sizes, measured, "o", color=ORANGE, label="noise, measured")
right.loglog(
    sizes, size(np.asarray(spread(start))) / np.sqrt(sizes), "--", color=ORANGE, label="one digit's / √samples"
)
right.axhline(size(true), color=BLUE, label="signal")
right.set(xlabel="samples in a mini-batch", ylabel="length of the gradient's part (nats per unit)")
right.set_xticks(sizes, sizes, minor=False)
right.set_yticks([0.2, 0.5, 1, 2], [0.2, 0.5, 1, 2], minor=False)
right.minorticks_off()
early, late = size(signals[:50]).mean(), size(signals[-500:].mean(axis=0))
print(f"2  Signal and noise: the signal falls from {early:.2f} to {late:.2f};")
print(f"   the noise of a mini-batch goes from {size(noises[0]):.2f} to {size(noises[-1]):.2f}.")
show(figure, "2-signal-and-noise")

# %% [markdown]
# ## 3. Moving averages
#
# We cannot afford the true gradient, but noise averages out. Keep one more number per weight, `m`, and move it a little
# towards each new gradient:
#
#     m = m + (1 - b1) * (g - m)
#
# This *exponential moving average* forgets the past slowly if `b1` is close to 1. It is a bargain: a short memory (0.5)
# still shakes, a long one (0.99) is calm but comes late. Adam's usual choice is 0.9. (All start at 0, which is wrong;
# the next section repairs that.)
#
# The same trick with the squares of the gradients tells how large they typically are, whatever their sign:
#
#     v = v + (1 - b2) * (g * g - v)


# %%
def moving_average(xs, b):
    """The raw moving average after each row of `xs`; it starts at 0."""
    m, ms = np.zeros_like(xs[0]), np.empty_like(xs)
    for t, x in enumerate(xs):
        m = m + (1 - b) * (x - m)
        ms[t] = m
    return ms


b1, b2 = 0.9, 0.999  # Adam's usual memories, for the signal and for the noise
figure, panel = panels(f"Moving averages of weight {one}'s gradient")
panel.plot(times[:400], gs[:400, one], ".", color=GRAY, ms=3, alpha=0.4, label="g of a mini-batch")
for b, color, style in ((0.5, ORANGE, ":"), (b1, GREEN, "-"), (0.99, BLUE, "--")):
    panel.plot(times[:400], moving_average(gs[:400, one], b), style, color=color, label=f"average with b1 = {b}")
panel.plot(times[:400], signals[:400, one], color="black", lw=1, label="signal: what they should find")
panel.set(xlabel="updates", ylabel="gradient (nats per unit of weight)")
error = [size(moving_average(gs, b)[20:] - signals[20:]).mean() for b in (0.0, b1)]
print(f"3  Moving averages: a raw gradient is {error[0]:.2f} away from the signal, its average {error[1]:.2f}.")
show(figure, "3-moving-averages")

# %% [markdown]
# ## 4. Bias correction
#
# Both averages start at 0, so at first they are too small. After `t` updates they have seen only the share `1 - b**t`
# of a full memory; divide by it and they are right from the first update on. For `v` this matters most: its memory is
# 1,000 updates long. Uncorrected, the first update would divide by a noise that is 32 times too small. (A memory of
# 1,000 updates also means that `v` comes late while the noise grows, as on the right; see section 7.)

# %%
m, v = moving_average(gs, b1), moving_average(gs * gs, b2)
m_hat, v_hat = m / (1 - b1 ** times[:, None]), v / (1 - b2 ** times[:, None])

figure, left, right = panels(f"Signal: m of weight {one}, b1 = {b1}", f"Noise: √v of all weights, b2 = {b2}")
left.plot(times[:50], m[:50, one], "--", color=ORANGE, label="m: starts at 0")
left.plot(times[:50], m_hat[:50, one], color=BLUE, label="m / (1 - b1^t)")
left.plot(times[:50], signals[:50, one], color="black", lw=1, label="signal")
left.set(xlabel="updates", ylabel="gradient (nats per unit of weight)", ylim=(0, None))
right.plot(times, np.sqrt(v.sum(axis=1)), "--", color=ORANGE, label="√v: starts at 0")
right.plot(times, np.sqrt(v_hat.sum(axis=1)), color=BLUE, label="√(v / (1 - b2^t))")
right.plot(
    times[looks],
    np.sqrt(size(noises) ** 2 + size(signals[looks]) ** 2),
    ".",
    color="black",
    label="√(signal² + noise²)",
)
right.set(xlabel="updates", ylabel="length of the vector (nats per unit)", ylim=(0, None))
short = (m[0] / np.maximum(np.sqrt(v[0]), 1e-30))[one] / np.sign(gs[0, one])
print(f"4  Bias correction: without it the first step would be {short:.2f} learning rates long; with it, 1.")
show(figure, "4-bias-correction")

# %% [markdown]
# ## 5. The signal-to-noise ratio
#
# Now divide:
#
#     SNR = m_hat / (sqrt(v_hat) + eps)
#
# `eps` is tiny and only prevents 0 / 0. The SNR has no unit. It is ±1 if all recent gradients agree, and near 0 if they
# cancel. But not quite 0: an average of *finitely* many noisy numbers is never exactly 0. A proof by experiment: take
# the signal out (`g - signal`) and average what is left. That is pure noise, and yet it shows an SNR of
# sqrt((1 - b1) / (1 + b1)) = 0.23. This is the **floor**. An SNR is evidence of signal only where it is above the
# floor.
#
# Left: early in training the SNR is twice the floor, in the end all of it is noise. (The noise alone is a bit above the
# floor while it grows, for `v` comes late.) Right: the same, weight by weight.

# %%
eps = 1e-8
snr = m_hat / (np.sqrt(v_hat) + eps)
rest = gs - signals
rest_m, rest_v = moving_average(rest, b1), moving_average(rest * rest, b2)
rest_snr = rest_m / (1 - b1 ** times[:, None]) / (np.sqrt(rest_v / (1 - b2 ** times[:, None])) + eps)
floor = np.sqrt((1 - b1) * (1 + b1**times) / ((1 + b1) * (1 - b1**times)))
alive = v_hat[-1] > 0  # some pixels are never inked: the weights that read them have no gradient at all


def typical(x):
    """The root mean square over all weights and 50 updates."""
    return np.sqrt(np.square(x[:, alive]).mean(axis=1).reshape(-1, 50).mean(axis=1))


figure, left, right = panels("SNR of a typical weight", "SNR of every weight")
middle = times.reshape(-1, 50).mean(axis=1)
left.plot(middle[1:], typical(snr)[1:], color=GREEN, label="SNR of the gradients")
left.plot(middle[1:], typical(rest_snr)[1:], "o", color=ORANGE, ms=4, label="SNR of their noise alone")
left.plot(times, floor, "--", color=GRAY, label=f"floor: √((1-b1)/(1+b1)) = {floor[-1]:.2f}")
left.set(xlabel="updates", ylabel="SNR (a ratio; 1 is all signal)", ylim=(0, 1))
bins = np.linspace(-1.2, 1.2, 49)
right.hist(snr[50:150, alive].ravel(), bins, density=True, histtype="step", color=BLUE, lw=1.8, label="updates 51-150")
right.hist(snr[-100:, alive].ravel(), bins, density=True, color=GREEN, alpha=0.35, label=f"the last 100 of {UPDATES:,}")
normal = np.exp(-0.5 * (bins / floor[-1]) ** 2) / (floor[-1] * np.sqrt(2 * np.pi))
right.plot(bins, normal, "--", color=GRAY, label="pure noise: as wide as the floor")
right.set(xlabel="SNR (a ratio)", ylabel="share of weights (per unit of SNR)", ylim=(0, 4))
print(f"5  SNR: {typical(snr)[1]:.2f} at first, {typical(snr)[-1]:.2f} at last; pure noise shows {floor[-1]:.2f}.")
show(figure, "5-snr")

# %% [markdown]
# ## 6. The effective step
#
# Adam moves each weight by its SNR, times a learning rate:
#
#     w = w - rate * SNR
#
# Left: plain descent moves a weight in proportion to its gradient, and gradients of different weights
# differ by factors of hundreds. Adam's step is about the same for all: the division took the gradient's unit away. This
# is why one rate serves all layers. Right: the rate is constant and yet the steps shrink, because the SNR does. They
# shrink to the floor and no further: to stop the last shaking you still have to lower the rate.

# %%
RATE = 0.002
figure, left, right = panels("Steps of each weight", "Steps over time, learning rate constant")
typical_g = np.sqrt(np.square(gs).mean(axis=0))[alive]
typical_step = RATE * np.sqrt(np.square(snr).mean(axis=0))[alive]
left.loglog(typical_g, 0.02 * typical_g, ".", color=ORANGE, ms=3, label="plain descent, rate 0.02")
left.loglog(typical_g, typical_step, ".", color=BLUE, ms=3, label=f"Adam, rate {RATE}")
left.axhline(RATE * floor[-1], ls="--", color=GRAY, label="rate x floor: pure noise")
left.set(xlabel="typical gradient of the weight (nats per unit)", ylabel="typical step (units of weight)")
right.plot(middle[1:], RATE * typical(snr)[1:], color=BLUE, label="effective step: rate x SNR")
right.axhline(RATE, color="black", lw=1, label="rate")
right.plot(times, RATE * floor, "--", color=GRAY, label="rate x floor: pure noise")
right.set(xlabel="updates", ylabel="typical step (units of weight)", ylim=(0, 1.5 * RATE))
ratio = [np.percentile(x, 95) / np.percentile(x, 5) for x in (typical_g, typical_step)]
print(f"6  The effective step: gradients of different weights span a factor of {ratio[0]:.0f}, steps {ratio[1]:.1f}.")
show(figure, "6-effective-step")

# %% [markdown]
# ## 7. What beta means: a time
#
# `b = 0.9` says little. Two other ways to say it say more. A gradient's weight in the average halves every
#
#     half-life = log(0.5) / log(b)     updates: 6.6 for 0.9, 69 for 0.99, 693 for 0.999
#
# and the average is as calm as one over about `1 / (1 - b)` updates is late: 10, 100, 1,000. So compare betas as times,
# and if you change the batch size, keep the half-life constant in *samples*: with batches four times as large use b**4.
#
# Which time is best? Right: how far the average is from the true gradient, for every memory. Too short and noise is
# left, too long and the average is late. Early, when the signal changes fast, a short memory is best; later a long one.

# %%
memories = np.array([2, 5, 10, 20, 50, 100, 200, 500, 1000])
averages = {T: moving_average(gs, 1 - 1 / T) / (1 - (1 - 1 / T) ** times[:, None]) for T in memories}
phases = {
    "updates 1-100": (0, 100, ORANGE, "o-"),
    "101-400": (100, 400, GREEN, "s-"),
    "401-1,600": (400, 1600, BLUE, "^-"),
}

figure, left, right = panels("How much an old gradient still counts", "Error of the average, by its memory")
ages = np.logspace(0, 3.5, 200)
for b, color, style in ((0.9, ORANGE, "-"), (0.99, GREEN, "--"), (0.999, BLUE, ":")):
    half = np.log(0.5) / np.log(b)
    left.semilogx(ages, b**ages, style, color=color, label=f"b = {b}: half-life {half:.3g} updates")
    left.plot(half, 0.5, "o", color=color)
left.set(xlabel="age of the gradient (updates)", ylabel="its weight (share of the newest's)", ylim=(0, 1.5))
best = {}
for phase, (a, z, color, style) in phases.items():
    errors = [
        np.sqrt(np.square(size(x[a:z] - signals[a:z])).mean() / np.square(size(signals[a:z])).mean())
        for x in averages.values()
    ]
    best[phase] = memories[np.argmin(errors)]
    right.semilogx(memories, errors, style, color=color, ms=4, label=f"{phase}: best near {best[phase]}")
right.set(xlabel="memory 1 / (1 - b1) (updates)", ylabel="error (1 is as large as the signal)", ylim=(0, None))
print("7  Beta is a time: the best memory is " + ", ".join(f"{T} in {phase}" for phase, T in best.items()) + ".")
show(figure, "7-beta-is-a-time")

# %% [markdown]
# ## 8. Adam
#
# That is all of it; here it stands complete. First the check: the recorded gradients through this function and through
# `snr_adam.adam`. The steps must agree but for rounding: 32-bit numbers carry seven digits.
#
# Then what the division is good for. Somebody adds up the losses of a mini-batch instead of averaging them, and all
# gradients are 32 times larger; or divides twice, and they are 32 times smaller. The task is the same, but plain
# descent needs a new rate, while Adam does not even notice: signal and noise have the same unit, and it cancels.


# %%
def adam_by_hand(m, v, t, g, rate, b1=0.9, b2=0.999, eps=1e-8):
    """Update number t = 1, 2, ...: the step for every weight, and the two averages."""
    m = m + (1 - b1) * (g - m)
    v = v + (1 - b2) * (g * g - v)
    signal, noise = m / (1 - b1**t), (v / (1 - b2**t)) ** 0.5 + eps
    return -rate * signal / noise, m, v


@jax.jit
def by_package(gs):
    """The steps of `snr_adam.adam` on the same gradients."""
    tx = snr_adam.adam(RATE)
    return jax.lax.scan(lambda state, g: tx.update(g, state)[::-1], tx.init(gs[0]), gs)[1]


m = v = np.zeros(len(start))
difference = 0.0
for t, (g, expected) in enumerate(zip(gs, np.asarray(by_package(gs)), strict=True), start=1):
    step, m, v = adam_by_hand(m, v, t, g.astype(np.float64), RATE)
    difference = max(difference, np.abs(step - expected).max() / RATE)
allowed = 12 * 2.0**-23  # of one learning rate; 2^-23 is the last bit of a 32-bit number near 1
assert difference < allowed, f"{difference:.1e} of the learning rate apart"


@jax.jit
def train(factor, batches):
    """The loss over all digits before each update of Adam by hand, with all gradients multiplied by `factor`."""

    def update(carry, batch):
        w, m, v, t = carry
        step, m, v = adam_by_hand(m, v, t, factor * gradient(w, batch), RATE)
        return (w + step, m, v, t + 1.0), loss(w, images, labels)

    zeros = jnp.zeros_like(start)
    return jax.lax.scan(update, (start, zeros, zeros, 1.0), batches)[1]


figure, left, right = panels("Plain descent, rate 0.1", f"Adam, rate {RATE}")
for factor, name, color, width in ((32, "x 32", ORANGE, 4), (1, "x 1", BLUE, 2), (1 / 32, "/ 32", "black", 0.8)):
    line = {"color": color, "lw": width, "label": f"gradients {name}"}
    left.plot(times[:1000], descend(0.1 * factor, batches[:1000]), **line)
    right.plot(times[:1000], train(factor, batches[:1000]), **line)
for panel in (left, right):
    panel.set(xlabel="updates", ylabel="loss on all digits (nats per digit)", ylim=(0.8, 4))
print(f"8  Adam by hand and snr_adam.adam agree over {UPDATES:,} updates of {len(start):,} weights:")
print(f"   their steps differ by at most {difference:.1e} of the learning rate; rounding may be {allowed:.1e}.")
show(figure, "8-adam")
