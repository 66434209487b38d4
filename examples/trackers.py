"""Signal and noise in an experiment tracker: in TensorBoard, and in plain files that need no tracker at all.

`snr_adam.metrics(opt_state)` is a flat dict of Python floats, which every tracker takes as it is: `wandb.log`,
`mlflow.log_metrics`, `trackio.log`. For those that take histograms as counts and edges, as `wandb.Histogram` does,
there is `snr_adam.telemetry.histograms(opt_state)`. What goes where is a few lines for each; here for two that need
neither an account nor a server:

    TensorBoard    scalars over time, and a histogram over layers: its "distributions" are a heat map of the network
    local files    metrics.csv, for any spreadsheet, history.npz with every layer, for `snr_adam.History.load`, and
                   run.html, for a browser

    python3 -m uv run examples/trackers.py                                     trains and writes build/trackers/
    python3 -m uv tool run tensorboard --logdir build/trackers                 look at it in a browser
"""

import argparse
import csv
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
import optax
from digits import BATCH, MLP, WRONG, load
from flax import nnx
from tensorboardX import SummaryWriter
from tqdm import tqdm

import snr_adam

EVERY = 20  # updates between two looks: reading the state waits for the device, so not at each
LAYERS = ("signal", "noise", "snr")  # quantities of which every layer is logged


class Tracker(Protocol):
    """Anything that takes numbers by name, and an array with one number per layer."""

    def write(self, step: int, metrics: dict[str, float], layers: dict[str, np.ndarray]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files, written by tensorboardX: a small package that needs neither TensorFlow nor PyTorch."""

    def __init__(self, folder: Path):
        self.writer = SummaryWriter(str(folder))

    def write(self, step, metrics, layers):
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        for name, values in layers.items():
            if np.isfinite(values).any():
                self.writer.add_histogram(name, values[np.isfinite(values)], step)

    def close(self):
        self.writer.close()


class Table:
    """A CSV file with a row per look, on the disk at once: what was seen stays also if the run is killed.

    Some numbers are not there at every look (a noise scale, where there is too little signal to measure it). When one
    appears for the first time the file is written anew, with one more column.
    """

    def __init__(self, path: Path):
        self.path, self.rows, self.columns = path, [], ["step"]

    def write(self, step, metrics, layers):
        self.rows.append({"step": step, **metrics})
        new = [name for name in metrics if name not in self.columns]
        self.columns += new
        anew = bool(new) or len(self.rows) == 1
        with self.path.open("w" if anew else "a", newline="") as file:
            table = csv.DictWriter(file, self.columns)
            if anew:
                table.writeheader()
            table.writerows(self.rows if anew else self.rows[-1:])

    def close(self):
        pass


def train(trackers: list[Tracker], updates: int) -> snr_adam.History:
    """Trains the network of `digits.py`, tells the trackers, and returns what was seen of each layer."""
    x, y, *_ = load(WRONG)
    graph, params = nnx.split(MLP(nnx.Rngs(0)))
    tx = snr_adam.observe(snr_adam.adam(0.002))
    opt_state, history = tx.init(params), snr_adam.History()

    @jax.jit
    def step(params, opt_state, batch):
        def loss_of(params):
            scores = nnx.merge(graph, params)(x[batch])
            return optax.softmax_cross_entropy_with_integer_labels(scores, y[batch]).mean()

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    batches = np.random.default_rng(1).integers(0, len(y), (updates, BATCH))
    for number, batch in enumerate(tqdm(batches, unit=" updates", disable=None), start=1):
        params, opt_state, loss = step(params, opt_state, batch)
        if number % EVERY == 0:
            seen = snr_adam.report(opt_state, BATCH)
            history.append(seen)
            metrics = {"train/loss": float(loss), **snr_adam.metrics(opt_state, batch_size=BATCH)}
            layers = {f"layers/{key}": seen.columns[key] for key in LAYERS}
            for tracker in trackers:
                tracker.write(number, metrics, layers)
    return history


def main(args=None) -> None:
    """Trains, and says where everything is."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("build", "trackers"))
    options = parser.parse_args(args)
    options.out.mkdir(parents=True, exist_ok=True)
    trackers = [TensorBoard(options.out / "tensorboard"), Table(options.out / "metrics.csv")]
    try:
        history = train(trackers, options.updates)
    finally:
        for tracker in trackers:
            tracker.close()
    history.save(options.out / "history.npz")
    history.page(options.out / "run.html")
    print(f"{history}\n\n{len(history)} looks at {len(history.names)} layers in {options.out.resolve()}:")
    print("   tensorboard/    python3 -m uv tool run tensorboard --logdir", options.out)
    print("   metrics.csv     a row for each look")
    print("   run.html        the run as a page, to open in a browser")
    print(f"   history.npz     snr_adam.History.load({str(options.out / 'history.npz')!r})")


if __name__ == "__main__":
    main()
