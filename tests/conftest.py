"""Eight CPU devices for every test, and fixtures for 64-bit and strict promotion."""

import atexit
import gc
import os
import shutil
import sys
import tempfile

if sys.dont_write_bytecode and "PYTHONPYCACHEPREFIX" not in os.environ:
    # Workers and the fresh processes of several tests import JAX; where bytecode may not be written, they would all
    # compile it again, 2 s each. They share a folder that goes with the session.
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, sys.pycache_prefix, ignore_errors=True)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False

import jax
import pytest

# tracing makes millions of objects that live; looking through them for cycles every 700 was a tenth of the suite's time
gc.set_threshold(200_000, 20, 20)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")


def pytest_addoption(parser):
    """`--fuzz N`: how many random examples to draw, for `test_fuzz.py`; a time for `test_products.py`."""
    parser.addoption("--fuzz", type=int, default=0, help="draw this many new examples instead of a few fixed ones")
    parser.addoption("--fuzz-seconds", type=float, default=0, help="test_products.py: draw new products for so long")
    parser.addoption("--fuzz-from", type=int, default=0, help="test_products.py: the number of the first product")


TOGETHER = ("test_brute_force", "test_resume", "test_distributed", "test_examples", "test_adam_by_hand", "test_char_lm")
# sweeps of which the default run takes every nth case, and `-m "slow or not slow"` all
THINNED = {
    "test_a_bad_step_has_not_happened": 2,
    "test_a_form_does_not_change_bits": 3,
    "test_a_leaf_of_another_length_has_the_same_bits": 2,
    "test_a_storage_is_read_by_itself_alone": 2,
    "test_between_storages_and_learning_rates": 2,
    "test_in_every_wrapper": 2,
    "test_it_is_found_wherever_it_is": 2,
    "test_l1_reads_a_known_noise_scale": 6,
    "test_mixed_precision": 3,
    "test_moments_are_unbiased_at_every_step": 3,
    "test_no_bit_has_moved": 2,
    "test_nothing_changes": 4,
    "test_presets_in_narrow_storage": 4,
    "test_schedules_are_those_of_inject_hyperparams": 2,
    "test_the_same_on_any_number_of_devices": 5,
    "test_the_same_optimizer_goes_on": 2,
    "test_there_and_back": 2,
    "test_updates_are_optaxs_by_default": 2,
    "test_updates_are_optaxs_with_every_option": 2,
}


@pytest.hookimpl(tryfirst=True)  # before -m takes the slow ones away
def pytest_collection_modifyitems(items):
    """Files whose tests share what is slow to make stay in one process; of long sweeps a part is run by default."""
    seen: dict = {}
    for item in items:
        if (name := item.path.stem) in TOGETHER:
            item.add_marker(pytest.mark.xdist_group(name))
        name = getattr(item, "originalname", item.name)
        if name in THINNED:
            key = item.path, name
            seen[key] = seen.get(key, -1) + 1
            if seen[key] % THINNED[name]:
                item.add_marker(pytest.mark.slow)


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
