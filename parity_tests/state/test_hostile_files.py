"""Files made to do harm: code in pickles, sizes that are lies, names that lead elsewhere. All are refused in one line,
within bounds of memory."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parity_tests.support.backends import CONFIG, make_backend
from torch_ref.spec.huggingface import import_folder
from torch_ref.spec.interface import UserError
from torch_ref.spec.storage import TensorReader, read_json
from train.data.tokenizer import load_tokenizer
from train.state.source import locate, open_state

REPOSITORY = Path(__file__).parents[2]
FUZZ = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def test_nothing_unpickles_but_tensors() -> None:
    """In the code itself: whatever reads a pickle, or runs what a repository brings along."""
    for package in ("torch_ref", "flax_model", "train"):
        for file in (REPOSITORY / package).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            for call in re.findall(r"torch\.load\([^)]*\)", text):
                assert "weights_only=True" in call, f"{file}: {call}"
            unsafe = (
                r"pickle\.loads?\(|allow_pickle=True|trust_remote_code=True|yaml\.(unsafe_)?load\(|\bexec\(|\beval\("
            )
            found = [match[0] for match in re.finditer(unsafe, text) if not text[: match.start()].endswith(".")]
            assert not found, f"{file}: {found}"


class Trap:
    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self):
        return Path.write_text, (self._file, "")


@pytest.mark.parametrize("kind", ["bare pickle", "global", "compressed", "overlapping", "archive of code"])
def test_a_crafted_pt_file(tmp_path: Path, kind: str) -> None:
    torch = pytest.importorskip("torch")
    path, sprung = tmp_path / "step_1.pt", tmp_path / "sprung"
    trap = pickle.dumps(Trap(sprung), protocol=2)
    if kind == "bare pickle":
        path.write_bytes(trap)
    elif kind == "global":
        torch.save({"framework": "torch", "meta": Trap(sprung)}, path)
    elif kind == "archive of code":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("step_1/data.pkl", trap)
            archive.writestr("step_1/version", "3\n")
            archive.writestr("../../sprung", "")
    else:
        torch.save({"framework": "torch", "w": torch.rand(1000)}, tmp_path / "honest.pt")
        with zipfile.ZipFile(tmp_path / "honest.pt") as honest, zipfile.ZipFile(path, "w") as archive:
            for member in honest.infolist():
                method = zipfile.ZIP_DEFLATED if kind == "compressed" else zipfile.ZIP_STORED
                archive.writestr(member.filename, honest.read(member), method)
            if kind == "overlapping":
                archive.filelist += archive.filelist * 3  # all at the same place of the file
    backend = make_backend("torch")
    said = "step_1.pt.*compressed or overlap" if kind in ("compressed", "overlapping") else "step_1.pt"
    for read in (backend.restore, lambda file: open_state(locate(file))):
        with pytest.raises(UserError, match=said) as refusal:
            read(path)
        assert "\n" not in str(refusal.value)
    assert not sprung.exists() and not (tmp_path.parent / "sprung").exists()


def safetensors(path: Path, header: bytes, length: int | None = None, data: bytes = bytes(16)) -> Path:
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)
    return path


def test_a_header_of_absurd_size_is_refused_unread(tmp_path: Path) -> None:
    for length in (2**63, 10**9, 99):
        with pytest.raises(UserError, match=f"its header would be {length} bytes long"):
            TensorReader(safetensors(tmp_path / "x.safetensors", b"{}", length))


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]},
        {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2.0, 2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 2**64]},
        {"dtype": "F32", "shape": [True, 4], "data_offsets": [0, 16]},
        {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": 4, "data_offsets": 16},
    ],
)
def test_places_outside_of_the_file_are_refused(tmp_path: Path, entry: dict) -> None:
    with pytest.raises(UserError, match="x.safetensors"):
        TensorReader(safetensors(tmp_path / "x.safetensors", json.dumps({"w": entry}).encode()))


@FUZZ
@given(
    header=st.dictionaries(
        st.text(max_size=5),
        JSON
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "BF16", "I8"]),
                "shape": st.lists(st.integers(-1, 3), max_size=3),
                "data_offsets": st.lists(st.integers(-4, 20), min_size=1, max_size=3),
            }
        ),
        max_size=3,
    )
    | JSON,
    cut=st.integers(0, 30),
)
def test_any_header_is_read_or_refused(tmp_path: Path, header: object, cut: int) -> None:
    text = json.dumps(header).encode()
    path = safetensors(tmp_path / "x.safetensors", text[: len(text) - cut] if cut < len(text) else text)
    try:
        reader = TensorReader(path)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert all(reader[name].shape == reader.specs[name].shape for name in reader)


def test_deep_nesting_is_no_crash(tmp_path: Path) -> None:
    deep = b"[" * 100_000
    (tmp_path / "config.json").write_bytes(deep)
    with pytest.raises(UserError, match="config.json: not JSON"):
        read_json(tmp_path / "config.json")
    with pytest.raises(UserError, match="x.safetensors: not a safetensors file"):
        TensorReader(safetensors(tmp_path / "x.safetensors", deep))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", 3, None])
def test_an_index_names_files_of_its_folder_alone(tmp_path: Path, name: object) -> None:
    from parity_tests.harness.cases import case_values
    from torch_ref.spec.huggingface import export_folder

    export_folder(tmp_path / "model", CONFIG, case_values(CONFIG))
    (tmp_path / "model/model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": name}}
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        UserError, match="index.json: its weight_map does not give each tensor a file of this folder|Is a directory"
    ):
        import_folder(tmp_path / "model")


def sparse(path: Path, size: int) -> Path:
    """A file of so many bytes, that takes no room."""
    path.touch()
    os.truncate(path, size)
    return path


def test_files_of_gigabytes_are_not_read_whole(tmp_path: Path) -> None:
    sparse(tmp_path / "tokenizer.json", 8 << 30)
    with pytest.raises(UserError, match="larger than 256 MiB, which no tokenizer.json is"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match="config.json: larger than 256 MiB"):
        read_json(sparse(tmp_path / "config.json", 8 << 30))


@pytest.mark.parametrize("framework", ["torch", "flax"])
def test_removing_a_checkpoint_that_is_a_link_leaves_what_it_leads_to(tmp_path: Path, framework: str) -> None:
    pytest.importorskip(framework)
    backend = make_backend(framework)
    backend.init(0)
    backend.save(tmp_path / "elsewhere", "step_1", {})
    backend.wait()
    ((_, target),) = backend.find(tmp_path / "elsewhere")
    link = tmp_path / "checkpoints" / target.name
    link.parent.mkdir()
    link.symlink_to(target)
    before = [file for file in target.rglob("*")] or [target.stat().st_size]
    backend.delete(link)
    assert not link.is_symlink()
    assert ([file for file in target.rglob("*")] or [target.stat().st_size]) == before
    backend.restore(target)
