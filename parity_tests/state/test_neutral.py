"""The neutral form of a training state: bit for bit, a tensor at a time, and clear refusals of a faulty one."""

from __future__ import annotations

import json
import weakref

import numpy as np
import pytest

from parity_tests.support.backends import CONFIG, arrays, assert_same
from parity_tests.support.states import random_state
from torch_ref.spec.checkpoint import close_seal
from torch_ref.spec.interface import TrainingState, UserError
from torch_ref.spec.parameters import initial_values, parameter_table
from torch_ref.spec.training_state import LazyArrays
from train.state.neutral import read_state, write_state


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_neutral_form_is_bitwise(tmp_path, dtype):
    state = random_state(5, dtype)
    write_state(tmp_path / "state", state)
    back = read_state(tmp_path / "state")
    assert (back.model_config, back.step, back.updates, back.meta) == (CONFIG, 5, 2, state.meta)
    assert_same(arrays(back), arrays(state))


def test_neutral_form_is_readable_by_the_safetensors_library(tmp_path):
    from safetensors.numpy import load_file

    weights = {row.name: value for row, value in initial_values(CONFIG, 0)}
    write_state(tmp_path / "state", TrainingState(CONFIG, weights))
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["state.json", "weights.safetensors"]
    stored = load_file(tmp_path / "state/weights.safetensors")
    assert stored.keys() == weights.keys()
    assert all(np.array_equal(stored[name], value) for name, value in weights.items())
    assert read_state(tmp_path / "state").first_moment is None


def test_writing_and_reading_hold_one_tensor_at_a_time(tmp_path):
    alive, most = weakref.WeakSet(), 0

    class Tracked(np.ndarray):
        __hash__ = object.__hash__

    def fetch(name: str) -> np.ndarray:
        nonlocal most
        value = np.zeros(shapes[name], np.float32).view(Tracked)
        alive.add(value)
        most = max(most, len(alive))
        return value

    shapes = {row.name: row.shape for row in parameter_table(CONFIG)}
    trainable = [row.name for row in parameter_table(CONFIG) if row.trainable]
    moments = LazyArrays(trainable, fetch)
    write_state(tmp_path / "state", TrainingState(CONFIG, LazyArrays(shapes, fetch), moments, moments))
    assert most == 1
    weights = read_state(tmp_path / "state").weights
    assert weights["norm.weight"] is not weights["norm.weight"]


NEUTRAL_FAULTS = {
    "version": ("state.json", "version 1"),
    "another format": ("state.json", "not a smol-deepseek-state"),
    "unknown field": ("state.json", "window_size: unknown"),
    "counter": ("state.json", "incomplete"),
    "one moment": ("state.json", "both moments or none"),
    "lost file": ("second_moment.safetensors", "No such file"),
    "cut short": ("weights.safetensors", "cut short or damaged at norm.weight"),
    "shape": ("weights.safetensors", r"embed_tokens.weight is \(96, 32\), state.json asks for \(96, 40\)"),
}


@pytest.mark.parametrize("fault", NEUTRAL_FAULTS)
def test_a_faulty_neutral_folder_is_named(tmp_path, fault):
    weights = {row.name: value for row, value in initial_values(CONFIG, 0)}
    moments = {row.name: weights[row.name] for row in parameter_table(CONFIG) if row.trainable}
    folder = tmp_path / "state"
    write_state(folder, TrainingState(CONFIG, weights, moments, moments))
    content = json.loads((folder / "state.json").read_text())
    content |= {"version": {"version": 2}, "another format": {"format": "x"}, "counter": {"step": "many"}}.get(
        fault, {}
    )
    if fault == "unknown field":
        content["model"]["window_size"] = 4
    if fault == "one moment":
        content["tensors"].remove("first_moment")
    if fault == "shape":
        content["model"]["hidden_size"] = 40
    (folder / "state.json").write_text(json.dumps(close_seal(content)))
    if fault == "lost file":
        (folder / "second_moment.safetensors").unlink()
    if fault == "cut short":
        data = (folder / "weights.safetensors").read_bytes()
        (folder / "weights.safetensors").write_bytes(data[:-3])
    file, message = NEUTRAL_FAULTS[fault]
    with pytest.raises(UserError, match=message) as refusal:
        read_state(folder)
    assert file in str(refusal.value) and "\n" not in str(refusal.value)
