"""Does the advice hold? Steps and examples to one loss, in batches of 8 to 512, beside what `advise` printed.

    python benchmarks/batch_size.py            prints tables, writes benchmarks/results/batch_size.json; minutes
    python benchmarks/batch_size.py --quick    a smaller one of it, in seconds
    python benchmarks/batch_size.py --docs     writes the tables of the results into docs/explanation/batch_size.md

A network is trained in batches of 64 and observed until its loss over all examples has come down to a target.
`advise(over_run(history, 64), ...)` then says how many times the steps another batch size takes, with an interval. The
network is trained again from the same starts in these batches, with the learning rate and the decays that `advise`
says, and the steps are counted. Every start has a history and so an interval of its own.
"""

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import persistence
from common import RESULTS, markdown, save
from scipy.stats import t as student

import snr_adam
from snr_adam.telemetry.advice import Advice, advise, over_run

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import brute_force

DOCS = Path(__file__).parent.parent / "docs" / "explanation" / "batch_size.md"
BATCH, BATCHES, SEEDS, REPORTS = 64, (8, 16, 32, 64, 128, 256, 512), 6, 16


class Goal(NamedTuple):
    """A learning rate for batches of 64, the loss to come to, and the most examples that may be spent on it."""

    rate: float
    loss: float
    most: int = 400_000


GOALS = {"mlp, wrong labels": Goal(2e-3, 0.95), "transformer": Goal(3e-3, 0.5)}
NAMES = {"mlp, wrong labels": "digits, a fifth of the labels wrong: an MLP", "transformer": "bytes: a transformer"}


def train(work, goal: Goal, setting, seeds: int, history=False, between=512) -> tuple[np.ndarray, list]:
    """The steps that every start takes to the goal, nan if too many; and its history, if asked for.

    The loss is taken every 512 examples, and the step at which it passed the goal lies on the line between two.
    """
    tx, size = snr_adam.adam(setting.learning_rate, setting.b1, setting.b2), len(work.data[0])
    tx, stride = snr_adam.observe(tx) if history else tx, max(between // setting.batch_size, 1)

    def loss_of(params, *data):
        return jnp.mean(jax.vmap(work.loss, (None, *[0] * len(data)))(params, *data))

    def step(i, carry, key):
        params, state = carry
        picked = jax.random.randint(jax.random.fold_in(key, i), (setting.batch_size,), 0, size)
        updates, state = tx.update(jax.grad(loss_of)(params, *(x[picked] for x in work.data)), state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0, None))
    def go_on(carry, key, first):
        carry = jax.lax.fori_loop(first, first + stride, functools.partial(step, key=key), carry)
        return carry, loss_of(carry[0], *work.data)

    def begin(key):
        params = work.init(key)
        return (params, tx.init(params)), loss_of(params, *work.data)

    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    carry, loss = jax.jit(jax.vmap(begin))(keys)
    losses, histories, done = [np.asarray(loss, float)], [snr_adam.History() for _ in keys], np.zeros(seeds, bool)
    while not done.all() and len(losses) * stride * setting.batch_size < goal.most:
        carry, loss = go_on(carry, keys, (len(losses) - 1) * stride)
        losses.append(np.asarray(loss, float))
        if history and (len(losses) - 1) * stride % REPORTS == 0:
            states = jax.device_get(carry[1])
            for i in np.flatnonzero(~done):
                histories[i].append(snr_adam.report(jax.tree.map(lambda x, i=i: x[i], states)))
        done |= losses[-1] <= goal.loss
    return stride * np.array([crossing(each, goal.loss) for each in np.transpose(losses)]), histories


def crossing(losses, goal: float) -> float:
    """Where a series first is at the goal, between two of its numbers; nan if nowhere."""
    below = np.flatnonzero(losses <= goal)
    if not below.size or not below[0]:
        return float("nan")
    i = below[0]
    return float(i - 1 + (losses[i - 1] - goal) / (losses[i - 1] - losses[i]))


def multiples(advices: list[Advice], batch: int) -> list[tuple[float, float, float]]:
    """Steps as a multiple of those in batches of 64, with the ends of the interval, as printed to every start."""
    then = [advice._replace(advised=advice.now.at(batch)) for advice in advices]
    return [(each.steps, *each.steps_interval) for each in then]


