"""Is your port the same as the original? Puts the same weights into a torch module and a JAX function or nnx module,
runs both in float64 and float32, and names the first module that differs, by how much, and what the mistake may be.

    python -m parity_tests.compare parity_tests/examples/llama_block.py
    python -m parity_tests.compare port.py --gradients

FILE is a Python file, which is run, with two functions, and up to four names:

    torch_side()    the torch.nn.Module and its inputs, a tuple or a dict
    jax_side()      an nnx.Module, a flax.linen.Module and its variables, or a function and its parameters (any tree;
                    what is no array in it, as a number or a function, stays as it is), which is called with
                    (parameters, *inputs) and, if it takes it, record: record("name", value) says what torch's module
                    of that name returns. Inputs of its own, where they are not torch's, come last
    NAMES           names of torch's tensors to JAX's: a name, a list of names (equal parts along the first axis), or a
                    name and a function from torch's layout to JAX's. What is not said is proposed from names and shapes
    MODULES         names of torch's modules to JAX's, where they do not follow from the tensors'
    SOURCE          whose weights both get: "torch" (default) or "jax"
    FLOAT32         values (as they are called in the output) for which one side alone may compute in float32 whatever
                    the dtype

The exit code is 0 if all is equal within the bounds, 1 if not, 2 if the file cannot be compared.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from parity_tests.harness import ladder
from parity_tests.harness.links import require
from parity_tests.harness.measure import Measurement, relative_error
from parity_tests.harness.mutations import first_failure
from parity_tests.harness.pair import Pair, open_pair, user_error
from parity_tests.harness.quick import quick_flags
from parity_tests.harness.sides import Record
from parity_tests.harness.suspects import confirmed, looks, usual
from parity_tests.harness.trials import Scene, trials
from parity_tests.report import Report
from torch_ref.spec.interface import UserError
from train.shell import shell

SHOWN = 6
"""Suspects."""
ZERO = {"float64": 1e-13, "float32": 1e-5}
"""Below this share of the largest gradient a tensor's is rounding of zero (a bias of keys has none: softmax takes it
out), and its error is taken over the largest."""


def prepare(pair: Pair, source: str, keep: bool) -> Iterator[str]:
    """The same weights in both; says what was done."""
    yield f"Tensors of torch and JAX; both get the weights of {'torch' if source == 'torch' else 'JAX'}:"
    for link in pair.links:
        yield f"  {link.torch} -> {link.jax}, {link.how}" + (f" ({link.doubt})" if link.doubt else "")
    for side, names in pair.alone().items():
        yield from (f"  {name} is only in {side}" for name in names)
    drawn = pair.load(source, keep)
    if drawn:
        yield f"Noise was added to {', '.join(drawn)}: equal values look right whether or not they are read"


def measure(pair: Pair, allowed: Sequence[str], gradients: bool, report: Report, say: Any) -> dict[str, Record]:
    """Every rung into the report. Returns the records of float64 with all casts lifted, by side."""
    for link in pair.links if gradients else ():
        link.require_moves(f"{pair.file}: --gradients")
    lifted = {"torch": lambda _: True, "jax": lambda _: True}
    wide = _run(pair, "float64", lifted)
    partners = pair.partners(wide["torch"], wide["jax"])
    names = list(partners)
    if not any(name in partners for name in wide["torch"].outputs):
        raise UserError(f"{pair.file}: the models' outputs are not compared: JAX has no {pair.jax_name('output')!r}")
    if not any(wide["torch"].values[name].size for name in wide["torch"].outputs if name in partners):
        raise UserError(f"{pair.file}: nothing to compare: the models' outputs are empty; give inputs that are not")
    say(_compared(wide, partners))
    formulas = _values("modules", pair, "float64", wide)
    report.add(formulas, say)
    places = {side: _cast_places(record, partners, side) for side, record in wide.items()}
    for name in allowed:
        require(name, names, f"{pair.file}: FLOAT32: what is compared")
    one_sided = (set(places["torch"]) ^ set(places["jax"])) - set(allowed)
    if one_sided and first_failure(formulas) is None:
        lifts = {
            side: (lambda index, its=its: index >= len(its) or its[index] not in one_sided)
            for side, its in places.items()
        }
        found = _values("float32 inside", pair, "float64", _run(pair, "float64", lifts))
        report.add(found, say)
    exact = {"torch": None, "jax": None}
    report.add(_values("modules", pair, "float32", _run(pair, "float32", exact)), say)
    if gradients:
        of = {name: partners[name] for name in wide["torch"].outputs if name in partners}
        of = {name: other for name, other in of.items() if wide["torch"].values[name].dtype.kind in "fc"}
        if not of:
            raise UserError(f"{pair.file}: --gradients: the models return no floats")
        shapes = {name: wide["torch"].values[name].shape for name in of}
        outputs = {"torch": shapes, "jax": {of[name]: shape for name, shape in shapes.items()}}
        for dtype, lifts in (("float64", lifted), ("float32", exact)):
            report.add(_gradients(pair, dtype, _run(pair, dtype, lifts, outputs)), say)
    return wide


def _run(
    pair: Pair, dtype: str, lifts: dict[str, Any], gradients: Mapping[str, Mapping[str, tuple]] | None = None
) -> dict[str, Record]:
    """Both sides; with the gradients of these outputs, given with their shapes in torch."""
    records, gradients = {}, gradients or {}
    for side, model in (("torch", pair.torch), ("jax", pair.jax)):
        try:
            records[side] = model.run(dtype, lifts[side], gradients.get(side, {}))
        except Exception as error:
            raise UserError(f"{pair.file}: {side}_side()'s model fails in {dtype}: {user_error(error)}") from error
    return records


def _values(rung: str, pair: Pair, dtype: str, records: dict[str, Record]) -> list[Measurement]:
    got = pair.common(records["torch"], records["jax"])
    expected = {name: value for name, value in records["torch"].values.items() if name in got}
    return ladder.compare_trace(rung, pair.name, dtype, got, expected, lambda _, dtype: ladder.FORWARD[dtype])


def _compared(records: dict[str, Record], partners: Mapping[str, str]) -> str:
    """Which modules both have, and which one side alone."""
    names, there = list(partners), set(partners.values())
    torch = [name for name in records["torch"].values if not name.startswith("input of ") and name not in partners]
    jax = [name for name in records["jax"].values if not name.startswith("input of ") and name not in there]
    lines = [f"Compared: {len(names)} values, from {names[0]} to {names[-1]}"]
    lines += [f"; only in {side}: {', '.join(its)}" for side, its in (("torch", torch), ("JAX", jax)) if its]
    return "".join(lines)


def _cast_places(record: Record, partners: Mapping[str, str], side: str) -> list[str]:
    """Of each cast to float32, the next value after it that both sides have, under torch's name."""
    here = {other if side == "jax" else name: name for name, other in partners.items()}
    order, last = list(record.values), list(partners)[-1]
    return [next((here[name] for name in order[before:] if name in here), last) for before in record.casts]


