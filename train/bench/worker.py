"""One process of the bench: measures one system, so that neither memory nor threads nor compiled code of one meet
another's. `python -m train.bench.worker CASE` writes one line of JSON per measurement.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from torch_ref.spec.flops import flops_per_token
from torch_ref.spec.memory import process_peak
from train.bench.cases import Case, bytes_per_token, labels, prefill_flops_per_token
from train.bench.profile import longest
from train.bench.systems import SYSTEMS, Flax, Transformers, clocked

GIB = 2**30
READ_BYTES = 2**29
"""Far more than caches hold."""


def measure(case: Case) -> Iterator[dict]:
    """Rows of one process's tasks, in an order in which none disturbs the next."""
    if case.system == "ceiling":
        yield from ceilings(case)
        return
    peak = Peak()
    system = SYSTEMS[case.system](case)
    peak.of, peak.reset_device = system.device_peak, system.reset_peak

    def row(task: str, value: float, unit: str, **more: Any) -> dict:
        return {**labels(case), "task": task, "value": value, "unit": unit, "peak_memory_gib": peak.read(), **more}

    if "startup" in case.tasks:  # from the process's start to the end of its first step
        run = system.step()
        peak.reset()
        before = time.time()
        run()
        after = time.time()
        yield row("startup", after - case.spawned, "s")
        yield row("first step", after - before, "s")
        if isinstance(system, Flax):
            yield row("compile", system.compile_seconds, "s")
    if "gradient" in case.tasks:
        if isinstance(system, Transformers):
            system._choose()
        peak.reset()
        _, seconds = clocked(system.gradient(), case.repeats)
        rate = case.micro_batch * case.seq_len / seconds
        yield row("gradient", rate, "tokens/s", flops_per_token=flops_per_token(case.config, case.seq_len))
    if "step" in case.tasks:
        run = system.step()
        peak.reset()
        _, seconds = clocked(run, case.repeats)
        flops = flops_per_token(case.config, case.seq_len)
        yield row("step", case.tokens / seconds, "tokens/s", flops_per_token=flops, **chosen(system))
        if "profile" in case.tasks:
            for name, milliseconds, calls in longest(system.kernels(run)):
                yield row(name, milliseconds, "ms", calls=calls, peak_memory_gib=None)
    if "checkpoint" in case.tasks:
        if "step" not in case.tasks:
            system.step()()  # moments exist
        with tempfile.TemporaryDirectory() as folder:
            peak.reset()
            start = time.perf_counter()
            path = system.save(Path(folder))
            yield row("save", time.perf_counter() - start, "s")
            peak.reset()
            start = time.perf_counter()
            system.restore(path)
            yield row("restore", time.perf_counter() - start, "s")
    if "input" in case.tasks and case.system != "transformers":
        peak.reset()
        yield row("input", input_rate(case), "tokens/s")
    if "decode" in case.tasks or "prefill" in case.tasks:
        long, short = case.seq_len - 2 * case.new_tokens, min(64, case.seq_len // 4)
        for length, batch in ((long, 1), (short, 1), (short, case.decode_batch)):
            at = replace(case, seq_len=length, micro_batch=batch)
            done = generation(at, system, peak)
            more = {"seq_len": length, "micro_batch": batch, "peak_memory_gib": done.memory}
            if length == long and "prefill" in case.tasks:
                flops = prefill_flops_per_token(at)
                yield row("prefill", length / done.first, "tokens/s", flops_per_token=flops, **more)
            if "decode" in case.tasks:
                if batch == 1:
                    more |= {"bandwidth": done.bandwidth, "fraction_of_bandwidth": done.fraction}
                yield row("decode", batch / done.each, "tokens/s", **more)


class Generation(NamedTuple):
    """Medians over texts."""

    first: float
    """Seconds to the first token."""
    each: float
    """Seconds of each further one."""
    bandwidth: float
    """GB/s, from reading memory in the same process before and after each text."""
    fraction: float
    """Of that bandwidth, as if a token read nothing but `bytes_per_token`."""
    memory: float | None
    """Peak, GiB, where it is known."""


def generation(case: Case, system: Any, peak: Peak) -> Generation:
    """Texts of `new_tokens` after prompts of `seq_len`: `repeats` of them after a first. Memory is read in between,
    since a machine's bandwidth can change from minute to minute by half, if others share it."""
    prompts = case.rows()[0].tolist()
    first, each, memory = [], [], 0.0
    bandwidths = []
    for _ in range(1 + case.repeats):
        bandwidths.append(read_bandwidth(case, system.framework))
        peak.reset()
        times = [time.perf_counter()]
        system.generate(prompts, case.new_tokens, lambda _, times=times: times.append(time.perf_counter()))
        memory = max(memory, peak.read() or 0)
        between = [after - before for before, after in pairwise(times)]
        first.append(between[0])
        each.append(statistics.median(between[1:]))
    bandwidths.append(read_bandwidth(case, system.framework))
    around = [(before + after) / 2 for before, after in pairwise(bandwidths)][1:]
    first, each = first[1:], each[1:]
    fractions = [bytes_per_token(case) / 1e9 / seconds / read for seconds, read in zip(each, around, strict=True)]
    return Generation(*map(statistics.median, (first, each, around, fractions)), memory or None)


def read_bandwidth(case: Case, framework: str) -> float:
    """GB/s of reading memory once."""
    return READ_BYTES / clocked(LIMITS[framework](case).read(), 4)[1] / 1e9


def chosen(system: Any) -> dict:
    return {"experts_implementation": system.implementation} if isinstance(system, Transformers) else {}


class Peak:
    """Peak memory between `reset` and `read`, in GiB: the device's if it has its own, else the process's. None where
    the device does not know."""

    def __init__(self) -> None:
        self.of: Callable[[], int | None] = lambda: None
        self.reset_device: Callable[[], None] = lambda: None

    def reset(self) -> None:
        self.reset_device()
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass  # not Linux: the peak of the process's whole life is read

    def read(self) -> float | None:
        device = self.of()
        if device is not None:
            return device / GIB or None
        process = process_peak()
        return None if process is None else process / GIB


def ceilings(case: Case) -> Iterator[dict]:
    """The machine's limits: one large matrix product, and reading and copying memory, in each framework; the bare
    tokenizer."""

    def row(task: str, value: float, unit: str) -> dict:
        return {**labels(case), "task": task, "value": value, "unit": unit, "peak_memory_gib": None}

    for framework, limits in LIMITS.items():
        try:
            machine = limits(case)
        except ImportError:
            continue
        size = 8192 if machine.accelerated else 2048 if case.repeats < 3 else 4096
        _, seconds = clocked(machine.multiply(size), 2 * case.repeats + 1)
        yield row(f"matmul ({framework})", 2 * size**3 / seconds / 1e9, "GFLOP/s")
        yield row(f"read ({framework})", READ_BYTES / clocked(machine.read(), 4)[1] / 1e9, "GB/s")
        yield row(f"copy ({framework})", 2 * READ_BYTES / clocked(machine.copy(), 4)[1] / 1e9, "GB/s")
    if "input" in case.tasks:
        yield row("input", bare_tokenizer_rate(case), "tokens/s")


class TorchLimits:
    """The longest-known work on a machine, in torch. Each method gives a function to be timed. Operands are random:
    matrices of ones have been seen to multiply faster than real ones."""

    def __init__(self, case: Case) -> None:
        import torch

        from torch_ref.device import resolve_device

        self.torch, self.dtype = torch, getattr(torch, case.dtype)
        self.device = resolve_device(case.device)
        self.accelerated = self.device.type != "cpu"
        self.wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None

    def multiply(self, size: int) -> Callable[[], Any]:
        """One large product, as this project's layers take it: a CPU without bfloat16 units has it in float32."""
        from torch_ref.layers import product

        a, b = (self.torch.randn(size, size, device=self.device).to(self.dtype) for _ in range(2))
        return lambda: (product(a, b), self.wait())

    def read(self) -> Callable[[], Any]:
        """A sum over `READ_BYTES` of memory."""
        memory = self.torch.ones(READ_BYTES // 4, device=self.device)
        return lambda: (memory.sum(), self.wait())

    def copy(self) -> Callable[[], Any]:
        """Reads `READ_BYTES` of memory and writes as many."""
        memory = self.torch.ones(READ_BYTES // 4, device=self.device)
        target = self.torch.empty_like(memory)
        return lambda: (target.copy_(memory), self.wait())


class JaxLimits:
    """`TorchLimits` in JAX."""

    def __init__(self, case: Case) -> None:
        import jax

        from flax_model.device import resolve_device

        self.jax, self.dtype = jax, case.dtype
        self.device = resolve_device(case.device)
        self.accelerated = self.device.platform != "cpu"

    def _timed(self, function: Callable, *operands: Any) -> Callable[[], Any]:
        run = self.jax.jit(function)
        operands = [self.jax.device_put(operand, self.device) for operand in operands]
        return lambda: self.jax.block_until_ready(run(*operands))

    def multiply(self, size: int) -> Callable[[], Any]:
        a, b = (self.jax.random.normal(self.jax.random.key(n), (size, size)).astype(self.dtype) for n in range(2))
        return self._timed(self.jax.numpy.matmul, a, b)

    def read(self) -> Callable[[], Any]:
        return self._timed(self.jax.numpy.sum, self.jax.numpy.ones(READ_BYTES // 4))

    def copy(self) -> Callable[[], Any]:
        return self._timed(self.jax.numpy.negative, self.jax.numpy.ones(READ_BYTES // 4))


LIMITS = {"torch": TorchLimits, "jax": JaxLimits}


def input_options(case: Case) -> Any:
    from train.data.options import DataOptions

    vocab = case.config.vocab_size
    return DataOptions(dataset="python-docs", tokenizer="bpe", vocab_size=min(vocab, 8192), seq_len=case.seq_len)


def input_rate(case: Case) -> float:
    """Tokens a second that tokenising and packing deliver, through the thread that feeds the loop."""
    from train.data.feed import open_data

    with tempfile.TemporaryDirectory() as folder:
        batches = open_data(input_options(case), Path(folder)).batches()
        next(batches)
        start, tokens = time.perf_counter(), 0
        for batch in batches:
            tokens += batch.inputs.size
            if batch.cursor["epoch"] or time.perf_counter() - start > 10:
                break
        seconds = time.perf_counter() - start
        batches.close()
    return tokens / seconds


def bare_tokenizer_rate(case: Case) -> float:
    """Tokens a second of the tokenizer alone on the same text, in one batch."""
    from train.data.feed import open_data
    from train.data.python_docs import python_documents

    texts = [text for _, text in python_documents()]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = open_data(input_options(case), Path(folder)).tokenizer
        tokenizer.encode_batch(texts[:8])
        start = time.perf_counter()
        tokens = sum(len(ids) for ids in tokenizer.encode_batch(texts))
        return tokens / (time.perf_counter() - start)


def worker(text: str) -> None:
    """Measure the case written in `text`; every row is one line of JSON on standard output."""
    fields = json.loads(text)
    case = Case(**{**fields, "tasks": tuple(fields["tasks"])})
    for row in measure(case):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    worker(sys.argv[1])
