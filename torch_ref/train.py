"""Train with PyTorch: `python -m torch_ref.train --preset tiny`. `--help` lists every setting.

The twin of `train/flax_main.py`: same flags, same log, same numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from torch_ref.spec.interface import Backend, UserError
from torch_ref.spec.processes import Processes
from train.run.launch import launch, settle
from train.run.loop import FINAL_WEIGHTS
from train.run.options import PROCESS, Options, flag


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the arguments say; returns the exit code."""
    return launch(argv, "python -m torch_ref.train", "torch", build, write_weights, join)


def join(options: Options) -> AbstractContextManager[Processes]:
    """The processes that train together: those that torchrun started."""
    for name in PROCESS:
        if getattr(options, name) not in (None, 1):
            start = "torchrun --nproc-per-node N -m torch_ref.train"
            raise UserError(f"{flag(name)} {getattr(options, name)}: is Flax's; here processes are started by {start}")
    _require_torch()
    from torch_ref.processes import joined

    return joined(options.device)


def _require_torch() -> None:
    try:
        import torch  # noqa: F401
    except ImportError:
        raise UserError(
            "torch is not installed: pip install -e '.[torch]' (or train with python -m train.flax_main)"
        ) from None


def build(options: Options) -> tuple[Options, Backend]:
    """The torch backend, and the options with everything that depends on the device settled."""
    _require_torch()
    import torch.distributed as dist

    from torch_ref.backend import TorchBackend
    from torch_ref.device import available_memory, default_dtype, resolve_device
    from torch_ref.processes import least

    device = resolve_device(options.device)
    memory, on_gpu = least(available_memory(device)), device.type == "cuda"
    count = dist.get_world_size() if dist.is_initialized() else 1
    options = settle(options, default_dtype(device), memory, count, on_gpu, TorchBackend.framework)
    return options, TorchBackend(options.model, options.compute, options.optimizer, options.device)


def write_weights(run_dir: Path, backend: Backend) -> Path:
    """The final weights as a state dict: `Model.load_state_dict` takes it."""
    import torch

    from torch_ref.checkpoint import write_tensors

    weights, together = backend.state().weights, {}
    for name in weights:
        array = weights[name]  # several processes put each together
        if backend.processes.writes:
            together[name] = torch.from_numpy(array)
    path = run_dir / f"{FINAL_WEIGHTS}.pt"
    if backend.processes.writes:
        write_tensors(path, together)
    return path


if __name__ == "__main__":
    code = main()
    if "torch_ref.processes" in sys.modules:  # and whole: an interrupted import of torch leaves parts of it alone
        from torch_ref.processes import end

        end(code)
    sys.exit(code)