def _gradients(pair: Pair, dtype: str, records: dict[str, Record]) -> list[Measurement]:
    """By the linked tensors, from the last to the first, and by the first input."""
    torch, jax = records["torch"].gradients, records["jax"].gradients
    pairs = {
        f"gradient of {link.torch}": (
            jax[link.jax],
            np.asarray(link.change(pair.slots[link.torch].view(torch[pair.slots[link.torch].tensor]))),
        )
        for link in reversed(pair.links)
        if link.jax in jax and pair.slots[link.torch].tensor in torch
    }
    if pair.torch.inputs is pair.jax.inputs and "input 0" in torch:
        pairs["gradient of the first input"] = jax["input 0"], torch["input 0"]
    largest = max((float(np.abs(expected).max(initial=0)) for _, expected in pairs.values()), default=0.0)
    measurements = []
    for name, (got, expected) in pairs.items():
        zero = max(np.abs(expected).max(initial=0), np.abs(got).max(initial=0)) < ZERO[dtype] * largest
        error = np.abs(got - expected).max(initial=0) / largest if zero else relative_error(got, expected)
        bound = ladder.GRADIENT[dtype]
        measurements.append(Measurement("gradients", pair.name, dtype, name, float(error), bound))
    return measurements


# Where they part, and why


def explain(pair: Pair, place: Measurement, wide: dict[str, Record]) -> Iterator[str]:
    """The first place where they part, and its suspects, those first that were tried and found guilty."""
    if place.rung == "gradients":
        yield f"The values agree, the gradients part first here: {place}"
        yield "  1. a detach or stop_gradient that one side has, or a backward pass of its own (custom_vjp, Function)"
        return
    expected = wide["torch"].values
    got = pair.common(wide["torch"], wide["jax"])
    scene = Scene(pair, place.where, expected, got)
    yield f"They part first in {scene.place}: {place}"
    if place.rung == "float32 inside":
        partners = pair.partners(wide["torch"], wide["jax"])
        names = list(partners)
        torch, jax = (set(_cast_places(record, partners, side)) for side, record in wide.items())
        known = names[: names.index(place.where) + 1]
        cast = next(name for name in reversed(known) if name in torch ^ jax)
        side, other = ("torch", "JAX") if cast in torch else ("JAX", "torch")
        yield (
            f"  1. confirmed, without it the difference vanishes: the dtype of a softmax, norm or router: {side} is in"
            f" float32 here whatever its input, {other} in the input's dtype. A float32 model does not show this, a"
            f" bfloat16 one does. If it is meant: FLOAT32 = ({cast!r},)"
        )
        return
    if place.dtype == "float32":
        yield "  1. float64 agrees: a lower precision of products (TF32, bfloat16), or float32 where digits cancel"
        return
    attempts = list({trial.text: trial for trial in trials(scene)}.values())
    said = [
        f"confirmed, with it the difference is {left:.0e}: {trial.text}. {_after(scene, record, place)}"
        for trial, record, left in confirmed(scene, place.bound, attempts)
    ]
    seen = [f"seen in the values: {text}" for text in looks(scene)]
    within = {f"{path}.{leaf}" if path else leaf for path, module in scene.inside() for leaf in module.state_dict()}
    alone = {side: [name for name in its if side == "JAX" or name in within] for side, its in pair.alone().items()}
    seen += [f"not the same weights: only {side} has {_some(its)}" for side, its in alone.items() if its]
    if not said:
        yield f"  Of {len(attempts)} mistakes that were made in torch on trial, none makes the difference vanish"
        seen += [f"usual for such a module and error: {text}" for text in usual(scene, place.error)]
    for number, text in enumerate((said + seen)[:SHOWN], 1):
        yield f"  {number}. {text}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _after(scene: Scene, record: Record, place: Measurement) -> str:
    """What comes after the place, with the mistake on both sides."""
    names = [name for name in record.values if name in scene.got]
    later = {name: record.values[name] for name in names[names.index(scene.name) :]}
    rest = ladder.compare_trace(place.rung, place.case, place.dtype, scene.got, later, lambda *_: place.bound)
    found = first_failure(rest)
    return f"Then the next difference: {found.where} off by {found.error:.1e}" if found else "Then all the rest agrees"


