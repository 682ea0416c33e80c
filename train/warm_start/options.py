"""Settings of a warm start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from torch_ref.spec.config import ModelConfig
from torch_ref.spec.interface import UserError


@dataclass(frozen=True, kw_only=True)
class WarmStartOptions:
    """Turn a Llama such as SmolLM2-135M into latent attention and experts."""

    source: Annotated[str, tyro.conf.arg(name="from")]
    """The old model: a GGUF file, a transformers folder, or a Hub name such as HuggingFaceTB/SmolLM2-135M."""
    out: Path
    """A new folder for the model."""
    preset: str = "smol-774m-warm"
    """The preset that gives the new model's sizes."""
    tokenizer: str | None = None
    """Folder or Hub name of the tokenizer; it must have the old model's entries. Default: the old model's own."""
    dataset: str = "python-docs"
    """Text to fit on and, the held-out part of it, to measure on: python-docs, files, or a Hub name."""
    also_measure: tuple[str, ...] = ()
    """Further texts to measure losses on; nothing is fitted to them."""
    text_field: str = "text"
    """Column or key of the datasets that holds the text."""
    seq_len: int = 512
    """Number of tokens in a row of the fits."""
    fit_rows: int = 64
    """Number of rows that the attention layers are fitted on."""
    fit_steps: int = 60
    """AdamW steps to fit each layer; 0 keeps the closed form."""
    fit_batch: int = 4
    """Rows in each step of the fits."""
    fit_learning_rate: float = 0.002
    """Peak learning rate of the fits."""
    distill_steps: int = 80
    """Steps of the whole dense model towards the old model's predictions; 0 leaves it as the layers were fitted."""
    distill_batch: int = 2
    """Rows in each step of the distillation; all rows are new."""
    distill_learning_rate: float = 0.0002
    """Peak learning rate of attention and norms in the distillation."""
    distill_mlp_learning_rate: float = 0.0
    """Peak learning rate of MLPs in the distillation; 0 leaves them as they are."""
    distill_text_weight: float = 0.0
    """Weight of the text's own next token against the old model's predictions: 0 imitates, 1 only learns the text."""
    diversity: float = 0.0
    """Share of each routed expert's units that are drawn anew; 0 keeps the dense model's function exactly."""
    measure_tokens: int = 16384
    """Number of tokens to measure on, at most, of each text."""
    measure_lengths: tuple[int, ...] = (512, 2048)
    """Row lengths at which losses are measured."""
    validation_fraction: float = 0.1
    """Share of the dataset's documents that is held out to measure on."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """Precision of the distillation's forward and backward passes."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the tensors that are written."""
    seed: int = 0
    """Seed of row order, router and diversity."""


def check_options(options: WarmStartOptions, config: ModelConfig) -> None:
    """Raises `UserError` naming an option that is out of range or does not fit the new model."""
    for name in ("fit_rows", "fit_batch", "distill_batch", "measure_tokens"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    rates = "fit_learning_rate", "distill_learning_rate", "distill_mlp_learning_rate"
    for name in ("fit_steps", "distill_steps", "seed", *rates):
        if not getattr(options, name) >= 0:  # not a number either
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 0")
    if options.distill_steps and not options.distill_learning_rate and not options.distill_mlp_learning_rate:
        raise UserError(
            "--distill-learning-rate 0: with --distill-mlp-learning-rate 0 the distillation trains nothing; "
            "--distill-steps 0 leaves it out"
        )
    for name in ("diversity", "distill_text_weight"):
        if not 0 <= getattr(options, name) <= 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: is a share, from 0 to 1")
    for name, lengths in (("--seq-len", (options.seq_len,)), ("--measure-lengths", options.measure_lengths)):
        for length in lengths:
            if not 2 <= length <= config.max_position:
                raise UserError(f"{name} {length}: must be from 2 to the model's max_position = {config.max_position}")
    texts = (options.dataset, *options.also_measure)
    for name in options.also_measure:
        if texts.count(name) > 1:  # of the dataset, its training documents would be measured as if held out
            raise UserError(f"--also-measure {name}: is measured already (--dataset, or named twice)")
    if options.out.resolve() == Path.cwd():  # replaced, it would leave the shell in a removed one
        raise UserError(f"--out {options.out}: is the current folder; name a new one")
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise UserError(f"--out {options.out}: exists already; name a new folder")
