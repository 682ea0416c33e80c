"""Experts by each path against all experts on all tokens, values and gradients, on routings made to break them; and how
the router chooses."""

from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import pytest

from parity_tests.harness.measure import relative_error
from parity_tests.support.backends import CONFIG, FRAMEWORKS
from parity_tests.support.gradients import flax_gradients, floats, gradients, integers, module

HIDDEN, FFN = 12, 20


# Which experts each token takes: [tokens, topk] of some number of experts.
def spread(tokens, experts, topk=2):
    return np.argsort(np.random.default_rng(7).random((tokens, experts)), axis=1)[:, :topk]


ROUTINGS = {
    "random": (4, spread(150, 4)),
    "one token": (4, spread(1, 4)),
    "all tokens to the same two experts, the others idle": (4, np.tile([[3, 1]], (130, 1))),
    "whole blocks": (2, np.tile([[0, 1]], (64, 1))),
    "one token more than a block": (2, np.tile([[1, 0]], (65, 1))),
    "one expert per token": (3, spread(70, 3, topk=1)),
    "every expert for every token": (3, spread(67, 3, topk=3)),
}


@cache
def expert_gradients(framework, routing, path, remat):
    """Output, and gradients of x, routing weights, gate, up and down."""
    experts, chosen = ROUTINGS[routing]
    generator = np.random.default_rng(0)
    tokens = len(chosen)
    shapes = ((tokens, HIDDEN), chosen.shape, (experts, FFN, HIDDEN), (experts, FFN, HIDDEN), (experts, HIDDEN, FFN))
    operands = [generator.standard_normal(shape) for shape in shapes]
    upstream = generator.standard_normal((tokens, HIDDEN))
    moe = module(framework, "moe")

    def function(x, weights, gate, up, down):
        # Scores play no part in the experts: any array of their shape will do.
        routing = moe.Routing(integers(framework, chosen), weights, x[:, :1] * 0 + gate[:, 0, 0])
        return moe.EXPERT_PATHS[path](x, routing, gate, up, down, remat)

    return gradients(framework)(function, operands, upstream)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    "path, remat",
    [("grouped", False), ("grouped", True), ("blocks", False), ("blocks", True), ("pallas", False), ("pallas", True)],
)
def test_expert_paths_against_all_experts_on_all_tokens(framework, routing, path, remat):
    if path == "pallas" and framework == "torch":
        pytest.skip("Flax only")
    if framework == "flax" and remat and routing != "random":
        pytest.skip("a compilation each; what differs with remat is the same for every routing")
    got, expected = (
        expert_gradients(framework, routing, path, remat),
        expert_gradients(framework, routing, "dense", False),
    )
    for what, a, b in zip(("output", "x", "weights", "gate", "up", "down"), got, expected, strict=True):
        assert relative_error(a, b) <= 1e-13, what
    experts, chosen = ROUTINGS[routing]
    idle = sorted(set(range(experts)) - set(chosen.ravel().tolist()))
    assert all((gradient[idle] == 0).all() for gradient in got[3:])


