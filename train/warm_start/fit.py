"""What a warm start learns, in torch (imported when called): statistics of the old attention, each new attention fitted
to the old one's output, and the new dense model, as a whole, to the old one's predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from torch_ref.checkpoint import load, write_tensors
from torch_ref.spec.config import ComputeConfig, ModelConfig
from torch_ref.spec.interface import IGNORE, UserError
from torch_ref.spec.parameters import Parameter, parameter_table
from train.data.packing import Rows
from train.warm_start.attention import Calibration
from train.warm_start.teacher import Teacher

if TYPE_CHECKING:
    from torch import Tensor, nn

    from torch_ref.model import Model

WARMUP_SHARE = 0.1
"""Of the steps of a fit: the learning rate rises over them, then falls along a half cosine to 0."""

SAVE_STEPS = 10
"""Steps of the distillation between two saves of its state."""

LOGITS_CHUNK = 256
"""Tokens whose logits exist at once, of both models."""


class AdamWSettings(NamedTuple):
    steps: int
    batch: int
    """Rows a step."""
    learning_rate: float


class Distillation(NamedTuple):
    """How the dense model is trained as a whole."""

    adamw: AdamWSettings
    mlp_learning_rate: float = 0.0
    """0 leaves MLPs as they are."""
    text_weight: float = 0.0
    """The target distribution of a token is the teacher's times 1 - `text_weight`, and that much on the next token."""


def share_of_peak(step: int, steps: int) -> float:
    """The learning rate of a step over its peak."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def calibrate(teacher: Teacher, layer: int, x: Float[Tensor, "batch seq hidden"]) -> Calibration:
    """Statistics of one layer's attention on normed inputs `x`; the scores of one sequence are held at a time."""
    import torch

    seq = x.shape[1]
    rotation = teacher.rotation(seq)
    angle = np.arange(seq)[:, None] * teacher.inverse_frequencies().astype(np.float64)
    turns = torch.from_numpy(np.exp(1j * angle).astype(np.complex64))
    causal = torch.ones(seq, seq, dtype=torch.bool).tril()
    o = torch.from_numpy(teacher.attention_weights(layer).o.copy())
    groups = teacher.heads // teacher.kv_heads
    received = []
    turn, spread = turns.new_zeros(teacher.heads, turns.shape[1]), o.new_zeros(teacher.heads)
    for sequence in x.split(1):
        q, k, v = (y[0] for y in teacher.queries_keys_values(layer, sequence, rotation))
        k, v = (y.repeat_interleave(groups, dim=0) for y in (k, v))
        scores = q @ k.transpose(1, 2) / teacher.head_dim**0.5
        attention = scores.masked_fill(~causal, float("-inf")).softmax(-1)
        received.append(attention.square().sum((0, 1)))
        turn += ((attention.to(turns.dtype) @ turns) * turns.conj()).mean(1) / len(x)
        added = v @ o.transpose(1, 2)  # what each value would add to the output: [heads, seq, hidden]
        mean_square = (attention @ added.square().sum(-1, keepdim=True)).squeeze(-1)
        spread += (mean_square - (attention @ added).square().sum(-1)).mean(1) / len(x)
    return Calibration(x.flatten(0, 1).numpy(), torch.cat(received).numpy(), turn.numpy(), spread.clamp(min=0).numpy())


