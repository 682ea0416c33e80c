"""Generation: cached and uncached, torch, Flax and `transformers`, alone and in a batch say the same."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from parity_tests.harness.cases import CONFIG, case_values
from torch_ref.spec.config import ComputeConfig, ModelConfig
from torch_ref.spec.decoding import bucket, draw_uniforms, pad_prompts
from torch_ref.spec.interface import Sampling, UserError

REPOSITORY = Path(__file__).parents[2]
BOUNDS = {"float64": 1e-12, "float32": 1e-5}
MODELS = {"latent queries": CONFIG, "plain queries": replace(CONFIG, q_lora_rank=None)}
ALL_DENSE = replace(CONFIG, first_k_dense=CONFIG.num_layers)
"""Without experts, of which rounding would choose others."""
LENGTHS = (19, 1, 33)
NEW = 12
GREEDY = Sampling(max_new_tokens=24, greedy=True, stop_token=None)


def prompts_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, CONFIG.vocab_size, length).tolist() for length in lengths]


@dataclass
class Runner:
    """One framework's functions, on NumPy arrays."""

    full: Callable
    """Logits of whole sequences, without a cache."""
    cached: Callable
    """Logits after the prompts, then after each given token, from the cache: [batch, 1 + new, vocab]."""
    generate: Callable


@pytest.fixture(scope="module", params=["torch", "flax"])
def framework(request):
    pytest.importorskip({"torch": "torch", "flax": "jax"}[request.param])
    return request.param


def make_runner(framework: str, dtype: str, config: ModelConfig = CONFIG) -> Runner:
    return {"torch": torch_runner, "flax": flax_runner}[framework](dtype, config=config)


def torch_runner(dtype: str, values: Callable = case_values, config: ModelConfig = CONFIG) -> Runner:
    import torch

    from torch_ref import generate
    from torch_ref.model import Model
    from torch_ref.rotary import make_rope

    compute = ComputeConfig(dtype=dtype, attention="sdpa", moe="grouped")
    model = Model(config, dtype=getattr(torch, compute.param_dtype)).load_values(values(config))

    @torch.no_grad()
    def full(tokens):
        return model.logits(model(torch.from_numpy(tokens), compute).hidden).numpy()

    @torch.no_grad()
    def cached(tokens, lengths, new):
        tokens, lengths, new = map(torch.from_numpy, (tokens, lengths, new))
        prompt = tokens.shape[1]
        table = make_rope(config, prompt + new.shape[1], getattr(torch, dtype), tokens.device)
        logits, cache = generate.prefill(model, tokens, lengths, prompt + new.shape[1], compute)
        absorbed = generate.absorb_layers(model, getattr(torch, dtype))
        steps = [logits]
        for step in range(new.shape[1]):
            steps.append(generate.decode(model, absorbed, new[:, step], cache, prompt, lengths, step, table, compute))
        assert {each.dtype for each in steps} == {steps[0].dtype}
        return torch.stack(steps, 1).numpy()

    def run(prompts, sampling, seed=0, on_token=None):
        return generate.generate(model, prompts, sampling, seed, compute, on_token)

    return Runner(full, cached, run)


