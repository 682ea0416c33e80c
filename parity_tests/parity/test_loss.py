"""The loss over chunks of the vocabulary's logits against the plain one and one written out by hand, values and
gradients."""

import weakref

import numpy as np
import pytest

from parity_tests.harness.measure import relative_error
from parity_tests.support.backends import FRAMEWORKS
from parity_tests.support.gradients import floats, gradients, integers, module

HIDDEN = 12


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
    assert got[0].dtype == got[2].dtype == torch.float32
    # What comes from above scales the gradients in float32, too: a mean's 1 / tokens is no number of 8 bits.
    scaled = loss_and_gradients(lambda h, e: 0.3 * loss.cross_entropy(h, e, targets, 32), *operands)
    assert torch.equal(scaled[1], (0.3 * got[1].float()).bfloat16())
    (alone,) = torch.autograd.grad(
        loss.cross_entropy(leaf := operands[0].requires_grad_(), operands[1], targets, 32), leaf
    )
    assert torch.equal(alone, got[1]), "of an embedding that is not trained"
    for what, a, b in zip(("loss", "hidden", "embedding"), got, expected, strict=True):
        assert relative_error(a.float(), b) <= 2e-2, what


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("differentiated", [True, False])
def test_logits_and_their_gradient_are_gone_before_the_next_chunk(monkeypatch, differentiated, dtype):
    """On a GPU a chunk of each is 800 MB in float32."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from torch_ref import loss

    made, product, softmax_gradient = [], loss.wide_product, loss.softmax_gradient

    def noted(tensor):
        made.append(weakref.ref(tensor))
        return tensor

    def noted_product(x, weight):
        if weight.shape != (50, HIDDEN):  # the embedding's gradient
            return product(x, weight)
        assert not [tensor for tensor in made if tensor() is not None]
        return noted(product(x, weight))

    def noted_gradient(*arguments):
        total, gradient = softmax_gradient(*arguments)
        return total, noted(gradient)

    monkeypatch.setattr(loss, "wide_product", noted_product)
    monkeypatch.setattr(loss, "softmax_gradient", noted_gradient)
    states = torch.ones((10, HIDDEN), dtype=getattr(torch, dtype), requires_grad=differentiated)
    assert loss.cross_entropy(states, torch.ones(50, HIDDEN), torch.zeros(10, dtype=torch.int64), 4) > 0
    assert len(made) == 3 * (1 + differentiated)


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
