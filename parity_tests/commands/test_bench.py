"""The bench: its command line, its rows, and one real run of the smallest kind."""

import json
import os
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest

from torch_ref.spec.config import PRESETS
from torch_ref.spec.flops import flops_per_token
from torch_ref.spec.interface import UserError
from train.bench import __main__ as bench
from train.bench import worker as bench_worker
from train.bench.cases import Case, bytes_per_token, prefill_flops_per_token
from train.bench.systems import Transformers

FIELDS = {"system", "task", "preset", "dtype", "seq_len", "experts", "value", "unit", "peak_memory_gib"}


def plan(*arguments):
    return bench.parse(arguments)[0]


def test_default_measures_every_system_in_both_precisions():
    cases = plan("--only", "step").cases()
    assert {(case.system, case.dtype) for case in cases} == {
        (system, dtype) for system in (*bench.SYSTEMS, "ceiling") for dtype in bench.DTYPES
    }
    assert {case.preset for case in cases} == {"smol-774m"} and {case.seq_len for case in cases} == {2048}
    assert {case.system for case in cases if case.remat == "experts"} == {"flax", "torch_ref"}


def test_only_and_dtype_choose_a_part():
    cases = plan("--only", "prefill,decode", "--dtype", "bfloat16", "--seq-len", "512", "--preset", "small").cases()
    assert {case.tasks for case in cases} == {("prefill", "decode")}
    assert {(case.dtype, case.seq_len, case.preset) for case in cases} == {("bfloat16", 512, "small")}


def test_sweep_varies_one_thing_at_a_time():
    cases = [case for case in plan("--only", "sweep").cases() if case.system == "flax"]
    for field, values in bench.SWEEP.items():
        assert {getattr(case, field) for case in cases} == {*values}
    assert len(cases) == len(set(cases))


def test_sweep_of_a_shorter_model_varies_the_same_but_lengths():
    """`tiny` takes 512 tokens, fewer than the 1024 of the other rows."""
    cases = [case for case in plan("--only", "sweep", "--sweep-preset", "tiny").cases() if case.system == "flax"]
    for field, values in bench.SWEEP.items():
        assert {getattr(case, field) for case in cases} == {v for v in values if field != "seq_len" or v <= 512}


def test_memory_takes_every_precision_and_rematerialisation():
    cases = [case for case in plan("--only", "memory").cases() if case.system != "ceiling"]
    assert {(case.dtype, case.remat, case.system) for case in cases} == set(
        product(("float32", "bfloat16", "float64"), ("off", "experts", "layers"), ("flax", "torch_ref"))
    )
    assert {case.tokens for case in cases} == {2048} and {case.preset for case in cases} == {"small"}
    assert {case.dtype for case in plan("--only", "memory", "--dtype", "float32").cases()} == {"float32"}


@pytest.mark.parametrize(
    "arguments, named",
    [
        (("--only", "steps"), "--only steps"),
        (("--seq-len", "4096"), "--seq-len 4096"),
        (("--experts", "1"), "--experts 1"),
        (("--experts", "0"), "--experts 0: must be at least 1"),
        (("--seq-len", "0"), "--seq-len 0: must be at least 1"),
        (("--repeats", "0"), "--repeats 0: must be at least 1"),
        (("--repeats", "-1"), "--repeats -1: must be at least 1"),
        (("--only", "sweep", "--experts", "16"), "--experts 16: not for --only sweep"),
        (("--only", "memory,sweep", "--seq-len", "64"), "--seq-len 64: not for --only memory,sweep"),
        (("--only", "memory", "--preset", "tiny"), "--preset tiny: not for --only memory"),
        (("--only", "memory", "--systems", "transformers"), "--only memory --systems transformers: not measured"),
        (("--only", "input", "--systems", "transformers"), "--only input --systems transformers: not measured"),
        (("--systems", "keras"), "--systems keras"),
    ],
)
def test_a_mistake_is_named(arguments, named, capsys):
    with pytest.raises(UserError, match=named):
        plan(*arguments)
    assert bench.main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {named}")


def test_flops_of_smol_774m():
    """Six for each of the 296 M active weights, and attention: 4.2 TFLOP for a row of 2048 tokens."""
    case = Case("flax", ("step",), "smol-774m", "float32", 2048, 8)
    flops = flops_per_token(case.config, case.seq_len)
    assert flops * 2048 == pytest.approx(4.2e12, rel=0.02)
    assert flops == pytest.approx(3 * flops_per_token(case.config, case.seq_len, backward=False))


