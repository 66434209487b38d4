"""What XLA makes of every step on accelerators, compiled for them here, where none is: nothing is run.

    python benchmarks/compiled.py                                   all of it (an hour on 2 cores), for H100, v5e, v6e
    python benchmarks/compiled.py --targets v5e --trees 4096x4096 --dtypes float32 --steps adamw "observe(adamw)"
    python benchmarks/compiled.py --targets h100 --expression 'adamw(optax.constant_schedule(1e-3))'

Prints a Markdown table and writes benchmarks/results/compiled.json after every row; rows of a part that is measured
anew replace those that were there. Needs Python and uv: compilers come from the dependency groups `tpu` (libtpu) and
`cuda` (the CUDA plugin and nvcc), into .venv-tpu and .venv-cuda beside the package, 0.9 GB and 1.6 GB. Where
SNR_ADAM_ENVIRONMENTS names a folder with environments `tpu` and `cuda`, these are taken as they are.

Per row, with bytes per parameter:

    kernels, conditionals
    temporary      by XLA's count, on TPU with 16 KiB for every scalar and every tuple
    waiting        arrays between kernels in the device's memory, by the text
    on_chip        about the most that is in a TPU's on-chip memory between kernels; it is no part of `temporary`
    moved          to and from the device's memory (`program.py`)
    least          what the step's definition needs: parameters and state read and written, the gradient read; once
                   more what is read before a norm of it is known
    compile_s      seconds to trace, lower and compile; `times` those of the step that is not watched
    computed_ms    the bytes moved over the memory's bandwidth: computed, not run
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from common import PRESETS, RESULTS, Worker, markdown, save
from trees import tree_shapes

HERE = Path(__file__).parent
ROOT = HERE.parent
ONE, GPT2 = "4096x4096", "gpt2"
DTYPES = ("float32", "bfloat16")
COLUMNS = {"target": "", "tree": "", "dtype": "", "step": "", "kernels": "d", "conditionals": "d", "temporary": ".3f"}
COLUMNS |= {
    "waiting": ".3f",
    "on_chip": ".2f",
    "moved": ".2f",
    "least": ".2f",
    "compile_s": ".1f",
    "times": ".1f",
    "computed_ms": ".3f",
}


class Target(NamedTuple):
    """A device: the dependency group that compiles for it, and its memory's bandwidth in bytes per second."""

    group: str
    bandwidth: float


TARGETS = {"h100": Target("cuda", 3.35e12), "v5e": Target("tpu", 0.82e12), "v6e": Target("tpu", 1.64e12)}


class Step(NamedTuple):
    """An optimizer as an expression, and the name of the same one unwatched.

    again: what its definition reads twice, g (gradients), p (parameters) or s (state). apply: what adds its updates.
    """

    expression: str
    base: str
    again: str = ""
    apply: str = "optax.apply_updates"


def _steps() -> dict[str, Step]:
    chain = "optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), 10)"
    steps = {"optax.adamw": Step("optax.adamw(1e-3)", "optax.adamw"), "optax chain": Step(chain, "optax chain", "g")}
    steps["observe(optax.adamw)"] = Step("observe(optax.adamw(1e-3))", "optax.adamw")
    for storage in ("", " bfloat16", " packed"):
        keeps = f", storage={storage.strip()!r}" if storage else ""
        adamw, clip, name = f"adamw(1e-3{keeps})", "clip_norm=1.0", f"adamw{storage}"
        steps |= {
            name: Step(adamw, name),
            f"guard({name})": Step(f"guard({adamw}, {clip})", f"guard({name})", "g"),
            f"observe({name})": Step(f"observe({adamw})", name),
            f"observe(guard({name}))": Step(f"observe(guard({adamw}, {clip}))", f"guard({name})", "g"),
            f"guard(observe({name}))": Step(f"guard(observe({adamw}), {clip})", f"guard({name})", "g"),
        }
    return steps


MAIN = _steps()
OTHERS = {preset: Step(f"{preset}(1e-3)", preset) for preset in PRESETS if preset != "adamw"} | {
    # what is a sum over the whole comes before the update
    **{name: Step(f"{name}(1e-3)", name, "ps") for name in ("lamb", "adamh")},
    **{name: Step(f"{name}(1e-3)", name, "gs") for name in ("stable_adamw", "cautious_adamw", "mars")},
    "carry_remainder 16": Step("carry_remainder(adamw(1e-3, storage='packed'), '16')", "carry_remainder 16"),
    "carry_remainder 8": Step("carry_remainder(adamw(1e-3, storage='packed'), '8')", "carry_remainder 8"),
    "averaged": Step("snr_adam.averaged(adamw(1e-3))", "averaged"),
    "guard, spikes": Step("guard(adamw(1e-3), clip_norm=1.0, spikes=snr_adam.Spikes())", "guard, spikes", "g"),
    "accumulate": Step("accumulate(adamw(1e-3), 4)", "accumulate"),
    "apply_accumulated": Step(
        "accumulate(adamw(1e-3), 4)", "apply_accumulated", "", "snr_adam.accumulation.apply_accumulated"
    ),
}
STEPS = MAIN | OTHERS


class Row(NamedTuple):
    tree: str
    dtype: str
    step: str


def table() -> list[Row]:
    """All rows of one target."""
    rows = [Row(ONE, dtype, step) for dtype in DTYPES for step in STEPS if step.split()[0] != "carry_remainder"]
    rows += [Row(ONE, "bfloat16", step) for step in STEPS if step.split()[0] == "carry_remainder"]
    return rows + [Row(GPT2, dtype, step) for dtype in DTYPES for step in MAIN]


