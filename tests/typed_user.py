"""What a user writes, correctly; read by type checkers and run by `test_typing.py`."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import own_parts as own

import snr_adam
from snr_adam import History, descend, guard, health, observe, report, scale_by_snr
from snr_adam.parts import EMA, RMS, Cast, Decoupled, Descent, Noise, Packed, Shared, Signal, Storage, TrustRatio

# parts of one's own are parts
signals: list[Signal] = [EMA(0.9), own.HeavyBall(), own.ClippedMean()]
noises: list[Noise] = [RMS(0.99), own.Squares(), own.MeanSize()]
descents: list[Descent] = [Decoupled(), TrustRatio(), own.Bounded()]
storages: list[Storage] = [Packed(), Cast(nu="bfloat16"), own.HalvesExchanged(), own.Exchanged(), own.Root()]

# every form of a learning rate
schedule = optax.cosine_decay_schedule(1e-3, 100)
snr_adam.adamw(1e-3, 0.9, b2=0.95, weight_decay=0.1, storage="packed")
snr_adam.adamw(schedule, storage="bfloat16", mask={"w": True, "b": False})
snr_adam.adam(jnp.float32(1e-3))
snr_adam.adam(np.float32(1e-3), eps=1e-6, nesterov=True)
snr_adam.adam({"w": 1e-3, "b": schedule})
snr_adam.adam({"layers": [1e-3, jnp.float32(1e-2)], "head": (1e-3, schedule)})
snr_adam.lion(lambda count: 1e-4 / (1 + count), mu_dtype=jnp.bfloat16)
snr_adam.adopt(1e-3, clip_value_fn=lambda count: count**0.5)
snr_adam.rmsprop(1e-2, momentum=0.9, centered=True)
snr_adam.lamb(1e-3, weight_decay=schedule)
optax.inject_hyperparams(snr_adam.adamw)(learning_rate=1e-3)

# parts put together
optax.chain(scale_by_snr(own.HeavyBall(), own.MeanSize(), own.Exchanged()), optax.scale_by_learning_rate(1e-3))
scale_by_snr(noise=Shared(RMS(), 0), storage=Cast(mu="bfloat16"))
descend(schedule, signals[0], noises[1], descent=own.Bounded(), storage=own.HalvesExchanged(), weight_decay=0.1)


def loss(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jnp.mean((x @ params["w"] + params["b"]) ** 2)


def train(folder: Path, steps: int = 5) -> str:
    """A run: guarded, observed, reported and logged."""
    params = {"w": jnp.ones((4, 2)), "b": jnp.zeros(2)}
    tx = guard(observe(snr_adam.adamw(1e-2, storage="packed"), every=1), clip_norm=1.0, max_consecutive=10)
    state = tx.init(params)

    @jax.jit
    def step(params, state, x):
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    history = History()
    for seed in range(steps):
        params, state = step(params, state, jax.random.normal(jax.random.key(seed), (8, 4)))
        history.append(report(state, batch_size=8))
    history.save(folder / "history.npz")
    total: dict[str, float] = report(state).total
    rows = report(state).group(["w", "b"]).rows
    numbers = snr_adam.metrics(state)
    saved = len(History.load(folder / "history.npz"))
    return f"{health(state, params)}: {total['snr']:.2f}, {len(rows)} rows, {len(numbers)} metrics, {saved} reports"
