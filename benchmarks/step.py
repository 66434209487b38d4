"""How long one optimizer step takes: update and apply, parameters and state donated, everything jitted.

    python benchmarks/step.py chain        AdamW with clipping and skipping, as one trains with, against Optax's
    python benchmarks/step.py storages     AdamW with every storage, Optax, PyTorch and the floor
    python benchmarks/step.py observe      what telemetry adds
    python benchmarks/step.py presets      every optimizer
    python benchmarks/step.py leaves       1, 300 and 3,000 leaves: trace, lower, compile, first step, step
    python benchmarks/step.py storages --trees 10000 1000x1000 50000x5000 resnet50 gpt2 llama

Contenders take turns (`common.py`); `ratio` is the median over rounds of the time over that of `against` in the same
round. `observe` takes means from the very first step instead, because its looks grow rarer; its rounds are 64 steps.
Bytes per parameter are XLA's own count of the compiled step (`cost_analysis`), state bytes those of the live arrays.
`copy` is the floor: a program that only reads and writes as many bytes as packed storage must (24 per float32
parameter); `of_copy` is the bandwidth of a step, by XLA's count of its bytes, over that of the copy. Rows that cannot
be measured (torch is not installed, not enough memory) say so.
"""

import argparse
import math
import os
import statistics
from pathlib import Path
from typing import NamedTuple

import jax
from common import PRESETS, RESULTS, Worker, markdown, save, take_turns
from trees import tree_shapes

CONTENDERS = str(Path(__file__).parent / "contenders.py")


class Table(NamedTuple):
    """contenders: each with the one that its time is divided by. steps: in a round, None for about 0.1 s."""

    contenders: dict[str, str]
    trees: list[str]
    dtypes: list[str]
    rounds: int = 20
    steps: int | None = None
    mean: bool = False


def against(base: str, *names: str) -> dict[str, str]:
    return dict.fromkeys((base, *names), base)


STORAGES = against(
    "optax.adamw",
    "optax.adam",
    "snr_adam.adam packed",
    "snr_adam.adamw float32",
    "snr_adam.adamw bfloat16",
    "snr_adam.adamw packed",
    "snr_adam.adamw packed, flat",
    "optax.adam, 512 bits",
    "snr_adam.adamw packed, 512 bits",
    "snr_adam.adamw packed + remainder 16",
    "snr_adam.adamw packed + remainder 8",
    "torch.AdamW fused",
    "copy",
)
OBSERVED = {
    name: f"snr_adam.adamw {s}"
    for s in ("float32", "packed")
    for name in (f"snr_adam.adamw {s}", f"observe {s} every 1", f"observe {s} every 10")
}
BOTH = ["float32", "bfloat16"]
TABLES = {
    "chain": Table(against("optax chain", "guard float32", "guard bfloat16", "guard packed"), ["4096x4096"], BOTH),
    "storages": Table(STORAGES, ["4096x4096"], BOTH),
    "observe": Table(OBSERVED, ["4096x4096", "gpt2"], ["float32"], rounds=10, steps=64, mean=True),
    "presets": Table(
        against("optax.adamw", *(f"snr_adam.{p}" for p in PRESETS)), ["2048x2048"], ["float32"], rounds=20
    ),
    "leaves": Table(
        against("optax.adamw", "snr_adam.adamw float32", "snr_adam.adamw packed"),
        ["8192x4096", "300 leaves", "3000 leaves"],
        ["float32"],
        rounds=20,
    ),
}
COLUMNS = {
    **dict.fromkeys(("tree", "dtype", "contender"), ""),
    **dict.fromkeys(("ms", "ns_per_parameter"), ".3g"),
    "ratio": ".3f",
    "against": "",
    **dict.fromkeys(("bytes_moved", "bytes_state", "bytes_temporary", "bytes_peak"), ".1f"),
    **dict.fromkeys(("of_copy", "trace_s", "lower_s", "compile_s", "first_step_s"), ".2f"),
    "launches": "d",
    "error": "",
}


def fit_together(number: int, count: int, dtype: str) -> bool:
    """Whether so many contenders have room at once: parameter, gradient and moments each, and a process's own.

    The room is the host's, or the accelerator's where JAX's default device is one (whose process takes 0.6 GB there).
    """
    needed = number * (count * (16 if dtype == "float32" else 12) + 6e8)
    stats = jax.devices()[0].memory_stats()
    room = stats["bytes_limit"] if stats else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return needed < 0.9 * room


