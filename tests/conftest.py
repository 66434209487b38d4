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
    "test_16_bits_are_float32": 2,
    "test_a_bad_step_has_not_happened": 3,
    "test_a_floor_is_the_sum_of_squared_weights": 2,
    "test_a_form_does_not_change_bits": 3,
    "test_a_known_signal_is_in_the_interval": 2,
    "test_a_leaf_of_another_length_has_the_same_bits": 2,
    "test_a_mutant_is_caught": 3,
    "test_a_storage_is_read_by_itself_alone": 2,
    "test_an_injected_decay_that_stays_is_a_constant_one": 2,
    "test_an_observation_is_one_all_reduce": 2,
    "test_an_observed_run_goes_on": 2,
    "test_an_update_has_its_gradients_type_and_no_nan": 2,
    "test_apply_accumulated_gives_the_bits_of_apply_updates": 2,
    "test_between_storages_and_learning_rates": 2,
    "test_derivatives_are_those_of_the_recursion": 2,
    "test_derivatives_through_wrappers": 2,
    "test_descents_are_their_equations_alone_and_nested": 2,
    "test_error_of_the_packed_update": 2,
    "test_every_noise_keeps_the_shape_it_shares": 2,
    "test_every_number_is_that_of_a_recursion": 2,
    "test_every_position_is_seen_and_remembered": 2,
    "test_full_batch_descent_shows_what_its_moments_are": 2,
    "test_in_a_scan_with_clipping_the_bits_are_those_of_single_steps": 2,
    "test_in_any_order": 2,
    "test_in_every_wrapper": 2,
    "test_it_is_found_wherever_it_is": 2,
    "test_l1_reads_a_known_noise_scale": 6,
    "test_linen": 2,
    "test_mixed_precision": 3,
    "test_moments_are_unbiased_at_every_step": 3,
    "test_nnx": 2,
    "test_nnx_optimizer_with_sharded_parameters": 2,
    "test_no_bit_has_moved": 4,
    "test_nothing_changes": 8,
    "test_nothing_changes_for_other_dtypes": 3,
    "test_observed": 2,
    "test_one_that_was_pickled_takes_the_same_steps": 3,
    "test_pair": 3,
    "test_parts_observed_one_by_one_are_reported_together": 2,
    "test_presets_in_narrow_storage": 4,
    "test_pure_noise_stands_on_its_floor": 2,
    "test_pure_noise_stands_on_the_floor_that_is_shown": 2,
    "test_schedules_are_those_of_inject_hyperparams": 2,
    "test_sharded": 2,
    "test_sharded_and_replicated_report_the_same": 2,
    "test_sharded_it_is_the_same": 2,
    "test_sparse_noise_is_not_called_significant": 2,
    "test_the_floor_is_what_pure_noise_shows": 2,
    "test_the_layer_axis_is_never_shared": 2,
    "test_the_predicted_error_is_the_measured_one": 2,
    "test_the_same_bits_on_every_mesh": 2,
    "test_the_same_on_any_number_of_devices": 5,
    "test_the_same_optimizer_goes_on": 2,
    "test_the_snr_does_not_depend_on_what_the_optimizer_does": 2,
    "test_the_snr_is_right": 2,
    "test_there_and_back": 2,
    "test_updates_are_optaxs_by_default": 2,
    "test_updates_are_optaxs_with_every_option": 2,
    "test_weights_are_those_of_the_recursion_in_60_digits": 2,
    "test_what_was_there_keeps_its_bits": 2,
    "test_zeros_have_a_derivative": 2,
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
