"""A run that changes frameworks twice is the run that never did: 60 steps in torch, 60 in Flax, 60 in torch again,
handed over through files, give the losses of 180 steps of either."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from parity_tests.support.backends import OPTIMIZER, batch, make_backend
from torch_ref.spec.config import ComputeConfig
from torch_ref.spec.interface import TrainingState
from train.convert import convert
from train.state.source import load_checkpoint

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(module) is None for module in ("torch", "flax")), reason="needs torch and flax"
)

LEG = 60
TOLERANCE = {"float64": 1e-9, "float32": 1e-3}
"""Largest relative difference of a step's loss: the bounds of a 200-step run in either precision."""

# Rates at which this model does not amplify rounding: two runs of torch that start 1 ulp apart stay within 2e-7.
SCHEDULED = dataclasses.replace(OPTIMIZER, schedule=lambda step: 1e-3 * (1 + 0.5 * math.cos(step / 20)))


def losses(backend, first: int, last: int) -> list[float]:
    """Loss of each step from `first` to `last`; the batch is a function of the step."""
    return [backend.step(*batch(number)).loss for number in range(first, last)]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_torch_flax_torch_equals_an_unbroken_run(tmp_path, dtype):
    compute = ComputeConfig(dtype=dtype, moe="dense")
    torch, flax, again = (
        make_backend(framework, compute=compute, optimizer=SCHEDULED) for framework in ("torch", "flax", "torch")
    )
    torch.init(seed=0)
    flax.init(seed=0)
    unbroken = {"torch": losses(torch, 0, LEG), "flax": losses(flax, 0, 3 * LEG)}
    relay = unbroken["torch"].copy()
    torch.save(tmp_path / "first/checkpoints", f"step_{LEG}", {"cursor": LEG})
    torch.wait()
    unbroken["torch"] += losses(torch, LEG, 3 * LEG)

    convert(tmp_path / "first", tmp_path / "second", "flax")
    assert load_checkpoint(flax, tmp_path / "second") == {"cursor": LEG}
    relay += losses(flax, LEG, 2 * LEG)
    flax.save(tmp_path / "second/checkpoints", f"step_{2 * LEG}", {"cursor": 2 * LEG})
    flax.wait()
    assert load_checkpoint(again, tmp_path / "second") == {"cursor": 2 * LEG}  # without converting
    relay += losses(again, 2 * LEG, 3 * LEG)

    for framework, expected in unbroken.items():
        error = np.abs(np.array(relay) / expected - 1).max()
        assert error <= TOLERANCE[dtype], f"against {framework}: {error}"
    # The bound means something: a state that loses its moments on the way leaves the curve at once.
    again.load_state(TrainingState(again.model_config, flax.state().weights))
    broken = np.array(losses(again, 2 * LEG, 2 * LEG + 10))
    assert np.abs(broken / relay[2 * LEG : 2 * LEG + 10] - 1).max() > TOLERANCE[dtype]


SETTINGS = """
tokenizer = "bpe"
dtype = "float64"
device = "cpu"
moe = "dense"
steps = 9
extended_steps = 3
warmup_steps = 2
batch_size = 2
seq_len = 32
checkpoint_interval = 4
eval_interval = 2
patience = 5
sample_interval = 0
tensorboard = false
validation_rows = 4
[model]
vocab_size = 300
hidden_size = 32
num_layers = 2
num_heads = 4
num_kv_heads = 2
kv_lora_rank = 8
qk_nope_head_dim = 8
qk_rope_head_dim = 4
v_head_dim = 12
intermediate_size = 48
moe_intermediate_size = 40
n_routed_experts = 4
max_position = 32
"""


def run_module(*arguments: object) -> None:
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def records(run: Path) -> dict[tuple, dict]:
    """What a run logged, by kind and step, without what is the machine's: times, speeds and memory."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().split("\n") if line]
    measured = {
        "tokens_per_second",
        "flops_per_second",
        "mfu",
        "step_seconds",
        "data_wait_seconds",
        "peak_memory_bytes",
    }
    found = {}
    for line in lines:
        kind = "validation" if "perplexity" in line else "step" if "grad_norm" in line else None
        if kind:
            found[kind, line["step"]] = {name: value for name, value in line.items() if name not in measured}
    return found


def test_the_mains_take_each_others_runs(tmp_path):
    """Steps 1-4 in torch, 5-8 in Flax from a converted run folder, 9-12 in torch straight from the Flax run: data
    position, learning rate, loads, losses and early stopping as in 12 steps of torch."""
    words = ("river", "stone", "light", "winter", "garden", "letter", "bridge", "music", "silver", "harbor")
    text = "\n".join(" ".join(np.random.RandomState(number).choice(words, 50)) for number in range(200))
    (tmp_path / "text.txt").write_text(text)
    settings = tmp_path / "settings.toml"
    settings.write_text(f"dataset = {json.dumps(str(tmp_path / 'text.txt'))}\n{SETTINGS}")
    whole, flax, relay = (tmp_path / name for name in ("whole", "flax", "relay"))

    run_module("torch_ref.train", "--config", settings, "--run-dir", whole)
    run_module("train.convert", whole, flax, "--to", "flax", "--step", 4)
    run_module("train.flax_main", "--resume-from", flax, "--run-dir", flax, "--device", "cpu")
    checkpoint = flax / "checkpoints/step_8"
    run_module("torch_ref.train", "--config", settings, "--run-dir", relay, "--resume-from", checkpoint)

    expected = records(whole)
    for run, first in ((flax, 5), (relay, 9)):
        found = {key: value for key, value in records(run).items() if key[1] >= first}
        assert found.keys() == {key for key in expected if key[1] >= first}
        for key, value in found.items():
            assert value.keys() == expected[key].keys()
            for name, number in value.items():
                if isinstance(number, float) and name != "balance_loss":
                    assert number == pytest.approx(expected[key][name], rel=1e-9), (run.name, key, name)
                elif name != "balance_loss":
                    assert number == expected[key][name], (run.name, key, name)
