"""Products of rows with a weight of their own, as Pallas kernels that Triton compiles for NVIDIA GPUs.

Rows are sorted by expert, and every expert starts a block of rows of its own (`Blocks`): a block then has one
weight, which a kernel reads in place. Copying a weight for each block, or running all experts on all rows, is what
other forms cost: 500 GB of traffic in a step of 8 x 2048 tokens of `smol-774m`, or four times the arithmetic.

    forward    gated, raised = rows gate^T, rows up^T;  activation = silu(gated) * raised * weight     one kernel
               out = activation down^T                                                                  one kernel
    backward   d_activation = d_out down                                                                one kernel
               through silu to d_gated, d_raised, d_weight                                              XLA's
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
    """What one program of a kernel works on at a time. Programs that share rows run beside each other: columns come
    first in every grid."""

    columns: int
    """Of its result, at most (`_parts`)."""
    depth: int
    """Summed over at a time, at most; of float32 half as much, which takes the same memory."""
    warps: int
    stages: int
    """Tiles under way from memory, at most (`_stages`)."""


TILES = {
    "gate_up": Tile(64, 64, 4, 3),
    "down": Tile(192, 64, 4, 4),
    "d_activation": Tile(256, 64, 8, 3),
    "d_rows": Tile(192, 32, 4, 3),
    "d_weight": Tile(192, 32, 4, 4),
}
"""By kernel, the fastest of five or six tried on an H100 and an H200 (docs/performance.md). In `d_weight`, `columns`
are of the dimension that takes several parts, and of the other one 128; `depth` is of rows."""


MUCH_SHARED_MEMORY = 160 * 1024
"""Bytes a program may have; an A100 and later ones of its kind give them. GeForce cards, an L40S, an L4 or an A10 give
99 KB, for which four stages of `down` are too many."""


def _stages(tile: Tile) -> int:
    """As many as the tile says, or as such a card takes. A CPU, and a card that is not there, say nothing."""
    device = jax.config.jax_default_device or jax.local_devices()[0]
    enough = getattr(device, "shared_memory_per_block_optin", MUCH_SHARED_MEMORY) >= MUCH_SHARED_MEMORY
    return tile.stages if enough else min(tile.stages, 3)


def takes(hidden: int, ffn: int) -> bool:
    """Whether the kernels take experts of these sizes: Triton's tiles are powers of two from 16 on."""
    return hidden % 16 == 0 and ffn % 16 == 0


def _tile(size: int, limit: int) -> int:
    """The largest power of two that divides a size, up to a limit."""
    return min(size & -size, 1 << (limit.bit_length() - 1))


class ColumnParts(NamedTuple):
    """How a program cuts its columns: Triton's tiles are powers of two, and 576 columns are not a multiple of 128 but
    three times three parts of 64, each multiplied with the same tile of rows."""

    width: int
    count: int

    @property
    def columns(self) -> int:
        return self.width * self.count

    def of(self, program) -> list[pl.Slice]:
        """The slices of a program's parts."""
        return [pl.ds((program * self.count + part) * self.width, self.width) for part in range(self.count)]


