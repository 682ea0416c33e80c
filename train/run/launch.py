"""What both entry points do around the loop: read the command line, guard the run folder, and settle what depends on
the device."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch_ref.spec.interface import Backend
from torch_ref.spec.memory import Framework, choose_remat, step_bytes
from torch_ref.spec.processes import ALONE, Processes
from train import command_line
from train.data.feed import Data, open_data, take_along
from train.run.guard import exclusive
from train.run.loop import Run
from train.run.options import PROCESS, Options
from train.run.runlog import METRICS
from train.run.together import first_by_the_writer, require_same, silence
from train.shell import shell
from train.state.resume import own_checkpoints
from train.state.source import locate


def launch(
    argv: Sequence[str] | None,
    prog: str,
    framework: str,
    build: Callable[[Options], tuple[Options, Backend]],
    write_weights: Callable[[Path, Backend], Path],
    join: Callable[[Options], AbstractContextManager[Processes]] = lambda options: nullcontext(ALONE),
) -> int:
    """Train as the command line says; returns the exit code.

    Args:
        argv: the arguments, by default the process's.
        build: makes the backend, and settles the options that depend on the device (`dtype`, `remat`).
        write_weights: see `Run`.
        join: joins the processes that train together, of which this is one.
    """
    command = partial(_launch, prog=prog, framework=framework, build=build, write_weights=write_weights, join=join)
    return shell(command)(argv)


def _launch(
    argv: Sequence[str], *, prog: str, framework: str, build: Callable, write_weights: Callable, join: Callable
) -> int:
    started = time.monotonic()
    asked = command_line.parse(argv, prog)
    run_dir = asked.run_dir or Path("runs") / f"{asked.preset}-{framework}"
    try:
        with join(asked) as processes, exclusive(run_dir, METRICS) if processes.writes else silence():
            options, backend = build(asked)
            automatic = [
                name
                for name in ("dtype", "remat", "mesh", "micro_batch_size", "loss_chunk")
                if getattr(asked, name) == "auto"
            ]
            with _closing(backend):
                require_same(backend, "settings", options.to_dict() | dict.fromkeys(PROCESS), backend.compute)
                data = first_by_the_writer(backend, lambda kept: _open_data(backend, options, run_dir, kept))
                require_same(backend, f"data in {run_dir}", data.identity)
                require_same(backend, "validation rows", data.scored)
                if options.document_mask:
                    backend.keep_within_documents(data.tokenizer.eot_id)
                    require_same(backend, "paths of --document-mask", backend.compute)  # a device may have failed there
                return Run(options, run_dir, backend, data, write_weights, automatic, started).train()
    except KeyboardInterrupt:
        print("Interrupted; what was not saved is lost.", file=sys.stderr)
        raise


@contextmanager
def _closing(backend: Backend) -> Iterator[None]:
    """Closes the backend; one of several processes only where all come so far: the others are waited for."""
    try:
        yield
    except BaseException:
        if backend.processes.count == 1:
            backend.close()
        raise
    backend.close()
    backend.agree([0])()  # the first one writes and draws for longer than the others' library would wait for it


def _open_data(backend: Backend, options: Options, run_dir: Path, kept: bool) -> Data:
    """The run's data, new or gone on with; as another process has `kept` them."""
    resume = kept or bool(own_checkpoints(backend, run_dir, options.resume_from))
    if options.resume_from and not resume:
        other = locate(options.resume_from).run
        resume = other is not None and take_along(other, run_dir)
    return open_data(options.data, run_dir, resume)


def settle(
    options: Options,
    dtype: str,
    memory: int | None,
    devices: int = 1,
    on_gpu: bool = False,
    framework: Framework = "flax",
) -> Options:
    """Options with what is `auto` chosen for a device: its own dtype, its free memory, how many of it there are, and
    whether it is a GPU with memory of its own."""
    if options.mesh == "auto":
        options = dataclasses.replace(options, mesh=f"fsdp={devices}")
    if options.dtype == "auto":
        options = dataclasses.replace(options, dtype=dtype)
    if options.loss_chunk == "auto":
        options = dataclasses.replace(options, loss_chunk=4096 if on_gpu else 512)
    kind = {"loss_chunk": options.tokens_per_chunk, "framework": framework, "on_gpu": on_gpu}
    if options.micro_batch_size == "auto":
        micro = largest_micro_batch(options, memory, **kind) if on_gpu else 1
        options = dataclasses.replace(options, micro_batch_size=micro)
    if options.remat == "auto":
        shape = options.dtype, options.rows_per_pass, options.seq_len, options.micro_batches
        remat = choose_remat(options.model, *shape, memory, options.mesh_shape, **kind)
        options = dataclasses.replace(options, remat=remat)
    return options


def largest_micro_batch(options: Options, memory: int | None, **kind: Any) -> int:
    """The most rows a device can take at once, without rematerialisation if it was not asked for: fewer and larger
    products. 1 where its memory is not known. `kind` as in `step_parts`."""
    rows = options.batch_size // options.devices
    remat = "off" if options.remat == "auto" else options.remat
    for micro in range(rows, 1, -1) if memory else ():
        shape = options.dtype, micro, options.seq_len, rows // micro, remat, options.mesh_shape
        if rows % micro == 0 and step_bytes(options.model, *shape, **kind) <= memory:
            return micro
    return 1
