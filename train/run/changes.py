"""What differs between the checkpoint that a run goes on from and its present settings and data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch_ref.spec.interface import UserError
from train.data.corpus import compare_identity
from train.run.extension import LENGTH, extends, why_not
from train.run.options import Options, flag, trajectory_differences
from train.state.neutral import is_state


def changes_since(
    checkpoint: Path,
    meta: dict[str, Any],
    options: Options,
    automatic: Sequence[str],
    identity: dict[str, Any],
    step: int,
) -> list[str]:
    """One sentence part for each change to tell. Raises `UserError` for those that would change the run's course,
    unless `--allow-changed-settings` is given.

    Args:
        meta: what the loop stored in the checkpoint.
        automatic: names of the settings that `auto` chose for this device.
        identity: of the data at hand.
        step: that of the checkpoint.
    """
    stored, now = meta["options"], options.to_dict()
    # What `auto` chose, there and here, is the devices' business. Earlier versions did not note what it chose.
    chosen = [name for name in automatic if name in meta.get("automatic", automatic)]
    decided = {name: stored.get(name) for name in chosen if stored.get(name) != now[name]}
    stored = stored | {name: now[name] for name in chosen}
    extended = []
    if extends(stored, options, step):
        extended = [name for name in LENGTH if stored[name] != now[name]]
    told = [f"{flag(name)} was {stored[name]}, now {now[name]}" for name in extended]
    stored = stored | {name: now[name] for name in extended}
    differences = trajectory_differences(stored, now)
    data_differences = compare_identity(_exact(meta["data"], stored), _exact(identity, now))
    differences += [message for severity, message in data_differences if severity == "refuse"]
    if differences and not options.allow_changed_settings:
        why = why_not(stored, options, step, _earlier_ones(checkpoint))
        raise UserError(
            f"{checkpoint}: {'; '.join(differences)}: that would change the run{why}; take the former settings, "
            "another --run-dir, or --allow-changed-settings"
        )
    told += [f"{flag(name)} auto was {value}, now {now[name]}" for name, value in decided.items() if name == "dtype"]
    return told + differences + [message for severity, message in data_differences if severity == "warn"]


def _earlier_ones(checkpoint: Path) -> Path | str:
    """Where earlier checkpoints are. What `--resume-from` names may be their run's folder, or a neutral one."""
    if is_state(checkpoint):
        return "the former run"
    folder = checkpoint / "checkpoints"
    return folder if folder.is_dir() else checkpoint.parent


def _exact(identity: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The identity of data with the weights of several datasets as settings have them: it has six digits of each."""
    if "weights" not in identity:
        return identity
    weights = settings.get("dataset_weights") or [1.0] * len(identity["weights"].split())
    return identity | {"weights": " ".join(str(weight).removesuffix(".0") for weight in weights)}
