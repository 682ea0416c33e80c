"""Runs a torch module, or a JAX function or nnx module, and records what every module of it takes and returns; the
models know nothing of being watched.

In float64 a module that computes in float32 whatever its input (norms and softmax of `transformers` do) would hide
everything below 1e-7. So there casts from float64 to float32 are lifted: left in float64, and counted.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np

from parity_tests.harness.links import first_names
from parity_tests.harness.measure import to_numpy
from parity_tests.harness.watch import lifted, of_linen, watched, whole

Lift = Callable[[int], bool] | None
"""Whether the cast of this number, counted from 0, is lifted; None lifts none."""


@dataclasses.dataclass
class Record:
    """What one side made of its inputs."""

    values: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """What modules take (`input of PATH`) and return (`PATH`; the model itself: `output`), in the order in which this
    was known. Of several results the first is under the module's own name, others are under `PATH.1`, ..."""
    casts: list[int] = dataclasses.field(default_factory=list)
    """Of every cast from float64 to float32, the number of values recorded before it."""
    keys: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    """Of values that came in a dict or dataclass: the name of the first one in there, and their keys."""
    outputs: list[str] = dataclasses.field(default_factory=list)
    """The names of what the model itself returned."""
    gradients: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """Of the sum of outputs times given numbers, by the name of the tensor; `input N` are those of the inputs."""


class _Recorder:
    """Collects a record while a model runs; values stay what they are (tensors, tracers) until it is over, `copy` of
    them where the model may write into them later."""

    def __init__(self, lift: Lift, copy: Callable[[Any], Any] = lambda value: value) -> None:
        self.lift, self.copy, self.values, self.casts = lift, copy, {}, []
        self.keys, self.last = {}, []

    def cast(self) -> bool:
        """Notes a cast; whether it is lifted."""
        self.casts.append(len(self.values))
        return self.lift is not None and self.lift(len(self.casts) - 1)

    def keep(self, name: str, value: Any, is_array: Callable[[Any], bool]) -> None:
        leaves = [(key, leaf) for key, leaf in keyed_leaves(value) if is_array(leaf)]
        self.last = [self._put(f"{name}.{index}" if index else name, leaf) for index, (_, leaf) in enumerate(leaves)]
        if isinstance(value, Mapping) or dataclasses.is_dataclass(value):
            self.keys |= {own: (self.last[0], key) for own, (key, _) in zip(self.last, leaves, strict=True)}

    def take(self, path: str, args: tuple, kwargs: Mapping, is_array: Callable[[Any], bool]) -> None:
        """A module's first input."""
        first = next((each for each in (*args, *kwargs.values()) if is_array(each)), None)
        if path and first is not None:
            self._put(f"input of {path}", first)

    def record(self, values: Mapping[str, Any]) -> Record:
        """Of the model, which returned last; `values` are those that were kept, as NumPy's."""
        return Record(dict(values), self.casts, self.keys, self.last)

    def _put(self, name: str, leaf: Any) -> str:
        calls, unique = 1, name
        while unique in self.values:
            calls += 1
            unique = f"{name}, call {calls}"
        self.values[unique] = self.copy(leaf)
        return unique


def keyed_leaves(value: Any, key: str = "") -> list[tuple[str, Any]]:
    """What is in a nest of tuples, lists, dicts and dataclasses, without Nones, and the keys that lead there."""
    if isinstance(value, Mapping):
        parts = value.items()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [(part.name, getattr(value, part.name)) for part in dataclasses.fields(value)]
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    else:
        return [] if value is None else [(key, value)]
    return [leaf for name, part in parts for leaf in keyed_leaves(part, f"{key}.{name}")]


def leaves_of(value: Any) -> list[Any]:
    """`keyed_leaves` without their keys."""
    return [leaf for _, leaf in keyed_leaves(value)]


def _arrays(output: Any, is_array: Callable[[Any], bool]) -> list[Any]:
    """What a model returns. Without any its output could not be compared."""
    found = [leaf for leaf in leaves_of(output) if is_array(leaf)]
    if not found:
        kind = type(output).__name__
        raise TypeError(
            f"no array in the {kind} it returns; return arrays, or tuples, lists, dicts, dataclasses of them"
        )
    return found


