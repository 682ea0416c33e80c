"""Training is the same: the optimizer step from identical gradients, 200 steps, greedy decoding, resuming."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="compares with torch")
pytest.importorskip("flax", reason="compares with Flax")

from parity_tests.harness import training
from parity_tests.harness.measure import failures


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_optimizer_step_from_identical_gradients(dtype):
    torch, flax = (training.injected_steps(framework, dtype) for framework in ("torch", "flax"))
    assert not failures(training.compare_steps(dtype, torch, flax))
    norms = [report["gradient norm"] for report in torch.reports]
    assert max(norms) > training.STEP_OPTIMIZER.grad_clip > min(norm for norm in norms if norm > 0)
    assert [bool(report["applied"]) for report in torch.reports] == [scale != 0 for scale in training.STEP_SCALES]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_200_training_steps(dtype):
    assert not failures(training.training_run(dtype, chaos_pairs=0).measurements())


@pytest.mark.slow
def test_float32_training_runs_part_no_faster_than_chaos_allows():
    run = training.training_run("float32")
    assert run.floor.shape == (training.CHAOS_PAIRS, training.TRAINING_STEPS)
    assert 0 < run.floor_level, "runs from starts one rounding apart do not part: the floor measures nothing"
    assert not failures(run.measurements())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_greedy_decoding_and_resuming(dtype, tmp_path):
    assert not failures(training.decoding(dtype))
    assert not failures(training.resuming(dtype, tmp_path))


@pytest.mark.parametrize(
    "dtype, floor, bound",
    [
        ("float64", 1.0, 1e-9),
        ("float32", None, 1e-3),
        ("float32", 1e-6, 1e-3),
        ("float32", 3e-3, 6e-3),
        ("float32", 1.0, 1e-2),
    ],
)
def test_bounds_of_training_runs(dtype, floor, bound):
    curve = np.linspace(5, 3, 200)
    run = training.Divergence(dtype, curve, curve, None if floor is None else np.full((5, 200), floor))
    assert run.bound == bound
    assert not failures(run.measurements())
    assert failures(training.Divergence(dtype, curve, curve + 1.1 * bound, run.floor).measurements())
    assert failures(
        training.Divergence(dtype, curve * 0 + 5, curve * 0 + 5, run.floor).measurements()
    )  # learns nothing