def fit_attention(
    config: ModelConfig,
    weights: dict[str, np.ndarray],
    x: Float[Tensor, "rows seq hidden"],
    wanted: Float[Tensor, "rows seq hidden"],
    settings: AdamWSettings,
    seed: int,
    stepped: Callable[[], None] = lambda: None,
) -> dict[str, np.ndarray]:
    """Latent attention, from `weights` on, trained to give `wanted` for the normed inputs `x`: AdamW on the squared
    error relative to the mean square of `wanted`. `stepped` is called after each step."""
    import torch

    attention = attention_module(config, weights)
    rope = _rope(config, x.shape[1])
    optimizer = torch.optim.AdamW(attention.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    scale = wanted.square().mean()
    for step, rows in zip(range(settings.steps), _shuffled_rows(len(x), settings.batch, seed), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * share_of_peak(step, settings.steps)
        loss = (attention(x[rows], rope, "sdpa") - wanted[rows]).square().mean() / scale
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(attention.parameters(), 1.0)
        optimizer.step()
        stepped()
    return {name: value.detach().numpy().copy() for name, value in attention.state_dict().items()}


def attention_error(
    config: ModelConfig,
    weights: dict[str, np.ndarray],
    x: Float[Tensor, "rows seq hidden"],
    wanted: Float[Tensor, "rows seq hidden"],
) -> float:
    """Norm of the error of a latent attention's output over the norm of `wanted`."""
    import torch

    with torch.no_grad():
        out = attention_module(config, weights)(x, _rope(config, x.shape[1]), "sdpa")
        return ((out - wanted).norm() / wanted.norm()).item()


def attention_module(config: ModelConfig, weights: dict[str, np.ndarray]) -> nn.Module:
    import torch

    from torch_ref.attention import Attention

    attention = Attention(config)
    attention.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    return attention


def _rope(config: ModelConfig, length: int):
    import torch

    from torch_ref.rotary import make_rope

    return make_rope(config, length, torch.float32, torch.device("cpu"))


def _shuffled_rows(count: int, batch: int, seed: int) -> Iterator[Int[np.ndarray, " batch"]]:
    """Batches of row numbers without end; every row once before any comes again."""
    generator = np.random.default_rng(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < min(batch, count):
            waiting += generator.permutation(count).tolist()
        yield np.array(waiting[:batch])
        del waiting[:batch]


# The dense model


def dense_values(
    config: ModelConfig, teacher: Teacher, attention: list[dict[str, np.ndarray]]
) -> Iterator[tuple[Parameter, np.ndarray]]:
    """Every tensor of the dense model `config`: the teacher's, with the given attention layers."""
    names = {
        "input_norm": "input_norm",
        "post_attention_norm": "post_attention_norm",
        "mlp.gate_proj": "gate",
        "mlp.up_proj": "up",
        "mlp.down_proj": "down",
    }
    for row in parameter_table(config):
        first, _, rest = row.name.partition(".")
        if first != "layers":
            yield row, {"embed_tokens": teacher.embedding, "norm": teacher.norm}[first].numpy()
            continue
        layer, _, rest = rest.partition(".")
        if rest.startswith("attention."):
            yield row, attention[int(layer)][rest.removeprefix("attention.")]
        else:
            yield row, getattr(teacher.layers[int(layer)], names[rest.removesuffix(".weight")]).numpy()


def distill(
    model: Model,
    teacher: Teacher,
    rows: Rows,
    settings: Distillation,
    compute: ComputeConfig,
    saved: Path,
    stepped: Callable[[float], None] = lambda divergence: None,
) -> list[float]:
    """Train a dense model so that its predictions become the teacher's, or (by `text_weight`) the text's. Returns the
    mean over tokens of KL(targets || model) before each step, in nats; `stepped` gets it too. Rows are taken in order.
    Raises `UserError` where it is not finite.

    The embedding stays as it is, and so do MLPs unless they have a learning rate: they hold what the teacher knows, and
    are not what was replaced. The file `saved` holds the state after every `SAVE_STEPS` steps, from which a later call
    with the same settings and precision goes on."""
    import torch

    (steps, batch, attention_rate), mlp_rate, text_weight = settings
    peaks = {"attention": attention_rate, "norm": attention_rate, "mlp": mlp_rate, "embed": 0.0}
    model.requires_grad_(False)
    trained = {name: parameter for name, parameter in model.named_parameters() if peaks[_kind(name)]}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    groups = [{"params": [parameter], "peak": peaks[_kind(name)]} for name, parameter in trained.items()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    divergences: list[float] = []
    identity = [steps, batch, attention_rate, mlp_rate, text_weight, compute.dtype]
    if saved.exists() and (state := load(saved))["settings"] == identity:
        model.load_state_dict(state["weights"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        for divergence in state["divergences"]:
            divergences.append(divergence)
            stepped(divergence)
    for step in range(len(divergences), steps):
        tokens, next_tokens = (
            torch.from_numpy(part[step * batch : (step + 1) * batch]) for part in (rows.inputs, rows.targets)
        )
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share_of_peak(step, steps)
        wanted = None
        if text_weight < 1:
            with torch.no_grad():
                wanted = teacher.hidden(tokens, getattr(torch, compute.dtype)).float()
        hidden = model(tokens, compute).hidden
        divergence, upstream = _divergence(
            hidden.detach().float(),
            model.embed_tokens.weight.detach(),
            wanted,
            teacher.embedding,
            next_tokens,
            text_weight,
        )
        if not math.isfinite(divergence):
            raise UserError(
                f"the distillation has diverged by step {step + 1}: lower --distill-learning-rate or "
                "--distill-mlp-learning-rate"
            )
        optimizer.zero_grad()
        hidden.backward(upstream.to(hidden.dtype))
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        divergences.append(divergence)
        stepped(divergence)
        if (step + 1) % SAVE_STEPS == 0 or step + 1 == steps:
            weights = {name: parameter.detach() for name, parameter in trained.items()}
            state = {"settings": identity, "weights": weights, "optimizer": optimizer.state_dict()}
            write_tensors(saved, state | {"divergences": divergences})
    model.requires_grad_(True)
    return divergences


def _kind(name: str) -> str:
    """What a parameter of the dense model is part of."""
    return next(kind for kind in ("embed", "norm", "attention", "mlp") if kind in name)


def _divergence(
    hidden: Float[Tensor, "batch seq hidden"],
    embedding: Float[Tensor, "vocab hidden"],
    wanted: Float[Tensor, "batch seq hidden"] | None,
    teacher_embedding: Float[Tensor, "vocab hidden"],
    next_tokens: Int[Tensor, "batch seq"],
    text_weight: float,
) -> tuple[float, Float[Tensor, "batch seq hidden"]]:
    """Mean KL(targets || model) over tokens and its gradient with respect to `hidden`, by chunks of tokens:
    d KL / d logits = softmax(logits) - targets. `wanted`, the teacher's hidden states, can be None if its predictions
    do not count."""
    import torch

    total, gradients = 0.0, []
    with torch.no_grad():
        theirs = None if wanted is None else wanted.flatten(0, 1)
        parts = (hidden.flatten(0, 1), next_tokens.flatten().long())
        for number, (ours, following) in enumerate(zip(*(part.split(LOGITS_CHUNK) for part in parts), strict=True)):
            if theirs is None:
                target = ours.new_zeros(len(ours), len(embedding))
            else:
                chunk = theirs[number * LOGITS_CHUNK :][: len(ours)]
                target = (chunk @ teacher_embedding.T).softmax(-1).mul_(1 - text_weight)
            target.scatter_add_(1, following[:, None], target.new_full((len(following), 1), text_weight))
            log_q = (ours @ embedding.T).log_softmax(-1)
            total += (torch.special.xlogy(target, target) - target * log_q).sum().item()
            gradients.append((log_q.exp_() - target) @ embedding)
    count = hidden.shape[0] * hidden.shape[1]
    return total / count, (torch.cat(gradients) / count).view_as(hidden)


# Measuring


def mean_loss(
    hidden_of: Callable[[Tensor], Float[Tensor, "batch seq hidden"]],
    embedding: Float[Tensor, "vocab hidden"],
    rows: Rows,
) -> float:
    """Mean next-token loss over the scored targets of `rows`, in nats. `hidden_of` gives final hidden states."""
    import torch

    from torch_ref.loss import cross_entropy

    total = 0.0
    with torch.no_grad():
        for inputs, targets in zip(rows.inputs, rows.targets, strict=True):
            hidden = hidden_of(torch.from_numpy(inputs)[None])[0]
            total += cross_entropy(hidden, embedding, torch.from_numpy(targets), LOGITS_CHUNK).item()
    return total / int((rows.targets != IGNORE).sum())


class MlpInputs(NamedTuple):
    """Statistics of what enters one layer's MLP, over tokens."""

    mean: Float[np.ndarray, " hidden"]
    second_moment: Float[np.ndarray, "hidden hidden"]


def mlp_inputs(model: Model, rows: Int[np.ndarray, "rows seq"], compute: ComputeConfig) -> list[MlpInputs]:
    """Statistics of every layer's normed MLP inputs on some text."""
    import torch

    sums = [[0.0, 0.0] for _ in model.layers]
    hooks = []
    for layer, block in enumerate(model.layers):

        def add(module: nn.Module, inputs: tuple[Tensor, ...], layer: int = layer) -> None:
            x = inputs[0].flatten(0, 1).double()
            sums[layer][0] += x.sum(0).numpy()
            sums[layer][1] += (x.T @ x).numpy()

        hooks.append(block.mlp.register_forward_pre_hook(add))
    with torch.no_grad():
        for row in rows:
            model(torch.from_numpy(row)[None], compute)
    for hook in hooks:
        hook.remove()
    return [MlpInputs(total / rows.size, moment / rows.size) for total, moment in sums]
