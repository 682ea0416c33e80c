"""The parts of the warm start by themselves, without an old model: closed forms, and experts out of a dense MLP."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from torch_ref.spec.config import PRESETS, ModelConfig
from torch_ref.spec.parameters import parameter_table, rope_table
from train.warm_start.attention import Calibration, LlamaAttention, convert_attention, fit_latent, kept_theta
from train.warm_start.experts import balanced_router, upcycled_values

torch = pytest.importorskip("torch", reason="the warm start fits with torch")

from parity_tests.support.warm import SMALL, THETA, largest_error, torch_logits, torch_model  # noqa: E402

# The closed form


def test_the_kept_frequencies_are_the_highest_of_the_old_ones():
    warm = PRESETS["smol-774m-warm"]
    assert warm.rope_theta == kept_theta(100000.0, 64, warm.qk_rope_head_dim)
    cos, sin = rope_table(warm, 2)
    old = 100000.0 ** (-np.arange(32) / 32)
    np.testing.assert_allclose(np.arctan2(sin[1], cos[1]), old[: warm.qk_rope_head_dim // 2], rtol=3e-7)


def test_rotary_scores_of_one_key_head_stay_what_they_were():
    """With one K/V head the shared key loses nothing: scores of the kept pairs are equal at every distance."""
    from torch_ref.attention import Attention
    from torch_ref.rotary import make_rope

    config = dataclasses.replace(SMALL, num_kv_heads=1)
    pairs, kept, length = 8, config.qk_rope_head_dim // 2, config.max_position
    rng = np.random.default_rng(0)
    old = LlamaAttention(
        rng.normal(size=(4, 16, 64)), *rng.normal(size=(2, 1, 16, 64)), rng.normal(size=(4, 64, 16)) / 8
    )
    x = rng.normal(size=(length, 64)).astype(np.float32)
    seen = Calibration(x, np.ones(length), np.ones((4, pairs), complex), np.ones(4))
    converted = convert_attention(config, old, seen)
    assert converted.rope_energy == pytest.approx(1)

    frequency = THETA ** (-np.arange(pairs) / pairs)
    turn = np.exp(1j * np.arange(length)[:, None] * frequency)
    q, k = (x @ (w[:, :8] + 1j * w[:, 8:]).transpose(0, 2, 1) * turn for w in (old.q, old.k))
    expected = np.einsum("htj,hsj->hts", q[..., :kept].conj(), np.repeat(k[..., :kept], 4, 0)).real / 16**0.5

    attention = Attention(config)
    attention.load_state_dict({name: torch.from_numpy(value) for name, value in converted.weights.items()})
    rope = make_rope(config, length, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        _, q_rope = attention.queries(torch.from_numpy(x)[None], rope)
        _, k_rope = attention.latents(torch.from_numpy(x)[None], rope)
    actual = np.einsum("thd,sd->hts", q_rope[0].numpy(), k_rope[0].numpy()) * config.softmax_scale
    assert largest_error(actual, expected) < 1e-5


def test_a_constant_direction_keeps_the_latents_length():
    """Inputs of very different lengths lose theirs in the norm, unless a direction is constant over tokens."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(512, 12)) * rng.lognormal(sigma=1.0, size=(512, 1))
    with_constant = np.concatenate([x, np.ones((512, 1))], axis=1)
    target = rng.normal(size=(1, 6, 13))
    target[:, :, 12] = 0
    roots, weight = [np.eye(6)], np.ones(512)
    _, _, lost = fit_latent(target[..., :12], roots, x, weight, 8)
    latent, expand, held = fit_latent(target, roots, with_constant, weight, 8)
    assert 1 - held < 0.5 * (1 - lost)
    normed = (with_constant @ latent.T) / np.sqrt(np.square(with_constant @ latent.T).mean(1, keepdims=True))
    wanted = with_constant @ target[0].T
    error = np.square(normed @ expand[0].T - wanted).sum() / np.square(wanted).sum()
    assert error == pytest.approx(1 - held, abs=1e-4)


# Experts


def dense_model(seed: int = 0):
    from torch_ref.spec.parameters import initial_values

    config = dataclasses.replace(SMALL, first_k_dense=SMALL.num_layers)
    return config, {row.name: value for row, value in initial_values(config, seed)}


def routers(config: ModelConfig) -> list[np.ndarray]:
    return list(np.random.default_rng(1).normal(size=(config.num_layers, config.n_routed_experts, config.hidden_size)))


@pytest.mark.parametrize(("shared", "scaling"), [(1, 1.0), (2, 2.5), (0, 1.0)])
def test_without_diversity_the_experts_compute_the_dense_mlp(shared, scaling):
    dense_config, dense = dense_model()
    config = dataclasses.replace(SMALL, n_shared_experts=shared, routed_scaling_factor=scaling)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, config.max_position)).astype(np.int32)
    before = torch_model(dense_config, ((row, dense[row.name]) for row in parameter_table(dense_config)))
    after = torch_model(config, upcycled_values(config, dense, routers(config), 0.0, 0))
    assert largest_error(torch_logits(after, tokens), torch_logits(before, tokens)) < 1e-5


def test_diversity_draws_a_share_of_each_experts_units_anew():
    _, dense = dense_model()
    values = {row.name: value for row, value in upcycled_values(SMALL, dense, routers(SMALL), 0.25, 0)}
    gate, down = values["layers.0.mlp.experts.gate_proj"], values["layers.0.mlp.experts.down_proj"]
    changed = (gate != dense["layers.0.mlp.gate_proj.weight"]).all(2)
    np.testing.assert_array_equal(changed, (down != dense["layers.0.mlp.down_proj.weight"] / 2).all(1))
    np.testing.assert_array_equal(changed.sum(1), 24)
    assert len({tuple(expert) for expert in changed}) == SMALL.n_routed_experts
    np.testing.assert_array_equal(
        values["layers.0.mlp.shared_expert.gate_proj.weight"], dense["layers.0.mlp.gate_proj.weight"]
    )


def test_the_router_starts_balanced():
    """Also where a large common component would send every token to the same experts."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4096, 64)) @ (rng.normal(size=(64, 64)) * np.geomspace(3, 0.05, 64)) + 4 * rng.normal(size=64)
    x /= np.sqrt(np.square(x).mean(1, keepdims=True))
    router = balanced_router(x.mean(0), x.T @ x / len(x), experts=8, seed=0, layer=0)
    chosen = np.argsort(-(x @ router.T), axis=1)[:, :2]
    load = np.bincount(chosen.ravel(), minlength=8)
    assert load.max() / load.mean() < 1.5
