"""Conversion between forms: bit for bit, through files, with everything a run needs to go on; and clear refusals."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from parity_tests.support.backends import CONFIG, FRAMEWORKS, arrays, assert_same, make_backend
from parity_tests.support.states import META, random_state
from torch_ref.spec.config import ComputeConfig, ModelConfig
from torch_ref.spec.huggingface import SIDECAR
from torch_ref.spec.interface import TrainingState, UserError
from torch_ref.spec.parameters import initial_values, parameter_table
from train import command_line
from train.convert import convert, main
from train.run.options import Options
from train.state.neutral import RUN, read_state, write_state
from train.state.source import Source, config_of, load_checkpoint, locate, open_state, read_start

BOTH = pytest.mark.skipif(
    any(importlib.util.find_spec(module) is None for module in ("torch", "flax")), reason="needs torch and flax"
)
TOKENIZER = {"model": {"type": "BPE", "vocab": {"<|endoftext|>": 0, "a": 1}, "merges": []}, "added_tokens": [
    {"id": 0, "content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
     "special": True}
]}  # fmt: skip


def backend_for(framework: str, dtype: str = "float32", config: ModelConfig = CONFIG):
    return make_backend(framework, config, ComputeConfig(dtype=dtype, moe="dense"))


def make_run(folder: Path, framework: str, dtype: str = "float32") -> None:
    """A run folder with checkpoints of steps 5 and 7, and what a run keeps beside them."""
    backend = backend_for(framework, dtype)
    for step, name in ((5, "step_5"), (7, "step_final_7")):
        state = random_state(step, dtype)
        backend.load_state(state)
        backend.save(folder / "checkpoints", name, state.meta)
        backend.wait()
    backend.close()
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "settings.toml").write_text(Options(model=CONFIG, seq_len=16, preset="tiny").to_toml())
    (folder / "data.json").write_text('{"dataset": "python-docs"}')
    for name in ("tokenizer_config.json", "python-docs.jsonl", "validation.npz", "metrics.jsonl", "training.logs"):
        (folder / name).write_text("{}")
    (folder / "plot.png").write_text("not taken along")


# Conversion of runs


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("first", ["torch", "flax"])
def test_a_run_goes_round_through_every_form_bitwise(tmp_path, first, dtype):
    """run -> the other framework's run -> neutral -> run of the first kind: arrays, counters, what the loop stored and
    the run's own files are all the same; and the weights equal those that went out by way of `transformers`."""
    second = {"torch": "flax", "flax": "torch"}[first]
    make_run(tmp_path / "a", first, dtype)
    expected = random_state(7, dtype)
    path = tmp_path / "a"
    for name, form in (("b", second), ("c", "neutral"), ("d", first)):
        assert main([str(path), str(tmp_path / name), "--to", form]) == 0
        path = tmp_path / name
        found = locate(path)
        state = open_state(found)
        assert_same(arrays(state), arrays(expected))
        assert (state.model_config, state.meta) == (CONFIG, expected.meta)
        own = sorted(item.name for item in found.run.iterdir() if item.is_file())
        assert own == [
            "data.json",
            "metrics.jsonl",
            "python-docs.jsonl",
            "settings.toml",
            "tokenizer.json",
            "tokenizer_config.json",
            "training.logs",
            "validation.npz",
        ]
    backend = backend_for(first, dtype)
    assert backend.restore(locate(tmp_path / "d").path) == expected.meta
    assert_same(arrays(backend.state()), arrays(expected))
    convert(tmp_path / "d", tmp_path / "exported", "transformers")
    weights = open_state(locate(tmp_path / "exported")).weights
    for row in parameter_table(CONFIG):
        np.testing.assert_array_equal(weights[row.name], expected.weights[row.name], strict=True)


