"""Training on Apple's MPS, without one: what it multiplies wrongly is put in the CPU's place."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from parity_tests.support.backends import COMPUTE, CONFIG, OPTIMIZER, arrays, assert_close, batch, make_backend
from torch_ref.spec.config import ComputeConfig
from torch_ref.spec.interface import UserError

torch = pytest.importorskip("torch")

from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from torch_ref import generate, layers, loss, mps, self_check  # noqa: E402
from torch_ref.loss import cross_entropy, cross_entropy_plain  # noqa: E402

PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1}
"""Operations that multiply matrices, and which argument is the first factor."""


class ReadsTooFar(TorchDispatchMode):
    """Products whose sums have more than `longest` terms come out wrong, where both sizes are 16 or more."""

    def __init__(self, longest: int) -> None:
        super().__init__()
        self.longest, self.wrong = longest, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        first = PRODUCTS.get(function.overloadpacket.__name__)
        if first is not None:
            rows, terms = args[first].shape[-2:]
            if terms > self.longest and min(rows, args[first + 1].shape[-1]) >= 16:
                self.wrong += 1
                out.add_(1)
        return out


class TwoAxes(TorchFunctionMode):
    """Asserts that what `F.linear` is given lies in two axes."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function is not torch.nn.functional.linear or args[0].ndim == 2
        return function(*args, **(kwargs or {}))


@pytest.fixture
def on_mps(monkeypatch):
    monkeypatch.setattr(mps, "sums_too_far", lambda device: True)
    monkeypatch.setattr(layers, "takes_two_axes", lambda device: True)


def loss_and_gradients(function, dtype, *more):
    generator = torch.Generator().manual_seed(0)
    operands = [torch.randn(shape, generator=generator).to(dtype) for shape in ((48, 24), (40_000, 24))]
    leaves = [operand.requires_grad_() for operand in operands]
    total = function(*leaves, torch.randint(40_000, (48,), generator=generator), *more)
    return [total.detach(), *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_loss_of_a_real_vocabulary(on_mps, dtype, tolerance):
    """The gradient of hidden states is a sum over the vocabulary."""
    expected = loss_and_gradients(cross_entropy_plain, getattr(torch, dtype))
    with ReadsTooFar(32_766) as chip:
        got = loss_and_gradients(cross_entropy, getattr(torch, dtype), 24)
    assert not chip.wrong
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=tolerance, atol=tolerance * float(b.abs().max()))


@pytest.mark.parametrize("paths", [("masked", "blocks"), ("plain", "dense"), ("sdpa", "grouped")])
def test_no_product_of_a_step_sums_too_far(on_mps, monkeypatch, paths):
    """Neither over the vocabulary nor over the tokens of a micro-batch, and the numbers are those of other devices."""
    compute = dataclasses.replace(COMPUTE, attention=paths[0], moe=paths[1])
    optimizer = dataclasses.replace(OPTIMIZER, micro_batch_size=8)
    inputs, targets = (np.concatenate(arrays) for arrays in zip(*(batch(n) for n in range(4)), strict=True))
    results, states, wrong = [], [], []
    for longest in (10**6, 64):
        monkeypatch.setattr(mps, "LONGEST_SUM", longest)
        backend = make_backend("torch", compute=compute, optimizer=optimizer)
        backend.init(0)
        with ReadsTooFar(longest) as chip, TwoAxes():
            results.append(backend.step(inputs, targets))
        wrong.append(chip.wrong)
        states.append({name: value for name, value in arrays(backend.state()).items() if name.startswith("first")})
    assert not any(wrong)
    np.testing.assert_allclose(results[1].loss, results[0].loss, rtol=1e-6)
    np.testing.assert_array_equal(results[1].expert_counts, results[0].expert_counts)
    assert_close(states[1], states[0], 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("what", [1.1, float("nan")])
def test_wrong_loss_is_refused(monkeypatch, dtype, what):
    monkeypatch.setattr(loss, "long_product", lambda left, right: left @ right * what)
    with pytest.raises(UserError, match="--device cpu: the loss is wrong.*gradient off by.*another version of torch"):
        self_check.self_checked(ComputeConfig(dtype, attention="plain", moe="dense"), torch.device("cpu"), CONFIG)


@pytest.mark.parametrize(
    "rows, length, expected", [(8, 2048, 8), (16, 2048, 8), (12, 2048, 6), (7, 4096, 1), (3, 40_000, 1)]
)
def test_rows_at_once(on_mps, rows, length, expected):
    assert mps.rows_at_once(rows, length, torch.device("cpu")) == expected


def test_nothing_is_done_elsewhere():
    assert mps.rows_at_once(64, 2048, torch.device("cpu")) == 64
    for differs in (mps.sums_too_far, mps.takes_two_axes):
        assert [differs(torch.device(name)) for name in ("cpu", "cuda", "mps")] == [False, False, True]


@pytest.mark.parametrize(
    "device, expected", [("mps", [256, 256, 512, 512, 700, 700]), ("cpu", [1, 256, 257, 512, 513, 700])]
)
def test_a_token_reads_the_cache_up_to_its_own_slot_at_least(device, expected):
    slots = (0, 255, 256, 511, 512, 699)
    assert [generate._slots_read(slot, 700, torch.device(device)) for slot in slots] == expected
