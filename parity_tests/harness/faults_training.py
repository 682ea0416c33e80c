"""Faults of gradients and of the optimizer step, under a right forward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch

from parity_tests.harness import training
from parity_tests.harness.cases import CONFIG
from parity_tests.harness.faults_experts import routed, summed_loss
from parity_tests.harness.mutations import mutation
from torch_ref import attention, backend, grouped_experts, loss, moe

# --- Gradients: the forward pass is right ---------------------------------------------------------------------------


@mutation("no gradient through the routing weights", "gradient", "layers.2.mlp.router.weight")
def _():
    return routed(lambda routing, balance_bias, config: routing._replace(weights=routing.weights.detach()))


@mutation("no gradient of the balance loss", "gradient", "layers.2.mlp.router.weight")
def _():
    original = moe.sequence_balance_loss
    return mock.patch.object(moe, "sequence_balance_loss", lambda scores, topk: original(scores.detach(), topk))


@mutation("tied embedding: no gradient from the logits", "gradient", "embed_tokens.weight")
def _():
    return summed_loss(
        lambda hidden, embedding, targets, chunk, _: loss.cross_entropy(hidden, embedding.detach(), targets, chunk)
    )


@mutation("weight gradients of two experts swapped", "gradient", "layers.2.mlp.experts.down_proj")
def _():
    original = grouped_experts.GroupedExperts.backward

    def swapped(ctx, upstream):
        *others, d_down, remat = original(ctx, upstream)
        return *others, d_down[[1, 0, *range(2, CONFIG.n_routed_experts)]], remat

    return mock.patch.object(grouped_experts.GroupedExperts, "backward", staticmethod(swapped))


def hidden_gradient(hook: Callable) -> AbstractContextManager:
    def function(hidden, embedding, targets, chunk, _):
        hidden.register_hook(hook)
        return loss.cross_entropy(hidden, embedding, targets, chunk)

    return summed_loss(function)


@mutation("gradient of the hidden states in float32", "gradient", "norm.weight")
def _():
    return hidden_gradient(lambda gradient: gradient.float().double())


@mutation("no gradient through the rotary key", "gradient", "layers.2.attention.kv_a_proj.weight")
def _():
    original = attention.Attention.expand
    return mock.patch.object(
        attention.Attention, "expand", lambda self, latent, k_rope: original(self, latent, k_rope.detach())
    )


# --- Optimizer step -------------------------------------------------------------------------------------------------


def update(change: Callable) -> AbstractContextManager:
    """`change(original, backend, gradients, grad_norm, rate, counts)` in place of the update."""
    original = backend.TorchBackend._update

    def changed(self, gradients, grad_norm, rate, counts):
        with torch.no_grad():
            return change(original, self, gradients, grad_norm, rate, counts)

    return mock.patch.object(backend.TorchBackend, "_update", changed)


def optimizer_setting(**settings: Any) -> AbstractContextManager:
    """A setting of AdamW changed in every parameter group."""

    def change(original, self, *args):
        for group in self._optimizer.param_groups:
            group.update(settings)
        return original(self, *args)

    return update(change)


def rate_of(schedule: Callable) -> AbstractContextManager:
    optimizer = replace(training.STEP_OPTIMIZER, schedule=schedule)
    return mock.patch.object(training, "STEP_OPTIMIZER", optimizer)


@mutation("learning rate off by one step", "optimizer step", "learning rate, step 1")
def _():
    return rate_of(lambda step: training.STEP_SCHEDULE(step + 1))


@mutation("warm-up starting at 0", "optimizer step", "learning rate, step 1")
def _():
    return rate_of(lambda step: training.STEP_SCHEDULE(step - 1))


@mutation("schedule does not count skipped steps", "optimizer step", "learning rate, step 5")
def _():
    return rate_of(lambda step: training.STEP_SCHEDULE(step - (step > 3)))


@mutation("clipping by norm + 1e-6", "optimizer step", "first moment of embed_tokens.weight, step 1")
def _():
    return update(lambda original, self, gradients, norm, *rest: original(self, gradients, norm + 1e-6, *rest))


@mutation("no clipping", "optimizer step", "first moment of embed_tokens.weight, step 1")
def _():
    return update(lambda original, self, gradients, norm, *rest: original(self, gradients, 0.0, *rest))


@mutation("clipping to the norm also from below", "optimizer step", "first moment of embed_tokens.weight, step 2")
def _():
    def always(original, self, gradients, norm, *rest):
        torch._foreach_mul_(gradients, 1 / norm)
        return original(self, gradients, 1.0, *rest)

    return update(always)


@mutation("norm of the tensors' largest instead of all", "optimizer step", "gradient norm, step 1")
def _():
    return mock.patch.object(
        backend, "global_norm", lambda gradients: torch.stack([gradient.norm() for gradient in gradients]).max()
    )


@mutation("micro-batches averaged", "optimizer step", "gradient norm, step 1")
def _():
    original = backend.global_norm

    def averaged(gradients):
        with torch.no_grad():
            torch._foreach_div_(gradients, training.MICRO_BATCHES)
        return original(gradients)

    return mock.patch.object(backend, "global_norm", averaged)


@mutation("weight decay on norms", "optimizer step", "update / LR of layers.0.input_norm.weight, step 1")
def _():
    return optimizer_setting(weight_decay=training.STEP_OPTIMIZER.weight_decay)


@mutation("no weight decay", "optimizer step", "update / LR of embed_tokens.weight, step 1")
def _():
    return optimizer_setting(weight_decay=0.0)


@mutation("decay inside the gradient (Adam with L2)", "optimizer step", "first moment of embed_tokens.weight, step 1")
def _():
    return optimizer_setting(decoupled_weight_decay=False)


@mutation("beta2 of 0.999", "optimizer step", "second moment of embed_tokens.weight, step 1")
def _():
    return optimizer_setting(betas=(0.9, 0.999))


@mutation("eps of 1e-7", "optimizer step", "update / LR of embed_tokens.weight, step 1")
def _():
    return optimizer_setting(eps=1e-7)


@mutation("no bias correction", "optimizer step", "update / LR of embed_tokens.weight, step 1")
def _():
    def late(original, self, *args):
        self._set_counters(self._steps, 10_000)
        return original(self, *args)

    return update(late)


@mutation("bias correction counts skipped steps", "optimizer step", "update / LR of embed_tokens.weight, step 5")
def _():
    def by_step(original, self, *args):
        self._set_counters(self._steps, self._steps)
        return original(self, *args)

    return update(by_step)


@mutation("a step that is not finite is applied", "optimizer step", "gradient norm, step 4")
def _():
    return mock.patch.object(backend.np, "isfinite", lambda values: np.ones(len(values), bool))


@mutation(
    "weights rounded to bfloat16 after the update", "optimizer step", "update / LR of embed_tokens.weight, step 1"
)
def _():
    def rounded(original, self, *args):
        original(self, *args)
        for parameter in self._trainable.values():
            parameter.copy_(parameter.bfloat16())

    return update(rounded)


@mutation("balance bias updated per micro-batch", "optimizer step", "layers.1.mlp.router.balance_bias, step 1")
def _():
    original = moe.updated_balance_bias
    rate = CONFIG.balance_bias_rate

    def per_micro_batch(bias, counts, given_rate):
        # The counts of a step are those of three micro-batches: as many steps of the bias, by a third of them each.
        for _ in range(training.MICRO_BATCHES):
            bias = original(bias, counts, rate)
        return bias

    return mock.patch.object(backend, "updated_balance_bias", per_micro_batch)


@mutation("balance bias with the sign turned", "optimizer step", "layers.1.mlp.router.balance_bias, step 1")
def _():
    original = moe.updated_balance_bias
    return mock.patch.object(backend, "updated_balance_bias", lambda bias, counts, rate: original(bias, counts, -rate))


@mutation(
    "balance bias moved for experts at the mean too", "optimizer step", "layers.1.mlp.router.balance_bias, step 1"
)
def _():
    def no_zero(bias, counts, rate):
        above = counts.shape[-1] * counts > counts.sum(-1, keepdim=True)
        return bias + rate * torch.where(above, -1.0, 1.0)

    return mock.patch.object(backend, "updated_balance_bias", no_zero)


@mutation("balance bias also under weight decay", "optimizer step", "layers.1.mlp.router.balance_bias, step 1")
def _():
    original = moe.updated_balance_bias
    return mock.patch.object(
        backend, "updated_balance_bias", lambda bias, counts, rate: original(bias * 0.99, counts, rate)
    )
