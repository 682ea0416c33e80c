"""The systems that the bench compares. A system's constructor and methods do the work of a user of that system;
`worker.py` holds the clock.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from torch_ref.spec.config import ComputeConfig
from torch_ref.spec.interface import Sampling
from torch_ref.spec.parameters import initial_values
from torch_ref.spec.storage import first_line
from train.bench.cases import Case
from train.bench.profile import Kernel, jax_kernels, torch_kernels


def clocked(function: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Seconds of the first call, and the median of `repeats` further ones. The function returns when its work is
    done."""
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return times[0], statistics.median(times[1:])


Prompts = list[list[int]]
Tick = Callable[[Any], None]
"""Called whenever every row of a batch has a new token."""


def greedy(new_tokens: int) -> Sampling:
    return Sampling(max_new_tokens=new_tokens, greedy=True, stop_token=None)


class Ours:
    """What both sides of this project are asked in the same words. A side sets what is declared here."""

    framework: str
    """In which memory is read, to compare with."""
    case: Case
    device: Any
    compute: ComputeConfig
    _backend: Callable
    """Its backend's class."""
    _generate: Callable
    """Its `generate` with the weights alone, no optimizer, as `python -m train.generate` holds them."""

    @cached_property
    def backend(self) -> Any:
        backend = self._backend(self.case.config, self.case.compute, self.case.optimizer, self.case.device)
        backend.init(0)
        return backend

    def step(self) -> Callable[[], Any]:
        backend, rows = self.backend, self.case.rows()
        return lambda: backend.step(*rows)

    def generate(self, prompts: Prompts, new_tokens: int, tick: Tick) -> None:
        self._generate(prompts, greedy(new_tokens), 0, self.compute, tick)

    def save(self, folder: Path) -> Path:
        path = self.backend.save(folder, "step_1", {})
        self.backend.wait()
        return path

    def restore(self, path: Path) -> None:
        self.backend.restore(path)


class TorchRef(Ours):
    """This project's torch side."""

    framework = "torch"

    def __init__(self, case: Case) -> None:
        import torch

        from torch_ref.backend import TorchBackend
        from torch_ref.device import resolve_compute, resolve_device

        self.case, self.torch, self._backend = case, torch, TorchBackend
        self.device = resolve_device(case.device)
        self.compute = resolve_compute(case.compute, self.device)

    def gradient(self) -> Callable[[], Any]:
        """Forward and backward pass of one micro-batch, without the optimizer."""
        from torch_ref.model import objective

        model, compute = self.backend.model, self.compute
        inputs, targets = (
            self.torch.from_numpy(x[: self.case.micro_batch].copy()).to(self.device) for x in self.case.rows()
        )

        def run() -> None:
            total, _ = objective(model, inputs, targets, compute, targets.numel(), len(inputs))
            total.backward()
            model.zero_grad(set_to_none=True)
            self.wait()

        return run

    @cached_property
    def _generate(self) -> Callable:
        from torch_ref.generate import cast_weights, generate
        from torch_ref.model import Model

        config, dtype = self.case.config, getattr(self.torch, self.compute.param_dtype)
        model = Model(config, self.device, dtype).load_values(initial_values(config, 0))
        cast_weights(model, self.compute)
        return partial(generate, model)

    def wait(self) -> None:
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()

    def reset_peak(self) -> None:
        if self.device.type == "cuda":
            self.torch.cuda.reset_peak_memory_stats()

    def device_peak(self) -> int | None:
        return self.torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None

    def kernels(self, run: Callable[[], Any]) -> list[Kernel]:
        return torch_kernels(run, self.device.type)


