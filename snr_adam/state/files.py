"""States on disk: saved with Orbax, beside a manifest of their bits, and verified when they come back.

    save_state(directory, step, state)      writes directory/step/state and directory/step/manifest, or nothing
    restore_state(directory, like)          the newest complete one, bit for bit, or an error that says what is wrong

A checkpoint appears under its name when all of it is written; a save that was killed leaves a temporary directory,
which nobody takes for a checkpoint and the next save clears away. Orbax keeps no checksum of what it writes, so the
manifest (`checkpoint.manifest`) is what tells a damaged checkpoint from a good one.

Loops with a `CheckpointManager` of their own get the same by saving `checkpoint.manifest(state)` as one more item and
calling `checkpoint.verify` on what they restore. Needs the package orbax-checkpoint, which `import snr_adam` does not.
"""

import contextlib
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from snr_adam import _tree
from snr_adam._state import fits, marks
from snr_adam.state.digest import compare, manifest, verify
from snr_adam.state.forms import FORM, earlier, renewed


def save_state(directory: str | os.PathLike, step: int, state: Any) -> None:
    """Writes `state` and the manifest of its bits as checkpoint `step` of a directory; returns when they are written.

    Args:
      directory: where this run's checkpoints lie; made if missing.
      step: the number of the checkpoint, larger than that of any before.
      state: parameters, optimizer state, whatever a run needs: any tree of arrays.

    Raises:
      ValueError: if the directory has that step already.
      TypeError: for a leaf that is no array, by its name.
    """
    leaves = manifest(state)
    with _manager(directory, writes=True) as manager:
        if step in manager.all_steps():
            raise ValueError(f"{directory} has a checkpoint {step} already: delete it, or save under a later step")
        item = ocp.args.Composite(
            state=ocp.args.StandardSave(_without_empty(state)),
            manifest=ocp.args.JsonSave({"step": step, "form": FORM, "made": marks(state), "leaves": leaves}),
        )
        manager.save(step, args=item, force=True)


def restore_state(directory: str | os.PathLike, like: Any, step: int | None = None) -> Any:
    """The state of the newest complete checkpoint, or of `step`, verified bit by bit.

    Args:
      directory: what `save_state` was given.
      like: a tree of arrays or ShapeDtypeStructs with the names, shapes and dtypes that were saved, such as the fresh
        parameters and `init`'s state. Its shardings are those of the result.
      step: which checkpoint; by default the one with the largest number.

    Raises:
      FileNotFoundError: if there is no complete checkpoint, or not that one.
      ValueError: if the checkpoint has other leaves, shapes or dtypes than `like`, if it cannot be read, or if a bit of
        it has changed; the message names the leaf.
    """
    with _manager(directory, writes=False) as manager:
        step = _chosen(manager, directory, step)
        with _about(f"checkpoint {os.path.join(directory, str(step))}"):
            form, leaves, made = _read_manifest(manager, step)
            _check_marks(made, marks(like))
            target = earlier(like, form)
            compare(target, leaves)
            state = _read_state(manager, step, target)
            verify(state, leaves)
    return state if form == FORM else renewed(state, like)


def _manager(directory, writes: bool) -> ocp.CheckpointManager:
    """Whoever only reads clears nothing away: the temporary directory may be that of a save under way."""
    options = ocp.CheckpointManagerOptions(
        create=writes, cleanup_tmp_directories=writes, enable_async_checkpointing=False
    )
    return ocp.CheckpointManager(os.path.abspath(directory), options=options)


@contextlib.contextmanager
def _about(what: str):
    """Puts what an error is about before its text."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def _chosen(manager, directory, step: int | None) -> int:
    steps = sorted(manager.all_steps())
    if steps and (step is None or step in steps):
        return steps[-1] if step is None else step
    found = f"it has {steps}, ask for one of them" if steps else "give the directory of a run that has finished a save"
    raise FileNotFoundError(f"no complete checkpoint{'' if step is None else f' {step}'} in {directory}: {found}")


def _read_manifest(manager, step: int):
    try:
        saved = manager.restore(step, args=ocp.args.Composite(manifest=ocp.args.JsonRestore()))["manifest"]
        named, form, leaves = saved["step"], saved.get("form", 1), saved["leaves"]
    except Exception as error:
        raise ValueError(
            "its manifest is missing or damaged, so nothing says whether the rest is whole: take an older checkpoint; "
            "if save_state did not write it, read it with Orbax"
        ) from error
    if named != step:
        raise ValueError(f"it was saved as step {named} and renamed since: give the directory its old name")
    if form > FORM:
        raise ValueError(
            f"it is of form {form}, and this version of snr_adam reads forms 1 to {FORM}: take a newer one"
        )
    return form, leaves, saved.get("made", [])


def _check_marks(saved: list, wanted: list) -> None:
    """Raises where a state was made by other parts; older manifests do not say by which."""
    for here, there in zip(saved, wanted, strict=False):
        if not fits(here, there):
            raise ValueError(
                f"it holds moments of {here} (signal/noise) and `like` is of {there}: restore it with the optimizer "
                "that was saved; `from_optax(state, like)` moves between those that keep Adam's averages"
            )


def _read_state(manager, step: int, like):
    target = _without_empty(like)
    try:
        item = ocp.args.Composite(state=ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, target)))
        state = manager.restore(step, args=item)["state"]
    except Exception as error:
        text = str(error)
        quoted = {name: name.replace("/", ".") for name, _ in _tree.named_leaves(like)}
        where = next(
            (f" (at leaf {name})" for name, key in quoted.items() if re.search(rf"[\"']{re.escape(key)}/", text)), ""
        )
        raise ValueError(
            f"its arrays cannot be read{where}, a file is damaged or missing: take an older checkpoint. Orbax says: "
            f"{text[:200]}"
        ) from error
    return jax.tree.map(lambda x, got: jnp.zeros(x.shape, x.dtype) if got is None else got, like, state)


def _without_empty(tree):
    """Arrays of no elements, which Orbax refuses to write, as None; numbers as arrays."""
    arrays = jax.tree.map(_tree.as_array, tree)
    return jax.tree.map(lambda x: None if 0 in x.shape else x, arrays)
