"""The rungs of parity, from the weights of both models being the same bits up to their gradients.

Each rung is a function that returns measurements in the order of the computation, so that the first one beyond its
bound names the place where the models part. `training.py` goes on with the optimizer step and training runs. pytest,
the mutation suite and the report all use these functions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from parity_tests.harness.cases import Case, case_batch, case_values
from parity_tests.harness.measure import Measurement, Outcome, Values, relative_error, run_flax, run_torch
from torch_ref.spec.checkpoint import named_leaves
from torch_ref.spec.config import ModelConfig
from torch_ref.spec.parameters import initial_values, parameter_table

FORWARD = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 1e-1}
"""Bounds of modules, hidden states, logits and losses: largest error over largest value. In bfloat16, of which a value
has 8 bits, they only say that nothing is broken in that type; what is computed is compared in the others."""
TRACED_LAYERS = 3
"""Layers for whose modules `FORWARD` bounds what they return in the running model in float32. Deeper ones carry the
errors of all layers before them, and get it times the root of their number over this. Measured on 30 layers (hidden
size 96, 2 x 128 tokens): the worst module of a layer is off by 7.5e-7 in the first, 2e-6 in the 5th, 4e-6 in the 10th
and 9.7e-6 in the 26th, which is layer^0.7; with training's start values 8e-7 to 8e-6, layer^0.7; at the sizes of
smol-774m 1.3e-5. In float64 the same goes from 1e-15 to 2e-14: nothing is widened there."""
GRADIENT = {"float64": 1e-10, "float32": 1e-4}
"""Bounds of every parameter's gradient."""
DIVERGENCE = {"float64": 1e-12, "float32": 1e-9, "bfloat16": 1e-2}
"""Bounds of the KL divergence per token, nats. Far below the squares of what could be seen in logits: a wrong order of
RoPE's pairs has been seen to cost another project no more than 5e-6."""


def round_trip(
    config: ModelConfig, dtype: str, name: str, sources: Mapping[str, Mapping[str, np.ndarray]] | None = None
) -> list[Measurement]:
    """Weights into Flax's stacked trees, back, into torch's state dict and back: the number of tensors whose bits
    changed. `sources` are weights by name; by default values of full precision and those of the seeded start."""
    import jax
    import torch

    from flax_model.values import from_values, to_values
    from torch_ref.model import Model

    if sources is None:
        made = {"drawn": case_values(config), "seeded": initial_values(config, seed=1)}
        sources = {source: {row.name: value.astype(dtype) for row, value in values} for source, values in made.items()}
    measurements = []
    for source, original in sources.items():
        rows = parameter_table(config)
        with jax.enable_x64(dtype == "float64"), jax.default_device(jax.devices("cpu")[0]):
            _, params, biases = from_values(config, ((row, original[row.name]) for row in rows), dtype)
            through_flax = ((row, np.array(value)) for row, value in to_values(config, params, biases))
            model = Model(config, dtype=getattr(torch, dtype)).load_values(through_flax)
        for row_name, tensor in model.state_dict().items():
            changed = tensor.numpy().tobytes() != original[row_name].tobytes()
            where = f"{row_name} ({source})"
            measurements.append(Measurement("round trip", name, dtype, where, float(changed), 0.0))
        assert len(model.state_dict()) == len(rows)
    return measurements


