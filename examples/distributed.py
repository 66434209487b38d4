"""One model trained by several processes that each own a part of the devices, on this machine as on a cluster.

The character model of `char_lm.py`, data parallel: every process reads its share of each batch, JAX averages the
gradients. The processes find each other by `jax.distributed` on localhost; their devices are the cores of this machine.

    --layout zero1    weights whole on every device, moments split over all of them
    --layout fsdp     weights and moments split

    python3 -m uv run examples/distributed.py                          2 processes with 2 devices each
    python3 -m uv run examples/distributed.py --processes 1            the same command on one process
    python3 -m uv run examples/distributed.py --kill-at 120            the last process dies at step 120, by SIGKILL

A checkpoint of all that a step depends on is written every `--save-every` steps. Ctrl-C saves and stops, a process that
dies is replaced by starting all of them again from the last checkpoint, and the same command continues what it finds in
`--folder`. On the same number of processes and devices the weights at the end are those of an undisturbed run, bit for
bit (compare the last lines). On another number the restored values are the same bits; the steps behind differ from
those of the other layout by the order in which gradients are summed.
"""

import argparse
import functools
import hashlib
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import char_lm
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import snr_adam
from snr_adam.state.sharding import Zero1

STOPPED = 3  # a worker's exit code after Ctrl-C


class Run(NamedTuple):
    """What a process needs to train: the mesh, where everything lies, and the compiled step."""

    mesh: jax.sharding.Mesh
    places: Any
    shapes: Any
    start: Any
    step: Any


def split(tree, mesh):
    """The parameters split over the devices by the rule that splits the state in ZeRO-1, also small ones."""
    rule = Zero1(smallest=2**10)
    return jax.tree.map(lambda p: NamedSharding(mesh, P(*rule.spec(p.shape, (None,) * p.ndim, mesh))), tree)


