"""Training is the same: the optimizer step from identical gradients, 200 steps, greedy decoding, resuming."""

import pytest

pytest.importorskip("torch", reason="compares with torch")
pytest.importorskip("flax", reason="compares with Flax")

from parity_tests import training
from parity_tests.harness import failures


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_optimizer_step_from_identical_gradients(dtype):
    torch, flax = (training.injected_steps(framework, dtype) for framework in ("torch", "flax"))
    assert not failures(training.compare_steps(dtype, torch, flax))
    norms = [report["gradient norm"] for report in torch.reports]
    assert max(norms) > training.STEP_OPTIMIZER.grad_clip > min(norm for norm in norms if norm > 0)
    assert [bool(report["applied"]) for report in torch.reports] == [scale != 0 for scale in training.STEP_SCALES]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_200_training_steps(dtype):
    assert not failures(training.training_run(dtype).measurements())
