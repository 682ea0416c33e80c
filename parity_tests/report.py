"""Measures the whole ladder and writes what it found as an HTML page and as Markdown.

    python -m parity_tests.report                      both frameworks on the CPU: report/index.html, report/report.md
    python -m parity_tests.report --torch-device mps   torch on a Mac's GPU against JAX on its CPU
    python -m parity_tests.report --readme             also renew the tables of README.md and docs/mutations.md

The exit code is 1 if any measurement is beyond its bound or any planted fault goes unseen. float64 is measured where
both devices have it. Nothing is set to make devices agree: a GPU that multiplies float32 in TF32 is shown to do so.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from parity_tests.harness.measure import Measurement
from torch_ref.spec.interface import UserError
from torch_ref.spec.storage import user_path
from train.shell import shell

REPOSITORY = Path(__file__).parents[1]

RUNGS = {
    "round trip": "weights through Flax, torch and back: changed tensors",
    "modules": "each module alone: output and gradients",
    "trace": "each module's output in the running model",
    "choices": "router choices beyond the score error, near ties",
    "hidden": "hidden state after every layer, 516 tokens",
    "logits": "logits, 516 tokens",
    "KL": "KL of the next-token distributions, nats",
    "loss": "loss, balance loss, objective, expert counts",
    "gradient": "gradient of every parameter",
    "optimizer step": "moments, update / LR, bias, LR, norm from given gradients",
    "training run": "loss at each of 200 training steps",
    "decode": "greedy tokens that differ",
    "resume": "losses after a restart, against the unbroken run",
    "devices": "20 steps on meshes of 8 devices, against one: losses, counts, weights",
}
"""The ladder, in order."""


@dataclass
class Report:
    """What was measured, in the order in which it was; `page` writes it up."""

    environment: dict[str, str]
    measurements: list[Measurement] = field(default_factory=list)
    divergences: dict = field(default_factory=dict)
    """dtype -> `training.Divergence`"""
    faults: list = field(default_factory=list)
    """(`Mutation`, the measurement that caught it or None)"""
    rungs: dict[str, str] = field(default_factory=lambda: RUNGS)
    heading: str = "Are both frameworks the same model?"
    traced: str = "trace"
    """The case whose module outputs are drawn."""

    @property
    def passed(self) -> bool:
        return all(each.passed for each in self.measurements) and all(
            fault.shows_at(caught) for fault, caught in self.faults
        )

    def add(self, measurements: list[Measurement], say: Callable[[str], None]) -> None:
        """Take in measurements, saying of each rung how it went."""
        self.measurements += measurements
        for rung in dict.fromkeys(each.rung for each in measurements):
            farthest = worst([each for each in measurements if each.rung == rung])
            say(f"{'ok  ' if farthest.passed else 'FAIL'} {farthest}")

    def of(self, rung: str, dtype: str) -> list[Measurement]:
        return [each for each in self.measurements if (each.rung, each.dtype) == (rung, dtype)]

    @property
    def dtypes(self) -> list[str]:
        return list(dict.fromkeys(each.dtype for each in self.measurements))


def worst(measurements: list[Measurement]) -> Measurement:
    """The one nearest to its bound, or farthest beyond it."""

    def ratio(each: Measurement) -> float:
        if each.error != each.error:
            return float("inf")
        return each.error / each.bound if each.bound else (float("inf") if each.error else -each.bound)

    return max(measurements, key=lambda each: (ratio(each), each.bound))


def environment(torch_device: str, jax_platform: str) -> dict[str, str]:
    """Versions, devices and precisions, as they are."""
    import flax
    import jax
    import numpy
    import optax
    import torch

    from flax_model.device import describe as describe_jax
    from flax_model.device import resolve_device as resolve_jax
    from torch_ref.device import describe as describe_torch
    from torch_ref.device import resolve_device as resolve_torch

    torch_matmul = torch.get_float32_matmul_precision()
    jax_matmul = jax.config.jax_default_matmul_precision or "default"
    if jax_platform != "cpu" and jax_matmul == "default":
        jax_matmul += " (TF32 on GPUs that have it; JAX_DEFAULT_MATMUL_PRECISION=highest turns it off)"
    return {
        "torch": describe_torch(resolve_torch(torch_device)),
        "JAX": describe_jax(resolve_jax(jax_platform)),
        "Flax, optax, NumPy": f"{flax.__version__}, {optax.__version__}, {numpy.__version__}",
        "Python": f"{platform.python_version()} on {platform.system()}",
        "float32 products, torch": torch_matmul,
        "float32 products, JAX": jax_matmul,
        "XLA flags": os.environ.get("XLA_FLAGS", "none"),
        "measured": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def measure(torch_device: str, jax_platform: str, quick: bool, say: Callable[[str], None]) -> Report:
    """The ladder from its first rung to its last, and on the CPU the planted faults."""
    from flax_model.device import resolve_device
    from parity_tests.harness import devices as devices_rung
    from parity_tests.harness import ladder, mutations, training
    from parity_tests.harness.cases import CONFIG, FLOAT32_CASES, PAIRWISE_CASES, TRACE_CASE

    jax_device = resolve_device(jax_platform)
    devices = {"torch_device": torch_device, "jax_device": jax_device}
    names = {"torch_device": torch_device, "jax_device": jax_platform}
    on_cpu = torch_device == jax_platform == "cpu"
    dtypes = ["float64", "float32"] if torch_device != "mps" and jax_platform == "cpu" else ["float32"]
    report = Report(environment(torch_device, jax_platform))

    def add(measurements: list[Measurement]) -> None:
        report.add(measurements, say)

    def fit(case):
        """Paths that were made for the device."""
        if torch_device != "mps":
            return case
        return replace(case, torch=replace(case.torch, attention="masked", moe="blocks"))

    for dtype in dtypes:
        if on_cpu:  # what has no device: bits and single modules
            add(ladder.round_trip(CONFIG, dtype, "all parts"))
            add(ladder.modules(CONFIG, dtype))
        add(ladder.run_case(fit(TRACE_CASE.at(dtype)), trace=True, **devices))
        for case in PAIRWISE_CASES[:2] if quick else PAIRWISE_CASES if dtype == dtypes[0] else FLOAT32_CASES:
            add(ladder.run_case(fit(case.at(dtype)), **devices))
        steps = [
            training.injected_steps(*each) for each in (("torch", dtype, torch_device), ("flax", dtype, jax_platform))
        ]
        add(training.compare_steps(dtype, *steps))
        if not quick:
            add(training.decoding(dtype, **names))
            with tempfile.TemporaryDirectory() as folder:
                add(training.resuming(dtype, Path(folder), **names))
    if on_cpu:
        add(ladder.near_ties(replace(TRACE_CASE, torch_micro_batches=1)))
        add(devices_rung.measure())
    for dtype in ["float64"] if quick and on_cpu else [*dtypes, "bfloat16"]:
        report.divergences[dtype] = training.training_run(dtype, **names)
        add(report.divergences[dtype].measurements())
    if on_cpu:
        for fault, caught in itertools.chain(mutations.survey(), devices_rung.survey()):
            report.faults.append((fault, caught))
            say(f"{'ok  ' if fault.shows_at(caught) else 'FAIL'} planted: {fault.name}; caught: {caught}")
    return report


@shell
def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m parity_tests.report", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--torch-device", default="cpu", help="Torch's device: cpu, cuda or mps; by default %(default)s."
    )
    parser.add_argument("--jax-platform", default="cpu", help="JAX's platform: cpu or gpu; by default %(default)s.")
    parser.add_argument(
        "--out", type=user_path, default=Path("report"), help="The folder to write to; by default %(default)s."
    )
    parser.add_argument("--quick", action="store_true", help="Measure two mode combinations and one training run only.")
    parser.add_argument(
        "--readme", action="store_true", help="Also renew the tables of README.md and docs/mutations.md."
    )
    options = parser.parse_args(arguments)
    try:
        for package in ("torch", "flax"):
            __import__(package)
        if options.readme and options.quick:
            raise UserError("--readme: takes the whole ladder; leave --quick out")
        from parity_tests.harness import page

        if options.readme:
            page.check_markers(REPOSITORY)
        started = time.monotonic()
        report = measure(options.torch_device, options.jax_platform, options.quick, say=print)
        report.environment["took"] = f"{(time.monotonic() - started) / 60:.0f} min"
        page.write(report, options.out)
        print(f"Wrote {options.out / 'index.html'} and {options.out / 'report.md'}")
        if options.readme:
            page.renew(report, REPOSITORY)
            print("Renewed the tables of README.md and docs/mutations.md")
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: the report compares both frameworks") from error
    print("All within bounds." if report.passed else "FAILED: see the lines that start with FAIL.")
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