def flax_runner(dtype: str, values: Callable = case_values, config: ModelConfig = CONFIG) -> Runner:
    import jax

    from flax_model import generate
    from flax_model.cpu import bits
    from flax_model.rotary import make_rope
    from flax_model.trees import merge
    from flax_model.values import from_values

    compute = ComputeConfig(dtype=dtype, attention="blocked", moe="grouped")
    with jax.enable_x64(dtype == "float64"):
        graphdef, params, biases = from_values(config, values(config), np.dtype(compute.param_dtype))

    def model_of(params):
        return merge(graphdef, params, biases)

    def within(function):
        def run(*arguments, **settings):
            with jax.enable_x64(dtype == "float64"):
                return function(*arguments, **settings)

        return run

    @jax.jit
    def all_logits(params, tokens):
        model = model_of(params)
        return model.logits(model(tokens, compute).hidden)

    @jax.jit
    def first(params, tokens, lengths):
        logits, cache = generate.prefill(model_of(params), tokens, lengths, tokens.shape[1] + NEW, compute)
        return logits, bits(cache)

    @jax.jit
    def following(params, token, cache, lengths, step):
        model = model_of(params)
        absorbed = jax.tree.map(bits, generate.absorb_layers(model, dtype))
        table = make_rope(config, config.max_position, compute.dtype)
        prompt = cache.shape[3] - NEW
        return generate.decode(model, absorbed, token, cache, prompt, lengths, step, table, compute)

    def cached(tokens, lengths, new):
        logits, cache = first(params, tokens, lengths)
        steps = [logits]
        for step in range(NEW):
            logits, cache = following(params, new[:, step], cache, lengths, np.int32(step))
            steps.append(logits)
        assert {each.dtype for each in steps} == {steps[0].dtype}
        return np.stack(steps, 1)

    def run(prompts, sampling, seed=0, on_token=None):
        return generate.generate(model_of(params), prompts, sampling, seed, compute, on_token)

    return Runner(lambda tokens: np.asarray(within(all_logits)(params, tokens)), within(cached), within(run))


@pytest.fixture(scope="module")
def runner(framework):
    """In float32."""
    return make_runner(framework, "float32")


@pytest.fixture(scope="module")
def logits():
    """By framework, dtype and model, the cached and the uncached logits of every new token, in rows of different
    lengths."""

    @cache
    def get(framework: str, dtype: str, model: str) -> tuple[np.ndarray, np.ndarray]:
        run = make_runner(framework, dtype, (MODELS | {"all dense": ALL_DENSE})[model])
        prompts, new = prompts_of(*LENGTHS), np.array(prompts_of(*[NEW] * len(LENGTHS), seed=1), np.int32)
        width = max(LENGTHS)
        cached = run.cached(pad_prompts(prompts, width + 3), np.array(LENGTHS, np.int32), new)
        rows = [prompt + tokens.tolist() for prompt, tokens in zip(prompts, new, strict=True)]
        full = run.full(pad_prompts(rows, width + NEW))
        uncached = [row[length - 1 : length + NEW] for row, length in zip(full, LENGTHS, strict=True)]
        return cached, np.stack(uncached)

    return get


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    assert got.shape == expected.shape
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", BOUNDS)
def test_cached_logits_are_the_uncached_ones(framework, dtype, model, logits):
    cached, uncached = logits(framework, dtype, model)
    assert cached.dtype == dtype
    for position in range(1 + NEW):
        assert relative(cached[:, position], uncached[:, position]) <= BOUNDS[dtype], f"new token {position}"


def test_cached_logits_in_bfloat16_are_the_uncached_ones(framework, logits):
    """As far as 8 bits of a value go, in other products: decoding absorbs weights that the whole sequence does not."""
    cached, uncached = logits(framework, "bfloat16", "all dense")
    assert cached.dtype == uncached.dtype == np.float32
    for position in range(1 + NEW):
        assert relative(cached[:, position], uncached[:, position]) <= 5e-2, f"new token {position}"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", BOUNDS)
def test_cached_logits_of_both_frameworks(dtype, model, logits):
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    assert relative(logits("flax", dtype, model)[0], logits("torch", dtype, model)[0]) <= BOUNDS[dtype]


def test_a_prompt_in_a_batch_is_continued_as_alone(runner):
    prompts = prompts_of(*LENGTHS)
    together = runner.generate(prompts, GREEDY)
    assert together == [runner.generate([prompt], GREEDY)[0] for prompt in prompts]
    assert len({tuple(text) for text in together}) == 3


def test_a_prompt_in_a_large_batch_is_continued_as_alone(runner):
    """More choices of experts than are taken one by one."""
    prompts = prompts_of(*range(3, 23))
    assert len(prompts) * CONFIG.num_experts_per_tok > 2 * CONFIG.n_routed_experts
    together = runner.generate(prompts, GREEDY)
    for row in (0, 7, 19):
        assert runner.generate([prompts[row]], GREEDY)[0] == together[row]


