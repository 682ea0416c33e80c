"""What a run will take, before anything is allocated:

    python -m train.plan --preset smol-774m --gpus 1x1x8 --device h100 --price 2.5
    python -m train.plan --preset smol-774m --gpus 1x4x8 --device a100 --mesh data=4,fsdp=8 --batch-size 256
    python -m train.plan --preset small --device cpu --framework torch

Takes every setting of training (`python -m train.flax_main --help`), of which batch, lengths, precision, mesh and steps
count, and `--config FILE` too; but `--device` and `--compile` mean other things here. Prints parameters, arithmetic,
memory of a device by part, speed and time at a share of the card's peak, cost, disk space, and for several devices what
they say to each other. Needs neither JAX nor torch. How near the estimates come is in docs/plan.md.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from torch_ref.spec.interface import UserError
from torch_ref.spec.memory import Framework
from train import command_line
from train.plan.cards import card
from train.plan.estimate import Gpus, Plan, in_words, make_plan
from train.plan.targets import target_config
from train.shell import COMPLETE, parse_flags, shell


@dataclass(frozen=True)
class PlanOptions:
    """What a run will take, before anything is allocated. Every other setting of training can be given besides: python
    -m train.flax_main --help."""

    gpus: str = "1x1x1"
    """Devices as SLICESxHOSTSxGPUS: 1x1x8 is one host with eight, 1x4x8 four of them."""
    device: str = "h100"
    """Card: h100, h200, b200, a100, a100-40gb, h100-pcie, l40s, l4, a10; or cpu, this machine."""
    framework: Framework = "flax"
    """Which of the two trains; they keep different things for the backward pass."""
    mfu: float = 0.4
    """Assumed speed, as a fraction of the card's peak in the compute dtype. Measured on an H200: 0.24 in Flax."""
    price: float | None = None
    """Price of one device for an hour, in any currency; without it no cost is given."""
    network_gbits: float | None = None
    """Network of a host for each of its cards, in Gbit/s. Default: as in NVIDIA's own systems."""
    compile: bool = False
    """Also compile the run's programs for the card by XLA's own compiler, without the card, and say what they hold."""


@shell
def main(argv: Sequence[str]) -> int:
    flags = [command_line.hyphenated(word) for word in argv]
    asked, of_training = parse_flags(
        PlanOptions, "python -m train.plan", flags, return_unknown_args=True, config=(tyro.conf.FlagCreatePairsOff,)
    )
    device = card(asked.device)
    if asked.network_gbits is not None:
        if not asked.network_gbits > 0:  # not a number either
            raise UserError(f"--network-gbits {asked.network_gbits:g}: must be above 0")
        device = dataclasses.replace(device, network=asked.network_gbits / 8 * 1e9)
    options = command_line.parse(of_training, "python -m train.plan")
    plan = make_plan(options, device, Gpus.parse(asked.gpus), asked.framework, asked.mfu, asked.price)
    print(in_words(plan), flush=True)
    if asked.compile:
        compile_for(asked.device, plan)
    return COMPLETE


def compile_for(name: str, plan: Plan) -> None:
    """Print what XLA makes of the run's programs for a card. Raises `UserError` for a card that it is not told of."""
    if plan.framework != "flax":
        raise UserError("--compile --framework torch: compiles what Flax runs")
    target_config(name)
    # Nothing runs: a card that is there stays free.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        from train.plan import programs
    except ImportError as error:
        print(f"\nNot compiled: {error.name} is not installed: pip install -e '.[cuda]'")
        return
    if lacking := programs.missing():
        print(f"\nNot compiled: {lacking} is not installed: pip install -e '.[cuda]'")
        return
    import jax

    from train.plan.compiled import Reading

    jax.config.update("jax_enable_compilation_cache", False)  # it wants a device to load what it kept
    devices = programs.gpus_of(name, plan.gpus)
    print(f"\nCompiled by XLA for {len(devices)} x {devices[0].device_kind}, its choices by trial left out:")
    flops = plan.tokens_per_step * plan.flops_per_token / len(devices)
    for made in programs.compile_programs(plan.options, devices):
        reading = Reading(made, plan.card, plan.peak, flops if made.name == "train step" else None)
        print("\n".join(reading.lines()), flush=True)


if __name__ == "__main__":
    sys.exit(main())
