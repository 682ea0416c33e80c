"""A tiny model, batches and both backends, for the tests of what the training loop relies on."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import numpy as np
import pytest

from torch_ref.spec.config import ComputeConfig, ModelConfig
from torch_ref.spec.interface import IGNORE, Backend, OptimizerConfig, TrainingState

FRAMEWORKS = [
    pytest.param(name, marks=pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"needs {module}"))
    for name, module in (("torch", "torch"), ("flax", "flax"))
]

CONFIG = ModelConfig(
    vocab_size=96,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=12,
    intermediate_size=48,
    moe_intermediate_size=40,
    n_routed_experts=4,
    max_position=32,
    balance_loss_coef=0.01,
)
COMPUTE = ComputeConfig(dtype="float32")


def schedule(step):
    return 1e-3 * (step + 1) / (1 + 0.1 * step)


# Gradients of this model have norms around 3, so clipping is active. eps is far above their rounding errors: with the
# usual 1e-8, Adam makes whole steps out of the rounding errors of gradients that are nearly zero.
OPTIMIZER = OptimizerConfig(schedule, eps=1e-5, weight_decay=0.1, grad_clip=1.0, micro_batch_size=2)


def make_backend(
    framework: str,
    config: ModelConfig = CONFIG,
    compute: ComputeConfig = COMPUTE,
    optimizer: OptimizerConfig = OPTIMIZER,
) -> Backend:
    if framework == "torch":
        from torch_ref.backend import TorchBackend

        return TorchBackend(config, compute, optimizer, "cpu")
    from flax_model.backend import FlaxBackend

    return FlaxBackend(config, compute, optimizer, "cpu")


def use_micro_batch(backend: Backend, rows: int) -> None:
    backend.optimizer_config = replace(backend.optimizer_config, micro_batch_size=rows)


def batch(seed: int, rows: int = 4, seq: int = 16, unscored: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Random rows [rows, seq]; a part of the targets is not scored, more of them in later rows."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, CONFIG.vocab_size, (rows, seq + 1)).astype(np.int32)
    targets = tokens[:, 1:].copy()
    targets[generator.random(targets.shape) < unscored * np.linspace(0.2, 1, rows)[:, None]] = IGNORE
    return tokens[:, :-1].copy(), targets


def arrays(state: TrainingState) -> dict[str, np.ndarray]:
    """Every array and counter of a training state, by one name each."""
    groups = {"weights": state.weights, "first": state.first_moment, "second": state.second_moment}
    found = {f"{group} {name}": np.array(values[name]) for group, values in groups.items() for name in values}
    return {**found, "step": np.array(state.step), "updates": np.array(state.updates)}


def assert_same(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Bit for bit."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def assert_close(got: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    """Largest error against the tensor's largest value."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        error = np.abs(got[name] - value).max()
        assert error <= tolerance * np.abs(value).max(), f"{name}: {error} of {np.abs(value).max()}"
