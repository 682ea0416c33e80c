"""torch's self-check: a wrong path is replaced with a warning, a device that is wrong throughout is refused; and where
either framework asks for one."""

import dataclasses
from importlib import import_module
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from parity_tests.support.backends import CONFIG
from torch_ref.spec.config import ComputeConfig
from torch_ref.spec.interface import UserError


@pytest.fixture
def self_check():
    """torch_ref.self_check, where torch is installed."""
    pytest.importorskip("torch")
    from torch_ref import self_check

    return self_check


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_self_check_passes_what_is_right(self_check, recwarn, dtype):
    import torch

    from torch_ref.attention import ATTENTION_PATHS
    from torch_ref.moe import EXPERT_PATHS

    cpu = torch.device("cpu")
    for attention in ATTENTION_PATHS:
        assert self_check.attention_error(attention, dtype, cpu, CONFIG) is None
        assert self_check.attention_error(attention, dtype, cpu, CONFIG, between_documents=True) is None
    for moe in EXPERT_PATHS:
        assert self_check.experts_error(moe, dtype, cpu, CONFIG) is None
    compute = ComputeConfig(dtype, attention="masked", moe="blocks")
    assert self_check.self_checked(compute, cpu, CONFIG) == compute
    assert not recwarn.list


def _leaks(q, k, v, scale, _):
    """Causal by groups of 4 queries, as a fused kernel once was."""
    import torch

    seq = q.shape[1]
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bshd->bhqs", q.float(), k.float()) * scale
    last_seen = (torch.arange(seq) // 4 * 4 + 3)[:, None]
    visible = (torch.arange(seq) <= last_seen) & (torch.arange(seq) < seq)
    probabilities = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("bhqs,bshd->bqhd", probabilities, v.float()).to(q.dtype)


def _forgets_scale(q, k, v, scale, _):
    from torch_ref.attention import attend_plain

    return attend_plain(q, k, v, 1.0)


def _not_a_number(q, k, v, scale, _):
    from torch_ref.attention import attend_plain

    return attend_plain(q, k, v, scale) * float("nan")


@pytest.mark.parametrize("broken", [_leaks, _forgets_scale, _not_a_number])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wrong_attention_is_replaced_with_a_warning(self_check, monkeypatch, broken, dtype):
    import torch

    monkeypatch.setitem(self_check.ATTENTION_PATHS, "masked", broken)
    with pytest.warns(UserWarning, match="--attention masked is wrong.*using the slower plain"):
        settled = self_check.self_checked(
            ComputeConfig(dtype, attention="masked", moe="blocks"), torch.device("cpu"), CONFIG
        )
    assert (settled.attention, settled.moe) == ("plain", "blocks")


def test_attention_that_does_not_keep_to_documents_is_replaced_where_it_has_to(self_check, monkeypatch, recwarn):
    import torch

    from torch_ref.attention import attend_plain

    monkeypatch.setitem(self_check.ATTENTION_PATHS, "masked", lambda *operands: attend_plain(*operands[:4]))
    compute, cpu = ComputeConfig(attention="masked", moe="dense"), torch.device("cpu")
    assert self_check.self_checked(compute, cpu, CONFIG) == compute and not recwarn.list
    with pytest.warns(UserWarning, match="--attention masked is wrong.*using the slower plain"):
        settled = self_check.self_checked(dataclasses.replace(compute, separator=0), cpu, CONFIG)
    assert (settled.attention, settled.separator) == ("plain", 0)


def test_wrong_experts_are_replaced_with_a_warning(self_check, monkeypatch):
    import torch

    right = self_check.EXPERT_PATHS["blocks"]

    def drops_a_choice(x, routing, gate, up, down, remat):
        weights = routing.weights.clone()
        weights[-1, 1] = 0
        return right(x, routing._replace(weights=weights), gate, up, down, remat)

    monkeypatch.setitem(self_check.EXPERT_PATHS, "blocks", drops_a_choice)
    with pytest.warns(UserWarning, match="--moe blocks is wrong.*using the slower dense"):
        settled = self_check.self_checked(ComputeConfig(attention="masked", moe="blocks"), torch.device("cpu"), CONFIG)
    assert (settled.attention, settled.moe) == ("masked", "dense")


@pytest.mark.parametrize("path, size", [("attention", 20), ("moe", 72), ("loss", 160)])
def test_what_is_wrong_at_the_sizes_of_the_model_alone_is_seen(self_check, monkeypatch, path, size):
    """Heads, an expert's width and the vocabulary, as alignment or an index that overflows could make it."""
    import torch

    def wrong_at(function, operand, axis):
        return lambda *operands: function(*operands) * (1 + (operands[operand].shape[axis] == size))

    config = dataclasses.replace(CONFIG, qk_nope_head_dim=16, moe_intermediate_size=72, vocab_size=160)
    compute, cpu = ComputeConfig(attention="masked", moe="blocks"), torch.device("cpu")
    if path == "loss":
        monkeypatch.setattr(self_check, "cross_entropy", wrong_at(self_check.cross_entropy, 1, 0))
        told = pytest.raises(UserError, match="the loss is wrong")
    else:
        paths, name, *where = {
            "attention": (self_check.ATTENTION_PATHS, "masked", 0, -1),
            "moe": (self_check.EXPERT_PATHS, "blocks", 2, 1),
        }[path]
        monkeypatch.setitem(paths, name, wrong_at(paths[name], *where))
        told = pytest.warns(UserWarning, match=f"--{path} {name} is wrong.*output off")
    with told:
        self_check.self_checked(compute, cpu, config)


def test_a_full_device_is_not_put_down_to_a_path(self_check, monkeypatch, recwarn):
    import torch

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setitem(self_check.ATTENTION_PATHS, "sdpa", full)
    with pytest.raises(RuntimeError, match="out of memory"):
        self_check.self_checked(ComputeConfig(attention="sdpa", moe="dense"), torch.device("cpu"), CONFIG)
    assert not recwarn.list


def test_a_path_that_fails_is_replaced_too(self_check, monkeypatch):
    import torch

    def refuses(*_):
        raise RuntimeError("grouped_mm: not on this card")

    monkeypatch.setitem(self_check.EXPERT_PATHS, "blocks", refuses)
    with pytest.warns(UserWarning, match="--moe blocks is wrong.*not on this card; using the slower dense"):
        settled = self_check.self_checked(
            ComputeConfig("float64", attention="masked", moe="blocks"), torch.device("cpu"), CONFIG
        )
    assert (settled.attention, settled.moe) == ("masked", "dense")


def test_device_that_is_wrong_throughout_is_refused(self_check, monkeypatch):
    import torch

    monkeypatch.setitem(self_check.ATTENTION_PATHS, "plain", _leaks)
    with pytest.raises(UserError, match="even --attention plain is wrong.*use --device cpu"):
        self_check.self_checked(ComputeConfig(attention="plain", moe="dense"), torch.device("cpu"), CONFIG)
    monkeypatch.undo()
    monkeypatch.setattr("torch.optim.AdamW.step", lambda self: None)
    with pytest.raises(UserError, match="AdamW does not move the weights"):
        self_check.self_checked(ComputeConfig(attention="plain", moe="dense"), torch.device("cpu"), CONFIG)


class Asked(Exception):
    """The self-check was asked for."""


@pytest.mark.parametrize("framework", ["torch", "flax"])
@pytest.mark.parametrize("used_by", ["training", "training within documents", "a trained model"])
def test_paths_are_checked_off_the_cpu(monkeypatch, framework, used_by):
    """There is no device here but the CPU: another's name is put in its place."""
    package = {"torch": "torch_ref", "flax": "flax_model"}[framework]
    pytest.importorskip({"torch": "torch", "flax": "jax"}[framework])
    from parity_tests.support.backends import make_backend
    from train.state.trained import open_in

    device, backend, self_check = (import_module(f"{package}.{name}") for name in ("device", "backend", "self_check"))
    elsewhere = SimpleNamespace(type="mps", platform="gpu")
    made = make_backend(framework) if used_by == "training within documents" else None
    for module in (device, backend, self_check):
        monkeypatch.setattr(module, "resolve_device", lambda name: elsewhere, raising=False)
        monkeypatch.setattr(module, "resolve_compute", lambda compute, *_: compute, raising=False)
        monkeypatch.setattr(module, "default_dtype", lambda device: "float32", raising=False)
        monkeypatch.setattr(module, "self_checked", Mock(side_effect=Asked), raising=False)
    with pytest.raises(Asked):
        if used_by == "training":
            make_backend(framework)
        elif made:
            made._device = elsewhere
            made.keep_within_documents(5)
        else:
            open_in(framework, SimpleNamespace(model_config=CONFIG), "auto", "auto")
    if made:
        assert backend.self_checked.call_args.args[0].separator == 5
