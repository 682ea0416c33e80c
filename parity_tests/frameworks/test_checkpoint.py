"""Checkpoints of both backends: exact resume, names, refusal of what does not fit, and what a crash leaves behind."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import numpy as np
import pytest

from parity_tests.support.backends import (
    CONFIG,
    FRAMEWORKS,
    OPTIMIZER,
    arrays,
    assert_same,
    batch,
    make_backend,
    schedule,
)
from torch_ref.spec import storage
from torch_ref.spec.checkpoint import DamagedCheckpoint
from torch_ref.spec.interface import UserError
from train.state.resume import restore_newest

META = {"cursor": {"epoch": 1, "document": 7}, "loss": 3.25, "options": {"seed": 0, "run_dir": None}, "list": [1, 2.5]}


@pytest.fixture(scope="module", params=FRAMEWORKS)
def made(request):
    backend = make_backend(request.param)
    yield backend
    backend.close()


@pytest.fixture
def backend(made):
    """One backend for the module, freshly initialised and one step on."""
    made.set_schedule(schedule)
    made.init(seed=0)
    made.step(*batch(0))
    yield made
    made.wait()


def test_restored_run_is_the_unbroken_run_bit_for_bit(backend, tmp_path):
    path = backend.save(tmp_path, "step_1", META)
    unbroken = [backend.step(*batch(seed)) for seed in (1, 2, 3)]
    expected = arrays(backend.state())
    backend.wait()

    restored = make_backend(backend.framework)
    assert restored.restore(path) == META
    assert restored.steps_done == 1
    for seed, before in zip((1, 2, 3), unbroken, strict=True):
        after = restored.step(*batch(seed))
        assert (after.loss, after.balance_loss, after.grad_norm) == (before.loss, before.balance_loss, before.grad_norm)
        assert after.learning_rate == before.learning_rate == schedule(seed)
    assert_same(arrays(restored.state()), expected)
    restored.close()


def test_save_is_of_the_moment_it_was_asked_for(backend, tmp_path):
    """A background save must not see the next step, which overwrites the state's memory."""
    before = arrays(backend.state())
    path = backend.save(tmp_path, "step_1", META)
    for seed in range(3):
        backend.step(*batch(seed))
    backend.restore(path)
    assert_same(arrays(backend.state()), before)


def test_names_are_found_in_order_and_everything_else_is_not(backend, tmp_path):
    names = ["step_20", "step_final_10100", "step_3", "step_10100", "step_1000"]
    paths = {name: backend.save(tmp_path, name, META) for name in names}
    backend.wait()
    for other in ("tokenizer", "step_7.orbax-checkpoint-tmp", "step_x", "step_8.partial"):
        (tmp_path / other).mkdir()
    in_order = ["step_3", "step_20", "step_1000", "step_10100", "step_final_10100"]
    assert backend.find(tmp_path) == [(int(name.split("_")[-1]), paths[name]) for name in in_order]
    (tmp_path / "step_9.pt").write_bytes(b"PK\x03\x04 cut short")
    (tmp_path / "step_9").mkdir()
    damaged = tmp_path / f"step_9{backend.checkpoint_suffix}"
    assert backend.find(tmp_path)[1] == (9, damaged)  # what is left of a checkpoint must not be taken for none
    backend.delete(damaged)
    assert paths["step_3"].name == f"step_3{backend.checkpoint_suffix}"
    backend.delete(backend.save(tmp_path, "step_20", META))  # while it is written, where that is in the background
    assert not paths["step_20"].exists()
    assert [path for _, path in backend.find(tmp_path)] == [paths[name] for name in in_order if name != "step_20"]
    assert backend.find(tmp_path / "absent") == []


def test_earlier_steps_and_used_names_are_really_written(backend, tmp_path):
    backend.save(tmp_path, "step_500", META)
    path = backend.save(tmp_path, "step_1", META)
    backend.step(*batch(1))
    expected = arrays(backend.state())
    assert backend.save(tmp_path, "step_1", {"second": True}) == path
    backend.wait()
    assert [step for step, _ in backend.find(tmp_path)] == [1, 500]
    backend.step(*batch(2))
    assert backend.restore(path) == {"second": True}
    assert_same(arrays(backend.state()), expected)


@pytest.mark.parametrize(
    "field, value", [("num_layers", 3), ("hidden_size", 48), ("n_routed_experts", 5), ("rope_theta", 5e5)]
)
def test_checkpoint_of_another_model_is_refused_by_name(backend, tmp_path, field, value):
    path = backend.save(tmp_path, "step_1", META)
    other = make_backend(backend.framework, dataclasses.replace(CONFIG, **{field: value}))
    other.init(0)
    before = arrays(other.state())
    with pytest.raises(UserError, match=f"{field} = {getattr(CONFIG, field)}.* {value}"):
        backend.wait()
        other.restore(path)
    assert_same(arrays(other.state()), before)
    other.close()


