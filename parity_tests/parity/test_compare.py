"""`python -m parity_tests.compare`: a right port passes; a mistake is found, named at its module and, where it can be
tried, proven; what the file says wrongly is one line."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="one side is torch")
pytest.importorskip("flax", reason="the other side is Flax")

from parity_tests import compare
from parity_tests.harness import pair
from torch_ref.spec.interface import UserError

EXAMPLES = Path(__file__).parents[1] / "examples"


def said(capsys, *arguments: object) -> tuple[int, str]:
    """The exit code, and what was printed."""
    code = compare.main(list(map(str, arguments)))
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def changed(example: str, tmp_path: Path, *changes: tuple[str, str]) -> Path:
    """An example in which a mistake was made."""
    text = (EXAMPLES / example).read_text()
    for right, wrong in changes:
        assert text.count(right) >= 1, right
        text = text.replace(right, wrong)
    (tmp_path / example).write_text(text)
    return tmp_path / example


@pytest.mark.parametrize("example", ["attention.py", "functional_mlp.py", "llama_block.py"])
def test_a_right_port_passes(example, capsys):
    if example == "llama_block.py":
        pytest.importorskip("transformers")
    code, text = said(capsys, EXAMPLES / example, "--gradients")
    assert code == 0 and text.endswith("Equal within the bounds.\n"), text
    assert re.findall("^ok   (modules|gradients), (float64|float32)", text, re.M) == [
        ("modules", "float64"),
        ("modules", "float32"),
        ("gradients", "float64"),
        ("gradients", "float32"),
    ]


ROTATED = "jnp.concatenate([-second, first], axis=-1)"
INTERLEAVED = """    half = x.shape[-1] // 2
    cos, sin = cos[:, :, None, :half], sin[:, :, None, :half]
    first, second = x[..., ::2], x[..., 1::2]
    return jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(x.shape)
