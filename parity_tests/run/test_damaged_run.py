"""Every file of a run folder truncated, emptied, deleted, or with one bit flipped, before a run goes on: it becomes the
run that nobody disturbed, or it is refused in one line and goes on when the file is put back. Torch has the fast part:
what is done about a damaged file is the same code for both; `state/test_damage.py` has the checkpoints of both."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from parity_tests.harness.kills import MAINS, numbers, settings
from torch_ref.spec.interface import StepResult

STEPS, STOPPED_AT = 12, 10


def train(framework: str, folder: Path, run: Path, *flags: str) -> int:
    return importlib.import_module(MAINS[framework]).main(
        ["--config", str(folder / "settings.toml"), "--run-dir", str(run), "--no-tensorboard", *flags]
    )


@pytest.fixture(scope="module", params=list(MAINS))
def stopped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A folder with `straight`, a run to its end, and `stopped`, one that was interrupted after two checkpoints."""
    framework = request.param
    pytest.importorskip({"flax": "jax"}.get(framework, framework))
    folder = tmp_path_factory.mktemp(framework)
    settings(folder, STEPS)
    assert train(framework, folder, folder / "straight") == 0
    backend = importlib.import_module({"flax": "flax_model", "torch": "torch_ref"}[framework] + ".backend")
    owner = getattr(backend, f"{framework.capitalize()}Backend")
    begin_step = owner.begin_step

    def interrupted(self, inputs: np.ndarray, targets: np.ndarray) -> Callable[[], StepResult]:
        result = begin_step(self, inputs, targets)
        if self.steps_done == STOPPED_AT:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, "begin_step", interrupted)
        assert train(framework, folder, folder / "stopped") == 130
    return framework, folder


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    if content:  # the lock is empty
        content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


DAMAGES = {"truncated": truncate, "emptied": empty, "one bit flipped": flip, "deleted": Path.unlink}


def later(run: Path) -> list[tuple]:
    """What the run logged after it was interrupted: the earlier lines may have been damaged."""
    return numbers(run, after=STOPPED_AT)


def goes_on_or_is_refused(
    framework: str, folder: Path, run: Path, file: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture
) -> str:
    """`went on` or what was said; anything else fails the test."""
    whole = file.read_bytes()
    before = {path.relative_to(run) for path in run.rglob("*") if path.is_file()}
    damage(file)
    capsys.readouterr()
    code, said = train(framework, folder, run), capsys.readouterr().err
    if code:
        assert code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(whole)
        assert train(framework, folder, run) == 0
    assert later(run) == later(folder / "straight")
    assert {r.relative_to(run) for r in run.rglob("*") if r.is_file()} | {Path("best")} >= {
        path for path in before if path.parts[0] not in ("best", "checkpoints")
    }
    weights = next(path.name for path in (folder / "straight").glob("deepseek_final.*"))
    assert (run / weights).read_bytes() == (folder / "straight" / weights).read_bytes()
    return said or "went on"


@pytest.mark.parametrize(
    ("name", "how", "outcome"),
    [
        ("data.json", "emptied", "data.json: damaged"),
        ("validation.npz", "one bit flipped", "validation.npz: damaged"),
        ("tokenizer.json", "truncated", "tokenizer.json: damaged"),
        ("tokenizer.json", "deleted", "went on"),
        ("tokenizer_config.json", "deleted", "went on"),
        ("settings.toml", "emptied", "went on"),
        ("metrics.jsonl", "emptied", "went on"),
        ("checkpoints/step_10.pt", "truncated", "went on"),
    ],
)
def test_a_damaged_file(
    stopped: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture, name: str, how: str, outcome: str
) -> None:
    framework, folder = stopped
    if framework != "torch":
        pytest.skip("the slow test has both")
    run = Path(shutil.copytree(folder / "stopped", tmp_path / "run"))
    assert outcome in goes_on_or_is_refused(framework, folder, run, run / name, DAMAGES[how], capsys)
    if name.startswith("tokenizer"):
        assert (run / name).read_bytes() == (folder / "straight" / name).read_bytes()
    if name.startswith("checkpoints"):
        assert (run / f"{name}.damaged").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("how", DAMAGES)
def test_every_file_of_a_run_folder(
    stopped: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture, how: str
) -> None:
    framework, folder = stopped
    seen = {}
    names = sorted(p.relative_to(folder / "stopped") for p in (folder / "stopped").rglob("*") if p.is_file())
    for number, name in enumerate(names):
        run = Path(shutil.copytree(folder / "stopped", tmp_path / str(number)))
        said = goes_on_or_is_refused(framework, folder, run, run / name, DAMAGES[how], capsys)
        seen[str(name)] = said.replace(str(run), "RUN").strip()
    with capsys.disabled():
        print(f"\n{framework}, {how}: {json.dumps(seen, indent=1)}")
    assert len(seen) > 10


def test_a_second_framework_leaves_the_first_ones_records_alone(
    stopped: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    framework, folder = stopped
    other = "flax" if framework == "torch" else "torch"
    pytest.importorskip({"flax": "jax"}.get(other, other))
    run = Path(shutil.copytree(folder / "stopped", tmp_path / "run"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert train(other, folder, run) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: --run-dir {run}: holds a run of the {framework.replace('flax', 'Flax')} trainer")
    assert f"python -m train.convert {run} NEW_FOLDER --to {other}" in said and said.count("\n") == 1
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("flags", [("--num-layers", "3"), ("--vocab-size", "310")], ids=" ".join)
def test_a_run_of_another_model_is_refused_by_name(
    stopped: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture, flags: tuple[str, str]
) -> None:
    framework, folder = stopped
    run = Path(shutil.copytree(folder / "stopped", tmp_path / "run"))
    assert train(framework, folder, run, *flags) == 2
    said = capsys.readouterr().err
    name = flags[0].removeprefix("--").replace("-", "_")
    assert said.count("\n") == 1 and (f"made with {name} = " in said or flags[0] in said), said
