"""One optimizer step of a model with 1.24 billion parameters, on the machine at hand: time, and memory against paper.

    python benchmarks/billion.py        prints a few lines, writes benchmarks/results/billion.json

The tree is that of Llama 3.2 1B: 16 layers of width 2,048, MLPs of 8,192, 8 heads of keys and values for 32 of
queries, 128,256 tokens with one table for both ends. Parameters and gradients are bfloat16, moments packed, the step
donated: 2 + 2 + 4 bytes per parameter at rest and not much besides, which is what the peak of resident memory shows,
from the start of the process to its end. On paper (`snr_adam.plan`) are the bytes at rest and those that a step moves.
"""

import argparse
import json
import math
import resource
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from common import RESULTS, machine

import snr_adam
from snr_adam.plan import BYTES, STORAGES, Setup, plan

WIDTH, WIDE, KEYS = 2048, 8192, 512


def shapes(layers: int, vocabulary: int) -> dict:
    """The parameters' shapes."""
    layer = {
        "attention": {"q": (WIDTH, WIDTH), "k": (WIDTH, KEYS), "v": (WIDTH, KEYS), "o": (WIDTH, WIDTH)},
        "mlp": {"gate": (WIDTH, WIDE), "up": (WIDTH, WIDE), "down": (WIDE, WIDTH)},
        "norms": [(WIDTH,), (WIDTH,)],
    }
    return {"tokens": (vocabulary, WIDTH), "layers": [layer] * layers, "norm": (WIDTH,)}


def fill(tree, dtype: str, scale: float):
    """Arrays of these shapes, made in place: a generator of random numbers would need room for its words."""

    @jax.jit
    def make():
        def array(shape):
            index = sum(
                jax.lax.broadcasted_iota(jnp.float32, shape, axis) * (axis + 0.37) for axis in range(len(shape))
            )
            return (scale * jnp.sin(index)).astype(dtype)

        return jax.tree.map(array, tree, is_leaf=_is_shape)

    return make()


def peak() -> int:
    """The most memory that this process has had resident, in bytes (on Linux, VmHWM)."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(options) -> dict:
    """Builds the tree, compiles the step, runs it, and sets what was seen beside the plan."""
    before = peak()
    tx = snr_adam.adamw(1e-4, b2=0.95, weight_decay=0.1, storage=options.storage)
    tree = shapes(options.layers, options.vocabulary)
    params, grads = fill(tree, options.dtype, 0.02), fill(tree, options.dtype, 1e-3)
    state = jax.jit(tx.init)(params)
    count = sum(p.size for p in jax.tree.leaves(params))

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    begin = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, grads).compile()
    compile_s, seconds = time.perf_counter() - begin, []
    for _ in range(options.steps):
        begin = time.perf_counter()
        params, state = jax.block_until_ready(compiled(params, state, grads))
        seconds.append(time.perf_counter() - begin)
    paper = plan(Setup(count, 1, options.storage, "replicated", options.dtype))
    return {
        "parameters": count,
        "arrays": len(jax.tree.leaves(params)),
        "storage": options.storage,
        "dtype": options.dtype,
        "step_s": statistics.median(seconds),
        "steps_s": seconds,
        "compile_s": compile_s,
        "peak_bytes": peak(),
        "peak_bytes_before": before,
        "paper_bytes": paper.at_rest,
        "peak_over_paper": peak() / paper.at_rest,
        "moved_bytes": compiled.cost_analysis()["bytes accessed"],
        "paper_moved_bytes": paper.moved,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--storage", choices=sorted(STORAGES), default="packed")
    parser.add_argument("--dtype", choices=sorted(BYTES), default="bfloat16", help="of parameters and gradients")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--json", type=Path, default=RESULTS / "billion.json")
    options = parser.parse_args(arguments)
    tree = shapes(options.layers, options.vocabulary)
    count = sum(map(math.prod, jax.tree.leaves(tree, is_leaf=_is_shape)))
    needed = plan(Setup(count, 1, options.storage, "replicated", options.dtype)).at_rest
    print(
        f"{count:,} parameters in {options.dtype}, moments {options.storage}: {needed / 1e9:.2f} GB on paper",
        flush=True,
    )
    row = measure(options)
    print(
        f"time per step {row['step_s']:.3f} s (median of {options.steps}), {row['moved_bytes'] / 1e9:.1f} GB moved by "
        f"XLA's count, {row['paper_moved_bytes'] / 1e9:.1f} on paper: "
        f"{row['moved_bytes'] / row['step_s'] / 1e9:.1f} GB/s\n"
        f"peak resident memory {row['peak_bytes'] / 1e9:.2f} GB, {row['peak_over_paper']:.3f} of the paper's "
        f"{row['paper_bytes'] / 1e9:.2f} GB; {row['peak_bytes_before'] / 1e9:.2f} GB of it were Python, JAX and NumPy; "
        f"temporaries of the step {row['temporary_bytes'] / 1e6:.3f} MB"
    )
    options.json.parent.mkdir(exist_ok=True)
    options.json.write_text(json.dumps({"machine": machine(), "rows": [row]}, indent=1) + "\n")


def _is_shape(x) -> bool:
    return isinstance(x, tuple)


if __name__ == "__main__":
    main()
