"""What XLA does without each trick of `_compiler`: every one is there for something that can be seen in the program.

Each test compiles a step as it is and again with one trick taken away. The tricks for accelerators are shown by
`test_accelerators.py`, that for rounding (`unseen_zero`) also by a mutant in `test_mutants.py`.
"""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import snr_adam
from snr_adam import _compiler, _norm, accumulation, step, transform

bits_module = sys.modules["snr_adam._bits"]
SHAPE = (1024, 1024)


def compiled(tx, shapes=(SHAPE,), dtype="float32"):
    """One training step with donated parameters and state."""
    params = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]

    def train(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(train, donate_argnums=(0, 1)).lower(params, jax.eval_shape(tx.init, params), params).compile()


def temporaries(tx, **options) -> float:
    """Bytes per parameter that a step needs beside its arguments and results."""
    return compiled(tx, **options).memory_analysis().temp_size_in_bytes / np.prod(SHAPE)


def test_without_unseen_zero_an_update_may_be_rounded_once(monkeypatch):
    """p + alpha m with Lion's sign: one rounding in one program, two when update and addition are compiled apart."""
    rng = np.random.default_rng(0)
    p, g = (jnp.asarray(rng.normal(size=1000), "float32") for _ in range(2))

    def differences():
        tx = snr_adam.descend(0.3, snr_adam.parts.EMA(0.9), snr_adam.parts.Unit())
        state = tx.init(p)
        apart = optax.apply_updates(p, jax.jit(tx.update)(g, state, p)[0])
        together = jax.jit(lambda p, g, s: optax.apply_updates(p, tx.update(g, s, p)[0]))(p, g, state)
        return np.sum(np.asarray(apart) != np.asarray(together))

    assert differences() == 0
    monkeypatch.setattr(transform, "unseen_zero", lambda t, dtype: jnp.zeros((), dtype) * -1.0)
    assert differences() > 0


def test_without_never_accumulate_copies_its_buffer(monkeypatch):
    tx = snr_adam.accumulate(snr_adam.adamw(1e-3), 4)
    with_it = temporaries(tx)
    monkeypatch.setattr(accumulation, "never", lambda x: jnp.bool_(False))
    assert temporaries(tx) >= with_it + 3.9


def test_without_after_a_look_on_cpu_copies_the_parameters(monkeypatch):
    tx = snr_adam.observe(snr_adam.adamw(1e-3))
    with_it = temporaries(tx)
    monkeypatch.setattr(_compiler, "after", lambda x, zero: x)
    assert with_it < 0.1
    assert temporaries(tx) >= with_it + 3.9


def test_without_one_by_one_a_guard_keeps_wide_copies_of_narrow_gradients(monkeypatch):
    tx = snr_adam.guard(snr_adam.adamw(1e-3), clip_norm=1.0)
    shapes = (SHAPE, SHAPE)
    with_it = temporaries(tx, shapes=shapes, dtype="bfloat16")
    monkeypatch.setattr(_norm, "one_by_one", lambda x, one: (x, one))
    assert temporaries(tx, shapes=shapes, dtype="bfloat16") > with_it + 1


def loops(program) -> int:
    """How many different loops there are: fused computations that are equal but for their names count once."""
    bodies = re.findall(r"^%?fused_computation[\w.]* .*?^}", program.as_text(), re.M | re.S)
    return len({re.sub(r"%[\w.\-]+|metadata={[^}]*}", "x", body.partition("\n")[2]) for body in bodies})


def test_without_hidden_every_leaf_has_loops_of_its_own(monkeypatch):
    """XLA writes a constant into the loop that uses it, and loops over equal shapes are then compiled one by one."""
    tx = snr_adam.adamw(1e-3, storage="packed")
    few, many = (loops(compiled(tx, shapes=[(64, 64)] * n)) for n in (2, 8))
    assert many == few
    monkeypatch.setattr(bits_module, "hidden", lambda count, make: make())
    few, many = (loops(compiled(tx, shapes=[(64, 64)] * n)) for n in (2, 8))
    assert many >= few + 6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64", "int32"])
def test_after_and_one_by_one_change_no_bit(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=50) * 3, dtype)
    zero = jax.jit(_compiler.not_yet)(jnp.int32(3))
    assert zero == 0
    np.testing.assert_array_equal(jax.jit(_compiler.after)(x, zero), x)
    np.testing.assert_array_equal(jax.jit(_compiler.one_by_one)(x, jnp.float32(1))[0], x)
    assert step.OPEN.ok is True
