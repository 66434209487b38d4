"""A hundred thousand Adam updates in batches of 128, on an MLP that reads digits: this package against the others.

    python benchmarks/note_run.py                 the network of examples/hundred_thousand.py, 128 hidden units
    python benchmarks/note_run.py --width 32      a smaller one, where a framework's own work per update weighs more

Samples, network, starting weights and learning rate are those of the example for all. The contenders take turns, round
by round, so that all see the same machine in the same minute; the first round of each, in which some compile, is not
counted. Optimizers of JAX do all of the updates, 1,000 to a compiled scan. PyTorch and Keras, driven as their manuals
do, take a tenth: their time to the end is extrapolated, and their accuracy is that after as many updates. PyTorch gets
the number of threads with which it is faster here. Contenders that are not installed are "not measured".
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import optax
from common import RESULTS, machine
from flax import nnx
from readme import note_run_table

import snr_adam

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from hundred_thousand import BATCH, HELD_OUT, LEARNING_RATE, MLP, accuracy, compile_epoch, load, make_samples

TRANSFORMATIONS = {
    "optax.adam": optax.adam,
    "snr_adam.adam": snr_adam.adam,
    "snr_adam.adam observed": lambda rate: snr_adam.observe(snr_adam.adam(rate), every=10),
}
OTHERS = "torch.optim.Adam", "torch.optim.Adam fused", "keras.optimizers.Adam on JAX"
BASE, EAGER = "optax.adam", "torch.optim.Adam"
EPOCHS_A_ROUND, TENTH = 4, 10  # the compiled ones take ten times as many updates as the others


class Task:
    """The samples, the digits held out, and the weights that everyone starts from."""

    def __init__(self, width: int, samples: int):
        digits, self.held_out = load()
        self.x, self.y = jax.jit(make_samples, static_argnums=3)(jax.random.key(0), *digits, samples)
        self.per_epoch = samples // BATCH
        self.graph, self.params = nnx.split(MLP(nnx.Rngs(0), width))

    def layers(self):
        """Kernel, (in, out), and bias of each layer, as NumPy arrays."""
        model = nnx.merge(self.graph, self.params)
        return [
            (np.asarray(each.kernel[...]), np.asarray(each.bias[...]))
            for each in (model.first, model.second, model.out)
        ]


class Compiled:
    """An optimizer of JAX: an epoch is one scan."""

    def __init__(self, task: Task, tx):
        self.task, self.epochs = task, 0
        params = jax.tree.map(lambda p: p.copy(), task.params)  # they are donated
        self.carry = params, tx.init(params)
        self.epoch = compile_epoch(task.graph, tx, self.carry, task.x, task.y)

    def run(self, updates: int) -> None:
        for _ in range(updates // self.task.per_epoch):
            self.carry, loss = self.epoch(self.carry, self.epochs)
            self.epochs += 1
            float(loss)  # waits

    def accuracy(self) -> float:
        return accuracy(self.task.graph, self.carry[0], *self.task.held_out)


class Torch:
    """PyTorch, eager, its samples in memory as one tensor."""

    def __init__(self, task: Task, fused: bool):
        import torch

        self.torch, self.task, self.fused = torch, task, fused
        self.x, self.y = torch.tensor(np.asarray(task.x)), torch.tensor(np.asarray(task.y, np.int64))
        self.model, self.optimizer = self.start()
        self.threads = min((torch.get_num_threads(), 1), key=self.seconds)
        self.model, self.optimizer = self.start()

    def start(self):
        """The network with the weights that all start from, and its optimizer."""
        nn, parts = self.torch.nn, []
        for kernel, bias in self.task.layers():
            linear = nn.Linear(*kernel.shape)
            linear.load_state_dict({"weight": self.torch.tensor(kernel.T), "bias": self.torch.tensor(bias)})
            parts += [linear, nn.ReLU()]
        model = nn.Sequential(*parts[:-1])
        return model, self.torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=self.fused)

    def seconds(self, threads: int) -> float:
        """How long some updates take with so many threads."""
        self.threads = threads
        self.run(10)
        start = time.perf_counter()
        self.run(100)
        return time.perf_counter() - start

    def run(self, updates: int) -> None:
        self.torch.set_num_threads(self.threads)
        order = self.torch.randperm(len(self.x))
        for i in range(updates):
            batch = order[i % self.task.per_epoch * BATCH :][:BATCH]
            self.optimizer.zero_grad()
            self.torch.nn.functional.cross_entropy(self.model(self.x[batch]), self.y[batch]).backward()
            self.optimizer.step()

    def accuracy(self) -> float:
        x, y = (self.torch.tensor(np.asarray(each)) for each in self.task.held_out)
        with self.torch.no_grad():
            return float((self.model(x).argmax(dim=1) == y).float().mean())


class Keras:
    """Keras on its JAX backend: compile and fit."""

    def __init__(self, task: Task):
        os.environ["KERAS_BACKEND"] = "jax"
        import keras

        self.task, self.fits = task, 0
        self.x, self.y = np.asarray(task.x), np.asarray(task.y)
        kernels = task.layers()
        sizes = [kernel.shape[1] for kernel, _ in kernels]
        dense = [keras.layers.Dense(n, activation="relu") for n in sizes[:-1]] + [keras.layers.Dense(sizes[-1])]
        self.model = keras.Sequential([keras.layers.Input((64,)), *dense])
        for layer, weights in zip(dense, kernels, strict=True):
            layer.set_weights(weights)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.model.compile(keras.optimizers.Adam(LEARNING_RATE), loss)

    def run(self, updates: int) -> None:
        part = (np.arange(updates * BATCH) + self.fits * updates * BATCH) % len(self.x)
        self.model.fit(self.x[part], self.y[part], batch_size=BATCH, epochs=1, verbose=0)
        self.fits += 1

    def accuracy(self) -> float:
        x, y = (np.asarray(each) for each in self.task.held_out)
        return float((self.model.predict(x, verbose=0).argmax(axis=1) == y).mean())


def contender(name: str, task: Task):
    """The contender of that name, ready to run."""
    if name in TRANSFORMATIONS:
        return Compiled(task, TRANSFORMATIONS[name](LEARNING_RATE))
    return Keras(task) if name.startswith("keras") else Torch(task, "fused" in name)


def speed(seconds: dict[str, list[float]], name: str) -> dict:
    """Updates per second, and as a multiple of others'; the first round is not counted."""
    found = {"updates_per_second": 1 / statistics.median(seconds[name][1:])}
    for key, base in (("to_optax", BASE), ("to_eager", EAGER)):
        if base in seconds:
            found[key] = statistics.median(b / a for a, b in zip(seconds[name][1:], seconds[base][1:], strict=True))
    return found