"""
LLAMA = {
    "square weight": (
        ("NAMES = {", 'NAMES = {\n    "self_attn.o_proj.weight": ("attention.o.kernel", lambda w: w),'),
        "self_attn.o_proj: modules, float64",
        "self_attn.o_proj.weight is square, and JAX uses it transposed. Then all the rest agrees",
    ),
    "epsilon": (
        ("keepdims=True) + EPS)", "keepdims=True) + 1e-6)"),
        "input_layernorm: modules, float64",
        "epsilon: JAX has 1e-06 in input_layernorm, torch 1e-05",
    ),
    "epsilon outside the root": (
        (
            "jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + EPS)",
            "1 / (jnp.mean(wide**2, axis=-1, keepdims=True) ** 0.5 + EPS)",
        ),
        "input_layernorm: modules, float64",
        "epsilon: JAX adds that of input_layernorm outside the root, torch inside",
    ),
    "RoPE layout": (
        ("    first, second = jnp.split(x, 2, axis=-1)\n", INTERLEAVED),
        "self_attn, in its own code between self_attn.v_proj and self_attn.o_proj: modules, float64",
        "RoPE: JAX rotates neighbouring values (interleaved), torch halves. Then all the rest agrees",
    ),
    "RoPE direction": (
        (ROTATED, "jnp.concatenate([second, -first], axis=-1)"),
        "self_attn, in its own code between self_attn.v_proj and self_attn.o_proj",
        "RoPE: JAX rotates the other way round",
    ),
    "K/V heads": (
        ("jnp.repeat(each, HEADS // KV_HEADS, axis=2)", "jnp.tile(each, (1, 1, HEADS // KV_HEADS, 1))"),
        "self_attn, in its own code between self_attn.v_proj and self_attn.o_proj",
        "K/V heads: query head h reads K/V head h mod 2 in JAX, h // 4 in torch. Then all the rest agrees",
    ),
    "softmax dtype": (
        ("scores.astype(jnp.float32)", "scores"),
        "self_attn, in its own code between self_attn.v_proj and self_attn.o_proj: float32 inside, float64",
        "the dtype of a softmax, norm or router: torch is in float32 here whatever its input, JAX in",
    ),
    "mask": (
        ("np.tri(SEQ, dtype=bool)", "np.ones((SEQ, SEQ), bool)"),
        "self_attn, in its own code between self_attn.v_proj and self_attn.o_proj",
        "a mask: JAX lets every position see every other. Then all the rest agrees",
    ),
    "scale": (
        ("/ HEAD_DIM**0.5", ""),
        "self_attn, in its own code between self_attn.v_proj and self_attn.o_proj",
        "softmax's scale: JAX has 1 where torch has scaling",
    ),
    "activation": (
        ("jax.nn.silu", "jax.nn.gelu"),
        "mlp, in its own code between mlp.up_proj and mlp.down_proj: modules, float64",
        "the activation: JAX has GELU by tanh, torch silu. Then all the rest agrees",
    ),
}
"""Of each mistake: the change, where it shows, and the suspect that has to be the first."""


@pytest.mark.parametrize("fault", LLAMA)
def test_a_mistake_in_a_llama_block_is_found_and_named(fault, tmp_path, capsys):
    pytest.importorskip("transformers", reason="the block is one of transformers")
    change, place, suspect = LLAMA[fault]
    code, text = said(capsys, changed("llama_block.py", tmp_path, change))
    assert code == 1
    assert f"They part first in {place}" in text, text
    first = re.search("^  1. (.*)", text, re.M)[1]
    assert first.startswith("confirmed, ") and suspect in first, text


MLP = {
    "epsilon": (
        ("variance + 1e-5", "variance + 1e-6"),
        "norm: modules, float64",
        "epsilon: JAX has 1e-06 in norm, torch 1e-05",
    ),
    "epsilon outside the root": (
        ("jnp.sqrt(variance + 1e-5)", "(jnp.sqrt(variance) + 1e-5)"),
        "norm: modules, float64",
        "epsilon: JAX adds that of norm outside the root",
    ),
    "variance over n - 1": (
        ("x.var(-1, keepdims=True)", "x.var(-1, keepdims=True, ddof=1)"),
        "norm: modules, float64",
        "JAX divides the variance of norm by n - 1",
    ),
    "missing bias": ((' + params["up"]["b"]', ""), "up: modules, float64", "a missing bias: JAX does not add up.bias"),
    "GELU by erf": (
        ("jax.nn.gelu(y)", "jax.nn.gelu(y, approximate=False)"),
        "act: modules, float64",
        "the activation: JAX has GELU by erf, torch gelu",
    ),
}


@pytest.mark.parametrize("fault", MLP)
def test_a_mistake_in_a_function_is_found_and_named(fault, tmp_path, capsys):
    change, place, suspect = MLP[fault]
    code, text = said(capsys, changed("functional_mlp.py", tmp_path, change))
    assert code == 1 and f"They part first in {place}" in text, text
    first = re.search("^  1. (.*)", text, re.M)[1]
    assert first.startswith("confirmed, ") and suspect in first and first.endswith("Then all the rest agrees"), text


def test_what_cannot_be_tried_is_read_from_the_values_or_listed(tmp_path, capsys):
    code, text = said(capsys, changed("functional_mlp.py", tmp_path, ("return x + record", "return record")))
    assert code == 1 and "They part first in the model, in its own code after down" in text, text
    assert "  1. seen in the values: something left out: JAX has here what torch has as down" in text, text
    code, text = said(
        capsys, changed("functional_mlp.py", tmp_path, ('@ params["down"]["w"]', '@ params["down"]["w"] * 3'))
    )
    assert code == 1 and "seen in the values" not in text and "none makes the difference vanish" in text, text
    code, text = said(
        capsys, changed("functional_mlp.py", tmp_path, ('record("up", ', 'record("up", 3 * (')), "--gradients"
    )
    assert code == 2 and text.startswith("error: ") and "SyntaxError" in text
    times = ('params["norm"]["scale"] + params', 'params["norm"]["scale"] * 1.0 + 0.0 * x + params')
    assert said(capsys, changed("functional_mlp.py", tmp_path, times))[0] == 0
    factor = ('x + record("down", y @', 'x + record("down", 2 * (y @'), ('["down"]["b"])', '["down"]["b"]))')
    code, text = said(capsys, changed("functional_mlp.py", tmp_path, *factor))
    assert code == 1 and "  1. seen in the values: a factor: JAX has 2 times torch's value everywhere" in text, text


def test_a_gradient_that_is_stopped_is_found_with_gradients_only(tmp_path, capsys):
    file = changed(
        "functional_mlp.py",
        tmp_path,
        ("x.mean(-1, keepdims=True),", "jax.lax.stop_gradient(x.mean(-1, keepdims=True)),"),
    )
    assert said(capsys, file)[0] == 0
    code, text = said(capsys, file, "--gradients")
    assert code == 1 and "The values agree, the gradients part first here: gradients, float64" in text, text
    assert "gradient of the first input off by" in text.splitlines()[-2]


@pytest.mark.parametrize(
    ("detached", "place"),
    [
        ("x + self.down(self.act(self.up(self.norm(x))).detach())", "gradient of up.bias"),
        ("x.detach() + self.down(self.act(self.up(self.norm(x.detach()))))", "gradient of the first input"),
    ],
)
def test_what_torch_alone_detaches_has_a_gradient_of_zero(detached, place, tmp_path, capsys):
    """Torch says None of it, which is not that there is nothing to compare."""
    file = changed("functional_mlp.py", tmp_path, ("x + self.down(self.act(self.up(self.norm(x))))", detached))
    code, text = said(capsys, file, "--gradients")
    assert code == 1 and "The values agree, the gradients part first here: gradients, float64" in text, text
    assert f"{place} off by" in text.splitlines()[-2], text


LINEAR = """
import numpy as np, torch
from flax import nnx
def torch_side():
    torch.manual_seed(0)
    return torch.nn.Linear(8, {out}), (np.random.default_rng(0).standard_normal((5, 8)),)
