"""Fast paths against the plain ones of the same framework, values and gradients, on inputs made to break them."""

import importlib
from functools import cache

import numpy as np
import pytest

from parity_tests.harness.measure import relative_error
from parity_tests.support.backends import CONFIG, FRAMEWORKS

HIDDEN, FFN = 12, 20


def torch_gradients(function, operands, upstream):
    """Output of `function`, and the gradients of its operands for an upstream gradient."""
    import torch

    leaves = [torch.from_numpy(operand).requires_grad_() for operand in operands]
    out = function(*leaves)
    gradients = torch.autograd.grad(out, leaves, torch.from_numpy(upstream).to(out.dtype))
    return [tensor.detach().numpy() for tensor in (out, *gradients)]


def flax_gradients(function, operands, upstream):
    import jax

    with jax.enable_x64(operands[0].dtype == np.float64):

        def run(operands, upstream):
            out, backward = jax.vjp(function, *operands)
            return out, *backward(upstream.astype(out.dtype))

        return [np.asarray(array) for array in jax.jit(run)(tuple(operands), upstream)]


def gradients(framework):
    return {"torch": torch_gradients, "flax": flax_gradients}[framework]


def module(framework, name):
    return importlib.import_module(f"{'torch_ref' if framework == 'torch' else 'flax_model'}.{name}")


def floats(framework, array):
    if framework == "torch":
        import torch

        return torch.from_numpy(array)
    import jax.numpy as jnp

    return jnp.asarray(array)


def integers(framework, array):
    if framework == "torch":
        import torch

        return torch.from_numpy(array)
    import jax.numpy as jnp

    return jnp.asarray(array, jnp.int32)


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
    "path, remat", [("grouped", False), ("grouped", True), ("blocks", False), ("pallas", False), ("pallas", True)]
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


LENGTHS = [1, 2, 5, 63, 64, 65, 300]


def attention_operands(seq, dtype, value_size=14):
    """Three heads to one K/V head, and key and value sizes that differ."""
    generator = np.random.default_rng(seq)
    shapes = ((2, seq, 6, 20), (2, seq, 2, 20), (2, seq, 2, value_size))
    return [generator.standard_normal(shape).astype(dtype) for shape in shapes]


ATTENTION = [
    pytest.param(framework, path, marks=framework_case.marks, id=f"{framework} {path}")
    for framework_case in FRAMEWORKS
    for framework in framework_case.values
    for path in {"torch": ("sdpa", "masked"), "flax": ("blocked",)}[framework]
]


@pytest.mark.parametrize("seq, value_size", [*((seq, 14) for seq in LENGTHS), (65, 32)])
@pytest.mark.parametrize("framework, path", ATTENTION)
def test_attention_paths_against_the_plain_one(framework, path, seq, value_size, monkeypatch):
    attention = module(framework, "attention")
    if framework == "flax":
        if seq not in (1, 65, 300):
            pytest.skip("a compilation each; these lengths have a block's part, a block and more, and several")
        monkeypatch.setattr(
            module(framework, "fused_attention"), "QUERY_BLOCK", 64
        )  # several blocks, without the sizes that 256 would take
    operands = attention_operands(seq, np.float64, value_size)
    upstream = np.random.default_rng(1).standard_normal((2, seq, 6, value_size))
    got, expected = (
        gradients(framework)(
            lambda q, k, v, name=name: attention.ATTENTION_PATHS[name](q, k, v, 20**-0.5), operands, upstream
        )
        for name in (path, "plain")
    )
    for what, a, b in zip(("output", "q", "k", "v"), got, expected, strict=True):
        assert relative_error(a, b) <= 1e-13, what