def as_numpy(value: Any) -> Any:
    """A tensor or an array as NumPy's; what is none (a flag, a number, None) as it is."""
    if type(value).__module__.split(".")[0] == "torch" and hasattr(value, "detach"):
        return to_numpy(value)
    return _widened(np.asarray(value)) if _is_plain(value) else value


def _is_plain(value: Any) -> bool:
    """Whether it is an array of NumPy or JAX; not one of random keys, which NumPy does not know."""
    import jax

    known = isinstance(value, np.ndarray | np.generic | jax.Array)
    return known and not jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended)


def _widened(array: np.ndarray) -> np.ndarray:
    """NumPy does not know JAX's bfloat16 as a float: its values come as float32."""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


class _Place(int):
    """Stands for a float input: which one."""


def map_inputs(inputs: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """The same nest of tuples, lists, dicts and dataclasses, with the function applied to what is of this type."""
    if isinstance(inputs, Mapping):
        return {key: map_inputs(value, kind, function) for key, value in inputs.items()}
    if isinstance(inputs, list | tuple):
        parts = [map_inputs(value, kind, function) for value in inputs]
        return type(inputs)(*parts) if hasattr(inputs, "_fields") else type(inputs)(parts)
    if dataclasses.is_dataclass(inputs) and not isinstance(inputs, type):
        made = copy.copy(inputs)
        for field in dataclasses.fields(inputs):  # frozen ones too, and those that compute fields
            object.__setattr__(made, field.name, map_inputs(getattr(inputs, field.name), kind, function))
        return made
    return function(inputs) if isinstance(inputs, kind) else inputs


def _in_dtype(array: np.ndarray, dtype: str) -> np.ndarray:
    return array.astype(dtype) if np.issubdtype(array.dtype, np.floating) else array


def _fresh(inputs: Any) -> Any:
    """A copy, as a model may write into the objects that it is given (a cache)."""
    try:
        return copy.deepcopy(inputs)
    except Exception:  # an object that cannot be copied
        return inputs


def _arguments(inputs: Any) -> tuple[tuple, dict]:
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})


