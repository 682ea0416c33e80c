"""Whether torch's fast paths can be trusted on a device.

On Apple's MPS several fused operations have been wrong in released versions of torch, in ways that no error shows. So
there the paths avoid what is known (an explicit mask, padded values, static shapes). Before training, there and on
CUDA, whose grouped products have left gradients of idle experts unwritten on some cards (pytorch #172439), the paths
and the loss are compared on the device itself with the plain ones on the CPU, at the model's own sizes; and a compiled
layer with the layer itself. `flax_model/self_check.py` is the counterpart.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor

from torch_ref.attention import ATTENTION_PATHS, attend_plain
from torch_ref.block import Block, compiled_layer, run_layer
from torch_ref.device import describe
from torch_ref.layers import wide
from torch_ref.loss import cross_entropy, cross_entropy_plain
from torch_ref.model import Model, document_numbers
from torch_ref.moe import EXPERT_PATHS, Routing, experts_dense, top_k
from torch_ref.rotary import make_rope
from torch_ref.spec.config import ComputeConfig, ModelConfig
from torch_ref.spec.interface import IGNORE, UserError
from torch_ref.spec.leaving import no_room
from torch_ref.spec.storage import first_line

TOKENS = 256
"""Of the rows that paths are compared on."""


def self_checked(compute: ComputeConfig, device: torch.device, config: ModelConfig) -> ComputeConfig:
    """The same settings, with a path that fails its check on this device replaced, with a warning, by the plain one.
    Raises `UserError` where that fails too, where the loss is wrong, or an optimizer step does not move the weights."""
    of_attention = partial(attention_error, between_documents=compute.separator is not None)
    for option, plain, check in (("attention", "plain", of_attention), ("moe", "dense", experts_error)):
        path = getattr(compute, option)
        problem = _tried(check, path, compute.dtype, device, config)
        if problem and path != plain:
            warnings.warn(
                f"--{option} {path} is wrong on {describe(device)}: {problem}; using the slower {plain}", stacklevel=2
            )
            compute = dataclasses.replace(compute, **{option: plain})
            path, problem = plain, _tried(check, plain, compute.dtype, device, config)
        if problem:
            raise UserError(
                f"--device {device.type}: even --{option} {path} is wrong on {describe(device)}: {problem}; "
                "use --device cpu or another version of torch"
            )
    if problem := _tried(loss_error, compute.dtype, device, config):
        raise UserError(
            f"--device {device.type}: the loss is wrong on {describe(device)}: {problem}; "
            "use --device cpu or another version of torch"
        )
    if problem := optimizer_error(device):
        raise UserError(f"--device {device.type}: {problem}; use --device cpu or another version of torch")
    return compute


def _tried(check: Callable[..., str | None], *arguments) -> str | None:
    """What a check finds; a path that fails outright is wrong too. A full device is not its doing: slower ones take
    more."""
    try:
        return check(*arguments)
    except RuntimeError as error:
        if no_room(error):
            raise
        return first_line(error)


def attention_error(
    path: str, dtype: str, device: torch.device, config: ModelConfig, between_documents: bool = False
) -> str | None:
    """Why an attention path cannot be trusted on `device`, or None: no position may see a later one, and output and
    gradients must be those of the plain path on the CPU. `between_documents`: in rows of three documents, to which
    attention keeps."""
    c, generator = config, torch.Generator().manual_seed(0)
    heads = ((c.num_heads, c.qk_head_dim), (c.num_kv_heads, c.qk_head_dim), (c.num_kv_heads, c.v_head_dim))
    for seq in (1, 2, 5, 64, 96, TOKENS):
        shapes = [(2, seq, *shape) for shape in (*heads, (c.num_heads, c.v_head_dim))]
        *operands, upstream = (torch.randn(shape, generator=generator) for shape in shapes)
        operands = [operand.to(getattr(torch, dtype)) for operand in operands]

        def attend(function, operands, device, seq=seq, upstream=upstream):
            documents = torch.arange(2 * seq, device=device).view(2, seq) // (seq // 3 + 1)
            documents = documents if between_documents else None
            return _with_gradients(
                lambda q, k, v: function(q, k, v, c.softmax_scale, documents), operands, upstream, device
            )

        got = attend(ATTENTION_PATHS[path], operands, device)
        if problem := _difference(got, attend(attend_plain, operands, torch.device("cpu")), dtype):
            return f"{problem} at length {seq}"
        half = seq // 2
        changed = [torch.cat((operand[:, :half], -operand[:, half:]), dim=1) for operand in operands]
        seen = attend(ATTENTION_PATHS[path], changed, device)[0]
        if half and _difference([seen[:, :half]], [got[0][:, :half]], dtype):
            return f"later tokens leak into earlier ones at length {seq}"
    return None


def experts_error(path: str, dtype: str, device: torch.device, config: ModelConfig) -> str | None:
    """Why an expert path cannot be trusted on `device`, or None: output and gradients must be those of all experts on
    all tokens on the CPU, with an expert that gets every token and, if there are enough, one that gets none."""
    c, generator = config, torch.Generator().manual_seed(0)
    if not c.num_moe_layers:
        return None
    shapes = (
        (TOKENS, c.hidden_size),
        (c.n_routed_experts, c.moe_intermediate_size, c.hidden_size),
        (c.n_routed_experts, c.moe_intermediate_size, c.hidden_size),
        (c.n_routed_experts, c.hidden_size, c.moe_intermediate_size),
        (TOKENS, c.hidden_size),
    )
    *operands, upstream = (torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for shape in shapes)
    operands = [operands[0].to(getattr(torch, dtype)), *operands[1:]]
    scores = torch.rand(TOKENS, c.n_routed_experts, generator=generator)
    scores[:, 0], scores[:, -1] = 2.0, -1.0
    chosen = top_k(scores, c.num_experts_per_tok)
    weights = torch.rand(chosen.shape, generator=generator)

    def run(function, device):
        def apply(x, weights, gate, up, down):
            return function(x, Routing(chosen.to(device), weights, scores.to(device)), gate, up, down, False)

        return _with_gradients(apply, [operands[0], weights, *operands[1:]], upstream, device)

    return _difference(run(EXPERT_PATHS[path], device), run(experts_dense, torch.device("cpu")), dtype)


def loss_error(dtype: str, device: torch.device, config: ModelConfig) -> str | None:
    """Why the loss cannot be trusted on `device`, or None: it and its gradients must be those of the plain one on the
    CPU, in a chunk of tokens and the rest of one."""
    generator = torch.Generator().manual_seed(0)
    shapes = (TOKENS, config.hidden_size), (config.vocab_size, config.hidden_size)
    operands = [torch.randn(shape, generator=generator) / 4 for shape in shapes]
    operands[0] = operands[0].to(getattr(torch, dtype))
    targets = torch.randint(config.vocab_size, (TOKENS,), generator=generator)
    targets[::5] = IGNORE

    def run(function, device, *more):
        def apply(hidden, embedding):
            return function(hidden, embedding, targets.to(device), *more)

        return _with_gradients(apply, operands, torch.ones(()), device)

    loss, *got = run(cross_entropy, device, TOKENS * 3 // 4)
    plain, *expected = run(cross_entropy_plain, torch.device("cpu"))
    none = loss.new_zeros(0)  # the loss is far larger than its gradients, and compared by itself
    return _difference([loss], [plain], dtype) or _difference([none, *got], [none, *expected], dtype)


def optimizer_error(device: torch.device) -> str | None:
    """In-place updates have silently done nothing on some devices: whether a step of AdamW moves every weight."""
    weight = torch.nn.Parameter(torch.ones(8, 8, device=device))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused_adamw(device))
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    return None if bool((weight < 1).all()) else "AdamW does not move the weights there"


def compile_checked(compute: ComputeConfig, model: Model, tokens: Int[Tensor, "batch seq"]) -> ComputeConfig:
    """The same settings; without compiled layers, with a warning, if they cannot be made or are wrong."""
    problem = compile_error(compute, model, tokens)
    if problem is None:
        return compute
    warnings.warn(f"--compile on: {problem}; layers run uncompiled, slower", stacklevel=2)
    return dataclasses.replace(compute, compile="off")


def compile_error(compute: ComputeConfig, model: Model, tokens: Int[Tensor, "batch seq"]) -> str | None:
    """Why compiled layers cannot be used for batches of this shape, or None. Of the first layer of each kind, output
    and gradients must be those of the layer itself. The two round differently, and rounding chooses other experts for a
    token now and then: nine tokens of ten have to agree, and the gradients of parameters by and large; all of it has to
    be finite."""
    tolerance = {"bfloat16": 5e-2, "float32": 1e-3}.get(compute.dtype, 1e-6)
    for block in {block.dense: block for block in reversed(model.layers)}.values():
        try:
            got = layer_pass(compiled_layer(), model, block, tokens, compute)()
        except Exception as error:  # of many kinds: no compiler, a kernel that does not fit, a fault of torch's own
            return f"{type(error).__name__}: {first_line(error)}"
        expected = layer_pass(run_layer, model, block, tokens, compute)()
        # What comes out as nothing but rounding, as a router's gradient where each token has one expert, counts as 0.
        negligible = 1e-3 * max(gradient.norm() for gradient in expected[2:])
        for index, (a, b) in enumerate(zip(got, expected, strict=True)):
            per_token = index < 2
            if per_token:
                error = (wide(a) - wide(b)).norm(dim=-1) / wide(b).norm(dim=-1)
            else:
                error = (a - b).norm() / torch.maximum(b.norm(), negligible)
            agrees = float(error.flatten().sort().values[int(0.9 * error.numel())]) <= (tolerance if per_token else 0.5)
            if not agrees or not bool(a.isfinite().all()):
                return f"{('output', 'gradient')[index > 0]} of a compiled layer is wrong"
    return _compiled_loss_error(compute, model, tokens)


def _compiled_loss_error(compute: ComputeConfig, model: Model, tokens: Int[Tensor, "batch seq"]) -> str | None:
    """Why the loss's compiled gradient cannot be used, or None."""
    embedding = model.embed_tokens.weight.detach()
    targets, chunk = tokens.flatten()[: compute.loss_chunk], compute.loss_chunk
    hidden = torch.randn(len(targets), embedding.shape[1], generator=torch.Generator().manual_seed(0))
    operands = [hidden.to(embedding.device, getattr(torch, compute.dtype)), embedding]

    def run(compiled: bool) -> list[Tensor]:
        leaves = [operand.clone().requires_grad_() for operand in operands]
        loss = cross_entropy(*leaves, targets, chunk, compiled)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    try:
        got = run(compiled=True)
    except Exception as error:  # as above
        return f"{type(error).__name__}: {first_line(error)}"
    for what, a, b in zip(("loss", "gradient", "gradient"), got, run(compiled=False), strict=True):
        if not float((wide(a) - wide(b)).norm() / wide(b).norm()) <= {"bfloat16": 1e-2}.get(compute.dtype, 1e-4):
            return f"{what} of the compiled loss is wrong"
    return None


