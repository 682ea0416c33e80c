"""Outputs and gradients of one function in either framework, for operands given as NumPy arrays."""

import importlib

import numpy as np


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
