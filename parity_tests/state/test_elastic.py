"""A checkpoint is the same whatever number of devices wrote it: each stretch of a run goes on with another one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flax", reason="meshes are JAX's")

from parity_tests.harness.cases import case_batch
from parity_tests.harness.devices import FAULT_MODEL as MODEL
from parity_tests.harness.devices import SCHEDULE
from parity_tests.support.processes import cpu_devices
from torch_ref.spec.config import ComputeConfig
from torch_ref.spec.interface import OptimizerConfig

STRETCHES = ((1, 8, 1), (1, 1, 1), (1, 2, 1), (2, 1, 2), (1, 8, 1))
"""Meshes of 8, 1, 2, 4 and 8 devices."""
STEPS, ROWS, SEQ, BOUND = 2, 8, 24, 1e-10


def optimizer(rows: int) -> OptimizerConfig:
    return OptimizerConfig(SCHEDULE, weight_decay=0.1, micro_batch_size=rows)


def compute(mesh: tuple[int, int, int] = (1, 1, 1)) -> ComputeConfig:
    return ComputeConfig("float64", moe="dense", mesh=mesh)


def run(folder: Path) -> None:
    """In a process with eight devices: the losses and norms of a run on one device, and of one in stretches."""
    from flax_model.backend import FlaxBackend

    def steps(backend: FlaxBackend, first: int, count: int) -> list[list[float]]:
        results = [backend.step(*case_batch(MODEL, ROWS, SEQ, seed)) for seed in range(first, first + count)]
        return [[result.loss, result.grad_norm, *result.expert_counts.flatten().tolist()] for result in results]

    straight = FlaxBackend(MODEL, compute(), optimizer(ROWS), "cpu")
    straight.init(0)
    expected = steps(straight, 0, STEPS * len(STRETCHES) + 1)
    straight.close()
    got: list[list[float]] = []
    for number, mesh in enumerate(STRETCHES):
        backend = FlaxBackend(MODEL, compute(mesh), optimizer(ROWS // int(np.prod(mesh))), "cpu")
        if number:
            backend.restore(folder / f"step_{number * STEPS}")
        else:
            backend.init(0)
        got += steps(backend, number * STEPS, STEPS)
        backend.save(folder, f"step_{backend.steps_done}", {"by": list(mesh)})
        backend.close()
    print(json.dumps([expected, got]))


def test_a_run_goes_on_with_other_numbers_of_devices_and_in_torch(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "parity_tests.state.test_elastic", str(tmp_path)],
        cwd=root,
        env=os.environ | cpu_devices(8) | cache | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    expected, got = (np.array(rows) for rows in json.loads(done.stdout.splitlines()[-1]))
    np.testing.assert_array_equal(got[:, 2:], expected[: len(got), 2:])
    np.testing.assert_allclose(got[:, :2], expected[: len(got), :2], rtol=BOUND)

    pytest.importorskip("torch")
    from torch_ref.backend import TorchBackend
    from train.state.source import load_checkpoint

    torch = TorchBackend(MODEL, compute(), optimizer(ROWS), "cpu")
    load_checkpoint(torch, tmp_path / f"step_{len(got)}")
    assert torch.steps_done == len(got)
    result = torch.step(*case_batch(MODEL, ROWS, SEQ, len(got)))
    np.testing.assert_allclose([result.loss, result.grad_norm], expected[-1, :2], rtol=BOUND)
    np.testing.assert_array_equal(result.expert_counts.flatten(), expected[-1, 2:])


if __name__ == "__main__":
    run(Path(sys.argv[1]))
