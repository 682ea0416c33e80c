"""A model without any mixture of experts, `first_k_dense` = all layers: no routers, no balance biases, no counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from parity_tests.support.backends import CONFIG, FRAMEWORKS, arrays, assert_same, batch, make_backend
from torch_ref.spec.interface import Sampling
from train.convert import main
from train.state.source import load_checkpoint, locate, open_state

DENSE = replace(CONFIG, first_k_dense=CONFIG.num_layers)
META = {"step": 1, "options": {}, "progress": {}}
GREEDY = Sampling(max_new_tokens=8, greedy=True, stop_token=None)


@pytest.fixture(scope="module", params=FRAMEWORKS)
def trained(request, tmp_path_factory):
    """A backend two steps on, its checkpoint after the first, and what came after that."""
    backend = make_backend(request.param, DENSE)
    backend.init(seed=0)
    first = backend.step(*batch(0))
    folder = tmp_path_factory.mktemp(request.param)
    path = backend.save(folder / "checkpoints", "step_1", META)
    backend.wait()
    assert first.applied and first.balance_loss == 0 and first.expert_counts.shape == (0, CONFIG.n_routed_experts)
    yield backend, path, backend.step(*batch(1)), arrays(backend.state())
    backend.close()


def test_a_restored_run_is_the_unbroken_run(trained):
    backend, path, unbroken, expected = trained
    restored = make_backend(backend.framework, DENSE)
    assert restored.find(path.parent) == [(1, path)]
    assert restored.restore(path) == META
    resumed = restored.step(*batch(1))
    assert (resumed.loss, resumed.grad_norm) == (unbroken.loss, unbroken.grad_norm)
    assert_same(arrays(restored.state()), expected)
    restored.close()


def test_it_goes_through_every_form_bitwise(trained, tmp_path):
    backend, path, _, _ = trained
    expected = arrays(open_state(locate(path)))
    source = path
    for form in ("neutral", backend.framework):
        assert main([str(source), str(tmp_path / form), "--to", form]) == 0
        source = tmp_path / form
        assert_same(arrays(open_state(locate(source))), expected)
    assert main([str(source), str(tmp_path / "exported"), "--to", "transformers"]) == 0
    exported = open_state(locate(tmp_path / "exported"))
    assert exported.model_config == DENSE
    for name in exported.weights:
        np.testing.assert_array_equal(exported.weights[name], expected[f"weights {name}"], strict=True)


def test_the_other_framework_goes_on_with_it(trained, tmp_path):
    backend, path, unbroken, _ = trained
    other = {"torch": "flax", "flax": "torch"}[backend.framework]
    pytest.importorskip(other)
    resumed = make_backend(other, DENSE)
    assert load_checkpoint(resumed, path) == META
    assert resumed.step(*batch(1)).loss == pytest.approx(unbroken.loss, rel=1e-6)
    assert resumed.generate([1, 2, 3], GREEDY, 0) == backend.generate([1, 2, 3], GREEDY, 0)
    rows = batch(3, rows=2)
    assert resumed.evaluate(*rows)[0] == pytest.approx(backend.evaluate(*rows)[0], rel=1e-6)
    resumed.close()
