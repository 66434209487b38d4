"""Where a language model finds signal, layer by layer, while it learns: a table and a heat map.

The transformer of `char_lm.py`, made deeper, learns to continue Python source. `snr_adam.observe` watches its
optimizer; what it has seen is printed as a table and drawn. First every layer has signal: the model learns which bytes
are frequent. Once it knows, almost all layers see nothing but noise, and the loss hardly moves, until attention finds
out what to look at; then the signal spreads to the others.

    python3 -m uv run examples/see_the_signal.py                          build/signal.png and build/signal.npz
    python3 -m uv run examples/see_the_signal.py --out docs/signal.png    the picture in the README
"""

import argparse
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
from char_lm import Size, Transformer, corpus, train_chunk
from flax import nnx
from tqdm import tqdm

import snr_adam
from snr_adam import plots

SIZE = Size(width=64, batch=16, layers=4)
STEPS, EVERY = 400, 5
# Signal and noise remember equally long: with a longer b2 the noise would tell of a time that is over.
RATE, BETA = 1e-3, 0.95


def train(steps: int, size: Size = SIZE) -> tuple[snr_adam.History, list[float]]:
    """What was seen of the optimizer, and the losses in between."""
    text = jnp.asarray(corpus()[0])
    starts = np.random.default_rng(0).integers(0, len(text) - size.context, (steps, size.batch))
    graph, params = nnx.split(Transformer(size, nnx.Rngs(0)))
    rate = optax.warmup_cosine_decay_schedule(0.0, RATE, steps // 15, steps)
    tx = snr_adam.observe(snr_adam.adamw(rate, b1=BETA, b2=BETA))
    carry, history, losses = (params, tx.init(params)), snr_adam.History(), []
    for begin in tqdm(range(0, steps, EVERY), unit_scale=EVERY, unit=" updates", disable=None):
        carry, loss = train_chunk(carry, text, starts[begin : begin + EVERY], graph, tx, size.context)
        history.append(snr_adam.report(carry[1]))
        losses.append(float(loss.mean()))
    print(snr_adam.report(carry[1]))
    return history, losses


def main(args=None, size: Size = SIZE) -> None:
    """Trains, prints the last report, draws."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=Path("build", "signal.png"))
    options = parser.parse_args(args)
    history, losses = train(options.steps, size)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    plots.heat_map(history).figure.savefig(options.out)
    history.save(Path("build", "signal.npz"))
    print(f"loss {losses[0]:.2f}, at last {losses[-1]:.2f} nats per byte; the heat map is in {options.out.resolve()}")


if __name__ == "__main__":
    main()