@pytest.mark.parametrize("damage", ["shape", "dtype", "missing", "extra"])
def test_stored_tensor_that_does_not_fit_is_refused_by_name(backend, tmp_path, damage):
    """The config says nothing of it: the arrays themselves are compared."""
    path = backend.save(tmp_path, "step_1", META)
    backend.wait()
    name = _damage_tensor(backend, path, damage)
    before = arrays(backend.state())
    with pytest.raises(UserError, match=name):
        backend.restore(path)
    assert_same(arrays(backend.state()), before)


def _damage_tensor(backend, path: Path, damage: str) -> str:
    """Rewrite a checkpoint with one wrong tensor, and return the tensor's name."""

    def damaged(leaf, cast):
        return {"shape": leaf[:-1], "dtype": cast(leaf), "missing": None, "extra": leaf}[damage]

    if backend.framework == "torch":
        import torch

        contents = torch.load(path, weights_only=True)
        moments, name = contents["second_moment"], "layers.1.attention.o_proj.weight"
        moments.update({"surplus" if damage == "extra" else name: damaged(moments[name], torch.Tensor.double)})
        contents["second_moment"] = {key: value for key, value in moments.items() if value is not None}
        torch.save(contents, path)
        return "surplus" if damage == "extra" else name
    from flax_model.checkpoint import Checkpoints

    checkpoints = Checkpoints()
    contents = checkpoints.read_contents(path)
    state = dict(backend._state)
    tree = dict(state["second_moment"]["norm"])
    tree["surplus" if damage == "extra" else "weight"] = damaged(tree["weight"], lambda leaf: leaf.astype("bfloat16"))
    state["second_moment"] = {**state["second_moment"], "norm": {k: v for k, v in tree.items() if v is not None}}
    checkpoints.save(path, state, contents)
    checkpoints.close()
    return "second_moment.norm." + ("surplus" if damage == "extra" else "weight")