def prepare(options, size) -> Run:
    """Builds the model abstractly, decides where it lives, and compiles nothing yet."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = snr_adam.adamw(options.rate, b1=char_lm.B1, b2=char_lm.B2, weight_decay=0.1, storage="packed")
    tx = snr_adam.observe(tx)

    def create():
        return nnx.split(char_lm.Transformer(size, nnx.Rngs(options.seed)))

    graph, shapes = nnx.split(nnx.eval_shape(lambda: char_lm.Transformer(size, nnx.Rngs(options.seed))))
    whole = jax.tree.map(lambda p: NamedSharding(mesh, P()), shapes)
    place = split(shapes, mesh) if options.layout == "fsdp" else whole
    placed = jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), shapes, place)
    policy = Zero1(smallest=2**10) if options.layout == "zero1" else "like parameters"
    places = (place, snr_adam.state.state_sharding(tx, placed, mesh, policy))

    @functools.partial(jax.jit, out_shardings=places)
    def start():
        params = create()[1]
        return params, tx.init(params)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(places, None))
    def step(carry, batch):
        params, state = carry
        loss, grads = jax.value_and_grad(char_lm.loss_of)(params, graph, batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    return Run(mesh, places, jax.eval_shape(start), start, step)


def batch_at(step: int, options, size, mesh):
    """The batch of a step, a function of the seed and the step alone; every process makes the part that it owns."""
    text, _ = char_lm.corpus()
    starts = np.random.default_rng([options.seed, step]).integers(0, len(text) - size.context, size.batch)
    windows = char_lm.windows(text, starts, size.context)
    return jax.make_array_from_callback(windows.shape, NamedSharding(mesh, P("data")), lambda part: windows[part])


def telemetry(state, batch: int) -> str:
    """What `observe` has seen so far, of all layers together: small vectors that every process holds whole."""
    total = snr_adam.report(state, batch).total
    if np.isnan(total["snr"]):
        return f"update RMS {total['update_rms']:.2e}  SNR not known yet"
    found = total["noise_scale"] if total["snr_low"] > 0 else total["noise_scale_low"]
    scale = f"{'' if total['snr_low'] > 0 else '>= '}{found:.0f}"
    return f"update RMS {total['update_rms']:.2e}  SNR {total['snr']:.3f}  noise scale {scale} windows"


def anywhere(flag: bool) -> bool:
    """Whether the flag is set on any process. All processes ask at the same step."""
    return bool(np.any(multihost_utils.process_allgather(np.array(flag)))) if jax.process_count() > 1 else flag


def digest(tree) -> str:
    """A hash of all values, the same however they are split."""
    whole = jax.jit(lambda x: x, out_shardings=NamedSharding(jax.tree.leaves(tree)[0].sharding.mesh, P()))(tree)
    leaves = [np.asarray(x.addressable_data(0)) for x in jax.tree.leaves(whole)]
    return hashlib.sha256(b"".join(x.tobytes() for x in leaves)).hexdigest()[:16]


def work(options, size) -> int:
    """One process: restores or begins, trains, saves. Returns its exit code."""
    asked = []
    signal.signal(signal.SIGINT, lambda *_: asked.append(True))
    run, first = prepare(options, size), jax.process_index() == 0
    manager = ocp.CheckpointManager(
        options.folder.resolve(), options=ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    )
    done = manager.latest_step() or 0
    if done:
        like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), run.shapes, run.places)
        carry = manager.restore(done, args=ocp.args.StandardRestore(like))
    else:
        carry = run.start()
    value = digest(carry)
    if first:
        where = f"{jax.process_count()} processes, {jax.device_count()} devices, {options.layout}"
        print(f"{where}: from step {done}, weights and state {value}")
        print(f"optimizer state: {snr_adam.state.footprint(carry[1])}", flush=True)
    bar = tqdm(total=options.steps, initial=done, unit=" steps", disable=None if first else True)
    loss = jnp.nan
    for step in range(done, options.steps):
        if step == options.kill_at and jax.process_index() == jax.process_count() - 1:
            signal.raise_signal(signal.SIGKILL)
        carry, loss = run.step(carry, batch_at(step, options, size, run.mesh))
        bar.update()
        if (step + 1) % options.report_every == 0 or step + 1 == options.steps:
            stop = anywhere(bool(asked))
            if first:
                tqdm.write(f"step {step + 1:6}  loss {float(loss):.4f}  {telemetry(carry[1], size.batch)}")
                sys.stdout.flush()
            if stop or step + 1 == options.steps:
                done = step + 1
                break
        if (step + 1) % options.save_every == 0:
            manager.save(step + 1, args=ocp.args.StandardSave(carry))
    bar.close()
    if done != manager.latest_step():
        manager.save(done, args=ocp.args.StandardSave(carry))
    manager.close()
    value = digest(carry)
    if first:
        print(snr_adam.report(carry[1], size.batch))
        print(f"after step {done}: loss {float(loss):.6f}, weights and state {value}", flush=True)
    return 0 if done >= options.steps else STOPPED


def launch(options, arguments: list[str]) -> int:
    """Starts the processes and waits for them; if one dies, ends the others and starts all again."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends Ctrl-C to the workers as well, who save and stop
    for attempt in range(options.restarts + 1):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        again = ["--kill-at", "-1"] if attempt else []  # the drill is over
        workers = [
            subprocess.Popen([sys.executable, __file__, *arguments, *again, "--worker", f"{i}", "--address", address])
            for i in range(options.processes)
        ]
        codes = watch(workers)
        if all(code == 0 for code in codes):
            return 0
        if STOPPED in codes:
            print("stopped and saved: the same command continues", flush=True)
            return 130
        print(f"a process died (exit codes {codes}): starting again from the last checkpoint", flush=True)
    return 1


def watch(workers) -> list[int]:
    """Exit codes of all workers; from the moment when one has failed, the others are waiting in vain and are ended."""
    while any(worker.poll() is None for worker in workers):
        if any(worker.poll() not in (None, 0, STOPPED) for worker in workers):
            time.sleep(0.5)  # those that notice by themselves say why
            for worker in workers:
                worker.kill()
        time.sleep(0.05)
    return [worker.wait() for worker in workers]


def parse(arguments) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=2, help="devices of each process")
    parser.add_argument("--layout", choices=("zero1", "fsdp"), default="zero1")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=char_lm.Size().width, help="of the model; a multiple of 4")
    parser.add_argument("--context", type=int, default=char_lm.Size().context, help="bytes that the model reads")
    parser.add_argument("--batch", type=int, default=char_lm.Size().batch, help="windows per step, of all processes")
    parser.add_argument("--folder", type=Path, default=Path("build", "distributed"), help="where checkpoints are")
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--report-every", type=int, default=10, help="steps between reports and looks for Ctrl-C")
    parser.add_argument("--restarts", type=int, default=2, help="how often to start again after a process has died")
    parser.add_argument("--kill-at", type=int, default=-1, help="a fire drill: the last process dies at this step")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.worker is None:
        return launch(options, arguments)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", options.devices)
    if jax.config.jax_compilation_cache_dir is None:  # a restart should not wait for the compiler
        jax.config.update("jax_compilation_cache_dir", str(options.folder.resolve() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    if options.processes > 1:
        jax.distributed.initialize(options.address, options.processes, options.worker)
    try:
        return work(options, char_lm.Size(options.width, options.context, options.batch))
    except jax.errors.JaxRuntimeError as error:  # what a process sees when another one is gone
        print(f"process {options.worker} ends: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
