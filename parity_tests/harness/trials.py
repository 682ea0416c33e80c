"""Mistakes of a port that can be made on the torch side, one at a time, where two modules differ: the one that makes
the difference vanish is the one that the JAX side has, or the other way round.

Each is a context manager that changes torch's weights, an attribute of its modules or what it calls while they run.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np

from parity_tests.harness.pair import Pair, split_name
from parity_tests.harness.sides import leaves_of

Plant = Callable[[], AbstractContextManager]


@dataclass(frozen=True)
class Trial:
    """A mistake that can be made on the torch side."""

    text: str
    """What JAX does if this is it."""
    plant: Plant


class Scene:
    """The first place where the sides differ: `name` in a record of torch, with what both have there."""

    def __init__(self, pair: Pair, name: str, expected: dict[str, np.ndarray], got: dict[str, np.ndarray]) -> None:
        self.pair, self.name, self.expected, self.got = pair, name, expected, got
        head, self.path, _ = split_name(name)
        self.is_input = bool(head)
        self.modules = dict(pair.torch.module.named_modules())
        path = self.path
        while path not in self.modules:  # `output`, or one of several results
            path = path.rpartition(".")[0]
        self.suspected = bool(path) and not self.is_input and f"input of {path}" not in got
        """Whether the module around it may be to blame as well: what went in is not known."""
        self.owner = path.rpartition(".")[0] if self.is_input else path
        """The module whose own code made the value."""

    @property
    def module(self) -> Any:
        return self.modules[self.owner]

    @property
    def fed(self) -> bool:
        """Whether what torch's module takes is a value that JAX has alike: then the code around it does nothing."""
        taken = self.expected.get(f"input of {self.owner}")
        if taken is None:
            return False
        names = [name for name in self.expected if name in self.got]
        alike = [self.expected[name] for name in names[: names.index(self.name)]]
        alike += [value for value in leaves_of(self.pair.torch.inputs) if isinstance(value, np.ndarray)]
        return any(value.shape == taken.shape and np.array_equal(value, taken) for value in alike)

    def outer(self) -> Scene:
        """The same place, with the module around the owner as the one to blame."""
        scene = copy.copy(self)
        scene.owner, scene.suspected = self.owner.rpartition(".")[0], False
        return scene

    def inside(self) -> Iterator[tuple[str, Any]]:
        """The owner and the modules in it, but for those whose results are known to agree, or come later."""
        settled = {path for path in self.got if path != self.owner and (self.is_input or path != self.path)}
        for name, module in self.module.named_modules():
            path = ".".join(part for part in (self.owner, name) if part)
            below = path[len(self.owner) :].lstrip(".").split(".") if name else []
            around = {".".join([*filter(None, [self.owner]), *below[: i + 1]]) for i in range(len(below))}
            if not around & settled:
                yield path, module

    @property
    def before(self) -> str | None:
        """The last value before it, which both have alike."""
        names = [name for name in self.expected if name in self.got]
        place = names.index(self.name)
        return names[place - 1] if place else None

    @property
    def place(self) -> str:
        """In words."""
        owner = self.owner or "the model"
        if self.suspected and not self.fed:
            around = self.owner.rpartition(".")[0] or "the model"
            return f"{owner}, or in {around}'s own code before it" + (f", after {self.before}" if self.before else "")
        if self.is_input:
            between = f"between {self.before} and {self.path}" if self.before else f"before {self.path}"
            return f"{owner}, in its own code {between}"
        inside = any(self.module.children()) and self.before
        return f"{owner}, in its own code after {self.before}" if inside else owner


def trials(scene: Scene) -> Iterator[Trial]:
    """The mistakes that the module where the sides part could have, the most usual first."""
    makers = (_transposed, _epsilons, _scales, _biases, _norms, _rope, _heads, _masks, _activations, _ties)
    if scene.is_input:  # then no weight of the module it goes into is to blame
        makers = (_rope, _masks, _activations, _heads, _scales, _epsilons, _norms, _ties, _transposed, _biases)
    for maker in makers:
        yield from maker(scene)
    if scene.suspected:
        yield from trials(scene.outer())


def _value(scene: Scene, changes: dict[str, np.ndarray]) -> Plant:
    return lambda: mock.patch.dict(scene.pair.torch.values, changes)


