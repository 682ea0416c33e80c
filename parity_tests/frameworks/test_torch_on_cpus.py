"""Products of few rows, which torch splits for the cores of some processors."""

import numpy as np
import pytest


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize(("outputs", "parts"), [(30, 2), (30, 3), (31, 2), (30, 1)])
@pytest.mark.parametrize("transposed", [False, True])
def test_split_product(rows, outputs, parts, transposed):
    """Parts for the cores: the same values as one product, also where the outputs do not divide."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from torch_ref.cpu import split_product

    draw = np.random.default_rng(0).standard_normal
    x, weight = draw((rows, 7)), draw((7, outputs)).T if transposed else draw((outputs, 7))
    out = split_product(torch.from_numpy(x), torch.from_numpy(weight), parts)
    np.testing.assert_allclose(out, x @ weight.T, rtol=1e-13)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("one_core", [False, True])
def test_products_are_split_where_one_core_would_take_them(monkeypatch, dtype, rows, one_core):
    """On any processor: the same values either way, and split are few rows that MKL multiplies."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from torch_ref import cpu, layers

    split = []
    monkeypatch.setattr(cpu, "ONE_CORE_PRODUCTS", one_core)
    monkeypatch.setattr(cpu, "split_product", lambda x, weight, parts: split.append(parts) or x @ weight.T)
    draw = np.random.default_rng(0).standard_normal
    x, weight = (torch.from_numpy(draw(shape)).to(getattr(torch, dtype)) for shape in ((rows, 8), (6, 8)))
    out = layers.product(x, weight)
    tolerance = {"float32": 1e-5, "float64": 1e-13, "bfloat16": 2e-2}[dtype]
    np.testing.assert_allclose(out.double(), x.double() @ weight.double().T, rtol=tolerance, atol=tolerance)
    assert out.dtype == x.dtype
    wanted = one_core and rows < cpu.FEW_ROWS and dtype != "bfloat16"
    assert split == ([torch.get_num_threads()] if wanted else [])
