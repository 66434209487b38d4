"""Real clients of experiment trackers take metrics, histograms and files of a run as they are, and give them back.

    python3 -m uv run --group trackers pytest -m slow tests/test_trackers.py

Nightly, because the clients are large; each is skipped where it is not installed. None needs an account or a network.
"""

import importlib.util
import json
import pathlib
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tracker_clients import CLIENTS, KEPT

import snr_adam
from snr_adam.telemetry import histograms

pytestmark = pytest.mark.slow
TAKES_NO_HISTOGRAM = ("mlflow, files", "mlflow, SQLite")
TAKES_NO_FILE = ("tensorboard", "trackio")


@pytest.fixture(scope="module")
def seen():
    """A run whose layers have awkward names: what was told at four steps, and its history."""
    params = {
        "encoder/~/linear": {"kernel": jnp.ones((3, 2))},
        "blocks[0]": jnp.ones(4),
        "a b%": jnp.ones(2),
        "schicht ä": jnp.ones(1),
    }
    tx = snr_adam.observe(snr_adam.adam(1e-3))
    update, state = jax.jit(tx.update), tx.init(params)
    rng, told, history = np.random.default_rng(0), [], snr_adam.History()
    for step in range(1, 25):
        grads = jax.tree.map(lambda p: jnp.asarray(0.3 + rng.normal(size=p.shape), p.dtype), params)
        _, state = update(grads, state, params)
        if step % 6 == 0:
            metrics = snr_adam.metrics(state, layers=True, batch_size=32)
            told.append((step, metrics, histograms(state, batch_size=32)))
            history.append(snr_adam.report(state, 32))
    return told, history


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_takes_all_of_it_and_gives_it_back(client, seen, tmp_path):
    told, history = seen
    name = client.partition(",")[0]
    if importlib.util.find_spec(name) is None:
        pytest.skip(
            f"{name} is not installed: python3 -m uv run --group trackers pytest -m slow tests/test_trackers.py"
        )
    (tmp_path / "told.pickle").write_bytes(pickle.dumps(told))
    history.save(tmp_path / "history.npz")
    history.page(tmp_path / "page.html")
    script = pathlib.Path(__file__).with_name("tracker_clients.py")
    done = subprocess.run([sys.executable, script, client, tmp_path], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    metrics = {
        key: {str(step): each[key] for step, each, _ in told if key in each} for _, each, _ in told for key in each
    }
    single = np.float32 if client == "tensorboard" else np.float64  # an event has a float
    assert found["metrics"].keys() == metrics.keys()
    for key, values in metrics.items():
        assert found["metrics"][key] == {step: single(x) for step, x in values.items()}
    if client not in TAKES_NO_HISTOGRAM:
        assert found["histograms"].keys() == told[0][2].keys()
        for step, _, each in told:
            for key, (counts, edges) in each.items():
                got_counts, got_edges = found["histograms"][key][str(step)]
                np.testing.assert_array_equal(got_counts, counts)
                np.testing.assert_allclose(got_edges, edges, rtol=1e-12)
    assert sorted(found["files"]) == ([] if client in TAKES_NO_FILE else sorted(KEPT))


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_a_data_frame_takes_the_rows(library, seen):
    frames = pytest.importorskip(library, reason=f"{library} is not installed: --group trackers")
    _, history = seen
    frame = frames.DataFrame(history.rows)
    assert frame.shape == (len(history) * len(history.names), 2 + len(history.columns))
    assert list(frame["name"])[: len(history.names)] == list(history.names)
    for key, values in history.columns.items():
        np.testing.assert_array_equal(np.asarray(frame[key], float), values.ravel())
    total = frames.DataFrame(dict(history.total))
    np.testing.assert_array_equal(np.asarray(total["snr"]), history.total["snr"])
