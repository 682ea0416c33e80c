"""Where a device's time goes: the kernels of one call, by the frameworks' own profilers."""

from __future__ import annotations

import gzip
import json
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

LISTED = 12


class Kernel(NamedTuple):
    name: str
    milliseconds: float
    """Of all calls together."""
    calls: int


def longest(kernels: list[Kernel]) -> Iterable[Kernel]:
    """The sum of all, then those that take most."""
    yield Kernel("all kernels", sum(k.milliseconds for k in kernels), sum(k.calls for k in kernels))
    yield from sorted(kernels, key=lambda kernel: -kernel.milliseconds)[:LISTED]


def torch_kernels(run: Callable[[], Any], device_type: str) -> list[Kernel]:
    """Kernels of one call on CUDA; on the CPU, torch's operations."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_cuda = device_type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as profiler:
        run()
    wanted = DeviceType.CUDA if on_cuda else DeviceType.CPU
    events = [event for event in profiler.key_averages() if event.device_type == wanted]
    return [
        Kernel(event.key, (event.self_device_time_total if on_cuda else event.self_cpu_time_total) / 1e3, event.count)
        for event in events
    ]


def jax_kernels(run: Callable[[], Any]) -> list[Kernel]:
    """Kernels of one call on the GPU; on the CPU, XLA's operations. Numbers that XLA adds to names are cut off."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            run()
        (path,) = Path(folder).rglob("perfetto_trace.json.gz")
        with gzip.open(path) as file:
            events = json.load(file)["traceEvents"]
    return from_perfetto(events)


def from_perfetto(events: list[dict]) -> list[Kernel]:
    """Complete events on the GPU's streams (of a CPU's trace, those of XLA's threads), summed by name."""
    processes = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    gpu = {pid for pid, name in processes.items() if "GPU" in name}

    def counts(event: dict) -> bool:
        thread = threads.get((event["pid"], event["tid"]), "")
        return (event["pid"] in gpu and "Stream" in thread) if gpu else "XLA" in thread

    sums: dict[str, list[float]] = {}
    for event in events:
        if event.get("ph") == "X" and counts(event):
            total = sums.setdefault(re.sub(r"([._]\d+)+$", "", event["name"]), [0.0, 0])
            total[0] += event["dur"] / 1e3
            total[1] += 1
    return [Kernel(name, milliseconds, int(calls)) for name, (milliseconds, calls) in sums.items()]
