"""The optimizer step of both backends: accumulation, clipping, AdamW, balance bias, skipped steps, snapshots."""

import dataclasses

import numpy as np
import pytest

from parity_tests.support.backends import (
    COMPUTE,
    CONFIG,
    FRAMEWORKS,
    OPTIMIZER,
    arrays,
    assert_close,
    assert_same,
    batch,
    make_backend,
    schedule,
    use_micro_batch,
)
from torch_ref.spec.interface import IGNORE, UserError
from torch_ref.spec.parameters import count_parameters, parameter_table

ROWS = {row.name: row for row in parameter_table(CONFIG)}


@pytest.fixture(scope="module", params=FRAMEWORKS)
def made(request):
    """One backend for the module: Flax compiles for seconds."""
    backend = make_backend(request.param)
    yield backend
    backend.close()


@pytest.fixture
def backend(made):
    """The same, freshly initialised."""
    use_micro_batch(made, OPTIMIZER.micro_batch_size)
    made.set_schedule(schedule)
    made.init(seed=0)
    return made


def run(backend, batches, micro_batch_size):
    use_micro_batch(backend, micro_batch_size)
    backend.init(seed=0)
    results = [backend.step(*each) for each in batches]
    return arrays(backend.state()), results


@pytest.mark.parametrize("unscored", [0.0, 0.9])
def test_micro_batches_add_up_to_the_whole_batch(backend, unscored):
    batches = [batch(seed, unscored=unscored) for seed in range(5)]
    whole, whole_results = run(backend, batches, 4)
    parts, parts_results = run(backend, batches, 2)
    for (_, targets), one, other in zip(batches, whole_results, parts_results, strict=True):
        assert one.grad_norm > OPTIMIZER.grad_clip, "clipping must be active, or the order of clipping goes unseen"
        assert one.learning_rate == other.learning_rate
        assert one.tokens == other.tokens == (targets != IGNORE).sum()
        np.testing.assert_allclose(other.loss, one.loss, rtol=1e-6)
        np.testing.assert_allclose(other.balance_loss, one.balance_loss, rtol=1e-6)
        np.testing.assert_allclose(other.grad_norm, one.grad_norm, rtol=1e-5)
        np.testing.assert_array_equal(other.expert_counts, one.expert_counts)
    assert_close(parts, whole, 1e-5)


def test_a_result_may_be_asked_for_when_later_steps_have_begun(backend):
    batches = [batch(seed) for seed in range(3)]
    expected_state, expected = run(backend, batches, 2)
    backend.init(seed=0)
    results = []
    for number, each in enumerate(batches, 1):
        results.append(backend.begin_step(*each))
        assert backend.steps_done == number
    assert [repr(result()) for result in results] == [repr(result) for result in expected]
    for name, tensor in arrays(backend.state()).items():
        np.testing.assert_array_equal(tensor, expected_state[name], err_msg=name)


def test_micro_batch_size_must_divide_the_batch(backend):
    use_micro_batch(backend, 3)
    with pytest.raises(UserError, match="--micro-batch-size 3"):
        backend.step(*batch(0))


def test_update_is_the_documented_formula(backend):
    """The gradient is read off the first moment: m = b1 m + (1 - b1) g, with g clipped."""
    b1, b2 = OPTIMIZER.betas
    before = arrays(backend.state())
    for step in range(2):
        result = backend.step(*batch(step))
        after = arrays(backend.state())
        clipped_square = 0.0
        for name, row in ROWS.items():
            if not row.trainable:
                continue
            p, m, v = (before[f"{group} {name}"].astype(np.float64) for group in ("weights", "first", "second"))
            new_p, new_m, new_v = (after[f"{group} {name}"] for group in ("weights", "first", "second"))
            g = (new_m - b1 * m) / (1 - b1)
            clipped_square += (g**2).sum()
            np.testing.assert_allclose(new_v, b2 * v + (1 - b2) * g**2, rtol=1e-4, atol=1e-10, err_msg=name)
            corrected = (new_m / (1 - b1 ** (step + 1))) / (np.sqrt(new_v / (1 - b2 ** (step + 1))) + OPTIMIZER.eps)
            decay = OPTIMIZER.weight_decay if row.decay else 0.0
            update = (p - new_p) / schedule(step)
            np.testing.assert_allclose(update, corrected + decay * p, atol=3e-4, err_msg=name)
        assert result.learning_rate == schedule(step)
        np.testing.assert_allclose(clipped_square**0.5, min(OPTIMIZER.grad_clip, result.grad_norm), rtol=1e-5)
        before = after


