"""A run before it is started: parameters, arithmetic, memory, time, cost, disk and communication, from the settings and
a card's data sheet alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch_ref.spec.flops import flops_per_token
from torch_ref.spec.interface import UserError
from torch_ref.spec.memory import Framework, step_parts
from torch_ref.spec.parameters import count_active_parameters, count_parameters
from torch_ref.spec.storage import size_in_words
from train.plan.cards import Card
from train.plan.communication import Collective, collectives
from train.run.launch import settle
from train.run.options import Options
from train.run.overview import checkpoint_space, space_in_words


@dataclass(frozen=True)
class Gpus:
    """How many devices there are, and how they are joined."""

    slices: int
    hosts: int
    """Of a slice."""
    per_host: int

    @property
    def count(self) -> int:
        return self.slices * self.hosts * self.per_host

    def __str__(self) -> str:
        return f"{self.slices}x{self.hosts}x{self.per_host}"

    @classmethod
    def parse(cls, text: str) -> Gpus:
        """From SLICESxHOSTSxGPUS. Raises `UserError`."""
        parts = text.lower().split("x")
        if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
            raise UserError(f"--gpus {text}: must be SLICESxHOSTSxGPUS, such as 1x1x8 for one host with eight")
        return cls(*map(int, parts))


@dataclass(frozen=True)
class Plan:
    """What is to be expected. Bytes and seconds; of memory and communication those of one device."""

    options: Options
    """With what was `auto` settled for the card."""
    card: Card
    gpus: Gpus
    framework: Framework
    mfu: float
    price: float | None

    @property
    def memory(self) -> dict[str, int]:
        o = self.options
        return step_parts(
            o.model,
            o.dtype,
            o.rows_per_pass,
            o.seq_len,
            o.micro_batches,
            o.remat,
            o.mesh_shape,
            loss_chunk=o.tokens_per_chunk,
            framework=self.framework,
            on_gpu=self.card.is_gpu,
        )

    @property
    def flops_per_token(self) -> float:
        return flops_per_token(self.options.model, self.options.seq_len)

    @property
    def tokens_per_step(self) -> int:
        return self.options.batch_size * self.options.seq_len

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        return self.options.total_steps * self.tokens_per_step

    @property
    def peak(self) -> float:
        """FLOP/s of a device at most."""
        return self.card.peak(self.options.dtype, self.framework)

    @property
    def compute_seconds(self) -> float:
        """Of a step, by the fraction of the peak."""
        speed = self.mfu * self.peak * self.options.devices
        return self.tokens_per_step * self.flops_per_token / speed

    @property
    def collectives(self) -> list[Collective]:
        return collectives(self.options, self.card, self.gpus.per_host)

    @property
    def step_seconds(self) -> tuple[float, float]:
        """If all communication happens beside the arithmetic, and if none does."""
        talk = sum(one.seconds for one in self.collectives)
        return max(self.compute_seconds, talk), self.compute_seconds + talk

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        best, worst = self.step_seconds
        return self.tokens_per_step / best, self.tokens_per_step / worst

    @property
    def hours(self) -> tuple[float, float]:
        """Of all steps of the run."""
        best, worst = (seconds * self.options.total_steps / 3600 for seconds in self.step_seconds)
        return best, worst


def make_plan(options: Options, card: Card, gpus: Gpus, framework: Framework, mfu: float, price: float | None) -> Plan:
    """Settle what is `auto` as training does on such a card. Raises `UserError` where settings and devices do not go
    together."""
    if framework == "torch" and gpus.count > 1:
        raise UserError(f"--framework torch --gpus {gpus}: for Flax alone; use --framework flax")
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu {mfu}: must be above 0 and at most 1")
    if price is not None and not 0 <= price < math.inf:
        raise UserError(f"--price {price}: must be a number of at least 0")
    dtype = "bfloat16" if card.is_gpu else "float32"
    if options.dtype == "float64":
        raise UserError("--dtype float64: no plan is made for it; use float32 or bfloat16")
    options = settle(options, dtype, card.usable(framework), gpus.count, card.is_gpu, framework)
    if options.devices != gpus.count:
        raise UserError(f"--mesh {options.mesh}: takes {options.devices} devices, --gpus {gpus} are {gpus.count}")
    return Plan(options, card, gpus, framework, mfu, price)


def in_words(plan: Plan) -> str:
    """The plan as lines of text, assumptions included."""
    o, card = plan.options, plan.card
    several = o.devices > 1
    lines = [
        f"Model: {o.preset}, {count_parameters(o.model):,} parameters, {count_active_parameters(o.model):,} of them "
        f"active per token; {plan.flops_per_token / 1e9:.3g} GFLOP a token, forward and backward",
        f"Devices: {o.devices} x {card.name}"
        + (f" ({plan.gpus}: slices x hosts x GPUs), mesh {o.mesh}" if several else "")
        + f"; {plan.framework}, {o.dtype}, rematerialisation {o.remat}",
        f"Batch: {o.batch_size} x {o.seq_len} = {plan.tokens_per_step:,} tokens a step, {o.rows_per_pass} "
        f"{'row' if o.rows_per_pass == 1 else 'rows'} at once on a device, accumulated over {o.micro_batches} batches",
        "",
        *_memory(plan),
        "",
        *_speed(plan),
    ]
    if several:
        lines += ["", *_communication(plan)]
    keep = "" if o.keep_checkpoints else " (--keep-checkpoints N keeps only the latest N)"
    lines += ["", f"Disk: {space_in_words(checkpoint_space(o))}{keep}"]
    return "\n".join(lines)


def _memory(plan: Plan) -> list[str]:
    memory, usable = plan.memory, plan.card.usable(plan.framework)
    total = sum(memory.values())
    of = f", of {size_in_words(usable)} that {plan.framework} can take" if usable else ""
    lines = [f"Memory of a device at the peak of a step, estimated: {size_in_words(total)}{of}"]
    lines += [f"  {size_in_words(size):>9}  {part}" for part, size in memory.items()]
    if usable and total > usable:
        helps = {
            "more devices (--gpus, --mesh fsdp=N)": plan.framework == "flax",
            "a smaller --micro-batch-size": plan.options.rows_per_pass > 1,
            "--remat layers": plan.options.remat != "layers",
            "a shorter --seq-len, or another --device": True,
        }
        lines.append(f"  This does not fit: {', '.join(words for words, there_is in helps.items() if there_is)}")
    return lines


def _speed(plan: Plan) -> list[str]:
    options, peak = plan.options, plan.peak
    sheet = f"its {peak / 1e12:.4g} TFLOP/s" if plan.card.is_gpu else f"the {peak / 1e9:.3g} GFLOP/s measured just now"
    best, worst = plan.tokens_per_second
    shortest, longest = plan.hours
    differs = worst < 0.995 * best
    lines = [
        f"Speed at {plan.mfu:.0%} of {sheet} in {options.dtype} (assumed: --mfu): {best:,.0f} tokens/s, "
        f"{plan.step_seconds[0]:.3g} s a step"
    ]
    if differs:
        lines[0] += " if communication hides behind the arithmetic"
        lines.append(f"  and {worst:,.0f} tokens/s, {plan.step_seconds[1]:.3g} s a step, if none of it does")
    span = f"{_time(shortest)} to {_time(longest)}" if differs else _time(shortest)
    lines.append(
        f"Time: {options.total_steps:,} steps, {plan.tokens:,} tokens: {span}; starting, validation, samples and "
        "checkpoints come on top"
    )
    if plan.price is not None:
        costs = [hours * options.devices * plan.price for hours in plan.hours]
        span = f"{costs[0]:,.2f} to {costs[1]:,.2f}" if differs else f"{costs[0]:,.2f}"
        lines.append(f"Cost: {span}, at {plan.price:g} for a device and hour")
    return lines


def _communication(plan: Plan) -> list[str]:
    card, found = plan.card, plan.collectives
    lines = [
        f"Communication of a device in a step, at the data sheet's {card.link / 1e9:.0f} GB/s in a host and "
        f"{card.network / 1e9:.3g} GB/s a device between hosts, in one direction, nothing lost to latency:"
    ]
    for one in found:
        lines.append(
            f"  {size_in_words(int(one.bytes)):>9}  {one.seconds * 1e3:8.2f} ms  {one.name} over {one.axis}: {one.what}"
        )
    total = sum(one.bytes for one in found)
    seconds = sum(one.seconds for one in found)
    return [*lines, f"  {size_in_words(int(total)):>9}  {seconds * 1e3:8.2f} ms  in all"]


def _time(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:.3g} days"
    return f"{hours:.3g} h" if hours >= 1 else f"{hours * 60:.3g} min"