CAUSAL = [*ATTENTION, *[pytest.param(*case.values, "plain", marks=case.marks) for case in FRAMEWORKS]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seq", [1, 2, 5, 63, 64])
@pytest.mark.parametrize("framework, path", CAUSAL)
def test_no_position_sees_a_later_one(framework, path, seq, dtype, monkeypatch):
    """Changing keys and values from some position on leaves every earlier output as it was, to the bit."""
    attention = module(framework, "attention")
    if framework == "flax":
        monkeypatch.setattr(module(framework, "fused_attention"), "QUERY_BLOCK", 16)

    def attend(operands):
        if framework == "torch":
            import torch

            tensors = [torch.from_numpy(operand).to(getattr(torch, dtype)) for operand in operands]
            return attention.ATTENTION_PATHS[path](*tensors, 20**-0.5).float().numpy()
        import jax
        import jax.numpy as jnp

        arrays = [jnp.asarray(operand, dtype) for operand in operands]
        attend = jax.jit(lambda q, k, v: attention.ATTENTION_PATHS[path](q, k, v, 20**-0.5))
        return np.asarray(attend(*arrays), np.float32)

    operands = attention_operands(seq, np.float32)
    before = attend(operands)
    position = seq // 2
    operands[1][:, position:] *= -3
    operands[2][:, position:] += 5
    after = attend(operands)
    np.testing.assert_array_equal(after[:, :position], before[:, :position])
    assert (after[:, position:] != before[:, position:]).any(-1).all()


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("tokens, chunk", [(100, 32), (64, 32), (7, 32), (1, 1)])
def test_chunked_loss_against_all_logits_at_once(framework, tokens, chunk):
    generator = np.random.default_rng(2)
    operands = [generator.standard_normal((tokens, HIDDEN)), generator.standard_normal((50, HIDDEN))]
    targets = integers(framework, generator.integers(-1, 50, tokens))
    loss = module(framework, "loss")
    upstream = np.float64(0.3)
    got = gradients(framework)(lambda h, e: loss.cross_entropy(h, e, targets, chunk), operands, np.array(upstream))
    expected = gradients(framework)(lambda h, e: loss.cross_entropy_plain(h, e, targets), operands, np.array(upstream))
    for what, a, b in zip(("loss", "hidden", "embedding"), got, expected, strict=True):
        assert relative_error(a, b) <= 1e-13, what


@pytest.mark.parametrize("half_products", [True, False])
def test_chunked_loss_in_bfloat16_against_the_plain_one_in_float32(monkeypatch, half_products):
    """The embedding's gradient is a sum over chunks in its own float32, whether products take bfloat16, as on CUDA, or
    widened operands. What is rounded, 8 bits each, are the gradients of logits and the products."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from torch_ref import cpu, loss

    monkeypatch.setattr(cpu, "HALF_PRODUCTS", half_products)
    generator = np.random.default_rng(2)
    hidden, embedding = (torch.from_numpy(generator.standard_normal((rows, HIDDEN))) for rows in (100, 50))
    targets = integers("torch", generator.integers(-1, 50, 100))
    operands = hidden.bfloat16(), embedding.bfloat16().float()

    def loss_and_gradients(function, *operands):
        leaves = [operand.clone().requires_grad_() for operand in operands]
        total = function(*leaves)
        return [total.detach(), *torch.autograd.grad(total, leaves)]

    got = loss_and_gradients(lambda h, e: loss.cross_entropy(h, e, targets, 32), *operands)
    expected = loss_and_gradients(
        lambda h, e: loss.cross_entropy_plain(h, e, targets), *(operand.float() for operand in operands)
    )
    assert got[2].dtype == torch.float32
    for what, a, b in zip(("loss", "hidden", "embedding"), got, expected, strict=True):
        assert relative_error(a.float(), b) <= KERNEL_BOUNDS["bfloat16"], what


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_loss_against_a_hand_made_shifted_reference(framework):
    """The token after each position is what is scored there; unscored ones count nothing."""
    generator = np.random.default_rng(3)
    tokens = generator.integers(0, 9, 13)
    hidden, embedding = generator.standard_normal((12, HIDDEN)), generator.standard_normal((9, HIDDEN))
    targets = tokens[1:].copy()
    targets[4] = -1
    expected = 0.0
    for position in range(12):
        if position != 4:
            logits = embedding @ hidden[position]
            expected += np.log(np.exp(logits).sum()) - logits[tokens[position + 1]]
    loss = module(framework, "loss")
    got = gradients(framework)(
        lambda h, e: loss.cross_entropy(h, e, integers(framework, targets), 5), [hidden, embedding], np.array(1.0)
    )
    assert got[0] == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("seq, chunk", [(7, 32), (40, 32), (3, 7)])
def test_losses_by_row_are_those_of_each_row_alone(framework, seq, chunk):
    generator = np.random.default_rng(4)
    hidden, embedding = (generator.standard_normal(shape).astype(np.float32) for shape in ((5, seq, 12), (50, 12)))
    targets = generator.integers(-1, 50, (5, seq))
    loss = module(framework, "loss")
    arrays = [floats(framework, array) for array in (hidden, embedding)]
    got = np.asarray(loss.row_losses(*arrays, integers(framework, targets), chunk))
    for row in range(5):
        alone = loss.cross_entropy_plain(arrays[0][row], arrays[1], integers(framework, targets[row]))
        assert got[row] == pytest.approx(float(alone), rel=1e-5)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_validation_takes_the_vocabulary_product_alone(framework):
    """Three products with the embedding train it; where nothing is differentiated there is one a chunk."""
    vocab, hidden = 50, np.ones((20, HIDDEN), np.float32)
    embedding, targets = np.ones((vocab, HIDDEN), np.float32), integers(framework, np.arange(20))
    loss = module(framework, "loss")

    def products(differentiated: bool) -> int:
        if framework == "torch":
            return _torch_products(loss.cross_entropy, hidden, embedding, targets, differentiated)
        import jax

        def total(hidden, embedding):
            return loss.cross_entropy(hidden, embedding, targets, 20)

        function = jax.grad(total, (0, 1)) if differentiated else total
        return str(jax.make_jaxpr(function)(hidden, embedding)).count("dot_general[")

    assert products(differentiated=True) == 3
    assert products(differentiated=False) == 1


def _torch_products(cross_entropy, hidden, embedding, targets, differentiated: bool) -> int:
    """Matrix products of a loss of parameters, as models hold them."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        products = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.products += function.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm")
            return function(*args, **(kwargs or {}))

    leaves = [torch.nn.Parameter(torch.from_numpy(array)) for array in (hidden, embedding)]
    with torch.set_grad_enabled(differentiated), Counter() as counter:
        cross_entropy(*leaves, targets, 20)
    return counter.products


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


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize(("outputs", "parts"), [(30, 2), (30, 3), (31, 2), (30, 1)])
@pytest.mark.parametrize("transposed", [False, True])
def test_split_product(rows, outputs, parts, transposed):
    """Parts for the cores: the same values as one product, also where the outputs do not divide."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from torch_ref.cpu import split_product

    draw = np.random.default_rng(0).standard_normal
    x, weight = draw((rows, 7)), draw((7, outputs)).T if transposed else draw((outputs, 7))
    out = split_product(torch.from_numpy(x), torch.from_numpy(weight), parts)
    np.testing.assert_allclose(out, x @ weight.T, rtol=1e-13)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("one_core", [False, True])
def test_products_are_split_where_one_core_would_take_them(monkeypatch, dtype, rows, one_core):
    """On any processor: the same values either way, and split are few rows that MKL multiplies."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from torch_ref import cpu, layers

    split = []
    monkeypatch.setattr(cpu, "ONE_CORE_PRODUCTS", one_core)
    monkeypatch.setattr(cpu, "split_product", lambda x, weight, parts: split.append(parts) or x @ weight.T)
    draw = np.random.default_rng(0).standard_normal
    x, weight = (torch.from_numpy(draw(shape)).to(getattr(torch, dtype)) for shape in ((rows, 8), (6, 8)))
    out = layers.product(x, weight)
    tolerance = {"float32": 1e-5, "float64": 1e-13, "bfloat16": 2e-2}[dtype]
    np.testing.assert_allclose(out.double(), x.double() @ weight.double().T, rtol=tolerance, atol=tolerance)
    assert out.dtype == x.dtype
    wanted = one_core and rows < cpu.FEW_ROWS and dtype != "bfloat16"
    assert split == ([torch.get_num_threads()] if wanted else [])
