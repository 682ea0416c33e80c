"""Runs both models on the same numbers and gives back, as NumPy arrays, everything that can be compared.

`run_torch` and `run_flax` take a case and return an `Outcome` each. Where a case is unrolled, they can also record what
every module returns, by wrapping the methods of the twin classes: the models themselves know nothing of being watched.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np

from parity_tests.harness.cases import Case
from torch_ref.spec.interface import IGNORE
from torch_ref.spec.parameters import Parameter, flax_path, parameter_table
from torch_ref.spec.training_state import split_batch

Values = Iterable[tuple[Parameter, np.ndarray]]


@dataclass(frozen=True)
class Measurement:
    """One number of the report: how far the frameworks are apart at one place, and how far they may be."""

    rung: str
    case: str
    dtype: str
    where: str
    """Layer and module, parameter, or step."""
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # not so for a NaN

    def __str__(self) -> str:
        place = f"{self.rung}, {self.dtype}, {self.case}: {self.where}"
        if math.isinf(self.error):  # not a matter of size: something is absent, or known to be another by its checksum
            return place
        return f"{place} off by {self.error:.2e}, bound {self.bound:.0e}"


def failures(measurements: list[Measurement]) -> str:
    """The measurements beyond their bounds, in the order of the computation, one a line; empty if there are none."""
    assert measurements, "nothing was measured"
    return "\n".join(str(each) for each in measurements if not each.passed)


def relative_error(got: Any, expected: Any) -> float:
    """Largest absolute difference over the largest expected absolute value; the shapes must be the same. Integers must
    be equal: their error is the number of differing ones. Infinities that both have beside finite values are equal."""
    got, expected = np.asarray(got), np.asarray(expected)
    if got.shape != expected.shape:
        return float("inf")
    if np.issubdtype(expected.dtype, np.integer) or expected.dtype == bool:
        return float((got != expected).sum())
    if not expected.size:
        return 0.0
    wide = np.complex128 if np.iscomplexobj(got) or np.iscomplexobj(expected) else np.float64
    got, expected = got.astype(wide), expected.astype(wide)
    masked = np.isinf(expected) & (got == expected)
    if masked.any() and not masked.all():  # as masks make them; what is nothing else is no measurement
        got, expected = got[~masked], expected[~masked]
    error = np.abs(got - expected).max()
    scale = np.abs(expected).max()
    return float(error / scale if scale > 0 else error)


@dataclass
class Outcome:
    """What one framework makes of a case: sums and means over the whole batch, arrays of all its rows."""

    objective: float
    loss: float
    """Mean over the scored targets, nats."""
    balance_loss: float
    """Mean over the sequences, before its coefficient."""
    layers: np.ndarray
    """[layers, batch, seq, hidden]"""
    logits: np.ndarray
    expert_counts: np.ndarray
    gradients: dict[str, np.ndarray]
    """By the names of the parameter table; empty where they were not asked for."""
    trace: dict[str, np.ndarray] = field(default_factory=dict)
    """What every module returned, by its path, in the order in which they returned; arrays of the last micro-batch's
    rows are appended to those of the earlier ones."""
    choices: list[np.ndarray] = field(default_factory=list)
    """Results of `top_k` in the order of its calls, of the last micro-batch (recorded with the trace)."""


# Methods whose results are recorded, by module and class. `call` is `forward` in torch, `__call__` in Flax.
WATCHED = {
    "layers": {"Linear": ("call",), "RMSNorm": ("call",), "SwiGLU": ("call",)},
    "attention": {"Attention": ("queries", "latents", "expand", "call")},
    "moe": {"Router": ("call",), "Experts": ("call",), "MoE": ("call",)},
    "block": {"Block": ("call",)},
}


class Recorder:
    """Keeps what a model and, if `modules` is set, its modules return while `watching`. Under `jax.jit` these are
    tracers: they have to be returned from the traced function."""

    def __init__(self, package: str, modules: bool = False) -> None:
        self.package, self.modules = package, modules
        self.call = "forward" if package == "torch_ref" else "__call__"
        self.clear()

    def clear(self) -> None:
        self.output: Any = None
        """The model's `ForwardOutput`, hidden states kept."""
        self.values: dict[str, Any] = {}
        self.choices: list[Any] = []
        """Results of `top_k` in the order of its calls."""
        self._paths: dict[int, str] = {}
        self._stack: list[str] = []
        self._blocks: list[Any] = []  # kept alive, or their ids could be used again

    @contextmanager
    def watching(self, forced_choices: list[Any] | None = None) -> Iterator[Recorder]:
        """Wraps the classes of `package`. With `forced_choices`, calls of `top_k` return these, one after the other."""
        self.clear()
        with ExitStack() as stack:
            model_class = self._module("model").Model
            stack.enter_context(mock.patch.object(model_class, self.call, self._keep_output(model_class)))
            if self.modules:
                if self.package == "flax_model":
                    # What is recorded must not stay inside a rematerialised function; what it computes is the same.
                    stack.enter_context(mock.patch("jax.checkpoint", lambda function, **_: function))
                for module, classes in WATCHED.items():
                    for name, methods in classes.items():
                        cls = getattr(self._module(module), name)
                        for method in methods:
                            attribute = self.call if method == "call" else method
                            stack.enter_context(mock.patch.object(cls, attribute, self._watch(cls, method, attribute)))
                paths = self._module("attention").ATTENTION_PATHS
                watched = {name: self._watch_attention(function) for name, function in paths.items()}
                stack.enter_context(mock.patch.dict(paths, watched))
                stack.enter_context(mock.patch.object(self._module("moe"), "top_k", self._watch_choice(forced_choices)))
            yield self

    def _module(self, name: str) -> Any:
        return importlib.import_module(f"{self.package}.{name}")

    def _keep_output(self, cls: type) -> Callable:
        original = getattr(cls, self.call)

        @functools.wraps(original)
        def forward(model, tokens, compute):
            if self.modules:
                self._name_submodules(model, "")
            self.output = original(model, tokens, compute, keep_hidden=True)
            return self.output

        return forward

    def _watch(self, cls: type, method: str, attribute: str) -> Callable:
        original = getattr(cls, attribute)

        @functools.wraps(original)
        def wrapped(module, *args):
            if cls.__name__ == "Block":
                self._name_submodules(module, f"layers.{len(self._blocks)}")
                self._blocks.append(module)
            path = self._paths[id(module)]
            self._stack.append(path)
            result = original(module, *args)
            self._stack.pop()
            self._record(path if method == "call" else f"{path}.{method}", result)
            return result

        return wrapped

    def _watch_attention(self, original: Callable) -> Callable:
        def attend(*args, **kwargs):
            result = original(*args, **kwargs)
            self._record(f"{self._stack[-1]}.attend", result)
            return result

        return attend

    def _watch_choice(self, forced: list[Any] | None) -> Callable:
        original = self._module("moe").top_k

        def top_k(scores, k):
            result = original(scores, k) if forced is None else forced[len(self.choices)]
            self.choices.append(result)
            return result

        return top_k

    def _name_submodules(self, module: Any, path: str) -> None:
        if self.package == "torch_ref":
            named = ((name.split(".") if name else [], child) for name, child in module.named_modules())
        else:
            from flax import nnx

            named = ((map(str, parts), child) for parts, child in nnx.iter_graph(module))
        for parts, child in named:
            self._paths[id(child)] = ".".join([path, *parts] if path else parts)

    def _record(self, name: str, result: Any) -> None:
        if hasattr(result, "_fields"):
            for part in result._fields:
                self._record(f"{name}.{part}", getattr(result, part))
        elif isinstance(result, tuple):
            for index, part in enumerate(result):
                self._record(f"{name}.{index}", part)
        elif result is not None:
            self.values[name] = result


