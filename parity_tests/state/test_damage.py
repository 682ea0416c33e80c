"""Damaged checkpoints of both frameworks: whatever happened to whichever file, what is restored is what was saved, or
the checkpoint is refused as damaged, so that the loop can go on from an earlier one. Never a silent wrong number."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from parity_tests.support.backends import CONFIG, FRAMEWORKS, arrays, assert_same, batch, make_backend, schedule
from torch_ref.spec.checkpoint import DamagedCheckpoint, make_contents, require_contents, require_seal, seal
from torch_ref.spec.huggingface import SIDECAR
from torch_ref.spec.interface import UserError
from torch_ref.spec.parameters import parameter_table
from train.convert import main as convert
from train.state.neutral import TENSORS
from train.state.resume import DAMAGED, own_checkpoints
from train.state.source import load_checkpoint, locate, open_state

META = {"cursor": {"epoch": 1, "document": 7}, "loss": 3.25, "options": {"seed": 0, "run_dir": None}}


@pytest.fixture(scope="module", params=FRAMEWORKS)
def saved(request, tmp_path_factory):
    """A backend, a checkpoint it wrote, and what must come back from it."""
    backend = make_backend(request.param)
    backend.set_schedule(schedule)
    backend.init(seed=0)
    backend.step(*batch(0))
    path = backend.save(tmp_path_factory.mktemp("whole") / "checkpoints", "step_1", META)
    backend.wait()
    expected = arrays(backend.state())
    backend.step(*batch(1))
    yield backend, path, expected
    backend.close()


def files_of(checkpoint: Path) -> list[Path]:
    return [checkpoint] if checkpoint.is_file() else sorted(p for p in checkpoint.rglob("*") if p.is_file())


def copy_of(checkpoint: Path, folder: Path) -> Path:
    copy = folder / checkpoint.name
    if checkpoint.is_dir():
        shutil.copytree(checkpoint, copy, dirs_exist_ok=True)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint, copy)
    return copy


def outcome(backend, path: Path, expected: dict[str, np.ndarray]) -> str:
    """`refused` or `whole`; anything else fails the test."""
    try:
        meta = backend.restore(path)
    except DamagedCheckpoint as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return "refused"
    assert meta == META
    got = arrays(backend.state())
    assert got.keys() == expected.keys()
    wrong = [name for name, value in expected.items() if not np.array_equal(got[name], value)]
    assert not wrong, f"silently wrong: {wrong}"
    return "whole"


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def emptied(content: bytes) -> bytes:
    return b""


def flipped(content: bytes) -> bytes:
    return flip(content, 8 * (len(content) // 2) + 4)


def flip(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize(
    "damage", [truncated, emptied, flipped, None], ids=["truncated", "emptied", "flipped", "deleted"]
)
def test_every_file_of_a_checkpoint(saved, tmp_path, damage):
    backend, whole, expected = saved
    if damage is None and whole.is_file():
        with pytest.raises(UserError, match="no such checkpoint"):
            backend.restore(tmp_path / whole.name)
        return
    results = {}
    for number, file in enumerate(files_of(whole)):
        path = copy_of(whole, tmp_path / str(number))
        target = path if whole.is_file() else path / file.relative_to(whole)
        if damage is None:
            target.unlink()
        else:
            target.write_bytes(damage(target.read_bytes()))
        results[str(file.relative_to(whole.parent))] = outcome(backend, path, expected)
    # The file with the weights is never taken as it is.
    largest = max(files_of(whole), key=lambda file: file.stat().st_size)
    assert results[str(largest.relative_to(whole.parent))] == "refused"


def some_bits(content: bytes) -> list[int]:
    """Bits spread over a file, and more of them at both ends, where formats keep their headers."""
    bits = 8 * len(content)
    ends = [*range(0, min(bits, 512), 7), *range(max(bits - 2048, 0), bits, 13)]
    return sorted({*np.random.default_rng(0).integers(0, max(bits, 1), 500).tolist(), *ends} & set(range(bits)))


def flip_bits(saved, folder: Path, every: int) -> dict[str, int]:
    """Flip one bit after another, each `every`-th of those of all files; how many were refused, and were harmless."""
    backend, whole, expected = saved
    path = copy_of(whole, folder)
    seen = {"refused": 0, "whole": 0}
    bits = [(file, bit) for file in files_of(path) for bit in some_bits(file.read_bytes())]
    for file, bit in bits[::every]:
        content = file.read_bytes()
        file.write_bytes(flip(content, bit))
        seen[outcome(backend, path, expected)] += 1
        file.write_bytes(content)
    assert outcome(backend, path, expected) == "whole"
    return seen


def test_some_single_bits_of_every_file(saved, tmp_path):
    """Every file of an orbax folder has hundreds of `some_bits`, so none is left out."""
    assert flip_bits(saved, tmp_path, 11 if saved[1].is_file() else 151)["refused"] > 10


@pytest.mark.slow
def test_many_single_bits_of_every_file(saved, tmp_path, capsys):
    seen = flip_bits(saved, tmp_path, 1)
    with capsys.disabled():
        print(f"\n{saved[0].framework}: one bit flipped, {sum(seen.values())} times: {seen}")
    assert seen["refused"] > 300


def test_what_was_set_aside_is_no_checkpoint(saved, tmp_path):
    """Not for what reads a run folder, beside a whole one, nor for the trainer, alone in its folder."""
    backend, path, _ = saved
    run = tmp_path / "run"
    copy_of(path, run / "checkpoints").rename(run / "checkpoints" / f"{path.name}{DAMAGED}")
    with pytest.raises(UserError, match="was set aside"):
        own_checkpoints(backend, run, None)
    assert own_checkpoints(backend, run, path) == []
    whole = copy_of(path, run / "checkpoints")
    assert locate(run).path == locate(run, step=1).path == whole
    assert own_checkpoints(backend, run, None) == [(1, whole)]


def test_weights_of_another_model_are_refused_by_name(saved, tmp_path):
    """Also where the file is named, and not the folder that says more of it."""
    backend, path, _ = saved
    assert convert([str(path), str(tmp_path / "exported"), "--to", "transformers"]) == 0
    assert convert([str(tmp_path / "exported"), str(tmp_path / "weights"), "--to", backend.framework]) == 0
    weights = next(file for file in (tmp_path / "weights").iterdir() if file.suffix in (".pt", ".safetensors"))
    (tmp_path / "weights" / f"._{weights.name}").write_bytes(b"what macOS leaves on a drive of another system")
    assert locate(tmp_path / "weights").path == weights
    sidecar = tmp_path / "weights" / SIDECAR
    model = json.loads(sidecar.read_text())["model"]
    (tmp_path / "weights/settings.toml").write_text("[model]\nnum_layers = 9\n")  # another run's
    for changed, said in (({"v_head_dim": 16}, "the config beside it asks for"), ({"num_layers": 3}, "missing")):
        sidecar.write_text(json.dumps({"model": model | changed}))
        with pytest.raises(UserError, match=f"{weights.name}: .*{said}"):
            open_state(locate(weights))
    sidecar.write_text(json.dumps({"model": None}))
    with pytest.raises(UserError, match=f"{SIDECAR}: made by another version"):
        open_state(locate(weights))


@pytest.mark.parametrize("form", ["neutral", "torch", "transformers"])
def test_conversion_refuses_damage(saved, tmp_path, capsys, form):
    """Also where a part is read by itself: the first moment is no part of an exported folder, the weights are.

    Where the arrays lie in an orbax file differs from save to save, so that one flipped bit may hit what this form does
    not read: then the result is that of the whole checkpoint. Bits flipped all over the file hit every array.
    """
    pytest.importorskip("torch")
    _, whole, _ = saved
    path = copy_of(whole, tmp_path / "run")
    largest = max(files_of(path), key=lambda file: file.stat().st_size)
    content = largest.read_bytes()
    everywhere = content
    tensors = tensors_in(converted(path, tmp_path / "undamaged", form, capsys))
    assert len(tensors) >= len(parameter_table(CONFIG))
    for part in range(1, 8):
        bit = 8 * (len(content) * part // 8)
        largest.write_bytes(flip(content, bit))
        result = converted(path, tmp_path / f"out{part}", form, capsys)
        if result is not None:
            assert_same(tensors_in(result), tensors)
    for bit in range(8 * 100, 8 * len(content), 8 * 100):
        everywhere = flip(everywhere, bit)
    largest.write_bytes(everywhere)
    assert converted(path, tmp_path / "out", form, capsys) is None


def converted(path: Path, out: Path, form: str, capsys) -> Path | None:
    """What `convert` wrote, or None where it refused the checkpoint as damaged, writing nothing."""
    code = convert([str(path), str(out), "--to", form])
    said = capsys.readouterr().err
    assert code == 0 or (code == 2 and said.startswith("error: ") and "not a whole checkpoint" in said), said
    assert out.exists() == (code == 0)
    return out if code == 0 else None


def tensors_in(folder: Path) -> dict[str, np.ndarray]:
    """Every array that was written, in whichever form."""
    state = open_state(locate(folder))
    groups = {group: getattr(state, group) or {} for group in TENSORS}
    return {f"{group} {name}": values[name] for group, values in groups.items() for name in values}


def test_a_neutral_folder_is_checked_too(saved, tmp_path, capsys, caplog):
    backend, whole, expected = saved
    folder = tmp_path / "neutral"
    assert convert([str(whole), str(folder), "--to", "neutral"]) == 0
    for file in ("state.json", "weights.safetensors", "first_moment.safetensors", "second_moment.safetensors"):
        content = (folder / file).read_bytes()
        for damage in (truncated, emptied, flipped):
            (folder / file).write_bytes(damage(content))
            with pytest.raises(UserError, match=file):
                load_checkpoint(backend, folder)
        (folder / file).write_bytes(content)
    assert load_checkpoint(backend, folder) == META
    got = arrays(backend.state())
    assert all(np.array_equal(got[name], value) for name, value in expected.items())
    # One of before, without checksums.
    content = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({k: v for k, v in content.items() if "checksum" not in k}))
    assert load_checkpoint(backend, folder) == META and "state.json: written by a version without checks" in caplog.text


def test_a_checkpoint_of_before_is_restored_and_the_log_says_what_is_not_checked(saved, tmp_path, monkeypatch, caplog):
    """Written without checksums: by any version up to the one that introduced them."""
    backend, whole, expected = saved
    if backend.framework != "flax":
        pytest.skip("torch files always had them")
    monkeypatch.setattr("flax_model.checkpoint.seal", lambda contents, arrays: contents)
    backend.restore(whole)
    path = backend.save(tmp_path, "step_1", META)
    backend.wait()
    with caplog.at_level(logging.WARNING):
        assert outcome(backend, path, expected) == "whole"
    assert "step_1: written by a version without checksums; damage of its arrays would not be noticed" in caplog.text
    weights = open_state(locate(path)).weights
    np.testing.assert_array_equal(weights["norm.weight"], expected["weights norm.weight"])


def test_half_a_seal_is_damage_and_another_format_is_refused(tmp_path):
    contents = make_contents("flax", CONFIG, 1, 1, {})
    sealed = seal(contents, [("norm.weight", np.zeros(3))])
    require_seal(contents, tmp_path), require_seal(sealed, tmp_path)
    for gone in ("checksum", "checksums"):
        with pytest.raises(DamagedCheckpoint, match="its contents differ from their checksum"):
            require_seal({name: value for name, value in sealed.items() if name != gone}, tmp_path)
    require_contents(sealed, "flax", tmp_path)
    for other in (None, 0, 2):
        with pytest.raises(UserError, match=f"checkpoint format {other}, this version reads 1"):
            require_contents(sealed | {"format": other}, "flax", tmp_path)


def test_objects_that_are_no_tensors_are_not_unpickled(tmp_path):
    """A `.pt` file may hold anything, code that runs when it is read included."""
    torch = pytest.importorskip("torch")

    class Trap:
        def __reduce__(self):
            return Path.write_text, (tmp_path / "sprung", "")

    torch.save({"framework": "torch", "trap": Trap()}, tmp_path / "step_1.pt")
    backend = make_backend("torch")
    with pytest.raises(
        UserError, match="step_1.pt: cannot be read safely: it holds other objects than tensors"
    ) as refusal:
        backend.restore(tmp_path / "step_1.pt")
    assert not isinstance(refusal.value, DamagedCheckpoint) and not (tmp_path / "sprung").exists()