def test_greedy_tokens_are_the_most_likely_ones(runner):
    (prompt,) = prompts_of(7)
    (new,) = runner.generate([prompt], GREEDY)
    logits = runner.full(np.array([prompt + new], np.int32))[0, len(prompt) - 1 : -1]
    assert logits.argmax(-1).tolist() == new


def test_text_ends_before_the_stop_token(runner):
    """Each row at its own; the rows that go on are not disturbed."""
    prompts = prompts_of(*LENGTHS)
    whole = runner.generate(prompts, GREEDY)
    stop = whole[0][5]
    expected = [text[: text.index(stop)] if stop in text else text for text in whole]
    assert len(expected[0]) <= 5 < max(map(len, expected))
    assert runner.generate(prompts, replace(GREEDY, stop_token=stop)) == expected


def test_streamed_tokens_are_those_returned(runner):
    prompts, steps = prompts_of(*LENGTHS), []
    stop = runner.generate(prompts, GREEDY)[0][5]
    texts = runner.generate(prompts, replace(GREEDY, stop_token=stop), on_token=steps.append)
    assert texts == [[tokens[row] for tokens in steps if tokens[row] is not None] for row in range(3)]
    assert texts == runner.generate(prompts, replace(GREEDY, stop_token=stop))


def test_a_seed_gives_a_text(runner):
    prompts, drawn = prompts_of(5, 5), Sampling(max_new_tokens=20, stop_token=None)
    first = runner.generate(prompts, drawn, 3)
    assert first == runner.generate(prompts, drawn, 3)
    assert first != runner.generate(prompts, drawn, 4)
    twins = runner.generate([prompts[0], prompts[0]], drawn, 3)
    assert twins[0] == first[0] and twins[0] != twins[1]


def test_a_negative_seed_is_refused():
    with pytest.raises(UserError, match="--seed -1: must not be negative"):
        draw_uniforms(-1, batch=1, count=4)


def test_a_seed_gives_the_same_text_in_both_frameworks():
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    sampling = Sampling(
        max_new_tokens=64, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.2, temperature=0.9, stop_token=None
    )
    texts = [make_runner(name, "float64").generate(prompts_of(*LENGTHS), sampling, 5) for name in ("torch", "flax")]
    assert texts[0] == texts[1]


