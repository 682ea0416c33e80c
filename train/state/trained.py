"""A trained model out of whatever holds one, for generation and evaluation in either framework."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal, Protocol

import numpy as np
import tyro
from jaxtyping import Float, Int32

from torch_ref.spec.config import ComputeConfig, ModelConfig
from torch_ref.spec.interface import Sampling, TrainingState, UserError
from torch_ref.spec.parameters import Parameter, parameter_table
from train.data.tokenizer import TextTokenizer, load_tokenizer
from train.state.source import Source, locate, open_state

Framework = Literal["auto", "flax", "torch"]
DTypeName = Literal["auto", "float32", "bfloat16", "float64"]


class Generate(Protocol):
    """`generate` of either framework, with its model."""

    def __call__(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        seed: int,
        on_token: Callable[[list[int | None]], None] | None = None,
    ) -> list[list[int]]: ...


@dataclass(frozen=True)
class TrainedModel:
    """A model that is done with training, in the framework that runs it."""

    config: ModelConfig
    tokenizer: TextTokenizer
    framework: str
    device: str
    """In words."""
    generate: Generate
    losses: Callable[[Int32[np.ndarray, "rows seq"], Int32[np.ndarray, "rows seq"]], Float[np.ndarray, " rows"]]
    """Sum of the next-token losses of each row, in nats, of inputs and targets; targets `IGNORE` are not scored."""


def open_trained(
    path: Path,
    framework: Framework = "auto",
    step: int | None = None,
    tokenizer: str | None = None,
    dtype: DTypeName = "auto",
    device: str = "auto",
) -> TrainedModel:
    """The model at a path: a run folder, a checkpoint, a `transformers` folder or anything else that `locate` finds.

    Args:
        framework: `auto` is the one that wrote it, or else the one that is installed (torch before Flax).
        step: which checkpoint of a run folder; None takes the latest.
        tokenizer: a folder or a name on the Hub; None takes the one beside the model.
        dtype: that of the products, and of the weights in memory; `auto` is bfloat16 on GPUs that have it.

    Raises `UserError` if there is nothing to read, or the framework is not installed.
    """
    source = locate(path, step)
    framework = choose_framework(source, framework)
    state = open_state(source)
    text = load_tokenizer(tokenizer or _tokenizer_beside(source))
    text.require_fit(state.model_config.vocab_size)
    return TrainedModel(state.model_config, text, framework, *open_in(framework, state, dtype, device))


@dataclass(frozen=True)
class ModelOptions:
    """Settings of commands that run a trained model: which one, and where."""

    model: Annotated[Path, tyro.conf.Positional]
    """A run folder, a checkpoint, a transformers folder or a file of final weights."""
    framework: Framework = "auto"
    """The framework to run it in. auto: the one that wrote the model."""
    step: int | None = None
    """The step of the checkpoint in a run folder; None: the latest."""
    tokenizer: str | None = None
    """The tokenizer's folder or name on the Hub; None: the one beside the model."""
    dtype: DTypeName = "auto"
    """Precision of the products. auto: bfloat16 on GPUs that have it, else float32."""
    device: str = "auto"
    """Where to compute: auto, cuda, mps or cpu."""

    def open(self) -> TrainedModel:
        """`open_trained` with these."""
        return open_trained(self.model, self.framework, self.step, self.tokenizer, self.dtype, self.device)


def open_in(framework: str, state: TrainingState, dtype: DTypeName, device: str) -> tuple[str, Generate, Callable]:
    """A state's model in a framework: the device in words, and `TrainedModel`'s functions `generate` and `losses`."""
    return {"torch": _open_in_torch, "flax": _open_in_flax}[framework](state, dtype, device)


def choose_framework(source: Source, asked: Framework) -> str:
    """The framework to run a model in."""
    packages = {"torch": "torch", "flax": "flax"}
    installed = [name for name, package in packages.items() if find_spec(package)]
    if asked == "auto":
        wrote = {"torch": "torch", "flax": "flax", "weights": "flax"}.get(source.kind)
        if wrote in installed:
            return wrote
        if not installed:
            raise UserError("--framework: neither torch nor Flax is installed; pip install -e '.[torch]' or '.[jax]'")
        return installed[0]
    if asked not in installed:
        extra = {"torch": "torch", "flax": "jax"}[asked]
        raise UserError(f"--framework {asked}: is not installed: pip install -e '.[{extra}]'")
    return asked


def _tokenizer_beside(source: Source) -> str:
    folder = source.run
    if folder is None or not (folder / "tokenizer.json").is_file():
        raise UserError(f"--tokenizer: {source.path} has no tokenizer.json beside it; name a folder that has one")
    return str(folder)


def _values(state: TrainingState) -> Iterator[tuple[Parameter, np.ndarray]]:
    return ((row, state.weights[row.name]) for row in parameter_table(state.model_config))


def _open_in_torch(state: TrainingState, dtype: DTypeName, device: str) -> tuple[str, Generate, Callable]:
    import torch

    from torch_ref.device import default_dtype, describe, resolve_compute, resolve_device
    from torch_ref.generate import cast_weights, generate
    from torch_ref.loss import row_losses
    from torch_ref.model import Model
    from torch_ref.self_check import self_checked

    place = resolve_device(device)
    compute = resolve_compute(ComputeConfig(dtype=default_dtype(place) if dtype == "auto" else dtype), place)
    if place.type != "cpu":
        compute = self_checked(compute, place, state.model_config)
    model = Model(state.model_config, place, getattr(torch, compute.param_dtype)).load_values(_values(state))
    cast_weights(model, compute)

    @torch.no_grad()
    def losses(inputs, targets):
        inputs, targets = (torch.from_numpy(array).to(place) for array in (inputs, targets))
        hidden = model(inputs, compute).hidden
        return row_losses(hidden, model.embed_tokens.weight, targets, compute.loss_chunk).cpu().numpy()

    def generate_tokens(prompts, sampling, seed, on_token=None):
        return generate(model, prompts, sampling, seed, compute, on_token)

    return describe(place), generate_tokens, losses


def _open_in_flax(state: TrainingState, dtype: DTypeName, device: str) -> tuple[str, Generate, Callable]:
    import jax

    from flax_model.compile_cache import keep_compiled_programs
    from flax_model.device import default_dtype, describe, resolve_compute, resolve_device
    from flax_model.generate import cast_weights, generate
    from flax_model.loss import row_losses
    from flax_model.self_check import self_checked
    from flax_model.trees import merge
    from flax_model.values import from_values

    place = resolve_device(device)
    keep_compiled_programs(place.platform)
    compute = ComputeConfig(dtype=default_dtype(place) if dtype == "auto" else dtype)
    compute = resolve_compute(compute, place, state.model_config)
    if place.platform != "cpu":
        compute = self_checked(compute, place, state.model_config)
    jax.config.update("jax_default_device", place)
    if compute.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    graphdef, params, biases = from_values(state.model_config, _values(state), np.dtype(compute.param_dtype))
    params = cast_weights(params, compute)

    @jax.jit
    def losses(params, biases, inputs, targets):
        model = merge(graphdef, params, biases)
        hidden = model(inputs, compute).hidden
        return row_losses(hidden, model.embed_tokens.weight[...], targets, compute.loss_chunk)

    def generate_tokens(prompts, sampling, seed, on_token=None):
        return generate(merge(graphdef, params, biases), prompts, sampling, seed, compute, on_token)

    return describe(place), generate_tokens, lambda *rows: np.asarray(losses(params, biases, *rows))
