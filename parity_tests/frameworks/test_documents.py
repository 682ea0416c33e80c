"""`--document-mask`: a token sees its own document alone. Nothing leaks from one document into another, on any path,
and a document in a packed row is what it is in a row of its own, so its positions may as well restart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from parity_tests.harness.measure import relative_error
from parity_tests.support.backends import CONFIG, FRAMEWORKS, OPTIMIZER, batch, make_backend
from parity_tests.support.gradients import gradients, integers, module
from torch_ref.spec.config import ComputeConfig
from torch_ref.spec.interface import Sampling
from torch_ref.spec.parameters import initial_values

MODEL = replace(CONFIG, max_position=96)
SEPARATOR, SEQ = 0, 90
BEGINS = (31, 32, 60)
"""Where documents begin, besides the one that the row begins in the midst of; one is nothing but its separator."""
DOCUMENTS = np.searchsorted(BEGINS, np.arange(SEQ), side="right")
PATHS = {"torch": ("plain", "sdpa", "masked"), "flax": ("plain", "blocked")}
ON_PATHS = [pytest.param(*case.values, path, marks=case.marks) for case in FRAMEWORKS for path in PATHS[case.values[0]]]


@pytest.fixture(autouse=True)
def small_blocks(request, monkeypatch):
    """Rows of several query blocks, which documents begin and end within."""
    if "flax" in request.node.name:
        monkeypatch.setattr(module("flax", "fused_attention"), "QUERY_BLOCK", 16)


def row(seed: int = 0) -> np.ndarray:
    """No token occurs twice but the separator: a token's embedding is read at one position alone."""
    tokens = 1 + np.random.default_rng(seed).permutation(MODEL.vocab_size - 1)[:SEQ]
    tokens[list(BEGINS)] = SEPARATOR
    return tokens.astype(np.int32)[None]


def hidden_states(framework: str, tokens: np.ndarray, compute: ComputeConfig) -> np.ndarray:
    return PROGRAMS[framework](compute)[0](tokens)


def embedding_gradient(framework: str, tokens: np.ndarray, compute: ComputeConfig, weights: np.ndarray) -> np.ndarray:
    """Of the sum of hidden states times `weights`."""
    return PROGRAMS[framework](compute)[1](tokens, weights)


def values() -> list:
    return [(row, np.float64(value)) for row, value in initial_values(MODEL, seed=3)]


def torch_programs(compute: ComputeConfig) -> tuple[Callable, Callable]:
    import torch

    from torch_ref.model import Model

    model = Model(MODEL, dtype=torch.float64).load_values(values())

    def hidden(tokens):
        return model(torch.from_numpy(tokens), compute).hidden

    def gradient(tokens, weights):
        total = (hidden(tokens) * torch.from_numpy(weights)).sum()
        return torch.autograd.grad(total, model.embed_tokens.weight)[0].numpy()

    return lambda tokens: hidden(tokens).detach().numpy(), gradient


@cache
def flax_programs(compute: ComputeConfig) -> tuple[Callable, Callable]:
    """Compiled once for a shape."""
    import jax

    from flax_model.trees import merge
    from flax_model.values import from_values

    with jax.enable_x64(True):
        graphdef, params, biases = from_values(MODEL, values(), "float64")

    def hidden(params, tokens):
        return merge(graphdef, params, biases)(tokens, compute).hidden

    def gradient(params, tokens, weights):
        take = jax.grad(lambda params: (hidden(params, tokens) * weights).sum())
        return take(params)["embed_tokens"]["weight"]

    def run(program):
        compiled = jax.jit(program)

        def call(*arrays):
            with jax.enable_x64(True):
                return np.asarray(compiled(params, *arrays))

        return call

    return run(hidden), run(gradient)


PROGRAMS = {"torch": torch_programs, "flax": flax_programs}


def within(path: str, **more) -> ComputeConfig:
    return ComputeConfig("float64", attention=path, moe="dense", separator=SEPARATOR, **more)


@pytest.mark.parametrize("remat", ["off", "layers"])
@pytest.mark.parametrize("framework, path", ON_PATHS)
def test_nothing_leaks_from_one_document_into_another(framework, path, remat):
    """Other tokens in the first document leave every other one as it was, to the bit, through all layers; gradients of
    one document are zero for what the others read. Each does change itself."""
    tokens, changed = row(), row()
    changed[0, :31] = changed[0, :31][::-1]
    compute = within(path, remat=remat)
    before, after = (hidden_states(framework, each, compute) for each in (tokens, changed))
    np.testing.assert_array_equal(after[:, DOCUMENTS > 0], before[:, DOCUMENTS > 0])
    assert (after != before)[:, DOCUMENTS == 0].any(-1)[0].sum() >= 30  # the token in the middle may stay

    last = np.zeros((1, SEQ, MODEL.hidden_size))
    last[:, 89] = 1 + np.arange(MODEL.hidden_size)
    gradient = embedding_gradient(framework, tokens, compute, last)
    seen = np.isin(np.arange(MODEL.vocab_size), tokens[0, DOCUMENTS == 3])
    assert not gradient[~seen].any() and gradient[seen].any(-1).all()
    if remat == "off":
        gradient = embedding_gradient(framework, tokens, replace(compute, separator=None), last)
        assert gradient[tokens[0]].any(-1).all(), "the row is one without the mask"