@shell
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m parity_tests.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="A Python file with both models, as described above.")
    parser.add_argument(
        "--gradients", action="store_true", help="Also compare gradients, by every tensor and the first input."
    )
    parser.add_argument("--keep-weights", action="store_true", help="Add no noise to tensors of equal values.")
    options = parser.parse_args(argv)
    os.environ.setdefault("XLA_FLAGS", quick_flags())  # operations are compiled one at a time and run once
    try:
        for package in ("torch", "flax"):
            __import__(package)
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: the models run in both") from error
    with warnings.catch_warnings():  # those of the user's models would stand between the measurements
        warnings.simplefilter("ignore")
        return compare(options.file, options.gradients, options.keep_weights)


def compare(file: Path, gradients: bool, keep_weights: bool) -> int:
    """Prints everything; the exit code. Raises `UserError`."""
    pair, said = open_pair(file)
    for line in prepare(pair, getattr(said, "SOURCE", "torch"), keep_weights):
        print(line)
    report = Report({})
    wide = measure(pair, getattr(said, "FLOAT32", ()), gradients, report, print)
    place = first_failure(report.measurements)
    if place is None:
        print("Equal within the bounds.")
        return 0
    for line in explain(pair, place, wide):
        print(line)
    return 1


if __name__ == "__main__":
    sys.exit(main())
