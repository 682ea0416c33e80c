"""A signal whatever a run is at: it ends in time with the signal's code, a second one harms nothing on disk, and the
same command goes on to the run that nothing happened to, bit for bit."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest

from parity_tests.support.processes import MAIN, differences, settings, started

MAINS = {"flax": MAIN, "torch": MAIN.replace("train.flax_main", "torch_ref.train")}
SECONDS = 30

SIGNALLED = """
import importlib, os, threading, time
def signals_during(module, owner, name, call, number, times):
    owner, made = getattr(importlib.import_module(module), owner), []
    original = getattr(owner, name)
    def signalled(*arguments, **named):
        made.append(1)
        if len(made) == call:
            print(f"signalled at {time.time()}", flush=True)
            for late in range(times):
                threading.Timer(0.005 + 0.01 * late, os.kill, (os.getpid(), number)).start()
        return original(*arguments, **named)
    setattr(owner, name, signalled)
"""

PHASES = {
    "compiling": ("FlaxBackend", "_compile", 1),
    "at a step": ("Backend", "begin_step", 2),
    "saving": ("Checkpoints", "save", 2),
    "validating": ("Backend", "evaluate", 9),
    "sampling": ("Backend", "generate", 1),
    "writing the final weights": ("Backend", "state", 1),
}
"""Class, method and number of the call that signals come in. Waiting for data is in test_loop.py."""


def patched(framework: str, phase: str, number: int, times: int) -> str:
    """The program of a run that gets signals the first time that it comes to a phase."""
    package = {"flax": "flax_model", "torch": "torch_ref"}[framework]
    owner, name, call = PHASES[phase]
    module = f"{package}.{'checkpoint' if owner == 'Checkpoints' else 'backend'}"
    owner = f"{framework.capitalize()}{owner}" if owner == "Backend" else owner
    return f"{SIGNALLED}signals_during({module!r}, {owner!r}, {name!r}, {call}, {number}, {times})\n{MAINS[framework]}"


# Flax, which saves in the background, also where tests have to be quick.
@pytest.fixture(scope="module", params=["flax", pytest.param("torch", marks=pytest.mark.slow)])
def straight(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A framework and its run that nothing happened to."""
    pytest.importorskip({"flax": "jax"}.get(request.param, request.param))
    folder = tmp_path_factory.mktemp(request.param)
    with started(settings(folder, seq_len=32), folder / "straight", 1, program=MAINS[request.param]) as run:
        assert run.codes() == [0], run.said(0)
    return request.param, folder


QUICK = [("saving", signal.SIGTERM, 2)]
ALL = [
    (phase, number, times)
    for phase in PHASES
    for number in (signal.SIGINT, signal.SIGTERM)
    for times in (1, 2)
    if (phase, number, times) not in QUICK
]


@pytest.mark.parametrize(
    ("phase", "number", "times"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL)]
)
def test_the_run_goes_on(straight: tuple[str, Path], phase: str, number: int, times: int) -> None:
    framework, folder = straight
    if phase == "compiling" and framework == "torch":
        pytest.skip("torch compiles nothing on a CPU")
    config, run_dir = folder / "settings.toml", folder / f"{phase} {number} {times}"
    with started(config, run_dir, 1, program=patched(framework, phase, number, times)) as run:
        (code,) = run.codes()
        ended = time.time()
        # Before the first step nothing is lost by the signal's own way, which a shell reports as 143 too.
        allowed = {128 + number} | {"compiling": {-number}, "writing the final weights": {0}}.get(phase, set())
        assert code in allowed, run.said(0)
        assert ended - float(re.search(r"^signalled at (\S+)$", run.said(0), re.M)[1]) < SECONDS
        assert "Traceback" not in run.said(0), run.said(0)
    with started(config, run_dir, 1, program=MAINS[framework]) as run:
        assert run.codes() == [0], run.said(0)
    assert set(differences(run_dir, folder / "straight").values()) == {0.0}
