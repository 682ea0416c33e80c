"""Let writes fail while a run trains (a disk that is full, a folder that is read-only or gone), mend it, go on, and
compare with the run that nobody disturbed:

    unshare --map-root-user --mount python -m parity_tests.harness.write_faults torch FOLDER

In a mount namespace of its own, which `unshare` makes, so that the disks it mounts are seen by nobody else and need no
privilege. There a process is its own root, and gives up root's right to pass over permissions. Linux only. A quota
needs a file system that has some; btrfs does, and takes the real root to mount:

    unshare --mount python -m parity_tests.harness.write_faults torch FOLDER --quota
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from parity_tests.harness.kills import MAINS, numbers, settings
from train.shell import shell

STEPS, AT_STEP = 16, 11
"""The fault comes before the step that ends in a third save; the two before it are whole."""


def mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


def unmount(folder: Path) -> None:
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path, leave: int) -> Callable[[], None]:
    """Fill the disk of a folder but for so many bytes; returns the mend."""
    filler = folder / "filler"
    with open(filler, "wb") as file:
        for _ in range(100):  # a save in the background may take of the room meanwhile
            with contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(folder).free - leave)
                return filler.unlink
            file.truncate(0)
    raise OSError(f"{folder} cannot be filled")


def use_up_files(folder: Path) -> Callable[[], None]:
    """Make empty files until a disk takes no more; returns the mend."""
    fillers = []
    with contextlib.suppress(OSError):
        for number in itertools.count():
            fillers.append(folder / f"filler_{number}")
            fillers[-1].touch()

    def mend() -> None:
        for filler in fillers:
            filler.unlink(missing_ok=True)  # the last one was not made

    return mend


def forbid(folder: Path) -> Callable[[], None]:
    """Take away the permission to make or rename files in a folder; returns the mend."""
    folder.chmod(0o555)
    return lambda: folder.chmod(0o755)


def obey_permissions() -> None:
    """Give up the capabilities by which root passes over the permissions of files (capset(2), version 3)."""
    override, read_search = 1, 2
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable: of capabilities 0 to 31, then of the rest
    libc = ctypes.CDLL(None, use_errno=True)
    libc.capget(header, data)
    for place in (0, 1):
        data[place] &= ~(1 << override | 1 << read_search)
    if libc.capset(header, data) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def make_read_only(folder: Path) -> Callable[[], None]:
    """What opens a file below the folder from now on finds it read-only; returns the mend."""
    mount("--bind", folder, folder)
    mount("-o", "remount,bind,ro", folder)
    return lambda: unmount(folder)


def mount_small(disk: Path) -> None:
    mount("-t", "tmpfs", "-o", "size=8m,nr_inodes=2000", "tmpfs", disk)


def mount_with_quotas(disk: Path) -> None:
    """A btrfs of its own, on which the run's folder can be limited."""
    image = disk.with_suffix(".img")
    with image.open("wb") as file:
        file.truncate(256 * 2**20)
    subprocess.run(["mkfs.btrfs", "--quiet", str(image)], check=True, stdout=subprocess.DEVNULL)
    mount("-o", "loop", image, disk)
    btrfs("quota", "enable", disk)
    btrfs("subvolume", "create", disk / "run")


def btrfs(*arguments: str | Path) -> None:
    subprocess.run(["btrfs", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def use_up_quota(folder: Path) -> Callable[[], None]:
    """Limit a folder to less than it holds; returns the mend."""
    btrfs("qgroup", "limit", "1", folder)
    return lambda: btrfs("quota", "disable", folder.parent)  # a limit cannot be lifted from within it


def move_away(folder: Path) -> Callable[[], None]:
    elsewhere = folder.with_name("moved")
    folder.rename(elsewhere)

    def mend() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        elsewhere.rename(folder)

    return mend


FAULTS: dict[str, tuple[Callable[[Path], Callable[[], None]], str]] = {
    "disk full at a checkpoint": (lambda run: fill(run.parent, 24_000), "no space left"),
    "disk full at a log line": (lambda run: fill(run.parent, 0), "no space left"),
    "no file left on the disk": (lambda run: use_up_files(run.parent), "it may be that no more files fit"),
    "checkpoints without permission": (lambda run: forbid(run / "checkpoints"), "Permission denied"),
    "best without permission": (lambda run: forbid(run / "best"), "Permission denied"),
    "checkpoints read-only": (lambda run: make_read_only(run / "checkpoints"), "Read-only file system"),
    "best read-only": (lambda run: make_read_only(run / "best"), "Read-only file system"),
    "run folder read-only": (lambda run: make_read_only(run), "Read-only file system"),
    "run folder moved away": (move_away, "its folder is gone; was it moved or removed meanwhile?"),
}
"""What happens to a run folder, and what the user is told."""

QUOTA: dict[str, tuple[Callable[[Path], Callable[[], None]], str]] = {
    "quota used up": (use_up_quota, "the quota is used up"),
}
"""The same on a disk with quotas."""


def train(framework: str, argv: list[str], before_step: Callable[[int], None]) -> tuple[int, str, int]:
    """Exit code, what went to standard error, and the steps that were done."""
    name = {"flax": "flax_model", "torch": "torch_ref"}[framework]
    owner = getattr(importlib.import_module(f"{name}.backend"), f"{framework.capitalize()}Backend")
    begin_step, done = owner.begin_step, []

    def watched(self, *rows):
        before_step(self.steps_done + 1)
        result = begin_step(self, *rows)
        done.append(self.steps_done)
        return result

    owner.begin_step, errors = watched, io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            code = importlib.import_module(MAINS[framework]).main(argv)
    finally:
        owner.begin_step = begin_step
    return code, errors.getvalue(), max(done, default=0)


def report(framework: str, folder: Path, quota: bool = False) -> dict[str, dict]:
    """For each of `FAULTS`, or of `QUOTA`, what was said, when, and whether the mended run became the unbroken one."""
    folder.mkdir(parents=True, exist_ok=True)
    argv = ["--config", str(settings(folder, STEPS)), "--eval-interval", "6"]
    code, said, _ = train(framework, [*argv, "--run-dir", str(folder / "straight")], lambda step: None)
    assert code == 0, said
    expected, found = numbers(folder / "straight"), {}
    for name, (make, _) in (QUOTA if quota else FAULTS).items():
        disk = folder / name.replace(" ", "-")
        disk.mkdir()
        (mount_with_quotas if quota else mount_small)(disk)
        run, mends = disk / "run", []

        def before_step(step: int, make=make, run=run, mends=mends) -> None:
            if step == AT_STEP:
                mends.append(make(run))

        code, said, last = train(framework, [*argv, "--run-dir", str(run)], before_step)
        threads = [thread.name for thread in threading.enumerate() if "tensorboard" in thread.name.lower()]
        for mend in mends:
            mend()
        again, said_again, _ = train(framework, [*argv, "--run-dir", str(run)], lambda step: None)
        found[name] = {
            "exit code": code,
            "said": said,
            "steps after the fault": last - AT_STEP + 1,
            "exit code after the mend": again,
            "said after the mend": said_again,
            "equals the unbroken run": again == 0 and numbers(run) == expected,
            "threads left": threads,
        }
        unmount(disk)
    return found


@shell
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m parity_tests.harness.write_faults")
    parser.add_argument("framework", choices=MAINS, help="The framework whose main is run.")
    parser.add_argument("folder", type=Path, help="A new folder for the runs.")
    parser.add_argument("--quota", action="store_true", help="A used-up quota, in place of the other faults.")
    options = parser.parse_args(argv)
    obey_permissions()
    print(json.dumps(report(options.framework, options.folder, options.quota), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
