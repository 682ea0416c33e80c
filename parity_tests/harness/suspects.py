"""Why two modules differ: the usual suspects of docs/porting.md for an error of this kind and size.

Most are tried (`trials.py`). `looks` compares the two values with what was recorded before: is one a multiple of the
other, in another order, without an addend? What neither tells is listed by the kind of the module and the size of the
error.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from parity_tests.harness.measure import relative_error
from parity_tests.harness.sides import Record
from parity_tests.harness.trials import Scene, Trial


@dataclass(frozen=True)
class Usual:
    """A suspect that is only named: by the module's kind and the size of the error in float64."""

    text: str
    pattern: str
    """Of the names and classes of the modules concerned."""
    low: float
    high: float


USUAL = (
    Usual("a constant, table (RoPE's angles) or result that one side rounds to float32", ".", 1e-10, 1e-5),
    Usual("another epsilon, or one outside the root", "norm|ln", 1e-9, 1e-1),
    Usual("GELU by tanh on one side, by erf on the other", "mlp|ffn|act|gelu|down|fc|dense", 1e-6, 1e-2),
    Usual("another theta, scale or offset of positions in RoPE", "attn|attention|rope|rotary", 1e-4, 10),
    Usual("RoPE's pairs: halves on one side, interleaved on the other", "attn|attention|rope|rotary|q_|k_", 1e-3, 10),
    Usual("a mask that one side does not apply, or applies elsewhere", "attn|attention", 1e-3, 10),
    Usual("heads merged or K/V heads repeated in another order", "attn|attention|o_proj|out", 1e-2, 10),
    Usual("softmax's scale", "attn|attention", 1e-3, 10),
    Usual("equal scores: top-k breaks ties differently", "router|gate|moe|expert|topk", 1e-3, np.inf),
    Usual("a square weight that is not transposed", "proj|linear|dense|fc|out", 1e-2, 10),
    Usual("a bias that one side lacks", ".", 1e-3, 10),
    Usual("a residual or norm in another place", ".", 1e-2, np.inf),
    Usual("another layout of the tensors: axes swapped, [batch, seq] against [seq, batch]", ".", 1e-2, np.inf),
)


def usual(scene: Scene, error: float) -> list[str]:
    """The usual suspects by the module's kind and the error's size; all of that size where no kind fits."""
    concerned = " ".join(f"{path} {type(module).__name__}" for path, module in scene.inside()).lower()
    concerned += f" {scene.name}".lower()
    fitting = [each for each in USUAL if each.low <= error <= each.high]
    return [each.text for each in fitting if re.search(each.pattern, concerned)] or [each.text for each in fitting]


def confirmed(scene: Scene, bound: float, attempts: Iterable[Trial]) -> list[tuple[Trial, Record, float]]:
    """The trials that make the difference vanish, what torch then makes of it, and what is left; the least first."""
    pair, found = scene.pair, []
    for trial in attempts:
        with trial.plant():
            try:
                record = pair.torch.run("float64", lambda _: True)
            except Exception:
                continue  # the mistake cannot be made in this model
        value = record.values.get(scene.name)
        if value is not None:
            left = relative_error(scene.got[scene.name], value)
            if left <= bound:
                found.append((trial, record, left))
    return sorted(found, key=lambda each: each[2])


def looks(scene: Scene, tolerance: float = 1e-9) -> list[str]:
    """What the two values say by themselves."""
    got, expected = scene.got[scene.name], scene.expected[scene.name]
    if got.shape != expected.shape:
        return [f"the shapes differ: torch {list(expected.shape)}, JAX {list(got.shape)}"]
    if got.dtype != expected.dtype and got.dtype.kind not in "biu" and expected.dtype.kind not in "biu":
        return [f"the dtype: JAX has {got.dtype} here whatever its input, torch {expected.dtype}"]
    if not np.issubdtype(got.dtype, np.floating) or not np.isfinite(got).all() or not np.isfinite(expected).all():
        return []
    found = []
    names = [name for name in scene.expected if name in scene.got]
    earlier = names[: names.index(scene.name)] + [name for name in scene.expected if name not in scene.got]

    def like(value: np.ndarray, other: np.ndarray) -> bool:
        return value.shape == other.shape and bool(value.any()) and relative_error(value, other) < tolerance

    factor = float((got * expected).sum() / max((expected**2).sum(), 1e-300))
    if factor and abs(factor - 1) > tolerance and like(got, factor * expected):
        found.append(f"a factor: JAX has {factor:.6g} times torch's value everywhere")
    difference = got - expected
    flat = difference.reshape(-1, difference.shape[-1]) if difference.ndim > 1 else difference[None]
    if len(flat) > 1 and like(np.broadcast_to(flat[0], flat.shape), flat):
        found.append("an addend: the difference is the same at every position, as a bias that one side lacks makes it")
    for name in earlier:
        value = scene.expected[name]
        if value.shape == got.shape and like(got, value):
            found.append(f"something left out: JAX has here what torch has as {name}")
        if value.shape == got.shape and (like(difference, value) or like(-difference, value)):
            word = "lacks" if like(-difference, value) else "adds"
            found.append(f"a residual: JAX {word} {name}")
    if got.ndim > 1 and got.size < 1e7:
        for axes in itertools.permutations(range(got.ndim)):
            if axes != tuple(range(got.ndim)) and like(got.transpose(axes), expected):
                found.append(f"another layout: torch has the axes {list(axes)} of JAX's value")
                break
        if not like(got, expected) and like(np.sort(got, -1), np.sort(expected, -1)):
            found.append("the same values in another order along the last axis: heads, halves or a transposed reshape")
    return list(dict.fromkeys(found))[:4]
