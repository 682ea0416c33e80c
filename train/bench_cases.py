"""What `train/bench.py` measures, one class per system. Each runs in a process of its own (`worker`), so that neither
memory nor threads nor compiled code of one system meet another's.

A system's constructor and methods do the work of a user of that system; the functions around them hold the clock.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from torch_ref.config import PRESETS, ComputeConfig, ModelConfig
from torch_ref.interface import OptimizerConfig, Sampling
from torch_ref.parameters import count_active_parameters, initial_values

GIB = 2**30


@dataclass(frozen=True)
class Case:
    """One process: what it measures, on which sizes. All of it can be written as JSON."""

    system: str
    tasks: tuple[str, ...]
    preset: str
    dtype: str
    seq_len: int
    experts: int
    micro_batch: int = 1
    accumulation: int = 1
    """Micro-batches of a step."""
    remat: str = "off"
    repeats: int = 3
    new_tokens: int = 32
    device: str = "auto"
    spawned: float = 0.0
    """When the process was started, in seconds since the epoch."""

    @property
    def config(self) -> ModelConfig:
        return replace(PRESETS[self.preset], n_routed_experts=self.experts)

    @property
    def compute(self) -> ComputeConfig:
        return ComputeConfig(dtype=self.dtype, remat=self.remat)

    @property
    def optimizer(self) -> OptimizerConfig:
        return OptimizerConfig(schedule=lambda step: 1e-4, micro_batch_size=self.micro_batch)

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.micro_batch * self.accumulation * self.seq_len

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of one step, random."""
        generator = np.random.default_rng(0)
        shape = self.micro_batch * self.accumulation, self.seq_len + 1
        ids = generator.integers(1, self.config.vocab_size, shape, dtype=np.int32)
        return ids[:, :-1], ids[:, 1:]


