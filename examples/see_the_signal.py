"""Where a language model finds signal, layer by layer, while it learns: a table and a heat map.

The transformer of `char_lm.py`, made deeper, learns to continue Python source. `snr_adam.observe` watches its
optimizer; what it has seen is printed as a table and drawn. First every layer has signal: the model learns which bytes
are frequent. Once it knows, almost all layers see nothing but noise, and the loss hardly moves, until attention finds
out what to look at; then the signal spreads to the others.

    python3 -m uv run examples/see_the_signal.py    a table, and pictures in build/

The README's picture and table, which `benchmarks/readme.py` puts in their place:

    python3 -m uv run examples/see_the_signal.py --out docs/signal.png --json benchmarks/results/signal.json
"""

import argparse
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
from char_lm import Size, Transformer, corpus, train_chunk
from flax import nnx
from tqdm import tqdm

import snr_adam
from snr_adam.telemetry import plots

SIZE = Size(width=64, batch=16, layers=4)
STEPS, EVERY = 400, 5
# Signal and noise remember equally long: with a longer b2 the noise would tell of a time that is over.
RATE, BETA = 1e-3, 0.95
TITLE = "Signal in every layer, then in few, then in more again"  # so it is after STEPS
GROUPS = {
    "query, key": "attention/(query|key)",
    "value, out": "attention/(value|out)",
    "MLPs": "wide|narrow",
    "norms": "norm",
    "embeddings": "embedding",
    "head": "head",
}


def train(steps: int, size: Size = SIZE) -> tuple[list[snr_adam.telemetry.Report], np.ndarray]:
    """What was seen of the optimizer every few steps, and the loss of each step."""
    text = jnp.asarray(corpus()[0])
    starts = np.random.default_rng(0).integers(0, len(text) - size.context, (steps, size.batch))
    graph, params = nnx.split(Transformer(size, nnx.Rngs(0)))
    rate = optax.warmup_cosine_decay_schedule(0.0, RATE, steps // 15, steps)
    tx = snr_adam.observe(snr_adam.adamw(rate, b1=BETA, b2=BETA))
    carry, reports, losses = (params, tx.init(params)), [], []
    for begin in tqdm(range(0, steps, EVERY), unit=f" x {EVERY} updates", disable=None):
        carry, loss = train_chunk(carry, text, starts[begin : begin + EVERY], graph, tx, size.context)
        reports.append(snr_adam.report(carry[1], size.batch))
        losses.append(np.asarray(loss))
    return reports, np.concatenate(losses)


def main(args=None, size: Size = SIZE) -> list[snr_adam.telemetry.Report]:
    """Trains, prints the table, draws."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=Path("build", "signal.png"), help="the heat map")
    parser.add_argument("--json", type=Path, help="where the table goes, for benchmarks/readme.py")
    options = parser.parse_args(args)
    if options.steps < EVERY:
        parser.error(f"needs at least {EVERY} steps")
    reports, losses = train(options.steps, size)
    table = str(reports[-1].group(GROUPS))
    print(f"{table}\n\nloss {losses[0]:.2f} at first, {losses[-EVERY:].mean():.2f} at last, in nats per byte")

    options.out.parent.mkdir(parents=True, exist_ok=True)
    picture = plots.heat_map(reports)
    picture.set_title(TITLE if options.steps == STEPS else "Every layer over time", weight="bold")
    picture.set_xlabel("steps (updates); darkest: at the floor, which is what pure noise shows, or below it")
    picture.figure.savefig(options.out)
    print(f"the heat map is in {options.out.resolve()}")
    if options.json:
        options.json.write_text(
            json.dumps({"steps": options.steps, "batch": size.batch, "blocks": size.layers, "table": table}, indent=1)
            + "\n"
        )
    else:
        overview = options.out.with_name(f"{options.out.stem}-overview.png")
        plots.overview(reports, size.batch).savefig(overview)
        snr_adam.History(reports).save(options.out.with_suffix(".npz"))
        print(f"and more in {overview.name} and {options.out.stem}.npz beside it")
    return reports


if __name__ == "__main__":
    main()
