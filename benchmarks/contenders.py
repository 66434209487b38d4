"""The contenders of `step.py` and `gpu.py`, by name, and the process that each runs in.

python benchmarks/contenders.py NAME TREE DTYPE        answers lines of stdin, see `work`
"""

import itertools
import math
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import PRESETS, ROOT, serve
from kernels import launches
from trees import tree_shapes

import snr_adam

HYPER = {"b1": 0.9, "b2": 0.999, "weight_decay": 0.01}


def adamw(storage: str):
    return snr_adam.adamw(1e-3, **HYPER, storage=storage)


def optax_chain():
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, **HYPER))
    return optax.apply_if_finite(tx, 10)


OPTIMIZERS = {
    "optax.adamw": lambda: optax.adamw(1e-3, **HYPER),
    "optax.adam": lambda: optax.adam(1e-3),
    "optax chain": optax_chain,
    "snr_adam.adam packed": lambda: snr_adam.adam(1e-3, storage="packed"),
    **{f"snr_adam.adamw {s}": lambda s=s: adamw(s) for s in ("float32", "bfloat16", "packed")},
    **{f"guard {s}": lambda s=s: snr_adam.guard(adamw(s), clip_norm=1.0) for s in ("float32", "bfloat16", "packed")},
    **{
        f"snr_adam.adamw packed + remainder {bits}": lambda b=bits: snr_adam.carry_remainder(adamw("packed"), b)
        for bits in ("16", "8")
    },
    **{
        f"observe {s} every {n}": lambda s=s, n=n: snr_adam.observe(adamw(s), every=n)
        for s in ("float32", "packed")
        for n in (1, 10)
    },
    "observe optax.adamw": lambda: snr_adam.observe(optax.adamw(1e-3, **HYPER)),
    "observe guard packed": lambda: snr_adam.observe(snr_adam.guard(adamw("packed"), clip_norm=1.0)),
    **{f"snr_adam.{preset}": lambda p=preset: getattr(snr_adam, p)(1e-3) for preset in PRESETS},
}


WIDE = ", 512 bits"  # a contender compiled for vectors of that width, of which a CPU has them or not


def company(leaves: int) -> list:
    """Twenty small arrays for a step of few leaves to take the sine of.

    XLA for CPU takes a program of a handful of parts one part after the other and a longer one, such as any training
    step is, in another way, which is slower. Without company what is measured would depend on how many small parts a
    contender adds.
    """
    return [jnp.ones(8) for _ in range(20)] if leaves < 20 and jax.default_backend() == "cpu" else []


def draw(shapes, dtype: str, by: float) -> dict:
    """Numbers about that large: many arrays by NumPy, which need not compile for each shape; few, which may be huge,
    by the device, in one kernel without temporaries."""
    if len(shapes) > 4:
        rng = np.random.default_rng(0)
        normal = (rng.standard_normal(shape, np.float32) for shape in shapes)
        return {str(i): jnp.asarray(x * np.float32(by), dtype) for i, x in enumerate(normal)}

    @jax.jit
    def waves():
        places = [jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape) for shape in shapes]
        return {str(i): (by * jnp.sin(x * jnp.float32(0.7))).astype(dtype) for i, x in enumerate(places)}

    return waves()


class Step:
    """A contender in JAX: `build` traces, lowers, compiles and takes a first step; then `run` takes n."""

    def __init__(self, name: str, shapes, dtype: str):
        self.tx = OPTIMIZERS[name.removesuffix(WIDE)]()
        self.options = {"xla_cpu_prefer_vector_width": 512} if name.endswith(WIDE) else {}
        self.count = sum(map(math.prod, shapes))
        self.params, self.grads = (draw(shapes, dtype, by) for by in (0.1, 0.01))
        self.others = company(len(shapes))
        self.state = self.tx.init(self.params)

    def build(self) -> dict:
        """Seconds of each stage, and what XLA says of the result."""

        def step(params, state, others, grads):  # donated arguments and results in one order: XLA pairs by position
            updates, state = self.tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, list(map(jnp.sin, others))

        jax.clear_caches()
        marks = [time.perf_counter()]
        stages = [jax.jit(step, donate_argnums=(0, 1, 2)).trace(self.params, self.state, self.others, self.grads)]
        marks.append(time.perf_counter())
        stages.append(stages[-1].lower())
        marks.append(time.perf_counter())
        self.compiled = stages[-1].compile(self.options)
        marks.append(time.perf_counter())
        self.run(1)
        marks.append(time.perf_counter())
        took = [b - a for a, b in itertools.pairwise(marks)]
        return dict(zip(("trace_s", "lower_s", "compile_s", "first_step_s"), took, strict=True)) | self.facts()

    def run(self, n: int) -> None:
        for _ in range(n):
            self.params, self.state, self.others = self.compiled(self.params, self.state, self.others, self.grads)
        jax.block_until_ready((self.params, self.state))

    def facts(self) -> dict:
        state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.state))
        memory = self.compiled.memory_analysis()
        facts = {
            "bytes_moved": self.compiled.cost_analysis()["bytes accessed"] / self.count,
            "bytes_temporary": memory.temp_size_in_bytes / self.count,
            "bytes_state": state / self.count,
            "bytes_peak": (
                memory.argument_size_in_bytes
                + memory.output_size_in_bytes
                - memory.alias_size_in_bytes
                + memory.temp_size_in_bytes
            )
            / self.count,
        }
        if jax.default_backend() != "cpu":
            facts["launches"] = launches(self.compiled.as_text())
        return facts


