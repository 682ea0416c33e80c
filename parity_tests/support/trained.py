"""A small model with a tokenizer of its own, as an exported folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from parity_tests.harness.cases import CONFIG, case_values
from torch_ref.spec.huggingface import export_folder
from train.data.tokenizer import train_tokenizer

DOCUMENTS = [
    "The cache holds one latent per token and layer, and the rotated key.",
    "é",
    "Perplexity is the exponential of the mean loss. " * 20,
    "Two lines\nand a 世界 of bytes.",
]
MODEL = replace(CONFIG, vocab_size=400, n_routed_experts=4, max_position=128)


def untied_values(config):
    """Values under which no two experts have equal scores: `transformers` does not say which it then takes."""
    for row, value in case_values(config):
        if ".router." in row.name:
            value = value + 0.1 * np.random.default_rng(len(row.name)).standard_normal(row.shape)
        yield row, value


def trained_folder(folder: Path) -> Path:
    """A `transformers` folder of random weights."""
    tokenizer = train_tokenizer(DOCUMENTS, MODEL.vocab_size)
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer")
    settings = {"tokenizer": folder / "tokenizer", "end_of_text": tokenizer.eot_id}
    export_folder(folder / "model", MODEL, untied_values(MODEL), **settings)
    return folder / "model"
