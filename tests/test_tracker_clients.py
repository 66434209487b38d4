"""Real clients of experiment trackers take what there is to log, as docs/how_to/log_to_trackers.md has it, offline.

    python3 -m uv run --with wandb --with mlflow --with trackio pytest -m slow tests/test_tracker_clients.py

What they wrote is read back from their files and compared. A client that is not installed is left out.
"""

import json
import sqlite3
import struct

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event
from test_readme import CLIENTS, FENCE, PAGES

PAGE = FENCE.findall(PAGES["how_to/log_to_trackers.md"])


def wandb(folder, names) -> dict:
    """Of the records in a .wandb file: blocks of 32 KiB, each record with its checksum, length and kind."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    raw, at, text, found = path.read_bytes(), 7, b"", {}
    while at + 7 <= len(raw):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", raw[at : at + 7])
        text, at = text + raw[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last of several
            record, text = wandb_internal_pb2.Record.FromString(text), b""
            found |= {"|".join(x.nested_key) or x.key: json.loads(x.value_json) for x in record.history.item}
    for key, (counts, edges) in names["spread"].items():
        np.testing.assert_array_equal(found[f"{key}|values"], counts)
        np.testing.assert_allclose(found[f"{key}|bins"], edges)
    return found


def mlflow(folder, names) -> dict:
    (run,) = names["mlflow"].search_runs(output_format="list")
    return run.data.metrics


def trackio(folder, names) -> dict:
    with sqlite3.connect(folder / "trackio" / "signal.db") as table:
        ((step, metrics),) = table.execute("select step, metrics from metrics").fetchall()
    assert step == 20
    return json.loads(metrics)


def tensorboardX(folder, names) -> dict:
    (path,) = folder.glob("runs/*tfevents*")
    raw, at, found = path.read_bytes(), 0, {}
    while at < len(raw):
        (length,) = struct.unpack("<Q", raw[at : at + 8])
        event, at = Event.FromString(raw[at + 12 : at + 12 + length]), at + length + 16
        found |= {x.tag: x.simple_value for x in event.summary.value}
    assert {"layers/signal", "layers/noise", "layers/pseudo_snr"} <= set(found)
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # those of the clients are theirs
@pytest.mark.parametrize("read", [wandb, mlflow, tensorboardX, trackio])
def test_what_was_logged_comes_back(read, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip(read.__name__)
    names: dict = {}
    exec(PAGE[0], names)
    (code,) = [code for code in PAGE[1:] if CLIENTS.match(code)[1] == read.__name__]
    exec(code, names)
    logged = names["every_layer" if read is mlflow else "numbers"]
    found = read(tmp_path, names)
    assert len(logged) > 15
    assert {key: found[key] for key in logged} == pytest.approx(logged, rel=1e-6)