def parameters(table: Table, tree: str) -> int:
    """How many; of the transformers that are trained, about."""
    if next(iter(table.contenders)).startswith("train "):
        width, layers = map(int, tree.split("x"))
        return 12 * layers * width * width
    return sum(map(math.prod, tree_shapes(tree)))


def measure(table: Table, tree: str, dtype: str, builds: int = 1) -> list[dict]:
    """All contenders in one run; where they have no room together, in as few groups as can be, each with its bases."""
    count = parameters(table, tree)
    names = list(table.contenders)
    room = next((n for n in range(len(names), 2, -1) if fit_together(n, count, dtype)), 2)
    if room < len(names):
        rows: list[dict] = []
        for base in dict.fromkeys(table.contenders.values()):
            others = [name for name, its in table.contenders.items() if its == base != name]
            for start in range(0, len(others), room - 1):
                group = others[start : start + room - 1]
                rows += measure(table._replace(contenders=dict.fromkeys((base, *group), base)), tree, dtype, builds)
        first = {row["contender"]: row for row in reversed(rows)}
        return [first[name] for name in names]
    arguments = [[CONTENDERS, name, tree, dtype] for name in names]
    share = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.8 / len(names):.3f}"}  # of an accelerator's memory
    workers = {name: Worker(a, env=share) for name, a in zip(names, arguments, strict=True)}  # they set up side by side
    said = {name: [worker.answer()] for name, worker in workers.items()}
    able = {name: worker for name, worker in workers.items() if "error" not in said[name][0]}
    said |= take_turns(able, "build", builds)
    able = {name: worker for name, worker in able.items() if "error" not in said[name][0]}
    steps = table.steps or max(4, min(2000, int((7e7 if jax.default_backend() == "cpu" else 4e10) / count)))
    times = take_turns(able, str(steps), table.rounds)
    for worker in workers.values():
        worker.close()
    rows = []
    for name, base in table.contenders.items():
        row = {"contender": name, "tree": tree, "parameters": count, "dtype": dtype, **said[name][0]}
        if name in able:
            row |= {key: statistics.median(build[key] for build in said[name]) for key in said[name][0]}
        if name in able and base in able:
            row |= {"against": base, **timing(times[name], times[base], table.mean, steps)}
            row["ns_per_parameter"] = 1e6 * row["ms"] / count
        rows.append(row)
    return rows


def of_copy(rows: list[dict]) -> list[dict]:
    """The rows of one run with the bandwidth of each over that of the copy, both by XLA's count of their bytes."""
    speed = {row["contender"]: row["bytes_moved"] / row["ratio"] for row in rows if {"bytes_moved", "ratio"} <= {*row}}
    return [
        row | {"of_copy": speed[row["contender"]] / speed["copy"]} if {row["contender"], "copy"} <= {*speed} else row
        for row in rows
    ]


def timing(mine: list[float], base: list[float], mean: bool, steps: int) -> dict:
    """Time of a step and its ratio to the base's: medians over rounds, or means."""
    ratios = [a / b for a, b in zip(mine, base, strict=True)]
    return {
        "ms": 1e3 * (statistics.mean if mean else statistics.median)(mine) / steps,
        "ratio": sum(mine) / sum(base) if mean else statistics.median(ratios),
        "ratios": [min(ratios), max(ratios)],
        "rounds": len(ratios),
        "steps_per_round": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="+", choices=list(TABLES))
    parser.add_argument("--trees", nargs="*", help="4096x4096, 1e6 (flat), resnet50, gpt2, llama, '300 leaves'")
    parser.add_argument("--dtypes", nargs="*", choices=BOTH)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--builds", type=int, default=1, help="of every step in the table of leaves, medians")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for TABLE.json")
    args = parser.parse_args()
    for name in args.tables:
        table = TABLES[name]
        table = table._replace(trees=args.trees or table.trees, dtypes=args.dtypes or table.dtypes)
        table = table._replace(rounds=args.rounds or table.rounds)
        rows = []
        for tree in table.trees:
            for dtype in table.dtypes:
                rows += of_copy(measure(table, tree, dtype, args.builds if name == "leaves" else 1))
                save(args.results / f"{'step' if name == 'storages' else name}.json", rows)
        print(f"\n{name}\n\n{markdown(rows, COLUMNS)}", flush=True)


if __name__ == "__main__":
    main()
