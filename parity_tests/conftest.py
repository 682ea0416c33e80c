"""Shapes and types in the signatures of both models are checked at run time while tests run."""

import os
from pathlib import Path

# One GPU may hold both frameworks, so JAX must not take it whole; matrix products in float32 mean float32.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
# Models here are small, and most of the time goes into compiling them: half of it without LLVM's optimisation passes.
# Speed is all they change; `python -m parity_tests.report` measures the same numbers with them.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

from jaxtyping import install_import_hook

REPOSITORY = Path(__file__).parents[1]
# `train` is an entry point: it speaks of protocols and paths, not of shapes.
CHECKED = [
    ".".join(file.relative_to(REPOSITORY).with_suffix("").parts)
    for package in ("torch_ref", "flax_model")
    for file in (REPOSITORY / package).rglob("*.py")
    if file.stem != "train"
]

install_import_hook(CHECKED, "beartype.beartype")
