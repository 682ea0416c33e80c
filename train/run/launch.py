"""What both entry points do around the loop: read the command line, guard the run folder, note signals, and turn
mistakes into one line and an exit code."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from torch_ref.spec.config import SpecificationError
from torch_ref.spec.interface import Backend, UserError
from torch_ref.spec.memory import choose_remat
from train import command_line
from train.data.feed import open_data
from train.run.loop import Run
from train.run.options import Options
from train.state.resume import own_checkpoints

FAILED = 2
INTERRUPTED = 130


def launch(
    argv: Sequence[str] | None,
    prog: str,
    framework: str,
    build: Callable[[Options], tuple[Options, Backend]],
    write_weights: Callable[[Path, Backend], Path],
) -> int:
    """Train as the command line says; returns the exit code.

    Args:
        argv: the arguments, by default the process's.
        build: makes the backend, and settles the options that depend on the device (`dtype`, `remat`).
        write_weights: see `Run`.
    """
    try:
        options = command_line.parse(sys.argv[1:] if argv is None else argv, prog)
        run_dir = options.run_dir or Path("runs") / f"{options.preset}-{framework}"
        with exclusive(run_dir):
            options, backend = build(options)
            with closing(backend):
                data = open_data(
                    options.data, run_dir, resume=bool(own_checkpoints(backend, run_dir, options.resume_from))
                )
                return Run(options, run_dir, backend, data, write_weights).train()
    except (UserError, SpecificationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("Interrupted; what was not saved is lost.", file=sys.stderr)
        return INTERRUPTED


def settle(options: Options, dtype: str, memory: int | None, devices: int = 1) -> Options:
    """Options with `dtype`, `mesh` and `remat` chosen where they are `auto`, for a device's own dtype and its free
    memory, and for the number of devices."""
    if options.mesh == "auto":
        options = dataclasses.replace(options, mesh=f"fsdp={devices}")
    if options.dtype == "auto":
        options = dataclasses.replace(options, dtype=dtype)
    if options.remat == "auto":
        remat = choose_remat(
            options.model,
            options.dtype,
            options.rows_per_pass,
            options.seq_len,
            options.micro_batches,
            memory,
            options.mesh_shape,
        )
        options = dataclasses.replace(options, remat=remat)
    return options


@contextmanager
def exclusive(run_dir: Path) -> Iterator[None]:
    """Make the run folder, and keep other processes from training in it. Raises `UserError` if one does."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run_dir / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"--run-dir {run_dir}: another process is training there") from None
    except OSError as error:
        raise UserError(f"--run-dir {run_dir}: {error.strerror or error}") from None
    try:
        yield
    finally:
        lock.release()
