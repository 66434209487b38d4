"""Writes the tables of README and docs from the JSON in benchmarks/results, so that no number is typed by hand.

python benchmarks/readme.py            rewrites the pages
python benchmarks/readme.py --check    fails if a page is not what the results say

A table stands between two marks, `<!-- storage -->` and `<!-- /storage -->`, on one page, whichever that is.
"""

import json
import math
import re
import sys
from pathlib import Path

from trees import tree_shapes

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# contender in step.json -> (what to write, its row in storage.json, when to use it)
ROWS = {
    "optax.adamw": ("`optax.adamw`", None, ""),
    "snr_adam.adamw float32": ("`adamw(...)`", "float32", "to compare, to continue old runs"),
    "snr_adam.adamw bfloat16": ('`storage="bfloat16"`', "bfloat16", "optimizers that `packed` cannot hold"),
    "bfloat16 nearest": ("bfloat16 rounded to nearest, by hand", "bfloat16 nearest", "nothing: v stalls"),
    "snr_adam.adamw packed": ('`storage="packed"`', "packed", "everything else: half the memory"),
    "snr_adam.adamw packed, flat": ("the same, one flat vector", "packed", ""),
    "optax.adam, 512 bits": ("`optax.adam`, compiled for 512-bit vectors", None, ""),
    "snr_adam.adamw packed, 512 bits": ('`storage="packed"`, likewise', "packed", ""),
    "snr_adam.adamw packed + remainder 8": (
        '`carry_remainder(..., "8")`, packed',
        "packed",
        "bfloat16 parameters that train as float32 ones",
    ),
    "torch.AdamW fused": ("`torch.optim.AdamW(fused=True)`", None, ""),
    "copy": ("bare copy of packed's bytes", None, "the floor"),
}
CHAINS = {
    "optax chain": "`optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(...)), 10)`",
    "guard float32": "`guard(adamw(...), clip_norm=1.0)`",
    "guard bfloat16": '`guard(adamw(..., storage="bfloat16"), clip_norm=1.0)`',
    "guard packed": '`guard(adamw(..., storage="packed"), clip_norm=1.0)`',
}


# contender in note_run.json -> what to write, where its own name would not do
CONTENDERS = {
    "snr_adam.adam observed": "`snr_adam.observe(snr_adam.adam(...), every=10)`",
    "torch.optim.Adam": "`torch.optim.Adam`, eager",
    "torch.optim.Adam fused": "`torch.optim.Adam(fused=True)`",
    "keras.optimizers.Adam on JAX": "`keras.optimizers.Adam` on JAX",
}


