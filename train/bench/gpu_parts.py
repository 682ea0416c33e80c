"""One process of the GPU check: `python -m train.bench.gpu_parts PART` imports what the part needs, waits for a line on
standard input, since the processes before it hold the card, and writes its rows as JSON lines.

- `case`: what `worker.py` measures of a `Case`
- `checks`: every attention and expert path of one framework at the model's sizes, output and gradients against the
  plain path in full float32 on the same device, and the time that each takes forward and backward
- `layers`: Flax's gradients of whole layers by each expert path
- `parity`: the ladder's comparison of both frameworks, each on the device, in full float32
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from torch_ref.spec.interface import UserError
from torch_ref.spec.storage import first_line, from_bfloat16_bits, to_bfloat16_bits
from train.bench.cases import Case
from train.bench.systems import clocked
from train.bench.worker import measure

OUTPUT = {"float32": 1e-5, "bfloat16": 2e-2}
"""Bounds of |out - expected| / |expected| (Euclidean norms)."""
GRADIENT = {"float32": 1e-4, "bfloat16": 2e-2}
LAYERS = 0.3
"""Bound of a parameter's gradient in `layer_gradients`."""
PLAIN = {"attention": "plain", "moe": "dense"}


def part_rows(part: dict) -> Iterator[dict]:
    """Rows of a part, which is one of the module's kinds with a case (its `system` says which framework's paths)."""
    case = Case(**{**part["case"], "tasks": tuple(part["case"]["tasks"])})
    if part["kind"] == "case":
        for row in measure(case):
            yield row | {"attention": case.attention, "moe": case.moe, "compile": case.compile}
    elif part["kind"] == "checks":
        yield from checks({"flax": FlaxPaths, "torch_ref": TorchPaths}[case.system](case), case)
        if case.system == "torch_ref" and case.compile != "off":
            yield from compiled_layer_rows(case)
    elif part["kind"] == "layers":
        yield from layer_gradients(case)
    else:
        yield from parity(case)


# ------------------------------------------------------------------------------------------------------ paths


def attention_operands(case: Case) -> list[np.ndarray]:
    """q, k, v, and the gradient of the output."""
    c, rows = case.config, (case.micro_batch, case.seq_len)
    generator = np.random.default_rng(0)
    heads = ((c.num_heads, c.qk_head_dim), (c.num_kv_heads, c.qk_head_dim), (c.num_kv_heads, c.v_head_dim))
    shapes = (*heads, (c.num_heads, c.v_head_dim))
    return [generator.standard_normal((*rows, *shape), np.float32) for shape in shapes]


def experts_operands(case: Case) -> tuple[np.ndarray, list[np.ndarray]]:
    """The choices, and x, weights of the choices, gate, up, down, and the gradient of the output. The last expert gets
    no token, the first twice its share."""
    c, tokens = case.config, case.micro_batch * case.seq_len
    generator = np.random.default_rng(0)
    score = generator.random((tokens, c.n_routed_experts))
    score[:, 0] += 0.15 * (c.n_routed_experts > 2)
    score[:, -1] -= c.n_routed_experts > c.num_experts_per_tok
    chosen = np.argsort(-score, axis=1)[:, : c.num_experts_per_tok].astype(np.int32)
    weights = generator.random(chosen.shape, np.float32) + 0.1
    shapes = (
        (tokens, c.hidden_size),
        (c.n_routed_experts, c.moe_intermediate_size, c.hidden_size),
        (c.n_routed_experts, c.moe_intermediate_size, c.hidden_size),
        (c.n_routed_experts, c.hidden_size, c.moe_intermediate_size),
        (tokens, c.hidden_size),
    )
    x, gate, up, down, upstream = (generator.standard_normal(shape, np.float32) for shape in shapes)
    down /= np.sqrt(c.moe_intermediate_size)
    return chosen, [x, weights, gate / np.sqrt(c.hidden_size), up / np.sqrt(c.hidden_size), down, upstream]