class Flax(Ours):
    """This project's Flax side."""

    framework = "jax"

    def __init__(self, case: Case) -> None:
        import jax

        from flax_model.backend import FlaxBackend  # imported here, so that start-up counts it
        from flax_model.device import resolve_compute, resolve_device

        self.compile_seconds, self.earlier_peak = 0.0, 0
        jax.monitoring.register_event_duration_secs_listener(self._count_compiling)
        self.case, self._backend = case, FlaxBackend
        if "startup" in case.tasks:  # as `train.flax_main` does
            self._backend = partial(FlaxBackend, expected_batch=case.rows()[0].shape)
        self.device = resolve_device(case.device)
        self.compute = resolve_compute(case.compute, self.device, case.config)

    def _count_compiling(self, event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.compile_seconds += seconds

    def gradient(self) -> Callable[[], Any]:
        """Forward and backward pass of one micro-batch, on parameters without an optimizer's state."""
        import jax

        from flax_model.model import objective
        from flax_model.trees import merge
        from flax_model.values import from_values

        case, compute = self.case, self.compute
        inputs, targets = (jax.device_put(x[: case.micro_batch], self.device) for x in case.rows())
        graphdef, params, biases = from_values(case.config, initial_values(case.config, 0), compute.param_dtype)

        def share(params: dict, biases: dict) -> Any:
            return objective(merge(graphdef, params, biases), inputs, targets, compute, inputs.size, len(inputs))

        gradient = jax.jit(jax.grad(share, has_aux=True))
        return lambda: jax.block_until_ready(gradient(params, biases))

    @cached_property
    def _generate(self) -> Callable:
        from flax_model.generate import cast_weights, generate
        from flax_model.trees import merge
        from flax_model.values import from_values

        config, dtype = self.case.config, self.compute.param_dtype
        graphdef, params, biases = from_values(config, initial_values(config, 0), dtype)
        return partial(generate, merge(graphdef, cast_weights(params, self.compute), biases))

    def reset_peak(self) -> None:
        self.earlier_peak = self._peak()

    def device_peak(self) -> int | None:
        """JAX cannot reset its peak: where it has not risen since `reset_peak`, 0 says that it is not known."""
        return None if self.device.platform == "cpu" else self._peak() * (self._peak() > self.earlier_peak)

    def _peak(self) -> int:
        return (self.device.memory_stats() or {}).get("peak_bytes_in_use", 0)

    def kernels(self, run: Callable[[], Any]) -> list[Kernel]:
        return jax_kernels(run)


class Ticker:
    """A streamer of `transformers` that passes on when tokens come, after the prompt, which it is given first."""

    def __init__(self, tick: Tick) -> None:
        self._tick, self._prompt_seen = tick, False

    def put(self, ids: Any) -> None:
        if self._prompt_seen:
            self._tick(ids)
        self._prompt_seen = True

    def end(self) -> None:
        pass


class Transformers:
    """DeepseekV3 of `transformers` with the same sizes, trained as its users do: AdamW of torch, clipping, autocast for
    bfloat16. Of its expert implementations the fastest is taken, tried on one forward and backward pass."""

    framework = "torch"
    IMPLEMENTATIONS = ("grouped_mm", "eager")
    """Its `batched_mm` copies an expert's weights for every token, 10 MB each at `smol-774m`: no option here."""

    def __init__(self, case: Case) -> None:
        import torch
        import transformers

        from torch_ref.device import resolve_device
        from torch_ref.spec.huggingface_config import transformers_config

        self.case, self.torch = case, torch
        self.device = resolve_device(case.device)
        if case.dtype == "bfloat16" and self.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
            raise NotImplementedError("left out: torch's bfloat16 products take hours on a CPU without AVX-512")
        config = transformers.DeepseekV3Config(**transformers_config(case.config, "float32", end_of_text=0))
        self.model = transformers.DeepseekV3ForCausalLM(config).to(self.device)
        self.implementation: str | None = None

    @cached_property
    def optimizer(self) -> Any:
        return self.torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)

    def _pass(self, inputs: Any) -> None:
        with self.torch.autocast(self.device.type, self.torch.bfloat16, enabled=self.case.dtype == "bfloat16"):
            loss = self.model(inputs, labels=inputs, use_cache=False).loss
        (loss / self.case.accumulation).backward()

    def _choose(self) -> None:
        """Settle on an expert implementation: the fastest, or where a start is measured, which must not contain the
        trying, the first."""
        if self.implementation is None:
            self.implementation = self.IMPLEMENTATIONS[0] if "startup" in self.case.tasks else self._fastest()
            self.model.set_experts_implementation(self.implementation)

    def _fastest(self) -> str:
        seconds = {}
        for name in self.IMPLEMENTATIONS:
            self.model.set_experts_implementation(name)
            try:
                seconds[name] = sum(clocked(self.gradient(), 1)) / 2
            except (RuntimeError, NotImplementedError) as error:
                print(f"transformers, experts {name}: {first_line(error)}", file=sys.stderr)
        return min(seconds, key=seconds.__getitem__)

    def _rows(self) -> Any:
        return self.torch.from_numpy(self.case.rows()[0].astype(np.int64)).to(self.device)

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

    def generate(self, prompts: Prompts, new_tokens: int, tick: Tick) -> None:
        """With its cache, weights in the compute dtype, and its own choice of expert implementation for decoding."""
        dtype = getattr(self.torch, self.case.dtype)
        if self.model.dtype != dtype:
            self.model.to(dtype)
        ids = self.torch.tensor(prompts, device=self.device)
        self.model.generate(
            ids,
            attention_mask=self.torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=Ticker(tick),
        )

    def save(self, folder: Path) -> Path:
        path = folder / "step_1.pt"
        self.torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, path)
        return path

    def restore(self, path: Path) -> None:
        state = self.torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    wait, reset_peak, device_peak = TorchRef.wait, TorchRef.reset_peak, TorchRef.device_peak
    kernels = TorchRef.kernels


SYSTEMS = {"flax": Flax, "torch_ref": TorchRef, "transformers": Transformers}
