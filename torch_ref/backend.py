"""Training in torch: the optimizer step, evaluation and checkpoints behind the loop's `Backend` protocol.

- gradients of micro-batches add up to the whole batch's, also where they score different numbers of targets
- clipping by global norm and AdamW as `OptimizerConfig` states them; weight decay by the parameter table
- the balance bias moves once per step, by counts summed over micro-batches
- a step whose loss or gradient is not finite changes nothing but the step counter
- checkpoints: `.pt` files that appear only when whole and are read without unpickling code

Twins: `torch_ref/backend.py`, `flax_model/backend.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from torch_ref.checkpoint import SUFFIX, Checkpoints
from torch_ref.cpu import return_freed_blocks
from torch_ref.cuda_graph import RecordedObjective, can_be_recorded, recorded_checked
from torch_ref.device import describe, peak_memory, resolve_compute, resolve_device, sent_to_host, trace
from torch_ref.model import Model, Parts, objective
from torch_ref.moe import MoE, updated_balance_bias
from torch_ref.mps import rows_at_once
from torch_ref.processes import agree
from torch_ref.self_check import compile_checked, fused_adamw, self_checked
from torch_ref.sharding import make_mesh, own_part, part_of, shard_model, spread, sum_over, whole
from torch_ref.spec.checkpoint import make_contents
from torch_ref.spec.config import ComputeConfig, ModelConfig
from torch_ref.spec.interface import IGNORE, OptimizerConfig, Sampling, StepResult, TrainingState
from torch_ref.spec.memory import require_host_memory
from torch_ref.spec.parameters import initial_values, parameter_table
from torch_ref.spec.processes import ALONE, Processes, agree_alone
from torch_ref.spec.training_state import LazyArrays, require_config, require_state, split_batch


class TorchBackend:
    """The `Backend` of torch, on one device, or on one of each of the processes that `compute.mesh` is over. State is
    unset until `init`, `restore` or `load_state`.

    Raises `UserError` for a device, dtype or computation path that is not available.
    """

    framework = "torch"
    checkpoint_suffix = SUFFIX

    def __init__(
        self, model_config: ModelConfig, compute: ComputeConfig, optimizer: OptimizerConfig, device: str = "auto"
    ) -> None:
        self._device = resolve_device(device)
        self.model_config = model_config
        self.compute = self._checked(resolve_compute(compute, self._device))
        self.processes = Processes(dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else ALONE
        self._mesh = make_mesh(self.processes, self.compute.mesh, self._device)
        self.optimizer_config = optimizer
        if self.compute.remat != "off" and self._device.type == "cpu":
            return_freed_blocks()
        self._is_split = self.compute.mesh[1] > 1
        dtype = getattr(torch, self.compute.param_dtype)
        self.model = Model(model_config, "meta" if self._is_split else self._device, dtype)
        if self._is_split:
            shard_model(self.model, self._mesh, self._device)
        self._table = parameter_table(model_config)
        self._tensors = self.model.state_dict(keep_vars=True)
        self._trainable = {row.name: self._tensors[row.name] for row in self._table if row.trainable}
        if self._is_split:  # the optimizer's own names for the parts
            self._trainable = {
                name: nn.Parameter(own_part(tensor.detach())) for name, tensor in self._trainable.items()
            }
        self._optimizer = self._make_optimizer()
        self._steps = 0
        self._compile_unchecked = self.compute.compile == "on"
        self._recorded: RecordedObjective | None = None
        self._records = True
        self._checkpoints = Checkpoints(agree if self.processes.count > 1 else agree_alone)

    def _checked(self, compute: ComputeConfig) -> ComputeConfig:
        """Without the paths that this device gets wrong."""
        return compute if self._device.type == "cpu" else self_checked(compute, self._device, self.model_config)

    def _make_optimizer(self) -> torch.optim.AdamW:
        config, rows = self.optimizer_config, [row for row in self._table if row.trainable]
        groups = [
            {"params": [self._trainable[row.name] for row in rows if row.decay], "weight_decay": config.weight_decay},
            {"params": [self._trainable[row.name] for row in rows if not row.decay], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            groups, lr=0.0, betas=config.betas, eps=config.eps, fused=fused_adamw(self._device), foreach=False
        )
        for parameter in self._trainable.values():
            # The state AdamW would make at its first step, made now so that it can be loaded and saved at step 0.
            counter_device = self._device if fused_adamw(self._device) else "cpu"
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=counter_device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        return optimizer

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
        return self._device.type == "cuda"  # elsewhere the host decides about the update

    @property
    def _updates(self) -> int:
        return int(self._optimizer.state[next(iter(self._trainable.values()))]["step"])

    def _moment(self, key: str) -> dict[str, Tensor]:
        return {name: self._optimizer.state[parameter][key] for name, parameter in self._trainable.items()}

    @property
    def _rows_per_pass(self) -> int:
        """Rows of one micro-batch, over all devices."""
        return self.optimizer_config.micro_batch_size * self.processes.count

    def agree(self, wishes: Sequence[int]) -> Callable[[], list[int]]:
        return agree_alone(wishes) if self.processes.count == 1 else agree(wishes)

    def init(self, seed: int) -> None:
        self.model.load_values(initial_values(self.model_config, seed))
        self._set_moments(None, None)
        self._set_counters(steps=0, updates=0)

    @torch.no_grad()
    def _set_moments(self, first: Mapping[str, Any] | None, second: Mapping[str, Any] | None) -> None:
        for key, values in (("exp_avg", first), ("exp_avg_sq", second)):
            for name, moment in self._moment(key).items():
                if values is None:
                    moment.zero_()
                else:
                    moment.copy_(part_of(torch.as_tensor(values[name]), self._tensors[name]))

    def _set_counters(self, steps: int, updates: int) -> None:
        self._steps = steps
        for state in self._optimizer.state.values():
            state["step"].fill_(updates)

    def begin_step(self, inputs: np.ndarray, targets: np.ndarray) -> Callable[[], StepResult]:
        config = self.optimizer_config
        rate = float(config.schedule(self._steps))
        tokens, rows = int((targets != IGNORE).sum()), len(inputs)
        batch = np.stack(split_batch(inputs, targets, self._rows_per_pass))
        batch = batch[:, :, self.processes.rows(self._rows_per_pass)]
        at_once = rows_at_once(*batch.shape[2:], self._device)
        batch = self._put(batch.reshape(2, -1, at_once, batch.shape[3]))
        if self._compile_unchecked:
            self.compute, self._compile_unchecked = compile_checked(self.compute, self.model, batch[0, 0]), False
        gradient = self._recorded_for(*batch[:, 0]) or self._gradient
        loss = balance = counts = 0
        for number, (micro_inputs, micro_targets) in enumerate(batch.unbind(1), 1):
            if self._is_split:  # gradients of micro-batches are summed here first, and then over processes
                self.model.set_requires_gradient_sync(number == batch.shape[1])
            parts = gradient(micro_inputs, micro_targets, tokens, rows)
            loss, balance = loss + parts.loss_sum, balance + parts.balance_sum
            counts = counts + parts.expert_counts

        if self._is_split:
            for name, parameter in self._trainable.items():
                parameter.grad = own_part(self._tensors[name].grad)
        gradients = [parameter.grad for parameter in self._trainable.values()]
        loss, balance, counts = self._sum_over_processes(gradients, loss, balance, counts)
        norm = self._global_norm(gradients)
        report = torch.stack([loss / tokens, balance / rows, norm])
        if self.runs_ahead:
            self._update_unasked(gradients, report, rate, counts)
            # One transfer for all that the host will want to know.
            told = sent_to_host(torch.cat((report.double(), counts.flatten())))
        else:
            known = [*report.tolist(), *counts.flatten().tolist()]
            if np.isfinite(known[:3]).all():
                self._update(gradients, known[2], rate, counts)
            told = partial(list, known)
        self._optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)
        self._steps += 1

        def result() -> StepResult:
            loss, balance, grad_norm, *counts = told()
            applied = bool(np.isfinite([loss, balance, grad_norm]).all())
            shape = self.model_config.num_moe_layers, self.model_config.n_routed_experts
            counts = np.asarray(counts, np.int64).reshape(shape)
            return StepResult(loss, balance, grad_norm, rate, tokens, applied, counts)

        return result

    def step(self, inputs: np.ndarray, targets: np.ndarray) -> StepResult:
        return self.begin_step(inputs, targets)()

    def _gradient(self, inputs: Tensor, targets: Tensor, target_count: int, sequence_count: int) -> Parts:
        """Add a micro-batch's share to the parameters' gradients."""
        total, parts = objective(self.model, inputs, targets, self.compute, target_count, sequence_count)
        total.backward()
        return parts

    def _recorded_for(self, inputs: Tensor, targets: Tensor) -> RecordedObjective | None:
        """`_gradient` as one CUDA graph for micro-batches of this shape, where it can be one."""
        if not (self._records and can_be_recorded(self.model_config, self.compute, self._device)):
            return None
        if self._recorded is None or self._recorded.made_for != (inputs.shape, self.compute):
            self._recorded = None  # frees its memory first
            self._recorded = recorded_checked(self.model, inputs, targets, self.compute)
            self._records = self._recorded is not None
        return self._recorded

    def _sum_over_processes(
        self, gradients: list[Tensor], loss: Tensor, balance: Tensor, counts: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients, once a step, over the copies of the same parts; what a step reports, over all processes."""
        if self.processes.count == 1:
            return loss, balance, counts
        sum_over(gradients, self._mesh.data)
        report = torch.cat((torch.stack([loss, balance]).double(), counts.flatten()))
        sum_over([report], dist.group.WORLD)
        return report[0].to(loss.dtype), report[1].to(balance.dtype), report[2:].to(counts.dtype).view_as(counts)

    def _global_norm(self, gradients: list[Tensor]) -> Tensor:
        norm = global_norm(gradients)
        if not self._is_split:
            return norm
        square = norm.square()
        sum_over([square], self._mesh.fsdp.get_group())
        return square.sqrt()

    @torch.no_grad()
    def _update(self, gradients: list[Tensor], grad_norm: float, rate: float, counts: Tensor) -> None:
        if grad_norm > self.optimizer_config.grad_clip:
            for gradient in gradients:
                gradient.mul_(self.optimizer_config.grad_clip / grad_norm)
        self._apply(rate, counts)

    @torch.no_grad()
    def _update_unasked(self, gradients: list[Tensor], report: Tensor, rate: float, counts: Tensor) -> None:
        """`_update` where the device itself sees whether the report is finite, and how far to clip: no waiting for the
        host between the backward pass and the update."""
        applies = report.isfinite().all()
        divisor = (report[2] / self.optimizer_config.grad_clip).clamp(min=1)
        if divisor.dtype == torch.float32:
            self._optimizer.grad_scale = divisor  # the fused kernel divides by it, which saves a pass over gradients
        else:
            torch._foreach_div_(gradients, divisor)
        # Then the fused kernel changes nothing, and its step counters stay.
        self._optimizer.found_inf = (~applies).float()
        self._apply(rate, counts, applies)

    def _apply(self, rate: float, counts: Tensor, applies: Tensor | bool = True) -> None:
        """Update weights from their gradients, and the balance biases from the counts."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        biases = [block.mlp.router.balance_bias for block in self.model.layers if isinstance(block.mlp, MoE)]
        if biases:
            old = torch.stack(biases)
            new = updated_balance_bias(old, counts, self.model_config.balance_bias_rate)
            new = new if applies is True else torch.where(applies, new, old)
            torch._foreach_copy_(biases, list(new.unbind()))

    def _put(self, tokens: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(tokens))
        if self._device.type == "cuda":  # from pinned memory a copy need not wait for the kernels before it
            return tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor.to(self._device)

    @torch.no_grad()
    def evaluate(self, inputs: np.ndarray, targets: np.ndarray) -> tuple[float, int]:
        total = 0.0
        own = self.processes.rows(self._rows_per_pass)
        for micro in zip(*split_batch(inputs, targets, self._rows_per_pass, pad=True), strict=True):
            _, parts = objective(self.model, *(self._put(each[own]) for each in micro), self.compute, 1, 1)
            sum_over([parts.loss_sum], dist.group.WORLD if self.processes.count > 1 else None)
            total += float(parts.loss_sum)
        if self._is_split:
            self.model.reshard()
        return total, int((targets != IGNORE).sum())

    def generate(
        self, prompt: list[int], sampling: Sampling, seed: int, on_token: Callable[[list], None] | None = None
    ) -> list[int]:
        from torch_ref.generate import generate

        model = self._whole_model()
        return generate(model, [prompt], sampling, seed, self.compute, on_token)[0] if self.processes.writes else []

    @torch.no_grad()
    def _whole_model(self) -> Model:
        """The model; put together, if it is split, in a copy for the process that writes."""
        if not self._is_split:
            return self.model
        dtype = getattr(torch, self.compute.param_dtype)
        model = Model(self.model_config, self._device if self.processes.writes else "meta", dtype)
        for name, tensor in model.state_dict().items():
            tensor.copy_(whole(self._tensors[name].detach()))
        return model

    @property
    def _parts(self) -> dict[str, dict[str, Tensor]]:
        """What a step changes, beside the counters: of split tensors what this process has."""
        weights = {name: own_part(tensor.detach()) for name, tensor in self._tensors.items()}
        moments = {"first_moment": self._moment("exp_avg"), "second_moment": self._moment("exp_avg_sq")}
        return {"weights": weights, **moments}

    @property
    def _state(self) -> dict[str, dict[str, Tensor]]:
        """The same as a checkpoint holds it: tensors of whole shapes, split as they may be."""
        return {
            group: {name: spread(part, self._tensors[name].detach()) for name, part in parts.items()}
            for group, parts in self._parts.items()
        }

    def save(self, folder: Path, name: str, meta: dict) -> Path:
        contents = make_contents(self.framework, self.model_config, self.steps_done, self._updates, meta)
        path = Path(folder) / f"{name}{self.checkpoint_suffix}"
        state = self._state
        if self._is_split:
            state = {group: self._gathered(tensors) for group, tensors in state.items()}
        if self.processes.writes:
            self._checkpoints.save(path, state, contents)
        self.agree([0])()  # then it is there for all of them
        return path

    def _gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors in the memory of the host, of the process that writes."""
        together = {}
        for name, tensor in tensors.items():
            put_together = whole(tensor)
            if self.processes.writes:
                together[name] = put_together.cpu()
        return together

    def trace(self, folder: Path) -> AbstractContextManager[None]:
        return trace(folder, self._device)

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
        self._checkpoints.check(path, stored, self._state)
        state = self._checkpoints.restore(path, stored, self._state)
        self._load(state["weights"], state["first_moment"], state["second_moment"])
        self._set_counters(stored["step"], stored["updates"])
        return stored["meta"]

    @torch.no_grad()
    def _load(self, weights: Mapping[str, Any], first: Mapping | None, second: Mapping | None) -> None:
        for name, tensor in self._tensors.items():
            own_part(tensor).copy_(part_of(torch.as_tensor(weights[name]), tensor))
        self._set_moments(first, second)

    def delete(self, path: Path) -> None:
        if self.processes.writes:
            self._checkpoints.delete(path)

    def snapshot(self) -> Any:
        groups = self._parts.values()
        require_host_memory(sum(tensor.nbytes for group in groups for tensor in group.values()), "a copy of the state")
        host = [{name: tensor.detach().to("cpu", copy=True) for name, tensor in group.items()} for group in groups]
        return host, self._steps, self._updates

    @torch.no_grad()
    def rollback(self, snapshot: Any) -> None:
        host, steps, updates = snapshot
        for parts, kept in zip(self._parts.values(), host, strict=True):
            for name, tensor in parts.items():
                tensor.copy_(kept[name])
        self._set_counters(steps, updates)

    def keep_within_documents(self, separator: int) -> None:
        self.compute = self._checked(replace(self.compute, separator=separator))

    def set_schedule(self, schedule: Callable[[int], float]) -> None:
        self.optimizer_config = replace(self.optimizer_config, schedule=schedule)

    def state(self) -> TrainingState:
        """Arrays are read when asked for: a state is good until the next step."""
        return TrainingState(
            self.model_config,
            *(_arrays(group) for group in self._state.values()),
            step=self.steps_done,
            updates=self._updates,
        )

    def load_state(self, state: TrainingState) -> None:
        require_state(state, self.model_config)
        self._load(state.weights, state.first_moment, state.second_moment)
        has_moments = state.first_moment is not None
        self._set_counters(state.step if has_moments else 0, state.updates if has_moments else 0)

    def close(self) -> None:
        self._checkpoints.close()


def global_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Square root of the sum of all squares. Not `torch.linalg.vector_norm`: its float32 sum on the CPU is off by 2e-4
    for a tensor of 7 M values. On CUDA it sums blocks of each, for all tensors in few kernels."""
    gradients = list(gradients)
    if gradients[0].is_cuda:
        return torch.nn.utils.get_total_norm(gradients)
    return torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()


def _arrays(tensors: Mapping[str, Tensor]) -> LazyArrays:
    return LazyArrays(tensors, lambda name: whole(tensors[name].detach()).to("cpu", copy=True).numpy())