def measure(name: str, goal: Goal, batches, seeds: int) -> list[dict]:
    """A row for every batch size."""
    work, rows = brute_force.WORKLOADS[name](), []
    setting = snr_adam.telemetry.advice.Setting(BATCH, goal.rate, 0.9, 0.999)
    base, histories = train(work, goal, setting, seeds, history=True)
    advices = [advise(over_run(history, BATCH), *setting) for history in histories]
    for batch in batches:
        steps = base if batch == BATCH else train(work, goal, setting.at(batch), seeds)[0]
        ratios, printed = steps / base, multiples(advices, batch)
        mean = float(np.mean(steps) / np.mean(base))
        spread = float(student.ppf(0.975, seeds - 1) * np.std(steps - mean * base, ddof=1) / seeds**0.5 / np.mean(base))
        middle, low, high = (float(x) for x in np.median(printed, axis=0))
        rows.append(
            {
                **{"workload": name, "goal": goal.loss, "batch": batch, "rate": setting.at(batch).learning_rate},
                **{"steps": float(np.mean(steps)), "examples": float(np.mean(steps) * batch)},
                **{"times": mean, "error": spread, "each": ratios.tolist(), "printed": printed},
                **{"said": middle, "low": low, "high": high},
                "inside": sum(low <= mean <= high for _, low, high in printed),
                "noise_scales": [list(advice.noise_scale[:4]) for advice in advices],
            }
        )
        print(f"{name}: batches of {batch}", file=sys.stderr, flush=True)
    return rows


def table(rows: list[dict]) -> str:
    """What was measured beside what was printed: medians over starts of the printed numbers."""

    def shown(row):
        def beside(ratio):
            said, low, high = (row[key] * ratio for key in ("said", "low", "high"))
            return f"{row['times'] * ratio:.2g} ± {row['error'] * ratio:.1g}", f"{said:.2g} ({low:.2g} to {high:.2g})"

        steps, examples, inside = ("1", "-"), ("1", "-"), "-"
        if row["batch"] != BATCH:
            steps, examples = beside(1.0), beside(row["batch"] / BATCH)
            inside = f"{row['inside']} of {len(row['printed'])}"
        numbers = {key: row[key] for key in ("batch", "rate", "steps", "examples")}
        both = zip(("times the steps", "printed", "times the examples", "printed "), (*steps, *examples), strict=True)
        return numbers | dict(both) | {"inside": inside}

    columns = {"batch": "d", "rate": ".2g", "steps": ",.0f", "times the steps": "", "printed": "", "examples": ",.0f"}
    return markdown(map(shown, rows), columns | dict.fromkeys(("times the examples", "printed ", "inside"), ""))


def tables(rows: list[dict]) -> str:
    """A table for each workload."""
    names = dict.fromkeys(row["workload"] for row in rows)
    parts = []
    for name in names:
        some = [row for row in rows if row["workload"] == name]
        value, _, low, high = np.median(some[0]["noise_scales"], axis=0)
        scale = f"{value:,.0f} ({low:,.0f} to {high:,.0f})"
        parts.append(f"{NAMES[name]}, to a loss of {some[0]['goal']:g}. Noise scale over the run: {scale} examples.")
        parts.append(table(some))
    return "\n\n".join(parts)


def render(text: str, rows: list[dict], states: list[dict]) -> str:
    """The page with these tables, and that of `persistence.py`, between its marks."""
    for mark, shown in (("batches", tables(rows)), ("learning rates", persistence.table(states))):
        head, rest = text.split(f"<!-- {mark} -->\n")
        _, tail = rest.split(f"<!-- end of {mark} -->")
        text = f"{head}<!-- {mark} -->\n\n{shown}\n\n<!-- end of {mark} -->{tail}"
    return text


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two starts, one other batch size; writes nothing")
    parser.add_argument("--docs", action="store_true", help="only write the results into the docs")
    parser.add_argument("--json", type=Path, default=RESULTS / "batch_size.json")
    options = parser.parse_args(arguments)
    if options.docs:
        both = (json.loads(path.read_text())["rows"] for path in (options.json, RESULTS / "persistence.json"))
        DOCS.write_text(render(DOCS.read_text(), *both))
        return
    if options.quick:
        print(tables(measure("mlp, wrong labels", Goal(2e-3, 2.0), (64, 256), 2)))
        return
    rows = [row for name, goal in GOALS.items() for row in measure(name, goal, BATCHES, SEEDS)]
    save(options.json, rows)
    print(tables(rows))


if __name__ == "__main__":
    main()