@BOTH
def test_exports_from_both_frameworks_are_byte_identical(tmp_path):
    make_run(tmp_path / "torch", "torch")
    convert(tmp_path / "torch", tmp_path / "flax", "flax")
    for name in ("torch", "flax"):
        convert(tmp_path / name, tmp_path / f"{name}-out", "transformers", dtype="bfloat16")
    names = sorted(path.name for path in (tmp_path / "torch-out").iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} < set(names)
    for name in names:
        one, other = (tmp_path / f"{framework}-out" / name for framework in ("torch", "flax"))
        assert one.read_bytes() == other.read_bytes(), name
    config = json.loads((tmp_path / "torch-out/config.json").read_text())
    assert config["eos_token_id"] == config["bos_token_id"] == 0


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_which_checkpoint_is_taken(tmp_path, framework):
    run = tmp_path / "run"
    make_run(run, framework)
    assert locate(run).path.stem == "step_final_7"
    assert locate(run / "checkpoints", step=5).path.stem == "step_5"
    assert convert(run, tmp_path / "state", "neutral", step=5).path.parent == run / "checkpoints"
    assert_same(arrays(read_state(tmp_path / "state")), arrays(random_state(5)))
    suffix = ".pt" if framework == "torch" else ""
    assert locate(run / f"checkpoints/step_5{suffix}").run == run.absolute()
    with pytest.raises(UserError, match="--step 6: there is no such checkpoint"):
        locate(run, step=6)
    with pytest.raises(UserError, match="--step 5: .* not a run folder"):
        locate(tmp_path / "state", step=5)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_weights_alone_become_a_weights_file(tmp_path, framework):
    pytest.importorskip("torch" if framework == "torch" else "jax")
    weights = {row.name: value for row, value in initial_values(CONFIG, 1)}
    write_state(tmp_path / "state", TrainingState(CONFIG, weights))
    convert(tmp_path / "state", tmp_path / "out", framework)
    state = read_start(tmp_path / "out", CONFIG)
    assert config_of(tmp_path / "out") == CONFIG and state.first_moment is None
    assert all(np.array_equal(state.weights[name], value) for name, value in weights.items())
    (file,) = [path for path in (tmp_path / "out").iterdir() if path.stem == "deepseek_final"]
    assert file.suffix == {"torch": ".pt", "flax": ".safetensors"}[framework]
    backend = make_backend(framework)
    backend.load_state(read_start(file, CONFIG))
    assert backend.steps_done == 0


@pytest.mark.parametrize("form", ["neutral", "flax", "torch", "transformers"])
def test_weights_of_float64_can_be_rounded_on_the_way(tmp_path, form):
    if form == "torch":
        pytest.importorskip("torch")
    expected = random_state(7, "float64").weights
    write_state(tmp_path / "weights", TrainingState(CONFIG, expected))
    assert main([str(tmp_path / "weights"), str(tmp_path / form), "--to", form, "--dtype", "float32"]) == 0
    weights = open_state(locate(tmp_path / form)).weights
    for name, value in expected.items():
        np.testing.assert_array_equal(weights[name], value.astype(np.float32), strict=True)


@pytest.mark.parametrize("form", ["neutral", "flax", "torch"])
@pytest.mark.parametrize(("stored", "asked"), [("float64", "float32"), ("float32", "float64")])
def test_a_whole_state_keeps_the_precision_that_its_settings_name(tmp_path, capsys, form, stored, asked):
    write_state(tmp_path / "state", random_state(7, stored))
    assert main([str(tmp_path / "state"), str(tmp_path / "out"), "--to", form, "--dtype", asked]) == 2
    said = capsys.readouterr().err
    assert f"error: --dtype {asked}: a training state goes on in the {stored} it has; give no --dtype" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_command_that_goes_on_leaves_devices_to_auto(tmp_path, capsys, monkeypatch, framework):
    """The run may go on elsewhere: what `auto` chose where it was is in its settings.toml, and must not come along.
    Meanwhile a GPU is left to who trains on it."""
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"})
    source, target = tmp_path / "state", tmp_path / "a run"
    chosen = Options(model=CONFIG, seq_len=16, preset="tiny", mesh="fsdp=4", dtype="float32", remat="layers",
                     micro_batch_size=2, loss_chunk=64, batch_size=8, steps=70)  # fmt: skip
    automatic = ["mesh", "dtype", "remat", "micro_batch_size", "loss_chunk"]
    meta = META | {"step": 7, "options": chosen.to_dict(), "automatic": automatic}
    (tmp_path / "settings.toml").write_text(chosen.to_toml())
    write_state(source, dataclasses.replace(random_state(7), meta=meta), tmp_path)
    assert main([str(source), str(target), "--to", framework]) == 0
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    command = shlex.split(capsys.readouterr().out.splitlines()[-1].partition("python -m ")[2])
    assert command[0] == {"flax": "train.flax_main", "torch": "torch_ref.train"}[framework]
    options = command_line.parse(command[1:], "train")
    assert {getattr(options, name) for name in automatic} == {"auto"}
    assert (options.run_dir, options.steps, options.model) == (target, 70, CONFIG)


