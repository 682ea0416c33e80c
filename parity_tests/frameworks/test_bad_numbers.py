"""Numbers that go bad: what a step makes of them, the same in both frameworks (the table in docs/reliability.md)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from parity_tests.support.backends import (
    CONFIG,
    FRAMEWORKS,
    OPTIMIZER,
    arrays,
    assert_close,
    assert_same,
    batch,
    make_backend,
    schedule,
    use_micro_batch,
)
from torch_ref.spec.interface import IGNORE, StepResult
from torch_ref.spec.parameters import initial_values, parameter_table

EXPERTS, TOPK, TOKENS = CONFIG.n_routed_experts, CONFIG.num_experts_per_tok, 4 * 16
RARE = 7
"""The token of the bad micro-batch."""
Weights = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def backends() -> list:
    made = [make_backend(name) for case in FRAMEWORKS if not case.marks[0].args[0] for name in case.values]
    yield made
    for backend in made:
        backend.close()


def started(backend, change: Callable[[Weights], None]) -> None:
    """The initial weights, the same in both frameworks, with a change."""
    use_micro_batch(backend, OPTIMIZER.micro_batch_size)
    backend.set_schedule(schedule)
    backend.init(seed=0)
    weights = {row.name: np.array(value) for row, value in initial_values(CONFIG, 0)}
    change(weights)
    backend.load_state(dataclasses.replace(backend.state(), weights=weights))


def without_rare(seed: int) -> tuple[np.ndarray, np.ndarray]:
    inputs, targets = batch(seed)
    return np.where(inputs == RARE, RARE + 1, inputs), targets


def one_expert_for_the_rare_token(weights: Weights) -> None:
    """In the first layer the last expert is chosen for `RARE` alone, and one of its weights is not a number."""
    embedding, router = weights["embed_tokens.weight"], weights["layers.0.mlp.router.weight"]
    embedding[:, 0] = -0.05
    embedding[RARE, 0] = 50.0
    weights["layers.0.attention.o_proj.weight"][0] = 0
    router[:, 0] = 0
    router[-1] = 0
    router[-1, 0] = 100.0
    weights["layers.0.mlp.experts.down_proj"][-1, 0, 0] = np.nan


def spoil(name: str, value: float) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        weights[name].flat[3] = value

    return change


def large_scale(weights: Weights) -> None:
    """The loss stays, and the square of a gradient overflows."""
    weights["layers.0.input_norm.weight"] *= np.float32(1e-34)
    for name in ("q_proj", "kv_a_proj"):
        weights[f"layers.0.attention.{name}.weight"] *= np.float32(1e34)


def with_rare_in_the_second_half() -> tuple[np.ndarray, np.ndarray]:
    inputs, targets = without_rare(0)
    inputs[2:, 5] = RARE
    return inputs, targets


def nothing_scored() -> tuple[np.ndarray, np.ndarray]:
    inputs, targets = batch(0)
    return inputs, np.full_like(targets, IGNORE)


SKIPPED = {
    "nothing to predict": (lambda weights: None, nothing_scored),
    "one micro-batch of two": (one_expert_for_the_rare_token, with_rare_in_the_second_half),
    "the gradient alone": (large_scale, lambda: batch(0)),
    "NaN in a router": (spoil("layers.0.mlp.router.weight", np.nan), lambda: batch(0)),
    "inf in a router": (spoil("layers.1.mlp.router.weight", np.inf), lambda: batch(0)),
    "NaN in the shared expert": (spoil("layers.0.mlp.shared_expert.up_proj.weight", np.nan), lambda: batch(0)),
    "NaN in the embedding": (spoil("embed_tokens.weight", np.nan), lambda: batch(0)),
    "NaN in a norm": (spoil("norm.weight", np.nan), lambda: batch(0)),
    "inf in an expert": (spoil("layers.1.mlp.experts.up_proj", np.inf), lambda: batch(0)),
}


@pytest.mark.parametrize("change, rows", SKIPPED.values(), ids=SKIPPED)
def test_what_is_not_finite_updates_nothing(backends, change, rows) -> None:
    for backend in backends:
        started(backend, change)
        before = arrays(backend.state())
        result = backend.step(*rows())
        assert not result.applied, (backend.framework, result)
        assert not np.isfinite([result.loss, result.balance_loss, result.grad_norm]).all()
        after = arrays(backend.state())
        assert after.pop("step") == before.pop("step") + 1
        assert_same(after, before)


def test_the_other_micro_batch_was_fine(backends) -> None:
    """And so is a step without the rare token: weights of an expert that nobody chooses count for nothing, whatever
    they are."""
    for backend in backends:
        started(backend, one_expert_for_the_rare_token)
        result = backend.step(*without_rare(0))
        assert result.applied and np.isfinite([result.loss, result.balance_loss, result.grad_norm]).all()
        assert result.expert_counts[0, -1] == 0
        spoilt = np.array(backend.state().weights["layers.0.mlp.experts.down_proj"])[-1, 0, 0]
        assert np.isnan(spoilt)


def both(backends, change: Callable[[Weights], None], steps: int = 2) -> tuple[list[StepResult], Weights, Weights]:
    """Results and states before and after some steps, found alike in both frameworks."""
    found = []
    for backend in backends:
        started(backend, change)
        before = arrays(backend.state())
        results = [backend.step(*batch(seed)) for seed in range(steps)]
        found.append((results, before, arrays(backend.state())))
    for results, _, after in found[1:]:
        for one, other in zip(results, found[0][0], strict=True):
            assert one.applied and other.applied
            np.testing.assert_array_equal(one.expert_counts, other.expert_counts)
            np.testing.assert_allclose(one.loss, other.loss, rtol=1e-5)
            np.testing.assert_allclose(one.grad_norm, other.grad_norm, rtol=1e-4, atol=1e-12)
        assert_close(after, found[0][2], 1e-4)
    return found[0]


def biased(value: float) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        for layer in range(CONFIG.num_layers):
            weights[f"layers.{layer}.mlp.router.balance_bias"][0] = value

    return change


def test_all_tokens_to_one_expert(backends) -> None:
    results, before, after = both(backends, biased(1000.0))
    assert all((result.expert_counts[:, 0] == TOKENS).all() for result in results)
    for layer in range(CONFIG.num_layers):
        name = f"weights layers.{layer}.mlp.router.balance_bias"
        moved = after[name].astype(np.float64)[0] - before[name][0]
        assert moved == pytest.approx(-2 * CONFIG.balance_bias_rate, abs=1e-4), "it is made less attractive"


def test_an_idle_expert(backends) -> None:
    """It only decays, and its bias rises until it is chosen."""
    results, before, after = both(backends, biased(-1000.0))
    assert all((result.expert_counts[:, 0] == 0).all() for result in results)
    decay = np.prod([1 - schedule(step) * OPTIMIZER.weight_decay for step in range(2)])
    for layer in range(CONFIG.num_layers):
        for matrix in ("gate_proj", "up_proj", "down_proj"):
            name = f"layers.{layer}.mlp.experts.{matrix}"
            np.testing.assert_allclose(after[f"weights {name}"][0], before[f"weights {name}"][0] * decay, rtol=1e-6)
            assert not after[f"first {name}"][0].any() and after[f"first {name}"][1:].any()
        name = f"weights layers.{layer}.mlp.router.balance_bias"
        assert after[name].astype(np.float64)[0] - before[name][0] == pytest.approx(
            2 * CONFIG.balance_bias_rate, abs=1e-4
        )


def test_gradients_of_zero(backends) -> None:
    """Without an embedding and routers nothing comes through: what decays decays, nothing else moves, and nothing
    becomes NaN."""

    def change(weights: Weights) -> None:
        for name in weights:
            if "embed" in name or "router.weight" in name:
                weights[name][:] = 0

    results, before, after = both(backends, change)
    assert [result.grad_norm for result in results] == [0.0, 0.0]
    assert results[0].loss == pytest.approx(np.log(CONFIG.vocab_size), rel=1e-6)
    assert results[0].balance_loss == pytest.approx(CONFIG.num_layers, rel=1e-6), "equal scores: 1 a layer"
    decay = np.prod([1 - schedule(step) * OPTIMIZER.weight_decay for step in range(2)])
    for row in parameter_table(CONFIG):
        if row.trainable:
            factor = decay if row.decay else 1
            np.testing.assert_allclose(after[f"weights {row.name}"], before[f"weights {row.name}"] * factor, rtol=1e-6)
            assert not after[f"first {row.name}"].any() and not after[f"second {row.name}"].any()
