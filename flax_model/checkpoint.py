"""Checkpoints of the Flax trainer, by orbax: a folder of two items, `state` (arrays) and `meta` (JSON).

orbax's `AsyncCheckpointer` is used without its `CheckpointManager`. The manager owns one folder, knows a checkpoint
by its step alone, and leaves out, without a word, a save whose step is not later than the latest one. Here the loop
names checkpoints (`step_1000`, `step_final_10100`, the best one elsewhere) and decides what is kept, and saving an
earlier step again must work. What makes saving safe is the checkpointer's: the data goes to a temporary folder, which
is renamed when whole. orbax does not check what it reads back: checksums of every array lie in `meta`, with one of
`meta` itself, and are verified before anything is used.

Twins: `torch_ref/checkpoint.py`, `flax_model/checkpoint.py`.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from flax_model.sharding import host_array, tree_bytes
from torch_ref.spec.checkpoint import (
    checkpoint_name,
    in_step_order,
    named_leaves,
    read_by_all,
    read_errors,
    require_arrays,
    require_contents,
    require_seal,
    require_stored,
    seal,
    shapes,
)
from torch_ref.spec.interface import UserError
from torch_ref.spec.memory import host_memory_available
from torch_ref.spec.processes import ALONE, Agree, Processes, agree_alone
from torch_ref.spec.storage import make_folder, write_errors
from torch_ref.spec.training_state import require_tensors

# An error in writing comes to us by way of orbax's threads and tasks, and each of them logs its traceback.
logging.getLogger("absl").setLevel(logging.CRITICAL)
logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())


def _without_orbax(unraisable: Any, otherwise: Callable = sys.unraisablehook) -> None:
    """Where a save or a restore fails or is interrupted, orbax leaves coroutines behind, reads that end after their
    event loop, and event loops that are half closed: Python would print a traceback of each."""
    code = getattr(unraisable.object, "cr_code", None)
    half_closed = getattr(unraisable.object, "__qualname__", "") == "BaseEventLoop.__del__"
    if half_closed or "Event loop is closed" in str(unraisable.exc_value):
        return
    if code is None or "orbax" not in code.co_filename:
        otherwise(unraisable)


sys.unraisablehook = _without_orbax

TEMPORARY = re.compile(r".+\.orbax-checkpoint-tmp.*")
"""Names of folders that orbax is writing, or was when the process ended."""
UNREADABLE = (jax.errors.JaxRuntimeError,)
"""Raised where the device has no room for what is read."""
BACKGROUND_MEMORY = 2
"""A save goes on in the background only if this many times the state's size is free: the next step then cannot reuse
the buffers that are being written, and needs room of its own."""


class Checkpoints:
    """Writes, finds and reads checkpoints. At most one save is under way at a time."""

    def __init__(self, processes: Processes = ALONE, agree: Agree = agree_alone) -> None:
        self._processes, self._agree = processes, agree
        self._under_way: tuple[Path, int | None] = (Path(), None)
        """What is being written, and its bytes."""
        self._checkpointer = ocp.AsyncCheckpointer(
            _items(),
            # A folder that cannot be made then raises at once, instead of minutes later in a thread.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
        )
        self._reader = self._checkpointer
        if processes.count > 1:
            # Each process reads by itself: one that finds damage does not leave the others waiting.
            me = {"primary_host": processes.index, "active_processes": {processes.index}}
            options = ocp.options.MultiprocessingOptions(**me, barrier_sync_key_prefix=f"reader_{processes.index}")
            self._reader = ocp.Checkpointer(_items(options), multiprocessing_options=options)

    def save(self, path: Path, state: dict, contents: dict) -> None:
        """Write nested dicts of arrays and a JSON object; a checkpoint of that name is replaced. The arrays may be
        donated to a computation as soon as this returns. Raises `UserError` naming a folder that cannot be written to;
        errors of the writing itself are raised by `check_saves` and `wait`."""
        self.wait()
        path = Path(path).absolute()
        self._under_way = path, tree_bytes(state)
        make_folder(path.parent)
        for leftover in path.parent.glob("*") if self._processes.writes else ():
            if TEMPORARY.fullmatch(leftover.name):
                shutil.rmtree(leftover)
        sealed = seal(contents, _host_arrays(state))
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(sealed))
        with write_errors(*self._under_way):
            self._checkpointer.save(path, args=items, force=True)
        available = host_memory_available()
        if available is not None and available < BACKGROUND_MEMORY * tree_bytes(state):
            self.wait()

    def check_saves(self) -> None:
        """Raise what went wrong in the background so far, as `UserError`; does not wait for it to end."""
        with write_errors(*self._under_way):
            self._checkpointer.check_for_errors()

    def wait(self) -> None:
        """Block until the save under way has landed. Raises `UserError` naming it if it could not be written."""
        with write_errors(*self._under_way):
            self._checkpointer.wait_until_finished()

    def find(self, folder: Path) -> list[tuple[int, Path]]:
        """Checkpoints in a folder with their steps, oldest first, whole or not."""
        folders = (path for path in Path(folder).glob("*") if path.is_dir())
        return in_step_order((checkpoint_name(path), path) for path in folders)

    def read_contents(self, path: Path) -> dict:
        """A checkpoint's JSON object. Raises `UserError` naming a folder that is absent, something else, or damaged."""
        self.wait()
        with read_by_all(path, self._agree):
            return load_contents(path)

    def check(self, path: Path, contents: dict, expected: dict) -> None:
        """Raises `UserError` naming the first array that is missing, unknown, or of another shape or dtype than in
        `expected`, nested dicts of `jax.ShapeDtypeStruct`."""
        with read_by_all(path, self._agree):
            stored = shapes(self._stored(path))
            require_stored(contents, stored, path)
            require_tensors(stored, shapes(expected), path)

    def restore(self, path: Path, contents: dict, expected: dict) -> dict:
        """The arrays of a checkpoint, placed as `expected` says; call `check` first. Raises `UserError` where what was
        read is not what was written."""
        with read_by_all(path, self._agree), read_errors(path, *UNREADABLE):
            restore_args = ocp.checkpoint_utils.construct_restore_args(expected)
            items = ocp.args.Composite(state=ocp.args.PyTreeRestore(item=expected, restore_args=restore_args))
            state = self._reader.restore(Path(path).absolute(), args=items)["state"]
        require_tensors(shapes(state), shapes(expected), path)
        require_arrays(contents, _host_arrays(state), path)
        return state

    def read_parts(self, path: Path, contents: dict, *names: str) -> dict:
        """Some of a state's trees (`params`, ...) in NumPy arrays of the stored types, for conversion: it needs neither
        the device nor the memory of the whole state. Raises `UserError` as `restore` does."""
        stored = self._stored(path)
        with read_errors(path, *UNREADABLE):
            wanted = {name: stored[name] for name in names}
            restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
            part = ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args, partial_restore=True)
            parts = self._reader.restore(Path(path).absolute(), args=ocp.args.Composite(state=part))["state"]
        require_arrays(contents, named_leaves(parts), path)
        return parts

    def _stored(self, path: Path) -> dict:
        """What a checkpoint says it holds: nested dicts of shapes and dtypes."""
        with read_errors(path, *UNREADABLE):
            return self._reader.metadata(Path(path).absolute()).item_metadata["state"].tree

    def delete(self, path: Path) -> None:
        self.wait()
        path.unlink() if path.is_symlink() else shutil.rmtree(path)

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._checkpointer.close()
            self._reader.close()