def jax_side():
    return nnx.Linear(8, {out}, rngs=nnx.Rngs(0))
"""


@pytest.mark.parametrize("out", [8, 12])
@pytest.mark.parametrize("source", ["torch", "jax"])
def test_linear_layers_get_each_others_weights(out, source, tmp_path, capsys):
    file = tmp_path / "linear.py"
    file.write_text(LINEAR.format(out=out) + f"SOURCE = {source!r}\n")
    code, text = said(capsys, file, "--gradients")
    assert code == 0 and "weight -> kernel, transposed\n" in text, text
    file.write_text(file.read_text() + 'NAMES = {"weight": ("kernel", lambda w: w)}\n')
    code, text = said(capsys, file)
    if out == 8:
        assert code == 1 and "weight is square, and JAX uses it transposed. Then all the rest agrees" in text, text
    else:
        assert code == 2 and text.endswith("the function of weight gives the shape (12, 8), kernel has (8, 12)\n")


def test_what_jax_alone_computes_in_float32_is_said_unless_it_is_meant(tmp_path, capsys):
    """The fused attention of torch takes its softmax in the dtype it is given."""
    pytest.importorskip("transformers", reason="the block is one of transformers")
    fused = ('"eager"', '"sdpa"')
    code, text = said(capsys, changed("llama_block.py", tmp_path, fused))
    assert code == 1 and "float32 inside, float64, llama_block: input of self_attn.o_proj off by" in text, text
    assert "JAX is in float32 here whatever its input, torch in the input's dtype" in text
    meant = "FLOAT32 = ('input of self_attn.o_proj',)"
    assert f"If it is meant: {meant}" in text
    assert said(capsys, changed("llama_block.py", tmp_path, fused, ("NAMES = {", f"{meant}\nNAMES = {{")))[0] == 0


def test_flax_attention_has_its_softmax_in_float32(tmp_path, capsys):
    """`nnx.MultiHeadAttention` differs from torch's by 4e-8 in float64."""
    code, text = said(capsys, changed("attention.py", tmp_path, ('FLOAT32 = ("output",)', "FLOAT32 = ()")))
    assert code == 1 and "float32 inside, float64, attention: output off by" in text, text


