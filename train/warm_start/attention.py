"""A Llama attention layer, in closed form, as latent attention: the first stage of `train.warm_start`. NumPy only.

Notation: x is the normed input of the layer; the old layer's queries, keys and values are q, k, v = W x per head.
RoPE multiplies pair j of a query or key at position t, seen as one complex number, by exp(i w_j t).

1. **Frequencies.** A pair keeps its meaning only at its own frequency, so the rotary part keeps the `rope / 2` highest
   frequencies: theta^(-j / pairs) for j < rope / 2 is again a plain RoPE, of base theta^(rope / head_dim).
2. **One rotary key.** At a kept frequency the K/V heads' pairs are a complex vector k(s). Its first principal component
   kappa, weighted by the energy of the queries that read each head, becomes the shared key: k_g = a_g kappa + rest_g.
   The queries take conj(a_g) in: conj(q) a kappa = conj(conj(a) q) kappa.
3. **Keys without position** hold what is left: the low frequencies whole, which turn little within the context, and
   `rest_g` of the kept ones. What rotation these would have had is replaced by its mean over the distances that the
   old head attends to, E[exp(i w (s - t))], which the queries take in.
4. **Latent.** Those keys and the values, y = M x, pass through the normed latent. A weighted SVD gives the `rank`
   directions of x that matter: errors of y are weighed by what they do to the layer's output, tokens by the attention
   they receive.
5. **The latent's norm** throws away the length of the latent. Whitened latents have nearly the same length; one spare
   direction that is nearly constant over tokens can make it more so. Some such choices are tried, and for each y is
   regressed on the *normed* latent; the one with the least error is kept.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Complex, Float

from torch_ref.spec.config import LATENT_NORM_EPS, ModelConfig


class LlamaAttention(NamedTuple):
    """Weights of the old layer; RoPE pairs are (j, j + head_dim / 2)."""

    q: Float[np.ndarray, "heads head_dim hidden"]
    k: Float[np.ndarray, "kv_heads head_dim hidden"]
    v: Float[np.ndarray, "kv_heads head_dim hidden"]
    o: Float[np.ndarray, "heads hidden head_dim"]


class Calibration(NamedTuple):
    """What the old layer does on some text."""

    x: Float[np.ndarray, "tokens hidden"]
    """Normed inputs."""
    received: Float[np.ndarray, " tokens"]
    """Sum over heads and queries of the squared attention a token receives."""
    turn: Complex[np.ndarray, "heads pairs"]
    """Mean of exp(i w (s - t)) over the attention of queries t to keys s."""
    spread: Float[np.ndarray, " heads"]
    """Mean squared distance of what a head's attended values add to the output from their mean: how far an error in
    the scores moves the output."""


class Converted(NamedTuple):
    weights: dict[str, np.ndarray]
    """The latent attention's tensors by their names within the layer."""
    rope_energy: float
    """Share of the kept frequencies' key energy that the shared key holds."""
    latent_energy: float
    """Share of the weighted energy of keys and values that the normed latent holds."""


def kept_theta(theta: float, head_dim: int, rope_dim: int) -> float:
    """Base of the plain RoPE over `rope_dim` values whose frequencies are the highest of those over `head_dim`: the
    nearest float32, since RoPE tables are made from one."""
    return float(np.float32(theta ** (rope_dim / head_dim)))


