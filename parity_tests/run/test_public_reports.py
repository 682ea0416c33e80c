"""Rows of docs/bug_reports.md that no other test holds, and that the table names tests there are."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from parity_tests.harness.kills import MAINS, numbers, settings
from torch_ref.spec.interface import StepResult

REPOSITORY = Path(__file__).parents[2]
FLAX_IS_SLOW = [pytest.param("flax", marks=pytest.mark.slow), "torch"]


def train(framework: str, folder: Path, run: str, *flags: str) -> int:
    pytest.importorskip({"flax": "jax"}.get(framework, framework))
    argv = ["--config", str(folder / "settings.toml"), "--run-dir", str(folder / run), "--no-tensorboard", *flags]
    return importlib.import_module(MAINS[framework]).main(argv)


def test_every_row_names_tests_that_there_are() -> None:
    rows = re.findall(r"^\| (A\d+) \|(.*)$", (REPOSITORY / "docs/bug_reports.md").read_text(encoding="utf-8"), re.M)
    assert [name for name, _ in rows] == [f"A{number}" for number in range(1, 23)]
    for name, row in rows:
        named = re.findall(r"`([a-z_]+/[a-z_]+\.(?:py|sh))(?:::(\w+))?`", row)
        assert named, f"{name} names no test"
        for file, test in named:
            path = REPOSITORY / "parity_tests" / file
            assert not test or f"def {test}(" in path.read_text(encoding="utf-8"), f"{name}: {file}::{test}"
            assert path.is_file(), f"{name}: {file}"


@pytest.mark.parametrize("framework", FLAX_IS_SLOW)
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_micro_batches_do_not_move_the_place_where_data_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, framework: str, micro: int
) -> None:
    """Interrupted after 7 and after 9 steps, between the checkpoints of every 5."""
    settings(tmp_path, 12)
    flags = ("--micro-batch-size", str(micro), "--eval-interval", "0", "--sample-interval", "0")
    assert train(framework, tmp_path, "straight", *flags) == 0
    package = {"flax": "flax_model", "torch": "torch_ref"}[framework]
    owner = getattr(importlib.import_module(f"{package}.backend"), f"{framework.capitalize()}Backend")
    begin_step = owner.begin_step

    def interrupted(self, inputs: np.ndarray, targets: np.ndarray) -> Callable[[], StepResult]:
        result = begin_step(self, inputs, targets)
        if self.steps_done in (7, 9):
            os.kill(os.getpid(), signal.SIGINT)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, "begin_step", interrupted)
        assert [train(framework, tmp_path, "broken", *flags) for _ in range(2)] == [130, 130]
    assert train(framework, tmp_path, "broken", *flags) == 0
    assert numbers(tmp_path / "broken") == numbers(tmp_path / "straight")


ENDINGS = {
    "complete": ("The run is complete: 8 steps", ["--patience", "0"], 0),
    "stopped early": ("The run is complete: stopped early at step 8", ["--patience", "1", "--min-delta", "100"], 0),
}


@pytest.mark.parametrize("framework", FLAX_IS_SLOW)
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_process_ends_soon_after_its_last_line(tmp_path: Path, framework: str, ending: str) -> None:
    """In the midst of a parquet file of many row groups, whose reader has threads of its own."""
    pytest.importorskip({"flax": "jax"}.get(framework, framework))
    settings(tmp_path, 3)
    texts = [json.loads(line)["text"] for line in (tmp_path / "text.jsonl").read_text().splitlines()] * 20
    pq.write_table(pa.table({"text": texts}), tmp_path / "text.parquet", row_group_size=7)
    last, flags, code = ENDINGS[ending]
    command = [sys.executable, "-m", MAINS[framework], "--config", str(tmp_path / "settings.toml"), *flags]
    command += [
        "--dataset",
        str(tmp_path / "text.parquet"),
        "--run-dir",
        str(tmp_path / "run"),
        "--shuffle-window",
        "8",
    ]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as run:
        said = []
        for line in run.stdout:
            said.append(line)
            if line.startswith("Curves drawn to"):
                break
        ended = time.monotonic()
        said.append(run.stdout.read())
        assert run.wait(timeout=15) == code, said
    assert time.monotonic() - ended < 15 and last in "".join(said), said


def test_torch_sees_one_shape_of_training_and_one_of_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On MPS every new shape keeps a compiled graph."""
    torch = pytest.importorskip("torch")
    from torch_ref.model import Model

    settings(tmp_path, 50)
    shapes: set[tuple] = set()
    forward = Model.forward

    def watched(self, tokens, *rest, **more):
        shapes.add((torch.is_grad_enabled(), tuple(tokens.shape)))
        return forward(self, tokens, *rest, **more)

    monkeypatch.setattr(Model, "forward", watched)
    assert train("torch", tmp_path, "run", "--sample-interval", "0", "--micro-batch-size", "2") == 0
    assert shapes == {(True, (2, 16)), (False, (2, 16))}