class FlaxPaths:
    """The attention and expert paths of Flax as functions of host arrays."""

    def __init__(self, case: Case) -> None:
        import jax

        from flax_model import attention, device, moe

        jax.config.update("jax_default_matmul_precision", "highest")  # float32 is float32; bfloat16 stays what it is
        self.jax, self.moe, self.case = jax, moe, case
        self.paths = {"attention": attention.ATTENTION_PATHS, "moe": moe.EXPERT_PATHS}
        self.device = device.resolve_device(case.device)
        self._resolve = device.resolve_compute

    def require(self, kind: str, path: str, dtype: str) -> None:
        """Raises `UserError` where this device does not have a path."""
        from torch_ref.spec.config import ComputeConfig

        self._resolve(ComputeConfig(dtype, **{kind: path}), self.device, self.case.config)

    def run(self, kind: str, path: str, dtype: str, operands: list[np.ndarray], chosen: Any) -> Callable[[], list]:
        """A call gives the output and the gradients of all operands but the last, the gradient of the output.
        Activations are in `dtype`, weights of experts in float32."""
        jax, function = self.jax, self.paths[kind][path]
        narrow = range(4) if kind == "attention" else (0, 5)
        arrays = [
            jax.device_put(jax.numpy.asarray(x, dtype if index in narrow else "float32"), self.device)
            for index, x in enumerate(operands)
        ]

        def apply(*values):
            if kind == "attention":
                return function(*values, self.case.config.softmax_scale)
            x, weights, *experts = values
            scores = jax.numpy.zeros((len(x), self.case.config.n_routed_experts))
            return function(x, self.moe.Routing(choices, weights, scores), *experts, False)

        def both(*values):
            out, backward = jax.vjp(apply, *values[:-1])
            return [out, *backward(values[-1])]

        choices = chosen if chosen is None else jax.device_put(chosen, self.device)
        compiled = jax.jit(both)
        return lambda: jax.block_until_ready(compiled(*arrays))

    def to_host(self, results: list) -> list[np.ndarray]:
        return [np.asarray(result, np.float32) for result in results]


class TorchPaths:
    """`FlaxPaths` for torch."""

    def __init__(self, case: Case) -> None:
        import torch

        from torch_ref import attention, device, moe

        self.torch, self.moe, self.case = torch, moe, case
        self.paths = {"attention": attention.ATTENTION_PATHS, "moe": moe.EXPERT_PATHS}
        self.device = device.resolve_device(case.device)

    def require(self, kind: str, path: str, dtype: str) -> None:
        """Every path runs on every device."""

    def run(self, kind: str, path: str, dtype: str, operands: list[np.ndarray], chosen: Any) -> Callable[[], list]:
        torch, function = self.torch, self.paths[kind][path]
        narrow = range(4) if kind == "attention" else (0, 5)
        *leaves, upstream = (
            torch.from_numpy(x).to(self.device, getattr(torch, dtype if index in narrow else "float32"))
            for index, x in enumerate(operands)
        )
        leaves = [leaf.requires_grad_() for leaf in leaves]
        choices = None if chosen is None else torch.from_numpy(chosen).long().to(self.device)

        def both() -> list:
            if kind == "attention":
                out = function(*leaves, self.case.config.softmax_scale)
            else:
                x, weights, *experts = leaves
                out = function(x, self.moe.Routing(choices, weights, weights), *experts, False)
            results = [out, *torch.autograd.grad(out, leaves, upstream)]
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            return results

        return both

    def to_host(self, results: list) -> list[np.ndarray]:
        return [result.detach().float().cpu().numpy() for result in results]


def path_flops(kind: str, path: str, case: Case) -> float:
    """Of one forward and backward pass, whatever the path: causal scores once, chosen experts alone."""
    c, tokens = case.config, case.micro_batch * case.seq_len
    if kind == "attention":
        return 3 * tokens * c.num_heads * (c.qk_head_dim + c.v_head_dim) * (case.seq_len + 1)
    return 18 * tokens * c.num_experts_per_tok * c.hidden_size * c.moe_intermediate_size