def layer_pass(
    function: Callable, model: Model, block: Block, tokens: Int[Tensor, "batch seq"], compute: ComputeConfig
) -> Callable[[], list[Tensor]]:
    """A forward and backward pass of one layer on the embeddings of tokens by `run_layer`, or by it compiled: gives
    output, gradient of the input and gradients of the parameters, done when it returns."""
    dtype = getattr(torch, compute.dtype)
    rope = make_rope(model.config, tokens.shape[1], dtype, tokens.device)
    x = model.embed_tokens.weight.detach()[tokens.long()].to(dtype)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    documents = None if compute.separator is None else document_numbers(tokens, compute.separator)

    def run() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        out, _ = function(block, leaf, rope, compute, documents)
        results = [out.detach(), *torch.autograd.grad(out, [leaf, *block.parameters()], upstream)]
        if tokens.is_cuda:
            torch.cuda.synchronize()
        return results

    return run


def fused_adamw(device: torch.device) -> bool:
    """Whether to use torch's one-kernel AdamW: on MPS its plain form is the better tested one."""
    return device.type in ("cpu", "cuda")


def _with_gradients(function, operands: list[Tensor], upstream: Tensor, device: torch.device) -> list[Tensor]:
    """Output of `function`, and the gradients of its operands for an upstream gradient, all on the CPU."""
    leaves = [operand.to(device).detach().clone().requires_grad_() for operand in operands]
    # Freed, this is what the function is given as fresh memory: values that it leaves unwritten then show.
    poison = [torch.full_like(leaf, float("nan")) for leaf in leaves for _ in range(4)]
    del poison
    out = function(*leaves)
    gradients = torch.autograd.grad(out, leaves, upstream.to(device=device, dtype=out.dtype))
    return [tensor.detach().cpu() for tensor in (out, *gradients)]


def _difference(got: list[Tensor], expected: list[Tensor], dtype: str) -> str | None:
    """The first error that is larger than rounding explains, relative to the largest expected value."""
    tolerance = 4e-2 if dtype == "bfloat16" else 1e-4
    scale = max(float(tensor.abs().max()) for tensor in expected if tensor.numel())
    for what, a, b in zip(("output", *["gradient"] * len(got)), got, expected, strict=False):
        error = float((a.double() - b.double()).abs().max()) / scale if a.numel() else 0.0
        if not error <= tolerance:
            return f"{what} off by {error:.1e} of the largest value"
    return None
