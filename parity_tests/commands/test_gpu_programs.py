"""What XLA makes of the programs for an H100, compiled without one. Needs JAX's CUDA plugin (the extra `cuda`);
`.ci/gpu_compile` makes such an environment. The reader of programs itself is tested without it."""

import re
from collections import Counter
from functools import cache
from types import SimpleNamespace

import pytest

from train import command_line
from train.plan.__main__ import main
from train.plan.cards import CARDS
from train.plan.estimate import Gpus, Plan, make_plan
from train.plan.hlo import Program, is_host_transfer, kind, shape_bytes

PROGRAM = """
HloModule step, is_scheduled=true

%fused (param_0: f32[4,8], param_1: s32[]) -> f32[1,8] {
  %param_0 = f32[4,8]{1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,8]{1,0} dynamic-slice(%param_0, %param_1, %zero), dynamic_slice_sizes={1,8}
}

%written (param_0.1: bf16[4,8], param_1.1: bf16[1,8], param_2: s32[]) -> bf16[4,8] {
  %param_0.1 = bf16[4,8]{1,0} parameter(0)
  %param_1.1 = bf16[1,8]{1,0} parameter(1)
  %param_2 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %update = bf16[4,8]{1,0} dynamic-update-slice(%param_0.1, %param_1.1, %param_2, %zero.1)
}

%body (arg: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %arg = (s32[], /*index=1*/f32[4,8]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%arg), index=0
  %all = f32[4,8]{1,0} get-tuple-element(%arg), index=1
  %one = f32[1,8]{1,0} fusion(%all, %n), kind=kLoop, calls=%fused
  %sum = f32[1,8]{1,0} all-reduce(%one), replica_groups={{0,1}}, to_apply=%add
  ROOT %out = (s32[], f32[4,8]{1,0}) tuple(%n, %all)
}

%condition (arg.1: (s32[], f32[4,8])) -> pred[] {
  %arg.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  %n.1 = s32[] get-tuple-element(%arg.1), index=0
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%n.1, %limit), direction=LT
}

%yes (arg.2: f32[4,8]) -> f32[4,8] {
  %arg.2 = f32[4,8]{1,0} parameter(0)
  ROOT %twice = f32[4,8]{1,0} add(%arg.2, %arg.2)
}

%no (arg.3: f32[4,8]) -> f32[4,8] {
  %arg.3 = f32[4,8]{1,0} parameter(0)
  ROOT %same = f32[4,8]{1,0} copy(%arg.3)
}

ENTRY %main (x: f32[4,8], ok: pred[], to: bf16[4,8], part: bf16[1,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %ok = pred[] parameter(1)
  %to = bf16[4,8]{1,0} parameter(2)
  %part = bf16[1,8]{1,0} parameter(3)
  %zero.2 = s32[] constant(0)
  %start = (s32[], f32[4,8]{1,0}) tuple(%zero.2, %x)
  %loop = (s32[], f32[4,8]{1,0}) while(%start), condition=%condition, body=%body, config={"known_trip_count":{"n":"5"}}
  %back = f32[4,8]{1,0} get-tuple-element(%loop), index=1
  %kept = bf16[4,8]{1,0} fusion(%to, %part, %zero.2), kind=kLoop, calls=%written
  %attention = (f32[4,8]{1,0}, u8[0]{0}) custom-call(%back), custom_call_target="__cudnn$fmhaSoftmax"
  %asks = f32[4,8]{1,0} custom-call(%back), custom_call_target="xla_ffi_python_gpu_callback"
  ROOT %done = f32[4,8]{1,0} conditional(%ok, %back, %back), true_computation=%yes, false_computation=%no
}
"""


def test_a_program_is_read_with_how_often_it_runs() -> None:
    program = Program.parse(PROGRAM)
    kernels = {one.instruction.name: one for one in program.kernels}
    assert {name: one.times for name, one in kernels.items()} == {
        "one": 5, "sum": 5, "less": 5, "kept": 1, "attention": 1, "asks": 1, "twice": 1,
    }  # fmt: skip
    assert kernels["sum"].loops == 1 and kernels["twice"].loops == 0
    kinds = {name: kind(one.instruction) for name, one in kernels.items()}
    assert (kinds["sum"], kinds["attention"], kinds["one"]) == ("collective", "cuDNN", "fused loop")
    assert [one.instruction.name for one in program.executed if is_host_transfer(one.instruction)] == ["asks"]


