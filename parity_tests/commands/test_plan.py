"""`python -m train.plan`: its arithmetic against sums by hand, its memory against a measured step, its mistakes."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from torch_ref.spec.config import PRESETS
from torch_ref.spec.memory import step_parts
from torch_ref.spec.parameters import count_parameters
from train import command_line
from train.bench.cases import Case, to_json
from train.plan.__main__ import main
from train.plan.cards import CARDS
from train.plan.communication import Layout, collectives, exchange, gathering, layouts
from train.plan.estimate import Gpus, Plan, make_plan

REPOSITORY = Path(__file__).parents[2]
FULL = count_parameters(PRESETS["smol-774m"])


def plan(*flags: str, gpus: str = "1x1x1", device: str = "h100", framework: str = "flax", mfu: float = 0.4) -> Plan:
    options = command_line.parse(flags, "test")
    return make_plan(options, CARDS[device], Gpus.parse(gpus), framework, mfu, price=2.0)


def test_speed_time_and_disk_follow_from_the_flops() -> None:
    made = plan("--steps", "1000", "--extended-steps", "0")
    flops = 6 * 296_257_968 + 6 * 30 * 9 * (104 + 64) * 2049 / 2
    assert made.flops_per_token == pytest.approx(flops)
    assert made.tokens_per_second[0] == made.tokens_per_second[1] == pytest.approx(0.4 * 989.4e12 / flops)
    assert made.hours[0] == pytest.approx(1000 * 16384 * flops / (0.4 * 989.4e12) / 3600)
    assert plan(mfu=0.2).tokens_per_second[0] == pytest.approx(made.tokens_per_second[0] / 2)
    assert plan("--dtype", "float32").compute_seconds == pytest.approx(made.compute_seconds * 989.4 / 494.7)
    in_torch = plan("--dtype", "float32", framework="torch").compute_seconds
    assert in_torch == pytest.approx(made.compute_seconds * 989.4 / 67)  # full float32, where JAX takes TF32


def test_what_is_automatic_is_settled_for_the_card() -> None:
    large, small = plan().options, plan(device="l4").options
    assert (large.dtype, large.rows_per_pass, large.remat, large.tokens_per_chunk) == ("bfloat16", 8, "off", 4096)
    assert small.rows_per_pass < 8  # three quarters of 24 GB do not hold as much
    assert plan("--remat", "layers").options.remat == "layers"
    assert plan("--batch-size", "64", gpus="1x1x8").options.mesh_shape == (1, 8, 1)


def test_each_device_holds_its_shard() -> None:
    one, eight = plan("--micro-batch-size", "1"), plan("--batch-size", "8", gpus="1x1x8")
    assert one.memory["parameters"] == 4 * FULL and one.memory["optimizer moments"] == 8 * FULL
    assert eight.memory["parameters"] == 4 * (FULL // 8)
    copies = plan("--batch-size", "8", "--mesh", "data=8", gpus="1x1x8")
    assert copies.memory["parameters"] == 4 * FULL
    experts = 3 * 576 * 1536 * 8 * 30
    apart = plan("--batch-size", "8", "--mesh", "expert=8", gpus="1x1x8")
    assert apart.memory["parameters"] == 4 * (FULL - experts * 7 // 8)
    # Room for the rows of all devices, if they chose this one's expert: four times those of its own tokens.
    kept = "activations kept for the backward pass"
    assert apart.memory[kept] - copies.memory[kept] == 3 * 2 * 2048 * 30 * 2 * 2 * 1536


def test_memory_grows_with_what_it_depends_on() -> None:
    def total(rows=1, seq=1024, batches=1, remat="off", **more) -> int:
        return sum(step_parts(PRESETS["small"], "float32", rows, seq, batches, remat, **more).values())

    for framework in ("flax", "torch"):
        for on_gpu in (False, True):
            kind = {"framework": framework, "on_gpu": on_gpu}
            assert total(2, **kind) > total(1, **kind) and total(seq=2048, **kind) > total(seq=1024, **kind)
            assert total(4, **kind) > total(4, remat="experts", **kind) > total(4, remat="layers", **kind)
            assert total(loss_chunk=1024, **kind) >= total(loss_chunk=512, **kind)
    dense = step_parts(replace(PRESETS["small"], first_k_dense=6), "float32", 1, 512, 1, "off")
    assert dense["the process itself"] == 700_000_000  # the experts are most of what is compiled
    # A second set of gradients, and of the embedding's once more: the sum before and after one is added.
    small = PRESETS["small"]
    assert total(batches=2) - total() == 4 * (count_parameters(small) + small.vocab_size * small.hidden_size)


def test_axes_lie_on_hosts_as_the_mesh_is_numbered() -> None:
    places = layouts((2, 8, 2), gpus_per_host=8)
    # Experts in pairs, four pairs of a host share shards with those of the next, and copies are on other hosts.
    assert places == {"expert": Layout(2, 1), "fsdp": Layout(8, 2), "data": Layout(2, 2)}
    h100 = CARDS["h100"]
    assert gathering(8e9, Layout(8, 1), h100) == pytest.approx((7e9, 7e9 / 450e9))
    # Half of it comes from the other host, over the network of eight cards; or of one.
    assert gathering(8e9, Layout(16, 2), h100) == pytest.approx((7.5e9, max(7.5e9 / 450e9, 4e9 / 8 / 50e9)))
    assert gathering(8e9, Layout(2, 2), h100) == pytest.approx((4e9, 4e9 / 50e9))
    assert exchange(8e9, Layout(8, 1), h100) == pytest.approx((7e9, 7e9 / 450e9))


def test_devices_say_what_their_mesh_needs() -> None:
    def said(mesh: str) -> dict:
        made = plan("--mesh", mesh, "--batch-size", "8", gpus="1x1x8")
        return {(one.name, one.axis): one.bytes for one in collectives(made.options, made.card, 8)[::-1]}

    small = (61 * 576 + 30 * 72) + 30 * 8 * 576  # norms and routers, whole everywhere
    assert not collectives(plan().options, CARDS["h100"], 8)
    assert said("data=8") == {("all-reduce", "data"): pytest.approx(2 * 4 * FULL * 7 / 8)}
    fsdp = said("fsdp=8")
    assert fsdp["reduce-scatter", "fsdp"] == pytest.approx(4 * (FULL - small) * 7 / 8)
    embedding = 49152 * 576
    assert fsdp["all-gather", "fsdp"] == pytest.approx(2 * 2 * (FULL - small - embedding) * 7 / 8)  # bfloat16, twice
    expert = said("expert=8")
    assert expert["all-to-all", "expert"] == pytest.approx(6 * 30 * 2048 * 2 * 576 * 2 * 7 / 8)


def test_the_command_prints_it(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    flags = ["--preset", "small", "--gpus", "1x2x8", "--device", "a100", "--batch_size", "64", "--price", "2"]
    assert main([*flags, "--mesh", "data=2,fsdp=8", "--keep-checkpoints", "1"]) == 0
    text = capsys.readouterr().out
    assert "49,366,176 parameters, 30,786,720 of them active per token; 0.222 GFLOP" not in text  # at 2048 tokens
    assert "0.194 GFLOP a token" in text and "16 x NVIDIA A100-SXM4-80GB" in text and "mesh data=2,fsdp=8" in text
    parts = re.findall(r"^ +([\d.]+) (\w+)  [a-z]", text, re.MULTILINE)
    sizes = [float(size) * {"GB": 1e9, "MB": 1e6, "kB": 1e3}[unit] for size, unit in parts]
    total = re.search(r"estimated: ([\d.]+) (\w+)", text)
    assert sum(sizes) == pytest.approx(float(total[1]) * {"GB": 1e9, "MB": 1e6}[total[2]], rel=0.01)
    assert "all-reduce over data: gradients" in text and "Cost: " in text
    assert "2 checkpoints of 592 MB, the best one" in text
    settings = tmp_path / "my_run" / "settings.toml"
    settings.parent.mkdir()
    settings.write_text('preset = "small"\nseq_len = 256\n')
    for config in (["--config", str(settings)], [f"--config={settings}"]):
        assert main([*config, "--device", "cpu", "--framework", "torch"]) == 0
        assert "8 x 256 = 2,048 tokens a step" in capsys.readouterr().out


def test_what_does_not_fit_is_told_of_options_that_help(capsys: pytest.CaptureFixture) -> None:
    """Not of more devices where there is a plan for one alone, of fewer rows than one, or of what is done already."""

    def helps(*flags: str) -> str:
        assert main(["--preset", "smol-774m", "--device", "a10", "--mfu", "1", *flags]) == 0
        return re.search("does not fit: (.*)", capsys.readouterr().out)[1]

    rest = "a shorter --seq-len, or another --device"
    much = "more devices (--gpus, --mesh fsdp=N), a smaller --micro-batch-size, --remat layers"
    assert helps("--micro-batch-size", "8", "--remat", "off") == f"{much}, {rest}"
    long = ("--max-position", "262144", "--seq-len", "262144", "--micro-batch-size", "1", "--remat", "layers")
    assert helps("--framework", "torch", *long) == rest


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--device", "v100"], "--device v100: there are h100"),
        (["--gpus", "8"], "--gpus 8: must be SLICESxHOSTSxGPUS"),
        (["--mfu", "0"], "--mfu 0.0: must be above 0"),
        (["--price", "-1"], "--price -1.0: must be a number of at least 0"),
        (["--price", "nan"], "--price nan: must be a number of at least 0"),
        (["--network-gbits", "0"], "--network-gbits 0: must be above 0"),
        (["--network-gbits", "nan"], "--network-gbits nan: must be above 0"),
        (
            ["--gpus", "1x4x8"],
            "--batch-size 8: must be a multiple of 32: 1 (--micro-batch-size auto) on each of the 32",
        ),
        (["--gpus", "1x1x8", "--mesh", "fsdp=4"], "--mesh fsdp=4: takes 4 devices, --gpus 1x1x8 are 8"),
        (["--gpus", "1x1x8", "--framework", "torch"], "--framework torch --gpus 1x1x8: for Flax alone"),
        (["--dtype", "float64"], "--dtype float64: no plan"),
        (["--batch-sise", "4"], "unknown option --batch-sise, did you mean --batch-size?"),
    ],
)
def test_mistakes_are_one_line(flags: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}") and error.count("\n") == 1


def test_a_plan_needs_no_framework() -> None:
    code = """
import sys
class Absent:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "jax", "jaxlib", "flax", "optax", "orbax"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent)
from train.plan.__main__ import main
sys.exit(main(["--preset", "smol-774m", "--gpus", "1x1x8"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("framework", "system"), [("flax", "flax"), ("torch", "torch_ref")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [512, 1024])
def test_memory_is_what_a_step_takes(framework: str, system: str, tokens: int, dtype: str) -> None:
    """Whole steps of `small` in a process of their own: its peak, within a tenth."""
    pytest.importorskip({"flax": "jax"}.get(framework, framework))
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("another system counts a process's memory otherwise")
    case = Case(system, ("step",), "small", dtype, tokens, 8, repeats=1, device="cpu", spawned=time.time())
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-m", "train.bench.worker", to_json(case)], env=environment, capture_output=True, text=True
    )
    measured = json.loads(done.stdout.splitlines()[-1])["peak_memory_gib"] * 2**30
    estimate = sum(step_parts(PRESETS["small"], dtype, 1, tokens, 1, "off", framework=framework).values())
    assert estimate == pytest.approx(measured, rel=0.1)
