"""Every optimizer by name on two small problems: a transformer that reads Python, and digits of which a fifth is wrong.

    python benchmarks/family.py           some 20 minutes on 2 idle cores; prints the table, writes results/family.json
    python benchmarks/family.py --table   prints the table of what was measured

Three learning rates each, a factor of 3 apart around a usual one, and three seeds; everything else is the same for all
that have it: b2 = .99 where it would be .999 (the runs are short), weight decay, warm-up and cosine. Seeds start from
the same weights and see the same batches. A number is the held-out loss at the best of the three rates, with

    t(0.975, 2) std / sqrt(3)

as 95 % interval, and the difference to `adamw` at its own best rate, seed by seed, likewise. Three seeds make wide
intervals: what lies within them is not told apart. A rate at either end is marked, since a better one may lie outside.

A run that is stopped goes on where it was: what `results/family.json` has for the same settings is not made again.
"""

import argparse
import functools
import inspect
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import PRESETS, RESULTS, machine
from flax import nnx
from scipy.stats import t as student

import snr_adam

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import char_lm
import digits

SEEDS, APART, BASE = 3, 3.0, "adamw"
FACTORS = (1 / APART, 1.0, APART)
# the middle one of three learning rates, where it is not the problem's own
RATES = {"lion": 0.1, "lamb": 3.0, "rmsprop": 0.3, "adamh": 3.0, "msvag": 100.0, "yogi": 3.0}


class Problem(NamedTuple):
    """A problem: its steps, learning rate and weight decay, and what makes its runs.

    load() gives the parameters of each seed, stacked, and a function loss(params, key or None): of the batch that the
    key draws, or held out.
    """

    steps: int
    rate: float
    weight_decay: float
    load: Any


@functools.cache
def load_text(size=char_lm.Size(width=48, context=48, batch=12, held_out=512)):
    """The transformer of `char_lm.py`, narrower, and its text."""
    text, held_out = (jnp.asarray(part) for part in char_lm.corpus())
    starts = [nnx.split(char_lm.Transformer(size, nnx.Rngs(seed))) for seed in range(SEEDS)]
    graph = starts[0][0]
    every = np.linspace(0, len(held_out) - size.context - 1, size.held_out).astype(int)
    windows = char_lm.windows(held_out, every, size.context)

    def loss(params, key):
        if key is None:
            return char_lm.loss_of(params, graph, windows)
        at = jax.random.randint(key, (size.batch,), 0, len(text) - size.context)
        return char_lm.loss_of(params, graph, text[at[:, None] + jnp.arange(size.context + 1)])

    return _stacked([params for _, params in starts]), loss


