"""A plan on paper: what a step costs on a cluster that is not there yet.

    python -m snr_adam.plan --params 70e9 --devices 256 --hardware h100
    python -m snr_adam.plan --update docs/how_to/many_devices.md           makes that file's tables

Per device, for N parameters on D devices. p and g are the bytes of a parameter and of a gradient, w those of each array
that the storage keeps per parameter: 4 and 4 ("float32"), 2 and 2 ("bfloat16"), 4 ("packed"). P, G and S are the shares
of parameters, gradients and state that a device holds, 1 or 1/D:

                    P     G     S      at rest, bytes           moved by the step, bytes          gathered, reduced
    "replicated"    1     1     1      N (P p + G g + S w)      N S (sum(g + 3 w) + 2 p)          all-reduce of N g
    "zero1"         1     1/D   1/D    the same                 the same, and N p (1 + 1/D)       N g, then N p
    "fsdp"          1/D   1/D   1/D    the same                 the same                          2 N p, and N g

The step reads the gradient and reads and writes each stored array, reads them all once more for the update, and reads
and writes the parameter: sum(g + 2 w) + sum(w) + 2 p. ZeRO-1 steps its share of the parameters, then gathers the new
ones: a share read and the whole written. These are the bytes of the program that XLA compiles (`tests/test_plan.py`
holds them to its own analysis). Activations are not in the plan.

A pass that gathers or reduces B bytes over D = k n devices, k of them behind fast links, sends B (k-1)/k over those and
B/k (n-1)/n over the network; an all-reduce is two such passes. A time is bytes over bandwidth at the vendor's peak, and
for the model 6 N operations per token at 40 % of peak: a bound, to compare with, and nothing is taken to overlap.
"""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

STORAGES = {"float32": (4, 4), "bfloat16": (2, 2), "packed": (4,)}
SHARDINGS = ("replicated", "zero1", "fsdp")
BYTES = {"float32": 4, "bfloat16": 2}
UTILISATION = 0.4
SCALE = ((1e9, 70e9, 1e12), (8, 256, 16384))  # parameters and devices of the tables in docs/how_to/many_devices.md


class Hardware(NamedTuple):
    """One accelerator: bytes of memory, bytes per second of memory, of fast links and of the network in one direction,
    how many devices the fast links join, bfloat16 operations per second, and who says so."""

    memory: float
    bandwidth: float
    link: float
    network: float
    joined: int
    peak: float
    source: str


