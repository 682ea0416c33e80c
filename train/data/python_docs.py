"""`python-docs`: the Python documentation, about 2 MB of English that every CPython carries. A module or a topic of it
is a document."""

from __future__ import annotations

import ast
import json
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from torch_ref.spec.storage import write_whole
from train.data.sources import FileSource

PYTHON_DOCS = "python-docs"
_NOT_DOCUMENTATION = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
"""Folders of the standard library that are left out."""


def python_documents() -> Iterator[tuple[str, str]]:
    """(name, text) of the language reference's topics and of each standard-library module's docstrings, in an order
    that depends only on the Python version."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions ship it apart; the docstrings alone still make a corpus
        topics = {}
    for name in sorted(topics):
        yield f"topic {name}", topics[name]
    for folder, subfolders, files in os.walk(library := sysconfig.get_path("stdlib")):
        subfolders[:] = sorted(set(subfolders) - _NOT_DOCUMENTATION)
        for file in sorted(Path(folder, name) for name in files if name.endswith(".py")):
            module = ".".join(file.relative_to(library).with_suffix("").parts).removesuffix(".__init__")
            if text := module_docstrings(module, file):
                yield f"module {module}", text


def module_docstrings(module: str, file: Path) -> str:
    """Every docstring of a module under the full name of what it describes, in the order of the source."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return ""
    described = []

    def visit(node: ast.AST, name: str) -> None:
        if text := ast.get_docstring(node):
            described.append(f"{name}\n\n{text}")
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child, f"{name}.{child.name}")

    visit(tree, module)
    return "\n\n".join(described)


def python_docs_source(file: Path, keep: bool = False) -> FileSource:
    """`python-docs` as rows of a JSON-lines file, written if it is not there (or unless `keep`).

    The text differs between Python versions. A run keeps its own copy, and so can go on under another Python."""
    if not (keep and file.exists()):
        lines = (json.dumps({"name": name, "text": text}) + "\n" for name, text in python_documents())
        write_whole(file, "".join(lines).encode())
    return FileSource(str(file), name=PYTHON_DOCS)
