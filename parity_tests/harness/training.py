"""The last rungs of parity: one optimizer step from identical gradients, whole training runs, decoding and resuming.

Both backends are driven as the training loop drives them.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from parity_tests.harness.cases import CONFIG, case_values
from parity_tests.harness.measure import Measurement, relative_error
from torch_ref.spec.config import ComputeConfig, ModelConfig
from torch_ref.spec.interface import Backend, OptimizerConfig, Sampling, TrainingState
from torch_ref.spec.parameters import initial_values, parameter_table
from torch_ref.spec.training_state import LazyArrays
from train.run.schedule import Schedule

UPDATE = {"float64": 1e-12, "float32": 1e-5}
"""Bounds of one optimizer step: moments, update over learning rate, balance bias, rate, norm."""


@contextmanager
def backend(
    framework: str, config: ModelConfig, compute: ComputeConfig, optimizer: OptimizerConfig, device: str = "cpu"
) -> Iterator[Backend]:
    """A backend, closed in the end. What a float64 Flax backend switches on for the whole process is undone."""
    if framework == "torch":
        from torch_ref.backend import TorchBackend

        made = TorchBackend(config, compute, optimizer, device)
        yield made
        made.close()
        return
    import jax

    from flax_model.backend import FlaxBackend

    before = jax.config.jax_enable_x64
    made = FlaxBackend(config, compute, optimizer, device)
    try:
        yield made
        made.close()
    finally:
        jax.config.update("jax_enable_x64", before)


# Learning rates far above training's: a weight of 0.2 moved by 1e-3 shows the update only to 1e-5 in float32.
STEP_SCHEDULE = Schedule(peak=0.5, warmup_steps=3, steps=5, final_ratio=0.5)
STEP_OPTIMIZER = OptimizerConfig(STEP_SCHEDULE, weight_decay=0.1, grad_clip=1.0, micro_batch_size=1)
STEP_SCALES = (4096, 1, -512, 0, 2048, -32)
"""Of the gradients of each step, in 1024ths: with and without clipping; 0 stands for infinite, a step to skip."""
MICRO_BATCHES = 3


@dataclass
class Steps:
    """What a backend reports and holds after each optimizer step."""

    reports: list[dict[str, float]] = field(default_factory=list)
    tensors: list[dict[str, np.ndarray]] = field(default_factory=list)


def injected_steps(framework: str, dtype: str, device: str = "cpu") -> Steps:
    """Optimizer steps whose gradients are given: each micro-batch's objective is replaced by a linear function of the
    parameters, so that everything after the gradient runs as it does in training, and nothing before it matters."""
    config, optimizer = CONFIG, STEP_OPTIMIZER
    rows = parameter_table(config)
    generator = np.random.default_rng(5)
    # Integers times a power of two that differs between tensors, as sizes of real gradients do: sums over micro-batches
    # are then exact. Adam makes an absolute error of its update from a gradient's relative one, and where micro-batches
    # nearly cancel, rounding of the sum is all that would be compared.
    slopes = {
        row.name: np.ldexp(
            generator.integers(-999, 1000, (MICRO_BATCHES, *row.shape)), generator.integers(-22, -12)
        ).astype(dtype)
        for row in rows
        if row.trainable
    }
    counts = generator.integers(0, 9, (MICRO_BATCHES, config.num_moe_layers, config.n_routed_experts)).astype(np.int32)
    counts[:, :, 0] = (counts[:, :, 1:].sum(-1) / (config.n_routed_experts - 1)).round()
    make_objective = {"torch": _torch_objective, "flax": _flax_objective}[framework]
    module = importlib.import_module({"torch": "torch_ref.backend", "flax": "flax_model.train_step"}[framework])
    steps = Steps()
    compute = ComputeConfig(dtype=dtype)
    with backend(framework, config, compute, optimizer, device) as made, ExitStack() as stack:
        stack.enter_context(mock.patch.object(module, "objective", make_objective(config, slopes, counts)))
        made.load_state(TrainingState(config, {row.name: value.astype(dtype) for row, value in case_values(config)}))
        before = _tensors(made.state())
        for scale in STEP_SCALES:
            # A micro-batch's number is its first input, the scale of its gradients the second.
            inputs = np.array([[index, scale] for index in range(MICRO_BATCHES)], np.int32)
            result = made.step(inputs, np.ones_like(inputs))
            after = _tensors(made.state())
            steps.reports.append(
                {
                    "learning rate": result.learning_rate,
                    "gradient norm": result.grad_norm if result.applied else -1.0,
                    "loss": result.loss if result.applied else -1.0,
                    "applied": float(result.applied),
                    "expert counts": result.expert_counts,
                }
            )
            changed = {
                f"update / LR of {name}": (before[f"weight of {name}"] - after[f"weight of {name}"])
                / (result.learning_rate or np.nan)
                for name in slopes
            }
            state = {name: value for name, value in after.items() if not name.startswith("weight of ")}
            steps.tensors.append({**state, **changed})
            before = after
    return steps


def _tensors(state: TrainingState) -> dict[str, np.ndarray]:
    trainable = [row.name for row in parameter_table(state.model_config) if row.trainable]
    return {
        **{f"first moment of {name}": np.array(state.first_moment[name]) for name in trainable},
        **{f"second moment of {name}": np.array(state.second_moment[name]) for name in trainable},
        **{f"weight of {name}": np.array(state.weights[name]) for name in trainable},
        **{name: np.array(state.weights[name]) for name in state.weights if name not in set(trainable)},
    }


def _torch_objective(config: ModelConfig, slopes: dict[str, np.ndarray], counts: np.ndarray) -> Callable:
    import torch

    from torch_ref.model import Parts

    def objective(model, inputs, targets, compute, target_count, sequence_count):
        index, scale = inputs[0].tolist()
        factor = scale / 1024 if scale else float("inf")
        total = sum(
            (parameter * torch.from_numpy(slopes[name][index]).to(parameter.device) * factor).sum()
            for name, parameter in model.named_parameters()
        )
        part = total.detach() * 0 + index + 1.0
        return total, Parts(part, part, torch.from_numpy(counts[index]).to(total.device).long())

    return objective


def _flax_objective(config: ModelConfig, slopes: dict[str, np.ndarray], counts: np.ndarray) -> Callable:
    import jax
    import jax.numpy as jnp

    from flax_model.model import Parts
    from flax_model.trees import split
    from flax_model.values import from_values

    rows = parameter_table(config)

    def tree(index: int) -> dict:
        values = ((row, slopes[row.name][index] if row.trainable else np.zeros(row.shape)) for row in rows)
        return from_values(config, values, next(iter(slopes.values())).dtype)[1]

    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *map(tree, range(MICRO_BATCHES)))

    def objective(model, inputs, targets, compute, target_count, sequence_count):
        params = split(model)[1]
        index, scale = inputs[0]
        dtype = jax.tree.leaves(params)[0].dtype
        factor = jnp.where(scale == 0, jnp.inf, scale.astype(dtype) / 1024)
        products = jax.tree.map(
            lambda param, slope: (param * jnp.asarray(slope)[index] * factor).sum(), params, stacked
        )
        total = sum(jax.tree.leaves(products))
        part = index.astype(dtype) + 1
        return total, Parts(part, part, jnp.asarray(counts)[index])

    return objective


def compare_steps(dtype: str, torch: Steps, flax: Steps) -> list[Measurement]:
    """Every report and every tensor after every step."""
    measurements = []

    def measure(step: int, name: str, got: Any, expected: Any) -> None:
        exact = name in ("applied", "expert counts")
        error = relative_error(got, expected)
        bound = 0.0 if exact else UPDATE[dtype]
        measurements.append(
            Measurement("optimizer step", "given gradients", dtype, f"{name}, step {step}", error, bound)
        )

    for step, reports in enumerate(zip(torch.reports, flax.reports, strict=True), start=1):
        for name in reports[1]:
            measure(step, name, reports[0][name], reports[1][name])
        for name in flax.tensors[step - 1]:
            measure(step, name, torch.tensors[step - 1][name], flax.tensors[step - 1][name])
    return measurements


TRAINING_CONFIG = ModelConfig(
    vocab_size=256,
    hidden_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    kv_lora_rank=12,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=12,
    intermediate_size=64,
    moe_intermediate_size=48,
    n_routed_experts=4,
    max_position=64,
)
"""Bytes of English, so that 200 steps have something to learn."""
TRAINING_STEPS, TRAINING_ROWS, TRAINING_SEQ = 200, 4, 64
TRAINING_OPTIMIZER = OptimizerConfig(Schedule(peak=3e-3, warmup_steps=20, steps=180), micro_batch_size=4)
CHAOS_PAIRS = 5


def training_batches(steps: int = TRAINING_STEPS) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows of Python's own help texts, byte by byte, in random order. Rulings of tables are cut short: a row of one
    repeated byte is no text, and in bfloat16 its loss is half a nat away from what either framework gets in float32."""
    from pydoc_data.topics import topics

    prose = re.sub(r"(.)\1{3,}", r"\1\1\1", "\n".join(topics[key] for key in sorted(topics)))
    text = np.frombuffer(prose.encode(), np.uint8).astype(np.int32)
    starts = np.random.default_rng(0).integers(0, len(text) - TRAINING_SEQ - 1, (steps, TRAINING_ROWS))
    rows = text[starts[..., None] + np.arange(TRAINING_SEQ + 1)]
    return [(np.ascontiguousarray(row[:, :-1]), np.ascontiguousarray(row[:, 1:])) for row in rows]


