"""Train with JAX and Flax: `python -m train.flax_main --preset tiny`. `--help` lists every setting.

The twin of `torch_ref/train.py`: same flags, same log, same numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from torch_ref.spec.interface import Backend, UserError
from torch_ref.spec.parameters import parameter_table
from torch_ref.spec.processes import Processes
from torch_ref.spec.storage import TensorSpec, TensorWriter
from train.run.launch import launch, settle
from train.run.loop import FINAL_WEIGHTS
from train.run.options import Options


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the arguments say; returns the exit code."""
    return launch(argv, "python -m train.flax_main", "flax", build, write_weights, join)


def join(options: Options) -> AbstractContextManager[Processes]:
    """The processes that train together: those of a launcher, or of the options."""
    _require_jax()
    from flax_model.processes import joined

    return joined(options.coordinator, options.processes, options.process_id)


def _require_jax() -> None:
    try:
        import jax  # noqa: F401
    except ImportError:
        raise UserError(
            "JAX is not installed: pip install -e '.[jax]' (or train with python -m torch_ref.train)"
        ) from None


def build(options: Options) -> tuple[Options, Backend]:
    """The Flax backend, and the options with everything that depends on the device settled."""
    _require_jax()
    import jax

    if options.dtype == "float64":
        jax.config.update("jax_enable_x64", True)  # before anything is computed

    from flax_model.backend import FlaxBackend
    from flax_model.compile_cache import keep_compiled_programs
    from flax_model.device import available_memory, default_dtype, resolve_device
    from flax_model.processes import least

    device = resolve_device(options.device)
    keep_compiled_programs(device.platform)
    if device.platform != jax.default_backend():
        jax.config.update("jax_default_device", device)  # weights on their way to it would lie on a GPU
    devices = jax.device_count(device.platform)
    memory = least(available_memory(device), device.platform)
    options = settle(options, default_dtype(device), memory, devices, device.platform == "gpu")
    batch = (options.batch_size, options.seq_len)
    return options, FlaxBackend(options.model, options.compute, options.optimizer, options.device, batch)


def write_weights(run_dir: Path, backend: Backend) -> Path:
    """The final weights as one safetensors file, by the names of the parameter table."""
    weights, path = backend.state().weights, run_dir / f"{FINAL_WEIGHTS}.safetensors"
    dtype = backend.compute.param_dtype
    specs = [TensorSpec(row.name, row.shape, dtype) for row in parameter_table(backend.model_config)]
    with TensorWriter(path, specs) if backend.processes.writes else nullcontext() as writer:
        for name in weights:
            array = weights[name]  # several processes put each together
            if writer:
                writer.write(name, array)
    return path


if __name__ == "__main__":
    sys.exit(main())