class Train(Step):
    """A whole training step of the transformer of `examples/char_lm.py`, forward, backward and update.

    size: "WIDTHxLAYERS", 1024x8 has 1.0e8 parameters. Matrices are multiplied as the device does by default.
    """

    def __init__(self, name: str, size: str, dtype: str):
        sys.path.insert(0, str(ROOT / "examples"))
        import char_lm
        from flax import nnx

        self.tx, self.options, self.others = OPTIMIZERS[name](), {}, []
        width, layers = map(int, size.split("x"))
        size = char_lm.Size(width, context=256, batch=32, layers=layers)
        graph, self.params = nnx.split(nnx.eval_shape(lambda: char_lm.Transformer(size, nnx.Rngs(0))))
        leaves, tree = jax.tree.flatten(self.params)
        self.params = jax.tree.unflatten(tree, draw([x.shape for x in leaves], dtype, 0.02).values())
        self.count = sum(x.size for x in leaves)
        text = np.random.default_rng(0).integers(256, size=(size.batch, size.context + 1))
        self.text = jnp.asarray(text, jnp.uint8)
        self.state = self.tx.init(self.params)

        def loss(params, text):
            logits = nnx.merge(graph, params)(text[:, :-1]).astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:].astype(jnp.int32)).mean()

        def step(params, state, text):
            updates, state = self.tx.update(jax.grad(loss)(params, text), state, params)
            return optax.apply_updates(params, updates), state

        self.step = jax.jit(step, donate_argnums=(0, 1))

    def build(self) -> dict:
        start = time.perf_counter()
        self.compiled = self.step.lower(self.params, self.state, self.text).compile()
        took = time.perf_counter() - start
        self.run(1)
        return {"compile_s": took} | self.facts()

    def run(self, n: int) -> None:
        for _ in range(n):
            self.params, self.state = self.compiled(self.params, self.state, self.text)
        jax.block_until_ready((self.params, self.state))


class Copy(Step):
    """Two passes that each read two words per parameter and write one: the traffic of packed storage."""

    def __init__(self, shapes, dtype: str):
        self.count = sum(map(math.prod, shapes))
        bits = jnp.uint32 if dtype == "float32" else jnp.uint16

        def step(params, words, others, grads):
            words = words ^ grads
            return params ^ words.astype(bits), words, list(map(jnp.sin, others))

        self.params, self.state, self.grads = (jnp.full(self.count, 1, kind) for kind in (bits, jnp.uint32, bits))
        self.others = company(1)
        self.lowered = jax.jit(step, donate_argnums=(0, 1, 2)).lower(self.params, self.state, self.others, self.grads)

    def build(self) -> dict:
        self.compiled = self.lowered.compile()
        self.run(1)
        return self.facts()


class Torch:
    """torch.optim.AdamW(fused=True), whose moments have the parameters' dtype, on a GPU where there is one."""

    def __init__(self, shapes, dtype: str):
        import torch

        self.device = "cuda" if torch.cuda.is_available() else "cpu"  # JAX is not asked: it would take memory there
        kind = {"dtype": getattr(torch, dtype), "device": self.device}
        self.params = [torch.nn.Parameter(torch.empty(shape, **kind).normal_(std=0.1)) for shape in shapes]
        for p in self.params:
            p.grad = torch.empty_like(p).normal_(std=0.01)
        decays = {"betas": (0.9, 0.999), "weight_decay": 0.01}
        self.optimizer = torch.optim.AdamW(self.params, lr=1e-3, **decays, fused=True)
        self.wait = torch.cuda.synchronize if self.device == "cuda" else lambda: None

    def run(self, n: int) -> None:
        for _ in range(n):
            self.optimizer.step()
        self.wait()

    def build(self) -> dict:
        self.run(1)
        return {"bytes_state": 2.0 * self.params[0].element_size()}


def work(name: str, tree: str, dtype: str) -> None:
    """A contender's process: asked to "build" it does and says what came of it; asked for n steps, the seconds."""

    def set_up():
        if name.startswith("train "):
            return respond_with(Train(name.removeprefix("train "), tree, dtype))
        shapes, kind = tree_shapes(tree), name.removesuffix(", flat")
        shapes = [(math.prod(shape),) for shape in shapes] if kind != name else shapes
        others = {"copy": Copy, "torch.AdamW fused": Torch}
        return respond_with(others[kind](shapes, dtype) if kind in others else Step(kind, shapes, dtype))

    def respond_with(contender):
        def respond(question: str):
            if question == "build":
                return contender.build()
            if int(question) < 64:
                contender.run(1)  # wakes threads and memory up after the wait; in 64 it does not show
            start = time.perf_counter()
            contender.run(int(question))
            return time.perf_counter() - start

        return respond

    serve(set_up)


if __name__ == "__main__":
    work(*sys.argv[1:])
