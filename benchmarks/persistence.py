"""What does persistence say of the learning rate? Runs go on for 100 steps, at the same rate, at half and at twice.

    python benchmarks/persistence.py            prints tables, writes benchmarks/results/persistence.json; 2 minutes
    python benchmarks/persistence.py --quick    a few steps of it, in seconds

Two networks and a noisy quadratic of `tests/brute_force.py` are trained by Adam at four rates from three starts. At
some steps of each run, `report` gives the interval of persistence, and the run goes on in branches of 100 steps: three
rates times 12 sequences of batches. A rate is better if the loss over all examples is lower at the end, in pairs of the
same batches, with a 95 % confidence interval below 0. And the loss falls, at the rate as it is, if it does so from the
middle of the branches to their end.

`advise` says a sentence where the interval is above .1, another where it is below. Each is held against the branches.
"""

import argparse
import functools
import itertools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import RESULTS, markdown, save
from scipy.stats import t as student

import snr_adam

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import brute_force

NETWORKS = ("convolutional", "mlp, wrong labels")
WORKLOADS = (*NETWORKS, "quadratic")  # there, noise never vanishes
FACTORS = (1.0, 0.5, 2.0)
BATCH, LOOKS, AHEAD, SEEDS, REPEATS = 32, (60, 120, 240, 480, 960), 100, 3, 12


def total(work, params):
    """The loss over all examples."""
    return jnp.mean(jax.vmap(work.loss, (None, *[0] * len(work.data)))(params, *work.data))


def steps(work, tx, carry, key, first, last):
    """Steps `first` to `last`, with batches that belong to the key."""

    def loss_of(params, picked):
        return jnp.mean(jax.vmap(work.loss, (None, *[0] * len(work.data)))(params, *(x[picked] for x in work.data)))

    def step(i, carry):
        params, state = carry
        picked = jax.random.randint(jax.random.fold_in(key, i), (BATCH,), 0, len(work.data[0]))
        updates, state = tx.update(jax.grad(loss_of)(params, picked), state, params)
        return optax.apply_updates(params, updates), state

    return jax.lax.fori_loop(first, last, step, carry)


def measure(name: str, seeds: int, looks: tuple, ahead: int, repeats: int) -> list[dict]:
    """A row for every state of every run of a workload."""
    work = brute_force.WORKLOADS[name]()
    runs = list(itertools.product(work.rates, range(seeds)))
    rates, numbers = (jnp.array(x) for x in zip(*runs, strict=True))
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(0)))(numbers)

    def begin(rate, key):
        params = work.init(key)
        return params, snr_adam.observe(snr_adam.adam(rate)).init(params)

    def go_on(rate, key, carry, first, last):
        return steps(work, snr_adam.observe(snr_adam.adam(rate)), carry, key, first, last)

    def branch(rate, key, carry, number):
        params, state = carry
        key = jax.random.fold_in(key, number)
        ends, begun = [], (params, state.inner)
        for factor in FACTORS:
            tx = snr_adam.adam(factor * rate)
            middle = steps(work, tx, begun, key, 0, ahead // 2)
            ends += [middle[0], steps(work, tx, middle, key, ahead // 2, ahead)[0]]
        return jnp.stack([total(work, ends[i]) for i in (0, 1, 3, 5)])

    branches = jax.jit(jax.vmap(jax.vmap(branch, (None, None, None, 0)), (0, 0, 0, None)))
    go_on = jax.jit(jax.vmap(go_on, (0, 0, 0, None, None)))
    carry, rows = jax.jit(jax.vmap(begin))(rates, keys), []
    for first, last in itertools.pairwise((0, *looks)):
        carry = go_on(rates, keys, carry, first, last)
        losses = np.asarray(branches(rates, keys, carry, 1 + jnp.arange(repeats)), float)
        for i, (rate, seed) in enumerate(runs):
            seen = snr_adam.report(jax.tree.map(lambda x, i=i: x[i], jax.device_get(carry[1]))).total
            interval = {key: _plain(seen[key]) for key in ("persistence_low", "persistence", "persistence_high")}
            row = {"workload": name, "rate": rate, "seed": seed, "step": last, **interval}
            rows.append(row | verdict(losses[i]))
        print(f"{name}: {last} of {looks[-1]} steps", file=sys.stderr, flush=True)
    return rows


def _plain(x) -> float | None:
    return float(x) if np.isfinite(x) else None


def verdict(losses) -> dict:
    """What the branches of one state have shown.

    losses: (repeats, 4), in the middle at the rate as it is, and at the end at this rate, half and twice.
    """
    middle, same, half, twice = np.nan_to_num(losses, nan=1e9, posinf=1e9).T
    better = {"half": half - same, "twice": twice - same, "falls": same - middle}
    ends = {"same_loss": same, "half_loss": half, "twice_loss": twice}
    return {key: float(np.mean(x)) for key, x in ends.items()} | {key: is_below_0(x) for key, x in better.items()}


def is_below_0(changes) -> bool:
    """Whether the 95 % confidence interval of their mean is."""
    n = len(changes)
    half = student.ppf(0.975, n - 1) * np.std(changes, ddof=1) / n**0.5
    return bool(np.mean(changes) + half < 0)


def kinds(rows: list[dict]) -> dict[str, list[dict]]:
    """The states by what `advise` may say of them."""

    def number(x, missing):
        return missing if x is None else x

    ends = [(number(row["persistence_low"], np.nan), number(row["persistence_high"], np.nan)) for row in rows]
    low, high = np.array(ends).reshape(-1, 2).T
    falls = np.array([row["falls"] for row in rows], bool)
    which = {
        "above .1, loss falls": (low > 0.1) & falls,
        "above .1, loss has stopped falling": (low > 0.1) & ~falls,
        "below .1, loss falls": (high < 0.1) & falls,
        "below .1, loss has stopped falling": (high < 0.1) & ~falls,
        "around .1": (low <= 0.1) & (high >= 0.1),
        "not known": np.isnan(low) | np.isnan(high),
    }
    return {key: [row for row, is_so in zip(rows, those, strict=True) if is_so] for key, those in which.items()}


def summary(rows: list[dict]) -> list[dict]:
    """How often which rate was better, by workloads and kind of state."""
    found = []
    for name, some in (
        ("two networks", [row for row in rows if row["workload"] in NETWORKS]),
        ("quadratic", [row for row in rows if row["workload"] not in NETWORKS]),
    ):
        for kind, those in kinds(some).items():
            if those:
                shares = {f"{key} better": float(np.mean([row[key] for row in those])) for key in ("twice", "half")}
                neither = float(np.mean([not (row["twice"] or row["half"]) for row in those]))
                found.append(
                    {"workload": name, "persistence": kind, "states": len(those), **shares, "neither": neither}
                )
    return found


def table(rows: list[dict]) -> str:
    shares = dict.fromkeys(("twice better", "half better", "neither"), ".0%")
    return markdown(summary(rows), {"workload": "", "persistence": "", "states": "d", **shares})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one start of the quadratic, a few steps; writes nothing")
    parser.add_argument("--json", type=Path, default=RESULTS / "persistence.json")
    options = parser.parse_args(arguments)
    if options.quick:
        print(table(measure("quadratic", 1, (30,), 4, 2)))
        return
    rows = [row for name in WORKLOADS for row in measure(name, SEEDS, LOOKS, AHEAD, REPEATS)]
    save(options.json, rows, batch=BATCH, ahead=AHEAD, repeats=REPEATS)
    print(table(rows))


if __name__ == "__main__":
    main()