def test_a_prompts_pass_has_the_output_layer_once():
    """For its last token alone, as both `prefill` compute it."""
    case = Case("flax", ("prefill",), "smol-774m", "float32", 1984, 8)
    vocabulary, hidden = 49152, 576
    without = flops_per_token(case.config, 1984, backward=False) * 1984 - 2 * vocabulary * hidden * 1983
    assert prefill_flops_per_token(case) * 1984 == pytest.approx(without)

    class System:
        framework, device_peak, reset_peak = "jax", lambda self: None, lambda self: None
        __init__ = lambda self, case: None  # noqa: E731

        def generate(self, prompts, new_tokens, tick):
            for _ in range(new_tokens):
                tick(None)

    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(bench_worker.SYSTEMS, "flax", System)
        patched.setattr(bench_worker, "read_bandwidth", lambda *_: 1.0)
        (row,) = bench_worker.measure(replace(case, seq_len=2048))
    assert row["flops_per_token"] == prefill_flops_per_token(case)


def row(system, task, value, unit, **more):
    case = {"preset": "tiny", "dtype": "float32", "seq_len": 64, "experts": 8}
    case |= {"micro_batch": 1, "accumulation": 1, "remat": "off", "peak_memory_gib": 1.5}
    return {"system": system, "task": task, "value": value, "unit": unit, **case, **more}


def test_fraction_of_the_fastest_product_of_the_same_precision():
    rows = bench.with_fractions(
        [
            row("ceiling", "matmul (jax)", 50.0, "GFLOP/s"),
            row("ceiling", "matmul (torch)", 100.0, "GFLOP/s"),
            row("ceiling", "matmul (torch)", 900.0, "GFLOP/s", dtype="bfloat16"),
            row("flax", "step", 10.0, "tokens/s", flops_per_token=5e9),
        ]
    )
    assert rows[-1]["fraction_of_ceiling"] == pytest.approx(0.5)


def test_decoding_is_a_fraction_of_reading_memory():
    case = Case("flax", ("decode",), "smol-774m", "float32", 64, 8)
    # 296.3 M active weights, and 112 values of cache for each of 64 tokens in 30 layers, of four bytes.
    assert bytes_per_token(case) == pytest.approx(4 * (296.3e6 + 64 * 30 * 112), rel=1e-3)
    assert bytes_per_token(replace(case, dtype="bfloat16")) == bytes_per_token(case) / 2
    assert "50% of bandwidth" in bench.table([row("flax", "decode", 10.0, "tokens/s", fraction_of_bandwidth=0.5)])


def test_bandwidth_is_that_around_each_text(monkeypatch):
    """Three texts after a first, while the machine's bandwidth falls from one reading to the next."""
    readings = iter((100.0, 40.0, 20.0, 10.0, 6.0))
    monkeypatch.setattr(bench_worker, "read_bandwidth", lambda case, framework: next(readings))
    clock = iter(float(time) for text in range(4) for time in (0, 10 + text, 12 + text, 14 + text))
    monkeypatch.setattr(bench_worker.time, "perf_counter", lambda: next(clock))

    class System:
        framework = "jax"

        def generate(self, prompts, new_tokens, tick):
            for _ in range(new_tokens):
                tick(None)

    case = Case("flax", ("decode",), "tiny", "float32", 64, 8, new_tokens=3)
    done = bench_worker.generation(case, System(), bench_worker.Peak())
    assert (done.first, done.each, done.bandwidth) == (12, 2, 15)
    assert done.fraction == pytest.approx(bytes_per_token(case) / 1e9 / 2 / 15)


def test_generation_is_measured_without_an_optimizer():
    parts = {case.tasks for case in plan().cases() if case.system == "flax"}
    assert {("prefill", "decode")} <= parts and all("decode" not in tasks or "step" not in tasks for tasks in parts)


def test_a_start_is_measured_apart():
    """Whatever else is asked, nothing is there before its clock starts."""
    for only in ((), ("--only", "startup"), ("--only", "gradient,startup")):
        starts = [case for case in plan(*only).cases() if "startup" in case.tasks and case.system != "ceiling"]
        assert {case.tasks for case in starts} == {("startup",)} and len(starts) == 6


def test_a_start_of_transformers_tries_no_implementations(monkeypatch):
    system, taken = Transformers.__new__(Transformers), []
    system.case, system.implementation = Case("transformers", ("startup",), "tiny", "float32", 64, 8), None
    system.model = SimpleNamespace(set_experts_implementation=taken.append)
    monkeypatch.setattr(Transformers, "gradient", lambda self: pytest.fail("tried within the measured span"))
    system._choose()
    assert taken == [system.implementation] == ["grouped_mm"]