def start_weights(seed: int, dtype: str, moved: bool = False) -> dict[str, np.ndarray]:
    """Seeded start values; `moved` by one unit in the last place each, upwards."""
    weights = {row.name: value.astype(dtype) for row, value in initial_values(TRAINING_CONFIG, seed)}
    return {name: np.nextafter(value, np.inf, dtype=dtype) if moved else value for name, value in weights.items()}


def losses(made: Backend, weights: dict[str, np.ndarray], batches: list) -> np.ndarray:
    """Loss at every step of a run from these weights."""
    made.load_state(TrainingState(made.model_config, weights))
    return np.array([made.step(*batch).loss for batch in batches])


def training_backend(framework: str, dtype: str, device: str = "cpu", micro_batch_size: int = TRAINING_ROWS):
    optimizer = replace(TRAINING_OPTIMIZER, micro_batch_size=micro_batch_size)
    return backend(framework, TRAINING_CONFIG, ComputeConfig(dtype=dtype), optimizer, device)


@dataclass(frozen=True)
class Divergence:
    """Two training runs, step by step, and how far runs of one framework part from a start one rounding apart."""

    dtype: str
    torch: np.ndarray
    flax: np.ndarray
    floor: np.ndarray | None
    """[pairs, steps] absolute loss differences; measured in float32 only."""

    @property
    def difference(self) -> np.ndarray:
        return np.abs(self.torch - self.flax)

    @property
    def floor_level(self) -> float:
        """The chaos floor: median over pairs of the largest difference."""
        return 0.0 if self.floor is None else float(np.median(self.floor.max(1)))

    @property
    def bound(self) -> float:
        return {"float64": 1e-9, "float32": max(1e-3, min(2 * self.floor_level, 1e-2)), "bfloat16": 5e-2}[self.dtype]

    def measurements(self) -> list[Measurement]:
        where = f"loss, step {int(self.difference.argmax()) + 1} of {len(self.difference)}"
        learned = float(self.torch[-20:].mean() > self.torch[0] - 1)  # a run that learns nothing shows nothing
        return [
            Measurement("training run", "200 steps", self.dtype, where, float(self.difference.max()), self.bound),
            Measurement("training run", "200 steps", self.dtype, "the loss falls by 1 nat (0: yes)", learned, 0.0),
        ]