def test_values_are_kept_as_they_were_before_torch_writes_into_them(tmp_path, capsys):
    right = "x + self.down(self.act(self.up(self.norm(x))))"
    in_place = "self.down(self.act(self.up(self.norm(x)))).add_(x)"
    code, text = said(capsys, changed("functional_mlp.py", tmp_path, (right, in_place)), "--gradients")
    assert code == 0, text


def test_a_file_is_a_module_like_any_other_unless_it_fails(tmp_path):
    """Dataclasses whose annotations are strings look for their module."""
    file = tmp_path / "annotated.py"
    dataclass = "import dataclasses\n@dataclasses.dataclass\nclass Size:\n    width: int = 3\n"
    sides = "def torch_side(): ...\ndef jax_side(): ...\n"
    file.write_text(f"from __future__ import annotations\n{dataclass}{sides}")
    assert pair._import(file).Size().width == 3
    file.write_text("1 / 0")
    with pytest.raises(UserError, match="annotated.py: ZeroDivisionError"):
        pair._import(file)
    assert "pair_annotated" not in sys.modules


RETURNED = """
import dataclasses, torch
from jax import numpy as jnp
class Kept:
    def __init__(self, values): self.values = values
@dataclasses.dataclass
class Output:
    loss: object
    values: object
class Model(torch.nn.Module):
    def forward(self, x):
        return {torch}
def torch_side():
    return Model(), (torch.arange(6.0),)
def jax_side():
    return lambda params, x: {jax}, {{"unused": jnp.ones(2)}}
"""


@pytest.mark.parametrize(
    ("torch", "jax", "code", "message"),
    [
        ("Output(None, x)", "Output(None, x)", 0, "Compared: 1 values, from output to output"),
        ("Output(None, x)", "2 * x", 1, "They part first in the model"),
        ("torch.complex(x, x).conj()", "x - 1j * x", 0, "Equal"),
        ("torch.complex(x, x).conj()", "x + 1j * x", 1, "They part first in the model"),
        ("Kept(x)", "x", 2, "torch_side()'s model fails in float64: TypeError: no array in the Kept it returns"),
        ("x", "Kept(x)", 2, "jax_side()'s model fails in float64: TypeError: no array in the Kept it returns"),
    ],
)
def test_outputs_are_compared_whatever_holds_them_or_the_file_is_refused(torch, jax, code, message, tmp_path, capsys):
    file = tmp_path / "returned.py"
    file.write_text(RETURNED.format(torch=torch, jax=jax))
    got, text = said(capsys, file)
    assert got == code and message in text, text
    assert code != 2 or text.splitlines()[-1].startswith(f"error: {file}: ")