def modules(config: ModelConfig, dtype: str, seed: int = 3) -> list[Measurement]:
    """Each kind of module alone, on identical inputs: its output, and for an identical upstream gradient the gradients
    of its input and its parameters."""
    import jax
    import torch

    from flax_model import attention, layers, moe, rotary, trees
    from torch_ref import attention as torch_attention
    from torch_ref import layers as torch_layers
    from torch_ref import moe as torch_moe
    from torch_ref import rotary as torch_rotary

    c, seq = config, 40
    makers = {
        "RMSNorm": lambda t, m: t.RMSNorm(c.hidden_size, c.rms_norm_eps),
        "Linear": lambda t, m: t.Linear(c.hidden_size, c.vocab_size),
        "SwiGLU": lambda t, m: t.SwiGLU(c.hidden_size, c.intermediate_size),
        "Attention": lambda t, m: m[0].Attention(c),
        "MoE": lambda t, m: m[1].MoE(c),
    }
    generator = np.random.default_rng(seed)
    torch_modules = {name: make(torch_layers, (torch_attention, torch_moe)) for name, make in makers.items()}
    tensors = {
        name: {
            key: 1.2 * c.init_std * generator.standard_normal(tuple(tensor.shape)) + (tensor.ndim == 1)
            for key, tensor in module.state_dict().items()
        }
        for name, module in torch_modules.items()
    }
    tensors["MoE"]["router.balance_bias"] = 0.1 * generator.standard_normal(c.n_routed_experts)
    x = generator.standard_normal((2, seq, c.hidden_size)).astype(dtype)
    upstream = {
        name: generator.standard_normal((2, seq, c.vocab_size if name == "Linear" else c.hidden_size)).astype(dtype)
        for name in makers
    }

    def torch_results(name: str) -> dict[str, np.ndarray]:
        module = torch_modules[name].to(getattr(torch, dtype))
        module.load_state_dict({key: torch.from_numpy(value.astype(dtype)) for key, value in tensors[name].items()})
        leaf = torch.from_numpy(x).requires_grad_()
        rope = torch_rotary.make_rope(c, seq, leaf.dtype, leaf.device)
        extra = {"Attention": (rope, "sdpa"), "MoE": ("grouped", False)}.get(name, ())
        out = module(leaf, *extra)
        out = out.out if name == "MoE" else out
        out.backward(torch.from_numpy(upstream[name]))
        gradients = {f"gradient of {key}": value.grad.numpy() for key, value in module.named_parameters()}
        return {"output": out.detach().numpy(), "gradient of the input": leaf.grad.numpy(), **gradients}

    with jax.enable_x64(dtype == "float64"):
        flax_modules = {name: make(layers, (attention, moe)) for name, make in makers.items()}

        def flax_results(params, biases, x):
            results = {}
            for name, module in flax_modules.items():
                graphdef = trees.split(module)[0]

                def run(params, x, name=name, graphdef=graphdef):
                    rope = rotary.make_rope(c, seq, x.dtype)
                    extra = {"Attention": (rope, "blocked"), "MoE": ("grouped", False)}.get(name, ())
                    out = trees.merge(graphdef, params, biases[name])(x, *extra)
                    return out.out if name == "MoE" else out

                out, backward = jax.vjp(run, params[name], x)
                results[name] = out, *backward(upstream[name])
            return results

        empty = {name: trees.split(module)[1:] for name, module in flax_modules.items()}
        filled = {
            name: [
                trees.consume(lambda path, _, name=name: tensors[name][".".join(path)].astype(dtype), tree)
                for tree in pair
            ]
            for name, pair in empty.items()
        }
        params, biases = ({name: pair[part] for name, pair in filled.items()} for part in (0, 1))
        flax = jax.device_get(jax.jit(flax_results)(params, biases, x))

    measurements = []
    for name in makers:
        expected = torch_results(name)
        out, params_gradient, x_gradient = flax[name]
        got = {"output": out, "gradient of the input": x_gradient}
        got |= {f"gradient of {key}": leaf for key, leaf in named_leaves(params_gradient)}
        assert got.keys() == expected.keys(), (got.keys(), expected.keys())
        for what, value in expected.items():
            bound = (FORWARD if what == "output" else GRADIENT)[dtype]
            error = relative_error(got[what], value)
            measurements.append(Measurement("modules", "alone", dtype, f"{name}: {what}", error, bound))
    return measurements


def run_case(
    case: Case, *, trace: bool = False, torch_device: str = "cpu", jax_device: Any = None
) -> list[Measurement]:
    """Everything from module outputs (with `trace`) over hidden states, logits and losses to gradients."""
    batch = case_batch(case.config, case.rows, case.seq)
    torch = run_torch(case, case_values(case.config), *batch, trace=trace, device=torch_device)
    flax = run_flax(case, case_values(case.config), *batch, trace=trace, device=jax_device)
    return compare(case, torch, flax)


def compare(case: Case, torch: Outcome, flax: Outcome) -> list[Measurement]:
    """The rungs of two outcomes, in the order of the computation: gradients, where they were taken, backwards from the
    last layer on."""
    measurements = compare_outputs(case, torch, flax)

    def measure(rung: str, where: str, got: Any, expected: Any, bound: float) -> None:
        error = relative_error(got, expected)
        measurements.append(Measurement(rung, case.name, case.dtype, where, error, bound))

    for name in torch.trace.keys() - flax.trace.keys():
        where = f"{name} (only in torch)"
        measurements.append(Measurement("trace", case.name, case.dtype, where, np.inf, FORWARD[case.dtype]))
    measure("loss", "balance loss", torch.balance_loss, flax.balance_loss, FORWARD[case.dtype])
    measure("loss", "objective", torch.objective, flax.objective, FORWARD[case.dtype])
    measure("loss", "expert counts", torch.expert_counts, flax.expert_counts, 0.0)
    for row in reversed(parameter_table(case.config)):
        if row.name in torch.gradients:
            error = relative_error(torch.gradients[row.name], flax.gradients[row.name])
            bound = GRADIENT[case.dtype]
            measurements.append(Measurement("gradient", case.name, case.dtype, row.name, error, bound))
    return measurements


def compare_outputs(case: Case, got: Outcome, expected: Outcome, judge: str = "") -> list[Measurement]:
    """What two outcomes of one forward pass have in common, in its order: module outputs, hidden states, logits, loss.
    `judge` stands before the names of the rungs."""
    forward, measurements = FORWARD[case.dtype], []

    def measure(rung: str, where: str, error: float, bound: float) -> None:
        measurements.append(Measurement(judge + rung, case.name, case.dtype, where, float(error), bound))

    measurements += compare_trace(f"{judge}trace", case.name, case.dtype, got.trace, expected.trace, trace_bound)
    for layer, pair in enumerate(zip(got.layers, expected.layers, strict=True)):
        measure("hidden", f"layer {layer}", relative_error(*pair), forward)
    measure("logits", "logits", relative_error(got.logits, expected.logits), forward)
    divergence = kl_divergence(expected.logits, got.logits).max()
    measure("KL", "largest of a token", divergence, DIVERGENCE[case.dtype])
    measure("loss", "next-token loss", relative_error(got.loss, expected.loss), forward)
    return measurements