def clocked(function: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Seconds of the first call, and the median of `repeats` further ones. The function returns when its work is
    done."""
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return times[0], statistics.median(times[1:])


class TorchRef:
    """This project's torch side."""

    def __init__(self, case: Case) -> None:
        import torch

        from torch_ref.backend import TorchBackend

        self.case, self.torch = case, torch
        self.backend = TorchBackend(case.config, case.compute, case.optimizer, case.device)
        self.backend.init(0)
        self.kind = self.backend.model.embed_tokens.weight.device.type

    def gradient(self) -> Callable[[], Any]:
        """Forward and backward pass of one micro-batch, without the optimizer."""
        from torch_ref.model import objective

        model, compute, device = self.backend.model, self.backend.compute, self.kind
        inputs, targets = (
            self.torch.from_numpy(x[: self.case.micro_batch].copy()).to(device) for x in self.case.rows()
        )

        def run() -> None:
            total, _ = objective(model, inputs, targets, compute, targets.numel(), len(inputs))
            total.backward()
            model.zero_grad(set_to_none=True)
            self.wait()

        return run

    def step(self) -> Callable[[], Any]:
        rows = self.case.rows()
        return lambda: self.backend.step(*rows)

    def generate(self, prompt: list[int], new_tokens: int) -> None:
        self.backend.generate(prompt, Sampling(max_new_tokens=new_tokens, greedy=True, stop_token=None), 0)

    def save(self, folder: Path) -> Path:
        path = self.backend.save(folder, "step_1", {})
        self.backend.wait()
        return path

    def restore(self, path: Path) -> None:
        self.backend.restore(path)

    def wait(self) -> None:
        if self.kind == "cuda":
            self.torch.cuda.synchronize()

    def device_peak(self) -> int | None:
        return self.torch.cuda.max_memory_allocated() if self.kind == "cuda" else None


class Flax:
    """This project's Flax side."""

    def __init__(self, case: Case) -> None:
        from flax_model.backend import FlaxBackend  # imported here, so that start-up counts it

        self.case, self._backend = case, FlaxBackend

    @cached_property
    def backend(self) -> Any:
        backend = self._backend(self.case.config, self.case.compute, self.case.optimizer, self.case.device)
        backend.init(0)
        return backend

    def gradient(self) -> Callable[[], Any]:
        """Forward and backward pass of one micro-batch, on parameters without an optimizer's state."""
        import jax

        from flax_model.device import resolve_compute, resolve_device
        from flax_model.model import from_values, merge, objective

        case, device = self.case, resolve_device(self.case.device)
        compute = resolve_compute(case.compute, device)
        inputs, targets = (jax.device_put(x[: case.micro_batch], device) for x in case.rows())
        graphdef, params, biases = from_values(case.config, initial_values(case.config, 0), compute.param_dtype)

        def share(params: dict, biases: dict) -> Any:
            return objective(merge(graphdef, params, biases), inputs, targets, compute, inputs.size, len(inputs))

        gradient = jax.jit(jax.grad(share, has_aux=True))
        return lambda: jax.block_until_ready(gradient(params, biases))

    def step(self) -> Callable[[], Any]:
        backend, rows = self.backend, self.case.rows()
        return lambda: backend.step(*rows)

    def generate(self, prompt: list[int], new_tokens: int) -> None:
        self.backend.generate(prompt, Sampling(max_new_tokens=new_tokens, greedy=True, stop_token=None), 0)

    def save(self, folder: Path) -> Path:
        path = self.backend.save(folder, "step_1", {})
        self.backend.wait()
        return path

    def restore(self, path: Path) -> None:
        self.backend.restore(path)

    def device_peak(self) -> int | None:
        import jax

        device = jax.devices()[0]
        return device.memory_stats()["peak_bytes_in_use"] if device.platform == "gpu" else None


class Transformers:
    """DeepseekV3 of `transformers` with the same sizes, trained as its users do: AdamW of torch, clipping, autocast for
    bfloat16. Of its expert implementations the fastest is taken, tried on one forward and backward pass."""

    IMPLEMENTATIONS = ("grouped_mm", "eager")
    """Its `batched_mm` copies an expert's weights for every token, 10 MB each at `smol-774m`: no option here."""

    def __init__(self, case: Case) -> None:
        import torch
        import transformers

        from torch_ref.device import resolve_device
        from torch_ref.huggingface_config import transformers_config

        self.case, self.torch = case, torch
        self.kind = resolve_device(case.device).type
        config = transformers.DeepseekV3Config(**transformers_config(case.config, "float32", end_of_text=0))
        self.model = transformers.DeepseekV3ForCausalLM(config).to(self.kind)
        self.implementation: str | None = None
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)

    def _pass(self, inputs: Any) -> None:
        with self.torch.autocast(self.kind, self.torch.bfloat16, enabled=self.case.dtype == "bfloat16"):
            loss = self.model(inputs, labels=inputs, use_cache=False).loss
        (loss / self.case.accumulation).backward()

    def _choose(self) -> None:
        """Settle on the fastest expert implementation."""
        if self.implementation is None:
            seconds = {}
            for name in self.IMPLEMENTATIONS:
                self.model.set_experts_implementation(name)
                try:
                    seconds[name] = sum(clocked(self.gradient(), 1)) / 2
                except (RuntimeError, NotImplementedError) as error:
                    print(f"transformers, experts {name}: {str(error).splitlines()[0]}", file=sys.stderr)
            self.implementation = min(seconds, key=seconds.__getitem__)
            self.model.set_experts_implementation(self.implementation)

    def _rows(self) -> Any:
        return self.torch.from_numpy(self.case.rows()[0].astype(np.int64)).to(self.kind)

    def gradient(self) -> Callable[[], Any]:
        inputs = self._rows()[: self.case.micro_batch]

        def run() -> None:
            self._pass(inputs)
            self.model.zero_grad(set_to_none=True)
            self.wait()

        return run

    def step(self) -> Callable[[], Any]:
        self._choose()
        rows = self._rows().split(self.case.micro_batch)

        def run() -> None:
            for inputs in rows:
                self._pass(inputs)
            self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.wait()

        return run

    def generate(self, prompt: list[int], new_tokens: int) -> None:
        ids = self.torch.tensor([prompt], device=self.kind)
        # Its best for decoding: weights in the compute dtype, from the state that training left.
        with self.torch.autocast(self.kind, self.torch.bfloat16, enabled=self.case.dtype == "bfloat16"):
            self.model.generate(
                ids,
                attention_mask=self.torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )

    def save(self, folder: Path) -> Path:
        path = folder / "step_1.pt"
        self.torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, path)
        return path

    def restore(self, path: Path) -> None:
        state = self.torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    wait, device_peak = TorchRef.wait, TorchRef.device_peak


SYSTEMS = {"flax": Flax, "torch_ref": TorchRef, "transformers": Transformers}