def _upstream(number: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """What an output of torch, counted from 0, is multiplied by."""
    return np.random.default_rng(number).standard_normal(shape).astype(dtype)


def laid_out(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A value of one side in the shape that the other has, where that is a matter of layout: heads as an axis of their
    own, channels last or first."""
    if value.ndim != len(shape):
        return value.reshape(shape) if value.size == math.prod(shape) else value
    if value.ndim > 2 and value.shape != shape:
        turned = (np.moveaxis(value, -1, 1), np.moveaxis(value, 1, -1))
        return next((each for each in turned if each.shape == shape), value)
    return value


class TorchSide:
    """A module in evaluation mode. `values` are its float tensors in float64, by the names of its state dict; tied
    ones by their first."""

    def __init__(self, module: Any, inputs: Any) -> None:
        self.module, self.inputs = module.eval().cpu(), inputs
        self._buffers = {name: buffer.clone() for name, buffer in module.named_buffers(remove_duplicate=False)}
        firsts = first_names(module)
        self.values = {
            name: to_numpy(tensor).astype(np.float64)
            for name, tensor in module.state_dict().items()
            if tensor.is_floating_point() and firsts.get(name, name) == name
        }

    def run(self, dtype: str, lift: Lift = None, gradients: Sequence[str] = ()) -> Record:
        """`gradients` are the outputs of which these are taken, as they are called in the record."""
        import torch

        module = self._prepared(dtype)
        recorder = _Recorder(lift, copy=lambda tensor: tensor.detach().clone())  # `+=`, ReLU(inplace=True)
        leaves: list[Any] = []

        def tensor(array: np.ndarray) -> Any:
            made = torch.from_numpy(np.array(_in_dtype(array, dtype)))
            if gradients and made.is_floating_point():
                leaves.append(made.requires_grad_())
                return made.clone()  # a module may write into what it is given, but not into a leaf
            return made

        args, kwargs = _arguments(map_inputs(_fresh(self.inputs), np.ndarray, tensor))
        module.zero_grad()
        with contextlib.ExitStack() as stack:
            for path, child in module.named_modules():
                for hook in self._hooks(path, child, recorder):
                    stack.callback(hook.remove)
            stack.enter_context(torch.set_grad_enabled(bool(gradients)))
            if lift is not None:
                stack.enter_context(_lifted_torch(recorder))
            arrays = _arrays(module(*args, **kwargs), lambda leaf: isinstance(leaf, torch.Tensor))
            record = recorder.record({name: to_numpy(value) for name, value in recorder.values.items()})
            outs = [(i, arrays[record.outputs.index(name)]) for i, name in enumerate(gradients)]
            outs = [(out, _upstream(i, tuple(out.shape), dtype)) for i, out in outs if out.requires_grad]
            if outs:
                torch.autograd.backward(
                    *zip(*((out, torch.from_numpy(g).to(out.dtype)) for out, g in outs), strict=True)
                )
        if gradients:
            trained = {name: each for name, each in module.named_parameters() if each.requires_grad}
            for name, leaf in (trained | {f"input {index}": leaf for index, leaf in enumerate(leaves)}).items():
                # what the output does not depend on, or was detached from, has none: JAX calls that zero
                record.gradients[name] = to_numpy(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
            module.zero_grad()
        return record

    def _prepared(self, dtype: str) -> Any:
        """The module in this dtype with `values` in it, its buffers as they were before any run wrote into them or
        rounded them. (`Module.to` takes the imaginary parts of complex ones, as of RoPE's `freqs_cis`.)"""
        import torch

        wide = dtype == "float64"
        module = self.module.double() if wide else self.module.float()
        real, paired = (torch.float64, torch.complex128) if wide else (torch.float32, torch.complex64)
        for name, buffer in self._buffers.items():
            owner, _, leaf = name.rpartition(".")
            kind = real if buffer.is_floating_point() else paired if buffer.is_complex() else buffer.dtype
            setattr(module.get_submodule(owner), leaf, buffer.to(kind, copy=True))
        with torch.no_grad():
            for name, tensor in module.state_dict().items():
                if name in self.values:
                    tensor.copy_(torch.from_numpy(self.values[name].astype(dtype)))
        return module

    @staticmethod
    def _hooks(path: str, module: Any, recorder: _Recorder) -> list[Any]:
        import torch

        def is_tensor(value: Any) -> bool:
            return isinstance(value, torch.Tensor)

        return [
            module.register_forward_pre_hook(
                lambda _, args, kwargs: recorder.take(path, args, kwargs, is_tensor), with_kwargs=True
            ),
            module.register_forward_hook(lambda _, args, output: recorder.keep(path or "output", output, is_tensor)),
        ]


def _lifted_torch(recorder: _Recorder) -> Any:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Lifted(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            wide = any(isinstance(each, torch.Tensor) and each.dtype == torch.float64 for each in args)
            if wide and kwargs.get("dtype") is torch.float32 and recorder.cast():
                kwargs = {**kwargs, "dtype": torch.float64}
            return function(*args, **kwargs)

    return Lifted()


class JaxSide:
    """An nnx module in evaluation mode, or a function of parameters and inputs (a module of `flax.linen` is one of its
    variables). `values` are its float tensors (of an nnx module: of all its variables but caches and random numbers) in
    float64, by their paths with dots. Numbers, strings, functions and random keys among a function's parameters are
    settings, and stay what they are."""

    def __init__(self, model: Any, params: Any, inputs: Any) -> None:
        import jax
        from flax import linen, nnx

        self.inputs, self.is_module = inputs, isinstance(model, nnx.Module)
        if self.is_module:
            model.eval()
            other = nnx.Any(nnx.Cache, nnx.Intermediate, nnx.RngState, nnx.Not(nnx.Variable))
            self._graphdef, self._rest, self._state = nnx.split(model, other, ...)
            params = nnx.to_pure_dict(self._state)
        else:
            self._function = of_linen(model) if isinstance(model, linen.Module) else model
            self._takes_record = "record" in inspect.signature(self._function).parameters
        leaves, self._tree = jax.tree_util.tree_flatten_with_path(params)
        named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
        if self.is_module:  # a variable may hold a number
            named = {name: np.asarray(leaf) if isinstance(leaf, int | float) else leaf for name, leaf in named.items()}
        self._names = list(named)
        self._leaves = {name: as_numpy(leaf) for name, leaf in named.items()}
        self._settings = {name: leaf for name, leaf in self._leaves.items() if not isinstance(leaf, np.ndarray)}
        self._leaves = {name: leaf for name, leaf in self._leaves.items() if name not in self._settings}
        floats = {name: leaf for name, leaf in self._leaves.items() if np.issubdtype(leaf.dtype, np.floating)}
        self.values = {name: leaf.astype(np.float64) for name, leaf in floats.items()}

    def run(self, dtype: str, lift: Lift = None, gradients: Mapping[str, tuple[int, ...]] | None = None) -> Record:
        """One operation after the other, uncompiled: what is recorded under `jax.jit` or in a loop is then a number.
        `gradients` are the outputs of which these are taken, and their shapes in torch."""
        import jax

        record: Record
        with jax.enable_x64(dtype == "float64"), jax.default_device(jax.devices("cpu")[0]), jax.disable_jit():
            with jax.default_matmul_precision("highest"), contextlib.ExitStack() as stack:
                for name in ("checkpoint", "remat"):
                    stack.enter_context(mock.patch(f"jax.{name}", lambda function, **_: function))
                record = self._run(dtype, lift, gradients or {})
        return record

    def _run(self, dtype: str, lift: Lift, gradients: Mapping[str, tuple[int, ...]]) -> Record:
        import jax

        recorder = _Recorder(lift, copy=whole)
        values = {name: self.values.get(name, leaf) for name, leaf in self._leaves.items()}
        params = {name: jax.numpy.asarray(_in_dtype(value, dtype)) for name, value in values.items()}
        floats: list[Any] = []  # the inputs that can be differentiated

        def placed(array: np.ndarray) -> Any:
            value = jax.numpy.asarray(_in_dtype(array, dtype))
            if array.dtype.kind != "f":
                return value
            floats.append(value)
            return _Place(len(floats) - 1)

        inputs = map_inputs(_fresh(self.inputs), np.ndarray, placed)

        def forward(params: dict[str, Any], floats: list[Any]) -> Any:
            args, kwargs = _arguments(map_inputs(inputs, _Place, lambda place: floats[place]))
            arrays = _arrays(self._call(params, args, kwargs, recorder), lambda leaf: isinstance(leaf, jax.Array))
            return [arrays[recorder.last.index(name)] for name in gradients], recorder.values

        with lifted(recorder) if lift is not None else contextlib.nullcontext():
            if not gradients:
                _, recorded = forward(params, floats)
            else:
                trained = {name: value for name, value in params.items() if name in self.values}
                outs, backward, recorded = jax.vjp(lambda t, f: forward(params | t, f), trained, floats, has_aux=True)
                given = [_upstream(i, shape, dtype) for i, shape in enumerate(gradients.values())]
                upstream = [laid_out(g, out.shape).astype(out.dtype) for g, out in zip(given, outs, strict=True)]
                by_name, of_inputs = backward(upstream)
        # by the recorder's order: JAX sorts the names of what it returns
        record = recorder.record({name: np.asarray(recorded[name]) for name in recorder.values})
        if gradients:
            record.gradients = {name: np.asarray(value) for name, value in by_name.items()}
            record.gradients |= {f"input {index}": np.asarray(value) for index, value in enumerate(of_inputs)}
        return record

    def _call(self, params: dict[str, Any], args: tuple, kwargs: dict, recorder: _Recorder) -> Any:
        import jax

        tree = jax.tree_util.tree_unflatten(self._tree, [(self._settings | params)[name] for name in self._names])
        if not self.is_module:

            def record(name: str, value: Any) -> Any:
                recorder.keep(name, value, lambda each: isinstance(each, jax.Array))
                return value

            more = {"record": record} if self._takes_record else {}
            output = self._function(tree, *args, **kwargs, **more)
            record("output", output)
            return output
        from flax import nnx

        state = jax.tree.map(lambda leaf: leaf, self._state)
        nnx.replace_by_pure_dict(state, tree)
        module = nnx.merge(self._graphdef, self._rest, state)
        with watched(module, recorder):
            return module(*args, **kwargs)
