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


def keep_compiled_programs(platform: str) -> None:
    """From now on in this process, in the user's cache folder; where that cannot be written, nothing is kept.

    Nor by several processes with GPUs: they try kernels together, each its part, so that one that compiles waits for
    the others, for 24 hours. JAX lets process 0 alone write; on another machine, or where a lock on the file did not
    come in time, a process would compile what the first one has found.
    """
    alone = jax.process_count() == 1 or platform == "cpu"
    if not alone or jax.config.jax_compilation_cache_dir is not None:
        return
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smol-deepseek" / "jax"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # the latter where nobody has a home
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", LARGEST)
