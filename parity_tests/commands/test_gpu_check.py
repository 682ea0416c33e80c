"""The GPU check, as far as a machine without a GPU can run it."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from train.bench import gpu_check, gpu_parts
from train.bench.cases import Case
from train.bench.profile import from_perfetto, longest

ROOT = Path(__file__).parents[2]
CASE = Case("torch_ref", (), "tiny", "bfloat16", 24, 8, micro_batch=2, repeats=1, device="cpu")
TINY = (
    "--device cpu --preset tiny --seq-len 32 --rows 2 --repeats 1 --decode-batch 2 --compile off --budget 600".split()
)

# What an image for GPUs may lack: only data, the command line and TensorBoard need it.
BLOCKED = ("datasets", "tyro", "tensorboardX")
BLOCKER = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name in {BLOCKED}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocker())
"""


def test_every_part_is_planned():
    parts = gpu_check.parts(gpu_check.parse(["--moe", "pallas,blocks"]))
    names = [part.name for part in parts]
    assert names[0] == "limits" and {name.split()[0] for name in names} == set(gpu_check.PARTS)
    assert {"step flax moe pallas", "step flax moe blocks", "step transformers"} <= set(names)
    assert {"step torch_ref compile on", "step torch_ref compile off"} <= set(names)
    steps = [part.case for part in parts if part.name.startswith("step")]
    assert {(case.micro_batch, case.seq_len, case.dtype, case.preset) for case in steps} == {
        (8, 2048, "bfloat16", "smol-774m")
    }
    assert {part.case.decode_batch for part in parts} == {64}
    chosen = gpu_check.parts(gpu_check.parse(["--only", "step,decode", "--systems", "flax"]))
    assert [part.name for part in chosen] == ["step flax moe auto", "decode flax"]


@pytest.mark.parametrize(
    "wrong",
    [
        ["--only", "all"],
        ["--systems", "jax"],
        ["--seq-len", "5000"],
        ["--seq-len", "0"],
        ["--rows", "0"],
        ["--repeats", "-1"],
        ["--json", "absent/rows.json"],
    ],
)
def test_a_mistake_is_named(wrong, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "measure", lambda *_: pytest.fail("begun in spite of it"))
    assert gpu_check.main(wrong) == 2
    assert capsys.readouterr().err.startswith(f"error: {wrong[0]} {wrong[1]}: ")