def test_damaged_and_absent_checkpoints_are_named(backend, tmp_path):
    path = backend.save(tmp_path, "step_1", META)
    backend.wait()
    before = arrays(backend.state())
    with pytest.raises(UserError, match="step_2"):
        backend.restore(path.with_name(f"step_2{backend.checkpoint_suffix}"))
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    whole = largest.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0x10
    for content in (whole[: len(whole) // 2], b"", bytes(flipped)):
        largest.write_bytes(content)
        with pytest.raises(DamagedCheckpoint, match="step_1.*not a whole checkpoint"):
            backend.restore(path)
    largest.write_bytes(whole)
    backend.restore(path)
    assert_same(arrays(backend.state()), before)


@pytest.mark.parametrize("reader", ["this process", "another one"])
def test_what_one_process_cannot_read_is_damaged_for_all(backend, tmp_path, monkeypatch, reader):
    """Else they would go on from different steps."""
    run = tmp_path / "run"
    paths = [backend.save(run / "checkpoints", name, META) for name in ("step_1", "step_2")]
    backend.wait()
    told = []

    def agree(wishes):  # the first question is about step_2
        told.append(wishes[0])
        return lambda: [max(told[-1], reader == "another one" and len(told) == 1)]

    monkeypatch.setattr(backend._checkpoints, "_agree", agree)
    if reader == "this process":
        largest = max([*paths[1].rglob("*"), paths[1]], key=lambda file: file.is_file() and file.stat().st_size)
        largest.write_bytes(b"")
    assert restore_newest(backend, run, [(1, paths[0]), (2, paths[1])], None) == (paths[0], META)
    assert sum(told) == (reader == "this process")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [paths[0].name, f"{paths[1].name}.damaged"]


def test_checkpoint_of_the_other_framework_is_refused(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("flax")
    torch_backend, flax_backend = (make_backend(framework) for framework in ("torch", "flax"))
    for backend in (torch_backend, flax_backend):
        backend.init(0)
    torch_path, flax_path = (backend.save(tmp_path, "step_0", META) for backend in (torch_backend, flax_backend))
    flax_backend.wait()
    with pytest.raises(UserError, match="step_0"):
        torch_backend.restore(flax_path)
    with pytest.raises(UserError, match="step_0.pt"):
        flax_backend.restore(torch_path)
    assert torch_backend.find(tmp_path) == [(0, torch_path)] and flax_backend.find(tmp_path) == [(0, flax_path)]
    flax_backend.close()


def test_torch_file_holds_no_code(backend, tmp_path):
    torch = pytest.importorskip("torch")
    if backend.framework != "torch":
        pytest.skip("torch files only")
    contents = torch.load(backend.save(tmp_path, "step_1", META), weights_only=True)
    assert contents["model_config"] == CONFIG.to_dict() and contents["meta"] == META
    assert contents["step"] == contents["updates"] == 1
    assert "layers.0.mlp.router.balance_bias" in contents["weights"]
    assert "layers.0.mlp.router.balance_bias" not in contents["first_moment"]


def test_save_blocks_where_memory_is_short(backend, tmp_path, monkeypatch):
    if backend.framework != "flax":
        pytest.skip("torch never saves in the background")
    monkeypatch.setattr("flax_model.checkpoint.host_memory_available", lambda: 1000)
    path = backend.save(tmp_path, "step_1", META)
    assert backend.find(tmp_path) == [(1, path)]
    buffer = backend._state["params"]["embed_tokens"]["weight"].unsafe_buffer_pointer()
    backend.step(*batch(1))
    # The step reuses its memory: nothing holds on to what was written.
    assert backend._state["params"]["embed_tokens"]["weight"].unsafe_buffer_pointer() == buffer


def test_restored_and_rolled_back_states_can_be_overwritten_by_the_step(backend, tmp_path):
    """Else the first step after them would need room for a second state."""
    if backend.framework != "flax":
        pytest.skip("torch updates in place")
    path = backend.save(tmp_path, "step_1", META)
    backend.wait()
    snapshot, whole = backend.snapshot(), backend.state()
    state = dataclasses.replace(whole, **{group: dict(getattr(whole, group)) for group in GROUPS})
    for bring_back in (
        lambda: backend.init(0),
        lambda: backend.restore(path),
        lambda: backend.rollback(snapshot),
        lambda: backend.load_state(state),
    ):
        bring_back()
        before = _buffers(backend)
        backend.step(*batch(1))
        assert _buffers(backend) == before


GROUPS = ("weights", "first_moment", "second_moment")


def _buffers(backend) -> set[int]:
    import jax

    return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(backend._state) if leaf.ndim}


KILLED = """
import os, signal, sys
from parity_tests.support.backends import batch, make_backend
framework, folder, when = sys.argv[1:]
backend = make_backend(framework)
backend.init(0)
backend.save(folder, "step_0", {"whole": True})
backend.wait()
if when == "before the rename":
    os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
backend.save(folder, "step_1", {"whole": False})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_process_killed_while_saving_leaves_the_latest_checkpoint_whole(backend, tmp_path):
    when = "before the rename" if backend.framework == "torch" else "while writing in the background"
    command = [sys.executable, "-c", KILLED, backend.framework, str(tmp_path), when]
    root = Path(__file__).parents[2]
    ended = subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    found = backend.find(tmp_path)
    assert found and backend.restore(found[0][1]) == {"whole": True}
    # A save that was cut off may still have landed; if not, what it left must neither be found nor be in the way.
    for _, path in found[1:]:
        assert backend.restore(path) == {"whole": False}
    if len(found) == 1:
        assert len(list(tmp_path.iterdir())) == 2
    path = backend.save(tmp_path, "step_1", META)
    backend.wait()
    assert backend.restore(path) == META
    assert len(list(tmp_path.iterdir())) == 2


def test_what_a_killed_save_left_behind_goes_with_the_next_one(backend, tmp_path):
    """It may be as large as a checkpoint."""
    for number in (5, 9):
        if backend.framework == "torch":
            (tmp_path / f"step_{number}.pt.partial").write_bytes(b"PK")
        else:
            (tmp_path / f"step_{number}.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    path = backend.save(tmp_path, "step_1", META)
    backend.wait()
    assert list(tmp_path.iterdir()) == [path]


def test_folder_that_cannot_be_made_is_named(backend, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file.*cannot be made .*; choose another place"):
        backend.save(tmp_path / "file" / "checkpoints", "step_1", META)


def test_meta_that_is_not_json_is_refused_before_anything_is_written(backend, tmp_path):
    with pytest.raises(TypeError):
        backend.save(tmp_path, "step_1", {"array": np.zeros(2)})
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_reported_and_leaves_no_checkpoint(backend, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    if backend.framework == "torch":
        monkeypatch.setattr("torch.save", full)
    else:
        monkeypatch.setattr("orbax.checkpoint.PyTreeCheckpointHandler.finalize", full)
    with pytest.raises(UserError, match=r"step_1\S*: no space left, [\d.]+ kB needed, [\d.,]+ GB free now .it may be"):
        backend.save(tmp_path, "step_1", META)
        backend.wait()
    assert backend.find(tmp_path) == []
    monkeypatch.undo()
    path = backend.save(tmp_path, "step_1", META)
    backend.wait()
    assert backend.find(tmp_path) == [(1, path)] and len(list(tmp_path.iterdir())) == 1


def test_a_file_that_may_not_grow_so_large_is_reported(backend, tmp_path):
    """The system's own refusal, as a full disk or a quota makes it: torch hides it behind an error of its zip writer,
    orbax has it from a thread, as text."""
    resource = pytest.importorskip("resource")
    backend.save(tmp_path / "before", "step_1", META)  # what is compiled is compiled, and in JAX's cache of it
    backend.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match=r"step_1\S*: larger than files may be here, [\d.]+ kB needed, .* free"):
            backend.save(tmp_path, "step_1", META)
            backend.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert backend.find(tmp_path) == []
    path = backend.save(tmp_path, "step_1", META)
    backend.wait()
    assert backend.restore(path) == META


@pytest.mark.parametrize("interrupted", range(1, 6))
def test_a_torch_file_that_is_broken_off_is_an_interruption(tmp_path, monkeypatch, interrupted):
    """torch's writer, which ends its file on the way out, then says that this could not be written."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from torch_ref import checkpoint

    calls = iter(range(1, 100))

    class Interrupted(FileIO):
        def write(self, part):
            if next(calls) == interrupted:
                raise KeyboardInterrupt(15)
            return super().write(part)

    @contextmanager
    def whole_file(path, needed):
        with storage.whole_file(path, needed) as file:
            yield Interrupted(file.fileno(), "wb", closefd=False)

    monkeypatch.setattr(checkpoint, "whole_file", whole_file)
    with pytest.raises(KeyboardInterrupt, match="15"):
        checkpoint.write_tensors(tmp_path / "step_1.pt", {"weight": torch.ones(1000)})
    assert not list(tmp_path.iterdir())


def test_a_failed_save_is_noticed_without_waiting_for_it(backend, tmp_path, monkeypatch):
    if backend.framework != "flax":
        pytest.skip("torch never saves in the background")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    backend.check_saves()
    monkeypatch.setattr("orbax.checkpoint.PyTreeCheckpointHandler.finalize", full)
    backend.save(tmp_path, "step_1", META)
    deadline = time.monotonic() + 60
    with pytest.raises(UserError, match="step_1: no space left"):
        while time.monotonic() < deadline:
            backend.check_saves()
            time.sleep(0.01)
    backend.check_saves()  # told once


def test_training_state_crosses_frameworks_exactly(backend):
    backend.step(*batch(1))
    state = backend.state()
    expected = arrays(state)
    for framework in ("torch", "flax"):
        pytest.importorskip(framework)
        other = make_backend(framework)
        other.load_state(state)
        assert (other.steps_done, other.state().updates) == (2, 2)
        assert_same(arrays(other.state()), expected)
        other.close()


def test_weights_alone_start_a_run_at_step_0(backend):
    state = backend.state()
    backend.load_state(dataclasses.replace(state, first_moment=None, second_moment=None))
    after = backend.state()
    assert (after.step, after.updates) == (0, 0)
    assert not any(np.any(moment[name]) for moment in (after.first_moment, after.second_moment) for name in moment)
    assert backend.step(*batch(1)).learning_rate == OPTIMIZER.schedule(0)


@pytest.mark.parametrize("what", ["missing", "surplus", "half the moments", "config"])
def test_training_state_that_does_not_fit_is_refused_by_name(backend, what):
    state = backend.state()
    weights = dict(state.weights)
    if what == "missing":
        del weights["norm.weight"]
        state, name = dataclasses.replace(state, weights=weights), "norm.weight"
    elif what == "surplus":
        state, name = (
            dataclasses.replace(state, weights={**weights, "lm_head.weight": weights["norm.weight"]}),
            "lm_head",
        )
    elif what == "half the moments":
        state, name = dataclasses.replace(state, second_moment=None), "moments"
    else:
        other = dataclasses.replace(CONFIG, num_heads=2)
        state, name = dataclasses.replace(state, model_config=other), "num_heads"
    with pytest.raises(UserError, match=name):
        backend.load_state(state)


def test_meta_is_plain_json(backend, tmp_path):
    path = backend.save(tmp_path, "step_1", {"tuple": (1, 2), "nested": {"3": None}})
    assert backend.restore(path) == json.loads(json.dumps({"tuple": (1, 2), "nested": {"3": None}}))
