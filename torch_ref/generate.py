"""Generation with a cache of latents.

- the cache holds 112 values a token and layer (`smol-774m`): the normed latent, and the rotated key that heads share
- absorbed decoding (DeepSeek-V2, section 2.1.2): instead of expanding keys and values from every cached latent,
  attention runs on the latents themselves; the key part of `kv_b_proj` is multiplied into the queries' weights once,
  before the first token, and its value part into those of `o_proj`
- prompts run through the training forward pass; of different lengths, they are padded on the right and masked
- a new token reads the weights of the chosen experts alone
- repetition penalty, temperature, top-k, top-p and min-p in the order and with the meaning of `transformers`

Slots of the cache: prompts fill the first ones, each up to its length; the new tokens of all rows follow at the width
of the padded prompts. A token's position is in its rotated key, so slots in between that hold nothing do no harm.

Twins: `torch_ref/generate.py`, `flax_model/generate.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from torch_ref.attention import Attention
from torch_ref.block import Block
from torch_ref.cpu import operand
from torch_ref.layers import RMSNorm, product, wide
from torch_ref.model import Model
from torch_ref.moe import EXPERT_PATHS, Experts, Routing
from torch_ref.rotary import Rope, apply_rope, make_rope
from torch_ref.sampling import choose_token
from torch_ref.spec.config import ComputeConfig
from torch_ref.spec.decoding import check_request, draw_uniforms, pad_prompts
from torch_ref.spec.interface import Sampling

Cache = Float[Tensor, "layers batch slots cached"]
"""Per layer, row and slot: the normed latent, then the rotated key."""

SLOTS_TOGETHER = 256
"""Off the CPU attention reads the cache up to a multiple of this: MPS keeps memory for every shape that it has met."""


def prefill(
    model: Model,
    tokens: Int[Tensor, "batch prompt"],
    lengths: Int[Tensor, " batch"],
    slots: int,
    compute: ComputeConfig,
) -> tuple[Float[Tensor, "batch vocab"], Cache]:
    """Run padded prompts through the model: the scores of each row's next token, and a cache of `slots` slots whose
    first ones hold the prompts."""
    config = model.config
    batch, prompt = tokens.shape
    dtype = getattr(torch, compute.dtype)
    rope = make_rope(config, prompt, dtype, tokens.device)
    x = F.embedding(tokens.long(), model.embed_tokens.weight).to(dtype)
    cache = x.new_zeros(config.num_layers, batch, slots, config.cache_values_per_token)
    for layer, block in zip(cache, model.layers, strict=True):
        # These two small products are taken again inside the block, which is the price of leaving it as it is.
        layer[:, :prompt] = torch.cat(block.attention.latents(block.input_norm(x), rope), dim=-1)
        x, _ = block(x, rope, compute)
    last = x[torch.arange(batch, device=x.device), lengths.long() - 1]
    return model.logits(model.norm(last)), cache


def decode(
    model: Model,
    absorbed: list[Absorbed],
    token: Int[Tensor, " batch"],
    cache: Cache,
    prompt: int,
    lengths: Int[Tensor, " batch"],
    step: int,
    table: Rope,
    compute: ComputeConfig,
) -> Float[Tensor, "batch vocab"]:
    """Run new token number `step` of each row through the model, and write it into the cache.

    Args:
        absorbed: of `absorb_layers`.
        prompt: width of the padded prompts, `lengths` those of the prompts themselves.
        table: the rotary table of all positions.

    Returns the scores of the next token.
    """
    dtype = getattr(torch, compute.dtype)
    slot = prompt + step
    width = _slots_read(slot, cache.shape[2], token.device)
    slots = torch.arange(width, device=token.device)
    visible = (slots < lengths[:, None]) | ((slots >= prompt) & (slots <= slot))
    mask = operand(torch.zeros_like(visible, dtype=dtype)).masked_fill(~visible, float("-inf"))[:, None]
    rope = Rope(table.cos[lengths + step], table.sin[lengths + step])
    x = F.embedding(token.long(), model.embed_tokens.weight).to(dtype)
    for layer, block, weights in zip(cache, model.layers, absorbed, strict=True):
        x = x + attend_latents(block.attention, weights, weights.input_norm(x), rope, layer[:, :width], slot, mask)
        x = x + feed_forward(block, weights.post_attention_norm(x), compute)
    return model.logits(model.norm(x))


def _slots_read(slot: int, slots: int, device: torch.device) -> int:
    """How many of the cache's slots are read for the token in `slot`, which does not see them all."""
    if device.type == "cpu":
        return slot + 1
    return min(-(-(slot + 1) // SLOTS_TOGETHER) * SLOTS_TOGETHER, slots)


class Norm(NamedTuple):
    """RMSNorm as x / hypot(|x|, floor) * weight. The same values from four operations instead of nine: for one token
    their number counts, and not their size."""

    weight: Float[Tensor, " features"]
    """Times the square root of their number n."""
    floor: Float[Tensor, ""]
    """sqrt(n eps)"""

    @classmethod
    def of(cls, norm: RMSNorm, dtype: torch.dtype) -> Norm:
        weight, size = wide(norm.weight.to(dtype)), len(norm.weight)
        return cls(weight * size**0.5, weight.new_tensor((size * norm.eps) ** 0.5))

    def __call__(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch features"]:
        x_wide = wide(x)
        length = torch.linalg.vector_norm(x_wide, dim=-1, keepdim=True)
        return (x_wide / torch.hypot(length, self.floor) * self.weight).to(x.dtype)


class Absorbed(NamedTuple):
    """What decoding reads of a layer in a form of its own. `kv_b_proj` is absorbed by the maps before and after it, so
    the new token's queries come out as they meet the cache, and the heads' mixes of latents go straight into the
    residual stream."""

    input_norm: Norm
    query: Float[Tensor, "heads_cached inputs"]
    """Includes the scale of the softmax."""
    latent_norm: Norm
    out: Float[Tensor, "hidden heads_latent"]
    post_attention_norm: Norm


def absorb(block: Block, dtype: torch.dtype) -> Absorbed:
    """Weights enter in `dtype`, the compute dtype, as elsewhere; their products are taken in float32 or wider, and
    rounded to it."""
    attention = block.attention
    c = attention.config
    to_queries = attention.q_proj if c.q_lora_rank is None else attention.q_b_proj
    linears = (to_queries, attention.kv_b_proj, attention.o_proj)
    q, kv, o = (wide(linear.weight.to(dtype)) for linear in linears)
    q = q.reshape(c.num_kv_heads, -1, c.qk_head_dim, q.shape[-1])
    kv = kv.reshape(c.num_kv_heads, -1, c.kv_lora_rank)
    o = o.reshape(c.hidden_size, c.num_kv_heads, -1, c.v_head_dim)
    q_nope, q_rope = q.split((c.qk_nope_head_dim, c.qk_rope_head_dim), dim=2)
    key, value = kv.split((c.qk_nope_head_dim, c.v_head_dim), dim=1)
    query = torch.cat((torch.einsum("kgni,knl->kgli", q_nope, key), q_rope), dim=2) * c.softmax_scale
    out = torch.einsum("okgv,kvl->okgl", o, value)
    return Absorbed(
        Norm.of(block.input_norm, dtype),
        query.reshape(-1, q.shape[-1]).to(dtype),
        Norm.of(attention.kv_a_norm, dtype),
        out.reshape(c.hidden_size, -1).to(dtype),
        Norm.of(block.post_attention_norm, dtype),
    )


def absorb_layers(model: Model, dtype: torch.dtype) -> list[Absorbed]:
    """`absorb` of each layer."""
    return [absorb(block, dtype) for block in model.layers]


def attend_latents(
    attention: Attention,
    absorbed: Absorbed,
    x: Float[Tensor, "batch hidden"],
    rope: Rope,
    cache: Float[Tensor, "batch slots cached"],
    slot: int,
    mask: Float[Tensor, "batch 1 slots"],
) -> Float[Tensor, "batch hidden"]:
    """Attention of one new token per row to the slots whose mask is 0, and not -inf. Its own entry is written into
    `slot`. Softmax in float32 or wider."""
    c = attention.config
    q = x if c.q_lora_rank is None else attention.q_a_norm(attention.q_a_proj(x))
    # The queries of all heads, and the new entry of the cache, which has the same two parts as they.
    vectors = torch.cat((product(q, absorbed.query), product(x, attention.kv_a_proj.weight)), dim=-1)
    vectors = vectors.reshape(len(x), -1, c.cache_values_per_token)
    latent, rotary = vectors.split((c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
    rotary = apply_rope(rotary, rope)
    cache[:, slot] = torch.cat((absorbed.latent_norm(latent[:, -1]), rotary[:, -1]), dim=-1)
    q = torch.cat((latent[:, :-1], rotary[:, :-1]), dim=-1)
    q, entries = operand(q), operand(cache)
    probabilities = wide(torch.baddbmm(mask, q, entries.transpose(1, 2))).softmax(-1).to(x.dtype)
    latent = operand(probabilities) @ entries[..., : c.kv_lora_rank]
    return product(latent.reshape(len(x), -1).to(x.dtype), absorbed.out)


def feed_forward(
    block: Block, x: Float[Tensor, "batch hidden"], compute: ComputeConfig
) -> Float[Tensor, "batch hidden"]:
    """The MLP of a block for one new token per row: what `MoE` computes, without its reports."""
    mlp = block.mlp
    if block.dense:
        return mlp(x)
    out = chosen_experts(mlp.experts, x, mlp.router(x), compute)
    if mlp.config.n_shared_experts:
        shared = mlp.shared_expert
        out += swiglu(x, shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight)
    return out


def swiglu(
    x: Float[Tensor, "rows hidden"],
    gate: Float[Tensor, "ffn hidden"],
    up: Float[Tensor, "ffn hidden"],
    down: Float[Tensor, "hidden ffn"],
) -> Float[Tensor, "rows hidden"]:
    """`SwiGLU` without its modules, whose calls take as long as the sums around a product."""
    return product(F.silu(product(x, gate)) * product(x, up), down)


def chosen_experts(
    experts: Experts, x: Float[Tensor, "tokens hidden"], routing: Routing, compute: ComputeConfig
) -> Float[Tensor, "tokens hidden"]:
    """The routed experts on a few tokens: reads each chosen expert once, and no other. On the CPU; elsewhere asking
    which ones they are would wait for the device, so the training path runs."""
    gate, up, down = experts.gate_proj, experts.up_proj, experts.down_proj
    if x.device.type != "cpu":
        return EXPERT_PATHS[compute.moe](x, routing, gate, up, down, False)

    def run_expert(rows: Tensor, expert: int) -> Tensor:
        return swiglu(rows, gate[expert], up[expert], down[expert])

    weights = routing.weights.to(x.dtype)
    if len(x) == 1:  # nothing to sort
        return weights @ torch.cat([run_expert(x, expert) for expert in routing.chosen[0].tolist()])
    chosen = routing.chosen.reshape(-1)
    order = chosen.argsort(stable=True)
    row = order // routing.chosen.shape[1]
    sorted_x = x[row]
    out, end = [], 0
    for expert, same in groupby(chosen[order].tolist()):
        start, end = end, end + len(list(same))
        out.append(run_expert(sorted_x[start:end], expert))
    return torch.zeros_like(x).index_add_(0, row, torch.cat(out) * weights.reshape(-1)[order, None])


@torch.no_grad()
def cast_weights(model: Model, compute: ComputeConfig) -> None:
    """Hold weights in the compute dtype, in which they enter products anyway: fewer bytes to read for each token, the
    same results. Routers stay, since they choose experts in float32."""
    for name, parameter in model.named_parameters():
        if ".router." not in name:
            parameter.data = parameter.data.to(getattr(torch, compute.dtype))


@torch.inference_mode()
def generate(
    model: Model,
    prompts: list[list[int]],
    sampling: Sampling,
    seed: int,
    compute: ComputeConfig,
    on_token: Callable[[list[int | None]], None] | None = None,
) -> list[list[int]]:
    """Continue each prompt by up to `sampling.max_new_tokens` tokens.

    Args:
        prompts: token ids, at least one each; lengths may differ.
        seed: of the random draws. A row's stream depends on the seed and its number in the batch alone.
        compute: resolved (no `auto`).
        on_token: called with every step's tokens as they come, None for rows that have ended.

    Returns the new tokens of each prompt, without the stop token. Raises `UserError`, before any work, if prompt and
    new tokens do not fit the context, or a setting of `sampling` makes no sense.
    """
    check_request(prompts, sampling, model.config)
    device, batch = model.embed_tokens.weight.device, len(prompts)
    prompt = max(map(len, prompts))
    tokens = torch.from_numpy(pad_prompts(prompts, prompt)).to(device)
    lengths = torch.tensor([len(ids) for ids in prompts], device=device)
    table = make_rope(model.config, prompt + sampling.max_new_tokens, getattr(torch, compute.dtype), device)
    uniforms = torch.from_numpy(draw_uniforms(seed, batch, sampling.max_new_tokens)).to(device)
    seen = torch.zeros(batch, model.config.vocab_size, dtype=torch.bool, device=device)
    for row, ids in zip(seen, prompts, strict=True):
        row[torch.tensor(ids, device=device)] = True

    logits, cache = prefill(model, tokens, lengths, prompt + sampling.max_new_tokens, compute)
    absorbed = absorb_layers(model, getattr(torch, compute.dtype))
    texts: list[list[int]] = [[] for _ in prompts]
    running = [True] * batch
    for step in range(sampling.max_new_tokens):
        token = choose_token(logits, seen, uniforms[:, step], sampling)
        seen.scatter_(1, token[:, None], True)
        ids = token.tolist()
        running = [alive and number != sampling.stop_token for alive, number in zip(running, ids, strict=True)]
        for text, alive, number in zip(texts, running, ids, strict=True):
            if alive:
                text.append(number)
        if on_token is not None:
            on_token([number if alive else None for alive, number in zip(running, ids, strict=True)])
        if not any(running) or step + 1 == sampling.max_new_tokens:
            break
        logits = decode(model, absorbed, token, cache, prompt, lengths, step, table, compute)
    return texts
