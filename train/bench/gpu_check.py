"""What a GPU computes right, and how fast: `python -m train.bench --gpu-check`, in a few minutes.

    python -m train.bench --gpu-check --budget 450 --json gpu.jsonl          everything, at most 450 s
    python -m train.bench --gpu-check --only step --moe pallas,blocks        train steps alone, in Flax by two paths
    python -m train.bench --gpu-check --device cpu --preset tiny --seq-len 64 --rows 2     the program itself, anywhere

Parts, the most telling first, each a process of its own with the card to itself:

    limits      a large matrix product, reading and copying memory, in torch and JAX
    checks      every attention and expert path against the plain one in full float32: output, gradients, time; and
                torch's compiled layer against the same layer uncompiled
    layers      Flax's gradients of two layers and the loss, compiled as in a step, by every expert path
    step        whole train steps of Flax, torch_ref and `transformers`: speed, peak memory, and their longest kernels
    parity      the ladder on the card in full float32: Flax against torch, 200 training steps, greedy tokens
    decode      prompts and tokens one by one, alone and in a batch of 64

Every row is printed as a line of JSON when it comes, and a table in the end. What the budget does not reach is listed.
The next process imports while one runs, but touches the card only when it is let. The exit code is 1 if anything is
wrong or could not be measured.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from torch_ref.spec.config import PRESETS
from torch_ref.spec.interface import UserError
from torch_ref.spec.storage import user_path, write_errors
from train.bench.cases import Case, at_least_one, with_fractions
from train.shell import shell

PARTS = ("limits", "checks", "layers", "step", "parity", "decode")
SYSTEMS = ("flax", "torch_ref", "transformers")
IMPORTS = {
    "flax": ("jax", "optax", "flax_model.backend"),
    "torch_ref": ("torch", "torch_ref.backend"),
    "transformers": ("torch", "transformers"),
    "both": ("torch", "jax", "flax_model.backend", "torch_ref.backend"),
}
LONGEST_PART = 150
"""Seconds after which a part is stopped, with the rows that it has given."""
WORTH_STARTING = 10
"""Seconds below which no further part is started."""


@dataclass(frozen=True)
class Part:
    """One process: `kind` of `gpu_parts.py`, on a case."""

    name: str
    kind: str
    case: Case

    @property
    def imports(self) -> tuple[str, ...]:
        return IMPORTS["both"] if self.kind == "parity" else IMPORTS.get(self.case.system, ())

    def to_json(self) -> str:
        case = replace(self.case, spawned=time.time())
        return json.dumps({"kind": self.kind, "imports": self.imports, "case": asdict(case)})


def parts(args: argparse.Namespace) -> list[Part]:
    """What the arguments ask for, the most telling first."""
    config = PRESETS[args.preset]
    base = Case("", (), args.preset, "bfloat16", args.seq_len, config.n_routed_experts, micro_batch=args.rows)
    base = replace(base, repeats=args.repeats, device=args.device)
    base = replace(base, new_tokens=min(32, max(2, args.seq_len // 8)), decode_batch=args.decode_batch)
    made = [Part("limits", "case", replace(base, system="ceiling"))]
    made += [
        Part(
            f"checks {system}", "checks", replace(base, system=system, compile="on" if "on" in args.compile else "off")
        )
        for system in SYSTEMS[:2]
        if system in args.systems
    ]
    if "flax" in args.systems:
        made.append(Part("layers flax", "layers", replace(base, system="flax", loss_chunk=4096)))
    for system in args.systems:
        step = replace(base, system=system, tasks=("step", "profile"), loss_chunk=4096)
        variants = {"flax": [{"moe": moe} for moe in args.moe], "torch_ref": [{"compile": on} for on in args.compile]}
        for variant in variants.get(system, [{}]):
            named = (f"{name} {value}" for name, value in variant.items())
            made.append(Part(" ".join(("step", system, *named)), "case", replace(step, **variant)))
    if {"flax", "torch_ref"} <= set(args.systems):
        made.append(Part("parity", "parity", replace(base, system="both")))
    text = replace(base, micro_batch=1, tasks=("prefill", "decode"), repeats=min(3, args.repeats))
    made += [Part(f"decode {system}", "case", replace(text, system=system)) for system in args.systems]
    return [part for part in made if part.name.split()[0] in args.only]


class Process:
    """A part's process. It imports at once and goes on when it is told to."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self._errors = tempfile.TemporaryFile("w+")
        # Two frameworks share the card in some parts: JAX must not take three quarters of it at its start there.
        shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if part.case.system in ("ceiling", "both") else {}
        if part.case.device == "cpu":
            shared["JAX_PLATFORMS"] = "cpu"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "train.bench.gpu_parts", part.to_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **shared},
            start_new_session=True,
        )

    def run(self, seconds: float, take: Callable[[dict], None]) -> str | None:
        """Let it go on for at most so long; `take` gets each row as it comes. Returns what went wrong, or None."""
        reader = threading.Thread(target=self._read, args=(take,))
        reader.start()
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it has died: its exit code says so
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        finally:
            self.stop()
            reader.join()
        if code == 0:
            return None
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        print("\n".join(lines[-12:]), file=sys.stderr)
        return (lines or [f"ended with {code}"])[-1][:300]

    def _read(self, take: Callable[[dict], None]) -> None:
        for line in self._process.stdout:
            if line.startswith("{"):
                take(json.loads(line))

    def stop(self) -> None:
        """End it and all that it started."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()


def measure(wanted: list[Part], budget: float, take: Callable[[dict], None]) -> None:
    """Run the parts one after the other within `budget` seconds; `take` gets each row. A part that fails, runs too long
    or is not reached gives a row that says so."""

    def add(part: Part, row: dict) -> None:
        take({"part": part.name} | row)

    end = time.monotonic() + budget
    queue = iter(wanted)
    ahead = next(queue, None)
    running = ahead and Process(ahead)
    try:
        while running:
            part, process = running.part, running
            remaining = end - time.monotonic()
            if remaining < WORTH_STARTING:
                break
            following = next(queue, None)
            running = following and Process(following)
            start = time.monotonic()
            try:
                problem = process.run(min(LONGEST_PART, remaining), partial(add, part))
            finally:
                process.stop()
            seconds = time.monotonic() - start
            add(part, {"task": "part", "seconds": seconds} | ({"failed": problem} if problem else {}))
    finally:
        if running:
            running.stop()
    for part in ([running.part] if running else []) + list(queue):
        add(part, {"task": "part", "failed": f"not reached within {budget:.0f} s"})


def is_wrong(row: dict) -> bool:
    """Whether a row says that something is wrong or was not measured; a path that a device lacks is no such thing."""
    return "failed" in row or ("bound" in row and not row["error"] <= row["bound"])


def table(rows: list[dict]) -> str:
    """All rows as a Markdown table; what is wrong is marked."""
    lines = ["| part | what | result | of the limit | peak GiB | error, bound |", "|---|---|---:|---:|---:|---|"]
    for row in rows:
        lines.append(f"| {row['part']} | " + " | ".join(cells(row)) + " |")
    return "\n".join(lines)


def cells(row: dict) -> Iterator[str]:
    yield describe(row)
    if "value" in row:
        value = f"{row['value']:,.1f}" if row["value"] < 1000 else f"{row['value']:,.0f}"
        yield f"{value} {row['unit']}" + (f", {row['calls']} calls" if "calls" in row else "")
    else:
        yield f"{row['seconds']:.0f} s" if "seconds" in row else ""
    fractions = [f"{row[key]:.0%}" for key in ("fraction_of_ceiling", "fraction_of_bandwidth") if key in row]
    yield fractions[0] if fractions else f"{row['tflops']:.1f} TFLOP/s" if "tflops" in row else ""
    yield f"{row['peak_memory_gib']:.1f}" if row.get("peak_memory_gib") else ""
    if "bound" in row:
        yield f"{row['error']:.1e}, {row['bound']:.0e}" + (" **WRONG**" if is_wrong(row) else "")
    else:
        yield f"**{row['failed']}**" if "failed" in row else row.get("skipped", "")


def describe(row: dict) -> str:
    if "what" in row:
        return row["what"]
    if row["task"] == "part":
        return "whole part"
    if row["task"] in ("prefill", "decode"):
        return f"{row['task']} {row['micro_batch']} x {row['seq_len']}"
    return row["task"]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m train.bench --gpu-check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--budget", type=float, default=450, help="Seconds that all of it may take; by default %(default)s."
    )
    parser.add_argument(
        "--only", type=words, default=PARTS, help=f"Parts, separated by commas, of {', '.join(PARTS)}; by default all."
    )
    parser.add_argument(
        "--systems",
        type=words,
        default=SYSTEMS,
        help=f"Systems, separated by commas, of {', '.join(SYSTEMS)}; by default all.",
    )
    parser.add_argument("--moe", type=words, default=("auto",), help="Expert paths of Flax's steps; by default auto.")
    parser.add_argument(
        "--compile",
        type=words,
        default=("on", "off"),
        help="Whether torch_ref's layers are compiled; by default on,off.",
    )
    parser.add_argument(
        "--preset", choices=PRESETS, default="smol-774m", help="The model's preset; by default %(default)s."
    )
    parser.add_argument(
        "--rows", type=int, default=8, help="Rows of a step, in one micro-batch; by default %(default)s."
    )
    parser.add_argument("--seq-len", type=int, help="Tokens in a row; by default the model's context.")
    parser.add_argument(
        "--decode-batch", type=int, default=64, help="Number of texts decoded at once; by default %(default)s."
    )
    parser.add_argument(
        "--repeats", type=int, default=10, help="Number of calls after the first; by default %(default)s."
    )
    parser.add_argument("--device", default="auto", help="Where to compute: auto, cuda or cpu.")
    parser.add_argument("--json", type=user_path, help="Also write the rows to this file, as they come.")
    args = parser.parse_args(argv)
    for option, given, known in (("--only", args.only, PARTS), ("--systems", args.systems, SYSTEMS)):
        for name in given:
            if name not in known:
                raise UserError(f"{option} {name}: one of {', '.join(known)}")
    at_least_one(args, "--rows", "--seq-len", "--decode-batch", "--repeats")
    longest = PRESETS[args.preset].max_position
    args.seq_len = longest if args.seq_len is None else args.seq_len
    if not 8 <= args.seq_len <= longest:
        raise UserError(f"--seq-len {args.seq_len}: {args.preset} takes 8 to {longest} tokens")
    if args.json and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: there is no folder {args.json.parent}")
    return args


def words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


@shell
def main(argv: Sequence[str]) -> int:
    """Check and measure; returns the exit code."""
    args = parse(argv)
    wanted = parts(args)
    if not wanted:
        raise UserError(
            f"--only {','.join(args.only)} --systems {','.join(args.systems)}: nothing to check; layers needs flax, "
            "checks flax or torch_ref, parity both"
        )
    rows: list[dict] = []
    if args.json:
        with write_errors(args.json):
            args.json.write_text("")

    def take(row: dict[str, Any]) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        if args.json:
            with write_errors(args.json), args.json.open("a") as file:
                file.write(json.dumps(row) + "\n")

    try:
        measure(wanted, args.budget, take)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        print(f"\n{table(with_fractions(rows))}", flush=True)
    return 1 if any(map(is_wrong, rows)) else 0
