"""The model card of an export: what it says of the model, its training and its parity."""

from __future__ import annotations

import json
from dataclasses import replace

from parity_tests.support.backends import CONFIG
from torch_ref.spec.interface import TrainingState
from torch_ref.spec.parameters import count_active_parameters, count_parameters, initial_values
from train.convert import main
from train.run.options import Options
from train.state.card import UNCHECKED, VERDICT, model_card
from train.state.neutral import write_state

META = {
    "options": Options(
        model=CONFIG, preset="tiny", dataset="poems", tokenizer="bpe", dtype="float32", seq_len=16
    ).to_dict(),
    "progress": {"tokens_seen": 123456, "loss": 2.5, "best_loss": 2.25, "best_step": 60},
}


def test_it_tells_sizes_data_losses_and_who_serves_it():
    card = model_card(TrainingState(CONFIG, {}, step=70, meta=META), None)
    assert card.startswith("---\nlibrary_name: transformers\n") and "\n# tiny\n" in card
    for fact in (
        f"{count_parameters(CONFIG):,} parameters, {count_active_parameters(CONFIG):,} of them active",
        "| vocabulary | 96 |",
        "| layers | 2, 2 of them with experts |",
        "| experts | 4 routed (2 per token), 1 shared |",
        "data: poems; tokenizer bpe",
        "rows of 16 tokens, 8 a step; learning rate up to 0.003; seed 0; computed in float32",
        "70 steps, 123,456 tokens",
        "loss of the last step: 2.5000 nats per token (perplexity 12.18)",
        "lowest loss on held-out text: 2.2500 nats per token (perplexity 9.49), at step 60",
        "- mlx-lm: yes",
        "- llama.cpp: no",
        UNCHECKED,
    ):
        assert fact in card, fact


def test_of_weights_alone_it_tells_no_training():
    card = model_card(TrainingState(replace(CONFIG, first_k_dense=2), {}), None)
    assert "## Training" not in card and "\n# A DeepSeek-V3-style language model\n" in card
    assert "| experts | none |" in card


def test_a_verdict_is_that_of_the_very_step(tmp_path):
    (tmp_path / VERDICT).parent.mkdir()
    (tmp_path / VERDICT).write_text(json.dumps({"step": 70, "text": "**Yes**, to rounding."}))
    assert "**Yes**, to rounding." in model_card(TrainingState(CONFIG, {}, step=70, meta=META), tmp_path)
    other = model_card(TrainingState(CONFIG, {}, step=71, meta=META), tmp_path)
    assert "**Yes**" not in other and UNCHECKED in other


def test_an_export_has_one_and_says_which_engines_take_it(tmp_path, capsys):
    weights = {row.name: value for row, value in initial_values(CONFIG, 1)}
    state = TrainingState(CONFIG, weights, step=3, meta=META)
    write_state(tmp_path / "state", state)
    assert main([str(tmp_path / "state"), str(tmp_path / "out"), "--to", "transformers"]) == 0
    assert (tmp_path / "out/README.md").read_text(encoding="utf-8") == model_card(state, tmp_path / "state/run")
    said = capsys.readouterr().out
    assert "mlx-lm: yes" in said and "llama.cpp: no; it needs a q_lora_rank" in said
