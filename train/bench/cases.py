"""What `train/bench/__main__.py` can measure: one process's sizes and tasks, and the work that is in them."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

import numpy as np

from torch_ref.spec.config import PRESETS, ComputeConfig, ModelConfig
from torch_ref.spec.flops import flops_per_token
from torch_ref.spec.interface import OptimizerConfig, UserError
from torch_ref.spec.parameters import count_active_parameters


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
    attention: str = "auto"
    moe: str = "auto"
    compile: str = "auto"
    loss_chunk: int = 512
    repeats: int = 3
    new_tokens: int = 32
    """Of a generated text."""
    decode_batch: int = 8
    """Of the larger batch of generated texts."""
    device: str = "auto"
    spawned: float = 0.0
    """When the process was started, in seconds since the epoch."""

    @property
    def config(self) -> ModelConfig:
        return replace(PRESETS[self.preset], n_routed_experts=self.experts)

    @property
    def compute(self) -> ComputeConfig:
        names = "dtype attention moe remat compile loss_chunk".split()
        return ComputeConfig(**{name: getattr(self, name) for name in names})

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


def labels(case: Case) -> dict:
    """What says which measurement a row is of."""
    names = "system preset dtype seq_len experts micro_batch accumulation remat".split()
    return {name: getattr(case, name) for name in names}


def bytes_per_token(case: Case) -> float:
    """What decoding one token at the end of `seq_len` others has to read, in a batch of one: every active weight, and
    the cache of latents. Also for `transformers`, whose cache is larger: it is the same model."""
    c = case.config
    values = count_active_parameters(c) + case.seq_len * c.num_layers * c.cache_values_per_token
    return values * {"float32": 4, "bfloat16": 2}[case.dtype]


def prefill_flops_per_token(case: Case) -> float:
    """Model FLOPs of a prompt's pass for each of its `seq_len` tokens: of these the last alone meets the output
    layer."""
    c = case.config
    left_out = 2 * c.vocab_size * c.hidden_size * (case.seq_len - 1) / case.seq_len
    return flops_per_token(c, case.seq_len, backward=False) - left_out


def at_least_one(args: Namespace, *options: str) -> None:
    """Raises `UserError` that names an option whose number is below 1."""
    for option in options:
        value = getattr(args, option.removeprefix("--").replace("-", "_"))
        if value is not None and value < 1:
            raise UserError(f"{option} {value}: must be at least 1")


def to_json(case: Case) -> str:
    return json.dumps(asdict(case))


def with_fractions(rows: Iterable[dict]) -> list[dict]:
    """Throughput as a fraction of what the run's limits allow: `fraction_of_ceiling` of the fastest matrix product in
    the same dtype."""
    rows = list(rows)
    for row in rows:
        flops = row.pop("flops_per_token", None)
        if flops is None:
            continue
        limits = [
            other["value"]
            for other in rows
            if other.get("system") == "ceiling" and other["unit"] == "GFLOP/s" and other["dtype"] == row["dtype"]
        ]
        if limits:
            row["fraction_of_ceiling"] = row["value"] * flops / 1e9 / max(limits)
    return rows
