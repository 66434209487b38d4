"""What the cheaper forms of Adam's memory cost in quality: a small language model trained with each of them.

A transformer of 2 layers learns to continue Python, byte by byte. Its text is part of the standard library of the
interpreter that runs this file, so there is nothing to download; the exact bytes, and with them the losses, differ
between Python versions, while comparisons within one table do not suffer. With one seed every optimizer starts from the
same weights and sees the same batches in the same order, and all are judged on the same held-out text.

    optax      optax.adamw, the baseline
    float32    snr_adam.adamw, the same arithmetic with less rounding: how much two runs differ by chance alone
    packed     snr_adam.adamw(storage="packed"): both moments in 4 bytes
    bfloat16   snr_adam.adamw(storage="bfloat16"): each moment in 2
    shared     snr_adam.adamw, whose noise is measured while it runs and, where that costs little, shared from then on
    carried    bfloat16 weights: carry_remainder(snr_adam.adamw(storage="packed"), "8")

    python3 -m uv run examples/char_lm.py                         one run
    python3 -m uv run examples/char_lm.py --optimizer shared      another; shows what is shared and what that costs
    python3 -m uv run examples/char_lm.py --table                 all of them with 3 seeds: the table in the README
"""

import argparse
import datetime
import functools
import hashlib
import json
import os
import platform
import sysconfig
import time
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import snr_adam

# Python modules of some size, each found under its name in Python 3.11 to 3.13
FILES = (
    *("_pydecimal", "argparse", "ast", "bdb", "calendar", "codecs", "configparser", "contextlib", "dataclasses"),
    *("difflib", "dis", "doctest", "enum", "fractions", "ftplib", "functools", "imaplib", "inspect", "ipaddress"),
    *("locale", "mailbox", "ntpath", "optparse", "os", "pdb", "pickle", "pickletools", "platform", "plistlib"),
    *("pstats", "pydoc", "random", "shutil", "smtplib", "socket", "socketserver", "ssl", "statistics", "subprocess"),
    *("tarfile", "tempfile", "textwrap", "threading", "tokenize", "trace", "traceback", "turtle", "typing", "uuid"),
)
VARIANTS = ("optax", "float32", "packed", "bfloat16", "shared", "carried")
SEEDS = (0, 1, 2)
STEPS, CHUNK = 1500, 50  # updates per run, and per compiled scan
RATE, B1, B2, WEIGHT_DECAY = 3e-3, 0.9, 0.99, 0.1
# Measured with seed 0: after 200 updates no parameter reaches this cutoff, and the run would be that of `float32` under
# another name; after 500 the four attention kernels of the first layer do.
SHARE_AFTER, CUTOFF = 500, 10.0


class Size(NamedTuple):
    """Width of the model, bytes that it reads, windows of so many bytes per batch, windows held out, and blocks."""

    width: int = 96
    context: int = 64
    batch: int = 16
    held_out: int = 3072
    layers: int = 2


