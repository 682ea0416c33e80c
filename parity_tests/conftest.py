"""Shapes and types in the signatures of both models are checked at run time while tests run."""

import functools
import gc
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

from parity_tests.harness.quick import quick_flags

# One GPU may hold both frameworks, so JAX must not take it whole; matrix products in float32 mean float32.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
# Models here are small, and most of the time goes into compiling them. Speed is all these flags are about;
# `python -m parity_tests.report` measures the same numbers without them.
os.environ.setdefault("XLA_FLAGS", quick_flags())
# Several workers (`-n`) share the cores, one thread of torch's each. All set before either framework is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

import parity_tests.support.annotations  # noqa: F401 (the hook finds it by its name)

REPOSITORY = Path(__file__).parents[1]
# `train` is an entry point: it speaks of protocols and paths, not of shapes.
CHECKED = [
    ".".join(file.relative_to(REPOSITORY).with_suffix("").parts)
    for package in ("torch_ref", "flax_model")
    for file in (REPOSITORY / package).rglob("*.py")
    if file.stem != "train"
]

install_import_hook(CHECKED, "parity_tests.support.annotations.checked_once")


def pytest_configure(config):
    """One cache of JAX's compiled programs for all workers, the processes they start, and the next session: JAX finds
    them by the program, its own version, its flags and the processor. `--cache-clear` begins anew."""
    gc.set_threshold(10_000, 20, 50)  # JAX traces in small objects; a walk of all that both frameworks hold takes long
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; tests send it to their children
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "PYTEST_XDIST_WORKER" in os.environ or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    if hasattr(config, "cache"):
        folder = str(config.cache.mkdir("jax"))
    else:  # pytest runs without its own cache
        folder = tempfile.mkdtemp(prefix="parity_tests_jax_")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


@pytest.fixture(scope="session", autouse=True)
def what_takes_seconds_and_is_the_same():
    """A run that begins takes the default text out of Python's own library, once here; one that ends draws its curves,
    not at all: `test_plot.py` draws, and `test_a_run_of_each_framework`."""
    try:
        from train.data import python_docs
        from train.run import loop
    except ModuleNotFoundError:  # an environment for some tests alone (`transformers_v4.sh`), where none of them trains
        yield
        return

    def words_for_a_picture(run_dirs: list[Path], output: Path) -> Path:
        output.write_text(f"curves of {run_dirs}")
        return output

    collected = functools.cache(lambda original=python_docs.python_documents: tuple(original()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(python_docs, "python_documents", lambda: iter(collected()))
        patch.setattr(loop, "plot_runs", words_for_a_picture)
        yield
