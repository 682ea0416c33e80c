"""`python -m parity_tests.compare` on kinds of modules that are the same but easily seem not to be, or the other way
round: buffers, tied weights, dictionaries, several outputs, values without a size."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="one side is torch")
pytest.importorskip("flax", reason="the other side is Flax")

from parity_tests import compare

HEAD = """
import jax, numpy as np, torch
from flax import nnx
from jax import numpy as jnp
from torch import nn
X = np.random.default_rng(0).standard_normal((2, 5, 8))
KERNEL = {"kernel": np.zeros((8, 8)), "bias": np.zeros(8)}
def linear(params, x):
    return x @ params["kernel"] + params["bias"]
"""


def said(text: str, tmp_path: Path, capsys, *options: str) -> tuple[int, str]:
    """The exit code for a file of this text, and what was printed."""
    file = tmp_path / "kinds.py"
    file.write_text(HEAD + text)
    code = compare.main([str(file), *options])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


ROPE = """
TABLE = np.outer(np.arange(5), 100.0 ** -(np.arange(4) / 4)).astype("float32")
TABLE = np.exp(1j * TABLE).astype("complex64")
class Rotated(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.register_buffer("freqs_cis", torch.from_numpy(TABLE), persistent=False)
    def forward(self, x):
        pairs = torch.view_as_complex(self.q(x).reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self.freqs_cis).flatten(-2)
def torch_side():
    return Rotated(), (X,)
def rotated(params, x):
    even, odd = jnp.moveaxis(linear(params["q"], x).reshape(2, 5, 4, 2), -1, 0)
    cos, sin = TABLE.real, {sine}
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(2, 5, 8)
def jax_side():
    return rotated, {{"q": KERNEL}}
"""


@pytest.mark.parametrize(("sine", "code"), [("TABLE.imag", 0), ("0 * TABLE.imag", 1)])
def test_a_complex_buffer_stays_complex(sine, code, tmp_path, capsys):
    """RoPE's angles as the original Llama and DeepSeek keep them."""
    got, text = said(ROPE.format(sine=sine), tmp_path, capsys, "--gradients")
    assert got == code, text


def test_buffers_and_inputs_are_those_of_the_first_run_in_each(tmp_path, capsys):
    """A module may write into both."""
    text = """
class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.act, self.fc = nn.ReLU(inplace=True), nn.Linear(8, 8)
        self.register_buffer("position", torch.tensor(0))
        self.register_buffer("table", torch.from_numpy(X[0]) / 3, persistent=False)
    def forward(self, x):
        out = self.fc(self.act(x)) + self.position + self.table
        self.position += x.shape[1]
        self.table += 1
        return out
def torch_side():
    return Counting(), (X,)
def jax_side():
    return lambda params, x: linear(params["fc"], jax.nn.relu(x)) + X[0] / 3, {"fc": KERNEL}
"""
    assert said(text, tmp_path, capsys, "--gradients")[0] == 0
    wrong = text.replace('params["fc"], jax.nn', '{**params["fc"], "bias": 0}, jax.nn')
    code, text = said(wrong, tmp_path, capsys)  # tried after the run in float32, which rounds the table
    assert code == 1 and "confirmed, with it" in text and "a missing bias: JAX does not add fc.bias" in text, text


RETURNED = """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
    def forward(self, x):
        h = self.fc(x)
        return {torch}
def torch_side():
    return Model(), (X,)
def model(params, x):
    h = linear(params["fc"], x)
    return {jax}
def jax_side():
    return model, {{"fc": KERNEL}}
"""
BOTH = '{"logits": h.tanh(), "hidden": {"last": h}}'


@pytest.mark.parametrize(
    ("torch", "jax", "code"),
    [
        (BOTH, '{"hidden": {"last": h}, "logits": jnp.tanh(h)}', 0),
        (BOTH, '{"hidden": {"last": jnp.tanh(h)}, "logits": h}', 1),
        (BOTH, '{"hidden": {"last": h}}', 0),
        (BOTH, '{"scores": jnp.tanh(h), "states": h}', 0),
        (BOTH, "(jnp.tanh(h), h)", 0),
        (BOTH, "(h, jnp.tanh(h))", 1),
        ("(h, h.tanh().mean())", "(h, jnp.tanh(h).mean())", 0),
        ("(h, h.tanh().mean())", "(h, jnp.tanh(jax.lax.stop_gradient(h)).mean())", 1),
        ("(h, h.tanh().mean().detach())", "(h, jnp.tanh(h).mean())", 1),
        ("(h, h.argmax(-1), h.detach())", "(h, h.argmax(-1), jax.lax.stop_gradient(h))", 0),
    ],
)
def test_outputs_are_told_apart_by_their_keys_and_all_have_gradients(torch, jax, code, tmp_path, capsys):
    """Keys in another order are the same; where none is the same, and without keys, it is their order that counts."""
    got, text = said(RETURNED.format(torch=torch, jax=jax), tmp_path, capsys, "--gradients")
    assert got == code, text
    assert code == 0 or "They part first" in text or "the gradients part first" in text, text


def test_outputs_without_floats_have_no_gradients(tmp_path, capsys):
    code, text = said(RETURNED.format(torch="h.argmax(-1)", jax="h.argmax(-1)"), tmp_path, capsys, "--gradients")
    assert code == 2 and text.endswith("kinds.py: --gradients: the models return no floats\n"), text


@pytest.mark.parametrize(("mask", "code"), [("tri(5)", 0), ("tri(5, k=1)", 1), ("zeros((5, 5))", 1), ("eye(5)", 1)])
def test_infinities_of_a_mask_are_equal_where_both_have_them(mask, code, tmp_path, capsys):
    torch = 'torch.where(torch.ones(5, 5).tril().bool()[..., None], h[:, None], float("-inf"))'
    jax = f"jnp.where(np.{mask}.astype(bool)[..., None], h[:, None], -jnp.inf)"
    got, text = said(RETURNED.format(torch=torch, jax=jax), tmp_path, capsys)
    assert got == code, text


TIED = """
class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.fc, self.lm_head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.embed.weight
    def forward(self, x):
        return self.lm_head(self.fc(self.embed(x)))
def torch_side():
    return Tied(), (torch.arange(10).reshape(2, 5),)
def tied(params, x):
    table = params["table"]
    return linear(params["fc"], {table}[x]) @ table.T
def jax_side():
    draw = np.random.default_rng(1).standard_normal
    return tied, {{"table": draw((11, 8)), "fc": {{"kernel": draw((8, 8)), "bias": draw(8)}}}}
"""


@pytest.mark.parametrize("source", ["torch", "jax"])
@pytest.mark.parametrize("name", ["embed.weight", "lm_head.weight"])
@pytest.mark.parametrize(("table", "code"), [("table", 0), ("jax.lax.stop_gradient(table)", 1)])
def test_tied_weights_are_one_under_either_name(source, name, table, code, tmp_path, capsys):
    text = TIED.format(table=table) + f"SOURCE = {source!r}\nNAMES = {{{name!r}: 'table'}}\n"
    got, text = said(text, tmp_path, capsys, "--gradients")
    assert got == code and "only in" not in text.partition("Compared")[0], text
    assert code == 0 or f"the gradients part first here: gradients, float64, kinds: gradient of {name}" in text, text


ROUTER = """
class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.drop = nn.Linear(8, 6, dtype=torch.bfloat16), nn.Dropout()
        self.register_buffer("e_score_correction_bias", torch.zeros(6))
    def forward(self, x):
        scores = self.drop(self.gate(x)).sigmoid() + torch.from_numpy(TABLE).to(x)
        return scores.gather(-1, (scores + self.e_score_correction_bias).topk(2)[1])
def torch_side():
    return Router(), (torch.from_numpy(X).bfloat16(),)
TABLE = X[0, :, :6] / 3
class Bias(nnx.Variable):
    pass
class Port(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.gate = nnx.Linear(8, 6, param_dtype=jnp.bfloat16, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.e_score_correction_bias, self.table = Bias(jnp.zeros(6)), TABLE
    def __call__(self, x):
        scores = jax.nn.sigmoid(self.drop(self.gate(x))) + self.table
        order = jax.lax.top_k(scores{bias}, 2)[1]
        return jnp.take_along_axis(scores, order, -1)
def jax_side():
    return Port(), (jnp.asarray(X, jnp.bfloat16),)
"""


@pytest.mark.parametrize(("bias", "code"), [(" + self.e_score_correction_bias[...]", 0), ("", 1)])
def test_weights_in_bfloat16_and_variables_of_any_kind_are_loaded(bias, code, tmp_path, capsys):
    got, text = said(ROUTER.replace("{bias}", bias), tmp_path, capsys)
    assert got == code and "e_score_correction_bias -> e_score_correction_bias, as it is\n" in text, text


@pytest.mark.parametrize("remat", ["jax.checkpoint", "jax.remat"])
def test_values_are_recorded_under_either_name_of_rematerialisation(remat, tmp_path, capsys):
    body = f'{remat}(lambda p, x: record("fc", linear(p, x)))(params["fc"], x)'
    text = RETURNED.format(torch="h", jax="h").replace("model(params, x)", "model(params, x, record)")
    code, text = said(text.replace('linear(params["fc"], x)', body), tmp_path, capsys)
    assert code == 0 and "Compared: 2 values, from fc to output" in text, text


NORM = """
class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(8, bias=False), nn.Linear(8, 8)
    def forward(self, x):
        return self.fc(self.norm(x))
def torch_side():
    return Normed(), (X,)
def normed(params, x):
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return linear(params["fc"], x * {scale})
def jax_side():
    draw = np.random.default_rng(1).standard_normal
    return normed, {{"scale": draw(8), "fc": {{"kernel": draw((8, 8)), "bias": draw(8)}}}}
NAMES = {{"norm.weight": ("scale", lambda w: {weight}), "fc.weight": ("fc.kernel", lambda w: {kernel})}}
"""


@pytest.mark.parametrize("source", ["torch", "jax"])
@pytest.mark.parametrize("kernel", ["w.T", "jnp.transpose(w)", 'w.T.astype("float32")'])
def test_functions_in_names_move_values_or_add_to_them(source, kernel, tmp_path, capsys):
    for scale, weight in (("(1 + params['scale'])", "w - 1"), ("params['scale']", "w")):
        text = NORM.format(scale=scale, weight=weight, kernel=kernel) + f"SOURCE = {source!r}\n"
        code, text = said(text, tmp_path, capsys, "--gradients")
        assert code == 0, text


def test_functions_in_names_that_do_more_are_refused_where_they_cannot_be_used(tmp_path, capsys):
    text = NORM.format(scale="params['scale'] / 2", weight="2 * w", kernel="w.T")
    assert said(text, tmp_path, capsys)[0] == 0
    for source, asked in (("torch", "--gradients"), ("jax", "SOURCE = 'jax'")):
        code, output = said(f"{text}SOURCE = {source!r}\n", tmp_path, capsys, "--gradients")
        assert code == 2 and output.splitlines()[-1].endswith(
            f"kinds.py: {asked}: the function of norm.weight in NAMES may only move values, or add to them"
        ), output


def test_inputs_may_be_named_tuples_but_not_empty(tmp_path, capsys):
    text = """
import collections
Angles = collections.namedtuple("Angles", "cos sin")
class Turned(nn.Module):
    def forward(self, x, angles, mask, flag):
        return x * angles.cos + flag * angles.sin
def torch_side():
    return Turned(), {"x": X, "angles": Angles(X[0], torch.from_numpy(X[1])), "mask": None, "flag": True}
def jax_side():
    return lambda params, x, angles, mask, flag: x * angles.cos + flag * angles.sin, {}
"""
    code, output = said(text, tmp_path, capsys, "--gradients")
    assert code == 0, output
    code, output = said(text.replace('"x": X,', '"x": X[:0],'), tmp_path, capsys)
    assert code == 2 and output.endswith(
        "kinds.py: nothing to compare: the models' outputs are empty; give inputs that are not\n"
    ), output


@pytest.mark.parametrize(("jax", "code"), [("x + h", 0), ("h", 1)])
def test_a_module_called_output_is_not_the_models(jax, code, tmp_path, capsys):
    text = RETURNED.format(torch="x + h", jax=jax).replace("self.fc", "self.output").replace('"fc"', '"output"')
    got, text = said(text, tmp_path, capsys, "--gradients")
    assert got == code and "Compared: 1 values" in text, text
