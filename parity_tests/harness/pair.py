"""A torch and a JAX model that should be the same, as a user's Python file says them: their weights made the same,
their records under the same names."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from parity_tests.harness.links import Link, Slot, module_names, propose, require, torch_slots
from parity_tests.harness.sides import JaxSide, Record, TorchSide, as_numpy, laid_out, map_inputs
from torch_ref.spec.interface import UserError


class Pair:
    """Both sides, with the same weights in them."""

    def __init__(self, file: Path, torch: TorchSide, jax: JaxSide, links: list[Link], slots: dict[str, Slot]) -> None:
        self.file, self.name, self.torch, self.jax, self.links, self.slots = file, file.stem, torch, jax, links, slots
        self.modules: dict[str, str] = {}
        """Torch's modules to JAX's."""

    def load(self, source: str, keep: bool = False) -> list[str]:
        """The weights of `source` (torch or jax) into the other side. Tensors whose values are all the same (norms of
        ones, biases of zeros) look right whether or not they are read: unless `keep`, noise is added to them first, and
        to those that one side alone has. Returns the names of these."""
        drawn = []
        linked = {link.torch for link in self.links}
        mine = self.torch.values if source == "torch" else self.jax.values
        if not keep:
            for index, (name, value) in enumerate(mine.items()):
                if value.size and (value == value.flat[0]).all():
                    mine[name] = value + 0.2 * np.random.default_rng(index).standard_normal(value.shape)
                    drawn.append(name)
        for link in self.links:
            if source == "jax":
                link.require_moves(f"{self.file}: SOURCE = 'jax'")
            slot = self.slots[link.torch]
            whole = self.torch.values[slot.tensor]
            if source == "torch":
                self.jax.values[link.jax] = np.ascontiguousarray(link.there(slot.view(whole)))
            else:
                slot.view(whole)[...] = link.back(self.jax.values[link.jax], slot.shape)
        other = (
            (self.jax.values, {link.jax for link in self.links})
            if source == "torch"
            else (self.torch.values, {self.slots[name].tensor for name in linked})
        )
        if not keep:
            for index, name in enumerate(sorted(other[0].keys() - other[1])):
                value = other[0][name]
                if value.size and (value == value.flat[0]).all():
                    other[0][name] = value + 0.2 * np.random.default_rng(1000 + index).standard_normal(value.shape)
                    drawn.append(name)
        return drawn

    def alone(self) -> dict[str, list[str]]:
        """The tensors that one side has and the other has not."""
        linked = {(self.slots[link.torch].tensor, self.slots[link.torch].part) for link in self.links}
        return {
            "torch": [name for name, slot in self.slots.items() if (slot.tensor, slot.part) not in linked],
            "JAX": sorted(self.jax.values.keys() - {link.jax for link in self.links}),
        }

    def common(self, torch: Record, jax: Record) -> dict[str, np.ndarray]:
        """Of JAX's record, what torch's has too, under torch's names and, where that is a matter of layout (heads as
        an axis of their own, channels last), in torch's shapes."""
        renamed = {other: name for name, other in self.partners(torch, jax).items()}
        values = {renamed[name]: value for name, value in jax.values.items() if name in renamed}
        return {name: laid_out(value, torch.values[name].shape) for name, value in values.items()}

    def partners(self, torch: Record, jax: Record) -> dict[str, str]:
        """Names of torch's values to JAX's, of those that both have. Several results of a module are told apart by
        their keys, where both sides have some of the same; else by their order. What the models themselves return is
        told from what a module returns that is called `output`."""
        of_models = {}
        if self.jax_name("output") == "output":  # MODULES says nothing else of it
            of_models = dict(zip(torch.outputs, jax.outputs, strict=False))
        by_key = {key: name for name, key in jax.keys.items()}
        keys = {name: (of_models.get(first, self.jax_name(first)), key) for name, (first, key) in torch.keys.items()}
        keyed = {first for first, key in keys.values() if (first, key) in by_key}
        partners = {}
        for name in torch.values:
            first, key = keys.get(name, ("", ""))
            by_order = of_models.get(name, self.jax_name(name))
            other = by_key.get((first, key)) if first in keyed else by_order
            if other in jax.values and (not of_models or (name in torch.outputs) == (other in jax.outputs)):
                partners[name] = other
        return partners

    def jax_name(self, name: str) -> str:
        """What torch's value of this name is called on JAX's side."""
        head, path, tail = split_name(name)
        parts = path.split(".")
        for length in range(len(parts), 0, -1):  # the innermost module that is known; what is inside, as it is called
            known = self.modules.get(".".join(parts[:length]))
            if known is not None:
                return head + ".".join([known, *parts[length:]] if known else parts[length:]) + tail
        return name