HARDWARE = {
    "h100": Hardware(
        80e9, 3.35e12, 450e9, 50e9, 8, 989e12,
        "NVIDIA H100 SXM (nvidia.com/en-us/data-center/h100: 80 GB, 3.35 TB/s, NVLink 900 GB/s in both directions, "
        "1,979 teraFLOPS with sparsity, half without) in a DGX H100 (8 GPUs, one 400 Gb/s adapter each)",
    ),
    "v5p": Hardware(
        95 * 2**30, 2765e9, 600e9, 6.25e9, 6144, 459e12,
        "Google TPU v5p (docs.cloud.google.com/tpu/docs/v5p: 95 GiB, 2,765 GB/s, links 1,200 GB/s in both directions, "
        "50 Gb/s of network per chip, slices of up to 6,144 chips)",
    ),
    "v5e": Hardware(
        16e9, 819e9, 200e9, 3.125e9, 256, 197e12,
        "Google TPU v5e (cloud.google.com/tpu/docs/v5e: 16 GB, 819 GB/s, links 400 GB/s in both directions, 6.4 Tb/s "
        "of network per pod of 256 chips)",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """What is trained, and where: the numbers a plan is made from. `tokens` is per device and step."""

    params: float
    devices: int
    storage: str = "packed"
    sharding: str = "zero1"
    dtype: str = "bfloat16"
    hardware: str = "h100"
    tokens: int = 8192


class Plan(NamedTuple):
    """Per device: bytes at rest, moved by the optimizer's step, temporary in it, and sent; seconds of the step, of the
    communication, and of the model."""

    at_rest: float
    moved: float
    temporary: float
    sent: float
    step: float
    communication: float
    model: float


def plan(setup: Setup) -> Plan:
    """The formulas of the module's docstring.

    >>> made = plan(Setup(70e9, 256, storage="packed", sharding="zero1"))
    >>> print(f"{made.at_rest / 1e9:.1f} GB at rest")  # 140 for the weights; the rest of gradients and state is 1/256
    141.6 GB at rest

    Raises:
      ValueError: for a name that is not in `STORAGES`, `SHARDINGS`, `BYTES` or `HARDWARE`.
    """
    for name, known in (("storage", STORAGES), ("sharding", SHARDINGS), ("dtype", BYTES), ("hardware", HARDWARE)):
        if getattr(setup, name) not in known:
            raise ValueError(f"{name}={getattr(setup, name)!r}: use one of {sorted(known)}")
    n, p, words = setup.params, BYTES[setup.dtype], STORAGES[setup.storage]
    g, share, zero1 = p, 1 / setup.devices, setup.sharding == "zero1"
    whole = 1.0 if setup.sharding == "replicated" else share
    at_rest = n * ((share if setup.sharding == "fsdp" else 1.0) * p + whole * (g + sum(words)))
    moved = n * whole * (sum(g + 3 * w for w in words) + 2 * p) + (n * p * (1 + share) if zero1 else 0.0)
    passes = {"replicated": [g, g], "zero1": [g, p], "fsdp": [p, p, g]}[setup.sharding]
    hardware = HARDWARE[setup.hardware]
    near, far = _sent(setup.devices, hardware.joined)
    total = n * sum(passes)
    return Plan(
        at_rest=at_rest,
        moved=moved,
        temporary=n * p * share if zero1 else 0.0,
        sent=total * (near + far),
        step=moved / hardware.bandwidth,
        communication=total * (near / hardware.link + far / hardware.network),
        model=6 * n * setup.tokens / (hardware.peak * UTILISATION),
    )


def _sent(devices: int, joined: int) -> tuple[float, float]:
    """The shares of a pass's bytes that a device sends over fast links and over the network."""
    k = min(devices, joined)
    groups = devices / k
    return (k - 1) / k, (1 - 1 / groups) / k


def table(params: float, devices, dtype: str, hardware: str, tokens: int) -> str:
    """A Markdown table: each sharding with each storage for one model, on each number of devices."""
    lines = [
        "| devices | sharding | storage | GB at rest | GB moved | GB sent | step | communication | model |",
        "|--:|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for number in devices:
        for sharding in SHARDINGS:
            for storage in STORAGES:
                made = plan(Setup(params, number, storage, sharding, dtype, hardware, tokens))
                fits = "" if made.at_rest < HARDWARE[hardware].memory else " (too much)"
                sizes = [f"{_three(made.at_rest / 1e9)}{fits}", _three(made.moved / 1e9), _three(made.sent / 1e9)]
                times = [_time(made.step), _time(made.communication), _time(made.model)]
                lines.append(f"| {number:,} | {sharding} | {storage} | " + " | ".join(sizes + times) + " |")
    return "\n".join(lines)


def _three(x: float) -> str:
    """Three digits, or all of a larger number."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _time(seconds: float) -> str:
    return f"{_three(seconds)} s" if seconds >= 1 else f"{_three(seconds * 1e3)} ms"


def scale(text: str, dtype: str = "bfloat16", hardware: str = "h100", tokens: int = 8192) -> str:
    """The text of docs/how_to/many_devices.md with its tables made anew.

    Raises:
      ValueError: if the text has not exactly one pair of marks.
    """
    parts = [
        f"### {params / 1e9:,.0f} billion parameters\n\n{table(params, SCALE[1], dtype, hardware, tokens)}"
        for params in SCALE[0]
    ]
    note = (
        f"Per device: {HARDWARE[hardware].source}. Parameters and gradients are {dtype}, {tokens:,} tokens per device "
        "and step. Made by `python -m snr_adam.plan --update docs/how_to/many_devices.md`."
    )
    new = "\n\n".join([note, *parts])
    text, found = re.subn(
        r"<!-- plan -->.*<!-- /plan -->", lambda _: f"<!-- plan -->\n{new}\n<!-- /plan -->", text, flags=re.DOTALL
    )
    if found != 1:
        raise ValueError(f"the text has {found} places marked <!-- plan --> ... <!-- /plan -->, expected 1")
    return text


def main(arguments: list[str] | None = None) -> None:
    """Prints a plan, or updates a file's tables."""
    parser = argparse.ArgumentParser(prog="python -m snr_adam.plan", description=__doc__.splitlines()[0])
    parser.add_argument("--params", type=float, default=70e9, help="of the model, such as 70e9")
    parser.add_argument("--devices", type=int, nargs="+", default=[256])
    parser.add_argument("--dtype", choices=sorted(BYTES), default="bfloat16", help="of parameters and gradients")
    parser.add_argument("--hardware", choices=sorted(HARDWARE), default="h100")
    parser.add_argument("--tokens", type=int, default=8192, help="per device and step")
    parser.add_argument("--update", type=Path, metavar="FILE", help="write the tables of this file anew")
    options = parser.parse_args(arguments)
    if options.update:
        options.update.write_text(scale(options.update.read_text()))
        return
    print(table(options.params, options.devices, options.dtype, options.hardware, options.tokens))
    print(f"\n{HARDWARE[options.hardware].source}.")


if __name__ == "__main__":
    main()