def checks(system: FlaxPaths | TorchPaths, case: Case) -> Iterator[dict]:
    """Each path in both precisions: how far it is from the plain path, in the units of the bound, and how long it
    takes. A path that the device does not have gives a row that says why."""
    for kind, plain in PLAIN.items():
        chosen, operands = (None, attention_operands(case)) if kind == "attention" else experts_operands(case)
        for dtype in ("bfloat16", "float32"):
            # What is compared is the path, not the rounding of its inputs.
            narrow = range(4) if kind == "attention" else (0, 5)
            rounded = [as_rounded(x, dtype) if index in narrow else x for index, x in enumerate(operands)]
            expected = None
            for path in system.paths[kind]:
                row = {"task": "check", "system": case.system, "what": f"{kind} {path}, {dtype}"}
                if path == plain and dtype == "float32":
                    continue
                try:
                    system.require(kind, path, dtype)
                    if expected is None:
                        expected = system.to_host(system.run(kind, plain, "float32", rounded, chosen)())
                    run = system.run(kind, path, dtype, rounded, chosen)
                    got = system.to_host(run())
                    seconds = clocked(run, case.repeats)[1]
                except UserError as error:
                    yield row | {"skipped": str(error)}
                    continue
                except Exception as error:  # one path that fails must not hide the others
                    yield row | failure(error)
                    continue
                errors = [distance(a, b) for a, b in zip(got, expected, strict=True)]
                bounds = [OUTPUT[dtype]] + [GRADIENT[dtype]] * (len(errors) - 1)
                ratios = [error / bound for error, bound in zip(errors, bounds, strict=True)]
                worst = int(np.argmax(np.nan_to_num(ratios, nan=np.inf)))
                yield row | {
                    "value": seconds * 1e3,
                    "unit": "ms",
                    "tflops": path_flops(kind, path, case) / seconds / 1e12,
                    "errors": errors,
                    "error": errors[worst],
                    "bound": bounds[worst],
                }


def failure(error: Exception) -> dict:
    return {"failed": f"{type(error).__name__}: {first_line(error)}"}


def as_rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values that `dtype` holds."""
    return x if dtype == "float32" else from_bfloat16_bits(to_bfloat16_bits(x))


def distance(got: np.ndarray, expected: np.ndarray) -> float:
    """|got - expected| / |expected|; infinite where anything is not finite."""
    if not np.isfinite(got).all():
        return float("inf")
    scale = float(np.linalg.norm(expected.astype(np.float64)))
    error = float(np.linalg.norm(got.astype(np.float64) - expected))
    return error / scale if scale else error


def compiled_layer_rows(case: Case) -> Iterator[dict]:
    """torch's layer, compiled and not: forward and backward pass, and whether the one is the other."""
    import dataclasses

    import torch

    from torch_ref import block, device, model, self_check
    from torch_ref.spec.parameters import initial_values

    config = dataclasses.replace(case.config, num_layers=1)
    where = device.resolve_device(case.device)
    compute = dataclasses.replace(case.compute, attention="sdpa", moe="grouped", compile="on")
    made = model.Model(config, where).load_values(initial_values(config, 0))
    tokens = torch.from_numpy(case.rows()[0]).to(where)
    problem = self_check.compile_error(compute, made, tokens)
    for what, run in (("uncompiled", block.run_layer), ("compiled", block.compiled_layer())):
        row = {"task": "check", "system": case.system, "what": f"layer {what}, {case.dtype}"}
        if problem and what == "compiled":
            yield row | {"failed": problem}
            return
        _, seconds = clocked(self_check.layer_pass(run, made, made.layers[0], tokens, compute), case.repeats)
        yield row | {"value": seconds * 1e3, "unit": "ms"}


