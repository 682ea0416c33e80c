"""The annotations of both packages, checked while tests run: beartype, asked once about calls that are alike.

What an annotation here says of an argument is its type, its dtype and how its sizes go with those of the others, so a
call with the types, dtypes and shapes of one that was right is right. Only into lists and dicts it does not look, of
which beartype, too, looks at a single item. torch calls its functions anew in every layer of every step, where checking
each took a third of the time of 200 steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

from beartype import beartype


def checked_once(function: Callable) -> Callable:
    """`function` with its annotations checked, once for all calls that are alike. A type checker for `jaxtyped`."""
    checked = beartype(function)
    right: set[Hashable] = set()

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        alike = tuple(map(_form, args)), tuple(kwargs), tuple(map(_form, kwargs.values()))
        if alike in right:
            return function(*args, **kwargs)
        result = checked(*args, **kwargs)
        right.add(alike)
        return result

    return call


def _form(value: Any) -> Hashable:
    """All that an annotation can say of a value. Names (of modes, say) are told apart one by one."""
    kind = type(value)
    if hasattr(kind, "shape") and hasattr(kind, "dtype"):
        return kind, value.dtype, tuple(value.shape)
    if isinstance(value, tuple):
        return kind, *map(_form, value)
    return value if kind is str else kind
