"""Tensors in files: safetensors as its own library reads it, damage named, bfloat16 rounded as torch does."""

from __future__ import annotations

import errno
import os
import stat

import numpy as np
import pytest

from torch_ref.spec.interface import UserError
from torch_ref.spec.storage import (
    TensorReader,
    TensorSpec,
    TensorWriter,
    from_bfloat16_bits,
    size_in_words,
    to_bfloat16_bits,
    write_whole,
)


def test_files_are_what_the_safetensors_library_writes_and_reads(tmp_path):
    from safetensors.numpy import load_file, save_file

    values = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones((), np.float64), "c": np.zeros((0, 4))}
    specs = [TensorSpec(name, value.shape, str(value.dtype)) for name, value in values.items()]
    with TensorWriter(tmp_path / "ours", specs, {"format": "pt"}) as writer:
        for name in ("c", "a", "b"):  # another order than declared
            writer.write(name, values[name])
    save_file({**values, "half": np.float16([0.5, np.inf])}, tmp_path / "theirs")
    theirs = TensorReader(tmp_path / "theirs")
    for name, value in values.items():
        np.testing.assert_array_equal(load_file(tmp_path / "ours")[name], value, strict=True)
        np.testing.assert_array_equal(theirs[name], value, strict=True)
    np.testing.assert_array_equal(theirs["half"], np.float32([0.5, np.inf]), strict=True)


def test_writer_wants_each_tensor_once_and_in_shape(tmp_path):
    specs = [TensorSpec("a", (2,), "float32"), TensorSpec("b", (2,), "float32")]
    with pytest.raises(ValueError, match="never written: b"), TensorWriter(tmp_path / "x", specs) as writer:
        writer.write("a", np.zeros(2))
        with pytest.raises(ValueError, match="a: written twice"):
            writer.write("a", np.zeros(2))
        with pytest.raises(ValueError, match=r"b: shape \(3,\), expected \(2,\)"):
            writer.write("b", np.zeros(3))
        with pytest.raises(ValueError, match="c: not a tensor of this file"):
            writer.write("c", np.zeros(2))


@pytest.mark.parametrize("damage", ["truncated", "text", "int64", "absent"])
def test_reader_names_a_damaged_file(tmp_path, damage):
    from safetensors.numpy import save_file

    path = tmp_path / "model.safetensors"
    save_file({"w": np.zeros(4, np.int64 if damage == "int64" else np.float32)}, path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    if damage == "text":
        path.write_text("not a tensor in sight")
    if damage == "absent":
        path.unlink()
    with pytest.raises(UserError, match="model.safetensors"):
        TensorReader(path)


def test_a_reader_knows_its_names_without_reading(tmp_path):
    path = tmp_path / "x.safetensors"
    with TensorWriter(path, [TensorSpec("a", (4,), "float32")]) as out:
        out.write("a", np.ones(4, np.float32))
    reader = TensorReader(path, checksums={"a": "of something else"})
    assert "a" in reader and "b" not in reader
    with pytest.raises(UserError, match="a differs from its checksum"):
        reader["a"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="x.safetensors: cut short at a"):
        reader["a"]
    path.unlink()
    with pytest.raises(UserError, match="x.safetensors: No such file"):
        reader["a"]


@pytest.mark.parametrize(
    "size, said",
    [(0, "0 kB"), (499, "0.499 kB"), (999_400, "999 kB"), (999_500, "1 MB"), (1_234_000, "1.23 MB")]
    + [(999_600_000, "1 GB"), (999_700_000_000, "1,000 GB"), (9_290_000_000_000, "9,290 GB")],
)
def test_sizes_in_words(size, said):
    assert size_in_words(size) == said


def test_bfloat16_rounds_to_nearest_even_like_torch():
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    special = np.float32([0.0, -0.0, 1.0, np.inf, -np.inf, 3.4e38, 1e-45, 1.00390625, 1.01171875])
    value = np.concatenate([random[~np.isnan(random)], special])
    expected = torch.from_numpy(value).bfloat16().float().numpy()
    np.testing.assert_array_equal(from_bfloat16_bits(to_bfloat16_bits(value)), expected)
    assert np.isnan(from_bfloat16_bits(to_bfloat16_bits(np.uint32([0x7F800001, 0xFFFFFFFF]).view(np.float32)))).all()


# Export


@pytest.mark.skipif(os.name != "posix", reason="folders are not synced elsewhere")
def test_a_file_gets_its_name_when_its_bytes_are_on_the_disk(tmp_path, monkeypatch):
    """Else the name may be there after a power cut, and the bytes not."""
    order, replace = [], os.replace

    def fsync(descriptor):
        found = os.fstat(descriptor)
        order.append("folder" if stat.S_ISDIR(found.st_mode) else f"{found.st_size} bytes")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("named"), replace(*paths)))
    write_whole(tmp_path / "made" / "x", b"12345")
    assert order == ["5 bytes", "named", "folder"] and (tmp_path / "made/x").read_bytes() == b"12345"


@pytest.mark.skipif(os.name != "posix", reason="folders are not synced elsewhere")
@pytest.mark.parametrize("supported", [True, False])
def test_on_macos_the_drive_empties_its_cache(tmp_path, monkeypatch, supported):
    """Where `fsync` only hands the bytes to the drive. Not all file systems have the call that does more."""
    import fcntl

    calls = []

    def control(descriptor, command):
        calls.append(command)
        if not supported:
            raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", control)
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append("fsync"))
    write_whole(tmp_path / "x", b"12345")
    assert calls == ([51] if supported else [51, "fsync"]) * 2 and (tmp_path / "x").read_bytes() == b"12345"
