"""Files and folders that appear only when whole, and tensors on disk without a framework: `safetensors` files written
and read one tensor at a time.

The `safetensors` library serialises tensors that are all in memory; a training state is three times the model, so
here a file's header is laid out from names, shapes and types that are known beforehand, and every tensor goes
straight to its place. The format: 8 bytes with the header's length (little-endian), the header (JSON: name ->
dtype, shape, offsets into the data), the data.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import xxhash

from torch_ref.spec.interface import UserError

_CODES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_ITEM_SIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_MAX_HEADER_BYTES = 100_000_000
_MAX_JSON_BYTES = 256 << 20

Options = TypeVar("Options")


@dataclass(frozen=True)
class TensorSpec:
    """A tensor before its values are known."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """`float64`, `float32`, `bfloat16` or `float16`."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _ITEM_SIZE[self.dtype]


def to_bfloat16_bits(value: np.ndarray) -> np.ndarray:
    """Bit patterns (uint16) of the nearest bfloat16 values, ties to even; NaN stays NaN. NumPy has no bfloat16."""
    single = np.ascontiguousarray(value, dtype="<f4")
    bits = single.view("<u4")
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(single), (bits >> 16) | 0x40, rounded).astype("<u2")


def from_bfloat16_bits(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bit patterns: exact."""
    return (bits.astype("<u4") << 16).view("<f4")


def checksum(array: np.ndarray) -> str:
    """Type and shape in words, and the XXH3 of the bytes: 26 GB/s on a core, where CRC-32 has 3."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return f"{described(array.shape, array.dtype)} {xxhash.xxh3_64_hexdigest(flat)}"


def described(shape: Iterable[int], dtype: Any) -> str:
    """A type and a shape in words: `float32 [2, 4]`."""
    return f"{dtype} {list(shape)}"


class TensorWriter:
    """Writes one file of known `specs`; the tensors may come in any order, and none is kept.

    Use as a context manager: the file gets its name when every tensor was written.
    """

    def __init__(self, path: Path, specs: Iterable[TensorSpec], metadata: dict[str, str] | None = None) -> None:
        # Wide types first, so that each tensor starts at a multiple of its item size.
        ordered = sorted(specs, key=lambda spec: -_ITEM_SIZE[spec.dtype])
        header: dict = {"__metadata__": metadata} if metadata else {}
        self._place: dict[str, tuple[TensorSpec, int]] = {}
        end = 0
        for spec in ordered:
            self._place[spec.name] = (spec, end)
            offsets = [end, end + spec.nbytes]
            header[spec.name] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
            end += spec.nbytes
        self._header = json.dumps(header, separators=(",", ":")).encode()
        self._header += b" " * (-len(self._header) % 8)
        self._missing = set(self._place)
        self.checksums: dict[str, str] = {}
        """Of what was written, by name."""
        self._data_start = 8 + len(self._header)
        self._path, self._size = Path(path), self._data_start + end

    def write(self, name: str, value: np.ndarray) -> None:
        """Put one tensor in its place, rounded to its type. Raises `ValueError` if it is unknown, written already,
        or of another shape."""
        if name not in self._missing:
            raise ValueError(f"{name}: {'written twice' if name in self._place else 'not a tensor of this file'}")
        spec, offset = self._place[name]
        if tuple(value.shape) != spec.shape:
            raise ValueError(f"{name}: shape {tuple(value.shape)}, expected {spec.shape}")
        if spec.dtype == "bfloat16":
            data = to_bfloat16_bits(value)
        else:
            data = np.ascontiguousarray(value, dtype=np.dtype(spec.dtype).newbyteorder("<"))
        self._file.seek(self._data_start + offset)
        self._file.write(data.data)
        self.checksums[name] = checksum(data)
        self._missing.remove(name)

    def __enter__(self) -> TensorWriter:
        with ExitStack() as stack:
            self._file = stack.enter_context(whole_file(self._path, self._size))
            self._file.write(len(self._header).to_bytes(8, "little") + self._header)
            self._file.truncate(self._size)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None and self._missing:
            missing = ValueError(f"{self._path}: never written: {', '.join(sorted(self._missing)[:5])}")
            self._stack.__exit__(ValueError, missing, None)
            raise missing
        self._stack.__exit__(*error)


class TensorReader(Mapping[str, np.ndarray]):
    """The tensors of one or more files by name, each read when asked for and not kept. 16-bit floats come as float32.

    Raises `UserError` naming a file that is not `safetensors`, is cut short, or holds a type that is not a float; and
    when a tensor is read that differs from its one of `checksums`, if those are given.
    """

    def __init__(self, *paths: Path, checksums: Mapping[str, str] | None = None) -> None:
        self._checksums = checksums
        self.specs: dict[str, TensorSpec] = {}
        self._place: dict[str, tuple[Path, int]] = {}
        for path in paths:
            for spec, offset in _read_header(Path(path)):
                self.specs[spec.name] = spec
                self._place[spec.name] = (Path(path), offset)

    def __getitem__(self, name: str) -> np.ndarray:
        spec, (path, offset) = self.specs[name], self._place[name]
        stored = np.dtype("<u2") if spec.dtype == "bfloat16" else np.dtype(spec.dtype).newbyteorder("<")
        try:
            flat = np.fromfile(path, stored, math.prod(spec.shape), offset=offset)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from error
        if flat.size != math.prod(spec.shape):
            raise UserError(f"{path}: cut short at {name}; write or fetch it again")
        if self._checksums is not None and self._checksums.get(name) != checksum(flat.reshape(spec.shape)):
            raise UserError(f"{path}: damaged: {name} differs from its checksum; write or fetch it again")
        if spec.dtype == "bfloat16":
            flat = from_bfloat16_bits(flat)
        elif spec.dtype == "float16":
            flat = flat.astype(np.float32)
        return flat.reshape(spec.shape)

    def __contains__(self, name: object) -> bool:  # without reading it
        return name in self.specs

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


def _read_header(path: Path) -> Iterator[tuple[TensorSpec, int]]:
    """Each tensor of a file with the byte it starts at."""
    try:
        with open(path, "rb") as file:
            length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
            if length > min(size - 8, _MAX_HEADER_BYTES):
                raise UserError(f"{path}: not a safetensors file: its header would be {length} bytes long")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            if entry["dtype"] not in _DTYPES:
                raise UserError(f"{path}: {name} is stored as {entry['dtype']}; only {', '.join(_DTYPES)} can be read")
            spec = TensorSpec(name, tuple(entry["shape"]), _DTYPES[entry["dtype"]])
            if any(type(number) is not int or number < 0 for number in (start, end, *spec.shape)):
                raise UserError(f"{path}: damaged at {name}: no shape and place in the file")
            if end - start != spec.nbytes or 8 + length + end > size:
                raise UserError(f"{path}: cut short or damaged at {name}; write or fetch it again")
            yield spec, 8 + length + start
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a safetensors file") from error


@contextmanager
def fresh_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes `target` when the block ends well and goes when it does not.

    Raises `UserError` if `target` exists and holds something, or cannot be made.
    """
    target = Path(target)
    with _made(target):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"{target}: exists already; name a new folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        partial.chmod(0o755)
        yield partial
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises `UserError` naming the file when it is absent or not that."""
    try:
        if Path(path).stat().st_size > _MAX_JSON_BYTES:
            raise UserError(f"{path}: larger than {_MAX_JSON_BYTES >> 20} MiB, which no such file is")
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value


def write_json(path: Path, value: dict) -> None:
    write_whole(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


# ------------------------------------------------------------------------------------------------ whole or not at all


@contextmanager
def whole_file(path: Path, needed: int | None = None) -> Iterator[BinaryIO]:
    """A file that gets its name when the block ends well, with all its bytes on the disk: a crash leaves what was there
    before or the new file. Raises `UserError` naming a file that cannot be written (`needed`: its bytes, if known)."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            _sync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _write_error(path, error, needed) from error
        raise


def user_path(path: str | Path) -> Path:
    """A path in which `~` stands for a home folder, as a shell would write it: one in a file has met no shell, nor has
    that in `--run-dir=~/x`."""
    return Path(os.path.expanduser(path))


def with_user_paths(options: Options) -> Options:
    """A dataclass with each `Path` in it by `user_path`."""
    paths = {name: user_path(value) for name, value in vars(options).items() if isinstance(value, Path)}
    return replace(options, **paths)


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file by `whole_file`, in a folder that is made if it is not there."""
    make_folder(Path(path).parent)
    with whole_file(path) as file:
        file.write(content)


def sync_folder(folder: Path) -> None:
    """A rename reaches the disk with its folder."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            _sync(descriptor)
        finally:
            os.close(descriptor)


def _sync(descriptor: int) -> None:
    """What was written is on the disk when this returns. On macOS `fsync` alone leaves it in the drive's own cache,
    from which a later rename may come to the disk first."""
    with suppress(ImportError, AttributeError, OSError):  # another system; a file system that has no such call
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        return
    os.fsync(descriptor)


def make_folder(folder: Path) -> None:
    """Raises `UserError` where a folder cannot be made."""
    with _made(folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """A block that makes a folder. Raises `UserError` where it cannot."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); choose another place") from error


@contextmanager
def write_errors(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turns what a library that writes says of a file that it cannot write into one `UserError` with the mend. `needed`
    are the bytes that were to be written, if they are known."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # it broke off the file that the library now complains of
            raise error.__context__ from None
        raise _write_error(path, error, needed) from error


def _write_error(path: Path, error: BaseException, needed: int | None) -> UserError:
    number, free = _errno(error), _free_space(path)
    short = number is None and needed is not None and free is not None and free < needed
    if short or number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        limit = {errno.EDQUOT: "the quota is used up", errno.EFBIG: "larger than files may be here"}
        amount = f", {size_in_words(needed)} needed" if needed else ""
        amount += "" if free is None else f", {size_in_words(free)} free"
        if number == errno.ENOSPC and None not in (needed, free) and needed < free:
            amount += " now (it may be that no more files fit)"
        return UserError(f"{path}: {limit.get(number, 'no space left')}{amount}; make room and start again")
    if number == errno.ENOENT:
        return UserError(f"{path}: its folder is gone; was it moved or removed meanwhile?")
    return UserError(f"{path}: could not be written: {os.strerror(number) if number else first_line(error)}")


def first_line(said: BaseException | str) -> str:
    """What an error says, in at most 200 characters of one line."""
    lines = str(said).strip().splitlines() or [type(said).__name__]
    return lines[0][:200]


def unused_name(path: Path) -> Path:
    """The path, or with a number appended if there is something of that name."""
    names = itertools.chain([path], (path.with_name(f"{path.name}.{number}") for number in itertools.count(2)))
    return next(name for name in names if not name.exists())


def size_in_words(size: int) -> str:
    """Bytes with three digits and a unit."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= 0.9995 * factor or unit == "kB":  # less would be rounded to a thousand of the next smaller unit
            return f"{size / factor:.3g} {unit}" if size < 999.5 * factor else f"{size / factor:,.0f} {unit}"


def _errno(error: BaseException | None) -> int | None:
    """The system's number of an error, or of the one behind it. tensorstore has it in its text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        if found := re.search(r"os_error_code='(\d+)'", str(error)):
            return int(found[1])
        error = error.__cause__ or error.__context__
    return None


def _free_space(path: Path) -> int | None:
    """Bytes free on the disk of a path that need not be there; None where that cannot be told."""
    for folder in Path(path).absolute().parents:
        with suppress(OSError):
            return shutil.disk_usage(folder).free
    return None
