"""A torch MLP and a plain JAX function, which says by `record` what its steps are called; the weights are JAX's."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

SIZE = 24
SOURCE = "jax"  # whose weights both sides get; "torch" if nothing is said


class MLP(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(SIZE)
        self.up = torch.nn.Linear(SIZE, 4 * SIZE)
        self.act = torch.nn.GELU(approximate="tanh")
        self.down = torch.nn.Linear(4 * SIZE, SIZE)

    def forward(self, x):
        return x + self.down(self.act(self.up(self.norm(x))))


def torch_side():
    return MLP(), (np.random.default_rng(0).standard_normal((3, 7, SIZE)),)


def mlp(params, x, record):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    normed = (x - mean) / jnp.sqrt(variance + 1e-5) * params["norm"]["scale"] + params["norm"]["bias"]
    y = record("up", record("norm", normed) @ params["up"]["w"] + params["up"]["b"])
    y = record("act", jax.nn.gelu(y))  # tanh is JAX's default
    return x + record("down", y @ params["down"]["w"] + params["down"]["b"])


def jax_side():
    draw = np.random.default_rng(1).standard_normal
    params = {
        "norm": {"scale": np.ones(SIZE), "bias": np.zeros(SIZE)},
        "up": {"w": draw((SIZE, 4 * SIZE)) / SIZE**0.5, "b": np.zeros(4 * SIZE)},
        "down": {"w": draw((4 * SIZE, SIZE)) / (4 * SIZE) ** 0.5, "b": np.zeros(SIZE)},
    }
    return mlp, params