def _transposed(scene: Scene) -> Iterator[Trial]:
    inside, square = {path for path, _ in scene.inside()}, {}
    for slot in scene.pair.slots.values():
        if len(slot.shape) == 2 and slot.shape[0] == slot.shape[1] and slot.tensor.rpartition(".")[0] in inside:
            whole = scene.pair.torch.values[slot.tensor]
            turned = square.setdefault(slot.tensor, whole.copy())
            slot.view(turned)[...] = slot.view(whole).T
    for name, value in square.items():
        what = name if value.shape[0] == value.shape[1] else f"a part of {name}"
        yield Trial(f"{what} is square, and JAX uses it transposed", _value(scene, {name: value}))
    if len(square) > 1:
        yield Trial("all square weights transposed", _value(scene, square))


def _attributes(scene: Scene, pattern: str) -> Iterator[tuple[str, Any, str, float]]:
    """Numbers that modules in the owner keep under such a name."""
    for path, module in scene.inside():
        for attribute, value in vars(module).items():
            if re.fullmatch(pattern, attribute) and isinstance(value, float) and not isinstance(value, bool):
                yield path or type(module).__name__, module, attribute, value


def _epsilons(scene: Scene) -> Iterator[Trial]:
    for path, module, attribute, value in _attributes(scene, r".*(eps|epsilon).*"):
        for other in (1e-5, 1e-6, 1e-8, 1e-12, 1e-3, 1e-4, 1e-7, 0.0):
            if other != value:
                plant = _attribute(module, attribute, other)
                yield Trial(f"epsilon: JAX has {other:g} in {path}, torch {value:g}", plant)
        outside = {"rsqrt": _outside(value), "layer_norm": _layer_norm(True), "rms_norm": _rms_norm}
        yield Trial(f"epsilon: JAX adds that of {path} outside the root, torch inside", _rewritten(module, outside))


def _attribute(module: Any, attribute: str, value: Any) -> Plant:
    return lambda: mock.patch.object(module, attribute, value)


def _outside(eps: float) -> Callable:
    return lambda original, x, *args, **kwargs: 1 / ((x - eps).clamp_min(0).sqrt() + eps)


def _layer_norm(outside: bool) -> Callable:
    """With its epsilon outside the root, or of the variance over n - 1."""

    def layer_norm(original, x, shape, weight=None, bias=None, eps=1e-5):
        axes = tuple(range(-len(shape), 0))
        mean = x.mean(axes, keepdim=True)
        variance = ((x - mean) ** 2).mean(axes, keepdim=True)
        root = variance.sqrt() + eps if outside else (variance * math.prod(shape) / (math.prod(shape) - 1) + eps).sqrt()
        out = (x - mean) / root
        out = out if weight is None else out * weight
        return out if bias is None else out + bias

    return layer_norm


def _rms_norm(original, x, shape, weight=None, eps=None):
    """With its epsilon outside the root."""
    mean = (x**2).mean(tuple(range(-len(shape), 0)), keepdim=True)
    out = x / (mean.sqrt() + (eps or 0.0))
    return out if weight is None else out * weight


def _norms(scene: Scene) -> Iterator[Trial]:
    for path, module in scene.inside():
        name = f"{path}.weight" if path else "weight"
        value = scene.pair.torch.values.get(name)
        if value is not None and value.ndim == 1 and re.search("norm|ln", f"{path} {type(module).__name__}".lower()):
            yield Trial(f"JAX multiplies by 1 + {name}", _value(scene, {name: value + 1}))
            yield Trial(f"JAX does not apply {name}", _value(scene, {name: np.ones_like(value)}))
            yield Trial(
                f"JAX divides the variance of {path or 'the norm'} by n - 1",
                _rewritten(module, {"layer_norm": _layer_norm(False)}),
            )


def _scales(scene: Scene) -> Iterator[Trial]:
    for path, module, attribute, value in _attributes(scene, r".*(scale|scaling).*"):
        for text, other in (("1", 1.0), ("its square", value**2), ("its root", value**0.5)):
            if other != value:
                text = f"softmax's scale: JAX has {text} where torch has {attribute} = {value:.6g} in {path}"
                yield Trial(text, _attribute(module, attribute, other))
    fused = "scaled_dot_product_attention"
    if _calls(scene, fused):

        def unscaled(original, q, *args, **kwargs):
            return original(q, *args, **{**kwargs, "scale": 1.0})

        yield Trial("softmax's scale: JAX has none", _rewritten(scene.module, {fused: unscaled}))