def test_values_inside_jit_scan_and_checkpoint_are_recorded(tmp_path, capsys):
    """Two layers in one stacked tensor each, scanned, against a list of layers."""
    file = tmp_path / "stacked.py"
    file.write_text(
        """
import jax, jax.numpy as jnp, numpy as np, torch
def torch_side():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)), (torch.randn(3, 6),)
NAMES = {f"{i}.weight": (f"w{i}", lambda w: w.T) for i in range(2)} | {f"{i}.bias": f"b{i}" for i in range(2)}
@jax.jit
def model(params, x, record):
    numbers = iter(range(2))
    @jax.checkpoint
    def layer(x, both):
        return record(str(next(numbers)), x @ both[0] + both[1]), None
    stacked = [jnp.stack([params[f"{name}{i}"] for i in range(2)]) for name in "wb"]
    return jax.lax.scan(layer, x, stacked)[0]
model.__wrapped__  # jitted
def jax_side():
    draw = np.random.default_rng(0).standard_normal
    return model, {"w0": draw((6, 6)), "w1": draw((6, 6)), "b0": np.zeros(6), "b1": np.zeros(6)}
"""
    )
    code, text = said(capsys, file, "--gradients")
    assert code == 0 and "Compared: 3 values, from 0 to output" in text, text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("def jax_side", "def flax_side"), "has no function jax_side()"),
        (
            ("return mlp, params", "return params"),
            "jax_side() must return an nnx.Module, or a function and its parameters",
        ),
        (("return MLP(), (", "return MLP, ("), "torch_side() must return a torch.nn.Module and its inputs"),
        (('SOURCE = "jax"', 'SOURCE = "flax"'), "SOURCE must be 'torch' or 'jax', not 'flax'"),
        (('SOURCE = "jax"', 'NAMES = {"up.wait": "up.w"}'), "NAMES: torch has no 'up.wait'; 'up.weight'?"),
        (('SOURCE = "jax"', 'NAMES = {"up.weight": "up.v"}'), "NAMES: JAX has no 'up.v'; 'up.w'?"),
        (
            ('SOURCE = "jax"', 'NAMES = {"up.weight": "norm.scale"}'),
            "up.weight of shape (96, 24) does not become norm.scale",
        ),
        (('SOURCE = "jax"', 'FLOAT32 = "norm"'), "FLOAT32 must be a tuple of names, not a name"),
        (('SOURCE = "jax"', 'FLOAT32 = ("nrm",)'), "FLOAT32: what is compared has no 'nrm'; 'norm'?"),
        (('SOURCE = "jax"', 'MODULES = {"output": "head"}'), "the models' outputs are not compared: JAX has no 'head'"),
        (("import numpy as np", "import nump as np"), "ModuleNotFoundError: No module named 'nump'"),
        (("return x + record", "return x[0, :, :5] + record"), "jax_side()'s model fails in float64: ValueError: "),
    ],
)
def test_mistakes_of_the_file_are_one_line(change, message, tmp_path, capsys):
    file = changed("functional_mlp.py", tmp_path, change)
    code, text = said(capsys, file)
    last = text.splitlines()[-1]
    assert code == 2 and last.startswith(f"error: {file}: ") and message in last, text


def test_a_file_that_is_not_there(tmp_path, capsys):
    assert said(capsys, tmp_path / "none.py") == (2, f"error: {tmp_path}/none.py: no such file\n")


ROUTER = """
import jax, jax.numpy as jnp, numpy as np, torch


class Router(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(6))
        self.conv = torch.nn.Conv1d(6, 5, 3)
        self.qv = torch.nn.Linear(5, 8, bias=False)

    def forward(self, x):
        x = x * self.scale
        y = self.conv(x.mT).mT
        q, v = self.qv(y).chunk(2, -1)
        weights, chosen = (q.round() + v.round()).topk(2)  # ties everywhere
        return weights * v.gather(-1, chosen), chosen


def torch_side():
    torch.manual_seed(0)
    return Router(), (torch.randn(4, 9, 6),)


def router(params, x, record):
    x = x * params["gain"]
    y = jax.lax.conv_general_dilated(x, params["turned"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))
    y = record("body", y + params["shift"])
    q, v = y @ params["first"], y @ params["second"]
    scores = jnp.round(q) + jnp.round(v)
    chosen = jnp.argsort(-scores, stable=True)[..., :2]
    return jnp.take_along_axis(scores, chosen, -1) * jnp.take_along_axis(v, chosen, -1), chosen


def jax_side():
    shapes = {"gain": 6, "turned": (3, 6, 5), "shift": 5, "first": (5, 4), "second": (5, 4)}
    return router, {name: np.ones(shape) for name, shape in shapes.items()}


NAMES = {
    "scale": "gain",
    "conv.weight": "turned",
    "conv.bias": "shift",
    "qv.weight": ["first", "second"],
}
"""


