"""How a JAX model that knows nothing of it is watched: calls of modules of nnx and `flax.linen`, and casts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np


def whole(value: Any) -> Any:
    """Under `jax.vmap` a value is that of one row: here those of all, whose axis comes first."""
    import jax

    while type(value).__name__ == "BatchTracer":
        value = value.val if value.batch_dim is None else jax.numpy.moveaxis(value.val, value.batch_dim, 0)
    return value


def of_linen(model: Any) -> Callable:
    """A module of `flax.linen` as a function of its variables, which records what the modules in it return."""
    from flax import linen

    def apply(variables: Any, *args: Any, record: Callable, **kwargs: Any) -> Any:
        def call(original: Callable, args: tuple, kwargs: dict, context: linen.module.InterceptorContext) -> Any:
            output = original(*args, **kwargs)
            path = context.module.path
            if path and context.method_name == "__call__":
                record(".".join(("params", *path)), output)
            return output

        with linen.intercept_methods(call):
            return model.apply(variables, *args, **kwargs)

    return apply


@contextlib.contextmanager
def watched(module: Any, recorder: Any) -> Iterator[None]:
    """Records every call of a module in an nnx model."""
    import jax
    from flax import nnx

    paths: dict[int, str] = {}
    for path, child in nnx.iter_modules(module):
        paths.setdefault(id(child), ".".join(map(str, path)))

    running: set[str] = set()

    def is_array(value: Any) -> bool:
        return isinstance(value, jax.Array)

    def wrapped(original: Callable) -> Callable:
        def call(child: Any, *args: Any, **kwargs: Any) -> Any:
            path = paths.get(id(child))
            if path is None or path in running:  # made on the way, or a class that calls the one it inherits from
                return original(child, *args, **kwargs)
            recorder.take(path, args, kwargs, is_array)
            running.add(path)
            try:
                output = original(child, *args, **kwargs)
            finally:
                running.discard(path)
            recorder.keep(path or "output", output, is_array)
            return output

        return call

    with contextlib.ExitStack() as stack:
        for cls in {type(child) for _, child in nnx.iter_modules(module) if callable(child)}:
            stack.enter_context(mock.patch.object(cls, "__call__", wrapped(cls.__call__)))
        yield


@contextlib.contextmanager
def lifted(recorder: Any) -> Iterator[None]:
    """Of casts from float64 to float32 those that the recorder lifts stay in float64."""
    from jax.extend.core import primitives

    left: list[Any] = []  # a cast that stays: under vmap and grad it comes here again for what is inside, uncounted

    def bind(primitive: Any, key: str) -> Any:
        original = primitive.bind

        def bound(*args: Any, **params: Any) -> Any:
            wide = any(getattr(each, "dtype", None) == np.float64 for each in args)
            if left or not wide or params.get(key) != np.float32:
                return original(*args, **params)
            if recorder.cast():
                return original(*args, **(params | {key: np.dtype(np.float64)}))
            left.append(primitive)
            try:
                return original(*args, **params)
            finally:
                left.pop()

        return mock.patch.object(primitive, "bind", bound)

    with bind(primitives.convert_element_type_p, "new_dtype"), bind(primitives.dot_general_p, "preferred_element_type"):
        yield
