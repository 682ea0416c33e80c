"""What torch does on CUDA, as far as it can be seen without a card: layers compiled whole, the operands that grouped
kernels take, the update that the device decides about, and the rotary table kept."""

import warnings
import weakref
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import jaxtyping
import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed")

import torch

from parity_tests.support.backends import COMPUTE, CONFIG, OPTIMIZER, arrays, batch
from torch_ref import backend as torch_backend
from torch_ref import block as torch_block
from torch_ref import cuda_graph, grouped_experts, model, moe, self_check
from torch_ref import loss as torch_loss
from torch_ref.backend import TorchBackend
from torch_ref.spec.config import PRESETS
from torch_ref.spec.interface import IGNORE

MODEL = replace(CONFIG, first_k_dense=1, num_layers=3)


@pytest.fixture
def tracing(monkeypatch):
    """Layers are traced whole, forward and backward, and run as traced, without the minutes that kernels take to make:
    how often that happened, and why it was given up."""
    monkeypatch.setattr(torch_block, "COMPILER", "aot_eager")
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    monkeypatch.setattr(torch_loss, "COMPILER", "aot_eager")
    forget()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    forget()


def forget(made=(torch_block.compiled_layer, torch_loss.compiled_softmax_gradient)):
    for each in made:
        each.cache_clear()


def trained(dtype, compile, steps=2, **compute):
    """A backend after some steps, and what they reported."""
    made = TorchBackend(MODEL, replace(COMPUTE, dtype=dtype, compile=compile, **compute), OPTIMIZER, "cpu")
    made.init(0)
    return made, [made.step(*batch(seed)) for seed in range(steps)]


@pytest.mark.parametrize("remat", ["off", "experts", "layers"])
def test_a_layer_is_compiled_whole_and_once_for_all_layers(tracing, monkeypatch, remat):
    """With the grouped kernels, as on CUDA: no break in a layer, one graph for each kind of layer and one for the loss,
    the same bits."""
    monkeypatch.setattr(grouped_experts, "_all_at_once", lambda x, gate: True)
    monkeypatch.setattr("torch_ref.cpu.HALF_PRODUCTS", True)
    expected, reports = trained("bfloat16", "off", remat=remat)
    compiled, compiled_reports = trained("bfloat16", "on", remat=remat)
    assert compiled.compute.compile == "on"
    assert not tracing["graph_break"] and tracing["stats"]["unique_graphs"] == 3
    assert [report.loss for report in compiled_reports] == [report.loss for report in reports]
    for name, tensor in arrays(compiled.state()).items():
        np.testing.assert_array_equal(tensor, arrays(expected.state())[name], err_msg=name)


def test_grouped_kernels_are_the_experts_one_by_one(monkeypatch):
    """float32 on the CPU, where torch has the grouped products too: output and gradients, with an idle expert."""
    generator = torch.Generator().manual_seed(0)
    x, gate, up, down, upstream = (
        torch.randn(shape, generator=generator) for shape in ((50, 24), (5, 40, 24), (5, 40, 24), (5, 24, 40), (50, 24))
    )
    scores = torch.rand(50, 5, generator=generator)
    scores[:, 1], scores[:, 3] = 2.0, -1.0
    chosen, weights = moe.top_k(scores, 2), torch.rand(50, 2, generator=generator)
    for remat in (False, True):
        results = []
        for at_once in (False, True):
            monkeypatch.setattr(grouped_experts, "_all_at_once", lambda x, gate, at_once=at_once: at_once)
            leaves = [leaf.clone().requires_grad_() for leaf in (x, weights, gate, up, down)]
            out = moe.experts_grouped(leaves[0], moe.Routing(chosen, leaves[1], scores), *leaves[2:], remat)
            results.append([out, *torch.autograd.grad(out, leaves, upstream)])
        for one_by_one, together in zip(*results, strict=True):
            torch.testing.assert_close(together, one_by_one, rtol=1e-5, atol=1e-5)
        assert not results[1][3][3].any()


