"""The specification both models are built from: sizes, the parameter table, seeded init, the RoPE table."""

import ast
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from torch_ref.spec.config import PRESETS, ModelConfig, SpecificationError
from torch_ref.spec.parameters import (
    closed_form_count,
    count_active_parameters,
    count_parameters,
    flax_path,
    initial_value,
    initial_values,
    parameter_table,
    rope_table,
)

REPOSITORY = Path(__file__).parents[2]
TINY = PRESETS["tiny"]
VARIANTS = {
    **PRESETS,
    "query latent": replace(TINY, q_lora_rank=40),
    "one dense layer": replace(TINY, first_k_dense=1),
    "all dense": replace(TINY, first_k_dense=TINY.num_layers),
    "no shared expert": replace(TINY, n_shared_experts=0),
    "two shared experts": replace(TINY, n_shared_experts=2),
    "a K/V head for each head": replace(TINY, num_kv_heads=TINY.num_heads),
}


def test_smol_774m_has_the_documented_sizes():
    config = PRESETS["smol-774m"]
    assert config == ModelConfig()
    assert count_parameters(config) == 774_015_408
    assert round(count_active_parameters(config) / 1e6) == 296
    assert config.cache_values_per_token == 112
    assert config.softmax_scale == pytest.approx(104**-0.5, rel=1e-15)


@pytest.mark.parametrize("name", VARIANTS)
def test_table_count_is_the_closed_form(name):
    assert count_parameters(VARIANTS[name]) == closed_form_count(VARIANTS[name])


@pytest.mark.parametrize("name", VARIANTS)
def test_torch_model_has_exactly_the_rows_of_the_table(name):
    pytest.importorskip("torch")
    from torch_ref.model import Model

    config = VARIANTS[name]
    model = Model(config, device="meta")
    rows = parameter_table(config)
    assert {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()} == {r.name: r.shape for r in rows}
    assert {key for key, _ in model.named_parameters()} == {row.name for row in rows if row.trainable}
    assert sum(parameter.numel() for parameter in model.parameters()) == closed_form_count(config)


@pytest.mark.parametrize("name", VARIANTS)
def test_flax_model_has_exactly_the_rows_of_the_table(name):
    pytest.importorskip("flax")
    from functools import partial

    import jax
    from flax import nnx

    from flax_model.model import Model
    from flax_model.trees import split

    config = VARIANTS[name]
    _, params, biases = split(nnx.eval_shape(partial(Model, config)))
    for trainable, tree in ((True, params), (False, biases)):
        expected: dict = {}
        for row in parameter_table(config):
            if row.trainable == trainable:
                path, index = flax_path(config, row.name)
                layers = expected.get(path, (0,))[0] + 1
                expected[path] = row.shape if index is None else (layers, *row.shape)
        found = {tuple(key.key for key in path): leaf.shape for path, leaf in jax.tree.leaves_with_path(tree)}
        assert found == expected
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == closed_form_count(config)


def test_decay_is_for_matrices_and_the_balance_bias_is_not_trained():
    rows = parameter_table(VARIANTS["query latent"])
    assert {row.name.rsplit(".", 1)[1] for row in rows if not row.trainable} == {"balance_bias"}
    for row in rows:
        assert row.decay == (len(row.shape) > 1), row.name
        assert row.decay == (row.init == "normal"), row.name
        assert len(row.shape) == len(row.axes), row.name


def test_names_and_flax_places_are_unique():
    for config in VARIANTS.values():
        names = [row.name for row in parameter_table(config)]
        assert max(Counter(names).values()) == 1
        assert max(Counter(flax_path(config, name) for name in names).values()) == 1


def test_flax_path_counts_dense_layers_apart():
    config = replace(TINY, first_k_dense=1)
    assert flax_path(config, "layers.0.mlp.up_proj.weight") == (("dense_layers", "mlp", "up_proj", "weight"), 0)
    assert flax_path(config, "layers.3.mlp.router.weight") == (("layers", "mlp", "router", "weight"), 2)
    assert flax_path(config, "embed_tokens.weight") == (("embed_tokens", "weight"), None)


