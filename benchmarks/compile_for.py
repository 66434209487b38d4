"""Compiles optimizer steps for a device that need not be there, and answers what XLA made of them.

python benchmarks/compile_for.py TARGET        answers lines of stdin, see `answer`; runs nothing

It is started by `compiled.py`, in an environment that has the compiler for TARGET and its like.
"""

import contextlib
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


def answer(question: str) -> dict:
    """What there is to know of a compiled step; of the question "versions", what it is compiled with.

    question: JSON with `target`, `tree`, `dtype`, the step as an expression, `apply` (what adds its updates), `mesh`
    (devices over which every parameter is split along the first axis that they divide; 1: one device), `again` (what
    the step's definition reads twice: p, g, s for parameters, gradients, state), `without` (the names of tricks of
    `snr_adam._compiler` that are left out) and `keep`, a file for the compiled text or None.
    """
    if question == "versions":
        return {d.name: d.version for d in distributions() if re.match("jax|libtpu|optax|nvidia", d.name)}
    ask = json.loads(question)
    shapes, number = tree_shapes(ask["tree"]), ask["mesh"]
    mesh = jax.sharding.Mesh(devices(ask["target"], number), ("data",))
    split = set(shapes) if number > 1 else set()

    def placed(x):
        axis = next((i for i, n in enumerate(x.shape) if x.shape in split and n % number == 0), None)
        spec = PartitionSpec() if axis is None else PartitionSpec(*(None,) * axis, "data")
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    tx, apply = eval(ask["step"], NAMES), eval(ask["apply"], NAMES)
    params = [placed(jax.ShapeDtypeStruct(shape, ask["dtype"])) for shape in shapes]
    state = jax.tree.map(placed, jax.eval_shape(tx.init, params))

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return apply(params, state if apply is snr_adam.accumulation.apply_accumulated else updates), state

    jax.clear_caches()
    start = time.perf_counter()
    with left_out(ask["without"]):
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    seconds = time.perf_counter() - start
    text = compiled.as_text()
    if ask["keep"]:
        Path(ask["keep"]).write_text(text)
    program, size = Program(text), sum(map(math.prod, shapes)) / number
    bytes_ = {"p": nbytes(params), "g": nbytes(params), "s": nbytes(state)}
    least = 2 * (bytes_["p"] + bytes_["s"]) + bytes_["g"] + sum(bytes_[letter] for letter in ask["again"])
    row = {
        "kernels": program.kernels,
        "conditionals": program.conditionals,
        "copied": program.copied,
        "temporary": compiled.memory_analysis().temp_size_in_bytes / size,
        "waiting": program.held(DEVICE) / size,
        "on_chip": program.held(VECTOR) / size,
        "moved": program.moved / size,
        "least": least / number / size,
        "compile_s": seconds,
    }
    return row | ({"collectives": program.collectives} if number > 1 else {})


@contextlib.contextmanager
def left_out(tricks: list[str]):
    """Lets functions of `snr_adam._compiler` return their first argument as it is."""
    kept = {name: getattr(snr_adam._compiler, name) for name in tricks}
    for name in tricks:
        setattr(snr_adam._compiler, name, lambda x, *_: x)
    try:
        yield
    finally:
        for name, trick in kept.items():
            setattr(snr_adam._compiler, name, trick)


def ready(target: str):
    """`answer`, once it has compiled something: the first takes longer, or says that there is no such compiler."""
    first = {"tree": "1024", "dtype": "float32", "step": "adamw(1e-3)", "apply": "optax.apply_updates"}
    answer(json.dumps(first | {"target": target, "mesh": 1, "again": "", "without": [], "keep": None}))
    return answer


def nbytes(tree) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def main() -> None:
    answers = os.dup(1)  # compilers print to stdout
    os.dup2(2, 1)
    sys.stdout = os.fdopen(answers, "w")
    serve(lambda: ready(sys.argv[1]))


if __name__ == "__main__":
    main()
