"""Which engines an export is said to suit: the rules, and mlx-lm itself where it is installed."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from parity_tests.support.exports import SMALL, VARIANTS, torch_logits, values_with_bias
from torch_ref.spec.config import PRESETS
from torch_ref.spec.huggingface import export_folder
from torch_ref.spec.huggingface_engines import engines

FULL = replace(SMALL, q_lora_rank=16, kv_lora_rank=512, qk_rope_head_dim=64, rms_norm_eps=1e-6)
"""Nothing in any engine's way."""


def said(config) -> dict[str, str]:
    return dict(str(engine).split(": ", 1) for engine in engines(config))


@pytest.mark.parametrize(
    ("changes", "engine", "verdict"),
    [
        ({}, "vLLM", "yes, by its sources"),
        ({}, "mlx-lm", "yes"),
        ({}, "llama.cpp", "yes"),
        ({"kv_lora_rank": 256}, "vLLM", "yes, by its sources"),
        ({"kv_lora_rank": 72, "qk_rope_head_dim": 40}, "vLLM", "VLLM_MLA_DISABLE=1, as .* 320 or 576 .*, not 112"),
        ({"rms_norm_eps": 1e-5}, "SGLang", "yes, by its sources; its latent norms take epsilon 1e-05 for 1e-06"),
        ({"rms_norm_eps": 1e-5}, "llama.cpp", "yes; its latent norms take epsilon 1e-05 for 1e-06"),
        ({"q_lora_rank": None}, "llama.cpp", "no; it needs a q_lora_rank, but for 26 or 27 layers"),
        ({"q_lora_rank": None, "num_layers": 26}, "llama.cpp", "yes"),
        ({"n_shared_experts": 0}, "mlx-lm", "no; n_shared_experts = 0"),
        ({"n_shared_experts": 0}, "vLLM", "no; n_shared_experts = 0"),
        ({"n_shared_experts": 0, "first_k_dense": 3}, "llama.cpp", "yes"),
        ({"num_experts_per_tok": 1}, "mlx-lm", "no; num_experts_per_tok = 1"),
        ({"num_experts_per_tok": 1}, "vLLM", "yes, by its sources"),
    ],
)
def test_what_is_said_of_a_model(changes, engine, verdict):

    assert re.search(f"{verdict}$" if verdict.startswith("yes") else verdict, said(replace(FULL, **changes))[engine])


def test_of_the_presets_all_but_llama_cpp_take_each():
    for config in PRESETS.values():
        assert [engine.name for engine in engines(config) if engine.obstacles] == ["llama.cpp"]


@pytest.mark.parametrize("name", [*VARIANTS, "one expert a token"])
def test_mlx_computes_the_same_logits_unless_it_is_said_not_to(tmp_path, name):
    """560 tokens in float32 on the CPU."""
    mx, utils = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm.utils")
    torch = pytest.importorskip("torch")
    config = {**VARIANTS, "one expert a token": replace(SMALL, num_experts_per_tok=1)}[name]
    export_folder(tmp_path / "out", config, values_with_bias(config))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 560))
    expected = torch_logits(config, values_with_bias(config), torch.from_numpy(tokens)).numpy()

    def error() -> float:
        model, _ = utils.load_model(tmp_path / "out")
        return float(np.abs(np.array(model(mx.array(tokens))) - expected).max() / np.abs(expected).max())

    with mx.stream(mx.cpu):
        if said(config)["mlx-lm"] == "yes":
            assert error() <= 1e-5
        else:
            try:
                assert error() > 1e-2
            except ZeroDivisionError:
                assert config.n_shared_experts == 0
