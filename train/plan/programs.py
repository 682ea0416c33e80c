"""The programs of a run, compiled by XLA's own compiler for cards that need not be there: the train step, the
evaluation step, the prompts' pass and the loop over new tokens.

XLA chooses kernels by trying them, which takes the card: without one it keeps its defaults (products by Triton, not by
cuBLAS), so that a program on the card may differ in these choices.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from jax.stages import Compiled, Lowered

from flax_model import generate
from flax_model.backend import FlaxBackend
from flax_model.cpu import compiling_for
from flax_model.device import resolve_compute
from flax_model.sharding import abstract_parameters, make_mesh
from flax_model.values import structure
from torch_ref.spec.config import ComputeConfig, ModelConfig
from torch_ref.spec.interface import Sampling
from train.plan.estimate import Gpus
from train.plan.targets import target_config
from train.run.options import Options

WITHOUT_A_CARD = {"xla_gpu_autotune_level": "0"}
"""How XLA compiles: choosing by trying needs the card."""

NEW_TOKENS, PROMPT = 128, 256
"""Of the text whose programs are compiled."""


class CompiledProgram(NamedTuple):
    name: str
    seconds: float
    """That compiling took."""
    compiled: Compiled

    @property
    def memory(self) -> dict[str, int]:
        """Bytes on one device."""
        sizes = self.compiled.memory_analysis()
        return {
            "arguments": sizes.argument_size_in_bytes,
            "temporaries": sizes.temp_size_in_bytes,
            "results beside the arguments": sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        }


def missing() -> str | None:
    """What this environment lacks to compile for a GPU, in words; None if nothing."""
    if importlib.util.find_spec("jax_plugins") is None:
        return "JAX's CUDA plugin"
    plugins = [f"jax_plugins.xla_cuda{version}" for version in (13, 12)]
    return None if any(importlib.util.find_spec(name) for name in plugins) else "JAX's CUDA plugin"


def gpus_of(card: str, gpus: Gpus) -> list[jax.Device]:
    """Devices to compile for. Raises `UserError` for a card that XLA has no description of."""
    topology = topologies.get_topology_desc(platform="cuda", topology=str(gpus), target_config=target_config(card))
    return list(topology.devices)


def lowered(options: Options, devices: list[jax.Device]) -> Iterator[tuple[str, Lowered]]:
    """The programs of a run whose settings are settled for these devices. Generation runs on one of them."""
    batch = options.micro_batches, options.rows_per_pass * options.devices, options.seq_len
    with compiling_for(devices[0].platform):
        backend = FlaxBackend(options.model, options.compute, options.optimizer, devices=devices)
        if options.document_mask:
            backend.keep_within_documents(0)
        yield "train step", backend.lower_step(batch)
        yield "evaluation step", backend.lower_evaluation(options.seq_len)
        room = min(NEW_TOKENS, options.model.max_position // 2)
        prompt = min(PROMPT, options.model.max_position - room)
        alone = ComputeConfig(**{**vars(options.compute), "mesh": (1, 1, 1)})
        compute = resolve_compute(alone, devices[0], options.model)
        start, loop = lower_generation(options.model, compute, devices[0], 1, prompt, room)
        yield "prompt", start
        yield "new token", loop


def compile_programs(
    options: Options, devices: list[jax.Device], only: tuple[str, ...] = ()
) -> Iterator[CompiledProgram]:
    """`lowered`, or those named in `only`, compiled one after the other."""
    for name, program in lowered(options, devices):
        if not only or name in only:
            start = time.perf_counter()
            compiled = program.compile(compiler_options=WITHOUT_A_CARD)
            yield CompiledProgram(name, time.perf_counter() - start, compiled)


def lower_generation(
    config: ModelConfig, compute: ComputeConfig, device: jax.Device, batch: int, prompt: int, room: int
) -> tuple[Lowered, Lowered]:
    """What `generate` compiles: the pass of prompts of `prompt` tokens, and the loop over `room` new ones, greedy.
    Parameters are those of training, float32."""
    sharding = SingleDeviceSharding(device)

    def array(*shape: int, dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def on_device(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: array(*leaf.shape, dtype=leaf.dtype), tree)

    graphdef = structure(config)
    weights = on_device(abstract_parameters(config, compute.param_dtype, make_mesh([device], (1, 1, 1))))
    tokens, lengths = array(batch, prompt), array(batch)
    progress = jax.eval_shape(
        lambda *arrays: generate._start(graphdef, *arrays, room, compute), *weights, tokens, lengths
    )
    absorbed = jax.eval_shape(lambda *arrays: generate._absorb(graphdef, *arrays, compute.dtype), *weights)
    loop = generate._run.lower(
        graphdef,
        *weights,
        on_device(absorbed),
        on_device(progress),
        lengths=lengths,
        uniforms=array(batch, room, dtype=np.float32),
        limit=array(),
        prompt=prompt,
        sampling=Sampling(max_new_tokens=room, greedy=True, stop_token=None),
        compute=compute,
    )
    return generate._start.lower(graphdef, *weights, tokens, lengths, room, compute), loop