def test_seeded_values_depend_on_name_and_seed_alone():
    rows = parameter_table(TINY)
    drawn = dict((row.name, value) for row, value in initial_values(TINY, seed=4))
    assert list(drawn) == [row.name for row in rows]
    for row in rows[::-7]:
        np.testing.assert_array_equal(initial_value(row, TINY, 4), drawn[row.name])
    matrix = "layers.0.attention.o_proj.weight"
    row = next(row for row in rows if row.name == matrix)
    assert (initial_value(row, TINY, 5) != drawn[matrix]).mean() > 0.99
    assert (drawn["layers.1.attention.o_proj.weight"] != drawn[matrix]).mean() > 0.99
    # Pinned: the weights of a seed must stay what they were when a run was recorded.
    assert drawn["embed_tokens.weight"].dtype == np.float32
    assert [float(x).hex()[:10] for x in drawn["embed_tokens.weight"][0, :3]] == [
        "-0x1.65c80",
        "0x1.220ecc",
        "0x1.c966b4",
    ]


def test_initial_distribution():
    """Every matrix alike, whatever it is for: one standard deviation, and no part of it a copy of another."""
    for row, value in initial_values(TINY, seed=0):
        if row.init == "normal":
            std, error = TINY.hidden_size**-0.5, (TINY.hidden_size * row.size) ** -0.5
            assert abs(value.mean()) < 5 * error and abs(value.std() - std) < 5 * error, row.name
            assert np.unique(value).size > 0.95 * row.size, row.name
        else:
            assert (value == ("norm" in row.name)).all(), row.name


def test_rope_table_against_the_textbook_and_its_rounding():
    config = PRESETS["smol-774m"]
    cos, sin = rope_table(config)
    assert cos.shape == sin.shape == (2048, 20) and cos.dtype == np.float64
    positions, size = np.arange(2048)[:, None], config.qk_rope_head_dim
    angle = positions * 10000.0 ** (-np.arange(0, size, 2) / size)
    # Angles are float32: at position 2047 they are known to about 1e-4.
    np.testing.assert_allclose(cos, np.cos(angle), atol=3e-4)
    np.testing.assert_allclose(sin, np.sin(angle), atol=3e-4)
    np.testing.assert_allclose(cos**2 + sin**2, 1, atol=1e-15)
    np.testing.assert_array_equal(rope_table(config, 5)[0], cos[:5])