def test_what_a_kernel_moves_is_what_it_touches() -> None:
    program = Program.parse(PROGRAM)
    moved = {one.instruction.name: program.moved(one) for one in program.kernels}
    assert moved["one"] == 32 + 4 + 32  # one of four rows, and its number
    assert moved["kept"] == 16 + 16 + 4  # a row written where it belongs
    assert moved["twice"] == 3 * 128 and moved["attention"] == 256
    assert shape_bytes("(bf16[2,3]{1,0}, /*index=1*/s32[], pred[7]{0}, u8[0]{0})") == 12 + 4 + 7


STARTED = """
%wrapped (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  ROOT %negated = f32[8,8]{1,0} negate(%p)
}

%called (p.1: f32[8,8]) -> f32[8,8] {
  %p.1 = f32[8,8]{1,0} parameter(0)
  ROOT %sine = f32[8,8]{1,0} sine(%p.1)
}

ENTRY %main (x: f32[8,8]) -> f32[4,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %fused = ((f32[8,8]{1,0}), f32[8,8]{1,0}) fusion-start(%x), kind=kLoop, calls=%wrapped
  %passed = ((f32[8,8]{1,0}), f32[8,8]{1,0}) fusion-update(%fused)
  %y = f32[8,8]{1,0} fusion-done(%passed)
  %call = ((f32[8,8]{1,0}), f32[8,8]{1,0}) call-start(%y), to_apply=%called
  %z = f32[8,8]{1,0} call-done(%call)
  %copied = (f32[8,8]{1,0}, f32[8,8]{1,0}) copy-start(%z)
  %copy = f32[8,8]{1,0} copy-done(%copied)
  %gathered = (f32[8,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%copy), dimensions={0}
  %gather = f32[16,8]{1,0} all-gather-done(%gathered)
  %summed = f32[8,8]{1,0} all-reduce-start(%copy), to_apply=%add
  %sum = f32[8,8]{1,0} all-reduce-done(%summed)
  %scattered = ((f32[8,8]{1,0}), f32[4,8]{1,0}) reduce-scatter-start(%sum), dimensions={0}, to_apply=%add
  ROOT %out = f32[4,8]{1,0} reduce-scatter-done(%scattered)
}
"""


def test_what_is_started_and_waited_for_counts_once() -> None:
    """In the words that XLA has for asynchronous instructions: their types hold what they are given, too."""
    program = Program.parse(STARTED)
    moved = {one.instruction.name: (kind(one.instruction), program.moved(one)) for one in program.kernels}
    assert moved == {
        "fused": ("fused loop", 512),
        "sine": ("sine", 512),
        "copied": ("copy", 512),
        "gathered": ("collective", 256 + 512),
        "summed": ("collective", 512),
        "scattered": ("collective", 256 + 128),
    }


class Compiled:
    """What XLA gives back, with the program above."""

    def as_text(self) -> str:
        return PROGRAM

    def memory_analysis(self) -> SimpleNamespace:
        sizes = {"argument": 128, "temp": 64, "output": 128, "alias": 128}
        return SimpleNamespace(**{f"{name}_size_in_bytes": size for name, size in sizes.items()})


def test_time_is_predicted_from_traffic_and_arithmetic() -> None:
    compiled = pytest.importorskip("train.plan.compiled", reason="JAX is not installed")
    card = CARDS["h100"]
    reading = compiled.Reading(compiled.CompiledProgram("train step", 1.0, Compiled()), card, card.bf16, flops=1e12)
    own = reading.moved - 5 * 64  # without the all-reduce in the loop
    assert reading.predicted == pytest.approx((own / 3.35e12 + 1e12 / 989.4e12) / 0.65, rel=1e-3)
    free = compiled.Reading(reading.made, card, card.bf16, flops=1e-9)  # of arithmetic, that all of it is traffic
    assert free.predicted == pytest.approx(own / 3.35e12 / 0.65, rel=1e-6)
    (line,) = [line for line in reading.lines() if "predicted" in line]
    assert "1.55 ms without collectives, assumed: " in line and line.endswith("each at 0.65 of those")
    reading = compiled.Reading(compiled.CompiledProgram("prompt", 1.0, Compiled()), card, card.bf16)
    assert reading.predicted is None and "predicted" not in "".join(reading.lines())