def layer_gradients(case: Case) -> Iterator[dict]:
    """Flax's gradients of two layers and the loss, scanned and with its values kept or made again as in a step, by
    every expert path in the step's precision, against those by `dense`. What is wrong around a path shows here and not
    in a check of the path alone. Two paths round differently, and rounding chooses other experts for a few tokens:
    that is a tenth of a gradient."""
    import dataclasses

    import jax

    from flax_model.device import resolve_compute, resolve_device
    from flax_model.model import objective
    from flax_model.trees import merge
    from flax_model.values import from_values
    from torch_ref.spec.parameters import initial_values

    device, config = resolve_device(case.device), dataclasses.replace(case.config, num_layers=2)
    graphdef, *state = from_values(config, initial_values(config, 0), "float32")
    state, rows = jax.device_put((state, case.rows()), device)

    def gradients(path: str, remat: str) -> list[np.ndarray]:
        compute = resolve_compute(dataclasses.replace(case.compute, moe=path, remat=remat), device, config)

        def share(params: dict, biases: dict) -> Any:
            return objective(merge(graphdef, params, biases), *rows, compute, rows[1].size, len(rows[1]))[0]

        return [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(jax.jit(jax.grad(share))(*state))]

    expected = gradients("dense", "off")
    paths = ("pallas", "off"), ("pallas", "experts"), ("blocks", "off")
    for path, remat in paths if case.repeats > 1 else paths[:1]:
        row = {"task": "check", "system": case.system, "what": f"gradients {path}, remat {remat}, {case.dtype}"}
        try:
            errors = [distance(a, b) for a, b in zip(gradients(path, remat), expected, strict=True)]
            yield row | {"error": max(errors), "bound": LAYERS}
        except UserError as error:
            yield row | {"skipped": str(error)}
        except Exception as error:  # as above
            yield row | failure(error)


# ------------------------------------------------------------------------------------------------------ parity


def parity(case: Case) -> Iterator[dict]:
    """The ladder on this device, within its bounds: hidden states, logits, losses and gradients in several modes, 200
    training steps, greedy tokens. Each row gives the measurement nearest to its bound."""
    import dataclasses

    import jax

    jax.config.update("jax_default_matmul_precision", "highest")

    from flax_model.device import resolve_device
    from parity_tests.harness import cases, ladder, training
    from parity_tests.report import worst
    from torch_ref.device import resolve_device as resolve_torch
    from torch_ref.spec.config import ComputeConfig

    torch_device, jax_device = str(resolve_torch(case.device)), resolve_device(case.device)

    def row(what: str, measurements: list) -> dict:
        found = worst(measurements)
        where = f"{what}: {found.rung}, {found.where}"
        return {"task": "parity", "system": "flax", "what": where, "error": found.error, "bound": found.bound}

    # Sizes that the kernels take: 16 divides them.
    config = dataclasses.replace(cases.CONFIG, moe_intermediate_size=48, num_layers=2)

    def compared(dtype: str, flax_attention: str, flax_moe: str, torch_attention: str, torch_moe: str) -> list:
        flax = ComputeConfig(dtype, attention=flax_attention, moe=flax_moe)
        torch = ComputeConfig(dtype, attention=torch_attention, moe=torch_moe)
        made = cases.Case("gpu", config, torch, flax, seq=min(cases.SEQ, case.seq_len), rows=2)
        return ladder.run_case(made, torch_device=torch_device, jax_device=jax_device)

    modes = (
        ("float32", "blocked", "pallas", "sdpa", "grouped"),
        ("float32", "blocked", "blocks", "masked", "blocks"),
        ("float32", "plain", "dense", "plain", "dense"),
        ("float64", "blocked", "blocks", "sdpa", "grouped"),
    )
    names = torch_device, {"gpu": "cuda"}.get(jax_device.platform, jax_device.platform)
    first, *others = (
        (f"{mode[0]}, flax {mode[1]} {mode[2]}, torch {mode[3]} {mode[4]}", partial(compared, *mode)) for mode in modes
    )
    runs = (
        ("200 steps, float32", lambda: training.training_run("float32", *names, chaos_pairs=0).measurements()),
        ("greedy tokens after 30 steps, float32", lambda: training.decoding("float32", *names)),
    )
    for what, compare in (first, *runs, *others) if case.repeats > 1 else (first,):
        try:
            yield row(what, compare())
        except Exception as error:  # one comparison that fails must not hide the others
            yield {"task": "parity", "system": "flax", "what": what} | failure(error)


def main(text: str) -> None:
    part = json.loads(text)
    for module in part["imports"]:
        __import__(module)
    sys.stdin.readline()
    for row in part_rows(part):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
