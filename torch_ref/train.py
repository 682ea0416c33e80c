"""Train with PyTorch: `python -m torch_ref.train --preset tiny`. `--help` lists every setting.

The twin of `train/flax_main.py`: same flags, same log, same numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from torch_ref.spec.interface import Backend, UserError
from train.run.launch import launch, settle
from train.run.loop import FINAL_WEIGHTS
from train.run.options import Options


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the arguments say; returns the exit code."""
    return launch(argv, "python -m torch_ref.train", "torch", build, write_weights)


def build(options: Options) -> tuple[Options, Backend]:
    """The torch backend, and the options with everything that depends on the device settled."""
    try:
        import torch  # noqa: F401
    except ImportError:
        raise UserError(
            "torch is not installed: pip install -e '.[torch]' (or train with python -m train.flax_main)"
        ) from None
    from torch_ref.backend import TorchBackend
    from torch_ref.device import available_memory, default_dtype, resolve_device

    device = resolve_device(options.device)
    on_gpu = device.type == "cuda"
    options = settle(
        options, default_dtype(device), available_memory(device), on_gpu=on_gpu, framework=TorchBackend.framework
    )
    return options, TorchBackend(options.model, options.compute, options.optimizer, options.device)


def write_weights(run_dir: Path, backend: Backend) -> Path:
    """The final weights as a state dict: `Model.load_state_dict` takes it."""
    import torch

    from torch_ref.checkpoint import write_tensors

    weights = {name: torch.from_numpy(array) for name, array in backend.state().weights.items()}
    path = run_dir / f"{FINAL_WEIGHTS}.pt"
    write_tensors(path, weights)
    return path


if __name__ == "__main__":
    sys.exit(main())
