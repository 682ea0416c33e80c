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
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, Num

from flax_model.attention import Attention
from flax_model.block import Block
from flax_model.cpu import as_bits, bits, materialized, read, tied
from flax_model.layers import SwiGLU, wide
from flax_model.model import Model
from flax_model.moe import Experts, Routing, count_experts
from flax_model.rotary import Rope, apply_rope, make_rope
from flax_model.sampling import choose_token
from flax_model.sharding import Tree
from flax_model.trees import consume, merge, split
from torch_ref.spec.config import ComputeConfig
from torch_ref.spec.decoding import bucket, check_request, draw_uniforms, pad_prompts
from torch_ref.spec.interface import Sampling

Cache = Num[Array, "layers batch cached slots"]
"""Per layer, row and slot: the normed latent, then the rotated key. Slots are last: XLA's CPU backend would otherwise
transpose what it reads for the scores. While decoding, as `bits`."""


def prefill(
    model: Model, tokens: Int[Array, "batch prompt"], lengths: Int[Array, " batch"], slots: int, compute: ComputeConfig
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """Run padded prompts through the model: the scores of each row's next token, and a cache of `slots` slots whose
    first ones hold the prompts."""
    batch, prompt = tokens.shape
    rope = make_rope(model.config, prompt, compute.dtype)
    x = model.embed_tokens.weight[...][tokens].astype(compute.dtype)
    caches = []
    for stacked in stacks(model):
        graphdef, state = nnx.split(stacked)

        def one_layer(x, layer, graphdef=graphdef):
            block = nnx.merge(graphdef, layer)
            # These two small products are taken again inside the block, which is the price of leaving it as it is.
            cached = jnp.concatenate(block.attention.latents(block.input_norm(x), rope), axis=-1)
            return block(x, rope, compute)[0], cached

        x, cached = jax.lax.scan(one_layer, x, state)
        caches.append(jnp.pad(cached.swapaxes(2, 3), ((0, 0), (0, 0), (0, 0), (0, slots - prompt))))
    last = x[jnp.arange(batch), lengths - 1]
    return model.logits(model.norm(last)), jnp.concatenate(caches)


def decode(
    model: Model,
    absorbed: list[Absorbed],
    token: Int[Array, " batch"],
    cache: Cache,
    prompt: int,
    lengths: Int[Array, " batch"],
    step: Int[Array, ""],
    table: Rope,
    compute: ComputeConfig,
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """Run new token number `step` of each row through the model, and write it into the cache.

    Args:
        absorbed: of `absorb_layers`, as `bits`.
        prompt: width of the padded prompts, `lengths` those of the prompts themselves.
        table: the rotary table of all positions.

    Returns the scores of the next token, and the cache.
    """
    slot = prompt + step
    slots = jnp.arange(cache.shape[3])
    visible = (slots < lengths[:, None]) | ((slots >= prompt) & (slots <= slot))
    rope = Rope(table.cos[lengths + step], table.sin[lengths + step])
    embedding, token = tied(model.embed_tokens.weight[...], token)
    x = embedding[token].astype(compute.dtype)
    first = 0
    for stacked, weights in zip(stacks(model), absorbed, strict=True):
        graphdef, state = nnx.split(stacked)
        layers = jax.tree.leaves(state)[0].shape[0]

        # By number, and not as a scan over the weights, which would copy every layer's before it is read.
        def one_layer(layer, carry, graphdef=graphdef, state=state, stacked=stacked, weights=weights, first=first):
            x, cache = carry
            block = nnx.merge(graphdef, jax.tree.map(lambda leaf: read(leaf, layer), state))
            normed = materialized(block.input_norm(x), step)
            attention = Absorbed(*(read(weight, layer) for weight in weights))
            attended, cache = attend_latents(
                block.attention, attention, normed, rope, cache, first + layer, slot, visible
            )
            x = x + attended
            normed = materialized(block.post_attention_norm(x), step)
            return x + feed_forward(block, stacked, layer, normed, step), cache

        x, cache = jax.lax.fori_loop(0, layers, one_layer, (x, cache))
        first += layers
    return wide(materialized(model.norm(x), step) @ embedding.astype(x.dtype).T), cache


def stacks(model: Model) -> list[Block]:
    """The stacked blocks of a model, in the order of its layers."""
    return [getattr(model, name) for name in ("dense_layers", "layers") if hasattr(model, name)]


class Absorbed(NamedTuple):
    """What decoding reads of a layer in a form of its own. `kv_b_proj` is absorbed by the maps before and after it, so
    the new token's queries come out as they meet the cache, and the heads' mixes of latents go straight into the
    residual stream. Of a stack's layers together they have one axis more."""

    query: Num[Array, "*layers heads_cached inputs"]
    """Includes the scale of the softmax."""
    out: Num[Array, "*layers hidden heads_latent"]


def absorb(block: Block, dtype: DTypeLike) -> Absorbed:
    """Weights enter in `dtype`, the compute dtype, as elsewhere; their products are taken in float32 or wider, and
    rounded to it."""
    attention = block.attention
    c = attention.config
    to_queries = attention.q_proj if c.q_lora_rank is None else attention.q_b_proj
    linears = (to_queries, attention.kv_b_proj, attention.o_proj)
    q, kv, o = (wide(linear.weight[...].astype(dtype)) for linear in linears)
    q = q.reshape(c.num_kv_heads, -1, c.qk_head_dim, q.shape[-1])
    kv = kv.reshape(c.num_kv_heads, -1, c.kv_lora_rank)
    o = o.reshape(c.hidden_size, c.num_kv_heads, -1, c.v_head_dim)
    q_nope, q_rope = jnp.split(q, (c.qk_nope_head_dim,), axis=2)
    key, value = jnp.split(kv, (c.qk_nope_head_dim,), axis=1)
    query = jnp.concatenate((jnp.einsum("kgni,knl->kgli", q_nope, key), q_rope), axis=2) * c.softmax_scale
    out = jnp.einsum("okgv,kvl->okgl", o, value)
    return Absorbed(query.reshape(-1, q.shape[-1]).astype(dtype), out.reshape(c.hidden_size, -1).astype(dtype))


def absorb_layers(model: Model, dtype: DTypeLike) -> list[Absorbed]:
    """`absorb` of each layer, of those in one of the `stacks` together."""

    def absorb_stack(stacked: Block) -> Absorbed:
        graphdef, layers = nnx.split(stacked)
        return jax.vmap(lambda layer: absorb(nnx.merge(graphdef, layer), dtype))(layers)

    return [absorb_stack(stacked) for stacked in stacks(model)]


def attend_latents(
    attention: Attention,
    absorbed: Absorbed,
    x: Float[Array, "batch hidden"],
    rope: Rope,
    cache: Cache,
    layer: Int[Array, ""],
    slot: Int[Array, ""],
    visible: Bool[Array, "batch slots"],
) -> tuple[Float[Array, "batch hidden"], Cache]:
    """Attention of one new token per row to the visible slots. `absorbed` is that of the layer. The token's own entry
    is written into `slot` of `layer`. Softmax in float32 or wider."""
    c = attention.config
    q = x if c.q_lora_rank is None else attention.q_a_norm(attention.q_a_proj(x))
    # The queries of all heads, and the new entry of the cache, which has the same two parts as they.
    vectors = jnp.concatenate((q @ absorbed.query.T, attention.kv_a_proj(x)), axis=-1)
    vectors = vectors.reshape(len(x), -1, c.cache_values_per_token)
    latent, rotary = jnp.split(vectors, (c.kv_lora_rank,), axis=-1)
    rotary = apply_rope(rotary, rope)
    entry = jnp.concatenate((attention.kv_a_norm(latent[:, -1]), rotary[:, -1]), axis=-1)
    cache = cache.at[layer, :, :, slot].set(bits(entry))
    entries = read(cache, layer)
    q = jnp.concatenate((latent[:, :-1], rotary[:, :-1]), axis=-1)
    scores = wide(jnp.einsum("bhc,bcs->bhs", q, entries))
    probabilities = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1).astype(x.dtype)
    latent = jnp.einsum("bhs,bcs->bhc", probabilities, entries)[..., : c.kv_lora_rank]
    return materialized(latent.reshape(len(x), -1), slot) @ absorbed.out.T, cache


def feed_forward(
    block: Block, stacked: Block, layer: Int[Array, ""], x: Float[Array, "batch hidden"], step: Int[Array, ""]
) -> Float[Array, "batch hidden"]:
    """The MLP of a block for one new token per row: what `MoE` computes, without its reports. `stacked` holds the
    experts of all layers."""
    mlp = block.mlp

    def swiglu(mlp: SwiGLU) -> Float[Array, "batch hidden"]:
        return mlp.down_proj(materialized(jax.nn.silu(mlp.gate_proj(x)) * mlp.up_proj(x), step))

    if block.dense:
        return swiglu(mlp)
    out = chosen_experts(stacked.mlp.experts, layer, x, mlp.router(x))
    if mlp.config.n_shared_experts:
        out += swiglu(mlp.shared_expert)
    return out


def chosen_experts(
    experts: Experts, layer: Int[Array, ""], x: Float[Array, "tokens hidden"], routing: Routing
) -> Float[Array, "tokens hidden"]:
    """The routed experts of a layer on a few tokens: reads the chosen experts and no other. Slicing by layer and expert
    at once, right where the product is, lets XLA read the weights where they lie, if it has one row: a product of
    several takes a copy. So few choices are taken one by one, one projection after the other in the order of the
    experts: what several choices read is then still in the cache. Many are taken by expert, all rows together."""
    gate, up, down = (weight[...] for weight in (experts.gate_proj, experts.up_proj, experts.down_proj))
    if routing.chosen.size <= 2 * gate.shape[1]:
        chosen = routing.chosen.reshape(-1)
        order = jnp.argsort(chosen, stable=True)
        row = order // routing.chosen.shape[1]

        def product(rows, weight):
            def one(number, out):
                return out.at[number].set(rows[number] @ read(weight, layer, chosen[order[number]]).astype(x.dtype).T)

            return jax.lax.fori_loop(0, order.size, one, jnp.zeros((order.size, weight.shape[2]), x.dtype))

        weights = routing.weights.reshape(-1)[order].astype(x.dtype)[:, None]
        out = product(jax.nn.silu(product(x[row], gate)) * product(x[row], up) * weights, down)
        return jnp.zeros_like(x).at[row].add(out)

    counts = count_experts(routing.chosen, gate.shape[1])
    in_use = jnp.argsort(counts == 0, stable=True)

    def one_expert(number, out):
        expert = in_use[number]
        weights = jnp.where(routing.chosen == expert, routing.weights, 0).sum(1).astype(x.dtype)
        g, u, d = (read(weight, layer, expert).astype(x.dtype) for weight in (gate, up, down))
        return out + (d @ (jax.nn.silu(g @ x.T) * (u @ x.T) * weights)).T

    return jax.lax.fori_loop(0, (counts > 0).sum(), one_expert, jnp.zeros_like(x))


def cast_weights(params: Tree, compute: ComputeConfig) -> Tree:
    """Hold weights in the compute dtype, in which they enter products anyway: fewer bytes to read for each token, the
    same results. Routers stay, since they choose experts in float32. Empties `params` on the way."""
    return consume(lambda path, leaf: leaf if "router" in path else leaf.astype(compute.dtype), params)


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
        on_token: called with every step's tokens as they come, None for rows that have ended. Then the host takes part
            in every step; without it, all of them run on the device.

    Returns the new tokens of each prompt, without the stop token. Raises `UserError`, before any work, if prompt and
    new tokens do not fit the context, or a setting of `sampling` makes no sense.
    """
    check_request(prompts, sampling, model.config)
    batch, limit = len(prompts), sampling.max_new_tokens
    context = model.config.max_position
    prompt, room = bucket(max(map(len, prompts)), context), bucket(limit, context)
    tokens = jnp.asarray(pad_prompts(prompts, prompt))
    lengths = jnp.asarray([len(ids) for ids in prompts], jnp.int32)
    uniforms = np.zeros((batch, room), np.float32)
    uniforms[:, :limit] = draw_uniforms(seed, batch, limit)
    graphdef, params, biases = split(model)

    progress = _start(graphdef, params, biases, tokens, lengths, room, compute)
    absorbed = _absorb(graphdef, params, biases, compute.dtype)
    run = partial(_run, graphdef, as_bits(params), biases, absorbed, lengths=lengths, uniforms=jnp.asarray(uniforms))
    settings = {"prompt": prompt, "sampling": replace(sampling, max_new_tokens=room), "compute": compute}
    if on_token is None:
        progress = run(progress, limit=limit, **settings)
    else:
        for step in range(limit):
            progress = run(progress, limit=step + 1, **settings)
            ids, running = jax.device_get((progress.tokens[:, step], progress.running))
            on_token([int(number) if alive else None for alive, number in zip(running, ids, strict=True)])
            if not running.any():
                break
    rows, counts = jax.device_get((progress.tokens, progress.counts))
    return [row[:count].tolist() for row, count in zip(rows, counts, strict=True)]


class Progress(NamedTuple):
    """How far a batch has come."""

    logits: Float[Array, "batch vocab"]
    """Of the next token."""
    cache: Cache
    seen: Bool[Array, "batch vocab"]
    """Which tokens are in the prompt or in the text."""
    tokens: Int[Array, "batch new"]
    counts: Int[Array, " batch"]
    """New tokens of each row, without the stop token."""
    running: Bool[Array, " batch"]
    step: Int[Array, ""]
    """New tokens of the rows that still run."""


@partial(jax.jit, static_argnums=(0, 5, 6))
def _start(
    graphdef: nnx.GraphDef,
    params: Tree,
    biases: Tree,
    tokens: Int[Array, "batch prompt"],
    lengths: Int[Array, " batch"],
    room: int,
    compute: ComputeConfig,
) -> Progress:
    """The prompts run through the model, with room for new tokens."""
    model = merge(graphdef, params, biases)
    batch, prompt = tokens.shape
    logits, cache = prefill(model, tokens, lengths, prompt + room, compute)
    # A padded position repeats the row's first token, so that it marks nothing.
    inside = jnp.where(jnp.arange(prompt) < lengths[:, None], tokens, tokens[:, :1])
    seen = jnp.zeros(logits.shape, bool).at[jnp.arange(batch)[:, None], inside].set(True)
    new = jnp.zeros((batch, room), jnp.int32)
    return Progress(logits, bits(cache), seen, new, jnp.zeros(batch, jnp.int32), jnp.ones(batch, bool), jnp.int32(0))


@partial(jax.jit, static_argnums=(0, 3))
def _absorb(graphdef: nnx.GraphDef, params: Tree, biases: Tree, dtype: str) -> list[Absorbed]:
    """`absorb_layers`, as `bits`."""
    return jax.tree.map(bits, absorb_layers(merge(graphdef, params, biases), dtype))


@partial(jax.jit, static_argnums=0, static_argnames=("prompt", "sampling", "compute"), donate_argnums=4)
def _run(
    graphdef: nnx.GraphDef,
    params: Tree,
    biases: Tree,
    absorbed: list[Absorbed],
    progress: Progress,
    *,
    lengths: Int[Array, " batch"],
    uniforms: Float[Array, "batch new"],
    limit: Int[Array, ""],
    prompt: int,
    sampling: Sampling,
    compute: ComputeConfig,
) -> Progress:
    """Go on until `limit` new tokens or until every row has met the stop token: all in one `lax.while_loop`, compiled
    once for each bucket of prompt lengths and of numbers of new tokens."""
    model = merge(graphdef, params, biases)
    table = make_rope(model.config, model.config.max_position, compute.dtype)

    def unfinished(progress):
        return (progress.step < limit) & progress.running.any()

    def one_token(progress):
        logits, cache, seen, tokens, counts, running, step = progress
        rows = jnp.arange(seen.shape[0])
        token = choose_token(logits, seen, uniforms[:, step], sampling).astype(jnp.int32)
        if sampling.stop_token is not None:
            running &= token != sampling.stop_token
        tokens = tokens.at[:, step].set(token)
        seen = seen.at[rows, token].set(True)
        logits, cache = decode(model, absorbed, token, cache, prompt, lengths, step, table, compute)
        return Progress(logits, cache, seen, tokens, counts + running, running, step + 1)

    return jax.lax.while_loop(unfinished, one_token, progress)
