"""Attention by each path against the plain one of the same framework, values and gradients, and that it is causal."""

import numpy as np
import pytest

from parity_tests.harness.measure import relative_error
from parity_tests.support.backends import CONFIG, FRAMEWORKS
from parity_tests.support.gradients import gradients, module
from torch_ref.spec.parameters import rope_table

LENGTHS = [1, 2, 5, 63, 64, 65, 300]


def attention_operands(seq, dtype, value_size=14):
    """Three heads to one K/V head, and key and value sizes that differ."""
    generator = np.random.default_rng(seq)
    shapes = ((2, seq, 6, 20), (2, seq, 2, 20), (2, seq, 2, value_size))
    return [generator.standard_normal(shape).astype(dtype) for shape in shapes]


ATTENTION = [
    pytest.param(framework, path, marks=framework_case.marks, id=f"{framework} {path}")
    for framework_case in FRAMEWORKS
    for framework in framework_case.values
    for path in {"torch": ("sdpa", "masked"), "flax": ("blocked",)}[framework]
]


@pytest.mark.parametrize("seq, value_size", [*((seq, 14) for seq in LENGTHS), (65, 32)])
@pytest.mark.parametrize("framework, path", ATTENTION)
def test_attention_paths_against_the_plain_one(framework, path, seq, value_size, monkeypatch):
    attention = module(framework, "attention")
    if framework == "flax":
        if seq not in (1, 65, 300):
            pytest.skip("a compilation each; these lengths have a block's part, a block and more, and several")
        monkeypatch.setattr(
            module(framework, "fused_attention"), "QUERY_BLOCK", 64
        )  # several blocks, without the sizes that 256 would take
    operands = attention_operands(seq, np.float64, value_size)
    upstream = np.random.default_rng(1).standard_normal((2, seq, 6, value_size))
    got, expected = (
        gradients(framework)(
            lambda q, k, v, name=name: attention.ATTENTION_PATHS[name](q, k, v, 20**-0.5), operands, upstream
        )
        for name in (path, "plain")
    )
    for what, a, b in zip(("output", "q", "k", "v"), got, expected, strict=True):
        assert relative_error(a, b) <= 1e-13, what


CAUSAL = [*ATTENTION, *[pytest.param(*case.values, "plain", marks=case.marks) for case in FRAMEWORKS]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seq", [1, 2, 5, 63, 64])
@pytest.mark.parametrize("framework, path", CAUSAL)
def test_no_position_sees_a_later_one(framework, path, seq, dtype, monkeypatch):
    """Changing keys and values from some position on leaves every earlier output as it was, to the bit."""
    attention = module(framework, "attention")
    if framework == "flax":
        monkeypatch.setattr(module(framework, "fused_attention"), "QUERY_BLOCK", 16)

    def attend(operands):
        if framework == "torch":
            import torch

            tensors = [torch.from_numpy(operand).to(getattr(torch, dtype)) for operand in operands]
            return attention.ATTENTION_PATHS[path](*tensors, 20**-0.5).float().numpy()
        import jax
        import jax.numpy as jnp

        arrays = [jnp.asarray(operand, dtype) for operand in operands]
        attend = jax.jit(lambda q, k, v: attention.ATTENTION_PATHS[path](q, k, v, 20**-0.5))
        return np.asarray(attend(*arrays), np.float32)

    operands = attention_operands(seq, np.float32)
    before = attend(operands)
    position = seq // 2
    operands[1][:, position:] *= -3
    operands[2][:, position:] += 5
    after = attend(operands)
    np.testing.assert_array_equal(after[:, :position], before[:, :position])
    assert (after[:, position:] != before[:, position:]).any(-1).all()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_rotary_table_of_a_model_in_bfloat16_is_in_float32(framework):
    dtype, where = "bfloat16", ()
    if framework == "torch":
        import torch

        dtype, where = torch.bfloat16, (torch.device("cpu"),)
    rope = module(framework, "rotary").make_rope(CONFIG, 5, dtype, *where)
    for got, expected in zip(rope, rope_table(CONFIG, 5), strict=True):
        np.testing.assert_array_equal(np.asarray(got), expected.astype(np.float32), strict=True)
