"""The optimizer step on one NVIDIA GPU: time, share of the copy's bandwidth, kernels launched, temporaries.

    python3 benchmarks/gpu.py        prints a Markdown table, writes benchmarks/results/gpu-DEVICE.json

Needs Python with JAX for CUDA and Optax; the package is taken from this checkout, and nothing from the network. torch
with CUDA is one more contender where it is installed. One leaf of 2.5e8 and of 1e9 parameters, and the leaves of GPT-2;
parameters and gradients float32 and bfloat16. Each contender takes turns with `optax.adamw` alone, so that any two have
room, and is divided by it (`step.py`). `launches` are the kernels in the compiled program's text; one per leaf is the
aim. `--allow-cpu` runs it without a GPU, to see that it works; its numbers say nothing.
"""

import argparse
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two processes at a time share the memory

import jax  # noqa: E402
from common import RESULTS, markdown, save  # noqa: E402
from step import COLUMNS, Table, against, measure, of_copy  # noqa: E402

CONTENDERS = against(
    "optax.adamw",
    "snr_adam.adamw float32",
    "snr_adam.adamw bfloat16",
    "snr_adam.adamw packed",
    "guard packed",
    "observe packed every 10",
    "snr_adam.adamw packed + remainder 8",
    "torch.AdamW fused",
    "copy",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trees", nargs="*", default=["62500x4000", "250000x4000", "gpt2"])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20, help="in a round")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for gpu-DEVICE.json")
    parser.add_argument("--allow-cpu", action="store_true")
    args = parser.parse_args()
    device = jax.devices()[0]
    if device.platform != "gpu" and not args.allow_cpu:
        sys.exit(f"gpu.py: JAX sees no GPU, only {device.device_kind!r}: install JAX for CUDA, or try --allow-cpu")
    table = Table(CONTENDERS, args.trees, args.dtypes, args.rounds, args.steps)
    rows = []
    for tree in args.trees:
        for dtype in args.dtypes:
            rows += of_copy(measure(table, tree, dtype, together=False))
            name = re.sub(r"\W+", "-", device.device_kind).strip("-").lower()
            save(args.results / f"gpu-{name}.json", rows, device=device.device_kind)  # after each: it may be cut off
    print(markdown(rows, COLUMNS))


if __name__ == "__main__":
    main()