def training_run(
    dtype: str, torch_device: str = "cpu", jax_device: str = "cpu", chaos_pairs: int = CHAOS_PAIRS
) -> Divergence:
    """The same 200 steps in both frameworks; torch accumulates each over two micro-batches. In float32 Flax also runs
    `chaos_pairs` times twice, for the chaos floor; without it, the bound is its lower one."""
    batches = training_batches()
    parameters = "float64" if dtype == "float64" else "float32"
    weights = start_weights(0, parameters)
    with training_backend("torch", dtype, torch_device, micro_batch_size=TRAINING_ROWS // 2) as made:
        torch = losses(made, weights, batches)
    floor = None
    with training_backend("flax", dtype, jax_device) as made:
        flax = losses(made, weights, batches)
        if dtype == "float32" and chaos_pairs:
            pairs = [
                [losses(made, start_weights(seed, parameters, moved), batches) for moved in (False, True)]
                for seed in range(1, chaos_pairs + 1)
            ]
            floor = np.array([np.abs(one - other) for one, other in pairs])
    return Divergence(dtype, torch, flax, floor)


def decoding(dtype: str, torch_device: str = "cpu", jax_device: str = "cpu") -> list[Measurement]:
    """Greedy tokens after 30 steps of training: in how many places the frameworks differ."""
    prompt, sampling = list(b"The following "), Sampling(max_new_tokens=40, greedy=True, stop_token=None)
    tokens = []
    for framework, device in (("torch", torch_device), ("flax", jax_device)):
        with training_backend(framework, dtype, device) as made:
            losses(made, start_weights(0, "float64" if dtype == "float64" else "float32"), training_batches(30))
            tokens.append(made.generate(prompt, sampling, seed=0))
    assert len(tokens[0]) == len(tokens[1]) == sampling.max_new_tokens
    different = sum(a != b for a, b in zip(*tokens, strict=True))
    return [Measurement("decode", "greedy", dtype, "tokens that differ, of 40", float(different), 0.0)]


def resuming(dtype: str, folder: Path, torch_device: str = "cpu", jax_device: str = "cpu") -> list[Measurement]:
    """Saved after 3 steps and restored into a fresh backend: the largest loss difference to the unbroken run over 3
    more."""
    batches = training_batches(6)
    weights = start_weights(0, "float64" if dtype == "float64" else "float32")
    measurements = []
    for framework, device in (("torch", torch_device), ("flax", jax_device)):
        with training_backend(framework, dtype, device) as made:
            losses(made, weights, batches[:3])
            path = made.save(folder / framework, "step_3", {})
            made.wait()
            unbroken = [made.step(*batch).loss for batch in batches[3:]]
        with training_backend(framework, dtype, device) as made:
            made.restore(path)
            resumed = [made.step(*batch).loss for batch in batches[3:]]
        error = float(np.abs(np.array(resumed) - np.array(unbroken)).max())
        measurements.append(Measurement("resume", framework, dtype, "loss of the steps after", error, 0.0))
    return measurements


TRAJECTORY = 1e-9
"""Bound of a float64 run's losses, moments and weights that goes on from a state of one's own."""


def trajectory(
    state: TrainingState,
    optimizer: OptimizerConfig,
    batches: list[tuple[np.ndarray, np.ndarray]],
    name: str,
    separator: int | None = None,
) -> tuple[Divergence, list[Measurement]]:
    """Both frameworks go on in float64 from a training state, on these batches: losses and gradient norms of every
    step, the gradients of the first (in its first moments), and moments and weights at the end. With a `separator`
    attention keeps to documents."""
    wide = replace(
        state,
        **{
            group: LazyArrays(values, lambda key, values=values: np.asarray(values[key], np.float64))
            for group in ("weights", "first_moment", "second_moment")
            if (values := getattr(state, group)) is not None
        },
    )
    reports, first, last = [], [], []
    for framework in ("torch", "flax"):
        with backend(framework, state.model_config, ComputeConfig(dtype="float64"), optimizer) as made:
            if separator is not None:
                made.keep_within_documents(separator)
            made.load_state(wide)
            reports.append([made.step(*batches[0])])
            first.append(_tensors(made.state()))
            reports[-1] += [made.step(*batch) for batch in batches[1:]]
            last.append(_tensors(made.state()))
    measurements = []

    def measure(where: str, got: Any, expected: Any) -> None:
        error = relative_error(got, expected)
        measurements.append(Measurement("training run", name, "float64", where, error, TRAJECTORY))

    for step, (torch, flax) in enumerate(zip(*reports, strict=True), start=state.step + 1):
        measure(f"loss, step {step}", torch.loss, flax.loss)
        measure(f"gradient norm, step {step}", torch.grad_norm, flax.grad_norm)
    for tensor in first[1]:
        if tensor.startswith("first moment"):
            measure(f"{tensor}, step {state.step + 1}", first[0][tensor], first[1][tensor])
    for tensor in last[1]:
        measure(f"{tensor}, step {state.step + len(batches)}", last[0][tensor], last[1][tensor])
    losses = (np.array([report.loss for report in each]) for each in reports)
    return Divergence("float64", *losses, None), measurements