def run_torch(
    case: Case,
    values: Values,
    inputs: np.ndarray,
    targets: np.ndarray,
    *,
    trace: bool = False,
    forced_choices: list[np.ndarray] | None = None,
    device: str = "cpu",
    gradients: bool = True,
) -> Outcome:
    """The case in torch: objective, gradients and everything on the way, over its micro-batches. `forced_choices` are
    an earlier outcome's, of a case with one micro-batch. Without `gradients` only the forward pass runs."""
    import torch

    from torch_ref import model as torch_model

    model = torch_model.Model(case.config, device, getattr(torch, case.torch.param_dtype)).load_values(values)
    recorder = Recorder("torch_ref", modules=trace)
    forced = forced_choices and [torch.tensor(chosen, device=device) for chosen in forced_choices]
    merged = _Merger(case, targets)
    for micro in zip(*split_batch(inputs, targets, len(inputs) // case.torch_micro_batches), strict=True):
        micro = [torch.from_numpy(np.ascontiguousarray(part)).to(device) for part in micro]
        with recorder.watching(forced), torch.set_grad_enabled(gradients):
            total, parts = torch_model.objective(model, *micro, case.torch, merged.target_count, merged.sequence_count)
        if gradients:
            total.backward()
        with torch.no_grad():
            logits = model.logits(recorder.output.hidden)
        layers = [to_numpy(hidden) for hidden in recorder.output.layers]
        recorded = {name: to_numpy(value) for name, value in recorder.values.items()}
        merged.add(to_numpy(total), map(to_numpy, parts), layers, to_numpy(logits), recorded)
    taken = {
        name: to_numpy(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        for name, parameter in model.named_parameters()
        if gradients
    }
    return merged.outcome(taken, [to_numpy(chosen) for chosen in recorder.choices])


def to_numpy(tensor: Any) -> np.ndarray:
    """NumPy has no bfloat16: its values come as float32. By force: from any device, detached, conjugates computed."""
    return (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy(force=True)


def run_flax(
    case: Case,
    values: Values,
    inputs: np.ndarray,
    targets: np.ndarray,
    *,
    trace: bool = False,
    forced_choices: list[np.ndarray] | None = None,
    device: Any = None,
    gradients: bool = True,
) -> Outcome:
    """`run_torch` in Flax; the gradient of a micro-batch is one jitted function. `device` is a `jax.Device`."""
    import jax

    with jax.enable_x64(case.dtype == "float64"), jax.default_device(device or jax.devices("cpu")[0]):
        return _run_flax(case, values, inputs, targets, trace, forced_choices, gradients)


def _run_flax(case: Case, values: Values, inputs, targets, trace: bool, forced_choices, gradients: bool) -> Outcome:
    import jax

    from flax_model import model as flax_model
    from flax_model.trees import merge
    from flax_model.values import from_values

    graphdef, params, biases = from_values(case.config, values, case.flax.param_dtype)
    recorder = Recorder("flax_model", modules=trace)
    forced = forced_choices and [jax.numpy.asarray(chosen) for chosen in forced_choices]
    names: list[str] = []

    def objective(params, inputs, targets):
        model = merge(graphdef, params, biases)
        with recorder.watching(forced):
            total, parts = flax_model.objective(
                model, inputs, targets, case.flax, merged.target_count, merged.sequence_count
            )
        names[:] = recorder.values
        logits = model.logits(recorder.output.hidden)
        return total, (parts, recorder.output.layers, logits, list(recorder.values.values()), recorder.choices)

    merged = _Merger(case, targets)
    run = jax.jit(jax.value_and_grad(objective, has_aux=True) if gradients else lambda *args: (objective(*args), {}))
    taken = None
    for micro in zip(*split_batch(inputs, targets, len(inputs) // case.flax_micro_batches), strict=True):
        (total, report), micro_gradients = jax.device_get(run(params, *micro))
        parts, layers, logits, recorded, choices = report
        merged.add(total, parts, layers, logits, dict(zip(names, recorded, strict=True)))
        taken = micro_gradients if taken is None else jax.tree.map(np.add, taken, micro_gradients)
    return merged.outcome(by_table_name(case.config, taken) if gradients else {}, choices)


def by_table_name(config: Any, tree: dict) -> dict[str, np.ndarray]:
    """A tree of the trainable parameters' shape as arrays by the names of the parameter table."""
    arrays = {}
    for row in parameter_table(config):
        if row.trainable:
            path, index = flax_path(config, row.name)
            leaf = functools.reduce(lambda branch, key: branch[key], path, tree)
            arrays[row.name] = np.asarray(leaf if index is None else leaf[index])
    return arrays


class _Merger:
    """Puts the micro-batches of a case together again."""

    def __init__(self, case: Case, targets: np.ndarray) -> None:
        self.case = case
        self.target_count, self.sequence_count = int((targets != IGNORE).sum()), len(targets)
        self._parts: list[tuple] = []

    def add(self, total, parts, layers, logits, trace) -> None:
        self._parts.append((float(total), tuple(parts), np.stack(layers), logits, trace))

    def outcome(self, gradients: dict[str, np.ndarray], choices: list[np.ndarray]) -> Outcome:
        totals, parts, layers, logits, traces = zip(*self._parts, strict=True)
        loss_sums, balance_sums, counts = zip(*parts, strict=True)
        return Outcome(
            objective=sum(totals),
            loss=float(sum(map(float, loss_sums))) / self.target_count,
            balance_loss=float(sum(map(float, balance_sums))) / self.sequence_count,
            layers=np.concatenate(layers, axis=1),
            logits=np.concatenate(logits),
            expert_counts=sum(np.asarray(count, np.int64) for count in counts),
            gradients=gradients,
            trace={name: _join([trace[name] for trace in traces]) for name in traces[0]},
            choices=choices,
        )


def _join(parts: list[np.ndarray]) -> np.ndarray:
    """Micro-batches one after the other; counts of experts add up."""
    if parts[0].ndim == 1 and np.issubdtype(parts[0].dtype, np.integer):
        return sum(parts)
    return np.concatenate(parts)
