"""The check of Flax's paths at the start of a run, on the CPU: what is right passes, and faults are found and named."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest

pytest.importorskip("jax", reason="jax is not installed")

import jax

from flax_model import attention, backend, moe, self_check
from flax_model.backend import FlaxBackend
from flax_model.self_check import self_checked
from parity_tests.support.backends import COMPUTE, CONFIG, OPTIMIZER
from torch_ref.spec.interface import UserError

DENSE = replace(CONFIG, first_k_dense=CONFIG.num_layers)


def checked(config=CONFIG, **compute):
    return self_checked(replace(COMPUTE, **compute), jax.devices("cpu")[0], config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("attention", "moe"), [("blocked", "pallas"), ("plain", "blocks"), ("plain", "dense")])
def test_right_paths_are_kept(attention, moe, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compute = checked(attention=attention, moe=moe, dtype=dtype)
    assert compute == replace(COMPUTE, attention=attention, moe=moe, dtype=dtype)


def test_a_model_without_experts_has_none_to_check():
    assert checked(DENSE, attention="plain", moe="no such path").moe == "no such path"


def half_gradient(function):
    """Right values; of the gradients, half."""

    @jax.custom_vjp
    def wrong(*operands):
        return function(*operands)

    def forward(*operands):
        return jax.vjp(function, *operands)

    wrong.defvjp(forward, lambda backward, upstream: jax.tree.map(lambda leaf: leaf / 2, backward(upstream)))
    return wrong


ATTENTION_FAULTS = {
    "sees all": (lambda q, k, v, scale, _: jax.nn.dot_product_attention(q, k, v, scale=scale), "output off by"),
    "another scale": (lambda q, k, v, scale, _: attention.attend_plain(q, k, v, 1.5 * scale), "output off by"),
    "half a gradient": (
        lambda q, k, v, scale, _: half_gradient(lambda q, k, v: attention.attend_plain(q, k, v, scale))(q, k, v),
        "gradient off by",
    ),
    "no kernel": (lambda *operands: jax.nn.dot_product_attention(*operands[:3], implementation="cudnn"), "Error: "),
}


@pytest.mark.parametrize("fault", ATTENTION_FAULTS)
def test_wrong_attention_gives_way(monkeypatch, fault):
    function, words = ATTENTION_FAULTS[fault]
    monkeypatch.setitem(attention.ATTENTION_PATHS, "cudnn", function)
    with pytest.warns(UserWarning, match=rf"--attention cudnn is wrong on .*{words}.*; using the slower blocked"):
        assert checked(attention="cudnn", moe="dense").attention == "blocked"
    monkeypatch.setitem(attention.ATTENTION_PATHS, "blocked", function)
    with pytest.warns(UserWarning, match="using the slower plain"):
        assert checked(attention="cudnn", moe="dense").attention == "plain"


def test_attention_that_does_not_keep_to_documents_gives_way_where_it_has_to(monkeypatch):
    monkeypatch.setitem(attention.ATTENTION_PATHS, "cudnn", lambda *operands: attention.attend_plain(*operands[:4]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checked(attention="cudnn", moe="dense").attention == "cudnn"
    with pytest.warns(UserWarning, match="--attention cudnn is wrong on .*output off by.*; using the slower blocked"):
        assert checked(attention="cudnn", moe="dense", separator=0).attention == "blocked"


def wrong_experts(x, routing, gate, up, down, remat):
    """The gradient of an expert's weights is left out."""
    return moe.experts_dense(x, routing, jax.lax.stop_gradient(gate), up, down, remat)


def test_wrong_experts_give_way(monkeypatch):
    monkeypatch.setitem(moe.EXPERT_PATHS, "pallas", wrong_experts)
    with pytest.warns(
        UserWarning, match=r"--moe pallas is wrong on .*gradient off by 1.0e\+00 .*; using the slower dense"
    ):
        assert checked(attention="plain", moe="pallas").moe == "dense"


def test_a_full_device_is_not_put_down_to_a_path(monkeypatch, recwarn):
    def full(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4096 bytes.")

    monkeypatch.setitem(attention.ATTENTION_PATHS, "cudnn", full)
    with pytest.raises(RuntimeError, match="Out of memory"):
        checked(attention="cudnn", moe="dense")
    assert not recwarn.list


def test_no_path_is_right(monkeypatch):
    monkeypatch.setitem(moe.EXPERT_PATHS, "dense", wrong_experts)
    with pytest.raises(UserError, match="even --moe dense is wrong on .*; use --device cpu or another version of jax"):
        checked(attention="plain", moe="dense")


def test_a_run_off_the_cpu_is_checked_and_a_compilation_for_others_is_not(monkeypatch):
    """There is no device here but the CPU: another's name is put in its place."""
    asked = []

    class Card:
        platform = "gpu"

    monkeypatch.setattr(backend, "self_checked", lambda compute, *_: asked.append(compute.separator) or compute)
    monkeypatch.setattr(backend, "resolve_device", lambda name: Card())
    monkeypatch.setattr(backend, "resolve_compute", lambda compute, device, config: compute)
    monkeypatch.setattr(backend, "mesh_devices", lambda first, shape: jax.devices("cpu")[:1])
    for devices in (None, jax.devices("cpu")[:1]):
        made = FlaxBackend(CONFIG, COMPUTE, OPTIMIZER, devices=devices)
        made.keep_within_documents(5)
        made.close()
        assert asked == [None, 5] and made.compute.separator == 5
    assert self_check.SLOWER.keys() == {"cudnn", "blocked", "pallas", "grouped", "blocks"}