def test_a_check_of_nothing_is_none(capsys):
    """Parity compares two sides: one of them alone has no such part."""
    assert gpu_check.main(["--only", "parity", "--systems", "flax"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: --only parity --systems flax: nothing to check; ") and not said.out


def test_a_file_that_cannot_be_written_is_one_line(tmp_path, capsys):
    assert gpu_check.main(["--json", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: could not be written: Is a directory\n"


def found(rows, what):
    return next(row for row in rows if row["what"] == what)


def test_a_wrong_path_is_found(monkeypatch):
    """One that forgets 1 % of the scale, one whose gradient alone is wrong, and one that fails; the others pass."""
    torch = pytest.importorskip("torch")
    from torch_ref import attention, moe

    right = attention.attend_sdpa

    def without_gradient_of_k(q, k, v, scale):
        return right(q, k.detach() + 0.9 * (k - k.detach()), v, scale)

    def fails(*_):
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(attention.ATTENTION_PATHS, "sdpa", lambda q, k, v, scale: right(q, k, v, 1.03 * scale))
    monkeypatch.setitem(attention.ATTENTION_PATHS, "masked", without_gradient_of_k)
    monkeypatch.setitem(moe.EXPERT_PATHS, "blocks", fails)
    rows = list(gpu_parts.checks(gpu_parts.TorchPaths(CASE), CASE))
    assert gpu_check.is_wrong(found(rows, "attention sdpa, float32"))
    masked = found(rows, "attention masked, bfloat16")
    assert gpu_check.is_wrong(masked) and masked["errors"][0] < masked["bound"] < masked["errors"][2]
    assert "no kernel image" in found(rows, "moe blocks, float32")["failed"]
    for what in ("attention plain, bfloat16", "moe grouped, float32", "moe grouped, bfloat16", "moe dense, bfloat16"):
        assert not gpu_check.is_wrong(found(rows, what)), found(rows, what)
    text = gpu_check.table([{"part": "checks", **row} for row in rows])
    assert text.count("**WRONG**") == sum("bound" in row and gpu_check.is_wrong(row) for row in rows) >= 3
    assert torch.get_default_dtype() == torch.float32


def test_flax_paths_are_checked_too():
    jax = pytest.importorskip("jax")
    pytest.importorskip("flax")
    from flax_model import attention, moe

    def one_choice_less(x, routing, *weights):
        return moe.experts_dense(x, routing._replace(weights=routing.weights.at[0, 0].set(0)), *weights)

    case = replace(CASE, system="flax")
    try:
        system = gpu_parts.FlaxPaths(case)
        system.paths = {
            "attention": {name: attention.ATTENTION_PATHS[name] for name in ("plain", "cudnn")},
            "moe": {"dense": moe.experts_dense, "blocks": one_choice_less},
        }
        rows = list(gpu_parts.checks(system, case))
    finally:
        jax.config.update("jax_default_matmul_precision", None)
    assert "cudnn" in found(rows, "attention cudnn, bfloat16")["skipped"]
    assert not gpu_check.is_wrong(found(rows, "attention cudnn, bfloat16"))
    assert not gpu_check.is_wrong(found(rows, "attention plain, bfloat16"))
    assert gpu_check.is_wrong(found(rows, "moe blocks, bfloat16"))


def test_a_wrong_gradient_of_whole_layers_is_found(monkeypatch):
    pytest.importorskip("flax")
    from flax_model import moe

    case = replace(CASE, system="flax", seq_len=16, loss_chunk=32)
    (right,) = gpu_parts.layer_gradients(case)
    assert not gpu_check.is_wrong(right), right

    def half(x, *arguments, remat):
        return moe.experts_dense(x, *arguments, remat) / 2

    monkeypatch.setitem(moe.EXPERT_PATHS, "pallas", half)
    (wrong,) = gpu_parts.layer_gradients(case)
    assert gpu_check.is_wrong(wrong), wrong


def test_rounding_to_bfloat16_is_torchs():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).standard_normal(999).astype(np.float32)
    np.testing.assert_array_equal(gpu_parts.as_rounded(x, "bfloat16"), torch.from_numpy(x).bfloat16().float().numpy())


def test_nothing_that_is_not_finite_passes():
    assert gpu_parts.distance(np.array([1.0, np.nan]), np.array([1.0, 2.0])) == np.inf
    assert gpu_check.is_wrong({"error": float("nan"), "bound": 1.0})


def test_the_last_expert_of_the_check_is_idle():
    chosen, (x, weights, *_) = gpu_parts.experts_operands(CASE)
    counts = np.bincount(chosen.ravel(), minlength=8)
    assert counts[-1] == 0 and counts[0] > 1.2 * counts[1:-1].mean() and chosen.shape == weights.shape == (len(x), 2)


def test_kernels_of_a_gpu_trace_are_summed_by_name():
    names = {1: "/device:GPU:0", 2: "/host:CPU"}
    events = [{"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}} for pid, name in names.items()]
    for pid, tid, name in ((1, 5, "Stream #13(Compute)"), (1, 6, "XLA Ops"), (2, 7, "XLA")):
        events.append({"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": name}})
    for pid, tid, name, dur in (
        (1, 5, "loop_fusion_3", 20),
        (1, 5, "loop_fusion_12", 30),
        (1, 5, "cutlass.4", 5),
        (1, 6, "loop_fusion_3", 20),
        (2, 7, "launch", 900),
    ):
        events.append({"ph": "X", "pid": pid, "tid": tid, "name": name, "dur": dur, "ts": 0})
    assert list(longest(from_perfetto(events))) == [
        ("all kernels", 0.055, 3),
        ("loop_fusion", 0.05, 2),
        ("cutlass", 0.005, 1),
    ]


def test_failures_limits_and_the_budget_leave_rows(monkeypatch):
    """One part that dies, one that takes too long, one that is not reached any more."""
    monkeypatch.setattr(gpu_check, "LONGEST_PART", 20)
    rows = []
    dies = gpu_check.Part("dies", "case", replace(CASE, system="no_such_system"))
    gpu_check.measure([dies], 30, rows.append)
    assert [row["part"] for row in rows] == ["dies"] and "no_such_system" in rows[0]["failed"]

    rows.clear()
    monkeypatch.setattr(gpu_check, "LONGEST_PART", 0.01)
    clock = iter((0, 0, 0, 1, 1))  # start, before the first part, around it, before the second
    monkeypatch.setattr(gpu_check, "time", SimpleNamespace(time=time.time, monotonic=lambda: next(clock)))
    gpu_check.measure([dies, dies], gpu_check.WORTH_STARTING, rows.append)
    assert [row["failed"] for row in rows] == ["stopped after 0 s", "not reached within 10 s"]
    assert all(map(gpu_check.is_wrong, rows))


def test_starts_without_what_gpu_images_lack(tmp_path):
    """Every module that a part's process imports, with those libraries blocked."""
    pytest.importorskip("torch")
    pytest.importorskip("flax")
    modules = {*gpu_check.IMPORTS["both"], "train.bench.gpu_parts", "flax_model.generate", "torch_ref.generate"}
    modules |= {"parity_tests.harness.ladder", "parity_tests.harness.training", "parity_tests.report"}
    assert "tyro is blocked" in run_blocked(tmp_path, "-c", "import tyro").stderr
    done = run_blocked(tmp_path, "-c", f"import {', '.join(sorted(modules))}")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_all_of_it_without_what_gpu_images_lack(tmp_path):
    pytest.importorskip("transformers")
    path = tmp_path / "rows.jsonl"
    done = run_blocked(tmp_path, "-m", "train.bench", "--gpu-check", *TINY, "--json", str(path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["part"].split()[0] for row in rows} == set(gpu_check.PARTS)
    steps = {row["system"]: row for row in rows if row["task"] == "step"}
    assert steps.keys() == set(gpu_check.SYSTEMS) and all(row["value"] > 0 for row in steps.values())
    assert done.stdout.rstrip().splitlines()[-1].startswith("| decode transformers | whole part |")


def run_blocked(folder, *arguments):
    (folder / "sitecustomize.py").write_text(BLOCKER)
    paths = os.pathsep.join((str(folder), str(ROOT)))
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
