"""How long one optimizer step takes: update and apply, parameters and state donated, everything jitted.

Every contender runs in a process of its own and waits there; the parent lets them run one after the other, round by
round, so that all see the same machine in the same minute. A number counts only against the others of its run: the
tables give the median over rounds of the ratio to `optax.adamw` of the same dtype.

    python benchmarks/step.py                          16.8M parameters in one leaf, float32 and bfloat16
    python benchmarks/step.py --sizes 1e4 1e6 2.5e8    other sizes
    python benchmarks/step.py --trees resnet50 gpt2 llama

Bytes per parameter are XLA's own count of the compiled step (`cost_analysis`), state bytes those of the live arrays.
`copy` is the floor: a program that only reads and writes as many bytes as packed storage must (24 per float32
parameter). Rows that cannot be measured (torch is not installed, not enough memory) say so.
"""

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
CONTENDERS = (
    "optax.adamw",
    "optax.adam",
    "snr_adam.adam packed",
    "snr_adam.adamw float32",
    "snr_adam.adamw bfloat16",
    "snr_adam.adamw packed",
    "snr_adam.adamw packed + remainder 8",
    "torch.AdamW fused",
    "copy",
)


def tree_shapes(name: str) -> list[tuple[int, ...]]:
    """The parameter shapes of a well-known model, or of one leaf of that many parameters."""
    if name == "resnet50":
        shapes = [(7, 7, 3, 64), (64,), (64,)]
        width_in = 64
        for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
            for block in range(blocks):
                convs = [(1, 1, width_in, width), (3, 3, width, width), (1, 1, width, 4 * width)]
                convs += [(1, 1, width_in, 4 * width)] if block == 0 else []
                for conv in convs:
                    shapes += [conv, (conv[-1],), (conv[-1],)]
                width_in = 4 * width
        return [*shapes, (2048, 1000), (1000,)]
    if name == "gpt2":
        block = [(768,), (768,), (768, 2304), (2304,), (768, 768), (768,), (768,), (768,)]
        block += [(768, 3072), (3072,), (3072, 768), (768,)]
        return [(50257, 768), (1024, 768), *block * 12, (768,), (768,)]
    if name == "llama":  # the leaves of a 32-layer Llama, at a width that fits a laptop
        block = [(512, 512)] * 4 + [(512, 1408)] * 2 + [(1408, 512), (512,), (512,)]
        return [(32000, 512), *block * 32, (512,), (512, 32000)]
    return [(int(float(name)),)]


def jax_contender(name: str, shapes, dtype: str):
    """(run n steps, facts about the compiled step) of a JAX contender."""
    import jax
    import optax

    import snr_adam

    hyper = {"b1": 0.9, "b2": 0.999, "weight_decay": 0.01}
    maker, _, storage = name.partition(" ")
    library, preset = maker.split(".")
    options = hyper if preset == "adamw" else {}
    if library == "optax":
        tx = getattr(optax, preset)(1e-3, **options)
    else:
        tx = getattr(snr_adam, preset)(1e-3, **options, storage=storage.split(" + ")[0])
        tx = snr_adam.carry_remainder(tx, "8") if "remainder" in storage else tx

    def step(params, state, grads):  # donated arguments and results in the same order: XLA pairs buffers by position
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    keys = iter(jax.random.split(jax.random.key(0), 2 * len(shapes)))
    draw = jax.jit(lambda key, shape, scale: (jax.random.normal(key, shape) * scale).astype(dtype), static_argnums=1)
    params = {str(i): draw(next(keys), shape, 0.1) for i, shape in enumerate(shapes)}
    grads = {str(i): draw(next(keys), shape, 0.01) for i, shape in enumerate(shapes)}
    carry = [params, jax.jit(tx.init)(params)]
    count = sum(math.prod(shape) for shape in shapes)
    marks = [time.perf_counter()]
    traced = jax.jit(step, donate_argnums=(0, 1)).trace(*carry, grads)
    marks.append(time.perf_counter())
    lowered = traced.lower()
    marks.append(time.perf_counter())
    compiled = lowered.compile()
    marks.append(time.perf_counter())
    facts = {
        "bytes_moved": compiled.cost_analysis()["bytes accessed"] / count,
        "bytes_temporary": compiled.memory_analysis().temp_size_in_bytes / count,
        "bytes_state": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(carry[1])) / count,
        "trace_s": marks[1] - marks[0],
        "lower_s": marks[2] - marks[1],
        "compile_s": marks[3] - marks[2],
    }

    def run(n: int):
        for _ in range(n):
            carry[0], carry[1] = compiled(carry[0], carry[1], grads)
        jax.block_until_ready(carry)

    return run, facts