def load_contents(path: Path) -> dict:
    """A checkpoint's JSON object, as orbax wrote it. orbax would ask JAX for its devices, which processes must not do
    before they are joined. Raises `UserError` naming a folder that is absent, something else, or damaged."""
    if not Path(path).is_dir():
        raise UserError(f"{path}: no such checkpoint")
    with read_errors(path):
        contents = json.loads((Path(path) / "meta" / "metadata").read_text(encoding="utf-8"))
    require_seal(contents, path)
    require_contents(contents, "flax", path)
    return contents


def _items(processes: ocp.options.MultiprocessingOptions | None = None) -> ocp.CompositeCheckpointHandler:
    """What writes and reads the items of a checkpoint, all processes together or those named."""
    options = processes or ocp.options.MultiprocessingOptions()
    return ocp.CompositeCheckpointHandler(
        # zarr3 without compression: weights do not compress, and zstd is seven times slower than the disk.
        state=ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, multiprocessing_options=options),
        meta=ocp.JsonCheckpointHandler(multiprocessing_options=options),
        composite_options=ocp.CompositeOptions(multiprocessing_options=options),
    )


def _host_arrays(state: dict) -> Iterator[tuple[str, np.ndarray]]:
    return ((name, host_array(leaf)) for name, leaf in named_leaves(state))
