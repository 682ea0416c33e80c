"""Reading what XLA compiled: the text of an optimised program (`Compiled.as_text()`) as instructions, with how often
each is executed and what it reads and writes by its shapes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
BYTES |= {"s64": 8, "u64": 8, "f64": 8, "s4": 0.5, "u4": 0.5}

NO_KERNEL = set(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id replica-id "
    "opt-barrier add-dependency async".split()
)
COLLECTIVES = "all-gather all-reduce reduce-scatter all-to-all ragged-all-to-all collective-permute".split()
HOST = {"infeed", "outfeed", "send", "recv"}


class Instruction(NamedTuple):
    """One line."""

    name: str
    shape: str
    """Its type, in XLA's words; of several results a tuple of types."""
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def attribute(self, name: str) -> str | None:
        """The computation, number or text behind `name=`."""
        found = re.search(rf"\b{name}=\"?%?([^,\s\"}}]+)", self.attributes)
        return found[1] if found else None

    @property
    def work(self) -> str:
        """The opcode, of an asynchronous instruction that of what it starts: `fusion` of a `fusion-start`."""
        return self.opcode.removesuffix("-start")

    @property
    def trips(self) -> int | None:
        """How often a loop runs its body, where XLA knows."""
        found = re.search(r'known_trip_count":\{"n":"(\d+)"', self.attributes)
        return int(found[1]) if found else None


class Executed(NamedTuple):
    """An instruction of a step, and how often it runs."""

    instruction: Instruction
    computation: str
    times: int
    loops: int
    """How many loops it is in."""


def shape_bytes(shape: str) -> int:
    """Bytes of an array, or of all arrays of a tuple."""
    total = 0.0
    for kind, sizes in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape):
        total += BYTES.get(kind, 4) * math.prod(int(size) for size in sizes.split(",") if size)
    return int(total)


