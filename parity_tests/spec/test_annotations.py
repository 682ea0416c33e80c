"""Annotations are checked while tests run, of all calls that differ in what an annotation can say."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import pytest
from jaxtyping import Float, TypeCheckError, jaxtyped

from parity_tests.support import annotations

Array = np.ndarray


class Pair(NamedTuple):
    one: Float[Array, " size"]
    other: Float[Array, " size"]


def zeros(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.zeros(shape, dtype)


@jaxtyped(typechecker=annotations.checked_once)
def outer(
    x: Float[Array, "*batch rows"],
    y: Float[Array, " columns"] | None,
    mode: Literal["right", "turned"] = "right",
) -> Float[Array, "*batch rows columns"]:
    """Wrong where it is told to be."""
    product = x[..., None] * (1 if y is None else y)
    return product if mode == "right" else product.swapaxes(-1, -2)


@jaxtyped(typechecker=annotations.checked_once)
def both(pair: Pair, sizes: tuple[int, int]) -> Float[Array, " size"]:
    return pair.one + pair.other


@pytest.mark.parametrize("times", [1, 3])
def test_what_is_right_passes_and_what_is_wrong_does_not_however_often_before(times):
    for _ in range(times):
        assert outer(zeros(2, 3), zeros(4)).shape == (2, 3, 4)
        assert outer(zeros(2, 3), zeros(4), mode="right").shape == (2, 3, 4)
        assert outer(zeros(3), None).shape == (3, 1)
        assert both(Pair(zeros(3), zeros(3)), (1, 2)).shape == (3,)
        with pytest.raises(TypeCheckError, match="checking the parameters"):
            outer(zeros(2, 3, dtype="int32"), zeros(4))
        with pytest.raises(TypeCheckError, match="checking the parameters"):
            outer(zeros(2, 3), zeros(4, 1))
        with pytest.raises(TypeCheckError, match="checking the parameters"):
            outer(zeros(2, 3), zeros(4), mode="other")
        with pytest.raises(TypeCheckError, match="checking the return value"):
            outer(zeros(2, 3), zeros(4), mode="turned")
        with pytest.raises(TypeCheckError, match="checking the parameters"):
            both(Pair(zeros(3), zeros(3)), (1, "2"))


def test_beartype_is_asked_once_about_calls_that_are_alike(monkeypatch):
    asked = []

    def beartype(function):
        def call(*args, **kwargs):
            asked.append(function.__name__)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(annotations, "beartype", beartype)

    @annotations.checked_once
    def shaped(x, flag):
        return x

    for x in (zeros(2, 3), zeros(2, 3), zeros(3, 2), zeros(2, 3, dtype="float64"), zeros(3, 2)):
        for flag in (True, False):
            assert shaped(x, flag=flag) is x
    assert len(asked) == 3


def test_both_packages_are_checked():
    torch = pytest.importorskip("torch", reason="calls torch_ref")
    from torch_ref.layers import rms_norm

    with pytest.raises(TypeCheckError, match="rms_norm"):
        rms_norm(torch.zeros(2, 3), torch.zeros(2, 3), 1e-6)
    pytest.importorskip("flax", reason="calls flax_model")
    import jax.numpy as jnp

    from flax_model.layers import rms_norm

    with pytest.raises(TypeCheckError, match="rms_norm"):
        rms_norm(jnp.zeros((2, 3)), jnp.zeros((2, 3)), 1e-6)
