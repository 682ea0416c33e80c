"""What is logged of an optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch_ref.spec.flops import bf16_peak, flops_per_token
from torch_ref.spec.interface import Backend, StepResult
from train.run.options import Options
from train.run.progress import Progress
from train.run.runlog import step_line


@dataclass(frozen=True)
class BegunStep:
    """A step under way: its number, the position in the data after its batch, the rows left out of the data so far,
    when the wait for the batch began (by `time.perf_counter`) and its seconds, and what waits for the result."""

    step: int
    cursor: dict
    bad_rows: int
    started: float
    waited: float
    result: Callable[[], StepResult]


def step_measures(
    options: Options, backend: Backend, begun: BegunStep, result: StepResult, progress: Progress, seconds: float
) -> tuple[dict[str, Any], str]:
    """The values of a step for the metrics, and its line for the console; `progress` is that with the step taken note
    of, `seconds` those of the whole step."""
    step = begun.step
    speed, counts = result.tokens / seconds, result.expert_counts
    flops, peak = speed * flops_per_token(options.model, options.seq_len), bf16_peak(backend.device)
    mfu, memory = flops / peak if peak else None, backend.peak_memory
    values = {
        "step": step,
        "phase": "main" if step <= options.steps else "extended",
        "loss": result.loss,
        "balance_loss": result.balance_loss,
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        "tokens": result.tokens,
        "tokens_seen": progress.tokens_seen,
        "tokens_per_second": speed,
        "flops_per_second": flops,
        **({} if mfu is None else {"mfu": mfu}),
        **({} if memory is None else {"peak_memory_bytes": memory}),
        "step_seconds": seconds,
        "data_wait_seconds": begun.waited,
        "applied": result.applied,
        "skipped_steps": progress.skipped_steps,
        "expert_load": (counts.max(axis=1) / counts.mean(axis=1).clip(1e-9)).tolist() if counts.size else [],
        "expert_counts": counts.tolist(),
        "data_position": progress.cursor,
        "bad_rows": begun.bad_rows,
    }
    batches = options.micro_batches
    return values, step_line(step, result.loss, result.learning_rate, seconds, speed, batches, flops, mfu, memory)