def _biases(scene: Scene) -> Iterator[Trial]:
    for path, _ in scene.inside():
        for leaf in ("bias", "in_proj_bias"):
            name = f"{path}.{leaf}" if path else leaf
            value = scene.pair.torch.values.get(name)
            if value is not None:
                yield Trial(f"a missing bias: JAX does not add {name}", _value(scene, {name: np.zeros_like(value)}))


def _projections(scene: Scene) -> tuple[list[str], list[str], list[str], int]:
    """The tensors of the queries' and the keys' projections, the output's weight, and the size of a head."""
    values, size = scene.pair.torch.values, 0
    for _, module in scene.inside():
        size = getattr(module, "head_dim", None) or getattr(getattr(module, "config", None), "head_dim", None) or size
        if not size and getattr(module, "num_heads", 0):
            size = getattr(module, "embed_dim", getattr(module, "hidden_size", 0)) // module.num_heads
        if size:
            break
    below = [name for name in values if not scene.owner or name.startswith(f"{scene.owner}.")]

    def named(pattern: str) -> list[str]:
        return [name for name in below if re.search(rf"(^|[._])({pattern})([._]|$)", name)]

    return named("q|query|wq|q_proj"), named("k|key|wk|k_proj"), named("o|out|wo|o_proj|out_proj|dense"), int(size or 0)


