"""What real clients of experiment trackers take, and give back; `test_trackers.py` runs it, in a process for each.

    python tests/tracker_clients.py CLIENT FOLDER      logs what is in FOLDER/told.pickle, and reads it back

FOLDER/told.pickle holds a list of (step, metrics, histograms). FOLDER/found.json then holds {"metrics": {key: {step:
value}}, "histograms": {key: {step: [counts, edges]}}, "files": names}, as the client has stored them.
"""

import json
import os
import pickle
import struct
import sys
from pathlib import Path

KEPT = ("history.npz", "page.html")


def _found():
    return {"metrics": {}, "histograms": {}, "files": []}


def _keep(found, kind, key, step, value):
    found[kind].setdefault(key, {})[str(step)] = value


def wandb(told, folder: Path):
    """W&B, offline: what it would send is in a log of protocol buffers."""
    os.environ |= {f"WANDB_{key}_DIR": str(folder) for key in ("DATA", "CACHE", "CONFIG")}
    import wandb
    from wandb.proto import wandb_internal_pb2 as protocol

    run = wandb.init(project="snr_adam", dir=folder, mode="offline")
    for step, metrics, histograms in told:
        run.log({**metrics, **{key: wandb.Histogram(np_histogram=x) for key, x in histograms.items()}}, step=step)
    artifact = wandb.Artifact("history", type="history")
    for name in KEPT:
        artifact.add_file(str(folder / name))
    run.log_artifact(artifact)
    run.finish()
    wandb.teardown()  # waits for the process that writes the file

    def records(raw):
        """LevelDB's log: blocks of 32 KiB, records of which may lie in several."""
        at, parts = 7, b""
        while at + 7 <= len(raw):
            if (left := 32768 - at % 32768) < 7:
                at += left
                continue
            _, length, kind = struct.unpack("<IHB", raw[at : at + 7])
            parts += raw[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # whole, or the last part
                yield protocol.Record.FromString(parts)
                parts = b""

    found = _found()
    (log,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    for record in records(log.read_bytes()):
        if record.WhichOneof("record_type") == "history":
            items = {tuple(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            step = items[("_step",)]
            for key, value in items.items():
                if len(key) == 1 and not key[0].startswith("_"):
                    _keep(found, "metrics", key[0], step, value)
                elif key[1:] == ("values",):
                    _keep(found, "histograms", key[0], step, [value, items[key[0], "bins"]])
        if record.WhichOneof("record_type") == "artifact":
            found["files"] += [entry.path for entry in record.artifact.manifest.contents]
    return found


def _mlflow(told, folder: Path, uri: str):
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=uri)
    mlflow.set_tracking_uri(uri)
    experiment = client.create_experiment("snr_adam", artifact_location=(folder / "artifacts").as_uri())
    with mlflow.start_run(experiment_id=experiment) as run:
        for step, metrics, _ in told:
            mlflow.log_metrics(metrics, step=step)
        for name in KEPT:
            mlflow.log_artifact(str(folder / name))
    found = _found()
    for key in client.get_run(run.info.run_id).data.metrics:
        for metric in client.get_metric_history(run.info.run_id, key):
            _keep(found, "metrics", key, metric.step, metric.value)
    for name in KEPT:
        (folder / "again").mkdir(exist_ok=True)
        path = client.download_artifacts(run.info.run_id, name, str(folder / "again"))
        found["files"] += [name] if Path(path).read_bytes() == (folder / name).read_bytes() else []
    return found


def mlflow_files(told, folder: Path):
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    return _mlflow(told, folder, (folder / "store").as_uri())


def mlflow_sqlite(told, folder: Path):
    return _mlflow(told, folder, f"sqlite:///{folder / 'store.db'}")


def tensorboard(told, folder: Path):
    """Written by tensorboardX, read by TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(folder / "events")) as writer:
        for step, metrics, histograms in told:
            for key, x in metrics.items():
                writer.add_scalar(key, x, step)
            for key, (counts, edges) in histograms.items():
                middles = (edges[1:] + edges[:-1]) / 2
                sums = float(counts @ middles), float(counts @ middles**2)
                writer.add_histogram_raw(
                    key, edges[0], edges[-1], int(counts.sum()), *sums, edges[1:].tolist(), counts.tolist(), step
                )
    everything = {"scalars": 0, "tensors": 0, "histograms": 0}
    read, found = EventAccumulator(str(folder / "events"), size_guidance=everything), _found()
    read.Reload()
    for key in read.Tags()["scalars"]:
        for event in read.Scalars(key):
            _keep(found, "metrics", key, event.step, event.value)
    for key in read.Tags()["histograms"]:
        for event in read.Histograms(key):
            value = event.histogram_value
            _keep(found, "histograms", key, event.step, [list(value.bucket), [value.min, *value.bucket_limit]])
    for key in read.Tags()["tensors"]:
        for event in read.Tensors(key):
            _keep(found, "metrics", key, event.step, float(make_ndarray(event.tensor_proto)))
    return found


def trackio(told, folder: Path):
    """Local, in SQLite."""
    os.environ |= {"TRACKIO_DIR": str(folder / "trackio"), "HF_HUB_OFFLINE": "1"}
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    trackio.init(project="snr_adam", name="run", embed=False, auto_log_gpu=False, auto_log_cpu=False)
    for step, metrics, histograms in told:
        trackio.log({**metrics, **{key: trackio.Histogram(np_histogram=x) for key, x in histograms.items()}}, step=step)
    trackio.finish()
    found = _found()
    for row in SQLiteStorage.get_logs("snr_adam", "run"):
        for key, value in row.items():
            if isinstance(value, dict):
                _keep(found, "histograms", key, row["step"], [value["values"], value["bins"]])
            elif key not in ("step", "timestamp"):
                _keep(found, "metrics", key, row["step"], value)
    return found


CLIENTS = {
    "wandb": wandb,
    "mlflow, files": mlflow_files,
    "mlflow, SQLite": mlflow_sqlite,
    "tensorboard": tensorboard,
    "trackio": trackio,
}

if __name__ == "__main__":
    folder = Path(sys.argv[2]).resolve()
    found = CLIENTS[sys.argv[1]](pickle.loads((folder / "told.pickle").read_bytes()), folder)
    (folder / "found.json").write_text(json.dumps(found))
