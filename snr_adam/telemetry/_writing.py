"""A history's file, written: as .npz or .jsonl, whole or not at all. `_reading` reads it."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np

from snr_adam.telemetry._reading import BATCH, FORMAT, PARTS, checksum


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Lets `write` make a file that appears under its name when it is finished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{token_hex(8)}.tmp")  # a process id is shared by threads and hosts
    try:
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_npz(history, path: Path) -> None:
    """Numbers in the form of NumPy, compressed."""
    arrays: dict[str, Any] = {f"columns/{key}": values for key, values in history.columns.items()}
    arrays |= {f"total/{key}": values for key, values in history.total.items()}
    known = {BATCH: history.batch_size} if np.isfinite(history.batch_size).any() else {}
    arrays = {"format": FORMAT, **known, PARTS: np.array(list(arrays), str), **arrays}
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays, steps=history.steps, names=np.array(history.names, str))


def write_jsonl(history, path: Path) -> None:
    """A line of JSON per report."""
    columns, total = dict(history.columns), dict(history.total)
    lines, batches = [], history.batch_size.tolist()
    for i, step in enumerate(history.steps.tolist()):
        rows = {key: [_to_json(x) for x in values[i].tolist()] for key, values in columns.items()}
        sums = {key: _to_json(float(values[i])) for key, values in total.items()}
        batch = {} if math.isnan(batches[i]) else {BATCH: batches[i]}
        lines.append(json.dumps({"step": step, **batch, "total": sums, "columns": rows}, allow_nan=False) + "\n")
    first = {"format": FORMAT, "names": history.names, **checksum(lines)}
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines([json.dumps(first) + "\n", *lines])


def _to_json(x: float) -> float | str | None:
    return x if math.isfinite(x) else None if math.isnan(x) else str(x)
