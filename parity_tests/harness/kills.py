"""Kill a run again and again with SIGKILL, let it go on each time, and compare it with the run that nobody disturbed:

    python -m parity_tests.harness.kills torch FOLDER --kills 100

A sixth of the kills come at a random moment of the start, a third while steps, validations and samples go on, and half
the moment a checkpoint is seen being written, or a few milliseconds later. The report says what was lost and whether
the joined log is the unbroken one's, bit for bit. Processes are forked from one that has imported everything, so that
a start takes a fraction of a second.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from parity_tests.support.fakes import small_options
from train.run.runlog import read_metrics

MAINS = {"flax": "train.flax_main", "torch": "torch_ref.train"}
INTERVAL = 5
STARTING, TRAINING, SAVING = KINDS = "while starting", "while training", "while a checkpoint was written"
COMPARED = {
    "step": ("step", "phase", "loss", "balance_loss", "grad_norm", "learning_rate", "tokens_seen", "expert_counts"),
    "validation": ("step", "loss", "bits_per_byte", "best_step", "stale_validations"),
    "sample": ("step", "text"),
}


def settings(folder: Path, steps: int, interval: int = INTERVAL) -> Path:
    """A settings file of a run with a checkpoint every `interval` steps, and the text it names."""
    words = "the model reads a row of tokens and says which one comes next while experts share the work".split()
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(words, 60)) + "." for _ in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = small_options(
        dataset=str(folder / "text.jsonl"),
        tokenizer="bpe",
        validation_fraction=0.1,
        learning_rate=0.01,
        seq_len=16,
        steps=steps,
        extended_steps=5,
        warmup_steps=10,
        checkpoint_interval=interval,
        keep_checkpoints=2,
        eval_interval=4,
        sample_interval=7,
        tensorboard=True,
        device="cpu",
    )
    file = folder / "settings.toml"
    file.write_text(options.to_toml())
    return file


def start(framework: str, argv: list[str], output: Path) -> int:
    """Fork a process that trains; returns its id."""
    process = os.fork()
    if process:
        return process
    code = 99
    try:
        with open(output, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = importlib.import_module(MAINS[framework]).main(argv)
    finally:
        os._exit(code)


def being_written(run_dir: Path) -> bool:
    """Whether a checkpoint is on its way."""
    folders = (run_dir / "checkpoints", run_dir / "best")
    return any("tmp" in p.name or p.suffix == ".partial" for f in folders if f.is_dir() for p in f.iterdir())


def wait_for(happened: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.0002)


def last_step(run_dir: Path) -> int:
    try:
        return max((record["step"] for record in read_metrics(run_dir)), default=0)
    except Exception:
        return 0


def numbers(run_dir: Path, after: int = -1) -> list[tuple]:
    """What must be equal bit for bit, of the steps after one."""
    records = [r for r in read_metrics(run_dir) if r.get("kind") in COMPARED and r.get("step", 0) > after]
    return [(r["kind"], *(json.dumps(r[name]) for name in COMPARED[r["kind"]])) for r in records]


def resumed_at(said: bytes) -> int | None:
    """The step that a process said it goes on from; None if it did not come so far."""
    for line in said.decode().splitlines():
        if line.startswith("Resuming from "):
            return int(line.rpartition(" ")[2])
        if line.startswith("Starting from "):
            return 0
    return None


def kill_and_compare(framework: str, folder: Path, kills: int, steps: int, seed: int, minutes: float) -> dict:
    """Returns the report; raises AssertionError where a run ended by itself in another way than complete."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str((folder / "compiled").absolute())
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    argv = ["--config", str(settings(folder, steps))]
    importlib.import_module(MAINS[framework])
    importlib.import_module({"flax": "flax_model.backend", "torch": "torch_ref.backend"}[framework])
    straight, broken = folder / "straight", folder / "broken"
    process = start(framework, [*argv, "--run-dir", str(straight)], folder / "straight.out")
    began = time.monotonic()
    assert os.waitpid(process, 0)[1] == 0, (folder / "straight.out").read_text()[-2000:]
    seconds = time.monotonic() - began

    draw, when, lost, unsure, damaged = random.Random(seed), Counter(), [], 0, 0
    before, output = 0, folder / "broken.out"
    output.touch()
    end = time.monotonic() + 60 * minutes
    for number in range(kills):
        if time.monotonic() > end:
            break
        size = output.stat().st_size
        process = start(framework, [*argv, "--run-dir", str(broken)], output)
        kind = draw.choices(KINDS, (1, 2, 3))[0]
        if kind == STARTING:
            time.sleep(draw.uniform(0, 2))
        else:
            steps_first = draw.randint(1, 4 * INTERVAL)
            wait_for(lambda size=size, n=steps_first: output.read_bytes()[size:].count(b"\nStep ") >= n)
            time.sleep(draw.uniform(0, 0.02))
        if kind == SAVING:
            wait_for(lambda: being_written(broken))
            time.sleep(draw.choice((0, 0, 0.001, 0.003, 0.01)))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if status == 0:
            break  # it was complete: there are no more steps to kill
        assert os.WIFSIGNALED(status), f"kill {number}: it had ended by itself: {output.read_text()[-2000:]}"
        said = output.read_bytes()[size:]
        when[kind] += 1
        damaged += b"not a whole checkpoint" in said
        resumed = resumed_at(said)
        if resumed is None:
            unsure += 1
        else:
            lost.append(before - resumed)
        before = max(last_step(broken), before if resumed is None else 0)
    process = start(framework, [*argv, "--run-dir", str(broken)], output)
    assert os.waitpid(process, 0)[1] == 0, output.read_text()[-2000:]
    return {
        "framework": framework,
        "kills": dict(when),
        "steps when the last kill came": before,
        "before it had said where it goes on": unsure,
        "most steps done again": max(lost),
        "half-written checkpoints chosen": damaged,
        "joined log equals the unbroken one": numbers(broken) == numbers(straight),
        "seconds of the unbroken run": round(seconds, 1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m parity_tests.harness.kills", description=__doc__.splitlines()[0])
    parser.add_argument("framework", choices=MAINS, help="The framework whose main is run.")
    parser.add_argument("folder", type=Path, help="A new folder for the runs.")
    parser.add_argument("--kills", type=int, default=100, help="How often to kill; by default %(default)s.")
    parser.add_argument("--steps", type=int, default=3000, help="Steps of the run; by default %(default)s.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the moments; by default %(default)s.")
    parser.add_argument(
        "--minutes", type=float, default=600, help="No more kills after so many minutes; by default %(default)s."
    )
    options = parser.parse_args(argv)
    report = kill_and_compare(
        options.framework, options.folder, options.kills, options.steps, options.seed, options.minutes
    )
    print(json.dumps(report, indent=2))
    return 0 if report["joined log equals the unbroken one"] else 1


if __name__ == "__main__":
    sys.exit(main())