@pytest.mark.parametrize(
    "hidden, ffn", [(576, 1536), (PRESETS["small"].hidden_size, 448), (24, 40), (20, 40), (24, 36), (128, 1500)]
)
def test_operands_of_grouped_kernels(monkeypatch, hidden, ffn):
    """Strides and shapes of all nine products are held to CUDA's rules, forward and backward, on tensors without
    values; and the sizes that break them are those that are not given to the kernels."""
    monkeypatch.setattr(grouped_experts, "_all_at_once", lambda x, gate: True)
    bfloat16, float32 = ({"device": "meta", "dtype": dtype} for dtype in (torch.bfloat16, torch.float32))
    shapes = (33, 2), (8, ffn, hidden), (8, ffn, hidden), (8, hidden, ffn)
    weights, *experts = (torch.empty(shape, **float32, requires_grad=True) for shape in shapes)
    x = torch.empty(33, hidden, **bfloat16, requires_grad=True)
    chosen = torch.empty(33, 2, dtype=torch.long, device="meta")

    def run():
        for remat in (False, True):
            out = moe.experts_grouped(x, moe.Routing(chosen, weights, weights), *experts, remat)
            assert (out.shape, out.dtype) == (x.shape, x.dtype)
            gradients = torch.autograd.grad(out, (x, weights, *experts), torch.empty_like(out))
            assert [g.dtype for g in gradients] == [torch.bfloat16, *[torch.float32] * 4]

    if grouped_experts.grouped_kernels_take(ffn, hidden):
        run()
    else:
        with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
            run()


def test_a_layer_that_does_not_compile_runs_as_it_is(tracing, monkeypatch):
    monkeypatch.setattr(torch_block, "COMPILER", "no_such_compiler")
    _, expected = trained("float32", "off")
    with pytest.warns(UserWarning, match="--compile on: .*no_such_compiler.*uncompiled"):
        made, reports = trained("float32", "on")
    assert made.compute.compile == "off" and [r.loss for r in reports] == [r.loss for r in expected]


NAN = float("nan")


@pytest.mark.parametrize(
    "wrong, factor",
    [("output", 1.1), ("output", NAN), ("output", torch.tensor([[1.0]] * 15 + [[NAN]])), ("gradient", 1.1)],
)
def test_a_compiled_layer_that_is_wrong_is_not_used(monkeypatch, wrong, factor):
    """The third leaves the last token of each row unwritten."""

    def compiled(block, x, rope, compute, documents):
        if wrong == "gradient":
            x = x.detach() + factor * (x - x.detach())
        out, report = torch_block.run_layer(block, x, rope, compute, documents)
        return (out if wrong == "gradient" else factor * out), report

    monkeypatch.setattr(self_check, "compiled_layer", lambda: compiled)
    with pytest.warns(UserWarning, match=f"--compile on: {wrong} of a compiled layer is wrong"):
        assert trained("float32", "on", steps=1)[0].compute.compile == "off"


def test_a_gradient_that_is_rounding_alone_is_not_judged(monkeypatch):
    """That of a router that gives each token one expert: its weight is 1 whatever the scores are."""

    def compiled(block, x, rope, compute, documents):
        out, report = torch_block.run_layer(block, x, rope, compute, documents)
        return out + 1e-6 * block.mlp.router.weight.sum(), report

    monkeypatch.setattr(self_check, "compiled_layer", lambda: compiled)
    monkeypatch.setattr(self_check, "_compiled_loss_error", lambda *_: None)
    config = replace(MODEL, first_k_dense=0, num_experts_per_tok=1)
    made = TorchBackend(config, COMPUTE, OPTIMIZER, "cpu")
    made.init(0)
    assert self_check.compile_error(made.compute, made.model, torch.from_numpy(batch(0)[0])) is None


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
def test_a_compiled_loss_that_is_wrong_is_not_used(tracing, monkeypatch, wrong):
    def compiled(logits, targets, dtype):
        loss, gradient = torch_loss.softmax_gradient(logits, targets, dtype)
        return (1.1 * loss, gradient) if wrong == "loss" else (loss, 1.1 * gradient)

    monkeypatch.setattr(torch_loss, "compiled_softmax_gradient", lambda: compiled)
    with pytest.warns(UserWarning, match=f"--compile on: {wrong} of the compiled loss is wrong"):
        assert trained("float32", "on", steps=1)[0].compute.compile == "off"


@pytest.fixture
def recording(monkeypatch):
    """A stand-in for CUDA's graphs: a replay runs the pass again, into the tensors of the recorded one. What it counts
    are recordings and replays."""
    calls = Counter()

    def tensors(results):
        parts, gradients = results
        return [*parts, *gradients]

    def record(run):
        calls["recordings"] += 1
        results = run()

        def replay():
            calls["replays"] += 1
            parameters = calls.model.parameters()
            before = [parameter.grad for parameter in parameters]
            calls.model.zero_grad(set_to_none=True)
            for kept, new in zip(tensors(results), tensors(run()), strict=True):
                kept.copy_(new)
            for parameter, gradient in zip(calls.model.parameters(), before, strict=True):
                parameter.grad = gradient

        return replay, results

    monkeypatch.setattr(cuda_graph, "record", record)
    monkeypatch.setattr(cuda_graph, "aside", nullcontext)
    monkeypatch.setattr(torch_backend, "can_be_recorded", lambda *_: True)
    return calls


