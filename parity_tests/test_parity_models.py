"""Both models are the same: weights, modules, hidden states, logits, losses and gradients, in every mode."""

from dataclasses import replace

import pytest

pytest.importorskip("torch", reason="compares with torch")
pytest.importorskip("flax", reason="compares with Flax")

from parity_tests import ladder
from parity_tests.cases import CONFIG, PAIRWISE_CASES, TRACE_CASE
from parity_tests.harness import failures

DTYPES = ["float64", "float32"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "change",
    [{}, {"q_lora_rank": None}, {"first_k_dense": 0}, {"first_k_dense": 3}, {"n_shared_experts": 0}],
    ids=lambda change: " ".join(f"{key}={value}" for key, value in change.items()) or "all parts",
)
def test_weights_cross_between_the_frameworks_bit_for_bit(change, dtype):
    assert not failures(ladder.round_trip(replace(CONFIG, **change), dtype, str(change)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_module_alone_has_equal_outputs_and_gradients(dtype):
    assert not failures(ladder.modules(CONFIG, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_module_in_the_running_model_returns_the_same(dtype):
    measurements = ladder.run_case(TRACE_CASE.at(dtype), trace=True)
    assert not failures(measurements)
    traced = {each.where for each in measurements if each.rung == "trace"}
    for name in ("layers.0.attention.attend", "layers.2.mlp.router.chosen", "layers.2.mlp.shared_expert", "norm"):
        assert name in traced


# All modes in float64, where an error has nothing to hide behind; in float32 by default every other one.
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case.at(dtype), id=f"{dtype}: {case.name}", marks=[pytest.mark.slow] if slow else [])
        for index, case in enumerate(PAIRWISE_CASES)
        for dtype, slow in (("float64", False), ("float32", index % 2 == 1))
    ],
)
def test_modes_agree_on_hidden_states_logits_loss_and_gradients(case):
    assert not failures(ladder.run_case(case))


def test_experts_are_chosen_alike_but_for_near_ties_and_with_equal_choices_all_agrees():
    measurements = ladder.near_ties(replace(TRACE_CASE, torch_micro_batches=1))
    assert not failures(measurements)
    last_router = [each for each in measurements if each.rung == "choices"][-1]
    assert " 0 of " not in last_router.where, "no choice was decided by rounding: the case tests nothing"