def split_name(name: str) -> tuple[str, str, str]:
    """`input of `, the module's path, and `, call 2`; each may be empty."""
    head = "input of " if name.startswith("input of ") else ""
    path, comma, call = name.removeprefix(head).partition(", call ")
    return head, path, comma + call


# The user's file


def open_pair(file: Path) -> tuple[Pair, ModuleType]:
    """What a file says by `torch_side()` and `jax_side()`, and NAMES, MODULES and SOURCE. Raises `UserError`."""
    said = _import(file)
    names, given_modules = getattr(said, "NAMES", {}), getattr(said, "MODULES", {})
    for name, value in (("NAMES", names), ("MODULES", given_modules)):
        if not isinstance(value, Mapping):
            raise UserError(f"{file}: {name} must be a dict, not {type(value).__name__}")
    if isinstance(getattr(said, "FLOAT32", ()), str):
        raise UserError(f"{file}: FLOAT32 must be a tuple of names, not a name")
    if getattr(said, "SOURCE", "torch") not in ("torch", "jax"):
        raise UserError(f"{file}: SOURCE must be 'torch' or 'jax', not {said.SOURCE!r}")
    torch = _torch_side(file, _call(file, said, "torch_side"))
    jax = _jax_side(file, _call(file, said, "jax_side"), torch.inputs)
    try:
        split = {name: len(value) for name, value in names.items() if isinstance(value, list)}
        for name in split:
            require(name, torch.values, "NAMES: torch")
        slots = torch_slots(torch.module, split)
        given = {name: value for name, value in names.items() if name not in split}
        given |= {f"{name}[{i}]": part for name in split for i, part in enumerate(names[name])}
        leaves = {name: value.shape for name, value in jax.values.items()}
        links = propose(slots, leaves, given)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    pair = Pair(file, torch, jax, links, slots)
    pair.modules = module_names(links, given_modules)
    return pair, said


def _import(file: Path) -> ModuleType:
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    spec = importlib.util.spec_from_file_location(f"pair_{file.stem}", file)
    if spec is None:
        raise UserError(f"{file}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up annotations that are strings
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise UserError(f"{file}: {user_error(error)}") from error
    for name in ("torch_side", "jax_side"):
        if not callable(getattr(module, name, None)):
            raise UserError(f"{file}: has no function {name}()")
    return module


def _call(file: Path, said: ModuleType, name: str) -> Any:
    try:
        return getattr(said, name)()
    except Exception as error:
        raise UserError(f"{file}: {name}() fails: {user_error(error)}") from error


def user_error(error: BaseException) -> str:
    """An exception of the user's code, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _torch_side(file: Path, given: Any) -> TorchSide:
    import torch

    if not (isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], torch.nn.Module)):
        raise UserError(f"{file}: torch_side() must return a torch.nn.Module and its inputs, a tuple or a dict")
    return TorchSide(given[0], _inputs(file, "torch_side", given[1]))


def _jax_side(file: Path, given: Any, inputs: Any) -> JaxSide:
    from flax import nnx

    parts = given if isinstance(given, tuple) else (given,)
    known = 1 if parts and isinstance(parts[0], nnx.Module) else 2
    if not (parts and callable(parts[0]) and known <= len(parts) <= known + 1):
        raise UserError(
            f"{file}: jax_side() must return an nnx.Module, or a function and its parameters (a linen.Module and its"
            " variables); then, if any, inputs"
        )
    if len(parts) > known:
        inputs = _inputs(file, "jax_side", parts[known])
    return JaxSide(parts[0], parts[1] if known == 2 else None, inputs)


def _inputs(file: Path, name: str, inputs: Any) -> Any:
    if not isinstance(inputs, tuple | list | Mapping):
        raise UserError(f"{file}: the inputs of {name}() must be a tuple or a dict, not {type(inputs).__name__}")
    return map_inputs(inputs, object, as_numpy)
