"""The optimizer step on one NVIDIA GPU: time, share of the copy's bandwidth, kernels launched, temporaries.

    python3 benchmarks/gpu.py        prints a Markdown table, writes benchmarks/results/gpu-DEVICE.json

Needs Python with JAX for CUDA and Optax; the package is taken from this checkout, and nothing from the network. torch
with CUDA is one more contender where it is installed. One leaf of 2.5e8 and of 1e9 parameters, the leaves of GPT-2 and
of a Llama, and whole training steps of a transformer of 1e8 parameters (`contenders.Train`, which needs Flax);
parameters and gradients float32 and bfloat16. Contenders take turns with `optax.adamw`, as many at once as have room,
and are divided by it (`step.py`). `launches` are the kernels in the compiled program's text; one per leaf is the aim.
`--allow-cpu` runs it without a GPU, to see that it works; its numbers say nothing.
"""

import argparse
import itertools
import os
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # contenders share the memory, see `step.measure`

import jax  # noqa: E402
from common import RESULTS, markdown, save  # noqa: E402
from step import COLUMNS, Table, against, measure, of_copy  # noqa: E402

CONTENDERS = against(
    "optax.adamw",
    "snr_adam.adamw float32",
    "snr_adam.adamw bfloat16",
    "snr_adam.adamw packed",
    "guard float32",
    "guard packed",
    "observe optax.adamw",
    "observe float32 every 1",
    "observe packed every 1",
    "observe guard packed",
    "snr_adam.adamw packed + remainder 8",
    "torch.AdamW fused",
    "copy",
)
TRAINED = against("train optax.adamw", "train snr_adam.adamw packed", "train observe guard packed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trees", nargs="*", default=["62500x4000", "250000x4000", "gpt2", "llama"])
    parser.add_argument(
        "--trained", nargs="*", default=["1024x8"], help="WIDTHxLAYERS of transformers that are trained"
    )
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, help="in a round; left out, about 0.1 s of them")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for gpu-DEVICE.json")
    parser.add_argument("--allow-cpu", action="store_true")
    args = parser.parse_args()
    device = jax.devices()[0]
    if device.platform != "gpu" and not args.allow_cpu:
        sys.exit(f"gpu.py: JAX sees no GPU, only {device.device_kind!r}: install JAX for CUDA, or try --allow-cpu")
    name = re.sub(r"\W+", "-", device.device_kind).strip("-").lower()
    rows: list[dict] = []
    for contenders, trees in ((CONTENDERS, args.trees), (TRAINED, args.trained)):
        table = Table(
            contenders, trees, args.dtypes, args.rounds, args.steps or (10 if contenders is TRAINED else None)
        )
        for tree, dtype in itertools.product(trees, args.dtypes):
            start = time.perf_counter()
            rows += of_copy(measure(table, tree, dtype))
            save(args.results / f"gpu-{name}.json", rows, device=device.device_kind)  # after each: it may be cut off
            print(f"{tree} {dtype}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    print(markdown(rows, COLUMNS))


if __name__ == "__main__":
    main()
