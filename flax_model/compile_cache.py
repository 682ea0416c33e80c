"""What XLA compiled, kept for the next process: a run that goes on, or the next text, starts in a fraction of the time.

JAX does it (`jax_compilation_cache_dir`), under a key of the program, its own version and the processor or card, so
that what comes out is what was compiled. JAX_COMPILATION_CACHE_DIR names another folder, and
JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

import jax

LARGEST = 2 * 2**30
"""Bytes; what was not used for longest makes room."""


def keep_compiled_programs() -> None:
    """From now on in this process, in the user's cache folder; where that cannot be written, nothing is kept."""
    if jax.config.jax_compilation_cache_dir is not None:
        return
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smol-deepseek" / "jax"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # the latter where nobody has a home
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", LARGEST)
