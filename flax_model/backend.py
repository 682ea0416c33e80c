"""Training in Flax: the optimizer step, evaluation and checkpoints behind the loop's `Backend` protocol.

- gradients of micro-batches add up to the whole batch's, also where they score different numbers of targets
- clipping by global norm and AdamW as `OptimizerConfig` states them; weight decay by the parameter table
- the balance bias moves once per step, by counts summed over micro-batches
- a step whose loss or gradient is not finite changes nothing but the step counter
- checkpoints by orbax, written in the background

Twins: `torch_ref/backend.py`, `flax_model/backend.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jax.stages import Compiled, Lowered
from jaxtyping import Int

from flax_model.checkpoint import Checkpoints
from flax_model.device import describe, peak_memory, resolve_compute, resolve_device, trace
from flax_model.processes import agree
from flax_model.self_check import self_checked
from flax_model.sharding import (
    BATCH,
    WHOLE,
    abstract_parameters,
    batch_sharding,
    decay_mask,
    from_host,
    from_own_shards,
    host_array,
    make_mesh,
    mesh_devices,
    own_bytes,
    own_shards,
    per_device,
    replicated,
    whole,
)
from flax_model.train_step import State, loss_sum, train_step
from flax_model.trees import consume, merge
from flax_model.values import from_values, structure
from torch_ref.spec.checkpoint import leaf_at, make_contents
from torch_ref.spec.config import MESH_AXES, ComputeConfig, ModelConfig
from torch_ref.spec.interface import IGNORE, OptimizerConfig, Sampling, StepResult, TrainingState
from torch_ref.spec.memory import require_host_memory
from torch_ref.spec.parameters import Parameter, flax_path, initial_values, parameter_table
from torch_ref.spec.processes import Processes, agree_alone
from torch_ref.spec.training_state import LazyArrays, require_config, require_state, split_batch


class FlaxBackend:
    """The `Backend` of Flax, on one device or on the mesh of `compute.mesh`. State is unset until `init`, `restore` or
    `load_state`.

    The train step is one compiled function that donates its state (`train_step.py`). That for batches of
    `expected_batch` (rows and their length) is compiled in the background while the state is made; that for another
    shape when the first such batch comes. A float64 run switches JAX to 64-bit types for the whole process. `devices`
    are taken instead of those that `device` names: they may be those of a topology, to compile for and not to run on.
    Raises `UserError` for a device, dtype or computation path that is not available.
    """

    framework = "flax"
    checkpoint_suffix = ""

    def __init__(
        self,
        model_config: ModelConfig,
        compute: ComputeConfig,
        optimizer: OptimizerConfig,
        device: str = "auto",
        expected_batch: tuple[int, int] | None = None,
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        self._device = devices[0] if devices else resolve_device(device)
        self.model_config = model_config
        self._runs_here = devices is None
        self.compute = self._checked(resolve_compute(compute, self._device, model_config))
        self.optimizer_config = optimizer
        if self.compute.param_dtype == "float64":
            jax.config.update("jax_enable_x64", True)
        self._dtype = np.dtype(self.compute.param_dtype)
        self._graphdef = structure(model_config)
        self._mesh = mesh = make_mesh(devices or mesh_devices(self._device, self.compute.mesh), self.compute.mesh)
        self._batch_sharding = batch_sharding(mesh)
        self._abstract = abstract_state(model_config, self._dtype, mesh)
        self._state: State | None = None
        self._steps = 0
        self.processes = Processes(jax.process_count(), jax.process_index())
        self._checkpoints = Checkpoints(self.processes, self.agree)
        self._expected_batch = expected_batch
        self._make_programs()

    def _checked(self, compute: ComputeConfig) -> ComputeConfig:
        """Without the paths that this device gets wrong."""
        if self._device.platform == "cpu" or not self._runs_here:
            return compute
        return self_checked(compute, self._device, self.model_config)

    def _make_programs(self) -> None:
        """The train step and the evaluation, not yet compiled."""
        self._compiled: dict[tuple[int, ...], Compiled | Future[Compiled]] = {}
        mesh, config, compute = self._mesh, self.model_config, self.compute
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self._abstract)
        step = partial(
            train_step,
            graphdef=self._graphdef,
            config=config,
            compute=compute,
            optimizer=self.optimizer_config,
            decay=decay_mask(config),
        )
        specs = jax.tree.map(lambda sharding: sharding.spec, shardings)
        step = per_device(step, mesh, (specs, BATCH, BATCH, WHOLE), (specs, WHOLE))
        # Pinned shardings: a restored or fresh state then fits the same compiled step as the one it returns.
        self._train_step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
        scored = partial(loss_sum, graphdef=self._graphdef, config=config, compute=compute)
        rows = PartitionSpec(MESH_AXES)
        self._loss_sum = jax.jit(per_device(scored, mesh, (specs["params"], specs["biases"], rows, rows), WHOLE))

    @property
    def device(self) -> str:
        return describe(self._device, self.compute.mesh)

    @property
    def peak_memory(self) -> int | None:
        return peak_memory(self._device)

    @property
    def steps_done(self) -> int:
        return self._steps

    @property
    def runs_ahead(self) -> bool:
        return self._device.platform != "cpu"

    @property
    def _updates(self) -> int:
        return int(self._state["updates"])

    @property
    def _rows_per_pass(self) -> int:
        """Rows of one micro-batch, over all devices."""
        return self.optimizer_config.micro_batch_size * self._mesh.size

    def agree(self, wishes: Sequence[int]) -> Callable[[], list[int]]:
        alone = self.processes.count == 1
        return agree_alone(wishes) if alone else agree(wishes, self._device.platform)

    def init(self, seed: int) -> None:
        self._compile_ahead()
        self._state = {}
        params, biases = self._placed(initial_values(self.model_config, seed))
        self._set(params=params, biases=biases, first_moment=None, second_moment=None)
        self._set_counters(steps=0, updates=0)

    def _set_counters(self, steps: int, updates: int) -> None:
        # The host counts steps too: asking the device would wait for it.
        self._steps = steps
        self._set(step=np.int32(steps), updates=np.int32(updates))

    def _set(self, **parts: Any) -> None:
        """Take over parts of the state: numbers, or trees of arrays from `from_values`, which are emptied; None stands
        for zeros."""
        self._state.update({name: place(part, self._abstract[name], copy=False) for name, part in parts.items()})

    def _compile_ahead(self) -> None:
        """Begin to compile the step for the expected batch."""
        if self._expected_batch is None:
            return
        rows, length = self._expected_batch
        shape = (rows // self._rows_per_pass, self._rows_per_pass, length)
        if shape not in self._compiled:
            thread = ThreadPoolExecutor(1)
            self._compiled[shape] = thread.submit(self._compile, shape)
            thread.shutdown(wait=False)

    def _compile(self, shape: tuple[int, ...]) -> Compiled:
        return self.lower_step(shape).compile()

    def lower_step(self, shape: tuple[int, ...]) -> Lowered:
        """The train step for batches of [micro-batches, rows, tokens], not yet compiled."""
        tokens = jax.ShapeDtypeStruct(shape, np.int32, sharding=self._batch_sharding)
        rate = jax.ShapeDtypeStruct((), self._dtype)
        return self._train_step.lower(self._abstract, tokens, tokens, rate)

    def lower_evaluation(self, length: int) -> Lowered:
        """The evaluation of one micro-batch of rows of so many tokens, not yet compiled."""
        sharding = NamedSharding(self._mesh, PartitionSpec(MESH_AXES))
        rows = jax.ShapeDtypeStruct((self._rows_per_pass, length), np.int32, sharding=sharding)
        return self._loss_sum.lower(self._abstract["params"], self._abstract["biases"], rows, rows)

    def _step_for(self, shape: tuple[int, ...]) -> Compiled:
        """The compiled step for batches of a shape."""
        step = self._compiled.get(shape)
        if not isinstance(step, Compiled):
            step = self._compiled[shape] = step.result() if step else self._compile(shape)
            # On CPUs some collectives give up after half a minute, by which compilers may well be apart.
            self.agree([0])()
        return step

    def begin_step(self, inputs: np.ndarray, targets: np.ndarray) -> Callable[[], StepResult]:
        # The schedule is taken on the host, in double precision as torch's is: a sweep over rates compiles nothing.
        rate = float(self.optimizer_config.schedule(self._steps))
        batch = split_batch(inputs, targets, self._rows_per_pass)
        step = self._step_for(batch[0].shape)
        self._state, metrics = step(self._state, *from_host(batch, self._batch_sharding), self._dtype.type(rate))
        self._steps += 1
        jax.copy_to_host_async(metrics)
        tokens = int((targets != IGNORE).sum())

        def result() -> StepResult:
            loss, balance_loss, grad_norm, applied, expert_counts = jax.device_get(metrics)
            counts = expert_counts.astype(np.int64)
            return StepResult(float(loss), float(balance_loss), float(grad_norm), rate, tokens, bool(applied), counts)

        return result

    def step(self, inputs: np.ndarray, targets: np.ndarray) -> StepResult:
        return self.begin_step(inputs, targets)()

    def evaluate(self, inputs: np.ndarray, targets: np.ndarray) -> tuple[float, int]:
        total = 0.0
        for micro in zip(*split_batch(inputs, targets, self._rows_per_pass, pad=True), strict=True):
            micro = from_host(micro, NamedSharding(self._mesh, PartitionSpec(MESH_AXES)))
            total += float(self._loss_sum(self._state["params"], self._state["biases"], *micro))
        return total, int((targets != IGNORE).sum())

    def generate(
        self, prompt: list[int], sampling: Sampling, seed: int, on_token: Callable[[list], None] | None = None
    ) -> list[int]:
        from flax_model.generate import generate

        params, biases = whole((self._state["params"], self._state["biases"]), self._mesh)
        if not self.processes.writes:
            return []
        model = merge(self._graphdef, params, biases)
        return generate(model, [prompt], sampling, seed, self.compute, on_token)[0]

    def save(self, folder: Path, name: str, meta: dict) -> Path:
        contents = make_contents(self.framework, self.model_config, self.steps_done, self._updates, meta)
        path = Path(folder) / f"{name}{self.checkpoint_suffix}"
        self._checkpoints.save(path, self._state, contents)
        return path

    def trace(self, folder: Path) -> AbstractContextManager[None]:
        return trace(folder)

    def check_saves(self) -> None:
        self._checkpoints.check_saves()

    def wait(self) -> None:
        self._checkpoints.wait()

    def find(self, folder: Path) -> list[tuple[int, Path]]:
        return self._checkpoints.find(folder)

    def restore(self, path: Path) -> dict:
        path = Path(path)
        stored = self._checkpoints.read_contents(path)
        require_config(stored["model_config"], self.model_config, path)
        self._checkpoints.check(path, stored, self._abstract)
        self._compile_ahead()
        self._state = None  # its memory is needed for the state that comes
        self._state = place(self._checkpoints.restore(path, stored, self._abstract), self._abstract)
        self._steps = stored["step"]
        return stored["meta"]

    def delete(self, path: Path) -> None:
        if self.processes.writes:
            self._checkpoints.delete(path)

    def snapshot(self) -> Any:
        require_host_memory(own_bytes(self._state), "a copy of the state")
        return jax.tree.map(own_shards, self._state)

    def rollback(self, snapshot: Any) -> None:
        self._state = None
        restored = jax.tree.map(lambda like, shards: from_own_shards(shards, like), self._abstract, snapshot)
        self._state = place(restored, self._abstract)
        self._steps = int(self._state["step"])

    def keep_within_documents(self, separator: int) -> None:
        self.compute = self._checked(replace(self.compute, separator=separator))
        self._make_programs()

    def set_schedule(self, schedule: Callable[[int], float]) -> None:
        self.optimizer_config = replace(self.optimizer_config, schedule=schedule)

    def state(self) -> TrainingState:
        """Arrays are read when asked for: a state is good until the next step."""
        table = parameter_table(self.model_config)

        def arrays(rows: list, *trees: str) -> LazyArrays:
            return LazyArrays([row.name for row in rows], partial(self._read, trees))

        trainable = [row for row in table if row.trainable]
        return TrainingState(
            self.model_config,
            arrays(list(table), "params", "biases"),
            arrays(trainable, "first_moment"),
            arrays(trainable, "second_moment"),
            step=self.steps_done,
            updates=self._updates,
        )

    def _read(self, trees: tuple[str, ...], name: str) -> np.ndarray:
        """One row of the table from the first of `trees` that holds it, copied to the host."""
        path, index = flax_path(self.model_config, name)
        for tree in trees:
            leaf = leaf_at(self._state[tree], path)
            if leaf is not None:
                return np.array(host_array(leaf if index is None else _take(leaf, index)))
        raise KeyError(name)

    def load_state(self, state: TrainingState) -> None:
        require_state(state, self.model_config)
        self._compile_ahead()
        # Part by part, so that no second whole state exists; `state` may be this backend's own.
        self._state = self._state or {}
        params, biases = self._stack(state.weights)
        self._set(params=params, biases=biases)
        has_moments = state.first_moment is not None
        self._set(first_moment=self._stack(state.first_moment)[0] if has_moments else None)
        self._set(second_moment=self._stack(state.second_moment)[0] if has_moments else None)
        self._set_counters(state.step if has_moments else 0, state.updates if has_moments else 0)

    def _stack(self, arrays: Mapping[str, np.ndarray]) -> tuple[dict, dict]:
        """Arrays by the table's names as (params, biases); moments have no biases, which are then zero."""
        rows = parameter_table(self.model_config)
        values = ((row, arrays[row.name] if row.name in arrays else np.zeros(row.shape)) for row in rows)
        return self._placed(values)

    def _placed(self, values: Iterable[tuple[Parameter, np.ndarray]]) -> tuple[dict, dict]:
        """Values of the table's rows as (params, biases), written straight into their shards."""
        return from_values(self.model_config, values, self._dtype, self._mesh)[1:]

    def close(self) -> None:
        self._checkpoints.close()


def abstract_state(config: ModelConfig, dtype: np.dtype, mesh: jax.sharding.Mesh) -> State:
    """Shape, dtype and sharding of every array of a training state."""
    params, biases = abstract_parameters(config, dtype, mesh)
    counter = jax.ShapeDtypeStruct((), np.int32, sharding=replicated(mesh))
    moments = {"first_moment": params, "second_moment": params}
    return {"params": params, "biases": biases, **moments, "step": counter, "updates": counter}


def place(tree: Any, abstract: Any, copy: bool = True) -> Any:
    """Bring arrays to their devices. A nested dict is emptied on the way, so that only one tensor exists twice at a
    time; None stands for zeros.

    Arrays of the host, or of a file, need the `copy` on the device: on a CPU `device_put` may share memory with its
    source, and a step cannot reuse what is not its own.
    """
    if tree is None:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), abstract)

    def placed(path: tuple[str, ...], leaf: Any) -> Array:
        there = jax.device_put(leaf, leaf_at(abstract, path).sharding)
        return jnp.array(there, copy=True) if copy or not isinstance(leaf, jax.Array) else there

    return consume(placed, tree)


@jax.jit
def _take(stacked: Array, layer: Int[Array, ""]) -> Array:
    return stacked[layer]
