"""Faults of the forward pass up to attention: weights, norms, rotary embedding, attention."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
from torch.nn import functional as F

from parity_tests.harness.cases import CONFIG, case_values
from parity_tests.harness.mutations import mutation, weights
from torch_ref import attention, layers, model, rotary
from torch_ref.spec.parameters import rope_table

# --- Weights: what a converter can get wrong ------------------------------------------------------------------------


def one(name: str, change: Callable[[np.ndarray], np.ndarray]) -> AbstractContextManager:
    return weights(lambda other, value: change(value) if other == name else value)


@mutation("o_proj transposed (it is square)", "trace", "layers.1.attention.o_proj")
def _():
    return one("layers.1.attention.o_proj.weight", np.transpose)


@mutation("two experts swapped", "trace", "layers.2.mlp.experts")
def _():
    order = [1, 0, *range(2, CONFIG.n_routed_experts)]
    return weights(lambda name, value: value[order] if name.startswith("layers.2.mlp.experts") else value)


@mutation("router rows of two experts swapped", "trace", "layers.1.mlp.router.chosen")
def _():
    return one("layers.1.mlp.router.weight", lambda value: value[[3, 1, 2, 0, 4, 5]])


@mutation("gate and up of the dense MLP swapped", "trace", "layers.0.mlp.gate_proj")
def _():
    names = {"layers.0.mlp.gate_proj.weight": "up_proj", "layers.0.mlp.up_proj.weight": "gate_proj"}
    values = {row.name: value for row, value in case_values(CONFIG)}
    return weights(lambda name, value: values[f"layers.0.mlp.{names[name]}.weight"] if name in names else value)


@mutation("kv_a_proj rows with the rotary key first", "trace", "layers.0.attention.kv_a_proj")
def _():
    return one("layers.0.attention.kv_a_proj.weight", lambda value: np.roll(value, CONFIG.qk_rope_head_dim, axis=0))


@mutation("kv_b_proj rows of two heads swapped", "trace", "layers.2.attention.kv_b_proj")
def _():
    return one("layers.2.attention.kv_b_proj.weight", lambda value: np.roll(value, len(value) // 2, axis=0))


@mutation("layers one and two swapped", "trace", "layers.1.input_norm")
def _():
    values = {row.name: value for row, value in case_values(CONFIG)}
    swap = {"1": "2", "2": "1"}

    def swapped(name, value):
        first, _, rest = name.partition("layers.")
        return values[f"layers.{swap[rest[0]]}{rest[1:]}"] if rest and rest[0] in swap else value

    return weights(swapped)


@mutation("one weight off by 1e-9", "trace", "layers.1.attention.q_b_proj")
def _():
    return one(
        "layers.1.attention.q_b_proj.weight",
        lambda value: value + 1e-9 * (np.arange(value.size) == 7).reshape(value.shape),
    )


@mutation("balance bias not loaded", "trace", "layers.1.mlp.router.chosen")
def _():
    return weights(lambda name, value: 0 * value if name.endswith("balance_bias") else value)


@mutation("q_lora and kv latent norms swapped with ones", "trace", "layers.0.attention.q_a_norm")
def _():
    return weights(lambda name, value: np.ones_like(value) if "_a_norm" in name else value)


# --- Norms ----------------------------------------------------------------------------------------------------------


def norm_eps(wrong: dict[float, float]) -> AbstractContextManager:
    original = layers.RMSNorm.forward

    def forward(self, x):
        with mock.patch.object(self, "eps", wrong.get(self.eps, self.eps)):
            return original(self, x)

    return mock.patch.object(layers.RMSNorm, "forward", forward)


@mutation("block norms with eps 1e-6", "trace", "layers.0.input_norm")
def _():
    return norm_eps({1e-5: 1e-6})


@mutation("latent norms with eps 1e-5", "trace", "layers.0.attention.q_a_norm")
def _():
    return norm_eps({1e-6: 1e-5})


@mutation("norms subtract the mean", "trace", "layers.0.input_norm")
def _():
    return mock.patch.object(
        layers, "rms_norm", lambda x, weight, eps: F.layer_norm(x, x.shape[-1:], weight, None, eps)
    )


@mutation("norm weight taken as 1 + weight", "trace", "layers.0.input_norm")
def _():
    original = layers.rms_norm
    return mock.patch.object(layers, "rms_norm", lambda x, weight, eps: original(x, weight + 1, eps))


@mutation("norm statistics in float32", "trace", "layers.0.input_norm")
def _():
    original = layers.rms_norm
    return mock.patch.object(layers, "rms_norm", lambda x, weight, eps: original(x.float(), weight, eps).to(x.dtype))


@mutation("final norm left out", "trace", "norm")
def _():
    original = model.Model.__init__

    def init(self, *args):
        original(self, *args)
        self.norm.forward = lambda x: x * 1

    return mock.patch.object(model.Model, "__init__", init)


# --- Rotary embedding -----------------------------------------------------------------------------------------------


def rope_of(function: Callable) -> AbstractContextManager:
    return mock.patch.object(attention, "apply_rope", function)


@mutation("RoPE turns halves instead of pairs", "trace", "layers.0.attention.queries")
def _():
    def halves(x, rope):
        first, second = x.chunk(2, dim=-1)
        cos, sin = rope.cos.unsqueeze(-2), rope.sin.unsqueeze(-2)
        return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)

    return rope_of(halves)


@mutation("RoPE turns the other way", "trace", "layers.0.attention.queries")
def _():
    return rope_of(lambda x, rope: rotary.apply_rope(x, rope._replace(sin=-rope.sin)))


@mutation("keys' positions shifted against the queries'", "trace", "layers.0.attention.latents")
def _():
    def shifted(x, rope):
        if x.shape[2] > 1:  # queries have several heads here, the rotary key one
            return rotary.apply_rope(x, rope)
        return rotary.apply_rope(x, rotary.Rope(*(table.roll(-1, 0) for table in rope)))

    return rope_of(shifted)


@mutation("keys not rotated", "trace", "layers.0.attention.latents")
def _():
    return rope_of(lambda x, rope: rotary.apply_rope(x, rope) if x.shape[2] > 1 else x)


def rope_table_of(function: Callable) -> AbstractContextManager:
    return mock.patch.object(rotary, "rope_table", function)


@mutation("RoPE theta 1e5", "trace", "layers.0.attention.queries")
def _():
    return rope_table_of(lambda config, length: rope_table(replace(config, rope_theta=1e5), length))


@mutation("RoPE table rounded to bfloat16", "trace", "layers.0.attention.queries")
def _():
    def rounded(config, length):
        return tuple(torch.from_numpy(table).bfloat16().double().numpy() for table in rope_table(config, length))

    return rope_table_of(rounded)


@mutation("RoPE angles in float64", "trace", "layers.0.attention.queries")
def _():
    def exact(config, length):
        size = config.qk_rope_head_dim
        angle = np.arange(length)[:, None] * config.rope_theta ** (-np.arange(0, size, 2) / size)
        return np.cos(angle), np.sin(angle)

    return rope_table_of(exact)


# --- Attention ------------------------------------------------------------------------------------------------------


def attend_with(mask: Callable | None = None, scale: float | None = None, group: Callable | None = None):
    def attend(q, k, v, right_scale, documents):
        heads, seq = q.shape[2], q.shape[1]
        reads = [(group or (lambda head: head // (heads // k.shape[2])))(head) for head in range(heads)]
        scores = torch.einsum("bqhd,bshd->bhqs", q, k[:, :, reads]) * (scale or right_scale)
        visible = torch.ones(seq, seq, dtype=torch.bool).tril() if mask is None else mask(seq)
        visible = (visible & (documents[:, :, None] == documents[:, None]))[:, None]
        return torch.einsum("bhqs,bshd->bqhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v[:, :, reads])

    return mock.patch.dict(attention.ATTENTION_PATHS, {"plain": attend})


@mutation("no causal mask", "trace", "layers.0.attention.attend")
def _():
    return attend_with(mask=lambda seq: torch.ones(seq, seq, dtype=torch.bool))


@mutation("causal mask off by one: the next token is seen", "trace", "layers.0.attention.attend")
def _():
    return attend_with(mask=lambda seq: torch.ones(seq, seq, dtype=torch.bool).tril(1))


@mutation("causal mask in blocks of four", "trace", "layers.0.attention.attend")
def _():
    return attend_with(mask=lambda seq: torch.arange(seq)[:, None] // 4 >= torch.arange(seq) // 4)


def numbered_by(number: Callable) -> AbstractContextManager:
    """Documents numbered by another function of where the separators are."""
    return mock.patch.object(model, "document_numbers", lambda tokens, separator: number(tokens == separator))


@mutation("attention across documents", "trace", "layers.0.attention.attend")
def _():
    return numbered_by(lambda begins: torch.zeros_like(begins).long())


@mutation("a separator ends its document", "trace", "layers.0.attention.attend")
def _():
    return numbered_by(lambda begins: begins.cumsum(1) - begins.long())


@mutation("documents numbered one token too late", "trace", "layers.0.attention.attend")
def _():
    return numbered_by(lambda begins: begins.roll(1, 1).cumsum(1))


@mutation("only the token after a separator is cut off", "trace", "layers.0.attention.attend")
def _():
    return numbered_by(lambda begins: begins.long())


@mutation("documents of the first row in all rows", "trace", "layers.0.attention.attend")
def _():
    return numbered_by(lambda begins: begins.cumsum(1)[:1].expand(begins.shape))


@mutation("documents known to the first layer alone", "trace", "layers.1.attention.attend")
def _():
    original = model.Block.forward

    def forward(self, x, rope, compute, documents):
        return original(self, x, rope, compute, documents if self.dense else torch.zeros_like(documents))

    return mock.patch.object(model.Block, "forward", forward)


@mutation("softmax scale without the rotary part", "trace", "layers.0.attention.attend")
def _():
    return attend_with(scale=CONFIG.qk_nope_head_dim**-0.5)


@mutation("wrong K/V head: h mod kv_heads", "trace", "layers.0.attention.attend")
def _():
    return attend_with(group=lambda head: head % CONFIG.num_kv_heads)


@mutation("values and keys of kv_b_proj taken for each other", "trace", "layers.0.attention.expand")
def _():
    def expand(self, latent, k_rope):
        c = self.config
        v, k_nope = (
            self.kv_b_proj(latent).unflatten(-1, (c.num_kv_heads, -1)).split((c.v_head_dim, c.qk_nope_head_dim), -1)
        )
        return torch.cat((k_nope, k_rope.unsqueeze(2).expand(-1, -1, c.num_kv_heads, -1)), dim=-1), v

    return mock.patch.object(attention.Attention, "expand", expand)


@mutation("rotary part first in the key, last in the query", "trace", "layers.0.attention.expand")
def _():
    original = attention.Attention.expand

    def expand(self, latent, k_rope):
        k, v = original(self, latent, k_rope)
        return k.roll(self.config.qk_rope_head_dim, -1), v

    return mock.patch.object(attention.Attention, "expand", expand)


@mutation("latent used without its norm", "trace", "layers.0.attention.latents")
def _():
    def latents(self, x, rope):
        c = self.config
        latent, k_rope = self.kv_a_proj(x).split((c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
        self.kv_a_norm(latent)
        return latent, rotary.apply_rope(k_rope.unsqueeze(2), rope).squeeze(2)

    return mock.patch.object(attention.Attention, "latents", latents)