def test_ties_convolutions_parts_and_a_module_of_another_name(tmp_path, capsys):
    """Which of equal scores torch.topk takes is its own affair, but it cannot be both the first and the last."""
    file, first = tmp_path / "router.py", "jnp.argsort(-scores, stable=True)[..., :2]"
    assert first in ROUTER
    codes = []
    for word, chosen in (("lowest", first), ("highest", f"3 - {first.replace('-scores', '-scores[..., ::-1]')}")):
        file.write_text(ROUTER.replace(first, chosen) + 'MODULES = {"conv": "body"}\n')
        code, text = said(capsys, file)
        codes.append(code)
        assert "conv.weight -> turned, [out, in, ...] to [..., in, out]" in text
        assert "qv.weight[0] -> first, transposed" in text and "qv.weight[1] -> second, transposed" in text
        if code:
            assert "They part first in the model, in its own code after " in text, text
            assert re.search(f"  1. confirmed, .*: ties: JAX takes the {word} index among equal scores. Then all", text)
    assert 1 in codes and 2 not in codes


def test_names_that_are_given_wrongly_in_parts(tmp_path, capsys):
    file = tmp_path / "router.py"
    file.write_text(ROUTER.replace('["first", "second"]', '["first", "second", "gain"]'))
    code, text = said(capsys, file)
    assert code == 2 and text.endswith("NAMES: qv.weight of shape (8, 5) is not 3 equal parts\n")


def test_where_a_functions_inputs_are_unknown_the_code_around_is_tried_too(tmp_path, capsys):
    """`act` is not recorded: the next value is `down`, whose own weights are right."""
    silent = ('record("act", jax.nn.gelu(y))', "jax.nn.gelu(y, approximate=False)")
    code, text = said(capsys, changed("functional_mlp.py", tmp_path, silent))
    assert code == 1 and "They part first in down, or in the model's own code before it, after up: modules" in text, (
        text
    )
    assert "  1. confirmed, " in text and "the activation: JAX has GELU by erf, torch gelu. Then all" in text, text


def test_a_norm_whose_weight_is_around_zero(tmp_path, capsys):
    changes = ('* params["norm"]["scale"]', '* (1 + params["norm"]["scale"])')
    code, text = said(capsys, changed("functional_mlp.py", tmp_path, changes))
    assert code == 1 and "  1. confirmed, " in text and "JAX multiplies by 1 + norm.weight. Then all" in text, text


def test_weights_that_are_kept_can_hide_a_mistake(tmp_path, capsys):
    """Why noise is added: a bias of zeros that is not read."""
    file = changed("functional_mlp.py", tmp_path, (' + params["up"]["b"]', ""))
    code, text = said(capsys, file, "--keep-weights")
    assert code == 0 and "Noise" not in text
    assert said(capsys, file)[0] == 1


def test_modules_that_inherit_from_each_other_are_recorded_once(tmp_path, capsys):
    file = tmp_path / "inherited.py"
    file.write_text(
        """
import numpy as np, torch
from flax import nnx
class Double(nnx.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)
class Plain(nnx.Linear):
    pass
class Both(nnx.Module):
    def __init__(self):
        self.a, self.b, self.c = (cls(4, 4, rngs=nnx.Rngs(0)) for cls in (Plain, Double, nnx.Linear))
    def __call__(self, x):
        return self.c(self.b(self.a(x)))
class Torch(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Linear(4, 4) for _ in range(3))
    def forward(self, x):
        return self.c(self.b(self.a(x)))
def torch_side():
    return Torch(), (np.random.default_rng(0).standard_normal((5, 4)),)
def jax_side():
    return Both()
"""
    )
    code, text = said(capsys, file)
    assert code == 1 and "They part first in b: modules" in text and "Compared: 7 values, " in text, text
    assert "  1. seen in the values: a factor: JAX has 2 times torch's value everywhere" in text
