"""Samplers against the logits processors of `transformers`, and what is drawn against the distribution they leave."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from torch_ref.spec.interface import Sampling

VOCAB = 300
OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
SETTINGS = {
    "off": {},
    "penalty": {"repetition_penalty": 1.4},
    "below one": {"repetition_penalty": 0.7},
    "temperature": {"temperature": 0.6},
    "top-k": {"top_k": 7},
    "all of top-k": {"top_k": VOCAB + 1},
    "top-p": {"top_p": 0.8},
    "one of top-p": {"top_p": 0.0},
    "min-p": {"min_p": 0.1},
    "one of min-p": {"min_p": 1.0},
    "training's": {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
    "all": {"repetition_penalty": 1.3, "temperature": 1.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
    "hot": {"repetition_penalty": 1.1, "temperature": 4.0, "top_p": 0.5, "min_p": 0.3},
}


@pytest.fixture(params=["torch", "flax"])
def samplers(request):
    """`filter_logits` and `choose_token` of a framework, on NumPy arrays."""
    if request.param == "torch":
        torch = pytest.importorskip("torch")
        from torch_ref.sampling import choose_token, filter_logits

        def convert(array):
            return torch.from_numpy(array)
    else:
        convert = pytest.importorskip("jax.numpy").asarray
        from flax_model.sampling import choose_token, filter_logits

    def run(function):
        return lambda *arrays, sampling: np.asarray(function(*map(convert, arrays), sampling))

    return run(filter_logits), run(choose_token)


@pytest.fixture
def rounded_sums(request, monkeypatch):
    """Cumulative sums of a framework with the rounding of a parallel one: off by 1e-7 here and there, not monotone."""
    noise = 1 + 1e-7 * np.random.default_rng(5).standard_normal(VOCAB, dtype=np.float32)
    if request.node.callspec.params["samplers"] == "torch":
        import torch

        plain = torch.Tensor.cumsum
        monkeypatch.setattr(torch.Tensor, "cumsum", lambda self, axis: plain(self, axis) * torch.from_numpy(noise))
    else:
        import jax.numpy as jnp

        added = jnp.cumsum
        monkeypatch.setattr(jnp, "cumsum", lambda array, axis: added(array, axis) * noise)


def random_logits(rows: int = 6) -> np.ndarray:
    """Rows from flat to peaked."""
    scale = np.linspace(0.3, 4, rows, dtype=np.float32)[:, None]
    return scale * np.random.default_rng(0).standard_normal((rows, VOCAB), dtype=np.float32)


def seen_of(tokens: np.ndarray) -> np.ndarray:
    seen = np.zeros((len(tokens), VOCAB), bool)
    np.put_along_axis(seen, tokens, True, axis=1)
    return seen


def processed(tokens: np.ndarray, logits: np.ndarray, settings: dict) -> np.ndarray:
    """What the processors of `transformers` make of logits, in the order in which its `generate` lines them up."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.GenerationConfig(do_sample=True, **{**OFF, **settings})
    generator = transformers.GenerationMixin()
    generator.config = SimpleNamespace(is_encoder_decoder=False)
    processors = generator._get_logits_processor(config, input_ids_seq_length=tokens.shape[1], device="cpu")
    return processors(torch.from_numpy(tokens), torch.from_numpy(logits)).numpy()


@pytest.mark.parametrize("name", SETTINGS)
def test_filters_are_those_of_transformers(name, samplers):
    filter_logits, _ = samplers
    logits = random_logits()
    tokens = np.random.default_rng(1).integers(0, VOCAB, (len(logits), 40))
    expected = processed(tokens, logits, SETTINGS[name])
    got = filter_logits(logits, seen_of(tokens), sampling=Sampling(**{**OFF, **SETTINGS[name]}))
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(expected))
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert (np.isfinite(got).sum(-1) >= 1).all()
    changes = name not in ("off", "all of top-k")
    assert changes == (not np.array_equal(got, logits))


def test_tokens_tied_at_the_limit_of_top_k_are_kept_as_in_transformers(samplers):
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, 5], logits[0, 10:14] = 2, 1
    expected = processed(np.zeros((1, 1), np.int64), logits, {"top_k": 3})
    got = samplers[0](logits, np.zeros_like(logits, bool), sampling=Sampling(**{**OFF, "top_k": 3}))
    np.testing.assert_array_equal(got, expected)
    assert np.isfinite(got).sum() == 5


def test_greedy_applies_the_penalty_alone_and_takes_the_lowest_of_equals(samplers):
    _, choose = samplers
    logits = np.zeros((3, VOCAB), np.float32)
    logits[0, [40, 7, 90]] = 3
    logits[1, [3, 200]] = 2, 1.5
    logits[2, :] = -1
    seen = np.zeros_like(logits, bool)
    seen[1, 3] = seen[2, 0] = True
    sampling = Sampling(greedy=True, repetition_penalty=2.0, temperature=0.1, top_k=1, min_p=0.5)
    assert choose(logits, seen, np.zeros(3, np.float32), sampling=sampling).tolist() == [7, 200, 1]


@pytest.mark.parametrize("name", ["off", "training's", "all", "one of top-p"])
def test_what_is_drawn_has_the_filtered_distribution(name, samplers):
    """Numbers spread evenly over [0, 1) give each token as often as its probability, to within one draw a token."""
    filter_logits, choose = samplers
    draws = 4096
    logits = random_logits(3)[2:]
    seen = np.zeros_like(logits, bool)
    sampling = Sampling(**{**OFF, **SETTINGS[name]})
    filtered = np.float64(filter_logits(logits, seen, sampling=sampling)[0])
    probability = np.exp(filtered - filtered.max())
    probability /= probability.sum()
    uniform = np.arange(draws, dtype=np.float32) / draws
    tokens = choose(np.repeat(logits, draws, 0), np.repeat(seen, draws, 0), uniform, sampling=sampling)
    counts = np.bincount(tokens, minlength=VOCAB)
    assert np.abs(counts - draws * probability).max() < 1.1
    assert not counts[probability == 0].any()


def test_a_token_that_was_filtered_out_is_never_drawn(samplers, rounded_sums):
    """At numbers around those where one token that was kept ends and the next begins."""
    logits = random_logits(3)[2:]
    seen, sampling = np.zeros_like(logits, bool), Sampling(**{**OFF, "top_k": 9})
    filtered = np.float64(samplers[0](logits, seen, sampling=sampling)[0])
    probability = np.exp(filtered) / np.exp(filtered).sum()
    ends = np.floor(np.cumsum(probability)[probability > 0] * 2**23)[:, None] + np.arange(-4, 5)
    uniform = np.float32(ends.clip(0, 2**23 - 1).reshape(-1) / 2**23)
    many = [np.repeat(array, len(uniform), 0) for array in (logits, seen)]
    tokens = samplers[1](*many, uniform, sampling=sampling)
    assert set(tokens) == set(np.flatnonzero(probability))


def test_the_largest_number_still_finds_a_token(samplers):
    """Also where the probabilities do not sum to 1 in float32."""
    logits = random_logits(64)
    seen, uniform = np.zeros_like(logits, bool), np.full(len(logits), 1 - 2.0**-23, np.float32)
    sampling = Sampling(**{**OFF, "top_k": 9})
    filtered = samplers[0](logits, seen, sampling=sampling)
    for u in (uniform, np.zeros_like(uniform)):
        tokens = samplers[1](logits, seen, u, sampling=sampling)
        assert np.isfinite(np.take_along_axis(filtered, tokens[:, None].astype(np.int64), 1)).all()