def measure(case: Case) -> Iterator[dict]:
    """Rows of one process's tasks, in an order in which none disturbs the next."""
    if case.system == "ceiling":
        yield from ceilings(case)
        return
    peak = Peak()
    system = SYSTEMS[case.system](case)
    peak.of = system.device_peak
    ready = time.time() - case.spawned

    def row(task: str, value: float, unit: str, **more: Any) -> dict:
        return {**labels(case), "task": task, "value": value, "unit": unit, "peak_memory_gb": peak.read(), **more}

    if "gradient" in case.tasks:
        if isinstance(system, Transformers):
            system._choose()
        peak.reset()
        _, seconds = clocked(system.gradient(), case.repeats)
        rate = case.micro_batch * case.seq_len / seconds
        yield row("gradient", rate, "tokens/s", flops_per_token=flops_per_token(case))
    if "step" in case.tasks or "startup" in case.tasks:
        before = time.time()
        run = system.step()
        peak.reset()
        first, seconds = clocked(run, case.repeats)
        yield row("step", case.tokens / seconds, "tokens/s", flops_per_token=flops_per_token(case), **chosen(system))
        if case.remat == "off":
            yield row("startup", ready + time.time() - before - case.repeats * seconds, "s")
            yield row("compile", max(first - seconds, 0.0), "s")
    if "decode" in case.tasks or "prefill" in case.tasks:
        prompt = case.rows()[0][0, : case.seq_len - case.new_tokens].tolist()
        peak.reset()
        _, one = clocked(lambda: system.generate(prompt, 1), case.repeats)
        yield row("prefill", len(prompt) / one, "tokens/s", flops_per_token=flops_per_token(case, backward=False))
        _, many = clocked(lambda: system.generate(prompt, case.new_tokens), case.repeats)
        yield row("decode", (case.new_tokens - 1) / max(many - one, 1e-9), "tokens/s")
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
        yield row("input", input_rate(case), "tokens/s")


def chosen(system: Any) -> dict:
    return {"experts_implementation": system.implementation} if isinstance(system, Transformers) else {}


def labels(case: Case) -> dict:
    """What says which measurement a row is of."""
    names = "system preset dtype seq_len experts micro_batch accumulation remat".split()
    return {name: getattr(case, name) for name in names}


def flops_per_token(case: Case, backward: bool = True) -> float:
    """Model FLOPs of one token, averaged over a sequence: two for every active weight in a product (the embedding
    once, as the output layer), and attention's products with the keys a token may see; the backward pass costs twice
    the forward pass. What rematerialisation computes again does not count."""
    c = case.config
    attention = 2 * c.num_layers * c.num_heads * (c.qk_head_dim + c.v_head_dim) * (case.seq_len + 1) / 2
    return (2 * count_active_parameters(c) + attention) * (3 if backward else 1)


class Peak:
    """Peak memory between `reset` and `read`, in GiB: the device's if it has its own, else the process's."""

    def __init__(self) -> None:
        self.of: Callable[[], int | None] = lambda: None

    def reset(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass  # not Linux: the peak of the process's whole life is read

    def read(self) -> float:
        device = self.of()
        if device is not None:
            return device / GIB
        try:
            fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            return int(fields["VmHWM"].split()[0]) * 1024 / GIB
        except (OSError, KeyError):
            import resource

            scale = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / GIB


def ceilings(case: Case) -> Iterator[dict]:
    """The machine's limits: one large matrix product in each framework, reading memory, the bare tokenizer."""

    def row(task: str, value: float, unit: str) -> dict:
        return {**labels(case), "task": task, "value": value, "unit": unit, "peak_memory_gb": None}

    size = 2048 if case.repeats < 3 else 4096
    for framework in ("torch", "jax"):
        run = product(framework, size, case)
        if run is not None:
            _, seconds = clocked(run, 2 * case.repeats + 1)
            yield row(f"matmul ({framework})", 2 * size**3 / seconds / 1e9, "GFLOP/s")
    if "input" in case.tasks:
        yield row("input", bare_tokenizer_rate(case), "tokens/s")


def product(framework: str, size: int, case: Case) -> Callable[[], Any] | None:
    """One large product in a framework, or None where that is not installed."""
    try:
        if framework == "torch":
            import torch

            from torch_ref.device import resolve_device

            device = resolve_device(case.device)
            a = torch.ones(size, size, dtype=getattr(torch, case.dtype), device=device)

            def run() -> None:
                torch.mm(a, a)
                if device.type == "cuda":
                    torch.cuda.synchronize()

            return run
        import jax
        import jax.numpy as jnp

        b = jnp.ones((size, size), case.dtype)
        multiply = jax.jit(jnp.matmul)
        return lambda: jax.block_until_ready(multiply(b, b))
    except ImportError:
        return None


def input_options(case: Case, folder: str) -> Any:
    from train.packing import DataOptions

    vocab = case.config.vocab_size
    return DataOptions("python-docs", tokenizer="bpe", vocab_size=min(vocab, 8192), seq_len=case.seq_len)


def input_rate(case: Case) -> float:
    """Tokens a second that tokenising and packing deliver, through the thread that feeds the loop."""
    from train.packing import open_data

    with tempfile.TemporaryDirectory() as folder:
        batches = open_data(input_options(case, folder), Path(folder)).batches()
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
    from train.packing import open_data
    from train.sources import python_documents

    texts = [text for _, text in python_documents()]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = open_data(input_options(case, folder), Path(folder)).tokenizer
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


def to_json(case: Case) -> str:
    return json.dumps(asdict(case))


if __name__ == "__main__":
    worker(sys.argv[1])