def measure(width: int, samples: int, rounds: int, names) -> tuple[list[dict], str]:
    """One row per contender, and the report of the observed one."""
    task, rows, running = Task(width, samples), [], {}
    for name in names:
        rows.append({"contender": name, "width": width})
        try:
            running[name] = contender(name, task)
        except ImportError as error:
            rows[-1]["error"] = f"not measured: {error}"
    seconds: dict[str, list[float]] = {name: [] for name in running}
    a_round = EPOCHS_A_ROUND * task.per_epoch
    updates = {name: a_round if isinstance(each, Compiled) else a_round // TENTH for name, each in running.items()}
    for done in range(rounds):
        for name, each in running.items():
            start = time.perf_counter()
            each.run(updates[name])
            seconds[name].append((time.perf_counter() - start) / updates[name])
        if sys.stderr.isatty():
            print(f"\rwidth {width}: round {done + 1} of {rounds} ", end="", file=sys.stderr, flush=True)
    for row in rows:
        if row["contender"] in running:
            name = row["contender"]
            row |= {"updates": rounds * updates[name], "accuracy": running[name].accuracy()}
            row |= {"seconds": statistics.mean(seconds[name][1:]) * rounds * a_round}
            row |= speed(seconds, name) | {"threads": getattr(running[name], "threads", None)}
    observed = [each for name, each in running.items() if "observed" in name]
    return rows, "\n".join(str(snr_adam.report(each.carry[1], BATCH)) for each in observed)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--samples", type=int, default=128_000)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--contenders", nargs="*", default=[*TRANSFORMATIONS, *OTHERS])
    parser.add_argument("--json", type=Path, default=RESULTS / "note_run.json")
    options = parser.parse_args(arguments)
    if options.rounds < 2 or options.samples < TENTH * BATCH:
        parser.error(f"needs at least 2 rounds and {TENTH * BATCH} samples")
    rows, report = measure(options.width, options.samples, options.rounds, options.contenders)
    if options.json.exists():  # other widths stay
        rows = [row for row in json.loads(options.json.read_text())["rows"] if row["width"] != options.width] + rows
    found = {name: version(name) for name in ("torch", "keras") if importlib.util.find_spec(name)}
    results = {"machine": machine() | found, "held_out": HELD_OUT, "rows": rows}
    options.json.parent.mkdir(exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    print(report, note_run_table(results), sep="\n\n")


if __name__ == "__main__":
    main()
