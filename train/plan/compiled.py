"""What `--compile` prints of a program: memory, kernels, traffic and collectives, read from what XLA made of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from torch_ref.spec.storage import size_in_words
from train.plan.cards import Card
from train.plan.hlo import COLLECTIVES, Executed, Program, is_host_transfer, kind
from train.plan.programs import CompiledProgram

REACHED = 0.65
"""Fraction of the data sheet's bandwidth and peak that a train step is assumed to reach, one after the other. Measured
with `smol-774m`: 0.66 on an H200; 0.60 on an H100, before the experts' kernels had their present tiles."""


@dataclass
class Reading:
    """A compiled program with its text read."""

    made: CompiledProgram
    card: Card
    peak: float
    """FLOP/s of the card at most, in the program's dtype."""
    flops: float | None = None
    """Of the model on one device, where they are known."""

    @cached_property
    def program(self) -> Program:
        return Program.parse(self.made.compiled.as_text())

    @property
    def kernels(self) -> Counter[str]:
        """How many a device starts, by who made them."""
        found: Counter[str] = Counter()
        for one in self.program.kernels:
            found[kind(one.instruction)] += one.times
        return found

    @property
    def moved(self) -> int:
        """Bytes that kernels read and write, by their shapes."""
        return sum(one.times * self.program.moved(one) for one in self.program.kernels)

    @property
    def predicted(self) -> float | None:
        """Seconds of a run of the program without its collectives, where the model's FLOPs are known: an estimate."""
        if self.flops is None:
            return None
        own = sum(
            one.times * self.program.moved(one) for one in self.program.kernels if kind(one.instruction) != "collective"
        )
        return (own / self.card.bandwidth + self.flops / self.peak) / REACHED

    @property
    def host_transfers(self) -> list[str]:
        return [one.instruction.name for one in self.program.executed if is_host_transfer(one.instruction)]

    @property
    def open_loops(self) -> int:
        """Loops whose end the host has to ask the device for."""
        return sum(one.instruction.opcode == "while" and one.instruction.trips is None for one in self.program.executed)

    @property
    def conditionals(self) -> int:
        return sum(one.instruction.opcode == "conditional" for one in self.program.executed)

    @property
    def collectives(self) -> list[Executed]:
        return [one for one in self.program.executed if one.instruction.work in COLLECTIVES]

    def lines(self) -> list[str]:
        memory, kernels, card = self.made.memory, self.kernels, self.card
        parts = ", ".join(f"{size_in_words(size)} {name}" for name, size in memory.items())
        made = ", ".join(f"{count:,} {who}" for who, count in kernels.most_common())
        traffic = self.moved / card.bandwidth * 1e3
        text = (
            f"{self.moved / 1e9:.4g} GB by the shapes of kernels, {traffic:.3g} ms at {card.bandwidth / 1e12:.3g} TB/s"
        )
        if self.flops:
            arithmetic = self.flops / self.peak * 1e3
            text += f"; the model's {self.flops / 1e12:.3g} TFLOP are {arithmetic:.3g} ms at the peak"
        waits = f"{len(self.host_transfers)}"
        if self.conditionals or self.open_loops:
            waits += (
                f" (values of the device decide {self.conditionals} branches and the ends of {self.open_loops} loops)"
            )
        lines = [
            f"{self.made.name}: compiled in {self.made.seconds:.1f} s",
            f"  memory of a device   {size_in_words(sum(memory.values()))}: {parts}",
            f"  kernels started      {sum(kernels.values()):,}: {made}",
            f"  memory traffic       {text}",
            f"  host transfers       {waits}",
        ]
        if self.predicted:
            lines.append(
                f"  time, predicted      {self.predicted * 1e3:.3g} ms without collectives, assumed: traffic and "
                f"arithmetic one after the other, each at {REACHED} of those"
            )
        return lines + [f"  {line}" for line in self._collective_lines()]

    def _collective_lines(self) -> list[str]:
        """Like ones together, with the bytes that one device gets or gives in all."""
        found: dict[tuple[str, int], list[int]] = {}
        for one in self.collectives:
            size = max(sum(self.program.given(one)), self.program.result(one))
            group = found.setdefault((one.instruction.work, one.loops), [0, 0, 0])
            group[0] += 1
            group[1] += one.times
            group[2] += one.times * size
        lines = []
        for (name, loops), (written, times, size) in sorted(found.items()):
            where = f"inside {loops} loop{'s' if loops > 1 else ''}" if loops else "outside all loops"
            lines.append(f"{name:20} {written} written, {times} executed, {size_in_words(size)}, {where}")
        return lines