class Unavailable(Exception):
    """An environment cannot be made; the message says why."""


def environment(group: str) -> Path:
    """The Python of the environment with this dependency group, which is made if it is not there."""
    if given := os.environ.get("SNR_ADAM_ENVIRONMENTS"):
        python = Path(given) / group / "bin" / "python"
        if not python.exists():
            raise Unavailable(f"SNR_ADAM_ENVIRONMENTS={given} has no environment {group!r}")
        return python
    folder = ROOT / f".venv-{group}"
    uv = os.environ.get("UV") or shutil.which("uv")
    command = [uv] if uv else [sys.executable, "-m", "uv"]
    command += ["sync", "--frozen", "--no-default-groups", "--no-install-project", "--group", group]
    command += ["--python", f"{sys.version_info.major}.{sys.version_info.minor}"]
    env = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    done = subprocess.run(
        command, cwd=ROOT, env=env | {"UV_PROJECT_ENVIRONMENT": str(folder)}, capture_output=True, text=True
    )
    if done.returncode:
        said = " ".join(done.stderr.split())
        raise Unavailable(f"no environment for the dependency group {group!r}: uv said: {said[-400:]}")
    return folder / "bin" / "python"


class Compilers:
    """A process for each environment, started when it is first asked. They take turns: one row at a time."""

    def __init__(self, keep: Path | None = None):
        self.keep = keep
        self.workers: dict[str, Worker] = {}

    def worker(self, target: str) -> Worker:
        group = TARGETS[target].group
        if group not in self.workers:
            path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
            env = os.environ | {"PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3"}
            env |= {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
            env |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # as long as there is no TPU
            env |= {"JAX_PLATFORMS": "cpu" if group == "tpu" else ""}
            env["XLA_FLAGS"] = "--xla_gpu_autotune_level=0" if group == "cuda" else ""  # there is nothing to time on
            python = environment(group)
            worker = Worker([HERE / "compile_for.py", target], python, env=env, stderr=subprocess.DEVNULL)
            ready = worker.answer()
            if "error" in ready:
                worker.close()
                raise RuntimeError(f"the environment {group!r} does not compile for {target}: {ready['error']}")
            self.workers[group] = worker
        return self.workers[group]

    def ask(self, target: str, tree: str, dtype: str, step: Step, mesh: int = 1, without: tuple[str, ...] = ()) -> dict:
        """What `compile_for.answer` says."""
        name = "".join(
            c if c.isalnum() else "_" for c in f"{target} {tree} {dtype} {mesh} {step.expression} {step.apply[-12:]}"
        )
        keep = self.keep and str(self.keep.resolve() / f"{name}.txt")
        question = {"target": target, "tree": tree, "dtype": dtype, "step": step.expression, "mesh": mesh}
        question |= {"again": step.again, "apply": step.apply, "without": without, "keep": keep}
        return self.worker(target).ask(json.dumps(question))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for worker in self.workers.values():
            with contextlib.suppress(BrokenPipeError):
                worker.close()


def measure(compilers: Compilers, target: str, rows: list[Row]) -> Iterator[dict]:
    """The table's rows, one by one."""
    seconds: dict[Row, float] = {}
    for row in rows:
        step = STEPS[row.step]
        found = compilers.ask(target, row.tree, row.dtype, step)
        if "error" not in found:
            seconds[row] = found["compile_s"]
            size = sum(map(math.prod, tree_shapes(row.tree)))
            found["computed_ms"] = 1e3 * found["moved"] * size / TARGETS[target].bandwidth
            base = seconds.get(row._replace(step=step.base))
            if base and step.base != row.step:
                found["times"] = found["compile_s"] / base
        yield {"target": target} | row._asdict() | found


def merged(path: Path, rows: list[dict]) -> list[dict]:
    """The rows of a file with new ones in the places of those of the same name."""
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    key = ("target", "tree", "dtype", "step")
    found = {tuple(row[k] for k in key): row for row in (*old, *rows)}
    order = [(target, *row) for target in TARGETS for row in table()]
    return sorted(found.values(), key=lambda row: order.index(tuple(row[k] for k in key)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--trees", nargs="*", default=[ONE, GPT2], choices=[ONE, GPT2])
    parser.add_argument("--dtypes", nargs="*", default=DTYPES, choices=DTYPES)
    parser.add_argument("--steps", nargs="*", default=list(STEPS), choices=list(STEPS), metavar="STEP")
    parser.add_argument("--expression", help="one step of your own, printed and not written")
    parser.add_argument("--keep", type=Path, help="folder for the compiled texts")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for compiled.json")
    args = parser.parse_args()
    path, done = args.results / "compiled.json", []
    wanted = [row for row in table() if row.tree in args.trees and row.dtype in args.dtypes and row.step in args.steps]
    if args.expression:
        STEPS[args.expression] = Step(args.expression, args.expression)
        wanted = [Row(tree, dtype, args.expression) for tree in args.trees for dtype in args.dtypes]
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
    used: dict[str, dict] = {}
    with Compilers(args.keep) as compilers:
        for target in args.targets:
            used[target] = compilers.worker(target).ask("versions")
            for row in measure(compilers, target, wanted):
                done.append(row)
                print(f"{len(done)} of {len(args.targets) * len(wanted)}:", *list(row.values())[:4], file=sys.stderr)
                if not args.expression:
                    save(path, merged(path, done), computed_ms="computed from bytes and bandwidth, not run", **used)
    print(markdown(done, COLUMNS))


if __name__ == "__main__":
    main()
