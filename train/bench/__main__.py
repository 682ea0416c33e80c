"""How fast it is: `python -m train.bench`, beside `transformers` and the machine's limits, all in one run.

    python -m train.bench --quick                          under two minutes, the tiny model
    python -m train.bench --only step --json rows.json     whole train steps of smol-774m
    python -m train.bench --only sweep --plot sweep.png    lengths, experts, micro-batches
    python -m train.bench --only memory                    precision and rematerialisation, speed against memory
    python -m train.bench --gpu-check                      what a GPU computes right, and how fast (`gpu_check.py`)

Every system is measured in a process of its own, one after the other: a first call that warms up, then the median.
Throughput is also shown as a fraction of the fastest large matrix product that either framework reached in the same
run, in the same precision; decoding as a fraction of the fastest reading of memory. FLOPs are the model's:
recomputation is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from torch_ref.spec.config import PRESETS
from torch_ref.spec.interface import UserError
from torch_ref.spec.memory import host_memory_available
from torch_ref.spec.storage import user_path, write_errors
from train.bench.cases import Case, at_least_one, to_json, with_fractions
from train.shell import INTERRUPTED, shell

TASKS = ("gradient", "step", "startup", "prefill", "decode", "checkpoint", "input", "memory", "sweep")
WITH_SIZES_OF_THEIR_OWN = ("memory", "sweep")
OURS_ALONE = ("input", "memory")
"""Tasks that `transformers` is not asked for."""
SYSTEMS = ("flax", "torch_ref", "transformers")
DTYPES = ("float32", "bfloat16")
SWEEP = {"seq_len": (256, 512, 1024, 2048), "experts": (4, 8, 16, 32), "micro_batch": (1, 2, 4), "accumulation": (1, 4)}
"""What the sweep varies, one at a time, on forward and backward pass or (accumulation) whole steps."""


@dataclass(frozen=True)
class Plan:
    """What the command line asks for."""

    tasks: tuple[str, ...]
    systems: tuple[str, ...]
    preset: str
    dtypes: tuple[str, ...]
    seq_len: int
    experts: int
    sweep_preset: str
    device: str
    repeats: int
    quick: bool

    def cases(self) -> list[Case]:
        """Every process to start, in order: the limits first."""
        tasks = without(self.tasks, *WITH_SIZES_OF_THEIR_OWN)
        cases = []
        for dtype in self.dtypes:
            base = Case("", tasks, self.preset, dtype, self.seq_len, self.experts, repeats=self.repeats)
            base = replace(base, device=self.device, new_tokens=min(32, max(2, self.seq_len // 8)))
            # Which text is tokenised does not depend on the precision, nor do files much: once is enough.
            once = base if dtype == self.dtypes[0] else replace(base, tasks=without(tasks, "input", "checkpoint"))
            cases.append(replace(once, system="ceiling"))
            # A start has a process of its own, where nothing is there yet, and generation one without an optimizer's
            # state.
            apart = ("startup",), ("prefill", "decode")
            parts = [without(once.tasks, *sum(apart, ()))]
            parts += [tuple(task for task in tasks if task in part) for part in apart]
            cases += [replace(once, tasks=part, system=system) for part in parts if part for system in self.systems]
            if "step" in tasks:
                lean = replace(base, tasks=("step",), remat="experts")
                cases += [replace(lean, system=system) for system in self.systems if system != "transformers"]
        if "memory" in self.tasks:
            cases += self.memory()
        if "sweep" in self.tasks:
            cases += self.sweep(self.dtypes[0])
        return cases

    def memory(self) -> list[Case]:
        """Whole steps of 2048 tokens of the sweep's model, in every precision and with every rematerialisation."""
        length = min(512, PRESETS[self.sweep_preset].max_position)
        start = Case("", ("step",), self.sweep_preset, "", length, 8, micro_batch=2048 // length)
        start = replace(start, repeats=self.repeats, device=self.device)
        dtypes = self.dtypes if self.dtypes != DTYPES else (*DTYPES, "float64")
        choices = product(dtypes, ("off", "experts", "layers"), without(self.systems, "transformers"))
        return [replace(start, dtype=dtype, remat=remat, system=system) for dtype, remat, system in choices]

    def sweep(self, dtype: str) -> list[Case]:
        longest = PRESETS[self.sweep_preset].max_position
        start = Case("", ("gradient",), self.sweep_preset, dtype, min(256 if self.quick else 1024, longest), 8)
        start = replace(start, repeats=self.repeats, device=self.device)
        cases = [start]
        for field, values in SWEEP.items():
            for value in values[:2] if self.quick else values:
                tasks = ("step",) if field == "accumulation" else start.tasks
                cases.append(replace(start, tasks=tasks, **{field: value}))
        cases = list(dict.fromkeys(case for case in cases if case.seq_len <= longest))
        return [replace(case, system=system) for case in cases for system in self.systems]


def without(tasks: tuple[str, ...], *left_out: str) -> tuple[str, ...]:
    return tuple(task for task in tasks if task not in left_out)


def run_case(case: Case) -> list[dict]:
    """Rows of one process. One that fails (too little memory, a framework not installed) gives a line on standard
    error, and the rows it had measured by then."""
    command = [sys.executable, "-m", "train.bench.worker", to_json(replace(case, spawned=time.time()))]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TOKENIZERS_PARALLELISM": "true"})
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}; out of memory?"])[-1]
        print(f"{case.system} {case.preset} {case.dtype} {'/'.join(case.tasks)}: {reason}", file=sys.stderr)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table: what was measured down, systems across, and ours over `transformers`."""
    keys = ("task", "preset", "dtype", "seq_len", "experts", "micro_batch", "accumulation", "remat")
    lines = ["| task | model | dtype | tokens | experts | batch | " + " | ".join((*SYSTEMS, "ceiling")) + " |"]
    lines.append("|---" * 6 + "|---:" * (len(SYSTEMS) + 1) + "|")
    for key in dict.fromkeys(tuple(row[name] for name in keys) for row in rows):
        same = {row["system"]: row for row in rows if tuple(row[name] for name in keys) == key}
        fast = {row["system"]: row for row in rows if tuple(row[name] for name in keys) == (*key[:-1], "off")}
        other = fast.get("transformers")
        cells = [cell(same.get(system), other) for system in (*SYSTEMS, "ceiling")]
        task, preset, dtype, seq_len, experts, micro_batch, accumulation, remat = key
        task += "" if remat == "off" else f", remat {remat}"
        batch = f"{micro_batch}" if accumulation == 1 else f"{micro_batch} x {accumulation}"
        lines.append(f"| {task} | {preset} | {dtype} | {seq_len} | {experts} | {batch} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(row: dict | None, other: dict | None) -> str:
    if row is None:
        return ""
    value, unit = row["value"], row["unit"]
    parts = [f"{value:,.1f} {unit}" if value < 1000 else f"{value:,.0f} {unit}"]
    if other is not None and row["system"] != "transformers" and value > 0 and other["value"] > 0:
        parts.append(f"{value / other['value'] if unit != 's' else other['value'] / value:.2f}x")
    if "fraction_of_ceiling" in row:
        parts.append(f"{row['fraction_of_ceiling']:.0%} of ceiling")
    if "fraction_of_bandwidth" in row:
        parts.append(f"{row['fraction_of_bandwidth']:.0%} of bandwidth")
    if row["peak_memory_gib"] is not None and row["task"] in ("gradient", "step"):
        parts.append(f"{row['peak_memory_gib']:.1f} GiB")
    return ", ".join(parts)


def draw(rows: list[dict], path: Path) -> None:
    """Throughput over length, experts and micro-batch, a line per system."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from train.plot import COLORS, STYLE

    swept = [name for name in SWEEP if name != "accumulation"]
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 3.2), layout="constrained")
        for axes, field in zip(figure.subplots(1, len(swept)), swept, strict=True):
            fixed = [name for name in swept if name != field]
            passes = [row for row in rows if row["task"] == "gradient" and row["remat"] == "off"]
            # The line along this field is the one with the most points.
            groups: dict[tuple, set] = {}
            for row in passes:
                groups.setdefault((row["preset"], row["dtype"], *(row[name] for name in fixed)), set()).add(row[field])
            if not groups:
                continue
            best = max(groups, key=lambda group: len(groups[group]))
            for system, color in zip(SYSTEMS, COLORS, strict=False):
                points = sorted(
                    (row[field], row["value"])
                    for row in passes
                    if row["system"] == system and (row["preset"], row["dtype"], *(row[name] for name in fixed)) == best
                )
                axes.plot(*zip(*points, strict=True), "o-", color=color, label=system) if points else None
            axes.set(title=f"tokens/s over {field.replace('_', ' ')}", xlabel=field.replace("_", " "))
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted(groups[best]), [str(value) for value in sorted(groups[best])])
            axes.set_ylim(bottom=0)
        figure.axes[0].legend()
        figure.savefig(path, dpi=150)


