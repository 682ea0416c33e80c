"""Faults of the forward pass from the router on: experts, residual stream, logits, loss."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from unittest import mock

import torch
from torch.nn import functional as F

from parity_tests.harness.cases import CONFIG, case_values
from parity_tests.harness.mutations import mutation
from torch_ref import loss, model, moe
from torch_ref.spec.interface import IGNORE

# --- Mixture of experts ---------------------------------------------------------------------------------------------


def routed(change: Callable) -> AbstractContextManager:
    """`change(routing, balance_bias, config)` on what the router decides."""
    original = moe.route

    def route(x, router, balance_bias, config):
        return change(original(x, router, balance_bias, config), balance_bias, config)

    return mock.patch.object(moe, "route", route)


def weights_from(function: Callable) -> AbstractContextManager:
    def change(routing, balance_bias, config):
        return routing._replace(
            weights=function(routing.scores.gather(1, routing.chosen), routing, balance_bias, config)
        )

    return routed(change)


@mutation("balance bias inside the weights", "trace", "layers.1.mlp.router.weights")
def _():
    def biased(scores, routing, balance_bias, config):
        scores = scores + balance_bias[routing.chosen]
        return scores / scores.sum(-1, keepdim=True) * config.routed_scaling_factor

    return weights_from(biased)


@mutation("top-2 weights not renormalised", "trace", "layers.1.mlp.router.weights")
def _():
    return weights_from(lambda scores, routing, balance_bias, config: scores * config.routed_scaling_factor)


@mutation("routed scaling factor left out", "trace", "layers.1.mlp.router.weights")
def _():
    return weights_from(lambda scores, routing, balance_bias, config: scores / scores.sum(-1, keepdim=True))


@mutation("experts' weights in the wrong order", "trace", "layers.1.mlp.router.weights")
def _():
    return routed(lambda routing, balance_bias, config: routing._replace(weights=routing.weights.flip(1)))


@mutation("softmax scores instead of sigmoid", "trace", "layers.1.mlp.router")
def _():
    return mock.patch.object(torch.Tensor, "sigmoid", lambda logits: logits.softmax(-1))


@mutation("router in float32", "trace", "layers.1.mlp.router")
def _():
    return mock.patch.object(moe, "wide", lambda x: x.float().to(x.dtype))


@mutation("choice by unbiased score", "trace", "layers.1.mlp.router.chosen")
def _():
    original = moe.route
    return mock.patch.object(moe, "route", lambda x, router, bias, config: original(x, router, 0 * bias, config))


@mutation("ties go to the highest index", "trace", "layers.1.mlp.router.chosen")
def _():
    def top_k(scores, k):
        return scores.shape[1] - 1 - scores.flip(1).sort(dim=-1, descending=True, stable=True).indices[:, :k]

    return mock.patch.object(moe, "top_k", top_k)


@mutation("one expert per token", "trace", "layers.1.mlp.router.weights")
def _():
    def first_only(scores, routing, balance_bias, config):
        return (
            torch.stack((torch.ones_like(scores[:, 0]), torch.zeros_like(scores[:, 0])), 1)
            * config.routed_scaling_factor
        )

    return weights_from(first_only)


def grouped_experts(change: Callable) -> AbstractContextManager:
    original = moe.EXPERT_PATHS["grouped"]
    return mock.patch.dict(moe.EXPERT_PATHS, {"grouped": lambda *args: change(original, *args)})


@mutation("tokens beyond an expert's capacity dropped", "trace", "layers.1.mlp.experts")
def _():
    def capped(original, x, routing, *rest):
        taken = F.one_hot(routing.chosen.flatten(), CONFIG.n_routed_experts).cumsum(0).view(len(x), 2, -1)
        place = taken.gather(2, routing.chosen.unsqueeze(-1)).squeeze(-1)
        return original(x, routing._replace(weights=routing.weights * (place <= 24)), *rest)

    return grouped_experts(capped)


@mutation("weights applied before the experts, not after", "trace", "layers.1.mlp.experts")
def _():
    def before(original, x, routing, gate, up, down, remat):
        total = torch.zeros_like(x)
        for choice in range(routing.chosen.shape[1]):
            part = routing._replace(
                chosen=routing.chosen[:, choice, None], weights=torch.ones_like(routing.weights[:, choice, None])
            )
            total = total + original(x * routing.weights[:, choice, None], part, gate, up, down, remat)
        return total

    return grouped_experts(before)


@mutation("GELU for SiLU", "trace", "layers.0.mlp.down_proj")
def _():
    return mock.patch.object(F, "silu", F.gelu)


def mlp_output(change: Callable) -> AbstractContextManager:
    original = moe.MoE.forward

    def forward(self, x, path, remat):
        return change(self, original(self, x, path, remat), x)

    return mock.patch.object(moe.MoE, "forward", forward)


@mutation("shared expert weighted by a half", "trace", "layers.1.mlp.out")
def _():
    original = moe.MoE.forward

    def forward(self, x, path, remat):
        result = original(self, x, path, remat)
        kept = self.config
        self.config = replace(kept, n_shared_experts=0)
        routed_only = original(self, x, path, remat)
        self.config = kept
        return result._replace(out=(result.out + routed_only.out) / 2)

    return mock.patch.object(moe.MoE, "forward", forward)


@mutation("shared expert left out", "trace", "layers.1.mlp.shared_expert.gate_proj")
def _():
    original = moe.MoE.forward

    def forward(self, x, path, remat):
        kept, self.config = self.config, replace(self.config, n_shared_experts=0)
        result = original(self, x, path, remat)
        self.config = kept
        return result

    return mock.patch.object(moe.MoE, "forward", forward)


@mutation("balance loss over the batch, not per sequence", "trace", "layers.1.mlp.balance_loss")
def _():
    original = moe.sequence_balance_loss

    def over_batch(scores, topk):
        return original(scores.flatten(0, 1)[None], topk).expand(len(scores))

    return mock.patch.object(moe, "sequence_balance_loss", over_batch)


@mutation("balance loss counts biased choices", "trace", "layers.1.mlp.balance_loss")
def _():
    biases = torch.tensor(
        dict((row.name, value) for row, value in case_values(CONFIG))["layers.1.mlp.router.balance_bias"]
    )
    original = moe.sequence_balance_loss

    def biased(scores, topk):
        with mock.patch.object(moe, "top_k", lambda values, k: (values + biases).topk(k).indices):
            return original(scores, topk)

    return mock.patch.object(moe, "sequence_balance_loss", biased)


# --- Residual stream, logits and loss -------------------------------------------------------------------------------


def block(forward: Callable) -> AbstractContextManager:
    return mock.patch.object(model.Block, "forward", forward)


@mutation("no norm before the MLP", "trace", "layers.0.post_attention_norm")
def _():
    original = model.Block.forward

    def forward(self, x, rope, compute, documents):
        norm = self.post_attention_norm
        with mock.patch.object(norm, "forward", lambda x: x * 1):
            return original(self, x, rope, compute, documents)

    return block(forward)


@mutation("residual of the attention left out", "trace", "layers.0.post_attention_norm")
def _():
    def forward(self, x, rope, compute, documents):
        x = self.attention(self.input_norm(x), rope, compute.attention, documents)
        mlp = self.mlp(self.post_attention_norm(x), *(() if self.dense else (compute.moe, False)))
        return (x + mlp, None) if self.dense else (x + mlp.out, mlp)

    return block(forward)


@mutation("attention and MLP in parallel", "trace", "layers.0.post_attention_norm")
def _():
    def forward(self, x, rope, compute, documents):
        attended = self.attention(self.input_norm(x), rope, compute.attention, documents)
        mlp = self.mlp(self.post_attention_norm(x), *(() if self.dense else (compute.moe, False)))
        return (x + attended + mlp, None) if self.dense else (x + attended + mlp.out, mlp)

    return block(forward)


@mutation("embedding scaled by sqrt(hidden)", "trace", "layers.0.input_norm")
def _():
    return mock.patch.object(model.F, "embedding", lambda tokens, weight: weight[tokens] * CONFIG.hidden_size**0.5)


@mutation("logits by an untied copy of the embedding", "logits", "logits")
def _():
    return mock.patch.object(
        model.Model, "logits", lambda self, hidden: hidden @ (self.embed_tokens.weight.T * (1 + 1e-9))
    )


def summed_loss(function: Callable) -> AbstractContextManager:
    return mock.patch.object(model, "cross_entropy", function)


@mutation("labels shifted once more", "loss", "next-token loss")
def _():
    return summed_loss(
        lambda hidden, embedding, targets, chunk, _: loss.cross_entropy(hidden, embedding, targets.roll(-1), chunk)
    )


@mutation("unscored targets in the loss", "loss", "next-token loss")
def _():
    return summed_loss(
        lambda hidden, embedding, targets, chunk, _: loss.cross_entropy(hidden, embedding, targets.clamp(min=0), chunk)
    )


@mutation("last chunk of the loss left out", "loss", "next-token loss")
def _():
    return summed_loss(
        lambda hidden, embedding, targets, chunk, _: loss.cross_entropy(hidden[:100], embedding, targets[:100], chunk)
    )


def changed_objective(change: Callable) -> AbstractContextManager:
    original = model.objective

    def objective(model, inputs, targets, compute, target_count, sequence_count):
        return change(original, model, inputs, targets, compute, target_count, sequence_count)

    return mock.patch.object(model, "objective", objective)


@mutation("mean of micro-batches' means", "loss", "objective")
def _():
    def own_mean(original, model, inputs, targets, compute, target_count, sequence_count):
        total, parts = original(model, inputs, targets, compute, int((targets != IGNORE).sum()), len(inputs))
        return total / 2, parts

    return changed_objective(own_mean)


@mutation("balance loss without its coefficient", "loss", "objective")
def _():
    def uncoupled(original, model, inputs, targets, compute, target_count, sequence_count):
        with mock.patch.object(model, "config", replace(model.config, balance_loss_coef=1.0)):
            return original(model, inputs, targets, compute, target_count, sequence_count)

    return changed_objective(uncoupled)