@pytest.mark.parametrize("remat", [False, True])
def test_the_backward_pass_of_blocks_keeps_no_copies_of_weights(remat):
    """Beside its arguments, the gate and up products (not with `remat`) and each choice's output, weighed and summed in
    float32."""
    torch = pytest.importorskip("torch")
    from torch_ref import moe

    tokens, topk, experts, hidden, ffn = 8, 2, 4, 48, 400
    shapes = ((tokens, hidden), (tokens, topk), (experts, ffn, hidden), (experts, ffn, hidden), (experts, hidden, ffn))
    x, weights, *others = (torch.ones(shape, requires_grad=True) for shape in shapes)
    routing = moe.Routing(torch.from_numpy(spread(tokens, experts)), weights, None)
    held = {}

    def hold(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        moe.experts_blocks(x, routing, *others, remat)
    arguments = {tensor.data_ptr() for tensor in (x, weights, *others)}
    kept = sum(tensor.untyped_storage().nbytes() for at, tensor in held.items() if at not in arguments)
    rows = moe.BLOCK * min(-(-tokens * topk // moe.BLOCK) + experts, experts * -(-tokens // moe.BLOCK))
    products = 0 if remat else 4 * rows * 2 * ffn
    assert products <= kept < products + 4 * (rows + 2 * tokens * topk) * hidden


def kernel_gradients(dtype, path, hidden=32, ffn=48):
    """Output and gradients for inputs of a dtype; loads differ, one expert is idle, one has more than a block."""
    import jax.numpy as jnp

    from flax_model import moe

    generator = np.random.default_rng(0)
    chosen = np.sort(np.argsort(generator.random((200, 5)), axis=1)[:, :2] * [1, 0] + [0, 3], axis=1)
    chosen[chosen[:, 0] == 3, 0] = 0  # expert 3 has every token, 4 some, the third none
    chosen[chosen == 2] = 1
    shapes = ((200, hidden), chosen.shape, (5, ffn, hidden), (5, ffn, hidden), (5, hidden, ffn))
    x, *others = (jnp.asarray(generator.standard_normal(shape) / shape[-1] ** 0.5, "float32") for shape in shapes)
    upstream = generator.standard_normal((200, hidden)).astype("float32")

    def function(x, weights, gate, up, down):
        routing = moe.Routing(jnp.asarray(chosen), weights, x[:, :1] * 0 + gate[:, 0, 0])
        return moe.EXPERT_PATHS[path](x, routing, gate, up, down, False)

    return [np.asarray(each, np.float64) for each in flax_gradients(function, [x.astype(dtype), *others], upstream)]


KERNEL_BOUNDS = {"float32": 2e-6, "bfloat16": 2e-2}


@pytest.mark.parametrize("dtype", KERNEL_BOUNDS)
def test_kernels_in_the_dtypes_of_gpus(dtype):
    pytest.importorskip("flax")
    for got, expected in zip(kernel_gradients(dtype, "pallas"), kernel_gradients(dtype, "dense"), strict=True):
        assert relative_error(got, expected) <= KERNEL_BOUNDS[dtype]


@pytest.mark.parametrize("size", [16, 48, 64, 80, 128, 144, 192, 256, 448, 512, 576, 640, 1536, 2048])
@pytest.mark.parametrize("limit", [64, 128, 192, 256])
def test_programs_share_all_columns(size, limit):
    pytest.importorskip("flax")
    from flax_model.grouped_kernels import _parts

    parts = _parts(size, limit)
    assert parts.width & (parts.width - 1) == 0 and parts.columns <= max(limit, 16) and size % parts.columns == 0
    assert parts.columns >= min(size & -size, limit // 2)


@pytest.mark.parametrize("shared_memory, enough", [(227 * 1024, True), (None, True), (99 * 1024, False)])
def test_kernels_fit_cards_with_little_shared_memory(monkeypatch, shared_memory, enough):
    """Of `smol-774m`: a stage is the tiles of a step of the sum, all stages but one lie in shared memory at a time."""
    pytest.importorskip("flax")
    from flax_model import grouped_kernels

    said = {} if shared_memory is None else {"shared_memory_per_block_optin": shared_memory}
    tile, rows, parts = grouped_kernels.TILES["down"], grouped_kernels.ROW_BLOCK, grouped_kernels._parts(576, 192)
    with monkeypatch.context() as patch:
        patch.setattr(grouped_kernels.jax, "config", SimpleNamespace(jax_default_device=SimpleNamespace(**said)))
        stages = grouped_kernels._stages(tile)
    assert (stages == tile.stages) == enough
    assert (stages - 1) * 2 * tile.depth * (rows + parts.columns) <= (shared_memory or 227 * 1024)


@pytest.mark.parametrize("hidden, ffn", [(144, 64), (64, 144)])
def test_kernels_of_several_programs_with_several_parts_each(monkeypatch, hidden, ffn):
    """As 576 columns are three times three parts of 64: here 144 are three times three of 16."""
    pytest.importorskip("flax")
    from flax_model import grouped_kernels

    assert grouped_kernels._parts(576, 192) == (64, 3) and grouped_kernels._parts(144, 48) == (16, 3)
    narrow = {name: tile._replace(columns=48, depth=32) for name, tile in grouped_kernels.TILES.items()}
    monkeypatch.setattr(grouped_kernels, "TILES", narrow)
    results = (kernel_gradients("float32", path, hidden, ffn) for path in ("pallas", "dense"))
    for got, expected in zip(*results, strict=True):
        assert relative_error(got, expected) <= KERNEL_BOUNDS["float32"]


KERNEL_FAULTS = {
    "each block has the next expert's weight": ("cut_blocks", lambda b: b._replace(expert=(b.expert + 1) % 5)),
    "a weight's gradient lacks an expert's first block": (
        "cut_blocks",
        lambda b: b._replace(first_block=b.first_block.at[3].add(1)),
    ),
    "a token gets another's row": ("cut_blocks", lambda b: b._replace(slot=b.slot[::-1])),
    "rows that fill up a block are not zero": ("_rows", lambda rows: rows + (rows == 0)),
    "a gradient is half of itself": ("_d_weight", lambda gradient: gradient / 2),
}


@pytest.mark.parametrize("fault", KERNEL_FAULTS)
def test_faults_in_kernels_are_seen(fault, monkeypatch):
    pytest.importorskip("flax")
    from flax_model import grouped_kernels

    name, change = KERNEL_FAULTS[fault]
    right = getattr(grouped_kernels, name)
    monkeypatch.setattr(grouped_kernels, name, lambda *arguments: change(right(*arguments)))
    pairs = zip(kernel_gradients("bfloat16", "pallas"), kernel_gradients("bfloat16", "dense"), strict=True)
    assert max(relative_error(got, expected) for got, expected in pairs) > 2 * KERNEL_BOUNDS["bfloat16"]


def test_experts_of_several_devices_drop_nothing(monkeypatch):
    """Four devices, by the axis of a `vmap`, with two experts each: every token takes both of one, and another."""
    jax = pytest.importorskip("jax")
    pytest.importorskip("flax")
    import jax.numpy as jnp

    from flax_model import expert_parallel, moe

    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *operands, default, cuda: default(*operands))
    devices, tokens, experts = 4, 6, 8
    generator = np.random.default_rng(0)
    picked = np.array([[2, 3, 5 + token % 2] for token in range(devices * tokens)])
    shapes = ((devices * tokens, HIDDEN), picked.shape, (experts, FFN, HIDDEN), (experts, FFN, HIDDEN))
    x, weights, gate, up = (generator.standard_normal(shape).astype(np.float32) for shape in shapes)
    operands = x, weights, gate, up, up.swapaxes(1, 2).copy()

    def everywhere(x, weights, *experts):
        return moe.experts_dense(x, moe.Routing(jnp.asarray(picked), weights, None), *experts, False).sum()

    def one_device(chosen, x, weights, *local):
        routing, run = moe.Routing(chosen, weights, None), partial(moe.experts_dense, remat=False)
        return expert_parallel.experts_exchanged(run, x, routing, *local).sum()

    def all_devices(chosen, *operands):
        parts = [operand.reshape(devices, -1, *operand.shape[1:]) for operand in (chosen, *operands)]
        gradients = jax.vmap(jax.grad(one_device, range(1, 6)), axis_name="expert")(*parts)
        return [part.reshape(operand.shape) for part, operand in zip(gradients, operands, strict=True)]

    got, expected = jax.jit(all_devices)(picked, *operands), jax.jit(jax.grad(everywhere, range(5)))(*operands)
    for what, a, b in zip(("x", "weights", "gate", "up", "down"), got, expected, strict=True):
        assert relative_error(np.asarray(a), np.asarray(b)) <= 1e-5, what


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_ties_go_to_the_lowest_index(framework):
    scores = np.array([[0.5, 0.5, 0.5, 0.5], [0.1, 0.7, 0.7, 0.7], [0.2, 0.1, 0.2, 0.3]], np.float32)
    if framework == "torch":
        import torch

        scores = torch.from_numpy(scores)
    else:
        import jax.numpy as jnp

        scores = jnp.asarray(scores)
    assert np.asarray(module(framework, "moe").top_k(scores, 2)).tolist() == [[0, 1], [1, 2], [3, 0]]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_balance_bias_steers_the_choice_and_never_the_weights(framework):
    moe = module(framework, "moe")
    generator = np.random.default_rng(4)
    x, router = (generator.standard_normal(shape).astype(np.float32) for shape in ((30, HIDDEN), (4, HIDDEN)))

    def route(bias):
        operands = [x, router, np.array(bias, np.float32)]
        if framework == "torch":
            import torch

            routing = moe.route(*map(torch.from_numpy, operands), CONFIG)
        else:
            import jax.numpy as jnp

            routing = moe.route(*map(jnp.asarray, operands), CONFIG)
        return [np.asarray(part) for part in routing]

    chosen, weights, scores = route([0, 0, 0, 0])
    same_chosen, same_weights, _ = route([5, 5, 5, 5])
    np.testing.assert_array_equal(same_chosen, chosen)
    np.testing.assert_array_equal(same_weights, weights)
    biased_chosen, biased_weights, biased_scores = route([0, 0, 9, 0])
    np.testing.assert_array_equal(biased_scores, scores)
    assert (biased_chosen[:, 0] == 2).all() and (chosen != 2).all(1).any()
    taken = np.take_along_axis(scores, biased_chosen, axis=1)
    np.testing.assert_allclose(biased_weights, taken / taken.sum(1, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_router_computes_in_float32_and_survives_scores_of_nothing(framework):
    """Whatever the dtype of its input: a choice hangs on it. Where all scores underflow, no weight is 0 / 0."""
    moe = module(framework, "moe")
    generator = np.random.default_rng(4)
    x, router = (generator.standard_normal(shape).astype(np.float32) for shape in ((30, HIDDEN), (4, HIDDEN)))
    x, router, bias = (floats(framework, array) for array in (x, router, np.zeros(4, np.float32)))

    def routes(x):
        half = x.bfloat16() if framework == "torch" else x.astype("bfloat16")
        widened = half.float() if framework == "torch" else half.astype("float32")
        given = (half, router), (widened, router), (abs(x), 0 * router - 1000)
        return [moe.route(*each, bias, CONFIG) for each in given]

    if framework == "flax":
        import jax

        routes = jax.jit(routes)
    *halves, nothing = routes(x)
    for got, expected in zip(*halves, strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(expected), strict=True)
    assert not np.asarray(nothing.scores).any() and not np.asarray(nothing.weights).any()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_sequence_balance_loss_is_that_of_the_paper(framework):
    """Equations 17 to 20 of DeepSeek-V3, written out for each sequence by itself, and the derivative: f counts choices
    and has none, so that of f . P by a score is (f - f . s') / (length * sum of the token's scores)."""
    batch, length, experts, topk = 3, 5, 4, 2
    scores = np.random.default_rng(6).uniform(0.05, 0.95, (batch, length, experts))
    upstream = np.array([1.0, -2.0, 0.5])
    losses, slopes = np.zeros(batch), np.zeros_like(scores)
    for sequence, tokens in enumerate(scores):
        taken = [set(sorted(range(experts), key=lambda expert: -token[expert])[:topk]) for token in tokens]
        f = np.array([experts / (topk * length) * sum(i in chosen for chosen in taken) for i in range(experts)])
        normalised = [token / sum(token) for token in tokens]
        losses[sequence] = sum(f[i] * sum(token[i] for token in normalised) / length for i in range(experts))
        for place, token in enumerate(normalised):
            slopes[sequence, place] = (f - (f * token).sum()) / (length * sum(tokens[place])) * upstream[sequence]
    moe = module(framework, "moe")
    out, gradient = gradients(framework)(lambda x: moe.sequence_balance_loss(x, topk), [scores], upstream)
    np.testing.assert_allclose(out, losses, rtol=1e-13)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-10, atol=1e-15)