def where(machine: dict) -> str:
    """The machine of a result, in words."""
    return f"{machine['cores']} cores of {machine['processor']}, jax {machine['jax']}"


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def chain_table() -> str:
    """AdamW with clipping and skipping, against Optax's."""
    results = load("chain")
    found = {(row["contender"], row["dtype"]): row for row in results["rows"]}
    lines = [
        "| AdamW, clipped, non-finite steps skipped | time, float32 | bfloat16 | moved | temporaries | state bytes |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for contender, label in CHAINS.items():
        wide, narrow = found[contender, "float32"], found[contender, "bfloat16"]
        times = [f"{row['ratio']:.2f}" for row in (wide, narrow)]
        bytes_ = [f"{wide[key]:.0f}" for key in ("bytes_moved", "bytes_temporary", "bytes_state")]
        lines.append(f"| {label} | " + " | ".join(times + bytes_) + " |")
    machine, row = results["machine"], results["rows"][0]
    return "\n".join(lines) + (
        f"\n\nTime of a step over that of Optax's chain, medians of {row['rounds']} rounds of one run, parameters and "
        "gradients of the dtype named; bytes per float32 parameter by XLA's count; 16.8M parameters in one leaf of "
        f"4096 x 4096, {where(machine)}. Made by "
        "`benchmarks/step.py chain` and `benchmarks/readme.py`."
    )


def leaves_sentence() -> str:
    """How long trees of many leaves take to compile."""
    results = load("leaves")
    took = {
        (row["tree"], row["contender"]): row["trace_s"] + row["lower_s"] + row["compile_s"] for row in results["rows"]
    }
    words = []
    for tree in ("300 leaves", "3000 leaves"):
        optax, float32, packed = (
            took[tree, name] for name in ("optax.adamw", "snr_adam.adamw float32", "snr_adam.adamw packed")
        )
        words.append(
            f"{tree} take {float32 / optax:.1f} times as long as with `optax.adamw` ({optax:.1f} s) with float32 "
            f"moments, {packed / optax:.1f} times with packed ones"
        )
    return f"To trace, lower and compile, {'; '.join(words)}. {where(results['machine'])}."


def storage_table() -> str:
    """At rest, moved, error, time: one row per storage, float32 and bfloat16 parameters."""
    step, error = load("step"), {row["storage"]: row for row in load("storage")["rows"]}
    found = {(row["contender"], row["dtype"]): row for row in step["rows"] if row["tree"] == "4096x4096"}
    base = {dtype: found["optax.adam", dtype]["ms"] for dtype in ("float32", "bfloat16")}
    lines = [
        "| AdamW | state bytes | moved | error | v after | time, float32 | bfloat16 | use it for |",
        "|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for contender, (label, storage, use) in ROWS.items():
        wide, narrow = (found.get((contender, dtype), {}) for dtype in ("float32", "bfloat16"))
        main = narrow if "remainder" in contender else wide
        cells = [f"{main[key]:.0f}" if key in main else "-" for key in ("bytes_state", "bytes_moved")]
        noise = error.get(storage)
        cells += [f"{noise['error_0.999']:.1%}", f"{noise['v_after']:.3g}"] if noise else ["-", "-"]
        for row in (wide, narrow):
            time = f"{row['ms'] / base[row['dtype']]:.2f}" if "ms" in row else "not measured" if row else "-"
            cells.append("-" if "remainder" in contender and row is wide else time)
        lines.append(f"| {label} | " + " | ".join(cells) + f" | {use} |")
    machine, other = step["machine"], load("step-amd-epyc")
    there = {(row["contender"], row["dtype"]): row["ms"] for row in other["rows"] if "ms" in row}
    packed = [
        f"{there['snr_adam.adamw packed', dtype] / there['optax.adam', dtype]:.2f}" for dtype in ("float32", "bfloat16")
    ]
    lines += [
        "",
        "Bytes per parameter, at rest and moved in a step; error of the update at b2 = .999 against float32 moments; v "
        "6,000 steps after gradients shrank tenfold, as a multiple of float32's (1 is right); time of a step relative "
        "to `optax.adam` in the same run, for 16.8M parameters in one leaf of 4096 x 4096, parameters and gradients of "
        "the dtype named, "
        f"{where(machine)}. Made by `benchmarks/step.py`, "
        "`benchmarks/storage.py` and `benchmarks/readme.py`. How fast the words of `packed` are hashed and decoded "
        f"depends on the processor: on {other['machine']['cores']} cores of {other['machine']['processor']} (an "
        "earlier version, one flat leaf, `benchmarks/results/step-amd-epyc.json`) it took "
        f"{packed[0]} and {packed[1]} of `optax.adam`'s time.",
    ]
    return "\n".join(lines)


def observe_table() -> str:
    """What telemetry adds to a step, and to its compilation."""
    results = load("observe")
    trees = list(dict.fromkeys(row["tree"] for row in results["rows"]))
    found = {(row["contender"], row["tree"]): row for row in results["rows"]}
    lines = [
        "| watched | " + " | ".join(f"time, {tree}" for tree in trees) + " | temporaries | compiled in |",
        "|---|" + "--:|" * (len(trees) + 2),
    ]
    for storage in ("float32", "packed"):
        for every, words in ((None, "nothing"), (10, "every=10"), (1, "every=1")):
            name = f"observe {storage} every {every}" if every else f"snr_adam.adamw {storage}"
            rows = [found[name, tree] for tree in trees]
            times = " | ".join(f"{row['ratio']:.2f}" for row in rows)
            most = max(row["bytes_temporary"] for row in rows)
            seconds = " / ".join(f"{row['compile_s']:.1f}" for row in rows)
            lines.append(f"| {storage}, {words} | {times} | {most:.1f} | {seconds} s |")
    row, shapes, with_gpt2 = results["rows"][0], tree_shapes("gpt2"), "gpt2" in trees
    lines += [
        "",
        "Time of a step over that of the same AdamW unwatched, means over "
        f"{row['rounds'] * row['steps_per_round']} steps from the very first, among them the rarer ones that look at "
        "everything; temporaries in bytes per parameter. One leaf of 4096 x 4096"
        + (f", and the {len(shapes)} leaves of GPT-2 ({sum(map(math.prod, shapes)) / 1e6:.0f}M parameters)" * with_gpt2)
        + f"; {where(results['machine'])}. Made by `benchmarks/step.py observe`.",
    ]
    return "\n".join(lines)


def note_run_table(results: dict) -> str:
    """Updates per second, time to the end, accuracy: one row per contender and width."""
    lines = [
        "| hidden units | Adam | updates per second | / PyTorch eager | / `optax.adam` | to the end | accuracy |",
        "|--:|---|--:|--:|--:|--:|--:|",
    ]
    whole = max(row.get("updates", 0) for row in results["rows"])
    for row in results["rows"]:
        name = CONTENDERS.get(row["contender"], f"`{row['contender']}`")
        if "error" in row:
            lines.append(f"| {row['width']} | {name} | not measured | - | - | - | - |")
            continue
        part = "" if row["updates"] == whole else "†"
        ratios = [f"{row[key]:.2f}" if key in row else "-" for key in ("to_eager", "to_optax")]
        cells = [f"{row['updates_per_second']:,.0f}", *ratios, f"{row['seconds']:.0f} s{part}"]
        lines.append(f"| {row['width']} | {name} | " + " | ".join(cells) + f" | {row['accuracy']:.1%}{part} |")
    machine, parts = results["machine"], {row["updates"] for row in results["rows"] if "updates" in row} - {whole}
    best = max(row.get("accuracy", 0) for row in results["rows"])
    error = (best * (1 - best) / results["held_out"]) ** 0.5
    torch = sorted({f"{row['threads']} threads" for row in results["rows"] if row.get("threads")})
    lines += [
        "",
        f"{whole:,} updates of Adam in batches of 128 on an MLP with two hidden layers that reads digits; medians over "
        "interleaved rounds, ratios within a round, compilation not counted. "
        f"Accuracy on {results['held_out']} digits held out, standard error {error:.1%}. "
        + (f"† {parts.pop():,} updates: time extrapolated, accuracy after as many. " if parts else "")
        + (f"PyTorch with {' or '.join(torch).replace('1 threads', '1 thread')}, the faster choice. " if torch else "")
        + where(machine)
        + "".join(f", {name} {machine[name]}" for name in ("torch", "keras") if name in machine)
        + ". Made by `benchmarks/note_run.py`.",
    ]
    return "\n".join(lines)


def digits_quality_table(results: dict) -> str:
    """Held-out losses on digits, and their paired differences to the base."""
    lines = [
        "| AdamW | bytes / param. | held-out loss | difference to `optax.adamw`, 95 % interval |",
        "|---|--:|--:|--:|",
    ]
    for i, row in enumerate(results["rows"]):
        difference = f"{row['difference']:+.5f} ± {row['interval']:.5f}" if i else "-"
        lines.append(
            f"| {row['variant'].removesuffix('.adamw')} | {row['bytes_per_parameter']:.1f} | {row['mean']:.4f} | "
            f"{difference} |"
        )
    shared = next((row["shared"] for row in results["rows"] if row["shared"]), {})
    where = " and ".join(f"`{path}` ({row['error']:.0%})" for path, row in shared.items())
    lines += [
        "",
        f"An MLP on digits, {results['steps']:,} updates, mean of {results['seeds']} seeds, nats per digit, "
        f"differences in pairs of one seed; the loss of seeds spreads by {results['rows'][0]['spread']:.3f}. "
        "`shared` goes against advice: `suggest_sharing` finds no noise here that may be, and predicts large errors of "
        f"the update for {where}. Made by `benchmarks/quality.py`.",
    ]
    return "\n".join(lines)


def quality_table(results: dict) -> str:
    """Validation losses of the character model."""
    base = [run["validation"] for run in results["runs"]["optax"]]
    lines = ["| AdamW | bytes / param. | validation loss | difference to `optax.adamw` |", "|---|--:|--:|--:|"]
    for name, runs in results["runs"].items():
        losses = [run["validation"] for run in runs]
        difference = sum(a - b for a, b in zip(losses, base, strict=True)) / len(base)
        kept = sum(run["bytes_per_parameter"] for run in runs) / len(runs)
        lines.append(f"| {name} | {kept:.1f} | {sum(losses) / len(losses):.4f} | {difference:+.4f} |")
    counts = " or ".join(map(str, sorted({len(run["sharing"]) for run in results["runs"]["shared"]})))
    lines += [
        "",
        f"A small transformer on Python source, {results['steps']:,} updates, mean of {len(base)} seeds, nats per "
        "byte; the bytes are those of weights and optimizer together. Made by `examples/char_lm.py --table`, which "
        f"says what the names mean. `shared` found {counts} parameters worth sharing after a third of the run.",
    ]
    return "\n".join(lines)


GPU = {
    "optax.adamw": "`optax.adamw`",
    "torch.AdamW fused": "`torch.optim.AdamW(fused=True)`",
    "snr_adam.adamw float32": "`adamw(...)`",
    "snr_adam.adamw bfloat16": '`adamw(..., storage="bfloat16")`',
    "snr_adam.adamw packed": '`adamw(..., storage="packed")`',
    "snr_adam.adams": "`adams(...)`, which has no second moment",
    "guard float32": "`guard(adamw(...), clip_norm=1.0)`",
    "guard packed": '`guard(adamw(..., storage="packed"), clip_norm=1.0)`',
    "snr_adam.adamw packed + remainder 8": '`carry_remainder(adamw(..., storage="packed"), "8")`',
    "observe optax.adamw": "`observe(optax.adamw(...))`, every step",
    "observe float32 every 1": "`observe(adamw(...))`, every step",
}


def gpu_table() -> str:
    """Steps on a GPU, of one leaf of 2.5e8 parameters and, where that was not measured, of 1e9."""
    results = load("gpu-nvidia-h100-80gb-hbm3")
    found = {(row["contender"], row["tree"], row["dtype"]): row for row in results["rows"] if "ratio" in row}
    lines = ["| step | float32 | of the copy | bfloat16 | of the copy | state bytes |", "|---|--:|--:|--:|--:|--:|"]
    for contender, label in GPU.items():
        cells, state = [], "-"
        for dtype in ("float32", "bfloat16"):
            small, large = (found.get((contender, tree, dtype)) for tree in ("62500x4000", "250000x4000"))
            row = small or large
            if "remainder" in contender and dtype == "float32":
                row = None  # float32 parameters have none
            cells.append("-" if row is None else f"{row['ratio']:.2f}{'' if small else '†'}")
            cells.append(f"{row['of_copy']:.0%}" if row and "of_copy" in row else "-")
            if row:
                state = f"{row['bytes_state']:.0f}" if dtype == "float32" or state == "-" else state
        lines.append(f"| {label} | " + " | ".join([*cells, state]) + " |")
    machine = results["machine"]
    return "\n".join(lines) + (
        "\n\nTime of a step over that of `optax.adamw` with parameters and gradients of the same dtype (whose moments "
        "have it too), medians of interleaved rounds; bandwidth over that of a program that only copies. One leaf of "
        f"2.5e8 parameters († 1e9), one {machine['device']}, jax {machine['jax']}, torch {machine['torch']}, "
        f"{machine['date']}. Made by `benchmarks/gpu.py` and `benchmarks/readme.py`."
    )


def signal_table() -> str:
    """A report as it prints, and what it is of."""
    seen = load("signal")
    return (
        f"```\n{seen['table']}\n```\n\nMade with the heat map by `examples/see_the_signal.py`: a transformer of "
        f"{seen['blocks']} blocks, {seen['steps']} updates on {seen['batch']} windows of Python source each, "
        "b1 = b2 = 0.95, its layers in groups."
    )


def compiled_table(results: dict) -> str:
    """Bytes moved per parameter by every step, as compiled for accelerators: one leaf, float32 and bfloat16."""
    rows = [row for row in results["rows"] if row["tree"] == "4096x4096"]
    found = {(row["step"], row["target"], row["dtype"]): row for row in rows}
    targets, dtypes = ("h100", "v5e", "v6e"), ("float32", "bfloat16")
    names = {"h100": "H100", "v5e": "TPU v5e", "v6e": "TPU v6e"}
    heads = [f"{names[target]}{f', {dtype}' * (target == 'h100')}" for dtype in dtypes for target in targets]
    lines = ["| step | " + " | ".join(heads) + " |", "|---|" + "--:|" * len(heads)]
    for step in dict.fromkeys(row["step"] for row in rows):
        cells = []
        for dtype in dtypes:
            for target in targets:
                row = found.get((step, target, dtype))
                less = row is not None and row["moved"] > row["least"] + 0.5
                cells.append("-" if row is None else f"{row['moved']:.0f}" + (f" ({row['least']:.0f})" if less else ""))
        if set(cells) != {"-"}:
            lines.append(f"| `{step}` | " + " | ".join(cells) + " |")
    machine = results["machine"]
    return "\n".join(lines) + (
        "\n\nBytes per parameter to and from the device's memory in one step, of parameters and gradients in the dtype "
        "named, as XLA compiles it: nothing was run. In brackets what the step's definition needs, where that is less: "
        "parameters and state read and written, the gradient read, once more what is read before its norm is known. "
        f"One leaf of 4096 x 4096, jax {machine['jax']}, {machine['date']}. Made by `benchmarks/compiled.py` and "
        "`benchmarks/readme.py`."
    )


def gpt2_table(results: dict) -> str:
    """Kernels, temporaries, bytes and seconds to compile of GPT-2's whole tree."""
    rows = [row for row in results["rows"] if row["tree"] == "gpt2" and row["dtype"] == "float32"]
    found = {(row["step"], row["target"]): row for row in rows}
    targets = {"h100": "H100", "v5e": "TPU v5e"}
    kinds = ("kernels", "temporaries", "moved", "compiled in")
    heads = [f"{name}: {kinds[0]}" if kind == kinds[0] else kind for name in targets.values() for kind in kinds]
    lines = ["| step | " + " | ".join(heads) + " |", "|---|" + "--:|" * len(heads)]
    for step in dict.fromkeys(row["step"] for row in rows):
        cells = []
        for target in targets:
            row = found[step, target]
            branch = " + a branch" if row["conditionals"] else ""
            cells += [f"{row['kernels']}{branch}", f"{row['temporary']:.2f}", f"{row['moved']:.1f}"]
            cells.append(f"{row['compile_s']:.1f} s")
        lines.append(f"| `{step}` | " + " | ".join(cells) + " |")
    machine, shapes = results["machine"], tree_shapes("gpt2")
    return "\n".join(lines) + (
        f"\n\nThe {len(shapes)} leaves of GPT-2, {sum(map(math.prod, shapes)) / 1e6:.0f}M parameters in float32; "
        "temporaries and bytes moved per parameter; seconds to trace, lower and compile on 2 cores of "
        f"{machine['processor']}. jax {machine['jax']}, {machine['date']}. Made by `benchmarks/compiled.py` and "
        "`benchmarks/readme.py`."
    )


def tables() -> dict[str, str]:
    """What stands between the marks of each name."""
    return {
        "gpu": gpu_table(),
        "chain": chain_table(),
        "signal": signal_table(),
        "leaves": leaves_sentence(),
        "observe": observe_table(),
        "storage": storage_table(),
        "quality": quality_table(load("char_lm")),
        "digits_quality": digits_quality_table(load("quality")),
        "note_run": note_run_table(load("note_run")),
        "compiled": compiled_table(load("compiled")),
        "gpt2": gpt2_table(load("compiled")),
    }


def pages() -> dict[Path, str]:
    """README and the pages of docs, with every table made anew."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    texts = {path: path.read_text() for path in paths if "generated" not in path.parts}
    for mark, table in tables().items():
        whole = re.compile(rf"<!-- {mark} -->.*?<!-- /{mark} -->", re.DOTALL)
        places = [path for path, text in texts.items() for _ in whole.finditer(text)]
        if len(places) != 1:
            raise ValueError(f"README and docs have {len(places)} places marked {mark}, expected 1")
        made = f"<!-- {mark} -->\n{table}\n<!-- /{mark} -->"
        texts[places[0]] = whole.sub(lambda _, made=made: made, texts[places[0]])
    return texts


def main() -> None:
    for path, text in pages().items():
        if text != path.read_text():
            if "--check" in sys.argv[1:]:
                sys.exit(f"{path.relative_to(ROOT)} is not what benchmarks/results say: run benchmarks/readme.py")
            path.write_text(text)


if __name__ == "__main__":
    main()