class Block(nnx.Module):
    """One layer: every byte looks at those before it, then each by itself goes through an MLP. No biases."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        norm = functools.partial(nnx.LayerNorm, width, use_bias=False, rngs=rngs)
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.norm_attention, self.norm_mlp = norm(), norm()
        self.attention = nnx.MultiHeadAttention(4, width, use_bias=False, decode=False, rngs=rngs)
        self.wide, self.narrow = linear(width, 4 * width), linear(4 * width, width)

    def __call__(self, x, mask):
        x = x + self.attention(self.norm_attention(x), mask=mask)
        return x + self.narrow(nnx.gelu(self.wide(self.norm_mlp(x))))


class Transformer(nnx.Module):
    """Bytes, (batch, context) -> logits of the byte that follows each, (batch, context, 256)."""

    def __init__(self, size: Size, rngs: nnx.Rngs):
        self.token, self.position = (nnx.Embed(n, size.width, rngs=rngs) for n in (256, size.context))
        self.blocks = nnx.List([Block(size.width, rngs) for _ in range(size.layers)])
        self.norm = nnx.LayerNorm(size.width, use_bias=False, rngs=rngs)
        self.head = nnx.Linear(size.width, 256, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.token(tokens) + self.position(jnp.arange(tokens.shape[1]))
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


class Sharing(NamedTuple):
    """A parameter whose noise was shared: over which axes, at what predicted and what measured error of its update."""

    path: str
    axes: tuple[int, ...]
    predicted: float
    measured: float


class Result(NamedTuple):
    """One run: its last validation loss and the training loss of each update (nats per byte), the bytes per parameter
    that weights and optimizer keep at the end, seconds (compilation included), and what was shared."""

    validation: float
    losses: np.ndarray
    bytes_per_parameter: float
    seconds: float
    suggestion: snr_adam.state.shared_noise.Suggestion | None
    sharing: tuple[Sharing, ...]


@functools.cache
def corpus() -> tuple[np.ndarray, np.ndarray]:
    """The bytes to train on, and those held out: the last tenth of every file."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = [np.fromfile(folder / f"{name}.py", np.uint8) for name in FILES]
    pairs = [np.split(text, [len(text) * 9 // 10]) for text in texts]
    train, held_out = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    return train, held_out


def windows(text, starts, context: int):
    """The bytes from each start on, and one more than the model reads: shape (*starts.shape, context + 1)."""
    return text[starts[..., None] + np.arange(context + 1)]


@functools.cache
def optimizer(variant: str, steps: int) -> optax.GradientTransformationExtraArgs:
    """The optimizer of that name, for a run of so many steps."""
    rate = optax.warmup_cosine_decay_schedule(0.0, RATE, steps // 15, steps)
    make = functools.partial(snr_adam.adamw, rate, b1=B1, b2=B2, weight_decay=WEIGHT_DECAY)
    match variant:
        case "optax":
            return optax.adamw(rate, b1=B1, b2=B2, weight_decay=WEIGHT_DECAY)
        case "carried":
            return snr_adam.carry_remainder(make(storage="packed"), bits="8")
        case "packed" | "bfloat16":
            return make(storage=variant)
        case "float32" | "shared":
            return make()
    raise ValueError(f"no variant {variant!r}: use one of {VARIANTS}")


def loss_of(params, graph, batch):
    """Mean cross-entropy of a batch of windows, in float32 also for bfloat16 weights (whose gradients are bfloat16)."""
    model = nnx.merge(graph, jax.tree.map(lambda p: p.astype(jnp.float32), params))
    batch = batch.astype(jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(model(batch[:, :-1]), batch[:, 1:]).mean()


@functools.partial(jax.jit, static_argnames=("graph", "tx", "context"), donate_argnames="carry")
def train_chunk(carry, text, starts, graph, tx, context):
    """One update for each row of `starts`."""

    def step(carry, starts):
        params, opt_state = carry
        loss, grads = jax.value_and_grad(loss_of)(params, graph, windows(text, starts, context))
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return jax.lax.scan(step, carry, starts)


@functools.partial(jax.jit, static_argnames="graph")
def validate(params, batches, graph):
    """The mean loss over batches of windows."""
    return jax.lax.map(lambda batch: loss_of(params, graph, batch), batches).mean()


@functools.partial(jax.jit, static_argnames=("graph", "tx"))
def sharing_errors(params, states, batch, graph, tx):
    """For each parameter: how far the next update with the second state is from that with the first, relative, RMS."""
    grads = jax.grad(loss_of)(params, graph, batch)
    full, other = (tx.update(grads, state, params)[0] for state in states)
    return jax.tree.map(lambda u, w: jnp.linalg.norm((w - u).ravel()) / jnp.linalg.norm(u.ravel()), full, other)


def share_noise(carry, batch, graph, tx, cutoff: float):
    """Shares what may be shared, and measures on the next gradient what that does to the update."""
    params, opt_state = carry
    suggestion = snr_adam.state.suggest_sharing(opt_state, params, cutoff=cutoff)
    shared = snr_adam.state.share(opt_state, params, suggestion)
    errors = jax.tree.leaves(sharing_errors(params, (opt_state, shared), batch, graph, tx))
    matrices = [error for error, p in zip(errors, jax.tree.leaves(params), strict=True) if p.ndim > 1]
    rows = zip(suggestion.rows, matrices, strict=True)
    sharing = tuple(Sharing(row.path, row.axes, row.error, float(error)) for row, error in rows if row.axes)
    return (params, shared), suggestion, sharing


def train(
    variant: str,
    seed: int = 0,
    steps: int = STEPS,
    size: Size = Size(),
    share_after: int = SHARE_AFTER,
    cutoff: float = CUTOFF,
) -> Result:
    """Trains one model, in scans of `CHUNK` updates; "shared" shares before the first scan after `share_after`."""
    begin = time.perf_counter()
    text, held_out = (jnp.asarray(part) for part in corpus())
    starts = np.random.default_rng(seed).integers(0, len(text) - size.context, (steps, size.batch))
    graph, params = nnx.split(Transformer(size, nnx.Rngs(seed)))
    if variant == "carried":
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    tx = optimizer(variant, steps)
    carry, losses, suggestion, sharing = (params, tx.init(params)), [], None, ()
    with tqdm(total=steps, desc=f"{variant}, seed {seed}", unit=" updates", disable=None) as bar:
        for done in range(0, steps, CHUNK):  # silent unless on a terminal
            if variant == "shared" and suggestion is None and done >= share_after:
                batch = windows(text, starts[done], size.context)
                carry, suggestion, sharing = share_noise(carry, batch, graph, tx, cutoff)
            carry, loss = train_chunk(carry, text, starts[done : done + CHUNK], graph, tx, size.context)
            losses.append(np.asarray(loss))  # waits for the chunk to end
            bar.update(len(loss))
            bar.set_postfix(loss=f"{losses[-1].mean():.3f}")
    every = np.linspace(0, len(held_out) - size.context - 1, size.held_out).astype(int).reshape(-1, 64)
    validation = float(validate(carry[0], windows(held_out, every, size.context), graph))
    parameters = sum(p.size for p in jax.tree.leaves(carry[0]))
    kept = sum(x.nbytes for x in jax.tree.leaves(carry)) / parameters
    return Result(validation, np.concatenate(losses), kept, time.perf_counter() - begin, suggestion, sharing)


def sharing_table(sharing: tuple[Sharing, ...]) -> str:
    """Predicted and measured errors of the updates whose noise is shared."""
    width = max([len(row.path) for row in sharing], default=9)
    lines = [f"{'shared':{width}}  {'predicted':>9}  {'measured':>9}"]
    return "\n".join(lines + [f"{row.path:{width}}  {row.predicted:9.1%}  {row.measured:9.1%}" for row in sharing])


def markdown(results: dict[str, list[Result]]) -> str:
    """One row per optimizer; differences are to the first row, seed by seed, with their standard error."""
    first, *_ = results.values()
    numbers = ", ".join(str(len(run.sharing)) for run in results.get("shared", ()))
    seeds = " | ".join(f"seed {seed}" for seed in range(len(first)))
    lines = [f"| AdamW | bytes per parameter | {seeds} | mean | difference | seconds |"]
    lines.append("|---" * (5 + len(first)) + "|")
    for variant, runs in results.items():
        losses, base = (np.array([run.validation for run in each]) for each in (runs, first))
        error = (losses - base).std(ddof=1) / len(runs) ** 0.5 if len(runs) > 1 else np.nan
        difference = "-" if runs is first else f"{(losses - base).mean():+.4f} ± {error:.4f}"
        kept, seconds = (np.mean([getattr(run, of) for run in runs]) for of in ("bytes_per_parameter", "seconds"))
        each = " | ".join(f"{loss:.4f}" for loss in losses)
        lines.append(f"| {variant} | {kept:.2f} | {each} | {losses.mean():.4f} | {difference} | {seconds:.0f} |")
    note = f"\n\nParameters whose noise `shared` shared, seed by seed: {numbers}." if numbers else ""
    return "\n".join(lines) + note


def report(results: dict[str, list[Result]], steps: int, size: Size) -> dict[str, Any]:
    """The same and more for a JSON file: where and when, on what, and every run."""
    text = b"".join(part.tobytes() for part in corpus())

    def row(run: Result):
        numbers = {of: getattr(run, of) for of in ("validation", "bytes_per_parameter", "seconds")}
        return numbers | {"sharing": [shared._asdict() for shared in run.sharing]}

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"platform": platform.platform(), "cores": os.cpu_count(), "device": jax.devices()[0].device_kind},
        "versions": {"python": platform.python_version()}
        | {module.__name__: module.__version__ for module in (jax, optax, flax, snr_adam)},
        "text": {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()},
        "steps": steps,
        "size": size._asdict(),
        "runs": {variant: [row(run) for run in runs] for variant, runs in results.items()},
    }


def main(args=None, size: Size = Size()) -> None:
    """One run, or the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--optimizer", choices=VARIANTS, default="packed")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="all optimizers with 3 seeds")
    parser.add_argument("--json", type=Path, default=Path("benchmarks", "results", "char_lm.json"))
    options = parser.parse_args(args)
    if options.table:
        results = {v: [train(v, seed, options.steps, size) for seed in SEEDS] for v in VARIANTS}
        print(markdown(results))
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report(results, options.steps, size), indent=1) + "\n")
        return
    result = train(options.optimizer, options.seed, options.steps, size)
    if result.suggestion:
        print(result.suggestion, sharing_table(result.sharing), sep="\n\n")
    elif options.optimizer == "shared":
        print(f"nothing was measured or shared: that happens after {SHARE_AFTER} updates")
    print(
        f"validation loss {result.validation:.4f} nats per byte, {result.bytes_per_parameter:.2f} bytes per parameter"
    )
    print(f"{options.steps:,} updates in {result.seconds:.0f} s, compilation included")


if __name__ == "__main__":
    main()
