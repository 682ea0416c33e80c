"""Which tensor of a torch model is which of a JAX one, and how it is laid out there: what `parity_tests.compare` loads
weights by. Names are said by the user, or proposed from names and shapes; what could be two things is refused by name.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from torch_ref.spec.interface import UserError

SAME = (
    ("query", "q", "wq"),
    ("key", "k", "wk"),
    ("value", "v", "wv"),
    ("out", "o", "wo", "output", "dense"),
    ("attn", "attention", "self", "mha"),
    ("mlp", "ffn", "feed", "forward", "feedforward"),
    ("norm", "layernorm", "ln", "rmsnorm"),
    ("embed", "embedding", "embeddings", "wte", "emb", "tokens"),
    ("weight", "kernel", "scale", "w", "gamma"),
    ("bias", "b", "beta"),
    ("down", "w2"),
    ("gate", "w1"),
    ("up", "w3"),
)
"""Words that stand for the same thing in the names of parameters."""
WORDS = {word: group[0] for group in SAME for word in group}


@dataclass(frozen=True)
class Slot:
    """A tensor of the torch model, or a third of one that holds queries, keys and values."""

    tensor: str
    """Its name in the state dict; of one that is tied to others, the first."""
    shape: tuple[int, ...]
    kind: str
    """How torch lays it out: `linear` [out, in], `conv` [out, in, ...], or anything else."""
    parts: int = 1
    part: int = 0

    def view(self, tensor: Any) -> Any:
        """Of the whole tensor, a torch tensor or an array, what is in this slot."""
        size = tensor.shape[0] // self.parts
        return tensor[self.part * size : (self.part + 1) * size] if self.parts > 1 else tensor


@dataclass(frozen=True)
class Link:
    """A tensor of both models."""

    torch: str
    jax: str
    change: Callable[[np.ndarray], np.ndarray]
    """From torch's layout to JAX's; only moves values."""
    how: str = "as it is"
    doubt: str = ""
    """What speaks for another layout, where the shapes do not decide."""
    offset: Any = 0.0
    """What JAX's values have on top, as a norm's weight that is kept around zero; None where the user's function does
    more, and is then `change` itself."""

    def there(self, array: np.ndarray) -> np.ndarray:
        """Torch's values as JAX has them."""
        moved = self.change(array)
        return moved if self.offset is None else moved + self.offset

    def back(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """JAX's values as torch has them, in this shape."""
        places = self.change(np.arange(math.prod(shape)).reshape(shape))
        result = np.empty(math.prod(shape), array.dtype)
        result[places.ravel()] = (array - self.offset).ravel()
        return result.reshape(shape)

    def require_moves(self, asked: str) -> None:
        """Raises `UserError` for a function of the user's that can neither be undone nor applied to gradients."""
        if self.offset is None:
            raise UserError(f"{asked}: the function of {self.torch} in NAMES may only move values, or add to them")


def first_names(module: Any) -> dict[str, str]:
    """Of each parameter's name, the first one that the same parameter has: tied ones have several."""
    named = list(module.named_parameters(remove_duplicate=False))
    firsts = {id(parameter): name for name, parameter in reversed(named)}
    return {name: firsts[id(parameter)] for name, parameter in named}


def torch_slots(module: Any, split: Mapping[str, int]) -> dict[str, Slot]:
    """The float tensors of a module by name; `split` are those in several parts along the first axis, which are then
    called `name[0]`, `name[1]`, ... The one of `nn.MultiheadAttention` is split into what torch calls its parts."""
    import torch
    from torch import nn

    kinds = {nn.Linear: "linear", nn.modules.conv._ConvNd: "conv"}
    modules, firsts = dict(module.named_modules()), first_names(module)
    slots = {}
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            continue
        owner, _, leaf = name.rpartition(".")
        kind = next((kind for cls, kind in kinds.items() if isinstance(modules[owner], cls)), "")
        slot = Slot(firsts.get(name, name), tuple(tensor.shape), kind if leaf == "weight" else "")
        if name in split:
            parts = {f"{name}[{index}]": (split[name], index) for index in range(split[name])}
        elif isinstance(modules[owner], torch.nn.MultiheadAttention) and leaf.startswith("in_proj_"):
            before = f"{owner}." if owner else ""
            parts = {f"{before}{w}_proj.{leaf.removeprefix('in_proj_')}": (3, i) for i, w in enumerate("qkv")}
            slot = replace(slot, kind="linear" if leaf == "in_proj_weight" else "")
        else:
            slots[name] = slot
            continue
        for part, (count, index) in parts.items():
            if slot.shape[0] % count:
                raise UserError(f"NAMES: {name} of shape {slot.shape} is not {count} equal parts")
            shape = (slot.shape[0] // count, *slot.shape[1:])
            slots[part] = replace(slot, shape=shape, parts=count, part=index)
    return slots


def _layouts(slot: Slot, target: tuple[int, ...]) -> list[tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    """The ways in which a tensor can become one of this shape, the likeliest first."""
    if math.prod(slot.shape) != math.prod(target):
        return []
    ways: list[tuple[str, Callable]] = []

    def splits(shape: tuple[int, ...]) -> bool:
        """Whether `target` is this shape, with its axes cut into several (heads)."""
        position = 0
        for size in shape:
            product = 1
            while product < size and position < len(target):
                product, position = product * target[position], position + 1
            if product != size:
                return False
        return all(size == 1 for size in target[position:])

    if slot.kind == "conv":
        moved = (*slot.shape[2:], slot.shape[1], slot.shape[0])
        if moved == target:
            ways.append(("[out, in, ...] to [..., in, out]", lambda a: np.moveaxis(a, (0, 1), (-1, -2))))
    if len(slot.shape) == 2 and splits(slot.shape[::-1]):
        how = "transposed" if len(target) == 2 else f"transposed, as {list(target)}"
        ways.append((how, lambda a: a.T.reshape(target)))
    if splits(slot.shape):
        how = "as it is" if slot.shape == target else f"as {list(target)}"
        ways.append((how, lambda a: a.reshape(target)))
    if len(slot.shape) == 2 and slot.kind != "linear":
        ways.sort(key=lambda way: way[0].startswith("transposed"))
    return ways


def _link(name: str, slot: Slot, jax: str, target: tuple[int, ...]) -> Link | None:
    ways = _layouts(slot, target)
    if not ways:
        return None
    link = Link(name, jax, ways[0][1], ways[0][0])
    if len(ways) > 1 and not (slot.kind == "linear" and jax.rpartition(".")[2] == "kernel"):
        link = replace(link, doubt=f"{ways[1][0]} has that shape too")  # a kernel is [in, out] by Flax's convention
    return link


def words(name: str) -> Counter:
    """The words of a name, those that mean the same made the same."""
    parts = re.findall(r"[a-z]+\d?|\d+", name.lower())
    return Counter(WORDS.get(part, part) for part in parts)


def likeness(one: str, other: str) -> float:
    """How alike two names are, from 0 to 1. Names of different layers, or a weight and a bias, are not alike."""
    numbers = [[word for word in re.split(r"[._\[\]]+", name) if word.isdigit()] for name in (one, other)]
    if numbers[0] != numbers[1]:
        return 0.0
    a, b = words(one), words(other)
    if len({"bias" in words(re.split(r"[._]+", name)[-1]) for name in (one, other)}) > 1:
        return 0.0
    return sum((a & b).values()) / max(sum((a | b).values()), 1)


def propose(slots: Mapping[str, Slot], leaves: Mapping[str, tuple[int, ...]], given: Mapping[str, Any]) -> list[Link]:
    """A link for every tensor of torch that JAX has a tensor for. `leaves` are the shapes of JAX's tensors; `given` is
    the user's map, names to a name or to a pair of a name and a function. Raises `UserError` where two would do."""
    links = {name: _given(name, said, slots, leaves) for name, said in given.items()}
    takers: dict[str, str] = {}
    for name, link in links.items():
        first = takers.setdefault(link.jax, name)
        if any(getattr(slots[first], field) != getattr(slots[name], field) for field in ("tensor", "part")):
            raise UserError(
                f"NAMES: {first} and {name} cannot both be {link.jax}: JAX's function may stack two parameters"
            )
    free = {name: shape for name, shape in leaves.items() if name not in {link.jax for link in links.values()}}
    options: dict[str, dict[str, float]] = {}
    for name, slot in slots.items():
        if name not in links:
            fitting = {leaf: likeness(name, leaf) for leaf, shape in free.items() if _layouts(slot, shape)}
            options[name] = {leaf: score for leaf, score in fitting.items() if score > 0}
    while True:
        decided = {}
        for name, scores in options.items():
            best = _best(scores)
            if best and _best({other: its[best] for other, its in options.items() if best in its}) == name:
                decided[name] = best
        if not decided:
            break
        for name, leaf in decided.items():
            links[name] = _link(name, slots[name], leaf, leaves[leaf])
            del options[name]
        options = {n: {k: v for k, v in its.items() if k not in decided.values()} for n, its in options.items()}
    unclear = {name: _closest(scores) for name, scores in options.items() if scores}
    if unclear:
        said = "; ".join(f"{name} could be {' or '.join(leaves)}" for name, leaves in unclear.items())
        raise UserError(f"NAMES: {said}: say which in the file's NAMES")
    return _settle([links[name] for name in slots if name in links], slots, leaves)


def _best(scores: Mapping[str, float]) -> str | None:
    """The name with the highest score, if one alone has it."""
    highest = max(scores.values(), default=0.0)
    best = [name for name, score in scores.items() if score == highest]
    return best[0] if len(best) == 1 else None


def _closest(scores: Mapping[str, float]) -> list[str]:
    highest = max(scores.values())
    return sorted(name for name, score in scores.items() if score == highest)[:4]


def _settle(links: list[Link], slots: Mapping[str, Slot], leaves: Mapping[str, tuple[int, ...]]) -> list[Link]:
    """Where the shape does not say whether a matrix is transposed, it is what the others of this model are that have
    the same last name, if they agree; `doubt` says so."""
    settled = []
    for link in links:
        if link.doubt:
            last = link.jax.rpartition(".")[2]
            peers = {
                other.how.startswith("transposed")
                for other in links
                if slots[other.torch].kind == slots[link.torch].kind and len(slots[other.torch].shape) == 2
                if not other.doubt and other.jax.rpartition(".")[2] == last
            }
            if len(peers) == 1:
                wanted = peers.pop()
                ways = _layouts(slots[link.torch], leaves[link.jax])
                how, change = next(way for way in ways if way[0].startswith("transposed") == wanted)
                link = replace(link, how=how, change=change, doubt=f"square; like the other tensors named {last}")
        settled.append(link)
    return settled


def _given(name: str, said: Any, slots: Mapping[str, Slot], leaves: Mapping[str, tuple[int, ...]]) -> Link:
    leaf, change = said if isinstance(said, tuple) else (said, None)
    require(name, slots, "NAMES: torch")
    require(leaf, leaves, "NAMES: JAX")
    if change is None:
        link = _link(name, slots[name], leaf, leaves[leaf])
        if link is None:
            raise UserError(f"NAMES: {name} of shape {slots[name].shape} does not become {leaf} of {leaves[leaf]}")
        return link
    numbers = np.arange(math.prod(slots[name].shape))
    try:
        got = np.asarray(change(numbers.reshape(slots[name].shape)))
        offset = np.asarray(change(np.zeros(slots[name].shape)), np.float64)
    except Exception as error:
        raise UserError(f"NAMES: the function of {name} fails: {error}") from error
    if got.shape != tuple(leaves[leaf]):
        raise UserError(f"NAMES: the function of {name} gives the shape {got.shape}, {leaf} has {leaves[leaf]}")
    how, places = "by its function in NAMES", got - offset
    if not np.array_equal(np.sort(places, axis=None), numbers):
        return Link(name, leaf, lambda a: np.asarray(change(a)), how, offset=None)
    places = places.astype(np.int64)  # not by the function itself, which may round as jnp does
    return Link(name, leaf, lambda a: a.ravel()[places], how, offset=offset)


def require(name: str, known: Iterable[str], what: str) -> None:
    """Raises `UserError` for a name that is none, with the closest that is one."""
    if name not in known:
        close = difflib.get_close_matches(name, list(known), 1, 0.0)
        raise UserError(f"{what} has no {name!r}" + (f"; {close[0]!r}?" if close else ""))


def module_names(links: Iterable[Link], given: Mapping[str, str]) -> dict[str, str]:
    """Torch's modules to JAX's: those that hold linked tensors, the modules around them, and what the user says."""
    votes: Counter = Counter()
    for link in links:
        one, other = link.torch.split("[")[0].split(".")[:-1], link.jax.split(".")[:-1]
        while one and other:
            votes[".".join(one), ".".join(other)] += 1
            one, other = one[:-1], other[:-1]
    names = {"": ""}
    for (torch, jax), _ in votes.most_common():
        if torch not in names and jax not in names.values():
            names[torch] = jax
    taken = set(given.values())
    return {torch: jax for torch, jax in names.items() if jax not in taken} | dict(given)
