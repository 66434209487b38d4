"""Compiles optimizer steps for a device that need not be there, and answers what XLA made of them.

python benchmarks/compile_for.py TARGET        answers lines of stdin, see `Compiler.answer`; runs nothing

It is started by `compiled.py`, in an environment that has the compiler for TARGET.
"""

import json
import math
import os
import re
import sys
import time
from importlib.metadata import distributions
from pathlib import Path

import jax
import optax
from common import serve
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from program import DEVICE, VECTOR, Program
from trees import tree_shapes

import snr_adam

SHAPES = {"v5e": "2x2", "v6e": "2x2", "v4": "2x2x1", "v5p": "2x2x1", "tpu7x": "2x2x1"}
NAMES = {name: getattr(snr_adam, name) for name in snr_adam.__all__} | {"optax": optax, "snr_adam": snr_adam}


def devices(target: str, number: int) -> list:
    """So many devices of a kind that is not there: TPUs by name, GPUs by the description in `targets`."""
    if target in SHAPES:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{target}:{SHAPES[target]}")
    else:
        described = (Path(__file__).parent / "targets" / f"{target}.txt").read_text()
        topology = topologies.get_topology_desc("target", "cuda", target_config=described, topology=f"1x1x{number}")
    return list(topology.devices[:number])


class Compiler:
    """The compiler for one target."""

    def __init__(self, target: str):
        self.target = target
        first = {"tree": "1024", "dtype": "float32", "step": "adamw(1e-3)", "mesh": 1, "passes": 1, "keep": None}
        self.answer(json.dumps(first))  # an error now if there is no such compiler; and the first takes longer

    def answer(self, question: str) -> dict:
        """What there is to know of a compiled step; of the question "versions", what it is compiled with.

        question: JSON with `tree`, `dtype`, the step as an expression, `mesh` (devices over which every parameter is
        split along its first axis; 1: one device), `passes` (how often the step's definition reads the gradient) and
        `keep`, a file for the compiled text or None.
        """
        if question == "versions":
            return {d.name: d.version for d in distributions() if re.match("jax|libtpu|optax|nvidia", d.name)}
        ask = json.loads(question)
        shapes, number = tree_shapes(ask["tree"]), ask["mesh"]
        mesh = jax.sharding.Mesh(devices(self.target, number), ("data",))
        split = {shape for shape in shapes if number > 1 and shape[0] % number == 0}

        def placed(x):
            spec = PartitionSpec("data") if x.shape in split else PartitionSpec()
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

        tx = eval(ask["step"], NAMES)
        params = [placed(jax.ShapeDtypeStruct(shape, ask["dtype"])) for shape in shapes]
        state = jax.tree.map(placed, jax.eval_shape(tx.init, params))

        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        jax.clear_caches()
        start = time.perf_counter()
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
        seconds = time.perf_counter() - start
        text = compiled.as_text()
        if ask["keep"]:
            Path(ask["keep"]).write_text(text)
        program, size = Program(text), sum(map(math.prod, shapes)) / number
        least = ((2 + ask["passes"]) * nbytes(params) + 2 * nbytes(state)) / number
        row = {
            "kernels": program.kernels,
            "conditionals": program.conditionals,
            "copied": program.copied,
            "temporary": compiled.memory_analysis().temp_size_in_bytes / size,
            "waiting": program.held(DEVICE) / size,
            "on_chip": program.held(VECTOR) / size,
            "moved": program.moved / size,
            "least": least / size,
            "compile_s": seconds,
        }
        return row | ({"collectives": program.collectives} if number > 1 else {})


def nbytes(tree) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def main() -> None:
    answers = os.dup(1)  # compilers print to stdout
    os.dup2(2, 1)
    sys.stdout = os.fdopen(answers, "w")
    serve(lambda: Compiler(sys.argv[1]).answer)


if __name__ == "__main__":
    main()