def test_clipping_leaves_small_gradients_alone_and_scales_to_the_limit(backend):
    if backend.framework == "flax":
        pytest.skip("the rule is part of the compiled step: a second compilation for what torch shows as well")
    backend.step(*batch(0))
    clipped = arrays(backend.state())
    first = {}
    for clip in (100.0, 0.25):
        backend.optimizer_config = dataclasses.replace(OPTIMIZER, grad_clip=clip)
        backend.init(0)
        norm = backend.step(*batch(0)).grad_norm
        first[clip] = arrays(backend.state())["first norm.weight"]
    backend.optimizer_config = OPTIMIZER
    np.testing.assert_allclose(first[100.0], clipped["first norm.weight"] * norm, rtol=1e-5)
    np.testing.assert_allclose(first[0.25], clipped["first norm.weight"] * 0.25, rtol=1e-5)


def test_every_trainable_tensor_moves_in_the_first_step(backend):
    before = arrays(backend.state())
    backend.step(*batch(0))
    after = arrays(backend.state())
    trainable = [name for name, row in ROWS.items() if row.trainable]
    assert sum(ROWS[name].size for name in trainable) == count_parameters(CONFIG)
    for name in trainable:
        assert (after[f"weights {name}"] != before[f"weights {name}"]).any(), name


def test_balance_loss_is_in_the_gradient_with_its_coefficient(backend):
    """Under a final norm of zero the next-token loss is flat, so a router's gradient is the balance loss's alone:
    against differences of the one that steps report."""
    name = f"layers.{CONFIG.num_layers - 1}.mlp.router.weight"

    def step(change=0.0):
        backend.init(0)
        state = backend.state()
        weights = {key: np.array(value) for key, value in state.weights.items()}
        weights["norm.weight"][:] = 0
        weights[name] += change
        backend.load_state(dataclasses.replace(state, weights=weights))
        return backend.step(*batch(1))

    assert step().grad_norm < OPTIMIZER.grad_clip
    gradient = np.array(backend.state().first_moment[name]) / np.float32(1 - OPTIMIZER.betas[0])
    size = np.linalg.norm(gradient)
    # No token of this batch is so near to another choice that these steps of 0.001 would change it.
    ahead, back = (step(sign * 1e-3 * gradient / size).balance_loss for sign in (1, -1))
    assert size == pytest.approx(CONFIG.balance_loss_coef * (ahead - back) / 2e-3, rel=1e-2)


def test_balance_bias_follows_the_summed_counts(backend):
    expected = np.zeros((CONFIG.num_layers, CONFIG.n_routed_experts), np.float32)
    for seed in range(3):
        counts = backend.step(*batch(seed)).expert_counts
        assert counts.dtype == np.int64 and (counts.sum(1) == 4 * 16 * CONFIG.num_experts_per_tok).all()
        mean = counts.mean(1, keepdims=True)
        expected += np.float32(CONFIG.balance_bias_rate) * np.sign(mean - counts).astype(np.float32)
        weights = backend.state().weights
        for layer in range(CONFIG.num_layers):
            np.testing.assert_allclose(weights[f"layers.{layer}.mlp.router.balance_bias"], expected[layer], rtol=1e-6)


def test_step_that_is_not_finite_changes_nothing_but_the_counter(backend):
    backend.step(*batch(0))
    before = arrays(backend.state())
    inputs, targets = batch(1)
    result = backend.step(inputs, np.full_like(targets, IGNORE))  # a mean over nothing
    assert not result.applied and not np.isfinite(result.loss) and result.tokens == 0
    after = arrays(backend.state())
    assert after.pop("step") == before.pop("step") + 1 == 2
    assert_same(after, before)


@pytest.mark.parametrize("applied", [True, False])
def test_flax_takes_or_leaves_an_update_alike_on_every_device(applied):
    """By a branch on the CPU, value by value on a GPU: the same bits, whatever was not finite."""
    pytest.importorskip("jax")
    import jax

    from flax_model.cpu import changed_if, compiling_for

    tree = {"weights": np.arange(6, dtype=np.float32), "step": np.int32(3)}

    def changed(platform):
        with compiling_for(platform):
            made = jax.jit(lambda ok, tree: changed_if(ok, lambda tree: {**tree, "weights": 0 / tree["weights"]}, tree))
            return made(applied, tree)

    assert_same(changed("gpu"), changed("cpu"))
    assert np.isnan(changed("gpu")["weights"]).any() == applied