def _rope(scene: Scene) -> Iterator[Trial]:
    """Rotating other pairs is rotating the same pairs of queries and keys whose values stand in another order."""
    queries, keys, _, size = _projections(scene)
    if not queries or not keys or not size or size % 2:
        return
    order = np.arange(size)
    interleaved = np.concatenate([order[0::2], order[1::2]])
    swapped = np.concatenate([order[size // 2 :], order[: size // 2]])
    for text, places in (
        ("RoPE: JAX rotates neighbouring values (interleaved), torch halves", interleaved),
        ("RoPE: JAX rotates halves, torch neighbouring values (interleaved)", np.argsort(interleaved)),
        ("RoPE: JAX rotates the other way round (the sign of the sine)", swapped),
    ):
        changes = {}
        for name in queries + keys:
            value = scene.pair.torch.values[name]
            if len(value) % size == 0:
                changes[name] = value.reshape(-1, size, *value.shape[1:])[:, places].reshape(value.shape)
        yield Trial(text, _value(scene, changes))


def _heads(scene: Scene) -> Iterator[Trial]:
    """Reading other K/V heads is being another query head, and going elsewhere into the output's projection."""
    queries, keys, outputs, size = _projections(scene)
    values = scene.pair.torch.values
    weights = [name for name in queries + keys + outputs if values[name].ndim == 2]
    if not size or len(weights) != 3 or len(values[weights[0]]) % size:
        return
    heads, kv_heads = (len(values[name]) // size for name in weights[:2])
    if not kv_heads or heads == kv_heads or heads % kv_heads:
        return
    # torch's head h reads h // group. If JAX's reads h mod kv_heads, its head is torch's at place `order`.
    order = np.arange(heads).reshape(heads // kv_heads, kv_heads).T.ravel()

    def plant(places: np.ndarray) -> Plant:
        changes = {}
        for name in queries:
            value = values[name]
            changes[name] = value.reshape(heads, size, *value.shape[1:])[places].reshape(value.shape)
        target = dict(scene.pair.torch.module.named_modules())[weights[2].rpartition(".")[0]]

        def back(_: Any, args: tuple) -> tuple:
            value = args[0]
            heads_last = value.reshape(*value.shape[:-1], heads, size)
            return (heads_last[..., np.argsort(places), :].reshape(value.shape), *args[1:])

        @contextmanager
        def reordered() -> Iterator[None]:
            hook = target.register_forward_pre_hook(back)
            with mock.patch.dict(values, changes):
                yield
            hook.remove()

        return reordered

    text, group = "K/V heads: query head h reads K/V head h mod {0} in {1}, h // {2} in {3}", heads // kv_heads
    yield Trial(text.format(kv_heads, "JAX", group, "torch"), plant(order))
    yield Trial(text.format(kv_heads, "torch", group, "JAX"), plant(np.argsort(order)))


def _masks(scene: Scene) -> Iterator[Trial]:
    import torch

    def bare(original, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
        return original(q, k, v, **kwargs)

    def causal(original, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
        return original(q, k, v, is_causal=True, **kwargs)

    def causal_softmax(original, x, *args, **kwargs):
        hidden = torch.ones(x.shape[-2:], dtype=torch.bool).triu(1) if x.ndim > 2 else torch.zeros((), dtype=torch.bool)
        return original(x.masked_fill(hidden, -torch.inf), *args, **kwargs)

    def hides(value: Any) -> bool:
        return bool(torch.as_tensor(value).max() < -1e3)

    def where(original, condition, x, *other):
        return x if other and hides(other[0]) else original(condition, x, *other)

    def masked_fill(original, x, mask, value):
        return x if hides(value) else original(x, mask, value)

    masks = r".*mask.*|is_causal"
    seeing = {"scaled_dot_product_attention": bare, "where": where, "masked_fill": masked_fill}
    yield Trial("a mask: JAX lets every position see every other", _rewritten(scene.module, seeing, without=masks))
    yield Trial(
        "a mask: JAX hides later positions, torch does not",
        _rewritten(scene.module, {"scaled_dot_product_attention": causal, "softmax": causal_softmax}),
    )


def _activations(scene: Scene) -> Iterator[Trial]:
    import torch

    choices = {
        "GELU by erf": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
        "GELU by tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))),
        "GELU by sigmoid (quick)": lambda x: x * torch.sigmoid(1.702 * x),
        "SiLU": lambda x: x * torch.sigmoid(x),
        "ReLU": lambda x: x.clamp_min(0),
        "ReLU squared": lambda x: x.clamp_min(0) ** 2,
        "no activation": lambda x: x,
    }
    used = [name for name in ("gelu", "silu", "relu") if _calls(scene, name)]
    for name, (text, function) in itertools.product(used, choices.items()):
        plant = _rewritten(scene.module, {name: lambda original, x, *a, f=function, **k: f(x)})
        yield Trial(f"the activation: JAX has {text}, torch {name}", plant)
    own = [
        (path, module)
        for path, module in scene.inside()
        if re.search("act|gelu|silu|relu", f"{path.rpartition('.')[2]} {type(module).__name__}".lower())
        and not any(module.parameters())
        and not any(module.children())
    ]
    for (path, module), (text, function) in itertools.product(own if not used else [], choices.items()):
        plant = _attribute(module, "forward", lambda x, f=function: f(x))
        yield Trial(f"the activation: JAX has {text}, torch {type(module).__name__} in {path}", plant)


def _ties(scene: Scene) -> Iterator[Trial]:
    import torch

    if not _calls(scene, "topk"):
        return

    def stable(flip: bool) -> Callable:
        def topk(original, x, k, dim=-1, largest=True, sorted=True):
            values = x.flip(dim) if flip else x
            order = torch.sort(values, dim=dim, descending=largest, stable=True).indices.narrow(dim, 0, k)
            order = x.shape[dim] - 1 - order if flip else order
            return torch.return_types.topk((x.gather(dim, order), order))

        return topk

    for word, flip in (("lowest", False), ("highest", True)):
        plant = _rewritten(scene.module, {"topk": stable(flip)})
        yield Trial(f"ties: JAX takes the {word} index among equal scores", plant)


# Rewriting what torch calls


def _mode(changes: dict[str, Callable], seen: set[str]) -> Any:
    from torch.overrides import TorchFunctionMode

    class Rewritten(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            name = getattr(function, "__name__", "")
            seen.add(name)
            if name in changes:
                return changes[name](function, *args, **(kwargs or {}))
            return function(*args, **(kwargs or {}))

    return Rewritten()


def _rewritten(module: Any, changes: dict[str, Callable], without: str = "") -> Plant:
    """While this module runs, functions of torch are these, which get the original first; keyword arguments whose name
    matches `without` are None (False, if they were a bool)."""

    @contextmanager
    def plant() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            original = module.forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                for name in [name for name in kwargs if without and re.fullmatch(without, name)]:
                    kwargs[name] = False if isinstance(kwargs[name], bool) else None
                with _mode(changes, set()):
                    return original(*args, **kwargs)

            stack.enter_context(mock.patch.object(module, "forward", forward))
            if without:  # a module that says of itself that it is causal
                for child in module.modules():
                    if getattr(child, "is_causal", False) is True:
                        stack.enter_context(mock.patch.object(child, "is_causal", False))
            yield

    return plant


def _calls(scene: Scene, name: str) -> bool:
    """Whether the owner calls such a function of torch."""
    seen: set[str] = set()
    original = scene.module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _mode({}, seen):
            return original(*args, **kwargs)

    with mock.patch.object(scene.module, "forward", forward):
        scene.pair.torch.run("float64")
    return name in seen