def compare_trace(
    rung: str,
    case: str,
    dtype: str,
    got: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
    bound: Callable[[str, str], float],
) -> list[Measurement]:
    """Module outputs by name, in the order of `expected`; integers (choices) have to be the same, others within the
    bound of their name and dtype."""
    measurements = []
    for name, value in expected.items():
        error = relative_error(got.get(name, np.empty(0)), value)
        limit = 0.0 if np.issubdtype(value.dtype, np.integer) else bound(name, dtype)
        measurements.append(Measurement(rung, case, dtype, name, error, limit))
    return measurements


def trace_bound(name: str, dtype: str) -> float:
    """Of what a module returns in the running model, by its path."""
    layer = re.match(r"layers\.(\d+)\b", name)
    depth = (int(layer[1]) + 1) / TRACED_LAYERS if layer and dtype != "float64" else 1.0
    return FORWARD[dtype] * max(1.0, depth**0.5)


def kl_divergence(expected: np.ndarray, got: np.ndarray) -> np.ndarray:
    """KL(softmax(expected) || softmax(got)) over the last axis, nats, in float64."""

    def log_softmax(logits: np.ndarray) -> np.ndarray:
        shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    log_p, log_q = log_softmax(expected), log_softmax(got)
    return np.abs((np.exp(log_p) * (log_p - log_q)).sum(-1))


def near_tie_values(config: ModelConfig) -> Values:
    """`case_values`, but in every router two experts' rows differ by less than float32 resolves."""
    generator = np.random.default_rng(11)
    for row, value in case_values(config):
        if row.name.endswith("router.weight"):
            value[1] = 1.2 * config.init_std * generator.standard_normal(value.shape[1])
            value[2] = value[1] * (1 + 3e-8 * generator.standard_normal(value.shape[1]))
        yield row, value


def near_ties(case: Case) -> list[Measurement]:
    """float32 where rounding decides some choices. First freely: choices may differ only where the last chosen and the
    first unchosen score are closer than the scores of both frameworks. Then with the choices of a float64 run forced
    upon both, where everything must agree as ever."""
    batch = case_batch(case.config, case.rows, case.seq)
    single, wide = case.at("float32"), case.at("float64")

    def values():
        return near_tie_values(case.config)

    torch, flax = (run(single, values(), *batch, trace=True) for run in (run_torch, run_flax))
    biases = {row.name: value for row, value in values() if not row.trainable}
    free = compare_choices(replace(single, name="near ties"), torch, flax, biases)
    choices = run_torch(wide, values(), *batch, trace=True).choices
    forced = [run(single, values(), *batch, trace=True, forced_choices=choices) for run in (run_torch, run_flax)]
    return free + compare(single, *forced)


def choose_alike(one: Outcome, other: Outcome) -> bool:
    """Whether every token went to the same experts in two traced outcomes."""
    routers = [name for name in one.trace if name.endswith("router.chosen")]
    return all(np.array_equal(np.sort(one.trace[name], 1), np.sort(other.trace[name], 1)) for name in routers)


def choice_margin(scores: np.ndarray, topk: int) -> np.ndarray:
    """Of each token, by how much the last expert that is chosen beats the next; nothing is left to beat: infinite."""
    if scores.shape[1] == topk:
        return np.full(len(scores), np.inf)
    ranked = np.sort(scores, axis=1)[:, ::-1]
    return ranked[:, topk - 1] - ranked[:, topk]


def compare_choices(case: Case, torch: Outcome, flax: Outcome, biases: dict[str, np.ndarray]) -> list[Measurement]:
    """Per router, up to the first that chose differently (what follows it sees other inputs): the number of tokens
    whose experts differ though the margin between the last chosen and the next score exceeds the scores' error."""
    topk = case.config.num_experts_per_tok
    measurements = []
    for name in (name.removesuffix(".scores") for name in flax.trace if name.endswith("router.scores")):
        scores = [outcome.trace[f"{name}.scores"] for outcome in (torch, flax)]
        chosen = [np.sort(outcome.trace[f"{name}.chosen"], axis=1) for outcome in (torch, flax)]
        margin = choice_margin(scores[1] + biases[f"{name}.balance_bias"], topk)
        different = (chosen[0] != chosen[1]).any(1)
        unexplained = different & (margin > np.abs(scores[0] - scores[1]).max())
        where = f"{name}: {different.sum()} of {len(different)} tokens differ, of them beyond the score error"
        measurements.append(Measurement("choices", case.name, case.dtype, where, float(unexplained.sum()), 0.0))
        if different.any():
            break
    return measurements