def _parts(size: int, limit: int) -> ColumnParts:
    """As many equal parts as the limit allows, of the largest power of two that divides the size."""
    width = _tile(size, limit)
    count = next(count for count in range(limit // width, 0, -1) if size // width % count == 0)
    return ColumnParts(width, count)


def _depth(size: int, tile: Tile, dtype: jnp.dtype) -> int:
    return _tile(size, max(16, tile.depth * 2 // jnp.dtype(dtype).itemsize))


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
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=_stages(tile)),
        interpret=interpret,
        name=name,
    )


def _rows_of(block) -> pl.Slice:
    return pl.ds(block * ROW_BLOCK, ROW_BLOCK)


def _gate_up_kernel(expert, rows, weights, gate, up, activation, *products, columns: int, depth: int):
    """Products are written where asked for: the backward pass makes them again otherwise."""
    tile, block = pl.program_id(0), pl.program_id(1)
    at, e = pl.ds(tile * columns, columns), expert[block]

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


def _product_kernel(expert, *refs, pairs: int, parts: ColumnParts, depth: int, transposed: bool):
    """out = sum over pairs of rows @ weight (or its transpose), each block with its expert's weight."""
    operands, weights, out = refs[:pairs], refs[pairs : 2 * pairs], refs[-1]
    tile, block = pl.program_id(0), pl.program_id(1)
    columns, e = parts.of(tile), expert[block]

    def step(k, totals):
        inner = pl.ds(k * depth, depth)
        for rows, weight in zip(operands, weights, strict=True):
            r = rows[_rows_of(block), inner]
            tiles = [weight[e, at, inner] if transposed else weight[e, inner, at] for at in columns]
            totals = tuple(total + _dot(r, tile, trans_b=transposed) for total, tile in zip(totals, tiles, strict=True))
        return totals

    zero = jnp.zeros((ROW_BLOCK, parts.width), jnp.promote_types(out.dtype, jnp.float32))
    totals = jax.lax.fori_loop(0, operands[0].shape[1] // depth, step, (zero,) * parts.count)
    for at, total in zip(columns, totals, strict=True):
        out[_rows_of(block), at] = total.astype(out.dtype)


def _d_weight_kernel(first_block, left, right, out, *, outputs: ColumnParts, inputs: ColumnParts, depth: int):
    """out[expert] = sum over the expert's rows of left^T right, a tile of it."""
    columns, rows, e = inputs.of(pl.program_id(0)), outputs.of(pl.program_id(1)), pl.program_id(2)

    def step(index, totals):
        inner = pl.ds(index * depth, depth)
        lefts, rights = [left[inner, at] for at in rows], [right[inner, at] for at in columns]
        pairs = [(a, b) for a in lefts for b in rights]
        return tuple(total + _dot(a, b, trans_a=True) for total, (a, b) in zip(totals, pairs, strict=True))

    tiles = [(row, column) for row in rows for column in columns]
    zero = jnp.zeros((outputs.width, inputs.width), jnp.promote_types(left.dtype, jnp.float32))
    steps = ROW_BLOCK // depth
    totals = jax.lax.fori_loop(first_block[e] * steps, first_block[e + 1] * steps, step, (zero,) * len(tiles))
    for (row, column), total in zip(tiles, totals, strict=True):
        out[e, row, column] = total.astype(out.dtype)


def _gate_up(blocks, rows, weights, gate, up, keep: bool, interpret: bool):
    tile, ffn = TILES["gate_up"], gate.shape[1]
    columns, depth = _tile(ffn, tile.columns), _depth(rows.shape[1], tile, rows.dtype)
    outputs = (jax.ShapeDtypeStruct((rows.shape[0], ffn), rows.dtype),) * (3 if keep else 1)
    kernel = partial(_gate_up_kernel, columns=columns, depth=depth)
    run = _call(kernel, (ffn // columns, len(blocks.expert)), tile, outputs, "experts_gate_up", interpret)
    return run(blocks.expert, rows, weights, gate, up)


def _product(blocks, operands, weights, transposed: bool, name: str, interpret: bool):
    tile = TILES[name]
    size, inner = weights[0].shape[1 if transposed else 2], operands[0].shape[1]
    parts, depth = _parts(size, tile.columns), _depth(inner, tile, operands[0].dtype)
    output = jax.ShapeDtypeStruct((operands[0].shape[0], size), operands[0].dtype)
    kernel = partial(_product_kernel, pairs=len(operands), parts=parts, depth=depth, transposed=transposed)
    run = _call(kernel, (size // parts.columns, len(blocks.expert)), tile, output, f"experts_{name}", interpret)
    return run(blocks.expert, *operands, *weights)


def _through_activation(d_weighted, gated, raised, weights):
    """Gradients of `gated`, `raised` and the rows' weights from that of silu(gated) * raised * weight, and this value
    itself, which the gradient of the down projection takes."""
    wide = jnp.promote_types(gated.dtype, jnp.float32)
    dtype, weight = gated.dtype, weights.astype(wide)[:, None]
    d_weighted, gated, raised = (x.astype(wide) for x in (d_weighted, gated, raised))
    sigmoid = jax.nn.sigmoid(gated)
    silu = gated * sigmoid
    d_weights = (d_weighted * silu * raised).sum(1)
    d_active = d_weighted * weight
    # silu'(g) = sigmoid + g sigmoid (1 - sigmoid)
    d_gated = d_active * raised * sigmoid * (1 + gated * (1 - sigmoid))
    rowwise = d_gated, d_active * silu, silu * raised * weight
    return *(x.astype(dtype) for x in rowwise), d_weights


def _d_weight(blocks, left, right, like, interpret: bool):
    tile = TILES["d_weight"]
    experts, size, inner = like.shape
    outputs, inputs = _d_weight_parts(size, inner, tile.columns)
    kernel = partial(_d_weight_kernel, outputs=outputs, inputs=inputs, depth=_depth(ROW_BLOCK, tile, left.dtype))
    grid = inner // inputs.columns, size // outputs.columns, experts
    output = jax.ShapeDtypeStruct(like.shape, like.dtype)
    return _call(kernel, grid, tile, output, "experts_d_weight", interpret)(blocks.first_block, left, right)


def _d_weight_parts(outputs: int, inputs: int, limit: int) -> tuple[ColumnParts, ColumnParts]:
    """Of both dimensions of a weight; several parts of the one alone that has the narrower ones."""
    widths = _tile(outputs, 128), _tile(inputs, 128)
    if widths[0] < widths[1]:
        return _parts(outputs, limit), ColumnParts(widths[1], 1)
    return ColumnParts(widths[0], 1), _parts(inputs, limit)


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
    d_weighted = _product(blocks, (d_out,), (d,), False, "d_activation", interpret)
    d_gated, d_raised, activation, d_weights = _through_activation(d_weighted, gated, raised, row_weights)
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