def test_gradient_that_is_not_finite_is_skipped_though_the_loss_is_fine(backend):
    """A norm scaled down by as much as the projections after it are scaled up: the loss stays, and the square of the
    norm's gradient overflows float32."""
    state = backend.state()
    weights = {name: np.array(value) for name, value in state.weights.items()}
    weights["layers.0.input_norm.weight"] *= np.float32(1e-34)
    for name in ("q_proj", "kv_a_proj"):
        weights[f"layers.0.attention.{name}.weight"] *= np.float32(1e34)
    loss, scored = backend.evaluate(*batch(1))
    backend.load_state(dataclasses.replace(state, weights=weights))
    before = arrays(backend.state())
    result = backend.step(*batch(1))
    np.testing.assert_allclose(result.loss, loss / scored, rtol=1e-5)
    assert not np.isfinite(result.grad_norm) and not result.applied
    after = arrays(backend.state())
    assert after.pop("step") == before.pop("step") + 1
    assert_same(after, before)


def test_after_a_skipped_step_the_rate_has_moved_on_and_adam_has_not(backend):
    inputs, targets = batch(0)
    backend.step(inputs, np.full_like(targets, IGNORE))
    result = backend.step(inputs, targets)
    skipped = arrays(backend.state())
    assert result.learning_rate == schedule(1) and skipped.pop("updates") == 1
    backend.init(0)
    backend.set_schedule(lambda step: schedule(step + 1))
    backend.step(inputs, targets)
    straight = arrays(backend.state())
    assert straight.pop("updates") == 1
    skipped.pop("step"), straight.pop("step")
    assert_same(skipped, straight)


def test_same_seed_and_batches_give_the_same_bits(backend):
    one, _ = run(backend, [batch(0), batch(1)], 2)
    other, _ = run(backend, [batch(0), batch(1)], 2)
    assert_same(one, other)


def test_snapshot_brings_everything_back_as_often_as_asked(backend):
    inputs, targets = batch(0)
    backend.step(inputs, targets)
    backend.step(inputs, np.full_like(targets, IGNORE))  # updates nothing: fewer updates than steps
    snapshot, before = backend.snapshot(), arrays(backend.state())
    backend.set_schedule(lambda step: 0.1)
    for _ in range(2):
        assert backend.step(*batch(1)).learning_rate == 0.1
        assert backend.steps_done == 3
        backend.rollback(snapshot)
        assert (backend.steps_done, backend.state().updates) == (2, 1)
        assert_same(arrays(backend.state()), before)


def test_an_array_of_a_state_stays_what_it_was(backend):
    """A step overwrites the memory that it is read from."""
    state = backend.state()
    held = [values["norm.weight"] for values in (state.weights, state.first_moment, state.second_moment)]
    before = [array.copy() for array in held]
    backend.step(*batch(0))
    np.testing.assert_array_equal(held, before)


def test_snapshot_without_room_is_refused(backend, monkeypatch):
    monkeypatch.setattr("torch_ref.spec.memory.host_memory_available", lambda: 1000)
    with pytest.raises(UserError, match="a copy of the state takes"):
        backend.snapshot()


def test_evaluate_sums_over_scored_targets_and_changes_nothing(backend):
    inputs, targets = batch(0, rows=5, unscored=0.5)
    before = arrays(backend.state())
    total, scored = backend.evaluate(inputs, targets)
    assert (total, scored) == backend.evaluate(inputs, targets)
    assert scored == (targets != IGNORE).sum()
    # Five rows in forward passes of two: the row that fills up the last one must not count.
    parts = [backend.evaluate(inputs[i : i + 1], targets[i : i + 1]) for i in range(5)]
    np.testing.assert_allclose(total, sum(part for part, _ in parts), rtol=1e-6)
    assert_same(arrays(backend.state()), before)
    np.testing.assert_allclose(total / scored, np.log(CONFIG.vocab_size) + 0.5, atol=0.4)


def test_reported_loss_is_that_of_evaluate(backend):
    inputs, targets = batch(0, unscored=0.5)
    total, scored = backend.evaluate(inputs, targets)
    np.testing.assert_allclose(backend.step(inputs, targets).loss, total / scored, rtol=1e-6)


