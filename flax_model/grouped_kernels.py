"""Products of rows with a weight of their own, as Pallas kernels that Triton compiles for NVIDIA GPUs.

Rows are sorted by expert, and every expert starts a block of rows of its own (`Blocks`): a block then has one
weight, which a kernel reads in place. Copying a weight for each block, or running all experts on all rows, is what
other forms cost: 500 GB of traffic in a step of 8 x 2048 tokens of `smol-774m`, or four times the arithmetic.

    forward    gated, raised = rows gate^T, rows up^T;  activation = silu(gated) * raised * weight     one kernel
               out = activation down^T                                                                  one kernel
    backward   d_activation = d_out down, and through silu to d_gated, d_raised, d_weight              one kernel
               d_rows = d_gated gate + d_raised up                                                      one kernel
               d_gate, d_up, d_down: for each expert the sum over its blocks                            one kernel each

Each program writes its tile once, sums in float32, and takes its blocks in order: no atomics, the same bits every time.
float32 inputs are multiplied in float32, not TF32. With `interpret` the same kernels run anywhere, slowly: on a CPU
that is how they are tested.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

ROW_BLOCK = 128
"""Rows of one block."""


class Tile(NamedTuple):
    """What one program of a kernel works on at a time."""

    columns: int
    """Of its result, at most; the largest power of two that divides the size is taken."""
    depth: int
    """Summed over at a time, at most."""
    warps: int
    stages: int
    """Tiles under way from memory."""


TILES = {
    "gate_up": Tile(128, 64, 8, 4),
    "down": Tile(64, 64, 4, 3),
    "d_activation": Tile(64, 64, 8, 3),
    "d_rows": Tile(64, 64, 4, 3),
    "d_weight": Tile(128, 64, 8, 2),
}
"""By kernel, the fastest of five or six tried on an H100 (docs/performance.md). In `d_weight`, `columns` are of both of
a weight's dimensions."""


def takes(hidden: int, ffn: int) -> bool:
    """Whether the kernels take experts of these sizes: Triton's tiles are powers of two from 16 on."""
    return hidden % 16 == 0 and ffn % 16 == 0


def _tile(size: int, limit: int) -> int:
    """The largest power of two that divides a size, up to a limit."""
    return min(size & -size, limit)


def _dot(a: Array, b: Array, trans_a: bool = False, trans_b: bool = False) -> Array:
    """In float32 or wider, of float32 without TF32."""
    precision = None if a.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    contract = ((0 if trans_a else 1,), (1 if trans_b else 0,))
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jax.lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=wide)


def _call(kernel, grid: tuple[int, ...], tile: Tile, outputs, name: str, interpret: bool):
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=outputs,
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name=name,
    )


def _rows_of(block) -> pl.Slice:
    return pl.ds(block * ROW_BLOCK, ROW_BLOCK)


