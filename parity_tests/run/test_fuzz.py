"""Whatever a settings file, a command line, a log or a checkpoint's own words may hold: it is taken, or refused in one
line with exit code 2. Nothing ends in a traceback, and no line of a log is lost."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parity_tests.support.fakes import small_options
from parity_tests.support.stage import Stage
from torch_ref.spec.config import ModelConfig
from torch_ref.spec.interface import UserError
from train import plot, runs
from train.command_line import parse
from train.run.options import Options
from train.run.runlog import METRICS, cut_logs, read_metrics
from train.shell import COMPLETE, shell

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "100"))
FAST = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
"""The same examples each time; with FUZZ_EXAMPLES=1500 in the environment so many of each, of damaged logs a fifth."""

NAMES = sorted({field.name for field in fields(Options)} | {field.name for field in fields(ModelConfig)})
WORDS = [
    "auto",
    "tiny",
    "small",
    "float32",
    "bf16",
    "off",
    "-1",
    "0",
    "1",
    "1e99",
    "nan",
    "data=2",
    "9" * 400,
    "",
    "ü",
    "-",
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.integers(-2, 9),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(WORDS),
)
JSON = st.recursive(
    SCALARS, lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=4), part, max_size=3)
)


@shell
def parsed(argv: Sequence[str]) -> int:
    with contextlib.suppress(SystemExit):  # --help
        parse(argv, "python -m train.flax_main")
    return 0


def refused_in_one_line(argv: Sequence[str]) -> None:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = parsed(argv)
    assert code in (0, 2)
    if code:
        assert said.getvalue().startswith("error: ") and said.getvalue().count("\n") == 1, said.getvalue()


def toml(value: object) -> str:
    """TOML of a JSON value; it has no null, so that is a mistake too."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(member)}" for key, member in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return str(value) if isinstance(value, float) else json.dumps(value)


@FAST
@given(st.dictionaries(st.sampled_from(NAMES) | st.text(min_size=1, max_size=6), JSON, max_size=3), st.booleans())
def test_any_settings_file(values: dict, of_the_model: bool) -> None:
    lines = [f"{json.dumps(name)} = {toml(value)}" for name, value in values.items()]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "settings.toml")
        file.write_text("\n".join(["[model]"] * of_the_model + lines), encoding="utf-8", errors="surrogatepass")
        refused_in_one_line(["--preset", "tiny", "--config", str(file)])


def damaged(content: bytes, place: float, cut: int, put: bytes) -> bytes:
    start = int(place * len(content))
    return content[:start] + put + content[start + cut :]


DAMAGE = st.tuples(
    st.floats(0, 1), st.integers(0, 40), st.binary(max_size=6) | st.sampled_from([b"\n", b'"', b"]", b"\0"])
)


@FAST
@given(st.lists(DAMAGE, min_size=1, max_size=3))
def test_a_damaged_settings_file(damages: list) -> None:
    content = small_options().to_toml().encode()
    for damage in damages:
        content = damaged(content, *damage)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "settings.toml")
        file.write_bytes(content)
        refused_in_one_line(["--config", str(file)])


@FAST
@given(
    st.lists(
        st.sampled_from([f"--{name.replace('_', '-')}" for name in NAMES] + ["--no-tensorboard", "--", "-h"])
        | st.sampled_from(WORDS)
        | st.text(max_size=6),
        max_size=5,
    )
)
def test_any_command_line(argv: list[str]) -> None:
    refused_in_one_line(argv)


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run."""
    stage = Stage(tmp_path_factory.mktemp("fuzz") / "run")
    assert stage.train() == COMPLETE
    return stage.run_dir


@settings(FAST, max_examples=EXAMPLES // 5)
@given(st.lists(DAMAGE, min_size=1, max_size=3), st.integers(0, 16))
def test_a_damaged_log(complete: Path, damages: list, step: int) -> None:
    content = (complete / METRICS).read_bytes()
    for damage in damages:
        content = damaged(content, *damage)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / METRICS).write_bytes(content)
        records = read_metrics(Path(folder))
        assert all(isinstance(record["step"], int) and isinstance(record["kind"], str) for record in records)
        for command in (runs.main, plot.main):
            said = io.StringIO()
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                assert command([folder]) in (0, 2), command
            assert "Traceback" not in said.getvalue()
        cut_logs(Path(folder), step)
        kept = [
            path.read_bytes() for path in (Path(folder) / METRICS, Path(folder) / "metrics.cut.jsonl") if path.exists()
        ]
        lines = [line for line in content.split(b"\n") if line]
        assert sorted(line for part in kept for line in part.split(b"\n") if line) == sorted(lines), "a line is lost"


KEYS = [
    ("step",), ("loss",), ("framework",), ("options",), ("automatic",), ("data",), ("progress",),
    ("options", "learning_rate"), ("options", "model"), ("options", "dataset"), ("options", "no such setting"),
    ("progress", "recent_losses"), ("progress", "owed"), ("progress", "best_loss"),
    ("progress", "tokens_seen"), ("progress", "skipped_in_a_row"), ("progress", "no such field"),
]  # fmt: skip


@FAST
@given(st.sampled_from(KEYS), JSON, st.booleans())
def test_a_checkpoint_that_says_something_else(
    complete: Path, keys: tuple[str, ...], value: object, gone: bool
) -> None:
    """As another version, or a hand, might have written it: the run goes on, or refuses it by its name."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        shutil.copytree(complete, run, ignore=shutil.ignore_patterns("step_final*", "step_12*", "best", "*_final*"))
        path = run / "checkpoints/step_10.npz"
        with np.load(path) as stored:
            arrays = dict(stored)
        meta = json.loads(str(arrays["meta"]))
        place = meta
        for key in keys[:-1]:
            place = place[key]
        if gone:
            place.pop(keys[-1], None)
        else:
            place[keys[-1]] = value
        np.savez(path, **arrays | {"meta": np.array(json.dumps(meta))})
        stage = Stage(run)
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                assert stage.train() == COMPLETE
            except UserError as error:
                assert str(path) in str(error) or str(error).startswith("--"), error
                assert "\n" not in str(error)
