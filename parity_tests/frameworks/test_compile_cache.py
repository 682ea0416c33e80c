"""What is compiled is kept for the next process, where it can be, and comes out as it went in."""

import os
import subprocess
import sys

import pytest

from parity_tests.harness import quick

pytest.importorskip("flax", reason="Flax is not installed")

PROGRAM = """
import jax, jax.numpy as jnp
from flax_model.compile_cache import keep_compiled_programs
keep_compiled_programs("cpu")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rpartition("/")[2]))
value = jax.jit(lambda x: jnp.sin(x @ x).sum())(jnp.arange(64.0).reshape(8, 8))
print(jax.config.jax_compilation_cache_dir, events.count("cache_hits"), float(value).hex())
"""


def run(program: str = PROGRAM, **variables: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment | variables, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_the_next_process_finds_what_was_compiled(tmp_path):
    first, second = (run(XDG_CACHE_HOME=str(tmp_path)) for _ in range(2))
    assert first[0] == second[0] == str(tmp_path / "smol-deepseek/jax")
    assert int(first[1]) == 0 < int(second[1]) and first[2] == second[2]
    assert any((tmp_path / "smol-deepseek/jax").iterdir())


def test_another_folder_and_none(tmp_path):
    assert run(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))[0] == str(tmp_path / "own")
    (tmp_path / "file").write_text("")
    assert run(XDG_CACHE_HOME=str(tmp_path / "file"))[:2] == ["None", "0"]


def test_a_user_without_a_home():
    homeless = "import os.path; os.path.expanduser = lambda path: path\n"  # what it does where no home is known
    assert run(homeless + PROGRAM, XDG_CACHE_HOME="")[:2] == ["None", "0"]


@pytest.mark.parametrize(("platform", "processes", "kept"), [("gpu", 1, True), ("gpu", 2, False), ("cpu", 2, True)])
def test_several_processes_with_gpus_compile_together_or_not_at_all(tmp_path, platform, processes, kept):
    """One that found the program would leave the others waiting for its part of the trials of kernels."""
    program = f"""
import jax
from flax_model.compile_cache import keep_compiled_programs
jax.process_count = lambda: {processes}
keep_compiled_programs({platform!r})
print(jax.config.jax_compilation_cache_dir)
"""
    folder = str(tmp_path / "smol-deepseek/jax") if kept else "None"
    assert run(program, XDG_CACHE_HOME=str(tmp_path)) == [folder]


@pytest.mark.parametrize(
    ("installed", "plain_fusions"), [("0.10.2", True), ("0.11.0", True), ("0.11.1", False), ("0.12.0.1", False)]
)
def test_no_flag_is_named_that_the_installed_jaxlib_lacks(monkeypatch, installed, plain_fusions):
    monkeypatch.setattr(quick, "version", lambda package: installed)
    assert (quick.PLAIN_FUSIONS in quick.quick_flags()) == plain_fusions


def test_the_flags_of_the_installed_jaxlib_are_known_to_it():
    assert run("import jax; print(jax.device_count('cpu'))", XLA_FLAGS=quick.quick_flags()) == ["1"]
