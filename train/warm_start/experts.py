"""Experts from a dense MLP (sparse upcycling, Komatsuzaki et al. 2022): the last stage of `train.warm_start`. NumPy.

Every expert, shared or routed, starts as the dense MLP with its down projection divided by the number of copies whose
outputs add up: the shared ones, plus one, since the weights of a token's routed experts sum to `routed_scaling_factor`.
The function is thereby preserved, whatever the router does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Float

from torch_ref.spec.config import ModelConfig
from torch_ref.spec.parameters import Parameter, parameter_table

ROUTER_COMPONENTS = 64
"""Principal components of the MLP's input that the router looks at."""


def upcycled_values(
    config: ModelConfig,
    dense: Mapping[str, np.ndarray],
    routers: list[Float[np.ndarray, "experts hidden"]],
    diversity: float,
    seed: int,
) -> Iterator[tuple[Parameter, np.ndarray]]:
    """Every tensor of the mixture-of-experts model `config` from those of the dense model by name, one at a time.

    `diversity` is the share of each routed expert's intermediate units that are drawn anew (drop-upcycling, Nakamura et
    al. 2025), the same units in gate, up and down projection; 0 preserves the function exactly."""
    copies = config.n_shared_experts + 1
    for row in parameter_table(config):
        if ".mlp." not in row.name:
            yield row, dense[row.name]
            continue
        prefix, _, name = row.name.partition(".mlp.")
        layer = int(prefix.split(".")[1])
        if name == "router.weight":
            yield row, routers[layer]
            continue
        if name == "router.balance_bias":
            yield row, np.zeros(row.shape, np.float32)
            continue
        kind, projection = name.removesuffix(".weight").split(".")
        value = dense[f"{prefix}.mlp.{projection}.weight"]
        if projection == "down_proj":
            value = value / np.float32(copies)
        if kind == "shared_expert":
            yield row, np.concatenate([value] * config.n_shared_experts, axis=int(projection == "down_proj"))
            continue
        if projection == "down_proj":
            value = value / np.float32(config.routed_scaling_factor)
        yield (
            row,
            _diverse(np.repeat(value[None], config.n_routed_experts, axis=0), projection, prefix, diversity, seed),
        )


def _diverse(
    experts: Float[np.ndarray, "experts rows columns"], projection: str, layer: str, diversity: float, seed: int
) -> Float[np.ndarray, "experts rows columns"]:
    """Draw a share of each expert's units anew, normal with the mean and spread of all values of the projection."""
    if not diversity:
        return experts
    by_unit = experts.swapaxes(1, 2) if projection == "down_proj" else experts
    units = by_unit.shape[1]
    mean, spread = experts[0].mean(), experts[0].std()
    for number, expert in enumerate(by_unit):
        chosen = _generator(seed, layer, number, "units").permutation(units)[: round(diversity * units)]
        drawn = _generator(seed, layer, number, projection).standard_normal((len(chosen), expert.shape[1]), np.float32)
        expert[chosen] = mean + spread * drawn
    return experts


def _generator(*key: object) -> np.random.Generator:
    digest = hashlib.sha256(":".join(map(str, key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def balanced_router(
    mean: Float[np.ndarray, " hidden"],
    second_moment: Float[np.ndarray, "hidden hidden"],
    experts: int,
    seed: int,
    layer: int,
) -> Float[np.ndarray, "experts hidden"]:
    """Router rows whose logits have mean 0, variance 1 and, as far as possible, no correlation over the text that the
    statistics of x are from, so that the experts start with about equal loads.

    Rows are random directions of the whitened principal components. RMS-normed activations have a direction whose
    product with them is nearly 1 for all tokens: it serves as the bias that takes the mean of each logit away."""
    covariance = second_moment - np.outer(mean, mean)
    values, vectors = np.linalg.eigh(covariance)
    count = min(ROUTER_COMPONENTS, len(mean))
    whiten = vectors[:, -count:] / np.sqrt(np.maximum(values[-count:], 1e-6 * values[-1]))
    drawn = _generator(seed, layer, "router").standard_normal((count, max(experts, 1)))
    directions = np.linalg.qr(drawn)[0] if experts <= count else drawn / np.linalg.norm(drawn, axis=0)
    rows = (whiten @ directions).T
    ridge = 1e-4 * np.trace(second_moment) / len(mean)
    constant = np.linalg.solve(second_moment + ridge * np.eye(len(mean)), mean)
    constant /= constant @ mean
    return (rows - np.outer(rows @ mean, constant)).astype(np.float32)
