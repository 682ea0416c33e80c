"""Both models are the same: weights, modules, hidden states, logits, losses and gradients, in every mode."""

import math
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch", reason="compares with torch")
pytest.importorskip("flax", reason="compares with Flax")

from parity_tests.harness import ladder
from parity_tests.harness.cases import CONFIG, FLOAT32_CASES, PAIRWISE_CASES, TRACE_CASE, Case, case_batch, case_values
from parity_tests.harness.measure import failures, relative_error, run_flax, run_torch
from torch_ref.spec.config import PRESETS, ComputeConfig
from torch_ref.spec.parameters import initial_values

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


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case.at(dtype), id=f"{dtype}: {case.name}", marks=[pytest.mark.slow] if slow else [])
        for case in PAIRWISE_CASES
        for dtype, slow in (("float64", False), ("float32", case not in FLOAT32_CASES))
    ],
)
def test_modes_agree_on_hidden_states_logits_loss_and_gradients(case):
    assert not failures(ladder.run_case(case))


def test_experts_are_chosen_alike_but_for_near_ties_and_with_equal_choices_all_agrees():
    measurements = ladder.near_ties(replace(TRACE_CASE, torch_micro_batches=1))
    assert not failures(measurements)
    last_router = [each for each in measurements if each.rung == "choices"][-1]
    assert " 0 of " not in last_router.where, "no choice was decided by rounding: the case tests nothing"


@pytest.mark.parametrize("run", [run_torch, run_flax], ids=["torch", "flax"])
def test_no_logit_sees_a_later_token(run):
    """Another token at the end and in the middle: earlier logits stay, that one's and later ones' change."""
    case = replace(TRACE_CASE.at("float64"), torch_micro_batches=1)
    inputs, targets = case_batch(case.config, 2, case.seq)
    inputs[1] = inputs[0]
    position = case.seq // 2
    inputs[1, position] = (inputs[0, position] + 1) % case.config.vocab_size
    one, other = run(case, case_values(case.config), inputs, targets).logits
    assert relative_error(other[:position], one[:position]) <= 1e-13
    assert (np.abs(other - one)[position:].max(-1) > 1e-6).all()


def test_first_loss_is_near_that_of_guessing():
    """ln(vocab) for guessing, and 0.5 for logits of variance 1 that know nothing yet."""
    config = replace(PRESETS["tiny"], num_layers=2)
    case = Case("start", config, ComputeConfig(attention="sdpa", moe="grouped"), ComputeConfig())
    loss = run_torch(case, initial_values(config, seed=0), *case_batch(config, 2, 512)).loss
    assert abs(loss - math.log(config.vocab_size) - 0.5) < 0.1