def _gate_up_kernel(expert, rows, weights, gate, up, activation, *products, columns: int, depth: int):
    """Products are written where asked for: the backward pass makes them again otherwise."""
    block, at = pl.program_id(0), pl.ds(pl.program_id(1) * columns, columns)
    e = expert[block]

    def step(k, sums):
        inner = pl.ds(k * depth, depth)
        r = rows[_rows_of(block), inner]
        return tuple(
            total + _dot(r, weight[e, at, inner], trans_b=True) for total, weight in zip(sums, (gate, up), strict=True)
        )

    zero = jnp.zeros((ROW_BLOCK, columns), jnp.promote_types(rows.dtype, jnp.float32))
    gated, raised = jax.lax.fori_loop(0, rows.shape[1] // depth, step, (zero, zero))
    # Rounded first, as the backward pass will see them.
    gated, raised = gated.astype(activation.dtype), raised.astype(activation.dtype)
    for product, value in zip(products, (gated, raised), strict=False):
        product[_rows_of(block), at] = value
    weight = weights[_rows_of(block)].astype(zero.dtype)[:, None]
    wide_gated = gated.astype(zero.dtype)
    silu = wide_gated * jax.nn.sigmoid(wide_gated)
    activation[_rows_of(block), at] = (silu * raised.astype(zero.dtype) * weight).astype(activation.dtype)


def _product_kernel(expert, *refs, pairs: int, columns: int, depth: int, transposed: bool):
    """out = sum over pairs of rows @ weight (or its transpose), each block with its expert's weight."""
    operands, weights, out = refs[:pairs], refs[pairs : 2 * pairs], refs[-1]
    block, at = pl.program_id(0), pl.ds(pl.program_id(1) * columns, columns)
    e = expert[block]

    def step(k, total):
        inner = pl.ds(k * depth, depth)
        for rows, weight in zip(operands, weights, strict=True):
            w = weight[e, at, inner] if transposed else weight[e, inner, at]
            total = total + _dot(rows[_rows_of(block), inner], w, trans_b=transposed)
        return total

    zero = jnp.zeros((ROW_BLOCK, columns), jnp.promote_types(out.dtype, jnp.float32))
    out[_rows_of(block), at] = jax.lax.fori_loop(0, operands[0].shape[1] // depth, step, zero).astype(out.dtype)


def _d_activation_kernel(
    expert, d_out, down, gated, raised, weights, d_gated, d_raised, activation, d_weight, *, columns: int, depth: int
):
    """The gradient through the down projection and the activation; `d_weight` gets one column a tile of columns."""
    block, tile = pl.program_id(0), pl.program_id(1)
    at = pl.ds(tile * columns, columns)
    e = expert[block]

    def step(k, total):
        inner = pl.ds(k * depth, depth)
        return total + _dot(d_out[_rows_of(block), inner], down[e, inner, at])

    wide = jnp.promote_types(d_out.dtype, jnp.float32)
    zero = jnp.zeros((ROW_BLOCK, columns), wide)
    d_weighted = jax.lax.fori_loop(0, d_out.shape[1] // depth, step, zero)
    g, r = gated[_rows_of(block), at].astype(wide), raised[_rows_of(block), at].astype(wide)
    weight = weights[_rows_of(block)].astype(wide)[:, None]
    sigmoid = jax.nn.sigmoid(g)
    silu = g * sigmoid
    d_weight[tile, _rows_of(block)] = (d_weighted * silu * r).sum(1).astype(d_weight.dtype)
    d_active = d_weighted * weight
    # silu'(g) = sigmoid + g sigmoid (1 - sigmoid)
    d_gated[_rows_of(block), at] = (d_active * r * sigmoid * (1 + g * (1 - sigmoid))).astype(d_gated.dtype)
    d_raised[_rows_of(block), at] = (d_active * silu).astype(d_raised.dtype)
    activation[_rows_of(block), at] = (silu * r * weight).astype(activation.dtype)


def _d_weight_kernel(first_block, left, right, out, *, outputs: int, inputs: int):
    """out[expert] = sum over the expert's rows of left^T right, a tile of it."""
    e = pl.program_id(0)
    row, column = pl.ds(pl.program_id(1) * outputs, outputs), pl.ds(pl.program_id(2) * inputs, inputs)

    def step(block, total):
        return total + _dot(left[_rows_of(block), row], right[_rows_of(block), column], trans_a=True)

    zero = jnp.zeros((outputs, inputs), jnp.promote_types(left.dtype, jnp.float32))
    total = jax.lax.fori_loop(first_block[e], first_block[e + 1], step, zero)
    out[e, row, column] = total.astype(out.dtype)


def _gate_up(blocks, rows, weights, gate, up, keep: bool, interpret: bool):
    tile, ffn = TILES["gate_up"], gate.shape[1]
    columns, depth = _tile(ffn, tile.columns), _tile(rows.shape[1], tile.depth)
    outputs = (jax.ShapeDtypeStruct((rows.shape[0], ffn), rows.dtype),) * (3 if keep else 1)
    kernel = partial(_gate_up_kernel, columns=columns, depth=depth)
    run = _call(kernel, (len(blocks.expert), ffn // columns), tile, outputs, "experts_gate_up", interpret)
    return run(blocks.expert, rows, weights, gate, up)


def _product(blocks, operands, weights, transposed: bool, name: str, interpret: bool):
    tile = TILES[name]
    size, inner = weights[0].shape[1 if transposed else 2], operands[0].shape[1]
    columns, depth = _tile(size, tile.columns), _tile(inner, tile.depth)
    output = jax.ShapeDtypeStruct((operands[0].shape[0], size), operands[0].dtype)
    kernel = partial(_product_kernel, pairs=len(operands), columns=columns, depth=depth, transposed=transposed)
    run = _call(kernel, (len(blocks.expert), size // columns), tile, output, f"experts_{name}", interpret)
    return run(blocks.expert, *operands, *weights)


def _d_activation(blocks, d_out, down, gated, raised, weights, interpret: bool):
    tile, ffn = TILES["d_activation"], down.shape[2]
    columns, depth = _tile(ffn, tile.columns), _tile(d_out.shape[1], tile.depth)
    rowwise = jax.ShapeDtypeStruct(gated.shape, gated.dtype)
    wide = jnp.promote_types(d_out.dtype, jnp.float32)
    outputs = rowwise, rowwise, rowwise, jax.ShapeDtypeStruct((ffn // columns, len(d_out)), wide)
    kernel = partial(_d_activation_kernel, columns=columns, depth=depth)
    run = _call(kernel, (len(blocks.expert), ffn // columns), tile, outputs, "experts_d_activation", interpret)
    *gradients, d_weight = run(blocks.expert, d_out, down, gated, raised, weights)
    return *gradients, d_weight.sum(0)


def _d_weight(blocks, left, right, like, interpret: bool):
    tile = TILES["d_weight"]
    experts, size, inner = like.shape
    outputs, inputs = _tile(size, tile.columns), _tile(inner, tile.columns)
    kernel = partial(_d_weight_kernel, outputs=outputs, inputs=inputs)
    grid = experts, size // outputs, inner // inputs
    output = jax.ShapeDtypeStruct(like.shape, like.dtype)
    return _call(kernel, grid, tile, output, "experts_d_weight", interpret)(blocks.first_block, left, right)


class Blocks(NamedTuple):
    """Choices sorted by expert, each expert's in blocks of `size` rows of its own."""

    slot: Int[Array, " choices"]
    """Row of each choice; one past the last row for a choice of no expert."""
    source: Int[Array, " rows"]
    """Choice of each row; one past the last choice for rows that fill up a block."""
    expert: Int[Array, " blocks"]
    """Of each block; unused blocks have the last."""
    first_block: Int[Array, " experts_and_end"]
    """Where each expert's blocks start, and where the last one's end."""


def cut_blocks(chosen: Int[Array, "tokens topk"], experts: int, size: int) -> Blocks:
    """Shapes depend on nothing but the number of tokens. The choice of an expert `experts` stands for none."""
    tokens, topk = chosen.shape
    flat = chosen.reshape(-1)
    one_hot = (flat[:, None] == jnp.arange(experts)).astype(jnp.int32)
    ends = jnp.cumsum(-(-one_hot.sum(0) // size))
    first_block = jnp.concatenate((jnp.zeros(1, ends.dtype), ends))
    # A choice's row: where its expert starts, plus how many earlier choices took the same expert.
    rank = ((jnp.cumsum(one_hot, axis=0) - 1) * one_hot).sum(1)
    blocks = min(-(-tokens * topk // size) + experts, experts * -(-tokens // size))
    slot = jnp.where(flat < experts, first_block[flat] * size + rank, blocks * size)
    source = jnp.full(blocks * size, tokens * topk).at[slot].set(jnp.arange(tokens * topk))
    expert = jnp.minimum((jnp.arange(blocks)[:, None] >= ends).sum(1), experts - 1)
    return Blocks(slot, source, expert.astype(jnp.int32), first_block)


def _rows(x: Array, indices: Int[Array, " rows"]) -> Array:
    """Rows of x; zero where the index is past the last. A gather, like its counterpart in the backward pass: adding
    into rows by scatter would take atomics, and give other bits every time."""
    return jnp.take(x, indices, axis=0, mode="fill", fill_value=0)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def swiglu_in_blocks(
    remat: bool,
    interpret: bool,
    blocks: Blocks,
    x: Float[Array, "tokens hidden"],
    weights: Float[Array, "tokens topk"],
    gate: Float[Array, "experts ffn hidden"],
    up: Float[Array, "experts ffn hidden"],
    down: Float[Array, "experts hidden ffn"],
) -> Float[Array, "tokens hidden"]:
    """The sum of each token's experts by their weights. Experts' weights enter products in the dtype of `x`. `remat`
    drops the gate and up products after the forward pass and computes them again in the backward pass."""
    return _forward(remat, interpret, blocks, x, weights, gate, up, down)[0]


def _forward(remat, interpret, blocks, x, weights, gate, up, down):
    rows, row_weights = _rows(x, blocks.source // weights.shape[1]), _rows(weights.reshape(-1), blocks.source)
    g, u, d = (weight.astype(x.dtype) for weight in (gate, up, down))
    activation, *products = _gate_up(blocks, rows, row_weights, g, u, not remat, interpret)
    out = _product(blocks, (activation,), (d,), True, "down", interpret)
    products = checkpoint_name(tuple(products), "experts")
    return _to_tokens(out, blocks, weights.shape), (blocks, x, weights, gate, up, down, products)


def _backward(remat, interpret, saved, upstream):
    blocks, x, weights, gate, up, down, products = saved
    rows, row_weights = _rows(x, blocks.source // weights.shape[1]), _rows(weights.reshape(-1), blocks.source)
    d_out = _rows(upstream, blocks.source // weights.shape[1])
    g, u, d = (weight.astype(x.dtype) for weight in (gate, up, down))
    gated, raised = products or _gate_up(blocks, rows, row_weights, g, u, True, interpret)[1:]
    d_gated, d_raised, activation, d_weights = _d_activation(blocks, d_out, d, gated, raised, row_weights, interpret)
    d_rows = _product(blocks, (d_gated, d_raised), (g, u), False, "d_rows", interpret)
    d_gate, d_up, d_down = (
        _d_weight(blocks, left, right, like, interpret)
        for left, right, like in ((d_gated, rows, gate), (d_raised, rows, up), (d_out, activation, down))
    )
    d_weights = _rows(d_weights, blocks.slot).reshape(weights.shape).astype(weights.dtype)
    return None, _to_tokens(d_rows, blocks, weights.shape), d_weights, d_gate, d_up, d_down


def _to_tokens(rows: Array, blocks: Blocks, shape: tuple[int, int]) -> Array:
    """The sum over each token's rows, in float32 or wider."""
    wide = _rows(rows, blocks.slot).reshape(*shape, -1).astype(jnp.promote_types(rows.dtype, jnp.float32))
    return wide.sum(1).astype(rows.dtype)


swiglu_in_blocks.defvjp(_forward, _backward)
