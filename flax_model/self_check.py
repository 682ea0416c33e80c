"""Whether Flax's fast paths can be trusted on a device.

Kernels have been wrong on some cards and not on others, in ways that no error shows. Off the CPU, before training, the
paths that were chosen are compared on the device itself with the plain paths on the CPU, at the model's own sizes.
`torch_ref/self_check.py` is the counterpart.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from flax_model.attention import ATTENTION_PATHS, attend_plain
from flax_model.device import describe
from flax_model.moe import EXPERT_PATHS, Routing, experts_dense
from torch_ref.spec.config import ComputeConfig, ModelConfig
from torch_ref.spec.interface import UserError
from torch_ref.spec.leaving import no_room
from torch_ref.spec.storage import first_line

TOKENS = 256
"""Of the rows that paths are compared on."""
SLOWER = {"cudnn": "blocked", "blocked": "plain", "pallas": "dense", "grouped": "dense", "blocks": "dense"}
"""What is taken in place of a path that is wrong."""
TOLERANCE = {"bfloat16": 2e-2, "float32": 1e-4, "float64": 1e-10}
"""Of |got - expected| / |expected|, Euclidean norms: what rounding explains, with room."""


def self_checked(compute: ComputeConfig, device: jax.Device, config: ModelConfig) -> ComputeConfig:
    """The same settings, with a path that fails its check on this device replaced, with a warning, by a slower one.
    Raises `UserError` where that fails too."""
    of_attention = partial(attention_error, between_documents=compute.separator is not None)
    for option, check in (("attention", of_attention), ("moe", experts_error)):
        path = getattr(compute, option)
        while problem := _tried(check, path, compute.dtype, device, config):
            if path not in SLOWER:
                raise UserError(
                    f"--device {device.platform}: even --{option} {path} is wrong on {describe(device)}: {problem}; "
                    "use --device cpu or another version of jax"
                )
            message = f"--{option} {path} is wrong on {describe(device)}: {problem}; using the slower {SLOWER[path]}"
            warnings.warn(message, stacklevel=2)
            path = SLOWER[path]
        compute = dataclasses.replace(compute, **{option: path})
    return compute


def _tried(check: Callable[..., str | None], *arguments) -> str | None:
    """What a check finds; a path that fails outright is wrong too. A full device is not its doing: slower ones take
    more."""
    try:
        return check(*arguments)
    except Exception as error:  # of many kinds: no kernel for these sizes, a version that does not fit
        if no_room(error):
            raise
        return f"{type(error).__name__}: {first_line(error)}"


def attention_error(
    path: str, dtype: str, device: jax.Device, config: ModelConfig, between_documents: bool = False
) -> str | None:
    """Why an attention path cannot be trusted on `device`, or None: output and gradients must be those of the plain
    path on the CPU. `between_documents`: in a row of three documents, to which attention keeps."""
    c, generator = config, np.random.default_rng(0)
    heads = ((c.num_heads, c.qk_head_dim), (c.num_kv_heads, c.qk_head_dim), (c.num_kv_heads, c.v_head_dim))
    shapes = [(1, TOKENS, *shape) for shape in (*heads, (c.num_heads, c.v_head_dim))]
    *operands, upstream = (generator.standard_normal(shape).astype(dtype) for shape in shapes)

    def attend(function, device):
        def apply(q, k, v):
            documents = jnp.arange(TOKENS)[None] // (TOKENS // 3 + 1) if between_documents else None
            return function(q, k, v, c.softmax_scale, documents)

        return _with_gradients(apply, operands, upstream, device)

    return _difference(attend(ATTENTION_PATHS[path], device), attend(attend_plain, _cpu()), dtype)


def experts_error(path: str, dtype: str, device: jax.Device, config: ModelConfig) -> str | None:
    """Why an expert path cannot be trusted on `device`, or None: output and gradients must be those of all experts on
    all tokens on the CPU, with an expert that gets every token and, if there are enough, one that gets none."""
    c, generator = config, np.random.default_rng(0)
    if not c.num_moe_layers:
        return None
    shapes = (
        (TOKENS, c.hidden_size),
        (c.n_routed_experts, c.moe_intermediate_size, c.hidden_size),
        (c.n_routed_experts, c.moe_intermediate_size, c.hidden_size),
        (c.n_routed_experts, c.hidden_size, c.moe_intermediate_size),
        (TOKENS, c.hidden_size),
    )
    x, *weights, upstream = (generator.standard_normal(shape) / shape[-1] ** 0.5 for shape in shapes)
    wider = dtype if dtype == "float64" else "float32"
    scores = generator.random((TOKENS, c.n_routed_experts)).astype(wider)
    scores[:, 0], scores[:, -1] = 2, -1
    chosen = np.argsort(-scores, axis=1, kind="stable")[:, : c.num_experts_per_tok].astype(np.int32)
    shares = generator.random(chosen.shape).astype(wider)
    operands = [x.astype(dtype), shares, *(weight.astype(wider) for weight in weights)]

    def run(function, device):
        def apply(x, shares, gate, up, down):
            return function(x, Routing(jnp.asarray(chosen), shares, jnp.asarray(scores)), gate, up, down, False)

        return _with_gradients(apply, operands, upstream.astype(dtype), device)

    return _difference(run(EXPERT_PATHS[path], device), run(experts_dense, _cpu()), dtype)


def _cpu() -> jax.Device:
    """That of this process: of several, `jax.devices` begins with process 0's."""
    return jax.local_devices(backend="cpu")[0]


def _with_gradients(
    function: Callable, operands: list[np.ndarray], upstream: np.ndarray, device: jax.Device
) -> list[np.ndarray]:
    """Output of `function`, and the gradients of its operands for an upstream gradient, all on the host. float32
    products are taken in full: JAX's default on GPUs is coarser, and not what is in question."""

    def both(operands, upstream):
        out, backward = jax.vjp(function, *operands)
        return out, *backward(upstream)

    with jax.default_device(device), jax.default_matmul_precision("highest"):
        return [np.asarray(result) for result in jax.jit(both)(*jax.device_put((operands, upstream), device))]


def _difference(got: list[np.ndarray], expected: list[np.ndarray], dtype: str) -> str | None:
    """The first error that is larger than rounding explains."""
    for what, a, b in zip(("output", *["gradient"] * len(got)), got, expected, strict=False):
        a, b = np.float64(a), np.float64(b)
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        if not error <= TOLERANCE[dtype]:
            return f"{what} off by {error:.1e} of its norm"
    return None
