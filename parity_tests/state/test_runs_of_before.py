"""Run folders that an earlier version wrote go on: two interrupted at step 10 of 15 by the code of commit 1e2bf17, and
what the unbroken runs of then had logged."""

from __future__ import annotations

import importlib
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from parity_tests.harness.kills import COMPARED, MAINS
from train.convert import main as convert
from train.run.runlog import read_metrics
from train.state.source import locate, open_state

ARCHIVE = Path(__file__).parents[1] / "support/runs_of_before.tar.xz"


@pytest.fixture
def before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder the runs are in, as the working one: their settings name its text."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def records(run: Path) -> list[dict]:
    return [record for record in read_metrics(run) if record["kind"] in COMPARED]


@pytest.mark.parametrize("framework", list(MAINS))
def test_a_run_of_before_goes_on(before: Path, framework: str) -> None:
    pytest.importorskip({"flax": "jax"}.get(framework, framework))
    run = Path(f"{framework}-stopped")
    told = records(run)
    main = importlib.import_module(MAINS[framework]).main
    assert main(["--config", "settings.toml", "--run-dir", str(run), "--no-tensorboard"]) == 0
    got, expected = records(run), records(Path(f"{framework}-straight"))
    assert got[: len(told)] == told
    assert [(r["kind"], r["step"]) for r in got] == [(r["kind"], r["step"]) for r in expected]
    for ours, theirs in zip(got, expected, strict=True):
        for name in set(COMPARED[ours["kind"]]) - {"text"}:
            if isinstance(theirs[name], float):  # another processor rounds otherwise
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4), (ours["step"], name)
            else:
                assert ours[name] == theirs[name], (ours["step"], name)


@pytest.mark.parametrize("framework", list(MAINS))
def test_a_checkpoint_of_before_is_converted(before: Path, framework: str) -> None:
    """Into the form of every other reader; the sizes come with it, and every weight."""
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    weights = open_state(locate(Path(f"{framework}-stopped"))).weights
    for form in ("neutral", "transformers", "flax" if framework == "torch" else "torch"):
        assert convert([f"{framework}-stopped", f"out-{form}", "--to", form]) == 0
        got = open_state(locate(Path(f"out-{form}"))).weights
        assert set(got) == set(weights) and all(np.array_equal(got[name], weights[name]) for name in weights)
    settings = json.loads(Path("out-transformers/config.json").read_text())
    assert (settings["hidden_size"], settings["num_hidden_layers"]) == (8, 2)
