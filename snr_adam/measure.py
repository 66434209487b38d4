"""Which storage is fastest on this machine: times an optimizer step, one minute, and prints a table.

    python -m snr_adam.measure                                    one array of 2048 x 2048, float32
    python -m snr_adam.measure 4096x4096 768 --dtype bfloat16     arrays of these shapes

`compare` takes the parameters of a model of yours.

What is fastest depends on the machine: an accelerator is bound by the bytes that a step moves, a small network by the
work per call, a CPU by either or by arithmetic. So the contenders take turns, round by round, on parameters and
gradients that are made up, and the ratio to the first contender is taken within each round. State and parameters are
donated, as in training. The first steps, which compile, are not counted. On a CPU nothing else should compute
meanwhile.
"""

import argparse
import statistics
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from snr_adam._checks import check_whole
from snr_adam.optimizers import adamw
from snr_adam.telemetry.observe import observe

CONTENDERS = {
    "optax.adamw": lambda: optax.adamw(1e-3),
    "float32": lambda: adamw(1e-3),
    "bfloat16": lambda: adamw(1e-3, storage="bfloat16"),
    "packed": lambda: adamw(1e-3, storage="packed"),
    "packed, observed": lambda: observe(adamw(1e-3, storage="packed"), every=_every()),
}


_ROUNDS = 11


class Row(NamedTuple):
    """One contender: milliseconds per step, the time as a share of the first contender's (median over rounds and the
    least and largest), and bytes of state per parameter."""

    name: str
    milliseconds: float
    ratio: float
    least: float
    most: float
    bytes_of_state: float


def _every() -> int:
    """Each step is looked at on an accelerator, where it costs little, and one in ten on a CPU."""
    return 10 if jax.default_backend() == "cpu" else 1


def compare(params: Any, seconds: float = 60.0, contenders: dict | None = None) -> list[Row]:
    """Times a step of each contender on a tree like this, on the default device.

    Args:
      params: the parameters, a tree of arrays or of `jax.ShapeDtypeStruct`; only shapes and dtypes are used. Memory for
        parameters, gradients and one contender's state must be free.
      seconds: about how long it may take, compiling included, more than 0.
      contenders: from a name to a function that makes an optimizer; the storages of `adamw` beside `optax.adamw` if
        None. The first is what the others are compared with.

    Returns:
      A row for each.

    Raises:
      ValueError: if there is no array, or `seconds` is not more than 0.

    >>> rows = compare({"w": jnp.zeros((64, 64))}, seconds=0.5)
    >>> [row.name for row in rows][:3], rows[0].ratio, round(rows[3].bytes_of_state)
    (['optax.adamw', 'float32', 'bfloat16'], 1.0, 4)
    """
    shapes = jax.eval_shape(lambda: params)
    size = sum(x.size for x in jax.tree.leaves(shapes))
    if not size:
        raise ValueError("measure: params has no array with an element, so there is nothing to time")
    if not seconds > 0:
        raise ValueError(f"measure: seconds={seconds!r}: give more than 0")
    contenders = dict(contenders or CONTENDERS)
    begun = time.perf_counter()
    made = {name: _Contender(make(), shapes) for name, make in contenders.items()}
    for contender in made.values():
        contender.time(0)
    turn = max(seconds - (time.perf_counter() - begun), seconds / 4) / _ROUNDS / len(made)
    times = {name: [] for name in made}
    for _ in range(_ROUNDS):
        for name, contender in made.items():
            times[name].append(contender.time(turn))
    first = times[next(iter(made))]
    rows = []
    for name, each in times.items():
        ratios = [x / y for x, y in zip(each, first, strict=True)]
        state = made[name].bytes_of_state / size
        rows.append(
            Row(name, statistics.median(each) * 1e3, statistics.median(ratios), min(ratios), max(ratios), state)
        )
    return rows


class _Contender:
    """One optimizer's compiled step."""

    def __init__(self, tx, shapes):
        def begin():
            params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)
            return params, tx.init(params)

        def step(carry, grads):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.begin = jax.jit(begin)
        self.grads = jax.jit(lambda: jax.tree.map(lambda x: jnp.full(x.shape, 0.01, x.dtype), shapes))
        self.step = jax.jit(step, donate_argnums=0)
        self.bytes_of_state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(begin)[1]))

    def time(self, seconds: float) -> float:
        """Seconds per step, over about so many; the arrays are made for it and given back."""
        carry, grads = self.begin(), self.grads()
        for _ in range(8):
            carry = self.step(carry, grads)
        jax.block_until_ready(carry)
        begun, steps, batch = time.perf_counter(), 0, 1
        while (spent := time.perf_counter() - begun) < seconds or not steps:
            for _ in range(batch):
                carry = self.step(carry, grads)
            jax.block_until_ready(carry)
            steps, batch = steps + batch, min(2 * batch, 64)
        return spent / steps


def table(rows: list[Row], params: Any) -> str:
    """The rows as text."""
    leaves = jax.tree.leaves(jax.eval_shape(lambda: params))
    kinds = " and ".join(sorted({str(x.dtype) for x in leaves}))
    device = jax.devices()[0]
    lines = [
        f"One step of AdamW on {device.device_kind} ({device.platform}), {sum(x.size for x in leaves):,} {kinds} "
        f"parameters in {len(leaves)} array{'s' * (len(leaves) != 1)}",
        f"{'moments':18}{'ms per step':>12}{'time, ' + rows[0].name + ' = 1':>25}{'(least to most)':>18}"
        f"{'bytes/param':>13}",
    ]
    for row in rows:
        spread = f"({row.least:.2f} to {row.most:.2f})"
        lines.append(f"{row.name:18}{row.milliseconds:12.3f}{row.ratio:25.2f}{spread:>18}{row.bytes_of_state:13.1f}")
    return "\n".join(lines)


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(check_whole(f"measure: a size in {text}", int(n)) for n in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give sizes as in 4096x4096 or 768") from None


def main(arguments: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m snr_adam.measure", description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="*", type=_shape, default=[(2048, 2048)], help="such as 4096x4096 768")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of parameters")
    parser.add_argument("--seconds", type=float, default=60.0, help="about how long it may take")
    options = parser.parse_args(arguments)
    params = [jax.ShapeDtypeStruct(shape, jnp.dtype(options.dtype)) for shape in options.shapes]
    print(f"about {options.seconds:g} s ...", file=sys.stderr)
    print(table(compare(params, options.seconds), params))


if __name__ == "__main__":
    main()
