"""A micro-batch's forward and backward pass as one CUDA graph.

A step of `smol-774m` is 5,000 kernels of 30 us, and Python takes longer to launch them than the card to run them (on an
H100 199 ms of 155). Recorded once, they start together: nothing in them asks the host, and all sizes are fixed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from torch_ref.grouped_experts import grouped_kernels_take
from torch_ref.model import Model, Parts, objective
from torch_ref.spec.config import ComputeConfig, ModelConfig
from torch_ref.spec.storage import first_line

TOLERANCE = 5e-2
"""Of |got - expected| / |expected| over all gradients together. Between two passes over the same tokens sums in another
order have left 6e-3 in bfloat16 on an H100."""


def can_be_recorded(config: ModelConfig, compute: ComputeConfig, device: torch.device) -> bool:
    """Whether a pass asks the host for nothing. Where layers run uncompiled it is not tried: something was wrong, or
    the user wants to see each operation."""
    asks = compute.moe == "grouped" and not (
        compute.dtype == "bfloat16" and grouped_kernels_take(config.moe_intermediate_size, config.hidden_size)
    )
    return device.type == "cuda" and compute.compile == "on" and not asks


class RecordedObjective:
    """`objective` and its backward pass for micro-batches of one shape. Raises RuntimeError where CUDA cannot record
    them. Its gradients keep their memory, as do all activations: those of one pass."""

    def __init__(
        self,
        model: Model,
        inputs: Int[Tensor, "batch seq"],
        targets: Int[Tensor, "batch seq"],
        compute: ComputeConfig,
    ) -> None:
        self.made_for = inputs.shape, compute
        self._parameters = list(model.parameters())
        self._batch = inputs.clone(), targets.clone()
        self._counts = tuple(torch.ones((), device=inputs.device) for _ in range(2))

        def run() -> tuple[Parts, list[Tensor]]:
            total, parts = objective(model, *self._batch, compute, *self._counts)
            total.backward()
            return parts, [parameter.grad for parameter in self._parameters]

        model.zero_grad(set_to_none=True)
        self._replay, (self._parts, self._gradients) = record(run)
        self._rope = model._rope  # the graph reads it, and the model lets go of it for a pass of another length
        model.zero_grad(set_to_none=True)

    def __call__(
        self,
        inputs: Int[Tensor, "batch seq"],
        targets: Int[Tensor, "batch seq"],
        target_count: int,
        sequence_count: int,
    ) -> Parts:
        """Add this micro-batch's share to the parameters' gradients. What is returned is good until the next call."""
        sums = [parameter.grad for parameter in self._parameters]
        if sums[0] is self._gradients[0]:  # an earlier micro-batch's, which the replay overwrites
            sums = [gradient.clone() for gradient in sums]
        for kept, new in zip(self._batch, (inputs, targets), strict=True):
            kept.copy_(new)
        for kept, new in zip(self._counts, (target_count, sequence_count), strict=True):
            kept.fill_(new)
        self._replay()
        if sums[0] is None:
            sums = self._gradients
        else:
            torch._foreach_add_(sums, self._gradients)
        for parameter, gradient in zip(self._parameters, sums, strict=True):
            parameter.grad = gradient
        return self._parts


def record(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """A function that does on the device what `run` did there, and what `run` returned: the tensors that each replay
    writes anew."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph.replay, results


@contextmanager
def aside() -> Iterator[None]:
    """On a stream of its own, as CUDA wants what comes before a recording."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def recorded_checked(
    model: Model, inputs: Int[Tensor, "batch seq"], targets: Int[Tensor, "batch seq"], compute: ComputeConfig
) -> RecordedObjective | None:
    """The pass recorded; None, with a warning, if it cannot be or is not the pass itself on these tokens, which are not
    those that it was recorded with."""
    counts = targets.numel(), len(targets)
    with aside():
        for _ in range(2):  # the first one compiles
            model.zero_grad(set_to_none=True)
            total, parts = objective(model, inputs, targets, compute, *counts)
            total.backward()
        expected = [parts.loss_sum, *(parameter.grad for parameter in model.parameters())]
        model.zero_grad(set_to_none=True)
    del total, parts  # and with them what ties gradients to that stream
    problem, made = None, None
    try:
        made = RecordedObjective(model, inputs.flip(1), targets.flip(1), compute)
        got = [made(inputs, targets, *counts).loss_sum, *(parameter.grad for parameter in model.parameters())]
        off, size = (torch.stack(torch._foreach_norm(each)) for each in (torch._foreach_sub(got, expected), expected))
        if not float(off[0] / size[0]) <= TOLERANCE / 10 or not float(off[1:].norm() / size[1:].norm()) <= TOLERANCE:
            problem = "its loss or gradients are not those of the pass itself"
    except RuntimeError as error:  # also where memory does not suffice
        problem = first_line(error)
    model.zero_grad(set_to_none=True)
    if problem is None:
        return made
    warnings.warn(
        f"the gradient does not become one CUDA graph ({problem}); its kernels are launched one by one, slower",
        stacklevel=2,
    )
    return None