def exact_rope(config, length):
    size = config.qk_rope_head_dim
    angle = np.arange(length)[:, None] * config.rope_theta ** (-np.arange(0, size, 2) / size)
    return np.cos(angle), np.sin(angle)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("framework, path", ON_PATHS)
def test_a_document_is_what_it_is_in_a_row_of_its_own(framework, path, exact, monkeypatch):
    """Rotary positions are relative, so those of a document may as well begin with it. The table's angles are rounded
    to float32, as in other implementations; with exact ones nothing is left but float64's rounding."""
    if exact:
        monkeypatch.setattr(module(framework, "rotary"), "rope_table", exact_rope)
        flax_programs.cache_clear()
    packed = hidden_states(framework, row(), within(path))
    for number in (1, 3):
        tokens = row()[:, number == DOCUMENTS]
        alone = hidden_states(framework, tokens, within(path))
        assert relative_error(packed[:, number == DOCUMENTS], alone) < (1e-13 if exact else 2e-6), number
    flax_programs.cache_clear()


@pytest.mark.parametrize("seq", [1, 33, 90])
@pytest.mark.parametrize("framework, path", [case for case in ON_PATHS if case.values[1] != "plain"])
def test_fast_paths_against_the_plain_one(framework, path, seq):
    assert max(off_the_plain_one(framework, path, seq).values()) <= 1e-13


@pytest.mark.parametrize("seq", [33, 34])
def test_cudnn_gets_lengths_that_it_takes(seq, monkeypatch):
    """With a mask even ones: JAX refuses others in training. Here XLA takes the kernel's place, in float32."""
    jax = pytest.importorskip("jax")
    pytest.importorskip("flax")
    attend = jax.nn.dot_product_attention

    def kernel(q, k, v, *, mask, scale, is_causal, implementation):
        assert implementation == "cudnn" and q.shape[1] % 2 == k.shape[1] % 2 == 0
        return attend(q, k, v, mask=mask, scale=scale, is_causal=is_causal)

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    assert max(off_the_plain_one("flax", "cudnn", seq).values()) <= 1e-6


def off_the_plain_one(framework: str, path: str, seq: int) -> dict[str, float]:
    """Relative errors of output and gradients, in two rows of which each has documents of its own."""
    generator = np.random.default_rng(5)
    operands = [generator.standard_normal((2, seq, heads, size)) for heads, size in ((6, 20), (2, 20), (2, 14))]
    upstream = generator.standard_normal((2, seq, 6, 14))
    documents = integers(framework, (generator.random((2, seq)) < 0.1).cumsum(1).astype(np.int32))
    paths = module(framework, "attention").ATTENTION_PATHS
    got, expected = (
        gradients(framework)(lambda q, k, v, name=name: paths[name](q, k, v, 0.2, documents), operands, upstream)
        for name in (path, "plain")
    )
    return {what: relative_error(a, b) for what, a, b in zip(("output", *"qkv"), got, expected, strict=True)}


def with_separators(seed: int) -> tuple[np.ndarray, np.ndarray]:
    inputs, targets = batch(seed)
    inputs[inputs == SEPARATOR] = 1
    inputs[:, [5, 11]] = targets[:, [4, 10]] = SEPARATOR
    return inputs, targets


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_training_and_validation_keep_to_documents_and_samples_go_on(framework):
    """Loss and validation are those of the documents taken apart; a text that is continued is what it was."""
    inputs, targets = with_separators(0)
    plain, masked = (make_backend(framework, replace(CONFIG, balance_loss_coef=0.0)) for _ in range(2))
    plain.init(0)
    masked.keep_within_documents(SEPARATOR)
    masked.init(0)
    apart, scored = 0.0, 0
    for start, end in ((0, 5), (5, 11), (11, 16)):
        total, count = plain.evaluate(inputs[:, start:end], targets[:, start:end])
        apart, scored = apart + total, scored + count
    total, count = masked.evaluate(inputs, targets)
    assert count == scored and total == pytest.approx(apart, rel=1e-6)
    assert total != pytest.approx(plain.evaluate(inputs, targets)[0], rel=1e-4)

    sampling = Sampling(max_new_tokens=8, stop_token=None)
    prompt = [3, SEPARATOR, 5, 7]
    assert masked.generate(prompt, sampling, 1) == plain.generate(prompt, sampling, 1)

    result = masked.step(inputs, targets)
    assert result.loss == pytest.approx(apart / scored, rel=1e-6)
    assert result.loss != pytest.approx(plain.step(inputs, targets).loss, rel=1e-4)
    for backend in (plain, masked):
        backend.close()


def test_both_frameworks_train_alike():
    """Gradients summed over micro-batches, in float64."""
    pytest.importorskip("torch")
    jax = pytest.importorskip("jax")
    losses = {}
    try:
        for framework in PATHS:
            backend = make_backend(framework, compute=ComputeConfig("float64"), optimizer=OPTIMIZER)
            backend.keep_within_documents(SEPARATOR)
            backend.init(0)
            results = [backend.step(*with_separators(seed)) for seed in range(4)]
            losses[framework] = [(result.loss, result.grad_norm) for result in results]
            backend.close()
    finally:
        jax.config.update("jax_enable_x64", False)
    np.testing.assert_allclose(losses["flax"], losses["torch"], rtol=1e-11)
