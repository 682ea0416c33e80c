"""Where a run goes on: the newest whole checkpoint of its folder, the same for both frameworks.

A damaged checkpoint is never taken for none. Where an older one is whole, the run goes on from there and the damaged
ones are set aside under another name; where none is, the run does not begin anew, but says what to do.
"""

from __future__ import annotations

import logging
from pathlib import Path

from torch_ref.spec.checkpoint import NAMES, DamagedCheckpoint, checkpoint_framework, checkpoint_name, checkpoint_step
from torch_ref.spec.interface import Backend, UserError
from torch_ref.spec.storage import unused_name
from train.state.source import load_checkpoint

log = logging.getLogger(__name__)

DAMAGED = ".damaged"
"""Appended to the name of a checkpoint that was set aside."""


def own_checkpoints(backend: Backend, run_dir: Path, other: Path | None) -> list[tuple[int, Path]]:
    """Checkpoints of a run folder with their steps, oldest first, whole or not; `other` is one that was asked for.

    Raises `UserError` if the folder holds a run of the other framework, or nothing but checkpoints that were set aside
    and no other was asked for.
    """
    folder = run_dir / "checkpoints"
    own = backend.find(folder)
    if own or not folder.is_dir():
        return own
    entries = sorted(folder.iterdir())
    checkpoints = [path for path in entries if checkpoint_step(checkpoint_name(path)) is not None]
    kinds = {checkpoint_framework(path) for path in checkpoints} - {None}
    if kinds:
        other, here = NAMES[kinds.pop()], backend.framework
        raise UserError(
            f"--run-dir {run_dir}: holds a run of the {other} trainer; give another folder, or go on with it in "
            f"{NAMES.get(here, here)}: python -m train.convert {run_dir} NEW_FOLDER --to {here}"
        )
    damaged = [path for path in entries if DAMAGED in path.name]
    if damaged and other is None:
        raise UserError(_none_is_whole(backend, run_dir, [f"{path.name} was set aside" for path in damaged]))
    return own


def refuse_to_go_back(wanted: Path, own: list[tuple[int, Path]]) -> None:
    """Going on from an older checkpoint of the run would leave newer ones that do not follow from it."""
    last, newest = own[-1]
    if any(path.resolve() == wanted.resolve() for _, path in own[:-1]):
        raise UserError(
            f"--resume-from {wanted}: {newest.parent} holds later steps, up to {last}; give another --run-dir, or "
            "remove the later checkpoints"
        )


def restore_newest(
    backend: Backend, run_dir: Path, own: list[tuple[int, Path]], other: Path | None
) -> tuple[Path, dict]:
    """Load the newest whole checkpoint: of `own` ones, or else `other`. Returns its path and the `meta` of the loop.

    Raises `UserError` naming all that are damaged where none is whole.
    """
    candidates = [path for _, path in reversed(own)] + [other] * (other is not None)
    damaged: dict[Path, DamagedCheckpoint] = {}
    for path in candidates:
        try:
            meta = load_checkpoint(backend, path)
        except DamagedCheckpoint as error:
            damaged[path] = error
            continue
        for skipped, error in damaged.items() if backend.processes.writes else ():
            aside = unused_name(skipped.with_name(skipped.name + DAMAGED))
            log.warning("%s; it is now %s", error.args[0].rpartition(";")[0], aside.name)
            skipped.rename(aside)
        if damaged:
            log.warning("going on from %s, the newest checkpoint that is whole; later steps are done again", path)
        return path, meta
    if not own:
        raise damaged[candidates[0]]
    raise UserError(_none_is_whole(backend, run_dir, [f"{path.name}: {error.why}" for path, error in damaged.items()]))


def _none_is_whole(backend: Backend, run_dir: Path, why: list[str]) -> str:
    best = backend.find(run_dir / "best")
    mend = f"put a copy of one back, --resume-from {best[-1][1]}," if best else "put a copy of one back"
    return f"{run_dir / 'checkpoints'}: no checkpoint is whole ({'; '.join(why)}); {mend} or begin in another --run-dir"
