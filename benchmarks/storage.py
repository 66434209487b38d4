"""How far the update strays from float32 moments when they rest in fewer bits, and what becomes of v when gradients
shrink.

    python benchmarks/storage.py        prints a Markdown table, writes benchmarks/results/storage.json

Gradients are independent normal numbers, 16,384 elements. The error is the root mean square of (update - float32
update) over that of the float32 update, once the averages have settled. "v after" is the mean over elements of v /
float32 v, 6,000 steps after the gradients have shrunk tenfold at b2 = .999; 1 is right. `nearest` is what casting
moments to bfloat16 by hand does.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from common import RESULTS, machine

import snr_adam


@dataclass(frozen=True)
class Nearest:
    """bfloat16 moments as people write them by hand: rounded to nearest."""

    def encode(self, mu, nu, dither):
        return mu.astype(jnp.bfloat16), nu.astype(jnp.bfloat16)

    def decode(self, mu, nu, dtype):
        return mu.astype(dtype), nu.astype(dtype)


STORAGES = {"float32": "float32", "bfloat16": "bfloat16", "packed": "packed", "bfloat16 nearest": Nearest()}
ELEMENTS = 16384


def runs(b2: float, steps: int, shrink_at: int | None = None):
    """After `steps` steps: each storage's last update and its v / float32's v."""
    txs = {
        name: snr_adam.scale_by_snr(noise=snr_adam.parts.RMS(b2, eps=0.0), storage=s) for name, s in STORAGES.items()
    }
    zero = jnp.zeros(ELEMENTS)
    key = jax.random.key(0)

    def step(states, t):
        g = jax.random.normal(jax.random.fold_in(key, t), (ELEMENTS,))
        g = g * jnp.where(t >= shrink_at, 0.1, 1.0) if shrink_at is not None else g
        new = {name: tx.update(g, states[name]) for name, tx in txs.items()}
        return {name: state for name, (_, state) in new.items()}, {name: u for name, (u, _) in new.items()}

    def last(states):
        states, _ = jax.lax.scan(lambda s, t: (step(s, t)[0], None), states, jnp.arange(steps - 1))
        return step(states, steps - 1)

    return jax.jit(last)({name: tx.init(zero) for name, tx in txs.items()})


def second_moment(name: str, state):
    """v of a state as float32."""
    plain = Nearest() if "nearest" in name else snr_adam.parts.Cast("float32", "float32")
    storage = snr_adam.parts.Packed() if name == "packed" else plain
    return storage.decode(state.mu, state.nu, jnp.float32)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS / "storage.json")
    args = parser.parse_args()
    rows = {name: {"storage": name} for name in STORAGES}
    for b2, steps in ((0.95, 500), (0.999, 8000), (0.9999, 40000)):
        _, updates = runs(b2, steps)
        for name, u in updates.items():
            exact = updates["float32"]
            rows[name][f"error_{b2}"] = float(jnp.sqrt(jnp.mean((u - exact) ** 2) / jnp.mean(exact**2)))
    states, _ = runs(0.999, 10000, shrink_at=4000)
    exact = second_moment("float32", states["float32"])
    for name, state in states.items():
        rows[name]["v_after"] = float(jnp.mean(second_moment(name, state) / exact))
    print("| storage | error b2=.95 | .999 | .9999 | v after |\n|---|--:|--:|--:|--:|")
    for row in rows.values():
        errors = " | ".join(f"{row[f'error_{b2}']:.2%}" for b2 in (0.95, 0.999, 0.9999))
        print(f"| {row['storage']} | {errors} | {row['v_after']:.4g} |")
    args.json.write_text(json.dumps({"machine": machine(), "rows": list(rows.values())}, indent=1) + "\n")


if __name__ == "__main__":
    main()