def test_arithmetic_is_at_the_peak_of_the_runs_dtype(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """With stand-ins for XLA's compiler and what it makes."""
    jax = pytest.importorskip("jax")
    programs = pytest.importorskip("train.plan.programs")
    monkeypatch.setattr(programs, "missing", lambda: None)
    monkeypatch.setattr(programs, "gpus_of", lambda *_: [SimpleNamespace(device_kind="H100")])
    made = programs.CompiledProgram("train step", 1.0, Compiled())
    monkeypatch.setattr(programs, "compile_programs", lambda *_: [made])
    said = {}
    try:
        for dtype in ("bfloat16", "float32"):
            assert main(["--preset", "tiny", "--compile", "--dtype", dtype]) == 0
            said[dtype] = float(re.search(r"TFLOP are (\S+) ms at the peak", capsys.readouterr().out)[1])
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert said["float32"] == pytest.approx(said["bfloat16"] * 989.4 / 494.7, rel=0.01)


def plan(*flags: str, gpus: str = "1x1x1") -> Plan:
    """Of `tiny`, eight rows in all in one micro-batch unless told otherwise."""
    devices = Gpus.parse(gpus)
    rows = ("--batch-size", "8", "--micro-batch-size", str(8 // devices.count), "--remat", "off")
    options = command_line.parse(("--preset", "tiny", *rows, *flags), "test")
    return make_plan(options, CARDS["h100"], devices, "flax", 0.4, None)


def test_without_the_plugin_the_rest_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    programs = pytest.importorskip("train.plan.programs")
    monkeypatch.setattr(programs.importlib.util, "find_spec", lambda name: None)
    assert main(["--preset", "tiny", "--compile"]) == 0
    said = capsys.readouterr().out
    assert "Memory of a device" in said
    assert said.endswith("Not compiled: JAX's CUDA plugin is not installed: pip install -e '.[cuda]'\n")
    assert main(["--preset", "tiny", "--compile", "--device", "l4"]) == 2
    assert "error: --compile --device l4: programs are compiled for h100" in capsys.readouterr().err
    assert main(["--preset", "tiny", "--compile", "--framework", "torch"]) == 2


@cache
def read(made: Plan, name: str = "train step", card: str = "h100"):
    """A program of a plan, compiled and read."""
    programs = pytest.importorskip("train.plan.programs", reason="JAX is not installed")
    if lacking := programs.missing():
        pytest.skip(f"{lacking} is not installed: pip install -e '.[cuda]'")
    import jax

    from train.plan.compiled import Reading

    jax.config.update("jax_enable_compilation_cache", False)  # it wants a device to load what it kept
    try:
        # The tests' own setting would hide a product that asks for too little.
        with jax.default_matmul_precision("default"):
            (program,) = programs.compile_programs(made.options, programs.gpus_of(card, made.gpus), (name,))
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    return Reading(program, made.card, made.peak)


def targets(reading) -> Counter[str]:
    """How often each library call is executed."""
    found: Counter[str] = Counter()
    for one in reading.program.kernels:
        found[one.instruction.attribute("custom_call_target") or ""] += one.times
    return found


@pytest.mark.parametrize(("remat", "forward"), [("off", 1), ("experts", 1), ("layers", 2)])
def test_attention_runs_once_forward_and_once_backward(remat: str, forward: int) -> None:
    found = targets(read(plan("--remat", remat)))
    assert found["__cudnn$fmhaSoftmax"] == forward * 4 and found["__cudnn$fmhaSoftmaxBackward"] == 4


def test_the_router_multiplies_in_full_float32() -> None:
    reading = read(plan())
    lines = [line for lines in reading.program.computations.values() for line in lines if line.opcode == "dot"]
    scores = [line for line in lines if line.shape.startswith("f32[2048,8]")]
    assert len(scores) == 1  # forward alone: the backward pass has them
    assert all("operand_precision={highest,highest}" in line.attributes for line in scores)


def test_a_step_waits_for_nothing_and_copies_no_state() -> None:
    for name in ("train step", "evaluation step", "prompt", "new token"):
        assert not read(plan(), name).host_transfers
    reading = read(plan())
    assert reading.open_loops == 0 and reading.conditionals == 0  # a branch would wait for the host, too
    copies = [one.instruction for one in reading.program.kernels if one.instruction.opcode.startswith("copy")]
    assert sum(shape_bytes(line.shape) for line in copies) < 1e5  # parameters alone are 9 MB
    arguments, temporaries, beside = reading.made.memory.values()
    assert beside < 1e4  # the new state lies where the old one was
    assert arguments == pytest.approx(12 * 2_225_344, rel=0.01)


@pytest.mark.parametrize("micro", [1, 2])
def test_devices_gather_in_the_layers_loop_and_sum_the_rest_outside(micro: int) -> None:
    reading = read(plan("--batch-size", "16", "--micro-batch-size", str(micro), gpus="1x1x8"))
    found: Counter[tuple[str, int]] = Counter()
    for one in reading.collectives:
        found[one.instruction.opcode.removesuffix("-start"), one.loops] += one.times
    layers, batches = 4, 2 // micro
    inside = 1 if batches == 1 else 2  # the loop over micro-batches is around that over layers
    assert found["all-gather", 0] + found["all-gather", 1] + found["all-gather", 2] >= 2 * layers * batches
    assert not any(name == "all-reduce" and loops for name, loops in found)  # once a step: norms, router, metrics
    assert all(loops <= inside for _, loops in found)


def test_experts_on_other_devices_exchange_rows_six_times_a_layer() -> None:
    reading = read(plan("--mesh", "expert=8", gpus="1x1x8"))
    exchanged = [one for one in reading.collectives if one.instruction.opcode.startswith("ragged-all-to-all")]
    assert sum(one.times for one in exchanged) == 6 * 4  # what train/plan/communication.py counts


@pytest.mark.parametrize("flags", [(), ("--mesh", "fsdp=8"), ("--mesh", "expert=8"), ("--remat", "experts")])
def test_memory_is_what_the_plan_says(flags: tuple[str, ...]) -> None:
    """Of `small`, where parameters do not weigh everything."""
    several = "--mesh" in flags
    made = plan(
        *("--preset", "small", "--seq-len", "1024", "--batch-size", "64" if several else "8", *flags),
        *("--micro-batch-size", "8"),
        gpus="1x1x8" if several else "1x1x1",
    )
    assert made.options.rows_per_pass == 8
    compiled = sum(read(made).made.memory.values())
    assert sum(made.memory.values()) == pytest.approx(compiled, rel=0.15)


ATTENTION, EXPERTS = ("plain", "blocked", "cudnn"), ("dense", "grouped", "blocks", "pallas")


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["off", "experts", "layers"])
@pytest.mark.parametrize("moe", EXPERTS)
@pytest.mark.parametrize("attention", ATTENTION)
def test_every_path_compiles(attention: str, moe: str, remat: str) -> None:
    for micro in ("1", "8"):
        made = plan("--attention", attention, "--moe", moe, "--remat", remat, "--micro-batch-size", micro)
        found = targets(read(made))
        assert (found["__cudnn$fmhaSoftmax"] > 0) == (attention == "cudnn")
        assert (found["__gpu$xla.gpu.triton"] > 0) == (moe == "pallas")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "cudnn", "pallas"),
    [
        (("--qk-nope-head-dim", "12", "--qk-rope-head-dim", "8", "--v-head-dim", "16"), False, True),
        (("--qk-nope-head-dim", "12", "--qk-rope-head-dim", "8", "--v-head-dim", "24"), True, True),
        (("--moe-intermediate-size", "100"), True, False),
        (("--moe-intermediate-size", "101", "--hidden-size", "60"), True, False),
    ],
)
@pytest.mark.parametrize("card", ["h100", "a100"])
def test_odd_sizes_take_the_path_that_has_them(sizes: tuple[str, ...], cudnn: bool, pallas: bool, card: str) -> None:
    found = targets(read(plan(*sizes), card=card))
    assert (found["__cudnn$fmhaSoftmax"] > 0, found["__gpu$xla.gpu.triton"] > 0) == (cudnn, pallas)
