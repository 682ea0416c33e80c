"""`python -m parity_tests.compare` on the ways in which a JAX model is written: `flax.linen`, pytrees with settings
among the weights, `jax.vmap`, channels last, caches that are handed over."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="one side is torch")
pytest.importorskip("flax", reason="the other side is Flax")

from parity_tests.parity.test_compare_kinds import said

TWO = """
class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 8)
    def forward(self, x):
        return self.b(nn.functional.gelu(self.a(x)))
def torch_side():
    return Two(), (X,)
WEIGHTS = {"a": {"kernel": np.zeros((8, 12)), "bias": np.zeros(12)}}
WEIGHTS["b"] = {"kernel": np.zeros((12, 8)), "bias": np.zeros(8)}
def gelu(x):
    return jax.nn.gelu(x, approximate=False)
"""
LINEN = """
from flax import linen
class Port(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(8, name="b")(gelu(linen.Dense(12, name="a")(x)))
def jax_side():
    return Port(), Port().init(jax.random.key(0), X)
"""
VMAP = """
def model(params, x, record):
    def row(x):
        return record("b", linear(params["b"], gelu(record("a", linear(params["a"], x)))))
    return jax.vmap(jax.vmap(row, in_axes=1, out_axes=1))(x.swapaxes(1, 2)).swapaxes(1, 2)
def jax_side():
    return model, WEIGHTS
"""
VMAP_NNX = """
class Port(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(8, 12, rngs=rngs), nnx.Linear(12, 8, rngs=rngs)
    def __call__(self, x):
        return jax.vmap(lambda x: self.b(gelu(self.a(x))))(x)
def jax_side():
    return Port(nnx.Rngs(0))
"""
SETTINGS = """
def model(params, x, key, record):
    assert jax.random.split(key).shape == jax.random.split(params["key"]).shape == (2,)
    h = record("a", linear(params["a"], x)).reshape(2, 5, params["heads"], -1).reshape(2, 5, 12)
    return record("b", linear(params["b"], params["gelu"](h) * params["one"]))
def jax_side():
    settings = {"heads": 3, "one": 1.0, "gelu": gelu, "key": jax.random.key(0), "kind": "decoder"}
    return model, {**WEIGHTS, **settings}, (X, jax.random.key(1))
"""


@pytest.mark.parametrize("jax", [LINEN, VMAP, VMAP_NNX, SETTINGS], ids=["linen", "vmap", "vmap in nnx", "settings"])
def test_models_that_are_written_otherwise_are_run_and_watched(jax, tmp_path, capsys):
    code, text = said(TWO + jax, tmp_path, capsys, "--gradients")
    assert code == 0 and "only in" not in text, text
    code, text = said((TWO + jax).replace("approximate=False", "approximate=True"), tmp_path, capsys)
    assert code == 1 and "They part first in " in text, text
    assert "  1. confirmed, " in text and "JAX has GELU by tanh, torch gelu. Then all the rest agrees" in text, text


def test_gradients_of_an_output_with_channels_last(tmp_path, capsys):
    """What both outputs are multiplied by lies like them."""
    text = """
IMAGE = np.random.default_rng(1).standard_normal((2, 8, 5, 6))
def torch_side():
    return nn.Sequential(nn.Conv2d(8, 12, 3, padding=1)), (IMAGE,)
class Port(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(8, 12, (3, 3), rngs=rngs)
    def __call__(self, x):
        return self.conv(x)
def jax_side():
    return Port(nnx.Rngs(0)), (IMAGE.transpose(0, 2, 3, 1),)
NAMES = {"0.weight": "conv.kernel", "0.bias": "conv.bias"}
"""
    code, output = said(text, tmp_path, capsys, "--gradients")
    assert code == 0 and "gradient of 0." in output, output
    stopped = text.replace("self.conv(x)", "jax.lax.stop_gradient(self.conv(x))")
    code, output = said(stopped, tmp_path, capsys, "--gradients")
    assert code == 1 and "the gradients part first here" in output, output


CACHE = """
import dataclasses
@dataclasses.dataclass
class Cache:
    keys: object
    def add(self, new):
        self.keys = {cat}([self.keys, new], 1)
        return self.keys
class Step(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
    def forward(self, x, cache):
        return self.fc(cache.add(x)).sum(1)
PAST = torch.from_numpy(X[:, :3]).float()
class Opaque:
    def __init__(self):
        self.keys = PAST
    add = Cache.add
def torch_side():
    return Step(), (X[:, 3:4], {cache})
def jax_side():
    return lambda params, x, past: linear(params["fc"], jnp.concatenate([past, x], 1)).sum(1), {{"fc": KERNEL}}, (
        X[:, 3:4], np.float32(X[:, :3]))
"""


@pytest.mark.parametrize("cache", ["Cache(PAST)", "Opaque()"])
def test_an_object_that_a_model_writes_into_is_as_it_was_in_every_run(cache, tmp_path, capsys):
    code, text = said(CACHE.format(cat="torch.cat", cache=cache), tmp_path, capsys, "--gradients")
    assert code == 0, text


SQUARE = """
class Square(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))
    def forward(self, x):
        return x @ self.w
def torch_side():
    return Square(), (X,)
def jax_side():
    return lambda params, x: x @ params["w"].T, {"w": np.zeros((8, 8))}
"""
LSTM = """
def torch_side():
    return nn.LSTM(8, 8, bias=False, batch_first=True), (X,)
def lstm(params, x):
    def step(carry, x):
        h, c = carry
        i, f, g, o = [x @ params[f"ih_{gate}"] + h @ params[f"hh_{gate}"] for gate in "ifgo"]
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h
    zero = jnp.zeros((2, 8), x.dtype)
    (h, c), out = jax.lax.scan(step, (zero, zero), x.swapaxes(0, 1))
    return out.swapaxes(0, 1), h[None], c[None]
def jax_side():
    return lstm, {f"{kind}_{gate}": np.zeros((8, 8)) for kind in ("ih", "hh") for gate in "ifgo"}
NAMES = {f"weight_{kind}_l0": [f"{kind}_{gate}" for gate in "ifgo"] for kind in ("ih", "hh")}
"""


@pytest.mark.parametrize(("text", "what"), [(SQUARE, "w is square, and JAX uses it"), (LSTM, "all square weights")])
def test_a_square_weight_that_is_no_linear_layers_may_be_transposed(text, what, tmp_path, capsys):
    code, output = said(text, tmp_path, capsys)
    assert code == 1 and "as it is (transposed has that shape too)" in output, output
    assert "  1. confirmed, " in output and f"{what} transposed. Then all the rest agrees" in output, output


def test_two_tensors_of_torch_cannot_be_one_of_jax(tmp_path, capsys):
    """The second would overwrite the first."""
    names = 'NAMES = {"a.weight": ("a.kernel", lambda w: w.T), "b.weight": ("a.kernel", lambda w: w)}\n'
    code, text = said(TWO + VMAP + names, tmp_path, capsys)
    assert code == 2 and "NAMES: a.weight and b.weight cannot both be a.kernel" in text.splitlines()[-1], text


def test_weights_of_one_side_alone_and_another_dtype_are_causes(tmp_path, capsys):
    alone = (TWO + SETTINGS).replace("{**WEIGHTS, **settings}", '{**WEIGHTS, **settings, "gain": X[0, 0] + 2}')
    code, text = said(alone.replace('params["one"])', 'params["one"]) * params["gain"]'), tmp_path, capsys)
    assert code == 1 and "not the same weights: only JAX has gain\n" in text, text
    narrow = (TWO + VMAP_NNX).replace("12, rngs=rngs", "12, dtype=jnp.bfloat16, rngs=rngs")
    code, text = said(narrow, tmp_path, capsys)
    assert code == 1 and "  1. seen in the values: the dtype: JAX has bfloat16 here whatever its input" in text, text


@pytest.mark.parametrize("mask", ["x.masked_fill(~seen, -torch.inf)", "torch.where(seen, x, torch.finfo(x.dtype).min)"])
def test_a_mask_that_torch_applies_by_itself_is_tried(mask, tmp_path, capsys):
    text = f"""
class Masked(nn.Module):
    def forward(self, x):
        seen = torch.ones(5, 5, dtype=torch.bool).tril()
        x = x @ x.transpose(1, 2)
        return {mask}.softmax(-1)
def torch_side():
    return Masked(), (X,)
def jax_side():
    return lambda params, x: jax.nn.softmax(x @ x.swapaxes(1, 2), -1), {{}}
"""
    code, output = said(text, tmp_path, capsys)
    assert code == 1 and "a mask: JAX lets every position see every other. Then all the rest agrees" in output, output