def test_rope_angles_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

    config = PRESETS["smol-774m"]
    theirs = transformers.DeepseekV3Config(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        qk_rope_head_dim=config.qk_rope_head_dim,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
    )
    rotary = DeepseekV3RotaryEmbedding(theirs)
    their_cos, their_sin = rotary(torch.zeros(1, 2048, 1), torch.arange(2048)[None])
    for ours, other in zip(rope_table(config), (their_cos, their_sin), strict=True):
        # The same float32 angle; what is left is float32 rounding of the cosine.
        np.testing.assert_allclose(ours, other[0, :, : config.qk_rope_head_dim // 2].numpy(), atol=1.2e-7)


IMPOSSIBLE = {
    "vocab_size": 0,
    "hidden_size": -1,
    "num_layers": 0,
    "num_kv_heads": 4,
    "kv_lora_rank": 0,
    "q_lora_rank": 0,
    "qk_rope_head_dim": 7,
    "num_experts_per_tok": 9,
    "n_shared_experts": -1,
    "first_k_dense": 31,
    "routed_scaling_factor": 0.0,
    "rms_norm_eps": 0.0,
    "rope_theta": -1.0,
    "max_position": 0,
    "balance_loss_coef": -1e-4,
    "balance_bias_rate": -1.0,
}


@pytest.mark.parametrize("field", IMPOSSIBLE)
def test_impossible_size_is_refused_by_name(field):
    with pytest.raises(SpecificationError, match=f"^{field} = "):
        replace(ModelConfig(), **{field: IMPOSSIBLE[field]})


def test_config_crosses_a_dict_and_refuses_other_fields():
    config = VARIANTS["query latent"]
    assert ModelConfig.from_dict(config.to_dict()) == config
    with pytest.raises(SpecificationError, match="head_count: unknown"):
        ModelConfig.from_dict({**config.to_dict(), "head_count": 3})
    with pytest.raises(SpecificationError, match="rope_theta: missing"):
        ModelConfig.from_dict({key: value for key, value in config.to_dict().items() if key != "rope_theta"})


def test_specification_imports_neither_framework():
    rooms = ("torch_ref/spec", "train/data", "train/run", "train/state")
    files = [file for room in rooms for file in (REPOSITORY / room).glob("*.py") if file.stem != "__init__"]
    modules = [".".join(file.relative_to(REPOSITORY).with_suffix("").parts) for file in files]
    assert "torch_ref.spec.config" in modules and "train.run.loop" in modules
    code = (
        f"import importlib, sys\nfor name in {modules}:\n    importlib.import_module(name)\n"
        "print(sorted({'torch', 'jax', 'flax', 'optax', 'orbax'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "package, forbidden", [("torch_ref", {"jax", "flax", "optax", "orbax"}), ("flax_model", {"torch"})]
)
def test_each_framework_leaves_the_other_alone(package, forbidden):
    for file in (REPOSITORY / package).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & forbidden, f"{file.name}:{node.lineno}"


TWINS = ["layers", "rotary", "attention", "grouped_experts", "moe", "block", "loss", "model", "sampling", "generate"]
TWINS += ["backend", "device", "checkpoint"]

OTHER_ARGUMENTS = {
    "make_rope": "torch places tensors when it makes them",
    "Model.__init__": "the same",
    "run_layers": "Flax runs the stacked layers of a kind, which it looks up in the mesh by name",
    "trace": "torch has to be told which device's events to record",
    "resolve_compute": "Flax's kernels take some sizes and not others",
    "Backend.__init__": "Flax compiles ahead, also for devices that are not there",
    "Checkpoints.__init__": "of several Flax processes each writes its own part",
    "attend_latents": "torch writes into the layer's part of the cache; Flax returns the cache of all layers",
    "feed_forward": "Flax reads the chosen experts out of the stack",
    "chosen_experts": "the same",
    "cross_entropy": "torch compiles its gradient, if asked to; Flax has compiled it in any case",
    "cast_weights": "torch changes the model; Flax takes a tree and returns one",
}
"""Public functions that take other arguments in the two frameworks, and why."""


def defined(file: Path) -> dict[str, list[str]]:
    """Arguments of the public functions and methods of a file, in their order; of classes none."""
    found: dict[str, list[str]] = {}

    def read(body: list, prefix: str) -> None:
        for node in body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef):
                continue
            name = {"__call__": "forward"}.get(node.name, node.name).removeprefix("Torch").removeprefix("Flax")
            if name.startswith("_") and name != "__init__":
                continue
            found[prefix + name] = [each.arg for each in node.args.args] if isinstance(node, ast.FunctionDef) else []
            read(node.body if isinstance(node, ast.ClassDef) else [], f"{prefix}{name}.")

    read(ast.parse(file.read_text()).body, "")
    return found


@pytest.mark.parametrize("name", TWINS)
def test_twin_files_define_the_same_names_with_the_same_arguments_in_the_same_order(name):
    """What either file has more is its framework's own affair; what both have comes in one order."""
    torch, flax = (defined(REPOSITORY / package / f"{name}.py") for package in ("torch_ref", "flax_model"))
    common = [each for each in torch if each in flax]
    assert common == [each for each in flax if each in torch]
    assert len(common) >= 2, (torch, flax)
    others = [each for each in common if torch[each] != flax[each] and each not in OTHER_ARGUMENTS]
    assert not others


def test_other_arguments_are_still_other_ones():
    torch, flax = (
        {name: arguments for twin in TWINS for name, arguments in defined(REPOSITORY / package / f"{twin}.py").items()}
        for package in ("torch_ref", "flax_model")
    )
    assert not [name for name in OTHER_ARGUMENTS if torch.get(name) == flax.get(name)]