@functools.cache
def load_digits():
    """The network of `digits.py`; a fifth of its labels is wrong, of the held-out ones none."""
    x, y, *held_out = digits.load(digits.WRONG)
    starts = [nnx.split(digits.MLP(nnx.Rngs(seed))) for seed in range(SEEDS)]
    graph = starts[0][0]

    def of(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(nnx.merge(graph, params)(x), y).mean()

    def loss(params, key):
        if key is None:
            return of(params, *held_out)
        at = jax.random.randint(key, (digits.BATCH,), 0, len(y))
        return of(params, x[at], y[at])

    return _stacked([params for _, params in starts]), loss


def _stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


PROBLEMS = {
    "text": Problem(400, 6e-3, 0.1, load_text),
    "digits": Problem(1000, 4e-3, 0.01, load_digits),
}


def optimizer(preset: str, rate, problem: Problem, steps: int):
    """The optimizer of that name; `rate` is the largest learning rate, and may be traced."""
    make = getattr(snr_adam, preset)
    takes = inspect.signature(make).parameters
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(steps // 15, 1), steps)
    options: dict[str, Any] = {}
    if "b2" in takes and takes["b2"].default == 0.999:
        options["b2"] = 0.99
    if "weight_decay" in takes:
        options["weight_decay"] = problem.weight_decay
    if "peak" in takes:
        options["peak"] = rate
    return make(lambda count: rate * shape(count), **options)


def run(preset: str, problem: Problem, steps: int) -> tuple[list, float]:
    """The held-out loss of each rate and seed, (rates, seeds), and the bytes of state per parameter."""
    params, loss = problem.load()
    middle = problem.rate * RATES.get(preset, 1.0)

    def one(which):
        rate, seed = which
        tx, key = optimizer(preset, rate, problem, steps), jax.random.key(seed)
        own = jax.tree.map(lambda x: x[seed], params)

        def step(carry, number):
            params, state = carry
            grads = jax.grad(loss)(params, jax.random.fold_in(key, number))
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (own, _), _ = jax.lax.scan(step, (own, tx.init(own)), jnp.arange(steps))
        return loss(own, None)

    rates = jnp.asarray([middle * factor for factor in FACTORS for _ in range(SEEDS)], jnp.float32)
    seeds = jnp.asarray(list(range(SEEDS)) * len(FACTORS))
    # on CPU one after the other: a batched product of small matrices is slower there
    every = functools.partial(jax.lax.map, one) if jax.default_backend() == "cpu" else jax.vmap(one)
    losses = np.asarray(jax.jit(every)((rates, seeds)), float).reshape(len(FACTORS), SEEDS)
    own = jax.tree.map(lambda x: x[0], params)
    state = jax.eval_shape(optimizer(preset, problem.rate, problem, steps).init, own)
    size = sum(x.size for x in jax.tree.leaves(own))
    return losses.tolist(), sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / size


def measure(path: Path, presets: list[str], problems: list[str], share: float) -> dict:
    """Measures what the file does not have, saving after each preset."""
    results = json.loads(path.read_text()) if path.exists() else {"rows": []}
    steps = {name: max(int(PROBLEMS[name].steps * share), 2) for name in problems}
    done = {(row["problem"], row["preset"]) for row in results["rows"] if row["steps"] == steps.get(row["problem"])}
    for name in problems:
        for preset in presets:
            if (name, preset) in done:
                continue
            begin, problem = time.perf_counter(), PROBLEMS[name]
            losses, state = run(preset, problem, steps[name])
            rates = [problem.rate * RATES.get(preset, 1.0) * factor for factor in FACTORS]
            row = {"problem": name, "preset": preset, "steps": steps[name], "rates": rates, "losses": losses}
            row |= {"state": state, "seconds": time.perf_counter() - begin}
            kept = [old for old in results["rows"] if (old["problem"], old["preset"]) != (name, preset)]
            results = {"machine": machine(), "seeds": SEEDS, "rows": [*kept, row]}
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{name} {preset}: {row['seconds']:.0f} s", file=sys.stderr, flush=True)
    return results


def interval(values) -> float:
    """Half the width of the 95 % interval of a mean."""
    values = np.asarray(values, float)
    return float(student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)


def best(row: dict) -> int:
    """Which of the rates has the least mean loss; one that has diverged never."""
    means = np.mean(row["losses"], axis=1)
    return int(np.argmin(np.where(np.isfinite(means), means, np.inf)))


@functools.cache
def _compiled() -> dict:
    """Bytes moved per float32 parameter as compiled for an H100, of the presets that `compiled.py` has measured."""
    path = RESULTS / "compiled.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return {
        row["step"]: row["moved"]
        for row in rows
        if (row.get("target"), row.get("tree"), row.get("dtype")) == ("h100", "4096x4096", "float32") and "moved" in row
    }


def moved(preset: str, state: float) -> str:
    """Bytes that cross the device's memory per parameter and step: as compiled, else what they must be at least."""
    if preset in _compiled():
        return f"{_compiled()[preset]:.0f}"
    return f">= {12 + 2 * round(state)}"


def table(results: dict) -> str:
    """The table of the docs."""
    rows = {(row["problem"], row["preset"]): row for row in results["rows"]}
    problems = [name for name in PROBLEMS if any(problem == name for problem, _ in rows)]
    head = "| optimizer | state, bytes | moved, bytes |"
    head += "".join(f" {name}: rate | loss | to `{BASE}` |" for name in problems)
    lines = [head, "|---|--:|--:|" + "--:|--:|--:|" * len(problems)]
    for preset in dict.fromkeys(preset for _, preset in rows):
        state = next(row["state"] for (_, other), row in rows.items() if other == preset)
        cells = [f"`{preset}`", f"{state:.0f}", moved(preset, state)]
        for name in problems:
            cells += _cells(rows.get((name, preset)), rows.get((name, BASE)))
        lines.append("| " + " | ".join(cells) + " |")
    steps = ", ".join(
        f"{name} {rows[key]['steps']:,}" for name in problems for key in [next(k for k in rows if k[0] == name)]
    )
    lines += [
        "",
        f"Held-out loss in nats, mean of {results['seeds']} seeds with its 95 % interval, at the best of three "
        "learning rates (^ the largest, v the smallest of them); differences in pairs of one seed. Moved: as compiled "
        f"for an H100, or (>=) what must be read and written. Updates: {steps}. Made by `benchmarks/family.py`.",
    ]
    return "\n".join(lines)


def _cells(row: dict | None, base: dict | None) -> list[str]:
    if row is None:
        return ["-"] * 3
    at = best(row)
    losses = row["losses"][at]
    end = {0: " v", len(row["rates"]) - 1: " ^"}.get(at, "")
    cells = [f"{row['rates'][at]:.2g}{end}", f"{np.mean(losses):.3f} ± {interval(losses):.3f}"]
    if base is None or base is row:
        return [*cells, "-"]
    difference = np.subtract(losses, base["losses"][best(base)])
    return [*cells, f"{difference.mean():+.3f} ± {interval(difference):.3f}"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=PRESETS)
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--share", type=float, default=1.0, help="this share of the updates, for a trial")
    parser.add_argument("--json", type=Path, default=RESULTS / "family.json")
    parser.add_argument("--table", action="store_true", help="only print what the file has")
    options = parser.parse_args(arguments)
    if options.table:
        print(table(json.loads(options.json.read_text())))
        return
    print(table(measure(options.json, options.presets, options.problems, options.share)))


if __name__ == "__main__":
    main()
