"""A long run of a small model, watched: does memory, do handles or threads grow, does a step get slower?

    python -m parity_tests.harness.endurance torch FOLDER --steps 20000

The run is a process of its own, with checkpoints, validations and samples all along; its `/proc` is read twice a second
(Linux). Of each quantity the report gives the median in the first and the last quarter after a start of a tenth, and
the slope of a straight line through all samples between, for 10,000 steps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np

from parity_tests.harness.kills import INTERVAL, MAINS, settings
from train.run.runlog import read_metrics

WARM = 0.1
"""Share of the steps after which a run is warm."""


def sampled(process: subprocess.Popen, log: Path) -> list[tuple[int, int, int, int]]:
    """(step, resident bytes, open files, threads) of a process until it ends."""
    samples, place = [], Path(f"/proc/{process.pid}")
    while process.poll() is None:
        try:
            fields = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines())
            memory, threads = int(fields["VmRSS"].split()[0]) * 1024, int(fields["Threads"])
            samples.append((last_step(log), memory, len(os.listdir(place / "fd")), threads))
        except (OSError, KeyError):
            pass  # it is about to end
        time.sleep(0.5)
    return samples


def last_step(log: Path) -> int:
    """The step of the last line of metrics that is one."""
    if not log.exists():
        return 0
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = [
            line for line in file.read().split(b"\n") if line.startswith(b'{"kind": "step"') and line.endswith(b"}")
        ]
    return json.loads(lines[-1])["step"] if lines else 0


def course(steps: Sequence[float], values: Sequence[float], unit: str) -> dict[str, float | str]:
    """How a quantity goes over the steps of a warm run."""
    quarter = max(len(values) // 4, 1)
    return {
        "first quarter": median(values[:quarter]),
        "last quarter": median(values[-quarter:]),
        f"slope, {unit} in 10,000 steps": float(np.polyfit(steps, values, 1)[0]) * 10_000,
    }


def watch(framework: str, folder: Path, steps: int, interval: int | None = None, preset: str | None = None) -> dict:
    """What became of memory, handles, threads and the time of a step in a run of so many steps, with a checkpoint every
    `interval` of them: of the model of the tests, or of a preset."""
    folder.mkdir(parents=True, exist_ok=True)
    if preset is None:
        flags = ["--config", str(settings(folder, steps, interval or INTERVAL))]
    else:
        flags = ["--preset", preset, "--steps", str(steps)]
        flags += [] if interval is None else ["--checkpoint-interval", str(interval)]
    flags += ["--run-dir", str(folder / "run"), "--keep-checkpoints", "3"]
    command = [sys.executable, "-m", MAINS[framework], *flags]
    with open(folder / "run.out", "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        samples = sampled(process, folder / "run" / "metrics.jsonl")
    records = [record for record in read_metrics(folder / "run") if record["kind"] == "step"]
    numbers = [record["step"] for record in records]
    warm = [sample for sample in samples if sample[0] > WARM * numbers[-1]]
    at, memory, files, threads = zip(*warm, strict=True)
    late = [record for record in records if record["step"] > WARM * numbers[-1]]
    return {
        "framework": framework,
        "exit code": process.returncode,
        "steps": len(numbers),
        "no step is missing or twice": numbers == list(range(1, len(numbers) + 1)),
        "resident memory": course(at, memory, "bytes"),
        "open files": course(at, files, "files"),
        "threads": course(at, threads, "threads"),
        "seconds of a step": course([r["step"] for r in late], [r["step_seconds"] for r in late], "seconds"),
        "loss": [records[0]["loss"], records[-1]["loss"]],
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m parity_tests.harness.endurance", description=__doc__.splitlines()[0]
    )
    parser.add_argument("framework", choices=list(MAINS), help="The framework whose main is run.")
    parser.add_argument("folder", type=Path, help="A folder for the run.")
    parser.add_argument("--steps", type=int, default=20_000, help="Steps of the run; by default %(default)s.")
    parser.add_argument(
        "--checkpoint-interval", type=int, help=f"Steps between checkpoints; by default {INTERVAL}, or the preset's."
    )
    parser.add_argument("--preset", help="Settings of the trainers, as tiny; by default a smaller model's.")
    arguments = parser.parse_args(argv)
    report = watch(
        arguments.framework, arguments.folder, arguments.steps, arguments.checkpoint_interval, arguments.preset
    )
    print(json.dumps(report, indent=2))
    return 0 if report["exit code"] == 0 and report["no step is missing or twice"] else 1


if __name__ == "__main__":
    sys.exit(main())
