"""Both entry points on a small corpus: the same numbers, resuming bit for bit, exit codes, one-line errors."""

from __future__ import annotations

import dataclasses
import gzip
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from parity_tests.support.fakes import MODEL, small_options
from torch_ref.spec.flops import flops_per_token
from torch_ref.spec.interface import StepResult
from torch_ref.spec.memory import step_bytes
from torch_ref.spec.storage import TensorReader
from train.plot import plot_runs
from train.run.launch import launch, settle
from train.run.options import Options
from train.run.runlog import read_metrics

MAINS = {"flax": "train.flax_main", "torch": "torch_ref.train"}
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A settings file of a run that takes seconds, on text that lies beside it."""
    monkeypatch.chdir(tmp_path)
    words = "the model reads a row of tokens and says which one comes next while experts share the work".split()
    random = np.random.default_rng(0)
    documents = [" ".join(random.choice(words, 60)) + "." for _ in range(60)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    options = small_options(
        dataset="text.jsonl",
        tokenizer="bpe",
        validation_fraction=0.1,
        learning_rate=0.01,
        seq_len=16,
        steps=6,
        extended_steps=2,
        checkpoint_interval=3,
        device="cpu",
    )
    (tmp_path / "own.txt").write_text(" ".join(words))
    (tmp_path / "own.csv").write_text("text\n" + "".join(f"{text[:200]}\n" for text in documents[::2]))
    file = tmp_path / "small.toml"
    file.write_text(options.to_toml())
    return file


@pytest.fixture(params=list(MAINS))
def framework(request: pytest.FixtureRequest) -> str:
    pytest.importorskip({"flax": "jax"}.get(request.param, request.param))
    return request.param


@pytest.fixture
def x64() -> Iterator[None]:
    """JAX's switch for float64 holds for the whole process: put it back."""
    jax = pytest.importorskip("jax")
    yield
    jax.config.update("jax_enable_x64", False)


def train(framework: str, *argv: str) -> int:
    return importlib.import_module(MAINS[framework]).main(list(argv))


def steps(run_dir: str) -> list[dict]:
    return [record for record in read_metrics(Path(run_dir)) if record["kind"] == "step"]


def numbers(run_dir: str) -> list[tuple]:
    """What must be equal bit for bit when a run is repeated."""
    names = ("step", "loss", "balance_loss", "grad_norm", "learning_rate", "expert_counts", "data_position")
    return [tuple(json.dumps(record[name]) for name in names) for record in steps(run_dir)]