def untied_values(config):
    """Values under which no two experts have equal scores: `transformers` does not say which it then takes."""
    for row, value in case_values(config):
        if ".router." in row.name:
            value[1:3] += config.init_std * np.random.default_rng(len(row.name)).standard_normal((2, *row.shape[1:]))
        yield row, value


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_tokens_of_torch_flax_and_transformers(penalty, transformers_model):
    """256 tokens in float32. Left to itself the small model falls into a loop; the repetition penalty keeps it out."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("jax")
    (prompt,) = prompts_of(9)
    sampling = Sampling(max_new_tokens=256, greedy=True, repetition_penalty=penalty, stop_token=None)
    (ours,) = torch_runner("float32", untied_values).generate([prompt], sampling)
    assert flax_runner("float32", untied_values).generate([prompt], sampling) == [ours]
    theirs = transformers_model.generate(
        torch.tensor([prompt]),
        max_new_tokens=256,
        do_sample=False,
        repetition_penalty=penalty,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert theirs[0, len(prompt) :].tolist() == ours
    assert penalty == 1 or len(set(ours)) > 60


def test_the_penalty_knows_the_last_token_of_a_prompt(runner):
    """One far below 1 makes a token that has a positive score the next one, if it counts as seen."""
    logits = runner.full(np.arange(CONFIG.vocab_size)[:, None])[:, -1]
    positive = [number for number, row in enumerate(logits) if row[number] > 0 and row.argmax() != number][:3]
    sampling = Sampling(max_new_tokens=1, greedy=True, repetition_penalty=1e-6, stop_token=None)
    assert positive and runner.generate([[number] for number in positive], sampling) == [[n] for n in positive]


@pytest.fixture(scope="module")
def transformers_model(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    from torch_ref.spec.huggingface import export_folder

    folder = tmp_path_factory.mktemp("exported") / "model"
    export_folder(folder, CONFIG, untied_values(CONFIG))
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize(
    ("prompts", "sampling", "message"),
    [
        ([[1] * 600], Sampling(max_new_tokens=41), "--max-new-tokens 41: .*600 tokens.*context of 640; at most 40 fit"),
        ([[1] * 700], Sampling(max_new_tokens=1), "at most 0 fit"),
        ([[1], []], Sampling(), "--prompt"),
        ([], Sampling(), "--prompt"),
        ([[160]], Sampling(), "vocabulary of 160"),
        ([[1]], Sampling(max_new_tokens=0), "--max-new-tokens 0: must be at least 1"),
        ([[1]], Sampling(temperature=0.0), "--temperature 0.0: .*--greedy"),
        ([[1]], Sampling(temperature=1e-39), "--temperature 1e-39: must be at least 1e-06; --greedy"),
        ([[1]], Sampling(temperature=float("nan")), "--temperature nan: must be at least"),
        ([[1]], Sampling(top_k=-1), "--top-k -1"),
        ([[1]], Sampling(top_p=1.5), "--top-p 1.5"),
        ([[1]], Sampling(min_p=-0.1), "--min-p -0.1"),
        ([[1]], Sampling(repetition_penalty=0.0), "--repetition-penalty 0.0"),
    ],
)
def test_what_cannot_be_met_is_refused_before_any_work(framework, prompts, sampling, message):
    """The model here has no values: nothing can be computed with it."""
    if framework == "torch":
        from torch_ref.generate import generate
        from torch_ref.model import Model

        model = Model(CONFIG, device="meta")
    else:
        from flax import nnx

        from flax_model.generate import generate
        from flax_model.model import Model

        model = nnx.eval_shape(lambda: Model(CONFIG))
    with pytest.raises(UserError, match=message):
        generate(model, prompts, sampling, 0, ComputeConfig())


def test_the_whole_context_can_be_used(framework):
    (prompt,) = prompts_of(CONFIG.max_position - 3)
    (new,) = make_runner(framework, "float32").generate([prompt], replace(GREEDY, max_new_tokens=3))
    assert len(new) == 3


def test_flax_compiles_once_per_bucket():
    pytest.importorskip("jax")
    from flax_model import generate

    runner = flax_runner("float32")

    def compiled(*lengths: int, new: int = 24, **settings) -> tuple[int, int]:
        """Programs that a request adds."""
        before = generate._start._cache_size(), generate._run._cache_size()
        runner.generate(prompts_of(*lengths), replace(GREEDY, max_new_tokens=new), **settings)
        return generate._start._cache_size() - before[0], generate._run._cache_size() - before[1]

    generate._start.clear_cache(), generate._run.clear_cache()
    assert compiled(17) == (1, 1)
    assert compiled(18) == compiled(24) == compiled(21, seed=5) == (0, 0)
    assert compiled(20, new=20) == compiled(20, on_token=print) == (0, 0)
    assert compiled(25) == (1, 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flax_decoding_copies_no_weights(dtype):
    """One token's working memory is smaller than one matrix of an expert; XLA would like to copy weights before it
    slices them, and to widen those in bfloat16 once and for all."""
    jax = pytest.importorskip("jax")
    import jax.numpy as jnp

    from flax_model import generate
    from flax_model.cpu import as_bits
    from flax_model.values import from_values

    config = replace(CONFIG, hidden_size=128, moe_intermediate_size=1024, vocab_size=2048)
    compute = ComputeConfig(dtype=dtype, attention="blocked", moe="grouped")
    tokens, lengths = jnp.zeros((1, 16), jnp.int32), jnp.ones(1, jnp.int32)

    graphdef, params, biases = from_values(config, case_values(config))
    params = generate.cast_weights(params, compute)
    progress = generate._start(graphdef, params, biases, tokens, lengths, 16, compute)
    absorbed = generate._absorb(graphdef, params, biases, dtype)
    settings = {"limit": 16, "prompt": 16, "sampling": replace(GREEDY, max_new_tokens=16), "compute": compute}
    weights = as_bits(params)
    for ours, whole in zip(jax.tree.leaves(weights), jax.tree.leaves(params), strict=True):
        assert ours.unsafe_buffer_pointer() == whole.unsafe_buffer_pointer()
    program = generate._run.lower(
        graphdef, weights, biases, absorbed, progress, lengths=lengths, uniforms=jnp.zeros((1, 16)), **settings
    )
    matrix = config.hidden_size * config.moe_intermediate_size * jnp.dtype(dtype).itemsize
    assert program.compile().memory_analysis().temp_size_in_bytes < matrix


def test_weights_cast_to_bfloat16_change_nothing():
    """The dtype they enter products in; routers are left out, or experts would change."""
    pytest.importorskip("jax")
    torch = pytest.importorskip("torch")
    from flax_model import generate as flax
    from flax_model.trees import merge
    from flax_model.values import from_values
    from torch_ref import generate
    from torch_ref.model import Model

    prompts = prompts_of(*LENGTHS)
    compute = ComputeConfig(dtype="bfloat16", attention="sdpa", moe="grouped")
    model = Model(CONFIG).load_values(case_values(CONFIG))
    whole = generate.generate(model, prompts, GREEDY, 0, compute)
    generate.cast_weights(model, compute)
    assert model.layers[1].mlp.router.weight.dtype == torch.float32 and model.norm.weight.dtype == torch.bfloat16
    assert generate.generate(model, prompts, GREEDY, 0, compute) == whole

    compute = replace(compute, attention="blocked")
    graphdef, params, biases = from_values(CONFIG, case_values(CONFIG))
    whole = flax.generate(merge(graphdef, params, biases), prompts, GREEDY, 0, compute)
    params = flax.cast_weights(params, compute)
    assert params["layers"]["mlp"]["router"]["weight"].dtype == "float32"
    assert params["embed_tokens"]["weight"].dtype == "bfloat16"
    assert flax.generate(merge(graphdef, params, biases), prompts, GREEDY, 0, compute) == whole


def test_cache_bytes():
    """112 values a token and layer at `smol-774m`; float32 takes 4 bytes for each."""
    torch = pytest.importorskip("torch")
    from torch_ref import generate
    from torch_ref.model import Model
    from torch_ref.spec.config import PRESETS

    assert PRESETS["smol-774m"].cache_values_per_token == 112
    model = Model(CONFIG).load_values(case_values(CONFIG))
    compute = ComputeConfig(attention="sdpa", moe="grouped")
    with torch.no_grad():
        _, cache = generate.prefill(model, torch.zeros(2, 5, dtype=torch.int32), torch.tensor([5, 2]), 9, compute)
    assert cache.nbytes == CONFIG.num_layers * 2 * 9 * (CONFIG.kv_lora_rank + CONFIG.qk_rope_head_dim) * 4


def test_buckets():
    sizes = sorted({bucket(length, 2048) for length in range(1, 2049)})
    assert sizes == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
    assert all(length <= bucket(length, 600) <= 600 for length in range(1, 601))


def test_uniforms():
    numbers = draw_uniforms(3, 2, 10_000)
    assert numbers.dtype == np.float32 and numbers.min() >= 0 and numbers.max() < 1
    np.testing.assert_array_equal(draw_uniforms(3, 1, 10_000), numbers[:1])
    assert abs(np.corrcoef(numbers)[0, 1]) < 0.05 and abs(numbers.mean() - 0.5) < 0.01
    assert not np.array_equal(draw_uniforms(4, 1, 10_000), numbers[:1])


def test_decoding_in_torch_loads_no_compiler():
    """It would take a second of each start."""
    pytest.importorskip("torch")
    code = """
import sys
import torch
from parity_tests.harness.cases import CONFIG
from torch_ref.generate import generate
from torch_ref.model import Model
from torch_ref.spec.config import ComputeConfig
from torch_ref.spec.interface import Sampling
from torch_ref.spec.parameters import initial_values
model = Model(CONFIG, dtype=torch.float32).load_values(initial_values(CONFIG, 0))
compute = ComputeConfig(attention="sdpa", moe="grouped")
said = generate(model, [[1, 2]], Sampling(max_new_tokens=3, stop_token=None), 0, compute)
print(len(said[0]), "torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout == "3 False\n", done.stderr