def recorded(recording, micro_batch_size, steps=3):
    optimizer = replace(OPTIMIZER, micro_batch_size=micro_batch_size)
    made = TorchBackend(MODEL, replace(COMPUTE, dtype="float64"), optimizer, "cpu")
    recording.model = made.model
    made.init(0)
    return made, [made.step(*batch(seed)) for seed in range(steps)]


@pytest.mark.parametrize("micro_batch_size", [4, 2, 1])
def test_recorded_steps_are_the_steps_themselves(recording, monkeypatch, micro_batch_size):
    """Whole batches and micro-batches that add up: recorded once, and replayed for every one of them."""
    rows = len(batch(0)[0])
    made, reports = recorded(recording, micro_batch_size)
    assert recording == {"recordings": 1, "replays": 1 + 3 * rows // micro_batch_size}
    monkeypatch.setattr(torch_backend, "can_be_recorded", lambda *_: False)
    expected, expected_reports = recorded(recording, micro_batch_size)
    for ours, theirs in zip(reports, expected_reports, strict=True):
        assert (ours.loss, ours.balance_loss, ours.grad_norm) == (theirs.loss, theirs.balance_loss, theirs.grad_norm)
        np.testing.assert_array_equal(ours.expert_counts, theirs.expert_counts)
    expected_state = arrays(expected.state())
    for name, tensor in arrays(made.state()).items():
        np.testing.assert_array_equal(tensor, expected_state[name], err_msg=name)


def test_another_shape_or_another_setting_is_recorded_anew(recording):
    """A micro-batch of one row would fill both of another's."""
    made, _ = recorded(recording, 2, steps=1)
    made.optimizer_config = replace(OPTIMIZER, micro_batch_size=1)
    made.step(*batch(1))
    assert recording["recordings"] == 2
    made.keep_within_documents(0)
    made.step(*batch(2))
    assert recording["recordings"] == 3


def test_a_recording_keeps_the_rotary_table_that_it_reads(recording):
    """An evaluation of another length replaces the model's; the memory would be another tensor's."""
    made, _ = recorded(recording, 4, steps=1)
    table = weakref.ref(made.model._rope[1].cos)
    made.evaluate(*(tokens[:, :5] for tokens in batch(0)))
    assert made.model._rope[1].cos is not table() is not None


@pytest.mark.parametrize(
    "fault, problem",
    [
        ("stale batch", "not those of the pass itself"),
        ("a gradient not written", "not those of the pass itself"),
        ("a gradient not a number", "not those of the pass itself"),
        ("not recorded", "operation not permitted when stream is capturing"),
    ],
)
def test_a_recording_that_is_wrong_is_not_used(recording, monkeypatch, fault, problem):
    stand_in = cuda_graph.record

    def record(run):
        if fault == "not recorded":
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCompile with ...")
        if fault == "stale batch":
            return lambda: None, run()
        replay, results = stand_in(run)
        return lambda: (replay(), results[1][0].fill_(0 if "written" in fault else np.nan)), results

    monkeypatch.setattr(cuda_graph, "record", record)
    with pytest.warns(UserWarning, match=f"one CUDA graph .*{problem}"):
        made, reports = recorded(recording, 4)
    assert made._recorded is None
    monkeypatch.setattr(torch_backend, "can_be_recorded", lambda *_: False)
    _, expected = recorded(recording, 4)
    assert [report.loss for report in reports] == [report.loss for report in expected]


def test_what_can_be_recorded():
    """Compiled layers on CUDA whose experts ask the host for nothing."""
    cuda, config = torch.device("cuda"), PRESETS["smol-774m"]
    compute = replace(COMPUTE, dtype="bfloat16", moe="grouped", compile="on")
    assert cuda_graph.can_be_recorded(config, compute, cuda)
    assert cuda_graph.can_be_recorded(config, replace(compute, dtype="float32", moe="dense"), cuda)
    assert not cuda_graph.can_be_recorded(config, replace(compute, dtype="float32"), cuda)
    assert not cuda_graph.can_be_recorded(replace(config, moe_intermediate_size=1500), compute, cuda)
    assert not cuda_graph.can_be_recorded(config, replace(compute, compile="off"), cuda)
    assert not cuda_graph.can_be_recorded(config, compute, torch.device("cpu"))


def test_a_right_compiled_layer_is_checked_once(tracing, monkeypatch):
    calls = []
    monkeypatch.setattr(self_check, "compiled_layer", lambda: calls.append(1) or torch_block.run_layer)
    monkeypatch.setattr(torch_block, "compiled_layer", lambda: torch_block.run_layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trained("bfloat16", "on", steps=2)[0].compute.compile == "on"
    assert len(calls) == 2, "a dense layer and one with experts"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("clip", [0.5, 1e3])
def test_the_device_decides_about_an_update_as_the_host_does(dtype, clip):
    """Clipped or not; and not at all where anything is not finite."""

    def updated(update):
        made = TorchBackend(MODEL, replace(COMPUTE, dtype=dtype), replace(OPTIMIZER, grad_clip=clip), "cpu")
        made.init(0)
        made.step(*batch(0))  # moments that are not zero
        before = arrays(made.state())
        total, parts = model.objective(made.model, *made._put(np.stack(batch(1))), made.compute, 100, 4)
        total.backward()
        gradients = [parameter.grad for parameter in made._trainable.values()]
        update(made, gradients, torch_backend.global_norm(gradients), parts.expert_counts)
        return before, arrays(made.state()), made._updates

    def on_the_device(made, gradients, norm, counts, loss=1.0):
        made._update_unasked(gradients, torch.stack([norm.new_tensor(loss), norm, norm]), 1e-3, counts)

    def by_the_host(made, gradients, norm, counts):
        assert float(norm) > 0.5
        made._update(gradients, float(norm), 1e-3, counts)

    _, expected, updates = updated(by_the_host)
    before, got, got_updates = updated(on_the_device)
    assert got_updates == updates == 2
    for name, tensor in got.items():
        error = np.abs(tensor - expected[name]).max() / max(np.abs(expected[name]).max(), 1e-9)
        assert error < {"float32": 1e-6, "float64": 1e-13}[dtype], (name, error)
    assert any((got[name] != before[name]).any() for name in got if name.endswith("balance_bias"))

    before, got, got_updates = updated(lambda *args: on_the_device(*args, loss=float("nan")))
    assert got_updates == 1
    for name, tensor in got.items():
        np.testing.assert_array_equal(tensor, before[name], err_msg=name)


def test_steps_whose_results_are_asked_for_later_are_those_of_the_host(monkeypatch):
    """The whole path of CUDA, on the CPU: losses but for the rounding of the clipping, counts the same, and a step that
    is not finite changes nothing."""
    made, expected = trained("float64", "off", steps=3)
    expected_state = arrays(made.state())
    monkeypatch.setattr(TorchBackend, "runs_ahead", True)
    ahead, _ = trained("float64", "off", steps=0)
    results = [result() for result in [ahead.begin_step(*batch(seed)) for seed in range(3)]]
    for ours, theirs in zip(results, expected, strict=True):
        np.testing.assert_allclose([ours.loss, ours.grad_norm], [theirs.loss, theirs.grad_norm], rtol=1e-13)
        np.testing.assert_array_equal(ours.expert_counts, theirs.expert_counts)
        assert ours.applied and ours.tokens == theirs.tokens and ours.learning_rate == theirs.learning_rate
    for name, tensor in arrays(ahead.state()).items():
        np.testing.assert_allclose(tensor, expected_state[name], rtol=1e-10, atol=1e-15, err_msg=name)

    inputs, targets = batch(3)
    broken = ahead.begin_step(inputs, np.full_like(targets, IGNORE))  # a mean over nothing
    assert not broken().applied and ahead.steps_done == 4 and ahead._updates == 3


def test_the_rotary_table_is_kept_and_good_for_training(monkeypatch):
    made = Counter()
    real = model.make_rope

    def counted(config, length, *where):
        made[length] += 1
        return real(config, length, *where)

    monkeypatch.setattr(model, "make_rope", counted)
    small = model.Model(MODEL)
    for parameter in small.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    tokens = torch.ones(2, 8, dtype=torch.long)
    compute = replace(COMPUTE, attention="sdpa", moe="grouped")
    with torch.inference_mode():
        small(tokens, compute)
    small(tokens, compute).hidden.sum().backward()
    small(tokens, compute)
    assert made == {8: 1}
    small(tokens[:, :5], compute)
    assert made == {8: 1, 5: 1}
