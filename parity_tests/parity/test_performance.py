"""What speed rests on, in numbers that do not depend on the machine's load: what is compiled, and XLA's own count of
the memory that a compiled step needs."""

from dataclasses import replace

import numpy as np
import pytest

from torch_ref.spec.config import PRESETS, ComputeConfig
from torch_ref.spec.interface import OptimizerConfig

jax = pytest.importorskip("jax", reason="JAX is not installed")

OPTIMIZER = OptimizerConfig(schedule=lambda step: 1e-3)
TINY = replace(PRESETS["tiny"], vocab_size=512, num_layers=2)


def temporary_bytes(config, seq_len, remat="off"):
    """Memory of a compiled forward and backward pass beside its arguments and results."""
    import jax.numpy as jnp

    from flax_model.model import objective
    from flax_model.sharding import abstract_parameters, make_mesh
    from flax_model.trees import merge
    from flax_model.values import structure

    compute = ComputeConfig(attention="blocked", moe="grouped", remat=remat, loss_chunk=64)
    params, biases = abstract_parameters(config, jnp.float32, make_mesh(jax.devices("cpu")[:1], (1, 1, 1)))
    graphdef = structure(config)

    def share(params, biases, rows):
        return objective(merge(graphdef, params, biases), rows, rows, compute, seq_len, 1)[0]

    rows = jax.ShapeDtypeStruct((1, seq_len), jnp.int32)
    compiled = jax.jit(jax.grad(share)).lower(params, biases, rows).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_a_step_is_compiled_once():
    """Whatever the data routes where, and whatever the learning rate: one compilation, before the first step. The
    compiled step takes no other shapes or types: it would refuse them."""
    from flax_model.backend import FlaxBackend

    backend = FlaxBackend(TINY, ComputeConfig(), replace(OPTIMIZER, schedule=lambda step: 1e-3 * (step + 1)), "cpu")
    backend.init(0)
    counts, compiled = [], []
    generator = np.random.default_rng(0)
    for _ in range(4):
        rows = generator.integers(0, TINY.vocab_size, (1, 65), dtype=np.int32)
        backend.step(rows[:, :-1], rows[:, 1:])
        counts.append(len(backend._compiled))
        compiled.append(next(iter(backend._compiled.values())))
    assert counts == [1, 1, 1, 1] and all(step is compiled[0] for step in compiled)
    backend.close()


def test_a_step_of_micro_batches_is_traced_once(monkeypatch):
    """For the shapes of the sums and for the scan."""
    from flax_model import train_step
    from parity_tests.support.backends import make_backend

    traced, objective = [], train_step.objective
    monkeypatch.setattr(train_step, "objective", lambda *arguments: (traced.append(1), objective(*arguments))[1])
    make_backend("flax").lower_step((2, 2, 16))
    assert len(traced) == 1


def test_a_layer_keeps_what_it_is_meant_to_keep():
    """Memory of one more layer: its gradients, the values with names, routing among them, and its input. Anything else
    that were saved for the backward pass (a norm, a gate, a second copy of a weight) would show."""
    tokens, c = 512, TINY
    deep = replace(c, num_layers=6)
    routed = 2 * c.num_experts_per_tok * c.moe_intermediate_size
    shared = 2 * c.moe_intermediate_size
    attention = c.num_heads * (c.qk_head_dim + c.v_head_dim + 1) + c.num_kv_heads * (c.qk_head_dim + c.v_head_dim)
    routing = c.n_routed_experts + 3 * c.num_experts_per_tok  # scores, and choices, their order and its inverse
    kept = {"off": attention + shared + routed, "experts": attention + shared, "layers": 0}
    for remat, values in kept.items():
        each = (temporary_bytes(deep, tokens, remat) - temporary_bytes(c, tokens, remat)) / 4
        # The sorted rows have a tail of up to one and a half mean loads of an expert.
        allowed = 4 * tokens * (values + routing + c.hidden_size) + (4 * routed * tokens * 0.2 if remat == "off" else 0)
        assert each <= 1.1 * allowed, (remat, each, allowed)


def test_no_buffer_is_copied_into_a_branch():
    """The experts' loop updates its buffers in place: no copy of one in the compiled program's branches."""
    import re

    import jax.numpy as jnp

    from flax_model.grouped_experts import chunk_sizes
    from flax_model.moe import Routing, experts_grouped

    tokens, experts, hidden, ffn = 256, 4, 32, 48
    shapes = [(tokens, hidden), (tokens, 2), (experts, ffn, hidden), (experts, ffn, hidden), (experts, hidden, ffn)]
    operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    scores, chosen = (jax.ShapeDtypeStruct((tokens, n), t) for n, t in ((experts, jnp.float32), (2, jnp.int32)))

    def total(x, weights, gate, up, down, chosen, scores):
        return experts_grouped(x, Routing(chosen, weights, scores), gate, up, down, False).sum()

    text = jax.jit(jax.grad(total, range(5))).lower(*operands, chosen, scores).compile().as_text()
    rows = 2 * tokens + chunk_sizes(tokens, experts, 2)[-1]
    copies = re.findall(rf"= f32\[{rows},(?:{hidden}|{ffn})\]\S* copy\(", text)
    assert len(copies) <= 4, f"{len(copies)} copies of whole buffers, one in each of many branches?"