def test_a_run_of_each_framework(
    settings: Path, framework: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.run.loop.plot_runs", plot_runs)  # here with its picture
    assert train(framework, "--config", str(settings)) == 0
    run_dir = Path("runs") / f"tiny-{framework}"  # the default folder
    suffix, weights = {"flax": ("", "safetensors"), "torch": (".pt", "pt")}[framework]
    names = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert names >= {f"step_3{suffix}", f"step_6{suffix}", f"step_final_8{suffix}"}
    for name in ("settings.toml", "tokenizer.json", "training.logs", "metrics.jsonl"):
        assert (run_dir / name).is_file(), name
    assert (run_dir / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert (run_dir / f"deepseek_final.{weights}").is_file()
    assert len(re.findall(r"^Step \d+ \| Loss: ", (run_dir / "training.logs").read_text(), re.M)) == 8
    assert steps(str(run_dir))[-1]["loss"] < steps(str(run_dir))[0]["loss"] - 0.2

    last = steps(str(run_dir))[-1]
    assert last["flops_per_second"] == pytest.approx(last["tokens_per_second"] * flops_per_token(MODEL, 16))
    assert "mfu" not in last and 1e8 < last["peak_memory_bytes"] < 1e11, "the process's, on a CPU"

    capsys.readouterr()
    assert train(framework, "--config", str(settings)) == 0
    assert "The run is complete: 8 steps" in capsys.readouterr().out


def test_both_mains_give_the_same_numbers(settings: Path, x64: None) -> None:
    torch = pytest.importorskip("torch")
    for framework in MAINS:
        also = ["--validation-dataset", "own=own.txt", "--dataset", "text.jsonl", "--dataset", "own.csv"]
        shared = ["--config", str(settings), "--dtype", "float64", "--run-dir", framework]
        assert train(framework, *shared, *also) == 0
    for ours, theirs in zip(steps("flax"), steps("torch"), strict=True):
        for name in ("loss", "balance_loss", "grad_norm", "learning_rate"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-9), (ours["step"], name)
        for name in ("expert_counts", "data_position", "tokens", "phase"):
            assert ours[name] == theirs[name], (ours["step"], name)
    validations = [[r for r in read_metrics(Path(name)) if r["kind"] == "validation"] for name in MAINS]
    for ours, theirs in zip(*validations, strict=True):
        assert ours["bits_per_byte"] == pytest.approx(theirs["bits_per_byte"], rel=1e-9)
    assert [r.get("dataset") for r in validations[0]] == [None, "own"] * 2
    samples = [[r["text"] for r in read_metrics(Path(name)) if r["kind"] == "sample"] for name in MAINS]
    assert len(samples[0]) == len(samples[1]) == 1

    flax_weights = TensorReader(Path("flax/deepseek_final.safetensors"))
    torch_weights = torch.load("torch/deepseek_final.pt", weights_only=True)
    assert set(flax_weights) == set(torch_weights)
    for name, tensor in torch_weights.items():
        np.testing.assert_allclose(flax_weights[name], tensor.numpy(), rtol=0, atol=1e-8, err_msg=name)


def test_both_mains_keep_to_documents(settings: Path, x64: None, capsys: pytest.CaptureFixture) -> None:
    """Alike, otherwise than without, and not unawares on resuming."""
    pytest.importorskip("torch")
    shared = ("--config", str(settings), "--dtype", "float64", "--sample-interval", "0")
    assert train("torch", *shared, "--run-dir", "open") == 0
    for framework in MAINS:
        assert train(framework, *shared, "--document-mask", "--run-dir", framework) == 0
    assert steps("torch")[-1]["loss"] != pytest.approx(steps("open")[-1]["loss"], rel=1e-6)
    for ours, theirs in zip(steps("flax"), steps("torch"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-10)
    validations = [[r["loss"] for r in read_metrics(Path(d)) if r["kind"] == "validation"] for d in MAINS]
    assert len(validations[0]) == 2 and validations[0] == pytest.approx(validations[1], rel=1e-10)
    capsys.readouterr()
    assert train("torch", *shared, "--steps", "9", "--allow-changed-settings", "--run-dir", "torch") == 0
    assert "changed since the checkpoint: --document-mask was True, now False" in capsys.readouterr().out


def test_both_mains_start_from_the_weights_of_a_run(settings: Path, x64: None) -> None:
    pytest.importorskip("torch")
    shared = ("--config", str(settings), "--dtype", "float64")
    assert train("torch", *shared, "--run-dir", "first") == 0
    for framework in MAINS:
        assert train(framework, *shared, "--init-from", "first", "--seed", "7", "--run-dir", framework) == 0
    assert steps("torch")[0]["loss"] < steps("first")[0]["loss"] - 0.2, "not random weights"
    assert steps("torch")[0]["step"] == 1 and steps("torch")[0]["learning_rate"] == steps("first")[0]["learning_rate"]
    for ours, theirs in zip(steps("flax"), steps("torch"), strict=True):
        for name in ("loss", "grad_norm", "learning_rate"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-9), (ours["step"], name)


def test_interrupted_and_resumed_is_bit_for_bit_the_same(
    settings: Path, framework: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(framework, "--config", str(settings), "--run-dir", "straight") == 0
    backend = importlib.import_module({"flax": "flax_model", "torch": "torch_ref"}[framework] + ".backend")
    owner = getattr(backend, f"{framework.capitalize()}Backend")
    begin_step = owner.begin_step

    def interrupted(self, inputs: np.ndarray, targets: np.ndarray) -> Callable[[], StepResult]:
        result = begin_step(self, inputs, targets)
        if self.steps_done in (2, 5):
            os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(owner, "begin_step", interrupted)
    command = ("--config", str(settings), "--run-dir", "stopped")
    assert [train(framework, *command) for _ in range(3)] == [130, 130, 0]
    assert numbers("stopped") == numbers("straight")
    losses = [[r["loss"] for r in read_metrics(Path(d)) if r["kind"] == "validation"] for d in ("stopped", "straight")]
    assert len(losses[0]) == 2 and losses[0] == losses[1]


def test_a_run_ahead_of_the_host_is_bit_for_bit_the_same(settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flax, which computes the same either way; on a GPU it is so always."""
    from flax_model.backend import FlaxBackend

    assert train("flax", "--config", str(settings), "--run-dir", "straight") == 0
    monkeypatch.setattr(FlaxBackend, "runs_ahead", True)
    assert train("flax", "--config", str(settings), "--run-dir", "ahead") == 0
    assert numbers("ahead") == numbers("straight")
    logged = [Path(run, "training.logs").read_text().splitlines() for run in ("straight", "ahead")]
    logged = [[line.split(" | Total Step Time")[0] for line in lines] for lines in logged]
    steps_of = [[line for line in lines if line.startswith("Step ")] for lines in logged]
    assert steps_of[0] == steps_of[1] and len(steps_of[0]) == 8


def test_a_profile_of_some_steps(settings: Path, framework: str, capsys: pytest.CaptureFixture) -> None:
    command = ("--config", str(settings), "--steps", "3", "--extended-steps", "0", "--sample-interval", "0")
    assert train(framework, *command, "--eval-interval", "0", "--profile-steps", "2-3", "--run-dir", "x") == 0
    told = re.findall(r"^Profile of steps 2-3 written to: (\S+) \(open it at", capsys.readouterr().out, re.M)
    assert len(told) == 1 and told[0].startswith("x/profile/steps_2-3/")
    with gzip.open(told[0]) as file:
        events = json.load(file)["traceEvents"]
    names = " ".join(str(event.get("name")) for event in events)
    assert {"flax": "dot", "torch": "aten::"}[framework] in names
    assert len(steps("x")) == 3


def test_a_run_in_short_times_is_bit_for_bit_the_same(settings: Path, framework: str, capsys) -> None:
    command = ("--config", str(settings), "--steps", "3", "--extended-steps", "0", "--sample-interval", "0")
    assert train(framework, *command, "--run-dir", "straight") == 0
    for step in (1, 2):
        assert train(framework, *command, "--run-dir", "short", "--max-minutes", "0.0001") == 0
        assert f"Stopped after step {step}: --max-minutes 0.0001 have passed" in capsys.readouterr().out
    assert train(framework, *command, "--run-dir", "short", "--checkpoint-minutes", "1e-6") == 0
    assert numbers("short") == numbers("straight") and len(numbers("short")) == 3


def test_a_stable_phase_is_extended_bit_for_bit(settings: Path, framework: str) -> None:
    command = ("--config", str(settings), "--lr-schedule", "wsd", "--decay-steps", "2", "--sample-interval", "0")
    assert train(framework, *command, "--steps", "8", "--run-dir", "long") == 0
    assert train(framework, *command, "--run-dir", "short") == 0
    assert train(framework, *command, "--steps", "8", "--run-dir", "short") == 2, "its rate has fallen"
    suffix = {"flax": "", "torch": ".pt"}[framework]
    branch = ("--resume-from", f"short/checkpoints/step_4{suffix}", "--run-dir", "branch")
    assert train(framework, *command, "--steps", "8", *branch) == 0
    assert numbers("branch") == numbers("long")[4:] and len(numbers("branch")) == 6


@pytest.mark.parametrize(
    ("framework", "number", "code"), [("flax", signal.SIGINT, 130), ("torch", signal.SIGTERM, 143)]
)
def test_a_process_ends_soon_after_a_signal(settings: Path, framework: str, number: int, code: int) -> None:
    pytest.importorskip({"flax": "jax"}.get(framework, framework))
    command = [sys.executable, "-m", MAINS[framework], "--config", str(settings), "--steps", "100000"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        for line in process.stdout:
            if line.startswith("Step 2 "):
                break
        process.send_signal(number)
        asked = time.monotonic()
        said, complaints = process.communicate(timeout=60)
        assert process.returncode == code, complaints
        assert time.monotonic() - asked < 30
    assert "Traceback" not in complaints
    last = steps(f"runs/tiny-{framework}")[-1]["step"]
    assert f"Stopped by {signal.Signals(number).name} after step {last}" in said
    assert list(Path(f"runs/tiny-{framework}/checkpoints").glob(f"step_{last}*"))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--preset", "huge"], "error: --preset huge: there are small, smol-774m,"),
        (["--stepz", "3"], "error: unknown option --stepz, did you mean --steps?"),
        (["--num-heads", "5"], "error: model: num_kv_heads = 3: must divide num_heads = 5; "),
        (["--preset", "tiny", "--dataset", "absent.txt"], "error: --dataset absent.txt: there is no file there "),
        (["--preset", "tiny", "--attention", "magic"], "error: --attention magic"),
        (["--preset", "tiny", "--run-dir", "taken"], "error: --run-dir taken: another process is training there"),
        (["--preset", "tiny", "--run-dir", "file.txt"], "error: --run-dir file.txt"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path,
    framework: str,
    argv: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").mkdir()
    Path("file.txt").write_text("in the way")
    with FileLock("taken/.lock"):
        assert train(framework, *argv) == 2
    error = capfd.readouterr().err
    assert error.startswith(said) and error.count("\n") == 1


def test_an_interrupt_before_the_first_step_exits_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def build(options: Options) -> tuple:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    assert launch(["--preset", "tiny"], "prog", "none", build, lambda run_dir, backend: run_dir) == 130
    assert capsys.readouterr().err == "Interrupted; what was not saved is lost.\n"
    with FileLock("runs/tiny-none/.lock", timeout=0):  # let go of
        pass


@pytest.mark.parametrize(("name", "module"), [("flax", "jax"), ("torch", "torch")])
def test_a_missing_framework_is_named(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    assert train(name, "--preset", "tiny") == 2
    assert f"is not installed: pip install -e '.[{name.replace('flax', 'jax')}]'" in capsys.readouterr().err


@pytest.mark.parametrize("framework", list(MAINS))
def test_a_main_needs_only_its_own_framework(settings: Path, framework: str) -> None:
    """Nor does it load the other where it is installed: that takes a second and 200 MB."""
    pytest.importorskip({"flax": "jax"}.get(framework, framework))
    others = {"flax": ["torch"], "torch": ["jax", "flax", "orbax", "optax"]}[framework]
    code = f"""
import sys
class Absent:
    asked = []
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {others}:
            Absent.asked.append(name)
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent)
from {MAINS[framework]} import main
code = main(["--config", {str(settings)!r}, "--steps", "1", "--extended-steps", "0", "--tensorboard"])
sys.exit(code or Absent.asked or 0)
"""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "The run is complete: 1 steps" in done.stdout


def test_a_gpu_takes_as_many_rows_as_fit() -> None:
    options = small_options(batch_size=12, micro_batch_size="auto", dtype="bfloat16", remat="auto", loss_chunk="auto")

    def rows(memory: int | None, **device) -> tuple:
        settled = settle(options, "bfloat16", memory, **device)
        return settled.rows_per_pass, settled.micro_batches, settled.remat, settled.tokens_per_chunk

    gpu = {"loss_chunk": 4096, "on_gpu": True}
    needed = {n: step_bytes(MODEL, "bfloat16", n, options.seq_len, 12 // n, "off", **gpu) for n in (1, 2, 3, 4, 6, 12)}
    assert sorted(needed, key=needed.get) == sorted(needed)
    assert rows(10**15) == (1, 12, "off", 512)
    assert rows(None, on_gpu=True) == (1, 12, "off", 4096)
    for micro, memory in needed.items():
        assert rows(memory, on_gpu=True) == (micro, 12 // micro, "off", 4096)
    assert rows(10**15, on_gpu=True, devices=4)[:2] == (3, 1)


def test_settle_fills_in_what_the_device_decides() -> None:
    auto = small_options(dtype="auto", remat="auto")
    assert (settle(auto, "bfloat16", None).dtype, settle(auto, "float32", None).remat) == ("bfloat16", "off")
    needed = {
        remat: step_bytes(MODEL, "float32", auto.rows_per_pass, auto.seq_len, auto.micro_batches, remat)
        for remat in ("off", "experts", "layers")
    }
    assert needed["off"] > needed["experts"] > needed["layers"]
    for remat, memory in needed.items():
        assert settle(auto, "float32", memory).remat == remat
    fixed = small_options(dtype="float64", remat="layers", loss_chunk=100)
    assert settle(fixed, "float32", 10**15) == dataclasses.replace(fixed, mesh="fsdp=1")
    assert settle(small_options(batch_size=8, mesh="auto"), "float32", None, devices=4).mesh_shape == (1, 4, 1)


@pytest.mark.parametrize("there", list(MAINS))
def test_from_a_laptop_to_a_gpu_as_the_readme_says(settings: Path, there: str, monkeypatch, capsys) -> None:
    """--resume-from brings model sizes and settings along, from either framework; a dtype that `auto` chose may differ
    on the other device, and is told."""
    for package in ("torch", "flax"):
        pytest.importorskip(package)
    here = {"torch": "flax", "flax": "torch"}[there]
    text = settings.read_text().replace('dtype = "float32"', 'dtype = "auto"')
    settings.write_text(text)
    assert 'dtype = "auto"' in text
    assert train(there, "--config", str(settings), "--run-dir", "laptop", "--steps", "4", "--extended-steps", "4") == 0
    shutil.rmtree("laptop/checkpoints/" + "step_final_8" + {"torch": ".pt", "flax": ""}[there], ignore_errors=True)
    for file in Path("laptop/checkpoints").glob("step_final_8*"):
        file.unlink()
    package = {"torch": "torch_ref", "flax": "flax_model"}[here]
    monkeypatch.setattr(f"{package}.device.default_dtype", lambda device: "bfloat16")
    capsys.readouterr()
    assert train(here, "--resume-from", "laptop", "--run-dir", "gpu", "--steps", "4", "--extended-steps", "4") == 0
    said = capsys.readouterr().out
    assert "Warning: changed since the checkpoint: --dtype auto was float32, now bfloat16" in said
    assert [record["step"] for record in steps("gpu")] == [7, 8]
    assert 'dtype = "auto"' in Path("gpu/settings.toml").read_text()