# What the training loop calls


@BOTH
@pytest.mark.parametrize(("first", "second"), [("torch", "flax"), ("flax", "torch"), ("torch", "torch")])
def test_a_backend_goes_on_from_a_run_of_either_framework(tmp_path, monkeypatch, first, second):
    """Where torch reads a run of Flax, JAX leaves it the GPU's memory."""
    make_run(tmp_path / "run", first)
    backend = make_backend(second)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    assert load_checkpoint(backend, tmp_path / "run") == META | {"step": 7}
    assert backend.steps_done == 7
    assert_same(arrays(backend.state()), arrays(random_state(7)))
    if first == "flax":
        assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_start_takes_weights_and_balance_bias_only(tmp_path, framework):
    make_run(tmp_path / "run", framework)
    config = dataclasses.replace(CONFIG, balance_bias_rate=0.5, balance_loss_coef=0.0)
    backend = backend_for(framework, config=config)
    backend.load_state(read_start(tmp_path / "run", config))
    started = arrays(backend.state())
    assert started["step"] == started["updates"] == 0
    for name, value in arrays(random_state(7)).items():
        if name.startswith("weights "):
            np.testing.assert_array_equal(started[name], value)
        elif name.startswith(("first ", "second ")):
            assert not started[name].any()


def test_conflicts_are_named(tmp_path):
    weights = {row.name: value for row, value in initial_values(CONFIG, 1)}
    write_state(tmp_path / "state", TrainingState(CONFIG, weights))
    with pytest.raises(UserError, match="num_layers = 2, this run has 3"):
        read_start(tmp_path / "state", dataclasses.replace(CONFIG, num_layers=3))
    pytest.importorskip("torch")
    write_state(tmp_path / "of a run", TrainingState(CONFIG, weights, meta=META))
    for folder in ("state", "of a run"):
        with pytest.raises(UserError, match="holds weights, not a training state to resume; use --init-from"):
            load_checkpoint(make_backend("torch"), tmp_path / folder)


def test_init_from_brings_the_model_sizes(tmp_path):
    weights = {row.name: value for row, value in initial_values(CONFIG, 1)}
    write_state(tmp_path / "state", TrainingState(CONFIG, weights))
    flags = ["--preset", "tiny", "--seq-len", "16", "--init-from", str(tmp_path / "state")]
    assert command_line.parse(flags, "train").model == CONFIG
    options = command_line.parse([*flags, "--balance-bias-rate", "0", "--kv-lora-rank", "9"], "train")
    assert options.model == dataclasses.replace(CONFIG, balance_bias_rate=0.0, kv_lora_rank=9)
    with pytest.raises(UserError, match="kv_lora_rank = 8, this run has 9; use --kv-lora-rank 8"):
        read_start(options.init_from, options.model)
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        command_line.parse(["--init-from", "nowhere"], "train")


def test_init_from_brings_the_tokenizer_wherever_it_lies(tmp_path):
    """A token is a row of the embedding: weights with another tokenizer mean other text."""
    pytest.importorskip("torch")
    run, state, weights = (tmp_path / name for name in ("run", "state", "run/weights"))
    make_run(run, "torch")
    convert(run, state, "neutral")
    write_state(tmp_path / "weights alone", TrainingState(CONFIG, random_state(7).weights), run)
    convert(tmp_path / "weights alone", weights, "torch")  # a folder with a tokenizer of its own, in that of a run
    (run / "deepseek_final.pt").write_bytes((weights / "deepseek_final.pt").read_bytes())
    places = {
        run: run,
        run / "deepseek_final.pt": run,
        run / "checkpoints/step_5.pt": run,
        state: state / RUN,
        weights / "deepseek_final.pt": weights,
    }
    for start, expected in places.items():
        options = command_line.parse(["--preset", "tiny", "--seq-len", "16", "--init-from", str(start)], "train")
        assert options.tokenizer == str(expected), start


# The command


REFUSALS = {
    "nowhere": "no such file or folder",
    "empty": "nothing to read there; give a run folder",
    "text": "cannot be read; give",
    "target in use": "exists already; name a new folder",
    "target below a file": "state.json/out: cannot be made (",
    "target where nothing can be": "/proc/out: cannot be made (",
    "half precision": "--dtype bfloat16",
    "pickle": "not a whole checkpoint (cut short, or not a file of torch tensors)",
}