def convert_attention(config: ModelConfig, old: LlamaAttention, seen: Calibration) -> Converted:
    """Latent attention that does about what `old` does on text like that of `seen`; all in float64 inside.

    Requires what `train.warm_start.teacher.check_shape` checks."""
    old = LlamaAttention(*(value.astype(np.float64) for value in old))
    x = seen.x.astype(np.float64)
    heads, head_dim, _ = old.q.shape
    kv_heads, pairs, kept = len(old.k), head_dim // 2, config.qk_rope_head_dim // 2
    group_of = np.arange(heads) // (heads // kv_heads)

    q_pairs, k_pairs = as_pairs(old.q), as_pairs(old.k)
    second_moment = x.T @ x / len(x)
    q_energy = np.einsum("hjd,de,hje->hj", q_pairs, second_moment, q_pairs.conj(), optimize=True).real
    read = np.add.reduceat(q_energy, np.arange(0, heads, heads // kv_heads))  # [kv_heads, pairs]

    shared, coefficient, held = shared_key(k_pairs[:, :kept], read[:, :kept], second_moment)
    q_rope = coefficient.conj()[group_of, :, None] * q_pairs[:, :kept]
    rest = k_pairs.copy()
    rest[:, :kept] -= coefficient[:, :, None] * shared
    q_rest = seen.turn.conj()[:, :, None] * q_pairs

    # The lowest frequencies first: where the keys without position are narrower, the fastest remainders go.
    lowest_first = np.arange(pairs)[::-1][: config.qk_nope_head_dim // 2]
    k_nope = _padded(as_rows(rest[:, lowest_first]), config.qk_nope_head_dim)
    q_nope = _padded(as_rows(q_rest[:, lowest_first]), config.qk_nope_head_dim)

    key_weight, value_weight = _error_weights(old, q_nope, second_moment, seen.spread, group_of)
    targets = np.concatenate([k_nope, old.v], axis=1)  # [kv_heads, nope + vdim, hidden]
    weight_roots = [_root(_block_diagonal(k, v)) for k, v in zip(key_weight, value_weight, strict=True)]
    latent, expand, latent_energy = fit_latent(targets, weight_roots, x, seen.received, config.kv_lora_rank)

    # Old scores are divided by sqrt(head_dim), the new ones by sqrt(nope + rope).
    q = np.concatenate([q_nope, as_rows(q_rope)], axis=1) * (config.qk_head_dim / head_dim) ** 0.5
    kv_a = np.concatenate([latent, as_rows(shared)])
    weights = {
        "q_proj.weight": q.reshape(-1, config.hidden_size),
        "kv_a_proj.weight": kv_a,
        "kv_a_norm.weight": np.ones(config.kv_lora_rank),
        "kv_b_proj.weight": expand.reshape(-1, config.kv_lora_rank),
        "o_proj.weight": np.concatenate(list(old.o), axis=1),
    }
    return Converted({name: value.astype(np.float32) for name, value in weights.items()}, held, latent_energy)


def as_pairs(weight: Float[np.ndarray, "*heads head_dim hidden"]) -> Complex[np.ndarray, "*heads pairs hidden"]:
    """Rows j and j + head_dim / 2 as real and imaginary part: the pairing of Llama."""
    real, imaginary = np.split(weight, 2, axis=-2)
    return real + 1j * imaginary


def as_rows(pairs: Complex[np.ndarray, "*heads pairs hidden"]) -> Float[np.ndarray, "*heads values hidden"]:
    """Real and imaginary parts as rows 2j and 2j + 1: the interleaved pairing of our specification."""
    rows = np.stack([pairs.real, pairs.imag], axis=-2)
    return rows.reshape(*pairs.shape[:-2], -1, pairs.shape[-1])


def shared_key(
    k: Complex[np.ndarray, "kv_heads kept hidden"],
    read: Float[np.ndarray, "kv_heads kept"],
    second_moment: Float[np.ndarray, "hidden hidden"],
) -> tuple[Complex[np.ndarray, "kept hidden"], Complex[np.ndarray, "kv_heads kept"], float]:
    """The first principal component of the heads' complex keys at each frequency, weighted by `read`.

    Returns the map from x to the component, each head's coefficient a (k = a * component + rest), and the share of the
    weighted energy that the component holds."""
    root = np.sqrt(read + 1e-12 * read.max())
    weighted = root[:, :, None] * k
    moments = np.einsum("gjd,de,fje->jgf", weighted, second_moment, weighted.conj(), optimize=True)
    values, vectors = np.linalg.eigh(moments)
    top = vectors[:, :, -1]  # [kept, kv_heads]
    component = np.einsum("jg,gjd->jd", top.conj(), weighted)
    coefficient = top.T / root
    # The scale of a component is free; sharing it evenly gives queries and key rows of like size.
    scale = np.sqrt(np.linalg.norm(coefficient, axis=0) / len(k) ** 0.5)
    return component * scale[:, None], coefficient / scale, float(values[:, -1].sum() / values.sum())


def fit_latent(
    targets: Float[np.ndarray, "kv_heads values hidden"],
    weight_roots: list[Float[np.ndarray, "values values"]],
    x: Float[np.ndarray, "tokens hidden"],
    token_weight: Float[np.ndarray, " tokens"],
    rank: int,
) -> tuple[Float[np.ndarray, "rank hidden"], Float[np.ndarray, "kv_heads values rank"], float]:
    """Maps A and B with targets x ~ B norm(A x), where norm is RMSNorm without a weight.

    `weight_roots` are square roots of the matrices that weigh errors of each head's values. Returns A, B and the share
    of the weighted energy kept."""
    tokens = token_weight[:, None] * (len(x) / token_weight.sum())
    moment = (x * tokens).T @ x / len(x)
    ridge = 1e-6 * np.trace(moment) / len(moment)
    moment += ridge * np.eye(len(moment))
    values, vectors = np.linalg.eigh(moment)
    to_white = vectors / np.sqrt(values) @ vectors.T
    weighted = np.concatenate([root @ target for root, target in zip(weight_roots, targets, strict=True)])
    _, sizes, directions = np.linalg.svd(weighted @ np.linalg.inv(to_white))
    sizes = np.pad(sizes, (0, len(directions) - len(sizes)), mode="edge")  # a latent wider than the targets
    white = directions @ to_white  # rows: latents of unit variance, the most important first
    constant = np.linalg.solve(moment, (x * tokens).mean(0))  # its product with x is as near to 1 as can be

    wanted = x @ weighted.T
    energy = (wanted**2 * tokens).sum()
    best: tuple | None = None
    for power in (0.0, 0.5):
        scaled = white * ((sizes / sizes[0]) ** power)[:, None]
        candidates = [scaled[:rank]]
        for share in (1.0, 4.0, 16.0):
            size = np.sqrt(share * ((scaled[: rank - 1] @ moment) * scaled[: rank - 1]).sum())
            candidates.append(np.concatenate([scaled[: rank - 1], size * constant[None]]))
        for latent in candidates:
            normed = rms_normed(x @ latent.T)
            gram = (normed * tokens).T @ normed
            gram += 1e-9 * np.trace(gram) * np.eye(rank)
            expand = np.linalg.solve(gram, (normed * tokens).T @ wanted)
            error = ((wanted - normed @ expand) ** 2 * tokens).sum() / energy
            if best is None or error < best[0]:
                best = error, latent, expand.T
    error, latent, weighted_expand = best
    size = np.sqrt(((latent @ moment) * latent).sum() / rank)
    parts = np.split(weighted_expand, len(targets))
    expand = np.stack([np.linalg.solve(root, part) for root, part in zip(weight_roots, parts, strict=True)])
    return latent / size, expand, float(1 - error)


def rms_normed(x: Float[np.ndarray, "*batch features"]) -> Float[np.ndarray, "*batch features"]:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + LATENT_NORM_EPS)


def _error_weights(
    old: LlamaAttention,
    q_nope: Float[np.ndarray, "heads nope hidden"],
    second_moment: Float[np.ndarray, "hidden hidden"],
    spread: Float[np.ndarray, " heads"],
    group_of: np.ndarray,
) -> tuple[Float[np.ndarray, "kv_heads nope nope"], Float[np.ndarray, "kv_heads vdim vdim"]]:
    """How errors of a head's keys and values weigh in the layer's output, to first order.

    An error e of a value adds p W_o e with attention p; an error of a score moves the output by p times the attended
    value's distance from the mean one. Both come with the same p, so p drops out."""
    kv_heads, nope = len(old.k), q_nope.shape[1]
    key = np.zeros((kv_heads, nope, nope))
    value = np.zeros((kv_heads, old.v.shape[1], old.v.shape[1]))
    for head, group in enumerate(group_of):
        key[group] += spread[head] / old.k.shape[1] * (q_nope[head] @ second_moment @ q_nope[head].T)
        value[group] += old.o[head].T @ old.o[head]
    return key, value


def _root(matrix: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    """Symmetric square root, with a floor that keeps it invertible."""
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(np.maximum(values, 1e-6 * values.max())) @ vectors.T


def _block_diagonal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    whole = np.zeros((len(a) + len(b), len(a) + len(b)))
    whole[: len(a), : len(a)] = a
    whole[len(a) :, len(a) :] = b
    return whole


def _padded(rows: Float[np.ndarray, "heads values hidden"], size: int) -> Float[np.ndarray, "heads size hidden"]:
    return np.pad(rows, ((0, 0), (0, size - rows.shape[1]), (0, 0)))