def copy_contender(shapes, dtype: str):
    """Two passes that each read two words per parameter and write one: the traffic of packed storage."""
    import jax
    import jax.numpy as jnp

    count = sum(math.prod(shape) for shape in shapes)
    bits = jnp.uint32 if dtype == "float32" else jnp.uint16
    carry = [jnp.zeros(count, jnp.uint32), jnp.zeros(count, bits)]
    grads = jnp.ones(count, bits)

    @jax.jit
    def step(words, params, grads):
        words = words ^ grads
        return words, params ^ words.astype(bits)

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*carry, grads).compile()

    def run(n: int):
        for _ in range(n):
            carry[0], carry[1] = compiled(carry[0], carry[1], grads)
        jax.block_until_ready(carry)

    return run, {"bytes_moved": compiled.cost_analysis()["bytes accessed"] / count, "bytes_state": 4.0}


def torch_contender(shapes, dtype: str):
    """torch.optim.AdamW(fused=True), whose moments have the parameters' dtype."""
    import torch

    params = [torch.nn.Parameter((torch.randn(shape) * 0.1).to(getattr(torch, dtype))) for shape in shapes]
    for p in params:
        p.grad = (torch.randn(p.shape) * 0.01).to(p.dtype)
    optimizer = torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01, fused=True)

    def run(n: int):
        for _ in range(n):
            optimizer.step()

    run(1)
    return run, {"bytes_state": 2.0 * params[0].element_size()}


def work(name: str, tree: str, dtype: str) -> None:
    """A contender's process: sets up, then runs as many steps as each line of stdin says, and answers with seconds."""
    shapes = tree_shapes(tree)
    try:
        if name == "copy":
            run, facts = copy_contender(shapes, dtype)
        elif name.startswith("torch"):
            run, facts = torch_contender(shapes, dtype)
        else:
            run, facts = jax_contender(name, shapes, dtype)
        run(2)
    except ImportError as error:
        print(json.dumps({"error": f"not measured: {error}"}), flush=True)
        return
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        run(1)  # wakes threads and memory up after the wait
        start = time.perf_counter()
        run(int(line))
        print(time.perf_counter() - start, flush=True)


def memory_needed(count: int, dtype: str) -> float:
    """Bytes that all contenders of a run hold together, roughly."""
    return count * (4 if dtype == "float32" else 2) * 2 * len(CONTENDERS) + count * 44


def measure(tree: str, dtype: str, rounds: int, contenders) -> list[dict]:
    """One interleaved run over all contenders."""
    count = sum(math.prod(shape) for shape in tree_shapes(tree))
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if memory_needed(count, dtype) > 0.9 * available:  # leave out what is there for comparison only
        contenders = [c for c in contenders if c in ("optax.adamw", "snr_adam.adamw float32", "snr_adam.adamw packed")]
    workers, rows = {}, []
    for name in contenders:
        command = [sys.executable, __file__, "--work", name, tree, dtype]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        facts = json.loads(worker.stdout.readline() or '{"error": "not measured: the process ended"}')
        rows.append({"contender": name, "tree": tree, "parameters": count, "dtype": dtype, **facts})
        if "error" not in facts:
            workers[name] = worker
    times: dict[str, list[float]] = {name: [] for name in workers}
    steps = max(4, min(2000, int(2.5e8 / count)))
    for done in range(rounds):
        for name, worker in workers.items():
            print(f"{steps}", file=worker.stdin, flush=True)
            times[name].append(float(worker.stdout.readline()) / steps)
        if sys.stderr.isatty():
            print(f"\r{tree} {dtype}: round {done + 1} of {rounds} ", end="", file=sys.stderr, flush=True)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    for row in rows:
        if row["contender"] in times:
            mine, base = times[row["contender"]], times["optax.adamw"]
            row["ms"] = 1e3 * statistics.median(mine)
            row["ratio"] = statistics.median(a / b for a, b in zip(mine, base, strict=True))
    return rows


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = [
        "| tree | dtype | step | ms | time / optax.adamw | bytes moved | state bytes | temporaries |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        forms = {"ms": ".3g", "ratio": ".2f", "bytes_moved": ".1f", "bytes_state": ".1f", "bytes_temporary": ".1f"}
        cells = [f"{row[key]:{form}}" if key in row else "-" for key, form in forms.items()]
        if "error" in row:
            cells[0] = row["error"]
        lines.append(f"| {row['tree']} | {row['dtype']} | {row['contender']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machine() -> dict:
    """Where and with what a result was measured."""
    from importlib.metadata import version

    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = {line.split(":")[1].strip() for line in lines if "model name" in line}
    return {
        "date": datetime.date.today().isoformat(),
        "processor": ", ".join(sorted(names)) or platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "optax")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="*", default=["16777216"], help="parameters in one leaf")
    parser.add_argument("--trees", nargs="*", default=[], choices=["resnet50", "gpt2", "llama"])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--contenders", nargs="*", default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", type=Path, default=RESULTS / "step.json")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(*args.work)
        return
    rows = []
    for tree in [*args.sizes, *args.trees]:
        for dtype in args.dtypes:
            rows += measure(tree, dtype, args.rounds, args.contenders)
    print(table(rows))
    args.json.parent.mkdir(exist_ok=True)
    args.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