def test_peak_memory_is_that_of_each_task_alone(monkeypatch):
    """A device's peak only rises by itself: each task's is read after a reset, the largest first."""
    held = {"gradient": 7, "step": 6, "save": 5, "restore": 4, "input": 3, "prefill": 2, "decode": 2}

    class Device:
        framework, peak = "torch", 0

        def __init__(self, case):
            pass

        def needs(self, task):
            self.peak = max(self.peak, held[task] * bench_worker.GIB)

        def gradient(self):
            return lambda: self.needs("gradient")

        def step(self):
            return lambda: self.needs("step")

        def save(self, folder):
            self.needs("save")
            return folder

        def restore(self, path):
            self.needs("restore")

        def generate(self, prompts, count, on_token):
            self.needs("decode")
            for token in range(count):
                on_token(token)

        def reset_peak(self):
            self.peak = 0

        def device_peak(self):
            device.append(self)
            return self.peak

    device: list[Device] = []
    monkeypatch.setitem(bench_worker.SYSTEMS, "torch", Device)
    monkeypatch.setattr(bench_worker, "read_bandwidth", lambda *_: 1.0)
    monkeypatch.setattr(bench_worker, "input_rate", lambda case: device[-1].needs("input") or 1.0)
    tasks = ("gradient", "step", "checkpoint", "input", "prefill", "decode")
    rows = list(bench_worker.measure(Case("torch", tasks, "tiny", "float32", 64, 4, new_tokens=4)))
    assert {row["task"] for row in rows} == set(held)
    assert [row["peak_memory_gib"] for row in rows] == [held[row["task"]] for row in rows]


def test_table_puts_systems_side_by_side():
    text = bench.table(
        [
            row("flax", "step", 120.0, "tokens/s"),
            row("transformers", "step", 100.0, "tokens/s"),
            row("flax", "save", 2.0, "s"),
            row("transformers", "save", 3.0, "s"),
            row("flax", "step", 90.0, "tokens/s", remat="experts"),
        ]
    ).splitlines()
    assert len(text) == 2 + 3
    assert "120.0 tokens/s, 1.20x, 1.5 GiB" in text[2] and "| 100.0 tokens/s, 1.5 GiB |" in text[2]
    assert "2.0 s, 1.50x" in text[3], "fewer seconds are better"
    assert "remat experts" in text[4] and "0.90x" in text[4], "compared with the other's only mode"


def test_a_failing_process_costs_its_rows_alone(capfd):
    assert bench.run_case(Case("no_such_system", ("step",), "tiny", "float32", 64, 8)) == []
    assert "no_such_system" in capfd.readouterr().err


def test_interrupting_leaves_what_was_measured(monkeypatch, capsys):
    def run_case(case):
        if case.system == "torch_ref":
            raise KeyboardInterrupt
        return [row("flax", "step", 123.0, "tokens/s")] if case.system == "flax" else []

    monkeypatch.setattr(bench, "run_case", run_case)
    assert bench.main(["--quick", "--only", "step"]) == 130
    assert "123.0 tokens/s" in capsys.readouterr().out


def test_plot(tmp_path):
    rows = [
        row(system, "gradient", 100.0 * seq, "tokens/s", seq_len=seq)
        for system in ("flax", "torch_ref")
        for seq in (64, 128)
    ]
    bench.draw(rows, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("option", "name", "said"),
    [
        ("--plot", "sweep.foo", "--plot {}: must end in .png"),
        ("--plot", "a folder.png", "{}: could not be written: Is a directory"),
        ("--json", "a folder.png", "{}: could not be written: Is a directory"),
        ("--plot", "absent/sweep.png", "{0}: there is no folder {0.parent}"),
        ("--json", "absent/rows.json", "{0}: there is no folder {0.parent}"),
    ],
)
def test_a_file_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys, option, name, said):
    monkeypatch.setattr(bench, "run_case", lambda case: [row("flax", "gradient", 123.0, "tokens/s")])
    (tmp_path / "a folder.png").mkdir()
    assert bench.main(["--quick", "--only", "gradient", option, str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: " + said.format(tmp_path / name)) and error.count("\n") == 1


def test_a_real_run(tmp_path, monkeypatch, capsys):
    """The torch side only: it needs the fewest seconds."""
    pytest.importorskip("torch", reason="torch is not installed")
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    path = tmp_path / "rows.json"
    arguments = (
        "--quick --systems torch_ref --only gradient,step,startup,prefill,decode,checkpoint --seq-len 64 --repeats 1"
    )
    assert bench.main([*arguments.split(), "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert all(FIELDS <= set(row) for row in rows)
    ours = {(row["task"], row["remat"]): row for row in rows if row["system"] == "torch_ref"}
    assert {task for task, _ in ours} == {*"gradient step startup prefill decode save restore".split(), "first step"}
    assert 0 < ours["step", "off"]["fraction_of_ceiling"] < 1
    decoded = [(row["seq_len"], row["micro_batch"]) for row in rows if row["task"] == "decode"]
    assert decoded == [(48, 1), (16, 1), (16, 8)]
    assert all(row["fraction_of_bandwidth"] > 0 for row in rows if row["task"] == "decode" and row["micro_batch"] == 1)
    assert 0.05 < ours["step", "off"]["peak_memory_gib"] < 4
    assert ours["step", "off"]["value"] > 0 and PRESETS["tiny"].n_routed_experts == ours["step", "off"]["experts"]
    assert "| step | tiny | float32 | 64 | 8 | 1 |" in capsys.readouterr().out