def machine() -> str:
    """Core count and instruction set, for the table's heading: numbers mean nothing without them."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split()
        sets = [name for name in ("amx_tile", "avx512_bf16", "avx512f", "avx2") if name in flags][:2]
    except (OSError, IndexError):
        sets = []
    memory = host_memory_available()
    parts = [f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores", *sets]
    return ", ".join(parts + ([f"{memory / 2**30:.0f} GiB of memory free"] if memory else []))


def parse(argv: Sequence[str]) -> tuple[Plan, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="python -m train.bench", description=__doc__.split("\n\n", 1)[0])
    parser.add_argument(
        "--only",
        help=f"Tasks, separated by commas, of {', '.join(TASKS)}; by default all, but memory and sweep with --quick.",
    )
    parser.add_argument("--systems", help=f"Systems, separated by commas, of {', '.join(SYSTEMS)}; by default all.")
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="The model's preset, of all but sweep and memory; by default smol-774m, tiny with --quick.",
    )
    parser.add_argument(
        "--sweep-preset", choices=PRESETS, help="The preset of sweep and memory; by default small, tiny with --quick."
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="Precision to measure in; by default both, float32 with --quick."
    )
    parser.add_argument(
        "--seq-len",
        type=int,
        help="Tokens in a row, of all but sweep and memory; by default the model's context, at most 256 with --quick.",
    )
    parser.add_argument(
        "--experts", type=int, help="Number of routed experts, of all but sweep and memory; by default the model's."
    )
    parser.add_argument("--device", default="auto", help="Where to compute: auto, cpu or cuda.")
    parser.add_argument(
        "--repeats", type=int, help="Calls after the first, of which the median counts; by default 3, 2 with --quick."
    )
    parser.add_argument(
        "--quick", action="store_true", help="Take the tiny model and few repeats: ends within two minutes."
    )
    parser.add_argument(
        "--gpu-check", action="store_true", help="Check a GPU instead: another program, with a --help of its own."
    )
    parser.add_argument("--json", type=user_path, help="Write the rows to this file, too.")
    parser.add_argument("--plot", type=user_path, help="Draw the gradient rows to this PNG file.")
    args = parser.parse_args(argv)
    at_least_one(args, "--seq-len", "--experts", "--repeats")
    tasks = names("--only", args.only, TASKS if not args.quick else without(TASKS, *WITH_SIZES_OF_THEIR_OWN))
    systems = names("--systems", args.systems, SYSTEMS)
    if not without(tasks, *WITH_SIZES_OF_THEIR_OWN):
        for option, given in (("--preset", args.preset), ("--seq-len", args.seq_len), ("--experts", args.experts)):
            if given is not None:
                raise UserError(
                    f"{option} {given}: not for --only {args.only}, with sizes of its own; leave it out "
                    "(--sweep-preset chooses the model)"
                )
    if set(systems) == {"transformers"} and not without(tasks, *OURS_ALONE):
        raise UserError(
            f"--only {args.only} --systems {args.systems}: not measured of transformers; add flax or torch_ref"
        )
    preset = args.preset or ("tiny" if args.quick else "smol-774m")
    config = PRESETS[preset]
    default = min(256, config.max_position) if args.quick else config.max_position
    seq_len = default if args.seq_len is None else args.seq_len
    if not 8 <= seq_len <= config.max_position:
        raise UserError(f"--seq-len {seq_len}: {preset} takes 8 to {config.max_position} tokens")
    experts = config.n_routed_experts if args.experts is None else args.experts
    if experts < config.num_experts_per_tok:
        raise UserError(f"--experts {experts}: {preset} chooses {config.num_experts_per_tok} of them for a token")
    plan = Plan(
        tasks=tasks,
        systems=systems,
        preset=preset,
        dtypes=(args.dtype,) if args.dtype else (DTYPES[:1] if args.quick else DTYPES),
        seq_len=seq_len,
        experts=experts,
        sweep_preset=args.sweep_preset or ("tiny" if args.quick else "small"),
        device=args.device,
        repeats=args.repeats or (2 if args.quick else 3),
        quick=args.quick,
    )
    return plan, args


def names(option: str, given: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """What a comma-separated option chooses. Raises `UserError` naming one that does not exist."""
    if given is None:
        return known
    chosen = tuple(name.strip() for name in given.split(","))
    allowed = TASKS if option == "--only" else known
    for name in chosen:
        if name not in allowed:
            raise UserError(f"{option} {name}: one of {', '.join(allowed)}")
    return chosen


@shell
def main(argv: Sequence[str]) -> int:
    """Measure what the arguments ask for; returns the exit code."""
    if "--gpu-check" in argv:
        from train.bench import gpu_check

        return gpu_check.main([word for word in argv if word != "--gpu-check"])
    plan, args = parse(argv)
    for path in filter(None, (args.json, args.plot)):
        if not path.parent.is_dir():
            raise UserError(f"{path}: there is no folder {path.parent}")
    if args.plot:
        from train.plot import require_png

        require_png("--plot", args.plot)
    print(f"{machine()}\n")
    rows: list[dict] = []
    interrupted = False
    try:
        for case in plan.cases():
            rows += run_case(case)
            if args.json:  # after every process, so that a run that dies leaves what it had
                with write_errors(args.json):
                    args.json.write_text(json.dumps(with_fractions(map(dict, rows)), indent=1) + "\n")
    except KeyboardInterrupt:
        interrupted = True
    rows = with_fractions(rows)
    print(table(rows))
    if interrupted:
        return INTERRUPTED
    if args.plot:
        with write_errors(args.plot):
            draw(rows, args.plot)
    return 0 if any(row["system"] != "ceiling" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
