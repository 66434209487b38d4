"""Eight CPU devices for every test, and fixtures for 64-bit and strict promotion."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")


def pytest_addoption(parser):
    """`--fuzz N`: how many random examples to draw, for `test_fuzz.py`."""
    parser.addoption("--fuzz", type=int, default=0, help="draw this many new examples instead of a few fixed ones")


TOGETHER = ("test_resume", "test_distributed", "test_examples", "test_adam_by_hand", "test_char_lm")


def pytest_collection_modifyitems(items):
    """Files whose tests share what is slow to make stay in one process."""
    for item in items:
        if (name := item.path.stem) in TOGETHER:
            item.add_marker(pytest.mark.xdist_group(name))


@pytest.fixture
def x64():
    """Runs the test with 64-bit types enabled."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def strict_promotion():
    """Runs the test with implicit dtype promotion forbidden."""
    with jax.numpy_dtype_promotion("strict"):
        yield
