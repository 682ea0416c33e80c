"""Shapes and types in the signatures of both models are checked at run time while tests run."""

import os

# One GPU may hold both frameworks, so JAX must not take it whole; matrix products in float32 mean float32.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")

from jaxtyping import install_import_hook

install_import_hook(["torch_ref", "flax_model"], "beartype.beartype")