@pytest.mark.parametrize("fault", REFUSALS)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, capsys, fault):
    weights = {row.name: value for row, value in initial_values(CONFIG, 1)}
    source, target, extra = tmp_path / "state", tmp_path / "out", []
    write_state(source, TrainingState(CONFIG, weights))
    form = "transformers"
    if fault == "nowhere":
        source = tmp_path / "nothing"
    elif fault == "empty":
        source = tmp_path / "empty"
        source.mkdir()
    elif fault == "text":
        source = source / "state.json"
    elif fault == "target in use":
        target.mkdir()
        (target / "mine").write_text("x")
    elif fault == "target below a file":
        target = source / "state.json" / "out"
    elif fault == "target where nothing can be":
        target = Path("/proc/out")
    elif fault == "half precision":
        form, extra = "neutral", ["--dtype", "bfloat16"]
    elif fault == "pickle":
        pytest.importorskip("torch")
        source = tmp_path / "step_3.pt"
        source.write_text("hello")
    before = sorted(tmp_path.rglob("*"))
    assert main([str(source), str(target), "--to", form, *extra]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and REFUSALS[fault] in said
    assert sorted(tmp_path.rglob("*")) == before


@BOTH
@pytest.mark.parametrize(
    ("hidden", "form", "works"),
    [("torch", "flax", True), ("jax", "torch", True), ("jax torch", "transformers", True), ("torch", "torch", False)],
)
def test_a_machine_without_a_framework(tmp_path, hidden, form, works):
    """The neutral form becomes a run of the one framework that is there, or a `transformers` folder with neither."""
    make_run(tmp_path / "run", "torch")
    convert(tmp_path / "run", tmp_path / "state", "neutral")
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in hidden.split())
    code = f"import sys; {blocked}from train.convert import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(tmp_path / "state"), str(tmp_path / "out"), "--to", form]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    if works:
        assert done.returncode == 0, done.stderr
        weights = open_state(locate(tmp_path / "out")).weights
        np.testing.assert_array_equal(weights["norm.weight"], random_state(7).weights["norm.weight"])
    else:
        assert done.returncode == 2
        assert done.stderr.strip().endswith("--to torch: torch is not installed; --to neutral needs neither framework")


@pytest.mark.parametrize(
    ("kind", "module", "name"), [("torch", "torch", "torch"), ("flax", "flax_model.checkpoint", "JAX")]
)
def test_a_form_whose_framework_is_absent_is_refused_by_name(tmp_path, monkeypatch, kind, module, name):
    monkeypatch.setitem(sys.modules, module, None)
    said = f"step_1: needs {name} to read; convert it to neutral form where {name} is installed"
    with pytest.raises(UserError, match=said):
        open_state(Source(kind, tmp_path / "step_1", None))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (None, f"w.safetensors: settings.toml or {SIDECAR} must lie beside it, for the model's sizes"),
        ("[model", "settings.toml: cannot be read as settings"),
        ("steps = 3", "settings.toml: cannot be read as settings"),
        ("[model]\nlayers = 3", "settings.toml: cannot be read as settings"),
    ],
)
def test_weights_without_their_models_sizes_are_refused_by_name(tmp_path, settings, said):
    if settings is not None:
        (tmp_path / "settings.toml").write_text(settings)
    with pytest.raises(UserError, match=said):
        open_state(Source("weights", tmp_path / "w.safetensors", None))


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "parameters", "int32"])
def test_weights_that_others_saved_with_torch_are_read_as_float32(tmp_path, stored):
    torch = pytest.importorskip("torch")
    change = torch.nn.Parameter if stored == "parameters" else lambda tensor: tensor.to(getattr(torch, stored))
    tensors = {row.name: change(torch.from_numpy(value)) for row, value in initial_values(CONFIG, 1)}
    torch.save(tensors, tmp_path / "weights.pt")
    (tmp_path / SIDECAR).write_text(json.dumps({"model": CONFIG.to_dict()}))
    if stored == "int32":
        with pytest.raises(UserError, match="weights.pt: embed_tokens.weight is stored as int32, not as floats"):
            convert(tmp_path / "weights.pt", tmp_path / "out", "neutral")
        return
    convert(tmp_path / "weights.pt", tmp_path / "out", "neutral")
    for name, value in open_state(locate(tmp_path / "out")).weights.items():
        np.testing.assert_array_equal(value, tensors[name].detach().float().numpy(), strict=True)
