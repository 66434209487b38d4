"""`snr_adam.measure` times what it says, beside what it says."""

import argparse

import jax
import jax.numpy as jnp
import optax
import pytest

from snr_adam import measure


def test_a_step_that_does_ten_times_as_much_takes_longer():
    """The ratio is of one round's times, the first contender's is 1, and bytes are those of the state."""
    params = {"w": jax.ShapeDtypeStruct((128, 128), jnp.bfloat16), "b": jnp.zeros(3), "none": None}
    slow = optax.chain(*(optax.trace(0.9) for _ in range(30)))
    rows = measure.compare(params, 0.3, {"sgd": lambda: optax.sgd(0.1), "slow": lambda: slow})
    assert [row.name for row in rows] == ["sgd", "slow"]
    assert rows[0].ratio == rows[0].least == rows[0].most == 1
    assert 1 < rows[1].least <= rows[1].ratio <= rows[1].most
    assert rows[0].bytes_of_state == 0
    assert rows[1].bytes_of_state == pytest.approx(30 * (2 * 128 * 128 + 12) / (128 * 128 + 3))
    text = measure.table(rows, params)
    assert "16,387 bfloat16 and float32 parameters in 2 arrays" in text
    assert max(map(len, text.splitlines())) <= 100


def test_what_cannot_be_timed_is_refused():
    with pytest.raises(ValueError, match="no array with an element"):
        measure.compare({"w": jnp.zeros((0, 3))})
    with pytest.raises(ValueError, match="seconds=0"):
        measure.compare(jnp.ones(3), 0)
    for text in ("4096x", "a", "0", "3x-1"):
        with pytest.raises(argparse.ArgumentTypeError, match="give sizes as in 4096x4096"):
            measure._shape(text)
    assert measure._shape("3x4") == (3, 4)


def test_the_command_prints_the_table(capsys):
    measure.main(["64x64", "--seconds", "0.2"])
    out, err = capsys.readouterr()
    assert out.count("\n") == 2 + len(measure.CONTENDERS)
    assert "4,096 float32 parameters in 1 array\n" in out
    assert "about 0.2 s" in err