@dataclass
class Program:
    """An optimised program."""

    computations: dict[str, list[Instruction]]
    entry: str

    @classmethod
    def parse(cls, text: str) -> Program:
        computations: dict[str, list[Instruction]] = {}
        entry, current = "", None
        for line in text.splitlines():
            header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if header:
                current = computations.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
            elif line.startswith("}"):
                current = None
            elif current is not None and (instruction := _instruction(line)) is not None:
                current.append(instruction)
        return cls(computations, entry)

    @cached_property
    def shapes(self) -> dict[tuple[str, str], str]:
        """By computation and name."""
        return {(name, line.name): line.shape for name, lines in self.computations.items() for line in lines}

    @cached_property
    def executed(self) -> list[Executed]:
        """Every instruction that runs, bodies of loops with the times they run (once where XLA does not know), of a
        conditional the branch that computes most. What is inside a fused kernel is not an instruction of its own."""
        return list(self._walk(self.entry, 1, 0))

    def _walk(self, computation: str, times: int, loops: int) -> Iterator[Executed]:
        for line in self.computations[computation]:
            yield Executed(line, computation, times, loops)
            if line.opcode == "while":
                trips = times * (line.trips or 1)
                for part in ("body", "condition"):
                    yield from self._walk(line.attribute(part), trips, loops + 1)
            elif line.opcode == "conditional":
                branches = [list(self._walk(branch, times, loops)) for branch in self.branches(line)]
                yield from max(branches, key=lambda branch: sum(computes(each.instruction) for each in branch))
            elif line.work == "call":
                yield from self._walk(line.attribute("to_apply") or line.attribute("calls"), times, loops)
            elif line.opcode == "async-start" and line.attribute("calls"):
                yield from self._walk(line.attribute("calls"), times, loops)

    def branches(self, conditional: Instruction) -> list[str]:
        """The computations that a conditional chooses from."""
        several = re.search(r"branch_computations=\{([^}]*)\}", conditional.attributes)
        if several:
            return [name.strip().lstrip("%") for name in several[1].split(",")]
        return [conditional.attribute("true_computation"), conditional.attribute("false_computation")]

    @property
    def kernels(self) -> list[Executed]:
        return [one for one in self.executed if is_kernel(one.instruction)]

    def moved(self, one: Executed) -> int:
        """Bytes that an instruction reads and writes each time, by the shapes of what it is given and gives; of what it
        only takes a slice of, or writes a slice into, the slice. What fits a cache is not known here."""
        line = one.instruction
        if not is_kernel(line):
            return 0
        if line.work != "fusion":
            return self._outside(one)
        inside = self.computations.get(line.attribute("calls") or "", [])
        shapes = {each.name: each.shape for each in inside}
        updated = set()
        written = 0
        for root in self._results(inside):
            if root.opcode == "dynamic-update-slice":
                written += shape_bytes(shapes[root.operands[1]])
                updated.add(self._origin(root.operands[0], inside))
            else:
                written += shape_bytes(root.shape)
        read = 0
        for each in inside:
            if each.opcode != "parameter" or each.name in updated:
                continue
            users = [user for user in inside if each.name in user.operands]
            sliced = users and all(
                user.opcode in ("dynamic-slice", "gather", "slice") and user.operands[0] == each.name for user in users
            )
            read += sum(shape_bytes(user.shape) for user in users) if sliced else shape_bytes(each.shape)
        return written + read

    def given(self, one: Executed) -> list[int]:
        """Bytes of each operand."""
        return [shape_bytes(self.shapes.get((one.computation, name), "")) for name in one.instruction.operands]

    def result(self, one: Executed) -> int:
        """Bytes of what an instruction gives. The type of a -start, but an all-reduce's, holds what it was
        given, too."""
        whole, given = shape_bytes(one.instruction.shape), sum(self.given(one))
        return whole - given if one.instruction.opcode.endswith("-start") and whole > given else whole

    def _outside(self, one: Executed) -> int:
        """`moved` of an instruction that is a kernel by itself."""
        if one.instruction.work in ("dynamic-slice", "gather", "slice"):
            return 2 * self.result(one)
        if one.instruction.work == "dynamic-update-slice":
            return 2 * self.given(one)[1]
        return self.result(one) + sum(self.given(one))

    def _results(self, inside: list[Instruction]) -> list[Instruction]:
        """What a fused computation gives, behind tuples and bitcasts."""
        by_name = {line.name: line for line in inside}

        def behind(line: Instruction) -> list[Instruction]:
            if line.opcode == "tuple":
                return [result for name in line.operands for result in behind(by_name[name])]
            if line.opcode in ("bitcast", "copy") and line.operands[0] in by_name:
                origin = by_name[line.operands[0]]
                if origin.opcode == "dynamic-update-slice":
                    return [origin]
            return [line]

        return behind(next(line for line in inside if line.root))

    def _origin(self, name: str, inside: list[Instruction]) -> str:
        """The parameter that a value is, behind bitcasts."""
        by_name = {line.name: line for line in inside}
        while by_name[name].opcode in ("bitcast", "copy"):
            name = by_name[name].operands[0]
        return name


def is_kernel(line: Instruction) -> bool:
    """Whether the device starts something for it."""
    return line.work not in NO_KERNEL and not line.opcode.endswith(("-update", "-done"))


def computes(line: Instruction) -> bool:
    return is_kernel(line) and not line.opcode.startswith("copy")


def kind(line: Instruction) -> str:
    """Who made the kernel of an instruction."""
    target = re.search(r'custom_call_target="([^"]+)"', line.attributes)
    if target:
        name = target[1]
        for start, maker in (("__cudnn", "cuDNN"), ("__cublas", "cuBLAS"), ("__gpu$xla.gpu.triton", "Pallas")):
            if name.startswith(start):
                return maker
        return f"library call {name}"
    if line.work in COLLECTIVES:
        return "collective"
    if line.work == "fusion":
        made = re.search(r'"kind":"(__[a-z_]+)"', line.attributes)
        if made and "gemm" in made[1]:
            return "product (Triton, by XLA)"
        if made and "triton" in made[1]:
            return "fused loop (Triton, by XLA)"
        return "fused loop"
    return "copy" if line.opcode.startswith("copy") else line.work


def is_host_transfer(line: Instruction) -> bool:
    """Whether it waits for the host, or sends to it."""
    return line.opcode in HOST or "callback" in (line.attribute("custom_call_target") or "") or "S(5)" in line.shape


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not found:
        return None
    rest = line[found.end() :]
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _closing(rest, len(opcode))
    operands = () if opcode in ("constant", "parameter") else tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
    return Instruction(found[2], shape, opcode, operands, rest[end:], bool(found[1]))


def _closing(text: str, start: int) -> int:
    """The place after the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index + 1
    return len(text)
