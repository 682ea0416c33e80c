"""Which files a path, a folder or a glob names, and what each is by its name."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from torch_ref.spec.interface import UserError
from torch_ref.spec.storage import user_path

TABLES = (".parquet", ".arrow", ".feather")
LINES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
TEXTS = (".txt", ".md")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
"""Of the two kinds above; tables are compressed within."""

FORMER_KINDS = (".parquet", ".jsonl", ".json", ".ndjson", ".txt", ".md")
"""Those that runs begun before the others were read find in a folder."""

KEPT_FILE = "data.json"
"""In every run folder: see `Kept` in feed.py."""
RUN_ROWS = ("metrics.jsonl", "metrics.cut.jsonl", "python-docs.jsonl")
"""What a run folder holds that would be read as rows: samples of the model, for one."""

NAMED_IN_A_NOTE = 3


class Found(NamedTuple):
    root: Path
    """The folder that the files' names are relative to."""
    files: list[Path]
    """Sorted."""
    left_out: dict[str, list[str]]
    """Names of the other files there, by reason."""


def kind_of(file: Path) -> str | None:
    """Its suffix in small letters, without that of a compression; None if it is of no kind that can be read."""
    suffix = file.suffix.lower()
    if suffix in COMPRESSIONS:
        suffix = Path(file.stem).suffix.lower()
        return suffix if suffix in LINES + TEXTS else None
    return suffix if suffix in TABLES + LINES + TEXTS else None


def find_files(
    pattern: str,
    is_data: Callable[[Path], bool],
    without: Collection[Path] = (),
    former: bool = False,
    option: str = "--dataset",
    runs: bool = False,
) -> Found:
    """The files that a path, a folder (searched with its subfolders, links too) or a glob names.

    In a folder, `.json` files that `is_data` refuses are left out, and so are READMEs and other `.md` files where
    there are rows beside them: those of a dataset's repository describe it. So are the logs of runs, unless `runs` says
    otherwise, and `without`. `former` searches a folder as runs did that began before. `option` named the pattern.

    Raises `UserError` if there is no file that can be read, and what `is_data` raises."""
    if not pattern:  # as a path it would be the folder that we are in
        raise UserError(f"{option}: an empty name; give files, a folder or a glob")
    path = user_path(pattern)
    left_out: dict[str, list[str]] = {}
    if path.is_dir():
        found = list(_former_search(path) if former else _search(path, left_out))
    else:
        found = [path] if path.is_file() else _glob(str(path))
    files = sorted(file for file in found if file.is_file())
    root = path if path.is_dir() else Path(os.path.commonpath([file.parent for file in files]) if files else ".")

    def leave_out(reason: str, unwanted: Callable[[Path], bool]) -> None:
        nonlocal files
        names = [file.relative_to(root).as_posix() for file in files if unwanted(file)]
        if names:
            left_out[reason] = left_out.get(reason, []) + names
            files = [file for file in files if not unwanted(file)]

    if former and path.is_dir():
        files = [file for file in files if file.suffix in FORMER_KINDS]
    else:
        leave_out("no kind that can be read", lambda file: kind_of(file) is None)
        excluded = {file.resolve() for file in without}
        leave_out("for validation", lambda file: bool(excluded) and file.resolve() in excluded)
        if path.is_dir():
            leave_out("of a run", lambda file: not runs and _is_of_a_run(file))
            leave_out("no rows with the text field", lambda file: kind_of(file) == ".json" and not is_data(file))
            if any(kind_of(file) not in TEXTS for file in files):
                leave_out("documentation beside data", _is_documentation)
    if not files and left_out.get("for validation"):
        raise UserError(f"{option} {pattern}: all of it is in a --validation-dataset")
    if not files:
        what = "is not" if path.is_file() else "there is no file there that is"
        others = f" ({in_words(left_out)})" if left_out and path.is_dir() else ""
        kinds = " ".join(TABLES + LINES + TEXTS)
        raise UserError(
            f"{option} {pattern}: {what} of a kind that can be read: {kinds}, the latter "
            f"{len(LINES + TEXTS)} also with {' '.join(COMPRESSIONS)}{others}"
        )
    return Found(root, files, left_out)


def in_words(left_out: dict[str, list[str]]) -> str:
    """Which files were left out, and why, in one line."""
    parts = []
    for reason, names in left_out.items():
        more = f" and {len(names) - NAMED_IN_A_NOTE} more" if len(names) > NAMED_IN_A_NOTE else ""
        parts.append(f"{', '.join(sorted(names)[:NAMED_IN_A_NOTE])}{more} ({reason})")
    return "left out: " + "; ".join(parts)


def kinds_in_words(files: list[Path]) -> str:
    """How many files of which kind."""
    counts = Counter("".join(suffix for suffix in file.suffixes[-2:] if suffix_is_known(suffix)) for file in files)
    total = f"{len(files):,} file{'s' if len(files) > 1 else ''}"
    if len(counts) == 1:
        return f"{total} ({next(iter(counts))})"
    return f"{total}: {', '.join(f'{count:,} {kind}' for kind, count in sorted(counts.items()))}"


def suffix_is_known(suffix: str) -> bool:
    return suffix.lower() in TABLES + LINES + TEXTS + COMPRESSIONS


def _is_of_a_run(file: Path) -> bool:
    return file.name in RUN_ROWS and file.with_name(KEPT_FILE).is_file()


def _is_documentation(file: Path) -> bool:
    name = file.name.upper()
    return kind_of(file) == ".md" or name.startswith(("README", "LICENSE", "LICENCE", "NOTICE", "CHANGELOG"))


def _search(folder: Path, left_out: dict[str, list[str]]) -> Iterator[Path]:
    """All files below a folder but hidden ones. Links to folders are followed, each folder is searched once."""
    searched: set[str] = set()

    def leave_out(error: OSError) -> None:
        reason = f"a folder that can't be read: {error.strerror or error}"
        left_out.setdefault(reason, []).append(Path(error.filename).relative_to(folder).as_posix())

    for place, folders, names in os.walk(folder, onerror=leave_out, followlinks=True):
        if (real := os.path.realpath(place)) in searched:
            left_out.setdefault("a link to a folder searched already", []).append(
                Path(place).relative_to(folder).as_posix()
            )
            folders.clear()
            continue
        searched.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if not name.startswith("."):
                if not os.path.exists(file := Path(place, name)):
                    left_out.setdefault("a link to nothing", []).append(file.relative_to(folder).as_posix())
                yield file


def _former_search(folder: Path) -> Iterator[Path]:
    inside = (file.relative_to(folder) for file in folder.rglob("*"))
    return (folder / file for file in inside if not any(part.startswith(".") for part in file.parts))


def _glob(pattern: str) -> list[Path]:
    """Matches of a glob whose leading folders may hold `[`, `*` and `?` in their names, as any folder may hold `[`."""
    parts = Path(pattern).parts
    known = 0
    while known < len(parts) and Path(*parts[: known + 1]).is_dir():
        known += 1
    if known == len(parts):
        return []
    base, rest = (Path(*parts[:known]) if known else Path()), os.path.join(*parts[known:])
    matches = glob.glob(rest, root_dir=base, recursive=True)
    return [base / name for name in matches or glob.glob(rest.replace("[", "[[]"), root_dir=base, recursive=True)]
