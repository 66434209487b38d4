"""Adam written out, and a small task to watch it on: what the figures of `adam_by_hand.py` are made of.

The formula is `adam_by_hand`, five lines; the rest is a network, two loops and a few measures.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits

import snr_adam

B1, B2, EPS = 0.9, 0.999, 1e-8  # Adam's defaults
RATE, DESCENT_RATE = 0.002, 0.1  # with these, Adam and plain descent learn equally fast
BATCH, UPDATES = 32, 800

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


def loss(w, x, y):
    """How surprised the network is by the labels, in nats per digit; guessing blindly costs log 10 = 2.3."""
    layers = as_layers(w)
    hidden = jax.nn.relu(x @ layers["hidden"]["kernel"] + layers["hidden"]["bias"])
    scores = hidden @ layers["out"]["kernel"] + layers["out"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()


def gradient(w, batch, y):
    """The gradient of the loss over the digits with these numbers."""
    return jax.grad(loss)(w, images[batch], y[batch])


# --- The two optimizers ---------------------------------------------------------------------------------------------


def adam_by_hand(m, v, t, g, rate, b1=B1, b2=B2, eps=EPS):
    """Update number t = 1, 2, ...: the step for every weight, and the two averages."""
    m = m + (1 - b1) * (g - m)
    v = v + (1 - b2) * (g * g - v)
    signal = m / (1 - b1**t)
    noise = (v / (1 - b2**t)) ** 0.5 + eps
    return -rate * signal / noise, m, v


def look_at(w, y, look):
    """The loss over all digits, where one looks: it takes longer than an update."""
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


ALWAYS, TENTHS, LAST = times > 0, times % 10 == 1, times > UPDATES - 200  # at which updates one looks


def run(method, rate, looks=LAST, y=labels, **settings):
    """800 updates: the weights before each, and the losses where one looks."""
    if method is adam:
        settings = {"b1": B1, "b2": B2, "eps": EPS, "factor": 1.0} | settings  # always all of them: it compiles once
    ws, losses = method(y, batches, looks, rate, **settings)
    return np.asarray(ws), np.asarray(losses)[looks]


@jax.jit
def by_package(gs):
    """The steps of `snr_adam.adam` on these gradients."""
    tx = snr_adam.adam(RATE)
    return jax.lax.scan(lambda state, g: tx.update(g, state)[::-1], tx.init(gs[0]), gs)[1]


def disagreement(gs):
    """The largest difference between the steps by hand and those of the package, in learning rates."""
    difference, m, v = 0.0, np.zeros(gs[0].shape), np.zeros(gs[0].shape)
    for t, (g, expected) in enumerate(zip(gs, np.asarray(by_package(gs)), strict=True), start=1):
        step, m, v = adam_by_hand(m, v, t, g.astype(np.float64), RATE)
        difference = max(difference, np.abs(step - expected).max() / RATE)
    return difference


# --- What is measured ----------------------------------------------------------------------------------------------


@jax.jit
def each_gradient(w, y):
    """The gradient of every single digit, a row each: their mean is the true gradient."""
    return jax.vmap(gradient, (None, 0, None))(w, everyone[:, None], y)


@jax.jit
def along(ws, batches, y):
    """The gradient of each mini-batch at its weights."""
    return jax.lax.map(lambda at: gradient(*at, y), (ws, batches))


def gradient_noise(w, y=labels):
    """The standard deviation of a mini-batch's gradient from the true one, for each weight."""
    return np.asarray(each_gradient(w, y)).std(axis=0) / BATCH**0.5


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
    return moving_average(xs, b) / (1 - b ** np.arange(1, len(xs) + 1)[:, None])


def snr_of(gs):
    """The SNR of every weight after each gradient."""
    return corrected(gs, B1) / (np.sqrt(corrected(gs * gs, B2)) + EPS)


def floor(t=np.inf):
    """The SNR that pure noise shows after t updates: 1 at the first one, then less, in the end 0.23."""
    return np.sqrt((1 - B1) * (1 + B1**t) / ((1 + B1) * (1 - B1**t)))


class Recording(NamedTuple):
    """Every gradient of a run, the true ones beside them, and now and then the weights and the gradient noise."""

    gs: np.ndarray
    truth: np.ndarray
    looks: np.ndarray
    ws: np.ndarray
    noise: np.ndarray


@functools.cache
def recording():
    """Descent at half the usual rate, so that a gradient is nearly that of the weights a while ago."""
    ws, looks = run(descend, 0.05)[0], np.arange(0, UPDATES, 50)
    noise = np.stack([gradient_noise(w) for w in ws[looks]])
    truth = along(ws, np.broadcast_to(everyone, (UPDATES, len(everyone))), labels)
    return Recording(np.asarray(along(ws, batches, labels)), np.asarray(truth), looks, ws[looks], noise)


# --- A hundred thousand updates, of a network without a hidden layer ------------------------------------------------


def one_layer_loss(w, x, y):
    """64 pixels -> 10 digits and nothing between: 650 weights."""
    return optax.softmax_cross_entropy_with_integer_labels(x @ w[:640].reshape(64, 10) + w[640:], y).mean()


@jax.jit
def long_run(rates, batches):
    """Adam by hand, a row of updates after the other: the loss after each row."""

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