@pytest.mark.parametrize("remat", ["experts", "layers"])
def test_rematerialisation_changes_no_number(backend, remat):
    expected = backend.step(*batch(0))
    expected_state = arrays(backend.state())
    other = make_backend(backend.framework, compute=dataclasses.replace(COMPUTE, remat=remat))
    other.init(0)
    result = other.step(*batch(0))
    state = arrays(other.state())
    other.close()
    np.testing.assert_array_equal(result.expert_counts, expected.expert_counts)
    np.testing.assert_allclose(result.loss, expected.loss, rtol=1e-6)
    np.testing.assert_allclose(result.grad_norm, expected.grad_norm, rtol=1e-6)
    moments = [name for name in state if name.startswith(("first", "second"))]
    assert_close({name: state[name] for name in moments}, {name: expected_state[name] for name in moments}, 1e-5)
    for name in (f"weights {name}" for name in ROWS if name.endswith("balance_bias")):
        np.testing.assert_array_equal(state[name], expected_state[name])


def test_half_precision_computes_in_it_and_keeps_the_state_in_single(backend):
    total, scored = backend.evaluate(*batch(0))
    other = make_backend(backend.framework, compute=dataclasses.replace(COMPUTE, dtype="bfloat16"))
    other.init(0)
    half_total, _ = other.evaluate(*batch(0))
    assert 0 < abs(half_total - total) / scored < 0.02
    if backend.framework == "flax":  # its step takes long to compile in half precision: look at what it would return
        import jax

        tokens = jax.ShapeDtypeStruct((1, 2, 16), np.int32)
        state, _ = jax.eval_shape(other._train_step, other._abstract, tokens, tokens, np.float32(1))
        dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(state)}
        assert dtypes == {"float32", "int32"}
    else:
        other.step(*batch(0))
        assert {str(value.dtype) for name, value in arrays(other.state()).items() if " " in name} == {"float32"}
    other.close()


def test_flax_compiles_one_step(backend, tmp_path):
    if backend.framework != "flax":
        pytest.skip("torch compiles nothing")
    backend.step(*batch(0))
    compiled = dict(backend._compiled)
    path = backend.save(tmp_path, "step_1", {})
    snapshot = backend.snapshot()
    backend.step(*batch(1))
    backend.restore(path)
    backend.step(*batch(1))
    backend.rollback(snapshot)
    backend.set_schedule(lambda step: 0.5)
    backend.step(*batch(1))
    backend.load_state(backend.state())
    backend.step(*batch(1))
    backend.init(1)
    backend.step(*batch(1))
    assert backend._compiled == compiled


def test_flax_compiles_the_expected_step_ahead(backend):
    if backend.framework != "flax":
        pytest.skip("torch compiles nothing")
    inputs, targets = batch(0)
    ahead = type(backend)(CONFIG, COMPUTE, OPTIMIZER, "cpu", expected_batch=inputs.shape)
    ahead.init(0)
    backend.init(0)
    (future,) = ahead._compiled.values()
    result, expected = ahead.step(inputs, targets), backend.step(inputs, targets)
    assert list(ahead._compiled.values()) == [future.result()]
    assert (result.loss, result.grad_norm) == (expected.loss, expected.grad_norm)
    ahead.step(*batch(1, rows=2))
    assert len(ahead._compiled) == 2
    ahead.close()


def test_both_frameworks_take_the_same_step(backend):
    pytest.importorskip("torch")
    if backend.framework == "torch":
        pytest.skip("compared when the other one is tested")
    results, states = [], []
    for each in (make_backend("torch"), backend):
        each.init(3)
        results.append([each.step(*batch(seed, unscored=0.5)) for seed in range(2)])
        states.append(arrays(each.state()))
    for a, b in zip(*results, strict=True):
        assert (a.learning_rate, a.tokens, a.applied) == (b.learning_rate, b.tokens, b.applied)
        np.testing.assert_array_equal(a.expert_counts, b.expert_counts)
        reported = [[each.loss, each.balance_loss, each.grad_norm] for each in (a, b)]
        np.testing.assert_allclose(*reported, rtol=1e-5)
    moments = [name for name in states[0] if not name.startswith("weights")]
    assert_close({name: states[1][name] for name in moments}, {name: states[0][name] for name in moments}, 1e-4)
    # A step moves a weight by about the rate: what differs must be far smaller.
    for name in (f"weights {name}" for name in ROWS):
        assert np.abs(states[0][name] - states[1][name]).max() < 0.02 * schedule(1), name
